"""Getting a model onto nodes: looks for them, measures how far they are, has the planner decide, invites, and does it
again when some came or went."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.errors import LinkError, ShoalError
from shoal.gateway.remote import NodeRing, Rings
from shoal.gateway.rings import Ring
from shoal.identity import Envelope
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import FOUND_MAX, Device, Offer, OfferFind
from shoal.protocol.serving import (
    STAGES_MAX,
    LinkProbe,
    LinksProbed,
    ServeJob,
    StageInvite,
    StagePlace,
)
from shoal.sharding import GATEWAY, Links, ModelNeeds, Plan, Replica, ServingNode, plan, replan
from shoal.world import Clock, Dice, Directory, Endpoint, FoundOffer, Link
from shoal.world.reach import echo_ms, reach

LOOK_EVERY_S = 2.0
DIAL_DEADLINE_S = 5.0
PROBE_DEADLINE_S = 10.0
PROBED_MAX = 32
"""Nodes whose distances from one another are measured; of more, the nearest to the gateway."""
INVITE_DEADLINE_S = 20.0
LOAD_PATIENCE_S = 600.0
CPU_SHARE = 0.5
"""Part of a machine's memory that a stage on its processor may take."""

_log = logging.getLogger("shoal.gateway")


@dataclass(frozen=True)
class ModelOnNodes:
    """What is to be served, and where its bytes are."""

    job: ServeJob
    envelope: Envelope
    needs: ModelNeeds
    files_of: Callable[[int, int], tuple[int, ...]]
    """Layers first to stop - 1 -> which of the job's files they lie in."""
    holder: BlobHolder
    """The gateway, which has them all."""


@dataclass
class _Known:
    """A node that the gateway has a link to."""

    offer: Offer
    link: Link
    far_ms: float
    """Round trip."""
    layer_ms: float
    last_ms: float = 0.0


@dataclass
class Placer:
    """Keeps the rings of a model as the planner wants them. `run` goes on until it is cancelled."""

    model: ModelOnNodes
    endpoint: Endpoint
    directory: Directory
    clock: Clock
    dice: Dice
    rings: Rings
    serving: list[Ring]
    """Rings that are ready, for whoever sends streams through them."""
    say: Callable[[str], None] = lambda _: None
    known: dict[bytes, _Known] = field(default_factory=dict)
    between_ms: dict[tuple[bytes, bytes], float] = field(default_factory=dict)
    """One way."""
    _plan: Plan = field(default_factory=lambda: Plan((), (), ""))
    _placed: dict[tuple[StagePlace, ...], NodeRing] = field(default_factory=dict)
    _said: str = ""

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except LinkError as error:
                _log.info("no hub answers; the rings go on as they are: %s", error)
            await self.clock.sleep(LOOK_EVERY_S)

    async def close(self) -> None:
        await asyncio.gather(*(ring.close("The gateway is stopping.") for ring in self._placed.values()))

    async def look(self) -> None:
        """One look at what is there, and what follows from it."""
        found = await self.directory.find(OfferFind(accepts="serve", limit=FOUND_MAX))
        busy_here = {place.node for ring in self._placed.values() for place in ring.places}
        free = [one for one in found if not one.offer.busy or one.node in busy_here]
        for node in [node for node, known in self.known.items() if known.link.closed]:
            del self.known[node]
        await asyncio.gather(*(self._meet(one) for one in free if one.node not in self.known))
        await self._probe()
        lost = [places for places, ring in self._placed.items() if ring.lost.done()]
        for places in lost:
            ring = self._placed.pop(places)
            self.say(f"{ring.name} is lost: {ring.lost.result()}.")
            with contextlib.suppress(ValueError):
                self.serving.remove(ring)
            await ring.close(ring.lost.result())
        there = {one.node for one in free}
        nodes = [self._serving_node(node, known) for node, known in self.known.items() if node in there]
        before = Plan(tuple(one for one in self._plan.replicas if self._places(one) in self._placed), (), "")
        links = self._links()
        new = (
            replan(before, self.model.needs, nodes, links) if before.replicas else plan(self.model.needs, nodes, links)
        )
        self._plan = new
        if new.reason != self._said:
            self._said = new.reason
            self.say(new.reason)
        await self._carry_out(new)

    # --- nodes -----------------------------------------------------------------------------------------------------

    async def _meet(self, one: FoundOffer) -> None:
        try:
            link = await reach(
                one.node, one.offer, endpoint=self.endpoint, directory=self.directory, clock=self.clock,
                dial_deadline_s=DIAL_DEADLINE_S,
            )  # fmt: skip
            far_ms = await echo_ms(link, self.clock, DIAL_DEADLINE_S)
        except ShoalError as error:  # whatever is wrong with one offer, serving goes on
            _log.info("%s cannot serve: %s", one.offer.name, error)
            return
        device = _device(one.offer)
        rate = device.memory_bytes_per_s or 1e9
        self.known[one.node] = _Known(one.offer, link, far_ms, 1000 * self.model.needs.layer_bytes / rate)

    async def _probe(self) -> None:
        """Have nodes measure how far they are from one another, each pair once."""
        nodes = sorted(self.known, key=lambda node: self.known[node].far_ms)[:PROBED_MAX]
        jobs = []
        for at, node in enumerate(nodes):
            others = [other for other in nodes[at + 1 :] if (node, other) not in self.between_ms]
            others = [other for other in others if (other, node) not in self.between_ms]
            if others:
                jobs.append(self._probe_from(node, others[:STAGES_MAX]))
        await asyncio.gather(*jobs)

    async def _probe_from(self, node: bytes, others: Sequence[bytes]) -> None:
        link = self.known[node].link
        holders = tuple(BlobHolder(other, self.known[other].offer.addresses) for other in others)
        try:
            reply = await link.request(
                LinkProbe.KIND, encode(LinkProbe(nodes=holders), link.version), deadline_s=PROBE_DEADLINE_S
            )
            times = decode(LinksProbed, reply, link.version).round_trip_ms
        except ShoalError as error:
            _log.info("%s did not say how far others are: %s", self.known[node].offer.name, error)
            return
        for other, time_ms in zip(others, times, strict=False):
            if time_ms is not None:
                self.between_ms[node, other] = time_ms / 2

    def _serving_node(self, node: bytes, known: _Known) -> ServingNode:
        device = _device(known.offer)
        free = int(device.memory_bytes * (CPU_SHARE if device.kind == "cpu" else 0.9))
        return ServingNode(node, known.offer.name, free, max(1e-3, known.layer_ms), known.last_ms)

    def _links(self) -> Links:
        ways = {(GATEWAY, node): known.far_ms / 2 for node, known in self.known.items()}
        return Links({**self.between_ms, **ways})

    # --- rings -----------------------------------------------------------------------------------------------------

    def _places(self, replica: Replica) -> tuple[StagePlace, ...]:
        return tuple(
            StagePlace(
                node=stage.node, addresses=self._addresses(stage.node), first=stage.first, stop=stage.stop
            )
            for stage in replica.stages
        )  # fmt: skip

    def _addresses(self, node: bytes) -> tuple[str, ...]:
        known = self.known.get(node)
        return known.offer.addresses if known else ()

    async def _carry_out(self, wanted: Plan) -> None:
        places = {self._places(replica): replica for replica in wanted.replicas}
        for held in [held for held in self._placed if held not in places]:
            ring = self._placed.pop(held)
            with contextlib.suppress(ValueError):
                self.serving.remove(ring)
            await ring.close("The plan has changed.")
        for new in [new for new in places if new not in self._placed]:
            await self._place(new, places[new])

    async def _place(self, places: tuple[StagePlace, ...], replica: Replica) -> None:
        links = [self.known[place.node].link for place in places]
        name = " - ".join(self.known[place.node].offer.name for place in places)
        ring = NodeRing(name, self.dice.bytes(16), places, links, self.clock, token_ms=replica.token_ms)
        self.rings.add(ring)
        self._placed[places] = ring
        needs = self.model.needs
        try:
            for at, (place, link) in enumerate(zip(places, links, strict=True)):
                invite = StageInvite(
                    job=self.model.envelope.to_bytes(),
                    ring=ring.ring,
                    stages=places,
                    mine=at,
                    files=self.model.files_of(place.first, place.stop),
                    memory_bytes=(place.stop - place.first) * needs.cache_bytes,
                    holders=(self.model.holder,),
                )
                await link.request(invite.KIND, encode(invite, link.version), deadline_s=INVITE_DEADLINE_S)
        except LinkError as error:
            ring.lose(error.sentence.rstrip("."))
            return
        loading = asyncio.create_task(self._until_ready(ring))
        ring.lost.add_done_callback(lambda _: loading.cancel())

    async def _until_ready(self, ring: NodeRing) -> None:
        try:
            async with asyncio.timeout(LOAD_PATIENCE_S):
                await ring.ready
        except TimeoutError:
            ring.lose(f"its layers were not loaded within {LOAD_PATIENCE_S:.0f} s")
            return
        computing = 0.0
        for at, place in enumerate(ring.places):
            ready = ring.measured(at)
            assert ready is not None
            computing += ready.layer_ms * (place.stop - place.first) + ready.last_ms
            known = self.known.get(place.node)
            if known is not None:
                known.layer_ms = ready.layer_ms
                known.last_ms = ready.last_ms or known.last_ms
        self.serving.append(ring)
        self.say(f"{ring.name} is ready: {computing:.1f} ms of computing a token.")


def _device(offer: Offer) -> Device:
    """The one with the most memory that is not the processor's, else that."""
    devices = offer.capability.devices
    return max(devices, key=lambda one: (one.kind != "cpu", one.memory_bytes))
