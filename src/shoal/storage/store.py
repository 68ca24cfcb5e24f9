"""Blobs on a disk: whole or absent, within a capacity, pinned by name or evicted."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from typing_extensions import Buffer

from shoal.errors import StorageError
from shoal.identity import HASH_BYTES, blake3_hash
from shoal.protocol.blobs import CHUNK_BYTES, BlobRef
from shoal.quantities import Ranges, format_bytes
from shoal.storage.faults import DiskFailed, StorageFull, disk_faults
from shoal.storage.partial import Partial, check_reference, partial_name, recorded, state_name
from shoal.storage.pieces import (
    PieceSet,
    bytes_in,
    cut,
    hash_pieces,
    make_ref,
    piece_bounds,
    piece_count,
    piece_hash,
    pieces_in,
)
from shoal.world import Clock, DirectoryDisk, Disk

BLOCK_BYTES = 4096
"""A blob is charged in blocks, as the file system does; this also bounds how many a store of a given capacity holds."""
OWNER_MAX_BYTES = 160
"""Longest name of a pin's owner, escaped as in a URL."""
USES_PER_RECORD = 1024
"""How many uses may be forgotten, by the order of eviction only, when a process is killed."""
_FORMAT = b"shoal blobs 1\n"
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_USE = struct.Struct(">32sq")


class UnknownBlob(StorageError):
    """The store does not hold a blob."""

    code = "SH-405"


class BlobCorrupt(StorageError):
    """A stored blob's bytes are no longer what its name says. It has been dropped."""

    code = "SH-406"


class StoreInUse(StorageError):
    """Another process has the store open, or a download is already under way."""

    code = "SH-407"


class BlobPinned(StorageError):
    """A blob that somebody has pinned cannot be deleted."""

    code = "SH-408"


class CannotAdopt(StorageError):
    """A file cannot become a blob."""

    code = "SH-409"


class BadBlobRequest(StorageError):
    """A range lies outside of its blob, or is larger than one request may be."""

    code = "SH-410"


@dataclass(frozen=True)
class Holding:
    """What a store says about one of its blobs."""

    hash: bytes
    size: int
    """Bytes."""
    last_used_ms: int
    """Unix milliseconds."""
    owners: tuple[str, ...]
    """Who has pinned it."""


@dataclass
class _Entry:
    size: int
    modified_ns: int
    verified: PieceSet
    last_used_ms: int
    chunk_list: bytes | None = None
    readers: int = 0

    @property
    def charge(self) -> int:
        return charge(self.size)


@dataclass
class _PartialEntry:
    size: int
    room: PieceSet
    """Pieces that are here, or have room kept for them."""
    active: bool = False
    last_used_ms: int = 0
    chunks: bytes | None = None
    part: PieceSet | None = None
    """Pieces that somebody fetched as a part of `chunks` and may be reading: a pin holds them."""

    @property
    def charge(self) -> int:
        return charge(self.size, bytes_in(self.room, self.size))


def charge(size: int, there: int | None = None) -> int:
    """Bytes of capacity that a blob of `size` bytes takes, or `there` bytes of it: whole blocks, and its chunk list."""
    blocks = max(1, -(-(size if there is None else there) // BLOCK_BYTES))
    if size > CHUNK_BYTES:
        blocks += -(-(piece_count(size) + 1) * HASH_BYTES // BLOCK_BYTES)
    return blocks * BLOCK_BYTES


def blob_name(hash: bytes) -> str:
    return f"blobs/{hash.hex()}"


def _list_name(hash: bytes) -> str:
    return f"lists/{hash.hex()}"


def _pin_name(hash: bytes, owner: str) -> str:
    escaped = quote(owner, safe="").replace(".", "%2E")
    if not 0 < len(escaped) <= OWNER_MAX_BYTES:
        raise ValueError(f"A pin's owner has 1 to {OWNER_MAX_BYTES} characters; {owner[:80]!r} has {len(escaped)}.")
    return f"pins/{hash.hex()}.{escaped}"


class BlobStore:
    """Blobs in one directory (or memory), one process at a time; its methods block and may be called from any thread.

    A blob appears by a rename, after all of its bytes were written, so it is there whole or not at all, also after the
    process was killed; with `sync` also after a loss of power (without it, bytes that a power loss took are found when
    they are first read). Blobs that nobody pins are evicted when room is needed, the least recently used first.

    A piece's hash is compared when it is first read after the store was opened, or after its file's size or time
    changed; later reads trust the operating system. So a restart costs nothing, a served blob costs one extra hash per
    piece, and rotten bytes never leave under a good name. What is rotten is deleted and reported as BlobCorrupt.

    Raises StoreInUse when another process has it open, StorageFull when a blob has no room, DiskFailed for what else
    the operating system refuses.
    """

    def __init__(self, disk: Disk | Path, capacity_bytes: int, clock: Clock, *, sync: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self._clock = clock
        self._sync = sync
        if isinstance(disk, Path):
            try:
                disk = DirectoryDisk(disk)
            except OSError as error:
                raise DiskFailed(f"The blob store cannot use {disk}: {error.strerror or error}.") from error
        self._disk = disk
        self._mutex = threading.RLock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._partials: dict[bytes, _PartialEntry] = {}
        self._pins: dict[bytes, set[str]] = {}
        self._used_bytes = 0
        self._uses = 0
        self._numbers = itertools.count()
        with disk_faults(disk, "opening the blob store"):
            try:
                self._lock = disk.lock("lock")
            except BlockingIOError as error:
                raise StoreInUse(
                    f"The blob store in {disk.place} is open in another process; stop that one, or give this one a "
                    f"directory of its own."
                ) from error
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise

    def _open(self) -> None:
        disk = self._disk
        if disk.info("format") is None:
            disk.write("scratch/format", _FORMAT)
            disk.rename("scratch/format", "format")
        elif disk.read("format", 0, 64) != _FORMAT:
            raise StoreInUse(
                f"{disk.place} holds a blob store of another format; give this one a directory of its own."
            )
        for info in disk.files("scratch"):
            disk.delete(info.name)
        used = self._read_uses()
        order = {hash: place for place, hash in enumerate(used)}
        found = [info for info in disk.files("blobs") if _HEX.match(info.name.removeprefix("blobs/"))]
        hashes = {info.name: bytes.fromhex(info.name.removeprefix("blobs/")) for info in found}
        found.sort(key=lambda info: (order.get(hashes[info.name], len(order)), info.modified_ns))
        for info in found:
            hash = hashes[info.name]
            verified = PieceSet(piece_count(info.size))
            last_used = used.get(hash, info.modified_ns // 1_000_000)
            self._entries[hash] = _Entry(info.size, info.modified_ns, verified, last_used)
            self._used_bytes += charge(info.size)
        for info in disk.files("lists"):
            name = info.name.removeprefix("lists/")
            if not _HEX.match(name) or bytes.fromhex(name) not in self._entries:
                disk.delete(info.name)
        for info in disk.files("pins"):
            name, _, owner = info.name.removeprefix("pins/").partition(".")
            if _HEX.match(name) and owner:
                self._pins.setdefault(bytes.fromhex(name), set()).add(unquote(owner))
        self._open_partials()
        self._evict(0)  # the capacity may be smaller than last time

    def _open_partials(self) -> None:
        names = {info.name: info for info in self._disk.files("partial")}
        for name, info in names.items():
            text = name.removeprefix("partial/").removesuffix(".state")
            hash = bytes.fromhex(text) if _HEX.match(text) else None
            if hash is not None and hash in self._partials:
                continue
            record = None if hash is None or hash in self._entries else recorded(self._disk, hash)
            if hash is None or record is None:
                self._disk.delete(name)
            else:
                entry = _PartialEntry(record.size, record.have, last_used_ms=info.modified_ns // 1_000_000)
                self._partials[hash] = entry
                self._used_bytes += entry.charge

    def close(self) -> None:
        """Remember the order of use and let another process open the store."""
        with self._mutex:
            self._write_uses()
            self._lock.release()

    # What is there

    @property
    def place(self) -> str:
        """The directory, for sentences."""
        return self._disk.place

    @property
    def used_bytes(self) -> int:
        """Capacity taken by blobs, by downloads, and by what is being written now."""
        return self._used_bytes

    def has(self, hash: bytes) -> bool:
        return hash in self._entries

    def holdings(self) -> list[Holding]:
        """All blobs, the next to be evicted first."""
        with self._mutex:
            return [
                Holding(hash, entry.size, entry.last_used_ms, tuple(sorted(self._pins.get(hash, ()))))
                for hash, entry in self._entries.items()
            ]

    def ref(self, hash: bytes, media_type: str = "application/octet-stream") -> BlobRef:
        """The reference to a blob that is here. Raises UnknownBlob, BlobCorrupt."""
        with self.hold(hash) as entry:
            self._notice_change(hash, entry)
            return make_ref(hash, entry.size, self._chunk_list(hash, entry), media_type)

    def path(self, hash: bytes) -> Path:
        """Where a blob lies, for readers such as mmap. Nothing is verified (see `verify`); never write to it, and pin
        the blob for as long as the path is in use. Raises UnknownBlob, or DiskFailed where a store has no files."""
        self._use(hash)
        path = self._disk.path(blob_name(hash))
        if path is None:
            raise DiskFailed(f"Blob {hash.hex()[:12]} is kept in {self.place} and has no file; read it instead.")
        return path

    # Bytes in

    def put(self, data: Buffer, media_type: str = "application/octet-stream") -> BlobRef:
        """Keep bytes. What is there already is not written again. Raises StorageFull, DiskFailed."""
        view = memoryview(data).cast("B")
        hash, chunk_list = hash_pieces(cut(view))
        if not self._has_verified(hash):
            with self._room(len(view)):
                scratch = self._scratch_name()
                try:
                    with disk_faults(self._disk, f"putting blob {hash.hex()[:12]}", len(view)):
                        self._disk.write(scratch, view)
                    self._commit(scratch, hash, len(view), chunk_list)
                except BaseException:
                    self._discard(scratch)
                    raise
        self._touch(hash)
        return make_ref(hash, len(view), chunk_list, media_type)

    def adopt(self, source: Path, media_type: str = "application/octet-stream", *, move: bool = False) -> BlobRef:
        """Make a file a blob, without copying it where the file system can link.

        The file stays where it is, and must not be written to any more (replacing it by a rename is fine): writing
        changes the blob too, which is then found rotten and dropped. With `move` it is gone from its old place once
        the blob is there. Raises CannotAdopt, StorageFull, DiskFailed.
        """
        try:
            source = source.resolve(strict=True)
            size = source.stat().st_size
        except OSError as error:
            raise CannotAdopt(f"{source} cannot become a blob: {error.strerror or error}.") from error
        if not source.is_file():
            raise CannotAdopt(f"{source} cannot become a blob: it is not a regular file.")
        with self._room(size, linked=True):
            scratch = self._scratch_name()
            try:
                with disk_faults(self._disk, f"adopting {source}", size):
                    self._disk.bring(source, scratch)
                    before = self._disk.info(scratch)
                    hash, chunk_list = hash_pieces(self._file_pieces(scratch, size))
                    if before is None or before.size != size or self._disk.info(scratch) != before:
                        raise CannotAdopt(f"{source} cannot become a blob: it was written to meanwhile; try again.")
                self._commit(scratch, hash, size, chunk_list)
            finally:
                self._discard(scratch)
        if move and source != self._disk.path(blob_name(hash)):
            with disk_faults(self._disk, f"removing {source}"):
                source.unlink(missing_ok=True)
        return make_ref(hash, size, chunk_list, media_type)

    def part(self, ref: BlobRef, ranges: Ranges) -> Path:
        """Where a blob lies of which these bytes are here, and were verified: a file of its full size. Outside of them
        it may have holes. The whole blob where it is here, or where there are no `ranges`; the rest as with `path`."""
        with self._mutex:
            entry = self._partials.get(ref.hash)
            if self.has(ref.hash) or not ranges or entry is None:
                return self.path(ref.hash)
            wanted = pieces_in(ranges, ref.size)
            if entry.part is None or entry.chunks != ref.chunks or len(wanted - entry.part):
                raise UnknownBlob(f"That part of blob {ref.hash.hex()[:12]} is not in {self.place}.")
            path = self._disk.path(partial_name(ref.hash))
            if path is None:
                raise DiskFailed(f"Blob {ref.hash.hex()[:12]} is kept in {self.place} and has no file.")
            return path

    def partial(self, ref: BlobRef, wanted: PieceSet | None = None) -> Partial:
        """Begin or resume the download of a blob larger than a piece, or of some pieces of it; close it in the end.

        Room for all that is wanted is reserved at once. Raises BadReference, StorageFull, StoreInUse when it is under
        way already.
        """
        check_reference(ref)
        wanted = PieceSet(piece_count(ref.size), full=True) if wanted is None else wanted
        with self._mutex:
            known = self._partials.get(ref.hash)
            if known is not None and known.active:
                raise StoreInUse(f"Blob {ref.hash.hex()[:12]} is already being downloaded into {self.place}.")
            if known is not None and known.size != ref.size:
                self._drop_partial(ref.hash)
                known = None
            before = 0 if known is None else known.charge
            known = known or _PartialEntry(ref.size, PieceSet(wanted.count))
            room = known.room | wanted
            need = charge(ref.size, bytes_in(room, ref.size)) - before
            known.active = True  # it does not make room for itself
            try:
                if need:
                    self._evict(need, on_disk_bytes=bytes_in(room - known.room, ref.size))
            except BaseException:
                known.active = False
                raise
            self._used_bytes += need
            self._partials[ref.hash] = known
            known.room, known.last_used_ms = room, self._clock.now_ms()
            if known.chunks != ref.chunks:
                known.chunks, known.part = ref.chunks, None

        def release(have: PieceSet) -> None:
            with self._mutex:
                entry = self._partials.get(ref.hash)
                if entry is None:
                    return
                entry.active = False
                self._used_bytes -= entry.charge
                entry.room = have  # no room is kept for what nobody fetches
                self._used_bytes += entry.charge
                if self._disk.info(state_name(ref.hash)) is None:
                    self._drop_partial(ref.hash)

        try:
            return Partial(
                self._disk, ref, scratch=self._scratch_name(), commit=self._commit_partial, keep=self._keep_part,
                release=release,
            )  # fmt: skip
        except BaseException:
            release(known.room)
            raise

    def _commit_partial(self, name: str, hash: bytes, size: int, chunk_list: bytes) -> None:
        with self._mutex:
            self._commit(name, hash, size, chunk_list)
            self._used_bytes -= self._partials.pop(hash).charge

    def _keep_part(self, ref: BlobRef, pieces: PieceSet) -> None:
        with self._mutex:
            entry = self._partials[ref.hash]
            entry.part = pieces if entry.part is None else entry.part | pieces

    def _commit(self, name: str, hash: bytes, size: int, chunk_list: bytes) -> None:
        """Rename a file whose bytes are verified to be a blob."""
        with disk_faults(self._disk, f"keeping blob {hash.hex()[:12]}", size):
            if self._sync:
                self._disk.sync(name)
            with self._mutex:
                if size > CHUNK_BYTES:
                    self._write_list(hash, chunk_list)
                self._disk.rename(name, blob_name(hash))
                info = self._disk.info(blob_name(hash))
                if info is None or info.size != size:
                    raise DiskFailed(f"Blob {hash.hex()[:12]} vanished from {self.place} while it was being written.")
                entry = self._entries.get(hash)
                if entry is None:
                    entry = self._entries[hash] = _Entry(size, 0, PieceSet(0), 0)
                    self._used_bytes += charge(size)
                entry.modified_ns = info.modified_ns
                entry.verified = PieceSet(piece_count(size), full=True)
                entry.chunk_list = chunk_list
                self._touch(hash)
            if self._sync:
                self._disk.sync(blob_name(hash))

    def _write_list(self, hash: bytes, chunk_list: bytes) -> None:
        # The list ends with its own hash, so that a torn or rotten one is noticed, and made anew from the blob.
        self._disk.write(_list_name(hash), chunk_list + blake3_hash(chunk_list))

    def _scratch_name(self) -> str:
        return f"scratch/{next(self._numbers)}"

    def _discard(self, scratch: str) -> None:
        with contextlib.suppress(OSError):  # opening the store deletes what is left in scratch
            self._disk.delete(scratch)

    # Bytes out

    @contextmanager
    def hold(self, hash: bytes) -> Iterator[_Entry]:
        """Keep a blob from being evicted while the block runs. Raises UnknownBlob."""
        with self._mutex:
            entry = self._use(hash)
            entry.readers += 1
        try:
            yield entry
        finally:
            with self._mutex:
                entry.readers -= 1

    def read(self, hash: bytes, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes [offset, offset + length) of a blob, to its end without `length`.

        Raises UnknownBlob, BlobCorrupt, BadBlobRequest for a range that is not inside the blob, DiskFailed.
        """
        with self.hold(hash) as entry:
            stop = entry.size if length is None else offset + length
            if not 0 <= offset <= stop <= entry.size:
                raise BadBlobRequest(
                    f"Blob {hash.hex()[:12]} has {entry.size} bytes; [{offset}, {stop}) is not inside it."
                )
            self._notice_change(hash, entry)
            parts = [
                self._read_piece(hash, entry, index, max(offset, index * CHUNK_BYTES), stop)
                for index in range(offset // CHUNK_BYTES, piece_count(stop))
            ]
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def open(self, hash: bytes) -> io.BufferedReader:
        """A blob as a binary file that can be sought; it is held while the file is open. Raises like `read`."""
        return io.BufferedReader(_BlobFile(self, hash), buffer_size=CHUNK_BYTES)

    def chunk_list(self, hash: bytes) -> bytes:
        """The concatenated hashes of a blob's pieces. Raises UnknownBlob, BlobCorrupt."""
        with self.hold(hash) as entry:
            return self._chunk_list(hash, entry)

    def verify(self, hash: bytes) -> None:
        """Read a blob whole and compare its hash. Raises UnknownBlob, BlobCorrupt (it has been dropped then)."""
        with self.hold(hash) as entry:
            self._scan(hash, entry)

    def _read_piece(self, hash: bytes, entry: _Entry, index: int, start: int, stop: int) -> bytes:
        offset, length = piece_bounds(index, entry.size)
        stop = min(stop, offset + length)
        with self._readable(hash, entry, index):
            if index in entry.verified:
                data = self._disk.read(blob_name(hash), start, stop - start)
                if len(data) < stop - start:
                    raise self._lose(hash, entry, f"piece {index} is cut off")
                return data
            piece = self._disk.read(blob_name(hash), offset, length)
        if blake3_hash(piece) != piece_hash(self._chunk_list(hash, entry), index):
            # The list may be what is wrong: only the whole blob against its name decides.
            self._scan(hash, entry)
        with self._mutex:
            entry.verified.add(index)
        return piece[start - offset : stop - offset]

    def _chunk_list(self, hash: bytes, entry: _Entry) -> bytes:
        if entry.chunk_list is None:
            count = piece_count(entry.size)
            if count <= 1:
                entry.chunk_list = hash[: count * HASH_BYTES]
            else:
                with disk_faults(self._disk, f"reading the chunk list of blob {hash.hex()[:12]}"):
                    info = self._disk.info(_list_name(hash))
                    stored = b"" if info is None else self._disk.read(_list_name(hash))
                chunk_list, own_hash = stored[:-HASH_BYTES], stored[-HASH_BYTES:]
                if len(chunk_list) == count * HASH_BYTES and blake3_hash(chunk_list) == own_hash:
                    entry.chunk_list = chunk_list
                else:
                    self._scan(hash, entry)
        assert entry.chunk_list is not None
        return entry.chunk_list

    def _scan(self, hash: bytes, entry: _Entry) -> None:
        self._notice_change(hash, entry)
        with self._readable(hash, entry, None):
            found, chunk_list = hash_pieces(self._file_pieces(blob_name(hash), entry.size))
        if found != hash:
            raise self._lose(hash, entry, "its bytes have changed")
        with self._mutex:
            if entry.size > CHUNK_BYTES:
                with contextlib.suppress(OSError):  # only saves the next process this scan
                    self._disk.delete(_list_name(hash))
                    self._write_list(hash, chunk_list)
            entry.chunk_list = chunk_list
            entry.verified = PieceSet(piece_count(entry.size), full=True)

    def _notice_change(self, hash: bytes, entry: _Entry) -> None:
        """Trust nothing about a file that has been written to since it was verified."""
        with disk_faults(self._disk, f"looking at blob {hash.hex()[:12]}"):
            info = self._disk.info(blob_name(hash))
        if info is None:
            raise self._lose(hash, entry, "its file is gone")
        if info.size != entry.size:
            raise self._lose(hash, entry, f"its file has {info.size} bytes instead of {entry.size}")
        with self._mutex:
            if info.modified_ns != entry.modified_ns:
                entry.modified_ns = info.modified_ns
                entry.verified = PieceSet(piece_count(entry.size))

    @contextmanager
    def _readable(self, hash: bytes, entry: _Entry, index: int | None) -> Iterator[None]:
        try:
            with disk_faults(self._disk, f"reading blob {hash.hex()[:12]}"):
                yield
        except DiskFailed as failure:
            cause = failure.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.EIO, errno.ENOENT):
                where = "" if index is None else f"piece {index} "
                raise self._lose(hash, entry, f"{where}cannot be read any more: {cause.strerror}") from cause
            raise

    def _file_pieces(self, name: str, size: int) -> Iterator[bytes]:
        # Read rather than mapped: whoever cuts a mapped file short would kill this process with SIGBUS.
        for index in range(piece_count(size)):
            yield self._disk.read(name, *piece_bounds(index, size))

    def _lose(self, hash: bytes, entry: _Entry, detail: str) -> BlobCorrupt:
        with self._mutex:
            if self._entries.get(hash) is entry:  # else it was lost already, and may have been put again since
                self._remove(hash)
        return BlobCorrupt(
            f"Blob {hash.hex()[:12]} in {self.place} is not what its name says ({detail}). It was dropped; fetch it "
            f"again, and check the disk if this repeats."
        )

    # Pins, deletion, eviction

    def pin(self, owner: str, hash: bytes) -> None:
        """Keep a blob from eviction in the name of `owner`, across restarts, whether or not it is here yet."""
        name = _pin_name(hash, owner)
        with self._mutex, disk_faults(self._disk, f"pinning blob {hash.hex()[:12]}"):
            if owner not in self._pins.get(hash, ()):
                self._disk.write(name, b"")
                if self._sync:
                    self._disk.sync(name)
                self._pins.setdefault(hash, set()).add(owner)

    def unpin(self, owner: str, hash: bytes) -> None:
        """Take `owner`'s pin away. One that is not there is no error."""
        name = _pin_name(hash, owner)
        with self._mutex, disk_faults(self._disk, f"unpinning blob {hash.hex()[:12]}"):
            owners = self._pins.get(hash, set())
            if owner in owners:
                self._disk.delete(name)
                owners.remove(owner)
                if not owners:
                    del self._pins[hash]

    def release(self, owner: str) -> None:
        """Take all pins of `owner` away, as when a job has ended."""
        for hash in self.pins(owner):
            self.unpin(owner, hash)

    def pins(self, owner: str) -> frozenset[bytes]:
        """What `owner` has pinned."""
        with self._mutex:
            return frozenset(hash for hash, owners in self._pins.items() if owner in owners)

    def owners(self) -> frozenset[str]:
        """Everybody who has pinned something."""
        with self._mutex:
            return frozenset(owner for owners in self._pins.values() for owner in owners)

    def delete(self, hash: bytes) -> None:
        """Delete a blob and what was downloaded of it. One that is not there is no error. Raises BlobPinned."""
        with self._mutex, disk_faults(self._disk, f"deleting blob {hash.hex()[:12]}"):
            owners = self._pins.get(hash)
            if owners:
                raise BlobPinned(f"Blob {hash.hex()[:12]} is pinned by {_names(owners)}; unpin it before deleting it.")
            if hash in self._entries:
                self._remove(hash)
            partial = self._partials.get(hash)
            if partial is not None and not partial.active:
                self._drop_partial(hash)

    def _remove(self, hash: bytes) -> None:
        self._disk.delete(blob_name(hash))
        self._disk.delete(_list_name(hash))
        self._used_bytes -= self._entries.pop(hash).charge

    def _drop_partial(self, hash: bytes) -> None:
        self._disk.delete(state_name(hash))
        self._disk.delete(partial_name(hash))
        self._used_bytes -= self._partials.pop(hash).charge

    def _is_held(self, hash: bytes, partial: _PartialEntry) -> bool:
        return partial.active or (partial.part is not None and hash in self._pins)

    @contextmanager
    def _room(self, size: int, linked: bool = False) -> Iterator[None]:
        """Capacity for a blob of `size` bytes while the block writes it; the blob then carries its own charge."""
        need = charge(size)
        with self._mutex:
            self._evict(need, on_disk_bytes=0 if linked else size)
            self._used_bytes += need
        try:
            yield
        finally:
            with self._mutex:
                self._used_bytes -= need

    def _evict(self, need: int, on_disk_bytes: int = 0) -> None:
        """Delete what nobody needs until `need` bytes fit; nothing at all is deleted where they cannot."""
        with disk_faults(self._disk, "making room"):
            free_on_disk = self._disk.free_bytes() if on_disk_bytes else 0
            short = max(self._used_bytes + need - self.capacity_bytes, on_disk_bytes - free_on_disk)
            if short <= 0:
                return
            idle = [hash for hash, partial in self._partials.items() if not self._is_held(hash, partial)]
            idle.sort(key=lambda hash: self._partials[hash].last_used_ms)
            partials, blobs, freed = [], [], 0
            for hash in idle:
                if freed < short:
                    partials.append(hash)
                    freed += self._partials[hash].charge
            for hash, entry in self._entries.items():
                if freed >= short:
                    break
                if hash not in self._pins and not entry.readers:
                    blobs.append(hash)
                    freed += entry.charge
            if freed < short and need:
                raise self._full(need, free_on_disk if on_disk_bytes > free_on_disk + freed else None, freed)
            for hash in partials:
                self._drop_partial(hash)
            for hash in blobs:
                self._remove(hash)

    def _full(self, need: int, free_on_disk: int | None, evictable: int) -> StorageFull:
        if free_on_disk is not None:
            return StorageFull(
                f"The disk under {self.place} is full: {format_bytes(need)} were asked for, "
                f"{format_bytes(free_on_disk)} are free and {format_bytes(evictable)} could be evicted. Free some "
                f"space there or move the store to a larger disk."
            )
        pinned = sum(entry.charge for hash, entry in self._entries.items() if hash in self._pins)
        pinned += sum(one.charge for hash, one in self._partials.items() if one.part is not None and hash in self._pins)
        free = max(0, self.capacity_bytes - self._used_bytes)
        owners = {owner for owners in self._pins.values() for owner in owners}
        by = f" by {_names(owners)}" if owners else ""
        return StorageFull(
            f"The blob store in {self.place} has no room: {format_bytes(need)} were asked for, of its capacity of "
            f"{format_bytes(self.capacity_bytes)}, {format_bytes(free)} are free, {format_bytes(pinned)} are pinned"
            f"{by} and {format_bytes(evictable)} could be evicted. Raise the capacity, or end a job that pins blobs "
            f"there."
        )

    # Use

    def _use(self, hash: bytes) -> _Entry:
        with self._mutex:
            entry = self._entries.get(hash)
            if entry is None:
                raise UnknownBlob(f"Blob {hash.hex()[:12]} is not in {self.place}.")
            self._touch(hash)
            return entry

    def _touch(self, hash: bytes) -> None:
        with self._mutex:
            entry = self._entries.get(hash)
            if entry is None:
                return
            self._entries.move_to_end(hash)
            entry.last_used_ms = self._clock.now_ms()
            self._uses += 1
            if self._uses >= USES_PER_RECORD:
                self._write_uses()

    def _has_verified(self, hash: bytes) -> bool:
        entry = self._entries.get(hash)
        if entry is None or not entry.verified.complete:
            return False
        info = self._disk.info(blob_name(hash))
        return info is not None and (info.size, info.modified_ns) == (entry.size, entry.modified_ns)

    def _read_uses(self) -> dict[bytes, int]:
        """Hash -> last use in Unix milliseconds, the oldest first."""
        if self._disk.info("uses") is None:
            return {}
        uses = self._disk.read("uses")
        return dict(_USE.iter_unpack(uses[: len(uses) - len(uses) % _USE.size]))

    def _write_uses(self) -> None:
        self._uses = 0
        uses = b"".join(_USE.pack(hash, entry.last_used_ms) for hash, entry in self._entries.items())
        with contextlib.suppress(OSError):  # only the order of eviction after a restart hangs on it
            self._disk.write("scratch/uses", uses)
            self._disk.rename("scratch/uses", "uses")


class _BlobFile(io.RawIOBase):
    """A blob as a file; every piece is verified as `BlobStore.read` does."""

    def __init__(self, store: BlobStore, hash: bytes) -> None:
        self._store = store
        self._hash = hash
        self._at = 0
        self._held = contextlib.ExitStack()
        self._size = self._held.enter_context(store.hold(hash)).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size - self._at))
        view[:length] = self._store.read(self._hash, self._at, length) if length else b""
        self._at += length
        return length

    def close(self) -> None:
        self._held.close()
        super().close()


def _names(owners: set[str]) -> str:
    first = sorted(owners)[:3]
    return ", ".join(first) + (f" and {len(owners) - 3} more" if len(owners) > 3 else "")
