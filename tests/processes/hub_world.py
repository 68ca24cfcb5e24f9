"""Offers, hubs and nodes for the tests of the hub; and, run as a program, one hub process.

python hub_world.py DATA [LISTEN]     serves a hub until it is killed; prints its ticket and its HTTP address
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from shoal.hub import HubClient, HubState
from shoal.hub.index import MemoryOfferIndex
from shoal.hub.server import HubServer, HubSettings
from shoal.hub.service import HubService
from shoal.identity import Envelope, KeyPair
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import sign
from shoal.protocol.offers import Capability, Device, Offer, Throughput
from shoal.transport import MemoryEndpoint, MemoryNetwork, TlsEndpoint
from shoal.world import Clock, Endpoint, HeldClock, SeededDice, SystemClock, SystemDice

PATIENCE_S = 60.0
"""How long a test waits for what must happen; none of them takes this long."""


def a_key(number: int) -> KeyPair:
    return KeyPair.from_seed(bytes((number,)) * 32)


def an_offer(
    key: KeyPair, sequence: int, name: str = "heron", lifetime_ms: int = 60_000, **changes: object
) -> Envelope:
    device = Device(
        kind="cpu", name="cpu", memory_bytes=8 << 30, memory_bytes_per_s=1e10,
        throughput=(Throughput(dtype="float32", flops=1e11),), threads=1,
    )  # fmt: skip
    fields = {"issued_ms": 1_700_000_000_000, "capability": Capability(devices=(device,))} | changes
    return sign(key, Offer(name=name, sequence=sequence, lifetime_ms=lifetime_ms, **fields))  # type: ignore[arg-type]


class MemoryHub:
    """A hub on a network inside the process."""

    def __init__(self, network: MemoryNetwork, key: KeyPair, clock: Clock, offers_max: int = 100) -> None:
        self.endpoint: MemoryEndpoint = network.endpoint(key)
        self.index = MemoryOfferIndex(clock, offers_max)
        self.service = HubService(self.endpoint, self.index, clock, name="hub", offers_max=offers_max)

    async def listen(self, address: str = "tcp://hub:0") -> HubTicket:
        return HubTicket(self.endpoint.node_id, (await self.endpoint.listen(address),))


class Watcher:
    """Waits for what a HubClient tells about its hubs."""

    def __init__(self) -> None:
        self.told: list[HubState] = []
        self._news = asyncio.Event()

    def __call__(self, state: HubState) -> None:
        self.told.append(state)
        self._news.set()

    async def until(self, count: int, up: bool) -> None:
        """Until hubs have come up (or gone down) `count` times in all."""
        async with asyncio.timeout(PATIENCE_S):
            while sum(state.up == up for state in self.told) < count:
                self._news.clear()
                await self._news.wait()


@contextlib.asynccontextmanager
async def a_client(
    endpoint: Endpoint, tickets: Sequence[HubTicket], clock: Clock | None = None, watcher: Watcher | None = None
) -> AsyncIterator[HubClient]:
    client = HubClient(endpoint, tickets, clock=clock or HeldClock(), dice=SeededDice(1), on_change=watcher)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


class HubProcess:
    """A hub as a process of its own, which can be killed."""

    def __init__(self, process: asyncio.subprocess.Process, ticket: HubTicket, http: str) -> None:
        self.process = process
        self.ticket = ticket
        self.http = http

    @classmethod
    async def start(cls, data: Path, listen: str = "tcp://127.0.0.1:0") -> HubProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, str(data), listen, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            said = json.loads(await process.stdout.readline())
        return cls(process, HubTicket.parse(said["ticket"]), said["http"])

    async def kill(self) -> None:
        self.process.kill()
        assert await self.process.wait() == -signal.SIGKILL

    async def stop(self) -> None:
        self.process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            assert await self.process.wait() == 0


async def serve(data: Path, listen: str) -> None:
    def endpoint(key: KeyPair) -> Endpoint:
        return TlsEndpoint(key, clock=SystemClock(), dice=SystemDice())

    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    hub = HubServer(HubSettings(data, listen=listen), endpoint, SystemClock())
    places = await hub.start()
    print(json.dumps({"ticket": str(places.ticket), "http": places.http}), flush=True)
    await stopping.wait()
    await hub.stop()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "tcp://127.0.0.1:0"))
