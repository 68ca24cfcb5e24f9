"""Operations that give a row the same bits whatever other rows are computed with it.

A token's states must not depend on what happens to be in the batch: a session that is replayed after a loss, in large
steps, has to arrive at the very numbers that it had when it went one token at a time. Libraries do not promise that:
which kernel they take, and with it the order of summation, follows from the number of rows.

- Matrix products are made of tiles of 2 and 3 rows. For these MKL has one kernel, as fast as that for a single row, and
  where the weights are in the processor's cache as fast as that for many; so more rows go through the weights in
  blocks that stay there.
- An activation is made of operations that are exactly rounded, or that have the same bits in vectors and at their ends.

Whether that holds on a machine is tried when an engine starts (`StageEngine.exact`). What was measured, and what else
was tried: docs/log.md.
"""

from __future__ import annotations

import torch
from torch import nn

TILE = 3
BLOCK_BYTES = 1 << 20
"""Of weights that several tiles are multiplied with before the next ones are read."""


def tiles(rows: int) -> list[int]:
    """`rows` >= 2 as a sum of threes and twos."""
    threes, rest = divmod(rows, TILE)
    if rest == 0:
        return [3] * threes
    return [3] * threes + [2] if rest == 2 else [3] * (threes - 1) + [2, 2]


class Linear(nn.Module):
    """As nn.Linear; `weight` [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        weight = weight.contiguous()
        self._tiled = tiles_agree(weight)
        if not self._tiled:  # narrow: whole products with it agree when it lies the other way
            weight = weight.t().contiguous().t()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._across = self.weight.t()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._width, inner = weight.shape
        self._block = max(64, BLOCK_BYTES // (weight.element_size() * inner) // 64 * 64)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.view(-1, rows.shape[-1])
        count = len(flat)
        if count == 1:
            done = torch.mm(flat.expand(2, -1), self._across)[:1]
        elif self._tiled and count > TILE:
            done = self._by_tiles(flat)
        else:
            done = torch.mm(flat, self._across)
        if self.bias is not None:
            done += self.bias
        return done.view(*rows.shape[:-1], -1)

    def _by_tiles(self, rows: torch.Tensor) -> torch.Tensor:
        done = rows.new_empty(len(rows), self._width)
        parts = tiles(len(rows))
        given = torch.split(rows, parts)
        for block, columns in zip(
            torch.split(self.weight, self._block), torch.split(done, self._block, 1), strict=True
        ):
            across = block.t()
            for tile, out in zip(given, torch.split(columns, parts), strict=True):
                torch.mm(tile, across, out=out)
        return done


def tiles_agree(weight: torch.Tensor) -> bool:
    """Whether tiles of both sizes give a row the same bits."""
    dice = torch.Generator().manual_seed(1)
    rows = torch.randn(TILE, weight.shape[1], generator=dice).to(weight)
    return torch.equal(torch.mm(rows[:2], weight.t()), torch.mm(rows, weight.t())[:2])


class Silu(nn.Module):
    """x / (1 + exp(-x)). The library's own has other bits in the last elements of a tensor than in the others."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values / values.neg().exp_().add_(1)
