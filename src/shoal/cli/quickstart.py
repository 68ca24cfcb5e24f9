"""`shoal quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import places
from shoal.cli.app import HERE, app
from shoal.cli.output import JsonFlag, out, print_json, run, shoal_command, to_plain
from shoal.cli.tables import RunView, print_asked, print_completion, print_report
from shoal.quantities import parse_count
from shoal.sdk.quickstart import TOKENS, QuickstartOptions, found_out, quickstart
from shoal.sdk.train import TrainOptions


@app.command("quickstart", rich_help_panel=HERE)
def quickstart_command(
    seed: Annotated[int, typer.Option(help="Draws who is killed, who lies and how, and the start weights.")] = 0,
    honest: Annotated[bool, typer.Option("--honest", help="Let nobody lie.")] = False,
    tokens: Annotated[str, typer.Option(help="How much to train.")] = str(TOKENS),
    files: Annotated[int, typer.Option(help="Of how many of Python's own source files.")] = 400,
    runs: Annotated[Path, typer.Option(help="Where the folder goes: RUNS/quickstart.")] = Path("runs"),
    json: JsonFlag = False,
) -> None:
    """Train a small model on five unequal nodes on this machine, one of which dies, one comes late, and one lies.

    Then the nodes that are left serve it, and it is asked something through the endpoint. Takes about four minutes on two
    cores. Everything it leaves is in runs/quickstart: the model, every signed record,
    report.html, report.json. Exit code 0 only if the model learned what it should.
    """
    view = RunView("quickstart")

    def add_view(options: TrainOptions) -> TrainOptions:
        if not json:
            options.say, options.progress = view.say, view.progress
            options.event, options.audited = view.event, view.audited
        return options

    options = QuickstartOptions(
        folder=runs / "quickstart",
        key=places.user_key(),
        seed=seed,
        honest=honest,
        tokens=parse_count(tokens),
        files_max=files,
        say=(lambda _: None) if json else view.say,
        train=add_view,
    )
    with view:
        report, truth, asked = run(lambda: quickstart(options))
    told = found_out(report, truth)
    if json:
        print_json(to_plain(report) | {"asked": asked})
    else:
        print_completion(report)
        print_report(report)
        out.print(told, markup=False)
        if report.goal is not None and report.goal.reached:
            out.print(f"Goal reached. {report.goal.sentence}", markup=False)
        liar = truth.liar or next(node.name for node in report.nodes if node.name != truth.killed)
        honest_name = next(name for name in (node.name for node in report.nodes) if name not in (liar, truth.killed))
        folder = options.folder
        if asked is not None:
            print_asked(asked, f"{shoal_command()} serve {folder}")
        out.print(f"Look at {folder / 'report.html'}, and see for yourself:", markup=False)
        for name, verdict in ((liar, "   # mismatch" if truth.liar else ""), (honest_name, "   # match")):
            command = f"  {shoal_command()} replay {folder} --round 2 --node {name}{verdict}"
            out.print(command, markup=False, soft_wrap=True)
    if report.goal is None or not report.goal.reached:
        raise typer.Exit(1)
