"""The engine inside its process: one member of a language-model job, the shared states it holds, and what can be done
with them. `worker` connects it to the agent."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.errors import BadInput, EngineError
from shoal.identity import blake3_hash, hash_of_parts
from shoal.models.architectures import build_model, parameters_of
from shoal.models.checkpoints import write_checkpoint
from shoal.models.configs import positions_of
from shoal.models.tokenizers import load_tokenizer
from shoal.protocol.training import TrainJob
from shoal.rounds.order import sample_indices
from shoal.training.commands import (
    ApplyCommit,
    Evaluate,
    Evaluated,
    ExportCheckpoint,
    Generate,
    Generated,
    Prepare,
    Prepared,
    PrivateNow,
    RoundDone,
    RunRound,
    StateHeld,
)
from shoal.training.compute import describe_engine, open_device, set_up_torch, synchronize
from shoal.training.data import TokenShards
from shoal.training.language import CausalLanguage
from shoal.training.member import FlatParameters, Member, OutOfTurn
from shoal.training.optimizer import FlatAdamW
from shoal.training.outer import OuterStep, WeighedUpdate
from shoal.training.pacing import Pacer, processor_time
from shoal.training.private import PrivateState
from shoal.training.ranks import Ranks, RankSetup, part_of, shared_step
from shoal.training.schedule import batch_sizes, round_rates
from shoal.training.state import SharedState
from shoal.training.updates import Update, decode_update
from shoal.world import Clock

STATES_MAX = 6
"""Shared states held at once: the newest and those that rounds in flight or a replay start from."""
WARM_UP_STEPS = 2
MEASURED_STEPS = 3
MEASURED_S = 0.5
"""A measurement takes at least this many steps and seconds."""


class WrongState(EngineError):
    """A Commit led to another shared state than the one it names, or a named state is not held."""

    code = "SH-534"


class NotALanguageModel(BadInput):
    """The job has no model config: it is a user's own loop, which this engine cannot run."""

    code = "SH-535"


class LanguageEngine:
    """Everything between two commands. Not thread-safe; `run_round` gives way to other commands between its steps."""

    def __init__(self, command: Prepare, clock: Clock, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._job: TrainJob = command.job
        if not self._job.model.config:
            raise NotALanguageModel("The job has no model config: its loop is its owner's own code, run it with that.")
        set_up_torch(command.threads)
        self._device = open_device(command.device)
        self._threads, self._processes = command.threads, command.processes
        self._monotonic = monotonic
        model = build_model(self._job.model.config).to(self._device)
        self._parameters = FlatParameters(parameters_of(model))
        self._optimizer = FlatAdamW(self._parameters.flat, self._parameters.gradient, self._job.optimizer)
        seed = hash_of_parts("sketch seed", [self._job.seed.to_bytes(8, "big")])
        self._member = Member(self._parameters, self._optimizer, self._job.rounds, seed)
        self._language = CausalLanguage(model, self._device, command.dtype)
        data = self._job.data
        self._shards = TokenShards(command.shards, data.sequence_tokens, data.token_bytes)
        if self._shards.samples != data.samples:
            raise BadInput(f"The shards hold {self._shards.samples} samples; the job says {data.samples}.")
        self._outer = OuterStep(self._job.rounds)
        self._states: OrderedDict[bytes, SharedState] = OrderedDict()
        self._newest = self._hold(SharedState.read(Path(command.state)))
        self._parameters.load(self._newest.parameters)
        busy = processor_time(command.threads) if self._device.type == "cpu" else self._device_busy
        self._device_busy_s = 0.0
        self._pacer = Pacer(clock, command.speed_limit, busy)
        self._ranks = self._start_ranks(command) if command.processes > 1 else None

    def _start_ranks(self, command: Prepare) -> Ranks:
        return Ranks(
            RankSetup(
                rank=1,
                processes=command.processes,
                meeting="",
                job=command.job,
                shards=command.shards,
                device=command.device,
                threads=command.threads,
                dtype=command.dtype,
            )
        )

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.end()

    def _device_busy(self) -> float:
        return self._device_busy_s

    # --- what it is ------------------------------------------------------------------------------------------------

    async def prepared(self, measure: bool) -> Prepared:
        """Measure, where asked, and say what was loaded."""
        speed = await self._measure() if measure else 0.0
        return Prepared(
            state=self._newest.hash,
            private=self._member.private.hash,
            parameters=self._newest.layout.size,
            samples_per_s=speed,
            engine=describe_engine(self._device, self._threads, self._processes),
        )

    async def _measure(self) -> float:
        """Samples per second of full batches on this job's model, the speed limit in force."""
        size = min(self._job.batch_samples, self._shards.samples)
        samples = np.arange(size, dtype=np.int64)
        await self._compute(self._newest.parameters, np.tile(samples, WARM_UP_STEPS), [size] * WARM_UP_STEPS, None, 0)
        steps, begin = 0, self._monotonic()
        while steps < MEASURED_STEPS or self._monotonic() - begin < MEASURED_S:
            await self._compute(self._newest.parameters, samples, [size], None, 0)
            steps += 1
        elapsed = self._monotonic() - begin
        return steps * size / max(elapsed, 1e-9)

    # --- rounds ----------------------------------------------------------------------------------------------------

    async def run_round(self, command: RunRound) -> RoundDone:
        """One round of the member's work. When cancelled, the member is as before. Raises OutOfTurn, WrongState,
        BadUpdate, NotFinite."""
        job, member = self._job, self._member
        samples = sample_indices(job.seed, job.data.samples, command.ranges)
        sizes = batch_sizes(len(samples), job.batch_samples)
        rates = round_rates(
            job,
            step=command.step,
            tokens_done=command.tokens_done,
            rounds_in_flight=command.rounds_in_flight,
            round_samples=command.round_samples,
            steps=len(sizes),
        )
        in_flight = None if command.in_flight is None else self._read_update(command.in_flight)
        sent = None if command.sent is None else self._read_update(command.sent)
        start = member.start_state(self._state(command.base_state), in_flight)
        seed = hash_of_parts(
            "round seed", [job.seed.to_bytes(8, "big"), command.round.to_bytes(8, "big"), command.member]
        )
        begin = self._monotonic()
        await self._compute(start, samples, sizes, rates, int.from_bytes(seed[:7], "big"))
        result = member.finish(sent)
        elapsed = self._monotonic() - begin
        Path(command.update).write_bytes(result.update)
        if command.snapshot is not None:
            result.after.write(Path(command.snapshot))
        return RoundDone(
            round=command.round,
            update_hash=blake3_hash(result.update),
            update_bytes=len(result.update),
            private_before=result.before.hash,
            private_after=result.after.hash,
            loss_first=result.losses[0],
            loss_last=result.losses[-1],
            losses=result.losses,
            sketches=result.sketches,
            sketch_every=result.sketch_every,
            samples=len(samples),
            tokens=len(samples) * job.data.sequence_tokens,
            compute_ms=max(1, round(elapsed * 1000)),
            snapshot_bytes=result.after.size if command.snapshot is not None else 0,
        )

    async def _compute(
        self,
        start: NDArray[np.float32],
        samples: NDArray[np.int64],
        sizes: list[int],
        rates: list[float] | None,
        seed: int,
    ) -> None:
        """Inner steps from `start`. Without rates it is a rehearsal that leaves no trace."""
        member = self._member
        member.begin(start, len(sizes))
        torch.manual_seed(seed)
        if self._ranks is not None:
            self._ranks.begin(
                self._parameters,
                self._optimizer,
                step=member.private.step,
                seed=seed,
                samples=samples,
                sizes=sizes,
                rates=rates or [0.0] * len(sizes),
            )
        self._pacer.restart()
        at = done = 0
        finished = False
        try:
            for number, size in enumerate(sizes):
                self._step(samples[at : at + size], size, rates[number] if rates is not None else 0.0)
                at, done = at + size, number + 1
                await self._pacer.wait()
            finished = rates is not None
        except asyncio.CancelledError:
            if self._ranks is not None and done < len(sizes):
                self._shared(samples[:0], 1, cancel=True)
            raise
        finally:
            if not finished:
                member.abandon()

    def _step(self, batch: NDArray[np.int64], size: int, rate: float) -> None:
        begin = self._monotonic()
        loss = self._shared(part_of(batch, 0, self._processes), size)
        self._optimizer.step(rate)
        self._member.stepped(loss)
        if self._device.type != "cpu":
            synchronize(self._device)
            self._device_busy_s += self._monotonic() - begin

    def _shared(self, part: NDArray[np.int64], of_samples: int, *, cancel: bool = False) -> torch.Tensor:
        loss, _ = shared_step(
            self._language,
            self._shards,
            self._parameters,
            part,
            of_samples,
            self._job.data.sequence_tokens,
            cancel=cancel,
        )
        return loss

    def _read_update(self, path: str) -> Update:
        settings = self._job.rounds
        data = Path(path).read_bytes()
        return decode_update(data, settings.codec, self._parameters.layout.size, settings.sparse_keep)

    def roll_back(self, private: bytes) -> PrivateNow:
        self._member.roll_back(private)
        return PrivateNow(private=private)

    def load_private(self, path: str | None) -> PrivateNow:
        self._member.load_private(None if path is None else PrivateState.read(Path(path)))
        return PrivateNow(private=self._member.private.hash)

    def write_private(self, path: str) -> PrivateNow:
        private = self._member.private
        private.write(Path(path))
        return PrivateNow(private=private.hash, size=private.size)

    # --- shared states ---------------------------------------------------------------------------------------------

    def _hold(self, state: SharedState) -> SharedState:
        if state.layout != self._parameters.layout:
            raise WrongState("The shared state does not have the tensors that the job's model config asks for.")
        self._states[state.hash] = state
        self._states.move_to_end(state.hash)
        while len(self._states) > STATES_MAX:
            self._states.popitem(last=False)
        return state

    def _state(self, state_hash: bytes) -> SharedState:
        if state_hash not in self._states:
            raise WrongState(f"Shared state {state_hash.hex()[:12]} is not among the {len(self._states)} held here.")
        return self._states[state_hash]

    def apply_commit(self, command: ApplyCommit) -> StateHeld:
        """Raises WrongState when the result is not the state that the Commit names, BadUpdate, BadState."""
        accepted = [
            WeighedUpdate(self._read_update(update.path), update.weight_ppm, update.scale_ppm)
            for update in command.accepted
        ]
        state = self._outer.apply(self._state(command.previous), accepted)
        if command.state is not None and state.hash != command.state:
            raise WrongState(
                f"Commit {command.round} names shared state {command.state.hex()[:12]}, but applying it gave "
                f"{state.hash.hex()[:12]}: this node and the driver disagree, and this node stops."
            )
        self._hold(state)
        if command.write is not None:
            state.write(Path(command.write))
        return _held(state)

    def load_state(self, path: str) -> StateHeld:
        return _held(self._hold(SharedState.read(Path(path))))

    def write_state(self, state_hash: bytes, path: str) -> StateHeld:
        state = self._state(state_hash)
        state.write(Path(path))
        return _held(state)

    # --- what the model can do -------------------------------------------------------------------------------------

    def _show(self, state_hash: bytes) -> SharedState:
        if self._member.computing:
            raise OutOfTurn("The model is busy with a round; evaluate, generate or export when it is done.")
        state = self._state(state_hash)
        self._parameters.load(state.parameters)
        return state

    @torch.no_grad()
    def evaluate(self, command: Evaluate) -> Evaluated:
        self._show(command.state)
        data = self._job.data
        shards = TokenShards(command.shards, data.sequence_tokens, data.token_bytes)
        count = min(shards.samples, command.samples_max)
        samples = np.arange(count, dtype=np.int64) * shards.samples // count
        self._language.model.eval()
        total = 0.0
        for start in range(0, count, self._job.batch_samples):
            tokens = torch.from_numpy(shards.batch(samples[start : start + self._job.batch_samples]))
            total += float(self._language.loss(tokens.to(self._device), 1))
        self._language.model.train()
        return Evaluated(loss=total / (count * data.sequence_tokens), tokens=count * data.sequence_tokens)

    def generate(self, command: Generate) -> Generated:
        self._show(command.state)
        tokenizer = load_tokenizer(command.tokenizer)
        prompt = tokenizer.encode(command.prompt).tolist() or ([] if tokenizer.end is None else [tokenizer.end])
        if not prompt:
            raise BadInput("There is nothing to continue: give a prompt of at least one token.")
        tokens = self._language.generate(
            prompt,
            command.tokens,
            temperature=command.temperature,
            seed=command.seed,
            end=tokenizer.end,
            positions=positions_of(self._job.model.config),
        )
        return Generated(text=tokenizer.decode(tokens), tokens=tuple(tokens))

    def export_checkpoint(self, command: ExportCheckpoint) -> None:
        state = self._show(command.state)
        tokenizer = None if command.tokenizer is None else load_tokenizer(command.tokenizer)
        views = state.layout.views(state.parameters)
        write_checkpoint(Path(command.directory), self._job.model.config, views, tokenizer)


def _held(state: SharedState) -> StateHeld:
    return StateHeld(state=state.hash, size=state.size)
