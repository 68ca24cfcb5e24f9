"""What a stream tries ahead of its replica, so that one crossing may bring several tokens.

Two sources: what followed when the text ended like this before (`inference.guessing.look_up`), and a small draft model
beside the gateway (Leviathan et al., 2023). Which one, and how many tokens, follows from how often each was right
lately and from what a crossing takes. The draft draws with the same seed and position as the model does, so that
where the two think alike they also draw alike. What is said never depends on a guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.engines import EngineDied, EngineFailed
from shoal.inference.commands import Advance
from shoal.inference.guessing import Guessing, look_up
from shoal.inference.process import StageProcess
from shoal.protocol.serving import PIECE_MAX, Choosing

AGAIN = 32
"""Tokens after which a source that was not worth it is tried again."""


@dataclass
class Draft:
    """A small model with the vocabulary of the one that is served, whole in a process beside the gateway."""

    stage: StageProcess
    token_ms: float
    positions: int
    """As many as it knows."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def session(self) -> DraftSession:
        return DraftSession(self, next(self._numbers))


class DraftSession:
    """One stream's place in the draft model."""

    def __init__(self, draft: Draft, number: int) -> None:
        self._draft, self._number = draft, number
        self._has: list[int] = []
        """Tokens whose positions the draft has."""
        self.broken = False

    @property
    def token_ms(self) -> float:
        return self._draft.token_ms

    async def guess(self, done: Sequence[int], most: int, sampling: Choosing) -> tuple[int, ...]:
        """What the draft would say next; nothing where it cannot."""
        guess: list[int] = []
        most = min(most, self._draft.positions - len(done))
        try:
            while len(guess) < most:
                guess.append(await self._next([*done, *guess], sampling))
        except (EngineDied, EngineFailed):  # the stream goes on without it
            self.broken = True
        return tuple(guess)

    async def _next(self, text: list[int], sampling: Choosing) -> int:
        same = next((at for at, (a, b) in enumerate(zip(self._has, text, strict=False)) if a != b), None)
        start = min(len(self._has) if same is None else same, len(text) - 1)
        while True:
            tokens = tuple(text[start : start + PIECE_MAX])
            last = start + len(tokens) == len(text)
            done = await self._draft.stage.advance(
                Advance(session=self._number, start=start, tokens=tokens, choose=int(last), sampling=sampling)
            )
            start += len(tokens)
            self._has[start - len(tokens) :] = tokens
            if last:
                return done.chosen[0].token

    async def close(self) -> None:
        if not self.broken:
            try:
                await self._draft.stage.close_session(self._number)
            except (EngineDied, EngineFailed):
                self.broken = True


class _Source:
    """How far a source may guess: not at all for a while, where it was not worth it."""

    def __init__(self) -> None:
        self._guessing, self._rests = Guessing(), 0

    @property
    def right(self) -> float:
        return self._guessing.right

    def checked(self, guessed: int, right: int) -> None:
        self._guessing = self._guessing.checked(guessed, right)

    def most(self, ring_ms: float, position_ms: float) -> int:
        most = self._guessing.length(ring_ms=ring_ms, position_ms=position_ms)
        if most == 0:
            self._rests += 1
            return 1 if self._rests % AGAIN == 0 else 0
        return most


class Guesses:
    """What one stream guesses."""

    def __init__(self, draft: DraftSession | None) -> None:
        self._draft = draft
        self._looked, self._drafted = _Source(), _Source()
        self._last = self._looked

    async def ahead(
        self, done: Sequence[int], room: int, sampling: Choosing, *, ring_ms: float, position_ms: float
    ) -> tuple[int, ...]:
        """At most `room` tokens. `ring_ms`: what a crossing takes, `position_ms`: what each position in it adds."""
        draft = None if self._draft is None or self._draft.broken else self._draft
        found = look_up(done, min(room, self._looked.most(ring_ms, position_ms)))
        if draft is None or (found and self._looked.right >= self._drafted.right):
            self._last = self._looked
            return found
        self._last = self._drafted
        most = self._drafted.most(ring_ms, position_ms + draft.token_ms)
        return await draft.guess(done, min(room, most), sampling)

    def checked(self, guessed: int, right: int) -> None:
        self._last.checked(guessed, right)

    async def close(self) -> None:
        if self._draft is not None:
            await self._draft.close()
