"""A whole replica that a node has in a server beside it: kept an eye on, offered while it is up, and spoken to for
gateways."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from shoal.errors import BadRecord
from shoal.identity import Envelope, KeyPair
from shoal.inference.metering import Served
from shoal.market.earnings import served_parts, token_us
from shoal.node.openai_server import OpenAiServer, ServerBroke, ServerSettings, ServerUnusable
from shoal.node.sales import NotHeld, Service
from shoal.protocol.engines import EngineAsk, EngineEnd, EnginePiece, EngineSession, pack
from shoal.protocol.messages import DEFAULT_NETWORK, decode, encode, sign
from shoal.protocol.offers import EngineOffer
from shoal.protocol.serving import RequestReceipt, StageForgotten
from shoal.world import Body, Clock, Endpoint, Request

LOOK_EVERY_S = 3.0
STREAMS_MAX = 96
"""Continuations under way, of all gateways; a server queues those it cannot compute at once."""
STREAMS_OF_ONE = 64
METERED_MAX = 1024
"""Sessions of all gateways of which a receipt may still be asked for."""
STILL_HERE_S = 1.0
"""So often a gateway hears of a node whose server has nothing yet: silence is how a dead link shows."""

_log = logging.getLogger("shoal.node")


class NoEngine(BadRecord):
    """A continuation is asked of a node that has no engine for that model, or whose engine is down."""

    code = "SH-273"


class EngineFull(BadRecord):
    """As many continuations are under way at a node's engine as it takes."""

    code = "SH-274"


@dataclass
class _Passed:
    """What went to a gateway of one session."""

    session: EngineSession | None
    positions: int
    prompt_tokens: int
    service: Service | None = None
    """None: for nothing."""
    token_us: int = 0
    tokens: int = 0
    ended: bool = False

    def add(self, tokens: int) -> None:
        if self.ended:  # the gateway left it, and has its receipt
            return
        before = self._parts(self.tokens)
        self.tokens += tokens
        self._earn(self._parts(self.tokens) - before)

    def end(self, arrived: int) -> None:
        """What did not arrive is not earned."""
        self._earn(self._parts(arrived) - self._parts(self.tokens))
        self.ended = True

    def served(self, arrived: int) -> Served:
        """No more than arrived there."""
        return Served.continued(self.positions, min(arrived, self.tokens), self.prompt_tokens)

    def _parts(self, arrived: int) -> int:
        served = self.served(arrived)
        return served_parts(served.generated, served.computed)

    def _earn(self, parts: int) -> None:
        if self.service is not None:
            self.service.served(parts, self.token_us)


class EngineHost:
    """What of a node has to do with its server."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        key: KeyPair,
        name: str,
        endpoint: Endpoint,
        clock: Clock,
        changed: Callable[[], Awaitable[None]],
        service_for: Callable[[bytes], Service] | None = None,
        network: str = DEFAULT_NETWORK,
    ) -> None:
        """`changed` is called when the server came or went. `service_for` raises NotHeld for gateways that do not pay;
        none: it serves for nothing. Raises ServerUnusable."""
        self._key, self._network = key, network
        self._service_for = service_for
        self._services: dict[bytes, Service] = {}
        """Of gateways that have paid for a place."""
        self._server = OpenAiServer(settings, clock)
        self._name, self._endpoint, self._clock, self._changed = name, endpoint, clock, changed
        self._under_way: dict[bytes, int] = {}
        self._passed: OrderedDict[tuple[bytes, bytes, int], _Passed] = OrderedDict()
        """By gateway, ring and session."""
        self._looking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.offer: EngineOffer | None = None
        """None while the server is down."""

    async def start(self) -> None:
        """Raises ServerUnusable."""
        self.offer = await self._server.look()
        self._endpoint.handle(EngineAsk.KIND, self._generate)
        self._endpoint.handle(EngineEnd.KIND, self._ended)
        self._keep(self._watch())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.close()

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            for gateway in [gateway for gateway, one in self._services.items() if one.over() is not None]:
                self._services.pop(gateway).ended()
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
        return self._stream(ask, request, offer, self._service(request.peer))

    def _service(self, gateway: bytes) -> Service | None:
        """What is earned for a gateway, from its first continuation until its place ends. Raises NotHeld."""
        if self._service_for is None:
            return None
        service, known = self._service_for(gateway), self._services.get(gateway)
        if service is not known:
            if known is not None:
                known.ended()
            service.ready()
            self._services[gateway] = service
        return service

    async def _stream(
        self, ask: EngineAsk, request: Request, offer: EngineOffer, service: Service | None
    ) -> AsyncGenerator[bytes]:
        own, total = self._under_way.get(request.peer, 0), sum(self._under_way.values())
        if own >= STREAMS_OF_ONE or total >= STREAMS_MAX:
            raise EngineFull(f"Node {self._name} has {total} continuations under way; ask again in a moment.")
        self._under_way[request.peer] = own + 1
        passed = self._metered(ask, request.peer, service, token_us(1, offer.token_ms, 0.0))
        pieces = self._server.generate(ask)
        coming: asyncio.Future[EnginePiece] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(pieces))
                done, _ = await asyncio.wait({coming}, timeout=STILL_HERE_S)
                piece = EnginePiece()
                if done:
                    piece, coming = coming.result(), None
                over = service.over() if service is not None else None
                if over is not None:
                    raise NotHeld(f"Node {self._name} serves for this gateway no longer: {over}.")
                passed.add(min(piece.counts(offer.gives_tokens), ask.tokens_max - passed.tokens))
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

    # --- receipts --------------------------------------------------------------------------------------------------

    def _metered(self, ask: EngineAsk, gateway: bytes, service: Service | None, each_us: int) -> _Passed:
        session, most = ask.session, len(ask.text.encode())
        positions = len(ask.tokens) or (most if session is None else min(session.positions, most))
        passed = _Passed(session, positions, ask.choosing.prompt_tokens, service, each_us)
        if session is not None:
            self._passed[gateway, session.ring, session.session] = passed
            if len(self._passed) > METERED_MAX:
                self._passed.popitem(last=False)
        return passed

    async def _ended(self, request: Request) -> bytes:
        """A session is over; gives the receipt of what was done for it, once."""
        end = decode(EngineEnd, request.body, request.version)
        passed = self._passed.pop((request.peer, end.ring, end.session), None)
        if passed is not None:
            passed.end(end.generated)
        receipt = None if passed is None else self._receipt(passed, end.generated)
        return encode(StageForgotten(receipt=receipt.to_bytes() if receipt else b""), request.version)

    def _receipt(self, passed: _Passed, arrived: int) -> Envelope | None:
        served, session = passed.served(arrived), passed.session
        if session is None or not served.computed:
            return None
        receipt = RequestReceipt(
            job=session.job, ring=session.ring, session=session.session, first=0, stop=session.layers,
            prompt_tokens=served.prompt, generated_tokens=served.generated, computed_positions=served.computed,
        )  # fmt: skip
        return sign(self._key, receipt, self._network)


def _form(offer: EngineOffer) -> str:
    return "token ids" if offer.takes_tokens else "text"
