"""Getting blobs from peers into a store: one download per blob, however many wait for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from shoal.protocol.blobs import BlobHolder, BlobRef
from shoal.quantities import Ranges, are_in_order
from shoal.storage.download import Download, FetchReport, Progress
from shoal.storage.partial import check_reference, contradiction
from shoal.storage.pieces import piece_count, pieces_in
from shoal.storage.store import BadBlobRequest, BlobCorrupt, BlobStore, UnknownBlob
from shoal.world import Clock, Dice, Endpoint, Link

DOWNLOADS_AT_ONCE = 8
"""Large blobs under way at a time; further ones wait their turn."""
SMALL_AT_ONCE = 32
"""Blobs of one piece under way at a time; they have places of their own, so that large ones do not hold them up."""

SLOW_AT_ONCE = 32
"""Blobs that came too slowly to keep their place, and go on beside the others."""


BYTES_PER_S_LEAST = 64 * 1024
"""A tenth of a poor home link (5 Mbit/s up): who waits for bytes that come more slowly may give up."""


def patience_s(size: int, least_s: float) -> float:
    """How long to wait for so many bytes, from holders who may have every reason to be slow."""
    return least_s + size / BYTES_PER_S_LEAST


class Fetcher:
    """Gets blobs from their holders into `store`. One per endpoint; close it before the endpoint.

    `fetch` may be called for the same blob any number of times at once: there is one download, and the holders named
    by all callers serve it.
    """

    def __init__(self, endpoint: Endpoint, store: BlobStore, clock: Clock, dice: Dice) -> None:
        self.endpoint = endpoint
        self.store = store
        self.clock = clock
        self.dice = dice
        self._downloads: dict[bytes, Download] = {}
        self._large = asyncio.Semaphore(DOWNLOADS_AT_ONCE)
        self._small = asyncio.Semaphore(SMALL_AT_ONCE)
        self._aside = asyncio.Semaphore(SLOW_AT_ONCE)
        endpoint.on_link(self._link_up)

    async def fetch(
        self,
        ref: BlobRef,
        holders: Sequence[BlobHolder] = (),
        progress: Progress | None = None,
        *,
        owner: str | None = None,
        ranges: Ranges = (),
    ) -> FetchReport:
        """Get a blob into the store, verified; nothing is asked of anyone when it is there already. With `ranges` only
        the pieces in which these bytes lie: `BlobStore.part` says where they are.

        A holder with an open link is asked over that link, whether or not it can be dialled. With `owner` the blob is
        pinned under that name before the first byte comes; only a pin keeps a part from eviction. When it fails, what
        has come stays for the next attempt. Whoever wants more of a blob than is on its way waits for that first.

        Raises FetchFailed, naming what every holder did; BadReference when the reference contradicts itself;
        StorageFull before anything is fetched when there is no room (a blob of one piece: before it is kept);
        BadBlobRequest for ranges that are not inside the blob.
        """
        check_reference(ref)
        if not are_in_order(ranges, ref.size):
            raise BadBlobRequest(f"Blob {ref.hash.hex()[:12]} has {ref.size} bytes; ranges lie outside, or overlap.")
        wanted = pieces_in(ranges, ref.size)
        if owner is not None:
            await asyncio.to_thread(self.store.pin, owner, ref.hash)
        while True:
            if self.store.has(ref.hash):
                with contextlib.suppress(BlobCorrupt, UnknownBlob):  # what was here is lost: fetch it
                    await self._check_held(ref)
                    return FetchReport({})
            download = self._downloads.get(ref.hash)
            if download is None:
                download = Download(ref, wanted, self.endpoint, self.store, self.clock, self.dice)
                self._downloads[ref.hash] = download
                places = self._small if piece_count(ref.size) <= 1 else self._large
                download.start(places, self._aside, lambda: self._downloads.pop(ref.hash, None))
            same = (download.ref.size, download.ref.chunks) == (ref.size, ref.chunks)
            if not download.cancelled and same and not wanted - download.wanted:
                return await download.join(holders, progress)
            # It is stopping, or brings less, or gives the same hash another size: at most one of the two is right.
            await download.ended()

    async def _check_held(self, ref: BlobRef) -> None:
        held = await asyncio.to_thread(self.store.ref, ref.hash)
        if held.size != ref.size:
            raise contradiction(ref, f"it says {ref.size} bytes, the blob has {held.size}")
        if ref.chunks is not None and held.chunks is not None and held.chunks != ref.chunks:
            raise contradiction(ref, "the blob is here, and its pieces have other hashes than `chunks` names")

    def _link_up(self, link: Link) -> None:
        for download in self._downloads.values():
            download.link_up(link.peer)

    async def close(self) -> None:
        """Stop all downloads; what has come stays for a later fetch."""
        for download in list(self._downloads.values()):
            await download.cancel()
