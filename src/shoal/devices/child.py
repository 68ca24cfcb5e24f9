"""Measuring in a process of its own: a driver that crashes or runs out of memory takes nothing with it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shoal.errors import EngineError
from shoal.protocol.offers import Capability

MESSAGE_BYTES_MAX = 64 * 1024
"""A capability of 64 devices takes about half of it."""
COMPLAINT_BYTES_MAX = 4 * 1024
DEADLINE_S = 120.0
"""Loading torch from a cold disk takes most of it; the measuring itself is bounded to seconds a device."""


class MeasureFailed(EngineError):
    """The devices could not be measured."""

    code = "SH-550"


async def measure_in_child(
    *,
    folder: Path,
    speed_limit: float = 1.0,
    threads: int | None = None,
    kinds: Sequence[str] = (),
    deadline_s: float = DEADLINE_S,
    command: Sequence[str] = (sys.executable, "-m", "shoal.devices.measure"),
) -> Capability:
    """Measure this machine's devices and the disk under `folder`.

    `speed_limit` is the share of time in which the owner lets the node compute, and is in the figures; `threads` is
    how many CPU threads may be used (None: torch's own choice); `kinds` limits which kinds of device are looked at.
    Link figures are the caller's to add. Raises MeasureFailed with what the child said; the child is gone in any case.
    """
    arguments = ["--folder", str(folder), "--speed-limit", repr(speed_limit)]
    if threads is not None:
        arguments += ["--threads", str(threads)]
    for kind in kinds:
        arguments += ["--kind", kind]
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise MeasureFailed(f"The measuring process could not be started: {error.strerror} ({command[0]}).") from error
    assert child.stdout is not None and child.stderr is not None
    try:
        async with asyncio.timeout(deadline_s):
            message, complaint, status = await asyncio.gather(
                _head(child.stdout, MESSAGE_BYTES_MAX), _tail(child.stderr, COMPLAINT_BYTES_MAX), child.wait()
            )
    except TimeoutError as error:
        raise MeasureFailed(
            f"Measuring the devices took longer than {deadline_s:.0f} s and was stopped; a device may hang. Try naming "
            "only devices that work, for example cpu."
        ) from error
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if status != 0:
        raise MeasureFailed(
            f"The measuring process {_ending(status)}{_last_line(complaint)}. The node itself goes on; check the "
            "device's driver and its free memory, or name only devices that work, for example cpu."
        )
    if len(message) > MESSAGE_BYTES_MAX:
        raise MeasureFailed(f"The measuring process said more than {MESSAGE_BYTES_MAX} bytes, which it never should.")
    try:
        return msgspec.json.decode(message, type=Capability)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MeasureFailed(f"The measuring process said something that is not a capability: {error}.") from error


async def _head(stream: asyncio.StreamReader, most: int) -> bytes:
    """The first bytes, one more than allowed at most; the rest is read and dropped so that the child can end."""
    kept = b""
    while chunk := await stream.read(1 << 16):
        kept = (kept + chunk)[: most + 1]
    return kept


async def _tail(stream: asyncio.StreamReader, most: int) -> bytes:
    kept = b""
    while chunk := await stream.read(1 << 16):
        kept = (kept + chunk)[-most:]
    return kept


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}"


def _last_line(complaint: bytes) -> str:
    lines = [line.strip() for line in complaint.decode(errors="replace").splitlines() if line.strip()]
    return f" and said: {lines[-1].rstrip('.')}" if lines else " and said nothing"
