"""How torch is set up so that the same work gives the same bytes, and what the thing that computes is called."""

from __future__ import annotations

from importlib.metadata import version

import torch

from shoal.devices.names import device_class
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
