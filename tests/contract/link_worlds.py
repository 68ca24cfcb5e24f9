"""The implementations of the network port, behind one face: what the suite of `test_links` runs on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from shoal.identity import KeyPair
from shoal.transport import EndpointLimits, MemoryNetwork, TlsEndpoint
from shoal.transport.endpoint import BaseEndpoint
from shoal.world import Clock, HeldClock, Link, SeededDice

T = TypeVar("T")
PATIENCE_S = 60.0
"""How long a test waits for what must happen; never how long it takes."""


def key(number: int) -> KeyPair:
    return KeyPair.from_seed(number.to_bytes(32, "big"))


class World:
    """Makes endpoints that can reach each other, and closes them all. Time stands still unless a test moves it."""

    def __init__(self) -> None:
        self.clock = HeldClock()
        self.endpoints: list[BaseEndpoint] = []

    def make(
        self, pair: KeyPair, network: str, versions: tuple[int, int], limits: EndpointLimits | None
    ) -> BaseEndpoint:
        raise NotImplementedError

    def endpoint(
        self,
        number: int,
        *,
        network: str = "shoal",
        versions: tuple[int, int] = (1, 1),
        limits: EndpointLimits | None = None,
    ) -> BaseEndpoint:
        made = self.make(key(number), network, versions, limits)
        made.handle("echo", echo)
        self.endpoints.append(made)
        return made

    async def listening(self, number: int, **options: object) -> tuple[BaseEndpoint, str]:
        made = self.endpoint(number, **options)  # type: ignore[arg-type]
        return made, await made.listen("tcp://127.0.0.1:0")

    async def close(self) -> None:
        for endpoint in self.endpoints:
            await endpoint.close()


class TlsWorld(World):
    def make(
        self, pair: KeyPair, network: str, versions: tuple[int, int], limits: EndpointLimits | None
    ) -> BaseEndpoint:
        return TlsEndpoint(pair, clock=self.clock, network=network, versions=versions, limits=limits)


class MemoryWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryNetwork(self.clock, dice=SeededDice(1))

    def make(
        self, pair: KeyPair, network: str, versions: tuple[int, int], limits: EndpointLimits | None
    ) -> BaseEndpoint:
        return self.memory.endpoint(pair, network=network, versions=versions, limits=limits)


WORLDS: dict[str, Callable[[], World]] = {"tls": TlsWorld, "memory": MemoryWorld}


def play(make_world: Callable[[], World], scene: Callable[[World], Awaitable[None]]) -> None:
    """Run a scene in a fresh world; whatever it leaves is closed."""

    async def whole() -> None:
        world = make_world()
        async with asyncio.timeout(PATIENCE_S):
            try:
                await scene(world)
            finally:
                await world.close()

    asyncio.run(whole())


async def linked(world: World, **options: object) -> tuple[Link, Link]:
    """Two nodes with a link: the dialling side's and the answering side's end of it."""
    one, address = await world.listening(1, **options)
    other = world.endpoint(2, **options)  # type: ignore[arg-type]
    near = await other.dial(one.node_id, [address])
    far = await until(lambda: one.links().get(other.node_id))
    return near, far


async def until(found: Callable[[], T | None]) -> T:
    """What `found` gives as soon as that is something; other tasks run meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        while not (value := found()):
            await asyncio.sleep(0)
        return value


async def breathe() -> None:
    """Let every task that can run do so."""
    for _ in range(30):
        await asyncio.sleep(0)


async def settle(link: Link, rounds: int = 40) -> None:
    """Let both sides run on: so many small requests go there and back."""
    for _ in range(rounds):
        await link.request("echo", b"")


async def drive(clock: HeldClock, work: Awaitable[T], step_s: float = 0.001) -> T:
    """Move a held clock on until `work` is done."""
    task = asyncio.ensure_future(work)
    while not task.done():
        await breathe()
        if not task.done():
            await clock.advance(step_s)
    return task.result()


async def echo(request: object) -> bytes:
    return request.body  # type: ignore[attr-defined, no-any-return]


class Fountain:
    """A handler that gives numbered chunks, counts what was taken from it, and knows when it was given up."""

    def __init__(self, chunks: int, size: int = 64 * 1024) -> None:
        self.chunks = chunks
        self.size = size
        self.given_bytes = 0
        self.over = asyncio.Event()

    async def __call__(self, request: object) -> AsyncIterator[bytes]:
        return self._flow()

    async def _flow(self) -> AsyncIterator[bytes]:
        try:
            for number in range(self.chunks):
                self.given_bytes += self.size
                yield number.to_bytes(4, "big") * (self.size // 4)
        finally:
            self.over.set()

    def whole(self) -> bytes:
        return b"".join(number.to_bytes(4, "big") * (self.size // 4) for number in range(self.chunks))


@asynccontextmanager
async def running(work: Awaitable[T]) -> AsyncIterator[asyncio.Future[T]]:
    """`work` under way inside the block, and over after it."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


class HourOff:
    """Another clock, an hour before or behind in wall time and monotonic time alike."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds

    def now_ms(self) -> int:
        return self._clock.now_ms() + round(self._seconds * 1000)

    def monotonic(self) -> float:
        return self._clock.monotonic() + self._seconds

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
