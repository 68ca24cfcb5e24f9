"""Which shared states members keep for joiners."""

from __future__ import annotations

from shoal.protocol.training import Codec, RoundSettings
from shoal.rounds.joining import OFFERED_EVERY, OFFERED_MAX_BYTES, is_offered


def offered(codec: Codec, state_bytes: int) -> list[int]:
    return [number for number in range(20) if is_offered(number, state_bytes, RoundSettings(codec=codec))]


def test_sparse_updates_are_caught_up_with() -> None:
    assert offered(Codec.SPARSE2, 1000) == list(range(0, 20, OFFERED_EVERY))


def test_dense_updates_are_as_large_as_the_state() -> None:
    for codec in (Codec.NONE, Codec.INT8):
        assert offered(codec, 1000) == list(range(20))


def test_a_large_state_is_not_written_while_the_job_runs() -> None:
    assert offered(Codec.SPARSE2, OFFERED_MAX_BYTES + 1) == []
