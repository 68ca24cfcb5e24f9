"""Runs a user's script on its owner's machine: `python -m shoal.sdk.loop_worker SCRIPT look FOLDER PARENT` to see what
it starts from and how good a model is, `... SCRIPT engine PARENT` as the engine of a replay, with commands on stdin
and replies on what was stdout.
"""

from __future__ import annotations

import os
import queue
import runpy
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shoal.engines import FRAME, FRAME_MAX_BYTES, Stop, die_with_parent
from shoal.errors import ShoalError
from shoal.sdk.loop_engine import ORDERS_MAX, BadLoop, LoopEngine, Order, Orders, Over, SteadyRates, trained_parameters
from shoal.sdk.loop_script import LOOKED_FILE, START_FILE, STATE_FILE, WANTED_FILE, Looked, LookWanted
from shoal.sdk.own_loop import LoopMember, run_in
from shoal.training.commands import Answered, Asked, Reply
from shoal.training.compute import set_up_torch
from shoal.training.member import FlatParameters
from shoal.training.member_engine import MEASURED_STEPS, WARM_UP_STEPS
from shoal.training.state import SharedState

_decoder = msgspec.msgpack.Decoder(Asked)
_encoder = msgspec.msgpack.Encoder()


class Look:
    """A loop that is only looked at: it hands out a few batches to measure the time of a step, or none, and what the
    script does after it is done with the start state or with a given one."""

    def __init__(
        self, folder: Path, job: str, model: nn.Module, optimizer: torch.optim.Optimizer, samples: int
    ) -> None:
        self.round, self.progress, self.ended = -1, 0.0, "The loop was only looked at."
        self._rates = SteadyRates(optimizer)
        self._parameters = FlatParameters(trained_parameters(model))
        self._folder = folder
        self._wanted = msgspec.json.decode((folder / WANTED_FILE).read_bytes(), type=LookWanted)
        self._looked = Looked(job=job, samples=samples)
        self._awaited = False
        self._model_state = self._state()

    def _state(self) -> SharedState:
        self.name = "start state"
        if (self._folder / STATE_FILE).exists():
            self.name = "trained state"
            return SharedState.read(self._folder / STATE_FILE)
        state = SharedState.start(self._parameters.layout, self._parameters.numbers().copy(), momentum=False)
        state.write(self._folder / START_FILE)
        return state

    def batches(self) -> Iterator[NDArray[np.int64]]:
        if self._model_state.layout != self._parameters.layout:
            raise BadLoop("The script's model has other parameters than the job's; replay and measure with the same.")
        if self._wanted.rehearse_samples:
            set_up_torch(torch.get_num_threads())
            batch = np.arange(min(self._wanted.rehearse_samples, self._looked.samples), dtype=np.int64)
            begin = time.perf_counter()
            for step in range(WARM_UP_STEPS + MEASURED_STEPS):
                if step == WARM_UP_STEPS:
                    begin = time.perf_counter()
                self._awaited = True
                yield batch.copy()
                if self._awaited:
                    raise BadLoop("The loop asked for its next batch without member.stepped(loss) for the last one.")
            taken_s = max(1e-9, time.perf_counter() - begin)
            self._note(samples_per_s=MEASURED_STEPS * len(batch) / taken_s)
        self._parameters.load(self._model_state.parameters)
        self._note()

    def stepped(self, loss: torch.Tensor | float) -> None:
        if not self._awaited:
            raise BadLoop("member.stepped was called twice for one batch; call it once, after optimizer.step().")
        self._awaited = False
        self._rates.stepped()

    def held_out(self, loss: float) -> None:
        self._note(held_out_loss=loss)

    def _note(self, **changes: float) -> None:
        self._looked = msgspec.structs.replace(self._looked, **changes)
        (self._folder / LOOKED_FILE).write_bytes(msgspec.json.encode(self._looked))


class ReplayLoop(LoopEngine):
    """The engine of a replay: the script is over when its loop is."""

    def batches(self) -> Iterator[NDArray[np.int64]]:
        yield from super().batches()
        sys.stderr.flush()
        os._exit(0)


def read_orders(commands: IO[bytes], replies: IO[bytes], orders: Orders) -> None:
    """Frames in, orders out, until Stop or the end of the pipe."""
    writing = threading.Lock()

    def send(number: int, reply: Reply) -> None:
        body = _encoder.encode(Answered(number, reply))
        with writing:
            replies.write(FRAME.pack(len(body)) + body)
            replies.flush()

    while len(head := commands.read(FRAME.size)) == FRAME.size:
        (length,) = FRAME.unpack(head)
        if length > FRAME_MAX_BYTES:
            break
        asked = _decoder.decode(commands.read(length))
        orders.put(Order(asked.command, lambda reply, number=asked.number: send(number, reply)))  # type: ignore[misc]
        if isinstance(asked.command, Stop):
            break
    orders.put(Over("The replay is done."))


def look(folder: Path) -> None:
    def setting(job: str, model: nn.Module, optimizer: torch.optim.Optimizer, samples: int) -> LoopMember:
        seen = Look(folder, job, model, optimizer, samples)
        return LoopMember(seen, seen.name, held_out=seen.held_out)

    run_in(setting)


def serve(replies: IO[bytes]) -> None:
    def setting(job: str, model: nn.Module, optimizer: torch.optim.Optimizer, samples: int) -> LoopMember:
        orders: Orders = queue.Queue(ORDERS_MAX)
        engine = ReplayLoop(job, model, optimizer, samples, orders, time.monotonic)
        reader = threading.Thread(target=read_orders, args=(sys.stdin.buffer, replies, orders), daemon=True)
        reader.start()
        return LoopMember(engine, "replay")

    run_in(setting)


def main() -> int:
    script, what, *rest = sys.argv[1:]
    die_with_parent(int(rest[-1]))
    if what == "look":
        look(Path(rest[0]))
    else:
        replies = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        serve(replies)
    sys.argv = [script]
    sys.path[0] = str(Path(script).resolve().parent)  # as if python had been started with it
    try:
        runpy.run_path(script, run_name="__main__")
    except ShoalError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
