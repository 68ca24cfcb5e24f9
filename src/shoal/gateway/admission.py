"""Who is let in: as many positions as the sessions' memory holds, then a queue, then 429. Pure rules and one small
object that keeps the count."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from shoal.gateway.refusals import Overloaded

QUEUE_MAX = 128
RETRY_LEAST_S, RETRY_MOST_S = 1.0, 60.0


@dataclass
class Admission:
    """Room for `positions` of all sessions together. First come, first served."""

    positions: int
    queue_max: int = QUEUE_MAX

    def __post_init__(self) -> None:
        self.used = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._seconds = 5.0
        """What a request took lately, a moving average: for Retry-After."""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self, positions: int) -> None:
        """Wait for room. Raises Overloaded when too many wait, or when it is more than there is at all."""
        if positions > self.positions:
            raise Overloaded(
                f"The request needs room for {positions} positions, and there is room for {self.positions} in all; "
                "ask for fewer tokens.",
                RETRY_MOST_S,
            )
        if not self._queue and self.used + positions <= self.positions:
            self.used += positions
            return
        if len(self._queue) >= self.queue_max:
            raise Overloaded(f"{len(self._queue)} requests wait already; try again later.", self.retry_after_s)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((positions, place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave(positions, None)
            else:
                self._queue.remove((positions, place))
                self._let_in()
            raise

    def leave(self, positions: int, took_s: float | None) -> None:
        self.used -= positions
        if took_s is not None:
            self._seconds += 0.2 * (took_s - self._seconds)
        self._let_in()

    def _let_in(self) -> None:
        while self._queue and self.used + self._queue[0][0] <= self.positions:
            positions, place = self._queue.popleft()
            if not place.done():
                self.used += positions
                place.set_result(None)

    @property
    def retry_after_s(self) -> float:
        """When there may be a place. The requests that wait will be neither one after another nor all at once."""
        return min(RETRY_MOST_S, max(RETRY_LEAST_S, self._seconds * (1 + len(self._queue) / 8)))
