"""How the rows of a ledger are written: all of them or none, durable when that returns, and in as few steps as there
can be. PostgreSQL takes them in one statement, which is a transaction of its own: one round trip."""

from __future__ import annotations

import select
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count
from struct import Struct
from typing import Any

import sqlalchemy as sa

from shoal.storage import postgres
from shoal.storage.ledger_tables import JOURNAL, Rows, put_into

SPELLED_OUT = 8
"""Rows that are values of a statement, which the server takes sooner; more are arrays, whatever their number."""
STATEMENTS_MAX = 128
"""That a server has prepared for one connection."""
_INT4, _INT8, _ARRAY = (Struct(form).pack for form in ("!i", "!q", "!5i"))
_TYPES = ((sa.Integer, "bigint", 20), (sa.String, "text", 25), (sa.LargeBinary, "bytea", 17))
"""Of columns; PostgreSQL's name and number of the type in which their values are sent."""
Shape = tuple[tuple[sa.Table, int | None], ...]
"""So many rows of each table, the journal last; None: its columns as arrays. The journal is written first, as the outer
part: who else writes waits there."""


class OutcomeOpen(Exception):
    """Writing broke off where it may have been done or not."""


class Writer(ABC):
    """One connection for one transaction after another; another one where it broke."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection: Any = None
        """The driver's own: what SQLAlchemy does for every statement takes as long as the statement."""

    def write(self, rows: Rows) -> bool:
        """With lines of the journal among them. False where the journal has lines of these numbers already: another
        process has written them, and nothing was written. Raises OutcomeOpen; the driver's Error, or SQLAlchemy's
        where there is no connection, and nothing was written either."""
        if self._connection is None or not self._alive():
            self.close()
            self._connection = self._connect()
        driver: Any = self._engine.dialect.dbapi
        try:
            self._write(rows)
        except driver.IntegrityError:
            return False
        except BaseException:
            self.close()
            raise
        return True

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> Any:
        pooled = self._engine.raw_connection()
        connection = pooled.driver_connection
        pooled.detach()
        return connection

    @abstractmethod
    def _alive(self) -> bool:
        """False where it is known that the connection broke while it was not used."""

    @abstractmethod
    def _write(self, rows: Rows) -> None: ...


class SqliteWriter(Writer):
    def _alive(self) -> bool:
        return True

    def _write(self, rows: Rows) -> None:
        execute, many = self._connection.execute, self._connection.executemany
        execute("BEGIN IMMEDIATE")
        try:
            for table, some in rows.items():
                many(_put_by_marks(table), some)
        except BaseException:
            if self._connection.in_transaction:  # of a full disk it has rolled back by itself
                execute("ROLLBACK")
            raise
        try:
            execute("COMMIT")
        except BaseException as error:
            raise OutcomeOpen(str(error)) from error


@cache
def _put_by_marks(table: sa.Table) -> str:
    return put_into(table, f"VALUES ({', '.join('?' * len(table.columns))})")


class PostgresWriter(Writer):
    """By libpq alone, each statement prepared once: what psycopg does for a statement takes as long as all of that."""

    def _connect(self) -> Any:
        connection = super()._connect()
        self._libpq = connection.pgconn
        self._prepared = dict[Shape, bytes]()
        self._socket = select.poll()
        return connection

    def _alive(self) -> bool:
        return not self._ready(select.POLLIN, 0)  # a server says nothing of itself but that it goes

    def _ready(self, events: int, seconds: float) -> bool:
        self._socket.register(self._libpq.socket, events)
        return bool(self._socket.poll(seconds * 1000))

    def _write(self, rows: Rows) -> None:
        ordered = sorted(rows.items(), key=lambda one: one[0] is JOURNAL)
        spelled = sum(map(len, rows.values())) <= SPELLED_OUT
        shape = tuple((table, len(some) if spelled else None) for table, some in ordered)
        values: list[bytes | None]
        if spelled:
            values = [_sent(value) for _, some in ordered for row in some for value in row]
        else:
            values = [
                _array(number, column)
                for table, some in ordered
                for (_, number), column in zip(_types(table), zip(*some, strict=True), strict=True)
            ]
        name = self._prepared.get(shape) or self._prepare(shape)
        self._ask(self._libpq.send_query_prepared, name, values, [1] * len(values))

    def _prepare(self, shape: Shape) -> bytes:
        if len(self._prepared) == STATEMENTS_MAX:
            self._prepared.clear()
            self._ask(self._libpq.send_query, b"DEALLOCATE ALL")
        name = b"shoal_%d" % len(self._prepared)
        self._ask(self._libpq.send_prepare, name, _at_once(shape).encode())
        self._prepared[shape] = name
        return name

    def _ask(self, send: Callable[..., None], *what: Any) -> None:
        """Until the server has done it. Raises OutcomeOpen; the driver's DatabaseError where it refused."""
        driver: Any = self._engine.dialect.dbapi
        libpq, refused = self._libpq, None
        try:
            send(*what)
            while True:
                while (unsent := libpq.flush()) or libpq.is_busy():
                    if not self._ready(select.POLLIN | (select.POLLOUT if unsent else 0), postgres.SILENT_S):
                        raise OutcomeOpen(f"the server has said nothing for {postgres.SILENT_S} s")
                    libpq.consume_input()
                if (result := libpq.get_result()) is None:
                    break
                if result.status != driver.pq.ExecStatus.COMMAND_OK:
                    refused = result
        except driver.Error as error:
            raise OutcomeOpen(str(error)) from error
        if refused is None:
            return
        said = refused.get_error_message()
        if libpq.status != driver.pq.ConnStatus.OK:
            raise OutcomeOpen(said)
        there = (refused.error_field(driver.pq.DiagnosticField.SQLSTATE) or b"").startswith(b"23")
        raise (driver.IntegrityError if there else driver.DatabaseError)(said)


def _at_once(shape: Shape) -> str:
    at = count(1)
    *parts, journal = (put_into(table, _values(table, rows, at)) for table, rows in shape)
    if not parts:
        return journal
    return f"WITH {', '.join(f'part_{number} AS ({part})' for number, part in enumerate(parts))} {journal}"


def _values(table: sa.Table, rows: int | None, at: Iterator[int]) -> str:
    if rows is None:
        return f"SELECT * FROM unnest({', '.join(f'${next(at)}::{kind}[]' for kind, _ in _types(table))})"
    spelled = (", ".join(f"${next(at)}::{kind}" for kind, _ in _types(table)) for _ in range(rows))
    return f"VALUES {', '.join(f'({row})' for row in spelled)}"


@cache
def _types(table: sa.Table) -> tuple[tuple[str, int], ...]:
    """As what the values of its columns are sent: PostgreSQL's name and number of a type."""
    return tuple(
        next((name, number) for kind, name, number in _TYPES if isinstance(column.type, kind))
        for column in table.columns
    )


def _sent(value: bytes | str | int | None) -> bytes | None:
    """In binary form."""
    if isinstance(value, int):
        return _INT8(value)
    return value.encode() if isinstance(value, str) else value


def _array(type: int, values: Sequence[bytes | str | int | None]) -> bytes:
    """Of one dimension, with or without NULL, from 1 on."""
    parts = (_INT4(-1) if one is None else _INT4(len(one)) + one for one in map(_sent, values))
    return _ARRAY(1, 1, type, len(values), 1) + b"".join(parts)
