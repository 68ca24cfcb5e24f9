"""The list of commands."""

from __future__ import annotations

import sys

import typer

from shoal import __version__
from shoal.cli import output
from shoal.errors import ShoalError

app = typer.Typer(
    name="shoal",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="One computer out of many mixed, distant, mortal GPUs.\n\n"
    "Start with `shoal quickstart`: it runs a hub and five unequal nodes on this machine and trains a small model "
    "across them. For your own: `shoal up` in one terminal, `shoal train job.yaml` in another.",
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


def _load_commands() -> None:
    """Each of these adds its commands to `app`."""
    import shoal.cli.looking
    import shoal.cli.quickstart
    import shoal.cli.serving
    import shoal.cli.training  # noqa: F401


def main() -> None:
    """Run a command; every error a user can cause ends in one sentence and an exit code, never in a traceback."""
    as_json = "--json" in sys.argv
    output.set_up_logging(to_terminal=sys.stderr.isatty())
    _load_commands()
    try:
        app()
    except ShoalError as error:
        sys.exit(output.fail(error, as_json=as_json))
    except (KeyboardInterrupt, EOFError):
        sys.exit(output.fail(output.Interrupted("Stopped."), as_json=as_json))
    except BrokenPipeError:
        sys.exit(0)
