"""Who drives next, and from where.

The grant lists the drivers in their order. A driver may always begin a new term of its own (it was restarted), or take
over from one that stands behind it; one that stands behind the current driver may take over when that has been silent
for its distance times the silence time. So two heirs do not race, and a lost driver is replaced without anybody's word.

A new driver asks the members it can reach for their newest Commit (HeadAsk with its term's number), and each that
answers promises to take no Commit of an older term from then on. It goes on from the newest Commit it was told, so no
Commit that any of them had applied is lost. What was in flight in the old term is void.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.errors import ShoalError
from shoal.identity import Envelope, short_id
from shoal.protocol.messages import DEFAULT_NETWORK, open_record
from shoal.protocol.training import Assignment, Commit, Grant, Term, TrainJob
from shoal.rounds.standing import BrokenChain, Standing, advance, standing_at_start

SILENCE_MS = 20_000
"""A driver that was not heard for so long is gone: rounds may last longer, but members ask one that says nothing. Where
the round deadline is shorter, that is long enough."""
CLOCK_TOLERANCE_MS = 2 * 3600 * 1000
"""Clocks may be an hour off, each in its direction, before a grant is held to have expired."""
REPORTS_MAX = 4096
"""Heads that are looked at in one choice."""


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
    """Pairs of Commits that one driver signed for one job, round and term: evidence."""
    sentence: str


def may_drive(
    grant: Grant, candidate: bytes, current: bytes | None, silent_ms: int, silence_ms: int, now_ms: int
) -> Allowed:
    """Whether `candidate` may begin a new term after `current` (None: after nobody, or after one who is no longer in
    the grant), who has not been heard for `silent_ms`. `now_ms` is wall time."""
    name = short_id(candidate)
    if candidate not in grant.drivers:
        return Allowed(False, f"Node {name} is not among the drivers that the owner granted; the owner can add it.")
    if now_ms > grant.not_after_ms + CLOCK_TOLERANCE_MS:
        late_s = (now_ms - grant.not_after_ms) // 1000
        return Allowed(False, f"The owner's grant ended {late_s} s ago by this clock; the owner has to sign a new one.")
    if current is None or current not in grant.drivers:
        return Allowed(True, f"Node {name} is granted, and nobody drives.")
    distance = grant.drivers.index(candidate) - grant.drivers.index(current)
    if distance <= 0:
        return Allowed(True, f"Node {name} does not stand behind the current driver in the grant.")
    needed = distance * silence_ms
    if silent_ms >= needed:
        return Allowed(True, f"The current driver has been silent for {silent_ms / 1000:.1f} s; {name} is next.")
    return Allowed(
        False,
        f"Node {name} stands {distance} behind the current driver, which was heard {silent_ms / 1000:.1f} s ago; "
        f"it may take over after {needed / 1000:.1f} s of silence.",
    )


def choose_head(
    job_id: bytes, grant: Grant, reports: Sequence[Envelope | None], network: str = DEFAULT_NETWORK
) -> HeadChoice:
    """The Commit to go on from, among those that members (and the own disk) report: of the highest round, then of the
    newest term, then (only after a fork) with the lowest id. Reports that are not signed by a granted driver, or are
    of another job, do not count. The whole chain is verified by `rebuild`."""
    seen: dict[tuple[int, int, bytes], tuple[bytes, Commit, Envelope]] = {}
    forks: list[tuple[Envelope, Envelope]] = []
    ignored = 0
    for envelope in reports[:REPORTS_MAX]:
        if envelope is None:
            continue
        try:
            commit = open_record(envelope, Commit, network)
        except ShoalError:
            ignored += 1
            continue
        if commit.job != job_id or envelope.signer not in grant.drivers:
            ignored += 1
            continue
        place = (commit.round, commit.term, envelope.signer)
        first = seen.setdefault(place, (envelope.record_id, commit, envelope))
        if first[0] != envelope.record_id:
            forks.append((first[2], envelope))
            seen[place] = min(first, (envelope.record_id, commit, envelope), key=lambda entry: entry[0])
    note = f" {ignored} reports did not count: not a Commit of this job by a granted driver." if ignored else ""
    if not seen:
        return HeadChoice(None, job_id, -1, (), f"Nobody reports a Commit; the job starts from its first state.{note}")
    best = max(seen.values(), key=lambda entry: (entry[1].round, entry[1].term, bytes(255 - byte for byte in entry[0])))
    sentence = f"Goes on from the Commit of round {best[1].round}, term {best[1].term}.{note}"
    return HeadChoice(best[1], best[0], best[1].round, tuple(forks), sentence)


def next_term(job_id: bytes, grant_id: bytes, standing: Standing, last_term: int) -> Term:
    """The record that begins the term after `last_term` (0: the first one); to be signed by the new driver."""
    return Term(job=job_id, number=last_term + 1, grant=grant_id, head=standing.commit_id, head_round=standing.round)


def rebuild(job: TrainJob, job_id: bytes, chain: Sequence[tuple[Commit, bytes, Assignment]]) -> Standing:
    """Where the job stands after these Commits (with their record ids and their Assignments), from round 0 on. Rounds
    that were in flight are void: their samples are free again.

    Raises BrokenChain or BadSamples when the records do not follow from each other.
    """
    standing = standing_at_start(job, job_id)
    term = 1
    for commit, commit_id, assignment in chain:
        if commit.job != job_id or assignment.job != job_id:
            raise BrokenChain(f"A record of round {commit.round} belongs to another job.")
        if commit.term < term:
            raise BrokenChain(f"The Commit of round {commit.round} is of term {commit.term}, after one of term {term}.")
        term = commit.term
        ledger = standing.ledger
        accepted = {entry.member for entry in commit.accepted}
        for share in assignment.shares:
            if share.member in accepted:
                ledger = ledger.claim(share.ranges)
        standing = advance(replace(standing, ledger=ledger), assignment, commit, commit_id)
    return standing
