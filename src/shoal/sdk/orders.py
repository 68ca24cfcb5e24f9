"""The orders that this user has signed for auctions, a file each: with one of them its owner finds out whether it is in
the batch that it was signed for."""

from __future__ import annotations

import contextlib
from pathlib import Path

from shoal.errors import BadRecord
from shoal.identity import Envelope
from shoal.protocol.orders import ORDER_MAX_BYTES, open_order

KEPT_MAX = 4096
"""Orders for one auctioneer; those for the oldest batches make room."""


class KeptOrders:
    """Those for one auctioneer, in a folder of its own below `folder`."""

    def __init__(self, folder: Path, auctioneer: bytes) -> None:
        self.folder = folder / auctioneer.hex()

    def keep(self, order: Envelope) -> Path:
        """Where it is then. Raises OSError, and what `open_order` does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{open_order(order).terms.batch:016}-{order.record_id.hex()[:16]}.order"
        path.write_bytes(order.to_bytes())
        for old in self._files()[:-KEPT_MAX]:
            old.unlink(missing_ok=True)
        return path

    def of(self, batch: int) -> list[Envelope]:
        """Those for this batch. A file that is none any more is as good as lost."""
        found = []
        for path in self._files(f"{batch:016}-"):
            with contextlib.suppress(BadRecord):
                order = Envelope.from_bytes(path.read_bytes(), ORDER_MAX_BYTES)
                open_order(order)
                found.append(order)
        return found

    def _files(self, begin: str = "") -> list[Path]:
        return sorted(self.folder.glob(f"{begin}*.order"))
