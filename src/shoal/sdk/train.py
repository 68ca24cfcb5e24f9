"""Training a job from its file to its report: prepare, find nodes, drive, audit, measure, export.

`train` begins a job in a new folder, `resume` goes on with one that stopped. Both end with the folder holding the
model, the records and the report.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import msgspec

from shoal.driver.audit import FINISH_S, Auditor
from shoal.driver.folder import FolderTaken, RunFolder, saying_room
from shoal.driver.gang import LinkedNode, fastest_float32, link_to, link_to_former
from shoal.driver.lines import AuditLine, AuditVerdict, Event
from shoal.driver.replay import CHAIN_ELSEWHERE_MAX
from shoal.driver.report import (
    AuditCount,
    Figures,
    Goal,
    NodeFigures,
    NodeStatus,
    ReplayCost,
    Report,
    RoundChoice,
)
from shoal.driver.takeover import take_over
from shoal.driver.training import NOT_BACK, JobRecords, Progress, TrainingDriver, Watchers
from shoal.driver.training import Outcome as Ending
from shoal.driver.treasurer import Treasurer
from shoal.driver.write_report import make_report, write_missing_page, write_report
from shoal.errors import BadInput
from shoal.house import RemoteLedger
from shoal.hub import HubClient
from shoal.identity import Envelope, KeyPair, load_key, load_or_create_key
from shoal.identity.secrets import write_secret
from shoal.market.reputation import Outcome
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.holds import Deputy
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import record_id_of, sign
from shoal.protocol.offers import Offer
from shoal.protocol.training import Assignment, Commit, Contribution, Grant, Term, TrainJob
from shoal.rounds.length import RoundLength
from shoal.rounds.standing import Standing, standing_at_start
from shoal.sdk.acquaintances import Acquaintances, AcquaintancesDamaged
from shoal.sdk.choosing import Choosing, Size, slowest_rate_bps, slowest_round_trip_ms
from shoal.sdk.costs import Costs
from shoal.sdk.evaluator import Evaluator
from shoal.sdk.handed import is_driven_by_nodes
from shoal.sdk.hours import Bought, BoughtOffers
from shoal.sdk.jobfile import JobFile
from shoal.sdk.loop_script import engine_for, how_to_take_part
from shoal.sdk.notes import OwnerNotes, most_telling
from shoal.sdk.preparation import Prepared, prepare
from shoal.sdk.spending import Lent, Spending
from shoal.storage import BlobStore, Fetcher, serve
from shoal.training.state import SharedState
from shoal.training.updates import update_bytes
from shoal.transport import TlsEndpoint
from shoal.world import Clock, Dice, Link, SystemClock, SystemDice

DRIVER_KEY = "driver.key"
GRANT_MS = 30 * 24 * 3600 * 1000
STORE_BYTES = 64 << 30
FIGURES_EVERY_S = 2.0
"""How often a running driver writes down what its report needs and no record holds."""
READING_SAID_S = 0.2
"""How often at most it is said how far reading data has come."""

_log = logging.getLogger("shoal.train")


class NothingToResume(BadInput):
    """A run that has reached its goal, or never began."""

    code = "SH-126"


class NotDetached(BadInput):
    """A job cannot be driven by nodes."""

    code = "SH-153"


@dataclass(frozen=True)
class Hosted:
    """That a node drives the job for an owner who is away, and may be followed by another one."""

    key: KeyPair
    """To drive with."""
    storage_bytes: int
    """For the job's blobs."""
    gone: Collection[bytes]
    """Nodes that are gone with the driver before."""
    alone: bool
    """Members that do not answer are gone."""
    began: Callable[[int], None]
    """Told the number of the term."""
    written: Callable[[Sequence[BlobHolder]], Awaitable[None]]
    """After each Commit that is on the disk, with who holds the job's blobs; nobody else hears of it before this
    returns."""
    present: Callable[[], Collection[bytes]]
    """The driver keys of the hosts that are there: they are paid for that."""
    stopped: Callable[[], bool]
    """Its owner wants it to end."""


@dataclass
class TrainOptions:
    """How a job is driven, beside what its file says."""

    folder: Path
    hubs: Sequence[HubTicket]
    key: KeyPair
    listen: str | None = "tcp://127.0.0.1:0"
    replace: bool = False
    prompt: str | None = None
    """What the trained model continues in the report; none: nothing."""
    goal: Callable[[Report], Goal] | None = None
    spending: Spending | Lent | None = None
    """None: only nodes that work for nothing take part."""
    bought: Bought | None = None
    """Hours that it uses, and no other nodes; none: it takes nodes at the price that they offer."""
    hosted: Hosted | None = None
    acquaintances: Acquaintances | None = None
    """What nodes did for earlier jobs, and where it is kept what they do for this one; none: all are new."""
    audits: bool = True
    closing_audit: bool = False
    """Replay one contribution of every member before the members are let go."""
    say: Callable[[str], None] = lambda _: None
    reading: Callable[[float], None] = lambda _: None
    """Told, from another thread, which share of the data was read."""
    progress: Callable[[Progress], None] = lambda _: None
    event: Callable[[Event], None] = lambda _: None
    audited: Callable[[AuditLine], None] = lambda _: None
    clock: Clock = field(default_factory=SystemClock)
    dice: Dice = field(default_factory=SystemDice)


@dataclass(frozen=True)
class Plan:
    """What a job would do, before it does it."""

    nodes: tuple[tuple[str, str, float], ...]
    """(name, device, FLOP/s) of the nodes that fit."""
    length: RoundLength
    parameters: int
    samples: int
    held_out_tokens: int
    unigram_loss: float | None
    rounds: int
    update_bytes: int
    round_trip_ms: float | None
    nodes_min: int
    """How many the job needs before it begins."""
    flops_together: float
    """What they have to have been measured at together."""
    so_far: str
    """What of that is there."""
    why_not: str
    """Why there are fewer, and what would do; empty where there are enough."""
    token_budget: int
    dtype: str
    caution: str
    """What the job gives up by its settings; empty when nothing."""
    costs: Costs | None
    """None for a loop of one's own, of which nobody knows what a sample takes."""


async def train(job_file: JobFile, yaml: bytes, options: TrainOptions, folder: RunFolder | None = None) -> Report:
    """Run a job in a new folder, or in one that was just created. Raises ShoalError when it cannot start."""
    with folder or new_folder(options) as folder, saying_room(folder.path):
        if options.bought is not None:
            write_secret(folder.path / DRIVER_KEY, options.bought.key.to_pem())
        async with Session(folder, options, load_or_create_key(folder.path / DRIVER_KEY), job_file) as session:
            if session.treasurer is not None:
                await session.treasurer.check()
            prepared, gang, length = await session.plan()
            gang, length = await session.choosing.secure(Size.of(prepared), gang, length)
            job = session.sign_job(prepared, length, gang)
            session.keep_for_later(prepared, length, gang)
            records = session.first_term(job)
            folder.begin(job, yaml)  # last: from here on this run can be resumed, and one that it replaces is gone
            await session.choosing.set_aside(gang)
            standing = standing_at_start(session.job, job.record_id)
            return await session.drive(records, standing, prepared.state, gang, {})


def new_folder(options: TrainOptions) -> RunFolder:
    """For a job that begins. Raises FolderTaken, also where nodes drive the run that would be thrown away: nobody could
    stop them any more, nor get what they do. Raises what `RunFolder.create` does."""
    if (options.folder / "job.record").exists() and is_driven_by_nodes(options.folder):
        raise FolderTaken(
            f"Nodes drive the job in {options.folder}: look at it with `shoal attach`, stop it with `shoal jobs "
            "cancel`, or choose another name."
        )
    return RunFolder.create(options.folder, replace=options.replace)


async def plan(job_file: JobFile, options: TrainOptions, scratch: Path, deadline_s: float | None = None) -> Plan:
    """What `train` would do: reads the data and asks the hubs, starts nothing. `scratch` is an empty directory. With a
    deadline the costs name the cheapest mix that keeps it."""
    with RunFolder.create(scratch) as folder, saying_room(scratch):
        async with Session(folder, options, KeyPair.generate(), job_file) as session:
            prepared, gang, length = await session.plan(waiting=False)
            needs, choosing = job_file.requirements, session.choosing
            enough = needs.needed.met_by(choosing.measured_flops(gang))
            why_not = "" if enough else await choosing.why_not()
            if not why_not:
                gang, why_not = await choosing.narrowed(gang)
            rounds = job_file.rounds.resolved(length.inner_steps)
            per_round = length.inner_steps * job_file.batch_samples * prepared.data.sequence_tokens
            per_round *= max(1, min(len(gang), needs.nodes_max))
            flops = choosing.measured_flops(gang)
            return Plan(
                nodes=tuple(
                    (one.name, one.offer.capability.devices[0].name, fastest_float32(one.offer)) for one in gang
                ),
                length=length,
                parameters=prepared.model.parameters,
                samples=prepared.data.samples,
                held_out_tokens=prepared.held_out_tokens,
                unigram_loss=prepared.unigram_loss,
                rounds=math.ceil(job_file.tokens / per_round),
                update_bytes=update_bytes(rounds.codec, prepared.model.parameters, rounds.sparse_keep),
                round_trip_ms=slowest_round_trip_ms(gang),
                nodes_min=needs.nodes_min,
                flops_together=needs.flops_together,
                so_far=needs.needed.so_far(flops),
                why_not=why_not,
                token_budget=job_file.tokens,
                dtype=choosing.dtype(gang),
                caution=" ".join(filter(None, (say_undecided(job_file), say_unseen_bonds(job_file, options)))),
                costs=choosing.costs(prepared, gang, length, deadline_s),
            )


async def resume(job_file: JobFile, options: TrainOptions) -> Report:
    """Go on with the job in a folder, in a new term, from its newest Commit."""
    if options.hosted is None and is_driven_by_nodes(options.folder):
        raise NothingToResume(
            f"Nodes drive the job in {options.folder}: look at it with `shoal attach`, add to its budget with `shoal "
            "jobs fund`, stop it with `shoal jobs cancel`. When it is over, it can be gone on with here."
        )
    with RunFolder.open(options.folder) as folder, saying_room(folder.path):
        written = folder.read("report.json", Report)
        if written is not None and written.tokens_accepted >= folder.train_job().token_budget:
            write_missing_page(folder, written)
            raise NothingToResume(
                f"The job in {options.folder} has reached its token budget already; its page is "
                f"{options.folder / 'report.html'}."
            )
        own, hosted = folder.path / DRIVER_KEY, options.hosted
        key = hosted.key if hosted is not None else load_key(own) if own.exists() else options.key
        async with Session(folder, options, key, job_file) as session:
            options.say("Reading the run's records and its newest state.")
            session.notes = OwnerNotes.read(folder)
            if hosted is not None and session.notes.names_files:
                raise NotDetached("What its owner notes names files of this machine: it is not driven here.")
            choosing = session.choosing
            if session.treasurer is not None:
                await session.treasurer.close_former()
                await session.treasurer.check()
            taken = await take_over(
                folder,
                key=session.key,
                endpoint=session.endpoint,
                store=session.store,
                clock=options.clock,
                reach=functools.partial(
                    link_to_former,
                    wanted=choosing.wanted(),
                    endpoint=session.endpoint,
                    directory=session.hubs,
                    clock=options.clock,
                ),
                gone=hosted.gone if hosted is not None else (),
                alone=hosted is not None and hosted.alone,
            )
            if hosted is not None:
                hosted.began(taken.records.term_number)
            options.say(f"Going on after round {taken.standing.round}, in term {taken.records.term_number}.")
            gang: list[LinkedNode] = []
            # Killed after its last Commit, it may still have to measure the model and write the report.
            if taken.standing.tokens_total < session.job.token_budget:
                gang = await choosing.gang(without=taken.retired.keys(), former=taken.records.former)
                if any(one.node in taken.records.former for one in gang):
                    gang = await choosing.resumed(gang)
                else:  # as at the beginning: nobody is left of those beside whom others would be dear
                    steps = RoundLength(session.job.rounds.inner_steps, session.notes.round_reason)
                    gang, _ = await choosing.secure(Size.of_job(session.job), gang, steps)
                await choosing.set_aside(gang)
            return await session.drive(taken.records, taken.standing, taken.state, gang, taken.retired)


def refuse_script(job_file: JobFile) -> None:
    """Raises NotDetached."""
    if job_file.model.script is not None:
        raise NotDetached(
            "A job with a loop of its own (model.script) is driven where its script is: nodes run no code of jobs."
        )


def say_unseen_bonds(job_file: JobFile, options: TrainOptions) -> str:
    """Of a plan for which no ledger is asked."""
    if not job_file.requirements.bond_min or options.spending is not None:
        return ""
    return "Bonds (requirements.bond_min) are not looked at here; `shoal train --dry-run` with a --budget does."


def say_undecided(job_file: JobFile) -> str:
    """Which rounds a replay elsewhere will not be able to decide, if any."""
    every = job_file.replay.snapshot_every
    if every <= CHAIN_ELSEWHERE_MAX:
        return ""
    return (
        f"Members keep their state every {every} rounds (replay.snapshot_every): a replay on another kind of machine "
        f"than a member names decides nothing about {every - CHAIN_ELSEWHERE_MAX} of them, as rounding has grown too "
        f"large. With strangers' nodes choose at most {CHAIN_ELSEWHERE_MAX}."
    )


class _Reading:
    """Follows the thread that reads the data, and ends it when nobody waits for it any more."""

    class Stopped(Exception):
        """Raised in that thread."""

    def __init__(self, told: Callable[[float], None], clock: Clock) -> None:
        self._told, self._clock = told, clock
        self._stop = threading.Event()
        self._next_s = clock.monotonic() + READING_SAID_S

    def stop(self) -> None:
        self._stop.set()

    def watch(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise _Reading.Stopped
        if total and self._clock.monotonic() >= self._next_s:
            self._next_s = self._clock.monotonic() + READING_SAID_S
            self._told(done / total)


class Session:
    """The pieces that a driving process holds open: endpoint, hubs, blobs, money, and the job as it is driven."""

    def __init__(self, folder: RunFolder, options: TrainOptions, key: KeyPair, job_file: JobFile) -> None:
        """`key` drives: each run has one of its own, so that an owner can have several runs at a time."""
        self.folder = folder
        self.key = key
        self.options, self.job_file = options, job_file
        self.clock, self.dice = options.clock, options.dice
        self.notes = OwnerNotes()
        self.evaluator: Evaluator | None = None
        self.driver: TrainingDriver | None = None
        self.treasurer: Treasurer | None = None
        self.ledger: RemoteLedger | None = None
        self._withholding: set[asyncio.Task[None]] = set()
        self._figures_s = -FIGURES_EVERY_S
        self._driven = False
        """All rounds are done, or no more can be."""
        self._waits = False
        """As the money is used up, and more may come."""

    async def __aenter__(self) -> Session:
        options = self.options
        self.endpoint = TlsEndpoint(self.key, clock=self.clock, dice=self.dice)
        capacity_bytes = options.hosted.storage_bytes if options.hosted is not None else STORE_BYTES
        self.store = BlobStore(self.folder.blobs, capacity_bytes, self.clock)
        self.fetcher = Fetcher(self.endpoint, self.store, self.clock, self.dice)
        if options.bought is None:
            self.hubs = HubClient(self.endpoint, options.hubs, clock=self.clock, dice=self.dice)
        else:
            self.hubs = BoughtOffers(
                self.endpoint, options.hubs, holds=options.bought.holds, clock=self.clock, dice=self.dice
            )
        if options.spending is not None:
            self.treasurer = self._make_treasurer(options.spending)
        self.choosing = Choosing(
            self.job_file,
            owner=options.key.node_id,
            endpoint=self.endpoint,
            directory=self.hubs,
            clock=self.clock,
            say=options.say,
            seen=self._seen(),
            spending=options.spending,
            ledger=self.ledger,
            treasurer=self.treasurer,
        )
        try:
            if options.listen is not None:
                await self.endpoint.listen(options.listen)
            serve(self.endpoint, self.store)
            await self.hubs.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def _seen(self) -> Mapping[bytes, float]:
        """What is known of nodes. Raises AcquaintancesDamaged, and what reading the owner's notes does."""
        if self.options.hosted is not None:
            return OwnerNotes.read(self.folder).scores
        return self.options.acquaintances.scores() if self.options.acquaintances is not None else {}

    def _make_treasurer(self, spending: Spending | Lent) -> Treasurer:
        async def link(node: bytes, offer: Offer) -> Link:
            found = await link_to(node, offer, endpoint=self.endpoint, directory=self.hubs, clock=self.clock)
            return found.link

        self.ledger = RemoteLedger(self.endpoint, spending.ledger, self.clock)
        key, deputy = self.key, None
        if isinstance(spending, Lent):
            key, deputy = spending.client, sign(spending.client, Deputy(driver=self.key.node_id)).to_bytes()
        return Treasurer(
            spending.funds(self.ledger), self.folder, key=key, link=link, clock=self.clock, dice=self.dice,
            say=self.options.say, deputy=deputy, present=self.options.hosted.present if self.options.hosted else tuple,
        )  # fmt: skip

    async def _settle(self) -> None:
        """Whoever drives for an owner who is away and does not come to the job's end leaves its money to the next; what
        is hardly anything any more may become more."""
        if self.treasurer is None:
            return
        hosted = self.options.hosted
        if hosted is None or hosted.stopped() or (self._driven and not self._waits):
            await self.treasurer.close()
        elif self._waits:
            await self.treasurer.let_go()
        else:
            await self.treasurer.leave()

    async def __aexit__(self, *_: object) -> None:
        await self._settle()
        if self.evaluator is not None:
            await self.evaluator.close()
        await self.hubs.close()
        await self.endpoint.close()
        self.store.close()

    @property
    def job(self) -> TrainJob:
        return self.folder.train_job()

    @property
    def pin(self) -> str:
        return "run"

    # ---- before ----

    async def plan(self, *, waiting: bool = True) -> tuple[Prepared, list[LinkedNode], RoundLength]:
        """Prepare data and model while nodes are looked for, and, if `waiting`, waited for; choose the round length
        from what was measured."""
        job_file = self.job_file
        self.options.say("Reading data and model.")
        if job_file.model.script is not None:
            self.options.say(how_to_take_part(job_file.model.script, self.options.key, self.options.hubs))
        reading = _Reading(self.options.reading, self.clock)
        preparing = asyncio.create_task(
            asyncio.to_thread(
                prepare,
                job_file,
                job_file.rounds.settings,
                self.store,
                self.folder.path / "data",
                self.pin,
                reading.watch,
            )
        )
        looking = asyncio.create_task(self.choosing.gang(waiting=waiting))
        preparing.add_done_callback(lambda _: _log.info("data and model are prepared"))
        looking.add_done_callback(lambda _: _log.info("nodes were looked for"))
        try:
            prepared, gang = await asyncio.gather(asyncio.shield(preparing), looking)
        finally:
            looking.cancel()  # bad data ends the search
            reading.stop()
            await asyncio.wait({preparing})
            if not preparing.cancelled():
                preparing.exception()
        return prepared, gang, self.choosing.length(Size.of(prepared), gang)

    def sign_job(self, prepared: Prepared, length: RoundLength, gang: Sequence[LinkedNode]) -> Envelope:
        job_file = self.job_file
        job = TrainJob(
            name=job_file.name,
            created_ms=self.clock.now_ms(),
            seed=job_file.seed,
            model=prepared.model,
            data=prepared.data,
            token_budget=job_file.tokens,
            batch_samples=job_file.batch_samples,
            optimizer=job_file.optimizer,
            rounds=job_file.rounds.resolved(length.inner_steps),
            replay=job_file.replay,
            dtype=self.choosing.dtype(gang),
        )
        self.options.say(length.reason)
        caution = say_undecided(job_file)
        if caution:
            self.options.say(caution)
        return sign(self.options.key, job)

    def keep_for_later(
        self,
        prepared: Prepared,
        length: RoundLength,
        gang: Sequence[LinkedNode],
        tokenizer: str | None = None,
        seen: Mapping[bytes, float] = MappingProxyType({}),
    ) -> None:
        """What `resume` and later evaluations need; `tokenizer` where it is another one than what was prepared with;
        what was `seen` of nodes, where others drive."""
        self.notes = OwnerNotes(
            tokenizer=tokenizer or prepared.tokenizer,
            held_out=prepared.held_out,
            unigram_loss=prepared.unigram_loss,
            round_reason=length.reason,
            round_trip_ms=slowest_round_trip_ms(gang),
            rate_bps=slowest_rate_bps(gang),
            script=prepared.script,
            untrained_loss=prepared.untrained_loss,
            seen=most_telling(seen),
        )
        self.notes.write(self.folder)

    def first_term(self, job: Envelope) -> JobRecords:
        owner = self.options.key
        drivers = (self.key.node_id, owner.node_id)  # the owner itself, should the run's key be lost
        grant = sign(owner, Grant(job=job.record_id, drivers=drivers, not_after_ms=self.clock.now_ms() + GRANT_MS))
        term = sign(
            self.key, Term(job=job.record_id, number=1, grant=grant.record_id, head=job.record_id, head_round=-1)
        )
        self.folder.append(grant)
        self.folder.append(term, durable=True)
        return JobRecords(job, grant, term, 1)

    # ---- driving ----

    async def drive(
        self,
        records: JobRecords,
        standing: Standing,
        state: SharedState,
        gang: Sequence[LinkedNode],
        retired: Mapping[bytes, str],
    ) -> Report:
        options, folder, needs = self.options, self.folder, self.job_file.requirements
        known = folder.read("figures.json", Figures)
        auditor = Auditor(
            folder,
            endpoint=self.endpoint,
            store=self.store,
            fetcher=self.fetcher,
            dice=self.dice,
            rate=self.job.replay.audit_rate if options.audits else 0.0,
            known=known.audit_count if known else AuditCount(),
            on_verdict=self._audited,
            start_engine=engine_for(self.job, Path(self.notes.script) if self.notes.script is not None else None),
        )
        self.driver = TrainingDriver(
            records,
            standing,
            state,
            key=self.key,
            folder=folder,
            endpoint=self.endpoint,
            directory=self.hubs,
            store=self.store,
            fetcher=self.fetcher,
            clock=self.clock,
            wanted=self.choosing.wanted(),
            wish=self.choosing.wish(),
            within_ms=needs.latency_within_ms,
            bonded=self.choosing.refuse_unbonded if needs.bond_min else None,
            treasurer=self.treasurer,
            members_min=needs.needed.fewest(self.choosing.measured_flops(gang)),
            nodes_max=needs.nodes_max if self.treasurer is None else len(gang),
            retired=retired,
            known=known.nodes if known else (),
            watchers=Watchers(
                progress=options.progress,
                committed=lambda commit, given, after: self._committed(auditor, evaluator, commit, given, after),
                event=options.event,
                recorded=lambda envelope: self._recorded(auditor, evaluator, envelope),
                written=self._written,
                closing=lambda: self._close_out(auditor),
            ),
        )
        evaluator = self.evaluator = Evaluator(
            folder,
            self.notes,
            self.store,
            tokens_total=standing.tokens_total,
            elapsed_s=self.driver.elapsed_s,
            say=options.say,
        )
        try:
            await evaluator.start(state)
            if standing.tokens_total < self.job.token_budget:
                outcome = await self.driver.run(gang)
                self._waits = self.treasurer is not None and self.treasurer.spent and not outcome.reached
            else:
                outcome = Ending(True, f"{standing.tokens_total} tokens were accepted before.", state)
            self._driven = True
            evaluator.members_work()
        finally:
            cost = await auditor.close()
            await evaluator.settle()
            await asyncio.gather(*self._withholding, return_exceptions=True)
            await self._settle()
            self._remember(self.driver.nodes)
        return await self._finish(outcome, cost, auditor.count)

    async def _written(self) -> None:
        if self.options.hosted is not None and self.driver is not None:
            await self.options.hosted.written(self.driver.holders)

    def _remember(self, nodes: Mapping[bytes, NodeFigures]) -> None:
        """What this term has shown of its nodes. A node's word is a matter of those that have somebody to say it to:
        one's own processes are left out."""
        if self.options.acquaintances is None or self.notes.script is not None:
            return
        outcomes = {
            node: Outcome(
                kept=figures.status in (NodeStatus.FINISHED, NodeStatus.WORKING),
                left=figures.status in (NodeStatus.DIED, NodeStatus.LEFT) and figures.reason != NOT_BACK,
                lied=figures.status is NodeStatus.EXCLUDED,
            )
            for node, figures in nodes.items()
        } | {node: Outcome(absent=True) for node in (self.treasurer.absent if self.treasurer else ())}
        try:
            self.options.acquaintances.add(outcomes, self.clock.now_ms())
        except AcquaintancesDamaged as error:
            self.options.say(error.sentence)

    def _recorded(self, auditor: Auditor, evaluator: Evaluator, envelope: Envelope) -> None:
        auditor.recorded(envelope)
        if envelope.kind == Assignment.KIND:
            evaluator.members_work()

    def _committed(
        self,
        auditor: Auditor,
        evaluator: Evaluator,
        commit: Commit,
        given: Sequence[tuple[bytes, Contribution]],
        state: SharedState,
    ) -> None:
        auditor.committed(commit, given, state)
        self._keep_figures(auditor.count)
        evaluator.committed(commit.round, commit.tokens_total, state)

    def _keep_figures(self, count: AuditCount) -> None:
        """Write down what no record holds, now and then, so that a driver that is killed can go on with it."""
        assert self.driver is not None
        now = self.driver.elapsed_s()
        if now - self._figures_s >= FIGURES_EVERY_S:
            self._figures_s = now
            nodes = tuple(self.driver.nodes.values())
            self.folder.write("figures.json", msgspec.json.encode(Figures(wall_s=now, nodes=nodes, audit_count=count)))

    async def _close_out(self, auditor: Auditor) -> None:
        if auditor.waiting:
            self.options.say(f"Replaying what was chosen and waits ({auditor.waiting}), for up to {FINISH_S:.0f} s.")
            await auditor.finish()
        if self.options.closing_audit:
            self.options.say("Replaying a round of every member whose work was not looked at yet.")
            await auditor.audit_each()

    def _audited(self, contribution: Contribution, line: AuditLine) -> None:
        self.options.audited(line)
        if line.verdict is AuditVerdict.MISMATCH and self.driver is not None:
            reason = f"Found by replay of round {line.round}: {line.sentence}"
            self.driver.audit_failed(contribution.member, reason)
            if self.treasurer is not None:
                signer = bytes.fromhex(line.node)
                evidence = record_id_of(contribution, signer)
                short = f"a replay of round {line.round} showed other work than it claimed"
                task = asyncio.create_task(self.treasurer.withhold(signer, short, evidence))
                self._withholding.add(task)
                task.add_done_callback(self._withholding.discard)

    # ---- afterwards ----

    async def _finish(self, outcome: Ending, cost: ReplayCost, count: AuditCount) -> Report:
        assert self.driver is not None and self.evaluator is not None
        self.options.say("Measuring the model and writing the report.")
        wall_s = self.driver.finished_s
        standing_round, tokens = self.driver.progress().round, self.driver.progress().tokens_total
        loss = await self.evaluator.evaluate(standing_round, tokens, outcome.state)
        completion = await self.evaluator.export(outcome.state, self.options.prompt, self.job.seed)
        figures = Figures(
            wall_s=wall_s,
            held_out_loss=loss,
            unigram_loss=self.notes.unigram_loss,
            nodes=tuple(self.driver.nodes.values()),
            round_choice=RoundChoice(
                inner_steps=self.job.rounds.inner_steps,
                reason=self.notes.round_reason,
                round_trip_ms=self.notes.round_trip_ms,
                rate_bps=self.notes.rate_bps,
            ),
            replay_cost=cost,
            audit_count=count,
            completion=completion,
            goal=Goal(reached=outcome.reached, sentence=outcome.sentence),
        )
        if self.options.goal is not None:
            goal = self.options.goal(make_report(self.folder, figures))
            figures = msgspec.structs.replace(figures, goal=goal)
        return write_report(self.folder, figures)
