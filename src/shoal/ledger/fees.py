"""What a ledger takes of what its escrows pay: tables that its operator signs, announced ahead.

An escrow keeps the fee that its payer signed in the terms. The table says which that has to be when it is opened.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal.identity import Envelope
from shoal.ledger.moves import MoneyRefused
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import DAY_MS, FeeTable, LedgerName, open_fee_table

FEE_NOTICE_MS = DAY_MS
"""A fee is announced so long before it holds; at once where nobody has any money at the ledger yet."""
FEE_AHEAD_MAX_MS = 400 * DAY_MS


class OtherFee(MoneyRefused):
    """The terms of an escrow name another fee than the ledger takes."""

    code = "SH-176"


class BadFees(MoneyRefused):
    """A fee table does not follow the one before, or comes too soon."""

    code = "SH-177"


class Announced(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fee table, and its packed Envelope."""

    table: FeeTable
    signed: bytes


def opened_table(signed: bytes, ledger: LedgerName, network: str = DEFAULT_NETWORK) -> Announced:
    """Of a packed Envelope. Raises BadEnvelope, and what `open_fee_table` does."""
    envelope = Envelope.from_bytes(signed, FeeTable.MAX_BYTES)
    return Announced(open_fee_table(envelope, ledger, network), signed)


def announced(before: tuple[Announced, ...], one: Announced, owed_micro: int, now_ms: int) -> tuple[Announced, ...]:
    """The table that holds, if any, and the one that is to follow. One that was to follow and does not hold yet is
    replaced. Raises BadFees."""
    following = before[-1].table.number + 1 if before else 1
    if one.table.number != following:
        raise BadFees(f"A fee table has the number {one.table.number}; the next one of this ledger is {following}.")
    if owed_micro and one.table.from_ms < now_ms + FEE_NOTICE_MS:
        raise BadFees(
            f"A fee that is to hold from {one.table.from_ms} ms comes too soon: others have money here, and it is "
            f"{now_ms} ms. Announce it {FEE_NOTICE_MS // 3_600_000} hours ahead."
        )
    if one.table.from_ms > now_ms + FEE_AHEAD_MAX_MS:
        raise BadFees(f"A fee that is to hold from {one.table.from_ms} ms is announced too far ahead.")
    return *(each for each in before if each is _holding(before, now_ms)), one


def fee_at(tables: Iterable[Announced], at_ms: int) -> int | None:
    """Of what an escrow pays that is opened then, in parts per million; None where the ledger says nothing, and takes
    what the terms do."""
    found = _holding(tables, at_ms)
    return None if found is None else found.table.fee_ppm


def _holding(tables: Iterable[Announced], at_ms: int) -> Announced | None:
    return next((one for one in reversed(tuple(tables)) if one.table.from_ms <= at_ms), None)
