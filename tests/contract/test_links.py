"""What every implementation of the network port does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from link_worlds import WORLDS, Fountain, World, breathe, echo, key, linked, play, running, settle, until

from shoal.errors import BadInput
from shoal.transport import BadAddress, BodyTooLarge, EndpointClosed, EndpointLimits, Limits
from shoal.world import DeadlineExceeded, Link, LinkLost, Refused, ReplyTooLarge, Request, Unreachable


@pytest.fixture(params=WORLDS.values(), ids=WORLDS.keys())
def make_world(request: pytest.FixtureRequest) -> Callable[[], World]:
    return request.param  # type: ignore[no-any-return]


MakeWorld = Callable[[], World]


# --- dialling


def test_both_sides_know_each_other_and_either_may_ask(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, far = await linked(world)
        assert (near.peer, far.peer) == (key(1).node_id, key(2).node_id)
        assert await near.request("echo", b"there") == b"there"
        assert await far.request("echo", b"and back") == b"and back"

    play(make_world, scene)


def test_a_handler_sees_who_asks_and_may_ask_back(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        async def ask_back(request: Request) -> bytes:
            assert request.peer == key(2).node_id and request.version == 1 and request.kind == "ask-back"
            return await request.link.request("echo", request.body + b"!")

        near, _ = await linked(world)
        world.endpoints[0].handle("ask-back", ask_back)
        assert await near.request("ask-back", b"hello") == b"hello!"

    play(make_world, scene)


def test_the_open_link_is_used_again_and_dials_at_once_share_one_attempt(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        one, address = await world.listening(1)
        other = world.endpoint(2)
        came: list[Link] = []
        accepted: list[Link] = []
        other.on_link(came.append)
        one.on_link(accepted.append)
        links = await asyncio.gather(*(other.dial(one.node_id, [address]) for _ in range(10)))
        assert all(link is links[0] for link in links)
        assert await other.dial(one.node_id, []) is links[0]
        await settle(links[0], 3)
        assert came == [links[0]] and [link.peer for link in accepted] == [other.node_id]
        assert dict(other.links()) == {one.node_id: links[0]}
        # the answering side finds the link under its peer, too, and needs no address for it
        assert (await one.dial(other.node_id, [])) is accepted[0]

    play(make_world, scene)


def test_hints_that_lead_nowhere_or_to_somebody_else_are_passed_over(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        one, address = await world.listening(1)
        _, elsewhere = await world.listening(3)
        gone, nobody = await world.listening(4)
        await gone.close()
        other = world.endpoint(2)
        link = await other.dial(one.node_id, [nobody, elsewhere, "tcp://no-port", address])
        assert await link.request("echo", b"found") == b"found"

    play(make_world, scene)


@pytest.mark.parametrize(
    "wrong", ["tcp://a..b:1", f"tcp://{'a' * 64}.b:1", "tcp://a\0b:1", "tcp://[::1%\0]:1", "tcp://é:1"]
)
def test_an_address_that_no_resolver_can_read_is_a_hint_like_any_other(make_world: MakeWorld, wrong: str) -> None:
    """Addresses stand in records that strangers sign: none of them may do more than lead nowhere."""

    async def scene(world: World) -> None:
        one, address = await world.listening(1)
        other = world.endpoint(2)
        link = await other.dial(one.node_id, [wrong, address])
        assert await link.request("echo", b"found") == b"found"
        with pytest.raises(Unreachable, match="is not an address"):
            await other.dial(key(3).node_id, [wrong])

    play(make_world, scene)


def test_whatever_a_resolver_makes_of_a_name_is_said_and_harms_nobody(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        other = world.endpoint(2)

        async def look_up(node: bytes, hint: str) -> Link:
            raise UnicodeError("label too long")

        other._connect = look_up  # type: ignore[method-assign, assignment]
        with pytest.raises(Unreachable, match="tcp://odd:1: label too long"):
            await other.dial(key(1).node_id, ["tcp://odd:1"])

    play(make_world, scene)


def test_a_peer_that_cannot_be_reached_is_said_to_be_so_with_every_reason(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        _, elsewhere = await world.listening(3)
        gone, nobody = await world.listening(4)
        await gone.close()
        other = world.endpoint(2)
        with pytest.raises(Unreachable, match="No address is known"):
            await other.dial(key(1).node_id, [])
        with pytest.raises(Unreachable, match="node itself"):
            await other.dial(other.node_id, [elsewhere])
        with pytest.raises(Unreachable) as caught:
            await other.dial(key(1).node_id, [nobody, elsewhere, "tcp://no-port"])
        sentence = str(caught.value)
        assert nobody in sentence
        assert f"{elsewhere}: {key(3).node_id.hex()[:8]} answered there, not {key(1).node_id.hex()[:8]}" in sentence
        assert "'tcp://no-port' is not an address" in sentence
        assert not other.links()

    play(make_world, scene)


def test_nodes_that_dial_each_other_at_once_have_one_link_and_lose_no_request(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        one, first = await world.listening(1)
        other, second = await world.listening(2)
        for attempt in range(8):
            came: list[Link] = []
            near, far = await asyncio.gather(
                _dial_and_ask(one, other.node_id, second, attempt % 5),
                _dial_and_ask(other, one.node_id, first, attempt % 3),
            )
            one.on_link(came.append)
            assert one.links() == {other.node_id: near}
            assert other.links() == {one.node_id: far}
            for _ in range(1000):
                if len(one._connections) == len(other._connections) == 1:
                    break
                await near.request("echo", b"")
                await far.request("echo", b"")
            assert len(one._connections) == len(other._connections) == 1
            assert await near.request("echo", b"1") == b"1"
            assert await far.request("echo", b"2") == b"2"
            assert not came
            await near.close()
            await far.wait_closed()
            await until(lambda: not one._connections and not other._connections)

    async def _dial_and_ask(endpoint: object, node: bytes, address: str, pause: int) -> Link:
        for _ in range(pause):
            await asyncio.sleep(0)
        link: Link = await endpoint.dial(node, [address])  # type: ignore[attr-defined]
        assert await asyncio.gather(*(link.request("echo", bytes([n])) for n in range(50))) == [
            bytes([n]) for n in range(50)
        ]
        return link

    play(make_world, scene)


def test_dialling_has_a_deadline(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        other = world.endpoint(2)

        async def never(node: bytes, hint: str) -> Link:
            await asyncio.Event().wait()
            raise AssertionError

        other._connect = never  # type: ignore[method-assign, assignment]
        async with running(other.dial(key(1).node_id, ["tcp://127.0.0.1:9"], deadline_s=5)) as dialling:
            await breathe()
            await world.clock.advance(4.9)
            assert not dialling.done()
            await world.clock.advance(0.2)
            with pytest.raises(Unreachable, match="within 5 s"):
                await dialling
        assert not other._dialling

    play(make_world, scene)


@pytest.mark.parametrize(
    ("ours", "theirs", "spoken"), [((1, 1), (1, 2), 1), ((1, 2), (2, 3), 2), ((1, 2), (1, 2), 2), ((2, 3), (1, 2), 2)]
)
def test_neighbouring_versions_agree_on_the_newest_they_share(
    make_world: MakeWorld, ours: tuple[int, int], theirs: tuple[int, int], spoken: int
) -> None:
    async def scene(world: World) -> None:
        one, address = await world.listening(1, versions=theirs)
        other = world.endpoint(2, versions=ours)
        seen: list[int] = []

        async def note(request: Request) -> bytes:
            seen.append(request.version)
            return b""

        one.handle("note", note)
        link = await other.dial(one.node_id, [address])
        await link.request("note", b"")
        assert seen == [spoken] and link.version == spoken

    play(make_world, scene)


def test_versions_without_a_neighbour_are_told_so(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        one, address = await world.listening(1, versions=(3, 4))
        other = world.endpoint(2, versions=(1, 2))
        with pytest.raises(Unreachable, match="speaks protocol 1 to 2, the other 3 to 4; update the older"):
            await other.dial(one.node_id, [address])

    play(make_world, scene)


def test_nodes_of_different_networks_do_not_link(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        one, address = await world.listening(1, network="trial")
        other = world.endpoint(2)
        with pytest.raises(Unreachable, match="belongs to the network 'trial', this node to 'shoal'"):
            await other.dial(one.node_id, [address])
        assert not one.links()

    play(make_world, scene)


# --- one node per key


def test_a_second_machine_with_the_same_key_is_told_so_and_the_first_goes_on(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, far = await linked(world)
        hub = world.endpoints[0]
        twin = world.endpoint(2)
        with pytest.raises(Unreachable, match="Another running node has the same key") as caught:
            await twin.dial(hub.node_id, list(hub.addresses))
        assert "SH-317" in str(caught.value)
        assert await near.request("echo", b"on") == b"on"
        assert hub.links() == {near.peer == hub.node_id and far.peer: far}

    play(make_world, scene)


def test_a_node_that_meets_its_own_key_says_so(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        one, address = await world.listening(1)
        _, twin_address = await world.listening(1)
        other = world.endpoint(2)
        # through two addresses that lead to two machines with one key
        await other.dial(one.node_id, [address])
        assert await other.dial(one.node_id, [twin_address]) is other.links()[one.node_id]
        twin = world.endpoint(1)
        twin_as_dialler = twin._dial_hints(one.node_id, [address])
        with pytest.raises(Unreachable, match="with the same key"):
            await twin_as_dialler

    play(make_world, scene)


def test_a_node_that_was_started_again_is_welcome(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, far = await linked(world)
        hub, first = world.endpoints
        await first.close()
        assert "stopping" in await far.wait_closed()
        again = world.endpoint(2)
        link = await again.dial(hub.node_id, list(hub.addresses))
        assert await link.request("echo", b"back") == b"back"
        assert near.closed and not link.closed

    play(make_world, scene)


# --- requests


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, 16 * 1024 + 1, 300_000, 8 * 1024 * 1024])
def test_bodies_of_every_size_arrive_whole(make_world: MakeWorld, size: int) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        body = (bytes(range(251)) * (size // 251 + 1))[:size]
        assert await near.request("echo", body, reply_max_bytes=size) == body

    play(make_world, scene)


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        with pytest.raises(BodyTooLarge):
            await near.request("echo", bytes(8 * 1024 * 1024 + 1))
        assert await near.request("echo", b"") == b""

    play(make_world, scene)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.one_of(st.integers(0, 100), st.integers(10_000, 60_000)), min_size=1, max_size=40))
@example(sizes=[10_000, 10_000, 12_598, 16_384, 16_384, 16_385])  # a body behind more small frames than go at once
@pytest.mark.parametrize("world", WORLDS)
def test_requests_at_once_each_get_their_own_reply(world: str, sizes: list[int]) -> None:
    async def scene(made: World) -> None:
        near, far = await linked(made)
        bodies = [bytes([number]) * size for number, size in enumerate(sizes)]
        replies = await asyncio.gather(
            *(link.request("echo", body) for link in (near, far) for body in bodies),
        )
        assert replies == bodies + bodies

    play(WORLDS[world], scene)


def test_more_requests_than_there_are_places_wait_for_one(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world, limits=EndpointLimits(connection=Limits(requests=3, bulk=2, large_bodies=1)))
        running_now = most = 0

        async def count(request: Request) -> bytes:
            nonlocal running_now, most
            running_now += 1
            most = max(most, running_now)
            await asyncio.sleep(0)
            running_now -= 1
            return request.body

        world.endpoints[0].handle("count", count)
        bodies = [bytes([n]) * (40_000 if n % 5 == 0 else 10) for n in range(60)]
        assert await asyncio.gather(*(near.request("count", body) for body in bodies)) == bodies
        assert 1 < most <= 3

    play(make_world, scene)


def test_a_request_has_a_deadline_and_its_handler_is_stopped(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        begun, stopped = asyncio.Event(), asyncio.Event()

        async def never(request: Request) -> bytes:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()
            return b""

        world.endpoints[0].handle("never", never)
        async with running(near.request("never", b"", deadline_s=3)) as asking:
            await begun.wait()
            await world.clock.advance(2.9)
            assert not asking.done()
            await world.clock.advance(0.2)
            with pytest.raises(DeadlineExceeded, match="did not answer never within 3 s"):
                await asking
        await stopped.wait()
        assert await near.request("echo", b"on") == b"on"

    play(make_world, scene)


def test_waiting_for_a_place_counts_against_the_deadline(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world, limits=EndpointLimits(connection=Limits(requests=1)))
        gate = asyncio.Event()

        async def hold(request: Request) -> bytes:
            await gate.wait()
            return b"held"

        world.endpoints[0].handle("hold", hold)
        async with running(near.request("hold", b"", deadline_s=100)) as first:
            await breathe()
            async with running(near.request("echo", b"", deadline_s=2)) as second:
                await breathe()
                await world.clock.advance(2.1)
                with pytest.raises(DeadlineExceeded):
                    await second
            gate.set()
            assert await first == b"held"
        assert await near.request("echo", b"free") == b"free"

    play(make_world, scene)


def test_a_caller_that_is_cancelled_stops_the_handler(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        begun, stopped = asyncio.Event(), asyncio.Event()

        async def never(request: Request) -> bytes:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()
            return b""

        world.endpoints[0].handle("never", never)
        async with running(near.request("never", b"")):
            await begun.wait()
        await stopped.wait()

    play(make_world, scene)


def test_refusals_carry_code_and_sentence_and_bugs_do_not_leak(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)

        async def refuse(request: Request) -> bytes:
            raise BadInput("Seven is not a colour.\x1b[31m" + "é" * 2000)

        async def break_down(request: Request) -> bytes:
            raise KeyError("/home/alice/secret")

        async def break_midway(request: Request) -> AsyncIterator[bytes]:
            async def flow() -> AsyncIterator[bytes]:
                yield b"some"
                raise BadInput("The rest is gone.")

            return flow()

        for kind, handler in (("refuse", refuse), ("break", break_down), ("midway", break_midway)):
            world.endpoints[0].handle(kind, handler)
        with pytest.raises(Refused) as caught:
            await near.request("refuse", b"")
        assert caught.value.remote_code == BadInput.code
        assert str(caught.value).startswith("Seven is not a colour. [31m") and len(str(caught.value)) <= 600
        with caplog.at_level(logging.CRITICAL, logger="shoal.transport"), pytest.raises(Refused) as caught:
            await near.request("break", b"")
        assert "alice" not in str(caught.value) and caught.value.remote_code == "SH-315"
        with pytest.raises(Refused, match="does not answer nothing requests"):
            await near.request("nothing", b"")
        got = b""
        with pytest.raises(Refused, match="The rest is gone"):
            async with near.stream("midway", b"", max_bytes=100) as chunks:
                async for chunk in chunks:
                    got += chunk
        assert got in (b"", b"some")
        assert await near.request("echo", b"on") == b"on"

    play(make_world, scene)


def test_a_reply_is_no_larger_than_was_asked_for(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        fountain = Fountain(10, 1000)
        world.endpoints[0].handle("fountain", fountain)
        for size in (101, 20_000):
            with pytest.raises(ReplyTooLarge):
                await near.request("echo", bytes(size), reply_max_bytes=100)
        with pytest.raises(ReplyTooLarge):
            await near.request("fountain", b"", reply_max_bytes=9999)
        assert await near.request("fountain", b"", reply_max_bytes=10_000) == fountain.whole()
        with pytest.raises(ReplyTooLarge):
            async with near.stream("fountain", b"", max_bytes=9999) as chunks:
                async for _ in chunks:
                    pass
        assert await near.request("echo", b"on") == b"on"

    play(make_world, scene)


# --- streams


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.one_of(st.integers(0, 5000), st.sampled_from([65536, 262144, 300_001])), max_size=20))
@pytest.mark.parametrize("world", WORLDS)
def test_a_stream_arrives_whole_and_in_order(world: str, sizes: list[int]) -> None:
    async def scene(made: World) -> None:
        chunks_sent = [bytes([number % 256]) * size for number, size in enumerate(sizes)]

        async def flow(request: Request) -> AsyncIterator[bytes]:
            async def chunks() -> AsyncIterator[bytes]:
                for chunk in chunks_sent:
                    yield chunk

            return chunks()

        near, _ = await linked(made)
        made.endpoints[0].handle("flow", flow)
        got = bytearray()
        async with near.stream("flow", b"", max_bytes=sum(sizes)) as chunks:
            async for chunk in chunks:
                assert isinstance(chunk, bytes) and chunk
                got += chunk
        assert bytes(got) == b"".join(chunks_sent)

    play(WORLDS[world], scene)


def test_a_plain_reply_can_be_read_as_a_stream(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        for size in (0, 5, 200_000):
            async with near.stream("echo", bytes(size), max_bytes=size) as chunks:
                assert len(b"".join([chunk async for chunk in chunks])) == size

    play(make_world, scene)


def test_a_reader_that_stands_still_stops_the_writer_and_nobody_else(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        window = 256 * 1024
        near, far = await linked(world, limits=EndpointLimits(connection=Limits(window_bytes=window)))
        fountain = Fountain(chunks=512)  # 32 MiB
        other = Fountain(chunks=64)
        world.endpoints[0].handle("fountain", fountain)
        world.endpoints[0].handle("other", other)
        async with near.stream("fountain", b"", max_bytes=1 << 30) as chunks:
            first = await anext(chunks)
            await settle(near, 200)
            # the window, what waits to be sent, and the chunk in the handler's hand
            assert fountain.given_bytes <= window + 256 * 1024 + 2 * fountain.size
            assert await near.request("fountain", b"", reply_max_bytes=1 << 30) == fountain.whole()
            async with near.stream("other", b"", max_bytes=1 << 30) as more:
                assert b"".join([chunk async for chunk in more]) == other.whole()
            assert await far.request("echo", b"on") == b"on"
            assert first + b"".join([chunk async for chunk in chunks]) == fountain.whole()

    play(make_world, scene)


def test_leaving_a_stream_early_stops_its_handler(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        fountain = Fountain(chunks=100_000)
        world.endpoints[0].handle("fountain", fountain)
        async with near.stream("fountain", b"", max_bytes=1 << 40) as chunks:
            await anext(chunks)
        await fountain.over.wait()
        assert fountain.given_bytes < 100_000 * fountain.size
        assert await near.request("echo", b"on") == b"on"

    play(make_world, scene)


def test_a_stream_that_stalls_is_given_up_and_a_slow_reader_is_not_blamed_on_it(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        gate = asyncio.Event()

        async def stall(request: Request) -> AsyncIterator[bytes]:
            async def flow() -> AsyncIterator[bytes]:
                yield b"one"
                await gate.wait()
                yield b"two"
                await asyncio.Event().wait()

            return flow()

        world.endpoints[0].handle("stall", stall)
        async with near.stream("stall", b"", stall_s=5, max_bytes=100) as chunks:
            assert await anext(chunks) == b"one"
            await world.clock.advance(8)  # the reader is busy elsewhere for longer than the stall
            await settle(near, 3)
            gate.set()
            assert await anext(chunks) == b"two"
            async with running(anext(chunks)) as reading:  # type: ignore[arg-type]
                await breathe()
                await world.clock.advance(4.9)
                assert not reading.done()
                await world.clock.advance(0.2)
                with pytest.raises(DeadlineExceeded, match="within 5 s"):
                    await reading

    play(make_world, scene)


def test_small_requests_go_ahead_of_bulk_that_is_waiting(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        fountain = Fountain(chunks=2000)  # 125 MiB
        world.endpoints[0].handle("fountain", fountain)
        got = 0

        async def pull() -> None:
            nonlocal got
            async with near.stream("fountain", b"", max_bytes=1 << 40) as chunks:
                async for chunk in chunks:
                    got += len(chunk)

        async with running(pull()) as pulling:
            await until(lambda: got)
            for _ in range(20):
                await near.request("echo", b"small")
            assert got < 2000 * fountain.size, "twenty small requests waited until all bulk was through"
            await pulling
        assert got == 2000 * fountain.size

    play(make_world, scene)


# --- ends


def test_a_link_that_closes_ends_what_is_under_way_with_a_reason_on_both_sides(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, far = await linked(world)
        begun, stopped = asyncio.Event(), asyncio.Event()

        async def never(request: Request) -> bytes:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()
            return b""

        for endpoint in world.endpoints:
            endpoint.handle("never", never)
        async with running(near.request("never", b"")) as asking, running(far.request("never", b"")) as answering:
            await begun.wait()
            await near.close("the shop is shut")
            with pytest.raises(LinkLost, match="the shop is shut"):
                await asking
            with pytest.raises(LinkLost, match="the shop is shut"):
                await answering
        await stopped.wait()
        assert "the shop is shut" in await far.wait_closed()
        assert await near.wait_closed() == "the shop is shut"
        assert near.closed and far.closed
        assert not world.endpoints[0].links() and not world.endpoints[1].links()
        with pytest.raises(LinkLost):
            await near.request("echo", b"")
        with pytest.raises(LinkLost):
            async with near.stream("echo", b"", max_bytes=1):
                pass
        again = await world.endpoints[1].dial(near.peer, list(world.endpoints[0].addresses))
        assert await again.request("echo", b"anew") == b"anew"

    play(make_world, scene)


def test_an_endpoint_that_closes_tells_its_peers_and_takes_no_more(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, far = await linked(world)
        hub, node = world.endpoints
        address = hub.addresses[0]
        await hub.close()
        assert "the node is stopping" in await near.wait_closed()
        assert far.closed and not hub.addresses
        with pytest.raises(Unreachable):
            await node.dial(hub.node_id, [address])
        for refused in (hub.dial(node.node_id, [address]), hub.listen("tcp://127.0.0.1:0")):
            with pytest.raises(EndpointClosed):
                await refused

    play(make_world, scene)


def test_on_a_full_endpoint_the_longest_idle_link_makes_way_and_none_that_is_in_use(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        hub, address = await world.listening(1, limits=EndpointLimits(links=8))
        gate = asyncio.Event()

        async def hold(request: Request) -> bytes:
            await gate.wait()
            return b"held"

        hub.handle("hold", hold)

        async def newcomer(number: int) -> Link:
            await world.clock.advance(1)
            return await world.endpoint(number).dial(hub.node_id, [address])

        busy = await newcomer(2)
        async with running(busy.request("hold", b"", deadline_s=1000)) as holding:
            links = [await newcomer(number) for number in range(3, 13)]
            assert "others needed the place" in await links[0].wait_closed()
            assert len(hub.links()) <= 7, "one place is kept for links that the hub opens itself"
            assert await links[-1].request("echo", b"in") == b"in" and not busy.closed
            for own in (20, 21, 22):  # and for these, too, an idle stranger makes way
                made, there = await world.listening(own)
                await hub.dial(made.node_id, [there])
            assert len(hub.links()) <= 8 and {key(20).node_id, key(21).node_id, key(22).node_id} <= set(hub.links())
            in_use = [link for link in links if not link.closed]
            held = [asyncio.ensure_future(link.request("hold", b"", deadline_s=1000)) for link in in_use]
            await settle(in_use[-1], 3)
            with pytest.raises(Unreachable, match="none is idle"):
                for number in range(30, 38):
                    held.append(asyncio.ensure_future((await newcomer(number)).request("hold", b"", deadline_s=1000)))
                    await until(
                        lambda: all(link.held().idle_since is None or link.wanted for link in hub._links.values())
                    )
            gate.set()
            assert {await one for one in (holding, *held)} == {b"held"}

    play(make_world, scene)


def test_addresses_that_cannot_be_listened_at_are_refused(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        one, address = await world.listening(1)
        other = world.endpoint(2)
        assert one.addresses == (address,) and other.addresses == ()
        wrongs = (address, "127.0.0.1:80", "tcp://host", "tcp://:1", "tcp://h:99999", "tcp://[::1:5", "udp://h:1")
        names = ("tcp://a..b:1", "tcp://-a:1", "tcp://a b:1", f"tcp://{'a.' * 127}b:1", f"tcp://h:{'1' * 5000}")
        for wrong in (*wrongs, *names):
            with pytest.raises(BadAddress):
                await other.listen(wrong)

    play(make_world, scene)


def test_a_link_knows_its_round_trip_rate_and_bytes(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, far = await linked(world)
        await near.request("echo", bytes(1000))
        fountain = Fountain(100)
        world.endpoints[0].handle("fountain", fountain)
        async with near.stream("fountain", b"", max_bytes=1 << 30) as chunks:
            async for _ in chunks:
                await world.clock.advance(0.001)
        here, there = near.stats(), far.stats()
        assert here.round_trip_ms is not None and here.round_trip_ms >= 0
        assert here.rate_bps is not None and here.rate_bps > 0
        assert here.bytes_received > 100 * fountain.size and there.bytes_received > 1000
        assert there.bytes_sent == here.bytes_received

    play(make_world, scene)


def test_a_handler_set_later_answers_on_links_that_are_open(make_world: MakeWorld) -> None:
    async def scene(world: World) -> None:
        near, _ = await linked(world)
        with pytest.raises(Refused):
            await near.request("late", b"")
        world.endpoints[0].handle("late", echo)
        assert await near.request("late", b"now") == b"now"

    play(make_world, scene)
