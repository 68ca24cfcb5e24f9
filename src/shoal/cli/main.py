"""The command `shoal`: all commands, and the one way out of each of them."""

from __future__ import annotations

import sys
from typing import Any

import typer

from shoal.cli import output
from shoal.cli.app import app
from shoal.errors import ShoalError

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a command, flag or value that it does not take. It has no public name there."""


def load_commands() -> None:
    """Each of these adds its commands to `app`."""
    import shoal.cli.chat
    import shoal.cli.inference
    import shoal.cli.looking
    import shoal.cli.quickstart
    import shoal.cli.serving
    import shoal.cli.training  # noqa: F401


def main() -> None:
    """Run a command; every error a user can cause ends in one sentence and an exit code, never in a traceback."""
    arguments = sys.argv[1:] or ["--help"]
    as_json = "--json" in arguments
    output.set_up_logging(to_terminal=sys.stderr.isatty())
    try:
        load_commands()
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
