"""House ledgers for tests; and, run as a program, one as a process.

python ledger_world.py DATA LISTEN [dying]     serves a ledger until it is killed, and prints its ticket; a dying one is
                                               gone as soon as it has written a withdrawal, before it says so
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shoal.house.server
from shoal.house import RemoteLedger
from shoal.house.server import LedgerServer, LedgerSettings, deposit
from shoal.identity import KeyPair
from shoal.ledger.commands import Command, Withdraw
from shoal.protocol.ledgers import LedgerTicket
from shoal.storage.ledgers import SqlLedger
from shoal.transport import MemoryNetwork
from shoal.world import Endpoint, HeldClock, Link

PATIENCE_S = 60.0


@dataclass
class House:
    """A running ledger on a network inside the process, and who asks it."""

    data: Path
    server: LedgerServer
    ticket: LedgerTicket
    network: MemoryNetwork
    clock: HeldClock
    remote: RemoteLedger
    endpoint: Endpoint

    payments: Iterator[int] = field(default_factory=lambda: itertools.count(7))

    async def deposit(self, address: bytes, amount: int, reference: str | None = None) -> None:
        """As its operator does it, on its machine; another payment each time."""
        named = reference or f"payment {next(self.payments)}"
        await asyncio.to_thread(deposit, self.data, address, amount, named, self.clock)

    async def link(self) -> Link:
        return await self.endpoint.dial(self.ticket.operator, self.ticket.addresses)


@asynccontextmanager
async def a_house(data: Path, clock: HeldClock | None = None, **settings: Any) -> AsyncIterator[House]:
    clock = clock or HeldClock()
    network = MemoryNetwork()
    server = LedgerServer(LedgerSettings(data, listen="tcp://ledger:7", **settings), network.endpoint, clock)
    ticket = await server.start()
    endpoint = network.endpoint(KeyPair.generate())
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield House(data, server, ticket, network, clock, RemoteLedger(endpoint, ticket, clock), endpoint)
    finally:
        await endpoint.close()
        await server.stop()
        await server.stop()


class LedgerProcess:
    """A ledger as a process of its own, which can be killed."""

    def __init__(self, process: asyncio.subprocess.Process, ticket: LedgerTicket) -> None:
        self.process, self.ticket = process, ticket

    @classmethod
    async def start(cls, data: Path, *more: str, listen: str = "tcp://127.0.0.1:0") -> LedgerProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, str(data), listen, *more, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return cls(process, LedgerTicket.parse((await process.stdout.readline()).decode()))

    async def kill(self) -> None:
        self.process.kill()
        await self.killed()

    async def killed(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            assert await self.process.wait() == -signal.SIGKILL


class DyingLedger(SqlLedger):
    def apply_all(self, commands: Sequence[Command]) -> list[Any]:
        outcomes = super().apply_all(commands)
        if any(isinstance(one, Withdraw) for one in commands):
            os.kill(os.getpid(), signal.SIGKILL)
        return outcomes


async def serve(data: Path, listen: str) -> None:
    from shoal.transport import TlsEndpoint
    from shoal.world import SystemClock

    server = LedgerServer(LedgerSettings(data, listen=listen), TlsEndpoint, SystemClock())
    print(await server.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if "dying" in sys.argv:
        shoal.house.server.SqlLedger = DyingLedger  # type: ignore[misc]
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
