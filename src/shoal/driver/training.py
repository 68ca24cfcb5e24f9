"""Driving a training job: `rounds.driving` decides; this file carries out what it decides, and tells it what happens.

One task takes events from a bounded queue, one at a time, and carries out the effects in order. What waits for peers or
computes for long (fetching updates, aggregating, replaying, inviting) runs beside it and comes back as an event.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.driver.folder import RunFolder
from shoal.driver.gang import DIALS_AT_ONCE, REST_MAX_S, REST_S, LinkedNode, link_to
from shoal.driver.lanes import NodeLane
from shoal.driver.lines import Event, EventKind, Lane, RoundMetrics
from shoal.driver.members import MemberLine, MemberLines, NotOfThisJob
from shoal.driver.nearness import refuse_far
from shoal.driver.report import NodeFigures, NodeStatus
from shoal.driver.treasurer import Treasurer
from shoal.errors import BadRecord, LinkError, ShoalError
from shoal.identity import Envelope, KeyPair, blake3_hash, short_id
from shoal.ledger.moves import MoneyRefused
from shoal.market import ANYTHING, Wish
from shoal.protocol.blobs import BlobHolder, BlobRef
from shoal.protocol.holds import HoldReclaim
from shoal.protocol.messages import decode, encode, open_record, sign
from shoal.protocol.offers import Done, OfferFind
from shoal.protocol.training import (
    MEMBERS_MAX,
    Accepted,
    Commit,
    CommitsAsk,
    CommitsGiven,
    Contribution,
    Deliver,
    Excluded,
    Member,
    MemberAnswer,
    MemberGone,
    MemberInvite,
    MemberReady,
    TrainJob,
    Turn,
)
from shoal.purse.escrow import NoMoney
from shoal.quantities.money import format_money
from shoal.rounds import driving
from shoal.rounds.joining import OFFERED_MAX_BYTES, is_offered
from shoal.rounds.standing import Standing
from shoal.rounds.weights import weigh
from shoal.storage import BlobStore, DiskFailed, Fetcher, StorageFull
from shoal.storage.faults import LedgerBusy, LedgerFailed
from shoal.training.outer import OuterStep, WeighedUpdate, measure
from shoal.training.state import SharedState
from shoal.training.updates import UPDATE_MEDIA_TYPE, Update, decode_update
from shoal.world import Clock, Endpoint, Request
from shoal.world.directory import Directory, FoundOffer
from shoal.world.lookout import Backoff, Lookout
from shoal.world.quotes import NotSecured

BYTES_CLAIMED_MAX = (1 << 53) // MEMBERS_MAX
"""A node's own account of its bytes counts up to this, so that no claim makes a sum that cannot be written down."""
EVENTS_MAX = 16 * 1024
ATTACH_MAX_BYTES = 512 * 1024
"""Updates of a Commit travel with it as long as they are not more than this together."""
LOOK_EVERY_S = 3.0
"""How often the hubs are asked for nodes that have come since."""
WAITING_SAID_EVERY_S = 20.0
"""How often it is said for whom a job waits that has not begun."""
INVITE_DEADLINE_S = 20.0
COMMITS_AT_ONCE = 64
GIVEN_EXTRA_BYTES = 128 * 1024
"""Room in CommitsGiven for the holders and for what packs the Commits."""
COMMITS_KEPT = 4 * COMMITS_AT_ONCE
BETWEEN_INVITES_S = 10.0
"""A node that refused an invitation, or left, is not asked again before; each further time it is twice as long."""
INVITES_MAX = 8
"""Times in a row that a node is invited without any of its work being accepted."""
UNANSWERED_MAX = 4
"""Contributions of one member that may wait for the driver at a time: lag + 1, and some sent twice."""
NOTICE_SLACK_S = 5.0
"""What an owner's word may take until it is here: a notice runs from when it was given."""
TAKEN_BACK = "Its owner took it back, and had said so in time."
GONE = (NodeStatus.DIED, NodeStatus.LEFT, NodeStatus.RECLAIMED, NodeStatus.EXCLUDED)
NOT_BACK = "It has not come back since the driver was started anew."
PIN = "run"
"""Who pins, in the driver's store, what going on with the job needs."""

_log = logging.getLogger("shoal.driver")


class NotCounted(BadRecord):
    """A Contribution does not count; the sentence is the one of the rules."""

    code = "SH-263"


@dataclass(frozen=True)
class JobRecords:
    """What the owner signed, and who drives in which term."""

    job: Envelope
    grant: Envelope
    term: Envelope
    term_number: int
    commits: tuple[Envelope, ...] = ()
    """The newest of the chain that the term goes on from, the newest last; none before the first Commit."""
    former: tuple[bytes, ...] = ()
    """NodeIds of those that worked in earlier terms."""


@dataclass(frozen=True)
class Progress:
    """How a job stands, for whoever watches."""

    elapsed_s: float
    tokens_total: int
    token_budget: int
    round: int
    loss: float | None
    tokens_per_s: float
    bytes_sent: int
    bytes_received: int
    members: Mapping[str, str]
    """Name -> what it is doing."""
    spent_micro: int | None = None
    """None where nothing can be."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    reached: bool
    sentence: str
    state: SharedState


@dataclass
class _Given:
    """A Contribution under consideration."""

    contribution: Contribution
    update: Update | None = None
    fetching: asyncio.Task[None] | None = None


@dataclass
class _Arrived:
    """A Contribution that the rules have not seen yet, and who waits for what they say."""

    line: MemberLine
    envelope: Envelope
    attached: bytes | None
    refused: asyncio.Future[str | None]


async def _nothing() -> None:
    pass


@dataclass
class Watchers:
    """Who is told what, beside the members."""

    progress: Callable[[Progress], None] = lambda _: None
    committed: Callable[[Commit, Sequence[tuple[bytes, Contribution]], SharedState], None] = lambda *_: None
    """After each Commit, with the accepted Contributions and the state it names."""
    event: Callable[[Event], None] = lambda _: None
    recorded: Callable[[Envelope], None] = lambda _: None
    """After each record that was written down."""
    written: Callable[[], Awaitable[None]] = _nothing
    """After each Commit that is on the disk, before anybody else hears of it."""
    closing: Callable[[], Awaitable[None]] = _nothing
    """When all rounds are done and the members are still there."""


class TrainingDriver:
    """Drives one job in one term."""

    def __init__(
        self,
        records: JobRecords,
        standing: Standing,
        state: SharedState,
        *,
        key: KeyPair,
        folder: RunFolder,
        endpoint: Endpoint,
        directory: Directory,
        store: BlobStore,
        fetcher: Fetcher,
        clock: Clock,
        wanted: OfferFind,
        wish: Wish = ANYTHING,
        within_ms: float | None = None,
        bonded: Callable[[LinkedNode], Awaitable[None]] | None = None,
        members_min: int = 1,
        nodes_max: int = 1024,
        retired: Mapping[bytes, str] | None = None,
        known: Sequence[NodeFigures] = (),
        watchers: Watchers | None = None,
        treasurer: Treasurer | None = None,
    ) -> None:
        """Without a treasurer only nodes that work for nothing take part. Those that join later are to be `within_ms`
        of each member, and `bonded` raises ShoalError for one for whose word too little is at stake."""
        self.records = records
        self.network = records.job.network
        self.job = open_record(records.job, TrainJob, self.network)
        self.job_id = records.job.record_id
        self.state = state
        self._key = key
        self._folder = folder
        self._endpoint = endpoint
        self._directory = directory
        self._store = store
        self._fetcher = fetcher
        self._clock = clock
        self._wanted, self._wish, self._within_ms, self._bonded = wanted, wish, within_ms, bonded
        self._nodes_max = nodes_max
        self._watchers = watchers or Watchers()
        self._treasurer = treasurer
        self._driving = driving.drive(
            self.job,
            self.job_id,
            key.node_id,
            records.term_number,
            standing,
            self._now_ms(),
            network=self.network,
            members_min=members_min,
            retired=retired,
        )
        self._outer = OuterStep(self.job.rounds)
        self._next: dict[tuple[int, int], tuple[SharedState, str]] = {}
        """(Round, attempt) -> the state after it, and what its weighing remarked."""
        self._given: dict[bytes, _Given] = {}
        self._commits: OrderedDict[int, Envelope] = OrderedDict()
        for envelope in records.commits[-COMMITS_KEPT:]:
            self._commits[open_record(envelope, Commit, self.network).round] = envelope
        self._offered = (self.state, records.commits[-1] if records.commits else None)
        """The state from which joiners begin, and the Commit that names it."""
        self._arrived: dict[bytes, _Arrived] = {}
        self._failure: BaseException | None = None
        self._events: asyncio.Queue[driving.Event] = asyncio.Queue(EVENTS_MAX)
        self._lines = MemberLines(endpoint, directory, clock, self._lost)
        self._members: dict[bytes, tuple[Member, Envelope, LinkedNode]] = {}
        self._side_work: set[asyncio.Task[None]] = set()
        self._invited = Backoff(clock, BETWEEN_INVITES_S)
        self._being_invited = 0
        self._reclaimed_s: dict[bytes, float] = {}
        """When nodes are taken back whose owners have given notice."""
        self._dialled: set[bytes] = set()
        self._unreached = Backoff(clock, REST_S, REST_MAX_S)
        self.nodes: dict[bytes, NodeFigures] = {}
        for figures in known:  # of earlier terms
            if figures.status is NodeStatus.WORKING:
                over = standing.tokens_total >= self.job.token_budget
                status, reason = (NodeStatus.FINISHED, "") if over else (NodeStatus.LEFT, NOT_BACK)
                figures = msgspec.structs.replace(figures, status=status, reason=reason)
            self.nodes[bytes.fromhex(figures.node_id)] = figures
        self._lanes: dict[bytes, NodeLane] = {}
        self._names: dict[bytes, str] = {}
        """MemberId -> name, of those that left too. One more per joining, as in the folder's records."""
        self._start_s = folder.elapsed_s()
        self._started = clock.monotonic()
        self._last_commit_s = self._start_s
        self.finished_s = self._start_s
        """When the last round was done."""
        self._counted = (sum(each.bytes_sent for each in known), sum(each.bytes_received for each in known))
        """Bytes sent and received that stand in the metrics."""
        self._loss: float | None = None
        self._rate = 0.0

    # ---- running ----

    async def run(self, gang: Sequence[LinkedNode]) -> Outcome:
        """Invite the gang and drive until the job is over."""
        for kind, handler in (
            (MemberReady.KIND, self._ready),
            (Deliver.KIND, self._delivered),
            (MemberGone.KIND, self._gone),
            (HoldReclaim.KIND, self._reclaim),
            (CommitsAsk.KIND, self._commits_asked),
        ):
            self._endpoint.handle(kind, handler)
        for node in gang:
            self._beside(self._invite(node))
        self._beside(self._look_for_more())
        reason = "The driver was stopped; it may go on with the job later."
        try:
            finish = await self._loop()
            self.finished_s = self.elapsed_s()
            await self._watchers.closing()
            if self._failure is not None:
                raise self._failure
            reason = finish.reason
            self._close_lanes()
        except ShoalError as error:
            reason = f"The driver cannot go on: {error}"
            raise
        finally:
            for task in list(self._side_work):
                task.cancel()
            await asyncio.gather(*self._side_work, return_exceptions=True)
            await self._say_goodbye(reason)
        return Outcome(finish.reached, finish.reason, self.state)

    def stop(self, reason: str) -> None:
        """End the job before its goal."""
        self._tell(driving.StopAsked(reason))

    def audit_failed(self, member_id: bytes, sentence: str) -> None:
        """A replay found that a member's work was not what was assigned."""
        if self._driving.finished is None:
            self._tell(driving.AuditFailed(member_id, sentence))
            return
        line = self._lines.by_member.get(member_id)  # it is let go with the others, but not as one of them
        if line is not None:
            self._close_line(line, NodeStatus.EXCLUDED, sentence)

    def elapsed_s(self) -> float:
        """Seconds since the job's first start."""
        return self._start_s + self._clock.monotonic() - self._started

    def _tell(self, event: driving.Event) -> None:
        self._events.put_nowait(event)

    def _now_ms(self) -> int:
        return round(self._clock.monotonic() * 1000)

    async def _loop(self) -> driving.Finish:
        event: driving.Event = driving.Tick()
        while True:
            self._driving, effects = driving.step(self._driving, event, self._now_ms())
            await self._carry_out(effects)
            if isinstance(event, driving.Delivered):
                self._answered(event.contribution_id)
            if self._driving.finished is not None:
                return self._driving.finished
            event = await self._next_event()

    async def _next_event(self) -> driving.Event:
        wake = self._driving.wake_ms
        timeout = None if wake is None else max(0.0, (wake - self._now_ms()) / 1000)
        try:
            async with asyncio.timeout(timeout):
                return await self._events.get()
        except TimeoutError:
            return driving.Tick()

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._side_work.add(task)
        task.add_done_callback(self._side_work_done)
        return task

    def _side_work_done(self, task: asyncio.Task[None]) -> None:
        self._side_work.discard(task)
        if not task.cancelled() and task.exception() is not None and self._failure is None:
            self._failure = task.exception()
            self._tell(driving.StopAsked(f"The driver failed: {self._failure}"))

    # ---- effects ----

    async def _carry_out(self, effects: Sequence[driving.Effect]) -> None:
        commit: Envelope | None = None
        attached: dict[bytes, bytes] = {}
        for effect in effects:
            match effect:
                case driving.PublishCommit():
                    if commit is not None:
                        self._broadcast(commit, None, attached)
                    commit, attached = await self._publish(effect)
                case driving.Assign():
                    assignment = sign(self._key, effect.assignment, self.network)
                    self._record(assignment)
                    _log.info("round %d: %s", effect.assignment.round, effect.reason)
                    self._broadcast(commit, assignment, attached)
                    commit, attached = None, {}
                case driving.FetchUpdate():
                    given = self._take_in(effect)
                    given.fetching = self._beside(self._fetch_update(effect.contribution_id, effect.contribution))
                case driving.Aggregate():
                    updates = [self._given[one.contribution_id].update for one in effect.candidates]
                    self._beside(self._aggregate(effect, self.state, updates))
                case driving.Refuse():
                    if effect.contribution_id in self._arrived:
                        self._answer(effect.contribution_id, effect.sentence)
                    _log.info("%s: %s", self._name(effect.member_id), effect.sentence)
                case driving.CatchUp():
                    self._catch_up(effect)
                case driving.LetGo():
                    self._beside(self._dismiss(effect.member_id, TAKEN_BACK, NodeStatus.RECLAIMED))
                case driving.TurnAway():
                    self._beside(self._dismiss(effect.member_id, effect.sentence, NodeStatus.REFUSED))
                case driving.Retire():
                    self._beside(self._dismiss(effect.member_id, effect.sentence, NodeStatus.EXCLUDED))
                case driving.WakeAt():
                    pass  # read from the state
                case driving.Finish():
                    pass
        if commit is not None:
            self._broadcast(commit, None, attached)

    def _broadcast(self, commit: Envelope | None, assignment: Envelope | None, attached: Mapping[bytes, bytes]) -> None:
        holders = self.holders
        for line in self._lines.by_member.values():
            if line.ready:
                line.send(
                    Turn(
                        job=self.job_id,
                        commit=commit.to_bytes() if commit else None,
                        assignment=assignment.to_bytes() if assignment else None,
                        holders=holders,
                        attached=tuple(data for member, data in attached.items() if member != line.member_id),
                    )
                )

    async def _publish(self, effect: driving.PublishCommit) -> tuple[Envelope, dict[bytes, bytes]]:
        """Sign a Commit and write it down before anyone hears of it; gives what travels with it."""
        commit = effect.commit
        envelope = sign(self._key, commit, self.network)
        given = [(entry.contribution, self._given[entry.contribution].contribution) for entry in commit.accepted]
        if self._treasurer is not None:
            await self._treasurer.owes(
                effect.commit_id,
                ((part.node, part.tokens, contribution) for contribution, one in given for part in one.work),
            )
        await asyncio.to_thread(self._folder.append, envelope, durable=True)
        await self._watchers.written()
        self._watchers.recorded(envelope)
        self._commits[commit.round] = envelope
        while len(self._commits) > COMMITS_KEPT:
            self._commits.popitem(last=False)
        weighing = ""
        for entry in commit.accepted:
            self._store.pin(PIN, entry.update.hash)  # a driver that takes over computes the state from them
        if commit.accepted:
            self.state, weighing = next(
                found for key, found in self._next.items() if key[0] == commit.round and found[0].hash == commit.state
            )
        self._next = {key: found for key, found in self._next.items() if key[0] > commit.round}
        size = self.state.size
        if size > OFFERED_MAX_BYTES or is_offered(commit.round, size, self.job.rounds):
            self._offered = (self.state, envelope)
        attached = {}
        if sum(entry.update.size for entry in commit.accepted) <= ATTACH_MAX_BYTES:
            attached = {entry.member: self._store.read(entry.update.hash) for entry in commit.accepted}
        self._note_commit(commit, weighing)
        for key in [key for key, one in self._given.items() if one.contribution.round <= commit.round]:
            fetching = self._given.pop(key).fetching
            if fetching is not None:
                fetching.cancel()  # what came too slowly for its round takes no place from the next one's
        self._watchers.committed(commit, given, self.state)
        if self._treasurer is not None:
            await self._pay_for(commit, self._treasurer)
        return envelope, attached

    async def _pay_for(self, commit: Commit, treasurer: Treasurer) -> None:
        """A Commit that accepted a Contribution owes for it, and ends the job where the next could not be paid."""
        treasurer.committed()
        for node, sentence in treasurer.idle().items():
            line = self._lines.of_node(node)
            if line is not None:
                self._beside(self._leave(line, f"it is not worth its money: {sentence}."))
        if commit.tokens_total < self.job.token_budget:
            reason = await treasurer.used_up()
            if reason is not None:
                self.stop(reason)

    def _take_in(self, effect: driving.FetchUpdate) -> _Given:
        """Keep a Contribution that has its place: on disk, with the update that came along."""
        given = self._given[effect.contribution_id] = _Given(effect.contribution)
        arrived = self._arrived[effect.contribution_id]
        self._record(arrived.envelope)
        if arrived.attached is not None and _is(effect.contribution.update, arrived.attached):
            self._store.put(arrived.attached, UPDATE_MEDIA_TYPE)
        self._answer(effect.contribution_id, None)
        return given

    async def _fetch_update(self, contribution_id: bytes, contribution: Contribution) -> None:
        problem = None
        try:
            if not self._store.has(contribution.update.hash):
                await self._fetcher.fetch(contribution.update, self.holders)
            data = self._store.read(contribution.update.hash)
            given = self._given.get(contribution_id)
            if given is not None:
                given.update = await asyncio.to_thread(
                    decode_update, data, self.job.rounds.codec, self.state.layout.size, self.job.rounds.sparse_keep
                )
        except (StorageFull, DiskFailed):
            raise  # this is no fault of the member's
        except ShoalError as error:
            problem = error.sentence
        self._tell(driving.UpdateChecked(contribution_id, problem))

    async def _aggregate(self, effect: driving.Aggregate, base: SharedState, checked: Sequence[Update | None]) -> None:
        updates = [update for update in checked if update is not None]
        assert len(updates) == len(effect.candidates), "candidates were checked"
        accepted, excluded, state, weighing = await asyncio.to_thread(
            self._weigh_and_step, base, effect.candidates, updates
        )
        self._next[effect.round, effect.attempt] = state, weighing
        self._tell(driving.Aggregated(effect.round, effect.attempt, accepted, excluded, state.hash))

    def _weigh_and_step(
        self, base: SharedState, candidates: Sequence[driving.Candidate], updates: Sequence[Update]
    ) -> tuple[tuple[Accepted, ...], tuple[Excluded, ...], SharedState, str]:
        rounds = self.job.rounds
        weights = weigh(
            [candidate.contribution.tokens for candidate in candidates],
            measure(updates).gram,
            weight_cap=rounds.weight_cap,
            norm_ratio_max=rounds.norm_ratio_max,
        )
        accepted, excluded, weighed = [], [], []
        for candidate, update, weight in zip(candidates, updates, weights.members, strict=True):
            if weight.weight_ppm == 0:
                excluded.append(
                    Excluded(member=candidate.member_id, reason=weight.reason, contribution=candidate.contribution_id)
                )
                continue
            accepted.append(
                Accepted(
                    member=candidate.member_id,
                    contribution=candidate.contribution_id,
                    update=candidate.contribution.update,
                    weight_ppm=weight.weight_ppm,
                    scale_ppm=weight.scale_ppm,
                    samples=candidate.contribution.samples,
                    tokens=candidate.contribution.tokens,
                    reason=weight.reason,
                )
            )
            weighed.append(WeighedUpdate(update, weight.weight_ppm, weight.scale_ppm))
        return tuple(accepted), tuple(excluded), self._outer.apply(base, weighed), weights.reason

    def _catch_up(self, effect: driving.CatchUp) -> None:
        line = self._lines.by_member.get(effect.member_id)
        if line is None:
            return
        holders = self.holders
        for number in range(effect.first_round, effect.last_round + 1):
            if number in self._commits:
                line.send(Turn(job=self.job_id, commit=self._commits[number].to_bytes(), holders=holders))

    async def _dismiss(self, member_id: bytes, sentence: str, status: NodeStatus) -> None:
        line = self._lines.remove(member_id)
        if line is None:
            return
        self._close_line(line, status, sentence)
        await self._lines.tell_end(self.job_id, line, sentence)

    # ---- members ----

    async def _invite(self, node: LinkedNode) -> None:
        self._invited.tried(node.node)
        self._being_invited += 1
        try:
            state, head = self._offered
            ref = await asyncio.to_thread(self._store.put, state.to_bytes(), SharedState.MEDIA_TYPE)
            invite = MemberInvite(
                job=self.records.job.to_bytes(),
                grant=self.records.grant.to_bytes(),
                term=self.records.term.to_bytes(),
                head=head.to_bytes() if head else None,
                state=ref,
                holders=self.holders,
            )
            if self._treasurer is not None:
                await self._treasurer.secure(node)
            body = encode(invite, node.link.version)
            answer = await node.link.request(
                MemberInvite.KIND, body, deadline_s=INVITE_DEADLINE_S, reply_max_bytes=MemberAnswer.MAX_BYTES
            )
            packed = decode(MemberAnswer, answer, node.link.version).member
            envelope = Envelope.from_bytes(packed, Member.MAX_BYTES)
            member = open_record(envelope, Member, self.network)
            if envelope.signer != node.node or member.job != self.job_id or member.nodes[0].node != node.node:
                raise BadRecord(f"Node {node.name} answered with a member record that is not its own for this job.")
        except (LinkError, BadRecord, NotSecured, MoneyRefused, NoMoney, LedgerFailed, LedgerBusy) as error:
            self._note(EventKind.NOTE, node.node, f"{node.name} did not join: {error}")
            if self._treasurer is not None:
                self._treasurer.left(node.node, "did not join")
            return
        finally:
            self._being_invited -= 1
        self._record(envelope)
        old = self._lines.of_node(node.node)
        if old is not None:
            self._left(old, NodeStatus.LEFT, "its node joined anew.", stays=True)
        lane = self._lanes.get(node.node)
        if lane is None:
            lane = self._lanes[node.node] = NodeLane(node.node, self.elapsed_s())
        self._note_lanes(lane.closed(self.elapsed_s(), Lane.GONE))
        line = MemberLine(node, envelope.record_id, member, envelope, lane)
        self._lines.add(line)
        self._reclaimed_s.pop(node.node, None)
        _log.info("%s was invited", line.name)
        self._names[line.member_id] = line.name
        known = self.nodes.get(node.node)
        self.nodes[node.node] = NodeFigures(
            node_id=node.node.hex(),
            name=member.name,
            bytes_sent=known.bytes_sent if known else 0,
            bytes_received=known.bytes_received if known else 0,
        )

    async def _ready(self, request: Request) -> bytes:
        message = decode(MemberReady, request.body, request.version)
        line = self._line(message.member, request.peer)
        if line.ready:
            return encode(Done(), request.version)
        line.ready = True
        line.samples_per_s = message.samples_per_s
        self._note_lanes(line.lane.ready(self.elapsed_s()))
        self._set(line.node.node, status=NodeStatus.WORKING, reason="", speed=message.samples_per_s)
        price = ""
        if self._treasurer is not None:
            micro = self._treasurer.ready(line.node.node, message.samples_per_s, self.job.data.sequence_tokens)
            price = f": at that speed a million tokens for {format_money(micro)}" if micro else ""
        self._note(
            EventKind.JOINED,
            line.node.node,
            f"{line.name} joined with {message.samples_per_s:.1f} samples/s, "
            f"holding the {'start state' if message.round < 0 else f'state of round {message.round}'}{price}.",
        )
        self._tell(driving.MemberJoined(line.member_id, line.record, message.samples_per_s, message.round))
        self._expect_leaving(line)
        return encode(Done(), request.version)

    async def _delivered(self, request: Request) -> bytes:
        message = decode(Deliver, request.body, request.version)
        envelope = Envelope.from_bytes(message.contribution, Contribution.MAX_BYTES)
        contribution = open_record(envelope, Contribution, self.network)
        line = self._line(contribution.member, request.peer)
        if envelope.signer != line.node.node:
            raise NotOfThisJob(
                f"The contribution of {line.name} is signed by {short_id(envelope.signer)}, not by the member's node."
            )
        if self._driving.finished is not None:
            raise NotCounted(f"The job is over: {self._driving.finished.reason}")
        refused = await self._judged(line, contribution, envelope, message.attached)
        if refused is not None:
            raise NotCounted(refused)
        self._note_delivery(line, contribution, message)
        return encode(Done(), request.version)

    async def _judged(
        self, line: MemberLine, contribution: Contribution, envelope: Envelope, attached: bytes | None
    ) -> str | None:
        """Ask the rules about a Contribution; gives why it does not count."""
        arrived = self._arrived.get(envelope.record_id)
        if arrived is None:
            if line.unanswered >= UNANSWERED_MAX:
                raise NotCounted(
                    f"{line.name} has {UNANSWERED_MAX} contributions waiting for an answer; send one after another."
                )
            line.unanswered += 1
            arrived = _Arrived(line, envelope, attached, asyncio.get_running_loop().create_future())
            self._arrived[envelope.record_id] = arrived
            self._tell(driving.Delivered(contribution, envelope.record_id, envelope.signer))
        return await asyncio.shield(arrived.refused)

    def _answer(self, contribution_id: bytes, refused: str | None) -> None:
        """The rules have spoken about a Contribution."""
        arrived = self._arrived[contribution_id]
        if not arrived.refused.done():
            arrived.refused.set_result(refused)

    def _answered(self, contribution_id: bytes) -> None:
        """The event of a Contribution was handled: what was said about it by then is all."""
        self._answer(contribution_id, None)
        self._arrived.pop(contribution_id).line.unanswered -= 1

    async def _gone(self, request: Request) -> bytes:
        message = decode(MemberGone, request.body, request.version)
        line = self._line(message.member, request.peer)
        self._left(line, NodeStatus.LEFT, message.reason)
        return encode(Done(), request.version)

    async def _reclaim(self, request: Request) -> bytes:
        """A node's owner wants it back: it works until then, and others are looked for."""
        word = decode(HoldReclaim, request.body, request.version)
        line = self._lines.of_node(request.peer)
        if line is None or self._treasurer is None:
            raise NotOfThisJob(f"Node {short_id(request.peer)} has no place in job {self.job.name!r} that could end.")
        notice_s = self._treasurer.reclaimed(request.peer, word)
        if request.peer not in self._reclaimed_s:
            self._reclaimed_s[request.peer] = self._clock.monotonic() + notice_s
            self._note(
                EventKind.NOTE,
                request.peer,
                f"{line.name}: its owner takes it back in {notice_s:.0f} s. It works until then, and another node is "
                "looked for.",
            )
            self._expect_leaving(line)
        return encode(Done(), request.version)

    def _expect_leaving(self, line: MemberLine) -> None:
        until_s = self._reclaimed_s.get(line.node.node)
        if until_s is not None:
            self._tell(driving.MemberLeaving(line.member_id, round(1000 * until_s)))

    async def _commits_asked(self, request: Request) -> bytes:
        message = decode(CommitsAsk, request.body, request.version)
        if message.job != self.job_id:
            raise NotOfThisJob("This driver drives another job.")
        if self._lines.of_node(request.peer) is None:
            raise NotOfThisJob(f"Node {short_id(request.peer)} is no member of job {self.job.name!r}, or not any more.")
        last = min(message.last_round, message.first_round + COMMITS_AT_ONCE - 1)
        commits: list[bytes] = []
        room = CommitsGiven.MAX_BYTES - GIVEN_EXTRA_BYTES
        for number in range(message.first_round, last + 1):
            packed = self._commits[number].to_bytes() if number in self._commits else b""
            room -= len(packed)
            if room < 0:
                break
            if packed:
                commits.append(packed)
        given = CommitsGiven(commits=tuple(commits), holders=self.holders)
        return encode(given, request.version)

    def _line(self, member_id: bytes, peer: bytes) -> MemberLine:
        line = self._lines.by_member.get(member_id)
        if line is None or line.node.node != peer:
            raise NotOfThisJob(f"Node {short_id(peer)} is no member of job {self.job.name!r}, or not any more.")
        return line

    def _lost(self, line: MemberLine, sentence: str) -> None:
        self._left(line, NodeStatus.DIED, sentence)

    def _left(self, line: MemberLine, status: NodeStatus, reason: str, *, stays: bool = False) -> None:
        """A member is gone; that its node `stays` means that it is another member now, and keeps its place."""
        if self._lines.remove(line.member_id) is None:
            return
        if self._clock.monotonic() >= self._reclaimed_s.get(line.node.node, math.inf) - NOTICE_SLACK_S:
            status, reason = NodeStatus.RECLAIMED, TAKEN_BACK
        self._close_line(line, status, reason, stays=stays)
        if not self._lines.by_member and self.progress().tokens_total < self.job.token_budget:
            self._note(
                EventKind.NOTE, None, "No member is left; the job goes on as soon as a node at the hubs takes part."
            )
        self._tell(driving.MemberLeft(line.member_id, reason))

    async def _leave(self, line: MemberLine, reason: str) -> None:
        self._left(line, NodeStatus.LEFT, reason)
        await self._lines.tell_end(self.job_id, line, reason)

    def _close_line(self, line: MemberLine, status: NodeStatus, reason: str, *, stays: bool = False) -> None:
        kind = {
            NodeStatus.DIED: EventKind.DIED, NodeStatus.LEFT: EventKind.LEFT, NodeStatus.RECLAIMED: EventKind.LEFT,
        }.get(status, EventKind.EXCLUDED)  # fmt: skip
        self._note_lanes(line.lane.ended(self.elapsed_s()))
        self._set(line.node.node, status=status, reason=reason)
        self._note(kind, line.node.node, f"{line.name}: {reason}")
        if self._treasurer is not None and not stays:
            self._treasurer.left(line.node.node, reason)

    async def _look_for_more(self) -> None:
        """Invite nodes that come to the hubs while the job runs."""
        lookout = Lookout(self._directory, self._wanted, self._wish)
        say_at = self._clock.monotonic() + WAITING_SAID_EVERY_S
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            if not self._driving.started and self._clock.monotonic() >= say_at:
                say_at = self._clock.monotonic() + WAITING_SAID_EVERY_S
                self._say_who_is_awaited()
            if self._staying() >= self._nodes_max:
                continue
            former = [node for node in {**dict.fromkeys(self.records.former), **self.nodes} if self._may_invite(node)]
            try:
                found = await lookout.look(former)
            except LinkError as error:
                _log.info("no hub answers; the job goes on without new nodes: %s", error)
                continue
            fresh = [one for one in found if self._may_invite(one.node)]
            for one in fresh[: DIALS_AT_ONCE - len(self._dialled)]:
                self._dialled.add(one.node)
                self._beside(self._link_and_invite(one))

    def _say_who_is_awaited(self) -> None:
        needed, ready = self._driving.members_min, len(self._driving.members)
        if ready < needed:
            names = [line.name for line in self._lines.by_member.values() if not line.ready]
            awaited = f" {', '.join(names)} {'prepares' if len(names) == 1 else 'prepare'} still." if names else ""
            self._note(
                EventKind.NOTE,
                None,
                f"The job begins when {needed} members are ready; {ready} are.{awaited} To begin with fewer, set "
                "requirements.nodes_min.",
            )

    async def _link_and_invite(self, one: FoundOffer) -> None:
        """Whoever is slow to answer holds up nobody but itself."""
        try:
            node = await link_to(
                one.node, one.offer, endpoint=self._endpoint, directory=self._directory, clock=self._clock,
                wish=self._wish,
            )  # fmt: skip
            if self._within_ms is not None:
                await refuse_far(node, [line.node for line in self._lines.by_member.values()], self._within_ms)
            if self._bonded is not None:
                await self._bonded(node)
        except ShoalError as error:  # whatever is wrong with one offer, the job goes on
            self._unreached.tried(one.node)
            _log.info("%s could not be reached: %s", one.offer.name, error)
            return
        finally:
            self._dialled.discard(one.node)
        self._unreached.succeeded(one.node)
        if self._staying() + self._being_invited < self._nodes_max:
            await self._invite(node)

    def _staying(self) -> int:
        """Members whose nodes are not taken back soon."""
        return sum(line.node.node not in self._reclaimed_s for line in self._lines.by_member.values())

    def _may_invite(self, node: bytes) -> bool:
        if self._clock.monotonic() < self._reclaimed_s.get(node, 0.0):
            return False
        if self._invited.times(node) >= INVITES_MAX or node in self._dialled:
            return False
        if self._invited.rests(node) or self._unreached.rests(node):
            return False
        return self._lines.of_node(node) is None and node not in self._driving.retired

    def _close_lanes(self) -> None:
        """The job is over: what its nodes did until then."""
        now = self.finished_s
        for line in self._lines.by_member.values():
            if self.nodes[line.node.node].status is not NodeStatus.EXCLUDED:
                self._note_lanes(line.lane.closed(now, Lane.WAITING))
                self._set(line.node.node, status=NodeStatus.FINISHED)
        for node, figures in self.nodes.items():
            if figures.status in GONE and node in self._lanes:
                gone = Lane.EXCLUDED if figures.status is NodeStatus.EXCLUDED else Lane.GONE
                self._note_lanes(self._lanes[node].closed(now, gone))

    async def _say_goodbye(self, reason: str) -> None:
        """Let the members go, however the driving ended."""
        for contribution_id in list(self._arrived):
            self._answer(contribution_id, "The job is over.")
        lines = list(self._lines.by_member.values())
        await self._lines.close()
        await asyncio.gather(*(self._lines.tell_end(self.job_id, line, reason) for line in lines))

    @property
    def holders(self) -> tuple[BlobHolder, ...]:
        """Who holds the job's blobs: this driver first."""
        own = BlobHolder(self._key.node_id, tuple(self._endpoint.addresses))
        return (own, *(line.node.holder for line in list(self._lines.by_member.values())[:63]))

    # ---- the account ----

    def _record(self, envelope: Envelope) -> None:
        self._folder.append(envelope)
        self._watchers.recorded(envelope)

    def _name(self, member_id: bytes) -> str:
        return self._names.get(member_id, f"member {short_id(member_id)}")

    def _set(self, node: bytes, **changes: Any) -> None:
        self.nodes[node] = msgspec.structs.replace(self.nodes[node], **changes)

    def _note(self, kind: EventKind, node: bytes | None, sentence: str, round_: int | None = None) -> None:
        event = Event(
            time_s=self.elapsed_s(),
            sentence=sentence[:1000],
            kind=kind,
            node=node.hex() if node else "",
            round=round_,
        )
        self._folder.note(event)
        self._watchers.event(event)

    def _note_lanes(self, segments: Any) -> None:
        for segment in segments:
            self._folder.note(segment)

    def _note_delivery(self, line: MemberLine, contribution: Contribution, message: Deliver) -> None:
        round_trip = line.node.link.stats().round_trip_ms or 0.0
        compute_s = sum(part.compute_ms for part in contribution.work) / 1000 / len(contribution.work)
        self._note_lanes(line.lane.delivered(self.elapsed_s(), compute_s, message.waited_ms / 1000, round_trip / 2000))
        sent, received = message.bytes_sent - line.bytes_sent, message.bytes_received - line.bytes_received
        line.bytes_sent, line.bytes_received = message.bytes_sent, message.bytes_received
        figures = self.nodes[line.node.node]
        self._set(
            line.node.node,
            bytes_sent=min(BYTES_CLAIMED_MAX, figures.bytes_sent + max(0, sent)),
            bytes_received=min(BYTES_CLAIMED_MAX, figures.bytes_received + max(0, received)),
        )

    def _note_commit(self, commit: Commit, weighing: str) -> None:
        now = self.elapsed_s()
        given = [self._given[entry.contribution].contribution for entry in commit.accepted]
        for entry in commit.accepted:
            line = self._lines.by_member.get(entry.member)
            if line is not None:
                self._invited.succeeded(line.node.node)
        tokens = sum(one.tokens for one in given)
        loss = None
        if tokens:
            loss = sum(one.tokens * (one.loss_first + one.loss_last) / 2 for one in given) / tokens
            self._loss = loss if self._loss is None else 0.8 * self._loss + 0.2 * loss
        passed = max(1e-9, now - self._last_commit_s)
        rate = tokens / passed
        self._rate = rate if self._rate == 0 else 0.8 * self._rate + 0.2 * rate
        self._last_commit_s = now
        sent = sum(figures.bytes_sent for figures in self.nodes.values())
        received = sum(figures.bytes_received for figures in self.nodes.values())
        self._folder.note(
            RoundMetrics(
                round=commit.round,
                time_s=now,
                tokens_total=commit.tokens_total,
                loss=loss,
                tokens_per_s=rate,
                members=len(commit.accepted),
                bytes_sent=max(0, sent - self._counted[0]),
                bytes_received=max(0, received - self._counted[1]),
                inner_steps=self.job.rounds.inner_steps,
                state=commit.state.hex(),
                weighing=weighing[:1000],
            )
        )
        self._counted = (sent, received)
        for excluded in commit.excluded:
            line = self._lines.by_member.get(excluded.member)
            node = line.node.node if line else None
            self._note(
                EventKind.NOTE,
                node,
                f"Round {commit.round}: {self._name(excluded.member)} does not count: {excluded.reason}",
                commit.round,
            )
        self._watchers.progress(self.progress())

    def progress(self) -> Progress:
        """How the job stands now."""
        working = {
            member
            for one in self._driving.rounds
            for member, share in one.shares.items()
            if share.phase is driving.Phase.AWAITED
        }
        members = {
            line.name: "fetching" if not line.ready else "computing" if line.member_id in working else "waiting"
            for line in self._lines.by_member.values()
        }
        for figures in self.nodes.values():
            if figures.name not in members:
                members[figures.name] = figures.status.value
        standing = self._driving.standing
        return Progress(
            self.elapsed_s(),
            standing.tokens_total,
            self.job.token_budget,
            standing.round,
            self._loss,
            self._rate,
            sum(figures.bytes_sent for figures in self.nodes.values()),
            sum(figures.bytes_received for figures in self.nodes.values()),
            members,
            self._treasurer.payments.spent_micro if self._treasurer is not None else None,
        )


def _is(ref: BlobRef, data: bytes) -> bool:
    return len(data) == ref.size and blake3_hash(data) == ref.hash
