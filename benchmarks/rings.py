"""Rings of stages over distance: gateway, hub, nodes and client as users run them, each node on a host of its own.

Any two hosts are the same time apart. The model is too large for what a node offers of its memory, so that three of
them hold it; a further one is to spare.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ground import Process
from links import Access, CannotMeasure, Host, Network

READY_S = 120.0
SESSIONS = 16
COALESCE_S = 0.0001
"""Few packets are under way, and each of them is waited for: the switch may wake for every one."""
SHOAL = [sys.executable, "-m", "shoal"]


@dataclass
class Reading:
    """What one stream gave: (when, how many tokens) of each piece, and the whole text."""

    asked: float
    pieces: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""

    @property
    def first_s(self) -> float:
        return self.pieces[0][0] - self.asked

    @property
    def token_ms(self) -> float:
        """Milliseconds a token, after the first piece."""
        tokens = sum(count for _, count in self.pieces[1:])
        return 1000 * (self.pieces[-1][0] - self.pieces[0][0]) / max(1, tokens)

    @property
    def gap_s(self) -> float:
        """The longest time between two pieces."""
        times = [at for at, _ in self.pieces]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


class Rings:
    """A shoal over distance with a model on it, from entering the block to leaving it."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        one_way_ms: float,
        nodes: int,
        memory_bytes: int,
        beside_first: bool = False,
    ) -> None:
        """`beside_first`: the gateway is on the first node's host."""
        self._folder, self._model, self._one_way_ms = folder, model, one_way_ms
        self._count, self._memory = nodes, memory_bytes
        self._gateway_host = "node0" if beside_first else "gateway"
        self._started: list[Process] = []
        self.nodes: dict[str, Process] = {}
        self.gateway: Process | None = None

    def __enter__(self) -> Rings:
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            names = dict.fromkeys([self._gateway_host, *(f"node{number}" for number in range(self._count))])
            access = Access(self._one_way_ms / 2)
            self.network = stack.enter_context(Network(dict.fromkeys(names, access), seed=1, coalesce_s=COALESCE_S))
            stack.callback(self._reap)
            gateway = self.network.hosts[self._gateway_host]
            hub = self.start(gateway, "hub", [*SHOAL, "hub", "--listen", f"tcp://{gateway.address}:0",
                                              "--data", str(self._folder / "hub"), "--json"])  # fmt: skip
            self.ticket = json.loads(hub.line(READY_S))["ticket"]
            for number in range(self._count):
                self.start_node(f"node{number}")
            for node in self.nodes.values():
                node.line(READY_S)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, host: Host, name: str, command: Sequence[str]) -> Process:
        log = self._folder / f"{name}-{len(self._started)}.log"
        with log.open("wb") as errors:
            popen = host.popen(
                command, stdin=-1, stdout=-1, stderr=errors, start_new_session=True,
                env={**os.environ, "SHOAL_HOME": str(self._folder / f"home-{name}")},
            )  # fmt: skip
        process = Process(popen, name, log)
        self._started.append(process)
        return process

    def _reap(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.reap()

    def start_node(self, name: str) -> None:
        host = self.network.hosts[name]
        self.nodes[name] = self.start(host, name, [
            *SHOAL, "node", "start", "--hub", self.ticket, "--name", name, "--listen", f"tcp://{host.address}:0",
            "--threads", "1", "--memory", str(self._memory), "--data", str(self._folder / name), "--json",
        ])  # fmt: skip

    def kill(self, name: str) -> float:
        """SIGKILL of a node and all that it started; gives the moment."""
        at = time.monotonic()
        os.killpg(self.nodes[name].pid, signal.SIGKILL)
        return at

    def cut(self, name: str) -> float:
        """No packet of a node gets through any more, or all of them again; gives the moment."""
        self.network.cut(name)
        return time.monotonic()

    @property
    def working(self) -> list[str]:
        """The nodes of the ring that serves, in its order."""
        for line in reversed(self.gateway.log.splitlines()):
            found = re.match(r"(.*) (is ready:|has taken over)", line)
            if found:
                return found[1].split(" - ")
        return []

    @property
    def computing_ms(self) -> tuple[float, float]:
        """What a token takes of computing in the ring that serves: in its stages' steps of late, and as measured
        over and over when they were loaded."""
        name = " - ".join(self.working)
        loaded = re.findall(rf"^{name} is (?:ready|in reserve): ([\d.]+) ms", self.gateway.log, re.M)[-1]
        return self.figures()[f'shoal_replica_computing_ms{{replica="{name}"}}'], float(loaded)

    def serve_model(self, model: Path, *options: str) -> None:
        """Another model from now on."""
        self._model = model
        self.serve(*options)

    def serve(self, *options: str) -> None:
        """The endpoint and a client of it; one that runs already is ended first."""
        if self.gateway is not None:
            self.client.reap()
            self.gateway.interrupt()
            self.gateway.wait(30)
        gateway = self.network.hosts[self._gateway_host]
        self.gateway = self.start(gateway, "gateway", [
            *SHOAL, "serve", str(self._model), "--name", "m", "--hub", self.ticket, "--http", "127.0.0.1:8000",
            "--listen", f"tcp://{gateway.address}:0", "--sessions", str(SESSIONS), "--json", *options,
        ])  # fmt: skip
        self.gateway.line(READY_S)
        self.client = self.start(gateway, "client", [
            sys.executable, str(Path(__file__).with_name("stream_client.py")), "http://127.0.0.1:8000"
        ])  # fmt: skip
        self.client.line(READY_S)

    # --- what a client does ------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """The endpoint's metrics, by name."""
        self.client.say(json.dumps("/metrics"))
        answer = json.loads(self.client.line(30))
        found = {}
        for line in answer["text"].splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found

    def until(self, replicas: int, in_reserve: int = 0, patience_s: float = READY_S) -> None:
        """Wait until so many rings serve and so many are in reserve."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            said = self.figures()
            if (said.get("shoal_replicas", 0), said.get("shoal_replicas_in_reserve", 0)) >= (replicas, in_reserve):
                return
            time.sleep(0.1)
        raise CannotMeasure(f"Not {replicas} replicas and {in_reserve} in reserve within {patience_s:g} s: {said}")

    def read(self, bodies: Sequence[dict[str, Any]]) -> Iterator[list[Reading]]:
        """Send requests at once; gives all readings after each piece that comes, and at the end with their texts."""
        self.client.say(json.dumps([{"model": "m", **body} for body in bodies]))
        asked = json.loads(self.client.line(30))["asked"]
        readings = [Reading(asked) for _ in bodies]
        while True:
            said = json.loads(self.client.line(120))
            if "done" in said:
                for reading, text in zip(readings, said["done"], strict=True):
                    reading.text = text
                yield readings
                return
            readings[said["stream"]].pieces.append((said["at"], said["tokens"]))
            yield readings

    def readings(self, bodies: Sequence[dict[str, Any]]) -> list[Reading]:
        *_, found = self.read(bodies)
        for reading in found:
            if reading.text.startswith("error"):
                raise CannotMeasure(f"A stream failed: {reading.text}")
        return found
