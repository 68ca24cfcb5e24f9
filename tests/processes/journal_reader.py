"""A second reader of exported journals, written from docs/ledger.md: it shares no code with `shoal.ledger`, and takes
signers from the library that wallets are tested with. What a node or an operator signed as a record is opened as
everywhere."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3
from eth_utils import keccak, to_checksum_address
from wallet import Account, encode_typed_data

from shoal.identity import Envelope
from shoal.protocol.holds import sold_twice
from shoal.protocol.money import HouseLedger, open_fee_table

Json = dict[str, Any]
BYTES = {
    "operator", "checkpoint", "previous", "hash", "account", "payer", "signer", "auditor", "payee", "escrow", "bond",
    "node", "work", "quote", "nonce", "evidence", "signature", "table", "one", "other",
}  # fmt: skip
TYPES = {
    "Voucher": "escrow:bytes32 payee:address amount:uint256 work:bytes32",
    "Closing": "escrow:bytes32",
    "Withholding": "escrow:bytes32 payee:address amount:uint256 evidence:bytes32",
    "Withdrawal": "account:address amount:uint256 to:string number:uint256",
    "Admission": "escrow:bytes32 account:address most:uint256",
    "TopUp": "escrow:bytes32 amount:uint256 cap:uint256 expires:uint256 number:uint256",
    "Finished": "escrow:bytes32 payee:address amount:uint256",
    "Bond": "account:address network:string node:bytes32 amount:uint256 notice:uint256 nonce:bytes32",
    "Unbonding": "bond:bytes32",
    "Payee": "account:address most:uint256",
    "Escrow": "payer:address signer:address cap:uint256 auditor:address amount:uint256 fee:uint256 holdback:uint256 "
    "notice:uint256 audit:uint256 expires:uint256 payees:bytes32 quote:bytes32 nonce:bytes32",
}
SIGNED = {
    "withdraw": ("Withdrawal", "order"), "open": ("Escrow", "terms"), "admit": ("Admission", "admission"),
    "topup": ("TopUp", "order"), "close": ("Closing", "wish"), "finish": ("Finished", "word"),
    "withhold": ("Withholding", "order"), "postbond": ("Bond", "terms"), "unbond": ("Unbonding", "wish"),
}  # fmt: skip


def unpacked(value: Any, key: str = "") -> Any:
    """Bytes stand in base64."""
    if isinstance(value, dict):
        return {name: unpacked(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [unpacked(one) for one in value]
    return base64.b64decode(value) if key in BYTES and isinstance(value, str) else value


def told(address: bytes) -> str:
    return str(to_checksum_address(address))


class Reader:
    """All accounts after the lines that were read. Raises AssertionError, KeyError, for a line that does not follow."""

    def __init__(self, ledger: Json) -> None:
        self.ledger = HouseLedger(ledger["operator"], ledger["currency"])
        salt = blake3(b"shoal/house-ledger/1\0" + ledger["operator"] + ledger["currency"].encode()).digest()
        self.domain = {"name": "Shoal", "version": "1", "salt": salt}
        self.balances: dict[str, int] = {}
        self.escrows: dict[bytes, Json] = {}
        self.bonds: dict[bytes, Json] = {}
        self.withdrawn: dict[bytes, int] = {}
        self.fees: list[Any] = []
        self.seen: set[str] = set()
        self.number, self.previous, self.now = 0, bytes(32), 0

    def read(self, line: Json) -> None:
        assert line["number"] == self.number + 1 and line["previous"] == self.previous and line["at_ms"] >= self.now
        pack = msgspec.msgpack.encode
        numbers = [line["number"].to_bytes(8), line["at_ms"].to_bytes(8)]
        hasher = blake3(derive_key_context="shoal shoal/journal/1")
        for part in (line["previous"], *numbers, pack(line["command"]), pack(line["moves"])):
            hasher.update(len(part).to_bytes(8) + part)
        assert hasher.digest() == line["hash"]
        self.number, self.previous, self.now = line["number"], line["hash"], line["at_ms"]
        asked = line["command"]
        wanted = [one for one in getattr(self, asked["do"].replace("pass", "pass_"))(asked) if one[2]]
        assert [(one["source"], one["target"], one["amount_micro"]) for one in line["moves"]] == wanted
        for source, target, amount in wanted:
            self.balances[source] = self.balances.get(source, 0) - amount
            self.balances[target] = self.balances.get(target, 0) + amount
        assert sum(self.balances.values()) == 0
        assert all(amount >= 0 for name, amount in self.balances.items() if name != "issued")

    # --- signatures --------------------------------------------------------------------------------------------------

    def digest(self, kind: str, said: Json) -> Any:
        fields = dict(one.split(":") for one in TYPES[kind].split())
        values = {name: said.get(name, said.get(f"{name}_micro", said.get(f"{name}_ms", said.get(f"{name}_ppm"))))
                  for name in fields}  # fmt: skip
        if kind == "Escrow":
            values["payees"] = keccak(b"".join(self.digest("Payee", one).body for one in said["payees"]))
        types = {kind: [{"name": name, "type": of} for name, of in fields.items()]}
        return encode_typed_data(self.domain, types, values)

    def name(self, kind: str, said: Json) -> bytes:
        return hashed(self.digest(kind, said))

    def signer(self, asked: Json) -> bytes:
        kind, field = SIGNED[asked["do"]]
        return self.by(kind, asked[field], asked["signature"])

    def by(self, kind: str, said: Json, signature: bytes) -> bytes:
        return bytes.fromhex(Account.recover_message(self.digest(kind, said), signature=signature)[2:])

    # --- what each command moves -------------------------------------------------------------------------------------

    def deposit(self, asked: Json) -> list[Any]:
        assert asked["reference"] not in self.seen
        self.seen.add(asked["reference"])
        return [("issued", told(asked["account"]), asked["amount_micro"])]

    def withdraw(self, asked: Json) -> list[Any]:
        order = asked["order"]
        assert self.signer(asked) == order["account"]
        assert order["number"] == self.withdrawn.get(order["account"], 0) + 1
        self.withdrawn[order["account"]] = order["number"]
        return [(told(order["account"]), "issued", order["amount_micro"])]

    def setfee(self, asked: Json) -> list[Any]:
        table = open_fee_table(Envelope.from_bytes(asked["table"], 1024), self.ledger)
        assert table.number == (self.fees[-1].number if self.fees else 0) + 1
        assert not self.balances.get("issued") or table.from_ms >= self.now + 86_400_000
        self.fees = [one for one in self.fees if one.from_ms <= self.now] + [table]
        return []

    def open(self, asked: Json) -> list[Any]:
        terms = asked["terms"]
        name, fees = self.name("Escrow", terms), [one.fee_ppm for one in self.fees if one.from_ms <= self.now]
        assert self.signer(asked) == terms["payer"] and name not in self.escrows
        assert terms["cap_micro"] <= terms["amount_micro"] and terms["expires_ms"] > self.now
        assert not fees or fees[-1] == terms["fee_ppm"]
        most = {one["account"]: one["most_micro"] for one in terms["payees"]}
        assert len(most) == len(terms["payees"])
        self.escrows[name] = {
            **terms, "name": name, "most": most, "paid": {}, "back": {}, "done": set(), "latest": terms["expires_ms"],
            "ends": terms["expires_ms"], "closing": False, "state": "open", "top_ups": 0,
        }  # fmt: skip
        return [(told(terms["payer"]), f"escrow {name.hex()}", terms["amount_micro"])]

    def standing(self, name: bytes) -> Json:
        escrow = self.escrows[name]
        assert escrow["state"] == "open" and self.now < escrow["ends"]
        return escrow

    def admit(self, asked: Json) -> list[Any]:
        said = asked["admission"]
        escrow = self.standing(said["escrow"])
        assert self.signer(asked) in (escrow["payer"], escrow["signer"])
        assert said["most_micro"] > escrow["most"].get(said["account"], -1)
        escrow["most"][said["account"]] = said["most_micro"]
        return []

    def topup(self, asked: Json) -> list[Any]:
        order = asked["order"]
        escrow = self.standing(order["escrow"])
        assert self.signer(asked) == escrow["payer"] and not escrow["closing"]
        assert order["number"] == escrow["top_ups"] + 1
        assert escrow["ends"] <= order["expires_ms"] <= max(escrow["ends"], escrow["latest"] + 30 * 86_400_000)
        escrow |= {"top_ups": order["number"], "ends": order["expires_ms"]}
        escrow["amount_micro"] += order["amount_micro"]
        escrow["cap_micro"] += order["cap_micro"]
        assert escrow["cap_micro"] <= escrow["amount_micro"]
        return [(told(escrow["payer"]), f"escrow {order['escrow'].hex()}", order["amount_micro"])]

    def redeem(self, asked: Json) -> list[Any]:
        voucher = asked["signed"]["voucher"]
        signer, escrow = self.by("Voucher", voucher, asked["signed"]["signature"]), self.standing(voucher["escrow"])
        payee, amount, before = voucher["payee"], voucher["amount_micro"], escrow["paid"].get(voucher["payee"], 0)
        assert before < amount <= escrow["most"][payee] and payee not in escrow["done"]
        escrow["paid"][payee] = amount
        in_all = sum(escrow["paid"].values())
        assert in_all <= escrow["amount_micro"]
        assert signer == escrow["payer"] or (signer == escrow["signer"] and in_all <= escrow["cap_micro"])
        (held, free, fee), (held_before, free_before, fee_before) = (
            (part := of * escrow["holdback_ppm"] // 10**6, of - part, (of - part) * escrow["fee_ppm"] // 10**6)
            for of in (amount, before)
        )
        pot, fees = f"escrow {voucher['escrow'].hex()}", fee - fee_before
        return [
            (pot, told(payee), free - free_before - fees),
            (pot, f"held {voucher['escrow'].hex()} {told(payee)}", held - held_before), (pot, "fees", fees),
        ]  # fmt: skip

    def close(self, asked: Json) -> list[Any]:
        escrow = self.standing(asked["wish"]["escrow"])
        assert self.signer(asked) in (escrow["payer"], escrow["signer"]) and not escrow["closing"]
        escrow |= {"closing": True, "ends": min(escrow["ends"], self.now + escrow["notice_ms"])}
        return self.over_early(escrow)

    def finish(self, asked: Json) -> list[Any]:
        word = asked["word"]
        escrow = self.standing(word["escrow"])
        assert self.signer(asked) == word["payee"] and word["payee"] in escrow["most"].keys() - escrow["done"]
        assert word["amount_micro"] == escrow["paid"].get(word["payee"], 0)
        escrow["done"].add(word["payee"])
        return self.over_early(escrow)

    def over_early(self, escrow: Json) -> list[Any]:
        if escrow["closing"] and escrow["done"] == escrow["most"].keys():
            escrow["ends"] = self.now
        return self.passed(escrow)

    def withhold(self, asked: Json) -> list[Any]:
        order = asked["order"]
        escrow, payee = self.escrows[order["escrow"]], order["payee"]
        assert self.signer(asked) == escrow["auditor"] and self.now < escrow["ends"] + escrow["audit_ms"]
        before, held = escrow["back"].get(payee, 0), escrow["paid"].get(payee, 0) * escrow["holdback_ppm"] // 10**6
        assert before < order["amount_micro"] <= held and escrow["state"] != "settled"
        escrow["back"][payee] = order["amount_micro"]
        pot = f"held {order['escrow'].hex()} {told(payee)}"
        return [(pot, told(escrow["payer"]), order["amount_micro"] - before)]

    def passed(self, escrow: Json) -> list[Any]:
        moves, name = [], escrow["name"]
        if escrow["state"] == "open" and self.now >= escrow["ends"]:
            escrow["state"] = "ended"
            rest = escrow["amount_micro"] - sum(escrow["paid"].values())
            moves.append((f"escrow {name.hex()}", told(escrow["payer"]), rest))
        if escrow["state"] == "ended" and self.now >= escrow["ends"] + escrow["audit_ms"]:
            escrow["state"] = "settled"
            for payee, paid in sorted(escrow["paid"].items()):
                left = paid * escrow["holdback_ppm"] // 10**6 - escrow["back"].get(payee, 0)
                fee, pot = left * escrow["fee_ppm"] // 10**6, f"held {name.hex()} {told(payee)}"
                moves += [(pot, told(payee), left - fee), (pot, "fees", fee)]
        return moves

    def pass_(self, asked: Json) -> list[Any]:
        escrow = self.escrows[asked["escrow"]]
        before = escrow["state"]
        moves = self.passed(escrow)
        assert escrow["state"] != before
        return moves

    # --- bonds -------------------------------------------------------------------------------------------------------

    def postbond(self, asked: Json) -> list[Any]:
        terms = asked["terms"]
        name = self.name("Bond", terms)
        assert self.signer(asked) == terms["account"] and name not in self.bonds
        self.bonds[name] = {**terms, "posted": self.now, "ends": None, "stands": True}
        return [(told(terms["account"]), f"bond {name.hex()}", terms["amount_micro"])]

    def bond_in_force(self, name: bytes) -> Json:
        bond = self.bonds[name]
        assert bond["stands"] and (bond["ends"] is None or self.now < bond["ends"])
        return bond

    def unbond(self, asked: Json) -> list[Any]:
        bond = self.bond_in_force(asked["wish"]["bond"])
        assert self.signer(asked) == bond["account"] and bond["ends"] is None
        bond["ends"] = self.now + bond["notice_ms"]
        return []

    def slash(self, asked: Json) -> list[Any]:
        bond = self.bond_in_force(asked["bond"])
        one, other = (Envelope.from_bytes(asked[each], 1 << 16) for each in ("one", "other"))
        assert one.signer == bond["node"] and sold_twice(one, other, bond["network"]) is not None
        bond["stands"] = False
        return [(f"bond {asked['bond'].hex()}", "fees", bond["amount_micro"])]

    def payback(self, asked: Json) -> list[Any]:
        bond = self.bonds[asked["bond"]]
        assert bond["stands"] and bond["ends"] is not None and self.now >= bond["ends"]
        bond["stands"] = False
        return [(f"bond {asked['bond'].hex()}", told(bond["account"]), bond["amount_micro"])]


def hashed(message: Any) -> bytes:
    return keccak(b"\x19" + message.version + message.header + message.body)


def read_file(path: Path) -> Reader:
    """Raises AssertionError, KeyError, ValueError for a file that is not a whole journal."""
    head, *lines = (unpacked(json.loads(line)) for line in path.read_text().splitlines())
    reader = Reader(head["ledger"])
    for line in lines:
        reader.read(line)
    return reader
