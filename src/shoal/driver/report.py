"""The report of a training job: a true account of who did what, made from the records.

Work is counted from records (`account`); losses, times, lanes and audits come from the run folder's lines; names,
links and the goal from `Figures`, which the driver rewrites as it goes. `build_report` is a pure function of these, so
the same folder gives the same report, also after a crash. `report.json` is the Report; `report.html` (`report_page`)
shows nothing that is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TypeAlias

import msgspec

from shoal.driver.account import ReportImpossible, RunContents
from shoal.driver.lines import AuditLine, AuditVerdict, Event, EventKind, Lane, LaneSegment, NodeHex
from shoal.purse.bills import Bill, bill

CURVE_POINTS_MAX = 500
LANES_MAX = 64
LANE_PIECES_MAX = 144
"""A lane of more segments is given as so many slices of time, each with its shares."""
PIECES_MAX = 6_000
"""In all lanes together: of many lanes, each has fewer."""
LISTED_MAX = 2_000
"""Exclusions, audits and events that are listed one by one; all are counted."""

# --- what the driver knows beside the records -----------------------------------------------------------------------


class NodeStatus(StrEnum):
    """How a node's part in the job ended."""

    WORKING = "working"
    FINISHED = "finished"
    LEFT = "left"
    RECLAIMED = "reclaimed"
    """Its owner took it back, with the notice that was agreed."""
    DIED = "died"
    EXCLUDED = "excluded"
    REFUSED = "refused"


class NodeFigures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the driver knows about a node. Bytes are counted since the job's first start."""

    node_id: NodeHex
    name: str = ""
    status: NodeStatus = NodeStatus.WORKING
    reason: str = ""
    speed: float = 0.0
    """Measured samples per second."""
    bytes_sent: int = 0
    bytes_received: int = 0


class RoundChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Why a round is as long as it is, and the links that decided it."""

    inner_steps: int = 0
    reason: str = ""
    round_trip_ms: float | None = None
    rate_bps: float | None = None
    byte_budget: float | None = None
    """Bytes per second that a member may send on average."""


class ReplayCost(msgspec.Struct, frozen=True, kw_only=True):
    """What it cost to keep rounds replayable."""

    disk_bytes: int = 0
    """Private state kept by members, the most at any time."""
    opened_bytes: int = 0
    """Private state sent to whoever replayed."""


class AuditCount(msgspec.Struct, frozen=True, kw_only=True):
    """How far the driver came with the replays that it meant to make. Counted since the job's first start."""

    chosen: int = 0
    replayed: int = 0
    """Of those chosen, whatever the verdict."""
    dropped: int = 0
    """Of those chosen: the driver was too slow for them. What is missing to `chosen` still waits."""

    @property
    def sentence(self) -> str:
        if self.replayed == self.chosen:
            return f"Every contribution that was chosen to be replayed was ({self.chosen})."
        if not self.dropped:
            return f"Of {self.chosen} contributions chosen to be replayed, {self.replayed} were."
        rest = "the rest" if self.replayed + self.dropped == self.chosen else f"{self.dropped}"
        return (
            f"Of {self.chosen} contributions chosen to be replayed, {self.replayed} were; the driver was too slow for "
            f"{rest}."
        )


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    text: str
    """What the model wrote after the prompt."""


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    reached: bool
    sentence: str


class Figures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`figures.json`: what is in no record and no line. A driver rewrites it every few rounds and at the end."""

    wall_s: float = 0.0
    held_out_loss: float | None = None
    """Nats per token; the last Evaluation where none is given here."""
    untrained_loss: float | None = None
    """The Evaluation of round -1 where none is given here."""
    unigram_loss: float | None = None
    nodes: tuple[NodeFigures, ...] = ()
    round_choice: RoundChoice = RoundChoice()
    replay_cost: ReplayCost = ReplayCost()
    audit_count: AuditCount = AuditCount()
    completion: Completion | None = None
    goal: Goal | None = None


# --- the report -----------------------------------------------------------------------------------------------------


Setting: TypeAlias = str | int | float


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    round: int
    time_s: float
    tokens: int
    loss: float


class LanePiece(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of time and how a node spent it: shares of the stretch, at most 1 together."""

    start_s: float
    stop_s: float
    shares: dict[Lane, float]


class LaneReport(msgspec.Struct, frozen=True, kw_only=True):
    node_id: str
    name: str
    pieces: tuple[LanePiece, ...]
    totals_s: dict[Lane, float]
    thinned: bool
    """Whether pieces are slices of time instead of the segments themselves."""


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """An event in the life of the job."""

    time_s: float
    kind: EventKind
    node_id: str
    name: str
    sentence: str


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    node_id: str
    name: str
    tokens: int
    bytes_sent: int
    bytes_received: int
    accepted_share: float
    status: NodeStatus
    reason: str
    speed: float
    rounds_accepted: int
    rounds_excluded: int
    compute_s: float


class ExclusionReport(msgspec.Struct, frozen=True, kw_only=True):
    round: int
    node: str
    name: str
    reason: str


class AuditReport(msgspec.Struct, frozen=True, kw_only=True):
    round: int
    node: str
    name: str
    verdict: AuditVerdict
    difference: float | None
    threshold: float | None
    sentence: str


class TermReport(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    driver: str
    head_round: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`. Times are seconds since the job's start, losses nats per token."""

    job: str
    job_id: str
    folder: str
    started_ms: int
    wall_s: float
    held_out_loss: float | None
    untrained_loss: float | None
    unigram_loss: float | None
    tokens_accepted: int
    token_budget: int
    rounds: int
    """Committed rounds."""
    tokens_per_s: float
    compute_fraction: float
    """Share of the time in which members were there that they spent computing."""
    bytes_sent: int
    bytes_received: int
    model_parameters: int
    nodes: tuple[NodeReport, ...]
    exclusions: tuple[ExclusionReport, ...]
    exclusions_count: int
    audits: tuple[AuditReport, ...]
    audits_count: int
    audit_count: AuditCount = AuditCount()
    """Of those that were drawn while the job ran; `audits` has those made at its end as well."""
    round_choice: RoundChoice
    replay_cost: ReplayCost
    settings: dict[str, dict[str, Setting]]
    """What the job was trained with, by subject, defaults spelled out."""
    terms: tuple[TermReport, ...]
    completion: Completion | None
    goal: Goal | None
    bill: Bill | None = None
    """None where all nodes worked for nothing."""
    curve: tuple[CurvePoint, ...]
    """Training loss."""
    held_out_curve: tuple[CurvePoint, ...]
    lanes: tuple[LaneReport, ...]
    events: tuple[Mark, ...]
    events_count: int


def report_json(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def report_from_json(data: bytes) -> Report:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(data, type=Report)


# --- building -------------------------------------------------------------------------------------------------------


def build_report(contents: RunContents, figures: Figures) -> Report:
    """The account of a job, finished or not. Pure: the same contents and figures give the same report."""
    job = contents.job
    tokens, accepted, excluded = _count_work(contents)
    total = sum(tokens.values())
    wall_s = figures.wall_s or max((line.time_s for line in contents.metrics), default=0.0)
    names = _names(contents, figures)
    lanes = _lanes(contents.lanes, names, wall_s)
    computing = {lane.node_id: lane.totals_s.get(Lane.COMPUTING, 0.0) for lane in lanes}
    known = {node.node_id: node for node in figures.nodes}
    order = {node: place for place, node in enumerate(names)}
    nodes = tuple(
        NodeReport(
            node_id=node,
            name=names[node],
            tokens=tokens.get(node, 0),
            bytes_sent=known[node].bytes_sent if node in known else 0,
            bytes_received=known[node].bytes_received if node in known else 0,
            accepted_share=tokens.get(node, 0) / total if total else 0.0,
            status=known[node].status if node in known else NodeStatus.WORKING,
            reason=known[node].reason if node in known else "",
            speed=known[node].speed if node in known else 0.0,
            rounds_accepted=accepted.get(node, 0),
            rounds_excluded=excluded.get(node, 0),
            compute_s=computing.get(node, 0.0),
        )
        for node in sorted(names, key=lambda node: order[node])
    )
    exclusions = [
        ExclusionReport(round=done.round, node=node, name=names[node], reason=done.reason)
        for done in contents.work
        if not done.accepted
        for node in _nodes_of(contents, done.member)
    ]
    curve = [
        CurvePoint(round=line.round, time_s=line.time_s, tokens=line.tokens_total, loss=line.loss)
        for line in contents.metrics
        if line.loss is not None
    ]
    held_out = [
        CurvePoint(round=line.round, time_s=line.time_s, tokens=line.tokens_total, loss=line.loss)
        for line in sorted(contents.evaluations, key=lambda line: line.round)
        if line.loss is not None
    ]
    return Report(
        job=job.name,
        job_id=contents.job_id.hex(),
        folder=contents.folder,
        started_ms=job.created_ms,
        wall_s=wall_s,
        held_out_loss=_finite(figures.held_out_loss, held_out[-1].loss if held_out else None),
        untrained_loss=_finite(
            figures.untrained_loss, held_out[0].loss if held_out and held_out[0].round == -1 else None
        ),
        unigram_loss=_finite(figures.unigram_loss, None),
        tokens_accepted=contents.tokens_total,
        token_budget=job.token_budget,
        rounds=contents.rounds,
        tokens_per_s=contents.tokens_total / wall_s if wall_s else 0.0,
        compute_fraction=_compute_fraction(contents.lanes),
        bytes_sent=sum(node.bytes_sent for node in nodes),
        bytes_received=sum(node.bytes_received for node in nodes),
        model_parameters=job.model.parameters,
        nodes=nodes,
        exclusions=tuple(exclusions[:LISTED_MAX]),
        exclusions_count=len(exclusions),
        audits=tuple(
            AuditReport(
                round=line.round,
                node=line.node,
                name=names.get(line.node, line.node[:8]),
                verdict=line.verdict,
                difference=line.difference,
                threshold=line.threshold,
                sentence=line.sentence,
            )
            for line in _most_telling(contents.audits)
        ),
        audits_count=len(contents.audits),
        audit_count=figures.audit_count,
        round_choice=figures.round_choice,
        replay_cost=figures.replay_cost,
        settings={
            "training": {
                "batch_samples": job.batch_samples,
                "sequence_tokens": job.data.sequence_tokens,
                "dtype": job.dtype,
                "seed": job.seed,
            },
            "optimizer": msgspec.structs.asdict(job.optimizer),
            "rounds": msgspec.structs.asdict(job.rounds),
            "replay": msgspec.structs.asdict(job.replay),
        },
        terms=tuple(
            TermReport(number=term.number, driver=driver.hex(), head_round=term.head_round)
            for driver, term in contents.terms[-LISTED_MAX:]
        ),
        completion=figures.completion,
        goal=figures.goal,
        bill=None if contents.payments is None else bill(contents.payments),
        curve=tuple(thin_curve(curve, CURVE_POINTS_MAX)),
        held_out_curve=tuple(thin_curve(held_out, CURVE_POINTS_MAX)),
        lanes=lanes[:LANES_MAX],
        events=tuple(
            Mark(
                time_s=event.time_s,
                kind=event.kind,
                node_id=event.node,
                name=names.get(event.node, ""),
                sentence=event.sentence,
            )
            for event in _most_telling_events(contents.events)
        ),
        events_count=len(contents.events),
    )


def thin_curve(points: Sequence[CurvePoint], points_max: int) -> list[CurvePoint]:
    """At most `points_max` (4 or more) points: the first, the last, and from each of equally long stretches between
    them the lowest and the highest, so that spikes stay."""
    if len(points) <= points_max:
        return list(points)
    stretches = (points_max - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        if stretch:
            ends = {min(stretch, key=_loss_of), max(stretch, key=_loss_of)}
            kept += sorted(ends, key=lambda point: (point.time_s, point.round))
    return [*kept, points[-1]]


def thin_lane(segments: Sequence[LaneSegment], stop_s: float, pieces_max: int) -> tuple[list[LanePiece], bool]:
    """One node's segments as at most `pieces_max` pieces, and whether they had to be thinned. Thinned, the time from 0
    to `stop_s` is cut into as many slices, and a piece says which share of its slice each state took: no time is lost
    or added."""
    ordered = sorted(
        (segment for segment in segments if segment.stop_s > segment.start_s), key=lambda segment: segment.start_s
    )
    if len(ordered) <= pieces_max:
        exact = [LanePiece(start_s=one.start_s, stop_s=one.stop_s, shares={one.state: 1.0}) for one in ordered]
        return exact, False
    width = max(stop_s, max(segment.stop_s for segment in ordered)) / pieces_max
    spent: list[dict[Lane, float]] = [{} for _ in range(pieces_max)]
    for segment in ordered:
        first, last = (min(pieces_max - 1, int(moment / width)) for moment in (segment.start_s, segment.stop_s))
        for number in range(first, last + 1):
            inside = min(segment.stop_s, (number + 1) * width) - max(segment.start_s, number * width)
            if inside > 0:
                spent[number][segment.state] = spent[number].get(segment.state, 0.0) + inside
    pieces = []
    for number, states in enumerate(spent):
        if states:
            whole = max(width, sum(states.values()))
            shares = {state: states[state] / whole for state in Lane if state in states}
            pieces.append(LanePiece(start_s=number * width, stop_s=(number + 1) * width, shares=shares))
    return pieces, True


def _count_work(contents: RunContents) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """By node: accepted tokens, rounds accepted, rounds excluded."""
    tokens: dict[str, int] = {}
    accepted: dict[str, int] = {}
    excluded: dict[str, int] = {}
    for done in contents.work:
        for worker, count in done.tokens_by_node.items():
            tokens[worker.hex()] = tokens.get(worker.hex(), 0) + count
        rounds = accepted if done.accepted else excluded
        for node in _nodes_of(contents, done.member):
            rounds[node] = rounds.get(node, 0) + 1
    return tokens, accepted, excluded


def _nodes_of(contents: RunContents, member: bytes) -> list[str]:
    record = contents.members.get(member)
    if record is None:
        raise ReportImpossible(
            f"A Commit names member {member.hex()[:8]}, of which the folder holds no record; restore it from a copy."
        )
    return [part.node.hex() for part in record.nodes]


def _names(contents: RunContents, figures: Figures) -> dict[str, str]:
    """Every node that had to do with the job, in the order in which it came."""
    names: dict[str, str] = {}
    for member in contents.members.values():
        for place, part in enumerate(member.nodes):
            names[part.node.hex()] = member.name if len(member.nodes) == 1 else f"{member.name}.{place}"
    for node in figures.nodes:
        names[node.node_id] = node.name or names.get(node.node_id, node.node_id[:8])
    return names


def _lanes(segments: Sequence[LaneSegment], names: Mapping[str, str], wall_s: float) -> tuple[LaneReport, ...]:
    by_node: dict[str, list[LaneSegment]] = {node: [] for node in names}
    for segment in segments:
        by_node.setdefault(segment.node, []).append(segment)
    filled = {node: own for node, own in by_node.items() if own}
    pieces_max = min(LANE_PIECES_MAX, PIECES_MAX // max(1, min(LANES_MAX, len(filled))))
    lanes = []
    for node, own in filled.items():
        pieces, thinned = thin_lane(own, wall_s, pieces_max)
        totals: dict[Lane, float] = {}
        for segment in own:
            totals[segment.state] = totals.get(segment.state, 0.0) + max(0.0, segment.stop_s - segment.start_s)
        lanes.append(
            LaneReport(
                node_id=node,
                name=names.get(node, node[:8]),
                pieces=tuple(pieces),
                totals_s={state: totals[state] for state in Lane if state in totals},
                thinned=thinned,
            )
        )
    return tuple(lanes)


def _compute_fraction(segments: Iterable[LaneSegment]) -> float:
    computing = present = 0.0
    for segment in segments:
        if segment.state in (Lane.GONE, Lane.EXCLUDED):
            continue
        spent = max(0.0, segment.stop_s - segment.start_s)
        present += spent
        computing += spent if segment.state is Lane.COMPUTING else 0.0
    return computing / present if present else 0.0


def _most_telling(audits: Sequence[AuditLine]) -> list[AuditLine]:
    """All audits by round; when there are too many to list, matches are left out first."""
    chosen = sorted(audits, key=lambda line: line.verdict is AuditVerdict.MATCH)[:LISTED_MAX]
    return sorted(chosen, key=lambda line: (line.round, line.time_s))


def _most_telling_events(events: Sequence[Event]) -> list[Event]:
    """All events by time; when there are too many to list, mere notes are left out first."""
    chosen = sorted(events, key=lambda event: (event.kind is EventKind.NOTE, event.time_s))[:LISTED_MAX]
    return sorted(chosen, key=lambda event: event.time_s)


def _loss_of(point: CurvePoint) -> float:
    return point.loss


def _finite(first: float | None, second: float | None) -> float | None:
    return next((value for value in (first, second) if value is not None and math.isfinite(value)), None)
