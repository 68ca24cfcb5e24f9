"""Updates on the wire: what a pseudo-gradient looks like as bytes, and the only way to read one.

Every update starts with 16 bytes: `SHU1`, the codec's number, the keep exponent, two zero bytes, and the count of
numbers N (uint64). All integers are little-endian. Then, over the flat buffer of N numbers:

    none     N float32.
    int8     per chunk of 4096: a float32 scale s >= 0; then N int8 q in [-127, 127]. A value is s * q, rounded once.
    sparse2  per chunk of 4096 one record of the k = `keep` values of largest magnitude (k = ceil(n * keep / 4096) in a
             last chunk of n): two bfloat16 magnitudes (low, high); the ascending indices in Elias-Fano form (Elias
             1974, Fano 1971): the low bits of each, then one bit per index at position (index >> low bits) + rank;
             then two bits per value: 1 = negative, 2 = the high magnitude. With keep 64 that is 84 bytes a chunk,
             10.5 bits a kept value; the bound for any coding of the positions is about 7.4 bits, this takes 8.

Reading is the same on every machine: a decoded value is either copied from the wire or rounded once. There is one
encoding for given magnitudes, indices and signs; padding bits are zero, and other bytes are refused.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import BadRecord, EngineError
from shoal.identity import blake3_hash
from shoal.protocol.training import Codec

CHUNK = 4096
"""Numbers that share a scale."""
CHUNK_BITS = 12
KEEP_BITS_MIN, KEEP_BITS_MAX = 3, 10
"""sparse2 keeps 2**3 to 2**10 values of a chunk."""
SCALE_MAX = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
"""127 times this is still finite."""
HEADER = struct.Struct("<4sBBHQ")
MAGIC = b"SHU1"
CODEC_NUMBERS = {Codec.NONE: 0, Codec.INT8: 1, Codec.SPARSE2: 2}
ENCODED_AT_ONCE = 32
"""Chunks whose copies stay in a core's cache while the largest values are found."""
REMEMBERED_MAX = 4
"""Decoded sparse updates that a reader remembers: a fifth of a byte per parameter each."""
UPDATE_MEDIA_TYPE = "application/x-shoal-update"

Bytes = NDArray[np.uint8]


class BadUpdate(BadRecord):
    """An update is truncated, of the wrong shape, not finite, or not written as its codec says."""

    code = "SH-251"


@dataclass(frozen=True)
class Update:
    """A decoded pseudo-gradient over `size` numbers: dense, or only its nonzero places."""

    size: int
    values: NDArray[np.float32]
    """One per number, or one per index."""
    indices: NDArray[np.int64] | None = None
    """Strictly ascending; none when dense."""

    def dense(self) -> NDArray[np.float32]:
        if self.indices is None:
            return self.values
        flat = np.zeros(self.size, dtype=np.float32)
        flat[self.indices] = self.values
        return flat


@dataclass(frozen=True)
class SparseRecord:
    """Where the fields of one sparse2 chunk record of k indices below `length` lie, in bytes."""

    length: int
    keep_bits: int

    @property
    def k(self) -> int:
        return -((-self.length << self.keep_bits) >> CHUNK_BITS)

    @property
    def low_bits(self) -> int:
        return CHUNK_BITS - self.keep_bits

    @property
    def high_length(self) -> int:
        """Bits in the unary part: one per index, one per bucket of 2**low_bits."""
        return self.k + -(-self.length >> self.low_bits)

    @property
    def fields(self) -> tuple[int, int, int, int]:
        """Byte offsets where the low bits, the high bits and the values start, and where the record ends."""
        low = 4
        high = low + -(-self.k * self.low_bits // 8)
        values = high + -(-self.high_length // 8)
        return low, high, values, values + -(-self.k * 2 // 8)


def sparse_records(size: int, keep_bits: int) -> list[tuple[int, SparseRecord]]:
    """(how many, record) for the whole chunks and for the last, shorter one."""
    whole, rest = divmod(size, CHUNK)
    records = [(whole, SparseRecord(CHUNK, keep_bits))] if whole else []
    return records + ([(1, SparseRecord(rest, keep_bits))] if rest else [])


def update_bytes(codec: Codec, size: int, keep: int = 64) -> int:
    """How long an update of `size` numbers is: always exactly this."""
    if codec is Codec.NONE:
        return HEADER.size + 4 * size
    if codec is Codec.INT8:
        return HEADER.size + 4 * -(-size // CHUNK) + size
    return HEADER.size + sum(count * record.fields[3] for count, record in sparse_records(size, keep.bit_length() - 1))


class NotFinite(EngineError):
    """A member's own update is not finite: its training diverged."""

    code = "SH-512"


def encode_update(flat: NDArray[np.float32], codec: Codec, keep: int = 64) -> bytes:
    """Flat float32 numbers -> the bytes of an update: always the same for the same numbers, on every machine.

    sparse2 takes the largest magnitudes of a chunk, equal ones by lowest index. The largest quarter of them shares the
    high magnitude, the others the low one; both are order statistics (the middle of the quarter, the middle of the
    rest), so that no arithmetic is done at all. Raises NotFinite.
    """
    if not np.isfinite(flat).all():
        raise NotFinite("The update is not finite: training diverged; lower the learning rate.")
    keep_bits = keep.bit_length() - 1 if codec is Codec.SPARSE2 else 0
    parts = [HEADER.pack(MAGIC, CODEC_NUMBERS[codec], keep_bits, 0, flat.size)]
    if codec is Codec.NONE:
        parts.append(flat.astype("<f4").tobytes())
    elif codec is Codec.INT8:
        parts += _encode_int8(flat)
    else:
        start = 0
        for count, record in sparse_records(flat.size, keep_bits):
            for first in range(0, count, ENCODED_AT_ONCE):
                rows = min(ENCODED_AT_ONCE, count - first)
                stop = start + rows * record.length
                parts.append(_encode_records(flat[start:stop].reshape(rows, record.length), record).tobytes())
                start = stop
    return b"".join(parts)


def _encode_int8(flat: NDArray[np.float32]) -> list[bytes]:
    chunks = -(-flat.size // CHUNK)
    padded = np.zeros(chunks * CHUNK, dtype=np.float32)
    padded[: flat.size] = flat
    rows = padded.reshape(chunks, CHUNK)
    scales = np.minimum(np.abs(rows).max(axis=1) / np.float32(127), SCALE_MAX)
    levels = np.rint(rows / np.where(scales > 0, scales, np.float32(1))[:, None])
    levels = np.clip(levels, -127, 127)  # a subnormal scale is coarse: its quotients can exceed the range
    return [scales.astype("<f4").tobytes(), levels.astype(np.int8).ravel()[: flat.size].tobytes()]


def _encode_records(rows: NDArray[np.float32], record: SparseRecord) -> Bytes:
    """[count, length] numbers -> [count, record bytes]."""
    count, k, low_bits = len(rows), record.k, record.low_bits
    low_at, high_at, values_at, end = record.fields
    sizes = np.abs(rows).view(np.uint32)  # the bits of floats >= 0 are ordered as the floats are
    indices = _largest(sizes, k)
    chosen = np.take_along_axis(sizes, indices, axis=1)
    by_size = np.argsort(~chosen, axis=1, kind="stable")
    quarter = k // 4
    high_rank = max(0, k // 8 - 1)
    low_rank = min(k - 1, max(quarter, quarter + 3 * k // 8 - 1))
    is_high = np.zeros((count, k), dtype=np.uint8)
    np.put_along_axis(is_high, by_size[:, :quarter], 1, axis=1)
    ordered = np.take_along_axis(chosen, by_size, axis=1)

    record_bytes = np.zeros((count, end), dtype=np.uint8)
    magnitudes = np.stack([ordered[:, low_rank], ordered[:, high_rank]], axis=1)
    record_bytes[:, :4] = _bfloat16(magnitudes).astype("<u2").view(np.uint8)
    bits = (indices[:, :, None] >> np.arange(low_bits)) & 1
    record_bytes[:, low_at:high_at] = np.packbits(
        bits.astype(np.uint8).reshape(count, k * low_bits), axis=1, bitorder="little"
    )
    unary = np.zeros((count, record.high_length), dtype=np.uint8)
    np.put_along_axis(unary, (indices >> low_bits) + np.arange(k), 1, axis=1)
    record_bytes[:, high_at:values_at] = np.packbits(unary, axis=1, bitorder="little")
    negative = np.signbit(np.take_along_axis(rows, indices, axis=1)).astype(np.uint8)
    pairs = np.stack([negative, is_high], axis=2).reshape(count, 2 * k)
    record_bytes[:, values_at:] = np.packbits(pairs, axis=1, bitorder="little")
    return record_bytes


def _largest(sizes: NDArray[np.uint32], k: int) -> NDArray[np.int64]:
    """Ascending indices of the k largest of each row, [count, k]; equal ones by lowest index."""
    length = sizes.shape[1]
    threshold = np.partition(sizes, length - k, axis=1)[:, length - k, None]
    taken = sizes >= threshold
    if np.count_nonzero(taken) > taken.shape[0] * k:
        for row in np.flatnonzero(taken.sum(axis=1) > k):
            ties = np.flatnonzero(sizes[row] == threshold[row])
            taken[row, ties[len(ties) - (int(taken[row].sum()) - k) :]] = False
    return _marked(taken, k)


def _marked(marks: NDArray[np.bool_], k: int) -> NDArray[np.int64]:
    """Ascending columns of the k marks in each row, [rows, k]. (Found flat: NumPy is slow at it by rows.)"""
    rows, columns = marks.shape
    found: NDArray[np.int64] = np.flatnonzero(marks).reshape(rows, k) - columns * np.arange(rows)[:, None]
    return found


def _bfloat16(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Bits of floats >= 0 -> their upper half, rounded to nearest even, never to infinity."""
    rounded: NDArray[np.uint32] = np.minimum((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7F7F)
    return rounded


def decode_update(data: bytes | memoryview, codec: Codec, size: int, keep: int = 64) -> Update:
    """Bytes -> Update over `size` numbers. Raises BadUpdate with what is wrong."""
    expected = update_bytes(codec, size, keep)
    if len(data) != expected:
        raise BadUpdate(f"An update of {len(data)} bytes was refused: {codec} over {size} numbers takes {expected}.")
    magic, number, keep_bits, zero, count = HEADER.unpack_from(data)
    wanted_keep = keep.bit_length() - 1 if codec is Codec.SPARSE2 else 0
    if (magic, number, keep_bits, zero, count) != (MAGIC, CODEC_NUMBERS[codec], wanted_keep, 0, size):
        raise BadUpdate(f"An update was refused: its first bytes do not say {codec} over {size} numbers.")
    body = np.frombuffer(data, dtype=np.uint8, offset=HEADER.size)
    if codec is Codec.NONE:
        return Update(size, _finite(body.view("<f4").astype(np.float32), "a value"))
    if codec is Codec.INT8:
        return _decode_int8(body, size)
    return _decode_sparse(body, size, keep_bits)


class UpdateReader:
    """Decodes the updates of one job. The last sparse ones are remembered: a member meets its own when it sends it,
    when it goes on ahead of the Commit, and in the Commit."""

    def __init__(self, codec: Codec, size: int, keep: int) -> None:
        self._codec, self._size, self._keep = codec, size, keep
        self._known: OrderedDict[bytes, Update] = OrderedDict()

    def read(self, data: bytes) -> Update:
        """Raises BadUpdate."""
        name = blake3_hash(data)
        known = self._known.get(name)
        if known is not None:
            return known
        update = decode_update(data, self._codec, self._size, self._keep)
        if update.indices is not None:
            self._known[name] = update
            if len(self._known) > REMEMBERED_MAX:
                self._known.popitem(last=False)
        return update


def _finite(values: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise BadUpdate(f"An update was refused: {what} at {bad[0]} is not a finite number.")
    return values


def _decode_int8(body: Bytes, size: int) -> Update:
    chunks = -(-size // CHUNK)
    scales = _finite(body[: 4 * chunks].copy().view("<f4").astype(np.float32), "the scale of a chunk")
    if np.signbit(scales).any():
        raise BadUpdate("An update was refused: a chunk's scale is negative.")
    levels = body[4 * chunks :].view(np.int8)
    if (levels == -128).any():
        raise BadUpdate("An update was refused: a level of -128 is never written.")
    with np.errstate(over="ignore"):
        values = levels.astype(np.float32) * np.repeat(scales, CHUNK)[:size]
    return Update(size, _finite(values, "a value"))


def _decode_sparse(body: Bytes, size: int, keep_bits: int) -> Update:
    indices, values, at, start = [], [], 0, 0
    for count, record in sparse_records(size, keep_bits):
        rows = body[at : at + count * record.fields[3]].reshape(count, record.fields[3])
        chunk_indices, chunk_values = _decode_records(rows, record, start)
        offsets = start + CHUNK * np.arange(count, dtype=np.int64)[:, None]
        indices.append((chunk_indices + offsets).ravel())
        values.append(chunk_values.ravel())
        at += rows.size
        start += count * record.length
    return Update(size, np.concatenate(values), np.concatenate(indices))


def _decode_records(rows: Bytes, record: SparseRecord, start: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`count` records of one form -> indices within each chunk and values, both [count, k]."""
    count, k = len(rows), record.k
    low_at, high_at, values_at, _ = record.fields

    magnitudes = (rows[:, :4].copy().view("<u2").astype(np.uint32) << 16).view(np.float32)
    _finite(magnitudes.ravel(), "a magnitude")
    if np.signbit(magnitudes).any() or (magnitudes[:, 0] > magnitudes[:, 1]).any():
        raise BadUpdate("An update was refused: a chunk's magnitudes are negative or not in order.")

    high = np.unpackbits(rows[:, high_at:values_at], axis=1, bitorder="little")
    if high[:, record.high_length :].any() or (high.sum(axis=1, dtype=np.int64) != k).any():
        raise BadUpdate(f"An update was refused: a chunk does not mark exactly {k} places.")
    places = _marked(high.view(np.bool_), k) - np.arange(k)

    low = np.unpackbits(rows[:, low_at:high_at], axis=1, bitorder="little")
    if low[:, k * record.low_bits :].any():
        raise BadUpdate("An update was refused: padding after the low bits is not zero.")
    powers = 1 << np.arange(record.low_bits, dtype=np.int64)
    lows = low[:, : k * record.low_bits].reshape(count, k, record.low_bits) @ powers
    indices: NDArray[np.int64] = (places << record.low_bits) | lows
    if (np.diff(indices, axis=1) <= 0).any() or (indices[:, -1] >= record.length).any():
        raise BadUpdate(f"An update was refused: indices after {start} are out of order or out of range.")

    bits = np.unpackbits(rows[:, values_at:], axis=1, bitorder="little")
    if bits[:, 2 * k :].any():
        raise BadUpdate("An update was refused: padding after the values is not zero.")
    pairs = bits[:, : 2 * k].reshape(count, k, 2)
    values = np.where(pairs[:, :, 1] == 1, magnitudes[:, 1:2], magnitudes[:, 0:1])
    return indices, np.where(pairs[:, :, 0] == 1, -values, values)
