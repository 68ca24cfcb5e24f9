"""Keys and signed requests for tests of ledgers."""

from __future__ import annotations

from shoal.identity import Envelope, KeyPair
from shoal.identity.accounts import AccountKey
from shoal.ledger.commands import Admit, Close, Finish, Open, PostBond, SetFee, Slash, TopUp, Unbond, Withdraw
from shoal.protocol.holds import Hold
from shoal.protocol.messages import sign
from shoal.protocol.money import (
    DAY_MS,
    Admission,
    BondTerms,
    Closing,
    EscrowTerms,
    FeeTable,
    Finished,
    HouseLedger,
    LedgerName,
    Payee,
    SignedVoucher,
    ToppingUp,
    Unbonding,
    Voucher,
    Withdrawal,
    sign_voucher,
)
from shoal.protocol.prices import Price
from shoal.quantities.money import MICRO

OPERATOR = KeyPair.from_seed(bytes([9] * 32))
LEDGER = HouseLedger(OPERATOR.node_id, "USD")
CLIENT, DRIVER, *NODES = (AccountKey(bytes([number] * 32)) for number in range(1, 5))
SELLERS = [KeyPair.from_seed(bytes([number] * 32)) for number in (1, 2)]
FOR_EVER_MS = 1 << 50


def an_escrow(
    amount_micro: int = 1000,
    most_micro: int = 800,
    nonce: int = 0,
    expires_ms: int = FOR_EVER_MS,
    fee_ppm: int = 20_000,
    auditor: bytes = bytes(20),
    locked_until_ms: int = 0,
    ledger: LedgerName = LEDGER,
) -> tuple[Open, bytes]:
    terms = EscrowTerms(
        payer=CLIENT.address, signer=DRIVER.address, cap_micro=amount_micro, auditor=auditor,
        amount_micro=amount_micro, fee_ppm=fee_ppm, holdback_ppm=100_000, notice_ms=100, audit_ms=500,
        expires_ms=expires_ms, payees=tuple(Payee(node.address, most_micro) for node in NODES), quote=bytes(32),
        nonce=nonce.to_bytes(32), locked_until_ms=locked_until_ms,
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


def a_fee_table(number: int, from_ms: int, fee_ppm: int, operator: KeyPair = OPERATOR) -> SetFee:
    table = FeeTable(currency="USD", number=number, from_ms=from_ms, fee_ppm=fee_ppm)
    return SetFee(sign(operator, table).to_bytes())


def a_close(escrow: bytes) -> Close:
    wish = Closing(escrow)
    return Close(wish, CLIENT.sign(wish.digest(LEDGER)))


def an_admission(escrow: bytes, node: AccountKey, most: int, key: AccountKey = DRIVER) -> Admit:
    admission = Admission(escrow, node.address, most)
    return Admit(admission, key.sign(admission.digest(LEDGER)))


def a_top_up(escrow: bytes, amount: int, number: int, expires_ms: int = FOR_EVER_MS) -> TopUp:
    order = ToppingUp(escrow=escrow, amount_micro=amount, cap_micro=amount, expires_ms=expires_ms, number=number)
    return TopUp(order, CLIENT.sign(order.digest(LEDGER)))


def a_finish(escrow: bytes, node: AccountKey, amount: int) -> Finish:
    word = Finished(escrow, node.address, amount)
    return Finish(word, node.sign(word.digest(LEDGER)))


def a_bond(node: KeyPair, nonce: int, ledger: LedgerName = LEDGER) -> tuple[PostBond, bytes]:
    terms = BondTerms(
        account=CLIENT.address, network="shoal", node=node.node_id, amount_micro=MICRO, notice_ms=DAY_MS,
        nonce=nonce.to_bytes(32),
    )  # fmt: skip
    name = terms.bond_id(ledger)
    return PostBond(terms, CLIENT.sign(name)), name


def an_unbond(bond: bytes) -> Unbond:
    wish = Unbonding(bond)
    return Unbond(wish, CLIENT.sign(wish.digest(LEDGER)))


def a_hold(node: KeyPair, client: int) -> Envelope:
    """Of its only slot, for ever."""
    hold = Hold(
        slot=0, number=client, client=bytes([client] * 32), work="train", from_ms=0, until_ms=FOR_EVER_MS,
        price=Price(1), ledger=LEDGER, payer=CLIENT.address, payee=NODES[0].address,
    )  # fmt: skip
    return sign(node, hold)


def a_slash(bond: bytes, node: KeyPair) -> Slash:
    return Slash(bond, a_hold(node, 1).to_bytes(), a_hold(node, 2).to_bytes())
