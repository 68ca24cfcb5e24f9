"""One member as several processes: each step's batch is divided among them, their gradients are added, and all take the
same optimizer step.

Rank 0 is the engine process and talks to the agent; the others follow it. At the start of a round rank 0 sends them
everything that the round depends on (parameters, moments, samples, learning rates), so that they carry nothing from
round to round and nothing needs undoing in them. Gradients are summed by torch.distributed (gloo on CPU, NCCL on CUDA)
over the flat buffer, each process' share weighted by its samples: uneven batches give exactly the mean over all
samples. The order of that sum depends on the number of processes, so a bit-exact replay needs the same number.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from msgspec import Meta
from numpy.typing import NDArray

from shoal.engines import FRAME, FRAME_MAX_BYTES, die_with_parent
from shoal.errors import EngineError
from shoal.models.architectures import build_model, parameters_of
from shoal.protocol.training import TrainJob
from shoal.training.commands import ShardFile, Threads
from shoal.training.compute import open_device, set_up_torch
from shoal.training.data import TokenShards
from shoal.training.language import CausalLanguage
from shoal.training.member import FlatParameters
from shoal.training.optimizer import FlatAdamW

IDLE_MAX = timedelta(days=30)
"""How long a follower waits for the next round; it ends with its parent anyway."""
EXIT_WAIT_S = 10
END, ROUND = 0, 1


class RankLost(EngineError):
    """One of a member's processes is gone, and with it the round."""

    code = "SH-532"


class RankSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a follower is told on its stdin, as one frame."""

    rank: Annotated[int, Meta(ge=1, le=64)]
    processes: Annotated[int, Meta(ge=2, le=64)]
    meeting: str
    """Path of the file through which the processes find each other."""
    job: TrainJob
    shards: tuple[ShardFile, ...]
    device: str
    threads: Threads
    dtype: str


class Ranks:
    """Rank 0's side."""

    def __init__(self, setup: RankSetup) -> None:
        """Start the other processes and meet them. `setup` is that of rank 1. Raises RankLost."""
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-ranks-"))
        self.processes = setup.processes
        self._children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, setup.processes):
                told = msgspec.structs.replace(setup, rank=rank, meeting=str(self._folder / "meeting"))
                child = subprocess.Popen(
                    [sys.executable, "-m", "shoal.training.ranks", str(os.getpid())], stdin=subprocess.PIPE
                )
                self._children.append(child)
                body = msgspec.msgpack.encode(told)
                assert child.stdin is not None
                child.stdin.write(FRAME.pack(len(body)) + body)
                child.stdin.flush()
            _meet(0, setup.processes, str(self._folder / "meeting"), setup.device)
        except (OSError, RuntimeError) as error:
            self.close()
            raise RankLost(f"The member's {setup.processes} processes did not find each other: {error}.") from error

    def close(self) -> None:
        """Let them end; kill those that do not."""
        if dist.is_initialized():
            dist.destroy_process_group()
        for child in self._children:
            if child.stdin is not None:
                child.stdin.close()
            try:
                child.wait(EXIT_WAIT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def end(self) -> None:
        _send(torch.tensor([END, 0, 0, 0, 0]), "to end")
        self.close()

    def begin(
        self,
        parameters: FlatParameters,
        optimizer: FlatAdamW,
        *,
        step: int,
        seed: int,
        samples: NDArray[np.int64],
        sizes: list[int],
        rates: list[float],
    ) -> None:
        """A round begins: all that it depends on."""
        _send(torch.tensor([ROUND, step, seed, len(samples), len(sizes)]), "a round")
        _send(torch.from_numpy(samples), "its samples")
        _send(torch.tensor(sizes, dtype=torch.int64), "its batches")
        _send(torch.tensor(rates, dtype=torch.float64), "its learning rates")
        _send(parameters.flat.detach(), "its start")
        _send(optimizer.both, "its moments")


def part_of(batch: NDArray[np.int64], rank: int, processes: int) -> NDArray[np.int64]:
    """A process' part of a batch: as equal as possible, earlier ranks first."""
    return batch if processes == 1 else np.array_split(batch, processes)[rank]


def shared_step(
    language: CausalLanguage,
    shards: TokenShards,
    parameters: FlatParameters,
    part: NDArray[np.int64],
    of_samples: int,
    sequence_tokens: int,
    *,
    cancel: bool = False,
) -> tuple[torch.Tensor, bool]:
    """Gradient and loss of one batch over all processes, of which this one computes `part`. -> (mean loss, whether rank
    0 wants to stop instead). Alone when there is no process group."""
    alone = not dist.is_initialized()
    parameters.exchange.zero_()
    if len(part) and not cancel:
        tokens = torch.from_numpy(shards.batch(part)).to(language.device)
        loss = language.loss(tokens, of_samples * sequence_tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        if alone:
            return loss.detach(), False
        parameters.exchange[-2] = loss.detach()
    parameters.exchange[-1] = float(cancel)
    try:
        dist.all_reduce(parameters.exchange)
    except RuntimeError as error:
        raise RankLost(f"A process of this member is gone: {error}.") from error
    return parameters.exchange[-2].clone(), bool(parameters.exchange[-1] > 0)


def _send(tensor: torch.Tensor, what: str) -> None:
    try:
        dist.broadcast(tensor, src=0)
    except RuntimeError as error:
        raise RankLost(f"A process of this member is gone while it was sent {what}: {error}.") from error


def _meet(rank: int, processes: int, meeting: str, device: str) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=processes, timeout=IDLE_MAX)


def _follow(setup: RankSetup) -> None:
    """The life of rank 1 and up."""
    set_up_torch(setup.threads)
    device = open_device(setup.device if setup.device != "cuda" else f"cuda:{setup.rank}")
    model = build_model(setup.job.model.config).to(device)
    parameters = FlatParameters(parameters_of(model))
    optimizer = FlatAdamW(parameters.flat, parameters.gradient, setup.job.optimizer)
    language = CausalLanguage(model, device, setup.dtype)
    data = setup.job.data
    shards = TokenShards(setup.shards, data.sequence_tokens, data.token_bytes)
    _meet(setup.rank, setup.processes, setup.meeting, setup.device)
    head = torch.zeros(5, dtype=torch.int64)
    while True:
        _send(head, "what comes next")
        what, step, seed, count, steps = (int(number) for number in head)
        if what == END:
            return
        samples = torch.zeros(count, dtype=torch.int64)
        sizes = torch.zeros(steps, dtype=torch.int64)
        rates = torch.zeros(steps, dtype=torch.float64)
        for tensor in (samples, sizes, rates, parameters.flat.detach(), optimizer.both):
            _send(tensor, "a round")
        optimizer.set_step(step)
        torch.manual_seed(seed + setup.rank)
        at = 0
        for size, rate in zip(sizes.tolist(), rates.tolist(), strict=True):
            part = part_of(samples[at : at + size].numpy(), setup.rank, setup.processes)
            _, stop = shared_step(language, shards, parameters, part, size, data.sequence_tokens)
            if stop:
                break
            optimizer.step(rate)
            at += size


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    head = sys.stdin.buffer.read(FRAME.size)
    (length,) = FRAME.unpack(head)
    if length > FRAME_MAX_BYTES:
        raise RankLost(f"A setup of {length} bytes is too long.")
    try:
        _follow(msgspec.msgpack.decode(sys.stdin.buffer.read(length), type=RankSetup))
    except RankLost:
        sys.exit(1)  # rank 0 is gone, and says why itself
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
