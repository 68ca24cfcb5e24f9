"""What a ledger can be asked to do; whoever signs what is said in `protocol.money`."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from shoal.identity import Hash
from shoal.identity.accounts import AccountSignature, Address
from shoal.protocol.money import (
    Admission,
    Amount,
    Closing,
    EscrowTerms,
    Finished,
    LedgerName,
    SignedVoucher,
    ToppingUp,
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
    """Where it came from: the number of a payment, or of a development mint."""


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
    """See what the time has brought for an escrow: nobody signs that."""

    escrow: Hash


Command: TypeAlias = Deposit | Withdraw | Open | Admit | TopUp | Redeem | Close | Finish | Withhold | Pass


def escrow_of(command: Command, ledger: LedgerName) -> bytes | None:
    """Which escrow a command speaks of, if any."""
    match command:
        case Deposit() | Withdraw():
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
