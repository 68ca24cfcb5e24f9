"""Getting nodes to keep places: what a client asks of each, and how it is held to what it answers.

A quote is the Holds of several nodes together. Either enough of them keep a place, or all places are given back. Hubs
hear of a slot that was sold a moment later: whoever refuses meanwhile is made up for at once, by others that fit as
well.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeAlias, TypeVar

from shoal.errors import JobError, ShoalError
from shoal.identity import Envelope, KeyPair
from shoal.identity.accounts import AccountKey
from shoal.protocol.holds import (
    RECLAIM_MAX_BYTES,
    BadHold,
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
    Work,
    open_hold,
)
from shoal.protocol.messages import DEFAULT_NETWORK, Message, open_record, sign
from shoal.protocol.money import LedgerName, PayingFor, SignedVoucher
from shoal.protocol.offers import RECLAIM_NOTICE_MAX_MS, Done, Offer
from shoal.world.asking import ask
from shoal.world.clock import Clock
from shoal.world.network import DeadlineExceeded, Link, Refused

HOLD_MS = 15_000
ASK_DEADLINE_S = 5.0
TAKE_DEADLINE_S = 10.0
CLOCKS_APART_MS = 60_000
"""Of a node and its client, at most: a Hold for another time than this one's binds a node to nothing, and two for times
of their own convict nobody."""
SPARES_EACH = 2
"""That are asked in the place of one that says no: what the others keep is kept from everybody else meanwhile."""
TROUBLES_SHOWN = 8
"""Nodes whose troubles a sentence names."""
Question: TypeAlias = HoldAsk | HoldTake | HoldRelease | Pay
M = TypeVar("M", bound=Message)


class NotSecured(JobError):
    """Not enough nodes would keep a place, or take the money set aside for them."""

    code = "SH-635"


@dataclass(frozen=True)
class Held:
    """A place that a node keeps."""

    node: bytes
    name: str
    envelope: Envelope
    hold: Hold


def is_free(offer: Offer) -> bool:
    """Nobody holds what costs nothing: whoever comes first has it."""
    return offer.price is None or not offer.price.micro_per_h


def serves_free(offer: Offer) -> bool:
    """The same of what it serves."""
    return offer.serves_free or is_free(offer)


class Quotes:
    """What one client asks of nodes, for one account at one ledger."""

    def __init__(
        self,
        key: KeyPair,
        payer: bytes,
        signer: AccountKey,
        ledger: LedgerName,
        link: Callable[[bytes, Offer], Awaitable[Link]],
        clock: Clock,
        work: Work = "train",
        network: str = DEFAULT_NETWORK,
        deputy: bytes | None = None,
    ) -> None:
        """Places are kept for whoever has `key`, and paid for by `payer`; `signer` is a key that may sign for its
        escrow. `link` gives an open link to a node, or raises LinkError; where those
        are of another key than that, `deputy` is the word that it acts for this one."""
        self._key, self._payer, self._signer, self._ledger = key, payer, signer, ledger
        self._link, self._clock = link, clock
        self._work: Work = work
        self._network, self._deputy = network, deputy
        self._offers: dict[bytes, Offer] = {}
        """Of the nodes that kept a place: where they can be dialled."""

    async def hold_all(
        self, wanted: Sequence[tuple[bytes, Offer]], at_least: int, spares: Sequence[tuple[bytes, Offer]] = ()
    ) -> tuple[list[Held], list[str]]:
        """A place at each of these; what kept the others from it, as sentences. Where fewer than `at_least` would be
        left, up to SPARES_EACH of `spares` are asked in the place of each that says no, in turn. Raises NotSecured
        where they are too few all the same: none is kept then."""
        troubles, others, left = list[str](), iter(spares), len(wanted)

        async def place(node: bytes, offer: Offer) -> Held | None:
            nonlocal left
            for asked in chain([(node, offer)], islice(others, SPARES_EACH)):
                try:
                    return await self.hold(*asked)
                except ShoalError as error:
                    troubles.append(f"{asked[1].name}: {error.sentence}")
                    if left > at_least or isinstance(error, DeadlineExceeded):  # the others' word would be over
                        break
            left -= 1
            return None

        held = list[Held]()
        for answer in await asyncio.gather(*(place(*one) for one in wanted), return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer
            if answer is not None:
                held.append(answer)
        if len(held) < at_least:
            await self.release_all(held)
            told = " ".join(troubles[:TROUBLES_SHOWN])
            raise NotSecured(f"{at_least} nodes are needed, and {len(held)} would keep a place. {told}")
        return held, troubles

    async def hold(self, node: bytes, offer: Offer) -> Held:
        """A place for HOLD_MS, at the price that was offered. Raises ShoalError."""
        assert offer.price is not None and not is_free(offer), "free nodes are not held"
        if offer.ledger != self._ledger:
            raise NotSecured(f"Node {offer.name} is paid at another ledger than yours.")
        wanted = HoldAsk(
            work=self._work, payer=self._payer, price=offer.price, ledger=self._ledger, lifetime_ms=HOLD_MS,
            deputy=self._deputy,
        )  # fmt: skip
        known = node in self._offers
        self._offers[node] = offer
        try:
            held = self._opened(node, offer.name, await self._ask(node, wanted, HoldGiven, ASK_DEADLINE_S))
            hold = held.hold
            if (hold.work, hold.price, hold.ledger) != (self._work, offer.price, offer.ledger) or (
                hold.slot >= offer.slots
                or hold.until_ms - hold.from_ms < HOLD_MS
                or hold.reclaim_notice_ms < offer.reclaim_notice_ms
            ):
                raise BadHold(
                    f"Node {offer.name} keeps another place than it offered, or for another time, at another price, or "
                    "with less notice."
                )
        except BaseException:
            if not known:
                del self._offers[node]
            raise
        return held

    async def take(self, held: Held, escrow: bytes) -> Held:
        """There is money for it: the place is kept for longer; again, to make it last. Raises ShoalError."""
        signature = self._signer.sign(PayingFor(escrow, self._key.node_id).digest(self._ledger))
        wanted = HoldTake(escrow=escrow, signature=signature, deputy=self._deputy)
        taken = self._opened(held.node, held.name, await self._ask(held.node, wanted, HoldGiven, TAKE_DEADLINE_S))
        if taken.hold.escrow != escrow or _place(taken.hold) != _place(held.hold):
            raise BadHold(f"Node {held.name} took something else than was set aside for it.")
        if taken.hold.from_ms > held.hold.until_ms:
            raise BadHold(f"Node {held.name} keeps a place later than it had promised: in between it may be anybody's.")
        return replace(held, envelope=taken.envelope, hold=taken.hold)

    def reclaimed(self, held: Held, word: HoldReclaim) -> float:
        """The node's owner takes it back: in how many seconds, at least as many as were promised. Raises BadRecord."""
        envelope = Envelope.from_bytes(word.reclaim, RECLAIM_MAX_BYTES)
        reclaim = open_record(envelope, Reclaim, self._network)
        notice_ms = reclaim.until_ms - reclaim.from_ms
        if envelope.signer != held.node or reclaim.client != self._key.node_id:
            raise BadHold(f"Node {held.name} says of somebody else's place that it ends.")
        if not max(1, held.hold.reclaim_notice_ms) <= notice_ms <= RECLAIM_NOTICE_MAX_MS:
            raise BadHold(
                f"Node {held.name} gives {max(0, notice_ms) / 1000:.0f} s notice, and has promised "
                f"{held.hold.reclaim_notice_ms / 1000:.0f} s; an hour is the most."
            )
        return notice_ms / 1000

    async def release(self, held: Held) -> None:
        """Give it back. A node that cannot be told keeps it until it is over."""
        with contextlib.suppress(ShoalError):
            try:
                await self._release(held)
            except Refused:  # an answer was lost that named a newer Hold
                if held.hold.escrow is not None:
                    await self._release(await self.take(held, held.hold.escrow))

    async def _release(self, held: Held) -> None:
        release = Release(node=held.node, slot=held.hold.slot, number=held.hold.number)
        packed = sign(self._key, release, self._network).to_bytes()
        message = HoldRelease(release=packed, deputy=self._deputy)
        await self._ask(held.node, message, Done, ASK_DEADLINE_S)

    async def release_all(self, held: Sequence[Held]) -> None:
        await asyncio.gather(*(self.release(one) for one in held))

    async def pay(self, node: bytes, signed: SignedVoucher, *, last: bool, deadline_s: float) -> SignedVoucher | None:
        """Returns once the voucher is on the node's disk: None, or the one that it has and that says more. Raises
        ShoalError."""
        message = Pay(signed=signed, last=last, deputy=self._deputy)
        return (await self._ask(node, message, Paid, deadline_s)).newest

    def _opened(self, node: bytes, name: str, given: HoldGiven) -> Held:
        envelope = Envelope.from_bytes(given.hold, Hold.MAX_BYTES)
        hold = open_hold(envelope, node, self._network)
        if hold.client != self._key.node_id or hold.payer != self._payer:
            raise BadHold(f"Node {name} answered with a hold for somebody else.")
        now_ms = self._clock.now_ms()
        if not hold.from_ms - CLOCKS_APART_MS <= now_ms <= hold.until_ms + CLOCKS_APART_MS:
            apart_s = ((hold.from_ms if now_ms < hold.from_ms else hold.until_ms) - now_ms) / 1000
            raise BadHold(
                f"Node {name} keeps a place for another time than now, by {apart_s:+.0f} s: its clock is wrong, or "
                f"this machine's, or its word. Up to {CLOCKS_APART_MS / 1000:.0f} s are put up with."
            )
        return Held(node, name, envelope, hold)

    async def _ask(self, node: bytes, message: Question, answer: type[M], deadline_s: float) -> M:
        return await ask(await self._link(node, self._offers[node]), message, answer, deadline_s)


def _place(hold: Hold) -> tuple[object, ...]:
    """What a node must not change once it has promised it."""
    return hold.slot, hold.work, hold.price, hold.ledger, hold.payee, hold.reclaim_notice_ms
