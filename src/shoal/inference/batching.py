"""Which sessions take part in a stage's next step. Pure.

Streams that wait for their next token go first, all together: they are few positions, and each of them is somebody
reading. What room is left goes to pieces of prompts, the oldest first, as long as the step does not take much longer
for them. Whoever waits longest is always in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PROMPTS = 64
"""Positions of prompts for which there is room in any step."""
STEP_GROWTH = 3.0
"""A step with pieces of prompts in it may take so many times as long as one without."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A session that has `count` positions to go through the stage, since `since_ms`."""

    session: int
    count: int
    since_ms: int
    fresh: bool = False
    """It waits for its prompt to be read; else for a next token, or for guesses to be checked."""


@dataclass(frozen=True, slots=True)
class Step:
    sessions: tuple[int, ...]
    """In the order in which they came."""
    reason: str


@dataclass(frozen=True, slots=True)
class StepCost:
    """What steps were measured to take: `fixed_ms` and `position_ms` for each position."""

    fixed_ms: float = 0.0
    position_ms: float = 0.0

    def measured(self, positions: int, took_ms: float) -> StepCost:
        """One more measurement, weighed a tenth. A step of few positions says what is fixed, a step of many what each
        position takes."""
        if not (positions > 0 and 0 < took_ms < float("inf")):
            return self
        if self.fixed_ms == 0:
            return StepCost(took_ms, self.position_ms)
        expected = self.fixed_ms + self.position_ms * positions
        off = 0.1 * (took_ms - expected)
        if self.position_ms * positions > self.fixed_ms or (self.position_ms == 0 and positions >= PROMPTS):
            return StepCost(self.fixed_ms, max(0.0, self.position_ms + off / positions))
        return StepCost(max(1e-3, self.fixed_ms + off), self.position_ms)


def next_step(asks: Sequence[Ask], cost: StepCost, *, positions_max: int) -> Step:
    """The next step over sessions that wait, of which each has at most `positions_max` positions."""
    order = sorted(asks, key=lambda ask: (ask.since_ms, ask.session))
    taken: set[int] = set()
    streams = prompts = 0
    if order:
        taken.add(order[0].session)
        if order[0].fresh:
            prompts += order[0].count
        else:
            streams += order[0].count
    for ask in order[1:]:
        if not ask.fresh and streams + prompts + ask.count <= positions_max:
            taken.add(ask.session)
            streams += ask.count
    room = min(_room(cost, streams), positions_max - streams)
    for ask in order[1:]:
        if ask.fresh and prompts + ask.count <= room:
            taken.add(ask.session)
            prompts += ask.count
    waiting = f"{len(order) - len(taken)} of {len(order)} sessions wait"
    reason = f"{streams} positions of streams and {prompts} of prompts; {waiting}."
    return Step(tuple(ask.session for ask in order if ask.session in taken), reason)


def _room(cost: StepCost, positions: int) -> int:
    """Positions of prompts that make a step at most STEP_GROWTH times as long as it is without them."""
    if cost.position_ms <= 0:
        return PROMPTS
    bare = cost.fixed_ms + cost.position_ms * positions
    return max(PROMPTS, int(min(1e9, (STEP_GROWTH - 1) * bare / cost.position_ms)))
