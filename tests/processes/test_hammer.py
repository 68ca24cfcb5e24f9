"""Many clients at once, through two hubs of which one is killed: no place sold twice, no millionth lost."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from hammer_world import DEPOSIT_MICRO, Paper, Seen, astray, contradictions, hammered, node_account, together
from hub_world import a_key
from ledger_requests import a_hold
from msgspec import msgpack

from shoal.ledger.book import Book
from shoal.ledger.commands import Deposit
from shoal.protocol.money import HouseLedger


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")
def test_a_market_under_load_sells_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    outcome = asyncio.run(hammered(tmp_path, seconds=3.0, clients=10, nodes=4, client_processes=2, seller_processes=1))
    seen = outcome.seen
    assert seen.quotes_ms and seen.taken_ms and len(seen.payers) == 10
    assert outcome.contradictions == [] and outcome.astray == [] and seen.wrong == []
    assert 0 < sum(sum(paper.acknowledged.values()) for paper in seen.papers) <= outcome.redeemed_micro


def test_what_would_be_wrong_is_seen() -> None:
    node, other = a_key(1), a_key(2)
    holds = [a_hold(node, 1), a_hold(node, 2), a_hold(other, 3)]
    (said,) = contradictions(holds)
    assert "has promised slot 0 to" in said
    book, payer = Book(HouseLedger(bytes(32), "USD")), bytes([7] * 20)
    book.apply(Deposit(payer, DEPOSIT_MICRO - 1, "payment 1"))
    lost = Paper(escrow=bytes(32), payer=payer, acknowledged={node_account(0).address: 5})
    said_of_escrow, said_of_payer = astray(book, [lost], [payer], 1)
    assert "has paid and is not in the journal" in said_of_escrow and "99999999, and 100000000" in said_of_payer


def test_what_several_processes_saw_is_put_together() -> None:
    parts = [Seen(asked=2, quotes_ms=[1.0], refusals={"full": 1}), Seen(asked=3, refusals={"full": 2, "away": 1})]
    whole = together(map(msgpack.encode, parts))
    assert (whole.asked, whole.quotes_ms, whole.refusals) == (5, [1.0], {"full": 3, "away": 1})
