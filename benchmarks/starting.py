"""From `shoal train` to the first inner step, on nodes that are up and cost something (`market.py` prints it).

The command runs as a user runs it; what it says is read with the moment at which it came. Its folder says when the
first node began its first inner step, in seconds since the driver's start; the driver's events are printed as they
come, which ties those seconds to this process's clock.
"""

from __future__ import annotations

import asyncio
import itertools
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
from shoal.house import RemoteLedger
from shoal.identity import KeyPair
from shoal.identity.accounts import address_text, create_account
from shoal.protocol.ledgers import LedgerTicket
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
STAGES = ("command and links", "reading and finding", "holding", "signing and money", "members", "first assignment")


@dataclass(frozen=True)
class Start:
    """Seconds from the command to its first inner step, what each stage of that took, and the market's milliseconds:
    held, set aside, taken."""

    whole_s: float
    stages_s: tuple[float, ...]
    market_ms: tuple[int, ...]


def start(quick: bool) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as text:
        starts = asyncio.run(_starts(Path(text), 1 + (2 if quick else 9)))
    cold, warm = starts[0], starts[1:]
    middle = statistics.median(one.whole_s for one in warm)
    market = statistics.median(sum(one.market_ms) for one in warm)
    parts = [statistics.median(one.stages_s[at] for one in warm) for at in range(len(STAGES))]
    held, aside, taken = (statistics.median(one.market_ms[at] for one in warm) for at in range(3))
    times = [one.whole_s for one in warm]
    return [
        figure("start/first_step", round(middle, 2), "s", f"under {START_GOAL_S:g}", middle < START_GOAL_S,
               f"{len(warm)} starts, {NODES} nodes that have the blobs; range {min(times):.2f} to {max(times):.2f}; "
               + ", ".join(f"{name} {took:.2f}" for name, took in zip(STAGES, parts, strict=True))),
        figure("start/market", round(market), "ms", f"under {MARKET_GOAL_MS}", market < MARKET_GOAL_MS,
               f"places held {held:.0f}, money set aside {aside:.0f}, taken {taken:.0f}"),
        figure("start/cold", round(cold.whole_s, 2), "s",
               compared_with="the first start: nothing at the nodes, no engine's libraries loaded for a job; "
               + ", ".join(f"{name} {took:.2f}" for name, took in zip(STAGES, cold.stages_s, strict=True))),
    ]  # fmt: skip


async def _starts(folder: Path, count: int) -> list[Start]:
    source = Path(asyncio.__file__).parent
    (folder / "text.txt").write_text("\n".join(one.read_text() for one in sorted(source.glob("*.py"))))
    (folder / "job.yaml").write_text(_JOB.format(folder=folder, nodes=NODES))
    async with LocalShoal(folder / "shoal") as shoal:
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
    home = {**os.environ, "SHOAL_HOME": str(folder / "home"), "NO_COLOR": "1", "COLUMNS": "200"}
    began = time.perf_counter()
    train = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shoal", *words, env=home,
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
    def moment(word: str) -> float:
        return next(at for at, line in said if word in line)

    events = [msgspec.json.decode(line, type=Event) for line in (run / "events.jsonl").read_bytes().splitlines()]
    lanes = [msgspec.json.decode(line, type=LaneSegment) for line in (run / "lanes.jsonl").read_bytes().splitlines()]
    joined = next(event for event in events if event.kind == "joined")
    zero_s = moment(joined.sentence) - joined.time_s
    ready_s = max(one.stop_s for one in lanes if one.state is Lane.SYNCING)
    first_s = zero_s + max(ready_s, min(one.start_s for one in lanes if one.state is Lane.COMPUTING))
    times = next(found for _, line in said if (found := _TIMES.search(line)))
    told = (moment("Reading data"), moment("Chosen"), moment("inner steps a round"))
    moments = (0.0, *told, zero_s, zero_s + ready_s, first_s)
    stages = tuple(later - earlier for earlier, later in itertools.pairwise(moments))
    return Start(first_s, stages, tuple(map(int, times.groups())))
