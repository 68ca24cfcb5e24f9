"""From a position in a pass to the sample that stands there: a seeded shuffle that is computed, never stored.

A pass is cut into windows of WINDOW_BLOCKS blocks of BLOCK_SAMPLES samples each. Which blocks make up a window is a
keyed permutation of all blocks; inside a window, positions are permuted freely. So a share (a few adjacent positions)
draws from blocks all over the data, and yet touches at most WINDOW_BLOCKS + 2 stretches of it. A rotation by a keyed
offset moves the block borders in every pass. Data of up to BLOCK_SAMPLES * WINDOW_BLOCKS samples is shuffled fully.

Each permutation is a Feistel network of FEISTEL_ROUNDS rounds on the next even number of bits, walked along its cycle
until it falls inside the domain (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Its round function
is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014): good mixing, not a cipher. Keys are BLAKE3 of seed and
pass, so that anyone who knows the job knows the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.identity import hash_of_parts
from shoal.protocol.training import SampleRange

BLOCK_SAMPLES = 4096
WINDOW_BLOCKS = 16
FEISTEL_ROUNDS = 6
_WINDOW_SAMPLES = BLOCK_SAMPLES * WINDOW_BLOCKS
_MASK = (1 << 64) - 1
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class PassOrder:
    """The order of one pass over `samples` samples."""

    samples: int
    seed: int
    pass_number: int

    def index(self, position: int) -> int:
        """The sample at `position`, both from 0. A permutation of range(samples)."""
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} is not in a pass of {self.samples} samples")
        window, offset = divmod(position, _WINDOW_SAMPLES)
        size = min(_WINDOW_SAMPLES, self.samples - window * _WINDOW_SAMPLES)
        offset = _permute(offset, size, self._keys(b"window", window))
        slot, inside = divmod(offset, BLOCK_SAMPLES)
        slot += window * WINDOW_BLOCKS
        blocks = self.samples // BLOCK_SAMPLES
        block = _permute(slot, blocks, self._keys(b"blocks", 0)) if slot < blocks else slot  # the tail stays last
        return (block * BLOCK_SAMPLES + inside + self._rotation()) % self.samples

    def indices(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """`index` of every position in [start, stop): int64, shape (stop - start,)."""
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"[{start}, {stop}) is not in a pass of {self.samples} samples")
        parts: list[npt.NDArray[np.int64]] = []
        blocks = self.samples // BLOCK_SAMPLES
        block_keys, rotation = self._keys(b"blocks", 0), self._rotation()
        while start < stop:
            window, offset = divmod(start, _WINDOW_SAMPLES)
            first = window * _WINDOW_SAMPLES
            size = min(_WINDOW_SAMPLES, self.samples - first)
            end = min(stop, first + size)
            inside = _permute_all(np.arange(offset, end - first, dtype=np.uint64), size, self._keys(b"window", window))
            slot = inside // np.uint64(BLOCK_SAMPLES) + np.uint64(window * WINDOW_BLOCKS)
            full = slot < np.uint64(blocks)
            if full.any():
                slot[full] = _permute_all(slot[full], blocks, block_keys)
            index = slot * np.uint64(BLOCK_SAMPLES) + inside % np.uint64(BLOCK_SAMPLES) + np.uint64(rotation)
            parts.append((index % np.uint64(self.samples)).astype(np.int64))
            start = end
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _rotation(self) -> int:
        return self._keys(b"rotation", 0)[0] % self.samples

    def _keys(self, purpose: bytes, number: int) -> tuple[int, ...]:
        parts = (purpose, _bytes(self.seed), _bytes(self.pass_number), _bytes(number))
        first = hash_of_parts("sample order 1", (*parts, b"\x00"))
        second = hash_of_parts("sample order 1", (*parts, b"\x01"))
        stream = first + second
        return tuple(int.from_bytes(stream[at * 8 : at * 8 + 8], "little") for at in range(FEISTEL_ROUNDS))


def sample_indices(seed: int, samples: int, ranges: tuple[SampleRange, ...]) -> npt.NDArray[np.int64]:
    """The samples of a share, in the order in which they are to be trained on: int64, shape (share's samples,)."""
    parts = [PassOrder(samples, seed, piece.pass_number).indices(piece.start, piece.stop) for piece in ranges]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _bytes(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _half_bits(domain: int) -> int:
    return max(1, ((domain - 1).bit_length() + 1) // 2)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _permute(value: int, domain: int, keys: tuple[int, ...]) -> int:
    """A keyed permutation of range(domain). The walk ends: `value` itself lies on the cycle and in the domain."""
    if domain == 1:
        return 0
    half = _half_bits(domain)
    mask = (1 << half) - 1
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_mix((right + key) & _MASK) & mask)
        value = (left << half) | right
        if value < domain:
            return value


def _permute_all(values: npt.NDArray[np.uint64], domain: int, keys: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """`_permute` of every value."""
    result = values.copy()
    if domain == 1 or not len(values):
        return result
    half, mask = np.uint64(_half_bits(domain)), np.uint64((1 << _half_bits(domain)) - 1)
    todo = np.arange(len(result))
    while len(todo):
        left, right = result[todo] >> half, result[todo] & mask
        for key in keys:
            mixed = right + np.uint64(key)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MIX_1)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MIX_2)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        walked = (left << half) | right
        result[todo] = walked
        todo = todo[walked >= np.uint64(domain)]
    return result
