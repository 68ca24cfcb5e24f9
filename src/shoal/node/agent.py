"""The node agent: holds links, serves blobs, offers what it measured, and runs members and stages for who asks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import msgspec

from shoal.devices import measure_in_child
from shoal.errors import BadInput, JobError, LinkError, StorageError
from shoal.hub import HubClient, NoHub
from shoal.identity import Envelope, KeyPair
from shoal.market.holds import Terms
from shoal.node.engine import EngineHost
from shoal.node.hosted_job import Around, HostSettings
from shoal.node.hosting import CannotHost, Hosting
from shoal.node.hours import Hours
from shoal.node.member import (
    PIN_PREFIX,
    PRIVATE_MEDIA_TYPE,
    EngineSettings,
    Invitation,
    MemberRun,
    NotAMember,
)
from shoal.node.openai_server import ServerSettings
from shoal.node.sales import Sales, Service
from shoal.node.stages import StageHost
from shoal.node.surveying import Prober, Surveyor
from shoal.protocol.driving import DriveBegin
from shoal.protocol.messages import DEFAULT_NETWORK, decode, encode, sign
from shoal.protocol.money import SignedVoucher
from shoal.protocol.offers import Capability, Device, Done, EngineOffer, NetworkCoordinate, Offer, Place
from shoal.protocol.prices import Price
from shoal.protocol.serving import LinkEcho
from shoal.protocol.training import (
    Head,
    HeadAsk,
    JobEnd,
    MemberAnswer,
    MemberInvite,
    OpenPrivate,
    PrivateOpened,
    Turn,
)
from shoal.storage import BlobStore, Fetcher, serve
from shoal.transport import DuplicateKey
from shoal.world import Clock, Dice, DirectoryDisk, Endpoint, Ledger, Request, within
from shoal.world.reach import echo

MEMBERS_MAX = 4
"""Jobs a node works for at the same time."""
ENDED_MAX = 64
"""Ended jobs whose private states are still opened for replays."""
PINNED_SHARE = 0.5
"""Ended jobs are forgotten, the oldest first, while more than this share of the storage is pinned."""
LEAVE_S = 8.0
"""How long a stopping node gives its members to say so."""
OFFER_LIFETIME_MS = 30_000
"""So long a node that was killed stays listed, as busy as it was. It renews its offer three times in that time."""
OFFER_LOOK_S = 0.5
"""So often a node looks whether its offer still says what is, and so long at least it waits between two of them: hubs
take no more."""
HEAD_DEADLINE_S = 8.0
NOTICE_OVER = "Its owner took it back when the notice was over."
INVITED_ANEW = "It was invited anew."
"""The reason with which a membership ends that another one of the same job follows at once."""

_Said: TypeAlias = tuple[bool, EngineOffer | None, NetworkCoordinate | None, bool]
"""What of an offer changes while the node runs: busy, its engine, where it is, whether it would drive a job."""

_log = logging.getLogger("shoal.node")


class NotOpened(StorageError):
    """A private state was asked for that this node does not keep, or not any more."""

    code = "SH-430"


class DeviceMissing(BadInput):
    """The device that a node shall compute on is not among those that were measured."""

    code = "SH-148"


class NodeUnable(JobError):
    """A node cannot begin to work: it is stopping, or its disk refuses."""

    code = "SH-605"


class NodeBusy(JobError):
    """A node works for as many jobs as it can."""

    code = "SH-604"


@dataclass(frozen=True)
class Sale:
    """That a node works for money, and where it gets it."""

    price: Price
    ledger: Ledger
    payee: bytes
    """The account."""
    reclaim_notice_ms: int = 0
    """What clients are given when the owner wants the machine back."""
    serves_free: bool = False
    """Serving costs nothing all the same."""


@dataclass(frozen=True)
class NodeSettings:
    """What the owner of a node decided."""

    name: str
    folder: Path
    engine: EngineSettings = field(default_factory=EngineSettings)
    listen: str | None = "tcp://127.0.0.1:0"
    """Where to accept links; none for a node that only opens links of its own."""
    memory_bytes: int | None = None
    """Of a device, that its offer says at most; none: all that there is."""
    members_max: int = 1
    accepts: tuple[str, ...] = ("train", "serve")
    """The kinds of jobs it takes, as its offer says."""
    sale: Sale | None = None
    """None: it works for nothing."""
    place: Place | None = None
    server: ServerSettings | None = None
    """A server beside it that serves a whole model, which it offers, too."""
    driving: HostSettings | None = None
    """None: it drives no jobs for others."""
    network: str = DEFAULT_NETWORK


def best_device(capability: Capability) -> str:
    """The torch device of the fastest in float32, the arithmetic that every job can use."""

    def rate(device: Device) -> float:
        return max((each.flops for each in device.throughput if each.dtype == "float32"), default=0.0)

    kinds = [_torch_kind(device) for device in capability.devices]
    at = max(range(len(kinds)), key=lambda index: rate(capability.devices[index]))
    return kinds[at] if kinds[at] in ("cpu", "mps") else f"{kinds[at]}:{kinds[:at].count(kinds[at])}"


def _limited(capability: Capability, memory_bytes: int) -> Capability:
    devices = tuple(
        msgspec.structs.replace(device, memory_bytes=min(device.memory_bytes, memory_bytes))
        for device in capability.devices
    )
    return msgspec.structs.replace(capability, devices=devices)


def computing_first(capability: Capability, name: str) -> Capability:
    """The device that the node computes on, as torch names it, before the others: its memory is what is lent."""
    kind, _, index = name.partition(":")
    mine = [device for device in capability.devices if _torch_kind(device) == kind][int(index or 0)]
    others = (device for device in capability.devices if device is not mine)
    return msgspec.structs.replace(capability, devices=(mine, *others))


def _torch_kind(device: Device) -> str:
    """Torch speaks of ROCm devices as cuda."""
    return "cuda" if device.kind == "rocm" else device.kind


def check_device(name: str, capability: Capability) -> None:
    """Raises DeviceMissing unless `name`, as torch writes it (`cuda:1`), is among what was measured."""
    kind, _, index = name.partition(":")
    known = [_torch_kind(device) for device in capability.devices]
    if kind not in known or (index and not (index.isdecimal() and int(index) < known.count(kind))):
        there = ", ".join(f"{one}:{known[:at].count(one)}" for at, one in enumerate(known))
        raise DeviceMissing(f"This machine has no device {name!r} that works; it has {there}.")


def _beside(listen: str | None) -> str | None:
    """Where a process beside the node accepts links, at a port of its own."""
    return f"{listen.rpartition(':')[0]}:0" if listen is not None else None


class NodeAgent:
    """One node. `run` goes on until it is cancelled."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        key: KeyPair,
        endpoint: Endpoint,
        hubs: HubClient,
        store: BlobStore,
        clock: Clock,
        dice: Dice,
        make_member: Callable[..., MemberRun] = MemberRun,
        measure: Callable[..., Awaitable[Capability]] = measure_in_child,
    ) -> None:
        self.settings = settings
        self.capability: Capability | None = None
        self._key = key
        self._endpoint = endpoint
        self._hubs = hubs
        self._store = store
        self._fetcher = Fetcher(endpoint, store, clock, dice)
        self._clock = clock
        self._dice = dice
        self._make_member = make_member
        self._measure = measure
        self._members: dict[bytes, MemberRun] = {}
        self._tasks: dict[bytes, asyncio.Task[None]] = {}
        self._ended: dict[str, None] = {}
        """Pins of ended jobs, the oldest first."""
        self._heads: dict[bytes, tuple[tuple[bytes, ...], Envelope]] = {}
        """Ended jobs, the oldest first: who may drive, and the newest Commit that was applied here."""
        self._inviting = asyncio.Lock()
        self._closing = False
        self._leaves_s: float | None = None
        """When its owner takes it back, once clients are given notice."""
        self._stages: StageHost | None = None
        self._engine: EngineHost | None = None
        self._publishing = asyncio.Lock()
        self._sequence = 0
        self._news = asyncio.Event()
        """Something changed that the offer may say."""
        self._telling: asyncio.Task[None] | None = None
        self._said: _Said | None = None
        self._sales: Sales | None = None
        self._hosting: Hosting | None = None
        self._surveyor = Surveyor(endpoint, hubs, clock, dice, self._changed)
        self._surveying: asyncio.Task[None] | None = None

    @property
    def engine(self) -> str | None:
        """The server beside this node, as far as it is up."""
        offer = self._engine.offer if self._engine else None
        if offer is None:
            return None
        form = "token ids" if offer.takes_tokens else "text"
        return f"{offer.model}, {offer.token_ms:.1f} ms a token, prompts as {form}"

    @property
    def hubs_up(self) -> int:
        """Hubs that answer, and so have its offer."""
        return sum(state.up for state in self._hubs.states())

    # ---- life ----

    async def start(self) -> None:
        """Measure, accept links, and publish the offer. Raises DuplicateKey where another node runs with this key,
        ServerUnusable where the server beside it does not serve."""
        if self.settings.server is not None:
            self._engine = EngineHost(
                self.settings.server,
                key=self._key,
                name=self.settings.name,
                endpoint=self._endpoint,
                clock=self._clock,
                changed=self._changed,
                service_for=self._service_for if self._serves_for_money else None,
                network=self.settings.network,
            )
            await self._engine.start()
        self.capability = await self._measure(
            speed_limit=self.settings.engine.speed_limit,
            threads=self.settings.engine.threads,
            folder=self.settings.folder,
        )
        if self.settings.memory_bytes is not None:
            self.capability = _limited(self.capability, self.settings.memory_bytes)
        if self.settings.engine.device == "auto":
            engine = dataclasses.replace(self.settings.engine, device=best_device(self.capability))
            self.settings = dataclasses.replace(self.settings, engine=engine)
        else:
            check_device(self.settings.engine.device, self.capability)
        self.capability = computing_first(self.capability, self.settings.engine.device)
        for holding in self._store.holdings():
            self._ended |= {owner: None for owner in holding.owners if owner.startswith(PIN_PREFIX)}
        self._forget_ended()
        serve(self._endpoint, self._store)
        Prober(self._endpoint, self._clock)
        if self.settings.sale is not None:
            self._sales = self._start_selling(self.settings.sale)
        for kind, handler in (
            (MemberInvite, self._invited),
            (Turn, self._turn),
            (HeadAsk, self._head),
            (OpenPrivate, self._open_private),
            (JobEnd, self._job_end),
            (LinkEcho, echo),
        ):
            self._endpoint.handle(kind.KIND, handler)
        if "serve" in self._accepts():
            self._stages = StageHost(
                key=self._key,
                name=self.settings.name,
                endpoint=self._endpoint,
                store=self._store,
                fetcher=self._fetcher,
                clock=self._clock,
                settings=self.settings.engine,
                memory_bytes=self.capability.devices[0].memory_bytes,
                network=self.settings.network,
                admit=lambda known, held: self._refuse_when_stopping() if known else self._admit(held=held),
                service_for=self._service_for if self._serves_for_money else None,
                changed=self._changed,
            )
        self._hubs.answer_introductions()
        if self.settings.listen is not None:
            await self._endpoint.listen(self.settings.listen)
        await self._hubs.start()
        self._refuse_twin()
        if self.settings.driving is not None:
            self._hosting = self._start_hosting(self.settings.driving)
        await self._measure_hub_link()
        await self._publish()
        self._surveying = asyncio.create_task(self._surveyor.run())
        self._telling = asyncio.create_task(self._tell_hubs())

    def _start_selling(self, sale: Sale) -> Sales:
        terms = Terms(
            price=sale.price, ledger=sale.ledger.name, payee=sale.payee, slots=self.settings.members_max,
            works=("train", "serve") if self._serves_for_money else ("train",),
            reclaim_notice_ms=sale.reclaim_notice_ms,
        )  # fmt: skip
        sales = Sales(
            terms,
            key=self._key,
            name=self.settings.name,
            disk=DirectoryDisk(self.settings.folder / "sales"),
            endpoint=self._endpoint,
            ledger=sale.ledger,
            clock=self._clock,
            unheld=lambda: len(self._unheld()),
            changed=self._changed,
            network=self.settings.network,
        )
        Hours(
            sales, key=self._key, endpoint=self._endpoint, ledger=sale.ledger, clock=self._clock,
            network=self.settings.network,
        )  # fmt: skip
        return sales

    def _service_for(self, gateway: bytes) -> Service:
        """Raises NotHeld."""
        assert self._sales is not None, "links are accepted once it sells"
        return self._sales.service_for(gateway)

    @property
    def _serves_for_money(self) -> bool:
        sale = self.settings.sale
        return sale is not None and not sale.serves_free

    def _start_hosting(self, settings: HostSettings) -> Hosting:
        async def paid(begin: DriveBegin, newest: SignedVoucher | None) -> None:
            if self._sales is None or begin.allowance is None:
                raise CannotHost(f"Node {self.settings.name} drives no job for nothing; set money aside for it.")
            await self._sales.paid_for_driving(begin.allowance, newest)

        around = Around(
            self._key.node_id, self._endpoint, self._hubs, self._store, self._fetcher, self._clock, settings,
            _beside(self.settings.listen), self.settings.network, self._changed, paid,
        )  # fmt: skip
        payee = self.settings.sale.payee if self.settings.sale else None
        folder = self.settings.folder / "hosted"
        hosting = Hosting(around, folder=folder, name=self.settings.name, payee=payee)
        hosting.start()
        return hosting

    def _refuse_twin(self) -> None:
        states = self._hubs.states()
        if any(state.up for state in states):
            return
        for state in states:
            if DuplicateKey.code in state.trouble:  # the hub asked the other one, and it answered
                raise DuplicateKey(
                    f"Another running node has the key in {self.settings.folder}. Stop it, or give this node a folder "
                    f"(--data) with a key file of its own: a node is its key. ({state.trouble})"
                )

    async def give_notice(self) -> float | None:
        """The owner wants the machine back: the node takes nothing new, and whoever has paid for a place hears until
        when it is kept. Gives the seconds; None where nobody has, and the node may stop at once."""
        notice_s = await self._sales.give_notice() if self._sales is not None else None
        if notice_s is not None:
            self._leaves_s = self._clock.monotonic() + notice_s
        return notice_s

    async def vacated(self) -> None:
        """Returns when all who were given notice have left, or when it is over."""
        assert self._leaves_s is not None and self._sales is not None, "notice was given"
        while self._sales.taken and self._clock.monotonic() < self._leaves_s:
            await self._clock.sleep(OFFER_LOOK_S)

    async def close(self) -> None:
        """Leave all jobs, saying so, and stop."""
        self._closing = True
        over = self._leaves_s is not None and self._clock.monotonic() >= self._leaves_s
        for task in (self._telling, self._surveying):
            if task is not None:
                task.cancel()
        for member in list(self._members.values()):
            member.end(NOTICE_OVER if over else "The node is stopping.", tell=True)
        tasks = list(self._tasks.values())
        beside = (self._stages, self._engine, self._hosting)
        serving = [asyncio.create_task(each.close()) for each in beside if each is not None]
        if tasks:
            _, slow = await asyncio.wait(tasks, timeout=LEAVE_S)
            for task in slow:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*serving)
        if self._sales is not None:
            await self._sales.close()
        await self._hubs.close()
        await self._endpoint.close()
        self._store.close()

    async def _measure_hub_link(self) -> None:
        assert self.capability is not None
        try:
            measured = (await self._hubs.measure_links()).values()
        except NoHub:
            return  # whoever publishes next says so
        nearest = min(measured, key=lambda link: link.round_trip_ms)
        self.capability = msgspec.structs.replace(
            self.capability, hub_round_trip_ms=nearest.round_trip_ms, hub_rate_bps=nearest.rate_bps
        )

    async def _publish(self) -> None:
        """Say what this node is and whether it is free. Hubs that are away get it when they are back."""
        assert self.capability is not None
        async with self._publishing:
            now, sale = self._clock.now_ms(), self.settings.sale
            self._said = busy, engine, coordinate, drives = self._to_say()
            self._sequence = max(self._sequence + 1, now)
            offer = Offer(
                name=self.settings.name,
                sequence=self._sequence,
                issued_ms=now,
                lifetime_ms=OFFER_LIFETIME_MS,
                addresses=tuple(self._endpoint.addresses),
                capability=self.capability,
                accepts=(*self._accepts(), *(("drive",) if drives else ())),
                busy=busy,
                engine=engine,
                place=self.settings.place,
                coordinate=coordinate,
                price=sale.price if sale else None,
                ledger=sale.ledger.name if sale else None,
                slots=self.settings.members_max,
                serves_free=sale.serves_free if sale else False,
                driving_micro_per_h=self.settings.driving.micro_per_h if drives and self.settings.driving else None,
                reclaim_notice_ms=sale.reclaim_notice_ms if sale else 0,
            )
            try:
                await self._hubs.publish(sign(self._key, offer, self.settings.network))
            except LinkError as error:
                _log.warning("%s: the offer was not taken: %s", self.settings.name, error)

    def _to_say(self) -> _Said:
        """What of the offer changes while the node runs."""
        taken = len(self._unheld()) + (self._sales.held if self._sales else 0)
        engine, at = self._engine.offer if self._engine else None, self._surveyor.said
        leaves, hosting = self._leaves_s is not None, self._hosting
        drives = hosting is not None and hosting.places > 0 and not leaves
        return leaves or taken >= self.settings.members_max, engine, at.told() if at else None, drives

    async def _tell_hubs(self) -> None:
        """Whoever asks something of this node does not wait until hubs have heard what changed by it. Some of it nobody
        says, such as that a slot was held and is not any more: that is looked for."""
        while True:
            with contextlib.suppress(TimeoutError):
                await within(self._clock, OFFER_LOOK_S, self._news.wait())
            self._news.clear()
            if self._said != self._to_say():
                await self._publish()
                await self._clock.sleep(OFFER_LOOK_S)

    def _accepts(self) -> tuple[str, ...]:
        server, kinds = self.settings.server, self.settings.accepts
        return kinds if server is None else ("engine",) if server.alone else (*kinds, "engine")

    # ---- what drivers ask ----

    async def _invited(self, request: Request) -> bytes:
        message = decode(MemberInvite, request.body, request.version)
        async with self._inviting:
            member = await self._join(Invitation.open(message, request.peer, self.settings.network))
        return encode(MemberAnswer(member=member.record.to_bytes()), request.version)

    async def _join(self, invitation: Invitation) -> MemberRun:
        """A new member, whose work has begun. One of the same job makes way for it, once the new one is known to be
        invited rightly."""
        self._refuse_when_stopping()
        scratch = self.settings.folder / "work" / invitation.job_id.hex()[:16]
        member = self._make_member(
            invitation,
            key=self._key,
            name=self.settings.name,
            endpoint=self._endpoint,
            store=self._store,
            fetcher=self._fetcher,
            clock=self._clock,
            dice=self._dice,
            scratch=scratch,
            settings=self.settings.engine,
            work=self._sales.work_for(self._client(invitation.driver)) if self._sales else None,
            network=self.settings.network,
        )
        known = self._members.get(invitation.job_id)
        if known is not None and (
            known.term > member.term or (known.term == member.term and known.driver != member.driver)
        ):
            raise NotAMember(
                f"Node {self.settings.name} is a member of job {known.job.name!r} in term {known.term} of its driver; "
                f"the invitation is of term {member.term}."
            )
        if self._sales is not None:
            self._refuse_second_job(self._client(invitation.driver), known)
        self._admit(known, held=self._sales is not None)
        if known is not None:
            known.end("It was invited anew.", tell=False)
            await asyncio.wait({self._tasks[invitation.job_id]})
        self._ended.pop(member.pin, None)
        self._forget_ended()
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        except OSError as error:
            raise NodeUnable(f"Node {self.settings.name} cannot use its folder: {error.strerror}.") from error
        self._members[member.job_id] = member
        self._tasks[member.job_id] = asyncio.create_task(self._run_member(member, scratch))
        return member

    def _refuse_second_job(self, client: bytes, known: MemberRun | None) -> None:
        """Whoever has paid for one slot has one job done. Raises NodeBusy."""
        others = (one for one in self._members.values() if one is not known)
        other = next((one for one in others if self._client(one.driver) == client), None)
        if other is not None:
            raise NodeBusy(
                f"Node {self.settings.name} keeps a slot for this driver, and works for its job {other.job.name!r} in "
                "it: another job needs a driver with a key and a slot of its own."
            )

    def _client(self, driver: bytes) -> bytes:
        """For whom a driver keeps its place here."""
        return self._sales.client_of(driver) if self._sales is not None else driver

    def _jobs(self, without: MemberRun | None = None) -> list[str]:
        """What this node works for."""
        members = [repr(one.job.name) for one in self._members.values() if one is not without]
        return members + (self._stages.names() if self._stages else [])

    def _unheld(self) -> list[str]:
        """Of what this node works for, that for which nobody holds a slot."""
        clients = [self._client(one.driver) for one in self._members.values()]
        clients += self._stages.gateways() if self._stages else []
        held = [one for one in clients if self._sales is not None and self._sales.keeps_for(one)]
        return self._jobs()[len(held) :]

    def _admit(self, without: MemberRun | None = None, *, held: bool = False) -> None:
        """Raises NodeUnable, NodeBusy; `without` makes way, and whoever has a slot `held` may take it."""
        self._refuse_when_stopping()
        if self._leaves_s is not None:
            raise NodeUnable(f"Node {self.settings.name} takes nothing new: its owner takes it back soon.")
        if self.settings.server is not None and self.settings.server.alone:
            raise NodeUnable(f"Node {self.settings.name} takes no jobs: it has an engine for whole replicas alone.")
        jobs = self._jobs(without)
        if len(jobs) >= self.settings.members_max:
            raise NodeBusy(f"Node {self.settings.name} is busy with {', '.join(jobs)}; try again when that has ended.")
        if not held and self._sales is not None and len(jobs) + self._sales.held >= self.settings.members_max:
            raise NodeBusy(f"Node {self.settings.name} keeps its slots for clients that hold them; try again later.")

    def _refuse_when_stopping(self) -> None:
        if self._closing:
            raise NodeUnable(f"Node {self.settings.name} is stopping.")

    async def _changed(self) -> None:
        self._news.set()

    async def _run_member(self, member: MemberRun, scratch: Path) -> None:
        try:
            await self._changed()
            reason = await member.run()
            _log.warning("%s: job %r ended here: %s", self.settings.name, member.job.name, reason)
        finally:
            del self._members[member.job_id], self._tasks[member.job_id]
            member.settle()
            self._remember_head(member)
            shutil.rmtree(scratch, ignore_errors=True)
            if self._store.pins(member.pin):  # else it never worked, and takes no place from those that did
                self._ended[member.pin] = None
            self._forget_ended()
            await self._changed()

    def _remember_head(self, member: MemberRun) -> None:
        """So that a driver that goes on with an older copy of the job's folder hears of it."""
        if member.head is not None:
            self._heads.pop(member.job_id, None)
            self._heads[member.job_id] = (member.drivers, member.head)
        while len(self._heads) > ENDED_MAX:
            del self._heads[next(iter(self._heads))]

    def _forget_ended(self) -> None:
        """Let go of what ended jobs keep for replays, where they are too many or take too much."""
        while self._ended and (
            len(self._ended) > ENDED_MAX
            or sum(one.size for one in self._store.holdings() if one.owners) > PINNED_SHARE * self._store.capacity_bytes
        ):
            oldest = next(iter(self._ended))
            del self._ended[oldest]
            self._store.release(oldest)

    async def _turn(self, request: Request) -> bytes:
        message = decode(Turn, request.body, request.version)
        self._member(message.job).turn(message, request.peer)
        return encode(Done(), request.version)

    async def _head(self, request: Request) -> bytes:
        message = decode(HeadAsk, request.body, request.version)
        drivers, head = self._heads.get(message.job, ((), None))
        if message.job not in self._members and request.peer in drivers and head is not None:
            return encode(Head(commit=head.to_bytes()), request.version)
        commit = await self._member(message.job).newest_commit(request.peer, message.term, HEAD_DEADLINE_S)
        return encode(Head(commit=commit.to_bytes() if commit else None), request.version)

    async def _open_private(self, request: Request) -> bytes:
        """A private state is a blob under the hash that its Contribution committed to, so this outlives a restart."""
        message = decode(OpenPrivate, request.body, request.version)
        try:
            ref = self._store.ref(message.private, PRIVATE_MEDIA_TYPE)
        except StorageError as error:
            raise NotOpened(
                f"Node {self.settings.name} does not keep the private state {message.private.hex()[:12]}: members keep "
                "one after some of their contributions, for a number of rounds, as the job says."
            ) from error
        return encode(PrivateOpened(blob=ref), request.version)

    async def _job_end(self, request: Request) -> bytes:
        message = decode(JobEnd, request.body, request.version)
        member = self._member(message.job)
        if request.peer != member.driver:
            raise NotAMember(f"Only the driver of job {member.job.name!r} may end it.")
        member.end(message.reason, tell=False)
        return encode(Done(), request.version)

    def _member(self, job: bytes) -> MemberRun:
        member = self._members.get(job)
        if member is None:
            raise NotAMember(f"Node {self.settings.name} is no member of job {job.hex()[:12]}; invite it first.")
        return member
