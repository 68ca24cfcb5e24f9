"""What somebody has seen of a node, as one number: how likely it seems to keep its word the next time.

It is one's own: nobody else's word counts, so that nobody is praised by its friends or run down by its rivals. A node
that was never seen has NEW. The number is the mean of a beta distribution with one good and one bad case before the
first was seen (Laplace's rule of succession; Josang and Ismail, The Beta Reputation System, 2002); a lie that a replay
has shown weighs as LIE cases.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

NEW = 0.5
ABSENT, LEFT, LIE = 1.0, 0.5, 20.0
"""What counts against a node: it kept a place and did not take part; it left or died in the middle, as honest machines
do, too; a replay showed that it lied."""
REPUTATION_LEAST = 0.1
"""Below this a job takes no node unless its file says otherwise: who lied has to work very long for it."""
Count = Annotated[int, Meta(ge=0, le=1 << 53)]


class Seen(msgspec.Struct, frozen=True, omit_defaults=True):
    """Jobs of one user that a node had a part in."""

    kept: Count = 0
    """It worked until they ended."""
    left: Count = 0
    absent: Count = 0
    lied: Count = 0
    last_ms: Count = 0

    @property
    def score(self) -> float:
        bad = LEFT * self.left + ABSENT * self.absent + LIE * self.lied
        return (self.kept + 1) / (self.kept + bad + 2)


class Outcome(msgspec.Struct, frozen=True):
    """What a job has shown of a node."""

    kept: bool = False
    left: bool = False
    absent: bool = False
    lied: bool = False


def after(seen: Seen | None, outcome: Outcome, now_ms: int) -> Seen:
    before = seen or Seen()
    return Seen(
        before.kept + outcome.kept, before.left + outcome.left, before.absent + outcome.absent,
        before.lied + outcome.lied, max(now_ms, before.last_ms),
    )  # fmt: skip
