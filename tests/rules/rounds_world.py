"""A small world for the rules of rounds: a driver, its members, and a network that reorders and repeats.

Everything is real but the engine: keys, envelopes, records, both machines. The toy engine's shared state is a hash of
what was applied, and a member's private state (optimizer, residual) is the list of all work that ever went into it, so
that a trace of an excluded Contribution is there to be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from shoal.identity import Envelope, KeyPair, blake3_hash, hash_of_parts
from shoal.protocol.blobs import BlobRef
from shoal.protocol.messages import sign
from shoal.protocol.training import (
    PARTS_PER_MILLION,
    Accepted,
    Assignment,
    Commit,
    Contribution,
    DataRef,
    Engine,
    Excluded,
    Grant,
    Member,
    MemberNode,
    ModelRef,
    NodeWork,
    OptimizerSettings,
    ReplaySettings,
    RoundSettings,
    TrainJob,
)
from shoal.rounds import driving, following, succession

START_MS = 1_700_000_000_000
ENGINE = Engine("toy", "none", 1, 1)
TOKENS_PER_SAMPLE = 3


def key_of(name: str) -> KeyPair:
    return KeyPair.from_seed(blake3_hash(name.encode()))


OWNER = key_of("owner")
DRIVERS = (key_of("driver 0"), key_of("driver 1"))


def make_job(**changes: object) -> tuple[TrainJob, bytes]:
    values: dict[str, object] = {
        "name": "toy",
        "created_ms": START_MS,
        "seed": 1,
        "model": ModelRef(start=BlobRef(blake3_hash(b"start"), 5), parameters=10),
        "data": DataRef(samples=23, sequence_tokens=TOKENS_PER_SAMPLE),
        "token_budget": 400,
        "batch_samples": 2,
        "optimizer": OptimizerSettings(),
        "rounds": RoundSettings(inner_steps=3, grace_ms=1_000, deadline_ms=20_000),
        "replay": ReplaySettings(),
    }
    job = TrainJob(**{**values, **changes})
    return job, sign(OWNER, job).record_id


def make_member(job_id: bytes, name: str, session: int = 0) -> tuple[KeyPair, Member, bytes]:
    key = key_of(name)
    member = Member(
        job=job_id,
        nodes=(MemberNode(key.node_id, "whole", PARTS_PER_MILLION),),
        session=session.to_bytes(16, "big"),
        name=name,
    )
    return key, member, sign(key, member).record_id


def private_hash(lineage: tuple[int, ...]) -> bytes:
    return hash_of_parts("toy private", [number.to_bytes(8, "big") for number in lineage])


def state_after(state: bytes, accepted: tuple[Accepted, ...]) -> bytes:
    """The toy outer step: depends on the order, the weights and the updates."""
    if not accepted:
        return state
    parts = [entry.update.hash + entry.weight_ppm.to_bytes(8, "big") for entry in accepted]
    return hash_of_parts("toy state", [state, *parts])


def make_contribution(
    job: TrainJob,
    assignment: Assignment,
    assignment_id: bytes,
    member_id: bytes,
    node: bytes,
    builds_on: bytes | None = None,
    lineage: tuple[int, ...] = (),
    work: int = 0,
    compute_ms: int = 100,
) -> Contribution:
    share = next(share for share in assignment.shares if share.member == member_id)
    update = hash_of_parts("toy update", [assignment_id, member_id, private_hash(lineage), work.to_bytes(8, "big")])
    per_sample = job.data.sequence_tokens
    return Contribution(
        job=assignment.job,
        round=assignment.round,
        term=assignment.term,
        assignment=assignment_id,
        member=member_id,
        base_state=assignment.base_state,
        builds_on=builds_on,
        update=BlobRef(update, 10),
        work=(NodeWork(node, share.samples, share.samples * per_sample, compute_ms),),
        private_before=private_hash(lineage),
        private_after=private_hash((*lineage, work)),
        snapshot=(len(lineage) + 1) % job.replay.snapshot_every == 0,
        loss_first=2.0,
        loss_last=1.0,
        sketches=b"",
        engine=ENGINE,
    )


@dataclass
class Computing:
    begun: following.BeginWork
    base_state: bytes
    lineage: tuple[int, ...]


@dataclass
class SimMember:
    """The wiring of a node, in few lines."""

    world: World
    key: KeyPair
    member: Member
    member_id: bytes
    following: following.Following
    shared: bytes
    lineage: tuple[int, ...] = ()
    privates: dict[bytes | None, tuple[int, ...]] = field(default_factory=lambda: {None: ()})
    computing: Computing | None = None
    applying: following.Apply | None = None
    applied: list[tuple[int, bytes]] = field(default_factory=list)
    ready: bool = False
    gone: bool = False
    forks: list[following.ReportFork] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    unsent: dict[int, Contribution] = field(default_factory=dict)

    def feed(self, event: following.Event) -> None:
        if self.gone:
            return
        self.following, effects = following.step(self.following, event, self.world.now_ms)
        for effect in effects:
            match effect:
                case following.Apply():
                    assert self.applying is None
                    assert effect.commit.round == self.following.head.round + 1
                    self.applying = effect
                case following.BeginWork():
                    assert self.computing is None and self.applying is None
                    assert effect.assignment.base_state == self.shared
                    self.computing = Computing(effect, self.shared, self.lineage)
                case following.RollBack():
                    self.computing = None
                    self.lineage = self.privates[effect.to]
                case following.Send():
                    contribution = self.unsent.pop(effect.round)
                    self.world.to_driver(self.key, contribution)
                case following.AskCommits():
                    self.world.send_commits(self, effect.first_round, effect.last_round)
                case following.ReportFork():
                    self.forks.append(effect)
                case following.StopAndSay():
                    self.gone = True
                    self.world.stopped.append((self, effect.sentence))
                    self.world.drive(driving.MemberLeft(self.member_id, effect.sentence))
                case following.AnswerHead():
                    self.world.heads.append(effect.commit)
                case following.Ignore():
                    self.ignored.append(effect.sentence)
                case following.Counted():
                    pass

    def finish_apply(self) -> None:
        if self.applying is None or self.gone:
            return
        commit, self.applying = self.applying.commit, None
        self.shared = state_after(self.shared, commit.accepted)
        self.applied.append((commit.round, self.shared))
        self.feed(following.Applied(commit.round, self.shared))

    def finish_work(self) -> None:
        if self.computing is None or self.gone:
            return
        done, self.computing = self.computing, None
        self.world.works += 1
        work = self.world.works
        contribution = make_contribution(
            self.world.job, done.begun.assignment, done.begun.assignment_id, self.member_id, self.key.node_id,
            done.begun.builds_on, done.lineage, work, self.world.compute_ms(self, done.begun.share.samples),
        )  # fmt: skip
        contribution_id = sign(self.key, contribution).record_id
        self.lineage = (*done.lineage, work)
        self.privates[contribution_id] = self.lineage
        self.world.lineages[contribution_id] = (done.lineage, work)
        self.unsent[contribution.round] = contribution
        self.feed(following.Computed(contribution.round, contribution_id))
        self.unsent.pop(contribution.round, None)


@dataclass
class World:
    """All of it. `choose(n)` draws a number below n: the network's and the members' whims."""

    choose: Callable[[int], int]
    job: TrainJob
    job_id: bytes
    now_ms: int = START_MS
    members: list[SimMember] = field(default_factory=list)
    chain: list[tuple[Commit, bytes, Assignment]] = field(default_factory=list)
    envelopes: dict[int, Envelope] = field(default_factory=dict)
    assignment_envelopes: list[Envelope] = field(default_factory=list)
    queue: list[tuple[SimMember | None, Envelope]] = field(default_factory=list)
    """What is under way: to a member, or to the driver (None)."""
    fetching: list[driving.FetchUpdate] = field(default_factory=list)
    aggregating: driving.Aggregate | None = None
    assignments: dict[bytes, Assignment] = field(default_factory=dict)
    contributions: dict[bytes, Contribution] = field(default_factory=dict)
    lineages: dict[bytes, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    effects: list[driving.Effect] = field(default_factory=list)
    stopped: list[tuple[SimMember, str]] = field(default_factory=list)
    heads: list[Envelope | None] = field(default_factory=list)
    members_min: int = 1
    """Of the first term."""
    works: int = 0
    sessions: int = 0
    faulty_updates: bool = True
    speeds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.driver_key = DRIVERS[0]
        self.grant = sign(
            OWNER,
            Grant(
                job=self.job_id,
                drivers=tuple(key.node_id for key in DRIVERS),
                not_after_ms=START_MS + 10**10,
            ),
        )
        self.begin_term(self.driver_key, 0)

    # --- the driver's wiring ----------------------------------------------------------------------------------------

    def begin_term(self, key: KeyPair, last_term: int, retired: dict[bytes, str] | None = None) -> None:
        standing = succession.rebuild(self.job, self.job_id, self.chain)
        term = succession.next_term(self.job_id, self.grant.record_id, standing, last_term)
        self.driver_key = key
        self.term = sign(key, term)
        self.driving = driving.drive(
            self.job, self.job_id, key.node_id, term.number, standing, self.now_ms,
            members_min=1 if last_term else self.members_min, retired=retired,
        )  # fmt: skip
        self.fetching, self.aggregating = [], None
        for member in self.members:
            member.ready = False
            self.queue.append((member, self.term))

    def drive(self, event: driving.Event) -> tuple[driving.Effect, ...]:
        before = self.driving
        self.driving, effects = driving.step(before, event, self.now_ms)
        self.effects.extend(effects)
        for effect in effects:
            match effect:
                case driving.Assign():
                    envelope = sign(self.driver_key, effect.assignment)
                    assert envelope.record_id == effect.assignment_id
                    self.assignments[effect.assignment_id] = effect.assignment
                    self.assignment_envelopes.append(envelope)
                    self.send_all(envelope)
                case driving.PublishCommit():
                    envelope = sign(self.driver_key, effect.commit)
                    assert envelope.record_id == effect.commit_id
                    self.chain.append((effect.commit, effect.commit_id, self.assignments[effect.commit.assignment]))
                    self.envelopes[effect.commit.round] = envelope
                    self.send_all(envelope)
                case driving.FetchUpdate():
                    self.fetching.append(effect)
                case driving.Aggregate():
                    self.aggregating = effect
                case driving.CatchUp():
                    for member in self.members:
                        if member.member_id == effect.member_id:
                            self.send_commits(member, effect.first_round, effect.last_round)
                case driving.LetGo() | driving.Retire() | driving.TurnAway():
                    assert not isinstance(effect, driving.LetGo) or not self.has_work(effect.member_id)
                    for member in self.members:
                        if member.member_id == effect.member_id:
                            member.gone = True
        self.check_driver()
        return effects

    def has_work(self, member_id: bytes) -> bool:
        """Whether something that a member does or did may still count."""
        shares = [opened.shares[member_id] for opened in self.driving.rounds if member_id in opened.shares]
        return any(share.phase is not driving.Phase.VOID for share in shares)

    def check_driver(self) -> None:
        """What holds after every step."""
        state = self.driving
        assert len(state.rounds) <= self.job.rounds.lag + 1
        live = sum(opened.samples(*[phase for phase in driving.Phase if phase is not driving.Phase.VOID])
                   for opened in state.rounds)  # fmt: skip
        assert state.standing.ledger.samples_open == live
        counted = state.standing.ledger.samples_accepted
        assert counted * TOKENS_PER_SAMPLE == state.standing.tokens_total
        for opened in state.rounds:
            assert list(opened.shares) == sorted(opened.shares)
            for member_id, share in opened.shares.items():
                assert share.phase is not driving.Phase.AWAITED or member_id in state.members

    def send_all(self, envelope: Envelope) -> None:
        self.queue.extend((member, envelope) for member in self.members)

    def send_commits(self, member: SimMember, first: int, last: int) -> None:
        self.queue.extend((member, self.envelopes[number]) for number in range(first, last + 1)
                          if number in self.envelopes)  # fmt: skip

    def to_driver(self, key: KeyPair, contribution: Contribution) -> None:
        envelope = sign(key, contribution)
        self.contributions[envelope.record_id] = contribution
        self.queue.append((None, envelope))

    def finish_fetch(self, faulty: bool = False) -> None:
        if self.fetching:
            effect = self.fetching.pop(self.choose(len(self.fetching)))
            self.drive(driving.UpdateChecked(effect.contribution_id, "its shape is wrong" if faulty else None))

    def finish_aggregation(self, exclude: int | None = None) -> None:
        asked, self.aggregating = self.aggregating, None
        if asked is None:
            return
        assert list(asked.candidates) == sorted(asked.candidates, key=lambda candidate: candidate.member_id)
        accepted, excluded = [], []
        for at, candidate in enumerate(asked.candidates):
            made = candidate.contribution
            if at == exclude:
                excluded.append(Excluded(member=candidate.member_id, reason="its update stood out",
                                         contribution=candidate.contribution_id))  # fmt: skip
                continue
            accepted.append(
                Accepted(
                    member=candidate.member_id,
                    contribution=candidate.contribution_id,
                    update=made.update,
                    weight_ppm=0,
                    samples=made.samples,
                    tokens=made.tokens,
                )
            )
        for at, entry in enumerate(accepted):
            extra = PARTS_PER_MILLION % len(accepted) if at == 0 else 0
            accepted[at] = msgspec.structs.replace(entry, weight_ppm=PARTS_PER_MILLION // len(accepted) + extra)
        state = state_after(asked.state_before, tuple(accepted))
        self.drive(driving.Aggregated(asked.round, asked.attempt, tuple(accepted), tuple(excluded), state))

    # --- the members' wiring ----------------------------------------------------------------------------------------

    def join(self, name: str | None = None) -> SimMember:
        self.sessions += 1
        name = name or f"m{self.sessions}"
        key, member, member_id = make_member(self.job_id, name, self.sessions)
        newest = max(self.envelopes, default=None)
        head = None if newest is None else self.envelopes[newest]
        state = following.follow(
            self.job, self.job_id, OWNER.node_id, member_id, self.grant, self.term, head, self.now_ms
        )
        sim = SimMember(self, key, member, member_id, state, state.head.state)
        self.members.append(sim)
        return sim

    def report_ready(self, member: SimMember) -> None:
        """The member tells the driver of its own newest term that it is ready."""
        if member.gone or member.ready or member.following.term.number != self.driving.term:
            return
        if member.following.head.round > self.driving.standing.round:
            return
        member.ready = True
        speed = self.speeds.get(member.member.name, 1.0)
        self.drive(driving.MemberJoined(member.member_id, member.member, speed, member.following.head.round))

    def leave(self, member: SimMember) -> None:
        member.gone = True
        self.drive(driving.MemberLeft(member.member_id, "it was switched off"))

    def compute_ms(self, member: SimMember, samples: int) -> int:
        return round(1000 * samples / self.speeds.get(member.member.name, 1.0))

    # --- time and network -------------------------------------------------------------------------------------------

    def deliver(self, at: int, again: bool = False) -> None:
        to, envelope = self.queue[at] if again else self.queue.pop(at)
        if to is not None:
            to.feed(following.Arrived(envelope))
        else:
            contribution = self.contributions[envelope.record_id]
            self.drive(driving.Delivered(contribution, envelope.record_id, envelope.signer))

    def wait(self, ms: int) -> None:
        self.now_ms += ms
        self.drive(driving.Tick())

    def crash(self, key: KeyPair | None = None) -> None:
        """The driver dies and comes back (or its heir takes over) with nothing but the chain."""
        before = self.driving
        self.begin_term(key or self.driver_key, before.term, dict(before.retired))
        expected = replace(before.standing, ledger=before.standing.ledger.give_back_all())
        assert self.driving.standing == expected  # exactly what the Commits say

    def run_fairly(self, steps_max: int = 2_000) -> None:
        """Everything arrives, everybody works, until the driver has finished and nothing is under way."""
        for _ in range(steps_max):
            for member in self.members:
                self.report_ready(member)
            busy = bool(self.queue or self.fetching or self.aggregating)
            while self.queue:
                self.deliver(0)
            while self.fetching:
                self.finish_fetch()
            self.finish_aggregation()
            for member in [member for member in self.members if not member.gone]:
                busy = busy or member.applying is not None or member.computing is not None
                member.finish_apply()
                member.finish_work()
            if not busy and not self.queue:
                # A member that heard the old driver not long ago refuses its heir at first; the heir asks again.
                refused = [member for member in self.members
                           if not member.gone and member.following.term.number < self.driving.term]  # fmt: skip
                if self.driving.finished is not None and not refused:
                    return
                self.wait(self.job.rounds.deadline_ms)
                self.queue.extend((member, self.term) for member in refused)
        raise AssertionError("The job did not come to an end.")

    # --- what must be true of what happened -------------------------------------------------------------------------

    def check_chain(self) -> None:
        """Every sample counts once per pass, and nothing that was excluded left a trace."""
        seen: set[tuple[int, int]] = set()
        history: dict[bytes, tuple[int, ...]] = {}
        states = {-1: self.job.model.start.hash}
        ids = {self.job_id: -1}
        accepted_in: dict[bytes, int] = {}
        for commit, commit_id, assignment in self.chain:
            base = ids[assignment.previous]
            assert commit.round - 1 - self.job.rounds.lag <= base < commit.round
            assert assignment.base_state == states[base]
            shares = {share.member: share for share in assignment.shares}
            decided = [entry.member for entry in commit.accepted] + [entry.member for entry in commit.excluded]
            assert sorted(decided) == sorted(shares)
            assert all(entry.reason for entry in commit.excluded)
            for entry in commit.accepted:
                for piece in shares[entry.member].ranges:
                    places = {(piece.pass_number, at) for at in range(piece.start, piece.stop)}
                    assert not places & seen
                    seen |= places
                made = self.contributions[entry.contribution]
                lineage, work = self.lineages[entry.contribution]
                assert lineage == history.get(entry.member, ())
                history[entry.member] = (*lineage, work)
                if made.builds_on is not None:
                    assert base < accepted_in[made.builds_on] < commit.round
            for entry in commit.accepted:
                accepted_in[entry.contribution] = commit.round
            states[commit.round] = state_after(states[commit.round - 1], commit.accepted)
            assert commit.state == states[commit.round]
            ids[commit_id] = commit.round
        # Passes fill up one after the other: what is missing in an older one is free to be handed out next.
        ledger = succession.rebuild(self.job, self.job_id, self.chain).ledger
        assert ledger.samples_accepted == len(seen)
        if self.driving.finished is not None and self.driving.finished.reached:
            samples = self.job.data.samples
            for number in range(max((place[0] for place in seen), default=0)):
                for at in range(samples):
                    assert (number, at) in seen, "a pass was left with a sample missing"

    def check_members(self) -> None:
        """Whoever still follows has the driver's state."""
        for member in self.members:
            states = {commit.round: commit.state for commit, _, _ in self.chain}
            for number, state in member.applied:
                assert states[number] == state
        for member in self.members:
            if not member.gone:
                assert member.following.head.commit_id == self.driving.standing.commit_id
                assert member.shared == self.driving.standing.state


def start(
    choose: Callable[[int], int] | None = None, names: tuple[str, ...] = ("a", "b", "c"), **changes: object
) -> World:
    """A world in which these members are ready."""
    job, job_id = make_job(**changes)
    world = World(choose or (lambda n: 0), job, job_id, members_min=len(names))
    for name in names:
        world.join(name)
    for member in world.members:
        world.report_ready(member)
    return world
