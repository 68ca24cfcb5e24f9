"""Attention over many sessions at once, each with the keys and values that it has kept.

As in `rows`, what a position gets does not depend on what is computed beside it, nor on how many positions are computed
in a step: scores are taken over all kept positions up to a multiple of BLOCK, those ahead are masked, and sums over
positions are made block by block, in order. What is masked adds exact zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shoal.inference.blocks import BLOCK, padded

NAME = "shoal"
ROWS_MIN = 4
"""Products of fewer rows take other paths in the library: on AVX2 those of 1 to 3, on AVX-512 those of 1."""


class Kept:
    """Keys and values of one session in one stage, by layer."""

    def __init__(self, first: int, layers: int, heads: int, head_size: int, dtype: torch.dtype, device: Any) -> None:
        self._first = first
        self._shape = (heads, head_size)
        self._dtype, self._device = dtype, device
        self._keys: list[torch.Tensor] = [self._zeros(head_size, 0) for _ in range(layers)]
        """[heads, head size, room]: products with them are then the same for every number of rows but one."""
        self._values: list[torch.Tensor] = [self._zeros(0, head_size) for _ in range(layers)]
        self.room = 0
        """Positions for which there is room."""

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(self._shape[0], *shape, dtype=self._dtype, device=self._device)

    def reserve(self, positions: int) -> None:
        """Make room for so many positions."""
        if positions <= self.room:
            return
        room = padded(positions)
        size = self._shape[1]
        for at, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            self._keys[at] = self._zeros(size, room)
            self._keys[at][..., : self.room] = keys
            self._values[at] = self._zeros(room, size)
            self._values[at][:, : self.room] = values
        self.room = room

    def take_over(self, other: Kept, positions: int) -> None:
        """Copy the first positions of another session."""
        for mine, its in zip(self._keys, other._keys, strict=True):
            mine[..., :positions] = its[..., :positions]
        for mine, its in zip(self._values, other._values, strict=True):
            mine[:, :positions] = its[:, :positions]

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """`keys`, `values`: [heads, positions, head size]."""
        stop = start + keys.shape[1]
        self._keys[layer - self._first][..., start:stop] = keys.transpose(1, 2)
        self._values[layer - self._first][:, start:stop] = values

    def read(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [heads, head size, stop], values [heads, stop, head size]."""
        return self._keys[layer - self._first][..., :stop], self._values[layer - self._first][:, :stop]


@dataclass
class Run:
    """Positions `start` to `start + count` - 1 of a session, in one step."""

    kept: Kept
    start: int
    count: int
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + self.count

    def mask(self, window: int | None, device: Any) -> torch.Tensor | None:
        """Which of the kept positions, padded, a position must not see: [count, padded stop]. None when it sees all."""
        if window not in self._masks:
            seen = torch.arange(padded(self.stop), device=device)[None]
            at = torch.arange(self.start, self.stop, device=device)[:, None]
            hidden = seen > at
            if window is not None:
                hidden |= seen <= at - window
            self._masks[window] = hidden if bool(hidden.any()) else None
        return self._masks[window]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    runs: Sequence[Run],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What `transformers` calls in each layer. `query` [1, heads, rows, head size], `key` and `value` [1, key heads,
    rows, head size]; the rows are those of `runs`, one after another. Gives [1, rows, heads, head size]."""
    done, row = [], 0
    for run in runs:
        rows = slice(row, row + run.count)
        run.kept.write(module.layer_idx, run.start, key[0, :, rows], value[0, :, rows])
        keys, values = run.kept.read(module.layer_idx, padded(run.stop))
        mask = run.mask(sliding_window, query.device)
        done.append(attend_one(query[0, :, rows], keys, values, mask, scaling, softcap))
        row += run.count
    return (torch.cat(done) if len(done) > 1 else done[0])[None], None


def attend_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """`query` [heads, n, size], `keys` [key heads, size, m], `values` [key heads, m, size], `mask` [n, m] ->
    [n, heads, size]. m is a multiple of BLOCK."""
    heads, count, size = query.shape
    groups, rows = keys.shape[0], heads // keys.shape[0] * count
    asked = (query * scaling).reshape(groups, rows, size)
    if rows < ROWS_MIN:
        asked = functional.pad(asked, (0, 0, 0, ROWS_MIN - rows))
    scores = torch.bmm(asked, keys)
    if softcap is not None:
        scores = torch.tanh(scores.div_(softcap)).mul_(softcap)
    if mask is not None:
        scores[:, :rows].view(groups, -1, count, keys.shape[2]).masked_fill_(mask, float("-inf"))
    weights = scores.softmax(-1)
    mean = torch.bmm(weights[..., :BLOCK], values[:, :BLOCK])
    for at in range(BLOCK, keys.shape[2], BLOCK):
        mean += torch.bmm(weights[..., at : at + BLOCK], values[:, at : at + BLOCK])
    return mean[:, :rows].reshape(heads, count, size).transpose(0, 1)


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
