"""How fast a Link is, beside bare asyncio TLS with the same kind of certificate on the same loop, in the same run.

    python benchmarks/transport.py [--quick] [--save NAME]

A second process answers; both run on uvloop where it is installed. Bulk: one stream is read to its end, in turns with
one bare TLS connection that carries as many bytes; median and range over the repetitions. Small requests: 100 bytes
there and back, one at a time, on an idle link and while one stream of bulk flows in the same direction as the replies.
Prints a table, and last one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from results_form import figure, report

from shoal.identity import KeyPair
from shoal.transport import TlsEndpoint, parse_address, run
from shoal.transport.secure import certificate, client_context, server_context
from shoal.world import Link, Request

BLOCK = bytes(256 * 1024)
SMALL = bytes(100)
GOAL = 0.70
MIB = 1 << 20


# --- the answering process


async def serve() -> None:
    key = KeyPair.generate()
    endpoint = TlsEndpoint(key)

    async def echo(request: Request) -> bytes:
        return request.body

    async def bulk(request: Request) -> AsyncIterator[bytes]:
        async def flow() -> AsyncIterator[bytes]:
            for _ in range(int(request.body)):
                yield BLOCK

        return flow()

    endpoint.handle("echo", echo)
    endpoint.handle("bulk", bulk)

    async def bare(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        blocks = int(await reader.readline())
        if blocks:
            for _ in range(blocks):
                writer.write(BLOCK)
                await writer.drain()
        else:
            while True:
                try:
                    writer.write(await reader.readexactly(len(SMALL)))
                except asyncio.IncompleteReadError:
                    break
        writer.close()

    address = await endpoint.listen("tcp://127.0.0.1:0")
    server = await asyncio.start_server(bare, "127.0.0.1", 0, ssl=server_context(key, certificate(key)))
    print(key.node_id.hex(), address, server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the other process lets go
    server.close()
    await endpoint.close()


# --- the measuring process


async def link_bulk(link: Link, size: int) -> float:
    """Bytes per second of one stream."""
    received, began = 0, time.perf_counter()
    async with link.stream("bulk", str(size // len(BLOCK)).encode(), max_bytes=size) as chunks:
        async for chunk in chunks:
            received += len(chunk)
    if received != size:
        raise RuntimeError(f"{received} of {size} bytes arrived")
    return received / (time.perf_counter() - began)


async def bare_connection(port: int, blocks: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context())
    writer.write(b"%d\n" % blocks)
    return reader, writer


async def bare_bulk(port: int, size: int) -> float:
    """Bytes per second of one bare TLS connection."""
    reader, writer = await bare_connection(port, size // len(BLOCK))
    received, began = 0, time.perf_counter()
    while data := await reader.read(len(BLOCK)):
        received += len(data)
    elapsed = time.perf_counter() - began
    writer.close()
    if received != size:
        raise RuntimeError(f"{received} of {size} bytes arrived")
    return received / elapsed


async def round_trips(ask: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Seconds of each of `count` small requests, one after the other."""
    for _ in range(50):
        await ask()
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await ask()
        taken.append(time.perf_counter() - began)
    return taken


async def under_bulk(link: Link, count: int) -> tuple[list[float], float]:
    """Round trips while bulk flows on the same link, and the rate of that bulk."""
    received = 0

    async def pull() -> None:
        nonlocal received
        async with link.stream("bulk", b"100000000", max_bytes=1 << 50) as chunks:
            async for chunk in chunks:
                received += len(chunk)

    pulling = asyncio.ensure_future(pull())
    while received < 64 * MIB:
        await asyncio.sleep(0)
    began, before = time.perf_counter(), received
    taken = await round_trips(lambda: link.request("echo", SMALL), count)
    rate = (received - before) / (time.perf_counter() - began)
    pulling.cancel()
    await asyncio.wait({pulling})
    return taken, rate


async def dial_times(node: bytes, address: str, count: int) -> list[float]:
    """Seconds from `dial` to a usable link, TLS and proof included."""
    taken = []
    for _ in range(count):
        endpoint = TlsEndpoint(KeyPair.generate())
        began = time.perf_counter()
        await endpoint.dial(node, [address])
        taken.append(time.perf_counter() - began)
        await endpoint.close()
    return taken


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(quick: bool) -> list[dict[str, object]]:
    size, repetitions, count = (128 * MIB, 3, 1000) if quick else (512 * MIB, 7, 5000)
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        if child.stdout is None:
            raise RuntimeError("the answering process has no output")
        node_hex, address, port_text = (await child.stdout.readline()).decode().split()
        node, port = bytes.fromhex(node_hex), int(port_text)
        parse_address(address)
        endpoint = TlsEndpoint(KeyPair.generate())
        link = await endpoint.dial(node, [address])
        await link_bulk(link, size // 4)
        await bare_bulk(port, size // 4)
        ours, bare = [], []
        for turn in range(repetitions):
            for which in ((0, 1), (1, 0))[turn % 2]:
                if which == 0:
                    ours.append(await link_bulk(link, size))
                else:
                    bare.append(await bare_bulk(port, size))
        idle = await round_trips(lambda: link.request("echo", SMALL), count)
        busy, busy_rate = await under_bulk(link, count // 2)
        reader, writer = await bare_connection(port, 0)

        async def ask_bare() -> None:
            writer.write(SMALL)
            await reader.readexactly(len(SMALL))

        bare_idle = await round_trips(ask_bare, count)
        writer.close()
        dials = await dial_times(node, address, 10 if quick else 50)
        await endpoint.close()
    finally:
        if child.stdin is not None:
            child.stdin.close()
        await child.wait()

    share = statistics.median(ours) / statistics.median(bare)
    print(f"{'':34}{'Link':>12}{'bare TLS':>12}")
    print(f"{'bulk, median, MB/s':34}{statistics.median(ours) / 1e6:12.0f}{statistics.median(bare) / 1e6:12.0f}")
    print(
        f"{'bulk, range, MB/s':34}{f'{min(ours) / 1e6:.0f}-{max(ours) / 1e6:.0f}':>12}"
        f"{f'{min(bare) / 1e6:.0f}-{max(bare) / 1e6:.0f}':>12}"
    )
    for name, at in (("p50", 0.5), ("p99", 0.99)):
        beside = quantile(bare_idle, at) * 1e6
        print(f"{f'small request, idle, {name}, us':34}{quantile(idle, at) * 1e6:12.0f}{beside:12.0f}")
    for name, at in (("p50", 0.5), ("p99", 0.99)):
        print(f"{f'small request under bulk, {name}, us':34}{quantile(busy, at) * 1e6:12.0f}")
    print(f"{'bulk beside small requests, MB/s':34}{busy_rate / 1e6:12.0f}")
    print(f"{'dial, median, ms':34}{statistics.median(dials) * 1e3:12.2f}")

    compared = "bare asyncio TLS streams in the same run, same certificate kind, same loop"
    return [
        figure("bulk_over_link", round(statistics.median(ours) / 1e6, 1), "MB/s", compared_with=compared),
        figure("bulk_over_link_min", round(min(ours) / 1e6, 1), "MB/s"),
        figure("bulk_over_link_max", round(max(ours) / 1e6, 1), "MB/s"),
        figure("bulk_over_bare_tls", round(statistics.median(bare) / 1e6, 1), "MB/s"),
        figure("bulk_over_bare_tls_min", round(min(bare) / 1e6, 1), "MB/s"),
        figure("bulk_over_bare_tls_max", round(max(bare) / 1e6, 1), "MB/s"),
        figure("bulk_share_of_bare_tls", round(share * 100, 1), "%", "at least 70 %", share >= GOAL, compared),
        figure("small_request_idle_p50", round(quantile(idle, 0.5) * 1e6, 1), "us", compared_with=compared),
        figure("small_request_idle_p99", round(quantile(idle, 0.99) * 1e6, 1), "us", compared_with=compared),
        figure("bare_tls_round_trip_p50", round(quantile(bare_idle, 0.5) * 1e6, 1), "us"),
        figure("bare_tls_round_trip_p99", round(quantile(bare_idle, 0.99) * 1e6, 1), "us"),
        figure("small_request_under_bulk_p50", round(quantile(busy, 0.5) * 1e6, 1), "us"),
        figure("small_request_under_bulk_p99", round(quantile(busy, 0.99) * 1e6, 1), "us"),
        figure("bulk_beside_small_requests", round(busy_rate / 1e6, 1), "MB/s"),
        figure("dial_median", round(statistics.median(dials) * 1e3, 2), "ms"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure Links beside bare asyncio TLS.")
    parser.add_argument("--quick", action="store_true", help="fewer bytes and repetitions")
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        run(serve())
        return
    report(run(measure(options.quick)), save_as=options.save)


if __name__ == "__main__":
    main()
