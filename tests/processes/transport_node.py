"""A node in a process of its own, to be killed: python transport_node.py SEED. Prints its address."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from shoal.identity import KeyPair
from shoal.transport import TlsEndpoint, run
from shoal.world import Request


async def main() -> None:
    endpoint = TlsEndpoint(KeyPair.from_seed(int(sys.argv[1]).to_bytes(32, "big")))

    async def echo(request: Request) -> bytes:
        return request.body

    async def bulk(request: Request) -> AsyncIterator[bytes]:
        async def flow() -> AsyncIterator[bytes]:
            for number in range(int(request.body)):
                yield number.to_bytes(4, "big") * 16384

        return flow()

    async def never(request: Request) -> bytes:
        await asyncio.Event().wait()
        return b""

    endpoint.handle("echo", echo)
    endpoint.handle("bulk", bulk)
    endpoint.handle("never", never)
    print(await endpoint.listen("tcp://127.0.0.1:0"), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    run(main())
