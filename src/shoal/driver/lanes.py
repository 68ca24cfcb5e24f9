"""When each node computed, sent and waited: pieced together from the moments at which its Contributions arrived."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.driver.lines import Lane, LaneSegment

SHORTEST_S = 0.001


class NodeLane:
    """The timeline of one node, as its driver sees it. Segments come out in order and never overlap."""

    def __init__(self, node: bytes, joined_s: float) -> None:
        self._node = node.hex()
        self._until_s = joined_s
        self._travel_s = 0.0
        """How long the last Contribution was under way, as far as known."""

    def ready(self, now_s: float) -> Iterator[LaneSegment]:
        """It has fetched what it needs and can compute."""
        yield from self._segment(Lane.SYNCING, now_s)

    def delivered(self, now_s: float, compute_s: float, waited_s: float, travel_s: float) -> Iterator[LaneSegment]:
        """A Contribution arrived: it computed for `compute_s` after having had nothing to do for `waited_s`."""
        stopped = now_s - travel_s
        started = stopped - compute_s
        waiting_from = max(self._until_s, started - waited_s)
        if self._travel_s and waited_s > SHORTEST_S:
            yield from self._segment(Lane.SENDING, min(started, waiting_from + self._travel_s))
        yield from self._segment(Lane.WAITING, started)
        yield from self._segment(Lane.COMPUTING, stopped)
        self._travel_s = travel_s

    def ended(self, now_s: float) -> Iterator[LaneSegment]:
        """It is gone or excluded from now on; what it did since its last Contribution is not known."""
        yield from self._segment(Lane.WAITING, now_s)

    def closed(self, now_s: float, state: Lane) -> Iterator[LaneSegment]:
        """The job is over."""
        yield from self._segment(state, now_s)

    def _segment(self, state: Lane, stop_s: float) -> Iterator[LaneSegment]:
        if stop_s - self._until_s >= SHORTEST_S:
            yield LaneSegment(node=self._node, state=state, start_s=round(self._until_s, 4), stop_s=round(stop_s, 4))
            self._until_s = stop_s
