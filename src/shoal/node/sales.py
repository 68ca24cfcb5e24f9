"""A node that sells its time: for whom it keeps its slots, what it has earned, and the vouchers that it is paid with.

What `market.holds` decides is on the disk before anybody hears of it, and so is each voucher before it is acknowledged:
a node that was killed keeps its word, and loses no money. Vouchers are redeemed at the ledger now and then, when a
client says that there will be no more, and when the node stops. An owner who wants the machine back gives clients the
notice that their Holds name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord, JobError, LinkError, ShoalError, StorageError
from shoal.identity import Envelope, Hash, KeyPair, NodeId, short_id
from shoal.identity.accounts import AccountKey, Address, address_text, signer_of
from shoal.ledger.commands import Redeem
from shoal.ledger.escrows import Escrow, EscrowOver, OldVoucher, State
from shoal.ledger.escrows import Paid as PaidOut
from shoal.ledger.moves import MoneyRefused
from shoal.market.earnings import (
    UNPAID_AFTER_MS,
    UNPAID_S,
    Earnings,
    Serving,
    say_uncounted,
    say_unpaid,
    say_unpaid_service,
)
from shoal.market.holds import (
    HoldRefused,
    Slots,
    Terms,
    ask,
    check_escrow,
    give_back,
    held,
    hold_of,
    keep,
    promised,
    take,
    taken,
)
from shoal.protocol.driving import Allowance
from shoal.protocol.holds import (
    Deputy,
    Hold,
    HoldAsk,
    HoldGiven,
    HoldReclaim,
    HoldRelease,
    HoldTake,
    Paid,
    Pay,
    Reclaim,
    Release,
)
from shoal.protocol.holds import Work as Kind
from shoal.protocol.messages import DEFAULT_NETWORK, decode, encode, open_record, sign
from shoal.protocol.money import DAY_MS, Amount, BadVoucher, LedgerName, PartsPerMillion, PayingFor, SignedVoucher
from shoal.protocol.offers import Done, UnixMs
from shoal.protocol.prices import Currency
from shoal.quantities.money import format_money, owed
from shoal.storage.whole import SharedWriting, write_whole
from shoal.transport.allowances import RateLimit
from shoal.world import Clock, Disk, Endpoint, Ledger, Request
from shoal.world.clock import within

REDEEM_EVERY_S = 10.0
SOON_S = 3 * REDEEM_EVERY_S
"""Of an escrow that ends so soon a voucher is redeemed as it comes: the next round may be too late."""
REDEEMED_AT_ONCE = 16
"""One after the other, vouchers of many escrows would outlast the notice of some."""
ASKS_PER_S, ASKS_BURST = 10.0, 100
"""Questions for slots, from one address."""
TAKES_PER_S, TAKES_BURST = 0.2, 40
"""Of one client: for each the node asks the ledger, which lets it ask so often, and has its vouchers to redeem."""
PAYS_PER_S, PAYS_BURST = 10.0, 100
"""Vouchers, of one client."""
UNTAKEN_SHARE, UNTAKEN_S = 0.1, 120
"""Of the time, for how much one address may hold slots that it sets no money aside for, and how long at once. Keys cost
nothing: a client that lets its Hold lapse could ask with the next one."""
LAST_ROUND_S = 8.0
"""How long a stopping node tries to redeem what it has."""
TELL_DEADLINE_S, TELL_AGAIN_S = 5.0, 2.0
"""For a client that is told that its place ends."""
DEPUTIES_MAX = 1024
"""Drivers of which it is known for whom they act; whoever has not been heard for longest goes, and says it again."""
CLOCK_WRONG_MS = DAY_MS
"""So long after its end by this node's clock an escrow that no ledger was asked about is forgotten: a clock may be
wrong."""
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
W = TypeVar("W", "Work", "Service")


class NotHeld(JobError):
    """A node that costs something was invited by a client that it keeps no paid slot for."""

    code = "SH-607"


class SalesDamaged(StorageError):
    """What a node has promised, or was paid with, cannot be read."""

    code = "SH-448"


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """One escrow that this node is paid out of."""

    escrow: Hash
    ledger: LedgerName
    client: NodeId
    payer: Address
    signer: Address
    payee: Address
    most_micro: Amount
    """The highest voucher that could be redeemed, as the ledger said when it was last asked."""
    ends_ms: UnixMs
    micro_per_h: Annotated[int, Meta(ge=0)]
    newest: SignedVoucher | None = None
    redeemed_micro: Amount = 0
    held_micro: Amount = 0
    """Of that, held back and not withheld."""
    withheld_micro: Amount = 0
    fee_ppm: PartsPerMillion = 0
    """Of what it is paid, to the ledger."""
    refused: bool = False
    """The ledger has paid nothing for a voucher: none counts until one is redeemed."""

    @property
    def currency(self) -> Currency:
        return self.ledger.currency

    @property
    def voucher_micro(self) -> int:
        return self.newest.voucher.amount_micro if self.newest else 0

    @property
    def paid_micro(self) -> int:
        return self.redeemed_micro if self.refused else max(self.redeemed_micro, self.voucher_micro)

    @property
    def waits(self) -> bool:
        """Something is to be redeemed."""
        return self.voucher_micro > self.redeemed_micro


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
    fee_ppm: PartsPerMillion = 0
    ended_ms: UnixMs
    settles_ms: UnixMs


class Books(NamedTuple):
    """What a node is paid out of, and what that was before."""

    accounts: dict[bytes, Account]
    """By escrow."""
    ended: list[Ended]


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
            f"{error}. Restore it from a copy, or move it away, once what was promised since is over: ten minutes "
            "after the node stopped, and with the last hour that it has sold in an auction."
        ) from error


class Work:
    """What is earned by training here out of one escrow, however often its client invites the node anew: what was not
    paid is not forgotten by that."""

    def __init__(self, sales: Sales, account: Account) -> None:
        self._sales, self._escrow = sales, account.escrow
        self._began_micro = account.paid_micro
        self._earnings = Earnings()
        self._ready_s = sales.monotonic()
        self._earned_lately = [(0, self._ready_s)] * 3
        """After the last three accepted contributions, and when that was, the newest last."""
        self._uncounted = self._uncounted_tokens = 0
        """Contributions that did not count, beside two for each that did; what is under way is among them."""

    def ready(self, samples_per_s: float, tokens_per_sample: int) -> None:
        self._ready_s = self._sales.monotonic()
        self._earnings = self._earnings.measured(self._earned_micro, samples_per_s, tokens_per_sample)

    @property
    def _earned_micro(self) -> int:
        return self._earned_lately[-1][0]

    def made(self, tokens: int) -> str | None:
        """A contribution is about to go to the client. Gives why it should not, if it should not."""
        self._uncounted += 1
        self._uncounted_tokens += tokens
        return self.over()

    def accepted(self, tokens: int) -> str | None:
        """A contribution counts. Gives why the node should work no longer, if it should not."""
        self._uncounted = max(0, self._uncounted - 3)
        self._uncounted_tokens = max(0, self._uncounted_tokens - 3 * tokens)
        account, now_s = self._sales.account(self._escrow), self._sales.monotonic()
        if account is not None:
            self._earnings = self._earnings.accepted(tokens)
            ready_ms = round(1000 * (now_s - self._ready_s))
            most = max(0, account.most_micro - self._began_micro)
            earned = self._earnings.earned_micro(account.micro_per_h, ready_ms, most)
            self._earned_lately = [*self._earned_lately[1:], (max(self._earned_micro, earned), now_s)]
        return self.over()

    def over(self) -> str | None:
        """Why the node should not work for it, if it should not."""
        account, now_s = self._sales.account(self._escrow), self._sales.monotonic()
        over = self._sales.say_over(account, self._began_micro + self._earned_micro)
        if over is not None or account is None:
            return over
        before, *later = self._earned_lately
        slack = owed(account.micro_per_h, UNPAID_AFTER_MS)
        due = max(before[0], *(earned - slack for earned, at_s in later if now_s - at_s >= UNPAID_S), 0)
        paid = account.paid_micro - self._began_micro
        worth = self._earnings.for_tokens(self._uncounted_tokens, account.micro_per_h)
        return say_uncounted(self._uncounted, worth, paid, account.micro_per_h) or say_unpaid(
            paid, due, self._earned_micro
        )


class Service:
    """What is earned by serving here out of one escrow, over all the stages that its client has here."""

    def __init__(self, sales: Sales, account: Account) -> None:
        self._sales, self._escrow = sales, account.escrow
        self._began_micro = account.paid_micro
        self._serving = Serving()
        self._stages = 0
        """Those that are ready."""
        self._ready_s = 0.0
        self._earned_micro = 0

    def ready(self) -> None:
        """A stage has loaded its layers."""
        if not self._stages:
            self._ready_s = self._sales.monotonic()
        self._stages += 1

    def ended(self) -> None:
        """A stage that was ready is no more."""
        self._stages -= 1
        if not self._stages:  # time without any is not paid
            self._serving = self._serving.ready(self.earned_micro())

    def served(self, parts: int, token_us: int) -> None:
        """So many parts of tokens more went through a stage."""
        self._serving = self._serving.served(parts, token_us)

    def earned_micro(self) -> int:
        """By serving, since the node began or was started anew."""
        account = self._sales.account(self._escrow)
        if account is not None:
            ready_ms = round(1000 * (self._sales.monotonic() - self._ready_s))
            most = max(0, account.most_micro - self._began_micro)
            earned = self._serving.earned_micro(account.micro_per_h, ready_ms, most)
            self._earned_micro = max(self._earned_micro, earned)
        return self._earned_micro

    def over(self) -> str | None:
        """Why the node should not serve for it, if it should not."""
        account, earned = self._sales.account(self._escrow), self.earned_micro()
        over = self._sales.say_over(account, self._began_micro + earned)
        if over is not None or account is None:
            return over
        return say_unpaid_service(account.paid_micro - self._began_micro, earned, account.micro_per_h)


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
        self._disk, self._ledger, self._clock, self._endpoint = disk, ledger, clock, endpoint
        self._unheld, self._changed = unheld, changed
        self._promises = SharedWriting(
            read_kept(disk, SLOTS, Slots, name) or Slots(), lambda slots: self._write(SLOTS, slots)
        )
        accounts = {one.escrow: one for one in read_kept(disk, ACCOUNTS, list[Account], name) or ()}
        self._ended_stored = read_kept(disk, ENDED, list[Ended], name) or []
        self._books = SharedWriting(Books(accounts, self._ended_stored), self._write_books)
        self._asks = RateLimit(clock, ASKS_PER_S, ASKS_BURST)
        self._takes = RateLimit(clock, TAKES_PER_S, TAKES_BURST)
        self._pays = RateLimit(clock, PAYS_PER_S, PAYS_BURST)
        self._untaken = RateLimit(clock, UNTAKEN_SHARE, UNTAKEN_S)
        self._clients: OrderedDict[bytes, bytes] = OrderedDict()
        """Drivers that act for another client, as that one has signed."""
        self._works: dict[bytes, Work] = {}
        """Of these, those that work was done for since the node started; the same of what is served."""
        self._services: dict[bytes, Service] = {}
        self._brought = {one.escrow: one.redeemed_micro for one in self._accounts.values()}
        """Of each escrow, the highest voucher that this node has brought to the ledger itself."""
        self._elsewhere_s: dict[bytes, float] = {}
        """Escrows of which somebody else has, and since when that is known; infinite once it was said."""
        self.closes_ms: int | None = None
        """When the owner takes the machine back, once its clients are told."""
        self._telling = list[asyncio.Task[None]]()
        self._redeeming: dict[bytes, asyncio.Task[None]] = {}
        """Beside the rounds, at a client's word that nothing more will come."""
        for one in self._accounts.values():
            if one.ledger != ledger.name and one.waits:
                _log.warning(
                    "%s: %s of escrow %s wait at another ledger than the one at which this node is paid now; start it "
                    "with that one to have them", name, format_money(one.voucher_micro), one.escrow.hex()[:12],
                )  # fmt: skip
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

    def monotonic(self) -> float:
        return self._clock.monotonic()

    # ---- what the agent asks ----

    @property
    def held(self) -> int:
        """Slots that are promised now."""
        return len(held(self.slots, self.now_ms()))

    @property
    def slots(self) -> Slots:
        """What is promised, now and later; also what a disk that failed may have kept."""
        return self._promises.content

    async def decide(self, decision: Callable[[Slots], tuple[Slots, T]]) -> T:
        """Change what is promised; it is on the disk when this returns. Raises what `decision` does."""
        slots, answer = decision(self.slots)
        await self._store_slots(slots)
        return answer

    @property
    def taken(self) -> int:
        """Of these, slots that money is set aside for."""
        return len(taken(self.slots, self.now_ms()))

    def client_of(self, driver: bytes) -> bytes:
        """For whom a driver acts: itself, unless it has shown otherwise."""
        return self._clients.get(driver, driver)

    def keeps_for(self, client: bytes) -> bool:
        return hold_of(self.slots, client, self.now_ms()) is not None

    def work_for(self, client: bytes) -> Work:
        """For a client that has a slot to train in, and money for it. Raises NotHeld."""
        account = self._account_of(client, "train")
        return self._unless_over(self._works.setdefault(account.escrow, Work(self, account)), client)

    def service_for(self, client: bytes) -> Service:
        """For a client that has a slot to serve in, and money for it. Raises NotHeld."""
        account = self._account_of(client, "serve")
        return self._unless_over(self._services.setdefault(account.escrow, Service(self, account)), client)

    def _account_of(self, client: bytes, kind: Kind) -> Account:
        kept = hold_of(self.slots, client, self.now_ms())
        account = self._accounts.get(kept.hold.escrow) if kept and kept.hold.escrow else None
        if kept is None or account is None or kept.hold.work != kind:
            raise NotHeld(
                f"Node {self._name} costs {format_money(self.terms.price.micro_per_h)} {self.terms.price.currency} an "
                f"hour, and keeps no slot to {kind} in for {short_id(client)} that there is money for: hold one, set "
                "the money aside, and take it before inviting."
            )
        if account.escrow in (self._services if kind == "train" else self._works):
            raise NotHeld(  # each would count what is paid for the other for its own
                f"Node {self._name} is paid out of escrow {account.escrow.hex()[:12]} for "
                f"{'serving' if kind == 'train' else 'training'}: set money aside of its own for what it is to {kind}."
            )
        return account

    def _unless_over(self, work: W, client: bytes) -> W:
        over = work.over()
        if over is not None:
            raise NotHeld(f"Node {self._name} works for {short_id(client)} no longer: {over}.")
        return work

    def say_over(self, account: Account | None, earned_micro: int) -> str | None:
        """Why there is no more money for a client of which so much is earned, if there is not."""
        if account is None or account.ends_ms <= self.now_ms() + ENDS_EARLY_MS:
            return "the money set aside for it goes back to its client now"
        if not self.keeps_for(account.client):
            return "no slot is kept for its client any more"
        if earned_micro >= account.most_micro:
            return f"it has earned what was set aside for it, {format_money(account.most_micro)}"
        return None

    async def paid_for_driving(self, allowance: Allowance, newest: SignedVoucher | None = None) -> None:
        """Money is set aside for driving a job, or standing by: takes the newest voucher for that, where there is one,
        and says whether there is more to come. Raises HoldRefused where there is not, BadVoucher, and what the ledger
        does."""
        client, signer = KeyPair.from_seed(allowance.client).node_id, AccountKey(allowance.signer).address
        known = self._accounts.get(allowance.escrow)
        if known is not None and newest is not None and newest.voucher.amount_micro > known.most_micro:
            await self._ask_for_more(known)
        known = self._accounts.get(allowance.escrow)
        if known is not None and newest is not None:
            await self._keep_voucher(known, newest)
        escrow = await self._ledger.escrow(allowance.escrow)
        if escrow is None:
            raise HoldRefused("The ledger has no such escrow.")
        known = self._accounts.get(allowance.escrow)
        now_ms = self.now_ms()
        check_escrow(escrow, known.payee if known else self.terms.payee, self.terms, now_ms, now_ms)
        if escrow.terms.signer != signer:
            raise HoldRefused(f"Node {self._name} was given a key that signs nothing out of {escrow.name}.")
        if known is None:  # also where it was forgotten: others may have come in between
            await self._store(self._with(escrow, client, self.terms.payee, 0))

    def account(self, escrow: bytes) -> Account | None:
        """None once it is over."""
        return self._accounts.get(escrow)

    @property
    def accounts(self) -> list[Account]:
        return list(self._accounts.values())

    async def give_notice(self) -> float | None:
        """The owner wants the machine back: whoever has taken a slot is told until when it is kept, and no more are
        given. Gives the seconds until then; None where no slot is taken, or none with a notice."""
        kept, now_ms = taken(self.slots, self.now_ms()), self.now_ms()
        notice_ms = max((one.hold.reclaim_notice_ms for one in kept), default=0)
        if not notice_ms:
            return None
        self.closes_ms = now_ms + notice_ms
        for one in kept:
            reclaim = Reclaim(client=one.hold.client, from_ms=now_ms, until_ms=self.closes_ms)
            self._telling.append(asyncio.create_task(self._tell(reclaim)))
        await self._changed()
        return notice_ms / 1000

    async def _tell(self, reclaim: Reclaim) -> None:
        """A client, or who acts for it; one that cannot be told, or not yet, is told again."""
        word = HoldReclaim(reclaim=sign(self._key, reclaim, self._network).to_bytes())
        while True:
            acting = [driver for driver, client in reversed(self._clients.items()) if client == reclaim.client]
            for peer in (*acting, reclaim.client):
                link = self._endpoint.links().get(peer)
                try:
                    if link is not None:
                        await link.request(word.KIND, encode(word, link.version), deadline_s=TELL_DEADLINE_S)
                        return
                except LinkError as error:
                    _log.info("%s: %s was not told that its place ends: %s", self._name, short_id(peer), error)
            await self._clock.sleep(TELL_AGAIN_S)

    async def close(self) -> None:
        """Redeem what is there. What the ledger does not answer in time for is redeemed by the node's next start."""
        tasks = [self._rounds, *self._telling, *self._redeeming.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await within(self._clock, LAST_ROUND_S, self._redeem_all())

    # ---- what clients ask ----

    def _client(self, request: Request, packed: bytes | None) -> bytes:
        """Who asks, or for whom. Raises BadRecord."""
        if packed is None:
            return request.peer
        envelope = Envelope.from_bytes(packed, Deputy.MAX_BYTES)
        if open_record(envelope, Deputy, self._network).driver != request.peer:
            raise BadRecord(f"{short_id(request.peer)} came with a word of {short_id(envelope.signer)} for another.")
        self._clients[request.peer] = envelope.signer
        self._clients.move_to_end(request.peer)
        while len(self._clients) > DEPUTIES_MAX:
            self._clients.popitem(last=False)
        return envelope.signer

    async def _asked(self, request: Request) -> bytes:
        self._asks.spend(request.source.encode(), "A question for a slot")
        wanted = decode(HoldAsk, request.body, request.version)
        client = self._client(request, wanted.deputy)

        def decide(slots: Slots) -> tuple[Slots, Envelope]:
            known = hold_of(slots, client, self.now_ms())
            hold = ask(slots, wanted, client, self.terms, self._unheld(), self.now_ms(), self.closes_ms)
            envelope = sign(self._key, hold, self._network)
            if known is not None and known.hold_id == envelope.record_id:
                return slots, envelope
            self._count_untaken(request, wanted.lifetime_ms / 1000)
            return keep(slots, hold, envelope.record_id), envelope

        envelope = await self.decide(decide)
        await self._changed()
        return encode(HoldGiven(hold=envelope.to_bytes()), request.version)

    def _count_untaken(self, request: Request, lifetime_s: float) -> None:
        """Raises HoldRefused."""
        wait_s = self._untaken.take(request.source.encode(), lifetime_s)
        if wait_s:
            raise HoldRefused(
                f"Slots of node {self._name} were held from your address for longer than {UNTAKEN_S} s and not taken; "
                f"ask again in {wait_s:.0f} s, and give back at once what you do not take."
            )

    async def _taken(self, request: Request) -> bytes:
        self._asks.spend(request.source.encode(), "A question for a slot")
        wanted = decode(HoldTake, request.body, request.version)
        client = self._client(request, wanted.deputy)
        promised(self.slots, client, self.now_ms())  # before the ledger is asked
        self._takes.spend(client, "A question for a slot that is paid for")
        escrow = await self._ledger.escrow(wanted.escrow)

        def decide(slots: Slots) -> tuple[Slots, tuple[Hold, Envelope]]:
            known = promised(slots, client, self.now_ms()).hold
            hold = take(slots, client, escrow, self.terms, self.now_ms(), self.closes_ms)
            envelope = sign(self._key, hold, self._network)
            return keep(slots, hold, envelope.record_id), (known, envelope)

        hold = take(self.slots, client, escrow, self.terms, self.now_ms(), self.closes_ms)
        assert escrow is not None
        pays = signer_of(PayingFor(escrow.escrow_id, client).digest(self._ledger.name), wanted.signature)
        if pays not in (escrow.terms.payer, escrow.terms.signer):
            raise HoldRefused(f"{escrow.name} does not pay for {short_id(client)}: nobody signed that who may.")
        # What it is paid out of first: without that, a slot would be bound for nothing.
        await self._store(self._with(escrow, client, hold.payee, hold.price.micro_per_h))
        known, envelope = await self.decide(decide)
        if known.escrow is None:
            self._untaken.give_back(request.source.encode(), (known.until_ms - known.from_ms) / 1000)
        await self._changed()
        return encode(HoldGiven(hold=envelope.to_bytes()), request.version)

    def _with(self, escrow: Escrow, client: bytes, payee: bytes, micro_per_h: int) -> Books:
        """The books, once `client` has work done for this escrow. Raises HoldRefused."""
        terms, known = escrow.terms, self._accounts.get(escrow.escrow_id)
        if known is not None and (known.client, known.payee) != (client, payee):
            raise HoldRefused(
                f"{escrow.name} pays for what node {self._name} does for {short_id(known.client)}, at "
                f"{address_text(known.payee)}: each client sets money aside of its own, and another one where a node "
                "is paid at another account."
            )
        account = known or Account(
            escrow=escrow.escrow_id, ledger=self._ledger.name, client=client, payer=terms.payer,
            signer=terms.signer, payee=payee, most_micro=0, ends_ms=0, micro_per_h=0, fee_ppm=terms.fee_ppm,
        )  # fmt: skip
        account = msgspec.structs.replace(account, micro_per_h=micro_per_h)
        accounts, ended = {**self._accounts, escrow.escrow_id: _as_at(escrow, account)}, self._books.content.ended
        while len(accounts) > ACCOUNTS_MAX:
            idle = next(
                (name for name, one in self._accounts.items() if name in accounts and not self._needed(one)), None
            )
            if idle is None:
                raise HoldRefused(
                    f"Node {self._name} has vouchers of {ACCOUNTS_MAX} escrows to redeem; ask again later."
                )
            ended = _and(ended, accounts.pop(idle), 0)
        return Books(accounts, ended)

    def _needed(self, account: Account) -> bool:
        """Money would be lost without it."""
        kept = hold_of(self.slots, account.client, self.now_ms())
        return account.waits or (kept is not None and kept.hold.escrow == account.escrow)

    async def _released(self, request: Request) -> bytes:
        self._asks.spend(request.source.encode(), "A question for a slot")
        message = decode(HoldRelease, request.body, request.version)
        client, packed = self._client(request, message.deputy), message.release
        envelope = Envelope.from_bytes(packed, Release.MAX_BYTES)
        release = open_record(envelope, Release, self._network)
        if envelope.signer != client or release.node != self._key.node_id:
            raise BadRecord(f"A slot of node {self._name} is given back by who signs for it, at this node alone.")
        known = hold_of(self.slots, client, self.now_ms())
        slots = give_back(self.slots, release, client, packed, self.now_ms())
        if known is None or known.hold.escrow is not None:
            await self._store_slots(slots)
        else:  # the next Hold brings it to the disk; a node killed before keeps the slot for some seconds for nobody
            self._promises.content = slots
            if not self.keeps_for(client):
                self._untaken.give_back(request.source.encode(), (known.hold.until_ms - self.now_ms()) / 1000)
        await self._changed()
        return encode(Done(), request.version)

    async def _paid(self, request: Request) -> bytes:
        message = decode(Pay, request.body, request.version)
        client = self._client(request, message.deputy)
        voucher = message.signed.voucher
        known = self._accounts.get(voucher.escrow)
        if known is not None and known.client == client and voucher.amount_micro > known.most_micro:
            self._takes.spend(client, "A voucher for more than was set aside")
            await self._ask_for_more(known)
        account = self._accounts.get(voucher.escrow)
        if account is None or client != account.client:
            raise BadVoucher(f"Node {self._name} is not paid out of escrow {voucher.escrow.hex()[:12]} by its peer.")
        self._pays.spend(client, "A voucher")
        account = await self._keep_voucher(account, message.signed)
        soon = message.last or account.ends_ms - self.now_ms() < 1000 * SOON_S
        if soon and account.waits and account.escrow not in self._redeeming:
            self._redeeming[account.escrow] = asyncio.create_task(self._redeem_beside(account.escrow))
        newer = account.newest if account.voucher_micro > voucher.amount_micro else None
        return encode(Paid(amount_micro=account.paid_micro, newest=newer), request.version)

    async def _ask_for_more(self, account: Account) -> None:
        """A voucher is for more than there was: the ledger alone says whether its payer has put more into the escrow.
        Raises what it does."""
        await self._look_at(account, await self._ledger.escrow(account.escrow), None)

    async def _keep_voucher(self, account: Account, signed: SignedVoucher) -> Account:
        """On the disk when this returns, also where it was known before. Raises BadVoucher."""
        voucher = signed.voucher
        signer = signer_of(voucher.digest(self._ledger.name), signed.signature)
        if signer not in (account.payer, account.signer) or voucher.payee != account.payee:
            raise BadVoucher(
                f"A voucher for {address_text(voucher.payee)} came to node {self._name} that nobody signed who may; it "
                "pays nothing."
            )
        if voucher.amount_micro > account.most_micro:
            raise BadVoucher(
                f"A voucher for {format_money(voucher.amount_micro)} came to node {self._name}, which may get "
                f"{format_money(account.most_micro)} at most."
            )
        if voucher.amount_micro > account.paid_micro:
            account = msgspec.structs.replace(account, newest=signed)
            await self._store_account(account)
        else:
            await self._store(self._books.content)
        return account

    # ---- redeeming ----

    async def _redeem_beside(self, escrow: bytes) -> None:
        try:
            await self._redeem(escrow)
        finally:
            del self._redeeming[escrow]

    async def _redeem_now_and_then(self) -> None:
        while True:
            await self._clock.sleep(REDEEM_EVERY_S)
            await self._redeem_all()

    async def _redeem_all(self) -> None:
        """Those that money is to come from first; whether others are over, as far as there is time."""
        until_s = self.monotonic() + REDEEM_EVERY_S
        waiting = iter(sorted(self.accounts, key=self._needed, reverse=True))

        async def some() -> None:
            for account in waiting:
                if self._needed(account) or self.monotonic() < until_s:
                    await self._redeem(account.escrow)

        await asyncio.gather(*(some() for _ in range(REDEEMED_AT_ONCE)))
        try:
            await self._books.store(self._books.content)  # where it failed before
        except ShoalError as error:
            _log.warning("%s: what it was paid is not on the disk yet: %s", self._name, error)

    async def _redeem(self, escrow: bytes) -> None:
        """Bring the newest voucher to the ledger; an escrow that has ended is forgotten. What fails is tried again."""
        account = self._accounts.get(escrow)
        if account is None:
            return
        try:
            if account.ledger != self._ledger.name:
                await self._look_at(account, None, None)
                return
            refused = await self._bring(account) if account.waits else None
            await self._look_at(account, await self._ledger.escrow(escrow), refused)
        except ShoalError as error:
            _log.warning("%s: a voucher of escrow %s waits: %s", self._name, escrow.hex()[:12], error)

    async def _bring(self, account: Account) -> str | None:
        """Why the ledger pays nothing for the newest voucher, if it does not. Raises ShoalError where it cannot be
        asked."""
        assert account.newest is not None
        try:
            await self._ledger.apply(Redeem(account.newest))
        except (OldVoucher, EscrowOver):
            return None  # it was redeemed already, and the answer was lost, or by somebody else; or it came too late
        except MoneyRefused as error:
            return error.sentence
        except LinkError:
            self._brought[account.escrow] = account.voucher_micro  # it may be done, though no answer came
            raise
        self._brought[account.escrow] = account.voucher_micro
        return None

    def _watch_others(self, account: Account, found: Escrow) -> None:
        """Of several nodes with one account none sees whether a voucher is for its own work: that there are such is
        said once. Whoever asks for the rest of an escrow redeems the last vouchers, too."""
        if account.redeemed_micro <= self._brought.get(account.escrow, 0) or found.ends_ms < found.terms.expires_ms:
            return
        now_s = self.monotonic()
        if now_s - self._elsewhere_s.setdefault(account.escrow, now_s) < REDEEM_EVERY_S:
            return
        self._elsewhere_s[account.escrow] = math.inf
        _log.warning(
            "%s: another node is paid at %s out of escrow %s, too: a client can show both one voucher, and neither "
            "sees that the other's work is not paid. Give each node an account of its own (--account).",
            self._name, address_text(account.payee), account.escrow.hex()[:12],
        )  # fmt: skip

    async def _look_at(self, asked: Account, found: Escrow | None, refused: str | None) -> None:
        """How an escrow stands now. One that was not found was there when it was taken, here or at the ledger at which
        this node was paid before: its vouchers are kept until it would have ended."""
        account = self._accounts.get(asked.escrow)
        if account is None:
            return
        now = _as_at(found, account) if found is not None else account
        if found is not None and found.state is State.OPEN:
            if refused is not None:
                _log.error("%s: a voucher is worth nothing: %s", self._name, refused)
            self._watch_others(now, found)
            now = msgspec.structs.replace(now, refused=refused is not None or (now.refused and now.waits))
            if now != account:
                await self._store_account(now)
        elif found is not None or now.ends_ms + CLOCK_WRONG_MS <= self.now_ms():
            if now.waits:
                escrow = now.escrow.hex()[:12]
                _log.error("%s: escrow %s ended before its last voucher was redeemed", self._name, escrow)
            others = {name: one for name, one in self._accounts.items() if name != now.escrow}
            ended = _and(self._books.content.ended, now, found.terms.audit_ms if found else 0)
            await self._store(Books(others, ended))

    # ---- the disk ----

    async def _store_slots(self, slots: Slots) -> None:
        await self._promises.store(slots)

    @property
    def _accounts(self) -> dict[bytes, Account]:
        """Also what is about to be on the disk, or may be, as a writing failed."""
        return self._books.content.accounts

    async def _store_account(self, account: Account) -> None:
        await self._store(Books({**self._accounts, account.escrow: account}, self._books.content.ended))

    async def _store(self, books: Books) -> None:
        accounts = books.accounts
        self._works = {name: work for name, work in self._works.items() if name in accounts}
        self._services = {name: service for name, service in self._services.items() if name in accounts}
        self._brought = {name: micro for name, micro in self._brought.items() if name in accounts}
        self._elsewhere_s = {name: since for name, since in self._elsewhere_s.items() if name in accounts}
        await self._books.store(books)

    def _write_books(self, books: Books) -> None:
        """What an escrow has paid is remembered before it is forgotten what it owes."""
        if books.ended is not self._ended_stored:
            self._write(ENDED, books.ended)
            self._ended_stored = books.ended
        self._write(ACCOUNTS, list(books.accounts.values()))

    def _write(self, name: str, content: Any) -> None:
        write_whole(self._disk, name, msgspec.msgpack.encode(content), "keeping what this node has promised")


def _as_at(escrow: Escrow, account: Account) -> Account:
    """With what the ledger says of its escrow."""
    paid = escrow.paid.get(account.payee, PaidOut())
    return msgspec.structs.replace(
        account, most_micro=escrow.most_for(account.payee), ends_ms=escrow.ends_ms,
        redeemed_micro=paid.redeemed_micro, held_micro=paid.waiting_micro, withheld_micro=paid.withheld_micro,
    )  # fmt: skip


def _and(ended: list[Ended], account: Account, audit_ms: int) -> list[Ended]:
    """With an escrow that is over, where it has paid something; once, also where the node was killed before it forgot
    it."""
    if not account.redeemed_micro:
        return ended
    over = Ended(
        escrow=account.escrow, client=account.client, payer=account.payer, payee=account.payee,
        currency=account.currency, paid_micro=max(account.voucher_micro, account.redeemed_micro),
        redeemed_micro=account.redeemed_micro, held_micro=account.held_micro,
        withheld_micro=account.withheld_micro, fee_ppm=account.fee_ppm, ended_ms=account.ends_ms,
        settles_ms=account.ends_ms + audit_ms,
    )  # fmt: skip
    return [*(one for one in ended if one.escrow != over.escrow), over][-ENDED_MAX:]
