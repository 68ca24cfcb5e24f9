"""The cheapest gang as an exact solver finds it (HiGHS, by integer programming), for tests and benchmarks."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

Costs, Places = NDArray[np.int64], NDArray[np.float64]


def apart_ms(positions: Places, heights: Places) -> Places:
    """[n, n]: the round trip between any two."""
    found = np.linalg.norm(positions[:, None] - positions[None, :], axis=2) + heights[:, None] + heights[None, :]
    np.fill_diagonal(found, 0)
    return found


def exact_cost(costs: Costs, positions: Places, heights: Places, size: int, limit_ms: float) -> float | None:
    """What the cheapest gang costs; None where there is none."""
    count, apart = len(costs), apart_ms(positions, heights)
    one = np.eye(count)
    far = [one[a] + one[b] for a, b in itertools.combinations(range(count), 2) if apart[a, b] > limit_ms]
    constraints = [LinearConstraint(np.ones(count), size, size)]
    constraints += [LinearConstraint(np.array(far), ub=1)] if far else []
    found = milp(costs, integrality=np.ones(count), bounds=Bounds(0, 1), constraints=constraints)
    return float(found.fun) if found.success else None
