"""Getting a model onto nodes: has the planner decide, invites, and does it again when some came or went."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.errors import LinkError, ShoalError
from shoal.gateway.engines import EngineFinder
from shoal.gateway.paying import BUY_WAIT_S, TAKEN_BACK, Paying
from shoal.gateway.receipts import Metering
from shoal.gateway.remote import FULL, Latency, Loss, NodeRing, Rings
from shoal.gateway.rings import Replica as ServingReplica
from shoal.gateway.rings import RingLost, RingRefused
from shoal.gateway.scouting import Scout
from shoal.identity import Envelope
from shoal.market.earnings import token_us
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.messages import encode
from shoal.protocol.offers import Offer
from shoal.protocol.serving import ServeJob, StageInvite, StagePlace
from shoal.quantities import Ranges, format_bytes
from shoal.quantities.money import format_price
from shoal.sharding import Links, ModelNeeds, Plan, Replica, ServingNode, cheapest, plan, replan, standbys
from shoal.storage import BYTES_PER_S_LEAST, part_bytes, patience_s
from shoal.world import Clock, Dice, Directory, Endpoint, Refused, within

ARRANGE_EVERY_S = 2.0
INVITE_DEADLINE_S = 20.0
LOAD_PATIENCE_S = 600.0
"""For a stage to load its layers, and for every so many seconds in which it does not, it fetches at least what comes at
`BYTES_PER_S_LEAST`."""
RETIRE_S = 300.0
"""How long a ring that is not wanted any more waits for the last of its streams to move."""
RETIRE_LOOK_S = 0.05

Places = tuple[StagePlace, ...]


@dataclass(frozen=True)
class ModelOnNodes:
    """What is to be served, and where its bytes are."""

    job: ServeJob
    envelope: Envelope
    needs: ModelNeeds
    parts_of: Callable[[int, int], Mapping[int, Ranges]]
    """Layers first to stop - 1 -> which of the job's files they lie in, and which bytes of each; none: the whole."""
    holder: BlobHolder
    """The gateway, which has them all."""


@dataclass
class Placer:
    """Keeps the rings of a model as the planner wants them. `run` goes on until it is cancelled."""

    model: ModelOnNodes
    endpoint: Endpoint
    directory: Directory
    clock: Clock
    dice: Dice
    rings: Rings
    serving: list[ServingReplica]
    """Replicas that are ready, for whoever sends streams through them."""
    say: Callable[[str], None] = lambda _: None
    metering: Metering = field(default_factory=Metering)
    paying: Paying | None = None
    """None: only nodes that serve for nothing take part."""
    engines: EngineFinder | None = None
    """Engines that can serve the model in place of layers."""
    _buying: asyncio.Task[None] | None = None
    """Places at nodes that cost something are asked for."""
    _wanted_s: float | None = None
    """Since when they are to be."""
    _ending: bool = False
    """Such nodes are let go, as their money comes to its end."""
    _plan: Plan = field(default_factory=lambda: Plan((), (), ""))
    _reserve: tuple[Replica, ...] = ()
    _settled_with: tuple[list[ServingNode], Links] | None = None
    """With which planning again gave the same plan."""
    _placed: dict[Places, NodeRing] = field(default_factory=dict)
    _retiring: list[NodeRing] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _said: str = ""

    def __post_init__(self) -> None:
        self.scout = Scout(self.model.needs, self.endpoint, self.directory, self.clock, self._wake.set)
        if self.paying is not None:
            self.scout.pay(self.paying.takes, self.paying.former)

    async def run(self) -> None:
        scouting = asyncio.create_task(self.scout.run())
        try:
            while True:
                self._wake.clear()
                self.arrange()
                with contextlib.suppress(TimeoutError):
                    await within(self.clock, min(ARRANGE_EVERY_S, self._next_leaves_s()), self._wake.wait())
        finally:
            scouting.cancel()
            await asyncio.gather(scouting, return_exceptions=True)

    def wake(self) -> None:
        """Something has changed that is planned with."""
        self._settled_with = None
        self._wake.set()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        rings, self._placed = [*self._placed.values(), *self._retiring], {}
        await asyncio.gather(*(ring.close("The gateway is stopping.") for ring in rings))

    def arrange(self) -> None:
        """Plan with what is there now, and begin to carry it out."""
        needs = self.model.needs
        if self.paying is not None:
            if self.paying.closing:
                self._let_end(self.paying)
            elif self._ending:
                self._let_go_on()
            self._let_leave(self.paying)
        engines = self.paying.engines if self.paying is not None else frozenset[bytes]()
        there, links = [one for one in self.scout.nodes() if one.node not in engines], self.scout.links()
        lost = any(ring.lost.done() for ring in self._placed.values())
        if (there, links) == self._settled_with and not lost:
            return  # planning holds up all streams: 0.04 s for 8 nodes that hold stages, 0.2 s for 40
        if not there and not self.scout.looked:
            return  # it is not known yet that there are none
        nodes = [one for one in there if not one.price or self._is_paid(one.node)]
        if self._plan.replicas:
            wanted = replan(self._plan, needs, nodes, links, reserve=self._reserve)
        else:
            wanted = plan(needs, nodes, links)
        staying: tuple[Replica, ...] = ()
        if not wanted.replicas:
            staying = self._staying()
            wanted = replace(self._buy(wanted, there, links), replicas=staying)
        waits = self._wanted_s is not None
        self._settled_with = (there, links) if wanted == self._plan and not waits else None
        moved = [one.stages for one in wanted.replicas] != [one.stages for one in self._plan.replicas]
        self._plan, self._reserve = wanted, standbys(wanted, needs, nodes, links)
        if wanted.reason != self._said and (moved or staying == wanted.replicas):
            self._said = wanted.reason
            self.say(wanted.reason)
        primary = {self._places(replica): replica for replica in wanted.replicas}
        spare = {self._places(replica): replica for replica in self._reserve}
        self._carry_out(primary, spare)
        if self.paying is not None and not self._is_buying:
            self._let_go_unused(self.paying, {one.node for one in there})

    # --- nodes that cost something ---------------------------------------------------------------------------------

    def _is_paid(self, node: bytes) -> bool:
        return self.paying is not None and node in self.paying.taken

    @property
    def _is_buying(self) -> bool:
        return self._buying is not None and not self._buying.done()

    def _buy(self, nothing: Plan, there: Sequence[ServingNode], links: Links) -> Plan:
        """Nothing can be had of those that cost nothing, or are paid: begin to take places at the nodes of the cheapest
        plan. Gives what is said meanwhile."""
        if self._is_buying:
            return Plan((), (), self._said)
        if self.paying is None or self.paying.closing:
            dear = self.scout.too_dear
            costs = f" {dear} more cost something; give it a --budget to have them." if dear and not self.paying else ""
            return Plan((), nothing.left_out, nothing.reason + costs)
        if self.engines is not None and self.engines.serves:
            self._wanted_s = None
            return Plan((), (), self._said)
        self._wanted_s = self.clock.monotonic() if self._wanted_s is None else self._wanted_s
        looked = self.scout.looked and (self.engines is None or self.engines.looked)
        if not looked and self.clock.monotonic() - self._wanted_s < BUY_WAIT_S:
            return Plan((), (), self._said)
        self._wanted_s = None
        choice = cheapest(self.model.needs, there, links)
        rival = (choice.price, choice.replicas[0].token_ms) if choice.replicas else None
        if self.engines is not None and self.engines.buy(rival):
            return Plan((), (), self._said)
        if not choice.replicas:
            return choice
        places = {stage.node for one in choice.replicas for stage in one.stages}
        wanted = [
            (one.node, offer)
            for one in there
            if one.price and one.node in places and not self._is_paid(one.node)
            and (offer := self.scout.offer(one.node)) is not None
        ]  # fmt: skip
        if not wanted:
            return nothing
        self._buying = self._begin(self._take_places(self.paying, wanted))
        names = ", ".join(sorted(self.scout.name(node) for node in places))
        return Plan((), (), f"Chosen for {format_price(choice.price)} at most: {names}. {choice.reason}")

    async def _take_places(self, paying: Paying, wanted: Sequence[tuple[bytes, Offer]]) -> None:
        try:
            await paying.take(wanted)
        except ShoalError as error:
            self.say(f"Nothing was taken for money: {error.sentence}")
            self.scout.failed(Loss(error.sentence.rstrip("."), frozenset(node for node, _ in wanted)))
            for node, _ in wanted:
                self.scout.refused(node)
        else:
            for node, _ in wanted:
                self.scout.taken(node)
        self.wake()

    def _let_go_unused(self, paying: Paying, there: set[bytes]) -> None:
        rings = [*self._placed.values(), *self._retiring]
        used = {place.node for ring in rings for place in ring.places}
        for node in paying.taken - used:
            why = "not needed any more" if node in there else "went away"
            self._begin(paying.part_from(node, TAKEN_BACK if node in paying.leaves_s else why))
            self.scout.refused(node)

    # --- owners who take their nodes back --------------------------------------------------------------------------

    def _leaves_s(self, ring: NodeRing) -> float:
        """When it ends because a node of it is let go; never, if none is taken back."""
        leaves_s = self.paying.leaves_s if self.paying is not None else {}
        return min((leaves_s.get(place.node, math.inf) for place in ring.places), default=math.inf)

    def _next_leaves_s(self) -> float:
        """In how many seconds the next ring does."""
        rings = [ring for ring in (*self._placed.values(), *self._retiring) if not ring.lost.done()]
        return max(0.0, min(map(self._leaves_s, rings), default=math.inf) - self.clock.monotonic())

    def _let_leave(self, paying: Paying) -> None:
        """Nothing more is placed on a node that is taken back. Its streams go on elsewhere where they can, and else
        there until the notice is over."""
        for node in paying.leaves_s:
            self.scout.leaving(node)
        for ring in (*self._placed.values(), *self._retiring):
            leaves_s = self._leaves_s(ring)
            ring.leaving = ring.leaving or leaves_s < math.inf
            if leaves_s <= self.clock.monotonic() and not ring.lost.done():
                self.say(f"{ring.name} is let go: the notice of its owner is over.")
                ring.lose(Loss("the notice of its owner is over"))

    def _staying(self) -> tuple[Replica, ...]:
        """Replicas that serve on nodes that are taken back: they stay where there is nothing else yet."""
        if any(not one.leaving and not one.standby for one in self.serving):
            return ()
        return tuple(one for one in self._plan.replicas if self._stays(self._placed.get(self._places(one))))

    def _stays(self, ring: NodeRing | None) -> bool:
        """It serves, until the notice of an owner is over."""
        return ring in self.serving and ring is not None and not ring.lost.done() and self._leaves_s(ring) < math.inf

    def _let_end(self, paying: Paying) -> None:
        """There is hardly any money left: streams go on elsewhere where they can, and else where they are, until there
        is none."""
        self._ending = True
        for ring in self._placed.values():
            if any(self._is_paid(place.node) for place in ring.places):
                ring.leaving = True
                if paying.spent:
                    ring.lose(Loss(paying.closing.partition(";")[0]))
        if paying.spent:
            for node in list(paying.taken):
                paying.let_go(node, "worked until the budget was used up")

    def _let_go_on(self) -> None:
        """There is more money: those that are still there stay, and others are looked for anew."""
        self._ending, self._settled_with = False, None
        for ring in self._placed.values():
            ring.leaving = ring.asked_to_leave.done()

    def _earned(self, ring: NodeRing, at: int, parts: int, receipt: bytes | None) -> None:
        """By what a token takes in that stage."""
        place, ready = ring.places[at], ring.measured(at)
        if self.paying is not None and ready is not None:
            takes_us = token_us(place.stop - place.first, ready.layer_ms, ready.last_ms)
            self.paying.served(place.node, parts, takes_us, receipt)

    def _places(self, replica: Replica) -> Places:
        return tuple(
            StagePlace(
                node=stage.node, addresses=self.scout.addresses(stage.node), first=stage.first, stop=stage.stop
            )
            for stage in replica.stages
        )  # fmt: skip

    def _carry_out(self, primary: dict[Places, Replica], spare: dict[Places, Replica]) -> None:
        wanted = {**spare, **primary}
        invited = []
        over = [places for places, ring in self._placed.items() if ring.lost.done() or places not in wanted]
        retired = [self._placed.pop(places) for places in over]
        self._retiring += retired
        for places, replica in wanted.items():
            if places not in self._placed:
                ring = self._new_ring(places, replica)
                self._placed[places] = ring
                invited.append(self._begin(self._invite(ring)))
            ring = self._placed[places]
            if ring.standby and places in primary and ring in self.serving:
                self.say(f"{ring.name} has taken over.")
            ring.standby = places not in primary
        for ring in retired:
            self._begin(self._retire(ring, tuple(invited)))

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- one ring --------------------------------------------------------------------------------------------------

    def _new_ring(self, places: Places, replica: Replica) -> NodeRing:
        links = [link for place in places if (link := self.scout.link(place.node)) is not None]
        names = [self.scout.name(place.node) for place in places]
        number = self.dice.bytes(16)
        meter = self.metering.ring(
            number, places, names, lambda at, parts, receipt: self._earned(ring, at, parts, receipt)
        )
        ring = NodeRing(
            " - ".join(names), number, places, links, self.clock, token_ms=replica.token_ms, meter=meter,
            loaded=self.paying.ready if self.paying is not None else lambda _: None,
        )  # fmt: skip
        self.rings.add(ring)
        ring.lost.add_done_callback(lambda lost: self._lost(ring, lost.result()))
        ring.asked_to_leave.add_done_callback(lambda asked: self._leaving(ring, asked.result()))
        if len(links) < len(places):
            ring.lose(Loss("the link to a stage of it is down"))
        return ring

    def _lost(self, ring: NodeRing, loss: Loss) -> None:
        self._stop_serving(ring)
        if ring in self._placed.values():
            self.say(f"{ring.name} is lost: {loss.reason}.")
        self.scout.failed(loss)
        for node in loss.nodes:
            if self.paying is not None and self._is_paid(node):
                self.paying.let_go(node, loss.reason)
        self._wake.set()

    def _leaving(self, ring: NodeRing, asked: tuple[bytes, str]) -> None:
        node, reason = asked
        if self.paying is not None:
            self.paying.leaves_s.pop(node, None)  # it does not wait for its notice
        self.say(f"{self.scout.name(node)} wants to go: {reason}")
        self.scout.leaving(node)
        self._wake.set()

    def _stop_serving(self, ring: NodeRing) -> None:
        with contextlib.suppress(ValueError):
            self.serving.remove(ring)

    async def _invite(self, ring: NodeRing) -> None:
        """Have its stages load their layers; it serves when all of them say that they are ready."""
        try:
            await asyncio.gather(*(self._invite_stage(ring, at) for at in range(len(ring.places))))
        except LinkError as error:
            ring.lose(Loss(error.sentence.rstrip(".")))
            return
        loading = self._begin(self._until_ready(ring))
        ring.lost.add_done_callback(lambda _: loading.cancel())

    async def _invite_stage(self, ring: NodeRing, at: int) -> None:
        place, link = ring.places[at], self.scout.link(ring.places[at].node)
        if link is None:
            raise LinkError(f"The link to {self.scout.name(place.node)} is down.")
        parts = self.model.parts_of(place.first, place.stop)
        invite = StageInvite(
            job=self.model.envelope.to_bytes(),
            ring=ring.ring,
            stages=ring.places,
            mine=at,
            files=tuple(parts),
            parts=tuple(parts.values()) if any(parts.values()) else (),
            memory_bytes=(place.stop - place.first) * self.model.needs.cache_bytes,
            holders=(self.model.holder,),
        )
        self.scout.taken(place.node)
        try:
            await link.request(invite.KIND, encode(invite, link.version), deadline_s=INVITE_DEADLINE_S)
        except LinkError as error:
            if isinstance(error, Refused):
                self.scout.refused(place.node)
            ring.lose(Loss(f"{self.scout.name(place.node)}: {error.sentence.rstrip('.')}", frozenset({place.node})))
            raise

    async def _until_ready(self, ring: NodeRing) -> None:
        slow = await slow_stages(ring, [self._stage_bytes(place) for place in ring.places], self.clock)
        if slow:
            names = [f"{self.scout.name(ring.places[at].node)} ({said})" for at, said in slow.items()]
            nodes = frozenset(ring.places[at].node for at in slow)
            ring.lose(Loss(f"its layers were not loaded by {', '.join(names)}", nodes))
            return
        computing_ms = 0.0
        for at, place in enumerate(ring.places):
            ready = ring.measured(at)
            assert ready is not None
            computing_ms += ready.layer_ms * (place.stop - place.first) + ready.last_ms
            self.scout.measured(place.node, ready.layer_ms, ready.last_ms)
        expected_s = ring.token_ms / 1000
        ring.latency = Latency(expected_s, expected_s / 4, computing_ms / 1000)
        if not await self._try(ring):
            return
        self.serving.append(ring)
        layers = ", ".join(f"{place.first}-{place.stop - 1}" for place in ring.places)
        self.say(f"{ring.name} is {'in reserve' if ring.standby else 'ready'}: {computing_ms:.1f} ms of computing a "
                 f"token, layers {layers}.")  # fmt: skip

    def _stage_bytes(self, place: StagePlace) -> int:
        parts = self.model.parts_of(place.first, place.stop)
        return sum(part_bytes(self.model.job.files[number].blob, part) for number, part in parts.items())

    async def _try(self, ring: NodeRing) -> bool:
        """Whether something gets through it."""
        try:
            await ring.try_out(int.from_bytes(self.dice.bytes(8)) >> 1)
        except RingLost:
            return False
        except RingRefused as error:
            if error.cause_code != FULL:  # layers that other rings use too may be full of their streams
                ring.lose(Loss(error.sentence.rstrip("."), frozenset({ring.places[-1].node})))
                return False
        return not ring.lost.done()

    async def _retire(self, ring: NodeRing, invited: Sequence[asyncio.Task[None]]) -> None:
        """Let a ring go: after those that come instead were invited, so that they take over layers that are loaded, and
        when its streams have gone on elsewhere."""
        ring.leaving = True
        if invited:
            await asyncio.wait(invited)
        until = self.clock.monotonic() + RETIRE_S
        while not ring.lost.done():
            others = any(not one.leaving and not one.standby for one in self.serving)
            if not ring.streams and (others or not (self._placed or self._stays(ring))):
                break
            if self.clock.monotonic() >= until and not self._stays(ring):
                break
            await self.clock.sleep(RETIRE_LOOK_S)
        self._stop_serving(ring)
        await ring.close("The plan has changed.")
        self._retiring.remove(ring)
        self.wake()


async def slow_stages(ring: NodeRing, sizes: Sequence[int], clock: Clock) -> dict[int, str]:
    """Wait until a ring is ready, or until stages of it, which have so many bytes to fetch, do not get on: those, and
    what each of them did. Whoever fetches what it has fetched already gets no further than its size allows."""
    began, fetched = clock.monotonic(), list(ring.fetched())
    while True:
        with contextlib.suppress(TimeoutError):
            await within(clock, LOAD_PATIENCE_S, _ready(ring))
            return {}
        now, before, fetched = clock.monotonic(), fetched, list(ring.fetched())
        slow = {}
        for at, size in enumerate(sizes):
            got = fetched[at] - before[at]
            late = now - began >= patience_s(size, 2 * LOAD_PATIENCE_S)
            if ring.measured(at) is None and (late or got < LOAD_PATIENCE_S * BYTES_PER_S_LEAST):
                slow[at] = (
                    f"{now - began:.0f} s for {format_bytes(size)}, of which {format_bytes(got)} in the last "
                    f"{LOAD_PATIENCE_S:.0f} s"
                )
        if slow:
            return slow


async def _ready(ring: NodeRing) -> None:
    await asyncio.shield(ring.ready)
