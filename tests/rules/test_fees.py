"""What a ledger takes: signed by its operator, announced ahead, and what every escrow is opened with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ledger_desk import CLIENT, LEDGER, NODES, Desk, a_book, has, opened, terms, voucher

from shoal.errors import BadInput, BadRecord
from shoal.identity import KeyPair
from shoal.ledger.commands import Open, SetFee
from shoal.ledger.fees import FEE_AHEAD_MAX_MS, FEE_NOTICE_MS, BadFees, OtherFee, fee_at
from shoal.ledger.journal import BadJournal, line, verified
from shoal.ledger.moves import FEES
from shoal.protocol.messages import sign
from shoal.protocol.money import BadFeeTable, FeeTable, HouseLedger
from shoal.quantities.money import format_share, parse_share

OPERATOR = KeyPair.from_seed(bytes([9] * 32))
MINE = HouseLedger(OPERATOR.node_id, "USD")
START_MS = 1_000_000


def a_desk(money: int = 0) -> Desk:
    desk = Desk()
    desk.book.ledger = MINE
    desk.at(START_MS)
    if money:
        desk.deposit(CLIENT.address, money)
    return desk


def set_fee(
    desk: Desk, fee_ppm: int, number: int = 1, from_ms: int = START_MS, key: KeyPair = OPERATOR, currency: str = "USD",
    network: str = "shoal",
) -> None:  # fmt: skip
    table = FeeTable(currency=currency, number=number, from_ms=from_ms, fee_ppm=fee_ppm)
    desk.do(SetFee(sign(key, table, network).to_bytes()))


def open_with(desk: Desk, fee_ppm: int, nonce: int = 0) -> bytes:
    wanted = terms(fee_ppm=fee_ppm, nonce=nonce.to_bytes(32), expires_ms=desk.book.now_ms + 10_000)
    name = wanted.escrow_id(MINE)
    desk.do(Open(wanted, CLIENT.sign(name)))
    return name


def test_an_escrow_is_opened_with_the_fee_that_the_ledger_takes_and_no_other() -> None:
    desk = a_desk()
    set_fee(desk, 20_000)
    desk.deposit(CLIENT.address, 5000)
    for fee in (0, 19_999, 20_001):
        with pytest.raises(OtherFee, match="takes 2 % of what an escrow pays .* these terms say .*: sign them with"):
            open_with(desk, fee)
    open_with(desk, 20_000)


def test_without_a_table_the_terms_say_it_and_with_one_of_nothing_it_is_nothing() -> None:
    desk = a_desk(5000)
    open_with(desk, 30_000)
    set_fee(desk, 0, from_ms=START_MS + FEE_NOTICE_MS)
    open_with(desk, 30_000, 1)
    desk.at(START_MS + FEE_NOTICE_MS)
    with pytest.raises(OtherFee, match="takes 0 %"):
        open_with(desk, 30_000, 2)
    open_with(desk, 0, 2)


def test_a_change_is_announced_ahead_and_escrows_keep_what_was_signed() -> None:
    desk = a_desk()
    set_fee(desk, 20_000)
    desk.deposit(CLIENT.address, 5000)
    then = START_MS + FEE_NOTICE_MS
    with pytest.raises(BadFees, match="comes too soon: others have money here.* Announce it 24 hours ahead"):
        set_fee(desk, 50_000, 2, then - 1)
    set_fee(desk, 50_000, 2, then)
    assert [fee_at(desk.book.fees, at) for at in (0, START_MS, then - 1, then)] == [None, 20_000, 20_000, 50_000]
    desk.at(then - 1)
    wanted = terms(fee_ppm=20_000, expires_ms=then + 10_000)
    name = wanted.escrow_id(MINE)
    desk.do(Open(wanted, CLIENT.sign(name)))
    desk.at(then)
    assert fee_at(desk.book.fees, then) == 50_000 and desk.escrows[name].terms.fee_ppm == 20_000
    open_with(desk, 50_000, 1)


def test_what_was_announced_can_be_taken_back_before_it_holds() -> None:
    desk = a_desk()
    set_fee(desk, 20_000)
    desk.deposit(CLIENT.address, 5000)
    set_fee(desk, 500_000, 2, START_MS + FEE_NOTICE_MS)
    set_fee(desk, 20_000, 3, START_MS + FEE_NOTICE_MS)
    assert [one.table.number for one in desk.book.fees] == [1, 3]
    desk.at(START_MS + FEE_NOTICE_MS)
    open_with(desk, 20_000)
    set_fee(desk, 10_000, 4, START_MS + 2 * FEE_NOTICE_MS)
    assert [one.table.number for one in desk.book.fees] == [3, 4], "what holds, and what is to follow"


def test_a_table_is_good_once_in_its_turn_and_signed_by_the_operator_of_this_ledger() -> None:
    desk = a_desk()
    set_fee(desk, 20_000)
    for number in (1, 3):
        with pytest.raises(BadFees, match=f"has the number {number}; the next one of this ledger is 2"):
            set_fee(desk, 30_000, number)
    with pytest.raises(BadFees, match="too far ahead"):
        set_fee(desk, 30_000, 2, START_MS + FEE_AHEAD_MAX_MS + 1)
    for wrong in ({"key": KeyPair.generate()}, {"currency": "EUR"}):
        with pytest.raises(BadFeeTable, match="says nothing of this ledger"):
            set_fee(desk, 30_000, 2, **wrong)  # type: ignore[arg-type]
    with pytest.raises(BadRecord, match="testnet"):
        set_fee(desk, 30_000, 2, network="testnet")
    with pytest.raises(BadRecord):
        desk.do(SetFee(b"nothing"))
    assert len(desk.lines) == 1 and fee_at(desk.book.fees, START_MS) == 20_000


def test_a_journal_shows_who_was_charged_another_fee_than_was_said() -> None:
    desk = a_desk()
    set_fee(desk, 20_000)
    desk.deposit(CLIENT.address, 5000)
    open_with(desk, 20_000)
    book = verified(desk.lines, MINE)
    assert book.fees == desk.book.fees and fee_at(book.fees, START_MS) == 20_000
    wanted = terms(fee_ppm=90_000, expires_ms=START_MS + 10_000)
    command = Open(wanted, CLIENT.sign(wanted.escrow_id(MINE)))
    moves = replace(desk.book, fees=(), balances=dict(desk.balances), escrows=dict(desk.escrows)).apply(command)
    forged = line(4, START_MS, command, moves, desk.lines[-1].hash)
    with pytest.raises(BadJournal, match="Line 4 .* nothing that the rules allow: This ledger takes 2 %"):
        verified([*desk.lines, forged], MINE)


def test_the_fee_is_what_the_terms_say_of_what_is_paid() -> None:
    desk = a_book()
    escrow = opened(desk, terms(fee_ppm=20_000, holdback_ppm=0))
    desk.redeem(voucher(escrow, NODES[0], 500))
    assert (desk.balances[FEES], has(desk, NODES[0])) == (10, 490) and desk.book.ledger == LEDGER


@pytest.mark.parametrize(
    ("text", "ppm"),
    [("2%", 20_000), ("0.5 %", 5000), ("0%", 0), ("100%", 1_000_000), ("0.0001%", 1), (" 12.25% ", 122_500)],
)
def test_a_share_is_read_as_it_is_written(text: str, ppm: int) -> None:
    assert parse_share(text) == ppm == parse_share(format_share(ppm))


@pytest.mark.parametrize("text", ["2", "-1%", "100.0001%", "1.23456%", "two%", "", "%", "1e1%", "2%%", "٢%"])
def test_what_is_no_share_is_said(text: str) -> None:
    with pytest.raises(BadInput, match="is no share; write for example '2%'"):
        parse_share(text)
