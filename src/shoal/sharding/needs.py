"""What is to be placed, and on what: a model, the nodes that could hold it, and the ways between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

GATEWAY = b""
"""Stands for the gateway among the ends of a link."""


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """Memory that a model's layers ask for. `first_bytes` (embeddings) go with the first layer, `last_bytes` (final
    norm and head) with the last; where they are tied, each of the two ends holds them."""

    layers: int
    layer_bytes: int
    """Weights of one layer, of the largest if they differ."""
    cache_bytes: int
    """Cache per layer for all sessions that are to be held at once."""
    first_bytes: int = 0
    last_bytes: int = 0
    token_ms_max: float = math.inf
    """What a token of one stream may take: a replica that is slower is not placed."""

    def bytes_of(self, stage: Stage) -> int:
        held = stage.layers * (self.layer_bytes + self.cache_bytes)
        held += self.first_bytes if stage.first == 0 else 0
        return held + (self.last_bytes if stage.stop == self.layers else 0)


@dataclass(frozen=True, slots=True)
class ServingNode:
    """A node that offers to hold layers."""

    node: bytes
    name: str
    free_bytes: int
    layer_ms: float
    """One decode step through one layer, measured."""
    last_ms: float = 0.0
    """One decode step through final norm and head, measured."""
    price: int = 0
    """What it asks for an hour, in units of money."""
    survival: float = 1.0
    """Chance that it is still there an hour from now."""

    @property
    def usable(self) -> bool:
        return (
            self.free_bytes > 0
            and 0 < self.layer_ms < math.inf
            and 0 <= self.last_ms < math.inf
            and self.price >= 0
            and 0 < self.survival <= 1
        )


@dataclass(frozen=True, slots=True)
class Links:
    """One-way times in milliseconds between two nodes, or a node and the GATEWAY. What was measured in one direction
    only counts for both; a pair that was not measured cannot be neighbours in a ring."""

    one_way_ms: Mapping[tuple[bytes, bytes], float] = field(default_factory=dict)

    def ms(self, source: bytes, target: bytes) -> float:
        found = self.one_way_ms.get((source, target), self.one_way_ms.get((target, source), math.inf))
        return found if found >= 0 else math.inf


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `first` to `stop` - 1 of a model on a node."""

    node: bytes
    first: int
    stop: int

    @property
    def layers(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True, slots=True)
class Replica:
    """All layers of a model, on one node or on several in a row. The token goes from the gateway through the stages
    and back to the gateway: a ring."""

    stages: tuple[Stage, ...]
    token_ms: float
    """Time per token of one stream, without speculation: computing and the ring's crossings."""
    rate: float
    """Tokens per second of one stream, less the time in which the replica is expected to be broken."""
    price: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    node: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Who holds which layers, and why not the others."""

    replicas: tuple[Replica, ...]
    """The fastest first."""
    left_out: tuple[LeftOut, ...]
    reason: str

    @property
    def rate(self) -> float:
        return math.fsum(replica.rate for replica in self.replicas)

    @property
    def price(self) -> int:
        return sum(replica.price for replica in self.replicas)
