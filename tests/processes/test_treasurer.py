"""A job's money: places held together, vouchers after Commits, a bill that adds up, and what a kill leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import Collection, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hub_world import a_key
from money_world import LEDGER, PAYER, BookLedger, Shop, Street, an_account, run
from test_run_folder import JOB

from shoal.driver.folder import FolderLocked, RunFolder
from shoal.driver.gang import LinkedNode
from shoal.driver.lines import Event
from shoal.driver.treasurer import Treasurer
from shoal.errors import StorageError
from shoal.house import OutcomeUnknown
from shoal.identity import Envelope, blake3_hash
from shoal.identity.accounts import AccountKey, signer_of
from shoal.ledger.commands import Admit, Redeem
from shoal.ledger.escrows import Escrow, State
from shoal.ledger.moves import FEES, ISSUED
from shoal.node.earned import read_earned
from shoal.node.sales import ACCOUNTS, REDEEM_EVERY_S, Account, read_kept
from shoal.protocol.holds import Hold, Pay, open_hold
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import encode, sign
from shoal.protocol.money import Admission, HouseLedger, SignedVoucher, Voucher, sign_voucher
from shoal.protocol.prices import Price
from shoal.protocol.training import Commit
from shoal.purse.bills import FILE, PaidNode, Payments, bill
from shoal.purse.escrow import ASKED_AGAIN_S, NoMoney, top_up
from shoal.purse.purse import LOOK_EVERY_S, RENEW_EVERY_S, Funds
from shoal.quantities import BadQuantity
from shoal.quantities.money import AMOUNT_MAX
from shoal.sdk.jobs import Closed, Funded, NothingSetAside, OthersMoney, close_escrows, fund, look_at, open_at
from shoal.sdk.spending import Spending
from shoal.world import FaultyDisk, MemoryDisk, Refused, Request, SeededDice, Unreachable
from shoal.world.quotes import NotSecured

WORK = bytes(32)
T = TypeVar("T")
HOUR_MS = 3_600_000


class Job:
    """A driver's money, without the rest of the driver."""

    def __init__(
        self,
        street: Street,
        folder: Path | RunFolder,
        *,
        budget: int = 1_000_000,
        number: int = 60,
        signer: AccountKey = PAYER,
        account: AccountKey | None = PAYER,
        present: Collection[bytes] = (),
    ) -> None:
        self.street, self.said, self.key, self.commits = street, list[str](), a_key(number), 0
        self.endpoint = street.client(number)
        self.folder = RunFolder.create(folder) if isinstance(folder, Path) else folder
        self.treasurer = Treasurer(
            Funds(street.ledger, PAYER.address, signer, budget, account, notice_ms=60_000, audit_ms=1000),
            self.folder,
            key=a_key(number),
            link=street.linker(self.endpoint),
            clock=street.clock,
            dice=SeededDice(number),
            say=self.said.append,
            present=lambda: present,
        )

    async def gang(self, *shops: Shop) -> list[LinkedNode]:
        link = self.street.linker(self.endpoint)
        return [LinkedNode(shop.node, shop.offer, await link(shop.node, shop.offer)) for shop in shops]

    async def begin(self, *shops: Shop) -> None:
        held = await self.treasurer.hold(await self.gang(*shops), len(shops))
        assert {one.node for one in held} == {shop.node for shop in shops}
        assert await self.treasurer.open(len(shops)) == {shop.node for shop in shops}
        for shop in shops:
            self.treasurer.ready(shop.node, 10.0, 100)  # 100 millionths a second

    async def commit(self, *work: tuple[Shop, int]) -> None:
        self.folder.append(await self.owe(*work), durable=True)
        self.treasurer.committed()
        await settle(self.street)

    async def owe(self, *work: tuple[Shop, int]) -> Envelope:
        """A Commit that is about to be written."""
        self.commits += 1
        state = blake3_hash(b"state")
        commit = Commit(job=WORK, round=self.commits, term=1, previous=WORK, assignment=WORK, accepted=(), state=state,
                        tokens_total=0)  # fmt: skip
        envelope = sign(self.key, commit)
        await self.treasurer.owes(envelope.record_id, [(shop.node, tokens, WORK) for shop, tokens in work])
        return envelope

    async def kill(self) -> None:
        """Nothing is done in order any more."""
        for task in self.treasurer._tasks:
            task.cancel()
        await self.endpoint.close()

    @property
    def written(self) -> Payments:
        found = self.folder.payments()
        assert found is not None
        return found


async def settle(street: Street, seconds: float = 0.0) -> None:
    await street.clock.advance(seconds)
    for _ in range(5):
        await asyncio.sleep(0.01)


def test_each_is_paid_for_what_was_accepted_and_the_bill_adds_up(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2, 3)]
        job = Job(street, tmp_path / "run")
        await job.begin(*shops[:2])
        works = [shop.sales.work_for(a_key(60).node_id) for shop in shops[:2]]
        for work in works:
            work.ready(10.0, 100)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 10_000), (shops[1], 4_000))
        assert works[0].accepted(10_000) is None and works[1].accepted(4_000) is None
        (late,) = await job.gang(shops[2])
        await job.treasurer.secure(late)
        job.treasurer.ready(late.node, 20.0, 100)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 12_000), (shops[2], 5_000))
        job.treasurer.left(shops[1].node, "it died")
        assert [one.paid_micro for one in job.written.terms[0].nodes.values()] == [2000, 400, 250]
        await job.treasurer.close()
        await settle(street)
        made = bill(job.written)
        assert made is not None
        assert (made.quoted, made.charged, made.refunded, made.currency) == (1_000_000, 2650, 997_350, "USD")
        assert [(line.name, line.paid, line.withheld, line.reason) for line in made.nodes] == [
            ("shop-1", 2000, 0, "worked"), ("shop-2", 400, 0, "it died"), ("shop-3", 250, 0, "worked"),
        ]  # fmt: skip
        await settle(street, 62)
        balances = [await street.ledger.balance(an_account(number).address) for number in (1, 2, 3)]
        assert balances == [2000, 400, 250]
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - 2650
        assert street.ledger.book.balances[ISSUED] == -10_000_000

    run(story)


def test_the_ledger_takes_its_fee_and_bill_and_nodes_say_how_much(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        street.ledger.announce(20_000)
        street.ledger.give(PAYER.address, 10_000_000)
        shops = [await street.shop(number, tmp_path / str(number) / "sales") for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(*shops)
        assert job.written.terms[0].terms.fee_ppm == 20_000
        assert "Of what nodes are paid, the ledger takes 2 %." in job.said
        await street.clock.advance(10.0)
        await job.commit((shops[0], 12_345), (shops[1], 4_000))
        await job.treasurer.withhold(shops[1].node, "it lied", WORK)
        await job.treasurer.close()
        await settle(street, 62)
        await settle(street, 10)
        has_all = [await street.ledger.balance(shop.sales.terms.payee) for shop in shops]
        made = bill(job.written)
        assert made is not None and made.fee == street.ledger.book.balances[FEES] == 20 + 7
        assert made.charged == sum(has_all) + made.fee
        for number, has in zip((1, 2), has_all, strict=True):
            earned = read_earned(tmp_path / str(number), street.clock.now_ms())
            assert has > 0 and sum(one.paid_micro - one.fee_micro for one in earned.escrows) == has

    run(story, deposit=0)


def test_another_hand_than_the_payers_signs_vouchers_and_admissions(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        hand = an_account(51)
        job = Job(street, tmp_path / "run", signer=hand)
        await job.begin(shops[0])
        await job.treasurer.secure((await job.gang(shops[1]))[0])
        job.treasurer.ready(shops[1].node, 10.0, 100)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 10_000), (shops[1], 4_000))
        (term,) = job.written.terms
        for one in term.nodes.values():
            assert one.voucher is not None
            assert signer_of(one.voucher.voucher.digest(LEDGER), one.voucher.signature) == hand.address
        await job.treasurer.close()
        await settle(street, 62)
        assert [await street.ledger.balance(an_account(number).address) for number in (1, 2)] == [1000, 400]
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - 1400

    run(story)


def test_the_folder_keeps_what_nodes_promised(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(shops[0])
        await job.treasurer.secure((await job.gang(shops[1]))[0])

        def numbers() -> list[int]:
            kept = [
                open_hold(
                    Envelope.from_bytes(job.written.terms[0].nodes[shop.node.hex()].hold, Hold.MAX_BYTES), shop.node
                )
                for shop in shops
            ]
            assert {one.escrow for one in kept} == {job.written.terms[0].escrow}
            return [one.number for one in kept]

        before = numbers()
        await settle(street, RENEW_EVERY_S)
        for _ in range(20):
            await settle(street, 0.5)
        assert [after > one for one, after in zip(before, numbers(), strict=True)] == [True, True]
        await job.treasurer.close()

    run(story)


def test_a_gang_is_held_whole_or_not_at_all(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2, 3)]
        one, other = Job(street, tmp_path / "one"), Job(street, tmp_path / "other", number=61)
        await one.begin(shops[2])
        with pytest.raises(NotSecured, match="3 nodes are needed, and 2 would keep a place. shop-3: All 1 slots"):
            await other.treasurer.hold(await other.gang(*shops), 3)
        third = Job(street, tmp_path / "third", number=62)
        await third.begin(*shops[:2])

    run(story)


def test_a_budget_that_is_used_up_stops_the_job_after_a_warning(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run", budget=10_000)
        await job.begin(shop)
        stopped = None
        for _ in range(100):
            await street.clock.advance(10.0)
            await job.commit((shop, 10_000))
            stopped = await job.treasurer.used_up()
            if stopped is not None:
                break
        assert stopped is not None
        assert "The budget of 0.01 USD is used up: 0.001 is left, and a round costs up to 0.001." in stopped
        times = "1 place was held in 0 ms, the money for that was set aside in 0 ms, and taken in 0 ms."
        assert job.said == [
            times,
            "0.004 USD of the budget is left, enough for about 40.0 s; then the job stops, unless `shoal jobs fund` "
            "adds to it before.",
        ]
        noted = [event.sentence for event in job.folder.notes(Event)]
        assert noted == job.said, "whose job nodes drive is warned as well"
        assert job.treasurer.payments.spent_micro == 9000

    run(story)


@pytest.mark.parametrize("hand", [PAYER, an_account(51)], ids=["the payer's hand", "another hand"])
def test_money_that_is_added_is_worked_for_and_the_bill_adds_up(tmp_path: Path, hand: AccountKey) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run", budget=10_000, signer=hand)
        job.folder.begin(JOB)
        await job.begin(shop)
        work = shop.sales.work_for(a_key(60).node_id)
        work.ready(10.0, 100)

        async def rounds(most: int) -> tuple[int, str | None]:
            """Until the money is used up, each for 0.001."""
            for count in range(most):
                stopped = await job.treasurer.used_up()
                if stopped is not None:
                    return count, stopped
                await street.clock.advance(10.0)
                await job.commit((shop, 10_000))
                assert work.accepted(10_000) is None
            return most, None

        assert await rounds(8) == (8, None)
        ends_ms = street.ledger.book.escrows[job.written.terms[0].escrow].ends_ms
        made = await fund(tmp_path / "run", 5_000, PAYER, street.ledger, street.clock)
        assert (made.added_micro, made.budget_micro, made.left_micro) == (5_000, 15_000, 7_000)
        assert made.ends_ms - ends_ms == (ends_ms - 1_700_000_000_000) // 2, "half as long again for half as much more"
        count, stopped = await rounds(20)
        assert count == 6 and stopped is not None and "The budget of 0.015 USD is used up: 0.001 is left" in stopped
        assert job.said[2] == "0.005 USD was added to the budget, which is 0.015 now: 0.007 is left."
        assert [said.split()[0] for said in job.said[1:] if "unless" in said] == ["0.004", "0.004"]
        account = shop.sales.account(job.written.terms[0].escrow)
        assert account is not None and account.paid_micro == 14_000 and look_at(tmp_path / "run").budget_micro == 15_000
        await job.treasurer.close()
        bought = bill(job.written)
        assert bought is not None and (bought.quoted, bought.charged, bought.refunded) == (15_000, 14_000, 1_000)
        await settle(street, 62)
        assert await street.ledger.balance(an_account(1).address) == 14_000
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - 14_000

    run(story)


def test_money_that_is_added_is_heard_of_without_a_commit_and_by_the_nodes(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run", budget=10_000)
        await job.begin(shop)
        await top_up(job.written.terms[0], street.ledger, PAYER, 3_000, street.clock)
        street.ledger.fails = StorageError("away")
        await settle(street, LOOK_EVERY_S)
        assert job.treasurer.left_micro == 10_000
        street.ledger.fails = None
        await settle(street, LOOK_EVERY_S)
        assert (job.treasurer.left_micro, job.written.budget_micro) == (13_000, 13_000)
        await job.treasurer.close()

    run(story)


class Halting(BookLedger):
    """A ledger at which commands of several come between each other."""

    def __init__(self, of: BookLedger) -> None:
        self.__dict__ = of.__dict__

    async def _asked(self) -> None:
        await asyncio.sleep(0)
        await super()._asked()


def test_what_is_added_is_added_once_whatever_is_lost_and_whoever_else_adds(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job, ledger = Job(street, tmp_path / "run", budget=10_000), Halting(street.ledger)
        await job.begin(shop)
        (term,) = job.written.terms

        async def add(micro: int) -> Escrow:
            adding = asyncio.create_task(top_up(term, ledger, PAYER, micro, street.clock))
            while not adding.done():
                await settle(street, 0.1)
            return adding.result()

        found = await asyncio.gather(add(1_000), add(200))
        assert {one.amount_micro for one in found} >= {11_200} and found[0].top_ups + found[1].top_ups >= 3
        for lost in (1, 2, len(ASKED_AGAIN_S) + 1):
            before = (await ledger.escrow(term.escrow) or found[0]).amount_micro
            street.ledger.loses = lost
            assert (await add(1_000)).amount_micro == before + 1_000
        for nothing in (OutcomeUnknown("no answer"), Unreachable("nobody is there")):
            street.ledger.fails = nothing
            with pytest.raises(type(nothing)):
                await add(1_000)
            street.ledger.fails = None
        assert street.ledger.book.escrows[term.escrow].amount_micro == 14_200
        await job.treasurer.close()
        made = bill(job.written)
        assert made is not None and (made.quoted, made.refunded) == (14_200, 14_200), "also what was not heard of yet"
        await settle(street, 62)
        assert await street.ledger.balance(PAYER.address) == 10_000_000

    run(story)


def test_what_cannot_be_added_is_said_and_moves_nothing(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop, path = await street.shop(1, tmp_path / "1"), tmp_path / "run"
        job = Job(street, path, budget=400)
        job.folder.begin(JOB)

        async def add(micro: int = 50, account: AccountKey = PAYER) -> Funded:
            return await fund(path, micro, account, street.ledger, street.clock)

        with pytest.raises(NothingSetAside, match="Nothing is set aside in .*: go on with `shoal train .* --resume`"):
            await add()
        await job.begin(shop)
        with pytest.raises(OthersMoney, match=r"money of 0x\w+ aside, and your account is 0x\w+: whose it is can add"):
            await add(account=an_account(51))
        with pytest.raises(NoMoney, match=r"This adds 0\.0002 USD, and your account 0x\w+ has 0\.0001: deposit more"):
            await add(200)
        await add(40)
        (term,) = job.written.terms
        await job.treasurer.close()
        with pytest.raises(NothingSetAside, match="Nothing is set aside in"):
            await add()
        (path / "payments.json").write_bytes(msgspec.json.encode(Payments(budget_micro=400, terms=(term,))))
        with pytest.raises(NothingSetAside, match=r"Nothing was added: The payer of Escrow \w+ has asked for the rest"):
            await add()
        await settle(street, 62)
        with pytest.raises(NothingSetAside, match=r"Nothing was added: Escrow \w+ has ended; .* Go on with"):
            await add()
        job.folder.close()
        with pytest.raises(NothingSetAside, match="Nobody drives the run in .*, so nothing of it costs money: go on"):
            await add()
        with pytest.raises(NothingSetAside, match="No endpoint runs with the folder .*: start `shoal serve` with"):
            await fund(tmp_path / "1", 50, PAYER, street.ledger, street.clock)
        assert await street.ledger.balance(PAYER.address) == 500

    run(story, deposit=500)


def test_what_was_added_and_never_heard_of_comes_back(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run", budget=10_000)
        await job.begin(shop)
        await street.clock.advance(10.0)
        await job.commit((shop, 10_000))
        await top_up(job.written.terms[0], street.ledger, PAYER, 5_000, street.clock)
        await job.kill()
        again = Job(street, job.folder, budget=10_000)
        await again.treasurer.close_former()
        said = "0.005 USD was added to the budget, and whoever was to spend it never heard of that: it comes back, and"
        assert [one for one in again.said if one.startswith(said)]
        await settle(street, 62)
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - 1_000
        await again.begin(shop)
        assert again.treasurer.left_micro == 9_000
        await again.treasurer.close()

    run(story)


def test_what_another_driver_has_signed_for_is_spent_as_well(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        job = Job(street, tmp_path / "run", budget=10_000)
        await job.begin(*shops)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 10_000), (shops[1], 4_000))
        escrow = job.written.terms[0].escrow
        for number, micro in (
            (1, 1_500),
            (3, 2_000),
        ):  # by a host that could not be reached, for a node of its own, too
            payee = an_account(number).address
            if number == 3:
                admission = Admission(escrow, payee, 10_000)
                await street.ledger.apply(Admit(admission, PAYER.sign(admission.digest(LEDGER))))
            signed = sign_voucher(PAYER, LEDGER, Voucher(escrow=escrow, payee=payee, amount_micro=micro, work=WORK))
            await street.ledger.apply(Redeem(signed))
        await settle(street, LOOK_EVERY_S)
        assert job.treasurer.left_micro == 10_000 - 1_500 - 400 - 2_000
        await street.clock.advance(10.0)
        await job.commit((shops[0], 10_000))
        await job.treasurer.close()
        found, made = street.ledger.book.escrows[escrow], bill(job.written)
        assert found.paid[an_account(1).address].redeemed_micro == 2_500, "each of the two pays for what it got"
        assert made is not None and made.charged == found.redeemed_micro == 2_500 + 400 + 2_000
        assert [line.paid for line in made.nodes if line.name == "signed by another driver"] == [500, 2_000]

    run(story)


@pytest.mark.parametrize("lie", ["it added", "it closed", "it withheld"])
def test_what_another_driver_wrote_down_is_held_against_the_ledger(tmp_path: Path, lie: str) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run", budget=10_000)
        await job.begin(shop)
        await street.clock.advance(10.0)
        await job.commit((shop, 10_000))
        await job.kill()
        (term,), budget = job.written.terms, 10_000
        said = {"withheld_micro": 1_000} if lie == "it withheld" else {"paid_micro": 0, "voucher": None}
        nodes = {node: msgspec.structs.replace(one, **said) for node, one in term.nodes.items()}
        term = msgspec.structs.replace(term, nodes=nodes, closed=True)
        if lie == "it added":
            term, budget = msgspec.structs.replace(term, added_micro=50_000), 60_000
        job.folder.write("payments.json", msgspec.json.encode(Payments(budget_micro=budget, terms=(term,))))
        await settle(street, REDEEM_EVERY_S)
        again = Job(street, job.folder, budget=budget)
        await again.treasurer.close_former()
        assert again.treasurer.left_micro == 9_000 and street.ledger.book.escrows[term.escrow].closing
        assert any("0.05 USD less was added" in one for one in again.said) == (lie == "it added")

    run(story)


def test_a_job_goes_on_with_another_account_than_before(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop, other = await street.shop(1, tmp_path / "1"), an_account(51)
        street.ledger.give(other.address, 1_000_000)
        job = Job(street, tmp_path / "run", budget=10_000)
        await job.begin(shop)
        await street.clock.advance(10.0)
        await job.commit((shop, 10_000))
        await job.treasurer.close()
        again = Job(street, job.folder, budget=10_000, signer=other, account=other)
        await again.treasurer.close_former()
        assert again.treasurer.left_micro == 9_000

    run(story)


def test_a_voucher_that_is_worth_nothing_holds_up_no_money(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(*shops)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 10_000), (shops[1], 4_000))
        await job.kill()
        (term,) = job.written.terms
        first = term.nodes[shops[0].node.hex()]
        assert first.voucher is not None
        for forged in (
            msgspec.structs.replace(first.voucher, signature=bytes(65)),
            sign_voucher(PAYER, LEDGER, msgspec.structs.replace(first.voucher.voucher, amount_micro=2_000_000)),
        ):
            nodes = {**term.nodes, shops[0].node.hex(): msgspec.structs.replace(first, voucher=forged)}
            worse = msgspec.structs.replace(term, nodes=nodes)
            job.folder.write("payments.json", msgspec.json.encode(Payments(budget_micro=1_000_000, terms=(worse,))))
            await Job(street, job.folder).treasurer.close_former()
        found = street.ledger.book.escrows[term.escrow]
        assert found.closing and found.paid[an_account(2).address].redeemed_micro == 400

    run(story)


@pytest.mark.parametrize("lie", ["less", "nobody", "withheld", "closed", "foreign", "unsigned", "added"])
def test_what_hosts_have_spent_is_the_ledgers_to_say(tmp_path: Path, lie: str) -> None:
    """Whoever goes on with a budget that hosts had spends no more in all, whatever they wrote down."""

    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        hand = an_account(51)
        job = Job(street, tmp_path / "run", signer=hand)
        await job.begin(shop)
        await street.clock.advance(10.0)
        await job.commit((shop, 10_000))
        (term,) = job.written.terms
        ((node, one),) = term.nodes.items()
        assert one.voucher is not None
        await street.ledger.apply(Redeem(one.voucher))
        await job.kill()
        other = Voucher(escrow=WORK, payee=one.payee, amount_micro=5000, work=WORK)
        changes: dict[str, dict[str, object]] = {
            "less": {"paid_micro": 10, "voucher": None},
            "closed": {"paid_micro": 10},
            "withheld": {"withheld_micro": 1_000},
            "foreign": {"voucher": sign_voucher(hand, LEDGER, other)},
            "unsigned": {"voucher": SignedVoucher(one.voucher.voucher, bytes(65))},
        }
        nodes = {} if lie == "nobody" else {node: msgspec.structs.replace(one, **changes.get(lie, {}))}
        more = 500_000 if lie == "added" else 0
        told = msgspec.structs.replace(term, nodes=nodes, closed=lie == "closed", added_micro=more)
        job.folder.write(FILE, msgspec.json.encode(Payments(budget_micro=1_000_000 + more, terms=(told,))))

        again = Job(street, job.folder, budget=1_000_000 + more)
        closing = asyncio.create_task(again.treasurer.close_former())
        await settle(street)
        assert street.ledger.book.escrows[term.escrow].closing and not closing.done(), "its hosts can still sign"
        last = Voucher(escrow=term.escrow, payee=one.payee, amount_micro=3000, work=WORK)
        await street.ledger.apply(Redeem(sign_voucher(hand, LEDGER, last)))
        await settle(street, 62)
        await closing
        assert again.treasurer.left_micro == 1_000_000 - 3000
        assert again.said[0].startswith("What its hosts have not used is asked back: in 1 min 0 s it is there")
        assert (lie == "added") == any("0.50 USD less was added to the budget" in said for said in again.said)
        made = bill(again.written)
        assert made is not None and (made.quoted, made.charged, made.refunded) == (1_000_000, 3000, 997_000)
        assert [line.name for line in made.nodes][-1] == "signed by another driver"
        await again.begin(shop)  # all of it is there again
        await again.treasurer.close()

    run(story, deposit=1_000_000)


@pytest.mark.parametrize("budget", [-1, 0, 1.5, 1e6, True, AMOUNT_MAX + 1, "5", None])
def test_a_budget_that_no_escrow_can_hold_is_refused_before_anything_is_begun(budget: Any) -> None:
    ticket = LedgerTicket(LEDGER.operator, "USD", ("tcp://127.0.0.1:7",))
    with pytest.raises(BadQuantity, match=f"A budget is a whole number of millionths, .* and not {budget!r}"):
        Spending(PAYER, ticket, budget)


def test_no_money_nothing_held(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run")
        with pytest.raises(NoMoney, match=r"sets 1.00 USD aside, and your account 0x\w+ has 0.0005: deposit more"):
            await job.treasurer.check()
        await job.treasurer.hold(await job.gang(shop), 1)
        with pytest.raises(NoMoney):
            await job.treasurer.open(1)
        other = Job(street, tmp_path / "other", budget=400, number=61)
        await other.begin(shop)

    run(story, deposit=500)


def test_what_is_held_back_of_a_liar_goes_back(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(*shops)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 10_000), (shops[1], 10_000))
        await job.treasurer.withhold(shops[1].node, "Found by replay of round 0", WORK)
        await job.treasurer.withhold(shops[1].node, "Found by replay of round 0", WORK)
        await job.treasurer.close()
        made = bill(job.written)
        assert made is not None
        assert [(line.paid, line.withheld) for line in made.nodes] == [(1000, 0), (900, 100)]
        assert made.charged + made.refunded == made.quoted
        await settle(street, 62)
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - 1900
        assert await street.ledger.balance(an_account(2).address) == 900

    run(story)


def test_two_liars_of_one_owner_lose_what_is_held_back_of_both(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number), payee=9) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(*shops)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 10_000), (shops[1], 6_000))
        for shop in shops:
            await job.treasurer.withhold(shop.node, "Found by replay", WORK)
        await job.treasurer.close()
        await settle(street, 62)
        assert await street.ledger.balance(an_account(9).address) == 1600 - 100 - 60

    run(story)


def test_nodes_of_one_owner_are_paid_at_one_account(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number), payee=9) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(*shops)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 10_000), (shops[1], 4_000))
        await job.commit((shops[1], 6_000))
        await job.treasurer.close()
        await settle(street, 62)
        assert await street.ledger.balance(an_account(9).address) == 2000
        made = bill(job.written)
        assert made is not None and [line.paid for line in made.nodes] == [1000, 1000]

    run(story)


def test_nodes_of_one_account_that_show_each_others_vouchers_are_paid_once(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number), payee=9) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(*shops)

        async def late(request: Request) -> bytes:
            """It waits for the voucher of the other one, which says more than its own of the same Commit."""
            escrow = job.written.terms[0].escrow
            while (account := shops[1].sales.account(escrow)) is None or account.newest is None:
                await asyncio.sleep(0.01)
            shown = Pay(signed=account.newest)
            await shops[0].sales._paid(dataclasses.replace(request, body=encode(shown, request.version)))
            return await shops[0].sales._paid(request)

        shops[0].endpoint.handle(Pay.KIND, late)
        await street.clock.advance(20.0)
        await job.commit((shops[0], 10_000), (shops[1], 4_000))
        await job.treasurer.close()
        made = bill(job.written)
        assert made is not None and [line.paid for line in made.nodes] == [1000, 400]
        assert street.ledger.book.escrows[job.written.terms[0].escrow].redeemed_micro == made.charged == 1400

    run(story)


def test_who_drives_is_paid_for_a_job_whose_nodes_work_for_nothing(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        host, free = a_key(80).node_id, await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run", present=[host])
        drives = PaidNode(name="host", payee=an_account(8).address, micro_per_h=18_000)
        await job.treasurer.open_for({host.hex(): drives}, WORK)
        await street.clock.advance(600.0)
        await job.commit((free, 10_000))
        assert job.written.terms[0].nodes[host.hex()].paid_micro == 3000
        await job.treasurer.close()

    run(story)


def test_a_killed_driver_signs_for_no_less_and_gets_the_rest_back(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run")
        await job.begin(shop)
        await street.clock.advance(10.0)
        await job.commit((shop, 10_000))
        first = job.written.terms[0]
        await job.kill()
        again = Job(street, job.folder, budget=1_500_000)
        assert again.treasurer.left_micro == 1_499_000
        with pytest.raises(StorageError):
            street.ledger.fails = StorageError("away")
            await again.treasurer.close_former()
        street.ledger.fails = None
        await again.treasurer.close_former()
        assert street.ledger.book.escrows[first.escrow].redeemed_micro == 1000
        await again.begin(shop)
        await street.clock.advance(10.0)
        await again.commit((shop, 10_000))
        await again.treasurer.close()
        made = bill(again.written)
        assert made is not None and (made.quoted, made.charged) == (1_500_000, 2000)
        await settle(street, 62)
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - 2000
        assert {one.state for one in street.ledger.book.escrows.values()} == {State.SETTLED}

    run(story)


@pytest.mark.parametrize("written", [True, False])
def test_a_driver_that_is_killed_beside_a_commit_owes_what_is_written(tmp_path: Path, *, written: bool) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(*shops)
        await street.clock.advance(10.0)
        await job.commit((shops[0], 4_000))
        commit = await job.owe((shops[0], 6_000), (shops[1], 5_000))
        if written:
            job.folder.append(commit, durable=True)
        escrow = job.written.terms[0].escrow
        await job.kill()
        again = Job(street, job.folder)
        await again.treasurer.close_former()
        paid = [1000, 500] if written else [400, 0]
        assert [one.paid_micro for one in again.written.terms[0].nodes.values()] == paid
        assert again.treasurer.left_micro == 1_000_000 - sum(paid)
        await settle(street, 62)
        found = street.ledger.book.escrows[escrow]
        assert found.closing and found.redeemed_micro == sum(paid)
        await again.treasurer.close()

    run(story)


def test_a_driver_that_is_stopped_beside_a_commit_owes_what_is_written(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run")
        await job.begin(shop)
        await street.clock.advance(10.0)
        job.folder.append(await job.owe((shop, 4_000)), durable=True)
        await job.treasurer.close()
        assert job.written.spent_micro == 400
        await settle(street, 62)
        assert await street.ledger.balance(an_account(1).address) == 400

    run(story)


def test_what_a_killed_driver_has_set_aside_is_asked_back_without_another(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job, path = Job(street, tmp_path / "run"), tmp_path / "run"
        job.folder.begin(JOB)
        await job.begin(shop)
        await street.clock.advance(10.0)
        await job.commit((shop, 10_000))
        for task in job.treasurer._tasks:
            task.cancel()  # killed
        with pytest.raises(FolderLocked):
            await close_escrows(path, PAYER, street.ledger)
        job.folder.close()
        assert look_at(path).open_micro == 999_000 and open_at(path) == [LEDGER]
        with pytest.raises(OthersMoney, match=r"has set money of 0x\w+ aside, and your account is 0x\w+: whose it is"):
            await close_escrows(path, an_account(51), street.ledger)
        with pytest.raises(
            OthersMoney, match=f"at the ledger {LEDGER.operator.hex()}/USD; name its ticket with --ledger"
        ):
            await close_escrows(path, PAYER, BookLedger(street.clock, HouseLedger(bytes(32), "EUR")))
        street.ledger.fails = StorageError("away")
        with pytest.raises(StorageError):
            await close_escrows(path, PAYER, street.ledger)
        street.ledger.fails = None
        closed = await close_escrows(path, PAYER, street.ledger)
        assert (closed.escrows, closed.micro) == ((job.treasurer.payments.terms[0].escrow,), 999_000)
        assert closed.at_ms == street.clock.now_ms() + 60_000
        assert look_at(path).open_micro == 0 and open_at(path) == []
        assert await close_escrows(path, PAYER, street.ledger) == Closed((), 0, None)
        await settle(street, 62)
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - 1000

    run(story)


def test_a_voucher_that_does_not_arrive_is_sent_again_before_the_next_commit(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        failing = list[str]()

        def fault(operation: str, name: str) -> None:
            if f"{operation} {name}" in failing:
                raise OSError(errno.ENOSPC, "the disk is full")

        disk = MemoryDisk()

        def kept() -> list[int]:
            return [one.paid_micro for one in read_kept(disk, ACCOUNTS, list[Account], "shop-1") or ()]

        shop = await street.shop(1, FaultyDisk(disk, fault))
        job = Job(street, tmp_path / "run")
        await job.begin(shop)
        await street.clock.advance(10.0)
        failing.append("write accounts.new")
        await job.commit((shop, 10_000))
        assert kept() == [0]
        failing.clear()
        await settle(street, LOOK_EVERY_S)
        assert kept() == [1000]
        await job.treasurer.close()

    run(story)


def test_places_last_while_the_driver_lives_and_no_longer(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job, other = Job(street, tmp_path / "run"), Job(street, tmp_path / "other", number=61)
        await job.begin(shop)
        for _ in range(9):
            await settle(street, RENEW_EVERY_S - 5)
            for _ in range(20):
                await settle(street, 0.5)
        with pytest.raises(NotSecured):
            await other.treasurer.hold(await other.gang(shop), 1)
        for task in job.treasurer._tasks:
            task.cancel()
        for _ in range(11):
            await settle(street, 60)
        await other.treasurer.hold(await other.gang(shop), 1)

    run(story)


def test_a_node_gone_between_hold_and_escrow_costs_nothing(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.treasurer.hold(await job.gang(*shops), 2)
        await shops[1].endpoint.close()
        opening = asyncio.create_task(job.treasurer.open(1))
        while not opening.done():
            await settle(street, 1.0)
        assert opening.result() == {shops[0].node}
        assert any(said.startswith("Without shop-2") for said in job.said)
        with pytest.raises(Refused):
            other = Job(street, tmp_path / "other", number=61)
            await other.treasurer._quotes.hold(shops[0].node, shops[0].offer)
        shops.pop()

    run(story)


def test_clocks_that_are_put_right_change_nobodys_pay(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run")
        await job.begin(shop)
        work = shop.sales.work_for(a_key(60).node_id)
        work.ready(10.0, 100)
        for jump_ms, spent in ((-HOUR_MS, 4000), (HOUR_MS + 300_000, 8000)):
            street.clock.jump(jump_ms)
            for _ in range(4):
                await street.clock.advance(10.0)
                await job.commit((shop, 10_000))
                assert work.accepted(10_000) is None
            assert job.treasurer.payments.spent_micro == spent
        await job.treasurer.close()

    run(story)


def test_an_absurd_speed_is_paid_by_time_and_time_away_is_not_paid(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run")
        await job.begin(shop)
        job.treasurer.ready(shop.node, 1e-9, 100)
        await street.clock.advance(10.0)
        await job.commit((shop, 10**9))
        assert job.treasurer.payments.spent_micro == 1000, "ten seconds"
        job.treasurer.left(shop.node, "it went away")
        await settle(street, 3600)
        (again,) = await job.gang(shop)
        await job.treasurer.secure(again)
        job.treasurer.ready(shop.node, 1e-9, 100)
        await street.clock.advance(1.0)
        await job.commit((shop, 10**9))
        assert job.treasurer.payments.spent_micro == 1100, "and one"
        await job.treasurer.close()

    run(story)


async def through(street: Street, work: Coroutine[Any, Any, T]) -> T:
    """Its outcome, with all the time that it takes."""
    task = asyncio.create_task(work)
    while not task.done():
        await settle(street, 0.5)
    return task.result()


def test_answers_of_a_ledger_that_are_lost_open_no_second_escrow_and_hold_no_money(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        street.ledger.loses = 1
        await through(street, job.begin(shops[0]))
        assert len(street.ledger.book.escrows) == 1
        street.ledger.loses = 1
        (late,) = await job.gang(shops[1])
        await through(street, job.treasurer.secure(late))
        (escrow,) = street.ledger.book.escrows.values()
        assert escrow.payees == {shop.sales.terms.payee for shop in shops}
        street.ledger.loses = 1
        await job.treasurer.close()
        again = Job(street, job.folder)
        await again.treasurer.close_former()
        assert [one.closed for one in again.written.terms] == [True]
        await settle(street, 62)
        assert await street.ledger.balance(PAYER.address) == 10_000_000

    run(story)


def test_money_that_may_have_been_set_aside_is_asked_back(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run")
        await job.treasurer.hold(await job.gang(shop), 1)
        street.ledger.loses = 1 + len(ASKED_AGAIN_S)
        with pytest.raises(OutcomeUnknown):
            await through(street, job.treasurer.open(1))
        assert [one.closed for one in job.written.terms] == [True]
        await settle(street, 62)
        assert await street.ledger.balance(PAYER.address) == 10_000_000
        await Job(street, tmp_path / "other", number=61).begin(shop)

    run(story)


def test_where_a_node_refuses_the_cheapest_of_the_others_is_asked(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        full, fits = await street.shop(1, tmp_path / "1"), await street.shop(2, tmp_path / "2")
        dear = await street.shop(3, tmp_path / "3", price=Price(800_000))
        cheap = await street.shop(4, tmp_path / "4", price=Price(700_000))
        full.unheld[0] = 1
        job = Job(street, tmp_path / "run")
        gang, spares = await job.gang(full, fits), await job.gang(dear, cheap)
        assert {one.node for one in await job.treasurer.hold(gang, 2, spares)} == {fits.node, cheap.node}
        (said,) = job.said
        assert said.startswith("Without shop-1: All 1 slots of this node are taken")
        assert await job.treasurer.open(2) == {fits.node, cheap.node}
        await job.treasurer.close()

    run(story)


def test_who_goes_on_with_the_money_of_another_takes_no_dear_node_and_gives_none_of_it_back(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        cheap = await street.shop(1, tmp_path / "1")
        dear = await street.shop(2, tmp_path / "2", price=Price(36_000_000))
        job = Job(street, tmp_path / "run", signer=an_account(51))
        await job.begin(cheap)
        await job.kill()
        after = Job(street, job.folder, signer=an_account(51), account=None)
        assert [one.node for one in await after.treasurer.hold(await after.gang(cheap, dear), 1)] == [cheap.node]
        assert after.said[0].startswith("Without shop-2: it costs 36.00 an hour, and at 2 times what others take")
        other = await street.shop(3, tmp_path / "3", price=Price(400_000))
        held = await after.treasurer.hold(await after.gang(other, dear), 1)
        assert [one.node for one in held] == [other.node], "also where nobody is left whom it has paid"
        after.treasurer.left(other.node, "it is not needed")
        street.ledger.fails = StorageError("away")
        with pytest.raises(NotSecured, match="Only 0 of 1 nodes took what was set aside"):
            await after.treasurer.open(1)
        street.ledger.fails = None
        (term,) = after.written.terms
        assert not term.closed and not street.ledger.book.escrows[term.escrow].closing, "the next may have more luck"
        await after.treasurer.hold(await after.gang(cheap), 1)
        assert await after.treasurer.open(1) == {cheap.node}
        await after.treasurer.close()
        assert street.ledger.book.escrows[term.escrow].closing

    run(story)


def test_a_dear_node_that_comes_later_is_left(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        cheap = await street.shop(1, tmp_path / "1")
        dear = await street.shop(2, tmp_path / "2", price=Price(36_000_000))
        job = Job(street, tmp_path / "run")
        await job.begin(cheap)
        with pytest.raises(NotSecured, match=r"shop-2 is not worth its money: it costs 36.00 an hour, and at 2 times"):
            await job.treasurer.secure((await job.gang(dear))[0])
        await job.treasurer.close()
        await job.endpoint.close()
        resumed = Job(street, job.folder)
        gang = await resumed.gang(cheap, dear)
        assert [one.node for one in await resumed.treasurer.hold(gang, 1)] == [cheap.node]
        assert resumed.said[0].startswith("Without shop-2: it costs 36.00 an hour, and at 2 times what others take")
        await resumed.treasurer.close()
        await resumed.endpoint.close()
        needed = Job(street, job.folder)
        assert len(await needed.treasurer.hold(await needed.gang(cheap, dear), 2)) == 2, "better dear than not at all"
        await needed.treasurer.close()

    run(story)


def test_who_goes_on_with_an_escrow_leaves_a_dear_node(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        cheap = await street.shop(1, tmp_path / "1")
        dear = await street.shop(2, tmp_path / "2", price=Price(36_000_000))
        hand = an_account(51)
        job = Job(street, tmp_path / "run", signer=hand)
        await job.begin(cheap)
        await job.treasurer.leave()
        await job.endpoint.close()
        heir = Job(street, job.folder, signer=hand, account=None)
        gang = await heir.gang(cheap, dear)
        assert [one.node for one in await heir.treasurer.hold(gang, 1)] == [cheap.node]
        await heir.treasurer.close()

    run(story)


def test_a_node_that_claims_to_be_slow_is_left(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        honest, idle = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        job = Job(street, tmp_path / "run")
        await job.begin(honest, idle)
        job.treasurer.ready(idle.node, 1e-9, 100)
        for _ in range(3):
            assert job.treasurer.idle() == {}
            await street.clock.advance(50.0)
            await job.commit((honest, 50_000), (idle, 500))
        assert list(job.treasurer.idle()) == [idle.node]
        job.treasurer.left(idle.node, "it is not worth its money")
        await settle(street)
        with pytest.raises(NotSecured, match="shop-2 is not worth its money: it did 1500 tokens for 0.015, and others"):
            await job.treasurer.secure((await job.gang(idle))[0])
        await job.treasurer.close()

    run(story)


def test_nodes_that_come_first_and_at_once_share_an_escrow(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        payees = {1: 1, 2: 9, 3: 9}
        shops = [await street.shop(number, tmp_path / str(number), payee=payee) for number, payee in payees.items()]
        job = Job(street, tmp_path / "run")
        await asyncio.gather(*(job.treasurer.secure(node) for node in await job.gang(*shops)))
        (escrow,) = street.ledger.book.escrows.values()
        assert escrow.payees == {an_account(1).address, an_account(9).address}
        assert len(job.written.terms[0].nodes) == 3

    run(story)


def test_a_node_that_comes_where_there_is_no_money_is_without_and_another_is_not(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run")
        (node,) = await job.gang(shop)
        with pytest.raises(NoMoney):
            await job.treasurer.secure(node)
        street.ledger.give(PAYER.address, 1_000_000)
        await job.treasurer.secure(node)
        assert len(street.ledger.book.escrows) == 1
        await job.treasurer.close()
        assert all(one.closed for one in job.written.terms)

    run(story, deposit=500)


def test_a_node_that_comes_back_at_another_price_or_account(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        job = Job(street, tmp_path / "run")
        await job.begin(shop)
        await street.clock.advance(10.0)
        await job.commit((shop, 10_000))
        job.treasurer.left(shop.node, "it was started anew")
        await settle(street)
        shop.sales.terms = msgspec.structs.replace(shop.sales.terms, price=Price(720_000))
        shop.offer = msgspec.structs.replace(shop.offer, price=Price(720_000))
        await job.treasurer.secure((await job.gang(shop))[0])
        job.treasurer.ready(shop.node, 10.0, 100)
        await street.clock.advance(10.0)
        await job.commit((shop, 10_000))
        assert job.treasurer.payments.spent_micro == 1000 + 2000
        job.treasurer.left(shop.node, "it was started anew")
        await settle(street)
        shop.sales.terms = msgspec.structs.replace(shop.sales.terms, payee=an_account(9).address)
        with pytest.raises(NotSecured, match="shop-1 is paid at 0x.* now, and was paid at 0x"):
            await job.treasurer.secure((await job.gang(shop))[0])

    run(story)
