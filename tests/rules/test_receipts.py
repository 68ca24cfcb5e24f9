"""What a node may claim, what is kept of it, and what a disk or a kill can do to that."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gateway.receipts import (
    Books,
    Figures,
    GatewayRunning,
    Kept,
    Metering,
    Missing,
    SessionMeter,
    judge,
    read_accounts,
)
from shoal.identity import KeyPair
from shoal.inference.metering import Served
from shoal.protocol.messages import sign
from shoal.protocol.serving import Choosing, RequestReceipt, StagePlace
from shoal.world import DirectoryDisk, FaultyDisk, HeldClock

NODE, OTHER = KeyPair.from_seed(b"n" * 32), KeyPair.from_seed(b"o" * 32)
JOB, RING = b"j" * 32, b"r" * 16
PLACE = StagePlace(node=NODE.node_id, first=2, stop=5)
HONEST = RequestReceipt(
    job=JOB, ring=RING, session=7, first=2, stop=5, prompt_tokens=10, generated_tokens=5, computed_positions=20
)
SEEN = Served(10, 5, 20)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20), st.integers(1, 90))
def test_tokens_are_counted_as_they_are_generated(steps: list[tuple[int, int]], prompt: int) -> None:
    """A stream as the gateway drives it: the prompt in pieces of 64, then guesses of which some hold."""
    served, kept, computed, generated = Served(), 0, 0, 0
    while prompt - kept > 64:
        served.add(kept, 64, 0, prompt)
        kept, computed = kept + 64, computed + 64
    done = prompt
    for guesses, held in steps:
        served.add(kept, done - kept + guesses, 1 + guesses, prompt)
        computed += done - kept + guesses
        certain = generated + 1
        kept, done, generated = (
            done + min(held, guesses),
            done + min(held, guesses) + 1,
            generated + min(held, guesses) + 1,
        )
    assert (served.prompt, served.computed, served.generated) == (prompt, computed, certain)
    assert certain <= generated <= certain + steps[-1][0], "of the last piece alone it is not known what held"


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        ({}, NODE, ""),
        ({"prompt_tokens": 0, "generated_tokens": 0, "computed_positions": 1}, NODE, ""),
        ({}, OTHER, "held the stage"),
        ({"job": b"x" * 32}, NODE, "another job, ring or session"),
        ({"ring": b"x" * 16}, NODE, "another job, ring or session"),
        ({"session": 8}, NODE, "another job, ring or session"),
        ({"first": 1}, NODE, "layers 1 to 4, and the stage held 2 to 4"),
        ({"prompt_tokens": 11}, NODE, "claims 11 prompt tokens, and 10 went through"),
        ({"generated_tokens": 6}, NODE, "claims 6 generated tokens, and 5"),
        ({"computed_positions": 21}, NODE, "claims 21 positions computed, and 20"),
    ],
)
def test_a_receipt_counts_when_it_claims_no_more_than_went_through(
    changes: dict[str, int | bytes], key: KeyPair, part: str
) -> None:
    envelope = sign(key, msgspec.structs.replace(HONEST, **changes))
    receipt, reason = judge(envelope, PLACE, job=JOB, ring=RING, session=7, seen=SEEN)
    assert receipt is not None and (part in reason if part else reason == "")


def test_a_receipt_with_a_wrong_signature_is_not_read() -> None:
    envelope = msgspec.structs.replace(sign(NODE, HONEST), signature=b"x" * 64)
    receipt, reason = judge(envelope, PLACE, job=JOB, ring=RING, session=7, seen=SEEN)
    assert receipt is None and "signature" in reason


def a_receipt(session: int) -> Kept:
    receipt = msgspec.structs.replace(HONEST, session=session)
    return Kept(
        time_ms=0, node=NODE.node_id.hex(), name="amber", job=JOB.hex(), ring=RING.hex(), session=f"{session:016x}",
        first=2, stop=5, figures=Figures(10, 5, 20), envelope=sign(NODE, receipt).to_bytes(),
    )  # fmt: skip


def test_what_is_heard_is_kept_apart_and_added_up(tmp_path: Path) -> None:
    said: list[str] = []
    books = Books(tmp_path, said.append)
    metering = Metering(JOB, books, HeldClock())
    meter = metering.ring(RING, [PLACE, StagePlace(node=OTHER.node_id, first=5, stop=6)], ["amber", "birch"])
    for session, claim in ((7, 20), (8, 21)):
        meter.sent(session, 0, 10, 1, Choosing(prompt_tokens=10))
        meter.sent(session, 10, 10, 1, Choosing(prompt_tokens=10))
        assert meter.open == [session]
        seen = meter.close(session)
        assert seen is not None and meter.close(session) is None
        receipt = msgspec.structs.replace(HONEST, session=session, computed_positions=claim, generated_tokens=2)
        meter.heard(session, seen, 0, sign(NODE, receipt).to_bytes())
        meter.heard(session, seen, 1, None)
    meter.heard(9, SessionMeter(), 0, b"")  # it knows of no work, and claims nothing
    meter.heard(9, SessionMeter(), 0, b"rubbish")
    counts = metering.counts
    assert (counts.receipts, counts.receipts_disputed, counts.receipts_missing) == (1, 2, 2)
    accounts = read_accounts(tmp_path)
    amber, birch = accounts.nodes[NODE.node_id.hex()], accounts.nodes[OTHER.node_id.hex()]
    assert (amber.sessions, amber.prompt_tokens, amber.generated_tokens) == (1, 10, 2)
    assert (amber.computed_positions, amber.layer_positions, amber.disputed, amber.name) == (20, 60, 2, "amber")
    assert (birch.sessions, birch.missing) == (0, 2)
    claimed = [line.claimed and line.claimed.computed_positions for line in accounts.disputed]
    assert claimed == [21, None] and accounts.bad == [] and said == []
    books.close()


def test_a_full_file_is_set_aside_and_all_are_read(tmp_path: Path) -> None:
    books = Books(tmp_path, print, file_max_bytes=2000)
    for session in range(20):
        books.add(a_receipt(session))
    names = sorted(path.name for path in tmp_path.glob("receipts*"))
    assert names[0] == "receipts.000001.jsonl" and len(names) > 5
    assert all(path.stat().st_size <= 2000 for path in tmp_path.glob("receipts*"))
    assert read_accounts(tmp_path).nodes[NODE.node_id.hex()].sessions == 20
    books.close()


def test_one_process_writes_and_a_torn_line_is_cut_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    first = Books(tmp_path, said.append)
    with pytest.raises(GatewayRunning, match="Another gateway"):
        Books(tmp_path, said.append)
    first.add(a_receipt(1))
    first.close()
    with (tmp_path / "receipts.jsonl").open("ab") as file:
        file.write(b'{"time_ms":0,"node"')
    second = Books(tmp_path, said.append)
    assert len(said) == 1 and "torn: 19 bytes were cut off" in said[0]
    second.add(a_receipt(2))
    second.close()
    accounts = read_accounts(tmp_path)
    assert accounts.nodes[NODE.node_id.hex()].sessions == 2 and accounts.bad == []


def test_a_disk_that_refuses_loses_no_other_line(tmp_path: Path) -> None:
    said, full = [], False

    def fault(operation: str, name: str) -> None:
        if full and operation == "write/half":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    books = Books(tmp_path, said.append, disk=FaultyDisk(DirectoryDisk(tmp_path), fault))
    for session in range(3):
        full = session == 1
        books.add(a_receipt(session))
    books.close()
    accounts = read_accounts(tmp_path)
    assert accounts.nodes[NODE.node_id.hex()].sessions == 2 and accounts.bad == []
    assert len(said) == 1 and "amber could not be written: No space left" in said[0]


def test_a_line_that_is_not_what_was_signed_is_found(tmp_path: Path) -> None:
    books = Books(tmp_path, print)
    for session in range(4):
        books.add(a_receipt(session))
    books.close()
    file = tmp_path / "receipts.jsonl"
    lines = file.read_text().splitlines()
    lines[0] = lines[0].replace('"computed_positions":20', '"computed_positions":2000')
    lines[1] = lines[1].replace(RING.hex(), "ab" * 16)
    lines[2] = "{}"
    file.write_text("\n".join([*lines, lines[3]]) + "\n")
    accounts = read_accounts(tmp_path)
    assert accounts.nodes[NODE.node_id.hex()].sessions == 1
    assert [trouble.split(":")[0].split(" cannot")[0] for trouble in accounts.bad] == [
        f"receipts.jsonl, line {number}" for number in (1, 2, 3, 5)
    ]


def test_missing_ones_are_lines_of_their_own(tmp_path: Path) -> None:
    books = Books(tmp_path, print)
    Metering(JOB, books).ring(RING, [PLACE], ["amber"]).heard(7, SessionMeter(SEEN), 0, None)
    books.close()
    line = msgspec.json.decode((tmp_path / "missing.jsonl").read_bytes(), type=Missing)
    assert line.seen == Figures(10, 5, 20) and line.name == "amber" and line.session == f"{7:016x}"
