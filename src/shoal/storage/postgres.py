"""PostgreSQL through SQLAlchemy, so that a committed transaction survives a killed server and a lost power supply
(https://www.postgresql.org/docs/current/runtime-config-wal.html), and so that nobody waits for ever."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from shoal.storage.faults import LedgerFailed

CONNECT_S, LOCK_S, IDLE_S = 5, 5, 60
"""For a connection; for a lock that another has; until the server gives up a transaction whose client says nothing."""


class NotDurable(LedgerFailed):
    """A PostgreSQL server acknowledges what a lost power supply can still take away."""

    code = "SH-442"


def postgres_engine(url: str) -> sa.Engine:
    """Of a `postgresql+psycopg://` URL. Raises ValueError for another one; connecting raises NotDurable."""
    if sa.make_url(url).drivername != "postgresql+psycopg":
        raise ValueError("not a postgresql+psycopg:// URL")
    engine = sa.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_S})
    sa.event.listen(engine, "connect", _prepare)
    return engine


def _prepare(connection: Any, _: Any) -> None:
    with connection.cursor() as cursor:
        for name, seconds in (("lock_timeout", LOCK_S), ("idle_in_transaction_session_timeout", IDLE_S)):
            cursor.execute(f"SET {name} = '{seconds}s'")
        for name in ("fsync", "synchronous_commit"):
            (value,) = cursor.execute(f"SHOW {name}").fetchone()
            if value == "off":
                raise NotDurable(
                    f"The PostgreSQL server has {name} off: what it acknowledges can be lost with its power supply. "
                    f"Set {name} = on, for the server, the database and the user that you name, then start again."
                )
    connection.commit()
