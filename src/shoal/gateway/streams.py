"""A stream of tokens that outlives the replicas it comes from.

The gateway owns the token ids and their positions. When a replica is lost, another one is given all tokens so far at
once, and the stream goes on at the next: the same token, where the engines are exact. What was given out is never
taken back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from shoal.errors import EngineError
from shoal.gateway.rings import Ring, RingLost
from shoal.inference.guessing import Guessing, held, look_up
from shoal.protocol.serving import Choosing, Chosen

PIECE = 64
"""Positions of a prompt that go through a replica at once."""
REPLICAS_MAX = 16
"""Replicas that one stream may lose before it is given up."""
GUESS_AGAIN = 32
"""Tokens after which guessing is tried again where it was not worth it."""


_closing: set[asyncio.Future[None]] = set()


class StreamLost(EngineError):
    """A stream could not go on anywhere."""

    code = "SH-576"


@dataclass
class Stream:
    """One choice of a request."""

    prompt: tuple[int, ...]
    sampling: Choosing
    tokens_max: int
    ends: frozenset[int]
    """Token ids that end it; they are not given out."""
    pick: Callable[[Sequence[Ring]], Ring | None]
    """Where to go, given the replicas that were lost or refused."""
    new_session: Callable[[], int]
    guess: bool = True
    position_ms: float = 1.0
    """What one more position in a step costs, about: decides how much is guessed."""
    lost: list[Ring] = field(default_factory=list)
    steps: int = 0
    finish: str = ""
    """`stop` or `length`, once it has ended."""

    async def tokens(self) -> AsyncGenerator[tuple[Chosen, ...]]:
        """The tokens, as they come. Raises StreamLost; RingRefused when the replica does not take what it is asked."""
        done: list[int] = list(self.prompt)
        until = len(self.prompt) + self.tokens_max
        guessing, rests = Guessing(), 0
        ring, session, kept = self._next_ring(None)
        try:
            while not self.finish:
                guess: tuple[int, ...] = ()
                if self.guess and kept == len(done) - 1:
                    most = guessing.length(ring_ms=ring.token_ms, position_ms=self.position_ms)
                    if most == 0:
                        rests += 1
                        most = 1 if rests % GUESS_AGAIN == 0 else 0
                    guess = look_up(done, min(most, until - len(done) - 1)) if most else ()
                try:
                    while len(done) - kept > PIECE:
                        await ring.advance(session, kept, done[kept : kept + PIECE], 0, self.sampling)
                        kept += PIECE
                    given = [*done[kept:], *guess]
                    chosen = await ring.advance(session, kept, given, 1 + len(guess), self.sampling)
                except RingLost as error:
                    self.lost.append(ring)
                    ring, session, kept = self._next_ring(error)
                    continue
                self.steps += 1
                right = held(guess, [one.token for one in chosen])
                guessing = guessing.checked(len(guess), right)
                kept = len(done) + right  # the guesses that held are kept there already
                fresh = self._until_end(chosen[: right + 1], until - len(done))
                done += [one.token for one in fresh]
                if fresh:
                    yield fresh
        finally:
            # Whoever reads may be cancelled again and again; the memory is given back all the same.
            closing = asyncio.ensure_future(ring.close_session(session))
            _closing.add(closing)
            closing.add_done_callback(_closing.discard)

    def _until_end(self, chosen: Sequence[Chosen], room: int) -> tuple[Chosen, ...]:
        for at, one in enumerate(chosen):
            if one.token in self.ends:
                self.finish = "stop"
                return tuple(chosen[:at])
            if at + 1 == room:
                self.finish = "length"
                return tuple(chosen[: at + 1])
        return tuple(chosen)

    def _next_ring(self, error: RingLost | None) -> tuple[Ring, int, int]:
        ring = self.pick(self.lost) if len(self.lost) < REPLICAS_MAX else None
        if ring is None:
            why = f": {error.sentence}" if error else "."
            raise StreamLost(f"No replica is left to go on with{why}") from error
        return ring, self.new_session(), 0
