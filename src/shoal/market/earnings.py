"""What a node has earned: for accepted tokens of a training job, or for tokens that it served, at the speed that it
measured when it joined, or when it had loaded its layers.

The price of an hour, divided by the tokens that the node does in an hour of work, is the price of a token: a node that
becomes slower earns less in an hour, and waiting earns nothing. Whatever speed it says, it never earns more than its
price for the time since it was ready, nor more than was set aside for it.

What is served is paid by stages: a token costs the price of the time that it takes there when it is computed alone. Of
several that are computed at once each counts, up to the price of the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.quantities.money import MICRO, format_money, owed

TOKENS_PER_H_MAX = 10**16
HOUR_US = 3_600_000_000
DEAR = 2
"""So many times as dear for its speed as the dearest that was chosen, a node that comes later is left."""
IDLE, IDLE_FROM_MICRO, IDLE_FROM_PARTS = 10, 10_000, 3
"""So many times as much as those of others its tokens cost, a node that says that it is slow is left; once it has cost
a hundredth, for that many contributions."""
UNPAID_SHARE, UNPAID_S, UNPAID_AFTER_MS = 0.75, 60.0, 10_000
"""A node goes on working while its newest voucher is for this share, at least, of what it had earned two accepted
contributions before, or a minute before but for its price of so long, whichever is more: the client's clock may differ,
and vouchers take a moment."""
UNCOUNTED_MAX, UNCOUNTED_UNPAID_MAX = 6, 4
"""Contributions that a client may have without accepting them, beside two for each that it accepts: it has them, and
pays for none. Some come too late without anybody's fault, and what was built on one of these is void; two are under way
at a time. While they are worth more than it has paid, and a minute, fewer: whoever makes a contribution last for hours
has those, and may be gone."""
POSITIONS_A_TOKEN = 16
"""So many positions that are computed beside generated tokens (a prompt's, guesses that did not hold) count as one of
them: many go through at once. `gateway.routing` expects the same."""
TOKEN_US_MAX = HOUR_US
UNPAID_SERVED_MS, UNPAID_SERVED_SHARE = 60_000, 0.05
"""A node goes on serving while what is not paid is no more than its price for so long and this share of all that it has
earned: vouchers take a moment, and what was under way when a ring was lost each side counts as it saw it. Not for
less at first: a node counts a prompt when it arrives, which may be worth half a minute where tokens take long."""


class Earnings(msgspec.Struct, frozen=True):
    """Of one node in one job."""

    before_micro: Annotated[int, Meta(ge=0)] = 0
    """Earned before it last measured its speed."""
    tokens: Annotated[int, Meta(ge=0)] = 0
    """Accepted since then."""
    tokens_per_h: Annotated[int, Meta(ge=1, le=TOKENS_PER_H_MAX)] = 1
    """As it measured."""

    def measured(self, earned_micro: int, samples_per_s: float, tokens_per_sample: int) -> Earnings:
        """It is ready, maybe anew, with so much earned, and has measured its speed on the job."""
        per_h = min(TOKENS_PER_H_MAX, max(1, round(samples_per_s * tokens_per_sample * 3600)))
        return Earnings(earned_micro, 0, per_h)

    def accepted(self, tokens: int) -> Earnings:
        return msgspec.structs.replace(self, tokens=self.tokens + tokens)

    def for_tokens(self, tokens: int, micro_per_h: int) -> int:
        """What so many are worth, at the speed that it measured."""
        return tokens * micro_per_h // self.tokens_per_h

    def earned_micro(self, micro_per_h: int, ready_ms: int, most_micro: int) -> int:
        """In all, `ready_ms` after it was ready."""
        for_tokens = self.for_tokens(self.tokens, micro_per_h)
        return min(self.before_micro + min(for_tokens, owed(micro_per_h, ready_ms)), most_micro)


class Serving(msgspec.Struct, frozen=True):
    """Of one node that serves for one client."""

    before_micro: Annotated[int, Meta(ge=0)] = 0
    """Earned before it was ready last."""
    parts_us: Annotated[int, Meta(ge=0)] = 0
    """Since then: parts of tokens, each times the microseconds of a token in its stage."""

    def ready(self, earned_micro: int) -> Serving:
        """It has loaded layers, having had none, with so much earned."""
        return Serving(earned_micro, 0)

    def served(self, parts: int, token_us: int) -> Serving:
        """So many parts more, or fewer where what was counted before turns out to be less."""
        return msgspec.structs.replace(self, parts_us=max(0, self.parts_us + parts * token_us))

    def earned_micro(self, micro_per_h: int, ready_ms: int, most_micro: int) -> int:
        """In all, `ready_ms` after it was ready."""
        for_tokens = self.parts_us * micro_per_h // (POSITIONS_A_TOKEN * HOUR_US)
        return min(self.before_micro + min(for_tokens, owed(micro_per_h, ready_ms)), most_micro)


def served_parts(generated: int, computed: int) -> int:
    """Of a session in a stage, in sixteenths of a token: generated tokens count whole, what was computed besides as
    positions."""
    return POSITIONS_A_TOKEN * generated + max(0, computed - generated)


def token_us(layers: int, layer_ms: float, last_ms: float) -> int:
    """What a token takes in a stage, as the stage has measured it, in microseconds."""
    return round(min(TOKEN_US_MAX, max(1.0, 1000 * (layers * layer_ms + last_ms))))


def say_unpaid_service(paid_micro: int, earned_micro: int, micro_per_h: int) -> str | None:
    """Why a node serves for a client no longer, if it should not."""
    if earned_micro - paid_micro <= owed(micro_per_h, UNPAID_SERVED_MS) + UNPAID_SERVED_SHARE * earned_micro:
        return None
    return f"its vouchers are for {format_money(paid_micro)}, and it has earned {format_money(earned_micro)} by serving"


def say_unpaid(paid_micro: int, due_micro: int, earned_micro: int) -> str | None:
    """Why a node works for a client no longer, if it should not."""
    if paid_micro >= UNPAID_SHARE * due_micro:
        return None
    return (
        f"its vouchers are for {format_money(paid_micro)}, and it has earned {format_money(earned_micro)}, "
        f"{format_money(due_micro)} of it a minute ago, or before its last two contributions"
    )


def say_uncounted(uncounted: int, worth_micro: int, paid_micro: int, micro_per_h: int) -> str | None:
    """Why a node makes no more contributions for a client that did not accept so many, beside two for each that it
    accepted, if it should not."""
    trusted = worth_micro <= paid_micro + owed(micro_per_h, round(1000 * UNPAID_S))
    if uncounted <= (UNCOUNTED_MAX if trusted else UNCOUNTED_UNPAID_MAX):
        return None
    return f"{uncounted - 1} contributions did not count, beside two for each that did, and those are not paid for"


def say_dear(micro_per_h: int, flops: float, chosen: Iterable[tuple[int, float]]) -> str | None:
    """Why a node that comes when others were chosen for their price is not worth its own, if it is not. `chosen`: price
    of an hour and FLOP/s of those."""
    dearest, its_flops = max(chosen, key=lambda one: one[0] / max(1.0, one[1]), default=(micro_per_h, flops))
    fair = round(DEAR * dearest * flops / max(1.0, its_flops))
    if micro_per_h <= fair:
        return None
    return (
        f"it costs {format_money(micro_per_h)} an hour, and at {DEAR} times what others take it would be "
        f"{format_money(fair)}"
    )


def say_idle(paid_micro: int, tokens: int, parts: int, others_micro: int, others_tokens: int) -> str | None:
    """Why a node that got so much for its tokens, in so many contributions, is to be left, if it is: whatever speed it
    says it has, it is paid for its time, and others do most of the work for far less."""
    if paid_micro < IDLE_FROM_MICRO or parts < IDLE_FROM_PARTS or tokens >= others_tokens:
        return None
    if paid_micro * others_tokens <= IDLE * others_micro * tokens:
        return None
    return (
        f"it did {tokens} tokens for {format_money(paid_micro)}, and others did {others_tokens} for "
        f"{format_money(others_micro)}: that is more than {IDLE} times as dear"
    )


def lasts_s(left_micro: int, micro_per_h: int) -> float:
    """For how long so much money does at most, at these prices together; infinite where nothing costs anything."""
    return float("inf") if micro_per_h == 0 else 3600.0 * left_micro / micro_per_h


def forecast_micro(micro_per_h: int, seconds: float) -> int:
    """What so long costs at most, rounded up."""
    return -(-micro_per_h * round(seconds * MICRO) // (3600 * MICRO))
