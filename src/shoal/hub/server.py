"""One hub: a data directory, an endpoint for links, an HTTP face, and the service between them."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server
from litestar import Litestar

from shoal.errors import BadInput, LinkError, StorageError
from shoal.hub.index import OFFERS_MAX
from shoal.hub.service import HubService
from shoal.hub.store import SqlOfferIndex
from shoal.hub.web import make_app
from shoal.identity import KeyPair, load_or_create_key
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.offers import Name
from shoal.world import Address, Clock, Endpoint
from shoal.world.processes import open_files

PURGE_EVERY_S = 60.0
HTTP_CONNECTIONS_MAX = 1024
"""HTTP connections at once, as far as an eighth of the files that the process may open carries them; more wait."""
HTTP_HEADER_BYTES_MAX = 16 * 1024
HTTP_HEADER_MS_MAX = 2_000
"""A connection on which no request was read for so long is closed, idle ones too: others wait for its place."""
HTTP_READY_TRIES_MAX = 500
HTTP_READY_EVERY_S = 0.01
HTTP_STOP_S = 10.0

_log = logging.getLogger("shoal.hub")


class BadHubSetting(BadInput):
    """A hub's name or the address of its HTTP face is not of the form it must have."""

    code = "SH-114"


class HttpFailed(LinkError):
    """The HTTP face cannot be served at the address it was given."""

    code = "SH-337"


class DataInUse(StorageError):
    """Another hub runs on the same data directory, or the directory cannot be used."""

    code = "SH-441"


@dataclass(frozen=True)
class HubSettings:
    """What the owner of a hub decided."""

    data: Path
    """Directory of its key and database; made when missing."""
    listen: Address = "tcp://127.0.0.1:0"
    http: str | None = "127.0.0.1:0"
    """`host:port` of the HTTP face, or none."""
    name: str = "hub"
    network: str = DEFAULT_NETWORK
    offers_max: int = OFFERS_MAX
    public: tuple[Address, ...] = ()
    """Where others can dial it, for its ticket; none: where it listens. To be named when it listens on all interfaces
    or stands behind a port mapping."""


@dataclass(frozen=True)
class HubPlaces:
    """Where a running hub is."""

    ticket: HubTicket
    http: str | None
    """`http://host:port`."""


class HubServer:
    """A hub from start to stop. What it acknowledged survives `kill -9`; nothing but its directory need be kept."""

    def __init__(self, settings: HubSettings, make_endpoint: Callable[[KeyPair], Endpoint], clock: Clock) -> None:
        self._settings = settings
        self._make_endpoint = make_endpoint
        self._clock = clock
        self._lock: IO[bytes] | None = None
        self._index: SqlOfferIndex | None = None
        self._endpoint: Endpoint | None = None
        self._web: tuple[Server, asyncio.Task[None]] | None = None
        self._purging: asyncio.Task[None] | None = None

    async def start(self) -> HubPlaces:
        """Open everything and give the real addresses. What was opened is closed again when something fails.

        Raises BadHubSetting, BadKeyFile, HubStoreFailed, DataInUse, HttpFailed, and what the endpoint raises.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> HubPlaces:
        settings = self._settings
        _refuse_bad_name(settings.name)
        try:
            settings.data.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(settings.data / "hub.lock")
        except BlockingIOError as error:
            raise DataInUse(f"Another hub is running on {settings.data}; stop it, or name another --data.") from error
        except OSError as error:
            raise DataInUse(f"The hub's directory {settings.data} cannot be used: {error.strerror}.") from error
        key = load_or_create_key(settings.data / "hub.key")
        self._index = await SqlOfferIndex.open(settings.data / "hub.sqlite", self._clock, settings.offers_max)
        self._endpoint = self._make_endpoint(key)
        service = HubService(
            self._endpoint,
            self._index,
            self._clock,
            name=settings.name,
            network=settings.network,
            offers_max=settings.offers_max,
        )
        self._purging = asyncio.create_task(self._purge(self._index))
        url = None
        if settings.http is not None:
            url = await self._serve_http(settings.http, make_app(self._index, service.info, self._clock))
        await self._endpoint.listen(settings.listen)
        return HubPlaces(HubTicket(key.node_id, settings.public or tuple(self._endpoint.addresses)), url)

    async def stop(self) -> None:
        """Stop answering, then close the database. Stopping twice, or before the start, is harmless."""
        if self._purging is not None:
            self._purging.cancel()
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._web is not None:
            server, serving = self._web
            self._web = None
            if not serving.done():
                server.stop()  # type: ignore[no-untyped-call]
            await asyncio.wait([serving], timeout=HTTP_STOP_S)
            serving.cancel()
        if self._index is not None:
            await self._index.close()
        if self._lock is not None:
            self._lock.close()

    async def _purge(self, index: SqlOfferIndex) -> None:
        while True:
            await self._clock.sleep(PURGE_EVERY_S)
            try:
                forgotten = await index.purge()
            except StorageError as error:
                _log.error("%s", error)
            else:
                if forgotten:
                    _log.info("forgot %d offers that expired long ago", forgotten)

    async def _serve_http(self, place: str, app: Litestar) -> str:
        host, port = _free_port(*_split(place))
        server = Server(
            app,
            address=host,
            port=port,
            interface=Interfaces.ASGINL,
            websockets=False,
            http=HTTPModes.http1,  # while it waits to learn which one is spoken, no time-out holds
            backpressure=min(HTTP_CONNECTIONS_MAX, open_files() // 8),
            http1_settings=HTTP1Settings(header_read_timeout=HTTP_HEADER_MS_MAX, max_buffer_size=HTTP_HEADER_BYTES_MAX),
            log_enabled=False,
        )
        bound = asyncio.Event()
        server.on_startup(bound.set)
        serving = asyncio.create_task(server.serve())
        self._web = (server, serving)
        waiting = asyncio.create_task(bound.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for _ in range(HTTP_READY_TRIES_MAX):
            if serving.done():
                break
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                await self._clock.sleep(HTTP_READY_EVERY_S)
            else:
                writer.close()
                return f"http://{shown}"
        cause = serving.exception() if serving.done() and not serving.cancelled() else None
        raise HttpFailed(f"The hub's HTTP face did not come up at {shown}: {_first_line(cause)}.")


def _first_line(cause: BaseException | None) -> str:
    return str(cause).splitlines()[0] if cause is not None and str(cause) else "the server gave no reason"


def _refuse_bad_name(name: str) -> None:
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError as error:
        raise BadHubSetting(
            f"{name!r} cannot name a hub: up to 48 letters, digits, dots, dashes and underscores can, beginning with a "
            "letter or digit."
        ) from error


def _split(place: str) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise BadHubSetting(f"{place!r} is not host:port for the HTTP face; write for example 127.0.0.1:7780.")
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
            f"The hub cannot serve HTTP at {host}:{port}: {error.strerror}. Name another address with --http."
        ) from error


def _lock(path: Path) -> IO[bytes]:
    """Hold a file for as long as the process lives; the system lets go of it when the process dies in any way. Raises
    BlockingIOError when another process holds it."""
    file = path.open("ab")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
    return file
