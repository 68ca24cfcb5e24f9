"""Which process runs the node of a folder, and what stopping it has to wait for: read beside it, and never written."""

from __future__ import annotations

from pathlib import Path

import psutil

from shoal.market.holds import Slots, taken
from shoal.node.sales import SLOTS, read_kept
from shoal.world import DirectoryDisk
from shoal.world.processes import process_holding

PID_FILE = "pid"
"""In a node's folder: the number of the process that runs it, or did when it was killed."""


def process_of(folder: Path) -> psutil.Process | None:
    """The process that runs the node in a folder now. Numbers are used again: it has to have the blobs open, too."""
    try:
        pid = int((folder / PID_FILE).read_text())
    except (OSError, ValueError):
        return None
    return process_holding(folder / "blobs" / "lock", pid)


def places_taken(folder: Path, now_ms: int) -> tuple[int, float]:
    """How many places of the node in a folder are paid for, and for how many seconds they are kept when it is asked to
    stop. Raises SalesDamaged."""
    if not (folder / "sales").is_dir():
        return 0, 0.0
    slots = read_kept(DirectoryDisk(folder / "sales"), SLOTS, Slots, str(folder)) or Slots()
    kept = taken(slots, now_ms)
    return len(kept), max((one.hold.reclaim_notice_ms for one in kept), default=0) / 1000
