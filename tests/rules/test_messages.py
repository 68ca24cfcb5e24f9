"""What every message promises: strict, bounded, and understood by the neighbouring version."""

from typing import ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.identity import KeyPair, seal
from shoal.protocol import messages, offers, training
from shoal.protocol.blobs import BlobRef
from shoal.protocol.messages import (
    BadMessage,
    Message,
    Record,
    UnknownKind,
    VersionMismatch,
    common_version,
    decode,
    encode,
    open_record,
    sign,
)
from shoal.training.commands import SKETCHED_STEPS_MAX

KEY = KeyPair.from_seed(b"k" * 32)


class Old(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A message as version 1 had it."""

    MAX_BYTES: ClassVar[int] = 64
    a: int


class New(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The same message in version 2, with a field more."""

    MAX_BYTES: ClassVar[int] = 64
    SINCE: ClassVar[dict[str, int]] = {"b": 2}
    a: int
    b: int = 0


def test_neighbouring_versions_understand_each_other_in_the_lower_one() -> None:
    assert decode(New, encode(Old(a=1)), version=2) == New(a=1)
    assert decode(Old, encode(New(a=1), version=1)) == Old(a=1)


def test_what_only_the_newer_version_can_say_is_not_said_in_the_older() -> None:
    with pytest.raises(VersionMismatch, match="exists since protocol 2"):
        encode(New(a=1, b=2), version=1)
    with pytest.raises(VersionMismatch):
        decode(New, encode(New(a=1, b=2), version=2), version=1)
    with pytest.raises(BadMessage):
        decode(Old, encode(New(a=1, b=2), version=2))


def test_a_contribution_has_room_for_the_sketches_of_every_round() -> None:
    most = max(-(-steps // -(-steps // SKETCHED_STEPS_MAX)) for steps in range(1, training.STEPS_MAX + 1))
    contribution = training.Contribution(
        job=bytes(32), round=0, term=1, assignment=bytes(32), member=bytes(32), base_state=bytes(32),
        update=BlobRef(bytes(32), 10), work=(training.NodeWork(bytes(32), 1, 1, 1),), private_before=bytes(32),
        private_after=bytes(32), loss_first=1.0, loss_last=1.0, sketches=bytes(most * 4 * (1 + training.SKETCH_WIDTH)),
        engine=training.Engine("a", "b", 1, 1),
    )  # fmt: skip
    assert decode(training.Contribution, encode(contribution)) == contribution


def test_the_common_version_is_the_newest_of_both() -> None:
    assert common_version((1, 2), (1, 1)) == 1
    assert common_version((1, 2), (2, 3)) == 2
    with pytest.raises(VersionMismatch, match="update the older"):
        common_version((1, 1), (2, 3))


def test_oversized_bytes_are_refused_unparsed() -> None:
    with pytest.raises(BadMessage, match="limit is 64"):
        decode(Old, b"\xc1" * 65)
    with pytest.raises(BadMessage, match="exceeds its limit"):
        encode(offers.OfferFind(name="x" * 48, accepts="y" * 5000))


def test_unknown_fields_and_wrong_types_are_refused() -> None:
    for body in ({"a": 1, "z": 2}, {"a": "1"}, {}, [1], 5):
        with pytest.raises(BadMessage):
            decode(Old, msgspec.msgpack.encode(body))


def grant() -> training.Grant:
    return training.Grant(job=bytes(32), drivers=(KEY.node_id,), not_after_ms=5)


def test_a_signed_record_opens_as_its_own_kind_only() -> None:
    envelope = sign(KEY, grant())
    assert open_record(envelope, training.Grant) == grant()
    with pytest.raises(UnknownKind, match=r"train\.grant"):
        open_record(envelope, training.Term)


def test_a_record_of_another_network_or_a_later_version_is_refused() -> None:
    with pytest.raises(VersionMismatch, match="network"):
        open_record(sign(KEY, grant(), network="testnet"), training.Grant)
    later = seal(KEY, "shoal", "train.grant", messages.PROTOCOL_VERSION + 1, encode(grant()))
    with pytest.raises(VersionMismatch, match="update it"):
        open_record(later, training.Grant)


def all_message_types(root: type[Message] = Message) -> list[type[Message]]:
    return [kind for child in root.__subclasses__() for kind in (child, *all_message_types(child))]


def test_every_message_is_strict_and_every_record_has_its_own_kind() -> None:
    kinds = [kind for kind in all_message_types() if kind.__module__.startswith("shoal.")]
    assert len(kinds) > 20
    for kind in kinds:
        config = kind.__struct_config__
        assert config.frozen and config.forbid_unknown_fields and config.omit_defaults, kind
    records = [kind.KIND for kind in kinds if issubclass(kind, Record) and kind is not Record]
    assert len(records) == len(set(records))


OURS = [kind for kind in all_message_types() if kind.__module__.startswith("shoal.") and kind is not Record]


@pytest.mark.parametrize("kind", OURS)
@given(data=st.binary(max_size=200))
def test_no_bytes_crash_a_decoder(kind: type[Message], data: bytes) -> None:
    try:
        decode(kind, data)
    except (BadMessage, VersionMismatch):
        pass
