"""What a node may promise: whatever it is asked, and whatever its clock does, no two of its Holds convict it."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace

from shoal.identity import Envelope, KeyPair
from shoal.identity.accounts import AccountKey
from shoal.ledger.escrows import Escrow, State
from shoal.market.holds import HoldRefused, Slots, Terms, ask, give_back, held, keep, take
from shoal.protocol.holds import LEASE_STEP_MS, BadHold, Hold, HoldAsk, Release, open_hold, quote_id, sold_twice
from shoal.protocol.messages import sign
from shoal.protocol.money import EscrowTerms, HouseLedger, Payee
from shoal.protocol.prices import Price

NODE, *CLIENTS = (KeyPair.from_seed(bytes([number] * 32)) for number in range(1, 6))
LEDGER = HouseLedger(bytes(32), "USD")
PAYER, PAYEE, OTHER = (AccountKey(bytes([number] * 32)).address for number in range(1, 4))
PRICE = Price(350_000)
TERMS = Terms(price=PRICE, ledger=LEDGER, payee=PAYEE, works=("train",))
HOUR_MS = 3_600_000


def wish(**changed: Any) -> HoldAsk:
    usual: dict[str, Any] = {"work": "train", "payer": PAYER, "price": PRICE, "ledger": LEDGER, "lifetime_ms": 15_000}
    return HoldAsk(**{**usual, **changed})


def escrow(ends_ms: int = 10 * HOUR_MS, state: State = State.OPEN, **changed: Any) -> Escrow:
    usual: dict[str, Any] = {
        "payer": PAYER, "signer": PAYER, "cap_micro": 10, "auditor": PAYER, "amount_micro": 10, "fee_ppm": 0,
        "holdback_ppm": 100_000, "notice_ms": 60_000, "audit_ms": HOUR_MS, "expires_ms": ends_ms,
        "payees": (Payee(PAYEE, 10),), "quote": bytes(32), "nonce": bytes(32),
    }  # fmt: skip
    return Escrow(b"e" * 32, EscrowTerms(**{**usual, **changed}), 0, ends_ms, state)


class Desk:
    """A node that does what the rules say, and all that it has signed."""

    def __init__(self, terms: Terms = TERMS) -> None:
        self.terms, self.slots, self.signed = terms, Slots(), list[Envelope]()
        self.closes_ms: int | None = None

    def ask(self, client: KeyPair, now_ms: int, unheld: int = 0, **changed: Any) -> Envelope:
        return self._sign(ask(self.slots, wish(**changed), client.node_id, self.terms, unheld, now_ms, self.closes_ms))

    def take(self, client: KeyPair, now_ms: int, found: Escrow | None = None) -> Envelope:
        found = found or escrow()
        return self._sign(take(self.slots, client.node_id, found, self.terms, now_ms, self.closes_ms))

    def give_back(self, client: KeyPair, hold: Envelope, now_ms: int) -> None:
        release = Release(node=NODE.node_id, slot=opened(hold).slot, number=opened(hold).number)
        packed = sign(client, release).to_bytes()
        self.slots = give_back(self.slots, release, client.node_id, packed, now_ms)

    def _sign(self, hold: Hold) -> Envelope:
        envelope = sign(NODE, hold)
        self.slots = keep(self.slots, hold, envelope.record_id)
        self.signed.append(envelope)
        return envelope


def opened(envelope: Envelope) -> Hold:
    return open_hold(envelope, NODE.node_id)


def test_a_slot_is_held_taken_and_made_to_last() -> None:
    desk = Desk()
    first = desk.ask(CLIENTS[0], 1000)
    assert opened(first).until_ms == 16_000 and opened(first).escrow is None
    second = desk.take(CLIENTS[0], 2000)
    assert opened(second).until_ms == 2000 + LEASE_STEP_MS and opened(second).escrow == b"e" * 32
    third = desk.take(CLIENTS[0], 500_000)
    assert opened(third).until_ms == 500_000 + LEASE_STEP_MS
    assert [opened(one).number for one in desk.signed] == [1000, 2000, 500_000]
    with pytest.raises(HoldRefused, match="All 1 slots of this node are taken: 1 held, the next of them for 600 s"):
        desk.ask(CLIENTS[1], 500_000)


def test_an_owner_who_wants_the_machine_back_lets_no_place_last_past_the_notice() -> None:
    desk = Desk(replace(TERMS, reclaim_notice_ms=900_000, slots=2))
    assert opened(desk.ask(CLIENTS[0], 1000)).reclaim_notice_ms == 900_000
    desk.take(CLIENTS[0], 2000)
    desk.closes_ms = 950_000
    with pytest.raises(HoldRefused, match="owner takes it back in 900 s: it keeps no more places"):
        desk.ask(CLIENTS[1], 50_000)
    with pytest.raises(HoldRefused, match="it keeps no more places"):
        desk.take(CLIENTS[0], 50_000, msgspec.structs.replace(escrow(), escrow_id=b"f" * 32))
    assert opened(desk.take(CLIENTS[0], 60_000)).until_ms == 60_000 + LEASE_STEP_MS
    assert opened(desk.take(CLIENTS[0], 500_000)).until_ms == 950_000
    assert all(sold_twice(one, other) is None for one in desk.signed for other in desk.signed)


def test_a_place_that_is_held_and_not_paid_for_is_not_taken_once_notice_is_given() -> None:
    desk = Desk()
    desk.ask(CLIENTS[0], 1000)
    desk.closes_ms = 61_000
    with pytest.raises(HoldRefused, match="owner takes it back in 59 s"):
        desk.take(CLIENTS[0], 2000)


def test_what_a_node_signs_once_its_slots_are_lost_convicts_it_of_nothing() -> None:
    desk = Desk()
    before = [desk.ask(CLIENTS[0], 1000), desk.take(CLIENTS[0], 1000)]
    desk.slots = Slots()  # moved away, once all that was promised is over
    after = [desk.ask(CLIENTS[1], 700_000), desk.take(CLIENTS[1], 700_000)]
    assert all(sold_twice(one, other) is None for one in before for other in after)


def test_who_asks_twice_gets_the_same_word() -> None:
    desk = Desk()
    assert desk.ask(CLIENTS[0], 1000).record_id == desk.ask(CLIENTS[0], 2000).record_id


def test_who_holds_and_does_not_take_waits() -> None:
    desk = Desk()
    desk.ask(CLIENTS[0], 0)
    with pytest.raises(HoldRefused, match=r"was held for .* and not taken; it may ask again in 14 s"):
        desk.ask(CLIENTS[0], 16_000)
    desk.ask(CLIENTS[1], 16_000)
    desk = Desk()
    held_one = desk.ask(CLIENTS[0], 0)
    desk.give_back(CLIENTS[0], held_one, 5000)
    desk.ask(CLIENTS[0], 5000)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"price": Price(340_000)}, "costs 0.35 USD/h, and was asked for 0.34 USD/h: its price has changed"),
        ({"price": Price(350_000, "EUR")}, "asked for 0.35 EUR/h"),
        ({"ledger": HouseLedger(b"x" * 32, "USD")}, "paid at another ledger"),
        ({"work": "serve"}, "takes no serve jobs for money; it takes train"),
        ({"unheld": 1}, "All 1 slots of this node are taken: 0 held, .* and 1 in use"),
    ],
)
def test_what_is_not_held(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(HoldRefused, match=why):
        Desk().ask(CLIENTS[0], 0, **changed)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (escrow(ends_ms=50_000), "ends in 49 s; 60 s are needed"),
        (escrow(state=State.ENDED), "ends in 0 s"),
        (escrow(payer=OTHER), "the slot is held for"),
        (escrow(payees=(Payee(OTHER, 10),)), "has nothing for"),
        (escrow(payees=(Payee(PAYEE, 0),)), "has nothing for"),
        (escrow(holdback_ppm=400_000), "holds back 40 %, and this node agrees to 30 %"),
        (escrow(fee_ppm=200_000), "takes a fee of 20 %, and this node agrees to 10 %"),
        (escrow(audit_ms=20 * 24 * HOUR_MS), "20.0 days after its end, and this node agrees to 7.0"),
        (escrow(ends_ms=32 * 24 * HOUR_MS), "ends in 32.0 days, and this node agrees to 31.0"),
        (escrow(notice_ms=29_900), "may end 29.9 s after its payer asks"),
    ],
)
def test_money_that_will_not_do(found: Escrow, why: str) -> None:
    desk = Desk()
    desk.ask(CLIENTS[0], 0)
    with pytest.raises(HoldRefused, match=why):
        desk.take(CLIENTS[0], 1000, found)


def test_holds_are_their_clients_alone() -> None:
    desk = Desk()
    hold = desk.ask(CLIENTS[0], 0)
    with pytest.raises(HoldRefused, match="No slot is held for"):
        desk.take(CLIENTS[1], 0)
    with pytest.raises(HoldRefused, match="which is not the newest that it has"):
        desk.give_back(CLIENTS[1], hold, 0)
    with pytest.raises(HoldRefused, match="No slot is held for .* or not any more"):
        desk.take(CLIENTS[0], 15_000)
    with pytest.raises(HoldRefused, match="The ledger has no such escrow"):
        take(desk.slots, CLIENTS[0].node_id, None, TERMS, 0)
    with pytest.raises(BadHold):
        open_hold(hold, CLIENTS[0].node_id)


def test_those_who_gave_back_early_are_shared_among_slots() -> None:
    desk = Desk(replace(TERMS, slots=4))
    for moment in range(8):
        desk.give_back(CLIENTS[0], desk.ask(CLIENTS[0], moment), moment)
    assert len(opened(desk.ask(CLIENTS[0], 8)).released) == 2, "each Hold names those of its slot"


def test_a_clock_that_goes_back() -> None:
    desk = Desk()
    desk.ask(CLIENTS[0], 100_000)
    with pytest.raises(HoldRefused, match="has gone back by 60 s"):
        desk.ask(CLIENTS[1], 40_000)
    with pytest.raises(HoldRefused, match="taken"):
        desk.ask(CLIENTS[1], 95_000)


def test_two_holds_convict() -> None:
    hold = opened(Desk().ask(CLIENTS[0], 0))
    one = sign(NODE, hold)

    def beside(**changed: Any) -> str | None:
        other = sign(NODE, replace(hold, **{"number": 2, "client": CLIENTS[1].node_id, **changed}))
        assert sold_twice(one, other) == sold_twice(other, one)
        return sold_twice(one, other)

    assert "has promised slot 0 to" in (beside() or "")
    assert "has promised slot 0 to" in (beside(from_ms=14_999, until_ms=20_000) or "")
    assert beside(from_ms=15_000, until_ms=20_000) is None
    assert beside(slot=1) is None
    assert beside(client=CLIENTS[0].node_id) is None
    assert "two holds with the number 1" in (beside(number=1) or "")
    assert "two holds with the number 1" in (beside(number=1, client=CLIENTS[0].node_id, price=Price(1)) or "")
    assert sold_twice(one, one) is None
    by_another = sign(CLIENTS[0], replace(hold, number=2, client=CLIENTS[1].node_id))
    assert sold_twice(one, by_another) is None
    released = Release(node=NODE.node_id, slot=0, number=1)
    for rightly in (released, replace(released, number=7)):
        assert beside(released=(sign(CLIENTS[0], rightly).to_bytes(),)) is None
    later = replace(hold, number=3)
    assert sold_twice(sign(NODE, later), sign(NODE, replace(hold, number=4, client=CLIENTS[1].node_id, released=(
        sign(CLIENTS[0], replace(released, number=2)).to_bytes(),))))  # fmt: skip
    for wrong in (
        sign(NODE, released), sign(CLIENTS[0], replace(released, node=CLIENTS[2].node_id)), sign(CLIENTS[0], hold),
        sign(CLIENTS[0], replace(released, slot=1)),
    ):  # fmt: skip
        assert "has promised" in (beside(released=(wrong.to_bytes()[:512],)) or "")


def test_a_quote_names_its_holds_in_any_order() -> None:
    holds = tuple(sign(NODE, replace(opened(Desk().ask(CLIENTS[0], 0)), slot=slot)) for slot in range(3))
    assert len({quote_id(order) for order in itertools.permutations(holds)}) == 1
    assert quote_id(holds) != quote_id(holds[:2])


class Market(RuleBasedStateMachine):
    """Clients ask, take, give back and let lapse, at a node with two slots whose clock jumps."""

    @initialize()
    def begin(self) -> None:
        self.desk, self.now_ms = Desk(Terms(price=PRICE, ledger=LEDGER, payee=PAYEE, slots=2)), 0
        self.newest = dict[bytes, Envelope]()
        self.given_back = set[bytes]()

    @rule(client=st.sampled_from(CLIENTS), lifetime=st.sampled_from([1000, 15_000]), unheld=st.sampled_from([0, 0, 1]))
    def ask(self, client: KeyPair, lifetime: int, unheld: int) -> None:
        before = len(held(self.desk.slots, self.now_ms))
        try:
            self.newest[client.node_id] = self.desk.ask(client, self.now_ms, unheld, lifetime_ms=lifetime)
        except HoldRefused:
            return
        after = len(held(self.desk.slots, self.now_ms))
        assert after == before or after + unheld <= 2

    @rule(client=st.sampled_from(CLIENTS), left_ms=st.sampled_from([60_000, HOUR_MS]))
    def take(self, client: KeyPair, left_ms: int) -> None:
        if client.node_id in self.newest:
            try:
                found = escrow(ends_ms=self.now_ms + left_ms)
                self.newest[client.node_id] = self.desk.take(client, self.now_ms, found)
            except HoldRefused:
                pass

    @rule(client=st.sampled_from(CLIENTS))
    def give_back(self, client: KeyPair) -> None:
        if client.node_id in self.newest:
            hold = self.newest.pop(client.node_id)
            try:
                self.desk.give_back(client, hold, self.now_ms)
            except HoldRefused:
                return

    @rule(passed=st.sampled_from([-20_000, -5000, -1, 1, 999, 5000, 20_000, 700_000]))
    def pass_time(self, passed: int) -> None:
        self.now_ms = max(0, self.now_ms + passed)

    @invariant()
    def honest(self) -> None:
        if hasattr(self, "desk"):
            *before, newest = self.desk.signed or [None]
            assert newest is None or all(sold_twice(one, newest) is None for one in before)


TestMarket = Market.TestCase
TestMarket.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
