"""Quantities with units: bytes, durations and rates, as people write them and as code uses them.

Inside Shoal a quantity is a plain number whose name ends in its unit (`latency_ms`, `size_bytes`, `rate_bps`).
This room turns text into such numbers and back; `Bucket` is a rate with a burst, `Ranges` are parts of
a file, `money` counts in whole millionths.
"""

from shoal.quantities.buckets import Bucket
from shoal.quantities.ranges import Range, Ranges, are_in_order, covered, joined
from shoal.quantities.units import (
    BadQuantity,
    format_bytes,
    format_count,
    format_duration_s,
    format_flops,
    format_rate_bps,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_duration_s,
)

__all__ = [
    "BadQuantity",
    "Bucket",
    "Range",
    "Ranges",
    "are_in_order",
    "covered",
    "format_bytes",
    "format_count",
    "format_duration_s",
    "format_flops",
    "format_rate_bps",
    "joined",
    "parse_bytes",
    "parse_bytes_per_s",
    "parse_count",
    "parse_duration_s",
]
