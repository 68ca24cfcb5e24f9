"""What a job's owner does with its model while it trains and at the end: held-out losses, a completion, the checkpoint.

It has an engine of its own for that; a job with a loop of its own has the owner's script, which does what of it it can.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

from shoal.driver.folder import FolderWriteFailed, RunFolder, saying_room
from shoal.driver.lines import Evaluation
from shoal.driver.report import Completion
from shoal.engines import EngineFailed
from shoal.sdk.loop_script import ScriptFailed, measure
from shoal.sdk.notes import OwnerNotes
from shoal.storage import BlobStore
from shoal.training.commands import Evaluate, ExportCheckpoint, Generate, Prepare, ShardFile
from shoal.training.process import EngineProcess
from shoal.training.state import SharedState

HELD_OUT_SAMPLES = 512
"""Held-out samples of an evaluation, spread evenly."""
EVALUATIONS = 5
"""Evaluations between the first and the last."""
COMPLETION_TOKENS = 120


class Evaluator:
    """For one run, while it is driven."""

    def __init__(
        self,
        folder: RunFolder,
        notes: OwnerNotes,
        store: BlobStore,
        *,
        tokens_total: int,
        elapsed_s: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        """`tokens_total` is how far the run has come; `elapsed_s` how long it has been driven."""
        self._folder, self._notes, self._store = folder, notes, store
        self._elapsed_s, self._say = elapsed_s, say
        self._job = folder.train_job()
        self._script = Path(notes.script) if notes.script is not None else None
        self._engine: EngineProcess | None = None
        self._starting: asyncio.Task[None] | None = None
        self._members_work = asyncio.Event()
        self._measuring = asyncio.Lock()
        self._beside: set[asyncio.Task[float | None]] = set()
        self._step = self._job.token_budget / (EVALUATIONS + 1)
        self._next = tokens_total + self._step

    async def start(self, state: SharedState) -> None:
        """The engine starts when members work; a model that was not measured yet is, then."""
        self._starting = asyncio.create_task(self._start_engine(state))
        if all(one.round >= 0 for one in self._folder.notes(Evaluation)):
            untrained = await asyncio.to_thread(SharedState.read, self._store.path(self._job.model.start.hash))
            self._evaluate_beside(-1, 0, untrained)

    def members_work(self) -> None:
        """Or there is nothing left for them to do."""
        self._members_work.set()

    def committed(self, round_number: int, tokens_total: int, state: SharedState) -> None:
        """Now and then the model is measured, beside the training. A script reads its data anew each time: it waits for
        the end."""
        if tokens_total >= self._next and tokens_total < self._job.token_budget:
            self._next += self._step
            if self._script is None:
                self._evaluate_beside(round_number, tokens_total, state)

    async def settle(self) -> None:
        """What it does beside the training is done, or, where no member ever worked, left."""
        if self._starting is None:
            return
        if not self._members_work.is_set():
            self._starting.cancel()
        await asyncio.gather(*self._beside, self._starting, return_exceptions=True)

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.stop()

    async def evaluate(self, round_number: int, tokens_total: int, state: SharedState) -> float | None:
        """The held-out loss, written among the run's lines. None where there is nothing to measure it on, and where it
        is no number."""
        if self._script is not None:
            found = self._notes.untrained_loss if round_number < 0 else await self._measure_script(self._script, state)
        elif self._notes.held_out:
            found = await self._measure(state)
        else:
            found = None
        if found is None:
            return None
        loss = found if math.isfinite(found) else None
        self._folder.note(
            Evaluation(round=round_number, time_s=self._elapsed_s(), tokens_total=tokens_total, loss=loss)
        )
        return loss

    async def export(self, state: SharedState, prompt: str | None, seed: int) -> Completion | None:
        """Write the trained model, and have it continue the prompt if there is one."""
        self._folder.model.mkdir(exist_ok=True)
        if self._script is not None:
            parameters = SharedState.start(state.layout, state.parameters, momentum=False)
            await asyncio.to_thread(parameters.write, self._folder.model / "model.safetensors")
            return None
        engine = await self._started()
        held = await engine.load_state(await self._write_now(state))
        completion = None
        tokenizer = self._notes.tokenizer_in(self._folder)
        if prompt is not None:
            text = await engine.generate(
                Generate(
                    state=held.state,
                    tokenizer=tokenizer,
                    prompt=prompt,
                    tokens=COMPLETION_TOKENS,
                    temperature=0.6,
                    seed=seed,
                )
            )
            completion = Completion(prompt=prompt, text=text.text)
        try:
            await engine.export_checkpoint(
                ExportCheckpoint(state=held.state, directory=str(self._folder.model), tokenizer=tokenizer)
            )
        except EngineFailed as error:
            raise FolderWriteFailed(
                f"The trained model could not be written to {self._folder.model}: {error.sentence} All of the training "
                "is kept; when that is mended, use --resume."
            ) from error
        return completion

    async def _start_engine(self, state: SharedState) -> None:
        """It loads its libraries, which takes seconds of every core here, when the members are at work: those on this
        machine measure themselves before."""
        if self._script is not None:
            return
        await self._members_work.wait()
        self._engine = await EngineProcess.start("the driver")
        path = await self._write_now(state)
        shards = tuple(
            ShardFile(str(self._store.path(shard.blob.hash)), shard.sequences) for shard in self._job.data.shards
        )
        await self._engine.prepare(
            Prepare(job=self._job, state=str(path), shards=shards, dtype="float32", measure=False)
        )

    async def _started(self) -> EngineProcess:
        """Raises EngineFailed."""
        assert self._starting is not None
        await self._starting
        assert self._engine is not None
        return self._engine

    async def _write_now(self, state: SharedState) -> Path:
        """The file in which the engine finds a state."""
        path = self._folder.data / "state.now"
        with saying_room(self._folder.path):
            await asyncio.to_thread(state.write, path)
        return path

    def _evaluate_beside(self, round_number: int, tokens_total: int, state: SharedState) -> None:
        task = asyncio.create_task(self.evaluate(round_number, tokens_total, state))
        self._beside.add(task)
        task.add_done_callback(self._evaluated)

    def _evaluated(self, task: asyncio.Task[float | None]) -> None:
        """A held-out loss on the way is worth a sentence when it fails; the last one is waited for."""
        self._beside.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._say(f"The model could not be measured: {error}")

    async def _measure(self, state: SharedState) -> float:
        async with self._measuring:
            engine = await self._started()
            held = await engine.load_state(await self._write_now(state))
            done = await engine.evaluate(
                Evaluate(state=held.state, shards=self._notes.held_out_in(self._folder), samples_max=HELD_OUT_SAMPLES)
            )
        return done.loss

    async def _measure_script(self, script: Path, state: SharedState) -> float | None:
        """What a script does after its loop, with this state. That it fails costs the figure, not the run."""
        try:
            looked, said = await asyncio.to_thread(measure, script, state)
        except ScriptFailed as error:
            self._say(f"The model could not be measured: {error}")
            return None
        if said:
            self._say(said)
        return looked.held_out_loss
