"""The planner against looking at everything, and what must hold of every plan and every change of plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.sharding import (
    GATEWAY,
    Links,
    ModelNeeds,
    Plan,
    Replica,
    ServingNode,
    Stage,
    cheapest,
    loaded,
    plan,
    replan,
    standbys,
)
from shoal.sharding.planning import SLOW_RATIO
from shoal.sharding.rings import EXACT_MAX, all_rings, long_ring, replica_of, ring_of

LAYER = 100
NEEDS = ModelNeeds(layers=6, layer_bytes=80, cache_bytes=20, first_bytes=50, last_bytes=70)


def node(number: int, free: int, layer_ms: float = 1.0, **more: float | int) -> ServingNode:
    return ServingNode(bytes([number]), f"n{number}", free, layer_ms, **more)  # type: ignore[arg-type]


def mesh(nodes: Sequence[ServingNode], ms: float = 10.0) -> Links:
    ends = [GATEWAY, *(one.node for one in nodes)]
    return Links(dict.fromkeys(itertools.combinations(ends, 2), ms))


@st.composite
def scenes(draw: st.DrawFn, most: int = 4, price: bool = False) -> tuple[ModelNeeds, list[ServingNode], Links]:
    needs = ModelNeeds(
        layers=draw(st.integers(1, 6)), layer_bytes=80, cache_bytes=20,
        first_bytes=draw(st.sampled_from([0, 50, 150])), last_bytes=draw(st.sampled_from([0, 70, 250])),
    )  # fmt: skip
    nodes = [
        node(
            number, draw(st.integers(0, 900)), draw(st.floats(0.1, 20)), last_ms=draw(st.floats(0, 5)),
            price=draw(st.integers(0, 5)) if price else 0, survival=draw(st.sampled_from([1.0, 0.9, 0.2])),
        )
        for number in range(1, draw(st.integers(1, most)) + 1)
    ]  # fmt: skip
    ends = [GATEWAY, *(one.node for one in nodes)]
    links = {pair: draw(st.floats(0.05, 80)) for pair in itertools.combinations(ends, 2)}
    return needs, nodes, Links(links)


def every_ring(needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links) -> Iterator[Replica]:
    """All orders and all divisions of the layers, that fit."""
    for order in itertools.permutations(nodes):
        for cuts in itertools.combinations(range(1, needs.layers), len(order) - 1):
            counts = [stop - first for first, stop in itertools.pairwise((0, *cuts, needs.layers))]
            ways = [GATEWAY, *(one.node for one in order), GATEWAY]
            crossing = sum(links.ms(a, b) for a, b in itertools.pairwise(ways))
            ring = replica_of(order, counts, crossing)
            free = {one.node: one.free_bytes for one in order}
            if all(needs.bytes_of(stage) <= free[stage.node] for stage in ring.stages):
                yield ring


def parts(items: Sequence[ServingNode]) -> Iterator[list[list[ServingNode]]]:
    """All ways to part some of the items into groups."""
    if not items:
        yield []
        return
    for rest in parts(items[1:]):
        yield rest
        yield [[items[0]], *rest]
        for at in range(len(rest)):
            yield [*rest[:at], [items[0], *rest[at]], *rest[at + 1 :]]


def fastest_rings(needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links) -> dict[frozenset[bytes], Replica]:
    """Of each group of nodes that can hold the model."""
    found = {}
    for group in itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(1, len(nodes) + 1)):
        rings = list(every_ring(needs, group, links)) if len(group) <= needs.layers else []
        if rings:
            found[frozenset(one.node for one in group)] = max(rings, key=lambda ring: ring.rate)
    return found


def best_by_looking(needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links, price_max: int | None) -> float:
    """Tokens per second of the best plan in which who can hold the model alone shares it with nobody."""
    fastest = fastest_rings(needs, nodes, links)
    whole = {next(iter(key)) for key in fastest if len(key) == 1}
    best = 0.0
    for groups in parts(nodes):
        keys = [frozenset(one.node for one in group) for group in groups]
        if any(key not in fastest or (len(key) > 1 and key & whole) for key in keys):
            continue
        if price_max is None or sum(fastest[key].price for key in keys) <= price_max:
            best = max(best, sum(fastest[key].rate for key in keys))
    return best


@given(scenes())
@settings(max_examples=150, deadline=None)
def test_a_plan_is_as_fast_as_the_best_of_all(scene: tuple[ModelNeeds, list[ServingNode], Links]) -> None:
    needs, nodes, links = scene
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.sharding.planning.SLOW_RATIO", math.inf)
        made = plan(needs, nodes, links)
    best = best_by_looking(needs, [one for one in nodes if one.usable], links, None)
    assert made.rate >= 0.98 * best
    assert made.rate <= best * (1 + 1e-9)


@given(scenes(price=True), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_and_so_it_is_within_a_price(scene: tuple[ModelNeeds, list[ServingNode], Links], most: int) -> None:
    needs, nodes, links = scene
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.sharding.planning.SLOW_RATIO", math.inf)
        made = plan(needs, nodes, links, price_max=most)
    assert made.price <= most
    assert made.rate >= 0.98 * best_by_looking(needs, [one for one in nodes if one.usable], links, most)


@given(scenes(price=True))
@settings(max_examples=100, deadline=None)
def test_the_cheapest_plan_costs_no_more_than_any_ring_that_is_not_slow(
    scene: tuple[ModelNeeds, list[ServingNode], Links],
) -> None:
    needs, nodes, links = scene
    made = cheapest(needs, nodes, links)
    rings = fastest_rings(needs, [one for one in nodes if one.usable], links)
    whole = {next(iter(key)) for key in rings if len(key) == 1}
    able = [ring for key, ring in rings.items() if len(key) == 1 or not key & whole]
    assert bool(made.replicas) == bool(able)
    if able:
        fastest = min(one.token_ms for one in able)
        assert made.price <= min(one.price for one in able if one.token_ms <= SLOW_RATIO * fastest)
        assert made.price >= min(one.price for one in able)
        used = {stage.node for replica in made.replicas for stage in replica.stages}
        looked_at = used | {one.node for one in made.left_out}
        check(made, needs, [one for one in nodes if one.node in looked_at], links)


def test_of_many_that_could_the_cheapest_is_taken_and_none_besides() -> None:
    needs = ModelNeeds(4, 80, 20)
    nodes = [node(number, 1000, 2.0, price=200 - number) for number in range(1, 100)]
    made = cheapest(needs, nodes, mesh(nodes))
    assert made.price == 101 and [one.stages[0].node for one in made.replicas] == [bytes([99])]
    slow = node(100, 1000, 200.0, price=1)
    assert cheapest(needs, [*nodes, slow], mesh([*nodes, slow])).price == 101, "it would serve badly"
    free = node(101, 1000, 2.0)
    made = cheapest(needs, [*nodes, free], mesh([*nodes, free]))
    assert made.price == 0 and [one.stages[0].node for one in made.replicas] == [bytes([101])]


@given(scenes(price=True), st.sampled_from([3.0, 10.0, 40.0, 150.0]))
@settings(max_examples=100, deadline=None)
def test_no_token_takes_longer_than_is_asked_for_and_the_cheapest_that_keeps_it_is_taken(
    scene: tuple[ModelNeeds, list[ServingNode], Links], most_ms: float
) -> None:
    needs, nodes, links = scene
    asked = replace(needs, token_ms_max=most_ms)
    made, all_made = cheapest(asked, nodes, links), plan(asked, nodes, links)
    assert all(one.token_ms <= most_ms for one in (*made.replicas, *all_made.replicas))
    rings = fastest_rings(needs, [one for one in nodes if one.usable], links)
    whole = {next(iter(key)) for key in rings if len(key) == 1}
    able = [ring for key, ring in rings.items() if len(key) == 1 or not key & whole]
    quick = [ring for ring in able if ring.token_ms <= most_ms]
    assert bool(made.replicas) == bool(all_made.replicas) == bool(quick)
    if quick:
        assert made.price <= min(one.price for one in quick)
        assert all_made.rate >= 0.98 * max(one.rate for one in quick)
    elif able:
        takes_ms = min(one.token_ms for one in able)
        assert all_made.reason == (
            f"No replica in which a token takes {most_ms:.4g} ms at most, as is asked for: the fastest would take "
            f"{takes_ms:.4g} ms."
        )
    again = replan(plan(needs, nodes, links), asked, nodes[1:], links)
    assert all(one.token_ms <= most_ms or one.stages in [was.stages for was in plan(needs, nodes, links).replicas]
               for one in again.replicas)  # fmt: skip


def check(made: Plan, needs: ModelNeeds, nodes: Sequence[ServingNode], links: Links) -> None:
    """What must hold of any plan."""
    by_id = {one.node: one for one in nodes}
    used = [stage.node for one in made.replicas for stage in one.stages]
    assert len(used) == len(set(used)), "a node holds one stage of one replica"
    assert {one.node for one in made.left_out} | set(used) == set(by_id)
    assert not {one.node for one in made.left_out} & set(used)
    assert all(one.reason for one in made.left_out)
    for one in made.replicas:
        at = 0
        for stage in one.stages:
            assert stage.first == at and stage.stop > at
            assert needs.bytes_of(stage) <= by_id[stage.node].free_bytes
            at = stage.stop
        assert at == needs.layers
        assert math.isfinite(one.token_ms) and one.token_ms > 0
    assert made.reason


@given(scenes(most=10))
@settings(max_examples=100, deadline=None)
def test_every_plan_holds_all_layers_within_the_memory_there_is(
    scene: tuple[ModelNeeds, list[ServingNode], Links],
) -> None:
    needs, nodes, links = scene
    check(plan(needs, nodes, links), needs, nodes, links)


@given(scenes(most=8), st.data())
@settings(max_examples=100, deadline=None)
def test_a_change_keeps_what_works(scene: tuple[ModelNeeds, list[ServingNode], Links], data: st.DataObject) -> None:
    needs, nodes, links = scene
    there = data.draw(st.lists(st.sampled_from(nodes), unique=True))
    before = plan(needs, there, links)
    after_nodes = data.draw(st.lists(st.sampled_from(nodes), unique=True))
    after = replan(before, needs, after_nodes, links)
    check(after, needs, after_nodes, links)
    ids = {one.node for one in after_nodes}
    whole = [one for one in before.replicas if all(stage.node in ids for stage in one.stages)]
    if "Placed anew" not in after.reason:
        stages = [one.stages for one in after.replicas]
        assert all(one.stages in stages for one in whole), "a replica whose nodes are all there stays as it is"
    assert after.rate * 1.25 * (1 + 1e-9) >= plan(needs, after_nodes, links).rate
    same = replan(after, needs, after_nodes, links)
    assert loaded(after, same) == 0 or "Placed anew" in same.reason


# --- what one would expect, told -----------------------------------------------------------------------------------


def test_who_can_hold_the_model_holds_it_alone() -> None:
    nodes = [node(1, 1000), node(2, 1000), node(3, 400), node(4, 400)]
    made = plan(NEEDS, nodes, mesh(nodes))
    assert sorted(len(one.stages) for one in made.replicas) == [1, 1, 2]
    assert made.reason == "2 whole replicas and a ring of 2 stages, 26 to 36 ms per token."


def test_the_fast_node_of_a_ring_holds_as_much_as_it_can() -> None:
    nodes = [node(1, 450, layer_ms=1), node(2, 450, layer_ms=4)]
    (ring,) = plan(NEEDS, nodes, mesh(nodes)).replicas
    assert {stage.node: stage.layers for stage in ring.stages} == {b"\x01": 4, b"\x02": 2}
    assert ring.token_ms == pytest.approx(4 * 1 + 2 * 4 + 3 * 10)


def test_a_weak_node_that_would_slow_the_ring_is_left_out_and_told_why() -> None:
    nodes = [node(1, 400), node(2, 400), node(3, 150, layer_ms=30)]
    made = plan(NEEDS, nodes, mesh(nodes))
    assert {stage.node for one in made.replicas for stage in one.stages} == {b"\x01", b"\x02"}
    (out,) = made.left_out
    assert out.reason == "n3: a ring of 36 ms per token would take 39.0 ms longer with it."


def test_a_replica_that_would_serve_badly_is_left_out() -> None:
    nodes = [node(1, 1000, layer_ms=1), node(2, 1000, layer_ms=90)]
    made = plan(NEEDS, nodes, mesh(nodes))
    (out,) = made.left_out
    assert out.reason == "n2: a token would take 560 ms there; elsewhere it takes 26 ms."


def test_where_nothing_fits_the_figures_say_so() -> None:
    nodes = [node(1, 250), node(2, 90)]
    made = plan(NEEDS, nodes, mesh(nodes))
    assert not made.replicas
    assert made.reason == (
        "No replica: 1 node has room for 2 layers in 250 B; the model has 6 layers and takes 720 B with its cache."
    )
    assert made.left_out[1].reason == "n2: 90 B are free, and one layer with its cache takes 100 B."
    made = plan(NEEDS, [node(2, 90), node(3, 80)], mesh(nodes))
    assert made.reason == (
        "No replica: none of 2 nodes can hold a layer; the model has 6 layers and takes 720 B with its cache. "
        "n2: 90 B are free, and one layer with its cache takes 100 B."
    )
    made = plan(NEEDS, [], mesh([]))
    assert made.reason == (
        "No replica: no node is free to hold layers; the model has 6 layers and takes 720 B with its cache."
    )


def test_a_pair_without_a_measured_link_is_never_next_to_each_other() -> None:
    nodes = [node(1, 400), node(2, 400)]
    ways = {(GATEWAY, b"\x01"): 1.0, (GATEWAY, b"\x02"): 1.0}
    assert not plan(NEEDS, nodes, Links(ways)).replicas
    assert plan(NEEDS, nodes, Links({**ways, (b"\x02", b"\x01"): 1.0})).replicas


def test_the_near_ring_is_chosen() -> None:
    nodes = [node(number, 400) for number in range(1, 5)]
    far = {(a.node, b.node): 100.0 for a, b in itertools.combinations(nodes, 2)}
    gateway = {(GATEWAY, one.node): 5.0 for one in nodes}
    links = Links({**far, **gateway, (b"\x01", b"\x03"): 2.0, (b"\x02", b"\x04"): 2.0})
    made = plan(NEEDS, nodes, links)
    assert [{stage.node for stage in one.stages} for one in made.replicas] == [{b"\x01", b"\x03"}, {b"\x02", b"\x04"}]


def test_a_lost_stage_is_taken_by_a_spare_node_and_nothing_else_moves() -> None:
    nodes = [node(number, 300) for number in range(1, 4)]
    before = Plan((replica_of(nodes, [2, 2, 2], 40.0),), (), "")
    spare = node(9, 300)
    after = replan(before, NEEDS, [nodes[0], nodes[2], spare], mesh([*nodes, spare]))
    (ring,) = after.replicas
    assert loaded(before, after) == 2
    assert [stage.node for stage in ring.stages] == [b"\x01", b"\x09", b"\x03"]
    assert after.reason == "1 replica goes on; 2 layers to load."


def test_a_lost_stage_is_taken_by_its_neighbours_where_there_is_no_other() -> None:
    nodes = [node(number, 400) for number in range(1, 4)]
    before = Plan((replica_of(nodes, [2, 2, 2], 40.0),), (), "")
    after = replan(before, NEEDS, [nodes[0], nodes[2]], mesh(nodes))
    (ring,) = after.replicas
    assert {stage.node for stage in ring.stages} == {b"\x01", b"\x03"}
    assert loaded(before, after) == 2


def test_a_joiner_that_would_halve_the_time_is_worth_loading_layers() -> None:
    nodes = [node(1, 400, layer_ms=50), node(2, 400, layer_ms=50)]
    before = plan(NEEDS, nodes, mesh(nodes))
    quick = node(3, 1000, layer_ms=1)
    after = replan(before, NEEDS, [*nodes, quick], mesh([*nodes, quick]))
    assert after.replicas[0].stages == (Stage(b"\x03", 0, 6),)


def test_a_longer_ring_than_can_be_looked_at_whole_is_nearly_the_best() -> None:
    """On sets small enough to look at everything, the search for long rings is compared with it."""
    import random

    gaps = []
    for seed in range(60):
        dice = random.Random(seed)
        nodes = [node(number, dice.randrange(150, 500), dice.uniform(0.5, 4)) for number in range(1, EXACT_MAX + 1)]
        places = {one.node: (dice.random(), dice.random()) for one in nodes} | {GATEWAY: (0.5, 0.5)}
        links = Links({(a, b): 50 * math.dist(places[a], places[b]) for a, b in itertools.combinations(places, 2)})
        exact = min(ring.token_ms for ring in all_rings(NEEDS, nodes, links).values())
        found = long_ring(NEEDS, nodes, links)
        assert found is not None
        gaps.append(found.token_ms / exact)
    assert max(gaps) < 1.3
    assert sorted(gaps)[len(gaps) // 2] < 1.02


def test_a_model_that_only_many_small_nodes_can_hold() -> None:
    needs = replace(NEEDS, layers=40)
    nodes = [node(number, 320) for number in range(1, 31)]
    made = plan(needs, nodes, mesh(nodes))
    (ring, *_) = made.replicas
    assert len(ring.stages) in (14, 15)
    check(made, needs, nodes, mesh(nodes))


def test_figures_that_are_no_measurement_are_refused() -> None:
    nodes = [node(1, 1000), node(2, 1000, layer_ms=math.nan), node(3, 1000, survival=0.0)]
    made = plan(NEEDS, nodes, mesh(nodes))
    assert [stage.node for one in made.replicas for stage in one.stages] == [b"\x01"]
    assert "are no measurement" in made.left_out[0].reason


def test_ring_of_nobody_is_none() -> None:
    assert ring_of(NEEDS, [], Links()) is None


@given(scenes(most=6))
@settings(max_examples=200, deadline=None)
def test_a_ring_in_reserve_is_the_ring_but_for_one_node_that_has_the_room(
    scene: tuple[ModelNeeds, list[ServingNode], Links],
) -> None:
    needs, nodes, links = scene
    made = plan(needs, nodes, links)
    reserve = standbys(made, needs, nodes, links)
    if len(made.replicas) != 1:
        assert reserve == ()
        return
    (ring,) = made.replicas
    used = {stage.node for stage in ring.stages}
    held: dict[bytes, list[Stage]] = {}
    for one in reserve:
        (new,) = [stage for stage, old in zip(one.stages, ring.stages, strict=True) if stage != old]
        assert new.node not in used
        assert [(stage.first, stage.stop) for stage in one.stages] == [(old.first, old.stop) for old in ring.stages]
        held.setdefault(new.node, []).append(new)
    free = {one.node: one.free_bytes for one in nodes}
    for spare, stages in held.items():
        weights = sum(needs.bytes_of(stage) - stage.layers * needs.cache_bytes for stage in stages)
        assert weights + max(stage.layers for stage in stages) * needs.cache_bytes <= free[spare]
        assert len({stage.first for stage in stages}) == len(stages)


def test_a_loss_that_a_ring_in_reserve_covers_loads_nothing() -> None:
    needs = ModelNeeds(layers=6, layer_bytes=10, cache_bytes=90)
    nodes = [node(number, 290) for number in range(1, 5)]
    links = mesh(nodes)
    before = plan(needs, nodes, links)
    assert [len(ring.stages) for ring in before.replicas] == [3]
    reserve = standbys(before, needs, nodes, links)
    assert len(reserve) == 3, "the spare node has room for the weights of all stages, and the cache of one"
    for lost in before.replicas[0].stages:
        left = [one for one in nodes if one.node != lost.node]
        after = replan(before, needs, left, links, reserve=reserve)
        assert after.replicas[0].stages in {ring.stages for ring in reserve}
        assert "nothing to load" in after.reason


def test_the_stage_that_is_likeliest_to_be_lost_is_covered_first() -> None:
    needs = ModelNeeds(layers=4, layer_bytes=90, cache_bytes=10)
    nodes = [node(1, 200, survival=0.99), node(2, 200, survival=0.3), node(3, 200, 5.0)]
    before = plan(needs, nodes, mesh(nodes))
    (only,) = standbys(before, needs, nodes, mesh(nodes))
    assert {stage.node for stage in only.stages} == {bytes([1]), bytes([3])}
