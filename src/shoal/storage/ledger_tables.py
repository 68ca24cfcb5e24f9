"""The tables of a ledger, alike in SQLite and PostgreSQL. All but the journal follow from the journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeAlias

import msgspec
import sqlalchemy as sa
from msgspec.msgpack import Decoder
from msgspec.structs import replace

from shoal.ledger.bonds import Bond
from shoal.ledger.escrows import Escrow, Paid
from shoal.ledger.fees import Announced
from shoal.ledger.journal import Line

SCHEMA = 4
"""The form of the tables. In a database of an older form they are made anew from the journal; one of a newer form is
refused."""

METADATA = sa.MetaData()
_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # as a key, SQLite keeps this without an index beside
_BY_KEY: dict[str, Any] = {"sqlite_with_rowid": False}
ABOUT = sa.Table(
    "ledger_about",
    METADATA,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("ledger", sa.LargeBinary, nullable=False),
)
ACCOUNTS = sa.Table(
    "ledger_accounts",
    METADATA,
    sa.Column("name", sa.String(160), primary_key=True),
    sa.Column("balance_micro", sa.BigInteger, nullable=False),
    **_BY_KEY,
)
ESCROWS = sa.Table(
    "ledger_escrows",
    METADATA,
    sa.Column("escrow", sa.LargeBinary(32), primary_key=True),
    sa.Column("due_ms", sa.BigInteger, nullable=True, index=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
PAID = sa.Table(
    "ledger_paid",
    METADATA,
    sa.Column("escrow", sa.LargeBinary(32), primary_key=True),
    sa.Column("payee", sa.LargeBinary(20), primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
    **_BY_KEY,
)
"""Of an escrow, a row a payee, so that a voucher writes one however many payees there are."""
WITHDRAWALS = sa.Table(
    "ledger_withdrawals",
    METADATA,
    sa.Column("account", sa.LargeBinary(20), primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
)
BONDS = sa.Table(
    "ledger_bonds",
    METADATA,
    sa.Column("bond", sa.LargeBinary(32), primary_key=True),
    sa.Column("node", sa.LargeBinary(32), nullable=False, index=True),
    sa.Column("network", sa.LargeBinary, nullable=False),
    sa.Column("account", sa.LargeBinary(20), nullable=False, index=True),
    sa.Column("at_stake_micro", sa.BigInteger, nullable=False),
    sa.Column("due_ms", sa.BigInteger, nullable=True, index=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
FEES = sa.Table(
    "ledger_fees",
    METADATA,
    sa.Column("one", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
"""One row, once there is a fee table: that which holds, and that which is to follow."""
REFERENCES = sa.Table("ledger_references", METADATA, sa.Column("reference", sa.LargeBinary, primary_key=True))
JOURNAL = sa.Table(
    "ledger_journal",
    METADATA,
    sa.Column("number", _Number, primary_key=True, autoincrement=False),
    sa.Column("line", sa.LargeBinary, nullable=False),
)
WRITTEN_ONCE = (REFERENCES, JOURNAL)
"""Whose rows are never replaced by others."""

Row: TypeAlias = tuple[Any, ...]
Rows: TypeAlias = dict[sa.Table, list[Row]]
"""What is to be written, by table; the values of a row in the order of its columns."""

encode = msgspec.msgpack.Encoder().encode
decode_line = Decoder(Line).decode
decode_bond = Decoder(Bond).decode
decode_fees = Decoder(tuple[Announced, ...]).decode
_decode_escrow, _decode_paid = Decoder(Escrow).decode, Decoder(Paid).decode


def escrow_row(one: Escrow) -> Row:
    """Without what it has paid."""
    return one.escrow_id, one.due_ms, encode(replace(one, paid={}))


def paid_rows(one: Escrow, before: Mapping[bytes, Paid]) -> Iterable[Row]:
    """Of the payees that have another standing than before."""
    return ((one.escrow_id, payee, encode(paid)) for payee, paid in one.paid.items() if before.get(payee) is not paid)


def escrow_of_rows(content: bytes, paid: Iterable[tuple[bytes, bytes]]) -> Escrow:
    one = _decode_escrow(content)
    one.paid.update((payee, _decode_paid(each)) for payee, each in paid)
    return one


def bond_row(one: Bond) -> Row:
    terms = one.terms
    return (
        one.bond_id, terms.node, terms.network.encode(), terms.account, one.at_stake_micro, one.due_ms, encode(one),
    )  # fmt: skip


def fees_row(tables: tuple[Announced, ...]) -> Row:
    return 1, encode(tables)


def line_row(one: Line) -> Row:
    return one.number, encode(one)


@cache
def put_into(table: sa.Table, values: str) -> str:
    """Rows instead of those with their keys, or new ones: SQLite and PostgreSQL have the same words for it."""
    keys, names = table.primary_key.columns.keys(), table.columns.keys()
    said = f"INSERT INTO {table.name} ({', '.join(names)}) {values}"
    if table in WRITTEN_ONCE:
        return said
    new = ", ".join(f"{name} = excluded.{name}" for name in names if name not in keys)
    return f"{said} ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {new}"
