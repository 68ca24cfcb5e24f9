"""All accounts, escrows and bonds of one ledger, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.errors import BadRecord
from shoal.identity.accounts import address_text, signer_of
from shoal.ledger.bonds import Bond, lost, paid_back, posted, unbonding
from shoal.ledger.commands import (
    Admit,
    Close,
    Command,
    Deposit,
    Finish,
    Open,
    Pass,
    PayBack,
    PostBond,
    Redeem,
    SetFee,
    Slash,
    TopUp,
    Unbond,
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
from shoal.ledger.fees import Announced, OtherFee, announced, fee_at, opened_table
from shoal.ledger.moves import ISSUED, MoneyRefused, Move, account, moved
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import Admission, BondTerms, EscrowTerms, LedgerName, SignedVoucher, Withdrawal, Withholding
from shoal.quantities.money import format_share


class NotSigned(BadRecord):
    """What would move money does not carry the signature of whom it names."""

    code = "SH-281"


class SameDeposit(MoneyRefused):
    """A deposit with this reference was booked already."""

    code = "SH-189"


class UnknownEscrow(MoneyRefused):
    """A ledger has no escrow of this name."""

    code = "SH-197"


class SameEscrow(MoneyRefused):
    """These terms have been opened already: an escrow is opened once."""

    code = "SH-198"


class WithdrawalOutOfTurn(MoneyRefused):
    """A withdrawal does not have the number that is its account's next."""

    code = "SH-199"


class UnknownBond(MoneyRefused):
    """A ledger has no bond of this name."""

    code = "SH-184"


class SameBond(MoneyRefused):
    """These terms have been posted already: a bond is posted once."""

    code = "SH-186"


@dataclass
class Book:
    """Every method moves all of its money or, when it raises, none."""

    ledger: LedgerName
    balances: dict[str, int] = field(default_factory=dict)
    escrows: dict[bytes, Escrow] = field(default_factory=dict)
    withdrawals: dict[bytes, int] = field(default_factory=dict)
    """How many there were, by account."""
    bonds: dict[bytes, Bond] = field(default_factory=dict)
    references: set[str] = field(default_factory=set)
    """Of deposits."""
    fees: tuple[Announced, ...] = ()
    """That holds, if any, and that is to follow."""
    network: str = DEFAULT_NETWORK
    """For which the operator signs."""
    now_ms: int = 0
    """It never goes back, whatever the clock does."""

    def at(self, now_ms: int) -> None:
        self.now_ms = max(self.now_ms, now_ms)

    def due(self) -> list[Command]:
        """What the time brings, and is to follow: for escrows, then for bonds, and what was due first, first."""
        return [*map(Pass, self._due(self.escrows)), *map(PayBack, self._due(self.bonds))]

    def _due(self, ones: Mapping[bytes, Escrow] | Mapping[bytes, Bond]) -> list[bytes]:
        due = [(one.due_ms, name) for name, one in ones.items() if one.due_ms is not None]
        return [name for at_ms, name in sorted(due) if at_ms <= self.now_ms]

    def bond_of(self, node: bytes, network: str = DEFAULT_NETWORK, until_ms: int = 0) -> int:
        """Millionths that are at stake for what a node promises: of bonds that nobody has asked for, or that are paid
        back after `until_ms`."""
        until_ms = max(until_ms, self.now_ms)
        return sum(
            one.at_stake_micro
            for one in self.bonds.values()
            if (one.terms.node, one.terms.network) == (node, network) and (one.due_ms is None or one.due_ms > until_ms)
        )

    def apply(self, command: Command) -> tuple[Move, ...]:
        """The money that moves. Raises NotSigned, UnknownEscrow, UnknownBond, SameDeposit, WithdrawalOutOfTurn, and
        what the rules of escrows, bonds and moves do."""
        match command:
            case Deposit():
                return self._deposit(command)
            case Withdraw():
                return self._withdraw(command.order, command.signature)
            case SetFee():
                table = opened_table(command.table, self.ledger, self.network)
                self.fees = announced(self.fees, table, -self.balances.get(ISSUED, 0), self.now_ms)
                return ()
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
                by = escrow.terms.payer, escrow.terms.signer
                _check_signer(command.wish.digest(self.ledger), command.signature, *by)
                return self._become(*passed(closing(escrow, self.now_ms), self.now_ms))
            case Finish():
                _check_signer(command.word.digest(self.ledger), command.signature, command.word.payee)
                escrow = finished(self._escrow(command.word.escrow), command.word, self.now_ms)
                return self._become(*passed(escrow, self.now_ms))
            case Withhold():
                return self._withhold(command.order, command.signature)
            case Pass():
                return self._pass(self._escrow(command.escrow))
            case PostBond():
                return self._post(command.terms, command.signature)
            case Unbond():
                bond = self._bond(command.wish.bond)
                _check_signer(command.wish.digest(self.ledger), command.signature, bond.terms.account)
                return self._bond_becomes(unbonding(bond, self.now_ms), ())
            case Slash():
                return self._bond_becomes(*lost(self._bond(command.bond), command.one, command.other, self.now_ms))
            case PayBack():
                return self._bond_becomes(*paid_back(self._bond(command.bond), self.now_ms))

    def _deposit(self, deposit: Deposit) -> tuple[Move, ...]:
        if deposit.reference in self.references:
            raise SameDeposit(
                f"A deposit with the reference {deposit.reference!r} was booked already; this one changes nothing."
            )
        moves = self._move((Move(ISSUED, account(deposit.account), deposit.amount_micro),))
        self.references.add(deposit.reference)
        return moves

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
        fee_ppm = fee_at(self.fees, self.now_ms)
        if fee_ppm is not None and terms.fee_ppm != fee_ppm:
            raise OtherFee(
                f"This ledger takes {format_share(fee_ppm)} of what an escrow pays that is opened now, and these terms "
                f"say {format_share(terms.fee_ppm)}: sign them with the fee that it takes."
            )
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

    def _pass(self, before: Escrow) -> tuple[Move, ...]:
        after, moves = passed(before, self.now_ms)
        if after is before:
            raise MoneyRefused(f"The time has brought nothing for {before.name} yet, or all that it brings.")
        return self._become(after, moves)

    def _post(self, terms: BondTerms, signature: bytes) -> tuple[Move, ...]:
        name = terms.bond_id(self.ledger)
        _check_signer(name, signature, terms.account)
        if name in self.bonds:
            raise SameBond(f"{self.bonds[name].name} was posted already; draw another nonce for another one.")
        return self._bond_becomes(*posted(terms, self.ledger, self.now_ms))

    def _bond(self, name: bytes) -> Bond:
        if name not in self.bonds:
            raise UnknownBond(f"This ledger has no bond {name.hex()[:12]}.")
        return self.bonds[name]

    def _escrow(self, name: bytes) -> Escrow:
        if name not in self.escrows:
            raise UnknownEscrow(f"This ledger has no escrow {name.hex()[:12]}.")
        return self.escrows[name]

    def _become(self, escrow: Escrow, moves: tuple[Move, ...]) -> tuple[Move, ...]:
        self._move(moves)
        self.escrows[escrow.escrow_id] = escrow
        return moves

    def _bond_becomes(self, bond: Bond, moves: tuple[Move, ...]) -> tuple[Move, ...]:
        self._move(moves)
        self.bonds[bond.bond_id] = bond
        return moves

    def _move(self, moves: tuple[Move, ...]) -> tuple[Move, ...]:
        self.balances.update(moved(self.balances, moves))
        return moves


def _check_signer(digest: bytes, signature: bytes, wanted: bytes, *also: bytes) -> None:
    if signer_of(digest, signature) not in (wanted, *also):
        raise NotSigned(f"This is {address_text(wanted)}'s to sign, and does not carry its signature for this ledger.")
