"""Double entries: money moves from one account to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.errors import BadInput
from shoal.identity.accounts import address_text
from shoal.quantities.money import AMOUNT_MAX, format_money

ISSUED = "issued"
"""What the ledger owes in all, below zero: the other side of deposits and withdrawals."""
FEES = "fees"


class MoneyRefused(BadInput):
    """A ledger does not do what it was asked, and nothing has moved."""

    code = "SH-190"


class TooLittleMoney(MoneyRefused):
    """An account has less than is to leave it."""

    code = "SH-191"


class DoneAlready(MoneyRefused):
    """What somebody signed has been done already, and would change nothing."""

    code = "SH-182"


class Move(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From one account to another."""

    source: str
    target: str
    amount_micro: Annotated[int, Meta(ge=1, le=AMOUNT_MAX)]


def account(address: bytes) -> str:
    return address_text(address)


def escrowed(escrow: bytes) -> str:
    return f"escrow {escrow.hex()}"


def bonded(bond: bytes) -> str:
    return f"bond {bond.hex()}"


def held(escrow: bytes, payee: bytes) -> str:
    """Paid to a payee, and held back."""
    return f"held {escrow.hex()} {address_text(payee)}"


def moves_of(*wanted: tuple[str, str, int]) -> tuple[Move, ...]:
    """Without those of nothing."""
    return tuple(Move(*one) for one in wanted if one[2])


def moved(balances: Mapping[str, int], moves: Iterable[Move]) -> dict[str, int]:
    """The balances, of the accounts that take part, after all of the moves. Raises TooLittleMoney, MoneyRefused."""
    after: dict[str, int] = {}
    for move in moves:
        if type(move.amount_micro) is not int or not 0 < move.amount_micro <= AMOUNT_MAX:
            raise MoneyRefused(f"{move.amount_micro!r} millionths cannot move from {move.source} to {move.target}.")
        for name, change in ((move.source, -move.amount_micro), (move.target, move.amount_micro)):
            after[name] = after.get(name, balances.get(name, 0)) + change
    for name, balance in after.items():
        if balance < 0 and name != ISSUED:
            lacking = format_money(balances.get(name, 0))
            raise TooLittleMoney(f"{name} has {lacking}, {format_money(-balance)} less than is to leave it.")
        if abs(balance) > AMOUNT_MAX:
            raise MoneyRefused(f"{name} would have more than can be counted, {format_money(AMOUNT_MAX)}.")
    return after
