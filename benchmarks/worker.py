"""One process of a peer that Shoal is compared with: a plain PyTorch training loop, alone, under DDP, or in DiLoCo.

    alone    AdamW, no communication
    ddp      torch DistributedDataParallel over gloo: gradients averaged in every step (Li et al., 2020)
    diloco   H inner AdamW steps, then a blocking fp32 all-reduce of the parameters' change and an outer SGD step with
             Nesterov momentum, learning rate 0.7 and momentum 0.9 (Douillard et al., 2023, arXiv:2311.08105)

It reads its task as JSON from its first argument. On its output it says `ready`, waits for a line, and then says when
each round ended: `{"round": n, "at": seconds on the monotonic clock, "tokens": its own so far, "loss": last step's}`,
beginning with round -1, the start.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from corpus import Corpus, Sequences
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

EVALUATED_SEQUENCES = 1024
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Recipe:
    """The inner optimizer, the same for every peer: AdamW with a linear warm-up, then a constant rate. At a million
    tokens every peer learns more at a constant rate than with a cosine to a tenth (docs/log.md, 2026-11-23)."""

    learning_rate: float
    budget_tokens: int
    """Of all workers together; the schedule ends there."""
    seed: int
    batch: int = 8
    """Sequences a worker takes in a step."""
    length: int = 128
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    warmup_steps: int = 50

    def rate(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate


@dataclass(frozen=True)
class Task:
    kind: str
    rank: int
    world: int
    recipe: Recipe
    corpus: str
    """Path of corpus.json."""
    start: str
    """Checkpoint directory every peer begins with."""
    rounds: int | None
    """How many rounds to do; a round is one step, or `inner_steps` of diloco. None: the whole budget."""
    seconds: float | None = None
    """Stop at the first round that ends this long after the last round of the warm-up."""
    warmup_rounds: int = 0
    inner_steps: int = 50
    rendezvous: str = "127.0.0.1:29400"
    interface: str = "lo"
    final: str | None = None
    """Where worker 0 leaves the trained model."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        fields = json.loads(text)
        fields["recipe"]["betas"] = tuple(fields["recipe"]["betas"])
        return Task(**{**fields, "recipe": Recipe(**fields["recipe"])})


class Trainer:
    """Model, optimizer and data of one worker."""

    def __init__(self, task: Task) -> None:
        self.task, self.recipe = task, task.recipe
        self.model: Any = AutoModelForCausalLM.from_pretrained(task.start, attn_implementation="sdpa").train()
        self.parameters = list(self.model.parameters())
        self.forward: Callable[..., Any] = self.model
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=1.0,
            betas=self.recipe.betas,
            eps=1e-8,
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        self.sequences = Sequences(Corpus.load(Path(task.corpus)).train, self.recipe.length, self.recipe.seed)
        self.steps = math.ceil(self.recipe.budget_tokens / (self.tokens_a_step * task.world))
        self.step_number = 0

    @property
    def tokens_a_step(self) -> int:
        """Of this worker."""
        return self.recipe.batch * self.recipe.length

    def step(self) -> float:
        first = (self.step_number * self.task.world + self.task.rank) * self.recipe.batch
        tokens = torch.from_numpy(self.sequences.batch(first, self.recipe.batch))
        loss = loss_of(self.forward, tokens)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step_number)
        self.optimizer.step()
        self.step_number += 1
        return loss.item()


def loss_of(forward: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
    """Token ids [sequences, length + 1] -> mean nats per token."""
    logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


class Nesterov:
    """The outer optimizer of DiLoCo, on all parameters as one vector."""

    def __init__(self, trainer: Trainer, learning_rate: float = 0.7, momentum: float = 0.9) -> None:
        self._trainer = trainer
        self._shared = self._flat()
        self._outer = torch.optim.SGD([self._shared], lr=learning_rate, momentum=momentum, nesterov=True)

    def _flat(self) -> torch.Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._trainer.parameters])

    def exchange(self, world: int) -> None:
        change = self._shared - self._flat()
        dist.all_reduce(change)
        self._shared.grad = change / world
        self._outer.step()
        place = 0
        with torch.no_grad():
            for parameter in self._trainer.parameters:
                parameter.copy_(self._shared[place : place + parameter.numel()].view_as(parameter))
                place += parameter.numel()


def train(task: Task) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(task)
    if task.kind != "alone":
        os.environ["GLOO_SOCKET_IFNAME"] = task.interface
        dist.init_process_group("gloo", f"tcp://{task.rendezvous}", rank=task.rank, world_size=task.world)
    outer = Nesterov(trainer) if task.kind == "diloco" else None
    if task.kind == "ddp":
        trainer.forward = torch.nn.parallel.DistributedDataParallel(trainer.model)
    in_round = task.inner_steps if outer else 1
    rounds = math.ceil(trainer.steps / in_round) if task.rounds is None else task.rounds
    trainer.steps = max(trainer.steps, rounds * in_round)
    say({"ready": True})
    sys.stdin.readline()
    begin = time.monotonic()
    say({"round": -1, "at": begin, "tokens": 0, "loss": None})
    for number in range(rounds):
        for _ in range(in_round):
            loss = trainer.step()
        if outer:
            outer.exchange(task.world)
        now = time.monotonic()
        say({"round": number, "at": now, "tokens": trainer.step_number * trainer.tokens_a_step, "loss": loss})
        if number + 1 == task.warmup_rounds:
            begin = now
        if task.seconds is not None and number >= task.warmup_rounds and now - begin >= task.seconds:
            break
    if task.final and task.rank == 0:
        trainer.model.save_pretrained(task.final)
    if task.kind != "alone":
        dist.barrier()
        dist.destroy_process_group()
    say({"done": True})


def start(config: Path, folder: Path, seed: int) -> None:
    """Write the checkpoint that every peer begins with."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float32)
    model.save_pretrained(folder)
    say({"parameters": sum(parameter.numel() for parameter in model.parameters())})


def evaluate(corpus: Path, length: int, folder: Path) -> None:
    """Mean nats per token over sequences spread evenly over the held-out documents."""
    torch.set_num_threads(1)
    tokens = np.fromfile(Corpus.load(corpus).held_out, np.dtype("<u2")).astype(np.int64)
    count = (tokens.size - 1) // length
    chosen = np.unique(np.linspace(0, count - 1, min(count, EVALUATED_SEQUENCES)).astype(np.int64))
    windows = torch.from_numpy(np.stack([tokens[i * length : (i + 1) * length + 1] for i in chosen]))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [loss_of(model, part).item() * len(part) for part in torch.split(windows, EVALUATION_BATCH)]
    say({"loss": sum(losses) / len(windows)})


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    do, *given = sys.argv[1:]
    if do == "train":
        train(Task.from_json(given[0]))
    elif do == "start":
        start(Path(given[0]), Path(given[1]), int(given[2]))
    elif do == "evaluate":
        evaluate(Path(given[0]), int(given[1]), Path(given[2]))
