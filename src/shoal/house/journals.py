"""A journal in a file, and whether it is the history that its operator has signed before.

The file is JSON, one document a line: first which ledger it is of, with the checkpoint that its operator signed when it
was written; then the lines, bytes in base64.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import IO

import msgspec

from shoal.errors import BadInput, BadRecord
from shoal.identity import Envelope
from shoal.ledger.book import Book
from shoal.ledger.journal import BadJournal, Line, contradiction, verified
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.money import Checkpoint, HouseLedger, open_checkpoint

TEXT_MAX_BYTES = 4 << 20
"""Of one line of a file."""
FILE_MAX_BYTES = 64 << 30
"""Of a journal that is fetched: an operator may send lines for ever."""
_encode = msgspec.json.Encoder().encode
_line = msgspec.json.Decoder(Line)


class NoJournal(BadInput):
    """A file is not a journal that was exported."""

    code = "SH-137"


class HistoryChanged(BadRecord):
    """A journal is another one than its operator has signed before."""

    code = "SH-288"


class JournalOf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the first line of a file says."""

    ledger: HouseLedger
    checkpoint: bytes | None
    """An Envelope of a Checkpoint; None where the journal has no line."""

    @property
    def signed(self) -> Envelope | None:
        """Raises BadEnvelope."""
        return None if self.checkpoint is None else Envelope.from_bytes(self.checkpoint, Checkpoint.MAX_BYTES)


async def write_journal(
    file: IO[bytes], ledger: HouseLedger, checkpoint: Envelope | None, lines: AsyncIterator[Line]
) -> int:
    """How many lines there were. Raises BadRecord beyond FILE_MAX_BYTES, and what `lines` does."""
    head = JournalOf(ledger, None if checkpoint is None else checkpoint.to_bytes())
    file.write(_encode(head) + b"\n")
    count = 0
    async for one in lines:
        file.write(_encode(one) + b"\n")
        count += 1
        if file.tell() > FILE_MAX_BYTES:
            raise BadRecord(f"After {count} lines this journal has no end; it takes more than {FILE_MAX_BYTES} bytes.")
    file.flush()
    return count


def read_journal(file: IO[bytes], name: str) -> tuple[JournalOf, Iterator[Line]]:
    """`name` is what the file is called in sentences. Raises NoJournal, at once and for every line; BadJournal for a
    checkpoint that its operator has not signed."""
    try:
        head = msgspec.json.decode(_text(file, name, 1), type=JournalOf)
    except msgspec.DecodeError as error:
        raise NoJournal(
            f"{name} is no journal: its first line does not name a ledger ({error}). `shoal account export` writes one."
        ) from error
    try:
        if head.signed is not None:
            open_checkpoint(head.signed, head.ledger)
    except BadRecord as error:
        raise BadJournal(
            f"The checkpoint in the first line of {name} is not one that its operator has signed: {error}"
        ) from error
    return head, _read_lines(file, name)


def _read_lines(file: IO[bytes], name: str) -> Iterator[Line]:
    number = 2
    while text := _text(file, name, number):
        try:
            yield _line.decode(text)
        except msgspec.DecodeError as error:
            raise NoJournal(f"Line {number} of {name} is none of a journal: {error}.") from error
        number += 1


def _text(file: IO[bytes], name: str, number: int) -> bytes:
    text = file.readline(TEXT_MAX_BYTES)
    if len(text) == TEXT_MAX_BYTES:
        raise NoJournal(f"Line {number} of {name} is longer than any of a journal.")
    return text


@dataclass(frozen=True)
class Checked:
    """A journal that follows from the rules and the signatures in it, and is what its operator signed."""

    lines: int
    book: Book
    as_seen: bool
    """It has the line that was signed before."""


def checked(
    lines: Iterable[Line],
    ledger: HouseLedger,
    newest: Envelope | None,
    seen: Envelope | None,
    *,
    of_now: bool,
    network: str = DEFAULT_NETWORK,
) -> Checked:
    """`newest` is the checkpoint that came with the journal, `seen` one that was kept from another time: an earlier one
    where the journal is `of_now`, so that its line must be there. Raises what `verified` does, and HistoryChanged."""
    if newest is not None and seen is not None:
        two_journals = contradiction(seen, newest, ledger, network)
        if two_journals is not None:
            raise HistoryChanged(two_journals)
    before = None if seen is None else open_checkpoint(seen, ledger, network)
    count, found = 0, b""

    def noted() -> Iterator[Line]:
        nonlocal count, found
        for one in lines:
            count += 1
            if before is not None and one.number == before.number:
                found = one.hash
            yield one

    book = verified(noted(), ledger, newest, network)
    if before is not None and found != before.hash and (found or of_now):
        what = f"has another line {before.number}" if found else f"ends at line {count}"
        raise HistoryChanged(
            f"The operator of this ledger has changed its history: it signed line {before.number} with the hash "
            f"{before.hash.hex()[:12]} before, and its journal {what} now."
        )
    return Checked(count, book, bool(found))
