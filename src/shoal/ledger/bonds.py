"""A bond: money that an account puts at stake for what a node promises.

It is gone as soon as anybody shows two Holds of that node which promise one slot to two clients at once; all of it goes
to the ledger's fees, and nothing to who showed it: a node that got a part of its own bond back for reporting itself
would have put less at stake than it seems. Who posted a bond asks for it back and gets it some notice later; it can be
lost meanwhile. It answers for promises that last beyond the moment when it was posted, and for no older ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from shoal.identity import Envelope, short_id
from shoal.ledger.moves import FEES, DoneAlready, MoneyRefused, Move, account, bonded, moves_of
from shoal.protocol.holds import Hold, sold_twice
from shoal.protocol.messages import open_record
from shoal.protocol.money import BondTerms, LedgerName


class BondOver(MoneyRefused):
    """A bond was paid back, or is lost."""

    code = "SH-187"


class NoContradiction(MoneyRefused):
    """Two records do not show that a bond's node has promised one slot twice."""

    code = "SH-188"


class BondState(Enum):
    STANDING = "standing"
    """Also while its notice runs."""
    PAID_BACK = "paid back"
    LOST = "lost"


@dataclass(frozen=True)
class Bond:
    bond_id: bytes
    terms: BondTerms
    posted_ms: int
    ends_ms: int | None = None
    """None, until its account has asked for it."""
    state: BondState = BondState.STANDING

    @property
    def due_ms(self) -> int | None:
        """When it is to be paid back; None while nobody has asked, and when it is over."""
        return self.ends_ms if self.state is BondState.STANDING else None

    @property
    def at_stake_micro(self) -> int:
        return self.terms.amount_micro if self.state is BondState.STANDING else 0

    @property
    def name(self) -> str:
        return f"Bond {self.bond_id.hex()[:12]}"


Decision = tuple[Bond, tuple[Move, ...]]
"""What becomes of a bond, and the money that moves."""


def posted(terms: BondTerms, ledger: LedgerName, now_ms: int) -> Decision:
    bond = Bond(terms.bond_id(ledger), terms, now_ms)
    return bond, moves_of((account(terms.account), bonded(bond.bond_id), terms.amount_micro))


def unbonding(bond: Bond, now_ms: int) -> Bond:
    """Its account has asked for it. Raises BondOver, DoneAlready."""
    _check_standing(bond, now_ms)
    if bond.ends_ms is not None:
        raise DoneAlready(f"{bond.name} was asked for already; it is paid back at {bond.ends_ms} ms.")
    return replace(bond, ends_ms=now_ms + bond.terms.notice_ms)


def lost(bond: Bond, one: bytes, other: bytes, now_ms: int) -> Decision:
    """Two packed Envelopes of Holds convict its node. Raises BondOver, NoContradiction, and what reading the two
    does."""
    _check_standing(bond, now_ms)
    terms = bond.terms
    first, second = (Envelope.from_bytes(packed, Hold.MAX_BYTES) for packed in (one, other))
    holds = [open_record(each, Hold, terms.network) for each in (first, second)]
    for each in (first, second):
        if each.signer != terms.node:
            raise NoContradiction(
                f"{bond.name} stands for node {short_id(terms.node)}, and a hold of {short_id(each.signer)} says "
                "nothing about that."
            )
    if sold_twice(first, second, terms.network) is None:
        raise NoContradiction(
            f"These two holds of node {short_id(terms.node)} can both be kept: they are for two slots, for one client, "
            f"not for one time, or the client of the first gave its place back; {bond.name} stays as it is."
        )
    over_ms = min(hold.until_ms for hold in holds)
    if over_ms <= bond.posted_ms:
        raise NoContradiction(
            f"{bond.name} was posted at {bond.posted_ms} ms, and one of these two holds was over at {over_ms} ms: it "
            "does not answer for that."
        )
    return replace(bond, state=BondState.LOST), moves_of((bonded(bond.bond_id), FEES, terms.amount_micro))


def paid_back(bond: Bond, now_ms: int) -> Decision:
    """By time alone. Raises BondOver, MoneyRefused where it is not time yet."""
    if bond.state is not BondState.STANDING:
        raise _over(bond)
    if bond.ends_ms is None or now_ms < bond.ends_ms:
        raise MoneyRefused(f"{bond.name} is not to be paid back yet.")
    return replace(bond, state=BondState.PAID_BACK), moves_of(
        (bonded(bond.bond_id), account(bond.terms.account), bond.terms.amount_micro)
    )


def _check_standing(bond: Bond, now_ms: int) -> None:
    if bond.state is not BondState.STANDING or (bond.ends_ms is not None and now_ms >= bond.ends_ms):
        raise _over(bond)


def _over(bond: Bond) -> BondOver:
    became = "is lost: its node has promised one slot twice" if bond.state is BondState.LOST else "has been paid back"
    return BondOver(f"{bond.name} {became}.")
