"""What this process asks of the system: children that do not outlive it, and as many open files as it may have."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0
OPEN_FILES_WANTED = 1 << 16
"""More than all links, handshakes and blobs together; the system's default of 1024 or 256 is less."""
OPEN_FILES_ASSUMED = 1 << 13
"""Where the system has no such limit to ask for."""


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
