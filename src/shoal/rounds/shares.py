"""How a round's samples are divided, and how fast members are thought to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HISTORY = 3
"""Measurements whose median enters the average: one outlier among three changes nothing."""
NEW_SHARE = 0.5
"""Weight of the newest median in the moving average: a lasting change is followed within a few rounds."""
LEAST_SHARE = 0.5
"""A member whose proportional share is smaller than this part of one sample is left out: the one sample it would get
at least would take it more than twice as long as the round takes everybody else."""

LATE_FACTOR = 0.7
"""A member that was late is taken to be at most this much of what it was thought to be."""
DEADLINE_PART = 0.5
"""Part of a round's deadline that is planned for computing; the rest is for sending and for being wrong."""

UNMEASURED_RATIO_MAX = 8.0
"""A speed that a member only claims counts at most this many times the median of all, until its work was measured:
else one claim of a huge speed would leave everybody else without work."""
CLAIM_RATIO_MAX = 4.0
"""A member's own account of its computing time counts up to this many times the speed seen from outside, which
includes waiting and sending."""


@dataclass(frozen=True, slots=True)
class Speed:
    """A member's speed in samples per second: an exponential moving average of medians of the newest measurements."""

    samples_per_s: float
    recent: tuple[float, ...] = ()

    def measured(self, samples_per_s: float) -> Speed:
        """One more measurement; not positive or not finite ones are ignored."""
        if not 0 < samples_per_s < float("inf"):
            return self
        recent = (*self.recent, samples_per_s)[-HISTORY:]
        # While fewer than HISTORY were measured, the estimate so far stands in for the missing ones.
        padded = sorted((*recent, *(self.samples_per_s,) * (HISTORY - len(recent))))
        median = padded[HISTORY // 2]
        return Speed(self.samples_per_s + NEW_SHARE * (median - self.samples_per_s), recent)

    def late(self, samples: int, waited_s: float) -> Speed:
        """It did not finish `samples` in `waited_s` seconds: at once it is thought slower, by LATE_FACTOR at least."""
        slower = self.samples_per_s * LATE_FACTOR
        if waited_s > 0:
            slower = min(slower, samples / waited_s)
        return Speed(slower, (*self.recent, slower)[-HISTORY:])


def credible(speeds: Sequence[Speed]) -> list[float]:
    """The speeds to divide by, in samples per second: unmeasured ones bounded by the median of all."""
    if not speeds:
        return []
    middle = sorted(speed.samples_per_s for speed in speeds)[(len(speeds) - 1) // 2]
    return [
        speed.samples_per_s if speed.recent else min(speed.samples_per_s, middle * UNMEASURED_RATIO_MAX)
        for speed in speeds
    ]


def observed(samples: int, compute_ms: int, elapsed_ms: int) -> float:
    """Samples per second of one piece of work: by the member's own account, within what the time between being able
    to start and delivering allows. 0 when nothing can be said."""
    claimed = samples * 1000 / compute_ms if compute_ms > 0 else 0.0
    if elapsed_ms <= 0:
        return claimed
    seen = samples * 1000 / elapsed_ms
    return min(claimed, seen * CLAIM_RATIO_MAX) if claimed else seen


@dataclass(frozen=True, slots=True)
class Division:
    """Who gets how many samples, and why."""

    samples: tuple[int, ...]
    """One per member, in the order asked; 0 for those who are left out."""
    reason: str


def full_round(speeds: Sequence[float], inner_steps: int, batch_samples: int, deadline_ms: int) -> int:
    """Samples of a round in which the fastest member does `inner_steps` full batches and all others work as long; but
    no more than it can do in DEADLINE_PART of the deadline."""
    fastest = max(speeds)
    most = max(1.0, min(inner_steps * batch_samples, fastest * deadline_ms / 1000 * DEADLINE_PART))
    return max(1, round(most * sum(speeds) / fastest))


def divide_samples(speeds: Sequence[float], total: int) -> Division:
    """Divide `total` >= 1 samples in proportion to `speeds` (samples per second, all positive).

    Largest remainder (Hamilton's method); between equal remainders the faster, then the earlier member is first. A
    member whose share would be less than LEAST_SHARE samples is left out, unless nobody would be left.
    """
    fastest = max(range(len(speeds)), key=lambda at: (speeds[at], -at))
    scale = total / sum(speeds)
    chosen = [at for at, speed in enumerate(speeds) if at == fastest or speed * scale >= LEAST_SHARE]
    scale = total / sum(speeds[at] for at in chosen)
    exact = {at: speeds[at] * scale for at in chosen}
    counts = {at: int(exact[at]) for at in chosen}
    by_remainder = sorted(chosen, key=lambda at: (counts[at] - exact[at], -speeds[at], at))
    for at in by_remainder[: total - sum(counts.values())]:
        counts[at] += 1
    # Everyone chosen gets at least one, taken from whoever is furthest above its exact share.
    for at in chosen:
        able = [other for other in chosen if counts[other] > 1]
        if counts[at] == 0 and able:
            counts[max(able, key=lambda other: (counts[other] - exact[other], -speeds[other], other))] -= 1
            counts[at] = 1
    samples = tuple(counts.get(at, 0) for at in range(len(speeds)))
    working = sum(1 for count in samples if count)
    reason = f"{total} samples over {working} members at {sum(speeds):.4g} samples/s together"
    if working < len(speeds):
        slow = min(speeds)
        reason += (
            f"; {len(speeds) - working} left out: at {slow:.4g} samples/s the proportional share is "
            f"{slow * total / sum(speeds):.2g} of a sample, less than one can be given"
        )
    return Division(samples, reason + ".")
