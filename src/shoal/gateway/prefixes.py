"""What sessions that are over have left in a ring, so that a prompt that begins alike need not be computed again.

A stage keeps such positions only while their memory is not needed. What is said here is therefore a hope: a stage that
has them no longer refuses, and the session begins anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SESSIONS_MAX = 32
SHORTEST = 32
"""Positions that are worth taking over."""


@dataclass(frozen=True)
class Found:
    session: int
    positions: int
    """How many it has in common with what was looked for."""


class Prefixes:
    """The sessions of one ring, the latest used last. Each has a scope, and is found within it alone: how quickly an
    answer comes would tell one client what another one has asked."""

    def __init__(self, sessions_max: int = SESSIONS_MAX) -> None:
        self._max = sessions_max
        self._sessions: OrderedDict[int, tuple[str, NDArray[np.int64]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def held(self, tokens: Sequence[int], scope: str = "") -> int:
        """How many of the first positions are likely to be there."""
        found = self._longest(tokens, scope)
        return found.positions if found else 0

    def find(self, tokens: Sequence[int], scope: str = "") -> Found | None:
        """The session that begins as `tokens` do for the longest; none where that is not worth while. It is kept for
        longer then."""
        found = self._longest(tokens, scope)
        if found is not None:
            self._sessions.move_to_end(found.session)
        return found

    def _longest(self, tokens: Sequence[int], scope: str) -> Found | None:
        wanted = np.asarray(tokens, dtype=np.int64)
        best: Found | None = None
        for session, (theirs, known) in self._sessions.items():
            if theirs == scope:
                positions = _alike(known, wanted)
                if positions >= max(SHORTEST, best.positions + 1 if best else 0):
                    best = Found(session, positions)
        return best

    def add(self, session: int, tokens: Sequence[int], scope: str = "") -> list[int]:
        """A session is over; gives those that need not be kept for it."""
        if len(tokens) < SHORTEST:
            return [session]
        known = np.asarray(tokens, dtype=np.int64)
        # What is whole in the new one is of no more use.
        over = [
            old
            for old, (theirs, its) in self._sessions.items()
            if theirs == scope and len(its) <= len(known) and _alike(its, known) == len(its)
        ]
        self._sessions[session] = (scope, known)
        for old in over:
            del self._sessions[old]
        while len(self._sessions) > self._max:
            over.append(self._sessions.popitem(last=False)[0])
        return over

    def forget(self, session: int) -> None:
        self._sessions.pop(session, None)


def _alike(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
