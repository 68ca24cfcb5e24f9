"""A ledger in memory with its journal, and who asks it for something, for tests of the rules of money."""

from __future__ import annotations

from typing import Any

from shoal.identity import Envelope, KeyPair
from shoal.identity.accounts import AccountKey
from shoal.ledger.bonds import Bond
from shoal.ledger.book import Book
from shoal.ledger.commands import (
    Admit,
    Close,
    Command,
    Deposit,
    Finish,
    Open,
    PostBond,
    Redeem,
    Slash,
    TopUp,
    Unbond,
    Withdraw,
    Withhold,
)
from shoal.ledger.escrows import Escrow
from shoal.ledger.journal import BEGINNING, Line, line
from shoal.ledger.moves import Move, account
from shoal.protocol.holds import Hold
from shoal.protocol.messages import sign
from shoal.protocol.money import (
    DAY_MS,
    Admission,
    BondTerms,
    Closing,
    EscrowTerms,
    Finished,
    HouseLedger,
    Payee,
    SignedVoucher,
    ToppingUp,
    Unbonding,
    Voucher,
    Withdrawal,
    Withholding,
    sign_voucher,
)
from shoal.protocol.prices import Price
from shoal.quantities.money import MICRO

LEDGER = HouseLedger(bytes(32), "USD")
OTHER = HouseLedger(bytes(31) + b"\1", "USD")
CLIENT, RIVAL, DRIVER, AUDITOR, *NODES = (AccountKey(bytes([number] * 32)) for number in range(1, 8))
SPONSOR = AccountKey(bytes([8] * 32))
WORK = bytes(32)


def terms(**changed: Any) -> EscrowTerms:
    usual: dict[str, Any] = {
        "payer": CLIENT.address, "signer": DRIVER.address, "cap_micro": 1000, "auditor": AUDITOR.address,
        "amount_micro": 1000, "fee_ppm": 20_000, "holdback_ppm": 100_000, "notice_ms": 100, "audit_ms": 500,
        "expires_ms": 10_000, "payees": tuple(Payee(node.address, 800) for node in NODES[:2]), "quote": bytes(32),
        "nonce": bytes(32),
    }  # fmt: skip
    return EscrowTerms(**{**usual, **changed})


class Desk:
    """A book with its journal, and the requests that come to it."""

    def __init__(self) -> None:
        self.book = Book(LEDGER)
        self.lines: list[Line] = []

    @property
    def balances(self) -> dict[str, int]:
        return self.book.balances

    @property
    def escrows(self) -> dict[bytes, Escrow]:
        return self.book.escrows

    def do(self, command: Command) -> tuple[Move, ...]:
        moves = self.book.apply(command)
        previous = self.lines[-1].hash if self.lines else BEGINNING
        self.lines.append(line(len(self.lines) + 1, self.book.now_ms, command, moves, previous))
        return moves

    def at(self, now_ms: int) -> tuple[Move, ...]:
        self.book.at(now_ms)
        moves: tuple[Move, ...] = ()
        while due := self.book.due():
            for command in due:
                moves += self.do(command)
        return moves

    def deposit(self, address: bytes, amount: int) -> None:
        self.do(Deposit(address, amount, f"mint {len(self.lines)}"))

    def withdraw(self, order: Withdrawal, signature: bytes) -> None:
        self.do(Withdraw(order, signature))

    def open(self, terms: EscrowTerms, signature: bytes) -> None:
        self.do(Open(terms, signature))

    def redeem(self, signed: SignedVoucher) -> None:
        self.do(Redeem(signed))

    def close(self, wish: Closing, signature: bytes) -> tuple[Move, ...]:
        return self.do(Close(wish, signature))

    def withhold(self, order: Withholding, signature: bytes) -> None:
        self.do(Withhold(order, signature))

    def ask_for_the_rest(self, escrow: bytes, key: AccountKey | None = None) -> tuple[Move, ...]:
        wish = Closing(escrow)
        return self.close(wish, (key or CLIENT).sign(wish.digest(LEDGER)))

    def admit(self, escrow: bytes, node: AccountKey, most: int, key: AccountKey) -> tuple[Move, ...]:
        admission = Admission(escrow, node.address, most)
        return self.do(Admit(admission, key.sign(admission.digest(LEDGER))))

    def top_up(self, escrow: bytes, key: AccountKey | None = None, **order: int) -> tuple[Move, ...]:
        """By 0, and to the end as it stands, where nothing else is said."""
        usual = {"amount_micro": 0, "cap_micro": 0, "expires_ms": 10_000, "number": 1}
        wanted = ToppingUp(escrow=escrow, **{**usual, **order})
        return self.do(TopUp(wanted, (key or CLIENT).sign(wanted.digest(LEDGER))))

    def finish(self, escrow: bytes, node: AccountKey, amount: int, key: AccountKey | None = None) -> tuple[Move, ...]:
        word = Finished(escrow, node.address, amount)
        return self.do(Finish(word, (key or node).sign(word.digest(LEDGER))))

    @property
    def bonds(self) -> dict[bytes, Bond]:
        return self.book.bonds

    def post(self, terms: BondTerms, key: AccountKey) -> bytes:
        name = terms.bond_id(LEDGER)
        self.do(PostBond(terms, key.sign(name)))
        return name

    def unbond(self, bond: bytes, key: AccountKey) -> tuple[Move, ...]:
        wish = Unbonding(bond)
        return self.do(Unbond(wish, key.sign(wish.digest(LEDGER))))

    def slash(self, bond: bytes, one: bytes, other: bytes) -> tuple[Move, ...]:
        return self.do(Slash(bond, one, other))


def a_book(money: int = 5000) -> Desk:
    book = Desk()
    book.deposit(CLIENT.address, money)
    return book


def opened(book: Desk, wanted: EscrowTerms) -> bytes:
    name = wanted.escrow_id(book.book.ledger)
    book.open(wanted, CLIENT.sign(name))
    return name


def voucher(escrow: bytes, node: AccountKey, amount: int, key: AccountKey = CLIENT) -> SignedVoucher:
    return sign_voucher(key, LEDGER, Voucher(escrow=escrow, payee=node.address, amount_micro=amount, work=WORK))


def has(book: Desk, key: AccountKey) -> int:
    return book.balances.get(account(key.address), 0)


def bond_terms(node: KeyPair, **changed: Any) -> BondTerms:
    usual: dict[str, Any] = {
        "account": SPONSOR.address, "network": "shoal", "node": node.node_id, "amount_micro": 2 * MICRO,
        "notice_ms": DAY_MS, "nonce": bytes(32),
    }  # fmt: skip
    return BondTerms(**{**usual, **changed})


def a_hold(node: KeyPair, network: str = "shoal", **changed: Any) -> Envelope:
    """Of slot 0 for one client, from 0 ms to 15 s."""
    usual: dict[str, Any] = {
        "slot": 0, "number": 1, "client": bytes([1] * 32), "work": "train", "from_ms": 0, "until_ms": 15_000,
        "price": Price(350_000), "ledger": LEDGER, "payer": CLIENT.address, "payee": NODES[0].address,
    }  # fmt: skip
    return sign(node, Hold(**{**usual, **changed}), network)
