"""`shoal account` and `shoal ledger` as people meet them, against ledgers in processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ledger_world
import pytest
from journal_reader import read_file
from ledger_requests import NODES, a_voucher, an_escrow

from shoal.cli.main import main
from shoal.house import RemoteLedger
from shoal.house.server import deposit
from shoal.identity import Envelope, KeyPair, load_key, load_or_create_key
from shoal.identity.accounts import AccountKey, load_account, parse_address
from shoal.ledger.commands import Close, Command, Open, Redeem
from shoal.ledger.journal import contradiction
from shoal.protocol.holds import Hold
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import sign
from shoal.protocol.money import Checkpoint, Closing, HouseLedger
from shoal.protocol.prices import Price
from shoal.transport import TlsEndpoint
from shoal.world import SystemClock

NOBODY = f"shoal-ledger://{KeyPair.from_seed(bytes(32)).node_id.hex()}@127.0.0.1:9/USD"

Shoal = Callable[..., tuple[int, str, str]]
"""A command -> exit code, standard output, standard error."""


@pytest.fixture
def shoal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shoal:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("SHOAL_LEDGER", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return call


def done(outcome: tuple[int, str, str]) -> Any:
    """What a command with --json printed."""
    code, out, err = outcome
    assert code == 0, out + err
    return json.loads(out)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder and the ticket of a ledger with a development mint."""
    data = tmp_path_factory.mktemp("ledger")
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "ledger", "start", "--data", str(data), "--mint-max", "1000", "--json"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    assert said["ready"] == "ledger" and said["pid"] == process.pid
    yield data, said["ticket"]
    process.terminate()
    assert process.wait(60) == 0
    process.stdout.close()


def test_money_comes_and_goes(shoal: Shoal, ledger: tuple[Path, str], tmp_path: Path) -> None:
    data, ticket = ledger
    made = done(shoal("account", "create", "--ledger", ticket, "--json"))
    assert made["made"] and made["ledger"] == ticket
    key = tmp_path / "home" / "account.key"
    assert key.stat().st_mode & 0o777 == 0o600 and load_account(key).address == parse_address(made["account"])
    assert shoal("account", "balance")[:2] == (0, "0.00 USD\n")
    assert "Nothing has come" in shoal("account", "statement")[1]
    assert shoal("account", "deposit", "25")[:2] == (0, "Deposit: 25.00 USD.\nThere are 25.00 USD now.\n")
    assert done(shoal("account", "withdraw", "3.5", "--to", "iban 7", "--json")) == {
        "withdrawal": 1, "amount_micro": 3_500_000, "to": "iban 7", "currency": "USD", "balance_micro": 21_500_000
    }  # fmt: skip
    code, out, _ = shoal("account", "withdraw", "0.000001", "--to", "iban 7")
    assert code == 0 and out == "Withdrawal 2: 0.000001 USD, to iban 7.\nThere are 21.499999 USD left.\n"
    code, _, err = shoal("account", "withdraw", "3.5", "--to", "iban 7", "--number", "1")
    assert code == 2 and "SH-199" in err and "has been carried out already" in err
    told = shoal("ledger", "deposit", made["account"], "0.5", "--reference", "[red]\x1b[1m8", "--data", str(data))
    assert told[:2] == (0, f"0.50 booked for {made['account']}.\n")
    shown = shoal("account", "statement")[1]
    assert re.search(r"deposit, development mint +25.000000 +25.000000\n", shown)
    assert re.search(r"withdrawal 1, to iban 7 +3.500000 +21.500000\n", shown)
    assert re.search(r"deposit, \[red\]\ufffd\[1m8 +0.500000 +21.999999\n", shown), (
        "and nothing that a terminal would obey"
    )
    newest = done(shoal("account", "statement", "--limit", "1", "--json"))
    assert newest["lines"] == 4 and newest["newest"][0]["balance_micro"] == 21_999_999
    assert "3 older lines are left out" in shoal("account", "statement", "--limit", "1")[1]
    assert done(shoal("account", "balance", "--json"))["balance_micro"] == 21_999_999
    assert done(shoal("account", "verify", "--json"))["as_seen"] is False
    code, out, _ = shoal("account", "verify")
    assert code == 0 and "all follow from the rules" in out and "It is the history that was seen before" in out


def escrow_story(ticket: str, key: AccountKey) -> bytes:
    """An escrow of this account, of which somebody and itself earn."""
    name = LedgerTicket.parse(ticket).ledger

    async def play() -> bytes:
        endpoint = TlsEndpoint(KeyPair.generate())
        ledger = RemoteLedger(endpoint, LedgerTicket.parse(ticket), SystemClock())
        usual, _ = an_escrow(amount_micro=1_000_000, most_micro=1_000_000, ledger=name)
        mine = type(usual.terms.payees[0])(key.address, 800_000)
        terms = usual.terms.__class__(**{
            field: getattr(usual.terms, field) for field in usual.terms.__struct_fields__
        } | {"payer": key.address, "payees": (*usual.terms.payees, mine)})  # fmt: skip
        escrow = terms.escrow_id(name)
        wish = Closing(escrow)
        commands: list[Command] = [
            Open(terms, key.sign(escrow)),
            Redeem(a_voucher(escrow, NODES[0], 100_000, ledger=name)),
            Redeem(a_voucher(escrow, key, 50_000, ledger=name)),
            Redeem(a_voucher(escrow, key, 200_000, ledger=name)),
            Close(wish, key.sign(wish.digest(name))),
        ]
        for one in commands:
            await ledger.apply(one)
        await endpoint.close()
        return escrow

    return asyncio.run(play())


def test_a_statement_names_escrows_and_what_they_hold_back(
    shoal: Shoal, ledger: tuple[Path, str], tmp_path: Path
) -> None:
    _, ticket = ledger
    shoal("account", "create", "--ledger", ticket)
    shoal("account", "deposit", "2")
    short = escrow_story(ticket, load_account(tmp_path / "home" / "account.key")).hex()[:10]
    shown = shoal("account", "statement")[1]
    assert re.search(rf"into escrow {short} +1.0000 +1.0000\n", shown), "to as many places as the finest amount"
    assert re.search(rf"earned of escrow {short} 2 times, fee 0.0036 +0.1764 +0.0200 +1.1764\n", shown)
    lines = done(shoal("account", "statement", "--json"))["newest"]
    assert [one["held_micro"] for one in lines[:4]] == [0, 0, 5_000, 15_000]
    assert [one["fee_micro"] for one in lines[:4]] == [0, 0, 900, 2700]
    assert shoal("account", "balance")[1] in ("1.1764 USD\n", "1.8764 USD\n"), "before the notice is over, or after"


def test_an_operator_says_what_it_takes(shoal: Shoal, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "ledger", "start", "--data", str(tmp_path / "ledger"), "--fee", "2%",
         "--mint-max", "1000"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(3)]
    assert said[2] == "It takes 2 % of what escrows pay.\n"
    ticket = said[1].strip()
    account = done(shoal("account", "create", "--ledger", ticket, "--json"))
    shoal("account", "deposit", "2")
    escrow_story(ticket, load_account(tmp_path / "home" / "account.key"))
    assert "The ledger takes 2 % of what escrows pay.\n" in shoal("account", "statement")[1]
    (table,) = done(shoal("account", "statement", "--json"))["fees"]
    assert table["fee_ppm"] == 20_000
    assert shoal("account", "verify")[0] == 0
    assert shoal("account", "export", "journal")[0] == 0
    read = read_file(tmp_path / "journal")
    (mine,) = (amount for name, amount in read.balances.items() if name == account["account"])
    assert done(shoal("account", "balance", "--json"))["balance_micro"] >= mine > 0 and read.balances["fees"] > 0
    process.terminate()
    assert process.wait(60) == 0
    process.stdout.close()
    wrong = shoal("ledger", "start", "--data", str(tmp_path / "other"), "--fee", "2")
    assert wrong[0] == 2 and "'2' is no share; write for example '2%'" in wrong[2]


def write_hold(path: Path, node: KeyPair, number: int, **changed: Any) -> str:
    """What a node signs for a client of its own, in a file."""
    usual: dict[str, Any] = {
        "slot": 0, "number": number, "client": bytes([number] * 32), "work": "train", "from_ms": 0,
        "until_ms": 1 << 50, "price": Price(1), "ledger": HouseLedger(bytes(32), "USD"), "payer": bytes(20),
        "payee": bytes(20),
    }  # fmt: skip
    path.write_bytes(sign(node, Hold(**usual | changed)).to_bytes())
    return str(path)


def test_a_bond_is_posted_asked_for_and_lost(shoal: Shoal, ledger: tuple[Path, str], tmp_path: Path) -> None:
    _, ticket = ledger
    shoal("account", "create", "--ledger", ticket)
    shoal("account", "deposit", "20")
    mine = load_or_create_key(tmp_path / "home" / "node" / "node.key")
    other = load_or_create_key(tmp_path / "other" / "node.key")
    made = done(shoal("account", "bond", "7", "--notice", "2 d", "--json"))
    assert made == {
        "bond": made["bond"], "node": mine.node_id.hex(), "amount_micro": 7_000_000, "notice_ms": 172_800_000,
        "currency": "USD", "at_stake_micro": 7_000_000,
    }  # fmt: skip
    code, out, _ = shoal("account", "bond", "2.5", mine.node_id.hex())
    assert code == 0 and f"9.50 is at stake for node {mine.node_id.hex()[:8]} in all." in out
    third = done(shoal("account", "bond", "4", "--data", str(tmp_path / "other"), "--json"))
    assert third["node"] == other.node_id.hex() and third["at_stake_micro"] == 4_000_000

    asked = done(shoal("account", "unbond", third["bond"][:10], "--json"))
    assert asked["ends_ms"] - asked["posted_ms"] >= 7 * 86_400_000 and asked["state"] == "standing"
    assert "asked for already" in shoal("account", "unbond", third["bond"])[2]

    one, two = (write_hold(tmp_path / f"hold-{number}", mine, number) for number in (1, 2))
    again = write_hold(tmp_path / "again", mine, 3, client=bytes([1] * 32))
    nobody = [write_hold(tmp_path / f"nobody-{number}", KeyPair.from_seed(bytes(32)), number) for number in (1, 2)]
    for holds, sentence in (
        ((one, again), "can both be kept"),
        ((one, nobody[1]), "can both be kept"),
        (nobody, "No bond stands behind it"),
    ):  # fmt: skip
        code, _, err = shoal("account", "slash", *holds)
        assert code == 2 and sentence in err
    took = done(shoal("account", "slash", one, two, "--json"))
    assert took["amount_micro"] == 9_500_000 and len(took["lost"]) == 2 and made["bond"] in took["lost"]
    assert "has promised slot 0 to" in took["proof"]
    assert shoal("account", "slash", one, two)[0] == 2, "there is nothing more to lose"
    kept = done(shoal("account", "balance", "--json"))
    assert kept["balance_micro"] == 6_500_000
    assert {one["bond"]: one["state"] for one in kept["bonds"]} == {
        third["bond"]: "standing", **dict.fromkeys(took["lost"], "lost")
    }  # fmt: skip
    shown = shoal("account", "statement")[1]
    assert re.search(rf"bond behind node {mine.node_id.hex()[:8]} +7.00 +13.00\n", shown)
    assert re.search(rf"Bond {made['bond'][:10]} behind node {mine.node_id.hex()[:8]}: 7.00 USD, lost\n", shown)
    assert re.search(rf"Bond {third['bond'][:10]} behind node \w+: 4.00 USD, comes back \d{{4}}-", shown)


NEW = ["account", "create"]
TICKET = ["--ledger", NOBODY]
MISTAKES = [
    pytest.param([["account", "balance"]], "SH-136", "SHOAL_LEDGER", id="no ledger"),
    pytest.param([["account", "balance", *TICKET]], "SH-135", "shoal account create", id="no account"),
    pytest.param([NEW, NEW], "SH-118", "There is an account", id="an account already"),
    pytest.param([[*NEW, "--ledger", "x"]], "SH-112", "shoal-ledger://<64", id="no ticket"),
    pytest.param(
        [[*NEW, *TICKET], ["account", "balance"]],
        "SH-301",
        "127.0.0.1:9: Connection refused. Check that it runs",
        id="nobody there",
    ),
    pytest.param([["account", "deposit", "-5"]], "SH-101", "'-5' is no amount", id="less than nothing"),
    pytest.param([["account", "deposit", "0"]], "SH-103", "0 is nothing", id="nothing"),
    pytest.param([["account", "deposit", "0.0000001"]], "SH-101", "six places", id="less than can be counted"),
    pytest.param([["account", "deposit", "9223372036854.775808"]], "SH-101", "more money than", id="more than all"),
    pytest.param([["account", "deposit", "1e3"]], "SH-101", "no amount", id="no amount"),
    pytest.param([NEW, ["account", "withdraw", "5", *TICKET]], "SH-103", "--to", id="to nobody"),
    pytest.param([NEW, ["account", "withdraw", "5", "--to", "", *TICKET]], "SH-103", "128", id="to nothing"),
    pytest.param([NEW, ["account", "withdraw", "5", "--to", "\n", *TICKET]], "SH-103", "printable", id="to two lines"),
    pytest.param(
        [NEW, ["account", "withdraw", "5", "--to", "x", "--number", "0", *TICKET]], "SH-103", "from 1", id="number 0"
    ),
    pytest.param([NEW, ["account", "statement", "--limit", "0"]], "SH-103", "from 1 to", id="no lines"),
    pytest.param([["account", "bond", "0.999999", "0" * 64]], "SH-103", "1.00 at least", id="a bond of too little"),
    pytest.param([["account", "bond", "5", "0" * 64, "--notice", "23h"]], "SH-103", "1 to 30 days", id="in a hurry"),
    pytest.param([["account", "bond", "5", "0" * 64, "--notice", "31d"]], "SH-103", "1 to 30 days", id="too patient"),
    pytest.param([["account", "bond", "5", "beef"]], "SH-100", "64 hexadecimal", id="a bond behind nobody"),
    pytest.param([["account", "bond", "5"]], "SH-103", "name its folder with --data", id="no node here"),
    pytest.param([["account", "bond", "5", "0" * 64, "--data", "x"]], "SH-103", "leave one", id="two nodes"),
    pytest.param([["account", "slash", "none", "none", *TICKET]], "SH-420", "none", id="no hold"),
    pytest.param(
        [["account", "slash", "/dev/null", "/dev/null", *TICKET]], "SH-138", "/dev/null is no", id="no record"
    ),
    pytest.param([["node", "earnings"]], "SH-108", "holds no sales", id="no node that sells"),
    pytest.param([["account", "export", "home", *TICKET]], "SH-103", "is there already", id="a file that is there"),
    pytest.param([["account", "verify", "nowhere"]], "SH-420", "nowhere", id="no file"),
    pytest.param([["ledger", "deposit", "0x12", "5", "--reference", "x"]], "SH-119", "'0x12'", id="no address"),
    pytest.param(
        [["ledger", "deposit", f"0x{'1' * 40}", "5", "--reference", "x"]], "SH-447", "holds no ledger", id="no books"
    ),
    pytest.param([["ledger", "start", "--listen", "tcp://0.0.0.0:1"]], "SH-103", "dial", id="wildcard"),
    pytest.param([["ledger", "start", "--currency", "usd"]], "SH-133", "no currency", id="no currency"),
    pytest.param([["ledger", "start", "--mint-max", "much"]], "SH-101", "no amount", id="no mint"),
]


@pytest.mark.parametrize(("commands", "code", "words"), MISTAKES)
def test_a_mistake_is_a_sentence(
    shoal: Shoal, tmp_path: Path, commands: list[list[str]], code: str, words: str
) -> None:
    (tmp_path / "home").mkdir()
    *before, last = commands
    for one in before:
        assert shoal(*one)[0] == 0
    ended, out, err = shoal(*last)
    assert ended == (1 if code in ("SH-301", "SH-420", "SH-447") else 2)
    assert out == "" and code in err and words in err
    ended, out, _ = shoal(*last, "--json")
    error = json.loads(out)["error"]
    assert error["code"] == code and words in error["sentence"]


def test_another_ledger_is_remembered_and_others_are_named(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    made = done(shoal("account", "create", "--json"))
    again = done(shoal("account", "create", "--ledger", NOBODY, "--json"))
    assert again == {"account": made["account"], "ledger": NOBODY, "made": False}
    monkeypatch.setenv("SHOAL_LEDGER", "nonsense")
    assert "SH-112" in shoal("account", "balance")[2], "what is in the environment comes before what is remembered"
    assert "SH-301" in shoal("account", "balance", "--ledger", NOBODY)[2]


# --- operators -----------------------------------------------------------------------------------------------------


def at_a_ledger(
    data: Path, scene: Callable[[LedgerTicket], None], *more: str, listen: str = "tcp://127.0.0.1:0"
) -> None:
    process = subprocess.Popen(
        [sys.executable, ledger_world.__file__, str(data), listen, *more], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        scene(LedgerTicket.parse(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_an_operator_that_changes_its_history_is_found_out(shoal: Shoal, tmp_path: Path) -> None:
    data = tmp_path / "ledger"
    account = done(shoal("account", "create", "--json"))["account"]

    def book(*amounts: int) -> None:
        for amount in amounts:
            deposit(data, parse_address(account), amount, f"payment of {amount}", SystemClock())

    def honest(ticket: LedgerTicket) -> None:
        shoal("account", "create", "--ledger", str(ticket))
        assert shoal("account", "deposit", "5")[0] == 2, "there is no mint"
        book(7, 8)
        assert done(shoal("account", "verify", "--json"))["signed"]["number"] == 2
        shoal("account", "export", "old")
        book(9)
        assert shoal("account", "verify")[0] == 0
        assert "older than what was seen before, up to line 3, and was not" in shoal("account", "verify", "old")[1]

    at_a_ledger(data, honest)
    operator = load_key(data / "operator.key").node_id

    def changed(*amounts: int) -> Callable[[LedgerTicket], None]:
        for file in data.glob("ledger.sqlite*"):
            file.unlink()

        def scene(ticket: LedgerTicket) -> None:
            shoal("account", "create", "--ledger", str(ticket))
            book(*amounts)
            for _ in range(2):
                code, _, err = shoal("account", "verify")
                assert code == 1 and "SH-288" in err, err
                assert ("has signed two journals" if len(amounts) == 3 else "has changed its history") in err
            assert shoal("account", "export", f"of-{len(amounts)}")[0] == 0
            assert shoal("account", "verify", f"of-{len(amounts)}")[0] == (0 if len(amounts) < 3 else 1)
            kept = tmp_path / "home" / "checkpoints"
            one, other = (
                Envelope.from_bytes((kept / f"{operator.hex()}-USD{end}").read_bytes(), Checkpoint.MAX_BYTES)
                for end in ("", ".changed")
            )
            proof = contradiction(one, other, HouseLedger(operator, "USD"))
            assert (proof is not None) == (len(amounts) == 3)

        return scene

    at_a_ledger(data, changed(7, 8, 1000))
    at_a_ledger(data, changed(7, 8))
    at_a_ledger(data, changed(7, 8, 10, 11))


def test_a_file_that_was_tampered_with_is_found_out(shoal: Shoal, ledger: tuple[Path, str], tmp_path: Path) -> None:
    shoal("account", "create", "--ledger", ledger[1])
    shoal("account", "deposit", "5")
    assert shoal("account", "export", "good")[0] == 0
    head, *lines = (tmp_path / "good").read_text().splitlines()
    assert shoal("account", "verify", "good")[0] == 0
    count = len(lines)
    for name, code, words, text in (
        ("amount", "SH-282", f"Line {count} of the journal has another hash", [
            head, *lines[:-1], lines[-1].replace('"amount_micro":5000000', '"amount_micro":6000000')]),
        ("missing", "SH-282", f"Line {count} of the journal is missing", [head, *lines[:-1]]),
        ("gap", "SH-282", "Line 1 of the journal does not follow", [head, *lines[1:], lines[0]]),
        ("empty", "SH-137", "first line does not name a ledger", []),
        ("other", "SH-137", "first line does not name a ledger", lines),
        ("noise", "SH-137", "Line 2 of noise is none of a journal", [head, "{}", *lines]),
        ("long", "SH-137", "Line 2 of long is longer", [head, "x" * (5 << 20)]),
        ("huge", "SH-137", f"Line {count + 1} of huge is none of a journal", [
            head, *lines[:-1], re.sub(r'("target":"0x\w+","amount_micro":)\d+', r"\g<1>1" + "0" * 30, lines[-1])]),
        ("forged", "SH-282", "The checkpoint in the first line of forged is not one", [
            re.sub(r"(.*)..=", r"\1AA=", head), *lines]),
    ):  # fmt: skip
        (tmp_path / name).write_text("\n".join(text))
        ended, _, err = shoal("account", "verify", name)
        assert ended == (2 if code == "SH-137" else 1) and code in err and words in err, (name, err)
    code, _, err = shoal("account", "verify", "good", "--ledger", NOBODY)
    assert code == 2 and "is the journal of the ledger of" in err and "not of the one that --ledger names" in err
    (kept,) = (tmp_path / "home" / "checkpoints").iterdir()
    right = kept.read_bytes()
    for damaged in (b"", right[:-1], right[:-1] + b"\0"):
        kept.write_bytes(damaged)
        code, _, err = shoal("account", "verify", "good")
        assert code == 1 and f"{kept} does not hold the checkpoint of this ledger" in err


def test_a_withdrawal_whose_answer_was_lost_is_run_again_with_its_number(shoal: Shoal, tmp_path: Path) -> None:
    data, places = tmp_path / "ledger", list[str]()
    account = done(shoal("account", "create", "--json"))["account"]

    def dying(ticket: LedgerTicket) -> None:
        places.extend(ticket.addresses)
        shoal("account", "create", "--ledger", str(ticket))
        deposit(data, parse_address(account), 5_000_000, "payment", SystemClock())
        code, _, err = shoal("account", "withdraw", "2", "--to", "iban 7")
        assert code == 1 and "SH-340" in err and "the same command with --number 1" in err

    def again(_: LedgerTicket) -> None:
        code, _, err = shoal("account", "withdraw", "2", "--to", "iban 7", "--number", "1")
        assert code == 2 and "has been carried out already" in err
        assert shoal("account", "balance")[1] == "3.00 USD\n"

    at_a_ledger(data, dying, "dying")
    at_a_ledger(data, again, listen=places[0])


def test_the_help_lists_them_under_their_heading(shoal: Shoal) -> None:
    shown = shoal("--help")[1]
    assert re.search(r"Money.*\n.*account.*\n.*ledger", shown) and os.environ["COLUMNS"] == "100"
