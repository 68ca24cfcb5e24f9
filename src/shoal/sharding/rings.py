"""The fastest ring: which nodes in which order hold how many layers each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from shoal.sharding.needs import GATEWAY, Links, ModelNeeds, Replica, ServingNode, Stage

EXACT_MAX = 8
"""Rings over so many nodes are found by looking at all of them (Held and Karp, 1962, for the order)."""
MEND_S = 60.0
"""For so long a replica is thought to be broken when a node of it is gone: another one loads its layers."""
MOVES_MAX = 64
"""Improvements of a ring that is too long to look at all of them."""
STARTS_MAX = 8
OUTSIDERS_MAX = 16
"""Nodes outside such a ring that are tried in the place of one in it."""


def room(needs: ModelNeeds, node: ServingNode, *, first: bool, last: bool) -> int:
    """How many layers fit on a node that also holds what goes with the first or the last."""
    free = node.free_bytes - (needs.first_bytes if first else 0) - (needs.last_bytes if last else 0)
    return max(0, min(needs.layers, free // max(1, needs.layer_bytes + needs.cache_bytes)))


def ring_of(needs: ModelNeeds, order: Sequence[ServingNode], links: Links) -> Replica | None:
    """The fastest ring through all of `order`, in this order; none where the model does not fit.

    Each node holds a layer at least; of the others as many as fit go to the fastest, then to the next fastest. For
    costs that grow with the number of layers nothing is faster.
    """
    last = len(order) - 1
    rooms = [room(needs, node, first=at == 0, last=at == last) for at, node in enumerate(order)]
    ways = crossings(order, links)
    if not order or min(rooms) < 1 or sum(rooms) < needs.layers or len(order) > needs.layers or ways == math.inf:
        return None
    counts = [1] * len(order)
    left = needs.layers - len(order)
    for at in sorted(range(len(order)), key=lambda at: (order[at].layer_ms, at)):
        more = min(left, rooms[at] - 1)
        counts[at] += more
        left -= more
    return replica_of(order, counts, ways)


def replica_of(order: Sequence[ServingNode], counts: Sequence[int], crossings_ms: float) -> Replica:
    """What a ring with these layers per node gives."""
    stages, at = [], 0
    for node, count in zip(order, counts, strict=True):
        stages.append(Stage(node.node, at, at + count))
        at += count
    computing = math.fsum(node.layer_ms * count for node, count in zip(order, counts, strict=True))
    token_ms = computing + order[-1].last_ms + crossings_ms
    losses_per_s = -math.fsum(math.log(node.survival) for node in order) / 3600
    whole = 1 / (1 + losses_per_s * MEND_S)
    return Replica(tuple(stages), token_ms, whole * 1000 / token_ms, sum(node.price for node in order))


def crossings(order: Sequence[ServingNode], links: Links) -> float:
    """Milliseconds that a token is under way from the gateway through these nodes and back."""
    ends = [GATEWAY, *(node.node for node in order), GATEWAY]
    return sum(links.ms(source, target) for source, target in itertools.pairwise(ends))


def all_rings(needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links) -> dict[int, Replica]:
    """For each set of the nodes (bit i: `nodes[i]`) that can hold the model, its fastest ring."""
    assert len(nodes) <= EXACT_MAX, "this many nodes have too many orders"
    found: dict[int, Replica] = {}
    for mask, order in _shortest_orders(nodes, links):
        ring = ring_of(needs, order, links)
        if ring is not None and (mask not in found or ring.token_ms < found[mask].token_ms):
            found[mask] = ring
    return found


def _shortest_orders(nodes: Sequence[ServingNode], links: Links) -> Iterator[tuple[int, list[ServingNode]]]:
    """For each set of the nodes, and each first and last node in it, the order with the shortest way."""
    for first in range(len(nodes)):
        ways: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {
            (1 << first, first): (links.ms(GATEWAY, nodes[first].node), (first,))
        }
        for mask in range(1 << len(nodes)):
            for last in range(len(nodes)):
                if (mask, last) not in ways:
                    continue
                length, order = ways[mask, last]
                yield mask, [nodes[at] for at in order]
                for after in range(len(nodes)):
                    key = (mask | 1 << after, after)
                    longer = length + links.ms(nodes[last].node, nodes[after].node)
                    if not mask & 1 << after and longer < ways.get(key, (math.inf, ()))[0]:
                        ways[key] = (longer, (*order, after))


def long_ring(needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links) -> Replica | None:
    """A fast ring over some of many nodes: built from each of several first nodes by inserting whoever costs least per
    layer it can hold, then improved one move at a time while a move helps."""
    starts = sorted(nodes, key=lambda node: (links.ms(GATEWAY, node.node) + node.layer_ms, node.node))[:STARTS_MAX]
    rings = [_improved(needs, _inserted(needs, start, nodes, links), nodes, links) for start in starts]
    return min((ring for ring in rings if ring is not None), key=lambda ring: ring.token_ms, default=None)


def _improved(
    needs: ModelNeeds, order: list[ServingNode], nodes: Sequence[ServingNode], links: Links
) -> Replica | None:
    """Leave one out, put another in its place or beside it, or turn a part around, while that helps."""
    best = ring_of(needs, order, links)
    if best is None:
        return None
    for _ in range(MOVES_MAX):
        better, after = best, order
        for tried in _moves(order, nodes):
            ring = ring_of(needs, tried, links)
            if ring is not None and ring.token_ms < better.token_ms:
                better, after = ring, tried
        if better is best:
            break
        best, order = better, after
    return best


def _inserted(needs: ModelNeeds, start: ServingNode, nodes: Sequence[ServingNode], links: Links) -> list[ServingNode]:
    order = [start]
    left = sorted((node for node in nodes if node is not start), key=lambda node: node.node)
    while left and ring_of(needs, order, links) is None and len(order) < needs.layers:
        options = []
        for node in left:
            holds = room(needs, node, first=False, last=False)
            if holds:
                ways = [crossings([*order[:at], node, *order[at:]], links) for at in range(len(order) + 1)]
                at = ways.index(min(ways))
                options.append((ways[at] / holds + node.layer_ms, node.node, at, node))
        if not options or min(options)[0] == math.inf:
            break
        _, _, at, node = min(options, key=lambda option: option[:2])
        order.insert(at, node)
        left.remove(node)
    return order


def _moves(order: list[ServingNode], nodes: Sequence[ServingNode]) -> Iterator[list[ServingNode]]:
    inside = {node.node for node in order}
    outsiders = sorted((node for node in nodes if node.node not in inside), key=lambda node: (node.layer_ms, node.node))
    for at in range(len(order)):
        yield [*order[:at], *order[at + 1 :]]
        for other in outsiders[:OUTSIDERS_MAX]:
            yield [*order[:at], other, *order[at + 1 :]]
    for start in range(len(order)):
        for stop in range(start + 2, len(order) + 1):
            yield [*order[:start], *reversed(order[start:stop]), *order[stop:]]
    for other in outsiders[:OUTSIDERS_MAX]:
        for at in range(len(order) + 1):
            yield [*order[:at], other, *order[at:]]
