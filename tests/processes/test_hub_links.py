"""Nodes and clients at one hub and at several, over links inside the process."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hub_world import PATIENCE_S, MemoryHub, Watcher, a_client, a_key, an_offer

from shoal.errors import LinkError
from shoal.hub import HubClient, NoHub, NoIntroduction
from shoal.hub.client import BACKOFF_LAST_S, FIND_DEADLINE_S, backoff_s
from shoal.hub.index import FOUND_BYTES_MAX, Arrival
from shoal.hub.rates import HubBusy
from shoal.hub.service import FIND_BURST, FINDS_PER_SOURCE, PUBLISH_BURST
from shoal.identity import KeyPair
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import DialMe, OfferFind, OfferKept, OfferPublish, OffersFound
from shoal.transport import MemoryNetwork, Path
from shoal.world import Directory, HeldClock, Link, Refused, Request, SeededDice
from shoal.world.directory import FoundOffer

T = TypeVar("T")
HERON, STORK, WREN = a_key(1), a_key(2), a_key(3)


@dataclass
class World:
    """Two hubs and their clock; network and nodes run in real time."""

    network: MemoryNetwork
    clock: HeldClock
    hubs: list[MemoryHub]
    tickets: list[HubTicket]


def play(scene: Callable[[World], Awaitable[None]], hubs: int = 1, offers_max: int = 100) -> None:
    async def on_stage() -> None:
        network, clock = MemoryNetwork(), HeldClock()
        made = [MemoryHub(network, a_key(100 + number), clock, offers_max) for number in range(hubs)]
        world = World(network, clock, made, [await hub.listen() for hub in made])
        try:
            async with asyncio.timeout(PATIENCE_S):
                await scene(world)
        finally:
            for hub in made:
                await hub.endpoint.close()

    asyncio.run(on_stage())


async def moving(clock: HeldClock, work: Coroutine[Any, Any, T], step_s: float = 0.002) -> T:
    """Move a held clock on until `work` is done."""
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.sleep(0)
        await clock.advance(step_s)
    return await task


def test_what_one_node_publishes_another_finds_with_the_proof() -> None:
    async def scene(world: World) -> None:
        async with (
            a_client(world.network.endpoint(HERON), world.tickets) as node,
            a_client(world.network.endpoint(WREN), world.tickets) as client,
        ):
            offer = an_offer(HERON, 1)
            kept = await node.publish(offer)
            assert kept == {world.tickets[0].node: OfferKept(sequence=1, lifetime_ms=60_000)}
            directory: Directory = client
            (found,) = await directory.find(OfferFind(accepts="train"))
            assert (found.node, found.envelope) == (HERON.node_id, offer)
            assert await client.find(OfferFind(accepts="serve")) == []

    play(scene)


def test_a_hub_says_who_it_is_and_how_many_it_knows() -> None:
    async def scene(world: World) -> None:
        async with a_client(world.network.endpoint(HERON), world.tickets) as node:
            await node.publish(an_offer(HERON, 1))
            info = (await node.info())[world.tickets[0].node]
            assert (info.name, info.offers, info.links, info.addresses) == ("hub", 1, 1, world.tickets[0].addresses)

    play(scene)


def test_a_link_to_a_hub_is_measured_from_the_time_its_probes_take() -> None:
    """On a path of 40 ms each way and 8 Mbit/s, in a time that only the network and the node share."""

    async def scene() -> None:
        clock = HeldClock()
        network = MemoryNetwork(clock, path=Path(delay_s=0.04, rate_bps=8e6))
        hub = MemoryHub(network, a_key(100), clock)
        client = HubClient(network.endpoint(HERON), [await hub.listen()], clock=clock, dice=SeededDice(1))

        await moving(clock, client.start())
        measured = (await moving(clock, client.measure_links()))[hub.endpoint.node_id]
        assert 80 <= measured.round_trip_ms <= 90
        assert 6e6 <= measured.rate_bps <= 8.2e6
        await moving(clock, client.close())
        await moving(clock, hub.endpoint.close())

    asyncio.run(scene())


def test_an_older_offer_is_refused_with_both_numbers_over_the_link() -> None:
    async def scene(world: World) -> None:
        async with a_client(world.network.endpoint(HERON), world.tickets) as node:
            await node.publish(an_offer(HERON, 5))
            with pytest.raises(Refused, match=r"Offer 3 .*offer 5") as refusal:
                await node.publish(an_offer(HERON, 3))
            assert refusal.value.remote_code == "SH-240"
            (found,) = await node.find(OfferFind())
            assert found.offer.sequence == 5

    play(scene)


def test_an_offer_under_a_forged_name_is_refused() -> None:
    async def scene(world: World) -> None:
        link = await world.network.endpoint(WREN).dial(world.tickets[0].node, world.tickets[0].addresses)
        forged = an_offer(WREN, 1).to_bytes().replace(WREN.node_id, HERON.node_id)
        with pytest.raises(Refused, match="signature") as refusal:
            await link.request(OfferPublish.KIND, encode(OfferPublish(offer=forged)))
        assert refusal.value.remote_code == "SH-202"
        with pytest.raises(Refused) as refusal:
            await link.request(OfferPublish.KIND, b"\xff" * 100)
        assert refusal.value.remote_code == "SH-210"
        assert await world.hubs[0].index.count() == 0

    play(scene)


def test_one_peer_cannot_flood_and_others_are_served_meanwhile() -> None:
    async def scene(world: World) -> None:
        async with (
            a_client(world.network.endpoint(HERON), world.tickets) as node,
            a_client(world.network.endpoint(WREN), world.tickets) as other,
        ):
            for sequence in range(PUBLISH_BURST):
                await node.publish(an_offer(HERON, sequence))
            with pytest.raises(Refused, match="too often") as refusal:
                await node.publish(an_offer(HERON, 1000))
            assert refusal.value.remote_code == "SH-333"
            await other.publish(an_offer(WREN, 1))
            await world.clock.advance(1)
            await node.publish(an_offer(HERON, 1001))
            for _ in range(FIND_BURST):
                await node.find(OfferFind())
            with pytest.raises(NoHub, match="too often"):
                await node.find(OfferFind())

    play(scene)


def test_a_search_whose_answer_is_large_comes_in_pages() -> None:
    async def scene(world: World) -> None:
        padding = tuple("tcp://" + "x" * 120 for _ in range(8))
        size = len(an_offer(HERON, 1, addresses=padding).to_bytes())
        count = FOUND_BYTES_MAX // size + 2
        index = world.hubs[0].index
        keys = [KeyPair.from_seed(number.to_bytes(32, "big")) for number in range(1, count + 1)]
        for key in keys:
            await index.keep(
                Arrival.open(an_offer(key, 1, addresses=padding).to_bytes(), key.node_id, key.node_id.hex())
            )
        async with a_client(world.network.endpoint(WREN), world.tickets) as client:
            seen: list[bytes] = []
            while page := await client.find(OfferFind(limit=256, after=seen[-1] if seen else None)):
                seen += [found.node for found in page]
            assert seen == sorted(key.node_id for key in keys)

    play(scene, offers_max=2000)


def test_keys_that_cost_nothing_search_no_more_at_once_than_one_address_may() -> None:
    async def scene(world: World) -> None:
        hub, ticket = world.hubs[0], world.tickets[0]
        gate, searching = asyncio.Event(), 0
        find = hub.index.find

        async def slow(wanted: OfferFind) -> Any:
            nonlocal searching
            searching += 1
            await gate.wait()
            return await find(wanted)

        hub.index.find = slow  # type: ignore[method-assign]
        flood = await world.network.endpoint(STORK).dial(ticket.node, ticket.addresses)
        honest = await world.network.endpoint(WREN).dial(ticket.node, ticket.addresses)

        async def search(link: Link) -> bytes:
            return await link.request(OfferFind.KIND, encode(OfferFind()))

        under_way = [asyncio.create_task(search(flood)) for _ in range(FINDS_PER_SOURCE)]
        while searching < FINDS_PER_SOURCE:
            await asyncio.sleep(0)
        with pytest.raises(Refused, match="8 searches from your address") as refusal:
            await search(flood)
        assert refusal.value.remote_code == "SH-332"
        asking = asyncio.create_task(search(honest))
        while searching == FINDS_PER_SOURCE:
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*under_way, asking)
        await search(flood)

    play(scene)


# ---- introductions ----


def test_a_node_that_accepts_no_links_is_reached_through_the_hub() -> None:
    async def scene(world: World) -> None:
        hidden, seeker = world.network.endpoint(HERON), world.network.endpoint(WREN)
        arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        async with a_client(hidden, world.tickets) as node, a_client(seeker, world.tickets) as client:
            seeker.on_link(lambda link: arrived.set_result(link.peer))
            node.answer_introductions()
            address = await seeker.listen("tcp://seeker:0")
            await client.introduce(HERON.node_id, [address])
            assert await arrived == HERON.node_id

    play(scene)


def test_an_introduction_to_a_node_nobody_holds_is_refused_by_name() -> None:
    async def scene(world: World) -> None:
        async with a_client(world.network.endpoint(WREN), world.tickets) as client:
            with pytest.raises(NoIntroduction, match=f"{STORK.node_id.hex()[:8]}.*no open link"):
                await client.introduce(STORK.node_id, ["tcp://wren:1"])

    play(scene)


def test_a_hub_names_who_asked_and_nobody_else() -> None:
    async def scene(world: World) -> None:
        node, seeker = world.network.endpoint(HERON), world.network.endpoint(WREN)
        asked: list[DialMe] = []

        async def note(request: Request) -> bytes:
            asked.append(decode(DialMe, request.body))
            return b"\x80"

        node.handle(DialMe.KIND, note)
        async with a_client(node, world.tickets), a_client(seeker, world.tickets) as client:
            await client.introduce(HERON.node_id, ["tcp://wren:1"])
        assert asked == [DialMe(node=WREN.node_id, addresses=("tcp://wren:1",))]

    play(scene)


def test_only_a_hub_of_its_own_can_make_a_node_dial() -> None:
    async def scene(world: World) -> None:
        endpoint, stranger = world.network.endpoint(HERON), world.network.endpoint(STORK)
        async with a_client(endpoint, world.tickets) as node:
            node.answer_introductions()
            link = await stranger.dial(HERON.node_id, [await endpoint.listen("tcp://heron:0")])
            with pytest.raises(Refused, match="not a hub"):
                await link.request(DialMe.KIND, encode(DialMe(node=WREN.node_id, addresses=("tcp://wren:1",))))

    play(scene)


def test_the_second_hub_is_asked_when_the_first_does_not_hold_the_node() -> None:
    async def scene(world: World) -> None:
        hidden, seeker = world.network.endpoint(HERON), world.network.endpoint(WREN)
        arrived = asyncio.Event()
        async with a_client(hidden, world.tickets[1:]) as node, a_client(seeker, world.tickets) as client:
            await client.info()
            seeker.on_link(lambda link: arrived.set())
            node.answer_introductions()
            address = await seeker.listen("tcp://seeker:0")
            watched = {world.tickets[0].node, world.tickets[1].node}
            while not watched <= set(seeker.links()):
                await asyncio.sleep(0)
            while sum(state.up for state in client.states()) < 2:
                await asyncio.sleep(0)
            await client.introduce(HERON.node_id, [address])
            await arrived.wait()

    play(scene, hubs=2)


# ---- several hubs ----


def test_offers_of_several_hubs_are_merged_and_the_newest_counts() -> None:
    async def scene(world: World) -> None:
        both, watcher = world.tickets, Watcher()
        async with (
            a_client(world.network.endpoint(HERON), both[:1]) as old,
            a_client(world.network.endpoint(STORK), both[1:]) as other,
            a_client(world.network.endpoint(WREN), both, watcher=watcher) as client,
        ):
            await watcher.until(2, up=True)
            await old.publish(an_offer(HERON, 1))
            await other.publish(an_offer(STORK, 1))
            link = await world.network.endpoint(a_key(9)).dial(both[1].node, both[1].addresses)
            newer = an_offer(HERON, 2, busy=True)
            await link.request(OfferPublish.KIND, encode(OfferPublish(offer=newer.to_bytes())))
            found = await client.find(OfferFind())
            assert [(one.node, one.offer.sequence) for one in found] == sorted([(HERON.node_id, 2), (STORK.node_id, 1)])
            assert len(await client.find(OfferFind(limit=1))) == 1

    play(scene, hubs=2)


def test_an_offer_that_comes_again_is_not_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.hub.client.VERIFIED_MAX", 2)

    async def scene(world: World) -> None:
        async with (
            a_client(world.network.endpoint(HERON), world.tickets) as node,
            a_client(world.network.endpoint(WREN), world.tickets) as client,
        ):

            async def find() -> FoundOffer:
                (found,) = await client.find(OfferFind())
                return found

            await node.publish(an_offer(HERON, 1))
            first = await find()
            assert await find() is first
            for sequence in (2, 3):
                await node.publish(an_offer(HERON, sequence))
                assert (await find()).offer.sequence == sequence
            assert len(client._verified_offers) == 2

    play(scene)


def test_one_lost_hub_changes_nothing_and_it_is_found_again_with_the_offer() -> None:
    async def scene(world: World) -> None:
        clock, watcher = HeldClock(), Watcher()
        async with a_client(world.network.endpoint(HERON), world.tickets, clock, watcher) as node:
            await watcher.until(2, up=True)
            assert len(await node.publish(an_offer(HERON, 1))) == 2
            first = world.hubs[0].endpoint
            world.network.cut(first.node_id, HERON.node_id)
            await watcher.until(1, up=False)
            assert [state.up for state in node.states()] == [False, True]
            assert [found.node for found in await node.find(OfferFind())] == [HERON.node_id]
            assert list(await node.publish(an_offer(HERON, 2))) == [world.tickets[1].node]
            world.network.heal(first.node_id, HERON.node_id)
            await clock.advance(BACKOFF_LAST_S)
            await watcher.until(3, up=True)
            index = world.hubs[0].index
            while (kept := await index.get(HERON.node_id)) is None or kept.offer.sequence < 2:
                await asyncio.sleep(0)

    play(scene, hubs=2)


def test_a_hub_that_is_not_there_is_named_and_tried_again_until_it_comes() -> None:
    async def scene(world: World) -> None:
        clock, watcher = HeldClock(), Watcher()
        late = MemoryHub(world.network, a_key(50), world.clock)
        ticket = HubTicket(late.endpoint.node_id, ("tcp://late:7",))
        async with a_client(world.network.endpoint(HERON), [ticket], clock, watcher) as node:
            with pytest.raises(NoHub, match=f"{ticket.node.hex()[:8]} at tcp://late:7"):
                await node.publish(an_offer(HERON, 1))
            with pytest.raises(NoHub, match="The hub named cannot be used"):
                await node.find(OfferFind())
            with pytest.raises(NoHub):
                await node.introduce(STORK.node_id, ["tcp://heron:1"])
            await late.listen("tcp://late:7")
            await clock.advance(1)
            await watcher.until(1, up=True)
            while await late.index.get(HERON.node_id) is None:
                await asyncio.sleep(0)
        await late.endpoint.close()

    play(scene, hubs=0)


def test_a_client_without_hubs_says_what_to_do() -> None:
    async def scene(world: World) -> None:
        async with a_client(world.network.endpoint(HERON), []) as client:
            with pytest.raises(NoHub, match="shoal hub"):
                await client.find(OfferFind())

    play(scene, hubs=0)


def test_an_offer_is_renewed_while_its_node_lives_and_expires_after() -> None:
    async def scene(world: World) -> None:
        node_clock = HeldClock()
        index = world.hubs[0].index
        async with a_client(world.network.endpoint(HERON), world.tickets, node_clock) as node:
            await node.publish(an_offer(HERON, 1, lifetime_ms=60_000))
            for _ in range(6):
                before = await index.get(HERON.node_id)
                await world.clock.advance(20)
                await node_clock.advance(20)
                while await index.get(HERON.node_id) == before:
                    await asyncio.sleep(0)
            assert await index.count() == 1
        await world.clock.advance(60)
        assert await index.count() == 0

    play(scene)


def test_a_node_is_told_when_another_one_publishes_with_its_key() -> None:
    async def scene(world: World) -> None:
        clock, told = HeldClock(), asyncio.Event()
        refusals: list[str] = []

        def refused(ticket: HubTicket, error: Refused) -> None:
            refusals.append(str(error))
            told.set()

        client = HubClient(
            world.network.endpoint(HERON), world.tickets, clock=clock, dice=SeededDice(1), on_refused=refused
        )
        await client.start()
        await client.publish(an_offer(HERON, 1, name="heron"))
        carrier = await world.network.endpoint(WREN).dial(world.tickets[0].node, world.tickets[0].addresses)
        twin = an_offer(HERON, 2, name="twin").to_bytes()
        await carrier.request(OfferPublish.KIND, encode(OfferPublish(offer=twin)))
        await clock.advance(20)
        await told.wait()
        assert "Offer 1" in refusals[0]
        assert "copy of your key file" in refusals[0]
        await client.close()

    play(scene)


def test_an_offer_that_a_full_hub_refused_is_given_again_when_it_has_room() -> None:
    async def scene(world: World) -> None:
        clock = world.clock
        carrier = await world.network.endpoint(WREN).dial(world.tickets[0].node, world.tickets[0].addresses)
        short = an_offer(WREN, 1, lifetime_ms=30_000).to_bytes()
        await carrier.request(OfferPublish.KIND, encode(OfferPublish(offer=short)))
        node = HubClient(world.network.endpoint(HERON), world.tickets, clock=clock, dice=SeededDice(1))
        await node.start()
        with pytest.raises(Refused, match="may keep no more"):
            await node.publish(an_offer(HERON, 1))
        while not await node.find(OfferFind(node=HERON.node_id)):
            await clock.advance(10)
        await node.close()

    play(scene, offers_max=1)


def test_what_a_lying_hub_sends_is_left_out() -> None:
    async def scene(world: World) -> None:
        liar = world.network.endpoint(a_key(66))
        good = an_offer(HERON, 1)
        forged = an_offer(WREN, 1).to_bytes().replace(WREN.node_id, STORK.node_id)

        async def lie(request: Request) -> bytes:
            busy = an_offer(STORK, 1, busy=True).to_bytes()
            return encode(OffersFound(offers=(forged, b"no record", busy, good.to_bytes()), more=True))

        liar.handle(OfferFind.KIND, lie)
        ticket = HubTicket(liar.node_id, (await liar.listen("tcp://liar:0"),))
        async with a_client(world.network.endpoint(WREN), [ticket]) as client:
            found = await client.find(OfferFind(idle_only=True, limit=1))
            assert [one.envelope for one in found] == [good]
        await liar.close()

    play(scene, hubs=0)


def test_a_hub_that_answers_page_by_page_for_ever_holds_no_search_up() -> None:
    async def scene() -> None:
        clock = HeldClock()
        network = MemoryNetwork(clock)
        good, slow = MemoryHub(network, a_key(100), clock), network.endpoint(a_key(66))
        await good.index.keep(Arrival.open(an_offer(HERON, 1).to_bytes(), HERON.node_id, "?"))
        pages = sorted(
            (KeyPair.from_seed(bytes((number, 1)) * 16) for number in range(100)), key=lambda key: key.node_id
        )

        async def drip(request: Request) -> bytes:
            after = decode(OfferFind, request.body).after or b""
            await clock.sleep(4)
            offer = next(an_offer(key, 1) for key in pages if key.node_id > after)
            return encode(OffersFound(offers=(offer.to_bytes(),), more=True))

        slow.handle(OfferFind.KIND, drip)
        tickets = [HubTicket(slow.node_id, (await slow.listen("tcp://slow:0"),)), await good.listen()]
        client = HubClient(network.endpoint(WREN), tickets, clock=clock, dice=SeededDice(1))
        await moving(clock, client.start())
        while not all(state.up for state in client.states()):
            await moving(clock, asyncio.sleep(0))
        begun = clock.monotonic()
        found = await moving(clock, client.find(OfferFind(limit=256)), 0.5)
        assert FIND_DEADLINE_S - 4 <= clock.monotonic() - begun <= FIND_DEADLINE_S + 1
        assert {one.node for one in found} == {HERON.node_id, *(key.node_id for key in pages[:3])}
        assert "not answer" in client.states()[0].trouble
        for ending in (client.close(), good.endpoint.close(), slow.close()):
            await moving(clock, ending, 0.5)

    asyncio.run(scene())


def test_a_hub_that_is_busy_is_asked_again() -> None:
    async def scene(world: World) -> None:
        clock, asked = HeldClock(), 0
        busy = world.network.endpoint(a_key(66))

        async def answer(request: Request) -> bytes:
            nonlocal asked
            asked += 1
            if asked < 3:
                raise HubBusy("This hub has 32 searches waiting for its database; try again in a moment.")
            return encode(OffersFound(offers=(an_offer(HERON, 1).to_bytes(),)))

        busy.handle(OfferFind.KIND, answer)
        ticket = HubTicket(busy.node_id, (await busy.listen("tcp://busy:0"),))
        async with a_client(world.network.endpoint(WREN), [ticket], clock) as client:
            found = await moving(clock, client.find(OfferFind()), 0.01)
            assert [one.node for one in found] == [HERON.node_id] and asked == 3
            asked = -10_000
            with pytest.raises(NoHub, match="32 searches waiting"):
                await moving(clock, client.find(OfferFind()), 0.1)
        await busy.close()

    play(scene, hubs=0)


def test_waiting_between_dials_grows_to_a_bound_and_differs_between_nodes() -> None:
    waits = [backoff_s(failures, SeededDice(3)) for failures in range(100)]
    assert all(0.25 <= wait <= BACKOFF_LAST_S for wait in waits)
    assert waits[0] < waits[3] < waits[6]
    assert waits[10] == waits[99]
    assert backoff_s(8, SeededDice(1)) != backoff_s(8, SeededDice(2))


def test_too_many_hubs_are_refused() -> None:
    endpoint = MemoryNetwork().endpoint(HERON)
    tickets = [HubTicket(a_key(number).node_id, ("tcp://a:1",)) for number in range(1, 18)]
    with pytest.raises(LinkError, match="17 hubs"):
        HubClient(endpoint, tickets, clock=HeldClock(), dice=SeededDice(1))
