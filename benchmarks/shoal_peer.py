"""Shoal as a peer: its own commands, `shoal hub`, `shoal node start` and `shoal train`, in the seats of the ground.

A node with all its processes is held to its seat's share of a core. Hub and driver share a seat of their own. Settings
are Shoal's own defaults where the comparison does not fix them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ground import Ground, Process
from links import CannotMeasure
from peers import ROUND_S, STARTING_S, Job, Run, measured

HUB_PORT, DRIVER_PORT, NODE_PORT = 7700, 7701, 7702
WATCH_S = 0.05
FIRST_ROUND_S = 400.0
"""How long data and start state may take to reach the nodes; the poor link carries them in minutes."""
ENDLESS_TOKENS = 1_000_000_000
"""Budget of a run that is stopped after a time: no evaluation falls into what is measured."""


class Shoal:
    """`rounds` replaces single fields of the job file's section of that name, to try settings."""

    name = "shoal"
    needs_link = True

    def __init__(self, rounds: Mapping[str, Any] | None = None) -> None:
        self.rounds = dict(rounds or {})

    def run(self, ground: Ground, job: Job) -> Run:
        ticket = self._start_hub(ground, job)
        nodes = [
            seat.start(
                _shoal("node", "start", "--hub", ticket, "--name", seat.name, "--threads", "1", "--device", "cpu",
                       "--listen", f"tcp://{seat.host.address}:{NODE_PORT}", "--data", str(job.folder / seat.name),
                       "--json"),
                environment={"SHOAL_HOME": str(job.folder / "home")},
            )
            for seat in ground.workers
        ]  # fmt: skip
        for node in nodes:
            node.line(STARTING_S)
        driver = self._start_driver(ground, job, ticket, len(nodes))
        run = job.folder / "runs" / "benchmark"
        whole = job.rounds is None and job.seconds is None
        lines: list[dict[str, Any]] = []
        congestion: set[str] = set()
        ahead = float("inf")
        """What to add to a line's time to have the monotonic clock: no line is seen before it is written."""
        quiet_since = time.monotonic()
        path = run / "metrics.jsonl"
        place = 0
        while True:
            ended = driver.ended()
            fresh, place = _new_lines(path, place)
            now = time.monotonic()
            for line in fresh:
                ahead = min(ahead, now - line["time_s"])
                lines.append(line)
                quiet_since = now
                if len(lines) == job.warmup_rounds + 1:
                    congestion = ground.congestion_controls()
            counted = lines[job.warmup_rounds :]
            if not whole and len(counted) > 1:
                long_enough = job.seconds is not None and counted[-1]["time_s"] - counted[0]["time_s"] >= job.seconds
                if long_enough or (job.rounds is not None and len(lines) >= job.rounds):
                    break
            if ended is not None:
                if whole and ended == 0:
                    break
                raise CannotMeasure(driver.why_ended())
            if now - quiet_since > (ROUND_S if lines else FIRST_ROUND_S):
                raise CannotMeasure(f"shoal has committed no round for {now - quiet_since:.0f} s; see {job.folder}.")
            time.sleep(WATCH_S)
        if not whole:
            driver.interrupt()
        counted = lines[job.warmup_rounds :]
        if len(counted) < 2:
            raise CannotMeasure(f"shoal did too few rounds to measure ({len(lines)}).")
        first, last = counted[0], counted[-1]
        return measured(
            ground, self.name, ahead + first["time_s"], ahead + last["time_s"],
            last["tokens_total"] - first["tokens_total"], congestion, model=run / "model" if whole else None,
            notes={
                "rounds": len(counted) - 1,
                "inner_steps": last.get("inner_steps"),
                "members_least": min(line["members"] for line in counted[1:]),
            },
        )  # fmt: skip

    @contextlib.contextmanager
    def beside(self, ground: Ground, job: Job) -> Iterator[None]:
        """A hub, and a driver that waits for nodes: what runs beside lone workers too."""
        ticket = self._start_hub(ground, job)
        driver = self._start_driver(ground, job, ticket, len(ground.workers))
        yield
        if driver.ended() is not None:
            raise CannotMeasure(driver.why_ended())

    def _start_hub(self, ground: Ground, job: Job) -> str:
        hub = ground.hub.start(
            _shoal("hub", "--listen", f"tcp://{ground.hub.host.address}:{HUB_PORT}", "--http", "", "--data",
                   str(job.folder / "hub"), "--json"),
            environment={"SHOAL_HOME": str(job.folder / "home")},
        )  # fmt: skip
        return str(json.loads(hub.line(STARTING_S))["ticket"])

    def _start_driver(self, ground: Ground, job: Job, ticket: str, nodes: int) -> Process:
        whole = job.rounds is None and job.seconds is None
        content = {
            "name": "benchmark",
            "seed": job.seed,
            "model": {"checkpoint": str(job.start), "tokenizer": "bytes"},
            "data": {"paths": [str(job.corpus.train_text)], "sequence_tokens": job.length, "held_out": 0.02},
            "tokens": job.budget_tokens if whole else ENDLESS_TOKENS,
            "batch_samples": job.batch,
            "optimizer": {
                "learning_rate": job.learning_rate,
                "beta1": 0.9,
                "beta2": 0.95,
                "weight_decay": 0.1,
                "gradient_clip": 1.0,
                "warmup_steps": 50,
                "schedule": "constant",
            },
            "rounds": self.rounds,
            "replay": {"audit_rate": 0},  # opened audit state is not part of the comparison
            "requirements": {"nodes_min": nodes, "nodes_max": nodes, "wait": "3600 s"},
        }
        path = job.folder / "job.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value != {}}))
        return ground.hub.start(
            _shoal("train", str(path), "--hub", ticket, "--runs", str(job.folder / "runs"), "--listen",
                   f"tcp://{ground.hub.host.address}:{DRIVER_PORT}", "--json"),
            environment={"SHOAL_HOME": str(job.folder / "home")},
        )  # fmt: skip


def _shoal(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shoal", *arguments]


def _new_lines(path: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines that were added behind `place`, and the place behind them."""
    try:
        with path.open("rb") as file:
            file.seek(place)
            content = file.read()
    except FileNotFoundError:
        return [], place
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], place + len(whole)
