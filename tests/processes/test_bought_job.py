"""A job on hours that its owner bought: real nodes, a real ledger, and the prices of the trade instead of the posted
ones. What the nodes promised when the hours were claimed lies in their folders."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from job_world import Watch, job_text, options_for, owner_key, parsed

from shoal.house import RemoteLedger
from shoal.identity import KeyPair, load_key, load_or_create_key
from shoal.identity.accounts import address_text, create_account
from shoal.ledger.commands import Open
from shoal.ledger.journal import verified
from shoal.market.batches import block_hash
from shoal.market.bids import terms_for
from shoal.market.holds import Hour, Kept, Slots
from shoal.protocol.holds import Hold
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import sign
from shoal.protocol.orders import HOUR_MS, Bid, Block, NodeClass, OrderTerms
from shoal.protocol.prices import Price
from shoal.purse.bills import FILE, Payments
from shoal.sdk.hours import BoughtHour, KeptBid, KeptBids, bought_at, bought_hours, free_for, hour_key
from shoal.sdk.local import LocalShoal
from shoal.sdk.orders import KeptOrders
from shoal.sdk.spending import Spending
from shoal.sdk.train import DRIVER_KEY, train
from shoal.transport import TlsEndpoint
from shoal.world import SystemClock

BOUGHT, POSTED = Price(36_000_000), "3600/h"
NODES = ("amber", "birch")
BUDGET = 5_000_000


@pytest.mark.timeout(400)
def test_a_job_uses_hours_that_were_bought_for_what_they_cost(tmp_path: Path) -> None:
    async def play() -> None:
        clock, account = SystemClock(), create_account(tmp_path / "account.key")
        payees = {name: create_account(tmp_path / f"{name}.key").address for name in NODES}
        now_ms = clock.now_ms()
        async with LocalShoal(tmp_path / "town") as shoal:
            await shoal.start_hub()
            started = await shoal.start_ledger(options=["--mint-max", "100"])
            ticket = LedgerTicket.parse(started.ready["ticket"])
            endpoint = TlsEndpoint(KeyPair.generate())
            ledger = RemoteLedger(endpoint, ticket, clock)
            await ledger.mint(account.address, 50_000_000)

            block = Block(
                of=NodeClass(device="cpu", memory_gib=1), start_ms=now_ms // HOUR_MS * HOUR_MS, ledger=ticket.ledger
            )
            key = hour_key(owner_key(), block)
            terms = OrderTerms(
                auctioneer=bytes(32), batch=2, expires_ms=now_ms, sequence=1, block=block,
                limit_micro=BOUGHT.micro_per_h,
            )  # fmt: skip
            money = terms_for(terms, 1, key.node_id, account.address, bytes(32))
            escrow = money.escrow_id(ticket.ledger)
            await ledger.apply(Open(money, account.sign(escrow)))
            hours = []
            for name in NODES:
                node = load_or_create_key(_folder(shoal, name) / "node.key")
                hold = Hold(
                    slot=0, number=now_ms - 3_000_000, client=key.node_id, work="train", from_ms=now_ms - 600_000,
                    until_ms=now_ms + HOUR_MS - 600_000, price=BOUGHT, ledger=ticket.ledger, payer=account.address,
                    payee=payees[name], escrow=escrow,
                )  # fmt: skip
                signed = sign(node, hold)
                hour = Hour(
                    slot=0, start_ms=hold.from_ms, auction="", batch=2, order=bytes(32), lapses_ms=0,
                    kept=Kept(hold, signed.record_id),
                )  # fmt: skip
                (_folder(shoal, name) / "sales").mkdir(parents=True)
                slots = Slots(number=hold.number, now_ms=now_ms - 600_000, hours=(hour,))
                (_folder(shoal, name) / "sales" / "slots").write_bytes(msgspec.msgpack.encode(slots))
                hours.append(BoughtHour(
                    node=node.node_id, payee=payees[name], price_micro=BOUGHT.micro_per_h, hold=signed.to_bytes(),
                ))  # fmt: skip
            bid = sign(key, Bid(terms=terms, blocks=1, escrow=escrow))
            orders = tmp_path / "orders"
            KeptBids(KeptOrders(orders, bytes(32))).keep(KeptBid(
                order=bid.to_bytes(), ledger=ticket.ledger, escrow=money, signature=account.sign(escrow),
                hours=tuple(hours),
            ))  # fmt: skip
            await asyncio.gather(
                *(
                    shoal.start_node(
                        name,
                        options=["--threads", "1", "--storage", "1 GiB", "--price", POSTED, "--ledger", str(ticket),
                                 "--account", address_text(payees[name])],
                    )
                    for name in NODES
                ),
                shoal.start_node("cedar", options=["--threads", "1", "--storage", "1 GiB"]),
            )  # fmt: skip

            assert bought_at(orders, block.start_ms + HOUR_MS) == {}
            [(found, bids)] = bought_at(orders, block.start_ms).items()
            assert block_hash(found) == block_hash(block)
            text = job_text(tmp_path)
            options = options_for(shoal, tmp_path / "run", owner_key(), Watch())
            options.spending = Spending(account, ticket, BUDGET, notice_ms=30_000, audit_ms=0)
            options.bought = bought_hours(owner_key(), found, [one for _, one in bids])
            await free_for(bids, account, ledger, BUDGET, clock)
            assert [one.used for _, one in bought_at(orders, block.start_ms)[found]] == [True]
            closing = await ledger.escrow(escrow)
            assert closing is not None and closing.closing
            report = await train(parsed(text, tmp_path), text, options)
            assert load_key(tmp_path / "run" / DRIVER_KEY).node_id == key.node_id
            assert {one.name for one in report.nodes} == set(NODES), "the free node was not bought"
            payments = msgspec.json.decode((tmp_path / "run" / FILE).read_bytes(), type=Payments)
            assert {one.micro_per_h for term in payments.terms for one in term.nodes.values()} == {BOUGHT.micro_per_h}
            assert report.bill is not None and 0 < report.bill.charged <= BUDGET
            book = verified([line async for line in ledger.lines()], ticket.ledger)
            paid = book.escrows[payments.terms[-1].escrow].paid
            assert sum(paid[payee].redeemed_micro for payee in payees.values() if payee in paid) == report.bill.charged
            await endpoint.close()

    asyncio.run(play())


def _folder(shoal: LocalShoal, name: str) -> Path:
    return shoal.folder / "nodes" / name
