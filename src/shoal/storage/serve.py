"""Answering peers who ask for blobs."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
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
READS_SHARED = 64
"""Reads in all from which on only a peer that has none gets one: a few who take their bytes slowly leave room."""
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

    @property
    def reads(self) -> int:
        """Reads under way."""
        return self._reads.total()

    async def read(self, request: Request) -> Body:
        """`blob.read`. Raises UnknownBlob, BadBlobRequest, ServerBusy."""
        asked = decode(BlobRead, request.body, request.version)
        self._find(request.peer, asked.hash)
        if asked.length > READ_MAX_BYTES:
            raise BadBlobRequest(
                f"A read of {format_bytes(asked.length)} was refused: ask for at most {format_bytes(READ_MAX_BYTES)}."
            )
        # The first piece is read before the answer begins, so that a refusal comes instead of a stream.
        stop = asked.offset + asked.length
        first_stop = min(stop, (asked.offset // CHUNK_BYTES + 1) * CHUNK_BYTES)
        with self._admit(request.peer) as place:
            first = await self._read(asked.hash, asked.offset, first_stop - asked.offset)
            return _Placed(self._stream(asked.hash, first, first_stop, stop), place.pop_all())

    async def chunks(self, request: Request) -> Body:
        """`blob.chunks`. Raises UnknownBlob, ServerBusy."""
        asked = decode(BlobChunkList, request.body, request.version)
        self._find(request.peer, asked.hash)
        with self._admit(request.peer) as place, self._discreet(asked.hash):
            chunk_list = await asyncio.to_thread(self._store.chunk_list, asked.hash)
            return _Placed(self._stream(asked.hash, chunk_list, 0, 0), place.pop_all())

    def _find(self, peer: bytes, hash: bytes) -> None:
        if not self._store.has(hash) or (self._allow is not None and not self._allow(peer, hash)):
            raise UnknownBlob(f"Blob {hash.hex()[:12]} is not held here for {short_id(peer)}.")

    def _admit(self, peer: bytes) -> ExitStack:
        """A place, taken before the first byte is read; closing it gives the place back. Raises ServerBusy."""
        own, total = self._reads[peer], self.reads
        if own >= READS_PER_PEER or total >= (READS_SHARED if own else READS_IN_ALL):
            raise ServerBusy(
                f"{own} reads for {short_id(peer)} and {total} in all are under way here; "
                f"ask again in a moment, or ask another holder."
            )
        self._reads[peer] += 1
        place = ExitStack()
        place.callback(self._leave, peer)
        return place

    def _leave(self, peer: bytes) -> None:
        self._reads[peer] -= 1
        if not self._reads[peer]:
            del self._reads[peer]

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

    async def _stream(self, hash: bytes, piece: bytes, at: int, stop: int) -> AsyncGenerator[bytes, None]:
        """`piece`, then the bytes [at, stop) of the blob."""
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


class _Placed:
    """A stream that gives its place back however it ends: a generator's `finally` does not run when it never began."""

    def __init__(self, parts: AsyncGenerator[bytes, None], place: ExitStack) -> None:
        self._parts = parts
        self._place = place

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._parts)
        except BaseException:
            self._place.close()
            raise

    async def aclose(self) -> None:
        self._place.close()
        await self._parts.aclose()

    def __del__(self) -> None:
        self._place.close()
