"""All accounts and escrows of one ledger, in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.errors import BadRecord
from shoal.identity.accounts import address_text, signer_of
from shoal.ledger.escrows import Escrow, State, closing, opened, passed, redeemed, withheld
from shoal.ledger.moves import ISSUED, MoneyRefused, Move, account, moved, moves_of
from shoal.protocol.money import Closing, EscrowTerms, LedgerName, SignedVoucher, Withholding


class NotSigned(BadRecord):
    """What would move money does not carry the signature of whom it names."""

    code = "SH-281"


class UnknownEscrow(MoneyRefused):
    """A ledger has no escrow of this name."""

    code = "SH-197"


class SameEscrow(MoneyRefused):
    """These terms have been opened already: an escrow is opened once."""

    code = "SH-198"


@dataclass
class Book:
    """Every method moves all of its money or, when it raises, none."""

    ledger: LedgerName
    balances: dict[str, int] = field(default_factory=dict)
    escrows: dict[bytes, Escrow] = field(default_factory=dict)
    now_ms: int = 0
    """It never goes back, whatever the clock does."""

    def at(self, now_ms: int) -> tuple[Move, ...]:
        """What the time brings: call it before anything else, and again and again."""
        self.now_ms = max(self.now_ms, now_ms)
        done: tuple[Move, ...] = ()
        for name, escrow in self.escrows.items():
            if escrow.state is not State.SETTLED:
                after, moves = passed(escrow, self.now_ms)
                self._move(moves)
                self.escrows[name] = after
                done += moves
        return done

    def deposit(self, address: bytes, amount_micro: int) -> tuple[Move, ...]:
        """By the operator, who has got as much outside of the ledger."""
        return self._move(moves_of((ISSUED, account(address), amount_micro)))

    def open(self, terms: EscrowTerms, signature: bytes) -> tuple[Move, ...]:
        """Raises NotSigned, BadTerms, SameEscrow, TooLittleMoney."""
        name = terms.escrow_id(self.ledger)
        _check_signer(name, signature, terms.payer)
        if name in self.escrows:
            raise SameEscrow(f"{self.escrows[name].name} was opened already; draw another nonce for another one.")
        escrow, moves = opened(terms, self.ledger, self.now_ms)
        self._move(moves)
        self.escrows[name] = escrow
        return moves

    def redeem(self, signed: SignedVoucher) -> tuple[Move, ...]:
        """By whoever has it; what it pays goes to its payee. Raises NotSigned, UnknownEscrow, and as
        `escrows.redeemed`."""
        signer = signer_of(signed.voucher.digest(self.ledger), signed.signature)
        if signer is None:
            raise NotSigned("A voucher carries no signature of an account.")
        escrow = self._escrow(signed.voucher.escrow)
        after, moves = redeemed(escrow, signed.voucher, signer, self.now_ms)
        return self._become(after, moves)

    def close(self, wish: Closing, signature: bytes) -> tuple[Move, ...]:
        """Raises NotSigned, UnknownEscrow, EscrowOver."""
        escrow = self._escrow(wish.escrow)
        _check_signer(wish.digest(self.ledger), signature, escrow.terms.payer)
        self.escrows[wish.escrow] = closing(escrow, self.now_ms)
        return self.at(self.now_ms)

    def withhold(self, order: Withholding, signature: bytes) -> tuple[Move, ...]:
        """Raises NotSigned, UnknownEscrow, and as `escrows.withheld`."""
        escrow = self._escrow(order.escrow)
        _check_signer(order.digest(self.ledger), signature, escrow.terms.auditor)
        after, moves = withheld(escrow, order.payee, order.amount_micro, escrow.terms.auditor, self.now_ms)
        return self._become(after, moves)

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
        raise NotSigned(f"This moves money of {address_text(wanted)} and does not carry its signature.")
