"""A process that pays by vouchers until it is killed: `python ledger_writer.py DATABASE`. Each payment that the ledger
has acknowledged is printed."""

import sys
from pathlib import Path

from ledger_requests import CLIENT, LEDGER, NODES, a_voucher, an_escrow

from shoal.ledger.commands import Deposit, Redeem
from shoal.quantities.money import AMOUNT_MAX
from shoal.storage.ledgers import SqlLedger
from shoal.world import SystemClock

place = sys.argv[1]
ledger = SqlLedger.open(place if "://" in place else Path(place), LEDGER, SystemClock())
ledger.apply(Deposit(CLIENT.address, 10**9, "mint"))
command, escrow = an_escrow(amount_micro=10**9, most_micro=AMOUNT_MAX)
ledger.apply(command)
for amount in range(1, 10**6):
    ledger.apply(Redeem(a_voucher(escrow, NODES[amount % 2], 10 * amount)))
    print(amount, flush=True)
