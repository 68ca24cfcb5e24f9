"""Rings to have ready for when a node of the only replica is lost: the same stages, but one is held by a spare node.

A spare node that is too small for a replica of its own can hold a stage, or several, beside the node that works with
it. When that one is gone, nothing needs to be loaded. A node that holds several needs the memory for sessions of one of
them only: who works in one place is not in reserve in another. Where there are several replicas, streams go on at
another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.sharding.needs import Links, ModelNeeds, Plan, Replica, ServingNode, Stage
from shoal.sharding.rings import crossings, replica_of


@dataclass(frozen=True)
class _Room:
    """What a spare node has, and holds of it."""

    free_bytes: int
    weights: int = 0
    cache: int = 0

    def taken(self, needs: ModelNeeds, stage: Stage) -> _Room:
        cache = stage.layers * needs.cache_bytes
        return _Room(self.free_bytes, self.weights + needs.bytes_of(stage) - cache, max(self.cache, cache))

    def fits(self, needs: ModelNeeds, stage: Stage) -> bool:
        after = self.taken(needs, stage)
        return after.weights + after.cache <= self.free_bytes


def standbys(plan: Plan, needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links) -> tuple[Replica, ...]:
    """For each stage of the only replica, the one least likely to survive first, the fastest ring without its node that
    a spare node has room for."""
    if len(plan.replicas) != 1:
        return ()
    (replica,) = plan.replicas
    by_id = {node.node: node for node in nodes}
    used = {stage.node for stage in replica.stages}
    free = {node.node: _Room(node.free_bytes) for node in nodes if node.node not in used and node.usable}
    if any(node not in by_id for node in used):
        return ()
    order = [by_id[stage.node] for stage in replica.stages]
    counts = [stage.layers for stage in replica.stages]
    found = []
    for at in sorted(range(len(order)), key=lambda at: (order[at].survival, at)):
        stage = replica.stages[at]
        rings: list[tuple[float, bytes, Replica]] = []
        for spare, room in free.items():
            if room.fits(needs, stage):
                nodes_with = [*order[:at], by_id[spare], *order[at + 1 :]]
                ways = crossings(nodes_with, links)
                if ways < math.inf:
                    ring = replica_of(nodes_with, counts, ways)
                    rings.append((ring.token_ms, spare, ring))
        if rings:
            _, spare, ring = min(rings, key=lambda one: one[:2])
            free[spare] = free[spare].taken(needs, stage)
            found.append(ring)
    return tuple(found)
