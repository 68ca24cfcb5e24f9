"""A ledger in a database: SQLite in a file, or PostgreSQL by a URL, through SQLAlchemy Core with one schema.

The rules are those of `ledger.book`: of a command, the accounts and the escrow that it speaks of are read, `Book.apply`
decides, and what has changed is written with the journal's line, in one transaction. Several commands may share one
(group commit), each of them whole or not at all. What was answered survives a killed process and a lost power supply:
on SQLite as `storage.sqlite` opens it, on PostgreSQL with `synchronous_commit=on`, its default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from shoal.errors import ShoalError, StorageError
from shoal.ledger.book import Book
from shoal.ledger.commands import Command, Pass, Withdraw, escrow_of
from shoal.ledger.escrows import Escrow
from shoal.ledger.journal import BEGINNING, Line, line
from shoal.ledger.moves import Move
from shoal.protocol.money import LedgerName
from shoal.storage.sqlite import sqlite_engine
from shoal.world import Clock

SCHEMA = 1
"""The form of the tables. A database of another form is refused."""
COMMANDS_MAX = 512
"""In one transaction."""
DUE_MAX = 256
"""Escrows that the time has brought something for, and that are seen to in one transaction before its commands."""
PAGE_LINES = 512

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
_journal = sa.Table(
    "ledger_journal",
    _tables,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("line", sa.LargeBinary, nullable=False),
)

_encode = msgspec.msgpack.Encoder().encode
_lines = msgspec.msgpack.Decoder(Line)
_kept = msgspec.msgpack.Decoder(Escrow)
_ledger = msgspec.msgpack.Decoder(LedgerName)


class LedgerFailed(StorageError):
    """A ledger's database cannot be read or written; nothing was acknowledged."""

    code = "SH-445"


class _Balances(dict[str, int]):
    """Of the accounts that were asked for; others are in the database."""

    def __init__(self, connection: sa.Connection) -> None:
        super().__init__()
        self._connection = connection
        self.stored: set[str] = set()
        """That have a row."""

    def get(self, name: str, default: Any = 0) -> Any:
        if name not in self:
            row = self._connection.execute(sa.select(_accounts.c.balance_micro).where(_accounts.c.name == name))
            found = row.scalar_one_or_none()
            if found is not None:
                self.stored.add(name)
            self[name] = default if found is None else found
        return self[name]


class SqlLedger:
    """One thread at a time uses it."""

    def __init__(self, engine: sa.Engine, place: str, ledger: LedgerName, clock: Clock) -> None:
        self._engine, self._place, self.ledger, self._clock = engine, place, ledger, clock
        self._latest_ms = 0
        """Of what the clock has said: the time never goes back, also where nothing was written at it."""

    @classmethod
    def open(cls, place: Path | str, ledger: LedgerName, clock: Clock) -> SqlLedger:
        """A file, or a `postgresql+psycopg://` URL. Raises LedgerFailed: also for a database of another ledger."""
        try:
            engine = sqlite_engine(place) if isinstance(place, Path) else sa.create_engine(place)
        except (SQLAlchemyError, ImportError, ValueError) as error:  # what it says would show the URL's password
            raise LedgerFailed(
                "The URL of the ledger's database cannot be used; write postgresql+psycopg://USER@HOST/DATABASE, and "
                "install shoal[postgres]. Or name a file, for SQLite."
            ) from error
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
        Raises LedgerFailed; nothing has happened then."""
        if len(commands) > COMMANDS_MAX:
            raise ValueError(f"{len(commands)} commands are more than {COMMANDS_MAX}")
        with self._transaction() as connection:
            number, previous, last_ms = self._head(connection)
            self._latest_ms = max(self._latest_ms, last_ms, self._clock.now_ms())
            book = Book(self.ledger, now_ms=self._latest_ms)
            balances = book.balances = _Balances(connection)
            fresh, outcomes = list[Line](), list[tuple[Move, ...] | ShoalError]()
            changed: set[bytes] = set()
            due = [Pass(name) for name in self._due(connection, book.now_ms)]
            for command in (*due, *commands):
                name = escrow_of(command, self.ledger)
                if name is not None and name not in book.escrows:
                    book.escrows.update(self._escrow(connection, name))
                if isinstance(command, Withdraw) and command.order.account not in book.withdrawals:
                    book.withdrawals[command.order.account] = self._withdrawn(connection, command.order.account)
                try:
                    moves = book.apply(command)
                except ShoalError as error:
                    outcomes.append(error)
                    continue
                outcomes.append(moves)
                changed |= {name} if name is not None else set()
                fresh.append(line(number + 1, book.now_ms, command, moves, previous))
                number, previous = number + 1, fresh[-1].hash
            self._write(connection, balances, {name: book.escrows[name] for name in changed}, fresh)
            return outcomes[len(due) :]

    def balance(self, name: str) -> int:
        with self._transaction() as connection:
            return int(_Balances(connection).get(name))

    def balances(self) -> dict[str, int]:
        """All that are not zero: for checking."""
        with self._transaction() as connection:
            return {
                row.name: row.balance_micro for row in connection.execute(sa.select(_accounts)) if row.balance_micro
            }

    def lines(self, after: int = 0) -> Iterator[Line]:
        """The journal, page by page."""
        while True:
            with self._transaction() as connection:
                wanted = sa.select(_journal.c.line).where(_journal.c.number > after).order_by(_journal.c.number)
                page = [_lines.decode(row) for row in connection.execute(wanted.limit(PAGE_LINES)).scalars()]
            yield from page
            if len(page) < PAGE_LINES:
                return
            after = page[-1].number

    # --- rows ------------------------------------------------------------------------------------------------------

    def _head(self, connection: sa.Connection) -> tuple[int, bytes, int]:
        """Number, hash and time of the last line. Whoever else writes waits."""
        connection.execute(sa.select(_about.c.version).with_for_update()).scalar_one()
        last = connection.execute(sa.select(_journal.c.line).order_by(_journal.c.number.desc()).limit(1)).scalar()
        if last is None:
            return 0, BEGINNING, 0
        one = _lines.decode(last)
        return one.number, one.hash, one.at_ms

    def _due(self, connection: sa.Connection, now_ms: int) -> Sequence[bytes]:
        wanted = sa.select(_escrows.c.escrow).where(_escrows.c.due_ms <= now_ms).order_by(_escrows.c.due_ms)
        return connection.execute(wanted.limit(DUE_MAX)).scalars().all()

    def _escrow(self, connection: sa.Connection, name: bytes) -> dict[bytes, Escrow]:
        found = connection.execute(sa.select(_escrows.c.content).where(_escrows.c.escrow == name)).scalar()
        return {} if found is None else {name: _kept.decode(found)}

    def _withdrawn(self, connection: sa.Connection, account: bytes) -> int:
        """How many withdrawals it has had."""
        wanted = sa.select(_withdrawals.c.number).where(_withdrawals.c.account == account)
        return connection.execute(wanted).scalar() or 0

    def _write(
        self, connection: sa.Connection, balances: _Balances, escrows: dict[bytes, Escrow], fresh: Sequence[Line]
    ) -> None:
        if not fresh:
            return
        touched = {name for one in fresh for move in one.moves for name in (move.source, move.target)}
        for name in sorted(touched):
            row = {"balance_micro": balances[name]}
            if name in balances.stored:
                connection.execute(_accounts.update().where(_accounts.c.name == name).values(row))
            else:
                connection.execute(_accounts.insert().values(name=name, **row))
        for escrow_id, escrow in escrows.items():
            content = {"due_ms": escrow.due_ms, "content": _encode(escrow)}
            known = connection.execute(_escrows.update().where(_escrows.c.escrow == escrow_id).values(content))
            if known.rowcount == 0:
                connection.execute(_escrows.insert().values(escrow=escrow_id, **content))
        drawn = {one.command.order.account: one.command.order for one in fresh if isinstance(one.command, Withdraw)}
        for account, order in drawn.items():
            known = connection.execute(
                _withdrawals.update().where(_withdrawals.c.account == account).values(number=order.number)
            )
            if known.rowcount == 0:
                connection.execute(_withdrawals.insert().values(account=account, number=order.number))
        connection.execute(_journal.insert(), [{"number": one.number, "line": _encode(one)} for one in fresh])

    def _create_or_check(self, connection: sa.Connection) -> None:
        _tables.create_all(connection)
        about = connection.execute(sa.select(_about)).one_or_none()
        if about is None:
            connection.execute(_about.insert().values(version=SCHEMA, ledger=_encode(self.ledger)))
        elif about.version != SCHEMA:
            raise LedgerFailed(
                f"The ledger in {self._place} has tables of form {about.version}, and this Shoal needs {SCHEMA}: "
                "use the version that wrote it."
            )
        elif _ledger.decode(about.ledger) != self.ledger:
            raise LedgerFailed(f"The ledger in {self._place} is another one: its operator or currency differs.")

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
        if isinstance(error, SQLAlchemyError):
            raise self._failed(error) from error

    def _failed(self, error: SQLAlchemyError) -> LedgerFailed:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        return LedgerFailed(
            f"The ledger in {self._place} failed: {cause}. Nothing was acknowledged; see that it is there and has "
            "room, then try again."
        )
