"""Whoever keeps the money: one suite for every ledger, in memory, in a database, and at the other end of a link."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ledger_requests import CLIENT, DRIVER, LEDGER, NODES, OPERATOR, a_fee_table, a_voucher, a_withdrawal, an_escrow
from postgres import PROGRAMS, empty, postgres

from shoal.house import RemoteLedger
from shoal.house.server import LedgerServer, LedgerSettings, deposit
from shoal.identity import KeyPair, load_key
from shoal.ledger.book import NotSigned, SameEscrow, UnknownEscrow, WithdrawalOutOfTurn
from shoal.ledger.commands import Close, Deposit, Redeem, Withdraw, Withhold
from shoal.ledger.escrows import BadTerms, EscrowOver, NotYours, OldVoucher, State, TooMuchPromised
from shoal.ledger.fees import FEE_NOTICE_MS, BadFees, OtherFee, fee_at
from shoal.ledger.moves import ISSUED, Move, TooLittleMoney, account, escrowed, held
from shoal.protocol.money import Closing, LedgerName, Withholding
from shoal.storage.group_commit import GroupCommit
from shoal.storage.ledgers import SqlLedger
from shoal.transport import TlsEndpoint
from shoal.world import HeldClock, Ledger, MemoryLedger

KINDS = ["memory", "sqlite", "remote", *([] if not PROGRAMS else ["postgres"])]


@dataclass
class World:
    ledger: Ledger
    clock: HeldClock
    deposit: Callable[[bytes, int], Awaitable[Any]]
    """As the operator does it."""
    operator: KeyPair = OPERATOR

    @property
    def name(self) -> LedgerName:
        return self.ledger.name

    async def an_open_escrow(self, **terms: Any) -> bytes:
        await self.deposit(CLIENT.address, 10_000)
        command, name = an_escrow(ledger=self.name, **terms)
        await self.ledger.apply(command)
        return name

    def voucher(self, escrow: bytes, amount: int, **of: Any) -> Redeem:
        return Redeem(a_voucher(escrow, NODES[0], amount, ledger=self.name, **of))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


PAYMENTS = itertools.count(1)


def a_payment() -> str:
    """Each is booked once."""
    return f"payment {next(PAYMENTS)}"


@asynccontextmanager
async def beside(made: GroupCommit | MemoryLedger, clock: HeldClock) -> AsyncIterator[World]:
    yield World(made, clock, lambda address, amount: made.apply(Deposit(address, amount, a_payment())))
    if isinstance(made, GroupCommit):
        await made.close()


@asynccontextmanager
async def afar(data: Path, clock: HeldClock) -> AsyncIterator[World]:
    """Over TLS, on loopback."""
    server = LedgerServer(LedgerSettings(data), TlsEndpoint, clock)
    ticket = await server.start()
    endpoint = TlsEndpoint(KeyPair.generate())
    try:

        async def book(address: bytes, amount: int) -> None:
            await asyncio.to_thread(deposit, data, address, amount, a_payment(), clock)

        operator = load_key(data / "operator.key")
        yield World(RemoteLedger(endpoint, ticket, clock), clock, book, operator)
    finally:
        await endpoint.close()
        await server.stop()


Scene = Callable[[World], Awaitable[None]]


@pytest.fixture(params=KINDS)
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Scene], None]]:
    url = request.getfixturevalue("server") if request.param == "postgres" else None
    clock = HeldClock()

    async def on_stage(scene: Scene) -> None:
        match request.param:
            case "memory":
                world = beside(MemoryLedger(LEDGER, clock), clock)
            case "remote":
                world = afar(tmp_path, clock)
            case _:
                world = beside(GroupCommit(SqlLedger.open(url or tmp_path / "ledger.sqlite", LEDGER, clock)), clock)
        async with asyncio.timeout(60), world as one:
            await scene(one)

    yield lambda scene: asyncio.run(on_stage(scene))
    if url is not None:
        empty(url)


def test_money_goes_in_to_an_account_and_out(play: Callable[[Scene], None]) -> None:
    async def scene(world: World) -> None:
        me = CLIENT.address
        assert await world.ledger.balance(me) == 0
        await world.deposit(me, 700)
        order = a_withdrawal(CLIENT, 300, 1, world.name)
        assert await world.ledger.apply(order) == (Move(account(me), ISSUED, 300),)
        assert await world.ledger.balance(me) == 400
        with pytest.raises(WithdrawalOutOfTurn, match="carried out already; the next one that it signs is number 2"):
            await world.ledger.apply(order)
        with pytest.raises(WithdrawalOutOfTurn, match="comes before its turn"):
            await world.ledger.apply(a_withdrawal(CLIENT, 1, 3, world.name))
        with pytest.raises(TooLittleMoney, match="less than is to leave it"):
            await world.ledger.apply(a_withdrawal(CLIENT, 401, 2, world.name))
        forged = msgspec.structs.replace(order.order, number=2, amount_micro=1)
        with pytest.raises(NotSigned, match="does not carry its signature"):
            await world.ledger.apply(Withdraw(forged, DRIVER.sign(forged.digest(world.name))))
        assert await world.ledger.balance(me) == 400

    play(scene)


def test_an_escrow_is_opened_with_the_fee_that_the_operator_has_signed_for(play: Callable[[Scene], None]) -> None:
    async def scene(world: World) -> None:
        async def set_fee(*of: int) -> None:
            await world.ledger.apply(a_fee_table(*of, operator=world.operator))

        assert await world.ledger.fees() == ()
        await set_fee(1, 0, 20_000)
        await world.an_open_escrow(fee_ppm=20_000)
        for fee_ppm in (0, 50_000):
            with pytest.raises(OtherFee, match="takes 2 % of what an escrow pays"):
                await world.an_open_escrow(fee_ppm=fee_ppm, nonce=1)
        then = world.clock.now_ms() + FEE_NOTICE_MS
        with pytest.raises(BadFees, match="comes too soon"):
            await set_fee(2, then - 1, 50_000)
        await set_fee(2, then, 50_000)
        tables = await world.ledger.fees()
        assert [(one.table.number, one.table.fee_ppm) for one in tables] == [(1, 20_000), (2, 50_000)]
        assert [fee_at(tables, at) for at in (then - 1, then)] == [20_000, 50_000]
        world.clock.jump(FEE_NOTICE_MS)
        with pytest.raises(OtherFee, match="takes 5 %"):
            await world.an_open_escrow(fee_ppm=20_000, nonce=1)
        await world.an_open_escrow(fee_ppm=50_000, nonce=1)

    play(scene)


def test_an_escrow_pays_as_its_vouchers_say(play: Callable[[Scene], None]) -> None:
    async def scene(world: World) -> None:
        assert await world.ledger.escrow(bytes(32)) is None
        await world.deposit(CLIENT.address, 999)
        command, name = an_escrow(ledger=world.name)
        with pytest.raises(TooLittleMoney):
            await world.ledger.apply(command)
        assert await world.ledger.escrow(name) is None, "what was refused left nothing behind"
        await world.deposit(CLIENT.address, 1)
        assert await world.ledger.apply(command) == (Move(account(CLIENT.address), escrowed(name), 1000),)
        with pytest.raises(SameEscrow):
            await world.ledger.apply(command)
        moves = await world.ledger.apply(world.voucher(name, 500))
        assert sum(one.amount_micro for one in moves) == 500
        for refused, why in (
            (world.voucher(name, 500), OldVoucher),
            (world.voucher(name, 801), TooMuchPromised),
            (world.voucher(name, 600, key=NODES[0]), NotYours),
            (world.voucher(bytes(32), 600), UnknownEscrow),
        ):
            with pytest.raises(why):
                await world.ledger.apply(refused)
        found = await world.ledger.escrow(name)
        assert found is not None and found.terms == command.terms and found.opened_ms == world.clock.now_ms()
        assert found.state is State.OPEN and found.paid[NODES[0].address].redeemed_micro == 500
        assert await world.ledger.balance(NODES[0].address) == 500 - 50 - 9  # a tenth held back, a fiftieth the fee

    play(scene)


def test_an_auditor_and_nobody_else_takes_back_what_was_held_back(play: Callable[[Scene], None]) -> None:
    async def scene(world: World) -> None:
        name = await world.an_open_escrow(auditor=DRIVER.address)
        await world.ledger.apply(world.voucher(name, 500))
        order = Withholding(escrow=name, payee=NODES[0].address, amount_micro=50, evidence=bytes(32))
        with pytest.raises(NotSigned):
            await world.ledger.apply(Withhold(order, CLIENT.sign(order.digest(world.name))))
        moves = await world.ledger.apply(Withhold(order, DRIVER.sign(order.digest(world.name))))
        assert moves == (Move(held(name, NODES[0].address), account(CLIENT.address), 50),)
        assert await world.ledger.balance(CLIENT.address) == 10_000 - 1000 + 50

    play(scene)


def test_a_payer_gets_the_rest_after_its_notice(play: Callable[[Scene], None]) -> None:
    async def scene(world: World) -> None:
        name = await world.an_open_escrow()
        await world.ledger.apply(world.voucher(name, 300))
        wish = Closing(name)
        with pytest.raises(NotSigned):
            await world.ledger.apply(Close(wish, NODES[0].sign(wish.digest(world.name))))
        assert await world.ledger.apply(Close(wish, CLIENT.sign(wish.digest(world.name)))) == ()
        await world.ledger.apply(world.voucher(name, 400))
        await world.clock.advance(0.1)
        with pytest.raises(EscrowOver):
            await world.ledger.apply(world.voucher(name, 500))
        assert await world.ledger.balance(CLIENT.address) == 10_000 - 400
        await world.clock.advance(0.5)
        with pytest.raises(EscrowOver):  # whatever is asked, what the time has brought comes first
            await world.ledger.apply(world.voucher(name, 500))
        assert await world.ledger.balance(NODES[0].address) == 400 - 7  # a fiftieth of 360, and of 40
        found = await world.ledger.escrow(name)
        assert found is not None and found.state is State.SETTLED

    play(scene)


def test_terms_that_come_too_late_open_nothing(play: Callable[[Scene], None]) -> None:
    async def scene(world: World) -> None:
        await world.deposit(CLIENT.address, 5000)
        command, name = an_escrow(ledger=world.name, expires_ms=world.clock.now_ms())
        with pytest.raises(BadTerms):
            await world.ledger.apply(command)
        assert await world.ledger.escrow(name) is None and await world.ledger.balance(CLIENT.address) == 5000

    play(scene)


def test_many_at_once_are_as_one_after_the_other(play: Callable[[Scene], None]) -> None:
    async def scene(world: World) -> None:
        name = await world.an_open_escrow()
        told = await asyncio.gather(
            *(world.ledger.apply(world.voucher(name, amount)) for amount in range(1, 101)), return_exceptions=True
        )
        assert all(isinstance(one, tuple | OldVoucher) for one in told)
        found = await world.ledger.escrow(name)
        assert found is not None and found.paid[NODES[0].address].redeemed_micro == 100
        assert await world.ledger.balance(NODES[0].address) == 100 - 10 - 1

    play(scene)
