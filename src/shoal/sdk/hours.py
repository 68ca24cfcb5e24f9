"""Hours that this user buys: the money behind each bid, what became of it, and the Holds of the nodes.

What is about to be done is written down first, and each step follows from how the escrow stands at the ledger: a
process that was killed is gone on with by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from shoal.auctions import RemoteAuction
from shoal.auctions.refusals import NotPublished
from shoal.errors import BadRecord, LinkError, ShoalError
from shoal.house import OutcomeUnknown
from shoal.hub import HubClient
from shoal.identity import Envelope, KeyPair, NodeId, blake3_hash, short_id
from shoal.identity.accounts import AccountKey, AccountSignature, Address
from shoal.ledger.book import SameEscrow
from shoal.ledger.commands import Open
from shoal.ledger.escrows import EscrowLocked, EscrowOver, OldVoucher, State
from shoal.ledger.fees import fee_at
from shoal.ledger.moves import DoneAlready
from shoal.market.batches import block_hash
from shoal.market.bids import FOR_CLAIMS_MS, NOTICE_MS, bid_of, next_step, signed, terms_for
from shoal.market.publishing import Verified
from shoal.protocol.auctions import ClaimHour, HourPromise, PromiseHour
from shoal.protocol.holds import Hold, HoldGiven, HoldRelease, Release, open_hold
from shoal.protocol.messages import decode, encode, sign
from shoal.protocol.money import Amount, Closing, EscrowTerms, LedgerName
from shoal.protocol.offers import Done, OfferFind
from shoal.protocol.orders import HOUR_MS, ORDER_MAX_BYTES, Bid, Block, OrderTerms, open_order
from shoal.sdk.orders import KEPT_MAX, KeptOrders
from shoal.world import Clock, Dice, Ledger, Link
from shoal.world.directory import FoundOffer

ASK_DEADLINE_S = 60.0
"""A node fetches a batch and clears it again before it answers."""
BOUGHT_MAX = 64
"""Nodes whose bought hours a job uses."""
BACK_WITHIN_S = NOTICE_MS / 1000 + 30
Reach: TypeAlias = Callable[[KeyPair, bytes], AbstractAsyncContextManager[Link]]
"""A link to a node, as whoever has this key."""


class BoughtHour(msgspec.Struct, frozen=True, kw_only=True):
    """A node's hour, as the batch says it."""

    node: NodeId
    payee: Address
    price_micro: Amount
    hold: bytes = b""
    """The Envelope of the node's Hold, once it has signed one."""
    passed_on: bool = False
    """Sold again, and given back."""
    trouble: str = ""
    """Why the node has not signed one."""


class KeptBid(msgspec.Struct, frozen=True, kw_only=True):
    order: bytes
    """The Envelope of the Bid."""
    ledger: LedgerName
    escrow: EscrowTerms
    signature: AccountSignature
    hours: tuple[BoughtHour, ...] | None = None
    """None while it is not known what was bought."""
    used: bool = False
    """A job has its hours, and sets money aside itself."""
    over: bool = False
    """Nothing of it is set aside any more."""

    @property
    def envelope(self) -> Envelope:
        """Raises BadRecord."""
        return Envelope.from_bytes(self.order, ORDER_MAX_BYTES)

    @property
    def bid(self) -> Bid:
        """Raises BadRecord."""
        order = open_order(self.envelope)
        if not isinstance(order, Bid):
            raise BadRecord("An order that money is set aside for is no bid.")
        return order

    @property
    def order_id(self) -> bytes:
        return self.envelope.record_id

    @property
    def escrow_id(self) -> bytes:
        return self.escrow.escrow_id(self.ledger)


class KeptBids:
    """Beside the orders for one auctioneer, a file each."""

    def __init__(self, orders: KeptOrders) -> None:
        self._folder = orders.folder

    def keep(self, one: KeptBid) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(one)
        for hour in one.hours or ():
            if hour.hold:
                self.hold_file(one, hour).write_bytes(hour.hold)
        scratch = path.with_suffix(".new")
        scratch.write_bytes(msgspec.json.encode(one))
        scratch.replace(path)
        for old in sorted(self._folder.glob("*.bid"))[:-KEPT_MAX]:
            for each in self._folder.glob(f"{old.stem}*"):
                each.unlink(missing_ok=True)

    def all(self) -> list[KeptBid]:
        """The oldest batch first. A file that is none any more is as good as lost: its money comes back by itself."""
        found = []
        for path in sorted(self._folder.glob("*.bid")):
            with contextlib.suppress(msgspec.DecodeError, BadRecord):
                one = msgspec.json.decode(path.read_bytes(), type=KeptBid)
                assert one.bid
                found.append(one)
        return found

    def hold_file(self, one: KeptBid, hour: BoughtHour) -> Path:
        """Where the node's Hold is, as `shoal account slash` takes it."""
        path = self._path(one)
        return path.with_name(f"{path.stem}-{hour.node.hex()[:16]}.hold")

    def forget(self, one: KeptBid) -> None:
        self._path(one).unlink(missing_ok=True)

    def _path(self, one: KeptBid) -> Path:
        return self._folder / f"{one.bid.terms.batch:016}-{one.order_id.hex()[:16]}.bid"


def hour_key(user: KeyPair, block: Block) -> KeyPair:
    """With which a user buys hours of this block, and uses them: nodes keep what belongs to one client apart from what
    belongs to another, so each block has a client of its own. It follows from the user's key."""
    return KeyPair.from_seed(blake3_hash(user.sign(b"shoal/hour-key/1\0" + block_hash(block))))


@dataclass(frozen=True)
class Bought:
    """The hours that a job uses."""

    key: KeyPair
    """Whom their nodes keep them for: it drives the job."""
    holds: Mapping[bytes, Hold]
    """By node."""


class BoughtOffers(HubClient):
    """The hubs as a job sees them that uses bought hours: with those nodes alone, on the terms of their Holds,
    whatever they offer now. That they are busy is for its sake."""

    def __init__(self, *where: Any, holds: Mapping[bytes, Hold], **how: Any) -> None:
        super().__init__(*where, **how)
        self._holds = holds

    async def find(self, wanted: OfferFind) -> list[FoundOffer]:
        if wanted.after is not None:
            return []
        nodes = [node for node in self._holds if wanted.node in (None, node)]
        asked = (msgspec.structs.replace(wanted, node=node, idle_only=False) for node in nodes)
        found = [one for some in await asyncio.gather(*map(super().find, asked)) for one in some]
        return [self._as_bought(one) for one in sorted(found, key=lambda one: one.node)]

    def _as_bought(self, one: FoundOffer) -> FoundOffer:
        hold = self._holds[one.node]
        offer = msgspec.structs.replace(
            one.offer, price=hold.price, reclaim_notice_ms=hold.reclaim_notice_ms, busy=False
        )
        return dataclasses.replace(one, offer=offer)


def bought_at(folder: Path, start_ms: int) -> dict[Block, list[tuple[KeptBids, KeptBid]]]:
    """Bids at any auction, whose orders are in `folder`, by which nodes keep the hour that begins then."""
    found: dict[Block, list[tuple[KeptBids, KeptBid]]] = {}
    for at in sorted(folder.iterdir()) if folder.is_dir() else ():
        bids = KeptBids(KeptOrders(folder, bytes.fromhex(at.name)))
        for one in bids.all():
            if one.bid.terms.block.start_ms == start_ms and any(_is_kept(hour) for hour in one.hours or ()):
                found.setdefault(one.bid.terms.block, []).append((bids, one))
    return found


def bought_hours(user: KeyPair, block: Block, bids: Iterable[KeptBid]) -> Bought:
    """Of one block, at most BOUGHT_MAX."""
    hours = [hour for one in bids for hour in one.hours or () if _is_kept(hour)]
    holds = {
        hour.node: open_hold(Envelope.from_bytes(hour.hold, Hold.MAX_BYTES), hour.node) for hour in hours[:BOUGHT_MAX]
    }
    return Bought(hour_key(user, block), holds)


async def free_for(
    bids: Sequence[tuple[KeptBids, KeptBid]], account: AccountKey, ledger: Ledger, budget_micro: int, clock: Clock
) -> None:
    """What was set aside for hours that a job uses is asked back, as the job sets it aside anew; returns when the
    account has the job's budget, or all of that has come. Raises what the ledger does."""
    for kept, one in bids:
        kept.keep(msgspec.structs.replace(one, used=True))
        wish = Closing(one.escrow_id)
        with contextlib.suppress(DoneAlready, EscrowOver):
            await ledger.apply(signed(wish, account, one.ledger))
    until_s = clock.monotonic() + BACK_WITHIN_S
    while await ledger.balance(account.address) < budget_micro and clock.monotonic() < until_s:
        await clock.sleep(1)


def _is_kept(hour: BoughtHour) -> bool:
    return bool(hour.hold) and not hour.passed_on


async def have_promised(node: KeyPair, order: Envelope, auction: str, reach: Reach) -> None:
    """Have one's own node keep the hour of an Ask free, before that is handed in. Raises ShoalError."""
    promise = sign(node, HourPromise(order=order.to_bytes(), auction=auction))
    async with reach(KeyPair.generate(), node.node_id) as link:
        message = PromiseHour(promise=promise.to_bytes())
        body = await link.request(
            message.KIND, encode(message, link.version), deadline_s=ASK_DEADLINE_S, reply_max_bytes=Done.MAX_BYTES
        )
        decode(Done, body, link.version)


class Buyer:
    """Buys hours at one auction, which are paid at one ledger."""

    def __init__(
        self,
        user: KeyPair,
        account: AccountKey,
        ledger: Ledger,
        auction: RemoteAuction,
        kept: KeptBids,
        reach: Reach,
        clock: Clock,
        dice: Dice,
    ) -> None:
        self._user, self._account, self._ledger, self._auction = user, account, ledger, auction
        self._kept, self._reach, self._clock, self._dice = kept, reach, clock, dice

    async def set_aside(self, terms: OrderTerms, blocks: int) -> KeptBid:
        """A signed bid, with its money. Raises what the ledger does; with LinkError it may be set aside."""
        key = hour_key(self._user, terms.block)
        fee_ppm = fee_at(await self._ledger.fees(), self._clock.now_ms()) or 0
        money = terms_for(terms, blocks, key.node_id, self._account.address, self._dice.bytes(32), fee_ppm)
        name = money.escrow_id(self._ledger.name)
        order = sign(key, Bid(terms=terms, blocks=blocks, escrow=name))
        signature = self._account.sign(name)
        one = KeptBid(order=order.to_bytes(), ledger=self._ledger.name, escrow=money, signature=signature)
        self._kept.keep(one)
        try:
            await self._open(one)
        except LinkError:
            raise
        except ShoalError:
            self._kept.forget(one)
            raise
        return one

    async def settle(self, one: KeptBid, running: int) -> KeptBid:
        """What became of a bid, as far as it can be brought: the money where it belongs, and the nodes' Holds.
        `running` is the batch that is open; 0 while the auction does not answer. Raises what the auction and the ledger
        do; what a node says is kept with its hour."""
        bid = one.bid
        if one.over:
            return one
        if one.hours is None and bid.terms.batch < running:
            one = self._keep(one, hours=await self._bought(one, bid))
        elif one.hours is None:
            if self._clock.now_ms() < bid.terms.expires_ms + FOR_CLAIMS_MS:
                return one
            one = self._keep(one, hours=())  # whatever its batch comes to, no node keeps an hour for it any more
        await self._put_money(one, bid)
        start_ms = bid.terms.block.start_ms
        for number, hour in enumerate(one.hours or ()):
            if not hour.hold and not hour.passed_on and self._clock.now_ms() < start_ms:
                try:
                    hour = msgspec.structs.replace(hour, hold=await self._claim(bid, hour), trouble="")
                except ShoalError as error:
                    hour = msgspec.structs.replace(hour, trouble=error.sentence)
                one = self._keep(one, hours=_with(one.hours, number, hour))
        found = await self._ledger.escrow(one.escrow_id)
        if found is None:
            return self._keep(one, over=self._clock.now_ms() > bid.terms.expires_ms)
        return self._keep(one, over=found.state is not State.OPEN)

    async def drop(self, one: KeptBid) -> None:
        """A bid that no auction has taken: its money comes back at once. Raises what the ledger does."""
        one = self._keep(one, hours=())
        await self._put_money(one, one.bid)
        self._keep(one, over=True)

    async def give_back(self, one: KeptBid, nodes: Iterable[bytes]) -> KeptBid:
        """Hours that were sold again, to their nodes. Raises what the node says."""
        key = hour_key(self._user, one.bid.terms.block)
        for number, hour in enumerate(one.hours or ()):
            if hour.node in set(nodes) and not hour.passed_on:
                if hour.hold:
                    hold = open_hold(Envelope.from_bytes(hour.hold, Hold.MAX_BYTES), hour.node)
                    release = Release(node=hour.node, slot=hold.slot, number=hold.number)
                    message = HoldRelease(release=sign(key, release).to_bytes())
                    async with self._reach(key, hour.node) as link:
                        await link.request(
                            message.KIND, encode(message, link.version), deadline_s=ASK_DEADLINE_S,
                            reply_max_bytes=Done.MAX_BYTES,
                        )  # fmt: skip
                one = self._keep(one, hours=_with(one.hours, number, msgspec.structs.replace(hour, passed_on=True)))
        return one

    async def _open(self, one: KeptBid) -> None:
        """Where the answer is lost, once more: what is signed is done once."""
        command = Open(one.escrow, one.signature)
        with contextlib.suppress(SameEscrow):
            try:
                await self._ledger.apply(command)
            except OutcomeUnknown:
                await self._ledger.apply(command)

    async def _bought(self, one: KeptBid, bid: Bid) -> tuple[BoughtHour, ...]:
        try:
            checked = await self._auction.batch(bid.terms.batch)
        except NotPublished:
            return ()  # it is older than those that are kept, and what was bought in it was not claimed in time
        return bought_by(checked, one)

    async def _put_money(self, one: KeptBid, bid: Bid) -> None:
        """As `next_step` has it: an hour that nobody has promised until it began costs nothing any more."""
        begun, owed = self._clock.now_ms() >= bid.terms.block.start_ms, dict[bytes, int]()
        for hour in () if one.used else one.hours or ():
            if not hour.passed_on and (hour.hold or not begun):
                owed[hour.payee] = owed.get(hour.payee, 0) + hour.price_micro
        while (escrow := await self._ledger.escrow(one.escrow_id)) is not None:
            step = next_step(escrow, owed, one.order_id)
            if step is None:
                return
            try:
                await self._ledger.apply(signed(step, self._account, one.ledger))
            except EscrowLocked:
                return  # what is too much comes back later
            except (DoneAlready, OldVoucher, EscrowOver):
                pass  # the answer was lost

    async def _claim(self, bid: Bid, hour: BoughtHour) -> bytes:
        """The node's Hold. Raises ShoalError."""
        block = bid.terms.block
        key, auction = hour_key(self._user, block), str(self._auction.ticket)
        message = ClaimHour(auction=auction, batch=bid.terms.batch, start_ms=block.start_ms)
        async with self._reach(key, hour.node) as link:
            body = await link.request(
                message.KIND, encode(message, link.version), deadline_s=ASK_DEADLINE_S,
                reply_max_bytes=HoldGiven.MAX_BYTES,
            )  # fmt: skip
        envelope = Envelope.from_bytes(decode(HoldGiven, body, link.version).hold, Hold.MAX_BYTES)
        hold = open_hold(envelope, hour.node)
        if (hold.client, hold.from_ms, hold.until_ms, hold.price.micro_per_h, hold.payee, hold.escrow) != (
            key.node_id, block.start_ms, block.start_ms + HOUR_MS, hour.price_micro, hour.payee, bid.escrow,
        ):  # fmt: skip
            raise BadRecord(f"Node {short_id(hour.node)} keeps something else than was bought of it.")
        return envelope.to_bytes()

    def _keep(self, one: KeptBid, **changed: object) -> KeptBid:
        after = msgspec.structs.replace(one, **changed)
        if after != one:
            self._kept.keep(after)
        return after


def bought_by(checked: Verified, one: KeptBid) -> tuple[BoughtHour, ...]:
    """What a bid has bought in the batch that it was signed for."""
    bid, trader = one.bid, one.envelope.signer
    found = []
    for market in checked.outcome.cleared:
        trades = [trade for trade in market.trades if (trade.buyer, market.block) == (trader, bid.terms.block)]
        if trades and bid_of(checked, trader, market.block) == bid:
            found += [
                BoughtHour(node=trade.node, payee=trade.payee, price_micro=market.price_micro) for trade in trades
            ]
    return tuple(found)


def _with(hours: tuple[BoughtHour, ...] | None, number: int, hour: BoughtHour) -> tuple[BoughtHour, ...]:
    assert hours is not None
    return (*hours[:number], hour, *hours[number + 1 :])
