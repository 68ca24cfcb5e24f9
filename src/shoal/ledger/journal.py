"""The journal of a ledger: every command that moved money, what moved, and a chain of hashes over both.

Whoever has the lines can do all of it again (`verified`): each debit follows from a signature in the journal, by rule,
so that the operator need not be believed. What an operator can still do is to stop, or to leave out what it was asked;
a `Checkpoint`, the number and the hash of a line, signed by it now and then, binds it to all that came before, and two
that name one line differently convict it (`contradiction`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord, ShoalError
from shoal.identity import Envelope, Hash, hash_of_parts, short_id
from shoal.ledger.book import Book
from shoal.ledger.commands import Command
from shoal.ledger.moves import Move
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import TIME_MAX_MS, LedgerName, LineNumber, open_checkpoint

LINE_MAX_BYTES = 256 * 1024
"""Terms with all of their payees take less."""
BEGINNING = bytes(32)
_DOMAIN = "shoal/journal/1"
_encoder = msgspec.msgpack.Encoder()


class BadJournal(BadRecord):
    """A journal is not what follows from the rules and its signatures, or not what its operator has signed."""

    code = "SH-282"


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One step of a ledger."""

    number: LineNumber
    at_ms: Annotated[int, Meta(ge=0, le=TIME_MAX_MS)]
    command: Command
    moves: tuple[Move, ...]
    previous: Hash
    """Of the line before; BEGINNING for the first."""
    hash: Hash


def line(number: int, at_ms: int, command: Command, moves: tuple[Move, ...], previous: bytes) -> Line:
    return Line(
        number=number, at_ms=at_ms, command=command, moves=moves, previous=previous,
        hash=_hash(number, at_ms, command, moves, previous),
    )  # fmt: skip


def _hash(number: int, at_ms: int, command: Command, moves: tuple[Move, ...], previous: bytes) -> bytes:
    parts = (previous, number.to_bytes(8), at_ms.to_bytes(8), _encoder.encode(command), _encoder.encode(moves))
    return hash_of_parts(_DOMAIN, parts)


def verified(
    lines: Iterable[Line], ledger: LedgerName, checkpoint: Envelope | None = None, network: str = DEFAULT_NETWORK
) -> Book:
    """Do all of a journal again, from its beginning: the book that follows. With a checkpoint, it is also the journal
    that the operator signed, and maybe more lines. Raises BadJournal, which names the line; for a checkpoint, what
    `open_checkpoint` does."""
    signed = None if checkpoint is None else open_checkpoint(checkpoint, ledger, network)
    book, previous, number = Book(ledger, network=network), BEGINNING, 0
    for number, one in enumerate(lines, start=1):
        said = f"Line {number} of the journal"
        if one.number != number or one.previous != previous:
            raise BadJournal(f"{said} does not follow the one before: lines are missing, or were put in.")
        if one.hash != _hash(one.number, one.at_ms, one.command, one.moves, one.previous):
            raise BadJournal(f"{said} has another hash than its content.")
        if one.at_ms < book.now_ms:
            raise BadJournal(f"{said} is {book.now_ms - one.at_ms} ms before the one before.")
        book.at(one.at_ms)
        try:
            moves = book.apply(one.command)
        except ShoalError as error:
            raise BadJournal(f"{said} is nothing that the rules allow: {error.sentence}") from error
        if moves != one.moves:
            raise BadJournal(f"{said} moves something else than follows from its command.")
        if signed is not None and number == signed.number and one.hash != signed.hash:
            raise BadJournal(
                f"{said} is not the one that its operator signed: its hash is {_short(one.hash)}, and "
                f"{_short(signed.hash)} in the checkpoint. It, or a line before it, was changed after that."
            )
        previous = one.hash
    if signed is not None and number < signed.number:
        raise BadJournal(f"Line {number + 1} of the journal is missing: its operator has signed {signed.number} lines.")
    return book


def contradiction(one: Envelope, other: Envelope, ledger: LedgerName, network: str = DEFAULT_NETWORK) -> str | None:
    """What two checkpoints of a ledger prove of its operator together: that it has signed two journals; None where they
    name different lines, or one line alike. Raises what `open_checkpoint` does."""
    first, second = (open_checkpoint(each, ledger, network) for each in (one, other))
    if first.number != second.number or first.hash == second.hash:
        return None
    return (
        f"The operator of this ledger, {short_id(one.signer)}, has signed two journals: the hash of line "
        f"{first.number} is {_short(first.hash)} in one of its checkpoints and {_short(second.hash)} in the other."
    )


def _short(hash: bytes) -> str:
    return hash.hex()[:12]
