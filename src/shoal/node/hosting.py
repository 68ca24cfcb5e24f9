"""Jobs that this node drives for owners who are away: who asked for it, and who may look at them.

Each is a folder, named by the key with which this node drives it: `driver.key`; `hosting`, for whom and with whom;
`run`, a copy of the job's run folder. `hosted_job` says what becomes of it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shoal.errors import BadRecord, JobError
from shoal.identity import load_or_create_key, short_id
from shoal.node.hosted_job import Around, HostedJob, HostingRecord, storage_for_one
from shoal.protocol.driving import DriveAsk, DriveBegin, DriveGiven, DriveStop, FolderAsk
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import Done
from shoal.quantities import format_bytes
from shoal.world import Request

JOBS_MAX = 4
"""Jobs that a node drives, or stands by for, at a time."""
ENDED_MAX = 16
"""Jobs that are over and whose folders are kept for their owners; those that were got go first, then the oldest."""
ASKED_MAX, ASKED_OF_ONE, ASKED_S = 64, 4, 600.0
"""Owners that were given a key and have not begun, those from one address, and how long that is good."""

_log = logging.getLogger("shoal.hosting")


class NotHosted(BadRecord):
    """Somebody asks about a job that this node does not drive, or that is none of their concern."""

    code = "SH-265"


class CannotHost(JobError):
    """A node does not take a job that it was asked to drive."""

    code = "SH-608"


@dataclass(frozen=True)
class _Asked:
    """Somebody was given a key to have a job driven with."""

    owner: bytes
    source: str
    size: int
    """Bytes that the job would bring along."""
    until_s: float


class Hosting:
    def __init__(self, around: Around, *, folder: Path, name: str, payee: bytes | None) -> None:
        """Raises OSError."""
        self._around, self._folder, self._name, self._payee = around, folder, name, payee
        self._jobs: dict[bytes, HostedJob] = {}
        """The oldest first."""
        self._asked: dict[bytes, _Asked] = {}
        """By the keys that were made."""
        self._deciding = asyncio.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for kind, handler in (
            (DriveAsk.KIND, self._ask),
            (DriveBegin.KIND, self._begin),
            (DriveStop.KIND, self._stop),
            (FolderAsk.KIND, self._look),
        ):
            around.endpoint.handle(kind, handler)

    def start(self) -> None:
        """Go on with what was under way."""
        for path in sorted(self._folder.iterdir(), key=lambda one: one.stat().st_mtime):
            try:
                record = msgspec.msgpack.decode((path / "hosting").read_bytes(), type=HostingRecord)
            except FileNotFoundError:
                shutil.rmtree(path, ignore_errors=True)  # it was asked, and never begun
            except (OSError, msgspec.DecodeError) as error:
                _log.error("%s: %s cannot be read, and its job is not gone on with: %s", self._name, path, error)
            else:
                self._jobs[record.begin.job] = HostedJob(self._around, path, record)
        for job in self._jobs.values():
            job.start()

    @property
    def places(self) -> int:
        """How many jobs more it takes."""
        return max(0, JOBS_MAX - sum(not job.ended for job in self._jobs.values()))

    async def close(self) -> None:
        await asyncio.gather(*(job.close() for job in self._jobs.values()))

    async def _ask(self, request: Request) -> bytes:
        message = decode(DriveAsk, request.body, request.version)
        price = self._around.settings.micro_per_h
        self._check_place()
        if message.micro_per_h < price:
            raise CannotHost(f"Node {self._name} asks for more than that for driving a job: see its newest offer.")
        most = storage_for_one(self._around.store)
        if message.size_bytes > most:
            raise CannotHost(
                f"Job {message.name!r} brings {format_bytes(message.size_bytes)} along, and node {self._name} takes "
                f"{format_bytes(most)} of one."
            )
        now_s = self._around.clock.monotonic()
        for driver, one in list(self._asked.items()):
            if one.owner == request.peer or one.until_s < now_s:  # whoever asks again has no use for the key before
                del self._asked[driver]
                shutil.rmtree(self._place_of(driver), ignore_errors=True)
        near = sum(one.source == request.source for one in self._asked.values())
        if len(self._asked) >= ASKED_MAX or near >= ASKED_OF_ONE:
            raise CannotHost(f"Node {self._name} was asked to drive {len(self._asked)} jobs just now; ask it later.")
        scratch = self._folder / f"asked-{request.peer.hex()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        driver = load_or_create_key(scratch / "driver.key").node_id
        scratch.rename(self._place_of(driver))
        self._asked[driver] = _Asked(request.peer, request.source, message.size_bytes, now_s + ASKED_S)
        return encode(DriveGiven(driver=driver, payee=self._payee if price else None), request.version)

    def _check_place(self) -> None:
        if not self.places:
            raise CannotHost(f"Node {self._name} drives, or stands by for, {JOBS_MAX} jobs already; ask another one.")

    def _place_of(self, driver: bytes) -> Path:
        return self._folder / driver.hex()[:32]

    async def _begin(self, request: Request) -> bytes:
        message = decode(DriveBegin, request.body, request.version)
        async with self._deciding:
            known = self._jobs.get(message.job)
            if known is None or known.record.owner != request.peer or known.record.begin != message:
                await self._take(message, request.peer)
        await self._around.changed()
        return encode(Done(), request.version)

    async def _take(self, message: DriveBegin, owner: bytes) -> None:
        price = self._around.settings.micro_per_h
        asked = self._asked.get(message.driver)
        late = asked is None or asked.owner != owner or asked.until_s < self._around.clock.monotonic()
        if asked is None or late or message.job in self._jobs:
            raise CannotHost(f"Node {self._name} was not asked to drive this job, or too long ago: ask it again.")
        mine = [one for one in message.hosts if one.node == self._around.node]
        payee = self._payee if price else None
        as_asked = [one.driver == message.driver and one.micro_per_h >= price and one.payee == payee for one in mine]
        if as_asked != [True]:
            raise CannotHost(f"Node {self._name} would drive this job once, with the key that it gave, for its price.")
        self._check_place()
        if price:
            await self._around.paid(message, None)
        record = HostingRecord(owner=owner, begin=message, size=asked.size)
        job = HostedJob(self._around, self._place_of(message.driver), record)
        await asyncio.to_thread(job.write)
        del self._asked[message.driver]
        self._jobs[message.job] = job
        job.start()
        await self._forget_some()

    async def _forget_some(self) -> None:
        """Of the jobs that are over, those first of which nobody misses anything here: else whoever has jobs taken and
        stopped, one after the other, would have a node forget what others wait for."""
        ended = [(name, job) for name, job in self._jobs.items() if job.ended]
        if len(ended) <= ENDED_MAX:
            return
        missed = await asyncio.to_thread(lambda: [job.is_missed() for _, job in ended])
        order = sorted(range(len(ended)), key=lambda at: missed[at])
        for at in order[: len(ended) - ENDED_MAX]:
            self._jobs.pop(ended[at][0]).remove()

    async def _stop(self, request: Request) -> bytes:
        message = decode(DriveStop, request.body, request.version)
        job = self._job(message.job, request.peer)
        if request.peer != job.record.owner:
            raise NotHosted(f"Job {message.job.hex()[:12]} is stopped by its owner alone.")
        await job.stop("Its owner has stopped it.")
        return encode(Done(), request.version)

    async def _look(self, request: Request) -> bytes:
        message = decode(FolderAsk, request.body, request.version)
        given = await self._job(message.job, request.peer).look(message, request.peer)
        return encode(given, request.version)

    def _job(self, name: bytes, asker: bytes) -> HostedJob:
        job = self._jobs.get(name)
        if job is None or not job.may_look(asker):
            raise NotHosted(
                f"Node {self._name} drives no job {name.hex()[:12]} that is {short_id(asker)}'s to look at."
            )
        return job
