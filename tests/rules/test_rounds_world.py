"""Driver and members together, under schedules of every kind."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rounds_world import DRIVERS, OWNER, World, make_job, start
from shoal.protocol.training import RoundSettings
from shoal.rounds import driving, following
from shoal.rounds.succession import choose_head


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


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.binary(max_size=500), SETTINGS, st.sampled_from([("a",), ("a", "b"), ("a", "b", "c", "d")]))
def test_whatever_happens_samples_count_once_and_exclusions_leave_no_trace(tape, rounds, names):
    world = run(tape, rounds, names, calm=False)
    world.check_chain()
    world.check_members()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.binary(max_size=500), SETTINGS)
def test_with_patience_every_job_reaches_its_goal(tape, rounds):
    world = run(tape, rounds, ("a", "b", "c"), calm=True)
    assert world.driving.finished is not None and world.driving.finished.reached
    assert world.driving.standing.tokens_total >= world.job.token_budget
    world.check_chain()
    world.check_members()


def test_a_quiet_job_runs_to_its_budget_and_no_further():
    world = start()
    world.run_fairly()
    world.check_chain()
    world.check_members()
    assert world.driving.finished == driving.Finish("402 tokens were accepted; 400 were asked for.", True)
    assert not any(commit.excluded for commit, _, _ in world.chain)


def test_with_lag_a_member_computes_while_its_last_work_travels():
    world = start(names=("a", "b"))
    world.deliver_all = lambda: [world.deliver(0) for _ in range(len(world.queue))]
    world.deliver_all()
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


def test_members_agree_whatever_the_order_of_messages_at_the_end():
    """The same records in opposite orders, and twice."""
    world = start()
    world.run_fairly()
    job, job_id = make_job()
    heads = []
    first_term = world.members[0].following.terms[0]
    assert first_term.number == 1
    for order in (1, -1):
        late = following.follow(
            job, job_id, OWNER.node_id, b"\x05" * 32, world.grant, world.term, None, world.now_ms
        )
        for number in sorted(world.envelopes, reverse=order < 0) * 2:
            late, effects = following.step(late, following.Arrived(world.envelopes[number]), world.now_ms)
            while any(isinstance(effect, following.Apply) for effect in effects):
                commit = next(effect.commit for effect in effects if isinstance(effect, following.Apply))
                late, effects = following.step(late, following.Applied(commit.round, commit.state), world.now_ms)
        heads.append(late.head.commit_id)
    assert heads == [world.driving.standing.commit_id] * 2


def test_an_heir_takes_over_from_what_members_report():
    world = start()
    while world.driving.standing.round < 2:
        world.run_fairly_once()
    world.crash()
    grant = choose_head(world.job_id, _grant(world), [member.following.head.envelope for member in world.members])
    assert grant.commit_id == world.driving.standing.commit_id


def _grant(world):
    from shoal.protocol.messages import open_record
    from shoal.protocol.training import Grant

    return open_record(world.grant, Grant)
