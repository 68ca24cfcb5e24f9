"""What nodes offer, and how a hub is asked about it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from shoal.identity import NodeId
from shoal.protocol.messages import Message, Record
from shoal.protocol.money import LedgerName
from shoal.protocol.prices import Price

Name = Annotated[str, Meta(min_length=1, max_length=48, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
ModelName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[!-~]+$")]
"""As servers name their models: printable ASCII without spaces, for example `org/model-8B` or a file's path."""
AddressText = Annotated[str, Meta(max_length=128)]
Positive = Annotated[float, Meta(ge=0, le=1e18)]
UnixMs = Annotated[int, Meta(ge=0, le=1 << 53)]

Country = Annotated[str, Meta(pattern=r"\A[A-Z]{2}\Z")]
"""ISO 3166-1 alpha-2, for example `DE`."""
Region = Annotated[str, Meta(pattern=r"\A[a-z][a-z0-9-]{0,31}\Z")]
"""As owners name them, for example `europe-west`."""
Tier = Literal["open", "sandboxed", "attested"]
"""How a node keeps what it is given apart from its owner: not at all, in a sandbox, in hardware that proves it. Each is
better than the one before."""

RECLAIM_NOTICE_MAX_MS = 3_600_000
ReclaimNoticeMs = Annotated[int, Meta(ge=0, le=RECLAIM_NOTICE_MAX_MS)]
"""How long beforehand an owner says that a machine is taken back from those who have paid for a place on it."""

OFFER_LIFETIME_MAX_MS = 24 * 3600 * 1000
FOUND_MAX = 256
"""A hub names at most this many offers in one answer; `after` asks for the next ones."""


class Throughput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Measured matrix multiplication."""

    dtype: Annotated[str, Meta(max_length=16)]
    flops: Positive
    """Floating point operations per second, measured on square matrices."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One measured device of a node."""

    kind: Annotated[str, Meta(max_length=16)]
    """`cuda`, `rocm`, `mps`, `xpu` or `cpu`."""
    name: Annotated[str, Meta(max_length=96)]
    memory_bytes: Annotated[int, Meta(ge=0)]
    memory_bytes_per_s: Positive
    throughput: Annotated[tuple[Throughput, ...], Meta(max_length=8)]
    threads: Annotated[int, Meta(ge=0, le=4096)] = 0


class Capability(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a node measurably can do, with its speed limit already in force."""

    devices: Annotated[tuple[Device, ...], Meta(min_length=1, max_length=64)]
    """The one that the node computes on first."""
    speed_limit: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """The share of time its owner lets it compute; figures above already include it."""
    disk_free_bytes: Annotated[int, Meta(ge=0)] = 0
    disk_write_bytes_per_s: Positive = 0.0
    hub_round_trip_ms: Positive = 0.0
    hub_rate_bps: Positive = 0.0
    software: Annotated[str, Meta(max_length=128)] = ""


class EngineOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole replica that a node has beside it, in a server of its own, as the node found it."""

    model: ModelName
    takes_tokens: bool = False
    """Whether it takes a prompt as token ids; else as text."""
    gives_tokens: bool = False
    """Whether it says the ids of the tokens that it chose, beside their text."""
    token_ms: Positive = 0.0
    """What a token of one stream took when it was tried."""


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a node stands, as its owner says."""

    country: Country | None = None
    region: Region | None = None


CoordinateMs = Annotated[float, Meta(ge=-1e5, le=1e5)]


class NetworkCoordinate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a node has found itself to be in a space in which distance is round-trip time (`market.coordinates`)."""

    position_ms: tuple[CoordinateMs, CoordinateMs, CoordinateMs]
    height_ms: Annotated[float, Meta(ge=0, le=6e4)]
    error: Annotated[float, Meta(ge=0, le=2)]
    """What a distance is off, in parts of it, about."""


class Offer(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A node's signed word about itself: what it measured, where it can be dialled, and until when this holds.

    Of two offers by one node the one with the higher sequence counts, whatever its clock said.
    """

    KIND: ClassVar[str] = "offer"
    MAX_BYTES: ClassVar[int] = 16 * 1024

    name: Name
    sequence: Annotated[int, Meta(ge=0, le=1 << 53)]
    issued_ms: UnixMs
    lifetime_ms: Annotated[int, Meta(ge=1000, le=OFFER_LIFETIME_MAX_MS)]
    """The hub counts it from the moment the offer arrived, on its own clock."""
    addresses: Annotated[tuple[AddressText, ...], Meta(max_length=8)] = ()
    capability: Capability
    accepts: Annotated[tuple[Annotated[str, Meta(max_length=16)], ...], Meta(max_length=8)] = ("train",)
    busy: bool = False
    engine: EngineOffer | None = None
    """None also while its server does not answer."""
    place: Place | None = None
    coordinate: NetworkCoordinate | None = None
    """None while it has measured nobody."""
    price: Price | None = None
    """None: for nothing."""
    ledger: LedgerName | None = None
    """Where it is paid; what costs something is sold at a ledger alone."""
    serves_free: bool = False
    """Whatever its price, it serves for nothing."""
    slots: Annotated[int, Meta(ge=1, le=64)] = 1
    """Pieces of work that it does at a time: a Hold keeps one of them."""
    reclaim_notice_ms: ReclaimNoticeMs = 0
    """What each of its Holds names, too."""
    tier: Tier = "open"
    driving_micro_per_h: Annotated[int, Meta(ge=0)] | None = None
    """What it asks for driving a job, in the currency of `price`; None where it drives none for others."""


class OfferPublish(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `offer.publish`: keep this offer. The reply is OfferKept, sent once it is durable."""

    KIND: ClassVar[str] = "offer.publish"
    MAX_BYTES: ClassVar[int] = 20 * 1024

    offer: Annotated[bytes, Meta(max_length=17 * 1024)]
    """An Envelope of an Offer."""


class OfferKept(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    sequence: int
    lifetime_ms: int


class OfferFind(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `offer.find`: live offers that fit. The reply is OffersFound."""

    KIND: ClassVar[str] = "offer.find"
    MAX_BYTES: ClassVar[int] = 4 * 1024

    accepts: Annotated[str, Meta(max_length=16)] | None = None
    device: Annotated[str, Meta(max_length=16)] | None = None
    name: Name | None = None
    node: NodeId | None = None
    memory_bytes_min: Annotated[int, Meta(ge=0)] = 0
    flops_min: Positive = 0.0
    """Of the device's best dtype."""
    idle_only: bool = False
    model: ModelName | None = None
    """Has an engine that serves it."""
    limit: Annotated[int, Meta(ge=1, le=FOUND_MAX)] = 64
    after: NodeId | None = None


class OffersFound(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = FOUND_MAX * 17 * 1024

    offers: Annotated[tuple[bytes, ...], Meta(max_length=FOUND_MAX)]
    more: bool = False


class Introduce(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `introduce`, to a hub: ask `node`, over the link it holds to you, to dial the one who asks.

    The hub sends `dial` (DialMe) to the node; the node proves itself on the link it then opens, so nothing here has
    to be believed. This is how a node that accepts no links is reached.
    """

    KIND: ClassVar[str] = "introduce"
    MAX_BYTES: ClassVar[int] = 2 * 1024

    node: NodeId
    addresses: Annotated[tuple[AddressText, ...], Meta(min_length=1, max_length=8)]


class DialMe(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    KIND: ClassVar[str] = "dial"
    MAX_BYTES: ClassVar[int] = 2 * 1024

    node: NodeId
    addresses: Annotated[tuple[AddressText, ...], Meta(min_length=1, max_length=8)]


class Done(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An empty reply: it was done."""
