"""The side of a hub that nodes and commands hold: one `HubClient` speaks to several hubs as if they were one."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from shoal.errors import BadRecord, LinkError, ShoalError
from shoal.hub.rates import HubBusy
from shoal.identity import Envelope, short_id
from shoal.market import fits
from shoal.protocol.hubs import PROBE_BYTES_MAX, AskHub, HubInfo, HubTicket, ProbeHub
from shoal.protocol.messages import DEFAULT_NETWORK, Message, decode, encode, open_record
from shoal.protocol.offers import (
    FOUND_MAX,
    DialMe,
    Done,
    Introduce,
    Offer,
    OfferFind,
    OfferKept,
    OfferPublish,
    OffersFound,
)
from shoal.transport.allowances import TooManyRequests
from shoal.world import Address, Clock, DeadlineExceeded, Dice, Endpoint, Link, Refused, Request
from shoal.world.asking import ask
from shoal.world.directory import FoundOffer

HUBS_MAX = 16
"""Hubs one client speaks to."""
DIAL_DEADLINE_S = 10.0
REQUEST_DEADLINE_S = 10.0
FIND_DEADLINE_S = 15.0
"""For all pages of a search at one hub; what came until then is used, so no hub holds up what the others found."""
BUSY_PAUSE_S = 0.5
"""A hub that has too many searches under way is asked again after about so long, within the search's deadline."""
INTRODUCE_DEADLINE_S = 8.0
"""A little more than the hub gives the node."""
BACKOFF_FIRST_S = 0.5
BACKOFF_LAST_S = 30.0
BAD_RECORD_CODES = "SH-2"
"""How the codes of errors begin that are about a record itself."""
RENEWALS_PER_LIFETIME = 3
"""An offer is sent again this often while it lives, so that two lost messages do not delist a node."""
PROBE_ROUND_TRIPS = 5
PROBE_SIZES = (PROBE_BYTES_MAX // 16, PROBE_BYTES_MAX // 4, PROBE_BYTES_MAX, PROBE_BYTES_MAX)
PROBE_LONG_ENOUGH_S = 1.0
"""A probe that took this long tells enough; larger ones would only hold up a poor link."""
VERIFIED_MAX = 1024
"""Offers that are remembered as verified: most come again unchanged, with each search and from each hub."""
DIALS_AT_ONCE = 8
"""Introductions a node follows at the same time."""

_log = logging.getLogger("shoal.hub")
R = TypeVar("R", bound=Message)


class NoHub(LinkError):
    """None of the hubs answers."""

    code = "SH-330"


class NoIntroduction(LinkError):
    """No hub could pass the wish for a link on to the node."""

    code = "SH-335"


@dataclass
class HubState:
    """How things stand with one hub; a copy is given out."""

    ticket: HubTicket
    up: bool = False
    trouble: str = "not tried yet"
    """Why it is not up, or what it last refused; empty when all is well."""
    attempts: int = 0
    """Dials that failed since it was last up."""


@dataclass(frozen=True)
class MeasuredLink:
    """A link as its probes found it."""

    round_trip_ms: float
    """The shortest of several round trips."""
    rate_bps: float
    """Bits per second from here to the hub, the best of several probes: what a node can send is what limits it. A
    link that is faster than a quarter of a megabyte can show is faster than this says."""


@dataclass
class _Hub:
    state: HubState
    link: Link | None = None
    tried: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return str(self.state.ticket)

    def open_link(self) -> Link | None:
        return self.link if self.link is not None and not self.link.closed else None


def backoff_s(failures: int, dice: Dice) -> float:
    """Seconds to wait after so many failures in a row: doubling from half a second to half a minute, of which a random
    half is left out so that a thousand nodes do not all return at once."""
    return min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2.0 ** min(failures, 16)) * (0.5 + 0.5 * dice.uniform())


class HubClient:
    """Publishes to all hubs, asks all hubs, goes on while one is left, and comes back to each by itself.

    It implements `world.directory.Directory`. Every offer it gives out was verified here; hubs are not believed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        hubs: Sequence[HubTicket],
        *,
        clock: Clock,
        dice: Dice,
        network: str = DEFAULT_NETWORK,
        on_change: Callable[[HubState], None] | None = None,
        on_refused: Callable[[HubTicket, Refused], None] | None = None,
    ) -> None:
        """`on_change` is told when a hub comes up or goes down; `on_refused` when one refuses the standing offer while
        it is being renewed (for example because another node with the same key published a newer one)."""
        merged: dict[bytes, HubTicket] = {}
        for ticket in hubs:
            known = merged.get(ticket.node)
            addresses = (*known.addresses, *ticket.addresses) if known else ticket.addresses
            merged[ticket.node] = HubTicket(ticket.node, tuple(dict.fromkeys(addresses)))
        if len(merged) > HUBS_MAX:
            raise NoHub(f"{len(merged)} hubs were named; at most {HUBS_MAX} can be used at once.")
        self._endpoint = endpoint
        self._clock = clock
        self._dice = dice
        self._network = network
        self._on_change = on_change
        self._on_refused = on_refused
        self._hubs = {node: _Hub(HubState(ticket)) for node, ticket in merged.items()}
        self._verified_offers: OrderedDict[bytes, FoundOffer] = OrderedDict()
        self._standing: Envelope | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._dialling: set[asyncio.Task[None]] = set()
        self._closed = False

    # ---- links ----

    async def start(self) -> None:
        """Begin to hold links to all hubs. Returns when one is up, or when each was tried once: that none is up is no
        error here, a later call says so."""
        for hub in self._hubs.values():
            self._spawn(self._hold(hub))
        waiting = {asyncio.create_task(hub.tried.wait()): hub for hub in self._hubs.values()}
        try:
            pending = set(waiting)
            while pending and not any(hub.open_link() for hub in self._hubs.values()):
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def answer_introductions(self) -> None:
        """Follow a hub's word that somebody wants a link: dial them. For nodes; others are not to be called back."""
        self._endpoint.handle(DialMe.KIND, self._dial_back)

    def states(self) -> list[HubState]:
        """How things stand with each hub, in the order in which they were named."""
        return [replace(hub.state, up=hub.open_link() is not None) for hub in self._hubs.values()]

    async def close(self) -> None:
        """Stop renewing and reconnecting. The links belong to the endpoint and stay."""
        self._closed = True
        tasks = [*self._tasks, *self._dialling, *([self._renewal] if self._renewal else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _hold(self, hub: _Hub) -> None:
        ticket, failures = hub.state.ticket, 0
        while True:
            try:
                hub.link = await self._endpoint.dial(ticket.node, ticket.addresses, deadline_s=DIAL_DEADLINE_S)
            except ShoalError as error:  # whatever it is, the hub may be put right later
                hub.state.trouble = str(error)
                hub.state.attempts += 1
            else:
                since = self._clock.monotonic()
                hub.state.trouble, hub.state.attempts = "", 0
                hub.tried.set()
                self._tell(hub)
                await self._renew_at(hub)
                hub.state.trouble = await hub.link.wait_closed() or "the link was closed"
                hub.link = None
                self._tell(hub)
                if self._clock.monotonic() - since >= BACKOFF_LAST_S:
                    failures = 0
            hub.tried.set()
            await self._clock.sleep(backoff_s(failures, self._dice))
            failures += 1

    # ---- offers ----

    async def publish(self, offer: Envelope) -> dict[bytes, OfferKept]:
        """Give an offer to all hubs and make it the standing one: it is renewed while it lives, and given to each hub
        that comes back. Returns what each hub that kept it said, by the hub's NodeId.

        Raises NoHub when none is up (it then stands all the same, and goes out as soon as one is), and Refused when
        every hub that answered refused it: it then stands only when the fault may be a hub's, such as a full disk, and
        not the offer's own.
        """
        opened = open_record(offer, Offer, self._network)
        if self._renewal is not None:
            self._renewal.cancel()
        self._standing = offer
        self._renewal = asyncio.create_task(self._renew(opened.lifetime_ms / 1000 / RENEWALS_PER_LIFETIME))
        open_hubs = self._open_hubs()
        answers = await asyncio.gather(*(self._give(hub, link, offer) for hub, link in open_hubs))
        kept = {hub.state.ticket.node: answer for (hub, _), answer in zip(open_hubs, answers, strict=True)
                if isinstance(answer, OfferKept)}  # fmt: skip
        refusals = [answer for answer in answers if isinstance(answer, Refused)]
        if kept:
            return kept
        if refusals and self._standing is offer:
            if all(refusal.remote_code.startswith(BAD_RECORD_CODES) for refusal in refusals):
                self._renewal.cancel()
                self._standing = None
            raise refusals[0]
        raise self._no_hub()

    async def _renew(self, every_s: float) -> None:
        while True:
            await self._clock.sleep(every_s)
            await asyncio.gather(*(self._renew_at(hub) for hub in self._hubs.values()))

    async def _renew_at(self, hub: _Hub) -> None:
        link, offer = hub.open_link(), self._standing
        if link is None or offer is None:
            return
        answer = await self._give(hub, link, offer)
        if isinstance(answer, Refused) and self._on_refused is not None:
            self._on_refused(hub.state.ticket, answer)

    async def _give(self, hub: _Hub, link: Link, offer: Envelope) -> OfferKept | LinkError | BadRecord:
        try:
            kept = await _ask(link, OfferPublish(offer=offer.to_bytes()), OfferKept)
        except (LinkError, BadRecord) as error:
            hub.state.trouble = str(error)
            _log.warning("hub %s did not keep this node's offer: %s", hub.name, error)
            return error
        hub.state.trouble = ""
        return kept

    # ---- asking ----

    async def find(self, wanted: OfferFind) -> list[FoundOffer]:
        open_hubs = self._open_hubs()
        answers = await asyncio.gather(*(self._find_at(hub, link, wanted) for hub, link in open_hubs))
        if all(answer is None for answer in answers):
            raise self._no_hub()
        newest: dict[bytes, FoundOffer] = {}
        for found in (one for answer in answers for one in answer or ()):
            known = newest.get(found.node)
            if known is None or found.offer.sequence > known.offer.sequence:
                newest[found.node] = found
        return [newest[node] for node in sorted(newest)][: wanted.limit]

    async def _find_at(self, hub: _Hub, link: Link, wanted: OfferFind) -> list[FoundOffer] | None:
        """What one hub has, page by page; None when it did not answer. What it must not have sent is left out."""
        found: list[FoundOffer] = []
        until = self._clock.monotonic() + FIND_DEADLINE_S
        for _ in range(FOUND_MAX):  # each page but the last names one offer at least
            left_s = until - self._clock.monotonic()
            try:
                if left_s <= 0:
                    raise DeadlineExceeded(f"Its answer to a search was not complete within {FIND_DEADLINE_S:g} s.")
                page = await _ask(link, wanted, OffersFound, min(REQUEST_DEADLINE_S, left_s))
            except (LinkError, BadRecord) as error:
                pause_s = BUSY_PAUSE_S * (0.5 + self._dice.uniform())
                if isinstance(error, Refused) and error.remote_code == HubBusy.code and pause_s < left_s:
                    await self._clock.sleep(pause_s)
                    continue
                hub.state.trouble = str(error)
                _log.warning("hub %s did not answer a search: %s", hub.name, error)
                return found or None
            good = [one for one in (self._verified(hub, data, wanted) for data in page.offers) if one is not None]
            found += good
            if not page.more or not good or len(found) >= wanted.limit:
                break
            wanted = msgspec.structs.replace(wanted, after=good[-1].node)
        return found

    def _verified(self, hub: _Hub, data: bytes, wanted: OfferFind) -> FoundOffer | None:
        try:
            found = self._opened(data)
        except BadRecord as error:
            hub.state.trouble = str(error)
            _log.warning("hub %s sent an offer that is none: %s", hub.name, error)
            return None
        fitting, reason = fits(found.node, found.offer, wanted)
        if not fitting or found.node <= (wanted.after or b""):
            _log.warning("hub %s sent an offer that was not asked for: %s", hub.name, reason)
            return None
        return found

    def _opened(self, data: bytes) -> FoundOffer:
        """What the same bytes proved before, they prove. Raises BadRecord."""
        known = self._verified_offers.get(data)
        if known is None:
            envelope = Envelope.from_bytes(data, Offer.MAX_BYTES)
            known = FoundOffer(envelope.signer, open_record(envelope, Offer, self._network), envelope)
            self._verified_offers[data] = known
            while len(self._verified_offers) > VERIFIED_MAX:
                self._verified_offers.popitem(last=False)
        return known

    async def introduce(self, node: bytes, addresses: Sequence[Address]) -> None:
        message = Introduce(node=node, addresses=tuple(addresses))
        troubles: list[str] = []
        open_hubs = self._open_hubs()
        if not open_hubs:
            raise self._no_hub()
        for hub, link in open_hubs:
            try:
                await _ask(link, message, Done, INTRODUCE_DEADLINE_S)
            except (LinkError, BadRecord) as error:
                troubles.append(f"{short_id(hub.state.ticket.node)} says: {error}")
            else:
                return
        raise NoIntroduction(f"No hub could tell node {short_id(node)} to dial this one. {' '.join(troubles)}")

    async def info(self) -> dict[bytes, HubInfo]:
        """What each hub that answers says about itself. Raises NoHub."""
        answers: dict[bytes, HubInfo] = {}
        for hub, link in self._open_hubs():
            try:
                answers[link.peer] = await _ask(link, AskHub(), HubInfo)
            except (LinkError, BadRecord) as error:
                hub.state.trouble = str(error)
        if not answers:
            raise self._no_hub()
        return answers

    async def measure_links(self) -> dict[bytes, MeasuredLink]:
        """Round trip and rate to each hub that is up, by its NodeId, one after the other. Raises NoHub."""
        measured: dict[bytes, MeasuredLink] = {}
        for hub, link in self._open_hubs():
            try:
                measured[link.peer] = await self._measure_link(link)
            except (LinkError, BadRecord) as error:
                hub.state.trouble = str(error)
        if not measured:
            raise self._no_hub()
        return measured

    async def _measure_link(self, link: Link) -> MeasuredLink:
        round_trip_s = min([await self._probe(link, 0) for _ in range(PROBE_ROUND_TRIPS)])
        best_bps = 0.0
        for size in PROBE_SIZES:
            taken_s = await self._probe(link, size)
            # The last byte's way there and the answer's way back take a round trip; where that is most of the time
            # it cannot be told from the sending, and the rate is only bounded from below.
            sending_s = taken_s - round_trip_s if taken_s >= 2 * round_trip_s else taken_s
            if sending_s > 0:
                best_bps = max(best_bps, 8 * size / sending_s)
            if taken_s > PROBE_LONG_ENOUGH_S:
                break
        return MeasuredLink(round_trip_s * 1000, best_bps)

    async def _probe(self, link: Link, size: int) -> float:
        probe = ProbeHub(padding=self._dice.bytes(size))
        begun = self._clock.monotonic()
        await _ask(link, probe, Done)
        return self._clock.monotonic() - begun

    # ---- being asked ----

    async def _dial_back(self, request: Request) -> bytes:
        if request.peer not in self._hubs:
            raise LinkError(f"Node {short_id(request.peer)} is not a hub of this node and cannot make it dial.")
        if len(self._dialling) >= DIALS_AT_ONCE:
            raise TooManyRequests(f"This node follows {DIALS_AT_ONCE} introductions already; try again in a moment.")
        message = decode(DialMe, request.body, request.version)
        task = asyncio.create_task(self._dial(message))
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)
        return encode(Done(), request.version)

    async def _dial(self, message: DialMe) -> None:
        try:
            await self._endpoint.dial(message.node, message.addresses, deadline_s=DIAL_DEADLINE_S)
        except ShoalError as error:
            _log.info("node %s asked to be dialled, in vain: %s", short_id(message.node), error)

    # ---- small things ----

    def _open_hubs(self) -> list[tuple[_Hub, Link]]:
        return [(hub, link) for hub in self._hubs.values() if (link := hub.open_link()) is not None]

    def _no_hub(self) -> NoHub:
        if not self._hubs:
            return NoHub("No hub was named: start one with `shoal hub` and name it with --hub or SHOAL_HUB.")
        several = f"None of the {len(self._hubs)} hubs named can be used."
        none = several if len(self._hubs) > 1 else "The hub named cannot be used."
        each = " ".join(f"{short_id(state.ticket.node)} at {', '.join(state.ticket.addresses)}: "
                        f"{state.trouble or 'no answer'}" for state in self.states())  # fmt: skip
        return NoHub(
            f"{none} {each} Check that it runs, and that --hub or SHOAL_HUB names it as it printed itself at its start."
        )

    def _tell(self, hub: _Hub) -> None:
        _log.info("hub %s is %s", hub.name, "up" if hub.open_link() else f"down: {hub.state.trouble}")
        if self._on_change is not None:
            self._on_change(replace(hub.state, up=hub.open_link() is not None))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _ask(
    link: Link,
    question: OfferPublish | OfferFind | Introduce | AskHub | ProbeHub,
    answer: type[R],
    deadline_s: float = REQUEST_DEADLINE_S,
) -> R:
    """Raises LinkError, and BadRecord when the answer is not one."""
    return await ask(link, question, answer, deadline_s)
