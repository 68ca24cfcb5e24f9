"""`shoal market verify`: whether a batch of orders was cleared as it had to be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.app import MACHINES, Commands, Group, app
from shoal.cli.output import BadFlag, JsonFlag, out, print_json, shown
from shoal.errors import BadInput, BadRecord

WRONG, MISSING = 3, 4
"""Exit codes."""

market_app = Commands(cls=Group, help="Check what auctioneers publish: `shoal market verify`.")
app.add_typer(market_app, name="market", rich_help_panel=MACHINES)


class NoBatch(BadInput):
    """A file that was named holds no published batch."""

    code = "SH-107"


@market_app.command("verify")
def verify(
    batch: Annotated[Path, typer.Argument(metavar="BATCH", help="A file that an auctioneer has published of a batch.")],
    order: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A signed order: say what became of it, or that it is missing; several times for several.",
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Clear a batch again from its signed orders, and say whether the auctioneer did as it had to.

    Says *right*, with the price of each block and why it is that, or *wrong*, with the first trade that differs. An order
    that was signed for this batch and is not in it is told.

    Exit code 0 when it is right, 3 when it is wrong, 4 when it is right and an order is missing; 1 and 2 are errors, as
    everywhere.
    """  # fmt: skip
    from shoal.identity import Envelope
    from shoal.market.publishing import FILE_MAX_BYTES, Published, left_out, verified
    from shoal.protocol.orders import ORDER_MAX_BYTES

    try:
        published = Published.from_bytes(_read(batch, FILE_MAX_BYTES))
    except BadRecord as error:
        raise NoBatch(
            f"{batch} cannot be checked: {error.sentence} Name a file as the auctioneer published it."
        ) from error
    try:
        checked = verified(published)
    except BadRecord as error:
        if json:
            print_json({"right": False, "code": error.code, "sentence": error.sentence})
        else:
            out.print("[bold red]wrong[/]  ", end="")
            out.print(shown(error.sentence), markup=False, soft_wrap=True)
        raise typer.Exit(WRONG) from error
    asked = []
    for path in order or ():
        try:
            missing, sentence = left_out(
                checked, Envelope.from_bytes(_read(path, ORDER_MAX_BYTES * 2), ORDER_MAX_BYTES)
            )
        except BadRecord as error:
            raise BadFlag(f"--order {path} cannot be used: {error.sentence}") from error
        asked.append({"file": str(path), "missing": missing, "sentence": sentence})
    outcome = checked.outcome
    if json:
        print_json(
            {
                "right": True,
                "auctioneer": checked.auctioneer,
                "batch": checked.batch.number,
                "closed_ms": checked.batch.closed_ms,
                "previous": checked.batch.previous,
                "clearing": checked.clearing,
                "orders": outcome.reasons,
                "markets": list(outcome.markets.values()),
                "cleared": outcome.cleared,
                "asked": asked,
            }
        )
    else:
        out.print("[bold green]right[/]  ", end="")
        said = f"Batch {checked.batch.number} of {checked.auctioneer.hex()}: {len(checked.orders)} orders, of which "
        out.print(f"{said}{len(outcome.left_out)} got less than they asked for.", markup=False, soft_wrap=True)
        for line in (*outcome.markets.values(), *(one["sentence"] for one in asked)):
            out.print(shown(str(line)), markup=False, soft_wrap=True)
    if any(one["missing"] for one in asked):
        raise typer.Exit(MISSING)


def _read(path: Path, most: int) -> bytes:
    """At most one byte more than may be in it."""
    with path.open("rb") as file:
        return file.read(most + 1)
