"""A job whose loop is its owner's own script, from the owner's side: what it starts from, how good a model is, and an
engine for replays. The script runs in a child process on this machine, and nowhere else."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shoal.driver.replay import StartEngine
from shoal.errors import BadInput
from shoal.identity import KeyPair, hash_of_parts
from shoal.protocol.hubs import HubTicket
from shoal.protocol.training import TrainJob
from shoal.sdk.local import shoal_home
from shoal.training.process import EngineProcess
from shoal.training.state import SharedState

LOOK_S = 1800.0
"""How long a script may take to load its data, and to measure a model."""
WATCH_S = 0.2
"""How often it is asked meanwhile whether to go on."""
OUTPUT_TAIL_BYTES = 4000
WORKER = "shoal.sdk.loop_worker"
WANTED_FILE, LOOKED_FILE, START_FILE, STATE_FILE = "wanted.json", "looked.json", "start", "state"


class ScriptFailed(BadInput):
    """The script of a job could not be run, or did not do what a loop does."""

    code = "SH-141"


class NoScript(BadInput):
    """A run of a user's own loop without its script, or a script for a run that has none."""

    code = "SH-145"


class OtherLoop(BadInput):
    """A script has another name, other samples or another model than the job it is run for."""

    code = "SH-144"


class LookWanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a script is looked at for."""

    rehearse_samples: int = 0
    """Batch size with which the time of a step is measured; 0: it is not."""


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen."""

    job: str
    samples: int
    samples_per_s: float = 0.0
    held_out_loss: float | None = None


def loop_kind(owner: bytes, job: str) -> str:
    """What the processes of an owner's own loop say they take: nobody else's jobs, and no other of the owner's."""
    return "own-" + hash_of_parts("own loop", [owner, job.encode()]).hex()[:12]


def loops_folder(job: str) -> Path:
    """Where processes of a job of one's own keep their keys and blobs."""
    return shoal_home() / "loops" / job


@dataclass(frozen=True)
class Script:
    """A script as it was looked at before a job."""

    looked: Looked
    start: SharedState
    """Without outer momentum."""
    said: str
    """The last lines that it printed."""


def look_at(script: Path, *, batch_samples: int, watch: Callable[[], None] = lambda: None) -> Script:
    """Run a script up to its loop, a few steps of it, and what comes after it with the start state. Blocks; `watch` is
    called now and then, and what it raises ends the script. Raises ScriptFailed, BadState."""
    with tempfile.TemporaryDirectory(prefix="shoal-look-") as name:
        folder = Path(name)
        looked, said = _look(script, folder, LookWanted(rehearse_samples=batch_samples), watch)
        return Script(looked, SharedState.read(folder / START_FILE), said)


def measure(script: Path, state: SharedState) -> tuple[Looked, str]:
    """Run what comes after a script's loop with a trained state; gives what it found and printed. Blocks. Raises
    ScriptFailed."""
    with tempfile.TemporaryDirectory(prefix="shoal-look-") as name:
        folder = Path(name)
        SharedState.start(state.layout, state.parameters, momentum=False).write(folder / STATE_FILE)
        return _look(script, folder, LookWanted())


def _look(
    script: Path, folder: Path, wanted: LookWanted, watch: Callable[[], None] = lambda: None
) -> tuple[Looked, str]:
    (folder / WANTED_FILE).write_bytes(msgspec.json.encode(wanted))
    log = folder / "output"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", WORKER, str(script), "look", str(folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as running,
    ):
        try:
            code = _wait(script, running, watch)
        finally:
            running.kill()  # without effect on one that has ended
    said = log.read_bytes()[-OUTPUT_TAIL_BYTES:].decode(errors="replace").strip()
    last = said.splitlines()[-1] if said else "it said nothing"
    if code != 0:
        raise ScriptFailed(f"{script} ended with code {code}: {last}")
    if not (folder / LOOKED_FILE).exists():
        raise ScriptFailed(f"{script} came to its end without iterating over shoal.join(...).")
    return msgspec.json.decode((folder / LOOKED_FILE).read_bytes(), type=Looked), said


def _wait(script: Path, running: subprocess.Popen[bytes], watch: Callable[[], None]) -> int:
    for _ in range(round(LOOK_S / WATCH_S)):
        watch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return running.wait(WATCH_S)
    raise ScriptFailed(f"{script} did not come to its end within {LOOK_S / 60:.0f} minutes.")


def how_to_take_part(script: str, owner: KeyPair, hubs: Sequence[HubTicket]) -> str:
    """What the owner of a loop starts, here and elsewhere."""
    return (
        f"The job's nodes are processes that you start: python {script}   On other machines with "
        f"SHOAL_OWNER={owner.node_id.hex()} SHOAL_HUB='{' '.join(str(hub) for hub in hubs)}'"
    )


def engine_for(job: TrainJob, script: Path | None) -> StartEngine:
    """What starts the engine of a replay of this job: the usual one, or one that runs its owner's script. Raises
    NoScript."""
    if job.model.config:
        if script is not None:
            raise NoScript(f"Job {job.name!r} trains a language model; it is replayed without a script.")
        return EngineProcess.start
    if script is None:
        raise NoScript(
            f"Job {job.name!r} is its owner's own loop: name the script it was trained with, --script FILE. It is run "
            "on this machine."
        )
    if not script.is_file():
        raise NoScript(f"There is no script {script}.")
    return functools.partial(EngineProcess.start, command=(WORKER, str(script), "engine"))
