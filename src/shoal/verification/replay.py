"""What a replay shows.

A replay starts from the private state that a Contribution names, does the assigned work again, and compares. On the
same software, device, threads and processes every byte has to be the same. On another engine sums are taken in another
order: then parameters drift apart by rounding, the sketches of their movement stay close step by step, and an update's
codec may turn a tiny difference into a large one at single places. So there sketches and losses decide step by step,
and the distance of the decoded updates is a coarse backstop.

A replay may have to start some rounds earlier, at the newest state that the member kept, and work its way forward. On
the same engine it then has to arrive at the very private state that the Contribution says it started from; if it does
not, something in between was not done as claimed. That what was opened is what its name says is checked before.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import StrEnum

from shoal.protocol.training import SKETCH_WIDTH, Contribution, Engine

_STEP = struct.Struct(f"<{1 + SKETCH_WIDTH}f")


class Outcome(StrEnum):
    MATCH = "match"
    MISMATCH = "mismatch"
    NOT_REPLAYABLE = "not replayable"


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What a replay arrived at."""

    private_before: bytes
    """Hash of the private state before the round in question, opened or worked forward to."""
    private_after: bytes
    update_hash: bytes
    update_distance: float
    """Norm of (claimed update - recomputed update) over the norm of the recomputed one, both decoded."""
    sketches: bytes
    loss_first: float
    loss_last: float
    engine: Engine


@dataclass(frozen=True, slots=True)
class Thresholds:
    """How far an honest replay on another engine may be off. Where these stand between honest rounding and the smallest
    alterations was measured: `docs/training.md` has the figures."""

    sketch: float = 0.005
    """Largest relative difference of any step's sketch: norm of the difference over the norm of the recomputed."""
    loss: float = 0.002
    """Largest relative difference of any step's loss."""
    update: float = 0.05
    """Largest relative distance of the decoded updates: coarse, because a codec turns rounding into steps."""


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    sentence: str
    measured: float | None = None
    """The difference that decided, in the unit of `threshold`."""
    threshold: float | None = None
    measure: str = ""
    """What was measured: `claims` (how many of them differ), `sketch`, `loss`, `update` or `steps`."""


def judge(claimed: Contribution, recomputed: Recomputed, thresholds: Thresholds | None = None) -> Verdict:
    """Compare a Contribution with its replay. The verdict's `measured` is, for a mismatch, the first thing that is
    over its threshold; for a match the one that came closest to it."""
    limits = thresholds or Thresholds()
    sketch = compare_sketches(claimed.sketches, recomputed.sketches)
    if claimed.engine == recomputed.engine:
        return _exact(claimed, recomputed, sketch)
    where = f"replayed on another engine ({_described(recomputed.engine)}, not {_described(claimed.engine)})"
    if sketch is None:
        sizes = (len(claimed.sketches) // _STEP.size, len(recomputed.sketches) // _STEP.size)
        return Verdict(
            Outcome.MISMATCH,
            f"Mismatch: the Contribution has sketches of {sizes[0]} steps, the replay of {sizes[1]}; {where}.",
            float(abs(sizes[0] - sizes[1])),
            0.0,
            "steps",
        )
    measures = (
        ("sketch", sketch.worst, limits.sketch, f"the movement sketched at step {sketch.worst_step}"),
        ("loss", sketch.worst_loss, limits.loss, f"the loss at step {sketch.worst_loss_step}"),
        ("update", _difference(recomputed.update_distance), limits.update, "the decoded update"),
    )
    for measure, measured, threshold, what in measures:
        if measured > threshold:
            return Verdict(
                Outcome.MISMATCH,
                f"Mismatch: {what} is off by {measured:.3g}, more than the {threshold:.3g} allowed; {where}.",
                measured,
                threshold,
                measure,
            )
    measure, measured, threshold, what = max(measures, key=lambda entry: entry[1] / entry[2] if entry[2] else 0.0)
    return Verdict(
        Outcome.MATCH,
        f"Match: {what} is off by {measured:.3g}, within the {threshold:.3g} allowed; {where}.",
        measured,
        threshold,
        measure,
    )


def not_replayable(reason: str) -> Verdict:
    """The verdict when a replay cannot be made: a refused or lost opening, a missing blob. Never `honest`."""
    return Verdict(Outcome.NOT_REPLAYABLE, f"Not replayable: {reason}")


@dataclass(frozen=True, slots=True)
class SketchDifference:
    """How far two lists of sketches are apart at worst. Steps count from 0; differences that are no numbers are
    infinite."""

    worst: float
    worst_step: int
    worst_loss: float
    worst_loss_step: int


def compare_sketches(claimed: bytes, recomputed: bytes) -> SketchDifference | None:
    """Step by step; None when they are not of the same number of whole steps."""
    if len(claimed) != len(recomputed) or len(claimed) % _STEP.size:
        return None
    worst, worst_step, worst_loss, worst_loss_step = 0.0, 0, 0.0, 0
    for step, (ours, theirs) in enumerate(zip(_STEP.iter_unpack(recomputed), _STEP.iter_unpack(claimed), strict=True)):
        loss = _relative(abs(theirs[0] - ours[0]), abs(ours[0]))
        moved = _relative(math.dist(theirs[1:], ours[1:]), math.hypot(*ours[1:]))
        if loss > worst_loss:
            worst_loss, worst_loss_step = loss, step
        if moved > worst:
            worst, worst_step = moved, step
    return SketchDifference(worst, worst_step, worst_loss, worst_loss_step)


def _exact(claimed: Contribution, recomputed: Recomputed, sketch: SketchDifference | None) -> Verdict:
    differing = [
        what
        for what, same in (
            ("the private state before the round", claimed.private_before == recomputed.private_before),
            ("the sketches", claimed.sketches == recomputed.sketches),
            ("the update", claimed.update.hash == recomputed.update_hash),
            ("the private state after the round", claimed.private_after == recomputed.private_after),
            ("the first loss", _same(claimed.loss_first, recomputed.loss_first)),
            ("the last loss", _same(claimed.loss_last, recomputed.loss_last)),
        )
        if not same
    ]
    if not differing:
        return Verdict(Outcome.MATCH, "Match: every byte is the same, on the same engine.", 0.0, 0.0, "claims")
    apart = "" if sketch is None else f" (sketches differ by up to {sketch.worst:.3g}, at step {sketch.worst_step})"
    return Verdict(
        Outcome.MISMATCH,
        f"Mismatch: repeated on the same engine, where every byte has to agree, these are not as claimed: "
        f"{', '.join(differing)}{apart}.",
        float(len(differing)),
        0.0,
        "claims",
    )


def _same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


def _difference(value: float) -> float:
    return value if value >= 0 else math.inf


def _relative(difference: float, size: float) -> float:
    if math.isnan(difference) or math.isnan(size):
        return math.inf
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else math.inf


def _described(engine: Engine) -> str:
    return f"{engine.software}, {engine.device}, {engine.threads} threads, {engine.processes} processes"
