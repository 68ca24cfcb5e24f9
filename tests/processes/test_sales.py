"""What a node promises and is paid with: on its disk before anybody hears of it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hub_world import a_key
from money_world import LEDGER, PRICE, Shop, Street, an_account

from shoal.errors import StorageError
from shoal.identity import KeyPair
from shoal.ledger.commands import Close, Open
from shoal.ledger.escrows import State
from shoal.ledger.journal import verified
from shoal.node.earned import read_earned
from shoal.node.sales import ENDED, REDEEM_EVERY_S, Ended, NotHeld, SalesDamaged, read_kept
from shoal.protocol.money import (
    BadVoucher,
    Closing,
    EscrowTerms,
    HouseLedger,
    Payee,
    SignedVoucher,
    Voucher,
    sign_voucher,
)
from shoal.protocol.prices import Price
from shoal.quantities.money import share
from shoal.world import FaultyDisk, MemoryDisk, Refused
from shoal.world.quotes import HOLD_MS, NotSecured, Quotes

PAYER = an_account(50)
WORK = bytes(32)


def run(story: Callable[[Street], Awaitable[None]]) -> None:
    async def whole() -> None:
        street = Street()
        street.ledger.give(PAYER.address, 10_000_000)
        try:
            async with asyncio.timeout(60):
                await story(street)
        finally:
            await street.close()

    asyncio.run(whole())


class Client:
    def __init__(self, street: Street, number: int = 60, ledger: HouseLedger = LEDGER) -> None:
        self.key: KeyPair = a_key(number)
        self.quotes = Quotes(self.key, PAYER.address, ledger, street.linker(street.client(number)))
        self.street = street

    async def escrow(self, *shops: Shop, **changed: Any) -> bytes:
        usual: dict[str, Any] = {
            "payer": PAYER.address, "signer": PAYER.address, "cap_micro": 0, "auditor": PAYER.address,
            "amount_micro": 1_000_000, "fee_ppm": 0, "holdback_ppm": 100_000, "notice_ms": 60_000, "audit_ms": 1000,
            "expires_ms": self.street.clock.now_ms() + 3_600_000,
            "payees": tuple(Payee(shop.sales.terms.payee, 1_000_000) for shop in shops), "quote": bytes(32),
            "nonce": self.street.ledger.lines[-1].hash,
        }  # fmt: skip
        terms = EscrowTerms(**{**usual, **changed})
        await self.street.ledger.apply(Open(terms, PAYER.sign(terms.escrow_id(LEDGER))))
        return terms.escrow_id(LEDGER)


def voucher(escrow: bytes, shop: Shop, amount: int, ledger: HouseLedger = LEDGER, by: int = 50) -> SignedVoucher:
    return sign_voucher(
        an_account(by), ledger, Voucher(escrow=escrow, payee=shop.sales.terms.payee, amount_micro=amount, work=WORK)
    )


async def settle(street: Street, seconds: float = 0.0) -> None:
    """Let everything that is under way come to its end."""
    await street.clock.advance(seconds)
    for _ in range(5):
        await asyncio.sleep(0.01)  # writes are made in a thread


async def until(street: Street, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        await settle(street, 5.0)
    raise AssertionError("it never came to that")


def test_a_slot_is_held_paid_for_and_given_back(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client, other = Client(street), Client(street, 61)
        with pytest.raises(NotHeld, match=r"costs 0.36 USD an hour, and keeps no slot"):
            shop.sales.work_for(client.key.node_id)
        held = await client.quotes.hold(shop.node, shop.offer)
        with pytest.raises(Refused, match="All 1 slots of this node are taken"):
            await other.quotes.hold(shop.node, shop.offer)
        with pytest.raises(NotHeld):
            shop.sales.work_for(client.key.node_id)
        escrow = await client.escrow(shop)
        held = await client.quotes.take(held, escrow)
        work = shop.sales.work_for(client.key.node_id)
        work.ready(10.0, 100)
        await street.clock.advance(0.5)
        assert work.accepted(500) is None
        await client.quotes.pay(shop.node, voucher(escrow, shop, 50), last=False, deadline_s=5)
        await street.clock.advance(REDEEM_EVERY_S)
        await settle(street)
        assert street.ledger.book.escrows[escrow].redeemed_micro == 50
        await client.quotes.pay(shop.node, voucher(escrow, shop, 90), last=True, deadline_s=5)
        await settle(street)
        assert street.ledger.book.escrows[escrow].redeemed_micro == 90
        await client.quotes.release(held)
        await other.quotes.hold(shop.node, shop.offer)
        verified(street.ledger.lines, LEDGER)

    run(story)


def test_unpaid_work_ends(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        work = shop.sales.work_for(client.key.node_id)
        work.ready(10.0, 100)  # 100 millionths an hour's second
        for _ in range(3):
            await street.clock.advance(1.0)
            last = work.accepted(1000)
        assert last is not None and "its vouchers are for 0.00" in last

    run(story)


def test_work_ends_with_its_escrow(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        work = shop.sales.work_for(client.key.node_id)
        work.ready(10.0, 100)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 70), last=False, deadline_s=5)
        wish = Closing(escrow)
        await street.ledger.apply(Close(wish, PAYER.sign(wish.digest(LEDGER))))
        await settle(street, REDEEM_EVERY_S)
        assert street.ledger.book.escrows[escrow].redeemed_micro == 70, "redeemed before the notice is over"
        await settle(street, 45)
        assert "goes back to its client now" in (work.accepted(10) or "")
        await settle(street, 2 * REDEEM_EVERY_S)
        assert shop.sales.accounts == []

    run(story)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda escrow, shop: voucher(escrow, shop, 50, by=51), "nobody signed who may"),
        (lambda escrow, shop: voucher(escrow, shop, 50, ledger=HouseLedger(bytes(32), "EUR")), "nobody signed who may"),
        (lambda escrow, shop: voucher(b"x" * 32, shop, 50), "is not paid out of escrow"),
        (lambda escrow, shop: voucher(escrow, shop, 1_000_001), "may get 1.00 at most"),
        (lambda escrow, shop: voucher(escrow, shop, 39), "which has one for 0.00004"),
    ],
)
def test_vouchers_that_pay_nothing(tmp_path: Path, made: Any, why: str) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 40), last=False, deadline_s=5)
        with pytest.raises(Refused, match=why) as caught:
            await client.quotes.pay(shop.node, made(escrow, shop), last=False, deadline_s=5)
        assert caught.value.remote_code == BadVoucher.code
        other = Client(street, 61)
        other.quotes._offers[shop.node] = shop.offer
        with pytest.raises(Refused, match="is not paid out of escrow"):
            await other.quotes.pay(shop.node, voucher(escrow, shop, 60), last=False, deadline_s=5)

    run(story)


def test_either_enough_places_or_none(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in range(1, 4)]
        shops[2].unheld[0] = 1
        client, other = Client(street), Client(street, 61)
        wanted = [(shop.node, shop.offer) for shop in shops]
        with pytest.raises(NotSecured, match="3 nodes are needed, and 2 would keep a place. shop-3: .*1 in use"):
            await client.quotes.hold_all(wanted, 3)
        held, troubles = await other.quotes.hold_all(wanted, 2)
        assert len(held) == 2 and len(troubles) == 1

    run(story)


def test_what_was_promised_outlives_the_node(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        first = await street.shop(1, tmp_path / "one")
        client, other = Client(street), Client(street, 61)
        held = await client.quotes.hold(first.node, first.offer)
        escrow = await client.escrow(first)
        await client.quotes.take(held, escrow)
        await client.quotes.pay(first.node, voucher(escrow, first, 40), last=False, deadline_s=5)
        first.sales._rounds.cancel()  # killed: nothing is written or redeemed any more
        await first.endpoint.close()
        street.shops.clear()
        again = await street.shop(1, tmp_path / "one")
        with pytest.raises(Refused, match="taken: 1 held"):
            await other.quotes.hold(again.node, again.offer)
        assert again.sales.work_for(client.key.node_id) is not None
        await settle(street, REDEEM_EVERY_S)
        assert street.ledger.book.escrows[escrow].redeemed_micro == 40

    run(story)


def test_a_disk_that_fails_promises_nothing_twice() -> None:
    async def story(street: Street) -> None:
        failing = list[str]()

        def fault(call: str, name: str) -> None:
            if f"{call} {name}" in failing:
                raise OSError(errno.EIO, "no such sector")

        shop = await street.shop(1, FaultyDisk(MemoryDisk(), fault))
        client, other = Client(street), Client(street, 61)
        failing.append("sync slots")
        with pytest.raises(Refused) as caught:
            await client.quotes.hold(shop.node, shop.offer)
        assert caught.value.remote_code.startswith("SH-4")
        failing.clear()
        with pytest.raises(Refused, match="1 held"):  # it may stand on the disk
            await other.quotes.hold(shop.node, shop.offer)
        await street.clock.advance(HOLD_MS / 1000)
        await other.quotes.hold(shop.node, shop.offer)

    run(story)


def test_escrows_that_are_over_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.node.sales.ENDED_MAX", 2)

    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "sales")
        client = Client(street)
        escrows = list[bytes]()
        for amount in (50, 0, 70, 90):
            escrow = await client.escrow(shop)
            held = await client.quotes.take(await client.quotes.hold(shop.node, shop.offer), escrow)
            if amount:
                await client.quotes.pay(shop.node, voucher(escrow, shop, amount), last=True, deadline_s=5)
            await until(street, lambda: shop.sales.accounts[0].redeemed_micro == shop.sales.accounts[0].paid_micro)
            earned = read_earned(tmp_path, street.clock.now_ms())
            assert [(one.over, one.vouchers_micro) for one in earned.escrows if not one.over] == [(False, amount)]
            assert earned.escrows[0].coming_micro == share(amount, 100_000)
            await client.quotes.release(held)
            wish = Closing(escrow)
            await street.ledger.apply(Close(wish, PAYER.sign(wish.digest(LEDGER))))
            await until(street, lambda: shop.sales.accounts == [])
            escrows.append(escrow)
        await settle(street, 2)
        now_ms = street.clock.now_ms()
        earned = read_earned(tmp_path, now_ms)
        assert [one.escrow for one in earned.escrows] == [escrows[3], escrows[2]], "what paid nothing leaves no line"
        assert earned.payees == {shop.sales.terms.payee: "USD"}
        (total,) = earned.totals
        assert (total.currency, total.paid_micro, total.coming_micro) == ("USD", 160, 0), "audits are over"
        early = read_earned(tmp_path, earned.escrows[0].ends_ms)
        assert [one.coming_micro for one in early.escrows] == [9, 0]
        assert early.by_day(lambda at_ms: str(at_ms)) == {
            (str(one.ends_ms), "USD"): one.redeemed_micro for one in earned.escrows
        }  # fmt: skip
        (tmp_path / "sales" / "ended").write_bytes(b"\xff")
        with pytest.raises(SalesDamaged, match="ended, in which node"):
            read_earned(tmp_path, now_ms)

    run(story)


def test_a_node_killed_while_it_forgets_an_escrow_remembers_it_once() -> None:
    async def story(street: Street) -> None:
        failing = list[str]()

        def fault(call: str, name: str) -> None:
            if f"{call} {name}" in failing:
                raise OSError(errno.EIO, "no such sector")

        disk = MemoryDisk()
        shop = await street.shop(1, FaultyDisk(disk, fault))
        client = Client(street)
        escrow = await client.escrow(shop, expires_ms=street.clock.now_ms() + 90_000)
        await client.quotes.take(await client.quotes.hold(shop.node, shop.offer), escrow)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 50), last=True, deadline_s=5)
        await until(street, lambda: shop.sales.accounts[0].redeemed_micro == 50)
        failing.append("write accounts.new")
        await until(street, lambda: disk.info(ENDED) is not None)
        await settle(street, 2 * REDEEM_EVERY_S)
        assert [one.escrow for one in shop.sales.accounts] == [escrow]
        assert not shop.sales._rounds.done(), "it tries again"
        failing.clear()
        shop.sales._rounds.cancel()
        await shop.endpoint.close()
        street.shops.clear()
        again = await street.shop(1, disk)
        await until(street, lambda: again.sales.accounts == [])
        kept = read_kept(disk, ENDED, list[Ended], "shop-1")
        assert kept is not None and [(one.escrow, one.redeemed_micro, one.held_micro) for one in kept] == [
            (escrow, 50, 5)
        ]

    run(story)


def test_damaged_promises_are_told(tmp_path: Path) -> None:
    (tmp_path / "slots").write_bytes(b"\xff")

    async def story(street: Street) -> None:
        with pytest.raises(SalesDamaged, match=r"slots, in which node shop-1 keeps what it has promised"):
            await street.shop(1, tmp_path)

    run(story)


def test_a_ledger_that_is_away_costs_nothing(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        street.ledger.fails = StorageError("The ledger is away.")
        with pytest.raises(Refused, match="The ledger is away"):
            await client.quotes.take(held, escrow)
        street.ledger.fails = None
        await client.quotes.take(held, escrow)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 40), last=False, deadline_s=5)
        street.ledger.fails = StorageError("The ledger is away.")
        await settle(street, REDEEM_EVERY_S)
        street.ledger.fails = None
        await settle(street, REDEEM_EVERY_S)
        escrows = street.ledger.book.escrows
        assert escrows[escrow].redeemed_micro == 40 and escrows[escrow].state is State.OPEN

    run(story)


def test_a_client_that_asks_for_another_price_or_ledger(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one", price=Price(400_000))
        cheap = shop.offer.__class__(**{name: getattr(shop.offer, name) for name in shop.offer.__struct_fields__}
                                     | {"price": PRICE})  # fmt: skip
        with pytest.raises(Refused, match="costs 0.40 USD/h, and was asked for 0.36 USD/h: its price has changed"):
            await Client(street).quotes.hold(shop.node, cheap)
        elsewhere = Client(street, 61, HouseLedger(b"x" * 32, "USD"))
        with pytest.raises(NotSecured, match="paid at another ledger than yours"):
            await elsewhere.quotes.hold(shop.node, shop.offer)

    run(story)
