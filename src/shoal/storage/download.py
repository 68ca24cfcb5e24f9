"""One blob on its way from its holders.

A blob of one piece is one request to one holder; when that fails or takes long, the next holder is asked too, and the
first right answer counts. For a larger blob the chunk list is got in the same way, and then pieces are handed out:
each holder works on a few at a time and takes the next when one is done, so a faster holder carries more. When none is
left to hand out, a piece that another holder is late with is asked for a second time.

Holders may be slow on purpose. One that brings next to nothing holds no place and is soon ended; where all are slow, a
further one gets its turn now and then, and one that has nothing under way may always have one piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from blake3 import blake3

from shoal.errors import LinkError, StorageError
from shoal.identity import HASH_BYTES, blake3_hash, short_id
from shoal.protocol.blobs import BlobChunkList, BlobHolder, BlobRead, BlobRef
from shoal.protocol.messages import encode
from shoal.quantities import format_bytes
from shoal.storage.partial import BadPiece, Partial, contradiction
from shoal.storage.pieces import PieceSet, bytes_in, piece_bounds, piece_count
from shoal.storage.serve import ServerBusy
from shoal.storage.store import BlobStore
from shoal.world import Clock, DeadlineExceeded, Dice, Endpoint, Link, LinkLost, Refused, Unreachable, within

HOLDERS_MAX = 64
"""Holders considered for one blob."""
PEERS_AT_ONCE = 8
"""Holders that a large blob is fetched from at the same time, beside those that bring nothing; the others take the
place of those that drop out."""
PIECES_IN_FLIGHT = 16
"""Pieces of one blob in memory at a time, beside one for each holder that has no other."""
COPIES_MAX = 2
"""Holders asked for the same piece at a time, beside those that have nothing else under way."""
ASKED_AT_ONCE = 3
"""Holders asked at a time for a small blob or a chunk list, beside those that bring nothing."""
ASKED_MAX = 16
"""Holders asked at a time for a small blob or a chunk list in all."""
STRIKES_MAX = 3
"""Times a holder may stall, be lost or be out of reach in a row before it is given up for this blob."""
BUSY_MAX = 40
"""Times a holder may be busy in a row before it is given up for this blob: three to five minutes."""
STALL_S = 10.0
"""A holder that sends nothing for so long has stalled."""
STALL_BYTES = 4096
"""So has one that sends less than this in STALL_S. It is a tenth of what each of 160 streams gets that share a line of
5 Mbit/s, so a slow line of our own blames nobody."""
SLOW_BYTES = 10 * STALL_BYTES
"""A blob of which less than this comes in STALL_S takes no place from other downloads. Of a line of 5 Mbit/s, each of
the eight large ones gets nearly twenty times as much."""
TURN_S = 30.0
"""After so long without anything done, a further holder gets its turn. A line of 5 Mbit/s carries 16 pieces in it."""
DIAL_S = 10.0
"""Time to reach a holder."""
HEDGE_S = 2.0
"""A holder that nothing is known about yet, and that has sent nothing after so long, is late."""
REST_S = 0.25
"""Wait before a holder that failed or was busy is asked again; doubled each time."""
REST_MAX_S = 4.0
TICK_S = 0.25
"""How often idle holders look for late pieces."""

T = TypeVar("T")


class FetchFailed(StorageError):
    """No holder could deliver a blob."""

    code = "SH-412"


@dataclass(frozen=True)
class FetchProgress:
    """How far a fetch is."""

    done_bytes: int
    total_bytes: int
    peers: int
    """Holders in use."""


@dataclass(frozen=True)
class FetchReport:
    """How a blob came here."""

    bytes_by_peer: dict[bytes, int]
    """Verified bytes of the blob by the NodeId of who sent them; empty when it was here already."""
    resumed_bytes: int = 0
    """Bytes that an earlier, broken fetch had left."""
    dropped: dict[bytes, str] = field(default_factory=dict)
    """Holders that were given up, with the sentence that says why."""


Progress: TypeAlias = Callable[[FetchProgress], None]


@dataclass
class _Peer:
    """A holder, and how it has done for this blob."""

    node: bytes
    addresses: tuple[str, ...]
    asked: int = 0
    """Times it was asked for a small answer."""
    strikes: int = 0
    """Failures in a row."""
    busy: int = 0
    """Times in a row that it was busy."""
    rests_until: float = 0.0
    """It is not asked again before this moment of the monotonic clock."""
    was_linked: bool = False
    dropped: str | None = None
    unreachable: bool = False
    running: bool = False
    bytes: int = 0
    pace_s: float | None = None
    """Smoothed seconds per piece."""

    @property
    def lanes(self) -> int:
        """Pieces to ask for at a time: enough that a fast or distant holder does not wait for us between two; after
        trouble a single one, until it has come."""
        if self.strikes or self.busy:
            return 1
        if self.pace_s is None or self.pace_s > 0.5:
            return 2
        return 4 if self.pace_s > 0.1 else 8


@dataclass(eq=False)
class _Flight:
    """Bytes asked of a holder."""

    peer: _Peer
    since: float
    received: int = 0
    length: int = 0
    task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._mark = self._mark_before = (self.since, 0)
        """When a span of STALL_S began and what had come then; the span before it."""

    def took(self, size: int, now: float) -> None:
        """More has come. Raises DeadlineExceeded when it was too little over STALL_S; silence ends at the link."""
        if not self.received:
            self._mark = (now, 0)
        self.received += size
        began, had = self._mark
        if now - began >= STALL_S:
            if self.received - had < STALL_BYTES:
                raise DeadlineExceeded(f"It sent {self.received - had} bytes in {now - began:.0f} s.")
            self._mark_before, self._mark = self._mark, (now, self.received)

    def left_s(self, now: float) -> float:
        """How long the rest takes at the speed of late, which is what a holder that begins well cannot feign."""
        began, had = self._mark_before
        gained = self.received - had
        return (now - began) * (self.length - self.received) / gained if gained else math.inf

    def crawls(self, now: float) -> bool:
        """Whether it brings next to nothing. It takes no place from others then, and ends if it goes on like this."""
        began, had = self._mark_before
        elapsed = now - began
        return elapsed > HEDGE_S and (self.received - had) * STALL_S < STALL_BYTES * elapsed

    def late(self, now: float, rival_pace_s: float | None) -> bool:
        """Whether somebody else would probably be done before: nothing has come for long, or at the speed so far the
        rest takes longer than twice a piece from the rival. Where all are slow because our own line is, nobody is."""
        elapsed = now - self.since
        if self.received == 0:
            return elapsed > (HEDGE_S if self.peer.pace_s is None else max(TICK_S, 2 * self.peer.pace_s))
        if rival_pace_s is None:
            return elapsed > TURN_S or self.left_s(now) > STALL_S
        return self.left_s(now) > 2 * rival_pace_s + TICK_S


class Download:
    """One blob on its way, or some pieces of it, for everybody who waits for it."""

    def __init__(
        self, ref: BlobRef, wanted: PieceSet, endpoint: Endpoint, store: BlobStore, clock: Clock, dice: Dice
    ) -> None:
        self.ref, self.wanted = ref, wanted
        self._wanted_bytes = bytes_in(wanted, ref.size)
        self.cancelled = False
        self._endpoint = endpoint
        self._store = store
        self._dice = dice
        self._clock = clock
        self._name = ref.hash.hex()[:12]
        self._peers: dict[bytes, _Peer] = {}
        self._listeners: list[Progress] = []
        self._waiting = 0
        self._received = 0
        """Bytes that holders have sent, verified or not."""
        self._done_bytes = 0
        self._resumed_bytes = 0
        self._flights: dict[int, list[_Flight]] = {}
        self._pending: deque[int] = deque()
        self._left = PieceSet(0)
        """Pieces that are still to come."""
        self._changed = asyncio.Event()
        self._moved_at = 0.0
        """When a piece came or a further holder was asked for the last time."""
        self._failure: BaseException | None = None
        self._task: asyncio.Task[FetchReport] | None = None

    # Those who wait for it

    def start(self, places: asyncio.Semaphore, aside: asyncio.Semaphore, ended: Callable[[], object]) -> None:
        """Begin once there is a place; the place is left for one `aside` when the blob comes too slowly."""
        held = places

        async def make_way() -> None:
            nonlocal held
            before = -SLOW_BYTES
            while self._received - before >= SLOW_BYTES or aside.locked():
                before = self._received
                await self._clock.sleep(STALL_S)
            await aside.acquire()  # free: returns at once
            places.release()
            held = aside

        async def run() -> FetchReport:
            await places.acquire()
            way = asyncio.create_task(make_way())
            try:
                return await self._run()
            finally:
                way.cancel()
                held.release()

        def end(task: asyncio.Task[FetchReport]) -> None:
            ended()
            if not task.cancelled():
                task.exception()  # retrieved here, as nobody may be waiting any more

        self._task = asyncio.create_task(run(), name=f"fetch blob {self._name}")
        self._task.add_done_callback(end)

    async def join(self, holders: Sequence[BlobHolder], progress: Progress | None) -> FetchReport:
        assert self._task is not None
        self._add(holders)
        if progress is not None:
            self._listeners.append(progress)
        self._waiting += 1
        try:
            return await asyncio.shield(self._task)
        finally:
            self._waiting -= 1
            if progress is not None:
                self._listeners.remove(progress)
            if not self._waiting and not self._task.done():
                await self.cancel()

    async def ended(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    async def cancel(self) -> None:
        if self._task is not None:
            self.cancelled = True
            self._task.cancel()
            await asyncio.wait([self._task])

    def link_up(self, node: bytes) -> None:
        peer = self._peers.get(node)
        if peer is not None and peer.unreachable and peer.dropped is not None:
            peer.dropped, peer.unreachable, peer.strikes = None, False, 0
            self._pulse()

    def _add(self, holders: Iterable[BlobHolder]) -> None:
        """Those with an open link first, then those with an address; within each in an order of chance, so that not
        everybody who fetches the same blob begins with the same holder."""
        links = self._endpoint.links()
        fresh: list[tuple[bool, bool, float, BlobHolder]] = []
        for holder in holders:
            known = self._peers.get(holder.node)
            if known is not None:
                known.addresses = tuple(dict.fromkeys((*known.addresses, *holder.addresses)))[:8]
            elif holder.node != self._endpoint.node_id:
                chance = self._dice.uniform()
                fresh.append((holder.node not in links, not holder.addresses, chance, holder))
        for *_, holder in sorted(fresh, key=lambda item: item[:3]):
            if len(self._peers) < HOLDERS_MAX and holder.node not in self._peers:
                self._peers[holder.node] = _Peer(holder.node, tuple(holder.addresses))
        self._pulse()

    # The download

    async def _run(self) -> FetchReport:
        store = self._store
        if store.has(self.ref.hash):  # while this waited for its turn
            return self._report()
        if piece_count(self.ref.size) == 0:
            store.put(b"", self.ref.media_type)
        elif piece_count(self.ref.size) == 1:
            data = await self._ask(self._small_blob)
            await asyncio.to_thread(store.put, data, self.ref.media_type)
            self._advance(self.ref.size)
        else:
            opening = asyncio.create_task(asyncio.to_thread(store.partial, self.ref, self.wanted))
            try:
                await self._large_blob(await asyncio.shield(opening))
            finally:  # also when this task is cancelled while a thread still opens it
                await asyncio.wait([opening])
                if opening.exception() is None:
                    await _undisturbed(asyncio.to_thread(opening.result().close))
        return self._report()

    async def _large_blob(self, partial: Partial) -> None:
        if partial.chunk_list is None:
            chunk_list = await self._chunk_list()
            await asyncio.to_thread(partial.start, chunk_list)
        else:
            self._resumed_bytes = await asyncio.to_thread(partial.recheck, self.wanted)
            self._advance(self._resumed_bytes)
        for _ in range(3):
            await self._swarm(partial)
            whole = self.wanted.complete
            lost = await asyncio.to_thread(partial.finish if whole else lambda: partial.settle(self.wanted))
            if not lost:
                return
            self._done_bytes -= sum(piece_bounds(index, self.ref.size)[1] for index in lost)
        raise FetchFailed(
            f"The disk under {self._store.place} does not give back what was written to it: pieces of "
            f"blob {self._name} were wrong again after three attempts. Check the disk."
        )

    def _report(self) -> FetchReport:
        return FetchReport(
            {peer.node: peer.bytes for peer in self._peers.values() if peer.bytes},
            self._resumed_bytes,
            {peer.node: peer.dropped for peer in self._peers.values() if peer.dropped is not None},
        )

    def _advance(self, length: int) -> None:
        self._done_bytes += length
        in_use = sum(1 for peer in self._peers.values() if peer.running)
        for listener in list(self._listeners):
            listener(FetchProgress(self._done_bytes, self._wanted_bytes, in_use))

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # What can go wrong with a holder

    def _drop(self, peer: _Peer, what: str) -> None:
        """Give a holder up for this blob."""
        if peer.dropped is None:
            peer.dropped = f"{short_id(peer.node)} {what}"
            self._pulse()

    @contextmanager
    def _blame(self, peer: _Peer) -> Iterator[None]:
        """Draws the consequences of what a holder did, and raises _Trouble if it was anything bad."""
        try:
            yield
        except BadPiece as error:
            self._drop(peer, f"sent {error}")
            raise _Trouble from error
        except Refused as error:
            if error.remote_code == ServerBusy.code:
                self._wait_for(peer, f"was busy {BUSY_MAX} times, and said: {error}")
            else:
                self._drop(peer, f"refused: {error}")
            raise _Trouble from error
        except Unreachable as error:
            peer.unreachable = True
            if peer.addresses or peer.was_linked:
                self._strike(peer, f"could not be reached: {error}")
            else:
                self._drop(peer, f"could not be reached: {error}")
            raise _Trouble from error
        except (DeadlineExceeded, LinkLost) as error:
            self._strike(peer, f"failed {STRIKES_MAX} times, the last time so: {error}")
            raise _Trouble from error
        except LinkError as error:
            self._drop(peer, f"broke the protocol: {error}")
            raise _Trouble from error

    def _strike(self, peer: _Peer, what: str) -> None:
        """Let a holder rest, or give it up when this was its last strike."""
        now = self._clock.monotonic()
        if now >= peer.rests_until:  # the pieces that one lost link takes along are one strike
            peer.strikes += 1
            self._rest(peer, peer.strikes)
        if peer.strikes >= STRIKES_MAX:
            self._drop(peer, what)

    def _wait_for(self, peer: _Peer, what: str) -> None:
        """Let a busy holder rest: many begin to fetch the same blob at the same time, and it will get to us."""
        if self._clock.monotonic() >= peer.rests_until:
            peer.busy += 1
            self._rest(peer, peer.busy)
        if peer.busy >= BUSY_MAX:
            self._drop(peer, what)

    def _rest(self, peer: _Peer, times: int) -> None:
        rest_s = min(REST_MAX_S, REST_S * 2 ** min(times - 1, 10)) * (1 + self._dice.uniform())
        peer.rests_until = self._clock.monotonic() + rest_s

    def _failed(self, what: str) -> FetchFailed:
        if not self._peers:
            return FetchFailed(
                f"Blob {self._name} ({what}) could not be fetched: nobody is known to hold it. "
                f"Fetch again when somebody does."
            )
        told = [peer.dropped or f"{short_id(peer.node)} was not asked" for peer in self._peers.values()]
        return FetchFailed(
            f"Blob {self._name} ({what}) could not be fetched from any of {len(told)} holders: "
            f"{'; '.join(sentence.rstrip('.') for sentence in told)}. Fetch again when a holder is back; what has come "
            f"is kept."
        )

    # Asking one holder

    async def _link(self, peer: _Peer) -> Link:
        endpoint = self._endpoint
        link = endpoint.links().get(peer.node)
        if link is None or link.closed:
            if not peer.addresses:
                raise Unreachable("There is no open link to it and no address of it is known.")
            link = await endpoint.dial(peer.node, peer.addresses, deadline_s=DIAL_S)
        peer.was_linked = True
        return link

    async def _receive(self, flight: _Flight, kind: str, body: bytes, length: int) -> bytearray:
        """Exactly `length` bytes of an answer. Raises BadPiece when there are fewer."""
        link = await self._link(flight.peer)
        flight.length = length
        data = bytearray()
        async with link.stream(kind, body, stall_s=STALL_S, max_bytes=length) as parts:
            async for part in parts:
                data += part
                self._received += len(part)
                flight.took(len(part), self._clock.monotonic())
        if len(data) != length:
            raise BadPiece(f"{len(data)} bytes where {length} were asked for")
        return data

    async def _read(self, flight: _Flight, index: int) -> bytearray:
        offset, length = piece_bounds(index, self.ref.size)
        body = encode(BlobRead(hash=self.ref.hash, offset=offset, length=length))
        return await self._receive(flight, BlobRead.KIND, body, length)

    # A small answer from whoever gives it first

    async def _ask(self, attempt: Callable[[_Flight], Awaitable[T]]) -> T:
        """The first answer among the holders; the next one is asked when one fails, or is late."""
        running: dict[asyncio.Task[T], _Flight] = {}
        ticker = asyncio.create_task(self._tick())
        try:
            while True:
                changed = self._changed
                now = self._clock.monotonic()
                left = [peer for peer in self._peers.values() if peer.dropped is None and not peer.running]
                idle = [peer for peer in left if now >= peer.rests_until]
                if not running and not left:
                    raise self._failed(format_bytes(self.ref.size))
                if idle and all(it.late(now, None) for it in running.values()):
                    placed = [task for task, it in running.items() if not it.crawls(now)]
                    if len(placed) < ASKED_AT_ONCE and len(running) < ASKED_MAX:
                        peer = min(idle, key=lambda peer: peer.asked)
                        peer.asked += 1
                        peer.running = True
                        flight = _Flight(peer, now)
                        running[asyncio.create_task(self._attempt(attempt, flight))] = flight
                    elif placed and now - max(it.since for it in running.values()) > TURN_S:
                        max(placed, key=lambda task: running[task].left_s(now)).cancel()  # the next one's turn
                await self._wait(running, changed)
                for task in [task for task in running if task.done()]:
                    running.pop(task).peer.running = False
                    with contextlib.suppress(_Trouble):
                        if not task.cancelled():
                            return task.result()
        finally:
            for flight in running.values():
                flight.peer.running = False
            await _cancel([*running, ticker])

    @staticmethod
    async def _wait(tasks: Iterable[asyncio.Task[T]], changed: asyncio.Event) -> None:
        """Until one of the tasks is done, or something has changed."""
        waiter = asyncio.ensure_future(changed.wait())
        try:
            await asyncio.wait([*tasks, waiter], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()

    async def _attempt(self, attempt: Callable[[_Flight], Awaitable[T]], flight: _Flight) -> T:
        with self._blame(flight.peer):
            return await attempt(flight)
        raise AssertionError("unreachable")

    async def _small_blob(self, flight: _Flight) -> bytearray:
        data = await self._read(flight, 0)
        if blake3_hash(data) != self.ref.hash:
            raise BadPiece(f"wrong bytes for blob {self._name}")
        flight.peer.bytes += len(data)
        return data

    async def _chunk_list(self) -> bytes:
        accused: list[_Peer] = []

        async def attempt(flight: _Flight) -> bytes:
            length = piece_count(self.ref.size) * HASH_BYTES
            body = encode(BlobChunkList(hash=self.ref.hash))
            data = bytes(await self._receive(flight, BlobChunkList.KIND, body, length))
            if blake3_hash(data) != self.ref.chunks:
                accused.append(flight.peer)
                raise BadPiece(f"a chunk list of blob {self._name} that is not the one its reference names")
            return data

        try:
            return await self._ask(attempt)
        except FetchFailed:
            for peer in accused:
                await self._acquit(peer)
            raise

    async def _acquit(self, peer: _Peer) -> None:
        """Every holder's chunk list differed from the reference's: they lie, or the reference does.

        One that delivers bytes with the right hash holds the blob, whatever `chunks` says, so the reference is wrong.
        Nothing is kept; this costs the blob's size once, where the fetch has failed anyway, and at most TURN_S a piece.
        """
        whole = blake3()
        with contextlib.suppress(_Trouble, BadPiece, TimeoutError):
            for index in range(piece_count(self.ref.size)):
                with self._blame(peer):
                    read = self._read(_Flight(peer, self._clock.monotonic()), index)
                    await asyncio.to_thread(whole.update, await within(self._clock, TURN_S, read))
            if whole.digest() == self.ref.hash:
                raise contradiction(self.ref, f"{short_id(peer.node)} holds the bytes of `hash`")

    # Many pieces from many holders

    async def _swarm(self, partial: Partial) -> None:
        """Fetch all wanted pieces that `partial` lacks."""
        self._left = self.wanted - partial.have  # a piece is accounted for here when its thread has written it
        self._pending = deque(self._left)
        self._flights = {}
        self._failure = None
        workers: set[asyncio.Task[None]] = set()
        ticker = asyncio.create_task(self._tick())
        try:
            while self._left:
                changed = self._changed
                if self._failure is not None:
                    raise self._failure
                idle = [p for p in self._peers.values() if p.dropped is None and not p.running]
                for peer in idle[: self._free_places() if idle else 0]:
                    peer.running = True
                    self._moved_at = self._clock.monotonic()
                    workers.add(asyncio.create_task(self._work(peer, partial)))
                if not workers:
                    done = format_bytes(self._done_bytes)
                    raise self._failed(f"{done} of {format_bytes(self._wanted_bytes)} here")
                await self._wait(workers, changed)
                for worker in [worker for worker in workers if worker.done()]:
                    workers.remove(worker)
                    worker.result()
        finally:
            await _cancel([*workers, ticker])

    def _free_places(self) -> int:
        """How many holders may be asked beside those at work. One that is in trouble, or whose flights all crawl, holds
        no place; and when nothing was done for a turn, there is one more."""
        now = self._clock.monotonic()
        flights = [flight for flights in self._flights.values() for flight in flights]
        moving = {flight.peer.node for flight in flights if not flight.crawls(now)}
        stuck = {flight.peer.node for flight in flights} - moving
        at_work = [p for p in self._peers.values() if p.running and not p.strikes and not p.busy]
        free = PEERS_AT_ONCE - sum(1 for peer in at_work if peer.node not in stuck)
        return max(free, 1 if now - self._moved_at > TURN_S else 0)

    async def _tick(self) -> None:
        while True:
            await self._clock.sleep(TICK_S)
            self._pulse()

    async def _work(self, peer: _Peer, partial: Partial) -> None:
        """Let a holder deliver pieces until none is missing or it is dropped."""
        flying: set[asyncio.Task[None]] = set()
        try:
            while peer.dropped is None and self._left:
                changed = self._changed
                while len(flying) < peer.lanes:
                    index = self._choose(peer, first=not flying)
                    if index is None:
                        break
                    flying.add(self._take_off(peer, index, partial))
                await self._wait(flying, changed)
                flying = {flight for flight in flying if not flight.done()}
        finally:
            peer.running = False
            await _cancel(flying)
            self._pulse()

    def _choose(self, peer: _Peer, first: bool) -> int | None:
        """The next piece to ask this holder for: one that nobody is asked for, else one that all who are asked are late
        with. `first`: nothing is asked of it yet, so it may have a piece however many the others hold up."""
        now = self._clock.monotonic()
        if now < peer.rests_until or not (first or sum(map(len, self._flights.values())) < PIECES_IN_FLIGHT):
            return None
        if self._pending:
            return self._pending.popleft()
        late = [
            (flights[0].since, index)
            for index, flights in self._flights.items()
            if (first or len(flights) < COPIES_MAX)
            and all(flight.peer is not peer and flight.late(now, peer.pace_s) for flight in flights)
        ]
        return min(late)[1] if late else None

    def _take_off(self, peer: _Peer, index: int, partial: Partial) -> asyncio.Task[None]:
        flight = _Flight(peer, self._clock.monotonic())
        flight.task = task = asyncio.create_task(self._fly(flight, index, partial))
        self._flights.setdefault(index, []).append(flight)

        def land(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._failure = error  # of our own disk, or our own mistake: nothing another holder could mend
            flights = self._flights.get(index)
            if flights is None or flight not in flights:
                return
            flights.remove(flight)
            if not flights:
                del self._flights[index]
                if index in self._left:
                    self._pending.appendleft(index)
            self._pulse()

        task.add_done_callback(land)
        return task

    async def _fly(self, flight: _Flight, index: int, partial: Partial) -> None:
        peer = flight.peer
        try:
            with self._blame(peer):
                data = await self._read(flight, index)
                await asyncio.to_thread(partial.write, index, data)
        except _Trouble:
            return
        elapsed = self._clock.monotonic() - flight.since
        peer.pace_s = elapsed if peer.pace_s is None else 0.7 * peer.pace_s + 0.3 * elapsed
        peer.strikes = peer.busy = 0
        for other in self._flights.get(index, []):
            if other is not flight and other.task is not None:
                other.task.cancel()
        if index in self._left:
            self._left.discard(index)
            self._moved_at = self._clock.monotonic()
            peer.bytes += len(data)
            self._advance(len(data))


class _Trouble(Exception):
    """A holder did something bad; the consequences have been drawn."""


async def _cancel(tasks: Iterable[asyncio.Task[T]] | Iterable[asyncio.Task[None]]) -> None:
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def _undisturbed(work: Awaitable[T]) -> T:
    """Finish `work` even when this task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
