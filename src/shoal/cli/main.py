"""The command `shoal`: all commands, and the one way out of each of them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer

from shoal.cli import output
from shoal.cli.app import COMMANDS, app
from shoal.errors import ShoalError

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a command, flag or value that it does not take. It has no public name there."""


def load_commands(only: str = "") -> None:
    """Each of these files adds its commands to `app`. That of one command is enough for it: others load libraries that
    it does not need."""
    for file in {COMMANDS[only]} if only in COMMANDS else set(COMMANDS.values()):
        importlib.import_module(f"shoal.cli.{file}")


def main() -> None:
    """Run a command; every error a user can cause ends in one sentence and an exit code, never in a traceback."""
    arguments = sys.argv[1:] or ["--help"]
    as_json = "--json" in arguments
    output.set_up_logging(to_terminal=sys.stderr.isatty())
    try:
        load_commands(arguments[0])
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
