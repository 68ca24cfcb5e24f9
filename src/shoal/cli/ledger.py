"""`shoal ledger`: a house ledger, by who runs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import places
from shoal.cli.app import MONEY, Commands, Group, app
from shoal.cli.output import JsonFlag, PublicFlag, WithParent, out, print_json, run, say_fee, until_stopped
from shoal.identity.accounts import address_text, parse_address
from shoal.quantities.money import format_money, parse_share
from shoal.sdk.local import shoal_home
from shoal.world import SystemClock
from shoal.world.processes import die_with_parent

ledger_app = Commands(cls=Group, help="Keep money for others: `shoal ledger start`.")
app.add_typer(ledger_app, name="ledger", rich_help_panel=MONEY)

DataFlag = Annotated[Path | None, typer.Option("--data", help="Its key and database.", show_default="~/.shoal/ledger")]


@ledger_app.command("start")
def start(
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where nodes and clients link to it: tcp://HOST:PORT with an address of this machine that they can "
            "reach. Port 0 takes a free one; a fixed one keeps the ticket the same after a restart.",
        ),
    ] = "tcp://127.0.0.1:0",
    currency: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="What it keeps; decided at its first start.", show_default="as before; USD"),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="SHOAL_LEDGER_DATABASE",
            show_envvar=False,
            help="postgresql+psycopg://USER@HOST/DATABASE; decided at its first start. With a password in it, say it in "
            "SHOAL_LEDGER_DATABASE: other users of this machine can see flags.",
            show_default="as before; SQLite in its folder",
        ),
    ] = None,
    fee: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="What it takes of what escrows pay, such as 2%. Another fee than before is announced, and holds for "
            "escrows that are opened a day later.",
            show_default="as before; nothing",
        ),
    ] = None,
    mint_max: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="A development mint: it gives so much at a time to whoever asks. For trying things out.",
            show_default="none",
        ),
    ] = None,
    public: PublicFlag = None,
    data: DataFlag = None,
    json: JsonFlag = False,
    with_parent: WithParent = 0,
) -> None:
    """Run a ledger: who pays whom, with a journal that anyone can check.

    It prints its ticket; give that to `shoal account create --ledger`. What it acknowledged survives a crash. Keep its
    folder: its key is who it is, and whoever has that key can book money.

    To try it out: `shoal ledger start --mint-max 1000`.
    """  # fmt: skip
    from shoal.house.server import LedgerServer, LedgerSettings
    from shoal.transport import TlsEndpoint

    if with_parent:
        die_with_parent(with_parent)
    if not public:
        places.refuse_wildcard(listen)
    settings = LedgerSettings(
        data=data or shoal_home() / "ledger", currency=currency, database=database, listen=listen,
        fee_ppm=None if fee is None else parse_share(fee),
        mint_max_micro=0 if mint_max is None else places.amount_of(mint_max), public=tuple(public or ()),
    )  # fmt: skip

    async def work() -> None:
        server = LedgerServer(settings, TlsEndpoint, SystemClock())
        ticket = await server.start()
        if json:
            print_json({"ready": "ledger", "ticket": str(ticket), "pid": os.getpid()})
        else:
            out.print(f"A ledger in [bold]{ticket.currency}[/] is up.  Ticket:", soft_wrap=True)
            out.print(str(ticket), soft_wrap=True, markup=False)
            for one in await server.fees():
                out.print(f"It takes {say_fee(one.table, SystemClock().now_ms())}.", markup=False)
            if settings.mint_max_micro:
                out.print(f"It gives {format_money(settings.mint_max_micro)} at a time to whoever asks.", markup=False)
            out.print("[dim]Ctrl-C stops it.[/]")
        try:
            await until_stopped()
        finally:
            await server.stop()

    run(work)


@ledger_app.command("deposit", context_settings={"ignore_unknown_options": True})
def deposit(
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="Whose it is: 0x and 40 hexadecimal digits.")],
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="How much, such as 25 or 0.35.")],
    reference: Annotated[
        str, typer.Option(metavar="TEXT", help="Where it came from, for both: the number of a payment.")
    ],
    data: DataFlag = None,
    json: JsonFlag = False,
) -> None:
    """Book money that you have got for an account outside of the ledger.

    On the machine where the ledger is kept, by who can read its key; the ledger may run meanwhile. The reference stands
    in the journal, which strangers can read.
    """  # fmt: skip
    from shoal.house import server

    address, micro = parse_address(account), places.amount_of(amount)
    server.deposit(data or shoal_home() / "ledger", address, micro, reference, SystemClock())
    if json:
        print_json({"account": address_text(address), "amount_micro": micro, "reference": reference})
    else:
        out.print(f"{format_money(micro)} booked for {address_text(address)}.", markup=False, soft_wrap=True)
