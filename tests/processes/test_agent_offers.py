"""What a node says about itself at hubs, while it sells."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_world import MemoryHub, a_client, a_key, an_offer
from money_world import LEDGER, PRICE, BookLedger, an_account

from shoal.hub import HubClient
from shoal.node.agent import OFFER_LOOK_S, NodeAgent, NodeSettings, Sale
from shoal.protocol.messages import open_record
from shoal.protocol.offers import Capability, Offer, OfferFind, OfferPublish
from shoal.storage import BlobStore
from shoal.transport import MemoryEndpoint, MemoryNetwork
from shoal.world import HeldClock, Link, Request, SeededDice
from shoal.world.quotes import HOLD_MS, Quotes

NODE, HUB, CLIENT = a_key(1), a_key(2), a_key(3)


@dataclass
class Scene:
    clock: HeldClock
    hub: MemoryHub
    hubs: HubClient
    client: MemoryEndpoint
    quotes: Quotes

    async def offer(self) -> Offer:
        (found,) = await self.hubs.find(OfferFind())
        return found.offer

    async def until(self, busy: bool) -> None:
        """Time passes until the hub's offer says so."""
        async with asyncio.timeout(60):
            while (await self.offer()).busy != busy:
                await self.clock.advance(OFFER_LOOK_S / 2)


async def measured(**_: object) -> Capability:
    return open_record(an_offer(NODE, 1), Offer).capability


def play(tmp_path: Path, story: Callable[[Scene], Awaitable[None]]) -> None:
    """On a node with one slot, of a client at one hub."""

    async def whole() -> None:
        clock, dice = HeldClock(), SeededDice(1)
        network = MemoryNetwork(clock, dice=dice)
        hub = MemoryHub(network, HUB, clock)
        ticket = await hub.listen()
        endpoint, client = network.endpoint(NODE), network.endpoint(CLIENT)
        agent = NodeAgent(
            NodeSettings("heron", tmp_path, listen="tcp://heron:0", accepts=("train",),
                         sale=Sale(PRICE, BookLedger(clock), an_account(1).address)),
            key=NODE, endpoint=endpoint, hubs=HubClient(endpoint, [ticket], clock=clock, dice=dice),
            store=BlobStore(tmp_path / "blobs", 1 << 20, clock), clock=clock, dice=dice, measure=measured,
        )  # fmt: skip
        await agent.start()

        async def link(node: bytes, offer: Offer) -> Link:
            return await client.dial(node, offer.addresses)

        async with a_client(client, [ticket], clock) as hubs:
            await story(Scene(clock, hub, hubs, client, Quotes(CLIENT, an_account(2).address, LEDGER, link)))
        await agent.close()

    asyncio.run(whole())


def test_a_node_is_offered_again_when_a_hold_is_over(tmp_path: Path) -> None:
    async def story(scene: Scene) -> None:
        held = await scene.quotes.hold(NODE.node_id, await scene.offer())
        await scene.until(busy=True)
        await scene.until(busy=False)
        assert HOLD_MS <= scene.clock.now_ms() - held.hold.from_ms < HOLD_MS + 2000

    play(tmp_path, story)


def test_nobody_who_asks_a_node_waits_for_its_hubs(tmp_path: Path) -> None:
    async def story(scene: Scene) -> None:
        offer, heard = await scene.offer(), asyncio.Event()

        async def never(request: Request) -> Any:
            heard.set()
            await asyncio.Event().wait()

        scene.hub.endpoint.handle(OfferPublish.KIND, never)
        async with asyncio.timeout(60):
            held = await scene.quotes.hold(NODE.node_id, offer)
            await scene.quotes.release(held)
            held = await scene.quotes.hold(NODE.node_id, offer)
            await heard.wait()

    play(tmp_path, story)


def test_a_node_tells_its_hubs_no_more_than_they_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story(scene: Scene) -> None:
        offer = await scene.offer()
        for _ in range(30):
            await scene.quotes.release(await scene.quotes.hold(NODE.node_id, offer))
            await scene.clock.advance(0.1)
        await scene.quotes.hold(NODE.node_id, offer)
        await scene.until(busy=True)

    play(tmp_path, story)
    assert not [record for record in caplog.records if "too often" in record.getMessage()]
