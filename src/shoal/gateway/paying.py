"""Pays nodes that serve for money: places at those that a plan chose for layers, or at one with an engine, and a
voucher every few seconds for what each has served.

What a node has earned follows from what came back through its stages and from its signed receipts (`receipts`), by the
rule of `market.earnings`. When the money comes to its end new requests are refused, those under way go on for as long
as it lasts, and then the nodes are let go; where more is added, nodes are taken again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from shoal.errors import ShoalError, StorageError
from shoal.identity import KeyPair
from shoal.market.earnings import Serving
from shoal.protocol.holds import HoldReclaim
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import Done, Offer
from shoal.purse.bills import FILE, Bill, Payments, bill
from shoal.purse.purse import Funds, Purse
from shoal.quantities.money import format_money, owed
from shoal.storage.whole import write_whole
from shoal.world import Clock, Dice, Disk, Endpoint, Link, Request

PAY_EVERY_S = 2.0
LAST_MS, LAST_SHARE = 30_000, 0.1
"""What the nodes at work cost in so long, or this share of the budget if that is less, is kept for requests that are
under way."""
LEAVE_EARLY_S, LEAVE_EARLY_SHARE = 5.0, 0.25
"""So long before its owner has a node back, or this share of the notice if that is less, it is let go: its receipts and
its last voucher come before."""
BUY_WAIT_S = 10.0
"""So long nodes that are just being met are waited for at most before what is cheapest is chosen."""
TAKEN_BACK = "its owner took it back"


class PaymentsDamaged(StorageError):
    """The file in a gateway's folder that says what was set aside and paid cannot be read."""

    code = "SH-452"


class Paying:
    """For the nodes that serve one model."""

    def __init__(
        self,
        funds: Funds,
        disk: Disk,
        *,
        key: KeyPair,
        endpoint: Endpoint,
        link: Callable[[bytes, Offer], Awaitable[Link]],
        clock: Clock,
        dice: Dice,
        say: Callable[[str], None],
        job: bytes,
    ) -> None:
        """`disk` is the gateway's folder; `job` what vouchers name until there is a receipt; at `endpoint` nodes say
        that their owners take them back. Raises PaymentsDamaged."""
        self._clock, self._say, self._job = clock, say, job
        self.purse = Purse(
            funds,
            read_payments(disk),
            lambda content: write_whole(disk, FILE, content, "keeping what nodes were paid"),
            key=key,
            link=link,
            clock=clock,
            dice=dice,
            say=say,
            again="the next `shoal serve` of this model",
            work="serve",
        )
        self.taken: set[bytes] = set()
        """Nodes that keep a place for layers, with money for it."""
        self.engines: set[bytes] = set()
        """The same for engines beside them."""
        self.former: set[bytes] = set()
        """Nodes that a gateway that was killed has left with a place for it."""
        self.leaves_s: dict[bytes, float] = {}
        """Of these, those whose owners take them back: when they are let go, by the clock that only grows."""
        self.closing = ""
        """Why nodes take no more requests for money, once they do not."""
        self._serving: dict[bytes, Serving] = {}
        """Of as many nodes as were ever paid."""
        self._receipts: dict[bytes, bytes] = {}
        """The newest of each."""
        self._unpaid: dict[bytes, tuple[int, bytes]] = {}
        """Node -> what was earned, and by which record, that could not be written down."""
        self._seen_micro = 0
        """The budget with which `closing` was decided."""
        self._trouble = ""
        self._changed: Callable[[], None] = lambda: None
        endpoint.handle(HoldReclaim.KIND, self._reclaimed)

    # ---- before ----

    async def begin(self) -> None:
        """Ask back what a gateway that was killed has left, and see that there is money. Raises NoMoney, and what the
        ledger does."""
        former = self.purse.payments
        still_open = [one for one in former.terms if not one.closed]
        await self.purse.close_former(forget=True)
        if still_open:
            self.former = {bytes.fromhex(node) for one in still_open for node in one.nodes}
            charged = sum(one.charged_micro for one in still_open)
            rest = sum(one.amount_micro for one in still_open) - charged
            self._say(
                f"The gateway that served from this folder before was not stopped in order: it has paid "
                f"{format_money(charged)} {self.currency}, and {format_money(rest)} was asked back."
            )
        await self.purse.check()

    def takes(self, offer: Offer) -> bool:
        """Whether a node that costs something can be paid."""
        return offer.ledger == self.purse.funds.ledger.name

    async def take(self, wanted: Sequence[tuple[bytes, Offer]]) -> None:
        """A place at each of these, with money for it, or at none. Raises ShoalError."""
        await self.purse.join_all(wanted)
        self.taken |= {node for node, _ in wanted}

    async def take_engine(self, node: bytes, offer: Offer) -> None:
        """A place at a node for the engine beside it. Raises ShoalError."""
        await self.purse.join(node, offer)
        self.engines.add(node)

    def let_go(self, node: bytes, reason: str) -> None:
        """What it has earned stays, and what it has earned in a ring that is not closed yet is paid, too."""
        self.taken.discard(node)
        self.engines.discard(node)
        self.leaves_s.pop(node, None)
        self.purse.left(node, reason)

    async def part_from(self, node: bytes, reason: str) -> None:
        """Let it go with a voucher for all that it has earned: it may be gone when its place is given back."""
        self.taken.discard(node)
        self.engines.discard(node)
        await self.pay()
        self.let_go(node, reason)

    async def _reclaimed(self, request: Request) -> bytes:
        """A node's owner wants it back."""
        word = decode(HoldReclaim, request.body, request.version)
        notice_s = self.purse.reclaimed(request.peer, word)
        known = self.purse.paid(request.peer)
        if request.peer not in self.leaves_s and known is not None:
            early_s = min(LEAVE_EARLY_S, LEAVE_EARLY_SHARE * notice_s)
            self.leaves_s[request.peer] = self._clock.monotonic() + notice_s - early_s
            self._say(
                f"{known.name}: its owner takes it back in {notice_s:.0f} s. It serves until then where it has to, and "
                "other nodes are looked for."
            )
            self._changed()
        return encode(Done(), request.version)

    # ---- what is served ----

    def ready(self, node: bytes) -> None:
        """A stage of it has loaded its layers, or its engine is there."""
        known = self.purse.paid(node)
        if node in self.taken | self.engines and known is not None and not self.purse.works(node):
            self.purse.begin(node)
            self._serving[node] = Serving().ready(known.paid_micro)

    def served(self, node: bytes, parts: int, token_us: int, receipt: bytes | None) -> None:
        """So many parts of tokens more, or fewer (`RingMeter`)."""
        serving = self._serving.get(node)
        if serving is not None:
            self._serving[node] = serving.served(parts, token_us)
            if receipt is not None:
                self._receipts[node] = receipt

    async def run(self, changed: Callable[[], None]) -> None:
        """Pay, now and then, until this is cancelled; `changed` is told when there is less to be had for money than
        before, or more again."""
        self._changed = changed
        while True:
            await self._clock.sleep(PAY_EVERY_S)
            await self.pay()
            if await self._look():
                changed()

    async def pay(self) -> None:
        """What was earned since the last time, and what could not be paid then: where the disk refuses, nodes wait for
        a while, and then stop."""
        earned = dict(self._unpaid)
        for node, serving in self._serving.items():
            known = self.purse.paid(node)
            assert known is not None, "it was, when it was ready"
            most = known.paid_micro + self.purse.left_micro
            micro = serving.earned_micro(known.micro_per_h, self.purse.ready_ms(node), most)
            if micro > known.paid_micro:
                earned[node] = micro, self._receipts.get(node, self._job)
        if not earned:
            return
        try:
            await self.purse.pay(earned)
            self._unpaid, self._trouble = {}, ""
        except ShoalError as error:
            self._unpaid = earned
            if error.sentence != self._trouble:
                self._trouble = error.sentence
                self._say(f"Nodes are not paid at the moment: {error.sentence}")

    async def _look(self) -> bool:
        """What is left, and what follows; whether something does. The ledger is asked first whether there is more."""
        purse, before = self.purse, self.closing
        if not before and (self._ends() or purse.runs_low()):
            await purse.look_soon()
        if not before or purse.budget_micro != self._seen_micro:  # what was let go is taken again for new money alone
            self.closing, self._seen_micro = self._ends(), purse.budget_micro
        if self.closing and not before:
            self._say(f"{self.closing} New requests are refused, and those under way go on for as long as it lasts.")
        if before and not self.closing:
            self._say("Nodes that cost something are taken again.")
        if not self.closing and purse.runs_low():
            purse.warn("{} of work at least", "nodes that cost something are let go")
        return bool(self.closing) != bool(before) or (bool(self.closing) and self.spent)

    def _ends(self) -> str:
        """Why nodes take no more requests for money, if they do not."""
        purse = self.purse
        if purse.ends_soon:
            return "The money that nodes are paid out of goes back now; start `shoal serve` again."
        least = min(owed(purse.micro_per_h, LAST_MS), round(LAST_SHARE * purse.budget_micro))
        if purse.left_micro > least:
            return ""
        return (
            f"The budget of {format_money(purse.budget_micro)} {self.currency} is used up; add to it with `shoal jobs "
            "fund`, or start `shoal serve` again with another --budget."
        )

    @property
    def spent(self) -> bool:
        """Nothing is left."""
        return self.purse.left_micro == 0

    # ---- the end ----

    async def close(self) -> None:
        """Nodes get their last vouchers, and the rest goes back."""
        await self.pay()
        self.taken.clear()
        self.engines.clear()
        with contextlib.suppress(StorageError):  # it was said; the next start asks for the rest
            await self.purse.close()

    @property
    def bill(self) -> Bill | None:
        """None where nothing was set aside."""
        return bill(self.purse.payments)

    @property
    def currency(self) -> str:
        return self.purse.funds.ledger.name.currency


def read_payments(disk: Disk) -> Payments | None:
    """Of a gateway; None where nothing was ever set aside. Raises PaymentsDamaged."""
    if disk.info(FILE) is None:
        return None
    try:
        return msgspec.json.decode(disk.read(FILE), type=Payments)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise PaymentsDamaged(
            f"{disk.place}/{FILE}, which says what was set aside and paid for serving, cannot be read: {error}. "
            "Restore it from a copy; without one, move it away: what was set aside comes back by itself when its "
            "escrow ends."
        ) from error
