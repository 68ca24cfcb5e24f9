"""How the rows of a ledger are written: all of them or none, durable when that returns, and in as few steps as there
can be. PostgreSQL takes them in one statement, which is a transaction of its own: one round trip."""

from __future__ import annotations

import select
from abc import ABC, abstractmethod
from functools import lru_cache
from itertools import chain
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import dialect as postgresql

from shoal.storage.ledger_tables import JOURNAL, Rows, put_into

SPELLED_OUT = 8
"""Rows of one table that are values of a statement; more are arrays, whose columns are encoded one by one."""
_POSTGRES: Any = postgresql()  # type: ignore[no-untyped-call]


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
                many(put_into(table, f"VALUES ({', '.join('?' * len(table.columns))})"), some)
        except BaseException:
            if self._connection.in_transaction:  # of a full disk it has rolled back by itself
                execute("ROLLBACK")
            raise
        try:
            execute("COMMIT")
        except BaseException as error:
            raise OutcomeOpen(str(error)) from error


class PostgresWriter(Writer):
    def _connect(self) -> Any:
        from psycopg.types.numeric import Int8BinaryDumper

        connection = super()._connect()
        connection.autocommit = True
        connection.adapters.register_dumper(
            int, Int8BinaryDumper
        )  # else each size of a number is a statement of its own
        return connection

    def _alive(self) -> bool:
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        return not poll.poll(0)  # a server says nothing of itself but that it goes

    def _write(self, rows: Rows) -> None:
        ordered = sorted(rows.items(), key=lambda one: one[0] is JOURNAL)
        counts = tuple((table, len(some) if len(some) <= SPELLED_OUT else None) for table, some in ordered)
        values = list[Any]()
        for (_, count), (_, some) in zip(counts, ordered, strict=True):
            values += map(list, zip(*some, strict=True)) if count is None else chain.from_iterable(some)
        try:
            self._connection.execute(_at_once(counts), values)
        except BaseException as error:
            if self._connection.closed:
                raise OutcomeOpen(str(error)) from error
            raise


@lru_cache(maxsize=1024)
def _at_once(counts: tuple[tuple[sa.Table, int | None], ...]) -> str:
    """So many rows of each table, the journal last; None: its columns as arrays. The journal is written first, as the
    outer part: who else writes waits there."""
    *parts, journal = (put_into(table, _spelled(table, count)) for table, count in counts)
    if not parts:
        return journal
    return f"WITH {', '.join(f'part_{at} AS ({part})' for at, part in enumerate(parts))} {journal}"


def _spelled(table: sa.Table, count: int | None) -> str:
    if count is not None:
        row = f"({', '.join(['%b'] * len(table.columns))})"
        return f"VALUES {', '.join([row] * count)}"
    kinds = (column.type.compile(_POSTGRES) for column in table.columns)
    return f"SELECT * FROM unnest({', '.join(f'%b::{kind}[]' for kind in kinds)})"
