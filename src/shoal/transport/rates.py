"""What a connection measures about its path. Nothing here reads a clock: moments are given, in seconds."""

from __future__ import annotations

from shoal.transport.frames import FRAME_MAX_BYTES

FRAME_SECONDS = 0.010
"""A frame of bulk is as much as the path carries in this time."""
FRAME_MIN_BYTES = 4 * 1024
FRAME_START_BYTES = 16 * 1024
"""Until a rate was measured."""
_WINDOW_S = 0.05
_WINDOW_BYTES = 2 * 1024 * 1024
_SEND_GAP_S = 0.005
_BURST_GAP_S = 0.5
_BURST_S = 1.0


class RoundTrip:
    """The round trip of pings: smoothed as in RFC 6298, section 2, and the shortest ever."""

    def __init__(self) -> None:
        self.smoothed_s: float | None = None
        self.shortest_s = 0.0

    def took(self, seconds: float) -> None:
        self.smoothed_s = seconds if self.smoothed_s is None else self.smoothed_s * 7 / 8 + seconds / 8
        self.shortest_s = min(seconds, self.shortest_s or seconds)


class SendRate:
    """How fast the path takes bulk, and the frame that fits: FRAME_SECONDS of it."""

    def __init__(self) -> None:
        self.frame_bytes = FRAME_START_BYTES
        self._bytes_per_s: float | None = None
        self._bytes = 0
        self._seconds = 0.0
        self._ended = float("-inf")

    def sent(self, size: int, began: float, ended: float) -> bool:
        """Bulk of `size` bytes was written between two moments. Whether `frame_bytes` changed.

        Time in which there was nothing to send does not count, and a short burst, which the kernel swallows whole,
        says nothing.
        """
        if began - self._ended > _SEND_GAP_S:
            self._bytes, self._seconds = 0, 0.0
        self._ended = ended
        self._bytes += size
        self._seconds += ended - began
        if self._seconds < _WINDOW_S and self._bytes < _WINDOW_BYTES:
            return False
        rate = self._bytes / max(self._seconds, 1e-6)
        self._bytes_per_s = rate if self._bytes_per_s is None else (self._bytes_per_s + rate) / 2
        self._bytes, self._seconds = 0, 0.0
        fitting = max(FRAME_MIN_BYTES, min(FRAME_MAX_BYTES, int(self._bytes_per_s * FRAME_SECONDS)))
        at_an_end = fitting in (FRAME_MIN_BYTES, FRAME_MAX_BYTES)
        if fitting == self.frame_bytes or (not at_an_end and abs(fitting - self.frame_bytes) <= self.frame_bytes // 4):
            return False
        self.frame_bytes = fitting
        return True


class ReceiveRate:
    """How fast bulk arrives, in bits per second, over bursts without long gaps."""

    def __init__(self) -> None:
        self.bps: float | None = None
        self._began = 0.0
        self._heard = float("-inf")
        self._bytes = 0

    def pause(self) -> None:
        """No bulk is asked for any more: the time until the next does not count."""
        self._heard = float("-inf")

    def received(self, size: int, now: float) -> None:
        if now - self._heard > _BURST_GAP_S:
            self._began, self._bytes = now, 0
        else:
            self._bytes += size
            elapsed = now - self._began
            if elapsed >= _WINDOW_S or (self.bps is None and elapsed > 0):
                self.bps = self._bytes * 8 / elapsed
                if elapsed > _BURST_S:
                    self._began, self._bytes = now, 0
        self._heard = now
