"""Operations that give a row the same bits whatever other rows are computed with it.

A token's states must not depend on what happens to be in the batch: a session that is replayed after a loss, in large
steps, has to arrive at the very numbers that it had when it went one token at a time. Libraries do not promise that:
which kernel they take, and with it the order of summation, follows from the number of rows. Two forms of a matrix
product keep to it, each where it is the faster one:

- `Packed`: oneDNN with the weights in its own order; any number of rows in one product.
- `Tiled`: MKL with tiles of 2 and 3 rows, for which it has one kernel; on Intel's processors with AVX-512 as fast as
  that for a single row.

A form is tried on a machine with each shape of weights before it is taken, and the whole engine when it starts
(`StageEngine.exact`). An activation is made of operations that are exactly rounded, or that have the same bits in
vectors and at their ends. What was measured, and what else was tried: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import nn

from shoal.devices.names import processor_name

TILE = 3
BLOCK_BYTES = 1 << 20
"""Of weights that several tiles are multiplied with before the next ones are read."""
TRIED_ROWS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33)
"""Numbers of rows that have to agree with the same rows of a product of ALL_ROWS."""
ALL_ROWS = 64

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Rows [n, in] -> [n, out]."""


class Packed:
    def __init__(self, weight: torch.Tensor) -> None:
        """`weight` [out, in], in memory; it is not needed any more. Raises where torch has no oneDNN."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        done: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, None, "none", [], "")
        return done


class Tiled:
    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.contiguous()
        self._across = self._weight.t()
        self._width, inner = weight.shape
        self._block = max(64, BLOCK_BYTES // (weight.element_size() * inner) // 64 * 64)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) <= TILE:
            return torch.mm(rows, self._across)
        done = rows.new_empty(len(rows), self._width)
        parts = tiles(len(rows))
        given = torch.split(rows, parts)
        for block, columns in zip(
            torch.split(self._weight, self._block), torch.split(done, self._block, 1), strict=True
        ):
            across = block.t()
            for tile, out in zip(given, torch.split(columns, parts), strict=True):
                torch.mm(tile, across, out=out)
        return done


class Whole:
    """As torch has it: for devices on which nothing else is known to be better."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._across = weight.contiguous().t()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.mm(rows, self._across)


class Twofold:
    """Takes a single row twice, where libraries have another path for that."""

    def __init__(self, product: Product) -> None:
        self._product = product

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._product(rows) if len(rows) > 1 else self._product(rows.expand(2, -1))[:1]


Form: TypeAlias = Callable[[torch.Tensor], Product]


def tiles(rows: int) -> list[int]:
    """`rows` >= 2 as a sum of threes and twos."""
    threes, rest = divmod(rows, TILE)
    if rest == 0:
        return [3] * threes
    return [3] * threes + [2] if rest == 2 else [3] * (threes - 1) + [2, 2]


class Forms:
    """In which form products are made here: for weights of one shape always the same, also on another machine with
    such a processor."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, torch.dtype, torch.device], Form] = {}

    def linears(self, maps: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> list[nn.Module]:
        """Of linear maps (weight [out, in], bias [out]) that are given the same rows: one product, which costs less
        than several. All of them have a bias, or none."""
        (weight, bias), *others = maps
        if not others:
            return [Linear(self.product(weight), bias)]
        biases = [one for _, one in maps if one is not None]
        whole = Linear(self.product(torch.cat([one for one, _ in maps])), torch.cat(biases) if biases else None)
        shared = Shared(whole, [len(one) for one, _ in maps])
        return [Part(shared, at) for at in range(len(maps))]

    def product(self, weight: torch.Tensor) -> Product:
        """Of rows with `weight` [out, in]: the first form that agrees with itself, or torch's own."""
        about = (weight.shape, weight.dtype, weight.device)
        if about in self._known:
            return self._known[about](weight)
        for form in forms_for(weight.device):
            try:
                product = form(weight)
                agrees = gives_the_same(product, weight)
            except (RuntimeError, AttributeError):  # torch was built without it
                continue
            if agrees:
                self._known[about] = form
                return product
        self._known[about] = Whole
        return Whole(weight)


def forms_for(device: torch.device) -> Sequence[Form]:
    """The fastest first."""
    if device.type != "cpu":
        return (Whole,)
    tiled, packed = (lambda weight: Twofold(Tiled(weight))), (lambda weight: Twofold(Packed(weight)))
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" in processor_name():
        return (tiled, packed)
    return (Packed, packed, tiled)


def gives_the_same(product: Product, weight: torch.Tensor) -> bool:
    """Whether a row has the same bits whatever the number of rows."""
    dice = torch.Generator().manual_seed(1)
    rows = torch.randn(ALL_ROWS, weight.shape[1], generator=dice).to(weight)
    together = product(rows)
    return all(
        torch.equal(product(rows[:count]), together[:count]) and torch.equal(product(rows[-count:]), together[-count:])
        for count in TRIED_ROWS
    )


class Linear(nn.Module):
    """As nn.Linear, of a product and a bias [out]."""

    def __init__(self, product: Product, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._product = product
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.view(-1, rows.shape[-1])
        done = self._product(flat)
        if self.bias is not None:
            done += self.bias
        return done.view(*rows.shape[:-1], -1)


class Shared:
    """A linear map of which several modules give their part, of the same rows one after another."""

    def __init__(self, whole: Linear, widths: Sequence[int]) -> None:
        self._whole, self._widths = whole, list(widths)
        self._rows: torch.Tensor | None = None
        self._parts: Sequence[torch.Tensor] = ()

    def part(self, rows: torch.Tensor, at: int) -> torch.Tensor:
        if rows is not self._rows:
            self._rows, self._parts = rows, self._whole(rows).split(self._widths, -1)
        part = self._parts[at]
        if at + 1 == len(self._widths):
            self._rows, self._parts = None, ()
        return part


class Part(nn.Module):
    """One of the maps of a Shared."""

    def __init__(self, shared: Shared, at: int) -> None:
        super().__init__()
        self._shared, self._at = shared, at

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._shared.part(rows, self._at)


class RmsNorm(nn.Module):
    """As the many of `transformers`, to the bit, in one call."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._epsilon = epsilon

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(rows, self.weight.shape, self.weight, self._epsilon)


class Silu(nn.Module):
    """x / (1 + exp(-x)). The library's own has other bits in the last elements of a tensor than in the others."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values / values.neg().exp_().add_(1)
