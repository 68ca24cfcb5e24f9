"""The run folder: everything a training job leaves behind, and what it is resumed and replayed from.

    runs/<name>/
        job.yaml            the job file as it was given
        job.record          the job's signed TrainJob; a folder without it holds no job yet
        lock                held (flock) by the driver that is writing here
        records/chain       every other signed record, byte for byte as it was received, in the order it came
        blobs/              the driver's blob store, managed by `shoal.storage`
        metrics.jsonl       RoundMetrics, one line per committed round
        evaluations.jsonl   Evaluation, one line per held-out measurement
        lanes.jsonl         LaneSegment: who was doing what, when
        events.jsonl        Event: what happened, as sentences
        audits.jsonl        AuditLine: replays made while the job ran
        figures.json        what the driver knows beside the records; rewritten as it goes
        report.json, report.html
        model/              the trained model, a checkpoint in the form of `transformers`
        local/              what else was started for this job on the same machine (hub, nodes) keeps its state here

Records are the truth; the other files are about it. `append(..., durable=True)` returns after an fsync, and that makes
everything appended before it durable too. A driver that is killed leaves at most a torn tail, which the next `open`
finds and cuts. A record that was durable is never cut: when one follows the damage, `open` refuses.

A frame of `records/chain` is: 4 bytes of mark, 1 byte that is 1 for a durable record, the length as 4 bytes, the first
8 bytes of BLAKE3 over (offset of the frame in the file as 8 bytes, that flag, the envelope), the envelope. All numbers
are most significant byte first. As the offset is part of the sum, bytes inside a record never pass for a frame.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord, JobError, StorageError
from shoal.identity import ENVELOPE_OVERHEAD_BYTES, Envelope, blake3_hash
from shoal.protocol.messages import Record, open_record
from shoal.protocol.training import Count, Round, TrainJob

RECORD_BODY_MAX_BYTES = 1 << 20
"""The largest body among the records of a job."""
LINE_MAX_BYTES = 16 * 1024
FILE_MAX_BYTES = 64 << 20
"""The largest file that is read or written whole (figures.json, report.json, report.html)."""
JOB_YAML_MAX_BYTES = 1 << 20


class FolderTaken(JobError):
    """A run folder, or a folder of somebody else's, already stands where a new one is wanted."""

    code = "SH-610"


class FolderUnreadable(JobError):
    """A folder is missing, is not a run folder, or may not be read."""

    code = "SH-611"


class FolderLocked(JobError):
    """A running driver is writing to the folder."""

    code = "SH-612"


class FolderDamaged(StorageError):
    """A file of the folder does not hold what it held when it was written."""

    code = "SH-613"


class FolderWriteFailed(StorageError):
    """The disk is full, or refuses to write."""

    code = "SH-614"


# --- lines ----------------------------------------------------------------------------------------------------------

NodeHex = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
"""A NodeId in hexadecimal digits, as files and reports carry it."""
Seconds = Annotated[float, Meta(ge=0)]
"""Since the job's first start. A resumed driver goes on counting from `RunFolder.elapsed_s`."""


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of one of the folder's .jsonl files."""

    FILE: ClassVar[str]


class RoundMetrics(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A committed round."""

    FILE: ClassVar[str] = "metrics.jsonl"

    round: Round
    time_s: Seconds
    tokens_total: Count
    loss: float | None
    """Training loss in nats per token, weighted by accepted tokens; none when it is not a finite number."""
    tokens_per_s: Annotated[float, Meta(ge=0)]
    members: Count
    """How many contributions were accepted."""
    bytes_sent: Count = 0
    """By all members since the line before."""
    bytes_received: Count = 0
    inner_steps: Count = 0
    state: str = ""
    """Hash of the shared state that the Commit names, in hexadecimal digits."""


class Evaluation(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Held-out loss of the shared state after `round` (-1: the untrained model), in nats per token; none when it is
    not a finite number."""

    FILE: ClassVar[str] = "evaluations.jsonl"

    round: Round
    time_s: Seconds
    tokens_total: Count
    loss: float | None


class Lane(StrEnum):
    """What a node was doing."""

    COMPUTING = "computing"
    SENDING = "sending"
    WAITING = "waiting"
    SYNCING = "syncing"
    GONE = "gone"
    EXCLUDED = "excluded"


class LaneSegment(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A node was in `state` from `start_s` to `stop_s`. Segments of a node do not overlap: what happens while a node
    computes is computing."""

    FILE: ClassVar[str] = "lanes.jsonl"

    node: NodeHex
    state: Lane
    start_s: Seconds
    stop_s: Seconds


class EventKind(StrEnum):
    NOTE = "note"
    JOINED = "joined"
    LEFT = "left"
    DIED = "died"
    EXCLUDED = "excluded"
    AUDIT = "audit"
    DRIVER = "driver"


class Event(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Something happened, said in a sentence. `node` is empty when it concerns no node in particular."""

    FILE: ClassVar[str] = "events.jsonl"

    time_s: Seconds
    sentence: Annotated[str, Meta(max_length=1000)]
    kind: EventKind = EventKind.NOTE
    node: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    round: Round | None = None


class AuditVerdict(StrEnum):
    MATCH = "match"
    MISMATCH = "mismatch"
    NOT_REPLAYABLE = "not replayable"


class AuditLine(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A contribution was replayed."""

    FILE: ClassVar[str] = "audits.jsonl"

    time_s: Seconds
    round: Round
    node: NodeHex
    verdict: AuditVerdict
    sentence: Annotated[str, Meta(max_length=1000)]
    difference: float | None = None
    """The measured distance between claimed and replayed work, and the largest that an honest replay may show; none
    when nothing could be replayed."""
    threshold: float | None = None


_LINES: tuple[type[Line], ...] = (RoundMetrics, Evaluation, LaneSegment, Event, AuditLine)
_OWN_NAMES = frozenset(
    {
        "job.yaml",
        "job.record",
        "lock",
        "records",
        "blobs",
        "figures.json",
        "report.json",
        "report.html",
        "model",
        "local",
    }
    | {line.FILE for line in _LINES}
)

L = TypeVar("L", bound=Line)
R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=msgspec.Struct)

_FRAME = struct.Struct(">4sBI8s")
_MARK = b"\xa7RC1"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolder:
    """A job's folder, open. One process at a time may write (`create`, `open`); any number may read at the same time
    (`open(..., read_only=True)`). Methods may be called from any thread; they block for as long as the disk takes."""

    def __init__(self, path: Path, lock: int | None) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.cut_bytes = 0
        """How much torn tail `open` removed from (read-only: ignored in) the chain."""
        self._lock = lock
        self._guard = threading.Lock()
        self._job: Envelope | None = None
        self._files: dict[str, int] = {}
        self._end = 0
        self._failed = False

    # --- opening and closing

    @classmethod
    def create(cls, path: Path, *, replace: bool = False) -> RunFolder:
        """Make a new folder and lock it; `begin` then gives it its job. A folder in which nothing was begun is taken
        over; with `replace` an earlier run is removed first, but never a file that is not a run's.

        Raises FolderTaken, FolderLocked, FolderUnreadable, FolderWriteFailed.
        """
        if path.exists() and not path.is_dir():
            raise FolderTaken(f"{path} is a file; choose another name for the run.")
        if path.is_dir():
            with _reading(path):
                foreign = sorted(entry.name for entry in path.iterdir() if not _is_own(entry.name))
            if foreign:
                raise FolderTaken(
                    f"{path} holds {foreign[0]}, which is not of a run; choose another name, or move it away."
                )
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, _take_lock(path))
        try:
            if (path / "job.record").exists() and not replace:
                raise FolderTaken(
                    f"{path} already holds {_describe_job(path)}; continue it with --resume, or choose another name."
                )
            folder._clear()
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> RunFolder:
        """Open a folder that holds a job: to continue it (takes the lock, cuts a torn tail), or to read it while it
        may still be written.

        Raises FolderUnreadable, FolderLocked, FolderDamaged, FolderWriteFailed.
        """
        if not path.is_dir():
            raise FolderUnreadable(f"There is no run folder {path}.")
        with _reading(path):
            begun = (path / "job.record").is_file()
        if not begun:
            raise FolderUnreadable(f"{path} is not a run folder that was begun: it has no job.record.")
        folder = cls(path, None if read_only else _take_lock(path))
        try:
            folder._job = _read_job(path)
            folder._end, folder.cut_bytes = folder._check_chain()
            if not read_only:
                folder._cut_tails()
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Release the lock and the files. What was not appended durably may still be on its way to the disk."""
        with self._guard:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
            if self._lock is not None:
                os.close(self._lock)  # the lock goes with its descriptor
                self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the job

    def begin(self, job: Envelope, job_yaml: bytes = b"") -> None:
        """Give the folder its job, durably. Raises FolderTaken when it has one, BadRecord when `job` is not a signed
        TrainJob, FolderWriteFailed."""
        if self._job is not None:
            raise FolderTaken(f"{self.path} already holds {_describe_job(self.path)}.")
        open_record(job, TrainJob, job.network)
        if job_yaml:
            self.write("job.yaml", job_yaml)
        self.write("job.record", job.to_bytes())
        self._job = job

    @property
    def job(self) -> Envelope:
        """The job's TrainJob as it was signed; its `record_id` is the job's id. Raises FolderUnreadable before
        `begin`."""
        if self._job is None:
            raise FolderUnreadable(f"{self.path} has no job yet.")
        return self._job

    def train_job(self) -> TrainJob:
        """The job, its signature verified. Raises BadRecord."""
        return open_record(self.job, TrainJob, self.job.network)

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def model(self) -> Path:
        return self.path / "model"

    # --- records

    def append(self, envelope: Envelope, *, durable: bool = False) -> None:
        """Add a record to the chain. A Commit is appended durably before it is published.

        Raises FolderWriteFailed; the chain is then as it was before, except after a failed fsync, when nothing can be
        said about the disk any more and every later append is refused too.
        """
        payload = envelope.to_bytes()
        if len(payload) > RECORD_BODY_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES:
            raise FolderWriteFailed(f"A {envelope.kind} record of {len(payload)} bytes is too large for a run folder.")
        with self._guard:
            if self._failed:
                raise FolderWriteFailed(f"The disk under {self.path} failed before; resume the job on a sound disk.")
            chain = self._file("records/chain")
            self._write_at_end(chain, self._end, _frame(self._end, durable, payload))
            if durable:
                try:
                    os.fsync(chain)
                except OSError as error:
                    self._failed = True
                    raise _write_failure(self.path, error) from error
            self._end += _FRAME.size + len(payload)

    def records(self, *kinds: type[Record]) -> Iterator[Envelope]:
        """The records of these kinds (all, when none is named), in the order they were appended. Signatures are not
        verified here: `open_record` does that for those that are looked into."""
        wanted = {kind.KIND for kind in kinds}
        path = self.path / "records" / "chain"
        if not path.exists():
            return
        with _reading(path), path.open("rb") as file:
            position = 0
            while (payload := _read_frame(file.read, position)) is not None:
                position += _FRAME.size + len(payload)
                envelope = Envelope.from_bytes(payload, RECORD_BODY_MAX_BYTES)
                if not wanted or envelope.kind in wanted:
                    yield envelope

    def opened(self, kind: type[R]) -> Iterator[tuple[Envelope, R]]:
        """The records of one kind, each verified and decoded when its turn comes. Raises BadRecord."""
        network = self.job.network
        for envelope in self.records(kind):
            yield envelope, open_record(envelope, kind, network)

    # --- lines

    def note(self, line: Line) -> None:
        """Add a line to the file of its kind. Raises FolderWriteFailed."""
        data = msgspec.json.encode(line) + b"\n"
        if len(data) > LINE_MAX_BYTES:
            raise FolderWriteFailed(f"A line of {len(data)} bytes is too long for {line.FILE}.")
        with self._guard:
            descriptor = self._file(line.FILE)
            self._write_at_end(descriptor, os.fstat(descriptor).st_size, data)

    def notes(self, kind: type[L]) -> Iterator[L]:
        """The lines of one kind. An unfinished last line is left out. Raises FolderDamaged."""
        path = self.path / kind.FILE
        if not path.exists():
            return
        decoder = msgspec.json.Decoder(kind)
        with _reading(path), path.open("rb") as file:
            number = 0
            while data := file.readline(LINE_MAX_BYTES + 1):
                number += 1
                if not data.endswith(b"\n") and len(data) <= LINE_MAX_BYTES:
                    return
                try:
                    yield decoder.decode(data)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise FolderDamaged(
                        f"{path} line {number} is damaged ({error}); delete the line: records are kept elsewhere."
                    ) from error

    def elapsed_s(self) -> float:
        """How far the job's time has come: the latest moment that any line names."""
        return max(
            (
                *(line.time_s for line in self.notes(RoundMetrics)),
                *(line.time_s for line in self.notes(Event)),
                *(line.stop_s for line in self.notes(LaneSegment)),
            ),
            default=0.0,
        )

    # --- whole files

    def write(self, name: str, data: bytes) -> None:
        """Replace a file of the folder at once: a reader sees the old one or the new one. Raises FolderWriteFailed."""
        path = self.path / name
        if len(data) > FILE_MAX_BYTES:
            raise FolderWriteFailed(f"{path} would have {len(data)} bytes; at most {FILE_MAX_BYTES} are written.")
        scratch = path.with_name(f".{path.name}.new")
        with _writing(self.path):
            try:
                with scratch.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                scratch.replace(path)
                _sync_directory(path.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    scratch.unlink(missing_ok=True)
                raise

    def read(self, name: str, kind: type[S]) -> S | None:
        """A JSON file of the folder as a `kind`; None when it was never written. Raises FolderDamaged."""
        path = self.path / name
        if not path.exists():
            return None
        with _reading(path), path.open("rb") as file:
            data = file.read(FILE_MAX_BYTES + 1)
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FolderDamaged(f"{path} is damaged ({error}); delete it and resume or report again.") from error

    # --- inside

    def _file(self, name: str) -> int:
        if self._lock is None:
            raise FolderWriteFailed(f"{self.path} is open for reading only.")
        descriptor = self._files.get(name)
        if descriptor is None:
            path = self.path / name
            with _writing(self.path):
                path.parent.mkdir(exist_ok=True)
                new = not path.exists()
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                if new:
                    _sync_directory(path.parent)
                    _sync_directory(self.path)
            self._files[name] = descriptor
        return descriptor

    def _write_at_end(self, descriptor: int, end: int, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            raise _write_failure(self.path, error) from error

    def _check_chain(self) -> tuple[int, int]:
        """Where the intact frames end, and how many bytes of torn tail follow. Raises FolderDamaged."""
        path = self.path / "records" / "chain"
        if not path.exists():
            return 0, 0
        with _reading(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # a driver may be appending more meanwhile
            position = 0
            while position < size and (payload := _read_frame(file.read, position)) is not None:
                position += _FRAME.size + len(payload)
            if position < size and _durable_after(file.fileno(), position, size):
                raise FolderDamaged(
                    f"{path} is damaged at byte {position}, and records that were safe on the disk follow. Restore the "
                    "file from a copy; the job's members hold its Commits too."
                )
        return position, max(0, size - position)

    def _cut_tails(self) -> None:
        with _writing(self.path):
            if self.cut_bytes:
                os.truncate(self.path / "records" / "chain", self._end)
            for kind in _LINES:
                path = self.path / kind.FILE
                if path.exists() and (torn := _torn_line_bytes(path)):
                    os.truncate(path, path.stat().st_size - torn)

    def _clear(self) -> None:
        # job.record goes first: a folder without it holds no job, however much of the rest is still there
        with _writing(self.path):
            (self.path / "job.record").unlink(missing_ok=True)
            for entry in self.path.iterdir():
                if entry.name == "lock":
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            self.blobs.mkdir()
            (self.path / "records").mkdir()
            _sync_directory(self.path)


# --- frames ---------------------------------------------------------------------------------------------------------


def _sum(position: int, durable: int, payload: bytes) -> bytes:
    return blake3_hash(position.to_bytes(8, "big") + bytes((durable,)) + payload)[:8]


def _frame(position: int, durable: bool, payload: bytes) -> bytes:
    return _FRAME.pack(_MARK, durable, len(payload), _sum(position, durable, payload)) + payload


def _read_frame(read: Callable[[int], bytes], position: int) -> bytes | None:
    """The payload of the frame that starts here; None at the end and for anything that is not an intact frame."""
    head = read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    mark, durable, length, check = _FRAME.unpack(head)
    if mark != _MARK or length > RECORD_BODY_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES:
        return None
    payload = read(length)
    return payload if len(payload) == length and _sum(position, durable, payload) == check else None


def _durable_after(descriptor: int, damage: int, size: int) -> bool:
    """Whether an intact durable frame stands anywhere behind `damage`, in the first `size` bytes."""
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as data:
        position = data.find(_MARK, damage + 1)
        while position >= 0:
            data.seek(position)
            payload = _read_frame(data.read, position)
            if payload is not None and data[position + len(_MARK)]:
                return True
            position = data.find(_MARK, position + 1)
    return False


def _torn_line_bytes(path: Path) -> int:
    """How many bytes stand behind the last line end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LINE_MAX_BYTES))
        tail = file.read()
    return len(tail) - (tail.rfind(b"\n") + 1)


# --- the file system ------------------------------------------------------------------------------------------------


def _is_own(name: str) -> bool:
    return name in _OWN_NAMES or (name.startswith(".") and name.endswith(".new") and name[1:-4] in _OWN_NAMES)


def _take_lock(path: Path) -> int:
    """An open descriptor of `lock`, held for this process. Raises FolderLocked."""
    with _writing(path):
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        os.close(descriptor)
        raise FolderLocked(
            f"A driver is running in {path}{f' (process {holder})' if holder.isdigit() else ''}; wait for it, stop it, "
            "or choose another name."
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise FolderWriteFailed(f"{path} cannot be locked: {error.strerror}. Use a local disk.") from error
    return descriptor


def _read_job(path: Path) -> Envelope:
    with _reading(path), (path / "job.record").open("rb") as file:
        data = file.read(RECORD_BODY_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES + 1)
    try:
        envelope = Envelope.from_bytes(data, TrainJob.MAX_BYTES)
        open_record(envelope, TrainJob, envelope.network)
    except BadRecord as error:
        raise FolderDamaged(f"{path / 'job.record'} is not a signed job: {error} Restore it from a copy.") from error
    return envelope


def _describe_job(path: Path) -> str:
    try:
        envelope = _read_job(path)
        job = open_record(envelope, TrainJob, envelope.network)
    except (FolderDamaged, FolderUnreadable):
        return "a job that cannot be read"
    return f"job {job.name} ({envelope.record_id.hex()[:8]})"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_failure(path: Path, error: OSError) -> FolderWriteFailed:
    if error.errno in _NO_ROOM:
        return FolderWriteFailed(f"There is no room left on the disk under {path}; make room, then use --resume.")
    return FolderWriteFailed(f"{path} cannot be written: {error.strerror}.")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_failure(path, error) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderUnreadable(f"{path} cannot be read: {error.strerror}.") from error
