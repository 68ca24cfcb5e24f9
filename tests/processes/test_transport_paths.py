"""Slow and distant paths, in held time: what bulk does to small requests, and windows to throughput."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import pytest
from transport_peers import echo, key, play

from shoal.transport import MemoryNetwork, Path
from shoal.world import DeadlineExceeded, HeldClock, Link, Request, SeededDice, Unreachable

T = TypeVar("T")


async def drive(clock: HeldClock, work: Awaitable[T], step_s: float = 0.001) -> T:
    """Move the clock on until `work` is done."""
    task = asyncio.ensure_future(work)
    while not task.done():
        for _ in range(30):
            await asyncio.sleep(0)
        if not task.done():
            await clock.advance(step_s)
    return task.result()


async def _endless(request: Request) -> AsyncIterator[bytes]:
    async def flow() -> AsyncIterator[bytes]:
        while True:
            yield bytes(256 * 1024)

    return flow()


async def _pair(clock: HeldClock, path: Path) -> tuple[MemoryNetwork, Link]:
    memory = MemoryNetwork(clock, dice=SeededDice(7), path=path)
    hub, node = memory.endpoint(key(1)), memory.endpoint(key(2))
    for endpoint in (hub, node):
        endpoint.handle("echo", echo)
        endpoint.handle("endless", _endless)
    address = await hub.listen("tcp://hub:0")
    return memory, await drive(clock, node.dial(hub.node_id, [address]))


@pytest.mark.parametrize(
    ("rate_bps", "delay_s", "streams"), [(1e6, 0.050, 1), (5e6, 0.075, 1), (20e6, 0.040, 4), (200e6, 0.005, 2)]
)
def test_a_small_request_waits_little_behind_bulk_and_bulk_fills_the_path(
    rate_bps: float, delay_s: float, streams: int
) -> None:
    async def scene() -> None:
        clock = HeldClock()
        _, link = await _pair(clock, Path(delay_s, rate_bps))
        received = [0] * streams

        async def pull(number: int) -> None:
            async with link.stream("endless", b"", max_bytes=1 << 40) as chunks:
                async for chunk in chunks:
                    received[number] += len(chunk)

        async def ask() -> tuple[list[float], float]:
            pulling = [asyncio.ensure_future(pull(number)) for number in range(streams)]
            await clock.sleep(1.0)  # let the frame size follow the rate
            began, before, waited = clock.monotonic(), sum(received), []
            for _ in range(20):
                asked = clock.monotonic()
                assert await link.request("echo", bytes(100)) == bytes(100)
                waited.append(clock.monotonic() - asked)
                await clock.sleep(0.05)
            rate = (sum(received) - before) * 8 / (clock.monotonic() - began)
            for task in pulling:
                task.cancel()
            return waited, rate

        waited, rate = await drive(clock, ask())
        undisturbed = 2 * delay_s
        smallest_frames = 2 * 4096 * 8 / rate_bps  # one in the process, one below it
        assert max(waited) <= undisturbed + max(0.035, 1.6 * smallest_frames)
        assert rate >= 0.9 * rate_bps
        assert min(received) >= 0.7 * max(received), "streams take turns"
        measured = link.stats()
        assert measured.rate_bps is not None and 0.8 * rate_bps <= measured.rate_bps <= 1.1 * rate_bps
        assert measured.round_trip_ms is not None
        assert undisturbed * 1000 <= measured.round_trip_ms <= max(waited) * 1000 + 1
        await link.close()

    play(scene)


def test_a_window_grows_until_a_long_fast_path_is_full() -> None:
    """400 Mbit/s at 100 ms there and back is 5 MB under way, five times the window that a stream starts with."""

    async def scene() -> None:
        clock = HeldClock()
        _, link = await _pair(clock, Path(0.050, 400e6))

        async def rate() -> float:
            received, marks = 0, []
            async with link.stream("endless", b"", max_bytes=1 << 40) as chunks:
                async for chunk in chunks:
                    received += len(chunk)
                    now = clock.monotonic()
                    if now > 3 or (not marks and now > 2):
                        marks.append((now, received))
                    if now > 3:
                        break
            (began, before), (ended, after) = marks[0], marks[-1]
            return (after - before) * 8 / (ended - began)

        assert await drive(clock, rate()) >= 0.85 * 400e6
        await link.close()

    play(scene)


def test_cut_and_silent_paths_in_a_world_of_pipes() -> None:
    async def scene() -> None:
        clock = HeldClock()
        memory, link = await _pair(clock, Path(0.01))
        hub, node = key(1).node_id, key(2).node_id
        assert await drive(clock, link.request("echo", b"1")) == b"1"
        memory.cut(hub, node)
        await drive(clock, link.wait_closed())
        caller = memory.endpoint(key(3))
        link = await drive(clock, caller.dial(hub, ["tcp://hub:1"]))
        assert await drive(clock, link.request("echo", b"2")) == b"2", "others are not concerned"
        memory.silence(hub, key(3).node_id)
        assert "silent for 30 s" in await drive(clock, link.wait_closed(), step_s=1.0)
        with pytest.raises(Unreachable):
            await drive(clock, caller.dial(hub, ["tcp://hub:1"]))
        memory.heal(hub, key(3).node_id)
        link = await drive(clock, caller.dial(hub, ["tcp://hub:1"]))
        assert await drive(clock, link.request("echo", b"3")) == b"3"
        await link.close()

    play(scene)


@pytest.mark.parametrize("dialled", [True, False])
@pytest.mark.parametrize("outage_s", [3.0, 20.0])
def test_a_link_outlives_an_outage_on_a_connection_made_anew(outage_s: float, dialled: bool) -> None:
    """The old connection never hears of it when the path is back; it does not matter who had dialled."""

    async def scene() -> None:
        clock = HeldClock()
        memory, link = await _pair(clock, Path(0.01))
        hub, node = key(1).node_id, key(2).node_id
        if not dialled:
            there = memory._listening["tcp://hub:1"]
            here = link._endpoint  # type: ignore[attr-defined]
            link = await there.dial(node, [await here.listen("tcp://node:0")])
        memory.silence(hub, node)
        with pytest.raises(DeadlineExceeded):
            await drive(clock, link.request("echo", b"lost", deadline_s=outage_s), step_s=0.05)
        memory.heal(hub, node)
        lasted_from = clock.monotonic()
        while True:
            try:
                assert await drive(clock, link.request("echo", b"here", deadline_s=0.5), step_s=0.01) == b"here"
            except DeadlineExceeded:
                continue
            break
        assert clock.monotonic() - lasted_from < 5
        await drive(clock, clock.sleep(60), step_s=0.5)
        assert not link.closed, "the end of the old connection is not the end of the link"
        assert await drive(clock, link.request("echo", b"still", deadline_s=0.5), step_s=0.01) == b"still"
        await link.close()

    play(scene)


def test_an_idle_link_is_not_dialled_again() -> None:
    async def scene() -> None:
        clock = HeldClock()
        memory, link = await _pair(clock, Path(0.01))
        ends = memory._pipes[frozenset((key(1).node_id, key(2).node_id))]
        await drive(clock, clock.sleep(200), step_s=0.5)
        assert await drive(clock, link.request("echo", b"1")) == b"1"
        assert len(ends) == 2
        await link.close()

    play(scene)


def test_a_machine_that_lost_power_is_welcome_again_before_its_old_link_is_given_up() -> None:
    """Its old link does not answer, so the newcomer with the same key is the same node, started again."""

    async def scene() -> None:
        clock = HeldClock()
        memory, _ = await _pair(clock, Path(0.01))
        hub, node = key(1).node_id, key(2).node_id
        memory.silence(hub, node)
        memory.heal(hub, node)
        again = memory.endpoint(key(2))
        link = await drive(clock, again.dial(hub, ["tcp://hub:1"]), step_s=0.05)
        assert await drive(clock, link.request("echo", b"back")) == b"back"
        assert clock.monotonic() < 10, "it did not have to wait for the old link's silence to be noticed"
        await link.close()

    play(scene)


def test_a_world_of_pipes_runs_the_same_way_twice() -> None:
    def run() -> list[tuple[float, int]]:
        story: list[tuple[float, int]] = []

        async def scene() -> None:
            clock = HeldClock()
            _, link = await _pair(clock, Path(0.02, 10e6))

            async def mixed() -> None:
                async with link.stream("endless", b"", max_bytes=1 << 40) as chunks:
                    async for chunk in chunks:
                        story.append((clock.monotonic(), len(chunk)))
                        await link.request("echo", bytes(len(story)))
                        story.append((clock.monotonic(), -len(story)))
                        if len(story) > 60:
                            return

            await drive(clock, mixed())
            await link.close()

        play(scene)
        return story

    assert run() == run()
