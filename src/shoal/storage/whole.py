"""A small file that is always whole: as it was, or as it is written anew."""

from __future__ import annotations

from shoal.storage.faults import disk_faults
from shoal.world import Disk


def write_whole(disk: Disk, name: str, content: bytes, doing: str) -> None:
    """Durable when this returns. Raises StorageFull, DiskFailed: "While `doing` ..."."""
    scratch = f"{name}.new"
    with disk_faults(disk, doing, len(content)):
        disk.delete(scratch)
        disk.write(scratch, content)
        disk.sync(scratch)
        disk.rename(scratch, name)
        disk.sync(name)
