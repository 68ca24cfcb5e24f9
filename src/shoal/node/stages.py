"""The stages that a node holds for gateways."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from shoal.identity import KeyPair
from shoal.inference.process import StageProcess
from shoal.node.layers import PIN_PREFIX, Layers, Wanted
from shoal.node.lending import Held, Lending, NotLent
from shoal.node.member import EngineSettings
from shoal.node.sales import Service
from shoal.node.stage import NotInRing, StageFull, StageRun
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import Done
from shoal.protocol.serving import (
    ServeJob,
    StageEnd,
    StageForget,
    StageForgotten,
    StageInvite,
    StagePulse,
    StageWork,
)
from shoal.quantities import format_bytes
from shoal.storage import BlobStore, Fetcher, charge, part_bytes
from shoal.world import Clock, Endpoint, Request

RINGS_MAX = 64
"""Of one gateway: those that it uses, and those that it has ready for when one of them breaks."""
LEAVE_S = 20.0
"""How long streams have to go on elsewhere when the node stops."""

_log = logging.getLogger("shoal.node")


class StageHost:
    """What of a node has to do with serving."""

    def __init__(
        self,
        *,
        key: KeyPair,
        name: str,
        endpoint: Endpoint,
        store: BlobStore,
        fetcher: Fetcher,
        clock: Clock,
        settings: EngineSettings,
        memory_bytes: int,
        network: str,
        admit: Callable[[bool, bool], None],
        changed: Callable[[], Awaitable[None]],
        service_for: Callable[[bytes], Service] | None = None,
        start_engine: Callable[..., Awaitable[StageProcess]] = StageProcess.start,
    ) -> None:
        """`memory_bytes`: of the device that computes, for all stages together. `admit` raises where the node is
        stopping, or busy; it is told whether the node works for whoever asks already, and whether a slot is held for
        them. `changed` is called when a stage came or went. `service_for` raises NotHeld for gateways that do not pay;
        none: the node serves for nothing."""
        self._key, self._name, self._endpoint = key, name, endpoint
        self._store, self._fetcher, self._clock = store, fetcher, clock
        self._settings, self._network = settings, network
        self._lending = Lending(name, memory_bytes, clock)
        self._admit, self._changed, self._start_engine = admit, changed, start_engine
        self._service_for = service_for
        self._layers: dict[Wanted, Layers] = {}
        self._stages: dict[bytes, tuple[StageRun, asyncio.Task[None]]] = {}
        for owner in store.owners():
            if owner.startswith(PIN_PREFIX):  # of an earlier process, which was killed: no child of it is left
                store.release(owner)
        for kind, handler in (
            (StageInvite, self._invited),
            (StageWork, self._work),
            (StageForget, self._forget),
            (StagePulse, self._pulse),
            (StageEnd, self._end),
        ):
            endpoint.handle(kind.KIND, handler)

    def names(self) -> list[str]:
        """What is served here: each model once, however many rings it has."""
        return [repr(job.name) for job in {run.job_id: run.job for run, _ in self._stages.values()}.values()]

    def gateways(self) -> list[bytes]:
        """For whom it is served: of each model."""
        return list({run.job_id: run.gateway for run, _ in self._stages.values()}.values())

    @property
    def lent_bytes(self) -> int:
        """Memory that stages take, or will when they are loaded."""
        return self._lending.taken_bytes

    async def close(self) -> None:
        await asyncio.gather(*(run.leave("The node is stopping.", LEAVE_S) for run, _ in list(self._stages.values())))
        await asyncio.gather(*(task for _, task in self._stages.values()), return_exceptions=True)

    async def _invited(self, request: Request) -> bytes:
        invite = decode(StageInvite, request.body, request.version)
        if invite.ring not in self._stages:
            theirs = [run for run, _ in self._stages.values() if run.gateway == request.peer]
            if len(theirs) >= RINGS_MAX:
                raise StageFull(f"Node {self._name} holds {RINGS_MAX} rings of this gateway already.")
            service = self._service_for(request.peer) if self._service_for is not None else None
            self._admit(bool(theirs), service is not None)
            run = StageRun(
                invite,
                request.peer,
                key=self._key,
                name=self._name,
                endpoint=self._endpoint,
                clock=self._clock,
                network=self._network,
                layers=self._shared,
                service=service,
            )
            self._stages[invite.ring] = (run, asyncio.create_task(self._run(run)))
        return encode(Done(), request.version)

    def _shared(self, wanted: Wanted, job: ServeJob, invite: StageInvite) -> Layers:
        """The layers that another ring has here already, or new ones. Raises NotLent for such as this node has no room
        for, as far as that is known: the weights are weighed when their files' headers are here."""
        for known in [known for known, layers in self._layers.items() if layers.is_dead or not layers.is_used]:
            del self._layers[known]
        if wanted not in self._layers:
            self._lending.refuse(Held(wanted.job_id, 0, wanted.memory_bytes))
            parts = zip((job.files[number].blob for number in wanted.files), wanted.parts, strict=True)
            size = sum(charge(ref.size, part_bytes(ref, part)) for ref, part in parts)
            if size > self._store.capacity_bytes:
                raise NotLent(
                    f"Node {self._name} keeps {format_bytes(self._store.capacity_bytes)} of files, and the stage's "
                    f"take {format_bytes(size)}. Give it more with --storage, or fewer layers."
                )
            self._layers[wanted] = Layers(
                wanted, job, invite.holders, name=self._name, store=self._store, fetcher=self._fetcher,
                settings=self._settings, lending=self._lending, start_engine=self._start_engine,
            )  # fmt: skip
        return self._layers[wanted]

    async def _run(self, run: StageRun) -> None:
        try:
            await self._changed()
            reason = await run.run()
            level = logging.INFO if run.dismissed else logging.WARNING
            _log.log(level, "%s: serving %r ended here: %s", self._name, run.job.name, reason)
        finally:
            del self._stages[run.ring]
            await self._changed()

    def _stage(self, ring: bytes) -> StageRun:
        found = self._stages.get(ring)
        if found is None:
            raise NotInRing(f"Node {self._name} holds no stage of ring {ring.hex()[:12]}.")
        return found[0]

    async def _work(self, request: Request) -> bytes:
        message = decode(StageWork, request.body, request.version)
        self._stage(message.ring).work(message, request.peer)
        return encode(Done(), request.version)

    async def _forget(self, request: Request) -> bytes:
        message = decode(StageForget, request.body, request.version)
        receipt = await self._stage(message.ring).forget(message, request.peer)
        return encode(StageForgotten(receipt=receipt.to_bytes() if receipt else b""), request.version)

    async def _pulse(self, request: Request) -> bytes:
        message = decode(StagePulse, request.body, request.version)
        return encode(await self._stage(message.ring).pulse(message, request.peer), request.version)

    async def _end(self, request: Request) -> bytes:
        message = decode(StageEnd, request.body, request.version)
        self._stage(message.ring).ended_by(message, request.peer)
        return encode(Done(), request.version)
