"""A replica on nodes of the shoal."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import BadRecord, LinkError, ShoalError
from shoal.gateway.receipts import Metering, RingMeter
from shoal.gateway.rings import LimitedRing, RingLost, RingRefused, arithmetic_of
from shoal.inference.commands import Advance, Advanced
from shoal.inference.masks import allow
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import Done
from shoal.protocol.serving import (
    Choosing,
    LinkEcho,
    StageAnswer,
    StageEnd,
    StageForget,
    StageForgotten,
    StageGone,
    StageKnown,
    StageLeaving,
    StagePlace,
    StagePulse,
    StagePulsed,
    StageReady,
    StageWork,
)
from shoal.world import Clock, Endpoint, Link, Refused, Request

FIRST_DEADLINE_S = 10.0
"""For a ring of which nothing is known yet."""
LEAST_DEADLINE_S = 0.25
LATE, DEVIATIONS = 1.25, 4.0
"""An answer is late after so many times what it takes in the mean, and so many mean deviations."""
PULSE_S, PULSE_MAX_S = 0.4, 10.0
"""What a stage, or the next one, is given at least to say that it is there, and at most; more where a ring is long."""
STUCK_S = 30.0
"""So long a late answer is waited for while all stages say that they are there; then who has been at it for longest is
to blame."""
TRIES = 3
"""Positions that a new ring is tried out with."""
FEW = 8
"""Positions under way that say what a crossing takes; more say what each of them adds."""
ARRIVED_S = 5.0
HANDED_S = 60.0
"""For the first stage to say that positions arrived; a ring that is silent is noticed long before."""
RECEIPTS_S = 1.0
"""How long the receipts of a ring that ends are waited for: a node of it may be silent."""
FULL = "SH-570"
REFUSALS = frozenset({"SH-270", "SH-272", "SH-275", "SH-278", "SH-279", FULL})
"""What a stage says of a request, not of itself: elsewhere it would be the same, or memory is full."""

BAD_STATES = "SH-277"


class UnknownRing(BadRecord):
    """A node asks about a ring that its gateway has given up, or never had."""

    code = "SH-276"


@dataclass
class Latency:
    """What a crossing took lately, and how long to wait for one before the ring is asked whether it is there: mean and
    mean deviation, as TCP does it (Jacobson, 1988). Silence is all that a dead link says."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    position_s: float = 0.0
    """What each further position under way adds."""

    def measured(self, took_s: float, positions: int) -> None:
        if not (took_s > 0 and math.isfinite(took_s)):
            return
        if positions > FEW:
            each_s = (took_s - self.mean_s) / (positions - 1)
            self.position_s = max(0.0, self.position_s + 0.2 * (each_s - self.position_s))
        elif self.mean_s == 0:
            self.mean_s, self.deviation_s = took_s, took_s / 2
        else:
            off = took_s - self.mean_s - self.position_s * (positions - 1)
            self.deviation_s += 0.1 * (abs(off) - self.deviation_s)
            self.mean_s = max(1e-4, self.mean_s + 0.1 * off)

    def deadline_s(self, positions: int) -> float:
        if self.mean_s == 0 or (positions > FEW and self.position_s == 0):
            return FIRST_DEADLINE_S
        expected = self.mean_s + self.position_s * (positions - 1)
        return max(LEAST_DEADLINE_S, LATE * expected + DEVIATIONS * self.deviation_s)


@dataclass(frozen=True)
class Loss:
    """Why a ring is of no more use, and who is to blame, as far as that is known."""

    reason: str
    nodes: frozenset[bytes] = frozenset()
    """Gone or silent."""
    ways: frozenset[tuple[bytes, bytes]] = frozenset()
    """From one stage to the next, where nothing gets through though both are there."""


class NodeRing(LimitedRing):
    """A ring of stages on nodes, each with a link to the gateway."""

    def __init__(
        self,
        name: str,
        ring: bytes,
        places: Sequence[StagePlace],
        links: Sequence[Link],
        clock: Clock,
        *,
        token_ms: float,
        meter: RingMeter | None = None,
        loaded: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        """`loaded` is told which nodes say that their stages are ready."""
        super().__init__(name, stages=len(places), token_ms=token_ms)
        self.ring = ring
        self.places = tuple(places)
        self._links = tuple(links)
        self._planned_s = token_ms / 1000
        """What it takes by the plan: there and back to any of its stages takes no more."""
        self._clock, self._meter, self._loaded = clock, meter or Metering().ring(ring, places), loaded
        self._number = 0
        self._flying = 0
        """Positions under way, of all sessions."""
        self._waiting: dict[int, asyncio.Future[StageAnswer]] = {}
        self._ready: dict[int, StageReady] = {}
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[Loss] = loop.create_future()
        self.asked_to_leave: asyncio.Future[tuple[bytes, str]] = loop.create_future()
        """By which of its nodes, and why."""
        self.latency = Latency()
        self._checking: asyncio.Task[Loss | None] | None = None
        self._busy_ms: dict[bytes, float] = {}
        """Node -> for how long it has been at its oldest piece, when it was asked last."""
        self._watching = [asyncio.create_task(self._watch(link)) for link in self._links]

    async def _watch(self, link: Link) -> None:
        reason = await link.wait_closed()
        self.lose(Loss(f"the link to a stage of it is down ({reason})", frozenset({link.peer})))

    def lose(self, loss: Loss) -> None:
        """It is of no more use: whoever waits for it hears so at once."""
        if self.lost.done():
            return
        self.lost.set_result(loss)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RingLost(f"{self.name}: {loss.reason}."))

    def uses(self, loss: Loss) -> bool:
        """Whether what is lost is a part of this ring too."""
        order = [place.node for place in self.places]
        return bool(loss.nodes & set(order) or loss.ways & set(itertools.pairwise(order)))

    # --- what stages say -------------------------------------------------------------------------------------------

    def stage_ready(self, message: StageReady, peer: bytes) -> None:
        if not self._holds(message.mine, peer) or self.ready.done():
            return
        self._ready[message.mine] = message
        self._loaded(peer)
        if len(self._ready) == len(self.places):
            self.arithmetic = arithmetic_of(
                (place.first, place.stop, self._ready[at].arithmetic) for at, place in enumerate(self.places)
            )
            self.ready.set_result(None)

    def fetched(self) -> list[int]:
        """What went to each stage since its link opened, in bytes: nearly all of it is layers while it loads."""
        return [link.stats().bytes_sent for link in self._links]

    def measured(self, mine: int) -> StageReady | None:
        return self._ready.get(mine)

    def stage_gone(self, message: StageGone, peer: bytes) -> None:
        if self._holds(message.mine, peer):
            self.lose(Loss(message.reason.rstrip("."), frozenset({peer})))

    def stage_leaving(self, message: StageLeaving, peer: bytes) -> None:
        if self._holds(message.mine, peer) and not self.asked_to_leave.done():
            self.leaving = True
            self.asked_to_leave.set_result((peer, message.reason))

    def _holds(self, stage: int, peer: bytes) -> bool:
        return stage < len(self.places) and self.places[stage].node == peer

    def answered(self, message: StageAnswer, peer: bytes) -> None:
        """The last stage answers; any stage may say that it cannot."""
        if peer != self.places[-1].node and not (message.code and peer in {place.node for place in self.places}):
            return
        order = [place.node for place in self.places]
        if message.code == BAD_STATES and (at := order.index(peer)) > 0:
            # One of the two lies, or computes wrongly; which one, others will show.
            self.lose(Loss(message.sentence.rstrip("."), ways=frozenset({(order[at - 1], peer)})))
            return
        future = self._waiting.get(message.number)
        if future is not None and not future.done():
            future.set_result(message)

    # --- what the gateway asks -------------------------------------------------------------------------------------

    async def _through(self, piece: Advance) -> Advanced:
        of = piece.session, piece.start, len(piece.tokens), 0 if piece.states_wanted else piece.choose, piece.sampling
        self._meter.sent(*of)
        crossed = await self._cross(piece)
        self._meter.came(*of)
        return crossed

    async def try_out(self, session: int) -> None:
        """A few positions through all stages: the first opens the links between them, and from the others it is known
        what they take. Nobody asked for them, so they are not metered. Raises RingLost and RingRefused."""
        for at in range(TRIES):
            piece = Advance(session=session, start=at, tokens=(0,), choose=1, sampling=Choosing(temperature=0))
            await self._cross(piece, measure=at > 0)
        await self.close_session(session)

    async def _cross(self, piece: Advance, *, measure: bool = True) -> Advanced:
        if self.lost.done():
            raise RingLost(f"{self.name}: {self.lost.result().reason}.")
        self._number += 1
        number = self._number
        future: asyncio.Future[StageAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        work = StageWork(
            ring=self.ring, session=piece.session, number=number, start=piece.start, tokens=piece.tokens,
            choose=piece.choose,
            states_wanted=piece.states_wanted, choosing=piece.sampling, source=piece.source,
        )  # fmt: skip
        began, alone = self._clock.monotonic(), not self._flying
        self._flying += len(piece.tokens)
        flying = self._flying
        handing = asyncio.create_task(self._hand(work, future))
        try:
            answer = await self._answer(future, self.latency.deadline_s(flying))
        finally:
            self._flying -= len(piece.tokens)
            del self._waiting[number]
            handing.cancel()
            future.exception() if future.done() else future.cancel()  # whatever it says now, nobody waits for it
        if answer.code in REFUSALS:
            raise RingRefused(f"{self.name}: {answer.sentence}", answer.code)
        if answer.code:
            raise await self._given_up(Loss(answer.sentence.rstrip(".")))
        said = ""
        if len(answer.chosen) != piece.choose and not piece.states_wanted:
            said = f"it chose {len(answer.chosen)} tokens where {piece.choose} were asked for"
        elif not allow(piece.sampling.masks, [one.token for one in answer.chosen]):
            said = "it chose a token that was not allowed"
        if said:
            raise await self._given_up(Loss(said, frozenset({self.places[-1].node})))
        if measure and (alone or flying <= FEW):
            self.latency.measured(self._clock.monotonic() - began, flying)
            self.token_ms = self.latency.mean_s * 1000
        if alone and len(piece.tokens) <= FEW:
            self.computed(answer.computed_ms)
        return Advanced(states=answer.states, chosen=answer.chosen, computed_ms=answer.computed_ms)

    async def _hand(self, work: StageWork, answered: asyncio.Future[StageAnswer]) -> None:
        """To the first stage. What it refuses is the answer."""
        link = self._links[0]
        try:
            await link.request(work.KIND, encode(work, link.version), deadline_s=HANDED_S)
        except LinkError as error:
            code = error.remote_code if isinstance(error, Refused) else error.code
            if not answered.done():
                answered.set_result(
                    StageAnswer(
                        ring=self.ring, session=work.session, number=work.number, code=code,
                        sentence=error.sentence[:400],
                    )
                )  # fmt: skip

    async def _answer(self, future: asyncio.Future[StageAnswer], deadline_s: float) -> StageAnswer:
        """Silence may be a slow machine, or a dead one: after a while all stages are asked."""
        began = self._clock.monotonic()
        while True:
            await asyncio.wait([future], timeout=deadline_s)
            if future.done():
                return future.result()
            loss = await self._check()
            if future.done():
                return future.result()
            waited_s = self._clock.monotonic() - began
            if loss is None and waited_s > STUCK_S:
                busy = max(self._busy_ms, key=lambda node: self._busy_ms[node])
                loss = Loss(f"it did not answer within {waited_s:.0f} s", frozenset({busy}))
            if loss is not None:
                raise await self._given_up(loss)
            deadline_s *= 2

    async def _given_up(self, loss: Loss) -> RingLost:
        """The ring is lost; finds out by whom if that is not known."""
        if not loss.nodes and not loss.ways:
            found = await self._check()
            if found is not None:
                loss = Loss(loss.reason, found.nodes, found.ways)
        self.lose(loss)
        return RingLost(f"{self.name}: {self.lost.result().reason}.")

    async def _check(self) -> Loss | None:
        """What is wrong with the ring; none when all its stages answer. One check at a time, for all who ask."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._checked())
        return await asyncio.shield(self._checking)

    async def _checked(self) -> Loss | None:
        far_s = min(max(PULSE_S, 2 * self._planned_s), PULSE_MAX_S)
        # From stage to stage the question queues behind hidden states.
        patience_s = min(max(far_s, self.latency.deadline_s(self._flying)), PULSE_MAX_S)
        order = [place.node for place in self.places]

        async def pulse(at: int) -> Loss | None:
            link, ask, echo = self._links[at], StagePulse(ring=self.ring, patience_ms=patience_s * 1000), LinkEcho()
            pulsing = asyncio.create_task(
                link.request(ask.KIND, encode(ask, link.version), deadline_s=patience_s + far_s)
            )
            try:
                # Whoever is silent here is known to be so without waiting for what it would say of the next one.
                await link.request(echo.KIND, encode(echo, link.version), deadline_s=far_s)
                found = decode(StagePulsed, await pulsing, link.version)
            except ShoalError as error:
                return Loss(f"stage {at + 1} is silent: {error.sentence.rstrip('.')}", frozenset({order[at]}))
            finally:
                pulsing.cancel()
                await asyncio.gather(pulsing, return_exceptions=True)
            self._busy_ms[order[at]] = found.waiting_ms
            if not found.next_answers and at + 1 < len(order):
                said = f"stage {at + 2} does not answer stage {at + 1}"
                return Loss(said, ways=frozenset({(order[at], order[at + 1])}))
            return None

        losses = [loss for loss in await asyncio.gather(*map(pulse, range(len(order)))) if loss is not None]
        if not losses:
            return None
        nodes = frozenset[bytes]().union(*(loss.nodes for loss in losses))
        # The way to a node that answers nobody is not what is wrong with it.
        ways = frozenset(way for loss in losses for way in loss.ways if not nodes & set(way))
        blamed = next((loss for loss in losses if loss.nodes), losses[0])
        return Loss(blamed.reason, nodes, ways)

    async def close_session(self, session: int, *, keep: bool = False) -> None:
        forget, seen = StageForget(ring=self.ring, session=session, keep=keep), self._meter.close(session)

        async def tell(at: int, link: Link) -> None:
            receipt = None
            try:
                reply = await link.request(forget.KIND, encode(forget, link.version), deadline_s=ARRIVED_S)
                receipt = decode(StageForgotten, reply, link.version).receipt
            except LinkError:
                return
            finally:
                if seen is not None:
                    self._meter.heard(session, seen, at, receipt)

        await asyncio.gather(*(tell(at, link) for at, link in enumerate(self._links)), return_exceptions=True)

    async def close(self, reason: str) -> None:
        """Let the nodes go, those that are left of a lost ring with a receipt for what they did."""
        self.lose(Loss(reason))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECEIPTS_S):
                await asyncio.gather(*(self.close_session(session) for session in self._meter.open))
        end = StageEnd(ring=self.ring, reason=reason)

        async def tell(link: Link) -> None:
            await link.request(end.KIND, encode(end, link.version), deadline_s=ARRIVED_S)

        await asyncio.gather(*(tell(link) for link in self._links if not link.closed), return_exceptions=True)
        for task in self._watching:
            task.cancel()


class Rings:
    """All rings of a gateway, as its endpoint hears of them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._rings: dict[bytes, NodeRing] = {}
        for kind, tell in (
            (StageReady, NodeRing.stage_ready),
            (StageGone, NodeRing.stage_gone),
            (StageLeaving, NodeRing.stage_leaving),
            (StageAnswer, NodeRing.answered),
        ):
            endpoint.handle(kind.KIND, functools.partial(self._heard, kind, tell))
        endpoint.handle(StageKnown.KIND, self._known)

    def add(self, ring: NodeRing) -> None:
        self._rings[ring.ring] = ring
        ring.lost.add_done_callback(lambda lost: self._lost(ring, lost.result()))

    def _lost(self, ring: NodeRing, loss: Loss) -> None:
        """What one ring has found out, others need not find out again."""
        self._rings.pop(ring.ring, None)
        for other in [other for other in self._rings.values() if other.uses(loss)]:
            other.lose(Loss(f"{ring.name}: {loss.reason}", loss.nodes, loss.ways))

    async def _known(self, request: Request) -> bytes:
        message = decode(StageKnown, request.body, request.version)
        ring = self._rings.get(message.ring)
        if ring is None or request.peer not in {place.node for place in ring.places}:
            raise UnknownRing("This ring is not wanted any more.")
        return encode(Done(), request.version)

    async def _heard(self, kind: Any, tell: Callable[[NodeRing, Any, bytes], None], request: Request) -> bytes:
        """What a stage says goes to its ring; of a ring that is no more, nowhere."""
        message = decode(kind, request.body, request.version)
        ring = self._rings.get(message.ring)
        if ring is not None:
            tell(ring, message, request.peer)
        return encode(Done(), request.version)
