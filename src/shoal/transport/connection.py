"""Many requests over one byte stream: framing, order of sending, back-pressure, liveness, limits.

**Order.** Control frames and small bodies leave first, in order. Bulk (larger bodies and streams) follows in turns, one
frame a stream, and no frame is larger than what the path carries in about `FRAME_SECONDS` at the rate measured, so a
small request waits behind one frame of bulk at most. After `URGENT_BATCH_BYTES` of small ones, bulk gets a turn.

**Back-pressure.** A reply may be sent only on credit that its reader gave. Credit is given back as the reader consumes,
so a reader that stops stops the handler at the other end, and what is buffered for it is never more than its window.
A window grows to what arrives in `WINDOW_ROUND_TRIPS` of the shortest round trip seen; the shortest, because a larger
window must not justify itself by the queue that it makes.

**Limits.** What a peer may make this side hold is bounded by `Limits`. A peer that goes beyond, breaks the framing,
falls silent or takes no bytes loses this connection and nothing else happens.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from shoal.errors import LinkError, ShoalError
from shoal.identity import short_id
from shoal.transport.frames import (
    CREDIT,
    FRAME_MAX_BYTES,
    HEADER,
    KIND_MAX_BYTES,
    SMALL_BYTES,
    BrokenFraming,
    FrameType,
    Opening,
    check_header,
    clip,
    frame,
    pack_opening,
    pack_refusal,
    printable,
    unpack_opening,
    unpack_refusal,
)
from shoal.transport.streams import ByteStream
from shoal.world import Body, Clock, DeadlineExceeded, Dice, LinkLost, LinkStats, Refused, ReplyTooLarge

_log = logging.getLogger("shoal.transport")

FRAME_SECONDS = 0.010
"""A frame of bulk is as much as the path carries in this time."""
FRAME_MIN_BYTES = 4 * 1024
FRAME_START_BYTES = 16 * 1024
"""Until a rate was measured."""
URGENT_BATCH_BYTES = 64 * 1024
"""So much of control and small bodies goes before bulk gets a turn."""
_RATE_WINDOW_S = 0.05
_RATE_WINDOW_BYTES = 2 * 1024 * 1024
_SEND_GAP_S = 0.005
_BURST_GAP_S = 0.5
_TINY_BYTES = 4 * 1024
_CLOSE_S = 1.0
WINDOW_ROUND_TRIPS = 2.0
_GRANTS_PER_WINDOW = 4
_FULL_WINDOWS = 4
"""So many streams begin with a whole window, further ones with a part, so that many do not queue much more than one."""
_PING_WITH_REQUEST_S = 1.0
"""A request takes a ping along when the round trip was not measured for so long."""


@dataclass(frozen=True)
class Limits:
    """What one connection may cost. Both sides must run with the same first four numbers."""

    requests: int = 256
    """Requests open at once, each way; more wait for a free place at the caller."""
    bulk: int = 64
    """Streams open at once, each way."""
    large_bodies: int = 4
    """Request bodies above SMALL_BYTES open at once, each way."""
    body_max_bytes: int = 8 * 1024 * 1024
    """The largest request body."""
    window_bytes: int = 1024 * 1024
    """Bytes of a stream that may be under way or unread, to begin with."""
    window_max_bytes: int = 16 * 1024 * 1024
    windows_max_bytes: int = 64 * 1024 * 1024
    """The sum of all windows beyond which none grows."""
    send_buffer_bytes: int = FRAME_MAX_BYTES
    """A handler's stream is held while more than this of it waits to be sent."""
    ping_s: float = 10.0
    """A peer that was not heard for so long is asked whether it is there."""
    silence_s: float = 30.0
    """A peer that was not heard, or took no bytes, for so long is gone."""
    slow_reader_s: float = 300.0
    """A stream whose reader gave no credit for so long is dropped."""


class HandlerFailed(LinkError):
    """A handler failed in a way of its own; its peer is told this much and no more."""

    code = "SH-315"


class BodyTooLarge(LinkError):
    """A request's body is larger than a link carries; large things travel as blobs."""

    code = "SH-316"


class Budget:
    """How many bytes of large request bodies all connections of an endpoint may hold together."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes

    def take(self, size: int) -> bool:
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        self._left += size


T = TypeVar("T")


async def within(clock: Clock, seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` for at most `seconds` of `clock`. Raises TimeoutError; `work` has then been cancelled and is over."""
    task = asyncio.ensure_future(work)
    timer = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise TimeoutError
    finally:
        timer.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, so that the loop does not report it


_PARTS_MAX = 64
"""Pieces of one frame that are kept apart; a peer that sends it byte by byte costs no more than its size."""


class FrameReader:
    """Cuts a stream of bytes into frames; each payload is copied once."""

    def __init__(self) -> None:
        self._rest = b""
        self._parts: list[memoryview] = []
        self._missing = 0
        self._kind = 0
        self._stream = 0

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that `data` completes: (type, stream, payload). Raises BrokenFraming."""
        if self._missing:
            if len(data) < self._missing:
                self._parts.append(memoryview(data))
                if len(self._parts) > _PARTS_MAX:
                    self._parts = [memoryview(b"".join(self._parts))]
                self._missing -= len(data)
                return []
            position = self._missing
            self._parts.append(memoryview(data)[:position])
            self._missing = 0
            frames = [(self._kind, self._stream, b"".join(self._parts))]
            self._parts.clear()
        else:
            frames = []
            position = 0
            if self._rest:
                data = self._rest + data
                self._rest = b""
        end = len(data)
        while end - position >= HEADER.size:
            kind, stream, length = HEADER.unpack_from(data, position)
            check_header(kind, stream, length)
            position += HEADER.size
            if end - position < length:
                self._kind, self._stream = kind, stream
                self._parts.append(memoryview(data)[position:])
                self._missing = length - (end - position)
                return frames
            frames.append((kind, stream, data[position : position + length]))
            position += length
        self._rest = data[position:]
        return frames


class _Call:
    """A request of this side: what came back so far, and who waits for it."""

    __slots__ = (
        "bulk", "chunks", "consumed", "credit", "deadline", "deadline_s", "ended", "error", "id", "kind",
        "large", "left", "reply_left", "upload", "waiter", "window",
    )  # fmt: skip

    def __init__(self, identity: int, kind: str, reply_max_bytes: int, window: int, deadline_s: float) -> None:
        self.id = identity
        self.kind = kind
        self.deadline_s = deadline_s
        self.deadline: float | None = None
        self.bulk = False
        self.large = False
        self.upload: memoryview | None = None
        self.chunks: deque[bytes] = deque()
        self.reply_left = reply_max_bytes
        self.credit = window
        self.window = window
        self.consumed = 0
        self.ended = False
        self.left = False
        self.error: ShoalError | None = None
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: ShoalError) -> None:
        if self.error is None and not self.ended:
            self.error = error
            self.wake()

    async def wait(self) -> None:
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None


class _Answer:
    """A request of the other side: its body as it arrives, and the reply as it leaves."""

    __slots__ = (
        "blocked_since", "body", "cancelled", "credit", "ended", "id", "in_turn", "large", "opening", "pending",
        "pending_bytes", "reply_left", "room", "task",
    )  # fmt: skip

    def __init__(self, identity: int, opening: Opening, start: bytes) -> None:
        self.id = identity
        self.opening = opening
        self.body: bytearray | None = None
        if opening.body_bytes > len(start):
            self.body = bytearray(start)
        self.credit = opening.credit_bytes
        self.reply_left = opening.reply_max_bytes
        self.pending: deque[memoryview] = deque()
        self.pending_bytes = 0
        self.large = False
        """Whether it counts as a large body, here and in the endpoint's budget."""
        self.ended = False
        self.cancelled = False
        self.in_turn = False
        self.room: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] | None = None
        self.blocked_since: float | None = None

    @property
    def sendable(self) -> bool:
        return (self.ended and not self.pending) or (self.credit > 0 and bool(self.pending))

    def give_room(self) -> None:
        if self.room is not None and not self.room.done():
            self.room.set_result(None)


Serve = Callable[["Connection", str, bytes], Awaitable[Body]]


class Connection:
    """One byte stream that carries requests both ways. Made by an endpoint; `start` sets it going."""

    def __init__(
        self,
        stream: ByteStream,
        *,
        peer: bytes,
        version: int,
        dialled: bool,
        serve: Serve,
        down: Callable[[Connection], None],
        clock: Clock,
        dice: Dice,
        limits: Limits,
        budget: Budget,
    ) -> None:
        self.peer = peer
        self.version = version
        self.dialled = dialled
        self.down_reason: str | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self.round_trip_s: float | None = None
        self.rate_bps: float | None = None
        self.frame_bytes = FRAME_START_BYTES
        self._stream = stream
        stream.expect(FRAME_START_BYTES)
        self._serve = serve
        self._down_callback = down
        self._clock = clock
        self._dice = dice
        self._limits = limits
        self._budget = budget
        self._calls: dict[int, _Call] = {}
        self._answers: dict[int, _Answer] = {}
        self._next_id = 1 if dialled else 2
        self._last_peer_id = 0
        self._request_places = asyncio.Semaphore(limits.requests)
        self._bulk_places = asyncio.Semaphore(limits.bulk)
        self._large_places = asyncio.Semaphore(limits.large_bodies)
        self._large_answers = 0
        self._windows_bytes = 0
        self._urgent: deque[bytes] = deque()
        self._urgent_bytes = 0
        self._urgent_max_bytes = 2 * (limits.requests + limits.bulk) * (SMALL_BYTES + 1024)
        self._turns: deque[_Answer | _Call] = deque()
        self._credits: dict[int, int] = {}
        self._pong: bytes | None = None
        self._ping: tuple[bytes, float] | None = None
        self._pinged_at = float("-inf")
        self._shortest_round_trip_s = 0.0
        self._pong_waiters: list[asyncio.Future[None]] = []
        self._wake: asyncio.Future[None] | None = None
        self._write_started: float | None = None
        self._heard_at = clock.monotonic()
        self._watch_until = float("inf")
        self._closing: str | None = None
        self._said_close = asyncio.Event()
        self._retired = False
        self._peer_retired = False
        self._down = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchdog: asyncio.Task[None] | None = None
        self._burst_started = float("-inf")
        self._burst_heard = float("-inf")
        self._burst_bytes = 0
        self._sent_bytes = 0
        self._sent_s = 0.0
        self._sent_at = float("-inf")
        self._send_rate: float | None = None

    # --- life

    def start(self) -> None:
        self._heard_at = self._clock.monotonic()
        self._keep(self._read_frames())
        self._keep(self._write_frames())
        self._watchdog = self._keep(self._watch())
        self._send_ping()

    @property
    def is_down(self) -> bool:
        return self.down_reason is not None

    @property
    def retired(self) -> bool:
        return self._retired

    @property
    def idle(self) -> bool:
        return not self._calls and not self._answers

    def retire(self) -> None:
        """Open no more streams here; the connection ends when the other side has said so too and none is open."""
        if not self._retired and not self.is_down:
            self._retired = True
            self._send(frame(FrameType.RETIRE, 0))
            self._end_if_retired()

    async def close(self, reason: str) -> None:
        """Tell the peer why, as far as it still listens, and end."""
        if not self.is_down and self._closing is None:
            self._closing = reason
            self._send(frame(FrameType.CLOSE, 0, clip(reason)))
            try:
                await within(self._clock, _CLOSE_S, self._said_close.wait())
            except TimeoutError:
                pass
        elif not self.is_down:
            await self._down.wait()
        self.abort(reason)

    def abort(self, reason: str) -> None:
        """End at once. Everything under way here fails with LinkLost."""
        if self.is_down:
            return
        self.down_reason = self._closing or reason  # the peer may hang up on hearing that this side closes
        self._stream.close()
        current = asyncio.current_task()
        for task in list(self._tasks):
            if task is not current:
                task.cancel()
        for call in list(self._calls.values()):
            call.fail(self._lost())
            self._free_places(call)  # whoever waits for a place finds the connection down
        for answer in list(self._answers.values()):
            self._forget_answer(answer)
        self._calls.clear()
        self._urgent.clear()
        self._turns.clear()
        self._said_close.set()
        for waiter in self._pong_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._down.set()
        self._down_callback(self)

    async def wait_down(self) -> str:
        await self._down.wait()
        return self.down_reason or "closed"

    async def alive(self, seconds: float) -> bool:
        """Whether the peer answers a ping in time."""
        if self.is_down:
            return False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pong_waiters.append(waiter)
        self._send_ping()

        async def answered() -> None:
            await waiter

        try:
            await within(self._clock, seconds, answered())
        except TimeoutError:
            return False
        finally:
            self._pong_waiters.remove(waiter)
        return not self.is_down

    def stats(self) -> LinkStats:
        round_trip_ms = None if self.round_trip_s is None else self.round_trip_s * 1000
        return LinkStats(self.bytes_sent, self.bytes_received, round_trip_ms, self.rate_bps)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            _log.error("The connection to %s failed.", short_id(self.peer), exc_info=error)
            self.abort("it failed on this side; see the log")

    def _lost(self) -> LinkLost:
        return LinkLost(f"The link to {short_id(self.peer)} went down: {self.down_reason}.")

    def _end_if_retired(self) -> None:
        if self._retired and self._peer_retired and self.idle and not self.is_down and self._closing is None:
            self._keep(self.close("another connection to the same node took over"))

    # --- asking

    async def request(self, kind: str, body: bytes, deadline_s: float, reply_max_bytes: int) -> bytes:
        """See Link.request."""
        deadline = self._clock.monotonic() + deadline_s
        call = await self.open(kind, body, reply_max_bytes, deadline_s, bulk=False)
        call.deadline = deadline
        self._watch_before(deadline)
        try:
            while not call.ended:
                if call.error is not None:
                    raise call.error
                await call.wait()
        finally:
            self.leave(call)
        return call.chunks[0] if len(call.chunks) == 1 else b"".join(call.chunks)

    async def open(self, kind: str, body: bytes, reply_max_bytes: int, deadline_s: float, *, bulk: bool) -> _Call:
        """Begin a request. Whoever does so must `leave` it."""
        if not kind or not kind.isascii() or not kind.isprintable() or len(kind) > KIND_MAX_BYTES:
            raise ValueError(f"{kind!r} is no kind of request: 1 to {KIND_MAX_BYTES} printable ASCII characters are.")
        if len(body) > self._limits.body_max_bytes:
            raise BodyTooLarge(
                f"The body of a {kind} request is {len(body)} bytes; at most {self._limits.body_max_bytes} travel "
                "in a request."
            )
        if self.is_down:
            raise self._lost()
        large = len(body) > SMALL_BYTES
        places = [self._bulk_places if bulk else self._request_places] + ([self._large_places] if large else [])
        if any(place.locked() for place in places):
            try:
                await within(self._clock, deadline_s, _take_all(places))
            except TimeoutError:
                raise self._too_late(kind, deadline_s) from None
            if self.is_down:
                for place in places:
                    place.release()
                raise self._lost()
        else:
            for place in places:
                await place.acquire()  # free: returns at once
        window = min(reply_max_bytes, self._first_window() if bulk else 0xFFFFFFFF)
        call = _Call(self._next_id, kind, reply_max_bytes, window, deadline_s)
        call.bulk, call.large = bulk, large
        now = self._clock.monotonic()
        self._next_id += 2
        self._calls[call.id] = call
        if bulk:
            if not self._windows_bytes:
                self._burst_heard = float("-inf")
            self._windows_bytes += window
        if now - self._pinged_at > _PING_WITH_REQUEST_S:
            self._send_ping()
        opening = Opening(kind, reply_max_bytes, window, len(body))
        self._send(frame(FrameType.OPEN, call.id, pack_opening(opening, body[:SMALL_BYTES] if large else body)))
        if large:
            call.upload = memoryview(body)[SMALL_BYTES:]
            self._turns.append(call)
        return call

    async def more(self, call: _Call, stall_s: float) -> None:
        """Wait until a call has unread bytes, or its reply is complete. Raises what became of it otherwise."""
        while not call.chunks and not call.ended:
            if call.error is not None:
                raise call.error
            call.deadline = self._clock.monotonic() + stall_s
            self._watch_before(call.deadline)
            await call.wait()

    def _first_window(self) -> int:
        limits = self._limits
        left = limits.window_bytes * _FULL_WINDOWS - self._windows_bytes
        return max(min(left, limits.window_bytes), limits.window_bytes // _FULL_WINDOWS)

    def leave(self, call: _Call) -> None:
        """The caller is done with a call. Its place is free once the peer has ended the stream, too."""
        call.left = True
        call.deadline = None
        if call.ended:
            return
        call.chunks.clear()
        call.upload = None
        if call.id in self._calls and not self.is_down:
            self._credits.pop(call.id, None)
            self._send(frame(FrameType.CANCEL, call.id))

    def _end_call(self, call: _Call) -> None:
        """The peer ended the stream: its place is free."""
        del self._calls[call.id]
        self._credits.pop(call.id, None)
        call.upload = None
        self._free_places(call)
        self._end_if_retired()

    def _free_places(self, call: _Call) -> None:
        (self._bulk_places if call.bulk else self._request_places).release()
        if call.large:
            self._large_places.release()
        if call.bulk:
            self._windows_bytes -= call.window

    def _too_late(self, kind: str, seconds: float) -> DeadlineExceeded:
        return DeadlineExceeded(f"{short_id(self.peer)} did not answer {kind} within {seconds:g} s.")

    def consumed(self, call: _Call, size: int) -> None:
        """A reader took bytes: give the peer credit for as many, in portions, and perhaps for a larger window."""
        call.consumed += size
        if call.ended or call.consumed < call.window // _GRANTS_PER_WINDOW:
            return
        grant, limits = call.consumed, self._limits
        fitting = (self.rate_bps or 0.0) / 8 * self._shortest_round_trip_s * WINDOW_ROUND_TRIPS
        if (
            fitting > call.window
            and call.window * 2 <= limits.window_max_bytes
            and self._windows_bytes + call.window <= limits.windows_max_bytes
        ):
            grant += call.window
            self._windows_bytes += call.window
            call.window *= 2
        call.consumed = 0
        call.credit += grant
        self._credits[call.id] = self._credits.get(call.id, 0) + grant
        self._wake_writer()

    # --- answering

    def _opened(self, stream: int, payload: bytes) -> None:
        opening, start = unpack_opening(payload)
        if stream <= self._last_peer_id or stream % 2 == (1 if self.dialled else 0):
            raise BrokenFraming(f"opened stream {stream} out of order")
        self._last_peer_id = stream
        limits = self._limits
        if self._urgent_bytes > self._urgent_max_bytes:
            raise BrokenFraming("makes requests but does not read the replies")
        if len(self._answers) >= limits.requests + limits.bulk:
            raise BrokenFraming(f"opened more than {limits.requests + limits.bulk} requests at once")
        if opening.body_bytes > limits.body_max_bytes:
            raise BrokenFraming(f"announced a request body of {opening.body_bytes} bytes")
        answer = _Answer(stream, opening, start)
        if answer.body is None:
            self._answers[stream] = answer
            self._begin(answer, start)
            return
        if self._large_answers >= limits.large_bodies:
            raise BrokenFraming(f"opened more than {limits.large_bodies} requests with large bodies at once")
        self._answers[stream] = answer
        if self._budget.take(opening.body_bytes):
            answer.large = True
            self._large_answers += 1
        else:
            self._refuse(answer, LinkError.code, "This node holds too many large requests; try again later.")

    def _body_came(self, stream: int, payload: bytes) -> None:
        answer = self._answers.get(stream)
        if answer is None:
            if stream > self._last_peer_id:
                raise BrokenFraming(f"sent a body on stream {stream}, which is not open")
            return  # it was refused or cancelled meanwhile
        if answer.body is None or len(answer.body) + len(payload) > answer.opening.body_bytes:
            raise BrokenFraming("sent a longer request body than announced")
        answer.body += payload
        if len(answer.body) == answer.opening.body_bytes:
            body, answer.body = bytes(answer.body), None
            self._begin(answer, body)

    def _begin(self, answer: _Answer, body: bytes) -> None:
        answer.task = self._keep(self._answer(answer, body))

    async def _answer(self, answer: _Answer, body: bytes) -> None:
        kind = answer.opening.kind
        try:
            reply = await self._serve(self, kind, body)
            del body
            if isinstance(reply, bytes):
                self._reply_left(answer, len(reply))
                if len(reply) <= min(SMALL_BYTES, answer.credit):
                    self._send(frame(FrameType.END, answer.id, reply))
                    self._forget_answer(answer)
                    return
                self._queue(answer, reply)
            else:
                await self._send_all(answer, reply)
            answer.ended = True
            self._take_turn(answer)
        except asyncio.CancelledError:
            if not self.is_down:
                self._end(answer)
            if not answer.cancelled:
                raise
        except ShoalError as error:
            self._refuse(answer, error.code, error.sentence)
        except Exception:  # noqa: BLE001 - a handler's bug must cost its request alone; it is logged with its traceback
            _log.exception("The handler of %s, asked by %s, failed.", kind, short_id(self.peer))
            self._refuse(answer, HandlerFailed.code, f"The peer failed while answering {kind}; its log says why.")

    async def _send_all(self, answer: _Answer, reply: AsyncIterator[bytes]) -> None:
        try:
            async for chunk in reply:
                if not chunk:
                    continue
                self._reply_left(answer, len(chunk))
                self._queue(answer, chunk)
                while answer.pending_bytes > self._limits.send_buffer_bytes:
                    answer.room = asyncio.get_running_loop().create_future()
                    await answer.room
        finally:
            finish = getattr(reply, "aclose", None)
            if finish is not None:
                await finish()

    def _reply_left(self, answer: _Answer, size: int) -> None:
        answer.reply_left -= size
        if answer.reply_left < 0:
            raise ReplyTooLarge(
                f"The reply to {answer.opening.kind} is larger than the {answer.opening.reply_max_bytes} bytes "
                "that were asked for."
            )

    def _queue(self, answer: _Answer, chunk: bytes) -> None:
        answer.pending.append(memoryview(chunk))
        answer.pending_bytes += len(chunk)
        if answer.credit <= 0 and answer.blocked_since is None:
            answer.blocked_since = self._clock.monotonic()
            self._watch_before(answer.blocked_since + self._limits.slow_reader_s)
        self._take_turn(answer)

    def _take_turn(self, answer: _Answer) -> None:
        if not answer.in_turn and answer.sendable and not self.is_down:
            answer.in_turn = True
            self._turns.append(answer)
            self._wake_writer()

    def _end(self, answer: _Answer) -> None:
        """End a stream without the rest of its reply."""
        if answer.id in self._answers:
            self._send(frame(FrameType.END, answer.id))
            self._forget_answer(answer)

    def _refuse(self, answer: _Answer, code: str, sentence: str) -> None:
        if answer.id in self._answers and not self.is_down:
            self._send(frame(FrameType.REFUSE, answer.id, pack_refusal(code, sentence)))
            self._forget_answer(answer)

    def _forget_answer(self, answer: _Answer) -> None:
        if self._answers.pop(answer.id, None) is None:
            return
        answer.pending.clear()
        answer.pending_bytes = 0
        answer.credit = 0
        answer.ended = False
        answer.give_room()
        if answer.large:
            self._budget.give_back(answer.opening.body_bytes)
            self._large_answers -= 1
        self._end_if_retired()

    def _cancelled(self, answer: _Answer) -> None:
        """The caller left."""
        answer.cancelled = True
        if answer.task is not None and not answer.task.done():
            answer.task.cancel()
        else:
            self._end(answer)

    # --- reading

    async def _read_frames(self) -> None:
        frames, read, dispatch = FrameReader(), self._stream.read, self._dispatch
        try:
            while not self.is_down:
                data = await read()
                if not data:
                    self.abort("the peer ended the connection")
                    return
                self._heard_at = self._clock.monotonic()
                self.bytes_received += len(data)
                for kind, stream, payload in frames.feed(data):
                    dispatch(kind, stream, payload)
                    if self.is_down:
                        return
        except BrokenFraming as error:
            _log.warning("Closing the connection to %s: it %s.", short_id(self.peer), error)
            await self.close(f"{short_id(self.peer)} {error}")
        except OSError as error:
            self.abort(f"the connection broke ({error.strerror or error})")

    def _dispatch(self, kind: int, stream: int, payload: bytes) -> None:
        match kind:
            case FrameType.DATA | FrameType.END:
                self._reply_came(stream, payload, kind == FrameType.END)
            case FrameType.OPEN:
                self._opened(stream, payload)
            case FrameType.CREDIT:
                answer = self._answers.get(stream)
                if answer is not None:
                    answer.credit += CREDIT.unpack(payload)[0]
                    answer.blocked_since = None
                    self._take_turn(answer)
            case FrameType.BODY:
                self._body_came(stream, payload)
            case FrameType.CANCEL:
                answer = self._answers.get(stream)
                if answer is not None and not answer.cancelled:
                    self._cancelled(answer)
            case FrameType.REFUSE:
                call = self._call(stream)
                code, sentence = unpack_refusal(payload)
                error = ReplyTooLarge(sentence) if code == ReplyTooLarge.code else Refused(sentence, code)
                call.fail(error)
                self._end_call(call)
            case FrameType.PING:
                self._pong = payload
                self._wake_writer()
            case FrameType.PONG:
                self._pong_came(payload)
            case FrameType.RETIRE:
                self._peer_retired = True
                self._end_if_retired()
            case FrameType.CLOSE:
                self.abort(f"the peer closed it: {printable(payload)}" if payload else "the peer closed it")

    def _call(self, stream: int) -> _Call:
        call = self._calls.get(stream)
        if call is None:
            raise BrokenFraming(f"replied on stream {stream}, which is not open")
        return call

    def _reply_came(self, stream: int, payload: bytes, last: bool) -> None:
        call = self._call(stream)
        size = len(payload)
        if size > call.credit and size <= call.reply_left:
            raise BrokenFraming("sent more of a reply than it had credit for")
        call.credit -= size
        call.reply_left -= size
        if call.bulk:
            self._measure_received(size)
        if call.reply_left < 0:
            if call.left:
                raise BrokenFraming("sent more of a reply than was asked for")
            call.fail(ReplyTooLarge(f"{short_id(self.peer)} sent a larger reply to {call.kind} than was asked for."))
            self.leave(call)
        elif not call.left:
            if call.chunks and len(call.chunks[-1]) + size <= _TINY_BYTES:
                call.chunks[-1] += payload  # so that tiny frames do not cost many times their size
            elif size:
                call.chunks.append(payload)
            if call.bulk:
                call.deadline = None  # until its reader waits again
            call.ended = last
            call.wake()
        if last:
            self._end_call(call)

    def _measure_received(self, size: int) -> None:
        now = self._clock.monotonic()
        if now - self._burst_heard > _BURST_GAP_S:
            self._burst_started, self._burst_bytes = now, 0
        else:
            self._burst_bytes += size
            elapsed = now - self._burst_started
            if elapsed >= _RATE_WINDOW_S or (self.rate_bps is None and elapsed > 0):
                self.rate_bps = self._burst_bytes * 8 / elapsed
                if elapsed > 20 * _RATE_WINDOW_S:
                    self._burst_started, self._burst_bytes = now, 0
        self._burst_heard = now

    # --- writing

    def _send(self, data: bytes) -> None:
        if not self.is_down:
            self._urgent.append(data)
            self._urgent_bytes += len(data)
            self._wake_writer()

    def _wake_writer(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _write_frames(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                parts, bulk = self._next_parts()
                if not parts:
                    if self._closing is not None and not self._urgent:
                        self._said_close.set()
                        return
                    self._wake = loop.create_future()
                    await self._wake
                    self._wake = None
                    continue
                self._write_started = started = self._clock.monotonic()
                await self._stream.write(*parts)
                self._write_started = None
                size = sum(map(len, parts))
                self.bytes_sent += size
                if bulk:
                    await asyncio.sleep(0)  # let small requests in, even if the stream takes everything at once
                    self._measure_sent(size, started)
        except OSError as error:
            self.abort(f"the connection broke ({error.strerror or error})")

    def _next_parts(self) -> tuple[list[bytes | memoryview], bool]:
        """What to write now: control and small bodies first, then up to a frame of bulk, from the streams in turn."""
        head: list[bytes | memoryview] = []
        if self._pong is not None:
            head.append(frame(FrameType.PONG, 0, self._pong))
            self._pong = None
        for stream, grant in self._credits.items():
            head.append(frame(FrameType.CREDIT, stream, CREDIT.pack(grant)))
        self._credits.clear()
        size = 0
        while self._urgent and size < URGENT_BATCH_BYTES:
            data = self._urgent.popleft()
            head.append(data)
            size += len(data)
        self._urgent_bytes -= size
        parts: list[bytes | memoryview] = []
        room, bulk = self.frame_bytes, False
        while room > 0 and self._turns and self._closing is None:
            sender = self._turns.popleft()
            taken = self._upload(sender, room) if isinstance(sender, _Call) else self._reply(sender, room)
            if taken is None:
                continue
            header, payload = taken
            head.append(header)
            if len(payload) < _TINY_BYTES:
                head.append(payload)
            else:
                parts.append(b"".join(head))
                parts.append(payload)
                head.clear()
            bulk = True
            room -= len(payload) + HEADER.size
        if head:
            parts.append(b"".join(head))
        return parts, bulk

    def _upload(self, call: _Call, room: int) -> tuple[bytes, memoryview] | None:
        if not call.upload:
            return None
        payload, call.upload = call.upload[:room], call.upload[room:]
        if call.upload:
            self._turns.append(call)
        return HEADER.pack(FrameType.BODY, call.id, len(payload)), payload

    def _reply(self, answer: _Answer, room: int) -> tuple[bytes, memoryview] | None:
        answer.in_turn = False
        if not answer.sendable:
            return None
        payload = memoryview(b"")
        if answer.pending:
            first = answer.pending[0]
            size = min(len(first), answer.credit, room)
            payload = first[:size]
            if size < len(first):
                answer.pending[0] = first[size:]
            else:
                answer.pending.popleft()
            answer.pending_bytes -= size
            answer.credit -= size
            if answer.pending_bytes <= self._limits.send_buffer_bytes:
                answer.give_room()
        last = answer.ended and not answer.pending
        header = HEADER.pack(FrameType.END if last else FrameType.DATA, answer.id, len(payload))
        if last:
            self._forget_answer(answer)
        elif answer.pending and answer.credit <= 0:
            answer.blocked_since = self._clock.monotonic()
            self._watch_before(answer.blocked_since + self._limits.slow_reader_s)
        else:
            self._take_turn(answer)
        return header, payload

    def _measure_sent(self, size: int, started: float) -> None:
        """Follow the rate at which the path takes bulk, and fit the frame to it.

        Time in which there was nothing to send does not count, and a short burst, which the kernel swallows whole,
        says nothing.
        """
        now = self._clock.monotonic()
        if started - self._sent_at > _SEND_GAP_S:
            self._sent_bytes, self._sent_s = 0, 0.0
        self._sent_at = now
        self._sent_bytes += size
        self._sent_s += now - started
        if self._sent_s < _RATE_WINDOW_S and self._sent_bytes < _RATE_WINDOW_BYTES:
            return
        rate = self._sent_bytes / max(self._sent_s, 1e-6)
        self._send_rate = rate if self._send_rate is None else (self._send_rate + rate) / 2
        self._sent_bytes, self._sent_s = 0, 0.0
        fitting = max(FRAME_MIN_BYTES, min(FRAME_MAX_BYTES, int(self._send_rate * FRAME_SECONDS)))
        if fitting == FRAME_MAX_BYTES or abs(fitting - self.frame_bytes) > self.frame_bytes // 4:
            if fitting != self.frame_bytes:
                self._stream.expect(fitting)
            self.frame_bytes = fitting

    # --- liveness and deadlines

    def _send_ping(self) -> None:
        if self._ping is None and not self.is_down:
            self._pinged_at = now = self._clock.monotonic()
            self._ping = (self._dice.bytes(8), now)
            self._send(frame(FrameType.PING, 0, self._ping[0]))

    def _pong_came(self, token: bytes) -> None:
        if self._ping is None or token != self._ping[0]:
            raise BrokenFraming("answered a ping that was not sent")
        sample = self._clock.monotonic() - self._ping[1]
        # RFC 6298, section 2
        self.round_trip_s = sample if self.round_trip_s is None else self.round_trip_s * 7 / 8 + sample / 8
        self._shortest_round_trip_s = min(sample, self._shortest_round_trip_s or sample)
        self._ping = None
        for waiter in self._pong_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _watch_before(self, moment: float) -> None:
        """See to it that the watchdog looks at `moment` at the latest."""
        if moment < self._watch_until and self._watchdog is not None and not self.is_down:
            self._watch_until = moment
            self._watchdog.cancel()
            self._watchdog = self._keep(self._watch())

    async def _watch(self) -> None:
        """One task for all deadlines of this connection; it wakes when the nearest is due."""
        while not self.is_down:
            now = self._clock.monotonic()
            self._watch_until = self._look(now)
            await self._clock.sleep(max(self._watch_until - now, 0.001))
            if self._clock.monotonic() - self._watch_until > self._limits.ping_s / 2:
                # This process itself stood still: what arrived meanwhile has not been read yet.
                self._heard_at = self._clock.monotonic()
                self._write_started = None

    def _look(self, now: float) -> float:
        """Act on every deadline that has passed; gives the next one."""
        limits = self._limits
        silent_at = self._heard_at + limits.silence_s
        ping_at = self._heard_at + limits.ping_s
        if now >= silent_at:
            self.abort(f"the peer was silent for {limits.silence_s:g} s")
            return now
        if self._write_started is not None and now >= self._write_started + limits.silence_s:
            self.abort(f"the peer took no bytes for {limits.silence_s:g} s")
            return now
        if now >= ping_at:
            self._send_ping()
        soonest = silent_at if now >= ping_at else ping_at
        if self._write_started is not None:
            soonest = min(soonest, self._write_started + limits.silence_s)
        for call in list(self._calls.values()):
            if call.deadline is None:
                continue
            if now >= call.deadline:
                call.deadline = None
                call.fail(self._too_late(call.kind, call.deadline_s))
            else:
                soonest = min(soonest, call.deadline)
        for answer in list(self._answers.values()):
            if answer.blocked_since is None:
                continue
            drop_at = answer.blocked_since + limits.slow_reader_s
            if now >= drop_at:
                self._drop(answer)
            else:
                soonest = min(soonest, drop_at)
        return soonest

    def _drop(self, answer: _Answer) -> None:
        self._refuse(
            answer,
            LinkError.code,
            f"The reply to {answer.opening.kind} was not read for {self._limits.slow_reader_s:g} s.",
        )
        if answer.task is not None:
            answer.cancelled = True
            answer.task.cancel()


class ReplyStream:
    """A stream of reply bytes: a context manager, inside of which it is iterated once."""

    def __init__(
        self, connection: Callable[[], Connection], kind: str, body: bytes, stall_s: float, max_bytes: int
    ) -> None:
        self._pick = connection
        self._kind = kind
        self._body = body
        self._stall_s = stall_s
        self._max_bytes = max_bytes
        self._open: tuple[Connection, _Call] | None = None

    async def __aenter__(self) -> AsyncIterator[bytes]:
        connection = self._pick()
        self._open = (
            connection,
            await connection.open(self._kind, self._body, self._max_bytes, self._stall_s, bulk=True),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            connection, call = self._open
            self._open = None
            connection.leave(call)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._open is None:
            raise RuntimeError("a reply stream is read inside its 'async with' block")
        connection, call = self._open
        if not call.chunks:
            await connection.more(call, self._stall_s)
        if not call.chunks:
            raise StopAsyncIteration
        chunk = call.chunks.popleft()
        connection.consumed(call, len(chunk))
        return chunk


async def _take_all(places: list[asyncio.Semaphore]) -> None:
    taken: list[asyncio.Semaphore] = []
    try:
        for place in places:
            await place.acquire()
            taken.append(place)
    except asyncio.CancelledError:
        for place in taken:
            place.release()
        raise
