"""A member of a job as a machine: `step(state, event, now_ms) -> (state, effects)`.

It takes records as they arrive, in any order and any number of times, verifies each against the job, the owner's grant
and the chain so far, and says what the engine shall do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from shoal.identity import Envelope
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.training import Assignment, Commit, Share, TrainJob

# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    """A Grant, Term, Commit or Assignment, as it came; its signature is verified here."""

    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Applied:
    """The engine carried out Apply: the hash of the shared state it arrived at."""

    round: int
    state: bytes


@dataclass(frozen=True, slots=True)
class Computed:
    """The engine finished BeginWork, and the Contribution with this id was signed."""

    round: int
    contribution_id: bytes


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """The engine could not finish BeginWork; its share of the round is lost."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class HeadAsked:
    """A node asks for the newest Commit (HeadAsk), because it wants to drive in `term`."""

    asker: bytes
    term: int | None


@dataclass(frozen=True, slots=True)
class DriverHeard:
    """The current driver answered or asked for something: it is alive."""


Event: TypeAlias = Arrived | Applied | Computed | WorkFailed | HeadAsked | DriverHeard

# --- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply this Commit to the shared state (it is the one after the newest applied), then say Applied."""

    commit: Commit
    commit_id: bytes


@dataclass(frozen=True, slots=True)
class BeginWork:
    """Compute this share, starting from the shared state as of all Apply before this effect, plus the member's own
    update of the Contribution `builds_on`, if any; then say Computed. The base has to be kept while work goes on:
    an Apply may follow at once."""

    assignment: Assignment
    assignment_id: bytes
    share: Share
    builds_on: bytes | None


@dataclass(frozen=True, slots=True)
class RollBack:
    """Stop computing if anything is being computed, and set the private state (optimizer, residual) back to what it
    was after the own Contribution `to`; to the very beginning when None. Whatever came after it leaves no trace."""

    to: bytes | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The own Contribution counts: private states before it are needed only for replays."""

    contribution_id: bytes
    round: int


@dataclass(frozen=True, slots=True)
class Ignore:
    """A record was not acted on, and why."""

    sentence: str


@dataclass(frozen=True, slots=True)
class ReportFork:
    """The driver signed two Commits for one job, round and term: both, as evidence that anyone can verify."""

    first: Envelope
    second: Envelope
    sentence: str


@dataclass(frozen=True, slots=True)
class AskCommits:
    """Commits are missing: ask the driver for those of rounds [first_round, last_round]."""

    first_round: int
    last_round: int


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """Answer the one who asked: the newest Commit that is known here to be in the chain (none before the first)."""

    asker: bytes
    commit: Envelope | None


@dataclass(frozen=True, slots=True)
class StopAndSay:
    """This member cannot go on; say why to the driver, and leave. It may join again as a new member."""

    sentence: str


Effect: TypeAlias = Apply | BeginWork | RollBack | Accepted | Ignore | ReportFork | AskCommits | AnswerHead | StopAndSay


@dataclass(frozen=True, slots=True)
class Following:
    """The state of the machine."""

    job: TrainJob
    job_id: bytes
    owner: bytes
    member_id: bytes
    network: str


def follow(
    job: TrainJob,
    job_id: bytes,
    owner: bytes,
    member_id: bytes,
    grant: Envelope,
    term: Envelope,
    head: Envelope | None,
    now_ms: int,
    *,
    network: str = DEFAULT_NETWORK,
) -> Following:
    """Begin to follow on the records of a MemberInvite: the shared state that `head` names (the start state when
    None) is held. Raises ShoalError when they do not allow the driver to drive."""
    raise NotImplementedError


def step(state: Following, event: Event, now_ms: int) -> tuple[Following, tuple[Effect, ...]]:
    """What follows from `event`. `now_ms` is this machine's wall clock, Unix milliseconds."""
    raise NotImplementedError
