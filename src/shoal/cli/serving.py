"""Processes that run until they are stopped: `shoal hub`, `shoal node start`, `shoal up`, `shoal down`."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import psutil
import typer
from rich.table import Table

from shoal.cli import places
from shoal.cli.app import HERE, MACHINES, Commands, Group, app
from shoal.cli.output import (
    NARROW,
    SHORT,
    BadFlag,
    HubFlag,
    JsonFlag,
    LedgerFlag,
    PublicFlag,
    WithParent,
    err,
    out,
    print_json,
    run,
    shown,
    until_stopped,
    when,
)
from shoal.errors import BadInput, ShoalError
from shoal.identity import short_id
from shoal.identity.accounts import address_text, parse_address
from shoal.protocol.ledgers import PaidAt
from shoal.protocol.offers import Place, ReclaimNoticeMs
from shoal.protocol.prices import Price
from shoal.quantities import format_bytes, format_duration_s, parse_bytes, parse_duration_s
from shoal.quantities.money import format_money, format_price, parse_price, places_for
from shoal.sdk.local import LocalProcessFailed, LocalShoal, shoal_home
from shoal.world import SystemClock, SystemDice
from shoal.world.processes import die_with_parent

if TYPE_CHECKING:
    from shoal.house import RemoteLedger
    from shoal.node.agent import NodeAgent
    from shoal.node.earned import Earned
    from shoal.node.hosted_job import HostSettings

NODES_MAX = 64
"""Nodes that `shoal up` starts on one machine."""
ENGINE_KEY_MAX = 4096
ENDED_SHOWN = 20
"""Escrows that are over, in the table of what a node has earned."""
PAYEES_MAX = 4
"""Accounts, the newest, whose balance is asked for."""
STOP_S = 30
"""`shoal up` gives each of its processes a third of that before it insists."""

DRIVER = ("shoal.sdk.hosted",)
"""The process in which a node drives a job."""
DRIVING_OF_PRICE = 20
"""It computes little: so much less than training does it cost where nothing else is said."""
node_app = Commands(cls=Group, help="Lend this machine to jobs: `shoal node start`.")
app.add_typer(node_app, name="node", rich_help_panel=MACHINES)


@app.command("hub", rich_help_panel=MACHINES)
def hub(
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where nodes and clients link to it: tcp://HOST:PORT with an address of this machine that they can "
            "reach. Port 0 takes a free one; a fixed one keeps the ticket the same after a restart.",
        ),
    ] = "tcp://127.0.0.1:0",
    http: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the HTTP face is; empty for none.")
    ] = "127.0.0.1:0",
    data: Annotated[Path | None, typer.Option(help="Its key and database.", show_default="~/.shoal/hub")] = None,
    name: Annotated[str, typer.Option(help="What it calls itself.")] = "hub",
    public: PublicFlag = None,
    json: JsonFlag = False,
    with_parent: WithParent = 0,
) -> None:
    """Run a hub: where nodes and clients of a shoal find each other.

    It prints its ticket; give that to `--hub` or SHOAL_HUB elsewhere. Everything it acknowledged survives a crash.
    Its HTTP face shows the offers, with an OpenAPI document at /schema.

    For a lab: `shoal hub --listen tcp://192.168.1.10:7700`. The ticket names the hub's key, so nobody else can answer
    in its place; keep the data directory, and the key with it.
    """  # fmt: skip
    from shoal.hub.server import HubServer, HubSettings
    from shoal.transport import TlsEndpoint

    if with_parent:
        die_with_parent(with_parent)
    if not public:
        places.refuse_wildcard(listen)
    settings = HubSettings(
        data=data or shoal_home() / "hub", listen=listen, http=http or None, name=name, public=tuple(public or ())
    )

    async def work() -> None:
        server = HubServer(settings, lambda key: TlsEndpoint(key), SystemClock())
        at = await server.start()
        if json:
            print_json({"ready": "hub", "ticket": str(at.ticket), "http": at.http, "pid": os.getpid()})
        else:
            out.print(f"Hub [bold]{name}[/] is up.  Ticket:", soft_wrap=True)
            out.print(str(at.ticket), soft_wrap=True, markup=False)
            if at.http:
                out.print(f"Offers: {at.http}/v1/offers   API: {at.http}/schema", markup=False)
            out.print("[dim]Ctrl-C stops it.[/]")
        try:
            await until_stopped()
        finally:
            await server.stop()

    run(work)


@node_app.command("start")
def node_start(
    hub: HubFlag = None,
    name: Annotated[
        str | None, typer.Option(help="What it is called in tables.", show_default="the host's name")
    ] = None,
    max_speed: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="The share of time in which it may compute, above 0 up to 1. What it measures and offers is the limited speed.",
        ),
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads to compute with.", show_default="all physical cores")
    ] = None,
    device: Annotated[
        str, typer.Option(help="A torch device such as cpu, cuda, cuda:1 or mps; auto takes the best there is.")
    ] = "auto",
    processes: Annotated[int, typer.Option(help="Processes that compute each step together (torch.distributed).")] = 1,
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where others link to it: tcp://HOST:PORT with an address of this machine that they can reach. Empty "
            "for a node that only opens links itself, as behind NAT.",
        ),
    ] = "tcp://127.0.0.1:0",
    storage: Annotated[str, typer.Option(metavar="BYTES", help="How much disk its blobs may take.")] = "20 GiB",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="How much of a device's memory it offers, such as '8 GiB'. Of a processor's, layers that are served "
            "take half; of a GPU's, nine tenths.",
            show_default="all",
        ),
    ] = None,
    price: Annotated[
        str | None, typer.Option(metavar="PRICE", help="What an hour of it costs, such as 0.35/h.", show_default="free")
    ] = None,
    currency: Annotated[str, typer.Option(help="Of the price.")] = "USD",
    account: Annotated[
        str | None,
        typer.Option(metavar="0x...", help="The account that it is paid at.", show_default="yours"),
    ] = None,
    ledger: LedgerFlag = None,
    notice: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="How long before it stops it tells jobs that pay for it: they work until then, and look for another "
            "node meanwhile. 0 s to 1 h.",
        ),
    ] = "60 s",
    drive: Annotated[
        str | None,
        typer.Option(
            metavar="PRICE",
            help="What an hour of driving a job costs that its owner has handed over (`shoal train --detach`); 'no' for "
            "driving none.",
            show_default="a twentieth of its price",
        ),
    ] = None,
    serve_free: Annotated[
        bool,
        typer.Option(
            "--serve-free",
            help="Serve models for nothing though training costs --price. Without it a node with a price serves for "
            "whoever has set money aside.",
        ),
    ] = False,
    country: Annotated[
        str | None, typer.Option(metavar="CC", help="Where it is, such as DE (ISO 3166-1).", show_default="not said")
    ] = None,
    region: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same as you name it: europe-west.", show_default="not said")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Its key and blobs.", show_default="~/.shoal/node")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible server on this machine to offer as well: its base, such as http://127.0.0.1:8080/v1.",
        ),
    ] = None,
    engine_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of its models.", show_default="the only one")
    ] = None,
    engine_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file with the API key that it asks for.", show_default="SHOAL_ENGINE_KEY"),
    ] = None,
    engine_only: Annotated[
        bool, typer.Option("--engine-only", help="Take no other work: the server needs this machine for itself.")
    ] = False,
    dishonest: Annotated[str, typer.Option(hidden=True, help="Lie in this way, for trying the defences.")] = "",
    json: JsonFlag = False,
    with_parent: WithParent = 0,
) -> None:
    """Measure this machine, offer it at the hubs, and work for the jobs that invite it.

    The work runs in a child process: whatever happens there, the node goes on. Ctrl-C leaves jobs in order, and their
    samples go to others; jobs that pay for the node first have their `--notice`, and a second Ctrl-C cuts that short.
    When a hub or the network is gone, the node comes back to it by itself.

    From another machine: `shoal node start --hub TICKET --listen tcp://192.168.1.20:7701`. A second node on one machine
    needs a `--data` of its own: a node is its key.

    With `--engine URL` the node has vLLM, SGLang, llama-server or another server beside it as a whole replica: any
    `shoal serve` of that model sends streams there while the server is up.
    """  # fmt: skip
    if with_parent:
        die_with_parent(with_parent)
    if not 0 < max_speed <= 1:
        raise BadFlag(f"--max-speed {max_speed} cannot be used: it is a share of full speed, above 0 up to 1.")
    if threads is not None and threads < 1:
        raise BadFlag(f"--threads {threads} cannot be used: at least one is needed.")
    if processes < 1:
        raise BadFlag(f"--processes {processes} cannot be used: at least one is needed.")
    places.refuse_wildcard(listen, "use an address of this machine, or --listen '' to open links only")
    if engine is None and (engine_model or engine_key or engine_only):
        raise BadFlag("--engine-model, --engine-key and --engine-only speak of a server; name it with --engine URL.")
    key = _engine_key(engine_key) if engine else ""
    storage_bytes = parse_bytes(storage)
    memory_bytes = parse_bytes(memory) if memory is not None else None
    named, place, notice_ms = _price(price, currency), _place(country, region), _notice_ms(notice)
    tickets = places.find_hubs(hub)
    driving = _driving(drive, named)
    paid = _paid_at(account, ledger) if named is not None and named.micro_per_h else None
    folder = data or shoal_home() / "node"
    if not json:
        err.print("Starting a node: it measures this machine for some seconds.", style="dim")
    from shoal.node.openai_server import ServerSettings  # takes seconds
    from shoal.node.start import start_node

    server = ServerSettings(engine, engine_model or "", key, engine_only) if engine else None

    async def work() -> None:
        agent = await start_node(
            folder,
            tickets,
            name=name,
            max_speed=max_speed,
            threads=threads or psutil.cpu_count(logical=False) or 1,
            device=device,
            processes=processes,
            listen=listen or None,
            storage_bytes=storage_bytes,
            memory_bytes=memory_bytes,
            dishonest=dishonest,
            price=named,
            paid=paid,
            reclaim_notice_ms=notice_ms,
            serve_free=serve_free,
            driving=driving,
            place=place,
            server=server,
            clock=SystemClock(),
            dice=SystemDice(),
        )
        try:
            if json:
                print_json(agent.ready())
            else:
                ready = agent.ready()
                offered = (
                    f" and offered at {ready['hubs']} of {len(tickets)} hub{'s' * (len(tickets) != 1)}"
                    if ready["hubs"]
                    else ", and offered as soon as a hub answers: none does now"
                )
                out.print(f"Node [bold]{ready['name']}[/] ({ready['node'][:8]}) is up{offered}.")
                for line in ready["devices"]:
                    out.print(f"  {line}", markup=False)
                if paid is not None and named is not None:
                    drives = f"driving a job for {format_price(driving.micro_per_h)}" if driving else "driving none"
                    out.print(
                        f"  price: {format_price(named.micro_per_h)} in {named.currency}, paid at "
                        f"{address_text(paid.account)}; {format_duration_s(notice_ms / 1000)} notice before it stops; {drives}",
                        markup=False, soft_wrap=True,
                    )  # fmt: skip
                if ready["engine"]:
                    out.print(f"  engine: {shown(ready['engine'])}", markup=False)
                out.print(f"  blobs: up to {format_bytes(storage_bytes)} in {folder}", markup=False)
                out.print("[dim]Ctrl-C stops it.[/]")
            await until_stopped(lambda: leave(agent.agent))
        finally:
            await agent.close()

    async def leave(agent: NodeAgent) -> None:
        gone = with_parent and os.getppid() != with_parent
        notice_s = None if gone else await agent.give_notice()
        if notice_s is None:
            return
        err.print(
            f"Jobs that pay for this node have {format_duration_s(notice_s)} notice: it stops then, or before when they "
            "have left.  Ctrl-C again stops it at once: what is under way is lost, and held against it.",
            soft_wrap=True,
        )
        await agent.vacated()

    run(work)


@node_app.command("stop")
def node_stop(
    data: Annotated[Path | None, typer.Option(help="The node's folder.", show_default="~/.shoal/node")] = None,
    json: JsonFlag = False,
) -> None:
    """Stop a node of this machine, as Ctrl-C does where it was started, and wait until it has stopped.

    Jobs that pay for it have its notice first. When none runs, says so and is content.
    """  # fmt: skip
    from shoal.node.stopping import places_taken, process_of

    folder = data or shoal_home() / "node"
    process = process_of(folder)
    if process is None:
        if json:
            print_json({"stopped": False})
        else:
            out.print(f"No node runs in {folder}.", markup=False)
        return
    places, notice_s = places_taken(folder, SystemClock().now_ms())
    process.terminate()
    if places and not json:
        what = "1 place is" if places == 1 else f"{places} places are"
        err.print(f"{what} paid for: it stops in {format_duration_s(notice_s)}, or before when the jobs have left.")
    try:
        process.wait(notice_s + STOP_S)
    except psutil.TimeoutExpired as error:
        raise LocalProcessFailed(
            f"The node in {folder} (process {process.pid}) was asked to stop and still runs after "
            f"{format_duration_s(notice_s + STOP_S)}; end it with: kill -9 {process.pid}"
        ) from error
    if json:
        print_json({"stopped": True, "pid": process.pid, "places": places})
    else:
        out.print(f"Stopped the node in {folder}.", markup=False)


@node_app.command("earnings")
def node_earnings(
    data: Annotated[Path | None, typer.Option(help="The node's folder.", show_default="~/.shoal/node")] = None,
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show what a node has been paid: for whom it worked, what came and what is still to come.

    Read from the node's folder, also while it runs: open escrows, and the newest 4,096 that are over. What vouchers are
    for is paid, to come or withheld. A voucher is for an account: nodes that are paid at one, out of one escrow, each
    show all of it. Where a ledger is known and answers, what the account has there stands below.
    """  # fmt: skip
    from shoal.node.earned import read_earned

    earned = read_earned(data or shoal_home() / "node", SystemClock().now_ms())
    days = earned.by_day(lambda at_ms: when(at_ms, "%Y-%m-%d"))
    balances, trouble = _balances(earned, ledger)
    if json:
        print_json(
            {
                "escrows": [
                    {
                        **vars(one), "client": one.client.hex(), "payer": address_text(one.payer),
                        "coming_micro": one.coming_micro, "paid_micro": one.paid_micro,
                        "fee_micro": one.fee_micro,
                    }
                    for one in earned.escrows
                ],
                "totals": [vars(one) for one in earned.totals],
                "days": [{"day": day, "currency": of, "micro": micro} for (day, of), micro in days.items()],
                "balances": balances,
                "balances_trouble": trouble,
            }
        )  # fmt: skip
        return
    _print_earned(earned, days)
    for one in balances:
        out.print(f"{one['account']} has {format_money(one['balance_micro'])} {one['currency']}.", markup=False)
    if trouble:
        err.print(shown(f"The balance is not known: {trouble}"), style="dim", markup=False, soft_wrap=True)


def _balances(earned: Earned, named: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """What the accounts that the node was paid at have; why that is not known, if it is not."""
    from shoal.cli.accounts import ask

    try:
        ticket = places.ledger_ticket(named)
        accounts = [one for one, currency in earned.payees.items() if currency == ticket.currency][-PAYEES_MAX:]
        accounts = accounts or [places.account_key().address]

        async def work(one: RemoteLedger) -> list[int]:
            return [await one.balance(account) for account in accounts]

        found = ask(ticket, work)
    except ShoalError as error:
        if named is not None and isinstance(error, BadInput):
            raise
        return [], error.sentence
    return [
        {"account": address_text(account), "currency": ticket.currency, "balance_micro": micro}
        for account, micro in zip(accounts, found, strict=True)
    ], None


def _print_earned(earned: Earned, days: dict[tuple[str, str], int]) -> None:
    if not earned.escrows:
        out.print("Nothing was earned yet.")
        return
    over = [one for one in earned.escrows if one.over]
    rows = [*(one for one in earned.escrows if not one.over), *over[:ENDED_SHOWN]]
    withheld = any(one.withheld_micro for one in rows)
    wide = out.width >= NARROW  # else without the sum of the others
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("client", "escrow"):
        table.add_column(name, no_wrap=True)
    for name in (*(["vouchers"] if wide else []), "paid", "to come", *(["withheld"] if withheld else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ends", overflow="fold")
    places = places_for(micro for one in rows for micro in (one.vouchers_micro, one.paid_micro, one.coming_micro))
    for one in rows:
        figures = [one.paid_micro, one.coming_micro, *([one.withheld_micro] if withheld else [])]
        figures = [one.vouchers_micro, *figures] if wide else figures
        rest = f"; the rest comes {when(one.settles_ms)}" if one.settles_ms is not None and one.coming_micro else ""
        table.add_row(
            short_id(one.client), one.escrow.hex()[:SHORT], *(format_money(micro, places) for micro in figures),
            f"{when(one.ends_ms)}{', over' if one.over else ''}{rest}",
        )  # fmt: skip
    out.print(table)
    if len(over) > ENDED_SHOWN:
        out.print(f"[dim]{len(over) - ENDED_SHOWN} older ones are left out; --json shows all.[/]")
    for (day, currency), micro in list(days.items())[:ENDED_SHOWN]:
        out.print(f"Over on {day}: {format_money(micro)} {currency}", markup=False)
    for total in earned.totals:
        out.print(
            f"In all {format_money(total.paid_micro)} {total.currency} paid, {format_money(total.coming_micro)} to come"
            + (f", {format_money(total.withheld_micro)} withheld." if total.withheld_micro else ".")
            + (f" Of what was paid, ledgers took {format_money(total.fee_micro)}." if total.fee_micro else ""),
            markup=False,
        )


def _price(text: str | None, currency: str) -> Price | None:
    if text is None:
        return None
    try:
        return msgspec.convert({"micro_per_h": parse_price(text), "currency": currency}, Price)
    except msgspec.ValidationError as error:
        raise BadFlag(f"--price {text} {currency} cannot be used: {error}.") from error


def _driving(text: str | None, price: Price | None) -> HostSettings | None:
    """What the node asks for driving a job; None where it drives none."""
    from shoal.node.hosted_job import HostSettings

    hour = price.micro_per_h if price is not None else 0
    if text is None:
        return HostSettings(hour // DRIVING_OF_PRICE, DRIVER)
    if text == "no":
        return None
    micro_per_h = parse_price(text)
    if micro_per_h and not hour:
        raise BadFlag(f"--drive {text} needs a --price: a node that works for nothing has no account to be paid at.")
    return HostSettings(micro_per_h, DRIVER)


def _notice_ms(text: str) -> int:
    try:
        return msgspec.convert(round(1000 * parse_duration_s(text)), ReclaimNoticeMs)
    except msgspec.ValidationError as error:
        raise BadFlag(f"--notice {text} cannot be used: it is from 0 s to 1 h.") from error


def _paid_at(account: str | None, ledger: str | None) -> PaidAt:
    """Raises BadAccount, NoAccount, NoLedger."""
    address = parse_address(account) if account is not None else places.account_key().address
    return PaidAt(places.ledger_ticket(ledger), address)


def _place(country: str | None, region: str | None) -> Place | None:
    if country is None and region is None:
        return None
    try:
        return msgspec.convert({"country": country, "region": region}, Place)
    except msgspec.ValidationError as error:
        raise BadFlag(
            f"--country {country or ''} --region {region or ''} cannot be used: two capitals such as DE, and a name of "
            "small letters, digits and dashes."
        ) from error


def _engine_key(file: Path | None) -> str:
    """What the server beside a node asks for; never an argument, which every user of the machine can see."""
    try:
        key = os.environ.get("SHOAL_ENGINE_KEY", "") if file is None else file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFlag(f"--engine-key {file} cannot be read: {error}.") from error
    if (file is not None and not key) or not key.isascii() or not key.isprintable() or len(key) > ENGINE_KEY_MAX:
        raise BadFlag(f"{file or 'SHOAL_ENGINE_KEY'} holds no API key: one line of printable ASCII.")
    return key


def parse_speeds(text: str | None, nodes: int) -> list[float]:
    """`"1,0.5,0.25"` -> a speed per node; one for each, the last one for the rest. Raises BadFlag."""
    if text is None:
        return [1.0] * nodes
    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        raise BadFlag(f"--speeds {text!r} cannot be used; write for example --speeds 1,0.5,0.25.") from None
    if len(speeds) > nodes:
        raise BadFlag(f"--speeds names {len(speeds)} speeds, --nodes says {nodes}.")
    if any(not 0 < speed <= 1 for speed in speeds):
        raise BadFlag(f"--speeds {text!r} cannot be used: each is a share of full speed, above 0 up to 1.")
    return speeds + [speeds[-1]] * (nodes - len(speeds))


@app.command("up", rich_help_panel=HERE)
def up(
    nodes: Annotated[int, typer.Option(help="How many nodes.")] = 3,
    speeds: Annotated[
        str | None,
        typer.Option(
            help="Their speed limits, such as 1,0.5,0.25; the last is for all further ones.", show_default="all 1"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of each node.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Run a hub and nodes on this machine, until Ctrl-C or `shoal down`.

    Every other command then finds them without flags: try `shoal offers`, and `shoal train job.yaml`. Mixed speeds can
    be tried with `--speeds 1,0.5,0.25`.
    """  # fmt: skip
    if not 1 <= nodes <= NODES_MAX:
        raise BadFlag(f"--nodes {nodes} cannot be used: from 1 to {NODES_MAX}.")
    if threads < 1:
        raise BadFlag(f"--threads {threads} cannot be used: at least one is needed.")
    limits = parse_speeds(speeds, nodes)
    running = places.find_local()
    if running is not None:
        raise BadFlag(f"A shoal runs here already (process {running.pid}); stop it first with: shoal down")

    async def work() -> None:
        async with LocalShoal(places.local_folder()) as shoal:
            hub_process = await shoal.start_hub()
            names = [f"node-{number + 1}" for number in range(nodes)]
            if not json:
                out.print(f"Starting a hub and {nodes} nodes; each measures itself for a few seconds.")
            await asyncio.gather(
                *(
                    shoal.start_node(name, max_speed=limit, options=["--threads", str(threads)])
                    for name, limit in zip(names, limits, strict=True)
                )
            )
            me = psutil.Process()
            described: list[dict[str, Any]] = [
                {
                    "name": name,
                    "pid": shoal.nodes[name].pid,
                    "node": shoal.nodes[name].ready["node"],
                    "max_speed": limit,
                }
                for name, limit in zip(names, limits, strict=True)
            ]
            state = places.LocalRun(
                me.pid, me.create_time(), shoal.hub_tickets, hub_process.ready.get("http"), described
            )
            places.write_local(state)
            if json:
                print_json({"ready": "up", **state.__dict__})
            else:
                for one in described:
                    out.print(
                        f"  {one['name']:<10} {one['node'][:8]}  speed limit {one['max_speed']:g}  process {one['pid']}"
                    )
                out.print(f"Offers: {state.http}/v1/offers", markup=False)
                out.print(
                    "In another terminal: [bold]shoal train job.yaml[/], or [bold]shoal serve MODEL[/]. "
                    "[dim]Ctrl-C stops everything.[/]"
                )
            try:
                await until_stopped()
            finally:
                places.forget_local()

    run(work)


@app.command("down", rich_help_panel=HERE)
def down(json: JsonFlag = False) -> None:
    """Stop the shoal that `shoal up` runs on this machine.

    When none runs, says so and is content.
    """  # fmt: skip
    running = places.find_local()
    if running is None:
        if json:
            print_json({"stopped": False})
        else:
            out.print("No shoal runs on this machine.")
        return
    running.stop()
    until = time.monotonic() + STOP_S
    while running.alive and time.monotonic() < until:
        time.sleep(0.1)
    if running.alive:
        raise LocalProcessFailed(
            f"`shoal up` (process {running.pid}) was asked to stop and still runs after {STOP_S} s; end it with: "
            f"kill -9 {running.pid}"
        )
    if json:
        print_json({"stopped": True, "pid": running.pid})
    else:
        out.print(f"Stopped the hub and {len(running.nodes)} node(s).")
