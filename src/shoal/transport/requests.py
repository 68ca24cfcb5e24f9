"""The two ends of a request: the `Call` at its caller, the `Answer` at its handler. State only; nothing sends here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from shoal.errors import ShoalError
from shoal.transport.frames import HEADER, SMALL_BYTES, BrokenFraming, FrameType, Opening
from shoal.world import ReplyTooLarge

_TINY_BYTES = 4 * 1024
"""Chunks up to this are put together, so that a peer's tiny frames do not cost many times their size."""


class Call:
    """A request of this side: what came back so far, and who waits for it."""

    __slots__ = (
        "bulk", "chunks", "consumed", "credit", "deadline", "deadline_s", "ended", "error", "id", "in_turn", "kind",
        "large", "left", "reply_left", "upload", "waiter", "window",
    )  # fmt: skip

    def __init__(
        self, identity: int, kind: str, body: bytes, *, bulk: bool, reply_max_bytes: int, window: int, deadline_s: float
    ) -> None:
        self.id = identity
        self.kind = kind
        self.bulk = bulk
        self.large = len(body) > SMALL_BYTES
        self.upload = memoryview(body)[SMALL_BYTES:]
        """What of the body is still to be sent, after what OPEN carries."""
        self.in_turn = False
        self.deadline_s = deadline_s
        self.deadline: float | None = None
        self.chunks: deque[bytes] = deque()
        """What arrived and was not read."""
        self.reply_left = reply_max_bytes
        self.credit = window
        """What the peer may still send without more credit."""
        self.window = window
        self.consumed = 0
        """What was read, but not given back as credit."""
        self.ended = False
        self.left = False
        """Nobody waits for the reply any more."""
        self.error: ShoalError | None = None
        self.waiter: asyncio.Future[None] | None = None

    def received(self, payload: bytes, last: bool) -> bool:
        """Part of the reply came. False when that was more than was asked for; raises BrokenFraming beyond credit."""
        size = len(payload)
        if size > self.credit and (size <= self.reply_left or self.left):
            raise BrokenFraming("sent more of a reply than it had credit for")
        self.credit -= size
        self.reply_left -= size
        if self.left:
            if self.reply_left < 0:
                raise BrokenFraming("sent more of a reply than was asked for")
            return True
        if self.reply_left < 0:
            return False
        if self.chunks and len(self.chunks[-1]) + size <= _TINY_BYTES:
            self.chunks[-1] += payload
        elif size:
            self.chunks.append(payload)
        if self.bulk:
            self.deadline = None  # until its reader waits again
        self.ended = last
        self._wake()
        return True

    def fail(self, error: ShoalError) -> None:
        if self.error is None and not self.ended:
            self.error = error
            self._wake()

    async def wait(self) -> None:
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None

    @property
    def sendable(self) -> bool:
        return bool(self.upload)

    def next_frame(self, room: int) -> tuple[bytes, memoryview]:
        """Header and payload of the next part of the body."""
        payload, self.upload = self.upload[:room], self.upload[room:]
        return HEADER.pack(FrameType.BODY, self.id, len(payload)), payload

    def drop_upload(self) -> None:
        self.upload = memoryview(b"")

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Answer:
    """A request of the other side: its body as it arrives, and the reply as it leaves."""

    __slots__ = (
        "blocked_since", "body", "cancelled", "closed", "credit", "ended", "hold", "id", "in_turn", "kind", "large",
        "last_bytes", "pending", "pending_bytes", "reply_left", "reply_max_bytes", "room", "task",
    )  # fmt: skip

    def __init__(self, identity: int, opening: Opening, start: bytes, hold: Callable[[int], None]) -> None:
        self.id = identity
        self.hold = hold
        """Told how many bytes more, or fewer, wait for the peer because of this."""
        self.kind = opening.kind
        self.body: bytearray | None = bytearray(start) if opening.body_bytes > len(start) else None
        """The request's body while it is incomplete."""
        self.large = 0
        """Bytes of a large body that count against the endpoint's budget."""
        self.reply_max_bytes = opening.reply_max_bytes
        self.reply_left = opening.reply_max_bytes
        self.credit = opening.credit_bytes
        self.pending: deque[memoryview] = deque()
        """What of the reply waits to be sent."""
        self.pending_bytes = 0
        self.last_bytes = 0
        """Size of the frame that ends it without what waits, until that has left."""
        self.ended = False
        """The reply is complete in `pending`."""
        self.closed = False
        """Its last frame is on its way, or the connection is gone."""
        self.cancelled = False
        self.in_turn = False
        self.blocked_since: float | None = None
        """When it began to wait for credit."""
        self.room: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] | None = None

    def claim(self, size: int) -> None:
        """The reply grows by `size` bytes. Raises ReplyTooLarge."""
        self.reply_left -= size
        if self.reply_left < 0:
            raise ReplyTooLarge(
                f"The reply to {self.kind} is larger than the {self.reply_max_bytes} bytes that were asked for."
            )

    def queue(self, chunk: bytes) -> None:
        self.pending.append(memoryview(chunk))
        self.pending_bytes += len(chunk)
        self.hold(_whole(self.pending[-1]))

    async def wait_for_room(self, buffer_bytes: int) -> None:
        while self.pending_bytes > buffer_bytes:
            self.room = asyncio.get_running_loop().create_future()
            await self.room

    @property
    def sendable(self) -> bool:
        return not self.closed and ((bool(self.pending) and self.credit > 0) or (self.ended and not self.pending))

    @property
    def blocked(self) -> bool:
        return bool(self.pending) and self.credit <= 0

    def next_frame(self, room: int) -> tuple[bytes, memoryview]:
        """Header and payload of the next part of the reply; the last one closes the answer."""
        payload = memoryview(b"")
        if self.pending:
            first = self.pending[0]
            size = min(len(first), self.credit, room)
            payload = first[:size]
            if size < len(first):
                self.pending[0] = first[size:]
            else:
                self.hold(-_whole(self.pending.popleft()))
            self.pending_bytes -= size
            self.credit -= size
            self._give_room()
        self.closed = self.ended and not self.pending
        return HEADER.pack(FrameType.END if self.closed else FrameType.DATA, self.id, len(payload)), payload

    def close(self) -> None:
        """Nothing of it is sent any more but, perhaps, a frame that ends it."""
        self.closed = True
        self.hold(-sum(map(_whole, self.pending)))
        self.pending.clear()
        self.pending_bytes = 0
        self._give_room()

    def _give_room(self) -> None:
        if self.room is not None and not self.room.done():
            self.room.set_result(None)


def _whole(part: memoryview) -> int:
    """Bytes that are kept for the sake of this part: a chunk is freed only when its last byte has left."""
    return memoryview(part.obj).nbytes
