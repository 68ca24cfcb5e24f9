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

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda one: int(one.parent.name.split(".")[0]))
"""Of each version that is installed."""
USER = "postgres" if os.geteuid() == 0 else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A new server with an empty database; gives its URL."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-postgres-"))
    try:
        if USER is not None:
            shutil.chown(folder, USER)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        data = folder / "data"
        _run("initdb", "-D", str(data), "-A", "trust", "-U", "shoal", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        _run("pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql+psycopg://shoal@127.0.0.1:{port}/postgres"
        finally:
            _run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _run(program: str, *words: str) -> None:
    subprocess.run(
        [str(PROGRAMS[-1] / program), *words], check=True, user=USER, cwd="/", stdout=subprocess.DEVNULL,
        env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
    )  # fmt: skip
