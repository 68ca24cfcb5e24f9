"""How a hub is named for people, and what it says about itself."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from shoal.errors import BadInput
from shoal.identity import NodeId, node_id_from_hex
from shoal.protocol.messages import Message
from shoal.protocol.offers import AddressText, Name

TICKET_CHARS_MAX = 1024
TICKET_ADDRESSES_MAX = 8


class BadTicket(BadInput):
    """A text is not the ticket of a hub, a ledger or an auction."""

    code = "SH-112"


class HubTicket(msgspec.Struct, frozen=True):
    """Who a hub is and where to try it, written `shoal://<64 hexadecimal digits>@host:port[,host:port...]`.

    The NodeId is what is trusted; whoever answers at an address must prove to be it.
    """

    node: NodeId
    addresses: tuple[str, ...]
    """`tcp://host:port` each, at least one."""

    @classmethod
    def parse(cls, text: str) -> HubTicket:
        """Text -> ticket. Raises BadTicket with what is wrong in it."""
        expected = "a hub's ticket looks like shoal://<64 hexadecimal digits>@host:port; the hub prints it at its start"
        return cls(*who_and_where(text.strip().rstrip("/"), "shoal://", "hub", expected))

    def __str__(self) -> str:
        return f"shoal://{self.node.hex()}@{','.join(address.removeprefix('tcp://') for address in self.addresses)}"


def who_and_where(text: str, scheme: str, what: str, expected: str) -> tuple[NodeId, tuple[str, ...]]:
    """`SCHEME<NodeId>@host:port[,host:port...]` -> the NodeId and the addresses. Raises BadTicket; `expected` says how
    the ticket of such a `what` looks."""
    shown = repr(text if len(text) <= 120 else text[:117] + "...")
    if len(text) > TICKET_CHARS_MAX:
        raise BadTicket(f"{shown} is too long: {expected}.")
    if not text.startswith(scheme):
        raise BadTicket(f"{shown} does not begin with {scheme}; {expected}.")
    identity, at, places = text.removeprefix(scheme).partition("@")
    if not at:
        raise BadTicket(f"{shown} has no '@' between the {what}'s NodeId and its address; {expected}.")
    try:
        node = node_id_from_hex(identity)
    except BadInput as error:
        raise BadTicket(f"{shown} does not name a {what}: {error} {expected[0].upper()}{expected[1:]}.") from error
    hosts = places.split(",")
    if len(hosts) > TICKET_ADDRESSES_MAX:
        raise BadTicket(f"{shown} has {len(hosts)} addresses; at most {TICKET_ADDRESSES_MAX} may stand there.")
    for host in hosts:
        _refuse_bad_host(host, shown, expected)
    return node, tuple(f"tcp://{host}" for host in hosts)


_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%a-z]{2,64}\]|[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})\Z")


def _refuse_bad_host(host: str, shown: str, expected: str) -> None:
    match = _HOST.match(host)
    if match is None:
        raise BadTicket(f"{host!r} in {shown} is not host:port (IPv6 stands in brackets); {expected}.")
    if not 1 <= int(match[1]) <= 65535:
        raise BadTicket(f"{host!r} in {shown} has no port between 1 and 65535.")


class AskHub(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `hub.info`: who are you, and how many do you know? The reply is HubInfo."""

    KIND: ClassVar[str] = "hub.info"
    MAX_BYTES: ClassVar[int] = 64


PROBE_BYTES_MAX = 256 * 1024


class ProbeHub(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `hub.probe`: take these bytes and say Done, so that I can measure the way to you."""

    KIND: ClassVar[str] = "hub.probe"
    MAX_BYTES: ClassVar[int] = PROBE_BYTES_MAX + 64

    padding: Annotated[bytes, Meta(max_length=PROBE_BYTES_MAX)] = b""


class HubInfo(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A hub about itself. Nothing here is signed; it is for people and for logs."""

    MAX_BYTES: ClassVar[int] = 4 * 1024

    node: NodeId
    name: Name
    network: Annotated[str, Meta(max_length=32)]
    software: Annotated[str, Meta(max_length=64)]
    protocol_oldest: Annotated[int, Meta(ge=1, le=65535)]
    protocol_newest: Annotated[int, Meta(ge=1, le=65535)]
    addresses: Annotated[tuple[AddressText, ...], Meta(max_length=TICKET_ADDRESSES_MAX)] = ()
    offers: Annotated[int, Meta(ge=0)] = 0
    """Live offers."""
    offers_max: Annotated[int, Meta(ge=0)] = 0
    links: Annotated[int, Meta(ge=0)] = 0
    """Open links, of nodes and clients together."""
