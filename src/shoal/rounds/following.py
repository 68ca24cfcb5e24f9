"""A member of a job as a machine: `step(state, event, now_ms) -> (state, effects)`.

It takes records as they arrive, in any order and any number of times, verifies each against the job, the owner's grant
and the chain so far, and says what the engine shall do.

    Commits:  early ── its predecessor is applied, its term fits ──> Apply ── Applied, same hash ──> head
    shares:   waiting ── base is the head, engine is free ──> computing (BeginWork) ── Computed ──> sent ──> Counted
                                                              any of them ── its round's Commit without it ──> lost

What is followed is the newest term of a driver that the grant allows. Commits of an older term count up to the round
from which the newer term goes on. Whoever asks for the head in order to begin a term is promised that no Commit of an
older term beyond it will be taken. After a fork (two Commits of one driver for one round and term) nothing more is
taken from that driver in that term, and its successor may begin at once.

When a Commit does not accept this member's share, every share of it that was assigned before that Commit is lost as
well, for the next work has to build on nothing that does not count: the driver keeps the same rule. What is in flight
when a newer term begins is void.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar, TypeAlias

from shoal.errors import BadRecord, ShoalError
from shoal.identity import Envelope, short_id
from shoal.protocol.messages import DEFAULT_NETWORK, open_record
from shoal.protocol.training import PARTS_PER_MILLION, Assignment, Commit, Grant, Share, Term, TrainJob
from shoal.rounds.succession import SILENCE_MS, may_drive

COMMITS_AHEAD_MAX = 64
"""Commits further ahead of the head than this are not kept; they are asked for later."""
RIVALS_MAX = 4
"""Different Commits of one round that are kept until it is known which one counts."""
CHAIN_KEPT = 16
"""Commits behind the head that are kept, to recognise forks and to answer with."""
OWN_SHARES_MAX = 8
"""Shares of this member whose rounds are not committed: lag + 1, and some of a term that is still to be known."""
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


class Stage(StrEnum):
    WAITING = "waiting"
    COMPUTING = "computing"
    SENT = "sent"
    DECLINED = "declined"
    """It will not be done (it came too late, or failed); the driver learns it when the round closes."""
    LOST = "lost"
    """Void, and the driver knows: work of a round before it was not accepted."""


@dataclass(frozen=True, slots=True)
class OwnShare:
    """A share of this member whose round is not committed yet."""

    assignment: Assignment
    assignment_id: bytes
    signer: bytes
    share: Share
    stage: Stage = Stage.WAITING
    contribution_id: bytes | None = None

    @property
    def round(self) -> int:
        return self.assignment.round


@dataclass(frozen=True, slots=True)
class Early:
    commit: Commit
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Promise:
    """To `asker`, who asked for the head: no Commit of a term before `term` beyond `round` is taken, until `until_ms`.
    Should that term never begin, the current driver may go on then."""

    asker: bytes
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
    own: tuple[OwnShare, ...] = ()
    """By term and round."""
    lost_round: int = -1
    """The newest committed round in which a share of this member was not accepted."""
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
        return any(own.stage is Stage.COMPUTING for own in self.own)

    def refuses_grant(self, grant: Grant, signer: bytes) -> str:
        """Why a grant does not take the place of the newest one; empty when it does."""
        if signer != self.owner or grant.job != self.job_id:
            return f"A grant signed by {short_id(signer)} is not one by the owner for this job."
        if grant.serial <= self.grant.serial:
            return f"Grant {grant.serial} does not replace grant {self.grant.serial}."
        return ""


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
        refused = self.state.refuses_grant(grant, envelope.signer)
        if refused:
            self.ignore(refused)
        else:
            self.state = replace(self.state, grant=grant, grant_id=envelope.record_id)

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
        # Who was promised the head has shown the silence of the driver before it, whose last words may still arrive.
        awaited = promised is not None and (promised.asker, promised.term) == (envelope.signer, term.number)
        if not awaited and not self._allowed(envelope.signer, f"Term {term.number}"):
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
        # Of rounds beyond the term's start only what this term itself assigned (it may have come before) has a place.
        stays = [own for own in self.state.own if own.assignment.term >= seen.number or own.round <= seen.head_round]
        self._keep(tuple(stays), f"Term {seen.number} began after round {seen.head_round}: later rounds are void.")
        self._ask_missing(seen.head_round)
        return None

    def _promised(self) -> Promise | None:
        """The promise that is in force."""
        promised = self.state.promised
        if promised is None or self.state.term.number >= promised.term or self.now_ms > promised.until_ms:
            return None
        return promised

    def _allowed(self, candidate: bytes, what: str) -> bool:
        state = self.state
        current = None if state.forked and candidate != state.term.driver else state.term.driver
        silent_ms, silence_ms = self.now_ms - state.heard_ms, min(SILENCE_MS, state.job.rounds.deadline_ms)
        allowed = may_drive(state.grant, candidate, current, silent_ms, silence_ms, self.now_ms)
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
        rivals = state.early.get(commit.round, ())
        if any(rival.envelope.record_id == envelope.record_id for rival in rivals):
            return self.ignore(f"The Commit of round {commit.round} is known.")
        self._note_fork(commit, envelope)
        if envelope.signer == state.term.driver:
            self.state = replace(self.state, heard_ms=self.now_ms)
        state = self.state
        reached = state.applying.commit.round if state.applying else state.head.round
        if commit.round <= reached:
            return self.ignore(f"The Commit of round {commit.round} is behind the head, which is of round {reached}.")
        if commit.round > reached + COMMITS_AHEAD_MAX:
            self.effects.append(AskCommits(reached + 1, reached + COMMITS_AHEAD_MAX))
            return self.ignore(f"The Commit of round {commit.round} is too far ahead of round {reached} to be kept.")
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

    def _note_fork(self, commit: Commit, envelope: Envelope) -> None:
        """When this Commit and a known one are evidence against their driver, say so. Which of the two others applied
        is open: in this term neither is taken any more, unless its successor goes on from it."""
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
                self.state = replace(state, forked=True)
            return

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
        if any((own.assignment.term, own.round) == (assignment.term, assignment.round) for own in state.own):
            return self.ignore(f"An Assignment of round {assignment.round} is known already; the first one stands.")
        if assignment.round <= state.head.round:
            return self.ignore(f"The Assignment of round {assignment.round} came after that round's Commit.")
        if any(not 0 <= piece.start < piece.stop <= state.job.data.samples for piece in share.ranges):
            return self.ignore(f"The Assignment of round {assignment.round} names samples that the job does not have.")
        if len(state.own) >= OWN_SHARES_MAX:
            return self.ignore(
                f"The Assignment of round {assignment.round} is one too many: {OWN_SHARES_MAX} are open."
            )
        entry = OwnShare(assignment, envelope.record_id, envelope.signer, share)
        own = sorted((*state.own, entry), key=lambda other: (other.assignment.term, other.round))
        self.state = replace(state, own=tuple(own))
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
        if self._computing(event.round) is None:
            return self.ignore(f"The work of round {event.round} became void before it was done; it is not sent.")
        self._mark(
            lambda own: own.stage is Stage.COMPUTING,
            lambda own: replace(own, stage=Stage.SENT, contribution_id=event.contribution_id),
        )
        self.effects.append(Send(event.round, event.contribution_id))
        return None

    def failed(self, event: WorkFailed) -> None:
        failed = self._computing(event.round)
        if failed is None:
            return self.ignore(f"The work of round {event.round} was void already.")
        self._decline(failed)
        self.effects.append(
            RollBack(self._newest_standing(), f"The work of round {event.round} failed: {event.reason}")
        )
        return None

    def _computing(self, number: int) -> OwnShare | None:
        return next((own for own in self.state.own if own.stage is Stage.COMPUTING and own.round == number), None)

    def _decline(self, declined: OwnShare) -> None:
        """This share will not be done. What was assigned before the driver knows will be void with it."""
        self._mark(
            lambda own: own is declined or (own.stage is Stage.WAITING and own.round > declined.round
                                            and own.assignment.term == declined.assignment.term
                                            and self._base_round(own) < declined.round),
            lambda own: replace(own, stage=Stage.DECLINED),
        )  # fmt: skip

    def _mark(self, which: Callable[[OwnShare], bool], change: Callable[[OwnShare], OwnShare]) -> None:
        own = tuple(change(entry) if which(entry) else entry for entry in self.state.own)
        self.state = replace(self.state, own=own)

    def _base_round(self, own: OwnShare) -> int:
        """Of the Commit it starts from. One that is not known (yet) is as old as it may be."""
        rounds = {link.commit_id: link.round for link in self.state.chain}
        applying = self.state.applying
        if applying is not None:
            rounds[applying.envelope.record_id] = applying.commit.round
        return rounds.get(own.assignment.previous, own.round - 1 - self.state.job.rounds.lag)

    def _newest_standing(self) -> bytes | None:
        """The newest own Contribution that is accepted, or may be."""
        sent = [own.contribution_id for own in self.state.own if own.stage is Stage.SENT]
        return sent[-1] if sent else self.state.last_counted

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
            self.state = replace(state, promised=Promise(event.asker, event.term, reached, until_ms))
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
            return None
        for own in state.own:
            if own.stage is not Stage.WAITING or own.assignment.term != state.term.number:
                continue
            refused = self._no_longer(own)
            if refused:
                self.ignore(refused)
                self._decline(own)
                return self._begin()
            if own.assignment.previous == state.head.commit_id:
                builds_on = [other.contribution_id for other in state.own
                             if other.stage is Stage.SENT and other.round < own.round]  # fmt: skip
                self._mark(lambda entry, own=own: entry is own, lambda entry: replace(entry, stage=Stage.COMPUTING))  # type: ignore[misc]
                newest = builds_on[-1] if builds_on else None
                self.effects.append(BeginWork(own.assignment, own.assignment_id, own.share, newest))
                return None
        return None

    def _no_longer(self, own: OwnShare) -> str:
        """Why a waiting share of the current term can never be begun; empty when it can."""
        state, assignment, number = self.state, own.assignment, own.round
        if own.signer != state.term.driver:
            return f"The Assignment of round {number} is signed by {short_id(own.signer)}, which does not drive."
        later = [other.round for other in state.own
                 if other.round > number and other.stage in (Stage.COMPUTING, Stage.SENT)]  # fmt: skip
        if later:
            return f"The Assignment of round {number} came too late: round {later[0]} was begun."
        if assignment.previous != state.head.commit_id:
            if any(link.commit_id == assignment.previous for link in state.chain) or number <= state.head.round + 1:
                return f"The Assignment of round {number} starts from a Commit behind the head; it came too late."
            return ""
        if not state.head.round < number <= state.head.round + 1 + state.job.rounds.lag:
            return f"The Assignment of round {number} does not fit its base, the Commit of round {state.head.round}."
        if assignment.base_state != state.head.state:
            return f"The Assignment of round {number} names another base state than its base Commit."
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
        if total > PARTS_PER_MILLION:
            return f"The weights in the Commit of round {commit.round} add up to {total}, above {PARTS_PER_MILLION}."
        if not members and commit.state != head.state:
            return f"The Commit of round {commit.round} accepts nothing and yet names another state."
        if commit.tokens_total != head.tokens_total + sum(entry.tokens for entry in commit.accepted):
            return f"The Commit of round {commit.round} miscounts the tokens."
        return ""

    def _decide_own(self, commit: Commit) -> None:
        """What a Commit means for this member's own shares."""
        state, number = self.state, commit.round
        mine = next((entry for entry in commit.accepted if entry.member == state.member_id), None)
        own = next(
            (entry for entry in state.own if entry.round == number and entry.assignment.term == commit.term), None
        )
        rest = tuple(entry for entry in state.own if entry.round > number)
        if mine is not None:
            if own is None or own.stage is not Stage.SENT or own.contribution_id != mine.contribution:
                return self.stop(
                    f"The Commit of round {number} accepts a Contribution ({short_id(mine.contribution)}) in this "
                    f"member's name that it does not know."
                )
            self.state = replace(state, own=rest, last_counted=mine.contribution)
            self.effects.append(Counted(mine.contribution, number))
            return None
        excluded = next((entry for entry in commit.excluded if entry.member == state.member_id), None)
        if own is None and excluded is None:
            return self._keep(rest, "")
        # A share that never came here was void with an earlier one, if one was lost in the round before.
        known = own.stage is Stage.LOST if own is not None else state.lost_round == number - 1
        self.state = replace(self.state, lost_round=number)
        if known:
            return self._keep(rest, "")
        reason = excluded.reason if excluded is not None else "it is not among the accepted ones"
        lost = tuple(replace(entry, stage=Stage.LOST) if self._base_round(entry) < number else entry for entry in rest)
        return self._keep(lost, f"Round {number} does not count: {reason}")

    def _keep(self, own: tuple[OwnShare, ...], sentence: str) -> None:
        """Only these own shares stand from now on. What was begun and is not among them leaves no trace."""
        active = (Stage.COMPUTING, Stage.SENT)
        before = {entry.assignment_id for entry in self.state.own if entry.stage in active}
        after = {entry.assignment_id for entry in own if entry.stage in active}
        self.state = replace(self.state, own=own)
        if before - after:
            self.effects.append(RollBack(self._newest_standing(), sentence))
