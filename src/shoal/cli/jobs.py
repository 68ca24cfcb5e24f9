"""`shoal jobs`: the runs of this machine, what each costs, how more money comes to one, and how one is stopped."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from shoal.cli import places
from shoal.cli.app import JOBS, Commands, Group, app
from shoal.cli.output import NEGATIVE, SHORT, JsonFlag, LedgerFlag, err, out, print_json, shoal_command, shown, when
from shoal.cli.output import run as run_to_end
from shoal.quantities import format_count, format_duration_s
from shoal.quantities.money import format_money, format_price

if TYPE_CHECKING:
    from shoal.house import RemoteLedger
    from shoal.sdk.jobs import Closed, DamagedRun, Funded, JobStanding

LOOK_S = 15.0
"""So long the nodes that drive a job are waited for."""
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")]
_COLOURS = {
    "running": "green", "detached": "green", "finished": "green", "waiting": "yellow", "stopped": "yellow", "died": "red",
}  # fmt: skip


class ListFirst(Group):
    """`shoal jobs` alone is `shoal jobs list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


jobs_app = Commands(cls=ListFirst, help="The runs of this machine: how they stand, what they cost: `shoal jobs`.")
app.add_typer(jobs_app, name="jobs", rich_help_panel=JOBS)


@jobs_app.command("list")
def list_jobs(
    runs: Annotated[Path, typer.Option(help="Where run folders are.")] = Path("runs"), json: JsonFlag = False
) -> None:
    """List all runs, the newest first: how each stands, how far it came and what it has spent.

    A run is *running*, *detached* (driven by nodes, as it stood when it was looked at last), *waiting* (the same, for more money),
    *finished*, *stopped* in order before its goal, or its driver *died*. One that cannot be read is
    named with the reason.
    """  # fmt: skip
    from shoal.sdk.jobs import DamagedRun, look_at_all

    found = look_at_all(runs)
    if json:
        print_json({"runs": [_plain(one) for one in found]})
        return
    if not found:
        out.print(f"There are no runs in {runs}.", markup=False, soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("tokens", "of", "time", "nodes", "spent", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        if isinstance(one, DamagedRun):
            table.add_row(escape(shown(one.folder)), "[red]damaged[/]")
            continue
        money = (format_money(one.spent_micro), f"{format_money(one.budget_micro)} {one.currency}")
        table.add_row(
            escape(shown(one.folder)), f"[{_COLOURS[one.state]}]{one.state}[/]", format_count(one.tokens),
            format_count(one.token_budget), format_duration_s(one.elapsed_s), str(one.working),
            *(money if one.currency else ()),
        )  # fmt: skip
    out.print(table)
    for one in found:
        if isinstance(one, DamagedRun):
            out.print(f"[red]{escape(shown(one.folder))}[/]  {escape(shown(one.sentence))}", soft_wrap=True)


@jobs_app.command("show")
def show(run: RunArgument, json: JsonFlag = False) -> None:
    """Show how a run stands: its nodes, what each has earned, the cost so far, and what the rest takes.

    The forecast is for the speed of the newest rounds and the nodes that work now; it names what the rest costs at
    most, and whether the budget ends first. `shoal report` counts the work itself.
    """  # fmt: skip
    from shoal.sdk.handed import is_driven_by_nodes
    from shoal.sdk.jobs import look_at

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
    for node in found.nodes:
        table.add_row(
            escape(shown(node.name)), "host" if node.drives else node.status.value, format_price(node.micro_per_h) if node.micro_per_h else "free",
            format_money(node.earned_micro) if node.micro_per_h else "",
            format_money(node.withheld_micro) if node.withheld_micro else "",
        )  # fmt: skip
    out.print(table)
    for line in (_say_money(found), shown(found.waits), _say_forecast(found)):
        if line:
            out.print(line, markup=False, soft_wrap=True)


@jobs_app.command("fund", context_settings=NEGATIVE)
def fund(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or that of an endpoint: ~/.shoal/serve/NAME.")
    ],
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
    from shoal.world import SystemClock

    if places.holds_run(run) or not (run / "payments.json").is_file():
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
    """Stop a run in order, as Ctrl-C does where it was started, and have back what it has not spent.

    What was committed is kept, and `shoal train RUN --resume` goes on from there. A run that nodes drive is stopped there;
    a `shoal attach` that looks at it ends. Of a run whose driver was killed the nodes get what they have vouchers for, and the rest is asked back.
    """  # fmt: skip
    from shoal.cli.accounts import ask
    from shoal.sdk.handed import is_driven_by_nodes
    from shoal.sdk.jobs import close_escrows, driver_of, look_at, open_at, stop

    detached = is_driven_by_nodes(places.find_run(run))
    driver = driver_of(run)
    if driver is not None and not json:
        does = "looks at it" if detached else "pays its nodes and writes down what it knows"
        err.print(f"Asking process {driver.pid} to stop; it {does}.", style="dim")
    pid = stop(run)
    if detached:
        pid = None  # of who looked
        if is_driven_by_nodes(run):
            _stop_detached(run)
    closed: Closed | None = None
    if (pid is None or places.holds_run(run)) and open_at(places.find_run(run)):
        ticket, key = places.ledger_ticket(ledger), places.account_key()

        async def work(one: RemoteLedger) -> Closed:
            return await close_escrows(run, key, one)

        closed = ask(ticket, work)
    if json:
        print_json({"stopped": pid, "closed": None if closed is None else asdict(closed)})
        return
    if pid is not None:
        out.print(f"Stopped process {pid}, which drove {run}.", markup=False, soft_wrap=True)
    elif detached and not is_driven_by_nodes(run):
        out.print("Stopped: no node drives it any more, and what they have of it is here.", markup=False)
    elif closed is None:
        out.print(f"No driver runs in {run}, and nothing is set aside for it.", markup=False, soft_wrap=True)
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


def _plain(one: JobStanding | DamagedRun) -> dict[str, Any]:
    from shoal.sdk.jobs import DamagedRun

    if isinstance(one, DamagedRun):
        return {"folder": one.folder, "state": "damaged", "error": {"code": one.code, "sentence": one.sentence}}
    return asdict(one) | {"working": one.working}


def _say_money(one: JobStanding) -> str:
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
