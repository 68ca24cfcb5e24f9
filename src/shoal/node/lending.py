"""What a node lends to those who serve models on it, held against all that they have it hold.

Loaded layers take their weights, and memory for sessions as sessions come. Rings in reserve have none, and are planned
so that there is memory for the sessions of the largest of them: the stages of one model here take their weights
together, and sessions of the largest, or of all that are in use where that is more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shoal.errors import BadRecord
from shoal.quantities import format_bytes
from shoal.world import Clock, within

ROOM_S = 30.0
"""How long layers wait for others of the same model to be let go, as they are when rings change."""


class NotLent(BadRecord):
    """A stage asks for more memory or storage than the node lends."""

    code = "SH-279"


@dataclass(frozen=True)
class Held:
    """What layers of a model take, or will when they are loaded."""

    job: bytes
    weights_bytes: int
    sessions_bytes: int
    """At most."""
    in_use: bool = False
    """Whether sessions go through them, or did."""


def taken_bytes(held: Mapping[str, Held]) -> int:
    """What all of it takes together."""
    total = 0
    for job in {one.job for one in held.values()}:
        stages = [one for one in held.values() if one.job == job]
        used = sum(one.sessions_bytes for one in stages if one.in_use)
        total += sum(one.weights_bytes for one in stages) + max(used, *(one.sessions_bytes for one in stages))
    return total


class Lending:
    """The memory of a node's device, and who has how much of it."""

    def __init__(self, name: str, memory_bytes: int, clock: Clock) -> None:
        self._name, self._memory, self._clock = name, memory_bytes, clock
        self._held: dict[str, Held] = {}
        self._freed: set[asyncio.Event] = set()

    @property
    def taken_bytes(self) -> int:
        return taken_bytes(self._held)

    def refuse(self, wanted: Held) -> None:
        """Raises NotLent where there is no room beside the layers of other models, whatever this one lets go of."""
        others = {owner: one for owner, one in self._held.items() if one.job != wanted.job}
        self._check("", wanted, others)

    async def take(self, owner: str, wanted: Held) -> None:
        """Room for layers, until `give_back`. Raises NotLent when there is none within ROOM_S."""
        self.refuse(wanted)
        try:
            await within(self._clock, ROOM_S, self._room(owner, wanted))
        except TimeoutError:
            self._check(owner, wanted, self._held)
            self._held[owner] = wanted

    async def _room(self, owner: str, wanted: Held) -> None:
        freed = asyncio.Event()
        self._freed.add(freed)
        try:
            while self._memory < taken_bytes({**self._held, owner: wanted}):
                freed.clear()
                await freed.wait()
            self._held[owner] = wanted
        finally:
            self._freed.discard(freed)

    def use(self, owner: str) -> None:
        """Sessions are to go through these layers. Raises NotLent where others have their memory."""
        known = self._held.get(owner)
        if known is not None and not known.in_use:
            used = replace(known, in_use=True)
            self._check(owner, used, self._held)
            self._held[owner] = used

    def give_back(self, owner: str) -> None:
        if self._held.pop(owner, None) is not None:
            for freed in self._freed:
                freed.set()

    def _check(self, owner: str, wanted: Held, beside: Mapping[str, Held]) -> None:
        if taken_bytes({**beside, owner: wanted}) <= self._memory:
            return
        before = taken_bytes({name: one for name, one in beside.items() if name != owner})
        weights = f"{format_bytes(wanted.weights_bytes)} for weights and " if wanted.weights_bytes else ""
        raise NotLent(
            f"Node {self._name} lends {format_bytes(self._memory)} of memory to whoever serves, {format_bytes(before)} "
            f"of it are taken, and a stage asks for {weights}{format_bytes(wanted.sessions_bytes)} for sessions."
        )
