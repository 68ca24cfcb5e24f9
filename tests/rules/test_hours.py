"""Hours that are bought in advance: whatever comes between the steps, no hour has two holders, no Hold convicts an
honest node, and every unit of money ends where it belongs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from shoal.identity import Envelope, KeyPair
from shoal.identity.accounts import AccountKey
from shoal.ledger.book import Book
from shoal.ledger.commands import Deposit, Open, Redeem
from shoal.ledger.escrows import Escrow, EscrowLocked, State
from shoal.ledger.moves import MoneyRefused, account
from shoal.market.bids import FOR_CLAIMS_MS, Step, next_step, say_unfunded, signed, terms_for
from shoal.market.holds import HoldRefused, Slots, Terms, ask, give_back, held, hold_of, keep, take
from shoal.market.hours import Sale, claim, hour_at, promise, sold
from shoal.protocol.holds import Hold, HoldAsk, Release, open_hold, sold_twice
from shoal.protocol.messages import sign
from shoal.protocol.money import Admission, Closing, Finished, HouseLedger, Voucher, sign_voucher
from shoal.protocol.orders import HOUR_MS, Ask, Bid, Block, NodeClass, OrderTerms, bid_quote
from shoal.protocol.prices import Price

NODE, AUCTIONEER, STRANGER, *BUYERS = (KeyPair.from_seed(bytes([number] * 32)) for number in range(1, 7))
SELLER, *PAYERS = (AccountKey(bytes([number] * 32)) for number in range(1, 5))
LEDGER = HouseLedger(bytes(32), "USD")
TERMS = Terms(price=Price(350_000), ledger=LEDGER, payee=SELLER.address)
BEGIN_MS = 500_000 * HOUR_MS
MONEY = 10_000_000
BATCH_MS = 60_000


def order(start_ms: int, batch: int, limit: int, now_ms: int = BEGIN_MS) -> OrderTerms:
    block = Block(of=NodeClass(device="H100", memory_gib=80), start_ms=start_ms, ledger=LEDGER)
    return OrderTerms(
        auctioneer=AUCTIONEER.node_id, batch=batch, expires_ms=now_ms + BATCH_MS, sequence=batch, block=block,
        limit_micro=limit,
    )  # fmt: skip


@dataclass
class Order:
    """A bid, what is set aside for it, and what became of it."""

    buyer: int
    bid: Bid
    escrow: bytes
    sale: Sale | None = None
    hold: Envelope | None = None
    passed_on: bool = False
    earned: int = 0

    @property
    def owed(self) -> dict[bytes, int]:
        return {SELLER.address: self.sale.price_micro} if self.sale is not None and not self.passed_on else {}


@dataclass
class Scene:
    """A node, buyers and a ledger, all of which do as the rules say."""

    slots: int = 1
    now_ms: int = BEGIN_MS
    batch: int = 1
    signed: list[Envelope] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.terms, self.kept, self.book = replace_terms(self.slots), Slots(), Book(LEDGER)
        self.book.at(self.now_ms)
        for number, payer in enumerate(PAYERS):
            self.book.apply(Deposit(payer.address, MONEY, str(number)))

    def pass_time(self, passed_ms: int) -> None:
        self.now_ms = max(0, self.now_ms + passed_ms)
        self.book.at(self.now_ms)
        for command in self.book.due():
            self.book.apply(command)

    def promise(self, start_ms: int, batch: int | None = None) -> None:
        asked = Ask(terms=order(start_ms, batch or self.batch, 1, self.now_ms), payee=SELLER.address)
        self.kept = promise(self.kept, asked, bytes(32), "ticket", self.terms, self.now_ms)

    def bid(self, buyer: int, start_ms: int, limit: int = 400_000) -> Order:
        terms, key = order(start_ms, self.batch, limit, self.now_ms), BUYERS[buyer].node_id
        money = terms_for(terms, 1, key, PAYERS[buyer].address, len(self.orders).to_bytes(32))
        name = money.escrow_id(LEDGER)
        self.book.apply(Open(money, PAYERS[buyer].sign(name)))
        bid = Bid(terms=terms, blocks=1, escrow=name)
        assert say_unfunded(bid, key, self.book.escrows[name]) is None
        self.orders.append(Order(buyer, bid, name))
        return self.orders[-1]

    def sell(self, bought: Order, price: int = 300_000, seller: bytes = NODE.node_id) -> Sale:
        bought.sale = Sale(
            self.batch, bought.bid.terms.block.start_ms, seller, BUYERS[bought.buyer].node_id, price, SELLER.address,
            bought.escrow, bid_quote(bought.bid.terms, 1, BUYERS[bought.buyer].node_id),
        )  # fmt: skip
        self.batch += 1
        return bought.sale

    def step(self, one: Order) -> Step | None:
        found = next_step(self.book.escrows[one.escrow], one.owed, bytes(32))
        if found is not None:
            try:
                self.book.apply(signed(found, PAYERS[one.buyer], LEDGER))
            except EscrowLocked:
                return None
        return found

    def settle(self, one: Order) -> list[type[Step]]:
        steps = list[type[Step]]()
        while (found := self.step(one)) is not None:
            steps.append(type(found))
        return steps

    def claim(self, one: Order, escrow: Escrow | None = None) -> Hold:
        assert one.sale is not None
        hold = claim(self.kept, one.sale, escrow or self.book.escrows[one.escrow], self.terms, self.now_ms)
        one.hold = sign(NODE, hold)
        if one.hold not in self.signed:
            self.kept = sold(self.kept, one.sale, hold, one.hold.record_id, self.now_ms)
            self.signed.append(one.hold)
        return hold

    def ask(self, client: KeyPair, price: Price | None = None, payer: bytes = PAYERS[0].address) -> Hold:
        wish = HoldAsk(work="train", payer=payer, price=price or TERMS.price, ledger=LEDGER, lifetime_ms=15_000)
        return self._sign(ask(self.kept, wish, client.node_id, self.terms, 0, self.now_ms))

    def take(self, client: KeyPair, escrow: Escrow) -> Hold:
        return self._sign(take(self.kept, client.node_id, escrow, self.terms, self.now_ms))

    def give_back(self, client: KeyPair, hold: Hold) -> None:
        release = Release(node=NODE.node_id, slot=hold.slot, number=hold.number)
        packed = sign(client, release).to_bytes()
        self.kept = give_back(self.kept, release, client.node_id, packed, self.now_ms)

    def _sign(self, hold: Hold) -> Hold:
        envelope = sign(NODE, hold)
        if envelope not in self.signed:
            self.kept = keep(self.kept, hold, envelope.record_id)
            self.signed.append(envelope)
        return hold

    def balance(self, buyer: int) -> int:
        return self.book.balances[account(PAYERS[buyer].address)]


def replace_terms(slots: int) -> Terms:
    return replace(TERMS, slots=slots)


def bought(price: int = 300_000) -> tuple[Scene, Order]:
    """The hour after the next is sold, for less than its buyer would have paid, and claimed."""
    scene = Scene()
    scene.promise(BEGIN_MS + 2 * HOUR_MS)
    one = scene.bid(0, BEGIN_MS + 2 * HOUR_MS)
    scene.sell(one, price)
    scene.settle(one)
    scene.claim(one)
    return scene, one


def test_a_trade_ends_as_an_escrow_of_just_so_much_and_a_hold_of_that_hour() -> None:
    scene = Scene()
    start_ms = BEGIN_MS + 2 * HOUR_MS
    scene.promise(start_ms)
    one = scene.bid(0, start_ms)
    assert scene.balance(0) == MONEY - 400_000
    scene.sell(one)
    assert scene.settle(one) == [Admission, Admission] and scene.balance(0) == MONEY - 400_000
    scene.pass_time(BATCH_MS)
    assert scene.settle(one) == [Voucher]
    escrow = scene.book.escrows[one.escrow]
    assert escrow.amount_micro - escrow.redeemed_micro == escrow.most_for(SELLER.address) == 300_000
    assert scene.balance(0) == MONEY - 310_000, "a tenth of what goes back is held back until the end"
    hold = scene.claim(one)
    assert (hold.from_ms, hold.until_ms) == (start_ms, start_ms + HOUR_MS)
    assert (hold.price, hold.escrow, hold.payee) == (Price(300_000), one.escrow, SELLER.address)
    assert scene.claim(one) == hold and len(scene.signed) == 1, "asked again, the same"
    scene.pass_time(10 * HOUR_MS)
    assert scene.balance(0) == MONEY, "nobody came, and nothing was paid"


def test_a_bid_that_bought_nothing_has_its_money_when_it_has_expired() -> None:
    scene = Scene()
    one = scene.bid(0, BEGIN_MS + 2 * HOUR_MS)
    assert scene.settle(one) == [Finished, Closing]
    scene.pass_time(BATCH_MS)
    assert scene.balance(0) == MONEY


def test_the_money_of_a_bid_is_there_until_its_batch_had_to_be_closed() -> None:
    scene = Scene()
    one, mine = scene.bid(0, BEGIN_MS + 2 * HOUR_MS), AccountKey(bytes([9] * 32))
    scene.book.apply(signed(Admission(one.escrow, mine.address, 400_000), PAYERS[0], LEDGER))
    scene.pass_time(BATCH_MS - 1)
    with pytest.raises(EscrowLocked):
        voucher = Voucher(escrow=one.escrow, payee=mine.address, amount_micro=1, work=bytes(32))
        scene.book.apply(Redeem(sign_voucher(PAYERS[0], LEDGER, voucher)))
    other = scene.bid(1, BEGIN_MS + 2 * HOUR_MS)
    assert scene.settle(other) == [Finished, Closing] and scene.balance(1) == MONEY - 400_000
    scene.pass_time(BATCH_MS - 1)
    assert scene.balance(1) == MONEY - 400_000
    scene.pass_time(1)
    assert scene.balance(1) == MONEY
    soon = replace(order(BEGIN_MS + HOUR_MS, 1, 1), expires_ms=BEGIN_MS + 3 * HOUR_MS)
    assert terms_for(soon, 1, bytes(32), bytes(20), bytes(32)).locked_until_ms == BEGIN_MS + HOUR_MS, (
        "a bid for an hour that has begun counts in no batch"
    )


def test_a_node_works_for_no_escrow_that_is_locked_meanwhile() -> None:
    scene, one = bought()
    escrow = scene.book.escrows[one.escrow]
    assert one.sale is not None
    locked = replace(escrow.terms, locked_until_ms=one.sale.start_ms + 1)
    scene.pass_time(one.sale.start_ms - BEGIN_MS)
    scene.ask(BUYERS[0], Price(300_000))
    with pytest.raises(HoldRefused, match="is locked: it pays nothing for the first 1 ms"):
        scene.take(BUYERS[0], replace(escrow, terms=locked))
    scene.take(BUYERS[0], escrow)


def test_who_pays_and_is_paid_at_one_account_gets_the_rest_with_the_end() -> None:
    scene = Scene()
    one = scene.bid(0, BEGIN_MS + 2 * HOUR_MS)
    escrow = scene.book.escrows[one.escrow]
    step = next_step(escrow, {PAYERS[0].address: 300_000}, bytes(32))
    assert step == Admission(one.escrow, PAYERS[0].address, 400_000)
    scene.book.apply(signed(step, PAYERS[0], LEDGER))
    assert next_step(scene.book.escrows[one.escrow], {PAYERS[0].address: 300_000}, bytes(32)) is None


def test_of_what_goes_back_no_fee_is_taken() -> None:
    scene = Scene()
    terms, key = order(BEGIN_MS + 2 * HOUR_MS, 1, 400_000), BUYERS[0].node_id
    money = terms_for(terms, 1, key, PAYERS[0].address, bytes(32), fee_ppm=50_000)
    name = money.escrow_id(LEDGER)
    scene.book.apply(Open(money, PAYERS[0].sign(name)))
    assert say_unfunded(Bid(terms=terms, blocks=1, escrow=name), key, scene.book.escrows[name]) is None
    step = next_step(scene.book.escrows[name], {SELLER.address: 300_000}, bytes(32))
    assert step == Admission(name, SELLER.address, 300_000)
    scene.book.apply(signed(step, PAYERS[0], LEDGER))
    assert next_step(scene.book.escrows[name], {SELLER.address: 300_000}, bytes(32)) is None
    scene.pass_time(10 * HOUR_MS)
    assert scene.balance(0) == MONEY


def test_money_that_is_not_for_this_bid_is_none() -> None:
    scene = Scene()
    one = scene.bid(0, BEGIN_MS + 2 * HOUR_MS)
    escrow, key = scene.book.escrows[one.escrow], BUYERS[0].node_id
    assert "no escrow of the name" in (say_unfunded(one.bid, key, None) or "")
    for bid, trader in (
        (replace(one.bid, blocks=2), key),
        (replace(one.bid, terms=replace(one.bid.terms, batch=2)), key),
        (one.bid, BUYERS[1].node_id),
    ):
        assert "is not for this bid" in (say_unfunded(bid, trader, escrow) or "")
    scene.settle(one)
    assert "not untouched any more" in (say_unfunded(one.bid, key, scene.book.escrows[one.escrow]) or "")


def test_the_hour_is_its_buyers_and_nobody_elses() -> None:
    scene, one = bought()
    assert one.sale is not None
    start_ms = one.sale.start_ms
    scene.pass_time(start_ms - BEGIN_MS - 100_000)
    scene.ask(STRANGER, payer=PAYERS[1].address)
    other = scene.bid(1, start_ms + HOUR_MS)
    before = scene.take(STRANGER, granted(scene, other))
    assert before.until_ms == start_ms, "what is sold now ends before the hour begins"
    scene.pass_time(90_000)
    with pytest.raises(HoldRefused, match="taken"):
        scene.ask(BUYERS[1])
    scene.give_back(STRANGER, before)
    with pytest.raises(HoldRefused, match="An hour of this node begins that it has promised"):
        scene.ask(STRANGER)
    scene.pass_time(20_000)
    with pytest.raises(HoldRefused, match="taken"):
        scene.ask(STRANGER)
    with pytest.raises(HoldRefused, match="costs 0.30 USD/h, and was asked for 0.35"):
        scene.ask(BUYERS[0])
    scene.ask(BUYERS[0], Price(300_000))
    hold = scene.take(BUYERS[0], scene.book.escrows[one.escrow])
    assert (hold.until_ms, hold.price) == (start_ms + HOUR_MS, Price(300_000))
    scene.pass_time(HOUR_MS - 20_000)
    assert scene.take(BUYERS[0], scene.book.escrows[one.escrow]).until_ms == start_ms + HOUR_MS
    scene.pass_time(20_000)
    with pytest.raises(HoldRefused, match="No slot is held"):
        scene.take(BUYERS[0], scene.book.escrows[one.escrow])
    scene.ask(STRANGER)
    assert_honest(scene)


def granted(scene: Scene, one: Order) -> Escrow:
    """Its whole escrow for the node's account, as if it was for a job."""
    scene.book.apply(signed(Admission(one.escrow, SELLER.address, 400_000), PAYERS[one.buyer], LEDGER))
    escrow = scene.book.escrows[one.escrow]
    return replace(escrow, terms=replace(escrow.terms, locked_until_ms=0))


def test_an_hour_that_nobody_claims_in_time_is_the_nodes_again() -> None:
    scene = Scene()
    start_ms = BEGIN_MS + 4 * HOUR_MS
    scene.promise(start_ms)
    one = scene.bid(0, start_ms)
    scene.sell(one)
    scene.settle(one)
    scene.pass_time(BATCH_MS + FOR_CLAIMS_MS)
    with pytest.raises(HoldRefused, match=r"promised to batch 1, to be claimed in 60 min, and that time is over"):
        scene.claim(one)
    scene.promise(start_ms)
    with pytest.raises(HoldRefused, match="promised to batch 2"):
        scene.claim(one)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"batch": 7}, "promised to batch 1; this is batch 7"),
        ({"quote": bytes(32)}, "was not set aside for the bid that has bought this hour"),
        ({"start_ms": BEGIN_MS + HOUR_MS}, "has not promised that hour"),
        ({"price_micro": 400_001}, "has 0.30 for .*, and the hour costs 0.400001"),
        ({"payee": PAYERS[1].address}, "has nothing for"),
    ],
)
def test_what_is_not_a_claim(changed: dict[str, Any], why: str) -> None:
    scene = Scene()
    scene.promise(BEGIN_MS + 2 * HOUR_MS)
    one = scene.bid(0, BEGIN_MS + 2 * HOUR_MS)
    sale = scene.sell(one)
    with pytest.raises(HoldRefused, match="has nothing for"):
        scene.claim(one)
    scene.settle(one)
    escrow = scene.book.escrows[one.escrow]
    one.sale = Sale(**{**sale.__dict__, **changed})
    with pytest.raises(HoldRefused, match=why):
        scene.claim(one)
    with pytest.raises(HoldRefused, match="no such escrow"):
        claim(scene.kept, sale, None, TERMS, scene.now_ms)
    early = Escrow(escrow.escrow_id, escrow.terms, 0, sale.start_ms, State.OPEN, escrow.paid, escrow.admitted)
    one.sale = sale
    with pytest.raises(HoldRefused, match="ends before the hour that it is to pay for"):
        scene.claim(one, early)
    scene.pass_time(2 * HOUR_MS)
    with pytest.raises(HoldRefused, match="That hour has begun"):
        scene.claim(one)


def test_what_a_node_does_not_promise() -> None:
    scene, _ = bought()
    start_ms = BEGIN_MS + 2 * HOUR_MS
    for start, why in (
        (start_ms, "was sold in batch 1"),
        (BEGIN_MS, "before it begins"),
        (BEGIN_MS + 721 * HOUR_MS, "30 days"),
    ):
        with pytest.raises(HoldRefused, match=why):
            scene.promise(start)
    for asked in (
        Ask(terms=order(start_ms + HOUR_MS, 2, 1), payee=PAYERS[0].address),
        Ask(terms=replace(order(start_ms, 2, 1), block=Block(
            of=NodeClass(device="x", memory_gib=1), start_ms=start_ms + HOUR_MS, ledger=HouseLedger(b"x" * 32, "USD"),
        )), payee=SELLER.address),
    ):  # fmt: skip
        with pytest.raises(HoldRefused, match="cannot be sold for elsewhere"):
            promise(scene.kept, asked, bytes(32), "ticket", TERMS, scene.now_ms)


def test_an_hour_is_passed_on_once_its_holder_gives_it_back() -> None:
    scene, one = bought()
    start_ms = BEGIN_MS + 2 * HOUR_MS
    other, third = scene.bid(1, start_ms, 500_000), scene.bid(2, start_ms, 500_000)
    scene.sell(other, 350_000, BUYERS[0].node_id)
    scene.settle(other)
    with pytest.raises(HoldRefused, match="has passed that hour on, and has not given it back yet"):
        scene.claim(other)
    scene.sell(third, 350_000, STRANGER.node_id)
    scene.settle(third)
    with pytest.raises(HoldRefused, match="has not passed it on in this one"):
        scene.claim(third)
    assert one.hold is not None
    scene.give_back(BUYERS[0], open_hold(one.hold, NODE.node_id))
    one.passed_on = True
    scene.settle(one)
    hold = scene.claim(other)
    assert (hold.client, hold.price, len(hold.released)) == (BUYERS[1].node_id, Price(350_000), 1)
    assert_honest(scene)
    scene.pass_time(60_000 + HOUR_MS)
    assert scene.balance(0) == MONEY


def assert_honest(scene: Scene) -> None:
    for number, envelope in enumerate(scene.signed):
        assert all(sold_twice(before, envelope) is None for before in scene.signed[:number])


class Bazaar(RuleBasedStateMachine):
    """Sellers promise, buyers set aside, trade, claim, pass on, come in the hour or do not, take their money out, and
    others ask for slots at the posted price; each step is done at any time, again, or never."""

    @initialize(slots=st.sampled_from([1, 1, 2]))
    def begin(self, slots: int) -> None:
        self.scene = Scene(slots)
        self.scene.pass_time(HOUR_MS - 900_000)
        self.holder: dict[int, Order] = {}
        """Who may claim an hour, as the auction's batches say."""

    def _promise(self, hour: int) -> None:
        start_ms = BEGIN_MS + hour * HOUR_MS
        if start_ms in self.holder:
            return
        try:
            self.scene.promise(start_ms)
        except HoldRefused:
            return

    @rule(
        buyer=st.integers(0, 2), hour=st.sampled_from([1, 1, 2]), trades=st.sampled_from([True, True, True, False]),
        price=st.sampled_from([1, 250_000, 400_000]), claims=st.sampled_from([True, True, False]),
    )  # fmt: skip
    def order(self, buyer: int, hour: int, trades: bool, price: int, claims: bool) -> None:
        """An hour that the node has promised goes to this bid, or one that somebody has and passes on."""
        start_ms, scene = BEGIN_MS + hour * HOUR_MS, self.scene
        if scene.now_ms >= start_ms or scene.balance(buyer) < 400_000:
            return
        last = self.holder.get(start_ms)
        if last is None:
            self._promise(hour)
        one, known = scene.bid(buyer, start_ms), hour_at(scene.kept, start_ms)
        if not trades or known is None:
            return
        if last is None:
            scene.batch = known.batch
            scene.sell(one, price)
            scene.batch = max(other.bid.terms.batch for other in scene.orders) + 1
            self.holder[start_ms] = one
        elif last.buyer != buyer and last.sale is not None and price >= last.sale.price_micro:
            scene.sell(one, price, BUYERS[last.buyer].node_id)
            self.holder[start_ms], last.passed_on = one, True
        if claims and one.sale is not None:
            self._claim(one, True)

    @precondition(lambda self: self.scene.orders)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.scene.orders))
        if self.scene.step(one) is None and one.owed and one.hold is None:
            escrow = self.scene.book.escrows[one.escrow]
            assert escrow.state is not State.OPEN or escrow.most_for(SELLER.address) == one.owed[SELLER.address]

    @precondition(lambda self: any(one.sale for one in self.scene.orders))
    @rule(data=st.data(), settles=st.sampled_from([True, True, False]))
    def claim(self, data: st.DataObject, settles: bool) -> None:
        some = [one for one in self.scene.orders if one.sale]
        self._claim(data.draw(st.sampled_from([one for one in some if one.hold is None] or some)), settles)

    def _claim(self, one: Order, settles: bool) -> None:
        if settles:
            self.scene.settle(one)
        try:
            self.scene.claim(one)
        except HoldRefused:
            return
        assert one.sale is not None
        hour = hour_at(self.scene.kept, one.sale.start_ms)
        assert hour is not None and hour.kept is not None and hour.kept.hold.client == one.sale.buyer

    @precondition(lambda self: any(one.hold for one in self.scene.orders))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """Who has passed an hour on does so before others."""
        some = [one for one in self.scene.orders if one.hold]
        one = data.draw(st.sampled_from([one for one in some if one.passed_on] or some))
        assert one.hold is not None
        newest = hold_of(self.scene.kept, BUYERS[one.buyer].node_id, self.scene.now_ms)
        hold = newest.hold if newest else open_hold(one.hold, NODE.node_id)
        try:
            self.scene.give_back(BUYERS[one.buyer], hold)
        except HoldRefused:
            return

    @precondition(lambda self: any(one.hold for one in self.scene.orders))
    @rule(data=st.data(), part=st.sampled_from([1, 100_000, 400_000]))
    def work(self, data: st.DataObject, part: int) -> None:
        one, scene = data.draw(st.sampled_from([one for one in self.scene.orders if one.hold])), self.scene
        buyer = BUYERS[one.buyer]
        kept = hold_of(scene.kept, buyer.node_id, scene.now_ms)
        escrow = scene.book.escrows[one.escrow]
        if kept is None:
            return
        try:
            scene.take(buyer, escrow)
        except HoldRefused:
            return
        voucher = Voucher(escrow=one.escrow, payee=SELLER.address, amount_micro=one.earned + part, work=bytes(32))
        try:
            scene.book.apply(Redeem(sign_voucher(PAYERS[one.buyer], LEDGER, voucher)))
        except MoneyRefused:
            return
        one.earned += part

    @rule(takes=st.sampled_from([True, True, True, False]), before_ms=st.sampled_from([None, 10_000, 30_000]))
    def posted(self, takes: bool, before_ms: int | None) -> None:
        """Somebody comes at the posted price, perhaps just before an hour begins."""
        if before_ms is not None:
            self.scene.pass_time(max(0, BEGIN_MS + HOUR_MS - before_ms - self.scene.now_ms))
        before = len(held(self.scene.kept, self.scene.now_ms))
        try:
            hold = self.scene.ask(STRANGER)
            if takes:
                self.scene.take(STRANGER, self._endless(hold))
        except HoldRefused:
            return
        assert len(held(self.scene.kept, self.scene.now_ms)) <= max(before, self.scene.slots)

    def _endless(self, hold: Hold) -> Escrow:
        terms = replace(
            terms_for(order(BEGIN_MS, 1, 400_000), 1, STRANGER.node_id, hold.payer, bytes(32)),
            expires_ms=self.scene.now_ms + 10 * HOUR_MS,
        )
        return Escrow(bytes(32), terms, 0, terms.expires_ms, admitted={SELLER.address: 400_000})

    @rule(passed=st.sampled_from([-5000, 1000, 20_000, 300_000, 600_000]))
    def pass_time(self, passed: int) -> None:
        self.scene.pass_time(passed)

    @invariant()
    def no_hold_convicts(self) -> None:
        if hasattr(self, "scene") and self.scene.signed:
            *before, newest = self.scene.signed
            assert all(sold_twice(one, newest) is None for one in before)

    @invariant()
    def no_hour_has_two_holders(self) -> None:
        if hasattr(self, "scene"):
            hours = [hour for hour in self.scene.kept.hours if hour.binds(self.scene.now_ms)]
            assert len({(hour.slot, hour.start_ms) for hour in hours}) == len(hours)

    @invariant()
    def money_is_conserved(self) -> None:
        if hasattr(self, "scene"):
            assert sum(self.scene.book.balances.values()) == 0

    def teardown(self) -> None:
        if not hasattr(self, "scene"):
            return
        scene = self.scene
        for one in scene.orders:
            scene.settle(one)
        scene.pass_time(100 * HOUR_MS)
        scene.pass_time(HOUR_MS)
        assert all(one.state is State.SETTLED for one in scene.book.escrows.values()), "every escrow ends"
        spent = [sum(one.earned for one in scene.orders if one.buyer == buyer) for buyer in range(3)]
        assert [MONEY - scene.balance(buyer) for buyer in range(3)] == spent
        for one in scene.orders:
            most = one.sale.price_micro if one.sale is not None else 0
            assert one.earned <= most, "nobody pays more than the cleared price"
        assert scene.book.balances.get(account(SELLER.address), 0) == sum(spent)


TestBazaar = Bazaar.TestCase
TestBazaar.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
