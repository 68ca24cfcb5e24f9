"""How much memory sessions take. No torch here: a gateway reckons with it."""

from __future__ import annotations

BLOCK = 128
"""Positions summed at once, and the step in which a session's room grows."""


def padded(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK


def kept_bytes(layers: int, heads: int, head_size: int, positions: int, itemsize: int = 4) -> int:
    """Memory of a session's keys and values in a stage of so many layers."""
    return layers * heads * padded(positions) * 2 * head_size * itemsize
