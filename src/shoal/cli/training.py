"""`shoal train`: from a job file to a model."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from shoal.cli import places
from shoal.cli.app import JOBS, app
from shoal.cli.jobs import get_news
from shoal.cli.output import (
    BadFlag,
    HubFlag,
    Interrupted,
    JsonFlag,
    LedgerFlag,
    out,
    print_json,
    run,
    say_fee,
    shoal_command,
    shown,
)
from shoal.cli.tables import RunView, print_completion, print_report
from shoal.driver.report import Report
from shoal.errors import BadInput, ShoalError
from shoal.house import RemoteLedger
from shoal.identity import KeyPair, load_key
from shoal.market.requirements import USUAL_CURRENCY
from shoal.protocol.orders import HOUR_MS
from shoal.purse.bills import budget_of
from shoal.quantities import format_bytes, format_count, format_duration_s, format_flops, parse_duration_s
from shoal.quantities.money import format_money, parse_money, places_for
from shoal.sdk.choosing import STEP_LEAST_S
from shoal.sdk.costs import SHEET_SHARE, Costs, Way
from shoal.sdk.documents import describe, show_default
from shoal.sdk.handed import is_driven_by_nodes
from shoal.sdk.hours import Bought, KeptBid, KeptBids, bought_at, bought_hours, free_for
from shoal.sdk.jobfile import JobFile, explain, parse_job, read_job_bytes, schema
from shoal.sdk.local import shoal_home
from shoal.sdk.spending import Spending
from shoal.sdk.train import DRIVER_KEY, Plan, TrainOptions, plan, resume, train
from shoal.transport import TlsEndpoint
from shoal.world import SystemClock

if TYPE_CHECKING:
    from shoal.ledger.fees import Announced

NODES_SHOWN = 16
"""Of those that fit a plan, the fastest."""


def print_fields() -> None:
    """Every field of a job file: what it takes, its default, what it means."""
    for field in explain():
        if field.section:
            out.print(f"\n[bold]{field.path}:[/]  {escape(field.meaning)}")
            continue
        indent = 2 * field.path.count(".")
        out.print(
            Padding(
                f"[bold]{field.path}[/]  [dim]{escape(describe(field))}; default: {show_default(field)}[/]",
                (0, 0, 0, indent),
            )
        )
        out.print(Padding(escape(field.meaning), (0, 0, 0, indent + 4)))


@app.command("train", rich_help_panel=JOBS)
def train_command(
    job: Annotated[
        Path | None,
        typer.Argument(
            metavar="JOB.YAML", help="The job file; with --resume it may be the run's folder.", show_default=False
        ),
    ] = None,
    hub: HubFlag = None,
    runs: Annotated[
        Path, typer.Option(help="Where run folders go; this one is put under the job's name there.")
    ] = Path("runs"),
    resume_run: Annotated[
        bool, typer.Option("--resume", help="Go on with the run of this job, from its newest Commit.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Throw an earlier run of this name away.")] = False,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Have nodes drive it, and return: this machine may be switched off. `shoal attach` looks at it.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the data, ask the hubs, print what would be done; start nothing.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="MONEY",
            help="What it may cost at most, such as 2.50, in the ledger's currency. Without one it takes only nodes "
            "that work for nothing.",
            show_default="the job file's; of a run that goes on, its own",
        ),
    ] = None,
    bought: Annotated[
        str | None,
        typer.Option(
            metavar="HOUR",
            help="Use the hour that you bought with `shoal market buy`, while it lasts: 2026-11-28T14. It takes those nodes "
            "and no others, for what you bought them for.",
        ),
    ] = None,
    ledger: LedgerFlag = None,
    prompt: Annotated[str | None, typer.Option(help="Have the trained model continue this text.")] = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where nodes that cannot be dialled link to this driver: tcp://HOST:PORT with an address of this machine "
            "that they can reach. Empty for none.",
        ),
    ] = "tcp://127.0.0.1:0",
    fields: Annotated[
        bool,
        typer.Option(
            "--fields",
            help="List every field of a job file with its default; with --json as a JSON Schema, for editors.",
        ),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Train a model on the nodes at the hubs, as a job file says.

    The smallest job file is

        data:
          paths: [my-texts/*.txt]

    and everything else has a default (--fields lists all). The run's folder then holds the model as a Hugging Face
    checkpoint (model/), metrics.jsonl, every signed record, report.html and report.json. This command drives the job:
    if it is stopped or killed, --resume goes on from the newest Commit.
    """  # fmt: skip
    if fields:
        if json:
            print_json(schema())
        else:
            print_fields()
        return
    if job is None:
        raise BadFlag("Name a job file: shoal train job.yaml (shoal train --fields lists what may stand in it).")
    folder: Path | None = None
    if resume_run and job.is_dir():
        folder = places.find_run(job)
        job = folder / "job.yaml"
    text = read_job_bytes(job)
    job_file = parse_job(text, job, begun=resume_run)
    folder = folder or runs / job_file.name
    if resume_run and is_driven_by_nodes(places.find_run(folder)):
        get_news(folder)  # where it is over, it is not driven by them any more
    places.refuse_wildcard(listen, "use an address of this machine, or --listen '' where every node can be dialled")
    tickets = places.find_hubs(hub)
    view = RunView(job_file.name)
    hours = _bought(bought, folder if resume_run else None) if bought is not None else None
    budget_micro = _budget(budget, job_file, folder if resume_run else None)
    if hours is not None and budget_micro is None:
        budget_micro = sum(hold.price.micro_per_h for hold in hours.bought.holds.values())
    spending = places.spending(budget_micro, ledger)
    options = TrainOptions(
        folder=folder,
        hubs=tickets,
        key=places.user_key(),
        bought=hours.bought if hours is not None else None,
        listen=listen or None,
        replace=replace,
        prompt=prompt,
        acquaintances=places.acquaintances(),
        spending=spending,
    )
    if detach and resume_run:
        raise BadFlag("A run that was begun here goes on here: leave out --detach.")
    if detach and hours is not None:
        raise BadFlag("Bought hours are used by a job that is driven here: leave out --detach or --bought.")
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="shoal-plan-") as scratch:
            made = run(lambda: plan(job_file, options, Path(scratch) / "plan"))
        if json:
            print_json(_plan_fields(made))
        else:
            print_plan(made)
            if made.costs is not None:
                out.print(
                    say_choice(made.costs, spending.budget_micro if spending is not None else None),
                    markup=False,
                    soft_wrap=True,
                )
        return
    if not json:
        options.say, options.reading, options.progress, options.event, options.audited = (
            view.say,
            view.reading,
            view.progress,
            view.event,
            view.audited,
        )

    if detach:
        _detach(job_file, text, options, view, json)
        return
    before = places.job_of(folder)

    async def work() -> Report:
        if hours is not None and spending is not None:
            options.say(
                "What was set aside for these hours comes back, in a minute at most; the job sets it aside anew."
            )
            await hours.free(spending)
        try:
            return await (resume(job_file, options) if resume_run else train(job_file, text, options))
        except asyncio.CancelledError:
            if not resume_run and before is not None and places.job_of(folder) == before:
                raise Interrupted("Stopped before the job began; the earlier run is as it was.") from None
            if not places.holds_run(folder):
                raise Interrupted("Stopped before the job began; nothing was kept.") from None
            raise Interrupted(
                f"Stopped. What was committed is kept; go on with: {shoal_command()} train {shlex.quote(str(folder))} --resume"
            ) from None

    with view:
        made_report = run(work)
    _print_end(made_report, folder, json)


def _print_end(report: Report, folder: Path, json: bool) -> None:
    """How a job ended, and where what it made is. Raises Exit for one that did not come to its goal."""
    if json:
        print_json(report)
    else:
        print_completion(report)
        print_report(report)
        out.print(f"Model: {folder / 'model'}   Report: {folder / 'report.html'}", markup=False, soft_wrap=True)
    if report.goal is not None and not report.goal.reached:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Hours:
    """Hours that this user has bought, for a job."""

    bids: Sequence[tuple[KeptBids, KeptBid]]
    bought: Bought

    async def free(self, spending: Spending) -> None:
        endpoint, clock = TlsEndpoint(KeyPair.generate()), SystemClock()
        try:
            ledger = RemoteLedger(endpoint, spending.ledger, clock)
            await free_for(self.bids, spending.account, ledger, spending.budget_micro, clock)
        finally:
            await endpoint.close()


def _bought(text: str, begun: Path | None) -> _Hours:
    """Raises BadFlag for an hour that was not bought, is not now, or is not the one that a run was begun with."""
    start_ms, now_ms = places.hour_of(text), SystemClock().now_ms()
    if not start_ms <= now_ms < start_ms + HOUR_MS:
        raise BadFlag(f"--bought {text} cannot be used now: an hour is used from its beginning to its end, in UTC.")
    found = bought_at(shoal_home() / "orders", start_ms)
    if len(found) != 1:
        have = "nodes of two kinds keep it" if found else "no node keeps it for you; `shoal market mine` says why"
        raise BadFlag(f"--bought {text} cannot be used: {have}.")
    [(block, bids)] = found.items()
    bought = bought_hours(places.user_key(), block, [one for _, one in bids])
    if begun is not None and load_key(begun / DRIVER_KEY).node_id != bought.key.node_id:
        raise BadFlag(f"--bought {text} cannot be used: the run was begun without it, or with another hour.")
    return _Hours(bids, bought)


def _detach(job_file: JobFile, text: bytes, options: TrainOptions, view: RunView, json: bool) -> None:
    from shoal.sdk.detached import Standing, detach
    from shoal.sdk.handed import Handed

    told = dict[str, str]()

    def watch(standing: Sequence[Standing]) -> None:
        for one in standing:
            said = one.phase if not one.sentence else f"{one.phase}: {one.sentence}"
            if not json and told.get(one.host) != said:
                told[one.host] = said
                view.say(f"{one.host}: {said}")

    async def work() -> Handed:
        return await detach(job_file, text, options, watch)

    with view:
        made = run(work)
    if json:
        print_json({"run": str(options.folder), "job": made.job.hex(), "hosts": [one.name for one in made.hosts]})
        return
    first, *others = (one.name for one in made.hosts)
    after = f"; {' and '.join(others)} would take over" if others else ""
    out.print(f"[bold]{escape(first)}[/] drives it{escape(after)}. This machine may be switched off.", soft_wrap=True)
    out.print(
        f"Look at it with: {shoal_command()} attach {shlex.quote(str(options.folder))}", soft_wrap=True, markup=False
    )


@app.command("attach", rich_help_panel=JOBS)
def attach_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, such as runs/job.")],
    hub: HubFlag = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where a node that cannot be dialled links to this command: tcp://HOST:PORT. Empty for none.",
        ),
    ] = "tcp://127.0.0.1:0",
    json: JsonFlag = False,
) -> None:
    """Look at a job that nodes drive (`shoal train --detach`), until it is over.

    The run's folder follows what the nodes write: records, metrics, and at the end the model and the report. Ctrl-C
    stops looking, never the job; `shoal jobs cancel` does that.
    """  # fmt: skip
    from shoal.sdk.attached import AttachOptions, attach

    folder = places.find_run(run_folder)
    places.refuse_wildcard(listen, "use an address of this machine, or --listen '' where every node can be dialled")
    tickets = []
    with contextlib.suppress(BadInput):
        tickets = places.find_hubs(hub)
    view = RunView(folder.name)
    options = AttachOptions(folder, tickets, listen=listen or None, acquaintances=places.acquaintances())
    if not json:
        options.say, options.progress, options.event, options.audited = (
            view.say,
            view.progress,
            view.event,
            view.audited,
        )

    async def work() -> Report | None:
        try:
            return await attach(options)
        except asyncio.CancelledError:
            raise Interrupted(
                f"Looking has ended, not the job. Look again with: {shoal_command()} attach {shlex.quote(str(folder))}"
            ) from None

    with view:
        made = run(work)
    if made is not None:
        _print_end(made, folder, json)
    elif json:
        print_json(None)
    else:
        out.print("It was stopped before there was a report; what it did is in the folder.", markup=False)


def _budget(flag: str | None, job_file: JobFile, begun: Path | None) -> int | None:
    """As the flag says it, else the job file, else as the run had it that goes on."""
    if flag is not None:
        return parse_money(flag)
    if job_file.budget is None and begun is not None:
        return budget_of(begun)
    return job_file.budget


@app.command("plan", rich_help_panel=JOBS)
def plan_job(
    job: Annotated[Path, typer.Argument(metavar="JOB.YAML", help="A job file.")],
    hub: HubFlag = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Name the cheapest mix that is done in so long, such as '2 h'.", show_default=False
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Show what a job would do, how long it would take, and what it would cost.

    Reads the data and asks the hubs; nothing is started. The costs are those of all nodes that fit, of the mix of them with
    the most work for its money (with --deadline: of the cheapest that is fast enough), of the best single node and the
    fastest, and of one GPU at public list prices. Speeds follow from measured matrix rates, and of public prices from data sheets: they rank,
    and promise nothing.
    """  # fmt: skip
    job_file = parse_job(read_job_bytes(job), job)
    deadline_s = parse_duration_s(deadline) if deadline is not None else None
    if deadline_s is not None and deadline_s <= 0:
        raise BadFlag(f"--deadline {deadline} cannot be kept: write for example --deadline '2 h'.")
    tickets = places.find_hubs(hub)
    with tempfile.TemporaryDirectory(prefix="shoal-plan-") as scratch:
        options = TrainOptions(folder=Path(scratch), hubs=tickets, key=places.user_key(), listen="tcp://127.0.0.1:0",
                               acquaintances=places.acquaintances())  # fmt: skip
        made = run(lambda: plan(job_file, options, Path(scratch) / "plan", deadline_s))
    fees = _fees() if made.costs is not None else ()
    if json:
        tables = [{"fee_ppm": one.table.fee_ppm, "from_ms": one.table.from_ms} for one in fees]
        print_json({**_plan_fields(made), "fees": tables})
        return
    print_plan(made)
    if made.costs is not None:
        out.print()
        print_costs(made.costs, with_reason=not made.why_not)
        if made.costs.best is not None:
            out.print(say_choice(made.costs, job_file.budget or None), markup=False, soft_wrap=True)
    for one in fees:
        said = say_fee(one.table, SystemClock().now_ms())
        out.print(
            f"The ledger takes {said}: a part of these costs, which nodes get less.", soft_wrap=True, markup=False
        )


def _fees() -> tuple[Announced, ...]:
    """Of the user's ledger; nothing where none is known, or it does not answer."""
    from shoal.cli.accounts import ask

    with contextlib.suppress(ShoalError):
        return ask(places.ledger_ticket(), lambda one: one.fees())
    return ()


def print_costs(costs: Costs, *, with_reason: bool) -> None:
    """Ways to have a job done, and what each costs; with the reason where no mix does."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("way", overflow="fold")
    for name in ("tokens/s", "time", f"{costs.currency}/h", f"{costs.currency} in all"):
        table.add_column(name, justify="right", no_wrap=True)

    ways = [way for way in (costs.all, costs.best, costs.one, costs.fastest, *costs.public) if way is not None]
    per_h, in_all = places_for(way.micro_per_h for way in ways), places_for(way.micro for way in ways)

    def row(way: Way, what: str, style: str = "", currency: str = "") -> None:
        table.add_row(
            escape(shown(what)), format_count(way.tokens_per_s), format_duration_s(3600 * way.hours),
            format_money(way.micro_per_h, per_h) + currency, format_money(way.micro, in_all) + currency, style=style,
        )  # fmt: skip

    if costs.all is not None:
        row(costs.all, costs.all.what)
    if costs.best is not None:
        row(costs.best, f"best mix: {costs.best.what}", "green")
    if costs.one is not None:
        row(costs.one, f"best node: {costs.one.what}")
    if costs.fastest is not None:
        row(costs.fastest, f"fastest node: {costs.fastest.what}")
    for way in costs.public:
        row(way, way.what, "dim", "" if costs.currency == USUAL_CURRENCY else f" {USUAL_CURRENCY}")
    out.print(table)
    if (with_reason and costs.best is None) or costs.left_out:
        out.print(shown(costs.reason), markup=False, style="yellow")
    out.print(
        f"[dim]Grey: one GPU at public list prices in USD, read since {costs.read}, at {SHEET_SHARE:.0%} of the speed of its "
        f"data sheet; no inner step takes less than {1000 * STEP_LEAST_S:.0f} ms.[/]"
    )


def say_choice(costs: Costs, budget_micro: int | None) -> str:
    """Which of the nodes that fit a job takes, with so much to spend."""
    if budget_micro is None:
        free = costs.all is not None and not costs.all.micro_per_h
        if free:
            return "All of them work for nothing."
        said = "Without a budget it takes only those that are free"
        if costs.best is None or not costs.best.micro:
            return f"{said}."
        best = f"{shown(costs.best.what)}, for {format_money(costs.best.micro)} {costs.currency} as offered"
        return f"{said}; with one it would take {best}."
    if costs.best is None:
        return shown(costs.reason)
    said = (
        f"Of these it takes {shown(costs.best.what)}, for {format_money(costs.best.micro)} {costs.currency} as offered."
    )
    if costs.best.micro > budget_micro:
        said += (
            f" That is more than its budget of {format_money(budget_micro)}: it would stop when that is used "
            "up, to be resumed with a larger one."
        )
    return said


def _plan_fields(made: Plan) -> dict[str, object]:
    return {
        "nodes": [{"name": name, "device": device, "flops": flops} for name, device, flops in made.nodes],
        "inner_steps": made.length.inner_steps,
        "reason": made.length.reason,
        "parameters": made.parameters,
        "samples": made.samples,
        "held_out_tokens": made.held_out_tokens,
        "unigram_loss": made.unigram_loss,
        "rounds": made.rounds,
        "update_bytes": made.update_bytes,
        "round_trip_ms": made.round_trip_ms,
        "nodes_min": made.nodes_min,
        "flops_together": made.flops_together,
        "token_budget": made.token_budget,
        "dtype": made.dtype,
        "caution": made.caution,
        "why_not": made.why_not,
        "costs": None if made.costs is None else asdict(made.costs),
    }


def print_plan(made: Plan) -> None:
    """What a job would do, in sentences."""
    out.print(
        f"Model of {format_count(made.parameters)} parameters in {made.dtype}, {made.samples:,} samples; "
        f"{format_count(made.token_budget)} tokens in about {made.rounds} round{'s' * (made.rounds != 1)}."
    )
    if made.unigram_loss is not None:
        out.print(
            f"Held out: {made.held_out_tokens:,} tokens; a unigram model has {made.unigram_loss:.3f} nats per token there."
        )
    out.print(f"An update takes {format_bytes(made.update_bytes)}. {made.length.reason}", markup=False)
    if made.caution:
        out.print(made.caution, markup=False, style="yellow")
    fastest = sorted(made.nodes, key=lambda node: -node[2])
    for name, device, flops in fastest[:NODES_SHOWN]:
        out.print(f"  {name:<16} {shown(device)}  {format_flops(flops)} in float32", markup=False)
    if len(fastest) > NODES_SHOWN:
        out.print(f"  and {len(fastest) - NODES_SHOWN} more")
    if made.why_not:
        out.print(f"{made.so_far} are there now; the job waits for more.", style="yellow")
        out.print(shown(made.why_not), markup=False, soft_wrap=True)
