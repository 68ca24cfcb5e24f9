"""To which replica a stream goes, and which one is worth its price. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.sharding.planning import slowest

LIKELY_TOKENS = 128
"""What an answer is taken to have, where its limit is higher: limits are seldom reached."""
POSITION_SHARE = 1 / 16
"""What a position of a prompt costs of a token: many of them go through the layers side by side."""


@dataclass(frozen=True)
class Candidate:
    """A replica, as far as it matters here."""

    name: str
    token_ms: float
    """What a token of one stream takes."""
    streams: int = 0
    """That go there already."""
    start_ms: float = 0.0
    """There and back, once; a ring's crossings are in its `token_ms`."""
    held: int = 0
    """Positions of the prompt that it has already, of earlier streams."""

    def expected_ms(self, prompt: int, tokens: int) -> float:
        positions = (prompt - min(self.held, prompt)) * POSITION_SHARE
        return self.start_ms + (1 + self.streams) * self.token_ms * (positions + min(tokens, LIKELY_TOKENS))


def choose(candidates: Sequence[Candidate], prompt: int, tokens: int) -> tuple[int, str]:
    """Which of the candidates, and why. `prompt`: positions of the prompt; `tokens`: how many are asked for."""
    times = [one.expected_ms(prompt, tokens) for one in candidates]
    best = min(range(len(candidates)), key=lambda at: (times[at], candidates[at].name))
    one = candidates[best]
    said = (
        f"{one.name} is expected to answer in {times[best]:.0f} ms: {one.token_ms:.1f} ms a token, {one.streams} "
        f"streams, {one.start_ms:.0f} ms away, {min(one.held, prompt)} of {prompt} positions there"
    )
    others = [(times[at], candidates[at].name) for at in range(len(candidates)) if at != best]
    return best, f"{said}; next {min(others)[1]} in {min(others)[0]:.0f} ms." if others else f"{said}."


def cheapest(options: Sequence[tuple[int, float]], token_ms_max: float = math.inf) -> int | None:
    """Which of several replicas is taken for money, each given by its price and what a token of one stream takes in
    milliseconds: the cheapest of those that are fast enough, as the planner has it. None where none is."""
    most = slowest(min((token_ms for _, token_ms in options), default=math.inf), token_ms_max)
    able = [(price, token_ms, at) for at, (price, token_ms) in enumerate(options) if token_ms <= most]
    return min(able)[2] if able else None
