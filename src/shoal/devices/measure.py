"""The measuring itself: `python -m shoal.devices.measure` prints one Capability as JSON.

Every rate is the best of several repetitions: other work on the machine only ever makes a repetition slower, so the
best is nearest to what the device can do. (What it does under load shows later, in the rounds.) All repetitions are
bounded in time, since bfloat16 on a CPU without units for it can be a hundred times slower than float32.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil
import torch

from shoal.devices.names import processor_name
from shoal.protocol.offers import Capability, Device, Throughput

MATMUL_BUDGET_S = 0.4
"""For one dtype on one device."""
MATMUL_LONG_ENOUGH_S = 0.02
"""A multiplication this long hides what starting it costs; larger ones would only take longer."""
MATMUL_SMALLEST, MATMUL_LARGEST = 64, 8192
"""Rows of the square matrices: tried by doubling, so that a slow dtype shows itself while it is cheap."""
REPETITIONS = 5
COPY_BYTES = 128 << 20
"""Larger than the caches of nearly all CPUs."""
COPY_BUDGET_S = 0.3
DISK_BYTES = 8 << 20
DISK_REPETITIONS = 3
DISK_BUDGET_S = 0.5

Now = Callable[[], float]


def measure(
    folder: Path, *, speed_limit: float = 1.0, threads: int | None = None, kinds: Sequence[str] = (),
    now: Now = time.perf_counter,
) -> Capability:  # fmt: skip
    """Everything about this machine that can be measured without a network; about two seconds on a CPU.

    FLOP/s and memory bandwidth are multiplied by `speed_limit`, as a node that computes a quarter of the time gets a
    quarter done; the disk is not limited. Raises ValueError for a speed limit outside (0, 1].
    """
    if not 0 < speed_limit <= 1:
        raise ValueError(f"a speed limit of {speed_limit} is not above 0 and at most 1")
    if threads is not None:
        torch.set_num_threads(threads)
    devices = [
        measure_device(device, kind, speed_limit, now) for device, kind in _devices() if not kinds or kind in kinds
    ]
    if not devices:
        raise ValueError(f"this machine has no device of the kinds {', '.join(kinds)}")
    return Capability(
        devices=tuple(devices),
        speed_limit=speed_limit,
        disk_free_bytes=shutil.disk_usage(folder).free,
        disk_write_bytes_per_s=disk_write_rate(folder, now),
        software=f"shoal {version('shoal')}, torch {torch.__version__}, python {platform.python_version()}"[:128],
    )


def measure_device(device: torch.device, kind: str, speed_limit: float, now: Now) -> Device:
    """One device: FLOP/s per dtype, memory and its bandwidth. A dtype that it cannot multiply is left out."""
    throughput = []
    for dtype in _dtypes(kind):
        flops = matmul_flops(device, dtype, now)
        if flops > 0:
            throughput.append(Throughput(dtype=str(dtype).removeprefix("torch."), flops=flops * speed_limit))
    name, memory_bytes = _name_and_memory(device, kind)
    return Device(
        kind=kind,
        name=name[:96],
        memory_bytes=memory_bytes,
        memory_bytes_per_s=copy_rate(device, memory_bytes, now) * speed_limit,
        throughput=tuple(throughput),
        threads=torch.get_num_threads() if kind == "cpu" else 0,
    )


def matmul_flops(device: torch.device, dtype: torch.dtype, now: Now) -> float:
    """Floating point operations per second of square matrix multiplication (2 n^3 each), the best repetition; 0 when
    the device cannot do it in this dtype."""
    started, best, rows = now(), 0.0, MATMUL_SMALLEST
    try:
        while True:
            left = torch.randn(rows, rows, device=device).to(dtype)
            right = torch.randn(rows, rows, device=device).to(dtype)
            fastest_s = float("inf")
            for repetition in range(REPETITIONS + 1):
                taken_s = _timed(lambda a=left, b=right: torch.mm(a, b), device, now)  # type: ignore[misc]
                if repetition > 0 or taken_s > MATMUL_LONG_ENOUGH_S:  # the first one of a size may load a kernel
                    fastest_s = min(fastest_s, taken_s)
                if now() - started > MATMUL_BUDGET_S and (repetition or best):  # the very first waits for threads, too
                    fastest_s = min(fastest_s, taken_s)  # a machine so busy that it came no further
                    break
            if fastest_s > 0:
                best = max(best, 2.0 * rows**3 / fastest_s)
            if fastest_s > MATMUL_LONG_ENOUGH_S or rows >= MATMUL_LARGEST or now() - started > MATMUL_BUDGET_S:
                return best
            rows *= 2
    except (RuntimeError, NotImplementedError, TypeError):  # out of memory, or no such kernel
        return best


def copy_rate(device: torch.device, memory_bytes: int, now: Now) -> float:
    """Bytes per second read and written together while copying within the device's memory, the best repetition."""
    started, best = now(), 0.0
    size = max(1 << 20, min(COPY_BYTES, memory_bytes // 16))
    try:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        for repetition in range(REPETITIONS + 1):
            taken_s = _timed(lambda: target.copy_(source), device, now)
            if repetition > 0 and taken_s > 0:
                best = max(best, 2.0 * size / taken_s)
            if now() - started > COPY_BUDGET_S and best > 0:
                break
    except RuntimeError:  # out of memory
        pass
    return best


def disk_write_rate(folder: Path, now: Now) -> float:
    """Bytes per second written and made durable (fsync included) in `folder`, the best repetition; 0 when it is full
    or cannot be written. The file is gone afterwards."""
    best, started = 0.0, now()
    with suppress(OSError), tempfile.TemporaryFile(dir=folder, prefix=".shoal-measure-") as file:
        for _ in range(DISK_REPETITIONS):
            data = os.urandom(DISK_BYTES)  # nothing that a file system could compress
            file.seek(0)
            begun = now()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            taken_s = now() - begun
            if taken_s > 0:
                best = max(best, DISK_BYTES / taken_s)
            if now() - started > DISK_BUDGET_S:
                break
    return best


def _timed(work: Callable[[], object], device: torch.device, now: Now) -> float:
    _finish(device)
    begun = now()
    work()
    _finish(device)
    return now() - begun


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _devices() -> Iterator[tuple[torch.device, str]]:
    """All devices torch can use, accelerators first."""
    if torch.cuda.is_available():
        kind = "rocm" if torch.version.hip else "cuda"
        for number in range(torch.cuda.device_count()):
            yield torch.device("cuda", number), kind
    if torch.xpu.is_available():
        for number in range(torch.xpu.device_count()):
            yield torch.device("xpu", number), "xpu"
    if torch.backends.mps.is_available():
        yield torch.device("mps"), "mps"
    yield torch.device("cpu"), "cpu"


def _dtypes(kind: str) -> tuple[torch.dtype, ...]:
    """float16 is for accelerators: CPUs convert it to float32 and back."""
    if kind == "cpu":
        return torch.float32, torch.bfloat16
    return torch.float32, torch.bfloat16, torch.float16


def _name_and_memory(device: torch.device, kind: str) -> tuple[str, int]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    if device.type == "xpu":
        of_xpu = torch.xpu.get_device_properties(device)
        return of_xpu.name, of_xpu.total_memory
    if device.type == "mps":
        return f"Apple {platform.machine()} GPU", torch.mps.recommended_max_memory()
    return processor_name(), _cpu_memory_bytes()


def _cpu_memory_bytes() -> int:
    """What the machine has, or what its control group may use where that is less (Linux's cgroup-v2 and -v1 files)."""
    memory = psutil.virtual_memory().total
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            memory = min(memory, int(Path(place).read_text()))
    return int(memory)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shoal.devices.measure", description="Measure this machine.")
    parser.add_argument("--folder", type=Path, required=True, help="where the disk is measured")
    parser.add_argument("--speed-limit", type=float, default=1.0, help="share of time the node may compute")
    parser.add_argument("--threads", type=int, help="CPU threads to use")
    parser.add_argument("--kind", action="append", default=[], help="measure only such devices")
    given = parser.parse_args()
    # Drivers print where they like; the answer goes out alone, through a descriptor that only this function has.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        capability = measure(
            given.folder, speed_limit=given.speed_limit, threads=given.threads, kinds=tuple(given.kind)
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    with os.fdopen(answer, "wb") as out:
        out.write(msgspec.json.encode(capability))
    return 0


if __name__ == "__main__":
    sys.exit(main())
