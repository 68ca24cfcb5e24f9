"""What a gateway pays: places for all or none, vouchers for what was served, and an end when the money has one."""

from __future__ import annotations

import asyncio
import errno
import re
from pathlib import Path

import msgspec
import pytest
from hub_world import a_key
from money_world import LEDGER, PAYER, Shop, Street, an_account, run

from shoal.errors import StorageError
from shoal.gateway.paying import Paying, PaymentsDamaged
from shoal.protocol.prices import Price
from shoal.purse.bills import FILE, Payments
from shoal.purse.escrow import top_up
from shoal.purse.purse import Funds
from shoal.world import DirectoryDisk, FaultyDisk, SeededDice
from shoal.world.disk import Fault
from shoal.world.quotes import NotSecured

JOB, RECEIPT = bytes(32), b"r" * 32
SECOND_US = 1_000_000


class Gateway:
    """What of a gateway has to do with money."""

    def __init__(
        self, street: Street, folder: Path, *, budget: int = 1_000_000, fault: Fault = lambda *_: None
    ) -> None:
        self.street, self.said = street, list[str]()
        self.endpoint = street.client(60)
        folder.mkdir(exist_ok=True)
        self.disk = FaultyDisk(DirectoryDisk(folder), fault)
        self.paying = Paying(
            Funds.own(street.ledger, PAYER, budget, audit_ms=1000),
            self.disk,
            key=a_key(60),
            endpoint=self.endpoint,
            link=street.linker(self.endpoint),
            clock=street.clock,
            dice=SeededDice(60),
            say=self.said.append,
            job=JOB,
        )

    async def begin(self, *shops: Shop) -> None:
        await self.paying.begin()
        await self.paying.take([(shop.node, shop.offer) for shop in shops])
        for shop in shops:
            self.paying.ready(shop.node)

    async def pay(self) -> list[int]:
        await self.paying.pay()
        for _ in range(5):
            await asyncio.sleep(0.01)  # vouchers go out beside
        return [one.paid_micro for one in self.written.terms[0].nodes.values()]

    @property
    def written(self) -> Payments:
        return msgspec.json.decode(self.disk.read(FILE), type=Payments)


def test_each_is_paid_for_what_it_served_and_the_bill_adds_up(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        gateway = Gateway(street, tmp_path / "gateway")
        paying = gateway.paying
        await gateway.begin(*shops)
        await street.clock.advance(20.0)
        one, other = (shop.node for shop in shops)
        paying.served(one, 16 * 4, SECOND_US, None)
        paying.served(other, 16 * 100, SECOND_US, None)
        assert await gateway.pay() == [400, 2000], "never more than the time"
        vouchers = [node.voucher for node in gateway.written.terms[0].nodes.values()]
        assert [each.voucher.work for each in vouchers if each] == [JOB, JOB]
        account = shops[0].sales.account(gateway.written.terms[0].escrow)
        assert account is not None and account.paid_micro == 400
        paying.served(one, -16, SECOND_US, RECEIPT)
        assert await gateway.pay() == [400, 2000], "what was signed stays"
        paying.served(one, 16 * 2, SECOND_US, RECEIPT)
        assert await gateway.pay() == [500, 2000]
        newest = gateway.written.terms[0].nodes[one.hex()].voucher
        assert newest is not None and newest.voucher.work == RECEIPT
        paying.let_go(one, "it died. Whatever")
        paying.served(one, 16, SECOND_US, None)  # of a ring that is closed after it was lost
        await paying.close()
        assert paying.bill is not None
        assert [(line.paid, line.reason) for line in paying.bill.nodes] == [(600, "it died"), (2000, "worked")]
        assert (paying.bill.charged, paying.bill.refunded) == (2600, 997_400)
        await street.clock.advance(62.0)
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - 2600

    run(story)


def test_places_are_taken_at_all_or_at_none_and_then_at_others(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2, 3)]
        shops[1].unheld[0] = 1
        gateway = Gateway(street, tmp_path / "gateway")
        with pytest.raises(NotSecured, match="2 nodes are needed, and 1 would keep a place. shop-2: All 1 slots"):
            await gateway.begin(*shops[:2])
        assert not gateway.paying.taken and not street.ledger.book.escrows
        await gateway.paying.take([(shop.node, shop.offer) for shop in (shops[0], shops[2])])
        assert gateway.paying.taken == {shops[0].node, shops[2].node}
        shops[1].unheld[0] = 0
        await gateway.paying.take([(shops[1].node, shops[1].offer)])
        (escrow,) = street.ledger.book.escrows.values()
        assert escrow.payees == {an_account(number).address for number in (1, 2, 3)}
        await gateway.paying.close()
        assert all(not shop.sales.held for shop in shops)

    run(story)


def test_money_is_warned_of_kept_for_what_is_under_way_and_then_used_up(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        gateway = Gateway(street, tmp_path / "gateway", budget=10_000)
        paying, told = gateway.paying, list[float]()
        await gateway.begin(shop)
        running = asyncio.create_task(paying.run(lambda: told.append(street.clock.monotonic())))
        began = street.clock.monotonic()
        for _ in range(120):
            paying.served(shop.node, 16, SECOND_US, None)
            await street.clock.advance(1.0)
            await asyncio.sleep(0.005)
            if paying.purse.left_micro > 1000:
                assert not paying.closing
        assert paying.spent and told[0] - began >= 90 and told[-1] - began >= 100
        assert paying.closing.startswith("The budget of 0.01 USD is used up; add to it with `shoal jobs fund`")
        warned, closed = gateway.said
        assert re.match(r"0.001\d* USD of the budget is left, enough for 1\d.\d s of work at least; then nodes", warned)
        assert closed.endswith("New requests are refused, and those under way go on for as long as it lasts.")
        running.cancel()
        await paying.close()
        assert paying.bill is not None and (paying.bill.charged, paying.bill.refunded) == (10_000, 0)

    run(story)


def test_money_that_is_added_has_nodes_taken_again(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        gateway = Gateway(street, tmp_path / "gateway", budget=10_000)
        paying, changes = gateway.paying, list[str]()
        await gateway.begin(shop)
        running = asyncio.create_task(paying.run(lambda: changes.append(paying.closing.partition(";")[0])))

        async def serve(seconds: int, *, idle: bool = False) -> None:
            for _ in range(seconds):
                paying.served(shop.node, 0 if idle else 16, SECOND_US, None)
                await street.clock.advance(1.0)
                await asyncio.sleep(0.005)

        async def add(micro: int) -> None:
            await top_up(gateway.written.terms[0], street.ledger, PAYER, micro, street.clock)

        await serve(86)
        await add(2_000)
        await serve(10)
        assert not paying.closing and paying.purse.budget_micro == 12_000, "before it would have closed it asked"
        while not paying.spent:
            await serve(1)
        used_up = "The budget of 0.012 USD is used up"
        assert changes[0] == used_up
        paying.let_go(shop.node, "worked until the budget was used up")
        await serve(4, idle=True)
        assert set(changes) == {used_up}
        await add(5_000)
        while paying.closing:
            await serve(1, idle=True)
        assert changes[-1] == "" and gateway.said[-1] == "Nodes that cost something are taken again."
        await paying.take([(shop.node, shop.offer)])
        paying.ready(shop.node)
        await serve(10)
        running.cancel()
        await paying.close()
        assert paying.bill is not None
        assert paying.bill.quoted == 17_000 and 12_900 <= paying.bill.charged <= 13_200
        await street.clock.advance(62.0)
        assert await street.ledger.balance(PAYER.address) == 10_000_000 - paying.bill.charged

    run(story)


def test_what_a_killed_gateway_set_aside_comes_back_and_counts_no_more(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        killed = Gateway(street, tmp_path / "gateway")
        await killed.begin(shop)
        await street.clock.advance(10.0)
        killed.paying.served(shop.node, 16 * 5, SECOND_US, None)
        await killed.pay()
        for task in killed.paying.purse._tasks:
            task.cancel()
        await killed.endpoint.close()
        again = Gateway(street, tmp_path / "gateway", budget=2_000_000)
        street.ledger.fails = StorageError("away")
        with pytest.raises(StorageError):
            await again.paying.begin()
        street.ledger.fails = None
        await again.begin(shop)
        said = "it has paid 0.0005 USD, and 0.9995 was asked back."
        assert [one.partition(": ")[2] for one in again.said] == [said]
        first, second = street.ledger.book.escrows.values()
        assert first.closing and first.redeemed_micro == 500 and second.amount_micro == 2_000_000
        await again.paying.close()
        assert again.paying.bill is not None and again.paying.bill.quoted == again.paying.bill.refunded == 2_000_000

    run(story)


def test_what_could_not_be_written_down_is_paid_once_it_can(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        full = list[str]()

        def fault(call: str, name: str) -> None:
            if full and call == "write":
                raise OSError(errno.ENOSPC, "no space left")

        shop = await street.shop(1, tmp_path / "1")
        gateway = Gateway(street, tmp_path / "gateway", fault=fault)
        await gateway.begin(shop)
        await street.clock.advance(10.0)
        gateway.paying.served(shop.node, 16 * 5, SECOND_US, None)
        full.append("yes")
        for _ in range(2):
            assert await gateway.pay() == [0]
        assert [said.partition(":")[0] for said in gateway.said] == ["Nodes are not paid at the moment"]
        account = shop.sales.account(gateway.written.terms[0].escrow)
        assert account is not None and account.paid_micro == 0, "no voucher is out that is not on the disk"
        full.clear()
        assert await gateway.pay() == [500]
        account = shop.sales.account(gateway.written.terms[0].escrow)
        assert account is not None and account.paid_micro == 500
        await gateway.paying.close()

    run(story)


def test_a_file_that_cannot_be_read_and_an_offer_at_another_ledger(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        gateway = Gateway(street, tmp_path / "gateway")
        assert gateway.paying.takes(shop.offer)
        other = msgspec.structs.replace(LEDGER, currency="EUR")
        assert not gateway.paying.takes(msgspec.structs.replace(shop.offer, price=Price(1, "EUR"), ledger=other))
        (tmp_path / "gateway" / FILE).write_text("{")
        with pytest.raises(PaymentsDamaged, match="payments.json, which says what was set aside and paid for serving"):
            Gateway(street, tmp_path / "gateway")

    run(story)
