"""The runs and paying endpoints of this machine: how each stands and what it costs, read beside its driver or gateway;
how more money comes to one, how one is stopped, and what it has set aside comes back."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec
import psutil

from shoal.driver.folder import RunFolder, is_unsettled
from shoal.driver.lines import Event, EventKind, RoundMetrics
from shoal.driver.report import Figures, NodeStatus, Report
from shoal.errors import BadInput, JobError, ShoalError
from shoal.gateway.paying import read_payments
from shoal.gateway.receipts import Books
from shoal.identity.accounts import AccountKey, address_text
from shoal.ledger.escrows import EscrowOver, State
from shoal.market.earnings import forecast_micro, lasts_s
from shoal.protocol.money import LedgerName, ledger_text
from shoal.purse.bills import FILE as PAYMENTS
from shoal.purse.bills import Payments, TermPayments, bill
from shoal.purse.escrow import close_escrow, top_up
from shoal.sdk.handed import is_driven_by_nodes
from shoal.storage.whole import write_whole
from shoal.world import Clock, DirectoryDisk, Ledger
from shoal.world.processes import pid_in_lock, writer_of

STOP_S = 60.0
"""So long a driver has to stop in order: it pays its nodes, and writes down what it knows."""
RATE_ROUNDS = 8
"""Of so many rounds, the newest, the present speed is the mean."""


HERE = (NodeStatus.WORKING, NodeStatus.FINISHED)
"""Of nodes that work, or did when the job stopped."""


class DriverGoesOn(JobError):
    """A driver, or a gateway, was asked to stop, and still runs."""

    code = "SH-613"


class OthersMoney(BadInput):
    """What a run has set aside is of another account than the user's, or at another ledger than was named."""

    code = "SH-165"


class NothingSetAside(BadInput):
    """Money is to be added to what nobody pays nodes out of now."""

    code = "SH-166"


class JobState(StrEnum):
    RUNNING = "running"
    DETACHED = "detached"
    """Driven by nodes, as it stood when it was looked at last."""
    WAITING = "waiting"
    """The same, and its money is used up: it goes on when there is more."""
    STOPPED = "stopped"
    """In order, before its goal."""
    FINISHED = "finished"
    DIED = "died"
    """Its driver was killed."""


@dataclass(frozen=True)
class NodeStanding:
    """Money in millionths; zero for a node that works for nothing."""

    name: str
    node: str
    """Its NodeId, in hexadecimal digits."""
    status: NodeStatus
    micro_per_h: int
    earned_micro: int
    """Less what was withheld."""
    withheld_micro: int
    drives: bool
    """It is paid for driving, or for standing by; a node that also trains stands there a second time."""


@dataclass(frozen=True)
class Forecast:
    """What is left to do, at the present speed with the present nodes."""

    seconds: float
    micro: int
    """What that costs at most; beyond the budget, too."""
    money_lasts_s: float | None
    """Where the rest of the budget is used up earlier than the job is done."""


@dataclass(frozen=True)
class JobStanding:
    """Times in seconds, money in millionths."""

    folder: str
    name: str
    state: JobState
    begun_ms: int
    round: int
    """The last one that was committed; -1 for none."""
    tokens: int
    token_budget: int
    elapsed_s: float
    tokens_per_s: float
    loss: float | None
    """Of the last round, nats per token."""
    nodes: tuple[NodeStanding, ...]
    budget_micro: int
    spent_micro: int
    open_micro: int
    """Set aside in escrows that nobody has asked back, and not spent."""
    escrows: tuple[str, ...]
    """Out of which it is paid, in hexadecimal digits: one of each term."""
    currency: str | None
    """None where nothing was set aside."""
    forecast: Forecast | None
    """None where nothing is left to do, where it waits, or nothing is known of its speed."""
    waits: str
    """For what, and how long; empty where it does not."""

    @property
    def working(self) -> int:
        return sum(one.status in HERE for one in self.nodes if not one.drives)


@dataclass(frozen=True)
class ServedBy:
    """A node that an endpoint pays. Money in millionths."""

    name: str
    node: str
    """Its NodeId, in hexadecimal digits."""
    micro_per_h: int
    earned_micro: int
    reason: str
    """What became of it."""


@dataclass(frozen=True)
class EndpointStanding:
    """What an endpoint pays since its last start. Money in millionths."""

    folder: str
    state: JobState
    paid_ms: int
    """When something of it was written down last."""
    nodes: tuple[ServedBy, ...]
    budget_micro: int
    spent_micro: int
    open_micro: int
    """Set aside in escrows that nobody has asked back, and not spent."""
    escrows: tuple[str, ...]
    currency: str | None


@dataclass(frozen=True)
class DamagedRun:
    """A folder of a run, or of an endpoint, that cannot be read, and why."""

    folder: str
    begun_ms: int
    """When it was last written to, about."""
    code: str
    sentence: str


def forecast(tokens_left: int, tokens_per_s: float, left_micro: int, micro_per_h: int) -> Forecast | None:
    """None where nothing is left, or nothing is known."""
    if tokens_left <= 0 or tokens_per_s <= 0:
        return None
    seconds = tokens_left / tokens_per_s
    lasts = lasts_s(left_micro, micro_per_h)
    return Forecast(seconds, forecast_micro(micro_per_h, seconds), lasts if lasts < seconds else None)


def look_at(path: Path) -> JobStanding:
    """How the run in a folder stands; its lock is left alone. Raises FolderUnreadable, FolderDamaged, BadRecord."""
    state = _state(path)
    with RunFolder.open(path, read_only=True) as folder:
        job = folder.train_job()
        newest = deque(folder.notes(RoundMetrics), maxlen=RATE_ROUNDS)
        events = deque(folder.notes(Event), maxlen=1)
        figures = folder.read("figures.json", Figures) or Figures()
        payments = folder.payments() or Payments(budget_micro=0)
        report = folder.read("report.json", Report)
    last = newest[-1] if newest else None
    tokens = last.tokens_total if last else 0
    waits = events[-1].sentence if events and events[-1].kind is EventKind.WAITING else ""
    if is_driven_by_nodes(path):
        state = JobState.WAITING if waits else JobState.DETACHED
    elif state is not JobState.RUNNING and report is not None and report.tokens_accepted >= job.token_budget:
        state = JobState.FINISHED
    forecasts = state not in (JobState.FINISHED, JobState.WAITING)
    nodes = _nodes(figures, payments, over=state in (JobState.STOPPED, JobState.FINISHED))
    per_s = sum(one.tokens_per_s for one in newest) / len(newest) if newest else 0.0
    per_h = sum(one.micro_per_h for one in nodes if one.status in HERE)
    left = max(0, payments.budget_micro - payments.spent_micro)
    return JobStanding(
        folder=str(path),
        name=job.name,
        state=state,
        begun_ms=job.created_ms,
        round=last.round if last else -1,
        tokens=tokens,
        token_budget=job.token_budget,
        elapsed_s=max(figures.wall_s, last.time_s if last else 0.0),
        tokens_per_s=per_s,
        loss=last.loss if last else None,
        nodes=nodes,
        budget_micro=payments.budget_micro,
        spent_micro=payments.spent_micro,
        open_micro=sum(map(_unspent, _open_terms(payments))),
        escrows=tuple(one.escrow.hex() for one in payments.terms),
        currency=_currency(payments),
        forecast=forecast(job.token_budget - tokens, per_s, left, per_h) if forecasts else None,
        waits=waits if state is JobState.WAITING else "",
    )


def look_at_all(runs: Path) -> list[JobStanding | DamagedRun]:
    """Every run in a folder of runs, the newest first. One that cannot be read hides no other."""
    found = list[JobStanding | DamagedRun]()
    for path in sorted(runs.iterdir()) if runs.is_dir() else ():
        if not (path / "job.record").is_file() and not is_unsettled(path):
            continue
        try:
            found.append(look_at(path))
        except ShoalError as error:
            found.append(DamagedRun(str(path), round(path.stat().st_mtime * 1000), error.code, error.sentence))
    return sorted(found, key=lambda one: -one.begun_ms)


def look_at_endpoint(folder: Path) -> EndpointStanding:
    """How the endpoint of a gateway's folder stands that pays nodes, since its last start. Raises PaymentsDamaged."""
    payments = read_payments(DirectoryDisk(folder)) or Payments(budget_micro=0)
    made = bill(payments)
    newest = {node: one for term in payments.terms for node, one in term.nodes.items()}
    return EndpointStanding(
        folder=str(folder),
        state=_state(folder),
        paid_ms=round((folder / PAYMENTS).stat().st_mtime * 1000),
        nodes=tuple(
            ServedBy(line.name, line.node_id, newest[line.node_id].micro_per_h, line.paid, line.reason)
            for line in (made.nodes if made else ())
        ),
        budget_micro=payments.budget_micro,
        spent_micro=payments.spent_micro,
        open_micro=sum(map(_unspent, _open_terms(payments))),
        escrows=tuple(one.escrow.hex() for one in payments.terms),
        currency=_currency(payments),
    )


def look_at_endpoints(home: Path) -> list[EndpointStanding | DamagedRun]:
    """Every endpoint in a folder of gateways' folders that has paid nodes, the newest first."""
    found = list[EndpointStanding | DamagedRun]()
    for path in sorted(home.iterdir()) if home.is_dir() else ():
        if not pays_nodes(path):
            continue
        try:
            found.append(look_at_endpoint(path))
        except ShoalError as error:
            changed_ms = round((path / PAYMENTS).stat().st_mtime * 1000)
            found.append(DamagedRun(str(path), changed_ms, error.code, error.sentence))
    return sorted(found, key=lambda one: -(one.begun_ms if isinstance(one, DamagedRun) else one.paid_ms))


def pays_nodes(folder: Path) -> bool:
    """Whether it is the folder of a gateway that has set money aside, and of no run."""
    return (folder / PAYMENTS).is_file() and not (folder / "job.record").exists() and not is_unsettled(folder)


def _state(folder: Path) -> JobState:
    """By who writes there."""
    if writer_of(folder) is not None:
        return JobState.RUNNING
    return JobState.STOPPED if pid_in_lock(folder) is None else JobState.DIED


def _currency(payments: Payments) -> str | None:
    return payments.terms[0].ledger.currency if payments.terms else None


def stop(folder: Path) -> int | None:
    """Ask the driver of a run, or the gateway of an endpoint, to stop, as Ctrl-C does, and wait until it has; its
    process number, None where none runs. Raises DriverGoesOn."""
    driver = writer_of(folder)
    if driver is None:
        return None
    try:
        driver.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        return int(driver.pid)
    except psutil.Error as error:
        raise DriverGoesOn(
            f"Process {driver.pid}, which writes in {folder}, could not be asked to stop: {error}."
        ) from error
    until = time.monotonic() + STOP_S
    while writer_of(folder) == driver:
        if time.monotonic() > until:
            raise DriverGoesOn(
                f"Process {driver.pid} was asked to stop, and still writes in {folder} after {STOP_S:.0f} s. What is "
                f"written is kept if you end it with: kill -9 {driver.pid}"
            )
        time.sleep(0.1)
    return int(driver.pid)


def open_at(folder: Path) -> list[LedgerName]:
    """The ledgers at which a run or an endpoint has escrows that nobody has asked back. Raises FolderUnreadable,
    FolderDamaged, PaymentsDamaged."""
    if pays_nodes(folder):
        payments = read_payments(DirectoryDisk(folder))
    else:
        with RunFolder.open(folder, read_only=True) as run:
            payments = run.payments()
    return [one.ledger for one in _open_terms(payments)] if payments else []


@dataclass(frozen=True)
class Closed:
    """What was asked back."""

    escrows: tuple[bytes, ...]
    micro: int
    """What comes back of them."""
    at_ms: int | None
    """When the last of it does; None where all of it has."""


async def close_escrows(folder: Path, account: AccountKey, ledger: Ledger) -> Closed:
    """Of a run whose driver is gone, or an endpoint whose gateway is: its nodes get what they have vouchers for, and
    the rest is asked back. `account` is the payer, or the signer that the escrow names. Raises FolderLocked,
    FolderDamaged, GatewayRunning, PaymentsDamaged, OthersMoney, and what the ledger does."""
    with _books(folder) as (payments, keep):
        for one in _open_terms(payments):
            may = (one.terms.payer, one.terms.signer)
            _check_whose(folder, one, may, account, ledger, "whose it is asks for it, or it comes back by itself.")
        escrows, micro, at_ms = list[bytes](), 0, None
        terms = list(payments.terms)
        for place, one in enumerate(terms):
            if one.closed:
                continue
            terms[place], found = await close_escrow(one, ledger, account)
            budget = payments.budget_micro + terms[place].added_micro - one.added_micro
            payments = msgspec.structs.replace(payments, budget_micro=budget, terms=tuple(terms))
            keep(msgspec.json.encode(payments))
            escrows.append(one.escrow)
            if found is not None and found.state is State.OPEN:
                micro += found.amount_micro - found.redeemed_micro
                at_ms = max(at_ms or 0, found.ends_ms)
    return Closed(tuple(escrows), micro, at_ms)


@contextlib.contextmanager
def _books(folder: Path) -> Iterator[tuple[Payments, Callable[[bytes], None]]]:
    """What is set aside in a folder, and how it is written there, while nobody else writes."""
    if not pays_nodes(folder):
        with RunFolder.open(folder) as run:
            yield run.payments() or Payments(budget_micro=0), lambda content: run.write(PAYMENTS, content)
        return
    with contextlib.closing(Books(folder, lambda _: None)):
        disk = DirectoryDisk(folder)
        known = read_payments(disk) or Payments(budget_micro=0)
        yield known, lambda content: write_whole(disk, PAYMENTS, content, "keeping what nodes were paid")


@dataclass(frozen=True)
class Funded:
    """What was added, and how it stands then. Money in millionths."""

    escrow: bytes
    added_micro: int
    budget_micro: int
    """In all."""
    left_micro: int
    """Of that, as far as is known here what was spent."""
    currency: str
    ends_ms: int
    """What is not used comes back by itself then."""


async def fund(folder: Path, micro: int, account: AccountKey, ledger: Ledger, clock: Clock) -> Funded:
    """Add to the budget of what is under way, in the folder of a run or of a gateway. Whoever drives or serves asks the
    ledger, and so do its nodes. Raises NothingSetAside, OthersMoney, NoMoney, FolderDamaged, PaymentsDamaged, and what
    the ledger does."""
    payments, again = _under_way(folder)
    term = next(reversed(_open_terms(payments)), None) if payments is not None else None
    if payments is None or term is None:
        raise NothingSetAside(f"Nothing is set aside in {folder} to which more could be added: {again}.")
    _check_whose(folder, term, (term.terms.payer,), account, ledger, "whose it is can add to it.")
    try:
        found = await top_up(term, ledger, account, micro, clock)
    except EscrowOver as error:
        raise NothingSetAside(f"Nothing was added: {error.sentence} {again[0].upper()}{again[1:]}.") from error
    now = term.as_at(found)
    return Funded(
        term.escrow, micro, payments.budget_micro + now.added_micro - term.added_micro, _unspent(now),
        term.ledger.currency, found.ends_ms,
    )  # fmt: skip


def _under_way(folder: Path) -> tuple[Payments | None, str]:
    """What pays nodes now, and what to do once it does not any more. Raises NothingSetAside where nobody pays."""
    if not (folder / "job.record").exists():
        again = "start `shoal serve` with another --budget"
        if writer_of(folder) is None:
            raise NothingSetAside(f"No endpoint runs with the folder {folder}: {again}.")
        return read_payments(DirectoryDisk(folder)), again
    again = f"go on with `shoal train {folder} --resume` and a larger --budget"
    if not is_driven_by_nodes(folder) and writer_of(folder) is None:
        raise NothingSetAside(f"Nobody drives the run in {folder}, so nothing of it costs money: {again}.")
    with RunFolder.open(folder, read_only=True) as run:
        return run.payments(), again


def _check_whose(
    folder: Path, term: TermPayments, may: Collection[bytes], account: AccountKey, ledger: Ledger, advice: str
) -> None:
    """Raises OthersMoney."""
    if account.address not in may:
        raise OthersMoney(
            f"{folder} has set money of {address_text(term.terms.payer)} aside, and your account is "
            f"{address_text(account.address)}: {advice}"
        )
    if term.ledger != ledger.name:
        raise OthersMoney(
            f"{folder} has set money aside at the ledger {ledger_text(term.ledger)}; name its ticket with --ledger."
        )


def _open_terms(payments: Payments) -> list[TermPayments]:
    return [one for one in payments.terms if not one.closed]


def _unspent(term: TermPayments) -> int:
    return term.amount_micro - sum(one.paid_micro for one in term.nodes.values())


def _nodes(figures: Figures, payments: Payments, *, over: bool) -> tuple[NodeStanding, ...]:
    """All that had to do with the job; of those that are paid, by the newest term that they are in. The figures may be
    of a moment before the job was over."""
    made = bill(payments)
    lines = {one.node_id: one for one in made.nodes} if made else {}
    newest = {node: one for term in payments.terms for node, one in term.nodes.items()}
    going_on = NodeStatus.WORKING if _open_terms(payments) else NodeStatus.FINISHED
    status = {one.node_id: one.status for one in figures.nodes}
    if over:
        status = {node: NodeStatus.FINISHED if one is NodeStatus.WORKING else one for node, one in status.items()}
    known = {one.node_id: one for one in figures.nodes}
    return tuple(
        NodeStanding(
            name=known[node].name if node in known else lines[node].name,
            node=node,
            status=status.get(node, going_on),
            micro_per_h=newest[node].micro_per_h if node in newest else 0,
            earned_micro=lines[node].paid if node in lines else 0,
            withheld_micro=lines[node].withheld if node in lines else 0,
            drives=node in newest and not newest[node].hold,
        )
        for node in {**known, **lines}
    )
