"""Which dtypes are worth computing in on a device."""

from __future__ import annotations

from shoal.protocol.offers import Device

FASTER_BY = 1.1
"""A narrower dtype must beat float32 by this to count: below it, the difference is noise and the precision is lost for
nothing. (On CPUs without bfloat16 units it measures up to a hundred times slower.)"""


def fast_dtypes(device: Device) -> tuple[str, ...]:
    """The dtypes that measured at least `FASTER_BY` times as fast as float32 on this device, fastest first, then
    float32. When float32 was not measured nothing can be compared, and only float32 is named."""
    measured = {one.dtype: one.flops for one in device.throughput}
    base = measured.get("float32", 0.0)
    if base <= 0:
        return ("float32",)
    faster = [dtype for dtype, flops in measured.items() if dtype != "float32" and flops >= FASTER_BY * base]
    return (*sorted(faster, key=lambda dtype: -measured[dtype]), "float32")
