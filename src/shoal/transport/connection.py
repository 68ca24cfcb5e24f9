"""Many requests over one byte stream: order of sending, back-pressure, liveness, limits.

**Order.** Control frames and small bodies leave first, in order. Bulk (larger bodies and streams) follows in turns, one
frame a stream, and no frame is larger than what the path carries in about `FRAME_SECONDS` at the rate measured, so a
small request waits behind one frame of bulk at most. After `URGENT_BATCH_BYTES` of small ones, bulk gets a turn.

**Back-pressure.** A reply may be sent only on credit that its reader gave. Credit is given back as the reader consumes,
so a reader that stops stops the handler at the other end, and what is buffered for it is never more than its window.
A window grows to what arrives in `WINDOW_ROUND_TRIPS` of the shortest round trip seen; the shortest, because a larger
window must not justify itself by the queue that it makes.

**Limits.** What a peer may make this side hold is bounded by `Limits`. A peer that goes beyond, breaks the framing,
falls silent or takes no bytes loses this connection and nothing else happens. Replies that it asked for and does not
take count against what the endpoint holds of them; when that is spent, the connection with most of it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any

from shoal.errors import LinkError, ShoalError
from shoal.identity import short_id
from shoal.transport.frames import (
    CREDIT,
    KIND_MAX_BYTES,
    SMALL_BYTES,
    BrokenFraming,
    FrameReader,
    FrameType,
    Opening,
    clip,
    frame,
    pack_opening,
    pack_refusal,
    printable,
    unpack_opening,
    unpack_refusal,
)
from shoal.transport.limits import Budget, Limits, WaitingReplies
from shoal.transport.outbox import Outbox
from shoal.transport.rates import ReceiveRate, RoundTrip, SendRate
from shoal.transport.requests import Answer, Call
from shoal.transport.streams import ByteStream
from shoal.world import Body, Clock, DeadlineExceeded, Dice, LinkLost, LinkStats, Refused, ReplyTooLarge, within

_log = logging.getLogger("shoal.transport")

WINDOW_ROUND_TRIPS = 2.0
_GRANTS_PER_WINDOW = 4
_FULL_WINDOWS = 4
"""So many streams begin with a whole window, further ones with a part: many together queue little more than one."""
_CREDIT_MAX = 0xFFFFFFFF
_CLOSE_S = 1.0
"""How long a closing connection waits until its last frame is taken."""
_PING_WITH_REQUEST_S = 1.0
"""A request takes a ping along when the round trip was not measured for so long."""
_WATCH_STEP_S = 0.001


class HandlerFailed(LinkError):
    """A handler failed in a way of its own; its peer is told this much and no more."""

    code = "SH-315"


class BodyTooLarge(LinkError):
    """A request's body is larger than a link carries; large things travel as blobs."""

    code = "SH-316"


class NodeBusy(LinkError):
    """A node holds as many large requests as it can, or a stream was not read for too long."""

    code = "SH-321"


Serve = Callable[["Connection", str, bytes], Awaitable[Body]]
"""Answers a request: connection, kind, body."""


class Connection:
    """One byte stream that carries requests both ways. Made by an endpoint; `start` sets it going."""

    def __init__(
        self,
        stream: ByteStream,
        *,
        peer: bytes,
        version: int,
        source: str,
        dialled: bool,
        serve: Serve,
        down: Callable[[Connection], None],
        stale: Callable[[Connection], None],
        clock: Clock,
        dice: Dice,
        limits: Limits,
        budget: Budget,
        replies: WaitingReplies,
    ) -> None:
        self.peer = peer
        self.version = version
        self.source = source
        self.dialled = dialled
        self.down_reason: str | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self.is_stale = False
        """A ping is not answered, and nothing else comes; `stale` is called when this begins."""
        self.held_bytes = 0
        """What waits here until the peer takes it, of the replies to its requests."""
        self._stream = stream
        self._serve = serve
        self._down_callback = down
        self._stale_callback = stale
        self._clock = clock
        self._dice = dice
        self._limits = limits
        self._budget = budget
        self._replies = replies
        self._tasks: set[asyncio.Task[None]] = set()
        self._down = asyncio.Event()
        self._closing: str | None = None
        self._said_close = asyncio.Event()
        self._used_at = clock.monotonic()
        self._retired = False
        self._peer_retired = False
        # asking
        self._calls: dict[int, Call] = {}
        self._next_id = 1 if dialled else 2
        self._request_places = asyncio.Semaphore(limits.requests)
        self._bulk_places = asyncio.Semaphore(limits.bulk)
        self._large_places = asyncio.Semaphore(limits.large_bodies)
        self._windows_bytes = 0
        # answering
        self._answers: dict[int, Answer] = {}
        self._last_peer_id = 0
        self._large_answers = 0
        # writing
        self._outbox = Outbox()
        self._wake: asyncio.Future[None] | None = None
        self._write_began: float | None = None
        # measuring and watching
        self._round_trip = RoundTrip()
        self._send_rate = SendRate()
        self._receive_rate = ReceiveRate()
        self._ping: tuple[bytes, float] | None = None
        self._pinged_at = float("-inf")
        self._asked_at = float("-inf")
        """The first request since the peer was heard last."""
        self._pong_waiters: list[asyncio.Future[None]] = []
        self._heard_at = clock.monotonic()
        self._watchdog: asyncio.Task[None] | None = None
        self._watch_until = float("inf")
        stream.expect(self._send_rate.frame_bytes)

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
    def closing(self) -> bool:
        return self._closing is not None

    @property
    def idle_since(self) -> float | None:
        """When the last request ended; none while one is under way. A reply that nobody takes is no use."""
        under_way = self._calls or any(answer.blocked_since is None for answer in self._answers.values())
        return None if under_way else self._used_at

    @property
    def retired(self) -> bool:
        return self._retired

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
            with contextlib.suppress(TimeoutError):
                await within(self._clock, _CLOSE_S, _wait_for(self._said_close))
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
        self._calls.clear()
        for answer in list(self._answers.values()):
            answer.close()
            self._forget(answer)
        self._outbox.clear()
        self._said_close.set()
        self._wake_pong_waiters()
        self._down.set()
        self._down_callback(self)

    def shed(self, reason: str) -> None:
        """Let go at once of all that waits for the peer; then tell it why, and end."""
        _log.warning("Closing the connection to %s: %s.", short_id(self.peer), reason)
        for answer in list(self._answers.values()):
            answer.cancelled = True
            if answer.task is not None:
                answer.task.cancel()
            answer.close()
        self._keep(self.close(reason))

    def stats(self) -> LinkStats:
        smoothed_s = self._round_trip.smoothed_s
        round_trip_ms = None if smoothed_s is None else smoothed_s * 1000
        return LinkStats(self.bytes_sent, self.bytes_received, round_trip_ms, self._receive_rate.bps)

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
        retired = self._retired and self._peer_retired and not self._calls and not self._answers
        if retired and not self.is_down and self._closing is None:
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

    async def open(self, kind: str, body: bytes, reply_max_bytes: int, deadline_s: float, *, bulk: bool) -> Call:
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
        await self._take_places(kind, deadline_s, bulk=bulk, large=len(body) > SMALL_BYTES)
        window = min(reply_max_bytes, self._first_window() if bulk else _CREDIT_MAX)
        call = Call(
            self._next_id,
            kind,
            body,
            bulk=bulk,
            reply_max_bytes=reply_max_bytes,
            window=window,
            deadline_s=deadline_s,
        )
        self._next_id += 2
        self._calls[call.id] = call
        if bulk:
            if not self._windows_bytes:
                self._receive_rate.pause()
            self._windows_bytes += window
        now = self._clock.monotonic()
        if self._asked_at <= self._heard_at:
            self._asked_at = now
            self._watch_before(now + self._limits.renew_s / 2)
        if now - self._pinged_at > _PING_WITH_REQUEST_S:
            self._send_ping()
        opening = Opening(kind, reply_max_bytes, window, len(body))
        start = pack_opening(opening, body[:SMALL_BYTES] if call.large else body)
        self._send(frame(FrameType.OPEN, call.id, start), opens=call)
        return call

    async def more(self, call: Call, stall_s: float) -> None:
        """Wait until a call has unread bytes, or its reply is complete. Raises what became of it otherwise."""
        while not call.chunks and not call.ended:
            if call.error is not None:
                raise call.error
            call.deadline = self._clock.monotonic() + stall_s
            self._watch_before(call.deadline)
            await call.wait()

    def consumed(self, call: Call, size: int) -> None:
        """A reader took bytes: give the peer credit for as many, in portions, and perhaps for a larger window."""
        call.consumed += size
        if call.ended or call.consumed < call.window // _GRANTS_PER_WINDOW:
            return
        grant, limits = call.consumed, self._limits
        fitting = (self._receive_rate.bps or 0.0) / 8 * self._round_trip.shortest_s * WINDOW_ROUND_TRIPS
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
        self._outbox.grant(call.id, grant)
        self._wake_writer()

    def leave(self, call: Call) -> None:
        """The caller is done with a call. Its place is free once the peer has ended the stream, too."""
        call.left = True
        call.deadline = None
        if call.ended:
            return
        call.chunks.clear()
        call.drop_upload()
        if call.id in self._calls and not self.is_down:
            self._outbox.withdraw_grant(call.id)
            self._send(frame(FrameType.CANCEL, call.id))

    async def _take_places(self, kind: str, deadline_s: float, *, bulk: bool, large: bool) -> None:
        places = [self._bulk_places if bulk else self._request_places] + ([self._large_places] if large else [])
        if not any(place.locked() for place in places):
            for place in places:
                await place.acquire()  # free: returns at once
            return
        try:
            await within(self._clock, deadline_s, _acquire_all(places))
        except TimeoutError:
            raise self._too_late(kind, deadline_s) from None
        if self.is_down:
            for place in places:
                place.release()  # to the next who waits, who finds the same
            raise self._lost()

    def _first_window(self) -> int:
        limits = self._limits
        left = limits.window_bytes * _FULL_WINDOWS - self._windows_bytes
        return max(min(left, limits.window_bytes), limits.window_bytes // _FULL_WINDOWS)

    def _end_call(self, call: Call) -> None:
        """The peer ended the stream: its place is free."""
        del self._calls[call.id]
        self._used_at = self._clock.monotonic()
        self._outbox.withdraw_grant(call.id)
        call.drop_upload()
        self._free_places(call)
        self._end_if_retired()

    def _free_places(self, call: Call) -> None:
        (self._bulk_places if call.bulk else self._request_places).release()
        if call.large:
            self._large_places.release()
        if call.bulk:
            self._windows_bytes -= call.window

    def _too_late(self, kind: str, seconds: float) -> DeadlineExceeded:
        return DeadlineExceeded(f"{short_id(self.peer)} did not answer {kind} within {seconds:g} s.")

    # --- answering

    def _opened(self, stream: int, payload: bytes) -> None:
        opening, start = unpack_opening(payload)
        if stream <= self._last_peer_id or stream % 2 == (1 if self.dialled else 0):
            raise BrokenFraming(f"opened stream {stream} out of order")
        self._last_peer_id = stream
        limits = self._limits
        if len(self._answers) >= limits.requests + limits.bulk:
            raise BrokenFraming(f"opened more than {limits.requests + limits.bulk} requests at once")
        if opening.body_bytes > limits.body_max_bytes:
            raise BrokenFraming(f"announced a request body of {opening.body_bytes} bytes")
        answer = Answer(stream, opening, start, self._hold)
        if answer.body is None:
            self._answers[stream] = answer
            answer.task = self._keep(self._answer(answer, start))
            return
        if self._large_answers >= limits.large_bodies:
            raise BrokenFraming(f"opened more than {limits.large_bodies} requests with large bodies at once")
        self._answers[stream] = answer
        if self._budget.take(opening.body_bytes):
            answer.large = opening.body_bytes
            self._large_answers += 1
        else:
            self._refuse(answer, NodeBusy.code, "This node holds too many large requests; try again later.")

    def _body_came(self, stream: int, payload: bytes) -> None:
        answer = self._answers.get(stream)
        if answer is None or answer.closed:
            if stream > self._last_peer_id:
                raise BrokenFraming(f"sent a body on stream {stream}, which is not open")
            return  # it was refused or cancelled meanwhile
        if answer.body is None or len(answer.body) + len(payload) > answer.large:
            raise BrokenFraming("sent a longer request body than announced")
        answer.body += payload
        if len(answer.body) == answer.large:
            body, answer.body = bytes(answer.body), None
            answer.task = self._keep(self._answer(answer, body))

    async def _answer(self, answer: Answer, body: bytes) -> None:
        """Let the handler answer, and send what it says."""
        try:
            reply = await self._serve(self, answer.kind, body)
            if isinstance(reply, bytes):
                answer.claim(len(reply))
                if len(reply) <= min(SMALL_BYTES, answer.credit):
                    self._end(answer, frame(FrameType.END, answer.id, reply))
                    return
                self._queue(answer, reply)
            else:
                await self._queue_all(answer, reply)
            answer.ended = True
            self._take_turn(answer)
        except asyncio.CancelledError:
            self._end(answer, frame(FrameType.END, answer.id))
            if not answer.cancelled:
                raise
        except ShoalError as error:
            self._refuse(answer, error.code, error.sentence)
        except Exception:  # noqa: BLE001 - a handler's bug must cost its request alone; it is logged with its traceback
            _log.exception("The handler of %s, asked by %s, failed.", answer.kind, short_id(self.peer))
            sentence = f"The peer failed while answering {answer.kind}; its log says why."
            self._refuse(answer, HandlerFailed.code, sentence)

    async def _queue_all(self, answer: Answer, reply: AsyncIterator[bytes]) -> None:
        try:
            async for chunk in reply:
                if chunk:
                    answer.claim(len(chunk))
                    self._queue(answer, chunk)
                    await answer.wait_for_room(self._limits.send_buffer_bytes)
        finally:
            finish = getattr(reply, "aclose", None)
            if finish is not None:
                await finish()

    def _queue(self, answer: Answer, chunk: bytes) -> None:
        if answer.closed or self._closing is not None:
            raise LinkLost(f"The reply to {answer.kind} is not wanted any more.")
        answer.queue(chunk)
        self._note_blocked(answer)
        self._take_turn(answer)

    def _hold(self, size: int) -> None:
        self.held_bytes += size
        self._replies.add(size)

    def _take_turn(self, answer: Answer) -> None:
        if not self.is_down and self._outbox.take_turn(answer):
            self._wake_writer()

    def _note_blocked(self, answer: Answer) -> None:
        if answer.blocked and answer.blocked_since is None:
            answer.blocked_since = self._clock.monotonic()
            self._watch_before(answer.blocked_since + self._limits.slow_reader_s)

    def _end(self, answer: Answer, last_frame: bytes) -> None:
        """End a stream with this frame, without what else waits of its reply."""
        if not answer.closed:
            answer.close()
            self._send(last_frame, answer)
            answer.last_bytes = len(last_frame)
            self._hold(answer.last_bytes)

    def _refuse(self, answer: Answer, code: str, sentence: str) -> None:
        self._end(answer, frame(FrameType.REFUSE, answer.id, pack_refusal(code, sentence)))

    def _forget(self, answer: Answer) -> None:
        """An answer's last frame has left: it does not count any more."""
        del self._answers[answer.id]
        self._used_at = self._clock.monotonic()
        self._hold(-answer.last_bytes)
        if answer.large:
            self._budget.give_back(answer.large)
            self._large_answers -= 1
        self._end_if_retired()

    def _give_up(self, answer: Answer) -> None:
        """Nobody wants the reply: stop the handler, which ends the stream, or end it here."""
        answer.cancelled = True
        if answer.task is not None and not answer.task.done():
            answer.task.cancel()
        else:
            self._end(answer, frame(FrameType.END, answer.id))

    # --- reading

    async def _read_frames(self) -> None:
        frames, read, dispatch = FrameReader(), self._stream.read, self._dispatch
        try:
            while data := await read():
                self._heard_at = self._clock.monotonic()
                self.bytes_received += len(data)
                for kind, stream, payload in frames.feed(data):
                    dispatch(kind, stream, payload)
                    if self.is_down:
                        return
            self.abort("the peer ended the connection")
        except BrokenFraming as error:
            _log.warning("Closing the connection to %s: it %s.", short_id(self.peer), error)
            await self.close(f"{short_id(self.peer)} {error}")
        except OSError as error:
            self.abort(f"the connection broke ({error.strerror or error})")

    def _dispatch(self, kind: int, stream: int, payload: bytes) -> None:
        match kind:
            case FrameType.DATA | FrameType.END:
                self._reply_came(self._call(stream), payload, kind == FrameType.END)
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
                if answer is not None and not answer.closed:
                    self._give_up(answer)
            case FrameType.REFUSE:
                call = self._call(stream)
                code, sentence = unpack_refusal(payload)
                call.fail(ReplyTooLarge(sentence) if code == ReplyTooLarge.code else Refused(sentence, code))
                self._end_call(call)
            case FrameType.PING:
                self._outbox.pong(payload)
                self._wake_writer()
            case FrameType.PONG:
                self._pong_came(payload)
            case FrameType.RETIRE:
                self._peer_retired = True
                self._end_if_retired()
            case FrameType.CLOSE:
                self.abort(f"the peer closed it: {printable(payload)}" if payload else "the peer closed it")

    def _call(self, stream: int) -> Call:
        call = self._calls.get(stream)
        if call is None:
            raise BrokenFraming(f"replied on stream {stream}, which is not open")
        return call

    def _reply_came(self, call: Call, payload: bytes, last: bool) -> None:
        if call.bulk:
            self._receive_rate.received(len(payload), self._clock.monotonic())
        if not call.received(payload, last):
            call.fail(ReplyTooLarge(f"{short_id(self.peer)} sent a larger reply to {call.kind} than was asked for."))
            if not last:
                self.leave(call)
        if last:
            self._end_call(call)

    # --- writing

    def _send(self, data: bytes, ends: Answer | None = None, opens: Call | None = None) -> None:
        if not self.is_down:
            self._outbox.send(data, ends, opens)
            self._wake_writer()

    def _wake_writer(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _write_frames(self) -> None:
        loop, clock, outbox = asyncio.get_running_loop(), self._clock, self._outbox
        try:
            while True:
                batch = outbox.next_batch(self._send_rate.frame_bytes, closing=self._closing is not None)
                if not batch.parts:
                    if self._closing is not None:
                        self._said_close.set()
                        return
                    self._wake = loop.create_future()
                    await self._wake
                    self._wake = None
                    continue
                self._write_began = began = clock.monotonic()
                await self._stream.write(*batch.parts)
                self._write_began = None
                size = sum(map(len, batch.parts))
                self.bytes_sent += size
                for answer in batch.ended:
                    self._forget(answer)
                for answer in batch.served:
                    self._note_blocked(answer)
                if batch.bulk:
                    await asyncio.sleep(0)  # let small requests in, even if the stream takes everything at once
                    if self._send_rate.sent(size, began, clock.monotonic()):
                        self._stream.expect(self._send_rate.frame_bytes)
        except OSError as error:
            self.abort(f"the connection broke ({error.strerror or error})")

    # --- liveness and deadlines

    async def alive(self, seconds: float) -> bool:
        """Whether the peer answers a ping in time."""
        if self.is_down:
            return False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pong_waiters.append(waiter)
        self._send_ping()
        try:
            await within(self._clock, seconds, _wait_for(waiter))
        except TimeoutError:
            return False
        finally:
            self._pong_waiters.remove(waiter)
        return not self.is_down

    def _send_ping(self) -> None:
        if self._ping is None and not self.is_down:
            self._pinged_at = now = self._clock.monotonic()
            self._ping = (self._dice.bytes(8), now)  # nobody can answer it before it came
            self._send(frame(FrameType.PING, 0, self._ping[0]))
            self._watch_before(now + self._limits.renew_s)

    def _pong_came(self, token: bytes) -> None:
        if self._ping is None or token != self._ping[0]:
            raise BrokenFraming("answered a ping that was not sent")
        self._round_trip.took(self._clock.monotonic() - self._ping[1])
        self._ping = None
        self.is_stale = False
        self._wake_pong_waiters()

    def _wake_pong_waiters(self) -> None:
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
            await self._clock.sleep(max(self._watch_until - now, _WATCH_STEP_S))
            now = self._clock.monotonic()
            if now - self._watch_until > self._limits.renew_s / 2:
                # This process itself stood still: what arrived meanwhile has not been read yet.
                self._heard_at = now
                if self._write_began is not None:
                    self._write_began = now

    def _look(self, now: float) -> float:
        """Act on every deadline that has passed; gives the next one."""
        limits = self._limits
        silent_at = self._heard_at + limits.silence_s
        unanswered = self._heard_at < self._asked_at
        ping_at = self._asked_at + limits.renew_s / 2 if unanswered else self._heard_at + limits.ping_s
        stuck_at = float("inf") if self._write_began is None else self._write_began + limits.silence_s
        if now >= silent_at:
            self.abort(f"the peer was silent for {limits.silence_s:g} s")
            return now
        if now >= stuck_at:
            self.abort(f"the peer took no bytes for {limits.silence_s:g} s")
            return now
        if now >= ping_at:
            self._send_ping()
        soonest = min(stuck_at, silent_at if now >= ping_at else ping_at)
        if self._ping is not None and not self.is_stale:
            stale_at = (self._asked_at if unanswered else max(self._ping[1], self._heard_at)) + limits.renew_s
            if now >= stale_at:
                self.is_stale = True
                self._stale_callback(self)
            else:
                soonest = min(soonest, stale_at)
        for call in list(self._calls.values()):
            if call.deadline is None:
                continue
            if now >= call.deadline:
                call.deadline = None
                call.fail(self._too_late(call.kind, call.deadline_s))
            else:
                soonest = min(soonest, call.deadline)
        slow_reader_s = limits.slow_reader_scarce_s if self._replies.scarce else limits.slow_reader_s
        for answer in list(self._answers.values()):
            if answer.blocked_since is None or answer.closed:
                continue
            drop_at = answer.blocked_since + slow_reader_s
            if now >= drop_at:
                sentence = f"The reply to {answer.kind} was not read for {slow_reader_s:g} s."
                self._refuse(answer, NodeBusy.code, sentence)
                self._give_up(answer)
            else:
                soonest = min(soonest, drop_at)
        return soonest


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
        self._open: tuple[Connection, Call] | None = None

    async def __aenter__(self) -> AsyncIterator[bytes]:
        connection = self._pick()
        call = await connection.open(self._kind, self._body, self._max_bytes, self._stall_s, bulk=True)
        self._open = connection, call
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


async def _acquire_all(places: list[asyncio.Semaphore]) -> None:
    taken: list[asyncio.Semaphore] = []
    try:
        for place in places:
            await place.acquire()
            taken.append(place)
    except asyncio.CancelledError:
        for place in taken:
            place.release()
        raise


async def _wait_for(event: asyncio.Event | asyncio.Future[None]) -> None:
    await (event.wait() if isinstance(event, asyncio.Event) else event)
