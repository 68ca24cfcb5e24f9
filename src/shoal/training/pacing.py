"""Holding a speed limit by duty cycle."""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.world import Clock

CREDIT_MAX_S = 0.05
"""A wait that took longer than asked is made up for up to this much; more would be a burst."""


class Pacer:
    """Waits so that busy time is at most `limit` of elapsed time.

    `busy_s` counts the seconds worked: processor time where the processor does the work (so that a machine shared with
    others is not slowed twice), wall time of the steps on an accelerator. `limit` 1 never waits.
    """

    def __init__(self, clock: Clock, limit: float, busy_s: Callable[[], float]) -> None:
        self._clock, self._limit, self._busy_s = clock, limit, busy_s
        self.restart()

    def restart(self) -> None:
        """Work begins now; idle time before it earns nothing."""
        self._busy_mark, self._due = self._busy_s(), self._clock.monotonic()

    def owed_s(self) -> float:
        """Seconds to wait now for the work since the last call; not positive when none."""
        busy = self._busy_s()
        self._due = max(self._due, self._clock.monotonic() - (busy - self._busy_mark) / self._limit - CREDIT_MAX_S)
        self._due += (busy - self._busy_mark) / self._limit
        self._busy_mark = busy
        return self._due - self._clock.monotonic() if self._limit < 1 else 0.0

    async def wait(self) -> None:
        """To be called after each step."""
        await self._clock.sleep(max(0.0, self.owed_s()))


def processor_time(threads: int) -> Callable[[], float]:
    """Processor seconds of this process per thread it may use."""
    return lambda: time.process_time() / threads
