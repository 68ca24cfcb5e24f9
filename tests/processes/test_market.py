"""`shoal market verify` and `compare`, as people meet them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from shoal.identity import Envelope, KeyPair
from shoal.market.batches import Carried
from shoal.market.publishing import Published, close
from shoal.protocol.messages import open_record, sign
from shoal.protocol.money import HouseLedger
from shoal.protocol.orders import HOUR_MS, ORDER_MAX_BYTES, Ask, Bid, Block, Clearing, NodeClass, OrderTerms

AUCTIONEER, BUYER, *NODES = (KeyPair.from_seed(bytes([number] * 32)) for number in range(5))
BLOCK = Block(
    of=NodeClass(device="RTX \x1b[31m4090", memory_gib=24), start_ms=500_000 * HOUR_MS,
    ledger=HouseLedger(AUCTIONEER.node_id, "USD"),
)  # fmt: skip


def shoal(*words: str, command: str = "verify") -> tuple[int, str]:
    """Exit code and standard output."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    words = (sys.executable, "-m", "shoal", "market", command, *words)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def terms(limit: int) -> OrderTerms:
    return OrderTerms(
        auctioneer=AUCTIONEER.node_id, batch=2, expires_ms=BLOCK.start_ms, sequence=1, block=BLOCK, limit_micro=limit
    )


@pytest.fixture
def published() -> Published:
    """A node's hour goes to the only buyer, for what the next node would have taken."""
    first, carried = close(
        AUCTIONEER, Carried(), None, [], seed=bytes(32), next_seed=b"2" * 32, closed_ms=BLOCK.start_ms - 2 * HOUR_MS
    )
    orders = [
        sign(node, Ask(terms=terms(limit), payee=bytes(20)))
        for node, limit in zip(NODES, (200_000, 300_000), strict=False)
    ]
    orders.append(sign(BUYER, Bid(terms=terms(400_000), blocks=1, escrow=bytes(32))))
    before = Envelope.from_bytes(first.clearing, Clearing.MAX_BYTES)
    return close(
        AUCTIONEER, carried, before, orders,
        seed=b"2" * 32, next_seed=b"3" * 32, closed_ms=BLOCK.start_ms - HOUR_MS,
    )[0]  # fmt: skip


def test_a_right_batch_is_right_and_a_missing_order_is_told(published: Published, tmp_path: Path) -> None:
    batch, mine, late = tmp_path / "2.batch", tmp_path / "mine.order", tmp_path / "late.order"
    batch.write_bytes(published.to_bytes())
    mine.write_bytes(published.orders[0])
    late.write_bytes(sign(NODES[2], Ask(terms=terms(100_000), payee=bytes(20))).to_bytes())

    code, said = shoal(str(batch), "--order", str(mine))
    assert code == 0
    assert said.startswith(f"right  Batch 2 of {AUCTIONEER.node_id.hex()}: 3 orders, of which 1 got less")
    assert "1 bid for 1 block, 2 asks of 2; 1 would trade. The price is 0.30 USD" in said
    assert "is in batch 2: 1 of 1 blocks. The price is 0.30 USD." in said
    assert "\x1b" not in said

    code, said = shoal(str(batch), "--order", str(mine), "--order", str(late), "--json")
    assert code == 4
    found = json.loads(said)
    assert found["right"] is True and found["batch"] == 2
    assert [one["missing"] for one in found["asked"]] == [False, True]
    [cleared] = found["cleared"]
    assert cleared["price_micro"] == 300_000
    [trade] = cleared["trades"]
    assert (trade["buyer"], trade["seller"], trade["node"]) == (BUYER.node_id.hex(), *[NODES[0].node_id.hex()] * 2)


def test_a_wrong_batch_is_wrong_and_says_where(published: Published, tmp_path: Path) -> None:
    batch = tmp_path / "2.batch"
    clearing = open_record(Envelope.from_bytes(published.clearing, Clearing.MAX_BYTES), Clearing)
    [cleared] = clearing.cleared
    lie = replace(clearing, cleared=(replace(cleared, price_micro=390_000),))
    batch.write_bytes(replace(published, clearing=sign(AUCTIONEER, lie).to_bytes()).to_bytes())
    code, said = shoal(str(batch))
    assert code == 3
    assert said.startswith(
        "wrong  Batch 2 was not cleared as follows from its orders. It says that the price is 0.39 USD"
    )
    code, said = shoal(str(batch), "--json")
    assert code == 3
    assert (json.loads(said)["right"], json.loads(said)["code"]) == (False, "SH-290")


def test_files_that_are_none_of_this_are_named(published: Published, tmp_path: Path) -> None:
    batch, other = tmp_path / "2.batch", tmp_path / "notes.txt"
    batch.write_bytes(published.to_bytes())
    other.write_text("not a batch")
    for words, expected, number in (
        ([str(other)], 2, "SH-107"),
        ([str(batch), "--order", str(other)], 2, "SH-103"),
        ([str(batch), "--order", str(batch)], 2, "SH-103"),
        ([str(tmp_path / "nothing")], 1, "SH-420"),
    ):
        code, said = shoal(*words, "--json")
        error = json.loads(said)["error"]
        assert (code, error["code"]) == (expected, number)
        assert words[-1] in error["sentence"]


def test_two_batches_of_one_number_convict_their_auctioneer(published: Published, tmp_path: Path) -> None:
    files = one, same, other = [tmp_path / f"{number}.batch" for number in range(3)]
    before = Envelope.from_bytes(published.previous, Clearing.MAX_BYTES)
    less = [Envelope.from_bytes(published.orders[0], ORDER_MAX_BYTES)]
    second, _ = close(
        AUCTIONEER, published.carried, before, less,
        seed=b"2" * 32, next_seed=b"3" * 32, closed_ms=BLOCK.start_ms - HOUR_MS,
    )  # fmt: skip
    for file, content in zip(files, (published, published, second), strict=True):
        file.write_bytes(content.to_bytes())
    code, said = shoal(str(one), str(same), command="compare")
    assert code == 0 and said.startswith("They prove nothing")
    code, said = shoal(str(one), str(other), command="compare")
    at_ms = BLOCK.start_ms - HOUR_MS
    assert code == 3 and said.startswith(
        f"Auctioneer {AUCTIONEER.node_id.hex()[:8]} has closed batch 2 twice: with 3 orders at {at_ms} ms and with 1 "
        f"orders at {at_ms} ms."
    )
    code, said = shoal(str(one), str(other), "--json", command="compare")
    assert code == 3 and "has closed batch 2 twice" in json.loads(said)["proof"]
    other.write_bytes(b"none")
    code, said = shoal(str(one), str(other), "--json", command="compare")
    assert code == 2 and json.loads(said)["error"]["code"] == "SH-107"
