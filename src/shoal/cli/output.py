"""How every command prints: tables and sentences for people, one JSON document for machines.

Exit codes: 0 it was done; 1 it failed; 2 the input cannot be used; 130 interrupted. `shoal replay` has two more.
With --json an error is a document too: {"error": {"code": ..., "sentence": ...}}.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.logging import RichHandler

from shoal.errors import BadInput, JobError, ShoalError, StorageError
from shoal.quantities.money import format_share

if TYPE_CHECKING:
    from shoal.protocol.money import FeeTable

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
NARROW = 80
"""On terminals of fewer columns tables leave out figures that can be had otherwise."""
SHORT = 10
"""Hexadecimal digits of an escrow's or bond's name, for people."""
T = TypeVar("T")
INTERRUPTED = 130
"""The exit code of a command that was stopped with Ctrl-C: 128 and the number of SIGINT."""
_log = logging.getLogger("shoal.cli")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text; errors too.")]
HubFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--hub",
        metavar="TICKET",
        help="A hub's ticket, shoal://NODEID@HOST:PORT, as it prints it; may be given several times. "
        "Without it: SHOAL_HUB, else the hub of `shoal up` on this machine.",
        show_default=False,
    ),
]
LedgerFlag = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="TICKET",
        help="A ledger's ticket, shoal-ledger://NODEID@HOST:PORT/USD, as it prints it. Without it: SHOAL_LEDGER, else "
        "the one that `shoal account create --ledger` remembered.",
        show_default=False,
    ),
]
PublicFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--public",
        metavar="ADDRESS",
        help="tcp://HOST:PORT where others dial it, when that is not where it listens: behind a port mapping, or "
        "when it listens on 0.0.0.0. May be given several times.",
        show_default=False,
    ),
]
NEGATIVE = {"ignore_unknown_options": True}
"""So that -5 is an amount, which is refused as one, and not an option."""
WithParent = Annotated[int, typer.Option("--with-parent", hidden=True, help="Stop when this process is gone.")]


class BadFlag(BadInput):
    """A command or flag does not exist, or one has a value that cannot be used."""

    code = "SH-103"


class Interrupted(JobError):
    """The user asked to stop."""

    code = "SH-601"


class FileRefused(StorageError):
    """The operating system refused a file or directory that a command needs."""

    code = "SH-420"


def to_plain(value: object) -> Any:
    """Structs and bytes -> what JSON can say: bytes of 32 or fewer as hexadecimal, longer ones as base64."""

    def other(thing: object) -> object:
        raise TypeError(f"{type(thing).__name__} has no JSON form")

    def walk(thing: Any) -> Any:
        if isinstance(thing, bytes):
            return thing.hex() if len(thing) <= 32 else base64.b64encode(thing).decode()
        if isinstance(thing, msgspec.Struct):
            return {name: walk(getattr(thing, name)) for name in thing.__struct_fields__}
        if isinstance(thing, dict):
            return {walk(key): walk(item) for key, item in thing.items()}
        if isinstance(thing, list | tuple):
            return [walk(item) for item in thing]
        return thing

    return msgspec.to_builtins(walk(value), enc_hook=other)


def shown(text: str) -> str:
    """Text for a terminal: names, sentences and models' words come from strangers, and a terminal obeys what it is sent."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def when(at_ms: int, form: str = "%Y-%m-%d %H:%M") -> str:
    """In the time of this machine."""
    try:
        return datetime.fromtimestamp(at_ms / 1000).strftime(form)
    except (OverflowError, ValueError, OSError):  # strangers may write what they like
        return f"{at_ms} ms"


def say_fee(table: FeeTable, now_ms: int) -> str:
    """`"2 % of what escrows pay, from 2026-11-28 08:00 on"`."""
    since = f" that are opened from {when(table.from_ms)} on" if table.from_ms > now_ms else ""
    return f"{format_share(table.fee_ppm)} of what escrows pay{since}"


def shoal_command() -> str:
    """How this very program is called from where the user is: not every shell has it on its path."""
    return "shoal" if shutil.which("shoal") or not sys.argv[0].endswith("shoal") else sys.argv[0]


def print_json(value: object) -> None:
    """One JSON document on standard output, on one line so that it can be read while the process goes on."""
    sys.stdout.write(json.dumps(to_plain(value), allow_nan=False) + "\n")
    sys.stdout.flush()


def refused_by_system(error: OSError) -> FileRefused:
    """What the operating system refused, as a sentence."""
    _log.debug("refused by the operating system", exc_info=error)
    if error.filename is None:
        return FileRefused(f"The operating system refused: {error.strerror or error}. SHOAL_LOG=debug shows where.")
    return FileRefused(f"{error.filename}: {error.strerror}. Check the path, its owner and the room on the disk.")


def forget_output() -> None:
    """Whoever read our output is gone: let nothing more be written, or the interpreter complains as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: ShoalError, *, as_json: bool) -> int:
    """Say what went wrong in one sentence, with its code; gives the exit code."""
    if as_json:
        print_json({"error": {"code": error.code, "sentence": error.sentence}})
    else:
        err.print(f"[bold red]error[/] [dim]{error.code}[/]  ", end="")
        err.print(shown(error.sentence), markup=False, soft_wrap=True)
    return INTERRUPTED if isinstance(error, Interrupted) else 2 if isinstance(error, BadInput) else 1


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a command's coroutine on the fast event loop; Ctrl-C or SIGTERM cancels it and lets it clean up."""
    from shoal import transport

    async def until_terminated() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def stop() -> None:
            err.print("[dim]Stopping; a second time ends it at once.[/]")
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        return await work()

    try:
        return transport.run(until_terminated())
    except asyncio.CancelledError:
        raise Interrupted("Stopped.") from None


def set_up_logging(*, to_terminal: bool) -> None:
    """Warnings for people at a terminal; with SHOAL_LOG=debug|info everything, for finding a fault."""
    level = os.environ.get("SHOAL_LOG", "warning").upper()
    handler: logging.Handler = RichHandler(console=err, show_path=False) if to_terminal else logging.StreamHandler()
    if not to_terminal:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level if level in logging.getLevelNamesMapping() else "WARNING", handlers=[handler])


async def stop_asked() -> None:
    """Wait for SIGINT or SIGTERM."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


async def until_stopped(leave: Callable[[], Awaitable[None]] | None = None) -> None:
    """Wait for SIGINT or SIGTERM, then for `leave`, unless a second one comes; the next SIGINT ends the process as a
    crash would, which everything survives."""
    await stop_asked()
    if leave is not None:
        leaving, again = asyncio.ensure_future(leave()), asyncio.ensure_future(stop_asked())
        await asyncio.wait({leaving, again}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        again.cancel()
        await asyncio.gather(leaving, again, return_exceptions=True)
    loop = asyncio.get_running_loop()
    loop.remove_signal_handler(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    err.print("[dim]Stopping.  Ctrl-C again ends it at once.[/]")
