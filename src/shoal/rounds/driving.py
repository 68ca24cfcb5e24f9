"""The driver of a job as a machine: `step(state, event, now_ms) -> (state, effects)`.

The driver decides order and membership, and nothing else. Up to `lag + 1` rounds are open at a time; they are
committed strictly in order. A round is assigned as soon as there is room, always on top of the newest Commit.

    open ── all live shares in, or quorum + grace, or deadline ──> closing (Aggregate) ── Aggregated ──> committed

What happens outside is told by events; what shall happen is told by effects, which the wiring carries out in order.

A share that will not count becomes void, with a sentence: its samples go back at once, and what its member has in later
open rounds becomes void with it, because a member's next work starts from what it did last. So when round r is
committed, every share that builds on something excluded in r is void already. A Contribution that is out of place
(late, of another round, term, assignment, by another signer) is refused and changes nothing; one that contradicts its
assignment or its member's own chain makes the share void.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar, TypeAlias, TypeVar

from shoal.errors import BadRecord
from shoal.identity import short_id
from shoal.protocol.messages import DEFAULT_NETWORK, record_id_of
from shoal.protocol.training import (
    MEMBERS_MAX,
    RANGES_MAX,
    SKETCH_WIDTH,
    Accepted,
    Assignment,
    Commit,
    Contribution,
    Excluded,
    Member,
    Share,
    TrainJob,
)
from shoal.rounds.samples import divide
from shoal.rounds.shares import Speed, credible, divide_samples, full_round, observed
from shoal.rounds.standing import Standing, advance

EMPTY_ROUNDS_MAX = 8
"""After so many Commits in a row that accepted nothing, the job stops."""
LATE_ROUNDS_MAX = 6
"""A member that was late so many rounds in a row has to join anew."""
WAITING_DEADLINES_MAX = 10
"""The job stops when for so many round deadlines there was nobody to assign to."""
CATCH_UP_ROUNDS_MAX = 64
"""A member that is further behind fetches a newer state before it joins."""
REMEMBERED_MAX = 4096
"""Retired nodes and former members that are remembered; the oldest are forgotten first."""
PIECES_MAX = 32 * 1024
"""Sample ranges in one Assignment: at most 28 bytes each, they and MEMBERS_MAX shares stay below its size limit."""
UPDATE_BYTES_PER_PARAMETER = 8
UPDATE_BYTES_EXTRA = 1 << 20
"""No codec needs more for an update than this many bytes beside UPDATE_BYTES_PER_PARAMETER for each parameter."""
SENTENCE_MAX = 400

_V = TypeVar("_V")


class BadAggregation(BadRecord):
    """The answer to Aggregate does not account for every candidate, or names another state for the same inputs."""

    code: ClassVar[str] = "SH-222"


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """A member holds the shared state of `state_round` and can compute (MemberReady, with the Member record that its
    first node signed). It takes part from the next Assignment on."""

    member_id: bytes
    member: Member
    samples_per_s: float
    state_round: int


@dataclass(frozen=True, slots=True)
class MemberLeft:
    """A member stopped, said so, or its link was lost for good. What it had delivered still counts."""

    member_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class MemberLeaving:
    """A member works until `until_ms` and no longer: its node's owner has given notice."""

    member_id: bytes
    until_ms: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """A Contribution arrived in an envelope whose signature was verified; `signer` is its signer."""

    contribution: Contribution
    contribution_id: bytes
    signer: bytes


@dataclass(frozen=True, slots=True)
class UpdateChecked:
    """The update of a delivered Contribution was fetched and decoded (shape, finite values), or why it cannot be."""

    contribution_id: bytes
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The answer to Aggregate: every candidate stands in `accepted` or `excluded`, each in the order asked."""

    round: int
    attempt: int
    accepted: tuple[Accepted, ...]
    excluded: tuple[Excluded, ...]
    state: bytes
    """Hash of the shared state after the outer step; the state before it when nothing was accepted."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: sent at the moment that WakeAt asked for, or later, or at any other time."""


@dataclass(frozen=True, slots=True)
class AuditFailed:
    """A replay found that a member's Contribution was not computed from its assignment."""

    member_id: bytes
    sentence: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    reason: str


Event: TypeAlias = (
    MemberJoined | MemberLeft | MemberLeaving | Delivered | UpdateChecked | Aggregated | Tick | AuditFailed | StopAsked
)

# --- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assign:
    """Sign this and send it to every member (not only to those with a share). A Commit published in the same step
    goes before it in the same Turn."""

    assignment: Assignment
    assignment_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class FetchUpdate:
    """Fetch and decode this Contribution's update, then say UpdateChecked."""

    contribution: Contribution
    contribution_id: bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    member_id: bytes
    contribution: Contribution
    contribution_id: bytes


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Weigh these updates, compute the outer step on `state_before` (the shared state of round `round - 1`), then say
    Aggregated.

    The candidates are in canonical order (by MemberId), whatever the order of their arrival. A later attempt at the
    same round replaces this one: the answer to an older attempt is ignored.
    """

    round: int
    attempt: int
    state_before: bytes
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class PublishCommit:
    """Sign this, write it down, send it to every member."""

    commit: Commit
    commit_id: bytes


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the sender that this Contribution does not count, and why."""

    contribution_id: bytes
    member_id: bytes
    sentence: str


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Send the Commits of these rounds [first_round, last_round] to a member that joined with an older state."""

    member_id: bytes
    first_round: int
    last_round: int


@dataclass(frozen=True, slots=True)
class TurnAway:
    """A member that wanted to join may not, or has to fetch a newer state first."""

    member_id: bytes
    sentence: str


@dataclass(frozen=True, slots=True)
class LetGo:
    """A member that leaves soon has nothing under way, and would not be done with another round: tell it."""

    member_id: bytes
    sentence: str


@dataclass(frozen=True, slots=True)
class Retire:
    """This member takes no further part: tell it, and keep its nodes out of the job."""

    member_id: bytes
    sentence: str


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send a Tick at this time (the newest WakeAt counts)."""

    ms: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over: its token budget was reached, or it cannot or shall not go on."""

    reason: str
    reached: bool


Effect: TypeAlias = (
    Assign | FetchUpdate | Aggregate | PublishCommit | Refuse | CatchUp | TurnAway | LetGo | Retire | WakeAt | Finish
)

# --- state ----------------------------------------------------------------------------------------------------------


class Phase(StrEnum):
    AWAITED = "awaited"
    FETCHING = "fetching"
    """Delivered; its update is being fetched and decoded."""
    READY = "ready"
    VOID = "void"


@dataclass(frozen=True, slots=True)
class OpenShare:
    """One member's share of an open round, and how far it has come."""

    share: Share
    builds_on: bytes | None = None
    """The member's own Contribution that this one has to build on: one of an open round after the base, or none."""
    private: bytes | None = None
    """The private state it has to start from, when known."""
    phase: Phase = Phase.AWAITED
    contribution: Contribution | None = None
    contribution_id: bytes | None = None
    elapsed_ms: int = 0
    """From when the member could begin with it until it was delivered."""
    reason: str = ""
    """Why it is void."""
    told: bool = False
    """Void, and its member knows by a Commit that it is."""


@dataclass(frozen=True, slots=True)
class OpenRound:
    assignment: Assignment
    assignment_id: bytes
    shares: Mapping[bytes, OpenShare]
    """By MemberId, in canonical order."""
    assigned_ms: int
    front_ms: int | None = None
    """When it became the oldest open round: from then on its deadline runs."""
    quorum_ms: int | None = None
    """When its quorum was there: from then on (but not before front_ms) its grace window runs."""
    attempt: int = 0
    closing: bool = False

    @property
    def number(self) -> int:
        return self.assignment.round

    def samples(self, *phases: Phase) -> int:
        return sum(share.share.samples for share in self.shares.values() if share.phase in phases)


@dataclass(frozen=True, slots=True)
class Participant:
    member: Member
    speed: Speed
    private: bytes | None = None
    """Hash of its private state after its last accepted Contribution; None when not known."""
    unkept: int = 0
    """How many of its Contributions were accepted since the last one after which it keeps its private state."""
    late_in_a_row: int = 0
    delivered_ms: int = 0
    """When it delivered last."""
    leaves_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Driving:
    """The state of the machine."""

    job: TrainJob
    job_id: bytes
    driver: bytes
    term: int
    network: str
    members_min: int
    standing: Standing
    """The chain up to the newest Commit; its ledger has the samples of the open rounds as open."""
    members: Mapping[bytes, Participant]
    rounds: tuple[OpenRound, ...] = ()
    """Open rounds, oldest first; at most lag + 1."""
    former: Mapping[bytes, Member] = field(default_factory=dict)
    """Members that left."""
    retired: Mapping[bytes, str] = field(default_factory=dict)
    """NodeId -> why it may not take part any more."""
    waiting_since_ms: int | None = None
    """Since when no round has been open."""
    started: bool = False
    wake_ms: int | None = None
    finished: Finish | None = None


def drive(
    job: TrainJob,
    job_id: bytes,
    driver: bytes,
    term: int,
    standing: Standing,
    now_ms: int,
    *,
    network: str = DEFAULT_NETWORK,
    members_min: int = 1,
    retired: Mapping[bytes, str] | None = None,
) -> Driving:
    """Begin a term: on `standing_at_start(job, job_id)`, or on what `succession.rebuild` made of the chain.

    The first Assignment waits until `members_min` members have joined. `retired` are the nodes that earlier terms
    retired, with the reason. Samples that `standing` has as open are void: their rounds belonged to an older term.
    """
    return Driving(
        job=job,
        job_id=job_id,
        driver=driver,
        term=term,
        network=network,
        members_min=members_min,
        standing=replace(standing, ledger=standing.ledger.give_back_all()),
        members=MappingProxyType({}),
        retired=MappingProxyType(dict(retired or {})),
        waiting_since_ms=now_ms,
    )


def step(state: Driving, event: Event, now_ms: int) -> tuple[Driving, tuple[Effect, ...]]:
    """What follows from `event` at `now_ms` (milliseconds of a clock that does not run backwards).

    Raises BadAggregation when an Aggregated does not fit its Aggregate; nothing else is raised, whatever peers say.
    """
    turn = _Turn(state, now_ms)
    if state.finished is not None:
        if isinstance(event, Delivered):
            turn.refuse(event, f"The job is over: {state.finished.reason}")
        return turn.result()
    match event:
        case MemberJoined():
            turn.join(event)
        case MemberLeft():
            turn.leave(event.member_id, event.reason)
        case MemberLeaving():
            turn.expect_leaving(event)
        case Delivered():
            turn.deliver(event)
        case UpdateChecked():
            turn.check(event)
        case Aggregated():
            turn.commit_aggregated(event)
        case AuditFailed():
            turn.retire(event)
        case StopAsked():
            turn.finish(event.reason, reached=False)
        case Tick():
            pass
    turn.settle()
    return turn.result()


class _Turn:
    """One step in the making: the state so far, and the effects so far."""

    def __init__(self, state: Driving, now_ms: int) -> None:
        self.state = state
        self.now_ms = now_ms
        self.effects: list[Effect] = []

    def result(self) -> tuple[Driving, tuple[Effect, ...]]:
        return self.state, tuple(self.effects)

    # --- members ----------------------------------------------------------------------------------------------------

    def join(self, event: MemberJoined) -> None:
        state, member = self.state, event.member
        nodes = {part.node for part in member.nodes}
        retired = [state.retired[node] for node in nodes if node in state.retired]
        behind = state.standing.round - event.state_round
        sentence = ""
        if member.job != state.job_id:
            sentence = f"{member.name} wants to join another job."
        elif retired:
            sentence = f"{member.name} may not take part in this job any more: {retired[0]}"
        elif behind < 0:
            sentence = (
                f"{member.name} holds the state of round {event.state_round}, but the newest Commit is of round "
                f"{state.standing.round}; it has to fetch that state."
            )
        elif behind > CATCH_UP_ROUNDS_MAX:
            sentence = (
                f"{member.name} holds the state of round {event.state_round}, {behind} rounds behind; it has to fetch "
                f"the state of round {state.standing.round} and join again."
            )
        elif event.member_id not in state.members and len(state.members) >= MEMBERS_MAX:
            sentence = f"The job has {MEMBERS_MAX} members already; {member.name} may try again later."
        elif not (math.isfinite(event.samples_per_s) and event.samples_per_s > 0):
            sentence = (
                f"{member.name} says that it computes {event.samples_per_s} samples per second; that is no speed."
            )
        if sentence:
            self.effects.append(TurnAway(event.member_id, _clip(sentence)))
            return
        for other_id, other in list(state.members.items()):
            if other_id != event.member_id and nodes & {part.node for part in other.member.nodes}:
                again = f"A node of {other.member.name} joined again as {_named(member, event.member_id)}."
                self.leave(other_id, again)
                self.effects.append(TurnAway(other_id, _clip(again)))
        known = self.state.members.get(event.member_id)
        participant = known or Participant(member, Speed(event.samples_per_s))
        self._set_members({**self.state.members, event.member_id: participant})
        if behind > 0:
            self.effects.append(CatchUp(event.member_id, event.state_round + 1, state.standing.round))

    def leave(self, member_id: bytes, reason: str) -> None:
        participant = self.state.members.get(member_id)
        if participant is None:
            return
        members = {other: value for other, value in self.state.members.items() if other != member_id}
        former = _remember(self.state.former, member_id, participant.member)
        self.state = replace(self.state, former=former)
        self._set_members(members)
        for at in range(len(self.state.rounds)):
            share = self.state.rounds[at].shares.get(member_id)
            if share is not None and share.phase is Phase.AWAITED:
                self.void(at, member_id, f"{participant.member.name} left before it delivered: {reason}")

    def expect_leaving(self, event: MemberLeaving) -> None:
        participant = self.state.members.get(event.member_id)
        if participant is not None:
            leaving = replace(participant, leaves_ms=event.until_ms)
            self._set_members({**self.state.members, event.member_id: leaving})

    def retire(self, event: AuditFailed) -> None:
        participant = self.state.members.get(event.member_id)
        member = participant.member if participant else self.state.former.get(event.member_id)
        if member is None:
            return
        retired = dict(self.state.retired)
        fresh = [part.node for part in member.nodes if part.node not in retired]
        if not fresh:
            return
        for node in fresh:
            retired = dict(_remember(retired, node, _clip(event.sentence)))
        self.state = replace(self.state, retired=MappingProxyType(retired))
        self.effects.append(Retire(event.member_id, _clip(event.sentence)))
        candidate = False
        for at, opened in enumerate(self.state.rounds):
            share = opened.shares.get(event.member_id)
            if share is not None and share.phase is not Phase.VOID:
                candidate = candidate or (opened.closing and share.phase is Phase.READY)
                self.void(at, event.member_id, f"A replay found its work wrong: {event.sentence}")
        self.leave(event.member_id, event.sentence)
        if candidate:
            self._aggregate()

    def _set_members(self, members: Mapping[bytes, Participant]) -> None:
        self.state = replace(self.state, members=MappingProxyType(dict(members)))

    # --- contributions ----------------------------------------------------------------------------------------------

    def refuse(self, event: Delivered, sentence: str) -> None:
        self.effects.append(Refuse(event.contribution_id, event.contribution.member, _clip(sentence)))

    def deliver(self, event: Delivered) -> None:
        contribution = event.contribution
        at = contribution.round - self.state.standing.round - 1
        misplaced = self._misplaced(event, at)
        if misplaced is not None:
            if misplaced:
                self.refuse(event, misplaced)
            return
        share = self.state.rounds[at].shares[contribution.member]
        fault = self._fault(contribution, share, at)
        participant = self.state.members[contribution.member]
        began_ms = max(self.state.rounds[at].assigned_ms, participant.delivered_ms)
        participant = replace(participant, delivered_ms=self.now_ms)
        self._set_members({**self.state.members, contribution.member: participant})
        share = replace(
            share,
            phase=Phase.FETCHING,
            contribution=contribution,
            contribution_id=event.contribution_id,
            elapsed_ms=self.now_ms - began_ms,
        )
        self._set_share(at, contribution.member, share)
        if fault:
            self.refuse(event, fault)
            self.void(at, contribution.member, fault)
            return
        self.effects.append(FetchUpdate(contribution, event.contribution_id))
        for later in range(at + 1, len(self.state.rounds)):
            self._expect(later, contribution.member, event.contribution_id, contribution.private_after)

    def _misplaced(self, event: Delivered, at: int) -> str | None:
        """Why a Contribution cannot count without saying anything about the share it names; None when it can; empty
        when it is the one that is there already."""
        state, contribution = self.state, event.contribution
        number = contribution.round
        if contribution.job != state.job_id:
            return "The Contribution is for another job."
        if contribution.term != state.term:
            return f"The Contribution was made in term {contribution.term} of the driver; this is term {state.term}."
        if at < 0:
            return f"The Contribution is late: round {number} was committed already."
        if at >= len(state.rounds):
            return f"The Contribution is for round {number}, which has not been assigned."
        opened = state.rounds[at]
        share = opened.shares.get(contribution.member)
        if share is None:
            return (
                f"The Contribution is by a member ({short_id(contribution.member)}) without a share in round {number}."
            )
        if share.phase in (Phase.FETCHING, Phase.READY):
            if share.contribution_id == event.contribution_id:
                return ""
            return f"The member has delivered another Contribution for round {number} already; the first one stands."
        if share.phase is Phase.VOID:
            return f"The share of round {number} is void: {share.reason}"
        participant = state.members[contribution.member]
        if event.signer != participant.member.nodes[0].node:
            return (
                f"The Contribution of {participant.member.name} is signed by {short_id(event.signer)}, not by its "
                f"first node {short_id(participant.member.nodes[0].node)}."
            )
        if contribution.assignment != opened.assignment_id:
            return f"The Contribution answers another Assignment than the one of round {number}."
        return None

    def _fault(self, contribution: Contribution, share: OpenShare, at: int) -> str:
        """Why a Contribution contradicts its assignment or its member's own chain; empty when it does not."""
        state, opened = self.state, self.state.rounds[at]
        member = state.members[contribution.member].member
        nodes = [part.node for part in contribution.work]
        per_sample = state.job.data.sequence_tokens
        bytes_max = UPDATE_BYTES_EXTRA + UPDATE_BYTES_PER_PARAMETER * state.job.model.parameters
        if contribution.base_state != opened.assignment.base_state:
            return "Its work started from another shared state than was assigned."
        if len(set(nodes)) != len(nodes) or not set(nodes) <= {part.node for part in member.nodes}:
            return "It accounts work to a node twice, or to one that is not part of the member."
        if contribution.samples != share.share.samples:
            return f"It counts {contribution.samples} samples where {share.share.samples} were assigned."
        if any(part.tokens != part.samples * per_sample for part in contribution.work):
            return f"It counts {contribution.tokens} tokens for {contribution.samples} samples of {per_sample} each."
        if not (math.isfinite(contribution.loss_first) and math.isfinite(contribution.loss_last)):
            return "Its loss is not a finite number."
        if len(contribution.sketches) % (4 * (1 + SKETCH_WIDTH)):
            return f"Its sketches of {len(contribution.sketches)} bytes are no whole number of steps."
        if contribution.update.size > bytes_max:
            return f"Its update has {contribution.update.size} bytes; none needs more than {bytes_max}."
        before = state.rounds[at - 1].shares.get(contribution.member) if at else None
        if before is not None and before.phase is Phase.AWAITED:
            return ""  # what it builds on has not arrived yet; checked when it does
        return self._chain_fault(contribution, share)

    def _chain_fault(self, contribution: Contribution, share: OpenShare) -> str:
        if contribution.builds_on != share.builds_on:
            return (
                f"It builds on {_maybe(contribution.builds_on)}, which was not accepted or is not the member's newest; "
                f"it had to build on {_maybe(share.builds_on)}."
            )
        if share.private is not None and contribution.private_before != share.private:
            return "Its private state before the round is not the one after its member's last counted Contribution."
        every, unkept = self.state.job.replay.snapshot_every, self._unkept(contribution)
        if not contribution.snapshot and unkept + 1 >= every:
            return (
                f"Its member keeps no private state after it, nor after the {unkept} before it; the job asks for one "
                f"every {every} contributions, so that each can be replayed."
            )
        return ""

    def _unkept(self, contribution: Contribution) -> int:
        """How many Contributions lie between this one and the last one before it after which its member keeps its
        private state."""
        count = self.state.members[contribution.member].unkept
        for opened in self.state.rounds:
            earlier = opened.shares.get(contribution.member)
            if opened.number < contribution.round and earlier is not None and earlier.phase is not Phase.VOID:
                count = _unkept_after(count, earlier.contribution)
        return count

    def _expect(self, at: int, member_id: bytes, builds_on: bytes, private: bytes) -> None:
        """The member's Contribution of an earlier open round has arrived: the one of round `at` has to build on it."""
        share = self.state.rounds[at].shares.get(member_id)
        if share is None or share.phase is Phase.VOID:
            return
        share = replace(share, builds_on=builds_on, private=private)
        self._set_share(at, member_id, share)
        if share.contribution is not None:
            fault = self._chain_fault(share.contribution, share)
            if fault:
                self.void(at, member_id, fault)

    def check(self, event: UpdateChecked) -> None:
        for at, opened in enumerate(self.state.rounds):
            for member_id, share in opened.shares.items():
                if share.contribution_id == event.contribution_id and share.phase is Phase.FETCHING:
                    if event.problem is None:
                        self._set_share(at, member_id, replace(share, phase=Phase.READY))
                    else:
                        self.void(at, member_id, f"Its update cannot be used: {event.problem}")
                    return

    def void(self, at: int, member_id: bytes, reason: str) -> None:
        """This share does not count, nor does what its member has in later open rounds. The samples go back."""
        number = self.state.rounds[at].number
        for later in range(at, len(self.state.rounds)):
            share = self.state.rounds[later].shares.get(member_id)
            if share is None or share.phase is Phase.VOID:
                continue
            if later > at:
                reason = f"It builds on the member's work of round {number}, which does not count."
            self._set_share(later, member_id, replace(share, phase=Phase.VOID, reason=_clip(reason)))
            standing = self.state.standing
            ledger = standing.ledger.give_back(share.share.ranges)
            self.state = replace(self.state, standing=replace(standing, ledger=ledger))

    def _set_share(self, at: int, member_id: bytes, share: OpenShare) -> None:
        opened = self.state.rounds[at]
        shares = MappingProxyType({**opened.shares, member_id: share})
        self._set_round(at, replace(opened, shares=shares))

    def _set_round(self, at: int, opened: OpenRound) -> None:
        rounds = self.state.rounds
        self.state = replace(self.state, rounds=(*rounds[:at], opened, *rounds[at + 1 :]))

    # --- rounds -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Whatever now follows by itself. Each pass commits or assigns a round, or is the last; EMPTY_ROUNDS_MAX bounds
        the Commits, and lag + 1 the Assignments after the last of them."""
        while self.state.finished is None:
            self._note_quorum()
            if self.state.rounds and self._due(self.state.rounds[0]):
                self._close()
            elif not self._assign():
                break
        if self.state.finished is None:
            self._give_up_waiting()
        if self.state.finished is None:
            wake = self._next_moment()
            if wake != self.state.wake_ms:
                self.state = replace(self.state, wake_ms=wake)
                if wake is not None:
                    self.effects.append(WakeAt(wake))

    def _note_quorum(self) -> None:
        for at, opened in enumerate(self.state.rounds):
            ready = opened.samples(Phase.READY)
            live = opened.samples(Phase.AWAITED, Phase.FETCHING, Phase.READY)
            if opened.quorum_ms is None and ready and ready >= self.state.job.rounds.quorum * live:
                self._set_round(at, replace(opened, quorum_ms=self.now_ms))

    def _moments(self, opened: OpenRound) -> list[int]:
        """When the oldest open round closes at the latest."""
        front = opened.front_ms if opened.front_ms is not None else self.now_ms
        moments = [front + self.state.job.rounds.deadline_ms]
        if opened.quorum_ms is not None:
            moments.append(max(front, opened.quorum_ms) + self.state.job.rounds.grace_ms)
        return moments

    def _due(self, opened: OpenRound) -> bool:
        if opened.closing:
            return False
        if not opened.samples(Phase.AWAITED, Phase.FETCHING):
            return True
        return self.now_ms >= min(self._moments(opened))

    def _next_moment(self) -> int | None:
        if not self.state.rounds:
            since = self.state.waiting_since_ms
            return None if since is None else since + WAITING_DEADLINES_MAX * self.state.job.rounds.deadline_ms
        return None if self.state.rounds[0].closing else min(self._moments(self.state.rounds[0]))

    def _close(self) -> None:
        opened = self.state.rounds[0]
        front = opened.front_ms if opened.front_ms is not None else self.now_ms
        waited_s = (self.now_ms - front) / 1000
        for member_id, share in opened.shares.items():
            if share.phase is Phase.AWAITED:
                self._note_late(member_id, share.share.samples, waited_s)
                self.void(
                    0, member_id,
                    f"It was late: round {opened.number} closed after {waited_s:.1f} s with "
                    f"{opened.samples(Phase.READY)} samples in, and its {share.share.samples} were not among them.",
                )  # fmt: skip
            elif share.phase is Phase.FETCHING:
                self.void(0, member_id, f"Its update had not arrived when round {opened.number} closed.")
        self._aggregate()

    def _note_late(self, member_id: bytes, samples: int, waited_s: float) -> None:
        participant = self.state.members.get(member_id)
        if participant is None:
            return
        speed = participant.speed.late(samples, waited_s)
        late = participant.late_in_a_row + 1
        if late >= LATE_ROUNDS_MAX:
            sentence = (
                f"{participant.member.name} was late {late} rounds in a row; it may join anew when it can keep up."
            )
            self.leave(member_id, sentence)
            self.effects.append(TurnAway(member_id, _clip(sentence)))
        else:
            self._set_members({**self.state.members, member_id: replace(participant, speed=speed, late_in_a_row=late)})

    def _aggregate(self) -> None:
        """Ask for the oldest open round's aggregation, or commit it at once when nothing is there to aggregate."""
        opened = self.state.rounds[0]
        opened = replace(opened, closing=True, attempt=opened.attempt + 1)
        self._set_round(0, opened)
        candidates = self._candidates(opened)
        if candidates:
            self.effects.append(Aggregate(opened.number, opened.attempt, self.state.standing.state, candidates))
        else:
            self._commit((), self.state.standing.state)

    def _candidates(self, opened: OpenRound) -> tuple[Candidate, ...]:
        return tuple(
            Candidate(member_id, share.contribution, share.contribution_id)
            for member_id, share in opened.shares.items()
            if share.phase is Phase.READY and share.contribution is not None and share.contribution_id is not None
        )

    def commit_aggregated(self, event: Aggregated) -> None:
        opened = self.state.rounds[0] if self.state.rounds else None
        if opened is None or not opened.closing or (opened.number, opened.attempt) != (event.round, event.attempt):
            return
        asked = {candidate.member_id: candidate for candidate in self._candidates(opened)}
        answered = [entry.member for entry in event.accepted] + [entry.member for entry in event.excluded]
        if sorted(answered) != sorted(asked):
            raise BadAggregation(f"The aggregation of round {event.round} does not account for each candidate once.")
        if not event.accepted and event.state != self.state.standing.state:
            raise BadAggregation(f"The aggregation of round {event.round} accepted nothing and yet changed the state.")
        for entry in event.accepted:
            made = asked[entry.member].contribution
            if (entry.samples, entry.tokens, entry.update) != (made.samples, made.tokens, made.update):
                raise BadAggregation(f"The aggregation of round {event.round} changed what a member contributed.")
        for excluded in event.excluded:
            self.void(0, excluded.member, excluded.reason)
        self._commit(event.accepted, event.state)

    def _commit(self, accepted: Iterable[Accepted], state_hash: bytes) -> None:
        state, opened = self.state, self.state.rounds[0]
        entries = tuple(sorted(accepted, key=lambda entry: entry.member))
        commit = Commit(
            job=state.job_id,
            round=opened.number,
            term=state.term,
            previous=state.standing.commit_id,
            assignment=opened.assignment_id,
            accepted=entries,
            excluded=tuple(
                Excluded(member=member_id, reason=share.reason, contribution=share.contribution_id)
                for member_id, share in opened.shares.items()
                if share.phase is Phase.VOID
            ),
            state=state_hash,
            tokens_total=state.standing.tokens_total + sum(entry.tokens for entry in entries),
        )
        commit_id = record_id_of(commit, state.driver, state.network)
        standing = advance(state.standing, opened.assignment, commit, commit_id)
        rounds = tuple(_told(later, opened) for later in state.rounds[1:])
        if rounds:
            rounds = (replace(rounds[0], front_ms=self.now_ms), *rounds[1:])
        self.state = replace(state, standing=standing, rounds=rounds, waiting_since_ms=None if rounds else self.now_ms)
        for entry in entries:
            self._note_accepted(entry.member, opened.shares[entry.member])
        self.effects.append(PublishCommit(commit, commit_id))
        self._finish_if_over()

    def _note_accepted(self, member_id: bytes, share: OpenShare) -> None:
        participant, contribution = self.state.members.get(member_id), share.contribution
        if participant is None or contribution is None:
            return
        compute_ms = max(part.compute_ms for part in contribution.work)
        speed = participant.speed.measured(observed(contribution.samples, compute_ms, share.elapsed_ms))
        participant = replace(
            participant,
            speed=speed,
            private=contribution.private_after,
            unkept=_unkept_after(participant.unkept, contribution),
            late_in_a_row=0,
        )
        self._set_members({**self.state.members, member_id: participant})

    def _assign(self) -> bool:
        """Assign the next round if there is room, somebody to do it, and something left to do."""
        settings = self.state.job.rounds
        if len(self.state.rounds) > settings.lag:
            return False
        order = self._staying(self._assignable())
        state = self.state
        wanted = 1 if state.started else max(1, state.members_min)
        if len(state.members) < wanted or not order:
            return False
        per_sample = state.job.data.sequence_tokens
        in_flight = sum(opened.samples(Phase.AWAITED, Phase.FETCHING, Phase.READY) for opened in state.rounds)
        left = -((state.standing.tokens_total - state.job.token_budget) // per_sample) - in_flight
        if left <= 0:
            return False
        speeds = credible([state.members[member_id].speed for member_id in order])
        full = full_round(speeds, settings.inner_steps, state.job.batch_samples, settings.deadline_ms)
        # The last two rounds are of one size, so that none is so small that it is mostly noise.
        total = left if left <= full else -(-left // 2) if left < 2 * full else full
        pieces_max = min(RANGES_MAX - 1, PIECES_MAX - len(order))
        ranges, ledger = state.standing.ledger.allocate(total, pieces_max)
        division = divide_samples(speeds, sum(piece.samples for piece in ranges))
        number = state.standing.round + 1 + len(state.rounds)
        assignment = Assignment(
            job=state.job_id,
            round=number,
            term=state.term,
            previous=state.standing.commit_id,
            base_state=state.standing.state,
            step=settings.inner_steps * (state.standing.fruitful + len(state.rounds)),
            deadline_ms=settings.deadline_ms,
            shares=tuple(
                Share(member_id, pieces)
                for member_id, pieces in zip(order, divide(ranges, division.samples), strict=True)
                if pieces
            ),
        )
        opened = OpenRound(
            assignment,
            record_id_of(assignment, state.driver, state.network),
            MappingProxyType({share.member: self._fresh(share) for share in assignment.shares}),
            assigned_ms=self.now_ms,
            front_ms=None if state.rounds else self.now_ms,
        )
        self.state = replace(
            state,
            standing=replace(state.standing, ledger=ledger),
            rounds=(*state.rounds, opened),
            waiting_since_ms=None,
            started=True,
        )
        self.effects.append(Assign(assignment, opened.assignment_id, f"Round {number}: {division.reason}"))
        return True

    def _assignable(self) -> list[bytes]:
        """Members in canonical order, without those that do not know yet that a share of theirs is void: they would
        build on it."""
        unaware = {
            member_id
            for opened in self.state.rounds
            for member_id, share in opened.shares.items()
            if share.phase is Phase.VOID and not share.told
        }
        return sorted(member_id for member_id in self.state.members if member_id not in unaware)

    def _staying(self, order: list[bytes]) -> list[bytes]:
        """Without those that will have left before they are done with one round more, behind those that are open. Of
        them, who has nothing under way any more is let go."""
        members, settings = self.state.members, self.state.job.rounds
        if all(members[member_id].leaves_ms is None for member_id in order):
            return order
        speeds = credible([members[member_id].speed for member_id in order])
        full = full_round(speeds, settings.inner_steps, self.state.job.batch_samples, settings.deadline_ms)
        done_ms = self.now_ms + (len(self.state.rounds) + 1) * round(1000 * full / sum(speeds))
        staying = list[bytes]()
        for member_id in order:
            leaves_ms = members[member_id].leaves_ms
            if leaves_ms is None or leaves_ms >= done_ms:
                staying.append(member_id)
            elif not any(self._works_in(opened, member_id) for opened in self.state.rounds):
                sentence = f"{members[member_id].member.name} leaves before it would be done with another round."
                self.leave(member_id, sentence)
                self.effects.append(LetGo(member_id, _clip(sentence)))
        return staying

    def _works_in(self, opened: OpenRound, member_id: bytes) -> bool:
        share = opened.shares.get(member_id)
        return share is not None and share.phase is not Phase.VOID

    def _fresh(self, share: Share) -> OpenShare:
        """A new share, knowing what its member has delivered in open rounds already."""
        for opened in reversed(self.state.rounds):
            earlier = opened.shares.get(share.member)
            if earlier is not None and earlier.contribution is not None and earlier.phase is not Phase.VOID:
                return OpenShare(share, earlier.contribution_id, earlier.contribution.private_after)
        return OpenShare(share, None, self.state.members[share.member].private)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _finish_if_over(self) -> None:
        standing, budget = self.state.standing, self.state.job.token_budget
        if standing.tokens_total >= budget:
            self.finish(f"{standing.tokens_total:,} tokens were accepted; {budget:,} were asked for.", reached=True)
        elif standing.empty_in_a_row >= EMPTY_ROUNDS_MAX:
            self.finish(
                f"The last {standing.empty_in_a_row} rounds accepted nothing: no member delivers usable work in time. "
                f"Look at the reasons in the last Commit; a longer deadline or a smaller round may help.",
                reached=False,
            )

    def _give_up_waiting(self) -> None:
        since, deadline_ms = self.state.waiting_since_ms, self.state.job.rounds.deadline_ms
        if since is not None and not self.state.rounds and self.now_ms >= since + WAITING_DEADLINES_MAX * deadline_ms:
            self.finish(
                f"For {(self.now_ms - since) / 1000:.0f} s there were {len(self.state.members)} members to assign work "
                f"to, and {1 if self.state.started else self.state.members_min} are needed. Start nodes and resume.",
                reached=False,
            )

    def finish(self, reason: str, *, reached: bool) -> None:
        standing = self.state.standing
        ended = Finish(_clip(reason), reached)
        standing = replace(standing, ledger=standing.ledger.give_back_all())
        self.state = replace(self.state, finished=ended, standing=standing, rounds=(), wake_ms=None)
        self.effects.append(ended)


def _told(later: OpenRound, committed: OpenRound) -> OpenRound:
    """Who was excluded in a committed round knows that its shares in later open rounds are void."""
    shares = {
        member_id: replace(share, told=True)
        if share.phase is Phase.VOID
        and member_id in committed.shares
        and committed.shares[member_id].phase is Phase.VOID
        else share
        for member_id, share in later.shares.items()
    }
    return replace(later, shares=MappingProxyType(shares))


def _remember(known: Mapping[bytes, _V], key: bytes, value: _V) -> Mapping[bytes, _V]:
    kept = {other: old for other, old in known.items() if other != key}
    while len(kept) >= REMEMBERED_MAX:
        del kept[next(iter(kept))]
    return MappingProxyType({**kept, key: value})


def _named(member: Member, member_id: bytes) -> str:
    return f"{member.name} ({short_id(member_id)})"


def _unkept_after(unkept: int, contribution: Contribution | None) -> int:
    if contribution is None:
        return unkept
    return 0 if contribution.snapshot else unkept + 1


def _maybe(contribution_id: bytes | None) -> str:
    return "nothing" if contribution_id is None else short_id(contribution_id)


def _clip(sentence: str) -> str:
    return sentence if len(sentence) <= SENTENCE_MAX else sentence[: SENTENCE_MAX - 1] + "…"
