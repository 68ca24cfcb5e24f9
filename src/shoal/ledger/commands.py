"""What a ledger can be asked to do; whoever signs what is said in `protocol.money`.

A fee table is signed as a record. Nobody signs a `Deposit`, which is the operator's alone to ask for, nor a `Slash`,
whose evidence is signed, nor what time brings, `Pass` and `PayBack`.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from shoal.identity import ENVELOPE_OVERHEAD_BYTES, Hash
from shoal.identity.accounts import AccountSignature, Address
from shoal.protocol.holds import Hold
from shoal.protocol.money import (
    Admission,
    Amount,
    BondTerms,
    Closing,
    EscrowTerms,
    FeeTable,
    Finished,
    LedgerName,
    SignedVoucher,
    ToppingUp,
    Unbonding,
    Withdrawal,
    Withholding,
)


class _Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag=str.lower):
    pass


class Deposit(_Command, frozen=True):
    """By the operator, who has got as much outside of the ledger."""

    account: Address
    amount_micro: Amount
    reference: Annotated[str, Meta(max_length=128)]
    """Where it came from: the number of a payment, or of a development mint. Good once: a deposit whose answer was lost
    can be asked for again."""


FeeTableBytes = Annotated[bytes, Meta(max_length=FeeTable.MAX_BYTES + ENVELOPE_OVERHEAD_BYTES)]
"""An Envelope of a FeeTable."""


class SetFee(_Command, frozen=True):
    """By the operator: what escrows pay that are opened from a moment on."""

    table: FeeTableBytes


class Withdraw(_Command, frozen=True):
    """The operator pays as much outside of the ledger."""

    order: Withdrawal
    signature: AccountSignature


class Open(_Command, frozen=True):
    terms: EscrowTerms
    signature: AccountSignature


class Admit(_Command, frozen=True):
    admission: Admission
    signature: AccountSignature


class TopUp(_Command, frozen=True):
    order: ToppingUp
    signature: AccountSignature


class Redeem(_Command, frozen=True):
    signed: SignedVoucher


class Close(_Command, frozen=True):
    wish: Closing
    signature: AccountSignature


class Finish(_Command, frozen=True):
    word: Finished
    signature: AccountSignature


class Withhold(_Command, frozen=True):
    order: Withholding
    signature: AccountSignature


class Pass(_Command, frozen=True):
    """See what the time has brought for an escrow."""

    escrow: Hash


class PostBond(_Command, frozen=True):
    terms: BondTerms
    signature: AccountSignature


class Unbond(_Command, frozen=True):
    wish: Unbonding
    signature: AccountSignature


HoldBytes = Annotated[bytes, Meta(max_length=Hold.MAX_BYTES + ENVELOPE_OVERHEAD_BYTES)]


class Slash(_Command, frozen=True):
    """By whoever has two Holds that contradict each other."""

    bond: Hash
    one: HoldBytes
    """An Envelope."""
    other: HoldBytes


class PayBack(_Command, frozen=True):
    """A bond whose notice is over."""

    bond: Hash


Command: TypeAlias = (
    Deposit | Withdraw | SetFee
    | Open | Admit | TopUp | Redeem | Close | Finish | Withhold | Pass
    | PostBond | Unbond | Slash | PayBack
)  # fmt: skip


def escrow_of(command: Command, ledger: LedgerName) -> bytes | None:
    """Which escrow a command speaks of, if any."""
    match command:
        case Deposit() | Withdraw() | SetFee() | PostBond() | Unbond() | Slash() | PayBack():
            return None
        case Open():
            return command.terms.escrow_id(ledger)
        case Admit():
            return command.admission.escrow
        case Redeem():
            return command.signed.voucher.escrow
        case Close():
            return command.wish.escrow
        case Finish():
            return command.word.escrow
        case TopUp() | Withhold():
            return command.order.escrow
        case Pass():
            return command.escrow


def bond_named_by(command: Command, ledger: LedgerName) -> bytes | None:
    """Which bond a command speaks of, if any."""
    match command:
        case PostBond():
            return command.terms.bond_id(ledger)
        case Unbond():
            return command.wish.bond
        case Slash() | PayBack():
            return command.bond
        case _:
            return None
