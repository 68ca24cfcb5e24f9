"""What a hub answers on its links."""

from __future__ import annotations

from importlib.metadata import version

from shoal.errors import LinkError
from shoal.hub.index import OFFERS_MAX, Arrival, OfferIndex
from shoal.hub.rates import FINDS_PER_SOURCE, HubBusy
from shoal.identity import short_id
from shoal.protocol.hubs import TICKET_ADDRESSES_MAX, AskHub, HubInfo, ProbeHub
from shoal.protocol.messages import DEFAULT_NETWORK, OLDEST_VERSION, PROTOCOL_VERSION, decode, encode
from shoal.protocol.offers import DialMe, Done, Introduce, OfferFind, OfferKept, OfferPublish, OffersFound
from shoal.transport.allowances import AtOnce, RateLimit
from shoal.world import Clock, Endpoint, Request

PUBLISH_PER_S, PUBLISH_BURST = 2.0, 20
FIND_PER_S, FIND_BURST = 10.0, 100
INTRODUCE_PER_S, INTRODUCE_BURST = 2.0, 40
PROBE_PER_S, PROBE_BURST = 0.1, 40
"""What one peer may ask for."""
DIAL_DEADLINE_S = 5.0
"""How long a node may take to say that it will dial."""


class NotLinked(LinkError):
    """The hub holds no link to the node that was asked for."""

    code = "SH-334"


class HubService:
    """Answers `offer.publish`, `offer.find`, `introduce`, `hub.info` and `hub.probe` on an endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        index: OfferIndex,
        clock: Clock,
        *,
        name: str = "hub",
        network: str = DEFAULT_NETWORK,
        offers_max: int = OFFERS_MAX,
    ) -> None:
        self._endpoint = endpoint
        self._index = index
        self._name = name
        self._network = network
        self._offers_max = offers_max
        self._publishing = RateLimit(clock, PUBLISH_PER_S, PUBLISH_BURST)
        self._finding = RateLimit(clock, FIND_PER_S, FIND_BURST)
        self._introducing = RateLimit(clock, INTRODUCE_PER_S, INTRODUCE_BURST)
        self._probing = RateLimit(clock, PROBE_PER_S, PROBE_BURST)
        self._searches = AtOnce(FINDS_PER_SOURCE, HubBusy)
        endpoint.handle(OfferPublish.KIND, self._publish)
        endpoint.handle(OfferFind.KIND, self._find)
        endpoint.handle(Introduce.KIND, self._introduce)
        endpoint.handle(AskHub.KIND, self._tell_about_itself)
        endpoint.handle(ProbeHub.KIND, self._take_probe)

    async def info(self) -> HubInfo:
        return HubInfo(
            node=self._endpoint.node_id,
            name=self._name,
            network=self._network,
            software=f"shoal {version('shoal')}",
            protocol_oldest=OLDEST_VERSION,
            protocol_newest=PROTOCOL_VERSION,
            addresses=tuple(self._endpoint.addresses)[:TICKET_ADDRESSES_MAX],
            offers=await self._index.count(),
            offers_max=self._offers_max,
            links=len(self._endpoint.links()),
        )

    async def _publish(self, request: Request) -> bytes:
        """Anyone may bring a record: it proves itself. Only its maker can make a known one live on."""
        self._publishing.spend(request.peer, "An offer")
        message = decode(OfferPublish, request.body, request.version)
        arrival = Arrival.open(message.offer, request.peer, request.source, self._network)
        kept = await self._index.keep(arrival)
        return encode(OfferKept(sequence=kept.offer.sequence, lifetime_ms=kept.offer.lifetime_ms), request.version)

    async def _find(self, request: Request) -> bytes:
        self._finding.spend(request.peer, "A search")
        wanted = decode(OfferFind, request.body, request.version)
        with self._searches.place(request.source, "searches"):
            found, more = await self._index.find(wanted)
        return encode(OffersFound(offers=tuple(kept.envelope for kept in found), more=more), request.version)

    async def _introduce(self, request: Request) -> bytes:
        """Pass the wish on over the link held to the node; it names the peer that asked, whoever it says it is."""
        self._introducing.spend(request.peer, "An introduction")
        wish = decode(Introduce, request.body, request.version)
        link = self._endpoint.links().get(wish.node)
        if link is None or link.closed:
            raise NotLinked(
                f"Node {short_id(wish.node)} has no open link to this hub: it is stopped, out of reach, or uses "
                "another hub. Ask the other hubs, or take another node."
            )
        message = DialMe(node=request.peer, addresses=wish.addresses)
        await link.request(DialMe.KIND, encode(message, link.version), deadline_s=DIAL_DEADLINE_S)
        return encode(Done(), request.version)

    async def _tell_about_itself(self, request: Request) -> bytes:
        self._finding.spend(request.peer, "A question")
        decode(AskHub, request.body, request.version)
        return encode(await self.info(), request.version)

    async def _take_probe(self, request: Request) -> bytes:
        self._probing.spend(request.peer, "A probe of the link")
        decode(ProbeHub, request.body, request.version)
        return encode(Done(), request.version)
