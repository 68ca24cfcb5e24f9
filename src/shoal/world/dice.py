"""Randomness. Secrets come from the operating system; everything that must be repeatable comes from a seed."""

from __future__ import annotations

import random
import secrets
from typing import Protocol


class Dice(Protocol):
    def bytes(self, count: int) -> bytes: ...

    def uniform(self) -> float:
        """A number in [0, 1)."""
        ...


class SystemDice:
    """The operating system's random source."""

    def bytes(self, count: int) -> bytes:
        return secrets.token_bytes(count)

    def uniform(self) -> float:
        return secrets.randbits(53) / (1 << 53)


class SeededDice:
    """The same throws every time for the same seed. Never for secrets."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def uniform(self) -> float:
        return self._random.random()
