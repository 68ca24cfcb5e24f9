"""What somebody asks of nodes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from shoal.market.reputation import NEW, REPUTATION_LEAST
from shoal.protocol.money import LedgerName
from shoal.protocol.offers import Country, ReclaimNoticeMs, Region, Tier
from shoal.protocol.prices import Currency, PricePerHour
from shoal.quantities import format_count

DeviceKind: TypeAlias = Literal["any", "cpu", "cuda", "rocm", "mps", "xpu"]
LIST_MAX = 64
ALTERNATIVES_MAX = 16
SIZE_MAX = 1 << 50
ROUNDING = 1e-9
"""Added up in another order it is another sum."""

Bytes = Annotated[int, Meta(ge=0, le=SIZE_MAX)]
BytesPerS = Annotated[float, Meta(ge=0, le=1e18, extra={"quantity": "bytes_per_s"})]
Milliseconds = Annotated[float, Meta(gt=0, le=60_000)]
MaximumPrice = Annotated[PricePerHour, Meta(extra={"quantity": "price"})]


class Requirements(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a node must have. What is asked of a device must be met by one device of the node together."""

    device: DeviceKind = "any"
    """The kind of device."""
    device_name: Annotated[str, Meta(max_length=96)] = ""
    """A part of the device's name, such as `4090`; capitals do not matter."""
    memory_min_bytes: Bytes = 0
    """Memory that a node's device must have."""
    flops_min: Annotated[float, Meta(ge=0, le=1e18, extra={"quantity": "count"})] = 0.0
    """Floating point operations per second that the device was measured at, in its fastest dtype."""
    memory_rate_min: BytesPerS = 0.0
    """What the device was measured to read from its memory."""
    bandwidth_min: BytesPerS = 0.0
    """What the node measured between itself and its hub."""
    latency_max_ms: Milliseconds | None = None
    """There and back between the node and whoever asks."""
    countries: Annotated[tuple[Country, ...], Meta(max_length=LIST_MAX)] = ()
    """Only in these, such as [DE, NL]; where a node is, its owner says."""
    countries_without: Annotated[tuple[Country, ...], Meta(max_length=LIST_MAX)] = ()
    """In none of these; nor a node that does not say where it is."""
    regions: Annotated[tuple[Region, ...], Meta(max_length=LIST_MAX)] = ()
    """Only in these, as owners name them."""
    regions_without: Annotated[tuple[Region, ...], Meta(max_length=LIST_MAX)] = ()
    """In none of these; nor a node that does not say where it is."""
    tier: Tier = "open"
    """What must keep the work apart from the node's owner: `open`, `sandboxed` or `attested`."""
    reputation_min: Annotated[float, Meta(ge=0, le=1)] = REPUTATION_LEAST
    """From 0 to 1: how a node has kept its word in your own earlier jobs; 0.5 for one that had no part in any. Those
    that were found lying are below the default."""
    notice_min_ms: ReclaimNoticeMs = 0
    """How long beforehand an owner who wants a node back has to say so; what is free promises none."""
    price_max: MaximumPrice | None = None
    """What a node may cost, such as 0.35/h."""
    currency: Currency | None = None
    """Of prices; a node that is priced in another one is then not taken. Without it, USD where price_max is asked for,
    else any. A node that is free is free in all."""


@dataclass(frozen=True)
class Means:
    """What whoever asks can pay with."""

    ledger: LedgerName | None = None
    """Where it has money; None: nowhere, so that only what is free will do."""


@dataclass(frozen=True)
class Wish:
    """Requirements, of which a part may be met in one of several ways."""

    each: Requirements = field(default_factory=Requirements)
    any_of: tuple[Requirements, ...] = ()
    """At least one of these must be met, too; none: nothing more is asked."""
    means: Means | None = None
    """None: whoever asks only looks."""
    seen: Mapping[bytes, float] = field(default_factory=dict)
    """NodeId -> what whoever asks thinks of it (`reputation`); the others are new."""

    def reputation_of(self, node: bytes) -> float:
        return self.seen.get(node, NEW)

    @property
    def asks_for_latency(self) -> bool:
        return any(one.latency_max_ms is not None for one in (self.each, *self.any_of))


@dataclass(frozen=True)
class Needed:
    """How much of what fits is enough."""

    nodes: int = 1
    flops: float = 0.0
    """FLOP/s that they were measured at together, each its fastest device that fits: any mix of nodes that has them."""

    def met_by(self, flops: Collection[float]) -> bool:
        """Of nodes that have so many each."""
        return len(flops) >= self.nodes and math.fsum(flops) >= self.flops * (1 - ROUNDING)

    def fewest(self, flops: Collection[float]) -> int:
        """How many of these nodes are enough at least; all where they are not."""
        some: list[float] = []
        for one in sorted(flops, reverse=True):
            if self.met_by(some):
                break
            some.append(one)
        return len(some)

    def __str__(self) -> str:
        return nodes_text(self.nodes) + (f" with {flops_text(self.flops)} together" if self.flops else "")

    def so_far(self, flops: Collection[float]) -> str:
        """As one reads it: `1 of 2 nodes`, `3 nodes with 110.0 TFLOP/s of 200.0 TFLOP/s together`."""
        count = len(flops)
        if not self.flops:
            return f"{count} of {nodes_text(self.nodes)}"
        has, of = flops_text(math.fsum(flops)), flops_text(self.flops)
        said = f"{count} of {nodes_text(self.nodes)}" if count < self.nodes else nodes_text(count)
        return f"{said} with {has} of {of} together"


def nodes_text(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def flops_text(value: float) -> str:
    return f"{format_count(value)}FLOP/s"


ANYTHING = Wish()
USUAL_CURRENCY = "USD"
