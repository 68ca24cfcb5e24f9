"""The process in which a node drives a job for an owner who is away: `python -m shoal.sdk.hosted RUN_FOLDER PARENT`.

It goes on with the job of a run folder as `resume` does, with a key of the node's, in a term of its own, and tells the
node how it gets on (`node.driver_process`). Where it ends otherwise than in order, the next host goes on. Where the
money is used up it waits for more, for a while, with no place taken.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from shoal.driver.folder import CHAIN, RunFolder
from shoal.driver.lines import Event, EventKind
from shoal.driver.report import Goal
from shoal.errors import ShoalError
from shoal.house import RemoteLedger
from shoal.identity import KeyPair, load_key
from shoal.identity.accounts import AccountKey
from shoal.node.driver_process import (
    LINE_MAX_BYTES,
    Began,
    Committed,
    DriverOrders,
    Ended,
    Failed,
    Mirrored,
    Said,
    StopDriving,
    Told,
)
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.driving import Allowance
from shoal.protocol.hubs import HubTicket
from shoal.protocol.ledgers import LedgerTicket
from shoal.purse.bills import FILE, Payments, TermPayments
from shoal.purse.purse import ENDS_SOON_MS, LOOK_EVERY_S
from shoal.sdk.jobfile import JobFile, parse_job, read_job_bytes
from shoal.sdk.jobs import close_escrows
from shoal.sdk.spending import Lent
from shoal.sdk.train import DRIVER_KEY, Hosted, NothingToResume, TrainOptions, refuse_script, resume
from shoal.transport import TlsEndpoint
from shoal.world import Clock, Ledger, SystemClock, SystemDice
from shoal.world.processes import die_with_parent

MIRRORED_S = 5.0
"""So long a Commit waits for the hosts that stand by to have it."""
MONEY_WITHIN_S = 3600.0
"""So long a job whose money is used up waits for more. Nobody is paid for that: it takes a sleeping process and one of
the jobs that a node drives at a time."""


class _Node:
    """The node, as this process sees it."""

    def __init__(self, orders: DriverOrders, folder: Path) -> None:
        self.orders = orders
        self.stopped = False
        self.driving: asyncio.Task[None] | None = None
        self._folder = folder
        self._far = Mirrored(0, ())
        self._awaited = 0
        """So far a host did not come in time."""
        self._news = asyncio.Event()

    async def listen(self, pipe: asyncio.StreamReader) -> None:
        """Until it has nothing more to say: then it is gone, or wants this process to end."""
        while line := await pipe.readline():
            word = msgspec.json.decode(line, type=Told)
            if isinstance(word, Mirrored):
                self._far = word
                self._news.set()
                self._news = asyncio.Event()
            else:
                break
        self.stopped = bool(line) and isinstance(word, StopDriving)
        if self.driving is not None:
            self.driving.cancel()

    async def written(self, holders: Sequence[BlobHolder]) -> None:
        """The hosts that stand by have it, too, or are out of touch."""
        size = (self._folder / CHAIN).stat().st_size
        say(Committed(size, tuple(holders)))
        if self._far.chain_bytes < self._awaited:
            return  # a host that has not caught up yet holds up no more than one Commit
        try:
            async with asyncio.timeout(MIRRORED_S):
                while self._far.hosts and self._far.chain_bytes < size:
                    await self._news.wait()
        except TimeoutError:
            self._awaited = size

    def present(self) -> Collection[bytes]:
        """The driver keys of this host and of those that have the newest records."""
        there = {self.orders.node, *self._far.hosts}
        return [host.driver for host in self.orders.begin.hosts if host.node in there]


def say(word: Said) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(word) + b"\n")
    sys.stdout.buffer.flush()


async def drive(folder: Path, key: KeyPair, node: _Node) -> str:
    """Gives how the job ended. Raises ShoalError."""
    while True:
        goal, allowance = await _drive(folder, key, node), node.orders.begin.allowance
        if allowance is None or goal.reached or not await _more_money(folder, allowance, node):
            return goal.sentence


async def _drive(folder: Path, key: KeyPair, node: _Node) -> Goal:
    """Until the job is over, or its money is."""
    orders, begin = node.orders, node.orders.begin
    job_file = _job_file(folder)
    options = TrainOptions(
        folder=folder,
        hubs=[HubTicket.parse(ticket) for ticket in begin.hubs],
        key=key,
        listen=orders.listen,
        prompt=begin.prompt,
        spending=_lent(folder, begin.allowance) if begin.allowance else None,
        hosted=Hosted(
            key=key,
            storage_bytes=orders.storage_bytes,
            gone=orders.gone,
            alone=orders.alone,
            began=lambda term: say(Began(term)),
            written=node.written,
            present=node.present,
            stopped=lambda: node.stopped,
        ),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    report = await resume(job_file, options)
    assert report.goal is not None, "a driver that comes to the end says how"
    return report.goal


async def _more_money(folder: Path, allowance: Allowance, node: _Node) -> bool:
    """Of a job whose money is used up: whether more came. If not, what is left was asked back."""
    term = _payments(folder).terms[-1]
    if term.closed:
        return False
    clock = SystemClock()
    until_ms = min(clock.now_ms() + round(1000 * MONEY_WITHIN_S), term.ends_ms - ENDS_SOON_MS)
    until = datetime.fromtimestamp(until_ms / 1000, UTC)
    with RunFolder.open(folder) as run:
        sentence = (
            f"The money is used up: the job waits for more until {until:%H:%M} UTC, and then it is over. Its owner "
            "adds some with `shoal jobs fund`."
        )
        run.note(Event(time_s=run.elapsed_s(), sentence=sentence, kind=EventKind.WAITING))
    endpoint = TlsEndpoint(KeyPair.generate(), clock=clock, dice=SystemDice())
    ledger = RemoteLedger(endpoint, LedgerTicket.parse(allowance.ledger), clock)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(MONEY_WITHIN_S):
                if await _is_added(term, ledger, clock):
                    return True
        await _ask_back(folder, allowance, ledger)
        return False
    except asyncio.CancelledError:
        if node.stopped:
            await _ask_back(folder, allowance, ledger)
        raise
    finally:
        await endpoint.close()


async def _is_added(term: TermPayments, ledger: Ledger, clock: Clock) -> bool:
    """Once it is; not, where nothing can be added any more."""
    while True:
        with suppress(ShoalError):  # it is asked again
            found = await ledger.escrow(term.escrow)
            if found is None or found.closing or found.ends_ms - clock.now_ms() < ENDS_SOON_MS:
                return False
            if found.added_micro > term.added_micro:
                return True
        await clock.sleep(LOOK_EVERY_S)


async def _ask_back(folder: Path, allowance: Allowance, ledger: Ledger) -> None:
    try:
        await close_escrows(folder, AccountKey(allowance.signer), ledger)
    except ShoalError as error:
        print(f"What is left comes back when its escrow ends: {error.sentence}", file=sys.stderr, flush=True)


def _job_file(folder: Path) -> JobFile:
    job = parse_job(read_job_bytes(folder / "job.yaml"), folder / "job.yaml", begun=True)
    refuse_script(job)
    return job


def _payments(folder: Path) -> Payments:
    return msgspec.json.decode((folder / FILE).read_bytes(), type=Payments)


def _lent(folder: Path, allowance: Allowance) -> Lent:
    payments = _payments(folder)
    terms = payments.terms[-1].terms
    return Lent(
        payer=terms.payer,
        signer=AccountKey(allowance.signer),
        client=KeyPair.from_seed(allowance.client),
        ledger=LedgerTicket.parse(allowance.ledger),
        budget_micro=payments.budget_micro,
    )


async def _main(folder: Path) -> int:
    pipe = asyncio.StreamReader(limit=LINE_MAX_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(pipe), sys.stdin)
    node = _Node(msgspec.json.decode(await pipe.readline(), type=DriverOrders), folder)
    listening = asyncio.create_task(node.listen(pipe))

    async def work() -> None:
        try:
            say(Ended(await drive(folder, load_key(folder.parent / DRIVER_KEY), node)))
        except NothingToResume as error:  # whoever drove before was killed between the report and its last word
            say(Ended(error.sentence))
        except ShoalError as error:
            say(Failed(error.code, error.sentence))

    node.driving = asyncio.create_task(work())
    await asyncio.wait({node.driving})
    listening.cancel()
    if not node.driving.cancelled() and node.driving.exception() is not None:
        logging.error("the driver failed", exc_info=node.driving.exception())
        say(Failed("SH-000", f"The process that drives failed: {node.driving.exception()}"))
        return 1
    return 0


def main() -> None:
    die_with_parent(int(sys.argv[2]), signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(asyncio.run(_main(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
