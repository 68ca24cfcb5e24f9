"""The outer step, and what is measured of updates before it: the same bytes on every machine.

**Arithmetic.** IEEE-754 binary64, elementwise NumPy operations only, each rounded once to nearest even, in the order in
which they stand here; updates enter in the Commit's order. Nothing is summed by a library: where many numbers become
one (`measure`), they are added in a fixed halving tree of elementwise additions. No fused multiply-add, no BLAS, no
reduction whose order depends on threads, vector width or memory layout. So same Commits, same state hash, on whatever
device or thread count the members train.

**Robustness** is decided elsewhere and once: `rounds` turns what `measure` found into a weight and a scale per update,
which stand in the Commit; here they are only multiplied. Sparse updates are combined sparsely: a coordinate that one
member alone reports keeps that member's weight, as trimming per coordinate would delete the signal, and the cost is
that of the updates and of one copy of the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.training import PARTS_PER_MILLION, Outer, RoundSettings
from shoal.training.state import BadState, SharedState
from shoal.training.updates import BadUpdate, Update

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class WeighedUpdate:
    """An accepted update as the Commit lists it."""

    update: Update
    weight_ppm: int
    scale_ppm: int = PARTS_PER_MILLION

    @property
    def factor(self) -> float:
        """weight * scale: an exact integer, divided and rounded once."""
        return self.weight_ppm * self.scale_ppm / (PARTS_PER_MILLION * PARTS_PER_MILLION)


class OuterStep:
    """Shared state r-1 and the accepted updates of Commit r -> shared state r.

    `plain` (with g = the sum of factor * update, learning rate a): S <- S - a g.
    `nesterov` (Sutskever et al. 2013, as in DiLoCo, Douillard et al. 2023): m <- b m + g; S <- S - a (g + b m).
    A Commit that accepted nothing changes nothing. Keeps one scratch buffer of 8 bytes per parameter.
    """

    def __init__(self, settings: RoundSettings) -> None:
        self._outer = settings.outer
        self._rate = float(settings.outer_learning_rate)
        self._momentum = float(settings.outer_momentum)
        self._sum: Doubles = np.zeros(0)

    def apply(self, state: SharedState, accepted: Sequence[WeighedUpdate]) -> SharedState:
        """Raises BadUpdate for an update of another size, BadState when the result is not finite."""
        size = state.layout.size
        for item in accepted:
            if item.update.size != size:
                raise BadUpdate(f"An update over {item.update.size} numbers cannot be applied to a state of {size}.")
        if not accepted:
            return state
        if self._sum.size != size:
            self._sum = np.zeros(size)
        places = self._touched(accepted)
        for item in accepted:
            where = slice(None) if item.update.indices is None else item.update.indices
            self._sum[where] += item.factor * item.update.values.astype(np.float64)
        gradient = np.array(self._sum[places])  # a copy: the scratch buffer is cleared
        self._sum[places] = 0.0
        if self._outer is Outer.PLAIN:
            moved = _finite(_rounded(state.parameters[places].astype(np.float64) - self._rate * gradient))
            parameters = state.parameters.copy()
            parameters[places] = moved
            return SharedState(state.layout, parameters, state.momentum)
        if state.momentum is None:
            raise BadState("A Nesterov outer step needs a shared state with outer momentum; this one has none.")
        whole = np.zeros(size)
        whole[places] = gradient
        momentum = _rounded(self._momentum * state.momentum.astype(np.float64) + whole)
        step = whole + self._momentum * momentum.astype(np.float64)
        parameters = _finite(_rounded(state.parameters.astype(np.float64) - self._rate * step))
        return SharedState(state.layout, parameters, momentum)

    def _touched(self, accepted: Sequence[WeighedUpdate]) -> slice | NDArray[np.int64]:
        sparse = [item.update.indices for item in accepted if item.update.indices is not None]
        if len(sparse) < len(accepted):
            return slice(None)
        touched = np.zeros(accepted[0].update.size, dtype=np.bool_)
        for indices in sparse:
            touched[indices] = True
        return np.flatnonzero(touched)


def ahead(state: SharedState, own: Update, factor: float) -> NDArray[np.float32]:
    """The start state of a member whose own last update the base does not contain yet: base - factor * update, in the
    arithmetic of the outer step. Returns flat float32 parameters.

    The factor is the outer learning rate times the setting `own_ahead`: how far the member goes on from where it was,
    instead of doing the same work twice.
    """
    where = slice(None) if own.indices is None else own.indices
    parameters = state.parameters.copy()
    moved = parameters[where].astype(np.float64) - factor * own.values.astype(np.float64)
    parameters[where] = _rounded(moved)
    return parameters


def _rounded(values: Doubles) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _finite(parameters: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(parameters).all():
        raise BadState("The outer step gave numbers that are not finite; an accepted update is too large.")
    return parameters


# --- measuring -----------------------------------------------------------------------------------------------------


def tree_sum(values: Doubles) -> float:
    """The sum in a fixed order: the second half is added to the first, elementwise, until one number is left. A list
    whose length is no power of two is continued with zeros."""
    n = values.size
    if n == 0:
        return 0.0
    width = 1 << (n - 1).bit_length()
    half = width // 2
    if half == 0:
        return float(values[0])
    folded = values[:half].copy()
    folded[: n - half] += values[half:]
    while half > 1:
        half //= 2
        folded = folded[:half] + folded[half:]
    return float(folded[0])


@dataclass(frozen=True)
class Measures:
    """What the weights of a round are decided from. Row i and column i belong to the i-th update."""

    norms: tuple[float, ...]
    """Euclidean norms."""
    gram: tuple[tuple[float, ...], ...]
    """Inner products of every two updates; the squared norms on the diagonal."""


def measure(updates: Sequence[Update]) -> Measures:
    """Norms and Gram matrix, in the arithmetic described above. Sparse pairs cost what their overlap costs."""
    if len({update.size for update in updates}) > 1:
        raise BadUpdate("Updates of different sizes cannot be compared.")
    n = len(updates)
    gram = [[0.0] * n for _ in range(n)]
    values = [update.values.astype(np.float64) for update in updates]
    dense = np.zeros(updates[0].size) if n else np.zeros(0)
    for i, one in enumerate(updates):
        where = slice(None) if one.indices is None else one.indices
        dense[where] = values[i]
        for j in range(i, n):
            other = updates[j]
            at = dense if other.indices is None else dense[other.indices]
            gram[i][j] = gram[j][i] = tree_sum(at * values[j])
        dense[where] = 0.0
    norms = tuple(math.sqrt(gram[i][i]) for i in range(n))
    return Measures(norms, tuple(tuple(row) for row in gram))
