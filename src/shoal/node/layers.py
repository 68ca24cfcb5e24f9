"""Layers of a model that a node has loaded: fetched, in a child process, tried.

Rings come and go faster than layers are loaded. All rings of one gateway that want the same layers of this node share
one process, and it ends when the last of them lets it go.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from shoal.errors import EngineError, LinkError
from shoal.inference.commands import LoadStage, StageLoaded
from shoal.inference.process import StageProcess
from shoal.models.configs import BadModel
from shoal.models.headers import LENGTH_BYTES, header_part, read_header
from shoal.node.lending import Held, Lending
from shoal.node.member import EngineSettings
from shoal.protocol.blobs import BlobHolder, BlobRef
from shoal.protocol.serving import HOLDERS_MAX, ServeJob
from shoal.quantities import Ranges
from shoal.storage import BlobStore, Fetcher, part_bytes, patience_s

FETCH_PATIENCE_S = 120.0
LOAD_DEADLINE_S = 900.0
HEADER_MAX_BYTES = 16 << 20
"""Of a file: the agent reads it itself. Ten thousand tensors take one or two MiB."""
PIN_PREFIX = "serve-"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Wanted:
    """Which layers of which model, and memory for the sessions that go through them."""

    job_id: bytes
    first: int
    stop: int
    files: tuple[int, ...]
    parts: tuple[Ranges, ...]
    """Which bytes of each of these files; none: the whole file."""
    memory_bytes: int


class Layers:
    """One process with some layers, for as long as somebody uses it."""

    def __init__(
        self,
        wanted: Wanted,
        job: ServeJob,
        holders: Sequence[BlobHolder],
        *,
        name: str,
        store: BlobStore,
        fetcher: Fetcher,
        settings: EngineSettings,
        lending: Lending,
        start_engine: Callable[..., Awaitable[StageProcess]],
    ) -> None:
        self.wanted, self.job = wanted, job
        self._pin = f"{PIN_PREFIX}{wanted.job_id.hex()[:24]}-{next(_numbers)}"
        self._holders = tuple(holders[:HOLDERS_MAX])
        self._name, self._store, self._fetcher, self._settings = name, store, fetcher, settings
        self._lending, self._start_engine = lending, start_engine
        self._users = 0
        self._engine: StageProcess | None = None
        self._loading: asyncio.Task[StageLoaded] | None = None

    @property
    def engine(self) -> StageProcess:
        """Once it is loaded."""
        assert self._engine is not None, "the layers are not loaded yet"
        return self._engine

    @property
    def is_dead(self) -> bool:
        """It cannot be of use to anybody who comes now."""
        loading = self._loading
        failed = loading is not None and loading.done() and (loading.cancelled() or loading.exception() is not None)
        return failed or (self._engine is not None and self._engine.died.done())

    async def loaded(self) -> StageLoaded:
        """Fetched, loaded and tried: once, however many wait. Raises LinkError, EngineError, StorageError, and BadModel
        or NotLent when the headers of the files are known."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        return await asyncio.shield(self._loading)

    async def _load(self) -> StageLoaded:
        blobs = [self.job.files[number].blob for number in self.wanted.files]
        parts = list(zip(blobs, self.wanted.parts, strict=True))
        size = sum(part_bytes(ref, part) for ref, part in parts)
        try:
            async with asyncio.timeout(patience_s(size, FETCH_PATIENCE_S)):
                headers = await asyncio.gather(*(self._header(ref) for ref in blobs))
                weights = 0
                for (ref, part), header in zip(parts, headers, strict=True):  # one at a time: a header may be large
                    read = await asyncio.to_thread(read_header, self._store.part(ref, header), header)
                    weights += read.loaded_bytes(part)
                await self._lending.take(self._pin, Held(self.wanted.job_id, weights, self.wanted.memory_bytes))
                await asyncio.gather(*(self._fetch(ref, part) for ref, part in parts))
        except TimeoutError as error:
            raise LinkError(f"The files of {self.job.name!r} did not come to {self._name} in time.") from error
        self._engine = await self._start_engine(self._name, threads=self._settings.threads)
        command = LoadStage(
            config=self.job.config,
            files=tuple(str(self._store.part(ref, part)) for ref, part in parts),
            parts=self.wanted.parts,
            first=self.wanted.first,
            stop=self.wanted.stop,
            memory_bytes=self.wanted.memory_bytes,
            device=self._settings.device,
            threads=self._settings.threads,
            speed_limit=self._settings.speed_limit,
        )
        try:
            async with asyncio.timeout(LOAD_DEADLINE_S):
                return await self._engine.load(command)
        except TimeoutError as error:
            raise EngineError(f"The layers were not loaded within {LOAD_DEADLINE_S:.0f} s on {self._name}.") from error

    async def _header(self, ref: BlobRef) -> Ranges:
        """Have the header of a file here, and no more; gives where it lies."""
        start: Ranges = ((0, min(ref.size, LENGTH_BYTES)),)
        await self._fetch(ref, start)
        start = header_part(self._store.part(ref, start))
        if start[0][1] > HEADER_MAX_BYTES:
            raise BadModel(f"A file of {self.job.name!r} has a header of more than {HEADER_MAX_BYTES} bytes.")
        await self._fetch(ref, start)
        return start

    async def _fetch(self, ref: BlobRef, part: Ranges) -> None:
        await self._fetcher.fetch(ref, self._holders, owner=self._pin, ranges=part)

    def lend_sessions(self) -> None:
        """Sessions are to go through these layers. Raises NotLent."""
        self._lending.use(self._pin)

    def use(self) -> None:
        self._users += 1

    async def let_go(self) -> None:
        self._users -= 1
        if self._users:
            return
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._engine is not None:
            await self._engine.stop()
        self._store.release(self._pin)
        self._lending.give_back(self._pin)

    @property
    def is_used(self) -> bool:
        return self._users > 0
