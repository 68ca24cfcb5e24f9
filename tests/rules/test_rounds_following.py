"""The member's machine: whom it follows, what it refuses, what it rolls back."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds_world import DRIVERS, OWNER, START_MS, key_of, make_job, make_member, state_after

from shoal.identity import Envelope
from shoal.protocol.blobs import BlobRef
from shoal.protocol.messages import sign
from shoal.protocol.training import (
    PARTS_PER_MILLION,
    Accepted,
    Assignment,
    Commit,
    Excluded,
    Grant,
    SampleRange,
    Share,
    Term,
)
from shoal.rounds import following
from shoal.rounds.following import (
    AnswerHead,
    Applied,
    Apply,
    Arrived,
    AskCommits,
    BeginWork,
    Computed,
    Counted,
    DriverHeard,
    HeadAsked,
    Ignore,
    NotGranted,
    ReportFork,
    RollBack,
    Send,
    StopAndSay,
    WorkFailed,
    follow,
)
from shoal.rounds.succession import CLOCK_TOLERANCE_MS, SILENCE_MS

JOB, JOB_ID = make_job()
FIRST, SECOND = DRIVERS
_, MEMBER, ME = make_member(JOB_ID, "me")
_, _, OTHER = make_member(JOB_ID, "other")
GRANT = Grant(job=JOB_ID, drivers=(FIRST.node_id, SECOND.node_id), not_after_ms=START_MS + 10**9)
SEALED_GRANT = sign(OWNER, GRANT)
TERM = Term(job=JOB_ID, number=1, grant=SEALED_GRANT.record_id, head=JOB_ID, head_round=-1)


def accepted(member, contribution=b"c" * 32):
    return Accepted(
        member=member, contribution=contribution, update=BlobRef(b"u" * 32, 1), weight_ppm=PARTS_PER_MILLION,
        samples=2, tokens=6,
    )  # fmt: skip


class Node:
    """A member whose engine answers when it is told to, and a driver's pen."""

    def __init__(self, **changes):
        self.now_ms = START_MS
        self.state = follow(
            JOB, JOB_ID, OWNER.node_id, ME,
            **{"grant": SEALED_GRANT, "term": sign(FIRST, TERM), "head": None, "now_ms": START_MS, **changes},
        )  # fmt: skip
        self.tip = (-1, JOB_ID, JOB.model.start.hash, 0)
        self.written = {}

    def feed(self, event):
        self.state, effects = following.step(self.state, event, self.now_ms)
        return effects

    def write(self, *entries, excluded=(), pen=FIRST, term=1, on=None, **changes):
        """The next Commit of the chain, signed."""
        number, previous, state, tokens = on or self.tip
        commit = Commit(
            **{
                "job": JOB_ID,
                "round": number + 1,
                "term": term,
                "previous": previous,
                "assignment": b"a" * 32,
                "accepted": tuple(entries),
                "excluded": tuple(excluded),
                "state": state_after(state, tuple(entries)),
                "tokens_total": tokens + sum(entry.tokens for entry in entries),
                **changes,
            }
        )
        envelope = sign(pen, commit)
        self.tip = (commit.round, envelope.record_id, commit.state, commit.tokens_total)
        self.written[commit.round] = envelope
        return envelope

    def assign(self, number, pen=FIRST, term=1, member=ME, **changes):
        """An Assignment on top of the newest Commit written."""
        assignment = Assignment(
            **{
                "job": JOB_ID,
                "round": number,
                "term": term,
                "previous": self.tip[1],
                "base_state": self.tip[2],
                "step": 0,
                "deadline_ms": 1_000,
                "shares": (Share(member, (SampleRange(0, 0, 2),)),),
                **changes,
            }
        )
        return self.feed(Arrived(sign(pen, assignment)))

    def commit(self, *entries, apply=True, **changes):
        effects = self.feed(Arrived(self.write(*entries, **changes)))
        return effects + self.apply() if apply else effects

    def apply(self):
        effects = ()
        while self.state.applying is not None:
            commit = self.state.applying.commit
            effects += self.feed(Applied(commit.round, commit.state))
        return effects

    def begin_term(self, number, pen=FIRST, head=None, head_round=None, **changes):
        head_round = self.tip[0] if head_round is None else head_round
        term = Term(
            **{
                "job": JOB_ID, "number": number, "grant": SEALED_GRANT.record_id, "head": head or self.tip[1],
                "head_round": head_round, **changes,
            }
        )  # fmt: skip
        return self.feed(Arrived(sign(pen, term)))


def of(effects, kind):
    return [effect for effect in effects if isinstance(effect, kind)]


def said(effects):
    (ignored,) = effects
    assert isinstance(ignored, Ignore)
    return ignored.sentence


# --- invitations -----------------------------------------------------------------------------------------------------


def regranted(key=OWNER, **changes):
    return sign(key, msgspec.structs.replace(GRANT, **changes))


def reterm(grant, pen=FIRST, **changes):
    return sign(pen, msgspec.structs.replace(TERM, grant=grant.record_id, **changes))


@pytest.mark.parametrize(
    ("grant", "pen", "sentence"),
    [
        (regranted(key=FIRST), FIRST, "the job's owner"),
        (regranted(job=b"x" * 32), FIRST, "the job's owner"),
        (SEALED_GRANT, key_of("stranger"), "is not among the drivers that the owner granted"),
        (regranted(not_after_ms=START_MS - CLOCK_TOLERANCE_MS - 1), FIRST, "the owner has to sign a new one"),
    ],
)
def test_an_invitation_without_a_right_is_refused(grant, pen, sentence):
    with pytest.raises(NotGranted, match=sentence):
        Node(grant=grant, term=reterm(grant, pen))


def test_an_hour_of_clock_difference_is_no_reason():
    grant = regranted(not_after_ms=START_MS - 3_600_000)
    assert Node(grant=grant, term=reterm(grant)).state.head.round == -1


@pytest.mark.parametrize(
    "changes", [{"grant": b"x" * 32}, {"job": b"x" * 32}, {"head": b"x" * 32}], ids=["grant", "job", "start"]
)
def test_a_term_that_does_not_fit_is_refused(changes):
    with pytest.raises(NotGranted):
        Node(term=sign(FIRST, msgspec.structs.replace(TERM, **changes)))


def test_the_commit_of_an_invitation_has_to_be_in_the_chain_of_its_term():
    chain = Node()
    old = chain.write()
    good = Term(job=JOB_ID, number=2, grant=SEALED_GRANT.record_id, head=old.record_id, head_round=0)
    assert Node(term=sign(FIRST, good), head=old).state.head.round == 0
    own = chain.write(term=2)
    assert Node(term=sign(FIRST, good), head=own).state.head.round == 1
    for wrong in (
        chain.write(pen=OWNER, term=2),
        chain.write(pen=SECOND, term=2, on=(0, old.record_id, b"s" * 32, 0)),
        chain.write(term=1, on=(0, old.record_id, b"s" * 32, 0)),
        chain.write(term=3),
        sign(FIRST, msgspec.structs.replace(Commit(
            job=JOB_ID, round=0, term=1, previous=JOB_ID, assignment=b"b" * 32, accepted=(), state=b"s" * 32,
            tokens_total=0,
        ))),
    ):  # fmt: skip
        with pytest.raises(NotGranted):
            Node(term=sign(FIRST, good), head=wrong)


# --- the chain -------------------------------------------------------------------------------------------------------


def test_commits_are_applied_one_after_the_other_whatever_their_order():
    node = Node()
    commits = [node.write(accepted(OTHER)) for _ in range(4)]
    assert of(node.feed(Arrived(commits[2])), AskCommits) == [AskCommits(0, 1)]
    assert of(node.feed(Arrived(commits[3])), Apply) == []
    (first,) = of(node.feed(Arrived(commits[0])), Apply)
    assert first.commit.round == 0
    node.feed(Arrived(commits[1]))
    assert [effect.commit.round for effect in of(node.apply(), Apply)] == [1, 2, 3]
    assert node.state.head.commit_id == commits[3].record_id
    assert said(node.feed(Arrived(commits[1]))).startswith("The Commit of round 1 is behind the head")


def test_another_state_hash_stops_the_member_and_says_so():
    node = Node()
    node.commit(accepted(OTHER), apply=False)
    (stop,) = of(node.feed(Applied(0, b"x" * 32)), StopAndSay)
    assert stop.sentence.startswith("After the Commit of round 0 this member arrived at state 78787878")
    assert said(node.commit(accepted(OTHER), apply=False)).startswith("This member has stopped: After the Commit")


CONTRADICTIONS = {
    "twice": ({"accepted": (accepted(OTHER), accepted(OTHER)), "tokens_total": 12}, "accepts a member twice"),
    "weights": (
        {"accepted": (accepted(OTHER), msgspec.structs.replace(accepted(b"t" * 32), weight_ppm=7)), "tokens_total": 12},
        "add up to 1000007, above 1000000",
    ),
    "empty": ({"accepted": (), "tokens_total": 0}, "accepts nothing and yet names another state"),
    "tokens": ({"tokens_total": 7}, "miscounts the tokens"),
    "previous": ({"previous": b"x" * 32}, "does not follow the Commit of round -1"),
    "signer": ({"pen": SECOND}, "which did not drive term 1"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_commit_that_contradicts_itself_is_not_followed(what):
    changes, sentence = CONTRADICTIONS[what]
    node = Node()
    effects = node.commit(accepted(OTHER), apply=False, **changes)
    assert sentence in said(effects)
    assert node.state.applying is None and node.state.stopped is None


@pytest.mark.parametrize("pen", [OWNER, key_of("stranger")])
def test_who_is_not_granted_to_drive_is_not_followed(pen):
    node = Node()
    assert "has not granted to drive" in said(node.commit(pen=pen, apply=False))


def forked():
    """A member that applied one Commit of round 0 and then saw another: (member, both, what it said of them)."""
    node = Node()
    root = node.tip
    one = node.write(accepted(OTHER))
    other = node.write(accepted(OTHER, b"d" * 32), on=root)
    node.feed(Arrived(one))
    node.apply()
    (fork,) = of(node.feed(Arrived(other)), ReportFork)
    node.tip = (0, one.record_id, node.state.head.state, 6)
    return node, one, other, fork


def test_a_fork_is_evidence_and_ends_the_term_for_this_member():
    node, one, other, fork = forked()
    assert (fork.first, fork.second) == (one, other)
    for envelope in (fork.first, fork.second):
        envelope.verify()
    assert "signed two Commits for round 0 in term 1" in fork.sentence
    node.commit(accepted(OTHER), apply=False)
    assert node.state.applying is None and node.state.head.round == 0
    # Its successor need not wait, and decides which side counts.
    assert node.begin_term(2, pen=SECOND, head=one.record_id, head_round=0) == (
        Ignore("The Commit of round 1 is of term 1, which ended with round 0."),
    )
    node.tip = (0, one.record_id, node.state.head.state, 6)
    node.commit(accepted(OTHER), pen=SECOND, term=2)
    assert node.state.head.round == 1


def test_no_work_is_begun_for_a_driver_that_was_seen_to_fork():
    node, one, _, _ = forked()
    assert not of(node.assign(1), BeginWork)
    node.begin_term(2, pen=SECOND, head=one.record_id, head_round=0)
    assert of(node.assign(1, pen=SECOND, term=2), BeginWork)


def test_after_a_fork_that_was_not_applied_the_successor_picks_the_side():
    for side in (0, 1):
        node = Node()
        root = node.tip
        sides = []
        for name in (b"c", b"d"):
            node.tip = root
            sides.append((node.write(accepted(OTHER, name * 32)), node.tip))
        late = node.write(accepted(OTHER), on=sides[side][1])
        node.begin_term(2, pen=FIRST, head=late.record_id, head_round=1)
        node.feed(Arrived(sides[0][0]))
        assert of(node.feed(Arrived(sides[1][0])), ReportFork)
        node.feed(Arrived(late))
        node.apply()
        assert node.state.head.commit_id == late.record_id
        assert node.state.chain[-2].commit_id == sides[side][0].record_id


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_altered_records_change_nothing(data):
    node = Node()
    envelope = data.draw(st.sampled_from([node.write(accepted(OTHER)), sign(FIRST, TERM), SEALED_GRANT]))
    field = data.draw(st.sampled_from(["network", "kind", "version", "signer", "body", "signature"]))
    value = getattr(envelope, field)
    if isinstance(value, bytes):
        at = data.draw(st.integers(0, len(value) - 1))
        value = value[:at] + bytes([value[at] ^ data.draw(st.integers(1, 255))]) + value[at + 1 :]
    elif isinstance(value, str):
        value = data.draw(st.sampled_from(["other", "train.term", "train.commit", "train.grant"]).filter(value.__ne__))
    else:
        value = 9
    altered = Envelope(**{**{name: getattr(envelope, name) for name in envelope.__struct_fields__}, field: value})
    before = node.state
    assert of(node.feed(Arrived(altered)), Ignore)
    assert node.state == before


def test_no_more_is_kept_than_the_limits_say():
    node = Node()
    for _ in range(following.COMMITS_AHEAD_MAX + 5):
        last = node.write()
    effects = node.feed(Arrived(last))
    assert "too far ahead of round -1" in of(effects, Ignore)[0].sentence
    for number in range(following.OWN_SHARES_MAX):
        assert node.assign(number + 1, previous=b"x" * 32) == ()
    assert "one too many" in said(node.assign(50, previous=b"x" * 32))


# --- work ------------------------------------------------------------------------------------------------------------


def test_work_begins_when_the_base_is_applied_and_the_engine_is_free():
    node = Node()
    (begun,) = of(node.assign(0), BeginWork)
    assert (begun.assignment.round, begun.builds_on) == (0, None)
    assert node.assign(1) == ()
    effects = node.feed(Computed(0, b"0" * 32))
    assert of(effects, Send) == [Send(0, b"0" * 32)]
    (begun,) = of(effects, BeginWork)
    assert (begun.assignment.round, begun.builds_on) == (1, b"0" * 32)
    # The Commit and the next Assignment come while it computes.
    effects = node.commit(accepted(ME, b"0" * 32))
    assert of(effects, Counted) == [Counted(b"0" * 32, 0)] and not of(effects, RollBack)
    assert node.assign(2) == ()
    (begun,) = of(node.feed(Computed(1, b"1" * 32)), BeginWork)
    assert (begun.assignment.round, begun.builds_on) == (2, b"1" * 32)


def test_an_assignment_waits_for_its_base():
    node = Node()
    commit = node.write(accepted(OTHER))
    assert node.assign(2) == ()
    (apply,) = of(node.feed(Arrived(commit)), Apply)
    (begun,) = of(node.feed(Applied(0, apply.commit.state)), BeginWork)
    assert begun.assignment.round == 2


def test_work_is_begun_before_the_head_moves_past_its_base():
    node = Node()
    node.assign(0)
    node.assign(1)
    commit = node.write(accepted(ME, b"0" * 32))
    effects = node.feed(Computed(0, b"0" * 32)) + node.feed(Arrived(commit))
    kinds = [type(effect) for effect in effects if isinstance(effect, BeginWork | Apply)]
    assert kinds == [BeginWork, Apply]


def test_what_a_commit_excludes_is_rolled_back_with_all_that_was_built_on_it():
    node = Node()
    node.assign(0)
    node.assign(1)
    node.feed(Computed(0, b"0" * 32))
    node.feed(Computed(1, b"1" * 32))
    effects = node.commit(accepted(OTHER), excluded=(Excluded(member=ME, reason="its update stood out"),))
    (back,) = of(effects, RollBack)
    assert (back.to, back.sentence) == (None, "Round 0 does not count: its update stood out")
    (begun,) = of(node.assign(2), BeginWork)
    assert begun.builds_on is None
    # That round 1 does not count either was known: round 2 goes on.
    effects = node.commit(accepted(OTHER), excluded=(Excluded(member=ME, reason="built on round 0"),))
    assert not of(effects, RollBack)
    assert of(node.feed(Computed(2, b"2" * 32)), Send)


def test_a_share_that_never_came_and_was_void_takes_nothing_along():
    node = Node()
    node.assign(0)
    node.commit(accepted(OTHER), excluded=(Excluded(member=ME, reason="late"),))
    assert of(node.assign(2), BeginWork)
    # The Assignment of round 1, made before the Commit of round 0, is still under way; its share was void at once.
    effects = node.commit(accepted(OTHER), excluded=(Excluded(member=ME, reason="built on round 0"),))
    assert not of(effects, RollBack)
    # But a share of round 3 that never came was live, and what came after it is lost with it.
    node.feed(Computed(2, b"2" * 32))
    node.commit(accepted(ME, b"2" * 32))
    assert of(node.assign(4), BeginWork)
    assert of(node.commit(excluded=(Excluded(member=ME, reason="late"),)), RollBack)


def test_a_rollback_goes_to_the_last_contribution_that_counts():
    node = Node()
    node.assign(0)
    node.feed(Computed(0, b"0" * 32))
    node.assign(1)
    node.commit(accepted(ME, b"0" * 32))
    (back,) = of(node.commit(excluded=(Excluded(member=ME, reason="late"),)), RollBack)
    assert back.to == b"0" * 32
    (ignored,) = node.feed(Computed(1, b"1" * 32))
    assert ignored.sentence == "The work of round 1 became void before it was done; it is not sent."


def test_failed_work_is_rolled_back_and_what_would_build_on_it_is_not_begun():
    node = Node()
    node.assign(0)
    node.assign(1)
    effects = node.feed(WorkFailed(0, "out of memory"))
    assert of(effects, RollBack) == [RollBack(None, "The work of round 0 failed: out of memory")]
    assert not of(effects, BeginWork)
    node.commit(accepted(OTHER), excluded=(Excluded(member=ME, reason="late"),))
    assert of(node.assign(2), BeginWork)


def test_a_contribution_in_its_name_that_it_does_not_know_stops_it():
    node = Node()
    node.assign(0)
    (stop,) = of(node.commit(accepted(ME, b"9" * 32), apply=False), StopAndSay)
    assert "in this member's name that it does not know" in stop.sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base_state": b"x" * 32}, "names another base state than its base Commit"),
        ({"pen": SECOND}, "which does not drive"),
        ({"number": 2}, "does not fit its base"),
        ({"shares": (Share(ME, (SampleRange(0, 20, 24),)),)}, "names samples that the job does not have"),
        ({"job": b"x" * 32}, "of another job"),
    ],
)
def test_an_assignment_that_does_not_fit_is_not_begun(changes, sentence):
    node = Node()
    assert sentence in said(node.assign(**{"number": 0, **changes}))


def test_the_first_of_two_assignments_of_a_round_stands():
    node = Node()
    node.assign(0)
    assert "the first one stands" in said(node.assign(0, step=5))
    assert node.assign(1, member=OTHER) == ()


# --- terms -----------------------------------------------------------------------------------------------------------


def test_a_new_term_voids_what_is_in_flight():
    node = Node()
    node.assign(0)
    node.assign(1)
    node.feed(Computed(0, b"0" * 32))
    node.commit(accepted(ME, b"0" * 32))
    (back,) = of(node.begin_term(2), RollBack)
    assert back.to == b"0" * 32
    assert "of term 1; the newest is 2" in said(node.assign(1))
    (begun,) = of(node.assign(1, term=2), BeginWork)
    assert begun.builds_on is None
    assert "which ended with round 0" in said(node.commit(term=1, apply=False))
    node.tip = (0, node.written[0].record_id, node.state.head.state, 6)
    assert of(node.commit(accepted(OTHER), term=2, apply=False), Apply)


def test_records_of_a_term_may_come_before_it():
    node = Node()
    node.commit(accepted(OTHER))
    tip = node.tip
    assert node.commit(accepted(OTHER), term=2, apply=False) == ()
    assert node.assign(3, term=2) == ()
    (applied,) = of(node.begin_term(2, head=tip[1], head_round=tip[0]), Apply)
    assert applied.commit.term == 2
    assert of(node.apply(), BeginWork)


def test_an_heir_is_followed_only_after_silence_and_its_elder_at_once():
    node = Node()
    node.now_ms += SILENCE_MS - 1
    assert "it may take over after 20.0 s of silence" in said(node.begin_term(2, pen=SECOND))
    node.feed(DriverHeard())
    node.now_ms += SILENCE_MS - 1
    assert of(node.begin_term(2, pen=SECOND), Ignore)
    node.now_ms += 1
    assert node.begin_term(2, pen=SECOND) == ()
    assert node.state.term.driver == SECOND.node_id
    assert node.begin_term(3, pen=FIRST) == ()
    assert node.state.term.driver == FIRST.node_id


def test_of_two_that_begin_the_same_term_the_first_in_order_is_followed():
    for order in ((FIRST, SECOND), (SECOND, FIRST)):
        node = Node()
        node.now_ms += SILENCE_MS
        for pen in order:
            node.begin_term(2, pen=pen)
        assert node.state.term.driver == FIRST.node_id


def test_a_term_that_forgets_an_applied_commit_stops_this_member():
    node = Node()
    root = node.tip
    node.commit(accepted(OTHER))
    (stop,) = of(node.begin_term(2, head=root[1], head_round=root[0]), StopAndSay)
    assert stop.sentence.endswith("it has to join again with a fresh state.")


def test_a_term_on_another_chain_stops_this_member_when_that_is_known():
    node = Node()
    root = node.tip
    node.commit(accepted(OTHER))
    other = node.write(accepted(OTHER, b"d" * 32), on=root, pen=SECOND)
    ahead = node.write(accepted(OTHER))
    assert of(node.begin_term(2, head=ahead.record_id, head_round=1), AskCommits) == [AskCommits(1, 1)]
    assert other.record_id != node.state.head.commit_id
    assert of(node.feed(Arrived(ahead)), StopAndSay)


def test_who_asks_for_the_head_to_drive_is_promised_that_it_stays():
    node = Node()
    node.commit(accepted(OTHER))
    assert said(node.feed(HeadAsked(key_of("stranger").node_id, None))).endswith("but may not drive this job.")
    assert node.feed(HeadAsked(SECOND.node_id, None)) == (AnswerHead(SECOND.node_id, node.written[0]),)
    assert "of silence" in said(node.feed(HeadAsked(SECOND.node_id, 2)))
    node.now_ms += SILENCE_MS
    assert node.feed(HeadAsked(SECOND.node_id, 2)) == (AnswerHead(SECOND.node_id, node.written[0]),)
    root = node.tip
    late = node.write(accepted(OTHER))
    assert of(node.feed(Arrived(late)), Apply) == []  # the old driver's last words come too late
    node.tip = root
    assert node.begin_term(2, pen=SECOND) != ()
    assert node.state.term.number == 2
    node.commit(accepted(OTHER, b"e" * 32), pen=SECOND, term=2)
    assert (node.state.head.round, node.state.head.term) == (1, 2)


def test_a_driver_that_answers_is_not_followed_however_long_its_rounds_are():
    node = Node()
    rounds = msgspec.structs.replace(JOB.rounds, deadline_ms=600_000)
    node.state = replace(node.state, job=msgspec.structs.replace(JOB, rounds=rounds))
    for _ in range(3):
        node.now_ms += SILENCE_MS - 1
        assert "of silence" in said(node.feed(HeadAsked(SECOND.node_id, 2)))
        node.feed(DriverHeard())
    node.now_ms += SILENCE_MS
    assert of(node.feed(HeadAsked(SECOND.node_id, 2)), AnswerHead)


def test_a_promise_lapses_when_its_term_never_begins():
    node = Node()
    node.now_ms += SILENCE_MS
    node.feed(HeadAsked(SECOND.node_id, 2))
    assert of(node.commit(accepted(OTHER), apply=False), Apply) == []
    node.now_ms += JOB.rounds.deadline_ms + 1
    assert of(node.feed(DriverHeard()), Apply)


def test_a_newer_grant_replaces_the_older_and_only_the_owner_signs_it():
    node = Node()
    newer = regranted(serial=2, drivers=(SECOND.node_id,))
    assert of(node.feed(Arrived(regranted(key=SECOND, serial=2))), Ignore)
    assert node.feed(Arrived(newer)) == ()
    assert of(node.feed(Arrived(SEALED_GRANT)), Ignore)
    assert "has not granted to drive" in said(node.commit(apply=False))
    node.tip = (-1, JOB_ID, JOB.model.start.hash, 0)
    assert of(node.begin_term(2, pen=SECOND), Ignore)  # still under the old grant
    assert node.begin_term(2, pen=SECOND, grant=newer.record_id) == ()
