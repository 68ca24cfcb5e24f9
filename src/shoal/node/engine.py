"""A whole replica that a node has in a server beside it: kept an eye on, offered while it is up, and spoken to for
gateways."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

from shoal.errors import BadRecord
from shoal.node.openai_server import OpenAiServer, ServerBroke, ServerSettings, ServerUnusable
from shoal.node.stages import echo
from shoal.protocol.engines import EngineAsk, EnginePiece, pack
from shoal.protocol.messages import decode
from shoal.protocol.offers import EngineOffer
from shoal.protocol.serving import LinkEcho
from shoal.world import Body, Clock, Endpoint, Request

LOOK_EVERY_S = 3.0
STREAMS_MAX = 96
"""Continuations under way, of all gateways; a server queues those it cannot compute at once."""
STREAMS_OF_ONE = 64
STILL_HERE_S = 1.0
"""So often a gateway hears of a node whose server has nothing yet: silence is how a dead link shows."""

_log = logging.getLogger("shoal.node")


class NoEngine(BadRecord):
    """A continuation is asked of a node that has no engine for that model, or whose engine is down."""

    code = "SH-273"


class EngineFull(BadRecord):
    """As many continuations are under way at a node's engine as it takes."""

    code = "SH-274"


class EngineHost:
    """What of a node has to do with its server."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        name: str,
        endpoint: Endpoint,
        clock: Clock,
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        """`changed` is called when the server came or went. Raises ServerUnusable."""
        self._server = OpenAiServer(settings, clock)
        self._name, self._endpoint, self._clock, self._changed = name, endpoint, clock, changed
        self._under_way: dict[bytes, int] = {}
        self._looking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.offer: EngineOffer | None = None
        """None while the server is down."""

    async def start(self) -> None:
        """Raises ServerUnusable."""
        self.offer = await self._server.look()
        self._endpoint.handle(EngineAsk.KIND, self._generate)
        self._endpoint.handle(LinkEcho.KIND, echo)
        self._keep(self._watch())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.close()

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        """Whether the server is still there, or again; one that came back may be another, and is tried anew."""
        async with self._looking:
            before = self.offer
            try:
                if before is None:
                    self.offer = await self._server.look()
                elif before.model not in await self._server.models():
                    raise ServerBroke(f"The engine does not serve {before.model} any more.")
            except (ServerBroke, ServerUnusable) as error:
                self.offer = None
                if before is not None:
                    _log.warning("%s: %s", self._name, error)
            if self.offer != before:
                await self._changed()

    def _keep(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what gateways ask -----------------------------------------------------------------------------------------

    async def _generate(self, request: Request) -> Body:
        ask = decode(EngineAsk, request.body, request.version)
        offer = self.offer
        if offer is None or offer.model != ask.model:
            raise NoEngine(f"Node {self._name} has no engine that serves {ask.model} at the moment.")
        if bool(ask.tokens) == bool(ask.text) or (ask.tokens and not offer.takes_tokens):
            raise NoEngine(
                f"The engine of node {self._name} takes a prompt as {_form(offer)}, and something else came."
            )
        return self._stream(ask, request)

    async def _stream(self, ask: EngineAsk, request: Request) -> AsyncGenerator[bytes]:
        own, total = self._under_way.get(request.peer, 0), sum(self._under_way.values())
        if own >= STREAMS_OF_ONE or total >= STREAMS_MAX:
            raise EngineFull(f"Node {self._name} has {total} continuations under way; ask again in a moment.")
        self._under_way[request.peer] = own + 1
        pieces = self._server.generate(ask)
        coming: asyncio.Future[EnginePiece] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(pieces))
                done, _ = await asyncio.wait({coming}, timeout=STILL_HERE_S)
                piece = EnginePiece()
                if done:
                    piece, coming = coming.result(), None
                yield pack(piece, request.version)
                if piece.finish:
                    return
        except ServerBroke:
            self._keep(self._look())
            raise
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            await pieces.aclose()
            self._under_way[request.peer] -= 1
            if not self._under_way[request.peer]:
                del self._under_way[request.peer]


def _form(offer: EngineOffer) -> str:
    return "token ids" if offer.takes_tokens else "text"
