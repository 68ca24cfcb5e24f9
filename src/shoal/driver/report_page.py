"""`report.html`: the Report as one page that needs no network.

Names and sentences come from strangers: everything that is not written here goes through `html.escape`, and the page's
content policy lets no other script run than its own, named by hash, and nothing be fetched. Drawings are SVG in
percent of the width, so that they fit any screen while their text and strokes keep their size; each has its figures in
words beside it, and states differ by pattern as well as by colour.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape

import msgspec

from shoal.driver.lines import AuditVerdict, EventKind, Lane
from shoal.driver.report import CurvePoint, ExclusionReport, LaneReport, Mark, NodeReport, NodeStatus, Report
from shoal.driver.report_style import SCRIPT, STYLE
from shoal.purse.bills import Bill
from shoal.quantities import format_bytes, format_count, format_duration_s, format_rate_bps
from shoal.quantities.money import format_money, places_for

BARS_MAX = 32
ROWS_MAX = 300
"""Rows of a table; the rest is counted, and stands in report.json."""
OVERLAP = 0.0004
"""Pieces of a lane reach so much of the width into the next, lest rounding leave hairlines between them."""

_MARKED = (EventKind.JOINED, EventKind.LEFT, EventKind.DIED, EventKind.EXCLUDED)
_MARKS = {
    EventKind.JOINED: ("M0 -6 L6 5 L-6 5 Z", "joined"),
    EventKind.LEFT: ("M-6 0 L5 -6 L5 6 Z", "left"),
    EventKind.DIED: ("M-5.5 -3 L-3 -5.5 L0 -2.5 L3 -5.5 L5.5 -3 L2.5 0 L5.5 3 L3 5.5 L0 2.5 L-3 5.5 L-5.5 3 L-2.5 0 Z",
                     "died"),
    EventKind.EXCLUDED: ("M0 -6.5 L6.5 0 L0 6.5 L-6.5 0 Z", "excluded"),
}  # fmt: skip
_TICK = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M2.5 8.5 L6.5 12.5 L13.5 4" fill="none" ' \
        'stroke="currentColor" stroke-width="2.2" stroke-linecap="round" stroke-linejoin="round"/></svg>'  # fmt: skip
_CROSS = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3.5 3.5 L12.5 12.5 M12.5 3.5 L3.5 12.5" fill="none" ' \
         'stroke="currentColor" stroke-width="2.2" stroke-linecap="round"/></svg>'  # fmt: skip
_DASH = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 8 L13 8" fill="none" stroke="currentColor" ' \
        'stroke-width="2.2" stroke-linecap="round"/></svg>'  # fmt: skip
_STATUS = {
    NodeStatus.WORKING: ("plain", _DASH),
    NodeStatus.FINISHED: ("good", _TICK),
    NodeStatus.LEFT: ("plain", _DASH),
    NodeStatus.RECLAIMED: ("plain", _DASH),
    NodeStatus.DIED: ("bad", _CROSS),
    NodeStatus.EXCLUDED: ("bad", _CROSS),
    NodeStatus.REFUSED: ("plain", _DASH),
}
_VERDICT = {
    AuditVerdict.MATCH: ("good", _TICK),
    AuditVerdict.MISMATCH: ("bad", _CROSS),
    AuditVerdict.NOT_REPLAYABLE: ("plain", _DASH),
}
_STROKE = 'stroke-width="3" fill="none"'
_PATTERNS = f"""<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>
<pattern id="hatch-sending" width="7" height="7" patternUnits="userSpaceOnUse"><rect width="7" height="7"
 style="fill:var(--sending)"/><path d="M-1 8 L8 -1" style="stroke:var(--hatch)" stroke-opacity=".55"
 stroke-width="1.6"/></pattern>
<pattern id="hatch-syncing" width="6" height="6" patternUnits="userSpaceOnUse"><rect width="6" height="6"
 style="fill:var(--syncing)"/><path d="M0 3 H6" style="stroke:var(--hatch)" stroke-opacity=".6"
 stroke-width="1.5"/></pattern>
<pattern id="hatch-excluded" width="8" height="8" patternUnits="userSpaceOnUse"><rect width="8" height="8"
 style="fill:var(--excluded)" opacity=".35"/><path d="M-1 9 L9 -1 M-1 -1 L9 9" style="stroke:var(--excluded)"
 stroke-width="1.4"/></pattern>
<pattern id="hatch-gone" width="6" height="40" patternUnits="userSpaceOnUse"><path d="M0 14 H3.5"
 style="stroke:var(--gone)" {_STROKE}/></pattern>
<pattern id="hatch-received" width="5" height="5" patternUnits="userSpaceOnUse"><rect width="5" height="5"
 style="fill:var(--syncing)" opacity=".45"/><path d="M-1 6 L6 -1" style="stroke:var(--syncing)"
 stroke-width="1.6"/></pattern>
</defs></svg>"""


def render_page(report: Report) -> str:
    """The page, complete."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    body = "\n".join(
        part
        for part in (
            _header(report),
            _loss(report),
            _lanes(report),
            _bars(report.nodes),
            _nodes(report),
            _bill(report.bill),
            _exclusions(report),
            _audits(report),
            _completion(report),
            _events(report),
            _rounds(report),
            _replay(report),
        )
        if part
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(report.job)} · Shoal training report</title>
<style>{STYLE}</style>
</head>
<body>
{_PATTERNS}
<main>
{body}
<footer>Counted from the signed records of job <span class="mono wide">{escape(report.job_id)}</span>. The same
figures are in report.json beside this page.</footer>
</main>
<div id="tip" role="presentation"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


# --- numbers in words -----------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.995 or share == 0 or share >= 0.1 else f"{share:.1%}"


def _loss_text(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.3f}"


def _when(time_s: float) -> str:
    return "at the start" if time_s <= 0 else f"after {format_duration_s(time_s)}"


def _at(share: float) -> str:
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


def _few(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


# --- sections -------------------------------------------------------------------------------------------------------


def _section(name: str, title: str, inside: str, lead: str = "") -> str:
    return f"""<section aria-labelledby="{name}">
<h2 id="{name}">{title}</h2>
{f'<p class="soft">{lead}</p>' if lead else ""}{inside}
</section>"""


def _header(report: Report) -> str:
    started = datetime.fromtimestamp(report.started_ms / 1000, UTC)
    verdict = ""
    if report.goal is not None:
        tone, icon, word = ("good", _TICK, "Goal reached") if report.goal.reached else ("bad", _CROSS, "Goal missed")
        verdict = f"""<div class="verdict {tone}"><span class="status {tone}">{icon}</span>
<div><strong>{word}</strong>{escape(report.goal.sentence)}</div></div>"""
    against = [
        f"{report.held_out_loss / baseline:.2f} of {name} ({baseline:.3f})"
        for name, baseline in (("unigram", report.unigram_loss), ("untrained", report.untrained_loss))
        if baseline and report.held_out_loss is not None
    ]
    per_token = report.bytes_sent / report.tokens_accepted if report.tokens_accepted else 0.0
    per_token_text = f"{per_token:,.0f}" if per_token >= 10 else f"{per_token:.2f}"
    rate = f"{_few(report.rounds, 'round')}, {format_count(report.tokens_per_s)} tokens/s"
    tiles = [
        ("Held-out loss", _loss_text(report.held_out_loss), "; ".join(against) or "nats per token"),
        ("Tokens accepted", format_count(report.tokens_accepted), f"budget {format_count(report.token_budget)}"),
        ("Time", format_duration_s(report.wall_s), rate),
        ("Time computing", _percent(report.compute_fraction), "of all members' time"),
        ("Bytes sent", format_bytes(report.bytes_sent), f"{per_token_text} bytes per accepted token"),
    ]
    if report.bill is not None:
        of = f"{report.bill.currency} of {format_money(report.bill.quoted)} set aside"
        tiles.insert(2, ("Cost", format_money(report.bill.charged), of))
    shown = "".join(
        f'<div><dt>{name}</dt><dd class="figure">{escape(value)}</dd><dd class="soft small">{escape(note)}</dd></div>'
        for name, value, note in tiles
    )
    return f"""<header>
<p class="over">Shoal training report</p>
<h1>{escape(report.job)}</h1>
<p class="soft">Started {started:%d %B %Y, %H:%M} UTC · {_few(len(report.nodes), "node")} ·
{format_count(report.model_parameters)} parameters · job <span class="mono">{escape(report.job_id[:8])}</span></p>
{verdict}
<dl class="tiles">{shown}</dl>
</header>"""


def _loss(report: Report) -> str:
    points = [*report.curve, *report.held_out_curve]
    if not points:
        return ""
    baselines = [
        (name, loss)
        for name, loss in (("unigram", report.unigram_loss), ("untrained", report.untrained_loss))
        if loss is not None
    ]
    losses = [point.loss for point in points] + [loss for _, loss in baselines]
    y_ticks = nice_ticks(min(losses), max(losses), 6)
    low, high = min(y_ticks[0], min(losses)), max(y_ticks[-1], max(losses))
    widest = max(point.tokens for point in points) or 1
    x_ticks = [tick for tick in nice_ticks(0, widest, 6) if tick <= widest]

    def across(tokens: float) -> float:
        return tokens / widest

    def down(loss: float) -> float:
        return (high - loss) / ((high - low) or 1.0)

    grid = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{_at(down(tick))}" y2="{_at(down(tick))}"/>' for tick in y_ticks
    )
    levels = "".join(
        f'<line class="{name}" x1="0" x2="100%" y1="{_at(down(loss))}" y2="{_at(down(loss))}"/>'
        for name, loss in baselines
    )
    dots = "".join(
        f'<circle class="dot" r="4" cx="{_at(across(point.tokens))}" cy="{_at(down(point.loss))}"/>'
        for point in report.held_out_curve
    )
    labels = "".join(
        f'<span class="y" style="top:{_at(down(tick))}">{tick:g}</span>' for tick in y_ticks
    ) + "".join(
        f'<span class="x{" minor" if place % 2 else ""}" style="left:{_at(across(tick))}">{format_count(tick)}</span>'
        for place, tick in enumerate(x_ticks)
    ) + "".join(
        f'<span class="note" style="top:{_at(down(loss))}">{name} {loss:.3f}</span>' for name, loss in baselines
    )  # fmt: skip
    hover = [[round(100 * across(point.tokens), 3), _point_text(point, "training loss")] for point in report.curve]
    hover += [
        [round(100 * across(point.tokens), 3), _point_text(point, "held-out loss")] for point in report.held_out_curve
    ]
    data = msgspec.json.encode(sorted(hover)).decode().replace("<", "\\u003c")
    first, last = (report.curve[0], report.curve[-1]) if report.curve else (points[0], points[-1])
    words = f"Training loss went from {first.loss:.3f} to {last.loss:.3f} over {format_count(widest)} tokens."
    legend = _legend(
        (('<path d="M0 6 H22" class="curve training"/>', "training"),) * bool(report.curve)
        + (('<circle class="dot" cx="11" cy="6" r="4"/>', "held-out"),) * bool(report.held_out_curve)
        + tuple((f'<path d="M0 6 H22" class="{name}"/>', f"{name} baseline") for name, _ in baselines)
    )
    return _section(
        "loss",
        "Loss",
        f"""<figure><div class="plot" role="img" aria-label="{escape(words)}"><svg aria-hidden="true">
{grid}<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>{levels}
<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none">
{_polyline(report.curve, "training", across, down)}{_polyline(report.held_out_curve, "heldout", across, down)}</svg>
{dots}<line id="cursor" y1="0" y2="100%"/></svg>
{labels}<span class="unit">accepted tokens</span></div>
{legend}</figure>
<script type="application/json" id="curve-points">{data}</script>""",
        "Nats per token. Lower is better; the unigram baseline knows only how frequent each token is.",
    )


def _point_text(point: CurvePoint, what: str) -> str:
    round_name = f"round {point.round}" if point.round >= 0 else "untrained"
    return f"{what} {point.loss:.3f}\n{round_name}, {format_count(point.tokens)} tokens, {_when(point.time_s)}"


def _polyline(
    points: Sequence[CurvePoint], name: str, across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{1000 * across(point.tokens):.1f},{1000 * down(point.loss):.1f}" for point in points)
    return f'<polyline class="curve {name}" points="{path}"/>'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><svg width="22" height="12" aria-hidden="true">{drawing}</svg>{escape(word)}</li>'
        for drawing, word in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _lanes(report: Report) -> str:
    if not report.lanes:
        return ""
    end = max([report.wall_s, *(lane.pieces[-1].stop_s for lane in report.lanes if lane.pieces)]) or 1.0
    marks: dict[str, list[Mark]] = {}
    for mark in report.events:
        if mark.kind in _MARKED and mark.node_id:
            marks.setdefault(mark.node_id, []).append(mark)
    rows = "".join(_lane(lane, marks.get(lane.node_id, []), end) for lane in report.lanes)
    ticks = time_ticks(end, 8)
    times = "".join(
        f'<span class="{"minor" if place % 2 else "major"}" style="left:{_at(tick / end)}">{_clock(tick)}</span>'
        for place, tick in enumerate(ticks)
    )
    states = [state for state in Lane if any(state in lane.totals_s for lane in report.lanes)]
    kinds = [kind for kind in _MARKED if any(mark.kind is kind for several in marks.values() for mark in several)]
    legend = _legend(
        [
            ('<path class="goneline" d="M0 6 H22"/>', "gone")
            if state is Lane.GONE
            else (f'<rect class="{state.value}" width="22" height="12" rx="2"/>', state.value)
            for state in states
        ]
        + [
            (f'<path class="mark {kind.value}" d="{_MARKS[kind][0]}" transform="translate(11 6)"/>', _MARKS[kind][1])
            for kind in kinds
        ]
    )
    thinned = " Where a lane has more parts than fit, each slice shows how its time was shared out." * any(
        lane.thinned for lane in report.lanes
    )
    hidden = len(report.nodes) - len(report.lanes)
    more = f'<p class="soft small">{_few(hidden, "more node")} without a lane here.</p>' if hidden > 0 else ""
    return _section(
        "lanes",
        "Who did what, when",
        f"""<figure><div class="lanes">{rows}
<div class="times" aria-hidden="true">{times}</div></div>{legend}</figure>{more}""",
        f"Time goes from left to right; the share at the end is time spent computing.{thinned}",
    )


def _lane(lane: LaneReport, marks: Sequence[Mark], end: float) -> str:
    present = sum(spent for state, spent in lane.totals_s.items() if state not in (Lane.GONE, Lane.EXCLUDED))
    share = lane.totals_s.get(Lane.COMPUTING, 0.0) / present if present else 0.0
    rects = []
    for piece in lane.pieces:
        told = ", ".join(f"{state.value} {_percent(part)}" for state, part in piece.shares.items())
        if len(piece.shares) == 1 and not lane.thinned:
            told = next(iter(piece.shares)).value
        tip = f"{lane.name}: {told}\n{_clock(piece.start_s)} to {_clock(piece.stop_s)}"
        bottom = 1.0
        for state, part in piece.shares.items():
            bottom -= part
            height = 1.0 if Lane.GONE in piece.shares and len(piece.shares) == 1 else part
            rects.append(
                f'<rect class="{state.value}" x="{_at(piece.start_s / end)}" y="{_at(max(0.0, bottom))}" '
                f'width="{_at((piece.stop_s - piece.start_s) / end + OVERLAP)}" height="{_at(height)}" '
                f'data-tip="{escape(tip)}"/>'
            )
    drawn = "".join(
        f'<svg x="{_at(min(1.0, mark.time_s / end))}" y="50%" overflow="visible" data-tip="{escape(mark.sentence)}">'
        f'<line class="markline" y1="-14" y2="14"/>'
        f'<path class="mark {mark.kind.value}" d="{_MARKS[mark.kind][0]}" transform="translate(0 -14)"/></svg>'
        for mark in marks
    )
    spent = ", ".join(f"{state.value} {format_duration_s(seconds)}" for state, seconds in lane.totals_s.items())
    told = "".join(f"; {_MARKS[mark.kind][1]} {_when(mark.time_s)}" for mark in marks)
    return f"""<span class="name" title="{escape(lane.name)}">{escape(lane.name)}</span>
<span class="share">{_percent(share)}</span>
<div class="strip"><svg role="img" aria-label="{escape(f"{lane.name}: {spent}{told}")}">
<rect class="track" y="48%" width="100%" height="4%"/>{"".join(rects)}{drawn}</svg></div>
"""


def _bars(nodes: Sequence[NodeReport]) -> str:
    if not nodes:
        return ""
    shown = sorted(nodes, key=lambda node: -node.tokens)[:BARS_MAX] if len(nodes) > BARS_MAX else nodes
    most_tokens = max(node.tokens for node in nodes) or 1
    most_bytes = max(max(node.bytes_sent, node.bytes_received) for node in nodes) or 1
    rows = "".join(
        f"""<span class="name" title="{escape(node.name)}">{escape(node.name)}</span>
<div>{_bar("computing", node.tokens / most_tokens, format_count(node.tokens), "tokens")}</div>
<div>{_bar("sent", node.bytes_sent / most_bytes, format_bytes(node.bytes_sent), "sent", "thin")}
{_bar("received", node.bytes_received / most_bytes, format_bytes(node.bytes_received), "received", "thin")}</div>
"""
        for node in shown
    )
    legend = _legend(
        (
            ('<rect class="computing" width="22" height="12" rx="2"/>', "accepted tokens; bytes sent"),
            ('<rect class="received" width="22" height="12" rx="2"/>', "bytes received"),
        )
    )
    more = (
        f'<p class="soft small">The {BARS_MAX} nodes with the most tokens, of {len(nodes):,}.</p>'
        if len(shown) < len(nodes)
        else ""
    )
    return _section(
        "work",
        "Work and bytes per node",
        f"""<figure><div class="bars"><span class="head"></span><span class="head">accepted tokens</span>
<span class="head">bytes</span>
{rows}</div>{legend}</figure>{more}""",
    )


def _bar(kind: str, share: float, value: str, what: str, thin: str = "") -> str:
    return f"""<div class="bar {thin}"><svg aria-hidden="true"><rect class="{kind}" width="{_at(share)}" height="100%"
 rx="2"/></svg><span>{escape(value)}<span class="unseen"> {what}</span></span></div>"""


def _nodes(report: Report) -> str:
    rows = []
    for node in report.nodes[:ROWS_MAX]:
        tone, icon = _STATUS[node.status]
        happened = escape(node.reason) or "—"
        rows.append(
            f"""<tr><td><strong>{escape(node.name)}</strong><br>
<span class="mono">{escape(node.node_id[:8])}</span></td>
<td><span class="status {tone}">{icon}{node.status.value}</span></td>
<td class="number" data-label="tokens">{format_count(node.tokens)}</td>
<td class="number" data-label="share of accepted work">{_percent(node.accepted_share)}</td>
<td class="number" data-label="rounds accepted / excluded">{node.rounds_accepted} / {node.rounds_excluded}</td>
<td class="number" data-label="samples per second">{node.speed:.3g}</td>
<td class="number" data-label="computing">{format_duration_s(node.compute_s)}</td>
<td class="wide">{happened}</td></tr>"""
        )
    return _section(
        "nodes",
        "Nodes",
        f"""<table class="many"><thead><tr><th>node</th><th>status</th><th class="number">tokens</th>
<th class="number">share</th><th class="number">rounds in / out</th><th class="number">samples/s</th>
<th class="number">computing</th><th>what happened</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table>{_more(len(report.nodes), ROWS_MAX)}""",
        "Tokens are of accepted work only. Rounds in / out: contributions that were accepted and excluded.",
    )


def _bill(bill: Bill | None) -> str:
    if bill is None:
        return ""
    places = places_for(amount for line in bill.nodes for amount in (line.paid, line.withheld))
    rows = "".join(
        f"""<tr><td><strong>{escape(line.name)}</strong> <span class="mono">{escape(line.node_id[:8])}</span></td>
<td class="number" data-label="paid">{format_money(line.paid, places)}</td>
<td class="number" data-label="withheld">{format_money(line.withheld, places) if line.withheld else "—"}</td>
<td class="wide">{escape(line.reason)}</td></tr>"""
        for line in bill.nodes[:ROWS_MAX]
    )
    return _section(
        "bill",
        "Bill",
        f"""<table class="many"><thead><tr><th>node</th><th class="number">paid</th>
<th class="number">withheld</th><th>why</th></tr></thead>
<tbody>{rows}</tbody></table>{_more(len(bill.nodes), ROWS_MAX)}""",
        f"{format_money(bill.quoted)} {escape(bill.currency)} was set aside: {format_money(bill.charged)} was charged, "
        f"and {format_money(bill.refunded)} comes back. Nodes are paid for accepted work, never more than their price."
        + (f" The ledger takes {format_money(bill.fee)} of what was charged." if bill.fee else ""),
    )


def _more(count: int, shown: int) -> str:
    return f'<p class="soft small">{count - shown:,} more in report.json.</p>' if count > shown else ""


def _exclusions(report: Report) -> str:
    if not report.exclusions:
        return _section("exclusions", "Exclusions", '<p class="soft">No contribution was excluded.</p>')
    groups = group_exclusions(report.exclusions)
    rows = "".join(
        f"""<tr><td class="number" data-label="round">{first if first == last else f"{first}–{last}"}</td>
<td><strong>{escape(name)}</strong> <span class="mono">{escape(node[:8])}</span></td>
<td class="wide">{escape(reason)}</td></tr>"""
        for first, last, node, name, reason in groups[:ROWS_MAX]
    )
    return _section(
        "exclusions",
        "Exclusions",
        f"""<table><thead><tr><th class="number">round</th><th>node</th><th>reason</th></tr></thead>
<tbody>{rows}</tbody></table>{_more(len(groups), ROWS_MAX)}""",
        f"{_few(report.exclusions_count, 'contribution')} did not count. The samples went to others.",
    )


def group_exclusions(exclusions: Sequence[ExclusionReport]) -> list[tuple[int, int, str, str, str]]:
    """(first round, last round, node, name, reason), with the rounds in which the same happened to a node without a
    break taken together; ordered by first round."""
    ordered = sorted(exclusions, key=lambda one: (one.node, one.reason, one.round))
    groups: list[tuple[int, int, str, str, str]] = []
    for one in ordered:
        if groups and groups[-1][2:] == (one.node, one.name, one.reason) and one.round <= groups[-1][1] + 1:
            groups[-1] = (groups[-1][0], one.round, *groups[-1][2:])
        else:
            groups.append((one.round, one.round, one.node, one.name, one.reason))
    return sorted(groups)


def _audits(report: Report) -> str:
    drawn = report.audit_count.sentence if report.audit_count.chosen else ""
    if not report.audits:
        none = "No contribution was replayed while the job ran."
        return _section("audits", "Replays", f'<p class="soft">{none} {drawn}</p>')
    rows = []
    for audit in report.audits[:ROWS_MAX]:
        tone, icon = _VERDICT[audit.verdict]
        measured = "—" if audit.difference is None else f"{audit.difference:.3g}"
        allowed = "—" if audit.threshold is None else f"{audit.threshold:.3g}"
        rows.append(
            f"""<tr><td class="number" data-label="round">{audit.round}</td>
<td><strong>{escape(audit.name)}</strong></td>
<td><span class="status {tone}">{icon}{audit.verdict.value}</span></td>
<td class="number" data-label="difference">{measured}</td><td class="number" data-label="threshold">{allowed}</td>
<td class="wide">{escape(audit.sentence)}</td></tr>"""
        )
    found = [
        f"{sum(audit.verdict is verdict for audit in report.audits)} {verdict.value}"
        for verdict in AuditVerdict
        if any(audit.verdict is verdict for audit in report.audits)
    ]
    return _section(
        "audits",
        "Replays",
        f"""<table><thead><tr><th class="number">round</th><th>node</th><th>verdict</th>
<th class="number">difference</th><th class="number">threshold</th><th>in words</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table>{_more(report.audits_count, min(ROWS_MAX, len(report.audits)))}""",
        f"{_few(report.audits_count, 'contribution')} computed again from committed state: {', '.join(found)}. {drawn}",
    )


def _completion(report: Report) -> str:
    if report.completion is None:
        return ""
    return _section(
        "completion",
        "What the model writes",
        f"""<pre class="text"><span class="prompt">{escape(report.completion.prompt)}</span>\
{escape(report.completion.text)}</pre>""",
        "The prompt in grey, then what the trained model added.",
    )


def _events(report: Report) -> str:
    told = [mark for mark in report.events if mark.kind is not EventKind.AUDIT]
    if not told:
        return ""
    rows = "".join(
        f'<tr><td class="number">{_clock(mark.time_s)}</td><td class="wide">{escape(mark.sentence)}</td></tr>'
        for mark in told[:ROWS_MAX]
    )
    return _section(
        "events",
        "What happened",
        f"""<table><thead><tr><th class="number">time</th><th>event</th></tr></thead><tbody>{rows}</tbody></table>
{_more(len(told), ROWS_MAX)}""",
    )


def _rounds(report: Report) -> str:
    choice = report.round_choice
    link = [
        text
        for text, there in (
            (f"round trip {choice.round_trip_ms or 0:.3g} ms", choice.round_trip_ms is not None),
            (f"{format_rate_bps(choice.rate_bps or 0)} measured", choice.rate_bps is not None),
            (f"byte budget {format_bytes(choice.byte_budget or 0)}/s", choice.byte_budget is not None),
        )
        if there
    ]
    groups = "".join(
        f"<div><h3>{escape(name)}</h3><dl>"
        + "".join(
            f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>" for key, value in settings.items()
        )
        + "</dl></div>"
        for name, settings in report.settings.items()
    )
    terms = "; ".join(
        f"term {term.number} by {term.driver[:8]} "
        + ("from the start" if term.head_round < 0 else f"from round {term.head_round}")
        for term in report.terms[-20:]
    )
    why = f"<p>{escape(choice.reason)}</p>" if choice.reason else ""
    return _section(
        "rounds",
        "Rounds and settings",
        f"""{why}{f'<p class="soft">{escape(", ".join(link))}</p>' if link else ""}
{f'<p class="soft">Driven in {escape(terms)}.</p>' if terms else ""}
<details><summary>All settings</summary><div class="settings">{groups}</div></details>""",
    )


def _replay(report: Report) -> str:
    round_number, node = _worth_replaying(report)
    command = f"shoal replay {shlex.quote(report.folder)} --round {round_number} --node {shlex.quote(node)}"
    cost = report.replay_cost
    return _section(
        "replay",
        "Replay it yourself",
        f"""<pre>{escape(command)}</pre>
<p class="soft">Members kept {format_bytes(cost.disk_bytes)} of private state for this;
{format_bytes(cost.opened_bytes)} of it were opened on request.</p>""",
        "Any round of any node can be computed again from committed state, on any machine:",
    )


def _worth_replaying(report: Report) -> tuple[int, str]:
    """A mismatch where there is one, else the last round of the node that did most."""
    for audit in report.audits:
        if audit.verdict is AuditVerdict.MISMATCH:
            return audit.round, _called(report, audit.node, audit.name)
    node = max(report.nodes, key=lambda node: node.tokens, default=None)
    return max(0, report.rounds - 1), "NODE" if node is None else _called(report, node.node_id, node.name)


def _called(report: Report, node_id: str, name: str) -> str:
    """A node's name, or its id where another has the same name."""
    return node_id if sum(node.name == name for node in report.nodes) > 1 else name


# --- axes -----------------------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, 1, 2 or 5 times a power of ten apart, the first at most `low` and the last at least
    `high`."""
    size = max(1.0, abs(low), abs(high))
    span = high - low
    if span < 1e-9 * size:
        low, span = low - size / 2, size
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.floor(low / step)
    last = math.ceil((low + span) / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


def time_ticks(end_s: float, count: int) -> list[float]:
    """At most `count` + 1 round moments from 0 up to `end_s`, in seconds."""
    step: float = next((step for step in _TIME_STEPS if end_s / step <= count), 0)
    if not step:
        step = 86400.0 * math.ceil(end_s / 86400 / count)
    if end_s < 1:
        step = end_s
    return [number * step for number in range(int(end_s / step + 1e-9) + 1)]


def _clock(time_s: float) -> str:
    """75 -> `1:15`, 3725 -> `1:02:05`."""
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
