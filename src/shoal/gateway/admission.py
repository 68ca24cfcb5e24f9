"""Who is let in: as many positions as the sessions' memory holds, then a queue, then 429. Pure rules and one small
object that keeps the count."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TypeAlias

from shoal.gateway.refusals import Overloaded, Stopping

QUEUE_MAX = 128
"""Requests of one key that wait."""
RETRY_LEAST_S, RETRY_MOST_S = 1.0, 60.0

_Waiting: TypeAlias = tuple[int, "asyncio.Future[None]"]


@dataclass
class Admission:
    """Room for `positions` of all sessions together. Of one key, first come, first served; of several, in turn: however
    many requests of one wait, the next one of another is let in after one of them."""

    positions: int
    queue_max: int = QUEUE_MAX

    def __post_init__(self) -> None:
        self.used = 0
        self._closed = False
        self._queues: OrderedDict[bytes, deque[_Waiting]] = OrderedDict()
        """By key, none of them empty; the first one's turn it is."""
        self._seconds = 5.0
        """What a request took lately, a moving average: for Retry-After."""

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    async def enter(self, positions: int, whose: bytes = b"") -> None:
        """Wait for room. Raises Overloaded when too many wait, or when it is more than there is at all; Stopping."""
        if self._closed:
            raise Stopping
        if positions > self.positions:
            raise Overloaded(
                f"The request needs room for {positions} positions, and there is room for {self.positions} in all; "
                "ask for fewer tokens.",
                math.inf,
            )
        if not self._queues and self.used + positions <= self.positions:
            self.used += positions
            return
        queue = self._queues.get(whose, ())
        if len(queue) >= self.queue_max:
            raise Overloaded(f"{len(queue)} requests wait already; try again later.", self.retry_after_s)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(whose, deque()).append((positions, place))
        try:
            await place
        except asyncio.CancelledError:
            if not place.done() or place.cancelled():
                self._give_up(whose, (positions, place))
                self._let_in()
            elif place.exception() is None:
                self.leave(positions, None)
            raise

    def leave(self, positions: int, took_s: float | None) -> None:
        self.used -= positions
        if took_s is not None:
            self._seconds += 0.2 * (took_s - self._seconds)
        self._let_in()

    def close(self) -> None:
        """Nobody is let in any more, and those that wait are told so."""
        self._closed = True
        for queue in self._queues.values():
            for _, place in queue:
                if not place.done():
                    place.set_exception(Stopping())
        self._queues.clear()

    def _give_up(self, whose: bytes, waiting: _Waiting) -> None:
        queue = self._queues.get(whose, deque())
        if waiting in queue:  # its turn may have come, and passed, meanwhile
            queue.remove(waiting)
            if not queue:
                del self._queues[whose]

    def _let_in(self) -> None:
        while self._queues:
            whose, queue = next(iter(self._queues.items()))
            positions, place = queue[0]
            if self.used + positions > self.positions:
                return  # nobody overtakes: a large request would wait for ever
            queue.popleft()
            self._queues.move_to_end(whose)
            if not queue:
                del self._queues[whose]
            if not place.done():
                self.used += positions
                place.set_result(None)

    @property
    def retry_after_s(self) -> float:
        """When there may be a place. The requests that wait will be neither one after another nor all at once."""
        return min(RETRY_MOST_S, max(RETRY_LEAST_S, self._seconds * (1 + self.waiting / 8)))
