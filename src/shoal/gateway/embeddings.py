"""Texts as vectors: their positions go through a replica as a prompt's do, and what comes back is pooled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.gateway.rings import Ring, RingLost
from shoal.inference.commands import Advance
from shoal.models.pooling import Pooling
from shoal.protocol.serving import Choosing

INPUTS_MAX = 2048
"""Of one request, as at OpenAI."""
INPUTS_AT_ONCE = 8
"""Of one request that are in replicas, or wait for memory, at the same time."""


@dataclass(frozen=True)
class AskedVectors:
    """A request for embeddings, understood."""

    inputs: tuple[tuple[int, ...], ...]
    pooling: Pooling
    dimensions: int | None


async def pooled(tokens: tuple[int, ...], asked: AskedVectors, ring: Ring, session: int) -> NDArray[np.float32]:
    """The embedding of a text. Raises RingLost and RingRefused."""
    pooling = asked.pooling
    seen = pooling.seen(len(tokens))
    total, count = np.zeros(pooling.hidden, dtype=np.float64), 0
    try:
        for start in range(0, seen, ring.piece):
            stop = min(start + ring.piece, seen)
            wanted = pooling.wanted(start, stop, seen)
            piece = Advance(
                session=session, start=start, tokens=tokens[start:stop], choose=wanted, states_wanted=True,
                sampling=Choosing(prompt_tokens=seen),
            )  # fmt: skip
            states = (await ring.advance(piece)).states
            if len(states) != 4 * wanted * pooling.hidden:
                raise RingLost(f"{ring.name}: it gave {len(states)} bytes of hidden states, not {wanted} positions.")
            rows = np.frombuffer(states, dtype="<f4").reshape(wanted, pooling.hidden)
            total += rows.sum(axis=0, dtype=np.float64)
            count += wanted
    finally:  # a client that hangs up again and again does not keep it from being given back
        await asyncio.shield(ring.close_session(session))
    if not np.isfinite(total).all():
        raise RingLost(f"{ring.name}: it gave hidden states that are not finite.")
    return pooling.embedding(total / count, asked.dimensions)
