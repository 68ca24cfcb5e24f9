"""The quickstart: a whole shoal on this machine, and everything that may happen to one.

A hub and five unequal nodes on loopback train a small model on the Python sources that lie on this machine. One node
joins halfway, one is killed, one lies. Who dies, who lies and how is drawn from the seed; neither the driver nor the
training code is told, so the report shows what they found out, and the truth is put beside it. In the end the nodes
that are left serve what they have trained, and it is asked something through the endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shoal.driver.folder import RunFolder
from shoal.driver.report import Goal, NodeStatus, Report
from shoal.driver.training import Progress
from shoal.errors import BadInput, ShoalError
from shoal.house import RemoteLedger
from shoal.identity import KeyPair
from shoal.identity.accounts import address_text, create_account
from shoal.node.dishonest import LIES
from shoal.protocol.hubs import HubTicket
from shoal.protocol.ledgers import LedgerTicket
from shoal.quantities.money import format_money, format_price
from shoal.sdk.jobfile import JobFile, parse_job
from shoal.sdk.local import LocalShoal
from shoal.sdk.spending import Spending
from shoal.sdk.train import TrainOptions, train
from shoal.transport import TlsEndpoint
from shoal.world import SystemClock, SystemDice

NODES = (("amber", 1.0), ("birch", 1.0), ("cedar", 0.5), ("dune", 0.25))
"""Names and speed limits of the nodes that are there from the start."""
LATE_NODE = ("ember", 0.5)
KILLED_AT, JOINS_AT = 0.4, 0.45
"""Shares of the token budget. The late node starts a little before half, as it measures itself first."""
GOAL_SHARE = 0.75
TOKENS = 1_500_000
MICRO_PER_H = 360_000
"""What an hour of a node of full speed costs: of the others as much less as they are slower."""
DEPOSIT_MICRO, BUDGET_MICRO = 5_000_000, 1_000_000
NOTICE_MS = 30_000
"""The least that nodes agree to."""
PROMPT = "def read_file(path):\n"

_JOB = """\
# The quickstart's job, as you could write it yourself. Train it again with: shoal up, then shoal train this-file
name: quickstart
seed: {seed}
model:
  preset: tiny
data:
  paths:
{paths}
  sequence_tokens: 128
tokens: {tokens}
batch_samples: 8
optimizer:
  learning_rate: 0.004
rounds:
  grace: 4 s
replay:
  audit_rate: 0.05
requirements:
  nodes_min: {nodes}
"""


ASKED = "def "
ASKED_TOKENS = 80
TEMPERATURE = 0.3
ASK_PATIENCE_S = 60.0
"""Until nodes hold the model and have answered; it takes a few seconds."""
RECEIPT_PATIENCE_S = 5.0
LOOK_EVERY_S = 0.05


class NoSources(BadInput):
    """This Python has no sources of its standard library to train on."""

    code = "SH-128"


@dataclass(frozen=True)
class Truth:
    """What was done to whom; told to nobody who takes part."""

    killed: str
    late: str
    liar: str | None
    lie: str | None


class Asked(msgspec.Struct, frozen=True):
    """What the trained model was asked through the endpoint, and who answered."""

    prompt: str
    text: str
    nodes: tuple[str, ...]
    """Names of those that signed a receipt for it."""
    ready_s: float
    """Until nodes held the model."""
    answer_s: float


@dataclass
class QuickstartOptions:
    folder: Path
    key: KeyPair
    seed: int = 0
    honest: bool = False
    tokens: int = TOKENS
    files_max: int = 400
    say: Callable[[str], None] = lambda _: None
    train: Callable[[TrainOptions], TrainOptions] = field(default=lambda options: options)
    """Lets the caller add its own callbacks."""


def draw_truth(seed: int, *, honest: bool) -> Truth:
    """Who is killed and who lies, and how: the same for the same seed."""
    dice = random.Random(f"shoal quickstart {seed}")
    killed, liar = dice.sample([name for name, _ in NODES], 2)
    lie = dice.choice(sorted(LIES))
    return Truth(killed, LATE_NODE[0], None if honest else liar, None if honest else lie)


def source_files(files_max: int) -> list[Path]:
    """The largest of the standard library's modules, by name. Raises NoSources."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "ensurepip"}
    found = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    readable = [path for path in found if path.stat().st_size > 2000 and _is_text(path)]
    if len(readable) < 50:
        raise NoSources(
            f"Only {len(readable)} Python sources were found under {root}; install Python with its sources."
        )
    largest = sorted(readable, key=lambda path: (-path.stat().st_size, path.name))[:files_max]
    return sorted(largest)


def _is_text(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def job_text(options: QuickstartOptions) -> bytes:
    paths = "\n".join(f'    - "{path}"' for path in source_files(options.files_max))
    return _JOB.format(seed=options.seed, paths=paths, tokens=options.tokens, nodes=len(NODES)).encode()


async def quickstart(options: QuickstartOptions) -> tuple[Report, Truth, Asked | None]:
    """Run it. The folder then holds everything a run leaves, and the truth in `local/truth.json`. None was asked where
    there is no model, or nobody to serve it, which is said."""
    truth = draw_truth(options.seed, honest=options.honest)
    with RunFolder.create(options.folder, replace=True) as folder:
        text = job_text(options)
        job_file = parse_job(text, options.folder / "job.yaml")
        async with LocalShoal(folder.local) as shoal:
            await shoal.start_hub()
            spending = await _open_account(shoal, folder.local)
            options.say(f"Starting a hub, a ledger and {len(NODES)} nodes; each measures itself first.")
            await asyncio.gather(*(_start(shoal, name, speed, truth) for name, speed in NODES))
            report = await _train(job_file, text, options, folder, shoal, truth, spending)
            asked = await _ask(options, shoal, folder.local / "serve")
        (folder.local / "truth.json").write_bytes(msgspec.json.encode(truth.__dict__))
    return report, truth, asked


async def _open_account(shoal: LocalShoal, folder: Path) -> Spending:
    """A ledger with a mint, and an account of its own for the job, with money from there."""
    started = await shoal.start_ledger(options=["--mint-max", format_money(DEPOSIT_MICRO)])
    ticket = LedgerTicket.parse(started.ready["ticket"])
    account = create_account(folder / "accounts" / "job.key")
    clock = SystemClock()
    endpoint = TlsEndpoint(KeyPair.generate(), clock=clock, dice=SystemDice())
    try:
        await RemoteLedger(endpoint, ticket, clock).mint(account.address, DEPOSIT_MICRO)
    finally:
        await endpoint.close()
    return Spending(account, ticket, BUDGET_MICRO, notice_ms=NOTICE_MS, audit_ms=0)


async def _start(shoal: LocalShoal, name: str, speed: float, truth: Truth) -> None:
    account = create_account(shoal.folder / "accounts" / f"{name}.key")
    options = ["--threads", "1", "--storage", "4 GiB"]
    options += ["--price", format_price(round(speed * MICRO_PER_H)), "--account", address_text(account.address)]
    options += ["--ledger", shoal.ledgers[0].ready["ticket"], "--serve-free"]
    if name == truth.liar and truth.lie is not None:
        options += ["--dishonest", truth.lie]
    await shoal.start_node(name, max_speed=speed, options=options)


async def _train(
    job_file: JobFile,
    text: bytes,
    options: QuickstartOptions,
    folder: RunFolder,
    shoal: LocalShoal,
    truth: Truth,
    spending: Spending,
) -> Report:
    pending = {"kill", "join"}
    tasks: set[asyncio.Task[None]] = set()

    def fate(now: Progress) -> None:
        share = now.tokens_total / now.token_budget
        if "kill" in pending and share >= KILLED_AT:
            pending.discard("kill")
            shoal.nodes[truth.killed].kill()
        if "join" in pending and share >= JOINS_AT:
            pending.discard("join")
            tasks.add(asyncio.create_task(_start(shoal, *LATE_NODE, truth)))

    train_options = options.train(
        TrainOptions(
            folder=options.folder,
            hubs=[HubTicket.parse(ticket) for ticket in shoal.hub_tickets],
            key=options.key,
            prompt=PROMPT,
            goal=reached_goal,
            spending=spending,
            closing_audit=True,
        )
    )
    watch = train_options.progress

    def progress(now: Progress) -> None:
        fate(now)
        watch(now)

    train_options.progress = progress
    try:
        return await train(job_file, text, train_options, folder)
    finally:
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(options: QuickstartOptions, shoal: LocalShoal, data: Path) -> Asked | None:
    """Have the nodes serve the run's model, and ask it."""
    import httpx

    from shoal.gateway.receipts import read_accounts
    from shoal.sdk.serve import NodesServer, ServeOptions

    hubs = [HubTicket.parse(ticket) for ticket in shoal.hub_tickets]
    clock = SystemClock()
    server = NodesServer(ServeOptions(options.folder, "quickstart", hubs=hubs, data=data), clock, SystemDice())
    began = clock.monotonic()
    try:
        async with asyncio.timeout(ASK_PATIENCE_S):
            url = await server.start()
            service = server.service
            while service is None or not service.rings:
                await clock.sleep(LOOK_EVERY_S)
            ready = clock.monotonic()
            body = {"model": "quickstart", "prompt": ASKED, "max_tokens": ASKED_TOKENS, "temperature": TEMPERATURE,
                    "seed": options.seed}  # fmt: skip
            async with httpx.AsyncClient(timeout=ASK_PATIENCE_S) as web:
                said = (await web.post(f"{url}/v1/completions", json=body)).raise_for_status().json()
            answered = clock.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECEIPT_PATIENCE_S):
                while not service.counts.receipts:
                    await clock.sleep(LOOK_EVERY_S)
    except (ShoalError, TimeoutError, httpx.HTTPError) as error:
        why = str(error) or f"no node held it and answered within {ASK_PATIENCE_S:.0f} s"
        options.say(f"The model could not be asked: {why}")
        return None
    finally:
        await server.stop()
    names = sorted(one.name for one in read_accounts(data).nodes.values() if one.sessions)
    text = said["choices"][0]["text"]
    return Asked(ASKED, text, tuple(names), round(ready - began, 2), round(answered - ready, 2))


def reached_goal(report: Report) -> Goal:
    """The job is done when its budget was trained and the model beats GOAL_SHARE of the unigram baseline."""
    job = report.goal
    if job is None or not job.reached:
        return Goal(reached=False, sentence=job.sentence if job else "The job did not end.")
    if report.held_out_loss is None or report.unigram_loss is None:
        return Goal(reached=False, sentence="The model could not be measured.")
    wanted = GOAL_SHARE * report.unigram_loss
    reached = report.held_out_loss <= wanted
    return Goal(
        reached=reached,
        sentence=f"The held-out loss is {report.held_out_loss:.3f}, "
        f"{'at most' if reached else 'more than'} {wanted:.3f} ({GOAL_SHARE} of the unigram baseline).",
    )


def found_out(report: Report, truth: Truth) -> str:
    """What was done on purpose, what became of the liar, and whether anyone honest was suspected."""
    by_name = {node.name: node for node in report.nodes}
    wronged = [node.name for node in report.nodes if node.status is NodeStatus.EXCLUDED and node.name != truth.liar]
    suspicion = f" {', '.join(wronged)} was excluded without having lied." if wronged else ""
    staged = f"On purpose {truth.killed} was killed and {LATE_NODE[0]} came late."
    if truth.liar is None or truth.lie is None:
        return f"{staged} Nobody lied, and {'nobody was' if not wronged else 'still someone was'} excluded.{suspicion}"
    liar = by_name.get(truth.liar)
    what = f"{staged} {truth.liar} was made to lie: it {LIES[truth.lie]}."
    if liar is not None and liar.status is NodeStatus.EXCLUDED:
        return f"{what} It was found out; what was accepted of it before stays in the model.{suspicion}"
    return f"{what} It was not found out.{suspicion}"
