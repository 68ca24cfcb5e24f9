"""A node that sells its time: for whom it keeps its slots, what it has earned, and the vouchers that it is paid with.

What `market.holds` decides is on the disk before anybody hears of it, and so is each voucher before it is acknowledged:
a node that was killed keeps its word, and loses no money. Vouchers are redeemed at the ledger now and then, when a
client says that there will be no more, and when the node stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord, JobError, ShoalError, StorageError
from shoal.identity import Envelope, Hash, KeyPair, NodeId, short_id
from shoal.identity.accounts import Address, address_text, signer_of
from shoal.ledger.commands import Redeem
from shoal.ledger.escrows import Escrow, EscrowOver, OldVoucher, State
from shoal.ledger.escrows import Paid as PaidOut
from shoal.market.earnings import Earnings, say_unpaid
from shoal.market.holds import Slots, Terms, ask, give_back, held, hold_of, keep, take
from shoal.protocol.holds import (
    HoldAsk,
    HoldGiven,
    HoldRelease,
    HoldTake,
    Paid,
    Pay,
    Release,
)
from shoal.protocol.messages import DEFAULT_NETWORK, decode, encode, open_record, sign
from shoal.protocol.money import Amount, BadVoucher, SignedVoucher
from shoal.protocol.offers import Done, UnixMs
from shoal.protocol.prices import Currency
from shoal.quantities.money import format_money
from shoal.storage.faults import disk_faults
from shoal.world import Clock, Disk, Endpoint, Ledger, Request

REDEEM_EVERY_S = 10.0
ENDS_EARLY_MS = 10_000
"""Before an escrow ends, the work for it does: its last vouchers have to come and be redeemed."""
ACCOUNTS_MAX = 256
"""Escrows with something that is not redeemed, or not yet over."""
SLOTS, ACCOUNTS, ENDED = "slots", "accounts", "ended"
ENDED_MAX = 4096
"""Escrows that are over and whose payments are remembered; the oldest go."""
FILE_MAX_BYTES = 8 << 20

_log = logging.getLogger("shoal.node")
T = TypeVar("T")


class NotHeld(JobError):
    """A node that costs something was invited by a client that it keeps no paid slot for."""

    code = "SH-607"


class SalesDamaged(StorageError):
    """What a node has promised, or was paid with, cannot be read."""

    code = "SH-448"


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """One escrow that this node is paid out of."""

    escrow: Hash
    client: NodeId
    payer: Address
    signer: Address
    most_micro: Amount
    ends_ms: UnixMs
    micro_per_h: Annotated[int, Meta(ge=0)]
    taken_ms: UnixMs
    newest: SignedVoucher | None = None
    redeemed_micro: Amount = 0
    held_micro: Amount = 0
    """Of that, held back and not withheld."""
    withheld_micro: Amount = 0
    currency: Currency = "USD"
    last: bool = False
    """The client has said that no more vouchers will come."""

    @property
    def paid_micro(self) -> int:
        return self.newest.voucher.amount_micro if self.newest else 0


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """An escrow that is over and has paid this node something: what it paid, its ledger's fee included."""

    escrow: Hash
    client: NodeId
    payer: Address
    payee: Address
    currency: Currency
    paid_micro: Amount
    """What the vouchers say."""
    redeemed_micro: Amount
    held_micro: Amount
    """Of that, still held back when it ended; it comes at `settles_ms`, less what is withheld until then."""
    withheld_micro: Amount
    """Before it ended."""
    ended_ms: UnixMs
    settles_ms: UnixMs


def read_kept(disk: Disk, name: str, kind: type[T], whose: str) -> T | None:
    """A file of the folder in which node `whose` keeps its sales; None where it was never written. Raises
    SalesDamaged."""
    if disk.info(name) is None:
        return None
    try:
        return msgspec.msgpack.decode(disk.read(name, length=FILE_MAX_BYTES), type=kind)
    except (msgspec.DecodeError, OSError) as error:
        raise SalesDamaged(
            f"{disk.place}/{name}, in which node {whose} keeps what it has promised and was paid with, cannot be read: "
            f"{error}. Restore it from a copy; without one, move it away once what was promised is over, ten minutes "
            "after the node stopped."
        ) from error


class Work:
    """What one member of a job earns here. It lives as long as the member does."""

    def __init__(self, sales: Sales, escrow: bytes) -> None:
        self._sales, self._escrow = sales, escrow
        self._earnings = Earnings()
        self._earned_lately = [0, 0, 0]
        """After the last three accepted contributions, the newest last."""
        account = sales.account(escrow)
        self._began_micro = account.paid_micro if account else 0

    def ready(self, samples_per_s: float, tokens_per_sample: int) -> None:
        account = self._sales.account(self._escrow)
        if account is not None:
            self._earnings = self._earnings.measured(account.micro_per_h, samples_per_s, tokens_per_sample)

    def accepted(self, tokens: int) -> str | None:
        """A contribution counts. Gives why the node should work no longer, if it should not."""
        account, now_ms = self._sales.account(self._escrow), self._sales.now_ms()
        if account is None or account.ends_ms <= now_ms + ENDS_EARLY_MS:
            return "the money set aside for it goes back to its client now"
        self._earnings = self._earnings.accepted(tokens)
        kept_ms = max(0, now_ms - account.taken_ms)
        earned = self._earnings.earned_micro(account.micro_per_h, kept_ms, account.most_micro)
        self._earned_lately = [*self._earned_lately[1:], earned]
        return say_unpaid(account.paid_micro - self._began_micro, self._earned_lately[0], earned)


class Sales:
    """Of one node."""

    def __init__(
        self,
        terms: Terms,
        *,
        key: KeyPair,
        name: str,
        disk: Disk,
        endpoint: Endpoint,
        ledger: Ledger,
        clock: Clock,
        unheld: Callable[[], int],
        changed: Callable[[], Awaitable[None]],
        network: str = DEFAULT_NETWORK,
    ) -> None:
        """`unheld` says how many slots are in use that nobody holds; `changed` is told when a slot is given or taken
        back. Raises SalesDamaged."""
        self.terms = terms
        self._key, self._name, self._network = key, name, network
        self._disk, self._ledger, self._clock = disk, ledger, clock
        self._unheld, self._changed = unheld, changed
        self._slots = read_kept(disk, SLOTS, Slots, name) or Slots()
        self._accounts = {one.escrow: one for one in read_kept(disk, ACCOUNTS, list[Account], name) or ()}
        self._ended = read_kept(disk, ENDED, list[Ended], name) or []
        self._deciding = asyncio.Lock()
        self._redeeming: set[asyncio.Task[None]] = set()
        for kind, handler in (
            (HoldAsk.KIND, self._asked),
            (HoldTake.KIND, self._taken),
            (HoldRelease.KIND, self._released),
            (Pay.KIND, self._paid),
        ):
            endpoint.handle(kind, handler)
        self._rounds = asyncio.create_task(self._redeem_now_and_then())

    def now_ms(self) -> int:
        return self._clock.now_ms()

    # ---- what the agent asks ----

    @property
    def held(self) -> int:
        """Slots that are promised now."""
        return len(held(self._slots, self.now_ms()))

    def keeps_for(self, client: bytes) -> bool:
        return hold_of(self._slots, client, self.now_ms()) is not None

    def work_for(self, client: bytes) -> Work:
        """For a client that has a slot and money for it. Raises NotHeld."""
        kept = hold_of(self._slots, client, self.now_ms())
        if kept is None or kept.hold.escrow is None:
            raise NotHeld(
                f"Node {self._name} costs {format_money(self.terms.price.micro_per_h)} {self.terms.price.currency} an "
                f"hour, and keeps no slot for {short_id(client)} that there is money for: hold one, set the money "
                "aside, and take it before inviting."
            )
        return Work(self, kept.hold.escrow)

    def account(self, escrow: bytes) -> Account | None:
        """None once it is over."""
        return self._accounts.get(escrow)

    @property
    def accounts(self) -> list[Account]:
        return list(self._accounts.values())

    async def close(self) -> None:
        """Redeem what is there."""
        self._rounds.cancel()
        await asyncio.gather(self._rounds, *self._redeeming, return_exceptions=True)
        await self._redeem_all()

    # ---- what clients ask ----

    async def _asked(self, request: Request) -> bytes:
        wanted = decode(HoldAsk, request.body, request.version)
        async with self._deciding:
            known = hold_of(self._slots, request.peer, self.now_ms())
            hold = ask(self._slots, wanted, request.peer, self.terms, self._unheld(), self.now_ms())
            envelope = sign(self._key, hold, self._network)
            if known is None or known.hold_id != envelope.record_id:
                await self._store_slots(keep(self._slots, hold, envelope.record_id))
        await self._changed()
        return encode(HoldGiven(hold=envelope.to_bytes()), request.version)

    async def _taken(self, request: Request) -> bytes:
        wanted = decode(HoldTake, request.body, request.version)
        escrow = await self._ledger.escrow(wanted.escrow)
        async with self._deciding:
            now_ms = self.now_ms()
            hold = take(self._slots, request.peer, escrow, self.terms, now_ms)
            assert escrow is not None
            envelope = sign(self._key, hold, self._network)
            await self._store_account(self._known_or_new(escrow, request.peer, hold.price.micro_per_h, now_ms))
            await self._store_slots(keep(self._slots, hold, envelope.record_id))
        await self._changed()
        return encode(HoldGiven(hold=envelope.to_bytes()), request.version)

    def _known_or_new(self, escrow: Escrow, client: bytes, micro_per_h: int, now_ms: int) -> Account:
        terms = escrow.terms
        most = escrow.most_of(self.terms.payee) or 0
        known = self._accounts.get(escrow.escrow_id)
        if known is not None:
            return msgspec.structs.replace(known, ends_ms=escrow.ends_ms, most_micro=most)
        if len(self._accounts) >= ACCOUNTS_MAX:
            raise NotHeld(f"Node {self._name} is paid out of {ACCOUNTS_MAX} escrows that are not over yet.")
        return Account(
            escrow=escrow.escrow_id, client=client, payer=terms.payer, signer=terms.signer, most_micro=most,
            ends_ms=escrow.ends_ms, micro_per_h=micro_per_h, taken_ms=now_ms, currency=self._ledger.name.currency,
        )  # fmt: skip

    async def _released(self, request: Request) -> bytes:
        packed = decode(HoldRelease, request.body, request.version).release
        envelope = Envelope.from_bytes(packed, Release.MAX_BYTES)
        release = open_record(envelope, Release, self._network)
        if envelope.signer != request.peer or release.node != self._key.node_id:
            raise BadRecord(f"A slot of node {self._name} is given back by who signs for it, at this node alone.")
        async with self._deciding:
            await self._store_slots(give_back(self._slots, release, request.peer, packed, self.now_ms()))
        await self._changed()
        return encode(Done(), request.version)

    async def _paid(self, request: Request) -> bytes:
        message = decode(Pay, request.body, request.version)
        signed, voucher = message.signed, message.signed.voucher
        async with self._deciding:
            account = self._accounts.get(voucher.escrow)
            if account is None or request.peer != account.client:
                raise BadVoucher(
                    f"Node {self._name} is not paid out of escrow {voucher.escrow.hex()[:12]} by its peer."
                )
            signer = signer_of(voucher.digest(self._ledger.name), signed.signature)
            if signer not in (account.payer, account.signer) or voucher.payee != self.terms.payee:
                raise BadVoucher(
                    f"A voucher for {address_text(voucher.payee)} came to node {self._name} that nobody signed who "
                    "may; it pays nothing."
                )
            if voucher.amount_micro < account.paid_micro or voucher.amount_micro > account.most_micro:
                raise BadVoucher(
                    f"A voucher for {format_money(voucher.amount_micro)} came to node {self._name}, which has one for "
                    f"{format_money(account.paid_micro)} and may get {format_money(account.most_micro)} at most."
                )
            newest = signed if voucher.amount_micro > account.paid_micro else account.newest
            account = msgspec.structs.replace(account, newest=newest, last=account.last or message.last)
            await self._store_account(account)
        if message.last:
            self._beside(self._redeem(account.escrow))
        return encode(Paid(amount_micro=account.paid_micro), request.version)

    # ---- redeeming ----

    def _beside(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._redeeming.add(task)
        task.add_done_callback(self._redeeming.discard)

    async def _redeem_now_and_then(self) -> None:
        while True:
            await self._clock.sleep(REDEEM_EVERY_S)
            try:
                await self._redeem_all()
            except StorageError as error:  # once more next time: nothing is forgotten meanwhile
                _log.warning("%s: what was redeemed could not be written down: %s", self._name, error)

    async def _redeem_all(self) -> None:
        for escrow in list(self._accounts):
            await self._redeem(escrow)

    async def _redeem(self, escrow: bytes) -> None:
        """Bring the newest voucher to the ledger; an escrow that has ended is forgotten. What fails is tried again."""
        account = self._accounts.get(escrow)
        if account is None:
            return
        try:
            if account.newest is not None and account.paid_micro > account.redeemed_micro:
                try:
                    await self._ledger.apply(Redeem(account.newest))
                except (OldVoucher, EscrowOver):
                    pass  # it was redeemed already, and the answer was lost; or it came too late
            found = await self._ledger.escrow(escrow)
        except ShoalError as error:
            _log.warning("%s: a voucher of escrow %s waits: %s", self._name, escrow.hex()[:12], error)
            return
        async with self._deciding:
            newer = self._accounts[escrow]
            if found is None or found.state is not State.OPEN:
                if newer.paid_micro > account.paid_micro or (found and self._redeemed(found) < newer.paid_micro):
                    _log.error(
                        "%s: escrow %s ended before its last voucher was redeemed", self._name, escrow.hex()[:12]
                    )
                await self._remember(newer, found)
                await self._forget_account(escrow)
                return
            paid = self._paid_by(found)
            await self._store_account(
                msgspec.structs.replace(
                    newer, redeemed_micro=paid.redeemed_micro, held_micro=paid.waiting_micro,
                    withheld_micro=paid.withheld_micro, ends_ms=found.ends_ms,
                )
            )  # fmt: skip

    def _paid_by(self, escrow: Escrow) -> PaidOut:
        return escrow.paid.get(self.terms.payee, PaidOut())

    def _redeemed(self, escrow: Escrow) -> int:
        return self._paid_by(escrow).redeemed_micro

    # ---- the disk ----

    async def _remember(self, account: Account, found: Escrow | None) -> None:
        """What an escrow that is over has paid; again, where the node was killed before it forgot it."""
        redeemed, held, withheld = account.redeemed_micro, account.held_micro, account.withheld_micro
        if found is not None:
            paid = self._paid_by(found)
            redeemed, held, withheld = paid.redeemed_micro, paid.waiting_micro, paid.withheld_micro
        if not redeemed:
            return
        ended_ms = found.ends_ms if found else account.ends_ms
        ended = Ended(
            escrow=account.escrow, client=account.client, payer=account.payer, payee=self.terms.payee,
            currency=account.currency, paid_micro=max(account.paid_micro, redeemed), redeemed_micro=redeemed,
            held_micro=held, withheld_micro=withheld,
            ended_ms=ended_ms, settles_ms=ended_ms + (found.terms.audit_ms if found else 0),
        )  # fmt: skip
        others = [one for one in self._ended if one.escrow != ended.escrow]
        self._ended = [*others, ended][-ENDED_MAX:]
        await asyncio.to_thread(self._write, ENDED, self._ended)

    async def _store_slots(self, slots: Slots) -> None:
        self._slots = slots  # also where the disk fails: what may stand on it is promised
        await asyncio.to_thread(self._write, SLOTS, slots)

    async def _store_account(self, account: Account) -> None:
        accounts = {**self._accounts, account.escrow: account}
        await asyncio.to_thread(self._write, ACCOUNTS, list(accounts.values()))
        self._accounts = accounts

    async def _forget_account(self, escrow: bytes) -> None:
        accounts = {name: one for name, one in self._accounts.items() if name != escrow}
        await asyncio.to_thread(self._write, ACCOUNTS, list(accounts.values()))
        self._accounts = accounts

    def _write(self, name: str, content: Any) -> None:
        packed, scratch = msgspec.msgpack.encode(content), f"{name}.new"
        with disk_faults(self._disk, "keeping what this node has promised", len(packed)):
            self._disk.delete(scratch)
            self._disk.write(scratch, packed)
            self._disk.sync(scratch)
            self._disk.rename(scratch, name)
            self._disk.sync(name)
