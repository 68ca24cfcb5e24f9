"""The records of a run folder, put together as replays and new drivers need them."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.driver.folder import RunFolder
from shoal.driver.replay import Record
from shoal.driver.signers import Signers
from shoal.identity import Envelope
from shoal.protocol.training import Assignment, Commit, Contribution, Grant, Member, Term


@dataclass
class Chain:
    """A job's records, verified: each is by the one who could say what it says."""

    record: Record
    members: dict[bytes, Member] = field(default_factory=dict)
    """By MemberId."""
    grant: Envelope | None = None
    term_number: int = 0
    driver: bytes | None = None
    """Whose term that is; None before the first."""
    commits: list[tuple[Commit, Envelope, Assignment]] = field(default_factory=list)
    """The chain that counts, from round 0 on."""

    @property
    def node_of(self) -> dict[bytes, bytes]:
        """MemberId -> NodeId of its first node."""
        return {member: one.nodes[0].node for member, one in self.members.items()}

    @property
    def node_names(self) -> dict[bytes, str]:
        return {one.nodes[0].node: one.name for one in self.members.values()}


def read_record(folder: RunFolder) -> Chain:
    """Read and verify all records of a job. Raises BadRecord, FolderDamaged, ForgedRecord."""
    signers = Signers(folder.job)
    chain = Chain(Record(folder.train_job(), folder.job.record_id))
    record = chain.record
    commits: dict[bytes, tuple[Commit, Envelope]] = {}
    for envelope in folder.records(Grant, Term, Member, Assignment, Contribution, Commit):
        match envelope.kind:
            case Grant.KIND:
                signers.open(envelope, Grant)
                chain.grant = envelope
            case Term.KIND:
                number = signers.open(envelope, Term).number
                if number > chain.term_number:
                    chain.term_number, chain.driver = number, envelope.signer
            case Member.KIND:
                chain.members[envelope.record_id] = signers.open(envelope, Member)
            case Assignment.KIND:
                record.assignments[envelope.record_id] = signers.open(envelope, Assignment)
            case Contribution.KIND:
                record.contributions[envelope.record_id] = signers.open(envelope, Contribution)
            case _:
                commits[envelope.record_id] = (signers.open(envelope, Commit), envelope)
    newest = max(commits.values(), key=lambda one: (one[0].term, one[0].round), default=None)
    while newest is not None:
        commit, envelope = newest
        record.commits[commit.round] = commit
        chain.commits.append((commit, envelope, record.assignments[commit.assignment]))
        newest = commits.get(commit.previous)
    chain.commits.reverse()
    return chain
