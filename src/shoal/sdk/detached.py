"""Jobs that nodes drive while their owner is away: handed over, looked at, taken back.

The owner prepares a run folder as ever, and hands it to hosts: each copies it, the first of them drives, and the next
takes over where that one is gone. Looking at the job means that the owner's folder follows theirs; at the end it is the
same as if the job had been driven here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from shoal.driver.folder import saying_room
from shoal.driver.gang import LinkedNode, link_to
from shoal.driver.mirror import missing, size_of
from shoal.errors import JobError, ShoalError
from shoal.identity import KeyPair, blake3_hash, load_or_create_key, short_id
from shoal.identity.accounts import AccountKey
from shoal.node.hosted_job import FETCHED_WITHIN_S
from shoal.protocol.driving import (
    HOSTS_MAX,
    Allowance,
    DriveAsk,
    DriveBegin,
    DriveGiven,
    DriveStop,
    FolderAsk,
    FolderGiven,
    Host,
)
from shoal.protocol.messages import Message, decode, encode, sign
from shoal.protocol.offers import Done, Offer, OfferFind
from shoal.protocol.training import Grant
from shoal.purse.bills import FILE, PaidNode
from shoal.purse.purse import Funds, Purse
from shoal.quantities.money import format_money
from shoal.sdk.handed import FILE as HANDED
from shoal.sdk.handed import Handed
from shoal.sdk.jobfile import JobFile
from shoal.sdk.notes import TOKENIZER
from shoal.sdk.spending import Spending
from shoal.sdk.train import DRIVER_KEY, GRANT_MS, Session, TrainOptions, new_folder, refuse_script
from shoal.storage import patience_s
from shoal.world import Clock, Endpoint, Link, Request, asking
from shoal.world.directory import Directory, FoundOffer
from shoal.world.reach import reach_again

M = TypeVar("M", bound=Message)
HOSTS_WANTED = 2
"""One that drives, and one that takes over."""
ASK_DEADLINE_S = 10.0
DEADLINE_S = 60.0
LOOK_EVERY_S = 0.5
BEGINS_WITHIN_S = 180.0
TROUBLES_SHOWN = 8


class NoHost(JobError):
    """No node would drive a job, or none that was asked to does."""

    code = "SH-636"


class Surroundings(Protocol):
    """What hosts are reached with."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def hubs(self) -> Directory: ...
    @property
    def clock(self) -> Clock: ...


@dataclass(frozen=True)
class Standing:
    """How a host says that a job stands with it."""

    host: str
    phase: str
    sentence: str


# --- handing over ---------------------------------------------------------------------------------------------------


async def detach(
    job_file: JobFile, yaml: bytes, options: TrainOptions, watch: Callable[[Sequence[Standing]], None] = lambda _: None
) -> Handed:
    """Prepare a job, and have nodes drive it: returns when one of them does, and the others have all that they need to
    take over. Raises ShoalError where it cannot begin; nothing is set aside then, and nobody drives."""
    refuse_script(job_file)
    with new_folder(options) as folder, saying_room(folder.path):
        async with Session(folder, options, load_or_create_key(folder.path / DRIVER_KEY), job_file) as session:
            if session.treasurer is not None:
                await session.treasurer.check()
            prepared, gang, length = await session.plan()
            tokenizer = await asyncio.to_thread(_pack_tokenizer, prepared.tokenizer, folder.path)
            blobs = [prepared.model.start, *(shard.blob for shard in prepared.data.shards)]
            size = size_of(folder.path) + sum(ref.size for ref in blobs)
            hosts = await _find_hosts(session, job_file.name, size)
            job = session.sign_job(prepared, length, gang)
            seen = options.acquaintances.scores() if options.acquaintances is not None else {}
            session.keep_for_later(prepared, length, gang, tokenizer=tokenizer, seen=seen)
            drivers = (*(host.driver for host in hosts), session.key.node_id, options.key.node_id)
            until_ms = options.clock.now_ms() + GRANT_MS
            grant = Grant(job=job.record_id, drivers=tuple(dict.fromkeys(drivers)), not_after_ms=until_ms)
            folder.append(sign(options.key, grant), durable=True)
            kept = Handed(job=job.record_id, hosts=hosts, hubs=tuple(str(one) for one in options.hubs))
            folder.write(HANDED, msgspec.json.encode(kept))
            folder.begin(job, yaml)
            await _hand_over(session, kept, size, watch)
            return kept


def _pack_tokenizer(tokenizer: str, folder: Path) -> str:
    """What goes along with the folder, and what it is called there."""
    if tokenizer == "bytes":
        return tokenizer
    from shoal.models.tokenizers import load_tokenizer

    (folder / TOKENIZER).mkdir(parents=True)
    load_tokenizer(tokenizer).save(folder / TOKENIZER)
    return TOKENIZER


async def _find_hosts(session: Session, name: str, size: int) -> tuple[Host, ...]:
    """Nodes that would drive: the cheapest first, of those the nearest. Raises NoHost."""
    spending = session.options.spending
    ledger = spending.ledger.ledger if spending is not None else None
    found = await session.hubs.find(OfferFind(accepts="drive", limit=64))
    able = [one for one in found if not one.offer.driving_micro_per_h or (ledger and one.offer.ledger == ledger)]
    links = await asyncio.gather(*(_linked(session, one) for one in able[:32]))
    near = sorted(
        (one for one in links if one is not None),
        key=lambda one: (one.offer.driving_micro_per_h or 0, one.link.stats().round_trip_ms or 0.0),
    )
    hosts, troubles = list[Host](), list[str]()
    for one in near:
        if len(hosts) == min(HOSTS_WANTED, HOSTS_MAX):
            break
        price = one.offer.driving_micro_per_h or 0
        try:
            given = await ask(one.link, DriveAsk(name=name, size_bytes=size, micro_per_h=price), DriveGiven)
        except ShoalError as error:
            troubles.append(f"{one.name}: {error.sentence}")
            continue
        if given.driver in (session.key.node_id, session.options.key.node_id, *(host.driver for host in hosts)):
            troubles.append(f"{one.name}: the key with which it would drive is another's.")
            continue
        hosts.append(
            Host(
                node=one.node,
                driver=given.driver,
                name=one.name,
                addresses=one.offer.addresses,
                payee=given.payee,
                micro_per_h=price,
            )
        )
    if not hosts:
        paid = len(found) - len(able)
        why = f" {paid} ask for money at a ledger that is not yours, or the job has no --budget." if paid else ""
        raise NoHost(
            f"No node would drive the job: {len(found)} at the hubs drive jobs for others, {len(near)} of them could "
            f"be asked.{why} {' '.join(troubles[:TROUBLES_SHOWN])} Start one with `shoal node start`, or leave out "
            "--detach and drive it here."
        )
    if len(hosts) == 1:
        session.options.say(f"{hosts[0].name} drives it alone: no other node would stand by to take over.")
    return tuple(hosts)


async def _linked(session: Session, one: FoundOffer) -> LinkedNode | None:
    with suppress(ShoalError):
        return await link_to(
            one.node, one.offer, endpoint=session.endpoint, directory=session.hubs, clock=session.clock
        )
    return None


async def _hand_over(session: Session, kept: Handed, size: int, watch: Callable[[Sequence[Standing]], None]) -> None:
    folder, hosts = session.folder, kept.hosts

    async def asked(request: Request) -> bytes:
        message = decode(FolderAsk, request.body, request.version)
        if message.job != kept.job or all(one.node != request.peer for one in hosts):
            raise NoHost(f"{short_id(request.peer)} is no host of this job.")
        pieces, more = await asyncio.to_thread(missing, folder.path, message.files)
        return encode(FolderGiven(phase="standing by", pieces=tuple(pieces), more=more), request.version)

    session.endpoint.handle(FolderAsk.KIND, asked)
    purse, allowance = None, None
    try:
        if isinstance(session.options.spending, Spending):
            purse, allowance = await _set_aside(session, session.options.spending, kept)
        for host in hosts:
            begin = DriveBegin(
                driver=host.driver, job=kept.job, hosts=hosts, hubs=kept.hubs, allowance=allowance,
                prompt=session.options.prompt,
            )  # fmt: skip
            await ask(await link_to_host(host, session), begin, Done)
        await _begun(session, kept, size, watch)
    except BaseException:
        for host in hosts:
            with suppress(ShoalError):
                await ask(await link_to_host(host, session), DriveStop(job=kept.job), Done)
        if purse is not None:
            await purse.close()
        raise
    if purse is not None:
        await purse.leave()


async def _set_aside(session: Session, spending: Spending, kept: Handed) -> tuple[Purse, Allowance]:
    """One escrow, out of which whoever drives pays: itself, those that stand by, and the nodes that it takes."""
    signer, seed = AccountKey.generate(), session.dice.bytes(32)
    assert session.ledger is not None
    funds = Funds(
        session.ledger, spending.account.address, signer, spending.budget_micro, spending.account,
        notice_ms=spending.notice_ms, audit_ms=spending.audit_ms,
    )  # fmt: skip

    async def link(node: bytes, offer: Offer) -> Link:
        raise NoHost("A job that is handed over holds no nodes from here.")

    purse = Purse(
        funds, None, lambda content: session.folder.write(FILE, content), key=KeyPair.from_seed(seed), link=link,
        clock=session.clock, dice=session.dice, say=session.options.say, again="shoal jobs cancel",
    )  # fmt: skip
    nodes = {
        host.driver.hex(): PaidNode(
            name=f"{host.name} (driving)", payee=host.payee, micro_per_h=host.micro_per_h, reason="drove the job"
        )
        for host in kept.hosts
        if host.payee is not None
    }
    quote = blake3_hash(msgspec.msgpack.encode(kept.hosts))
    await purse.open_for(nodes, quote)
    per_h = sum(one.micro_per_h for one in nodes.values())
    currency, budget = spending.ledger.currency, format_money(spending.budget_micro)
    session.options.say(
        f"{budget} {currency} is set aside, {format_money(per_h)}/h of it for driving; the owner's key stays here."
    )
    escrow = purse.payments.terms[-1].escrow
    return purse, Allowance(ledger=str(spending.ledger), escrow=escrow, signer=signer.secret, client=seed)


async def _begun(session: Session, kept: Handed, size: int, watch: Callable[[Sequence[Standing]], None]) -> None:
    """Returns when one drives and the others have all that they need; `size` is that in bytes. Raises NoHost."""
    began_s = since_s = session.clock.monotonic()
    copied_within_s = FETCHED_WITHIN_S + patience_s(size, FETCHED_WITHIN_S)
    while True:
        found = await asyncio.gather(*(_standing(host, kept.job, session) for host in kept.hosts))
        watch([Standing(host.name, one.phase, one.sentence) for host, one in zip(kept.hosts, found, strict=True)])
        lost = [f"{host.name}: {one.sentence}" for host, one in zip(kept.hosts, found, strict=True)
                if one.phase == "given up"]  # fmt: skip
        if lost:
            raise NoHost(f"The job was not taken over. {' '.join(lost)}")
        ready = all(one.phase != "fetching" for one in found)
        if ready and any(one.phase in ("driving", "over") for one in found):
            return
        if not ready:
            since_s = session.clock.monotonic()
            if since_s - began_s > copied_within_s:
                slow = [host.name for host, one in zip(kept.hosts, found, strict=True) if one.phase == "fetching"]
                raise NoHost(f"The job was not taken over: {', '.join(slow)} copied it for {copied_within_s:.0f} s.")
        if session.clock.monotonic() - since_s > BEGINS_WITHIN_S:
            said = " ".join(one.sentence for one in found if one.sentence)
            raise NoHost(f"The hosts have the job, and none drives it after {BEGINS_WITHIN_S:.0f} s. {said}")
        await session.clock.sleep(LOOK_EVERY_S)


async def _standing(host: Host, job: bytes, session: Session) -> FolderGiven:
    """Raises LinkError."""
    return await ask(await link_to_host(host, session), FolderAsk(job=job, standing_only=True), FolderGiven)


async def link_to_host(host: Host, near: Surroundings) -> Link:
    """Raises LinkError."""
    return await reach_again(
        host.node, host.addresses, endpoint=near.endpoint, directory=near.hubs, clock=near.clock,
        dial_deadline_s=ASK_DEADLINE_S,
    )  # fmt: skip


async def ask(link: Link, message: DriveAsk | DriveBegin | DriveStop | FolderAsk, answer: type[M]) -> M:
    """Raises LinkError, BadMessage."""
    return await asking.ask(link, message, answer, DEADLINE_S)
