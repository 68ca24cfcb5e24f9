"""A share of the processor for a group of processes, whatever they start: control groups of either version.

All processes and threads of a group together get `cores` of a core in every period of 20 ms, and what they used is
counted by the kernel. A period is short so that a held worker resembles a slower core rather than one that stops for
long. `python benchmarks/limits.py` shows by measurement that the limit holds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from links import CannotMeasure

PERIOD_US = 20_000
ENDING_S = 20.0
"""How long killed processes may take to be gone."""
PREFIX = "shoal-benchmark-"
_numbers = itertools.count()


@dataclass(frozen=True)
class _Controllers:
    """Where groups are made. Version 1 has a tree per controller, version 2 has one."""

    version: int
    limit: Path
    account: Path


def _controllers() -> _Controllers:
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            own[name] = path.lstrip("/")
    trees: dict[str, Path] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, at, kind, options, *_ = line.split(" ")
        if kind == "cgroup2":
            trees.setdefault("", Path(at))
        elif kind == "cgroup":
            for name in {"cpu", "cpuacct"} & set(options.split(",")):
                root = Path(at)
                trees[name] = root / own.get(name, "") if (root / own.get(name, "")).is_dir() else root
    if {"cpu", "cpuacct"} <= trees.keys():
        found = _Controllers(1, trees["cpu"], trees["cpuacct"])
    elif "" in trees:
        found = _Controllers(2, trees[""], trees[""])
        if "cpu" not in (found.limit / "cgroup.controllers").read_text().split():
            raise CannotMeasure("The control groups here have no cpu controller; workers cannot be held to a share.")
        with contextlib.suppress(OSError):  # mostly so already; where it may not be set, making a group says so
            (found.limit / "cgroup.subtree_control").write_text("+cpu")
    else:
        raise CannotMeasure("No control groups are mounted here; workers cannot be held to a share of a core.")
    return found


class CpuGroup:
    """Processes that together may use `cores` of a core (None: as much as they like), until the block is left.

    A process joins by writing its id to each file of `joins`; its children are born in the group. Leaving the block
    kills, by id, whatever is still in it.
    """

    def __init__(self, name: str, cores: float | None) -> None:
        self._name = f"{PREFIX}{os.getpid()}-{next(_numbers)}-{name}"
        self._cores = cores
        self._folders: list[Path] = []

    def __enter__(self) -> CpuGroup:
        trees = _controllers()
        self._version = trees.version
        try:
            for tree in dict.fromkeys((trees.limit, trees.account)):
                (tree / self._name).mkdir()
                self._folders.append(tree / self._name)
            self.hold()
        except OSError as error:
            self.__exit__(None, None, None)
            raise CannotMeasure(
                f"Workers cannot be held to a share of a core: {error}. It takes root and a writable cpu control group "
                f"under {trees.limit}."
            ) from error
        return self

    def hold(self) -> None:
        """Apply the limit."""
        if self._cores is not None:
            quota = round(self._cores * PERIOD_US)
            if self._version == 2:
                (self._folders[0] / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            else:
                (self._folders[0] / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (self._folders[0] / "cpu.cfs_quota_us").write_text(str(quota))

    def release(self) -> None:
        """Lift the limit until `hold`: for what is not measured, such as importing libraries."""
        if self._version == 2:
            (self._folders[0] / "cpu.max").write_text(f"max {PERIOD_US}")
        else:
            (self._folders[0] / "cpu.cfs_quota_us").write_text("-1")

    @property
    def joins(self) -> list[Path]:
        return [folder / "cgroup.procs" for folder in self._folders]

    def used_s(self) -> float:
        """Processor seconds used so far by all processes that are or were in the group."""
        if self._version == 2:
            lines = (self._folders[0] / "cpu.stat").read_text().splitlines()
            return int(dict(line.split() for line in lines)["usage_usec"]) / 1e6
        return int((self._folders[-1] / "cpuacct.usage").read_text()) / 1e9

    def processes(self) -> list[int]:
        return [int(pid) for pid in self.joins[0].read_text().split()]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic() + ENDING_S
        for folder in self._folders:
            while True:
                for pid in [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                try:
                    folder.rmdir()
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.02)
        self._folders = []


def sweep() -> None:
    """Remove groups, and end processes in them, that a measuring process left behind when it was killed outright."""
    trees = _controllers()
    for tree in dict.fromkeys((trees.limit, trees.account)):
        for folder in tree.glob(f"{PREFIX}*"):
            owner = folder.name.removeprefix(PREFIX).partition("-")[0]
            if owner.isdigit() and not Path("/proc", owner).exists():
                left = CpuGroup("", None)
                left._folders = [folder]
                left.__exit__(None, None, None)


_BURN = "import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"


def measure(cores: float, *, groups: int = 2, seconds: float = 4.0) -> list[float]:
    """The share of a core that each of `groups` groups, two busy processes in each, gets when held to `cores`."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(CpuGroup(f"check{number}", cores)) for number in range(groups)]
        busy = []
        for group in held:
            join = "".join(f"open({str(path)!r}, 'w').write('0')\n" for path in group.joins)
            busy += [subprocess.Popen([sys.executable, "-I", "-c", join + _BURN.format(seconds=seconds + 2)])
                     for _ in range(2)]  # fmt: skip
        time.sleep(0.5)
        begin, before = time.monotonic(), [group.used_s() for group in held]
        time.sleep(seconds)
        took, after = time.monotonic() - begin, [group.used_s() for group in held]
        shares = [(used - at_first) / took for used, at_first in zip(after, before, strict=True)]
        for process in busy:
            process.kill()
            process.wait()
        return shares


if __name__ == "__main__":
    try:
        for asked, number in ((0.8, 2), (0.8, 1), (0.29, 2), (0.145, 2)):
            print(f"{number} x {asked:g} of a core: " + ", ".join(f"{s:.4f}" for s in measure(asked, groups=number)))
    except CannotMeasure as error:
        sys.exit(str(error))
