"""A peer that stalls, truncates or floods costs its own connection and nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from transport_peers import answering, key, node, own_certificate, play, proved, read_to_end, self_of, server

from shoal.transport import EndpointLimits, Limits, TlsEndpoint, pipe
from shoal.transport.frames import CREDIT, HEADER, SMALL_BYTES, FrameType, Opening, frame, pack_opening
from shoal.transport.handshake import HelloStream, accept, examine
from shoal.transport.streams import ByteStream, SocketStream
from shoal.world import HeldClock, LinkLost, Refused, ReplyTooLarge, Request, SystemDice

LIMITS = EndpointLimits(connection=Limits(requests=4, bulk=2, large_bodies=1))


def opening(stream: int, kind: str = "echo", body: bytes = b"", announced: int | None = None) -> bytes:
    size = len(body) if announced is None else announced
    return frame(FrameType.OPEN, stream, pack_opening(Opening(kind, 1 << 20, 1 << 20, size), body[:SMALL_BYTES]))


BROKEN: dict[str, tuple[bytes, str]] = {
    "an unknown type": (HEADER.pack(77, 0, 0), "unknown type 77"),
    "a frame of a gigabyte": (HEADER.pack(FrameType.DATA, 1, 1 << 30), "DATA frame of 1073741824 bytes"),
    "a reply to nothing": (frame(FrameType.DATA, 2, b"x"), "stream 2, which is not open"),
    "an end of nothing": (frame(FrameType.END, 2), "stream 2, which is not open"),
    "a refusal of nothing": (frame(FrameType.REFUSE, 2, b"\x00"), "stream 2, which is not open"),
    "a stream of the other side's numbers": (opening(2), "opened stream 2 out of order"),
    "a stream twice": (opening(1, "hold") + opening(1, "hold"), "opened stream 1 out of order"),
    "a stream from the past": (opening(9) + opening(7), "opened stream 7 out of order"),
    "a kind of control characters": (opening(1, "\x1b[2J"), "not printable"),
    "a request body beyond all limits": (opening(1, body=bytes(SMALL_BYTES), announced=1 << 30), "1073741824 bytes"),
    "less of a body than announced": (opening(1, body=b"abc", announced=5), "with 3 of 5 body bytes"),
    "more of a body than announced": (
        opening(1, "hold", bytes(SMALL_BYTES), SMALL_BYTES + 5) + frame(FrameType.BODY, 1, bytes(6)),
        "longer request body than announced",
    ),
    "a body for a small request": (opening(1, "hold", b"") + frame(FrameType.BODY, 1, b"x"), "longer request body"),
    "a body for nothing": (frame(FrameType.BODY, 1, b"x"), "stream 1, which is not open"),
    "too many requests": (b"".join(opening(n, "hold") for n in range(1, 15, 2)), "more than 6 requests at once"),
    "too many large bodies": (
        b"".join(opening(n, "hold", bytes(SMALL_BYTES), SMALL_BYTES + 5) for n in (1, 3)),
        "more than 1 requests with large bodies",
    ),
    "a pong without a ping": (frame(FrameType.PONG, 0, bytes(8)), "ping that was not sent"),
    "a ping inside a stream": (frame(FrameType.PING, 5, bytes(8)), "PING frame on stream 5"),
    "a request outside of streams": (opening(0), "OPEN frame on stream 0"),
    "half a credit": (HEADER.pack(FrameType.CREDIT, 1, 2) + b"\0\0", "CREDIT frame of 2 bytes"),
    "noise": (b"\x9a\x01\x7f" * 2000, "unknown type"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_framing_costs_one_connection(case: str, caplog: pytest.LogCaptureFixture) -> None:
    data, why = BROKEN[case]

    async def scene() -> None:
        async with node(1, limits=LIMITS) as (hub, address), node(3) as (honest, _):
            hub.handle("hold", _hold)
            link = await honest.dial(hub.node_id, [address])
            stream = await proved(address, self_of(key(2)))
            theirs = hub.links()[key(2).node_id]
            await stream.write(data)
            said = await read_to_end(stream)
            assert why in await theirs.wait_closed()
            assert why.encode() in said, "the peer is told why"
            assert await link.request("echo", b"untouched") == b"untouched"
            assert set(hub.links()) == {honest.node_id}
            assert hub._budget.left_bytes == hub._limits.large_bodies_bytes

    with caplog.at_level(logging.CRITICAL, logger="shoal.transport"):
        play(scene)


def test_frames_that_a_correct_peer_may_send_late_are_no_offence() -> None:
    """Credit, body or cancellation may cross with the end of a stream."""

    async def scene() -> None:
        async with node(1) as (hub, address):
            stream = await proved(address, self_of(key(2)))
            late = (
                frame(FrameType.CREDIT, 1, CREDIT.pack(5))
                + frame(FrameType.BODY, 1, b"late")
                + frame(FrameType.CANCEL, 1)
                + frame(FrameType.CANCEL, 1)
                + frame(FrameType.RETIRE, 0)
            )
            await stream.write(opening(1, "nothing"))
            while b"does not answer" not in await stream.read():
                pass
            await stream.write(late + opening(3, "echo", b"still here"))
            while b"still here" not in await stream.read():
                pass
            assert not hub.links()[key(2).node_id].closed
            stream.close()

    play(scene)


def test_a_peer_that_asks_and_never_reads_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with node(1, clock=clock, limits=LIMITS) as (hub, address), node(3, clock=clock) as (honest, _):
            link = await honest.dial(hub.node_id, [address])
            stream = await proved(address, self_of(key(2)))
            theirs = hub.links()[key(2).node_id]

            connection = theirs._current
            assert connection is not None

            async def flood() -> None:
                request = 1
                while True:
                    await stream.write(opening(request, "echo", bytes(SMALL_BYTES)))
                    while connection._last_peer_id < request and not connection.is_down:
                        await asyncio.sleep(0)  # never more under way than a correct caller has
                    request += 2

            with pytest.raises(OSError):
                await _both(flood(), _advance_until(clock, lambda: "Closing the connection" in caplog.text))
            assert "more than 6 requests at once" in await theirs.wait_closed()
            assert await link.request("echo", b"untouched") == b"untouched"

    with caplog.at_level(logging.WARNING, logger="shoal.transport"):
        play(scene)


def test_large_requests_that_fill_the_node_are_refused_one_by_one() -> None:
    async def scene() -> None:
        limits = EndpointLimits(large_bodies_bytes=100_000)
        async with node(1, limits=limits) as (hub, address), node(2) as (one, _), node(3) as (other, _):
            hub.handle("hold", _hold)
            first = await one.dial(hub.node_id, [address])
            second = await other.dial(hub.node_id, [address])
            holding = asyncio.ensure_future(first.request("hold", bytes(90_000)))
            while hub._budget.left_bytes == 100_000:
                await second.request("echo", b"")
            with pytest.raises(Refused, match="too many large requests"):
                await second.request("echo", bytes(20_000))
            assert await second.request("echo", bytes(SMALL_BYTES)) == bytes(SMALL_BYTES)
            holding.cancel()
            while hub._budget.left_bytes < 100_000:
                await second.request("echo", b"")
            assert await second.request("echo", bytes(60_000)) == bytes(60_000)

    play(scene)


@pytest.mark.parametrize("newest", ["dies", "stays mute", "answers"])
def test_a_link_goes_over_to_a_newer_connection_only_when_that_answers(newest: str) -> None:
    """A caller that tries two addresses of one node may give up the second when the first is up."""

    async def scene() -> None:
        clock = HeldClock()
        async with node(1, clock=clock) as (hub, address):
            caller = self_of(key(2))
            first = await proved(address, caller, attempt=1)
            link = hub.links()[key(2).node_id]
            second = await proved(address, caller, attempt=2)
            kept = first
            if newest == "dies":
                second.close()
            elif newest == "stays mute":
                for _ in range(30):
                    await asyncio.sleep(0)
                await clock.advance(3.1)
                assert await read_to_end(second) != b""
            else:
                kept = second
                await second.write(frame(FrameType.PONG, 0, (await second.read())[HEADER.size :]))
                while HEADER.pack(FrameType.RETIRE, 0, 0) not in await first.read():
                    pass
            asking = asyncio.ensure_future(link.request("any", b"are you there"))
            number = await _until_open(kept)
            await kept.write(frame(FrameType.END, number, b"yes"))
            assert await asking == b"yes"
            assert hub.links() == {key(2).node_id: link} and not link.closed

    play(scene)


# --- a malicious answerer


async def _against(
    answer: Callable[[ByteStream], Awaitable[None]], scene: Callable[[TlsEndpoint, str], Awaitable[None]]
) -> None:
    """A caller whose peer proves its identity and then does as `answer` says."""

    async def serve(under: SocketStream) -> None:
        stream = HelloStream(await answering(under, key(2)))
        await examine(stream, self_of(key(2)), own_certificate(key(2)), SystemDice())
        await accept(stream)
        await answer(stream.over())

    async with server(serve) as address, node(1) as (caller, _):
        await scene(caller, address)


async def _until_open(stream: ByteStream) -> int:
    """Read until a request comes; its stream."""
    got = b""
    while True:
        got += await stream.read()
        rest = got
        while len(rest) >= HEADER.size:
            kind, number, length = HEADER.unpack_from(rest)
            if kind == FrameType.OPEN:
                return int(number)
            rest = rest[HEADER.size + length :]


@pytest.mark.parametrize(
    ("reply", "error", "survives"),
    [
        (lambda n: frame(FrameType.DATA, n, bytes(2000)), ReplyTooLarge, True),
        (lambda n: frame(FrameType.END, n, bytes(2000)), ReplyTooLarge, True),
        (lambda n: frame(FrameType.DATA, n, bytes(600)) * 2, ReplyTooLarge, True),
        (lambda n: frame(FrameType.DATA, n, bytes(2000)) * 2, ReplyTooLarge, False),
        (lambda n: frame(FrameType.DATA, n + 2, b"x"), LinkLost, False),
        (lambda n: frame(FrameType.REFUSE, n, b"\x05SH-42no \x1b[31mway"), Refused, True),
        (lambda n: frame(FrameType.REFUSE, n, b"\xff\xff\xfe"), Refused, True),
        (lambda n: frame(FrameType.END, n, b"a") + frame(FrameType.END, n, b"b"), None, False),
        (lambda n: HEADER.pack(FrameType.END, n, 1 << 20), LinkLost, False),
    ],
)
def test_a_reply_out_of_order_harms_its_own_request_or_link(
    reply: Callable[[int], bytes], error: type[Exception] | None, survives: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(stream: ByteStream) -> None:
        await stream.write(reply(await _until_open(stream)))
        await read_to_end(stream)

    async def scene(caller: TlsEndpoint, address: str) -> None:
        link = await caller.dial(key(2).node_id, [address])
        try:
            assert await link.request("any", b"", reply_max_bytes=1000) == b"a" and error is None
        except (ReplyTooLarge, LinkLost, Refused) as caught:
            assert error is not None and isinstance(caught, error)
            assert str(caught).isprintable()
        if not survives:
            await link.wait_closed()
        else:
            for _ in range(50):
                await asyncio.sleep(0)
        assert link.closed != survives

    with caplog.at_level(logging.CRITICAL, logger="shoal.transport"):
        play(lambda: _against(answer, scene))


def test_bulk_beyond_its_credit_ends_the_link(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(stream: ByteStream) -> None:
        number = await _until_open(stream)
        try:
            while True:
                await stream.write(frame(FrameType.DATA, number, bytes(100_000)))
        except OSError:
            pass

    async def scene(caller: TlsEndpoint, address: str) -> None:
        link = await caller.dial(key(2).node_id, [address])
        with pytest.raises(LinkLost, match="more of a reply than it had credit for"):
            async with link.stream("any", b"", max_bytes=1 << 40) as chunks:
                await anext(chunks)
                await asyncio.wait({asyncio.ensure_future(link.wait_closed())})  # reads nothing meanwhile
                async for _ in chunks:
                    pass

    with caplog.at_level(logging.CRITICAL, logger="shoal.transport"):
        play(lambda: _against(answer, scene))


def test_a_stream_of_single_bytes_is_kept_together() -> None:
    async def answer(stream: ByteStream) -> None:
        number = await _until_open(stream)
        for _ in range(20):
            await stream.write(frame(FrameType.DATA, number, b"x") * 1000)
        await stream.write(frame(FrameType.END, number))
        await read_to_end(stream)

    async def scene(caller: TlsEndpoint, address: str) -> None:
        link = await caller.dial(key(2).node_id, [address])
        async with link.stream("any", b"", max_bytes=1 << 40) as chunks:
            first = await anext(chunks)
            call = next(iter(link._current._calls.values()))
            while not call.ended:
                await asyncio.sleep(0)
            assert len(call.chunks) <= 6
            assert first + b"".join([chunk async for chunk in chunks]) == b"x" * 20_000

    play(lambda: _against(answer, scene))


@pytest.mark.parametrize("size", [5, HEADER.size, HEADER.size + 400])
def test_a_reply_cut_off_midway_is_a_lost_link(size: int) -> None:
    async def answer(stream: ByteStream) -> None:
        number = await _until_open(stream)
        await stream.write(frame(FrameType.END, number, bytes(1000))[:size])
        stream.close()

    async def scene(caller: TlsEndpoint, address: str) -> None:
        link = await caller.dial(key(2).node_id, [address])
        with pytest.raises(LinkLost, match="went down"):
            await link.request("any", b"")
        await link.wait_closed()
        assert not caller.links()

    play(lambda: _against(answer, scene))


# --- silence


async def _over_a_pipe(clock: HeldClock) -> tuple[TlsEndpoint, TlsEndpoint, tuple[object, object]]:
    hub, caller = TlsEndpoint(key(1), clock=clock), TlsEndpoint(key(2), clock=clock)
    ends = pipe(clock)
    await asyncio.gather(caller.dial_over(ends[0], hub.node_id), hub.accept_over(ends[1]))
    return hub, caller, ends


def test_a_silent_peer_is_noticed_and_a_quiet_one_is_kept() -> None:
    async def scene() -> None:
        clock = HeldClock()
        hub, caller, (near, far) = await _over_a_pipe(clock)
        link, back = caller.links()[hub.node_id], hub.links()[caller.node_id]
        for _ in range(200):
            await clock.advance(1)
        assert not link.closed and not back.closed, "an idle link stays up"
        near.silence()  # type: ignore[attr-defined]
        far.silence()  # type: ignore[attr-defined]
        asking = asyncio.ensure_future(link.request("any", b"", deadline_s=300))
        for _ in range(29):
            await clock.advance(1)
        assert not link.closed
        for _ in range(3):
            await clock.advance(1)
        with pytest.raises(LinkLost, match="silent for 30 s"):
            await asking
        assert "silent" in await back.wait_closed()
        await hub.close()
        await caller.close()

    play(scene)


def test_a_process_that_stood_still_does_not_blame_its_peers() -> None:
    async def scene() -> None:
        clock = HeldClock()
        hub, caller, _ = await _over_a_pipe(clock)
        link = caller.links()[hub.node_id]
        clock._elapsed_s += 120  # nothing ran for two minutes
        for _ in range(40):
            await clock.advance(1)
        assert not link.closed
        await hub.close()
        await caller.close()

    play(scene)


def test_a_peer_that_takes_no_bytes_is_given_up() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with node(1, clock=clock) as (hub, address):

            async def fountain(request: Request) -> AsyncIterator[bytes]:
                async def flow() -> AsyncIterator[bytes]:
                    while True:
                        yield bytes(100_000)

                return flow()

            hub.handle("fountain", fountain)
            stream = await proved(address, self_of(key(2)))
            theirs = hub.links()[key(2).node_id]
            await stream.write(frame(FrameType.OPEN, 1, pack_opening(Opening("fountain", 1 << 40, 0xFFFFFFFF, 0), b"")))
            connection = theirs._current
            assert connection is not None

            async def blocked() -> None:
                seen = -1
                while connection._write_began is None or connection.bytes_sent != seen:
                    seen = connection.bytes_sent
                    for _ in range(200):
                        await asyncio.sleep(0)

            await blocked()
            for _ in range(45):
                await stream.write(frame(FrameType.PING, 0, bytes(8)))  # it is there, but reads nothing
                for _ in range(50):
                    await asyncio.sleep(0)
                await clock.advance(1)
                if theirs.closed:
                    break
            assert "took no bytes for 30 s" in await theirs.wait_closed()

    play(scene)


def test_a_reader_that_never_gives_credit_does_not_hold_a_handler_for_ever() -> None:
    async def scene() -> None:
        clock = HeldClock()
        over = asyncio.Event()
        limits = EndpointLimits(connection=Limits(ping_s=1000, silence_s=2000))
        async with (
            node(1, clock=clock, limits=limits) as (hub, address),
            node(2, clock=clock, limits=limits) as (one, _),
        ):

            async def fountain(request: Request) -> AsyncIterator[bytes]:
                async def flow() -> AsyncIterator[bytes]:
                    try:
                        while True:
                            yield bytes(100_000)
                    finally:
                        over.set()

                return flow()

            hub.handle("fountain", fountain)
            link = await one.dial(hub.node_id, [address])
            async with link.stream("fountain", b"", max_bytes=1 << 40) as chunks:
                await anext(chunks)
                for _ in range(100):
                    await link.request("echo", b"")
                await clock.advance(250)
                await link.request("echo", b"")
                assert not over.is_set()
                await clock.advance(60)
                await over.wait()
                with pytest.raises(Refused, match="was not read for 300 s"):
                    async for _ in chunks:
                        pass
            assert await link.request("echo", b"on") == b"on"

    play(scene)


def asking(stream: int, kind: str, credit: int) -> bytes:
    """A request for a reply of any size, of which `credit` bytes are taken at first."""
    return frame(FrameType.OPEN, stream, pack_opening(Opening(kind, 1 << 30, credit, 0), b""))


def test_replies_that_nobody_takes_are_bounded_and_who_left_most_of_them_goes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene() -> None:
        size, room = 100_000, 1_000_000
        async with (
            node(1, limits=EndpointLimits(replies_bytes=room)) as (hub, address),
            node(3) as (honest, _),
        ):

            async def large(request: Request) -> bytes:
                return bytes(size)

            async def endless(request: Request) -> AsyncIterator[bytes]:
                async def flow() -> AsyncIterator[bytes]:
                    while True:
                        yield bytes(size)

                return flow()

            hub.handle("large", large)
            hub.handle("endless", endless)
            link = await honest.dial(hub.node_id, [address])
            modest = await proved(address, self_of(key(4)))
            await modest.write(asking(1, "large", size - 1))  # a chunk is held until its last byte has left
            greedy = await proved(address, self_of(key(2)))
            theirs = hub.links()[key(2).node_id]
            await greedy.write(b"".join(asking(number, "endless", 0) for number in (1, 3)))
            for number in range(5, 1000, 2):
                if theirs.closed:
                    break
                await greedy.write(asking(number, "large", 0))
                assert await link.request("large", b"", reply_max_bytes=size) == bytes(size)
                assert hub._replies.bytes <= room + size
            assert "bytes of replies unread" in await theirs.wait_closed()
            assert b"bytes of replies unread" in await read_to_end(greedy), "the peer is told why"
            assert not hub.links()[key(4).node_id].closed and not link.closed
            modest.close()
            while hub._replies.bytes:
                await link.request("echo", b"")
            assert await link.request("large", b"", reply_max_bytes=size) == bytes(size)

    with caplog.at_level(logging.CRITICAL, logger="shoal.transport"):
        play(scene)


def test_a_reply_waits_less_long_for_its_reader_while_room_is_scarce() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with node(1, clock=clock, limits=EndpointLimits(replies_bytes=100_000)) as (hub, address):

            async def large(request: Request) -> bytes:
                return bytes(30_000)

            hub.handle("large", large)
            stream = await proved(address, self_of(key(2)))
            connection = hub.links()[key(2).node_id]._current
            assert connection is not None

            async def wait(seconds: int) -> None:
                for _ in range(seconds):
                    await stream.write(frame(FrameType.PING, 0, bytes(8)))  # it is there, but takes no reply
                    for _ in range(50):
                        await asyncio.sleep(0)
                    await clock.advance(1)

            await stream.write(asking(1, "large", 0))
            await wait(40)
            assert len(connection._answers) == 1
            await stream.write(asking(3, "large", 0))
            for _ in range(50):
                await asyncio.sleep(0)
            assert hub._replies.bytes == 60_000
            await wait(30)
            assert set(connection._answers) == {3}, "when room is there again, it is not hurried any more"

    play(scene)


async def _hold(request: Request) -> bytes:
    await asyncio.Event().wait()
    return b""


async def _both(first: Awaitable[None], second: Awaitable[None]) -> None:
    await asyncio.gather(first, second)


async def _advance_until(clock: HeldClock, found: Callable[[], bool]) -> None:
    while not found():
        await asyncio.sleep(0)
    for _ in range(30):
        await asyncio.sleep(0)
    await clock.advance(1.1)
