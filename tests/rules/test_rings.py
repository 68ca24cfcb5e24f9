"""Work of a ring that nobody waits for any more."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from shoal.gateway.rings import LimitedRing, RingRefused
from shoal.inference.commands import Advance, Advanced
from shoal.protocol.serving import Choosing


class ClosingRing(LimitedRing):
    """Refuses what is under way, once it is told to."""

    closed: asyncio.Event

    async def _through(self, piece: Advance) -> Advanced:
        await self.closed.wait()
        raise RingRefused("The session was closed.")


def test_what_a_stream_that_was_cancelled_had_under_way_is_not_reported() -> None:
    """As when a client hangs up: its session is closed, and the stage says so of what came before."""
    reported: list[dict[str, Any]] = []

    async def scene() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        ring = ClosingRing("here", stages=1, token_ms=1.0)
        ring.closed = asyncio.Event()
        asking = asyncio.create_task(ring.advance(Advance(session=1, start=0, tokens=(1,), sampling=Choosing())))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        ring.closed.set()
        for _ in range(5):
            await asyncio.sleep(0)
        gc.collect()

    asyncio.run(scene())
    assert reported == []
