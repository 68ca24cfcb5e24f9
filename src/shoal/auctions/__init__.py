"""An auction of hours that an operator runs: the rules of `shoal.market` as a process, and the other side of it.

- `AuctionStore`: what an auctioneer must not forget, in a database of one file.
- `Auctioneer`: the batch that is open; takes orders for it, and closes it.
- `AuctionService` answers on links; `AuctionServer` puts all of it on a data folder: a key, a lock, a clock.
- `RemoteAuction` is such an auction for who trades there; what it publishes is cleared again before it is believed.

Invariants: an order is on the disk before its trader hears that it was taken, and is then in the batch; a batch is on
the disk, with the seed that the next one draws lots from, before anybody can read it, and no other of its number ever
is; which orders count and what they come to, `shoal.market` alone decides.

Only the client is imported with the room: databases are for those who run an auction.
"""

from shoal.auctions.client import RemoteAuction

__all__ = ["RemoteAuction"]
