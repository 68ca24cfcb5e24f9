"""The journal of a ledger: every command that moved money, what moved, and a chain of hashes over both.

Whoever has the lines can do all of it again (`verified`): each debit follows from a signature in the journal, by rule,
so that the operator need not be believed. What an operator can still do is to stop, or to show an older journal; the
last hash, signed by it now and then, binds it to all that came before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord, ShoalError
from shoal.identity import Hash, hash_of_parts
from shoal.ledger.book import Book
from shoal.ledger.commands import Command
from shoal.ledger.moves import Move
from shoal.protocol.money import TIME_MAX_MS, LedgerName

LINE_MAX_BYTES = 256 * 1024
"""Terms with all of their payees take less."""
BEGINNING = bytes(32)
_DOMAIN = "shoal/journal/1"
_encoder = msgspec.msgpack.Encoder()


class BadJournal(BadRecord):
    """A journal is not what follows from the rules and its signatures."""

    code = "SH-282"


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One step of a ledger."""

    number: Annotated[int, Meta(ge=1, le=(1 << 62))]
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


def verified(lines: Iterable[Line], ledger: LedgerName) -> Book:
    """Do all of a journal again, from its beginning: the book that follows. Raises BadJournal, which names the line."""
    book, previous = Book(ledger), BEGINNING
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
        previous = one.hash
    return book
