"""All accounts and escrows of one ledger, in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.errors import BadRecord
from shoal.identity.accounts import address_text, signer_of
from shoal.ledger.commands import (
    Admit,
    Close,
    Command,
    Deposit,
    Finish,
    Open,
    Pass,
    Redeem,
    TopUp,
    Withdraw,
    Withhold,
)
from shoal.ledger.escrows import (
    Escrow,
    admitted,
    closing,
    finished,
    opened,
    passed,
    redeemed,
    topped_up,
    withheld,
)
from shoal.ledger.moves import ISSUED, MoneyRefused, Move, account, moved, moves_of
from shoal.protocol.money import Admission, EscrowTerms, LedgerName, SignedVoucher, Withdrawal, Withholding


class NotSigned(BadRecord):
    """What would move money does not carry the signature of whom it names."""

    code = "SH-281"


class UnknownEscrow(MoneyRefused):
    """A ledger has no escrow of this name."""

    code = "SH-197"


class SameEscrow(MoneyRefused):
    """These terms have been opened already: an escrow is opened once."""

    code = "SH-198"


class WithdrawalOutOfTurn(MoneyRefused):
    """A withdrawal does not have the number that is its account's next."""

    code = "SH-199"


@dataclass
class Book:
    """Every method moves all of its money or, when it raises, none."""

    ledger: LedgerName
    balances: dict[str, int] = field(default_factory=dict)
    escrows: dict[bytes, Escrow] = field(default_factory=dict)
    withdrawals: dict[bytes, int] = field(default_factory=dict)
    """How many there were, by account."""
    now_ms: int = 0
    """It never goes back, whatever the clock does."""

    def at(self, now_ms: int) -> None:
        self.now_ms = max(self.now_ms, now_ms)

    def due(self) -> list[bytes]:
        """Escrows that the time brings something for: a `Pass` for each of them is to follow."""
        return [name for name, one in self.escrows.items() if one.due_ms is not None and one.due_ms <= self.now_ms]

    def apply(self, command: Command) -> tuple[Move, ...]:
        """The money that moves. Raises NotSigned, UnknownEscrow, WithdrawalOutOfTurn, and what the rules of an escrow
        and of moves do."""
        match command:
            case Deposit():
                return self._move(moves_of((ISSUED, account(command.account), command.amount_micro)))
            case Withdraw():
                return self._withdraw(command.order, command.signature)
            case Open():
                return self._open(command.terms, command.signature)
            case Admit():
                return self._admit(command.admission, command.signature)
            case TopUp():
                escrow = self._escrow(command.order.escrow)
                _check_signer(command.order.digest(self.ledger), command.signature, escrow.terms.payer)
                return self._become(*topped_up(escrow, command.order, self.now_ms))
            case Redeem():
                return self._redeem(command.signed)
            case Close():
                escrow = self._escrow(command.wish.escrow)
                _check_signer(command.wish.digest(self.ledger), command.signature, escrow.terms.payer)
                return self._become(*passed(closing(escrow, self.now_ms), self.now_ms))
            case Finish():
                _check_signer(command.word.digest(self.ledger), command.signature, command.word.payee)
                escrow = finished(self._escrow(command.word.escrow), command.word, self.now_ms)
                return self._become(*passed(escrow, self.now_ms))
            case Withhold():
                return self._withhold(command.order, command.signature)
            case Pass():
                return self._become(*passed(self._escrow(command.escrow), self.now_ms))

    def _withdraw(self, order: Withdrawal, signature: bytes) -> tuple[Move, ...]:
        _check_signer(order.digest(self.ledger), signature, order.account)
        following = self.withdrawals.get(order.account, 0) + 1
        if order.number != following:
            raise WithdrawalOutOfTurn(
                f"Withdrawal {order.number} of {address_text(order.account)} "
                f"{'has been carried out already' if order.number < following else 'comes before its turn'}; "
                f"the next one that it signs is number {following}."
            )
        moves = self._move((Move(account(order.account), ISSUED, order.amount_micro),))
        self.withdrawals[order.account] = order.number
        return moves

    def _open(self, terms: EscrowTerms, signature: bytes) -> tuple[Move, ...]:
        name = terms.escrow_id(self.ledger)
        _check_signer(name, signature, terms.payer)
        if name in self.escrows:
            raise SameEscrow(f"{self.escrows[name].name} was opened already; draw another nonce for another one.")
        return self._become(*opened(terms, self.ledger, self.now_ms))

    def _admit(self, admission: Admission, signature: bytes) -> tuple[Move, ...]:
        signer = signer_of(admission.digest(self.ledger), signature)
        if signer is None:
            raise NotSigned("An admission carries no signature of an account.")
        return self._become(admitted(self._escrow(admission.escrow), admission, signer, self.now_ms), ())

    def _redeem(self, signed: SignedVoucher) -> tuple[Move, ...]:
        """By whoever has it; what it pays goes to its payee."""
        signer = signer_of(signed.voucher.digest(self.ledger), signed.signature)
        if signer is None:
            raise NotSigned("A voucher carries no signature of an account.")
        return self._become(*redeemed(self._escrow(signed.voucher.escrow), signed.voucher, signer, self.now_ms))

    def _withhold(self, order: Withholding, signature: bytes) -> tuple[Move, ...]:
        escrow = self._escrow(order.escrow)
        auditor = escrow.terms.auditor
        _check_signer(order.digest(self.ledger), signature, auditor)
        return self._become(*withheld(escrow, order.payee, order.amount_micro, auditor, self.now_ms))

    def _escrow(self, name: bytes) -> Escrow:
        if name not in self.escrows:
            raise UnknownEscrow(f"This ledger has no escrow {name.hex()[:12]}.")
        return self.escrows[name]

    def _become(self, escrow: Escrow, moves: tuple[Move, ...]) -> tuple[Move, ...]:
        self._move(moves)
        self.escrows[escrow.escrow_id] = escrow
        return moves

    def _move(self, moves: tuple[Move, ...]) -> tuple[Move, ...]:
        self.balances.update(moved(self.balances, moves))
        return moves


def _check_signer(digest: bytes, signature: bytes, wanted: bytes) -> None:
    if signer_of(digest, signature) != wanted:
        raise NotSigned(f"This is {address_text(wanted)}'s to sign, and does not carry its signature for this ledger.")
