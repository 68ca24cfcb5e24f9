"""Peers that do not keep to the rules, built from the transport's own layers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from cryptography.hazmat.primitives import serialization

from shoal.identity import KeyPair
from shoal.transport import EndpointLimits, TlsEndpoint, parse_address
from shoal.transport.handshake import HelloStream, Self, introduce
from shoal.transport.secure import SecureStream, certificate, client_context, node_of_certificate, server_context
from shoal.transport.streams import ByteStream, SocketStream
from shoal.world import Clock, HeldClock, SystemDice

PATIENCE_S = 60.0


def key(number: int) -> KeyPair:
    return KeyPair.from_seed(number.to_bytes(32, "big"))


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scene()

    asyncio.run(whole())


async def echo(request: object) -> bytes:
    return request.body  # type: ignore[attr-defined, no-any-return]


@asynccontextmanager
async def node(
    number: int, *, clock: Clock | None = None, limits: EndpointLimits | None = None
) -> AsyncIterator[tuple[TlsEndpoint, str]]:
    """An honest node that answers `echo`, and its address."""
    endpoint = TlsEndpoint(key(number), clock=clock or HeldClock(), limits=limits)
    endpoint.handle("echo", echo)
    address = await endpoint.listen("tcp://127.0.0.1:0")
    try:
        yield endpoint, address
    finally:
        await endpoint.close()


async def connect(address: str) -> SocketStream:
    host, port = parse_address(address)
    _, stream = await asyncio.get_running_loop().create_connection(SocketStream, host, port)
    return stream


async def encrypted(address: str) -> SecureStream:
    """A channel to whoever answers, in which nothing was said yet."""
    secure = SecureStream(await connect(address), client_context(), server=False)
    await secure.handshake()
    return secure


def self_of(pair: KeyPair) -> Self:
    return Self(pair, SystemDice().bytes(16), (1, 1), "shoal")


async def proved(address: str, me: Self, attempt: int = 1) -> ByteStream:
    """A stream to a node that accepted `me` as its peer; what is written there are the frames of a link."""
    secure = await encrypted(address)
    shown = secure.certificate()
    stream = HelloStream(secure)
    await introduce(stream, me, node_of_certificate(shown), shown, attempt, SystemDice())
    return stream.over()


async def read_to_end(stream: ByteStream) -> bytes:
    """All that comes until the other side ends the stream."""
    got = bytearray()
    try:
        while data := await stream.read():
            got += data
    except OSError:
        pass
    return bytes(got)


@asynccontextmanager
async def server(answer: Callable[[SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """A TCP server that treats each caller with `answer`; gives its address."""
    tasks: set[asyncio.Task[None]] = set()

    class Accepted(SocketStream):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            task = asyncio.ensure_future(answer(self))  # type: ignore[arg-type]
            tasks.add(task)

    listening = await asyncio.get_running_loop().create_server(Accepted, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def own_certificate(pair: KeyPair) -> bytes:
    return certificate(pair).public_bytes(serialization.Encoding.DER)


async def answering(stream: SocketStream, pair: KeyPair) -> SecureStream:
    """The answering side of a channel that proves `pair`."""
    secure = SecureStream(stream, server_context(pair, certificate(pair)), server=True)
    await secure.handshake()
    return secure
