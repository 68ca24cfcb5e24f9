"""A PostgreSQL that breaks while it is writing: whoever asked hears what happened, and nothing is done twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from broken_wire import Broken, Wire
from ledger_requests import CLIENT, LEDGER, NODES, a_voucher, an_escrow
from postgres import PROGRAMS, Postgres, empty

from shoal.ledger.commands import Deposit, Redeem
from shoal.ledger.escrows import OldVoucher
from shoal.ledger.journal import verified
from shoal.ledger.moves import account
from shoal.storage.group_commit import GroupCommit
from shoal.storage.ledgers import LedgerFailed, SqlLedger
from shoal.storage.postgres import NotDurable
from shoal.world import HeldClock, OutcomeUnknown

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="PostgreSQL is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def wire(server: Postgres) -> Iterator[Wire]:
    wire = Wire(server.port)
    yield wire
    wire.close()
    empty(server.url)


class Scene:
    """A ledger at the other end of a wire, with an escrow that has paid 10, all of it known to the ledger."""

    def __init__(self, wire: Wire, server: Postgres, clock: HeldClock | None = None) -> None:
        self.wire = wire
        self.ledger = SqlLedger.open(server.url_at(wire.port), LEDGER, clock or HeldClock())
        self.ledger.apply(Deposit(CLIENT.address, 5000, "mint"))
        command, self.escrow = an_escrow()
        self.ledger.apply(command)
        for amount in (5, 10):
            self.ledger.apply(self.voucher(amount))
        self.before = self.ledger.last()[0]

    def voucher(self, amount: int) -> Redeem:
        return Redeem(a_voucher(self.escrow, NODES[0], amount))

    def has_paid(self, amount: int) -> bool:
        """And no line more than one since the beginning."""
        escrow = self.ledger.escrow(self.escrow)
        assert escrow is not None and self.ledger.last()[0] == self.before + (amount > 10)
        assert self.ledger.balances() == verified(self.ledger.lines(), LEDGER).balances
        return escrow.redeemed_micro == amount


@pytest.mark.parametrize("broken", Broken)
def test_a_connection_that_broke_in_a_commit_is_looked_after_and_nothing_is_done_twice(
    wire: Wire, server: Postgres, broken: Broken
) -> None:
    scene = Scene(wire, server)
    wire.breaks = broken
    moves, refused = scene.ledger.apply_all([scene.voucher(20), scene.voucher(15)])
    assert wire.breaks is None and isinstance(moves, tuple) and isinstance(refused, OldVoucher)
    assert scene.has_paid(20)
    scene.ledger.apply(scene.voucher(30))
    scene.ledger.close()


@pytest.mark.parametrize("broken", Broken)
def test_where_the_journal_cannot_be_asked_it_is_said_and_asked_when_it_is_back(
    wire: Wire, server: Postgres, broken: Broken
) -> None:
    scene = Scene(wire, server)
    asked = [scene.voucher(20), scene.voucher(15)]
    wire.breaks, wire.down = broken, True
    for _ in range(2):
        with pytest.raises(OutcomeUnknown, match="went away while it was writing.*hand the same in again"):
            scene.ledger.apply_all(asked)
    wire.down = False
    moves, refused = scene.ledger.apply_all(asked)
    assert isinstance(moves, tuple) and isinstance(refused, OldVoucher) and scene.has_paid(20)
    scene.ledger.close()


def test_what_was_done_and_not_said_is_told_to_who_asks_again(wire: Wire, server: Postgres) -> None:
    scene = Scene(wire, server)
    wire.breaks, wire.down = Broken.AFTER, True
    with pytest.raises(OutcomeUnknown):
        scene.ledger.apply(scene.voucher(20))
    with pytest.raises(LedgerFailed, match="Nothing was acknowledged"):
        scene.ledger.apply(scene.voucher(30))
    wire.down = False
    with pytest.raises(OldVoucher):
        scene.ledger.apply(scene.voucher(20))
    assert scene.has_paid(20)
    scene.ledger.close()


def test_a_server_that_is_not_done_yet_is_waited_for(wire: Wire, server: Postgres) -> None:
    """The client is gone, and its statement is carried out nevertheless, later."""
    scene = Scene(wire, server)
    engine = sa.create_engine(server.url)
    waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    told = list[object]()
    with engine.connect() as watcher, engine.begin() as other:
        other.execute(sa.text("SELECT 1 FROM ledger_accounts WHERE name = :name FOR UPDATE"),
                      {"name": account(NODES[0].address)})  # fmt: skip
        wire.breaks = Broken.AFTER
        paying = threading.Thread(target=lambda: told.append(scene.ledger.apply(scene.voucher(20))))
        paying.start()
        while watcher.execute(waiting).scalar() != 2:  # the payment for the account, the look for the payment
            watcher.rollback()
            assert paying.is_alive()
    paying.join()
    engine.dispose()
    assert len(told) == 1 and scene.has_paid(20)
    scene.ledger.close()


class Mending(HeldClock):
    """After some time the wire is mended."""

    wire: Wire

    async def sleep(self, seconds: float) -> None:
        self.wire.down = False


def test_those_who_share_a_transaction_wait_until_it_is_known(wire: Wire, server: Postgres) -> None:
    async def scene() -> None:
        clock = Mending()
        clock.wire = wire
        ledger = Scene(wire, server, clock)
        group = GroupCommit(ledger.ledger)
        wire.breaks, wire.down = Broken.AFTER, True
        told = await asyncio.gather(
            *(group.apply(ledger.voucher(amount)) for amount in (20, 15)), return_exceptions=True
        )
        assert isinstance(told[0], tuple) and isinstance(told[1], OldVoucher) and ledger.has_paid(20)
        await group.close()

    asyncio.run(scene())


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(
    wire: Wire, server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SILENT_S", "CONNECT_S"):
        monkeypatch.setattr(f"shoal.storage.postgres.{name}", 1)
    scene = Scene(wire, server)
    wire.silent = True
    with pytest.raises(LedgerFailed, match="has said nothing for 1 s|timeout"):
        scene.ledger.balance(account(CLIENT.address))
    commands = [scene.voucher(20)]
    with pytest.raises(OutcomeUnknown, match="went away while it was writing"):
        scene.ledger.apply_all(commands)
    wire.silent = False
    (moves,) = scene.ledger.apply_all(commands)
    assert isinstance(moves, tuple) and scene.has_paid(20)
    scene.ledger.close()


def test_a_server_that_stopped_and_started_is_gone_on_with(server: Postgres) -> None:
    ledger = SqlLedger.open(server.socket_url, LEDGER, HeldClock())
    for number in range(3):
        ledger.apply(Deposit(CLIENT.address, 1, f"payment {number}"))
        server.stop()
        with pytest.raises(LedgerFailed):
            ledger.apply(Deposit(CLIENT.address, 1, f"payment {number}"))
        server.start()
    assert ledger.balances() == verified(ledger.lines(), LEDGER).balances and ledger.last()[0] == 3
    ledger.close()
    empty(server.url)


def test_a_server_that_acknowledges_what_it_can_lose_is_not_used(server: Postgres) -> None:
    engine = sa.create_engine(server.url)
    setting = "ALTER DATABASE postgres SET synchronous_commit = {}"
    with engine.begin() as connection:
        connection.execute(sa.text(setting.format("off")))
    with pytest.raises(NotDurable, match="has synchronous_commit off: .*Set synchronous_commit = on"):
        SqlLedger.open(server.url, LEDGER, HeldClock())
    with engine.begin() as connection:
        connection.execute(sa.text(setting.format("local")))
    SqlLedger.open(server.url, LEDGER, HeldClock()).close()
    engine.dispose()
    server.stop()
    server.start(fsync="off")
    with pytest.raises(NotDurable, match="has fsync off"):
        SqlLedger.open(server.url, LEDGER, HeldClock())
    server.stop()
    server.start()
    empty(server.url)
