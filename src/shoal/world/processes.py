"""What this process asks of the system: to end with its parent, as many open files as it may have, and no more memory
than is free; and which process holds a lock."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from shoal.world.disk import Disk

_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0
OPEN_FILES_WANTED = 1 << 16
"""More than all links, handshakes and blobs together; the system's default of 1024 or 256 is less."""
OPEN_FILES_ASSUMED = 1 << 13
"""Where the system has no such limit to ask for."""
MEMORY_SHARE = 0.9
"""Of the memory that is free when an engine begins, as much may it take: what a stranger's job asks for beyond ends the
engine with an error, instead of having the kernel choose whom to kill."""
LOCK = "lock"
"""In a folder that one process writes: who holds it, and while somebody does its number."""
_PID_BYTES = 20


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGTERM) -> None:
    """Have this process receive `signal_number` when its parent is gone, however the parent went.

    Linux tells the kernel (prctl(2), PR_SET_PDEATHSIG); elsewhere a thread watches the parent's pid.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
        if os.getppid() != parent_pid:  # it went before we asked
            os.kill(os.getpid(), signal_number)
        return

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_POLL_S)
        os.kill(os.getpid(), signal_number)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def open_files() -> int:
    """How many files, sockets among them, this process may have open."""
    if sys.platform == "win32":
        return OPEN_FILES_ASSUMED
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES_WANTED if soft == resource.RLIM_INFINITY else soft


def allow_open_files() -> None:
    """Raise what this process may have open to OPEN_FILES_WANTED, as far as the system lets it without being asked."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


def process_holding(lock: Path, pid: int) -> psutil.Process | None:
    """The process of that number, where it has this very file open. A number alone may be another's by now, or of
    another machine."""
    try:
        process = psutil.Process(pid)
        held = {one.path for one in process.open_files()}
    except (psutil.Error, OSError):
        return None
    return process if str(lock.resolve()) in held else None


def sign_lock(disk: Disk) -> None:
    """Write this process's number into the lock that it holds. Raises OSError."""
    disk.write(LOCK, f"{os.getpid():<{_PID_BYTES}}".encode())


def unsign_lock(disk: Disk) -> None:
    """Before it is let go in order: who is killed leaves its number. Raises OSError."""
    disk.write(LOCK, b" " * _PID_BYTES)


def pid_in_lock(folder: Path) -> int | None:
    """The number of the process that writes in a folder, or did when it was killed; None where the last one left in
    order. Numbers are used again: it proves nothing by itself."""
    try:
        with (folder / LOCK).open("rb") as file:
            holder = file.read(_PID_BYTES).strip()
    except OSError:
        return None
    return int(holder) if holder.isdigit() else None


def writer_of(folder: Path) -> psutil.Process | None:
    """The process that writes in a folder now: the one whose number stands in the lock and which has that very lock
    open. A number alone may be another's by now, or of another machine, and a copied folder has a lock, too."""
    pid = pid_in_lock(folder)
    return process_holding(folder / LOCK, pid) if pid is not None else None
