"""Whose word counts in a run folder. A signature says who signed a record; here it is checked that this one could say
what it says: the owner who drives, a granted driver what was assigned and committed in a term that it began, and a node
what it did. A folder goes through many hands, and nobody who had it may speak there for somebody else."""

from __future__ import annotations

from typing import TypeVar

from shoal.errors import JobError
from shoal.identity import Envelope, short_id
from shoal.protocol.messages import open_record
from shoal.protocol.training import Assignment, Commit, Contribution, Grant, Member, Term

R = TypeVar("R", Grant, Term, Member, Assignment, Contribution, Commit)


class ForgedRecord(JobError):
    """A folder holds a record that is not by the one who could say what it says."""

    code = "SH-621"


class Signers:
    """Opens a job's records, in the order in which the folder holds them: a record comes after those it rests on."""

    def __init__(self, job: Envelope) -> None:
        self._job = job
        self._grants: dict[bytes, Grant] = {}
        self._terms: set[tuple[int, bytes]] = set()
        """(Number, driver) of those that were begun."""
        self._nodes: dict[bytes, bytes] = {}
        """MemberId -> the node that answers for it."""

    def open(self, envelope: Envelope, kind: type[R]) -> R:
        """The record in an envelope. Raises BadRecord, ForgedRecord."""
        record = open_record(envelope, kind, self._job.network)
        signer = envelope.signer
        match record:
            case Grant():
                what, expected, right = "Grant", "the job's owner", signer == self._job.signer
                self._grants[envelope.record_id] = record
            case Term():
                grant = self._grants.get(record.grant)
                what, expected = f"Term {record.number}", "a driver that the owner granted"
                right = grant is not None and signer in grant.drivers
                self._terms.add((record.number, signer))
            case Member():
                what, expected, right = f"Member {record.name}", "its own node", signer == record.nodes[0].node
                self._nodes[envelope.record_id] = signer
            case Contribution():
                what, expected = f"Contribution of round {record.round}", "the node of the member it names"
                right = self._nodes.get(record.member) == signer
            case Assignment() | Commit():
                what, expected = f"{type(record).__name__} of round {record.round}", f"the driver of term {record.term}"
                right = (record.term, signer) in self._terms
        if record.job != self._job.record_id:
            raise ForgedRecord(
                f"The {what} in the folder, signed by {short_id(signer)}, belongs to another job; restore the folder "
                "from a copy."
            )
        if not right:
            raise ForgedRecord(
                f"The {what} in the folder is forged: {short_id(signer)} signed it, not {expected}. Restore the folder "
                "from a copy; this says nothing about the nodes that it names."
            )
        return record
