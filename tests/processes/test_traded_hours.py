"""From an order to a Hold and an escrow: two nodes, buyers, an auction and a ledger, stopped between any two steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hub_world import a_key
from money_world import LEDGER, Shop, Street, an_account

from shoal.auctions import RemoteAuction
from shoal.auctions.server import AuctionServer, AuctionSettings
from shoal.identity import Envelope, KeyPair
from shoal.ledger.commands import Command
from shoal.ledger.escrows import Escrow, State
from shoal.ledger.fees import Announced
from shoal.ledger.journal import verified
from shoal.ledger.moves import account
from shoal.market.bids import FOR_CLAIMS_MS
from shoal.protocol.auctions import BatchPart, ClaimHour, HourPromise, PromiseHour
from shoal.protocol.holds import Hold, HoldGiven, open_hold, sold_twice
from shoal.protocol.messages import encode, open_record, sign
from shoal.protocol.money import Voucher, sign_voucher
from shoal.protocol.orders import HOUR_MS, Ask, Block, NodeClass, OrderTerms, Purchase, Resale
from shoal.protocol.prices import Price
from shoal.sdk.hours import Buyer, KeptBid, KeptBids, have_promised, hour_key
from shoal.sdk.orders import KeptOrders
from shoal.world import Link, Refused, SeededDice
from shoal.world.quotes import Quotes

MONEY = 10_000_000
EVERY_S = 10.0
KIND = NodeClass(device="H100", memory_gib=80)
ANN, BEN = a_key(71), a_key(72)
ACCOUNTS = {ANN.node_id: an_account(51), BEN.node_id: an_account(52)}


class Killed(Exception):
    """Where a process would be gone."""


class DyingLedger:
    """The street's, for one client, who is gone after so many commands: before they are done, or before it hears."""

    def __init__(self, street: Street, dies_after: int = 1000, done: bool = True) -> None:
        self._ledger, self.name = street.ledger, street.ledger.name
        self._left, self._done = dies_after, done

    async def apply(self, command: Command) -> Any:
        self._left -= 1
        if self._left < 0 and not self._done:
            raise Killed
        moves = await self._ledger.apply(command)
        if self._left < 0:
            raise Killed
        return moves

    async def balance(self, address: bytes) -> int:
        return await self._ledger.balance(address)

    async def escrow(self, escrow_id: bytes) -> Escrow | None:
        return await self._ledger.escrow(escrow_id)

    async def fees(self) -> tuple[Announced, ...]:
        return await self._ledger.fees()


class Town:
    """A street with an auction, whose hours begin two hours from now."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.street = folder, Street()
        self.clock = self.street.clock
        self.shops: list[Shop] = []
        self.block = Block(of=KIND, start_ms=(self.clock.now_ms() // HOUR_MS + 2) * HOUR_MS, ledger=LEDGER)
        self.sequence = 0

    async def start_auction(self, listen: str = "tcp://auction:7") -> None:
        settings = AuctionSettings(self.folder / "auction", every_s=EVERY_S, listen=listen)
        self.server = AuctionServer(
            settings, self.street.network.endpoint, lambda _: self.street.ledger, self.clock, SeededDice(7)
        )
        self.ticket = await self.server.start()
        self.remote = RemoteAuction(self.street.network.endpoint(a_key(80)), self.ticket, self.clock)

    async def open(self) -> None:
        await self.start_auction()
        for key in ACCOUNTS.values():
            self.street.ledger.give(key.address, MONEY)
        for number in (1, 2, 3):
            self.shops.append(await self.street.shop(number, self.folder / f"shop-{number}"))

    @contextlib.asynccontextmanager
    async def reach(self, key: KeyPair, node: bytes) -> AsyncIterator[Link]:
        endpoint = self.street.network.endpoint(key)
        shop = next(one for one in self.shops if one.node == node)
        try:
            yield await endpoint.dial(node, shop.offer.addresses, deadline_s=5.0)
        finally:
            await endpoint.close()

    def bids(self, who: KeyPair) -> KeptBids:
        return KeptBids(KeptOrders(self.folder / who.node_id.hex()[:8], self.ticket.auctioneer))

    def buyer(self, who: KeyPair, **dies: Any) -> Buyer:
        ledger = DyingLedger(self.street, **dies)
        return Buyer(
            who, ACCOUNTS[who.node_id], ledger, self.remote, self.bids(who), self.reach, self.clock,
            SeededDice(len(self.street.ledger.lines)),
        )  # fmt: skip

    async def terms(self, limit: int) -> OrderTerms:
        info, self.sequence = await self.remote.about(), self.sequence + 1
        return OrderTerms(
            auctioneer=self.ticket.auctioneer, batch=info.running, expires_ms=info.closes_ms + 60_000,
            sequence=self.sequence, block=self.block, limit_micro=limit,
        )  # fmt: skip

    async def ask(self, number: int, limit: int) -> None:
        key = a_key(number)
        order = sign(key, Ask(terms=await self.terms(limit), payee=an_account(number).address))
        await have_promised(key, order, str(self.ticket), self.reach)
        await self.remote.hand_in(order)

    async def bid(self, who: KeyPair, limit: int = 400_000, blocks: int = 1) -> KeptBid:
        one = await self.buyer(who).set_aside(await self.terms(limit), blocks)
        await self.remote.hand_in(one.envelope)
        return one

    async def close_batch(self) -> int:
        """The number of the batch that is open then."""
        before = (await self.remote.about()).running
        await self.clock.advance(EVERY_S)
        while (running := (await self.remote.about()).running) == before:
            await asyncio.sleep(0.005)
            await self.clock.advance(0.05)
        return running

    async def until_expired(self, one: KeptBid) -> None:
        await self.clock.advance((one.bid.terms.expires_ms - self.clock.now_ms()) / 1000)

    async def trade(self, who: KeyPair = ANN, blocks: int = 1) -> tuple[KeptBid, int]:
        """Three nodes ask, and so many of their hours go for 0.25 or 0.30."""
        for number, limit in ((1, 200_000), (2, 250_000), (3, 300_000)):
            await self.ask(number, limit)
        return await self.bid(who, blocks=blocks), await self.close_batch()

    def balance(self, who: KeyPair) -> int:
        return self.street.ledger.book.balances[account(ACCOUNTS[who.node_id].address)]

    def shop(self, node: bytes) -> Shop:
        return next(one for one in self.shops if one.node == node)

    async def close(self) -> None:
        await self.street.close()
        await self.server.stop()


def in_town(folder: Path, scene: Callable[[Town], Awaitable[None]]) -> None:
    async def play() -> None:
        town = Town(folder)
        await town.open()
        try:
            async with asyncio.timeout(110):
                await scene(town)
            verified(town.street.ledger.lines, LEDGER)
        finally:
            await town.close()

    asyncio.run(play())


def a_stranger(town: Town) -> Quotes:
    """Somebody else who would buy."""
    account, link = an_account(90), town.street.linker(town.street.client(90))
    return Quotes(a_key(90), account.address, account, LEDGER, link, town.clock)


def test_a_trade_becomes_a_hold_and_an_escrow_and_is_used(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        one, running = await town.trade()
        one = await town.buyer(ANN).settle(one, running)
        assert town.balance(ANN) == MONEY - 400_000, "the bid's money is there for as long as the bid may count"
        await town.until_expired(one)
        one = await town.buyer(ANN).settle(one, running)
        assert town.balance(ANN) == MONEY - 265_000
        [hour] = one.hours or ()
        assert (hour.price_micro, hour.trouble) == (250_000, "") and hour.node == a_key(1).node_id
        hold = open_hold(Envelope.from_bytes(hour.hold, Hold.MAX_BYTES), hour.node)
        assert (hold.from_ms, hold.until_ms, hold.escrow) == (
            town.block.start_ms, town.block.start_ms + HOUR_MS, one.escrow_id,
        )  # fmt: skip
        assert town.bids(ANN).hold_file(one, hour).read_bytes() == hour.hold
        escrow = town.street.ledger.book.escrows[one.escrow_id]
        assert escrow.amount_micro - escrow.redeemed_micro == escrow.most_for(hour.payee) == 250_000
        assert await town.buyer(ANN).settle(one, running) == one, "settled once more, nothing changes"

        shop, client = town.shop(hour.node), hour_key(ANN, town.block)
        other = a_stranger(town)
        await town.clock.advance((town.block.start_ms - town.clock.now_ms()) / 1000)
        with pytest.raises(Refused, match="taken"):
            await other.hold(shop.node, shop.offer)
        endpoint = town.street.network.endpoint(client)
        town.street.ends.append(endpoint)
        quotes = Quotes(
            client,
            ACCOUNTS[ANN.node_id].address,
            ACCOUNTS[ANN.node_id],
            LEDGER,
            town.street.linker(endpoint),
            town.clock,
        )
        held = await quotes.hold(shop.node, msgspec.structs.replace(shop.offer, price=Price(250_000)))
        held = await quotes.take(held, one.escrow_id)
        assert held.hold.until_ms == town.block.start_ms + HOUR_MS
        shop.sales.work_for(client.node_id)
        signed = sign_voucher(ACCOUNTS[ANN.node_id], LEDGER, Voucher(
            escrow=one.escrow_id, payee=hour.payee, amount_micro=100_000, work=bytes(32),
        ))  # fmt: skip
        await quotes.pay(shop.node, signed, last=True, deadline_s=5)
        await town.clock.advance(3 * HOUR_MS / 1000)
        await town.clock.advance(HOUR_MS / 1000)
        await town.street.ledger.balance(bytes(20))
        await town.street.ledger.balance(bytes(20))
        assert town.balance(ANN) == MONEY - 100_000, "what was not worked for comes back"
        assert town.street.ledger.book.escrows[one.escrow_id].state is State.SETTLED

    in_town(tmp_path, scene)


def test_what_is_not_bought_comes_back_and_the_node_sells_its_hour_again(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        await town.ask(1, 200_000)
        one = await town.bid(ANN, 100_000)
        with pytest.raises(Refused, match="What became of batch 2 is not known yet"):
            key, terms = a_key(1), await town.terms(200_000)
            later = sign(key, Ask(terms=msgspec.structs.replace(terms, batch=3), payee=an_account(1).address))
            await have_promised(key, later, str(town.ticket), town.reach)
        running = await town.close_batch()
        one = await town.buyer(ANN).settle(one, running)
        assert one.hours == () and town.balance(ANN) == MONEY - 100_000, "it comes back when the bid has expired"
        await town.until_expired(one)
        one = await town.buyer(ANN).settle(one, running)
        assert one.over and town.balance(ANN) == MONEY
        await town.ask(1, 50_000)
        await town.ask(2, 60_000)
        two = await town.bid(BEN)
        running = await town.close_batch()
        two = await town.buyer(BEN).settle(two, running)
        assert two.hours is not None and two.hours[0].hold
        with pytest.raises(Refused, match="This hour was sold in batch 3"):
            await town.ask(1, 50_000)

    in_town(tmp_path, scene)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("after", range(4))
def test_a_buyer_that_is_killed_between_two_steps_goes_on_with_the_next(tmp_path: Path, after: int, done: bool) -> None:
    async def scene(town: Town) -> None:
        for number, limit in ((1, 200_000), (2, 250_000), (3, 300_000)):
            await town.ask(number, limit)
        terms = await town.terms(400_000)
        with contextlib.suppress(Killed):
            one = await town.buyer(ANN, dies_after=after, done=done).set_aside(terms, 2)
            await town.remote.hand_in(one.envelope)
        other = await town.bid(BEN, 300_000)
        running = await town.close_batch()
        await town.until_expired(other)
        [kept] = town.bids(ANN).all()
        with contextlib.suppress(Killed):
            await town.buyer(ANN, dies_after=max(0, after - 1), done=done).settle(kept, running)
        [kept] = town.bids(ANN).all()
        kept = await town.buyer(ANN).settle(kept, running)
        await town.buyer(BEN).settle(other, running)
        if after == 0:  # it was gone before its order was handed in
            assert kept.hours == () and town.balance(ANN) == MONEY
            return
        assert kept.hours and all(hour.hold for hour in kept.hours)
        escrow = town.street.ledger.book.escrows[kept.escrow_id]
        assert escrow.amount_micro - escrow.redeemed_micro == sum(hour.price_micro for hour in kept.hours)
        await town.clock.advance(5 * HOUR_MS / 1000)
        for _ in range(2):
            await town.street.ledger.balance(bytes(20))
            await town.clock.advance(HOUR_MS / 1000)
        assert town.balance(ANN) == town.balance(BEN) == MONEY, "nobody worked, and nobody paid"

    in_town(tmp_path, scene)


def test_a_node_sells_its_hour_again_where_the_auctioneer_has_moved(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        await town.ask(1, 200_000)
        await town.close_batch()
        await town.server.stop()
        await town.start_auction("tcp://auction:8")
        one, running = await town.trade()
        one = await town.buyer(ANN).settle(one, running)
        [hour] = one.hours or ()
        assert hour.node == a_key(1).node_id and hour.hold

    in_town(tmp_path, scene)


def test_an_hour_is_claimed_where_the_auctioneer_has_moved_since_it_was_promised(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        one, running = await town.trade()
        await town.server.stop()
        await town.start_auction("tcp://auction:8")
        other = msgspec.structs.replace(town.ticket, auctioneer=ANN.node_id)
        claim = ClaimHour(auction=str(other), batch=one.bid.terms.batch, start_ms=town.block.start_ms)
        async with town.reach(BEN, a_key(1).node_id) as link:
            with pytest.raises(Refused, match="could not be reached"):
                await link.request(claim.KIND, encode(claim), deadline_s=30, reply_max_bytes=HoldGiven.MAX_BYTES)
        one = await town.buyer(ANN).settle(one, running)
        [hour] = one.hours or ()
        assert hour.hold and not hour.trouble

    in_town(tmp_path, scene)


def test_an_hour_is_passed_on_to_whoever_buys_it(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        one, running = await town.trade()
        one = await town.buyer(ANN).settle(one, running)
        [hour] = one.hours or ()
        resale = Resale(terms=await town.terms(250_000), purchases=(Purchase(one.bid.terms.batch, hour.node),))
        await town.remote.hand_in(sign(hour_key(ANN, town.block), resale))
        third = a_key(73)
        ACCOUNTS[third.node_id] = an_account(53)
        town.street.ledger.give(an_account(53).address, MONEY)
        two, three = await town.bid(BEN, 500_000), await town.bid(third, 450_000)
        running = await town.close_batch()
        await town.until_expired(three)
        two = await town.buyer(BEN).settle(two, running)
        three = await town.buyer(third).settle(three, running)
        assert three.hours == () and three.over
        [bought] = two.hours or ()
        assert bought.price_micro == 450_000 and "has not given it back yet" in bought.trouble
        one = await town.buyer(ANN).give_back(one, [hour.node])
        one = await town.buyer(ANN).settle(one, running)
        assert one.hours is not None and one.hours[0].passed_on
        two = await town.buyer(BEN).settle(two, running)
        assert two.hours is not None
        hold = Envelope.from_bytes(two.hours[0].hold, Hold.MAX_BYTES)
        assert open_hold(hold, hour.node).price == Price(450_000)
        assert sold_twice(Envelope.from_bytes(hour.hold, Hold.MAX_BYTES), hold) is None
        await town.clock.advance(60)
        await town.street.ledger.balance(bytes(20))
        assert town.balance(ANN) == MONEY

    in_town(tmp_path, scene)


def test_a_node_that_is_started_anew_keeps_its_word(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        one, running = await town.trade()
        await town.street.close(town.shops)
        town.shops = [await town.street.shop(number, tmp_path / f"shop-{number}") for number in (1, 2, 3)]
        one = await town.buyer(ANN).settle(one, running)
        [hour] = one.hours or ()
        assert hour.hold and not hour.trouble
        await town.street.close(town.shops)
        town.shops = [await town.street.shop(number, tmp_path / f"shop-{number}") for number in (1, 2, 3)]
        await town.clock.advance((town.block.start_ms - town.clock.now_ms()) / 1000)
        assert town.shop(hour.node).sales.held == 1
        other = a_stranger(town)
        with pytest.raises(Refused, match="taken"):
            await other.hold(hour.node, town.shop(hour.node).offer)

    in_town(tmp_path, scene)


def test_a_node_looks_into_a_batch_once_for_all_who_claim_by_it(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        one, _ = await town.trade()
        claim = ClaimHour(auction=str(town.ticket), batch=one.bid.terms.batch, start_ms=town.block.start_ms)
        auctioneer, asked = town.server._auctioneer, list[int]()
        assert auctioneer is not None
        part = auctioneer.part

        async def counted(number: int, which: int) -> BatchPart:
            asked.append(number)
            return await part(number, which)

        auctioneer.part = counted  # type: ignore[method-assign]

        async def stranger(number: int) -> None:
            async with town.reach(a_key(number), a_key(1).node_id) as link:
                with pytest.raises(Refused, match="and not to"):
                    await link.request(claim.KIND, encode(claim), deadline_s=30, reply_max_bytes=HoldGiven.MAX_BYTES)

        await asyncio.gather(*map(stranger, range(91, 99)))
        assert asked == [one.bid.terms.batch]

    in_town(tmp_path, scene)


def test_an_auction_that_is_gone_keeps_nobodys_money(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        one = await town.bid(ANN)
        await town.server.stop()
        await town.until_expired(one)
        assert await town.buyer(ANN).settle(one, 0) == one, "its batch may have been closed in time"
        await town.clock.advance(FOR_CLAIMS_MS / 1000)
        one = await town.buyer(ANN).settle(one, 0)
        assert one.over and one.hours == () and town.balance(ANN) == MONEY

    in_town(tmp_path, scene)


def test_who_comes_too_late_has_its_money_and_not_the_hour(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        one, running = await town.trade()
        await town.clock.advance(FOR_CLAIMS_MS / 1000 + 60)
        one = await town.buyer(ANN).settle(one, running)
        assert one.hours is not None and "that time is over" in one.hours[0].trouble
        await town.clock.advance((town.block.start_ms - town.clock.now_ms()) / 1000)
        await town.buyer(ANN).settle(one, running)
        await town.clock.advance(60)
        assert (await town.buyer(ANN).settle(one, running)).over
        assert town.balance(ANN) == MONEY - 15_000, "a tenth of what went back before is held until audits are over"

    in_town(tmp_path, scene)


def test_strangers_have_a_node_promise_nothing_and_claim_nothing(tmp_path: Path) -> None:
    async def scene(town: Town) -> None:
        mine, other = a_key(1), a_key(90)
        order = sign(mine, Ask(terms=await town.terms(1), payee=an_account(1).address))
        for signer, asked in ((other, order), (mine, sign(other, open_record(order, Ask)))):
            promise = sign(signer, HourPromise(order=asked.to_bytes(), auction=str(town.ticket)))
            async with town.reach(other, mine.node_id) as link:
                with pytest.raises(Refused, match="both signed with the node's own key"):
                    message = PromiseHour(promise=promise.to_bytes())
                    await link.request(message.KIND, encode(message), deadline_s=5, reply_max_bytes=64)
        one, running = await town.trade()
        await town.buyer(ANN).settle(one, running)
        claim = ClaimHour(auction=str(town.ticket), batch=one.bid.terms.batch, start_ms=town.block.start_ms)
        for node, batch, why in (
            (a_key(1), 2, "gives that hour to .*, and not to"),
            (a_key(3), 2, "to nobody, and not to"),
            (a_key(1), 1, "sold in batch 2; this is batch 1"),
            (a_key(3), 99, "promised to batch 2; this is batch 99"),
        ):  # batches that cannot matter are not looked into
            asked = encode(msgspec.structs.replace(claim, batch=batch))
            async with town.reach(BEN, node.node_id) as link:
                with pytest.raises(Refused, match=why):
                    await link.request(claim.KIND, asked, deadline_s=5, reply_max_bytes=HoldGiven.MAX_BYTES)
        with pytest.raises(Refused, match="was sold in batch 2"):
            await town.ask(1, 1)

    in_town(tmp_path, scene)
