"""A small file that is always whole: as it was, or as it is written anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from shoal.storage.faults import disk_faults
from shoal.world import Disk

T = TypeVar("T")


def write_whole(disk: Disk, name: str, content: bytes, doing: str) -> None:
    """Durable when this returns. Raises StorageFull, DiskFailed: "While `doing` ..."."""
    scratch = f"{name}.new"
    with disk_faults(disk, doing, len(content)):
        disk.delete(scratch)
        disk.write(scratch, content)
        disk.sync(scratch, naming=False)
        disk.rename(scratch, name)
        disk.sync(name, content=False)


class SharedWriting(Generic[T]):
    """The writings of a file that many change at once: what is decided while one is under way shares the next."""

    def __init__(self, content: T, write: Callable[[T], None]) -> None:
        """`content` is on the disk; `write` is called in a thread, and what it has written is durable."""
        self.content = content
        """What the file says, or is about to say; also where a writing failed, as it may stand on the disk then."""
        self._stored = content
        self._write = write
        self._next: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def store(self, content: T) -> None:
        """Durable when this returns. Raises what `write` does."""
        self.content = content
        if content is self._stored:
            return
        if self._next is None:
            self._next = asyncio.create_task(self._store())
            self._next.add_done_callback(_looked_at)
        await asyncio.shield(self._next)

    async def _store(self) -> None:
        async with self._turn:
            self._next, content = None, self.content
            if content is not self._stored:
                await asyncio.to_thread(self._write, content)
                self._stored = content


def _looked_at(task: asyncio.Task[None]) -> None:
    """Those who waited may be gone; the loop does not report it then."""
    if not task.cancelled():
        task.exception()
