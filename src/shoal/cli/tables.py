"""A run in the terminal: its progress while it goes on, and its account at the end."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from shoal.cli.output import err, out, shown
from shoal.driver.lines import AuditLine, AuditVerdict, Event, EventKind
from shoal.driver.report import NodeStatus, Report
from shoal.driver.training import Progress as JobProgress
from shoal.purse.bills import Bill
from shoal.quantities import format_bytes, format_count, format_duration_s
from shoal.quantities.money import format_money, places_for

if TYPE_CHECKING:
    from shoal.sdk.quickstart import Asked  # with nodes, servers and databases, that `shoal train` has no use for

_COLOURS = {
    NodeStatus.FINISHED: "green",
    NodeStatus.WORKING: "green",
    NodeStatus.EXCLUDED: "red",
    NodeStatus.DIED: "red",
    NodeStatus.LEFT: "yellow",
    NodeStatus.RECLAIMED: "yellow",
    NodeStatus.REFUSED: "yellow",
}


class RunView:
    """Live progress of a job: a bar; tokens, loss, bytes and the time left; who is computing.

    Where standard error is no terminal, a plain line is printed now and then instead.
    """

    EVERY_SHARE = 0.1

    def __init__(self, title: str) -> None:
        self._title = title
        self._console: Console = err
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), console=err
        )
        self._task: TaskID = self._bar.add_task(title, total=1)
        self._live = Live(self._bar, console=err, refresh_per_second=4, transient=True)
        self._said = self._read = 0.0

    def __enter__(self) -> RunView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def _print(self, text: str, *, markup: bool = True) -> None:
        """Wrapped for a terminal; a line each in a file, so that it can be searched."""
        self._console.print(text, markup=markup, soft_wrap=not self._console.is_terminal)

    def say(self, sentence: str) -> None:
        self._print(shown(sentence), markup=False)

    def reading(self, share: float) -> None:
        """How much of the data was read."""
        if self._console.is_terminal:
            self._bar.update(self._task, description="reading data", completed=share)
        elif share >= self._read + self.EVERY_SHARE:
            self._read = share
            self._print(f"{share:.0%} of the data was read.", markup=False)

    def progress(self, now: JobProgress) -> None:
        left = (now.token_budget - now.tokens_total) / now.tokens_per_s if now.tokens_per_s else 0.0
        loss = f"loss {now.loss:.3f}" if now.loss is not None else "loss ?"
        spent = "" if now.spent_micro is None else f"{format_money(now.spent_micro)} spent  "
        figures = (
            f"{format_count(now.tokens_total)} of {format_count(now.token_budget)} tokens, "
            f"{format_count(now.tokens_per_s)}/s  {loss}  {format_bytes(now.bytes_sent)} sent  {spent}"
            f"round {now.round}  {format_duration_s(max(0.0, left))} left"
        )
        if self._console.is_terminal:
            doing = Text("  ").join(Text.assemble(name, " ", (what, "dim")) for name, what in now.members.items())
            done = min(1.0, now.tokens_total / now.token_budget)
            self._bar.update(self._task, description=self._title, completed=done)
            self._live.update(Group(self._bar, figures, doing))
        elif now.tokens_total / now.token_budget >= self._said:
            self._said = now.tokens_total / now.token_budget + self.EVERY_SHARE
            self._print(figures, markup=False)

    def event(self, event: Event) -> None:
        if event.kind is EventKind.NOTE and event.round is not None:
            return
        colour = {EventKind.DIED: "red", EventKind.EXCLUDED: "red", EventKind.JOINED: "green"}.get(event.kind, "yellow")
        self._print(f"[dim]{event.time_s:6.1f} s[/]  [{colour}]{escape(shown(event.sentence))}[/]")

    def audited(self, line: AuditLine) -> None:
        if line.verdict is AuditVerdict.MISMATCH:
            self._print(f"[red]Replay of round {line.round}: {escape(shown(line.sentence))}[/]")


def print_report(report: Report, *, console: Console = out) -> None:
    """The closing table: per node tokens, bytes, share of the accepted work, what became of it; why, underneath."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (
        ("node", "left"),
        ("tokens", "right"),
        ("share", "right"),
        ("sent", "right"),
        ("received", "right"),
        ("what became of it", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    reasons = Table(box=None, show_header=False, pad_edge=False)
    reasons.add_column(no_wrap=True)
    reasons.add_column(ratio=1)
    for node in report.nodes:
        colour = _COLOURS.get(node.status, "white")
        table.add_row(
            escape(node.name),
            f"{node.tokens:,}",
            f"{node.accepted_share:.1%}",
            format_bytes(node.bytes_sent),
            format_bytes(node.bytes_received),
            f"[{colour}]{node.status.value}[/]",
        )
        if node.reason:
            sentence = escape(shown(node.reason[0].upper() + node.reason[1:]))
            reasons.add_row(f"[{colour}]{escape(node.name)}[/]", sentence)
    console.print(table)
    if reasons.row_count:
        console.print(reasons)
    console.print(
        f"{report.tokens_accepted:,} tokens in {report.rounds} rounds and {format_duration_s(report.wall_s)}; "
        f"{report.compute_fraction:.0%} of the members' time was computing."
    )
    if report.audit_count.chosen:
        console.print(report.audit_count.sentence)
    loss = _loss_line(report)
    if loss:
        console.print(loss)
    if report.bill is not None:
        print_bill(report.bill, console=console)
    if report.goal is not None and not report.goal.reached:
        console.print(shown(report.goal.sentence), style="yellow", markup=False)


def print_bill(bill: Bill, *, console: Console = out) -> None:
    """Who is paid what, and how it adds up."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("node", overflow="fold")
    withheld = any(line.withheld for line in bill.nodes)
    for name in (f"paid, {bill.currency}", *(["withheld"] if withheld else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    places = places_for(amount for line in bill.nodes for amount in (line.paid, line.withheld))
    for line in bill.nodes:
        figures = (line.paid, *([line.withheld] if withheld else []))
        money = (format_money(amount, places) for amount in figures)
        table.add_row(escape(shown(line.name)), *money, escape(shown(line.reason)))
    console.print("[bold]The bill[/]")
    console.print(table)
    console.print(
        f"Set aside {format_money(bill.quoted)} {bill.currency}: charged {format_money(bill.charged)}, "
        f"and {format_money(bill.refunded)} comes back."
        + (f" Of what was charged the ledger takes {format_money(bill.fee)}." if bill.fee else ""),
        markup=False,
    )


def print_completion(report: Report, *, console: Console = out) -> None:
    """What the trained model was given and, brighter, how it went on."""
    if report.completion is not None:
        console.print("[bold]The model continues[/] [dim](the prompt is dim)[/]")
        console.print(Text(shown(report.completion.prompt), "dim") + Text(shown(report.completion.text)))
        console.print()


def print_asked(asked: Asked, again: str, *, console: Console = out) -> None:
    """What the model answered through the endpoint, who did, and how to do it again."""
    who = shown(" and ".join(asked.nodes)) or "the nodes"
    console.print(
        f"[bold]Served by {escape(who)}[/]: the endpoint was up after {asked.ready_s:.1f} s and answered in "
        f"{asked.answer_s:.1f} s [dim](the question is dim)[/]"
    )
    console.print(Text(shown(asked.prompt), "dim") + Text(shown(asked.text)))
    console.print(
        f"  {again}   # serves it again; then: shoal chat, or any OpenAI client", markup=False, soft_wrap=True
    )
    console.print()


def _loss_line(report: Report) -> str:
    parts: list[str] = []
    show: Callable[[float | None, str], None] = lambda value, what: (  # noqa: E731
        parts.append(f"{what} {value:.3f}") if value is not None else None
    )
    show(report.held_out_loss, "held-out loss")
    show(report.untrained_loss, "untrained")
    show(report.unigram_loss, "unigram baseline")
    return ", ".join(parts) + " (nats per token)" if parts else ""
