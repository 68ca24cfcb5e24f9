"""The process that drives a hosted job, and how its node speaks to it: a line of JSON each way for each word.

The node writes DriverOrders first, with the secrets that a command line would show; then what it hears of the hosts
that stand by. The process says how it gets on. It ends with its node, and with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from shoal.identity import NodeId
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.driving import DriveBegin

LINE_MAX_BYTES = 1 << 20
STOP_S = 60.0
"""So long it has to stop in order: it pays its nodes, and writes down what it knows."""
LOG_MAX_BYTES = 16 << 20


class DriverOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What it is to drive, and as which of the job's hosts."""

    begin: DriveBegin
    node: NodeId
    listen: str | None
    """Where it accepts links of nodes that cannot be dialled."""
    network: str
    storage_bytes: int
    """For the blobs of its job."""
    gone: tuple[NodeId, ...] = ()
    """Hosts that were not heard for long: as members they are not waited for."""
    alone: bool = False
    """All members have been silent for so long that they are not waited for any more."""


class _Word(msgspec.Struct, frozen=True, tag_field="says", tag=str.lower):
    pass


class Began(_Word, frozen=True):
    """It drives, in this term."""

    term: int


class Committed(_Word, frozen=True):
    """So far the records go now; who holds the job's blobs."""

    chain_bytes: int
    holders: tuple[BlobHolder, ...] = ()


class Ended(_Word, frozen=True):
    """The job is over, and its report written."""

    sentence: str


class Failed(_Word, frozen=True):
    """It cannot drive."""

    code: str
    sentence: str


Said: TypeAlias = Began | Committed | Ended | Failed


class Mirrored(_Word, frozen=True):
    """From so far in the records all hosts could drive that stand by and are in touch, and which those are."""

    chain_bytes: int
    hosts: tuple[NodeId, ...]


class StopDriving(_Word, frozen=True):
    """In order."""


Told: TypeAlias = Mirrored | StopDriving


class DriverProcess:
    """One of them, as its node sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Use `start`."""
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str], folder: Path, orders: DriverOrders, log: Path) -> DriverProcess:
        """Raises OSError."""
        mode = "ab" if not log.exists() or log.stat().st_size < LOG_MAX_BYTES else "wb"
        with log.open(mode) as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *command, str(folder), str(os.getpid()), stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, stderr=errors, limit=LINE_MAX_BYTES,
                start_new_session=True,  # Ctrl-C is for the node, which then stops it in order
            )  # fmt: skip
        one = cls(process)
        one._write(orders)
        return one

    @property
    def pid(self) -> int:
        return self._process.pid

    async def words(self) -> AsyncIterator[Said]:
        """Until it has ended."""
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
                yield msgspec.json.decode(line, type=Said)
            except (ValueError, msgspec.DecodeError):
                break  # its end, or it does not speak as it should
        await self.kill()

    def mirrored(self, far: Mapping[bytes, int]) -> None:
        """From how far in the records the hosts that are in touch could drive."""
        self._write(Mirrored(min(far.values(), default=0), tuple(far)))

    async def stop(self) -> None:
        """In order; after STOP_S at once."""
        self._write(StopDriving())
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()

    def _write(self, word: DriverOrders | Told) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        if not stdin.is_closing():
            stdin.write(msgspec.json.encode(word) + b"\n")
