"""From which shared state a joiner begins: one that every member still has on disk, so that it comes from several
peers; the Commits since are caught up with."""

from __future__ import annotations

from shoal.protocol.training import Codec, RoundSettings

OFFERED_EVERY = 8
"""Writing and hashing a state is a noticeable part of a small model's round, and catching up with a few sparse updates
is little. Dense updates are as large as the state: with them, every state is offered."""
OFFERED_MAX_BYTES = 256 << 20
"""Larger shared states are not written while the job runs; joiners then take the newest from the driver."""


def is_offered(round_number: int, state_bytes: int, settings: RoundSettings) -> bool:
    """Whether members keep the state that this round's Commit names for joiners."""
    every = OFFERED_EVERY if settings.codec is Codec.SPARSE2 else 1
    return state_bytes <= OFFERED_MAX_BYTES and round_number % every == 0
