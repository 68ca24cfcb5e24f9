"""A member that lies, for trying the defences. Nothing else in Shoal knows of it.

Its updates are well-formed, correctly signed, finite and of ordinary norm; they were only not computed from what was
assigned. The engine is honest; what is done to its work stands here, between it and the member.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.errors import BadInput
from shoal.identity import blake3_hash
from shoal.node.member import MemberRun
from shoal.protocol.training import SampleRange, TrainJob
from shoal.training.commands import Prepare, Prepared, RoundDone, RunRound
from shoal.training.process import EngineProcess
from shoal.training.updates import decode_update, encode_update

LIES = {
    "wrong-data": "trains on other samples than it was assigned",
    "lazy": "does half of the steps and claims all",
    "noise": "sends noise of the norm that its true update had",
    "stale": "sends its first update again and again",
    "flipped": "sends its true update with the sign flipped",
}


class UnknownLie(BadInput):
    """A way of lying that there is not."""

    code = "SH-104"


class LyingEngine:
    """An engine whose results are tampered with on their way to the member."""

    def __init__(self, engine: EngineProcess, lie: str) -> None:
        self._engine = engine
        self._lie = lie
        self._job: TrainJob | None = None
        self._parameters = 0
        self._first: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def prepare(self, command: Prepare) -> Prepared:
        self._job = command.job
        prepared = await self._engine.prepare(command)
        self._parameters = prepared.parameters
        return prepared

    async def run_round(self, command: RunRound) -> RoundDone:
        if self._lie == "wrong-data":
            return await self._engine.run_round(
                msgspec.structs.replace(command, ranges=tuple(self._elsewhere(one) for one in command.ranges))
            )
        if self._lie == "lazy":
            return await self._half(command)
        done = await self._engine.run_round(command)
        path = Path(command.update)
        data = self._tampered(path.read_bytes(), command.round)
        path.write_bytes(data)
        return msgspec.structs.replace(done, update_hash=blake3_hash(data), update_bytes=len(data))

    def _elsewhere(self, one: SampleRange) -> SampleRange:
        """As many samples, from the beginning of the same pass: always the same few."""
        return SampleRange(one.pass_number, 0, one.samples)

    async def _half(self, command: RunRound) -> RoundDone:
        wanted = sum(one.samples for one in command.ranges)
        left, ranges = max(1, wanted // 2), []
        for one in command.ranges:
            take = min(left, one.samples)
            if take:
                ranges.append(SampleRange(one.pass_number, one.start, one.start + take))
            left -= take
        done = await self._engine.run_round(msgspec.structs.replace(command, ranges=tuple(ranges)))
        tokens = done.tokens * wanted // max(1, done.samples)
        return msgspec.structs.replace(done, samples=wanted, tokens=tokens, compute_ms=done.compute_ms * 2)

    def _tampered(self, data: bytes, round_number: int) -> bytes:
        if self._lie == "stale":
            self._first = self._first or data
            return self._first
        assert self._job is not None
        rounds = self._job.rounds
        update = decode_update(data, rounds.codec, self._parameters, rounds.sparse_keep)
        flat = update.dense()
        if self._lie == "flipped":
            return encode_update(-flat, rounds.codec, rounds.sparse_keep)
        noise = np.random.default_rng(round_number).standard_normal(flat.size).astype(np.float32)
        sent = decode_update(
            encode_update(noise, rounds.codec, rounds.sparse_keep), rounds.codec, flat.size, rounds.sparse_keep
        )
        ratio = float(np.linalg.norm(flat)) / max(1e-30, float(np.linalg.norm(sent.dense())))
        return encode_update((noise * ratio).astype(np.float32), rounds.codec, rounds.sparse_keep)


def dishonest_member(lie: str) -> Callable[..., MemberRun]:
    """A MemberRun that lies in this way. Raises UnknownLie."""
    if lie not in LIES:
        raise UnknownLie(f"There is no lie {lie!r}; there are {', '.join(LIES)}.")

    async def start(*args: Any, **options: Any) -> LyingEngine:
        return LyingEngine(await EngineProcess.start(*args, **options), lie)

    starter: Callable[..., Awaitable[Any]] = start
    return functools.partial(MemberRun, start_engine=starter)
