"""The child process of a stage: `python -m shoal.inference.worker PARENT_PID`, or forked (`shoal.engines.template`).

Commands wait in a queue while a step is computed; each step takes those that `batching.next_step` names, and answers
them together. One thread: what arrives meanwhile lies in the pipe.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from shoal.engines import Done, Stop, worker
from shoal.engines.failures import FAILURES, failed
from shoal.errors import EngineError
from shoal.inference.batching import Ask, StepCost, next_step
from shoal.inference.commands import Advance, Advanced, Asked, CloseSession, LoadStage, Reply, StageLoaded
from shoal.inference.masks import unpacked
from shoal.inference.sampling import choose
from shoal.inference.stage import POSITIONS_MAX, BadPiece, BadStates, Piece, StageEngine
from shoal.protocol.serving import Chosen
from shoal.world import Clock, SystemClock
from shoal.world.processes import stay_within_memory

QUEUE_MAX = 256
"""Commands that may wait; the agent has fewer unanswered."""
MEASURED_STEPS = 5
STREAM_MAX = 32
"""So few positions that end in a choice are a stream's next token and its guesses; more are a prompt."""


class StageNotReady(EngineError):
    """A stage was asked to work before it was loaded, or loaded twice."""

    code = "SH-573"


@dataclass
class _Waiting:
    number: int
    command: Advance
    since_ms: int


class Worker:
    def __init__(self, pipe: worker.Pipe, clock: Clock) -> None:
        self._pipe, self._clock = pipe, clock
        self._engine: StageEngine | None = None
        self._waiting: list[_Waiting] = []
        self._cost = StepCost()
        self._limit = 1.0

    async def run(self) -> None:
        """Until Stop or the end of stdin."""
        asked: asyncio.Queue[Asked | None] = asyncio.Queue(QUEUE_MAX)
        reading = asyncio.create_task(self._read(asked))
        try:
            while True:
                while not self._waiting or not asked.empty():
                    one = await asked.get()
                    if one is None:
                        return await reading  # raises what was wrong with a frame
                    if isinstance(one.command, Stop):
                        return await self._pipe.send(one.number, Done())
                    await self._take(one)
                await self._step()
                await asyncio.sleep(0)  # what has arrived meanwhile is read
        finally:
            reading.cancel()

    async def _read(self, asked: asyncio.Queue[Asked | None]) -> None:
        try:
            while (one := await self._pipe.next()) is not None:
                await asked.put(one)
        finally:
            await asked.put(None)

    async def _take(self, asked: Asked) -> None:
        command = asked.command
        try:
            if isinstance(command, LoadStage):
                await self._pipe.send(asked.number, self._load(command))
            elif isinstance(command, CloseSession):
                self._loaded().close(command.session, keep=command.keep)
                for one in [one for one in self._waiting if one.command.session == command.session]:
                    self._waiting.remove(one)
                    await self._pipe.send(one.number, failed(BadPiece(f"Session {command.session} was closed.")))
                await self._pipe.send(asked.number, Done())
            elif isinstance(command, Advance):
                self._loaded()
                self._waiting.append(_Waiting(asked.number, command, self._now_ms()))
        except FAILURES as error:
            await self._pipe.send(asked.number, failed(error))

    def _load(self, command: LoadStage) -> StageLoaded:
        if self._engine is not None:
            raise StageNotReady("The stage is loaded already; another one needs another engine.")
        torch.set_num_threads(command.threads)
        if command.device == "cpu":
            stay_within_memory()
        self._limit = command.speed_limit
        engine = StageEngine.read(
            command.config, [Path(file) for file in command.files], command.first, command.stop,
            command.memory_bytes, command.device, command.parts,
        )  # fmt: skip
        self._engine = engine
        layers_ms, last_ms = engine.measured(MEASURED_STEPS, self._clock.monotonic)
        return StageLoaded(
            arithmetic=engine.arithmetic,
            layer_ms=layers_ms / (command.stop - command.first) / self._limit,
            last_ms=last_ms / self._limit,
            weights_bytes=engine.weights_bytes,
        )

    def _loaded(self) -> StageEngine:
        if self._engine is None:
            raise StageNotReady("The stage was asked to work before it was loaded.")
        return self._engine

    # --- steps -----------------------------------------------------------------------------------------------------

    async def _step(self) -> None:
        """One step over those who wait. Of a session only its oldest command: they follow one another."""
        first: dict[int, _Waiting] = {}
        for one in self._waiting:
            first.setdefault(one.command.session, one)
        asks = [
            Ask(session, len(one.command.tokens), one.since_ms, fresh=not _is_stream(one.command))
            for session, one in first.items()
        ]
        taken = [first[session] for session in next_step(asks, self._cost, positions_max=POSITIONS_MAX).sessions]
        for one in taken:
            self._waiting.remove(one)
        began = self._clock.monotonic()
        computed = self._computed(taken)
        took = self._clock.monotonic() - began
        for one, reply in computed:
            if isinstance(reply, Advanced):
                reply = msgspec.structs.replace(reply, computed_ms=took * 1000)
            await self._pipe.send(one.number, reply)
        self._cost = self._cost.measured(sum(len(one.command.tokens) for one in taken), took * 1000)
        if self._limit < 1:
            await self._clock.sleep(took * (1 / self._limit - 1))

    def _computed(self, taken: list[_Waiting]) -> list[tuple[_Waiting, Reply]]:
        """Together; and each alone where one of them does not fit, so that it spoils nobody else's."""
        try:
            return list(zip(taken, self._together([one.command for one in taken]), strict=True))
        except FAILURES as error:
            if len(taken) == 1:
                return [(taken[0], failed(error))]
        return [pair for one in taken for pair in self._computed([one])]

    def _together(self, commands: list[Advance]) -> list[Reply]:
        engine = self._loaded()
        for command in commands:
            _check_wanted(command)
        states = engine.step(
            [
                Piece(command.session, command.start, self._inputs(command), command.tokens, command.source)
                for command in commands
            ]
        )
        if not engine.is_last:
            return [Advanced(states=_bytes(one)) for one in states]
        wanted = [one[len(one) - command.choose :] for one, command in zip(states, commands, strict=True)]
        followed = [
            one for one, command in zip(wanted, commands, strict=True) if len(one) and not command.states_wanted
        ]
        logits = iter(engine.logits(torch.cat(followed)).cpu().numpy() if followed else ())
        return [
            Advanced(states=_bytes(one))
            if command.states_wanted
            else Advanced(chosen=tuple(self._chosen(command, logits)))
            for one, command in zip(wanted, commands, strict=True)
        ]

    def _inputs(self, command: Advance) -> torch.Tensor:
        engine = self._loaded()
        if engine.takes_tokens:
            return torch.tensor(command.tokens, dtype=torch.int64)
        hidden = engine.shape.hidden
        if len(command.states) != 4 * hidden * len(command.tokens):
            raise BadStates(
                f"{len(command.states)} bytes of hidden states came for {len(command.tokens)} positions; this stage "
                f"takes {4 * hidden} for each."
            )
        values = np.frombuffer(command.states, dtype="<f4").astype(np.float32)
        return torch.from_numpy(values.reshape(len(command.tokens), hidden))

    def _chosen(self, command: Advance, logits: Iterator[NDArray[np.float32]]) -> Iterator[Chosen]:
        """The tokens that follow the last `choose` positions; takes so many of `logits`."""
        wanted = command.sampling
        allowed = unpacked(wanted.masks, self._loaded().shape.vocabulary)
        stop = command.start + len(command.tokens)
        for position in range(stop - command.choose, stop):
            seen = None
            if wanted.presence_penalty or wanted.frequency_penalty:
                seen = Counter(self._loaded().tokens(command.session)[wanted.prompt_tokens : position + 1])
            try:
                yield choose(next(logits), wanted, position + 1, seen, next(allowed, None))
            except ValueError as error:
                raise BadPiece(f"The model gave no usable answer: {error}.") from error

    def _now_ms(self) -> int:
        return round(self._clock.monotonic() * 1000)


def _bytes(states: torch.Tensor) -> bytes:
    return states.float().cpu().numpy().astype("<f4").tobytes()


def _check_wanted(command: Advance) -> None:
    if command.choose > len(command.tokens):
        raise BadPiece(f"{command.choose} tokens are wanted after {len(command.tokens)} positions.")
    masks = len(command.sampling.masks)
    if masks not in (0, command.choose):
        raise BadPiece(f"{command.choose} tokens are wanted, and {masks} masks came.")


def _is_stream(command: Advance) -> bool:
    return command.choose > 0 and not command.states_wanted and len(command.tokens) <= STREAM_MAX and command.start > 0


def work(parent: int) -> None:
    """Be the stage of the process `parent`, until the end."""
    worker.work(parent, Asked, lambda pipe: Worker(pipe, SystemClock()).run())


if __name__ == "__main__":
    work(int(sys.argv[1]))
