"""Which samples are accepted, which are being worked on, and which come next.

Positions of all passes lie on one line: position `p` of pass `k` over `N` samples is the number `k * N + p`. The ledger
keeps two sets of intervals on it, `accepted` and `open`. What is handed out next is always the lowest positions in
neither set, so that samples that came back go out again before fresh ones, and a pass that has been left behind is
finished first. As nothing else is kept, the ledger after a restart is the union of what the Commits accepted.

Invariants: the two sets are disjoint; each is sorted, and its intervals neither touch nor overlap. So a position is in
at most one accepted share of its pass, and a pass is complete exactly when its N positions are in `accepted`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from shoal.errors import BadRecord
from shoal.protocol.training import RANGES_MAX, SampleRange

Interval = tuple[int, int]
"""[start, stop) on the line of all passes."""
Intervals = tuple[Interval, ...]


class BadSamples(BadRecord):
    """Samples are accepted, returned or claimed that are not in the state this needs."""

    code: ClassVar[str] = "SH-220"


@dataclass(frozen=True, slots=True)
class SampleLedger:
    """The account of all samples of a job. Immutable: every change gives a new ledger."""

    samples: int
    """N, the size of one pass."""
    accepted: Intervals = ()
    open: Intervals = ()

    def allocate(self, count: int, pieces_max: int = RANGES_MAX) -> tuple[tuple[SampleRange, ...], SampleLedger]:
        """The `count` lowest free positions, fewer when they would lie in more than `pieces_max` ranges."""
        taken = _union(self.accepted, self.open)
        free: list[Interval] = []
        pieces = 0
        for start, stop in _gaps(taken):
            while count > 0 and pieces < pieces_max and (stop is None or start < stop):
                pass_end = (start // self.samples + 1) * self.samples
                end = min(start + count, pass_end, pass_end if stop is None else stop)
                free.append((start, end))
                count -= end - start
                start = end
                pieces += 1
        return self._ranges(free), replace(self, open=_union(self.open, tuple(free)))

    def claim(self, ranges: Iterable[SampleRange]) -> SampleLedger:
        """Mark exactly these as being worked on. Raises BadSamples when one is accepted, taken or out of bounds."""
        wanted = self._line(ranges)
        if _intersects(wanted, self.accepted) or _intersects(wanted, self.open):
            raise BadSamples("Samples were assigned that had already been accepted or assigned in the same pass.")
        return replace(self, open=_union(self.open, wanted))

    def accept(self, ranges: Iterable[SampleRange]) -> SampleLedger:
        """These were trained on and counted. Raises BadSamples when one of them is not being worked on."""
        done = self._line(ranges)
        return replace(self, open=self._without_open(done), accepted=_union(self.accepted, done))

    def give_back(self, ranges: Iterable[SampleRange]) -> SampleLedger:
        """These go to others. Raises BadSamples when one of them is not being worked on."""
        return replace(self, open=self._without_open(self._line(ranges)))

    def give_back_all(self) -> SampleLedger:
        """Whatever is being worked on goes to others."""
        return replace(self, open=())

    @property
    def samples_accepted(self) -> int:
        return sum(stop - start for start, stop in self.accepted)

    @property
    def samples_open(self) -> int:
        return sum(stop - start for start, stop in self.open)

    @property
    def passes_complete(self) -> int:
        """How many passes, from the first on, have no sample missing."""
        if not self.accepted or self.accepted[0][0] > 0:
            return 0
        return self.accepted[0][1] // self.samples

    def missing(self, pass_number: int) -> tuple[SampleRange, ...]:
        """The positions of a pass that are not accepted."""
        first, end = pass_number * self.samples, (pass_number + 1) * self.samples
        return self._ranges(_minus(((first, end),), self.accepted))

    def _without_open(self, ranges: Intervals) -> Intervals:
        rest = _minus(self.open, ranges)
        if sum(b - a for a, b in self.open) - sum(b - a for a, b in rest) != sum(b - a for a, b in ranges):
            raise BadSamples("Samples were accepted or returned that nobody was working on.")
        return rest

    def _line(self, ranges: Iterable[SampleRange]) -> Intervals:
        pieces: list[Interval] = []
        for piece in ranges:
            if not 0 <= piece.start < piece.stop <= self.samples:
                raise BadSamples(f"The range [{piece.start}, {piece.stop}) is not within a pass of {self.samples}.")
            base = piece.pass_number * self.samples
            pieces.append((base + piece.start, base + piece.stop))
        pieces.sort()
        if any(left[1] > right[0] for left, right in pairwise(pieces)):
            raise BadSamples("A share names a sample twice.")
        return _union((), tuple(pieces))

    def _ranges(self, line: Sequence[Interval]) -> tuple[SampleRange, ...]:
        ranges: list[SampleRange] = []
        for start, stop in line:
            while start < stop:
                pass_number = start // self.samples
                end = min(stop, (pass_number + 1) * self.samples)
                base = pass_number * self.samples
                ranges.append(SampleRange(pass_number, start - base, end - base))
                start = end
        return tuple(ranges)


def divide(ranges: Sequence[SampleRange], counts: Sequence[int]) -> list[tuple[SampleRange, ...]]:
    """Cut `ranges` into consecutive shares of these sizes; the last get less when too few are there."""
    shares: list[tuple[SampleRange, ...]] = []
    queue = list(reversed(ranges))
    for count in counts:
        share: list[SampleRange] = []
        while count > 0 and queue:
            piece = queue.pop()
            if piece.samples > count:
                middle = piece.start + count
                queue.append(SampleRange(piece.pass_number, middle, piece.stop))
                piece = SampleRange(piece.pass_number, piece.start, middle)
            share.append(piece)
            count -= piece.samples
        shares.append(tuple(share))
    return shares


def _union(left: Intervals, right: Intervals) -> Intervals:
    merged: list[Interval] = []
    for start, stop in sorted((*left, *right)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _minus(left: Intervals, right: Intervals) -> Intervals:
    rest: list[Interval] = []
    index = 0
    for start, stop in left:
        while index < len(right) and right[index][1] <= start:
            index += 1
        look = index
        while look < len(right) and right[look][0] < stop:
            if right[look][0] > start:
                rest.append((start, right[look][0]))
            start = max(start, right[look][1])
            look += 1
        if start < stop:
            rest.append((start, stop))
    return tuple(rest)


def _intersects(left: Intervals, right: Intervals) -> bool:
    return _minus(left, right) != left


def _gaps(taken: Intervals) -> list[tuple[int, int | None]]:
    gaps: list[tuple[int, int | None]] = []
    position = 0
    for start, stop in taken:
        if start > position:
            gaps.append((position, start))
        position = stop
    gaps.append((position, None))
    return gaps
