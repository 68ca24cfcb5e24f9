"""Pays for a job: places held all together, money set aside, a voucher after each Commit, and the rest asked back.

Of a gang either enough nodes are held or none is. Then one escrow is opened for all of them; nodes that come later are
admitted to it. Each Commit is followed by a voucher for every node whose work it accepted, on the disk before it goes
out, so that a driver that was killed never signs for less than it did. Each term of a driver has an escrow of its own:
what an earlier term's has left goes back first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.driver.bills import FILE, PaidNode, Payments, TermPayments, newest_vouchers
from shoal.driver.folder import RunFolder
from shoal.driver.gang import LinkedNode, fastest_float32
from shoal.driver.lines import Event
from shoal.errors import BadInput, LinkError, ShoalError
from shoal.identity import KeyPair, short_id
from shoal.identity.accounts import AccountKey, address_text
from shoal.ledger.book import SameEscrow, UnknownEscrow
from shoal.ledger.commands import Admit, Close, Open, Redeem, Withhold
from shoal.ledger.escrows import EscrowOver, OldVoucher
from shoal.ledger.moves import DoneAlready, TooLittleMoney
from shoal.market.earnings import lasts_s, say_dear, say_idle
from shoal.protocol.holds import LEASE_STEP_MS, BadHold, HoldReclaim, quote_id
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import (
    DAY_MS,
    Admission,
    Closing,
    EscrowTerms,
    Payee,
    SignedVoucher,
    Voucher,
    Withholding,
    sign_voucher,
)
from shoal.protocol.offers import Offer
from shoal.quantities import format_duration_s
from shoal.quantities.money import format_money, share
from shoal.world import Clock, Dice, Ledger, Link
from shoal.world.quotes import Held, NotSecured, Quotes, is_free

PAY_DEADLINE_S = 5.0
LAST_PAY_DEADLINE_S = 15.0
ASKED_AGAIN_S = (0.5, 1.0, 2.0, 4.0)
"""After so long each, when an answer of the ledger was lost; places are held for longer."""
RENEW_EVERY_S = LEASE_STEP_MS / 1000 / 3
NOTICE_MS, AUDIT_MS = 60_000, 3_600_000
HOLDBACK_PPM = 100_000
ENDS_LEAST_MS, ENDS_MOST_MS = 3_600_000, 30 * DAY_MS
"""After so long an escrow ends, whatever becomes of its driver: between these, after ENDS_AFTER times the time that it
lasts while all nodes work."""
ENDS_AFTER = 4
ENDS_SOON_MS = 120_000
"""Before an escrow ends, the job stops: nodes need some time for their last vouchers."""
REASON_MAX = 160
WARNED_AT = 0.8
"""Of the budget: it is said then for how long the rest does."""

_log = logging.getLogger("shoal.driver")


class NoMoney(BadInput):
    """An account has not what a job is to set aside."""

    code = "SH-163"


@dataclass(frozen=True)
class Purse:
    """What a job may spend, and by whose hand."""

    ledger: Ledger
    account: AccountKey
    budget_micro: int
    notice_ms: int = NOTICE_MS
    audit_ms: int = AUDIT_MS
    holdback_ppm: int = HOLDBACK_PPM


class Treasurer:
    """Pays for one term of a job."""

    def __init__(
        self,
        purse: Purse,
        folder: RunFolder,
        *,
        key: KeyPair,
        link: Callable[[bytes, Offer], Awaitable[Link]],
        clock: Clock,
        dice: Dice,
        say: Callable[[str], None],
        network: str = DEFAULT_NETWORK,
    ) -> None:
        """`key` is the driver's: nodes keep their places for it. `link` gives an open link to a node. Raises
        FolderDamaged."""
        self.purse = purse
        self._folder, self._clock, self._dice, self._say = folder, clock, dice, say
        self._quotes = Quotes(key, purse.account.address, purse.ledger.name, link, network=network)
        remedy = "restore it from a copy: it says what nodes were paid"
        known = folder.read(FILE, Payments, remedy=remedy) or Payments(budget_micro=0)
        self._former = known.terms
        self._budget_micro = purse.budget_micro
        self._term: TermPayments | None = None
        self._held: dict[bytes, Held] = {}
        self._holding_s = 0.0
        """How long it took that all of these kept a place."""
        self._chosen: list[tuple[int, float]] = []
        """Price of an hour and FLOP/s of the nodes with which the job began."""
        self._done: dict[bytes, tuple[int, int]] = {}
        """Accepted contributions and tokens of each node."""
        self._idle: dict[bytes, str] = {}
        """Nodes that were left for what they cost, and why."""
        self._opening = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending: set[bytes] = set()
        self._working: set[bytes] = set()
        self._ready_s: dict[bytes, float] = {}
        """By the clock that only grows: the wall clock may be put right while a job runs."""
        self.absent: set[bytes] = set()
        """Nodes that kept a place and did not take what was set aside for them."""
        self._dearest_micro = 0
        """What the dearest of this term's Commits cost."""
        self._warned = False

    # ---- what it stands at ----

    @property
    def payments(self) -> Payments:
        return Payments(budget_micro=self._budget_micro, terms=(*self._former, *([self._term] if self._term else ())))

    @property
    def left_micro(self) -> int:
        """What can still be signed for. What is withheld goes back to the account, not into the escrow."""
        if self._term is not None:
            return self._term.terms.amount_micro - sum(one.paid_micro for one in self._term.nodes.values())
        return max(0, self._budget_micro - self.payments.spent_micro)

    @property
    def micro_per_h(self) -> int:
        """Of all nodes that work now."""
        nodes = self._term.nodes if self._term else {}
        return sum(one.micro_per_h for node, one in nodes.items() if bytes.fromhex(node) in self._working)

    def used_up(self) -> str | None:
        """Why the job has to stop here, if it has to: the next Commit could not be paid. Says beforehand when that
        comes near."""
        left, currency = self.left_micro, self.purse.ledger.name.currency
        if self._term is not None and self._term.terms.expires_ms - self._clock.now_ms() < ENDS_SOON_MS:
            return "The escrow that its nodes are paid out of ends now. Nothing is lost: --resume opens another one."
        if self._dearest_micro and left < 2 * self._dearest_micro:
            return (
                f"The budget of {format_money(self._budget_micro)} {currency} is used up: {format_money(left)} is "
                f"left, and a round costs up to {format_money(self._dearest_micro)}. Nothing is lost: --resume goes on "
                "from here with a larger --budget."
            )
        if not self._warned and left <= max((1 - WARNED_AT) * self._budget_micro, 4 * self._dearest_micro):
            self._warned = True
            lasts = lasts_s(left, self.micro_per_h)
            said = "" if math.isinf(lasts) else f", enough for about {format_duration_s(lasts)}"
            self._say(
                f"{format_money(left)} {currency} of the budget is left{said}; then the job stops, to be resumed with "
                "a larger --budget."
            )
        return None

    # ---- places and money ----

    async def check(self) -> None:
        """That the account has what the job may cost, before anything is begun. Raises NoMoney, and what the ledger
        does."""
        has = await self.purse.ledger.balance(self.purse.account.address)
        if has < self.left_micro:
            raise self._no_money(self.left_micro, has)

    def _no_money(self, amount: int, has: int) -> NoMoney:
        return NoMoney(
            f"The job sets {format_money(amount)} {self.purse.ledger.name.currency} aside, and your account "
            f"{address_text(self.purse.account.address)} has {format_money(has)}: deposit more "
            "(`shoal account deposit`), or give it a smaller --budget."
        )

    async def hold(self, gang: Sequence[LinkedNode], nodes_min: int) -> list[LinkedNode]:
        """Have all of them keep a place; gives those that do, and those that cost nothing. Raises NotSecured where they
        are fewer than `nodes_min`; none is kept then."""
        free = [node for node in gang if is_free(node.offer)]
        priced = self._worth_it([node for node in gang if not is_free(node.offer)], max(0, nodes_min - len(free)))
        wanted = [(node.node, node.offer) for node in priced.values()]
        began_s = self._clock.monotonic()
        held, troubles = await self._quotes.hold_all(wanted, max(0, nodes_min - len(free)))
        self._holding_s = self._clock.monotonic() - began_s
        for trouble in troubles:
            self._say(f"Without {trouble}")
        self._held |= {one.node: one for one in held}
        self._chosen = [_price_of(priced[one.node]) for one in held]
        return [*free, *(priced[one.node] for one in held)]

    def _worth_it(self, priced: Sequence[LinkedNode], at_least: int) -> dict[bytes, LinkedNode]:
        """Without such as are dear beside those that earlier terms paid, as far as the others are enough."""
        paid = {node for term in self._former for node in term.nodes}
        known = [_price_of(node) for node in priced if node.node.hex() in paid]
        left = dict[bytes, LinkedNode]((node.node, node) for node in priced)
        for node in sorted(priced, key=lambda one: _price_of(one)[0], reverse=True):
            dear = say_dear(*_price_of(node), known) if node.node.hex() not in paid else None
            if dear is not None and len(left) > at_least:
                self._say(f"Without {node.name}: {dear}.")
                del left[node.node]
        return left

    async def open(self, nodes_min: int) -> set[bytes]:
        """Set the money aside, and have what is held taken; gives the nodes that did. Raises NotSecured, NoMoney, and
        what the ledger does: nothing is held then, and nothing set aside."""
        held, began_s = list(self._held.values()), self._clock.monotonic()
        try:
            if held:
                await self._open(held)
                self._beside(self._renew())
            opened_s = self._clock.monotonic()
            for one, trouble in zip(held, await asyncio.gather(*map(self._taken, held)), strict=True):
                if trouble is not None:
                    self._say(f"Without {one.name}: {trouble}")
            if held:
                await self._write()
            if len(self._held) < min(nodes_min, len(held)):
                raise NotSecured(f"Only {len(self._held)} of {len(held)} nodes took what was set aside for them.")
            if held:
                self._tell_times(len(self._held), opened_s - began_s, self._clock.monotonic() - opened_s)
        except BaseException:
            await self.close()
            raise
        return set(self._held)

    def _tell_times(self, places: int, opening_s: float, taking_s: float) -> None:
        """To whoever watches, and among the run's events."""
        held_ms, set_ms, taken_ms = (round(1000 * one) for one in (self._holding_s, opening_s, taking_s))
        told = (
            f"{places} {'place was' if places == 1 else 'places were'} held in {held_ms} ms, the money for that was "
            f"set aside in {set_ms} ms, and taken in {taken_ms} ms."
        )
        self._say(told)
        self._folder.note(Event(time_s=self._folder.elapsed_s(), sentence=told))

    async def _taken(self, held: Held) -> str | None:
        """Why not, if not."""
        try:
            await self._take(held)
        except ShoalError as error:
            self._held.pop(held.node, None)
            self.absent.add(held.node)
            await self._quotes.release(held)
            return error.sentence
        return None

    async def secure(self, node: LinkedNode) -> None:
        """A node that comes later is held, admitted and taken. Raises NotSecured, NoMoney, and what nodes and the
        ledger do."""
        if is_free(node.offer) or node.node in self._held:
            return
        if not self.left_micro:
            raise NotSecured(f"Nothing of the budget is left for {node.name}.")
        dear = self._idle.get(node.node) or say_dear(*_price_of(node), self._chosen)
        if dear is not None:
            raise NotSecured(f"{node.name} is not worth its money: {dear}.")
        held = await self._quotes.hold(node.node, node.offer)
        try:
            async with self._opening:
                if self._term is None:
                    await self._open([held])
                    self._beside(self._renew())
                else:
                    await self._admit(held)
            await self._take(held)
            await self._write()
        except BaseException:
            await self._quotes.release(held)
            raise

    async def _open(self, held: Sequence[Held]) -> None:
        purse, now_ms = self.purse, self._clock.now_ms()
        amount = self.left_micro
        lasts_ms = 1000 * ENDS_AFTER * lasts_s(amount, sum(one.hold.price.micro_per_h for one in held))
        payees = {one.hold.payee for one in held}
        terms = EscrowTerms(
            payer=purse.account.address,
            signer=purse.account.address,
            cap_micro=0,
            auditor=purse.account.address,
            amount_micro=amount,
            fee_ppm=0,
            holdback_ppm=purse.holdback_ppm,
            notice_ms=purse.notice_ms,
            audit_ms=purse.audit_ms,
            expires_ms=now_ms + round(min(ENDS_MOST_MS, max(ENDS_LEAST_MS, lasts_ms))),
            payees=tuple(Payee(payee, amount) for payee in sorted(payees)),
            quote=quote_id(tuple(one.envelope for one in held)),
            nonce=self._dice.bytes(32),
        )
        ledger = purse.ledger.name
        signature = purse.account.sign(terms.escrow_id(ledger))
        nodes = {one.node.hex(): self._paid_node(one) for one in held}
        self._term = TermPayments(terms=terms, ledger=ledger, signature=signature, nodes=nodes)
        await self._write()
        try:
            await self._have_done(Open(terms, signature))
        except TooLittleMoney as error:
            await self._take_back()
            has = await purse.ledger.balance(purse.account.address)
            raise self._no_money(amount, has) from error
        except BaseException:
            await self._take_back()
            raise

    async def _have_done(self, command: Open | Admit) -> None:
        """Where an answer is lost, the ledger is asked again: what is signed is done once. Raises what it does."""
        for wait_s in (*ASKED_AGAIN_S, None):
            try:
                await self.purse.ledger.apply(command)
                return
            except (SameEscrow, DoneAlready):
                return
            except LinkError:
                if wait_s is None:
                    raise
            await self._clock.sleep(wait_s)

    async def _take_back(self) -> None:
        """Of an escrow of which it is not known that it was opened: another one is opened for whoever comes next."""
        term, self._term = self._open_term(), None
        with contextlib.suppress(ShoalError):  # --resume asks again
            term = await close_escrow(term, self.purse.ledger, self.purse.account)
        self._former = (*self._former, term)
        await self._write()

    def _paid_node(self, held: Held) -> PaidNode:
        return PaidNode(
            name=held.name, payee=held.hold.payee, micro_per_h=held.hold.price.micro_per_h,
            hold=held.envelope.to_bytes(),
        )  # fmt: skip

    async def _admit(self, held: Held) -> None:
        term, payee = self._open_term(), held.hold.payee
        known = self._node(held.node)
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
            admission = Admission(term.escrow, payee, term.terms.amount_micro)
            signature = self.purse.account.sign(admission.digest(term.ledger))
            await self._have_done(Admit(admission, signature))
        self._put(held.node, self._paid_node(held))
        await self._write()

    async def _take(self, held: Held) -> None:
        taken = await self._quotes.take(held, self._open_term().escrow)
        self._held[held.node] = taken
        known = self._node(held.node)
        if known is not None:
            self._put(held.node, msgspec.structs.replace(known, hold=taken.envelope.to_bytes()))

    async def _renew(self) -> None:
        """Places are kept for some minutes; while the driver lives it asks for more."""
        while True:
            await self._clock.sleep(RENEW_EVERY_S)
            for held in list(self._held.values()):
                try:
                    await self._take(held)
                except ShoalError as error:
                    _log.warning("%s keeps its place no longer: %s", held.name, error)
            with contextlib.suppress(ShoalError):  # of a disk that is full the next Commit tells
                await self._write()

    # ---- work ----

    def ready(self, node: bytes, samples_per_s: float, tokens_per_sample: int) -> None:
        """A node has measured its speed on the job."""
        known = self._node(node)
        if known is not None:
            self._working.add(node)
            self._ready_s[node] = self._clock.monotonic()
            earnings = known.earnings.measured(known.paid_micro, samples_per_s, tokens_per_sample)
            self._put(node, msgspec.structs.replace(known, earnings=earnings, reason="worked"))

    async def committed(self, work: Iterable[tuple[bytes, int, bytes]]) -> None:
        """(node, accepted tokens, id of the Contribution) of a Commit that is on the disk."""
        before = self.payments.spent_micro
        earned_by = list[bytes]()
        for node, tokens, contribution in work:
            known = self._node(node)
            if known is None or not tokens:
                continue
            parts, done = self._done.get(node, (0, 0))
            self._done[node] = parts + 1, done + tokens
            self._put(node, self._earned(node, known, tokens))
            self._put_voucher(node, contribution)
            earned_by.append(node)
        if not earned_by:
            return
        self._dearest_micro = max(self._dearest_micro, self.payments.spent_micro - before)
        await self._write()
        for node in earned_by:
            if node not in self._sending:
                self._beside(self._send(node))

    def idle(self) -> dict[bytes, str]:
        """Nodes at work that are not worth their money any more, and why. They are not taken again."""
        paid = {node: self._node(node) for node in self._done}
        micro = sum(one.paid_micro for one in paid.values() if one is not None)
        tokens = sum(done for _, done in self._done.values())
        found = dict[bytes, str]()
        for node in self._working & self._done.keys():
            (parts, done), one = self._done[node], paid[node]
            why = say_idle(one.paid_micro, done, parts, micro - one.paid_micro, tokens - done) if one else None
            if why is not None:
                found[node] = why
        self._idle |= found
        return found

    def _earned(self, node: bytes, known: PaidNode, tokens: int) -> PaidNode:
        earnings = known.earnings.accepted(tokens)
        now_s = self._clock.monotonic()
        ready_ms = round(1000 * (now_s - self._ready_s.get(node, now_s)))
        most = known.paid_micro + self.left_micro
        earned = max(known.paid_micro, earnings.earned_micro(known.micro_per_h, ready_ms, most))
        return msgspec.structs.replace(known, earnings=earnings, paid_micro=earned)

    def _put_voucher(self, node: bytes, work: bytes) -> None:
        """For all that the node's account has earned: several nodes may be paid at one."""
        term, known = self._open_term(), self._node(node)
        assert known is not None
        amount = sum(one.paid_micro for one in term.nodes.values() if one.payee == known.payee)
        voucher = Voucher(escrow=term.escrow, payee=known.payee, amount_micro=amount, work=work)
        signed = sign_voucher(self.purse.account, term.ledger, voucher)
        self._put(node, msgspec.structs.replace(known, voucher=signed))

    async def _send(self, node: bytes, *, last: bool = False, deadline_s: float = PAY_DEADLINE_S) -> None:
        """The newest voucher; where a newer one comes meanwhile, that one too. What does not arrive is in the next."""
        self._sending.add(node)
        try:
            sent: SignedVoucher | None = None
            while (known := self._node(node)) is not None and known.voucher not in (None, sent):
                assert known.voucher is not None
                sent = known.voucher
                await self._quotes.pay(node, sent, last=last, deadline_s=deadline_s)
        except ShoalError as error:
            _log.info("%s did not take its voucher: %s", node.hex()[:8], error)
        finally:
            self._sending.discard(node)

    def left(self, node: bytes, reason: str) -> None:
        """A node is gone: it earns no more, and what it has earned stays."""
        self._working.discard(node)
        known = self._node(node)
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
            raise BadHold(f"Node {short_id(node)} says of a place that it ends, and keeps none for this job.")
        return self._quotes.reclaimed(held, word)

    async def withhold(self, node: bytes, reason: str, evidence: bytes) -> None:
        """What is held back of a node whose work was replayed and was not what was assigned."""
        known = self._node(node)
        if known is None or known.withheld_micro:
            return
        term = self._open_term()
        amount = share(known.paid_micro, term.terms.holdback_ppm)
        if not amount:
            return
        before = sum(one.withheld_micro for one in term.nodes.values() if one.payee == known.payee)
        order = Withholding(escrow=term.escrow, payee=known.payee, amount_micro=before + amount, evidence=evidence)
        signature = self.purse.account.sign(order.digest(term.ledger))
        try:
            await _redeem(known, self.purse.ledger)  # what is held back is only there once its voucher is redeemed
            await self.purse.ledger.apply(Withhold(order, signature))
        except ShoalError as error:
            self._say(f"{format_money(amount)} could not be withheld of {known.name}: {error.sentence}")
            return
        now = self._node(node)
        assert now is not None
        self._put(node, msgspec.structs.replace(now, withheld_micro=amount, reason=_in_short(reason)))
        await self._write()

    # ---- the end ----

    async def close_former(self) -> None:
        """What earlier terms of a driver that was killed have left goes back. Raises ShoalError."""
        closed = list[TermPayments]()
        for term in self._former:
            closed.append(term if term.closed else await close_escrow(term, self.purse.ledger, self.purse.account))
        self._former = tuple(closed)
        if closed:
            await self._write()

    async def close(self) -> None:
        """Nodes get their last vouchers, and the rest goes back."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        held = list(self._held.values())
        if self._term is None or self._term.closed:
            await self._quotes.release_all(held)
            return
        await asyncio.gather(*(self._send(one.node, last=True, deadline_s=LAST_PAY_DEADLINE_S) for one in held))
        await asyncio.gather(*(self._quotes.release(one) for one in held))
        self._held.clear()
        try:
            self._term = await close_escrow(self._term, self.purse.ledger, self.purse.account)
        except ShoalError as error:
            ends_s = (self._term.terms.expires_ms - self._clock.now_ms()) / 1000
            self._say(
                f"What the job did not use could not be asked back: {error.sentence} It comes back by itself in "
                f"{format_duration_s(ends_s)}; --resume asks again."
            )
        await self._write()

    # ---- small things ----

    def _open_term(self) -> TermPayments:
        assert self._term is not None, "money was set aside"
        return self._term

    def _node(self, node: bytes) -> PaidNode | None:
        return self._term.nodes.get(node.hex()) if self._term else None

    def _put(self, node: bytes, paid: PaidNode) -> None:
        term = self._open_term()
        self._term = msgspec.structs.replace(term, nodes={**term.nodes, node.hex(): paid})

    async def _write(self) -> None:
        async with self._writing:
            await asyncio.to_thread(self._folder.write, FILE, msgspec.json.encode(self.payments))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _price_of(node: LinkedNode) -> tuple[int, float]:
    """Of an hour, and FLOP/s."""
    price = node.offer.price
    return price.micro_per_h if price is not None else 0, fastest_float32(node.offer)


async def close_escrow(term: TermPayments, ledger: Ledger, account: AccountKey) -> TermPayments:
    """The nodes get what they have vouchers for, and the rest is asked back. Raises ShoalError."""
    wish = Closing(term.escrow)
    try:
        for one in newest_vouchers(term):
            await _redeem(one, ledger)
        await ledger.apply(Close(wish, account.sign(wish.digest(term.ledger))))
    except (UnknownEscrow, EscrowOver, DoneAlready):
        pass  # it never came to be, is over by itself, or was asked for and the answer was lost
    return msgspec.structs.replace(term, closed=True)


async def _redeem(one: PaidNode, ledger: Ledger) -> None:
    """On behalf of a node that may be gone: whoever brings a voucher, its payee gets the money."""
    if one.voucher is not None:
        with contextlib.suppress(OldVoucher):  # the node has brought it already
            await ledger.apply(Redeem(one.voucher))


def _in_short(reason: str) -> str:
    """For a line of a bill: the first sentence."""
    first = reason.strip().split(". ")[0].rstrip(".")
    return first if len(first) <= REASON_MAX else f"{first[: REASON_MAX - 3]}..."
