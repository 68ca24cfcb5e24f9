"""The measuring ground: workers on hosts of a shaped network, each held to a share of a core, and a meter beside them.

A `Seat` is a place where the processes of one worker run: a host's namespace and a CPU group of its own. The `Meter`
reads every host's interface counters and every seat's processor time a few times a second, so that what was sent and
used between any two moments can be told afterwards, for every peer in the same way.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from limits import CpuGroup
from links import Access, CannotMeasure, Host, Link, Network

SAMPLE_S = 0.1
LINE_MAX = 1 << 16
"""Bytes of one line of a process's output."""
LINES_MAX = 100_000


@dataclass(frozen=True)
class Sample:
    """Counters since the ground was made, at `at` on the monotonic clock."""

    at: float
    sent: tuple[int, ...]
    """Bytes sent at each host's interface, in the order of hosts."""
    used_s: tuple[float, ...]
    """Processor seconds of each seat, in the order of seats."""


class Process:
    """A running process of a seat; its standard output is read line by line."""

    def __init__(self, popen: subprocess.Popen[bytes], name: str, log: Path) -> None:
        self._popen, self.name, self._log = popen, name, log
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_MAX)
        threading.Thread(target=self._read, args=(popen.stdout,), daemon=True).start()

    def _read(self, output: IO[bytes]) -> None:
        while line := output.readline(LINE_MAX):
            self._lines.put(line.decode(errors="replace"))
        self._lines.put(None)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def log(self) -> str:
        """What it has said on stderr so far."""
        return self._log.read_text(errors="replace")

    def line(self, timeout_s: float) -> str:
        """The next line of output. Raises CannotMeasure when the process ended or stays silent for so long."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise CannotMeasure(f"{self.name} has said nothing for {timeout_s:g} s; its log is {self._log}.") from None
        if line is None:
            raise CannotMeasure(self.why_ended())
        return line

    def ended(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._popen.poll()

    def why_ended(self) -> str:
        """A sentence about a process that ended before it should."""
        status = self._popen.wait()
        said = [line for line in list(self._lines.queue)[-4:] if line is not None]
        said += self._log.read_text(errors="replace").splitlines()[-3:]
        tail = " | ".join(line.strip() for line in said)
        return f"{self.name} ended early with status {status}: {tail or 'it gave no reason'}"

    def say(self, line: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(line.encode() + b"\n")
        self._popen.stdin.flush()

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises CannotMeasure when it does not end in time."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CannotMeasure(f"{self.name} did not end within {timeout_s:g} s; its log is {self._log}.") from None

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGINT)

    def reap(self) -> None:
        self._popen.kill()
        self._popen.wait()
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()


class Seat:
    """Where one worker's processes run: a host, and a CPU group that they cannot leave."""

    def __init__(self, name: str, host: Host, group: CpuGroup, cores: float | None, logs: Path) -> None:
        self.name, self.host, self.group, self.cores, self._logs = name, host, group, cores, logs
        self._started: list[Process] = []

    def start(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Process:
        """Start a process here. One that starts others takes them along: into the host, the limit, and the end."""
        log = self._logs / f"{self.name}-{len(self._started)}.log"
        with log.open("wb") as errors:
            popen = self.host.popen(
                command, join=self.group.joins, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip
        process = Process(popen, f"{self.name}, process {len(self._started)}", log)
        self._started.append(process)
        return process

    def reap(self) -> None:
        for process in self._started:
            process.reap()


class Meter:
    """Samples of all counters, from entering the block to leaving it."""

    def __init__(self, hosts: Sequence[Host], seats: Sequence[Seat]) -> None:
        self._hosts, self._seats = hosts, seats
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failure: CannotMeasure | None = None

    def __enter__(self) -> Meter:
        self._sample()
        self._thread.start()
        return self

    def _sample(self) -> None:
        sent = tuple(host.counted()[1] for host in self._hosts)
        self._samples.append(Sample(time.monotonic(), sent, tuple(seat.group.used_s() for seat in self._seats)))

    def _run(self) -> None:
        try:
            while not self._stop.wait(SAMPLE_S):
                self._sample()
        except CannotMeasure as error:
            self._failure = error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def at(self, moment: float) -> Sample:
        """The counters at a moment on the monotonic clock, in a straight line between the two samples around it."""
        while self._samples[-1].at < moment:
            if self._failure:
                raise self._failure
            time.sleep(SAMPLE_S / 4)
        index = max(1, bisect.bisect_left(self._samples, moment, key=lambda sample: sample.at))
        before, after = self._samples[index - 1], self._samples[index]
        part = min(1.0, max(0.0, (moment - before.at) / (after.at - before.at)))
        return Sample(
            moment,
            tuple(round(a + part * (b - a)) for a, b in zip(before.sent, after.sent, strict=True)),
            tuple(a + part * (b - a) for a, b in zip(before.used_s, after.used_s, strict=True)),
        )


class Ground:
    """Worker seats of the given limits, each on its own host behind `link`, and one unlimited seat for hub and driver.

    `link` None seats everybody on one host without a link, for runs in which only the result counts.
    The hub's host has an access link like the workers'; with `hub_beside_worker` hub and driver sit on the first
    worker's host, outside that worker's limit, and share its access link.
    """

    def __init__(
        self,
        link: Link | None,
        cores: Sequence[float | None],
        logs: Path,
        *,
        seed: int = 0,
        hub_beside_worker: bool = False,
    ) -> None:
        self._hub_beside_worker = hub_beside_worker
        self._link, self._cores, self._logs, self._seed = link, list(cores), logs, seed
        self.workers: list[Seat] = []

    def __enter__(self) -> Ground:
        self._logs.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            access = self._link.access() if self._link else Access()
            names = [f"worker{number}" for number in range(len(self._cores))]
            hosts = names if self._hub_beside_worker else [*names, "hub"]
            hosts = hosts if self._link else ["all"]
            self.network = stack.enter_context(Network(dict.fromkeys(hosts, access), seed=self._seed))
            for name, cores in zip(names, self._cores, strict=True):
                self.workers.append(self._seat(stack, name, name, cores))
            self.hub = self._seat(stack, "hub", hosts[0] if self._hub_beside_worker else "hub", None)
            self.meter = stack.enter_context(Meter(list(self.network.hosts.values()), [*self.workers, self.hub]))
            self._stack = stack.pop_all()
        return self

    def _seat(self, stack: contextlib.ExitStack, name: str, at: str, cores: float | None) -> Seat:
        host = self.network.hosts[at if self._link else "all"]
        group = stack.enter_context(CpuGroup(name, cores))
        seat = Seat(name, host, group, cores, self._logs)
        stack.callback(seat.reap)
        return seat

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def congestion_controls(self) -> set[str]:
        """The algorithms of all TCP connections open now, on any host."""
        return set().union(*(host.congestion_controls() for host in self.network.hosts.values()))


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Let requests to end unwind the stack, wherever they come from, so that everything begun is ended."""

    def stop(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(f"signal {number}")

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
