"""Which tokens may be chosen at each of some positions, as bytes that travel. Pure.

A mask is a number with a bit for each token of the vocabulary. What travels is what differs from the mask before,
compressed by zlib: within a text of a JSON answer, one of 128 thousand tokens takes 4 KB, and those after it some tens
of bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def packed(mask: int, before: int = 0) -> bytes:
    """A mask as it travels after another one."""
    changed = mask ^ before
    return zlib.compress(changed.to_bytes(-(-changed.bit_length() // 8), "little"), 1)


def unpacked(masks: Sequence[bytes], vocabulary: int) -> Iterator[NDArray[np.bool_]]:
    """For each of the masks: which tokens are allowed [vocabulary]. Of a mask that is longer, the rest is not even
    unpacked; what it does not reach is forbidden. Raises ValueError for what is no mask."""
    allowed = np.zeros(vocabulary, dtype=np.bool_)
    for mask in masks:
        try:
            changed = zlib.decompressobj().decompress(mask, -(-vocabulary // 8))
        except zlib.error as error:
            raise ValueError(f"a mask of {len(mask)} bytes is not whole") from error
        bits = np.unpackbits(np.frombuffer(changed, dtype=np.uint8), bitorder="little")[:vocabulary]
        allowed = allowed.copy()
        allowed[: len(bits)] ^= bits.astype(np.bool_)
        yield allowed


def allow(masks: Sequence[bytes], tokens: Sequence[int]) -> bool:
    """Whether masks, of one's own making, allow these tokens, each its own; any, where there is no mask."""
    mask = 0
    for changed, token in zip(masks, tokens, strict=False):
        mask ^= int.from_bytes(zlib.decompress(changed), "little")
        if not mask >> token & 1:
            return False
    return True
