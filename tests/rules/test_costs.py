"""What a job is expected to cost, beside public list prices."""

from __future__ import annotations

import datetime
from urllib.parse import urlsplit

import msgspec
import pytest

from shoal.cli.training import say_choice
from shoal.market.goodput import TrainingWork
from shoal.protocol.offers import Capability, Device, Offer, Throughput
from shoal.protocol.prices import Price
from shoal.sdk.costs import Costs, costs_of, public_prices

WORK = TrainingWork(
    flops_per_token=6e7, efficiency=0.3, step_tokens=65_536, inner_steps=20, exchange_s=lambda members, rate: 0.1,
    hidden=True, step_least_s=0.004,
)  # fmt: skip


def an_offer(name: str, tflops: float, micro_per_h: int | None) -> Offer:
    rates = () if tflops == 0 else (Throughput("float32", 1e12 * tflops / 2), Throughput("bfloat16", 1e12 * tflops))
    device = Device(kind="cuda", name="X", memory_bytes=1 << 34, memory_bytes_per_s=1e12, throughput=rates)
    return Offer(
        name=name, sequence=1, issued_ms=0, lifetime_ms=60_000, capability=Capability(devices=(device,)),
        price=None if micro_per_h is None else Price(micro_per_h),
    )  # fmt: skip


def costs(*offers: Offer, deadline_s: float | None = None) -> Costs:
    return costs_of(WORK, offers, dtype="bfloat16", tokens=360_000_000, currency=None, nodes_min=1, nodes_max=8,
                    deadline_s=deadline_s)  # fmt: skip


def test_ways_to_have_a_job_done() -> None:
    found = costs(an_offer("large", 300, 1_200_000), an_offer("small", 60, 100_000), an_offer("dumb", 0, 0))
    assert found.all is not None and found.best is not None and found.one is not None
    assert found.all.tokens_per_s == pytest.approx(360e12 * 0.3 / 6e7)
    assert found.all.hours == pytest.approx(200 / 3600)
    assert found.all.micro == 72_223  # 1,300,000 an hour for 200 s, rounded up
    assert (found.best.what, found.one.what) == ("small", "small")
    assert found.best.micro == pytest.approx(100_000 * 1200 / 3600, abs=1)
    assert found.fastest is not None and (found.fastest.what, found.fastest.micro_per_h) == ("large", 1_200_000)
    assert costs(an_offer("small", 60, 100_000)).fastest is None, "it is the best one"
    fast = costs(an_offer("large", 300, 1_200_000), an_offer("small", 60, 100_000), deadline_s=300)
    assert fast.best is not None and fast.best.what == "large"
    late = costs(an_offer("small", 60, 100_000), deadline_s=60)
    assert late.best is None and late.reason == (
        "No mix of 1 measured node is fast enough: 6.0 M tokens/s are needed; the fastest, of 1 node, trains 300.0 k "
        "for 0.10/h. A deadline of 20 min would do."
    )
    assert costs(an_offer("small", 60, 100_000), deadline_s=20 * 60).best is not None
    many = costs(*(an_offer(f"n{at}", 60 + at, 100_000) for at in range(10)))
    assert many.all is not None and many.all.what == "the fastest 8 of 10"
    assert many.all.micro_per_h == 800_000 and many.all.tokens_per_s == pytest.approx(sum(range(62, 70)) * 5e3)


def test_it_is_said_which_nodes_a_job_takes_for_its_money() -> None:
    found = costs(an_offer("large", 300, 1_200_000), an_offer("small", 60, 100_000))
    assert say_choice(found, None) == (
        "Without a budget it takes only those that are free; with one it would take small, for 0.033334 USD as offered."
    )
    assert say_choice(found, 40_000) == "Of these it takes small, for 0.033334 USD as offered."
    assert say_choice(found, 30_000).endswith(
        "as offered. That is more than its budget of 0.03: it would stop when that is used up, to be resumed with a "
        "larger one."
    )
    assert say_choice(costs(an_offer("free", 60, None)), None) == "All of them work for nothing."
    late = costs(an_offer("small", 60, 100_000), deadline_s=60)
    assert say_choice(late, 40_000) == late.reason


def test_of_a_large_mix_a_few_are_named() -> None:
    found = costs_of(WORK, [an_offer(f"n{at}", 60, 0) for at in range(20)], dtype="bfloat16", tokens=1, currency=None,
                     nodes_min=1, nodes_max=20, deadline_s=None).best  # fmt: skip
    assert found is not None and found.what == "n0, n1, n2, n3, n4, n5, n6, n7 and 12 more"


def test_other_currencies_are_left_out_and_said() -> None:
    euros = msgspec.structs.replace(an_offer("euros", 900, 1), price=Price(1, "EUR"))
    found = costs(an_offer("large", 300, 1_200_000), an_offer("small", 60, 100_000), an_offer("free", 50, None), euros)
    assert found.left_out == 1 and "1 are left out" in found.reason
    assert found.all is not None and found.all.micro_per_h == 1_300_000
    asked = costs_of(
        WORK, [euros], dtype="bfloat16", tokens=1, currency=None, nodes_min=1, nodes_max=1, deadline_s=None
    )
    assert (asked.currency, asked.left_out) == ("EUR", 0)


def test_nobody_there_costs_nothing_and_says_so() -> None:
    found = costs()
    assert (found.all, found.best, found.one) == (None, None, None)
    assert found.reason == "No node was measured."
    assert len(found.public) == len(public_prices())


def test_public_prices_are_dated_and_have_sources() -> None:
    assert len(public_prices()) >= 10
    for row in public_prices():
        assert datetime.date.fromisoformat(row.read) <= datetime.date(2026, 11, 27)
        assert urlsplit(row.source).scheme == urlsplit(row.via).scheme == "https"
        assert 0.1 < row.usd_per_h < 20 and 1e13 < row.flops < 1e16
    found = costs()
    assert [way.micro for way in found.public] == sorted(way.micro for way in found.public)
    assert found.read == min(row.read for row in public_prices())
