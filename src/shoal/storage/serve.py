"""Answering peers who ask for blobs."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from shoal.errors import StorageError
from shoal.identity import short_id
from shoal.protocol.blobs import CHUNK_BYTES, BlobChunkList, BlobRead
from shoal.protocol.messages import decode
from shoal.quantities import format_bytes
from shoal.storage.faults import DiskFailed
from shoal.storage.store import BadBlobRequest, BlobCorrupt, BlobStore, UnknownBlob
from shoal.world import Body, Endpoint, Request

READ_MAX_BYTES = 16 * CHUNK_BYTES
"""Most bytes that one `blob.read` may ask for."""
READS_PER_PEER = 32
"""Reads under way for one peer; each holds at most one piece in memory."""
READS_IN_ALL = 128
"""Reads under way for all peers together."""
PART_BYTES = 1 << 18
"""A stream is handed to the link in parts of this size."""

_log = logging.getLogger(__name__)

Allow: TypeAlias = Callable[[bytes, bytes], bool]
"""allow(peer's NodeId, blob's hash): whether this peer may read this blob."""


class ServerBusy(StorageError):
    """This node already serves as many reads as it does at a time; ask again in a moment, or another holder."""

    code = "SH-411"


def serve(endpoint: Endpoint, store: BlobStore, allow: Allow | None = None) -> BlobServer:
    """Answer `blob.read` and `blob.chunks` on every link of `endpoint`, whoever opened it.

    A peer that `allow` turns away hears what it would hear if the blob were not here.
    """
    server = BlobServer(store, allow)
    endpoint.handle(BlobRead.KIND, server.read)
    endpoint.handle(BlobChunkList.KIND, server.chunks)
    return server


class BlobServer:
    """The handlers, and how much they have served."""

    def __init__(self, store: BlobStore, allow: Allow | None) -> None:
        self._store = store
        self._allow = allow
        self._reads: Counter[bytes] = Counter()
        self.bytes_served = 0
        """Bytes of blobs handed to links since the start."""

    async def read(self, request: Request) -> Body:
        """`blob.read`. Raises UnknownBlob, BadBlobRequest, ServerBusy."""
        asked = decode(BlobRead, request.body, request.version)
        self._admit(request.peer, asked.hash)
        if asked.length > READ_MAX_BYTES:
            raise BadBlobRequest(
                f"A read of {format_bytes(asked.length)} was refused: ask for at most {format_bytes(READ_MAX_BYTES)}."
            )
        # The first piece is read before the answer begins, so that a refusal comes instead of a stream.
        stop = asked.offset + asked.length
        first_stop = min(stop, (asked.offset // CHUNK_BYTES + 1) * CHUNK_BYTES)
        first = await self._read(asked.hash, asked.offset, first_stop - asked.offset)
        return self._stream(request.peer, asked.hash, first, first_stop, stop)

    async def chunks(self, request: Request) -> Body:
        """`blob.chunks`. Raises UnknownBlob, ServerBusy."""
        asked = decode(BlobChunkList, request.body, request.version)
        self._admit(request.peer, asked.hash)
        with self._discreet(asked.hash):
            chunk_list = await asyncio.to_thread(self._store.chunk_list, asked.hash)
        return self._stream(request.peer, asked.hash, chunk_list, 0, 0)

    def _admit(self, peer: bytes, hash: bytes) -> None:
        if not self._store.has(hash) or (self._allow is not None and not self._allow(peer, hash)):
            raise UnknownBlob(f"Blob {hash.hex()[:12]} is not held here for {short_id(peer)}.")
        if self._reads[peer] >= READS_PER_PEER or self._reads.total() >= READS_IN_ALL:
            raise ServerBusy(
                f"{self._reads[peer]} reads for {short_id(peer)} and {self._reads.total()} in all are under way here; "
                f"ask again in a moment, or ask another holder."
            )

    async def _read(self, hash: bytes, offset: int, length: int) -> bytes:
        with self._discreet(hash):
            return await asyncio.to_thread(self._store.read, hash, offset, length)

    @contextmanager
    def _discreet(self, hash: bytes) -> Iterator[None]:
        """A fault of our disk is for our log; the peer hears that the blob is not here, and nothing of our paths."""
        try:
            yield
        except (UnknownBlob, BlobCorrupt, DiskFailed) as error:
            _log.warning("%s %s", error.code, error)
            raise UnknownBlob(f"Blob {hash.hex()[:12]} is no longer held here.") from error

    async def _stream(self, peer: bytes, hash: bytes, piece: bytes, at: int, stop: int) -> AsyncIterator[bytes]:
        """`piece`, then the bytes [at, stop) of the blob."""
        self._reads[peer] += 1
        try:
            while True:
                for offset in range(0, len(piece), PART_BYTES):
                    part = piece[offset : offset + PART_BYTES]
                    self.bytes_served += len(part)
                    yield part
                if at >= stop:
                    return
                length = min(CHUNK_BYTES, stop - at)
                piece = await self._read(hash, at, length)
                at += length
        finally:
            self._reads[peer] -= 1
            if not self._reads[peer]:
                del self._reads[peer]
