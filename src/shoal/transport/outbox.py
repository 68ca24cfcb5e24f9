"""What a connection sends next: control and small bodies first, then bulk, its streams in turn."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from shoal.transport.frames import CREDIT, HEADER, FrameType, frame
from shoal.transport.requests import Answer, Call

URGENT_BATCH_BYTES = 64 * 1024
"""So much of control and small bodies goes before bulk gets a turn."""
_JOIN_BYTES = 4 * 1024
"""Payloads up to this are copied next to their header; larger ones are handed on as they are."""


class Batch(NamedTuple):
    """What is written at once."""

    parts: list[bytes | memoryview]
    bulk: bool
    ended: list[Answer]
    """Answers whose last frame is among them."""
    served: list[Answer]
    """Answers of which a part is, but not the last."""


class Outbox:
    """Frames and streams that wait to be sent.

    It is bounded by what is open: at most one OPEN a call and one END or REFUSE an answer (an answer counts as open
    until that has been taken from here), one credit a call, one pong, and for bulk one entry a stream.
    """

    def __init__(self) -> None:
        self._urgent: deque[tuple[bytes, Answer | None, Call | None]] = deque()
        self._turns: deque[Answer | Call] = deque()
        self._credits: dict[int, int] = {}
        self._pong: bytes | None = None

    def send(self, data: bytes, ends: Answer | None = None, opens: Call | None = None) -> None:
        """A small frame. `ends` is the answer that is over with it; `opens` the call that begins with it, and whose
        body, where it has more, takes its turn only once this frame has been taken: never before it."""
        self._urgent.append((data, ends, opens))

    def pong(self, token: bytes) -> None:
        """Only the newest ping is answered: a correct peer has one under way."""
        self._pong = token

    def grant(self, stream: int, size: int) -> None:
        self._credits[stream] = self._credits.get(stream, 0) + size

    def withdraw_grant(self, stream: int) -> None:
        self._credits.pop(stream, None)

    def take_turn(self, sender: Answer | Call) -> bool:
        """Queue a stream that has bulk to send; whether that was news."""
        if sender.in_turn or not sender.sendable:
            return False
        sender.in_turn = True
        self._turns.append(sender)
        return True

    def clear(self) -> None:
        self._urgent.clear()
        self._turns.clear()
        self._credits.clear()
        self._pong = None

    def next_batch(self, frame_bytes: int, *, closing: bool) -> Batch:
        """Up to URGENT_BATCH_BYTES of small frames, then up to `frame_bytes` of bulk; no bulk when `closing`."""
        head: list[bytes | memoryview] = []
        ended: list[Answer] = []
        served: list[Answer] = []
        if self._pong is not None:
            head.append(frame(FrameType.PONG, 0, self._pong))
            self._pong = None
        for stream, grant in self._credits.items():
            head.append(frame(FrameType.CREDIT, stream, CREDIT.pack(grant)))
        self._credits.clear()
        size = 0
        while self._urgent and size < URGENT_BATCH_BYTES:
            data, ends, opens = self._urgent.popleft()
            head.append(data)
            size += len(data)
            if ends is not None:
                ended.append(ends)
            if opens is not None:
                self.take_turn(opens)
        parts: list[bytes | memoryview] = []
        room, bulk = frame_bytes, False
        while room > 0 and self._turns and not closing:
            sender = self._turns.popleft()
            sender.in_turn = False
            if not sender.sendable:
                continue
            header, payload = sender.next_frame(room)
            self.take_turn(sender)
            if isinstance(sender, Answer):
                (ended if sender.closed else served).append(sender)
            head.append(header)
            if len(payload) <= _JOIN_BYTES:
                head.append(payload)
            else:
                parts.append(b"".join(head))
                parts.append(payload)
                head.clear()
            bulk = True
            room -= len(payload) + HEADER.size
        if head:
            parts.append(b"".join(head))
        return Batch(parts, bulk, ended, served)
