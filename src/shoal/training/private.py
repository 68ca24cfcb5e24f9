"""Private state: what a member carries from round to round besides the shared state, and commits to by hash."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from blake3 import blake3

from shoal.training.state import HASH_THREADS, BadState, Floats, read_safetensors, safetensors_header


@dataclass(frozen=True)
class PrivateState:
    """Immutable. Its file form is safetensors with exactly these three tensors, always the same bytes."""

    optimizer: Floats
    """The inner optimizer's moments, flat; of a length that the optimizer knows."""
    residual: Floats
    """What was learned and not sent yet, flat."""
    step: int
    """Inner steps behind it."""

    @classmethod
    def fresh(cls, moments: int, parameters: int) -> PrivateState:
        """Before the first round: zeros."""
        return cls(np.zeros(moments, dtype=np.float32), np.zeros(parameters, dtype=np.float32), 0)

    def _parts(self) -> list[bytes | memoryview]:
        header = safetensors_header(
            [
                ("optimizer", "F32", self.optimizer.shape),
                ("residual", "F32", self.residual.shape),
                ("step", "I64", (1,)),
            ]
        )
        moments = np.ascontiguousarray(self.optimizer, dtype="<f4").data.cast("B") if self.optimizer.size else b""
        residual = np.ascontiguousarray(self.residual, dtype="<f4").data.cast("B")
        return [header, moments, residual, self.step.to_bytes(8, "little")]

    @cached_property
    def hash(self) -> bytes:
        hasher = blake3(max_threads=HASH_THREADS)
        for part in self._parts():
            hasher.update(part)
        return hasher.digest()

    @property
    def size(self) -> int:
        """Bytes of the file form."""
        return sum(len(part) for part in self._parts())

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            for part in self._parts():
                file.write(part)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, what: str = "A private state") -> PrivateState:
        """Raises BadState for anything that `write` would not have written."""
        _, entries, body = read_safetensors(data, what)
        if list(entries) != ["optimizer", "residual", "step"] or entries["step"].shape != (1,):
            raise BadState(f"{what} does not hold optimizer, residual and step.")
        if [entry.dtype for entry in entries.values()] != ["F32", "F32", "I64"]:
            raise BadState(f"{what} holds tensors of the wrong types.")
        _, moments_stop = entries["optimizer"].data_offsets
        _, residual_stop = entries["residual"].data_offsets
        step = int.from_bytes(body[residual_stop:], "little", signed=True)
        if step < 0:
            raise BadState(f"{what} counts {step} steps.")
        state = cls(
            np.frombuffer(body[:moments_stop], dtype="<f4").astype(np.float32),
            np.frombuffer(body[moments_stop:residual_stop], dtype="<f4").astype(np.float32),
            step,
        )
        if not (np.isfinite(state.optimizer).all() and np.isfinite(state.residual).all()):
            raise BadState(f"{what} holds numbers that are not finite.")
        return state

    @classmethod
    def read(cls, path: Path) -> PrivateState:
        return cls.from_bytes(path.read_bytes(), f"The private state in {path}")
