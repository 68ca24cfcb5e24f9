"""`kill -9` of a process that puts or fetches blobs: what is left is whole, and what was under way goes on."""

import asyncio
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from blob_world import World, noise, play, ref_of

from shoal.protocol.blobs import CHUNK_BYTES
from shoal.storage import BlobStore
from shoal.world import SystemClock

KILLING_DISK = """
    import asyncio, os, pathlib, random, signal, sys
    from shoal.identity import KeyPair
    from shoal.protocol.blobs import BlobHolder, BlobRef
    from shoal.storage import BlobStore, Fetcher
    from shoal.transport import TlsEndpoint
    from shoal.world import DirectoryDisk, FaultyDisk, SystemClock, SystemDice

    root, kill_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    steps = 0

    def fault(operation, name):
        global steps
        steps += 1
        if steps >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    store = BlobStore(FaultyDisk(DirectoryDisk(root), fault), 1 << 30, SystemClock())
"""

PUTTING = (
    KILLING_DISK
    + """
    dice = random.Random(int(sys.argv[3]))
    while True:
        data = dice.randbytes(dice.choice([0, 10, 5000, 1 << 20, (2 << 20) + 77]))
        ref = store.put(data)
        store.pin("job", ref.hash)
        print(ref.hash.hex(), flush=True)
"""
)

FETCHING = (
    KILLING_DISK
    + """
    hash, chunks, size, node, address, stop = sys.argv[3:9]
    ranges = ((1, int(stop)),) if int(stop) else ()
    ref = BlobRef(hash=bytes.fromhex(hash), size=int(size), chunks=bytes.fromhex(chunks))

    async def main():
        endpoint = TlsEndpoint(KeyPair.generate())
        fetcher = Fetcher(endpoint, store, SystemClock(), SystemDice())
        report = await fetcher.fetch(ref, [BlobHolder(node=bytes.fromhex(node), addresses=(address,))], ranges=ranges)
        print(report.resumed_bytes, sum(report.bytes_by_peer.values()), flush=True)
        await endpoint.close()

    asyncio.run(main())
"""
)


def test_puts_that_are_killed_leave_whole_blobs_and_all_that_were_acknowledged(tmp_path: Path) -> None:
    dice, acknowledged = random.Random(5), set[str]()
    for run in range(12):
        kill_at = dice.randrange(1, 60)
        command = [sys.executable, "-c", textwrap.dedent(PUTTING), str(tmp_path), str(kill_at), str(run)]
        killed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        acknowledged |= set(killed.stdout.split())
        store = BlobStore(tmp_path, 1 << 30, SystemClock())
        held = store.holdings()
        assert {holding.hash.hex() for holding in held} >= acknowledged
        assert {hash.hex() for hash in store.pins("job")} >= acknowledged
        for holding in held:
            store.verify(holding.hash)
        assert not list((tmp_path / "scratch").iterdir())
        store.close()
    assert len(acknowledged) > 10, "the loop got somewhere between its deaths"


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("size", "stop"), [(8 * CHUNK_BYTES + 5, 0), (12 * CHUNK_BYTES + 5, 9 * CHUNK_BYTES)], ids=["whole", "part"]
)
def test_a_fetch_that_is_killed_again_and_again_gets_there_without_starting_over(
    tmp_path: Path, size: int, stop: int
) -> None:
    async def scene() -> None:
        async with World("tls") as world:
            data = noise(size)
            (holder,) = await world.holders(1, data)
            ref = ref_of(data)
            assert ref.chunks is not None
            where = [holder.id.hex(), holder.endpoint.addresses[0]]
            names = [ref.hash.hex(), ref.chunks.hex(), str(ref.size), *where, str(stop)]
            deaths, resumed = 0, 0
            for attempt in range(20):
                # A start takes a handful of steps and a piece four, so every life but the last ends half-way.
                kill_at = 30 + attempt
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", textwrap.dedent(FETCHING), str(tmp_path), str(kill_at), *names,
                    stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                )  # fmt: skip
                out, err = await process.communicate()
                if process.returncode == 0:
                    resumed, fetched = map(int, out.split())
                    assert resumed + fetched == (stop or ref.size)
                    break
                assert process.returncode == -signal.SIGKILL, err.decode()
                deaths += 1
                store = BlobStore(tmp_path, 1 << 30, SystemClock())
                if store.has(ref.hash):
                    store.verify(ref.hash)
                store.close()
            store = BlobStore(tmp_path, 1 << 30, SystemClock())
            assert deaths >= 2 and resumed > 0, (deaths, resumed)
            if stop:
                assert not store.has(ref.hash)
                file = tmp_path / "partial" / ref.hash.hex()
                assert file.read_bytes()[:stop] == data[:stop] and file.stat().st_size == ref.size
                assert file.stat().st_blocks * 512 < stop + 64 * 1024
                assert stop < store.used_bytes < stop + 64 * 1024
            else:
                assert store.read(ref.hash) == data
                assert not list((tmp_path / "partial").iterdir())
            store.close()

    play(scene())
