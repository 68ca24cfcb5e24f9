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
from shoal.ledger.commands import Open
from shoal.node.agent import OFFER_LOOK_S, NodeAgent, NodeSettings, Sale
from shoal.protocol.messages import open_record
from shoal.protocol.money import EscrowTerms, Payee
from shoal.protocol.offers import Capability, Offer, OfferFind, OfferPublish
from shoal.storage import BlobStore
from shoal.transport import MemoryEndpoint, MemoryNetwork
from shoal.world import HeldClock, Link, Request, SeededDice
from shoal.world.quotes import HOLD_MS, Held, Quotes

NODE, HUB, CLIENT = a_key(1), a_key(2), a_key(3)


@dataclass
class Scene:
    clock: HeldClock
    hub: MemoryHub
    hubs: HubClient
    agent: NodeAgent
    client: MemoryEndpoint
    quotes: Quotes
    ledger: BookLedger

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
        ledger = BookLedger(clock)
        agent = NodeAgent(
            NodeSettings("heron", tmp_path, listen="tcp://heron:0", accepts=("train",),
                         sale=Sale(PRICE, ledger, an_account(1).address, reclaim_notice_ms=60_000)),
            key=NODE, endpoint=endpoint, hubs=HubClient(endpoint, [ticket], clock=clock, dice=dice),
            store=BlobStore(tmp_path / "blobs", 1 << 20, clock), clock=clock, dice=dice, measure=measured,
        )  # fmt: skip
        await agent.start()

        async def link(node: bytes, offer: Offer) -> Link:
            return await client.dial(node, offer.addresses)

        async with a_client(client, [ticket], clock) as hubs:
            quotes = Quotes(CLIENT, an_account(2).address, an_account(2), LEDGER, link, clock)
            await story(Scene(clock, hub, hubs, agent, client, quotes, ledger))
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


async def take_a_place(scene: Scene) -> Held:
    """With money for it."""
    offer, payer = await scene.offer(), an_account(2)
    held = await scene.quotes.hold(NODE.node_id, offer)
    scene.ledger.give(payer.address, 1_000_000)
    terms = EscrowTerms(
        payer=payer.address, signer=payer.address, cap_micro=0, auditor=payer.address, amount_micro=1_000_000,
        fee_ppm=0, holdback_ppm=0, notice_ms=60_000, audit_ms=0, expires_ms=scene.clock.now_ms() + 3_600_000,
        payees=(Payee(held.hold.payee, 1_000_000),), quote=bytes(32), nonce=bytes(32),
    )  # fmt: skip
    await scene.ledger.apply(Open(terms, payer.sign(terms.escrow_id(LEDGER))))
    return await scene.quotes.take(held, terms.escrow_id(LEDGER))


def test_a_node_whose_owner_wants_it_back_is_busy_at_once_and_gone_when_its_client_is(tmp_path: Path) -> None:
    async def story(scene: Scene) -> None:
        assert (await scene.offer()).reclaim_notice_ms == 60_000
        assert await scene.agent.give_notice() is None, "nobody has paid for it"
        held = await take_a_place(scene)
        await scene.until(busy=True)
        await scene.quotes.release(held)
        await scene.until(busy=False)
        await take_a_place(scene)
        assert await scene.agent.give_notice() == 60
        await scene.until(busy=True)
        gone, began_s = asyncio.create_task(scene.agent.vacated()), scene.clock.monotonic()
        while not gone.done():
            await scene.clock.advance(OFFER_LOOK_S)
        assert 60 <= scene.clock.monotonic() - began_s < 61

    play(tmp_path, story)


def test_a_node_that_everybody_has_left_waits_no_longer(tmp_path: Path) -> None:
    async def story(scene: Scene) -> None:
        held = await take_a_place(scene)
        assert await scene.agent.give_notice() == 60
        gone, began_s = asyncio.create_task(scene.agent.vacated()), scene.clock.monotonic()
        await scene.clock.advance(OFFER_LOOK_S)
        assert not gone.done()
        await scene.quotes.release(held)
        while not gone.done():
            await scene.clock.advance(OFFER_LOOK_S)
        assert scene.clock.monotonic() - began_s < 5

    play(tmp_path, story)
