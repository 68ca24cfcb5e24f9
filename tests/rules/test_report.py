"""The report says what the records say, and the page says what the report says: nothing else, and safely."""

from __future__ import annotations

import base64
import dataclasses
import errno
import hashlib
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_story import Story, blob

from shoal.driver.account import ReportImpossible, RunContents, read_contents
from shoal.driver.chain import read_record
from shoal.driver.folder import FolderWriteFailed, RunFolder
from shoal.driver.lines import AuditVerdict, EventKind, Lane, LaneSegment
from shoal.driver.replay import find_contribution
from shoal.driver.report import (
    PIECES_MAX,
    AuditCount,
    CurvePoint,
    ExclusionReport,
    Figures,
    Goal,
    NodeFigures,
    NodeStatus,
    Report,
    build_report,
    report_from_json,
    report_json,
    thin_curve,
    thin_lane,
)
from shoal.driver.report_page import group_exclusions, nice_ticks, render_page, time_ticks
from shoal.driver.signers import ForgedRecord
from shoal.driver.write_report import write_missing_page, write_report
from shoal.identity import KeyPair, blake3_hash
from shoal.protocol.messages import Record, open_record, record_id_of, sign
from shoal.protocol.training import Accepted, Assignment, Commit, Contribution, Grant, Member, Term
from shoal.purse.bills import Bill, BillLine
from shoal.world import DirectoryDisk, FaultyDisk, MemoryDisk

PROMISED = {"held_out_loss", "untrained_loss", "unigram_loss", "tokens_accepted", "rounds", "wall_s"}
PROMISED |= {"compute_fraction", "nodes"}
PROMISED_OF_A_NODE = {"node_id", "name", "tokens", "bytes_sent", "bytes_received", "accepted_share", "status", "reason"}


def contents_of(story: Story, path: Path) -> RunContents:
    with RunFolder.create(path, disk=MemoryDisk()) as folder:
        story.write(folder)
        return read_contents(folder)


@pytest.fixture(scope="module")
def story() -> Story:
    return Story()


@pytest.fixture(scope="module")
def contents(story: Story, tmp_path_factory: pytest.TempPathFactory) -> RunContents:
    return contents_of(story, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(story: Story, contents: RunContents) -> Report:
    return build_report(contents, story.figures())


# --- the account ----------------------------------------------------------------------------------------------------


def test_work_is_counted_as_it_was_accepted(story: Story, report: Report) -> None:
    assert {node.node_id: node.tokens for node in report.nodes} == story.tokens
    assert report.tokens_accepted == sum(story.tokens.values()) == story.total
    assert math.isclose(sum(node.accepted_share for node in report.nodes), 1.0)
    assert report.rounds == story.rounds
    assert {node.node_id: node.rounds_excluded for node in report.nodes if node.rounds_excluded} == story.excluded
    assert report.exclusions_count == len(report.exclusions) == sum(story.excluded.values())


def test_every_node_is_named_with_what_happened_to_it(story: Story, report: Report) -> None:
    assert [node.name for node in report.nodes] == list(story.names)
    status = {node.name: node.status for node in report.nodes}
    assert status["bream"] is NodeStatus.DIED and status["cod"] is NodeStatus.EXCLUDED
    assert all(node.reason for node in report.nodes if node.status is not NodeStatus.FINISHED)
    lie = next(one for one in report.exclusions if one.name == "cod")
    assert "replay" in lie.reason
    assert [(audit.name, audit.round) for audit in report.audits if audit.verdict is AuditVerdict.MISMATCH] == [
        ("cod", lie.round - 2)
    ]


def test_losses_come_from_the_evaluations_unless_the_driver_says_more(story: Story, contents: RunContents) -> None:
    report = build_report(contents, story.figures())
    assert report.untrained_loss == 5.581 and report.unigram_loss == 2.867
    assert report.held_out_loss == contents.evaluations[-1].loss
    said = msgspec.structs.replace(story.figures(), held_out_loss=1.5, untrained_loss=math.nan)
    assert build_report(contents, said).held_out_loss == 1.5
    assert build_report(contents, said).untrained_loss == 5.581


def test_time_computing_is_the_share_of_the_time_that_members_were_there(contents: RunContents) -> None:
    node = contents.lanes[0].node

    def lane(state: Lane, start: float, stop: float) -> LaneSegment:
        return LaneSegment(node=node, state=state, start_s=start, stop_s=stop)

    lanes = [
        lane(Lane.SYNCING, 0, 1),
        lane(Lane.COMPUTING, 1, 7),
        lane(Lane.SENDING, 7, 8),
        lane(Lane.GONE, 8, 100),
        lane(Lane.EXCLUDED, 100, 200),
    ]
    report = build_report(dataclasses.replace(contents, lanes=lanes), Figures())
    assert report.compute_fraction == 6 / 8
    assert next(one for one in report.nodes if one.node_id == node).compute_s == 6


def test_it_has_what_was_promised_and_survives_json(report: Report) -> None:
    tree = msgspec.json.decode(report_json(report))
    assert set(tree) >= PROMISED
    assert all(set(node) >= PROMISED_OF_A_NODE for node in tree["nodes"])
    assert tree["settings"]["rounds"]["lag"] == 1, "defaults are spelled out"
    assert report_from_json(report_json(report)) == report


def test_the_same_folder_gives_the_same_report(story: Story, report: Report, tmp_path: Path) -> None:
    again = dataclasses.replace(contents_of(Story(), tmp_path), folder=report.folder)
    assert build_report(again, story.figures()) == report


def test_a_job_that_has_not_begun_has_a_report_too(tmp_path: Path) -> None:
    story = Story(rounds=0, killed=None, late=None, liar=None)
    report = build_report(contents_of(story, tmp_path), Figures())
    assert (report.rounds, report.tokens_accepted, report.held_out_loss) == (0, 0, 5.581)
    assert "Shoal training report" in render_page(report)


def test_what_no_later_term_took_up_is_not_counted(tmp_path: Path) -> None:
    """A driver that lost its members commits round 8 alone; its successor goes on from round 7."""
    story = Story(rounds=9, killed=None, late=None, liar=None)
    commits = [(place, one) for place, (one, _) in enumerate(story.records) if one.kind == Commit.KIND]
    old = open_record(commits[8][1], Commit)
    heir = story.heir
    members = [one for one, _ in story.records if one.kind == "train.member"]
    grant = next(one for one, _ in story.records if one.kind == "train.grant")
    head = commits[7][1].record_id
    story.put(heir, Term(job=story.job.record_id, number=2, grant=grant.record_id, head=head, head_round=7))
    contribution = next(
        open_record(one, Contribution)
        for one, _ in story.records
        if one.kind == Contribution.KIND and open_record(one, Contribution).round == 8
    )
    given = story.put(story.keys[0], msgspec.structs.replace(contribution, term=2))
    accepted = Accepted(
        member=members[0].record_id,
        contribution=given,
        update=blob("u"),
        weight_ppm=1_000_000,
        samples=160,
        tokens=20480,
    )
    before = open_record(commits[7][1], Commit).tokens_total
    story.put(
        heir,
        msgspec.structs.replace(
            old, term=2, previous=head, accepted=(accepted,), excluded=(), tokens_total=before + 20480
        ),
    )
    report = build_report(contents_of(story, tmp_path), Figures())
    assert report.rounds == 9
    assert report.tokens_accepted == before + 20480 == sum(node.tokens for node in report.nodes)
    assert [term.number for term in report.terms] == [1, 2]


def test_a_contribution_that_its_member_did_not_sign_is_not_believed(tmp_path: Path) -> None:
    story = Story(rounds=2, killed=None, late=None, liar=None)
    thief = KeyPair.from_seed(bytes([99]) * 32)
    place, envelope = next((i, one) for i, (one, _) in enumerate(story.records) if one.kind == Contribution.KIND)
    forged = sign(thief, open_record(envelope, Contribution))
    commit_place, commit = next((i, one) for i, (one, _) in enumerate(story.records) if one.kind == Commit.KIND)
    body = open_record(commit, Commit)
    accepted = tuple(
        msgspec.structs.replace(one, contribution=forged.record_id) if one.contribution == envelope.record_id else one
        for one in body.accepted
    )
    story.records[place] = (forged, False)
    story.records[commit_place] = (sign(story.owner, msgspec.structs.replace(body, accepted=accepted)), True)
    with pytest.raises(ReportImpossible, match="did not sign"):
        contents_of(story, tmp_path)


STRANGER = KeyPair.from_seed(bytes([98]) * 32)


def forgeries(story: Story) -> Mapping[str, list[Record]]:
    """What a stranger may add to a folder that passed through its hands, to shift work or blame."""
    newest = {one.kind: one for one, _ in story.records}
    grant, contribution = open_record(newest[Grant.KIND], Grant), open_record(newest[Contribution.KIND], Contribution)
    member = open_record(next(one for one, _ in story.records if one.record_id == contribution.member), Member)
    commit = open_record(newest[Commit.KIND], Commit)
    term = Term(job=story.job.record_id, number=2, grant=newest[Grant.KIND].record_id, head=bytes(32), head_round=0)
    later = msgspec.structs.replace(commit, term=7, tokens_total=commit.tokens_total + 10**9)
    again = msgspec.structs.replace(member, session=bytes([9]) * 16)
    own_grant = msgspec.structs.replace(grant, drivers=(STRANGER.node_id,), serial=2)
    return {
        "Contribution of round": [msgspec.structs.replace(contribution, term=2, loss_last=9.0)],
        "Member": [again, msgspec.structs.replace(contribution, member=record_id_of(again, STRANGER.node_id))],
        "Commit of round": [later],
        "Assignment of round": [msgspec.structs.replace(open_record(newest[Assignment.KIND], Assignment), term=2)],
        "Term 2": [term, msgspec.structs.replace(later, term=2)],
        "Grant": [
            own_grant,
            msgspec.structs.replace(term, grant=record_id_of(own_grant, STRANGER.node_id)),
            msgspec.structs.replace(later, term=2),
        ],
    }


FORGED = ("Contribution of round", "Member", "Commit of round", "Assignment of round", "Term 2", "Grant")


@pytest.mark.parametrize("what", FORGED)
def test_a_record_that_a_stranger_wrote_into_the_folder_is_named_and_blames_nobody(tmp_path: Path, what: str) -> None:
    story = Story(rounds=4, killed=None, late=None, liar=None)
    for record in forgeries(story)[what]:
        story.put(STRANGER, record, durable=True)
    said = rf"The {what}.*is forged: {STRANGER.node_id.hex()[:8]} signed it"
    with RunFolder.create(tmp_path, disk=MemoryDisk()) as folder:
        story.write(folder)
        with pytest.raises(ForgedRecord, match=said):
            read_record(folder)
        if what in ("Contribution of round", "Assignment of round"):  # no Commit names it, so nothing of it is counted
            assert read_contents(folder).tokens_total == story.total
        else:
            with pytest.raises(ForgedRecord, match=said):
                read_contents(folder)


def test_a_record_of_another_job_does_not_count(tmp_path: Path) -> None:
    story, other = (Story(rounds=1, killed=None, late=None, liar=None, seed=seed) for seed in (1, 2))
    story.records.append(other.records[-1])
    with RunFolder.create(tmp_path, disk=MemoryDisk()) as folder:
        story.write(folder)
        for read in (read_record, read_contents):
            with pytest.raises(ForgedRecord, match="Commit of round 0 in the folder.*belongs to another job"):
                read(folder)


def test_the_contribution_that_was_accepted_is_the_one_that_is_replayed(tmp_path: Path) -> None:
    """A member that answered twice is judged by what counts."""
    story = Story(rounds=2, killed=None, late=None, liar=None)
    place, envelope = next((i, one) for i, (one, _) in enumerate(story.records) if one.kind == Contribution.KIND)
    accepted = open_record(envelope, Contribution)
    other = sign(story.keys[0], msgspec.structs.replace(accepted, term=2))
    story.records.insert(place + 1, (other, False))
    with RunFolder.create(tmp_path, disk=MemoryDisk()) as folder:
        story.write(folder)
        chain = read_record(folder)
    assert other.record_id in chain.record.contributions
    assert find_contribution(chain.record, chain.node_of, 0, story.keys[0].node_id) == accepted


def test_work_that_is_counted_twice_is_not_believed(tmp_path: Path) -> None:
    story = Story(rounds=3, killed=None, late=None, liar=None)
    first = next(open_record(one, Commit) for one, _ in story.records if one.kind == Commit.KIND)
    last, _ = story.records.pop()
    again = msgspec.structs.replace(open_record(last, Commit), accepted=first.accepted)
    story.put(story.owner, again, durable=True)
    with pytest.raises(ReportImpossible, match="counted in two rounds"):
        contents_of(story, tmp_path)


@pytest.mark.parametrize(
    ("kind", "said"), [(Contribution.KIND, "does not hold"), (Commit.KIND, "is not in the folder")]
)
def test_a_record_that_is_missing_is_said_to_be(tmp_path: Path, kind: str, said: str) -> None:
    story = Story(rounds=3, killed=None, late=None, liar=None)
    place = next(i for i, (one, _) in enumerate(story.records) if one.kind == kind)
    del story.records[place]
    with pytest.raises(ReportImpossible, match=said):
        contents_of(story, tmp_path)


def test_metrics_of_rounds_that_the_records_lack_are_said_to_be(tmp_path: Path) -> None:
    story = Story(rounds=3, killed=None, late=None, liar=None)
    story.records.clear()
    with pytest.raises(ReportImpossible, match="Round 2 was committed, .* but the records end with round -1"):
        contents_of(story, tmp_path)


def test_a_run_is_finished_when_its_page_is_there_too(story: Story, tmp_path: Path) -> None:
    def fault(operation: str, name: str) -> None:
        if operation == "rename" and name == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = "report.html"
    with RunFolder.create(tmp_path, disk=FaultyDisk(DirectoryDisk(tmp_path), fault)) as folder:
        story.write(folder)
        with pytest.raises(FolderWriteFailed):
            write_report(folder, story.figures())
        assert not (tmp_path / "report.json").exists()
        full = ""
        report = write_report(folder, story.figures())
    page = (tmp_path / "report.html").read_bytes()
    assert report_from_json((tmp_path / "report.json").read_bytes()) == report
    (tmp_path / "report.html").unlink()
    with RunFolder.open(tmp_path, read_only=True) as folder:
        write_missing_page(folder, report)
        assert (tmp_path / "report.html").read_bytes() == page
        write_missing_page(folder, msgspec.structs.replace(report, rounds=1))
        assert (tmp_path / "report.html").read_bytes() == page


# --- thinning -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 20), min_size=1, max_size=300), st.integers(4, 60))
def test_a_thinned_curve_keeps_its_ends_and_its_extremes(losses: list[float], points_max: int) -> None:
    points = [CurvePoint(round=i, time_s=i, tokens=i, loss=loss) for i, loss in enumerate(losses)]
    thinned = thin_curve(points, points_max)
    assert len(thinned) <= points_max and (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert [point.round for point in thinned] == sorted({point.round for point in thinned})
    assert {min(losses), max(losses)} <= {point.loss for point in thinned}


@given(
    st.lists(st.tuples(st.sampled_from(list(Lane)), st.floats(0, 5), st.floats(0.01, 5)), min_size=1, max_size=80),
    st.integers(2, 40),
)
def test_a_thinned_lane_loses_and_adds_no_time(steps: list[tuple[Lane, float, float]], pieces_max: int) -> None:
    now, segments = 0.0, []
    for state, pause, length in steps:
        segments.append(LaneSegment(node="0" * 64, state=state, start_s=now + pause, stop_s=now + pause + length))
        now += pause + length
    pieces, thinned = thin_lane(segments, now, pieces_max)
    assert len(pieces) <= pieces_max and thinned == (len(segments) > pieces_max)
    spent: Counter[Lane] = Counter()
    for piece in pieces:
        assert sum(piece.shares.values()) <= 1 + 1e-9
        for state, share in piece.shares.items():
            spent[state] += share * (piece.stop_s - piece.start_s)
    for state in Lane:
        told = sum(one.stop_s - one.start_s for one in segments if one.state is state)
        assert math.isclose(spent[state], told, rel_tol=1e-6, abs_tol=1e-6)
    assert all(one.stop_s <= after.start_s + 1e-9 for one, after in itertools.pairwise(pieces))


@given(st.sets(st.tuples(st.integers(0, 30), st.sampled_from("ab"), st.sampled_from(["late", "lost"]))))
def test_exclusions_taken_together_are_the_same_exclusions(told: set[tuple[int, str, str]]) -> None:
    exclusions = [ExclusionReport(round=number, node=node, name=node, reason=why) for number, node, why in told]
    groups = group_exclusions(exclusions)
    again = [(number, node, why) for first, last, node, _, why in groups for number in range(first, last + 1)]
    assert sorted(again) == sorted(told)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 12))
def test_ticks_are_few_even_and_around_the_values(low: float, span: float, count: int) -> None:
    ticks = nice_ticks(low, low + span, count)
    assert 2 <= len(ticks) <= count + 3
    slack = 1e-6 * max(1.0, abs(low), abs(low + span))
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert max(steps) - min(steps) <= slack


@given(st.floats(0.001, 1e9))
def test_moments_on_the_time_axis_are_few(end: float) -> None:
    ticks = time_ticks(end, 8)
    assert ticks[0] == 0 and len(ticks) <= 9 and ticks[-1] <= end * (1 + 1e-6)


# --- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what matters."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_shows_what_the_report_says(report: Report) -> None:
    text = Page(render_page(report)).text
    for node in report.nodes:
        assert node.name in text and node.node_id[:8] in text and node.reason in text
    for one in report.exclusions:
        assert one.reason in text
    assert f"{report.held_out_loss:.3f}" in text and "0.75 of the unigram" in text
    assert "mismatch" in text and "8 match, 1 mismatch" in text
    assert "Of 30 contributions chosen to be replayed, 9 were; the driver was too slow for the rest." in text
    lie = next(audit for audit in report.audits if audit.verdict is AuditVerdict.MISMATCH)
    assert f"--round {lie.round} --node {lie.name}" in text
    assert report.completion is not None and " ".join(report.completion.text.split()) in text


def test_a_paid_job_has_its_cost_among_the_first_figures_and_a_bill_whose_points_stand_beneath_one_another(
    report: Report,
) -> None:
    assert "Cost" not in Page(render_page(report)).text
    lines = tuple(
        BillLine(name=node.name, node_id=node.node_id, paid=paid, withheld=0, reason="worked")
        for node, paid in zip(report.nodes, (1_250_000, 40_001), strict=False)
    )
    bill = Bill(quoted=3_000_000, charged=1_290_001, refunded=1_709_999, currency="USD", nodes=lines)
    text = Page(render_page(msgspec.structs.replace(report, bill=bill))).text
    assert "Cost 1.290001 USD of 3.00 set aside" in text
    assert f"{lines[0].node_id[:8]} 1.250000 — worked" in text and f"{lines[1].node_id[:8]} 0.040001 — worked" in text


def test_it_is_said_when_all_that_was_chosen_was_replayed() -> None:
    assert AuditCount(chosen=1, replayed=1).sentence == "Every contribution that was chosen to be replayed was (1)."
    assert AuditCount(chosen=2, replayed=1).sentence == "Of 2 contributions chosen to be replayed, 1 were."


def test_the_page_needs_nothing_from_elsewhere(report: Report) -> None:
    html = render_page(report)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    assert not any({"src", "href", "onclick", "onload"} & set(attributes) for _, attributes in page.attributes)
    policy = next(
        content
        for tag, one in page.attributes
        if tag == "meta" and (content := one.get("content")) and "default-src" in content
    )
    code = next(script for script in page.scripts if "addEventListener" in script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_names_and_sentences_of_strangers_stay_text(story: Story, contents: RunContents) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    figures = msgspec.structs.replace(
        story.figures(),
        nodes=tuple(msgspec.structs.replace(node, name=evil, reason=evil) for node in story.figures().nodes),
        goal=Goal(reached=False, sentence=evil),
    )
    events = [msgspec.structs.replace(event, sentence=evil) for event in contents.events]
    audits = [msgspec.structs.replace(line, sentence=evil) for line in contents.audits]
    work = [dataclasses.replace(done, reason=evil) for done in contents.work]
    told = dataclasses.replace(contents, events=events, audits=audits, work=work, folder=f"runs/{evil}")
    page = Page(render_page(build_report(told, figures)))
    assert Counter(tag for tag, _ in page.attributes)["script"] == 2, "the page's own script and its data"
    assert not any(tag == "img" for tag, _ in page.attributes)
    assert evil in page.text


def test_every_drawing_has_words(report: Report) -> None:
    page = Page(render_page(report))
    described = [one for tag, one in page.attributes if one.get("role") == "img"]
    assert len(described) == 1 + len(report.lanes)
    assert all(one.get("aria-label") for one in described)
    assert any("died after" in (one.get("aria-label") or "") for one in described)
    states = {one.get("class") for tag, one in page.attributes if tag == "rect"}
    assert {"computing", "sending", "waiting", "syncing", "gone", "excluded"} <= states


def test_a_long_job_of_many_nodes_makes_a_page_of_bounded_size(story: Story, contents: RunContents) -> None:
    lanes, nodes = [], []
    for place in range(200):
        node = blake3_hash(b"%d" % place).hex()
        nodes.append(NodeFigures(node_id=node, name=f"node-{place}"))
        for number in range(600):
            state = Lane.COMPUTING if number % 2 else Lane.SENDING
            lanes.append(LaneSegment(node=node, state=state, start_s=number, stop_s=number + 1))
    metrics = [
        msgspec.structs.replace(contents.metrics[i % 120], round=i, time_s=i, tokens_total=i) for i in range(20_000)
    ]
    work = [dataclasses.replace(contents.work[-1], round=i, accepted=False, reason=f"late {i}") for i in range(9_000)]
    told = dataclasses.replace(contents, lanes=lanes, metrics=metrics, work=work)
    report = build_report(told, msgspec.structs.replace(story.figures(), nodes=tuple(nodes)))
    assert sum(len(lane.pieces) for lane in report.lanes) <= PIECES_MAX
    assert report.exclusions_count == 9_000 > len(report.exclusions)
    html = render_page(report)
    assert len(html) < 5_000_000
    assert "more in report.json" in html


def test_marks_of_a_node_stand_on_its_lane(report: Report) -> None:
    html = render_page(report)
    for kind in (EventKind.JOINED, EventKind.DIED, EventKind.EXCLUDED):
        assert f'class="mark {kind.value}"' in html
