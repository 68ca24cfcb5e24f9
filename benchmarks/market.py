"""The market, measured.

    python benchmarks/market.py [--only PARTS] [--quick] [--save NAME]

**selection**: without a network, over 100,000 live offers on one core: one node, why none, a gang of 16 within a
latency; and gangs beside those of an exact solver.

**vouchers**: how many a core checks in a second, beside the bare recovery of a signer in the library.

**journal**: transactions a second that are durable before the reply, on SQLite and on PostgreSQL (by its Unix-domain
socket; by TCP beside it): one writer that waits for each, and 64 that share transactions (group commit); beside each,
the same number of bare one-row transactions.

**hammer**: 200 clients that buy and pay at once, from 16 nodes, through two hubs of which one is killed: what was sold
twice, what was lost, and how long a quote takes.

**start**: from `shoal train` to the first inner step, on nodes that cost something, and what of it the market takes.

Prints a table, and last one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa
from hammer import hammer
from results_form import chosen, figure, report, show
from selection import selection
from starting import start

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "processes"))
from ledger_requests import CLIENT, DRIVER, LEDGER, NODES, a_voucher, an_escrow
from postgres import PROGRAMS, Postgres, empty

from shoal.identity.accounts import signer_of
from shoal.ledger.commands import Command, Deposit, Redeem
from shoal.ledger.journal import verified
from shoal.quantities.money import AMOUNT_MAX
from shoal.storage.group_commit import GroupCommit
from shoal.storage.ledgers import SqlLedger
from shoal.storage.sqlite import sqlite_engine
from shoal.world import SystemClock

VOUCHERS_GOAL, JOURNAL_GOAL = 10_000, 1_000
WRITERS = 64
DEPOSIT = 10**12


def vouchers(quick: bool) -> list[dict[str, object]]:
    """In seconds of a core: what else the machine does is not theirs."""
    count = 500 if quick else 20_000
    signed = [a_voucher(bytes(32), NODES[at % 2], at) for at in range(count)]
    began = time.process_time()
    for one in signed:
        one.check(LEDGER, DRIVER.address)
    rate = count / (time.process_time() - began)
    digests = [(one.voucher.digest(LEDGER), one.signature) for one in signed]
    began = time.process_time()
    for digest, signature in digests:
        signer_of(digest, signature)
    bare = count / (time.process_time() - began)
    return [
        figure("vouchers/checked", round(rate), "/s", f"at least {VOUCHERS_GOAL:,}", rate >= VOUCHERS_GOAL,
               f"one core; the recovery of the signer alone, by libsecp256k1: {bare:,.0f} /s"),
    ]  # fmt: skip


def journal(quick: bool) -> list[dict[str, object]]:
    alone, together = (50, 500) if quick else (3_000, 30_000)
    with tempfile.TemporaryDirectory() as folder:
        figures = _in_database("sqlite", Path(folder) / "ledger.sqlite", alone, together)
    if not PROGRAMS:
        print("PostgreSQL is not installed; its figures are left out.", file=sys.stderr)
        return figures
    with Postgres() as server:
        figures += _in_database("postgres", server.socket_url, alone, together)
        empty(server.url)
        figures.append(
            figure("journal/postgres/one_writer_tcp", round(by_one_writer(server.url, alone)), "/s",
                   compared_with=f"the same by TCP; bare one-row transactions: {rows_alone(server.url, alone):,.0f} /s")
        )  # fmt: skip
    return figures


def _in_database(name: str, place: Path | str, alone: int, together: int) -> list[dict[str, object]]:
    one = by_one_writer(place, alone)
    many = asyncio.run(by_many(place, together))
    bare = rows_alone(place, alone)
    return [
        figure(f"journal/{name}/one_writer", round(one), "/s", f"at least {JOURNAL_GOAL:,}",
               one >= JOURNAL_GOAL, f"durable before each reply; bare one-row transactions: {bare:,.0f} /s"),
        figure(f"journal/{name}/{WRITERS}_writers", round(many), "/s", f"at least {JOURNAL_GOAL:,}",
               many >= JOURNAL_GOAL, "durable before each reply, in shared transactions"),
    ]  # fmt: skip


def payments(ledger: SqlLedger, count: int, nonce: int) -> list[Command]:
    """Vouchers that are signed beforehand: payers sign on machines of their own."""
    ledger.apply(Deposit(CLIENT.address, DEPOSIT, f"mint {nonce}"))
    command, escrow = an_escrow(amount_micro=DEPOSIT, most_micro=AMOUNT_MAX, nonce=nonce)
    ledger.apply(command)
    return [Redeem(a_voucher(escrow, NODES[at % 2], 10 * at)) for at in range(1, count + 1)]


def by_one_writer(place: Path | str, count: int) -> float:
    ledger = SqlLedger.open(place, LEDGER, SystemClock())
    commands = payments(ledger, count, nonce=1)
    began = time.perf_counter()
    for command in commands:
        ledger.apply(command)
    rate = count / (time.perf_counter() - began)
    ledger.close()
    return rate


async def by_many(place: Path | str, count: int) -> float:
    ledger = SqlLedger.open(place, LEDGER, SystemClock())
    group = GroupCommit(ledger)
    waiting = iter(payments(ledger, count, nonce=2))

    async def write() -> None:
        for command in waiting:
            await group.apply(command)

    began = time.perf_counter()
    await asyncio.gather(*(write() for _ in range(WRITERS)))
    rate = count / (time.perf_counter() - began)
    assert verified(ledger.lines(), LEDGER).balances
    await group.close()
    return rate


def rows_alone(place: Path | str, count: int) -> float:
    engine = sqlite_engine(place) if isinstance(place, Path) else sa.create_engine(place)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS bare"))
        connection.execute(sa.text("CREATE TABLE bare (number BIGINT PRIMARY KEY, line VARCHAR(600))"))
    insert = sa.text("INSERT INTO bare VALUES (:number, :line)")
    began = time.perf_counter()
    for number in range(count):
        with engine.begin() as connection:
            connection.execute(insert, {"number": number, "line": "x" * 500})
    rate = count / (time.perf_counter() - began)
    engine.dispose()
    return rate


PARTS = {"selection": selection, "vouchers": vouchers, "journal": journal, "hammer": hammer, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PARTS", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--quick", action="store_true", help="a short form; shows that it works, proves little")
    parser.add_argument("--save", metavar="NAME", help="keep the result under benchmarks/results/")
    given = parser.parse_args()
    figures: list[dict[str, object]] = []
    for part in chosen(given.only, PARTS, parser):
        found = PARTS[part](given.quick)
        show(found)
        figures += found
    report(figures, save_as=given.save)


if __name__ == "__main__":
    main()
