"""The engine of a user's own loop: commands come in, batches go out, and the steps are the user's.

It runs in the thread of the loop, as the generator that the loop iterates over, and does the same work as the engine
of a language model: commands are answered while it waits for a round and between the steps of one, so that nothing
touches numbers that a step is using.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shoal.engines import Done, Stop
from shoal.engines.failures import FAILURES, failed
from shoal.errors import BadInput
from shoal.protocol.training import TrainJob
from shoal.sdk.loop_script import OtherLoop
from shoal.training.commands import (
    ApplyCommit,
    CancelRound,
    Command,
    LoadPrivate,
    LoadState,
    Prepare,
    Prepared,
    Reply,
    RollBack,
    RoundCancelled,
    RunRound,
    WritePrivate,
    WriteState,
)
from shoal.training.compute import describe_engine, set_up_torch, synchronize
from shoal.training.member import FlatParameters, OutOfTurn
from shoal.training.member_engine import (
    MEASURED_S,
    MEASURED_STEPS,
    WARM_UP_STEPS,
    MemberEngine,
)
from shoal.training.optimizer import Floats, TorchOptimizer

ORDERS_MAX = 64
"""Commands that may wait while a step is computed."""

Indices = NDArray[np.int64]


class BadLoop(BadInput):
    """A loop, its model or its optimizer is not one that can be shared."""

    code = "SH-142"


@dataclass(frozen=True)
class Order:
    """A command, and whom to tell what came of it. `answer` may be called in any thread."""

    command: Command
    answer: Callable[[Reply], None]


@dataclass(frozen=True)
class Over:
    """There will be no more commands: the loop ends."""

    reason: str


Orders = queue.Queue[Order | Over]


def trained_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters that are shared: all that want a gradient, by name. Raises BadLoop."""
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise BadLoop(
                f"{name or 'The model'} ({type(module).__name__}) keeps running statistics, which every process would "
                "have its own of; use a normalization without them, such as GroupNorm or LayerNorm."
            )
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise BadLoop("The model has no parameters that want a gradient.")
    for name, parameter in found.items():
        if parameter.dtype != torch.float32:
            raise BadLoop(f"Parameter {name} is {parameter.dtype}; keep parameters in float32, and use autocast.")
    if len({parameter.device for parameter in found.values()}) > 1:
        raise BadLoop("The model's parameters lie on several devices; put them on one.")
    return found


class SteadyRates:
    """Sees to it that a loop's learning rates follow from `member.progress`: while that stands still, so do they. A
    scheduler that counts steps would count those that are undone too, and no replay would find the same numbers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._seen: list[float] | None = None

    def stepped(self) -> None:
        """After a step at a progress that stands still. Raises BadLoop."""
        rates = [float(group["lr"]) for group in self._optimizer.param_groups if "lr" in group]
        if self._seen is not None and rates != self._seen:
            raise BadLoop(
                f"The learning rate went from {self._seen} to {rates} from one step to the next, while member.progress "
                "stood still: a scheduler counts steps. Steps may be undone, and others do more of them; set the rate "
                "from member.progress instead, as in: group['lr'] = base * (1 - member.progress)."
            )
        self._seen = rates


class LoopEngine:
    """One member of a job whose steps are a user's own. `batches` may be iterated once; not thread-safe."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        samples: int,
        orders: Orders,
        monotonic: Callable[[], float],
    ) -> None:
        """Raises BadLoop. From here on the model's parameters are views into one buffer."""
        self._name = name
        self._parameters = FlatParameters(trained_parameters(model))
        self._optimizer = TorchOptimizer(optimizer)
        self._rates = SteadyRates(optimizer)
        self._samples = samples
        self._orders = orders
        self._monotonic = monotonic
        self._device = self._parameters.flat.device
        self._engine: MemberEngine | None = None
        self._next: Order | Over | None = None
        self._awaited = False
        """Whether a batch was handed out and no step was reported."""
        self.round = -1
        """The round whose batches are handed out; -1 outside of one, as while the loop's speed is measured."""
        self.progress = 0.0
        """Share of the job's budget that is done at this step: a function of public records alone."""
        self.ended = ""
        """Why the loop ended."""

    # --- the loop's side -------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Indices]:
        """The samples of one step after another, until the job is over. The model then holds the newest state."""
        while True:
            order = self._next or self._orders.get()
            self._next = None
            if isinstance(order, Over):
                self.ended = order.reason
                self._show_newest()
                return
            if isinstance(order.command, Prepare):
                yield from self._prepare(order, order.command)
            elif isinstance(order.command, RunRound):
                yield from self._run_round(order, order.command)
            else:
                order.answer(self._answer(order.command))

    def stepped(self, loss: torch.Tensor | float) -> None:
        """After each optimizer step. Raises BadLoop when there was no batch for it."""
        if not self._awaited:
            raise BadLoop("member.stepped was called twice for one batch; call it once, after optimizer.step().")
        self._awaited = False
        if self.round < 0:  # while the speed is measured
            self._rates.stepped()
        if self._engine is not None:
            self._engine.member.stepped(loss)

    # --- rounds ----------------------------------------------------------------------------------------------------

    def _prepare(self, order: Order, command: Prepare) -> Generator[Indices, None, None]:
        try:
            self._check(command.job)
            set_up_torch(command.threads)
            self._engine = MemberEngine(command.job, self._parameters, self._optimizer, Path(command.state))
        except FAILURES as error:
            order.answer(failed(error))
            return
        engine, speed = self._engine, 0.0
        if command.measure:
            speed = yield from self._rehearse(engine)
        order.answer(
            Prepared(
                state=engine.newest.hash,
                private=engine.member.private.hash,
                parameters=engine.newest.layout.size,
                samples_per_s=speed,
                engine=describe_engine(self._device, command.threads, 1),
            )
        )

    def _check(self, job: TrainJob) -> None:
        if job.model.config:
            raise OtherLoop(f"Job {job.name!r} trains a language model, not a loop of its owner's.")
        if job.name != self._name:
            raise OtherLoop(f"This loop is of job {self._name!r}, not of {job.name!r}.")
        if job.data.samples != self._samples:
            raise OtherLoop(
                f"This loop has {self._samples} samples, job {job.name!r} has {job.data.samples}; every process needs "
                "the same data in the same order."
            )

    def _rehearse(self, engine: MemberEngine) -> Generator[Indices, None, float]:
        """Samples per second of the loop's own steps. Leaves no trace in the model and the optimizer."""
        batch = np.arange(min(engine.job.batch_samples, self._samples), dtype=np.int64)
        yield from self._steps(engine, engine.newest.parameters, [batch] * WARM_UP_STEPS, 0, rehearsal=True)
        steps, begin, going = 0, self._monotonic(), True
        while going and (steps < MEASURED_STEPS or self._monotonic() - begin < MEASURED_S):
            going = yield from self._steps(engine, engine.newest.parameters, [batch], 0, rehearsal=True)
            synchronize(self._device)
            steps += 1
        return steps * len(batch) / max(self._monotonic() - begin, 1e-9)

    def _run_round(self, order: Order, command: RunRound) -> Generator[Indices, None, None]:
        try:
            engine = self._prepared()
            samples, sizes = engine.samples_of(command)
            start, sent = engine.start_of(command), engine.sent_of(command)
        except FAILURES as error:
            order.answer(failed(error))
            return
        batches = np.split(samples, np.cumsum(sizes)[:-1])
        tokens = command.round_samples * engine.job.data.sequence_tokens
        done = command.tokens_done + command.rounds_in_flight * tokens
        self.round, begin = command.round, self._monotonic()
        finished = yield from self._steps(
            engine, start, batches, engine.seed_of(command), done=done, round_tokens=tokens
        )
        self.round = -1
        if not finished:
            order.answer(RoundCancelled(round=command.round))
            return
        try:
            result = engine.member.finish(sent)
            reply: Reply = engine.done(command, result, len(samples), self._monotonic() - begin)
        except FAILURES as error:
            reply = failed(error)
        order.answer(reply)

    def _steps(
        self,
        engine: MemberEngine,
        start: Floats,
        batches: Iterable[Indices],
        seed: int,
        *,
        done: int = 0,
        round_tokens: int = 0,
        rehearsal: bool = False,
    ) -> Generator[Indices, None, bool]:
        """Hand out batches, from the parameters `start`. False when something came in between, and after a rehearsal
        in any case, the member is as before. Raises BadLoop when the loop does not report its steps."""
        batches = list(batches)
        engine.member.begin(start, len(batches))
        _seed_everything(seed)
        finished = False
        try:
            for number, batch in enumerate(batches):
                self.progress = min(1.0, (done + round_tokens * number / len(batches)) / engine.job.token_budget)
                self._awaited = True
                yield batch.copy()
                if self._awaited:
                    raise BadLoop("The loop asked for its next batch without member.stepped(loss) for the last one.")
                if self._interrupted():
                    return False
            finished = not rehearsal
            return True
        finally:
            self._awaited = False
            if not finished:
                engine.member.abandon()

    def _interrupted(self) -> bool:
        """Answer what can be answered between two steps; whether something came that ends the round."""
        while self._next is None:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return False
            if isinstance(order, Over) or isinstance(order.command, CancelRound | RollBack | Prepare | Stop):
                self._next = order
            else:
                order.answer(self._answer(order.command))
        return True

    # --- other commands --------------------------------------------------------------------------------------------

    def _prepared(self) -> MemberEngine:
        if self._engine is None:
            raise OutOfTurn("The engine was asked to work before it was prepared.")
        return self._engine

    def _answer(self, command: Command) -> Reply:
        try:
            return self._do(command)
        except FAILURES as error:
            return failed(error)

    def _do(self, command: Command) -> Reply:
        match command:
            case CancelRound():
                return Done()
            case Stop():
                self._show_newest()
                return Done()
            case RollBack():
                return self._prepared().roll_back(command.private)
            case LoadPrivate():
                return self._prepared().load_private(command.path)
            case WritePrivate():
                return self._prepared().write_private(command.path)
            case ApplyCommit():
                return self._prepared().apply_commit(command)
            case LoadState():
                return self._prepared().load_state(command.path)
            case WriteState():
                return self._prepared().write_state(command.state, command.path)
            case RunRound():
                raise OutOfTurn("A round is running already; cancel it or wait for it.")
            case _:
                raise OutOfTurn(f"A user's own loop does not answer {type(command).__name__}.")

    def _show_newest(self) -> None:
        if self._engine is not None:
            self._engine.member.abandon()
            self._parameters.load(self._engine.newest.parameters)


def _seed_everything(seed: int) -> None:
    """What is random in a user's step (dropout, augmentation) follows from the round and the member."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
