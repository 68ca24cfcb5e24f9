"""Replaying a member's work: the Contribution's claims beside what this machine computes from the same artifacts.

A replay starts at the newest private state that the member kept before the round in question (or at zero, before its
first), and repeats the member's rounds from there. Everything else it needs is public: the chain of records, the
updates, the start state. Shared states that are not kept are computed anew from the Commits.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from shoal.errors import BadInput, EngineError, ShoalError, StorageError
from shoal.protocol.blobs import BlobRef
from shoal.protocol.training import Assignment, Commit, Contribution, TrainJob
from shoal.training.commands import Prepare, RoundDone, RunRound, ShardFile
from shoal.training.outer import OuterStep, WeighedUpdate
from shoal.training.process import EngineProcess
from shoal.training.state import SharedState
from shoal.training.updates import Update, decode_update
from shoal.verification.replay import Outcome, Recomputed, Thresholds, Verdict, judge, not_replayable

STATES_KEPT = 4
THREADS_MAX = 64
PROCESSES_MAX = 8
"""What a member says it computed with is repeated up to this; beyond, a replay is one on another engine."""
CHAIN_MAX = 10_000
"""Longest chain of a member's own rounds that is walked back to find where a replay can start."""

REFUSALS_SHOWN = 3
"""States that were not opened, in the sentence of one verdict."""
CHAIN_ELSEWHERE_MAX = 3
"""After more rounds than this on another engine, a difference says nothing: rounding grows about fivefold with each
(docs/training.md has the figures). `ReplaySettings.snapshot_every` is no more by default: whichever engine a member
names, each of its rounds can be decided."""

FindBlob = Callable[[bytes], Awaitable[Path]]
"""The file of the blob with this hash. Raises ShoalError when nobody has it."""
OpenPrivate = Callable[[Contribution, bytes], Awaitable[Path]]
"""The file of the private state with this hash, opened by the member of a Contribution. Raises ShoalError."""
StartEngine = Callable[..., Awaitable[EngineProcess]]
"""Starts what computes: `EngineProcess.start`, or for a user's own loop one that runs the user's code."""


class NoSuchRound(BadInput):
    """A round or node that is not in the run."""

    code = "SH-129"


@dataclass
class Record:
    """What the chain of a job holds, for looking things up."""

    job: TrainJob
    job_id: bytes
    assignments: dict[bytes, Assignment] = field(default_factory=dict)
    contributions: dict[bytes, Contribution] = field(default_factory=dict)
    commits: dict[int, Commit] = field(default_factory=dict)
    """By round; of the chain that counts."""

    def predecessor(self, contribution: Contribution) -> Contribution | None:
        """The same member's Contribution whose private state this one went on from."""
        before = [
            one
            for one in self.contributions.values()
            if one.member == contribution.member
            and one.round < contribution.round
            and one.private_after == contribution.private_before
        ]
        return max(before, key=lambda one: one.round, default=None)


@dataclass(frozen=True)
class Replayed:
    """A verdict, and what it cost."""

    verdict: Verdict
    rounds: int
    """How many of the member's rounds were computed."""
    opened_bytes: int
    """Private state that the member opened for it."""


class Replayer:
    """Replays Contributions of one job on this machine. Close it when done: it holds an engine process."""

    def __init__(
        self,
        record: Record,
        *,
        find_blob: FindBlob,
        open_private: OpenPrivate,
        scratch: Path,
        device: str = "cpu",
        threads: int | None = None,
        thresholds: Thresholds | None = None,
        start_engine: StartEngine = EngineProcess.start,
    ) -> None:
        """`threads` other than the member's own gives a comparison within thresholds instead of bit for bit."""
        self._record = record
        self._find_blob = find_blob
        self._open_private = open_private
        self._scratch = scratch
        self._device = device
        self._threads = threads
        self._thresholds = thresholds
        self._start_engine = start_engine
        self._engine: EngineProcess | None = None
        self._engine_key: tuple[int, int] | None = None
        self._fresh_private = b""
        self._states: OrderedDict[int, SharedState] = OrderedDict()

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.stop()
        self._engine, self._engine_key = None, None

    def hold_state(self, round_number: int, state: SharedState) -> None:
        """Give a shared state that is known already, so that it need not be computed from the Commits."""
        self._states[round_number] = state
        self._states.move_to_end(round_number)
        while len(self._states) > max(STATES_KEPT, self._record.job.replay.snapshot_every + STATES_KEPT):
            self._states.popitem(last=False)

    async def replay(self, contribution: Contribution, say: Callable[[str], None] = lambda _: None) -> Replayed:
        """Recompute one Contribution and judge it. What cannot be had makes it not replayable, with the reason."""
        opened, done = 0, 0
        refusals: list[str] = []
        try:
            engine = await self._engine_for(contribution)
            chain, private = await self._chain(contribution, refusals)
            if private is not None:
                opened = private.stat().st_size
            await engine.load_private(private)
            for one in chain:
                say(f"round {one.round} ({done + 1} of {len(chain)})")
                verdict = await self._repeat(engine, one)
                done += 1
                if (
                    verdict.outcome is Outcome.MISMATCH
                    and done > CHAIN_ELSEWHERE_MAX
                    and one.engine != self._engine_class
                ):
                    raise NotOpened(
                        f"Round {one.round} differs, but it was the {done}th to be repeated on another engine, where "
                        f"rounding alone grows from round to round; repeat it on {one.engine.device} with "
                        f"{one.engine.threads} threads, or have members keep their state more often."
                    )
                if verdict.outcome is not Outcome.MATCH and one is not contribution:
                    sentence = (
                        f"Round {one.round}, on which this one builds, was not done as claimed. {verdict.sentence}"
                    )
                    verdict = Verdict(verdict.outcome, sentence, verdict.measured, verdict.threshold, verdict.measure)
                if verdict.outcome is not Outcome.MATCH:
                    break
        except ShoalError as error:
            verdict = not_replayable(error.sentence)
            if isinstance(error, EngineError):
                await self.close()  # the next replay shall not suffer from what this one did to the engine
        if refusals:
            sentence = f"{verdict.sentence} Not opened: {' '.join(refusals[:REFUSALS_SHOWN])}"
            verdict = replace(verdict, sentence=sentence)
        return Replayed(verdict, done, opened)

    # ---- the pieces ----

    async def _engine_for(self, contribution: Contribution) -> EngineProcess:
        threads = self._threads or min(contribution.engine.threads, THREADS_MAX)
        processes = min(contribution.engine.processes, PROCESSES_MAX)
        key = (threads, processes)
        if self._engine is not None and self._engine_key == key:
            return self._engine
        await self.close()
        job = self._record.job
        self._engine = await self._start_engine("the replay", threads=threads)
        shards = [ShardFile(str(await self._find_blob(shard.blob.hash)), shard.sequences) for shard in job.data.shards]
        prepared = await self._engine.prepare(
            Prepare(
                job=job,
                state=str(await self._find_blob(job.model.start.hash)),
                shards=tuple(shards),
                device=self._device,
                threads=threads,
                processes=processes,
                dtype=job.dtype,
                measure=False,
            )
        )
        self._engine_key = key
        self._engine_class = prepared.engine
        self._fresh_private = prepared.private
        return self._engine

    async def _chain(self, contribution: Contribution, refusals: list[str]) -> tuple[list[Contribution], Path | None]:
        """The member's Contributions to repeat, oldest first, and the private state that the first goes on from. What
        it did not open on the way back to that goes into `refusals`."""
        chain = [contribution]
        for _ in range(CHAIN_MAX):
            first = chain[0]
            if first.private_before == self._fresh_private:
                return chain, None
            before = self._record.predecessor(first)
            if before is None or before.snapshot:
                try:
                    return chain, await self._open_private(contribution, first.private_before)
                except ShoalError as error:
                    refusals.append(f"the state before round {first.round}: {error.sentence}")
            if before is None:
                break
            chain.insert(0, before)
        raise NotOpened(f"The private state before round {contribution.round} could not be had.")

    async def _repeat(self, engine: EngineProcess, claimed: Contribution) -> Verdict:
        record = self._record
        assignment = record.assignments.get(claimed.assignment)
        if assignment is None:
            raise NotOpened(f"The Assignment of round {claimed.round} is not in the run folder.")
        share = next((one for one in assignment.shares if one.member == claimed.member), None)
        if share is None:
            raise NotOpened(f"The Assignment of round {claimed.round} gives this member nothing to do.")
        before = self._previous(assignment)
        base = await self._state_after(before, assignment)
        base_path = self._scratch / "base.state"
        await asyncio.to_thread(base.write, base_path)
        held = await engine.load_state(base_path)
        in_flight = None
        if claimed.builds_on is not None:
            earlier = record.contributions.get(claimed.builds_on)
            if earlier is None:
                raise NotOpened(f"The Contribution that round {claimed.round} builds on is not in the run folder.")
            in_flight = str(await self._find_blob(earlier.update.hash))
        update_path = self._scratch / "replayed.update"
        done = await engine.run_round(
            RunRound(
                round=claimed.round,
                base_state=held.state,
                in_flight=in_flight,
                step=assignment.step,
                tokens_done=before.tokens_total if before else 0,
                rounds_in_flight=assignment.round - 1 - (before.round if before else -1),
                round_samples=sum(one.samples for one in assignment.shares),
                member=claimed.member,
                ranges=share.ranges,
                update=str(update_path),
                sent=str(await self._find_blob(claimed.update.hash)),
            )
        )
        return judge(claimed, await self._recomputed(claimed, done, update_path), self._thresholds)

    async def _recomputed(self, claimed: Contribution, done: RoundDone, update: Path) -> Recomputed:
        return Recomputed(
            private_before=done.private_before,
            private_after=done.private_after,
            update_hash=done.update_hash,
            update_distance=_distance(await self._update(claimed.update), self._decode(update.read_bytes())),
            sketches=done.sketches,
            loss_first=done.loss_first,
            loss_last=done.loss_last,
            engine=self._engine_class,
        )

    def _decode(self, data: bytes) -> Update:
        job = self._record.job
        size = self._layout_size()
        return decode_update(data, job.rounds.codec, size, job.rounds.sparse_keep)

    def _layout_size(self) -> int:
        return next(iter(self._states.values())).layout.size

    async def _update(self, ref: BlobRef) -> Update:
        path = await self._find_blob(ref.hash)
        return self._decode(await asyncio.to_thread(path.read_bytes))

    def _previous(self, assignment: Assignment) -> Commit | None:
        """The Commit that an Assignment went on from, known by the next one's naming it too; none for the first."""
        record = self._record
        if assignment.previous == record.job_id:
            return None
        for number in range(max(0, assignment.round - 1 - record.job.rounds.lag), assignment.round):
            after = record.commits.get(number + 1)
            if number in record.commits and after is not None and after.previous == assignment.previous:
                return record.commits[number]
        raise NotOpened(
            f"The Commit that the Assignment of round {assignment.round} goes on from is not in the run folder."
        )

    async def _state_after(self, before: Commit | None, assignment: Assignment) -> SharedState:
        """The shared state that a round's work started from; computed from the Commits when it is not held."""
        number = before.round if before else -1
        held = [known for known in self._states if known <= number]
        if not held:
            start = await self._find_blob(self._record.job.model.start.hash)
            self.hold_state(-1, await asyncio.to_thread(SharedState.read, start))
            held = [-1]
        at = max(held)
        state = self._states[at]
        outer = OuterStep(self._record.job.rounds)
        while at < number:
            at += 1
            commit = self._record.commits.get(at)
            if commit is None:
                raise NotOpened(f"The Commit of round {at} is not in the run folder.")
            updates = [
                WeighedUpdate(await self._update(entry.update), entry.weight_ppm, entry.scale_ppm)
                for entry in commit.accepted
            ]
            state = await asyncio.to_thread(outer.apply, state, updates)
            if state.hash != commit.state:
                raise NotOpened(f"The updates of round {at} do not lead to the state that its Commit names.")
        self.hold_state(number, state)
        if state.hash != assignment.base_state:
            raise NotOpened(f"The Assignment of round {assignment.round} names another start state than its Commit.")
        return state


class NotOpened(StorageError):
    """Something that a replay needs is not there."""

    code = "SH-431"


def _distance(claimed: Update, replayed: Update) -> float:
    """Norm of the difference over the norm of the replayed update."""
    one, two = claimed.dense().astype(np.float64), replayed.dense().astype(np.float64)
    norm = float(np.linalg.norm(two))
    difference = float(np.linalg.norm(one - two))
    return difference / norm if norm > 0 else (0.0 if difference == 0 else float("inf"))


def find_contribution(record: Record, members: Mapping[bytes, bytes], round_number: int, node: bytes) -> Contribution:
    """The Contribution of a node to a round, the accepted one when there are several; `members` maps MemberId to
    NodeId. Raises NoSuchRound."""
    found = [
        (name, one)
        for name, one in record.contributions.items()
        if one.round == round_number and members.get(one.member) == node
    ]
    if not found:
        rounds = sorted({one.round for one in record.contributions.values() if members.get(one.member) == node})
        known = f"it contributed to rounds {rounds[0]} to {rounds[-1]}" if rounds else "it contributed to none"
        raise NoSuchRound(f"Node {node.hex()[:8]} has no contribution in round {round_number}; {known}.")
    commit = record.commits.get(round_number)
    accepted = {entry.contribution for entry in commit.accepted} if commit else set()
    return max(found, key=lambda each: (each[0] in accepted, each[1].term))[1]
