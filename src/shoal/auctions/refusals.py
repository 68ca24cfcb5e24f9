"""What an auction answers instead, here and at its clients."""

from __future__ import annotations

from shoal.errors import BadInput, LinkError, StorageError


class AuctionBusy(StorageError):
    """More is asked of an auction at once than it answers."""

    code = "SH-457"


class BatchFull(LinkError):
    """A batch has as many orders as it takes, in all, of one trader, or from one address."""

    code = "SH-348"


class NotPublished(BadInput):
    """An auctioneer has no published batch of this number, or none any more."""

    code = "SH-157"


class OrderRefused(BadInput):
    """An order would not count in the batch that is open."""

    code = "SH-156"


class AuctionFailed(StorageError):
    """The database of an auction cannot be read or written, or is not what its auctioneer wrote."""

    code = "SH-455"
