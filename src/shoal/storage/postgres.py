"""PostgreSQL through SQLAlchemy, so that a committed transaction survives a killed server and a lost power supply
(https://www.postgresql.org/docs/current/runtime-config-wal.html), and so that nobody waits for ever."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import sqlalchemy as sa

from shoal.storage.faults import LedgerFailed

CONNECT_S, LOCK_S, IDLE_S = 5, 5, 60
"""For a connection; for a lock that another has; until the server gives up a transaction whose client says nothing."""
SILENT_S, LISTENED_S = 15, 0.5
"""After so long without a word a connection is given up, as the server is stopped or the network between them gone; it
is looked so often whether there is one."""


class NotDurable(LedgerFailed):
    """A PostgreSQL server acknowledges what a lost power supply can still take away."""

    code = "SH-442"


def postgres_engine(url: str) -> sa.Engine:
    """Of a `postgresql+psycopg://` URL. Raises ValueError for another one; connecting raises NotDurable."""
    if sa.make_url(url).drivername != "postgresql+psycopg":
        raise ValueError("not a postgresql+psycopg:// URL")
    engine = sa.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_S})
    sa.event.listen(engine, "do_connect", _connect)
    sa.event.listen(engine, "connect", _prepare)
    return engine


def _connect(_: Any, __: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    from psycopg import Connection

    class Impatient(Connection[Any]):
        def wait(self, gen: Any, interval: float = LISTENED_S, timeout: float | None = None) -> Any:
            return super().wait(_while_heard(gen, self), LISTENED_S)

    return Impatient.connect(*arguments, **settings)


def _while_heard(waiting: Generator[Any, Any, Any], connection: Any) -> Generator[Any, Any, Any]:
    """What psycopg waits for; it says nothing ready where LISTENED_S have passed. Raises OperationalError."""
    from psycopg import OperationalError

    silent_s = 0.0
    try:
        wanted = next(waiting)
        while True:
            ready = yield wanted
            silent_s = 0.0 if ready else silent_s + LISTENED_S
            if silent_s >= SILENT_S:
                connection.close()
                raise OperationalError(f"the server has said nothing for {SILENT_S} s")
            wanted = waiting.send(ready)
    except StopIteration as done:
        return done.value


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
