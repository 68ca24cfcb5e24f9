"""What devices are called: two of the same class are expected to compute the same bits."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch


def device_class(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{'rocm' if torch.version.hip else 'cuda'} {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {processor_name()}"
    if device.type == "xpu":
        return f"xpu {torch.xpu.get_device_name(device)}"
    return f"{device.type} {platform.machine()} {processor_name()}"


@cache
def processor_name() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.lower().startswith(("model name", "cpu model")):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine() or "CPU"
