"""A shoal on this machine: hubs, ledgers and nodes as separate processes on loopback.

`shoal up`, the quickstart, the tests and the benchmarks all start theirs here. Every process keeps its data and its log
under one folder; none outlives the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import JobError

READY_S = 120.0
"""A process that has not said that it is ready by then has failed; measuring a machine takes a few seconds of it."""
STOP_S = 10.0
_LOG_TAIL_BYTES = 2000


class LocalProcessFailed(JobError):
    """A hub, ledger or node of this machine's own shoal did not start."""

    code = "SH-650"


def shoal_home() -> Path:
    """Where this user's keys and local shoal live: SHOAL_HOME, or ~/.shoal."""
    return Path(os.environ.get("SHOAL_HOME") or Path.home() / ".shoal")


@dataclass
class LocalProcess:
    """A running hub, ledger or node and what it said when it was ready."""

    role: str
    name: str
    process: asyncio.subprocess.Process
    log: Path
    ready: Mapping[str, Any]
    _drain: asyncio.Task[None] = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def stop(self) -> None:
        """Ask it to stop, and insist after STOP_S seconds."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_S):
                    await self.process.wait()
            except TimeoutError:
                self.kill()
        await self.process.wait()
        await self._drain


class LocalShoal:
    """Starts and stops the processes of a shoal under one folder.

    `environment` and `prefix` let a test or benchmark place processes elsewhere, for example in a network namespace.
    """

    def __init__(self, folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = dict(environment or {})
        self.hubs: list[LocalProcess] = []
        self.ledgers: list[LocalProcess] = []
        self.nodes: dict[str, LocalProcess] = {}

    @property
    def hub_tickets(self) -> list[str]:
        return [hub.ready["ticket"] for hub in self.hubs]

    async def start_hub(
        self, name: str = "hub", *, options: Sequence[str] = (), prefix: Sequence[str] = ()
    ) -> LocalProcess:
        arguments = ["hub", "--data", str(self.folder / name), *options]
        hub = await self._start("hub", name, arguments, prefix)
        self.hubs.append(hub)
        return hub

    async def start_ledger(self, name: str = "ledger", *, options: Sequence[str] = ()) -> LocalProcess:
        ledger = await self._start("ledger", name, ["ledger", "start", "--data", str(self.folder / name), *options], ())
        self.ledgers.append(ledger)
        return ledger

    async def start_node(
        self,
        name: str,
        *,
        max_speed: float = 1.0,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> LocalProcess:
        arguments = ["node", "start", "--name", name, "--data", str(self.folder / "nodes" / name)]
        arguments += ["--max-speed", str(max_speed), *(part for hub in self.hub_tickets for part in ("--hub", hub))]
        node = await self._start("node", name, [*arguments, *options], prefix, environment)
        self.nodes[name] = node
        return node

    async def _start(
        self,
        role: str,
        name: str,
        arguments: Sequence[str],
        prefix: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> LocalProcess:
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *prefix,
                sys.executable,
                "-m",
                "shoal",
                *arguments,
                "--json",
                "--with-parent",
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **self.environment, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the one who started us; it then stops us in order
            )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(READY_S):
                line = await process.stdout.readline()
        except TimeoutError:
            line = b""
        try:
            ready = json.loads(line)
        except json.JSONDecodeError:
            ready = {}
        if "ready" not in ready:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            why = ready["error"]["sentence"] if "error" in ready else _last_words(log)
            raise LocalProcessFailed(f"The {role} {name!r} did not start: {why}")
        return LocalProcess(role, name, process, log, ready, asyncio.create_task(_discard(process.stdout)))

    async def stop(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Stop the nodes, which redeem their vouchers then; after them hubs and ledgers."""
        if self.nodes:
            say(f"Stopping {len(self.nodes)} nodes.")
        await asyncio.gather(*(node.stop() for node in self.nodes.values()))
        await asyncio.gather(*(one.stop() for one in (*self.hubs, *self.ledgers)))

    async def __aenter__(self) -> LocalShoal:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


def _last_words(log: Path) -> str:
    text = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    return f"{text.splitlines()[-1]} (whole log: {log})" if text else f"it said nothing (log: {log})."
