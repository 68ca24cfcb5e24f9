"""Keys and signed requests for tests of ledgers."""

from __future__ import annotations

from shoal.identity.accounts import AccountKey
from shoal.ledger.commands import Open, Withdraw
from shoal.protocol.money import (
    EscrowTerms,
    HouseLedger,
    LedgerName,
    Payee,
    SignedVoucher,
    Voucher,
    Withdrawal,
    sign_voucher,
)

LEDGER = HouseLedger(bytes(32), "USD")
CLIENT, DRIVER, *NODES = (AccountKey(bytes([number] * 32)) for number in range(1, 5))
FOR_EVER_MS = 1 << 50


def an_escrow(
    amount_micro: int = 1000,
    most_micro: int = 800,
    nonce: int = 0,
    expires_ms: int = FOR_EVER_MS,
    fee_ppm: int = 20_000,
    auditor: bytes = bytes(20),
    ledger: LedgerName = LEDGER,
) -> tuple[Open, bytes]:
    terms = EscrowTerms(
        payer=CLIENT.address, signer=DRIVER.address, cap_micro=amount_micro, auditor=auditor,
        amount_micro=amount_micro, fee_ppm=fee_ppm, holdback_ppm=100_000, notice_ms=100, audit_ms=500,
        expires_ms=expires_ms, payees=tuple(Payee(node.address, most_micro) for node in NODES), quote=bytes(32),
        nonce=nonce.to_bytes(32),
    )  # fmt: skip
    name = terms.escrow_id(ledger)
    return Open(terms, CLIENT.sign(name)), name


def a_voucher(
    escrow: bytes, node: AccountKey, amount: int, key: AccountKey = DRIVER, ledger: LedgerName = LEDGER
) -> SignedVoucher:
    return sign_voucher(key, ledger, Voucher(escrow=escrow, payee=node.address, amount_micro=amount, work=bytes(32)))


def a_withdrawal(key: AccountKey, amount: int, number: int, ledger: LedgerName = LEDGER) -> Withdraw:
    order = Withdrawal(account=key.address, amount_micro=amount, to="payment 7", number=number)
    return Withdraw(order, key.sign(order.digest(ledger)))
