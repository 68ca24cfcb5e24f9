"""Pieces for tests of whole jobs: a job file with a model of 31 thousand parameters, and shoals to run it on."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from engine_pieces import SEQUENCE, small_config, some_text
from typing_extensions import Buffer

from shoal.driver.folder import RunFolder
from shoal.driver.lines import Event
from shoal.driver.report import NodeReport, Report
from shoal.driver.training import Progress
from shoal.identity import KeyPair
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import open_record
from shoal.protocol.training import Assignment, Commit, Contribution, Grant, Member, Term
from shoal.sdk.jobfile import JobFile, parse_job
from shoal.sdk.local import LocalProcess, LocalShoal
from shoal.sdk.train import TrainOptions, resume, train
from shoal.world import DirectoryDisk, SystemClock

PATIENCE_S = 150.0
"""For what must happen at all; how fast is nobody's promise here."""

_JOB = """\
name: {name}
seed: 3
model:
  config: {folder}/config.json
data:
  paths: [{folder}/text.txt]
  sequence_tokens: {sequence}
tokens: {tokens}
batch_samples: 8
rounds:
  inner_steps: {steps}
  lag: {lag}
  codec: {codec}
  grace: 2 s
  deadline: {deadline_s} s
replay:
  snapshot_every: 3
  audit_rate: 0.0
requirements:
  nodes_min: {nodes_min}
  wait: 60 s
"""


def job_text(
    folder: Path,
    *,
    name: str = "job",
    tokens: int = 40_000,
    steps: int = 8,
    lag: int = 1,
    codec: str = "sparse2",
    nodes_min: int = 2,
    deadline_s: int = 8,
) -> bytes:
    """A job file over a text and a config that are written beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(some_text(40_000))
    (folder / "config.json").write_text(small_config())
    return _JOB.format(
        folder=folder,
        name=name,
        sequence=SEQUENCE,
        tokens=tokens,
        steps=steps,
        lag=lag,
        codec=codec,
        nodes_min=nodes_min,
        deadline_s=deadline_s,
    ).encode()


@dataclass
class Watch:
    """What a job told while it ran, and what is to be done when it has come so far."""

    at: dict[float, Callable[[], None]] = field(default_factory=dict)
    """Share of the budget -> what to do then, once."""
    events: list[Event] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    spent: list[int | None] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def progress(self, now: Progress) -> None:
        share = now.tokens_total / now.token_budget
        self.shares.append(share)
        self.spent.append(now.spent_micro)
        for when in sorted(self.at):
            if share >= when:
                self.at.pop(when)()
        self.changed.set()

    def event(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def sentences(self, word: str) -> list[str]:
        return [event.sentence for event in self.events if word in event.sentence]


def options_for(shoal: LocalShoal, folder: Path, key: KeyPair, watch: Watch) -> TrainOptions:
    return TrainOptions(
        folder=folder,
        hubs=[HubTicket.parse(ticket) for ticket in shoal.hub_tickets],
        key=key,
        say=watch.said.append,
        progress=watch.progress,
        event=watch.event,
    )


def parsed(text: bytes, folder: Path) -> JobFile:
    return parse_job(text, folder / "job.yaml")


async def run_job(shoal: LocalShoal, at: Path, watch: Watch | None = None, **changes: object) -> Report:
    """A whole job in this process; `at` becomes its place, and `at / "run"` its folder."""
    watch = watch or Watch()
    text = job_text(at, **changes)  # type: ignore[arg-type]
    return await train(parsed(text, at), text, options_for(shoal, at / "run", owner_key(), watch))


async def resume_job(shoal: LocalShoal, at: Path, key: KeyPair, watch: Watch, text: bytes) -> Report:
    async with asyncio.timeout(PATIENCE_S):
        return await resume(parsed(text, at), options_for(shoal, at / "run", key, watch))


_KEYS: list[KeyPair] = []


def owner_key() -> KeyPair:
    """One owner for all jobs of a test run."""
    if not _KEYS:
        _KEYS.append(KeyPair.generate())
    return _KEYS[0]


def node(report: Report, name: str) -> NodeReport:
    return next(one for one in report.nodes if one.name == name)


def check_account(report: Report, folder: Path) -> None:
    """What has to be true of every job that was done, whatever happened to it: the records verify and form one chain,
    no sample counts twice in a pass, nothing that counts is missing, and the report says the same."""
    with RunFolder.open(folder, read_only=True) as run:
        network = run.job.network
        job = run.train_job()
        commits: dict[bytes, Commit] = {}
        assignments: dict[bytes, Assignment] = {}
        contributions: dict[bytes, Contribution] = {}
        terms: list[int] = []
        for envelope in run.records(Grant, Term, Member, Assignment, Contribution, Commit):
            match envelope.kind:
                case Commit.KIND:
                    commits[envelope.record_id] = open_record(envelope, Commit, network)
                case Assignment.KIND:
                    assignments[envelope.record_id] = open_record(envelope, Assignment, network)
                case Contribution.KIND:
                    contributions[envelope.record_id] = open_record(envelope, Contribution, network)
                case Member.KIND:
                    open_record(envelope, Member, network)
                case Term.KIND:
                    terms.append(open_record(envelope, Term, network).number)
                case Grant.KIND:
                    open_record(envelope, Grant, network)
        newest = max(commits.values(), key=lambda one: (one.term, one.round))
        chain = [newest]
        while chain[-1].previous != run.job.record_id:
            chain.append(commits[chain[-1].previous])
        chain.reverse()
    assert terms == list(range(1, len(terms) + 1))
    assert [one.round for one in chain] == list(range(len(chain)))
    counted: set[tuple[int, int]] = set()
    tokens = 0
    for commit in chain:
        shares = {share.member: share for share in assignments[commit.assignment].shares}
        for entry in commit.accepted:
            made = contributions[entry.contribution]
            assert (made.member, made.round, made.tokens) == (entry.member, commit.round, entry.tokens)
            for piece in shares[entry.member].ranges:
                positions = {(piece.pass_number, position) for position in range(piece.start, piece.stop)}
                assert not positions & counted, f"round {commit.round} counts samples again"
                counted |= positions
            tokens += entry.tokens
        assert commit.tokens_total == tokens
    whole_passes = {number for number, _ in counted} - {max(number for number, _ in counted)}
    for number in whole_passes:
        assert sum(1 for one, _ in counted if one == number) == job.data.samples
    assert report.tokens_accepted == tokens == len(counted) * job.data.sequence_tokens
    assert report.rounds == len(chain)
    assert sum(one.tokens for one in report.nodes) == tokens
    assert abs(sum(one.accepted_share for one in report.nodes) - 1) < 1e-9
    assert report.held_out_loss is not None and report.untrained_loss is not None


class OffsetClock(SystemClock):
    """A machine whose wall clock is wrong by so many hours."""

    def __init__(self, hours: float) -> None:
        self._off_ms = round(hours * 3_600_000)

    def now_ms(self) -> int:
        return super().now_ms() + self._off_ms


class FullDisk(DirectoryDisk):
    """A disk that has no more room from the moment it is told so."""

    full = False

    def write(self, name: str, data: Buffer, offset: int = 0) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(name, data, offset)


def engine_of(process: LocalProcess) -> psutil.Process:
    """The engine process of a node that works."""
    for child in psutil.Process(process.pid).children(recursive=True):
        forked = "shoal.engines.template" in child.cmdline() and child.ppid() != process.pid
        if forked or "shoal.training.worker" in child.cmdline():
            return child
    raise AssertionError(f"{process.name} has no engine")
