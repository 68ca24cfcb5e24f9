"""The run folder: everything a training job leaves behind, and what it is resumed and replayed from.

    runs/<name>/
        job.yaml            the job file as it was given
        job.record          the job's signed TrainJob; a folder without it holds no job yet
        lock                held by the driver that is writing here, with its process number until it leaves in order
        records/chain       every other signed record, byte for byte as it was received, in the order it came
        blobs/              the driver's blob store, managed by `shoal.storage`
        metrics.jsonl       RoundMetrics, one line per committed round
        evaluations.jsonl   Evaluation, one line per held-out measurement
        lanes.jsonl         LaneSegment: who was doing what, when
        events.jsonl        Event: what happened, as sentences
        audits.jsonl        AuditLine: replays made while the job ran
        figures.json        what the driver knows beside the records; rewritten as it goes
        payments.json       what is set aside and paid, and the newest Hold of each node (`purse.bills`)
        report.json, report.html
        model/              the trained model, a checkpoint in the form of `transformers`
        data/               what the job's owner prepared and keeps: token files, the newest state
        local/              what else was started for this job on the same machine (hub, nodes) keeps its state here

Records are the truth; the other files are about it. `append(..., durable=True)` returns after an fsync, and that makes
everything appended before it durable too. A driver that is killed leaves at most a torn tail, which the next `open`
finds and cuts. Damage that a durable record follows is never cut away: `open` refuses the folder.

A frame of `records/chain` is: 4 bytes of mark, 1 byte that is 1 for a durable record, the length as 4 bytes, the first
8 bytes of BLAKE3 over (offset of the frame in the file as 8 bytes, that flag, the envelope), the envelope. All numbers
are most significant byte first. As the offset is part of the sum, bytes inside a record never pass for a frame.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import struct
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from shoal.driver.lines import LINES, Event, LaneSegment, Line, RoundMetrics
from shoal.errors import BadRecord, JobError, StorageError
from shoal.identity import ENVELOPE_OVERHEAD_BYTES, Envelope, blake3_hash
from shoal.protocol.messages import Record, open_record
from shoal.protocol.training import Commit, TrainJob
from shoal.purse.bills import FILE as PAYMENTS
from shoal.purse.bills import Payments
from shoal.storage import StorageFull
from shoal.world import DirectoryDisk, Disk, DiskLock
from shoal.world.processes import LOCK, pid_in_lock, sign_lock, unsign_lock

RECORD_BODY_MAX_BYTES = 1 << 20
"""The largest body among the records of a job."""
LINE_MAX_BYTES = 16 * 1024
FILE_MAX_BYTES = 64 << 20
"""The largest file that is read or written whole (figures.json, report.json, report.html)."""


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

    code = "SH-450"


class FolderWriteFailed(StorageError):
    """The disk is full, or refuses to write."""

    code = "SH-451"


_OWN_NAMES = frozenset(
    {
        "job.yaml",
        "job.record",
        "lock",
        "records",
        "blobs",
        "figures.json",
        "payments.json",
        "report.json",
        "report.html",
        "model",
        "local",
        "data",
        "owner.json",
        "driver.key",
        "detached.json",
    }
    | {line.FILE for line in LINES}
)

L = TypeVar("L", bound=Line)
R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=msgspec.Struct)

CHAIN = "records/chain"
"""Where the records are."""
_REPLACED = ".replaced"
"""Where an earlier run lies until the one in its place has begun."""
_GONE = ".gone"
_FRAME = struct.Struct(">4sBI8s")
_MARK = b"\xa7RC1"
_FRAME_MAX_BYTES = _FRAME.size + RECORD_BODY_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES
_WINDOW_BYTES = 4 << 20
"""How much of a file is in memory while it is read from end to end."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolder:
    """A job's folder, open. One process at a time may write (`create`, `open`); any number may read at the same time
    (`open(..., read_only=True)`). Methods may be called from any thread; they block for as long as the disk takes."""

    def __init__(self, path: Path, disk: Disk, lock: DiskLock | None) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.cut_bytes = 0
        """How much torn tail `open` removed from the chain (read-only: leaves out)."""
        self._disk = disk
        self._lock = lock
        self._guard = threading.Lock()
        self._job: Envelope | None = None
        self._ends: dict[str, int] = {}
        """Where the sound part of each file ends that is appended to."""
        self._ragged: set[str] = set()
        """Files with bytes behind that end, which a write that failed left there."""
        self._elapsed_s: float | None = None
        self._failed = False

    # --- opening and closing

    @classmethod
    def create(cls, path: Path, *, replace: bool = False, disk: Disk | None = None) -> RunFolder:
        """Make a new folder and lock it; `begin` then gives it its job. A folder in which nothing was begun is taken
        over; with `replace` an earlier run is removed once the new one has begun, but never a file that is not a
        run's.

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
            disk = disk or DirectoryDisk(path)
        folder = cls(path, disk, _take_lock(path, disk))
        try:
            with _writing(path):
                _settle_replaced(path, disk)
            if disk.info("job.record") is None:
                with _writing(path):
                    _clear(path)
            elif replace:
                with _writing(path):
                    _set_aside(path)
            else:
                raise FolderTaken(
                    f"{path} already holds {folder._describe_job()}; continue it with --resume, throw it away with "
                    "--replace, or choose another name."
                )
            with _writing(path):
                (path / "blobs").mkdir()
                (path / "records").mkdir()
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, disk: Disk | None = None) -> RunFolder:
        """Open a folder that holds a job: to continue it (takes the lock, cuts a torn tail), or to read it while it
        may still be written.

        Raises FolderUnreadable, FolderLocked, FolderDamaged, FolderWriteFailed.
        """
        if not path.is_dir():
            raise FolderUnreadable(f"There is no run folder {path}.")
        with _reading(path):
            disk = disk or DirectoryDisk(path)
            begun, kept = (disk.info(name) is not None for name in ("job.record", f"{_REPLACED}/job.record"))
        if not begun and not kept:
            raise FolderUnreadable(f"{path} is not a run folder that was begun: it has no job.record.")
        if read_only and is_unsettled(path) and not (begun and kept):
            raise FolderUnreadable(
                f"The run in {path} is being replaced, or was when the driver that should do it was killed; wait for "
                "it, or use --resume, which puts the run back."
            )
        folder = cls(path, disk, None if read_only else _take_lock(path, disk))
        try:
            if not read_only:
                with _writing(path):
                    _settle_replaced(path, disk)
            folder._job = folder._read_job()
            folder._check_chain()
            if not read_only:
                folder._cut_tails()
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Release the lock. What was not appended durably may still be on its way to the disk. A run that was to be
        replaced is there again when the new one did not begin."""
        with self._guard:
            if self._lock is not None:
                try:
                    with contextlib.suppress(OSError):
                        unsign_lock(self._disk)
                    with _writing(self.path):
                        _settle_replaced(self.path, self._disk)
                        if self._disk.info("job.record") is None:
                            _clear(self.path, keep="local")  # logs of processes that say why nothing began
                            _remove_empty(self.path)
                finally:
                    self._lock.release()
                    self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the job

    def begin(self, job: Envelope, job_yaml: bytes = b"") -> None:
        """Give the folder its job, durably; whatever is needed to go on with it lies there before. Raises FolderTaken
        when it has one, BadRecord when `job` is not a signed TrainJob, FolderWriteFailed."""
        if self._job is not None:
            raise FolderTaken(f"{self.path} already holds {self._describe_job()}.")
        open_record(job, TrainJob, job.network)
        if job_yaml:
            self.write("job.yaml", job_yaml)
        self.write("job.record", job.to_bytes())
        self._job = job
        with _writing(self.path):
            _settle_replaced(self.path, self._disk)

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
        """The driver's blob store."""
        return self.path / "blobs"

    @property
    def data(self) -> Path:
        """What the job's owner prepared, and keeps beside the blobs."""
        return self.path / "data"

    @property
    def model(self) -> Path:
        """Where the trained model goes."""
        return self.path / "model"

    @property
    def local(self) -> Path:
        """State of the hub and the nodes that were started on this machine for this job alone."""
        return self.path / "local"

    # --- records

    def append(self, envelope: Envelope, *, durable: bool = False) -> None:
        """Add a record to the chain. A Commit is appended durably before it is published.

        Raises FolderWriteFailed; the chain is then as it was before, except after a failed sync, when nothing can be
        said about the disk any more and every later append is refused too. Raises FolderDamaged when somebody else
        changed the chain's length, or took it away.
        """
        payload = envelope.to_bytes()
        if len(payload) > RECORD_BODY_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES:
            raise FolderWriteFailed(f"A {envelope.kind} record of {len(payload)} bytes is too large for a run folder.")
        with self._guard:
            if self._failed:
                raise FolderWriteFailed(f"The disk under {self.path} failed before; resume the job on a sound disk.")
            self._extend(CHAIN, _frame(self._end(CHAIN), durable, payload))
            if durable:
                try:
                    self._disk.sync(CHAIN)
                except OSError as error:
                    self._failed = True
                    raise _write_failure(self.path, error) from error

    def records(self, *kinds: type[Record]) -> Iterator[Envelope]:
        """The records of these kinds (all, when none is named), in the order they were appended. Signatures are not
        verified here: `open_record` does that for those that are looked into. Raises FolderDamaged when they end
        before those that were there when the reading began."""
        wanted = {kind.KIND for kind in kinds}
        for _, payload in self._frames(self._end(CHAIN)):
            envelope = Envelope.from_bytes(payload, RECORD_BODY_MAX_BYTES)
            if not wanted or envelope.kind in wanted:
                yield envelope

    def opened(self, kind: type[R]) -> Iterator[tuple[Envelope, R]]:
        """The records of one kind, each verified and decoded when its turn comes. Raises BadRecord."""
        network = self.job.network
        for envelope in self.records(kind):
            yield envelope, open_record(envelope, kind, network)

    def take_back(self, commits: Collection[bytes], first_round: int) -> None:
        """Leave out these Commits, and what is noted of their rounds, from `first_round` on. Raises
        FolderWriteFailed."""
        with self._guard, _writing(self.path):
            self._check_writable()
            kept, end = f".{CHAIN.replace('/', '.')}.new", 0
            self._disk.delete(kept)
            for _, payload in self._frames(self._end(CHAIN)):
                if Envelope.from_bytes(payload, RECORD_BODY_MAX_BYTES).record_id not in commits:
                    frame = _frame(end, True, payload)
                    self._disk.write(kept, frame, end)
                    end += len(frame)
            lines = [line for line in self.notes(RoundMetrics) if line.round < first_round]
            data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
            noted = f".{RoundMetrics.FILE}.new"
            self._disk.delete(noted)
            self._disk.write(noted, data)
            for scratch, name, size in ((noted, RoundMetrics.FILE, len(data)), (kept, CHAIN, end)):
                self._disk.sync(scratch)
                self._disk.rename(scratch, name)
                self._disk.sync(name)
                self._ends[name] = size

    # --- lines

    def note(self, line: Line) -> None:
        """Add a line to the file of its kind. Raises FolderWriteFailed, FolderDamaged."""
        data = msgspec.json.encode(line) + b"\n"
        if len(data) > LINE_MAX_BYTES:
            raise FolderWriteFailed(f"A line of {len(data)} bytes is too long for {line.FILE}.")
        with self._guard:
            self._extend(line.FILE, data)
            if self._elapsed_s is not None:
                self._elapsed_s = max(self._elapsed_s, _moment(line))

    def notes(self, kind: type[L]) -> Iterator[L]:
        """The lines of one kind. An unfinished last line is left out. Raises FolderDamaged."""
        decoder = msgspec.json.Decoder(kind)
        number, position, rest = 0, 0, b""
        while window := self._read(kind.FILE, position, _WINDOW_BYTES):
            position += len(window)
            *lines, rest = (rest + window).split(b"\n")
            for line in lines:
                number += 1
                try:
                    yield decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise FolderDamaged(
                        f"{self.path / kind.FILE} line {number} is damaged ({error}). Delete the line: it is a note, "
                        "the records stand elsewhere."
                    ) from error
            if len(rest) > LINE_MAX_BYTES:
                raise FolderDamaged(f"{self.path / kind.FILE} has a line that no driver wrote; delete the file.")

    def elapsed_s(self) -> float:
        """How far the job's time has come: the latest moment that any line names."""
        if self._elapsed_s is None:
            kinds: tuple[type[Line], ...] = (RoundMetrics, Event, LaneSegment)
            self._elapsed_s = max((_moment(line) for kind in kinds for line in self.notes(kind)), default=0.0)
        return self._elapsed_s

    # --- whole files

    def write(self, name: str, data: bytes) -> None:
        """Replace a file of the folder at once: a reader sees the old one or the new one. Raises FolderWriteFailed."""
        if len(data) > FILE_MAX_BYTES:
            raise FolderWriteFailed(f"{name} would have {len(data)} bytes; at most {FILE_MAX_BYTES} are written.")
        with self._guard, _writing(self.path):
            self._check_writable()
            scratch = f".{name}.new"
            self._disk.delete(scratch)
            self._disk.write(scratch, data)
            self._disk.sync(scratch)
            self._disk.rename(scratch, name)
            self._disk.sync(name)

    def read(self, name: str, kind: type[S], *, remedy: str = "delete it: it can be made again") -> S | None:
        """A JSON file of the folder as a `kind`; None when it was never written. Raises FolderDamaged, saying what to
        do about it (`remedy`)."""
        if self._size(name) is None:
            return None
        try:
            return msgspec.json.decode(self._read(name, 0, FILE_MAX_BYTES), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FolderDamaged(f"{self.path / name} is damaged ({error}); {remedy}.") from error

    def payments(self) -> Payments | None:
        """What the run has paid, with what its newest Commit owes; None where nothing was set aside. Raises
        FolderDamaged."""
        known = self.read(PAYMENTS, Payments, remedy="restore it from a copy: it says what nodes were paid")
        if known is None or not known.owes:
            return known
        return known.settled(self.commit_ids())

    def commit_ids(self) -> set[bytes]:
        return {envelope.record_id for envelope in self.records(Commit)}

    # --- inside

    def _size(self, name: str) -> int | None:
        with _reading(self.path):
            info = self._disk.info(name)
        return None if info is None else info.size

    def _read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a file; none when it was never written."""
        with _reading(self.path):
            try:
                return self._disk.read(name, offset, length)
            except FileNotFoundError:
                return b""

    def _check_writable(self) -> None:
        if self._lock is None:
            raise FolderWriteFailed(f"{self.path} is not open for writing.")

    def _end(self, name: str) -> int:
        if name not in self._ends:
            self._ends[name] = self._size(name) or 0
        return self._ends[name]

    def _extend(self, name: str, data: bytes) -> None:
        self._check_writable()
        end, size = self._end(name), self._size(name) or 0
        if size < end or (size > end and name not in self._ragged):  # writing on would leave a hole, or take bytes away
            raise self._damaged(name, f"it has {size} bytes where this driver left {end}")
        with _writing(self.path):
            if name in self._ragged:
                self._cut(name, end)
            self._ragged.add(name)
            self._disk.write(name, data, end)
            self._ragged.discard(name)
        self._ends[name] = end + len(data)

    def _damaged(self, name: str, how: str) -> FolderDamaged:
        """A file that is appended to changed while this process had the folder open."""
        return FolderDamaged(
            f"{self.path / name} was changed or taken away by somebody else: {how}. Restore the newest copy of the "
            "folder, then use --resume."
        )

    def _cut(self, name: str, size: int) -> None:
        """Shorten a file. What stays is copied and renamed, so that at no moment less than that is there."""
        scratch = f".{name.replace('/', '.')}.new"
        self._disk.delete(scratch)
        self._disk.write(scratch, b"")
        for offset in range(0, size, _WINDOW_BYTES):
            self._disk.write(scratch, self._disk.read(name, offset, min(_WINDOW_BYTES, size - offset)), offset)
        self._disk.sync(scratch)
        self._disk.rename(scratch, name)
        self._disk.sync(name)
        self._ragged.discard(name)

    def _frames(self, least: int = 0, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """The intact frames from `start` on: where each one ends, and its payload. Raises FolderDamaged when they end
        before byte `least`."""
        position, window = start, b""
        while True:
            offset = position - start
            if len(window) - offset < _FRAME_MAX_BYTES:
                start, offset = position, 0
                window = self._read(CHAIN, start, _WINDOW_BYTES)
            frame = _parse_frame(window, offset, position)
            if frame is None:
                if position < least:
                    raise self._damaged(CHAIN, f"its records end at byte {position}, and {least} bytes were there")
                return
            position += _FRAME.size + len(frame[1])
            yield position, frame[1]

    def _check_chain(self) -> None:
        """Find where the intact frames end. Raises FolderDamaged unless what follows is a torn tail."""
        size = self._size(CHAIN) or 0  # first: a driver may be appending more meanwhile
        end = 0
        for end, _ in self._frames():
            if end >= size:
                break
        if end < size and self._durable_between(end + 1, size):
            raise FolderDamaged(
                f"{self.path / CHAIN} is damaged at byte {end}, and records that were safe on the disk follow. "
                "Restore the file from a copy; the job's members hold its Commits too."
            )
        self._ends[CHAIN] = end
        self.cut_bytes = max(0, size - end)

    def _durable_between(self, start: int, size: int) -> bool:
        """Whether an intact durable frame starts in [start, size)."""
        for base in range(start, size, _WINDOW_BYTES):
            window = self._read(CHAIN, base, _WINDOW_BYTES + _FRAME_MAX_BYTES)
            found = window.find(_MARK)
            while 0 <= found < _WINDOW_BYTES:
                frame = _parse_frame(window, found, base + found)
                if frame is not None and frame[0]:
                    return True
                found = window.find(_MARK, found + 1)
        return False

    def _cut_tails(self) -> None:
        with _writing(self.path):
            if self.cut_bytes:
                self._cut(CHAIN, self._ends[CHAIN])
            for kind in LINES:
                size = self._size(kind.FILE) or 0
                tail = self._read(kind.FILE, max(0, size - LINE_MAX_BYTES), LINE_MAX_BYTES)
                torn = len(tail) - (tail.rfind(b"\n") + 1)
                if torn:
                    self._cut(kind.FILE, size - torn)

    def _read_job(self) -> Envelope:
        data = self._read("job.record", 0, _FRAME_MAX_BYTES)
        try:
            envelope = Envelope.from_bytes(data, TrainJob.MAX_BYTES)
            open_record(envelope, TrainJob, envelope.network)
        except BadRecord as error:
            raise FolderDamaged(
                f"{self.path / 'job.record'} is not a signed job: {error} Restore it from a copy."
            ) from error
        return envelope

    def _describe_job(self) -> str:
        try:
            envelope = self._read_job()
            job = open_record(envelope, TrainJob, envelope.network)
        except (FolderDamaged, FolderUnreadable):
            return "a job that cannot be read"
        return f"job {job.name} ({envelope.record_id.hex()[:8]})"


# --- frames ---------------------------------------------------------------------------------------------------------


def _sum(position: int, durable: int, payload: bytes) -> bytes:
    return blake3_hash(position.to_bytes(8, "big") + bytes((durable,)) + payload)[:8]


def _frame(position: int, durable: bool, payload: bytes) -> bytes:
    return _FRAME.pack(_MARK, durable, len(payload), _sum(position, durable, payload)) + payload


def _parse_frame(window: bytes, offset: int, position: int) -> tuple[bool, bytes] | None:
    """Whether the frame at `offset` of the window is durable, and its payload; None when no intact frame is there.
    `position` is where the frame starts in the file."""
    if len(window) - offset < _FRAME.size:
        return None
    mark, durable, length, check = _FRAME.unpack_from(window, offset)
    if mark != _MARK or durable > 1 or length > RECORD_BODY_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES:
        return None
    payload = window[offset + _FRAME.size : offset + _FRAME.size + length]
    if len(payload) < length or _sum(position, durable, payload) != check:
        return None
    return bool(durable), payload


def _moment(line: Line) -> float:
    return float(line.stop_s if isinstance(line, LaneSegment) else getattr(line, "time_s", 0.0))


# --- the file system ------------------------------------------------------------------------------------------------


def _is_own(name: str) -> bool:
    scratch = re.fullmatch(r"\.(.+)\.(new|\d+)", name)  # `.new` as it is written here, a number by process so-and-so
    if scratch is not None:
        return scratch[1] in _OWN_NAMES or scratch[1] == CHAIN.replace("/", ".")
    return name in _OWN_NAMES or name in (_REPLACED, _GONE)


def _take_lock(path: Path, disk: Disk) -> DiskLock:
    """Hold the folder for this process. Raises FolderLocked."""
    with _writing(path):
        try:
            lock = disk.lock(LOCK)
        except BlockingIOError as error:
            holder = pid_in_lock(path)
            raise FolderLocked(
                f"A driver is running in {path}{f' (process {holder})' if holder is not None else ''}; wait for it, "
                "stop it, or choose another name."
            ) from error
        sign_lock(disk)
    return lock


def _remove_empty(path: Path) -> None:
    """Remove a folder in which there is nothing but the lock that is held here."""
    with contextlib.suppress(OSError):
        if [entry.name for entry in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink()
            path.rmdir()


def _clear(path: Path, keep: str = "") -> None:
    """Remove what is left of a run that never began."""
    for entry in path.iterdir():
        if entry.name in (LOCK, _REPLACED, _GONE, keep):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _set_aside(path: Path) -> None:
    """Keep a run until the one that replaces it has begun. job.record goes last: where it lies, the rest does too."""
    aside = path / _REPLACED
    aside.mkdir()
    entries = [entry for entry in path.iterdir() if entry.name not in (LOCK, _REPLACED)]
    for entry in sorted(entries, key=lambda entry: entry.name == "job.record"):
        entry.rename(aside / entry.name)


def intact_end(path: Path) -> int:
    """Where the intact frames of a folder's records end, be it a whole run folder or not."""
    return max((end for end, _ in records_after(path, 0)), default=0)


def cut_torn(path: Path) -> None:
    """Cut what is behind the intact frames of a folder's records, be it a whole run folder or not. Raises OSError."""
    folder, end = RunFolder(path, DirectoryDisk(path), None), intact_end(path)
    if end < (folder._size(CHAIN) or 0):
        folder._cut(CHAIN, end)


def records_after(path: Path, position: int) -> Iterator[tuple[int, Envelope]]:
    """The records of a folder, be it a whole one or not, from where one of them begins: where each ends, and what it
    is."""
    for end, payload in RunFolder(path, DirectoryDisk(path), None)._frames(start=position):
        yield end, Envelope.from_bytes(payload, RECORD_BODY_MAX_BYTES)


def is_unsettled(path: Path) -> bool:
    """Whether a run was set aside in a folder and not yet given up or put back, which opening it for writing does."""
    return (path / _REPLACED).exists()


def _settle_replaced(path: Path, disk: Disk) -> None:
    """Of a run that was set aside and the one in its place keep the newer that has begun; after a kill at any moment,
    too."""
    aside, gone = path / _REPLACED, path / _GONE
    if gone.exists():
        shutil.rmtree(gone)
    if not aside.exists():
        return
    begun, kept = disk.info("job.record") is not None, disk.info(f"{_REPLACED}/job.record") is not None
    if begun and kept:
        aside.rename(gone)
        shutil.rmtree(gone)
        return
    if kept:
        _clear(path)
    for entry in sorted(aside.iterdir(), key=lambda entry: entry.name != "job.record"):
        entry.rename(path / entry.name)
    aside.rmdir()


def _write_failure(path: Path, error: OSError) -> FolderWriteFailed:
    if error.errno in _NO_ROOM:
        return FolderWriteFailed(f"There is no room left on the disk under {path}; make room, then {_go_on(path)}.")
    return FolderWriteFailed(f"{path} cannot be written: {error.strerror}.")


def _go_on(path: Path) -> str:
    return "use --resume" if (path / "job.record").exists() else "begin again"


@contextlib.contextmanager
def saying_room(path: Path) -> Iterator[None]:
    """Of a full disk, whichever file beneath a run folder met it, it is said which folder needs room and what to do
    then. Raises FolderWriteFailed."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _write_failure(path, error) from error
        raise
    except StorageFull as error:
        raise FolderWriteFailed(
            f"There is no room left for the blobs of {path}; make room, then {_go_on(path)}. {error.sentence}"
        ) from error


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
