"""Fetching: from several holders, whatever some of them do, over links of either kind."""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator
from pathlib import Path as FilePath

import pytest
from blob_world import Node, World, noise, play, ref_of, stream_of, trickle
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.identity import short_id
from shoal.protocol.blobs import CHUNK_BYTES, BlobChunkList, BlobHolder, BlobRead, BlobRef
from shoal.protocol.messages import PROTOCOL_VERSION, encode
from shoal.quantities import joined
from shoal.storage import (
    BadBlobRequest,
    BadReference,
    FetchFailed,
    FetchProgress,
    ServerBusy,
    StorageFull,
    UnknownBlob,
    find_blob,
    hash_pieces,
)
from shoal.storage.download import COPIES_MAX, HEDGE_S, HOLDERS_MAX, PIECES_IN_FLIGHT, STALL_BYTES, _Flight, _Peer
from shoal.storage.fetch import DOWNLOADS_AT_ONCE, SLOW_AT_ONCE, SMALL_AT_ONCE
from shoal.storage.pieces import cut, piece_count, pieces_in
from shoal.storage.serve import READ_MAX_BYTES, READS_IN_ALL, READS_PER_PEER
from shoal.transport.memory import Path
from shoal.world import Body, DeadlineExceeded, DirectoryDisk, FaultyDisk, HeldClock, MemoryDisk, Refused, Request

both = pytest.mark.parametrize("kind", ["memory", "tls"])
Asked = BlobRead | BlobChunkList
BIG = 9 * CHUNK_BYTES + 1234
PEER = b"p" * 32


@both
def test_a_small_blob_is_one_request(kind: str) -> None:
    async def scene() -> None:
        async with World(kind) as world:
            data = noise(CHUNK_BYTES)
            one, two = await world.holders(2, data)
            me = await world.node(listens=False)
            report = await me.fetcher.fetch(ref_of(data), [one.holder, two.holder])
            assert me.store.read(ref_of(data).hash) == data
            assert len(one.asked) + len(two.asked) == 1
            assert list(report.bytes_by_peer.values()) == [CHUNK_BYTES] and report.dropped == {}
            assert (await me.fetcher.fetch(ref_of(data), [one.holder, two.holder])).bytes_by_peer == {}
            assert len(one.asked) + len(two.asked) == 1

    play(scene())


@both
def test_a_large_blob_comes_from_several_holders_at_once(kind: str) -> None:
    async def scene() -> None:
        async with World(kind) as world:
            data = noise(BIG)
            holders = await world.holders(3, data)
            together = asyncio.Barrier(3)

            def waits(node: Node) -> None:
                async def instead(asked: Asked, request: Request) -> None:
                    if isinstance(asked, BlobRead) and len(node.pieces_asked) == 1:
                        await together.wait()  # nobody answers a first piece before all are asked for one

                node.instead = instead

            for node in holders:
                waits(node)
            me = await world.node(listens=False)
            seen: list[FetchProgress] = []
            report = await me.fetcher.fetch(ref_of(data), [node.holder for node in holders], seen.append)
            assert me.store.read(ref_of(data).hash) == data
            assert set(report.bytes_by_peer) == {node.id for node in holders}
            assert sum(report.bytes_by_peer.values()) == BIG
            assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
            assert (seen[-1].done_bytes, seen[-1].total_bytes) == (BIG, BIG)

    play(scene())


@both
def test_a_holder_that_cannot_be_dialled_serves_over_the_link_it_opened(kind: str) -> None:
    async def scene() -> None:
        async with World(kind) as world:
            data = noise(3 * CHUNK_BYTES)
            hidden = await world.node(listens=False)
            hidden.store.put(data)
            me = await world.node()
            await hidden.endpoint.dial(me.id, me.endpoint.addresses)
            await until(lambda: hidden.id in me.endpoint.links())
            report = await me.fetcher.fetch(ref_of(data), [BlobHolder(node=hidden.id)])
            assert report.bytes_by_peer == {hidden.id: len(data)}

    play(scene())


def lies_first(liar: Node, *honest: Node) -> None:
    """The liar sends wrong bytes; the others send theirs once it has."""
    lied = asyncio.Event()

    async def lie(asked: Asked, request: Request) -> Body | None:
        if isinstance(asked, BlobRead):
            lied.set()
            return stream_of(bytes(asked.length))
        return None

    async def wait_for_the_lie(asked: Asked, request: Request) -> None:
        if isinstance(asked, BlobRead):
            await lied.wait()

    liar.instead = lie
    for one in honest:
        one.instead = wait_for_the_lie


@both
def test_wrong_bytes_cost_their_sender_its_place_and_nothing_else(kind: str) -> None:
    async def scene() -> None:
        async with World(kind) as world:
            data = noise(BIG)
            honest, liar = await world.holders(2, data)
            lies_first(liar, honest)
            me = await world.node(listens=False)
            report = await me.fetcher.fetch(ref_of(data), [liar.holder, honest.holder])
            assert me.store.read(ref_of(data).hash) == data
            assert report.bytes_by_peer == {honest.id: BIG}
            assert list(report.dropped) == [liar.id]
            assert report.dropped[liar.id].startswith(short_id(liar.id) + " sent wrong bytes for piece")

    play(scene())


async def until(holds) -> None:  # type: ignore[no-untyped-def]
    while not holds():
        await asyncio.sleep(0)


# One kind of link is enough for the rest.


def test_an_empty_blob_needs_nobody() -> None:
    async def scene() -> None:
        async with World() as world:
            me = await world.node()
            await me.fetcher.fetch(ref_of(b""))
            assert me.store.read(ref_of(b"").hash) == b""

    play(scene())


@pytest.mark.parametrize("size", [5000, BIG])
def test_when_nobody_delivers_every_holder_is_named(size: int) -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(size)
            liar, short = await world.holders(2, data)
            empty = await world.node()

            async def lie(asked: Asked, request: Request) -> Body:
                length = asked.length if isinstance(asked, BlobRead) else 32 * 10
                return stream_of(bytes(length))

            async def cut_short(asked: Asked, request: Request) -> Body:
                return stream_of(b"short")

            liar.instead, short.instead = lie, cut_short
            hidden = BlobHolder(node=b"\7" * 32)
            gone = BlobHolder(node=b"\x08" * 32, addresses=("tcp://127.0.0.1:999",))
            me = await world.node(listens=False)
            with pytest.raises(FetchFailed) as caught:
                holders = [liar.holder, short.holder, empty.holder, hidden, gone, me.holder]
                await me.fetcher.fetch(ref_of(data), holders)
            sentence = str(caught.value)
            for node in (liar.id, short.id, empty.id, hidden.node, gone.node):
                assert short_id(node) in sentence
            assert short_id(me.id) not in sentence.split("holders:")[1].replace(f"held here for {short_id(me.id)}", "")
            for part in ("5 holders", "5 bytes where", "not held here", "no address", "could not be reached"):
                assert part in sentence, sentence
            assert ("wrong bytes" if size == 5000 else "a chunk list") in sentence
            with pytest.raises(FetchFailed, match="nobody is known"):
                await me.fetcher.fetch(ref_of(data))

    play(scene())


def test_more_bytes_than_asked_for_are_a_broken_protocol() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(5000)
            (flood,) = await world.holders(1, data)

            async def too_much(asked: Asked, request: Request) -> Body:
                return stream_of(bytes(1 << 20))

            flood.instead = too_much
            me = await world.node()
            with pytest.raises(FetchFailed, match="broke the protocol"):
                await me.fetcher.fetch(ref_of(data), [flood.holder])

    play(scene())


def test_a_broken_fetch_goes_on_where_it_stopped() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(BIG)
            (holder,) = await world.holders(1, data)
            disk = MemoryDisk()
            me = await world.node(listens=False, disk=disk)

            async def refuse_from_the_fifth(asked: Asked, request: Request) -> None:
                if isinstance(asked, BlobRead) and asked.offset >= 5 * CHUNK_BYTES:
                    raise UnknownBlob("It is gone.")

            holder.instead = refuse_from_the_fifth
            with pytest.raises(FetchFailed, match=r"It is gone.*is kept"):
                await me.fetcher.fetch(ref_of(data), [holder.holder])
            assert not me.store.has(ref_of(data).hash)
            holder.instead = None
            holder.asked.clear()
            report = await me.fetcher.fetch(ref_of(data), [holder.holder])
            assert report.resumed_bytes == BIG - sum(report.bytes_by_peer.values()) > 0
            assert sorted(holder.pieces_asked) == list(range(10 - len(holder.pieces_asked), 10))
            assert len(holder.asked) == len(holder.pieces_asked), "the chunk list is asked for once"
            assert me.store.read(ref_of(data).hash) == data

    play(scene())


def test_a_holder_that_goes_silent_does_not_hold_the_blob_up() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with World(clock=clock) as world:
            data = noise(BIG)
            quick, silent = await world.holders(2, data)
            silenced = asyncio.Event()

            async def say_nothing(asked: Asked, request: Request) -> None:
                if isinstance(asked, BlobRead):
                    silenced.set()
                    await asyncio.Event().wait()

            async def second(asked: Asked, request: Request) -> None:
                if isinstance(asked, BlobRead):
                    await silenced.wait()

            silent.instead, quick.instead = say_nothing, second
            me = await world.node(listens=False)
            done = 0

            def note(progress: FetchProgress) -> None:
                nonlocal done
                done = progress.done_bytes

            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [quick.holder, silent.holder], note))
            stuck = 2 * CHUNK_BYTES  # what the silent one was asked for before anything was known about it
            await until(lambda: done >= BIG - stuck)
            assert not fetch.done()
            await clock.advance(HEDGE_S + 1)  # less than a stall: late is enough
            report = await fetch
            assert report.bytes_by_peer == {quick.id: BIG}
            assert me.store.read(ref_of(data).hash) == data

    play(scene())


def test_a_late_small_blob_is_asked_of_the_next_holder_too() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with World(clock=clock) as world:
            data = noise(5000)
            holders = await world.holders(2, data)
            first = asyncio.Event()

            async def first_says_nothing(asked: Asked, request: Request) -> None:
                if not first.is_set():
                    first.set()
                    await asyncio.Event().wait()

            for node in holders:
                node.instead = first_says_nothing
            me = await world.node(listens=False)
            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [node.holder for node in holders]))
            await first.wait()
            await clock.advance(HEDGE_S + 1)
            assert sum((await fetch).bytes_by_peer.values()) == 5000

    play(scene())


def test_a_busy_holder_is_waited_for() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with World(clock=clock) as world:
            data = noise(5000)
            (holder,) = await world.holders(1, data)

            async def busy_six_times(asked: Asked, request: Request) -> None:
                if len(holder.asked) <= 6:
                    raise ServerBusy("Ask again.")

            holder.instead = busy_six_times
            me = await world.node(listens=False)
            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [holder.holder]))
            while len(holder.asked) < 7:
                await asyncio.sleep(0)
                await clock.advance(0.25)
            assert (await fetch).bytes_by_peer == {holder.id: 5000}

    play(scene())


def test_who_is_late_is_judged_by_what_has_come() -> None:
    peer, mib = _Peer(b"n" * 32, ()), CHUNK_BYTES
    silent = _Flight(peer, since=0.0, length=mib)
    assert not silent.late(HEDGE_S, None) and silent.late(HEDGE_S + 0.1, None)
    steady = _Flight(peer, since=0.0, length=mib, received=mib // 4)
    assert not steady.late(3.0, None), "9 s to go on a slow line: another holder would share the same line"
    assert not steady.late(3.0, 5.0) and steady.late(3.0, 0.1)
    peer.pace_s = 0.5
    assert silent.late(1.1, None) and not silent.late(0.9, None)


BYTE_IN_8_S = (1, 8.0)
ABOVE_THE_FLOOR = (600, 1.0)


async def dripping(world: World, count: int, data: bytes, drip: tuple[int, float]) -> list[Node]:
    """Holders whose bytes are right and come slowly, never so slowly that they were silent."""
    made = await world.holders(count, data)

    async def instead(asked: Asked, request: Request) -> Body | None:
        if isinstance(asked, BlobChunkList):
            return None
        return trickle(world.clock, data[asked.offset : asked.offset + asked.length], *drip)

    for node in made:
        node.instead = instead
    return made


@pytest.mark.parametrize(
    ("size", "count", "drip"),
    [
        (500_000, 3, BYTE_IN_8_S),
        (500_000, 20, BYTE_IN_8_S),
        (3 * CHUNK_BYTES, 2, BYTE_IN_8_S),
        (20 * CHUNK_BYTES, 8, BYTE_IN_8_S),
        (20 * CHUNK_BYTES, HOLDERS_MAX - 1, BYTE_IN_8_S),
        (500_000, 4, ABOVE_THE_FLOOR),
        (3 * CHUNK_BYTES, 2, ABOVE_THE_FLOOR),
        (20 * CHUNK_BYTES, 9, ABOVE_THE_FLOOR),
    ],
)
def test_one_honest_holder_is_enough_however_many_drip(size: int, count: int, drip: tuple[int, float]) -> None:
    async def scene() -> None:
        async with World(clock=HeldClock()) as world:
            data = noise(size)
            slow = await dripping(world, count, data, drip)
            (honest,) = await world.holders(1, data)
            me = await world.node(listens=False)
            for node in slow:  # so that they come first
                await me.endpoint.dial(node.id, node.endpoint.addresses)
            holders = [node.holder for node in (*slow, honest)]
            report = await world.pass_time(asyncio.create_task(me.fetcher.fetch(ref_of(data), holders)))
            assert report.bytes_by_peer[honest.id] >= size - CHUNK_BYTES
            assert honest.id not in report.dropped
            assert drip is BYTE_IN_8_S or report.dropped == {}

    play(scene())


@pytest.mark.parametrize("size", [500_000, BIG])
def test_when_all_holders_drip_a_fetch_fails_and_says_so(size: int) -> None:
    async def scene() -> None:
        async with World(clock=HeldClock()) as world:
            data = noise(size)
            slow = await dripping(world, 20, data, BYTE_IN_8_S)
            me = await world.node(listens=False)
            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [node.holder for node in slow]))
            with pytest.raises(FetchFailed) as caught:
                await world.pass_time(fetch)
            for node in slow:
                assert f"{short_id(node.id)} failed 3 times, the last time so: It sent " in str(caught.value)

    play(scene())


def test_a_slow_line_blames_nobody() -> None:
    async def scene() -> None:
        async with World(clock=HeldClock()) as world:
            world.network.default_path = Path(delay_s=0.15, rate_bps=32_000)
            data = noise(2 * CHUNK_BYTES)
            holders = await world.holders(2, data)
            me = await world.node(listens=False)
            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [node.holder for node in holders]))
            assert (await world.pass_time(fetch)).dropped == {}

    play(scene())


@pytest.mark.parametrize(("size", "count"), [(500_000, SMALL_AT_ONCE), (2 * CHUNK_BYTES, DOWNLOADS_AT_ONCE)])
def test_blobs_that_drip_hold_no_place(size: int, count: int) -> None:
    async def scene() -> None:
        async with World(clock=HeldClock()) as world:
            me = await world.node(listens=False, capacity_bytes=1 << 30)
            dripped = []
            for seed in range(count):
                data = noise(size, seed)
                (slow,) = await dripping(world, 1, data, ABOVE_THE_FLOOR)
                dripped.append(asyncio.create_task(me.fetcher.fetch(ref_of(data), [slow.holder])))
                await until(lambda slow=slow: any(isinstance(asked, BlobRead) for asked in slow.asked))
            data = noise(size, count)
            (honest,) = await world.holders(1, data)
            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [honest.holder]))
            await world.pass_time(asyncio.create_task(until(lambda: honest.asked)))
            await fetch  # which needs no time
            assert not any(task.done() for task in dripped)
            for task in dripped:
                task.cancel()
            await asyncio.wait(dripped)
            places = me.fetcher._small if size <= CHUNK_BYTES else me.fetcher._large
            assert (places._value, me.fetcher._aside._value) == (count, SLOW_AT_ONCE), "all were given back"

    play(scene())


def test_what_counts_as_a_stall() -> None:
    flight = _Flight(_Peer(b"n" * 32, ()), since=0.0, length=CHUNK_BYTES)
    flight.took(1, 5.0)  # silence before it is the link's to judge
    assert flight.crawls(5.0) and flight.late(5.0, None)
    flight.took(STALL_BYTES, 14.9)
    flight.took(1, 15.0)
    assert not flight.crawls(15.0)
    with pytest.raises(DeadlineExceeded, match="It sent 4095 bytes in 12 s"):
        flight.took(STALL_BYTES - 1, 27.0)
    eager = _Flight(_Peer(b"n" * 32, ()), since=0.0, length=CHUNK_BYTES)
    eager.took(CHUNK_BYTES - 100_000, 0.1)
    assert not eager.late(1.0, None)
    for moment in (11.0, 22.0, 23.0):
        eager.took(STALL_BYTES, moment)
    assert eager.late(23.0, None), "what came at first does not count for ever"


def test_a_link_that_comes_up_meanwhile_is_used() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with World(clock=clock) as world:
            data = noise(3 * CHUNK_BYTES)
            stuck, hidden = await world.holders(2, data)
            asked_stuck = asyncio.Event()

            async def say_nothing(asked: Asked, request: Request) -> None:
                if isinstance(asked, BlobRead):
                    asked_stuck.set()
                    await asyncio.Event().wait()

            stuck.instead = say_nothing
            me = await world.node()
            some = asyncio.Event()
            holders = [stuck.holder, BlobHolder(node=hidden.id)]
            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), holders, lambda _: some.set()))
            await asked_stuck.wait()
            await hidden.endpoint.dial(me.id, me.endpoint.addresses)
            await some.wait()
            await clock.advance(HEDGE_S + 1)
            report = await fetch
            assert report.bytes_by_peer == {hidden.id: len(data)}

    play(scene())


def test_fetches_of_one_blob_share_one_download() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(BIG)
            one, two = await world.holders(2, data)
            me = await world.node(listens=False)
            start = asyncio.Event()

            async def wait(asked: Asked, request: Request) -> None:
                await start.wait()

            one.instead = two.instead = wait
            fetches = [
                asyncio.create_task(me.fetcher.fetch(ref_of(data), [node.holder])) for node in (one, two, one, two)
            ]
            await until(lambda: one.asked)
            fetches[2].cancel()
            start.set()
            done = await asyncio.gather(*fetches, return_exceptions=True)
            assert isinstance(done[2], asyncio.CancelledError)
            assert done[0] == done[1] == done[3]
            assert set(one.pieces_asked) | set(two.pieces_asked) == set(range(10))
            assert len(one.pieces_asked) + len(two.pieces_asked) <= COPIES_MAX * 10

    play(scene())


def test_a_fetch_that_nobody_waits_for_any_more_stops_and_can_be_resumed() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(BIG)
            (holder,) = await world.holders(1, data)
            me = await world.node(listens=False)
            some = asyncio.Event()

            async def stop_at_the_fourth(asked: Asked, request: Request) -> None:
                if isinstance(asked, BlobRead) and asked.offset >= 4 * CHUNK_BYTES:
                    await asyncio.Event().wait()

            def note(progress: FetchProgress) -> None:
                if progress.done_bytes >= 4 * CHUNK_BYTES:
                    some.set()

            holder.instead = stop_at_the_fourth
            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [holder.holder], note))
            await some.wait()
            fetch.cancel()
            await asyncio.wait([fetch])
            await until(lambda: holder.reading == 0)  # the holder was told to stop
            holder.instead = None
            report = await me.fetcher.fetch(ref_of(data), [holder.holder])
            assert report.resumed_bytes == 4 * CHUNK_BYTES

    play(scene())


def test_a_fetch_that_is_cancelled_at_once_can_be_begun_again() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(2 * CHUNK_BYTES)
            (holder,) = await world.holders(1, data)
            me = await world.node(listens=False)
            for pauses in range(12):
                fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [holder.holder]))
                for _ in range(pauses):
                    await asyncio.sleep(0)
                fetch.cancel()
            await me.fetcher.fetch(ref_of(data), [holder.holder])
            assert me.store.read(ref_of(data).hash) == data

    play(scene())


# References that contradict themselves


def test_a_reference_whose_chunks_are_of_other_bytes_blames_nobody() -> None:
    async def scene() -> None:
        async with World() as world:
            data, other = noise(BIG), noise(BIG, 1)
            holders = await world.holders(2, data)
            me = await world.node(listens=False)
            with pytest.raises(BadReference, match="No holder is to blame"):
                await me.fetcher.fetch(ref_of(data, other), [node.holder for node in holders])
            await me.fetcher.fetch(ref_of(data), [holders[0].holder])
            with pytest.raises(BadReference):
                await me.fetcher.fetch(ref_of(data, other), [holders[0].holder])
            with pytest.raises(BadReference):
                await me.fetcher.fetch(BlobRef(hash=ref_of(data).hash, size=100), [holders[0].holder])

    play(scene())


def test_a_reference_whose_hash_is_of_other_bytes_blames_nobody() -> None:
    async def scene() -> None:
        async with World() as world:
            data, other = noise(BIG), noise(BIG, 1)
            (holder,) = await world.holders(1, data)
            bad = BlobRef(hash=ref_of(other).hash, size=BIG, chunks=ref_of(data).chunks)
            chunk_list = holder.store.chunk_list(ref_of(data).hash)

            async def answer_by_chunks(asked: Asked, request: Request) -> Body:
                if isinstance(asked, BlobChunkList):
                    return stream_of(chunk_list)
                return stream_of(data[asked.offset : asked.offset + asked.length])

            holder.instead = answer_by_chunks
            me = await world.node(listens=False)
            with pytest.raises(BadReference, match="the whole is not `hash`"):
                await me.fetcher.fetch(bad, [holder.holder])
            assert me.store.used_bytes == 0

    play(scene())


def test_holders_that_all_lie_about_the_chunk_list_do_not_make_the_reference_bad() -> None:
    async def scene() -> None:
        async with World() as world:
            data, other = noise(BIG), noise(BIG, 1)
            holders = await world.holders(2, data)

            async def of_other_bytes(asked: Asked, request: Request) -> Body:
                if isinstance(asked, BlobChunkList):
                    return stream_of(b"".join(bytes([n]) * 32 for n in range(10)))
                return stream_of(other[asked.offset : asked.offset + asked.length])

            for node in holders:
                node.instead = of_other_bytes
            me = await world.node(listens=False)
            with pytest.raises(FetchFailed, match="not the one its reference names"):
                await me.fetcher.fetch(ref_of(data), [node.holder for node in holders])

    play(scene())


def test_a_holder_that_lied_and_drips_is_not_acquitted_for_ever() -> None:
    async def scene() -> None:
        async with World(clock=HeldClock()) as world:
            data = noise(BIG)
            (liar,) = await dripping(world, 1, data, ABOVE_THE_FLOOR)
            drip = liar.instead
            assert drip is not None

            async def lie(asked: Asked, request: Request) -> Body | None:
                return stream_of(bytes(32 * 10)) if isinstance(asked, BlobChunkList) else await drip(asked, request)

            liar.instead = lie
            me = await world.node(listens=False)
            fetch = asyncio.create_task(me.fetcher.fetch(ref_of(data), [liar.holder]))
            with pytest.raises(FetchFailed, match="not the one its reference names"):
                await world.pass_time(fetch)

    play(scene())


# Room


def test_no_room_is_said_before_anything_is_fetched() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(BIG)
            (holder,) = await world.holders(1, data)
            me = await world.node(capacity_bytes=4 << 20)
            with pytest.raises(StorageFull, match="no room"):
                await me.fetcher.fetch(ref_of(data), [holder.holder])
            assert holder.asked == []

    play(scene())


@pytest.mark.parametrize("size", [5000, BIG])
def test_a_disk_that_fills_up_meanwhile_is_not_the_holders_fault(size: int) -> None:
    async def scene() -> None:
        async with World() as world:
            full = True

            def fault(operation: str, name: str) -> None:
                if full and operation == "write/half" and ("partial" in name or size == 5000):
                    raise OSError(errno.ENOSPC, "No space left on device")

            data = noise(size)
            holders = await world.holders(2, data)
            me = await world.node(disk=FaultyDisk(MemoryDisk(), lambda *_: None))
            me.store._disk._fault = fault  # type: ignore[attr-defined]
            with pytest.raises(StorageFull, match="disk under memory is full"):
                await me.fetcher.fetch(ref_of(data), [node.holder for node in holders])
            assert not me.store.has(ref_of(data).hash)
            full = False
            await me.fetcher.fetch(ref_of(data), [node.holder for node in holders])
            assert me.store.read(ref_of(data).hash) == data

    play(scene())


def test_big_pieces_are_written_beside_the_event_loop() -> None:
    async def scene() -> None:
        async with World() as world:
            stalled: list[str] = []

            def fault(operation: str, name: str) -> None:
                if threading.current_thread() is threading.main_thread() and name.startswith(("blobs", "partial")):
                    stalled.append(f"{operation} {name}")

            data = noise(BIG)
            (holder,) = await world.holders(1, data)
            me = await world.node(disk=FaultyDisk(MemoryDisk(), fault))
            await me.fetcher.fetch(ref_of(data), [holder.holder])
            assert stalled == []

    play(scene())


def test_pieces_in_memory_are_bounded() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(24 * CHUNK_BYTES)
            holders = await world.holders(6, data)
            me = await world.node(listens=False)
            most = 0

            async def count(asked: Asked, request: Request) -> None:
                nonlocal most
                most = max(most, sum(node.reading for node in holders))

            for node in holders:
                node.instead = count
            await me.fetcher.fetch(ref_of(data), [node.holder for node in holders])
            assert 1 < most <= PIECES_IN_FLIGHT * COPIES_MAX
            assert all(node.reading_most <= 8 for node in holders)

    play(scene())


# Serving


def test_a_server_refuses_what_it_must() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(20 * CHUNK_BYTES)
            allowed: set[bytes] = set()
            server = await world.node(allow=lambda peer, hash: peer in allowed)
            hash = server.store.put(data).hash
            me, friend = await world.node(), await world.node()
            allowed.add(friend.id)

            async def ask(node: Node, asked: Asked) -> bytes:
                link = await node.endpoint.dial(server.id, server.endpoint.addresses)
                async with link.stream(asked.KIND, encode(asked), max_bytes=1 << 30) as parts:
                    return b"".join([bytes(part) async for part in parts])

            for asked in (BlobRead(hash=hash, length=10), BlobChunkList(hash=hash)):
                with pytest.raises(Refused, match="not held here") as caught:
                    await ask(me, asked)
                assert caught.value.remote_code == UnknownBlob.code
            unknown = BlobRead(hash=bytes(32), length=1)
            with pytest.raises(Refused, match="not held here"):
                await ask(friend, unknown)
            assert (
                await ask(friend, BlobRead(hash=hash, offset=5, length=READ_MAX_BYTES)) == data[5 : 5 + READ_MAX_BYTES]
            )
            assert await ask(friend, BlobRead(hash=hash, offset=len(data), length=0)) == b""
            assert await ask(friend, BlobChunkList(hash=hash)) == server.store.chunk_list(hash)
            for offset, length in ((0, READ_MAX_BYTES + 1), (len(data) - 1, 2), (1 << 43, 1)):
                with pytest.raises(Refused, match=r"at most|not inside") as caught:
                    await ask(friend, BlobRead(hash=hash, offset=offset, length=length))
                assert server.disk.place not in str(caught.value)

    play(scene())


def request_of(peer: bytes, asked: Asked) -> Request:
    return Request(peer, asked.KIND, encode(asked), PROTOCOL_VERSION, None)  # type: ignore[arg-type]


def test_reads_count_from_their_first_byte_and_not_from_when_they_are_taken() -> None:
    async def scene() -> None:
        async with World() as world:
            node = await world.node()
            hash = node.store.put(noise(BIG)).hash

            async def ask(peer: int, times: int) -> list[Body]:
                request = request_of(bytes([peer]) * 32, BlobRead(hash=hash, length=CHUNK_BYTES))
                answers = await asyncio.gather(
                    *(node.server.read(request) for _ in range(times)), return_exceptions=True
                )
                assert all(isinstance(it, ServerBusy) for it in answers if isinstance(it, BaseException))
                return [it for it in answers if not isinstance(it, BaseException)]

            held = [await ask(1, 5 * READS_PER_PEER)]
            assert len(held[0]) == READS_PER_PEER
            held += [await ask(peer, READS_PER_PEER) for peer in range(2, 9)]
            assert [len(reads) for reads in held] == [32, 32, 1, 1, 1, 1, 1, 1], "who has none finds a place"
            held += [await ask(peer, 1) for peer in range(9, 100)]
            assert node.server.reads == READS_IN_ALL

    play(scene())


def test_a_read_gives_its_place_back_however_it_ends() -> None:
    async def scene() -> None:
        async with World() as world:
            node = await world.node()
            ref = node.store.put(noise(BIG))
            hash = ref.hash
            server = node.server

            async def read(offset: int = 0, length: int = 2 * CHUNK_BYTES) -> AsyncIterator[bytes]:
                body = await server.read(request_of(PEER, BlobRead(hash=hash, offset=offset, length=length)))
                assert not isinstance(body, bytes) and server.reads == 1
                return body

            async for _ in await read():  # to its end
                pass
            assert server.reads == 0
            begun = await read()
            await anext(begun)
            await begun.aclose()  # type: ignore[attr-defined]
            assert server.reads == 0
            await (await read()).aclose()  # type: ignore[attr-defined]  # never begun
            assert server.reads == 0
            await read()  # and forgotten
            assert server.reads == 0
            with pytest.raises(BadBlobRequest, match="not inside"):
                await read(offset=BIG)
            with pytest.raises(BadBlobRequest, match="at most"):
                await read(length=READ_MAX_BYTES + 1)
            assert server.reads == 0
            asked = asyncio.create_task(read())
            await asyncio.sleep(0)
            asked.cancel()  # while the disk reads
            await asyncio.wait([asked])
            assert server.reads == 0
            chunks = await server.chunks(request_of(PEER, BlobChunkList(hash=hash)))
            assert not isinstance(chunks, bytes) and server.reads == 1
            assert len([part async for part in chunks]) == 1 and server.reads == 0
            begun = await read()
            node.disk.delete(f"blobs/{hash.hex()}")
            with pytest.raises(UnknownBlob, match="no longer held"):
                async for _ in begun:
                    pass
            assert server.reads == 0

    play(scene())


def test_a_holder_whose_bytes_rotted_notices_and_others_serve() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(BIG)
            good = (await world.holders(1, data))[0]
            disk = MemoryDisk()
            world_of_before = await world.node(disk=disk)
            hash = world_of_before.store.put(data).hash
            for offset in range(0, BIG, CHUNK_BYTES):
                disk.write(f"blobs/{hash.hex()}", b"rot", offset)
            me = await world.node(listens=False)
            report = await me.fetcher.fetch(ref_of(data), [world_of_before.holder, good.holder])
            assert me.store.read(hash) == data
            assert report.bytes_by_peer == {good.id: BIG}
            if world_of_before.pieces_asked:
                assert not world_of_before.store.has(hash)
                assert "no longer held" in report.dropped[world_of_before.id]

    play(scene())


def test_what_rotted_here_is_fetched_again() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(5000)
            (holder,) = await world.holders(1, data)
            me = await world.node()
            me.store.put(data)
            me.disk.delete(f"blobs/{ref_of(data).hash.hex()}")
            await me.fetcher.fetch(ref_of(data), [holder.holder])
            assert me.store.read(ref_of(data).hash) == data

    play(scene())


def test_a_fetch_under_an_owner_is_pinned() -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(5000)
            (holder,) = await world.holders(1, data)
            me = await world.node(capacity_bytes=8192)
            await me.fetcher.fetch(ref_of(data), [holder.holder], owner="job")
            with pytest.raises(StorageFull):
                me.store.put(noise(5000, 2))
            assert me.store.has(ref_of(data).hash)

    play(scene())


BEHAVIOURS = ["honest", "wrong pieces", "wrong list", "short", "refuses", "has nothing", "unreachable"]


@given(
    behaviours=st.lists(st.sampled_from(BEHAVIOURS), min_size=1, max_size=6),
    size=st.sampled_from([1, 5000, CHUNK_BYTES, CHUNK_BYTES + 1, 4 * CHUNK_BYTES]),
    after=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_one_honest_holder_is_enough_and_nothing_else_ever_is(behaviours: list[str], size: int, after: int) -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(size)
            me = await world.node(listens=False)
            holders = []
            for behaviour in behaviours:
                node = await world.node()
                if behaviour != "has nothing":
                    node.store.put(data)
                misbehave(node, behaviour, after if size > CHUNK_BYTES else 0)
                addresses = () if behaviour == "unreachable" else tuple(node.endpoint.addresses)
                holders.append(BlobHolder(node=node.id, addresses=addresses))
            if "honest" in behaviours:
                report = await me.fetcher.fetch(ref_of(data), holders)
                assert me.store.read(ref_of(data).hash) == data
                assert sum(report.bytes_by_peer.values()) == size
                honest = {holders[at].node for at, behaviour in enumerate(behaviours) if behaviour == "honest"}
                assert not honest & set(report.dropped)
            elif not (size > CHUNK_BYTES and after * len(behaviours) > 0):
                with pytest.raises(FetchFailed) as caught:
                    await me.fetcher.fetch(ref_of(data), holders)
                for holder in holders:
                    assert short_id(holder.node) in str(caught.value)
                assert not me.store.has(ref_of(data).hash)

    def misbehave(node: Node, behaviour: str, after: int) -> None:
        async def instead(asked: Asked, request: Request) -> Body | None:
            if isinstance(asked, BlobChunkList):
                return stream_of(bytes(32 * 4)) if behaviour == "wrong list" else None
            if len(node.pieces_asked) <= after:
                return None
            match behaviour:
                case "wrong pieces" | "wrong list":
                    return stream_of(b"\x01" * asked.length)
                case "short":
                    return stream_of(bytes(asked.length - 1))
                case "refuses":
                    raise UnknownBlob("Not any more.")
            return None

        node.instead = instead

    play(scene())


# A part of a blob


def allocated(place: FilePath) -> int:
    """Bytes that files of a directory take on the disk: a hole takes none."""
    return sum(file.stat().st_blocks * 512 for file in place.rglob("*") if file.is_file())


def is_there(file: FilePath, data: bytes, pieces: set[int]) -> bool:
    """Whether a file is the blob's in these pieces, and empty in all others but for what the file system adds."""
    found = file.read_bytes()
    cuts = [(n, slice(n * CHUNK_BYTES, (n + 1) * CHUNK_BYTES)) for n in range(piece_count(len(data)))]
    return len(found) == len(data) and all(
        found[cut] == data[cut] if n in pieces else not any(found[cut]) for n, cut in cuts
    )


def test_a_part_comes_from_several_holders_and_nobody_takes_it_for_the_whole(tmp_path: FilePath) -> None:
    async def scene() -> None:
        async with World() as world:
            data, mib = noise(BIG), CHUNK_BYTES
            ref = ref_of(data)
            one, two, liar = holders = await world.holders(3, data)
            lies_first(liar, one, two)
            me = await world.node(disk=DirectoryDisk(tmp_path), capacity_bytes=6 << 20)
            ranges = ((0, 100), (3 * mib - 1, 4 * mib + 1), (6 * mib, 6 * mib + 5))
            pieces, seen = {0, 2, 3, 4, 6}, list[FetchProgress]()
            names = [node.holder for node in holders]
            report = await me.fetcher.fetch(ref, names, seen.append, owner="job", ranges=ranges)
            assert set(report.dropped) == {liar.id} and "wrong bytes for piece" in report.dropped[liar.id]
            assert set(report.bytes_by_peer) <= {one.id, two.id}
            assert sum(report.bytes_by_peer.values()) == 5 * mib
            assert (seen[-1].done_bytes, seen[-1].total_bytes) == (5 * mib, 5 * mib)
            assert {*one.pieces_asked, *two.pieces_asked, *liar.pieces_asked} == pieces
            file = me.store.part(ref, ranges)
            assert is_there(file, data, pieces)
            assert allocated(tmp_path) < 5 * mib + 64 * 1024 and me.store.used_bytes <= 5 * mib + 8192

            # It is not the whole, for nobody.
            assert not me.store.has(ref.hash) and me.store.holdings() == []
            with pytest.raises(UnknownBlob):
                me.store.path(ref.hash)
            with pytest.raises(UnknownBlob, match="That part of blob"):
                me.store.part(ref, ((mib, 2 * mib),))
            other = await world.node()
            with pytest.raises(FetchFailed, match="not held here"):
                await other.fetcher.fetch(ref, [me.holder])
            assert find_blob(tmp_path, ref.hash) is None

            # Room: a pin holds it, and with no pin it makes way.
            with pytest.raises(StorageFull, match=r"5\.0 MiB are pinned by job"):
                me.store.put(noise(2 << 20, 3))
            with pytest.raises(StorageFull):
                await me.fetcher.fetch(ref, names)
            assert me.store.part(ref, ranges) == file and is_there(file, data, pieces)
            again = await me.fetcher.fetch(ref, names, owner="job", ranges=ranges)
            assert (again.bytes_by_peer, again.resumed_bytes) == ({}, 5 * mib)
            me.store.release("job")
            me.store.put(noise(2 << 20, 3))
            assert not file.exists()
            with pytest.raises(UnknownBlob):
                me.store.part(ref, ranges)

    play(scene())


@pytest.mark.parametrize("together", [False, True])
def test_a_part_becomes_wider_and_the_whole_in_the_end(tmp_path: FilePath, together: bool) -> None:
    async def scene() -> None:
        async with World() as world:
            data, mib = noise(BIG), CHUNK_BYTES
            ref = ref_of(data)
            (holder,) = await world.holders(1, data)
            me = await world.node(disk=DirectoryDisk(tmp_path))
            first, wider = ((0, 2 * mib),), ((mib, 4 * mib), (9 * mib, BIG))
            fetches = [me.fetcher.fetch(ref, [holder.holder], owner="job", ranges=one) for one in (first, wider, ())]
            if together:
                await asyncio.gather(*fetches)
            else:
                await fetches[0]
                small = me.store.used_bytes
                with pytest.raises(FetchFailed, match="nobody is known"):
                    await me.fetcher.fetch(ref, [])
                assert me.store.used_bytes == small, "no room is kept for what does not come"
                mapped = me.store.part(ref, first).open("rb")
                assert is_there(me.store.part(ref, first), data, {0, 1})
                await fetches[1]
                assert small < me.store.used_bytes < ref.size
                assert is_there(me.store.part(ref, wider), data, {0, 1, 2, 3, 9})
                assert me.store.part(ref, first) == me.store.part(ref, wider)
                report = await fetches[2]
                assert report.resumed_bytes == 4 * mib + BIG - 9 * mib
                assert mapped.read() == data, "who has it open reads on"
            assert me.store.read(ref.hash) == data
            assert me.store.part(ref, wider) == me.store.path(ref.hash)
            assert sorted(holder.pieces_asked) == list(range(10)), "each piece once"
            assert not list((tmp_path / "partial").iterdir())
            assert (await me.fetcher.fetch(ref, [], ranges=wider)).bytes_by_peer == {}
            me.store.release("job")
            me.store.delete(ref.hash)
            assert me.store.used_bytes == 0

    play(scene())


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(
        st.lists(st.tuples(st.integers(0, BIG), st.integers(0, BIG)).map(lambda two: (min(two), max(two))), max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_any_parts_are_exactly_their_pieces(parts: list[list[tuple[int, int]]]) -> None:
    async def scene() -> None:
        async with World() as world:
            data = noise(BIG)
            ref = ref_of(data)
            (holder,) = await world.holders(1, data)
            me = await world.node()
            wanted = [joined(one) for one in parts]
            await asyncio.gather(*(me.fetcher.fetch(ref, [holder.holder], owner="job", ranges=one) for one in wanted))
            expected = set[int]().union(*(set(pieces_in(one, BIG)) for one in wanted))
            assert sorted(holder.pieces_asked) == sorted(expected), "each once, and no other"
            whole = any(pieces_in(one, BIG).complete for one in wanted)
            assert me.store.has(ref.hash) == whole
            name = f"{'blobs' if whole else 'partial'}/{ref.hash.hex()}"
            for piece in expected:
                cut = slice(piece * CHUNK_BYTES, (piece + 1) * CHUNK_BYTES)
                assert me.disk.read(name)[cut] == data[cut]

    play(scene())


def test_ranges_outside_of_a_blob_are_refused() -> None:
    async def scene() -> None:
        async with World() as world:
            me = await world.node()
            ref = ref_of(noise(BIG))
            for wrong in (((0, BIG + 1),), ((5, 5),), ((0, 10), (5, 20)), ((-1, 5),)):
                with pytest.raises(BadBlobRequest, match="ranges lie outside, or overlap"):
                    await me.fetcher.fetch(ref, [], ranges=wrong)

    play(scene())


def test_a_part_of_other_chunks_is_not_this_one(tmp_path: FilePath) -> None:
    async def scene() -> None:
        async with World() as world:
            data, other = noise(BIG), noise(BIG, 2)
            right, wrong = ref_of(data), ref_of(data, other)
            (liar,), (honest,) = await world.holders(1, other), await world.holders(1, data)

            async def as_if(asked: Asked, request: Request) -> Body:
                chunks = hash_pieces(cut(memoryview(other)))[1]
                start = asked.offset if isinstance(asked, BlobRead) else 0
                return stream_of(other[start:][: asked.length] if isinstance(asked, BlobRead) else chunks)

            liar.instead = as_if
            me = await world.node(disk=DirectoryDisk(tmp_path))
            part = ((0, CHUNK_BYTES),)
            await me.fetcher.fetch(wrong, [liar.holder], owner="a", ranges=part)
            with pytest.raises(UnknownBlob):
                me.store.part(right, part)
            await me.fetcher.fetch(right, [honest.holder], owner="b", ranges=part)
            assert me.store.part(right, part).read_bytes()[:CHUNK_BYTES] == data[:CHUNK_BYTES]
            with pytest.raises(UnknownBlob):
                me.store.part(wrong, part)

    play(scene())
