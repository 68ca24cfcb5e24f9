"""Measuring hardware: what a machine can do, never what it claims.

- `measure_in_child` measures in a process of its own, which may crash or run out of memory without harm, and gives a
  `Capability`. Importing this room does not import torch; only the child does.
- `shoal.devices.measure` is that child: FLOP/s of matrix multiplication per dtype, memory size and bandwidth, disk.
- `fast_dtypes(device)` names the dtypes worth computing in: bfloat16 only where it measured faster than float32.

Invariants: every figure is the best of several repetitions, bounded in time; the owner's speed limit is already in it;
what could not be measured is left out, not guessed.
"""

from shoal.devices.child import MeasureFailed, measure_in_child
from shoal.devices.dtypes import fast_dtypes

__all__ = ["MeasureFailed", "fast_dtypes", "measure_in_child"]
