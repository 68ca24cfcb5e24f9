"""Nodes that find out where they are, and gangs that are near to one another, over links of known length."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest
from hub_world import a_key, an_offer

from shoal.driver.gang import LinkedNode, TooFar
from shoal.driver.nearness import near_gang, refuse_far
from shoal.errors import LinkError
from shoal.market.coordinates import Coordinate
from shoal.node.surveying import FIRST, FIRST_EVERY_S, Prober, Surveyor
from shoal.protocol.messages import open_record
from shoal.protocol.offers import Offer, OfferFind
from shoal.protocol.serving import LinkEcho
from shoal.transport.memory import MemoryEndpoint, MemoryNetwork, Path
from shoal.world import HeldClock, SeededDice
from shoal.world.directory import FoundOffer
from shoal.world.quotes import NotSecured
from shoal.world.reach import echo

PLACES = {2: (0.0, 0.0), 3: (6.0, 0.0), 4: (0.0, 8.0), 5: (60.0, 0.0), 6: (62.0, 3.0)}
"""In milliseconds of round trip: two towns."""


class Country:
    def __init__(self) -> None:
        self.clock = HeldClock()
        self.network = MemoryNetwork(self.clock, dice=SeededDice(1))
        self.ends: dict[int, MemoryEndpoint] = {}
        self.surveyors: dict[int, Surveyor] = {}
        self.told = 0

    async def __aenter__(self) -> Country:
        for number in PLACES:
            end = self.ends[number] = self.network.endpoint(a_key(number))
            end.handle(LinkEcho.KIND, echo)
            Prober(end, self.clock)
            await end.listen(f"tcp://node-{number}:0")
            self.surveyors[number] = Surveyor(end, self, self.clock, SeededDice(number), self._moved)
        for one, other in itertools.combinations(PLACES, 2):
            self.network.set_path(
                a_key(one).node_id, a_key(other).node_id, Path(delay_s=self.between_ms(one, other) / 2000)
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        for end in self.ends.values():
            await end.close()

    def between_ms(self, one: int, other: int) -> float:
        (a, b), (c, d) = PLACES[one], PLACES[other]
        return float(((a - c) ** 2 + (b - d) ** 2) ** 0.5)

    async def _moved(self) -> None:
        self.told += 1

    async def find(self, wanted: OfferFind) -> list[FoundOffer]:
        found = []
        for number, end in self.ends.items():
            mine = self.surveyors[number].coordinate if number in self.surveyors else None
            envelope = an_offer(
                a_key(number), 1, name=f"node-{number}", addresses=tuple(end.addresses),
                coordinate=mine.told() if mine else None,
            )  # fmt: skip
            if wanted.after is None or a_key(number).node_id > wanted.after:
                found.append(FoundOffer(a_key(number).node_id, open_record(envelope, Offer), envelope))
        return sorted(found, key=lambda one: one.node)[: wanted.limit]

    async def introduce(self, node: bytes, addresses: Sequence[str]) -> None:
        raise LinkError("no link is held to it")

    async def let(self, task: asyncio.Task[object], most: int = 4000) -> None:
        """The clock goes on until something is done."""
        for _ in range(most):
            if task.done():
                return
            await asyncio.sleep(0)
            await self.clock.advance(0.001)
        raise AssertionError("it goes on for ever")

    async def gang(self, *numbers: int) -> list[LinkedNode]:
        driver = self.network.endpoint(a_key(1))
        self.ends[1] = driver
        offers = {one.node: one.offer for one in await self.find(OfferFind())}
        gang = []
        for number in numbers:
            node = a_key(number).node_id
            dial = asyncio.create_task(driver.dial(node, self.ends[number].addresses, deadline_s=5.0))
            await self.let(dial)
            gang.append(LinkedNode(node, offers[node], dial.result()))
        return gang


def test_coordinates_come_near_to_what_is_measured() -> None:
    async def story() -> None:
        async with Country() as country:
            for _ in range(30):
                for surveyor in country.surveyors.values():
                    measuring: asyncio.Task[object] = asyncio.create_task(surveyor.measure())
                    await country.let(measuring)
                    measuring.result()
            at: dict[int, Coordinate] = {}
            for number, surveyor in country.surveyors.items():
                assert surveyor.coordinate is not None
                at[number] = surveyor.coordinate
            for one, other in itertools.combinations(PLACES, 2):
                far = country.between_ms(one, other)
                seen = at[one].distance_ms(at[other])
                assert (seen > 35) == (far > 35), f"{one} to {other}: {far:.1f} ms seem to be {seen:.1f}"
            assert len(PLACES) <= country.told < 30 * len(PLACES), "small steps are not told"

    asyncio.run(story())


def test_a_surveyor_measures_soon_after_its_start() -> None:
    async def story() -> None:
        async with Country() as country:
            surveyor = country.surveyors[2]
            running = asyncio.create_task(surveyor.run())
            for _ in range(int((FIRST * (FIRST_EVERY_S + 1)) / 0.05)):
                await asyncio.sleep(0)
                await country.clock.advance(0.05)
            assert surveyor.coordinate is not None and not running.done()
            running.cancel()

    asyncio.run(story())


def test_a_gang_is_near_to_one_another_or_it_is_said_why_not() -> None:
    async def story() -> None:
        async with Country() as country:
            gang = await country.gang(2, 3, 4, 5, 6)
            choosing: asyncio.Task[object] = asyncio.create_task(near_gang(gang, 15.0, 3))
            await country.let(choosing)
            assert {one.name for one in choosing.result()} == {"node-2", "node-3", "node-4"}  # type: ignore[attr-defined]
            choosing = asyncio.create_task(near_gang(gang, 15.0, 4))
            await country.let(choosing)
            with pytest.raises(NotSecured, match=r"3 of 5 nodes are within 15 ms .*, and 4 are needed; within [56]"):
                choosing.result()
            joining: asyncio.Task[object] = asyncio.create_task(refuse_far(gang[3], gang[:2], 15.0))
            await country.let(joining)
            with pytest.raises(TooFar, match=r"It is 6\d\.\d ms from node-2, and the job allows 15 ms between any two"):
                joining.result()
            joining = asyncio.create_task(refuse_far(gang[2], gang[:2], 15.0))
            await country.let(joining)
            joining.result()

    asyncio.run(story())
