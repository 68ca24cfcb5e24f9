"""The blob store, on every disk: what is visible is whole, what is pinned stays, what does not fit is refused."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.errors import StorageError
from shoal.identity import blake3_hash
from shoal.protocol.blobs import CHUNK_BYTES, BlobRef
from shoal.storage import (
    BadBlobRequest,
    BadPiece,
    BadReference,
    BlobCorrupt,
    BlobPinned,
    BlobStore,
    CannotAdopt,
    DiskFailed,
    StorageFull,
    StoreInUse,
    UnknownBlob,
    find_blob,
    hash_pieces,
)
from shoal.storage.pieces import cut
from shoal.world import DirectoryDisk, Disk, FaultyDisk, HeldClock, MemoryDisk

BIG = 2 * CHUNK_BYTES + 1000
DISKS: dict[str, Callable[[Path], Disk]] = {"directory": DirectoryDisk, "memory": lambda _: MemoryDisk()}


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def open_store(disk: Disk, capacity_bytes: int = 64 << 20) -> BlobStore:
    return BlobStore(disk, capacity_bytes, HeldClock())


@pytest.fixture(params=DISKS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return DISKS[request.param](tmp_path / "root")


@pytest.mark.parametrize("size", [0, 1, 5000, CHUNK_BYTES, CHUNK_BYTES + 1, BIG])
def test_what_is_put_is_read_back_and_named_as_the_protocol_says(disk: Disk, size: int) -> None:
    store, data = open_store(disk), noise(size)
    ref = store.put(data, "text/plain")
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, size, CHUNK_BYTES)]
    chunk_list = b"".join(blake3_hash(piece) for piece in pieces)
    chunks = blake3_hash(chunk_list) if size > CHUNK_BYTES else None
    assert ref == BlobRef(hash=blake3_hash(data), size=size, media_type="text/plain", chunks=chunks)
    assert store.has(ref.hash) and store.read(ref.hash) == data
    assert store.chunk_list(ref.hash) == chunk_list
    store.close()
    again = open_store(disk)
    assert again.ref(ref.hash, "text/plain") == ref
    assert again.read(ref.hash) == data
    again.verify(ref.hash)


def test_ranges_across_pieces_and_files_that_are_sought(disk: Disk) -> None:
    store, data = open_store(disk), noise(BIG)
    hash = store.put(data).hash
    store.close()
    store = open_store(disk)
    for offset, length in [(0, 10), (CHUNK_BYTES - 5, 10), (CHUNK_BYTES, CHUNK_BYTES), (5, BIG - 5), (BIG, 0)]:
        assert store.read(hash, offset, length) == data[offset : offset + length]
    for offset, length in [(0, BIG + 1), (BIG, 1), (-1, 2), (10, -5)]:
        with pytest.raises(BadBlobRequest, match="not inside"):
            store.read(hash, offset, length)
    with store.open(hash) as file:
        file.seek(CHUNK_BYTES - 3)
        assert file.read(6) == data[CHUNK_BYTES - 3 : CHUNK_BYTES + 3]
        file.seek(-4, os.SEEK_END)
        assert file.read() == data[-4:]
        file.seek(0)
        assert file.read() == data


def test_a_blob_that_is_not_there_is_a_sentence(disk: Disk) -> None:
    store, missing = open_store(disk), blake3_hash(b"missing")
    for attempt in (store.read, store.path, store.ref, store.open, store.chunk_list, store.verify):
        with pytest.raises(UnknownBlob, match=missing.hex()[:12]):
            attempt(missing)
    store.delete(missing)
    assert not store.has(missing)


def test_paths_are_for_files_only(tmp_path: Path) -> None:
    store = open_store(DirectoryDisk(tmp_path))
    ref = store.put(b"mapped")
    assert store.path(ref.hash).read_bytes() == b"mapped"
    memory = open_store(MemoryDisk())
    with pytest.raises(DiskFailed, match="read it instead"):
        memory.path(memory.put(b"mapped").hash)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 1 << 20, HeldClock())
    script = (
        "import sys, pathlib\nfrom shoal.storage import BlobStore, StoreInUse\nfrom shoal.world import SystemClock\n"
        "try: BlobStore(pathlib.Path(sys.argv[1]), 1 << 20, SystemClock())\n"
        "except StoreInUse as error: print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "open in another process" in told.stdout and str(tmp_path) in told.stdout
    store.close()
    BlobStore(tmp_path, 1 << 20, HeldClock()).close()


def test_another_format_is_refused(disk: Disk) -> None:
    disk.write("format", b"something else")
    with pytest.raises(StoreInUse, match="another format"):
        open_store(disk)


# Adopting


@pytest.mark.parametrize("move", [False, True])
def test_a_file_is_adopted(disk: Disk, tmp_path: Path, move: bool) -> None:
    store, data, source = open_store(disk), noise(BIG), tmp_path / "update.bin"
    source.write_bytes(data)
    ref = store.adopt(source, "application/x-update", move=move)
    assert (ref.hash, ref.size, ref.media_type) == (blake3_hash(data), BIG, "application/x-update")
    assert store.read(ref.hash) == data
    assert source.exists() is not move
    if not move:
        assert store.adopt(source) == store.ref(ref.hash)
    assert disk.files("scratch") == []


def test_adopting_links_instead_of_copying(tmp_path: Path) -> None:
    store, source = open_store(DirectoryDisk(tmp_path / "root")), tmp_path / "source"
    source.write_bytes(noise(BIG))
    inode = source.stat().st_ino
    assert store.path(store.adopt(source).hash).stat().st_ino == inode
    assert store.path(store.adopt(source, move=True).hash).stat().st_ino == inode
    assert not source.exists()


def test_what_cannot_be_adopted_is_named(disk: Disk, tmp_path: Path) -> None:
    store = open_store(disk, 1 << 20)
    with pytest.raises(CannotAdopt, match="nothing"):
        store.adopt(tmp_path / "nothing")
    with pytest.raises(CannotAdopt, match="not a regular file"):
        store.adopt(tmp_path)
    big = tmp_path / "big"
    big.write_bytes(noise(BIG))
    with pytest.raises(StorageFull):
        store.adopt(big, move=True)
    assert big.exists() and store.used_bytes == 0


def test_an_adopted_file_that_is_written_to_afterwards_is_found_rotten(tmp_path: Path) -> None:
    store, source = open_store(DirectoryDisk(tmp_path / "root")), tmp_path / "source"
    source.write_bytes(noise(BIG))
    hash = store.adopt(source).hash
    with source.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(BlobCorrupt, match="100 bytes instead"):
        store.read(hash, 0, 10)
    assert not store.has(hash)


# Rot


def rot(disk: Disk, name: str, at: int) -> None:
    disk.write(name, bytes([disk.read(name, at, 1)[0] ^ 1]), at)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("use", ["read", "verify"])
def test_rotten_bytes_are_noticed_and_dropped(disk: Disk, restart: bool, use: str) -> None:
    store, data = open_store(disk), noise(BIG)
    hash = store.put(data).hash
    if restart:
        store.close()
    rot(disk, f"blobs/{hash.hex()}", CHUNK_BYTES + 7)
    if restart:
        store = open_store(disk)
    if use == "read":
        assert store.read(hash, 0, 100) == data[:100]  # that piece is still good
    with pytest.raises(BlobCorrupt, match="dropped") as caught:
        store.verify(hash) if use == "verify" else store.read(hash, CHUNK_BYTES, 1)
    assert hash.hex()[:12] in str(caught.value) and disk.place in str(caught.value)
    assert not store.has(hash) and disk.files("blobs") == [] and store.used_bytes == 0
    assert store.put(data).hash == hash and store.read(hash) == data


def test_a_rotten_chunk_list_does_not_cost_the_blob(disk: Disk) -> None:
    data = noise(BIG)
    store = open_store(disk)
    ref = store.put(data)
    name = f"lists/{ref.hash.hex()}"
    damages: list[Callable[[], None]] = [lambda: rot(disk, name, 3), lambda: disk.delete(name)]
    for damage in damages:
        store.close()
        damage()
        store = open_store(disk)
        assert store.ref(ref.hash) == ref
        assert store.read(ref.hash) == data
    forged = noise(3 * 32)
    store.close()
    disk.write(name, forged + blake3_hash(forged))
    store = open_store(disk)
    assert store.read(ref.hash) == data
    assert store.ref(ref.hash) == ref


def test_a_file_that_vanished_or_a_sector_that_broke_is_a_lost_blob() -> None:
    memory, broken = MemoryDisk(), set[str]()

    def fault(operation: str, name: str) -> None:
        if operation == "read" and name in broken:
            raise OSError(errno.EIO, "Input/output error")

    store = open_store(FaultyDisk(memory, fault))
    gone, bad, fine = (store.put(bytes([n])).hash for n in range(3))
    memory.delete(f"blobs/{gone.hex()}")
    broken.add(f"blobs/{bad.hex()}")
    with pytest.raises(BlobCorrupt, match="gone"):
        store.read(gone)
    with pytest.raises(BlobCorrupt, match="cannot be read"):
        store.read(bad)
    assert [store.has(hash) for hash in (gone, bad, fine)] == [False, False, True]


def test_putting_again_mends_what_rotted_unseen(disk: Disk) -> None:
    store, data = open_store(disk), noise(5000)
    hash = store.put(data).hash
    rot(disk, f"blobs/{hash.hex()}", 7)
    store.put(data)
    assert store.read(hash) == data


# Room


def test_the_least_recently_used_is_evicted_and_the_pinned_stays(disk: Disk) -> None:
    store = open_store(disk, 4 * 4096)
    a, b, c, d = (store.put(noise(4096, seed)).hash for seed in range(4))
    store.pin("job", a)
    store.read(b)
    e = store.put(noise(4096, 9)).hash
    assert [store.has(hash) for hash in (a, b, c, d, e)] == [True, True, False, True, True]
    assert store.used_bytes == store.capacity_bytes
    store.unpin("job", a)
    store.put(noise(4096, 10))
    assert not store.has(a)


def test_the_order_of_use_survives_a_restart(disk: Disk) -> None:
    store = open_store(disk, 3 * 4096)
    a, b, c = (store.put(noise(4096, seed)).hash for seed in range(3))
    store.read(a)
    store.close()
    store = open_store(disk, 3 * 4096)
    assert [holding.hash for holding in store.holdings()] == [b, c, a]
    store.put(noise(4096, 9))
    assert [store.has(hash) for hash in (a, b, c)] == [True, False, True]


def test_no_room_is_a_sentence_with_the_numbers_and_costs_nothing(disk: Disk) -> None:
    store = open_store(disk, 3 * 4096)
    a, b = store.put(noise(4096, 1)).hash, store.put(noise(4096, 2)).hash
    store.pin("job-7", a)
    with pytest.raises(StorageFull) as caught:
        store.put(noise(3 * 4096, 3))
    sentence = str(caught.value)
    for part in (disk.place, "12.0 KiB were asked for", "4.0 KiB are free", "4.0 KiB are pinned by job-7", "Raise"):
        assert part in sentence
    assert store.has(a) and store.has(b), "nothing is evicted for what does not fit anyway"
    assert disk.files("scratch") == []
    store.put(noise(2 * 4096, 3))
    assert store.has(a) and not store.has(b)


def test_pins_outlive_the_process_and_the_owner_lets_go_of_all(disk: Disk) -> None:
    store = open_store(disk, 2 * 4096)
    a, absent = store.put(noise(4096, 1)).hash, blake3_hash(b"later")
    for owner in ("job/7:../x", "other"):
        store.pin(owner, a)
    store.pin("job/7:../x", absent)
    store.close()
    store = open_store(disk, 2 * 4096)
    assert store.pins("job/7:../x") == {a, absent} and store.pins("other") == {a}
    assert store.holdings()[0].owners == ("job/7:../x", "other") and store.owners() == {"job/7:../x", "other"}
    with pytest.raises(BlobPinned, match="other"):
        store.delete(a)
    store.release("job/7:../x")
    assert store.pins("job/7:../x") == frozenset()
    store.put(noise(4096, 2))
    store.put(noise(4096, 3))
    assert store.has(a)
    store.release("other")
    store.delete(a)
    assert not store.has(a) and disk.files("pins") == []
    for owner in ("", "x" * 161):
        with pytest.raises(ValueError, match="owner"):
            store.pin(owner, a)


def test_a_blob_in_use_is_not_evicted(disk: Disk) -> None:
    store = open_store(disk, 4096)
    a = store.put(noise(4096, 1)).hash
    with store.hold(a), pytest.raises(StorageFull):
        store.put(noise(4096, 2))
    store.put(noise(4096, 2))
    assert not store.has(a)


def test_a_smaller_capacity_evicts_at_the_next_start(disk: Disk) -> None:
    store = open_store(disk, 4 * 4096)
    hashes = [store.put(noise(4096, seed)).hash for seed in range(4)]
    store.close()
    store = open_store(disk, 2 * 4096)
    assert [store.has(hash) for hash in hashes] == [False, False, True, True]


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written() -> None:
    full = False

    def fault(operation: str, name: str) -> None:
        if full and operation == "write/half":
            raise OSError(errno.ENOSPC, "No space left on device")

    memory = MemoryDisk(place="/data/blobs")
    store = open_store(FaultyDisk(memory, fault))
    kept = store.put(b"kept").hash
    full = True
    for size in (5000, BIG):
        with pytest.raises(StorageFull, match="disk under /data/blobs is full.*Free some space"):
            store.put(noise(size))
    with pytest.raises(StorageFull):
        open_partial_with_list(store, noise(BIG))
    full = False
    assert memory.files("scratch") == [] and len(memory.files("blobs")) == 1
    assert store.read(kept) == b"kept" and store.used_bytes == 4096
    store.put(noise(BIG))


def test_a_nearly_full_disk_makes_room_by_evicting_before_it_refuses() -> None:
    memory = MemoryDisk(capacity_bytes=3 * 4096)
    store = open_store(memory, 1 << 30)
    old = [store.put(noise(4096, seed)).hash for seed in range(2)]
    store.pin("job", old[1])
    new = store.put(noise(4096, 5)).hash
    assert [store.has(hash) for hash in (*old, new)] == [False, True, True]
    with pytest.raises(StorageFull, match=r"disk under memory is full: 12.0 KiB were asked for"):
        store.put(noise(3 * 4096))
    assert store.has(new)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_really_full_file_system(tmp_path: Path) -> None:
    """Root of a mount namespace of its own mounts a 2 MiB tmpfs and fills it."""
    script = (
        "import pathlib, random, sys\nfrom shoal.storage import BlobStore, StorageFull\n"
        "from shoal.world import SystemClock\n"
        "store = BlobStore(pathlib.Path(sys.argv[1]), 1 << 30, SystemClock())\n"
        "kept = store.put(b'kept'); store.pin('job', kept.hash)\n"
        "filler = pathlib.Path(sys.argv[1], 'filler').open('wb')\n"
        "filler.write(bytes(1 << 20)); filler.flush()\n"
        "try: store.put(random.Random(1).randbytes(3 << 19)); print('no error')\n"
        "except StorageFull as error: print(error)\n"
        "store.verify(kept.hash)\n"
        "print(len(list(pathlib.Path(sys.argv[1], 'blobs').iterdir())), 'blob')\n"
    )
    command = f'mount -t tmpfs -o size=2m none "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}"'
    told = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, script], capture_output=True, text=True, timeout=60, check=False
    )
    if "unshare" in told.stderr or "mount:" in told.stderr:
        pytest.skip(f"no mount namespace here: {told.stderr.strip()}")
    assert f"The disk under {tmp_path} is full: 1.5 MiB were asked for" in told.stdout, told.stderr
    assert "1 blob" in told.stdout


# Downloads


def ref_of(data: bytes) -> BlobRef:
    hash, chunk_list = hash_pieces(cut(memoryview(data)))
    return BlobRef(hash=hash, size=len(data), chunks=blake3_hash(chunk_list) if len(data) > CHUNK_BYTES else None)


def open_partial_with_list(store: BlobStore, data: bytes):  # type: ignore[no-untyped-def]
    partial = store.partial(ref_of(data))
    try:
        partial.start(hash_pieces(cut(memoryview(data)))[1])
    except StorageError:
        partial.close()
        raise
    return partial


def piece(data: bytes, index: int) -> bytes:
    return data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


def test_a_download_keeps_its_pieces_over_a_restart(disk: Disk) -> None:
    store, data = open_store(disk), noise(BIG)
    partial = open_partial_with_list(store, data)
    partial.write(2, piece(data, 2))
    partial.write(2, piece(data, 2))
    with pytest.raises(BadPiece):
        partial.write(0, piece(data, 1))
    with pytest.raises(StoreInUse, match="already being downloaded"):
        store.partial(ref_of(data))
    partial.close()
    store.close()
    store = open_store(disk)
    assert not store.has(ref_of(data).hash)
    partial = store.partial(ref_of(data))
    assert partial.recheck() == 1000 and list(partial.have) == [2]
    partial.write(0, piece(data, 0))
    partial.write(1, piece(data, 1))
    assert partial.finish() == []
    partial.close()
    assert store.read(ref_of(data).hash) == data
    assert disk.files("partial") == [] and store.used_bytes == sum(
        h.size // 4096 * 4096 + 8192 for h in store.holdings()
    )


def test_rot_and_torn_records_in_a_download_cost_only_their_pieces(disk: Disk) -> None:
    store, data = open_store(disk), noise(BIG)
    partial = open_partial_with_list(store, data)
    for index in (0, 1, 2):
        partial.write(index, piece(data, index))
    partial.close()
    hexed = ref_of(data).hash.hex()
    rot(disk, f"partial/{hexed}", 5)
    state = disk.info(f"partial/{hexed}.state")
    assert state is not None
    disk.write(f"partial/{hexed}.state", b"\0\0", state.size)
    partial = store.partial(ref_of(data))
    partial.recheck()
    assert list(partial.have.missing()) == [0]
    partial.write(0, piece(data, 0))
    rot(disk, f"partial/{hexed}", CHUNK_BYTES + 5)
    assert partial.finish() == [1]
    partial.write(1, piece(data, 1))
    assert partial.finish() == []
    assert store.read(ref_of(data).hash) == data


def test_a_reference_that_contradicts_itself_is_refused(disk: Disk) -> None:
    store, data, other = open_store(disk), noise(BIG), noise(BIG, 1)
    good = ref_of(data)
    for bad in (
        BlobRef(hash=good.hash, size=BIG),
        BlobRef(hash=good.hash, size=0),
        BlobRef(hash=good.hash, size=10, chunks=good.chunks),
    ):
        with pytest.raises(BadReference):
            store.partial(bad)
    mixed = BlobRef(hash=blake3_hash(other), size=BIG, chunks=good.chunks)
    partial = store.partial(mixed)
    with pytest.raises(BadPiece):
        partial.start(hash_pieces(cut(memoryview(other)))[1])
    partial.start(hash_pieces(cut(memoryview(data)))[1])
    for index in range(3):
        partial.write(index, piece(data, index))
    with pytest.raises(BadReference, match="No holder is to blame"):
        partial.finish()
    partial.close()
    assert store.holdings() == [] and store.used_bytes == 0 and disk.files("partial") == []


def test_abandoned_downloads_make_room_first(disk: Disk) -> None:
    data = noise(BIG)
    store = open_store(disk, 4 << 20)
    small = store.put(b"small").hash
    partial = open_partial_with_list(store, data)
    partial.write(0, piece(data, 0))
    partial.write(1, piece(data, 1))
    with pytest.raises(StorageFull):
        store.put(noise(BIG, 2))
    partial.close()
    store.put(noise(BIG, 2))
    assert store.has(small) and disk.files("partial") == []
    with pytest.raises(StorageFull):
        store.partial(BlobRef(hash=blake3_hash(b"x"), size=5 << 20, chunks=blake3_hash(b"y")))


# Crashes, at every step


class PowerCut(BaseException):
    """The process ends here."""


def crashing(memory: MemoryDisk, at: int) -> FaultyDisk:
    steps = 0

    def fault(operation: str, name: str) -> None:
        nonlocal steps
        steps += 1
        if steps > at:
            raise PowerCut

    return FaultyDisk(memory, fault)


def story(store: BlobStore, done: list[str], source: Path) -> None:
    """Some of everything; `done` tells how far it came."""
    data = noise(BIG, 7)
    store.put(noise(5000, 1))
    done.append("small")
    store.put(noise(BIG, 2))
    done.append("big")
    store.pin("job", blake3_hash(noise(5000, 1)))
    done.append("pin")
    store.adopt(source, move=True)
    done.append("adopted")
    partial = open_partial_with_list(store, data)
    for index in range(3):
        partial.write(index, piece(data, index))
        done.append(f"piece {index}")
    assert partial.finish() == []
    partial.close()
    done.append("fetched")
    store.delete(blake3_hash(noise(BIG, 2)))
    done.append("deleted")


def test_a_crash_at_any_step_leaves_only_whole_blobs(tmp_path: Path) -> None:
    source, adopted, fetched = tmp_path / "source", noise(BIG, 3), noise(BIG, 7)
    names = {
        "small": blake3_hash(noise(5000, 1)),
        "big": blake3_hash(noise(BIG, 2)),
        "adopted": blake3_hash(adopted),
        "fetched": blake3_hash(fetched),
    }
    at, finished = 0, False
    while not finished:
        memory, done = MemoryDisk(), list[str]()
        source.write_bytes(adopted)
        try:
            story(open_store(crashing(memory, at)), done, source)
            finished = True
        except PowerCut:
            pass
        memory.process_died()
        store = open_store(memory)
        for name, hash in names.items():
            if name in done and (name != "big" or len(done) < 8):
                assert store.has(hash), f"{name} was acknowledged and is gone after a crash at step {at}"
            if store.has(hash):
                store.verify(hash)
                assert store.ref(hash).hash == hash
        assert store.has(names["adopted"]) or source.exists()
        if "pin" in done:
            assert store.pins("job") == {names["small"]}
        assert memory.files("scratch") == []
        assert {info.name[6:] for info in memory.files("lists")} <= {h.hash.hex() for h in store.holdings()}
        if not store.has(names["fetched"]):
            partial = store.partial(ref_of(fetched))
            if partial.chunk_list is None:
                partial.start(hash_pieces(cut(memoryview(fetched)))[1])
            partial.recheck()
            assert {f"piece {index}" for index in partial.have} >= {step for step in done if step.startswith("piece")}
            for index in list(partial.have.missing()):
                partial.write(index, piece(fetched, index))
            assert partial.finish() == []
            partial.close()
        store.verify(names["fetched"])
        on_disk = sum(info.size for folder in ("blobs", "lists", "partial") for info in memory.files(folder))
        assert on_disk <= store.used_bytes
        at += 1
    assert at > 30, "the story has more steps than that"


# Any history


class Histories(RuleBasedStateMachine):
    """Random use, restarts and rot, against a model that knows only what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryDisk()
        self.store = open_store(self.memory, 8 * 4096)
        self.pinned: dict[bytes, set[str]] = {}
        self.data: dict[bytes, bytes] = {}

    @rule(seed=st.integers(0, 12), blocks=st.integers(0, 4))
    def put(self, seed: int, blocks: int) -> None:
        data = noise(blocks * 4096, seed)
        hash = blake3_hash(data)
        before = {holding.hash: holding for holding in self.store.holdings()}
        need = max(1, blocks) * 4096
        try:
            self.store.put(data)
        except StorageFull:
            pinned = sum(max(4096, held.size) for held in before.values() if held.owners)
            assert pinned + need > self.store.capacity_bytes
            assert {holding.hash for holding in self.store.holdings()} == set(before)
            return
        self.data[hash] = data
        after = {holding.hash for holding in self.store.holdings()}
        assert hash in after
        gone, order = set(before) - after, [h for h in before if h not in self.pinned and h != hash]
        assert gone == set(order[: len(gone)]), "eviction goes by last use"

    @precondition(lambda self: self.data)
    @rule(index=st.integers(0, 100), owner=st.sampled_from("ab"), pin=st.booleans())
    def pin(self, index: int, owner: str, pin: bool) -> None:
        hash = list(self.data)[index % len(self.data)]
        if pin:
            self.store.pin(owner, hash)
            self.pinned.setdefault(hash, set()).add(owner)
        else:
            self.store.unpin(owner, hash)
            self.pinned.get(hash, set()).discard(owner)
            if not self.pinned.get(hash):
                self.pinned.pop(hash, None)

    @precondition(lambda self: self.data)
    @rule(index=st.integers(0, 100))
    def read(self, index: int) -> None:
        hash, data = list(self.data.items())[index % len(self.data)]
        if self.store.has(hash):
            assert self.store.read(hash) == data
            assert self.store.holdings()[-1].hash == hash

    @precondition(lambda self: self.data)
    @rule(index=st.integers(0, 100))
    def rot(self, index: int) -> None:
        hash, data = list(self.data.items())[index % len(self.data)]
        if self.store.has(hash) and data:
            rot(self.memory, f"blobs/{hash.hex()}", index % len(data))
            with pytest.raises(BlobCorrupt):
                self.store.read(hash)
            assert not self.store.has(hash)

    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        before = [holding.hash for holding in self.store.holdings()]
        if kill:
            self.memory.process_died()
        else:
            self.store.close()
        self.store = open_store(self.memory, 8 * 4096)
        after = [holding.hash for holding in self.store.holdings()]
        assert (set(after) == set(before)) if kill else (after == before)

    @invariant()
    def nothing_exceeds_the_capacity(self) -> None:
        held = self.store.holdings()
        assert self.store.used_bytes == sum(max(4096, holding.size) for holding in held) <= self.store.capacity_bytes
        assert {info.name for info in self.memory.files("blobs")} == {f"blobs/{h.hash.hex()}" for h in held}
        assert {h.hash: set(h.owners) for h in held if h.owners} == {
            hash: owners for hash, owners in self.pinned.items() if self.store.has(hash)
        }


Histories.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestHistories = Histories.TestCase


@given(cuts=st.lists(st.tuples(st.integers(0, BIG), st.integers(0, BIG)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_any_range_reads_as_the_bytes_do(cuts: list[tuple[int, int]]) -> None:
    data = noise(BIG)
    memory = MemoryDisk()
    open_store(memory).put(data)
    memory.process_died()
    store = open_store(memory)
    for start, stop in cuts:
        start, stop = min(start, stop), max(start, stop)
        assert store.read(blake3_hash(data), start, stop - start) == data[start:stop]


def test_a_blob_is_found_in_a_store_that_another_process_has_open(tmp_path: Path) -> None:
    store, data = open_store(DirectoryDisk(tmp_path / "root")), noise(BIG)
    hash = store.put(data).hash
    path = find_blob(tmp_path / "root", hash)
    assert path is not None and path.read_bytes() == data
    assert find_blob(tmp_path / "root", blake3_hash(b"other")) is None
    assert find_blob(tmp_path / "nowhere", hash) is None and not (tmp_path / "nowhere").exists()
    rot(DirectoryDisk(tmp_path / "root"), f"blobs/{hash.hex()}", 5)
    assert find_blob(tmp_path / "root", hash) is None


def test_a_store_that_syncs_does_all_the_same(tmp_path: Path) -> None:
    disk = DirectoryDisk(tmp_path / "root")
    store = BlobStore(disk, 64 << 20, HeldClock(), sync=True)
    data = noise(BIG)
    partial = open_partial_with_list(store, data)
    for index in range(3):
        partial.write(index, piece(data, index))
    assert partial.finish() == []
    partial.close()
    store.pin("job", ref_of(data).hash)
    assert store.read(store.put(noise(5000)).hash) == noise(5000) and store.read(ref_of(data).hash) == data
