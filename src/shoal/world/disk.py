"""The disk: named files under one root, written at offsets, renamed at once.

Names are relative POSIX paths such as `blobs/ab12`. Every call is complete in itself (no handle stays open), blocks,
and may be made from any thread. What fails is an `OSError` with the errno of the operating system, whatever the
implementation: FileNotFoundError for a name that is not there, ENOSPC when the disk is full.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from typing_extensions import Buffer

NAME_MAX_BYTES = 1024
"""Longest name of a file, directories included."""


@dataclass(frozen=True)
class FileInfo:
    """A file as the disk sees it."""

    name: str
    size: int
    """Bytes."""
    modified_ns: int
    """When its bytes last changed, in nanoseconds of the disk's own clock; only good for telling that they did."""


class DiskLock(Protocol):
    """A name held by this process alone, until it is released or the process ends in whatever way."""

    def release(self) -> None: ...


class Disk(Protocol):
    @property
    def place(self) -> str:
        """Where this is, for error sentences."""
        ...

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes [offset, offset + length) of a file, fewer where it ends before; to its end without `length`."""
        ...

    def write(self, name: str, data: Buffer, offset: int = 0) -> None:
        """Write at `offset`, making the file (and its directories) where there is none; a gap before it reads as zeros.

        On ENOSPC a part of the data may have been written.
        """
        ...

    def bring(self, source: Path, name: str) -> None:
        """Give the file `source` of this machine the name `name` here too: a hard link where possible, else a copy.

        Raises FileExistsError where `name` is taken.
        """
        ...

    def rename(self, old: str, new: str) -> None:
        """Rename a file, replacing `new`; at every moment `new` is either what it was or what `old` is."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file. One that is not there is no error."""
        ...

    def info(self, name: str) -> FileInfo | None:
        """A file's size and time, None where there is no such file."""
        ...

    def files(self, directory: str) -> list[FileInfo]:
        """All files in `directory` and below it, sorted by name; empty where there is no such directory."""
        ...

    def sync(self, name: str, *, content: bool = True, naming: bool = True) -> None:
        """Return when what was written to `name` and its naming would survive a loss of power; or one of the two, where
        the other is not needed: each takes the disk some time."""
        ...

    def free_bytes(self) -> int:
        """Bytes that can still be written."""
        ...

    def path(self, name: str) -> Path | None:
        """Where the operating system finds a file, for readers such as mmap; None where it does not (memory)."""
        ...

    def lock(self, name: str) -> DiskLock:
        """Hold `name` for this process alone. Raises BlockingIOError when it is held already."""
        ...


def _checked(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or len(name.encode()) > NAME_MAX_BYTES:
        raise ValueError(f"{name!r} is not the name of a file on a disk: a relative path without '..' is expected.")
    return name


class DirectoryDisk:
    """A directory of the machine's file system, made (for its owner only) where there is none."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._root = root.resolve()

    @property
    def place(self) -> str:
        return str(self._root)

    def path(self, name: str) -> Path:
        return self._root / _checked(name)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self.path(name).open("rb", buffering=0) as file:
            left = max(0, os.fstat(file.fileno()).st_size - offset)
            left = left if length is None else min(left, length)
            file.seek(offset)
            first = file.read(left)
            if len(first) == left:
                return first
            parts = [first]  # a single read gives at most 2 GiB, and less at the end of a file that is being cut
            while parts[-1]:
                left -= len(parts[-1])
                parts.append(file.read(left))
            return b"".join(parts)

    def write(self, name: str, data: Buffer, offset: int = 0) -> None:
        path = self.path(name)
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, flags, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            file.seek(offset)
            view = memoryview(data).cast("B")
            while view:
                view = view[file.write(view) :]

    def bring(self, source: Path, name: str) -> None:
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        source = source.resolve(strict=True)
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            shutil.copyfile(source, target)

    def rename(self, old: str, new: str) -> None:
        target = self.path(new)
        try:
            self.path(old).replace(target)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path(old).replace(target)

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def info(self, name: str) -> FileInfo | None:
        try:
            status = self.path(name).stat()
        except FileNotFoundError:
            return None
        return FileInfo(name, status.st_size, status.st_mtime_ns)

    def files(self, directory: str) -> list[FileInfo]:
        found = []
        for folder, _, names in os.walk(self.path(directory)):
            for name in names:
                info = self.info((Path(folder) / name).relative_to(self._root).as_posix())
                if info is not None:
                    found.append(info)
        return sorted(found, key=lambda info: info.name)

    def sync(self, name: str, *, content: bool = True, naming: bool = True) -> None:
        path = self.path(name)
        if content or sys.platform == "win32":
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if naming and sys.platform != "win32":
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free

    def lock(self, name: str) -> DiskLock:
        self.write(name, b"")
        return _FileLock(self.path(name))


class _FileLock:
    """An advisory lock that the operating system takes back when the process ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR)
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(self._descriptor), path.stat()):
                    raise FileNotFoundError(path)  # who held it took the file away
        except OSError as error:
            os.close(self._descriptor)
            raise BlockingIOError(errno.EAGAIN, "held by another process", str(path)) from error

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass
class _MemoryFile:
    data: bytearray
    modified_ns: int


class MemoryDisk:
    """Files in memory, at most `capacity_bytes` of them."""

    def __init__(self, capacity_bytes: int = 1 << 30, place: str = "memory") -> None:
        self.capacity_bytes = capacity_bytes
        self._place = place
        self._files: dict[str, _MemoryFile] = {}
        self._locked: set[str] = set()
        self._writes = 0
        self._mutex = threading.RLock()

    @property
    def place(self) -> str:
        return self._place

    def _get(self, name: str) -> _MemoryFile:
        try:
            return self._files[_checked(name)]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._mutex:
            data = self._get(name).data
            end = len(data) if length is None else offset + length
            return bytes(memoryview(data)[offset:end])

    def write(self, name: str, data: Buffer, offset: int = 0) -> None:
        view = memoryview(data).cast("B")
        with self._mutex:
            file = self._files.setdefault(_checked(name), _MemoryFile(bytearray(), 0))
            self._writes += 1
            file.modified_ns = self._writes
            fits = max(0, min(len(view), len(file.data) + self.free_bytes() - offset))
            if fits > 0:
                file.data.extend(bytes(max(0, offset - len(file.data))))
                file.data[offset : offset + fits] = view[:fits]
            if fits < len(view):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    def bring(self, source: Path, name: str) -> None:
        with self._mutex:
            if self.info(name) is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            self.write(name, source.read_bytes())

    def rename(self, old: str, new: str) -> None:
        with self._mutex:
            self._files[_checked(new)] = self._get(old)
            if old != new:
                del self._files[old]

    def delete(self, name: str) -> None:
        with self._mutex:
            self._files.pop(_checked(name), None)

    def info(self, name: str) -> FileInfo | None:
        with self._mutex:
            file = self._files.get(_checked(name))
            return None if file is None else FileInfo(name, len(file.data), file.modified_ns)

    def files(self, directory: str) -> list[FileInfo]:
        with self._mutex:
            inside = _checked(directory).rstrip("/") + "/"
            names = sorted(name for name in self._files if name.startswith(inside))
            return [FileInfo(name, len(self._files[name].data), self._files[name].modified_ns) for name in names]

    def sync(self, name: str, *, content: bool = True, naming: bool = True) -> None:
        with self._mutex:
            self._get(name)

    def free_bytes(self) -> int:
        with self._mutex:
            return max(0, self.capacity_bytes - sum(len(file.data) for file in self._files.values()))

    def path(self, name: str) -> Path | None:
        _checked(name)
        return None

    def lock(self, name: str) -> DiskLock:
        with self._mutex:
            if name in self._locked:
                raise BlockingIOError(errno.EAGAIN, "held already", name)
            self.write(name, b"")
            self._locked.add(name)
        return _MemoryLock(self._locked, name)

    def process_died(self) -> None:
        """Take all locks back, as the operating system does when the process that held them ends."""
        self._locked.clear()


class _MemoryLock:
    def __init__(self, locked: set[str], name: str) -> None:
        self._locked = locked
        self._name = name

    def release(self) -> None:
        self._locked.discard(self._name)


Fault: TypeAlias = Callable[[str, str], None]
"""Called as fault(operation, name) before each operation (`read`, `write`, `bring`, `rename`, `delete`, `sync`), and
once more in the middle of a write, as `write/half`. What it raises is what the disk does then."""


class FaultyDisk:
    """Any disk, with a fault that decides when it fails: a full disk, a broken sector, a power cut at step 17."""

    def __init__(self, disk: Disk, fault: Fault) -> None:
        self._disk = disk
        self._fault = fault

    @property
    def place(self) -> str:
        return self._disk.place

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self._fault("read", name)
        return self._disk.read(name, offset, length)

    def write(self, name: str, data: Buffer, offset: int = 0) -> None:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        self._fault("write", name)
        self._disk.write(name, view[:half], offset)
        self._fault("write/half", name)
        self._disk.write(name, view[half:], offset + half)

    def bring(self, source: Path, name: str) -> None:
        self._fault("bring", name)
        self._disk.bring(source, name)

    def rename(self, old: str, new: str) -> None:
        self._fault("rename", new)
        self._disk.rename(old, new)

    def delete(self, name: str) -> None:
        self._fault("delete", name)
        self._disk.delete(name)

    def info(self, name: str) -> FileInfo | None:
        return self._disk.info(name)

    def files(self, directory: str) -> list[FileInfo]:
        return self._disk.files(directory)

    def sync(self, name: str, *, content: bool = True, naming: bool = True) -> None:
        self._fault("sync", name)
        self._disk.sync(name, content=content, naming=naming)

    def free_bytes(self) -> int:
        return self._disk.free_bytes()

    def path(self, name: str) -> Path | None:
        return self._disk.path(name)

    def lock(self, name: str) -> DiskLock:
        return self._disk.lock(name)
