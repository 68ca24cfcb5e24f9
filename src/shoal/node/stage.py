"""A stage that a node holds: it fetches the model's files, loads its layers in a child process, and takes positions
from the stage before to the stage after."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.engines import EngineDied, EngineFailed
from shoal.errors import BadRecord, EngineError, LinkError, ShoalError
from shoal.identity import Envelope, KeyPair, short_id
from shoal.inference.commands import Advance, LoadStage
from shoal.inference.process import StageProcess
from shoal.node.member import EngineSettings
from shoal.protocol.messages import encode, open_record, sign
from shoal.protocol.serving import (
    HOLDERS_MAX,
    Chosen,
    RequestReceipt,
    ServeJob,
    StageAnswer,
    StageEnd,
    StageForget,
    StageGone,
    StageInvite,
    StagePlace,
    StageReady,
    StageWork,
)
from shoal.storage import BlobStore, Fetcher, patience_s
from shoal.world import Clock, Endpoint, Link

FETCH_PATIENCE_S = 120.0
LOAD_DEADLINE_S = 900.0
GATEWAY_SILENCE_S = 120.0
"""A stage whose gateway has had no link for so long ends."""
LOOK_EVERY_S = 5.0
HAND_ON_S = 5.0
"""How long the next stage may take to say that positions arrived."""
UNDER_WAY_MAX = 48
"""Pieces of work at a time, of all sessions; the engine takes a few more."""
SESSIONS_MAX = 1024
PIN_PREFIX = "serve-"

_log = logging.getLogger("shoal.stage")


class NotInRing(BadRecord):
    """Somebody asks something of a stage that is not theirs to ask, or of one that this node does not hold."""

    code = "SH-271"


class StageFull(BadRecord):
    """More work waits at a stage than it takes."""

    code = "SH-272"


@dataclass
class _Served:
    """What a session had of this stage."""

    prompt: int = 0
    generated: int = 0
    computed: int = 0


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
        store: BlobStore,
        fetcher: Fetcher,
        clock: Clock,
        settings: EngineSettings,
        network: str,
        start_engine: Callable[..., Awaitable[StageProcess]] = StageProcess.start,
    ) -> None:
        """Raises BadRecord: a job that the gateway did not sign, a ring that does not hold the model, a stage that is
        not this node's."""
        envelope = Envelope.from_bytes(invite.job, ServeJob.MAX_BYTES + 1024)
        self.job = open_record(envelope, ServeJob, network)
        if envelope.signer != gateway:
            raise NotInRing(
                f"The serving of {self.job.name!r} was signed by {short_id(envelope.signer)}, another asks."
            )
        _check_ring(invite, self.job, key.node_id)
        self.job_id = envelope.record_id
        self.ring, self.gateway, self.name = invite.ring, gateway, name
        self.pin = f"{PIN_PREFIX}{self.job_id.hex()[:24]}"
        self._invite, self._mine = invite, invite.mine
        self._place: StagePlace = invite.stages[invite.mine]
        self._key, self._network = key, network
        self._endpoint, self._store, self._fetcher, self._clock = endpoint, store, fetcher, clock
        self._settings, self._start_engine = settings, start_engine
        self._engine: StageProcess | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self._served: dict[int, _Served] = {}
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
        await self._close()
        return reason

    def end(self, reason: str, *, tell: bool) -> None:
        if not self._ended.done():
            self._tell = tell
            self._ended.set_result(reason)

    async def _begin(self) -> None:
        invite = self._invite
        wanted = [self.job.files[number].blob for number in invite.files]
        size = sum(ref.size for ref in wanted)
        try:
            async with asyncio.timeout(patience_s(size, FETCH_PATIENCE_S)):
                await asyncio.gather(
                    *(self._fetcher.fetch(ref, invite.holders[:HOLDERS_MAX], owner=self.pin) for ref in wanted)
                )
        except TimeoutError as error:
            raise LinkError(f"The files of {self.job.name!r} did not come to {self.name} in time.") from error
        engine = self._engine = await self._start_engine(self.name, threads=self._settings.threads)
        engine.died.add_done_callback(lambda died: self.end(died.result().sentence, tell=True))
        command = LoadStage(
            config=self.job.config,
            files=tuple(str(self._store.path(ref.hash)) for ref in wanted),
            first=self._place.first,
            stop=self._place.stop,
            memory_bytes=invite.memory_bytes,
            device=self._settings.device,
            threads=self._settings.threads,
            speed_limit=self._settings.speed_limit,
        )
        try:
            async with asyncio.timeout(LOAD_DEADLINE_S):
                loaded = await engine.load(command)
        except TimeoutError as error:
            raise EngineError(f"The layers were not loaded within {LOAD_DEADLINE_S:.0f} s on {self.name}.") from error
        ready = StageReady(
            ring=self.ring, mine=self._mine, exact=loaded.exact, layer_ms=loaded.layer_ms, last_ms=loaded.last_ms
        )
        await self._ask(await self._gateway_link(), ready)

    async def _watch_gateway(self) -> None:
        """Nobody else will ask anything of this stage."""
        seen = self._clock.monotonic()
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            link = self._endpoint.links().get(self.gateway)
            if link is not None and not link.closed:
                seen = self._clock.monotonic()
            elif self._clock.monotonic() - seen > GATEWAY_SILENCE_S:
                self.end(f"The gateway was away for {GATEWAY_SILENCE_S:.0f} s.", tell=False)

    async def _close(self) -> None:
        for task in list(self._under_way):
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        if self._engine is not None:
            await self._engine.stop()
        self._store.release(self.pin)

    # --- positions -------------------------------------------------------------------------------------------------

    def work(self, message: StageWork, peer: bytes) -> None:
        """Positions have come. Raises NotInRing, StageFull."""
        before = self.gateway if self._mine == 0 else self._invite.stages[self._mine - 1].node
        if peer != before:
            raise NotInRing(f"Node {short_id(peer)} is not before {self.name} in this ring.")
        if self._engine is None or self._ended.done():
            raise NotInRing(f"{self.name} does not hold its layers yet, or not any more.")
        if len(self._under_way) >= UNDER_WAY_MAX:
            raise StageFull(f"{self.name} has {UNDER_WAY_MAX} pieces of work already.")
        if message.session not in self._served and len(self._served) >= SESSIONS_MAX:
            raise StageFull(f"{self.name} has {SESSIONS_MAX} sessions already.")
        served = self._served.setdefault(message.session, _Served())
        served.computed += len(message.tokens)
        served.generated += message.choose
        if not message.choose:
            served.prompt += len(message.tokens)
        task = asyncio.create_task(self._take_on(message))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _take_on(self, message: StageWork) -> None:
        """Through the engine, and on to whoever is next."""
        assert self._engine is not None
        try:
            done = await self._engine.advance(
                Advance(
                    session=message.session,
                    start=message.start,
                    tokens=message.tokens,
                    states=message.states,
                    choose=message.choose,
                    sampling=message.choosing,
                )
            )
            if self._mine + 1 == len(self._invite.stages):
                await self._answer(message, chosen=done.chosen)
                return
            after = self._invite.stages[self._mine + 1]
            link = await self._endpoint.dial(after.node, after.addresses, deadline_s=HAND_ON_S)
            await self._ask(link, msgspec.structs.replace(message, states=done.states))
        except EngineDied:
            return  # `run` tells the gateway
        except (EngineFailed, LinkError) as error:
            code = error.cause_code if isinstance(error, EngineFailed) else error.code
            await self._answer(message, code=code, sentence=f"{self.name}: {error.sentence}"[:400])

    async def _answer(
        self, message: StageWork, *, chosen: tuple[Chosen, ...] = (), code: str = "", sentence: str = ""
    ) -> None:
        answer = StageAnswer(
            ring=self.ring, session=message.session, number=message.number, chosen=chosen, code=code, sentence=sentence
        )
        try:
            await self._ask(await self._gateway_link(), answer)
        except LinkError as error:  # the gateway notices by itself
            _log.info("%s: the answer to session %d did not arrive: %s", self.name, message.session, error)

    async def forget(self, message: StageForget, peer: bytes) -> Envelope | None:
        """A session is over; gives the receipt of what was done for it."""
        if peer != self.gateway:
            raise NotInRing("Only the gateway of a ring ends its sessions.")
        served = self._served.pop(message.session, None)
        if self._engine is not None:
            with contextlib.suppress(EngineFailed, EngineDied):
                await self._engine.close_session(message.session)
        if served is None:
            return None
        receipt = RequestReceipt(
            job=self.job_id, ring=self.ring, session=message.session, first=self._place.first, stop=self._place.stop,
            prompt_tokens=served.prompt, generated_tokens=served.generated, computed_positions=served.computed,
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

    async def _ask(self, link: Link, message: StageAnswer | StageGone | StageReady | StageWork) -> None:
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
