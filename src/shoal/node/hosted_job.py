"""One job that this node drives while its owner is away, or stands by to drive.

    fetching ── all is here ──> standing by ── the hosts before it are gone ──> driving ── the job has ended ──> over
                                     ^──────── another one drives in a newer term ───────┘

Of the hosts that are there the first one drives; `driver_process` does it. What is committed is at the others before
any member hears of it, as long as they are in touch, and the next one goes on from there: members promise it to follow
no older driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.driver.folder import CHAIN, FILE_MAX_BYTES, RunFolder, records_after
from shoal.driver.mirror import BadCopy, Copy, missing
from shoal.errors import BadRecord, LinkError, ShoalError
from shoal.identity import NodeId
from shoal.market.holds import HoldRefused
from shoal.node.driver_process import Began, Committed, DriverOrders, DriverProcess, Ended, Failed
from shoal.protocol.blobs import BlobHolder, BlobRef
from shoal.protocol.driving import DriveBegin, FolderAsk, FolderGiven, Host, Phase
from shoal.protocol.holds import LEASE_STEP_MS
from shoal.protocol.messages import open_record
from shoal.protocol.money import SignedVoucher
from shoal.protocol.training import Commit, Grant, Term
from shoal.purse.bills import FILE as PAYMENTS
from shoal.purse.bills import Payments
from shoal.rounds.succession import SILENCE_MS
from shoal.storage import BlobStore, Fetcher, patience_s
from shoal.world import Clock, DirectoryDisk, Endpoint, Link
from shoal.world.asking import ask
from shoal.world.clock import within
from shoal.world.directory import Directory
from shoal.world.reach import reach_again

SILENCE_S = SILENCE_MS / 1000
"""A host that was not heard for so long is gone; the second after it waits twice as long, and so on."""
IN_TOUCH_S = 30.0
"""A standby that asked for news so lately is waited for by the process that drives, for a while."""
AGAIN_S = 2.0
RIVALS_EVERY_S = 5.0
PAID_EVERY_S = 30.0
"""So often the copy is looked at for the newest voucher."""
UNPAID_S = 3600.0
"""A host goes on for so long when nothing is set aside for it any more: who drives asks the rest back before the model
is measured and the report written."""
WAIT_MS = 10_000
ASK_DEADLINE_S = 30.0
LOOK_DEADLINE_S = 5.0
REACH_DEADLINE_S = 5.0
FETCHED_WITHIN_S = 300.0
"""A job whose owner has not handed it over by then, and by `patience_s` longer for its bytes, is dropped."""
STORAGE_SHARE = 0.5
"""Of the node's storage, for what one job brings along, and as much again for its folder."""
ROOM, ROOM_LEAST_BYTES = 4, 1 << 30
"""A job's folder may grow to ROOM times what it brought along, and ROOM_LEAST_BYTES more: records come."""
UPDATES_WITHIN_S = 60.0
FETCHED_AT_ONCE = 32
FAILURES_MAX = 5
"""Times in a row that driving may fail without a Commit between."""
WAITS_MAX = 720
"""Times in a row that a host may be told to wait: until members let it drive."""
ALONE_S = LEASE_STEP_MS / 1000
"""After so long nobody keeps a place for the driver before it any more: members that do not answer are gone as well."""
LATER = ("SH-634",)
"""What a driver says that may be otherwise later: members still follow another one, or hold more than is here."""

_log = logging.getLogger("shoal.hosting")


class BadHandover(BadRecord):
    """What an owner handed over is not the job that was announced, or nothing that this node may drive."""

    code = "SH-266"


@dataclass(frozen=True)
class HostSettings:
    """That a node drives jobs for others, and how."""

    micro_per_h: int
    """What it asks for that; 0: nothing."""
    command: tuple[str, ...]
    """Module and arguments of the process that drives."""


@dataclass(frozen=True)
class Around:
    """What of its node a hosted job needs."""

    node: bytes
    endpoint: Endpoint
    directory: Directory
    store: BlobStore
    fetcher: Fetcher
    clock: Clock
    settings: HostSettings
    listen: str | None
    network: str
    changed: Callable[[], Awaitable[None]]
    """Told when a job is over."""
    paid: Callable[[DriveBegin, SignedVoucher | None], Awaitable[None]]
    """Given the newest voucher for a job that this node drives, if any. Raises HoldRefused where nothing more is set
    aside for that."""


class HostingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`hosting`, in the folder of a hosted job."""

    owner: NodeId
    begin: DriveBegin
    size: int
    """Bytes that the job brought along."""
    ended: Phase | None = None
    why: str = ""
    got: bool = False
    """Its owner has all of the folder, as it was when the job ended."""


def storage_for_one(store: BlobStore) -> int:
    """Bytes that one job may bring along."""
    return round(STORAGE_SHARE * store.capacity_bytes)


class HostedJob:
    def __init__(self, around: Around, folder: Path, record: HostingRecord) -> None:
        self.record = record
        self.run_folder = folder / "run"
        self._around, self._folder, self._begin = around, folder, record.begin
        self._rank = next(at for at, one in enumerate(self._begin.hosts) if one.node == around.node)
        self._others = [one for one in self._begin.hosts if one.node != around.node]
        self._phase: Phase = record.ended or "fetching"
        self._sentence = record.why
        self._term = 0
        self._drives: bytes | None = None
        self._holders: tuple[BlobHolder, ...] = ()
        self._process: DriverProcess | None = None
        self._mirrored: dict[bytes, tuple[float, int]] = {}
        """Other hosts: when each asked last, and from how far in the records it could drive then."""
        self._heard_s = {one.node: around.clock.monotonic() for one in self._others}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._chain, self._read = 0, 0
        """The file of the records, and how far they were looked through, for `_term` and `_updates`."""
        self._updates: dict[bytes, BlobRef] = {}
        """Those that Commits name and that are not here."""
        self._sound = 0
        """So far the records go of which all updates are here."""
        self._failures = self._waits = 0
        self._paid_s = -PAID_EVERY_S
        self._unpaid: tuple[float, HoldRefused] | None = None
        """Since when nothing is set aside for this host any more, and why."""
        self._waits_s: float | None = None
        """Since when it is told to wait."""

    @property
    def ended(self) -> bool:
        return self.record.ended is not None

    def is_missed(self) -> bool:
        """Something was driven, and its owner does not have it yet. Blocks."""
        if self.record.got or not (self.run_folder / CHAIN).exists():
            return False
        with contextlib.suppress(BadRecord):
            return any(envelope.kind == Commit.KIND for _, envelope in records_after(self.run_folder, 0))
        return False

    def may_look(self, peer: bytes) -> bool:
        return peer == self.record.owner or any(one.node == peer for one in self._others)

    def start(self) -> None:
        if not self.ended:
            self._task = asyncio.create_task(self._go_on())

    async def close(self) -> None:
        """The node stops; it goes on when it is started again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def stop(self, why: str) -> None:
        """In order, for good."""
        if self._process is not None:
            await self._process.stop()
        await self.close()
        if not self.ended:
            await self._end("over", why)

    def remove(self) -> None:
        self._around.store.release(self._pin)
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self) -> None:
        """Durably, and for its owner's eyes alone. Raises OSError."""
        scratch = self._folder / "hosting.new"
        scratch.touch(0o600)
        with scratch.open("wb") as file:
            file.write(msgspec.msgpack.encode(self.record))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._folder / "hosting")

    # ---- who looks ----

    async def look(self, message: FolderAsk, peer: bytes) -> FolderGiven:
        """How it stands, and what of the folder `peer` lacks; after some time, where that is nothing."""
        now_s = self._around.clock.monotonic()
        if peer in self._heard_s:
            self._heard_s[peer] = now_s
            if not message.standing_only:
                self._mirrored[peer] = now_s, message.sound_bytes
                self._tell_mirrored()
            if message.term > self._term and self._process is not None:
                await self._process.kill()
        if message.standing_only:
            return self._given()
        news = self._news
        pieces, more = await asyncio.to_thread(missing, self.run_folder, message.files)
        if not pieces and message.wait_ms:
            with contextlib.suppress(TimeoutError):
                await within(self._around.clock, message.wait_ms / 1000, news.wait())
            pieces, more = await asyncio.to_thread(missing, self.run_folder, message.files)
        over = self._phase in ("over", "given up")
        if over and peer == self.record.owner and not pieces and not self.record.got:
            await self._note_down(got=True)
        return msgspec.structs.replace(self._given(), pieces=tuple(pieces), more=more)

    def _given(self) -> FolderGiven:
        return FolderGiven(
            phase=self._phase, sentence=self._sentence, term=self._term, drives=self._drives, holders=self._holders
        )

    def _tell_mirrored(self) -> None:
        """The process that drives waits until those who stand by have what it wrote."""
        if self._process is not None:
            now_s = self._around.clock.monotonic()
            self._process.mirrored(
                {node: far for node, (asked_s, far) in self._mirrored.items() if now_s - asked_s < IN_TOUCH_S}
            )

    def _say(self, phase: Phase, sentence: str = "") -> None:
        if (phase, sentence) != (self._phase, self._sentence):
            _log.warning("job %s: %s%s", self._begin.job.hex()[:12], phase, f": {sentence}" if sentence else "")
        self._phase, self._sentence = phase, sentence[:400]
        self._tell_news()

    def _tell_news(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # ---- its life ----

    async def _go_on(self) -> None:
        try:
            while not self.ended:
                await self._step()
        except (ShoalError, OSError) as error:
            await self._end("given up", str(error))
        except Exception:  # noqa: BLE001 - whatever it is, another host can go on
            _log.exception("job %s", self._begin.job.hex()[:12])
            await self._end("given up", "This host cannot go on; its log says why.")

    async def _end(self, phase: Phase, why: str) -> None:
        await self._note_down(ended=phase, why=why[:400])
        self._paid_s = -PAID_EVERY_S
        await self._look_for_pay()
        self._say(phase, why)
        await self._around.changed()

    async def _note_down(self, **changed: Any) -> None:
        """Where the disk refuses, it holds all the same; the node's next start finds what was written before."""
        self.record = msgspec.structs.replace(self.record, **changed)
        try:
            await asyncio.to_thread(self.write)
        except OSError as error:
            _log.error("job %s: how it stands could not be written down: %s", self._begin.job.hex()[:12], error)

    async def _step(self) -> None:
        await self._look_for_pay()
        if (unpaid := self._why_unpaid()) is not None:
            raise unpaid
        if not (self._folder / "complete").exists():
            await self._fetch()
            return
        await asyncio.to_thread(self._look_through)
        leader = await self._leader()
        if leader is not None:
            await self._follow(leader)
        elif self._is_first():
            await self._drive()
        else:
            self._say("standing by")
            await self._around.clock.sleep(AGAIN_S)

    @property
    def _room(self) -> int:
        return min(ROOM * self.record.size + ROOM_LEAST_BYTES, storage_for_one(self._around.store))

    @property
    def _pin(self) -> str:
        return f"drive-{self._begin.job.hex()}"

    # ---- fetching ----

    async def _fetch(self) -> None:
        """What the owner has made, over the link that it keeps open meanwhile."""
        self._say("fetching")
        copy = await asyncio.to_thread(Copy, self.run_folder, self._room, begun=False)
        until_s = self._around.clock.monotonic() + patience_s(self.record.size, FETCHED_WITHIN_S)
        while self._around.clock.monotonic() < until_s:
            link = self._around.endpoint.links().get(self.record.owner)
            if link is None or link.closed:
                await self._around.clock.sleep(AGAIN_S)
                continue
            try:
                given = await self._take_from(link, copy, 0)
                if given.pieces or given.more:
                    continue
                refs = await asyncio.to_thread(self._verified)
                await self._have(refs, (*given.holders, BlobHolder(link.peer, ())))
            except LinkError as error:
                _log.info("job %s: %s", self._begin.job.hex()[:12], error)
                await self._around.clock.sleep(AGAIN_S)
                continue
            (self._folder / "complete").touch()
            return
        await self._end("given up", "Its owner did not hand it over in time.")

    def _verified(self) -> list[BlobRef]:
        """The blobs that a driver needs, once it is known that the folder is the job's, and that its owner wants this
        node to drive it. Raises ShoalError."""
        with RunFolder.open(self.run_folder, read_only=True) as folder:
            if folder.job.record_id != self._begin.job:
                raise BadHandover("What came is another job than the one that was announced.")
            granted = [grant for envelope, grant in folder.opened(Grant) if envelope.signer == folder.job.signer]
            if not any(self._begin.hosts[self._rank].driver in grant.drivers for grant in granted):
                raise BadHandover("Its owner has not granted this node to drive it.")
            job, payments = folder.train_job(), folder.payments()
        refs = [job.model.start, *(shard.blob for shard in job.data.shards)]
        if sum(ref.size for ref in refs) > self.record.size:
            raise BadHandover("Its owner has announced a smaller job than this one.")
        self._check_pay(payments)
        return refs

    def _check_pay(self, payments: Payments | None) -> None:
        """That whoever drives pays this host, out of the escrow that was named for it. Raises BadHandover."""
        mine, allowance = self._begin.hosts[self._rank], self._begin.allowance
        if mine.payee is None:
            return
        term = payments.terms[-1] if payments is not None and payments.terms else None
        known = term.nodes.get(mine.driver.hex()) if term is not None else None
        if (
            term is None or known is None or allowance is None or term.escrow != allowance.escrow
            or (known.payee, known.micro_per_h) != (mine.payee, mine.micro_per_h)
        ):  # fmt: skip
            raise BadHandover("What its owner has set aside does not pay this node for driving it.")

    async def _have(self, refs: Sequence[BlobRef], holders: Sequence[BlobHolder]) -> None:
        """Raises LinkError, StorageError."""
        await asyncio.gather(*(self._around.fetcher.fetch(ref, holders, owner=self._pin) for ref in refs))

    # ---- standing by ----

    async def _leader(self) -> Host | None:
        """The one that drives in the newest term, or has seen its end; of two in one term the first in order."""
        answers = await asyncio.gather(*(self._standing_of(one) for one in self._others))
        mine = (self._term, -self._rank) if self._process is not None else (self._term, -len(self._begin.hosts))
        found = [
            ((given.term, -self._begin.hosts.index(host)), host)
            for host, given in zip(self._others, answers, strict=True)
            if given is not None and given.phase in ("driving", "over")
        ]
        place, leader = max(found, key=lambda one: one[0], default=(mine, None))
        return leader if place > mine else None

    async def _standing_of(self, host: Host) -> FolderGiven | None:
        term = self._term if self._process is not None else 0
        message = FolderAsk(job=self._begin.job, standing_only=True, term=term)
        try:
            given = await ask(await self._link(host), message, FolderGiven, LOOK_DEADLINE_S)
        except ShoalError:
            return None
        if given.phase != "given up":
            self._heard_s[host.node] = self._around.clock.monotonic()
        return given

    def _is_first(self) -> bool:
        """Whether all hosts before this one are gone."""
        now_s = self._around.clock.monotonic()
        return all(
            now_s - self._heard_s[one.node] >= (self._rank - at) * SILENCE_S
            for at, one in enumerate(self._begin.hosts[: self._rank])
        )

    async def _follow(self, host: Host) -> None:
        """Keep a copy of what a host writes, until it is gone or drives no longer."""
        self._say("standing by", f"{host.name} drives.")
        copy = await asyncio.to_thread(Copy, self.run_folder, self._room, begun=True)
        while True:
            try:
                given = await self._take_from(await self._link(host), copy, WAIT_MS)
            except LinkError:
                if self._around.clock.monotonic() - self._heard_s[host.node] >= SILENCE_S:
                    return
                await self._around.clock.sleep(AGAIN_S)
                continue
            self._heard_s[host.node] = self._around.clock.monotonic()
            self._drives, self._holders = given.drives, given.holders
            await asyncio.to_thread(self._look_through)
            self._term = max(self._term, given.term)
            with contextlib.suppress(TimeoutError):
                await within(self._around.clock, UPDATES_WITHIN_S, self._fetch_updates())
            await self._look_for_pay()
            if given.phase not in ("driving", "over") or self._why_unpaid() is not None:
                return
            if given.phase == "over" and not given.pieces and not given.more:
                await self._end("over", given.sentence)
                return
            self._tell_news()

    async def _take_from(self, link: Link, copy: Copy, wait_ms: int) -> FolderGiven:
        """Ask for what is missing, and take it in. Raises LinkError, OSError."""
        message = FolderAsk(job=self._begin.job, files=copy.there, wait_ms=wait_ms, sound_bytes=self._sound)
        given = await ask(link, message, FolderGiven, ASK_DEADLINE_S + wait_ms / 1000)
        if given.more and not given.pieces:
            await self._around.clock.sleep(AGAIN_S)  # nobody says so who means well
        try:
            await asyncio.to_thread(copy.take, given.pieces)
        except BadCopy as error:  # it was written anew meanwhile, or the sender is not to be believed
            _log.info("job %s: %s", self._begin.job.hex()[:12], error)
            await self._around.clock.sleep(AGAIN_S)
        return given

    async def _link(self, host: Host) -> Link:
        """Raises LinkError."""
        around = self._around
        return await reach_again(
            host.node, host.addresses, endpoint=around.endpoint, directory=around.directory, clock=around.clock,
            dial_deadline_s=REACH_DEADLINE_S,
        )  # fmt: skip

    def _look_through(self) -> None:
        """The records that have come since: in which term they are, and the updates that a driver needs. What they say
        is verified by whoever drives from them."""
        if not (self.run_folder / CHAIN).exists():
            return
        now = (self.run_folder / CHAIN).stat()
        if now.st_ino != self._chain or now.st_size < self._read:  # copied anew, as its end had become another one
            self._chain, self._read, self._sound = now.st_ino, 0, 0
        for end, envelope in records_after(self.run_folder, self._read):
            self._read = end
            with contextlib.suppress(BadRecord):
                if envelope.kind == Term.KIND:
                    self._term = max(self._term, open_record(envelope, Term, self._around.network).number)
                elif envelope.kind == Commit.KIND:
                    commit = open_record(envelope, Commit, self._around.network)
                    self._updates |= {one.update.hash: one.update for one in commit.accepted}

    async def _fetch_updates(self) -> None:
        """What does not come now is tried again with the next ones."""
        read, refs = self._read, list(self._updates.values())
        for some in (refs[at : at + FETCHED_AT_ONCE] for at in range(0, len(refs), FETCHED_AT_ONCE)):
            try:
                await self._have(some, self._holders)
            except ShoalError as error:
                _log.info("job %s: an update did not come: %s", self._begin.job.hex()[:12], error)
                return
            for ref in some:
                self._updates.pop(ref.hash, None)
        self._sound = read

    async def _look_for_pay(self) -> None:
        """Vouchers for driving stand in the folder: nobody has to send them."""
        now_s = self._around.clock.monotonic()
        if self._begin.hosts[self._rank].payee is None or now_s - self._paid_s < PAID_EVERY_S:
            return
        self._paid_s = now_s
        try:
            await self._around.paid(self._begin, await asyncio.to_thread(self._newest_voucher))
            self._unpaid = None
        except HoldRefused as error:
            since_s = now_s if self._unpaid is None else self._unpaid[0]
            self._unpaid = since_s, error
        except (OSError, msgspec.DecodeError, ShoalError) as error:
            _log.warning("job %s: no pay for driving it: %s", self._begin.job.hex()[:12], error)

    def _newest_voucher(self) -> SignedVoucher | None:
        """That the copy has for this host. Raises OSError, DecodeError."""
        driver, disk = self._begin.hosts[self._rank].driver.hex(), DirectoryDisk(self.run_folder)
        if disk.info(PAYMENTS) is None:
            return None
        payments = msgspec.json.decode(disk.read(PAYMENTS, 0, FILE_MAX_BYTES), type=Payments)
        mine = payments.terms[-1].nodes.get(driver) if payments.terms else None
        return mine.voucher if mine is not None else None

    def _why_unpaid(self) -> HoldRefused | None:
        """Why nothing is set aside for this host any more, where that is so for long."""
        if self._unpaid is None or self._around.clock.monotonic() - self._unpaid[0] < UNPAID_S:
            return None
        return self._unpaid[1]

    # ---- driving ----

    async def _drive(self) -> None:
        self._say("standing by", "It begins to drive.")
        with contextlib.suppress(TimeoutError):
            await within(self._around.clock, UPDATES_WITHIN_S, self._fetch_updates())
        await asyncio.to_thread(self._lend_blobs)
        now_s = self._around.clock.monotonic()
        orders = DriverOrders(
            begin=self._begin, node=self._around.node, listen=self._around.listen, network=self._around.network,
            storage_bytes=self._around.store.capacity_bytes,
            gone=tuple(node for node, heard_s in self._heard_s.items() if now_s - heard_s >= SILENCE_S),
            alone=self._waits_s is not None and now_s - self._waits_s >= ALONE_S,
        )  # fmt: skip
        process = await DriverProcess.start(
            self._around.settings.command, self.run_folder, orders, self._folder / "driver.log"
        )
        self._process, last, ended = process, Failed("SH-000", "The process that drives has died."), None
        rivals = asyncio.create_task(self._look_for_rivals(process))
        try:
            async for word in process.words():
                match word:
                    case Began():
                        self._term, self._drives = word.term, self._around.node
                        self._say("driving")
                        self._tell_mirrored()
                    case Committed():
                        self._failures = self._waits = 0
                        self._waits_s = None
                        self._holders = word.holders
                        self._tell_mirrored()
                        self._tell_news()
                        await self._look_for_pay()
                    case Ended():
                        ended = word
                    case Failed():
                        last = word
        finally:
            rivals.cancel()
            self._process = None
            await process.kill()
            try:
                await asyncio.to_thread(self._keep_blobs)
            except (ShoalError, OSError) as error:  # which undoes nothing that was driven
                _log.warning("job %s: its updates are not all kept: %s", self._begin.job.hex()[:12], error)
        if ended is not None:
            await self._end("over", ended.sentence)
        else:
            await self._failed(last)

    async def _failed(self, last: Failed) -> None:
        """Driving has ended before the job has: another host drives, or it is tried again."""
        if last.code in LATER and self._waits < WAITS_MAX:
            self._waits += 1
            self._waits_s = self._waits_s or self._around.clock.monotonic()
        else:
            self._failures += 1
        if self._failures >= FAILURES_MAX:
            await self._end("given up", last.sentence)
            return
        self._say("standing by", last.sentence)
        await self._around.clock.sleep(AGAIN_S * (1 + self._failures))

    def _lend_blobs(self) -> None:
        """The process that drives has a store of its own, in the run folder; on one disk nothing is there twice."""
        mine = self._around.store
        with contextlib.closing(BlobStore(self.run_folder / "blobs", mine.capacity_bytes, self._around.clock)) as store:
            for name in filter(mine.has, mine.pins(self._pin)):  # an update that did not come is pinned all the same
                if not store.has(name):
                    store.adopt(mine.path(name))
                store.pin("run", name)

    def _keep_blobs(self) -> None:
        """What the process has fetched is kept for the next host, and for the owner."""
        mine, path = self._around.store, self.run_folder / "blobs"
        with contextlib.closing(BlobStore(path, mine.capacity_bytes, self._around.clock)) as store:
            for name in store.pins("run"):
                if not mine.has(name):
                    mine.adopt(store.path(name))
                mine.pin(self._pin, name)

    async def _look_for_rivals(self, process: DriverProcess) -> None:
        """Where another host drives in a newer term, this one has been silent for too long: its members are gone. And
        who is not paid any more drives no longer."""
        while True:
            await self._around.clock.sleep(RIVALS_EVERY_S)
            await self._look_for_pay()
            if self._why_unpaid() is not None:
                await process.kill()
                return
            leader = await self._leader()
            if leader is not None:
                _log.warning("job %s: %s drives now", self._begin.job.hex()[:12], leader.name)
                await process.kill()
                return
