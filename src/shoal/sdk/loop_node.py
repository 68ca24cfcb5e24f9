"""The node beside a user's own loop: key, links, blobs and records in a thread of their own, so that the loop need not
know of them. It takes part in one job of one owner, and computes through the loop's engine."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from shoal.devices.names import device_class
from shoal.engines import EngineDied, EngineFailed, Failed, Stop
from shoal.errors import BadInput
from shoal.hub import HubClient
from shoal.identity import load_or_create_key
from shoal.node.agent import INVITED_ANEW, NodeAgent, NodeSettings
from shoal.node.member import EngineSettings, Invitation, MemberRun
from shoal.protocol.hubs import HubTicket
from shoal.protocol.offers import Capability, Device
from shoal.sdk.loop_engine import Order, Orders, Over
from shoal.sdk.loop_script import loop_kind
from shoal.storage import BlobStore, StoreInUse
from shoal.training.commands import (
    ApplyCommit,
    Command,
    Prepare,
    Prepared,
    PrivateNow,
    Reply,
    RollBack,
    RoundCancelled,
    RoundDone,
    RunRound,
    StateHeld,
)
from shoal.training.process import RoundCancelledError
from shoal.transport import TlsEndpoint
from shoal.transport import run as run_loop
from shoal.world import Clock, Dice

PROCESSES_MAX = 64
"""Processes of one job on one machine, each with a folder of its own."""
CLOSE_S = 15.0

R = TypeVar("R")


class NotOurs(BadInput):
    """A driver asked a process to take part in a job that is not its user's."""

    code = "SH-143"


class TooManyProcesses(BadInput):
    """More processes of one job than a machine runs, or two of one name."""

    code = "SH-146"


@dataclass(frozen=True)
class LoopPlace:
    """Where a process takes part."""

    job: str
    owner: bytes
    """NodeId of the key that signs the job."""
    hubs: Sequence[HubTicket]
    folder: Path
    """Has a folder for each process of this job on this machine."""
    name: str | None
    """None: the machine's name and a number."""
    listen: str | None
    threads: int
    device: torch.device
    storage_bytes: int


class LoopNode:
    """A node in a thread. `start` returns when it is offered at the hubs; `close` leaves the job in order."""

    def __init__(self, place: LoopPlace, orders: Orders, clock: Clock, dice: Dice) -> None:
        self._place, self._orders, self._clock, self._dice = place, orders, clock, dice
        self._up: Future[tuple[str, Callable[[], None]]] = Future()
        self._stop: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="shoal", daemon=True)

    def start(self) -> str:
        """Gives the node's name. Raises ShoalError for what cannot work."""
        self._thread.start()
        name, self._stop = self._up.result()
        return name

    def close(self) -> None:
        if self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the thread's loop has ended already
                self._stop()
            self._thread.join(CLOSE_S)
            self._stop = None

    def _run(self) -> None:
        try:
            run_loop(self._live())
        except BaseException as error:  # noqa: BLE001 (told in the user's thread)
            if not self._up.done():
                self._up.set_exception(error)
            self._over(f"The node beside the loop failed: {error}")

    async def _live(self) -> None:
        place, clock, dice = self._place, self._clock, self._dice
        name, folder, store = self._take_folder()
        key = load_or_create_key(folder / "node.key")
        endpoint = TlsEndpoint(key, clock=clock, dice=dice)
        agent = NodeAgent(
            NodeSettings(
                name=name,
                folder=folder,
                engine=EngineSettings(device=str(place.device), threads=place.threads),
                listen=place.listen,
                accepts=(loop_kind(place.owner, place.job),),
            ),
            key=key,
            endpoint=endpoint,
            hubs=HubClient(endpoint, place.hubs, clock=clock, dice=dice),
            store=store,
            clock=clock,
            dice=dice,
            make_member=self._make_member,
            measure=self._capability,
        )
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.call_soon_threadsafe(stopping.set)

        try:
            await agent.start()
            self._up.set_result((name, stop))
            await stopping.wait()
        finally:
            await agent.close()

    def _take_folder(self) -> tuple[str, Path, BlobStore]:
        """The first folder that no other process uses."""
        place = self._place
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:40] or "loop"
        names = [place.name] if place.name else [f"{host}-{number}" for number in range(1, PROCESSES_MAX + 1)]
        for name in names:
            folder = place.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return name, folder, BlobStore(folder / "blobs", place.storage_bytes, self._clock)
            except StoreInUse:
                if place.name:
                    raise TooManyProcesses(
                        f"Another process of job {place.job!r} is called {name!r} on this machine; give this one a "
                        "name of its own (SHOAL_NAME, or name=), or none."
                    ) from None
        raise TooManyProcesses(f"{PROCESSES_MAX} processes of job {place.job!r} run on this machine already.")

    async def _capability(self, **_: object) -> Capability:
        """The device and its memory. No rate is claimed: how fast the loop is, is measured on the loop itself."""
        device = self._place.device
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            memory = psutil.virtual_memory().total
        kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type
        described = Device(
            kind=kind,
            name=device_class(device)[:96],
            memory_bytes=memory,
            memory_bytes_per_s=0.0,
            throughput=(),
            threads=self._place.threads if device.type == "cpu" else 0,
        )
        return Capability(devices=(described,), software=f"torch {torch.__version__}"[:128])

    def _make_member(self, invitation: Invitation, **pieces: Any) -> MemberRun:
        place = self._place
        if invitation.job_envelope.signer != place.owner or invitation.job.name != place.job:
            raise NotOurs(
                f"This process takes part in job {place.job!r} of {place.owner.hex()[:8]} only; the invitation is to "
                f"{invitation.job.name!r} of {invitation.job_envelope.signer.hex()[:8]}."
            )
        return _LoopMember(invitation, **pieces, start_engine=self._start_engine, over=self._over)

    async def _start_engine(self, *_: object, **__: object) -> Any:
        return EngineInLoop(self._orders)

    def _over(self, reason: str) -> None:
        self._orders.put(Over(reason))


class _LoopMember(MemberRun):
    """A membership; when it ends, and no other follows at once, the loop ends."""

    driver_silence_s = 900.0
    """Nobody else waits for this process, and its owner would have to start it anew."""

    def __init__(self, *arguments: Any, over: Callable[[str], None], **pieces: Any) -> None:
        super().__init__(*arguments, **pieces)
        self._over = over

    async def run(self) -> str:
        reason = await super().run()
        if reason != INVITED_ANEW:
            await asyncio.to_thread(self._over, reason)
        return reason


class EngineInLoop:
    """What a member asks of its engine, asked of the loop in the other thread. It cannot die and leave this alive."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._loop = asyncio.get_running_loop()
        self.died: asyncio.Future[EngineDied] = self._loop.create_future()

    async def prepare(self, command: Prepare) -> Prepared:
        return _expect(await self._ask(command), Prepared)

    async def run_round(self, command: RunRound) -> RoundDone:
        """Raises RoundCancelledError, EngineFailed."""
        reply = await self._ask(command)
        if isinstance(reply, RoundCancelled):
            raise RoundCancelledError(f"Round {command.round} was cancelled.")
        return _expect(reply, RoundDone)

    async def roll_back(self, private: bytes) -> PrivateNow:
        return _expect(await self._ask(RollBack(private=private)), PrivateNow)

    async def apply_commit(self, command: ApplyCommit) -> StateHeld:
        return _expect(await self._ask(command), StateHeld)

    async def stop(self) -> None:
        """Nobody waits: the loop may be in a long step."""
        with contextlib.suppress(queue.Full):
            self._orders.put_nowait(Order(Stop(), lambda _: None))

    async def _ask(self, command: Command) -> Reply:
        future: asyncio.Future[Reply] = self._loop.create_future()

        def arrived(reply: Reply) -> None:
            if not future.done():
                future.set_result(reply)

        def answer(reply: Reply) -> None:
            with contextlib.suppress(RuntimeError):  # the node has stopped meanwhile
                self._loop.call_soon_threadsafe(arrived, reply)

        try:
            self._orders.put_nowait(Order(command, answer))
        except queue.Full:
            raise EngineFailed(
                f"The loop has {self._orders.maxsize} commands waiting; its steps take too long.", "SH-521"
            ) from None
        return await future


def _expect(reply: Reply, expected: type[R]) -> R:
    if isinstance(reply, Failed):
        raise EngineFailed(reply.sentence, reply.code)
    if not isinstance(reply, expected):
        raise EngineFailed(f"The loop answered {type(reply).__name__}.", "SH-521")
    return reply
