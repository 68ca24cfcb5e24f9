"""How much each accepted update counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.training import PARTS_PER_MILLION


@dataclass(frozen=True, slots=True)
class Weight:
    """One member's weight in the mean, and how far its update is shortened first."""

    weight_ppm: int
    scale_ppm: int = PARTS_PER_MILLION
    reason: str = ""
    """Why it counts less than its work alone would; empty when it does not."""


@dataclass(frozen=True, slots=True)
class Weights:
    members: tuple[Weight, ...]
    """In the order asked. The weights add up to a million, unless all are zero."""
    reason: str


def weigh(work: Sequence[int], gram: Sequence[Sequence[float]], *, weight_cap: float, norm_ratio_max: float) -> Weights:
    """Weights of a round's updates from each member's work (tokens) and `gram[i][j]`, the dot product of the decoded
    updates i and j (float64; the norms are on its diagonal)."""
    raise NotImplementedError
