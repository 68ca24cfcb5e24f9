"""What every endpoint does whatever carries its bytes: dialling, accepting, one link per peer.

**One link.** Two nodes may dial each other at the same moment, and then have two connections. Both keep the one with
the higher attempt number (of equal ones that of the smaller NodeId), so both keep the same one; who dials beside a
connection that is there gives a higher number than that has. A
`Link` belongs to the peer, not to a connection: it goes over to the connection that stays, what is under way on the
other is finished there, and then the other ends. The one that is to stay must first answer a ping, so a connection that
is dead without knowing it, or was given up while it came about, cannot win.

**Made anew.** A path that went dead may come back, and the connection over it not: a router in between has forgotten
it, or its sender waits ever longer to try again, and then for many round trips sends little at a time. So a peer that
falls silent is dialled once more, by whoever knows an address, and the link goes over to the new connection as above.

**One node per key.** A peer that comes with another instance number than the open link's is a node that was started
again, or a second machine with the same key. If the open link still answers, it is the second, and it is declined.

**Places.** When links run short, one that nobody uses makes way; `places` has the rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import MappingProxyType
from typing import Any

from shoal.errors import BadInput, LinkError, ShoalError
from shoal.identity import KeyPair, short_id
from shoal.protocol.messages import OLDEST_VERSION, PROTOCOL_VERSION
from shoal.transport.connection import Connection, ReplyStream
from shoal.transport.handshake import ATTEMPT_MAX, Agreed, Self, Versions
from shoal.transport.limits import Budget, EndpointLimits, WaitingReplies
from shoal.transport.places import HeldLink, plenty, room_for
from shoal.transport.streams import ByteStream
from shoal.world import Address, Body, Clock, Dice, Handler, LinkLost, LinkStats, Refused, Request, Unreachable, within

_log = logging.getLogger("shoal.transport")

HINTS_MAX = 16
"""Addresses tried for one peer at a time; the rest is ignored."""
STAGGER_S = 0.25
"""The next hint is tried when the one before has neither failed nor succeeded for so long (RFC 8305, section 5)."""
ALIVE_S = 3.0
"""A connection whose claim is disputed must answer a ping within this."""
RENEWAL_HINTS_MAX = 4
RENEWAL_S = 5.0
"""One attempt at a further connection to a silent peer takes so long at most: each begins with an opening packet that
is sent again after 1, 3 and 7 s."""
_CONNECTIONS_PER_LINK_MAX = 4


class DuplicateKey(LinkError):
    """Two running nodes have the same key."""

    code = "SH-317"


class EndpointFull(LinkError):
    """An endpoint has as many links as it can hold, all of them in use."""

    code = "SH-318"


class EndpointClosed(LinkError):
    """This endpoint was closed."""

    code = "SH-319"


class BadAddress(BadInput):
    """An address is not of the form tcp://host:port, or nothing can listen there."""

    code = "SH-115"


_ADDRESS = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([\w.-]+)):([0-9]{1,5})", re.ASCII)
_LABEL = re.compile(r"\w(?:[\w-]{0,61}\w)?", re.ASCII)
_NAME_MAX = 253
"""A host's name and its labels are as long as a resolver takes them (RFC 1035, section 2.3.4)."""


def parse_address(address: Address) -> tuple[str, int]:
    """`tcp://host:port` -> (host, port). Raises BadAddress, also for a host that can be neither a name nor an IP."""
    found = _ADDRESS.fullmatch(address)
    if found is not None and int(found[3]) < 65536:
        v6, name, port = found[1], found[2], int(found[3])
        if v6 is not None:
            with contextlib.suppress(ValueError):
                return str(ipaddress.IPv6Address(v6)), port
        elif len(name) <= _NAME_MAX and all(_LABEL.fullmatch(label) for label in name.removesuffix(".").split(".")):
            return name, port
    raise BadAddress(f"{address!r} is not an address: tcp://host:port is expected, IPv6 in brackets.")


def format_address(host: str, port: int) -> Address:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


_HintFailure = ShoalError | OSError | TimeoutError | ValueError
"""Why one hint led nowhere: nothing that a record says of an address may do more than that."""


class PeerLink:
    """The link to one peer, over whichever of its connections is to stay."""

    def __init__(self, endpoint: BaseEndpoint, peer: bytes, instance: bytes, source: str) -> None:
        self.instance = instance
        self.wanted = False
        """This side opened it, or asked for it."""
        self.hints: tuple[Address, ...] = ()
        """Where it may be dialled once more."""
        self._source = source
        self._endpoint = endpoint
        self._peer = peer
        self._connections: list[tuple[tuple[int, bool], Connection]] = []
        self._current: Connection | None = None
        self._closed_reason: str | None = None
        self._closed = asyncio.Event()
        self._ended_sent = 0
        self._ended_received = 0

    @property
    def peer(self) -> bytes:
        return self._peer

    @property
    def version(self) -> int:
        return self._use().version

    @property
    def closed(self) -> bool:
        return self._closed_reason is not None

    async def request(
        self, kind: str, body: bytes, *, deadline_s: float = 10.0, reply_max_bytes: int = 1 << 16
    ) -> bytes:
        self._refuse_closed()
        return await self._use().request(kind, body, deadline_s, reply_max_bytes)

    def stream(
        self, kind: str, body: bytes, *, stall_s: float = 10.0, max_bytes: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        self._refuse_closed()
        return ReplyStream(self._use, kind, body, stall_s, max_bytes)

    def stats(self) -> LinkStats:
        """Bytes are those inside the encryption, of all connections this link has had."""
        now = self._use().stats()
        others = [c for _, c in self._connections if c is not self._current]
        return LinkStats(
            now.bytes_sent + self._ended_sent + sum(c.bytes_sent for c in others),
            now.bytes_received + self._ended_received + sum(c.bytes_received for c in others),
            now.round_trip_ms,
            now.rate_bps,
        )

    async def close(self, reason: str = "closed") -> None:
        self._end(reason)
        await asyncio.gather(*(connection.close(reason) for _, connection in self._connections))

    async def wait_closed(self) -> str:
        await self._closed.wait()
        return self._closed_reason or "closed"

    # --- for the endpoint

    def hinted(self, hints: Sequence[Address]) -> None:
        """It may be dialled there too; the latest are tried first."""
        self.hints = tuple(dict.fromkeys((*hints, *self.hints)))[:RENEWAL_HINTS_MAX]

    @property
    def attempt(self) -> int:
        """The highest number of its connections."""
        return max((attempt for (attempt, _), _ in self._connections), default=0)

    def add(self, rank: tuple[int, bool], connection: Connection) -> None:
        """A further connection. Both sides rank them alike."""
        self._connections.append((rank, connection))
        if self._current is None:
            self._current = connection
            return
        self._endpoint.run(self._settle())
        while len(self._connections) > _CONNECTIONS_PER_LINK_MAX:
            self._connections[0][1].abort("too many connections to the same node")

    async def _settle(self) -> None:
        """Of several connections keep the one of the highest rank, as soon as its peer has answered on it."""
        while len(live := self._live()) > 1:
            best = live[-1]
            if not await best.alive(ALIVE_S):
                best.abort("it did not answer, and another connection to the same node is there")
            elif not best.retired:  # else one that ranks higher came meanwhile, and was settled on
                self._current = best
                for other in live[:-1]:
                    other.retire()
                return

    def _live(self) -> list[Connection]:
        """Connections that may be kept, the highest rank last."""
        ranked = sorted(self._connections, key=lambda item: item[0])
        return [connection for _, connection in ranked if not connection.is_down and not connection.retired]

    def connection_down(self, connection: Connection) -> None:
        # The one that ended stays `current` as long as no other is there: its stats are the link's last.
        self._connections = [item for item in self._connections if item[1] is not connection]
        if connection is self._current:
            live = self._live()
            if not live:
                self._end(connection.down_reason or "closed")
                return
            self._current = live[-1]
        self._ended_sent += connection.bytes_sent
        self._ended_received += connection.bytes_received

    def held(self) -> HeldLink:
        """The place that it takes."""
        moments = [connection.idle_since for _, connection in self._connections]
        ended = [moment for moment in moments if moment is not None]
        idle_since = max(ended, default=None) if len(ended) == len(moments) else None
        return HeldLink(self._peer, self._source, self.wanted, idle_since)

    def make_way(self) -> None:
        """It counts no more from now on; its peer is told in its own time."""
        reason = "it was not in use, and others needed the place"
        self._end(reason)
        self._endpoint.run(self.close(reason))

    async def alive(self) -> bool:
        return self._current is not None and await self._current.alive(ALIVE_S)

    def _end(self, reason: str) -> None:
        if self._closed_reason is None:
            self._closed_reason = reason
            self._closed.set()
            self._endpoint.link_closed(self)

    def _use(self) -> Connection:
        if self._current is None:
            raise LinkLost(f"The link to {short_id(self._peer)} is not up yet.")
        return self._current

    def _refuse_closed(self) -> None:
        if self._closed_reason is not None:
            raise LinkLost(f"The link to {short_id(self._peer)} is closed: {self._closed_reason}.")


class _Attempt:
    """Dialling one peer, shared by all who want a link to it."""

    def __init__(self, task: asyncio.Task[PeerLink]) -> None:
        self.task = task
        self.waiting = 0


class BaseEndpoint(ABC):
    """A node's place on some network; subclasses open and accept the connections."""

    def __init__(
        self,
        key: KeyPair,
        *,
        clock: Clock,
        dice: Dice,
        network: str,
        versions: Versions = (OLDEST_VERSION, PROTOCOL_VERSION),
        limits: EndpointLimits | None = None,
    ) -> None:
        self._me = Self(key, dice.bytes(16), versions, network)
        self._clock = clock
        self._dice = dice
        self._limits = limits or EndpointLimits()
        self._budget = Budget(self._limits.large_bodies_bytes)
        self._replies = WaitingReplies(self._limits.replies_bytes, self._shed)
        self._handlers: dict[str, Handler] = {}
        self._link_callbacks: list[Callable[[PeerLink], None]] = []
        self._links: dict[bytes, PeerLink] = {}
        self._connections: set[Connection] = set()
        self._dialling: dict[bytes, _Attempt] = {}
        self._attempts = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    # --- the port

    @property
    def node_id(self) -> bytes:
        return self._me.key.node_id

    @property
    @abstractmethod
    def addresses(self) -> Sequence[Address]: ...

    @abstractmethod
    async def listen(self, address: Address) -> Address: ...

    def handle(self, kind: str, handler: Handler) -> None:
        self._handlers[kind] = handler

    def on_link(self, callback: Callable[[PeerLink], None]) -> None:
        self._link_callbacks.append(callback)

    def links(self) -> Mapping[bytes, PeerLink]:
        return MappingProxyType(dict(self._links))

    async def dial(self, node: bytes, hints: Sequence[Address], *, deadline_s: float = 10.0) -> PeerLink:
        """See Endpoint.dial. Hints are tried in order, each after a short head start of the one before."""
        self._refuse_closed()
        link = self._links.get(node)
        if link is not None:
            link.wanted = True
            link.hinted(hints)
            return link
        if node == self.node_id:
            raise Unreachable(f"{short_id(node)} is this node itself; it has no link to itself.")
        attempt = self._dialling.get(node)
        if attempt is None:
            if not hints:
                raise Unreachable(f"No address is known for {short_id(node)}; it must dial this node, or be asked for.")
            attempt = _Attempt(self.run(self._dial_hints(node, list(dict.fromkeys(hints))[:HINTS_MAX])))
            self._dialling[node] = attempt
        attempt.waiting += 1
        try:
            return await within(self._clock, deadline_s, _result(attempt.task))
        except TimeoutError:
            raise Unreachable(
                f"{short_id(node)} could not be reached within {deadline_s:g} s (tried {', '.join(hints[:HINTS_MAX])})."
            ) from None
        finally:
            attempt.waiting -= 1
            if attempt.task.done() or not attempt.waiting:
                attempt.task.cancel()
                if self._dialling.get(node) is attempt:
                    del self._dialling[node]

    async def close(self) -> None:
        """Stop accepting, tell every peer, and end all tasks."""
        self._closed = True
        await self._stop_accepting()
        await asyncio.gather(*(link.close("the node is stopping") for link in list(self._links.values())))
        for connection in list(self._connections):
            connection.abort("the node is stopping")
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- for subclasses

    @abstractmethod
    async def _connect(self, node: bytes, hint: Address) -> PeerLink:
        """One attempt at one address, handshake included. Raises LinkError, BadAddress, VersionMismatch or OSError,
        and ValueError for a host that cannot be looked up."""

    @abstractmethod
    async def _stop_accepting(self) -> None: ...

    def _next_attempt(self, node: bytes) -> int:
        """A number for a further attempt to dial `node`."""
        self._attempts += 1
        link = self._links.get(node)
        return min(self._attempts if link is None else max(self._attempts, link.attempt + 1), ATTEMPT_MAX)

    async def _vet(self, agreed: Agreed, source: str) -> None:
        """Whether a peer that proved who it is may have a link. Raises DuplicateKey, EndpointFull, EndpointClosed."""
        self._refuse_closed()
        if agreed.peer == self.node_id:
            raise DuplicateKey(
                f"Two nodes run with the same key, {short_id(agreed.peer)}: give each machine a key file of its own."
            )
        link = self._links.get(agreed.peer)
        if link is None:
            self._make_room(agreed, source)
        elif link.instance != agreed.instance:
            if await link.alive():
                raise DuplicateKey(
                    f"Another running node has the same key, {short_id(agreed.peer)}: stop it, or give this machine a "
                    "key file of its own."
                )
            await link.close("the node was started again")

    def _make_room(self, agreed: Agreed, source: str) -> None:
        """One more link is about to come up. Raises EndpointFull."""
        if plenty(len(self._links), self._limits.links):
            return
        held = [link.held() for link in self._links.values()]
        admitted, leaving = room_for(source, agreed.dialled, held, self._limits.links)
        if not admitted:
            from_there = sum(link.source == source for link in held)
            raise EndpointFull(
                f"{short_id(self.node_id)} holds {len(held)} links already, {from_there} of them from your address, "
                "and none is idle; try again later, or another node."
            )
        if leaving is not None:
            self._links[leaving].make_way()

    def _join(self, agreed: Agreed, stream: ByteStream, source: str) -> PeerLink:
        """A connection that both sides accepted becomes, or joins, the link to its peer. `source`: see Request."""
        self._refuse_closed()
        link = self._links.get(agreed.peer)
        if link is not None and link.instance != agreed.instance:
            raise DuplicateKey(
                f"Two nodes with the key {short_id(agreed.peer)} came at once; give each its own key file."
            )
        new = link is None
        if link is None:
            link = PeerLink(self, agreed.peer, agreed.instance, source)
        link.wanted |= agreed.dialled

        async def serve(connection: Connection, kind: str, body: bytes) -> Body:
            return await self._serve(link, connection, kind, body)

        def down(connection: Connection) -> None:
            self._connections.discard(connection)
            link.connection_down(connection)

        def stale(connection: Connection) -> None:
            if link.hints:
                self.run(self._renew(link, connection))

        connection = Connection(
            stream,
            peer=agreed.peer,
            version=agreed.version,
            source=source,
            dialled=agreed.dialled,
            serve=serve,
            down=down,
            stale=stale,
            clock=self._clock,
            dice=self._dice,
            limits=self._limits.connection,
            budget=self._budget,
            replies=self._replies,
        )
        self._connections.add(connection)
        dialled_by_smaller = agreed.dialled == (self.node_id < agreed.peer)
        connection.start()
        if new:
            self._links[agreed.peer] = link
        link.add((agreed.attempt, dialled_by_smaller), connection)
        if new:
            for callback in self._link_callbacks:
                callback(link)
        return link

    def link_closed(self, link: PeerLink) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]

    def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that ends with the endpoint at the latest."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    # --- inside

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not isinstance(task.exception(), ShoalError):
            _log.error("A task of the endpoint failed.", exc_info=task.exception())

    def _shed(self) -> None:
        """Peers take less than they ask for: where most of it waits for one source, its largest connection goes."""
        open_ones = [connection for connection in self._connections if not connection.closing]
        per_source: Counter[str] = Counter()
        for connection in open_ones:
            per_source[connection.source] += connection.held_bytes
        if open_ones:
            most = max(open_ones, key=lambda connection: (per_source[connection.source], connection.held_bytes))
            most.shed(f"{short_id(most.peer)} left {most.held_bytes} bytes of replies unread, and others need the room")

    async def _serve(self, link: PeerLink, connection: Connection, kind: str, body: bytes) -> Body:
        handler = self._handlers.get(kind)
        if handler is None:
            raise Refused(f"{short_id(self.node_id)} does not answer {kind} requests.")
        return await handler(Request(connection.peer, kind, body, connection.version, link, connection.source))

    async def _dial_hints(self, node: bytes, hints: list[Address]) -> PeerLink:
        """The first hint that leads to `node` wins; the others are given up."""
        waiting = list(hints)
        running: dict[asyncio.Task[PeerLink], Address] = {}
        failures: list[tuple[Address, _HintFailure]] = []
        try:
            while waiting or running:
                if waiting:
                    hint = waiting.pop(0)
                    running[asyncio.ensure_future(self._connect_in_time(node, hint))] = hint
                head_start = asyncio.ensure_future(self._clock.sleep(STAGGER_S)) if waiting else None
                try:
                    await asyncio.wait(
                        [*running, *([head_start] if head_start else [])], return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    if head_start is not None:
                        head_start.cancel()
                for task in [task for task in running if task.done()]:
                    hint = running.pop(task)
                    try:
                        return task.result()
                    except (ShoalError, OSError, TimeoutError, ValueError) as error:
                        failures.append((hint, error))  # ValueError: a name that the resolver cannot even read
                if node in self._links:  # it dialled us meanwhile
                    return self._links[node]
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
        raise _unreachable(node, failures)

    async def _connect_in_time(self, node: bytes, hint: Address) -> PeerLink:
        link = await within(self._clock, self._limits.handshake_s, self._connect(node, hint))
        link.hinted((hint,))
        return link

    async def _renew(self, link: PeerLink, stale: Connection) -> None:
        """Have another connection beside one on which nothing comes. Also where things come on it again meanwhile: it
        has lost much and sends little for a while."""
        for hint in itertools.cycle(link.hints):
            if link.closed or stale.is_down or stale.retired:
                return
            again = stale.is_stale
            try:
                await within(self._clock, min(RENEWAL_S, self._limits.handshake_s), self._connect(link.peer, hint))
            except (ShoalError, OSError, TimeoutError, ValueError) as error:
                if not again:
                    return
                _log.debug("%s is silent, and was not reached anew: %s.", short_id(link.peer), _why(error))
                await self._clock.sleep(self._limits.connection.renew_s)
            else:
                return

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EndpointClosed(f"The endpoint of {short_id(self.node_id)} is closed.")


async def _result(task: asyncio.Task[PeerLink]) -> PeerLink:
    return await asyncio.shield(task)


def _unreachable(node: bytes, failures: list[tuple[Address, _HintFailure]]) -> Unreachable:
    """All that was tried, in one sentence; the cause of the last failure is chained."""
    said = "; ".join(f"{hint}: {_why(error)}" for hint, error in failures)
    result = Unreachable(f"{short_id(node)} could not be reached. {said}.")
    result.__cause__ = failures[-1][1]
    return result


def _why(error: _HintFailure) -> str:
    if isinstance(error, ShoalError):
        return error.sentence.rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
