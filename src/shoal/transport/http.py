"""An ASGI application served over HTTP within the process: a hub's face for reading, a gateway's endpoint."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import psutil
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from shoal.errors import BadInput, LinkError
from shoal.world import Clock
from shoal.world.processes import open_files

CONNECTIONS_MAX = 1024
"""Connections at once, as far as an eighth of the files that the process may open carries them; more wait."""
HEADER_BYTES_MAX = 16 * 1024
HEADER_MS_MAX = 2_000
"""A connection on which no request was read for so long is closed, idle ones too: others wait for its place."""
TAKEN_MS_MAX = 60_000
"""A connection whose client takes nothing of what is sent for so long is closed, where the system can (Linux)."""
READY_TRIES_MAX = 500
READY_EVERY_S = 0.01
STOP_S = 3.0
"""What is being answered has so long to reach its client; whoever waits for work ends that first."""


class BadHttpPlace(BadInput):
    """The address of an HTTP face is not of the form it must have."""

    code = "SH-116"


class HttpFailed(LinkError):
    """HTTP cannot be served at the address that was given."""

    code = "SH-337"


class HttpFace:
    """One application at one address, from `start` to `stop`."""

    def __init__(self, application: Any, clock: Clock) -> None:
        self._application, self._clock = application, clock
        self._running: tuple[Server, asyncio.Task[None]] | None = None

    async def start(self, place: str) -> str:
        """Serve at `host:port`, port 0 for a free one; gives the URL. Raises BadHttpPlace and HttpFailed."""
        host, port = _free_port(*_split(place))
        server = Server(
            self._application,
            address=host,
            port=port,
            interface=Interfaces.ASGINL,
            websockets=False,
            http=HTTPModes.http1,  # while it waits to learn which one is spoken, no time-out holds
            backpressure=min(CONNECTIONS_MAX, open_files() // 8),
            http1_settings=HTTP1Settings(header_read_timeout=HEADER_MS_MAX, max_buffer_size=HEADER_BYTES_MAX),
            log_enabled=False,
        )
        bound = asyncio.Event()
        server.on_startup(bound.set)
        serving = asyncio.create_task(server.serve())
        self._running = (server, serving)
        waiting = asyncio.create_task(bound.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for _ in range(READY_TRIES_MAX):
            if serving.done():
                break
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                await self._clock.sleep(READY_EVERY_S)
            else:
                writer.close()
                _close_those_who_take_nothing(port)
                return f"http://{shown}"
        cause = serving.exception() if serving.done() and not serving.cancelled() else None
        raise HttpFailed(f"HTTP did not come up at {shown}: {_first_line(cause)}.")

    async def stop(self) -> None:
        """Stop answering. Stopping twice, or before the start, is harmless."""
        if self._running is None:
            return
        server, serving = self._running
        self._running = None
        if not serving.done():
            server.stop()  # type: ignore[no-untyped-call]
        await asyncio.wait([serving], timeout=STOP_S)
        serving.cancel()


def _close_those_who_take_nothing(port: int) -> None:
    """The server does not say which socket it listens on. What is accepted there is set alike (tcp(7))."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    for one in psutil.Process().net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port:
            with socket.socket(fileno=os.dup(one.fd)) as listening:
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TAKEN_MS_MAX)


def refuse_taken(place: str) -> None:
    """Raises BadHttpPlace and HttpFailed where `HttpFace.start` could not serve now."""
    _free_port(*_split(place))


def _first_line(cause: BaseException | None) -> str:
    return str(cause).splitlines()[0] if cause is not None and str(cause) else "the server gave no reason"


def _split(place: str) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise BadHttpPlace(f"{place!r} is not host:port for HTTP; write for example 127.0.0.1:7780.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _free_port(host: str, port: int) -> tuple[str, int]:
    """Take a port once and let it go. The server would share a port that another one serves (SO_REUSEPORT) without a
    word; and of port 0 it would not say which it got."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family) as probe:
            return host, int(probe.getsockname()[1])
    except OSError as error:
        raise HttpFailed(
            f"HTTP cannot be served at {host}:{port}: {error.strerror}. Name another address with --http."
        ) from error
