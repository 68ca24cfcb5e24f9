"""From `shoal train` to the first inner step, on nodes that are up and cost something (`market.py` prints it).

The command runs as a user runs it, but for a line when Python has begun and one when the command is loaded; what it
says, its log included, is read with the moment at which it came. Its folder says when the first node began its first
inner step, in seconds since the driver's start; the driver's events are printed as they come, which ties those seconds
to this process's clock.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from results_form import figure

from shoal.driver.lines import Event, Lane, LaneSegment
from shoal.driver.report import report_from_json
from shoal.house import RemoteLedger
from shoal.identity import KeyPair
from shoal.identity.accounts import address_text, create_account
from shoal.protocol.ledgers import LedgerTicket
from shoal.quantities import format_bytes
from shoal.sdk.local import LocalShoal
from shoal.transport import TlsEndpoint
from shoal.world import SystemClock, SystemDice

NODES, DEPOSIT_MICRO = 2, 100_000_000
START_GOAL_S, MARKET_GOAL_MS = 3.0, 300
PATIENCE_S = 240.0
_TIMES = re.compile(r"held in (\d+) ms, the money for that was set aside in (\d+) ms, and taken in (\d+) ms")
_JOB = """\
name: start
seed: 1
model:
  preset: tiny
data:
  paths: [{folder}/text.txt]
  sequence_tokens: 128
tokens: 20480
batch_samples: 8
rounds:
  inner_steps: 5
replay:
  audit_rate: 0.0
requirements:
  nodes_min: {nodes}
"""
AS_USERS = {"PYTHONDONTWRITEBYTECODE": ""}
"""Where it is set, modules are compiled anew by each process: half a second for each that the start waits for."""
_BEGIN = """
import sys
print("Python has begun", file=sys.stderr, flush=True)
from shoal.cli.main import load_commands, main
load_commands("train")
print("the command is loaded", file=sys.stderr, flush=True)
main()
"""
PIECES = {
    "interpreter": ((), "Python has begun"),
    "imports": (("interpreter",), "the command is loaded"),
    "links to hub": (("imports",), "Reading data and model."),
    "data and model": (("links to hub",), "data and model are prepared"),
    "finding nodes": (("links to hub",), "nodes were looked for"),
    "holding": (("data and model", "finding nodes"), "inner steps a round"),
    "money": (("holding",), "places were held in"),
    "inviting": (("money",), "was invited"),
    "nodes prepare": (("inviting",), " joined with "),
    "assigning": (("nodes prepare",), "round 0: "),
    "beginning": (("assigning",), ""),
}
"""What happens until the first step; after what; and what the command says when it is done, for the last time where
several nodes do it. Choosing a mix is part of holding, signing the job of setting money aside."""


@dataclass(frozen=True)
class Start:
    """Seconds from the command to its first inner step, what each piece of that took, and the market's milliseconds:
    held, set aside, taken."""

    whole_s: float
    pieces_s: dict[str, float]
    market_ms: tuple[int, ...]
    received_bytes: int
    """In the whole job, by the node that received most."""


def start(quick: bool) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as text:
        starts = asyncio.run(_starts(Path(text), 1 + (2 if quick else 9)))
    cold, warm = starts[0], starts[1:]
    middle = statistics.median(one.whole_s for one in warm)
    market = statistics.median(sum(one.market_ms) for one in warm)
    held, aside, taken = (statistics.median(one.market_ms[at] for one in warm) for at in range(3))
    times = [one.whole_s for one in warm]
    return [
        figure("start/first_step", round(middle, 2), "s", f"under {START_GOAL_S:g}", middle < START_GOAL_S,
               f"{len(warm)} starts, {NODES} nodes that have the blobs; range {min(times):.2f} to {max(times):.2f}; "
               + _say_pieces(warm)),
        figure("start/market", round(market), "ms", f"under {MARKET_GOAL_MS}", market < MARKET_GOAL_MS,
               f"places held {held:.0f}, money set aside {aside:.0f}, taken {taken:.0f}"),
        figure("start/cold", round(cold.whole_s, 2), "s",
               compared_with="the first start, as soon as the nodes are up: nothing at them, and their engines' "
               "libraries are still being loaded; " + _say_pieces([cold])),
    ]  # fmt: skip


def _say_pieces(starts: list[Start]) -> str:
    """The median of each, in milliseconds, and whether nodes fetched what they had."""
    medians = {piece: statistics.median(one.pieces_s[piece] for one in starts) for piece in PIECES}
    received = format_bytes(max(one.received_bytes for one in starts))
    pieces = ", ".join(f"{piece} {1000 * took_s:.0f}" for piece, took_s in medians.items())
    return f"ms: {pieces}; a node received {received} in the whole job"


async def _starts(folder: Path, count: int) -> list[Start]:
    source = Path(asyncio.__file__).parent
    (folder / "text.txt").write_text("\n".join(one.read_text() for one in sorted(source.glob("*.py"))))
    (folder / "job.yaml").write_text(_JOB.format(folder=folder, nodes=NODES))
    async with LocalShoal(folder / "shoal", environment=AS_USERS) as shoal:
        await shoal.start_hub()
        ledger = await shoal.start_ledger(options=["--mint-max", str(DEPOSIT_MICRO // 1_000_000)])
        ticket = LedgerTicket.parse(ledger.ready["ticket"])
        account, clock = create_account(folder / "home" / "account.key"), SystemClock()
        endpoint = TlsEndpoint(KeyPair.generate(), clock=clock, dice=SystemDice())
        await RemoteLedger(endpoint, ticket, clock).mint(account.address, DEPOSIT_MICRO)
        await endpoint.close()
        for number in range(NODES):
            payee = address_text(create_account(folder / "payees" / str(number)).address)
            options = ["--threads", "1", "--storage", "1 GiB", "--price", "0.36/h", "--account", payee]
            await shoal.start_node(f"node-{number}", options=[*options, "--ledger", str(ticket)])
        return [await _start(folder, shoal, str(ticket)) for _ in range(count)]


async def _start(folder: Path, shoal: LocalShoal, ledger: str) -> Start:
    """Run the whole job, which is short."""
    words = ["train", str(folder / "job.yaml"), "--runs", str(folder / "runs"), "--replace", "--budget", "1"]
    words += ["--hub", shoal.hub_tickets[0], "--ledger", ledger]
    said_plainly = {"NO_COLOR": "1", "COLUMNS": "200", "SHOAL_LOG": "info"}
    home = {**os.environ, **AS_USERS, **said_plainly, "SHOAL_HOME": str(folder / "home")}
    began = time.perf_counter()
    train = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _BEGIN, *words, env=home,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert train.stderr is not None
    said = list[tuple[float, str]]()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while line := (await train.stderr.readline()).decode():
                said.append((time.perf_counter() - began, line.rstrip()))
            await train.wait()
    finally:
        if train.returncode is None:
            train.kill()
    assert train.returncode == 0, said
    return _read(folder / "runs" / "start", said)


def _read(run: Path, said: list[tuple[float, str]]) -> Start:
    events = [msgspec.json.decode(line, type=Event) for line in (run / "events.jsonl").read_bytes().splitlines()]
    lanes = [msgspec.json.decode(line, type=LaneSegment) for line in (run / "lanes.jsonl").read_bytes().splitlines()]
    joined = next(event for event in events if event.kind == "joined")
    zero_s = next(at for at, line in said if joined.sentence in line) - joined.time_s
    first_s = zero_s + min(one.start_s for one in lanes if one.state is Lane.COMPUTING)
    until = next(at for at, line in said if "round 0: " in line)
    moments = {
        piece: max(at for at, line in said if word in line and at <= until) if word else first_s
        for piece, (_, word) in PIECES.items()
    }
    pieces = {
        piece: moments[piece] - max((moments[one] for one in after), default=0.0)
        for piece, (after, _) in PIECES.items()
    }
    times = next(found for _, line in said if (found := _TIMES.search(line)))
    report = report_from_json((run / "report.json").read_bytes())
    return Start(first_s, pieces, tuple(map(int, times.groups())), max(one.bytes_received for one in report.nodes))
