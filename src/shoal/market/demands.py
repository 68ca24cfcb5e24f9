"""What is asked of nodes, requirement by requirement, and which rows of a board meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.market.board import TIERS, Board, Mask
from shoal.market.requirements import USUAL_CURRENCY, Means, Requirements, flops_text
from shoal.protocol.money import ledger_text
from shoal.quantities import (
    format_bytes,
    format_rate_bps,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_duration_s,
)
from shoal.quantities.money import format_price, parse_price


@dataclass(frozen=True)
class Demand:
    """One requirement, and which rows meet it."""

    name: str
    asked: str
    """As one reads it: `at most 0.35/h`."""
    met: Mask
    values: NDArray[np.float64] | None = None
    """What rows have, where less or more can be asked; not a number where they have nothing that could do."""
    limit: float = 0.0
    """What is asked of values."""
    at_most: bool = False
    """Whether values must not be above the limit; else not below."""
    show: Callable[[float], str] = str
    """A value, as one reads it."""
    read: Callable[[str], float] = float
    """What is shown, as it is understood when somebody asks for it."""
    column: str = ""
    """One of TEXTS, where another of its texts can be asked for; a node that has none of them always does."""
    text: str = ""
    """Which one is asked for."""
    can_go: bool = True
    """Whether it can be left out."""


def demands(board: Board, wanted: Requirements) -> Iterator[Demand]:
    """What is asked, one by one; what is not asked is left out."""
    if wanted.device != "any":
        yield Demand("device", wanted.device, board.among("kind", [wanted.device]))
    if wanted.device_name:
        part = wanted.device_name.casefold()
        names = [name for name in board.texts("device") if part in name.casefold()]
        yield Demand("device_name", f"{wanted.device_name!r} in its name", board.among("device", names))
    least: tuple[tuple[str, float, str, Callable[[float], str], Callable[[str], float]], ...] = (
        ("memory_min", wanted.memory_min_bytes, "memory_bytes", format_bytes, parse_bytes),
        ("flops_min", wanted.flops_min, "flops", flops_text, read_flops),
        ("memory_rate_min", wanted.memory_rate_min, "memory_bytes_per_s", _rate, parse_bytes_per_s),
        ("bandwidth_min", wanted.bandwidth_min, "bandwidth_bytes_per_s", _bits, parse_bytes_per_s),
        ("notice_min", wanted.notice_min_ms, "reclaim_notice_ms", _notice, _read_ms),
    )
    for name, value, column, show, read in least:
        if value > 0:
            values = board.number(column)
            yield Demand(name, f"at least {show(value)}", values >= value, values, value, show=show, read=read)
    if wanted.latency_max_ms is not None:
        values = board.number("latency_ms")
        known = np.where(np.isfinite(values), values, np.nan)
        limit = wanted.latency_max_ms
        yield Demand("latency_max", f"at most {_ms(limit)}", values <= limit, known, limit, True, _ms, _read_ms)
    for name, column, only, without in (
        ("countries", "country", wanted.countries, wanted.countries_without),
        ("regions", "region", wanted.regions, wanted.regions_without),
    ):
        if only:
            yield Demand(name, f"only {', '.join(only)}", board.among(column, only))
        if without:
            # Who does not say where it is may be just there.
            yield Demand(f"{name}_without", f"not {', '.join(without)}", ~board.among(column, ("", *without)))
    if wanted.tier != "open":
        yield Demand("tier", f"{wanted.tier} at least", board.tier >= TIERS.index(wanted.tier))
    values = board.number("reputation")
    if (values < wanted.reputation_min).any():
        asked, limit = f"at least {_share(wanted.reputation_min)}", wanted.reputation_min
        yield Demand("reputation_min", asked, values >= limit, values, limit, show=_share)
    if wanted.price_max is not None:
        priced = board.number("price_micro_per_h")
        limit = wanted.price_max
        yield Demand(
            "price_max", f"at most {price_text(limit)}", priced <= limit, priced, limit, True, price_text, parse_price
        )
    currency = wanted.currency or (USUAL_CURRENCY if wanted.price_max is not None else None)
    if currency is not None:
        same = board.among("currency", ["", currency])
        if wanted.currency is not None or not same.all():
            can_go = wanted.price_max is None
            yield Demand("currency", f"priced in {currency}", same, column="currency", text=currency, can_go=can_go)


def payable(board: Board, means: Means) -> Demand:
    if means.ledger is None:
        free = board.among("ledger", [""])
        return Demand("budget", "free, as the job has no budget", free, column="ledger", can_go=False)
    yours = ledger_text(means.ledger)
    met = board.among("ledger", ["", yours])
    return Demand("ledger", "paid at your ledger, or free", met, column="ledger", text=yours, can_go=False)


def all_of(base: Mask, asked: Iterable[Demand]) -> Mask:
    met = base.copy()
    for demand in asked:
        met &= demand.met
    return met


def any_of(base: Mask, alternatives: Iterable[list[Demand]]) -> Mask:
    met = np.zeros_like(base)
    for asked in alternatives:
        met |= all_of(base, asked)
    return met


def read_flops(text: str) -> float:
    return parse_count(text.removesuffix("FLOP/s"))


def _rate(value: float) -> str:
    return f"{format_bytes(value)}/s"


def _bits(value: float) -> str:
    return format_rate_bps(8 * value)


def _read_ms(text: str) -> float:
    return 1000 * parse_duration_s(text)


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def _notice(value: float) -> str:
    return f"{value / 1000:.0f} s"


def _share(value: float) -> str:
    return f"{value:.2g}"


def price_text(value: float) -> str:
    return format_price(int(value))
