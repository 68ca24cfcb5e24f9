"""Child processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


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
