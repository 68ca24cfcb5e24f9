"""The driver's machine: what closes a round, what counts, and what is said to whom."""

import msgspec
import pytest
from rounds_world import (
    OWNER,
    START_MS,
    TOKENS_PER_SAMPLE,
    key_of,
    make_contribution,
    make_job,
    make_member,
    state_after,
)

from shoal.identity import hash_of_parts
from shoal.protocol.blobs import BlobRef
from shoal.protocol.messages import sign
from shoal.protocol.training import Accepted, DataRef, Excluded, NodeWork, RoundSettings
from shoal.rounds import driving
from shoal.rounds.driving import (
    Aggregate,
    Aggregated,
    Assign,
    AuditFailed,
    CatchUp,
    Delivered,
    FetchUpdate,
    Finish,
    LetGo,
    MemberJoined,
    MemberLeaving,
    MemberLeft,
    Phase,
    PublishCommit,
    Refuse,
    Retire,
    StopAsked,
    Tick,
    TurnAway,
    UpdateChecked,
    WakeAt,
    drive,
)
from shoal.rounds.standing import standing_at_start

DRIVER = key_of("driver")
ROUNDS = RoundSettings(inner_steps=3, grace_ms=1_000, deadline_ms=20_000)


class Desk:
    """A driver without a network: events go in by hand."""

    def __init__(self, *names, members_min=1, state_round=-1, retired=None, **changes):
        self.job, self.job_id = make_job(**{"rounds": ROUNDS, **changes})
        self.now_ms = START_MS
        self.state = drive(
            self.job, self.job_id, DRIVER.node_id, 1, standing_at_start(self.job, self.job_id), self.now_ms,
            members_min=members_min, retired=retired,
        )  # fmt: skip
        self.names = {}
        self.effects = []
        for name in names:
            self.join(name)

    def feed(self, event):
        self.state, effects = driving.step(self.state, event, self.now_ms)
        self.effects.extend(effects)
        return effects

    def join(self, name, session=0, speed=1.0, state_round=-1):
        key, member, member_id = make_member(self.job_id, name, session)
        self.names[name] = (key, member, member_id)
        return self.feed(MemberJoined(member_id, member, speed, state_round))

    def id(self, name):
        return self.names[name][2]

    def round(self, number):
        return next(opened for opened in self.state.rounds if opened.number == number)

    def make(self, name, number, **changes):
        opened = self.round(number)
        key, _, member_id = self.names[name]
        compute_ms = 1_000 * opened.shares[member_id].share.samples if member_id in opened.shares else 1
        made = make_contribution(
            self.job, opened.assignment, opened.assignment_id, member_id, key.node_id, compute_ms=compute_ms
        )
        return msgspec.structs.replace(made, **{"snapshot": True, **changes})

    def hand_in(self, name, contribution, signer=None):
        key = signer or self.names[name][0]
        return self.feed(Delivered(contribution, sign(key, contribution).record_id, key.node_id))

    def deliver(self, name, number, check=True, **changes):
        contribution = self.make(name, number, **changes)
        effects = self.hand_in(name, contribution)
        if check:
            effects += self.feed(UpdateChecked(sign(self.names[name][0], contribution).record_id))
        return effects

    def aggregate(self, exclude=(), state=None):
        asked = [effect for effect in self.effects if isinstance(effect, Aggregate)][-1]
        accepted = tuple(
            Accepted(
                member=one.member_id, contribution=one.contribution_id, update=one.contribution.update, weight_ppm=1,
                samples=one.contribution.samples, tokens=one.contribution.tokens,
            )
            for one in asked.candidates if one.member_id not in exclude
        )  # fmt: skip
        excluded = tuple(Excluded(member=one, reason="its update stood out") for one in exclude)
        state = state or state_after(asked.state_before, accepted)
        return self.feed(Aggregated(asked.round, asked.attempt, accepted, excluded, state))

    def wait(self, ms):
        self.now_ms += ms
        return self.feed(Tick())


def of(effects, kind):
    return [effect for effect in effects if isinstance(effect, kind)]


# --- opening and closing ---------------------------------------------------------------------------------------------


def test_lag_plus_one_rounds_are_opened_on_the_same_base():
    desk = Desk("a")
    first, second = of(desk.effects, Assign)
    assert (first.assignment.round, second.assignment.round) == (0, 1)
    assert first.assignment.previous == second.assignment.previous == desk.job_id
    assert (first.assignment.step, second.assignment.step) == (0, 3)
    assert first.reason == "Round 0: 6 samples over 1 members at 1 samples/s together."
    assert desk.feed(Tick()) == ()


def test_the_first_round_waits_for_enough_members():
    desk = Desk("a", members_min=2)
    assert not of(desk.effects, Assign)
    assert len(of(desk.join("b"), Assign)) == 2


def test_shares_follow_speed():
    desk = Desk(members_min=3, data=DataRef(samples=1000, sequence_tokens=3), batch_samples=8, token_budget=10**6)
    desk.join("a", speed=10.0)
    desk.join("b", speed=5.0)
    desk.join("c", speed=2.5)
    shares = {share.member: share.samples for share in of(desk.effects, Assign)[0].assignment.shares}
    assert [shares[desk.id(name)] for name in "abc"] == [24, 12, 6]


def test_a_round_closes_when_everybody_is_in():
    desk = Desk("a", "b", members_min=2)
    assert not of(desk.deliver("a", 0), Aggregate)
    (asked,) = of(desk.deliver("b", 0), Aggregate)
    assert [candidate.member_id for candidate in asked.candidates] == sorted([desk.id("a"), desk.id("b")])
    effects = desk.aggregate()
    (published,) = of(effects, PublishCommit)
    (assigned,) = of(effects, Assign)
    assert (published.commit.round, assigned.assignment.round) == (0, 2)
    assert assigned.assignment.previous == published.commit_id
    assert effects.index(published) < effects.index(assigned)


def test_a_round_closes_after_quorum_and_grace():
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 0)
    assert of(desk.effects, WakeAt)[-1].ms == desk.now_ms + 1_000
    assert not desk.wait(999)
    (asked,) = of(desk.wait(1), Aggregate)
    assert [candidate.member_id for candidate in asked.candidates] == [desk.id("a")]
    assert desk.round(0).shares[desk.id("b")].reason == (
        "It was late: round 0 closed after 1.0 s with 6 samples in, and its 6 were not among them."
    )
    assert desk.round(1).shares[desk.id("b")].reason == (
        "It builds on the member's work of round 0, which does not count."
    )


def test_grace_does_not_begin_before_a_round_is_the_oldest():
    desk = Desk("a", "b", "c", members_min=3)
    for name in ("a", "b"):
        desk.deliver(name, 0)
        made = desk.round(1).shares[desk.id(name)]
        desk.deliver(name, 1, builds_on=made.builds_on, private_before=made.private)
    desk.now_ms += 900  # the quorum of round 1 is long there when round 0 is committed
    desk.deliver("c", 0)
    desk.now_ms += 5_000
    assert [effect.round for effect in of(desk.aggregate(), Aggregate)] == []
    assert of(desk.effects, WakeAt)[-1].ms == desk.now_ms + 1_000
    assert not desk.wait(999)
    assert of(desk.wait(1), Aggregate)


def test_without_quorum_a_round_closes_at_its_deadline():
    desk = Desk("a", "b", members_min=2, rounds=msgspec.structs.replace(ROUNDS, quorum=0.9))
    desk.deliver("a", 0)
    assert not of(desk.wait(19_999), Aggregate)
    assert of(desk.wait(1), Aggregate)


def test_the_deadline_of_a_round_runs_from_when_it_is_the_oldest():
    desk = Desk("a", "b", members_min=2)
    desk.wait(15_000)
    desk.deliver("a", 0)
    desk.deliver("b", 0)
    desk.aggregate()
    assert not of(desk.wait(19_000), PublishCommit)
    assert of(desk.wait(1_000), PublishCommit)


def test_an_empty_round_keeps_the_state_and_gives_its_samples_back():
    desk = Desk("a")
    before = desk.state.standing
    published = of(desk.wait(20_000), PublishCommit)
    assert [(one.commit.round, one.commit.accepted) for one in published] == [(0, ()), (1, ())]
    assert all(one.commit.state == before.state for one in published)
    again = of(desk.effects, Assign)[2].assignment
    assert again.shares[0].ranges[0].start == 0
    assert again.step == 0  # nothing was done


def test_a_job_in_which_nothing_is_accepted_stops_with_a_sentence():
    desk = Desk(members_min=9)
    for name in "abcdefghi":
        desk.join(name)
    ended = []
    while not ended:
        ended = of(desk.wait(20_000), Finish)
    assert ended[0].reached is False
    assert ended[0].reason.startswith("The last 8 rounds accepted nothing: no member delivers usable work in time.")


def test_a_job_without_members_stops_with_a_sentence():
    desk = Desk("a")
    desk.feed(MemberLeft(desk.id("a"), "switched off"))
    assert not of(desk.wait(199_999), Finish)
    (ended,) = of(desk.wait(1), Finish)
    assert ended.reason == (
        "For 200 s there were 0 members to assign work to, and 1 are needed. Start nodes and resume."
    )


def test_the_last_rounds_are_no_larger_than_needed():
    desk = Desk("a", token_budget=TOKENS_PER_SAMPLE * 9)
    assert [one.assignment.shares[0].samples for one in of(desk.effects, Assign)] == [5, 4]
    assert sum(share.samples for one in of(desk.effects, Assign) for share in one.assignment.shares) == 9
    desk.deliver("a", 0)
    assert not of(desk.aggregate(), Assign)
    made = desk.round(1).shares[desk.id("a")]
    desk.deliver("a", 1, builds_on=made.builds_on, private_before=made.private)
    (ended,) = of(desk.aggregate(), Finish)
    assert ended == Finish("27 tokens were accepted; 27 were asked for.", True)


def test_after_the_end_nothing_happens_but_a_refusal():
    desk = Desk("a")
    contribution = desk.make("a", 0)
    assert desk.feed(StopAsked("the owner asked")) == (Finish("the owner asked", False),)
    (refused,) = desk.hand_in("a", contribution)
    assert refused.sentence == "The job is over: the owner asked"
    assert desk.wait(10**9) == () and desk.join("b") == ()


# --- contributions ---------------------------------------------------------------------------------------------------


def refused(effects):
    (refusal,) = of(effects, Refuse)
    return refusal.sentence


OUT_OF_PLACE = {
    "another job": ({"job": b"x" * 32}, "The Contribution is for another job."),
    "another term": ({"term": 2}, "The Contribution was made in term 2 of the driver; this is term 1."),
    "not assigned": ({"round": 2}, "The Contribution is for round 2, which has not been assigned."),
    "non-member": ({"member": b"x" * 32}, "without a share in round 0."),
    "wrong assignment": ({"assignment": b"x" * 32}, "answers another Assignment than the one of round 0."),
}


@pytest.mark.parametrize("what", OUT_OF_PLACE)
def test_what_is_out_of_place_is_refused_and_changes_nothing(what):
    changes, sentence = OUT_OF_PLACE[what]
    desk = Desk("a", "b", members_min=2)
    before = desk.state
    assert refused(desk.hand_in("a", desk.make("a", 0, **changes))).endswith(sentence)
    assert desk.state == before
    assert of(desk.deliver("a", 0), FetchUpdate)


def test_another_signer_is_refused_and_cannot_harm_the_member():
    desk = Desk("a", "b", members_min=2)
    before = desk.state
    sentence = refused(desk.hand_in("a", desk.make("a", 0), signer=desk.names["b"][0]))
    assert sentence.startswith("The Contribution of a is signed by ") and "not by its first node" in sentence
    assert desk.state == before


NODE = key_of("a").node_id
CONTRADICTIONS = {
    "wrong base": ({"base_state": b"x" * 32}, "Its work started from another shared state than was assigned."),
    "samples": ({"work": (NodeWork(NODE, 5, 15, 9),)}, "It counts 5 samples where 6 were assigned."),
    "tokens": ({"work": (NodeWork(NODE, 6, 19, 9),)}, "It counts 19 tokens for 6 samples of 3 each."),
    "node": (
        {"work": (NodeWork(b"x" * 32, 6, 18, 9),)},
        "It accounts work to a node twice, or to one",
    ),
    "twice": ({"work": (NodeWork(NODE, 3, 9, 9),) * 2}, "It accounts work to a node twice, or to one"),
    "loss": ({"loss_last": float("nan")}, "Its loss is not a finite number."),
    "sketches": ({"sketches": b"xyz"}, "Its sketches of 3 bytes are no whole number of steps."),
    "size": ({"update": BlobRef(b"u" * 32, 1 << 40)}, "Its update has 1099511627776 bytes; none needs more than"),
    "builds": ({"builds_on": b"x" * 32}, "It builds on 78787878, which was not accepted or is not the member's newest"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_contradicts_its_assignment_makes_the_share_void(what):
    changes, sentence = CONTRADICTIONS[what]
    desk = Desk("a", "b", members_min=2)
    assert refused(desk.hand_in("a", desk.make("a", 0, **changes))).startswith(sentence)
    for number in (0, 1):
        assert desk.round(number).shares[desk.id("a")].phase is Phase.VOID
    desk.deliver("b", 0)
    (published,) = of(desk.aggregate(), PublishCommit)
    (excluded,) = published.commit.excluded
    assert (excluded.member, excluded.reason[:40]) == (desk.id("a"), sentence[:40])
    assert excluded.contribution is not None
    # Its samples are the first to go out again, and it takes part again.
    again = of(desk.effects, Assign)[-1].assignment
    assert desk.id("a") in {share.member for share in again.shares}
    assert min(piece.start for share in again.shares for piece in share.ranges) < 12


@pytest.mark.parametrize("lag", [0, 1])
def test_a_member_that_keeps_no_state_is_heard_no_longer_than_a_replay_can_bridge(lag):
    """Else nothing of what it does later could be told from rounding on another engine."""
    desk = Desk("a", "b", members_min=2, rounds=msgspec.structs.replace(ROUNDS, lag=lag))

    def deliver(name, number, kept):
        share = desk.round(number).shares[desk.id(name)]
        private = share.private if share.private is not None else bytes(32)
        return desk.deliver(
            name, number, builds_on=share.builds_on, private_before=private,
            private_after=hash_of_parts("after", [desk.id(name), bytes([number])]), snapshot=kept,
        )  # fmt: skip

    for number, kept in enumerate([False, False, True, False, False]):
        for name in ("a", "b"):
            assert of(deliver(name, number, kept), FetchUpdate)
        desk.aggregate()
    said = "Its member keeps no private state after it, nor after the 2 before it; the job asks for one every 3 contri"
    assert refused(deliver("a", 5, kept=False)).startswith(said)
    assert desk.round(5).shares[desk.id("a")].phase is Phase.VOID
    assert of(deliver("b", 5, kept=True), FetchUpdate)


def test_a_second_contribution_is_refused_and_the_same_one_is_not_counted_twice():
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 0)
    assert desk.hand_in("a", desk.make("a", 0)) == ()
    assert refused(desk.hand_in("a", desk.make("a", 0, loss_last=1.5))) == (
        "The member has delivered another Contribution for round 0 already; the first one stands."
    )


def test_a_late_one_is_refused_with_its_round():
    desk = Desk("a", "b", members_min=2)
    late = desk.make("b", 0)
    desk.deliver("a", 0)
    desk.wait(1_000)
    assert refused(desk.hand_in("b", late)).startswith(
        "The share of round 0 is void: It was late: round 0 closed after"
    )
    desk.aggregate()
    assert refused(desk.hand_in("b", late)) == "The Contribution is late: round 0 was committed already."


def test_an_update_that_cannot_be_used_is_excluded():
    desk = Desk("a", "b", members_min=2)
    contribution = desk.make("a", 0)
    desk.hand_in("a", contribution)
    desk.feed(UpdateChecked(sign(desk.names["a"][0], contribution).record_id, "its shape is [3], not [4]."))
    assert desk.round(0).shares[desk.id("a")].reason == "Its update cannot be used: its shape is [3], not [4]."


def test_what_aggregation_excludes_takes_along_what_was_built_on_it():
    desk = Desk("a", "b", members_min=2)
    for name in ("a", "b"):
        desk.deliver(name, 0)
    opened = desk.round(1)
    for name in ("a", "b"):
        made = opened.shares[desk.id(name)]
        desk.deliver(name, 1, builds_on=made.builds_on, private_before=made.private)
    desk.aggregate(exclude=(desk.id("b"),))
    assert desk.round(1).shares[desk.id("b")].phase is Phase.VOID
    (published,) = of(desk.aggregate(), PublishCommit)
    assert [entry.member for entry in published.commit.accepted] == [desk.id("a")]


def test_the_next_work_has_to_build_on_the_last_and_start_from_its_private_state():
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 0)
    share = desk.round(1).shares[desk.id("a")]
    assert share.builds_on is not None
    assert "it had to build on" in refused(desk.deliver("a", 1, check=False))
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 0)
    sentence = refused(desk.deliver("a", 1, check=False, builds_on=desk.round(1).shares[desk.id("a")].builds_on))
    assert sentence.startswith("Its private state before the round is not the one after")


def test_rounds_may_arrive_in_the_other_order():
    desk = Desk("a", "b", members_min=2)
    first = desk.make("a", 0)
    first_id = sign(desk.names["a"][0], first).record_id
    desk.deliver("a", 1, builds_on=first_id, private_before=first.private_after)
    assert of(desk.hand_in("a", first), FetchUpdate)
    assert desk.round(1).shares[desk.id("a")].phase is Phase.READY
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 1, builds_on=b"x" * 32)
    desk.deliver("a", 0)
    assert desk.round(1).shares[desk.id("a")].phase is Phase.VOID


def test_a_member_that_does_not_know_of_its_loss_gets_no_work_that_would_build_on_it():
    desk = Desk("a", "b", members_min=2)
    for name in ("a", "b"):
        desk.deliver(name, 0)
    made = desk.round(1).shares[desk.id("a")]
    contribution = desk.make("a", 1, builds_on=made.builds_on, private_before=made.private)
    desk.hand_in("a", contribution)
    desk.feed(UpdateChecked(sign(desk.names["a"][0], contribution).record_id, "it is truncated"))
    (assigned,) = of(desk.aggregate(), Assign)
    assert [share.member for share in assigned.assignment.shares] == [desk.id("b")]


def test_a_commit_lists_members_in_canonical_order_whatever_the_answer_does():
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 0)
    (asked,) = of(desk.deliver("b", 0), Aggregate)
    entries = tuple(
        Accepted(
            member=one.member_id,
            contribution=one.contribution_id,
            update=one.contribution.update,
            weight_ppm=1,
            samples=one.contribution.samples,
            tokens=one.contribution.tokens,
        )
        for one in reversed(asked.candidates)
    )
    (published,) = of(desk.feed(Aggregated(0, asked.attempt, entries, (), b"s" * 32)), PublishCommit)
    assert published.commit.accepted == entries[::-1]
    assert [entry.member for entry in published.commit.accepted] == sorted(entry.member for entry in entries)


def test_what_another_term_had_open_is_free():
    old = Desk("a")
    assert old.state.standing.ledger.open
    fresh = drive(old.job, old.job_id, DRIVER.node_id, 2, old.state.standing, old.now_ms)
    assert fresh.standing.ledger.open == ()


def test_an_answer_that_does_not_fit_the_question_is_an_error():
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 0)
    desk.deliver("b", 0)
    asked = of(desk.effects, Aggregate)[-1]
    with pytest.raises(driving.BadAggregation):
        desk.feed(Aggregated(0, asked.attempt, (), (), b"s" * 32))
    with pytest.raises(driving.BadAggregation):
        desk.aggregate(exclude=(desk.id("a"), desk.id("b")), state=b"s" * 32)
    assert desk.feed(Aggregated(0, asked.attempt + 1, (), (), b"s" * 32)) == ()


# --- members ---------------------------------------------------------------------------------------------------------


def test_a_leaver_keeps_what_it_delivered_and_gives_back_the_rest():
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 0)
    desk.feed(MemberLeft(desk.id("a"), "its owner wants to play"))
    assert desk.round(0).shares[desk.id("a")].phase is Phase.READY
    assert desk.round(1).shares[desk.id("a")].reason == "a left before it delivered: its owner wants to play"
    desk.deliver("b", 0)
    (published,) = of(desk.aggregate(), PublishCommit)
    assert {entry.member for entry in published.commit.accepted} == {desk.id("a"), desk.id("b")}


def deliver_next(desk, name):
    """The member's share of the oldest open round, on top of its last one; the round is then committed."""
    opened = desk.state.rounds[0]
    share = opened.shares[desk.id(name)]
    changes = {} if share.private is None else {"private_before": share.private}
    desk.wait(3_000)
    desk.deliver(name, opened.number, builds_on=share.builds_on, **changes)


def test_who_leaves_soon_does_what_it_can_until_then_and_is_let_go():
    desk = Desk("a", "b", members_min=2)
    a, b = desk.id("a"), desk.id("b")
    desk.feed(MemberLeaving(a, desk.now_ms + 25_000))
    assigned = list[set[bytes]]()
    while not of(desk.effects, LetGo):
        for name in ("a", "b"):
            if desk.id(name) in desk.state.rounds[0].shares:
                deliver_next(desk, name)
        effects = desk.aggregate()
        assigned += [{share.member for share in one.assignment.shares} for one in of(effects, Assign)]
    assert assigned[0] == {a, b} and assigned[-1] == {b}
    assert of(desk.effects, LetGo) == [LetGo(a, "a leaves before it would be done with another round.")]
    assert not any(entry.member == a for one in of(desk.effects, PublishCommit) for entry in one.commit.excluded)
    assert a not in desk.state.members and desk.now_ms <= START_MS + 25_000


def test_who_leaves_later_works_on():
    desk = Desk("a")
    desk.feed(MemberLeaving(desk.id("a"), desk.now_ms + 10**7))
    for _ in range(4):
        deliver_next(desk, "a")
        assert of(desk.aggregate(), Assign)
    assert not of(desk.effects, LetGo)


def test_a_job_that_everybody_leaves_waits_for_others():
    desk = Desk("a")
    desk.feed(MemberLeaving(desk.id("a"), desk.now_ms + 1))
    deliver_next(desk, "a")
    assert not of(desk.aggregate(), Assign) and not of(desk.effects, LetGo)
    deliver_next(desk, "a")
    assert of(desk.aggregate(), LetGo) and desk.state.finished is None
    assert of(desk.join("b"), Assign)


def test_a_joiner_takes_part_from_the_next_assignment_and_catches_up():
    desk = Desk("a")
    desk.deliver("a", 0)
    desk.aggregate()
    effects = desk.join("b")
    assert of(effects, CatchUp) == [CatchUp(desk.id("b"), 0, 0)] and not of(effects, Assign)
    made = desk.round(1).shares[desk.id("a")]
    desk.deliver("a", 1, builds_on=made.builds_on, private_before=made.private)
    (assigned,) = of(desk.aggregate(), Assign)
    assert desk.id("b") in {share.member for share in assigned.assignment.shares}


def test_who_holds_a_state_that_is_not_committed_or_long_gone_is_turned_away():
    desk = Desk("a")
    (away,) = desk.join("b", state_round=5)
    assert isinstance(away, TurnAway) and "but the newest Commit is of round -1" in away.sentence


def test_a_node_that_joins_again_replaces_itself():
    desk = Desk("a", "b", members_min=2)
    old = desk.id("a")
    effects = desk.join("a", session=9)
    assert of(effects, TurnAway)[0].member_id == old
    assert set(desk.state.members) == {desk.id("a"), desk.id("b")}
    assert desk.round(0).shares[old].phase is Phase.VOID


def test_a_failed_audit_retires_the_node_and_takes_it_out_of_an_aggregation():
    desk = Desk("a", "b", members_min=2)
    desk.deliver("a", 0)
    desk.deliver("b", 0)
    first = of(desk.effects, Aggregate)[-1]
    effects = desk.feed(AuditFailed(desk.id("a"), "Mismatch: step 3 is off by 0.4."))
    assert of(effects, Retire) == [Retire(desk.id("a"), "Mismatch: step 3 is off by 0.4.")]
    (again,) = of(effects, Aggregate)
    assert again.attempt == first.attempt + 1
    assert [candidate.member_id for candidate in again.candidates] == [desk.id("b")]
    (published,) = of(desk.aggregate(), PublishCommit)
    assert published.commit.excluded[0].reason == "A replay found its work wrong: Mismatch: step 3 is off by 0.4."
    (away,) = of(desk.join("a", session=7), TurnAway)
    assert away.sentence == "a may not take part in this job any more: Mismatch: step 3 is off by 0.4."
    assert desk.feed(AuditFailed(desk.id("a"), "again")) == ()


def test_a_leaver_can_still_be_retired_and_a_new_term_remembers():
    desk = Desk("a", "b", members_min=2)
    desk.feed(MemberLeft(desk.id("a"), "gone"))
    assert of(desk.feed(AuditFailed(desk.id("a"), "wrong")), Retire)
    later = Desk("b", retired=desk.state.retired)
    assert of(later.join("a", session=3), TurnAway)


def test_who_is_always_late_gets_less_and_has_to_join_anew():
    desk = Desk(
        "a", "b", members_min=2, data=DataRef(samples=100_000, sequence_tokens=3), token_budget=10**7, batch_samples=50
    )
    shares = []
    while desk.id("b") in desk.state.members:
        opened = desk.state.rounds[0]
        shares.append(opened.shares[desk.id("b")].share.samples)
        made = opened.shares[desk.id("a")]
        changes = {} if made.private is None else {"private_before": made.private}
        desk.deliver("a", opened.number, builds_on=made.builds_on, **changes)
        desk.wait(1_000)
        desk.aggregate()
    assert shares[-1] < shares[0] / 3
    (away,) = [effect for effect in of(desk.effects, TurnAway) if effect.member_id == desk.id("b")]
    assert away.sentence == "b was late 6 rounds in a row; it may join anew when it can keep up."


def test_speeds_are_those_that_are_measured():
    desk = Desk("a", "b", members_min=2)
    for _ in range(12):
        opened = desk.state.rounds[0]
        desk.now_ms += 2_000
        for name, compute_ms in (("a", 500), ("b", 2_000)):
            made = opened.shares.get(desk.id(name))
            if made is None:
                continue
            changes = {} if made.private is None else {"private_before": made.private}
            work = (NodeWork(desk.names[name][0].node_id, made.share.samples, made.share.samples * 3, compute_ms),)
            desk.deliver(name, opened.number, builds_on=made.builds_on, work=work, **changes)
        desk.aggregate()
        if desk.state.finished:
            break
    speeds = {name: desk.state.members[desk.id(name)].speed.samples_per_s for name in "ab"}
    assert speeds["a"] > 2 * speeds["b"]


def test_ids_are_those_that_the_signed_records_will_have():
    desk = Desk("a")
    for effect in of(desk.effects, Assign):
        assert sign(DRIVER, effect.assignment).record_id == effect.assignment_id
    desk.deliver("a", 0)
    (published,) = of(desk.aggregate(), PublishCommit)
    assert sign(DRIVER, published.commit).record_id == published.commit_id
    assert sign(OWNER, published.commit).record_id != published.commit_id
