"""Looking at a job that nodes drive: the owner's run folder follows theirs, until the job is over and all is here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.driver.chain import Chain, read_record
from shoal.driver.folder import FolderDamaged, RunFolder, saying_room
from shoal.driver.lines import AuditLine, Event, Line, RoundMetrics
from shoal.driver.mirror import BadCopy, Copy
from shoal.driver.report import Figures, NodeStatus, Report
from shoal.driver.training import PIN, Progress
from shoal.driver.write_report import write_missing_page
from shoal.errors import BadInput, JobError, ShoalError
from shoal.hub import HubClient
from shoal.identity import load_key
from shoal.market.reputation import Outcome
from shoal.node.hosting import NotHosted
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.driving import DriveStop, FolderAsk, FolderGiven, Host, Piece
from shoal.protocol.hubs import HubTicket
from shoal.protocol.offers import Done
from shoal.protocol.training import TrainJob
from shoal.purse.bills import FILE as PAYMENTS
from shoal.purse.bills import Payments
from shoal.sdk.acquaintances import Acquaintances, AcquaintancesDamaged
from shoal.sdk.detached import ask, link_to_host
from shoal.sdk.handed import FILE as HANDED
from shoal.sdk.handed import Handed, handed
from shoal.sdk.train import DRIVER_KEY, STORE_BYTES
from shoal.storage import BlobStore, Fetcher
from shoal.transport import TlsEndpoint
from shoal.world import Clock, Dice, Refused, SystemClock, SystemDice

L = TypeVar("L", bound=Line)
WAIT_MS = 2_000
AGAIN_S = 1.0
SILENT_S = 60.0
"""So long no host may answer."""
SIZE_MAX = 64 << 30
BAD_COPIES_MAX = 16
LAST_ROUNDS = 2
"""Who counted in one of these has worked until the end: with a lag of 1 a round may hold what began before the last."""


class NotHandedOver(BadInput):
    """A run is driven where it was begun, not by nodes."""

    code = "SH-154"


class OtherMoney(JobError):
    """A host says that other escrows pay for a job than its owner has opened."""

    code = "SH-638"


class HostsSilent(JobError):
    """None of a job's hosts answers."""

    code = "SH-637"


@dataclass
class AttachOptions:
    folder: Path
    hubs: Sequence[HubTicket] = ()
    """Beside those that the job was handed over with."""
    listen: str | None = "tcp://127.0.0.1:0"
    silent_s: float = SILENT_S
    acquaintances: Acquaintances | None = None
    """Where it is kept what nodes did, once the job is over."""
    say: Callable[[str], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None
    event: Callable[[Event], None] = lambda _: None
    audited: Callable[[AuditLine], None] = lambda _: None
    clock: Clock = field(default_factory=SystemClock)
    dice: Dice = field(default_factory=SystemDice)


async def attach(options: AttachOptions) -> Report | None:
    """Follow a job until it is over; gives its report, None where it was stopped before there was one. Raises
    NotHandedOver, HostsSilent, FolderLocked, and what the disk does."""
    async with _Looking.at(options) as looking:
        return await looking.follow()


async def refresh(options: AttachOptions) -> None:
    """Get what the hosts have now. Raises NotHandedOver, HostsSilent, FolderLocked."""
    async with _Looking.at(options) as looking:
        await looking.follow(once=True)


async def stop_detached(options: AttachOptions) -> None:
    """Have the hosts stop a job in order, and get what they have of it. Raises NotHandedOver, HostsSilent."""
    async with _Looking.at(options) as looking:
        await looking.stop()
        await looking.follow()


class _Looking:
    """The pieces that looking at a job needs open."""

    def __init__(self, options: AttachOptions, folder: RunFolder, known: Handed) -> None:
        """Use `at`."""
        self._options, self._folder, self._known = options, folder, known
        self.clock = options.clock
        self.endpoint = TlsEndpoint(load_key(folder.path / DRIVER_KEY), clock=options.clock, dice=options.dice)
        tickets = [HubTicket.parse(ticket) for ticket in known.hubs]
        self.hubs = HubClient(self.endpoint, [*tickets, *options.hubs], clock=options.clock, dice=options.dice)
        self._told: dict[type[Line], int] = {Event: 0, AuditLine: 0, RoundMetrics: 0}
        self._drives: bytes | None = None

    @classmethod
    def at(cls, options: AttachOptions) -> _Looking:
        known = handed(options.folder)
        if known is None:
            raise NotHandedOver(
                f"{options.folder} was not handed over to nodes (`shoal train --detach`): its driver runs where it was "
                "started, and `shoal jobs show` says how it stands."
            )
        return cls(options, RunFolder.open(options.folder), known)

    async def __aenter__(self) -> _Looking:
        try:
            if self._options.listen is not None:
                await self.endpoint.listen(self._options.listen)
            await self.hubs.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.hubs.close()
        await self.endpoint.close()
        self._folder.close()

    # ---- following ----

    async def follow(self, *, once: bool = False) -> Report | None:
        """Until the job is over; `once`: until nothing is missing."""
        path = self._folder.path
        if self._known.ended is None:
            with saying_room(path):
                copy = await asyncio.to_thread(Copy, path, SIZE_MAX, begun=True)
                said = await self._copy(copy, once)
                if said is None:
                    return None
                chain = await asyncio.to_thread(read_record, self._folder)
                await self._fetch_updates(chain)
            self._remember(chain)
            self._known = msgspec.structs.replace(self._known, ended=said)
            self._folder.write(HANDED, msgspec.json.encode(self._known))
            self._options.say(said)
        report = self._folder.read("report.json", Report)
        if report is not None:
            write_missing_page(self._folder, report)
        return report

    async def _copy(self, copy: Copy, once: bool) -> str | None:
        """Until the job is over and nothing is missing; gives how it ended. `once`: until nothing is missing."""
        bad = 0
        while True:
            host, lost = await self._who()
            while True:
                try:
                    message = FolderAsk(job=self._known.job, files=copy.there, wait_ms=0 if once else WAIT_MS)
                    given = await self._given(host, message)
                    await asyncio.to_thread(self._take, copy, given.pieces)
                except BadCopy as error:
                    bad += 1
                    if bad > BAD_COPIES_MAX:
                        raise HostsSilent(f"{host.name} sends what does not fit together: {error.sentence}") from error
                    await self.clock.sleep(AGAIN_S)
                    continue
                except OtherMoney:
                    raise
                except ShoalError:
                    break  # somebody else may drive by now
                self._tell(given)
                over = given.phase == "over" or (lost and given.phase == "given up")
                if over and not given.pieces and not given.more:
                    return f"All hosts have given the job up: {given.sentence}" if lost else given.sentence
                if once and not over and not given.more:
                    return None
                if not over and given.phase != "driving":
                    await self.clock.sleep(AGAIN_S)
                    break

    def _take(self, copy: Copy, pieces: Sequence[Piece]) -> None:
        """What may be spent, what was set aside, by whom and where, is the owner's to say: who goes on with the job
        sets as much aside, and who asks back what is left signs for what stands there. Raises BadCopy, OtherMoney,
        OSError."""
        money = any(one.name == PAYMENTS for one in pieces)
        before = self._folder.read(PAYMENTS, Payments) if money else None
        copy.take(pieces)
        if not money:
            return
        try:
            now = self._folder.read(PAYMENTS, Payments)
        except FolderDamaged:
            now = None
        if _opened(now) != _opened(before):
            self._folder.write(PAYMENTS, msgspec.json.encode(before or Payments(budget_micro=0)))
            raise OtherMoney(
                f"A host of {self._folder.path} says that other money was set aside for it than was; what it sent is "
                "not kept. Stop the job with `shoal jobs cancel`."
            )

    async def _who(self) -> tuple[Host, bool]:
        """The host that drives in the newest term, or that is nearest to it; and whether all have given up. Raises
        HostsSilent."""
        until_s = self.clock.monotonic() + self._options.silent_s
        while True:
            answers = await asyncio.gather(*(self._standing(one) for one in self._known.hosts))
            there = [(one, given) for one, given in zip(self._known.hosts, answers, strict=True) if given is not None]
            able = [(one, given) for one, given in there if given.phase != "given up"]
            lost = not able and len(there) == len(self._known.hosts)
            if able or lost:
                best, _ = max(able or there, key=lambda one: (one[1].phase in ("driving", "over"), one[1].term))
                return best, lost
            if self.clock.monotonic() > until_s:
                names = ", ".join(one.name for one in self._known.hosts)
                raise HostsSilent(
                    f"None of the job's hosts ({names}) answers. It goes on as soon as one of them does; look again "
                    "later. What it was paid with and does not use comes back by itself."
                )
            await self.clock.sleep(AGAIN_S)

    async def _standing(self, host: Host) -> FolderGiven | None:
        with suppress(ShoalError):
            return await self._given(host, FolderAsk(job=self._known.job, standing_only=True))
        return None

    async def _given(self, host: Host, message: FolderAsk) -> FolderGiven:
        """A host that does not have the job, as its owner was killed before that, drives it no more than one that has
        given it up. Raises ShoalError."""
        try:
            return await ask(await link_to_host(host, self), message, FolderGiven)
        except Refused as refused:
            if refused.remote_code != NotHosted.code:
                raise
            return FolderGiven(phase="given up", sentence=f"{host.name} does not have it.")

    async def stop(self) -> None:
        """All hosts, first the one that drives. Raises HostsSilent."""
        if self._known.ended is not None:
            return
        first, _ = await self._who()
        others = (one for one in self._known.hosts if one != first)
        for host in (first, *others):
            with suppress(ShoalError):
                await ask(await link_to_host(host, self), DriveStop(job=self._known.job), Done)

    # ---- what there is to see ----

    def _tell(self, given: FolderGiven) -> None:
        """What has come since."""
        options = self._options
        if given.phase == "driving" and given.drives not in (None, self._drives):
            self._drives = given.drives
            name = next((one.name for one in self._known.hosts if one.node == given.drives), "a node")
            options.say(f"{name} drives the job, in term {given.term}.")
        for event in self._new(Event):
            options.event(event)
        for audit in self._new(AuditLine):
            options.audited(audit)
        metrics = self._new(RoundMetrics)
        if metrics:
            options.progress(
                _progress(
                    self._folder.train_job(),
                    metrics[-1],
                    self._folder.read("figures.json", Figures),
                    self._folder.payments(),
                )
            )

    def _new(self, kind: type[L]) -> list[L]:
        lines = list(self._folder.notes(kind))
        fresh, self._told[kind] = lines[self._told[kind] :], len(lines)
        return fresh

    def _remember(self, chain: Chain) -> None:
        """Who worked until the end: it has signed for that. That others left, or lied, is a host's word alone."""
        last = (entry for commit, _, _ in chain.commits[-LAST_ROUNDS:] for entry in commit.accepted)
        kept = {chain.node_of[entry.member]: Outcome(kept=True) for entry in last}
        if self._options.acquaintances is not None:
            try:
                self._options.acquaintances.add(kept, self.clock.now_ms())
            except AcquaintancesDamaged as error:
                self._options.say(error.sentence)

    async def _fetch_updates(self, chain: Chain) -> None:
        """What replays, and going on from here, need beside the records."""
        refs = [entry.update for commit, _, _ in chain.commits for entry in commit.accepted]
        store = BlobStore(self._folder.blobs, STORE_BYTES, self.clock)
        try:
            fetcher = Fetcher(self.endpoint, store, self.clock, self._options.dice)
            holders = [BlobHolder(one.node, one.addresses) for one in self._known.hosts]
            missing = [ref for ref in refs if not store.has(ref.hash)]
            if missing:
                self._options.say(
                    f"Fetching the {len(missing)} updates of the job, for replays and for going on with it."
                )
            await asyncio.gather(*(fetcher.fetch(ref, holders, owner=PIN) for ref in refs))
        except ShoalError as error:
            self._options.say(
                f"Not all updates could be fetched, so not every round can be replayed here: {error.sentence}"
            )
        finally:
            store.close()


def _opened(payments: Payments | None) -> tuple[int, list[tuple[bytes, bytes]]]:
    """The budget without what was added since, and the escrows, each with its payer's signature."""
    if payments is None:
        return 0, []
    own_micro = payments.budget_micro - sum(one.added_micro for one in payments.terms)
    return own_micro, [(one.escrow, one.signature) for one in payments.terms]


def _progress(
    job: TrainJob, newest: RoundMetrics, figures: Figures | None, payments: Payments | None
) -> Progress:  # fmt: skip
    nodes = figures.nodes if figures is not None else ()
    return Progress(
        elapsed_s=newest.time_s,
        tokens_total=newest.tokens_total,
        token_budget=job.token_budget,
        round=newest.round,
        loss=newest.loss,
        tokens_per_s=newest.tokens_per_s,
        bytes_sent=sum(one.bytes_sent for one in nodes),
        bytes_received=sum(one.bytes_received for one in nodes),
        members={one.name: one.status.value for one in nodes if one.status is not NodeStatus.LEFT},
        spent_micro=payments.spent_micro if payments is not None else None,
    )
