"""A gang in which any two are near enough: coordinates prune, and the nodes measure the rest themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.driver.gang import LinkedNode, TooFar
from shoal.market.coordinates import Coordinate
from shoal.market.gangs import cheapest_gang, near_one_another
from shoal.protocol.serving import STAGES_MAX
from shoal.world.quotes import NotSecured
from shoal.world.reach import probe

MEASURED_MAX = 48
"""Nodes of which all pairs are measured; more are pruned first."""
PROBE_DEADLINE_S = 20.0
SLACK = 1.25
"""How much further than allowed two may seem to be by their coordinates, to be measured."""


async def near_gang(gang: Sequence[LinkedNode], limit_ms: float, nodes_min: int) -> list[LinkedNode]:
    """Those of a gang of which any two have measured no more than this between them. Raises NotSecured where they are
    fewer than `nodes_min`."""
    some = _pruned(gang, limit_ms, nodes_min)
    found = near_one_another(await _measured(some), _costs(some), limit_ms=limit_ms, at_least=nodes_min)
    if len(found.members) < nodes_min:
        raise NotSecured(found.reason)
    return [some[at] for at in found.members]


async def refuse_far(node: LinkedNode, members: Sequence[LinkedNode], limit_ms: float) -> None:
    """Raises TooFar where a node that would join is further than this from a member, as it has measured itself."""
    for first in range(0, len(members), STAGES_MAX):
        some = members[first : first + STAGES_MAX]
        times = await probe(node.link, [one.holder for one in some], PROBE_DEADLINE_S)
        for member, took_ms in zip(some, times, strict=True):
            if took_ms is None or took_ms > limit_ms:
                far = "did not reach" if took_ms is None else f"is {took_ms:.1f} ms from"
                raise TooFar(f"It {far} {member.name}, and the job allows {limit_ms:.4g} ms between any two.")


def _pruned(gang: Sequence[LinkedNode], limit_ms: float, nodes_min: int) -> list[LinkedNode]:
    """MEASURED_MAX at most: a cheap gang that is near by its coordinates, and who is near to all of it."""
    if len(gang) <= MEASURED_MAX:
        return list(gang)
    at = [Coordinate.of(one.offer) for one in gang]
    core = cheapest_gang(
        _costs(gang),
        np.array([one.position_ms for one in at]),
        np.array([one.height_ms for one in at]),
        size=max(2, min(nodes_min, MEASURED_MAX)),
        latency_max_ms=SLACK * limit_ms,
    ).members
    if not core:
        raise NotSecured(
            f"Of {len(gang)} nodes no {nodes_min} seem to be within {limit_ms:.4g} ms of one another, by coordinates."
        )

    def furthest_ms(one: int) -> float:
        return max(at[one].distance_ms(at[member]) for member in core if member != one)

    others = sorted((one for one in range(len(gang)) if one not in core), key=furthest_ms)
    return [gang[one] for one in (*core, *others)][:MEASURED_MAX]


async def _measured(gang: Sequence[LinkedNode]) -> NDArray[np.float64]:
    """Round trips of all pairs, each taken by the first of the two; infinite where it does not know."""
    found = np.full((len(gang), len(gang)), np.inf)
    np.fill_diagonal(found, 0.0)

    async def from_one(at: int) -> None:
        for first in range(at + 1, len(gang), STAGES_MAX):
            some = list(gang[first : first + STAGES_MAX])
            times = await probe(gang[at].link, [one.holder for one in some], PROBE_DEADLINE_S)
            for other, took_ms in enumerate(times, start=first):
                found[at, other] = found[other, at] = np.inf if took_ms is None else took_ms

    await asyncio.gather(*(from_one(at) for at in range(len(gang))))
    return found


def _costs(gang: Sequence[LinkedNode]) -> NDArray[np.int64]:
    return np.array([one.offer.price.micro_per_h if one.offer.price else 0 for one in gang], dtype=np.int64)
