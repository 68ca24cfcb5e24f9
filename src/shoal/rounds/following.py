"""A member of a job as a machine: `step(state, event, now_ms) -> (state, effects)`.

It takes records as they arrive, in any order and any number of times, verifies each against the job, the owner's grant
and the chain so far, and says what the engine shall do.

    Commits:  early ── its predecessor is applied, its term fits ──> Apply ── Applied, same hash ──> head
    shares:   waiting ── base is the head, engine is free ──> BeginWork ── Computed ──> Send ──> Counted | RollBack

What is followed is the newest term of a driver that the grant allows. Commits of an older term count up to the round
from which the newer term goes on. Whoever asks for the head in order to begin a term is promised that no Commit of an
older term beyond it will be taken. After a fork (two Commits of one driver for one round and term) nothing more is
taken from that driver in that term, and its successor may begin at once.

A share that cannot count any more (not accepted in its round's Commit, or of a term that ended) is void, and with it
every share that was assigned before that was known, for the next work has to build on nothing that does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, TypeAlias

from shoal.errors import BadRecord, ShoalError
from shoal.identity import Envelope, short_id
from shoal.protocol.messages import DEFAULT_NETWORK, open_record
from shoal.protocol.training import PARTS_PER_MILLION, Assignment, Commit, Grant, Share, Term, TrainJob
from shoal.rounds.succession import may_drive

COMMITS_AHEAD_MAX = 64
"""Commits further ahead of the head than this are not kept; they are asked for later."""
RIVALS_MAX = 4
"""Different Commits of one round that are kept until it is known which one counts."""
CHAIN_KEPT = 16
"""Commits behind the head that are kept, to recognise forks and to answer with."""
ASSIGNMENTS_MAX = 8
"""Assignments with a share of this member that wait for their base or their term."""
TERMS_KEPT = 16


class NotGranted(BadRecord):
    """The records of an invitation do not show that its sender may drive the job."""

    code: ClassVar[str] = "SH-223"


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
    """Apply this Commit to the shared state (it is the one after the newest applied), then say Applied. At most one
    is under way; work that is going on goes on."""

    commit: Commit
    commit_id: bytes


@dataclass(frozen=True, slots=True)
class BeginWork:
    """Compute this share, starting from the shared state of the newest Applied, plus the member's own update of the
    Contribution `builds_on`, if any; then say Computed or WorkFailed. The work needs a copy of that state: an Apply
    may follow at once."""

    assignment: Assignment
    assignment_id: bytes
    share: Share
    builds_on: bytes | None


@dataclass(frozen=True, slots=True)
class Send:
    """The Contribution that was computed still has a place: deliver it. Without this, it must not be sent."""

    round: int
    contribution_id: bytes


@dataclass(frozen=True, slots=True)
class RollBack:
    """Stop computing if anything is being computed, and set the private state (optimizer, residual) back to what it
    was after the own Contribution `to`; to the very beginning when None. Whatever came after it leaves no trace."""

    to: bytes | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Counted:
    """The own Contribution was accepted: private states before it are needed only for replays."""

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


Effect: TypeAlias = (
    Apply | BeginWork | RollBack | Counted | Send | Ignore | ReportFork | AskCommits | AnswerHead | StopAndSay
)


# --- state ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """One Commit of the chain."""

    round: int
    commit_id: bytes
    state: bytes
    tokens_total: int
    term: int
    envelope: Envelope | None


@dataclass(frozen=True, slots=True)
class TermSeen:
    number: int
    term_id: bytes
    driver: bytes
    head: bytes
    head_round: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """An Assignment with a share of this member that has not been begun."""

    assignment: Assignment
    assignment_id: bytes
    signer: bytes
    share: Share


@dataclass(frozen=True, slots=True)
class OwnWork:
    """A share that was begun and is not yet decided."""

    round: int
    term: int
    contribution_id: bytes | None = None
    """None while it is computed."""


@dataclass(frozen=True, slots=True)
class Early:
    commit: Commit
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Promise:
    """To whom asked for the head: no Commit of a term before `term` beyond `round` is taken, until `until_ms`. Should
    that term never begin, the current driver may go on then."""

    term: int
    round: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class Following:
    """The state of the machine."""

    job: TrainJob
    job_id: bytes
    owner: bytes
    member_id: bytes
    network: str
    grant: Grant
    grant_id: bytes
    terms: tuple[TermSeen, ...]
    """Known terms, oldest first; the last one is followed."""
    chain: tuple[Link, ...]
    """The newest applied Commit is last; CHAIN_KEPT before it."""
    heard_ms: int
    """When the current driver was heard last."""
    applying: Early | None = None
    early: Mapping[int, tuple[Early, ...]] = field(default_factory=dict)
    """Commits beyond the one being applied, by round."""
    waiting: tuple[Waiting, ...] = ()
    own: tuple[OwnWork, ...] = ()
    """Undecided own work, oldest first; only the last can be under way."""
    begun_round: int = -1
    """The newest round that was begun: none is begun twice, or after a later one."""
    barred_round: int = -1
    """The newest round in which own work was lost: what was assigned on an older base is void."""
    last_counted: bytes | None = None
    promised: Promise | None = None
    forked: bool = False
    """The current driver signed a fork in its term."""
    stopped: str | None = None

    @property
    def head(self) -> Link:
        """The newest applied Commit."""
        return self.chain[-1]

    @property
    def term(self) -> TermSeen:
        return self.terms[-1]

    @property
    def working(self) -> bool:
        return bool(self.own) and self.own[-1].contribution_id is None


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
    None) is held. `owner` is the signer of the TrainJob, `now_ms` this machine's wall clock.

    Raises NotGranted when the records do not show that the term's signer may drive, BadRecord when they are no records.
    """
    granted = open_record(grant, Grant, network)
    if grant.signer != owner or granted.job != job_id:
        raise NotGranted(
            f"The grant is signed by {short_id(grant.signer)}; the job's owner {short_id(owner)} has to sign it, for "
            f"this very job."
        )
    begun = open_record(term, Term, network)
    if begun.job != job_id or begun.grant != grant.record_id:
        raise NotGranted("The driver's term is for another job, or under another grant than the one that came with it.")
    allowed = may_drive(granted, term.signer, None, 0, 0, now_ms)
    if not allowed.allowed:
        raise NotGranted(allowed.sentence)
    seen = TermSeen(begun.number, term.record_id, term.signer, begun.head, begun.head_round)
    start = Link(-1, job_id, job.model.start.hash, 0, 0, None)
    if head is not None:
        commit = open_record(head, Commit, network)
        own = commit.term == seen.number
        if (
            commit.job != job_id
            or commit.term > seen.number
            or head.signer not in granted.drivers
            or (own and (head.signer != seen.driver or commit.round <= seen.head_round))
            or (not own and commit.round > seen.head_round)
            or (commit.round == seen.head_round and head.record_id != seen.head)
        ):
            raise NotGranted(f"The Commit of round {commit.round} that came with the invitation is not in its chain.")
        start = Link(commit.round, head.record_id, commit.state, commit.tokens_total, commit.term, head)
    elif seen.head_round == -1 and seen.head != job_id:
        raise NotGranted("The driver's term does not go on from the start of this job.")
    return Following(job, job_id, owner, member_id, network, granted, grant.record_id, (seen,), (start,), now_ms)


def step(state: Following, event: Event, now_ms: int) -> tuple[Following, tuple[Effect, ...]]:
    """What follows from `event`. `now_ms` is this machine's wall clock, Unix milliseconds. Raises nothing, whatever
    peers send."""
    turn = _Turn(state, now_ms)
    if state.stopped is not None:
        turn.ignore(f"This member has stopped: {state.stopped}")
        return turn.result()
    match event:
        case Arrived():
            turn.arrive(event.envelope)
        case Applied():
            turn.applied(event)
        case Computed():
            turn.computed(event)
        case WorkFailed():
            turn.failed(event)
        case HeadAsked():
            turn.head_asked(event)
        case DriverHeard():
            turn.state = replace(state, heard_ms=now_ms)
    turn.settle()
    return turn.result()


class _Turn:
    """One step in the making."""

    def __init__(self, state: Following, now_ms: int) -> None:
        self.state = state
        self.now_ms = now_ms
        self.effects: list[Effect] = []

    def result(self) -> tuple[Following, tuple[Effect, ...]]:
        return self.state, tuple(self.effects)

    def ignore(self, sentence: str) -> None:
        self.effects.append(Ignore(sentence))

    def stop(self, sentence: str) -> None:
        self.state = replace(self.state, stopped=sentence)
        self.effects.append(StopAndSay(sentence))

    # --- records ----------------------------------------------------------------------------------------------------

    def arrive(self, envelope: Envelope) -> None:
        network = self.state.network
        try:
            match envelope.kind:
                case Grant.KIND:
                    self._grant(open_record(envelope, Grant, network), envelope)
                case Term.KIND:
                    self._term(open_record(envelope, Term, network), envelope)
                case Commit.KIND:
                    self._commit(open_record(envelope, Commit, network), envelope)
                case Assignment.KIND:
                    self._assignment(open_record(envelope, Assignment, network), envelope)
                case _:
                    self.ignore(f"A {envelope.kind!r} record has no place in following a job.")
        except ShoalError as error:
            self.ignore(error.sentence)

    def _grant(self, grant: Grant, envelope: Envelope) -> None:
        state = self.state
        if envelope.signer != state.owner or grant.job != state.job_id:
            self.ignore(f"A grant signed by {short_id(envelope.signer)} is not one by the owner for this job.")
        elif grant.serial <= state.grant.serial:
            self.ignore(f"Grant {grant.serial} does not replace grant {state.grant.serial}.")
        else:
            self.state = replace(state, grant=grant, grant_id=envelope.record_id)

    def _term(self, term: Term, envelope: Envelope) -> None:
        state, current = self.state, self.state.term
        if term.job != state.job_id:
            return self.ignore("A term for another job.")
        if envelope.record_id == current.term_id:
            return self.ignore(f"Term {term.number} is known.")
        if term.grant != state.grant_id:
            return self.ignore(f"Term {term.number} is under another grant than the newest one of the owner.")
        newer = term.number > current.number
        order = state.grant.drivers
        if term.number == current.number and {envelope.signer, current.driver} <= set(order):
            newer = order.index(envelope.signer) < order.index(current.driver)  # two began at once: the first in order
        promised = self._promised()
        if not newer or (promised is not None and term.number < promised.term):
            return self.ignore(
                f"Term {term.number} is not newer than term {current.number}, or than what was promised."
            )
        if not self._allowed(envelope.signer, f"Term {term.number}"):
            return None
        reached = state.applying.commit.round if state.applying else state.head.round
        reached_id = state.applying.envelope.record_id if state.applying else state.head.commit_id
        if term.head_round < reached or (term.head_round == reached and term.head != reached_id):
            return self.stop(
                f"Term {term.number} goes on from the Commit of round {term.head_round}, but this member has applied "
                f"another one, of round {reached}; it has to join again with a fresh state."
            )
        seen = TermSeen(term.number, envelope.record_id, envelope.signer, term.head, term.head_round)
        terms = (*(old for old in state.terms if old.number < seen.number), seen)[-TERMS_KEPT:]
        self.state = replace(state, terms=terms, heard_ms=self.now_ms, forked=False)
        self._lose(
            lambda own: own.round > seen.head_round,
            f"Term {seen.number} began after round {seen.head_round}: later rounds of older terms are void.",
        )
        waiting = tuple(
            entry
            for entry in self.state.waiting
            if entry.assignment.term >= seen.number or entry.assignment.round <= seen.head_round
        )
        # Work of later rounds may be begun again under the new term.
        begun = min(self.state.begun_round, seen.head_round)
        barred = min(self.state.barred_round, seen.head_round)
        self.state = replace(
            self.state, waiting=waiting, barred_round=barred, begun_round=max(begun, self._newest_own_round())
        )
        self._ask_missing(seen.head_round)
        return None

    def _newest_own_round(self) -> int:
        return max((own.round for own in self.state.own), default=-1)

    def _promised(self) -> Promise | None:
        """The promise that is in force."""
        promised = self.state.promised
        if promised is None or self.state.term.number >= promised.term or self.now_ms > promised.until_ms:
            return None
        return promised

    def _allowed(self, candidate: bytes, what: str) -> bool:
        state = self.state
        current = None if state.forked and candidate != state.term.driver else state.term.driver
        allowed = may_drive(
            state.grant, candidate, current, self.now_ms - state.heard_ms, state.job.rounds.deadline_ms, self.now_ms
        )
        if not allowed.allowed:
            self.ignore(f"{what} was refused: {allowed.sentence}")
        return allowed.allowed

    def _commit(self, commit: Commit, envelope: Envelope) -> None:
        state = self.state
        if commit.job != state.job_id:
            return self.ignore("A Commit of another job.")
        if envelope.signer not in state.grant.drivers:
            return self.ignore(
                f"A Commit signed by {short_id(envelope.signer)}, which the owner has not granted to drive."
            )
        if self._fork(commit, envelope):
            return None
        if envelope.signer == state.term.driver:
            self.state = state = replace(state, heard_ms=self.now_ms)
        reached = state.applying.commit.round if state.applying else state.head.round
        if commit.round <= reached:
            return self.ignore(f"The Commit of round {commit.round} is behind the head, which is of round {reached}.")
        if commit.round > reached + COMMITS_AHEAD_MAX:
            self.effects.append(AskCommits(reached + 1, reached + COMMITS_AHEAD_MAX))
            return self.ignore(f"The Commit of round {commit.round} is too far ahead of round {reached} to be kept.")
        rivals = state.early.get(commit.round, ())
        if any(rival.envelope.record_id == envelope.record_id for rival in rivals):
            return self.ignore(f"The Commit of round {commit.round} is known.")
        if len(rivals) >= RIVALS_MAX:
            return self.ignore(f"More than {RIVALS_MAX} different Commits claim round {commit.round}.")
        early = {**state.early, commit.round: (*rivals, Early(commit, envelope))}
        self.state = replace(state, early=MappingProxyType(early))
        self._ask_missing(commit.round)
        return None

    def _ask_missing(self, last: int) -> None:
        """Ask for Commits between the head and round `last` that are not here."""
        state = self.state
        reached = state.applying.commit.round if state.applying else state.head.round
        last = min(last, reached + COMMITS_AHEAD_MAX)
        missing = [number for number in range(reached + 1, last + 1) if not state.early.get(number)]
        if missing:
            self.effects.append(AskCommits(missing[0], missing[-1]))

    def _fork(self, commit: Commit, envelope: Envelope) -> bool:
        """Whether this Commit and a known one are evidence against their driver."""
        state = self.state
        known = [link.envelope for link in state.chain if link.round == commit.round and link.term == commit.term]
        known += [early.envelope for early in self._held(commit.round) if early.commit.term == commit.term]
        for other in known:
            if other is None or other.signer != envelope.signer or other.record_id == envelope.record_id:
                continue
            sentence = (
                f"Driver {short_id(envelope.signer)} signed two Commits for round {commit.round} in term "
                f"{commit.term}; both are kept as evidence, and nothing more is taken from it in this term."
            )
            self.effects.append(ReportFork(other, envelope, sentence))
            if commit.term == state.term.number:
                # Which of the two others applied is open: neither is taken unless its successor goes on from it.
                self.state = replace(state, forked=True)
                rivals = state.early.get(commit.round, ())
                if len(rivals) < RIVALS_MAX and commit.round > state.head.round:
                    early = {**state.early, commit.round: (*rivals, Early(commit, envelope))}
                    self.state = replace(self.state, early=MappingProxyType(early))
            return True
        return False

    def _held(self, number: int) -> tuple[Early, ...]:
        applying = self.state.applying
        return (
            *((applying,) if applying and applying.commit.round == number else ()),
            *self.state.early.get(number, ()),
        )

    def _assignment(self, assignment: Assignment, envelope: Envelope) -> None:
        state, current = self.state, self.state.term
        if assignment.job != state.job_id:
            return self.ignore("An Assignment of another job.")
        if assignment.term < current.number:
            return self.ignore(f"The Assignment is of term {assignment.term}; the newest is {current.number}.")
        if envelope.signer not in state.grant.drivers or (
            assignment.term == current.number and envelope.signer != current.driver
        ):
            return self.ignore(f"An Assignment signed by {short_id(envelope.signer)}, which does not drive.")
        if envelope.signer == current.driver:
            self.state = state = replace(state, heard_ms=self.now_ms)
        share = next((entry for entry in assignment.shares if entry.member == state.member_id), None)
        if share is None:
            return None
        if assignment.round <= state.begun_round and assignment.term == current.number:
            return self.ignore(f"Round {assignment.round} was begun already, or a later one was.")
        if any(
            (entry.assignment.term, entry.assignment.round) == (assignment.term, assignment.round)
            for entry in state.waiting
        ):
            return self.ignore(f"An Assignment of round {assignment.round} is waiting already; the first one stands.")
        if any(not 0 <= piece.start < piece.stop <= state.job.data.samples for piece in share.ranges):
            return self.ignore(f"The Assignment of round {assignment.round} names samples that the job does not have.")
        if len(state.waiting) >= ASSIGNMENTS_MAX:
            return self.ignore(f"The Assignment of round {assignment.round} is one too many: {ASSIGNMENTS_MAX} wait.")
        entry = Waiting(assignment, envelope.record_id, envelope.signer, share)
        waiting = sorted((*state.waiting, entry), key=lambda other: (other.assignment.term, other.assignment.round))
        self.state = replace(state, waiting=tuple(waiting))
        return None

    # --- the engine's answers ---------------------------------------------------------------------------------------

    def applied(self, event: Applied) -> None:
        applying = self.state.applying
        if applying is None or applying.commit.round != event.round:
            return self.ignore(f"Round {event.round} was not being applied.")
        commit = applying.commit
        if event.state != commit.state:
            return self.stop(
                f"After the Commit of round {event.round} this member arrived at state {event.state.hex()[:16]}, but "
                f"the Commit names {commit.state.hex()[:16]}. Its state or its software differs from the driver's; it "
                f"has to join again with a fresh state, and if that happens again, use the same version everywhere."
            )
        link = Link(
            commit.round, applying.envelope.record_id, commit.state, commit.tokens_total, commit.term, applying.envelope
        )
        self.state = replace(self.state, applying=None, chain=(*self.state.chain, link)[-CHAIN_KEPT:])
        return None

    def computed(self, event: Computed) -> None:
        own = self.state.own
        if not own or own[-1].round != event.round or own[-1].contribution_id is not None:
            return self.ignore(f"The work of round {event.round} became void before it was done; it is not sent.")
        done = replace(own[-1], contribution_id=event.contribution_id)
        self.state = replace(self.state, own=(*own[:-1], done))
        self.effects.append(Send(event.round, event.contribution_id))
        return None

    def failed(self, event: WorkFailed) -> None:
        own = self.state.own
        if not own or own[-1].round != event.round or own[-1].contribution_id is not None:
            return self.ignore(f"The work of round {event.round} was void already.")
        self._lose(lambda work: work.round == event.round, f"The work of round {event.round} failed: {event.reason}")
        return None

    def head_asked(self, event: HeadAsked) -> None:
        state = self.state
        if event.asker not in state.grant.drivers:
            return self.ignore(f"{short_id(event.asker)} asked for the head, but may not drive this job.")
        newest = state.applying.envelope if state.applying else state.head.envelope
        reached = state.applying.commit.round if state.applying else state.head.round
        if event.term is not None:
            promised = self._promised()
            if event.term <= state.term.number or (promised is not None and event.term < promised.term):
                return self.ignore(f"Term {event.term} was asked for; {state.term.number} or a newer one is known.")
            if not self._allowed(event.asker, f"Term {event.term}"):
                return None
            until_ms = self.now_ms + state.job.rounds.deadline_ms
            self.state = replace(state, promised=Promise(event.term, reached, until_ms))
        self.effects.append(AnswerHead(event.asker, newest))
        return None

    # --- what follows -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        if self.state.stopped is None and self.state.applying is None:
            self._begin()
            self._apply_next()

    def _begin(self) -> None:
        """Begin the oldest share whose base is the head, if the engine is free; before the head moves on."""
        state = self.state
        if state.working or state.forked:
            return
        keep: list[Waiting] = []
        chosen: Waiting | None = None
        known = {link.commit_id for link in state.chain}
        for entry in state.waiting:
            assignment = entry.assignment
            if assignment.term < state.term.number:
                continue
            if assignment.term == state.term.number:
                refused = self._no_longer(entry, known)
                if refused:
                    self.ignore(refused)
                    continue
                if chosen is None and assignment.previous == state.head.commit_id:
                    chosen = entry
                    continue
            keep.append(entry)
        self.state = replace(state, waiting=tuple(keep))
        if chosen is None:
            return
        builds_on = next((own.contribution_id for own in reversed(state.own) if own.round > state.head.round), None)
        work = OwnWork(chosen.assignment.round, chosen.assignment.term)
        self.state = replace(self.state, own=(*state.own, work), begun_round=work.round)
        self.effects.append(BeginWork(chosen.assignment, chosen.assignment_id, chosen.share, builds_on))

    def _no_longer(self, entry: Waiting, known: set[bytes]) -> str:
        """Why a waiting share of the current term can never be begun; empty when it can."""
        state, assignment = self.state, entry.assignment
        number = assignment.round
        if entry.signer != state.term.driver:
            return f"The Assignment of round {number} is signed by {short_id(entry.signer)}, which does not drive."
        if number <= state.begun_round:
            return f"Round {number} comes too late: round {state.begun_round} was begun."
        if assignment.previous != state.head.commit_id:
            if assignment.previous in known or number <= state.head.round:
                return f"The Assignment of round {number} starts from a Commit behind the head; it came too late."
            return ""
        if not state.head.round < number <= state.head.round + 1 + state.job.rounds.lag:
            return f"The Assignment of round {number} does not fit its base, the Commit of round {state.head.round}."
        if assignment.base_state != state.head.state:
            return f"The Assignment of round {number} names another base state than its base Commit."
        if state.head.round < state.barred_round:
            return f"The share of round {number} is void: work of round {state.barred_round} was lost."
        return ""

    def _apply_next(self) -> None:
        """Take the next Commit of the chain, if it is there."""
        state, head = self.state, self.state.head
        only: bytes | None = None
        if head.round < state.term.head_round <= head.round + COMMITS_AHEAD_MAX:
            only = self._towards_term()
            if only is None:
                return
        for early in state.early.get(head.round + 1, ()):
            if only is not None and early.envelope.record_id != only:
                continue
            refused = self._out_of_chain(early)
            if refused is None:
                continue
            if refused:
                self.ignore(refused)
                rest = tuple(other for other in self.state.early.get(head.round + 1, ()) if other is not early)
                self.state = replace(self.state, early=MappingProxyType({**self.state.early, head.round + 1: rest}))
                continue
            commit = early.commit
            later = {number: rivals for number, rivals in self.state.early.items() if number > commit.round}
            self.state = replace(self.state, applying=early, early=MappingProxyType(later))
            self._decide_own(commit)
            if self.state.stopped is None:
                self.effects.append(Apply(commit, early.envelope.record_id))
            return

    def _towards_term(self) -> bytes | None:
        """The Commit after the head that leads to where the newest term begins; None while that is not known. Before
        a term, Commits count only if its driver went on from them; after a fork, that picks one side."""
        state, head = self.state, self.state.head
        wanted = leads = state.term.head
        for number in range(state.term.head_round, head.round, -1):
            found = [early for early in state.early.get(number, ()) if early.envelope.record_id == wanted]
            if not found:
                return None
            leads, wanted = wanted, found[0].commit.previous
        if wanted != head.commit_id:
            self.stop(
                f"Term {state.term.number} goes on from a chain that does not contain the Commit of round {head.round} "
                f"that this member has applied; it has to join again with a fresh state."
            )
            return None
        return leads

    def _out_of_chain(self, early: Early) -> str | None:
        """Why a Commit of the round after the head is not the next of the chain: empty when it is; None when that
        cannot be said yet."""
        state, head, commit = self.state, self.state.head, early.commit
        number, signer = commit.round, early.envelope.signer
        current = state.term
        if commit.term > current.number:
            return None
        known = {term.number: term for term in state.terms}.get(commit.term)
        if known is not None and signer != known.driver:
            return (
                f"The Commit of round {number} is signed by {short_id(signer)}, which did not drive term {commit.term}."
            )
        if commit.term == current.number:
            if number <= current.head_round:
                return f"The Commit of round {number} lies before the start of its term."
            if state.forked:
                return None
        else:
            newer = min((term.head_round for term in state.terms if term.number > commit.term), default=number)
            if number > newer:
                return f"The Commit of round {number} is of term {commit.term}, which ended with round {newer}."
            if any(term.head_round == number and term.head != early.envelope.record_id
                   for term in state.terms if term.number > commit.term):  # fmt: skip
                return f"The Commit of round {number} is not the one that the newer term goes on from."
        promised = self._promised()
        if promised is not None and number > promised.round:
            return None  # the promised term decides
        if commit.previous != head.commit_id:
            return f"The Commit of round {number} does not follow the Commit of round {head.round} that was applied."
        if commit.term < head.term:
            return f"The Commit of round {number} is of term {commit.term}, after one of term {head.term}."
        return self._contradiction(commit)

    def _contradiction(self, commit: Commit) -> str:
        head = self.state.head
        members = [entry.member for entry in commit.accepted]
        total = sum(entry.weight_ppm for entry in commit.accepted)
        if len(set(members)) != len(members):
            return f"The Commit of round {commit.round} accepts a member twice."
        if members and total not in (0, PARTS_PER_MILLION):
            return f"The weights in the Commit of round {commit.round} add up to {total}, not {PARTS_PER_MILLION}."
        if not members and commit.state != head.state:
            return f"The Commit of round {commit.round} accepts nothing and yet names another state."
        if commit.tokens_total != head.tokens_total + sum(entry.tokens for entry in commit.accepted):
            return f"The Commit of round {commit.round} miscounts the tokens."
        return ""

    def _decide_own(self, commit: Commit) -> None:
        """What a Commit means for this member's own work."""
        state = self.state
        mine = next((entry for entry in commit.accepted if entry.member == state.member_id), None)
        own = next((work for work in state.own if work.round == commit.round), None)
        if mine is not None:
            if own is None or own.contribution_id != mine.contribution:
                self.stop(
                    f"The Commit of round {commit.round} accepts a Contribution ({short_id(mine.contribution)}) in "
                    f"this member's name that it does not know."
                )
                return
            rest = tuple(work for work in state.own if work.round > commit.round)
            self.state = replace(state, own=rest, last_counted=mine.contribution)
            self.effects.append(Counted(mine.contribution, commit.round))
            return
        excluded = next((entry for entry in commit.excluded if entry.member == state.member_id), None)
        if own is None and excluded is None:
            return
        reason = excluded.reason if excluded is not None else "it is not among the accepted ones"
        self.state = replace(self.state, barred_round=max(self.state.barred_round, commit.round))
        self._lose(lambda work: work.round >= commit.round, f"Round {commit.round} does not count: {reason}")

    def _lose(self, lost: Callable[[OwnWork], bool], sentence: str) -> None:
        """Own work that does not count, and whatever was built on it."""
        state = self.state
        first = next((at for at, work in enumerate(state.own) if lost(work)), None)
        if first is None:
            return
        kept, gone = state.own[:first], state.own[first:]
        barred = max(state.barred_round, gone[0].round) if gone[0].term == state.term.number else state.barred_round
        self.state = replace(state, own=kept, barred_round=barred)
        to = next((work.contribution_id for work in reversed(kept) if work.contribution_id), state.last_counted)
        self.effects.append(RollBack(to, sentence))
