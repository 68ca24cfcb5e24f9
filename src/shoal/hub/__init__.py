"""The hub: where nodes and clients find each other. Anyone may run one; several can serve the same network.

- `OfferIndex` keeps the newest signed offer of each node while it lives; `SqlOfferIndex` in a file, `MemoryOfferIndex`
  for tests.
- `HubService` answers on links: `offer.publish`, `offer.find`, `introduce`, `hub.info`, `hub.probe`.
- `web.make_app` is the HTTP face: reading only, with an OpenAPI document.
- `server.HubServer` puts these together on a data directory; `HubClient` is the other side, for several hubs at once.

Invariants: a record is kept and given out byte for byte as it came; what was acknowledged survives `kill -9`; a higher
sequence of a node is never replaced by a lower one; lifetimes are counted on the hub's clock from arrival, so no
node's clock matters; nobody but its maker can make a known offer live on; whoever reads from a hub verifies.

Only the client is imported with the room: databases and web servers are for those who run a hub.
"""

from shoal.hub.client import HubClient, HubState, MeasuredLink, NoHub, NoIntroduction

__all__ = ["HubClient", "HubState", "MeasuredLink", "NoHub", "NoIntroduction"]
