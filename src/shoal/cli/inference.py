"""Serving a model: `shoal serve`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import psutil
import typer

from shoal.cli import places
from shoal.cli.app import JOBS, app
from shoal.cli.output import (
    BadFlag,
    HubFlag,
    JsonFlag,
    LedgerFlag,
    WithParent,
    err,
    out,
    print_json,
    run,
    shown,
    until_stopped,
)
from shoal.cli.tables import print_bill
from shoal.protocol.hubs import HubTicket
from shoal.quantities import format_count, parse_duration_s
from shoal.quantities.money import format_money, format_price, parse_money
from shoal.sdk.local import shoal_home
from shoal.sdk.places import NoHub
from shoal.world import SystemClock, SystemDice
from shoal.world.processes import die_with_parent

if TYPE_CHECKING:
    from shoal.gateway.service import ModelService

SESSIONS_MAX = 4096
SPENT_EVERY_S = 1.0
SPENT_EVERY_SHARE = 0.1
"""Where standard error is no terminal a line says what is spent whenever that is so much more of the budget."""


@app.command("serve", rich_help_panel=JOBS)
def serve(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A checkpoint directory in Hugging Face format, or a run folder of `shoal train`."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What clients call it.", show_default="the directory's name")] = None,
    http: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the endpoint is; port 0 takes a free one.")] = (
        "127.0.0.1:8000"
    ),
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="A file of API keys, one a line, of which every request must carry one, each with its limits: "
            "KEY name=alice requests=60 tokens=100000 at-once=4 (a minute; each may be left out). It is read again when "
            "it has changed.",
            show_default="none asked",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="With --here: CPU threads to compute with.", show_default="all physical cores")
    ] = None,
    device: Annotated[str, typer.Option(help="With --here: a torch device such as cpu, cuda or mps.")] = "cpu",
    hub: HubFlag = None,
    here: Annotated[
        bool, typer.Option("--here", help="Hold the model on this machine, whatever nodes there are.")
    ] = False,
    listen: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where nodes link to this gateway: tcp://HOST:PORT.")
    ] = "tcp://127.0.0.1:0",
    sessions: Annotated[
        int, typer.Option(help="Streams of the whole context for which nodes hold memory; shorter ones are more.")
    ] = 16,
    guess: Annotated[
        bool,
        typer.Option(help="Guess tokens that repeat what was said before, so that a crossing may bring several."),
    ] = True,
    draft: Annotated[
        Path | None,
        typer.Option(
            help="A small checkpoint with the same tokenizer: it guesses on this machine, the model checks.",
            show_default="none",
        ),
    ] = None,
    engine_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What servers beside nodes (`shoal node start --engine`) call this model.",
            show_default="what clients call it",
        ),
    ] = None,
    engines_only: Annotated[
        bool,
        typer.Option(
            "--engines-only",
            help="Serve it from such servers alone: nodes hold no layers, and MODEL needs no weights, only config and tokenizer.",
        ),
    ] = False,
    token_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="What a token of one stream may take at nodes, links included and as measured, such as '80 ms': slower ones "
            "are not taken, and of those that cost something the cheapest that keep it are.",
            show_default="none",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="MONEY",
            help="What nodes that serve it may cost from this start to the next, at most, such as 2.50, in the ledger's "
            "currency. Without one it takes only nodes that serve for nothing.",
            show_default="none",
        ),
    ] = None,
    ledger: LedgerFlag = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The gateway's key, the receipts of nodes, and what they were paid.",
            show_default="~/.shoal/serve/NAME",
        ),
    ] = None,
    json: JsonFlag = False,
    with_parent: WithParent = 0,
) -> None:
    """Serve a model to OpenAI clients: on the nodes at the hubs, or on this machine where there is no hub.

    Whole replicas go to nodes that can hold the model, stages to several where none can; a stream goes on elsewhere,
    token for token, when a node is lost.

    `shoal serve runs/quickstart` serves what was trained. Then, with any OpenAI client, base URL
    http://127.0.0.1:8000/v1; or with curl as it prints.

    A node with a server of its own (vLLM, SGLang, llama-server, ...) that serves the model is a whole replica, too. Such
    servers are not exact: a stream that one of them broke goes on from what was said, and its answer tells so.

    With `--budget` it takes nodes that cost something where those that cost nothing are not enough: those of the
    cheapest plan, or one with a server of its own that costs less. They are paid for what they serve; when it ends the
    bill is shown, and the rest comes back.

    Families that are served: llama, mistral, qwen2, qwen3, gemma, gemma2, phi3, gpt2, gpt_neox. Tokens are those of
    plain transformers, and do not depend on what else is served at the time.
    """  # fmt: skip
    if with_parent:
        die_with_parent(with_parent)
    if threads is not None and threads < 1:
        raise BadFlag(f"--threads {threads} cannot be used: at least one is needed.")
    if not 1 <= sessions <= SESSIONS_MAX:
        raise BadFlag(f"--sessions {sessions} cannot be used: from 1 to {SESSIONS_MAX}.")
    if engines_only and here:
        raise BadFlag("--engines-only and --here contradict each other: such servers are found at hubs.")
    token_ms_max = math.inf if token_time is None else 1000 * parse_duration_s(token_time)
    if token_time is not None and (here or not token_ms_max > 0):
        raise BadFlag(f"--token-time {token_time} cannot be used: it is more than 0, and of nodes, so not with --here.")
    if budget is not None and here:
        raise BadFlag("--budget pays nodes; leave it out with --here.")
    spending = places.spending(parse_money(budget) if budget is not None else None, ledger)
    tickets = () if here else tuple(places.find_hubs(hub)) if engines_only else _hubs(hub)
    if spending is not None and not tickets:
        raise BadFlag("--budget pays nodes, and no hub is known to find them at: name one with --hub.")
    if token_time is not None and not tickets:
        raise BadFlag("--token-time is of nodes, and no hub is known to find them at: name one with --hub.")
    if tickets:
        places.refuse_wildcard(listen, "use an address of this machine that nodes can reach")
    called = name or (model.resolve().parent.name if model.resolve().name == "model" else model.resolve().name)
    if not json:
        err.print(f"Loading {shown(str(model))}.", markup=False, style="dim", soft_wrap=True)
    from shoal.sdk.serve import LocalServer, NodesServer, ServeOptions  # takes seconds

    options = ServeOptions(
        model=model,
        name=called,
        http=http,
        key_file=api_keys,
        threads=threads or psutil.cpu_count(logical=False) or 1,
        device=device,
        hubs=tickets,
        data=(data or shoal_home() / "serve" / re.sub(r"[^A-Za-z0-9._-]", "_", called)) if tickets else None,
        listen=listen,
        sessions=sessions,
        guess=guess,
        draft=draft,
        engine_model=engine_model or "",
        engines_only=engines_only,
        token_ms_max=token_ms_max,
        spending=spending,
        say=lambda sentence: err.print(sentence, markup=False, style="dim"),
    )

    async def work() -> None:
        server = (NodesServer if tickets else LocalServer)(options, SystemClock(), SystemDice())
        url = await server.start()
        service = server.service
        assert service is not None
        try:
            if json:
                print_json({"ready": "serve", "url": f"{url}/v1", "model": called, "context": service.context,
                            "nodes": bool(tickets), "pid": os.getpid()})  # fmt: skip
            else:
                served = "is served" if service.rings else "will be served, as soon as nodes hold it,"
                out.print(
                    f"[bold]{called}[/] {served} at {url}/v1, {service.context} tokens of context.", soft_wrap=True
                )
                key = "-H 'Authorization: Bearer KEY' " if api_keys else ""
                body = msgspec.json.encode(
                    {"model": called, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
                ).decode()
                out.print(f"  curl {url}/v1/chat/completions {key}-d '{body}'", markup=False, soft_wrap=True)
                out.print("[dim]Ctrl-C stops it.[/]")
            async with _spending_shown(service):
                await until_stopped()
        finally:
            await server.stop()
            bill = service.paying.bill if service.paying is not None else None
            if bill is not None and json:
                print_json({"bill": bill})
            elif bill is not None:
                print_bill(bill)

    run(work)


@contextlib.asynccontextmanager
async def _spending_shown(service: ModelService) -> AsyncIterator[None]:
    """What nodes have been promised, while they serve."""
    if service.paying is None:
        yield
        return
    watching = asyncio.create_task(_show_spending(service))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _show_spending(service: ModelService) -> None:
    assert service.paying is not None
    purse, currency, clock, said = service.paying.purse, service.paying.currency, SystemClock(), 0
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(err.status("")) if err.is_terminal else None
        while True:
            spent = purse.payments.spent_micro
            figures = (
                f"{format_money(spent)} of {format_money(purse.budget_micro)} {currency} spent  "
                f"up to {format_price(purse.micro_per_h)}  {format_count(service.counts.tokens)} tokens  "
                f"requests under way: {service.counts.running}"
            )
            if line is not None:
                line.update(figures)
            elif spent - said >= SPENT_EVERY_SHARE * purse.budget_micro:
                said = spent
                err.print(figures, markup=False, soft_wrap=True)
            await clock.sleep(SPENT_EVERY_S)


def _hubs(named: list[str] | None) -> tuple[HubTicket, ...]:
    """The hubs to find nodes at; none where none is known."""
    try:
        return tuple(places.find_hubs(named))
    except NoHub:
        err.print("No hub is known: this machine holds the model.", style="dim")
        return ()
