"""Links inside one process: the same links over pipes, for tests and for worlds of many nodes.

Only what needs a socket or a cipher is left out. Delay and rate come from the Clock, so a held clock makes every run
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import ShoalError
from shoal.identity import KeyPair, short_id
from shoal.protocol.messages import DEFAULT_NETWORK, OLDEST_VERSION, PROTOCOL_VERSION, common_version
from shoal.transport.endpoint import BadAddress, BaseEndpoint, PeerLink, format_address, parse_address
from shoal.transport.handshake import Agreed, NotAccepted, Versions, WrongNode
from shoal.transport.limits import EndpointLimits
from shoal.transport.streams import PipeStream, pipe
from shoal.world import Address, Clock, Dice, SeededDice, SystemClock

_UNREAD_BYTES = 1024 * 1024
"""What a pipe holds that its reader has not taken, beside what is under way."""


@dataclass(frozen=True)
class Path:
    """What lies between two nodes: `delay_s` one way, and a rate each way."""

    delay_s: float = 0.0
    rate_bps: float | None = None


class MemoryNetwork:
    """A network inside this process. Its endpoints find each other by the addresses they listen at."""

    def __init__(self, clock: Clock | None = None, *, dice: Dice | None = None, path: Path | None = None) -> None:
        self.clock = clock or SystemClock()
        self.dice = dice or SeededDice(0)
        self.default_path = path or Path()
        self._listening: dict[Address, MemoryEndpoint] = {}
        self._paths: dict[frozenset[bytes], Path] = {}
        self._cut: set[frozenset[bytes]] = set()
        self._pipes: dict[frozenset[bytes], list[PipeStream]] = {}
        self._next_port = 1

    def endpoint(
        self,
        key: KeyPair,
        *,
        network: str = DEFAULT_NETWORK,
        versions: Versions = (OLDEST_VERSION, PROTOCOL_VERSION),
        limits: EndpointLimits | None = None,
        machine: str | None = None,
    ) -> MemoryEndpoint:
        """On `machine`, which is what others see as its source; none: on one of its own."""
        return MemoryEndpoint(self, key, network=network, versions=versions, limits=limits, machine=machine)

    def set_path(self, one: bytes, other: bytes, path: Path) -> None:
        """What lies between two nodes, for the connections they make from now on."""
        self._paths[frozenset((one, other))] = path

    def cut(self, one: bytes, other: bytes) -> None:
        """Break the connections of two nodes, and let none come up until `heal`."""
        self._cut.add(frozenset((one, other)))
        for end in self._pipes.pop(frozenset((one, other)), []):
            end.close()

    def silence(self, one: bytes, other: bytes) -> None:
        """Like `cut`, but the connections there are do not notice: nothing arrives on them any more."""
        self._cut.add(frozenset((one, other)))
        for end in self._pipes.get(frozenset((one, other)), []):
            end.silence()

    def heal(self, one: bytes, other: bytes) -> None:
        """Connections come up again."""
        self._cut.discard(frozenset((one, other)))

    # --- for its endpoints

    def path(self, one: bytes, other: bytes) -> Path:
        return self._paths.get(frozenset((one, other)), self.default_path)

    def listen(self, endpoint: MemoryEndpoint, address: Address) -> Address:
        host, port = parse_address(address)
        if port == 0:
            port = self._next_port
            self._next_port += 1
        real = format_address(host, port)
        if real in self._listening:
            raise BadAddress(f"This node cannot listen at {real}: another does; choose another address or port 0.")
        self._listening[real] = endpoint
        return real

    def stop_listening(self, endpoint: MemoryEndpoint) -> None:
        for address in [address for address, at in self._listening.items() if at is endpoint]:
            del self._listening[address]

    def find(self, dialler: MemoryEndpoint, hint: Address) -> MemoryEndpoint:
        found = self._listening.get(format_address(*parse_address(hint)))
        if found is None or frozenset((dialler.node_id, found.node_id)) in self._cut:
            raise ConnectionRefusedError("nothing listens there")
        return found

    def connect(self, one: bytes, other: bytes) -> tuple[PipeStream, PipeStream]:
        path = self.path(one, other)
        under_way_bytes = int((path.rate_bps or 0.0) * path.delay_s / 8)
        ends = pipe(
            self.clock,
            delay_s=path.delay_s,
            rate_bps=path.rate_bps,
            capacity_bytes=_UNREAD_BYTES + under_way_bytes,
        )
        known = self._pipes.setdefault(frozenset((one, other)), [])
        known[:] = [end for end in known if not end.closed]
        known.extend(ends)
        return ends


class MemoryEndpoint(BaseEndpoint):
    """A node on a MemoryNetwork, which makes it. It is who its key says; nothing needs to be proved in one process."""

    def __init__(
        self,
        memory: MemoryNetwork,
        key: KeyPair,
        *,
        network: str = DEFAULT_NETWORK,
        versions: Versions = (OLDEST_VERSION, PROTOCOL_VERSION),
        limits: EndpointLimits | None = None,
        machine: str | None = None,
    ) -> None:
        super().__init__(key, clock=memory.clock, dice=memory.dice, network=network, versions=versions, limits=limits)
        self._memory = memory
        self._machine = machine or key.node_id.hex()
        self._addresses: list[Address] = []

    @property
    def addresses(self) -> Sequence[Address]:
        return tuple(self._addresses)

    async def listen(self, address: Address) -> Address:
        self._refuse_closed()
        real = self._memory.listen(self, address)
        self._addresses.append(real)
        return real

    async def _connect(self, node: bytes, hint: Address) -> PeerLink:
        memory = self._memory
        answerer = memory.find(self, hint)
        if answerer.node_id != node:
            raise WrongNode(f"{short_id(answerer.node_id)} answered there, not {short_id(node)}")
        await self._clock.sleep(2 * memory.path(self.node_id, node).delay_s)  # there and back
        answerer = memory.find(self, hint)
        if answerer._me.network != self._me.network:
            raise NotAccepted(f"it belongs to the network {answerer._me.network!r}, this node to {self._me.network!r}")
        version = common_version(self._me.versions, answerer._me.versions)
        attempt = self._next_attempt(node)
        theirs = Agreed(self.node_id, version, self._me.instance, attempt, dialled=False)
        ours = Agreed(node, version, answerer._me.instance, attempt, dialled=True)
        here, there = self._machine, answerer._machine
        try:
            await answerer._vet(theirs, here)
        except ShoalError as error:
            raise NotAccepted(f"it declined: {error.sentence} [{error.code}]") from error
        await self._vet(ours, there)
        near, far = memory.connect(self.node_id, node)
        answerer._join(theirs, far, here)
        return self._join(ours, near, there)

    async def _stop_accepting(self) -> None:
        self._memory.stop_listening(self)
        self._addresses.clear()
