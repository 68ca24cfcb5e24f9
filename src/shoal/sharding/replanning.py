"""From one plan to the next, when nodes came, went or are to be drained: as little as possible is loaded anew.

What works stays as it is. A ring that lost a stage is mended in the way that loads the fewest layers: a spare node
takes the gap, or the neighbours do; only where neither is possible, or where it would be much slower than a new ring,
the ring is built anew. Spare nodes become further replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from shoal.sharding.needs import Links, ModelNeeds, Plan, Replica, ServingNode, Stage
from shoal.sharding.planning import OFF_MS, plan
from shoal.sharding.rings import crossings, replica_of, room

WORTH = 1.25
"""A new ring is worth loading its layers when a mended or a present one takes this many times as long per token..."""
WORTH_MS = OFF_MS
"""... and so much longer."""


def replan(
    before: Plan,
    needs: ModelNeeds,
    nodes: Sequence[ServingNode],
    links: Links,
    *,
    price_max: int | None = None,
    reserve: Sequence[Replica] = (),
) -> Plan:
    """The plan to go to from `before`. `nodes` are those that may hold layers from now on: without who is gone or is
    to be drained, and with who came. `reserve`: further rings whose layers are loaded (`standbys`)."""
    by_id = {node.node: node for node in nodes}
    kept: list[Replica] = []
    broken: list[Replica] = []
    for replica in before.replicas:
        same = _as_it_is(needs, replica, by_id, links)
        if same is not None:
            kept.append(same)
        else:
            broken.append(replica)
    for replica in broken:
        used = {stage.node for one in kept for stage in one.stages}
        used |= {stage.node for one in broken if one is not replica for stage in one.stages}
        spare = [node for node in nodes if node.node not in used and node.usable]
        left = None if price_max is None else price_max - sum(one.price for one in kept)
        mended = _mended(needs, replica, spare, by_id, links, left, reserve)
        if mended is not None:
            kept.append(mended)
    used = {stage.node for one in kept for stage in one.stages}
    left = None if price_max is None else price_max - sum(one.price for one in kept)
    others = [node for node in nodes if node.node not in used]
    added = plan(needs, others, links, price_max=left, beside=kept)
    replicas = tuple(sorted((*kept, *added.replicas), key=lambda one: (one.token_ms, one.stages[0].node)))
    after = Plan(replicas, added.left_out, "")
    afresh = plan(needs, nodes, links, price_max=price_max)
    if _is_worth_it(afresh, after):
        return Plan(
            afresh.replicas,
            afresh.left_out,
            f"Placed anew, {loaded(before, afresh)} layers to load: {_speed(afresh)} instead of {_speed(after)}. "
            f"{afresh.reason}",
        )
    moved = loaded(Plan((*before.replicas, *reserve), (), ""), after)
    what = f"{moved} layers to load" if moved else "nothing to load"
    if not replicas:
        return Plan((), after.left_out, afresh.reason)
    on = f"{len(kept)} {'replica goes' if len(kept) == 1 else 'replicas go'} on"
    new = f" and {len(added.replicas)} {'is' if len(added.replicas) == 1 else 'are'} new" if added.replicas else ""
    return Plan(replicas, after.left_out, f"{on}{new}; {what}.")


def _is_worth_it(afresh: Plan, after: Plan) -> bool:
    """Whether to place the whole model anew."""
    if not after.replicas:
        return bool(afresh.replicas)
    saved_ms = 1000 / after.rate - 1000 / max(afresh.rate, 1e-9)
    more = len(afresh.replicas) > len(after.replicas)
    return afresh.rate > WORTH * after.rate and (more or saved_ms > WORTH_MS)


def loaded(before: Plan, after: Plan) -> int:
    """Layers that nodes hold in `after` and did not in `before`."""
    held = {
        (stage.node, at) for one in before.replicas for stage in one.stages for at in range(stage.first, stage.stop)
    }
    return sum(
        1
        for one in after.replicas
        for stage in one.stages
        for at in range(stage.first, stage.stop)
        if (stage.node, at) not in held
    )


def _as_it_is(needs: ModelNeeds, replica: Replica, by_id: dict[bytes, ServingNode], links: Links) -> Replica | None:
    """A replica with its nodes' present figures; none when one is gone or has no longer the room."""
    order = [by_id[stage.node] for stage in replica.stages if stage.node in by_id and by_id[stage.node].usable]
    if len(order) < len(replica.stages):
        return None
    return _ring(needs, order, [stage.layers for stage in replica.stages], links)


def _ring(needs: ModelNeeds, order: Sequence[ServingNode], counts: Sequence[int], links: Links) -> Replica | None:
    last = len(order) - 1
    rooms = (room(needs, node, first=at == 0, last=at == last) for at, node in enumerate(order))
    ways = crossings(order, links)
    if ways == math.inf or any(count > holds for count, holds in zip(counts, rooms, strict=True)):
        return None
    return replica_of(order, counts, ways)


def _mended(
    needs: ModelNeeds,
    broken: Replica,
    spare: Sequence[ServingNode],
    by_id: dict[bytes, ServingNode],
    links: Links,
    price_left: int | None,
    reserve: Sequence[Replica],
) -> Replica | None:
    """A ring in the place of a broken one, over what is left of it and spare nodes."""
    options = []
    for order, counts in _fillings(broken, spare, by_id):
        ring = _ring(needs, order, counts, links)
        if ring is None or ring.token_ms > needs.token_ms_max:
            continue
        if price_left is None or ring.price <= price_left:
            options.append((_anew((broken, *reserve), ring), ring.token_ms, ring))
    fresh = plan(needs, spare, links, price_max=price_left).replicas
    if not options:
        return fresh[0] if fresh else None
    least = min(options, key=lambda option: option[:2])[2]
    if fresh and least.token_ms > max(WORTH * fresh[0].token_ms, fresh[0].token_ms + WORTH_MS):
        return fresh[0]
    return least


def _anew(there: Sequence[Replica], ring: Replica) -> int:
    return loaded(Plan(tuple(there), (), ""), Plan((ring,), (), ""))


def _fillings(
    broken: Replica, spare: Sequence[ServingNode], by_id: dict[bytes, ServingNode]
) -> Iterator[tuple[list[ServingNode], list[int]]]:
    """Rings in which the layers of lost stages are held by one spare node, by the neighbours, or by both."""
    gone = [at for at, stage in enumerate(broken.stages) if stage.node not in by_id or not by_id[stage.node].usable]
    runs = _runs(gone)
    if not runs:  # all are there, but one has no longer the room for what it held
        return
    free = [node for node in spare if node.node not in {stage.node for stage in broken.stages}]
    yield from _fill(broken.stages, runs, free, by_id)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers in order -> the ranges (first, stop) that they form."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _fill(
    stages: Sequence[Stage],
    runs: Sequence[tuple[int, int]],
    free: Sequence[ServingNode],
    by_id: dict[bytes, ServingNode],
) -> Iterator[tuple[list[ServingNode], list[int]]]:
    """Fill the first of the gaps in every way, then the others, each gap with another node."""
    if not runs:
        yield [by_id[stage.node] for stage in stages], [stage.layers for stage in stages]
        return
    (start, stop), rest = runs[-1], runs[:-1]  # from behind, so that the places of the others stay
    before, after = list(stages[:start]), list(stages[stop:])
    first, end = stages[start].first, stages[stop - 1].stop
    for to_before in range(end - first + 1):
        for to_after in range(end - first - to_before + 1):
            middle = end - first - to_before - to_after
            if (to_before and not before) or (to_after and not after) or (middle and to_before and to_after):
                continue
            left = [*before[:-1], _grown(before[-1], to_before, 0)] if before else []
            right = [_grown(after[0], 0, to_after), *after[1:]] if after else []
            for node in free if middle else [None]:
                taken = [] if node is None else [Stage(node.node, first + to_before, end - to_after)]
                others = [one for one in free if one is not node]
                yield from _fill([*left, *taken, *right], rest, others, by_id)


def _grown(stage: Stage, at_end: int, at_start: int) -> Stage:
    return Stage(stage.node, stage.first - at_start, stage.stop + at_end)


def _speed(plan: Plan) -> str:
    return f"{plan.rate:.3g} tokens/s"
