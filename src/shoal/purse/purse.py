"""What one client sets aside for nodes, and pays them out of it.

Either enough nodes are held or none is. Then one escrow is opened for all of them; nodes that come later are admitted
to it. Each voucher is on the disk before it goes out, so that a client that was killed never signs for less than it
did. Each run of a client has an escrow of its own, a term: what an earlier one has left goes back first.

Two hands pay: the payer's account opens an escrow, and whoever the escrow names as its signer does the rest: vouchers,
admissions, and asking for what is left. Where that is another one, it goes on with the escrow that the payer opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from shoal.errors import LinkError, ShoalError
from shoal.identity import KeyPair, short_id
from shoal.identity.accounts import AccountKey, address_text, signer_of
from shoal.ledger.book import SameEscrow
from shoal.ledger.commands import Admit, Open, Withhold
from shoal.ledger.escrows import State
from shoal.ledger.fees import fee_at
from shoal.ledger.moves import DoneAlready, TooLittleMoney
from shoal.market.earnings import lasts_s
from shoal.protocol.holds import LEASE_STEP_MS, BadHold, HoldReclaim, Work, quote_id
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import (
    Admission,
    EscrowTerms,
    Payee,
    SignedVoucher,
    Voucher,
    Withholding,
    sign_voucher,
)
from shoal.protocol.offers import Offer
from shoal.purse.bills import Owed, OwedTo, PaidNode, Payments, TermPayments
from shoal.purse.escrow import ASKED_AGAIN_S, ENDS_MOST_MS, NoMoney, close_escrow, redeem
from shoal.quantities import format_duration_s
from shoal.quantities.money import AMOUNT_MAX, format_money, format_share, share
from shoal.world import Clock, Dice, Ledger, Link
from shoal.world.clock import within
from shoal.world.quotes import Held, NotSecured, Quotes

PAY_DEADLINE_S = 5.0
LAST_PAY_DEADLINE_S = 15.0
OVER_LOOKS = 15
"""At an escrow of hosts that ends, until it has: the ledger sees to it within ten seconds."""
RENEW_EVERY_S = LEASE_STEP_MS / 1000 / 3
LOOK_EVERY_S, LOOK_DEADLINE_S = 10.0, 5.0
"""So often the ledger is asked whether there is more in the escrow; whoever would stop for want of money asks it first,
and waits so long for the answer."""
NOTICE_MS, AUDIT_MS = 60_000, 3_600_000
HOLDBACK_PPM = 100_000
ENDS_LEAST_MS = 3_600_000
"""After so long an escrow ends, whatever becomes of its payer: between this and ENDS_MOST_MS, after ENDS_AFTER times
the time that it lasts while all nodes work."""
ENDS_AFTER = 4
ENDS_SOON_MS = 120_000
"""Before an escrow ends, the work for it does: nodes need some time for their last vouchers."""
WARNED_AT = 0.8
"""Of the budget: it is said then for how long the rest does."""
REASON_MAX = 160

T = TypeVar("T")
_log = logging.getLogger("shoal.purse")


@dataclass(frozen=True)
class Funds:
    """What may be spent, and by whose hand."""

    ledger: Ledger
    payer: bytes
    """Whose money it is."""
    signer: AccountKey
    """Of vouchers and admissions: the payer's, or one that the escrow names."""
    budget_micro: int
    account: AccountKey | None = None
    """The payer's; without it no escrow is opened: one goes on with the newest that is open."""
    notice_ms: int = NOTICE_MS
    audit_ms: int = AUDIT_MS
    holdback_ppm: int = HOLDBACK_PPM
    ends_least_ms: int = ENDS_LEAST_MS

    @staticmethod
    def own(ledger: Ledger, account: AccountKey, budget_micro: int, **terms: int) -> Funds:
        """One's own money, by one's own hand."""
        return Funds(ledger, account.address, account, budget_micro, account, **terms)


class Purse:
    """Pays for one term."""

    def __init__(
        self,
        funds: Funds,
        known: Payments | None,
        write: Callable[[bytes], None],
        *,
        key: KeyPair,
        link: Callable[[bytes, Offer], Awaitable[Link]],
        clock: Clock,
        dice: Dice,
        say: Callable[[str], None],
        again: str,
        work: Work = "train",
        network: str = DEFAULT_NETWORK,
        deputy: bytes | None = None,
    ) -> None:
        """`known`: what was written at last; `write` keeps what it is given until it is told something newer, durable
        when it returns, and is called in a thread. Nodes keep their places for whoever has `key`; `deputy` is the word
        that this one acts for it, where it is another's. `link` gives an open link to a node. `again` says what asks
        once more for money that could not be asked back."""
        self.funds = funds
        self._clock, self._dice, self._say, self._again = clock, dice, say, again
        self._keep = write
        self._quotes = Quotes(
            key, funds.payer, funds.signer, funds.ledger.name, link, clock, work=work, network=network, deputy=deputy
        )
        self._former = known.terms if known else ()
        self._budget_micro = funds.budget_micro
        self._as_before = known is not None and known.budget_micro == funds.budget_micro
        self._warned_micro = 0
        """The budget of which it was said that it comes to its end."""
        self._term: TermPayments | None = None
        if funds.account is None and self._former and not self._former[-1].closed:
            *former, self._term = self._former
            self._former = tuple(former)
        self._held: dict[bytes, Held] = {}
        self.holding_s = self.opening_s = self.taking_s = 0.0
        """How long it took that nodes kept places, that money was set aside, and that it was taken."""
        self._opening = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending: set[bytes] = set()
        self._unsent: set[bytes] = set()
        """Nodes whose newest voucher did not arrive."""
        self._working: set[bytes] = set()
        self._ready_s: dict[bytes, float] = {}
        self._left_s: dict[bytes, float] = {}
        """By the clock that only grows: the wall clock may be put right meanwhile."""
        self.absent: set[bytes] = set()
        """Nodes that kept a place and did not take what was set aside for them."""

    # ---- what it stands at ----

    @property
    def payments(self) -> Payments:
        return Payments(budget_micro=self._budget_micro, terms=(*self._former, *([self._term] if self._term else ())))

    @property
    def budget_micro(self) -> int:
        """With what was added to it since."""
        return self._budget_micro

    @property
    def left_micro(self) -> int:
        """What can still be signed for. What is withheld goes back to the account, not into the escrow."""
        if self._term is not None:
            return self._term.amount_micro - sum(one.paid_micro for one in self._term.nodes.values())
        return max(0, self._budget_micro - self.payments.spent_micro)

    @property
    def micro_per_h(self) -> int:
        """Of all nodes that work now."""
        nodes = self._term.nodes if self._term else {}
        return sum(one.micro_per_h for node, one in nodes.items() if bytes.fromhex(node) in self._working)

    @property
    def ends_soon(self) -> bool:
        """There is an escrow, and hardly time left for last vouchers."""
        return self._term is not None and self._term.ends_ms - self._clock.now_ms() < ENDS_SOON_MS

    def runs_low(self, least_micro: int = 0) -> bool:
        """No more than a fifth of the budget is left, or no more than `least_micro`, and it was not said yet."""
        low = max((1 - WARNED_AT) * self._budget_micro, least_micro)
        return self._warned_micro != self._budget_micro and self.left_micro <= low

    def warn(self, enough: str, then: str) -> None:
        """Say so, once for each budget: for how long it is `enough`, with {} for the time, and what comes `then`."""
        self._warned_micro, lasts = self._budget_micro, lasts_s(self.left_micro, self.micro_per_h)
        said = "" if math.isinf(lasts) else f", enough for {enough.format(format_duration_s(lasts))}"
        self._say(
            f"{format_money(self.left_micro)} {self.funds.ledger.name.currency} of the budget is left{said}; then "
            f"{then}, unless `shoal jobs fund` adds to it before."
        )

    def paid(self, node: bytes) -> PaidNode | None:
        """What a node has got in this term; None for one that is not paid."""
        return self._term.nodes.get(node.hex()) if self._term else None

    def works(self, node: bytes) -> bool:
        """It has begun, and has not left."""
        return node in self._working

    def ready_ms(self, node: bytes) -> int:
        """Since it began to work last, until it left."""
        until_s = self._left_s.get(node, self._clock.monotonic())
        return round(1000 * (until_s - self._ready_s.get(node, until_s)))

    # ---- places and money ----

    async def check(self) -> None:
        """That the account has what may be spent, before anything is begun. Raises NoMoney, and what the ledger
        does."""
        if self._term is not None:
            return  # it is set aside
        has = await self.funds.ledger.balance(self.funds.payer)
        if has < self.left_micro:
            raise self._no_money(self.left_micro, has)

    def _no_money(self, amount: int, has: int) -> NoMoney:
        return NoMoney(
            f"This sets {format_money(amount)} {self.funds.ledger.name.currency} aside, and your account "
            f"{address_text(self.funds.payer)} has {format_money(has)}: deposit more (`shoal account deposit`), or "
            "give it a smaller --budget."
        )

    async def hold_all(
        self, wanted: Sequence[tuple[bytes, Offer]], at_least: int, spares: Sequence[tuple[bytes, Offer]] = ()
    ) -> list[Held]:
        """Have all of them keep a place, and of `spares` as many as it takes to come to `at_least`; gives those that
        do. Raises NotSecured where they are fewer; none is kept then."""
        began_s = self._clock.monotonic()
        held, troubles = await self._quotes.hold_all(wanted, at_least, spares)
        self.holding_s = self._clock.monotonic() - began_s
        for trouble in troubles:
            self._say(f"Without {trouble}")
        self._held |= {one.node: one for one in held}
        return held

    async def open(self, at_least: int) -> set[bytes]:
        """Set the money aside, and have what is held taken; gives the nodes that did. Raises NotSecured, NoMoney, and
        what the ledger does: nothing is held then, and nothing set aside."""
        held, began_s = list(self._held.values()), self._clock.monotonic()
        try:
            if held:
                await self._set_aside(held)
                self._beside(self._renew())
            opened_s = self._clock.monotonic()
            for one, trouble in zip(held, await asyncio.gather(*map(self._taken, held)), strict=True):
                if trouble is not None:
                    self._say(f"Without {one.name}: {trouble}")
            if held:
                await self._write()
            if len(self._held) < min(at_least, len(held)):
                raise NotSecured(f"Only {len(self._held)} of {len(held)} nodes took what was set aside for them.")
            self.opening_s, self.taking_s = opened_s - began_s, self._clock.monotonic() - opened_s
        except BaseException:
            await (self.close() if self.funds.account is not None else self.let_go())  # the next may have more luck
            raise
        return set(self._held)

    async def _taken(self, held: Held) -> str | None:
        """Why not, if not."""
        try:
            await self._take(held)
        except ShoalError as error:
            self._held.pop(held.node, None)
            self.absent.add(held.node)
            await self._quotes.release(held)
            return error.sentence
        await self._send(held.node)  # whoever had this purse before may have signed for more
        return None

    async def join(self, node: bytes, offer: Offer) -> None:
        """A node that comes later is held, admitted and taken. Raises NotSecured, NoMoney, and what nodes and the
        ledger do."""
        if not self.left_micro:
            raise NotSecured(f"Nothing of the budget is left for {offer.name}.")
        await self._secure([await self._quotes.hold(node, offer)])

    async def join_all(self, wanted: Sequence[tuple[bytes, Offer]]) -> None:
        """The same of several: all of them, or none."""
        if not self.left_micro:
            raise NotSecured("Nothing of the budget is left.")
        held, _ = await self._quotes.hold_all(wanted, len(wanted))
        await self._secure(held)

    async def _secure(self, held: Sequence[Held]) -> None:
        try:
            async with self._opening:
                opens = self._term is None
                await self._set_aside(held)
                if opens:
                    self._beside(self._renew())
            for taken in await asyncio.gather(*map(self._take, held), return_exceptions=True):
                if taken is not None:
                    raise taken
            await self._write()
        except BaseException:
            await self._quotes.release_all([self._held.pop(one.node, one) for one in held])
            raise

    async def _set_aside(self, held: Sequence[Held]) -> None:
        if self._term is not None:
            for one in held:
                await self._admit(one)
            return
        nodes = {one.node.hex(): self._paid_node(one) for one in held}
        await self.open_for(nodes, quote_id(tuple(one.envelope for one in held)))

    async def open_for(self, nodes: dict[str, PaidNode], quote: bytes) -> None:
        """Set the money aside, first for these. Raises NoMoney, and what the ledger does; nothing is set aside then."""
        funds, now_ms = self.funds, self._clock.now_ms()
        amount = self.left_micro
        tables = await self._answer_of(funds.ledger.fees)
        lasts_ms = 1000 * ENDS_AFTER * lasts_s(amount, sum(one.micro_per_h for one in nodes.values()))
        terms = EscrowTerms(
            payer=funds.payer,
            signer=funds.signer.address,
            cap_micro=0 if funds.signer.address == funds.payer else amount,
            auditor=funds.signer.address,
            amount_micro=amount,
            fee_ppm=fee_at(tables, now_ms) or 0,
            holdback_ppm=funds.holdback_ppm,
            notice_ms=funds.notice_ms,
            audit_ms=funds.audit_ms,
            expires_ms=now_ms + round(min(ENDS_MOST_MS, max(funds.ends_least_ms, lasts_ms))),
            payees=tuple(Payee(payee, AMOUNT_MAX) for payee in sorted({one.payee for one in nodes.values()})),
            quote=quote,
            nonce=self._dice.bytes(32),
        )
        ledger = funds.ledger.name
        assert funds.account is not None, "it is the payer's own purse"
        signature = funds.account.sign(terms.escrow_id(ledger))
        self._term = TermPayments(terms=terms, ledger=ledger, signature=signature, nodes=nodes)
        await self._write()
        try:
            await self._have_done(Open(terms, signature))
        except TooLittleMoney as error:
            await self._take_back()
            has = await funds.ledger.balance(funds.payer)
            raise self._no_money(amount, has) from error
        except BaseException:
            await self._take_back()
            raise

        if terms.fee_ppm:
            self._say(f"Of what nodes are paid, the ledger takes {format_share(terms.fee_ppm)}.")

    async def _have_done(self, command: Open | Admit) -> None:
        """Raises what the ledger does."""
        with contextlib.suppress(SameEscrow, DoneAlready):  # what is signed is done once
            await self._answer_of(lambda: self.funds.ledger.apply(command))

    async def _answer_of(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Where an answer is lost, the ledger is asked again. Raises what it does."""
        for wait_s in ASKED_AGAIN_S:
            try:
                return await ask()
            except LinkError:
                await self._clock.sleep(wait_s)
        return await ask()

    async def _take_back(self) -> None:
        """Of an escrow of which it is not known that it was opened: another one is opened for whoever comes next."""
        term, self._term = self._open_term(), None
        with contextlib.suppress(ShoalError):  # it is asked again
            term, _ = await close_escrow(term, self.funds.ledger, self._hand)
        self._former = (*self._former, term)
        await self._write()

    def _paid_node(self, held: Held) -> PaidNode:
        return PaidNode(
            name=held.name, payee=held.hold.payee, micro_per_h=held.hold.price.micro_per_h,
            hold=held.envelope.to_bytes(),
        )  # fmt: skip

    async def _admit(self, held: Held) -> None:
        term, payee = self._open_term(), held.hold.payee
        known = self.paid(held.node)
        if known is not None and known.payee != payee:
            raise NotSecured(
                f"{held.name} is paid at {address_text(payee)} now, and was paid at {address_text(known.payee)} for "
                "this job: it may come back with that account, or for a job that begins or is resumed later."
            )
        if known is not None:
            self._put(held.node, msgspec.structs.replace(known, micro_per_h=held.hold.price.micro_per_h))
            return
        named = {one.payee for one in term.nodes.values()}
        if payee not in named:
            admission = Admission(term.escrow, payee, AMOUNT_MAX)  # all that is in it, also what is added later
            signature = self.funds.signer.sign(admission.digest(term.ledger))
            await self._have_done(Admit(admission, signature))
        self._put(held.node, self._paid_node(held))
        await self._write()

    async def _take(self, held: Held) -> None:
        taken = await self._quotes.take(held, self._open_term().escrow)
        self._held[held.node] = taken
        known = self.paid(held.node)
        if known is not None:
            self._put(held.node, msgspec.structs.replace(known, hold=taken.envelope.to_bytes()))

    async def _renew(self) -> None:
        """Places are kept for some minutes; while their client lives it asks for more. Its payer may put more money
        into the escrow at any time."""
        due_s = self._clock.monotonic() + RENEW_EVERY_S
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            self._send_beside(self._unsent & self._held.keys())  # a node works for a minute without
            with contextlib.suppress(ShoalError):  # it is asked again
                await self.look()
            if self._clock.monotonic() >= due_s:
                due_s = self._clock.monotonic() + RENEW_EVERY_S
                await self._take_again()
                with contextlib.suppress(ShoalError):  # of a disk that is full the next voucher tells
                    await self._write()

    async def _take_again(self) -> None:
        """Each node asks the ledger for itself how the escrow stands."""

        async def again(held: Held) -> None:
            try:
                await self._take(held)
            except ShoalError as error:
                _log.warning("%s keeps its place no longer: %s", held.name, error)

        await asyncio.gather(*map(again, list(self._held.values())))

    # ---- money that is added ----

    async def look(self) -> None:
        """Whether the payer has put more into the escrow, or asked for the rest of it: only the ledger knows. Nodes
        that keep a place ask it, too, then. Raises ShoalError."""
        if self._term is None or self._term.closed:
            return
        found = await self.funds.ledger.escrow(self._term.escrow)
        term = self._term
        if found is None or term is None or term.escrow != found.escrow_id:
            return
        now = term.as_at(found)
        more = now.added_micro - term.added_micro
        if now == term:
            return
        self._term, self._budget_micro = now, self._budget_micro + more
        await self._write()
        if more:
            self._say(
                f"{format_money(more)} {self.funds.ledger.name.currency} was added to the budget, which is "
                f"{format_money(self._budget_micro)} now: {format_money(self.left_micro)} is left."
            )
            await self._take_again()

    async def look_soon(self) -> None:
        """The same, by whoever waits for it: where the ledger says nothing, all is as it was."""
        with contextlib.suppress(ShoalError, TimeoutError):
            await within(self._clock, LOOK_DEADLINE_S, self.look())

    # ---- work ----

    def begin(self, node: bytes) -> None:
        """It works from now on, maybe anew: for no earlier time it is paid."""
        known = self.paid(node)
        if known is not None:
            self._working.add(node)
            self._ready_s[node] = self._clock.monotonic()
            self._left_s.pop(node, None)
            self._put(node, msgspec.structs.replace(known, reason="worked"))

    async def pay(self, earned: Mapping[bytes, tuple[int, bytes]]) -> None:
        """Node -> what it has earned in this term, and the id of the newest record that shows it. A voucher says no
        less than the one before it, and no more than is left."""
        self._settle(self._owed(bytes(32), earned))
        await self._write()
        self._send_beside(earned)

    async def owe(self, record: bytes, earned: Mapping[bytes, tuple[int, bytes]]) -> None:
        """The same, once `record` is written, which comes next: `pay_owed` says that it is."""
        self._term = msgspec.structs.replace(self._open_term(), owed=self._owed(record, earned))
        await self._write()

    def pay_owed(self) -> None:
        """What is written down with the record's id needs not be written again."""
        owed = self._term.owed if self._term else None
        if owed is not None:
            self._settle(owed)
            self._send_beside(map(bytes.fromhex, owed.nodes))

    def _owed(self, record: bytes, earned: Mapping[bytes, tuple[int, bytes]]) -> Owed:
        """A voucher is for all that the node's account has earned: several nodes may be paid at one."""
        term, owed = self._open_term(), dict[str, OwedTo]()
        paid, left = {node: one.paid_micro for node, one in term.nodes.items()}, self.left_micro
        for node, (micro, work) in earned.items():
            name, before = node.hex(), paid[node.hex()]
            paid[name] = max(before, min(micro, before + left))
            left -= paid[name] - before
            payee = term.nodes[name].payee
            amount = sum(paid[other] for other, one in term.nodes.items() if one.payee == payee)
            voucher = Voucher(escrow=term.escrow, payee=payee, amount_micro=amount, work=work)
            owed[name] = OwedTo(paid[name], sign_voucher(self.funds.signer, term.ledger, voucher))
        return Owed(record, owed)

    def _settle(self, owed: Owed) -> None:
        self._term = msgspec.structs.replace(self._open_term(), owed=owed).settled({owed.record})

    def _send_beside(self, nodes: Iterable[bytes]) -> None:
        for node in nodes:
            if node not in self._sending and self._open_term().nodes[node.hex()].hold:
                self._beside(self._send(node))

    async def _send(self, node: bytes, *, last: bool = False, deadline_s: float = PAY_DEADLINE_S) -> None:
        """The newest voucher; where a newer one comes meanwhile, that one too. What does not arrive is sent again."""
        self._sending.add(node)
        self._unsent.discard(node)
        try:
            sent: SignedVoucher | None = None
            while (known := self.paid(node)) is not None and known.voucher not in (None, sent):
                assert known.voucher is not None
                sent = known.voucher
                newer = await self._quotes.pay(node, sent, last=last, deadline_s=deadline_s)
                if newer is not None:
                    self._learn(node, newer)
        except ShoalError as error:
            self._unsent.add(node)
            _log.info("%s did not take its voucher: %s", node.hex()[:8], error)
        finally:
            self._sending.discard(node)

    def _learn(self, node: bytes, newer: SignedVoucher) -> None:
        """A node has a voucher that says more than what was written here: whoever had this purse before was killed, or
        cut off, before that was."""
        term, known, voucher = self._open_term(), self.paid(node), newer.voucher
        assert known is not None and known.voucher is not None
        signer = signer_of(voucher.digest(term.ledger), newer.signature)
        mine = voucher.escrow == term.escrow and voucher.payee == known.payee and signer == self.funds.signer.address
        told = sum(one.paid_micro for one in term.nodes.values() if one.payee == known.payee)
        more = voucher.amount_micro - told  # a node may show what another one with its account was paid with
        if mine and more > 0:
            self._put(node, msgspec.structs.replace(known, paid_micro=known.paid_micro + more, voucher=newer))

    def left(self, node: bytes, reason: str) -> None:
        """A node is gone: it earns no more, and what it has earned stays."""
        if node in self._working:
            self._working.remove(node)
            self._left_s[node] = self._clock.monotonic()
        known = self.paid(node)
        if known is not None:
            self._put(node, msgspec.structs.replace(known, reason=_in_short(reason)))
        held = self._held.pop(node, None)
        if held is not None:
            self._beside(self._part_from(held))

    async def _part_from(self, held: Held) -> None:
        """The voucher first: a node whose owner wants it back waits for no more once its place is given back."""
        await self._send(held.node, last=True)
        await self._quotes.release(held)

    def reclaimed(self, node: bytes, word: HoldReclaim) -> float:
        """The owner of a node takes it back: in how many seconds. Raises BadRecord."""
        held = self._held.get(node)
        if held is None:
            raise BadHold(f"Node {short_id(node)} says of a place that it ends, and keeps none here.")
        return self._quotes.reclaimed(held, word)

    async def withhold(self, node: bytes, reason: str, evidence: bytes) -> None:
        """What is held back of a node whose work was replayed and was not what was assigned."""
        known = self.paid(node)
        if known is None or known.withheld_micro:
            return
        term = self._open_term()
        amount = share(known.paid_micro, term.terms.holdback_ppm)
        if not amount:
            return
        before = sum(one.withheld_micro for one in term.nodes.values() if one.payee == known.payee)
        order = Withholding(escrow=term.escrow, payee=known.payee, amount_micro=before + amount, evidence=evidence)
        signature = self._hand.sign(order.digest(term.ledger))
        try:
            await redeem(known, self.funds.ledger)  # what is held back is only there once its voucher is redeemed
            await self.funds.ledger.apply(Withhold(order, signature))
        except ShoalError as error:
            self._say(f"{format_money(amount)} could not be withheld of {known.name}: {error.sentence}")
            return
        now = self.paid(node)
        assert now is not None
        self._put(node, msgspec.structs.replace(now, withheld_micro=amount, reason=_in_short(reason)))
        await self._write()

    # ---- the end ----

    async def close_former(self, *, forget: bool = False) -> None:
        """What earlier terms have left, as of a client that was killed, goes back; with `forget` they are no part of
        this budget. Raises ShoalError."""
        closed = list[TermPayments]()
        for term in self._former:
            if self.funds.account is not None and term.terms.signer != term.terms.payer:
                after = await self._close_after_hosts(term)
            else:
                after, _ = await close_escrow(term, self.funds.ledger, self._hand)
            closed.append(after)
            unheard = after.added_micro - term.added_micro
            if unheard < 0:
                if self._as_before:
                    self._budget_micro = max(0, self._budget_micro + unheard)
                self._say(
                    f"{format_money(-unheard)} {term.ledger.currency} less was added to the budget than whoever drove "
                    f"before wrote down; it is {format_money(self._budget_micro)}."
                )
            elif unheard:
                self._say(
                    f"{format_money(unheard)} {term.ledger.currency} was added to the budget, and whoever was to spend "
                    f"it never heard of that: it comes back, and the budget is {format_money(self._budget_micro)}."
                )
        self._former = () if forget else tuple(closed)
        if closed:
            await self._write()

    async def _close_after_hosts(self, term: TermPayments) -> TermPayments:
        """Of an escrow that others signed for, with a key of their own: what it paid is the ledger's to say, also where
        they wrote that it is closed, and only once they can sign for no more of it."""
        said = False
        for _ in range(OVER_LOOKS):
            term, found = await close_escrow(term, self.funds.ledger, self._hand)
            if found is None or found.state is not State.OPEN:
                break
            ends_s = max(1.0, (found.ends_ms - self._clock.now_ms()) / 1000)
            if not said:
                self._say(
                    f"What its hosts have not used is asked back: in {format_duration_s(ends_s)} it is there, and what "
                    "they have spent is known."
                )
            said = True
            await self._clock.sleep(ends_s)
        return term

    async def leave(self) -> None:
        """To whoever goes on with this purse: nothing is given back."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def let_go(self) -> None:
        """Nodes get their last vouchers, and their places are given back; what is left stays where it is."""
        await self.leave()
        held = list(self._held.values())
        if self._term is not None and not self._term.closed:
            await asyncio.gather(*(self._send(one.node, last=True, deadline_s=LAST_PAY_DEADLINE_S) for one in held))
        await self._quotes.release_all(held)
        self._held.clear()

    async def close(self) -> None:
        """Nodes get their last vouchers, and the rest goes back."""
        await self.let_go()
        if self._term is None or self._term.closed:
            return
        try:
            before = self._term
            self._term, _ = await close_escrow(before, self.funds.ledger, self._hand)
            self._budget_micro += self._term.added_micro - before.added_micro
        except ShoalError as error:
            ends_s = (self._term.ends_ms - self._clock.now_ms()) / 1000
            self._say(
                f"What was not used could not be asked back: {error.sentence} It comes back by itself in "
                f"{format_duration_s(ends_s)}; {self._again} asks again."
            )
        await self._write()

    # ---- small things ----

    @property
    def _hand(self) -> AccountKey:
        """By which the rest is asked back, also of an escrow of an earlier term."""
        return self.funds.account or self.funds.signer

    def _open_term(self) -> TermPayments:
        assert self._term is not None, "money was set aside"
        return self._term

    def _put(self, node: bytes, paid: PaidNode) -> None:
        term = self._open_term()
        self._term = msgspec.structs.replace(term, nodes={**term.nodes, node.hex(): paid})

    async def _write(self) -> None:
        async with self._writing:
            await asyncio.to_thread(self._keep, msgspec.json.encode(self.payments))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _in_short(reason: str) -> str:
    """For a line of a bill: the first sentence."""
    first = reason.strip().split(". ")[0].rstrip(".")
    return first if len(first) <= REASON_MAX else f"{first[: REASON_MAX - 3]}..."
