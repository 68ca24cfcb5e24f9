"""The index of offers in a database: SQLite in one file, through SQLAlchemy Core with a schema PostgreSQL takes too.

One thread talks to the database, in one transaction at a time. While a transaction is being written the event loop
gathers what arrives meanwhile into the next one (group commit), so a hundred publications cost one `fsync`, and each
is acknowledged only after it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from shoal.errors import ShoalError, StorageError
from shoal.hub.index import (
    OFFERS_MAX,
    REMEMBERED_MS,
    REMEMBERED_PER_OFFER,
    Arrival,
    HubTime,
    KeptOffer,
    admit,
    page_of,
    refuse_when_full,
)
from shoal.hub.rates import HubBusy
from shoal.identity import Envelope
from shoal.market import fits
from shoal.market.filters import best_flops
from shoal.protocol.messages import decode
from shoal.protocol.offers import Offer, OfferFind
from shoal.storage.sqlite import sqlite_engine
from shoal.world import Clock

SCHEMA = 2
"""The form of the tables. Form 1 did not say where offers came from; a hub refuses a database of any other form."""
BATCH_MAX = 512
"""Operations gathered for one transaction; further ones are refused until it is written."""
FINDS_MAX = 32
"""Of these, searches: what they found is held until all of the transaction is done, up to FOUND_BYTES_MAX each."""
PAGE_ROWS = 256
"""Rows read at a time while looking for offers that fit."""
OPENED_MAX = 1024
"""Offers that are remembered as they were read: each search looks at the same ones."""
_INT_MAX = (1 << 63) - 1

_tables = sa.MetaData()
_about = sa.Table("hub_schema", _tables, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
_offers = sa.Table(
    "hub_offers",
    _tables,
    sa.Column("node", sa.LargeBinary(32), primary_key=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("record_id", sa.LargeBinary(32), nullable=False),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
    sa.Column("arrived_ms", sa.BigInteger, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False, index=True),
    sa.Column("name", sa.String(48), nullable=False, index=True),
    sa.Column("busy", sa.Boolean, nullable=False),
    sa.Column("memory_bytes", sa.BigInteger, nullable=False),
    sa.Column("flops", sa.Float(53), nullable=False),
    sa.Column("source", sa.String(64), nullable=False, server_default=""),
)
# Memory and FLOP/s are those of the largest and of the fastest device: they narrow a search, `fits` decides it.

T = TypeVar("T")


class HubStoreFailed(StorageError):
    """The hub's database cannot be read or written."""

    code = "SH-440"


@dataclass
class _Batch:
    operations: list[Callable[[sa.Connection], Any]] = field(default_factory=list)
    finds: int = 0
    outcomes: asyncio.Task[list[Any]] | None = None


class SqlOfferIndex:
    """Holds offers in a database. Build it with `await SqlOfferIndex.open(...)`."""

    def __init__(self, engine: sa.Engine, place: str, clock: Clock, offers_max: int) -> None:
        self._engine = engine
        self._place = place
        self._time = HubTime(clock)
        self._offers_max = offers_max
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-store")
        self._writing = asyncio.Lock()
        self._gathering: _Batch | None = None
        self._closed = False

    @classmethod
    async def open(cls, path: Path, clock: Clock, offers_max: int = OFFERS_MAX) -> SqlOfferIndex:
        """Open or create the database file. Raises HubStoreFailed."""
        engine = sqlite_engine(path, poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
        index = cls(engine, str(path), clock, offers_max)
        try:
            await index._do(_create_or_check)
        except ShoalError:
            await index.close()
            raise
        return index

    async def keep(self, arrival: Arrival) -> KeptOffer:
        return await self._do(lambda connection: self._keep(connection, arrival))

    async def find(self, wanted: OfferFind) -> tuple[list[KeptOffer], bool]:
        return await self._do(lambda connection: page_of(self._fitting(connection, wanted), wanted.limit), finds=1)

    async def get(self, node: bytes) -> KeptOffer | None:
        return await self._do(lambda connection: self._get(connection, node))

    async def count(self) -> int:
        return await self._do(self._count)

    async def purge(self) -> int:
        return await self._do(self._purge)

    async def close(self) -> None:
        """Finish what was begun and close the file. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._gathering is not None and self._gathering.outcomes is not None:
            await asyncio.wait([self._gathering.outcomes])
        async with self._writing:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown(wait=False)

    async def _do(self, operation: Callable[[sa.Connection], T], finds: int = 0) -> T:
        if self._closed:
            raise HubStoreFailed(f"The hub's database {self._place} is closed: the hub is stopping; ask another hub.")
        batch = self._gathering
        if batch is None:
            batch = self._gathering = _Batch()
            batch.outcomes = asyncio.create_task(self._write(batch))
        if len(batch.operations) >= BATCH_MAX:
            raise HubBusy(f"This hub has {BATCH_MAX} requests waiting for its database; try again in a moment.")
        if batch.finds + finds > FINDS_MAX:
            raise HubBusy(f"This hub has {FINDS_MAX} searches waiting for its database; try again in a moment.")
        batch.finds += finds
        place = len(batch.operations)
        batch.operations.append(operation)
        assert batch.outcomes is not None
        outcome = (await asyncio.shield(batch.outcomes))[place]
        if isinstance(outcome, ShoalError):
            raise outcome
        return cast(T, outcome)

    async def _write(self, batch: _Batch) -> list[Any]:
        async with self._writing:
            self._gathering = None
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, batch.operations)

    def _transact(self, operations: list[Callable[[sa.Connection], Any]]) -> list[Any]:
        outcomes: list[Any] = []
        try:
            with self._engine.begin() as connection:
                for operation in operations:
                    try:
                        outcomes.append(operation(connection))
                    except ShoalError as refusal:  # an operation refuses before it writes: the others stand
                        outcomes.append(refusal)
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            raise HubStoreFailed(
                f"The hub's database {self._place} failed: {cause}. Nothing was acknowledged; check that the disk has "
                "room and that the file is writable, then try again."
            ) from error
        return outcomes

    def _keep(self, connection: sa.Connection, arrival: Arrival) -> KeptOffer:
        now_ms = self._time.now_ms()
        held = self._row(connection, arrival.node)
        kept = admit(held, arrival, now_ms)
        if held is None or held.expires_ms <= now_ms < kept.expires_ms:
            from_there = functools.partial(self._count, connection, _offers.c.source == arrival.source)
            refuse_when_full(self._count(connection), from_there, self._offers_max)
        devices = kept.offer.capability.devices
        row = {
            "sequence": kept.offer.sequence,
            "record_id": kept.record_id,
            "envelope": kept.envelope,
            "arrived_ms": kept.arrived_ms,
            "expires_ms": kept.expires_ms,
            "name": kept.offer.name,
            "busy": kept.offer.busy,
            "memory_bytes": min(_INT_MAX, max(device.memory_bytes for device in devices)),
            "flops": max(best_flops(device) for device in devices),
            "source": kept.source,
        }
        if held is None:
            connection.execute(_offers.insert().values(node=kept.node, **row))
        else:
            connection.execute(_offers.update().where(_offers.c.node == kept.node).values(**row))
        return kept

    def _fitting(self, connection: sa.Connection, wanted: OfferFind) -> Iterator[KeptOffer]:
        page = _page(wanted.idle_only, by_name=wanted.name is not None, by_node=wanted.node is not None)
        likely = {
            "now_ms": self._time.now_ms(), "memory_bytes": min(_INT_MAX, wanted.memory_bytes_min),
            "flops": wanted.flops_min, "name": wanted.name, "node": wanted.node,
        }  # fmt: skip
        after = wanted.after or b""
        while True:
            rows = connection.execute(page, {**likely, "after": after}).all()
            for row in rows:
                kept = _kept(row)
                if fits(kept.node, kept.offer, wanted)[0]:
                    yield kept
            if len(rows) < PAGE_ROWS:
                return
            after = rows[-1].node

    def _get(self, connection: sa.Connection, node: bytes) -> KeptOffer | None:
        kept = self._row(connection, node)
        return kept if kept is not None and kept.expires_ms > self._time.now_ms() else None

    def _count(self, connection: sa.Connection, *which: sa.ColumnElement[bool]) -> int:
        now_ms = self._time.now_ms()
        live = sa.select(sa.func.count()).select_from(_offers).where(_offers.c.expires_ms > now_ms, *which)
        return connection.execute(live).scalar_one()

    def _purge(self, connection: sa.Connection) -> int:
        rows_max = REMEMBERED_PER_OFFER * self._offers_max
        newest = sa.select(_offers.c.node).order_by(_offers.c.expires_ms.desc(), _offers.c.node).limit(rows_max)
        forgotten = sa.or_(
            _offers.c.expires_ms <= self._time.now_ms() - REMEMBERED_MS, _offers.c.node.not_in(newest.scalar_subquery())
        )
        return connection.execute(_offers.delete().where(forgotten)).rowcount

    def _row(self, connection: sa.Connection, node: bytes) -> KeptOffer | None:
        row = connection.execute(sa.select(_offers).where(_offers.c.node == node).with_for_update()).one_or_none()
        return None if row is None else _kept(row)


@functools.cache
def _page(idle_only: bool, by_name: bool, by_node: bool) -> sa.Select[Any]:
    """Built once for each kind of search: that takes as long as reading a page."""
    columns = _offers.c
    likely = [
        columns.node > sa.bindparam("after"),
        columns.expires_ms > sa.bindparam("now_ms"),
        columns.memory_bytes >= sa.bindparam("memory_bytes"),
        columns.flops >= sa.bindparam("flops"),
    ]
    if idle_only:
        likely.append(columns.busy == sa.false())
    if by_name:
        likely.append(columns.name == sa.bindparam("name"))
    if by_node:
        likely.append(columns.node == sa.bindparam("node"))
    return sa.select(_offers).where(*likely).order_by(columns.node).limit(PAGE_ROWS)


def _kept(row: sa.Row[Any]) -> KeptOffer:
    offer = _opened(row.envelope)
    return KeptOffer(row.node, offer, row.envelope, row.record_id, row.arrived_ms, row.expires_ms, row.source)


@functools.lru_cache(OPENED_MAX)
def _opened(packed: bytes) -> Offer:
    # Verified when it came in, so the signature is not checked again for every search; clients check it.
    envelope = Envelope.from_bytes(packed, Offer.MAX_BYTES)
    return decode(Offer, envelope.body, envelope.version)


def _create_or_check(connection: sa.Connection) -> None:
    _tables.create_all(connection)
    version = connection.execute(sa.select(_about.c.version)).scalar_one_or_none()
    if version is None:
        connection.execute(_about.insert().values(version=SCHEMA))
    elif version == 1:
        connection.execute(sa.text("ALTER TABLE hub_offers ADD COLUMN source VARCHAR(64) DEFAULT '' NOT NULL"))
        connection.execute(_about.update().values(version=SCHEMA))
    elif version != SCHEMA:
        raise HubStoreFailed(
            f"The hub's database has tables of form {version}, this version of Shoal needs {SCHEMA}; start the hub "
            "with another data directory, or with the version that wrote it."
        )
