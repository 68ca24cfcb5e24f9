"""Nodes that sell, and a ledger in memory, for the tests of what is sold and paid."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_world import a_key, an_offer

from shoal.house import OutcomeUnknown
from shoal.identity import KeyPair
from shoal.identity.accounts import AccountKey
from shoal.ledger.book import Book
from shoal.ledger.commands import Command, Deposit, SetFee
from shoal.ledger.escrows import Escrow
from shoal.ledger.fees import Announced
from shoal.ledger.journal import BEGINNING, Line, line, verified
from shoal.ledger.moves import MoneyRefused, Move, account
from shoal.market.holds import Terms
from shoal.node.hours import Hours
from shoal.node.sales import Sales
from shoal.protocol.messages import open_record, sign
from shoal.protocol.money import FeeTable, HouseLedger, LedgerName
from shoal.protocol.offers import Offer
from shoal.protocol.prices import Price
from shoal.transport.memory import MemoryEndpoint, MemoryNetwork
from shoal.world import Clock, DirectoryDisk, Disk, HeldClock, Link, SeededDice

OPERATOR = a_key(90)
LEDGER = HouseLedger(OPERATOR.node_id, "USD")
PRICE = Price(360_000)


def an_account(number: int) -> AccountKey:
    return AccountKey(bytes([number] * 32))


PAYER = an_account(50)


class BookLedger:
    """The rules themselves, with a journal. An error in `fails` is raised instead of an answer; a `silent` one gives
    none; so many answers to commands as `loses` says are lost when all is done."""

    def __init__(self, clock: Clock, name: LedgerName = LEDGER) -> None:
        self.name: LedgerName = name
        self.clock = clock
        self.book = Book(name)
        self.lines: list[Line] = []
        self.fails: Exception | None = None
        self.silent = False
        self.loses = 0
        self.asked = 0

    async def apply(self, command: Command) -> tuple[Move, ...]:
        await self._asked()
        if not self.loses:
            return self._apply(command)
        self.loses -= 1
        with contextlib.suppress(MoneyRefused):
            self._apply(command)
        raise OutcomeUnknown("The answer was lost.")

    async def balance(self, address: bytes) -> int:
        await self._asked()
        return self.book.balances.get(account(address), 0)

    async def escrow(self, escrow_id: bytes) -> Escrow | None:
        await self._asked()
        return self.book.escrows.get(escrow_id)

    async def fees(self) -> tuple[Announced, ...]:
        await self._asked()
        return self.book.fees

    def announce(self, fee_ppm: int) -> None:
        """As its operator does, while nobody has money there."""
        table = FeeTable(currency="USD", number=1, from_ms=0, fee_ppm=fee_ppm)
        self._apply(SetFee(sign(OPERATOR, table).to_bytes()))

    def give(self, address: bytes, micro: int) -> None:
        self._apply(Deposit(address, micro, f"payment {len(self.lines)}"))

    async def _asked(self) -> None:
        self.asked += 1
        if self.silent:
            await asyncio.get_running_loop().create_future()
        if self.fails is not None:
            raise self.fails
        self.book.at(self.clock.now_ms())
        for command in self.book.due():
            self._apply(command)

    def _apply(self, command: Command) -> tuple[Move, ...]:
        moves = self.book.apply(command)
        previous = self.lines[-1].hash if self.lines else BEGINNING
        self.lines.append(line(len(self.lines) + 1, self.book.now_ms, command, moves, previous))
        return moves


@dataclass
class Shop:
    """A node that sells, without anything that computes."""

    endpoint: MemoryEndpoint
    sales: Sales
    offer: Offer
    unheld: list[int] = field(default_factory=lambda: [0])

    @property
    def node(self) -> bytes:
        return self.endpoint.node_id


async def a_shop(
    network: MemoryNetwork, key: KeyPair, ledger: BookLedger, clock: Clock, disk: Disk, name: str = "shop", **terms: Any
) -> Shop:
    endpoint, unheld = network.endpoint(key), [0]

    async def changed() -> None:
        pass

    sells = Terms(**{"price": PRICE, "ledger": LEDGER, "payee": an_account(1).address, **terms})
    sales = Sales(
        sells, key=key, name=name, disk=disk, endpoint=endpoint, ledger=ledger, clock=clock, unheld=lambda: unheld[0],
        changed=changed,
    )  # fmt: skip
    Hours(sales, key=key, endpoint=endpoint, ledger=ledger, clock=clock)
    await endpoint.listen(f"tcp://{name}:0")
    envelope = an_offer(
        key, 1, name=name, addresses=tuple(endpoint.addresses), price=sells.price, ledger=sells.ledger,
        slots=sells.slots, reclaim_notice_ms=sells.reclaim_notice_ms,
    )  # fmt: skip
    return Shop(endpoint, sales, open_record(envelope, Offer), unheld)


class Street:
    """Shops, and clients that go to them."""

    def __init__(self) -> None:
        self.clock = HeldClock()
        self.network = MemoryNetwork(self.clock, dice=SeededDice(1))
        self.ledger = BookLedger(self.clock)
        self.shops: list[Shop] = []
        self.ends: list[MemoryEndpoint] = []

    async def shop(self, number: int, disk: Disk | Path, *, payee: int | None = None, **terms: Any) -> Shop:
        on = DirectoryDisk(disk) if isinstance(disk, Path) else disk
        terms = {"payee": an_account(payee or number).address, **terms}
        shop = await a_shop(self.network, a_key(number), self.ledger, self.clock, on, f"shop-{number}", **terms)
        self.shops.append(shop)
        return shop

    def client(self, number: int) -> MemoryEndpoint:
        """All on one machine."""
        endpoint = self.network.endpoint(a_key(number), machine="clients")
        self.ends.append(endpoint)
        return endpoint

    def linker(self, endpoint: MemoryEndpoint) -> Any:
        async def link(node: bytes, offer: Offer) -> Link:
            known = endpoint.links().get(node)
            if known is not None and not known.closed:
                return known
            return await endpoint.dial(node, offer.addresses, deadline_s=5.0)

        return link

    async def close(self, shops: Sequence[Shop] | None = None) -> None:
        for shop in self.shops if shops is None else shops:
            await shop.sales.close()
            await shop.endpoint.close()
        for endpoint in self.ends:
            await endpoint.close()


def run(story: Callable[[Street], Awaitable[None]], deposit: int = 10_000_000) -> None:
    """What happens on a street where PAYER has some money; at the end the books agree."""

    async def whole() -> None:
        street = Street()
        if deposit:
            street.ledger.give(PAYER.address, deposit)
        try:
            async with asyncio.timeout(60):
                await story(street)
        finally:
            await street.close()
        verified(street.ledger.lines, LEDGER)
        assert sum(street.ledger.book.balances.values()) == 0

    asyncio.run(whole())
