"""Pieces: how a blob is cut, hashed, and remembered in part.

A blob is cut at multiples of `CHUNK_BYTES`. Its *chunk list* is the concatenation of the BLAKE3 hashes of its pieces;
for a blob of a single piece that is the hash of the blob itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blake3 import blake3

from shoal.identity import HASH_BYTES, blake3_hash
from shoal.protocol.blobs import CHUNK_BYTES, BlobRef
from shoal.quantities import Range, Ranges


def piece_count(size: int) -> int:
    """Pieces of a blob of `size` bytes; an empty blob has none."""
    return -(-size // CHUNK_BYTES)


def piece_bounds(index: int, size: int) -> tuple[int, int]:
    """(offset, length) in bytes of a piece."""
    offset = index * CHUNK_BYTES
    return offset, min(CHUNK_BYTES, size - offset)


def pieces_in(ranges: Iterable[Range], size: int) -> PieceSet:
    """The pieces in which the bytes of `ranges` lie; without any, all pieces."""
    found, whole = PieceSet(piece_count(size)), True
    for start, stop in ranges:
        whole = False
        for index in range(start // CHUNK_BYTES, piece_count(min(stop, size))):
            found.add(index)
    return PieceSet(found.count, full=True) if whole else found


def bytes_in(pieces: PieceSet, size: int) -> int:
    """Of a blob of `size` bytes, how many lie in `pieces`."""
    last = pieces.count - 1
    short = pieces.count * CHUNK_BYTES - size if last >= 0 and last in pieces else 0
    return len(pieces) * CHUNK_BYTES - short


def part_bytes(ref: BlobRef, ranges: Ranges) -> int:
    """How many bytes come for these ranges of a blob, the rest of their pieces included; without any, the whole."""
    return bytes_in(pieces_in(ranges, ref.size), ref.size)


def piece_hash(chunk_list: bytes, index: int) -> bytes:
    """The hash that a chunk list gives for a piece."""
    return chunk_list[index * HASH_BYTES : (index + 1) * HASH_BYTES]


def hash_pieces(pieces: Iterable[bytes | memoryview]) -> tuple[bytes, bytes]:
    """One pass over a blob's pieces -> (hash, chunk list). Each piece is hashed twice while the caches hold it."""
    whole = blake3(max_threads=1)  # a store's neighbours compute: more threads would take their cores
    hashes = []
    for piece in pieces:
        whole.update(piece)
        hashes.append(blake3_hash(piece))
    return whole.digest(), b"".join(hashes)


def cut(data: memoryview) -> Iterator[memoryview]:
    """Bytes in memory -> their pieces, without a copy."""
    for offset in range(0, len(data), CHUNK_BYTES):
        yield data[offset : offset + CHUNK_BYTES]


def make_ref(hash: bytes, size: int, chunk_list: bytes, media_type: str) -> BlobRef:
    chunks = blake3_hash(chunk_list) if size > CHUNK_BYTES else None
    return BlobRef(hash=hash, size=size, media_type=media_type, chunks=chunks)


class PieceSet:
    """A set of piece numbers below `count`: one bit each."""

    def __init__(self, count: int, full: bool = False) -> None:
        self.count = count
        self._bits = bytearray((((1 << count) - 1) if full else 0).to_bytes((count + 7) // 8, "little"))
        self._size = count if full else 0

    def __contains__(self, index: int) -> bool:
        return bool(self._bits[index >> 3] & (1 << (index & 7)))

    def __len__(self) -> int:
        return self._size

    def copy(self) -> PieceSet:
        twin = PieceSet(self.count)
        twin._bits[:] = self._bits
        twin._size = self._size
        return twin

    def _of(self, bits: int) -> PieceSet:
        made = PieceSet(self.count)
        made._bits[:] = bits.to_bytes(len(made._bits), "little")
        made._size = bits.bit_count()
        return made

    @property
    def _number(self) -> int:
        return int.from_bytes(self._bits, "little")

    def __or__(self, other: PieceSet) -> PieceSet:
        return self._of(self._number | other._number)

    def __sub__(self, other: PieceSet) -> PieceSet:
        return self._of(self._number & ~other._number)

    @property
    def complete(self) -> bool:
        return self._size == self.count

    def add(self, index: int) -> None:
        if index not in self:
            self._bits[index >> 3] |= 1 << (index & 7)
            self._size += 1

    def discard(self, index: int) -> None:
        if index in self:
            self._bits[index >> 3] &= ~(1 << (index & 7))
            self._size -= 1

    def __iter__(self) -> Iterator[int]:
        return (index for index in range(self.count) if index in self)

    def missing(self) -> Iterator[int]:
        return (index for index in range(self.count) if index not in self)
