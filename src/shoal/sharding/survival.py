"""How likely a node stays, by what was seen of it. What a node says of itself does not count."""

from __future__ import annotations

import math
from dataclasses import dataclass

STRANGER_S, STRANGER_LOSSES = 24 * 3600.0, 1
"""A node of which nothing is known is taken for one that was lost once in so long."""


@dataclass(slots=True)
class Presence:
    """For how long a node was seen, and how often it was lost."""

    seen_s: float = 0.0
    losses: int = 0

    def survival(self, since_s: float = 0.0) -> float:
        """Chance that it is there an hour from now, to two places; `since_s`: what is to be added to `seen_s`.

        Losses as a Poisson process, its rate the mean of the gamma distribution that is left of the stranger's when
        these losses in this time were seen.
        """
        rate = (STRANGER_LOSSES + self.losses) / (STRANGER_S + self.seen_s + since_s)
        return max(0.01, round(math.exp(-3600 * rate), 2))
