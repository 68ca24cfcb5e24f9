"""Run as a program: one who buys an hour, or a node that sells one, as a process that kills itself between two steps.

python trade_world.py buy FOLDER LEDGER AUCTION SHOPS START_MS DIES_AFTER
    sets money aside, bids for an hour, waits for the batch and settles; or settles what an earlier one left. SHOPS is
    node=address,... It is gone after so many commands to the ledger
python trade_world.py shop FOLDER NUMBER LEDGER DIES_AFTER
    sells from a folder, and prints its address; it is gone once it has written what it promises so many times, before
    it says so
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from auction_world import H100
from hub_world import a_key
from money_world import PRICE, an_account

from shoal.auctions import RemoteAuction
from shoal.house import RemoteLedger
from shoal.identity import KeyPair
from shoal.ledger.commands import Command
from shoal.market.holds import Slots, Terms
from shoal.node.hours import Hours
from shoal.node.sales import Sales
from shoal.protocol.auctions import AuctionTicket
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.orders import Block, OrderTerms
from shoal.sdk.hours import Buyer, KeptBids
from shoal.sdk.orders import KeptOrders
from shoal.transport import TlsEndpoint
from shoal.world import DirectoryDisk, Link, SystemClock, SystemDice

BUYER, PAYER = a_key(71), an_account(51)
LIMIT = 400_000


class DyingLedger(RemoteLedger):
    left = 1 << 30

    async def apply(self, command: Command) -> Any:
        moves = await super().apply(command)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return moves


class DyingSales(Sales):
    left = 1 << 30

    async def _store_slots(self, slots: Slots) -> None:
        await super()._store_slots(slots)
        DyingSales.left -= 1
        if DyingSales.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def reach_over(shops: str) -> Any:
    known = dict(one.split("=", 1) for one in shops.split(","))

    @asynccontextmanager
    async def reach(key: KeyPair, node: bytes) -> AsyncIterator[Link]:
        endpoint = TlsEndpoint(key)
        try:
            yield await endpoint.dial(node, (known[node.hex()],), deadline_s=30.0)
        finally:
            await endpoint.close()

    return reach


async def buy(folder: Path, ledger: str, auction: str, shops: str, start_ms: int, dies_after: int) -> None:
    clock, ticket = SystemClock(), AuctionTicket.parse(auction)
    endpoint = TlsEndpoint(KeyPair.generate())
    paid_at = LedgerTicket.parse(ledger)
    money = DyingLedger(endpoint, paid_at, clock)
    money.left = dies_after
    remote = RemoteAuction(endpoint, ticket, clock)
    bids = KeptBids(KeptOrders(folder, ticket.auctioneer))
    buyer = Buyer(BUYER, PAYER, money, remote, bids, reach_over(shops), clock, SystemDice())
    if not bids.all():
        info = await remote.about()
        terms = OrderTerms(
            auctioneer=ticket.auctioneer, batch=info.running, expires_ms=info.closes_ms + 60_000, sequence=1,
            block=Block(of=H100, start_ms=start_ms, ledger=paid_at.ledger), limit_micro=LIMIT,
        )  # fmt: skip
        await remote.hand_in((await buyer.set_aside(terms, 1)).envelope)
    [one] = bids.all()
    while (running := (await remote.about()).running) <= one.bid.terms.batch:
        await asyncio.sleep(0.05)
    await buyer.settle(one, running)
    await endpoint.close()


async def sell(folder: Path, number: int, ledger: str, dies_after: int) -> None:
    clock, paid_at = SystemClock(), LedgerTicket.parse(ledger)
    endpoint = TlsEndpoint(a_key(number))
    money = RemoteLedger(endpoint, paid_at, clock)

    async def changed() -> None:
        pass

    DyingSales.left = dies_after
    terms = Terms(price=PRICE, ledger=paid_at.ledger, payee=an_account(number).address)
    sales = DyingSales(
        terms, key=a_key(number), name="shop", disk=DirectoryDisk(folder), endpoint=endpoint, ledger=money, clock=clock,
        unheld=lambda: 0, changed=changed,
    )  # fmt: skip
    Hours(sales, key=a_key(number), endpoint=endpoint, ledger=money, clock=clock)
    await endpoint.listen("tcp://127.0.0.1:0")
    print(endpoint.addresses[0], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    role, at, *rest = sys.argv[1:]
    if role == "buy":
        asyncio.run(buy(Path(at), rest[0], rest[1], rest[2], int(rest[3]), int(rest[4])))
    else:
        asyncio.run(sell(Path(at), int(rest[0]), rest[1], int(rest[2])))
