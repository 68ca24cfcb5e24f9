"""A house ledger as strangers meet it: what it refuses, what it survives, and what its clients make of both."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ledger_requests import CLIENT, NODES, SELLERS, a_bond, a_voucher, a_withdrawal, an_escrow
from ledger_world import House, LedgerProcess, a_house
from postgres import PROGRAMS, Postgres

from shoal.errors import BadRecord, LinkError
from shoal.house import OtherLedger, OutcomeUnknown, RemoteLedger
from shoal.house.journals import write_journal
from shoal.house.messages import (
    PAGE_BYTES,
    Applied,
    ApplyCommand,
    AskAccount,
    AskBond,
    AskCheckpoint,
    AskLedger,
    AskLines,
    LedgerInfo,
    LinesFound,
    Mint,
    NewestCheckpoint,
    NoMint,
    NotOverLinks,
)
from shoal.house.server import (
    ANNOUNCING_MS,
    PASS_EVERY_S,
    BadDeposit,
    LedgerFolderRefused,
    LedgerServer,
    LedgerSettings,
    OtherBooks,
    deposit,
)
from shoal.house.service import AT_ONCE_PER_SOURCE, MINTS_BURST, PAGES_BURST
from shoal.identity import KeyPair
from shoal.ledger.book import WithdrawalOutOfTurn
from shoal.ledger.commands import Deposit, Open, Pass, Redeem, Unbond
from shoal.ledger.escrows import OldVoucher, State
from shoal.ledger.fees import OtherFee
from shoal.ledger.journal import Line, line, verified
from shoal.ledger.moves import ISSUED, Move, TooLittleMoney, account
from shoal.protocol.hubs import BadTicket
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import encode, sign
from shoal.protocol.money import (
    DAY_MS,
    BadCheckpoint,
    BadFeeTable,
    Checkpoint,
    FeeTable,
    HouseLedger,
    Payee,
    Unbonding,
    open_checkpoint,
)
from shoal.quantities.money import AMOUNT_MAX, MICRO
from shoal.storage.faults import LedgerBusy, LedgerFailed
from shoal.storage.ledgers import SqlLedger
from shoal.transport import MemoryNetwork, TlsEndpoint
from shoal.transport.allowances import TooManyRequests
from shoal.world import HeldClock, Refused, Request, SystemClock, Unreachable

ME = CLIENT.address


def with_house(data: Path, scene: Callable[[House], Awaitable[None]], **settings: Any) -> None:
    async def on_stage() -> None:
        async with a_house(data, **settings) as house:
            await scene(house)

    asyncio.run(on_stage())


async def journal(ledger: RemoteLedger, after: int = 0, of: bytes | None = None) -> list[Line]:
    return [one async for one in ledger.lines(after, of)]


# --- strangers ------------------------------------------------------------------------------------------------------


def test_nobody_books_a_deposit_or_moves_time_over_a_link(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        for command in (Deposit(ME, 5, "mine"), Pass(bytes(32))):
            with pytest.raises(NotOverLinks):
                await house.remote.apply(command)
        with pytest.raises(NoMint, match="has no development mint"):
            await house.remote.mint(ME, 5)
        assert await journal(house.remote) == [] and (await house.remote.about()).mint_max_micro == 0

    with_house(tmp_path, scene)


def test_a_mint_gives_so_much_at_a_time_and_so_often(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        assert (await house.remote.about()).mint_max_micro == 100
        assert await house.remote.mint(ME, 100) == (Move(ISSUED, account(ME), 100),)
        with pytest.raises(NoMint, match="gives 0.0001 USD at a time, not 0.000101"):
            await house.remote.mint(ME, 101)
        for _ in range(MINTS_BURST - 2):
            await house.remote.mint(ME, 1)
        with pytest.raises(TooManyRequests, match="wait 2.0 s"):
            await house.remote.mint(ME, 1)
        assert await house.remote.balance(ME) == 108

    with_house(tmp_path, scene, mint_max_micro=100)


def raw(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        pytest.param(ApplyCommand.KIND, b"", id="nothing"),
        pytest.param(ApplyCommand.KIND, b"\xc1" * 100, id="noise"),
        pytest.param(ApplyCommand.KIND, b"\x91" * 100_000, id="nested"),
        pytest.param(ApplyCommand.KIND, bytes(ApplyCommand.MAX_BYTES + 1), id="too long"),
        pytest.param(ApplyCommand.KIND, raw(command={"do": "mint", "account": ME}), id="no command"),
        pytest.param(ApplyCommand.KIND, raw(command={"do": "pass", "escrow": bytes(31)}), id="no hash"),
        pytest.param(AskAccount.KIND, raw(account=b"0x"), id="no account"),
        pytest.param(AskAccount.KIND, raw(account=ME, more=1), id="a field too many"),
        pytest.param(AskBond.KIND, raw(node=bytes(31)), id="no node"),
        pytest.param(AskBond.KIND, raw(node=bytes(32), until_ms=-1), id="bonds of the past"),
        pytest.param(AskBond.KIND, raw(node=bytes(32), until_ms=1 << 60), id="bonds for ever"),
        pytest.param(AskBond.KIND, raw(node=bytes(32), network="x" * 33), id="a network too long"),
        pytest.param(AskLines.KIND, raw(after=-1), id="before the beginning"),
        pytest.param(Mint.KIND, raw(account=ME, amount_micro=0), id="nothing of money"),
        pytest.param(Mint.KIND, raw(account=ME, amount_micro=-5), id="less than nothing"),
        pytest.param(Mint.KIND, raw(account=ME, amount_micro=1 << 63), id="more than can be counted"),
        pytest.param(Mint.KIND, raw(account=ME, amount_micro=0.5), id="a fraction"),
        pytest.param(Mint.KIND, raw(account=ME, amount_micro="5"), id="a text"),
    ],
)
def test_what_is_no_request_is_refused_and_moves_nothing(tmp_path: Path, kind: str, body: bytes) -> None:
    async def scene(house: House) -> None:
        link = await house.link()
        with pytest.raises(Refused) as refusal:
            await link.request(kind, body)
        assert refusal.value.remote_code == "SH-210"
        assert await journal(house.remote) == []
        assert await house.remote.balance(ME) == 0, "and the link goes on"

    with_house(tmp_path, scene, mint_max_micro=AMOUNT_MAX)


def test_bonds_behind_a_node_are_told_over_a_link(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        name, node = house.remote.name, SELLERS[0].node_id
        await house.remote.mint(ME, 200 * MICRO)
        posted = [a_bond(SELLERS[0], number, name) for number in range(66)]
        for command, _ in posted:
            await house.remote.apply(command)
        assert await house.remote.bond_of(node) == 66 * MICRO
        found = await house.remote.bonds_behind(node)
        assert [one.bond_id for one in found.bonds] == sorted(bond for _, bond in posted)[:64]
        wish = Unbonding(posted[0][1])
        await house.remote.apply(Unbond(wish, CLIENT.sign(wish.digest(name))))
        ends_ms = house.clock.now_ms() + DAY_MS
        assert await house.remote.bond_of(node, ends_ms - 1) == 66 * MICRO
        assert await house.remote.bond_of(node, ends_ms) == 65 * MICRO
        assert await house.remote.bond_of(SELLERS[1].node_id) == 0
        elsewhere = RemoteLedger(house.endpoint, house.ticket, house.clock, network="testnet")
        assert await elsewhere.bond_of(node) == 0
        assert len((await house.remote.account(ME)).bonds) == 64

    with_house(tmp_path, scene, mint_max_micro=AMOUNT_MAX)


def test_more_than_can_be_counted_is_refused(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        await house.remote.mint(ME, AMOUNT_MAX)
        with pytest.raises(Exception, match="more than can be counted"):
            await house.remote.mint(ME, 1)
        assert await house.remote.balance(ME) == AMOUNT_MAX

    with_house(tmp_path, scene, mint_max_micro=AMOUNT_MAX)


def test_what_was_handed_in_already_is_told_so(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        await house.remote.mint(ME, 5000)
        order = a_withdrawal(CLIENT, 100, 1, house.remote.name)
        opening, escrow = an_escrow(ledger=house.remote.name)
        voucher = Redeem(a_voucher(escrow, NODES[0], 10, ledger=house.remote.name))
        for command in (order, opening, voucher):
            await house.remote.apply(command)
        before = await journal(house.remote)
        stranger = RemoteLedger(house.network.endpoint(KeyPair.generate()), house.ticket, house.clock)
        for command, why in ((order, WithdrawalOutOfTurn), (voucher, OldVoucher)):
            with pytest.raises(why):
                await stranger.apply(command)
        assert await journal(house.remote) == before

    with_house(tmp_path, scene, mint_max_micro=5000)


def test_one_address_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, waiting = asyncio.Event(), 0

    async def held(*_: Any) -> tuple[int, int, tuple[()]]:
        nonlocal waiting
        waiting += 1
        await gate.wait()
        return 7, 0, ()

    async def scene(house: House) -> None:
        other = RemoteLedger(house.network.endpoint(KeyPair.generate()), house.ticket, house.clock)
        await asyncio.gather(other.about(), house.remote.about())
        monkeypatch.setattr("shoal.house.server.GroupCommit.ask", held)
        flood = [asyncio.create_task(other.balance(ME)) for _ in range(AT_ONCE_PER_SOURCE)]
        while waiting < AT_ONCE_PER_SOURCE:
            await asyncio.sleep(0)
        with pytest.raises(LedgerBusy, match="from your address"):
            await other.balance(ME)
        asking = asyncio.create_task(house.remote.balance(ME))
        while waiting == AT_ONCE_PER_SOURCE:
            await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(asking, *flood) == [7] * (AT_ONCE_PER_SOURCE + 1)

    with_house(tmp_path, scene)


@pytest.mark.parametrize("asked", ["pages", "large commands"])
def test_of_what_takes_a_ledger_long_one_address_has_little_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    gate, waiting = asyncio.Event(), 0

    async def held(*_: Any) -> Any:
        nonlocal waiting
        waiting += 1
        await gate.wait()
        raise LedgerFailed("There was nothing behind the gate.")

    async def scene(house: House) -> None:
        crowd = tuple(Payee(number.to_bytes(20), 10) for number in range(1024))
        large = Open(msgspec.structs.replace(an_escrow()[0].terms, payees=crowd), bytes(65))
        kind, body, most = {
            "pages": (AskLines.KIND, encode(AskLines()), 4),
            "large commands": (ApplyCommand.KIND, encode(ApplyCommand(command=large)), 11),
        }[asked]
        ends = [house.network.endpoint(KeyPair.generate(), machine="one") for _ in range(5)]
        links = [await one.dial(house.ticket.operator, house.ticket.addresses) for one in ends]
        for method in ("ask", "apply"):
            monkeypatch.setattr(f"shoal.house.server.GroupCommit.{method}", held)
        flood = [asyncio.create_task(link.request(kind, body)) for link in links for _ in range(4)]
        while sum(one.done() for one in flood) < len(flood) - most:
            await asyncio.sleep(0)
        gate.set()
        told = Counter[str]()
        for one in flood:
            with pytest.raises(Refused) as refusal:
                await one
            told[refusal.value.remote_code] += 1
        assert waiting == most and told == {"SH-445": most, "SH-446": len(flood) - most}

    with_house(tmp_path, scene)


# --- the journal ----------------------------------------------------------------------------------------------------


def test_the_journal_is_had_page_by_page_and_verified(tmp_path: Path) -> None:
    """With escrows so large that a page holds few of them, and in every line but those of one account nothing of it."""

    async def scene(house: House) -> None:
        name = house.remote.name
        await house.deposit(ME, 50_000)
        crowd = tuple(Payee(number.to_bytes(20), 10) for number in range(1, 1001))
        for nonce in range(30):
            usual, _ = an_escrow(nonce=nonce, ledger=name)
            terms = msgspec.structs.replace(usual.terms, payees=crowd)
            await house.remote.apply(type(usual)(terms, CLIENT.sign(terms.escrow_id(name))))
        await house.deposit(NODES[0].address, 7)
        link, after, pages = await house.link(), 0, list[LinesFound]()
        while not pages or pages[-1].seen is not None:
            body = await link.request(
                AskLines.KIND, encode(AskLines(after=after)), reply_max_bytes=LinesFound.MAX_BYTES
            )
            assert len(body) < PAGE_BYTES + 64
            pages.append(msgspec.msgpack.decode(body, type=LinesFound))
            after = pages[-1].seen or 0
        assert len(pages) > 2
        lines = await journal(house.remote)
        assert lines == [one for page in pages for one in page.lines] and len(lines) == 32
        assert verified(lines, name).balances[account(ME)] == 20_000
        assert await journal(house.remote, of=NODES[0].address) == lines[-1:]
        assert await journal(house.remote, of=ME) == lines[:-1]
        assert await journal(house.remote, after=30) == lines[30:]
        assert await journal(house.remote, after=99) == [] == await journal(house.remote, of=bytes(20))

    with_house(tmp_path, scene)


def test_who_looks_for_few_lines_among_many_is_led_through_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.storage.ledgers.SEARCHED_LINES", 4)

    async def scene(house: House) -> None:
        for number in range(21):
            await house.deposit(NODES[0].address if number in (9, 20) else ME, 1)
        assert [one.number for one in await journal(house.remote, of=NODES[0].address)] == [10, 21]
        assert len(await journal(house.remote)) == 21

    with_house(tmp_path, scene)


def test_who_reads_the_journal_too_fast_waits_and_gets_it(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        await house.deposit(ME, 7)
        link = await house.link()
        for _ in range(PAGES_BURST):
            await link.request(AskLines.KIND, encode(AskLines()))
        reading = asyncio.create_task(journal(house.remote))
        while not reading.done():
            await house.clock.advance(0.1)
            await asyncio.sleep(0)
        assert len(reading.result()) == 1

    with_house(tmp_path, scene)


def test_a_checkpoint_is_of_the_newest_line(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        assert await house.remote.checkpoint() is None
        for count in (1, 2):
            await house.deposit(ME, 7)
            envelope = await house.remote.checkpoint()
            assert envelope is not None
            lines = await journal(house.remote)
            signed = open_checkpoint(envelope, house.remote.name)
            assert (signed.number, signed.hash) == (count, lines[-1].hash)
            verified(lines, house.remote.name, envelope)

    with_house(tmp_path, scene)


def test_the_time_ends_escrows_also_where_nobody_asks_for_anything(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        await house.deposit(ME, 5000)
        until_ms = house.clock.now_ms() + 3000
        command, escrow = an_escrow(expires_ms=until_ms, ledger=house.remote.name)
        await house.remote.apply(command)
        assert await house.remote.balance(ME) == 4000
        await house.clock.advance(PASS_EVERY_S)
        assert await house.remote.balance(ME) == 5000
        found = await house.remote.escrow(escrow)
        assert found is not None and found.state is State.SETTLED

    with_house(tmp_path, scene)


# --- operators that lie ---------------------------------------------------------------------------------------------


def with_liar(answers: dict[str, Any], scene: Callable[[RemoteLedger], Awaitable[None]]) -> None:
    """A ledger that answers as it is told here."""

    async def on_stage() -> None:
        network, key = MemoryNetwork(), KeyPair.generate()
        liar, asker = network.endpoint(key), network.endpoint(KeyPair.generate())
        name = HouseLedger(key.node_id, "USD")
        about = encode(LedgerInfo(ledger=name, network="shoal", software="none"))
        for kind, answer in {AskLedger.KIND: about, **answers}.items():

            async def say(request: Request, answer: Any = answer) -> bytes:
                if isinstance(answer, Exception):
                    raise answer
                said: bytes = answer
                return said

            liar.handle(kind, say)
        ticket = LedgerTicket(key.node_id, "USD", (await liar.listen("tcp://liar:0"),))
        try:
            async with asyncio.timeout(60):
                await scene(RemoteLedger(asker, ticket, HeldClock()))
        finally:
            await asker.close()
            await liar.close()

    asyncio.run(on_stage())


def a_line(number: int) -> Line:
    return line(number, 1, Deposit(ME, 1, ""), (), bytes(32))


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (LinesFound(lines=(a_line(2), a_line(2))), "line 2 of its journal where one after 2"),
        (LinesFound(lines=(a_line(2), a_line(1))), "line 1 of its journal where one after 2"),
        (LinesFound(lines=(a_line(2),), seen=1), "leads nowhere"),
        (LinesFound(lines=(), seen=1), "line 1 of|leads nowhere"),
    ],
)
def test_pages_that_lead_nowhere_are_not_followed(page: LinesFound, words: str) -> None:
    async def scene(ledger: RemoteLedger) -> None:
        with pytest.raises(BadRecord, match=words):
            await journal(ledger, after=1 if not page.lines else 0)

    with_liar({AskLines.KIND: encode(page)}, scene)


def test_a_journal_without_an_end_is_not_fetched_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.house.journals.FILE_MAX_BYTES", 600)

    async def scene(ledger: RemoteLedger) -> None:
        with (tmp_path / "journal").open("xb") as file, pytest.raises(BadRecord, match="has no end"):
            await write_journal(file, ledger.name, None, ledger.lines())

    with_liar({AskLines.KIND: encode(LinesFound(lines=tuple(map(a_line, range(1, 9)))))}, scene)


def test_a_checkpoint_of_somebody_else_is_none() -> None:
    forged = sign(KeyPair.generate(), Checkpoint(currency="USD", number=1, hash=bytes(32))).to_bytes()

    async def scene(ledger: RemoteLedger) -> None:
        with pytest.raises(BadCheckpoint):
            await ledger.checkpoint()

    with_liar({AskCheckpoint.KIND: encode(NewestCheckpoint(checkpoint=forged))}, scene)


@pytest.mark.parametrize("answer", [b"\xc1", bytes(Applied.MAX_BYTES + 1), RuntimeError("a fault"), LinkError("?")])
def test_an_answer_that_says_nothing_leaves_open_what_happened(answer: Any) -> None:
    async def scene(ledger: RemoteLedger) -> None:
        for asked in (ledger.apply(a_withdrawal(CLIENT, 1, 1)), ledger.mint(ME, 1)):
            with pytest.raises(OutcomeUnknown, match="gave no answer that says whether it did"):
                await asked

    with_liar({ApplyCommand.KIND: answer, Mint.KIND: answer}, scene)


def test_a_refusal_says_that_nothing_happened() -> None:
    async def scene(ledger: RemoteLedger) -> None:
        with pytest.raises(TooLittleMoney, match="0x1 has 0.00"):
            await ledger.mint(ME, 1)

    with_liar({Mint.KIND: TooLittleMoney("0x1 has 0.00, 0.01 less than is to leave it.")}, scene)


def test_another_currency_than_the_ticket_says_is_another_ledger() -> None:
    async def scene(ledger: RemoteLedger) -> None:
        with pytest.raises(OtherLedger, match="keeps a ledger in EUR, and the ticket says USD"):
            await ledger.balance(ME)

    euros = LedgerInfo(ledger=HouseLedger(bytes(32), "EUR"), network="shoal", software="none")
    with_liar({AskLedger.KIND: encode(euros)}, scene)


def test_a_fee_is_announced_a_day_ahead_once_somebody_has_money_there(tmp_path: Path) -> None:
    async def begun(fee_ppm: int | None) -> list[tuple[int, int, int]]:
        """Of each table its number, from when it holds and what it says, as whoever asks hears it."""
        async with a_house(tmp_path, fee_ppm=fee_ppm) as house:
            await house.deposit(ME, 1, f"after line {(await house.remote.about()).lines}")
            tables = await house.remote.fees()
            assert verified(await journal(house.remote), house.remote.name).fees == tables
            return [(one.table.number, one.table.from_ms, one.table.fee_ppm) for one in tables]

    later = DAY_MS + ANNOUNCING_MS
    start = HeldClock().now_ms()
    assert asyncio.run(begun(None)) == [], "nothing is said"
    assert asyncio.run(begun(20_000)) == [(1, start + later, 20_000)], "somebody has money there"
    assert asyncio.run(begun(20_000)) == asyncio.run(begun(None)) == [(1, start + later, 20_000)]
    assert asyncio.run(begun(0)) == [(2, start + later, 0)], "what does not hold yet is replaced"


def test_a_fee_is_announced_also_after_the_clock_went_back(tmp_path: Path) -> None:
    async def begun(at_ms: int, **settings: Any) -> list[int]:
        async with a_house(tmp_path, HeldClock(at_ms), **settings) as house:
            await house.deposit(ME, 1, f"at {at_ms}")
            return [one.table.from_ms for one in await house.remote.fees()]

    assert asyncio.run(begun(3_600_000)) == []
    said = asyncio.run(begun(0, fee_ppm=20_000))
    assert said == [3_600_000 + DAY_MS + ANNOUNCING_MS], "a day after the newest line"


def test_a_new_ledger_takes_its_fee_at_once(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        (table,) = await house.remote.fees()
        assert (table.table.from_ms, table.table.fee_ppm) == (house.clock.now_ms(), 20_000)
        await house.deposit(ME, 10_000)
        with pytest.raises(OtherFee, match="takes 2 %"):
            await house.remote.apply(an_escrow(fee_ppm=0, ledger=house.remote.name)[0])
        await house.remote.apply(an_escrow(fee_ppm=20_000, ledger=house.remote.name)[0])

    with_house(tmp_path, scene, fee_ppm=20_000)


def test_a_fee_table_of_somebody_else_is_none() -> None:
    forged = sign(KeyPair.generate(), FeeTable(currency="USD", number=1, from_ms=0, fee_ppm=1)).to_bytes()

    async def on_stage() -> None:
        network = MemoryNetwork()
        liar, asker = network.endpoint(KeyPair.generate()), network.endpoint(KeyPair.generate())
        ticket = LedgerTicket(liar.node_id, "USD", ("tcp://liar:7",))
        info = encode(LedgerInfo(ledger=ticket.ledger, network="shoal", software="none", fees=(forged,)))

        async def lie(_: Request) -> bytes:
            return info

        liar.handle(AskLedger.KIND, lie)
        await liar.listen("tcp://liar:7")
        with pytest.raises(BadFeeTable):
            await RemoteLedger(asker, ticket, HeldClock()).fees()
        await asker.close()
        await liar.close()

    asyncio.run(on_stage())


# --- links and processes that break ---------------------------------------------------------------------------------


def test_who_is_not_the_operator_is_not_asked(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        other = LedgerTicket(KeyPair.generate().node_id, "USD", house.ticket.addresses)
        with pytest.raises(Unreachable):
            await RemoteLedger(house.endpoint, other, house.clock).balance(ME)

    with_house(tmp_path, scene)


def test_a_link_that_broke_is_dialled_again(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        await house.remote.mint(ME, 10)
        for _ in range(3):
            house.network.cut(house.endpoint.node_id, house.ticket.operator)
            with pytest.raises(LinkError):
                await house.remote.balance(ME)
            house.network.heal(house.endpoint.node_id, house.ticket.operator)
            assert await house.remote.balance(ME) == 10

    with_house(tmp_path, scene, mint_max_micro=10)


def test_killed_between_the_journal_and_its_answer(tmp_path: Path) -> None:
    async def scene() -> None:
        first = await LedgerProcess.start(tmp_path, "dying")
        endpoint = TlsEndpoint(KeyPair.generate())
        remote = RemoteLedger(endpoint, first.ticket, SystemClock())
        await asyncio.to_thread(deposit, tmp_path, ME, 1000, "payment 7", SystemClock())
        order = a_withdrawal(CLIENT, 300, 1, remote.name)
        with pytest.raises(OutcomeUnknown, match="hand the same in again"):
            await remote.apply(order)
        await first.killed()
        with pytest.raises(Unreachable):
            await remote.apply(order)
        again = await LedgerProcess.start(tmp_path, listen=first.ticket.addresses[0])
        assert again.ticket == first.ticket
        with pytest.raises(WithdrawalOutOfTurn, match="carried out already; the next one that it signs is number 2"):
            await remote.apply(order)
        assert await remote.balance(ME) == 700
        lines = await journal(remote)
        assert [type(one.command) for one in lines] == [Deposit, type(order)]
        verified(lines, remote.name, await remote.checkpoint())
        await endpoint.close()
        await again.kill()

    asyncio.run(scene())


@pytest.mark.skipif(not PROGRAMS, reason="PostgreSQL is not installed")
def test_a_database_that_goes_away_is_told_and_is_used_again_when_it_is_back(tmp_path: Path) -> None:
    with Postgres() as database:

        async def scene(house: House) -> None:
            await house.remote.mint(ME, 10)
            database.stop()
            for asked in (house.remote.mint(ME, 10), house.remote.balance(ME), house.remote.about()):
                with pytest.raises(LedgerFailed, match="Nothing was acknowledged"):
                    await asked
            database.start()
            await house.remote.mint(ME, 1)
            assert await house.remote.balance(ME) == 11
            verified(await journal(house.remote), house.remote.name, await house.remote.checkpoint())

        with_house(tmp_path, scene, mint_max_micro=10, database=database.url)
        assert not list(tmp_path.glob("*.sqlite"))


# --- the operator ---------------------------------------------------------------------------------------------------


def start(data: Path, **settings: Any) -> LedgerTicket:
    async def once() -> LedgerTicket:
        server = LedgerServer(LedgerSettings(data, **settings), MemoryNetwork().endpoint, HeldClock())
        try:
            return await server.start()
        finally:
            await server.stop()

    return asyncio.run(once())


def test_a_folder_keeps_one_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerFailed, match="cannot be used"):
        start(tmp_path, database="nonsense")
    ticket = start(tmp_path, currency="EUR")
    assert ticket.currency == "EUR" and start(tmp_path).ledger == ticket.ledger
    with pytest.raises(OtherBooks, match="is in EUR, not in USD"):
        start(tmp_path, currency="USD")
    with pytest.raises(OtherBooks, match="one key with two journals"):
        start(tmp_path, database="postgresql+psycopg://u@h/d")
    (tmp_path / "ledger.json").write_text("{")
    with pytest.raises(LedgerFolderRefused, match="does not say currency and database"):
        start(tmp_path)


def test_no_second_process_runs_a_ledger(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        second = LedgerServer(LedgerSettings(tmp_path), house.network.endpoint, house.clock)
        with pytest.raises(LedgerFolderRefused, match="Another process runs the ledger"):
            await second.start()

    with_house(tmp_path, scene)
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerFolderRefused, match="cannot be used"):
        start(tmp_path / "file")
    with pytest.raises(OtherBooks, match="'usd' is no currency"):
        start(tmp_path / "new", currency="usd")


def test_the_operator_books_deposits_while_its_ledger_runs_or_not(tmp_path: Path) -> None:
    async def scene(house: House) -> None:
        await house.deposit(ME, 3)
        await house.remote.mint(ME, 4)
        await house.deposit(ME, 5)
        await house.remote.mint(ME, 6)
        verified(await journal(house.remote), house.remote.name, await house.remote.checkpoint())
        assert await house.remote.balance(ME) == 18

    with_house(tmp_path, scene, mint_max_micro=10)
    assert deposit(tmp_path, ME, 7, "payment 9", HeldClock()) == (Move(ISSUED, account(ME), 7),)
    for amount, reference in ((0, ""), (-1, ""), (AMOUNT_MAX + 1, ""), (1, "x" * 129), (1, "\udcff")):
        with pytest.raises(BadDeposit, match="cannot be booked"):
            deposit(tmp_path, ME, amount, reference, HeldClock())
    with pytest.raises(LedgerFolderRefused, match="holds no ledger"):
        deposit(tmp_path / "nowhere", ME, 7, "", HeldClock())
    ledger = SqlLedger.open(tmp_path / "ledger.sqlite", start(tmp_path).ledger, HeldClock())
    assert ledger.balance(account(ME)) == 25 and len(list(ledger.lines())) == 5
    ledger.close()


# --- tickets --------------------------------------------------------------------------------------------------------


def test_a_ticket_is_read_as_it_is_written() -> None:
    text = f"shoal-ledger://{'ab' * 32}@ledger.example.org:7300,[::1]:7301/USD"
    ticket = LedgerTicket.parse(f" {text}\n")
    assert (
        ticket == LedgerTicket(b"\xab" * 32, "USD", ("tcp://ledger.example.org:7300", "tcp://[::1]:7301"))
        and str(ticket) == text
    )
    assert ticket.ledger == HouseLedger(b"\xab" * 32, "USD")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not begin with shoal-ledger://"),
        (f"shoal://{'ab' * 32}@h:1", "does not begin with shoal-ledger://"),
        ("shoal-ledger://", "no '@'"),
        (f"shoal-ledger://{'ab' * 32}", "no '@' between the ledger's NodeId"),
        ("shoal-ledger://ab@h:1/USD", "does not name a ledger.*64 hexadecimal digits"),
        (f"shoal-ledger://{'ab' * 32}@h/USD", "is not host:port"),
        (f"shoal-ledger://{'ab' * 32}@h:0/USD", "port between 1 and 65535"),
        (f"shoal-ledger://{'ab' * 32}@h:1", "'' at the end of a ledger's ticket is no currency"),
        (f"shoal-ledger://{'ab' * 32}@h:1/", "'' at the end"),
        (f"shoal-ledger://{'ab' * 32}@h:1/usd", "'usd' at the end"),
        (f"shoal-ledger://{'ab' * 32}@h:1/USD/EUR", "'USD/EUR' at the end"),
        (f"shoal-ledger://{'ab' * 32}@{'h:1,' * 400}h:1/USD", "too long"),
    ],
)
def test_what_is_no_ticket_says_why(text: str, words: str) -> None:
    with pytest.raises(BadTicket, match=words):
        LedgerTicket.parse(text)
