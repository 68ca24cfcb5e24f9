"""Offers in columns, so that a hundred thousand of them are looked through in milliseconds.

A row is a device of an offer: what is asked of a device must be met by one device together. Devices of one offer that
are alike share a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from shoal.market.coordinates import DIMENSIONS, Coordinate
from shoal.market.filters import best_flops
from shoal.market.reputation import NEW
from shoal.protocol.money import ledger_text
from shoal.protocol.offers import Offer, Tier

T = TypeVar("T", bound=np.generic)
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]
ROWS_FIRST = 256
TIERS: tuple[str, ...] = get_args(Tier)
NUMBERS = (
    "memory_bytes", "flops", "memory_bytes_per_s", "bandwidth_bytes_per_s", "latency_ms", "price_micro_per_h",
    "height_ms", "reputation", "reclaim_notice_ms",
)  # fmt: skip
WORKS = ("train", "serve", "engine", "run")
"""Kinds of work that many nodes take."""
TEXTS = ("kind", "device", "country", "region", "currency", "ledger")
NO_LEDGER = "none"
"""Of a node that has a price and no ledger: nobody can pay it."""


@dataclass(frozen=True)
class Listing:
    """An offer, and what is known of its node from elsewhere."""

    node: bytes
    offer: Offer
    latency_ms: float | None = None
    """There and back to whoever asks; None where it was not measured."""
    reputation: float = NEW
    """With whoever asks."""


class Texts:
    """A column of texts, by number: there are few different ones, and each is looked at once."""

    def __init__(self) -> None:
        self._numbers = {"": 0}
        self.rows: NDArray[np.int32] = np.zeros(ROWS_FIRST, dtype=np.int32)

    def put(self, row: int, text: str) -> None:
        if len(self._numbers) >= 2 * len(self.rows):
            self._forget()
        self.rows[row] = self._numbers.setdefault(text, len(self._numbers))

    def _forget(self) -> None:
        """Texts that stand nowhere any more."""
        used, rows = np.unique(self.rows, return_inverse=True)
        texts = list(self._numbers)
        self._numbers = {texts[number]: at for at, number in enumerate(used)}
        self.rows = rows.astype(np.int32)

    def among(self, texts: Iterable[str], stop: int) -> Mask:
        """Which rows have one of these."""
        table = np.zeros(len(self._numbers) + 1, dtype=bool)
        table[[self._numbers[text] for text in texts if text in self._numbers]] = True
        return table[self.rows[:stop]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)


def _paid_at(offer: Offer) -> str:
    """Where a node is paid, as a column has it; empty where it is free."""
    if offer.price is None or not offer.price.micro_per_h:
        return ""
    return ledger_text(offer.ledger) if offer.ledger is not None else NO_LEDGER


def twice(column: NDArray[T]) -> NDArray[T]:
    return np.concatenate([column, np.zeros_like(column)])


class Board:
    """The offers that are live, at most one of each node."""

    def __init__(self) -> None:
        self._rows_of: dict[bytes, list[int]] = {}
        self._listings: list[Listing | None] = [None] * ROWS_FIRST
        self._free: list[int] = []
        self._stop = 0
        self._live = np.zeros(ROWS_FIRST, dtype=bool)
        self._busy = np.zeros(ROWS_FIRST, dtype=bool)
        self._tier = np.zeros(ROWS_FIRST, dtype=np.int8)
        self._owner = np.zeros(ROWS_FIRST, dtype=np.int64)
        self._position = np.zeros((ROWS_FIRST, DIMENSIONS))
        self._works = {kind: np.zeros(ROWS_FIRST, dtype=bool) for kind in WORKS}
        self._other_work: dict[str, set[int]] = {}
        """Of a few nodes each, such as those of somebody's own loop."""
        self._numbers = {name: np.zeros(ROWS_FIRST) for name in NUMBERS}
        self._texts = {name: Texts() for name in TEXTS}

    def __len__(self) -> int:
        """How many nodes have an offer here."""
        return len(self._rows_of)

    def put(self, listing: Listing) -> None:
        """Instead of what the node offered before. Which of two offers counts is `compare`'s to say."""
        self.remove(listing.node)
        offer, rows = listing.offer, []
        seen = set()
        for device in offer.capability.devices:
            alike = (device.kind, device.name, device.memory_bytes, best_flops(device), device.memory_bytes_per_s)
            if alike in seen:
                continue
            seen.add(alike)
            row = self._row()
            rows.append(row)
            self._listings[row] = listing
            self._live[row], self._busy[row] = True, offer.busy
            self._tier[row], self._owner[row] = TIERS.index(offer.tier), rows[0]
            at = Coordinate.of(offer)
            self._position[row] = at.position_ms
            price, place = offer.price, offer.place
            numbers = (
                device.memory_bytes, best_flops(device), device.memory_bytes_per_s,
                offer.capability.hub_rate_bps / 8, np.inf if listing.latency_ms is None else listing.latency_ms,
                price.micro_per_h if price else 0, at.height_ms, listing.reputation,
                offer.reclaim_notice_ms,
            )  # fmt: skip
            for name, number in zip(NUMBERS, numbers, strict=True):
                self._numbers[name][row] = number
            texts = (
                device.kind, device.name, (place and place.country) or "", (place and place.region) or "",
                price.currency if price and price.micro_per_h else "", _paid_at(offer),
            )  # fmt: skip
            for name, text in zip(TEXTS, texts, strict=True):
                self._texts[name].put(row, text)
            for kind in offer.accepts:
                if kind in WORKS:
                    self._works[kind][row] = True
                else:
                    self._other_work.setdefault(kind, set()).add(row)
        self._rows_of[listing.node] = rows

    def remove(self, node: bytes) -> None:
        for row in self._rows_of.pop(node, ()):
            for kind in set(self.listing(row).offer.accepts):
                if kind in WORKS:
                    self._works[kind][row] = False
                else:
                    self._other_work[kind].discard(row)
                    if not self._other_work[kind]:
                        del self._other_work[kind]
            self._listings[row] = None
            self._live[row] = False
            self._free.append(row)

    def _row(self) -> int:
        if self._free:
            return self._free.pop()
        if self._stop == len(self._live):
            self._grow()
        self._stop += 1
        return self._stop - 1

    def _grow(self) -> None:
        self._listings += [None] * len(self._live)
        self._live, self._busy, self._tier = twice(self._live), twice(self._busy), twice(self._tier)
        self._position, self._owner = twice(self._position), twice(self._owner)
        self._works = {kind: twice(column) for kind, column in self._works.items()}
        self._numbers = {name: twice(column) for name, column in self._numbers.items()}
        for texts in self._texts.values():
            texts.rows = twice(texts.rows)

    # --- columns -----------------------------------------------------------------------------------------------------

    def listing(self, row: int) -> Listing:
        found = self._listings[row]
        assert found is not None
        return found

    def number(self, name: str) -> NDArray[np.float64]:
        """One of NUMBERS; prices are whole, and exact up to 2**53."""
        return self._numbers[name][: self._stop]

    def texts(self, name: str) -> Texts:
        return self._texts[name]

    def among(self, name: str, texts: Iterable[str]) -> Mask:
        return self._texts[name].among(texts, self._stop)

    def commonest(self, name: str, rows: Mask) -> str | None:
        """The text that most nodes of these rows have, of texts that are the same in all rows of a node; None where
        none has any that means something."""
        texts, stop = list(self._texts[name]), max(1, self._stop)
        nodes = np.unique(self._texts[name].rows[: self._stop][rows] * np.int64(stop) + self.owner[rows])
        counts = np.bincount(nodes // stop, minlength=len(texts))
        for nothing in ("", NO_LEDGER):
            if nothing in texts:
                counts[texts.index(nothing)] = 0
        most = int(counts.argmax())
        return texts[most] if counts[most] else None

    @property
    def position_ms(self) -> NDArray[np.float64]:
        return self._position[: self._stop]

    @property
    def owner(self) -> Rows:
        """The first row of each row's node."""
        return self._owner[: self._stop]

    def fastest(self, rows: Rows) -> Rows:
        """Of each node that these rows are of, the one of its fastest device; of equal ones the first."""
        owners = self.owner[rows]
        order = np.lexsort((-self.number("flops")[rows], owners))
        first: Mask = np.diff(owners[order], prepend=-1) != 0
        return rows[order][first]

    def nodes_in(self, rows: Mask) -> int:
        """How many different nodes these rows are of."""
        theirs = np.zeros(self._stop, dtype=bool)
        theirs[self.owner[rows]] = True
        return int(theirs.sum())

    @property
    def tier(self) -> NDArray[np.int8]:
        """Places in TIERS."""
        return self._tier[: self._stop]

    def open_to(self, accepts: str | None, *, idle_only: bool) -> Mask:
        """Rows of live offers that take such work."""
        found = self._live[: self._stop].copy()
        if accepts is not None and accepts in WORKS:
            found &= self._works[accepts][: self._stop]
        elif accepts is not None:
            among = np.zeros(self._stop, dtype=bool)
            among[list(self._other_work.get(accepts, ()))] = True
            found &= among
        if idle_only:
            found &= ~self._busy[: self._stop]
        return found
