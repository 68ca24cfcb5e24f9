"""The engine inside its process: one member of a language-model job, the shared states it holds, and what can be done
with them. `worker` connects it to the agent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.errors import BadInput
from shoal.models.architectures import build_model, parameters_of, refuse_depth
from shoal.models.checkpoints import write_checkpoint
from shoal.models.configs import positions_of
from shoal.models.tokenizers import load_tokenizer
from shoal.training.commands import (
    Evaluate,
    Evaluated,
    ExportCheckpoint,
    Generate,
    Generated,
    Prepare,
    Prepared,
    RoundDone,
    RunRound,
)
from shoal.training.compute import describe_engine, open_device, set_up_torch, synchronize
from shoal.training.data import TokenShards
from shoal.training.language import CausalLanguage
from shoal.training.member import FlatParameters, OutOfTurn
from shoal.training.member_engine import MEASURED_S, MEASURED_STEPS, WARM_UP_STEPS, MemberEngine
from shoal.training.optimizer import FlatAdamW
from shoal.training.pacing import Pacer, processor_time
from shoal.training.ranks import Ranks, RankSetup, part_of, shared_step
from shoal.training.schedule import round_rates
from shoal.training.state import SharedState
from shoal.world import Clock


class NotALanguageModel(BadInput):
    """The job has no model config: it is a user's own loop, which this engine cannot run."""

    code = "SH-151"


class LanguageEngine(MemberEngine):
    """Everything between two commands. Not thread-safe; `run_round` gives way to other commands between its steps."""

    def __init__(self, command: Prepare, clock: Clock, monotonic: Callable[[], float] = time.monotonic) -> None:
        job = command.job
        if not job.model.config:
            raise NotALanguageModel("The job has no model config: its loop is its owner's own code, run it with that.")
        set_up_torch(command.threads)
        self._device = open_device(command.device)
        self._threads, self._processes = command.threads, command.processes
        self._monotonic = monotonic
        refuse_depth(job.model.config, job.model.parameters)
        model = build_model(job.model.config).to(self._device)
        parameters = FlatParameters(parameters_of(model))
        self._optimizer = FlatAdamW(parameters.flat, parameters.gradient, job.optimizer)
        super().__init__(job, parameters, self._optimizer, Path(command.state))
        self._language = CausalLanguage(model, self._device, command.dtype)
        self._shards = TokenShards(command.shards, job.data.sequence_tokens, job.data.token_bytes)
        if self._shards.samples != job.data.samples:
            raise BadInput(f"The shards hold {self._shards.samples} samples; the job says {job.data.samples}.")
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
            state=self.newest.hash,
            private=self.member.private.hash,
            parameters=self.newest.layout.size,
            samples_per_s=speed,
            engine=describe_engine(self._device, self._threads, self._processes),
        )

    async def _measure(self) -> float:
        """Samples per second of full batches on this job's model, the speed limit in force."""
        size = min(self.job.batch_samples, self._shards.samples)
        samples = np.arange(size, dtype=np.int64)
        await self._compute(self.newest.parameters, np.tile(samples, WARM_UP_STEPS), [size] * WARM_UP_STEPS, None, 0)
        steps, begin = 0, self._monotonic()
        while steps < MEASURED_STEPS or self._monotonic() - begin < MEASURED_S:
            await self._compute(self.newest.parameters, samples, [size], None, 0)
            steps += 1
        elapsed = self._monotonic() - begin
        return steps * size / max(elapsed, 1e-9)

    # --- rounds ----------------------------------------------------------------------------------------------------

    async def run_round(self, command: RunRound) -> RoundDone:
        """One round of the member's work. When cancelled, the member is as before. Raises OutOfTurn, WrongState,
        BadUpdate, NotFinite."""
        job, member = self.job, self.member
        samples, sizes = self.samples_of(command)
        rates = round_rates(
            job,
            step=command.step,
            tokens_done=command.tokens_done,
            rounds_in_flight=command.rounds_in_flight,
            round_samples=command.round_samples,
            steps=len(sizes),
        )
        start, sent = self.start_of(command), self.sent_of(command)
        begin = self._monotonic()
        await self._compute(start, samples, sizes, rates, self.seed_of(command))
        result = member.finish(sent)
        return self.done(command, result, len(samples), self._monotonic() - begin)

    async def _compute(
        self,
        start: NDArray[np.float32],
        samples: NDArray[np.int64],
        sizes: list[int],
        rates: list[float] | None,
        seed: int,
    ) -> None:
        """Inner steps from `start`. Without rates it is a rehearsal that leaves no trace."""
        member = self.member
        member.begin(start, len(sizes))
        torch.manual_seed(seed)
        if self._ranks is not None:
            self._ranks.begin(
                self.parameters,
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
        self.member.stepped(loss)
        if self._device.type != "cpu":
            synchronize(self._device)
            self._device_busy_s += self._monotonic() - begin

    def _shared(self, part: NDArray[np.int64], of_samples: int, *, cancel: bool = False) -> torch.Tensor:
        loss, _ = shared_step(
            self._language,
            self._shards,
            self.parameters,
            part,
            of_samples,
            self.job.data.sequence_tokens,
            cancel=cancel,
        )
        return loss

    # --- what the model can do -------------------------------------------------------------------------------------

    def _show(self, state_hash: bytes) -> SharedState:
        if self.member.computing:
            raise OutOfTurn("The model is busy with a round; evaluate, generate or export when it is done.")
        state = self.state(state_hash)
        self.parameters.load(state.parameters)
        return state

    @torch.no_grad()
    def evaluate(self, command: Evaluate) -> Evaluated:
        self._show(command.state)
        data = self.job.data
        shards = TokenShards(command.shards, data.sequence_tokens, data.token_bytes)
        count = min(shards.samples, command.samples_max)
        samples = np.arange(count, dtype=np.int64) * shards.samples // count
        self._language.model.eval()
        total = 0.0
        for start in range(0, count, self.job.batch_samples):
            tokens = torch.from_numpy(shards.batch(samples[start : start + self.job.batch_samples]))
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
            positions=positions_of(self.job.model.config),
        )
        return Generated(text=tokenizer.decode(tokens), tokens=tuple(tokens))

    def export_checkpoint(self, command: ExportCheckpoint) -> None:
        state = self._show(command.state)
        tokenizer = None if command.tokenizer is None else load_tokenizer(command.tokenizer)
        views = state.layout.views(state.parameters)
        write_checkpoint(Path(command.directory), self.job.model.config, views, tokenizer)
