"""From logits to a token. A token is a function of logits, settings, seed, position and mask, and of nothing else:
whoever computes the position again, in whatever batch, after whatever loss, chooses the same one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.protocol.serving import Choosing, Chosen

GREEDY_BELOW = 1e-5
"""Temperatures below this are none: the likeliest token is taken."""


def choose(
    logits: NDArray[np.float32],
    sampling: Choosing,
    position: int,
    seen: Mapping[int, int] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> Chosen:
    """The token at `position` (counted from the start of the prompt). `logits` [vocabulary]; `seen`: how often each
    token was generated before, for the penalties; `allowed` [vocabulary]: which ones it may be. Log probabilities are
    the model's own, before temperature, penalties, bias and mask. Raises ValueError for logits that are not finite, a
    bias of a token that is not there, none that is allowed."""
    exact = logits.astype(np.float64)
    if not np.isfinite(exact).all():
        raise ValueError(f"the logits at position {position} are not finite")
    judged = exact.copy()
    if seen and (sampling.presence_penalty or sampling.frequency_penalty):
        for token, times in seen.items():
            judged[token] -= sampling.presence_penalty + times * sampling.frequency_penalty
    for token, bias in sampling.logit_bias:
        if token >= len(judged):
            raise ValueError(f"there is no token {token} of which a bias speaks; the vocabulary has {len(judged)}")
        judged[token] += bias
    if allowed is not None:
        judged[~allowed] = -np.inf
        if judged.max() == -np.inf:
            raise ValueError(f"at position {position} no token is allowed")
    token = int(judged.argmax()) if sampling.temperature < GREEDY_BELOW else _drawn(judged, sampling, position)
    if sampling.top_logprobs is None:
        return Chosen(token)
    norm = _log_sum(exact)
    likeliest = np.argsort(-exact, kind="stable")[: sampling.top_logprobs]
    return Chosen(token, float(exact[token] - norm), tuple((int(one), float(exact[one] - norm)) for one in likeliest))


def _drawn(logits: NDArray[np.float64], sampling: Choosing, position: int) -> int:
    """Nucleus sampling (Holtzman et al., 2020): of the likeliest tokens that together reach `top_p`, one at random."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order] - logits[order[0]]) / sampling.temperature)
    sums = np.cumsum(weights)
    kept = int(np.searchsorted(sums, min(1.0, sampling.top_p) * sums[-1], side="left")) + 1
    kept = min(kept, len(sums))
    draw = uniform(sampling.seed, sampling.choice, position) * sums[kept - 1]
    return int(order[min(int(np.searchsorted(sums[:kept], draw, side="right")), kept - 1)])


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that nobody could tell apart from a random one, and that is always the same."""
    text = f"shoal token {seed} {choice} {position}".encode()
    return int.from_bytes(blake3(text).digest(length=8), "little") / 2**64 * (1 - 2**-53)


def _log_sum(logits: NDArray[np.float64]) -> float:
    top = float(logits.max())
    return top + math.log(float(np.exp(logits - top).sum()))
