"""`shoal train`: from a job file to a model."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import places
from shoal.cli.app import app
from shoal.cli.output import HubFlag, Interrupted, JsonFlag, out, print_json, run
from shoal.cli.tables import RunView, print_report
from shoal.driver.report import Report
from shoal.errors import BadInput
from shoal.quantities import format_bytes, format_count
from shoal.sdk.jobfile import explain, parse_job, read_job_bytes
from shoal.sdk.train import Plan, TrainOptions, plan, resume, train


def _explain(wanted: bool) -> None:
    if wanted:
        for field in explain():
            out.print(f"[bold]{field.name}[/]  [dim]{field.default}[/]")
            out.print(f"    {field.meaning}", markup=False)
        raise typer.Exit


@app.command("train")
def train_command(
    job: Annotated[
        Path | None,
        typer.Argument(metavar="JOB.YAML", help="The job file; with --resume a run's folder.", show_default=False),
    ] = None,
    hub: HubFlag = None,
    runs: Annotated[Path, typer.Option(help="Where run folders go; this one's is RUNS/<name>.")] = Path("runs"),
    resume_run: Annotated[
        bool, typer.Option("--resume", help="Go on with the run of this job from its newest Commit.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Throw an earlier run of this name away.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; start nothing.")] = False,
    prompt: Annotated[str | None, typer.Option(help="Have the trained model continue this text.")] = None,
    listen: Annotated[
        str, typer.Option(help="Where nodes that cannot be dialled may link to this driver.")
    ] = "tcp://127.0.0.1:0",
    fields: Annotated[
        bool,
        typer.Option(
            "--fields",
            help="List every field of a job file with its default, and exit.",
            callback=_explain,
            is_eager=True,
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
    if job is None:
        raise BadInput("Name a job file: shoal train job.yaml (shoal train --fields lists what may stand in it).")
    folder: Path | None = None
    if resume_run and job.is_dir():
        folder, job = job, job / "job.yaml"
    text = read_job_bytes(job)
    job_file = parse_job(text, job)
    folder = folder or runs / job_file.name
    tickets = places.find_hubs(hub)
    view = RunView(job_file.name)
    options = TrainOptions(
        folder=folder,
        hubs=tickets,
        key=places.user_key(),
        listen=listen or None,
        replace=replace,
        prompt=prompt,
    )
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="shoal-plan-") as scratch:
            made = run(lambda: plan(job_file, options, Path(scratch) / "plan"))
        if json:
            print_json(_plan_fields(made))
        else:
            print_plan(made)
        return
    if not json:
        options.say, options.progress, options.event, options.audited = (
            view.say,
            view.progress,
            view.event,
            view.audited,
        )

    async def work() -> Report:
        try:
            return await (resume(job_file, options) if resume_run else train(job_file, text, options))
        except asyncio.CancelledError:
            raise Interrupted(
                f"Stopped. What was committed is kept; go on with: shoal train {folder} --resume"
            ) from None

    with view:
        made_report = run(work)
    if json:
        print_json(made_report)
    else:
        print_report(made_report)
        out.print(f"Model: {folder / 'model'}   Report: {folder / 'report.html'}", markup=False, soft_wrap=True)
    if made_report.goal is not None and not made_report.goal.reached:
        raise typer.Exit(1)


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
    }


def print_plan(made: Plan) -> None:
    """What a job would do, in sentences."""
    out.print(
        f"Model of {format_count(made.parameters)} parameters on {made.samples:,} samples, about {made.rounds} rounds."
    )
    out.print(
        f"Held out: {made.held_out_tokens:,} tokens; a unigram model has {made.unigram_loss:.3f} nats per token there."
    )
    out.print(f"An update takes {format_bytes(made.update_bytes)}. {made.length.reason}", markup=False)
    for name, device, flops in made.nodes:
        out.print(f"  {name:<16} {device}  {flops / 1e9:.1f} GFLOP/s", markup=False)
