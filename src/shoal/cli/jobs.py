"""`shoal jobs`: the runs of this machine and the endpoints that pay nodes, what each costs, how more money comes to one,
and how one is stopped."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from shoal.cli import places
from shoal.cli.app import JOBS, Commands, Group, app
from shoal.cli.output import (
    NARROW,
    NEGATIVE,
    SHORT,
    JsonFlag,
    LedgerFlag,
    err,
    out,
    print_json,
    shoal_command,
    shown,
    when,
)
from shoal.cli.output import run as run_to_end
from shoal.quantities import format_count, format_duration_s
from shoal.quantities.money import format_money, format_price, places_for
from shoal.sdk.local import shoal_home

if TYPE_CHECKING:
    from shoal.house import RemoteLedger
    from shoal.sdk.jobs import Closed, DamagedRun, EndpointStanding, Funded, JobStanding

LOOK_S = 15.0
"""So long the nodes that drive a job are waited for."""
RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run's folder, such as runs/quickstart, or that of an endpoint: ~/.shoal/serve/NAME."
    ),
]
_COLOURS = {
    "running": "green", "detached": "green", "finished": "green", "waiting": "yellow", "stopped": "yellow", "died": "red",
}  # fmt: skip


class ListFirst(Group):
    """`shoal jobs` alone is `shoal jobs list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (not args[0].startswith("-") or args[0] in ctx.help_option_names)
        if not named and not ctx.resilient_parsing:  # a shell that completes wants the commands
            args = ["list", *args]
        return super().parse_args(ctx, args)


jobs_app = Commands(
    cls=ListFirst,
    help="Runs, and endpoints that pay nodes: how each stands and what it costs. `shoal jobs` lists them.",
)
app.add_typer(jobs_app, name="jobs", rich_help_panel=JOBS)


@jobs_app.command("list")
def list_jobs(
    runs: Annotated[Path, typer.Option(help="Where run folders are.")] = Path("runs"), json: JsonFlag = False
) -> None:
    """List all runs, the newest first: how each stands, how far it came and what it has spent.

    A run is *running*, *detached* (driven by nodes, as it stood when it was looked at last), *waiting* (the same, for
    more money), *finished*, *stopped* in order before its goal, or its driver *died*. Below stand endpoints of `shoal
    serve --budget`, with what they have spent since their last start. What cannot be read is named with the reason.
    """  # fmt: skip
    from shoal.sdk.jobs import DamagedRun, look_at_all, look_at_endpoints

    found, endpoints = look_at_all(runs), look_at_endpoints(shoal_home() / "serve")
    if json:
        print_json({"runs": [_plain(one) for one in found], "endpoints": [_plain(one) for one in endpoints]})
        return
    if found:
        out.print(_table_of_runs(found))
    else:
        out.print(f"There are no runs in {runs}.", markup=False, soft_wrap=True)
    if endpoints:
        out.print()
        out.print(_table_of_endpoints(endpoints))
    for one in (*found, *endpoints):
        if isinstance(one, DamagedRun):
            out.print(f"[red]{escape(shown(one.folder))}[/]  {escape(shown(one.sentence))}", soft_wrap=True)


def _table_of_runs(found: Sequence[JobStanding | DamagedRun]) -> Table:
    from shoal.sdk.jobs import DamagedRun

    wide = out.width >= NARROW
    table = _table("run")
    for name in ("tokens", "of", *(("time", "nodes") if wide else ()), "spent", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    digits = places_for(one.spent_micro for one in found if not isinstance(one, DamagedRun))
    for one in found:
        if isinstance(one, DamagedRun):
            table.add_row(escape(shown(one.folder)), "[red]damaged[/]")
            continue
        table.add_row(
            escape(shown(one.folder)), _state(one), format_count(one.tokens), format_count(one.token_budget),
            *((format_duration_s(one.elapsed_s), str(one.working)) if wide else ()),
            *_of_budget(one, digits),
        )  # fmt: skip
    return table


def _table_of_endpoints(found: Sequence[EndpointStanding | DamagedRun]) -> Table:
    from shoal.sdk.jobs import DamagedRun

    table = _table("endpoint")
    for name in ("spent", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    digits = places_for(one.spent_micro for one in found if not isinstance(one, DamagedRun))
    for one in found:
        if isinstance(one, DamagedRun):
            table.add_row(escape(shown(one.folder)), "[red]damaged[/]")
        else:
            table.add_row(escape(shown(one.folder)), _state(one), *_of_budget(one, digits))
    return table


def _table(first: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=12)
    table.add_column("state", no_wrap=True)
    return table


def _state(one: JobStanding | EndpointStanding) -> str:
    return f"[{_COLOURS[one.state]}]{one.state}[/]"


def _of_budget(one: JobStanding | EndpointStanding, digits: int) -> tuple[str, ...]:
    """What is spent, and of how much; nothing where nothing was set aside."""
    if not one.budget_micro:
        return ()
    return format_money(one.spent_micro, digits), f"{format_money(one.budget_micro)} {one.currency or ''}".rstrip()


@jobs_app.command("show")
def show(run: RunArgument, json: JsonFlag = False) -> None:
    """Show how a run stands: its nodes, what each has earned, the cost so far, and what the rest takes.

    The forecast is for the speed of the newest rounds and the nodes that work now; it names what the rest costs at
    most, and whether the budget ends first. `shoal report` counts the work itself. Of an endpoint it shows which nodes
    it has paid since its last start.
    """  # fmt: skip
    from shoal.sdk.handed import is_driven_by_nodes
    from shoal.sdk.jobs import look_at, pays_nodes

    if pays_nodes(run):
        _show_endpoint(run, json)
        return
    if is_driven_by_nodes(places.find_run(run)):
        get_news(run)
    found = look_at(run)
    if json:
        print_json(_plain(found))
        return
    loss = f", loss {found.loss:.3f}" if found.loss is not None else ""
    out.print(f"[bold]{escape(shown(found.name))}[/] [{_COLOURS[found.state]}]{found.state}[/]", soft_wrap=True)
    out.print(
        f"{format_count(found.tokens)} of {format_count(found.token_budget)} tokens in {found.round + 1} rounds and "
        f"{format_duration_s(found.elapsed_s)}{loss}.",
        markup=False,
    )
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("node", overflow="fold")
    table.add_column("what became of it", no_wrap=True)
    for name in ("price", "earned", "withheld"):
        table.add_column(name, justify="right", no_wrap=True)
    digits = places_for(money for node in found.nodes for money in (node.earned_micro, node.withheld_micro))
    for node in found.nodes:
        table.add_row(
            escape(shown(node.name)), "host" if node.drives else node.status.value, format_price(node.micro_per_h) if node.micro_per_h else "free",
            format_money(node.earned_micro, digits) if node.micro_per_h else "",
            format_money(node.withheld_micro, digits) if node.withheld_micro else "",
        )  # fmt: skip
    out.print(table)
    for line in (_say_money(found), shown(found.waits), _say_forecast(found)):
        if line:
            out.print(line, markup=False, soft_wrap=True)


def _show_endpoint(folder: Path, json: bool) -> None:
    from shoal.sdk.jobs import look_at_endpoint

    found = look_at_endpoint(folder)
    if json:
        print_json(_plain(found))
        return
    out.print(f"[bold]{escape(shown(folder.resolve().name))}[/] {_state(found)}", soft_wrap=True)
    if found.nodes:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("node", overflow="fold")
        for name in ("price", "earned"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("what became of it", overflow="fold")
        digits = places_for(node.earned_micro for node in found.nodes)
        for node in found.nodes:
            table.add_row(
                escape(shown(node.name)), format_price(node.micro_per_h), format_money(node.earned_micro, digits),
                escape(shown(node.reason)),
            )  # fmt: skip
        out.print(table)
    out.print(_say_money(found) or "It has paid no node yet.", markup=False, soft_wrap=True)


@jobs_app.command("fund", context_settings=NEGATIVE)
def fund(
    run: RunArgument,
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="How much more, such as 2.50.")],
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Add to the budget of a run, or of an endpoint, while it goes on: what it has set aside becomes more.

    Your account signs for it, here; whoever drives or serves, and every node, learns of it from the ledger, within some
    seconds. What is not used comes back like the rest.
    """  # fmt: skip
    from shoal.cli.accounts import ask
    from shoal.sdk.handed import is_driven_by_nodes
    from shoal.sdk.jobs import fund as add
    from shoal.sdk.jobs import pays_nodes
    from shoal.world import SystemClock

    if not pays_nodes(run):
        places.find_run(run)
    micro = places.amount_of(amount)
    ticket, key = places.ledger_ticket(ledger), places.account_key()
    if is_driven_by_nodes(run):
        get_news(run)

    async def work(one: RemoteLedger) -> Funded:
        return await add(run, micro, key, one, SystemClock())

    made = ask(ticket, work)
    if json:
        print_json(asdict(made))
        return
    out.print(
        f"Added {format_money(micro)} {ticket.currency}: the budget is {format_money(made.budget_micro)}, of which "
        f"{format_money(made.left_micro)} is left.",
        markup=False,
    )


@jobs_app.command("cancel")
def cancel(run: RunArgument, ledger: LedgerFlag = None, json: JsonFlag = False) -> None:
    """Stop a run, or an endpoint, in order, as Ctrl-C does where it was started, and have back what it has not spent.

    What was committed is kept, and `shoal train RUN --resume` goes on from there. A run that nodes drive is stopped
    there; a `shoal attach` that looks at it ends. Of what was killed the nodes get what they have vouchers for, and the
    rest is asked back.
    """  # fmt: skip
    from shoal.cli.accounts import ask
    from shoal.sdk.handed import is_driven_by_nodes
    from shoal.sdk.jobs import close_escrows, look_at, open_at, pays_nodes, stop
    from shoal.world.processes import writer_of

    endpoint = pays_nodes(run)
    detached = not endpoint and is_driven_by_nodes(places.find_run(run))
    driver = writer_of(run)
    if driver is not None and not json:
        does = "looks at it" if detached else "pays its nodes and writes down what it knows"
        err.print(f"Asking process {driver.pid} to stop; it {does}.", style="dim")
    pid = stop(run)
    if detached:
        pid = None  # of who looked
        if is_driven_by_nodes(run):
            _stop_detached(run)
    closed: Closed | None = None
    if (pid is None or endpoint or places.holds_run(run)) and open_at(run if endpoint else places.find_run(run)):
        ticket, key = places.ledger_ticket(ledger), places.account_key()

        async def work(one: RemoteLedger) -> Closed:
            return await close_escrows(run, key, one)

        closed = ask(ticket, work)
    if json:
        print_json({"stopped": pid, "closed": None if closed is None else asdict(closed)})
        return
    if pid is not None:
        what = "served with" if endpoint else "drove"
        out.print(f"Stopped process {pid}, which {what} {run}.", markup=False, soft_wrap=True)
    elif detached and not is_driven_by_nodes(run):
        out.print("Stopped: no node drives it any more, and what they have of it is here.", markup=False)
    elif closed is None:
        what = "endpoint" if endpoint else "driver"
        out.print(f"No {what} runs in {run}, and nothing is set aside for it.", markup=False, soft_wrap=True)
    if closed is not None:
        at = "" if closed.at_ms is None else f" {when(closed.at_ms)}"
        out.print(f"{format_money(closed.micro)} {ticket.currency} comes back{at}.", markup=False)
    elif places.holds_run(run) and (found := look_at(run)).currency is not None:
        out.print(
            f"Spent {format_money(found.spent_micro)} of {format_money(found.budget_micro)} {found.currency}; what is left "
            "was asked back.",
            markup=False,
        )


def get_news(run: Path) -> None:
    """What the nodes that drive it have by now; where none answers, what is here has to do."""
    from shoal.driver.folder import FolderLocked
    from shoal.sdk.attached import AttachOptions, HostsSilent, refresh

    async def work() -> None:
        try:
            await refresh(AttachOptions(run, silent_s=LOOK_S, acquaintances=places.acquaintances()))
        except FolderLocked:
            pass  # `shoal attach` follows it, so what is here is what they have
        except HostsSilent as error:
            err.print(shown(error.sentence), style="yellow", markup=False, soft_wrap=True)

    run_to_end(work)


def _stop_detached(run: Path) -> None:
    """As far as its hosts answer; what it has set aside comes back all the same."""
    from shoal.sdk.attached import AttachOptions, HostsSilent, stop_detached

    async def work() -> None:
        try:
            await stop_detached(AttachOptions(run, silent_s=LOOK_S, acquaintances=places.acquaintances()))
        except HostsSilent as error:
            err.print(shown(error.sentence), style="yellow", markup=False, soft_wrap=True)

    run_to_end(work)


def _plain(one: JobStanding | EndpointStanding | DamagedRun) -> dict[str, Any]:
    from shoal.sdk.jobs import DamagedRun, JobStanding

    if isinstance(one, DamagedRun):
        return {"folder": one.folder, "state": "damaged", "error": {"code": one.code, "sentence": one.sentence}}
    return asdict(one) | ({"working": one.working} if isinstance(one, JobStanding) else {})


def _say_money(one: JobStanding | EndpointStanding) -> str:
    if one.currency is None:
        return ""
    aside = f"; {format_money(one.open_micro)} of the rest is set aside" if one.open_micro else ""
    escrows = ", ".join(escrow[:SHORT] for escrow in one.escrows)
    return (
        f"Spent {format_money(one.spent_micro)} of {format_money(one.budget_micro)} {one.currency}{aside}. "
        f"Escrow{'s' * (len(one.escrows) != 1)} {escrows}."
    )


def _say_forecast(one: JobStanding) -> str:
    if one.forecast is None:
        return ""
    goes_on = one.state in ("running", "detached")
    said = f"At the {'present' if goes_on else 'last'} rate: {format_duration_s(one.forecast.seconds)} left"
    whole = one.spent_micro + one.forecast.micro
    if one.currency is not None:
        said += f", for up to {format_money(one.forecast.micro)} {one.currency}, {format_money(whole)} in all"
    if not goes_on:
        more = f" --budget {format_money(whole)}" if whole > one.budget_micro else ""
        said += f". Go on with: {shoal_command()} train {shlex.quote(one.folder)} --resume{more}"
        return said
    if one.forecast.money_lasts_s is not None:
        said += (
            f". The budget ends first, in {format_duration_s(one.forecast.money_lasts_s)}; then the job stops, unless "
            "`shoal jobs fund` adds to it"
        )
    return f"{said}."
