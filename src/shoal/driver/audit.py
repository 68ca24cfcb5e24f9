"""Audits while a job runs: the driver replays contributions that nobody could know it would choose."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from shoal.driver.folder import RunFolder
from shoal.driver.lines import AuditLine, AuditVerdict
from shoal.driver.replay import Record, Replayer, StartEngine
from shoal.driver.report import AuditCount, ReplayCost
from shoal.errors import ShoalError
from shoal.identity import Envelope
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.messages import decode, encode, open_record
from shoal.protocol.training import (
    Assignment,
    Commit,
    Contribution,
    Member,
    OpenPrivate,
    PrivateOpened,
    TrainJob,
)
from shoal.quantities import format_bytes
from shoal.storage import BlobStore, Fetcher, patience_s
from shoal.training.process import EngineProcess
from shoal.training.state import SharedState
from shoal.verification.audits import audited
from shoal.world import Dice, Endpoint, within

_log = logging.getLogger(__name__)

WAITING_MAX = 16
"""Contributions waiting to be replayed; when there are more, the newest choice is dropped: replaying must not fall
behind the job by much, and the choice stays unpredictable."""
FINISH_S = 60.0
"""For so long at the end of a job what still waits is replayed; the members are kept waiting for it."""
CONTRIBUTIONS_KEPT = 16 * 1024
"""The newest ones, among which members' work is chosen; older ones are only in the folder."""
OPEN_DEADLINE_S = 15.0
"""And by `patience_s` longer for the bytes: a member that gives its private state more slowly has not opened it. Audits
happen one at a time, and nobody may hold them up."""
OPENED_PIN = "opened"
PRIVATE_BYTES_PER_PARAMETER = 32
PRIVATE_BYTES_EXTRA = 1 << 24
"""No private state is larger: moments and residual take 12 bytes a parameter, a user's own optimizer may keep more."""


async def open_from_member(
    contribution: Contribution,
    private: bytes,
    node: bytes,
    *,
    job: TrainJob,
    job_id: bytes,
    endpoint: Endpoint,
    fetcher: Fetcher,
) -> Path:
    """Have a member open one of its private states; gives its file, pinned by OPENED_PIN. Raises ShoalError with the
    reason."""
    link = await endpoint.dial(node, ())
    body = encode(OpenPrivate(job=job_id, private=private), link.version)
    answer = await link.request(OpenPrivate.KIND, body, deadline_s=OPEN_DEADLINE_S)
    ref = decode(PrivateOpened, answer, link.version).blob
    if ref.hash != private:
        raise ShoalError(f"The member of round {contribution.round} opened another private state than was asked for.")
    most = PRIVATE_BYTES_PER_PARAMETER * job.model.parameters + PRIVATE_BYTES_EXTRA
    if ref.size > most:
        raise ShoalError(
            f"The member's private state would be {ref.size} bytes; a model of this size needs at most {most}."
        )
    deadline_s = patience_s(ref.size, OPEN_DEADLINE_S)
    try:
        await within(fetcher.clock, deadline_s, fetcher.fetch(ref, [BlobHolder(node)], owner=OPENED_PIN))
    except TimeoutError:
        raise ShoalError(
            f"The member's private state, {format_bytes(ref.size)}, did not come within {deadline_s:.0f} s."
        ) from None
    return fetcher.store.path(ref.hash)


class Auditor:
    """Chooses accepted contributions with a secret, replays them one at a time, and tells what it found."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        endpoint: Endpoint,
        store: BlobStore,
        fetcher: Fetcher,
        dice: Dice,
        rate: float,
        known: AuditCount,
        on_verdict: Callable[[Contribution, AuditLine], None],
        threads: int | None = None,
        start_engine: StartEngine = EngineProcess.start,
    ) -> None:
        """`known` was counted before the driver was started anew; what waited then waits no more."""
        self.count = msgspec.structs.replace(known, dropped=known.chosen - known.replayed)
        self._folder = folder
        self._endpoint = endpoint
        self._store = store
        self._fetcher = fetcher
        self._rate = rate
        self._dice = dice
        self._secret = dice.bytes(32)
        self._replayed: set[bytes] = set()
        """Members of whom something was replayed."""
        self._one_at_a_time = asyncio.Lock()
        self._on_verdict = on_verdict
        self._record = Record(folder.train_job(), folder.job.record_id)
        self._members: dict[bytes, Member] = {}
        for envelope in folder.records(Assignment, Contribution, Commit, Member):
            self.recorded(envelope)
        self._waiting: asyncio.Queue[Contribution] = asyncio.Queue(WAITING_MAX)
        scratch = folder.path / "data" / "audit"
        scratch.mkdir(parents=True, exist_ok=True)
        self._replayer = Replayer(
            self._record,
            find_blob=self._find_blob,
            open_private=self._open,
            scratch=scratch,
            threads=threads,
            start_engine=start_engine,
        )
        self._opened_bytes = 0
        self._snapshot_bytes: dict[bytes, int] = {}
        self._work = asyncio.create_task(self._replay_all())
        self._work.add_done_callback(_say_why)

    async def close(self) -> ReplayCost:
        """Stop; gives what keeping rounds replayable has cost."""
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)
        await self._replayer.close()
        self.count = msgspec.structs.replace(self.count, dropped=self.count.chosen - self.count.replayed)
        return ReplayCost(disk_bytes=sum(self._snapshot_bytes.values()), opened_bytes=self._opened_bytes)

    def committed(self, commit: Commit, given: Sequence[tuple[bytes, Contribution]], state: SharedState) -> None:
        """A Commit was published: remember it, and choose among what it accepted."""
        self._replayer.hold_state(commit.round, state)
        # moments, residual: three numbers of 4 bytes a parameter
        for contribution_id, contribution in given:
            if contribution.snapshot:
                kept = self._snapshot_bytes.get(contribution.member, 0)
                self._snapshot_bytes[contribution.member] = kept + 12 * state.layout.size
            if audited(self._secret, contribution_id, self._rate):
                full = self._waiting.full()
                if not full:
                    self._waiting.put_nowait(contribution)
                self._counted(chosen=1, dropped=int(full))

    def recorded(self, envelope: Envelope) -> None:
        """A record was added to the folder."""
        network = self._folder.job.network
        if envelope.kind == Assignment.KIND:
            self._record.assignments[envelope.record_id] = open_record(envelope, Assignment, network)
        elif envelope.kind == Contribution.KIND:
            known = self._record.contributions
            known[envelope.record_id] = open_record(envelope, Contribution, network)
            while len(known) > CONTRIBUTIONS_KEPT:
                del known[next(iter(known))]
        elif envelope.kind == Member.KIND:
            self._members[envelope.record_id] = open_record(envelope, Member, network)
        elif envelope.kind == Commit.KIND:
            commit = open_record(envelope, Commit, network)
            self._record.commits[commit.round] = commit

    async def finish(self) -> None:
        """Replay what still waits, before the members are let go, for FINISH_S at most."""
        done = asyncio.create_task(self._waiting.join())
        ended = asyncio.wait({done, self._work}, return_when=asyncio.FIRST_COMPLETED)
        try:
            await within(self._fetcher.clock, FINISH_S, ended)
        except TimeoutError:
            _log.info("%d contributions that were chosen are not replayed", self.waiting)
        finally:
            done.cancel()

    @property
    def waiting(self) -> int:
        """How many contributions that were chosen are yet to be replayed."""
        return self.count.chosen - self.count.replayed - self.count.dropped

    def _counted(self, *, chosen: int = 0, replayed: int = 0, dropped: int = 0) -> None:
        now = self.count
        self.count = AuditCount(
            chosen=now.chosen + chosen, replayed=now.replayed + replayed, dropped=now.dropped + dropped
        )

    async def audit_each(self) -> None:
        """Replay one accepted contribution of every member, before the members are let go: of those that none of was
        replayed while the job ran."""
        by_member: dict[bytes, list[Contribution]] = {}
        for commit in self._record.commits.values():
            for entry in commit.accepted:
                contribution = self._record.contributions.get(entry.contribution)
                if contribution is not None:
                    by_member.setdefault(entry.member, []).append(contribution)
        for member, contributions in sorted(by_member.items()):
            if member not in self._replayed:
                at = int(self._dice.uniform() * len(contributions))
                await self._replay(contributions[at])

    async def _replay_all(self) -> None:
        while True:
            await self._replay(await self._waiting.get())
            self._counted(replayed=1)
            self._waiting.task_done()

    async def _replay(self, contribution: Contribution) -> None:
        async with self._one_at_a_time:
            try:
                replayed = await self._replayer.replay(contribution)
            finally:
                for name in self._store.pins(OPENED_PIN):  # kept while there is room, for who looks at the folder
                    self._store.unpin(OPENED_PIN, name)
        self._replayed.add(contribution.member)
        self._opened_bytes += replayed.opened_bytes
        verdict = replayed.verdict
        line = AuditLine(
            time_s=self._folder.elapsed_s(),
            round=contribution.round,
            node=self._members[contribution.member].nodes[0].node.hex(),
            verdict=AuditVerdict(verdict.outcome.value),
            sentence=verdict.sentence[:1000],
            difference=_finite(verdict.measured),
            threshold=verdict.threshold,
        )
        self._folder.note(line)
        self._on_verdict(contribution, line)

    async def _find_blob(self, name: bytes) -> Path:
        if not self._store.has(name):
            raise ShoalError(f"Blob {name.hex()[:12]} is not in the run folder any more.")
        return self._store.path(name)

    async def _open(self, contribution: Contribution, private: bytes) -> Path:
        node = self._members[contribution.member].nodes[0].node
        return await open_from_member(
            contribution,
            private,
            node,
            job=self._record.job,
            job_id=self._record.job_id,
            endpoint=self._endpoint,
            fetcher=self._fetcher,
        )


def _say_why(work: asyncio.Task[None]) -> None:
    if not work.cancelled() and work.exception() is not None:
        _log.error("no contribution is replayed any more", exc_info=work.exception())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
