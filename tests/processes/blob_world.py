"""Nodes with a blob store each, on a network in this process or on loopback sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from shoal.identity import KeyPair, blake3_hash
from shoal.protocol.blobs import CHUNK_BYTES, BlobChunkList, BlobHolder, BlobRead, BlobRef
from shoal.protocol.messages import decode
from shoal.storage import BlobServer, BlobStore, Fetcher, hash_pieces, serve
from shoal.storage.pieces import cut
from shoal.storage.serve import Allow
from shoal.transport import MemoryNetwork, TlsEndpoint
from shoal.world import Body, Clock, Disk, Endpoint, HeldClock, MemoryDisk, Request, SeededDice, SystemClock

T = TypeVar("T")

PATIENCE_S = 120.0
"""How long a test waits for what must happen, on a machine however slow."""


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def ref_of(data: bytes, seed_of_chunks: bytes | None = None) -> BlobRef:
    """The reference to `data`; with another's bytes for `chunks` one that contradicts itself."""
    hash, _ = hash_pieces(cut(memoryview(data)))
    _, chunk_list = hash_pieces(cut(memoryview(data if seed_of_chunks is None else seed_of_chunks)))
    return BlobRef(hash=hash, size=len(data), chunks=blake3_hash(chunk_list) if len(data) > CHUNK_BYTES else None)


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scene

    asyncio.run(timed())


class Node:
    """An endpoint with a store behind it; what it is asked for is counted, and may be answered otherwise."""

    def __init__(self, endpoint: Endpoint, disk: Disk, clock: Clock, capacity_bytes: int, allow: Allow | None) -> None:
        self.endpoint = endpoint
        self.disk = disk
        self.store = BlobStore(disk, capacity_bytes, clock)
        self.server: BlobServer = serve(endpoint, self.store, allow)
        self.fetcher = Fetcher(endpoint, self.store, clock, SeededDice(1))
        self.asked: list[BlobRead | BlobChunkList] = []
        self.reading = 0
        self.reading_most = 0
        self.instead: Callable[[BlobRead | BlobChunkList, Request], Awaitable[Body | None]] | None = None
        """Answers instead of the server; None leaves it to the server."""
        endpoint.handle(BlobRead.KIND, self._read)
        endpoint.handle(BlobChunkList.KIND, self._chunks)

    async def _read(self, request: Request) -> Body:
        self.asked.append(decode(BlobRead, request.body))
        self.reading += 1
        self.reading_most = max(self.reading_most, self.reading)
        try:
            other = None if self.instead is None else await self.instead(self.asked[-1], request)
            return await self.server.read(request) if other is None else other
        finally:
            self.reading -= 1

    async def _chunks(self, request: Request) -> Body:
        self.asked.append(decode(BlobChunkList, request.body))
        self.reading += 1
        try:
            other = None if self.instead is None else await self.instead(self.asked[-1], request)
            return await self.server.chunks(request) if other is None else other
        finally:
            self.reading -= 1

    async def close(self) -> None:
        await self.fetcher.close()
        await self.endpoint.close()
        self.store.close()

    @property
    def id(self) -> bytes:
        return self.endpoint.node_id

    @property
    def holder(self) -> BlobHolder:
        return BlobHolder(node=self.id, addresses=tuple(self.endpoint.addresses))

    @property
    def pieces_asked(self) -> list[int]:
        return [asked.offset // CHUNK_BYTES for asked in self.asked if isinstance(asked, BlobRead)]


async def stream_of(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 1 << 16):
        yield data[at : at + (1 << 16)]


async def trickle(clock: Clock, data: bytes, size: int, every_s: float) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]
        await clock.sleep(every_s)


class World:
    """Makes nodes, and closes them."""

    def __init__(self, kind: str = "memory", clock: Clock | None = None) -> None:
        self.clock = clock or SystemClock()
        self.network = MemoryNetwork(self.clock)
        self.nodes: list[Node] = []
        self._kind = kind

    async def node(
        self,
        *,
        listens: bool = True,
        disk: Disk | None = None,
        capacity_bytes: int = 64 << 20,
        allow: Allow | None = None,
    ) -> Node:
        key = KeyPair.generate()
        endpoint: Endpoint = self.network.endpoint(key) if self._kind == "memory" else TlsEndpoint(key)
        if listens:
            await endpoint.listen("tcp://127.0.0.1:0")
        self.nodes.append(Node(endpoint, disk or MemoryDisk(), self.clock, capacity_bytes, allow))
        return self.nodes[-1]

    async def holders(self, count: int, data: bytes) -> list[Node]:
        made = [await self.node() for _ in range(count)]
        for node in made:
            node.store.put(data)
        return made

    async def pass_time(self, work: asyncio.Task[T]) -> T:
        """Let held time pass until `work` is done, an hour at most. It stands still while a holder's disk is read: that
        takes time of another clock."""
        assert isinstance(self.clock, HeldClock)
        until = self.clock.monotonic() + 3600
        while not work.done() and self.clock.monotonic() < until:
            await asyncio.sleep(0)
            if not any(node.reading for node in self.nodes):
                await self.clock.advance(0.25)
        assert work.done(), "not done after an hour"
        return work.result()

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self.nodes:
            closing = asyncio.create_task(node.close())
            await (self.pass_time(closing) if isinstance(self.clock, HeldClock) else closing)
