"""One member of one training job on this node: records, engine and blobs, wired together.

What is to be done is decided by `rounds.following`; what is computed, by the engine process. Here the effects of the
one become commands to the other, and what it answers becomes events. Everything that arrives goes through one bounded
inbox and is handled in order; only computing, and talking to the driver, run beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.driver.members import NotOfThisJob
from shoal.engines import EngineDied, EngineFailed
from shoal.errors import BadRecord, EngineError, LinkError, ShoalError, StorageError
from shoal.identity import Envelope, KeyPair, short_id
from shoal.node.sales import Work
from shoal.protocol.blobs import BlobHolder, BlobRef
from shoal.protocol.messages import DEFAULT_NETWORK, Message, decode, encode, open_record, sign
from shoal.protocol.training import (
    PARTS_PER_MILLION,
    Assignment,
    Commit,
    CommitsAsk,
    CommitsGiven,
    Contribution,
    Deliver,
    Grant,
    Member,
    MemberGone,
    MemberInvite,
    MemberNode,
    MemberReady,
    NodeWork,
    Term,
    TrainJob,
    Turn,
)
from shoal.quantities import format_bytes
from shoal.rounds import following
from shoal.rounds.joining import is_offered
from shoal.storage import BlobStore, Fetcher, FetchFailed, patience_s
from shoal.training.commands import ApplyCommit, CommittedUpdate, Prepare, Prepared, RoundDone, RunRound, ShardFile
from shoal.training.process import EngineProcess, RoundCancelledError
from shoal.training.updates import UPDATE_MEDIA_TYPE
from shoal.verification.retention import Retention
from shoal.world import Clock, Dice, Endpoint, Refused, within

FETCH_PATIENCE_S = 120.0
"""A job's model and data must come within that time, and by `patience_s` longer for their bytes: a node is not held by
a job that never begins."""
PREPARE_DEADLINE_S = 900.0
"""Building and measuring a model takes minutes at most; a job that takes longer would keep a node busy for nothing."""
INBOX_MAX = 256
"""Turns that may wait to be handled; a driver that sends more is refused."""
HOLDERS_MAX = 64
ATTACH_MAX_BYTES = 256 * 1024
"""An update up to this size travels with its Contribution."""
STATES_KEPT = 2
"""Newest offered shared states that stay on disk, for joiners."""
DRIVER_SILENCE_S = 120.0
"""A member that has not heard of any driver for this long gives up."""
ASK_AFTER_S = 5.0
"""A member that has heard nothing for this long asks the driver for news, and learns whether it still counts; again and
again, before it takes silence for the driver's end (`succession.SILENCE_MS`)."""
GONE_DEADLINE_S = 3.0
FETCH_ATTEMPTS = 4
CATCH_UPS_MAX = 16
CATCH_UP_NEAR = 8
"""A joiner that is fewer rounds behind reports ready, and is sent the rest."""
FAILURES_MAX = 2
"""Rounds in a row that an engine may fail at; a member that cannot compute leaves, so that others get its samples."""
WINDOW_SHARE = 0.25
"""Share of the node's storage that private states kept for replays may take; then the oldest go before their time."""
DELIVER_DEADLINE_S = 20.0
DELIVER_ATTEMPTS = 8
RETRY_S = 1.0

PIN_PREFIX = "job-"
EVIDENCE_PIN = "evidence"
EVIDENCE_MAX = 64
EVIDENCE_MEDIA_TYPE = "application/x-shoal-record"
STATE_MEDIA_TYPE = "application/x-shoal-state"
PRIVATE_MEDIA_TYPE = "application/x-shoal-private"

_log = logging.getLogger("shoal.member")


class NotAMember(BadRecord):
    """A driver asked for something that this node is no part of."""

    code = "SH-260"


class InboxFull(BadRecord):
    """A driver sent more than this member can take in."""

    code = "SH-261"


@dataclass(frozen=True)
class EngineSettings:
    """How this node computes."""

    device: str = "cpu"
    threads: int = 1
    processes: int = 1
    speed_limit: float = 1.0


@dataclass(frozen=True)
class Invitation:
    """A MemberInvite, opened: signatures and fit are verified."""

    job_envelope: Envelope
    job: TrainJob
    grant: Envelope
    term: Envelope
    head: Envelope | None
    head_round: int
    tokens_total: int
    state: BlobRef
    driver: bytes
    holders: tuple[BlobHolder, ...]

    @property
    def job_id(self) -> bytes:
        return self.job_envelope.record_id

    @classmethod
    def open(cls, message: MemberInvite, driver: bytes, network: str) -> Invitation:
        """Raises BadRecord when a record in it is malformed, wrongly signed, or does not fit the others, or when it
        was sent by another than the one who drives."""
        job_envelope = Envelope.from_bytes(message.job, TrainJob.MAX_BYTES)
        job = open_record(job_envelope, TrainJob, network)
        grant = Envelope.from_bytes(message.grant, Grant.MAX_BYTES)
        term = Envelope.from_bytes(message.term, Term.MAX_BYTES)
        if term.signer != driver:
            raise BadRecord(
                f"The invitation to {job.name!r} came from {short_id(driver)}, but the driver of its term is "
                f"{short_id(term.signer)}."
            )
        head, head_round, tokens_total, state = None, -1, 0, job.model.start.hash
        if message.head is not None:
            head = Envelope.from_bytes(message.head, Commit.MAX_BYTES)
            commit = open_record(head, Commit, network)
            head_round, tokens_total, state = commit.round, commit.tokens_total, commit.state
        if message.state.hash != state:
            raise BadRecord(f"The invitation to {job.name!r} names another state than its newest Commit does.")
        holders = message.holders[:HOLDERS_MAX]
        return cls(job_envelope, job, grant, term, head, head_round, tokens_total, message.state, driver, holders)


@dataclass(frozen=True)
class _Base:
    """The newest shared state that was applied."""

    round: int
    state: bytes
    tokens_total: int


@dataclass
class _Own:
    """A Contribution of this member, for as long as it may be built on, rolled back to, or opened."""

    round: int
    envelope: Envelope
    update: BlobRef
    private_after: bytes
    waited_ms: int
    tokens: int
    snapshot: BlobRef | None = None
    accepted: bool = False


def _said(error: BaseException | None) -> str:
    """For the driver: of what the system says, not where files lie here."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def pin_of(job: bytes) -> str:
    """Who pins what a job needs, in a node's store."""
    return f"{PIN_PREFIX}{job.hex()}"


class MemberRun:
    """One member of one job. `run` returns the sentence with which it ended."""

    driver_silence_s = DRIVER_SILENCE_S

    def __init__(
        self,
        invitation: Invitation,
        *,
        key: KeyPair,
        name: str,
        endpoint: Endpoint,
        store: BlobStore,
        fetcher: Fetcher,
        clock: Clock,
        dice: Dice,
        scratch: Path,
        settings: EngineSettings,
        work: Work | None = None,
        network: str = DEFAULT_NETWORK,
        start_engine: Callable[..., Awaitable[EngineProcess]] = EngineProcess.start,
    ) -> None:
        """`work` reckons what is earned; none where the node works for nothing."""
        self.invitation = invitation
        self.job = invitation.job
        self.job_id = invitation.job_id
        self.name = name
        self._key = key
        self._endpoint = endpoint
        self._store = store
        self._fetcher = fetcher
        self._clock = clock
        self._scratch = scratch
        self._settings = settings
        self._earning = work
        self._start_engine = start_engine
        self._network = network
        self.pin = pin_of(self.job_id)
        self._heard_s = self._asked_s = clock.monotonic()
        self._failures = 0
        self._asking: asyncio.Task[None] | None = None
        self._holders: dict[bytes, BlobHolder] = {holder.node: holder for holder in invitation.holders}
        record = Member(
            job=self.job_id,
            nodes=(MemberNode(key.node_id, "whole", PARTS_PER_MILLION),),
            session=dice.bytes(16),
            name=name,
        )
        self.record = sign(key, record, network)
        self.member_id = self.record.record_id
        self._private = Retention(self.job.replay.window_rounds, store.capacity_bytes * WINDOW_SHARE)
        self._inbox: asyncio.Queue[following.Event] = asyncio.Queue(INBOX_MAX)
        self._following = following.follow(
            self.job,
            self.job_id,
            invitation.job_envelope.signer,
            self.member_id,
            invitation.grant,
            invitation.term,
            invitation.head,
            clock.now_ms(),
            network=network,
        )
        self._own: dict[bytes, _Own] = {}
        self._contributed = 0
        self._states: list[BlobRef] = []
        self._base = _Base(invitation.head_round, invitation.state.hash, invitation.tokens_total)
        self._first_private = b""
        self._computing: asyncio.Task[None] | None = None
        self._side_work: set[asyncio.Task[None]] = set()
        self._idle_since = clock.monotonic()
        self._heads: dict[bytes, asyncio.Future[Envelope | None]] = {}
        self._ending: asyncio.Future[tuple[str, bool]] = asyncio.get_running_loop().create_future()
        self._bytes_before = self._link_bytes()

    # ---- what the agent calls ----

    def turn(self, message: Turn, sender: bytes) -> None:
        """Take in what a driver sent; every record in it is verified by the rules. Raises NotAMember for a stranger,
        BadRecord, InboxFull."""
        granted = sender in self._following.grant.drivers
        if not granted and not self._newly_granted(message.grant, sender):
            raise NotAMember(
                f"Node {short_id(sender)} may not drive job {self.job.name!r}: the owner did not grant it."
            )
        events: list[following.Event] = []
        for packed, kind in (
            (message.grant, Grant),
            (message.term, Term),
            (message.commit, Commit),
            (message.assignment, Assignment),
        ):
            if packed is not None:
                events.append(following.Arrived(Envelope.from_bytes(packed, kind.MAX_BYTES)))
        if granted:
            self._learn_holders(message.holders)
            for data in message.attached:
                with contextlib.suppress(StorageError):  # it can still be fetched when it is needed
                    self._store.put(data, UPDATE_MEDIA_TYPE)
        self._hear(sender)
        self._put(events)

    def _newly_granted(self, packed: bytes | None, sender: bytes) -> bool:
        """Whether the owner's own newer grant lets this sender drive. Looked at before anything of a turn waits: a
        stranger takes no place from the driver. Raises BadRecord."""
        if packed is None:
            return False
        envelope = Envelope.from_bytes(packed, Grant.MAX_BYTES)
        grant = open_record(envelope, Grant, self._network)
        return sender in grant.drivers and not self._following.refuses_grant(grant, envelope.signer)

    async def newest_commit(self, asker: bytes, term: int | None, deadline_s: float) -> Envelope | None:
        """The newest Commit this member knows, for a driver that takes over; with `term`, a promise to it. Raises
        NotAMember when the asker may not have it, or not yet."""
        if asker not in self._following.grant.drivers:
            raise NotAMember(f"Node {short_id(asker)} may not drive job {self.job.name!r}: the owner did not grant it.")
        if asker not in self._heads:
            self._heads[asker] = asyncio.get_running_loop().create_future()
            self._put([following.HeadAsked(asker, term)])
        waiting = self._heads[asker]
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.shield(waiting)
        except TimeoutError:
            raise NotAMember(f"Node {self.name} promises nothing to {short_id(asker)} now; ask again later.") from None
        finally:
            if self._heads.get(asker) is waiting:  # who hangs up, too, may ask again
                del self._heads[asker]

    def end(self, reason: str, *, tell: bool) -> None:
        """Stop at the next moment, telling the driver or not; `run` then returns `reason`."""
        if not self._ending.done():
            self._ending.set_result((reason, tell))

    def settle(self) -> None:
        """Keep only what replays may ask for."""
        kept = {ref.hash for ref in self._private.kept}
        for hash in self._store.pins(self.pin) - kept:
            self._store.unpin(self.pin, hash)

    @property
    def driver(self) -> bytes:
        """Who drives now."""
        return self._following.term.driver

    @property
    def term(self) -> int:
        """The newest term known."""
        return self._following.term.number

    @property
    def drivers(self) -> tuple[bytes, ...]:
        """Who may drive, in their order."""
        return self._following.grant.drivers

    @property
    def head(self) -> Envelope | None:
        """The newest Commit that was applied."""
        return self._following.head.envelope

    def _put(self, events: Sequence[following.Event]) -> None:
        if self._inbox.qsize() + len(events) > INBOX_MAX:
            raise InboxFull(f"Node {self.name} has {INBOX_MAX} records of job {self.job.name!r} waiting; send fewer.")
        for event in events:
            self._inbox.put_nowait(event)

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside the loop; a ShoalError in it ends this membership with its sentence."""
        task = asyncio.create_task(work)
        self._side_work.add(task)
        task.add_done_callback(self._side_work_done)
        return task

    def _side_work_done(self, task: asyncio.Task[None]) -> None:
        self._side_work.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if not isinstance(error, ShoalError | OSError):
            _log.error("%s failed", self.name, exc_info=error)
        self.end(f"Node {self.name} cannot go on: {_said(error)}", tell=True)

    # ---- its life ----

    async def run(self) -> str:
        """Prepare, then follow until the job ends or cannot go on. Never raises for what peers or engines do."""
        work = asyncio.create_task(self._work())
        try:
            awaited: set[asyncio.Future[Any]] = {work, self._ending}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if self._ending.done():
                reason, tell = self._ending.result()
                if tell:
                    await self._tell_gone(reason)
                return reason
            try:
                return await work
            except (ShoalError, OSError) as error:
                reason = f"Node {self.name} cannot go on: {_said(error)}"
                await self._tell_gone(reason)
                return reason
        finally:
            for task in (work, *self._side_work):
                task.cancel()
            await asyncio.gather(work, *self._side_work, return_exceptions=True)

    async def _work(self) -> str:
        job, invitation = self.job, self.invitation
        blobs = [invitation.state, *(shard.blob for shard in job.data.shards)]
        size = sum(ref.size for ref in blobs)
        deadline_s = patience_s(size, FETCH_PATIENCE_S)
        try:
            await within(self._clock, deadline_s, self._have_all(blobs))
        except TimeoutError:
            raise FetchFailed(
                f"Node {self.name} could not get the model and the data, {format_bytes(size)}, within "
                f"{deadline_s / 60:.0f} minutes."
            ) from None
        self._engine = await self._start_engine(self.name, threads=self._settings.threads)
        try:
            prepared = await self._prepare_engine()
            self._first_private = prepared.private
            await self._catch_up()
            if self._earning is not None:
                self._earning.ready(prepared.samples_per_s, self.job.data.sequence_tokens)
            await self._ask_driver(
                MemberReady.KIND,
                MemberReady(
                    job=self.job_id,
                    member=self.member_id,
                    round=self._base.round,
                    state=self._base.state,
                    samples_per_s=prepared.samples_per_s,
                ),
            )
            self._idle_since = self._clock.monotonic()
            return await self._follow()
        finally:
            await self._engine.stop()

    async def _prepare_engine(self) -> Prepared:
        job = self.job
        command = Prepare(
            job=job,
            state=str(self._store.path(self.invitation.state.hash)),
            shards=tuple(
                ShardFile(str(self._store.path(shard.blob.hash)), shard.sequences) for shard in job.data.shards
            ),
            device=self._settings.device,
            threads=self._settings.threads,
            processes=self._settings.processes,
            speed_limit=self._settings.speed_limit,
            dtype=job.dtype,
        )
        try:
            async with asyncio.timeout(PREPARE_DEADLINE_S):
                prepared = await self._engine.prepare(command)
        except TimeoutError:
            raise EngineError(
                f"Node {self.name} could not build and measure the model within {PREPARE_DEADLINE_S / 60:.0f} minutes."
            ) from None
        self._engine_class = prepared.engine
        if prepared.state != self._base.state:
            raise EngineError(f"Node {self.name} read another state than it was given; its disk may be failing.")
        return prepared

    async def _catch_up(self) -> None:
        """Apply what was committed while this member prepared itself, so that it begins where the others are. What is
        too old for the driver to give is no error here: it then turns this member away, with a sentence."""
        for _ in range(CATCH_UPS_MAX):
            first = self._base.round + 1
            commits = await self._commits_of(first, first + following.COMMITS_AHEAD_MAX - 1)
            for commit in commits:
                await self._take(following.Arrived(commit))
            if len(commits) < CATCH_UP_NEAR or self._base.round < first:
                return

    async def _take(self, event: following.Event) -> None:
        self._following, effects = following.step(self._following, event, self._clock.now_ms())
        for effect in effects:
            if isinstance(effect, following.Apply):
                await self._apply(effect.commit)
                await self._take(await self._inbox.get())
            elif isinstance(effect, following.StopAndSay):
                raise EngineError(effect.sentence)

    async def _follow(self) -> str:
        while True:
            died: asyncio.Future[Any] = self._engine.died
            waiting: asyncio.Future[Any] = asyncio.ensure_future(self._inbox.get())
            ask_s = max(self._heard_s, self._asked_s) + ASK_AFTER_S  # whatever else comes meanwhile
            try:
                await asyncio.wait(
                    {waiting, died},
                    timeout=max(0.0, ask_s - self._clock.monotonic()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if died.done():
                    raise died.result()
                if not waiting.done():
                    self._asked_s = self._clock.monotonic()
                    if self._asked_s - self._heard_s >= self.driver_silence_s:
                        return f"No driver was heard of for {self.driver_silence_s:.0f} s."
                    number = self._following.head.round + 1
                    self._ask_commits(following.AskCommits(number, number))
                    continue
                event = waiting.result()
            finally:
                waiting.cancel()
            self._following, effects = following.step(self._following, event, self._clock.now_ms())
            for effect in effects:
                ended = await self._carry_out(effect)
                if ended is not None:
                    await self._tell_gone(ended)
                    return ended

    async def _carry_out(self, effect: following.Effect) -> str | None:
        match effect:
            case following.Apply():
                self._beside(self._apply(effect.commit))
            case following.BeginWork():
                self._computing = self._beside(self._compute(effect, self._base))
            case following.RollBack():
                await self._roll_back(effect)
            case following.Send():
                self._beside(self._deliver(effect.contribution_id))
            case following.Counted():
                self._keep(effect.contribution_id)
            case following.AskCommits():
                self._ask_commits(effect)
            case following.AnswerHead():
                waiting = self._heads.pop(effect.asker, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(effect.commit)
            case following.ReportFork():
                self._keep_evidence(effect)
            case following.Ignore():
                _log.info("%s: %s", self.name, effect.sentence)
            case following.StopAndSay():
                return effect.sentence
        return None

    def _keep_evidence(self, fork: following.ReportFork) -> None:
        """Keep both Commits as blobs, whatever becomes of the job."""
        _log.error("%s: %s", self.name, fork.sentence)
        for envelope in (fork.first, fork.second):
            if len(self._store.pins(EVIDENCE_PIN)) >= EVIDENCE_MAX:
                _log.error("%s keeps %d records as evidence, and no more.", self.name, EVIDENCE_MAX)
                return
            ref = self._store.put(envelope.to_bytes(), EVIDENCE_MEDIA_TYPE)
            self._store.pin(EVIDENCE_PIN, ref.hash)
            _log.error("%s: a Commit is kept as blob %s", self.name, ref.hash.hex())

    # ---- shared state ----

    async def _apply(self, commit: Commit) -> None:
        paths = []
        for entry in commit.accepted:
            await self._have(entry.update)
            paths.append(CommittedUpdate(str(self._store.path(entry.update.hash)), entry.weight_ppm, entry.scale_ppm))
        offered = is_offered(commit.round, self.job.model.start.size, self.job.rounds)
        write = self._scratch / f"state-{commit.round}" if offered else None
        held = await self._engine.apply_commit(
            ApplyCommit(
                round=commit.round,
                previous=self._base.state,
                accepted=tuple(paths),
                write=str(write) if write else None,
            )
        )
        self._base = _Base(commit.round, held.state, commit.tokens_total)
        if write is not None:
            self._offer_state(write)
        await self._inbox.put(following.Applied(commit.round, held.state))

    def _offer_state(self, path: Path) -> None:
        """Keep this state on disk for a while, so that joiners can take it from here."""
        ref = self._store.adopt(path, STATE_MEDIA_TYPE, move=True)
        self._pin(ref)
        if ref not in self._states:  # a Commit that accepted nothing names the same state again
            self._states.append(ref)
        while len(self._states) > STATES_KEPT:
            self._store.unpin(self.pin, self._states.pop(0).hash)

    # ---- own work ----

    async def _compute(self, work: following.BeginWork, base: _Base) -> None:
        assignment, started = work.assignment, self._clock.monotonic()
        waited_ms = round((started - self._idle_since) * 1000)
        keep = (self._contributed + 1) % self.job.replay.snapshot_every == 0
        update_path = self._scratch / f"update-{assignment.round}"
        snapshot_path = self._scratch / f"private-{assignment.round}" if keep else None
        in_flight = self._own[work.builds_on].update if work.builds_on is not None else None
        try:
            done = await self._engine.run_round(
                RunRound(
                    round=assignment.round,
                    base_state=base.state,
                    in_flight=str(self._store.path(in_flight.hash)) if in_flight else None,
                    step=assignment.step,
                    tokens_done=base.tokens_total,
                    rounds_in_flight=assignment.round - 1 - base.round,
                    round_samples=sum(share.samples for share in assignment.shares),
                    member=self.member_id,
                    ranges=work.share.ranges,
                    update=str(update_path),
                    snapshot=str(snapshot_path) if snapshot_path else None,
                )
            )
        except RoundCancelledError:
            return
        except EngineDied:
            return  # `_follow` sees it too, and says so
        except EngineFailed as error:
            self._failures += 1
            if self._failures >= FAILURES_MAX:
                raise
            await self._inbox.put(following.WorkFailed(assignment.round, error.sentence))
            return
        finally:
            self._idle_since = self._clock.monotonic()
        self._failures = 0
        unpaid = self._earning.made(done.tokens) if self._earning is not None else None
        if unpaid is not None:
            self.end(f"Node {self.name} works for job {self.job.name!r} no longer: {unpaid}.", tell=True)
            return
        self._contributed += 1
        contribution = self._contribution(work, done, base.state, update_path, snapshot=keep)
        envelope = sign(self._key, contribution, self._network)
        own = _Own(assignment.round, envelope, contribution.update, done.private_after, max(0, waited_ms), done.tokens)
        if snapshot_path is not None:
            own.snapshot = self._store.adopt(snapshot_path, PRIVATE_MEDIA_TYPE, move=True)
            self._pin(own.snapshot)
        self._pin(own.update)
        self._own[envelope.record_id] = own
        await self._inbox.put(following.Computed(assignment.round, envelope.record_id))

    def _contribution(
        self, work: following.BeginWork, done: RoundDone, base: bytes, update: Path, *, snapshot: bool
    ) -> Contribution:
        ref = self._store.adopt(update, UPDATE_MEDIA_TYPE, move=True)
        assignment = work.assignment
        return Contribution(
            job=self.job_id,
            round=assignment.round,
            term=assignment.term,
            assignment=work.assignment_id,
            member=self.member_id,
            base_state=base,
            builds_on=work.builds_on,
            update=ref,
            work=(NodeWork(self._key.node_id, done.samples, done.tokens, done.compute_ms),),
            private_before=done.private_before,
            private_after=done.private_after,
            snapshot=snapshot,
            loss_first=done.loss_first,
            loss_last=done.loss_last,
            sketches=done.sketches,
            sketch_every=done.sketch_every,
            engine=self._engine_class,
        )

    async def _deliver(self, contribution_id: bytes) -> None:
        own = self._own.get(contribution_id)
        if own is None:
            return
        attached = None
        if own.update.size <= ATTACH_MAX_BYTES:
            attached = self._store.read(own.update.hash)
        sent, received = self._link_bytes()
        message = Deliver(
            contribution=own.envelope.to_bytes(),
            attached=attached,
            waited_ms=own.waited_ms,
            bytes_sent=max(0, sent - self._bytes_before[0]),
            bytes_received=max(0, received - self._bytes_before[1]),
        )
        for attempt in range(DELIVER_ATTEMPTS):
            if contribution_id not in self._own:
                return  # it was rolled back
            try:
                await self._ask_driver(Deliver.KIND, message)
                return
            except Refused as error:
                _log.info("%s: round %d does not count: %s", self.name, own.round, error)
                return
            except LinkError as error:
                _log.info("%s: round %d was not delivered: %s", self.name, own.round, error)
                await self._clock.sleep(RETRY_S * (attempt + 1))

    async def _roll_back(self, effect: following.RollBack) -> None:
        _log.info("%s: %s", self.name, effect.sentence)
        private = self._own[effect.to].private_after if effect.to is not None else self._first_private
        await self._engine.roll_back(private)
        self._contributed = self.job.replay.snapshot_every - 1  # the next is kept: a kept one may have become void
        after = self._own[effect.to].round if effect.to is not None else -1
        for contribution_id, own in list(self._own.items()):
            if own.round > after:
                self._forget(contribution_id)

    def _keep(self, contribution_id: bytes) -> None:
        """An own Contribution counts: its snapshot enters the window, and what cannot be needed any more goes."""
        own = self._own.get(contribution_id)
        if own is None:
            return
        if not own.accepted and self._earning is not None:
            unpaid = self._earning.accepted(own.tokens)
            if unpaid is not None:
                self.end(f"Node {self.name} works for job {self.job.name!r} no longer: {unpaid}.", tell=True)
        own.accepted = True
        for ref in self._private.advance(own.round, own.snapshot):
            self._store.unpin(self.pin, ref.hash)
        done = [key for key, one in self._own.items() if one.accepted and one.round < own.round]
        for key in done:
            self._store.unpin(self.pin, self._own.pop(key).update.hash)

    def _forget(self, contribution_id: bytes) -> None:
        own = self._own.pop(contribution_id)
        self._store.unpin(self.pin, own.update.hash)
        if own.snapshot is not None:
            self._store.unpin(self.pin, own.snapshot.hash)

    # ---- peers ----

    async def _have_all(self, refs: Sequence[BlobRef]) -> None:
        for ref in refs:
            self._pin(ref)
            await self._have(ref)

    async def _have(self, ref: BlobRef) -> None:
        """Hold this blob, from whoever has it. Raises StorageError."""
        for attempt in range(FETCH_ATTEMPTS):
            if self._store.has(ref.hash):
                return
            try:
                await self._fetcher.fetch(ref, self._holder_list())
            except FetchFailed as error:
                if attempt + 1 == FETCH_ATTEMPTS:
                    raise
                _log.info("%s: %s", self.name, error)
                await self._clock.sleep(RETRY_S * (attempt + 1))

    def _pin(self, ref: BlobRef) -> None:
        self._store.pin(self.pin, ref.hash)

    def _holder_list(self) -> list[BlobHolder]:
        own = self._key.node_id
        return [holder for node, holder in self._holders.items() if node != own]

    def _learn_holders(self, holders: Sequence[BlobHolder]) -> None:
        for holder in holders:
            self._holders.pop(holder.node, None)
            self._holders[holder.node] = holder
        while len(self._holders) > HOLDERS_MAX:
            self._holders.pop(next(node for node in self._holders if node != self.driver))

    async def _ask_driver(
        self,
        kind: str,
        message: Message,
        *,
        reply_max_bytes: int = 1 << 16,
        deadline_s: float = DELIVER_DEADLINE_S,
    ) -> bytes:
        """Raises LinkError. When the driver says that this is no member of its, that ends this membership."""
        driver = self.driver
        hints = self._holders[driver].addresses if driver in self._holders else ()
        link = await self._endpoint.dial(driver, hints, deadline_s=deadline_s)
        try:
            answer = await link.request(
                kind, encode(message, link.version), deadline_s=deadline_s, reply_max_bytes=reply_max_bytes
            )
        except Refused as error:
            self._hear(driver)
            if error.remote_code == NotOfThisJob.code and driver == self.driver:
                self.end(f"The driver does not count on node {self.name} any more: {error}", tell=False)
            raise
        self._hear(driver)
        return answer

    def _hear(self, driver: bytes) -> None:
        """It is there: it asked for something, or answered."""
        if driver != self.driver:
            return
        self._heard_s = self._clock.monotonic()
        with contextlib.suppress(InboxFull):  # then much of what it said waits there already
            self._put([following.DriverHeard()])

    def _ask_commits(self, effect: following.AskCommits) -> None:
        """Ask for Commits that are missing, beside; one question at a time."""
        if self._asking is None or self._asking.done():
            self._asking = self._beside(self._fetch_commits(effect))

    async def _fetch_commits(self, effect: following.AskCommits) -> None:
        try:
            self._put([following.Arrived(one) for one in await self._commits_of(effect.first_round, effect.last_round)])
        except (LinkError, BadRecord) as error:
            _log.info("%s: the missing Commits could not be had: %s", self.name, error)

    async def _commits_of(self, first: int, last: int) -> list[Envelope]:
        ask = CommitsAsk(job=self.job_id, first_round=first, last_round=last)
        answer = await self._ask_driver(CommitsAsk.KIND, ask, reply_max_bytes=CommitsGiven.MAX_BYTES)
        given = decode(CommitsGiven, answer)
        self._learn_holders(given.holders)
        return [Envelope.from_bytes(one, Commit.MAX_BYTES) for one in given.commits]

    async def _tell_gone(self, reason: str) -> None:
        _log.warning("%s leaves job %r: %s", self.name, self.job.name, reason)
        gone = MemberGone(job=self.job_id, member=self.member_id, reason=reason[:400])
        with contextlib.suppress(LinkError):
            await self._ask_driver(MemberGone.KIND, gone, deadline_s=GONE_DEADLINE_S)

    def _link_bytes(self) -> tuple[int, int]:
        stats = [link.stats() for link in self._endpoint.links().values()]
        return sum(one.bytes_sent for one in stats), sum(one.bytes_received for one in stats)
