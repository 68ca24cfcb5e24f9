"""Finding nodes for a job, and linking to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import JobError, LinkError, ShoalError
from shoal.market import ANYTHING, Board, Listing, Match, Needed, Wish, fitting, match
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.offers import Offer, OfferFind
from shoal.world import Clock, Endpoint, Link
from shoal.world.directory import Directory, FoundOffer
from shoal.world.lookout import FORMER_MAX, Backoff, Lookout, all_offers, offers_of
from shoal.world.reach import echo_ms, reach

LOOK_EVERY_S = 1.0
DIAL_DEADLINE_S = 8.0
DIALS_AT_ONCE = 64
"""Nodes that are dialled at a time; each is a stranger that may let one wait."""
SETTLE_S = 2.0
"""How long dials that are under way are waited for once there are enough nodes; those that come later join later."""
REST_S, REST_MAX_S = 4.0, 300.0
"""How long a node that did not answer is left alone: the first time, and at most; each time twice as long."""
TROUBLES_SHOWN = 8
"""Nodes whose troubles a sentence names."""
FAR_MAX = 4096
"""Nodes of which it is remembered how far they are."""


class TooFewNodes(JobError):
    """Not as many nodes as the job needs were there in time."""

    code = "SH-630"


class TooFar(JobError):
    """A node answers, and its round trip is longer than the job allows."""

    code = "SH-631"

    def __init__(self, sentence: str, took_ms: float | None = None) -> None:
        super().__init__(sentence)
        self.took_ms = took_ms


@dataclass(frozen=True)
class LinkedNode:
    """A node that this driver has a link to, and what it offered."""

    node: bytes
    offer: Offer
    link: Link

    @property
    def name(self) -> str:
        return self.offer.name

    @property
    def holder(self) -> BlobHolder:
        return BlobHolder(self.node, self.offer.addresses)


async def link_to(
    node: bytes, offer: Offer, *, endpoint: Endpoint, directory: Directory, clock: Clock, wish: Wish = ANYTHING
) -> LinkedNode:
    """A link to the node that made an offer. Raises LinkError, and TooFar where `wish` asks for one that is nearer."""
    link = await reach(
        node, offer, endpoint=endpoint, directory=directory, clock=clock, dial_deadline_s=DIAL_DEADLINE_S
    )
    if wish.asks_for_latency:
        took_ms = await echo_ms(link, clock, DIAL_DEADLINE_S)
        if not fitting([Listing(node, offer, took_ms, wish.reputation_of(node))], wish):
            raise TooFar(f"It is {took_ms:.1f} ms away, there and back, which is more than the job allows.", took_ms)
    return LinkedNode(node, offer, link)


class Dials:
    """Nodes being dialled for a gang, those that answered, and why others did not."""

    def __init__(
        self, endpoint: Endpoint, directory: Directory, clock: Clock, wish: Wish, far_ms: dict[bytes, float]
    ) -> None:
        self._endpoint, self._directory, self._clock, self._wish = endpoint, directory, clock, wish
        self._far_ms = far_ms
        self._under_way: dict[bytes, tuple[Offer, asyncio.Task[LinkedNode]]] = {}
        self._linked: dict[bytes, LinkedNode] = {}
        self._unreached = Backoff(clock, REST_S, REST_MAX_S)
        self.troubles: dict[bytes, str] = {}
        """Of TROUBLES_SHOWN nodes at most."""

    @property
    def linked(self) -> list[LinkedNode]:
        """The fastest first."""
        open_ones = [one for one in self._linked.values() if not one.link.closed]
        return sorted(open_ones, key=lambda one: fastest_float32(one.offer), reverse=True)

    async def dial(self, found: Sequence[FoundOffer], until_s: float) -> None:
        """Dial those that are new, first who has failed least, then the fastest. Until all that were dialled have
        answered or failed, or that moment has come; those under way then go on."""
        known = self._under_way.keys() | {one.node for one in self.linked}
        fresh = [one for one in found if one.node not in known and not self._unreached.rests(one.node)]
        fresh.sort(key=lambda one: (-self._unreached.times(one.node), fastest_float32(one.offer)))
        timer = asyncio.create_task(self._clock.sleep(max(0.0, until_s - self._clock.monotonic())))
        try:
            while (fresh or self._under_way) and not timer.done():
                while fresh and len(self._under_way) < DIALS_AT_ONCE:
                    self._start(fresh.pop())
                dials = [dial for _, dial in self._under_way.values()]
                await asyncio.wait({timer, *dials}, return_when=asyncio.FIRST_COMPLETED)
                self._take_in()
        finally:
            timer.cancel()

    def _start(self, one: FoundOffer) -> None:
        dial = link_to(
            one.node, one.offer, endpoint=self._endpoint, directory=self._directory, clock=self._clock, wish=self._wish
        )
        self._under_way[one.node] = (one.offer, asyncio.create_task(dial))

    def _take_in(self) -> None:
        for node in [node for node, (_, dial) in self._under_way.items() if dial.done()]:
            offer, dial = self._under_way.pop(node)
            try:
                self._linked[node] = dial.result()
            except TooFar as error:
                self._unreached.tried(node)
                if error.took_ms is not None and (node in self._far_ms or len(self._far_ms) < FAR_MAX):
                    self._far_ms[node] = error.took_ms
            except ShoalError as error:  # whatever is wrong with one offer, the search goes on
                self._unreached.tried(node)
                if node in self.troubles or len(self.troubles) < TROUBLES_SHOWN:
                    self.troubles[node] = f"{offer.name}: {error}"
            else:
                self._unreached.succeeded(node)
                self.troubles.pop(node, None)
                self._far_ms.pop(node, None)

    async def close(self) -> None:
        dials = [dial for _, dial in self._under_way.values()]
        for dial in dials:
            dial.cancel()
        await asyncio.gather(*dials, return_exceptions=True)


async def find_gang(
    wanted: OfferFind,
    wish: Wish = ANYTHING,
    *,
    needed: Needed,
    nodes_max: int,
    wait_s: float,
    advice: str,
    endpoint: Endpoint,
    directory: Directory,
    clock: Clock,
    without: Collection[bytes] = (),
    former: Collection[bytes] = (),
    say: Callable[[str], None] = lambda _: None,
    far_ms: dict[bytes, float] | None = None,
) -> list[LinkedNode]:
    """Nodes that fit and answer: as many as are needed, at most `nodes_max`, the fastest of those.

    `former` are nodes that worked for this job under a driver that is gone: they may seem busy with it, and are asked
    for all the same. Waits up to `wait_s` for enough of them, and then SETTLE_S for those that are being dialled.
    `far_ms` gets the round trips of those that were too far. Raises TooFewNodes, saying what was there and why it does
    not do, or giving `advice`; at once where nothing but money is missing, and nobody would come by itself.
    """
    far_ms = {} if far_ms is None else far_ms
    until = clock.monotonic() + wait_s
    lookout, dials = Lookout(directory, wanted, wish), Dials(endpoint, directory, clock, wish, far_ms)
    told = False
    try:
        while True:
            look_again = clock.monotonic() + LOOK_EVERY_S
            found = [one for one in await lookout.look(former) if one.node not in without]
            await dials.dial(found, look_again)
            if needed.met_by(measured_flops(dials.linked[:nodes_max], wish)):
                await dials.dial((), clock.monotonic() + SETTLE_S)
            if needed.met_by(measured_flops(dials.linked[:nodes_max], wish)):
                return sorted(dials.linked[:nodes_max], key=lambda one: one.node)
            if clock.monotonic() >= until:
                break
            if not told:
                board = await _board(directory, wanted, wish, far_ms)
                why = _match(board, wanted, wish, needed)
                if not former and not without and _costs_money(board, wanted, wish, why):
                    raise TooFewNodes(
                        f"{why.reason} `shoal plan` says what this job would cost; give it a --budget, or a budget in "
                        "its file."
                    )
                there = f"{needed.so_far(measured_flops(dials.linked, wish))} are there"
                there += f"; waiting up to {wait_s:.0f} s for more."
                say(there if why.enough else f"{there} {why.reason}")
                told = True
            await clock.sleep(max(0.0, look_again - clock.monotonic()))
    finally:
        await dials.close()
    why = _match(await _board(directory, wanted, wish, far_ms), wanted, wish, needed)
    came = f"{needed.so_far(measured_flops(dials.linked, wish))} came within {wait_s:.0f} s."
    hints = list(dials.troubles.values()) or ([] if why.changes else [advice])
    if any(change.name == "idle" for change in why.changes):
        hints.append(
            "Where a job's driver was killed, its nodes are free after two minutes, and `--resume` of that job has "
            "them at once."
        )
    raise TooFewNodes(" ".join([came, why.reason, *hints]))


async def why_not(
    directory: Directory, wanted: OfferFind, wish: Wish, needed: Needed, far_ms: Mapping[bytes, float]
) -> str:
    """Which requirements excluded how many, and what would do; empty where enough fit. `far_ms`: of those that were
    found to be too far."""
    found = _match(await _board(directory, wanted, wish, far_ms), wanted, wish, needed)
    return "" if found.enough else found.reason


def measured_flops(gang: Sequence[LinkedNode], wish: Wish) -> list[float]:
    """At how many FLOP/s each was measured: its fastest device that fits, in its fastest dtype."""
    found = fitting((Listing(one.node, one.offer, 0.0, wish.reputation_of(one.node)) for one in gang), wish)
    return [found.get(one.node, 0.0) for one in gang]


async def _board(directory: Directory, wanted: OfferFind, wish: Wish, far_ms: Mapping[bytes, float]) -> Board:
    """All offers of such work; who was not found to be far is taken for near."""
    board = Board()
    with contextlib.suppress(LinkError):
        for one in await all_offers(directory, OfferFind(accepts=wanted.accepts)):
            board.put(Listing(one.node, one.offer, far_ms.get(one.node, 0.0), wish.reputation_of(one.node)))
    return board


def _match(board: Board, wanted: OfferFind, wish: Wish, needed: Needed) -> Match:
    least = Needed(max(1, needed.nodes), needed.flops)
    return match(board, wish, accepts=wanted.accepts, idle_only=wanted.idle_only, needed=least)


def _costs_money(board: Board, wanted: OfferFind, wish: Wish, why: Match) -> bool:
    """Whether a budget would do, and none of those that would be free works for another job."""
    would_do = any(change.name == "budget" for change in (*why.changes, *why.together))
    return would_do and not match(board, wish, accepts=wanted.accepts).nodes


async def link_to_former(
    former: Sequence[bytes], wanted: OfferFind, *, endpoint: Endpoint, directory: Directory, clock: Clock
) -> None:
    """Links to the newest of the nodes that worked for this job before, as far as a hub knows them and they answer."""

    async def link(node: bytes) -> None:
        with contextlib.suppress(LinkError):
            for one in await offers_of(directory, wanted, node):
                await link_to(one.node, one.offer, endpoint=endpoint, directory=directory, clock=clock)

    await asyncio.gather(*(link(node) for node in former[-FORMER_MAX:]))


def fastest_float32(offer: Offer) -> float:
    """FLOP/s of an offer's fastest device in float32, the arithmetic that every job can use."""
    return max(
        (rate.flops for device in offer.capability.devices for rate in device.throughput if rate.dtype == "float32"),
        default=0.0,
    )
