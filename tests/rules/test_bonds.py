"""Bonds: money that is lost by two holds that contradict each other, and by nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from ledger_desk import CLIENT, LEDGER, OTHER, RIVAL, SPONSOR, Desk, a_hold, bond_terms, has
from msgspec.structs import replace

from shoal.errors import ShoalError
from shoal.identity import BadEnvelope, BadSignature, Envelope, KeyPair
from shoal.ledger.bonds import BondOver, BondState, NoContradiction
from shoal.ledger.book import NotSigned, SameBond, UnknownBond
from shoal.ledger.commands import Command, PayBack, PostBond, Slash
from shoal.ledger.journal import LINE_MAX_BYTES, verified
from shoal.ledger.moves import FEES, DoneAlready, MoneyRefused, Move, TooLittleMoney, account, bonded
from shoal.protocol.holds import Hold, Release
from shoal.protocol.messages import UnknownKind, VersionMismatch, sign
from shoal.protocol.money import BOND_NOTICE_MAX_MS, DAY_MS, BondTerms
from shoal.quantities.money import MICRO

NODE, STRANGER, *GUESTS = (KeyPair.from_seed(bytes([number] * 32)) for number in range(1, 5))
ONE = a_hold(NODE, client=GUESTS[0].node_id)
OTHERS = a_hold(NODE, client=GUESTS[1].node_id, number=2)


def a_desk(money: int = 5 * MICRO) -> Desk:
    desk = Desk()
    desk.deposit(SPONSOR.address, money)
    return desk


def slash(desk: Desk, bond: bytes, one: Envelope = ONE, other: Envelope = OTHERS) -> tuple[Move, ...]:
    return desk.slash(bond, one.to_bytes(), other.to_bytes())


def test_a_bond_is_posted_asked_for_and_paid_back() -> None:
    desk = a_desk()
    bond = desk.post(bond_terms(NODE), SPONSOR)
    more = desk.post(bond_terms(NODE, nonce=bytes([1] * 32), amount_micro=MICRO), SPONSOR)
    assert (has(desk, SPONSOR), desk.balances[bonded(bond)]) == (2 * MICRO, 2 * MICRO)
    of = desk.book.bond_of
    assert (of(NODE.node_id), of(STRANGER.node_id), of(NODE.node_id, "testnet")) == (3 * MICRO, 0, 0)
    for key, error in ((RIVAL, NotSigned), (CLIENT, NotSigned)):
        with pytest.raises(error, match="does not carry its signature"):
            desk.unbond(bond, key)
    desk.at(1000)
    with pytest.raises(MoneyRefused, match="not to be paid back yet"):
        desk.do(PayBack(bond))
    assert desk.unbond(bond, SPONSOR) == ()
    assert of(NODE.node_id) == 3 * MICRO, "it can be lost still"
    assert (of(NODE.node_id, until_ms=DAY_MS + 999), of(NODE.node_id, until_ms=DAY_MS + 1000)) == (3 * MICRO, MICRO)
    with pytest.raises(DoneAlready, match=f"asked for already; it is paid back at {DAY_MS + 1000} ms"):
        desk.unbond(bond, SPONSOR)
    assert desk.at(DAY_MS + 999) == ()
    desk.book.at(DAY_MS + 1000)
    assert of(NODE.node_id) == MICRO, "also before anybody has seen to it"
    for late in (lambda: slash(desk, bond), lambda: desk.unbond(bond, SPONSOR)):
        with pytest.raises(BondOver, match="has been paid back"):
            late()
    assert desk.at(DAY_MS + 1000) == (Move(bonded(bond), account(SPONSOR.address), 2 * MICRO),)
    with pytest.raises(BondOver):
        desk.do(PayBack(bond))
    with pytest.raises(SameBond, match="draw another nonce"):
        desk.post(bond_terms(NODE), SPONSOR)
    assert has(desk, SPONSOR) == 4 * MICRO and verified(desk.lines, LEDGER).bonds == desk.bonds
    assert desk.at(1 << 50) == () and desk.bonds[more].state is BondState.STANDING


def test_two_holds_that_contradict_each_other_take_the_whole_bond_once() -> None:
    desk = a_desk()
    bond = desk.post(bond_terms(NODE), SPONSOR)
    assert slash(desk, bond) == (Move(bonded(bond), FEES, 2 * MICRO),)
    assert desk.book.bond_of(NODE.node_id) == 0 and has(desk, SPONSOR) == 3 * MICRO
    for again in (lambda: slash(desk, bond, OTHERS, ONE), lambda: desk.unbond(bond, SPONSOR)):
        with pytest.raises(BondOver, match="is lost: its node has promised one slot twice"):
            again()
    assert verified(desk.lines, LEDGER).bonds == desk.bonds and desk.at(1 << 50) == ()


def test_a_bond_is_lost_also_while_its_notice_runs() -> None:
    desk = a_desk()
    bond = desk.post(bond_terms(NODE), SPONSOR)
    desk.unbond(bond, SPONSOR)
    desk.at(DAY_MS - 1)
    slash(desk, bond)
    assert desk.at(2 * DAY_MS) == () and desk.balances[FEES] == 2 * MICRO


def test_a_bond_answers_for_promises_that_last_beyond_its_posting() -> None:
    """So a pair that took one bond takes none that is posted when those promises are over."""
    desk = a_desk()
    desk.at(14_999)
    early = desk.post(bond_terms(NODE), SPONSOR)
    desk.at(15_000)
    late = desk.post(bond_terms(NODE, nonce=bytes([1] * 32)), SPONSOR)
    slash(desk, early)
    with pytest.raises(NoContradiction, match="posted at 15000 ms, and one of these two holds was over at 15000 ms"):
        slash(desk, late)
    with pytest.raises(NoContradiction, match="was over at 15000 ms"):
        slash(desk, late, other=a_hold(NODE, client=GUESTS[1].node_id, number=2, until_ms=1 << 50))
    slash(desk, late, *(a_hold(NODE, client=guest.node_id, number=number, until_ms=15_001)
                        for number, guest in enumerate(GUESTS, start=1)))  # fmt: skip


RELEASE = sign(GUESTS[0], Release(node=NODE.node_id, slot=0, number=1)).to_bytes()


@pytest.mark.parametrize(
    ("one", "other", "error", "part"),
    [
        (ONE, ONE, NoContradiction, "can both be kept"),
        (ONE, a_hold(NODE, client=GUESTS[0].node_id, number=2), NoContradiction, "can both be kept"),
        (ONE, a_hold(NODE, client=GUESTS[1].node_id, number=2, slot=1), NoContradiction, "can both be kept"),
        (ONE, a_hold(NODE, client=GUESTS[1].node_id, number=2, from_ms=15_000, until_ms=16_000), NoContradiction,
         "can both be kept"),
        (ONE, a_hold(NODE, client=GUESTS[1].node_id, number=2, released=(RELEASE,)), NoContradiction,
         "the client of the first gave its place back"),
        (ONE, a_hold(STRANGER, client=GUESTS[1].node_id, number=2), NoContradiction,
         "stands for node 8a88e3dd, and a hold of 8139770e says nothing about that"),
        (a_hold(STRANGER), a_hold(STRANGER, client=GUESTS[1].node_id, number=2), NoContradiction, "stands for node"),
        (a_hold(NODE, network="testnet"), a_hold(NODE, network="testnet", client=GUESTS[1].node_id, number=2),
         VersionMismatch, "network"),
        (ONE, replace(OTHERS, signature=bytes(64)), BadSignature, "does not carry"),
        (ONE, replace(a_hold(STRANGER, number=2), signer=NODE.node_id), BadSignature, "does not carry"),
        (ONE, sign(NODE, Release(node=NODE.node_id, slot=0, number=1)), UnknownKind, "was expected"),
    ],
    ids=["one alone", "for one client", "of two slots", "one after the other", "given back", "of two nodes",
         "of another node", "of another network", "of nobody", "forged", "no hold"],
)  # fmt: skip
def test_what_convicts_nobody_takes_no_bond(one: Envelope, other: Envelope, error: type[ShoalError], part: str) -> None:
    desk = a_desk()
    bond = desk.post(bond_terms(NODE), SPONSOR)
    before, lines = dict(desk.balances), len(desk.lines)
    for pair in ((one, other), (other, one)):
        with pytest.raises(error, match=part):
            slash(desk, bond, *pair)
    assert desk.balances == before and len(desk.lines) == lines
    slash(desk, bond)


def test_who_may_not_posts_nothing() -> None:
    desk = a_desk()
    wanted = bond_terms(NODE)
    signed = SPONSOR.sign(wanted.bond_id(LEDGER))
    commands: tuple[tuple[Command, type[ShoalError]], ...] = (
        (PostBond(replace(wanted, amount_micro=3 * MICRO), signed), NotSigned),
        (PostBond(replace(wanted, network="testnet"), signed), NotSigned),
        (PostBond(replace(wanted, node=STRANGER.node_id), signed), NotSigned),
        (PostBond(replace(wanted, account=RIVAL.address), signed), NotSigned),
        (PostBond(wanted, SPONSOR.sign(wanted.bond_id(OTHER))), NotSigned),
        (PostBond(replace(wanted, amount_micro=6 * MICRO),
                  SPONSOR.sign(replace(wanted, amount_micro=6 * MICRO).bond_id(LEDGER))), TooLittleMoney),
        (PayBack(bytes(32)), UnknownBond),
        (Slash(bytes(32), ONE.to_bytes(), OTHERS.to_bytes()), UnknownBond),
    )  # fmt: skip
    for command, error in commands:
        with pytest.raises(error):
            desk.do(command)
    bond = desk.post(wanted, SPONSOR)
    with pytest.raises(BadEnvelope):
        desk.slash(bond, b"x", b"")
    with pytest.raises(BadEnvelope, match="at most"):
        desk.slash(bond, bytes(Hold.MAX_BYTES + 1000), b"")
    assert len(desk.bonds) == 1


@pytest.mark.parametrize(
    "changed",
    [{"amount_micro": MICRO - 1}, {"notice_ms": DAY_MS - 1}, {"notice_ms": BOND_NOTICE_MAX_MS + 1}, {"network": ""},
     {"network": "x" * 33}, {"node": bytes(31)}],
)  # fmt: skip
def test_a_bond_that_cannot_be_is_not_read(changed: dict[str, Any]) -> None:
    wanted = bond_terms(NODE)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wanted), type=BondTerms) == wanted
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(replace(wanted, **changed)), type=BondTerms)


def test_the_largest_holds_fit_into_a_line() -> None:
    desk = a_desk()
    bond = desk.post(bond_terms(NODE), SPONSOR)
    padded = tuple(bytes(512) for _ in range(32))
    pair = (a_hold(NODE, client=guest.node_id, number=at, released=padded) for at, guest in enumerate(GUESTS, start=1))
    slash(desk, bond, *pair)
    packed = msgspec.msgpack.encode(desk.lines[-1])
    assert 32_000 < len(packed) < LINE_MAX_BYTES
    assert msgspec.msgpack.decode(packed, type=type(desk.lines[-1])) == desk.lines[-1]
