"""Which nodes a job takes, and how long its rounds are with them: those that fit, are near to one another, have a bond
and are worth their money, as far as the job file asks for it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.driver.gang import LOOK_EVERY_S, LinkedNode, fastest_float32, find_gang, measured_flops, why_not
from shoal.driver.nearness import near_gang
from shoal.driver.treasurer import Treasurer
from shoal.house import RemoteLedger
from shoal.market import Needed, Wish
from shoal.market.goodput import Amount, TrainingWork
from shoal.market.requirements import Means, flops_text
from shoal.protocol.holds import LEASE_STEP_MS
from shoal.protocol.offers import Offer, OfferFind
from shoal.protocol.training import TrainJob
from shoal.quantities.money import format_money
from shoal.rounds.length import RoundLength, choose_round_length, exchange_takes_s, members_of_full_speed
from shoal.sdk.costs import Costs, costs_of, mix_for
from shoal.sdk.jobfile import JobFile
from shoal.sdk.loop_script import loop_kind
from shoal.sdk.preparation import Prepared
from shoal.sdk.spending import Lent, Spending
from shoal.training.updates import update_bytes
from shoal.world import Clock, Directory, Endpoint
from shoal.world.quotes import NotSecured, is_free

CPU_EFFICIENCY = 0.3
"""Share of a device's measured matmul rate that training reaches, about: only for choosing the round length, and for
plans."""
STEP_LEAST_S = 0.004
"""No inner step is quicker: launching its kernels takes that long."""
SAY_EVERY_S = 10.0
"""While nodes are looked for again and again, why those that are there do not do."""
BFLOAT16_AHEAD = 1.5
"""How much faster than float32 it has to have measured to be worth its rounding."""
CLOSE_AND_BONDED = "are near enough to one another, and have the bond that is asked for"
CANDIDATES_MAX = 256
"""Nodes of which a job that pays chooses."""


def slowest_round_trip_ms(gang: Sequence[LinkedNode]) -> float | None:
    """The longest round trip between this driver and a node, as far as measured."""
    trips = (one.link.stats().round_trip_ms for one in gang)
    return max((trip for trip in trips if trip is not None), default=None)


def slowest_rate_bps(gang: Sequence[LinkedNode]) -> float | None:
    """What the slowest node measured that it can send."""
    rates = (one.offer.capability.hub_rate_bps for one in gang)
    return min((rate for rate in rates if rate > 0), default=None)


def choose_dtype(offers: Sequence[Offer]) -> str:
    """bfloat16 where every node's fastest device is an accelerator that measured it well ahead of float32, as all
    members of a job compute alike; else float32."""

    def fast(offer: Offer) -> bool:
        rates = [
            {rate.dtype: rate.flops for rate in device.throughput}
            for device in offer.capability.devices
            if device.kind != "cpu"
        ]
        best = max(rates, key=lambda each: each.get("float32", 0.0), default={})
        return best.get("bfloat16", 0.0) > BFLOAT16_AHEAD * best.get("float32", float("inf"))

    return "bfloat16" if offers and all(fast(offer) for offer in offers) else "float32"


@dataclass(frozen=True)
class Size:
    """What of a job says how long its steps take."""

    parameters: int
    sequence_tokens: int
    samples_per_s: float = 0.0
    """Of the owner's own loop, where it was tried."""

    @classmethod
    def of(cls, prepared: Prepared) -> Size:
        return cls(prepared.model.parameters, prepared.data.sequence_tokens, prepared.samples_per_s)

    @classmethod
    def of_job(cls, job: TrainJob) -> Size:
        return cls(job.model.parameters, job.data.sequence_tokens)


class Choosing:
    """For one job, from its file."""

    def __init__(
        self,
        job_file: JobFile,
        *,
        owner: bytes,
        endpoint: Endpoint,
        directory: Directory,
        clock: Clock,
        say: Callable[[str], None],
        seen: Mapping[bytes, float],
        spending: Spending | Lent | None,
        ledger: RemoteLedger | None,
        treasurer: Treasurer | None,
    ) -> None:
        """`seen` is what earlier jobs have shown of nodes. A job that spends has a treasurer, and its ledger."""
        self._file = job_file
        self._owner, self._endpoint, self._directory = owner, endpoint, directory
        self._clock, self._say, self._seen = clock, say, seen
        self._spending, self._ledger, self._treasurer = spending, ledger, treasurer
        self._far_ms: dict[bytes, float] = {}

    def wanted(self) -> OfferFind:
        needs = self._file.requirements
        own_loop = self._file.model.script is not None
        return OfferFind(
            accepts=loop_kind(self._owner, self._file.name) if own_loop else "train",
            device=None if needs.each.device == "any" else needs.each.device,
            memory_bytes_min=needs.each.memory_min_bytes,
            idle_only=True,
        )

    def wish(self, *, waiting: bool = True) -> Wish:
        """Who only plans may look at what it could not pay for."""
        wish = dataclasses.replace(self._file.requirements.wish, seen=self._seen)
        if not waiting:
            return wish
        ledger = self._spending.ledger.ledger if self._spending is not None else None
        return dataclasses.replace(wish, means=Means(ledger))

    async def why_not(self) -> str:
        needs = self._file.requirements
        return await why_not(self._directory, self.wanted(), self.wish(waiting=False), needs.needed, self._far_ms)

    async def gang(
        self,
        without: Collection[bytes] = (),
        former: Collection[bytes] = (),
        *,
        waiting: bool = True,
    ) -> list[LinkedNode]:
        needs = self._file.requirements
        script = self._file.model.script
        advice = "Start more with `shoal node start`, or ask for fewer (requirements.nodes_min)."
        if script is not None:
            advice = f"Start processes of your loop, on this machine or others: `python {script}`."
        return await find_gang(
            self.wanted(),
            self.wish(waiting=waiting),
            needed=self._needed(without, former) if waiting else Needed(0),
            nodes_max=needs.nodes_max if self._treasurer is None and waiting else max(needs.nodes_max, CANDIDATES_MAX),
            wait_s=needs.wait_s,
            advice=advice,
            endpoint=self._endpoint,
            directory=self._directory,
            clock=self._clock,
            without=without,
            former=former,
            say=self._say,
            far_ms=self._far_ms,
        )

    def _needed(self, without: Collection[bytes], former: Collection[bytes]) -> Needed:
        """The retired are not waited for again."""
        needed = self._file.requirements.needed
        if not without and not former:
            return needed
        return Needed(max(1, needed.nodes - len(without)))

    def measured_flops(self, gang: Sequence[LinkedNode]) -> list[float]:
        return measured_flops(gang, self.wish(waiting=False))

    async def secure(
        self, size: Size, gang: list[LinkedNode], length: RoundLength
    ) -> tuple[list[LinkedNode], RoundLength]:
        """Those of a gang that have a bond, are near to one another, worth their money and keep a place, as far as the
        job asks for it, and the round length for them. While too few do, others are looked for, as long as the job
        file says. Raises NotSecured."""
        needs = self._file.requirements
        if self._treasurer is None and needs.latency_within_ms is None and not needs.bond_min:
            return gang, length
        until, say_from = self._clock.monotonic() + needs.wait_s, 0.0
        while True:
            try:
                if needs.bond_min:
                    gang = await self._bonded(gang, needs.bond_min, needs.nodes_min)
                if needs.latency_within_ms is not None:
                    gang = await near_gang(gang, needs.latency_within_ms, needs.nodes_min)
                self._refuse_too_slow(gang, CLOSE_AND_BONDED)
                chosen = self._worth_it(size, gang, length)
                held = await self._held(chosen, [one for one in gang if one not in chosen])
                try:
                    self._refuse_too_slow(held, "kept a place")
                except NotSecured:
                    if self._treasurer is not None:
                        await self._treasurer.let_go()
                    raise
                return held, self.length(size, held)
            except NotSecured as error:
                if self._clock.monotonic() >= until:
                    raise
                if self._clock.monotonic() >= say_from:
                    self._say(error.sentence)
                    say_from = self._clock.monotonic() + SAY_EVERY_S
            await self._clock.sleep(LOOK_EVERY_S)
            gang = await self.gang()

    def _refuse_too_slow(self, gang: Sequence[LinkedNode], what: str) -> None:
        """Raises NotSecured where nodes have not together what the job needs."""
        needed, flops = self._file.requirements.needed, self.measured_flops(gang)
        if needed.flops and not needed.met_by(flops):
            raise NotSecured(f"{needed.so_far(flops)} {what} (requirements.flops_together).")

    async def narrowed(self, gang: list[LinkedNode]) -> tuple[list[LinkedNode], str]:
        """Those of a gang that have a bond and are near to one another, as far as the job asks for it, for who only
        plans; and why none are, where they would be too few."""
        needs = self._file.requirements
        try:
            if needs.bond_min and self._ledger is not None:
                gang = await self._bonded(gang, needs.bond_min, needs.nodes_min)
            if needs.latency_within_ms is not None and len(gang) >= needs.nodes_min:
                gang = await near_gang(gang, needs.latency_within_ms, needs.nodes_min)
            self._refuse_too_slow(gang, CLOSE_AND_BONDED)
        except NotSecured as error:
            return [], error.sentence
        return gang, ""

    async def _bonded(self, gang: list[LinkedNode], least_micro: int, nodes_min: int) -> list[LinkedNode]:
        """Those for whose word so much is at stake while a place of theirs is held. Raises NotSecured, and what the
        ledger does."""
        if self._ledger is None:
            raise NotSecured("requirements.bond_min asks what is at stake at a ledger; name yours with a --budget.")
        ledger, until_ms = self._ledger, self._clock.now_ms() + LEASE_STEP_MS
        stakes = await asyncio.gather(*(ledger.bond_of(one.node, until_ms) for one in gang))
        bonded = [one for one, stake in zip(gang, stakes, strict=True) if stake >= least_micro]
        if len(bonded) < nodes_min:
            most = format_money(sorted(stakes)[-nodes_min]) if len(stakes) >= nodes_min else "nothing"
            raise NotSecured(
                f"{len(bonded)} of {len(gang)} nodes have a bond of {format_money(least_micro)} "
                f"(requirements.bond_min), and {nodes_min} are needed; with {most} there would be enough."
            )
        return bonded

    def _worth_it(self, size: Size, gang: list[LinkedNode], length: RoundLength) -> list[LinkedNode]:
        """The mix that does the most for its money, or is done by the deadline for the least. Raises NotSecured where
        none is."""
        needs, spending = self._file.requirements, self._spending
        if self._file.model.script is not None or spending is None:
            return gang
        mix = mix_for(
            self._work(size, gang, length), [one.offer for one in gang],
            dtype=self.dtype(gang), tokens=self._file.tokens,
            nodes_min=min(len(gang), needs.nodes_min), nodes_max=needs.nodes_max, deadline_s=self._file.deadline_s,
            together=self._together(gang),
        )  # fmt: skip
        if not mix.members:
            raise NotSecured(mix.reason)
        expected, currency = mix.cost_micro(self._file.tokens), spending.ledger.currency
        self._say(
            f"Chosen {mix.reason} Expected for the job: {format_money(expected)} {currency}, by the speeds that are "
            "offered; a node's price for a token follows from what it measures on the job."
        )
        if expected > spending.budget_micro:
            self._say(
                f"That is more than its budget of {format_money(spending.budget_micro)} {currency}: it will stop when "
                "that is used up, to be resumed with a larger one."
            )
        return [gang[at] for at in mix.members]

    async def resumed(self, gang: list[LinkedNode]) -> list[LinkedNode]:
        """Of those with which a job goes on. Raises NotSecured."""
        within_ms = self._file.requirements.latency_within_ms
        if within_ms is not None:
            gang = await near_gang(gang, within_ms, 1)
        if self._file.requirements.bond_min and gang:
            gang = await self._bonded(gang, self._file.requirements.bond_min, 1)
        return await self._held(gang)

    async def refuse_unbonded(self, node: LinkedNode) -> None:
        """One that would join later. Raises NotSecured, and what the ledger does."""
        await self._bonded([node], self._file.requirements.bond_min, 1)

    async def _held(self, gang: list[LinkedNode], spares: Sequence[LinkedNode] = ()) -> list[LinkedNode]:
        if self._treasurer is None:
            return gang
        return await self._treasurer.hold(gang, min(len(gang), self._file.requirements.nodes_min), spares)

    async def set_aside(self, gang: list[LinkedNode]) -> None:
        """The money for those that keep a place; those that do not take it are left out of the gang."""
        if self._treasurer is None:
            return
        free = sum(is_free(one.offer) for one in gang)
        taken = await self._treasurer.open(max(0, min(len(gang), self._file.requirements.nodes_min) - free))
        gang[:] = [one for one in gang if is_free(one.offer) or one.node in taken]

    def dtype(self, gang: Sequence[LinkedNode]) -> str:
        return choose_dtype([one.offer for one in gang]) if self._file.dtype == "auto" else self._file.dtype

    def length(self, size: Size, gang: Sequence[LinkedNode]) -> RoundLength:
        rounds = self._file.rounds
        if rounds.inner_steps != "auto":
            return RoundLength(rounds.inner_steps, f"{rounds.inner_steps} inner steps a round, as the job file says.")
        speeds = [fastest_float32(one.offer) for one in gang]
        flops = max(speeds, default=0.0)
        work = 6 * size.parameters * self._file.batch_samples * size.sequence_tokens
        step_s = max(STEP_LEAST_S, work / (CPU_EFFICIENCY * flops) if flops else 1.0)
        if size.samples_per_s:
            step_s = self._file.batch_samples / size.samples_per_s
        return choose_round_length(
            step_s=step_s,
            update_bytes=update_bytes(rounds.settings.codec, size.parameters, rounds.settings.sparse_keep),
            members=len(gang),
            round_trip_s=(slowest_round_trip_ms(gang) or 0.0) / 1000,
            rate_bps=slowest_rate_bps(gang),
            bytes_per_s_budget=rounds.byte_budget,
            bytes_per_token_budget=rounds.bytes_per_token,
            step_tokens=self._file.batch_samples * size.sequence_tokens * members_of_full_speed(speeds),
            lag=rounds.settings.lag,
        )

    def _work(self, size: Size, gang: Sequence[LinkedNode], length: RoundLength) -> TrainingWork:
        settings = self._file.rounds.settings
        sent_bytes = update_bytes(settings.codec, size.parameters, settings.sparse_keep)
        round_trip_s = (slowest_round_trip_ms(gang) or 0.0) / 1000
        return TrainingWork(
            flops_per_token=6.0 * size.parameters,
            efficiency=CPU_EFFICIENCY,
            step_tokens=self._file.batch_samples * size.sequence_tokens,
            inner_steps=length.inner_steps,
            exchange_s=lambda members, rate_bps: exchange_takes_s(sent_bytes, members, round_trip_s, rate_bps),
            hidden=settings.lag > 0,
            step_least_s=STEP_LEAST_S,
        )

    def costs(
        self,
        prepared: Prepared,
        gang: Sequence[LinkedNode],
        length: RoundLength,
        deadline_s: float | None = None,
    ) -> Costs | None:
        if self._file.model.script is not None:
            return None
        needs = self._file.requirements
        work = self._work(Size.of(prepared), gang, length)
        return costs_of(
            work, [one.offer for one in gang], dtype=self.dtype(gang), tokens=self._file.tokens,
            currency=needs.each.currency, nodes_min=needs.nodes_min, nodes_max=needs.nodes_max,
            deadline_s=deadline_s or self._file.deadline_s, together=self._together(gang),
        )  # fmt: skip

    def _together(self, gang: Sequence[LinkedNode]) -> Amount | None:
        needed = self._file.requirements.flops_together
        if not needed:
            return None
        return Amount(np.array(self.measured_flops(gang)), needed, flops_text(needed))
