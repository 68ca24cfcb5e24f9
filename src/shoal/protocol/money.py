"""Ledgers, vouchers, checkpoints, and who is paid where, as they travel and are signed.

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
from shoal.identity import Envelope, Hash, KeyPair, NodeId, blake3_hash, short_id
from shoal.identity.accounts import AccountKey, AccountSignature, Address, address_text, keccak_256, signer_of
from shoal.identity.typed_data import Domain, StructType
from shoal.protocol.messages import DEFAULT_NETWORK, Record, open_record, sign
from shoal.protocol.prices import Currency
from shoal.quantities.money import AMOUNT_MAX, MICRO

Amount = Annotated[int, Meta(ge=0, le=AMOUNT_MAX)]
"""Millionths of a currency's unit."""
LineNumber = Annotated[int, Meta(ge=1, le=1 << 62)]
"""Of a ledger's journal."""
VOUCHER = StructType(
    "Voucher", (("bytes32", "escrow"), ("address", "payee"), ("uint256", "amount"), ("bytes32", "work"))
)
PAYEE = StructType("Payee", (("address", "account"), ("uint256", "most")))
ESCROW = StructType(
    "Escrow",
    (
        ("address", "payer"), ("address", "signer"), ("uint256", "cap"), ("address", "auditor"), ("uint256", "amount"),
        ("uint256", "fee"), ("uint256", "holdback"), ("uint256", "notice"), ("uint256", "audit"),
        ("uint256", "expires"), ("bytes32", "payees"), ("bytes32", "quote"), ("bytes32", "nonce"),
    ),
)  # fmt: skip
LOCKED_ESCROW = StructType("LockedEscrow", (*ESCROW.fields, ("uint256", "locked")))
CLOSING = StructType("Closing", (("bytes32", "escrow"),))
WITHHOLDING = StructType(
    "Withholding", (("bytes32", "escrow"), ("address", "payee"), ("uint256", "amount"), ("bytes32", "evidence"))
)
WITHDRAWAL = StructType(
    "Withdrawal", (("address", "account"), ("uint256", "amount"), ("string", "to"), ("uint256", "number"))
)
ADMISSION = StructType("Admission", (("bytes32", "escrow"), ("address", "account"), ("uint256", "most")))
TOP_UP = StructType(
    "TopUp",
    (
        ("bytes32", "escrow"), ("uint256", "amount"), ("uint256", "cap"), ("uint256", "expires"),
        ("uint256", "number"),
    ),
)  # fmt: skip
FINISHED = StructType("Finished", (("bytes32", "escrow"), ("address", "payee"), ("uint256", "amount")))
PAYING_FOR = StructType("PayingFor", (("bytes32", "escrow"), ("bytes32", "client")))
BOND = StructType(
    "Bond",
    (
        ("address", "account"), ("string", "network"), ("bytes32", "node"), ("uint256", "amount"),
        ("uint256", "notice"), ("bytes32", "nonce"),
    ),
)  # fmt: skip
UNBONDING = StructType("Unbonding", (("bytes32", "bond"),))
PAYOUT = StructType("Payout", (("string", "network"), ("bytes32", "node"), ("address", "account")))
PAYEES_MAX = 1024
DAY_MS = 86_400_000
NOTICE_MAX_MS, AUDIT_MAX_MS = 7 * DAY_MS, 30 * DAY_MS
EXTENSION_MAX_MS = 30 * DAY_MS
"""By which an escrow may come to end later than its terms say, however often it is topped up: payees know beforehand by
when they have what is held back."""
BOND_LEAST_MICRO = MICRO
"""So that nobody fills a ledger with bonds of next to nothing."""
BOND_NOTICE_LEAST_MS, BOND_NOTICE_MAX_MS = DAY_MS, 30 * DAY_MS
"""So long, at least, who was promised what another was promised too has for finding that out."""
TIME_MAX_MS = (1 << 53) - 1
DOMAIN_NAME, DOMAIN_VERSION = "Shoal", "1"


class BadVoucher(BadRecord):
    """A voucher is not signed by who may sign it, or says what it cannot."""

    code = "SH-280"


class BadPayout(BadRecord):
    """A node names an account that it is paid at, and the account did not agree to it."""

    code = "SH-283"


class BadCheckpoint(BadRecord):
    """A checkpoint is not of this ledger: another operator signed it, or it is of another currency."""

    code = "SH-284"


class BadFeeTable(BadRecord):
    """A fee table is not of this ledger: another operator signed it, or it is of another currency."""

    code = "SH-286"


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


def ledger_text(ledger: LedgerName) -> str:
    """As it is written where people read it."""
    if isinstance(ledger, HouseLedger):
        return f"{ledger.operator.hex()}/{ledger.currency}"
    return f"chain {ledger.chain_id} {address_text(ledger.contract)}/{ledger.currency}"


PartsPerMillion = Annotated[int, Meta(ge=0, le=1_000_000)]


class Payee(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    account: Address
    most_micro: Amount
    """It never gets more of the escrow, whatever a voucher says."""


class EscrowTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a payer sets aside, for whom, and what becomes of it; signed by the payer."""

    payer: Address
    signer: Address
    """May sign vouchers beside the payer, admit payees and ask for the rest: the key of a driver that works while the
    payer is away."""
    cap_micro: Amount
    """To which `signer` may go, of all payees together."""
    auditor: Address
    """May withhold from what is held back, and nothing else."""
    amount_micro: Annotated[int, Meta(ge=1, le=AMOUNT_MAX)]
    fee_ppm: PartsPerMillion
    """Of what is paid, to the ledger."""
    holdback_ppm: PartsPerMillion
    """Of what is paid, held back until audits are over."""
    notice_ms: Annotated[int, Meta(ge=0, le=NOTICE_MAX_MS)]
    """From when the payer asks for the rest until it gets it: payees redeem their last vouchers meanwhile."""
    audit_ms: Annotated[int, Meta(ge=0, le=AUDIT_MAX_MS)]
    """From the end until what was held back is paid."""
    expires_ms: Annotated[int, Meta(ge=0, le=TIME_MAX_MS)]
    """It ends then at the latest."""
    payees: Annotated[tuple[Payee, ...], Meta(min_length=1, max_length=PAYEES_MAX)]
    quote: Hash
    """The id of the quote that it is for."""
    nonce: Hash
    """Drawn anew for each escrow."""
    locked_until_ms: Annotated[int, Meta(ge=0, le=TIME_MAX_MS)] = 0
    """Before that it neither ends nor pays anybody, so that who has seen it can count on it."""

    def struct_hash(self) -> bytes:
        payees = keccak_256(b"".join(PAYEE.hash_of((one.account, one.most_micro)) for one in self.payees))
        values = (
            self.payer, self.signer, self.cap_micro, self.auditor, self.amount_micro, self.fee_ppm,
            self.holdback_ppm, self.notice_ms, self.audit_ms, self.expires_ms, payees, self.quote, self.nonce,
        )  # fmt: skip
        if self.locked_until_ms:
            return LOCKED_ESCROW.hash_of((*values, self.locked_until_ms))
        return ESCROW.hash_of(values)

    def escrow_id(self, ledger: LedgerName) -> bytes:
        """What is signed names the escrow."""
        return _escrow_id(self, ledger)


@lru_cache(maxsize=16)
def _escrow_id(terms: EscrowTerms, ledger: LedgerName) -> bytes:
    """Asked for several times in a row; with 1,024 payees it takes 14 ms."""
    return domain_of(ledger).digest(terms.struct_hash())


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


class Closing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payer asks for the rest of an escrow, or its signer does for the payer."""

    escrow: Hash

    def digest(self, ledger: LedgerName) -> bytes:
        return domain_of(ledger).digest(CLOSING.hash_of((self.escrow,)))


class Admission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The payer or the signer of an escrow names a payee more, or lets one get more than before."""

    escrow: Hash
    account: Address
    most_micro: Amount

    def digest(self, ledger: LedgerName) -> bytes:
        return domain_of(ledger).digest(ADMISSION.hash_of((self.escrow, self.account, self.most_micro)))


class ToppingUp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The payer puts more into an escrow, or lets it last longer, or both; good once, whoever hands it in."""

    escrow: Hash
    amount_micro: Amount
    """More than there was."""
    cap_micro: Amount
    """So much further the escrow's signer may go."""
    expires_ms: Annotated[int, Meta(ge=0, le=TIME_MAX_MS)]
    """It ends then at the latest; not before the moment that was named until now."""
    number: Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
    """How many of this escrow there are with this one."""

    def digest(self, ledger: LedgerName) -> bytes:
        values = (self.escrow, self.amount_micro, self.cap_micro, self.expires_ms, self.number)
        return domain_of(ledger).digest(TOP_UP.hash_of(values))


class Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A payee wants no more of an escrow than the amount that it has redeemed."""

    escrow: Hash
    payee: Address
    amount_micro: Amount

    def digest(self, ledger: LedgerName) -> bytes:
        return domain_of(ledger).digest(FINISHED.hash_of((self.escrow, self.payee, self.amount_micro)))


class PayingFor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An escrow pays for what nodes do for this client: signed by its payer or its signer, for nodes; the ledger sees
    nothing of it. Everybody sees escrows in a journal, and could name one."""

    escrow: Hash
    client: NodeId

    def digest(self, ledger: LedgerName) -> bytes:
        return domain_of(ledger).digest(PAYING_FOR.hash_of((self.escrow, self.client)))


class Withholding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The auditor withholds something of what was held back of a payee."""

    escrow: Hash
    payee: Address
    amount_micro: Amount
    """In all, with what was withheld before: of several orders the one with the highest amount counts."""
    evidence: Hash
    """The id of the signed record that shows why."""

    def digest(self, ledger: LedgerName) -> bytes:
        values = (self.escrow, self.payee, self.amount_micro, self.evidence)
        return domain_of(ledger).digest(WITHHOLDING.hash_of(values))


class Withdrawal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An account takes money out of the ledger; signed by the account, and good once, whoever hands it in."""

    account: Address
    amount_micro: Annotated[int, Meta(ge=1, le=AMOUNT_MAX)]
    to: Annotated[str, Meta(pattern=r"\A[ -~]{1,128}\Z")]
    """Where the operator pays it, as the two have agreed: an address on a chain, the number of a payment. Journals are
    shown to strangers: what they should not read stands here as its hash."""
    number: Annotated[int, Meta(ge=1, le=(1 << 53) - 1)]
    """How many withdrawals of the account there are with this one. Of two that are signed with one number, only one is
    ever carried out: so one that waits for money is called back by using its number."""

    def digest(self, ledger: LedgerName) -> bytes:
        return domain_of(ledger).digest(WITHDRAWAL.hash_of((self.account, self.amount_micro, self.to, self.number)))


class BondTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An account puts money at stake for a node; signed by the account. The node need not agree: it is the account's
    money that is lost."""

    account: Address
    network: Annotated[str, Meta(min_length=1, max_length=32)]
    """On which the node's Holds count."""
    node: NodeId
    amount_micro: Annotated[int, Meta(ge=BOND_LEAST_MICRO, le=AMOUNT_MAX)]
    notice_ms: Annotated[int, Meta(ge=BOND_NOTICE_LEAST_MS, le=BOND_NOTICE_MAX_MS)]
    """From when the account asks for it until it is paid back."""
    nonce: Hash
    """Drawn anew for each bond."""

    def bond_id(self, ledger: LedgerName) -> bytes:
        """What is signed names the bond."""
        values = (self.account, self.network, self.node, self.amount_micro, self.notice_ms, self.nonce)
        return domain_of(ledger).digest(BOND.hash_of(values))


class Unbonding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An account asks for its bond."""

    bond: Hash

    def digest(self, ledger: LedgerName) -> bytes:
        return domain_of(ledger).digest(UNBONDING.hash_of((self.bond,)))


def sign_voucher(key: AccountKey, ledger: LedgerName, voucher: Voucher) -> SignedVoucher:
    return SignedVoucher(voucher, key.sign(voucher.digest(ledger)))


class Payout(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The node that signs this is paid at `account`, on whichever ledger, and the account agrees. Of two by one node
    the one with the higher sequence counts: a node may go to another account."""

    KIND: ClassVar[str] = "payout"
    MAX_BYTES: ClassVar[int] = 512

    account: Address
    sequence: Annotated[int, Meta(ge=0, le=1 << 53)]
    consent: AccountSignature
    """Of the account, over `payout_digest`: nobody binds another's account to a node of its own."""


def payout_digest(network: str, node: bytes, account: bytes) -> bytes:
    """What an account signs once for a node that earns for it. Its wallet need not be where the node is."""
    return Domain(DOMAIN_NAME, DOMAIN_VERSION).digest(PAYOUT.hash_of((network, node, account)))


def sign_payout(
    key: KeyPair, account: bytes, consent: bytes, sequence: int, network: str = DEFAULT_NETWORK
) -> Envelope:
    """By the node, with what the account has signed. Raises BadPayout where that is not this."""
    payout = Payout(account=account, sequence=sequence, consent=consent)
    _check_consent(payout, key.node_id, network)
    return sign(key, payout, network)


def open_payout(envelope: Envelope, network: str = DEFAULT_NETWORK) -> Payout:
    """Of the node `envelope.signer`. Raises BadPayout, and what `open_record` does."""
    payout = open_record(envelope, Payout, network)
    _check_consent(payout, envelope.signer, network)
    return payout


def _check_consent(payout: Payout, node: bytes, network: str) -> None:
    if signer_of(payout_digest(network, node, payout.account), payout.consent) != payout.account:
        raise BadPayout(
            f"Node {short_id(node)} names {address_text(payout.account)} as the account that it is paid at, and that "
            f"account has not signed for it on network {network!r}; it is paid nothing there."
        )


class Checkpoint(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The operator of the house ledger of this currency signs that its journal has this line: by its hash all lines
    before it, too. Whoever keeps it sees what is altered later, or left out."""

    KIND: ClassVar[str] = "checkpoint"
    MAX_BYTES: ClassVar[int] = 128

    currency: Currency
    number: LineNumber
    hash: Hash


def open_checkpoint(envelope: Envelope, ledger: LedgerName, network: str = DEFAULT_NETWORK) -> Checkpoint:
    """Raises BadCheckpoint, and what `open_record` does."""
    checkpoint = open_record(envelope, Checkpoint, network)
    if HouseLedger(envelope.signer, checkpoint.currency) != ledger:
        raise BadCheckpoint(
            f"A checkpoint of a ledger in {checkpoint.currency} that {short_id(envelope.signer)} runs says nothing of "
            "this ledger."
        )
    return checkpoint


class FeeTable(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The operator of the house ledger of this currency takes so much of what an escrow pays that is opened from a
    moment on."""

    KIND: ClassVar[str] = "fees"
    MAX_BYTES: ClassVar[int] = 128

    currency: Currency
    number: Annotated[int, Meta(ge=1, le=1 << 31)]
    """How many tables of this ledger there are with this one: of two that hold the newer counts."""
    from_ms: Annotated[int, Meta(ge=0, le=TIME_MAX_MS)]
    fee_ppm: PartsPerMillion


def open_fee_table(envelope: Envelope, ledger: LedgerName, network: str = DEFAULT_NETWORK) -> FeeTable:
    """Raises BadFeeTable, and what `open_record` does."""
    table = open_record(envelope, FeeTable, network)
    if HouseLedger(envelope.signer, table.currency) != ledger:
        raise BadFeeTable(
            f"A fee table of a ledger in {table.currency} that {short_id(envelope.signer)} runs says nothing of this "
            "ledger."
        )
    return table
