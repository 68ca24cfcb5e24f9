"""How long a gateway waits for stages to load their layers: as long as they get on."""

from __future__ import annotations

import asyncio

from shoal.gateway.placing import LOAD_PATIENCE_S, slow_stages
from shoal.gateway.remote import NodeRing
from shoal.identity import KeyPair
from shoal.protocol.serving import StagePlace, StageReady
from shoal.storage import BYTES_PER_S_LEAST, patience_s
from shoal.transport import MemoryNetwork
from shoal.world import HeldClock, Link, Request

WINDOW_BYTES = int(LOAD_PATIENCE_S * BYTES_PER_S_LEAST)
HUGE = 70 << 30


async def done(request: Request) -> bytes:
    return b""


async def a_ring(clock: HeldClock) -> tuple[NodeRing, Link]:
    network = MemoryNetwork(clock)
    gateway, node = network.endpoint(KeyPair.generate()), network.endpoint(KeyPair.generate())
    node.handle("bytes", done)
    await node.listen("tcp://node:0")
    link = await gateway.dial(node.node_id, node.addresses)
    places = [StagePlace(node=node.node_id, first=0, stop=1)]
    return NodeRing("heron", bytes(16), places, [link], clock, token_ms=1.0), link


async def a_window(clock: HeldClock, link: Link, size: int) -> None:
    """So many bytes go to the node, and time passes."""
    for at in range(0, size, 1 << 20):
        await link.request("bytes", bytes(min(1 << 20, size - at)))
    for _ in range(20):
        await asyncio.sleep(0)
    await clock.advance(LOAD_PATIENCE_S)


def test_who_gets_on_is_waited_for_and_who_does_not_is_named() -> None:
    async def scene() -> None:
        clock = HeldClock()
        ring, link = await a_ring(clock)
        waiting = asyncio.create_task(slow_stages(ring, [HUGE], clock))
        for _ in range(3):
            await a_window(clock, link, WINDOW_BYTES + (1 << 20))
            assert not waiting.done()
        ring.stage_ready(StageReady(ring=ring.ring, mine=0, layer_ms=1.0), link.peer)
        assert await waiting == {}, "it took half an hour and more"

        ring, link = await a_ring(clock)
        waiting = asyncio.create_task(slow_stages(ring, [HUGE], clock))
        await a_window(clock, link, 5 << 20)
        (sentence,) = (await waiting).values()
        assert sentence == "600 s for 70.0 GiB, of which 5.0 MiB in the last 600 s"

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_who_fetches_the_same_again_and_again_holds_nobody_for_ever() -> None:
    async def scene() -> None:
        clock = HeldClock()
        ring, link = await a_ring(clock)
        waiting = asyncio.create_task(slow_stages(ring, [WINDOW_BYTES], clock))
        windows = 0
        while not waiting.done():
            await a_window(clock, link, WINDOW_BYTES + (1 << 20))
            windows += 1
        assert windows * LOAD_PATIENCE_S == patience_s(WINDOW_BYTES, 2 * LOAD_PATIENCE_S)

    asyncio.run(asyncio.wait_for(scene(), 60))
