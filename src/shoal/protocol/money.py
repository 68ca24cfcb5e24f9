"""Ledgers and vouchers, as they travel and are signed.

A ledger keeps one currency: either a house ledger, which an operator runs and which is named by the operator's NodeId,
or a contract on an EVM chain. A voucher is good at the ledger that it was signed for and nowhere else (EIP-712's
domain); it says how much a payee has earned of an escrow in all, so that of several the one with the highest amount
counts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord
from shoal.identity import Hash, NodeId, blake3_hash
from shoal.identity.accounts import AccountKey, AccountSignature, Address, address_text, signer_of
from shoal.identity.typed_data import Domain, StructType
from shoal.quantities.money import AMOUNT_MAX

Amount = Annotated[int, Meta(ge=0, le=AMOUNT_MAX)]
"""Millionths of a currency's unit."""
Currency = Annotated[str, Meta(pattern=r"\A[A-Z][A-Z0-9]{1,11}\Z")]
VOUCHER = StructType(
    "Voucher", (("bytes32", "escrow"), ("address", "payee"), ("uint256", "amount"), ("bytes32", "work"))
)
DOMAIN_NAME, DOMAIN_VERSION = "Shoal", "1"


class BadVoucher(BadRecord):
    """A voucher is not signed by who may sign it, or says what it cannot."""

    code = "SH-280"


class HouseLedger(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="house", tag_field="ledger"):
    """One that an operator runs."""

    operator: NodeId
    currency: Currency


class ChainLedger(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="chain", tag_field="ledger"):
    """A contract on an EVM chain."""

    chain_id: Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
    contract: Address
    currency: Currency


LedgerName = HouseLedger | ChainLedger


@lru_cache(maxsize=256)
def domain_of(ledger: LedgerName) -> Domain:
    """For signatures that are good at this ledger alone."""
    if isinstance(ledger, ChainLedger):
        return Domain(DOMAIN_NAME, DOMAIN_VERSION, chain_id=ledger.chain_id, contract=ledger.contract)
    salt = blake3_hash(b"shoal/house-ledger/1\0" + ledger.operator + ledger.currency.encode())
    return Domain(DOMAIN_NAME, DOMAIN_VERSION, salt=salt)


class Voucher(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`payee` has earned so much of `escrow` in all, and `work` is the last that it was earned by."""

    MAX_BYTES: ClassVar[int] = 512

    escrow: Hash
    payee: Address
    amount_micro: Amount
    work: Hash
    """The id of a signed record: an accepted Contribution, a receipt of a stage."""

    def digest(self, ledger: LedgerName) -> bytes:
        return domain_of(ledger).digest(VOUCHER.hash_of((self.escrow, self.payee, self.amount_micro, self.work)))


class SignedVoucher(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    voucher: Voucher
    signature: AccountSignature

    def check(self, ledger: LedgerName, signer: bytes) -> None:
        """Raises BadVoucher unless `signer` (an address) signed it for this ledger."""
        if signer_of(self.voucher.digest(ledger), self.signature) != signer:
            raise BadVoucher(
                f"A voucher for escrow {self.voucher.escrow.hex()[:12]} is not signed by {address_text(signer)} for "
                "this ledger; it pays nothing."
            )


def sign_voucher(key: AccountKey, ledger: LedgerName, voucher: Voucher) -> SignedVoucher:
    return SignedVoucher(voucher, key.sign(voucher.digest(ledger)))
