"""Accounts and what they sign, beside the library that wallets are tested with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wallet import Account, encode_typed_data

from shoal.identity import BadSignature, Envelope, KeyPair
from shoal.identity.accounts import (
    ORDER,
    AccountKey,
    BadAccount,
    BadAccountKey,
    address_text,
    create_account,
    load_account,
    parse_address,
    signer_of,
)
from shoal.identity.typed_data import StructType
from shoal.protocol.messages import VersionMismatch, encode, sign
from shoal.protocol.money import (
    DAY_MS,
    Admission,
    BadPayout,
    BadVoucher,
    BondTerms,
    ChainLedger,
    Finished,
    HouseLedger,
    LedgerName,
    PayingFor,
    Payout,
    SignedVoucher,
    ToppingUp,
    Unbonding,
    Voucher,
    Withdrawal,
    domain_of,
    open_payout,
    payout_digest,
    sign_payout,
    sign_voucher,
)
from shoal.quantities.money import AMOUNT_MAX, MICRO

SECRETS = st.integers(1, ORDER - 1).map(lambda number: number.to_bytes(32))
BYTES_32 = st.binary(min_size=32, max_size=32)
ADDRESSES = st.binary(min_size=20, max_size=20)
VOUCHERS = st.builds(
    Voucher, escrow=BYTES_32, payee=ADDRESSES, amount_micro=st.integers(0, (1 << 63) - 1), work=BYTES_32
)
LEDGERS = st.one_of(
    st.builds(HouseLedger, BYTES_32, st.just("USD")),
    st.builds(ChainLedger, st.integers(1, (1 << 53) - 1), ADDRESSES, st.just("USDC")),
)


def as_wallets_sign(ledger: LedgerName | None, name: str, fields: dict[str, tuple[str, Any]]) -> Any:
    """The same struct as EIP-712 writes it in JSON, its fields as (type, value); not for a ledger, if None."""
    domain: dict[str, Any] = {"name": "Shoal", "version": "1"}
    if isinstance(ledger, ChainLedger):
        domain |= {"chainId": ledger.chain_id, "verifyingContract": address_text(ledger.contract)}
    elif ledger is not None:
        domain |= {"salt": domain_of(ledger).salt}
    kinds = {name: [{"name": each, "type": kind} for each, (kind, _) in fields.items()]}
    return encode_typed_data(domain, kinds, {each: value for each, (_, value) in fields.items()})


@given(SECRETS, LEDGERS, VOUCHERS)
def test_a_voucher_is_signed_as_a_wallet_signs_it(secret: bytes, ledger: LedgerName, voucher: Voucher) -> None:
    key, theirs = AccountKey(secret), Account.from_key(secret)
    assert address_text(key.address) == theirs.address
    message = as_wallets_sign(
        ledger,
        "Voucher",
        {
            "escrow": ("bytes32", voucher.escrow), "payee": ("address", address_text(voucher.payee)),
            "amount": ("uint256", voucher.amount_micro), "work": ("bytes32", voucher.work),
        },
    )  # fmt: skip
    signed = sign_voucher(key, ledger, voucher)
    assert Account.recover_message(message, signature=signed.signature) == theirs.address
    assert theirs.sign_message(message).signature == signed.signature
    signed.check(ledger, key.address)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(signed), type=SignedVoucher)
    assert again == signed


@given(SECRETS, LEDGERS, st.integers(1, AMOUNT_MAX), st.from_regex(r"\A[ -~]{1,128}\Z"), st.integers(1, (1 << 53) - 1))
def test_a_withdrawal_is_signed_as_a_wallet_signs_it(
    secret: bytes, ledger: LedgerName, amount: int, to: str, number: int
) -> None:
    key = AccountKey(secret)
    order = Withdrawal(account=key.address, amount_micro=amount, to=to, number=number)
    message = as_wallets_sign(
        ledger,
        "Withdrawal",
        {
            "account": ("address", address_text(key.address)), "amount": ("uint256", amount), "to": ("string", to),
            "number": ("uint256", number),
        },
    )  # fmt: skip
    assert Account.from_key(secret).sign_message(message).signature == key.sign(order.digest(ledger))


AMOUNTS = st.integers(0, AMOUNT_MAX)
COUNTS = st.integers(1, (1 << 53) - 1)


@given(SECRETS, LEDGERS, BYTES_32, ADDRESSES, AMOUNTS, AMOUNTS, COUNTS, COUNTS)
def test_what_becomes_of_an_escrow_is_signed_as_a_wallet_signs_it(
    secret: bytes, ledger: LedgerName, escrow: bytes, account: bytes, amount: int, cap: int, expires: int, number: int
) -> None:
    where, whom = ("bytes32", escrow), ("address", address_text(account))
    order = ToppingUp(escrow=escrow, amount_micro=amount, cap_micro=cap, expires_ms=expires, number=number)
    for what, name, fields in (
        (Admission(escrow, account, amount), "Admission",
         {"escrow": where, "account": whom, "most": ("uint256", amount)}),
        (order, "TopUp", {"escrow": where, "amount": ("uint256", amount), "cap": ("uint256", cap),
                          "expires": ("uint256", expires), "number": ("uint256", number)}),
        (Finished(escrow, account, amount), "Finished",
         {"escrow": where, "payee": whom, "amount": ("uint256", amount)}),
        (PayingFor(escrow, bytes(32)), "PayingFor", {"escrow": where, "client": ("bytes32", bytes(32))}),
    ):  # fmt: skip
        message = as_wallets_sign(ledger, name, fields)
        assert Account.from_key(secret).sign_message(message).signature == AccountKey(secret).sign(what.digest(ledger))


@given(SECRETS, LEDGERS, BYTES_32, st.text("abc -", min_size=1, max_size=32), st.integers(MICRO, AMOUNT_MAX), BYTES_32)
def test_a_bond_is_signed_as_a_wallet_signs_it(
    secret: bytes, ledger: LedgerName, node: bytes, network: str, amount: int, nonce: bytes
) -> None:
    key, theirs = AccountKey(secret), Account.from_key(secret)
    terms = BondTerms(
        account=key.address, network=network, node=node, amount_micro=amount, notice_ms=DAY_MS, nonce=nonce
    )
    message = as_wallets_sign(
        ledger,
        "Bond",
        {
            "account": ("address", address_text(key.address)), "network": ("string", network),
            "node": ("bytes32", node), "amount": ("uint256", amount), "notice": ("uint256", DAY_MS),
            "nonce": ("bytes32", nonce),
        },
    )  # fmt: skip
    assert theirs.sign_message(message).signature == key.sign(terms.bond_id(ledger))
    message = as_wallets_sign(ledger, "Unbonding", {"bond": ("bytes32", nonce)})
    assert theirs.sign_message(message).signature == key.sign(Unbonding(nonce).digest(ledger))


@given(SECRETS, LEDGERS, LEDGERS, VOUCHERS, st.integers(0, 64), st.integers(1, 255))
def test_nothing_of_a_voucher_can_be_changed(
    secret: bytes, ledger: LedgerName, other: LedgerName, voucher: Voucher, at: int, flip: int
) -> None:
    key = AccountKey(secret)
    signed = sign_voucher(key, ledger, voucher)
    changed = [
        msgspec.structs.replace(voucher, amount_micro=voucher.amount_micro ^ 1),
        msgspec.structs.replace(voucher, payee=bytes(one ^ flip for one in voucher.payee)),
        msgspec.structs.replace(voucher, escrow=bytes(one ^ flip for one in voucher.escrow)),
        msgspec.structs.replace(voucher, work=bytes(one ^ flip for one in voucher.work)),
    ]
    broken = bytearray(signed.signature)
    broken[at] ^= flip
    for one in (*(SignedVoucher(each, signed.signature) for each in changed), SignedVoucher(voucher, bytes(broken))):
        with pytest.raises(BadVoucher, match="pays nothing"):
            one.check(ledger, key.address)
    if other != ledger:
        with pytest.raises(BadVoucher):
            signed.check(other, key.address)


NODE, STRANGER = (KeyPair.from_seed(seed * 32) for seed in (b"n", b"s"))
EARNER, RICH = (AccountKey(bytes([number] * 32)) for number in (1, 2))


def consent(account: AccountKey, node: KeyPair = NODE, network: str = "shoal") -> bytes:
    return account.sign(payout_digest(network, node.node_id, account.address))


@given(SECRETS, BYTES_32, st.from_regex(r"\A[a-z]{1,32}\Z"))
def test_an_account_agrees_to_be_paid_for_a_node_as_a_wallet_signs(secret: bytes, node: bytes, network: str) -> None:
    address = address_text(AccountKey(secret).address)
    message = as_wallets_sign(
        None, "Payout", {"network": ("string", network), "node": ("bytes32", node), "account": ("address", address)}
    )
    signature = Account.from_key(secret).sign_message(message).signature
    assert signature == AccountKey(secret).sign(payout_digest(network, node, parse_address(address)))


def test_a_node_is_paid_at_an_account_that_agrees() -> None:
    envelope = sign_payout(NODE, EARNER.address, consent(EARNER), sequence=3)
    arrived = Envelope.from_bytes(envelope.to_bytes(), Payout.MAX_BYTES)
    payout = open_payout(arrived)
    assert (arrived.signer, payout.account, payout.sequence) == (NODE.node_id, EARNER.address, 3)
    largest = sign_payout(NODE, EARNER.address, consent(EARNER, network="n" * 32), 1 << 53, "n" * 32)
    assert open_payout(largest, "n" * 32).sequence == 1 << 53


@pytest.mark.parametrize(
    ("node", "account", "signature"),
    [
        (NODE, RICH, consent(EARNER)),
        (NODE, RICH, bytes(65)),
        (STRANGER, EARNER, consent(EARNER)),
        (NODE, EARNER, consent(EARNER, network="testnet")),
        (NODE, EARNER, sign_voucher(EARNER, HouseLedger(bytes(32), "USD"), Voucher(
            escrow=bytes(32), payee=EARNER.address, amount_micro=1, work=bytes(32))).signature),
    ],
    ids=["of another account", "of nobody", "for another node", "for another network", "to something else"],
)  # fmt: skip
def test_nobody_binds_an_account_that_did_not_agree(node: KeyPair, account: AccountKey, signature: bytes) -> None:
    said = f"Node {node.node_id.hex()[:8]} names {address_text(account.address)} .* has not signed for it on network"
    with pytest.raises(BadPayout, match=said):
        sign_payout(node, account.address, signature, sequence=1)
    forged = sign(node, Payout(account=account.address, sequence=1, consent=signature))
    with pytest.raises(BadPayout, match=said):
        open_payout(forged)


def test_a_payout_counts_in_the_name_of_its_node_and_on_its_network() -> None:
    envelope = sign_payout(NODE, EARNER.address, consent(EARNER), sequence=1)
    with pytest.raises(BadSignature):
        open_payout(msgspec.structs.replace(envelope, signer=STRANGER.node_id))
    later = encode(msgspec.structs.replace(open_payout(envelope), sequence=2))
    with pytest.raises(BadSignature):
        open_payout(msgspec.structs.replace(envelope, body=later))
    with pytest.raises(VersionMismatch, match="network"):
        open_payout(envelope, "testnet")
    elsewhere = sign(NODE, open_payout(envelope), "testnet")
    with pytest.raises(BadPayout, match="on network 'testnet'"):
        open_payout(elsewhere, "testnet")


@given(SECRETS, BYTES_32)
def test_a_signature_has_one_form(secret: bytes, digest: bytes) -> None:
    key = AccountKey(secret)
    signature = key.sign(digest)
    assert signer_of(digest, signature) == key.address and key.sign(digest) == signature
    mirrored = ORDER - int.from_bytes(signature[32:64])
    other = signature[:32] + mirrored.to_bytes(32) + bytes((55 - signature[64],))
    assert Account._recover_hash(digest, signature=other) == address_text(key.address), "the curve takes both"
    assert signer_of(digest, other) is None


@given(st.binary(max_size=80), BYTES_32)
def test_what_is_no_signature_has_no_signer(signature: bytes, digest: bytes) -> None:
    found = signer_of(digest, signature)
    assert found is None or len(found) == 20


@given(ADDRESSES)
def test_addresses_are_written_with_a_checksum(address: bytes) -> None:
    text = address_text(address)
    assert parse_address(text) == address == parse_address(text.lower()) == parse_address("0x" + text[2:].upper())
    letter = next((at for at in range(2, 42) if text[at].isalpha()), None)
    wrong = None if letter is None else text[:letter] + text[letter].swapcase() + text[letter + 1 :]
    if wrong is not None and wrong[2:] not in (wrong[2:].lower(), wrong[2:].upper()):
        with pytest.raises(BadAccount, match="its checksum does not fit"):
            parse_address(wrong)


@pytest.mark.parametrize(
    "text", ["", "0x", "0x12", "12" * 21, "0x" + "g" * 40, "0x" + "1" * 41, "0x" + " 1" * 20, "0x" + "٣" * 40]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadAccount, match="is not the address of an account"):
        parse_address(text)


def test_a_key_file_is_read_again_and_never_replaced(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "account"
    key = create_account(place)
    assert place.stat().st_mode & 0o777 == 0o600 and load_account(place).address == key.address
    assert key.secret.hex() not in repr(key)
    with pytest.raises(BadAccountKey, match="it is left as it is"):
        create_account(place)
    assert load_account(place).address == key.address and list(place.parent.iterdir()) == [place]
    place.chmod(0o644)
    with pytest.raises(BadAccountKey, match="chmod 600"):
        load_account(place)
    for number, text in enumerate(("", "0x12", "00" * 32, "ff" * 32, f"{ORDER:064x}", "z" * 64, "1" * 1000)):
        broken = tmp_path / str(number)
        broken.write_text(text)
        broken.chmod(0o600)
        with pytest.raises(BadAccountKey, match="holds no secp256k1 key"):
            load_account(broken)
    with pytest.raises(BadAccountKey, match="cannot be read"):
        load_account(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "value"),
    [("uint256", -1), ("uint256", 1 << 256), ("uint256", True), ("address", bytes(19)), ("bytes32", bytes(33)),
     ("uint256", b""), ("bool", 1)],
)  # fmt: skip
def test_a_value_that_does_not_fit_its_field_is_not_signed(kind: str, value: int | bytes) -> None:
    with pytest.raises(ValueError, match="what is no"):
        StructType("X", ((kind, "what"),)).hash_of([value])
