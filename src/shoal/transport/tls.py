"""Links over TLS 1.3 on TCP, or on any other byte stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from cryptography.hazmat.primitives import serialization

from shoal.errors import LinkError, ShoalError
from shoal.identity import KeyPair, short_id
from shoal.protocol.messages import DEFAULT_NETWORK, OLDEST_VERSION, PROTOCOL_VERSION
from shoal.transport.endpoint import BadAddress, BaseEndpoint, PeerLink, format_address, parse_address
from shoal.transport.handshake import HelloStream, Versions, WrongNode, accept, decline, examine, introduce
from shoal.transport.limits import EndpointLimits
from shoal.transport.places import handshake_to_end
from shoal.transport.secure import SecureStream, certificate, client_context, node_of_certificate, server_context
from shoal.transport.streams import ByteStream, SocketStream
from shoal.world import Address, Clock, Dice, SystemClock, SystemDice, within
from shoal.world.processes import open_files

_log = logging.getLogger("shoal.transport")


class TlsEndpoint(BaseEndpoint):
    """A node on the real network.

    `congestion_control` names an algorithm of the kernel for every socket (such as "bbr", which keeps its rate on lossy
    paths where "cubic" does not); where the kernel lacks it, its default stays.
    """

    def __init__(
        self,
        key: KeyPair,
        *,
        clock: Clock | None = None,
        dice: Dice | None = None,
        network: str = DEFAULT_NETWORK,
        versions: Versions = (OLDEST_VERSION, PROTOCOL_VERSION),
        limits: EndpointLimits | None = None,
        congestion_control: str | None = None,
    ) -> None:
        super().__init__(
            key,
            clock=clock or SystemClock(),
            dice=dice or SystemDice(),
            network=network,
            versions=versions,
            limits=(limits or EndpointLimits()).for_open_files(open_files()),
        )
        self._congestion_control = congestion_control
        shown = certificate(key)
        self._certificate = shown.public_bytes(serialization.Encoding.DER)
        self._server_context = server_context(key, shown)
        self._client_context = client_context()
        self._servers: list[asyncio.Server] = []
        self._addresses: list[Address] = []
        self._handshakes: dict[asyncio.Task[PeerLink | None], tuple[ByteStream, float]] = {}
        """With when each began, oldest first."""

    @property
    def addresses(self) -> Sequence[Address]:
        return tuple(self._addresses)

    async def listen(self, address: Address) -> Address:
        """Accept links at `tcp://host:port`. Raises BadAddress when that is no address, or is taken."""
        self._refuse_closed()
        host, port = parse_address(address)
        try:
            server = await asyncio.get_running_loop().create_server(self._accepted, host, port, backlog=128)
        except OSError as error:
            raise BadAddress(
                f"This node cannot listen at {address}: {error.strerror or error}; choose another address or port 0."
            ) from error
        self._servers.append(server)
        real = format_address(host, server.sockets[0].getsockname()[1])
        self._addresses.append(real)
        return real

    async def accept_over(self, stream: ByteStream) -> PeerLink:
        """Be the answering side on a byte stream that was opened elsewhere (a relay, a hole-punched path).

        Raises LinkError, VersionMismatch, or OSError when the stream broke; the stream is then closed.
        """
        return await self._in_time(stream, self._answer_handshake(stream))

    async def dial_over(self, stream: ByteStream, node: bytes) -> PeerLink:
        """Be the dialling side on a byte stream that was opened elsewhere. Raises like `accept_over`."""
        return await self._in_time(stream, self._dial_handshake(stream, node))

    # --- inside

    async def _connect(self, node: bytes, hint: Address) -> PeerLink:
        host, port = parse_address(hint)
        _, stream = await asyncio.get_running_loop().create_connection(
            lambda: SocketStream(self._congestion_control), host, port
        )
        return await self._dial_handshake(stream, node)

    async def _dial_handshake(self, under: ByteStream, node: bytes) -> PeerLink:
        try:
            secure = SecureStream(under, self._client_context, server=False)
            await secure.handshake()
            shown = secure.certificate()
            answered = node_of_certificate(shown)
            if answered != node:
                raise WrongNode(f"{short_id(answered)} answered there, not {short_id(node)}")
            stream = HelloStream(secure)
            agreed = await introduce(stream, self._me, node, shown, self._next_attempt(node), self._dice)
            await self._vet(agreed, _source(under))
            return self._join(agreed, stream.over(), _source(under))
        except BaseException:
            under.close()
            raise

    async def _answer_handshake(self, under: ByteStream) -> PeerLink:
        try:
            secure = SecureStream(under, self._server_context, server=True)
            await secure.handshake()
            stream = HelloStream(secure)
            try:
                agreed = await examine(stream, self._me, self._certificate, self._dice)
                await self._vet(agreed, _source(under))
            except ShoalError as error:
                await decline(stream, error.code, error.sentence)
                raise
            await accept(stream)
            return self._join(agreed, stream.over(), _source(under))
        except BaseException:
            under.close()
            raise

    def _accepted(self) -> asyncio.Protocol:
        return _AcceptedSocket(self, self._congestion_control)

    def begin_handshake(self, stream: ByteStream) -> None:
        """A socket was accepted."""
        if self._closed:
            stream.close()
            return
        now, limits = self._clock.monotonic(), self._limits
        if len(self._handshakes) >= limits.handshakes:
            held = [(_source(other), begun) for other, begun in self._handshakes.values()]
            leaving = handshake_to_end(_source(stream), held, now, limits.handshake_grace_s)
            if leaving is None:
                stream.close()
                return
            ended = list(self._handshakes)[leaving]
            self._handshakes.pop(ended)[0].close()
            ended.cancel()
        task = self.run(self._guarded_handshake(stream))
        self._handshakes[task] = stream, now
        task.add_done_callback(self._handshake_done)

    def _handshake_done(self, task: asyncio.Task[PeerLink | None]) -> None:
        held = self._handshakes.pop(task, None)
        if held is not None and task.cancelled():
            held[0].close()

    async def _guarded_handshake(self, stream: ByteStream) -> PeerLink | None:
        """A caller that fails costs its own connection and a line in the log."""
        try:
            return await self.accept_over(stream)
        except (ShoalError, OSError) as error:
            _log.info("A caller from %s got no link: %s", getattr(stream, "peername", "?"), error)
            return None

    async def _in_time(self, stream: ByteStream, handshake: Coroutine[Any, Any, PeerLink]) -> PeerLink:
        seconds = self._limits.handshake_s
        try:
            return await within(self._clock, seconds, handshake)
        except TimeoutError:
            stream.close()
            raise LinkError(f"The handshake was not finished within {seconds:g} s.") from None

    async def _stop_accepting(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._addresses.clear()


def _source(stream: ByteStream) -> str:
    """Only a socket knows where it comes from; a relayed path does not."""
    return str(getattr(stream, "source", "?"))


class _AcceptedSocket(SocketStream):
    def __init__(self, endpoint: TlsEndpoint, congestion_control: str | None) -> None:
        super().__init__(congestion_control)
        self._endpoint = endpoint

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._endpoint.begin_handshake(self)
