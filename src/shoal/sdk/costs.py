"""What a training job is expected to cost: on the nodes that fit, in other mixes of them, and at public list prices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import compress

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal.market.goodput import Amount, Mix, TrainingWork, best_mix
from shoal.market.requirements import USUAL_CURRENCY
from shoal.protocol.offers import Offer
from shoal.quantities.money import MICRO

NAMES_SHOWN = 8
"""Of the nodes of a mix."""
SHEET_SHARE = 0.7
"""A measured matrix rate is about so much of a data sheet's, where both are known."""


class PublicPrice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one GPU cost on a day, on demand."""

    vendor: str
    product: str
    gpu: str
    usd_per_h: float
    flops: float
    """Dense BF16 FLOP/s of the data sheet."""
    read: str
    """The day, as `2026-11-09`."""
    remark: str
    source: str
    via: str


class _PublicPrices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    note: str
    rows: tuple[PublicPrice, ...]


@dataclass(frozen=True)
class Way:
    """One way to have a job done."""

    what: str
    tokens_per_s: float
    micro_per_h: int
    hours: float
    micro: int
    """For the whole job."""


@dataclass(frozen=True)
class Costs:
    currency: str
    all: Way | None
    """All nodes that fit and answered; the fastest, where a job takes no more."""
    best: Way | None
    """The mix of them with the most work for its money, or with a deadline the cheapest that keeps it."""
    reason: str
    """Of `best`, also where there is none."""
    left_out: int
    """Nodes that are priced in another currency."""
    one: Way | None
    """The one node with the most work for its money."""
    fastest: Way | None
    """The fastest node alone; None where that is `one`."""
    public: tuple[Way, ...]
    """One GPU at public list prices, in US dollars, the cheapest for this job first. By data sheets, not measured."""
    read: str
    """The oldest day on which one of those was read."""


def public_prices() -> tuple[PublicPrice, ...]:
    text = resources.files("shoal.sdk").joinpath("public_prices.json").read_bytes()
    return msgspec.json.decode(text, type=_PublicPrices).rows


def flops_in(offer: Offer, dtype: str) -> float:
    """Of an offer's device that is fastest in float32, in another dtype: what a member computes in; 0 where it was not
    measured."""
    rates = [{rate.dtype: rate.flops for rate in device.throughput} for device in offer.capability.devices]
    best = max(rates, key=lambda each: each.get("float32", 0.0), default={})
    return best.get(dtype, 0.0)


@dataclass(frozen=True)
class _Columns:
    """Offers as the rules of the market want them."""

    flops: NDArray[np.float64]
    rates_bps: NDArray[np.float64]
    micro_per_h: NDArray[np.int64]


def _columns(offers: Sequence[Offer], dtype: str) -> _Columns:
    return _Columns(
        np.array([flops_in(offer, dtype) for offer in offers], dtype=float),
        np.array([offer.capability.hub_rate_bps or math.inf for offer in offers], dtype=float),
        np.array([offer.price.micro_per_h if offer.price else 0 for offer in offers], dtype=np.int64),
    )


def mix_for(
    work: TrainingWork,
    offers: Sequence[Offer],
    *,
    dtype: str,
    tokens: int,
    nodes_min: int,
    nodes_max: int,
    deadline_s: float | None,
    together: Amount | None = None,
) -> Mix:
    """Which of these a job that pays takes: the mix with the most work for its money, or with a deadline the cheapest
    that keeps it, or that has an amount together. No members where none does, with the reason."""
    columns = _columns(offers, dtype)
    mix = best_mix(
        work, columns.flops, columns.rates_bps, columns.micro_per_h, nodes_min=nodes_min, nodes_max=nodes_max,
        tokens_per_s_min=tokens / deadline_s if deadline_s else 0.0, together=together,
    )  # fmt: skip
    if not mix.fastest_per_s:
        return mix
    would_do_s = math.ceil(tokens / mix.fastest_per_s)
    told = f"{would_do_s} s" if would_do_s < 120 else f"{math.ceil(would_do_s / 60)} min"
    return replace(mix, reason=f"{mix.reason} A deadline of {told} would do.")


def costs_of(
    work: TrainingWork,
    offers: Sequence[Offer],
    *,
    dtype: str,
    tokens: int,
    currency: str | None,
    nodes_min: int,
    nodes_max: int,
    deadline_s: float | None,
    together: Amount | None = None,
) -> Costs:
    """The costs of `tokens` accepted tokens on nodes that offer this; without a currency, in that of most of those that
    have a price. Nodes that are priced in another are left out: nothing is converted."""
    priced = Counter(one.price.currency for one in offers if one.price and one.price.micro_per_h)
    currency = currency or max(priced, key=lambda one: (priced[one], one), default=USUAL_CURRENCY)
    left_out = sum(priced.values()) - priced[currency]
    payable = [not one.price or not one.price.micro_per_h or one.price.currency == currency for one in offers]
    offers = list(compress(offers, payable))
    if together is not None:
        together = replace(together, each=together.each[payable])
    columns = _columns(offers, dtype)
    flops, rates, prices = columns.flops, columns.rates_bps, columns.micro_per_h

    def way(what: str, members: Sequence[int]) -> Way:
        speed = work.tokens_per_s(flops[list(members)].tolist(), float(rates[list(members)].min()))
        return _way(what, speed, int(prices[list(members)].sum()), tokens)

    able = sorted(np.flatnonzero(flops > 0).tolist(), key=lambda at: -flops[at])
    all_of_them = "all that fit" if len(able) <= nodes_max else f"the fastest {nodes_max} of {len(able)}"
    best, single = Mix((), 0.0, 0, "No node was measured."), Mix((), 0.0, 0, "")
    if able:
        best = mix_for(
            work, offers, dtype=dtype, tokens=tokens, nodes_min=nodes_min, nodes_max=nodes_max, deadline_s=deadline_s,
            together=together,
        )  # fmt: skip
        single = best_mix(work, flops, rates, prices, nodes_max=1)
    names = [offer.name for offer in offers]
    fastest = able[0] if able and single.members != (able[0],) else None
    public = sorted(
        (
            _way(
                f"{row.vendor} {row.product}".strip() + f": {row.gpu}",
                work.tokens_per_s([SHEET_SHARE * row.flops], math.inf), round(row.usd_per_h * MICRO), tokens,
            )
            for row in public_prices()
        ),
        key=lambda one: one.micro,
    )  # fmt: skip
    return Costs(
        currency=currency,
        all=way(all_of_them, able[:nodes_max]) if able else None,
        best=way(_named([names[at] for at in best.members]), best.members) if best.members else None,
        left_out=left_out,
        reason=best.reason + (f" {left_out} are left out, priced in other currencies." if left_out else ""),
        one=way(names[single.members[0]], single.members) if single.members else None,
        fastest=way(names[fastest], [fastest]) if fastest is not None else None,
        public=tuple(public),
        read=min(row.read for row in public_prices()),
    )


def _named(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _way(what: str, speed: float, micro_per_h: int, tokens: int) -> Way:
    seconds = tokens / speed
    return Way(what, speed, micro_per_h, seconds / 3600, math.ceil(micro_per_h * seconds / 3600))
