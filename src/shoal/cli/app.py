"""The list of commands, and the one way out of each of them."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from shoal import __version__
from shoal.cli import output
from shoal.errors import ShoalError

ORDER = ("quickstart", "up", "down", "train", "report", "replay", "hub", "node", "offers")
"""As a newcomer meets them."""
HERE, JOBS, MACHINES = "On this machine", "Jobs", "Several machines"
"""Headings of the list."""

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a command, flag or value that it does not take. It has no public name there."""


class InOrder(TyperGroup):
    """Lists commands in ORDER, whatever the order of imports."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
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


def load_commands() -> None:
    """Each of these adds its commands to `app`."""
    import shoal.cli.looking
    import shoal.cli.quickstart
    import shoal.cli.serving
    import shoal.cli.training  # noqa: F401


def main() -> None:
    """Run a command; every error a user can cause ends in one sentence and an exit code, never in a traceback."""
    arguments = sys.argv[1:] or ["--help"]
    as_json = "--json" in arguments
    output.set_up_logging(to_terminal=sys.stderr.isatty())
    load_commands()
    try:
        code = app(arguments, prog_name="shoal", standalone_mode=False)
        if code == output.INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "shoal"
        problem = error.format_message().rstrip(".")
        sys.exit(output.fail(output.BadFlag(f"{problem}. See: {where} --help"), as_json=as_json))
    except ShoalError as error:
        sys.exit(output.fail(error, as_json=as_json))
    except (KeyboardInterrupt, EOFError, typer.Abort):
        sys.exit(output.fail(output.Interrupted("Stopped."), as_json=as_json))
    except BrokenPipeError:
        output.forget_output()
        sys.exit(0)
    except OSError as error:
        sys.exit(output.fail(output.refused_by_system(error), as_json=as_json))
