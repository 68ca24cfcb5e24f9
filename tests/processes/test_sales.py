"""What a node promises and is paid with: on its disk before anybody hears of it."""

from __future__ import annotations

import asyncio
import errno
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hub_world import a_key, an_offer
from money_world import LEDGER, PRICE, Shop, Street, an_account

from shoal.errors import BadRecord, StorageError
from shoal.identity import KeyPair
from shoal.ledger.commands import Close, Open, Redeem, TopUp
from shoal.ledger.escrows import State
from shoal.ledger.journal import verified
from shoal.market.earnings import UNCOUNTED_MAX, UNCOUNTED_UNPAID_MAX, UNPAID_S
from shoal.market.holds import Slots
from shoal.node.earned import Earned, read_earned
from shoal.node.sales import (
    ACCOUNTS,
    ASKS_BURST,
    ENDED,
    LAST_ROUND_S,
    PAYS_BURST,
    REDEEM_EVERY_S,
    SLOTS,
    TAKES_BURST,
    TELL_AGAIN_S,
    UNTAKEN_S,
    UNTAKEN_SHARE,
    Account,
    Ended,
    NotHeld,
    SalesDamaged,
    Work,
    read_kept,
)
from shoal.protocol.holds import BadHold, Deputy, Hold, HoldAsk, HoldGiven, HoldReclaim, HoldTake, Reclaim, sold_twice
from shoal.protocol.holds import Work as Kind
from shoal.protocol.messages import decode, encode, open_record, sign
from shoal.protocol.money import (
    BadVoucher,
    Closing,
    EscrowTerms,
    HouseLedger,
    Payee,
    PayingFor,
    SignedVoucher,
    ToppingUp,
    Voucher,
    sign_voucher,
)
from shoal.protocol.offers import Done, Offer
from shoal.protocol.prices import Price
from shoal.quantities.money import AMOUNT_MAX, share
from shoal.world import FaultyDisk, MemoryDisk, Refused, Request
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
    def __init__(
        self,
        street: Street,
        number: int = 60,
        ledger: HouseLedger = LEDGER,
        acts_for: KeyPair | None = None,
        kind: Kind = "train",
    ) -> None:
        self.key: KeyPair = a_key(number)
        deputy = sign(acts_for, Deputy(driver=self.key.node_id)).to_bytes() if acts_for else None
        self.endpoint = street.client(number)
        link = street.linker(self.endpoint)
        self.quotes = Quotes(
            acts_for or self.key, PAYER.address, PAYER, ledger, link, street.clock, kind, deputy=deputy
        )
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


def test_a_gateway_that_does_not_pay_is_served_for_a_minute_and_none_beyond_its_money(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")  # a hundred millionths a second
        client = Client(street, kind="serve")
        with pytest.raises(NotHeld, match="keeps no slot to serve in"):
            shop.sales.service_for(client.key.node_id)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop, amount_micro=10_000, payees=(Payee(an_account(1).address, 10_000),))
        await client.quotes.take(held, escrow)
        with pytest.raises(NotHeld, match="keeps no slot to train in"):
            shop.sales.work_for(client.key.node_id)
        service = shop.sales.service_for(client.key.node_id)
        service.ready()
        await street.clock.advance(60.0)
        service.served(16 * 60, 1_000_000)
        assert service.over() is None and service.earned_micro() == 6000
        await street.clock.advance(30.0)
        service.served(16 * 10, 1_000_000)
        assert service.over() == "its vouchers are for 0.00, and it has earned 0.007 by serving"
        with pytest.raises(NotHeld, match="by serving"):
            shop.sales.service_for(client.key.node_id)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 7000), last=False, deadline_s=5)
        assert service.over() is None
        service.served(16 * 10_000, 1_000_000)
        assert service.earned_micro() == 9000, "many at once, and no more than the time"
        service.ready()
        service.ended()
        service.ended()
        await street.clock.advance(5.0)
        service.ready()
        assert service.earned_micro() == 9000, "what was done at once then is no credit"
        service.served(16 * 50, 1_000_000)
        await street.clock.advance(5.0)
        assert service.earned_micro() == 9500 and service.over() is None
        await street.clock.advance(10.0)
        assert service.over() == "it has earned what was set aside for it, 0.01"

    run(story)


def test_a_node_that_serves_for_nothing_sells_no_slot_to_serve_in(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one", works=("train",))
        with pytest.raises(Refused, match="takes no serve jobs for money; it takes train"):
            await Client(street, kind="serve").quotes.hold(shop.node, shop.offer)

    run(story)


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


class Told:
    """What a client's machine hears of the places that it has."""

    def __init__(self, client: Client) -> None:
        self.words = list[HoldReclaim]()
        self.refuses = 0
        client.endpoint.handle(HoldReclaim.KIND, self._told)

    async def _told(self, request: Request) -> bytes:
        if self.refuses:
            self.refuses -= 1
            raise BadRecord("Nobody listens yet.")
        self.words.append(decode(HoldReclaim, request.body, request.version))
        return encode(Done(), request.version)


def test_an_owner_who_wants_the_machine_back_says_so_to_whoever_has_paid_for_it(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one", slots=3, reclaim_notice_ms=60_000)
        assert await shop.sales.give_notice() is None and shop.sales.closes_ms is None
        client, idle, late = Client(street), Client(street, 61), Client(street, 62)
        told = Told(client)
        held = await client.quotes.hold(shop.node, shop.offer)
        untaken = await idle.quotes.hold(shop.node, shop.offer)
        assert await shop.sales.give_notice() is None
        escrow = await client.escrow(shop)
        held = await client.quotes.take(held, escrow)
        told.refuses = 2
        assert await shop.sales.give_notice() == 60
        for _ in range(3):
            await settle(street, TELL_AGAIN_S)
        (word,) = told.words
        assert client.quotes.reclaimed(held, word) == 60
        with pytest.raises(Refused, match="owner takes it back in 54 s"):
            await late.quotes.hold(shop.node, shop.offer)
        with pytest.raises(Refused, match="owner takes it back"):
            await idle.quotes.take(untaken, await idle.escrow(shop))
        held = await client.quotes.take(held, escrow)
        assert shop.sales.taken == 1
        await client.quotes.release(held)
        assert shop.sales.taken == 0

    run(story)


def test_a_client_is_told_through_whoever_acts_for_it(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one", reclaim_notice_ms=60_000)
        deputy = Client(street, 61, acts_for=a_key(60))
        told = Told(deputy)
        held = await deputy.quotes.hold(shop.node, shop.offer)
        held = await deputy.quotes.take(held, await deputy.escrow(shop))
        assert await shop.sales.give_notice() == 60
        await settle(street)
        assert deputy.quotes.reclaimed(held, told.words[0]) == 60

    run(story)


def test_a_notice_is_the_nodes_own_and_as_long_as_it_promised(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one", slots=2, reclaim_notice_ms=60_000)
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)

        def word(by: int = 1, client: int = 60, seconds: int = 60) -> HoldReclaim:
            reclaim = Reclaim(client=a_key(client).node_id, from_ms=1000, until_ms=1000 + 1000 * seconds)
            return HoldReclaim(reclaim=sign(a_key(by), reclaim).to_bytes())

        assert client.quotes.reclaimed(held, word()) == 60
        for wrong in (word(by=2), word(client=61)):
            with pytest.raises(BadHold, match="somebody else's place"):
                client.quotes.reclaimed(held, wrong)
        with pytest.raises(BadHold, match="gives 59 s notice, and has promised 60 s"):
            client.quotes.reclaimed(held, word(seconds=59))
        with pytest.raises(BadHold, match="an hour is the most"):
            client.quotes.reclaimed(held, word(seconds=3601))
        dearer = msgspec.structs.replace(shop.offer, reclaim_notice_ms=120_000)
        with pytest.raises(BadHold, match="with less notice"):
            await Client(street, 61).quotes.hold(shop.node, dearer)

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
        client, escrow, work = await taken_to_train(street, shop)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 70), last=False, deadline_s=5)
        wish = Closing(escrow)
        await street.ledger.apply(Close(wish, PAYER.sign(wish.digest(LEDGER))))
        await until(street, lambda: street.ledger.book.escrows[escrow].redeemed_micro == 70)
        assert street.clock.now_ms() < street.ledger.book.escrows[escrow].ends_ms, "redeemed before the notice is over"
        await settle(street, 45)
        assert "goes back to its client now" in (work.accepted(10) or "")
        await until(street, lambda: shop.sales.accounts == [])

    run(story)


def test_the_last_vouchers_of_an_escrow_wait_for_no_round(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        wish = Closing(escrow)
        await street.ledger.apply(Close(wish, PAYER.sign(wish.digest(LEDGER))))
        await settle(street, REDEEM_EVERY_S)
        book = street.ledger.book.escrows
        await settle(street, (book[escrow].ends_ms - street.clock.now_ms()) / 1000 - 12)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 70), last=False, deadline_s=5)
        await settle(street)
        assert book[escrow].redeemed_micro == 70

    run(story)


def test_what_is_not_paid_is_not_forgotten_when_its_client_invites_anew(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        done = 0
        with pytest.raises(NotHeld, match="works for .* no longer: its vouchers are for 0.00"):
            while True:
                work = shop.sales.work_for(client.key.node_id)
                work.ready(10.0, 100)
                await street.clock.advance(1.0)
                work.accepted(1000)
                done += 1
        assert done == 3
        await client.quotes.pay(shop.node, voucher(escrow, shop, 300), last=False, deadline_s=5)
        assert shop.sales.work_for(client.key.node_id).accepted(0) is None

    run(story)


def test_work_ends_when_what_was_set_aside_is_earned(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop, payees=(Payee(shop.sales.terms.payee, 150),))
        await client.quotes.take(held, escrow)
        work = shop.sales.work_for(client.key.node_id)
        work.ready(10.0, 100)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 150), last=False, deadline_s=5)
        await street.clock.advance(10.0)
        assert work.accepted(1000) is None
        assert "it has earned what was set aside for it, 0.00015" in (work.accepted(1000) or "")

    run(story)


def test_money_that_is_promised_to_many_is_not_worked_for(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in (1, 2)]
        client = Client(street)
        held = [await client.quotes.hold(shop.node, shop.offer) for shop in shops]
        escrow = await client.escrow(*shops)
        works = list[Work]()
        for shop, one in zip(shops, held, strict=True):
            await client.quotes.take(one, escrow)
            works.append(shop.sales.work_for(client.key.node_id))
            works[-1].ready(10.0, 100)
            await client.quotes.pay(shop.node, voucher(escrow, shop, 1_000_000), last=False, deadline_s=5)
        await settle(street, REDEEM_EVERY_S)
        assert works[0].accepted(1000) is None
        assert "what was set aside for it, 0.00" in (works[1].accepted(1000) or "")
        with pytest.raises(Refused, match="may get 0.00 at most"):
            await client.quotes.pay(shops[1].node, voucher(escrow, shops[1], 1_000_000), last=False, deadline_s=5)
        third = await street.shop(3, tmp_path / "3")
        last = await client.quotes.hold(third.node, third.offer)
        with pytest.raises(Refused, match="has nothing for"):
            await client.quotes.take(last, escrow)

    run(story)


def test_a_voucher_for_what_was_added_counts_when_the_ledger_says_so(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop, payees=(Payee(an_account(1).address, AMOUNT_MAX),))
        await client.quotes.take(held, escrow)

        async def pay(micro: int) -> None:
            await client.quotes.pay(shop.node, voucher(escrow, shop, micro), last=False, deadline_s=5)

        with pytest.raises(Refused, match="may get 1.00 at most"):
            await pay(1_200_000)
        found = street.ledger.book.escrows[escrow]
        order = ToppingUp(escrow=escrow, amount_micro=500_000, cap_micro=0, expires_ms=found.ends_ms + 1, number=1)
        await street.ledger.apply(TopUp(order, PAYER.sign(order.digest(LEDGER))))
        street.ledger.fails = StorageError("away")
        with pytest.raises(Refused, match="away"):
            await pay(1_200_000)
        street.ledger.fails = None
        await pay(1_200_000)
        account = shop.sales.account(escrow)
        assert account is not None
        assert (account.paid_micro, account.most_micro, account.ends_ms) == (1_200_000, 1_500_000, found.ends_ms + 1)
        with pytest.raises(Refused, match="may get 1.50 at most"):
            await pay(1_500_001)

    run(story)


def test_who_promises_too_much_may_not_have_the_ledger_asked_for_ever(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "1")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        before = street.ledger.asked
        for _ in range(2 * TAKES_BURST):
            with pytest.raises(Refused):
                await client.quotes.pay(shop.node, voucher(escrow, shop, 1_000_001), last=False, deadline_s=5)
        assert street.ledger.asked - before < TAKES_BURST

    run(story)


def test_a_voucher_that_the_ledger_refuses_counts_for_nothing(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop, signer=an_account(51).address, cap_micro=150)
        await client.quotes.take(held, escrow)
        work = shop.sales.work_for(client.key.node_id)
        work.ready(10.0, 100)
        for amount in (100, 200, 300):
            await client.quotes.pay(shop.node, voucher(escrow, shop, amount, by=51), last=False, deadline_s=5)
            await street.clock.advance(1.0)
            assert work.accepted(1000) is None
        await settle(street, REDEEM_EVERY_S)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 400, by=51), last=False, deadline_s=5)
        assert "its vouchers are for 0.00" in (work.accepted(1000) or "")
        await client.quotes.pay(shop.node, voucher(escrow, shop, 400), last=False, deadline_s=5)
        await settle(street, REDEEM_EVERY_S)
        assert work.accepted(0) is None and street.ledger.book.escrows[escrow].redeemed_micro == 400

    run(story)


@pytest.mark.parametrize("amounts", [(100, 100), (100, 90), (90, 100)])
def test_a_node_says_when_another_is_paid_at_its_account(
    amounts: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number), payee=9) for number in (1, 2)]
        client = Client(street)
        held = [await client.quotes.hold(shop.node, shop.offer) for shop in shops]
        escrow = await client.escrow(shops[0])
        for shop, one, amount in zip(shops, held, amounts, strict=True):
            await client.quotes.take(one, escrow)
            work = shop.sales.work_for(client.key.node_id)
            work.ready(10.0, 100)
            await street.clock.advance(1.0)
            work.accepted(1000)
            await client.quotes.pay(shop.node, voucher(escrow, shop, amount), last=False, deadline_s=5)
            assert work.over() is None, "it takes the voucher for its own"
        for _ in range(4):
            await settle(street, REDEEM_EVERY_S)
        assert street.ledger.book.escrows[escrow].redeemed_micro == max(amounts)

    run(story)
    assert len(re.findall("another node is paid at 0x.* out of escrow", caplog.text)) == 1


def test_a_node_with_an_account_of_its_own_sees_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        escrow = await client.escrow(shop)
        await client.quotes.take(await client.quotes.hold(shop.node, shop.offer), escrow)
        street.ledger.loses = 1
        await client.quotes.pay(shop.node, voucher(escrow, shop, 50), last=False, deadline_s=5)
        for _ in range(4):
            await settle(street, REDEEM_EVERY_S)
        await street.close()  # as killed, and started anew
        street.shops.clear()
        again = await street.shop(1, tmp_path / "one")
        await street.ledger.apply(Redeem(voucher(escrow, again, 80)))  # for the node, as whoever asks for the rest does
        wish = Closing(escrow)
        await street.ledger.apply(Close(wish, PAYER.sign(wish.digest(LEDGER))))
        for _ in range(4):
            await settle(street, REDEEM_EVERY_S)
        assert street.ledger.book.escrows[escrow].redeemed_micro == 80

    run(story)
    assert "another node" not in caplog.text


def test_a_slot_is_not_kept_for_ever_for_keys_that_cost_nothing(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        kept_s, began_s = 0.0, street.clock.monotonic()
        for number in range(60, 120):
            client = Client(street, number)
            try:
                await client.quotes.hold(shop.node, shop.offer)
                kept_s += HOLD_MS / 1000
            except Refused as refused:
                assert "were held from your address for longer than 120 s and not taken; ask again in" in str(refused)
            await settle(street, HOLD_MS / 1000)
        passed_s = street.clock.monotonic() - began_s
        assert UNTAKEN_S <= kept_s <= UNTAKEN_S + UNTAKEN_SHARE * passed_s
        await settle(street, 200)
        for number in range(120, 140):  # whoever takes or gives back what it holds has done nothing
            client = Client(street, number)
            held = await client.quotes.hold(shop.node, shop.offer)
            if number % 2:
                held = await client.quotes.take(held, await client.escrow(shop))
            await client.quotes.release(held)
            await settle(street, 2)

    run(story)


def test_questions_of_strangers_cost_a_node_little(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        await client.quotes.release(held)
        asked = street.ledger.asked
        for _ in range(ASKS_BURST - 2):
            with pytest.raises(Refused, match="No slot is held for"):
                await client.quotes.take(held, bytes(32))
        with pytest.raises(Refused, match="came too often"):
            await client.quotes.take(held, bytes(32))
        assert street.ledger.asked == asked
        await street.clock.advance(60)
        held = await client.quotes.hold(shop.node, shop.offer)
        for _ in range(TAKES_BURST):
            with pytest.raises(Refused, match="no such escrow"):
                await client.quotes.take(held, bytes(32))
        with pytest.raises(Refused, match="paid for came too often"):
            await client.quotes.take(held, bytes(32))
        assert street.ledger.asked == asked + TAKES_BURST
        await street.clock.advance(10)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        signed = voucher(escrow, shop, 40)
        for _ in range(PAYS_BURST):
            await client.quotes.pay(shop.node, signed, last=True, deadline_s=5)
        with pytest.raises(Refused, match="A voucher came too often"):
            await client.quotes.pay(shop.node, signed, last=True, deadline_s=5)

    run(story)


def test_one_escrow_pays_for_one_client(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one", slots=2)
        client, other = Client(street), Client(street, 61)
        held = [await one.quotes.hold(shop.node, shop.offer) for one in (client, other)]
        escrow = await client.escrow(shop)
        await client.quotes.take(held[0], escrow)
        with pytest.raises(Refused, match="pays for what node shop-1 does for"):
            await other.quotes.take(held[1], escrow)

    run(story)


async def taken_to_train(street: Street, shop: Shop) -> tuple[Client, bytes, Work]:
    """A client that has taken a slot, its escrow, and what is done for it, at a hundred millionths a second."""
    client = Client(street)
    held = await client.quotes.hold(shop.node, shop.offer)
    escrow = await client.escrow(shop)
    await client.quotes.take(held, escrow)
    work = shop.sales.work_for(client.key.node_id)
    work.ready(10.0, 100)
    return client, escrow, work


def test_an_escrow_that_stands_in_the_journal_pays_for_no_stranger(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client, thief = Client(street), Client(street, 61)
        escrow = await client.escrow(shop)
        thief.quotes._signer = an_account(51)
        held = await thief.quotes.hold(shop.node, shop.offer)
        with pytest.raises(Refused, match=f"Escrow {escrow.hex()[:12]} does not pay for .*: nobody signed that who"):
            await thief.quotes.take(held, escrow)
        taken = PayingFor(escrow, client.key.node_id)
        overheard = HoldTake(escrow=escrow, signature=PAYER.sign(taken.digest(LEDGER)))
        link = await street.linker(thief.endpoint)(shop.node, shop.offer)
        with pytest.raises(Refused, match="does not pay for"):
            await link.request(HoldTake.KIND, encode(overheard))
        assert shop.sales.accounts == []
        await thief.quotes.release(held)
        await client.quotes.take(await client.quotes.hold(shop.node, shop.offer), escrow)

    run(story)


@pytest.mark.parametrize(("first", "then"), [("train", "serve"), ("serve", "train")])
def test_one_voucher_pays_not_for_training_and_for_serving(tmp_path: Path, first: Kind, then: Kind) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        escrow, client = b"", Client(street)
        for kind in (first, then, first):
            client.quotes._work = kind
            held = await client.quotes.hold(shop.node, shop.offer)
            escrow = escrow or await client.escrow(shop)
            held = await client.quotes.take(held, escrow)
            asked = shop.sales.work_for if kind == "train" else shop.sales.service_for
            if kind == then:
                with pytest.raises(NotHeld, match=f"set money aside of its own for what it is to {kind}"):
                    asked(client.key.node_id)
            else:
                asked(client.key.node_id)
            await client.quotes.release(held)

    run(story)


def test_contributions_that_nobody_accepts_are_made_no_longer(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client, _, work = await taken_to_train(street, shop)
        for _ in range(UNCOUNTED_MAX):
            assert work.made(100) is None
        assert work.accepted(0) is None
        for _ in range(3):
            assert work.made(100) is None
        assert "6 contributions did not count" in (work.made(100) or "")
        with pytest.raises(NotHeld, match="6 contributions did not count"):
            shop.sales.work_for(client.key.node_id)

    run(story)


def test_who_accepts_one_contribution_of_several_gets_no_more_than_three_for_one(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client, escrow, work = await taken_to_train(street, shop)
        made, counted = 0, 0
        while made < 100:
            for _ in range(4):
                await street.clock.advance(1.0)
                if work.made(1000) is not None:
                    break
                made += 1
            else:
                work.accepted(1000)
                counted += 1
                await client.quotes.pay(shop.node, voucher(escrow, shop, 100 * counted), last=False, deadline_s=5)
                continue
            break
        assert counted >= 1 and made <= 3 * counted + UNCOUNTED_MAX

    run(story)


def test_who_has_paid_nothing_gets_fewer_contributions_that_last_long(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client, escrow, work = await taken_to_train(street, shop)
        hour = 3_600_000
        for _ in range(UNCOUNTED_UNPAID_MAX):
            await street.clock.advance(1.0)
            assert work.made(hour) is None
        assert "4 contributions did not count" in (work.made(hour) or "")
        await client.quotes.pay(shop.node, voucher(escrow, shop, 1_000_000), last=False, deadline_s=5)
        assert "4 contributions did not count" in (work.over() or ""), "worth five hours, and paid less than three"

    run(story)


def test_what_is_not_paid_a_minute_after_it_counted_ends(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client, escrow, work = await taken_to_train(street, shop)
        await street.clock.advance(500.0)
        assert work.made(1_000_000) is None and work.accepted(1_000_000) is None
        await street.clock.advance(UNPAID_S - 1)
        assert work.made(1_000_000) is None
        await street.clock.advance(1.0)
        assert "its vouchers are for 0.00, and it has earned 0.05" in (work.over() or "")
        await client.quotes.pay(shop.node, voucher(escrow, shop, 50_000), last=False, deadline_s=5)
        assert work.over() is None

    run(story)


def test_who_follows_a_driver_keeps_its_places_and_learns_its_vouchers(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop, job = await street.shop(1, tmp_path / "one"), a_key(70)
        first, second = Client(street, 60, acts_for=job), Client(street, 61, acts_for=job)
        escrow = await first.escrow(shop)
        held = await first.quotes.take(await first.quotes.hold(shop.node, shop.offer), escrow)
        assert held.hold.client == job.node_id == shop.sales.client_of(first.key.node_id)
        newest = voucher(escrow, shop, 50)
        assert await first.quotes.pay(shop.node, newest, last=False, deadline_s=5) is None

        again = await second.quotes.hold(shop.node, shop.offer)
        assert again.hold.number == held.hold.number
        taken = await second.quotes.take(again, escrow)
        assert taken.hold.slot == held.hold.slot
        assert await second.quotes.pay(shop.node, voucher(escrow, shop, 40), last=False, deadline_s=5) == newest
        assert await second.quotes.pay(shop.node, voucher(escrow, shop, 60), last=False, deadline_s=5) is None

        thief = Client(street, 62)
        thief.quotes._deputy = sign(job, Deputy(driver=first.key.node_id)).to_bytes()
        with pytest.raises(Refused, match="for another"):
            await thief.quotes.hold(shop.node, shop.offer)
        thief.quotes._deputy = sign(thief.key, Deputy(driver=thief.key.node_id)).to_bytes()
        with pytest.raises(Refused, match="All 1 slots"):
            await thief.quotes.hold(shop.node, shop.offer)
        await second.quotes.release(taken)
        assert not shop.sales.keeps_for(job.node_id)

    run(story)


def test_work_ends_with_its_slot(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        held = await client.quotes.take(held, escrow)
        work = shop.sales.work_for(client.key.node_id)
        await client.quotes.release(held)
        assert "no slot is kept for its client any more" in (work.accepted(10) or "")

    run(story)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda escrow, shop: voucher(escrow, shop, 50, by=51), "nobody signed who may"),
        (lambda escrow, shop: voucher(escrow, shop, 50, ledger=HouseLedger(bytes(32), "EUR")), "nobody signed who may"),
        (lambda escrow, shop: voucher(b"x" * 32, shop, 50), "is not paid out of escrow"),
        (lambda escrow, shop: voucher(escrow, shop, 1_000_001), "may get 1.00 at most"),
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


def test_who_refuses_is_made_up_for_by_as_few_others_as_are_needed(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shops = [await street.shop(number, tmp_path / str(number)) for number in range(1, 7)]
        for full in (0, 2):
            shops[full].unheld[0] = 1
        offered = [(shop.node, shop.offer) for shop in shops]
        client, other, last = Client(street), Client(street, 61), Client(street, 62)
        held, troubles = await client.quotes.hold_all(offered[:2], 2, offered[2:])
        assert {one.name for one in held} == {"shop-2", "shop-4"}
        assert [trouble[:7] for trouble in troubles] == ["shop-1:", "shop-3:"]
        held, _ = await other.quotes.hold_all([offered[0], offered[4]], 1, offered[5:])
        assert [one.name for one in held] == ["shop-5"], "one is enough"
        with pytest.raises(NotSecured, match="2 nodes are needed, and 1 would keep a place"):
            await last.quotes.hold_all(offered[4:], 2, offered[:3])
        with pytest.raises(NotSecured, match="1 nodes are needed, and 0 would"):  # shop-6 is free, and asked by nobody
            await last.quotes.hold_all(offered[:1], 1, [offered[2], offered[1], offered[5]])
        assert [shop.sales.held for shop in shops] == [0, 1, 0, 1, 1, 0]

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


def test_who_asks_again_after_a_disk_failed_has_a_word_that_outlives_the_node() -> None:
    async def story(street: Street) -> None:
        failing, disk = ["sync slots"], MemoryDisk()

        def fault(call: str, name: str) -> None:
            if f"{call} {name}" in failing or (failing and call == "rename"):
                raise OSError(errno.EIO, "no such sector")

        shop = await street.shop(1, FaultyDisk(disk, fault))
        client = Client(street)
        for _ in range(2):
            with pytest.raises(Refused, match="keeping what this node has promised"):
                await client.quotes.hold(shop.node, shop.offer)
        failing.clear()
        held = await client.quotes.hold(shop.node, shop.offer)
        kept = read_kept(disk, SLOTS, Slots, "shop-1")
        assert kept is not None and [one.hold for one in kept.kept] == [held.hold]

    run(story)


def test_a_place_that_was_not_taken_is_given_back_without_a_writing_and_sold_with_one() -> None:
    async def story(street: Street) -> None:
        writings, disk = list[str](), MemoryDisk()

        def fault(call: str, name: str) -> None:
            if call == "rename":
                writings.append(name)

        def on_disk() -> tuple[list[bytes], int]:
            kept = read_kept(disk, SLOTS, Slots, "shop-1")
            assert kept is not None
            return [one.hold.client for one in kept.kept], len(kept.pending)

        shop = await street.shop(1, FaultyDisk(disk, fault))
        client, other = Client(street), Client(street, 61)
        held = await client.quotes.hold(shop.node, shop.offer)
        await client.quotes.release(held)
        assert shop.sales.held == 0 and writings == [SLOTS] and on_disk() == ([client.key.node_id], 0)
        sold = await other.quotes.hold(shop.node, shop.offer)
        assert writings == [SLOTS, SLOTS] and on_disk() == ([other.key.node_id], 1)
        assert sold_twice(held.envelope, sold.envelope) is None
        await other.quotes.release(await other.quotes.take(sold, await client.escrow(shop)))
        assert on_disk() == ([], 2), "who has paid is not kept waiting by a node that was killed"

    run(story)


def test_places_that_are_asked_for_at_once_share_a_writing() -> None:
    async def story(street: Street) -> None:
        going, writings = threading.Event(), list[str]()

        def fault(call: str, name: str) -> None:
            if (call, name) == ("rename", SLOTS):
                assert going.wait(30)
                writings.append(name)

        shop = await street.shop(1, FaultyDisk(MemoryDisk(), fault), slots=8)
        clients = [Client(street, number) for number in range(60, 68)]
        asking = asyncio.gather(*(one.quotes.hold(shop.node, shop.offer) for one in clients))
        try:
            async with asyncio.timeout(10):
                while shop.sales.held < 8:
                    await settle(street)
            assert not asking.done(), "nobody hears of what is not on the disk"
        finally:
            going.set()
        assert len({one.hold.slot for one in await asking}) == 8 and 1 <= len(writings) <= 2

    run(story)


def test_vouchers_that_come_at_once_share_a_writing_and_none_is_acknowledged_before() -> None:
    async def story(street: Street) -> None:
        going, writings, disk = threading.Event(), list[str](), MemoryDisk()

        def fault(call: str, name: str) -> None:
            if (call, name) == ("rename", ACCOUNTS):
                assert going.wait(30)
                writings.append(name)

        going.set()
        shop = await street.shop(1, FaultyDisk(disk, fault), slots=8)
        clients = [Client(street, number) for number in range(60, 68)]
        escrows = [await client.escrow(shop, amount_micro=1000) for client in clients]
        for client, escrow in zip(clients, escrows, strict=True):
            await client.quotes.take(await client.quotes.hold(shop.node, shop.offer), escrow)
        going.clear()
        writings.clear()
        vouchers = [voucher(escrow, shop, 9) for escrow in (*escrows, escrows[0])]
        paying = asyncio.gather(
            *(one.quotes.pay(shop.node, given, last=False, deadline_s=5)
              for one, given in zip((*clients, clients[0]), vouchers, strict=True))
        )  # fmt: skip
        try:
            async with asyncio.timeout(10):
                while sum(one.paid_micro for one in shop.sales.accounts) < 8 * 9:
                    await settle(street)
            assert not paying.done(), "not even who brings a voucher again hears of what is not on the disk"
        finally:
            going.set()
        assert len(await paying) == 9 and 1 <= len(writings) <= 2
        kept = read_kept(disk, ACCOUNTS, list[Account], "shop-1")
        assert kept is not None and [one.newest for one in kept] == vouchers[:8]

    run(story)


def test_a_disk_that_fails_once_ends_no_redeeming() -> None:
    async def story(street: Street) -> None:
        failing = list[str]()

        def fault(call: str, name: str) -> None:
            if f"{call} {name}" in failing:
                raise OSError(errno.EIO, "no such sector")

        disk = MemoryDisk()
        shop = await street.shop(1, FaultyDisk(disk, fault))
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 40), last=False, deadline_s=5)
        failing.append("write accounts.new")
        await until(street, lambda: shop.sales.accounts[0].redeemed_micro == 40)
        failing.clear()

        def redeemed() -> list[int]:
            return [one.redeemed_micro for one in read_kept(disk, ACCOUNTS, list[Account], "shop-1") or ()]

        assert redeemed() == [0]
        await until(street, lambda: redeemed() == [40])
        await client.quotes.pay(shop.node, voucher(escrow, shop, 50), last=False, deadline_s=5)
        await settle(street, REDEEM_EVERY_S)
        assert street.ledger.book.escrows[escrow].redeemed_micro == 50

    run(story)


def test_rounds_go_on_beside_last_vouchers(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        first = await client.escrow(shop)
        held = await client.quotes.take(held, first)
        wish = Closing(first)
        await street.ledger.apply(Close(wish, PAYER.sign(wish.digest(LEDGER))))
        street.clock.jump(61_000)
        await asyncio.gather(shop.sales._redeem(first), shop.sales._redeem(first))
        assert shop.sales.accounts == []

    run(story)


def test_a_ledger_that_forgets_an_escrow_costs_no_voucher(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 40), last=False, deadline_s=5)
        forgotten = street.ledger.book.escrows.pop(escrow)
        await settle(street, REDEEM_EVERY_S)
        street.ledger.book.escrows[escrow] = forgotten
        await settle(street, REDEEM_EVERY_S)
        assert street.ledger.book.escrows[escrow].redeemed_micro == 40

    run(story)


def test_strangers_cannot_fill_the_accounts_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.node.sales.ACCOUNTS_MAX", 2)

    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        escrows = list[bytes]()
        for owed in (40, 0, 50, 60):
            held = await client.quotes.hold(shop.node, shop.offer)
            escrows.append(await client.escrow(shop))
            if len(escrows) == 4:
                with pytest.raises(Refused, match="has vouchers of 2 escrows to redeem"):
                    await client.quotes.take(held, escrows[-1])
                break
            held = await client.quotes.take(held, escrows[-1])
            if owed:
                await client.quotes.pay(shop.node, voucher(escrows[-1], shop, owed), last=False, deadline_s=5)
            await client.quotes.release(held)
        assert [one.escrow for one in shop.sales.accounts] == [escrows[0], escrows[2]]

    run(story)


def test_a_node_that_is_paid_elsewhere_now(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        await client.quotes.pay(shop.node, voucher(escrow, shop, 40), last=False, deadline_s=5)
        shop.sales._rounds.cancel()  # killed
        await shop.endpoint.close()
        street.shops.clear()
        street.ledger.name = HouseLedger(b"x" * 32, "USD")
        elsewhere = await street.shop(1, tmp_path / "one", payee=9)
        await settle(street)
        await settle(street, REDEEM_EVERY_S)
        await street.close()
        street.shops.clear()
        street.ledger.name = LEDGER
        again = await street.shop(1, tmp_path / "one", payee=9)
        await until(street, lambda: [one.redeemed_micro for one in again.sales.accounts] == [40])
        assert await street.ledger.balance(elsewhere.sales.terms.payee) == 0
        assert await street.ledger.balance(shop.sales.terms.payee) == 36, "all but what is held back"
        street.ledger.name = HouseLedger(b"x" * 32, "USD")
        await settle(street, REDEEM_EVERY_S)
        assert len(again.sales.accounts) == 1
        street.clock.jump(3_600_000)  # a clock that is wrong, and is put right
        await settle(street, REDEEM_EVERY_S)
        street.clock.jump(-3_600_000)
        await settle(street, REDEEM_EVERY_S)
        assert len(again.sales.accounts) == 1
        street.clock.jump(25 * 3_600_000)
        await until(street, lambda: again.sales.accounts == [])  # it would have ended

    run(story)


def test_a_ledger_that_is_silent_holds_up_no_node_that_stops(tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrow = await client.escrow(shop)
        await client.quotes.take(held, escrow)
        street.ledger.silent = True
        await client.quotes.pay(shop.node, voucher(escrow, shop, 40), last=True, deadline_s=5)
        closing = asyncio.create_task(shop.sales.close())
        await settle(street)
        await settle(street, LAST_ROUND_S)
        assert closing.done()
        street.ledger.silent = False

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

            def kept() -> Earned:
                return read_earned(tmp_path, street.clock.now_ms())

            await until(street, lambda: kept().escrows[0].redeemed_micro == shop.sales.accounts[0].paid_micro)
            earned = kept()
            assert [(one.over, one.vouchers_micro) for one in earned.escrows if not one.over] == [(False, amount)]
            assert earned.escrows[0].coming_micro == share(amount, 100_000)
            await client.quotes.release(held)
            wish = Closing(escrow)
            await street.ledger.apply(Close(wish, PAYER.sign(wish.digest(LEDGER))))
            await until(street, lambda: shop.sales.accounts == [] and all(one.over for one in kept().escrows))
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
        left = read_kept(disk, ACCOUNTS, list[Account], "shop-1")
        assert left is not None and [one.escrow for one in left] == [escrow]
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


@pytest.mark.parametrize(
    "changed",
    [
        {"price": Price(1)}, {"price": Price(720_000)}, {"slot": 1}, {"work": "serve"},
        {"ledger": HouseLedger(b"x" * 32, "USD")}, {"until_ms": 1}, {"client": bytes(32)}, {"payer": bytes(20)},
        {"payee": an_account(9).address},
    ],
)  # fmt: skip
def test_a_node_that_promises_something_else_than_was_asked_is_not_taken(changed: dict[str, Any]) -> None:
    async def story(street: Street) -> None:
        node = street.network.endpoint(a_key(1))
        client, signed = Client(street), list[Hold]()

        async def answer(request: Request) -> bytes:
            now_ms = street.clock.now_ms()
            usual = Hold(
                slot=0, number=len(signed) + 1, client=client.key.node_id, work="train", from_ms=now_ms,
                until_ms=now_ms + HOLD_MS, price=PRICE, ledger=LEDGER, payer=PAYER.address, payee=an_account(1).address,
            )  # fmt: skip
            if request.kind == HoldTake.KIND:
                usual = msgspec.structs.replace(usual, escrow=decode(HoldTake, request.body, request.version).escrow)
            lies = request.kind == HoldTake.KIND or "payee" not in changed
            signed.append(msgspec.structs.replace(usual, **changed) if lies else usual)
            return encode(HoldGiven(hold=sign(a_key(1), signed[-1]).to_bytes()), request.version)

        for kind in (HoldAsk.KIND, HoldTake.KIND):
            node.handle(kind, answer)
        await node.listen("tcp://liar:0")
        envelope = an_offer(a_key(1), 1, name="liar", addresses=tuple(node.addresses), price=PRICE, ledger=LEDGER)
        offer = open_record(envelope, Offer)
        with pytest.raises(BadHold):
            held = await client.quotes.hold(node.node_id, offer)
            await client.quotes.take(held, bytes(32))
        assert ("payee" in changed) == bool(client.quotes._offers), "whoever keeps no place is not remembered"
        await node.close()

    run(story)


@pytest.mark.parametrize(
    ("asked_s", "taken_s", "told"),
    [
        (-76, 0, "another time than now, by -61 s"),
        (61, 0, "another time than now, by [+]61 s"),
        (-50, -20, "later than it had promised"),
        (0, 61, "another time than now, by [+]61 s"),
    ],
)
def test_a_place_is_kept_for_now_and_without_a_gap_so_that_a_node_that_sells_it_twice_is_convicted(
    asked_s: int, taken_s: int, told: str
) -> None:
    async def story(street: Street) -> None:
        await street.clock.advance(3600)
        node, client = street.network.endpoint(a_key(1)), Client(street)

        async def answer(request: Request) -> bytes:
            asked = request.kind == HoldAsk.KIND
            from_ms = street.clock.now_ms() + 1000 * (asked_s if asked else taken_s)
            hold = Hold(
                slot=0, number=1 if asked else 2, client=client.key.node_id, work="train", from_ms=from_ms,
                until_ms=from_ms + HOLD_MS, price=PRICE, ledger=LEDGER, payer=PAYER.address,
                payee=an_account(1).address, escrow=None if asked else bytes(32),
            )  # fmt: skip
            return encode(HoldGiven(hold=sign(a_key(1), hold).to_bytes()), request.version)

        for kind in (HoldAsk.KIND, HoldTake.KIND):
            node.handle(kind, answer)
        await node.listen("tcp://liar:0")
        envelope = an_offer(a_key(1), 1, name="liar", addresses=tuple(node.addresses), price=PRICE, ledger=LEDGER)
        with pytest.raises(BadHold, match=told):
            held = await client.quotes.hold(node.node_id, open_record(envelope, Offer))
            await client.quotes.take(held, bytes(32))
        await node.close()

    run(story)
