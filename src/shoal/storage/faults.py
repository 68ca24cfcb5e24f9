"""What a disk or a database can do to its user, as sentences."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.errors import StorageError
from shoal.quantities import format_bytes
from shoal.world import Disk


class StorageFull(StorageError):
    """No room: the disk is full, or what is pinned fills the store's capacity."""

    code = "SH-401"


class DiskFailed(StorageError):
    """The operating system refused to read or write."""

    code = "SH-402"


class LedgerFailed(StorageError):
    """A ledger's database cannot be read or written; nothing was acknowledged."""

    code = "SH-445"


class LedgerBusy(StorageError):
    """More commands wait for a ledger than it lets wait."""

    code = "SH-446"


@contextmanager
def disk_faults(disk: Disk, doing: str, asked_bytes: int = 0) -> Iterator[None]:
    """Turns what the operating system reports into a sentence: "While `doing` in DIRECTORY, ...".

    Raises StorageFull when the disk (or the user's quota on it) is full, DiskFailed for everything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(
                f"The disk under {disk.place} is full: {doing} asked for {format_bytes(asked_bytes)} and the disk has "
                f"{format_bytes(disk.free_bytes())} free. Free some space there or move the store to a larger disk; "
                f"nothing half-written was kept."
            ) from error
        raise DiskFailed(
            f"While {doing} in {disk.place} the operating system said: {error.strerror or error}. "
            f"Check the disk and who owns the directory."
        ) from error
