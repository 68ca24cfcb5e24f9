"""What a node that drives jobs for others takes from strangers: for whom it keeps what, and for how long unpaid."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from blob_world import ref_of
from hub_world import a_key, an_offer
from money_world import LEDGER, PAYER, Shop, Street, an_account, run

from shoal.driver.folder import CHAIN, RunFolder
from shoal.driver.mirror import Copy, missing
from shoal.identity import Envelope, blake3_hash
from shoal.ledger.commands import Close, Open
from shoal.node.hosted_job import UNPAID_S, Around, HostSettings
from shoal.node.hosting import ENDED_MAX, Hosting
from shoal.node.sales import Books
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.driving import (
    Allowance,
    DriveAsk,
    DriveBegin,
    DriveGiven,
    DriveStop,
    FolderAsk,
    FolderGiven,
    Host,
    Phase,
)
from shoal.protocol.messages import decode, encode, open_record, sign
from shoal.protocol.money import Closing, EscrowTerms, Payee, SignedVoucher, Voucher, sign_voucher
from shoal.protocol.offers import Done, Offer, OfferFind
from shoal.protocol.training import (
    Accepted,
    Commit,
    DataRef,
    Grant,
    ModelRef,
    OptimizerSettings,
    ReplaySettings,
    RoundSettings,
    TrainJob,
)
from shoal.purse.bills import FILE, PaidNode, Payments, TermPayments
from shoal.sdk.detached import NoHost, _begun, _find_hosts
from shoal.sdk.handed import Handed
from shoal.sdk.train import TrainOptions
from shoal.storage import BlobStore, Fetcher, serve
from shoal.transport import MemoryEndpoint
from shoal.world import Link, Refused, Request, SeededDice
from shoal.world.asking import ask
from shoal.world.directory import FoundOffer

SIGNER, SEED = an_account(51), bytes([9] * 32)
PRICE_PER_H = 18_000
START = b"weights"


@dataclass
class OneStreet:
    """Where everybody is found."""

    found: list[FoundOffer] = field(default_factory=list)

    async def find(self, wanted: OfferFind) -> list[FoundOffer]:
        return self.found

    async def introduce(self, node: bytes, addresses: Sequence[str]) -> None:
        raise AssertionError("nobody is introduced")


class Here:
    """A node on the street that drives jobs, for money or for nothing."""

    def __init__(self, street: Street, shop: Shop, at: Path, micro_per_h: int = 0) -> None:
        self.street, self.shop, self.at = street, shop, at

        async def changed() -> None:
            pass

        async def paid(begin: DriveBegin, newest: SignedVoucher | None) -> None:
            assert begin.allowance is not None
            await shop.sales.paid_for_driving(begin.allowance, newest)

        self.store = BlobStore(at / "blobs", 1 << 30, street.clock)
        around = Around(
            shop.node, shop.endpoint, OneStreet(), self.store,
            Fetcher(shop.endpoint, self.store, street.clock, SeededDice(1)), street.clock,
            HostSettings(micro_per_h, ("shoal.sdk.hosted",)), None, "shoal", changed, paid,
        )  # fmt: skip
        self.hosting = Hosting(
            around, folder=at / "hosted", name="here", payee=shop.sales.terms.payee if micro_per_h else None
        )

    async def close(self) -> None:
        await self.hosting.close()
        self.store.close()


class Owner:
    """Who hands a job over; with a blob store, and a run folder that hosts may copy."""

    def __init__(self, street: Street, here: Here, at: Path, number: int = 60) -> None:
        self.street, self.here, self.key = street, here, a_key(number)
        self.phase: Phase = "standing by"
        """As the first host, which the owner is as well."""
        self.pays = ""
        """How it cheats, when it sets money aside."""
        self.endpoint: MemoryEndpoint = street.client(number)
        at.mkdir()
        self.folder = RunFolder.create(at / "run")
        self.store = BlobStore(self.folder.blobs, 1 << 30, street.clock)
        self.store.put(START)
        serve(self.endpoint, self.store)
        self.endpoint.handle(FolderAsk.KIND, self._asked)
        job = TrainJob(
            name="job", created_ms=0, seed=1, model=ModelRef(start=ref_of(START), parameters=1),
            data=DataRef(samples=100, sequence_tokens=8, vocabulary=257), token_budget=1000, batch_samples=1,
            optimizer=OptimizerSettings(), rounds=RoundSettings(), replay=ReplaySettings(),
        )  # fmt: skip
        self.job = sign(self.key, job)
        self.folder.begin(self.job, b"")

    async def _asked(self, request: Request) -> bytes:
        message = decode(FolderAsk, request.body, request.version)
        pieces, more = await asyncio.to_thread(missing, self.folder.path, message.files)
        if self.phase == "driving" and not pieces:
            await self.street.clock.sleep(message.wait_ms / 1000)
        holders = (BlobHolder(self.endpoint.node_id, ()),)
        given = FolderGiven(phase=self.phase, pieces=tuple(pieces), more=more, holders=holders)
        return encode(given, request.version)

    def commit(self, number: int, update: bytes | None) -> Envelope:
        accepted = [
            Accepted(
                member=bytes(32), contribution=bytes(32), update=self.store.put(one), weight_ppm=1, samples=1, tokens=1
            )
            for one in (update,) if one is not None
        ]  # fmt: skip
        made = Commit(
            job=self.job.record_id, round=number, term=1, previous=self.job.record_id, assignment=bytes(32),
            accepted=tuple(accepted), state=bytes(32), tokens_total=0,
        )  # fmt: skip
        return sign(self.key, made)

    async def link(self) -> Link:
        known = self.endpoint.links().get(self.here.shop.node)
        return known or await self.endpoint.dial(self.here.shop.node, self.here.shop.endpoint.addresses)

    async def ask(self, message: Any, answer: Any) -> Any:
        return await ask(await self.link(), message, answer, 30.0)

    async def begin(self, *, size: int = 1 << 20, micro_per_h: int = 0, **host: Any) -> Host:
        """That the node is the second host of the job: it stands by, and never drives."""
        given = await self.ask(DriveAsk(name="job", size_bytes=size, micro_per_h=micro_per_h), DriveGiven)
        grant = Grant(job=self.job.record_id, drivers=(given.driver,), not_after_ms=1 << 50)
        self.folder.append(sign(self.key, grant), durable=True)
        made = Host(
            node=self.here.shop.node, driver=given.driver, name="here", payee=given.payee, micro_per_h=micro_per_h
        )
        made = msgspec.structs.replace(made, **host)
        first = Host(node=self.endpoint.node_id, driver=bytes(32), name="there")
        allowance = await self._set_aside(made) if micro_per_h else None
        begin = DriveBegin(
            driver=given.driver, job=self.job.record_id, hosts=(first, made), hubs=("shoal://none",),
            allowance=allowance,
        )  # fmt: skip
        await self.ask(begin, Done)
        return made

    async def _set_aside(self, host: Host) -> Allowance:
        payee = self.here.shop.sales.terms.payee
        terms = EscrowTerms(
            payer=PAYER.address, signer=SIGNER.address, cap_micro=1_000_000, auditor=PAYER.address,
            amount_micro=1_000_000, fee_ppm=0, holdback_ppm=0, notice_ms=60_000, audit_ms=0,
            expires_ms=self.street.clock.now_ms() + 24 * 3_600_000, payees=(Payee(payee, 1_000_000),),
            quote=bytes(32), nonce=self.street.ledger.lines[-1].hash,
        )  # fmt: skip
        self.escrow = terms.escrow_id(LEDGER)
        signature = PAYER.sign(self.escrow)
        await self.street.ledger.apply(Open(terms, signature))
        mine = PaidNode(
            name="here", payee=bytes(20) if self.pays == "another" else payee,
            micro_per_h=1 if self.pays == "less" else host.micro_per_h,
        )  # fmt: skip
        nodes = {} if self.pays == "nobody" else {host.driver.hex(): mine}
        written = msgspec.structs.replace(terms, nonce=b"x" * 32) if self.pays == "elsewhere" else terms
        term = TermPayments(terms=written, ledger=LEDGER, signature=signature, nodes=nodes)
        self.payments = Payments(budget_micro=1_000_000, terms=(term,))
        self.write(self.payments)
        return Allowance(ledger="shoal-ledger://x", escrow=self.escrow, signer=SIGNER.secret, client=SEED)

    def write(self, payments: Payments) -> None:
        self.folder.write(FILE, msgspec.json.encode(payments))

    async def standing(self) -> FolderGiven:
        found = await self.ask(FolderAsk(job=self.job.record_id, standing_only=True), FolderGiven)
        assert isinstance(found, FolderGiven)
        return found


async def until(street: Street, condition: Callable[[], bool], seconds: float = 2.0, times: int = 300) -> None:
    for _ in range(times):
        if condition():
            return
        await street.clock.advance(seconds)
        await asyncio.sleep(0.01)  # disks are written to in threads
    raise AssertionError("it never came to that")


def scene(tmp_path: Path, story: Callable[[Street, Here, Owner], Any], micro_per_h: int = 0) -> None:
    async def whole(street: Street) -> None:
        here = Here(street, await street.shop(1, tmp_path / "sales"), tmp_path / "here", micro_per_h)
        try:
            await story(street, here, Owner(street, here, tmp_path / "owner"))
        finally:
            await here.close()

    run(whole)


def test_a_host_that_is_not_paid_any_more_stands_by_for_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.hosted_job.SILENCE_S", 1e9)  # the first host is there, however slow this machine

    async def story(street: Street, here: Here, owner: Owner) -> None:
        mine = await owner.begin(micro_per_h=PRICE_PER_H)
        job = here.hosting._jobs[owner.job.record_id]
        await until(street, lambda: job._phase == "standing by")

        def pay(micro: int) -> Callable[[], bool]:
            voucher = Voucher(
                escrow=owner.escrow, payee=here.shop.sales.terms.payee, amount_micro=micro, work=bytes(32)
            )
            (term,) = owner.payments.terms
            known = msgspec.structs.replace(
                term.nodes[mine.driver.hex()], voucher=sign_voucher(SIGNER, LEDGER, voucher), paid_micro=micro
            )
            term = msgspec.structs.replace(term, nodes={mine.driver.hex(): known})
            owner.write(msgspec.structs.replace(owner.payments, terms=(term,)))
            return lambda: street.ledger.book.escrows[owner.escrow].redeemed_micro == micro

        owner.phase = "driving"
        await until(street, pay(3000), 10.0)
        (account,) = here.shop.sales.accounts
        here.shop.sales._books.content = Books({}, [])  # others have come in between
        await until(street, pay(5000), 10.0)
        assert here.shop.sales.account(account.escrow) is not None
        wish = Closing(owner.escrow)
        await street.ledger.apply(Close(wish, PAYER.sign(wish.digest(LEDGER))))
        await until(street, lambda: job._unpaid is not None, 10.0)
        assert job._unpaid is not None
        began_s, _ = job._unpaid
        await until(street, lambda: job._phase == "given up", 10.0, 1000)
        assert UNPAID_S <= street.clock.monotonic() - began_s <= UNPAID_S + 600
        given = await owner.standing()
        assert "ends in 0 s" in given.sentence

    scene(tmp_path, story, PRICE_PER_H)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"size": 3}, "announced a smaller job"),
        ({"micro_per_h": PRICE_PER_H, "pays": "another"}, "does not pay this node"),
        ({"micro_per_h": PRICE_PER_H, "pays": "less"}, "does not pay this node"),
        ({"micro_per_h": PRICE_PER_H, "pays": "elsewhere"}, "does not pay this node"),
        ({"micro_per_h": PRICE_PER_H, "pays": "nobody"}, "does not pay this node"),
    ],
)
def test_an_owner_who_hands_over_something_else_than_was_said(tmp_path: Path, changed: Any, why: str) -> None:
    async def story(street: Street, here: Here, owner: Owner) -> None:
        owner.pays = changed.get("pays", "")
        await owner.begin(**{name: value for name, value in changed.items() if name != "pays"})
        job = here.hosting._jobs[owner.job.record_id]
        await until(street, lambda: job._phase == "given up")
        given = await owner.standing()
        assert why in given.sentence

    scene(tmp_path, story, changed.get("micro_per_h", 0))


def test_a_host_is_paid_where_it_says(tmp_path: Path) -> None:
    async def story(street: Street, here: Here, owner: Owner) -> None:
        for payee in (None, an_account(9).address):
            with pytest.raises(Refused, match="with the key that it gave, for its price"):
                await owner.begin(micro_per_h=PRICE_PER_H, payee=payee)

    scene(tmp_path, story, PRICE_PER_H)


def test_strangers_do_not_make_a_host_forget_what_an_owner_waits_for(tmp_path: Path) -> None:
    async def story(street: Street, here: Here, owner: Owner) -> None:
        owner.folder.append(owner.commit(0, None), durable=True)
        await owner.begin()
        job = here.hosting._jobs[owner.job.record_id]
        await until(street, lambda: job._phase == "standing by")
        await owner.ask(DriveStop(job=owner.job.record_id), Done)
        number = 100

        async def strangers(many: int) -> None:
            nonlocal number
            for _ in range(many):
                number += 1
                other = Owner(street, here, tmp_path / str(number), number)
                await other.begin()
                await other.ask(DriveStop(job=other.job.record_id), Done)

        await strangers(ENDED_MAX + 2)
        assert (await owner.standing()).phase == "over"
        copy = Copy(tmp_path / "mine", 1 << 30, begun=False)
        while (given := await owner.ask(FolderAsk(job=owner.job.record_id, files=copy.there), FolderGiven)).pieces:
            copy.take(given.pieces)
        await strangers(1)
        with pytest.raises(Refused, match="drives no job"):
            await owner.standing()

    scene(tmp_path, story)


def test_a_host_whose_copy_has_another_end_by_now_fetches_all_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.hosted_job.SILENCE_S", 1e9)

    async def story(street: Street, here: Here, owner: Owner) -> None:
        await owner.begin()
        job = here.hosting._jobs[owner.job.record_id]
        await until(street, lambda: job._phase == "standing by")
        with RunFolder.open(job.run_folder) as mine:
            mine.append(owner.commit(0, None), durable=True)  # the last that it wrote as a driver; nobody else has it
        size = (job.run_folder / CHAIN).stat().st_size
        await until(street, lambda: job._read == size)
        updates = [bytes([number]) * 1000 for number in range(3)]
        for number, update in enumerate(updates):
            owner.folder.append(owner.commit(number, update), durable=True)
        owner.phase = "driving"
        await until(street, lambda: all(here.store.has(blake3_hash(update)) for update in updates))
        await until(street, lambda: job._sound == (owner.folder.path / CHAIN).stat().st_size)

    scene(tmp_path, story)


def test_a_host_whose_disk_refuses_says_that_it_is_over(tmp_path: Path) -> None:
    async def story(street: Street, here: Here, owner: Owner) -> None:
        await owner.begin()
        job = here.hosting._jobs[owner.job.record_id]
        await until(street, lambda: job._phase == "standing by")
        (job.run_folder.parent / "hosting.new").mkdir()
        await owner.ask(DriveStop(job=owner.job.record_id), Done)
        assert (await owner.standing()).phase == "over"

    scene(tmp_path, story)


def test_a_key_that_is_anothers_makes_no_host(tmp_path: Path) -> None:
    async def whole(street: Street) -> None:
        owner, found = street.client(60), list[FoundOffer]()
        for number, promised in ((1, a_key(90)), (2, a_key(90)), (3, a_key(60)), (4, a_key(94))):
            node = street.client(number)

            async def promise(request: Request, promised: bytes = promised.node_id) -> bytes:
                return encode(DriveGiven(driver=promised), request.version)

            node.handle(DriveAsk.KIND, promise)
            await node.listen(f"tcp://node-{number}:0")
            envelope = an_offer(a_key(number), 1, name=f"node-{number}", addresses=tuple(node.addresses))
            found.append(FoundOffer(node.node_id, open_record(envelope, Offer), envelope))
        session = SimpleNamespace(
            options=TrainOptions(folder=tmp_path, hubs=(), key=a_key(61)), key=a_key(60), endpoint=owner,
            hubs=OneStreet(found), clock=street.clock,
        )  # fmt: skip
        hosts = await _find_hosts(cast(Any, session), "job", 1)
        assert [one.driver for one in hosts] == [a_key(90).node_id, a_key(94).node_id]

    run(whole)


def test_a_host_that_copies_for_ever_is_waited_for_no_longer_than_it_takes() -> None:
    async def whole(street: Street) -> None:
        owner, node = street.client(60), street.client(1)

        async def fetching(request: Request) -> bytes:
            return encode(FolderGiven(phase="fetching"), request.version)

        node.handle(FolderAsk.KIND, fetching)
        await node.listen("tcp://node:0")
        host = Host(node=node.node_id, driver=bytes(32), name="slow", addresses=tuple(node.addresses))
        session = SimpleNamespace(endpoint=owner, hubs=OneStreet(), clock=street.clock)
        kept = Handed(job=bytes(32), hosts=(host,), hubs=())
        waiting = asyncio.create_task(_begun(cast(Any, session), kept, 1 << 20, lambda _: None))
        await until(street, waiting.done, 5.0)
        with pytest.raises(NoHost, match="was not taken over: slow copied it for 6"):
            await waiting

    run(whole)
