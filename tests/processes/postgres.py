"""A PostgreSQL server for tests, from the programs that are installed here, if any (Debian: the package `postgresql`).
It does not run as root, so as the account `postgres` where tests do."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda one: int(one.parent.name.split(".")[0]))
"""Of each version that is installed."""
USER = "postgres" if os.geteuid() == 0 else None


class Postgres:
    """A new server with an empty database, which can be stopped and started again."""

    def __enter__(self) -> Postgres:
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-postgres-"))
        if USER is not None:
            shutil.chown(self._folder, USER)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.url = self.url_at(self.port)
        self._running = False
        try:
            _run("initdb", "-D", str(self._data), "-A", "trust", "-U", "shoal", "-E", "UTF8", "--no-sync")
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._running:
                self.stop()
        finally:
            shutil.rmtree(self._folder)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def url_at(self, port: int) -> str:
        """Of a way to it."""
        return f"postgresql+psycopg://shoal@127.0.0.1:{port}/postgres"

    @property
    def socket_url(self) -> str:
        """By its Unix-domain socket."""
        return f"postgresql+psycopg://shoal@/postgres?host={self._folder}&port={self.port}"

    def start(self, fsync: str = "on") -> None:
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync={fsync}"
        _run("pg_ctl", "-D", str(self._data), "-o", options, "-l", str(self._folder / "log"), "-w", "start")
        self._running = True

    def stop(self) -> None:
        _run("pg_ctl", "-D", str(self._data), "-m", "immediate", "stop")
        self._running = False


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of one."""
    with Postgres() as server:
        yield server.url


def empty(url: str) -> None:
    """Forget the ledger in it."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for table in ("about", "accounts", "escrows", "paid", "withdrawals", "bonds", "references", "journal"):
            connection.execute(sa.text(f"DROP TABLE IF EXISTS ledger_{table}"))
    engine.dispose()


def _run(program: str, *words: str) -> None:
    subprocess.run(
        [str(PROGRAMS[-1] / program), *words], check=True, user=USER, cwd="/", stdout=subprocess.DEVNULL,
        env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
    )  # fmt: skip
