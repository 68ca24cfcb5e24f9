"""A run folder read as an account: who did which work in which committed round.

Work is counted from the chain of Commits and the Contributions they name, never from what a node says later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal.driver.folder import RunFolder
from shoal.driver.lines import AuditLine, Evaluation, Event, LaneSegment, RoundMetrics
from shoal.driver.signers import Signers
from shoal.errors import JobError
from shoal.identity import Envelope
from shoal.protocol.messages import open_record
from shoal.protocol.training import Commit, Contribution, Grant, Member, Term, TrainJob
from shoal.purse.bills import Payments


class ReportImpossible(JobError):
    """The folder's records do not hang together."""

    code = "SH-620"


@dataclass(frozen=True)
class WorkDone:
    """One member's share of one committed round."""

    round: int
    member: bytes
    accepted: bool
    reason: str
    tokens_by_node: Mapping[bytes, int]
    """Of accepted work."""


@dataclass(frozen=True)
class RunContents:
    """A run folder as far as a report needs it."""

    folder: str
    job_id: bytes
    job: TrainJob
    members: Mapping[bytes, Member]
    terms: Sequence[tuple[bytes, Term]]
    """Driver and term, in order."""
    rounds: int
    tokens_total: int
    work: Sequence[WorkDone]
    metrics: Sequence[RoundMetrics] = ()
    evaluations: Sequence[Evaluation] = ()
    lanes: Sequence[LaneSegment] = ()
    events: Sequence[Event] = ()
    audits: Sequence[AuditLine] = ()
    payments: Payments | None = None
    """None where all of its nodes worked for nothing."""


def read_contents(folder: RunFolder) -> RunContents:
    """Everything a report needs from a folder. Grants, Terms, Members and Commits are verified, and so is every
    Contribution that a Commit of the chain names. Raises BadRecord, FolderDamaged, ForgedRecord, ReportImpossible."""
    job = folder.train_job()
    metrics = tuple(folder.notes(RoundMetrics))  # first: a driver may be committing more meanwhile
    chain = _Chain(folder.job, Signers(folder.job))
    for envelope in folder.records(Grant, Term, Member, Contribution, Commit):
        chain.take(envelope)
    older = say_if_older(folder, metrics, (one.commit for one in chain.commits.values()))
    if older is not None:
        raise ReportImpossible(older)
    commits = chain.commits_in_order()
    return RunContents(
        folder=str(folder.path),
        job_id=folder.job.record_id,
        job=job,
        members=chain.members,
        terms=chain.terms,
        rounds=len(commits),
        tokens_total=commits[-1].commit.tokens_total if commits else 0,
        work=[done for commit in commits for done in commit.work],
        metrics=metrics,
        evaluations=tuple(folder.notes(Evaluation)),
        lanes=tuple(folder.notes(LaneSegment)),
        events=tuple(folder.notes(Event)),
        audits=tuple(folder.notes(AuditLine)),
        payments=folder.payments(),
    )


def say_if_older(folder: RunFolder, metrics: Iterable[RoundMetrics], commits: Iterable[Commit]) -> str | None:
    """What is wrong with a folder whose metrics tell of rounds that no Commit in it is of."""
    noted = max((line.round for line in metrics), default=-1)
    last = max((commit.round for commit in commits), default=-1)
    if noted <= last:
        return None
    return (
        f"Round {noted} was committed, as {folder.path / RoundMetrics.FILE} says, but the records end with round "
        f"{last}: they are damaged, or of an older copy. Restore the newest copy of the folder."
    )


@dataclass(frozen=True)
class _CommittedRound:
    record_id: bytes
    commit: Commit
    work: tuple[WorkDone, ...]


@dataclass
class _Chain:
    """Records of one job, put in order. A Contribution is looked into when a Commit names it."""

    job: Envelope
    signers: Signers
    members: dict[bytes, Member] = field(default_factory=dict)
    terms: list[tuple[bytes, Term]] = field(default_factory=list)
    commits: dict[bytes, _CommittedRound] = field(default_factory=dict)
    waiting: dict[bytes, Envelope] = field(default_factory=dict)
    """Contributions that no Commit has accepted yet."""
    verified: dict[bytes, tuple[bytes, Mapping[bytes, int]]] = field(default_factory=dict)
    """Those that one has: an heir may accept again what an older term's driver accepted alone."""

    def take(self, envelope: Envelope) -> None:
        if envelope.kind == Grant.KIND:
            self.signers.open(envelope, Grant)
        elif envelope.kind == Member.KIND:
            self.members[envelope.record_id] = self.signers.open(envelope, Member)
        elif envelope.kind == Term.KIND:
            self.terms.append((envelope.signer, self.signers.open(envelope, Term)))
        elif envelope.kind == Contribution.KIND:
            self.waiting[envelope.record_id] = envelope
        else:
            commit = self.signers.open(envelope, Commit)
            work = tuple(self._work(commit))
            self.commits[envelope.record_id] = _CommittedRound(envelope.record_id, commit, work)

    def _work(self, commit: Commit) -> Iterable[WorkDone]:
        for accepted in commit.accepted:
            member, tokens = self._looked_into(accepted.contribution, accepted.member, commit.round)
            if member != accepted.member:
                raise ReportImpossible(
                    f"Round {commit.round} counts for {self._name(accepted.member)} what {self._name(member)} did; do "
                    "not trust the driver of this job."
                )
            yield WorkDone(commit.round, accepted.member, True, accepted.reason, tokens)
        for excluded in commit.excluded:
            yield WorkDone(commit.round, excluded.member, False, excluded.reason, {})

    def _looked_into(self, name: bytes, member_id: bytes, number: int) -> tuple[bytes, Mapping[bytes, int]]:
        """Who made a Contribution, and the tokens of each of its nodes."""
        if name in self.verified:
            return self.verified[name]
        envelope = self.waiting.pop(name, None)
        if envelope is None:
            raise ReportImpossible(
                f"Round {number} accepted a contribution of {self._name(member_id)} that the folder does not hold; "
                "restore the folder from a copy."
            )
        contribution = open_record(envelope, Contribution, self.job.network)
        member = self.members.get(contribution.member)
        if member is None or envelope.signer != member.nodes[0].node:
            raise ReportImpossible(
                f"Round {number} counts a contribution for {self._name(member_id)} that this member did not sign; do "
                "not trust the driver of this job."
            )
        tokens: dict[bytes, int] = {}
        for part in contribution.work:
            tokens[part.node] = tokens.get(part.node, 0) + part.tokens
        self.verified[name] = contribution.member, tokens
        return self.verified[name]

    def _name(self, member: bytes) -> str:
        return self.members[member].name if member in self.members else f"member {member.hex()[:8]}"

    def commits_in_order(self) -> list[_CommittedRound]:
        """From round 0 on: the Commits that the newest one builds on. What an older term committed and no later one
        took up is no part of it."""
        if not self.commits:
            return []
        newest = max(self.commits.values(), key=lambda one: (one.commit.term, one.commit.round))
        order = [newest]
        while order[-1].commit.previous != self.job.record_id:
            before = self.commits.get(order[-1].commit.previous)
            if before is None or before.commit.round >= order[-1].commit.round:
                raise ReportImpossible(
                    f"The Commit before that of round {order[-1].commit.round} is not in the folder; restore the "
                    "folder from a copy, or fetch it from a member."
                )
            order.append(before)
        named = [accepted.contribution for one in order for accepted in one.commit.accepted]
        if len(named) != len(set(named)):
            raise ReportImpossible("A contribution is counted in two rounds; do not trust the driver of this job.")
        return order[::-1]
