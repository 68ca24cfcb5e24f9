"""What things cost, as it is offered. Money that moves is in `money`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Currency = Annotated[str, Meta(pattern=r"\A[A-Z][A-Z0-9]{1,11}\Z")]
"""ISO 4217, or as the ledger that keeps it calls it."""
PRICE_MAX_MICRO_PER_H = 10**12
"""A million units an hour."""
PricePerHour = Annotated[int, Meta(ge=0, le=PRICE_MAX_MICRO_PER_H)]


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an hour of a node costs. It is owed for the time in which it works, not for whole hours."""

    micro_per_h: PricePerHour
    currency: Currency = "USD"
