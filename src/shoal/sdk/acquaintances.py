"""What this user has seen of nodes, in a file: a job leaves those alone that lied to an earlier one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from shoal.errors import StorageError
from shoal.market.reputation import Outcome, Seen, after

NODES_MAX = 100_000
"""More are forgotten, those first that were not seen for longest."""
FILE_MAX_BYTES = 64 << 20


class AcquaintancesDamaged(StorageError):
    """The file in which it is kept what nodes have done cannot be read or written."""

    code = "SH-449"


class Acquaintances:
    """Several jobs may keep one file at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[bytes, Seen]:
        """By NodeId. Raises AcquaintancesDamaged."""
        try:
            if not self._path.exists():
                return {}
            if self._path.stat().st_size > FILE_MAX_BYTES:
                raise ValueError(f"it is larger than {FILE_MAX_BYTES} bytes")
            found = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Seen])
            return {bytes.fromhex(node): seen for node, seen in found.items()}
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise AcquaintancesDamaged(
                f"{self._path}, which says what nodes have done for your jobs, cannot be read: {error}. Restore it "
                "from a copy, or move it away: nodes are then new to you."
            ) from error

    def scores(self) -> dict[bytes, float]:
        return {node: seen.score for node, seen in self.read().items()}

    def add(self, outcomes: Mapping[bytes, Outcome], now_ms: int) -> None:
        """A job is over. Raises AcquaintancesDamaged."""
        if not outcomes:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._held():
                known = self.read()
                for node, outcome in outcomes.items():
                    known[node] = after(known.get(node), outcome, now_ms)
                newest = sorted(known, key=lambda node: known[node].last_ms)[-NODES_MAX:]
                scratch = self._path.with_suffix(".new")
                scratch.write_bytes(msgspec.json.encode({node.hex(): known[node] for node in newest}))
                scratch.replace(self._path)
        except OSError as error:
            raise AcquaintancesDamaged(f"{self._path} cannot be written: {error.strerror}.") from error

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        with self._path.with_suffix(".lock").open("ab") as lock:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
