"""Who drives next, and from where."""

import msgspec
import pytest
from rounds_world import DRIVERS, OWNER, START_MS, key_of, make_job, start

from shoal.protocol.messages import open_record, sign
from shoal.protocol.training import Commit, Grant
from shoal.rounds import driving, following
from shoal.rounds.samples import BadSamples
from shoal.rounds.standing import BrokenChain, standing_at_start
from shoal.rounds.succession import CLOCK_TOLERANCE_MS, choose_head, may_drive, next_term, rebuild

FIRST, SECOND = DRIVERS
THIRD = key_of("driver 2")
GRANT = Grant(job=b"j" * 32, drivers=(FIRST.node_id, SECOND.node_id, THIRD.node_id), not_after_ms=START_MS)


@pytest.mark.parametrize(
    ("candidate", "current", "silent_ms", "allowed"),
    [
        (FIRST, FIRST, 0, True),
        (FIRST, THIRD, 0, True),
        (SECOND, FIRST, 999, False),
        (SECOND, FIRST, 1_000, True),
        (THIRD, FIRST, 1_999, False),
        (THIRD, FIRST, 2_000, True),
        (THIRD, None, 0, True),
        (SECOND, OWNER, 0, True),
        (OWNER, None, 10**9, False),
    ],
)
def test_the_order_of_succession(candidate, current, silent_ms, allowed):
    answer = may_drive(GRANT, candidate.node_id, current and current.node_id, silent_ms, 1_000, START_MS)
    assert answer.allowed is allowed and answer.sentence.endswith(".")


def test_a_grant_ends_with_tolerance_for_clocks():
    assert may_drive(GRANT, FIRST.node_id, None, 0, 0, START_MS + CLOCK_TOLERANCE_MS).allowed
    ended = may_drive(GRANT, FIRST.node_id, None, 0, 0, START_MS + CLOCK_TOLERANCE_MS + 1)
    assert not ended.allowed and "ended 7200 s ago" in ended.sentence


def finished_world():
    world = start(token_budget=100)
    world.run_fairly()
    return world


def granted(world):
    return open_record(world.grant, Grant)


def test_the_newest_commit_is_chosen_and_others_do_not_count():
    world = finished_world()
    newest = world.envelopes[max(world.envelopes)]
    foreign = sign(FIRST, msgspec.structs.replace(open_record(newest, Commit), job=b"x" * 32, round=999))
    unsigned = sign(OWNER, msgspec.structs.replace(open_record(newest, Commit), round=999))
    choice = choose_head(
        world.job_id, granted(world), [None, world.envelopes[0], newest, foreign, unsigned, world.term]
    )
    assert (choice.commit_id, choice.round, choice.forks) == (newest.record_id, max(world.envelopes), ())
    assert choice.sentence.endswith("3 reports did not count: not a Commit of this job by a granted driver.")


def test_a_fork_among_the_reports_is_evidence_and_everybody_chooses_the_same_side():
    world = finished_world()
    newest = world.envelopes[max(world.envelopes)]
    other = sign(FIRST, msgspec.structs.replace(open_record(newest, Commit), assignment=b"x" * 32))
    choices = [choose_head(world.job_id, granted(world), reports) for reports in ([newest, other], [other, newest])]
    assert choices[0].commit_id == choices[1].commit_id
    assert {envelope.record_id for envelope in choices[0].forks[0]} == {newest.record_id, other.record_id}


def test_without_reports_the_job_starts_at_its_beginning():
    world = finished_world()
    choice = choose_head(world.job_id, granted(world), [None, None])
    assert (choice.commit, choice.commit_id, choice.round) == (None, world.job_id, -1)


def test_the_standing_is_rebuilt_from_the_chain_alone():
    world = finished_world()
    standing = rebuild(world.job, world.job_id, world.chain)
    assert standing == world.driving.standing
    term = next_term(world.job_id, world.grant.record_id, standing, 1)
    assert (term.number, term.head, term.head_round) == (2, standing.commit_id, standing.round)
    job, job_id = make_job()
    assert rebuild(job, job_id, []) == standing_at_start(job, job_id)


def test_a_chain_that_does_not_follow_is_refused():
    world = finished_world()
    replace = msgspec.structs.replace
    (zero, zero_id, first), (one, one_id, second) = world.chain[:2]
    extra = replace(zero.accepted[0], member=b"x" * 32)
    for broken in (
        [(one, one_id, second)],
        [(zero, zero_id, first), (zero, zero_id, first)],
        [(zero, zero_id, first), (replace(one, previous=b"x" * 32), one_id, second)],
        [(zero, zero_id, second)],
        [(replace(zero, job=b"x" * 32), zero_id, first)],
        [(replace(zero, accepted=(*zero.accepted, extra)), zero_id, first)],
        [(replace(zero, accepted=(*zero.accepted, zero.accepted[0])), zero_id, first)],
        [(replace(zero, tokens_total=1), zero_id, first)],
        [(replace(zero, accepted=(replace(zero.accepted[0], samples=1), *zero.accepted[1:])), zero_id, first)],
        [(replace(zero, accepted=(), tokens_total=0), zero_id, first)],
        [(replace(zero, term=2), zero_id, replace(first, term=2)), (one, one_id, second)],
    ):
        with pytest.raises((BrokenChain, BadSamples)):
            rebuild(world.job, world.job_id, broken)
    with pytest.raises(BadSamples):
        rebuild(world.job, world.job_id, [(zero, zero_id, first), (one, one_id, replace(second, shares=first.shares))])


def test_an_heir_takes_over_from_what_members_report():
    """The driver dies with its last Commit under way; the heir asks, and nobody is left behind."""
    world = start(names=("a", "b", "c"))
    while world.driving.standing.round < 3:
        for member in world.members:
            member.finish_apply()
            member.finish_work()
        while world.queue and world.driving.standing.round < 3:
            world.deliver(0)
        while world.fetching:
            world.finish_fetch()
        world.finish_aggregation()
    last_words = list(world.queue)
    world.queue.clear()
    world.now_ms += world.job.rounds.deadline_ms + 1
    for member in world.members:
        member.feed(following.HeadAsked(SECOND.node_id, 2))
    choice = choose_head(world.job_id, granted(world), world.heads)
    assert choice.round == 2  # nobody had applied the Commit of round 3 yet
    world.chain = world.chain[: choice.round + 1]
    world.envelopes = {number: envelope for number, envelope in world.envelopes.items() if number <= choice.round}
    world.begin_term(SECOND, 1)
    world.queue = [entry for entry in last_words if entry[0] is not None] + world.queue
    world.run_fairly()
    assert isinstance(world.driving.finished, driving.Finish) and world.driving.finished.reached
    world.check_chain()
    world.check_members()
    assert not world.stopped and {member.following.term.driver for member in world.members} == {SECOND.node_id}
