"""How long a round should be: small and frequent beats large and rare, as long as the link can hide it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_STEPS = 5
"""Below this the fixed work of a round (hashing, signing, compressing) weighs on small models."""
MOST_STEPS = 100
"""Above this members drift apart within a round and learn less from one another."""
CROSSINGS = 3.0
"""Round trips between the end of a member's steps and the Commit that names them: deliver, fetch, hear."""
HIDDEN_SHARE = 0.6
"""The exchange may take this share of the time in which it has to be over; the rest is for jitter and loss."""
LINK_SHARE = 0.25
"""Without a budget a member uses at most this share of its link."""
FRAMING_BYTES = 4096
"""Signed records and link overhead of one member's round, about."""

ALIKE = 2 / 3
"""A member that was measured at this share of the fastest or more counts as its equal: before a job each is measured
once, for less than a second, beside whatever else starts (docs/log.md). Where such members really are slower, two send
up to a fifth more per token than their budget."""


def members_of_full_speed(speeds: Sequence[float]) -> float:
    """How many members of the fastest one's speed these amount to, as far as a first measurement can tell; those not
    measured count as its equals where nobody was."""
    fastest = max(speeds, default=0.0)
    if fastest <= 0:
        return float(max(1, len(speeds)))
    return sum(1.0 if speed >= ALIKE * fastest else speed / fastest for speed in speeds)


@dataclass(frozen=True, slots=True)
class RoundLength:
    inner_steps: int
    reason: str


def moved_bytes(update_bytes: int, members: int) -> int:
    """What a member sends and receives in a round: its own update once, and those of the others."""
    return update_bytes * max(2, members) + FRAMING_BYTES


def exchange_takes_s(update_bytes: int, members: int, round_trip_s: float, rate_bps: float | None) -> float:
    """Seconds from the end of a round's steps to its Commit, over links of that rate; None: not measured."""
    transfer_s = 8 * moved_bytes(update_bytes, members) / rate_bps if rate_bps else 0.0
    return CROSSINGS * round_trip_s + transfer_s


def choose_round_length(
    *,
    step_s: float,
    update_bytes: int,
    members: int,
    round_trip_s: float,
    rate_bps: float | None,
    bytes_per_s_budget: float | None,
    bytes_per_token_budget: float | None = None,
    step_tokens: float = 1.0,
    lag: int,
) -> RoundLength:
    """The fewest inner steps for which (1) the exchange fits into the computing it hides behind, (2) what a member
    sends and receives stays within its budget of bytes per second, (3) what all send stays within that per token.

    `step_s`: one inner step of the fastest member. `update_bytes`: one encoded update; a member sends its own once and
    receives those of the others. `rate_bps`: what the slowest measured link carries, None when not measured.
    `step_tokens`: tokens that all members together take in one step of the fastest.
    With lag 0 nothing is hidden; the exchange is then held to a tenth of the round.
    """
    moved = moved_bytes(update_bytes, members)
    exchange_s = exchange_takes_s(update_bytes, members, round_trip_s, rate_bps)
    hide_s = exchange_s / HIDDEN_SHARE if lag else exchange_s * 10
    by_time = math.ceil(hide_s / step_s)
    budget = bytes_per_s_budget
    source = "the byte budget"
    if budget is None and rate_bps:
        budget, source = rate_bps / 8 * LINK_SHARE, f"{LINK_SHARE:.0%} of the link"
    by_bytes = math.ceil(moved / budget / step_s) if budget else 0
    sent_by_all = members * (update_bytes * max(1, members - 1) + FRAMING_BYTES)
    by_tokens = math.ceil(sent_by_all / (bytes_per_token_budget * step_tokens)) if bytes_per_token_budget else 0
    steps = min(MOST_STEPS, max(LEAST_STEPS, by_time, by_bytes, by_tokens))
    times = (
        f"a step takes about {step_s * 1000:.0f} ms, "
        f"an exchange of {moved / 1024:.0f} KiB about {exchange_s * 1000:.0f} ms"
    )
    if steps == MOST_STEPS:
        wanted = max(by_time, by_bytes, by_tokens)
        why = f"{wanted} steps would be needed, but beyond {MOST_STEPS} members drift too far apart"
        if wanted > MOST_STEPS:
            what = "the exchange is not wholly hidden" if wanted == by_time else "more is sent than the budget allows"
            why += f", so {what}"
    elif by_tokens >= max(by_time, by_bytes, LEAST_STEPS):
        why = f"fewer would send more than the {bytes_per_token_budget:g} bytes per token that are allowed"
    elif by_bytes >= max(by_time, LEAST_STEPS):
        why = f"fewer would send more than {source} allows ({(budget or 0) / 1024:.1f} KiB/s)"
    elif by_time > LEAST_STEPS:
        why = "the exchange hides behind that many" if lag else "the exchange is then a tenth of the round"
    else:
        why = "the link would allow even shorter rounds"
    return RoundLength(steps, f"{steps} inner steps a round: {times}; {why}.")
