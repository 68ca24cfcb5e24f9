"""Parsing and printing of bytes, durations, rates and counts."""

from __future__ import annotations

import math
import re

from shoal.errors import BadInput


class BadQuantity(BadInput):
    """A text is not a number with one of the expected units."""

    code = "SH-101"


_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][0-9]{1,2})?)\s*([A-Za-zµ/]*)\s*\Z")

_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
               "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_DURATION_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0,
                   "d": 86400.0}  # fmt: skip
_RATE_UNITS = {"": 1, "bit/s": 1, "kbit/s": 10**3, "mbit/s": 10**6, "gbit/s": 10**9,
               "b/s": 8, "kb/s": 8 * 10**3, "mb/s": 8 * 10**6, "gb/s": 8 * 10**9}  # fmt: skip
_BYTE_RATE_UNITS = {
    **_BYTE_UNITS,
    **{f"{unit}/s": size for unit, size in _BYTE_UNITS.items() if unit},
    **{unit: bits / 8 for unit, bits in _RATE_UNITS.items() if unit},
}
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def _parse(text: str | int | float, units: dict[str, int] | dict[str, float], what: str, example: str) -> float:
    if isinstance(text, bool):
        raise BadQuantity(f"{text!r} is not {what}; write for example {example!r}.")
    if isinstance(text, int | float):
        value = float(text)
    else:
        match = _NUMBER.match(text)
        if match is None or match[2].lower() not in units:
            known = ", ".join(unit for unit in units if unit)
            raise BadQuantity(f"{text!r} is not {what}; write for example {example!r} (units: {known}).")
        value = float(match[1]) * units[match[2].lower()]
    if not math.isfinite(value) or value < 0:
        raise BadQuantity(f"{text!r} is not {what}: it must be finite and not negative.")
    return value


def parse_bytes(text: str | int) -> int:
    """`"16 GiB"` -> 17179869184. Raises BadQuantity."""
    return round(_parse(text, _BYTE_UNITS, "an amount of bytes", "16 GiB"))


def parse_duration_s(text: str | float) -> float:
    """`"80 ms"` -> 0.08 seconds. Raises BadQuantity."""
    return _parse(text, _DURATION_UNITS, "a duration", "80 ms")


def parse_bytes_per_s(text: str | float) -> float:
    """`"100 kB/s"` -> 100000.0 bytes per second; `/s` may be left out. Raises BadQuantity."""
    return _parse(text, _BYTE_RATE_UNITS, "a rate of bytes per second", "100 kB/s")


def parse_count(text: str | int) -> int:
    """`"2.5M"` -> 2500000. Raises BadQuantity."""
    return round(_parse(text, _COUNT_UNITS, "a count", "2.5M"))


def format_bytes(size: float) -> str:
    """1536 -> `"1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_duration_s(seconds: float) -> str:
    """0.08 -> `"80 ms"`, 75 -> `"1 min 15 s"`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_rate_bps(rate: float) -> str:
    """20_000_000 -> `"20.0 Mbit/s"`."""
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if rate < 1000:
            return f"{rate:.1f} {unit}"
        rate /= 1000
    return f"{rate:.1f} Gbit/s"


def format_flops(rate: float) -> str:
    """1_300_000 -> `"1.3 MFLOP/s"`: what was measured is never shown as nothing."""
    for unit in ("FLOP/s", "kFLOP/s", "MFLOP/s"):
        if rate < 1000:
            return f"{rate:.1f} {unit}"
        rate /= 1000
    return f"{rate:,.1f} GFLOP/s"


def format_count(count: float) -> str:
    """2_500_000 -> `"2.5 M"`."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"
