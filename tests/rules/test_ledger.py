"""Money under any order of what is asked: nothing is made, nothing is lost, everything ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from journal_reader import Reader, unpacked
from ledger_desk import (
    AUDITOR,
    CLIENT,
    DRIVER,
    LEDGER,
    NODES,
    OTHER,
    RIVAL,
    SPONSOR,
    WORK,
    Desk,
    a_book,
    a_hold,
    bond_terms,
    has,
    opened,
    terms,
    voucher,
)
from msgspec.structs import replace

from shoal.errors import ShoalError
from shoal.identity import BadSignature, Envelope, KeyPair
from shoal.identity.accounts import AccountKey
from shoal.ledger.bonds import Bond, BondState
from shoal.ledger.book import Book, NotSigned, SameDeposit, SameEscrow, UnknownEscrow, WithdrawalOutOfTurn
from shoal.ledger.commands import Admit, Command, Deposit, Pass, Redeem, SetFee
from shoal.ledger.escrows import (
    BadTerms,
    DoneAlready,
    EscrowLocked,
    EscrowOver,
    NotYours,
    OldVoucher,
    Paid,
    State,
    TooManyPayees,
    TooMuchPromised,
    TopUpOutOfTurn,
)
from shoal.ledger.journal import BEGINNING, BadJournal, Line, contradiction, line, verified
from shoal.ledger.moves import FEES, ISSUED, MoneyRefused, Move, TooLittleMoney, account, bonded, escrowed, held, moved
from shoal.protocol.holds import Hold, sold_twice
from shoal.protocol.messages import VersionMismatch, encode, open_record, sign
from shoal.protocol.money import (
    DAY_MS,
    EXTENSION_MAX_MS,
    PAYEES_MAX,
    Admission,
    BadCheckpoint,
    Checkpoint,
    Closing,
    HouseLedger,
    Payee,
    SignedVoucher,
    Withdrawal,
    Withholding,
    open_checkpoint,
    sign_voucher,
)
from shoal.quantities.money import AMOUNT_MAX, MICRO


def test_an_escrow_from_its_opening_to_its_end() -> None:
    book = a_book()
    escrow = opened(book, terms())
    assert (has(book, CLIENT), book.balances[escrowed(escrow)]) == (4000, 1000)
    book.redeem(voucher(escrow, NODES[0], 300, DRIVER))
    assert has(book, NODES[0]) == 300 - 30 - 5 and book.balances[held(escrow, NODES[0].address)] == 30
    book.redeem(voucher(escrow, NODES[0], 500))
    book.redeem(voucher(escrow, NODES[1], 400))
    order = Withholding(escrow=escrow, payee=NODES[0].address, amount_micro=20, evidence=WORK)
    signed = AUDITOR.sign(order.digest(LEDGER))
    book.withhold(order, signed)
    with pytest.raises(TooMuchPromised, match="and 0.00002 of that are withheld already"):
        book.withhold(order, signed)
    assert has(book, CLIENT) == 4020
    wish = Closing(escrow)
    assert book.close(wish, CLIENT.sign(wish.digest(LEDGER))) == (), "the payees have notice"
    book.at(99)
    book.redeem(voucher(escrow, NODES[1], 450))
    book.at(100)
    assert has(book, CLIENT) == 4070 and book.balances[escrowed(escrow)] == 0
    with pytest.raises(EscrowOver, match="what was not redeemed goes back to the payer"):
        book.redeem(voucher(escrow, NODES[1], 460))
    assert book.at(599) == () and len(book.at(600)) == 2 and book.at(10**9) == ()
    assert has(book, NODES[0]) == 450 - 9 + 30 and has(book, NODES[1]) == 405 - 8 + 45
    assert book.balances[FEES] == 17 and sum(book.balances.values()) == 0
    assert book.escrows[escrow].state is State.SETTLED


def test_a_signer_asks_for_the_rest_and_the_payer_gets_it() -> None:
    book = a_book()
    escrow = opened(book, terms(cap_micro=500))
    book.redeem(voucher(escrow, NODES[0], 300, DRIVER))
    wish = Closing(escrow)
    with pytest.raises(NotSigned):
        book.close(wish, AUDITOR.sign(wish.digest(LEDGER)))
    book.close(wish, DRIVER.sign(wish.digest(LEDGER)))
    book.at(100)
    assert has(book, CLIENT) == 4700 and has(book, DRIVER) == 0 and sum(book.balances.values()) == 0


def test_who_may_not_moves_nothing() -> None:
    book = a_book()
    escrow = opened(book, terms(cap_micro=500))
    book.redeem(voucher(escrow, NODES[0], 300, DRIVER))
    before = dict(book.balances)
    good = voucher(escrow, NODES[1], 200)
    elsewhere = sign_voucher(CLIENT, OTHER, good.voucher)
    for signed, error, part in (
        (voucher(escrow, NODES[0], 300), OldVoucher, "0.0003 of Escrow"),
        (voucher(escrow, NODES[0], 299), OldVoucher, "redeemed already"),
        (voucher(escrow, NODES[0], 801), TooMuchPromised, "0.0008 its payee may get"),
        (voucher(escrow, NODES[1], 701), TooMuchPromised, "0.0007 is left of it"),
        (voucher(escrow, NODES[1], 201, DRIVER), TooMuchPromised, "0.0002 its signer may still promise"),
        (voucher(escrow, NODES[1], 10, RIVAL), NotYours, "who may not"),
        (voucher(escrow, NODES[1], 10, NODES[1]), NotYours, "who may not"),
        (voucher(escrow, NODES[2], 10), NotYours, "is no payee"),
        (voucher(WORK, NODES[1], 10), UnknownEscrow, "no escrow 000000000000"),
        (elsewhere, NotYours, "who may not"),
        (SignedVoucher(good.voucher, bytes(65)), NotSigned, "carries no signature"),
        (SignedVoucher(replace(good.voucher, amount_micro=700), good.signature), NotYours, "who may not"),
    ):
        with pytest.raises(error, match=part):
            book.redeem(signed)
    order = Withholding(escrow=escrow, payee=NODES[0].address, amount_micro=10, evidence=WORK)
    with pytest.raises(NotSigned):
        book.withhold(order, CLIENT.sign(order.digest(LEDGER)))
    for amount in (0, 31):
        order = replace(order, amount_micro=amount)
        with pytest.raises(TooMuchPromised, match=r"0.00003 of Escrow .* are held back"):
            book.withhold(order, AUDITOR.sign(order.digest(LEDGER)))
    with pytest.raises(NotSigned):
        book.close(Closing(escrow), AUDITOR.sign(Closing(escrow).digest(LEDGER)))
    with pytest.raises(SameEscrow, match="draw another nonce"):
        opened(book, terms(cap_micro=500))
    assert book.balances == before


def test_payees_come_to_an_open_escrow_and_get_more() -> None:
    book = a_book()
    escrow = opened(book, terms())
    with pytest.raises(NotYours, match="is no payee"):
        book.redeem(voucher(escrow, NODES[2], 10))
    book.admit(escrow, NODES[2], 100, DRIVER)
    book.redeem(voucher(escrow, NODES[2], 100, DRIVER))
    with pytest.raises(TooMuchPromised, match="0.0001 its payee may get"):
        book.redeem(voucher(escrow, NODES[2], 101))
    book.admit(escrow, NODES[2], 101, CLIENT)
    book.redeem(voucher(escrow, NODES[2], 101))
    book.admit(escrow, NODES[0], 801, CLIENT)
    book.redeem(voucher(escrow, NODES[0], 801))
    for node, most, key, error, part in (
        (NODES[2], 101, DRIVER, DoneAlready, "may get 0.000101 of Escrow .* already; an admission takes nothing away"),
        (NODES[2], 100, CLIENT, DoneAlready, "takes nothing away"),
        (NODES[1], 800, CLIENT, DoneAlready, "may get 0.0008"),
        (RIVAL, 500, RIVAL, NotYours, "signed by 0x.*, who may not"),
        (RIVAL, 500, AUDITOR, NotYours, "who may not"),
    ):
        with pytest.raises(error, match=part):
            book.admit(escrow, node, most, key)
    admission = Admission(escrow, RIVAL.address, 500)
    for changed, signature, refused in (
        (admission, bytes(65), NotSigned),
        (admission, CLIENT.sign(admission.digest(OTHER)), NotYours),
        (replace(admission, most_micro=600), CLIENT.sign(admission.digest(LEDGER)), NotYours),
        (replace(admission, escrow=WORK), CLIENT.sign(replace(admission, escrow=WORK).digest(LEDGER)), UnknownEscrow),
    ):
        with pytest.raises(refused):
            book.do(Admit(changed, signature))
    book.at(10_000)
    with pytest.raises(EscrowOver):
        book.admit(escrow, RIVAL, 500, CLIENT)
    book.at(10_500)
    assert has(book, NODES[2]) == 101 - 1 and verified(book.lines, LEDGER).escrows == book.escrows


def test_an_escrow_has_no_more_payees_than_its_line_has_room_for() -> None:
    book = a_book()
    payees = tuple(Payee(number.to_bytes(20), 1) for number in range(PAYEES_MAX - 1))
    escrow = opened(book, terms(payees=payees))
    book.admit(escrow, NODES[0], 1, DRIVER)
    with pytest.raises(TooManyPayees, match="has 1024 payees"):
        book.admit(escrow, NODES[1], 1, DRIVER)
    book.admit(escrow, NODES[0], 2, DRIVER)


def test_more_goes_into_an_escrow_and_it_lasts_longer_once_for_a_signature() -> None:
    book = a_book()
    escrow = opened(book, terms())
    first = {"amount_micro": 500, "cap_micro": 200, "expires_ms": 20_000, "number": 1}
    assert book.top_up(escrow, **first) == (Move(account(CLIENT.address), escrowed(escrow), 500),)
    with pytest.raises(TopUpOutOfTurn, match="Top-up 1 of Escrow .* been done already; the next one is number 2"):
        book.top_up(escrow, **first)
    book.redeem(voucher(escrow, NODES[0], 800, DRIVER))
    book.redeem(voucher(escrow, NODES[1], 400, DRIVER))
    with pytest.raises(TooMuchPromised, match="0.0004 its signer may still promise"):
        book.redeem(voucher(escrow, NODES[1], 401, DRIVER))
    book.redeem(voucher(escrow, NODES[1], 700))
    with pytest.raises(TooMuchPromised, match="0.0007 is left of it"):
        book.redeem(voucher(escrow, NODES[1], 701))
    last = 10_000 + EXTENSION_MAX_MS
    second = {"amount_micro": 100, "cap_micro": 100, "expires_ms": last, "number": 2}
    before = dict(book.balances)
    for changed, key, error, part in (
        ({"number": 3}, CLIENT, TopUpOutOfTurn, "comes before its turn; the next one is number 2"),
        ({"expires_ms": 19_999}, CLIENT, BadTerms, "cannot end at 19999 ms: not before 20000 ms"),
        ({"expires_ms": last + 1}, CLIENT, BadTerms, f"not after {last} ms, as payees wait"),
        ({"cap_micro": 401}, CLIENT, BadTerms, "may go to 0.001601, which is more than is in it, 0.0016"),
        ({"amount_micro": 3501}, CLIENT, TooLittleMoney, "0.000001 less than is to leave it"),
        ({"amount_micro": AMOUNT_MAX}, CLIENT, BadTerms, "more in all than can be counted"),
        ({}, DRIVER, NotSigned, "does not carry its signature"),
        ({}, RIVAL, NotSigned, "does not carry its signature"),
    ):
        with pytest.raises(error, match=part):
            book.top_up(escrow, key, **{**second, **changed})
    assert book.balances == before
    book.top_up(escrow, **second)
    book.at(last - 1)
    book.redeem(voucher(escrow, NODES[1], 750))
    book.ask_for_the_rest(escrow)
    with pytest.raises(EscrowOver, match="has asked for the rest of it; open another one"):
        book.top_up(escrow, expires_ms=last, number=3)
    book.at(last)
    assert book.escrows[escrow].state is State.ENDED and has(book, CLIENT) == 5000 - 1550
    assert verified(book.lines, LEDGER).escrows == book.escrows


def test_an_escrow_ends_at_once_when_nobody_wants_more_of_it() -> None:
    book = a_book()
    escrow = opened(book, terms())
    book.admit(escrow, NODES[2], 100, DRIVER)
    book.redeem(voucher(escrow, NODES[0], 300))
    for amount, key, error, part in (
        (300, CLIENT, NotSigned, "does not carry its signature"),
        (299, NODES[0], MoneyRefused, "wants 0.000299 of .* and has redeemed 0.0003; redeem the newest"),
        (301, NODES[0], MoneyRefused, "wants 0.000301"),
    ):
        with pytest.raises(error, match=part):
            book.finish(escrow, NODES[0], amount, key)
    with pytest.raises(NotYours, match="is no payee"):
        book.finish(escrow, RIVAL, 0)
    assert book.finish(escrow, NODES[0], 300) == (), "the payer has not asked for the rest"
    with pytest.raises(DoneAlready, match="said already"):
        book.finish(escrow, NODES[0], 300)
    with pytest.raises(EscrowOver, match="has said that it wants no more"):
        book.redeem(voucher(escrow, NODES[0], 301))
    assert book.ask_for_the_rest(escrow) == ()
    with pytest.raises(DoneAlready, match="asked for the rest already; it ends at 100 ms"):
        book.ask_for_the_rest(escrow)
    book.at(50)
    assert book.finish(escrow, NODES[1], 0) == (), "one is left, that has earned nothing yet"
    book.redeem(voucher(escrow, NODES[2], 10))
    assert book.finish(escrow, NODES[2], 10) == (Move(escrowed(escrow), account(CLIENT.address), 690),)
    with pytest.raises(EscrowOver):
        book.finish(escrow, NODES[2], 10)
    assert book.at(549) == () and len(book.at(550)) == 2, "audits have their time from the end on"
    assert has(book, NODES[0]) == 300 - 5 and book.escrows[escrow].state is State.SETTLED
    assert verified(book.lines, LEDGER).escrows == book.escrows


def test_a_locked_escrow_neither_pays_nor_ends_before_its_time() -> None:
    book = a_book()
    escrow = opened(book, terms(locked_until_ms=400))
    book.admit(escrow, RIVAL, 1000, CLIENT)
    for node in (*NODES[:2], RIVAL):
        with pytest.raises(EscrowLocked, match="pays nobody for 400 ms more, as its terms say"):
            book.redeem(voucher(escrow, node, 1))
    assert book.ask_for_the_rest(escrow) == () and book.escrows[escrow].ends_ms == 400, "its notice is 100 ms"
    for node in (*NODES[:2], RIVAL):
        assert book.finish(escrow, node, 0) == ()
    assert book.at(399) == () and has(book, CLIENT) == 4000
    assert book.at(400) == (Move(escrowed(escrow), account(CLIENT.address), 1000),)
    other = opened(book, terms(locked_until_ms=500))
    book.at(500)
    book.redeem(voucher(other, NODES[0], 300))
    assert has(book, NODES[0]) == 300 - 30 - 5
    assert verified(book.lines, LEDGER).escrows == book.escrows


def test_terms_without_a_lock_are_what_they_were_before_there_was_one() -> None:
    assert terms().escrow_id(LEDGER).hex().startswith("77d9a0e06942b99c")
    assert b"locked" not in msgspec.msgpack.encode(terms())
    assert len({terms(locked_until_ms=at).escrow_id(LEDGER) for at in range(3)}) == 3


def test_who_asks_last_ends_it() -> None:
    book = a_book()
    escrow = opened(book, terms())
    for node in NODES[:2]:
        book.finish(escrow, node, 0)
    assert book.ask_for_the_rest(escrow) == (Move(escrowed(escrow), account(CLIENT.address), 1000),)


def test_a_deposit_is_booked_once() -> None:
    book = Desk()
    book.do(Deposit(CLIENT.address, 100, "payment 7"))
    with pytest.raises(SameDeposit, match="with the reference 'payment 7' was booked already; this one changes"):
        book.do(Deposit(CLIENT.address, 100, "payment 7"))
    with pytest.raises(MoneyRefused, match="0 millionths cannot move from issued"):
        book.do(Deposit(CLIENT.address, 0, "payment 8"))
    book.do(Deposit(CLIENT.address, 5, "payment 8"))
    assert has(book, CLIENT) == 105 and len(book.lines) == 2


def test_time_that_brings_nothing_leaves_no_line() -> None:
    book = a_book()
    escrow = opened(book, terms())
    with pytest.raises(MoneyRefused, match="The time has brought nothing for Escrow .* yet"):
        book.do(Pass(escrow))
    book.at(10**6)
    with pytest.raises(MoneyRefused, match="or all that it brings"):
        book.do(Pass(escrow))


def withdrawal(key: AccountKey, amount: int, number: int) -> Withdrawal:
    return Withdrawal(account=key.address, amount_micro=amount, to="payment 7", number=number)


def withdrawn(book: Desk, order: Withdrawal, key: AccountKey, ledger: HouseLedger = LEDGER) -> None:
    book.withdraw(order, key.sign(order.digest(ledger)))


def test_who_has_money_takes_it_out_once_for_a_signature() -> None:
    book = a_book()
    first, second = withdrawal(CLIENT, 2000, 1), withdrawal(CLIENT, 2000, 2)
    withdrawn(book, first, CLIENT)
    assert (has(book, CLIENT), book.balances[ISSUED]) == (3000, -3000)
    with pytest.raises(WithdrawalOutOfTurn, match="Withdrawal 1 of 0x.* carried out already; .* is number 2"):
        withdrawn(book, first, CLIENT)
    withdrawn(book, second, CLIENT)
    before = dict(book.balances)
    third = withdrawal(CLIENT, 500, 3)
    for order, key, ledger, error, part in (
        (second, CLIENT, LEDGER, WithdrawalOutOfTurn, "carried out already"),
        (withdrawal(CLIENT, 500, 4), CLIENT, LEDGER, WithdrawalOutOfTurn, "comes before its turn; .* is number 3"),
        (withdrawal(CLIENT, 1001, 3), CLIENT, LEDGER, TooLittleMoney, "has 0.001, 0.000001 less than is to leave it"),
        (withdrawal(CLIENT, 0, 3), CLIENT, LEDGER, MoneyRefused, "0 millionths cannot move"),
        (withdrawal(CLIENT, AMOUNT_MAX + 1, 3), CLIENT, LEDGER, MoneyRefused, "cannot move"),
        (withdrawal(RIVAL, 1, 1), RIVAL, LEDGER, TooLittleMoney, "has 0.00"),
        (third, RIVAL, LEDGER, NotSigned, "does not carry its signature for this ledger"),
        (third, CLIENT, OTHER, NotSigned, "for this ledger"),
        (third, CLIENT, HouseLedger(LEDGER.operator, "EUR"), NotSigned, "for this ledger"),
    ):
        with pytest.raises(error, match=part):
            withdrawn(book, order, key, ledger)
    for changed in (replace(third, amount_micro=501), replace(third, to="payment 8"), replace(third, number=4)):
        with pytest.raises(NotSigned):
            book.withdraw(changed, CLIENT.sign(third.digest(LEDGER)))
    assert book.balances == before and verified(book.lines, LEDGER).balances == before
    withdrawn(book, third, CLIENT)
    again = verified(book.lines, LEDGER)
    assert again.withdrawals == book.book.withdrawals == {CLIENT.address: 3}
    twice = [*book.lines, line(5, 0, book.lines[-1].command, book.lines[-1].moves, book.lines[-1].hash)]
    with pytest.raises(BadJournal, match="Line 5 .* carried out already"):
        verified(twice, LEDGER)


@pytest.mark.parametrize(
    "changed",
    [{"amount_micro": 0}, {"amount_micro": AMOUNT_MAX + 1}, {"to": ""}, {"to": "x" * 129}, {"to": "a\nb"},
     {"to": "a\n"}, {"number": 0}, {"number": 1 << 53}],
)  # fmt: skip
def test_a_withdrawal_that_cannot_be_is_not_read(changed: dict[str, Any]) -> None:
    order = withdrawal(CLIENT, 500, 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(order), type=Withdrawal) == order
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(replace(order, **changed)), type=Withdrawal)


@pytest.mark.parametrize(
    ("changed", "error", "part"),
    [
        ({"expires_ms": 0}, BadTerms, "expires 0 ms ago"),
        ({"payees": (Payee(bytes(20), 1), Payee(bytes(20), 2))}, BadTerms, "a payee twice"),
        ({"cap_micro": 1001}, BadTerms, "0.001001, which is more than is in it"),
        ({"locked_until_ms": 10_001}, BadTerms, "locked for 1 ms longer than it lasts"),
        ({"amount_micro": 5001}, TooLittleMoney, "has 0.005, 0.000001 less than"),
    ],
)
def test_terms_that_cannot_be_are_refused(changed: dict[str, Any], error: type[ShoalError], part: str) -> None:
    book = a_book()
    with pytest.raises(error, match=part):
        opened(book, terms(**changed))
    assert book.balances == a_book().balances and not book.escrows
    signed = CLIENT.sign(terms().escrow_id(LEDGER))
    with pytest.raises(NotSigned, match="does not carry its signature"):
        book.open(terms(amount_micro=999), signed)


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, AMOUNT_MAX)), st.lists(st.builds(
    Move, st.sampled_from(["a", "b", "c", ISSUED]), st.sampled_from(["a", "b", "c"]), st.integers(-5, AMOUNT_MAX)
), max_size=6))  # fmt: skip
def test_moves_keep_the_sum_or_are_refused(balances: dict[str, int], moves: list[Move]) -> None:
    try:
        after = {**balances, **moved(balances, moves)}
    except MoneyRefused:
        return
    assert sum(after.values()) == sum(balances.values())
    assert all(0 <= balance <= AMOUNT_MAX for name, balance in after.items() if name != ISSUED)


@pytest.mark.parametrize("amount", [-1, 0, 1.5, 1.0, True, float("nan"), float("inf"), "5", None, AMOUNT_MAX + 1])
def test_no_ledger_books_what_is_no_whole_number_of_millionths(amount: Any) -> None:
    """A journal with such a line could not be read again."""
    book = a_book()
    before = dict(book.balances)
    with pytest.raises(MoneyRefused, match=f"{amount!r} millionths cannot move"):
        book.deposit(CLIENT.address, amount)
    assert book.balances == before and len(book.lines) == 1


STAKE = 4 * MICRO
SELLERS = [KeyPair.from_seed(bytes([number] * 32)) for number in (1, 2)]
HOLDS = [
    a_hold(seller, number=number, client=bytes([client] * 32), until_ms=until_ms)
    for seller in SELLERS
    for number, client, until_ms in ((1, 1, 500), (2, 2, 500), (3, 1, 1 << 50), (4, 2, 1 << 50), (4, 2, 1 << 51))
]


class Ledger(RuleBasedStateMachine):
    """Clients, drivers and nodes ask for whatever comes to mind, in any order and at any time."""

    @initialize(money=st.integers(1000, 9000))
    def begin(self, money: int) -> None:
        self.book = Desk()
        self.book.deposit(SPONSOR.address, STAKE)
        self.paid_in = money + STAKE
        self.taken: dict[bytes, list[int]] = {}
        self.book.deposit(CLIENT.address, money)
        self.names = [opened(self.book, terms(expires_ms=50_000, audit_ms=9000))]

    def attempt(self, what: Any) -> bool:
        """Either all of it happens, or nothing."""
        book = self.book.book
        before = self.all_of(book)
        try:
            what()
        except ShoalError as error:
            assert error.sentence and error.code != "SH-000"
            assert self.all_of(book) == before
            return False
        return True

    def all_of(self, book: Book) -> Any:
        return tuple(map(copy, (book.balances, book.escrows, book.withdrawals, book.bonds, book.references)))

    @rule(
        key=st.sampled_from([CLIENT, CLIENT, NODES[0]]), amount=st.integers(1, 1000),
        ahead=st.sampled_from([0, 0, -1, 1]), signer=st.sampled_from([CLIENT, NODES[0], None, None]),
    )  # fmt: skip
    def withdraw(self, key: AccountKey, amount: int, ahead: int, signer: AccountKey | None) -> None:
        taken = self.taken.setdefault(key.address, [])
        order = withdrawal(key, amount, max(1, len(taken) + 1 + ahead))
        may = (signer or key) is key and order.number == len(taken) + 1 and amount <= has(self.book, key)
        assert self.attempt(lambda: withdrawn(self.book, order, signer or key)) == may
        taken += [amount] * may

    @rule(
        amount=st.integers(1, 1500), cap=st.integers(0, 1500), too_high=st.sampled_from([0, 0, 0, 1]),
        fee=st.integers(0, 10**6), hold=st.integers(0, 10**6), notice=st.integers(0, 200), audit=st.integers(0, 900),
        lasts=st.integers(-5, 9000), nonce=st.integers(0, 5), most=st.integers(0, 1500),
        locked=st.sampled_from([0, 0, 0, 100, 300]),
        key=st.sampled_from([CLIENT, CLIENT, CLIENT, RIVAL]),
    )  # fmt: skip
    def open(
        self, amount: int, cap: int, too_high: int, fee: int, hold: int, notice: int, audit: int, lasts: int,
        nonce: int, most: int, locked: int, key: AccountKey,
    ) -> None:  # fmt: skip
        wanted = terms(
            amount_micro=amount, cap_micro=min(cap, amount) + too_high, fee_ppm=fee, holdback_ppm=hold,
            notice_ms=notice, audit_ms=audit, expires_ms=max(0, self.book.book.now_ms + lasts),
            nonce=bytes([nonce] * 32),
            payees=(Payee(NODES[0].address, most), Payee(NODES[1].address, AMOUNT_MAX)),
            locked_until_ms=self.book.book.now_ms + locked if locked else 0,
        )  # fmt: skip
        name = wanted.escrow_id(LEDGER)
        if self.attempt(lambda: self.book.open(wanted, key.sign(name))):
            self.names.append(name)

    @rule(
        at=st.integers(0, 20), node=st.sampled_from(NODES), more=st.integers(-1, 400) | st.integers(1, 100),
        key=st.sampled_from([CLIENT, CLIENT, DRIVER, DRIVER, RIVAL]),
    )  # fmt: skip
    def redeem(self, at: int, node: AccountKey, more: int, key: AccountKey) -> None:
        name = self.names[at % len(self.names)]
        paid = self.book.escrows[name].paid.get(node.address, Paid()) if name in self.book.escrows else Paid()
        signed = voucher(name, node, max(0, paid.redeemed_micro + more), key)
        self.attempt(lambda: self.book.redeem(signed))

    @rule(at=st.integers(0, 20), key=st.sampled_from([CLIENT, CLIENT, DRIVER]))
    def close(self, at: int, key: AccountKey) -> None:
        wish = Closing(self.names[at % len(self.names)])
        self.attempt(lambda: self.book.close(wish, key.sign(wish.digest(LEDGER))))

    @rule(
        at=st.integers(0, 20), node=st.sampled_from(NODES), most=st.integers(0, 1600),
        key=st.sampled_from([CLIENT, DRIVER, DRIVER, RIVAL]),
    )  # fmt: skip
    def admit(self, at: int, node: AccountKey, most: int, key: AccountKey) -> None:
        self.attempt(lambda: self.book.admit(self.names[at % len(self.names)], node, most, key))

    @rule(
        at=st.integers(0, 20), amount=st.integers(0, 500), cap=st.integers(0, 500), longer=st.integers(-10, 300),
        ahead=st.sampled_from([0, 0, 0, 1, -1]), key=st.sampled_from([CLIENT, CLIENT, CLIENT, DRIVER]),
    )  # fmt: skip
    def top_up(self, at: int, amount: int, cap: int, longer: int, ahead: int, key: AccountKey) -> None:
        escrow = self.book.escrows.get(self.names[at % len(self.names)])
        if escrow is not None:
            number, ends_ms = max(1, escrow.top_ups + 1 + ahead), max(0, escrow.ends_ms + longer)
            self.attempt(lambda: self.book.top_up(
                escrow.escrow_id, key, amount_micro=amount, cap_micro=cap, expires_ms=ends_ms, number=number
            ))  # fmt: skip

    @rule(
        at=st.integers(0, 20), node=st.sampled_from(NODES), more=st.sampled_from([0, 0, 0, 1]),
        signer=st.sampled_from([None, None, CLIENT]),
    )  # fmt: skip
    def finish(self, at: int, node: AccountKey, more: int, signer: AccountKey | None) -> None:
        escrow = self.book.escrows.get(self.names[at % len(self.names)])
        if escrow is not None:
            amount = more + (escrow.paid[node.address].redeemed_micro if node.address in escrow.paid else 0)
            if self.attempt(lambda: self.book.finish(escrow.escrow_id, node, amount, signer)):
                after = self.book.escrows[escrow.escrow_id]
                wants = [one for one in after.payees if not after.paid.get(one, Paid()).finished]
                locked = after.terms.locked_until_ms > self.book.book.now_ms
                assert (after.state is State.OPEN) == (not after.closing or bool(wants) or locked)

    @rule(at=st.integers(0, 200))
    def say_again(self, at: int) -> None:
        """Whoever has read the journal hands in a line of it once more: nothing that was signed moves money twice."""
        signed = [one for one in self.book.lines if not isinstance(one.command, Pass)]
        assert not self.attempt(lambda: self.book.do(signed[at % len(signed)].command))

    @rule(
        amount=st.integers(MICRO, 2 * MICRO), node=st.sampled_from(SELLERS), nonce=st.integers(0, 9),
        key=st.sampled_from([SPONSOR, SPONSOR, SPONSOR, RIVAL]),
    )  # fmt: skip
    def post(self, amount: int, node: KeyPair, nonce: int, key: AccountKey) -> None:
        wanted = bond_terms(node, amount_micro=amount, nonce=bytes([nonce] * 32))
        may = key is SPONSOR and amount <= has(self.book, SPONSOR) and wanted.bond_id(LEDGER) not in self.book.bonds
        assert self.attempt(lambda: self.book.post(wanted, key)) == may

    def bond(self, at: int) -> Bond | None:
        bonds = list(self.book.bonds.values())
        return bonds[at % len(bonds)] if bonds else None

    @rule(at=st.integers(0, 20), key=st.sampled_from([SPONSOR, SPONSOR, CLIENT]))
    def unbond(self, at: int, key: AccountKey) -> None:
        if (bond := self.bond(at)) is not None:
            may = key is SPONSOR and bond.state is BondState.STANDING and bond.ends_ms is None
            assert self.attempt(lambda: self.book.unbond(bond.bond_id, key)) == may

    @rule(at=st.integers(0, 20), one=st.sampled_from(HOLDS), other=st.sampled_from(HOLDS))
    def slash(self, at: int, one: Envelope, other: Envelope) -> None:
        if (bond := self.bond(at)) is not None:
            stands = bond.state is BondState.STANDING and (bond.ends_ms or 1 << 60) > self.book.book.now_ms
            convicted = sold_twice(one, other) is not None and one.signer == bond.terms.node
            lasts = all(open_record(each, Hold).until_ms > bond.posted_ms for each in (one, other))
            may = stands and convicted and lasts
            assert self.attempt(lambda: self.book.slash(bond.bond_id, one.to_bytes(), other.to_bytes())) == may

    @rule(
        at=st.integers(0, 20), node=st.sampled_from(NODES), amount=st.integers(0, 40),
        key=st.sampled_from([AUDITOR, AUDITOR, AUDITOR, CLIENT]),
    )  # fmt: skip
    def withhold(self, at: int, node: AccountKey, amount: int, key: AccountKey) -> None:
        order = Withholding(
            escrow=self.names[at % len(self.names)], payee=node.address, amount_micro=amount, evidence=WORK
        )
        self.attempt(lambda: self.book.withhold(order, key.sign(order.digest(LEDGER))))

    @rule(step=st.sampled_from([-DAY_MS, -30, 1, 1, 10, 10, 30, 100, 100, 300, 300, DAY_MS - 200]))
    def clock(self, step: int) -> None:
        before = self.book.book.now_ms
        self.book.at(before + step)
        assert self.book.book.now_ms >= before, "a clock that goes back changes nothing"

    @property
    def out(self) -> int:
        """Taken out of the ledger, by all."""
        return sum(map(sum, self.taken.values()))

    @invariant()
    def nothing_is_made_or_lost(self) -> None:
        if not hasattr(self, "book"):
            return
        assert sum(self.book.balances.values()) == 0 and self.book.balances.get(ISSUED, 0) == self.out - self.paid_in
        assert all(balance >= 0 for name, balance in self.book.balances.items() if name != ISSUED)
        for name, escrow in self.book.escrows.items():
            if self.book.book.now_ms < escrow.terms.locked_until_ms:
                assert self.book.balances[escrowed(name)] == escrow.amount_micro
        for name, bond in self.book.bonds.items():
            assert self.book.balances.get(bonded(name), 0) == bond.at_stake_micro
        for node in SELLERS:
            standing = [one for one in self.book.bonds.values() if one.terms.node == node.node_id]
            now_ms = self.book.book.now_ms
            surely = sum(one.at_stake_micro for one in standing if one.ends_ms is None or one.ends_ms > now_ms)
            assert self.book.book.bond_of(node.node_id) == surely
        for name, escrow in self.book.escrows.items():
            rest = self.book.balances.get(escrowed(name), 0)
            assert rest == (escrow.amount_micro - escrow.redeemed_micro) * (escrow.state is State.OPEN)
            assert escrow.redeemed_micro <= escrow.amount_micro and escrow.cap_micro <= escrow.amount_micro
            assert all(paid.redeemed_micro <= (escrow.most_of(payee) or 0) for payee, paid in escrow.paid.items())
            for payee, paid in escrow.paid.items():
                waiting = self.book.balances.get(held(name, payee), 0)
                assert waiting == paid.waiting_micro * (escrow.state is not State.SETTLED)

    def teardown(self) -> None:
        """However it went, the time alone ends all of it, and all money is with somebody."""
        if not hasattr(self, "book"):
            return
        for name, bond in self.book.bonds.items():
            self.attempt(lambda: self.book.unbond(name, SPONSOR))  # noqa: B023
            assert bond.state is not BondState.STANDING or self.book.bonds[name].ends_ms is not None
        self.book.at(self.book.book.now_ms + 2 * DAY_MS)
        lost = [one for one in self.book.bonds.values() if one.state is BondState.LOST]
        assert all(one.state is not BondState.STANDING for one in self.book.bonds.values())
        assert has(self.book, SPONSOR) == STAKE - sum(one.terms.amount_micro for one in lost)
        assert all(escrow.state is State.SETTLED for escrow in self.book.escrows.values())
        owners = {account(key.address) for key in (CLIENT, SPONSOR, *NODES)} | {FEES}
        assert sum(self.book.balances.get(name, 0) for name in owners) == self.paid_in - self.out
        cost = sum(
            paid.redeemed_micro - paid.withheld_micro
            for one in self.book.escrows.values()
            for paid in one.paid.values()
        )
        assert has(self.book, CLIENT) == self.paid_in - STAKE - cost - sum(self.taken.get(CLIENT.address, []))
        again = verified(self.book.lines, LEDGER)
        assert self.all_of(again) == self.all_of(self.book.book)


def a_journal() -> list[Line]:
    book = a_book()
    escrow = opened(book, terms())
    book.redeem(voucher(escrow, NODES[0], 300, DRIVER))
    book.redeem(voucher(escrow, NODES[1], 200))
    book.at(10_000)
    book.at(10_500)
    assert verified(book.lines, LEDGER).balances == book.balances and len(book.lines) == 6
    return book.lines


def resealed(lines: list[Line]) -> list[Line]:
    """As an operator would make the hashes fit again."""
    made: list[Line] = []
    for number, one in enumerate(lines, start=1):
        made.append(line(number, one.at_ms, one.command, one.moves, made[-1].hash if made else BEGINNING))
    return made


def test_a_journal_shows_what_an_operator_changed() -> None:
    lines = a_journal()
    voucher_line = lines[2]
    assert isinstance(voucher_line.command, Redeem)
    signed = voucher_line.command.signed
    more = Redeem(SignedVoucher(replace(signed.voucher, amount_micro=400), signed.signature))
    mine = Move(lines[1].moves[0].source, account(RIVAL.address), 1)
    for changed, part in (
        (lines[:2] + lines[3:], "Line 3 of the journal does not follow"),
        ([*lines[:2], replace(voucher_line, at_ms=5), *lines[3:]], "Line 3 of the journal has another hash"),
        (resealed([*lines[:2], replace(voucher_line, command=more), *lines[3:]]), "Line 3 .* who may not"),
        (
            resealed([*lines[:2], replace(voucher_line, moves=(*voucher_line.moves, mine)), *lines[3:]]),
            "moves something",
        ),
        (resealed([*lines, voucher_line]), "Line 7 of the journal is 10500 ms before"),
        (resealed([*lines[:3], lines[2], *lines[3:]]), "Line 4 .* redeemed already"),
        (resealed([lines[1], *lines[2:]]), "Line 1 .* less than is to leave it"),
        (resealed([replace(lines[0], command=Pass(bytes(32)), moves=())]), "no escrow"),
    ):
        with pytest.raises(BadJournal, match=part):
            verified(changed, LEDGER)
    with pytest.raises(BadJournal, match="Line 2"):
        verified(lines, OTHER)
    assert verified(lines[:4], LEDGER).balances, "what is cut off is not seen without a checkpoint"


OPERATOR = KeyPair.from_seed(b"o" * 32)
HOUSE = HouseLedger(OPERATOR.node_id, "USD")


def all_of_a_journal() -> Desk:
    """Whatever a ledger can be asked to do, but for a fee."""
    book, seller = a_book(), SELLERS[0]
    book.deposit(SPONSOR.address, STAKE)
    escrow = opened(book, terms(fee_ppm=33_333, holdback_ppm=77_777))
    book.admit(escrow, NODES[2], 333, DRIVER)
    book.top_up(escrow, amount_micro=501, cap_micro=77, expires_ms=20_000)
    for node, amount, key in ((NODES[0], 301, DRIVER), (NODES[2], 333, CLIENT), (NODES[0], 777, CLIENT)):
        book.redeem(voucher(escrow, node, amount, key))
    order = Withholding(escrow=escrow, payee=NODES[0].address, amount_micro=13, evidence=WORK)
    book.withhold(order, AUDITOR.sign(order.digest(LEDGER)))
    withdrawn(book, withdrawal(CLIENT, 99, 1), CLIENT)
    lost, kept = (book.post(bond_terms(seller, nonce=bytes([nonce] * 32)), SPONSOR) for nonce in (1, 2))
    book.slash(lost, HOLDS[2].to_bytes(), HOLDS[3].to_bytes())
    book.unbond(kept, SPONSOR)
    for node, amount in zip(NODES, (777, 0, 333), strict=True):
        book.finish(escrow, node, amount)
    book.ask_for_the_rest(escrow)
    book.at(2 * DAY_MS)
    return book


def read_by_another(lines: list[Line]) -> dict[str, int]:
    """As whoever has a file from `shoal account export` reads it."""
    head, *plain = (unpacked(msgspec.json.decode(msgspec.json.encode(one))) for one in (LEDGER, *lines))
    reader = Reader(head)
    for one in plain:
        reader.read(one)
    return reader.balances


def test_a_journal_is_checked_without_any_code_of_the_ledger() -> None:
    book = all_of_a_journal()
    lines = book.lines
    assert {type(one.command) for one in lines} == set(get_args(Command)) - {SetFee}
    assert read_by_another(lines) == verified(lines, LEDGER).balances == book.balances


@pytest.mark.parametrize("what", ["left out", "twice", "another's", "more"])
def test_two_readers_find_the_line_that_an_operator_forged(what: str) -> None:
    """It makes the hashes fit again, as it can."""
    lines, found = all_of_a_journal().lines, 0
    for place in range(1, len(lines), 2):
        before, one, after = lines[:place], lines[place], lines[place + 1 :]
        mine = Move(lines[0].moves[0].target, FEES, 1)
        forged = {
            "left out": [*before, *after],
            "twice": [*before, one, one, *after],
            "another's": [*before, replace(one, command=lines[place - 1].command), *after],
            "more": [*before, replace(one, moves=(*one.moves, mine)), *after],
        }[what]
        sealed = resealed(forged)
        try:
            balances = verified(sealed, LEDGER).balances
        except BadJournal as error:
            found += 1
            assert re.match(r"Line \d+ of the journal", error.sentence)
            with pytest.raises((AssertionError, KeyError)):
                read_by_another(sealed)
        else:
            assert balances == read_by_another(sealed)
    assert found >= 5


def deposits(*amounts: int) -> list[Line]:
    """A journal that the operator can make as it likes: nobody signs what comes in."""
    book, lines = Book(HOUSE), list[Line]()
    for number, amount in enumerate(amounts, start=1):
        command = Deposit(CLIENT.address, amount, f"mint {number}")
        lines.append(line(number, 0, command, book.apply(command), lines[-1].hash if lines else BEGINNING))
    return lines


def checkpoint(one: Line, key: KeyPair = OPERATOR, currency: str = "USD", network: str = "shoal") -> Envelope:
    return sign(key, Checkpoint(currency=currency, number=one.number, hash=one.hash), network)


def test_a_checkpoint_shows_what_was_altered_after_it() -> None:
    lines = deposits(1, 2, 3, 4)
    largest = sign(OPERATOR, Checkpoint(currency="A" * 12, number=1 << 62, hash=WORK))
    arrived = Envelope.from_bytes(largest.to_bytes(), Checkpoint.MAX_BYTES)
    assert open_checkpoint(arrived, HouseLedger(OPERATOR.node_id, "A" * 12)).number == 1 << 62
    for one in lines:
        assert verified(lines, HOUSE, checkpoint(one)).balances[ISSUED] == -10
    for changed, at, part in (
        (deposits(1, 2, 3, 5), 4, "Line 4 of the journal is not the one that its operator signed"),
        (deposits(9, 2, 3, 4), 3, f"Line 3 .* and {lines[2].hash.hex()[:12]} in the checkpoint. It, or a line before"),
        (deposits(1, 3, 4), 2, "Line 2 .* is not the one"),
        (lines[:3], 4, "Line 4 of the journal is missing: its operator has signed 4 lines"),
        (lines[:1], 4, "Line 2 of the journal is missing"),
        ([], 1, "Line 1 of the journal is missing"),
    ):
        verified(changed, HOUSE)
        with pytest.raises(BadJournal, match=part):
            verified(changed, HOUSE, checkpoint(lines[at - 1]))
    assert verified(deposits(1, 2, 3, 5), HOUSE, checkpoint(lines[2])), "what came after it is not bound by it"


def test_two_checkpoints_of_one_line_convict_an_operator() -> None:
    lines, others = deposits(1, 2, 3), deposits(1, 2, 4)
    said = contradiction(checkpoint(lines[2]), checkpoint(others[2]), HOUSE)
    assert said is not None and f"{OPERATOR.node_id.hex()[:8]}, has signed two journals: the hash of line 3" in said
    assert lines[2].hash.hex()[:12] in said and others[2].hash.hex()[:12] in said
    assert contradiction(checkpoint(lines[2]), checkpoint(lines[2]), HOUSE) is None
    assert contradiction(checkpoint(lines[1]), checkpoint(others[2]), HOUSE) is None
    assert contradiction(checkpoint(lines[1]), checkpoint(others[1]), HOUSE) is None, "the two are alike so far"


STRANGER = KeyPair.from_seed(b"s" * 32)


@pytest.mark.parametrize(
    ("forged", "error", "part"),
    [
        (lambda one: checkpoint(one, STRANGER), BadCheckpoint, "in USD that fec14286 runs says nothing of this ledger"),
        (lambda one: checkpoint(one, currency="EUR"), BadCheckpoint, "in EUR that"),
        (lambda one: checkpoint(one, network="testnet"), VersionMismatch, "network"),
        (lambda one: replace(checkpoint(one, STRANGER), signer=OPERATOR.node_id), BadSignature, "does not carry"),
        (lambda one: replace(checkpoint(one), body=encode(Checkpoint(currency="USD", number=1, hash=WORK))),
         BadSignature, "does not carry"),
    ],
    ids=["of another operator", "of another currency", "of another network", "of nobody", "changed"],
)  # fmt: skip
def test_a_checkpoint_that_its_operator_did_not_sign_for_this_ledger_says_nothing(
    forged: Callable[[Line], Envelope], error: type[ShoalError], part: str
) -> None:
    lines, others = deposits(1, 2), deposits(1, 3)
    with pytest.raises(error, match=part):
        verified(lines, HOUSE, forged(lines[1]))
    with pytest.raises(error, match=part):
        contradiction(checkpoint(lines[1]), forged(others[1]), HOUSE)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_is_taken_does_not_depend_on_how_often_one_redeems(steps: list[int], fee: int, hold: int) -> None:
    whole = sum(steps)
    ends = []
    for amounts in ([sum(steps[: at + 1]) for at in range(len(steps))], [whole]):
        book = a_book(10_000)
        escrow = opened(book, terms(amount_micro=whole, cap_micro=0, fee_ppm=fee, holdback_ppm=hold,
                                    payees=(Payee(NODES[0].address, whole),)))  # fmt: skip
        for amount in amounts:
            book.redeem(voucher(escrow, NODES[0], amount))
        book.at(10**6)
        ends.append(book.balances)
    assert {name: balance for name, balance in ends[0].items() if balance} == {
        name: balance for name, balance in ends[1].items() if balance
    }
