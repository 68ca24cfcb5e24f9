"""Blobs: immutable bytes named by their BLAKE3 hash, kept on a bounded disk, fetched from several peers at once.

`BlobStore` keeps them: whole or absent, pinned under an owner's name or evicted when room is needed.
`serve` answers peers who ask for them, `Fetcher` gets them from peers, piece by piece, resumable after a break.

What holds, always:
- A blob is visible only with all of its bytes, whatever moment the process was killed at.
- No byte of a peer is kept, and none of ours is sent, that was not compared with a hash on the way.
- A store never takes more than its capacity; what is pinned is never evicted; a blob without room is refused whole.
- Whoever served wrong bytes is named and dropped for that download; a reference that contradicts itself blames nobody.
"""

from shoal.storage.download import FetchFailed, FetchProgress, FetchReport
from shoal.storage.faults import DiskFailed, StorageFull
from shoal.storage.fetch import BYTES_PER_S_LEAST, Fetcher, patience_s
from shoal.storage.find import find_blob
from shoal.storage.partial import BadPiece, BadReference
from shoal.storage.pieces import hash_pieces, part_bytes
from shoal.storage.serve import BlobServer, ServerBusy, serve
from shoal.storage.store import (
    BadBlobRequest,
    BlobCorrupt,
    BlobPinned,
    BlobStore,
    CannotAdopt,
    Holding,
    StoreInUse,
    UnknownBlob,
    charge,
)

__all__ = [
    "BYTES_PER_S_LEAST",
    "BadBlobRequest",
    "BadPiece",
    "BadReference",
    "BlobCorrupt",
    "BlobPinned",
    "BlobServer",
    "BlobStore",
    "CannotAdopt",
    "DiskFailed",
    "FetchFailed",
    "FetchProgress",
    "FetchReport",
    "Fetcher",
    "Holding",
    "ServerBusy",
    "StorageFull",
    "StoreInUse",
    "UnknownBlob",
    "charge",
    "find_blob",
    "hash_pieces",
    "part_bytes",
    "patience_s",
    "serve",
]
