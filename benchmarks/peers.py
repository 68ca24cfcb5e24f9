"""Peers: ways of training one model on several workers, each started on a measuring ground and measured alike.

A peer is an object with a `name` and `run(ground, job) -> Run`: it starts its processes in the ground's seats, lets
them train as the job says, and tells how many tokens counted between which two moments and where the trained model
lies. Bytes and processor time between those moments come from the ground's meter, the same for all.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from corpus import Corpus
from ground import Ground, Process
from links import INTERFACE, CannotMeasure

HERE = Path(__file__).resolve().parent
STARTING_S = 180.0
"""How long processes may take until they are ready to train."""
ROUND_S = 600.0
"""How long one round may take; DDP on the poor link needs some 20 s for a step."""


@dataclass(frozen=True)
class Job:
    """What to train. Of all workers together where not said otherwise."""

    corpus: Corpus
    start: Path
    """Checkpoint directory every peer begins with."""
    folder: Path
    """For whatever a peer writes."""
    seed: int
    learning_rate: float
    budget_tokens: int
    """The learning rate's schedule ends here."""
    rounds: int | None = None
    """Stop after so many rounds, warm-up included; None: train the whole budget and leave the model."""
    seconds: float | None = None
    """For peers whose round is short: stop after so long instead."""
    warmup_rounds: int = 1
    """Rounds before the first that counts."""
    batch: int = 8
    """Sequences in one step of a worker."""
    length: int = 128
    """Tokens in a sequence."""


@dataclass(frozen=True)
class Run:
    """What a peer did between its first and its last round."""

    peer: str
    tokens: int
    seconds: float
    tokens_per_s: float
    sent_by_host: tuple[int, ...]
    """Bytes: the workers, then the hub's host."""
    sent_bytes: int
    """At the interfaces of all hosts, each packet once, where it was sent; repeated and lost packets included."""
    startup_bytes: int
    """The same, before the first round that counts: start-up, start state, warm-up rounds."""
    cores: tuple[float, ...]
    """Share of a core each worker's processes used."""
    hub_cores: float
    congestion_controls: frozenset[str]
    model: Path | None = None
    worker_rates: tuple[float, ...] = ()
    """Tokens per second of each worker, where that can be told apart."""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        return self.sent_bytes / max(1, self.tokens)

    @property
    def noted(self) -> str:
        """The notes, to be put behind a line about this run."""
        return "".join(f", {name} {value}" for name, value in self.notes.items())


class Peer(Protocol):
    name: str
    needs_link: bool
    """Whether what it learns can depend on the link. Where not, a run for its loss is done without one."""

    def run(self, ground: Ground, job: Job) -> Run: ...


def measured(
    ground: Ground, peer: str, first: float, last: float, tokens: int, congestion: set[str], **more: Any
) -> Run:
    """The Run between two moments on the monotonic clock."""
    before, after = ground.meter.at(first), ground.meter.at(last)
    seconds = last - first
    cores = tuple((b - a) / seconds for a, b in zip(before.used_s, after.used_s, strict=True))
    return Run(
        peer=peer, tokens=tokens, seconds=seconds, tokens_per_s=more.pop("tokens_per_s", tokens / seconds),
        sent_by_host=tuple(b - a for a, b in zip(before.sent, after.sent, strict=True)),
        sent_bytes=sum(after.sent) - sum(before.sent), startup_bytes=sum(before.sent),
        cores=cores[:-1], hub_cores=cores[-1], congestion_controls=frozenset(congestion), **more,
    )  # fmt: skip


class PlainTorch:
    """Peers that are a plain PyTorch loop: `worker.py`, one process in each seat."""

    needs_link = False

    def __init__(self, name: str, kind: str, inner_steps: int = 1) -> None:
        self.name, self._kind, self._inner_steps = name, kind, inner_steps

    def _start(self, ground: Ground, job: Job) -> list[Process]:
        processes = []
        for rank, seat in enumerate(ground.workers):
            seat.group.release()
            task = {
                "kind": self._kind,
                "rank": rank,
                "world": len(ground.workers),
                "recipe": {
                    "learning_rate": job.learning_rate,
                    "budget_tokens": job.budget_tokens,
                    "seed": job.seed,
                    "batch": job.batch,
                    "length": job.length,
                    "betas": [0.9, 0.95],
                },
                "corpus": str(Path(job.corpus.folder, "corpus.json")),
                "start": str(job.start),
                "rounds": job.rounds,
                "seconds": job.seconds,
                "warmup_rounds": job.warmup_rounds,
                "inner_steps": self._inner_steps,
                "rendezvous": f"{ground.workers[0].host.address}:29400",
                "interface": INTERFACE,
                "final": str(job.folder / "model") if job.rounds is None and job.seconds is None else None,
            }
            processes.append(seat.start([sys.executable, str(HERE / "worker.py"), "train", json.dumps(task)]))
        for process in processes:
            if "ready" not in json.loads(process.line(STARTING_S)):
                raise CannotMeasure(f"{process.name} did not say that it is ready.")
        for seat in ground.workers:
            seat.group.hold()
        for process in processes:
            process.say("go")
        return processes

    def run(self, ground: Ground, job: Job) -> Run:
        processes = self._start(ground, job)
        congestion: set[str] = set()
        rounds: list[list[dict[str, Any]]] = []
        for process in processes:  # the first sets the pace of all; the others' lines wait in their queues
            rounds.append([])
            while "done" not in (line := json.loads(process.line(ROUND_S))):
                rounds[-1].append(line)
                if len(rounds) == 1 and len(rounds[0]) == job.warmup_rounds + 2:
                    congestion = ground.congestion_controls()
        for process in processes:
            process.wait(60)
        spans = [(said[min(job.warmup_rounds, len(said) - 1)], said[-1]) for said in rounds]
        if any(last["round"] <= first["round"] for first, last in spans):
            raise CannotMeasure(f"{self.name} did too few rounds to measure ({len(rounds[0]) - 1}).")
        rates = tuple((last["tokens"] - first["tokens"]) / (last["at"] - first["at"]) for first, last in spans)
        tokens = sum(last["tokens"] - first["tokens"] for first, last in spans)
        begin, end = spans[0][0]["at"], spans[0][1]["at"]
        return measured(
            ground, self.name, begin, end, tokens, congestion, worker_rates=rates, tokens_per_s=sum(rates),
            model=job.folder / "model" if job.rounds is None and job.seconds is None else None,
            notes={"last_train_loss": round(rounds[0][-1]["loss"], 4)},
        )  # fmt: skip


class Alone(PlainTorch):
    """The reference: workers that never talk, at the same time, each on its own share of the data.

    `beside` starts what another peer keeps running beside its workers (its hub, its driver), idle, so that the
    reference pays for it too. The switch runs anyway.
    """

    def __init__(self, beside: Callable[[Ground, Job], AbstractContextManager[object]] | None = None) -> None:
        super().__init__("alone", "alone")
        self._beside = beside

    def run(self, ground: Ground, job: Job) -> Run:
        with self._beside(ground, job) if self._beside else contextlib.nullcontext():
            return super().run(ground, job)


DDP = PlainTorch("ddp", "ddp")
DILOCO = PlainTorch("diloco", "diloco", inner_steps=50)


# --- what all peers share --------------------------------------------------------------------------------------------


def make_start(ground: Ground, folder: Path, seed: int) -> int:
    """Write the checkpoint with which runs of `seed` begin; gives its number of parameters."""
    process = ground.hub.start(
        [sys.executable, str(HERE / "worker.py"), "start", str(HERE / "training_model.json"), str(folder), str(seed)]
    )
    said = json.loads(process.line(STARTING_S))
    process.wait(60)
    return int(said["parameters"])


def held_out_loss(ground: Ground, corpus: Corpus, length: int, models: Sequence[Path]) -> list[float]:
    """Mean nats per held-out byte of each checkpoint directory."""
    losses = []
    for model in models:
        process = ground.hub.start(
            [sys.executable, str(HERE / "worker.py"), "evaluate", str(Path(corpus.folder, "corpus.json")), str(length),
             str(model)]
        )  # fmt: skip
        losses.append(float(json.loads(process.line(STARTING_S))["loss"]))
        process.wait(60)
    return losses


def stopwatch() -> Callable[[], float]:
    """Seconds since now."""
    begin = time.monotonic()
    return lambda: time.monotonic() - begin
