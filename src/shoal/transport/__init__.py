"""Links between nodes that have proved who they are: `world.network` made real.

    TlsEndpoint(key, *, clock=None, dice=None, network="shoal", versions=(oldest, newest), limits=None,
                congestion_control=None)
    MemoryNetwork(clock=None, *, dice=None, path=None).endpoint(key, *, network="shoal", versions=..., limits=None)
    run(main)                                   `asyncio.run` on the fast loop

Five layers; each stands on those above it in this list and can be tested without those below:

    streams      bytes both ways: a socket, a pipe inside the process, a relayed path
    secure       TLS 1.3 over any byte stream; the answering side's key is its NodeId
    handshake    the dialling side proves its NodeId inside the channel; both agree on a version
    connection   many requests over one stream: small before bulk, credit, liveness, limits. Its parts: `frames` (the
                 bytes), `requests` (the two ends of one), `outbox` (what is sent next), `rates` (what is measured)
    endpoint     dialling by NodeId, one link per peer; `tls` and `memory` say what carries it

Invariants. A link's peer has proved its NodeId, and a proof made for one node is worth nothing at another. No clock is
read to decide whom to trust. What a peer can make this side hold is bounded; going beyond costs the peer its connection
and nobody else anything. Every request ends: with a reply, a refusal, or an error, at the latest at its deadline.
"""

from shoal.transport.connection import BodyTooLarge, HandlerFailed, NodeBusy
from shoal.transport.endpoint import (
    BadAddress,
    DuplicateKey,
    EndpointClosed,
    EndpointFull,
    format_address,
    parse_address,
)
from shoal.transport.frames import BrokenFraming
from shoal.transport.handshake import NotAccepted, NotProved, WrongNode
from shoal.transport.limits import EndpointLimits, Limits
from shoal.transport.loop import run
from shoal.transport.memory import MemoryEndpoint, MemoryNetwork, Path
from shoal.transport.secure import HandshakeFailed
from shoal.transport.streams import ByteStream, pipe
from shoal.transport.tls import TlsEndpoint

__all__ = [
    "BadAddress",
    "BodyTooLarge",
    "BrokenFraming",
    "ByteStream",
    "DuplicateKey",
    "EndpointClosed",
    "EndpointFull",
    "EndpointLimits",
    "HandlerFailed",
    "HandshakeFailed",
    "Limits",
    "MemoryEndpoint",
    "MemoryNetwork",
    "NodeBusy",
    "NotAccepted",
    "NotProved",
    "Path",
    "TlsEndpoint",
    "WrongNode",
    "format_address",
    "parse_address",
    "pipe",
    "run",
]
