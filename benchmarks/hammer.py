"""The market under load (`market.py` prints it): what `tests/processes/hammer_world.py` starts, and its figures."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np
from results_form import figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "processes"))
from hammer_world import SLOTS, Outcome, hammered

CLIENTS, NODES, SECONDS = 200, 16, 60.0
REFUSALS_SHOWN = 6


def hammer(quick: bool) -> list[dict[str, object]]:
    clients, nodes, seconds = (20, 8, 5.0) if quick else (CLIENTS, NODES, SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        outcome = asyncio.run(hammered(Path(folder), seconds=seconds, clients=clients, nodes=nodes))
    for said in (*outcome.contradictions, *outcome.astray, *outcome.seen.wrong):
        print(said, file=sys.stderr)
    return _figures(outcome, clients, nodes)


def _figures(outcome: Outcome, clients: int, nodes: int) -> list[dict[str, object]]:
    seen, slots = outcome.seen, sum(SLOTS[number % len(SLOTS)] for number in range(nodes))
    whole, taken = len(seen.quotes_ms), len(seen.taken_ms)
    most = sorted(seen.refusals.items(), key=lambda one: -one[1])[:REFUSALS_SHOWN]
    quote_p50, quote_p99 = np.percentile(seen.quotes_ms, [50, 99])
    taken_p50, taken_p99 = np.percentile(seen.taken_ms, [50, 99])
    busy = f"{100 * outcome.busy:.0f} % of the machine's cores busy"
    wrong = len(outcome.astray) + len(seen.wrong)
    return [
        figure("hammer/sold_twice", len(outcome.contradictions), "slots", "none", not outcome.contradictions,
               f"{len(seen.holds):,} holds by {nodes} nodes with {slots} slots to {clients} clients"),
        figure("hammer/lost", wrong, "accounts", "none", not wrong,
               f"{outcome.escrows:,} escrows, {outcome.redeemed_micro:,} millionths redeemed, {outcome.lines:,} lines "
               "of the journal done again"),
        figure("hammer/quotes", round(seen.asked / outcome.wall_s, 1), "gangs/s",
               compared_with=f"asked for in {outcome.wall_s:g} s; {busy}"),
        figure("hammer/whole", round(whole / seen.asked, 3), "of gangs",
               compared_with=f"{whole} of {seen.asked} held by all their nodes; answers of single nodes: "
               + "; ".join(f"{count} {why}" for why, count in most)),
        figure("hammer/quote/p99", round(float(quote_p99), 1), "ms",
               compared_with=f"median {quote_p50:.1f}; first question to all held, links open"),
        figure("hammer/taken/p99", round(float(taken_p99), 1), "ms",
               compared_with=f"median {taken_p50:.1f}; all held to all taken, {taken} gangs"),
        figure("hammer/hub_away", round(outcome.hub_away_s, 2), "s",
               compared_with=f"one of two hubs, killed and started again; {seen.hub_away} searches went to the other"),
    ]  # fmt: skip
