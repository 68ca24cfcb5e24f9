"""Which of two offers by one node counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shoal.errors import BadRecord
from shoal.identity import short_id


class StaleOffer(BadRecord):
    """An offer's sequence is not above the one already known from the same node."""

    code = "SH-240"


@dataclass(frozen=True)
class Stamp:
    """What decides between offers: whose, which number, and the id of the signed record."""

    node: bytes
    sequence: int
    record_id: bytes


class Standing(Enum):
    """How a new offer stands to the one held."""

    NEWER = "newer"
    SAME = "same"
    OLDER = "older"
    CONFLICT = "conflict"


def compare(held: Stamp | None, new: Stamp) -> tuple[Standing, str]:
    """How `new` stands to what is held of the same node, with the reason in words.

    Sequences alone decide: no clock is read, so a node whose clock is an hour off is served like any other. Two
    records with one sequence that are not the same record mean that two processes sign with one key (or that one
    went back to an old state); neither may replace the other, or what others saw would depend on the order of arrival.
    """
    who = short_id(new.node)
    if held is None:
        return Standing.NEWER, f"Offer {new.sequence} of node {who} is the first known."
    if new.sequence > held.sequence:
        return Standing.NEWER, f"Offer {new.sequence} of node {who} replaces {held.sequence}."
    if new.sequence < held.sequence:
        return Standing.OLDER, (
            f"Offer {new.sequence} of node {who} was refused: offer {held.sequence} of the same node is known and is "
            f"newer. {_advice(held)}"
        )
    if new.record_id == held.record_id:
        return Standing.SAME, f"Offer {new.sequence} of node {who} is the one already known ({held.sequence})."
    return Standing.CONFLICT, (
        f"Offer {new.sequence} of node {who} was refused: another offer with sequence {held.sequence} is known of the "
        f"same node. {_advice(held)}"
    )


def _advice(held: Stamp) -> str:
    return (
        f"Publish with a sequence above {held.sequence}; if that one was not yours, another node runs with a copy of "
        "your key file: give each node its own."
    )
