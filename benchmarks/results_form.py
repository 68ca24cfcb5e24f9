"""The one form in which benchmarks give their results: a JSON object, printed last.

`{machine, commit, command, figures: [{name, value, unit, goal, holds, compared_with}]}`; with `save_as` the same object
is also written to `benchmarks/results/<save_as>.json`. A figure without a goal has `holds: null`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def figure(
    name: str,
    value: float | int | str | None,
    unit: str,
    goal: str | None = None,
    holds: bool | None = None,
    compared_with: str | None = None,
) -> dict[str, object]:
    """One result: `goal` is a sentence such as "at least 70 %", `holds` says whether `value` meets it."""
    return {"name": name, "value": value, "unit": unit, "goal": goal, "holds": holds, "compared_with": compared_with}


def report(figures: list[dict[str, object]], *, save_as: str | None = None) -> None:
    """Print the JSON object of a run as the last line; with `save_as`, keep it under `benchmarks/results/`."""
    if save_as is not None:
        keep(figures, save_as)
    sys.stdout.flush()
    print(json.dumps(_result(figures)), flush=True)


def chosen(only: str, parts: Iterable[str], parser: argparse.ArgumentParser) -> list[str]:
    """The parts that `--only` names; ends with a sentence where there is no such part."""
    named = only.split(",")
    unknown = [part for part in named if part not in parts]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(parts)}")
    return named


def show(figures: list[dict[str, object]]) -> None:
    """For people: a line a figure, and whether its goal holds."""
    for one in figures:
        holds = {True: "holds", False: "MISSED", None: ""}[one["holds"]]  # type: ignore[index]
        print(f"{one['name']!s:34}{one['value']!s:>10} {one['unit']!s:12}{one['goal'] or ''!s:18}{holds}", flush=True)


def keep(figures: list[dict[str, object]], save_as: str) -> None:
    """Write a result under `benchmarks/results/`."""
    path = _HERE / "results" / f"{save_as}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_result(figures), indent=2) + "\n")


def _result(figures: list[dict[str, object]]) -> dict[str, object]:
    return {"machine": machine(), "commit": commit(), "command": command(), "figures": figures}


def machine() -> dict[str, object]:
    """What a figure was measured on: processor, usable cores, memory in bytes, system, Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that was measured; `+changes` when tracked files, other than kept results, differed from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return head + ("+changes" if changed else "")


def command() -> str:
    """The command line of this run, as one would type it at the root of the checkout."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(_HERE.parent) if script.is_relative_to(_HERE.parent) else script.name
    return " ".join(["python", str(shown), *sys.argv[1:]])


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_HERE, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
