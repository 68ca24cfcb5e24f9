"""A blob that is on its way: the pieces that have come, and a record of which they are.

Two files in `partial/`: the data, in which each piece lies at its place, and `.state`, which holds what the reference
says, the chunk list, and after it the numbers of the pieces that are in the data, appended one by one. A piece is
written before its number, so a process that dies in between fetches that piece again and nothing else.

A part of a blob is a download that wants some pieces only, and stays one: whoever wants more of it goes on from there.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.errors import StorageError
from shoal.identity import HASH_BYTES, blake3_hash
from shoal.protocol.blobs import BlobRef
from shoal.quantities import format_bytes
from shoal.storage.faults import disk_faults
from shoal.storage.pieces import PieceSet, hash_pieces, piece_bounds, piece_count, piece_hash
from shoal.world import Disk

_HEADER = struct.Struct(">16s32sQ")
_MAGIC = b"shoal partial 1\n"
_NUMBER = struct.Struct(">I")


class BadReference(StorageError):
    """A reference contradicts itself: its hash, size and chunks do not belong to the same bytes."""

    code = "SH-403"


class BadPiece(StorageError):
    """Bytes that came are not the piece, or the chunk list, that they should be."""

    code = "SH-404"


def check_reference(ref: BlobRef) -> None:
    """Raises BadReference for what can be seen without the bytes."""
    if piece_count(ref.size) > 1:
        if ref.chunks is None:
            raise BadReference(
                f"The reference to blob {ref.hash.hex()[:12]} of {format_bytes(ref.size)} has no `chunks`, so that its "
                f"pieces cannot be verified; whoever made it must set `chunks` for anything larger than a piece."
            )
        return
    if ref.size == 0 and ref.hash != blake3_hash(b""):
        raise BadReference(f"The reference to blob {ref.hash.hex()[:12]} says size 0, but the hash is of other bytes.")
    if ref.chunks is not None and ref.chunks != blake3_hash(ref.hash if ref.size else b""):
        raise contradiction(ref, "they differ although the blob is a single piece")


def contradiction(ref: BlobRef, detail: str) -> BadReference:
    return BadReference(
        f"The reference to blob {ref.hash.hex()[:12]} contradicts itself: `hash` and `chunks` are not of the same "
        f"bytes ({detail}). No holder is to blame; ask whoever made the reference for a correct one."
    )


def partial_name(hash: bytes) -> str:
    return f"partial/{hash.hex()}"


def state_name(hash: bytes) -> str:
    return f"partial/{hash.hex()}.state"


@dataclass(frozen=True)
class Record:
    """What a download has written down about itself."""

    chunks: bytes
    size: int
    """Of the whole blob, in bytes."""
    chunk_list: bytes
    have: PieceSet
    end: int
    """Where the next number goes."""


def recorded(disk: Disk, hash: bytes) -> Record | None:
    """None where there is no record, or one that cannot be read."""
    if disk.info(state_name(hash)) is None:
        return None
    state = disk.read(state_name(hash))
    if len(state) < _HEADER.size:
        return None
    magic, chunks, size = _HEADER.unpack(state[: _HEADER.size])
    list_end = _HEADER.size + piece_count(size) * HASH_BYTES
    chunk_list = state[_HEADER.size : list_end]
    if magic != _MAGIC or len(state) < list_end or blake3_hash(chunk_list) != chunks:
        return None
    have = PieceSet(piece_count(size))
    numbers = state[list_end:]
    whole = len(numbers) - len(numbers) % _NUMBER.size
    for (number,) in _NUMBER.iter_unpack(numbers[:whole]):
        if number < have.count:
            have.add(number)
    return Record(chunks, size, chunk_list, have, list_end + whole)


class Partial:
    """A download under way. Its methods block; they may be called from several threads.

    `have` are the pieces on disk, `chunk_list` the hashes of all (None until `start`).
    """

    def __init__(
        self,
        disk: Disk,
        ref: BlobRef,
        *,
        scratch: str,
        commit: Callable[[str, bytes, int, bytes], None],
        keep: Callable[[BlobRef, PieceSet], None],
        release: Callable[[PieceSet], None],
    ) -> None:
        self.ref = ref
        self.have = PieceSet(piece_count(ref.size))
        self.chunk_list: bytes | None = None
        self._disk = disk
        self._scratch = scratch
        self._commit = commit
        self._keep = keep
        self._release = release
        self._data = partial_name(ref.hash)
        self._state = state_name(ref.hash)
        self._end = 0
        self._closed = False
        self._lock = threading.Lock()
        self._load()

    def _load(self) -> None:
        with disk_faults(self._disk, f"reading {self._state}"):
            record = recorded(self._disk, self.ref.hash)
        if record is None or (record.size, record.chunks) != (self.ref.size, self.ref.chunks):
            return  # a record of another reference: start over
        self.have, self.chunk_list, self._end = record.have, record.chunk_list, record.end

    def start(self, chunk_list: bytes) -> None:
        """Take a chunk list that somebody sent. Raises BadPiece when it is not the reference's."""
        if len(chunk_list) != self.have.count * HASH_BYTES or blake3_hash(chunk_list) != self.ref.chunks:
            raise BadPiece(f"a chunk list of blob {self.ref.hash.hex()[:12]} that is not the one its reference names")
        state = _HEADER.pack(_MAGIC, self.ref.chunks, self.ref.size) + chunk_list
        with self._lock, disk_faults(self._disk, "starting a download", self.ref.size):
            self._disk.delete(self._data)
            self._disk.write(self._scratch, state)
            self._disk.rename(self._scratch, self._state)
        self.have = PieceSet(self.have.count)
        self.chunk_list = chunk_list
        self._end = len(state)

    def recheck(self, wanted: PieceSet | None = None) -> int:
        """Hash the pieces (of `wanted`, else all) that an earlier process recorded, forget those that are not right;
        bytes that were."""
        good = 0
        for index in list(self.have):
            if wanted is not None and index not in wanted:
                continue
            if self._is_right(index):
                good += piece_bounds(index, self.ref.size)[1]
            else:
                self.have.discard(index)
        return good

    def _is_right(self, index: int) -> bool:
        assert self.chunk_list is not None
        return blake3_hash(self._read(index)) == piece_hash(self.chunk_list, index)

    def _read(self, index: int) -> bytes:
        try:
            return self._disk.read(self._data, *piece_bounds(index, self.ref.size))
        except FileNotFoundError:
            return b""

    def write(self, index: int, data: bytes | bytearray) -> None:
        """Verify and keep a piece. What is here already is not written again.

        Raises BadPiece when these are not its bytes, StorageFull, DiskFailed.
        """
        assert self.chunk_list is not None
        offset, length = piece_bounds(index, self.ref.size)
        if len(data) != length or blake3_hash(data) != piece_hash(self.chunk_list, index):
            raise BadPiece(f"wrong bytes for piece {index} of {self.have.count} of blob {self.ref.hash.hex()[:12]}")
        with self._lock:
            if self._closed or index in self.have:
                return
            with disk_faults(self._disk, f"writing a piece of blob {self.ref.hash.hex()[:12]}", length):
                self._disk.write(self._data, data, offset)
                self._disk.write(self._state, _NUMBER.pack(index), self._end)
            self._end += _NUMBER.size
            self.have.add(index)

    def finish(self) -> list[int]:
        """Verify everything once more and make it a blob of the store.

        Gives the pieces that the disk lost in the meantime, which must be fetched again; none when the blob is there.
        Raises BadReference when every piece is right and the whole is not; the download is deleted then.
        """
        assert self.have.complete and self.chunk_list is not None
        lost: list[int] = []

        def pieces() -> Iterator[bytes]:
            assert self.chunk_list is not None
            for index in range(self.have.count):
                piece = self._read(index)
                if blake3_hash(piece) != piece_hash(self.chunk_list, index):
                    lost.append(index)
                yield piece

        with self._lock:
            with disk_faults(self._disk, f"reading the download of blob {self.ref.hash.hex()[:12]}"):
                whole, _ = hash_pieces(pieces())
            if lost:
                for index in lost:
                    self.have.discard(index)
                return lost
            if whole != self.ref.hash:
                self.delete()
                raise contradiction(self.ref, "every piece is the one that `chunks` names, the whole is not `hash`")
            self._commit(self._data, self.ref.hash, self.ref.size, self.chunk_list)
            self._disk.delete(self._state)
        return []

    def settle(self, wanted: PieceSet) -> list[int]:
        """Verify a part once more and keep it as it is: a file of the blob's full size, with holes between the pieces.

        Gives the pieces that the disk lost, as `finish` does. That `hash` and `chunks` belong together is seen by
        nobody before the whole is here: the part is that of `chunks`.
        """
        with self._lock, disk_faults(self._disk, f"keeping a part of blob {self.ref.hash.hex()[:12]}", 1):
            lost = [index for index in wanted if index not in self.have or not self._is_right(index)]
            for index in lost:
                self.have.discard(index)
            if not lost:
                info = self._disk.info(self._data)
                if info is None or info.size < self.ref.size:
                    self._disk.write(self._data, b"\0", self.ref.size - 1)
                self._keep(self.ref, wanted)
        return lost

    def delete(self) -> None:
        with disk_faults(self._disk, "deleting a download"):
            self._disk.delete(self._state)
            self._disk.delete(self._data)

    def close(self) -> None:
        """Let go of the download. Its files stay, for whoever resumes it, until room is needed."""
        with self._lock:
            if not self._closed:
                self._closed = True
                with contextlib.suppress(OSError):  # opening the store deletes what is left in scratch
                    self._disk.delete(self._scratch)
                self._release(self.have)
