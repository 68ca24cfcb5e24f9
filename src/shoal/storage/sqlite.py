"""SQLite through SQLAlchemy, so that a committed transaction survives a killed process and a lost power supply: with
`journal_mode=WAL` and `synchronous=FULL` (https://www.sqlite.org/pragma.html#pragma_synchronous)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa


def sqlite_engine(path: Path, **settings: Any) -> sa.Engine:
    """Of a file, which is made at the first transaction; `settings` are those of `create_engine`."""
    engine = sa.create_engine(f"sqlite+pysqlite:///{path}", **settings)
    sa.event.listen(engine, "connect", _prepare)
    sa.event.listen(engine, "begin", _begin_immediately)
    return engine


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where this file says so, not where the driver guesses
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediately(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # reading, deciding and writing are one step for other processes too
