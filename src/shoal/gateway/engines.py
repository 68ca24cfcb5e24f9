"""Whole replicas in servers beside nodes: found by what their nodes offer, and asked for continuations.

Such a server chooses tokens by itself, in whatever arithmetic it has: it is not exact. When it is lost, what was given
out stays, and the stream goes on elsewhere from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from shoal.errors import BadRecord, LinkError
from shoal.gateway.encoding import Encoder, Unwritable
from shoal.gateway.meeting import Meetings
from shoal.gateway.prefixes import Prefixes
from shoal.gateway.receipts import Metering, RingMeter, SessionMeter
from shoal.gateway.rings import AT_ONCE, Given, Replica, RingLost
from shoal.inference.metering import Served
from shoal.models.tokenizers import TextTokenizer
from shoal.protocol.engines import EngineAsk, EngineEnd, EnginePiece, EngineSession, PieceReader
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import FOUND_MAX, EngineOffer, OfferFind
from shoal.protocol.serving import Choosing, Chosen, StageForgotten, StagePlace
from shoal.world import Clock, Dice, Directory, Endpoint, FoundOffer, Link, Refused, within

OFFERS_MAX = 4 * FOUND_MAX
"""Offers of one model that are looked at."""
MEET_S = 1.0
"""A look waits so long for those that it meets; the others come when they come."""
SILENCE_S = 3.0
"""A node says every second that it is there, whatever its server does."""
REPLY_MAX_BYTES = 1 << 30
AGAIN_S = 30.0
"""A replica that was lost is taken again after so long, or as soon as its node's offer is a new one."""
REFUSALS = frozenset({"SH-273", "SH-274", "SH-581"})
"""What a node says of one request; others may go there."""
RECEIPT_S = 5.0
"""How long the receipt of a session is waited for."""
LAST_RECEIPTS_S = 1.0
"""The same for all sessions together, when the gateway stops."""
PREFIXES_MAX = 256
FIRST_TOKEN_MS = 50.0
"""Of an engine of which nothing is known."""

_log = logging.getLogger("shoal.gateway")


class EngineReplica:
    """A whole model in a server beside a node, with a link from the gateway to the node."""

    arithmetic = ""

    def __init__(
        self,
        name: str,
        engine: EngineOffer,
        link: Link,
        *,
        far_ms: float,
        tokenizer: TextTokenizer,
        clock: Clock,
        meter: RingMeter,
        lost: Callable[[EngineReplica], None] = lambda _: None,
    ) -> None:
        """`lost` is told once when it is of no more use."""
        self.name, self.engine = name, engine
        self.token_ms, self.start_ms = engine.token_ms or FIRST_TOKEN_MS, far_ms
        self.reason = ""
        """Why it is of no more use, if it is not."""
        self._link, self._tokenizer, self._clock, self._lost = link, tokenizer, clock, lost
        self._meter = meter
        self.ending: set[asyncio.Task[None]] = set()
        """Receipts that are waited for."""
        self._places = asyncio.Semaphore(AT_ONCE)
        self.computing_ms = 0.0
        self.streams, self.standby, self.leaving = 0, False, False
        self.prefixes = Prefixes(PREFIXES_MAX)
        """What it is likely to have: it keeps them as it sees fit."""
        self._numbers = itertools.count()
        self._running = 0

    def lose(self, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            self._lost(self)

    async def generate(self, tokens: Sequence[int], choosing: Choosing, tokens_max: int) -> AsyncGenerator[Given]:
        """What follows these tokens, until it ends by itself. Raises RingLost."""
        said, positions, session = list(tokens), len(tokens), next(self._numbers)  # whoever asks may add to its tokens
        async with self._places:
            self._running += 1
            try:
                ask = self._ask(tokens, choosing, tokens_max, session)
                async with contextlib.aclosing(self._pieces(ask)) as pieces:
                    encoder = None if self.engine.gives_tokens else Encoder(self._tokenizer, said)
                    last = None
                    async for piece in pieces:
                        chosen = self._chosen(piece, encoder)
                        now = self._clock.monotonic()
                        if last is not None and chosen and self._running == 1:
                            self.token_ms += 0.05 * (1000 * (now - last) / len(chosen) - self.token_ms)
                        last = now if chosen else last
                        said += [one.token for one in chosen]
                        yield Given(chosen, piece.finish)
            except Unwritable as error:
                raise RingLost(f"{self.name}: {error}.") from error
            finally:
                self._running -= 1
                self.prefixes.add(session, said)
                seen = Served.continued(positions, len(said) - positions, choosing.prompt_tokens)
                ending = asyncio.ensure_future(self._end(session, seen))
                self.ending.add(ending)
                ending.add_done_callback(self.ending.discard)

    async def _end(self, session: int, seen: Served) -> None:
        """Have a receipt for what came."""
        link, receipt = self._link, None
        end = EngineEnd(ring=self._meter.ring, session=session, generated=seen.generated)
        try:
            reply = await link.request(end.KIND, encode(end, link.version), deadline_s=RECEIPT_S)
            receipt = decode(StageForgotten, reply, link.version).receipt
        except (LinkError, BadRecord) as error:
            _log.info("%s gave no receipt: %s", self.name, error)
        if seen.generated:
            self._meter.heard(session, SessionMeter(seen), 0, receipt or None)

    def _ask(self, tokens: Sequence[int], choosing: Choosing, tokens_max: int, session: int) -> EngineAsk:
        metered = EngineSession(
            job=self._meter.metering.job, ring=self._meter.ring, session=session, layers=self._meter.places[0].stop,
            positions=len(tokens),
        )  # fmt: skip
        ask = functools.partial(
            EngineAsk, model=self.engine.model, tokens_max=tokens_max, choosing=choosing, session=metered
        )
        if self.engine.takes_tokens:
            return ask(tokens=tuple(tokens))
        Encoder(self._tokenizer, tokens)  # refuses what no text can say
        return ask(text=self._tokenizer.written(list(tokens)))

    async def _pieces(self, ask: EngineAsk) -> AsyncGenerator[EnginePiece]:
        """Raises RingLost, also where the stream ends without having said why."""
        link = self._link
        try:
            body, reader = encode(ask, link.version), PieceReader(link.version)
            async with link.stream(ask.KIND, body, stall_s=SILENCE_S, max_bytes=REPLY_MAX_BYTES) as parts:
                async for part in parts:
                    for piece in reader.feed(part):
                        yield piece
                        if piece.finish:
                            return
            self._give_up("it ended in the middle")
        except Refused as error:
            if error.remote_code in REFUSALS:
                raise RingLost(f"{self.name}: {error.sentence}") from error
            self._give_up(error.sentence.rstrip("."), error)
        except (LinkError, BadRecord) as error:
            self._give_up(error.sentence.rstrip("."), error)

    def _chosen(self, piece: EnginePiece, encoder: Encoder | None) -> tuple[Chosen, ...]:
        if encoder is not None:
            return tuple(Chosen(token) for token in encoder.add(piece.text, last=bool(piece.finish)))
        if any(token >= self._tokenizer.vocabulary for token in piece.tokens):
            self._give_up(f"it chose a token that is none of the model's {self._tokenizer.vocabulary}")
        return tuple(Chosen(token) for token in piece.tokens)

    def _give_up(self, reason: str, cause: Exception | None = None) -> None:
        self.lose(reason)
        raise RingLost(f"{self.name}: {reason}.") from cause


@dataclass
class _Met:
    replica: EngineReplica
    link: Link
    sequence: int
    """Of the offer by which it was found."""
    lost_s: float | None = None


@dataclass
class EngineFinder:
    """Keeps the replicas of a model that are engines. `run` goes on until it is cancelled."""

    model: str
    """As the engines call it."""
    tokenizer: TextTokenizer
    endpoint: Endpoint
    directory: Directory
    clock: Clock
    serving: list[Replica]
    """Replicas that are ready, for whoever sends streams through them."""
    dice: Dice
    metering: Metering
    layers: int = 1
    """Of the model, for receipts."""
    say: Callable[[str], None] = lambda _: None
    met: dict[bytes, _Met] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._meetings = Meetings(self.endpoint, self.directory, self.clock, self._take)

    async def run(self) -> None:
        await self._meetings.run(self.look)

    async def look(self) -> None:
        """One look at what is offered."""
        found = await self._offers()
        for node, met in list(self.met.items()):
            if met.link.closed:
                met.replica.lose("the link to its node is down")
            elif node not in found:
                met.replica.lose("its node does not offer it any more")
            if node not in found or self._again(met, found[node]):
                del self.met[node]
        for node, one in found.items():
            if node not in self.met and one.offer.engine is not None and one.offer.engine.model == self.model:
                self._meetings.meet(one)
        if self._meetings.under_way:
            with contextlib.suppress(TimeoutError):
                await within(self.clock, MEET_S, asyncio.wait(list(self._meetings.under_way.values())))

    async def _offers(self) -> dict[bytes, FoundOffer]:
        """All of this model, by node. Raises LinkError."""
        found: dict[bytes, FoundOffer] = {}
        after: bytes | None = None
        while len(found) < OFFERS_MAX:
            page = await self.directory.find(
                OfferFind(accepts="engine", model=self.model, limit=FOUND_MAX, after=after)
            )
            found |= {one.node: one for one in page}
            if len(page) < FOUND_MAX:
                break
            after = page[-1].node
        return found

    async def close(self) -> None:
        """Take the receipts that are still to come, as far as they come soon."""
        self._meetings.stop()
        ending = [task for met in self.met.values() for task in met.replica.ending]
        if ending:
            await asyncio.wait(ending, timeout=LAST_RECEIPTS_S)

    def _again(self, met: _Met, one: FoundOffer) -> bool:
        if met.lost_s is None:
            return False
        return one.offer.sequence != met.sequence or self.clock.monotonic() - met.lost_s > AGAIN_S

    async def _take(self, one: FoundOffer, link: Link, far_ms: float) -> None:
        engine = one.offer.engine
        assert engine is not None, "others are not met"
        self._meetings.failed.succeeded(one.node)
        place = StagePlace(node=one.node, addresses=(), first=0, stop=self.layers)
        replica = EngineReplica(
            f"{one.offer.name} (engine)", engine, link, far_ms=far_ms, tokenizer=self.tokenizer, clock=self.clock,
            meter=self.metering.ring(self.dice.bytes(16), (place,), (one.offer.name,)),
            lost=functools.partial(self._lost, one.node),
        )  # fmt: skip
        self.met[one.node] = _Met(replica, link, one.offer.sequence)
        self.serving.append(replica)
        self.say(f"{replica.name} is ready: {replica.token_ms:.1f} ms a token, {far_ms:.1f} ms away.")

    def _lost(self, node: bytes, replica: EngineReplica) -> None:
        with contextlib.suppress(ValueError):
            self.serving.remove(replica)
        met = self.met.get(node)
        if met is not None and met.replica is replica:
            met.lost_s = self.clock.monotonic()
        self.say(f"{replica.name} is lost: {replica.reason}.")
