"""What a link may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shoal.transport.frames import FRAME_MAX_BYTES


@dataclass(frozen=True)
class Limits:
    """What one connection may cost. The first three must be the same on both sides, and are part of the protocol."""

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
    renew_s: float = 1.0
    """A peer that was asked something and not heard for so long, a ping included, is dialled once more beside this
    connection: it may have been cut off for a moment, after which TCP is slow for long."""
    silence_s: float = 30.0
    """A peer that was not heard, or took no bytes, for so long is gone."""
    slow_reader_s: float = 300.0
    """A stream whose reader gave no credit for so long is dropped."""
    slow_reader_scarce_s: float = 20.0
    """The same, while more than half of the bytes that replies may hold is taken."""


@dataclass(frozen=True)
class EndpointLimits:
    """What an endpoint may cost, however many peers it has."""

    links: int = 1024
    """`places` says who makes way when they run short."""
    handshakes: int = 256
    """Accepted connections that have not proved who they are. `places` says who makes way when they run short."""
    handshake_s: float = 10.0
    handshake_grace_s: float = 1.0
    """So long one may take before it makes way for its like: some round trips of a long path."""
    large_bodies_bytes: int = 256 * 1024 * 1024
    """Large request bodies held at once, over all links."""
    replies_bytes: int = 256 * 1024 * 1024
    """Replies that wait for their peers to take them, over all links; beyond it the peer with most of them goes."""
    connection: Limits = field(default_factory=Limits)

    def for_open_files(self, files: int) -> EndpointLimits:
        """The same in a process that may have so many files open: some must be left for blobs, engines and HTTP."""
        return replace(self, links=min(self.links, files // 2), handshakes=min(self.handshakes, files // 8))


class Budget:
    """How many bytes of large request bodies all connections of an endpoint may hold together."""

    def __init__(self, max_bytes: int) -> None:
        self.left_bytes = max_bytes

    def take(self, size: int) -> bool:
        if size > self.left_bytes:
            return False
        self.left_bytes -= size
        return True

    def give_back(self, size: int) -> None:
        self.left_bytes += size


class WaitingReplies:
    """How many bytes of replies wait on all connections of an endpoint together; `over` is called beyond the most."""

    def __init__(self, max_bytes: int, over: Callable[[], None]) -> None:
        self.bytes = 0
        self._max_bytes = max_bytes
        self._over = over

    @property
    def scarce(self) -> bool:
        return self.bytes * 2 > self._max_bytes

    def add(self, size: int) -> None:
        """`size` is negative for what left."""
        self.bytes += size
        if size > 0 and self.bytes > self._max_bytes:
            self._over()
