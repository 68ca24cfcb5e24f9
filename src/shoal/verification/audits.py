"""Which Contributions are replayed, and how many have to be."""

from __future__ import annotations

from shoal.identity import hash_of_parts


def audited(secret: bytes, contribution_id: bytes, rate: float) -> bool:
    """Whether this Contribution is replayed. `secret` is the driver's own (32 bytes): as the id covers everything that
    the member committed to, nobody can know the answer before it is bound, and a member cannot try Contributions
    until one is spared."""
    if rate <= 0:
        return False
    draw = int.from_bytes(hash_of_parts("audit draw 1", (secret, contribution_id))[:8], "big")
    return draw < rate * 2.0**64


def secret_commitment(secret: bytes) -> bytes:
    """What the driver may publish beforehand, so that it can show later that it did not choose its victims."""
    return hash_of_parts("audit secret 1", (secret,))


def rate_needed(gain: float, loss: float, power: float) -> float:
    """The smallest audit rate at which cheating does not pay, between 0 and 1; above 1 when none does.

    A cheat earns `gain` (the cost it saves) when not found, and loses `loss` (withheld pay, bond, the work it is no
    longer given) when found; a replay finds it with probability `power`. With rate q the expected profit of a cheat is
    (1 - q * power) * gain - q * power * loss, which is negative for q > gain / (power * (gain + loss)).
    """
    if gain <= 0:
        return 0.0
    if power <= 0 or gain + loss <= 0:
        return float("inf")
    return gain / (power * (gain + loss))
