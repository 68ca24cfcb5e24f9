"""A process in which many pay by vouchers through one ledger until it is killed: `python ledger_writers.py DATABASE
HOW_MANY`. Each payment that was acknowledged is printed, as who paid and how often."""

import asyncio
import sys
from pathlib import Path

from ledger_requests import CLIENT, LEDGER, NODES, a_voucher, an_escrow

from shoal.ledger.commands import Deposit, Redeem
from shoal.quantities.money import AMOUNT_MAX
from shoal.storage.group_commit import GroupCommit
from shoal.storage.ledgers import SqlLedger
from shoal.world import SystemClock


async def main(place: str, count: int) -> None:
    group = GroupCommit(SqlLedger.open(place if "://" in place else Path(place), LEDGER, SystemClock()))
    await group.apply(Deposit(CLIENT.address, count * 10**9, "mint"))

    async def pay(who: int) -> None:
        command, escrow = an_escrow(amount_micro=10**9, most_micro=AMOUNT_MAX, nonce=who)
        await group.apply(command)
        for times in range(1, 10**6):
            await group.apply(Redeem(a_voucher(escrow, NODES[0], 10 * times)))
            print(who, times, flush=True)

    await asyncio.gather(*map(pay, range(count)))


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
