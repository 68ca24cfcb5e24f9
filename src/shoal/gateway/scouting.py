"""Which nodes there are to serve on, how far they are from here and from one another, and who is left alone for a
while."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from shoal.gateway.meeting import Meetings
from shoal.gateway.remote import Loss
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.offers import Offer, OfferFind
from shoal.protocol.serving import STAGES_MAX
from shoal.sharding import GATEWAY, Links, ModelNeeds, Presence, ServingNode
from shoal.world import Clock, Endpoint, FoundOffer, Link
from shoal.world.directory import Directory
from shoal.world.lookout import Lookout
from shoal.world.quotes import serves_free
from shoal.world.reach import probe

KNOWN_MAX = 256
REMEMBERED_MAX = 4096
"""Nodes of which is remembered how often they were lost."""
PROBE_DEADLINE_S = 10.0
PROBED_MAX = 32
"""Nodes whose distances from one another are measured; of more, the nearest to the gateway."""
PROBE_AGAIN_S = 30.0
"""A way that did not get through is tried again."""
STEADY_S = 30.0
"""Who was there for so long has failed for the first time."""
CPU_SHARE = 0.5
"""Part of a machine's memory that a stage on its processor may take."""
DEVICE_SHARE = 0.9

_log = logging.getLogger("shoal.gateway")


@dataclass
class _Known:
    """A node that the gateway has a link to."""

    offer: Offer
    link: Link
    far_ms: float
    """Round trip."""
    layer_ms: float
    met: float
    since: float
    """When it was met, or failed last."""
    last_ms: float = 0.0
    ours: bool = False
    """It has held layers for this gateway: when it is busy, then with that."""
    leaving: bool = False


class Scout:
    """Keeps links to the nodes that accept to serve. `run` goes on until it is cancelled."""

    def __init__(
        self,
        needs: ModelNeeds,
        endpoint: Endpoint,
        directory: Directory,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when there is more to plan with."""
        self._needs, self._clock, self._changed = needs, clock, changed
        self._payable: Callable[[Offer], bool] = lambda _: False
        self._former = frozenset[bytes]()
        self._meetings = Meetings(endpoint, directory, clock, self._met)
        self._lookout = Lookout(directory, OfferFind(accepts="serve"))
        self._known: dict[bytes, _Known] = {}
        self._between: dict[tuple[bytes, bytes], tuple[float, float]] = {}
        """Two nodes -> one-way time in ms, and when it was measured."""
        self._looked = False
        self._presence: dict[bytes, Presence] = {}
        """Without the time since a known node was met."""

    def pay(self, payable: Callable[[Offer], bool], former: Collection[bytes]) -> None:
        """Nodes that cost something are of use, too, where they are `payable`. Where `former` ones are busy, it is with
        this gateway, before it was started anew."""
        self._payable, self._former = payable, frozenset(former)

    async def run(self) -> None:
        await self._meetings.run(self.look)

    @property
    def looked(self) -> bool:
        """Whether a hub was asked, and whoever it named was met or tried in vain."""
        return self._looked and not self._meetings.under_way

    async def look(self) -> None:
        """Take notice of what is on offer; whoever is new is met meanwhile."""
        found = await self._lookout.look(self._former - self._known.keys())
        self._looked = True
        for one in found:
            known = self._known.get(one.node)
            if known is not None and not known.link.closed:
                known.offer = one.offer
            elif (not one.offer.busy or one.node in self._former) and len(self._known) < KNOWN_MAX:
                self._meetings.meet(one)
        if any(self._unmeasured(node) for node in self._nearest()):
            await self._probe()
            self._changed()

    async def _met(self, one: FoundOffer, link: Link, far_ms: float) -> None:
        rate = one.offer.capability.devices[0].memory_bytes_per_s or 1e9
        guess_ms = 1000 * self._needs.layer_bytes / rate
        now = self._clock.monotonic()
        ours = one.node in self._former
        self._known[one.node] = _Known(one.offer, link, far_ms, guess_ms, now, now, ours=ours)
        if not self._meetings.under_way:  # of several that come at once, the last measures for all
            await self._probe()
            self._changed()

    # --- how far they are from one another ---------------------------------------------------------------------------

    def _nearest(self) -> list[bytes]:
        there = [node for node, known in self._known.items() if not known.link.closed]
        return sorted(there, key=lambda node: (self._known[node].far_ms, node))[:PROBED_MAX]

    def _unmeasured(self, node: bytes) -> list[bytes]:
        """Nodes to which `node` is to take the time: each pair once."""
        now = self._clock.monotonic()
        return [
            other
            for other in self._nearest()
            if node < other
            and ((found := self._between.get((node, other))) is None
                 or (found[0] == math.inf and now - found[1] > PROBE_AGAIN_S))
        ]  # fmt: skip

    async def _probe(self) -> None:
        """Have nodes measure how far they are from one another."""
        pairs = {node: others for node in self._nearest() if (others := self._unmeasured(node))}
        await asyncio.gather(*(self._probe_from(node, others[:STAGES_MAX]) for node, others in pairs.items()))

    async def _probe_from(self, node: bytes, others: Sequence[bytes]) -> None:
        known = self._known[node]
        holders = tuple(BlobHolder(other, self._known[other].offer.addresses) for other in others)
        times = await probe(known.link, holders, PROBE_DEADLINE_S)
        now = self._clock.monotonic()
        for at, other in enumerate(others):
            time_ms = times[at]
            self._between[node, other] = (math.inf if time_ms is None else time_ms / 2, now)

    # --- what the planner is told ------------------------------------------------------------------------------------

    def nodes(self) -> list[ServingNode]:
        """Those that may hold layers from now on."""
        for node in [node for node, known in self._known.items() if known.link.closed]:
            gone = self._known.pop(node)
            presence = self._presence_of(node)
            presence.seen_s += self._clock.monotonic() - gone.met
            if not (gone.leaving or self._meetings.failed.rests(node)):  # a loss that is known counts already
                presence.losses += 1
            self._between = {pair: found for pair, found in self._between.items() if node not in pair}
        return [
            self._serving_node(node, known)
            for node, known in self._known.items()
            if not known.leaving
            and not self._meetings.failed.rests(node)
            and (known.ours or not known.offer.busy)
            and (serves_free(known.offer) or self._payable(known.offer))
        ]

    @property
    def too_dear(self) -> int:
        """Nodes that are left out for what they cost, or for where they are paid."""
        return sum(not (serves_free(one.offer) or self._payable(one.offer)) for one in self._known.values())

    def _serving_node(self, node: bytes, known: _Known) -> ServingNode:
        device = known.offer.capability.devices[0]
        free = int(device.memory_bytes * (CPU_SHARE if device.kind == "cpu" else DEVICE_SHARE))
        seen_s = self._clock.monotonic() - known.met
        return ServingNode(
            node, known.offer.name, free, max(1e-3, known.layer_ms), known.last_ms,
            price=0 if known.offer.price is None or serves_free(known.offer) else known.offer.price.micro_per_h,
            survival=self._presence_of(node).survival(seen_s),
        )  # fmt: skip

    def _presence_of(self, node: bytes) -> Presence:
        presence = self._presence.setdefault(node, Presence())
        while len(self._presence) > REMEMBERED_MAX:
            del self._presence[next(iter(self._presence))]
        return presence

    def links(self) -> Links:
        between = {pair: one_way for pair, (one_way, _) in self._between.items()}
        return Links(between | {(GATEWAY, node): known.far_ms / 2 for node, known in self._known.items()})

    def link(self, node: bytes) -> Link | None:
        known = self._known.get(node)
        return None if known is None or known.link.closed else known.link

    def name(self, node: bytes) -> str:
        known = self._known.get(node)
        return known.offer.name if known else node.hex()[:8]

    def offer(self, node: bytes) -> Offer | None:
        known = self._known.get(node)
        return known.offer if known else None

    def addresses(self, node: bytes) -> tuple[str, ...]:
        known = self._known.get(node)
        return known.offer.addresses if known else ()

    # --- what serving finds out --------------------------------------------------------------------------------------

    def measured(self, node: bytes, layer_ms: float, last_ms: float) -> None:
        known = self._known.get(node)
        if known is not None:
            known.layer_ms, known.last_ms = layer_ms, last_ms or known.last_ms

    def taken(self, node: bytes) -> None:
        """It is invited to hold layers, or keeps a place for that."""
        known = self._known.get(node)
        if known is not None:
            known.ours = True

    def refused(self, node: bytes) -> None:
        """It does not take the invitation, or was let go: it is somebody else's now."""
        known = self._known.get(node)
        if known is not None:
            known.ours = False

    def leaving(self, node: bytes) -> None:
        """It wants to go: nothing more is placed on it."""
        known = self._known.get(node)
        if known is not None:
            known.leaving = True

    def failed(self, loss: Loss) -> None:
        """A ring was lost; who is to blame is left alone for a while, once for all the rings that are lost with it."""
        now = self._clock.monotonic()
        for node in loss.nodes:
            if self._meetings.failed.rests(node):
                continue
            known = self._known.get(node)
            if known is not None:
                if now - known.since > STEADY_S:
                    self._meetings.failed.succeeded(node)
                known.since = now
                self._presence_of(node).losses += 1
            self._meetings.failed.tried(node)
        for one, other in loss.ways:
            self._between[min(one, other), max(one, other)] = (math.inf, now)
