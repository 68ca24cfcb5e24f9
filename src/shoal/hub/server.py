"""One hub: a data directory, an endpoint for links, an HTTP face, and the service between them."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from shoal.errors import BadInput, StorageError
from shoal.hub.index import OFFERS_MAX
from shoal.hub.service import HubService
from shoal.hub.store import SqlOfferIndex
from shoal.hub.web import make_app
from shoal.identity import KeyPair, load_or_create_key
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.offers import Name
from shoal.transport.http import HttpFace
from shoal.world import Address, Clock, Endpoint

PURGE_EVERY_S = 60.0

_log = logging.getLogger("shoal.hub")


class BadHubSetting(BadInput):
    """A hub's name is not of the form it must have."""

    code = "SH-114"


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
        self._web: HttpFace | None = None
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
            self._web = HttpFace(make_app(self._index, service.info, self._clock), self._clock)
            url = await self._web.start(settings.http)
        await self._endpoint.listen(settings.listen)
        return HubPlaces(HubTicket(key.node_id, settings.public or tuple(self._endpoint.addresses)), url)

    async def stop(self) -> None:
        """Stop answering, then close the database. Stopping twice, or before the start, is harmless."""
        if self._purging is not None:
            self._purging.cancel()
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._web is not None:
            await self._web.stop()
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


def _refuse_bad_name(name: str) -> None:
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError as error:
        raise BadHubSetting(
            f"{name!r} cannot name a hub: up to 48 letters, digits, dots, dashes and underscores can, beginning with a "
            "letter or digit."
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
