"""A stream of tokens that outlives the replicas it comes from.

The gateway owns the token ids and their positions. When a replica is lost, another one is given all tokens so far at
once, and the stream goes on at the next: the same token, where the engines are exact. What was given out is never
taken back. A replica that wants to go is left without a pause: another one reads all tokens so far beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.errors import EngineError
from shoal.gateway.constraints import Constraint
from shoal.gateway.guesses import DraftSession, Guesses
from shoal.gateway.rings import Continuing, Replica, Ring, RingLost, RingRefused
from shoal.inference.commands import Advance
from shoal.inference.guessing import held
from shoal.protocol.serving import Choosing, Chosen
from shoal.world import Clock

PIECES_AT_ONCE = 12
"""Pieces of one stream under way: stages work on several, and distance costs once."""
REPLICAS_MAX = 16
"""Replicas that one stream may lose before it is given up."""
MOVES_MAX = 64
"""Times that a stream tries to leave a replica that wants to go: the other may have no room."""
LOOK_S = 0.05
"""How often a stream that has nowhere to go looks for a place."""
NO_SOURCE = "SH-275"

_ending: set[asyncio.Future[None]] = set()


class StreamLost(EngineError):
    """A stream could not go on anywhere."""

    code = "SH-576"


@dataclass
class _Seat:
    """A session of a stream in a replica. One that continues by itself has none; a number does no harm there."""

    ring: Replica
    session: int
    kept: int = 0
    """Positions that the replica has."""
    source: int | None = None
    """The session of which it takes them over, until the first piece has."""


@dataclass
class Stream:
    """One choice of a request."""

    prompt: tuple[int, ...]
    sampling: Choosing
    tokens_max: int
    ends: frozenset[int]
    """Token ids that end it; they are not given out."""
    pick: Callable[[Sequence[Replica], str], Replica | None]
    """Where to go, given the replicas that were lost, and the arithmetic of the tokens that there are."""
    new_session: Callable[[], int]
    clock: Clock
    patience_s: float
    """How long it waits for another replica where none is left: the next plan may be under way."""
    constraint: Constraint | None = None
    """What its text is held to."""
    guess: bool = True
    draft: Callable[[], DraftSession] | None = None
    """Makes a place in the draft model, where there is one."""
    position_ms: float = 1.0
    """What one more position in a step costs, about: decides how much is guessed."""
    scope: str = ""
    """Whose earlier sessions it may take prompts over from."""
    lost: list[Replica] = field(default_factory=list)
    went: list[Replica] = field(default_factory=list)
    """Replicas that its tokens came from, one after another."""
    steps: int = 0
    reused: int = 0
    """Positions that were taken over."""
    moved: int = 0
    """Times that it left a replica that wanted to go."""
    finish: str = ""
    """`stop` or `length`, once it has ended."""

    async def tokens(self) -> AsyncGenerator[tuple[Chosen, ...]]:
        """The tokens, as they come. Raises StreamLost; RingRefused when the replica does not take what it is asked;
        RequestRefused when what its text is held to is too large."""
        done: list[int] = list(self.prompt)
        until = len(self.prompt) + self.tokens_max
        guesses = Guesses(self.draft() if self.draft is not None else None)
        first = self.pick(self.lost, "")
        if first is None:
            raise StreamLost("No replica is left to go on with.")
        seat = self._sit(first, done)
        moving: asyncio.Task[_Seat] | None = None
        tried = 0
        try:
            while not self.finish:
                if moving is not None and moving.done():
                    seat, moving = self._moved(seat, moving, done), None
                if moving is None and seat.ring.leaving and tried < MOVES_MAX:
                    moving = self._move(done)
                    tried += moving is not None
                ring = seat.ring
                if isinstance(ring, Continuing):
                    try:
                        async with aclosing(self._continued(ring, done, until)) as continuation:
                            async for fresh in continuation:
                                yield fresh
                    except RingLost as error:
                        seat = await self._elsewhere(seat, done, error)
                    continue
                guess: tuple[int, ...] = ()
                if self.guess and seat.kept == len(done) - 1:
                    guess = await guesses.ahead(
                        done, until - len(done) - 1, self.sampling, ring_ms=ring.token_ms,
                        position_ms=self.position_ms,
                    )  # fmt: skip
                sampling = self.sampling
                if self.constraint is not None:
                    said = done[len(self.prompt) :]
                    guess, masks = self.constraint.ahead(said, guess, until - len(done) - 1)
                    sampling = msgspec.structs.replace(sampling, masks=masks)
                try:
                    chosen = await self._step(ring, seat, done, guess, sampling)
                except RingLost as error:
                    seat = await self._elsewhere(seat, done, error)
                    continue
                except RingRefused as error:
                    if error.cause_code != NO_SOURCE or seat.source is None:
                        raise
                    ring.prefixes.forget(seat.source)
                    self.reused -= seat.kept
                    self._leave(seat, done)
                    seat = _Seat(ring, self.new_session())
                    ring.streams += 1
                    continue
                self.steps += 1
                self._came_from(ring)
                right = held(guess, [one.token for one in chosen])
                guesses.checked(len(guess), right)
                seat.kept = len(done) + right  # the guesses that held are kept there already
                fresh = self._until_end(chosen[: right + 1], until - len(done))
                done += [one.token for one in fresh]
                if self.constraint is not None and self.constraint.complete(done[len(self.prompt) :]):
                    self.finish = "stop"
                if fresh:
                    yield fresh
        finally:
            self._leave(seat, done)
            _afterwards(guesses.close())
            if moving is not None:
                self._drop(moving)

    def _came_from(self, ring: Replica) -> None:
        if not self.went or self.went[-1] is not ring:
            self.went.append(ring)

    def _arithmetic(self) -> str:
        return self.went[-1].arithmetic if self.went else ""

    def _until_end(self, chosen: Sequence[Chosen], room: int) -> tuple[Chosen, ...]:
        for at, one in enumerate(chosen):
            if one.token in self.ends:
                self.finish = "stop"
                return tuple(chosen[:at])
            if at + 1 == room:
                self.finish = "length"
                return tuple(chosen[: at + 1])
        return tuple(chosen)

    async def _continued(self, ring: Continuing, done: list[int], until: int) -> AsyncGenerator[tuple[Chosen, ...]]:
        """What a replica that goes on by itself says, until the stream ends or the replica does; `done` grows by it."""
        async with aclosing(ring.generate(done, self.sampling, until - len(done))) as continuation:
            async for more in continuation:
                fresh = self._until_end(more.chosen, until - len(done))
                self.finish = self.finish or more.finish
                done += [one.token for one in fresh]
                if fresh:
                    self._came_from(ring)
                    yield fresh
                if self.finish:
                    return

    # --- through a replica -----------------------------------------------------------------------------------------

    async def _step(
        self, ring: Ring, seat: _Seat, done: Sequence[int], guess: Sequence[int], sampling: Choosing
    ) -> tuple[Chosen, ...]:
        """All positions that the replica does not have yet, the guess after them, and what follows each of those."""
        size = ring.piece
        last = seat.kept + (len(done) - 1 - seat.kept) // size * size
        pieces = self._pieces(ring, seat, done, last)
        pieces.append(
            Advance(
                session=seat.session, start=last, tokens=(*done[last:], *guess), choose=1 + len(guess),
                sampling=sampling,
            )
        )  # fmt: skip
        chosen = await self._read(ring, seat, pieces)
        seat.source = None
        return chosen

    def _pieces(self, ring: Ring, seat: _Seat, done: Sequence[int], stop: int) -> list[Advance]:
        """Positions up to `stop` that the replica does not have."""
        size = ring.piece
        return [
            Advance(
                session=seat.session, start=at, tokens=tuple(done[at : min(stop, at + size)]), sampling=self.sampling
            )
            for at in range(seat.kept, stop, size)
        ]

    async def _read(self, ring: Ring, seat: _Seat, pieces: list[Advance]) -> tuple[Chosen, ...]:
        """Some pieces at a time: a ring takes them in the order in which they come. Gives what the last one gave;
        raises what the first of them did that failed."""
        if not pieces:
            return ()
        pieces[0] = msgspec.structs.replace(pieces[0], source=seat.source)
        if len(pieces) == 1:
            return (await ring.advance(pieces[0])).chosen
        window = asyncio.Semaphore(PIECES_AT_ONCE)

        async def through(piece: Advance) -> tuple[Chosen, ...]:
            async with window:
                return (await ring.advance(piece)).chosen

        found = await asyncio.gather(*map(through, pieces), return_exceptions=True)
        chosen: tuple[Chosen, ...] = ()
        for one in found:
            if isinstance(one, BaseException):
                raise one
            chosen = one
        return chosen

    # --- from one to another ---------------------------------------------------------------------------------------

    def _sit(self, ring: Replica, done: Sequence[int]) -> _Seat:
        """In a replica, with what it has of these tokens already."""
        ring.streams += 1
        found = None if isinstance(ring, Continuing) else ring.prefixes.find(done[:-1], self.scope)
        if found is None:
            return _Seat(ring, self.new_session())
        self.reused += found.positions
        return _Seat(ring, self.new_session(), found.positions, found.session)

    async def _elsewhere(self, seat: _Seat, done: Sequence[int], error: RingLost) -> _Seat:
        """The replica is lost. Raises StreamLost where no other comes; the seat is then still to be left."""
        self.lost.append(seat.ring)
        ring = None
        if len(self.lost) < REPLICAS_MAX:
            ring = await another(lambda: self.pick(self.lost, self._arithmetic()), self.clock, self.patience_s)
        if ring is None:
            raise StreamLost(f"No replica is left to go on with: {error.sentence}") from error
        other = self._sit(ring, done)
        seat.ring.streams -= 1
        return other

    def _leave(self, seat: _Seat, done: Sequence[int]) -> None:
        ring = seat.ring
        ring.streams -= 1
        if isinstance(ring, Continuing):
            return
        kept = 0 if seat.source is not None else seat.kept  # what was to be taken over has not been
        forget = ring.prefixes.add(seat.session, done[:kept], self.scope)
        for session in {seat.session, *forget}:
            _afterwards(ring.close_session(session, keep=session not in forget))

    def _move(self, done: Sequence[int]) -> asyncio.Task[_Seat] | None:
        """Have another replica read what there is so far, if there is one to go to."""
        ring = self.pick(self.lost, self._arithmetic())
        if ring is None or ring.leaving or isinstance(ring, Continuing):
            return None
        return asyncio.create_task(self._read_beside(ring, self._sit(ring, done), tuple(done)))

    async def _read_beside(self, ring: Ring, seat: _Seat, done: tuple[int, ...]) -> _Seat:
        try:
            await self._read(ring, seat, self._pieces(ring, seat, done, len(done) - 1))
        except BaseException:
            self._leave(seat, done)
            raise
        seat.source, seat.kept = None, len(done) - 1
        return seat

    def _moved(self, seat: _Seat, moving: asyncio.Task[_Seat], done: Sequence[int]) -> _Seat:
        """To the new seat if it is there; the old one is good enough until then."""
        if moving.cancelled() or moving.exception() is not None:
            return seat
        self._leave(seat, done)
        self.moved += 1
        return moving.result()

    def _drop(self, moving: asyncio.Task[_Seat]) -> None:
        """Nobody will sit there."""
        moving.cancel()
        moving.add_done_callback(
            lambda task: None if task.cancelled() or task.exception() else self._leave(task.result(), ())
        )


async def another(pick: Callable[[], Replica | None], clock: Clock, patience_s: float) -> Replica | None:
    """The replica to go on with, waited for where there is none."""
    until = clock.monotonic() + patience_s
    while (found := pick()) is None and clock.monotonic() < until:
        await clock.sleep(LOOK_S)
    return found


def _afterwards(work: Coroutine[Any, Any, None]) -> None:
    """Whoever reads may be cancelled again and again; memory is given back all the same."""
    ending = asyncio.ensure_future(work)
    _ending.add(ending)
    ending.add_done_callback(_ending.discard)
