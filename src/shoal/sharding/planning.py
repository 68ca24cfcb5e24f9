"""Who holds which layers: whole replicas where a node can hold the model, rings of few stages where none can.

What is sought is the most tokens per second over all replicas, each counted at the speed of one stream (sessions that
overlap and are batched multiply all replicas alike), within a price. A replica counts for less the likelier it is to
break. Ties go to the cheaper plan, then to the one with fewer stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shoal.quantities import format_bytes
from shoal.sharding.needs import GATEWAY, LeftOut, Links, ModelNeeds, Plan, Replica, ServingNode
from shoal.sharding.rings import EXACT_MAX, all_rings, long_ring, ring_of, room

SLOW_RATIO = 4.0
"""A replica that takes more than so many times the time per token of the fastest is left out: whoever is sent there
would be served badly."""
OFF_MS = 3.0
"""By so much measured distances are off."""
FRONT_MAX = 32
"""Choices between price and speed that are kept at each step."""
NODES_MAX = 256


@dataclass(frozen=True, slots=True)
class _Choice:
    price: int = 0
    rate: float = 0.0
    replicas: tuple[Replica, ...] = ()

    def joined(self, other: _Choice) -> _Choice:
        return _Choice(self.price + other.price, self.rate + other.rate, self.replicas + other.replicas)

    @property
    def stages(self) -> int:
        return sum(len(replica.stages) for replica in self.replicas)

    @property
    def nodes(self) -> set[bytes]:
        return {stage.node for replica in self.replicas for stage in replica.stages}


def plan(
    needs: ModelNeeds,
    nodes: Sequence[ServingNode],
    links: Links,
    *,
    price_max: int | None = None,
    beside: Sequence[Replica] = (),
) -> Plan:
    """The plan for a model. `price_max`: the most that all its nodes together may ask for an hour. `beside`: replicas
    that there are already, on other nodes; they are not in the plan, but it is measured by them."""
    reasons: dict[bytes, str] = {}
    able = []
    for node in sorted(nodes, key=lambda node: node.node)[:NODES_MAX]:
        reason = _unable(needs, node, links)
        if reason:
            reasons[node.node] = reason
        else:
            able.append(node)
    for node in sorted(nodes, key=lambda node: node.node)[NODES_MAX:]:
        reasons[node.node] = f"{node.name}: {NODES_MAX} nodes are looked at already."

    chosen = _choices(needs, able, links, price_max)[-1]

    fastest = min((replica.token_ms for replica in (*chosen.replicas, *beside)), default=math.inf)
    kept = tuple(
        sorted(
            (one for one in chosen.replicas if one.token_ms <= SLOW_RATIO * fastest),
            key=lambda one: (one.token_ms, one.stages[0].node),
        )
    )
    slow = {stage.node: one for one in chosen.replicas if one not in kept for stage in one.stages}
    used = {stage.node for one in kept for stage in one.stages}
    for node in able:
        if node.node in used:
            continue
        if node.node in slow:
            reasons[node.node] = (
                f"{node.name}: a token would take {slow[node.node].token_ms:.0f} ms there; elsewhere it takes "
                f"{fastest:.0f} ms."
            )
        else:
            reasons[node.node] = _unused(needs, node, kept, able, links, price_max)
    left_out = tuple(LeftOut(node, reasons[node]) for node in sorted(reasons))
    slow_said = "" if kept else _say_slow(needs, able, links, price_max)
    return Plan(kept, left_out, slow_said or _reason(needs, kept, nodes, able, reasons, price_max))


def cheapest(needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links) -> Plan:
    """The plan that costs least of those with a replica that is fast enough: as fast as the model needs it, or where it
    says nothing of that, not slow beside the fastest there could be."""
    front = _choices(needs, [node for node in nodes if not _unable(needs, node, links)][:NODES_MAX], links, None)
    serving = [one for one in front if one.replicas]
    if not serving:
        return plan(needs, nodes, links)  # which says why

    def token_ms(one: _Choice) -> float:
        return min(replica.token_ms for replica in one.replicas)

    fastest = min(map(token_ms, serving))
    most = slowest(fastest, needs.token_ms_max)
    best = next(one for one in serving if token_ms(one) <= most)
    return plan(needs, [node for node in nodes if node.node in best.nodes], links, price_max=best.price)


def slowest(fastest_ms: float, asked_ms: float) -> float:
    """What a token may take at a replica that is taken for money: as asked, or else not much more than at the
    fastest."""
    return asked_ms if asked_ms < math.inf else max(SLOW_RATIO * fastest_ms, fastest_ms + OFF_MS)


def _of(ring: Replica) -> _Choice:
    return _Choice(ring.price, ring.rate, (ring,))


def _choices(needs: ModelNeeds, able: Sequence[ServingNode], links: Links, price_max: int | None) -> list[_Choice]:
    """What there is to choose of, the cheapest first, the fastest last."""
    front = [_Choice()]
    wholes = {node.node: ring for node in able if (ring := ring_of(needs, [node], links)) is not None}
    for ring in wholes.values():
        if ring.token_ms > needs.token_ms_max:
            continue
        front = _front([*front, *(one.joined(_of(ring)) for one in front)], price_max)
    for found in _split(needs, [node for node in able if node.node not in wholes], links, price_max):
        front = _front((one.joined(other) for one in front for other in found), price_max)
    return front


def _front(choices: Iterable[_Choice], price_max: int | None) -> list[_Choice]:
    """What is not both dearer and slower than another, the cheapest first."""
    affordable = [one for one in choices if price_max is None or one.price <= price_max]
    front: list[_Choice] = []
    for one in sorted(affordable, key=lambda one: (one.price, -one.rate, one.stages)):
        if not front or one.rate > front[-1].rate * (1 + 1e-12):
            front.append(one)
    if len(front) > FRONT_MAX:
        rest, few = front[2:], FRONT_MAX - 2  # nothing at all, and the cheapest that is something, stay
        step = (len(rest) - 1) / (few - 1)
        front = front[:2] + [rest[round(at * step)] for at in range(few)]
    return front


def _split(
    needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links, price_max: int | None
) -> Iterable[list[_Choice]]:
    """Choices of rings over nodes of which none can hold the model alone. All partitions are looked at among
    EXACT_MAX nodes; of more, those near one another are taken together."""
    left = list(nodes)
    while left:
        near = _near(needs, left, links)
        if near:
            front = _partitions(needs, near, links, price_max)
        if not near or front[-1].rate == 0:
            ring = long_ring(needs, left, links)
            if ring is None or ring.token_ms > needs.token_ms_max or (price_max is not None and ring.price > price_max):
                return
            front = _front([_Choice(), _of(ring)], price_max)
        yield front
        used = {stage.node for one in front for replica in one.replicas for stage in replica.stages}
        if len(left) <= EXACT_MAX:
            return
        left = [node for node in left if node.node not in used]


def _near(needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links) -> list[ServingNode]:
    """Nodes to form rings of: all of a few, else the one nearest to the gateway and those nearest to it. Empty when so
    many cannot hold the model."""
    if len(nodes) > EXACT_MAX:
        seed = min(nodes, key=lambda node: (links.ms(GATEWAY, node.node), node.node))
        nodes = sorted(
            nodes, key=lambda node: (links.ms(seed.node, node.node) if node is not seed else -1.0, node.layer_ms)
        )[:EXACT_MAX]
    holds = sum(room(needs, node, first=False, last=False) for node in nodes)
    return list(nodes) if holds >= needs.layers else []


def _partitions(needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links, price_max: int | None) -> list[_Choice]:
    """The choices over all ways to part some of the nodes into rings."""
    rings = {mask: ring for mask, ring in all_rings(needs, nodes, links).items() if ring.token_ms <= needs.token_ms_max}
    fronts: list[list[_Choice]] = [[_Choice()]]
    for mask in range(1, 1 << len(nodes)):
        lowest = mask & -mask
        options = list(fronts[mask ^ lowest])
        part = mask
        while part:
            if part & lowest and part in rings:
                options += [one.joined(_of(rings[part])) for one in fronts[mask ^ part]]
            part = (part - 1) & mask
        fronts.append(_front(options, price_max))
    return fronts[-1]


# --- why ------------------------------------------------------------------------------------------------------------


def _unable(needs: ModelNeeds, node: ServingNode, links: Links) -> str:
    if not node.usable:
        return (
            f"{node.name}: its figures are no measurement ({node.free_bytes} bytes free, {node.layer_ms} ms a layer, "
            f"survival {node.survival})."
        )
    if room(needs, node, first=False, last=False) < 1:
        return (
            f"{node.name}: {format_bytes(node.free_bytes)} are free, and one layer with its cache takes "
            f"{format_bytes(needs.layer_bytes + needs.cache_bytes)}."
        )
    if links.ms(GATEWAY, node.node) == math.inf and not any(
        links.ms(node.node, other) < math.inf for pair in links.one_way_ms if node.node in pair for other in pair
        if other != node.node
    ):  # fmt: skip
        return f"{node.name}: no link to it was measured."
    return ""


def _unused(
    needs: ModelNeeds,
    node: ServingNode,
    kept: Sequence[Replica],
    able: Sequence[ServingNode],
    links: Links,
    price_max: int | None,
) -> str:
    """Why a node that can hold layers holds none."""
    alone = ring_of(needs, [node], links)
    if alone is not None and alone.token_ms > needs.token_ms_max:
        return (
            f"{node.name}: a token would take {alone.token_ms:.0f} ms there, and {needs.token_ms_max:.4g} ms are "
            "asked for."
        )
    if alone is not None:
        return f"{node.name}: with its {node.price} an hour the plan would cost more than {price_max}."
    by_id = {one.node: one for one in able}
    rings = [one for one in kept if len(one.stages) > 1]
    slower = []
    for ring in rings:
        order = [by_id[stage.node] for stage in ring.stages]
        tried = [ring_of(needs, [*order[:at], node, *order[at:]], links) for at in range(len(order) + 1)]
        slower += [(with_it.token_ms - ring.token_ms, ring.token_ms) for with_it in tried if with_it is not None]
    if slower:
        more, before = min(slower)
        if more > 0:
            return f"{node.name}: a ring of {before:.0f} ms per token would take {more:.1f} ms longer with it."
        return f"{node.name}: the plan is faster without it, or would cost more than {price_max} with it."
    holds = room(needs, node, first=False, last=False)
    return f"{node.name}: it can hold {holds} of {needs.layers} layers, and nodes to hold the others are missing."


def _say_slow(needs: ModelNeeds, able: Sequence[ServingNode], links: Links, price_max: int | None) -> str:
    """Where there would be a replica if a token might take longer: what it takes there."""
    if needs.token_ms_max == math.inf:
        return ""
    slow = _choices(replace(needs, token_ms_max=math.inf), able, links, price_max)
    takes_ms = min((replica.token_ms for one in slow for replica in one.replicas), default=math.inf)
    if takes_ms == math.inf:
        return ""
    return (
        f"No replica in which a token takes {needs.token_ms_max:.4g} ms at most, as is asked for: the fastest would "
        f"take {takes_ms:.4g} ms."
    )


def _reason(
    needs: ModelNeeds,
    kept: Sequence[Replica],
    nodes: Sequence[ServingNode],
    able: Sequence[ServingNode],
    reasons: dict[bytes, str],
    price_max: int | None,
) -> str:
    if not kept:
        limit = f" within {price_max} an hour" if price_max is not None else ""
        size = needs.layers * (needs.layer_bytes + needs.cache_bytes) + needs.first_bytes + needs.last_bytes
        takes = f"the model has {needs.layers} layers and takes {format_bytes(size)} with its cache"
        if not nodes:
            return f"No replica{limit}: no node is free to hold layers; {takes}."
        if not able:
            roomiest = max(nodes, key=lambda node: node.free_bytes)
            return f"No replica{limit}: none of {len(nodes)} nodes can hold a layer; {takes}. {reasons[roomiest.node]}"
        holds = sum(room(needs, node, first=False, last=False) for node in able)
        have = "1 node has" if len(able) == 1 else f"{len(able)} nodes have"
        free = format_bytes(sum(node.free_bytes for node in able))
        return f"No replica{limit}: {have} room for {holds} layers in {free}; {takes}."
    whole = sum(1 for one in kept if len(one.stages) == 1)
    rings = [len(one.stages) for one in kept if len(one.stages) > 1]
    parts = [f"{whole} whole {'replica' if whole == 1 else 'replicas'}"] if whole else []
    ring = "a ring" if whole else "A ring"
    parts += [f"{ring if len(rings) == 1 else f'{len(rings)} rings'} of {_range(rings)} stages"] if rings else []
    times = [one.token_ms for one in kept]
    return f"{' and '.join(parts)}, {_range([round(one) for one in times])} ms per token."


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
