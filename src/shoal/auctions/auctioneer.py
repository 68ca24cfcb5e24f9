"""The batch that is open: takes orders until it is closed, and is then published.

What an auctioneer says it has made durable first. A batch is signed in memory and written, with the seed of the next
one, in one transaction; where the process dies before that is done nobody has seen the signature, and the batch is open
as it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from shoal.auctions.refusals import AuctionBusy, AuctionFailed, BatchFull, NotPublished, OrderRefused
from shoal.auctions.store import AuctionStore
from shoal.errors import BadRecord, ShoalError
from shoal.identity import Envelope, KeyPair, blake3_hash
from shoal.market.batches import Carried, Gathering, Signed
from shoal.market.bids import say_unfunded
from shoal.market.publishing import Published, close, verified
from shoal.protocol.auctions import BatchPart, Taken
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import ledger_text
from shoal.protocol.orders import ORDER_MAX_BYTES, ORDERS_MAX, Bid, Clearing, open_order
from shoal.transport.allowances import RateLimit
from shoal.world import Clock, Dice, Ledger

TRADER_ORDERS_MAX = 256
"""Of one trader, in one batch."""
SOURCE_ORDERS_MAX = 1024
"""From one address, in one batch, whatever keys sign: a quarter of it."""
WAITING_MAX = ORDERS_MAX
"""Orders that wait for the disk, or until a batch is closed."""
BIDS_PER_S, BIDS_BURST = 5.0, 256
"""From one address: for each the ledger is asked."""
AT_A_TIME = 512
"""Orders that are written in one transaction."""
_log = logging.getLogger("shoal.auctions")
T = TypeVar("T")


@dataclass(frozen=True)
class _Waiting:
    signed: Signed
    envelope: Envelope
    source: str
    taken: asyncio.Future[Taken]


class Auctioneer:
    """Takes orders and closes batches, for the tasks of one event loop. Made by `open`; the store is its own then."""

    def __init__(
        self, store: AuctionStore, key: KeyPair, ledger: Ledger, clock: Clock, dice: Dice, every_s: float, network: str
    ) -> None:
        self._store, self._key, self._clock, self._dice = store, key, clock, dice
        self._every_s, self._network = every_s, network
        self._ledger, self._bids = ledger, RateLimit(clock, BIDS_PER_S, BIDS_BURST)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="auction")
        self._turn = asyncio.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._closes_at = clock.monotonic() + every_s
        self._previous: Envelope | None = None
        self._orders: dict[bytes, Envelope] = {}
        self._unsure = False

    @classmethod
    async def open(
        cls,
        store: AuctionStore,
        key: KeyPair,
        ledger: Ledger,
        clock: Clock,
        dice: Dice,
        *,
        every_s: float,
        network: str = DEFAULT_NETWORK,
    ) -> Auctioneer:
        """As it was when it last ran; the first batch, which has no orders, is closed at once. What was published last
        is cleared again. Hours are paid at `ledger`. Raises AuctionFailed."""
        one = cls(store, key, ledger, clock, dice, every_s, network)
        try:
            if not await one._resume():
                one._carried, one._seed = Carried(), dice.bytes(32)
                await one._publish(clock.now_ms())
        except BaseException:
            await one.stop()
            raise
        return one

    @property
    def running(self) -> int:
        """The number of the batch that takes orders."""
        return self._carried.number + 1

    @property
    def orders(self) -> int:
        """That it has."""
        return len(self._orders)

    @property
    def oldest(self) -> int:
        """The number of the oldest batch that is kept."""
        return self._oldest

    @property
    def closes_ms(self) -> int:
        """When the open batch is closed, if it has an order by then."""
        in_ms = round(1000 * max(0.0, self._closes_at - self._clock.monotonic()))
        return max(self._clock.now_ms() + in_ms, self._carried.closed_ms + 1)

    async def hand_in(self, envelope: Envelope, source: str = "?") -> Taken:
        """Take an order for the open batch; it is durable when this returns. The same one again does nothing more.
        Raises what `open_order` and the ledger do, OrderRefused, BatchFull, AuctionBusy, AuctionFailed."""
        signed = Signed(envelope.record_id, envelope.signer, open_order(envelope, self._network))
        if signed.id not in self._orders:
            await self._check_money(signed, source)
        if len(self._waiting) >= WAITING_MAX:
            raise AuctionBusy(f"{WAITING_MAX} orders wait for this auction already; try again in a moment.")
        taken: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(signed, envelope, source, taken))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await taken

    async def part(self, number: int, part: int) -> BatchPart:
        """Of a published batch. Raises NotPublished, AuctionFailed."""
        found = await self._ask(partial(self._store.part, number, part))
        if found is None:
            what = f"Part {part} of batch {number}" if part else f"Batch {number}"
            raise NotPublished(
                f"{what} is not here: batches {self.oldest} to {self.running - 1} are published "
                f"and kept, and {self.running} is open."
            )
        return BatchPart(parts=found[0], data=found[1])

    async def close(self) -> int | None:
        """Close the open batch, publish it, and give its number. One without orders stays open, and so does any while
        the clock is behind the batch before: None then. Raises AuctionFailed; what is on the disk counts then."""
        async with self._turn:
            try:
                await self._make_sure()
                closed_ms = self._clock.now_ms()
                if not self._orders:
                    return None
                if closed_ms <= self._carried.closed_ms:
                    _log.warning(
                        "Batch %d stays open: the clock has gone back %d ms behind the batch before; set it right.",
                        self.running, self._carried.closed_ms - closed_ms,
                    )  # fmt: skip
                    return None
                await self._publish(closed_ms)
                return self._carried.number
            finally:
                self._closes_at = self._clock.monotonic() + self._every_s

    async def stop(self) -> None:
        """Finish what is being written, and close the store. What waits is told so."""
        if self._writing is not None:
            self._writing.cancel()
        for one in self._waiting:
            one.taken.cancel()
        self._waiting.clear()
        await asyncio.to_thread(self._thread.shutdown)
        self._store.close()

    async def _check_money(self, signed: Signed, source: str) -> None:
        """Raises OrderRefused, TooManyRequests, and what the ledger does."""
        order, ledger = signed.order, self._ledger.name
        if order.terms.block.ledger != ledger:
            raise OrderRefused(f"Hours are paid here at the ledger {ledger_text(ledger)}; the order names another one.")
        if isinstance(order, Bid):
            self._bids.spend(source.encode(), "A bid")
            reason = say_unfunded(order, signed.trader, await self._ledger.escrow(order.escrow))
            if reason is not None:
                raise OrderRefused(f"The order does not count: {reason}")

    # --- the open batch -----------------------------------------------------------------------------------------------

    async def _resume(self) -> bool:
        """Go on from what is on the disk, and say whether there is anything. Raises AuctionFailed."""
        newest = await self._ask(self._store.newest)
        if newest is None:
            return False
        seed, orders = await self._ask(self._store.open_batch)
        oldest, _ = await self._ask(self._store.span)
        try:
            published = Published.from_bytes(newest)
            found = await asyncio.to_thread(verified, published, self._network)
            taken = [Envelope.from_bytes(one, ORDER_MAX_BYTES) for one in orders]
            for one in taken:
                open_order(one, self._network)
        except BadRecord as error:
            raise AuctionFailed(f"What this auction has written is not what it was any more: {error}") from error
        if found.auctioneer != self._key.node_id:
            raise AuctionFailed(
                "What this auction published last was signed with another key than auctioneer.key, which cannot go on "
                "with it: put the old key back, or name another --data."
            )
        if seed is None or blake3_hash(seed) != found.outcome.after.next_seed_hash:
            raise AuctionFailed("The seed that this auction has promised is gone; it can close no batch more.")
        self._begin(found.outcome.after, published, seed, {one.record_id: one for one in taken}, oldest)
        return True

    def _begin(
        self, carried: Carried, before: Published, seed: bytes, orders: dict[bytes, Envelope], oldest: int
    ) -> None:
        """The batch after this one, with the orders that it has; all of this is on the disk."""
        self._carried, self._seed, self._orders, self._oldest, self._unsure = carried, seed, orders, oldest, False
        self._previous = Envelope.from_bytes(before.clearing, Clearing.MAX_BYTES)
        self._gathering = Gathering(carried, self._key.node_id)
        for one in orders.values():
            self._gathering.add(Signed(one.record_id, one.signer, open_order(one, self._network)))
        self._traders = Counter(one.signer for one in orders.values())
        self._sources = Counter[str]()

    async def _publish(self, closed_ms: int) -> None:
        next_seed, orders = self._dice.bytes(32), list(self._orders.values())
        published, carried = await asyncio.to_thread(
            close, self._key, self._carried, self._previous, orders,
            seed=self._seed, next_seed=next_seed, closed_ms=closed_ms, network=self._network,
        )  # fmt: skip
        await self._put(partial(self._store.publish, carried.number, published.to_bytes(), next_seed))
        oldest, _ = await self._ask(self._store.span)
        self._begin(carried, published, next_seed, {}, oldest)

    async def _put(self, write: Callable[[], None]) -> None:
        """Where writing fails nobody knows whether it was done: what is on the disk counts then."""
        try:
            await self._ask(write)
        except AuctionFailed:
            self._unsure = True
            with suppress(AuctionFailed):
                await self._resume()
            raise

    async def _make_sure(self) -> None:
        if self._unsure:
            await self._resume()

    async def _write(self) -> None:
        while self._waiting:
            async with self._turn:
                some = [self._waiting.popleft() for _ in range(min(AT_A_TIME, len(self._waiting)))]
                admitted: list[_Waiting] = []
                try:
                    await self._make_sure()
                    known = set(self._orders)
                    admitted = [one for one in some if self._admit(one)]
                    fresh = {id: one.to_bytes() for id, one in self._orders.items() if id not in known}
                    if fresh:
                        await self._put(partial(self._store.keep, fresh))
                except AuctionFailed as error:
                    for one in some:
                        _refuse(one, error)
                    continue
                for one in admitted:
                    if not one.taken.done():
                        taken = Taken(order=one.signed.id, batch=self.running, closes_ms=self.closes_ms)
                        one.taken.set_result(taken)

    def _admit(self, one: _Waiting) -> bool:
        """Whether an order can be taken, or was already; who handed it in is told where not."""
        if one.signed.id in self._orders:
            return True
        trader = one.signed.trader
        reason = self._gathering.refusal(one.signed, self.closes_ms)
        if reason is not None:
            _refuse(one, OrderRefused(f"The order does not count in batch {self.running}, which is open. {reason}"))
            return False
        for count, most, whose in (
            (len(self._orders), ORDERS_MAX, "in all"),
            (self._traders[trader], TRADER_ORDERS_MAX, "of one trader"),
            (self._sources[one.source], SOURCE_ORDERS_MAX, "from one address"),
        ):
            if count >= most:
                _refuse(one, BatchFull(f"Batch {self.running} takes {most} orders {whose}; sign it for the next one."))
                return False
        self._orders[one.signed.id] = one.envelope
        self._gathering.add(one.signed)
        self._traders[trader] += 1
        self._sources[one.source] += 1
        return True

    async def _ask(self, question: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, question)


def _refuse(one: _Waiting, error: ShoalError) -> None:
    if not one.taken.done():
        one.taken.set_exception(error)
