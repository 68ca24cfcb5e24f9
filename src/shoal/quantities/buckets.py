"""A token bucket: so much at once, and so much a second thereafter. Moments are given, in seconds that only grow."""

from __future__ import annotations

from dataclasses import dataclass, replace

ROUNDING = 1e-9
"""Part of a bucket that may be missing of what it should hold after a wait."""


@dataclass(frozen=True, slots=True)
class Bucket:
    size: float
    """What fits in."""
    per_s: float
    level: float
    at: float
    """When `level` was in it, in seconds."""

    @classmethod
    def full(cls, size: float, per_s: float, now: float) -> Bucket:
        return cls(size, per_s, size, now)

    def seen(self, now: float) -> Bucket:
        """As it is at `now`."""
        flowed = max(0.0, now - self.at) * self.per_s
        return replace(self, level=min(self.size, self.level + flowed), at=max(now, self.at))

    def less(self, amount: float) -> Bucket:
        """With so much taken out; whoever takes more than is there owes it."""
        return replace(self, level=self.level - amount)

    def more(self, amount: float) -> Bucket:
        """With so much given back."""
        return replace(self, level=min(self.size, self.level + amount))

    def wait_s(self, amount: float) -> float:
        """Seconds from `at` until `amount` is in it, 0 when it is; what is larger than the bucket never is."""
        if amount > self.size:
            return float("inf")
        missing = amount - self.level
        return missing / self.per_s if missing > ROUNDING * self.size else 0.0
