"""An auction as those who trade meet it: what it takes, what it refuses, what it survives, and what it cannot do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from auction_world import ANN, BEN, CAT, EVERY_S, LEDGER, NODES, AuctionProcess, Hall, a_hall, terms

from shoal.auctions import RemoteAuction
from shoal.auctions.auctioneer import Auctioneer
from shoal.auctions.refusals import AuctionBusy, AuctionFailed, BatchFull, NotPublished, OrderRefused
from shoal.auctions.server import AuctionFolderRefused, AuctionServer, AuctionSettings
from shoal.auctions.service import ORDERS_BURST, PARTS_BURST
from shoal.auctions.store import AuctionStore
from shoal.errors import BadRecord, LinkError
from shoal.identity import BadSignature, Envelope, KeyPair
from shoal.market.batches import BEGINNING, BadBatch
from shoal.market.publishing import Published, Verified, close, verified
from shoal.protocol.auctions import AskAuction, AskBatch, AuctionTicket, BatchPart, HandIn, Taken
from shoal.protocol.hubs import BadTicket
from shoal.protocol.messages import encode, sign
from shoal.protocol.orders import HOUR_MS, Ask, BadOrder, Bid
from shoal.transport import MemoryNetwork, TlsEndpoint
from shoal.transport.allowances import TooManyRequests
from shoal.world import HeldClock, LinkLost, MemoryLedger, Refused, Request, SeededDice, SystemClock

FAST_S, NEVER_S = 0.05, 3600.0


def in_a_hall(data: Path, scene: Callable[[Hall], Awaitable[None]]) -> None:
    async def on_stage() -> None:
        async with a_hall(data) as hall:
            await scene(hall)

    asyncio.run(on_stage())


def orders_of(checked: Verified) -> set[bytes]:
    return {one.id for one in checked.orders}


# --- how it goes ----------------------------------------------------------------------------------------------------


def test_orders_are_taken_cleared_and_published(tmp_path: Path) -> None:
    async def scene(hall: Hall) -> None:
        info = await hall.remote.about()
        assert (info.oldest, info.running, info.orders) == (1, 2, 0), "the first only promises a seed"
        assert info.closes_ms == hall.clock.now_ms() + round(EVERY_S * 1000)
        orders = [hall.bid(ANN, 2), hall.bid(BEN, 2, 300_000), hall.ask(NODES[0], 2), hall.ask(NODES[1], 2, 350_000)]
        for order in orders:
            taken = await hall.somebody().hand_in(order)
            assert (taken.order, taken.batch) == (order.record_id, 2)
        assert (await hall.remote.about()).orders == 4
        await hall.until_closed(2)
        checked = await hall.remote.batch(2)
        assert orders_of(checked) == {one.record_id for one in orders}
        [cleared] = checked.outcome.cleared
        assert cleared.price_micro == 350_000 and cleared.trades[0].buyer == ANN.node_id
        for number in (3, 4):
            await hall.remote.hand_in(hall.bid(ANN, number))
            await hall.until_closed(number)
        chain = [await hall.remote.batch(number) for number in (1, 2, 3, 4)]
        assert [one.batch.previous for one in chain] == [BEGINNING, *(one.clearing for one in chain[:-1])]

    in_a_hall(tmp_path, scene)


def test_a_batch_without_orders_stays_open(tmp_path: Path) -> None:
    async def scene(hall: Hall) -> None:
        assert (await hall.remote.about()).running == 2
        await hall.clock.advance(5 * EVERY_S)
        info = await hall.remote.about()
        assert info.running == 2 and info.closes_ms > hall.clock.now_ms()

    in_a_hall(tmp_path, scene)


def test_two_hundred_orders_at_once_share_what_the_disk_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    keep = AuctionStore.keep

    def counted(self: AuctionStore, orders: Any) -> None:
        written.append(len(orders))
        keep(self, orders)

    monkeypatch.setattr(AuctionStore, "keep", counted)

    async def scene(hall: Hall) -> None:
        traders = [KeyPair.generate() for _ in range(100)]
        orders = [hall.bid(one, 2, 100_000 + number) for number, one in enumerate(traders)]
        orders += [hall.ask(one, 2, 100_000 + number) for number, one in enumerate(traders)]
        taken = await asyncio.gather(*(hall.remote.hand_in(one) for one in orders), return_exceptions=True)
        crossed = [one for one in taken if isinstance(one, OrderRefused)]
        assert len(crossed) == 100, "a trader's bid and ask for one block exclude one another"
        assert sum(written) == 100 and len(written) < 50
        await hall.until_closed(2)
        checked = await hall.remote.batch(2)
        assert orders_of(checked) == {one.order for one in taken if not isinstance(one, BaseException)}

    in_a_hall(tmp_path, scene)


def test_the_same_order_again_is_taken_once(tmp_path: Path) -> None:
    async def scene(hall: Hall) -> None:
        order = hall.ask(NODES[0], 2)
        taken = await asyncio.gather(*(hall.somebody().hand_in(order) for _ in range(5)))
        assert {one.order for one in taken} == {order.record_id}
        assert (await hall.remote.hand_in(order)).batch == 2
        assert (await hall.remote.about()).orders == 1

    in_a_hall(tmp_path, scene)


# --- what does not count --------------------------------------------------------------------------------------------


def test_who_signs_what_would_not_count_is_told_why_at_once(tmp_path: Path) -> None:
    async def scene(hall: Hall) -> None:
        now = hall.clock.now_ms()
        first = hall.ask(NODES[0], 2, sequence=5)
        await hall.remote.hand_in(first)
        for order, why in (
            (hall.ask(NODES[1], 1), "It is for batch 1; this is 2"),
            (hall.ask(NODES[1], 3), "It is for batch 3; this is 2"),
            (hall.ask(NODES[1], 2, expires_ms=now), "It had expired"),
            (sign(NODES[1], Ask(terms=terms(ANN.node_id, 2, now, 1), payee=bytes(20))), "It is for the auctioneer"),
            (hall.ask(NODES[0], 2, sequence=4), "does not replace: give it a higher sequence"),
            (hall.ask(NODES[0], 2, 150_000, sequence=5), "has given order 5 for this already"),
        ):
            with pytest.raises(OrderRefused, match=why):
                await hall.remote.hand_in(order)
        await hall.remote.hand_in(hall.ask(NODES[0], 2, 150_000, sequence=6))
        assert (await hall.remote.about()).orders == 2
        await hall.until_closed(2)
        with pytest.raises(OrderRefused, match="It is for batch 2; this is 3"):
            await hall.remote.hand_in(hall.bid(ANN, 2))
        with pytest.raises(OrderRefused, match="It is for batch 2; this is 3"):
            await hall.remote.hand_in(first)

    in_a_hall(tmp_path, scene)


def raw(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        pytest.param(HandIn.KIND, b"", "SH-210", id="nothing"),
        pytest.param(HandIn.KIND, b"\xc1" * 100, "SH-210", id="noise"),
        pytest.param(HandIn.KIND, b"\x91" * 4000, "SH-210", id="nested"),
        pytest.param(HandIn.KIND, bytes(HandIn.MAX_BYTES + 1), "SH-210", id="too long"),
        pytest.param(HandIn.KIND, raw(order=b"no envelope"), "SH-201", id="no envelope"),
        pytest.param(AskAuction.KIND, raw(more=1), "SH-210", id="a field too many"),
        pytest.param(AskBatch.KIND, raw(number=0), "SH-210", id="batch 0"),
        pytest.param(AskBatch.KIND, raw(number=1, part=-1), "SH-210", id="part -1"),
        pytest.param(AskBatch.KIND, raw(number=1, part=1), "SH-157", id="a part too many"),
        pytest.param(AskBatch.KIND, raw(number=1 << 53), "SH-157", id="a batch to come"),
    ],
)
def test_what_is_no_request_is_refused(tmp_path: Path, kind: str, body: bytes, code: str) -> None:
    async def scene(hall: Hall) -> None:
        link = await hall.link()
        with pytest.raises(Refused) as refusal:
            await link.request(kind, body)
        assert refusal.value.remote_code == code
        assert (await hall.remote.about()).orders == 0, "and the link goes on"

    in_a_hall(tmp_path, scene)


def test_what_is_no_order_of_its_signer_is_refused(tmp_path: Path) -> None:
    async def scene(hall: Hall) -> None:
        order = hall.bid(ANN, 2)
        forged = msgspec.structs.replace(order, signer=BEN.node_id)
        with pytest.raises(Refused) as refusal:
            await hall.remote.hand_in(forged)
        assert refusal.value.remote_code == BadSignature.code
        published = await hall.remote.published(1)
        with pytest.raises(BadOrder, match="market.batch"):
            await hall.remote.hand_in(Envelope.from_bytes(published.batch, 4096))
        elsewhere = sign(
            ANN,
            Bid(terms=terms(hall.ticket.auctioneer, 2, hall.clock.now_ms(), 1), blocks=1, escrow=bytes(32)),
            "other",
        )
        with pytest.raises(Refused, match="network 'other'"):
            await hall.remote.hand_in(elsewhere)
        assert (await hall.remote.about()).orders == 0

    in_a_hall(tmp_path, scene)


@pytest.mark.parametrize(
    ("limit", "trader", "sentence"),
    [
        ("TRADER_ORDERS_MAX", NODES[0], "takes 3 orders of one trader"),
        ("SOURCE_ORDERS_MAX", None, "takes 3 orders from one address"),
        ("ORDERS_MAX", None, "takes 3 orders in all"),
    ],
)
def test_a_batch_takes_so_many_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, trader: KeyPair | None, sentence: str
) -> None:
    monkeypatch.setattr(f"shoal.auctions.auctioneer.{limit}", 3)

    async def scene(hall: Hall) -> None:
        for batch in (2, 3):
            orders = [hall.bid(trader or NODES[number], batch, sequence=number) for number in range(4)]
            for order in orders[:3]:
                await hall.remote.hand_in(order)
            with pytest.raises(BatchFull, match=sentence):
                await hall.remote.hand_in(orders[3])
            await hall.until_closed(batch)
            checked = await hall.remote.batch(batch)
            assert orders_of(checked) == {one.record_id for one in orders[:3]}

    in_a_hall(tmp_path, scene)


def test_who_asks_too_often_waits(tmp_path: Path) -> None:
    async def scene(hall: Hall) -> None:
        order = hall.bid(ANN, 2)
        link = await hall.link()
        for _ in range(ORDERS_BURST):
            await link.request(HandIn.KIND, encode(HandIn(order=order.to_bytes())))
        with pytest.raises(TooManyRequests, match="An order came too often"):
            await hall.remote.hand_in(order)
        assert (await hall.somebody().hand_in(order)).batch == 2, "and others do not"
        for _ in range(PARTS_BURST):
            await link.request(AskBatch.KIND, encode(AskBatch(number=1)), reply_max_bytes=BatchPart.MAX_BYTES)
        reading = asyncio.create_task(hall.remote.published(1))
        while not reading.done():
            await hall.clock.advance(0.1)
            await asyncio.sleep(0)
        assert verified(reading.result()).batch.number == 1

    in_a_hall(tmp_path, scene)


def test_one_address_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, waiting = asyncio.Event(), 0

    async def held(*_: Any) -> BatchPart:
        nonlocal waiting
        waiting += 1
        await gate.wait()
        return BatchPart(parts=1, data=b"7")

    monkeypatch.setattr("shoal.auctions.auctioneer.Auctioneer.part", held)
    monkeypatch.setattr("shoal.auctions.service.AT_ONCE_PER_SOURCE", 8)

    async def scene(hall: Hall) -> None:
        other = hall.somebody()
        await asyncio.gather(other.about(), hall.remote.about())
        flood = [asyncio.create_task(other.published(1)) for _ in range(8)]
        while waiting < 8:
            await asyncio.sleep(0)
        with pytest.raises(AuctionBusy, match="from your address"):
            await other.published(1)
        asking = asyncio.create_task(hall.remote.published(1))
        while waiting == 8:
            await asyncio.sleep(0)
        gate.set()
        ended = await asyncio.gather(asking, *flood, return_exceptions=True)
        assert all(isinstance(one, BadBatch) for one in ended)

    in_a_hall(tmp_path, scene)


# --- time -----------------------------------------------------------------------------------------------------------


def test_a_clock_that_goes_back_closes_nothing_until_it_is_right(tmp_path: Path) -> None:
    async def scene(hall: Hall) -> None:
        await hall.remote.hand_in(hall.bid(ANN, 2))
        await hall.until_closed(2)
        order = hall.bid(BEN, 3, expires_ms=hall.clock.now_ms() + 2 * HOUR_MS)
        await hall.remote.hand_in(order)
        hall.clock.jump(-3600)
        await hall.clock.advance(3 * EVERY_S)
        assert (await hall.remote.about()).running == 3
        hall.clock.jump(3600)
        await hall.until_closed(3)
        closed = [await hall.remote.batch(number) for number in (1, 2, 3)]
        assert orders_of(closed[2]) == {order.record_id}
        times = [one.batch.closed_ms for one in closed]
        assert times == sorted(set(times))

    in_a_hall(tmp_path, scene)


def test_a_clock_that_leaps_ahead_voids_orders_and_says_so(tmp_path: Path) -> None:
    async def scene(hall: Hall) -> None:
        orders = [hall.bid(ANN, 2), hall.ask(NODES[0], 2, expires_ms=hall.clock.now_ms() + 48 * HOUR_MS)]
        for order in orders:
            await hall.remote.hand_in(order)
        hall.clock.jump(24 * 3600)
        await hall.until_closed(2)
        checked = await hall.remote.batch(2)
        fates = {one.order: one.why for one in checked.outcome.left_out}
        assert fates == {orders[0].record_id: "expired", orders[1].record_id: "begun"}

    in_a_hall(tmp_path, scene)


# --- what it survives -----------------------------------------------------------------------------------------------


async def remote_of(process: AuctionProcess) -> tuple[TlsEndpoint, RemoteAuction]:
    endpoint = TlsEndpoint(KeyPair.generate())
    return endpoint, RemoteAuction(endpoint, process.ticket, SystemClock())


def orders_for(process: AuctionProcess, batch: int, *keys: KeyPair) -> list[Envelope]:
    now_ms = SystemClock().now_ms()
    return [
        sign(key, Ask(terms=terms(process.ticket.auctioneer, batch, now_ms, 200_000), payee=bytes(20))) for key in keys
    ]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)


async def bytes_of(process: AuctionProcess, number: int) -> bytes:
    """A batch as it is published, once it is."""
    endpoint, remote = await remote_of(process)
    try:

        async def is_there() -> bool:
            return (await remote.about()).running > number

        await until(is_there)
        return (await remote.published(number)).to_bytes()
    finally:
        await endpoint.close()


def test_what_was_acknowledged_survives_a_kill_before_the_batch_is_closed(tmp_path: Path) -> None:
    async def play() -> None:
        process = await AuctionProcess.start(tmp_path, NEVER_S)
        orders = orders_for(process, 2, *NODES[:3])
        endpoint, remote = await remote_of(process)
        await asyncio.gather(*(remote.hand_in(one) for one in orders))
        await process.kill()
        await endpoint.close()
        process = await AuctionProcess.start(tmp_path, FAST_S)
        checked = verified(Published.from_bytes(await bytes_of(process, 2)))
        assert orders_of(checked) == {one.record_id for one in orders}
        await process.kill()

    asyncio.run(play())


@pytest.mark.parametrize("dies", ["signing", "published"])
def test_a_batch_is_closed_once_whenever_its_auctioneer_is_killed(tmp_path: Path, dies: str) -> None:
    """Signed and not written: nobody has seen it, and the batch goes on with the next order. Written and told nobody:
    it stays as it is, byte for byte."""

    async def play() -> None:
        process = await AuctionProcess.start(tmp_path, FAST_S, dies)
        [mine] = orders_for(process, 2, NODES[0])
        endpoint, remote = await remote_of(process)
        with suppress(LinkError):  # it may die before its answer is on its way
            await remote.hand_in(mine)
        await process.killed()
        await endpoint.close()

        process = await AuctionProcess.start(tmp_path, NEVER_S)
        endpoint, remote = await remote_of(process)
        if dies == "signing":
            with pytest.raises(NotPublished, match="batches 1 to 1 are published and kept, and 2 is open"):
                await remote.batch(2)
            [other] = orders_for(process, 2, NODES[1])
            assert (await remote.hand_in(other)).batch == 2
            expected = {mine.record_id, other.record_id}
        else:
            before = (await remote.published(2)).to_bytes()
            assert (await remote.about()).orders == 0
            [other] = orders_for(process, 2, NODES[1])
            with pytest.raises(OrderRefused, match="this is 3"):
                await remote.hand_in(other)
            expected = {mine.record_id}
        await process.kill()
        await endpoint.close()

        process = await AuctionProcess.start(tmp_path, FAST_S)
        after = await bytes_of(process, 2)
        assert orders_of(verified(Published.from_bytes(after))) == expected
        assert dies == "signing" or after == before
        await process.kill()

    asyncio.run(play())


def test_a_disk_that_refuses_takes_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = AuctionFailed("The auction's database cannot be used: it is full.")
    keep, publish = AuctionStore.keep, AuctionStore.publish
    refuse, refused = False, 0

    def keep_or_not(self: AuctionStore, orders: Any) -> None:
        if refuse:
            raise full
        keep(self, orders)

    def publish_or_not(self: AuctionStore, *batch: Any) -> None:
        nonlocal refused
        if refuse:
            refused += 1
            raise full
        publish(self, *batch)

    monkeypatch.setattr(AuctionStore, "keep", keep_or_not)
    monkeypatch.setattr(AuctionStore, "publish", publish_or_not)

    async def scene(hall: Hall) -> None:
        nonlocal refuse
        first, second = hall.bid(ANN, 2), hall.bid(BEN, 2)
        await hall.remote.hand_in(first)
        refuse = True
        with pytest.raises(AuctionFailed, match="it is full"):
            await hall.remote.hand_in(second)
        assert (await hall.remote.about()).orders == 1
        await hall.clock.advance(EVERY_S)
        while not refused:
            await asyncio.sleep(0.005)
        assert (await hall.remote.about()).running == 2
        refuse = False
        third = hall.bid(CAT, 2)
        await hall.remote.hand_in(second)
        await hall.remote.hand_in(third)
        await hall.until_closed(2)
        checked = await hall.remote.batch(2)
        assert orders_of(checked) == {one.record_id for one in (first, second, third)}

    in_a_hall(tmp_path, scene)


def test_a_disk_that_writes_and_says_that_it_did_not_is_believed_in_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that nobody was told of is published all the same, and no order is taken for it any more."""
    publish, failed = AuctionStore.publish, 0

    def written(self: AuctionStore, number: int, *batch: Any) -> None:
        nonlocal failed
        publish(self, number, *batch)
        if number == 2:
            failed += 1
            raise AuctionFailed("The auction's database cannot be used: disk I/O error.")

    monkeypatch.setattr(AuctionStore, "publish", written)

    async def scene(hall: Hall) -> None:
        first = hall.bid(ANN, 2)
        await hall.remote.hand_in(first)
        await hall.until_closed(2)
        assert failed == 1
        assert orders_of(await hall.remote.batch(2)) == {first.record_id}
        with pytest.raises(OrderRefused, match="this is 3"):
            await hall.remote.hand_in(hall.bid(BEN, 2))
        third = hall.bid(BEN, 3)
        await hall.remote.hand_in(third)
        await hall.until_closed(3)
        assert orders_of(await hall.remote.batch(3)) == {third.record_id}

    in_a_hall(tmp_path, scene)


def test_no_batch_is_written_over_another(tmp_path: Path) -> None:
    store = AuctionStore(tmp_path / "auction.sqlite")
    store.publish(1, b"one", bytes(32))
    with pytest.raises(AuctionFailed, match="UNIQUE"):
        store.publish(1, b"another", bytes(32))
    assert store.newest() == b"one" and store.part(1, 0) == (1, b"one")
    store.close()


def test_a_large_batch_is_had_part_by_part_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.auctions.store.PART_BYTES", 1000)
    monkeypatch.setattr("shoal.auctions.store.KEPT_MAX", 3)

    async def scene(hall: Hall) -> None:
        for number in range(2, 7):
            for key in (*NODES, ANN):
                await hall.remote.hand_in(hall.bid(key, number))
            await hall.until_closed(number)
        info = await hall.remote.about()
        assert (info.oldest, info.running) == (4, 7)
        for number in (4, 5, 6):
            assert len((await hall.remote.batch(number)).orders) == len(NODES) + 1
        with pytest.raises(NotPublished, match="batches 4 to 6"):
            await hall.remote.batch(3)

    in_a_hall(tmp_path, scene)


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_auction_with_one_key(tmp_path: Path) -> None:
    async def started(settings: AuctionSettings) -> None:
        server = AuctionServer(
            settings, MemoryNetwork().endpoint, lambda _: MemoryLedger(LEDGER, HeldClock()), HeldClock(), SeededDice(1)
        )
        await server.start()
        await server.stop()

    async def scene(hall: Hall) -> None:
        with pytest.raises(AuctionFolderRefused, match="Another process runs the auction"):
            await started(AuctionSettings(tmp_path, listen="tcp://auction:7"))

    in_a_hall(tmp_path, scene)
    settings = AuctionSettings(tmp_path, listen="tcp://auction:7")
    asyncio.run(started(settings))
    kept = (tmp_path / "auctioneer.key").read_bytes()
    (tmp_path / "auctioneer.key").unlink()
    with pytest.raises(AuctionFailed, match="signed with another key"):
        asyncio.run(started(settings))
    (tmp_path / "auctioneer.key").write_bytes(kept)
    asyncio.run(started(settings))
    assert (tmp_path / "auction.sqlite").stat().st_mode & 0o777 == 0o600, "the seed is nobody else's to know"
    (tmp_path / "auction.sqlite").write_bytes(b"something else" * 1000)
    with pytest.raises(AuctionFailed, match="not a database"):
        asyncio.run(started(settings))
    (tmp_path / "auction.sqlite").unlink()
    with pytest.raises(AuctionFailed, match="its key would sign its batches a second time"):
        asyncio.run(started(settings))
    (tmp_path / "file").touch()
    with pytest.raises(AuctionFolderRefused, match="cannot be used"):
        asyncio.run(started(AuctionSettings(tmp_path / "file", listen="tcp://auction:7")))


def test_an_order_whose_answer_was_lost_is_not_said_to_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken, the link broke, its batch was closed: who signed it again for the next one would trade twice."""
    hand_in, calls = Auctioneer.hand_in, 0

    async def scene(hall: Hall) -> None:
        async def lost(self: Auctioneer, *order: Any) -> Taken:
            nonlocal calls
            calls += 1
            taken = await hand_in(self, *order)
            await self.close()
            for link in list(hall.endpoint.links().values()):
                await link.close()
            return taken

        monkeypatch.setattr(Auctioneer, "hand_in", lost)
        await hall.clock.advance(0.001)
        order = hall.bid(ANN, 2)
        with pytest.raises(LinkLost):
            await hall.remote.hand_in(order)
        assert calls == 2
        assert orders_of(await hall.remote.batch(2)) == {order.record_id}

    in_a_hall(tmp_path, scene)


# --- auctioneers that lie -------------------------------------------------------------------------------------------


def test_what_an_auctioneer_publishes_is_cleared_again_before_it_is_believed() -> None:
    key, twin = KeyPair.generate(), KeyPair.generate()

    def first(signer: KeyPair) -> Published:
        from shoal.market.batches import Carried

        return close(signer, Carried(), None, [], seed=bytes(32), next_seed=bytes(32), closed_ms=1)[0]

    async def asked(answer: bytes, parts: int = 1) -> None:
        network = MemoryNetwork()
        liar, asker = network.endpoint(key), network.endpoint(KeyPair.generate())

        async def say(request: Request) -> bytes:
            return encode(BatchPart(parts=parts, data=answer))

        liar.handle(AskBatch.KIND, say)
        ticket = AuctionTicket(key.node_id, (await liar.listen("tcp://liar:0"),))
        try:
            await RemoteAuction(asker, ticket, HeldClock()).batch(2 if answer == right else 1)
        finally:
            await asker.close()
            await liar.close()

    right = first(key).to_bytes()
    for answer, parts, words in (
        (right, 1, "answered with batch 1 of .* where its own batch 2 was due"),
        (first(twin).to_bytes(), 1, "where its own batch 1 was due"),
        (msgspec.structs.replace(first(key), clearing=first(twin).clearing).to_bytes(), 1, "clearing of another batch"),
        (right + b"!", 1, "should be a published batch"),
        (right, 2, "should be a published batch"),
        (b"", 1, "should be a published batch"),
    ):
        with pytest.raises(BadBatch, match=words):
            asyncio.run(asked(answer, parts))


def test_who_says_to_have_taken_another_order_is_not_believed() -> None:
    async def play() -> None:
        network, key = MemoryNetwork(), KeyPair.generate()
        liar, asker = network.endpoint(key), network.endpoint(KeyPair.generate())
        answers = iter(
            [Taken(order=bytes(32), batch=2, closes_ms=1), Taken(order=order.record_id, batch=3, closes_ms=1)]
        )

        async def say(request: Request) -> bytes:
            return encode(next(answers))

        liar.handle(HandIn.KIND, say)
        remote = RemoteAuction(asker, AuctionTicket(key.node_id, (await liar.listen("tcp://liar:0"),)), HeldClock())
        for _ in range(2):
            with pytest.raises(BadRecord, match="another order than it was handed"):
                await remote.hand_in(order)
        await asker.close()
        await liar.close()

    order = sign(ANN, Ask(terms=terms(BEN.node_id, 2, 0, 1), payee=bytes(20)))
    asyncio.run(play())


# --- tickets --------------------------------------------------------------------------------------------------------


def test_a_ticket_is_read_as_it_was_written() -> None:
    ticket = AuctionTicket(ANN.node_id, ("tcp://127.0.0.1:7", "tcp://[::1]:8"))
    assert AuctionTicket.parse(f" {ticket}\n") == ticket
    for wrong in ("", "shoal://" + str(ticket).partition("://")[2], str(ticket) + "/USD", str(ticket).upper()):
        with pytest.raises(BadTicket, match="auction's ticket looks like shoal-auction://"):
            AuctionTicket.parse(wrong)
