"""Copies of a run folder on other machines: what the next driver goes on from, and what an owner who is away looks at.

Files of a run folder either only grow (the records, the lines about them) or are replaced as a whole. `missing` says
what somebody lacks who has so much of each; `Copy` takes that in. Nothing here has to be believed: records carry
signatures, and whoever opens a folder verifies them; what its owner made is replaced by nobody, and nothing comes that
a machine would run. What is left to a sender is to waste the room that it was given, or to send less than there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from blake3 import blake3

from shoal.driver.folder import CHAIN, cut_torn
from shoal.driver.lines import LINES
from shoal.errors import BadRecord
from shoal.protocol.driving import FILES_MAX, PIECE_BYTES, FileThere, Piece
from shoal.world import DirectoryDisk

TAIL_BYTES = 4096
ANSWER_BYTES = 3 * PIECE_BYTES
"""Of files in one answer."""
_GROWING = (CHAIN, *(line.FILE for line in LINES))
_FIRST = ("job.yaml", "job.record", "owner.json")
_AFTER = ("payments.json", "figures.json")
_LAST = ("report.json",)
"""Where this is, the run is over: it comes last. The page is made of it where it is looked at."""
_DATA = "data/"
_BESIDE = re.compile(
    r"(data/heldout-[0-9]{5}\.tokens"
    r"|(data/tokenizer|model)/[A-Za-z0-9][A-Za-z0-9._-]{0,55}\.(json|safetensors|txt|model|jinja))\Z"
)
"""What libraries read as data: no code, and no pickle, wherever a model or a tokenizer is said to have some."""
_SCRATCH = "local/copy"


class BadCopy(BadRecord):
    """Pieces of a run folder came that do not belong there, or do not fit what is there."""

    code = "SH-264"


def size_of(folder: Path) -> int:
    """Bytes of all files that a copy would have."""
    disk = DirectoryDisk(folder)
    return sum(info.size for name in _names(disk) if (info := disk.info(name)) is not None)


def missing(folder: Path, there: Sequence[FileThere]) -> tuple[list[Piece], bool]:
    """What somebody lacks who has these, as far as it fits into one answer; and whether there is more."""
    disk = DirectoryDisk(folder)
    known = {one.name: one for one in there}
    pieces, room = list[Piece](), ANSWER_BYTES
    names = _names(disk)
    ends = {name: _size(disk, name) for name in names if name in _GROWING and name != CHAIN}
    """Lines go no further than they did before the records were read: none tells of a record that is not there."""
    for name in names:
        for piece in _pieces(disk, name, known.get(name), ends.get(name)):
            if len(piece.data) > room:
                return pieces, True
            pieces.append(piece)
            room -= len(piece.data)
    return pieces, False


def _names(disk: DirectoryDisk) -> list[str]:
    """In the order in which they are copied: at every moment a copy is a folder as it was, or could have been."""
    beside = [one.name for directory in ("data", "model") for one in disk.files(directory) if _BESIDE.match(one.name)]
    data, model = ([name for name in beside if name.startswith(start)] for start in ("data/", "model/"))
    order = (*_FIRST, *data, *_GROWING, *_AFTER, *model, *_LAST)
    return [name for name in order if disk.info(name) is not None][:FILES_MAX]


def _size(disk: DirectoryDisk, name: str) -> int:
    info = disk.info(name)
    return info.size if info is not None else 0


def _pieces(disk: DirectoryDisk, name: str, there: FileThere | None, end: int | None) -> Iterator[Piece]:
    """Of a file that grows only up to `end`, where that is said."""
    if name in _GROWING:
        yield from _growth(disk, name, there, _size(disk, name) if end is None else end)
        return
    size, digest = _whole(disk, name)
    if there is not None and (there.size, there.hash) == (size, digest):
        return
    coming = there is not None and there.hash == b"" and there.size < size  # else it has become shorter meanwhile
    at = there.size if there is not None and coming else 0
    while at < size or (at == 0 and size == 0):
        data = disk.read(name, at, PIECE_BYTES)
        yield Piece(name, at, data, size, digest)
        at += len(data)
        if not data:
            return


def _growth(disk: DirectoryDisk, name: str, there: FileThere | None, end: int) -> Iterator[Piece]:
    at = there.size if there is not None else 0
    anew = there is None or _tail_hash(disk, name, at) != there.hash  # its end was lost here, and written anew
    if anew:
        at = 0
    while (data := disk.read(name, at, min(PIECE_BYTES, max(0, end - at)))) or anew:
        anew = False
        yield Piece(name, at, data, end)
        at += len(data)


def _tail_hash(disk: DirectoryDisk, name: str, size: int) -> bytes:
    start = max(0, size - TAIL_BYTES)
    return blake3(disk.read(name, start, size - start)).digest()


def _whole(disk: DirectoryDisk, name: str) -> tuple[int, bytes]:
    info = disk.info(name)
    if info is not None and info.size > PIECE_BYTES:
        return _large(disk.place, name, info.modified_ns)
    return _hashed(disk, name)


@lru_cache(maxsize=4 * FILES_MAX)
def _large(place: str, name: str, modified_ns: int) -> tuple[int, bytes]:
    """A model is asked for in many pieces, and does not change; a small file may, twice between two ticks of a disk's
    clock."""
    return _hashed(DirectoryDisk(Path(place)), name)


def _hashed(disk: DirectoryDisk, name: str) -> tuple[int, bytes]:
    hasher, at = blake3(), 0
    while data := disk.read(name, at, PIECE_BYTES):
        hasher.update(data)
        at += len(data)
    return at, hasher.digest()


class Copy:
    """A folder that follows another one. One process at a time may write to it."""

    def __init__(self, folder: Path, size_max: int, *, begun: bool) -> None:
        """`begun`: what the job's owner made is here, and stays as it is, whoever sends. Raises OSError."""
        self.folder = folder
        self._disk = DirectoryDisk(folder)
        self._size_max, self._begun = size_max, begun
        self._coming: dict[str, tuple[int, int, bytes]] = {}
        """Files of which not all is there: how much is, of how much, with which hash."""
        self._anew: dict[str, int] = {}
        """Files that grow and are copied once more from their beginning, and how far that has to come."""
        self._have: dict[str, FileThere] = {}
        self._names = set[str]()
        """Of files that are here, or of which something has come."""
        for info in self._disk.files(_SCRATCH):
            self._disk.delete(info.name)
        if self._disk.info(CHAIN) is not None:
            cut_torn(folder)  # who was killed may have left half a record
        for name in _names(self._disk):
            self._names.add(name)
            self._note(name)

    @property
    def there(self) -> tuple[FileThere, ...]:
        """For FolderAsk."""
        coming = [FileThere(name, at, b"") for name, (at, _, _) in self._coming.items()]
        coming += [_grown(self._disk, name, _scratch(name)) for name in self._anew]
        under_way = self._coming.keys() | self._anew.keys()
        return (*(one for name, one in self._have.items() if name not in under_way), *coming)

    def take(self, pieces: Sequence[Piece]) -> None:
        """Returns once they are on the disk. Raises BadCopy, OSError."""
        touched = dict[str, None]()
        try:
            for piece in pieces:
                self._take(piece)
                if piece.name not in self._coming and piece.name not in self._anew:
                    touched[piece.name] = None
        finally:
            for name in touched:
                self._disk.sync(name)
                self._note(name)

    def _take(self, piece: Piece) -> None:
        if self._begun and (piece.name in _FIRST or piece.name.startswith(_DATA)):
            raise BadCopy(f"A copy of a run folder was sent another {piece.name} than the job's owner made.")
        if piece.name not in self._names and len(self._names) >= FILES_MAX:
            raise BadCopy(f"A copy of a run folder was sent more than the {FILES_MAX} files that it may have.")
        if piece.name in _GROWING:
            self._grow(piece)
        elif piece.name in (*_FIRST, *_AFTER, *_LAST) or _BESIDE.match(piece.name):
            self._fill(piece)
        else:
            raise BadCopy(f"A copy of a run folder was sent {piece.name!r}, which is no file of one.")
        self._names.add(piece.name)

    def _grow(self, piece: Piece) -> None:
        if piece.offset == 0 and _size(self._disk, piece.name):  # which stays until what is there is here as well
            self._anew[piece.name] = piece.size
            self._disk.delete(_scratch(piece.name))
        target = _scratch(piece.name) if piece.name in self._anew else piece.name
        size = _size(self._disk, target)
        if piece.offset != size:
            raise BadCopy(f"{piece.name} has {size} bytes here, and what comes begins at {piece.offset}.")
        self._make_room(len(piece.data))
        self._disk.write(target, piece.data, piece.offset)
        if target != piece.name and size + len(piece.data) >= self._anew[piece.name]:
            self._disk.sync(target)
            self._disk.rename(target, piece.name)
            del self._anew[piece.name]

    def _fill(self, piece: Piece) -> None:
        scratch = _scratch(piece.name)
        at, size, digest = self._coming.get(piece.name, (0, piece.size, piece.hash))
        if (size, digest) != (piece.size, piece.hash) or piece.offset == 0:
            at, size, digest = 0, piece.size, piece.hash
            self._disk.delete(scratch)
        if piece.offset != at:
            self._coming.pop(piece.name, None)
            raise BadCopy(f"{piece.name} has come up to byte {at}, and what comes begins at {piece.offset}.")
        self._make_room(len(piece.data))
        self._disk.write(scratch, piece.data, at)
        at += len(piece.data)
        self._coming[piece.name] = at, size, digest
        if at < size:
            return
        del self._coming[piece.name]
        if _whole(self._disk, scratch) != (size, digest):
            self._disk.delete(scratch)
            raise BadCopy(f"{piece.name} did not come as it was announced; it is asked for again.")
        self._disk.sync(scratch)
        self._disk.rename(scratch, piece.name)

    def _make_room(self, size: int) -> None:
        coming = sum(at for at, _, _ in self._coming.values())
        anew = sum(_size(self._disk, _scratch(name)) for name in self._anew)
        if sum(one.size for one in self._have.values()) + coming + anew + size > self._size_max:
            raise BadCopy(f"A copy of a run folder has grown to more than the {self._size_max} bytes it may have.")

    def _note(self, name: str) -> None:
        grows = name in _GROWING
        self._have[name] = _grown(self._disk, name, name) if grows else FileThere(name, *_whole(self._disk, name))


def _scratch(name: str) -> str:
    return f"{_SCRATCH}/{name.replace('/', '.')}"


def _grown(disk: DirectoryDisk, name: str, where: str) -> FileThere:
    size = _size(disk, where)
    return FileThere(name, size, _tail_hash(disk, where, size))
