"""Where a job stands after a Commit: what any driver needs to know to go on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from shoal.errors import BadRecord
from shoal.protocol.training import Assignment, Commit, TrainJob
from shoal.rounds.samples import SampleLedger


class BrokenChain(BadRecord):
    """A Commit does not follow from the one before it, or contradicts its Assignment."""

    code: ClassVar[str] = "SH-221"


@dataclass(frozen=True, slots=True)
class Standing:
    """The chain of Commits, folded up to its newest."""

    round: int
    """Of the newest Commit; -1 before the first."""
    commit_id: bytes
    """Of the newest Commit; the job's id before the first."""
    state: bytes
    """Hash of the shared state it names; the job's start state before the first."""
    tokens_total: int
    empty_in_a_row: int
    """How many of the newest Commits accepted nothing."""
    fruitful: int
    """How many Commits accepted something: each moved the job on by a nominal round of inner steps."""
    ledger: SampleLedger


def standing_at_start(job: TrainJob, job_id: bytes) -> Standing:
    """Before the first Commit."""
    return Standing(-1, job_id, job.model.start.hash, 0, 0, 0, SampleLedger(job.data.samples))


def advance(standing: Standing, assignment: Assignment, commit: Commit, commit_id: bytes) -> Standing:
    """The standing after `commit`, whose round was assigned by `assignment`; its samples must be open in the ledger.

    Raises BrokenChain, or BadSamples when a sample would count twice in its pass.
    """
    if commit.round != standing.round + 1 or commit.previous != standing.commit_id:
        raise BrokenChain(
            f"The Commit of round {commit.round} does not follow the newest one, which is of round {standing.round}."
        )
    if assignment.round != commit.round or assignment.term != commit.term:
        raise BrokenChain(f"The Commit of round {commit.round} names an Assignment of another round or term.")
    shares = {share.member: share for share in assignment.shares}
    accepted = {entry.member: entry for entry in commit.accepted}
    if len(accepted) != len(commit.accepted) or not accepted.keys() <= shares.keys():
        raise BrokenChain(f"The Commit of round {commit.round} accepts a member twice, or one that had no share.")
    if not accepted and commit.state != standing.state:
        raise BrokenChain(f"The Commit of round {commit.round} accepts nothing and yet names another state.")
    if commit.tokens_total != standing.tokens_total + sum(entry.tokens for entry in commit.accepted):
        raise BrokenChain(f"The Commit of round {commit.round} counts {commit.tokens_total} tokens; the sum differs.")
    ledger = standing.ledger
    for member, share in shares.items():
        if member in accepted:
            if accepted[member].samples != share.samples:
                raise BrokenChain(f"The Commit of round {commit.round} counts other samples than were assigned.")
            ledger = ledger.accept(share.ranges)
    return replace(
        standing,
        round=commit.round,
        commit_id=commit_id,
        state=commit.state,
        tokens_total=commit.tokens_total,
        empty_in_a_row=0 if accepted else standing.empty_in_a_row + 1,
        fruitful=standing.fruitful + (1 if accepted else 0),
        ledger=ledger,
    )
