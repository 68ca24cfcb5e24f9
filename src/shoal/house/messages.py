"""What is asked of a house ledger over a link, and what it answers. Commands, moves, escrows and lines are the words of
`shoal.ledger`; who signs what is said in `protocol.money`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from shoal.errors import BadInput
from shoal.identity import Hash, NodeId
from shoal.identity.accounts import Address
from shoal.ledger.bonds import Bond
from shoal.ledger.commands import Command, FeeTableBytes
from shoal.ledger.escrows import Escrow
from shoal.ledger.journal import LINE_MAX_BYTES, Line
from shoal.ledger.moves import Move
from shoal.protocol.messages import DEFAULT_NETWORK, Message
from shoal.protocol.money import Amount, HouseLedger, LineNumber
from shoal.protocol.offers import UnixMs
from shoal.quantities.money import AMOUNT_MAX

PAGE_BYTES = 512 * 1024
"""Of the journal in one answer; a line that is longer comes alone."""
ANSWER_MAX_BYTES = 1 << 20
"""The end of an escrow with as many payees as there may be moves so much."""


class NotOverLinks(BadInput):
    """A ledger is asked over a link for what only its operator does, or what it does by itself."""

    code = "SH-131"


class NoMint(BadInput):
    """A ledger has no development mint, or one that gives less at a time."""

    code = "SH-132"


class AskLedger(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `ledger.about`: which ledger are you? The reply is LedgerInfo."""

    KIND: ClassVar[str] = "ledger.about"
    MAX_BYTES: ClassVar[int] = 64


class LedgerInfo(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A ledger about itself. Nothing here is signed but the fee tables."""

    MAX_BYTES: ClassVar[int] = 4 * 1024

    ledger: HouseLedger
    network: Annotated[str, Meta(max_length=32)]
    software: Annotated[str, Meta(max_length=64)]
    lines: Annotated[int, Meta(ge=0)] = 0
    """Of its journal."""
    mint_max_micro: Amount = 0
    """With a development mint, which gives money to whoever asks: how much at a time. 0: it has none."""
    fees: Annotated[tuple[FeeTableBytes, ...], Meta(max_length=2)] = ()
    """The fee table that holds, if any, and the one that is to follow: Envelopes, by the operator."""


class ApplyCommand(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `ledger.apply`: do this, if the rules allow it. The reply is Applied, sent once it is durable."""

    KIND: ClassVar[str] = "ledger.apply"
    MAX_BYTES: ClassVar[int] = LINE_MAX_BYTES

    command: Command


class Mint(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `ledger.mint`, to a ledger with a development mint: money from nowhere. The reply is Applied."""

    KIND: ClassVar[str] = "ledger.mint"
    MAX_BYTES: ClassVar[int] = 256

    account: Address
    amount_micro: Annotated[int, Meta(ge=1, le=AMOUNT_MAX)]
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """Drawn anew for each wish: the same one is granted once."""


class Applied(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = ANSWER_MAX_BYTES

    moves: tuple[Move, ...]


class AskAccount(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `ledger.account`. The reply is AccountState."""

    KIND: ClassVar[str] = "ledger.account"
    MAX_BYTES: ClassVar[int] = 64

    account: Address


class AccountState(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    balance_micro: Amount
    withdrawals: Annotated[int, Meta(ge=0, lt=(1 << 53) - 1)] = 0
    """How many were carried out: the next one has the number after it."""
    bonds: tuple[Bond, ...] = ()
    """That it has posted, whatever became of them; those with most at stake first, and at most 64."""


class AskEscrow(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `ledger.escrow`. The reply is EscrowState."""

    KIND: ClassVar[str] = "ledger.escrow"
    MAX_BYTES: ClassVar[int] = 64

    escrow: Hash


class EscrowState(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = ANSWER_MAX_BYTES

    escrow: Escrow | None = None
    """None: there is none of that name."""


class AskBond(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `ledger.bond_of`: what is at stake for what a node promises? The reply is BondsFound."""

    KIND: ClassVar[str] = "ledger.bond_of"
    MAX_BYTES: ClassVar[int] = 128

    node: NodeId
    network: Annotated[str, Meta(min_length=1, max_length=32)] = DEFAULT_NETWORK
    until_ms: UnixMs = 0
    """Bonds that are paid back by then do not count."""


class BondsFound(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    at_stake_micro: Amount = 0
    """By all of them together."""
    bonds: tuple[Bond, ...] = ()
    """The largest of them, at most 64."""


class AskLines(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `ledger.lines`: the journal after a line, a page of it. The reply is LinesFound."""

    KIND: ClassVar[str] = "ledger.lines"
    MAX_BYTES: ClassVar[int] = 128

    after: Annotated[int, Meta(ge=0, le=1 << 62)] = 0
    account: Address | None = None
    """Only the lines in which it is named."""


class LinesFound(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = PAGE_BYTES + ANSWER_MAX_BYTES

    lines: tuple[Line, ...]
    seen: LineNumber | None = None
    """Where there is more: the line up to which all was looked through, to go on after."""


class AskCheckpoint(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `ledger.checkpoint`: sign your newest line. The reply is NewestCheckpoint."""

    KIND: ClassVar[str] = "ledger.checkpoint"
    MAX_BYTES: ClassVar[int] = 64


class NewestCheckpoint(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 1024

    checkpoint: bytes | None = None
    """An Envelope of a Checkpoint; None while the journal has no line."""
