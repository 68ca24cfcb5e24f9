"""A ledger in a database: SQLite in a file, or PostgreSQL by a URL, through SQLAlchemy Core with one schema.

The rules are those of `ledger.book`: of a command, the accounts and the escrow or bond that it speaks of are read,
`Book.apply` decides, and what has changed is written with the journal's line, in one transaction. Several commands may
share one (group commit), each of them whole or not at all. What was answered survives a killed process and a lost power
supply: on SQLite as `storage.sqlite` opens it, on PostgreSQL with `fsync` and `synchronous_commit` on, or it is not
opened.

As a rule no lock is held while something is decided. The journal's next line has the next number, and the database
takes each number once: if another process wrote meanwhile, what was decided is not written, and is decided anew while
nobody else may write. So what was read once need not be read again before that happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy.exc import SQLAlchemyError

from shoal.errors import ShoalError
from shoal.ledger.bonds import Bond
from shoal.ledger.book import Book
from shoal.ledger.commands import Command, Deposit, Pass, PayBack, SetFee, Withdraw, bond_named_by, escrow_of
from shoal.ledger.escrows import Escrow
from shoal.ledger.fees import Announced
from shoal.ledger.journal import BEGINNING, BadJournal, Line, line, verified
from shoal.ledger.moves import Move
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import TIME_MAX_MS, LedgerName
from shoal.storage.faults import LedgerFailed
from shoal.storage.ledger_tables import (
    ABOUT,
    ACCOUNTS,
    BONDS,
    ESCROWS,
    FEES,
    JOURNAL,
    METADATA,
    PAID,
    REFERENCES,
    SCHEMA,
    WITHDRAWALS,
    Rows,
    bond_row,
    decode_bond,
    decode_fees,
    decode_line,
    encode,
    escrow_of_rows,
    escrow_row,
    fees_row,
    line_row,
    paid_rows,
    put_into,
)
from shoal.storage.ledger_writing import OutcomeOpen, PostgresWriter, SqliteWriter
from shoal.storage.postgres import postgres_engine
from shoal.storage.sqlite import sqlite_engine
from shoal.world import Clock, OutcomeUnknown

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
PAYEES_KNOWN_MAX = 100_000
"""Of all those escrows together."""
NEVER_MS = TIME_MAX_MS + 1

_LAST = sa.select(JOURNAL.c.line).order_by(JOURNAL.c.number.desc()).limit(1)
_NEWEST = sa.select(sa.func.max(JOURNAL.c.number))
_DUE, _BONDS_DUE = (
    sa.select(name, due_ms).where(due_ms.is_not(None)).order_by(due_ms, name).limit(DUE_MAX)
    for name, due_ms in ((ESCROWS.c.escrow, ESCROWS.c.due_ms), (BONDS.c.bond, BONDS.c.due_ms))
)
_BALANCE = sa.select(ACCOUNTS.c.balance_micro).where(ACCOUNTS.c.name == sa.bindparam("one"))
_PAGE = (
    sa.select(JOURNAL.c.line).where(JOURNAL.c.number > sa.bindparam("after")).order_by(JOURNAL.c.number)
    .limit(PAGE_LINES)
)  # fmt: skip
_ESCROW = sa.select(ESCROWS.c.content).where(ESCROWS.c.escrow == sa.bindparam("one"))
_PAID = sa.select(PAID.c.payee, PAID.c.content).where(PAID.c.escrow == sa.bindparam("one"))
_BOND = sa.select(BONDS.c.content).where(BONDS.c.bond == sa.bindparam("one"))
_BEHIND = (
    BONDS.c.node == sa.bindparam("node"),
    BONDS.c.network == sa.bindparam("network"),
    sa.or_(BONDS.c.due_ms.is_(None), BONDS.c.due_ms > sa.bindparam("until_ms")),
)
_BOND_OF = sa.select(sa.func.sum(BONDS.c.at_stake_micro)).where(*_BEHIND)
_BONDS_BEHIND, _BONDS_BY = (
    sa.select(BONDS.c.content).where(*which).order_by(BONDS.c.at_stake_micro.desc(), BONDS.c.bond).limit(BONDS_MAX)
    for which in ((*_BEHIND, BONDS.c.at_stake_micro > 0), (BONDS.c.account == sa.bindparam("account"),))
)
_FEES = sa.select(FEES.c.content)
_REFERENCE = sa.select(REFERENCES.c.reference).where(REFERENCES.c.reference == sa.bindparam("one"))
_WITHDRAWN = sa.select(WITHDRAWALS.c.number).where(WITHDRAWALS.c.account == sa.bindparam("one"))
_LINE = sa.select(JOURNAL.c.line).where(JOURNAL.c.number == sa.bindparam("number"))
_LOCK = sa.text(f"LOCK TABLE {JOURNAL} IN EXCLUSIVE MODE")
_PUT = {
    table: sa.text(put_into(table, f"VALUES ({', '.join(f':{one.name}' for one in table.columns)})"))
    for table in METADATA.sorted_tables
}

_ledger = msgspec.msgpack.Decoder(LedgerName)


@dataclass(frozen=True)
class Page:
    """Of a journal."""

    lines: tuple[Line, ...]
    seen: int | None
    """Where there is more: the line up to which all was looked through."""


class _Balances(dict[str, int]):
    """Of the accounts that were asked for; others are in the database."""

    reading: _LazyTransaction

    def get(self, name: str, default: Any = 0) -> Any:
        if name not in self:
            found = self.reading.connection.execute(_BALANCE, {"one": name}).scalar()
            self[name] = default if found is None else found
        return self[name]


class _Known:
    """What was read of a ledger, or written, up to the last line of its journal: while that is the last one, it need
    not be read again."""

    def __init__(self, book: Book, number: int, last: bytes) -> None:
        self.number, self.last = number, last
        """Of that line, its hash."""
        self.due_ms = 0
        """Before this the time brings nothing."""
        self.payees = 0
        """Of the escrows in the book."""
        self.balances = _Balances()
        self.book = book
        book.balances = self.balances

    def __len__(self) -> int:
        book = self.book
        kept: tuple[Sized, ...] = (self.balances, book.escrows, book.bonds, book.withdrawals, book.references)
        return sum(map(len, kept))


class _Step(NamedTuple):
    """What follows from some commands, and is to be written."""

    commands: Sequence[Command]
    known: _Known
    """As it is when that is written."""
    due: int
    """How many of the outcomes are of what the time has brought."""
    outcomes: list[tuple[Move, ...] | ShoalError]
    lines: list[Line]
    rows: Rows

    @property
    def answers(self) -> list[tuple[Move, ...] | ShoalError]:
        return self.outcomes[self.due :]


class SqlLedger:
    """One thread at a time uses it."""

    def __init__(self, engine: sa.Engine, place: str, ledger: LedgerName, clock: Clock, network: str) -> None:
        self._engine, self._place, self.ledger, self.clock, self._network = engine, place, ledger, clock, network
        self._writer = SqliteWriter(engine) if engine.dialect.name == "sqlite" else PostgresWriter(engine)
        self._known: _Known | None = None
        self._unsure: _Step | None = None
        """Of which it is not known whether it was written."""
        self._latest_ms = 0
        """Of what the clock has said: the time never goes back, also where nothing was written at it."""

    @classmethod
    def open(cls, place: Path | str, ledger: LedgerName, clock: Clock, network: str = DEFAULT_NETWORK) -> SqlLedger:
        """A file, or a `postgresql+psycopg://` URL. Raises LedgerFailed: also for a database of another ledger, and for
        one that acknowledges what it may still lose."""
        try:
            engine = sqlite_engine(place) if isinstance(place, Path) else postgres_engine(place)
        except (SQLAlchemyError, ImportError, ValueError):  # what it says would show the URL's password
            raise LedgerFailed(
                "The URL of the ledger's database cannot be used; write postgresql+psycopg://USER@HOST/DATABASE, and "
                "install shoal[postgres]. Without one it is SQLite in a file."
            ) from None
        made = cls(engine, engine.url.render_as_string(hide_password=True), ledger, clock, network)
        try:
            with made._transaction() as connection:
                made._create_or_check(connection)
        except ShoalError:
            made.close()
            raise
        return made

    def close(self) -> None:
        self._writer.close()
        self._engine.dispose()

    def apply(self, command: Command) -> tuple[Move, ...]:
        """Raises what `Book.apply` does; LedgerFailed, OutcomeUnknown."""
        (outcome,) = self.apply_all([command])
        if isinstance(outcome, ShoalError):
            raise outcome
        return outcome

    def apply_all(self, commands: Sequence[Command]) -> list[tuple[Move, ...] | ShoalError]:
        """Several in one transaction: of each, what it moved, or why nothing. Before them, what the time has brought.
        Raises LedgerFailed, and nothing has happened then; OutcomeUnknown where the database went away while it was
        writing: asked for the same list again, it looks whether that was written, and writes it if not."""
        if len(commands) > COMMANDS_MAX:
            raise ValueError(f"{len(commands)} commands are more than {COMMANDS_MAX}")
        unsure, self._unsure = self._unsure, None
        if unsure is not None and unsure.commands is not commands:
            unsure = None  # who asked for that has been told
        known, self._known = self._known, None  # if this fails, nothing is known any more
        if unsure is None and known is not None:
            with _LazyTransaction(self._reading()) as reading:
                step = self._decided(known, reading, commands)
                stale = not step.lines and bool(commands) and self._newest(reading.connection) != known.number
            try:
                if not stale and self._written(step):
                    return step.answers
            except OutcomeOpen:
                unsure = step
        return self._alone(commands, unsure).answers

    def _alone(self, commands: Sequence[Command], unsure: _Step | None) -> _Step:
        """While nobody else writes: what was known may be of before somebody did. Where it is not known whether
        something was written, the journal says so, once the server is done with it."""
        try:
            with _LazyTransaction(self._transaction()) as reading:
                if self._engine.dialect.name != "sqlite":  # which lets nobody else write as it is
                    reading.connection.execute(_LOCK)
                if unsure is not None and self._holds(reading.connection, unsure.lines[-1]):
                    step = unsure
                else:
                    step = self._decided(self._read_head(reading.connection), reading, commands)
                    _put(reading.connection, step.rows)
                    unsure = step if step.lines else None  # until the commit is answered
        except LedgerFailed as error:
            if unsure is None:
                raise
            self._unsure = unsure
            raise OutcomeUnknown(
                f"The ledger in {self._place} went away while it was writing, so that it is not known whether that "
                f"was done: {error} What is signed is done once at most: hand the same in again."
            ) from error
        self._is_known(step)
        return step

    def now_ms(self) -> int:
        """As of this ledger: never before its newest line, whatever the clock says. Raises LedgerFailed."""
        with self._reading() as connection:
            last = self._last_line(connection)
        self._latest_ms = max(self._latest_ms, self.clock.now_ms(), 0 if last is None else last.at_ms)
        return self._latest_ms

    def balance(self, name: str) -> int:
        with self._reading() as connection:
            return int(connection.execute(_BALANCE, {"one": name}).scalar() or 0)

    def bond_of(self, node: bytes, network: str = DEFAULT_NETWORK, until_ms: int = 0) -> int:
        """As `Book.bond_of`. Raises LedgerFailed."""
        wanted = self._behind(node, network, until_ms)
        with self._reading() as connection:
            return int(connection.execute(_BOND_OF, wanted).scalar() or 0)

    def bonds_behind(self, node: bytes, network: str = DEFAULT_NETWORK, until_ms: int = 0) -> tuple[Bond, ...]:
        """Of those that `bond_of` counts, the BONDS_MAX largest."""
        return self._bonds(_BONDS_BEHIND, self._behind(node, network, until_ms))

    def bonds_by(self, account: bytes) -> tuple[Bond, ...]:
        """That an account has posted, whatever became of them: BONDS_MAX, those with most at stake first."""
        return self._bonds(_BONDS_BY, {"account": account})

    def _behind(self, node: bytes, network: str, until_ms: int) -> dict[str, Any]:
        until_ms = max(until_ms, self._latest_ms, self.clock.now_ms())
        return {"node": node, "network": network.encode(), "until_ms": until_ms}

    def _bonds(self, query: sa.Select[Any], wanted: dict[str, Any]) -> tuple[Bond, ...]:
        with self._reading() as connection:
            return tuple(map(decode_bond, connection.execute(query, wanted).scalars()))

    def balances(self) -> dict[str, int]:
        """All that are not zero: for checking."""
        with self._reading() as connection:
            return {row.name: row.balance_micro for row in connection.execute(sa.select(ACCOUNTS)) if row.balance_micro}

    def withdrawals(self, account: bytes) -> int:
        """How many an account has had."""
        with self._reading() as connection:
            return int(connection.execute(_WITHDRAWN, {"one": account}).scalar() or 0)

    def fees(self) -> tuple[Announced, ...]:
        """The table that holds, if any, and the one that is to follow."""
        with self._reading() as connection:
            return _read_fees(connection)

    def escrow(self, name: bytes) -> Escrow | None:
        with self._reading() as connection:
            return _read_escrow(connection, name)

    def last(self) -> tuple[int, bytes]:
        """Number and hash of the last line; 0 and BEGINNING where there is none."""
        with self._reading() as connection:
            last = self._last_line(connection)
            return (0, BEGINNING) if last is None else (last.number, last.hash)

    def page(self, after: int, max_bytes: int, naming: str | None = None) -> Page:
        """Lines after that one, of `max_bytes` together or a single one; with `naming`, those in which this account is
        named."""
        found: list[Line] = []
        room, left = max_bytes, SEARCHED_BYTES
        name = None if naming is None else naming.encode()
        wanted = sa.select(JOURNAL).where(JOURNAL.c.number > after).order_by(JOURNAL.c.number)
        with self._reading() as connection:
            rows = connection.execute(wanted.limit(SEARCHED_LINES), execution_options={"stream_results": True})
            with rows:  # one by one: all of them may be more than should be in memory
                for count, row in enumerate(rows, start=1):
                    if name is None or name in row.line:
                        if found and len(row.line) > room:
                            return Page(tuple(found), row.number - 1)
                        found.append(decode_line(row.line))
                        room -= len(row.line)
                    left -= len(row.line)
                    if count == SEARCHED_LINES or left <= 0:
                        return Page(tuple(found), row.number)
        return Page(tuple(found), None)

    def lines(self, after: int = 0) -> Iterator[Line]:
        """The journal, page by page."""
        while True:
            with self._reading() as connection:
                page = self._page(connection, after)
            yield from page
            if len(page) < PAGE_LINES:
                return
            after = page[-1].number

    # --- rows ------------------------------------------------------------------------------------------------------

    def _last_line(self, connection: sa.Connection) -> Line | None:
        last = connection.execute(_LAST).scalar()
        return None if last is None else decode_line(last)

    def _read_head(self, connection: sa.Connection) -> _Known:
        last = self._last_line(connection)
        if last is None:
            return self._known_to(0, BEGINNING, ())
        self._latest_ms = max(self._latest_ms, last.at_ms)
        return self._known_to(last.number, last.hash, _read_fees(connection))

    def _known_to(self, number: int, last: bytes, fees: tuple[Announced, ...]) -> _Known:
        return _Known(Book(self.ledger, fees=fees, network=self._network), number, last)

    def _page(self, connection: sa.Connection, after: int) -> list[Line]:
        return [decode_line(row) for row in connection.execute(_PAGE, {"after": after}).scalars()]

    def _all_lines(self, connection: sa.Connection) -> Iterator[Line]:
        after = 0
        while page := self._page(connection, after):
            yield from page
            after = page[-1].number

    def _newest(self, connection: sa.Connection) -> int:
        return int(connection.execute(_NEWEST).scalar() or 0)

    def _decided(self, known: _Known, reading: _LazyTransaction, commands: Sequence[Command]) -> _Step:
        book, number, previous, known.balances.reading = known.book, known.number, known.last, reading
        self._latest_ms = max(self._latest_ms, self.clock.now_ms())
        book.at(self._latest_ms)
        due = self._due(known, reading)
        lines: list[Line] = []
        outcomes: list[tuple[Move, ...] | ShoalError] = []
        escrows: dict[bytes, Escrow | None] = {}
        bonds: set[bytes] = set()
        for command in (*due, *commands):
            escrow, bond = escrow_of(command, self.ledger), bond_named_by(command, self.ledger)
            self._read(reading, known, command, escrow, bond)
            before = None if escrow is None else book.escrows.get(escrow)
            try:
                moves = book.apply(command)
            except ShoalError as error:
                outcomes.append(error)
                continue
            outcomes.append(moves)
            if escrow is not None:
                escrows.setdefault(escrow, before)
                known.payees += _payees(book.escrows[escrow]) - _payees(before)
            if bond is not None:
                bonds.add(bond)
            number += 1
            lines.append(line(number, book.now_ms, command, moves, previous))
            previous = lines[-1].hash
        touched = (*(book.escrows[name].due_ms for name in escrows), *(book.bonds[name].due_ms for name in bonds))
        known.due_ms = min((known.due_ms, *(due_ms for due_ms in touched if due_ms is not None)))
        return _Step(commands, known, len(due), outcomes, lines, _rows_after(book, escrows, bonds, lines))

    def _due(self, known: _Known, reading: _LazyTransaction) -> list[Command]:
        """As `Book.due`."""
        if known.book.now_ms < known.due_ms:
            return []
        found, beyond = list[Command](), list[int]()
        for query, command in ((_DUE, Pass), (_BONDS_DUE, PayBack)):
            rows = reading.connection.execute(query).all()
            found += [command(name) for name, due_ms in rows if due_ms <= known.book.now_ms]
            beyond += [due_ms for _, due_ms in rows[-1:]]
            beyond += [due_ms for _, due_ms in rows if due_ms > known.book.now_ms][:1]
        known.due_ms = min(beyond, default=NEVER_MS)
        return found

    def _read(
        self, reading: _LazyTransaction, known: _Known, command: Command, escrow: bytes | None, bond: bytes | None
    ) -> None:
        """What a command speaks of, into the book, where it is not there yet. Accounts are read as they are needed."""
        book = known.book

        def row(query: sa.Select[Any], one: bytes) -> Any:
            return reading.connection.execute(query, {"one": one}).scalar()

        if escrow is not None and escrow not in book.escrows:
            one = _read_escrow(reading.connection, escrow)
            if one is not None:
                book.escrows[escrow] = one
                known.payees += _payees(one)
        if bond is not None and bond not in book.bonds and (found := row(_BOND, bond)) is not None:
            book.bonds[bond] = decode_bond(found)
        if isinstance(command, Withdraw) and command.order.account not in book.withdrawals:
            book.withdrawals[command.order.account] = row(_WITHDRAWN, command.order.account) or 0
        if isinstance(command, Deposit) and row(_REFERENCE, command.reference.encode()) is not None:
            book.references.add(command.reference)

    def _written(self, step: _Step) -> bool:
        """False where another process has written meanwhile. Raises LedgerFailed, OutcomeOpen."""
        try:
            if step.lines and not self._writer.write(step.rows):
                return False
        except (SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error) as error:
            raise _failed(error, self._place) from error
        self._is_known(step)
        return True

    def _holds(self, connection: sa.Connection, one: Line) -> bool:
        return connection.execute(_LINE, {"number": one.number}).scalar() == encode(one)

    def _is_known(self, step: _Step) -> None:
        known = step.known
        if step.lines:
            known.number, known.last = step.lines[-1].number, step.lines[-1].hash
        forget = len(known) > KNOWN_MAX or known.payees > PAYEES_KNOWN_MAX
        self._known = self._known_to(known.number, known.last, known.book.fees) if forget else known

    def _create_or_check(self, connection: sa.Connection) -> None:
        METADATA.create_all(connection)
        about = connection.execute(sa.select(ABOUT).with_for_update()).one_or_none()
        if about is None:
            connection.execute(ABOUT.insert().values(version=SCHEMA, ledger=encode(self.ledger)))
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
        try:
            book = verified(self._all_lines(connection), self.ledger, network=self._network)
        except BadJournal as error:
            raise LedgerFailed(
                f"The ledger in {self._place} has tables of form {version}, and those of form {SCHEMA} cannot be made "
                f"from its journal: {error.sentence} Use the version that wrote it."
            ) from error
        derived = [table for table in METADATA.sorted_tables if table not in (ABOUT, JOURNAL)]
        METADATA.drop_all(connection, derived)
        METADATA.create_all(connection, derived)
        escrows = dict[bytes, Escrow | None].fromkeys(book.escrows)
        _put(connection, _rows_of(book, book.balances, escrows, book.bonds, book.withdrawals, book.references, True))
        connection.execute(ABOUT.update().values(version=SCHEMA))

    def _transaction(self) -> _Transaction:
        return _Transaction(self._engine.begin, self._place)

    def _reading(self) -> _Transaction:
        return _Transaction(self._engine.connect, self._place)


def _payees(one: Escrow | None) -> int:
    return 0 if one is None else len(one.terms.payees) + len(one.admitted)


def _read_fees(connection: sa.Connection) -> tuple[Announced, ...]:
    found = connection.execute(_FEES).scalar()
    return () if found is None else decode_fees(found)


def _read_escrow(connection: sa.Connection, name: bytes) -> Escrow | None:
    found = connection.execute(_ESCROW, {"one": name}).scalar()
    if found is None:
        return None
    return escrow_of_rows(found, ((row.payee, row.content) for row in connection.execute(_PAID, {"one": name})))


def _rows_after(book: Book, escrows: Mapping[bytes, Escrow | None], bonds: Iterable[bytes], lines: list[Line]) -> Rows:
    """What has changed with these lines; the escrows are as they were before."""
    accounts = {name for one in lines for move in one.moves for name in (move.source, move.target)}
    drawn = {one.command.order.account for one in lines if isinstance(one.command, Withdraw)}
    references = {one.command.reference for one in lines if isinstance(one.command, Deposit)}
    fees = any(isinstance(one.command, SetFee) for one in lines)
    rows = _rows_of(book, accounts, escrows, bonds, drawn, references, fees)
    return {**rows, JOURNAL: [line_row(one) for one in lines]} if lines else {}


def _rows_of(
    book: Book, accounts: Iterable[str], escrows: Mapping[bytes, Escrow | None], bonds: Iterable[bytes],
    drawn: Iterable[bytes], references: Iterable[str], fees: bool,
) -> Rows:  # fmt: skip
    """As they are in the book now; of escrows, what is not as it was before."""
    rows: Rows = {
        ACCOUNTS: [(name, book.balances[name]) for name in accounts],
        ESCROWS: [
            escrow_row(book.escrows[name])
            for name, before in escrows.items()
            if before is None or replace(before, paid={}) != replace(book.escrows[name], paid={})
        ],
        PAID: [
            row
            for name, before in escrows.items()
            for row in paid_rows(book.escrows[name], {} if before is None else before.paid)
        ],
        BONDS: [bond_row(book.bonds[name]) for name in bonds],
        WITHDRAWALS: [(account, book.withdrawals[account]) for account in drawn],
        REFERENCES: [(one.encode(),) for one in references],
        FEES: [fees_row(book.fees)] if fees else [],
    }
    return {table: some for table, some in rows.items() if some}


def _put(connection: sa.Connection, rows: Rows) -> None:
    for table, some in rows.items():
        connection.execute(_PUT[table], [dict(zip(table.columns.keys(), row, strict=True)) for row in some])


class _LazyTransaction:
    """A transaction that begins when something is first read in it."""

    def __init__(self, transaction: _Transaction) -> None:
        self._transaction = transaction
        self._begun: sa.Connection | None = None

    @property
    def connection(self) -> sa.Connection:
        if self._begun is None:
            self._begun = self._transaction.__enter__()
        return self._begun

    def __enter__(self) -> _LazyTransaction:
        return self

    def __exit__(self, *of: Any) -> None:
        if self._begun is not None:
            self._transaction.__exit__(*of)


class _Transaction:
    """All of it is there when it ends, or nothing."""

    def __init__(self, begin: Callable[[], AbstractContextManager[sa.Connection]], place: str) -> None:
        self._begin, self._place = begin, place

    def __enter__(self) -> sa.Connection:
        try:
            self._begun = self._begin()
            return self._begun.__enter__()
        except SQLAlchemyError as error:
            raise _failed(error, self._place) from error

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._begun.__exit__(kind, error, trace)
        except SQLAlchemyError as failure:
            raise _failed(failure, self._place) from failure
        if isinstance(error, SQLAlchemyError | msgspec.DecodeError):  # a row that is damaged, too
            raise _failed(error, self._place) from error


def _failed(error: Exception, place: str) -> LedgerFailed:
    cause = str(getattr(error, "orig", None) or error).splitlines()[0]
    return LedgerFailed(
        f"The ledger in {place} failed: {cause}. Nothing was acknowledged; see that it is there and has room, then "
        "try again."
    )
