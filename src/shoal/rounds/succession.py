"""Who drives next, and from where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.identity import Envelope
from shoal.protocol.messages import DEFAULT_NETWORK
from shoal.protocol.training import Assignment, Commit, Grant, Term, TrainJob
from shoal.rounds.standing import Standing


@dataclass(frozen=True, slots=True)
class Allowed:
    """Whether a node may drive, and why (not)."""

    allowed: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """The newest Commit among those reported, and forks seen on the way."""

    commit: Commit | None
    commit_id: bytes
    """The job's id before the first Commit."""
    round: int
    forks: tuple[tuple[Envelope, Envelope], ...]
    sentence: str


def may_drive(
    grant: Grant, candidate: bytes, current: bytes | None, silent_ms: int, silence_ms: int, now_ms: int
) -> Allowed:
    """Whether `candidate` may begin a new term after `current`, who has not been heard for `silent_ms`."""
    raise NotImplementedError


def choose_head(
    job_id: bytes, grant: Grant, reports: Sequence[Envelope | None], network: str = DEFAULT_NETWORK
) -> HeadChoice:
    """The Commit to go on from, among those that members (and the own disk) report."""
    raise NotImplementedError


def next_term(job_id: bytes, grant_id: bytes, standing: Standing, last_term: int) -> Term:
    """The record that begins the term after `last_term`; to be signed by the new driver and sent to its members."""
    return Term(job=job_id, number=last_term + 1, grant=grant_id, head=standing.commit_id, head_round=standing.round)


def rebuild(job: TrainJob, job_id: bytes, chain: Sequence[tuple[Commit, bytes, Assignment]]) -> Standing:
    """Where the job stands after these Commits (with their ids and Assignments), from round 0 on. Rounds that were in
    flight are void: their samples are free again. Raises BrokenChain or BadSamples."""
    raise NotImplementedError
