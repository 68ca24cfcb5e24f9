"""`kill -9` between any two steps of a trade: real processes, a real ledger, and every unit and every hour accounted
for."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import trade_world
from auction_world import H100
from hub_world import a_key
from money_world import an_account
from trade_world import BUYER, LIMIT, PAYER, reach_over

from shoal.auctions.auctioneer import Auctioneer
from shoal.auctions.service import AuctionService
from shoal.auctions.store import AuctionStore
from shoal.errors import LinkError
from shoal.house import RemoteLedger
from shoal.house.server import LedgerServer, LedgerSettings, deposit
from shoal.identity import Envelope, KeyPair
from shoal.ledger.escrows import State
from shoal.ledger.journal import verified
from shoal.market.holds import Slots
from shoal.node.sales import SLOTS, read_kept
from shoal.protocol.auctions import AuctionTicket
from shoal.protocol.holds import Hold, open_hold
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import sign
from shoal.protocol.orders import HOUR_MS, Ask, Block, OrderTerms
from shoal.sdk.hours import KeptBids, have_promised, hour_key
from shoal.sdk.orders import KeptOrders
from shoal.transport import TlsEndpoint
from shoal.world import DirectoryDisk, SystemClock, SystemDice

MONEY = 1_000_000
NEVER = 1 << 30
EVERY_S = 60.0
"""Batches are closed by hand."""
BIDS_EXPIRE_MS = round(1000 * EVERY_S) + 60_000
PATIENCE_S = 240.0


class Ahead(SystemClock):
    by_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.by_ms


class Street:
    """A ledger and an auction here, and each buyer and node as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, SystemClock()
        self.start_ms = (self.clock.now_ms() // HOUR_MS + 2) * HOUR_MS
        self.addresses: dict[int, str] = {}
        self.running: list[asyncio.subprocess.Process] = []

    async def open(self) -> None:
        self.banks_clock = Ahead()
        self.house = LedgerServer(LedgerSettings(self.folder / "ledger"), TlsEndpoint, self.banks_clock)
        self.paid_at: LedgerTicket = await self.house.start()
        await asyncio.to_thread(deposit, self.folder / "ledger", PAYER.address, MONEY, "payment 1", self.clock)
        key = KeyPair.generate()
        self.hall = TlsEndpoint(key)
        self.auctioneer = await Auctioneer.open(
            AuctionStore(self.folder / "auction.sqlite"), key, RemoteLedger(self.hall, self.paid_at, self.clock),
            self.clock, SystemDice(), every_s=EVERY_S,
        )  # fmt: skip
        AuctionService(self.hall, self.auctioneer, self.clock, every_s=EVERY_S)
        await self.hall.listen("tcp://127.0.0.1:0")
        self.ticket = AuctionTicket(key.node_id, tuple(self.hall.addresses))
        self.endpoint = TlsEndpoint(KeyPair.generate())
        self.ledger = RemoteLedger(self.endpoint, self.paid_at, self.clock)

    async def close(self) -> None:
        for one in self.running:
            if one.returncode is None:
                one.kill()
                await one.wait()
        await self.endpoint.close()
        await self.hall.close()
        await self.auctioneer.stop()
        await self.house.stop()

    async def _process(self, *words: Any) -> asyncio.subprocess.Process:
        one = await asyncio.create_subprocess_exec(
            sys.executable, trade_world.__file__, *map(str, words), stdout=asyncio.subprocess.PIPE
        )
        self.running.append(one)
        return one

    async def shop(self, number: int, dies_after: int = NEVER) -> asyncio.subprocess.Process:
        one = await self._process("shop", self.folder / f"shop-{number}", number, self.paid_at, dies_after)
        assert one.stdout is not None
        self.addresses[number] = (await one.stdout.readline()).decode().strip()
        return one

    @property
    def shops(self) -> str:
        return ",".join(f"{a_key(number).node_id.hex()}={at}" for number, at in self.addresses.items())

    async def ask(self, number: int, limit: int) -> None:
        block = Block(of=H100, start_ms=self.start_ms, ledger=self.paid_at.ledger)
        terms = OrderTerms(
            auctioneer=self.ticket.auctioneer, batch=self.auctioneer.running, sequence=1, block=block,
            expires_ms=self.clock.now_ms() + HOUR_MS, limit_micro=limit,
        )  # fmt: skip
        order = sign(a_key(number), Ask(terms=terms, payee=an_account(number).address))
        await have_promised(a_key(number), order, str(self.ticket), reach_over(self.shops))
        await self.auctioneer.hand_in(order)

    async def buy(self, dies_after: int = NEVER) -> int | None:
        words = (self.paid_at, self.ticket, self.shops, self.start_ms, dies_after)
        one = await self._process("buy", self.folder / "buyer", *words)
        return await one.wait()

    async def until_ordered(self, orders: int, buying: asyncio.Task[int | None]) -> None:
        """Until the open batch has so many, and, where the buyer does not come to that, it is gone."""
        while self.auctioneer.orders < orders or (orders == 2 and not buying.done()):
            assert orders == 2 or not buying.done(), "it has ordered before it is killed"
            await asyncio.sleep(0.01)

    async def close_batch(self) -> None:
        """Its bids have expired at the ledger then."""
        self.banks_clock.by_ms = BIDS_EXPIRE_MS
        await self.auctioneer.close()

    @property
    def bids(self) -> KeptBids:
        return KeptBids(KeptOrders(self.folder / "buyer", self.ticket.auctioneer))

    def kept_by(self, number: int) -> Slots:
        kept = read_kept(DirectoryDisk(self.folder / f"shop-{number}"), SLOTS, Slots, "shop")
        assert kept is not None
        return kept

    async def check_bought(self) -> None:
        """A Hold of that hour, of which the node knows, and an escrow of just what it costs."""
        [one] = self.bids.all()
        [hour] = one.hours or ()
        hold = open_hold(Envelope.from_bytes(hour.hold, Hold.MAX_BYTES), hour.node)
        assert (hold.client, hold.from_ms, hold.until_ms, hold.escrow) == (
            hour_key(BUYER, one.bid.terms.block).node_id, self.start_ms, self.start_ms + HOUR_MS, one.escrow_id,
        )  # fmt: skip
        [kept] = self.kept_by(1).hours
        assert kept.kept is not None and kept.kept.hold == hold
        escrow = await self.ledger.escrow(one.escrow_id)
        assert escrow is not None and escrow.most_for(hour.payee) == hour.price_micro == 300_000
        assert escrow.amount_micro - escrow.redeemed_micro == 300_000
        await self.check_journal()

    async def check_journal(self) -> None:
        book = verified([line async for line in self.ledger.lines()], self.paid_at.ledger)
        assert sum(book.balances.values()) == 0


def on_the_street(folder: Path, scene: Any) -> None:
    async def play() -> None:
        street = Street(folder)
        await street.open()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await scene(street)
        finally:
            await street.close()

    asyncio.run(play())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dies_after", [1, 2, 3, 4])
def test_a_buyer_is_killed_and_the_next_one_goes_on(tmp_path: Path, dies_after: int) -> None:
    """Once its money is set aside, the node is a payee, it is one itself, or the rest has come back."""

    async def scene(street: Street) -> None:
        await asyncio.gather(street.shop(1), street.shop(2))
        await asyncio.gather(street.ask(1, 200_000), street.ask(2, 300_000))
        killed = asyncio.create_task(street.buy(dies_after))
        await street.until_ordered(2 if dies_after == 1 else 3, killed)
        await street.close_batch()
        assert await killed == -signal.SIGKILL
        assert await street.buy() == 0
        if dies_after > 1:
            await street.check_bought()
            assert await street.ledger.balance(PAYER.address) == MONEY - LIMIT + 90_000
            return
        [one] = street.bids.all()
        escrow = await street.ledger.escrow(one.escrow_id)
        assert one.hours == () and escrow is not None and escrow.state is not State.OPEN
        assert await street.ledger.balance(PAYER.address) == MONEY
        await street.check_journal()

    on_the_street(tmp_path, scene)


@pytest.mark.timeout(300)
def test_a_node_is_killed_before_it_says_what_it_has_promised(tmp_path: Path) -> None:
    async def scene(street: Street) -> None:
        dying, _ = await asyncio.gather(street.shop(1, dies_after=1), street.shop(2))
        with pytest.raises(LinkError):
            await street.ask(1, 200_000)
        assert await dying.wait() == -signal.SIGKILL
        [hour] = street.kept_by(1).hours
        assert (hour.start_ms, hour.kept) == (street.start_ms, None)
        dying = await street.shop(1, dies_after=2)
        await asyncio.gather(street.ask(1, 200_000), street.ask(2, 300_000))
        buying = asyncio.create_task(street.buy())
        await street.until_ordered(3, buying)
        await street.close_batch()
        assert await dying.wait() == -signal.SIGKILL
        assert await buying == 0, "what the node did not say is kept as its trouble"
        [hour] = street.kept_by(1).hours
        assert hour.kept is not None
        await street.shop(1)
        assert await street.buy() == 0
        await street.check_bought()

    on_the_street(tmp_path, scene)
