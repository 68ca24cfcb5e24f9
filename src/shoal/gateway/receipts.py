"""Receipts: what nodes say that they did for sessions, held against what the gateway itself saw go through, and kept.

In the gateway's folder, one JSON object a line: `receipts.jsonl` has those that count, each with its signed envelope;
`disputed.jsonl` those that do not, with the reason and both figures; `missing.jsonl` stages that gave none, as a node
does that died. A file that is full is set aside under a number, and nothing is thrown away.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec

from shoal.errors import BadRecord, JobError
from shoal.gateway.service import Counts
from shoal.identity import Envelope, short_id
from shoal.inference.metering import Served
from shoal.market.earnings import served_parts
from shoal.protocol.messages import DEFAULT_NETWORK, open_record
from shoal.protocol.serving import Choosing, RequestReceipt, StagePlace
from shoal.world import Clock, DirectoryDisk, Disk, DiskLock
from shoal.world.processes import LOCK, pid_in_lock, sign_lock, unsign_lock

FILE_MAX_BYTES = 64 << 20
LINE_MAX_BYTES = 16 * 1024

_log = logging.getLogger("shoal.gateway")


class GatewayRunning(JobError):
    """Another gateway writes to the folder."""

    code = "SH-645"


class Figures(msgspec.Struct, frozen=True):
    prompt_tokens: int
    generated_tokens: int
    computed_positions: int


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """Whose part of which session. Ids are hexadecimal."""

    time_ms: int
    node: str
    name: str
    job: str
    ring: str
    session: str
    first: int
    stop: int


class Kept(Line, frozen=True, kw_only=True):
    """A receipt that counts."""

    figures: Figures
    envelope: bytes


class Disputed(Line, frozen=True, kw_only=True):
    """One that does not."""

    reason: str
    claimed: Figures | None
    """None where it could not be read."""
    seen: Figures
    envelope: bytes


class Missing(Line, frozen=True, kw_only=True):
    """A stage that was given work and gave no receipt: nothing counts."""

    seen: Figures


BOOKS: dict[type[Line], str] = {Kept: "receipts", Disputed: "disputed", Missing: "missing"}
L = TypeVar("L", bound=Line)


def judge(
    envelope: Envelope,
    place: StagePlace,
    *,
    job: bytes,
    ring: bytes,
    session: int,
    seen: Served,
    network: str = DEFAULT_NETWORK,
) -> tuple[RequestReceipt | None, str]:
    """The receipt, if it can be read, and why it does not count: empty where it does."""  # fmt: skip
    try:
        receipt = open_record(envelope, RequestReceipt, network)
    except BadRecord as error:
        return None, error.sentence
    if envelope.signer != place.node:
        return receipt, f"It is signed by {short_id(envelope.signer)}, and {short_id(place.node)} held the stage."
    if (receipt.job, receipt.ring, receipt.session) != (job, ring, session):
        return receipt, "It is of another job, ring or session than was asked for."
    if (receipt.first, receipt.stop) != (place.first, place.stop):
        held = f"{place.first} to {place.stop - 1}"
        return receipt, f"It is for layers {receipt.first} to {receipt.stop - 1}, and the stage held {held}."
    for what, claimed, went in (
        ("prompt tokens", receipt.prompt_tokens, seen.prompt),
        ("generated tokens", receipt.generated_tokens, seen.generated),
        ("positions computed", receipt.computed_positions, seen.computed),
    ):
        if claimed > went:
            return receipt, f"It claims {claimed} {what}, and {went} went through."
    return receipt, ""


class Books:
    """The files of a gateway's folder, which one process writes."""

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None],
        *,
        disk: Disk | None = None,
        file_max_bytes: int = FILE_MAX_BYTES,
    ) -> None:
        """Raises GatewayRunning, OSError."""
        self._disk, self._say, self._file_max = disk or DirectoryDisk(folder), say, file_max_bytes
        try:
            self._lock: DiskLock | None = self._disk.lock(LOCK)
        except BlockingIOError as error:
            pid = pid_in_lock(folder)
            which = "" if pid is None else f" (process {pid})"
            raise GatewayRunning(
                f"Another gateway{which} keeps its receipts in {folder}. Name another folder with --data, or stop it."
            ) from error
        sign_lock(self._disk)
        self._ends = {name: self._cut(f"{name}.jsonl") for name in BOOKS.values()}

    def close(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                unsign_lock(self._disk)
            self._lock.release()
            self._lock = None

    def add(self, line: Line) -> None:
        """Written when this returns, even if the process is killed then. A disk that refuses holds up nothing."""
        if self._lock is None:  # what came too late is another process's file now
            return
        name = BOOKS[type(line)]
        data = msgspec.json.encode(line) + b"\n"
        try:
            if self._ends[name] and self._ends[name] + len(data) > self._file_max:
                self._disk.rename(f"{name}.jsonl", f"{name}.{len(numbered(self._disk, name)) + 1:06}.jsonl")
                self._ends[name] = 0
            self._disk.write(f"{name}.jsonl", data, self._ends[name])
            self._ends[name] += len(data)
        except OSError as error:  # what was written of it is written over by the next one
            self._say(f"A receipt of {line.name or line.node[:8]} could not be written: {error.strerror}.")

    def _cut(self, file: str) -> int:
        """Take a torn last line away, as a process leaves it that is killed while it writes; gives the file's end."""
        info = self._disk.info(file)
        if info is None:
            return 0
        data = self._disk.read(file)
        end = data.rfind(b"\n") + 1
        if end < len(data):
            self._disk.write(f"{file}.new", data[:end])
            self._disk.rename(f"{file}.new", file)
            self._say(f"The last line of {self._disk.place}/{file} was torn: {len(data) - end} bytes were cut off.")
        return end


def numbered(disk: Disk, name: str) -> list[str]:
    """The full files of a book, oldest first."""
    return list(itertools.takewhile(disk.info, (f"{name}.{number:06}.jsonl" for number in itertools.count(1))))


Earned: TypeAlias = Callable[[int, int, bytes | None], None]
"""Told that stage `at` has earned so many parts of tokens more, or fewer, and by which receipt, as soon as there is
one."""


@dataclass
class Metering:
    """Judges and keeps the receipts of one job. Without books they are counted only."""

    job: bytes = b""
    books: Books | None = None
    clock: Clock | None = None
    counts: Counts = field(default_factory=Counts)
    network: str = DEFAULT_NETWORK

    def ring(
        self,
        ring: bytes,
        places: Sequence[StagePlace],
        names: Sequence[str] = (),
        earned: Earned = lambda at, parts, receipt: None,
    ) -> RingMeter:
        return RingMeter(self, ring, tuple(places), tuple(names) or ("",) * len(places), earned)

    def keep(self, line: Line) -> None:
        if isinstance(line, Kept):
            self.counts.receipts += 1
        elif isinstance(line, Disputed):
            self.counts.receipts_disputed += 1
            _log.warning("A receipt of %s does not count: %s", line.name or line.node[:8], line.reason)
        else:
            self.counts.receipts_missing += 1
        if self.books is not None:
            self.books.add(line)


@dataclass
class SessionMeter:
    """What of one session went into a ring, and what came back."""

    sent: Served = field(default_factory=Served)
    came: Served = field(default_factory=Served)

    @property
    def parts(self) -> int:
        """Of tokens, that came back: all stages have computed them."""
        return served_parts(self.came.generated, self.came.computed)


@dataclass
class RingMeter:
    """What goes through one ring, by session. Each session that was begun is closed, so there are as many as run.

    A stage earns by what came back, while a session runs; by its receipt, once that is there and counts; by nothing,
    where its receipt does not. Where it gave none, as when it died, what came back stays earned."""

    metering: Metering
    ring: bytes
    places: tuple[StagePlace, ...]
    names: tuple[str, ...]
    earned: Earned
    _seen: dict[int, SessionMeter] = field(default_factory=dict)

    def sent(self, session: int, start: int, positions: int, choose: int, choosing: Choosing) -> None:
        seen = self._seen.setdefault(session, SessionMeter())
        seen.sent.add(start, positions, choose, choosing.prompt_tokens)

    def came(self, session: int, start: int, positions: int, choose: int, choosing: Choosing) -> None:
        """Of a session whose receipts were asked for meanwhile, these say it."""
        seen = self._seen.get(session)
        if seen is not None:
            before = seen.parts
            seen.came.add(start, positions, choose, choosing.prompt_tokens)
            for at in range(len(self.places)):
                self.earned(at, seen.parts - before, None)

    @property
    def open(self) -> list[int]:
        """Sessions of which no receipt was asked for yet."""
        return list(self._seen)

    def close(self, session: int) -> SessionMeter | None:
        """Receipts will be asked for; None where they were, or where nothing went through."""
        return self._seen.pop(session, None)

    def heard(self, session: int, seen: SessionMeter, at: int, receipt: bytes | None) -> None:
        """What stage `at` answered: None for nothing at all, empty where it knows of no work for the session."""
        if receipt == b"":
            return
        place, clock = self.places[at], self.metering.clock
        about: dict[str, Any] = {
            "time_ms": clock.now_ms() if clock else 0, "node": place.node.hex(), "name": self.names[at],
            "job": self.metering.job.hex(), "ring": self.ring.hex(), "session": f"{session:016x}",
            "first": place.first, "stop": place.stop,
        }  # fmt: skip
        went = Figures(seen.sent.prompt, seen.sent.generated, seen.sent.computed)
        if receipt is None:
            self.metering.keep(Missing(**about, seen=went))
            return
        try:
            envelope = Envelope.from_bytes(receipt, RequestReceipt.MAX_BYTES)
        except BadRecord as error:
            claim, reason = None, error.sentence
        else:
            claim, reason = judge(
                envelope, place, job=self.metering.job, ring=self.ring, session=session, seen=seen.sent,
                network=self.metering.network,
            )  # fmt: skip
        claimed = None
        if claim is not None:
            claimed = Figures(claim.prompt_tokens, claim.generated_tokens, claim.computed_positions)
        if reason or claimed is None:
            self.earned(at, -seen.parts, None)
            self.metering.keep(Disputed(**about, reason=reason, claimed=claimed, seen=went, envelope=receipt))
        else:
            parts = served_parts(claimed.generated_tokens, claimed.computed_positions)
            self.earned(at, parts - seen.parts, envelope.record_id)
            self.metering.keep(Kept(**about, figures=claimed, envelope=receipt))


# --- reading them again ---------------------------------------------------------------------------------------------


@dataclass
class NodeAccount:
    """What a node's receipts come to."""

    node: str
    name: str = ""
    sessions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_positions: int = 0
    layer_positions: int = 0
    """Positions times the layers that they went through."""
    disputed: int = 0
    missing: int = 0


@dataclass
class Accounts:
    nodes: dict[str, NodeAccount] = field(default_factory=dict)
    disputed: list[Disputed] = field(default_factory=list)
    """The last LISTED_MAX of them; all are counted."""
    bad: list[str] = field(default_factory=list)
    """Lines that are not what they were when they were written: file, number and reason."""

    def of(self, line: Line) -> NodeAccount:
        account = self.nodes.setdefault(line.node, NodeAccount(line.node))
        account.name = line.name or account.name
        return account


LISTED_MAX = 100


def holds_receipts(folder: Path) -> bool:
    """Whether a gateway has kept any there."""
    return folder.is_dir() and any((folder / f"{name}.jsonl").is_file() for name in BOOKS.values())


def read_accounts(folder: Path, into: Accounts | None = None) -> Accounts:
    """All of a gateway's folder, with every signature checked again; a gateway may be writing there."""
    found, disk = into or Accounts(), DirectoryDisk(folder)
    for where, line in _lines(disk, Kept, found.bad):
        trouble = _check(line)
        if trouble:
            found.bad.append(f"{where}: {trouble}")
            continue
        account, figures = found.of(line), line.figures
        account.sessions += 1
        account.prompt_tokens += figures.prompt_tokens
        account.generated_tokens += figures.generated_tokens
        account.computed_positions += figures.computed_positions
        account.layer_positions += figures.computed_positions * (line.stop - line.first)
    for _, disputed in _lines(disk, Disputed, found.bad):
        found.of(disputed).disputed += 1
        found.disputed = [*found.disputed, disputed][-LISTED_MAX:]
    for _, missing in _lines(disk, Missing, found.bad):
        found.of(missing).missing += 1
    return found


def _check(line: Kept) -> str:
    try:
        envelope = Envelope.from_bytes(line.envelope, RequestReceipt.MAX_BYTES)
        receipt = open_record(envelope, RequestReceipt, envelope.network)
    except BadRecord as error:
        return error.sentence
    signed = (
        envelope.signer.hex(), receipt.job.hex(), receipt.ring.hex(), f"{receipt.session:016x}", receipt.first,
        receipt.stop, receipt.prompt_tokens, receipt.generated_tokens, receipt.computed_positions,
    )  # fmt: skip
    said = (line.node, line.job, line.ring, line.session, line.first, line.stop, *msgspec.structs.astuple(line.figures))
    return "" if signed == said else "its figures are not those that were signed."


def _lines(disk: Disk, kind: type[L], bad: list[str]) -> Iterator[tuple[str, L]]:
    """The lines of a book, oldest first, each once, and where it stands. One without its end is being written."""
    name, decoder, seen = BOOKS[kind], msgspec.json.Decoder(kind), set[tuple[str, str, str, int]]()
    current = f"{name}.jsonl"
    for file in [*numbered(disk, name), *([current] if disk.info(current) else [])]:
        for number, data in enumerate(disk.read(file).split(b"\n")[:-1], 1):
            where = f"{file}, line {number}"
            try:
                line = decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                bad.append(f"{where} cannot be read: {error}.")
                continue
            of = (line.node, line.ring, line.session, line.first)
            if of in seen:
                bad.append(f"{where}: it stands there twice.")
                continue
            seen.add(of)
            yield where, line
