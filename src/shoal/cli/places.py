"""Where runs are, where a process listens, and what `shoal.sdk.places` knows about this machine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from shoal.cli.output import BadFlag, err, shown
from shoal.driver.folder import RunFolder, is_unsettled
from shoal.errors import BadInput
from shoal.quantities.money import parse_money
from shoal.sdk.places import (
    LocalRun,
    account_key,
    acquaintances,
    auction_ticket,
    find_hubs,
    find_local,
    forget_local,
    ledger_ticket,
    local_folder,
    remember_auction,
    user_key,
    write_local,
)
from shoal.sdk.spending import Spending

__all__ = [
    "LocalRun",
    "NoRun",
    "account_key",
    "acquaintances",
    "amount_of",
    "auction_ticket",
    "find_hubs",
    "find_local",
    "find_run",
    "forget_local",
    "holds_run",
    "hour_of",
    "job_of",
    "ledger_ticket",
    "local_folder",
    "refuse_wildcard",
    "remember_auction",
    "spending",
    "user_key",
    "write_local",
]

RUNS_NAMED_MAX = 8
"""Runs that are named to someone who named none of them."""


class NoRun(BadInput):
    """A folder that was named holds no run."""

    code = "SH-105"


def spending(budget_micro: int | None, ledger: str | None) -> Spending | None:
    """Of this user's account; none without a budget. Raises NoAccount, BadAccountKey, NoLedger, BadTicket."""
    if not budget_micro:
        return None
    return Spending(account_key(), ledger_ticket(ledger), budget_micro)


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in a folder."""
    return (folder / "job.record").is_file()


def job_of(folder: Path) -> bytes | None:
    """The signed job in a folder, None where none was begun."""
    return (folder / "job.record").read_bytes() if holds_run(folder) else None


def find_run(folder: Path) -> Path:
    """A folder that a run was begun in; one that a killed `--replace` set aside is put back. Raises NoRun, naming those
    that there are nearby, and FolderLocked while a run is being replaced."""
    if is_unsettled(folder):
        RunFolder.open(folder).close()
        said = f"{folder}: the run that a killed --replace had set aside is back in its place."
        err.print(shown(said), style="dim", markup=False, soft_wrap=True)
    if holds_run(folder):
        return folder
    what = "holds no run: it has no job.record" if folder.is_dir() else "is not there"
    near = sorted(path.parent for path in [*folder.glob("*/job.record"), *Path("runs").glob("*/job.record")])
    named = ", ".join(str(path) for path in dict.fromkeys(near[:RUNS_NAMED_MAX]))
    hint = f"There is {named}." if named else "A run's folder is where `shoal train` put it: runs/<name>."
    raise NoRun(f"{folder} {what}. {hint}")


def amount_of(text: str) -> int:
    """An amount of money that is to move, in millionths. Raises BadQuantity, BadFlag."""
    micro = parse_money(text)
    if not micro:
        raise BadFlag(f"{text} is nothing; name an amount, such as 25 or 0.35.")
    return micro


def hour_of(text: str) -> int:
    """When an hour begins, as Unix time in milliseconds. Raises BadFlag."""
    try:
        at = datetime.strptime(text, "%Y-%m-%dT%H").replace(tzinfo=UTC)
    except ValueError:
        raise BadFlag(f"The hour {text!r} cannot be used; write it as 2026-11-28T14, in UTC.") from None
    return int(at.timestamp()) * 1000


def refuse_wildcard(
    listen: str, instead: str = "name with --public where others dial it, or listen on an address of this machine"
) -> None:
    """Raises BadFlag for an address that means every interface: whoever is told it would dial itself."""
    if listen.removeprefix("tcp://").rpartition(":")[0] in ("0.0.0.0", "[::]"):
        raise BadFlag(f"--listen {listen} names no machine that others could dial; {instead}.")
