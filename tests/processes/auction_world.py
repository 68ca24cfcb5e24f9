"""Auctions for tests; and, run as a program, one as a process.

python auction_world.py DATA EVERY_S [signing|published]    runs an auction until it is killed, and prints its ticket;
                                                            it dies by itself when it has signed a batch with orders
                                                            and not yet written it, or has written it and told nobody
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shoal.auctions.server
from shoal.auctions import RemoteAuction
from shoal.auctions.server import AuctionServer, AuctionSettings
from shoal.auctions.store import AuctionStore
from shoal.identity import Envelope, KeyPair
from shoal.identity.accounts import AccountKey
from shoal.ledger.commands import Deposit, Open
from shoal.market.bids import terms_for
from shoal.protocol.auctions import AuctionTicket
from shoal.protocol.messages import sign
from shoal.protocol.money import HouseLedger
from shoal.protocol.orders import HOUR_MS, Ask, Bid, Block, NodeClass, OrderTerms
from shoal.transport import MemoryNetwork
from shoal.world import Endpoint, HeldClock, Link, MemoryLedger, SeededDice, SystemClock, SystemDice

PATIENCE_S = 60.0
EVERY_S = 10.0
ANN, BEN, CAT, *NODES = (KeyPair.from_seed(bytes([number] * 32)) for number in range(9))
H100 = NodeClass(device="H100", memory_gib=80)
LEDGER = HouseLedger(ANN.node_id, "USD")


class JumpingClock(HeldClock):
    """One whose wall time can be set, as people and NTP do."""

    def jump(self, seconds: float) -> None:
        self._start_ms += round(1000 * seconds)


def terms(auctioneer: bytes, batch: int, now_ms: int, limit: int, **changed: Any) -> OrderTerms:
    """For the hour after the next."""
    block = Block(of=H100, start_ms=(now_ms // HOUR_MS + 2) * HOUR_MS, ledger=LEDGER)
    usual: dict[str, Any] = {
        "auctioneer": auctioneer, "batch": batch, "expires_ms": now_ms + HOUR_MS, "sequence": 1, "block": block,
        "limit_micro": limit,
    }  # fmt: skip
    return OrderTerms(**{**usual, **changed})


@dataclass
class Hall:
    """A running auction on a network inside the process, and who asks it."""

    server: AuctionServer
    ticket: AuctionTicket
    network: MemoryNetwork
    clock: JumpingClock
    ledger: MemoryLedger
    remote: RemoteAuction
    endpoint: Endpoint

    def somebody(self) -> RemoteAuction:
        return RemoteAuction(self.network.endpoint(KeyPair.generate()), self.ticket, self.clock)

    async def link(self) -> Link:
        return await self.endpoint.dial(self.ticket.auctioneer, self.ticket.addresses)

    def bid(self, key: KeyPair, batch: int, limit: int = 400_000, blocks: int = 1, **changed: Any) -> Envelope:
        """With its money set aside."""
        said = terms(self.ticket.auctioneer, batch, self.clock.now_ms(), limit, **changed)
        return sign(key, Bid(terms=said, blocks=blocks, escrow=self.set_aside(said, blocks, key.node_id)))

    def set_aside(self, said: OrderTerms, blocks: int, trader: bytes) -> bytes:
        book, payer = self.ledger.book, AccountKey(trader)
        book.at(self.clock.now_ms())
        money = terms_for(said, blocks, trader, payer.address, len(book.escrows).to_bytes(32))
        name = money.escrow_id(LEDGER)
        book.apply(Deposit(payer.address, money.amount_micro, f"payment {len(book.escrows)}"))
        book.apply(Open(money, payer.sign(name)))
        return name

    def ask(self, key: KeyPair, batch: int, limit: int = 200_000, **changed: Any) -> Envelope:
        said = terms(self.ticket.auctioneer, batch, self.clock.now_ms(), limit, **changed)
        return sign(key, Ask(terms=said, payee=key.node_id[:20]))

    async def until_closed(self, number: int) -> None:
        """Let so much time pass that a batch with orders is closed, and wait until it is published."""
        await self.clock.advance(EVERY_S)
        while (await self.remote.about()).running <= number:  # the disk takes no time of this clock
            await asyncio.sleep(0.005)
            await self.clock.advance(0.05)


@asynccontextmanager
async def a_hall(data: Path, **settings: Any) -> AsyncIterator[Hall]:
    clock = JumpingClock()
    network = MemoryNetwork()
    chosen = AuctionSettings(data, every_s=EVERY_S, listen="tcp://auction:7", **settings)
    ledger = MemoryLedger(LEDGER, clock)
    server = AuctionServer(chosen, network.endpoint, lambda _: ledger, clock, SeededDice(7))
    ticket = await server.start()
    endpoint = network.endpoint(KeyPair.generate())
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield Hall(server, ticket, network, clock, ledger, RemoteAuction(endpoint, ticket, clock), endpoint)
    finally:
        await endpoint.close()
        await server.stop()
        await server.stop()


class AuctionProcess:
    """An auction as a process of its own, which can be killed."""

    def __init__(self, process: asyncio.subprocess.Process, ticket: AuctionTicket) -> None:
        self.process, self.ticket = process, ticket

    @classmethod
    async def start(cls, data: Path, every_s: float, *dies: str) -> AuctionProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, str(data), str(every_s), *dies, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return cls(process, AuctionTicket.parse((await process.stdout.readline()).decode()))

    async def kill(self) -> None:
        self.process.kill()
        await self.killed()

    async def killed(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            assert await self.process.wait() == -signal.SIGKILL


class DyingStore(AuctionStore):
    when = ""

    def publish(self, number: int, published: bytes, next_seed: bytes) -> None:
        if number > 1 and self.when == "signing":
            os.kill(os.getpid(), signal.SIGKILL)
        super().publish(number, published, next_seed)
        if number > 1 and self.when == "published":
            os.kill(os.getpid(), signal.SIGKILL)


async def serve(data: Path, every_s: float) -> None:
    from shoal.transport import TlsEndpoint

    clock = SystemClock()
    ledger = MemoryLedger(LEDGER, clock)
    server = AuctionServer(
        AuctionSettings(data, every_s=every_s), TlsEndpoint, lambda _: ledger, clock, SystemDice()
    )  # fmt: skip
    print(await server.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    DyingStore.when = "".join(sys.argv[3:])
    shoal.auctions.server.AuctionStore = DyingStore  # type: ignore[misc]
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2])))
