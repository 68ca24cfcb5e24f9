"""Ledgers in databases: each is the book in memory, line by line, also after kill -9; on SQLite, and on PostgreSQL
where that is installed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from ledger_requests import (
    CLIENT,
    LEDGER,
    NODES,
    SELLERS,
    a_bond,
    a_close,
    a_fee_table,
    a_finish,
    a_slash,
    a_top_up,
    a_voucher,
    a_withdrawal,
    an_admission,
    an_escrow,
    an_unbond,
)
from postgres import PROGRAMS, empty, postgres

from shoal.errors import ShoalError
from shoal.identity.accounts import AccountKey
from shoal.ledger.bonds import BondOver
from shoal.ledger.book import Book, SameDeposit, SameEscrow
from shoal.ledger.commands import (
    Admit,
    Command,
    Deposit,
    Finish,
    Open,
    Pass,
    PayBack,
    PostBond,
    Redeem,
    Slash,
    TopUp,
    Unbond,
)
from shoal.ledger.escrows import EscrowOver, OldVoucher
from shoal.ledger.journal import BEGINNING, Line, line, verified
from shoal.ledger.moves import FEES, ISSUED, TooLittleMoney, account
from shoal.protocol.money import DAY_MS, HouseLedger
from shoal.quantities.money import MICRO
from shoal.storage.faults import LedgerBusy, LedgerFailed
from shoal.storage.group_commit import WAITING_MAX, GroupCommit
from shoal.storage.ledgers import SqlLedger
from shoal.world import HeldClock


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.skipif(
    not PROGRAMS, reason="PostgreSQL is not installed"))])  # fmt: skip
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    """An empty database."""
    if request.param == "sqlite":
        yield tmp_path / "ledger.sqlite"
        return
    url = request.getfixturevalue("server")
    yield url
    empty(url)


class Wall(HeldClock):
    """A clock on the wall, which may be turned back."""

    def __init__(self, now_ms: int) -> None:
        super().__init__()
        self.wall_ms = now_ms

    def now_ms(self) -> int:
        return self.wall_ms


def commands(dice: random.Random) -> Iterator[Command]:
    """Whatever comes to mind, some of it nonsense."""
    names: list[bytes] = []
    yield a_fee_table(1, 0, 20_000)
    yield Deposit(CLIENT.address, 40_000, "mint")
    yield Deposit(CLIENT.address, 20 * MICRO, "stake")
    posted, bonds = zip(*(a_bond(dice.choice(SELLERS), nonce) for nonce in range(12)), strict=True)
    for number in range(600):
        what = dice.random()
        if what < 0.1 or not names:
            command, name = an_escrow(
                amount_micro=dice.randrange(1, 3000), nonce=number % 7, expires_ms=dice.randrange(1, 30_000),
                locked_until_ms=dice.choice((0, 0, 0, dice.randrange(5000))),
            )  # fmt: skip
            names.append(name)
            yield command
        elif what < 0.14:
            yield dice.choice(posted)
        elif what < 0.2:
            yield dice.choice((an_unbond(dice.choice(bonds)), a_slash(dice.choice(bonds), dice.choice(SELLERS))))
        elif what < 0.21:
            yield Deposit(CLIENT.address, 1, f"payment {number % 5}")
        elif what < 0.65:
            yield Redeem(a_voucher(dice.choice(names), dice.choice(NODES), dice.randrange(0, 900)))
        elif what < 0.75:
            yield a_withdrawal(dice.choice((CLIENT, *NODES)), dice.randrange(1, 50), dice.randrange(1, 5))
        elif what < 0.8:
            yield an_admission(names[-1], dice.choice((CLIENT, *NODES)), dice.randrange(2000))
        elif what < 0.85:
            yield a_top_up(names[-1], dice.randrange(500), dice.randrange(1, 3), dice.randrange(30_000, 60_000))
        elif what < 0.91:
            yield a_finish(names[-1], dice.choice(NODES), 0)
        elif what < 0.93:
            yield a_fee_table(dice.randrange(1, 5), dice.randrange(3) * DAY_MS, dice.randrange(30_000))
            yield an_escrow(nonce=8, fee_ppm=dice.randrange(30_000))[0]
        elif what < 0.95:
            yield a_close(dice.choice(names))
        else:
            yield Pass(dice.choice(names))


def passed(book: Book) -> None:
    for command in book.due():
        book.apply(command)


@pytest.mark.parametrize("together", [1, 17])
def test_a_database_is_the_book_in_memory(place: Path | str, together: int) -> None:
    clock, dice = Wall(1000), random.Random(together)
    book, ledger = Book(LEDGER), SqlLedger.open(place, LEDGER, clock)
    waiting: list[Command] = []
    refused = 0
    for command in [*commands(dice), *[Pass(bytes(32))] * together]:
        waiting.append(command)
        if len(waiting) < together:
            continue
        clock.wall_ms = max(0, clock.wall_ms + dice.randrange(-300, 600))
        book.at(clock.now_ms())
        passed(book)
        for one, outcome in zip(waiting, ledger.apply_all(waiting), strict=True):
            try:
                moves = book.apply(one)
            except ShoalError as error:
                refused += 1
                assert isinstance(outcome, ShoalError) and outcome.sentence == error.sentence
            else:
                assert outcome == moves
        waiting.clear()
    done = [type(one.command) for one in ledger.lines()]
    assert all(done.count(kind) > 1 for kind in (Admit, TopUp, Finish, PostBond)) and {Unbond, Slash} <= set(done)
    for node in SELLERS:
        assert ledger.bond_of(node.node_id) == book.bond_of(node.node_id)
    assert any(ledger.bond_of(node.node_id) for node in SELLERS) and ledger.bond_of(SELLERS[0].node_id, "testnet") == 0
    clock.wall_ms += 2 * DAY_MS
    book.at(clock.now_ms())
    passed(book)
    ledger.apply_all([])
    assert PayBack in [type(one.command) for one in ledger.lines()]
    assert sum(book.withdrawals.values()) > 3
    assert refused > 50 and ledger.balances() == {name: one for name, one in book.balances.items() if one}
    assert verified(ledger.lines(), LEDGER).balances == book.balances
    ledger.close()
    again = SqlLedger.open(place, LEDGER, clock)
    anew = verified(again.lines(), LEDGER)
    assert (anew.escrows, anew.bonds, anew.references) == (book.escrows, book.bonds, book.references)
    assert anew.fees == book.fees == again.fees() and len(book.fees) == 2
    assert sum(again.balances().values()) == 0
    again.close()


@pytest.mark.skipif(not PROGRAMS, reason="PostgreSQL is not installed")
def test_a_server_keeps_few_statements_whatever_is_written(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.storage.ledger_writing.STATEMENTS_MAX", 3)
    ledger, prepared = SqlLedger.open(server, LEDGER, Wall(1000)), set[bytes]()
    first, *others = commands(random.Random(1))
    ledger.apply_all([first])  # before which nothing is known: that takes a lock, and another way
    for command in others:
        ledger.apply_all([command])
        kept = ledger._writer._connection.pgconn.exec_(b"SELECT statement FROM pg_prepared_statements")
        assert kept.ntuples <= 3
        prepared |= {kept.get_value(row, 0) for row in range(kept.ntuples)}
    assert len(prepared) > 6 and sum(ledger.balances().values()) == 0
    verified(ledger.lines(), LEDGER)
    ledger.close()
    empty(server)


def in_form_1(place: Path | str, lines: list[Line]) -> None:
    """A database as Shoal wrote it before escrows could grow, of which only the journal matters here."""
    engine = sa.create_engine(place if isinstance(place, str) else f"sqlite:///{place}")
    blob = "BYTEA" if isinstance(place, str) else "BLOB"
    with engine.begin() as connection:
        for table in (
            f"ledger_about (version INTEGER PRIMARY KEY, ledger {blob} NOT NULL)",
            "ledger_accounts (name VARCHAR(160) PRIMARY KEY, balance_micro BIGINT NOT NULL)",
            f"ledger_escrows (escrow {blob} PRIMARY KEY, due_ms BIGINT, content {blob} NOT NULL)",
            f"ledger_withdrawals (account {blob} PRIMARY KEY, number BIGINT NOT NULL)",
            f"ledger_journal (number BIGINT PRIMARY KEY, line {blob} NOT NULL)",
        ):
            connection.execute(sa.text(f"CREATE TABLE {table}"))
        connection.execute(sa.text("CREATE INDEX ix_ledger_escrows_due_ms ON ledger_escrows (due_ms)"))
        encode = msgspec.msgpack.encode
        connection.execute(sa.text("INSERT INTO ledger_about VALUES (1, :name)"), {"name": encode(LEDGER)})
        connection.execute(sa.text("INSERT INTO ledger_accounts VALUES ('of form 1', 1)"))
        connection.execute(sa.text("INSERT INTO ledger_journal VALUES (:number, :line)"),
                           [{"number": one.number, "line": encode(one)} for one in lines])  # fmt: skip
    engine.dispose()


def lines_of(book: Book, commands: list[Command]) -> list[Line]:
    lines: list[Line] = []
    for number, command in enumerate(commands, start=1):
        previous = lines[-1].hash if lines else BEGINNING
        lines.append(line(number, book.now_ms, command, book.apply(command), previous))
    return lines


def test_a_ledger_of_an_older_form_goes_on(place: Path | str) -> None:
    opening, escrow = an_escrow()
    rest: list[Command] = [Redeem(a_voucher(escrow, NODES[0], amount)) for amount in range(1, 700)]
    asked = a_close(escrow)
    book = Book(LEDGER)
    lines = lines_of(book, [Deposit(CLIENT.address, 5000, "mint"), opening, a_withdrawal(CLIENT, 5, 1), *rest, asked])
    in_form_1(place, lines)
    for _ in range(2):
        ledger = SqlLedger.open(place, LEDGER, Wall(0))
        assert ledger.balances() == {name: one for name, one in book.balances.items() if one}
        for again in (asked, a_withdrawal(CLIENT, 5, 1), opening, rest[-1]):
            with pytest.raises(ShoalError, match="already"):
                ledger.apply(again)
        ledger.close()
    ledger = SqlLedger.open(place, LEDGER, Wall(100))
    ledger.apply_all([])
    assert ledger.balance(account(CLIENT.address)) == 5000 - 5 - 699, "the notice is over"
    assert [type(one.command) for one in verified_lines(ledger)][-1] is Pass
    ledger.close()


def verified_lines(ledger: SqlLedger) -> list[Line]:
    lines = list(ledger.lines())
    verified(lines, LEDGER)
    return lines


def test_what_todays_rules_do_not_allow_is_not_gone_on_with(place: Path | str) -> None:
    opening, escrow = an_escrow()
    lines = lines_of(Book(LEDGER), [Deposit(CLIENT.address, 5000, "mint"), opening, a_close(escrow)])
    twice = line(4, 0, a_close(escrow), (), lines[-1].hash)
    in_form_1(place, [*lines, twice])
    for _ in range(2):
        with pytest.raises(LedgerFailed, match="tables of form 1, and those of form 4 cannot be made .* Line 4 .*rest"):
            SqlLedger.open(place, LEDGER, HeldClock())


def test_a_ledger_of_a_newer_form_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "ledger.sqlite"
    ledger = SqlLedger.open(place, LEDGER, HeldClock())
    with ledger._engine.begin() as connection:
        connection.execute(sa.text("UPDATE ledger_about SET version = 99"))
    ledger.close()
    with pytest.raises(LedgerFailed, match="has tables of form 99, and this Shoal needs 4: use the version that wrote"):
        SqlLedger.open(place, LEDGER, HeldClock())


def test_a_voucher_writes_what_its_payee_has_and_no_more(place: Path | str) -> None:
    """Of an escrow with a thousand payees, each voucher would else write all of them."""
    ledger = SqlLedger.open(place, LEDGER, HeldClock())
    opening, escrow = an_escrow()
    ledger.apply_all([Deposit(CLIENT.address, 5000, "mint"), opening, Redeem(a_voucher(escrow, NODES[1], 7))])
    with ledger._engine.begin() as connection:
        connection.execute(sa.text("UPDATE ledger_escrows SET content = :mark"), {"mark": b"mark"})
        connection.execute(sa.text("UPDATE ledger_paid SET content = :mark"), {"mark": b"mark"})
    ledger.apply_all([Redeem(a_voucher(escrow, NODES[0], amount)) for amount in (10, 20)])
    with ledger._engine.begin() as connection:
        assert connection.execute(sa.text("SELECT content FROM ledger_escrows")).scalars().all() == [b"mark"]
        rows = connection.execute(sa.text("SELECT payee, content FROM ledger_paid")).all()
        paid = {row.payee: row.content for row in rows}
    assert paid.pop(NODES[1].address) == b"mark" and b"mark" not in paid.values() and len(paid) == 1
    ledger.close()


def test_of_large_escrows_few_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand payees each, for next to nothing of money, would else take all memory that there is."""
    monkeypatch.setattr("shoal.storage.ledgers.PAYEES_KNOWN_MAX", 7)
    ledger = SqlLedger.open(tmp_path / "ledger", LEDGER, HeldClock())
    ledger.apply(Deposit(CLIENT.address, 50_000, "mint"))
    opened = [an_escrow(nonce=nonce) for nonce in range(8)]
    steps = [command for command, _ in opened]
    steps += [an_admission(escrow, AccountKey(bytes([of] * 32)), 7) for _, escrow in opened for of in (11, 12)]
    for step in steps:
        ledger.apply(step)
        assert ledger._known is not None
        kept = sum(len(one.payees) for one in ledger._known.book.escrows.values())
        assert kept == ledger._known.payees <= 7
    assert ledger.balances() == verified(ledger.lines(), LEDGER).balances
    ledger.close()


def test_two_processes_may_write_one_ledger_and_neither_goes_by_what_was_before(place: Path | str) -> None:
    one, other = (SqlLedger.open(place, LEDGER, Wall(1000)) for _ in range(2))
    opening, escrow = an_escrow()
    for _ in range(2):
        with pytest.raises(TooLittleMoney):
            one.apply(opening)
    other.apply(Deposit(CLIENT.address, 5000, "payment 1"))
    one.apply(opening)
    with pytest.raises(SameEscrow):
        other.apply(opening)
    for amount in range(10, 100, 20):
        one.apply(Redeem(a_voucher(escrow, NODES[0], amount)))
        with pytest.raises(OldVoucher):
            other.apply(Redeem(a_voucher(escrow, NODES[0], amount)))
        other.apply(Redeem(a_voucher(escrow, NODES[0], amount + 10)))
    assert one.balances() == other.balances() == verified(one.lines(), LEDGER).balances
    one.close()
    other.close()


def test_two_processes_that_write_at_once_do_everything_once(place: Path | str) -> None:
    ledgers = [SqlLedger.open(place, LEDGER, Wall(1000)) for _ in range(2)]
    told = list[list[str]]()

    def book(ledger: SqlLedger) -> None:
        said = []
        for number in range(60):
            (outcome,) = ledger.apply_all([Deposit(CLIENT.address, 1, f"payment {number}")])
            said.append("refused" if isinstance(outcome, SameDeposit) else "booked")
        told.append(said)

    threads = [threading.Thread(target=book, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sorted(both) for both in zip(*told, strict=True)] == [["booked", "refused"]] * 60
    assert len(verified_lines(ledgers[0])) == 60
    for ledger in ledgers:
        assert ledger.balance(account(CLIENT.address)) == 60
        ledger.close()


def test_an_escrow_ends_early_in_a_database_too(place: Path | str) -> None:
    ledger = SqlLedger.open(place, LEDGER, HeldClock())
    opening, escrow = an_escrow()
    for command in (
        Deposit(CLIENT.address, 5000, "mint"), opening, a_top_up(escrow, 500, 1),
        Redeem(a_voucher(escrow, NODES[0], 300)),
        *(a_finish(escrow, node, amount) for node, amount in zip(NODES, (300, 0), strict=True)),
    ):  # fmt: skip
        ledger.apply(command)
    ledger.close()
    ledger = SqlLedger.open(place, LEDGER, HeldClock())
    assert [move.amount_micro for move in ledger.apply(a_close(escrow))] == [1200]
    assert isinstance(verified_lines(ledger)[1].command, Open)
    ledger.close()


def test_a_deposit_is_not_booked_again_by_who_opens_the_ledger_anew(place: Path | str) -> None:
    for at in range(2):
        ledger = SqlLedger.open(place, LEDGER, HeldClock())
        outcomes = ledger.apply_all([Deposit(CLIENT.address, 500, "payment \0 7")] * 2)
        assert sum(isinstance(one, SameDeposit) for one in outcomes) == (1, 2)[at]
        assert ledger.balances() == {account(CLIENT.address): 500, ISSUED: -500}
        ledger.close()


def test_a_bond_outlives_who_keeps_it(place: Path | str) -> None:
    ledger = SqlLedger.open(place, LEDGER, clock := Wall(0))
    node = SELLERS[0].node_id
    ledger.apply(Deposit(CLIENT.address, 5 * MICRO, "mint"))
    bonds = []
    for nonce in range(3):
        command, bond = a_bond(SELLERS[0], nonce)
        ledger.apply(command)
        bonds.append(bond)
    ledger.apply(an_unbond(bonds[0]))
    ledger.apply(a_slash(bonds[1], SELLERS[0]))
    ledger.close()
    ledger = SqlLedger.open(place, LEDGER, clock)
    assert (ledger.bond_of(node), ledger.bond_of(node, until_ms=DAY_MS)) == (2 * MICRO, MICRO)
    assert [one.bond_id for one in ledger.bonds_behind(node)] == sorted((bonds[0], bonds[2]))
    assert [one.bond_id for one in ledger.bonds_behind(node, until_ms=DAY_MS)] == [bonds[2]]
    assert [one.bond_id for one in ledger.bonds_by(CLIENT.address)] == [*sorted((bonds[0], bonds[2])), bonds[1]]
    assert ledger.bonds_behind(node, "testnet") == ledger.bonds_by(NODES[0].address) == ()
    with pytest.raises(BondOver, match="is lost"):
        ledger.apply(a_slash(bonds[1], SELLERS[0]))
    clock.wall_ms = DAY_MS
    assert ledger.bond_of(node) == MICRO
    ledger.apply_all([])
    assert (ledger.balance(account(CLIENT.address)), ledger.balance(FEES)) == (3 * MICRO, MICRO)
    assert isinstance(verified_lines(ledger)[-1].command, PayBack)
    ledger.close()


def test_a_withdrawal_is_not_carried_out_again_by_who_opens_the_ledger_anew(place: Path | str) -> None:
    ledger = SqlLedger.open(place, LEDGER, HeldClock())
    orders = [a_withdrawal(CLIENT, 100, number) for number in (1, 2, 2, 3)]
    for at in range(2):
        outcomes = ledger.apply_all([Deposit(CLIENT.address, 500, f"mint {at}"), *orders])
        refused = [one.sentence for one in outcomes if isinstance(one, ShoalError)]
        assert len(refused) == (1, 4)[at] and all("already; the next one that it signs" in one for one in refused)
        ledger.close()
        ledger = SqlLedger.open(place, LEDGER, HeldClock())
    ledger.apply(a_withdrawal(CLIENT, 100, 4))
    assert ledger.balances() == {account(CLIENT.address): 600, ISSUED: -600}
    assert verified(ledger.lines(), LEDGER).withdrawals == {CLIENT.address: 4}
    ledger.close()


def test_the_time_ends_escrows_before_anything_else_is_done(place: Path | str) -> None:
    ledger = SqlLedger.open(place, LEDGER, clock := Wall(5000))
    ledger.apply(Deposit(CLIENT.address, 5000, "mint"))
    command, escrow = an_escrow(expires_ms=6000)
    ledger.apply(command)
    ledger.apply(Redeem(a_voucher(escrow, NODES[0], 300)))
    with pytest.raises(OldVoucher):
        ledger.apply(Redeem(a_voucher(escrow, NODES[0], 300)))
    clock.wall_ms = 6000
    with pytest.raises(EscrowOver):
        ledger.apply(Redeem(a_voucher(escrow, NODES[0], 400)))
    assert ledger.balance(account(CLIENT.address)) == 4700, "the rest is back"
    clock.wall_ms = 6500
    ledger.apply_all([])
    assert ledger.balance(account(NODES[0].address)) == 300 - 5 and ledger.balance(FEES) == 5
    assert [type(one.command) for one in ledger.lines(3)] == [Pass, Pass]
    assert verified(ledger.lines(), LEDGER).balances[FEES] == 5
    ledger.close()


def test_what_is_no_ledger_is_left_alone(tmp_path: Path) -> None:
    place, clock = tmp_path / "ledger.sqlite", HeldClock()
    SqlLedger.open(place, LEDGER, clock).close()
    with pytest.raises(LedgerFailed, match="is another one: its operator or currency differs"):
        SqlLedger.open(place, HouseLedger(bytes(32), "EUR"), clock)
    (tmp_path / "text").write_text("x" * 5000)
    with pytest.raises(LedgerFailed, match="file is not a database.*Nothing was acknowledged"):
        SqlLedger.open(tmp_path / "text", LEDGER, clock)
    with pytest.raises(LedgerFailed, match="unable to open"):
        SqlLedger.open(tmp_path / "nowhere" / "x", LEDGER, clock)


@pytest.mark.parametrize("after", [1, 7, 40])
def test_what_was_acknowledged_is_there_after_a_kill(place: Path | str, after: int) -> None:
    script = Path(__file__).with_name("ledger_writer.py")
    writer = subprocess.Popen([sys.executable, str(script), str(place)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(after):
        said = int(writer.stdout.readline())
    os.kill(writer.pid, signal.SIGKILL)
    said = int(([str(said), *writer.stdout.read().split()])[-1])
    writer.wait()
    writer.stdout.close()
    ledger = SqlLedger.open(place, LEDGER, HeldClock())
    book = verified(ledger.lines(), LEDGER)
    assert ledger.balances() == {name: one for name, one in book.balances.items() if one}
    (escrow,) = book.escrows.values()
    newest = max(paid.redeemed_micro for paid in escrow.paid.values())
    assert 10 * said <= newest <= 10 * (said + 1), "all that was acknowledged, and at most the one after it"
    ledger.close()


@pytest.mark.parametrize("after", [40, 300])
def test_what_was_acknowledged_to_many_is_there_after_a_kill(place: Path | str, after: int) -> None:
    """While they share transactions: of each, all that it was told, and at most the one that it waits for."""
    script = Path(__file__).with_name("ledger_writers.py")
    writers = subprocess.Popen([sys.executable, str(script), str(place), "32"], stdout=subprocess.PIPE, text=True)
    assert writers.stdout is not None
    said = [writers.stdout.readline() for _ in range(after)]
    os.kill(writers.pid, signal.SIGKILL)
    said += [one for one in writers.stdout.read().splitlines(keepends=True) if one.endswith("\n")]
    writers.wait()
    writers.stdout.close()
    ledger = SqlLedger.open(place, LEDGER, HeldClock())
    ledger.apply(Deposit(CLIENT.address, 1, "after that"))  # what is still under way comes before it
    book = verified(ledger.lines(), LEDGER)
    assert ledger.balances() == {name: one for name, one in book.balances.items() if one}
    told = dict(tuple(map(int, one.split())) for one in said)  # the newest of each
    paid = {int.from_bytes(one.terms.nonce): one.redeemed_micro for one in book.escrows.values()}
    assert len(told) > 20 and all(
        10 * told.get(who, 0) <= micro <= 10 * told.get(who, 0) + 10 for who, micro in paid.items()
    )
    assert told.keys() <= paid.keys()
    ledger.close()


# --- many callers ------------------------------------------------------------------------------------------------


def test_many_callers_share_transactions_and_each_hears_of_its_own(place: Path | str) -> None:
    async def scene() -> None:
        ledger = SqlLedger.open(place, LEDGER, Wall(1000))
        ledger.apply(Deposit(CLIENT.address, 100_000, "mint"))
        group, escrows = GroupCommit(ledger), []
        for nonce in range(8):
            command, name = an_escrow(nonce=nonce)
            await group.apply(command)
            escrows.append(name)

        async def pay(name: bytes) -> list[str]:
            """By vouchers one after another, every third of which is an old one."""
            said = []
            for amount in (100, 200, 150, 300, 400, 50):
                try:
                    await group.apply(Redeem(a_voucher(name, NODES[0], amount)))
                    said.append("paid")
                except OldVoucher:
                    said.append("old")
            return said

        told = await asyncio.gather(*(pay(name) for name in escrows))
        assert told == [["paid", "paid", "old", "paid", "paid", "old"]] * 8
        book = verified(ledger.lines(), LEDGER)
        assert {name: one for name, one in book.balances.items() if one} == ledger.balances()
        assert ledger.balance(account(NODES[0].address)) == 8 * (400 - 40 - 7)  # a tenth held back, a fiftieth the fee
        await group.close()

    asyncio.run(scene())


def test_a_database_that_fails_is_told_to_all_of_its_callers_and_loses_nothing(place: Path | str) -> None:
    async def scene() -> None:
        ledger = SqlLedger.open(place, LEDGER, Wall(1000))
        group = GroupCommit(ledger)
        await group.apply(Deposit(CLIENT.address, 100, "mint"))

        def rename(old: str, new: str) -> None:
            with ledger._engine.begin() as connection:
                connection.execute(sa.text(f"ALTER TABLE {old} RENAME TO {new}"))

        rename("ledger_journal", "ledger_away")
        several = [group.apply(Deposit(CLIENT.address, 7, f"payment {number}")) for number in range(5)]
        for one in await asyncio.gather(*several, return_exceptions=True):
            assert isinstance(one, LedgerFailed) and "Nothing was acknowledged" in one.sentence
        rename("ledger_away", "ledger_journal")
        await group.apply(Deposit(CLIENT.address, 1, "payment 0"))
        assert ledger.balance(account(CLIENT.address)) == 101
        assert verified(ledger.lines(), LEDGER).balances == ledger.balances()
        await group.close()

    asyncio.run(scene())


def test_a_damaged_row_is_told_and_holds_up_nobody(place: Path | str) -> None:
    async def scene() -> None:
        ledger = SqlLedger.open(place, LEDGER, Wall(1000))
        ledger.apply(Deposit(CLIENT.address, 1000, "mint"))
        command, escrow = an_escrow()
        ledger.apply(command)
        ledger.close()
        group = GroupCommit(SqlLedger.open(place, LEDGER, Wall(1000)))
        with group.ledger._engine.begin() as connection:
            connection.execute(sa.text("UPDATE ledger_escrows SET content = :damaged"), {"damaged": b"\xc1"})
        several = [group.apply(Redeem(a_voucher(escrow, NODES[0], amount))) for amount in (1, 2)]
        for one in await asyncio.gather(*several, return_exceptions=True):
            assert isinstance(one, LedgerFailed)
        await group.apply(Deposit(CLIENT.address, 1, "payment"))
        assert group.ledger.balance(account(CLIENT.address)) == 1
        await group.close()

    asyncio.run(scene())


def test_no_more_wait_than_there_is_room_for(tmp_path: Path) -> None:
    async def scene() -> None:
        group = GroupCommit(SqlLedger.open(tmp_path / "ledger.sqlite", LEDGER, Wall(1000)))
        told = await asyncio.gather(
            *(group.apply(Pass(bytes(32))) for _ in range(WAITING_MAX + 2)), return_exceptions=True
        )
        assert sum(isinstance(one, LedgerBusy) for one in told) == 2
        await group.apply(Deposit(CLIENT.address, 1, "mint"))
        await group.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    "url", ["nonsense", "postgresql+psycopg://u:secret@:x/d", "oracle://u:secret@h/d", "sqlite:///secret", "://"]
)
def test_a_url_that_cannot_be_used_is_told_without_its_password(url: str) -> None:
    with pytest.raises(LedgerFailed) as told:
        SqlLedger.open(url, LEDGER, Wall(1000))
    assert "secret" not in told.value.sentence
