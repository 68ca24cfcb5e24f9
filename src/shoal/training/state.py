"""Shared state: named fp32 tensors in one flat buffer, and the bytes and hash that name it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import numpy as np
from blake3 import blake3
from msgspec import Meta
from numpy.typing import NDArray

from shoal.errors import BadRecord

Floats = NDArray[np.float32]

HEADER_MAX_BYTES = 16 << 20
TENSORS_MAX = 65_536
HASH_THREADS = 1
"""One core hashes several GB a second: more threads would take cores from whoever is computing."""
MOMENTUM_PREFIX = "outer_momentum."


class BadState(BadRecord):
    """Bytes that should be a shared or private state are not, or are of another model."""

    code = "SH-250"


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor's place in the flat buffer."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Layout:
    """Which tensors there are, in the order of their names (by code point), one after another without gaps."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Iterable[int]]) -> Layout:
        tensors, start = [], 0
        for name in sorted(shapes):
            tensor = Tensor(name, tuple(int(side) for side in shapes[name]), start)
            tensors.append(tensor)
            start = tensor.stop
        return cls(tuple(tensors))

    @cached_property
    def size(self) -> int:
        """Numbers in the flat buffer."""
        return self.tensors[-1].stop if self.tensors else 0

    def views(self, flat: Floats) -> dict[str, Floats]:
        return {tensor.name: flat[tensor.start : tensor.stop].reshape(tensor.shape) for tensor in self.tensors}


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=1 << 40)], ...], Meta(max_length=8)]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


_DTYPES = {"F32": 4, "I64": 8, "U8": 1}


def safetensors_header(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """(name, dtype, shape) in the order of the data -> length-prefixed safetensors header, padded to 8 bytes.

    Always the same bytes for the same entries: no metadata, no white space but the padding. Format:
    https://huggingface.co/docs/safetensors
    """
    table: dict[str, _Entry] = {}
    start = 0
    for name, dtype, shape in entries:
        stop = start + _DTYPES[dtype] * math.prod(shape)
        table[name] = _Entry(dtype, shape, (start, stop))
        start = stop
    text = msgspec.json.encode(table)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


_HEADER = msgspec.json.Decoder(dict[str, _Entry])


def read_safetensors(data: bytes | memoryview, what: str) -> tuple[bytes, dict[str, _Entry], memoryview]:
    """-> (header bytes, its entries, the data section). Raises BadState unless the entries fill the data exactly and
    in order, as `safetensors_header` writes them."""
    view = memoryview(data)
    if len(view) < 8:
        raise BadState(f"{what} has {len(view)} bytes: too short for safetensors.")
    (length,) = struct.unpack("<Q", view[:8])
    if length > min(HEADER_MAX_BYTES, len(view) - 8):
        raise BadState(f"{what} is truncated or not safetensors: its header claims {length} bytes.")
    try:
        entries = _HEADER.decode(view[8 : 8 + length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadState(f"{what} is not safetensors as Shoal writes it: {error}.") from error
    if len(entries) > TENSORS_MAX:
        raise BadState(f"{what} has {len(entries)} tensors; the limit is {TENSORS_MAX}.")
    body = view[8 + length :]
    at = 0
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise BadState(f"{what}: tensor {name!r} is {entry.dtype}; only {', '.join(_DTYPES)} are used.")
        stop = at + _DTYPES[entry.dtype] * math.prod(entry.shape)
        if entry.data_offsets != (at, stop):
            raise BadState(f"{what}: tensor {name!r} does not lie where its shape says.")
        at = stop
    if at != len(body):
        raise BadState(f"{what} holds {len(body)} bytes of tensors, its header says {at}.")
    return bytes(view[: 8 + length]), entries, body


@dataclass(frozen=True)
class SharedState:
    """What all members agree on. Buffers are flat float32 in the order of `layout` and are never written again."""

    layout: Layout
    parameters: Floats
    momentum: Floats | None = None
    """Of the outer step; only with Nesterov."""

    MEDIA_TYPE: ClassVar[str] = "application/x-shoal-state"

    @classmethod
    def start(cls, layout: Layout, parameters: Floats, *, momentum: bool) -> SharedState:
        """The state before the first round; outer momentum, where there is one, is zero."""
        return cls(layout, parameters, np.zeros_like(parameters) if momentum else None)

    @cached_property
    def header(self) -> bytes:
        entries = [(tensor.name, "F32", tensor.shape) for tensor in self.layout.tensors]
        if self.momentum is not None:
            entries += [(MOMENTUM_PREFIX + name, dtype, shape) for name, dtype, shape in entries]
        return safetensors_header(entries)

    @cached_property
    def hash(self) -> bytes:
        """BLAKE3 of `to_bytes()`, 32 bytes."""
        hasher = blake3(self.header, max_threads=HASH_THREADS)
        for buffer in self._buffers:
            hasher.update(_little(buffer).data.cast("B"))
        return hasher.digest()

    @property
    def _buffers(self) -> tuple[Floats, ...]:
        return (self.parameters,) if self.momentum is None else (self.parameters, self.momentum)

    @property
    def size(self) -> int:
        """Bytes of the file form."""
        return len(self.header) + sum(buffer.nbytes for buffer in self._buffers)

    def to_bytes(self) -> bytes:
        return b"".join([self.header, *(_little(buffer).tobytes() for buffer in self._buffers)])

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(self.header)
            for buffer in self._buffers:
                file.write(_little(buffer).data.cast("B"))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, what: str = "A shared state") -> SharedState:
        """Raises BadState for anything that `to_bytes` would not have written, and for numbers that are not finite."""
        header, entries, body = read_safetensors(data, what)
        shapes = {name: entry.shape for name, entry in entries.items() if not name.startswith(MOMENTUM_PREFIX)}
        if not shapes:
            raise BadState(f"{what} holds no tensors.")
        layout = Layout.of(shapes)
        flat = np.frombuffer(body, dtype="<f4").astype(np.float32)
        with_momentum = len(entries) != len(shapes)
        if flat.size != layout.size * (2 if with_momentum else 1):
            raise BadState(f"{what} holds {flat.size} numbers; its tensors say otherwise.")
        state = cls(layout, flat[: layout.size], flat[layout.size :] if with_momentum else None)
        if state.header != header:
            raise BadState(f"{what} is not written the one way that a shared state is written.")
        if not np.isfinite(flat).all():
            raise BadState(f"{what} holds numbers that are not finite.")
        return state

    @classmethod
    def read(cls, path: Path) -> SharedState:
        return cls.from_bytes(path.read_bytes(), f"The state in {path}")


def _little(buffer: Floats) -> Floats:
    """Little-endian and contiguous, without a copy where it already is."""
    return np.ascontiguousarray(buffer, dtype="<f4")
