"""Training a job from its file to its report: prepare, find nodes, drive, audit, measure, export.

`train` begins a job in a new folder, `resume` goes on with one that stopped. Both end with the folder holding the
model, the records and the report.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shoal.driver.audit import FINISH_S, Auditor
from shoal.driver.folder import FolderWriteFailed, RunFolder, saying_room
from shoal.driver.gang import LOOK_EVERY_S, LinkedNode, fastest_float32, find_gang, link_to, link_to_former, why_not
from shoal.driver.lines import AuditLine, AuditVerdict, Evaluation, Event
from shoal.driver.nearness import near_gang
from shoal.driver.replay import CHAIN_ELSEWHERE_MAX
from shoal.driver.report import (
    AuditCount,
    Completion,
    Figures,
    Goal,
    NodeFigures,
    NodeStatus,
    ReplayCost,
    Report,
    RoundChoice,
)
from shoal.driver.takeover import CannotTakeOver, take_over
from shoal.driver.training import NOT_BACK, JobRecords, Progress, TrainingDriver, Watchers
from shoal.driver.training import Outcome as Ending
from shoal.driver.treasurer import Treasurer
from shoal.driver.write_report import make_report, write_missing_page, write_report
from shoal.engines import EngineFailed
from shoal.errors import BadInput
from shoal.house import RemoteLedger
from shoal.hub import HubClient
from shoal.identity import Envelope, KeyPair, load_key, load_or_create_key
from shoal.identity.accounts import AccountKey
from shoal.identity.secrets import write_secret
from shoal.market import Wish
from shoal.market.goodput import TrainingWork
from shoal.market.reputation import Outcome
from shoal.market.requirements import Means
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.holds import LEASE_STEP_MS, Deputy
from shoal.protocol.hubs import HubTicket
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import record_id_of, sign
from shoal.protocol.offers import Offer, OfferFind
from shoal.protocol.training import Assignment, Commit, Contribution, Grant, Term, TrainJob
from shoal.purse.purse import Funds
from shoal.quantities.money import format_money
from shoal.rounds.length import RoundLength, choose_round_length, exchange_takes_s, members_of_full_speed
from shoal.rounds.standing import Standing, standing_at_start
from shoal.sdk.acquaintances import Acquaintances, AcquaintancesDamaged
from shoal.sdk.costs import Costs, costs_of, mix_for
from shoal.sdk.handed import is_driven_by_nodes
from shoal.sdk.hours import Bought, BoughtOffers
from shoal.sdk.jobfile import JobFile
from shoal.sdk.loop_script import ScriptFailed, engine_for, how_to_take_part, loop_kind, measure
from shoal.sdk.preparation import Prepared, prepare
from shoal.sdk.spending import Spending
from shoal.storage import BlobStore, Fetcher, serve
from shoal.training.commands import Evaluate, ExportCheckpoint, Generate, Prepare, ShardFile
from shoal.training.process import EngineProcess
from shoal.training.state import SharedState
from shoal.training.updates import update_bytes
from shoal.transport import TlsEndpoint
from shoal.world import Clock, Dice, Link, SystemClock, SystemDice
from shoal.world.quotes import NotSecured, is_free

DRIVER_KEY = "driver.key"
TOKENIZER = "data/tokenizer"
"""Where the tokenizer is that went along with a run folder; else it is where its owner said."""
GRANT_MS = 30 * 24 * 3600 * 1000
STORE_BYTES = 64 << 30
HELD_OUT_SAMPLES = 512
"""Held-out samples of an evaluation, spread evenly."""
EVALUATIONS = 5
"""Evaluations between the first and the last."""
COMPLETION_TOKENS = 120
FIGURES_EVERY_S = 2.0
"""How often a running driver writes down what its report needs and no record holds."""
CPU_EFFICIENCY = 0.3
"""Share of a device's measured matmul rate that training reaches, about: only for choosing the round length, and for
plans."""
BFLOAT16_AHEAD = 1.5
"""How much faster than float32 it has to have measured to be worth its rounding."""
CANDIDATES_MAX = 256
"""Nodes of which a job that pays chooses."""
READING_SAID_S = 0.2
"""How often at most it is said how far reading data has come."""
STEP_LEAST_S = 0.004
"""No inner step is quicker: launching its kernels takes that long."""

_log = logging.getLogger("shoal.train")


class NothingToResume(BadInput):
    """A run that has reached its goal, or never began."""

    code = "SH-126"


class NotDetached(BadInput):
    """A job cannot be driven by nodes."""

    code = "SH-153"


@dataclass(frozen=True)
class Lent:
    """What an owner who is away lets a driver pay with: an escrow that is open, by a key that it names."""

    payer: bytes
    signer: AccountKey
    client: KeyPair
    """Whom nodes keep their places for."""
    ledger: LedgerTicket
    budget_micro: int


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
    """(name, device, FLOP/s) of the nodes it would take."""
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
    with folder or RunFolder.create(options.folder, replace=options.replace) as folder, saying_room(folder.path):
        if options.bought is not None:
            write_secret(folder.path / DRIVER_KEY, options.bought.key.to_pem())
        async with Session(folder, options, load_or_create_key(folder.path / DRIVER_KEY)) as session:
            if session.treasurer is not None:
                await session.treasurer.check()
            prepared, gang, length = await session.plan(job_file)
            gang, length = await session.secure(job_file, Size.of(prepared), gang, length)
            job = session.sign_job(job_file, prepared, length, gang)
            session.keep_for_later(prepared, length, gang)
            records = session.first_term(job)
            folder.begin(job, yaml)  # last: from here on this run can be resumed, and one that it replaces is gone
            await session.set_aside(gang, job_file)
            standing = standing_at_start(session.job, job.record_id)
            return await session.drive(records, standing, prepared.state, gang, {}, job_file)


async def plan(job_file: JobFile, options: TrainOptions, scratch: Path, deadline_s: float | None = None) -> Plan:
    """What `train` would do: reads the data and asks the hubs, starts nothing. `scratch` is an empty directory. With a
    deadline the costs name the cheapest mix that keeps it."""
    with RunFolder.create(scratch) as folder, saying_room(scratch):
        async with Session(folder, options, KeyPair.generate()) as session:
            prepared, gang, length = await session.plan(job_file, waiting=False)
            rounds = job_file.rounds.resolved(length.inner_steps)
            per_round = length.inner_steps * job_file.batch_samples * prepared.data.sequence_tokens * max(1, len(gang))
            dtype = choose_dtype([one.offer for one in gang]) if job_file.dtype == "auto" else job_file.dtype
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
                nodes_min=job_file.requirements.nodes_min,
                why_not=await session.why_not(job_file) if len(gang) < job_file.requirements.nodes_min else "",
                token_budget=job_file.tokens,
                dtype=dtype,
                caution=say_undecided(job_file),
                costs=session.costs(job_file, prepared, gang, length, dtype, deadline_s or job_file.deadline_s),
            )


async def resume(job_file: JobFile, options: TrainOptions) -> Report:
    """Go on with the job in a folder, in a new term, from its newest Commit."""
    if options.hosted is None and is_driven_by_nodes(options.folder):
        raise NothingToResume(
            f"Nodes drive the job in {options.folder}: look at it with `shoal attach`, stop it with `shoal jobs "
            "cancel`. When it is over, what is left of it can be gone on with here."
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
        async with Session(folder, options, key) as session:
            options.say("Reading the run's records and its newest state.")
            session.job_envelope = folder.job
            private = folder.read("owner.json", _OwnerNotes, remedy="restore it from a copy")
            if private is None:
                raise CannotTakeOver(
                    f"{options.folder / 'owner.json'} is missing, which says what the model is measured on and which "
                    "tokenizer it has; restore it from a copy."
                )
            session.private = private
            if hosted is not None and (private.script is not None or private.tokenizer not in ("bytes", TOKENIZER)):
                raise NotDetached("What its owner notes names files of this machine: it is not driven here.")
            wanted = session.wanted(job_file)
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
                    wanted=wanted,
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
                gang = await session.gang(job_file, without=taken.retired.keys(), former=taken.records.former)
                if taken.records.former:
                    gang = await session.resumed(job_file, gang)
                else:  # its owner has handed it over before it began
                    steps = RoundLength(session.job.rounds.inner_steps, private.round_reason)
                    gang, _ = await session.secure(job_file, Size.of_job(session.job), gang, steps)
                await session.set_aside(gang, job_file)
            return await session.drive(
                taken.records, taken.standing, taken.state, gang, taken.retired, job_file, wanted=wanted
            )


def refuse_script(job_file: JobFile) -> None:
    """Raises NotDetached."""
    if job_file.model.script is not None:
        raise NotDetached(
            "A job with a loop of its own (model.script) is driven where its script is: nodes run no code of jobs."
        )


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


def slowest_round_trip_ms(gang: Sequence[LinkedNode]) -> float | None:
    """The longest round trip between this driver and a node, as far as measured."""
    trips = (one.link.stats().round_trip_ms for one in gang)
    return max((trip for trip in trips if trip is not None), default=None)


def slowest_rate_bps(gang: Sequence[LinkedNode]) -> float | None:
    """What the slowest node measured that it can send."""
    rates = (one.offer.capability.hub_rate_bps for one in gang)
    return min((rate for rate in rates if rate > 0), default=None)


def choose_dtype(offers: Sequence[Offer]) -> str:
    """bfloat16 where every node's fastest device is an accelerator that measured it well ahead of float32, as all
    members of a job compute alike; else float32."""

    def fast(offer: Offer) -> bool:
        rates = [
            {rate.dtype: rate.flops for rate in device.throughput}
            for device in offer.capability.devices
            if device.kind != "cpu"
        ]
        best = max(rates, key=lambda each: each.get("float32", 0.0), default={})
        return best.get("bfloat16", 0.0) > BFLOAT16_AHEAD * best.get("float32", float("inf"))

    return "bfloat16" if offers and all(fast(offer) for offer in offers) else "float32"


class _OwnerNotes(msgspec.Struct, frozen=True, kw_only=True):
    """`owner.json`: what the owner needs to go on and no record holds."""

    tokenizer: str = "bytes"
    held_out: tuple[ShardFile, ...] = ()
    unigram_loss: float | None = None
    round_reason: str = ""
    round_trip_ms: float | None = None
    rate_bps: float | None = None
    script: str | None = None
    """Of the owner's own loop."""
    untrained_loss: float | None = None
    """As the script measured it."""


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


@dataclass(frozen=True)
class Size:
    """What of a job says how long its steps take."""

    parameters: int
    sequence_tokens: int
    samples_per_s: float = 0.0
    """Of the owner's own loop, where it was tried."""

    @classmethod
    def of(cls, prepared: Prepared) -> Size:
        return cls(prepared.model.parameters, prepared.data.sequence_tokens, prepared.samples_per_s)

    @classmethod
    def of_job(cls, job: TrainJob) -> Size:
        return cls(job.model.parameters, job.data.sequence_tokens)


class Session:
    """The pieces that a driving process holds open: endpoint, hubs, blobs, engine."""

    def __init__(self, folder: RunFolder, options: TrainOptions, key: KeyPair) -> None:
        """`key` drives: each run has one of its own, so that an owner can have several runs at a time."""
        self.folder = folder
        self.key = key
        self.options = options
        self.clock, self.dice = options.clock, options.dice
        self.job_envelope: Envelope | None = None
        self.private = _OwnerNotes()
        self.engine: EngineProcess | None = None
        self.driver: TrainingDriver | None = None
        self.treasurer: Treasurer | None = None
        self.ledger: RemoteLedger | None = None
        self._scores = options.acquaintances.scores() if options.acquaintances is not None else {}
        self._withholding: set[asyncio.Task[None]] = set()
        self._measuring = asyncio.Lock()
        self._figures_s = -FIGURES_EVERY_S
        self._driven = False
        """All rounds are done, or no more can be."""

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
        try:
            if options.listen is not None:
                await self.endpoint.listen(options.listen)
            serve(self.endpoint, self.store)
            await self.hubs.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def _make_treasurer(self, spending: Spending | Lent) -> Treasurer:
        async def link(node: bytes, offer: Offer) -> Link:
            found = await link_to(node, offer, endpoint=self.endpoint, directory=self.hubs, clock=self.clock)
            return found.link

        self.ledger = RemoteLedger(self.endpoint, spending.ledger, self.clock)
        key, deputy = self.key, None
        if isinstance(spending, Lent):
            funds = Funds(self.ledger, spending.payer, spending.signer, spending.budget_micro)
            key, deputy = spending.client, sign(spending.client, Deputy(driver=self.key.node_id)).to_bytes()
        else:
            funds = spending.funds(self.ledger)
        return Treasurer(
            funds, self.folder, key=key, link=link, clock=self.clock, dice=self.dice, say=self.options.say,
            deputy=deputy, present=self.options.hosted.present if self.options.hosted else tuple,
        )  # fmt: skip

    async def _settle(self) -> None:
        """Whoever drives for an owner who is away and does not come to the job's end leaves its money to the next."""
        if self.treasurer is None:
            return
        hosted = self.options.hosted
        if hosted is None or self._driven or hosted.stopped():
            await self.treasurer.close()
        else:
            await self.treasurer.leave()

    async def __aexit__(self, *_: object) -> None:
        await self._settle()
        if self.engine is not None:
            await self.engine.stop()
        await self.hubs.close()
        await self.endpoint.close()
        self.store.close()

    @property
    def job(self) -> TrainJob:
        return self.folder.train_job()

    @property
    def script(self) -> Path | None:
        """The script of the owner's own loop."""
        return Path(self.private.script) if self.private.script is not None else None

    @property
    def pin(self) -> str:
        return "run"

    # ---- before ----

    async def plan(self, job_file: JobFile, *, waiting: bool = True) -> tuple[Prepared, list[LinkedNode], RoundLength]:
        """Prepare data and model while nodes are looked for, and, if `waiting`, waited for; choose the round length
        from what was measured."""
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
        looking = asyncio.create_task(self.gang(job_file, waiting=waiting))
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
        return prepared, gang, self._length(job_file, Size.of(prepared), gang)

    def wanted(self, job_file: JobFile) -> OfferFind:
        needs = job_file.requirements
        own_loop = job_file.model.script is not None
        return OfferFind(
            accepts=loop_kind(self.options.key.node_id, job_file.name) if own_loop else "train",
            device=None if needs.each.device == "any" else needs.each.device,
            memory_bytes_min=needs.each.memory_min_bytes,
            idle_only=True,
        )

    def wish(self, job_file: JobFile, *, waiting: bool = True) -> Wish:
        """Who only plans may look at what it could not pay for."""
        wish = dataclasses.replace(job_file.requirements.wish, seen=self._scores)
        if not waiting:
            return wish
        spending = self.options.spending
        return dataclasses.replace(wish, means=Means(spending.ledger.ledger if spending is not None else None))

    async def why_not(self, job_file: JobFile) -> str:
        needs = job_file.requirements
        return await why_not(self.hubs, self.wanted(job_file), self.wish(job_file, waiting=False), needs.nodes_min)

    # ---- money ----

    async def secure(
        self, job_file: JobFile, size: Size, gang: list[LinkedNode], length: RoundLength
    ) -> tuple[list[LinkedNode], RoundLength]:
        """Those of a gang that have a bond, are near to one another, worth their money and keep a place, as far as the
        job asks for it, and the round length for them. While too few do, others are looked for, as long as the job
        file says. Raises NotSecured."""
        needs = job_file.requirements
        if self.treasurer is None and needs.latency_within_ms is None and not needs.bond_min:
            return gang, length
        until = self.clock.monotonic() + needs.wait_s
        while True:
            try:
                if needs.bond_min:
                    gang = await self._bonded(gang, needs.bond_min, needs.nodes_min)
                if needs.latency_within_ms is not None:
                    gang = await near_gang(gang, needs.latency_within_ms, needs.nodes_min)
                chosen = self._worth_it(job_file, size, gang, length)
                held = await self._held(job_file, chosen)
                return held, self._length(job_file, size, held)
            except NotSecured as error:
                if self.clock.monotonic() >= until:
                    raise
                self.options.say(error.sentence)
            await self.clock.sleep(LOOK_EVERY_S)
            gang = await self.gang(job_file)

    async def _bonded(self, gang: list[LinkedNode], least_micro: int, nodes_min: int) -> list[LinkedNode]:
        """Those for whose word so much is at stake while a place of theirs is held. Raises NotSecured, and what the
        ledger does."""
        if self.ledger is None:
            raise NotSecured("requirements.bond_min asks what is at stake at a ledger; name yours with a --budget.")
        ledger, until_ms = self.ledger, self.clock.now_ms() + LEASE_STEP_MS
        stakes = await asyncio.gather(*(ledger.bond_of(one.node, until_ms) for one in gang))
        bonded = [one for one, stake in zip(gang, stakes, strict=True) if stake >= least_micro]
        if len(bonded) < nodes_min:
            most = format_money(sorted(stakes)[-nodes_min]) if len(stakes) >= nodes_min else "nothing"
            raise NotSecured(
                f"{len(bonded)} of {len(gang)} nodes have a bond of {format_money(least_micro)} "
                f"(requirements.bond_min), and {nodes_min} are needed; with {most} there would be enough."
            )
        return bonded

    def _worth_it(self, job_file: JobFile, size: Size, gang: list[LinkedNode], length: RoundLength) -> list[LinkedNode]:
        """The mix that does the most for its money, or is done by the deadline for the least. Raises NotSecured where
        none is."""
        needs, spending = job_file.requirements, self.options.spending
        if job_file.model.script is not None or spending is None:
            return gang
        offers = [one.offer for one in gang]
        mix = mix_for(
            self._work(job_file, size, gang, length), offers,
            dtype=choose_dtype(offers) if job_file.dtype == "auto" else job_file.dtype, tokens=job_file.tokens,
            nodes_min=min(len(gang), needs.nodes_min), nodes_max=needs.nodes_max, deadline_s=job_file.deadline_s,
        )  # fmt: skip
        if not mix.members:
            raise NotSecured(mix.reason)
        expected, currency = mix.cost_micro(job_file.tokens), spending.ledger.currency
        self.options.say(
            f"Chosen {mix.reason} Expected for the job: {format_money(expected)} {currency}, "
            "by the speeds that are offered; a node's price for a token follows from what it measures on the job."
        )
        if expected > spending.budget_micro:
            self.options.say(
                f"That is more than its budget of {format_money(spending.budget_micro)} {currency}: it will stop when "
                "that is used up, to be resumed with a larger one."
            )
        return [gang[at] for at in mix.members]

    async def resumed(self, job_file: JobFile, gang: list[LinkedNode]) -> list[LinkedNode]:
        """Of those with which a job goes on. Raises NotSecured."""
        within_ms = job_file.requirements.latency_within_ms
        if within_ms is not None:
            gang = await near_gang(gang, within_ms, 1)
        return await self._held(job_file, gang)

    async def _held(self, job_file: JobFile, gang: list[LinkedNode]) -> list[LinkedNode]:
        if self.treasurer is None:
            return gang
        return await self.treasurer.hold(gang, min(len(gang), job_file.requirements.nodes_min))

    async def set_aside(self, gang: list[LinkedNode], job_file: JobFile) -> None:
        """The money for those that keep a place; those that do not take it are left out of the gang."""
        if self.treasurer is None:
            return
        free = sum(is_free(one.offer) for one in gang)
        taken = await self.treasurer.open(max(0, min(len(gang), job_file.requirements.nodes_min) - free))
        gang[:] = [one for one in gang if is_free(one.offer) or one.node in taken]

    async def gang(
        self,
        job_file: JobFile,
        without: Collection[bytes] = (),
        former: Collection[bytes] = (),
        *,
        waiting: bool = True,
    ) -> list[LinkedNode]:
        needs = job_file.requirements
        script = job_file.model.script
        advice = "Start more with `shoal node start`, or ask for fewer (requirements.nodes_min)."
        if script is not None:
            advice = f"Start processes of your loop, on this machine or others: `python {script}`."
        return await find_gang(
            self.wanted(job_file),
            self.wish(job_file, waiting=waiting),
            nodes_min=max(1, needs.nodes_min - len(without)) if waiting else 0,  # the retired are not waited for again
            nodes_max=needs.nodes_max if self.treasurer is None else max(needs.nodes_max, CANDIDATES_MAX),
            wait_s=needs.wait_s,
            advice=advice,
            endpoint=self.endpoint,
            directory=self.hubs,
            clock=self.clock,
            without=without,
            former=former,
            say=self.options.say,
        )

    def _length(self, job_file: JobFile, size: Size, gang: Sequence[LinkedNode]) -> RoundLength:
        rounds = job_file.rounds
        if rounds.inner_steps != "auto":
            return RoundLength(rounds.inner_steps, f"{rounds.inner_steps} inner steps a round, as the job file says.")
        speeds = [fastest_float32(one.offer) for one in gang]
        flops = max(speeds, default=0.0)
        work = 6 * size.parameters * job_file.batch_samples * size.sequence_tokens
        step_s = max(STEP_LEAST_S, work / (CPU_EFFICIENCY * flops) if flops else 1.0)
        if size.samples_per_s:
            step_s = job_file.batch_samples / size.samples_per_s
        return choose_round_length(
            step_s=step_s,
            update_bytes=update_bytes(rounds.settings.codec, size.parameters, rounds.settings.sparse_keep),
            members=len(gang),
            round_trip_s=(slowest_round_trip_ms(gang) or 0.0) / 1000,
            rate_bps=slowest_rate_bps(gang),
            bytes_per_s_budget=rounds.byte_budget,
            bytes_per_token_budget=rounds.bytes_per_token,
            step_tokens=job_file.batch_samples * size.sequence_tokens * members_of_full_speed(speeds),
            lag=rounds.settings.lag,
        )

    def _work(self, job_file: JobFile, size: Size, gang: Sequence[LinkedNode], length: RoundLength) -> TrainingWork:
        settings = job_file.rounds.settings
        sent_bytes = update_bytes(settings.codec, size.parameters, settings.sparse_keep)
        round_trip_s = (slowest_round_trip_ms(gang) or 0.0) / 1000
        return TrainingWork(
            flops_per_token=6.0 * size.parameters,
            efficiency=CPU_EFFICIENCY,
            step_tokens=job_file.batch_samples * size.sequence_tokens,
            inner_steps=length.inner_steps,
            exchange_s=lambda members, rate_bps: exchange_takes_s(sent_bytes, members, round_trip_s, rate_bps),
            hidden=settings.lag > 0,
            step_least_s=STEP_LEAST_S,
        )

    def costs(
        self,
        job_file: JobFile,
        prepared: Prepared,
        gang: Sequence[LinkedNode],
        length: RoundLength,
        dtype: str,
        deadline_s: float | None,
    ) -> Costs | None:
        if job_file.model.script is not None:
            return None
        needs = job_file.requirements
        work = self._work(job_file, Size.of(prepared), gang, length)
        return costs_of(
            work, [one.offer for one in gang], dtype=dtype, tokens=job_file.tokens, currency=needs.each.currency,
            nodes_min=needs.nodes_min, nodes_max=needs.nodes_max, deadline_s=deadline_s,
        )  # fmt: skip

    def sign_job(
        self, job_file: JobFile, prepared: Prepared, length: RoundLength, gang: Sequence[LinkedNode]
    ) -> Envelope:
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
            dtype=choose_dtype([one.offer for one in gang]) if job_file.dtype == "auto" else job_file.dtype,
        )
        self.job_envelope = sign(self.options.key, job)
        self.options.say(length.reason)
        caution = say_undecided(job_file)
        if caution:
            self.options.say(caution)
        return self.job_envelope

    def keep_for_later(
        self, prepared: Prepared, length: RoundLength, gang: Sequence[LinkedNode], tokenizer: str | None = None
    ) -> None:
        """What `resume` and later evaluations need; `tokenizer` where it is another one than what was prepared with."""
        self.private = _OwnerNotes(
            tokenizer=tokenizer or prepared.tokenizer,
            held_out=prepared.held_out,
            unigram_loss=prepared.unigram_loss,
            round_reason=length.reason,
            round_trip_ms=slowest_round_trip_ms(gang),
            rate_bps=slowest_rate_bps(gang),
            script=prepared.script,
            untrained_loss=prepared.untrained_loss,
        )
        self.folder.write("owner.json", msgspec.json.encode(self.private))

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
        job_file: JobFile,
        wanted: OfferFind | None = None,
    ) -> Report:
        options, folder = self.options, self.folder
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
            start_engine=engine_for(self.job, self.script),
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
            wanted=wanted or self.wanted(job_file),
            wish=self.wish(job_file),
            within_ms=job_file.requirements.latency_within_ms,
            treasurer=self.treasurer,
            members_min=min(len(gang), job_file.requirements.nodes_min),
            nodes_max=job_file.requirements.nodes_max if self.treasurer is None else len(gang),
            retired=retired,
            known=known.nodes if known else (),
            watchers=Watchers(
                progress=options.progress,
                committed=lambda commit, given, after: self._committed(auditor, commit, given, after),
                event=options.event,
                recorded=lambda envelope: self._recorded(auditor, envelope),
                written=self._written,
                closing=lambda: self._close_out(auditor),
            ),
        )
        self._next_evaluation = standing.tokens_total + self.job.token_budget / (EVALUATIONS + 1)
        self._evaluations: set[asyncio.Task[float | None]] = set()
        self._at_work = asyncio.Event()
        self._starting_engine = asyncio.create_task(self._start_engine(state))
        if all(one.round >= 0 for one in folder.notes(Evaluation)):
            self._evaluate_beside(-1, 0, await self._start_state())
        try:
            if standing.tokens_total < self.job.token_budget:
                outcome = await self.driver.run(gang)
            else:
                outcome = Ending(True, f"{standing.tokens_total} tokens were accepted before.", state)
            self._driven = True
            self._at_work.set()
        finally:
            if not self._at_work.is_set():
                self._starting_engine.cancel()
            cost = await auditor.close()
            await asyncio.gather(*self._evaluations, self._starting_engine, *self._withholding, return_exceptions=True)
            await self._settle()
            self._remember(self.driver.nodes)
        return await self._finish(outcome, cost, auditor.count)

    async def _written(self) -> None:
        if self.options.hosted is not None and self.driver is not None:
            await self.options.hosted.written(self.driver.holders)

    def _remember(self, nodes: Mapping[bytes, NodeFigures]) -> None:
        """What this term has shown of its nodes. A node's word is a matter of those that have somebody to say it to:
        one's own processes are left out."""
        if self.options.acquaintances is None or self.script is not None:
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

    async def _start_state(self) -> SharedState:
        return await asyncio.to_thread(SharedState.read, self.store.path(self.job.model.start.hash))

    async def _start_engine(self, state: SharedState) -> None:
        """An engine of the owner's own, for held-out losses, the completion and the checkpoint; a script does what of
        this it can. It loads its libraries, which takes seconds of every core here, when the members are at work: those
        on this machine measure themselves before."""
        if self.script is not None:
            return
        await self._at_work.wait()
        self.engine = await EngineProcess.start("the driver")
        path = await self._write_now(state)
        shards = tuple(
            ShardFile(str(self.store.path(shard.blob.hash)), shard.sequences) for shard in self.job.data.shards
        )
        await self.engine.prepare(Prepare(job=self.job, state=str(path), shards=shards, dtype="float32", measure=False))

    async def _write_now(self, state: SharedState) -> Path:
        """The file in which the engine finds a state."""
        path = self.folder.data / "state.now"
        with saying_room(self.folder.path):
            await asyncio.to_thread(state.write, path)
        return path

    def _recorded(self, auditor: Auditor, envelope: Envelope) -> None:
        auditor.recorded(envelope)
        if envelope.kind == Assignment.KIND:
            self._at_work.set()

    def _committed(
        self,
        auditor: Auditor,
        commit: Commit,
        given: Sequence[tuple[bytes, Contribution]],
        state: SharedState,
    ) -> None:
        auditor.committed(commit, given, state)
        self._keep_figures(auditor.count)
        if commit.tokens_total >= self._next_evaluation and commit.tokens_total < self.job.token_budget:
            self._next_evaluation += self.job.token_budget / (EVALUATIONS + 1)
            if self.script is not None:
                return  # it reads its data anew each time
            self._evaluate_beside(commit.round, commit.tokens_total, state)

    def _keep_figures(self, count: AuditCount) -> None:
        """Write down what no record holds, now and then, so that a driver that is killed can go on with it."""
        assert self.driver is not None
        now = self.driver.elapsed_s()
        if now - self._figures_s >= FIGURES_EVERY_S:
            self._figures_s = now
            nodes = tuple(self.driver.nodes.values())
            self.folder.write("figures.json", msgspec.json.encode(Figures(wall_s=now, nodes=nodes, audit_count=count)))

    def _evaluate_beside(self, round_number: int, tokens: int, state: SharedState) -> None:
        task = asyncio.create_task(self._evaluate(round_number, tokens, state))
        self._evaluations.add(task)
        task.add_done_callback(self._evaluated)

    def _evaluated(self, task: asyncio.Task[float | None]) -> None:
        """A held-out loss on the way is worth a sentence when it fails; the last one is waited for."""
        self._evaluations.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.options.say(f"The model could not be measured: {error}")

    async def _close_out(self, auditor: Auditor) -> None:
        if auditor.waiting:
            self.options.say(f"Replaying what was chosen and waits ({auditor.waiting}), for up to {FINISH_S:.0f} s.")
            await auditor.finish()
        if self.options.closing_audit:
            self.options.say("Replaying a round of every member whose work was not looked at yet.")
            await auditor.audit_each()

    async def _evaluate(self, round_number: int, tokens: int, state: SharedState) -> float | None:
        if self.driver is None:
            return None
        if self.script is not None:
            found = self.private.untrained_loss if round_number < 0 else await self._measure_script(self.script, state)
        elif self.private.held_out:
            found = await self._measure(state)
        else:
            found = None
        if found is None:
            return None
        loss = found if math.isfinite(found) else None
        self.folder.note(Evaluation(round=round_number, time_s=self.driver.elapsed_s(), tokens_total=tokens, loss=loss))
        return loss

    async def _measure(self, state: SharedState) -> float:
        async with self._measuring:
            await self._starting_engine
            assert self.engine is not None
            held = await self.engine.load_state(await self._write_now(state))
            done = await self.engine.evaluate(
                Evaluate(state=held.state, shards=self._held_out(), samples_max=HELD_OUT_SAMPLES)
            )
        return done.loss

    def _held_out(self) -> tuple[ShardFile, ...]:
        """Where they are now: the folder may have been moved."""
        return tuple(
            ShardFile(str((self.folder.data / Path(shard.path).name).resolve()), shard.sequences)
            for shard in self.private.held_out
        )

    async def _measure_script(self, script: Path, state: SharedState) -> float | None:
        """What a script does after its loop, with this state. That it fails costs the figure, not the run."""
        try:
            looked, said = await asyncio.to_thread(measure, script, state)
        except ScriptFailed as error:
            self.options.say(f"The model could not be measured: {error}")
            return None
        if said:
            self.options.say(said)
        return looked.held_out_loss

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
        assert self.driver is not None
        await self._starting_engine
        self.options.say("Measuring the model and writing the report.")
        wall_s = self.driver.finished_s
        standing_round, tokens = self.driver.progress().round, self.driver.progress().tokens_total
        loss = await self._evaluate(standing_round, tokens, outcome.state)
        completion = await self._export(outcome.state)
        figures = Figures(
            wall_s=wall_s,
            held_out_loss=loss,
            unigram_loss=self.private.unigram_loss,
            nodes=tuple(self.driver.nodes.values()),
            round_choice=RoundChoice(
                inner_steps=self.job.rounds.inner_steps,
                reason=self.private.round_reason,
                round_trip_ms=self.private.round_trip_ms,
                rate_bps=self.private.rate_bps,
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

    async def _export(self, state: SharedState) -> Completion | None:
        """Write the trained model, and have it continue the prompt if there is one."""
        self.folder.model.mkdir(exist_ok=True)
        if self.script is not None:
            parameters = SharedState.start(state.layout, state.parameters, momentum=False)
            await asyncio.to_thread(parameters.write, self.folder.model / "model.safetensors")
            return None
        assert self.engine is not None
        held = await self.engine.load_state(await self._write_now(state))
        completion = None
        tokenizer = self.private.tokenizer
        if tokenizer == TOKENIZER:
            tokenizer = str(self.folder.path / tokenizer)
        if self.options.prompt is not None:
            text = await self.engine.generate(
                Generate(
                    state=held.state,
                    tokenizer=tokenizer,
                    prompt=self.options.prompt,
                    tokens=COMPLETION_TOKENS,
                    temperature=0.6,
                    seed=self.job.seed,
                )
            )
            completion = Completion(prompt=self.options.prompt, text=text.text)
        try:
            await self.engine.export_checkpoint(
                ExportCheckpoint(state=held.state, directory=str(self.folder.model), tokenizer=tokenizer)
            )
        except EngineFailed as error:
            raise FolderWriteFailed(
                f"The trained model could not be written to {self.folder.model}: {error.sentence} All of the training "
                "is kept; when that is mended, use --resume."
            ) from error
        return completion
