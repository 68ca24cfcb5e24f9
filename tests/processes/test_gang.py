"""Finding nodes for a job among offers that anybody may have made."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hub_world import an_offer

from shoal.driver.gang import DIALS_AT_ONCE, LinkedNode, TooFewNodes, find_gang
from shoal.errors import LinkError
from shoal.identity import KeyPair
from shoal.market import ANYTHING, Needed, Requirements, Wish, fits
from shoal.market.requirements import Means
from shoal.protocol.messages import open_record
from shoal.protocol.money import HouseLedger
from shoal.protocol.offers import FOUND_MAX, Capability, Device, Offer, OfferFind, Place, Throughput
from shoal.protocol.prices import Price
from shoal.protocol.serving import LinkEcho
from shoal.transport.memory import MemoryEndpoint, MemoryNetwork, Path
from shoal.world import HeldClock, SeededDice
from shoal.world.directory import FoundOffer
from shoal.world.lookout import Backoff
from shoal.world.reach import echo


def a_key(number: int) -> KeyPair:
    return KeyPair.from_seed(number.to_bytes(32, "big"))


class Offers:
    """A directory of what was put into it."""

    def __init__(self) -> None:
        self.kept: dict[bytes, FoundOffer] = {}

    def put(self, key: KeyPair, name: str, addresses: Sequence[str], **offered: object) -> None:
        envelope = an_offer(key, 1, name=name, addresses=tuple(addresses), **offered)
        self.kept[key.node_id] = FoundOffer(key.node_id, open_record(envelope, Offer), envelope)

    async def find(self, wanted: OfferFind) -> list[FoundOffer]:
        after = wanted.after or b""
        found = [self.kept[node] for node in sorted(self.kept) if node > after]
        return [one for one in found if fits(one.node, one.offer, wanted)[0]][: wanted.limit]

    async def introduce(self, node: bytes, addresses: Sequence[str]) -> None:
        raise LinkError("no link is held to it")


class Scene:
    def __init__(self) -> None:
        self.clock = HeldClock()
        self.network = MemoryNetwork(self.clock, dice=SeededDice(1))
        self.driver = self.network.endpoint(a_key(1))
        self.offers = Offers()
        self.ends: list[MemoryEndpoint] = [self.driver]

    async def a_node(self, number: int, *, one_way_s: float = 0.0, **offered: object) -> bytes:
        key = a_key(number)
        end = self.network.endpoint(key)
        end.handle(LinkEcho.KIND, echo)
        self.network.set_path(self.driver.node_id, key.node_id, Path(delay_s=one_way_s))
        self.ends.append(end)
        await end.listen("tcp://node:0")
        self.offers.put(key, f"node-{number}", end.addresses, **offered)
        return key.node_id

    async def gang(
        self, needed: int | Needed, wait_s: float = 60.0, nodes_max: int = 64, wish: Wish = ANYTHING
    ) -> list[LinkedNode]:
        search = asyncio.create_task(
            find_gang(
                OfferFind(idle_only=True),
                wish,
                needed=needed if isinstance(needed, Needed) else Needed(needed),
                nodes_max=nodes_max,
                wait_s=wait_s,
                advice="Start more.",
                endpoint=self.driver,
                directory=self.offers,
                clock=self.clock,
            )
        )
        while not search.done():
            for _ in range(50):
                await asyncio.sleep(0)
            await self.clock.advance(0.05)
        return search.result()

    async def close(self) -> None:
        for end in self.ends:
            await end.close()


def test_offers_with_nobody_behind_them_hide_no_honest_node() -> None:
    async def story() -> None:
        scene = Scene()
        honest = [await scene.a_node(number) for number in (2, 3)]
        last = max(honest)
        grown, number = 0, 1000
        while grown < 2 * FOUND_MAX:  # more than one look holds, and all of them before an honest one
            key = a_key(number)
            number += 1
            if key.node_id < last:
                scene.offers.put(key, f"fake-{number}", ["tcp://nowhere:1"])
                grown += 1
        gang = await scene.gang(2)
        assert {one.node for one in gang} == set(honest)
        await scene.close()

    asyncio.run(story())


def test_a_gang_begins_without_those_that_let_it_wait() -> None:
    async def story() -> None:
        scene = Scene()
        honest = await scene.a_node(2)
        for number in range(10, 10 + DIALS_AT_ONCE // 2):
            scene.offers.put(a_key(number), f"silent-{number}", ["tcp://silent:1"])

        async def never(*_: object, **__: object) -> object:
            return await asyncio.Future()

        dial = scene.driver.dial

        async def dial_or_wait(node: bytes, hints: Sequence[str], **options: float) -> object:
            return await (dial(node, hints, **options) if node == honest else never())

        scene.driver.dial = dial_or_wait  # type: ignore[method-assign, assignment]
        gang = await scene.gang(1)
        assert [one.node for one in gang] == [honest] and scene.clock.monotonic() < 5
        await scene.close()

    asyncio.run(story())


def test_who_was_tried_in_vain_is_left_alone_longer_each_time_and_for_weeks() -> None:
    async def story() -> None:
        clock = HeldClock()
        backoff, node = Backoff(clock, 4.0, 300.0), bytes(32)
        for rest_s in (4.0, 8.0, 16.0):
            backoff.tried(node)
            await clock.advance(rest_s - 0.1)
            assert backoff.rests(node)
            await clock.advance(0.1)
            assert not backoff.rests(node)
        for _ in range(2000):
            backoff.tried(node)
        await clock.advance(299.9)
        assert backoff.rests(node) and backoff.times(node) == 2003
        backoff.succeeded(node)
        assert not backoff.rests(node) and backoff.times(node) == 0

    asyncio.run(story())


def test_too_few_nodes_are_told_with_those_that_are_busy() -> None:
    async def story() -> None:
        scene = Scene()
        await scene.a_node(2)
        await scene.a_node(3, busy=True)
        with pytest.raises(
            TooFewNodes, match=r"1 of 2 nodes came within 3 s\. 1 node of 2 .* when those that are busy are free: 2 "
            r"nodes\. Where a job's driver was killed",
        ):  # fmt: skip
            await scene.gang(2, wait_s=3.0)
        await scene.close()

    asyncio.run(story())


def measured(flops: float) -> Capability:
    device = Device("cuda", "RTX", 24 << 30, 1e12, (Throughput("bfloat16", flops),))
    return Capability(devices=(device,), hub_rate_bps=1e8, hub_round_trip_ms=10)


def test_any_mix_that_has_so_much_together_will_do() -> None:
    async def story() -> None:
        scene = Scene()
        small = [await scene.a_node(number, capability=measured(4e13)) for number in (2, 3)]
        with pytest.raises(
            TooFewNodes, match=r"2 nodes with 80\.0 TFLOP/s of 90\.0 TFLOP/s together came within 3 s\. .*"
            r"flops_together 80\.0 TFLOP/s instead of 90\.0 TFLOP/s: 2 nodes",
        ):  # fmt: skip
            await scene.gang(Needed(1, 9e13), wait_s=3.0)
        large = await scene.a_node(4, capability=measured(5e13))
        assert {one.node for one in await scene.gang(Needed(1, 9e13))} == {*small, large}
        await scene.close()

    asyncio.run(story())


def test_a_gang_is_of_nodes_that_meet_the_requirements() -> None:
    async def story() -> None:
        scene = Scene()
        near = await scene.a_node(2, price=Price(300_000), place=Place(country="DE"), one_way_s=0.01)
        await scene.a_node(3, price=Price(400_000), place=Place(country="DE"))
        await scene.a_node(4, price=Price(200_000), place=Place(country="DE"), one_way_s=0.1)
        await scene.a_node(5, price=Price(100_000), place=Place(country="FR"))
        await scene.a_node(6, price=Price(100_000, "EUR"), place=Place(country="DE"))
        free = await scene.a_node(7, place=Place(country="DE"))
        wish = Wish(Requirements(countries=("DE",), price_max=350_000, latency_max_ms=50.0))
        assert {one.node for one in await scene.gang(2, wish=wish)} == {near, free}
        await scene.close()

    asyncio.run(story())


def test_too_few_nodes_are_told_with_what_would_do() -> None:
    async def story() -> None:
        scene = Scene()
        for number, price in ((2, 350_000), (3, 420_000), (4, 1_000_000)):
            await scene.a_node(number, price=Price(price))
        wish = Wish(Requirements(price_max=400_000))
        with pytest.raises(
            TooFewNodes, match=r"Excluded by price_max \(at most 0.40/h\) 2\. What would do: price_max 0.42/h instead "
            r"of 0.40/h: 2 nodes\.",
        ):  # fmt: skip
            await scene.gang(2, wait_s=3.0, wish=wish)
        far = await scene.a_node(5, one_way_s=0.2)
        assert far
        wish = Wish(Requirements(latency_max_ms=100.0, price_max=0))
        with pytest.raises(
            TooFewNodes, match=r"latency_max \(at most 100 ms\) 1\. What would do: latency_max 40\d ms instead of 100 "
            r"ms: 1 node; price_max",
        ):  # fmt: skip
            await scene.gang(1, wait_s=3.0, wish=wish)
        await scene.close()

    asyncio.run(story())


def test_a_job_without_a_budget_waits_only_where_somebody_may_become_free() -> None:
    async def story() -> None:
        scene = Scene()
        ledger = HouseLedger(operator=bytes(32), currency="USD")
        for number, price in ((2, 350_000), (3, 250_000)):
            await scene.a_node(number, price=Price(price), ledger=ledger)
        wish, begun = Wish(means=Means()), scene.clock.monotonic()
        with pytest.raises(
            TooFewNodes,
            match=r"with a budget: 2 nodes, of which the cheapest 2 cost 0\.60/h in USD\. `shoal plan` says",
        ):
            await scene.gang(2, wish=wish)
        assert scene.clock.monotonic() - begun < 5
        await scene.a_node(4, busy=True)
        with pytest.raises(TooFewNodes, match="0 of 1 node came within 10 s"):
            await scene.gang(1, wait_s=10.0, wish=wish)
        assert scene.clock.monotonic() - begun >= 10
        await scene.close()

    asyncio.run(story())
