"""Commands that look at what was done: `shoal report`, `shoal replay`, `shoal receipts`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from shoal.cli import places
from shoal.cli.app import JOBS, app
from shoal.cli.output import BadFlag, HubFlag, JsonFlag, err, out, print_json, run, shown
from shoal.errors import BadInput, LinkError
from shoal.identity import KeyPair
from shoal.quantities import format_bytes
from shoal.world import SystemClock, SystemDice

if TYPE_CHECKING:
    from shoal.gateway.receipts import Accounts


@app.command("report", rich_help_panel=JOBS)
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")],
    json: JsonFlag = False,
) -> None:
    """Show who did what in a run; the page for looking at is RUN/report.html.

    Counted from the signed records in the folder, also while the run goes on or after its driver was killed. `--json`
    prints what report.json holds.
    """  # fmt: skip
    from shoal.cli.tables import print_report
    from shoal.driver.folder import RunFolder
    from shoal.driver.report import Figures
    from shoal.driver.write_report import make_report, write_missing_page

    with RunFolder.open(places.find_run(run_folder), read_only=True) as folder:
        made = make_report(folder, folder.read("figures.json", Figures) or Figures())
        write_missing_page(folder, made)
    if json:
        print_json(made)
    else:
        print_report(made)
        out.print(f"The page: {run_folder / 'report.html'}", markup=False)


@app.command("replay", rich_help_panel=JOBS)
def replay(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")],
    round_number: Annotated[int, typer.Option("--round", "-r", help="Which round.")],
    node: Annotated[str, typer.Option("--node", "-n", help="Whose work: a node's name, or the beginning of its id.")],
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads to compute with; other than the node used, the comparison is within thresholds.",
            show_default="as many as the node used",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device to compute on.")] = "cpu",
    script: Annotated[
        Path | None,
        typer.Option(help="The script of a loop of your own; it is run on this machine.", show_default=False),
    ] = None,
    hub: HubFlag = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where a node that cannot be dialled links to this replay: tcp://HOST:PORT with an address of this "
            "machine that it can reach. Empty for none.",
        ),
    ] = "tcp://127.0.0.1:0",
    json: JsonFlag = False,
) -> None:
    """Recompute a node's work of one round, and say whether it is what the node claimed.

    Says *match*, *mismatch* or *not replayable*, with the measured difference beside the threshold. What a node keeps
    private (optimizer state, residual) is opened by the node, if it can be reached, or found in the run's folder.
    After the quickstart, for example: `shoal replay runs/quickstart --round 2 --node amber`.

    Exit code 0 on match, 3 on mismatch, 4 when it cannot be replayed; 1 and 2 are errors, as everywhere.
    """  # fmt: skip
    from shoal.sdk.replay import replay_round

    if threads is not None and threads < 1:
        raise BadFlag(f"--threads {threads} cannot be used: at least one is needed.")
    places.refuse_wildcard(listen, "use an address of this machine, or --listen '' where the node can be dialled")
    places.find_run(run_folder)
    tickets = []
    with contextlib.suppress(BadInput):
        tickets = places.find_hubs(hub)

    async def work() -> int:
        try:
            result = await replay_round(
                run_folder,
                round_number,
                node,
                key=KeyPair.generate(),
                hubs=tickets,
                listen=listen or None,
                threads=threads,
                device=device,
                script=script,
                clock=SystemClock(),
                dice=SystemDice(),
                say=(lambda text: None) if json else lambda text: err.print(f"[dim]{text}[/]"),
            )
        except LinkError as error:
            raise BadInput(f"The hubs could not be asked: {error}") from error
        if json:
            print_json(result)
        else:
            colour = {"match": "green", "mismatch": "red"}.get(result.verdict, "yellow")
            out.print(
                f"[bold {colour}]{result.verdict}[/]  round {result.round}, {escape(result.name)} ({result.node[:8]})"
            )
            if result.difference is not None:
                out.print(
                    f"measured difference {result.difference:.3g}, threshold {result.threshold:.3g} ({result.measure})"
                )
            out.print(shown(result.sentence), markup=False)
            out.print(
                f"[dim]{result.rounds_computed} round(s) computed, {format_bytes(result.opened_bytes)} of private state opened[/]"
            )
        return {"match": 0, "mismatch": 3}.get(result.verdict, 4)

    code = run(work)
    if code:
        raise typer.Exit(code)


class NoReceipts(BadInput):
    """A folder that was named holds no receipts."""

    code = "SH-106"


@app.command("receipts", rich_help_panel=JOBS)
def receipts(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="What `shoal serve --data` named.", show_default="all below ~/.shoal/serve"),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Show what nodes did for the models that were served, by the receipts that they signed.

    Every signature is checked again. Work is what a node computed: the positions that it took through each of its
    layers, guesses and repeats included. Receipts that claim more than the gateway saw go through are disputed and count nothing; a
    missing one is a stage that was given work and did not answer for it, as a node that died.

    Exit code 1 where a line is not what was signed.
    """  # fmt: skip
    from shoal.gateway.receipts import Accounts, holds_receipts, read_accounts
    from shoal.sdk.local import shoal_home

    served = shoal_home() / "serve"
    named = [folder] if folder is not None else sorted(served.glob("*"))
    folders = [path for path in named if holds_receipts(path)]
    if not folders:
        where = folder or served
        raise NoReceipts(f"{where} holds no receipts; nodes give them for what `shoal serve` has them do.")
    found = Accounts()
    for path in folders:
        read_accounts(path, found)
    if json:
        print_json({"nodes": [vars(one) for one in found.nodes.values()], "disputed": found.disputed, "bad": found.bad})
    else:
        _print_accounts(found)
    if found.bad:
        raise typer.Exit(1)


def _print_accounts(found: Accounts) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("node", overflow="fold")
    table.add_column("id", no_wrap=True)
    for name in ("sessions", "prompt", "generated", "positions", "work", "disputed", "missing"):
        table.add_column(name, justify="right", overflow="fold")
    for one in sorted(found.nodes.values(), key=lambda one: -one.layer_positions):
        figures = (
            one.sessions, one.prompt_tokens, one.generated_tokens, one.computed_positions, one.layer_positions,
            one.disputed, one.missing,
        )  # fmt: skip
        table.add_row(escape(shown(one.name)), one.node[:8], *(f"{figure:,}" for figure in figures))
    out.print(table)
    for line in found.disputed:
        who = escape(shown(line.name or line.node[:8]))
        out.print(f"[red]disputed[/]  {who}: {escape(shown(line.reason))}", soft_wrap=True)
    for trouble in found.bad:
        out.print(f"[red]not as signed[/]  {escape(shown(trouble))}", soft_wrap=True)
