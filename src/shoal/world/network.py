"""The network as the rest of Shoal sees it: links between nodes that have proved who they are.

An `Endpoint` is one node's place on the network. It dials a peer by NodeId (addresses are hints about where to try),
and holds at most one open `Link` to each peer, whoever dialled. On an open link either side may make requests; many
run at once. A request is a kind, a small body and a deadline; what comes back is a small body or a stream of bytes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from shoal.errors import LinkError

Address: TypeAlias = str
"""Where a node may be reached, `tcp://host:port` (IPv6 in brackets). A hint, never an identity."""

Body: TypeAlias = bytes | AsyncIterator[bytes]
"""What a handler answers with: a small body, or a stream that is read with back-pressure."""


_PREFIX_V6 = 64
"""What one subscriber is given of IPv6 (RFC 6177); within it, addresses cost nothing."""


def source_of(host: str) -> str:
    """What counts as one place that bytes come from: an IPv4 address, or the network around an IPv6 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "?"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((address, _PREFIX_V6), strict=False))


class Unreachable(LinkError):
    """No hint led to the peer, or who answered was somebody else."""

    code = "SH-301"


class DeadlineExceeded(LinkError):
    """The peer did not answer in time."""

    code = "SH-302"


class LinkLost(LinkError):
    """The link went down while something was under way on it."""

    code = "SH-303"


class ReplyTooLarge(LinkError):
    """The peer answered with more than was asked for."""

    code = "SH-304"


class Refused(LinkError):
    """The peer answered with a refusal; `remote_code` is the code of its error."""

    code = "SH-305"

    def __init__(self, sentence: str, remote_code: str = "SH-000") -> None:
        super().__init__(sentence)
        self.remote_code = remote_code


@dataclass(frozen=True)
class Request:
    """A request as its handler sees it. `peer` has proved its identity; nothing else is to be believed."""

    peer: bytes
    kind: str
    body: bytes
    version: int
    link: Link
    source: str = "?"
    """Where it comes from, as far as that is known: an address that many may share. For fair shares, not for trust."""


Handler: TypeAlias = Callable[[Request], Awaitable[Body]]
"""Answers one kind of request. A ShoalError it raises reaches the caller as `Refused` with its code and sentence;
any other exception closes nothing but this request, and the caller is told that the peer failed."""


@dataclass(frozen=True)
class LinkStats:
    """What a link has measured about itself."""

    bytes_sent: int
    bytes_received: int
    round_trip_ms: float | None
    """Smoothed round trip of small requests, once one was measured."""
    rate_bps: float | None
    """Bulk rate last received, bits per second, once a bulk stream was measured."""


class Link(Protocol):
    """An authenticated connection to one peer."""

    @property
    def peer(self) -> bytes: ...

    @property
    def version(self) -> int:
        """The protocol version both sides agreed on."""
        ...

    @property
    def closed(self) -> bool: ...

    async def request(
        self, kind: str, body: bytes, *, deadline_s: float = 10.0, reply_max_bytes: int = 1 << 16
    ) -> bytes:
        """Ask and wait for a small reply.

        Raises DeadlineExceeded, Refused (the peer's own sentence), LinkLost, or ReplyTooLarge.
        """
        ...

    def stream(
        self, kind: str, body: bytes, *, stall_s: float = 10.0, max_bytes: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask and read a stream: `async with link.stream(...) as chunks: async for chunk in chunks: ...`.

        Raises like `request`; DeadlineExceeded when nothing comes for `stall_s` seconds. Leaving the block early tells
        the peer to stop.
        """
        ...

    def stats(self) -> LinkStats: ...

    async def close(self, reason: str = "closed") -> None: ...

    async def wait_closed(self) -> str:
        """Wait until the link is down; gives the reason."""
        ...


class Endpoint(Protocol):
    """One node's place on the network."""

    @property
    def node_id(self) -> bytes: ...

    @property
    def addresses(self) -> Sequence[Address]:
        """Where this endpoint accepts links; empty when it accepts none."""
        ...

    def handle(self, kind: str, handler: Handler) -> None:
        """Answer requests of `kind` with `handler`, on every link, whoever opened it."""
        ...

    def on_link(self, callback: Callable[[Link], None]) -> None:
        """Call back for every link that comes up, dialled or accepted."""
        ...

    async def listen(self, address: Address) -> Address:
        """Accept links; port 0 takes a free one. Gives the address with its real port."""
        ...

    async def dial(self, node: bytes, hints: Sequence[Address], *, deadline_s: float = 10.0) -> Link:
        """The open link to `node`, or a new one through the first hint that works. Raises Unreachable."""
        ...

    def links(self) -> Mapping[bytes, Link]:
        """Open links by peer."""
        ...

    async def close(self) -> None: ...
