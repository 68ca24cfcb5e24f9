"""One house ledger: a data folder, a database, an endpoint for links, and the service between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shoal.errors import BadInput, StorageError
from shoal.house.service import LedgerService
from shoal.identity import KeyPair, load_key, load_or_create_key
from shoal.identity.secrets import write_secret
from shoal.ledger.commands import Deposit, SetFee
from shoal.ledger.fees import FEE_NOTICE_MS, Announced
from shoal.ledger.moves import ISSUED, Move
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import DEFAULT_NETWORK, sign
from shoal.protocol.money import FeeTable, HouseLedger
from shoal.protocol.prices import Currency
from shoal.storage.group_commit import GroupCommit
from shoal.storage.ledgers import SqlLedger
from shoal.world import Address, Clock, DirectoryDisk, DiskLock, Endpoint

PASS_EVERY_S = 10.0
"""How often a ledger looks what the time has brought, also when nobody asks it for anything."""
ANNOUNCING_MS = 60_000
"""Until a fee table is in the journal, at most: it is announced so much before it has to be."""
SETTINGS_MAX_BYTES = 4096
DEFAULT_CURRENCY = "USD"
_log = logging.getLogger("shoal.house")


class LedgerFolderRefused(StorageError):
    """Another process runs the ledger of a folder, or the folder cannot be used."""

    code = "SH-447"


class BadDeposit(BadInput):
    """A deposit is of an amount, or with a reference, that no journal holds."""

    code = "SH-134"


class OtherBooks(BadInput):
    """A ledger is to be started with another currency or database than its folder has."""

    code = "SH-133"


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `ledger.json` holds. A key with two databases would sign two journals."""

    currency: Currency
    database: str | None


@dataclass(frozen=True)
class LedgerSettings:
    """What the operator of a ledger decided."""

    data: Path
    """Folder of its key, and of its database where that is a file; made when missing."""
    currency: str | None = None
    database: str | None = None
    """A `postgresql+psycopg://` URL. None, for this and for the currency: as before; SQLite in the folder, and USD,
    where there was none."""
    listen: Address = "tcp://127.0.0.1:0"
    network: str = DEFAULT_NETWORK
    fee_ppm: int | None = None
    """What it takes of what escrows pay. None: as before; what terms say, where nothing was said yet. Another fee than
    before is announced, and holds a day later."""
    mint_max_micro: int = 0
    """With a development mint: how much it gives at a time; 0: without one."""
    public: tuple[Address, ...] = ()
    """Where others can dial it, for its ticket; none: where it listens."""


class LedgerServer:
    """A house ledger from start to stop. What it acknowledged survives `kill -9`."""

    def __init__(self, settings: LedgerSettings, make_endpoint: Callable[[KeyPair], Endpoint], clock: Clock) -> None:
        self._settings, self._make_endpoint, self._clock = settings, make_endpoint, clock
        self._lock: DiskLock | None = None
        self._ledger: GroupCommit | None = None
        self._endpoint: Endpoint | None = None
        self._passing: asyncio.Task[None] | None = None

    async def start(self) -> LedgerTicket:
        """Open everything. What was opened is closed again when something fails. Raises BadKeyFile, OtherBooks,
        LedgerFolderRefused, LedgerFailed, and what the endpoint raises."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> LedgerTicket:
        settings = self._settings
        try:
            settings.data.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryDisk(settings.data).lock("ledger.lock")
        except BlockingIOError as error:
            raise LedgerFolderRefused(
                f"Another process runs the ledger in {settings.data}; stop it, or name another --data."
            ) from error
        except OSError as error:
            raise LedgerFolderRefused(
                f"The ledger's folder {settings.data} cannot be used: {error.strerror}."
            ) from error
        kept = _settled(settings)
        key = load_or_create_key(settings.data / "operator.key")
        name = HouseLedger(key.node_id, kept.currency)
        place = _place(settings.data, kept)
        opened = await asyncio.to_thread(SqlLedger.open, place, name, self._clock, settings.network)
        self._ledger = GroupCommit(opened)
        await self._ledger.ask(lambda ledger: self._announce(ledger, key))
        with suppress(FileExistsError):
            write_secret(settings.data / "ledger.json", msgspec.json.encode(kept))  # a URL may hold a password
        self._endpoint = self._make_endpoint(key)
        LedgerService(
            self._endpoint, self._ledger, name, key, self._clock,
            network=settings.network, mint_max_micro=settings.mint_max_micro,
        )  # fmt: skip
        self._passing = asyncio.create_task(self._pass(self._ledger))
        await self._endpoint.listen(settings.listen)
        return LedgerTicket(key.node_id, kept.currency, settings.public or tuple(self._endpoint.addresses))

    def _announce(self, ledger: SqlLedger, key: KeyPair) -> None:
        """A fee that is not what the newest table says. Raises LedgerFailed."""
        known, now_ms, fee_ppm = ledger.fees(), ledger.now_ms(), self._settings.fee_ppm
        if fee_ppm is None or (known and known[-1].table.fee_ppm == fee_ppm):
            return
        ahead_ms = FEE_NOTICE_MS + ANNOUNCING_MS if ledger.balance(ISSUED) else 0
        table = FeeTable(
            currency=ledger.ledger.currency, number=known[-1].table.number + 1 if known else 1,
            from_ms=now_ms + ahead_ms, fee_ppm=fee_ppm,
        )  # fmt: skip
        ledger.apply(SetFee(sign(key, table, self._settings.network).to_bytes()))

    async def fees(self) -> tuple[Announced, ...]:
        """The table that holds, if any, and the one that is to follow."""
        return () if self._ledger is None else await self._ledger.fees()

    async def stop(self) -> None:
        """Stop answering, then close the database. Stopping twice, or before the start, is harmless."""
        if self._passing is not None:
            self._passing.cancel()
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._ledger is not None:
            await self._ledger.close()
        if self._lock is not None:
            self._lock.release()

    async def _pass(self, ledger: GroupCommit) -> None:
        while True:
            await self._clock.sleep(PASS_EVERY_S)
            try:
                await ledger.ask(lambda one: one.apply_all([]))
            except StorageError as error:
                _log.error("%s", error)


def deposit(data: Path, account: bytes, amount_micro: int, reference: str, clock: Clock) -> tuple[Move, ...]:
    """Book what the operator has got for an account outside of its ledger: by whoever can read the operator's key,
    while the ledger runs or not, as its database lets one after the other write. Raises LedgerFolderRefused,
    BadKeyFile, BadDeposit, LedgerFailed, and what the rules do."""
    kept = _kept(data)
    if kept is None:
        raise LedgerFolderRefused(f"{data} holds no ledger: name its --data, or begin one with `shoal ledger start`.")
    try:
        command = msgspec.convert(
            {"do": "deposit", "account": account, "amount_micro": amount_micro, "reference": reference}, Deposit
        )
        command.reference.encode()
    except msgspec.ValidationError as error:
        raise BadDeposit(f"This deposit cannot be booked: {error}.") from error
    except UnicodeEncodeError as error:
        raise BadDeposit("This deposit cannot be booked: its reference is not UTF-8 text.") from error
    if not amount_micro:
        raise BadDeposit("This deposit cannot be booked: it is one of nothing.")
    name = HouseLedger(load_key(data / "operator.key").node_id, kept.currency)
    ledger = SqlLedger.open(_place(data, kept), name, clock)
    try:
        return ledger.apply(command)
    finally:
        ledger.close()


def _settled(settings: LedgerSettings) -> _Kept:
    """With which currency and database a ledger is started: what was decided at its first start is kept."""
    kept = _kept(settings.data)
    if kept is None:
        currency = settings.currency or DEFAULT_CURRENCY
        try:
            kept = msgspec.convert({"currency": currency, "database": settings.database}, _Kept)
        except msgspec.ValidationError as error:
            raise OtherBooks(f"{currency!r} is no currency: capitals and digits, such as USD.") from error
    if settings.currency not in (None, kept.currency):
        raise OtherBooks(
            f"The ledger in {settings.data} is in {kept.currency}, not in {settings.currency}: another currency needs "
            "another --data, with a key of its own."
        )
    if settings.database not in (None, kept.database):
        raise OtherBooks(
            f"The ledger in {settings.data} has its books elsewhere than --database says, and one key with two "
            "journals would be an operator that cheats: move the books first, then write the URL into its ledger.json."
        )
    return kept


def _kept(data: Path) -> _Kept | None:
    path = data / "ledger.json"
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(SETTINGS_MAX_BYTES), type=_Kept)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerFolderRefused(f"{path} cannot be read: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise LedgerFolderRefused(f"{path} does not say currency and database of a ledger: {error}.") from error


def _place(data: Path, kept: _Kept) -> Path | str:
    return data / "ledger.sqlite" if kept.database is None else kept.database
