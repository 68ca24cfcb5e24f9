"""A stage of a ring, on the node that holds it: takes positions from the stage before, through its layers, to the stage
after."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.engines import EngineDied, EngineFailed
from shoal.errors import BadRecord, LinkError, ShoalError
from shoal.identity import Envelope, KeyPair, short_id
from shoal.inference.commands import Advance
from shoal.inference.metering import Served
from shoal.market.earnings import served_parts, token_us
from shoal.node.layers import Layers, Wanted
from shoal.node.lending import NotLent
from shoal.node.sales import Service
from shoal.protocol.messages import encode, open_record, sign
from shoal.protocol.serving import (
    Chosen,
    LinkEcho,
    RequestReceipt,
    ServeJob,
    StageAnswer,
    StageEnd,
    StageForget,
    StageGone,
    StageInvite,
    StageKnown,
    StageLeaving,
    StagePlace,
    StagePulse,
    StagePulsed,
    StageReady,
    StageWork,
)
from shoal.quantities import are_in_order
from shoal.world import Clock, Endpoint, Link, Refused

GATEWAY_SILENCE_S = 120.0
"""A stage whose gateway has had no link for so long ends."""
LOOK_EVERY_S = 5.0
IDLE_S = 15.0
"""A stage of which nothing was asked for so long asks whether it is still wanted: its end may have been lost."""
HAND_ON_S = 5.0
"""How long the next stage may take to say that positions arrived."""
UNDER_WAY_MAX = 48
"""Pieces of work at a time, of all sessions; the engine takes a few more."""
SESSIONS_MAX = 1024
TRY_POSITIONS = 3
"""With which a gateway tries a ring that may be in reserve: they take no memory worth the name."""
EARLY_MAX = 16
"""Pieces of a session that wait for one before them."""
EARLY_S = 5.0

_log = logging.getLogger("shoal.stage")


class NotInRing(BadRecord):
    """Somebody asks something of a stage that is not theirs to ask, or of one that this node does not hold."""

    code = "SH-271"


class StageFull(BadRecord):
    """More work waits at a stage than it takes."""

    code = "SH-272"


class SessionOver(BadRecord):
    """Positions come to a stage after the end of their session: the end went another way, and was quicker."""

    code = "SH-278"


@dataclass
class _Session:
    """A session in this stage."""

    served: Served = field(default_factory=Served)
    reused: int = 0
    reached: int = 0
    """Positions that went to the engine, or were there before."""
    early: dict[int, StageWork] = field(default_factory=dict)
    """Pieces that overtook the one before them on the way, by where they start."""


class StageRun:
    """One stage of one ring, from the invitation to its end."""

    def __init__(
        self,
        invite: StageInvite,
        gateway: bytes,
        *,
        key: KeyPair,
        name: str,
        endpoint: Endpoint,
        clock: Clock,
        network: str,
        layers: Callable[[Wanted, ServeJob, StageInvite], Layers],
        service: Service | None = None,
    ) -> None:
        """`layers`: the node's, loaded or to be loaded. `service`: what is earned for the gateway; none: it serves for
        nothing. Raises BadRecord: a job that the gateway did not sign, more
        than the node lends, a ring that does not hold the model, a stage that is not this node's."""
        envelope = Envelope.from_bytes(invite.job, ServeJob.MAX_BYTES + 1024)
        self.job = open_record(envelope, ServeJob, network)
        if envelope.signer != gateway:
            raise NotInRing(
                f"The serving of {self.job.name!r} was signed by {short_id(envelope.signer)}, another asks."
            )
        _check_ring(invite, self.job, key.node_id)
        self.job_id = envelope.record_id
        self.ring, self.gateway, self.name = invite.ring, gateway, name
        self._invite, self._mine = invite, invite.mine
        self._place: StagePlace = invite.stages[invite.mine]
        self._key, self._network = key, network
        self._endpoint, self._clock = endpoint, clock
        parts = invite.parts or ((),) * len(invite.files)
        wanted = Wanted(self.job_id, self._place.first, self._place.stop, invite.files, parts, invite.memory_bytes)
        self._layers = layers(wanted, self.job, invite)
        self._layers.use()
        self._ready = False
        self._service, self._token_us = service, 0
        self._asked_at = clock.monotonic()
        self._under_way: dict[asyncio.Task[None], float] = {}
        """Pieces of work, and since when."""
        self._sessions: dict[int, _Session] = {}
        self._over: OrderedDict[int, None] = OrderedDict()
        """Those that ended last: what still comes of them would stay for ever."""
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tell = True

    # --- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> str:
        """Load, say so, and serve until the end; gives the reason."""
        beginning = asyncio.create_task(self._begin())
        watching = asyncio.create_task(self._watch_gateway())
        try:
            either: set[asyncio.Future[Any]] = {beginning, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if beginning.done():
                beginning.result()
            reason = await self._ended
        except ShoalError as error:
            reason = error.sentence
        finally:
            for task in (beginning, watching):
                task.cancel()
        if self._tell:  # first: streams wait to go on elsewhere
            gone = StageGone(ring=self.ring, mine=self._mine, reason=reason[:400])
            with contextlib.suppress(LinkError):
                await self._ask(await self._gateway_link(), gone)
        await asyncio.gather(beginning, watching, return_exceptions=True)
        under_way = list(self._under_way)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        if self._ready:
            if self._service is not None:
                self._service.ended()
            # Other rings may go on with these layers.
            sessions = (self._layers.engine.close_session(session) for session in self._sessions)
            await asyncio.gather(*sessions, return_exceptions=True)
        await self._layers.let_go()
        return reason

    def end(self, reason: str, *, tell: bool) -> None:
        if not self._ended.done():
            self._tell = tell
            self._ended.set_result(reason)

    @property
    def dismissed(self) -> bool:
        """Whether its gateway ended it, as it does whenever its plan changes."""
        return not self._tell

    async def leave(self, reason: str, patience_s: float) -> None:
        """Ask the gateway to have its streams elsewhere, and go on until it ends the ring, or for so long."""
        leaving = StageLeaving(ring=self.ring, mine=self._mine, reason=reason, patience_ms=patience_s * 1000)
        try:
            await self._ask(await self._gateway_link(), leaving)
            async with asyncio.timeout(patience_s):
                await asyncio.shield(self._ended)
        except (LinkError, TimeoutError):
            self.end(reason, tell=True)

    async def _begin(self) -> None:
        loaded = await self._layers.loaded()
        self._layers.engine.died.add_done_callback(lambda died: self.end(died.result().sentence, tell=True))
        self._ready = True
        self._token_us = token_us(self._place.stop - self._place.first, loaded.layer_ms, loaded.last_ms)
        if self._service is not None:
            self._service.ready()
        ready = StageReady(
            ring=self.ring,
            mine=self._mine,
            arithmetic=loaded.arithmetic,
            layer_ms=loaded.layer_ms,
            last_ms=loaded.last_ms,
        )
        await self._ask(await self._gateway_link(), ready)

    async def _watch_gateway(self) -> None:
        """Nobody else will ask anything of this stage; nor is it looked after anywhere else that it is paid."""
        seen = self._clock.monotonic()
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            over = self._service.over() if self._service is not None else None
            if over is not None:
                self.end(f"{self.name} serves for this gateway no longer: {over}.", tell=True)
            now = self._clock.monotonic()
            link = self._endpoint.links().get(self.gateway)
            if link is not None and not link.closed:
                seen = now
            elif now - seen > GATEWAY_SILENCE_S:
                self.end(f"The gateway was away for {GATEWAY_SILENCE_S:.0f} s.", tell=False)
            if link is not None and now - self._asked_at > IDLE_S:
                self._asked_at = now
                known = StageKnown(ring=self.ring)
                try:
                    await link.request(known.KIND, encode(known, link.version), deadline_s=HAND_ON_S)
                except Refused as error:
                    self.end(error.sentence, tell=False)
                except LinkError:
                    continue

    # --- positions -------------------------------------------------------------------------------------------------

    def work(self, message: StageWork, peer: bytes) -> None:
        """Positions have come. Raises NotInRing, SessionOver, StageFull, NotLent."""
        before = self.gateway if self._mine == 0 else self._invite.stages[self._mine - 1].node
        if peer != before:
            raise NotInRing(f"Node {short_id(peer)} is not before {self.name} in this ring.")
        if not self._ready or self._ended.done():
            raise NotInRing(f"{self.name} does not hold its layers yet, or not any more.")
        if message.session in self._over:
            raise SessionOver(f"Session {message.session} is over.")
        if len(self._under_way) >= UNDER_WAY_MAX:
            raise StageFull(f"{self.name} has {UNDER_WAY_MAX} pieces of work already.")
        if message.session not in self._sessions and len(self._sessions) >= SESSIONS_MAX:
            raise StageFull(f"{self.name} has {SESSIONS_MAX} sessions already.")
        if message.start + len(message.tokens) > TRY_POSITIONS:
            self._layers.lend_sessions()
        self._asked_at = self._clock.monotonic()
        session = self._sessions.setdefault(message.session, _Session())
        if message.source is not None:
            session.reached = session.reused = max(session.reached, message.start)
        if self._mine > 0 and message.start > session.reached:  # a large piece may take longer than a small one
            if len(session.early) >= EARLY_MAX:
                raise StageFull(f"{self.name} waits for positions before {message.start} of a session.")
            session.early[message.start] = message
            self._keep(self._take_late(session, message))
            return
        self._take(session, message)

    def _take(self, session: _Session, message: StageWork) -> None:
        """Into the engine, and those after it that wait."""
        following: StageWork | None = message
        while following is not None:
            session.reached = following.start + len(following.tokens)
            chosen = 0 if following.states_wanted else following.choose
            self._serve(session.served, following, chosen)
            self._keep(self._take_on(following))
            following = session.early.pop(session.reached, None)

    def _serve(self, served: Served, message: StageWork, chosen: int) -> None:
        before = served_parts(served.generated, served.computed)
        served.add(message.start, len(message.tokens), chosen, message.choosing.prompt_tokens)
        if self._service is not None:
            self._service.served(served_parts(served.generated, served.computed) - before, self._token_us)

    async def _take_late(self, session: _Session, message: StageWork) -> None:
        """What was before it does not come: the engine says what is wrong with it."""
        await self._clock.sleep(EARLY_S)
        if session.early.get(message.start) is message:
            del session.early[message.start]
            self._take(session, message)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._under_way[task] = self._clock.monotonic()
        task.add_done_callback(lambda done: self._under_way.pop(done, None))

    async def _take_on(self, message: StageWork) -> None:
        """Through the engine, and on to whoever is next."""
        try:
            done = await self._layers.engine.advance(
                Advance(
                    session=message.session,
                    start=message.start,
                    tokens=message.tokens,
                    states=message.states,
                    choose=message.choose,
                    states_wanted=message.states_wanted,
                    sampling=message.choosing,
                    source=message.source,
                )
            )
            computed_ms = message.computed_ms + done.computed_ms
            if self._mine + 1 == len(self._invite.stages):
                await self._answer(message, chosen=done.chosen, states=done.states, computed_ms=computed_ms)
                return
            handed_on = msgspec.structs.replace(message, states=done.states, computed_ms=computed_ms)
            await self._ask(await self._next_link(), handed_on)
        except EngineDied:
            return  # `run` tells the gateway
        except (EngineFailed, LinkError) as error:
            code = error.code
            if isinstance(error, EngineFailed):
                code = error.cause_code
            elif isinstance(error, Refused) and error.remote_code in (SessionOver.code, NotLent.code):
                code = error.remote_code  # no fault of the ring
            await self._answer(message, code=code, sentence=f"{self.name}: {error.sentence}"[:400])

    async def pulse(self, message: StagePulse, peer: bytes) -> StagePulsed:
        """How it is here, and whether the next stage answers."""
        if peer != self.gateway:
            raise NotInRing("Only the gateway of a ring asks how it is.")
        now = self._clock.monotonic()
        waiting_ms = max((now - since for since in self._under_way.values()), default=0.0) * 1000
        if self._mine + 1 == len(self._invite.stages):
            return StagePulsed(next_answers=True, waiting_ms=waiting_ms)
        try:
            async with asyncio.timeout(message.patience_ms / 1000):
                link = await self._next_link()
                await link.request(LinkEcho.KIND, encode(LinkEcho(), link.version), deadline_s=HAND_ON_S)
        except (LinkError, TimeoutError):
            return StagePulsed(next_answers=False, waiting_ms=waiting_ms)
        return StagePulsed(next_answers=True, waiting_ms=waiting_ms)

    async def _answer(
        self,
        message: StageWork,
        *,
        chosen: tuple[Chosen, ...] = (),
        states: bytes = b"",
        computed_ms: float = 0.0,
        code: str = "",
        sentence: str = "",
    ) -> None:
        answer = StageAnswer(
            ring=self.ring, session=message.session, number=message.number, chosen=chosen, states=states,
            computed_ms=computed_ms, code=code, sentence=sentence,
        )  # fmt: skip
        try:
            await self._ask(await self._gateway_link(), answer)
        except LinkError as error:  # the gateway notices by itself
            _log.info("%s: the answer to session %d did not arrive: %s", self.name, message.session, error)

    async def forget(self, message: StageForget, peer: bytes) -> Envelope | None:
        """A session is over; gives the receipt of what was done for it."""
        if peer != self.gateway:
            raise NotInRing("Only the gateway of a ring ends its sessions.")
        session = self._sessions.pop(message.session, None)
        self._over[message.session] = None
        if len(self._over) > SESSIONS_MAX:
            self._over.popitem(last=False)
        if self._ready:
            with contextlib.suppress(EngineFailed, EngineDied):
                await self._layers.engine.close_session(message.session, keep=message.keep)
        if session is None:
            return None
        served = session.served
        receipt = RequestReceipt(
            job=self.job_id, ring=self.ring, session=message.session, first=self._place.first, stop=self._place.stop,
            prompt_tokens=served.prompt, generated_tokens=served.generated, computed_positions=served.computed,
            reused_positions=session.reused,
        )  # fmt: skip
        return sign(self._key, receipt, self._network)

    def ended_by(self, message: StageEnd, peer: bytes) -> None:
        if peer != self.gateway:
            raise NotInRing("Only the gateway of a ring ends it.")
        self.end(message.reason or "The ring is not needed any more.", tell=False)

    # --- links -----------------------------------------------------------------------------------------------------

    async def _gateway_link(self) -> Link:
        hints = next((one.addresses for one in self._invite.holders if one.node == self.gateway), ())
        return await self._endpoint.dial(self.gateway, hints, deadline_s=HAND_ON_S)

    async def _next_link(self) -> Link:
        after = self._invite.stages[self._mine + 1]
        return await self._endpoint.dial(after.node, after.addresses, deadline_s=HAND_ON_S)

    async def _ask(self, link: Link, message: StageAnswer | StageGone | StageLeaving | StageReady | StageWork) -> None:
        await link.request(message.KIND, encode(message, link.version), deadline_s=HAND_ON_S)


def _check_ring(invite: StageInvite, job: ServeJob, me: bytes) -> None:
    stages = invite.stages
    ends = [0, *(stage.stop for stage in stages)]
    if [stage.first for stage in stages] != ends[:-1] or ends[-1] != job.layers:
        raise NotInRing(f"The ring's stages do not hold the {job.layers} layers of {job.name!r} one after another.")
    if any(stage.first >= stage.stop for stage in stages):
        raise NotInRing("A stage of the ring holds no layer.")
    if invite.mine >= len(stages) or stages[invite.mine].node != me:
        raise NotInRing("The stage is another node's.")
    if len({stage.node for stage in stages}) < len(stages):
        raise NotInRing("A node stands twice in the ring.")
    if max(invite.files) >= len(job.files):
        raise NotInRing(f"The job has {len(job.files)} files.")
    if invite.parts and len(invite.parts) != len(invite.files):
        raise NotInRing(f"The stage has parts of {len(invite.parts)} files, and lies in {len(invite.files)}.")
    for number, part in zip(invite.files, invite.parts, strict=False):
        file = job.files[number]
        if not are_in_order(part, file.blob.size):
            raise NotInRing(f"{file.name} has {file.blob.size} bytes; the stage's part lies outside, or overlaps.")
