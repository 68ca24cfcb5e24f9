"""How torch is set up so that the same work gives the same bytes, and what the thing that computes is called."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version

import torch

from shoal.errors import EngineError
from shoal.protocol.training import Engine

NAME_MAX = 96


class NoDevice(EngineError):
    """The named device is not on this machine."""

    code = "SH-533"


def set_up_torch(threads: int) -> None:
    """Deterministic algorithms only, a fixed number of threads, full float32 products."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")


def open_device(name: str) -> torch.device:
    """Raises NoDevice."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise NoDevice(f"Device {name!r} cannot be used on this machine: {error}") from error
    return device


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_engine(device: torch.device, threads: int, processes: int) -> Engine:
    """Software and device class as Contributions name them: two engines of the same description are expected to agree
    bit for bit."""
    software = f"shoal {version('shoal')}, torch {torch.__version__}, transformers {version('transformers')}"
    return Engine(software[:NAME_MAX], device_class(device)[:NAME_MAX], threads, processes)


def device_class(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{'rocm' if torch.version.hip else 'cuda'} {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_processor_name()}"
    if device.type == "xpu":
        return f"xpu {torch.xpu.get_device_name(device)}"
    return f"{device.type} {platform.machine()} {_processor_name()}"


def _processor_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            for line in lines:
                if line.lower().startswith(("model name", "cpu model")):
                    return " ".join(line.partition(":")[2].split())
    return platform.processor()
