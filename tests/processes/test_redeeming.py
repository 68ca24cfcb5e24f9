"""A node that is paid out of many escrows at a ledger that is far away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from money_world import BookLedger, Street
from test_sales import PAYER, Client, voucher

from shoal.ledger.commands import Redeem
from shoal.node.sales import REDEEM_EVERY_S, REDEEMED_AT_ONCE


class FarLedger(BookLedger):
    """Answers no Redeem before as many are under way as a node brings at once."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.under_way = asyncio.Barrier(REDEEMED_AT_ONCE)

    async def apply(self, command: Any) -> Any:
        if isinstance(command, Redeem):
            await self.under_way.wait()
        return await super().apply(command)


def test_many_vouchers_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """One after the other they would be redeemed when the notices of their escrows are over."""

    async def story() -> None:
        street = Street()
        street.ledger = ledger = FarLedger(street.clock)
        ledger.give(PAYER.address, 2 * REDEEMED_AT_ONCE * 1_000_000)
        shop = await street.shop(1, tmp_path / "one")
        client = Client(street)
        held = await client.quotes.hold(shop.node, shop.offer)
        escrows = [await client.escrow(shop) for _ in range(2 * REDEEMED_AT_ONCE)]
        for escrow in escrows:
            held = await client.quotes.take(held, escrow)
            await client.quotes.pay(shop.node, voucher(escrow, shop, 70), last=False, deadline_s=5)
        await street.clock.advance(REDEEM_EVERY_S)
        async with asyncio.timeout(30):
            while any(not ledger.book.escrows[escrow].redeemed_micro for escrow in escrows):
                await asyncio.to_thread(int)  # writes are made in a thread
        await street.close()

    asyncio.run(story())
