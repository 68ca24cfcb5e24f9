"""Driver and members together, under schedules of every kind."""

from functools import cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounds_world import DRIVERS, OWNER, World, start, state_after

from shoal.protocol.training import RoundSettings
from shoal.rounds import driving, following


class Tape:
    """A drawn sequence of bytes as a source of choices; zeros when it has run out."""

    def __init__(self, tape: bytes) -> None:
        self.tape, self.at = tape, 0

    def __call__(self, below: int) -> int:
        value = self.tape[self.at] if self.at < len(self.tape) else 0
        self.at += 1
        return value % below

    @property
    def over(self) -> bool:
        return self.at >= len(self.tape)


def one_whim(world: World, choose: Tape, calm: bool) -> None:
    """One thing happens, whatever it may be."""
    what = choose(32)
    members = [member for member in world.members if not member.gone]
    if what < 10:
        for _ in range(1 + choose(6)):
            if world.queue:
                world.deliver(choose(min(len(world.queue), 6 if calm else 64)), again=choose(8) == 7)
    elif what < 14 and members:
        members[choose(len(members))].finish_work()
    elif what < 18 and members:
        members[choose(len(members))].finish_apply()
    elif what < 21:
        world.finish_fetch(faulty=not calm and choose(8) == 7)
    elif what < 23:
        world.finish_aggregation(exclude=0 if not calm and choose(6) == 5 else None)
    elif what < 25 and members:
        world.report_ready(members[choose(len(members))])
    elif what < 27:
        world.wait((10, 400, 1_100, 5_000, 21_000)[choose(3 if calm else 5)])
    elif what == 27 and len(members) < 6:
        world.join()
    elif calm:
        return
    elif what == 28 and members and choose(2):
        world.leave(members[choose(len(members))])
    elif what == 29 and choose(3) == 2:
        world.crash(DRIVERS[choose(4) == 3] if choose(3) == 2 else None)
    elif what == 31 and members:
        until_ms = world.now_ms + (0, 3_000, 12_000)[choose(3)]
        world.drive(driving.MemberLeaving(members[choose(len(members))].member_id, until_ms))
    elif what == 30 and members and choose(4) == 3:
        world.drive(driving.AuditFailed(members[choose(len(members))].member_id, "step 3 was altered"))


SETTINGS = st.builds(
    RoundSettings,
    inner_steps=st.integers(1, 4),
    lag=st.integers(0, 1),
    grace_ms=st.sampled_from([0, 1_000]),
    deadline_ms=st.just(20_000),
    quorum=st.sampled_from([0.3, 0.5, 1.0]),
)


def run(tape: bytes, rounds: RoundSettings, names: tuple[str, ...], calm: bool) -> World:
    choose = Tape(tape)
    world = start(choose, names, rounds=rounds)
    while not choose.over:
        one_whim(world, choose, calm)
        if world.driving.finished is not None:
            break
    # From here on everything is fair: the job has to come to its end, with everybody at the same state.
    if world.driving.finished is None:
        world.join("late")
    world.run_fairly()
    for member in world.members:
        if not member.gone:
            world.send_commits(member, 0, world.driving.standing.round)
    world.run_fairly()
    return world


TAPES = st.binary(min_size=60, max_size=700)
"""Whims: about two bytes each."""


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(TAPES, SETTINGS, st.sampled_from([("a",), ("a", "b"), ("a", "b", "c", "d")]))
def test_whatever_happens_samples_count_once_and_exclusions_leave_no_trace(tape, rounds, names):
    world = run(tape, rounds, names, calm=False)
    world.check_chain()
    world.check_members()
    assert not [sentence for _, sentence in world.stopped if "does not know" in sentence]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(TAPES, SETTINGS)
def test_with_patience_every_job_reaches_its_goal(tape, rounds):
    world = run(tape, rounds, ("a", "b", "c"), calm=True)
    assert world.driving.finished is not None and world.driving.finished.reached
    assert world.driving.standing.tokens_total >= world.job.token_budget
    world.check_chain()
    world.check_members()
    assert not world.stopped


def test_a_quiet_job_runs_to_its_budget_and_no_further():
    world = start()
    world.run_fairly()
    world.check_chain()
    world.check_members()
    assert world.driving.finished == driving.Finish("402 tokens were accepted; 400 were asked for.", True)
    assert not any(commit.excluded for commit, _, _ in world.chain)
    assert world.driving.standing.ledger.passes_complete == 402 // 3 // 23


def test_with_lag_a_member_computes_while_its_last_work_travels():
    world = start(names=("a", "b"))
    while world.queue:
        world.deliver(0)
    a, b = world.members
    assert a.computing.begun.assignment.round == 0
    a.finish_work()
    assert a.computing.begun.assignment.round == 1  # nothing was committed yet
    assert a.computing.begun.builds_on is not None
    a.finish_work()
    assert a.computing is None  # but no further than lag allows
    b.finish_work()
    b.finish_work()
    world.run_fairly()
    assert all(not commit.excluded for commit, _, _ in world.chain)


def test_without_lag_a_member_waits_for_the_commit():
    world = start(names=("a", "b"), rounds=RoundSettings(inner_steps=3, lag=0))
    while world.queue:
        world.deliver(0)
    a, _ = world.members
    a.finish_work()
    assert a.computing is None
    world.run_fairly()
    world.check_chain()
    assert all(contribution.builds_on is None for contribution in world.contributions.values())


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_same_records_in_any_order_and_twice_lead_to_the_same_head(shuffle):
    world = quiet_world()
    records = [*world.envelopes.values(), *world.assignment_envelopes, world.term] * 2
    shuffle.shuffle(records)
    job, job_id = world.job, world.job_id
    late = following.follow(job, job_id, OWNER.node_id, b"\x05" * 32, world.grant, world.term, None, world.now_ms)
    states = [job.model.start.hash]
    for record in records:
        late, effects = following.step(late, following.Arrived(record), world.now_ms)
        while applies := [effect for effect in effects if isinstance(effect, following.Apply)]:
            states.append(state_after(states[-1], applies[0].commit.accepted))
            late, effects = following.step(late, following.Applied(applies[0].commit.round, states[-1]), world.now_ms)
    assert late.head.commit_id == world.driving.standing.commit_id
    assert states[-1] == world.driving.standing.state
    assert not late.early


@cache
def quiet_world():
    world = start(token_budget=120)
    world.run_fairly()
    return world


def test_after_a_crash_the_rounds_in_flight_are_void_and_nothing_else_is_lost():
    world = start(names=("a", "b"))
    while world.queue:
        world.deliver(0)
    for member in world.members:
        member.finish_work()
        member.finish_work()
    while world.driving.standing.round < 0:
        if world.queue:
            world.deliver(0)
        world.finish_fetch()
        world.finish_aggregation()
    for member in world.members:
        assert member.lineage
    accepted = world.driving.standing.ledger.accepted
    world.crash()
    assert world.driving.standing.ledger.accepted == accepted
    assert world.driving.standing.ledger.open == ()
    world.run_fairly()
    world.check_chain()
    world.check_members()
    assert world.driving.finished.reached and world.driving.term == 2


def test_a_retired_liar_stays_away_after_a_crash():
    world = start()
    liar = world.members[0]
    world.drive(driving.AuditFailed(liar.member_id, "step 3 was altered"))
    world.crash()
    world.join("a")
    world.run_fairly()
    turned = [effect.sentence for effect in world.effects if isinstance(effect, driving.TurnAway)]
    assert turned == ["a may not take part in this job any more: step 3 was altered"]
    assert world.driving.finished.reached
