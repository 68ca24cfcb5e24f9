"""The driver of a job as a machine: `step(state, event, now_ms) -> (state, effects)`.

The driver decides order and membership, and nothing else. Up to `lag + 1` rounds are open at a time; they are
committed strictly in order. A round is assigned as soon as there is room, always on top of the newest Commit.

    open ── all live shares in, or quorum + grace, or deadline ──> closing (Aggregate) ── Aggregated ──> committed

What happens outside is told by events; what shall happen is told by effects, which the wiring carries out in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.training import (
    Accepted,
    Assignment,
    Commit,
    Contribution,
    Excluded,
    Member,
    Share,
    TrainJob,
)
from shoal.rounds.shares import Speed
from shoal.rounds.standing import Standing

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


Event: TypeAlias = MemberJoined | MemberLeft | Delivered | UpdateChecked | Aggregated | Tick | AuditFailed | StopAsked

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
    """Weigh these updates, compute the outer step on state `base_state` of round `round - 1`, then say Aggregated.

    The candidates are in canonical order (by MemberId), whatever the order of their arrival. A later attempt at the
    same round replaces this one: the answer to an older attempt is ignored.
    """

    round: int
    attempt: int
    base_state: bytes
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
    Assign | FetchUpdate | Aggregate | PublishCommit | Refuse | CatchUp | TurnAway | Retire | WakeAt | Finish
)

# --- state ----------------------------------------------------------------------------------------------------------


class Phase(StrEnum):
    AWAITED = "awaited"
    FETCHING = "fetching"
    READY = "ready"
    VOID = "void"


@dataclass(frozen=True, slots=True)
class OpenShare:
    """One member's share of an open round, and how far it has come."""

    share: Share
    phase: Phase = Phase.AWAITED
    contribution: Contribution | None = None
    contribution_id: bytes | None = None
    reason: str = ""
    """Why it is void."""


@dataclass(frozen=True, slots=True)
class OpenRound:
    assignment: Assignment
    assignment_id: bytes
    base_round: int
    """Round of the Commit that `assignment.previous` names."""
    shares: Mapping[bytes, OpenShare]
    """By MemberId, in canonical order."""
    front_ms: int | None = None
    """When it became the oldest open round: from then on its deadline runs."""
    quorum_ms: int | None = None
    """When its quorum was there: from then on (but not before front_ms) its grace window runs."""
    attempt: int = 0
    closing: bool = False


@dataclass(frozen=True, slots=True)
class Participant:
    member: Member
    speed: Speed
    private: bytes | None = None
    """Hash of its private state after its last accepted Contribution; None when not known."""


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
    members: Mapping[bytes, Participant]
    rounds: tuple[OpenRound, ...]
    """Open rounds, oldest first; at most lag + 1."""
    retired: Mapping[bytes, str]
    """NodeId -> why it may not take part any more."""
    step: int
    """Nominal inner steps behind the next Assignment."""
    alone_since_ms: int
    """Since when there has been nobody to assign to; meaningless while there is somebody."""
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
    retired, with the reason.
    """
    raise NotImplementedError


def step(state: Driving, event: Event, now_ms: int) -> tuple[Driving, tuple[Effect, ...]]:
    """What follows from `event` at `now_ms` (any clock that does not run backwards)."""
    raise NotImplementedError
