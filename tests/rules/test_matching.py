"""Which offers are what somebody wants, what excluded the others, and what would do."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cli.offers import CALLED
from shoal.market import Board, Listing, Needed, Requirements, Wish, match
from shoal.market.demands import demands
from shoal.market.enough import cheapest
from shoal.market.requirements import Means
from shoal.protocol.money import HouseLedger
from shoal.protocol.offers import Capability, Device, Offer, Place, Throughput
from shoal.protocol.prices import Price
from shoal.quantities import parse_bytes, parse_bytes_per_s, parse_count, parse_duration_s

GIB = 1 << 30
OPERATOR, OTHER = HouseLedger(operator=bytes(32), currency="USD"), HouseLedger(operator=bytes([1]) * 32, currency="EUR")


def a_device(kind: str = "cuda", name: str = "RTX 4090", memory_gib: int = 24, flops: float = 1e14) -> Device:
    return Device(
        kind=kind, name=name, memory_bytes=memory_gib * GIB, memory_bytes_per_s=1e12,
        throughput=(Throughput(dtype="bfloat16", flops=flops),),
    )  # fmt: skip


def a_listing(
    number: int, *devices: Device, price: int | None = None, currency: str = "USD", country: str | None = None,
    region: str | None = None, rate_bps: float = 1e8, latency_ms: float | None = None, **rest: object,
) -> Listing:  # fmt: skip
    offer = Offer(
        name=f"node{number}", sequence=1, issued_ms=0, lifetime_ms=60_000,
        capability=Capability(devices=devices or (a_device(),), hub_rate_bps=rate_bps, hub_round_trip_ms=10),
        price=None if price is None else Price(price, currency), place=Place(country=country, region=region),
        **rest,  # type: ignore[arg-type]
    )  # fmt: skip
    return Listing(number.to_bytes(32), offer, latency_ms=latency_ms)


def a_board(*listings: Listing) -> Board:
    board = Board()
    for one in listings:
        board.put(one)
    return board


def names(board: Board, rows: np.ndarray) -> set[str]:
    return {board.listing(row).offer.name for row in rows}


BIG_AND_SLOW, SMALL_AND_FAST = a_device(memory_gib=80, flops=1e12), a_device(name="H", memory_gib=8, flops=1e15)
BOARD = a_board(
    a_listing(0, price=350_000, country="DE", region="europe-west", latency_ms=20),
    a_listing(1, price=420_000, country="NL", region="europe-west", latency_ms=35, busy=True),
    a_listing(2, a_device("cpu", "EPYC", 64, 1e11), rate_bps=1e6),
    a_listing(3, BIG_AND_SLOW, SMALL_AND_FAST, price=1_200_000, country="US", region="us-east", latency_ms=110),
    a_listing(4, price=300_000, currency="EUR", country="FR", accepts=("serve",)),
    a_listing(5, a_device("cuda", "GTX 1080 Ti", 11, 1e13), price=90_000, country="DE", tier="sandboxed"),
)


@pytest.mark.parametrize(
    ("wanted", "fitting"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"currency": "USD"}, {0, 1, 2, 3, 5}),  # or for nothing
        ({"currency": "EUR"}, {2, 4}),
        ({"device": "cuda"}, {0, 1, 3, 4, 5}),
        ({"device_name": "4090"}, {0, 1, 3, 4}),
        ({"device_name": "gtx"}, {5}),
        ({"memory_min_bytes": 64 * GIB}, {2, 3}),
        ({"flops_min": 5e14}, {3}),
        ({"memory_min_bytes": 16 * GIB, "flops_min": 5e14}, set()),
        ({"bandwidth_min": 1e6}, {0, 1, 3, 4, 5}),
        ({"latency_max_ms": 35.0}, {0, 1}),
        ({"countries": ("DE", "US")}, {0, 3, 5}),
        ({"countries_without": ("US",)}, {0, 1, 4, 5}),
        ({"regions": ("europe-west",)}, {0, 1}),
        ({"regions_without": ("europe-west",)}, {3}),
        ({"tier": "sandboxed"}, {5}),
        ({"price_max": 350_000}, {0, 2, 5}),
        ({"price_max": 350_000, "currency": "EUR"}, {2, 4}),
    ],
)
def test_each_requirement_lets_in_what_meets_it(wanted: dict[str, object], fitting: set[int]) -> None:
    found = match(BOARD, Wish(Requirements(**wanted)))
    assert names(BOARD, found.rows) == {f"node{number}" for number in fitting}
    assert found.nodes == len(fitting)


def test_work_and_idleness() -> None:
    assert match(BOARD, Wish(), accepts="train", idle_only=True).nodes == 4
    assert names(BOARD, match(BOARD, Wish(Requirements(currency="EUR")), accepts="serve").rows) == {"node4"}
    assert match(BOARD, Wish(), accepts="loop-of-mine").nodes == 0
    assert match(BOARD, Wish(), accepts="loop-of-mine").reason == (
        "0 nodes of 0 that take such work fit, where 1 is needed. Nobody offers it at these hubs."
    )


def test_alternatives() -> None:
    wish = Wish(
        Requirements(device="cuda"),
        (Requirements(memory_min_bytes=64 * GIB), Requirements(price_max=100_000)),
    )
    assert names(BOARD, match(BOARD, wish).rows) == {"node3", "node5"}


def test_why_not_names_who_excluded_most_and_the_nearest_change() -> None:
    wish = Wish(Requirements(device_name="4090", price_max=350_000, countries=("DE", "NL")))
    found = match(BOARD, wish, accepts="train", needed=Needed(2))
    assert found.nodes == 1
    assert found.excluded == {"device_name": 2, "countries": 2, "price_max": 2, "currency": 0}
    assert [change.nodes for change in found.changes] == [2, 2]
    assert found.reason == (
        "1 node of 5 that take such work fits, where 2 are needed. Excluded by device_name ('4090' in its name) 2, by "
        "countries (only DE, NL) 2, by price_max (at most 0.35/h) 2. What would do: price_max 0.42/h instead of "
        "0.35/h: 2 nodes; without device_name ('4090' in its name): 2 nodes."
    )
    far = match(BOARD, Wish(Requirements(latency_max_ms=5.0)), accepts="train", needed=Needed(3))
    assert "latency_max 110 ms instead of 5 ms: 3 nodes" in far.reason
    assert "without" not in far.reason, "numbers come first, and taking the demand away is not told beside them"
    none = match(BOARD, Wish(Requirements(device="mps", tier="attested", countries=("JP",))), accepts="train")
    assert none.reason.endswith("No one change would do, nor any two that were tried.")
    many = match(BOARD, Wish(), needed=Needed(7))
    assert many.reason == "6 nodes of 6 on offer fit, where 7 are needed. No more offer it at these hubs."


def test_two_changes_that_would_do_together_where_none_does_by_itself() -> None:
    found = match(BOARD, Wish(Requirements(countries=("FR",), price_max=80_000, device="cuda")), needed=Needed(1))
    assert found.changes == () and found.reason.endswith(
        "No single change would do, but two: currency EUR instead of USD and price_max 0.30/h instead of 0.08/h: 1 "
        "node."
    )
    board = a_board(a_listing(1, price=400_000, ledger=OPERATOR), a_listing(2, price=500_000, ledger=OPERATOR))
    found = match(board, Wish(Requirements(price_max=100_000), means=Means()), needed=Needed(2))
    assert found.reason.endswith(
        "No single change would do, but two: with a budget and price_max 0.50/h instead of 0.10/h: 2 nodes."
    )


def test_offers_says_why_not_in_its_own_options() -> None:
    all_that_has_one = Requirements(
        device="cuda", device_name="4090", memory_min_bytes=1, flops_min=1, memory_rate_min=1, bandwidth_min=1,
        latency_max_ms=1, countries=("DE",), countries_without=("NL",), regions=("a",), regions_without=("b",),
        tier="attested", reputation_min=1, notice_min_ms=1, price_max=1,
    )  # fmt: skip
    assert {one.name for one in demands(BOARD, all_that_has_one)} | {"idle", "flops_together"} == set(CALLED)
    found = match(BOARD, Wish(Requirements(device_name="4090", price_max=350_000)), needed=Needed(3), called=CALLED)
    assert (
        "Excluded by --device-name ('4090' in its name) 2, by --max-price (at most 0.35/h) 2, by --currency (priced "
        "in USD) 1." in found.reason
    )
    assert "--max-price 1.20/h instead of 0.35/h: 3 nodes; without --device-name" in found.reason
    assert set(found.excluded) == {"device_name", "price_max", "currency"}, "programs read the names of a job file"


def test_a_price_in_another_currency_is_told_from_one_that_is_too_high() -> None:
    found = match(BOARD, Wish(Requirements(device="cuda", price_max=100_000, currency="EUR")), needed=Needed(1))
    assert found.excluded == {"device": 1, "price_max": 4, "currency": 4}
    assert found.reason.endswith(
        "What would do: price_max 0.30/h instead of 0.10/h: 1 node; currency USD instead of EUR: 1 node; without "
        "device (cuda): 1 node."
    )
    assert [change.limit for change in found.changes] == [300_000, "USD", None]
    usual = match(BOARD, Wish(Requirements(price_max=100_000, tier="sandboxed", countries=("FR",))))
    assert "without currency" not in usual.reason, "a price is of one currency"


def test_what_would_do_in_an_alternative() -> None:
    wish = Wish(
        Requirements(device="cuda"),
        (Requirements(device_name="A100"), Requirements(price_max=350_000, countries=("DE",))),
    )
    assert match(BOARD, wish).nodes == 2
    found = match(BOARD, wish, needed=Needed(3))
    assert "any_of[1].device_name" in found.reason, "one that fits anyway counts beside those that a change brings"
    assert "any_of[2].price_max" not in found.reason, "no price brings another node in DE"
    wish = Wish(Requirements(), (Requirements(device="mps"), Requirements(price_max=350_000, device_name="4090")))
    found = match(BOARD, wish, needed=Needed(2))
    first, *_ = found.changes
    assert first.sentence == "any_of[2].price_max 0.42/h instead of 0.35/h: 2 nodes"
    assert (first.name, first.limit) == ("any_of[2].price_max", 420_000)


def test_a_job_without_a_budget_is_told_what_one_has_to_pay_for() -> None:
    board = a_board(
        a_listing(1, price=400_000, ledger=OPERATOR),
        a_listing(2, price=250_000, ledger=OPERATOR),
        a_listing(3, price=100_000, currency="EUR", ledger=OTHER),
        a_listing(4, price=50_000),  # and no ledger: nobody can pay it
    )
    found = match(board, Wish(means=Means()), needed=Needed(2))
    assert found.reason == (
        "0 nodes of 4 on offer fit, where 2 are needed. Excluded by budget (free, as the job has no budget) 4. What "
        "would do: with a budget: 2 nodes, of which the cheapest 2 cost 0.65/h in USD."
    )
    assert match(board, Wish(means=Means()), needed=Needed(3)).changes == (), "no one ledger pays three of them"
    elsewhere = match(board, Wish(means=Means(OTHER)), needed=Needed(2))
    assert "with money at the ledger 00000000: 2 nodes, of which the cheapest 2 cost 0.65/h in USD." in elsewhere.reason


@given(st.integers(1 << 20, 1 << 42), st.floats(1e3, 1e17), st.floats(1e3, 1e12), st.floats(0.01, 50_000))
def test_a_value_that_is_told_does_when_it_is_typed(memory: int, flops: float, rate: float, far_ms: float) -> None:
    device = msgspec.structs.replace(a_device(flops=flops), memory_bytes=memory, memory_bytes_per_s=rate)
    board = a_board(a_listing(1, device, rate_bps=8 * rate, latency_ms=far_ms))
    for field, asked, typed in (
        ("memory_min_bytes", 1 << 50, parse_bytes),
        ("flops_min", 1e18, lambda text: float(parse_count(text.removesuffix("FLOP/s")))),
        ("memory_rate_min", 1e18, parse_bytes_per_s),
        ("bandwidth_min", 1e18, parse_bytes_per_s),
        ("latency_max_ms", 0.001, lambda text: 1000 * parse_duration_s(text)),
    ):
        (change,) = match(board, Wish(Requirements(**{field: asked}))).changes
        told = change.sentence.removeprefix(f"{change.name} ").partition(" instead of")[0]
        assert match(board, Wish(Requirements(**{field: typed(told)}))).nodes == 1, told


def together_of(board: Board, rows: np.ndarray) -> float:
    best: dict[bytes, float] = {}
    for row in rows:
        node = board.listing(row).node
        best[node] = max(best.get(node, 0.0), float(board.number("flops")[row]))
    return sum(best.values())


def test_any_mix_that_gives_so_much_together() -> None:
    cuda = Wish(Requirements(device="cuda", price_max=350_000))
    assert match(BOARD, cuda, accepts="train", needed=Needed(flops=1.1e14)).reason == (
        "2 nodes of 5 that take such work fit, with 110.0 TFLOP/s together."
    )
    found = match(BOARD, cuda, accepts="train", needed=Needed(flops=1.2e14))
    assert (found.nodes, found.flops) == (2, pytest.approx(1.1e14))
    assert found.reason == (
        "2 nodes of 5 that take such work fit, with 110.0 TFLOP/s together, where 120.0 TFLOP/s are needed. "
        "Excluded by price_max (at most 0.35/h) 2, by device (cuda) 1. What would do: flops_together 110.0 "
        "TFLOP/s instead of 120.0 TFLOP/s: 2 nodes; price_max 0.42/h instead of 0.35/h: 3 nodes."
    )


def test_the_cheapest_that_is_enough() -> None:
    rows = match(BOARD, Wish(Requirements(device="cuda"))).rows

    def found(nodes: int, flops: float = 0.0, within_ms: float | None = None) -> set[str]:
        return names(BOARD, cheapest(BOARD, rows, Needed(nodes, flops), within_ms).rows)

    assert found(1, 1e14) == {"node0"}
    assert found(1, 1.1e14) == {"node0", "node5"}
    assert found(3) == {"node0", "node1", "node5"}, "in the currency of most: nothing is converted"
    assert found(1, 1e15) == {"node3"}, "by its fastest device"
    assert not found(1, 1e16) and not found(9)
    assert cheapest(BOARD, rows, Needed(2, 1.1e14)).reason == (
        "The cheapest 2 nodes with 110.0 TFLOP/s together: 0.44 USD an hour."
    )
    assert found(2, within_ms=25.0) == {"node0", "node5"}, "10 ms from the hub each, as far as they say"
    assert not found(2, within_ms=15.0)
    assert cheapest(BOARD, rows, Needed(2), 25.0).reason == (
        "The cheapest 2 nodes within 25 ms of one another: 0.44 USD an hour."
    )


NUMBERS = st.integers(0, 5)


@st.composite
def requirements(draw: st.DrawFn) -> Requirements:
    some = {
        "device": draw(st.sampled_from(["any", "cuda", "cpu"])),
        "memory_min_bytes": draw(NUMBERS) * 8 * GIB,
        "flops_min": draw(NUMBERS) * 1e13,
        "countries": draw(st.sampled_from([(), ("DE",), ("DE", "US")])),
        "countries_without": draw(st.sampled_from([(), ("FR",)])),
        "latency_max_ms": draw(st.sampled_from([None, 10.0, 100.0])),
        "price_max": draw(st.sampled_from([None, 0, 100_000, 400_000])),
        "tier": draw(st.sampled_from(["open", "sandboxed"])),
    }
    return Requirements(**{name: value for name, value in some.items() if draw(st.booleans())})


listings = st.builds(
    lambda number, memories, flops, price, country, latency, tier: a_listing(
        number, *(a_device(memory_gib=memory, flops=flops) for memory in memories), price=price, country=country,
        latency_ms=latency, tier=tier,
    ),
    st.integers(0, 12), st.lists(st.sampled_from([8, 24, 48]), min_size=1, max_size=3),
    st.sampled_from([1e13, 5e13]), st.sampled_from([None, 0, 90_000, 350_000]),
    st.sampled_from([None, "DE", "FR", "US"]), st.sampled_from([None, 5.0, 50.0]),
    st.sampled_from(["open", "sandboxed", "attested"]),
)  # fmt: skip


@given(st.lists(listings, max_size=12), requirements(), st.integers(1, 4), st.sampled_from([0.0, 4e13, 1.1e14]))
def test_a_change_that_is_told_does_what_it_says(
    found: list[Listing], wanted: Requirements, needed: int, together: float
) -> None:
    board = a_board(*found)
    before = match(board, Wish(wanted), needed=Needed(needed, together))
    assert before.nodes == len({board.listing(row).node for row in before.rows})
    assert before.flops == (pytest.approx(together_of(board, before.rows)) if together else 0)
    assert (before.reason.find("needed") >= 0) == (before.nodes < needed or before.flops < together)
    for change in before.changes:
        assert change.nodes >= needed
        if change.limit is None:
            continue
        if change.name == "flops_together":
            after = match(board, Wish(wanted), needed=Needed(needed, change.limit))
            assert not after.changes and after.nodes == change.nodes
            continue
        field = next(name for name in msgspec.structs.asdict(wanted) if name.startswith(change.name))
        changed = msgspec.structs.replace(wanted, **{field: type(getattr(wanted, field))(change.limit)})
        after = match(board, Wish(changed), needed=Needed(needed, together))
        assert after.nodes == change.nodes and not after.changes
        # Nothing nearer would do.
        nearer = change.limit * (1 - 1e-9 if change.at_most else 1 + 1e-9)
        if field not in ("price_max", "memory_min_bytes"):
            less = msgspec.structs.replace(wanted, **{field: nearer})
            assert "needed" in match(board, Wish(less), needed=Needed(needed, together)).reason


@given(st.lists(listings, max_size=12), requirements(), st.integers(1, 4))
def test_two_changes_that_are_told_do_what_they_say(found: list[Listing], wanted: Requirements, needed: int) -> None:
    board = a_board(*found)
    before = match(board, Wish(wanted), needed=Needed(needed))
    assert not (before.changes and before.together)
    usual = Requirements()
    for change in before.together:
        field = next(name for name in msgspec.structs.asdict(wanted) if name.startswith(change.name))
        value = getattr(usual, field)
        if change.limit is not None:
            value = type(getattr(wanted, field))(change.limit)
        wanted = msgspec.structs.replace(wanted, **{field: value})
    after = match(board, Wish(wanted), needed=Needed(needed))
    if before.together:
        assert after.nodes == before.together[-1].nodes >= needed


@given(st.lists(listings, max_size=12), requirements(), st.lists(requirements(), max_size=3), st.integers(1, 4))
def test_a_change_in_an_alternative_does_what_it_says(
    found: list[Listing], each: Requirements, any_of: list[Requirements], needed: int
) -> None:
    board = a_board(*found)
    for change in match(board, Wish(each, tuple(any_of)), needed=Needed(needed)).changes:
        where, _, name = change.name.rpartition(".")
        if not where or change.limit is None:
            continue
        at = int(where.removeprefix("any_of[").removesuffix("]")) - 1
        field = next(field for field in msgspec.structs.asdict(each) if field.startswith(name))
        kind = type(getattr(any_of[at], field))
        changed = msgspec.structs.replace(any_of[at], **{field: kind(change.limit)})
        after = match(board, Wish(each, (*any_of[:at], changed, *any_of[at + 1 :])), needed=Needed(needed))
        assert after.nodes == change.nodes >= needed


@given(st.lists(st.tuples(st.booleans(), listings), max_size=40))
def test_a_board_is_what_was_put_on_it_last(steps: list[tuple[bool, Listing]]) -> None:
    board, held = Board(), {}
    for put, listing in steps:
        if put:
            board.put(listing)
            held[listing.node] = listing
        else:
            board.remove(listing.node)
            held.pop(listing.node, None)
    assert len(board) == len(held)
    rows = match(board, Wish()).rows
    assert {board.listing(row).node for row in rows} == set(held)
    for row in rows:
        mine = board.listing(row)
        assert mine == held[mine.node]
        assert board.number("memory_bytes")[row] in [one.memory_bytes for one in mine.offer.capability.devices]


def test_a_board_forgets_texts_that_stand_nowhere() -> None:
    board = Board()
    for number in range(5_000):
        board.put(a_listing(1, a_device(name=f"device {number}")))
    assert len(list(board.texts("device"))) <= 1024
    assert names(board, match(board, Wish(Requirements(device_name="4999"))).rows) == {"node1"}
