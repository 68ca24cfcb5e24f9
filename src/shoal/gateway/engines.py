"""Whole replicas in servers beside nodes: found by what their nodes offer, and asked for continuations.

Such a server chooses tokens by itself, in whatever arithmetic it has: it is not exact. When it is lost, what was given
out stays, and the stream goes on elsewhere from there. One whose node costs something is taken for money where nothing
else serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from shoal.errors import BadRecord, LinkError, ShoalError
from shoal.gateway.encoding import Encoder, Unwritable
from shoal.gateway.meeting import Meetings
from shoal.gateway.paying import BUY_WAIT_S, TAKEN_BACK, Paying
from shoal.gateway.prefixes import Prefixes
from shoal.gateway.receipts import Metering, RingMeter
from shoal.gateway.rings import AT_ONCE, Given, Replica, RingLost
from shoal.gateway.routing import cheapest
from shoal.market.earnings import token_us
from shoal.models.tokenizers import TextTokenizer
from shoal.protocol.engines import EngineAsk, EngineEnd, EnginePiece, EngineSession, PieceReader
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import FOUND_MAX, EngineOffer, Offer, OfferFind
from shoal.protocol.serving import Choosing, Chosen, StageForgotten, StagePlace
from shoal.quantities.money import format_price
from shoal.world import Clock, Dice, Directory, Endpoint, FoundOffer, Link, Refused, within
from shoal.world.quotes import serves_free

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
MIND_EVERY_S = 0.5
"""How often it is looked whether engines are to be taken for money, or let go."""
PART_LOOK_S = 0.05
USED_UP = "the budget is used up"
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
        self._stopped = ""

    @property
    def is_idle(self) -> bool:
        """Nothing is under way, and no receipt is waited for."""
        return not (self._running or self.ending)

    def stop(self, reason: str) -> None:
        """It is of no more use, and what is under way there goes on elsewhere."""
        self._stopped = reason
        self.lose(reason)

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
                    counted = 0  # no more than was asked for
                    async for piece in pieces:
                        if self._stopped:
                            raise RingLost(f"{self.name}: {self._stopped}.")
                        chosen = self._chosen(piece, encoder)
                        for _ in range(min(piece.counts(self.engine.gives_tokens), tokens_max - counted)):
                            self._count(session, positions, counted, choosing)
                            counted += 1
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
                ending = asyncio.ensure_future(self._end(session))
                self.ending.add(ending)
                ending.add_done_callback(self.ending.discard)

    def _count(self, session: int, positions: int, before: int, choosing: Choosing) -> None:
        """A token has come, after so many others: it followed on all positions, or on the token before it."""
        start, size = (positions + before - 1, 1) if before else (0, positions)
        self._meter.sent(session, start, size, 1, choosing)
        self._meter.came(session, start, size, 1, choosing)

    async def _end(self, session: int) -> None:
        """Have a receipt for what came."""
        link, receipt, seen = self._link, None, self._meter.close(session)
        end = EngineEnd(ring=self._meter.ring, session=session, generated=seen.came.generated if seen else 0)
        try:
            reply = await link.request(end.KIND, encode(end, link.version), deadline_s=RECEIPT_S)
            receipt = decode(StageForgotten, reply, link.version).receipt
        except (LinkError, BadRecord) as error:
            _log.info("%s gave no receipt: %s", self.name, error)
        if seen is not None:
            self._meter.heard(session, seen, 0, receipt or None)

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
    offer: Offer
    """The newest, as long as it is of use."""
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
    paying: Paying | None = None
    """None: only engines whose nodes serve for nothing are of use."""
    alone: bool = False
    """No rings serve besides, so whether one is taken for money is decided here."""
    token_ms_max: float = math.inf
    """What a token may take at one that is taken."""
    changed: Callable[[], None] = lambda: None
    """Told when one came, or is of no more use."""
    met: dict[bytes, _Met] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._meetings = Meetings(self.endpoint, self.directory, self.clock, self._take)
        self._tasks: set[asyncio.Task[None]] = set()
        self._buying: asyncio.Task[None] | None = None
        self._looked = False
        self._dear = 0

    async def run(self) -> None:
        if self.paying is not None:
            self._begin(self._mind_money(self.paying))
        await self._meetings.run(self.look)

    async def look(self) -> None:
        """One look at what is offered."""
        found = await self._offers()
        for node, met in list(self.met.items()):
            if met.link.closed:
                met.replica.lose("the link to its node is down")
            elif node not in found:
                met.replica.lose("its node does not offer it any more")
            elif found[node].offer.engine != met.replica.engine:
                met.replica.lose("its server was tried anew")
            if node not in found or self._again(met, found[node]):
                del self.met[node]
            elif met.lost_s is None:
                met.offer = found[node].offer
        theirs = [one for one in found.values() if one.offer.engine and one.offer.engine.model == self.model]
        able = [one for one in theirs if serves_free(one.offer) or (self.paying and self.paying.takes(one.offer))]
        self._say_dear(len(theirs) - len(able))
        for one in able:
            if one.node not in self.met:
                self._meetings.meet(one)
        self._looked = True
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
        for task in self._tasks:
            task.cancel()
        ending = [task for met in self.met.values() for task in met.replica.ending]
        if ending:
            await asyncio.wait(ending, timeout=LAST_RECEIPTS_S)

    def _again(self, met: _Met, one: FoundOffer) -> bool:
        if met.lost_s is None:
            return False
        return one.offer.sequence != met.offer.sequence or self.clock.monotonic() - met.lost_s > AGAIN_S

    async def _take(self, one: FoundOffer, link: Link, far_ms: float) -> None:
        engine = one.offer.engine
        assert engine is not None, "others are not met"
        self._meetings.failed.succeeded(one.node)
        place = StagePlace(node=one.node, addresses=(), first=0, stop=self.layers)
        replica = EngineReplica(
            f"{one.offer.name} (engine)", engine, link, far_ms=far_ms, tokenizer=self.tokenizer, clock=self.clock,
            meter=self.metering.ring(
                self.dice.bytes(16), (place,), (one.offer.name,), functools.partial(self._earned, one.node, engine)
            ),
            lost=functools.partial(self._lost, one.node),
        )  # fmt: skip
        self.met[one.node] = met = _Met(replica, link, one.offer)
        if not serves_free(one.offer):
            return
        if replica.token_ms > self.token_ms_max:
            self.say(
                f"{replica.name} is left out: a token takes {replica.token_ms:.0f} ms there, and "
                f"{self.token_ms_max:.4g} ms are asked for."
            )
            return
        self._serve(met)

    def _serve(self, met: _Met) -> None:
        replica = met.replica
        self.serving.append(replica)
        self.say(f"{replica.name} is ready: {replica.token_ms:.1f} ms a token, {replica.start_ms:.1f} ms away.")
        self.changed()

    def _lost(self, node: bytes, replica: EngineReplica) -> None:
        met = self.met.get(node)
        if met is not None and met.replica is replica:
            met.lost_s = self.clock.monotonic()
        if replica not in self.serving:
            return
        self.serving.remove(replica)
        self.say(f"{replica.name} is lost: {replica.reason}.")
        if self.paying is not None and node in self.paying.engines:
            self.paying.engines.remove(node)
            self._begin(self._part_from(self.paying, node, replica))
        self.changed()

    # --- engines that cost something -------------------------------------------------------------------------------

    @property
    def looked(self) -> bool:
        """Whether a hub was asked, and whoever it named was met or tried in vain."""
        return self._looked and not self._meetings.under_way

    @property
    def serves(self) -> bool:
        """One does, or will as soon as its place is taken."""
        buying = self._buying is not None and not self._buying.done()
        return buying or any(isinstance(one, EngineReplica) and not one.leaving for one in self.serving)

    def buy(self, rival: tuple[int, float] | None = None) -> bool:
        """Begin to take a place at the engine that costs least, if there is one, and it does better than a `rival` with
        its price and milliseconds a token. Gives whether it does."""
        paying = self.paying
        if paying is None or paying.closing:
            return False
        able = [
            (node, met, met.offer.price.micro_per_h)
            for node, met in self.met.items()
            if met.lost_s is None and met.offer.price is not None and not serves_free(met.offer)
            and (not met.offer.busy or node in paying.former)
            and node not in paying.taken | paying.engines | paying.leaves_s.keys()
            and not self._meetings.failed.rests(node)
        ]  # fmt: skip
        options = [(price, met.replica.token_ms) for _, met, price in able]
        best = cheapest([*options, *([rival] if rival else [])], self.token_ms_max)
        if best is None or best == len(able):
            return False
        node, met, price = able[best]
        self.say(f"Chosen for {format_price(price)} at most: {met.replica.name}.")
        self._buying = self._begin(self._take_place(paying, node, met))
        return True

    async def _take_place(self, paying: Paying, node: bytes, met: _Met) -> None:
        try:
            await paying.take_engine(node, met.offer)
        except ShoalError as error:
            self.say(f"Nothing was taken for money: {error.sentence}")
            self._meetings.failed.tried(node)
            self.changed()
            return
        if met.replica.reason:
            paying.let_go(node, met.replica.reason)
            self.changed()
            return
        paying.ready(node)
        self._serve(met)

    def _earned(self, node: bytes, engine: EngineOffer, at: int, parts: int, receipt: bytes | None) -> None:
        """By what a token took when its node tried it."""
        if self.paying is not None:
            self.paying.served(node, parts, token_us(1, engine.token_ms, 0.0), receipt)

    async def _mind_money(self, paying: Paying) -> None:
        """Take one where nothing serves, and let go those for which there is no more money, or whose owners take them
        back: these go on while they are needed, until the notice is over."""
        waits_s: float | None = None
        while True:
            taken = {node: self.met[node].replica for node in paying.engines}
            for node, replica in taken.items():
                if (paying.closing or node in paying.leaves_s) and not replica.leaving:
                    replica.leaving = True
                    self.changed()
            others = any(not one.leaving and not one.standby for one in self.serving)
            for node, replica in taken.items():
                unused = others and replica.is_idle and not replica.streams
                if paying.closing and paying.spent:
                    replica.stop(USED_UP)
                elif node in paying.leaves_s and (unused or self.clock.monotonic() >= paying.leaves_s[node]):
                    replica.stop(TAKEN_BACK)
            if not self.alone or others or self.serves:
                waits_s = None
            else:
                waits_s = self.clock.monotonic() if waits_s is None else waits_s
                if self.looked or self.clock.monotonic() - waits_s > BUY_WAIT_S:
                    self.buy()
            await self.clock.sleep(MIND_EVERY_S)

    async def _part_from(self, paying: Paying, node: bytes, replica: EngineReplica) -> None:
        """Once its receipts are there, as far as they come."""
        until_s = self.clock.monotonic() + RECEIPT_S
        while not replica.is_idle and self.clock.monotonic() < until_s:
            await self.clock.sleep(PART_LOOK_S)
        await paying.part_from(node, replica.reason)

    def _say_dear(self, dear: int) -> None:
        if dear > self._dear:
            which = "are paid at another ledger than yours" if self.paying else "cost something"
            todo = "" if self.paying else "; give it a --budget to have them"
            self.say(f"Engines of this model that {which}: {dear}{todo}.")
        self._dear = dear

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
