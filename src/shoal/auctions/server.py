"""One auction: a data folder, a database, an endpoint for links, and a batch that is closed every so often."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.auctions.auctioneer import Auctioneer
from shoal.auctions.refusals import AuctionFailed
from shoal.auctions.service import AuctionService
from shoal.auctions.store import AuctionStore
from shoal.errors import ShoalError, StorageError
from shoal.identity import KeyPair, load_or_create_key
from shoal.protocol.auctions import AuctionTicket
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.world import Address, Clock, Dice, DirectoryDisk, DiskLock, Endpoint, Ledger

DEFAULT_EVERY_S = 10.0
_log = logging.getLogger("shoal.auctions")


class AuctionFolderRefused(StorageError):
    """Another process runs the auction of a folder, or the folder cannot be used."""

    code = "SH-456"


@dataclass(frozen=True)
class AuctionSettings:
    """What the operator of an auction decided."""

    data: Path
    """Folder of its key and database; made when missing."""
    every_s: float = DEFAULT_EVERY_S
    """How often a batch that has orders is closed."""
    listen: Address = "tcp://127.0.0.1:0"
    network: str = DEFAULT_NETWORK
    public: tuple[Address, ...] = ()
    """Where others can dial it, for its ticket; none: where it listens."""


class AuctionServer:
    """An auction from start to stop. What it acknowledged or published survives `kill -9`."""

    def __init__(
        self,
        settings: AuctionSettings,
        make_endpoint: Callable[[KeyPair], Endpoint],
        make_ledger: Callable[[Endpoint], Ledger],
        clock: Clock,
        dice: Dice,
    ) -> None:
        """`make_ledger` gives that at which hours are paid; `dice` draws the seeds of the lots: nobody else may know
        its throws."""
        self._settings, self._make_endpoint, self._clock, self._dice = settings, make_endpoint, clock, dice
        self._make_ledger = make_ledger
        self._lock: DiskLock | None = None
        self._auctioneer: Auctioneer | None = None
        self._endpoint: Endpoint | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> AuctionTicket:
        """Open everything. What was opened is closed again when something fails. Raises BadKeyFile,
        AuctionFolderRefused, AuctionFailed, and what the endpoint raises."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> AuctionTicket:
        settings = self._settings
        try:
            self._lock = DirectoryDisk(settings.data).lock("auction.lock")
        except BlockingIOError as error:
            raise AuctionFolderRefused(
                f"Another process runs the auction in {settings.data}; stop it, or name another --data."
            ) from error
        except OSError as error:
            raise AuctionFolderRefused(
                f"The auction's folder {settings.data} cannot be used: {error.strerror}."
            ) from error
        key_file, database = settings.data / "auctioneer.key", settings.data / "auction.sqlite"
        if key_file.exists() and not database.exists():  # the database is made first
            raise AuctionFailed(
                f"The database of the auction in {settings.data} is gone, and its key would sign its batches a second "
                "time: put the database back, or name another --data."
            )
        store = await asyncio.to_thread(AuctionStore, database)
        try:
            key = load_or_create_key(key_file)
        except BaseException:
            store.close()
            raise
        self._endpoint = self._make_endpoint(key)
        self._auctioneer = await Auctioneer.open(
            store, key, self._make_ledger(self._endpoint), self._clock, self._dice, every_s=settings.every_s,
            network=settings.network,
        )  # fmt: skip
        AuctionService(
            self._endpoint, self._auctioneer, self._clock, every_s=settings.every_s, network=settings.network
        )
        self._closing = asyncio.create_task(self._close_batches(self._auctioneer))
        await self._endpoint.listen(settings.listen)
        return AuctionTicket(key.node_id, settings.public or tuple(self._endpoint.addresses))

    async def stop(self) -> None:
        """Stop answering, then close the database. Stopping twice, or before the start, is harmless."""
        if self._closing is not None:
            self._closing.cancel()
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._auctioneer is not None:
            await self._auctioneer.stop()
        if self._lock is not None:
            self._lock.release()

    async def _close_batches(self, auctioneer: Auctioneer) -> None:
        while True:
            await self._clock.sleep(self._settings.every_s)
            try:
                await auctioneer.close()
            except ShoalError as error:
                _log.error("Batch %d stays open: %s", auctioneer.running, error)
