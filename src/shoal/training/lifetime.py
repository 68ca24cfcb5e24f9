"""A child process must neither outlive the process that started it, nor take all of the machine's memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil

MEMORY_SHARE = 0.9
"""Of the memory that is free when an engine begins, as much may it take: what a stranger's job asks for beyond ends the
engine with an error, instead of having the kernel choose whom to kill."""
PR_SET_PDEATHSIG = 1
"""prctl(2), Linux."""


def die_with_parent(parent: int) -> None:
    """Be killed when `parent` (a process id) ends. On Linux at once; elsewhere the closed pipe has to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def stay_within_memory(available_bytes: int | None = None) -> None:
    """Let this process, and each child of it, take MEMORY_SHARE of the main memory that is free now (or of
    `available_bytes`) beside what it has; an allocation beyond fails. Linux only; a user's own lower limit stays."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    available = psutil.virtual_memory().available if available_bytes is None else available_bytes
    wanted = int(psutil.Process().memory_info().data + MEMORY_SHARE * available)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    for limit in (soft, hard):
        if limit != resource.RLIM_INFINITY:
            wanted = min(wanted, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
