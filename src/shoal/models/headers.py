"""Where in a safetensors file its tensors lie: what its header says (no torch).

The format: the header's length as 8 bytes, little-endian; the header, JSON; the tensors' bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.models.configs import BadModel
from shoal.quantities import Range, Ranges, covered

HEADER_MAX_BYTES = 100_000_000
"""As the format's own library has it."""
ITEM_BYTES = 4
"""Of a number of a tensor that a stage has loaded: it computes in float32, however it is stored."""
LENGTH_BYTES = 8
_Offset = Annotated[int, Meta(ge=0, le=1 << 60)]


class _Tensor(msgspec.Struct):
    data_offsets: tuple[_Offset, _Offset]
    shape: tuple[_Offset, ...]


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, Range]
    """By name, in bytes of the file."""
    numbers: Mapping[str, int]
    """How many each of them has."""
    data_start: int
    """Where the header ends."""
    file_bytes: int

    def loaded_bytes(self, part: Ranges = ()) -> int:
        """What the tensors that lie in these ranges take when loaded; none: all."""
        return sum(
            max(ITEM_BYTES * self.numbers[name], stop - start)
            for name, (start, stop) in self.tensors.items()
            if not part or covered(start, stop, part)
        )


def header_part(file: Path) -> Ranges:
    """Where the header of a file lies of which the first bytes, at least, are there. Raises BadModel."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(0)
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
    except OSError as error:
        raise BadModel(f"{file} cannot be read: {error.strerror}.") from error
    if length > HEADER_MAX_BYTES or LENGTH_BYTES + length > size:
        raise BadModel(f"{file.name} is not a whole safetensors file: {length} of its {size} bytes are header.")
    return ((0, LENGTH_BYTES + length),)


def read_header(file: Path, part: Ranges = ()) -> Header:
    """`part`: which bytes of the file are there; none: all. Raises BadModel."""
    ((_, start),) = header_part(file)
    if part and not covered(0, start, part):
        raise BadModel(f"{file.name}: its header was not fetched; the gateway has to name it.")
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(LENGTH_BYTES)
            fields = msgspec.json.decode(opened.read(start - LENGTH_BYTES), type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        found = {name: msgspec.json.decode(field, type=_Tensor) for name, field in fields.items()}
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise BadModel(f"{file} is not a whole safetensors file: {error}.") from error
    end = max((one.data_offsets[1] for one in found.values()), default=0)
    if not part and start + end != size:
        raise BadModel(f"{file} is not a whole safetensors file: of {size} bytes its tensors end at {start + end}.")
    places = {name: (start + one.data_offsets[0], start + one.data_offsets[1]) for name, one in found.items()}
    return Header(places, {name: math.prod(one.shape) for name, one in found.items()}, start, size)
