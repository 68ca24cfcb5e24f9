"""Nodes in processes of their own, one of which is killed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from transport_peers import key

from shoal.transport import TlsEndpoint, run
from shoal.world import LinkLost, Unreachable

PATIENCE_S = 120.0
NODE = Path(__file__).with_name("transport_node.py")


@asynccontextmanager
async def started(number: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(sys.executable, NODE, str(number), stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scene()

    run(whole())


def test_a_peer_that_is_killed_is_noticed_and_welcome_again() -> None:
    async def scene() -> None:
        caller = TlsEndpoint(key(1))
        async with started(2) as (process, address):
            link = await caller.dial(key(2).node_id, [address])
            received = 0
            async with link.stream("bulk", b"1000", max_bytes=1 << 30) as chunks:
                async for chunk in chunks:
                    received += len(chunk)
            assert received == 1000 * 65536
            asking = asyncio.ensure_future(link.request("never", b"", deadline_s=100))
            with pytest.raises(LinkLost):
                async with link.stream("bulk", b"1000000", max_bytes=1 << 40) as chunks:
                    async for _ in chunks:
                        if process.returncode is None:
                            process.kill()
            with pytest.raises(LinkLost):
                await asking
            await link.wait_closed()
            assert not caller.links()
            await process.wait()
            with pytest.raises(Unreachable):
                await caller.dial(key(2).node_id, [address])
        async with started(2) as (_, address):
            link = await caller.dial(key(2).node_id, [address])
            assert await link.request("echo", b"again") == b"again"
        await caller.close()

    play(scene)


def test_many_bodies_cross_between_processes_on_the_fast_loop() -> None:
    async def scene() -> None:
        caller = TlsEndpoint(key(1), congestion_control="reno")
        async with started(2) as (_, address):
            link = await caller.dial(key(2).node_id, [address])
            bodies = [bytes([n]) * size for n, size in enumerate((0, 1, 1000, 16384, 16385, 700_000, 8 << 20) * 3)]
            replies = await asyncio.gather(
                *(link.request("echo", body, reply_max_bytes=8 << 20, deadline_s=60) for body in bodies)
            )
            assert replies == bodies
        await caller.close()

    play(scene)
