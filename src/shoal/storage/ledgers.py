"""A ledger in a database: SQLite in a file, or PostgreSQL by a URL, through SQLAlchemy Core with one schema.

The rules are those of `ledger.book`: of a command, the accounts and the escrow or bond that it speaks of are read,
`Book.apply` decides, and what has changed is written with the journal's line, in one transaction. Several commands may
share one (group commit), each of them whole or not at all. What was answered survives a killed process and a lost power
supply: on SQLite as `storage.sqlite` opens it, on PostgreSQL with `synchronous_commit=on`, its default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from shoal.errors import ShoalError
from shoal.ledger.bonds import Bond
from shoal.ledger.book import Book
from shoal.ledger.commands import Command, Deposit, Pass, PayBack, Withdraw, bond_named_by, escrow_of
from shoal.ledger.escrows import Escrow
from shoal.ledger.journal import BEGINNING, BadJournal, Line, line, verified
from shoal.ledger.moves import Move
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import LedgerName
from shoal.storage.faults import LedgerFailed
from shoal.storage.sqlite import sqlite_engine
from shoal.world import Clock

SCHEMA = 3
"""The form of the tables. In a database of an older form they are made anew from the journal; one of a newer form is
refused."""
COMMANDS_MAX = 512
"""In one transaction."""
DUE_MAX = 256
"""Escrows, and as many bonds, that the time has brought something for, and that are seen to in one transaction before
its commands."""
PAGE_LINES = 512
SEARCHED_LINES, SEARCHED_BYTES = 4096, 8 << 20
"""Of the journal that is looked through for those of one account, for one page."""
BONDS_MAX = 64
"""Bonds that are listed, those with most at stake first."""
KNOWN_MAX = 10_000
"""Accounts, escrows and the like that are kept in memory between transactions."""

_tables = sa.MetaData()
_about = sa.Table(
    "ledger_about",
    _tables,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("ledger", sa.LargeBinary, nullable=False),
)
_accounts = sa.Table(
    "ledger_accounts",
    _tables,
    sa.Column("name", sa.String(160), primary_key=True),
    sa.Column("balance_micro", sa.BigInteger, nullable=False),
)
_escrows = sa.Table(
    "ledger_escrows",
    _tables,
    sa.Column("escrow", sa.LargeBinary(32), primary_key=True),
    sa.Column("due_ms", sa.BigInteger, nullable=True, index=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
_withdrawals = sa.Table(
    "ledger_withdrawals",
    _tables,
    sa.Column("account", sa.LargeBinary(20), primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
)
_bonds = sa.Table(
    "ledger_bonds",
    _tables,
    sa.Column("bond", sa.LargeBinary(32), primary_key=True),
    sa.Column("node", sa.LargeBinary(32), nullable=False, index=True),
    sa.Column("network", sa.LargeBinary, nullable=False),
    sa.Column("account", sa.LargeBinary(20), nullable=False, index=True),
    sa.Column("at_stake_micro", sa.BigInteger, nullable=False),
    sa.Column("due_ms", sa.BigInteger, nullable=True, index=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
_references = sa.Table("ledger_references", _tables, sa.Column("reference", sa.LargeBinary, primary_key=True))
_journal = sa.Table(
    "ledger_journal",
    _tables,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("line", sa.LargeBinary, nullable=False),
)

_LOCK = sa.select(_about.c.version).with_for_update()
_LAST = sa.select(_journal.c.line).order_by(_journal.c.number.desc()).limit(1)
_DUE, _BONDS_DUE = (
    sa.select(name).where(due_ms <= sa.bindparam("now_ms")).order_by(due_ms, name).limit(DUE_MAX)
    for name, due_ms in ((_escrows.c.escrow, _escrows.c.due_ms), (_bonds.c.bond, _bonds.c.due_ms))
)
_BALANCE = sa.select(_accounts.c.balance_micro).where(_accounts.c.name == sa.bindparam("one"))
_PAGE = (
    sa.select(_journal.c.line).where(_journal.c.number > sa.bindparam("after")).order_by(_journal.c.number)
    .limit(PAGE_LINES)
)  # fmt: skip
_ESCROW = sa.select(_escrows.c.content).where(_escrows.c.escrow == sa.bindparam("one"))
_BOND = sa.select(_bonds.c.content).where(_bonds.c.bond == sa.bindparam("one"))
_BEHIND = (
    _bonds.c.node == sa.bindparam("node"),
    _bonds.c.network == sa.bindparam("network"),
    sa.or_(_bonds.c.due_ms.is_(None), _bonds.c.due_ms > sa.bindparam("until_ms")),
)
_BOND_OF = sa.select(sa.func.sum(_bonds.c.at_stake_micro)).where(*_BEHIND)
_BONDS_BEHIND, _BONDS_BY = (
    sa.select(_bonds.c.content).where(*which).order_by(_bonds.c.at_stake_micro.desc(), _bonds.c.bond).limit(BONDS_MAX)
    for which in ((*_BEHIND, _bonds.c.at_stake_micro > 0), (_bonds.c.account == sa.bindparam("account"),))
)
_REFERENCE = sa.select(_references.c.reference).where(_references.c.reference == sa.bindparam("one"))
_WITHDRAWN = sa.select(_withdrawals.c.number).where(_withdrawals.c.account == sa.bindparam("one"))


def _upsert(table: sa.Table) -> sa.TextClause:
    """A row instead of the one with its key, or a new one: SQLite and PostgreSQL have the same words for it."""
    (key,), names = table.primary_key.columns.keys(), table.columns.keys()
    new = ", ".join(f"{name} = excluded.{name}" for name in names if name != key)
    values = ", ".join(f":{name}" for name in names)
    return sa.text(
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({values}) ON CONFLICT ({key}) DO UPDATE SET {new}"
    )


_PUT_BALANCE, _PUT_ESCROW, _PUT_BOND, _PUT_WITHDRAWN = map(_upsert, (_accounts, _escrows, _bonds, _withdrawals))
_ADD_REFERENCE, _ADD_LINE = _references.insert(), _journal.insert()

_encode = msgspec.msgpack.Encoder().encode
_lines = msgspec.msgpack.Decoder(Line)
_kept_escrows, _kept_bonds = msgspec.msgpack.Decoder(Escrow), msgspec.msgpack.Decoder(Bond)
_ledger = msgspec.msgpack.Decoder(LedgerName)


def _escrow_row(one: Escrow) -> dict[str, Any]:
    return {"escrow": one.escrow_id, "due_ms": one.due_ms, "content": _encode(one)}


def _bond_row(one: Bond) -> dict[str, Any]:
    return {
        "bond": one.bond_id, "node": one.terms.node, "network": one.terms.network.encode(),
        "account": one.terms.account, "at_stake_micro": one.at_stake_micro, "due_ms": one.due_ms,
        "content": _encode(one),
    }  # fmt: skip


@dataclass(frozen=True)
class Page:
    """Of a journal."""

    lines: tuple[Line, ...]
    seen: int | None
    """Where there is more: the line up to which all was looked through."""


class _Balances(dict[str, int]):
    """Of the accounts that were asked for; others are in the database."""

    def __init__(self) -> None:
        super().__init__()
        self.connection: sa.Connection | None = None

    def get(self, name: str, default: Any = 0) -> Any:
        if name not in self:
            assert self.connection is not None
            found = self.connection.execute(_BALANCE, {"one": name}).scalar()
            self[name] = default if found is None else found
        return self[name]


class _Known:
    """What was read of a ledger, or written, up to one line of its journal: as long as that is the last one, it need
    not be read again."""

    def __init__(self, ledger: LedgerName) -> None:
        self.last = b""
        """The hash of that line."""
        self.balances = _Balances()
        self.book = Book(ledger, balances=self.balances)

    def __len__(self) -> int:
        book = self.book
        kept: tuple[Sized, ...] = (self.balances, book.escrows, book.bonds, book.withdrawals, book.references)
        return sum(map(len, kept))


class SqlLedger:
    """One thread at a time uses it."""

    def __init__(self, engine: sa.Engine, place: str, ledger: LedgerName, clock: Clock) -> None:
        self._engine, self._place, self.ledger, self._clock = engine, place, ledger, clock
        self._known = _Known(ledger)
        self._latest_ms = 0
        """Of what the clock has said: the time never goes back, also where nothing was written at it."""

    @classmethod
    def open(cls, place: Path | str, ledger: LedgerName, clock: Clock) -> SqlLedger:
        """A file, or a `postgresql+psycopg://` URL. Raises LedgerFailed: also for a database of another ledger."""
        try:
            engine = sqlite_engine(place) if isinstance(place, Path) else sa.create_engine(place, pool_pre_ping=True)
        except (SQLAlchemyError, ImportError, ValueError):  # what it says would show the URL's password
            raise LedgerFailed(
                "The URL of the ledger's database cannot be used; write postgresql+psycopg://USER@HOST/DATABASE, and "
                "install shoal[postgres]. Or name a file, for SQLite."
            ) from None
        made = cls(engine, engine.url.render_as_string(hide_password=True), ledger, clock)
        try:
            with made._transaction() as connection:
                made._create_or_check(connection)
        except ShoalError:
            made.close()
            raise
        return made

    def close(self) -> None:
        self._engine.dispose()

    def apply(self, command: Command) -> tuple[Move, ...]:
        """Raises what `Book.apply` does; LedgerFailed."""
        (outcome,) = self.apply_all([command])
        if isinstance(outcome, ShoalError):
            raise outcome
        return outcome

    def apply_all(self, commands: Sequence[Command]) -> list[tuple[Move, ...] | ShoalError]:
        """Several in one transaction: of each, what it moved, or why nothing. Before them, what the time has brought.
        Raises LedgerFailed; nothing has happened then. Only where the connection broke in the middle of a commit the
        journal has to be asked."""
        if len(commands) > COMMANDS_MAX:
            raise ValueError(f"{len(commands)} commands are more than {COMMANDS_MAX}")
        known, self._known = self._known, _Known(self.ledger)  # if this fails, nothing is known any more
        with self._transaction() as connection:
            number, previous, last_ms = self._head(connection)
            self._latest_ms = max(self._latest_ms, last_ms, self._clock.now_ms())
            if known.last != previous or len(known) > KNOWN_MAX:
                known = _Known(self.ledger)
            known.balances.connection, book = connection, known.book
            book.at(self._latest_ms)
            fresh, outcomes = list[Line](), list[tuple[Move, ...] | ShoalError]()
            escrows, bonds = set[bytes](), set[bytes]()
            due = self._due(connection, book.now_ms)
            for command in (*due, *commands):
                escrow, bond = escrow_of(command, self.ledger), bond_named_by(command, self.ledger)
                self._read(connection, book, command, escrow, bond)
                try:
                    moves = book.apply(command)
                except ShoalError as error:
                    outcomes.append(error)
                    continue
                outcomes.append(moves)
                escrows |= {escrow} if escrow is not None else set()
                bonds |= {bond} if bond is not None else set()
                fresh.append(line(number + 1, book.now_ms, command, moves, previous))
                number, previous = number + 1, fresh[-1].hash
            self._write(connection, book, escrows, bonds, fresh)
            known.last, known.balances.connection = previous, None
        self._known = known
        return outcomes[len(due) :]

    def balance(self, name: str) -> int:
        with self._transaction() as connection:
            return int(connection.execute(_BALANCE, {"one": name}).scalar() or 0)

    def bond_of(self, node: bytes, network: str = DEFAULT_NETWORK, until_ms: int = 0) -> int:
        """As `Book.bond_of`. Raises LedgerFailed."""
        wanted = self._behind(node, network, until_ms)
        with self._transaction() as connection:
            return int(connection.execute(_BOND_OF, wanted).scalar() or 0)

    def bonds_behind(self, node: bytes, network: str = DEFAULT_NETWORK, until_ms: int = 0) -> tuple[Bond, ...]:
        """Of those that `bond_of` counts, the BONDS_MAX largest."""
        return self._bonds(_BONDS_BEHIND, self._behind(node, network, until_ms))

    def bonds_by(self, account: bytes) -> tuple[Bond, ...]:
        """That an account has posted, whatever became of them: BONDS_MAX, those with most at stake first."""
        return self._bonds(_BONDS_BY, {"account": account})

    def _behind(self, node: bytes, network: str, until_ms: int) -> dict[str, Any]:
        until_ms = max(until_ms, self._latest_ms, self._clock.now_ms())
        return {"node": node, "network": network.encode(), "until_ms": until_ms}

    def _bonds(self, query: sa.Select[Any], wanted: dict[str, Any]) -> tuple[Bond, ...]:
        with self._transaction() as connection:
            return tuple(map(_kept_bonds.decode, connection.execute(query, wanted).scalars()))

    def balances(self) -> dict[str, int]:
        """All that are not zero: for checking."""
        with self._transaction() as connection:
            return {
                row.name: row.balance_micro for row in connection.execute(sa.select(_accounts)) if row.balance_micro
            }

    def withdrawals(self, account: bytes) -> int:
        """How many an account has had."""
        with self._transaction() as connection:
            return int(connection.execute(_WITHDRAWN, {"one": account}).scalar() or 0)

    def escrow(self, name: bytes) -> Escrow | None:
        with self._transaction() as connection:
            found = connection.execute(_ESCROW, {"one": name}).scalar()
            return None if found is None else _kept_escrows.decode(found)

    def last(self) -> tuple[int, bytes]:
        """Number and hash of the last line; 0 and BEGINNING where there is none."""
        with self._transaction() as connection:
            return self._head(connection)[:2]

    def page(self, after: int, max_bytes: int, naming: str | None = None) -> Page:
        """Lines after that one, of `max_bytes` together or a single one; with `naming`, those in which this account is
        named."""
        found: list[Line] = []
        room, left = max_bytes, SEARCHED_BYTES
        name = None if naming is None else naming.encode()
        wanted = sa.select(_journal).where(_journal.c.number > after).order_by(_journal.c.number)
        with self._transaction() as connection:
            rows = connection.execute(wanted.limit(SEARCHED_LINES), execution_options={"stream_results": True})
            with rows:  # one by one: all of them may be more than should be in memory
                for count, row in enumerate(rows, start=1):
                    if name is None or name in row.line:
                        if found and len(row.line) > room:
                            return Page(tuple(found), row.number - 1)
                        found.append(_lines.decode(row.line))
                        room -= len(row.line)
                    left -= len(row.line)
                    if count == SEARCHED_LINES or left <= 0:
                        return Page(tuple(found), row.number)
        return Page(tuple(found), None)

    def lines(self, after: int = 0) -> Iterator[Line]:
        """The journal, page by page."""
        while True:
            with self._transaction() as connection:
                page = self._page(connection, after)
            yield from page
            if len(page) < PAGE_LINES:
                return
            after = page[-1].number

    # --- rows ------------------------------------------------------------------------------------------------------

    def _head(self, connection: sa.Connection) -> tuple[int, bytes, int]:
        """Number, hash and time of the last line. Whoever else writes waits."""
        connection.execute(_LOCK).scalar_one()
        last = connection.execute(_LAST).scalar()
        if last is None:
            return 0, BEGINNING, 0
        one = _lines.decode(last)
        return one.number, one.hash, one.at_ms

    def _page(self, connection: sa.Connection, after: int) -> list[Line]:
        return [_lines.decode(row) for row in connection.execute(_PAGE, {"after": after}).scalars()]

    def _all_lines(self, connection: sa.Connection) -> Iterator[Line]:
        after = 0
        while page := self._page(connection, after):
            yield from page
            after = page[-1].number

    def _due(self, connection: sa.Connection, now_ms: int) -> list[Command]:
        """As `Book.due`."""
        escrows, bonds = (connection.execute(one, {"now_ms": now_ms}).scalars() for one in (_DUE, _BONDS_DUE))
        return [*map(Pass, escrows), *map(PayBack, bonds)]

    def _read(
        self, connection: sa.Connection, book: Book, command: Command, escrow: bytes | None, bond: bytes | None
    ) -> None:
        """What a command speaks of, into the book, where it is not there yet. Accounts are read as they are needed."""

        def row(query: sa.Select[Any], one: bytes) -> Any:
            return connection.execute(query, {"one": one}).scalar()

        if escrow is not None and escrow not in book.escrows and (found := row(_ESCROW, escrow)) is not None:
            book.escrows[escrow] = _kept_escrows.decode(found)
        if bond is not None and bond not in book.bonds and (found := row(_BOND, bond)) is not None:
            book.bonds[bond] = _kept_bonds.decode(found)
        if isinstance(command, Withdraw) and command.order.account not in book.withdrawals:
            book.withdrawals[command.order.account] = row(_WITHDRAWN, command.order.account) or 0
        if isinstance(command, Deposit) and row(_REFERENCE, command.reference.encode()) is not None:
            book.references.add(command.reference)

    def _write(
        self, connection: sa.Connection, book: Book, escrows: set[bytes], bonds: set[bytes], fresh: Sequence[Line]
    ) -> None:
        if not fresh:
            return
        touched = {name for one in fresh for move in one.moves for name in (move.source, move.target)}
        drawn = {one.command.order.account for one in fresh if isinstance(one.command, Withdraw)}
        references = {one.command.reference for one in fresh if isinstance(one.command, Deposit)}
        self._put(connection, book, touched, escrows, bonds, drawn, references)
        connection.execute(_ADD_LINE, [{"number": one.number, "line": _encode(one)} for one in fresh])

    def _put(
        self, connection: sa.Connection, book: Book, accounts: Iterable[str], escrows: Iterable[bytes],
        bonds: Iterable[bytes], drawn: Iterable[bytes], references: Iterable[str],
    ) -> None:  # fmt: skip
        """These rows as they are in the book; no such references are there yet."""
        for put, rows in (
            (_PUT_BALANCE, [{"name": name, "balance_micro": book.balances[name]} for name in accounts]),
            (_PUT_ESCROW, [_escrow_row(book.escrows[name]) for name in escrows]),
            (_PUT_BOND, [_bond_row(book.bonds[name]) for name in bonds]),
            (_PUT_WITHDRAWN, [{"account": account, "number": book.withdrawals[account]} for account in drawn]),
            (_ADD_REFERENCE, [{"reference": one.encode()} for one in references]),
        ):
            if rows:
                connection.execute(put, rows)

    def _create_or_check(self, connection: sa.Connection) -> None:
        _tables.create_all(connection)
        about = connection.execute(sa.select(_about)).one_or_none()
        if about is None:
            connection.execute(_about.insert().values(version=SCHEMA, ledger=_encode(self.ledger)))
        elif _ledger.decode(about.ledger) != self.ledger:
            raise LedgerFailed(f"The ledger in {self._place} is another one: its operator or currency differs.")
        elif about.version > SCHEMA:
            raise LedgerFailed(
                f"The ledger in {self._place} has tables of form {about.version}, and this Shoal needs {SCHEMA}: "
                "use the version that wrote it."
            )
        elif about.version < SCHEMA:
            self._make_anew(connection, about.version)

    def _make_anew(self, connection: sa.Connection, version: int) -> None:
        """All tables but the journal, which the others follow from. Takes as long as it takes to verify that, and the
        memory of a whole `Book`."""
        connection.execute(_LOCK).scalar_one()
        try:
            book = verified(self._all_lines(connection), self.ledger)
        except BadJournal as error:
            raise LedgerFailed(
                f"The ledger in {self._place} has tables of form {version}, and those of form {SCHEMA} cannot be made "
                f"from its journal: {error.sentence} Use the version that wrote it."
            ) from error
        derived = [table for table in _tables.sorted_tables if table not in (_about, _journal)]
        _tables.drop_all(connection, derived)
        _tables.create_all(connection, derived)
        self._put(
            connection, book, book.balances, book.escrows, book.bonds, book.withdrawals, book.references
        )  # fmt: skip
        connection.execute(_about.update().values(version=SCHEMA))

    def _transaction(self) -> _Transaction:
        return _Transaction(self._engine, self._place)


class _Transaction:
    """All of it is there when it ends, or nothing."""

    def __init__(self, engine: sa.Engine, place: str) -> None:
        self._begun, self._place = engine.begin(), place

    def __enter__(self) -> sa.Connection:
        try:
            return self._begun.__enter__()
        except SQLAlchemyError as error:
            raise self._failed(error) from error

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._begun.__exit__(kind, error, trace)
        except SQLAlchemyError as failure:
            raise self._failed(failure) from failure
        if isinstance(error, SQLAlchemyError | msgspec.DecodeError):  # a row that is damaged, too
            raise self._failed(error) from error

    def _failed(self, error: SQLAlchemyError | msgspec.DecodeError) -> LedgerFailed:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        return LedgerFailed(
            f"The ledger in {self._place} failed: {cause}. Nothing was acknowledged; see that it is there and has "
            "room, then try again."
        )
