"""Ranges of bytes: which parts of a file are meant, in few words."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
"""[start, stop)."""
Ranges: TypeAlias = tuple[Range, ...]
"""In order, apart from one another, none of them empty."""


def joined(ranges: Iterable[Range], gap: int = 1, most: int | None = None) -> Ranges:
    """The same bytes in order, with what lies in gaps below `gap`; where more than `most` ranges remain, with what lies
    in the smallest gaps too."""
    found: list[Range] = []
    for start, stop in sorted(one for one in ranges if one[0] < one[1]):
        if found and start - found[-1][1] < gap:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    if most is not None and len(found) > most:
        gaps = sorted(range(1, len(found)), key=lambda at: found[at - 1][1] - found[at][0])
        firsts = [0, *sorted(gaps[: most - 1]), len(found)]
        found = [(found[at][0], found[next_at - 1][1]) for at, next_at in itertools.pairwise(firsts)]
    return tuple(found)


def covered(start: int, stop: int, ranges: Sequence[Range]) -> bool:
    """Whether one of them has all the bytes [start, stop)."""
    return any(first <= start and stop <= last for first, last in ranges)


def are_in_order(ranges: Sequence[Range], size: int) -> bool:
    """Whether they are what `Ranges` says, within `size` bytes."""
    ends = [end for one in ranges for end in one]
    apart = all(before < after for before, after in itertools.pairwise(ends))
    return apart and (not ends or (ends[0] >= 0 and ends[-1] <= size))
