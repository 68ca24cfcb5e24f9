import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import BadInput
from shoal.identity import (
    BadEnvelope,
    BadKeyFile,
    BadSignature,
    Envelope,
    KeyPair,
    blake3_hash,
    hash_from_hex,
    hash_of_parts,
    load_key,
    load_or_create_key,
    node_id_from_hex,
    seal,
)
from shoal.identity.keys import verify

KEY = KeyPair.from_seed(b"k" * 32)
OTHER = KeyPair.from_seed(b"o" * 32)


def test_an_envelope_survives_its_journey() -> None:
    envelope = seal(KEY, "shoal", "offer", 1, b"body")
    arrived = Envelope.from_bytes(envelope.to_bytes(), max_body_bytes=100)
    arrived.verify()
    assert arrived == envelope
    assert arrived.record_id == envelope.record_id


SIGNER = bytes.fromhex("8320a51977d8c38ca8a4927c670df5821e449761945e15e9efb26a1509d230ea")
SIGNED = b"shoal/envelope/1\x00" + b"\x05shoal" + b"\x05offer" + b"\x01\x02" + SIGNER + b"body"


def test_what_is_signed_never_changes() -> None:
    """Frozen: records that were signed once are verified for ever. Written out here byte by byte, not by the code."""
    envelope = seal(KEY, "shoal", "offer", 0x0102, b"body")
    assert envelope.signer == SIGNER
    assert verify(SIGNER, envelope.signature, SIGNED)
    assert envelope.record_id == blake3_hash(SIGNED)
    packed = b"\x96\xa5shoal\xa5offer\xcd\x01\x02\xc4\x20" + SIGNER + b"\xc4\x04body\xc4\x40" + envelope.signature
    assert envelope.to_bytes() == packed
    assert Envelope.from_bytes(packed, 4) == envelope


@pytest.mark.parametrize(
    "change",
    [
        {"network": "other"},
        {"kind": "commit"},
        {"version": 2},
        {"signer": OTHER.node_id},
        {"body": b"Body"},
        {"signature": bytes(64)},
    ],
)
def test_a_signature_is_good_for_one_purpose_only(change: dict[str, object]) -> None:
    envelope = msgspec.structs.replace(seal(KEY, "shoal", "offer", 1, b"body"), **change)
    with pytest.raises(BadSignature):
        envelope.verify()


def test_moving_a_byte_between_network_and_kind_breaks_the_signature() -> None:
    envelope = seal(KEY, "ab", "cd", 1, b"")
    with pytest.raises(BadSignature):
        msgspec.structs.replace(envelope, network="abc", kind="d").verify()


def test_the_record_id_does_not_depend_on_the_signature_bytes() -> None:
    envelope = seal(KEY, "shoal", "offer", 1, b"body")
    assert msgspec.structs.replace(envelope, signature=bytes(64)).record_id == envelope.record_id


def test_oversized_bytes_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(BadEnvelope, match="at most 10"):
        Envelope.from_bytes(b"\xff" * 1000, max_body_bytes=10)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_parser(data: bytes) -> None:
    try:
        Envelope.from_bytes(data, max_body_bytes=1000)
    except BadEnvelope:
        pass


@given(st.binary(max_size=200), st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_any_changed_byte_is_noticed(body: bytes, position: int, flip: int) -> None:
    data = bytearray(seal(KEY, "shoal", "offer", 1, body).to_bytes())
    data[position % len(data)] ^= flip
    with pytest.raises((BadEnvelope, BadSignature)):
        Envelope.from_bytes(bytes(data), max_body_bytes=1000).verify()


def test_a_new_key_file_is_for_its_owner_only_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "node.key"
    old = os.umask(0)
    try:
        key = load_or_create_key(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key(path).node_id == key.node_id
    assert [entry.name for entry in path.parent.iterdir()] == ["node.key"]


def test_two_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    script = (
        "import sys; from pathlib import Path; from shoal.identity import load_or_create_key;"
        "print(load_or_create_key(Path(sys.argv[1])).node_id.hex())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    printed = {process.communicate()[0].strip() for process in running}
    assert len(printed) == 1 and len(printed.pop()) == 64


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    load_or_create_key(path)
    path.chmod(0o644)
    with pytest.raises(BadKeyFile, match="chmod 600"):
        load_key(path)


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_broken_key_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(BadKeyFile, match="node.key"):
        load_key(path)


def test_hashes_of_parts_do_not_collide_over_their_borders() -> None:
    assert hash_of_parts("x", [b"ab", b"c"]) != hash_of_parts("x", [b"a", b"bc"])
    assert hash_of_parts("x", [b"a"]) != hash_of_parts("y", [b"a"])


def test_hex_names_are_checked() -> None:
    assert hash_from_hex(blake3_hash(b"").hex()) == blake3_hash(b"")
    for bad in ("", "zz", "00" * 31):
        with pytest.raises(BadInput):
            hash_from_hex(bad)
        with pytest.raises(BadInput):
            node_id_from_hex(bad)
