"""From which shared state a joiner begins: one that every member still has on disk, so that it comes from several
peers; the Commits since are caught up with."""

OFFERED_EVERY = 8
"""Writing and hashing a state is a noticeable part of a small model's round; catching up is little."""
OFFERED_MAX_BYTES = 256 << 20
"""Larger shared states are not written while the job runs; joiners then take the newest from the driver."""


def is_offered(round_number: int, state_bytes: int) -> bool:
    """Whether members keep the state that this round's Commit names for joiners."""
    return state_bytes <= OFFERED_MAX_BYTES and round_number % OFFERED_EVERY == 0
