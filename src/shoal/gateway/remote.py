"""A replica on nodes of the shoal."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from shoal.errors import LinkError
from shoal.gateway.rings import LimitedRing, RingLost, RingRefused
from shoal.identity import Envelope
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import Done
from shoal.protocol.serving import (
    Choosing,
    Chosen,
    StageAnswer,
    StageEnd,
    StageForget,
    StageForgotten,
    StageGone,
    StagePlace,
    StageReady,
    StageWork,
)
from shoal.world import Clock, Endpoint, Link, Refused, Request

FIRST_DEADLINE_S = 10.0
"""For a ring of which nothing is known yet."""
LEAST_DEADLINE_S = 0.4
DEVIATIONS = 6.0
ARRIVED_S = 5.0
REFUSALS = frozenset({"SH-270", "SH-272", "SH-570"})
"""What a stage says of a request, not of itself: elsewhere it would be the same, or memory is full."""


@dataclass
class Latency:
    """What a crossing took lately, and how long to wait for one before the ring is thought dead: mean and mean
    deviation, as TCP does it (Jacobson, 1988). Silence is all that a dead link says."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    position_s: float = 0.0
    """What each further position adds."""

    def measured(self, took_s: float, positions: int) -> None:
        if not (took_s > 0 and math.isfinite(took_s)):
            return
        if self.mean_s == 0:
            self.mean_s, self.deviation_s = took_s / max(1, positions) ** 0.5, took_s / 2
            return
        expected = self.mean_s + self.position_s * (positions - 1)
        off = took_s - expected
        self.deviation_s += 0.1 * (abs(off) - self.deviation_s)
        if positions > 8:
            self.position_s = max(0.0, self.position_s + 0.1 * off / positions)
        else:
            self.mean_s = max(1e-4, self.mean_s + 0.1 * off)

    def deadline_s(self, positions: int) -> float:
        if self.mean_s == 0:
            return FIRST_DEADLINE_S
        expected = self.mean_s + self.position_s * (positions - 1)
        if positions > 8 and self.position_s == 0:
            return FIRST_DEADLINE_S
        return max(LEAST_DEADLINE_S, 2 * expected + DEVIATIONS * self.deviation_s)


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
        receipt: Callable[[Envelope], None] = lambda _: None,
    ) -> None:
        super().__init__(name, exact=True, token_ms=token_ms)
        self.ring = ring
        self.places = tuple(places)
        self._links = tuple(links)
        self._clock, self._receipt = clock, receipt
        self._number = 0
        self._waiting: dict[int, asyncio.Future[StageAnswer]] = {}
        self._ready: dict[int, StageReady] = {}
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.latency = Latency()
        self._watching = [asyncio.create_task(self._watch(link)) for link in self._links]

    async def _watch(self, link: Link) -> None:
        reason = await link.wait_closed()
        self.lose(f"the link to a stage of it is down ({reason})")

    def lose(self, reason: str) -> None:
        """It is of no more use: whoever waits for it hears so at once."""
        if self.lost.done():
            return
        self.lost.set_result(reason)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RingLost(f"{self.name}: {reason}."))

    # --- what stages say -------------------------------------------------------------------------------------------

    def stage_ready(self, message: StageReady, peer: bytes) -> None:
        if message.mine >= len(self.places) or self.places[message.mine].node != peer or self.ready.done():
            return
        self._ready[message.mine] = message
        if len(self._ready) == len(self.places):
            self.exact = all(one.exact for one in self._ready.values())
            self.ready.set_result(None)

    def measured(self, mine: int) -> StageReady | None:
        return self._ready.get(mine)

    def stage_gone(self, message: StageGone, peer: bytes) -> None:
        if message.mine < len(self.places) and self.places[message.mine].node == peer:
            self.lose(message.reason.rstrip("."))

    def answered(self, message: StageAnswer, peer: bytes) -> None:
        """The last stage answers; any stage may say that it cannot."""
        if peer != self.places[-1].node and not (message.code and peer in {place.node for place in self.places}):
            return
        future = self._waiting.get(message.number)
        if future is not None and not future.done():
            future.set_result(message)

    # --- what the gateway asks -------------------------------------------------------------------------------------

    async def _through(
        self, session: int, start: int, tokens: Sequence[int], choose: int, sampling: Choosing
    ) -> tuple[Chosen, ...]:
        if self.lost.done():
            raise RingLost(f"{self.name}: {self.lost.result()}.")
        self._number += 1
        number = self._number
        future: asyncio.Future[StageAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        work = StageWork(
            ring=self.ring, session=session, number=number, start=start, tokens=tuple(tokens), choose=choose,
            choosing=sampling,
        )  # fmt: skip
        began = self._clock.monotonic()
        deadline_s = self.latency.deadline_s(len(tokens))
        try:
            async with asyncio.timeout(deadline_s):
                link = self._links[0]
                await link.request(work.KIND, encode(work, link.version), deadline_s=deadline_s)
                answer = await future
        except TimeoutError as error:
            self._give_up(f"it did not answer within {deadline_s:.2f} s", error)
        except Refused as error:
            self._refused(error.remote_code, error.sentence)
        except LinkError as error:
            self._give_up(error.sentence.rstrip("."), error)
        finally:
            del self._waiting[number]
        if answer.code:
            self._refused(answer.code, answer.sentence)
        if len(answer.chosen) != choose:
            self._give_up(f"it chose {len(answer.chosen)} tokens where {choose} were asked for")
        self.latency.measured(self._clock.monotonic() - began, len(tokens))
        return answer.chosen

    def _refused(self, code: str, sentence: str) -> NoReturn:
        if code in REFUSALS:
            raise RingRefused(f"{self.name}: {sentence}", code)
        self._give_up(sentence.rstrip("."))

    def _give_up(self, reason: str, cause: Exception | None = None) -> NoReturn:
        self.lose(reason)
        raise RingLost(f"{self.name}: {reason}.") from cause

    async def close_session(self, session: int) -> None:
        forget = StageForget(ring=self.ring, session=session)

        async def tell(link: Link) -> None:
            try:
                reply = await link.request(forget.KIND, encode(forget, link.version), deadline_s=ARRIVED_S)
                forgotten = decode(StageForgotten, reply, link.version)
                if forgotten.receipt:
                    self._receipt(Envelope.from_bytes(forgotten.receipt, StageForgotten.MAX_BYTES))
            except LinkError:
                return

        await asyncio.gather(*(tell(link) for link in self._links), return_exceptions=True)

    async def close(self, reason: str) -> None:
        """Let the nodes go."""
        self.lose(reason)
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
            (StageAnswer, NodeRing.answered),
        ):
            endpoint.handle(kind.KIND, functools.partial(self._heard, kind, tell))

    def add(self, ring: NodeRing) -> None:
        self._rings[ring.ring] = ring
        ring.lost.add_done_callback(lambda _: self._rings.pop(ring.ring, None))

    async def _heard(self, kind: Any, tell: Callable[[NodeRing, Any, bytes], None], request: Request) -> bytes:
        """What a stage says goes to its ring; of a ring that is no more, nowhere."""
        message = decode(kind, request.body, request.version)
        ring = self._rings.get(message.ring)
        if ring is not None:
            tell(ring, message, request.peer)
        return encode(Done(), request.version)
