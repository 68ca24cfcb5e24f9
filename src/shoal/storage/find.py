"""Reading from a store's directory without opening the store: another process may have it open."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from shoal.storage.store import blob_name


def find_blob(directory: Path, name: bytes) -> Path | None:
    """The file of a blob in the directory of a store, its bytes verified; None when it is not there or has rotted.

    The process that has the store open may evict the blob at any time: open, map or copy it at once.
    """
    path = directory / blob_name(name)
    if not path.is_file():
        return None
    return path if blake3(max_threads=1).update_mmap(path).digest() == name else None
