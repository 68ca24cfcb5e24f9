"""The list of commands, which each file of commands adds its own to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from shoal import __version__
from shoal.cli import output

F = TypeVar("F", bound=Callable[..., Any])
COMMANDS = {
    "quickstart": "quickstart",
    "up": "serving",
    "down": "serving",
    "train": "training",
    "attach": "training",
    "plan": "training",
    "jobs": "jobs",
    "report": "looking",
    "replay": "looking",
    "serve": "inference",
    "chat": "chat",
    "receipts": "looking",
    "hub": "serving",
    "node": "serving",
    "offers": "offers",
    "account": "accounts",
    "ledger": "ledger",
    "market": "market",
}
"""As a newcomer meets them, and the file of each."""
HERE, JOBS, MACHINES, MONEY = "On this machine", "Jobs", "Several machines", "Money"
"""Headings of the list."""


def _without_values(params: list[Any]) -> list[Any]:
    """Of flags, the help would show the type of a value that they do not take."""
    for one in params:
        if getattr(one, "is_flag", False):
            one.metavar = ""
    return params


class Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_values(super().get_params(ctx))


class Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_values(super().get_params(ctx))


class InOrder(Group):
    """Lists commands as COMMANDS does, whatever the order of imports."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=list(COMMANDS).index)


class Commands(typer.Typer):
    def command(self, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        return super().command(name, cls=Command, **settings)


app = Commands(
    name="shoal",
    cls=InOrder,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="One computer out of many mixed, distant, mortal GPUs.\n\n"
    "Start with `shoal quickstart`: it runs a hub and five unequal nodes on this machine and trains a small model "
    "across them. For your own: `shoal up` in one terminal, `shoal train job.yaml` in another. Every command has "
    "`--help`; those that print figures have `--json`. Keys and nodes are kept in ~/.shoal, or where SHOAL_HOME says; "
    "SHOAL_LOG=info tells more.",
)


def _version(wanted: bool) -> None:
    if wanted:
        output.out.print(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass
