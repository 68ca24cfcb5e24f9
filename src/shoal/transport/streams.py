"""Byte streams: anything that carries bytes both ways in order. A socket, a relayed path, a pipe inside one process.

Encryption, framing and authentication stand on this interface alone; none of them knows what is underneath.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from typing import Protocol, cast

from shoal.world import Clock, source_of

READ_BYTES = 256 * 1024
"""How much a stream may hand over at once."""
_READ_BUFFER_BYTES = 1024 * 1024
"""A socket with so much unread data is no longer read from."""


class ByteStream(Protocol):
    """Bytes both ways, in order. Reading and writing may go on at once; at most one task does each."""

    async def read(self) -> bytes:
        """The next bytes, at most READ_BYTES or so; empty at the end. Raises OSError when the stream broke."""
        ...

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Take the parts in order and wait until there is room for more. They may be reused afterwards.

        Raises OSError when the stream broke.
        """
        ...

    def expect(self, backlog_bytes: int) -> None:
        """A hint: about so many bytes waiting unsent below this interface are enough to keep the path busy."""
        ...

    def close(self) -> None:
        """Give the stream up at once; a task waiting in it gets an OSError or the end."""
        ...


class SocketStream(asyncio.Protocol):
    """A ByteStream over a connected socket (or any asyncio transport).

    Little is queued below it, in the process or in the kernel, so that a small frame written now leaves soon even
    while bulk flows: no Nagle delay, a bound on unsent bytes in the kernel (TCP_NOTSENT_LOWAT, where the system has
    it), and a write that returns only when nothing is left in the process.
    """

    def __init__(self, congestion_control: str | None = None) -> None:
        self._congestion_control = congestion_control
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._unread: deque[bytes] = deque()
        self._unread_bytes = 0
        self._paused_reading = False
        self._ended = False
        self._error: OSError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self.peername = "?"
        self.source = "?"

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = made = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        made.set_write_buffer_limits(high=0)
        self._socket = transport.get_extra_info("socket")
        name = transport.get_extra_info("peername")
        self.peername = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "?")
        self.source = source_of(name[0]) if isinstance(name, tuple) else "?"
        self._set_option("TCP_NODELAY", 1)
        if self._congestion_control is not None:
            # A system without this algorithm keeps its default: slower on lossy paths, never wrong.
            self._set_option("TCP_CONGESTION", self._congestion_control.encode())

    def data_received(self, data: bytes) -> None:
        self._unread.append(data)
        self._unread_bytes += len(data)
        if self._unread_bytes > _READ_BUFFER_BYTES and not self._paused_reading and self._transport is not None:
            self._paused_reading = True
            self._transport.pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        self._ended = True
        self._wake_reader()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        if error is not None and self._error is None:
            self._error = error if isinstance(error, OSError) else ConnectionError(str(error))
        self._transport = None
        self._wake_reader()
        self._wake_writer()

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        self._wake_writer()

    # --- ByteStream

    async def read(self) -> bytes:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._ended:
                return b""
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if len(self._unread) == 1 or self._unread_bytes > READ_BYTES:
            data = self._unread.popleft()
        else:
            data = b"".join(self._unread)
            self._unread.clear()
        self._unread_bytes -= len(data)
        if self._paused_reading and self._unread_bytes <= _READ_BUFFER_BYTES // 2 and self._transport is not None:
            self._paused_reading = False
            self._transport.resume_reading()
        return data

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        if self._transport is None or self._transport.is_closing():
            raise self._error or ConnectionResetError("the connection is closed")
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)
        if self._writable is not None:
            await self._writable
            if self._transport is None:
                raise self._error or ConnectionResetError("the connection was closed")

    def expect(self, backlog_bytes: int) -> None:
        self._set_option("TCP_NOTSENT_LOWAT", backlog_bytes)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- inside

    def _set_option(self, name: str, value: int | bytes) -> None:
        option = getattr(socket, name, None)
        if self._socket is None or option is None or self._socket.family not in (socket.AF_INET, socket.AF_INET6):
            return
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_writer(self) -> None:
        waiting, self._writable = self._writable, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


class PipeStream:
    """One end of a pipe inside one process: what is written arrives after `delay_s`, at `rate_bps` if that is given.

    At most `capacity_bytes` are under way; the writer then waits. `pipe()` makes both ends.
    """

    def __init__(self, clock: Clock, delay_s: float, rate_bps: float | None, capacity_bytes: int) -> None:
        self._clock = clock
        self._delay_s = delay_s
        self._rate_bps = rate_bps
        self._capacity = capacity_bytes
        self._other: PipeStream | None = None
        self._arriving: deque[tuple[float, bytes]] = deque()
        self._arriving_bytes = 0
        self._line_free_at = 0.0
        self._backlog_bytes = capacity_bytes
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = False
        self._closed = False
        self._silent = False

    async def read(self) -> bytes:
        while True:
            if self._closed:
                raise ConnectionResetError("the pipe was closed")
            if self._arriving and not self._silent:
                moment, data = self._arriving[0]
                wait = moment - self._clock.monotonic()
                if wait > 0:
                    await self._clock.sleep(wait)
                    continue
                self._arriving.popleft()
                self._arriving_bytes -= len(data)
                self._room.set()
                return data
            if self._ended and not self._silent:
                return b""
            self._news.clear()
            await self._news.wait()

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        other = self._other
        assert other is not None
        for part in parts:
            data = bytes(part)
            self._refuse_closed()
            now = self._clock.monotonic()
            start = max(now, self._line_free_at)
            self._line_free_at = start + (len(data) * 8 / self._rate_bps if self._rate_bps else 0.0)
            other._arriving.append((self._line_free_at + self._delay_s, data))
            other._arriving_bytes += len(data)
            other._news.set()
        while other._arriving_bytes > self._capacity:
            other._room.clear()
            await other._room.wait()
            self._refuse_closed()
        if self._rate_bps is not None:
            ahead_s = self._line_free_at - self._clock.monotonic() - self._backlog_bytes * 8 / self._rate_bps
            if ahead_s > 0:
                await self._clock.sleep(ahead_s)
                self._refuse_closed()

    def expect(self, backlog_bytes: int) -> None:
        self._backlog_bytes = backlog_bytes

    def _refuse_closed(self) -> None:
        if self._closed or (self._other is not None and self._other._closed and not self._silent):
            raise ConnectionResetError("the pipe was closed")

    def close(self) -> None:
        self._closed = True
        self._news.set()
        self._room.set()
        if self._other is not None:
            self._other._ended = True
            self._other._news.set()
            self._other._room.set()

    @property
    def closed(self) -> bool:
        return self._closed

    def silence(self) -> None:
        """Nothing arrives here any more, not even the end: the cable was pulled."""
        self._silent = True


def pipe(
    clock: Clock, *, delay_s: float = 0.0, rate_bps: float | None = None, capacity_bytes: int = 1024 * 1024
) -> tuple[PipeStream, PipeStream]:
    """Two connected ends; `delay_s` is one way."""
    left = PipeStream(clock, delay_s, rate_bps, capacity_bytes)
    right = PipeStream(clock, delay_s, rate_bps, capacity_bytes)
    left._other, right._other = right, left
    return left, right
