"""A replica as the gateway sees it: tokens go in, tokens come out, and it may be gone at any time.

A `Ring` is told every position and gives the tokens that follow; a `Continuing` one goes on by itself.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import msgspec

from shoal.engines import EngineDied, EngineFailed
from shoal.errors import EngineError
from shoal.gateway.prefixes import Prefixes
from shoal.inference.commands import Advance, Advanced
from shoal.inference.process import StageProcess
from shoal.protocol.serving import Choosing, Chosen

AT_ONCE = 40
"""Pieces of work in a replica at a time; an engine, and a node, refuse a few more than that. Others wait their turn."""

PIECE, PIECE_OF_SEVERAL = 64, 16
"""Positions of a prompt at once. Where states travel from stage to stage, a stage begins with the next piece while
the one before is still on its way."""


class RingLost(EngineError):
    """A replica is gone, or does not answer; its sessions go on elsewhere."""

    code = "SH-574"


class RingRefused(EngineError):
    """A replica is there and does not do what it was asked."""

    code = "SH-575"

    def __init__(self, sentence: str, cause_code: str) -> None:
        super().__init__(sentence)
        self.cause_code = cause_code


class _Replica(Protocol):
    """Where a stream can go, whatever it is made of."""

    name: str
    arithmetic: str
    """In which a session that is replayed has the very bits that it had; none where they depend on the batch."""
    token_ms: float
    """What a token of one stream takes, as far as is known."""
    computing_ms: float
    """What of that is computing, as its stages say; 0 where nobody does."""
    start_ms: float
    """What a stream takes once, there and back, beside its positions and tokens."""
    streams: int
    """Streams that go through it."""
    standby: bool
    """It is there for when others are lost."""
    leaving: bool
    """It will be gone soon: streams move elsewhere as they can."""
    prefixes: Prefixes
    """What sessions that are over have left in it."""


@dataclass(frozen=True)
class Given:
    """What a replica that chooses by itself says."""

    chosen: tuple[Chosen, ...]
    finish: str = ""
    """`stop` or `length`, when that was all."""


@runtime_checkable
class Continuing(_Replica, Protocol):
    """A replica that gives whole continuations: a server of another make."""

    def generate(self, tokens: Sequence[int], choosing: Choosing, tokens_max: int) -> AsyncGenerator[Given]:
        """What follows these tokens, at most so many, until it says that it ended. Closing it cancels. Raises
        RingLost."""
        ...


class Ring(_Replica, Protocol):
    """All layers of a model, on one node or several."""

    piece: int
    """Positions of a prompt that are sent through at once."""

    async def advance(self, piece: Advance) -> Advanced:
        """Take positions of a session through all layers. Several calls at once, also of one session: they go through
        in the order in which they were begun. Raises RingLost and RingRefused."""
        ...

    async def close_session(self, session: int, *, keep: bool = False) -> None:
        """Forget a session, or `keep` it for as long as there is memory. Raises nothing."""
        ...


Replica: TypeAlias = Ring | Continuing


def arithmetic_of(stages: Iterable[tuple[int, int, str]]) -> str:
    """Of a ring with stages (first layer, after the last, arithmetic): that of all of them, or which layers have
    which; none where one of them has none."""
    whole = sorted(stages)
    if not all(name for _, _, name in whole):
        return ""
    if len({name for _, _, name in whole}) == 1:
        return whole[0][2]
    runs = [(name, list(run)) for name, run in itertools.groupby(whole, lambda stage: stage[2])]
    return "; ".join(f"layers {run[0][0]} to {run[-1][1] - 1}: {name}" for name, run in runs)


def are_exact(went: Iterable[Replica]) -> bool:
    """Whether a stream that went through these says the tokens of an undisturbed one."""
    names = {one.arithmetic for one in went}
    return len(names) <= 1 and "" not in names


class LimitedRing(ABC):
    """A Ring that does AT_ONCE pieces of work at a time."""

    def __init__(self, name: str, *, stages: int, token_ms: float, arithmetic: str = "") -> None:
        self.name, self.arithmetic, self.token_ms, self.start_ms = name, arithmetic, token_ms, 0.0
        self.computing_ms = 0.0
        self.piece = PIECE if stages == 1 else PIECE_OF_SEVERAL
        self.streams, self.standby, self.leaving = 0, False, False
        self.prefixes = Prefixes()
        self._places = asyncio.Semaphore(AT_ONCE)

    async def advance(self, piece: Advance) -> Advanced:
        """Whoever asks may be cancelled; what is under way keeps its place until it is done."""
        await self._places.acquire()
        going = asyncio.ensure_future(self._through(piece))
        going.add_done_callback(self._done)
        return await asyncio.shield(going)

    def _done(self, going: asyncio.Future[Advanced]) -> None:
        self._places.release()
        if not going.cancelled():
            going.exception()  # looked at, so that the loop does not report what nobody waits for any more

    def computed(self, took_ms: float) -> None:
        """A step of a stream or two was computed in so long."""
        self.computing_ms += (0.1 if self.computing_ms else 1.0) * (took_ms - self.computing_ms)

    @abstractmethod
    async def _through(self, piece: Advance) -> Advanced: ...


class LocalRing(LimitedRing):
    """Stages in processes of this machine."""

    def __init__(self, name: str, stages: Sequence[StageProcess], *, arithmetic: str, token_ms: float) -> None:
        super().__init__(name, stages=len(stages), arithmetic=arithmetic, token_ms=token_ms)
        self._stages = tuple(stages)

    async def _through(self, piece: Advance) -> Advanced:
        done = Advanced()
        for stage in self._stages:
            try:
                done = await stage.advance(msgspec.structs.replace(piece, states=done.states))
            except EngineDied as error:
                raise RingLost(f"{self.name}: {error.sentence}") from error
            except EngineFailed as error:
                raise RingRefused(f"{self.name}: {error.sentence}", error.cause_code) from error
        return done

    async def close_session(self, session: int, *, keep: bool = False) -> None:
        await asyncio.gather(
            *(stage.close_session(session, keep=keep) for stage in self._stages), return_exceptions=True
        )
