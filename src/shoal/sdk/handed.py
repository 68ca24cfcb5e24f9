"""That a run was handed over to nodes: a note in its folder, beside the driver's key with which it is looked at."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shoal.driver.folder import FolderDamaged
from shoal.protocol.driving import Host

FILE = "detached.json"


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """`detached.json`: who drives a run, and how they are found."""

    job: bytes
    hosts: tuple[Host, ...]
    hubs: tuple[str, ...]
    """Tickets."""
    ended: str | None = None
    """How, once all that the hosts had is here."""


def handed(folder: Path) -> Handed | None:
    """How the run in a folder was handed over; None for one that was not. Raises FolderDamaged."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Handed)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FolderDamaged(
            f"{folder / FILE}, which says that nodes drive the job and which, cannot be read: {error}. Restore it from "
            "a copy: who goes on without it drives beside them."
        ) from error


def is_driven_by_nodes(folder: Path) -> bool:
    """Now, as far as is known here."""
    known = handed(folder)
    return known is not None and known.ended is None
