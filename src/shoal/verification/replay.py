"""What a replay shows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shoal.protocol.training import Contribution, Engine


class Outcome(StrEnum):
    MATCH = "match"
    MISMATCH = "mismatch"
    NOT_REPLAYABLE = "not replayable"


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What a replay arrived at."""

    private_before: bytes
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
    """How far an honest replay on another engine may be off."""

    sketch: float = 0.02
    """Largest relative difference of any step's sketch: norm of the difference over the norm of the recomputed."""
    loss: float = 0.01
    """Largest relative difference of any step's loss."""
    update: float = 0.25
    """Largest relative distance of the decoded updates. A codec rounds, so this is coarser than the sketches."""


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    sentence: str
    measured: float | None = None
    """The difference that decided, in the unit of `threshold`."""
    threshold: float | None = None
    measure: str = ""
    """What was measured: `bytes`, `sketch`, `loss` or `update`."""


def judge(claimed: Contribution, recomputed: Recomputed, thresholds: Thresholds | None = None) -> Verdict:
    """Compare a Contribution with its replay."""
    raise NotImplementedError


def not_replayable(reason: str) -> Verdict:
    """The verdict when a replay cannot be made: a refused or lost opening, a missing blob. Never `honest`."""
    return Verdict(Outcome.NOT_REPLAYABLE, f"Not replayable: {reason}")
