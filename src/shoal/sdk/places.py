"""Where things are on this machine: the user's keys, the shoal that runs here, which hubs and which ledger to ask."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from shoal.errors import BadInput
from shoal.identity import KeyPair, load_or_create_key
from shoal.identity.accounts import AccountKey, load_account
from shoal.protocol.auctions import AuctionTicket
from shoal.protocol.hubs import HubTicket
from shoal.protocol.ledgers import LedgerTicket
from shoal.sdk.acquaintances import Acquaintances
from shoal.sdk.local import shoal_home


class NoHub(BadInput):
    """No hub was named and none runs on this machine."""

    code = "SH-102"


class NoAccount(BadInput):
    """This user has no account yet."""

    code = "SH-135"


class NoLedger(BadInput):
    """No ledger was named, and none is remembered with the account."""

    code = "SH-136"


class NoAuction(BadInput):
    """No auction was named, and none is remembered."""

    code = "SH-155"


def user_key() -> KeyPair:
    """The key with which this user signs jobs; made at its first use."""
    return load_or_create_key(shoal_home() / "owner.key")


@dataclass(frozen=True)
class LocalRun:
    """The shoal that `shoal up` runs on this machine."""

    pid: int
    started: float
    hubs: list[str]
    http: str | None
    nodes: list[dict[str, Any]]

    @property
    def alive(self) -> bool:
        """Whether that very process still runs: pids are used again."""
        try:
            process = psutil.Process(self.pid)
            ended = process.status() == psutil.STATUS_ZOMBIE
            return not ended and bool(abs(process.create_time() - self.started) < 2)
        except psutil.Error:
            return False

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def local_folder() -> Path:
    return shoal_home() / "local"


def _up_file() -> Path:
    return local_folder() / "up.json"


def write_local(run: LocalRun) -> None:
    _up_file().parent.mkdir(parents=True, exist_ok=True)
    scratch = _up_file().with_suffix(".new")
    scratch.write_text(json.dumps(run.__dict__))
    scratch.replace(_up_file())


def forget_local() -> None:
    _up_file().unlink(missing_ok=True)


def find_local() -> LocalRun | None:
    """The local shoal, if one runs."""
    try:
        run = LocalRun(**json.loads(_up_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return run if run.alive else None


def find_hubs(named: list[str] | None) -> list[HubTicket]:
    """The hubs to use: those named, else those in SHOAL_HUB (separated by spaces), else the local shoal's.

    Raises BadTicket, and NoHub when there is none.
    """
    texts = named or os.environ.get("SHOAL_HUB", "").split()
    if not texts:
        local = find_local()
        if local is None:
            raise NoHub(
                "No hub is known. Run `shoal up` in another terminal to have one here, or name one with "
                "--hub shoal://NODEID@HOST:PORT or in SHOAL_HUB."
            )
        texts = local.hubs
    return [HubTicket.parse(text) for text in texts]


def acquaintances() -> Acquaintances:
    """What this user has seen of nodes."""
    return Acquaintances(shoal_home() / "nodes.json")


def account_file() -> Path:
    """The key of this user's account."""
    return shoal_home() / "account.key"


def account_key() -> AccountKey:
    """Of this user's account: who pays for jobs and is paid for nodes. Raises NoAccount, BadAccountKey."""
    if not account_file().exists():
        raise NoAccount(f"There is no account at {account_file()}; make one with: shoal account create")
    return load_account(account_file())


def _ledger_file() -> Path:
    return account_file().with_name("account.ledger")


def remember_ledger(ticket: LedgerTicket) -> None:
    """As the one to ask where none is named."""
    _remember(_ledger_file(), ticket)


def ledger_ticket(named: str | None = None) -> LedgerTicket:
    """The ledger to use: the one named, else that in SHOAL_LEDGER, else the one remembered with the account.

    Raises BadTicket, and NoLedger when there is none.
    """
    text = named or os.environ.get("SHOAL_LEDGER", "")
    if not text and _ledger_file().exists():
        text = _ledger_file().read_text()
    if not text.strip():
        raise NoLedger(
            "No ledger is known. Name one with --ledger shoal-ledger://NODEID@HOST:PORT/USD or in SHOAL_LEDGER, or "
            "have it remembered with: shoal account create --ledger TICKET"
        )
    return LedgerTicket.parse(text)


def _auction_file() -> Path:
    return shoal_home() / "auction.ticket"


def remember_auction(ticket: AuctionTicket) -> None:
    """As the one to ask where none is named."""
    _remember(_auction_file(), ticket)


def auction_ticket(named: str | None = None) -> AuctionTicket:
    """The auction to use: the one named, else that in SHOAL_AUCTION, else the one remembered.

    Raises BadTicket, and NoAuction when there is none.
    """
    text = named or os.environ.get("SHOAL_AUCTION", "")
    if not text and _auction_file().exists():
        text = _auction_file().read_text()
    if not text.strip():
        raise NoAuction(
            "No auction is known. Name one with --auction shoal-auction://NODEID@HOST:PORT, which is then remembered, "
            "or in SHOAL_AUCTION; `shoal market run` prints the ticket of one."
        )
    return AuctionTicket.parse(text)


def _remember(file: Path, ticket: LedgerTicket | AuctionTicket) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".new")
    scratch.write_text(f"{ticket}\n")
    scratch.replace(file)
