"""What an auctioneer must not forget: orders that it has taken, batches that it has published, the seed of the next.

In SQLite, one file, a transaction for each step: what is partly written is not there. All calls block; they are one
thread's at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from shoal.auctions.refusals import AuctionFailed
from shoal.protocol.auctions import PART_BYTES, PARTS_MAX
from shoal.storage.sqlite import sqlite_engine

SCHEMA = 1
"""The form of the tables. A database of another form is refused."""
KEPT_MAX, KEPT_BYTES = 10_000, 1 << 30
"""Batches that are kept, the newest, and their bytes; the newest two whatever their size."""
_ALWAYS_KEPT = 2

_tables = sa.MetaData()
_about = sa.Table("auction_schema", _tables, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
_orders = sa.Table(
    "auction_orders",
    _tables,
    sa.Column("id", sa.LargeBinary(32), primary_key=True),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
)
_seed = sa.Table("auction_seed", _tables, sa.Column("seed", sa.LargeBinary(32), primary_key=True))
_batches = sa.Table(
    "auction_batches",
    _tables,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)
_parts = sa.Table(
    "auction_parts",
    _tables,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
T = TypeVar("T")


class AuctionStore:
    """A database; orders and seed in it are those of the batch after the newest one that it has."""

    def __init__(self, path: Path) -> None:
        """Made where there is none, for its owner alone: nobody else may know the seed. Raises AuctionFailed."""
        self._path = path
        try:
            path.touch(mode=0o600)
        except OSError as error:
            raise AuctionFailed(f"The auction's database {path} cannot be used: {error.strerror}.") from error
        self._engine = sqlite_engine(path, poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
        try:
            self._do(self._create_or_check)
        except AuctionFailed:
            self.close()
            raise

    def keep(self, orders: Mapping[bytes, bytes]) -> None:
        """Orders by their ids, for the open batch; durable when this returns. One that is there already stays."""
        rows = [{"id": name, "envelope": envelope} for name, envelope in orders.items()]
        self._do(lambda connection: connection.execute(sa.insert(_orders).prefix_with("OR IGNORE"), rows))

    def publish(self, number: int, published: bytes, next_seed: bytes) -> None:
        """A batch, and the seed of the next; its orders are in it, and what is older than may be kept goes. Raises
        AuctionFailed also where there is a batch of this number: there is never another one."""
        starts = range(0, len(published), PART_BYTES)
        if len(starts) > PARTS_MAX:
            raise AuctionFailed(f"Batch {number} of {len(published)} bytes is larger than may be published.")

        def write(connection: sa.Connection) -> None:
            connection.execute(sa.insert(_batches).values(number=number, bytes=len(published)))
            rows = [
                {"number": number, "part": part, "data": published[at : at + PART_BYTES]}
                for part, at in enumerate(starts)
            ]
            connection.execute(sa.insert(_parts), rows)
            connection.execute(sa.delete(_orders))
            connection.execute(sa.delete(_seed))
            connection.execute(sa.insert(_seed).values(seed=next_seed))
            kept, count = 0, 0
            for older, size in connection.execute(sa.select(_batches).order_by(_batches.c.number.desc())).all():
                kept, count = kept + size, count + 1
                if count > _ALWAYS_KEPT and (kept > KEPT_BYTES or count > KEPT_MAX):
                    connection.execute(sa.delete(_parts).where(_parts.c.number <= older))
                    connection.execute(sa.delete(_batches).where(_batches.c.number <= older))
                    break

        self._do(write)

    def span(self) -> tuple[int, int]:
        """The numbers of the oldest and the newest batch; zeros where there is none."""
        query = sa.select(sa.func.min(_batches.c.number), sa.func.max(_batches.c.number))
        oldest, newest = self._do(lambda connection: connection.execute(query).one())
        return oldest or 0, newest or 0

    def part(self, number: int, part: int) -> tuple[int, bytes] | None:
        """How many parts a batch has, and one of them; None where it is not kept, or has no such part."""

        def read(connection: sa.Connection) -> tuple[int, bytes] | None:
            size = connection.execute(sa.select(_batches.c.bytes).where(_batches.c.number == number)).scalar()
            where = (_parts.c.number == number) & (_parts.c.part == part)
            data = connection.execute(sa.select(_parts.c.data).where(where)).scalar()
            return None if size is None or data is None else (-(-size // PART_BYTES), data)

        return self._do(read)

    def newest(self) -> bytes | None:
        """What was published last, whole."""
        number = sa.select(sa.func.max(_batches.c.number)).scalar_subquery()
        query = sa.select(_parts.c.data).where(_parts.c.number == number).order_by(_parts.c.part)
        return b"".join(self._do(lambda connection: connection.execute(query).scalars().all())) or None

    def open_batch(self) -> tuple[bytes | None, list[bytes]]:
        """The seed of the batch that is open, and the orders that were taken for it."""
        return self._do(
            lambda connection: (
                connection.execute(sa.select(_seed.c.seed)).scalar(),
                list(connection.execute(sa.select(_orders.c.envelope)).scalars()),
            )
        )

    def close(self) -> None:
        self._engine.dispose()

    def _create_or_check(self, connection: sa.Connection) -> None:
        _tables.create_all(connection)
        versions = connection.execute(sa.select(_about.c.version)).scalars().all()
        if not versions:
            connection.execute(sa.insert(_about).values(version=SCHEMA))
        elif list(versions) != [SCHEMA]:
            raise AuctionFailed(
                f"The auction's database {self._path} was written by another version (form {versions}, this one writes "
                f"{SCHEMA}): use that version, or another --data, where a new key is made."
            )

    def _do(self, operation: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return operation(connection)
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            raise AuctionFailed(f"The auction's database {self._path} cannot be used: {cause}.") from error
