"""Whole jobs with real processes on loopback, and everything that must not stop them.

One shoal serves most of them: two hubs, two nodes that listen and one that does not. What a test kills it starts again.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import pytest
from job_world import (
    PATIENCE_S,
    FullDisk,
    OffsetClock,
    Watch,
    check_account,
    engine_of,
    job_text,
    node,
    options_for,
    owner_key,
    parsed,
    resume_job,
    run_job,
)
from transformers import AutoModelForCausalLM

from shoal.driver import replay
from shoal.driver.chain import read_record
from shoal.driver.folder import FolderWriteFailed, RunFolder
from shoal.driver.lines import Event, EventKind
from shoal.driver.replay import NotOpened, Replayer
from shoal.driver.report import Figures, NodeStatus, Report, report_from_json
from shoal.driver.takeover import CannotTakeOver
from shoal.driver.write_report import make_report
from shoal.hub import HubClient
from shoal.identity import Envelope, KeyPair
from shoal.node.start import start_node
from shoal.protocol.hubs import HubTicket
from shoal.protocol.offers import OfferFind
from shoal.protocol.training import Contribution
from shoal.sdk import train as train_module
from shoal.sdk.local import LocalProcess, LocalProcessFailed, LocalShoal
from shoal.sdk.replay import replay_round
from shoal.sdk.train import NothingToResume, plan, train
from shoal.storage import StorageFull
from shoal.transport import TlsEndpoint
from shoal.verification.replay import Outcome
from shoal.world import SystemClock, SystemDice

T = TypeVar("T")
THREADS = ("--threads", "1", "--storage", "2 GiB")
NAMES = ("amber", "birch", "cedar")
SPEED = 0.5


@dataclass
class World:
    shoal: LocalShoal
    runner: asyncio.Runner

    def run(self, story: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(story)

    async def start(self, name: str, *options: str) -> LocalProcess:
        more = ["--listen", ""] if name == "cedar" else []
        return await self.shoal.start_node(name, max_speed=SPEED, options=[*THREADS, *more, *options])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with asyncio.Runner() as runner:
        shoal = LocalShoal(tmp_path_factory.mktemp("shoal"))
        here = World(shoal, runner)

        async def begin() -> None:
            await shoal.start_hub("north")
            await shoal.start_hub("south")
            await asyncio.gather(*(here.start(name) for name in NAMES))

        try:
            runner.run(begin())
            yield here
        finally:
            runner.run(shoal.stop())


class Early(Watch):
    """Looks, when the first node is ready, which engines the driver has."""

    engines: set[int] | None = None

    def event(self, event: Event) -> None:
        if event.kind is EventKind.JOINED and self.engines is None:
            self.engines = engines_here()
        super().event(event)


def engines_here() -> set[int]:
    """The process ids of this process's template, and of what was forked from it."""
    templates = [one for one in psutil.Process().children() if "shoal.engines.template" in one.cmdline()]
    return {one.pid for template in templates for one in (template, *template.children())}


def test_a_plain_job_leaves_a_model_and_a_true_account(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a node that accepts no links: it is reached through a hub, and its updates and private states too. The
    driver's own engine takes no processor from nodes beside it before they are at work."""
    watch, before = Early(), engines_here()
    report = world.run(run_job(world.shoal, tmp_path, watch, nodes_min=3))
    run = tmp_path / "run"
    assert report.goal is not None and report.goal.reached
    assert report.tokens_accepted >= report.token_budget
    check_account(report, run)
    assert report_from_json((run / "report.json").read_bytes()) == report
    assert [one.status for one in report.nodes] == [NodeStatus.FINISHED] * 3
    assert all(one.tokens > 0 and one.bytes_sent > 0 and one.bytes_received > 0 for one in report.nodes)
    assert watch.shares == sorted(watch.shares)
    assert watch.engines == before
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert sum(one.numel() for one in model.parameters()) == report.model_parameters
    for name in ("amber", "cedar"):
        rounds = report.rounds - 2
        tickets = [HubTicket.parse(ticket) for ticket in world.shoal.hub_tickets]
        found = world.run(
            replay_round(run, rounds, name, key=owner_key(), hubs=tickets, clock=SystemClock(), dice=SystemDice())
        )
        assert (found.verdict, found.name) == ("match", name), found.sentence
        if name == "cedar":  # which keeps its states elsewhere than in the folder
            assert found.opened_bytes > 0 and "Not opened" not in found.sentence
    monkeypatch.setattr(replay, "PROCESSES_MAX", 1)
    world.run(replays_after_a_false_claim(run, tmp_path / "scratch"))


async def replays_after_a_false_claim(run: Path, scratch: Path) -> None:
    """What one member says of its engine does not reach the replays of others."""
    with RunFolder.open(run, read_only=True) as folder:
        record = read_record(folder).record

        async def find(name: bytes) -> Path:
            return folder.blobs / "blobs" / name.hex()

        async def refuse(contribution: Contribution, private: bytes) -> Path:
            raise NotOpened("It is not there.")

        scratch.mkdir()
        replayer = Replayer(record, find_blob=find, open_private=refuse, scratch=scratch)
        try:
            honest, other = [one for one in record.contributions.values() if one.round == 0][:2]
            assert (await replayer.replay(honest)).verdict.outcome is Outcome.MATCH
            assert replayer._engine is not None
            replayer._engine._process.kill()  # an engine that died is not asked again
            assert (await replayer.replay(honest)).verdict.outcome is Outcome.NOT_REPLAYABLE
            assert (await replayer.replay(honest)).verdict.outcome is Outcome.MATCH
            claim = msgspec.structs.replace(other, engine=msgspec.structs.replace(other.engine, processes=65))
            repeated = (await replayer.replay(claim)).verdict
            assert repeated.outcome is not Outcome.NOT_REPLAYABLE, repeated.sentence
            assert (await replayer.replay(honest)).verdict.outcome is Outcome.MATCH
        finally:
            await replayer.close()


def test_dense_updates_without_lag_by_clocks_that_are_hours_apart(world: World, tmp_path: Path) -> None:
    """The driver's clock is an hour behind, one node's an hour ahead of the others."""

    async def story() -> Report:
        tickets = [HubTicket.parse(ticket) for ticket in world.shoal.hub_tickets]
        ahead = await start_node(
            tmp_path / "ahead",
            tickets,
            name="ahead",
            max_speed=SPEED,
            threads=1,
            device="cpu",
            processes=1,
            listen="tcp://127.0.0.1:0",
            storage_bytes=1 << 30,
            dishonest="",
            clock=OffsetClock(1),
            dice=SystemDice(),
        )
        try:
            text = job_text(tmp_path, tokens=16_000, codec="none", lag=0, nodes_min=4)
            options = options_for(world.shoal, tmp_path / "run", owner_key(), Watch())
            options.clock = OffsetClock(-1)
            async with asyncio.timeout(PATIENCE_S):
                return await train(parsed(text, tmp_path), text, options)
        finally:
            await ahead.close()

    report = world.run(story())
    assert report.goal is not None and report.goal.reached
    check_account(report, tmp_path / "run")
    assert node(report, "ahead").tokens > 0
    assert report.settings["rounds"]["codec"] == "none" and report.settings["rounds"]["lag"] == 0


def test_a_job_survives_whatever_happens_to_hubs_nodes_and_engines(world: World, tmp_path: Path) -> None:
    """One long job, and one thing after another; it is stopped when all has been told."""
    shoal, watch = world.shoal, Watch()
    ids = {name: process.ready["node"] for name, process in shoal.nodes.items()}

    def times(kind: EventKind, name: str) -> int:
        return sum(1 for event in watch.events if event.kind is kind and event.node == ids[name])

    def ended(name: str) -> int:
        return times(EventKind.DIED, name) + times(EventKind.LEFT, name)

    async def some_rounds(number: int = 2) -> None:
        until = len(watch.shares) + number
        await watch.until(lambda: len(watch.shares) >= until)

    async def story() -> None:
        running = asyncio.create_task(run_job(shoal, tmp_path, watch, tokens=100_000_000, nodes_min=3))
        running.add_done_callback(lambda _: watch.changed.set())
        try:
            await watch.until(lambda: running.done() or len(watch.shares) > 2)
            assert not running.done(), running.exception()

            north = shoal.hubs[0]
            north.kill()
            await north.process.wait()
            await some_rounds()

            # One is stopped for longer than any grace or deadline, while others have troubles of their own.
            joined = {name: times(EventKind.JOINED, name) for name in NAMES}
            gone = {name: ended(name) for name in NAMES}
            os.kill(shoal.nodes["birch"].pid, signal.SIGSTOP)
            engine_of(shoal.nodes["amber"]).kill()
            await watch.until(lambda: ended("amber") > gone["amber"])
            assert any("SIGKILL" in sentence for sentence in watch.sentences("amber")), watch.sentences("amber")
            assert shoal.nodes["amber"].running
            await watch.until(lambda: times(EventKind.JOINED, "amber") > joined["amber"])
            await watch.until(lambda: ended("birch") > gone["birch"])

            shoal.nodes["cedar"].kill()
            os.kill(shoal.nodes["birch"].pid, signal.SIGCONT)
            await watch.until(lambda: ended("cedar") > gone["cedar"])

            # A hub comes back, and the nodes to it by themselves.
            shoal.hubs.remove(north)
            port = HubTicket.parse(north.ready["ticket"]).addresses[0].rsplit(":", 1)[1]
            await shoal.start_hub("north", options=["--listen", f"tcp://127.0.0.1:{port}"])
            assert shoal.hubs[-1].ready["ticket"] == north.ready["ticket"]

            # One whose disk is full from the start leaves, saying so.
            _, poor = await asyncio.gather(world.start("cedar"), world.start("poor", "--storage", "200 KiB"))
            assert shoal.nodes["cedar"].ready["node"] == ids["cedar"]
            ids["poor"] = poor.ready["node"]
            await watch.until(lambda: ended("poor") > 0)
            assert any("has no room" in sentence for sentence in watch.sentences("poor")), watch.sentences("poor")
            await poor.stop()
            del shoal.nodes["poor"]
            for name in ("birch", "cedar"):
                await watch.until(lambda name=name: times(EventKind.JOINED, name) > joined[name])
            await some_rounds(6)

            # Whose job runs can still look round: each run drives under a key of its own.
            text = job_text(tmp_path, name="another")
            planned = await plan(
                parsed(text, tmp_path), options_for(shoal, tmp_path, owner_key(), Watch()), tmp_path / "plan"
            )
            assert (planned.nodes, planned.nodes_min) == ((), 2)
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert len(await offers_at(shoal.hubs[-1], 3)) >= 3

    world.run(story())
    with RunFolder.open(tmp_path / "run", read_only=True) as folder:
        report = make_report(folder, Figures())
    check_account(report, tmp_path / "run")
    assert all(node(report, name).tokens > 0 for name in NAMES)
    assert watch.shares == sorted(watch.shares)


def test_reading_data_ends_when_nobody_waits_for_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def read_without_end(*arguments: Any) -> None:
        *_, watch = arguments
        begun.set()
        try:
            while True:
                watch(1, 2)
        finally:
            ended.set()

    monkeypatch.setattr(train_module, "prepare", read_without_end)
    text = job_text(tmp_path)
    options = options_for(world.shoal, tmp_path, owner_key(), Watch())

    async def story() -> None:
        planning = asyncio.create_task(plan(parsed(text, tmp_path), options, tmp_path / "plan"))
        await asyncio.to_thread(begun.wait)
        planning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await planning

    world.run(story())
    assert ended.is_set()


async def offers_at(hub: LocalProcess, wanted: int) -> list[str]:
    """The names that one hub lists, once there are so many of them."""
    clock, dice = SystemClock(), SystemDice()
    endpoint = TlsEndpoint(KeyPair.generate(), clock=clock, dice=dice)
    client = HubClient(endpoint, [HubTicket.parse(hub.ready["ticket"])], clock=clock, dice=dice)
    try:
        await client.start()
        async with asyncio.timeout(PATIENCE_S):
            while len(found := await client.find(OfferFind())) < wanted:
                await clock.sleep(0.5)
        return [one.offer.name for one in found]
    finally:
        await client.close()
        await endpoint.close()


def test_a_killed_driver_goes_on_in_a_new_term(world: World, tmp_path: Path) -> None:
    """Its members still run for the old one when it comes back."""
    home = tmp_path / "home"
    (tmp_path / "job.yaml").write_bytes(job_text(tmp_path, tokens=100_000, nodes_min=3))

    async def driver(*arguments: str) -> asyncio.subprocess.Process:
        hubs = [part for ticket in world.shoal.hub_tickets for part in ("--hub", ticket)]
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "shoal",
            "train",
            *arguments,
            "--json",
            *hubs,
            env={**os.environ, "SHOAL_HOME": str(home)},
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
        )

    async def story() -> Report:
        run = tmp_path / "runs" / "job"
        first = await driver("job.yaml")
        metrics = run / "metrics.jsonl"
        async with asyncio.timeout(PATIENCE_S):
            while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
                assert first.returncode is None
                await asyncio.sleep(0.02)
        first.kill()
        await first.communicate()
        # An older copy of the folder is refused: members hold Commits that it lacks.
        shutil.copytree(run, tmp_path / "older")
        second = await driver("runs/job", "--resume")
        lines = metrics.read_bytes().count(b"\n")
        async with asyncio.timeout(PATIENCE_S):
            while metrics.read_bytes().count(b"\n") < lines + 2:
                assert second.returncode is None
                await asyncio.sleep(0.02)
        second.kill()
        await second.communicate()
        run.rename(tmp_path / "newer")
        (tmp_path / "older").rename(run)
        refused = await driver("runs/job", "--resume")
        said, _ = await refused.communicate()
        assert refused.returncode == 1 and json.loads(said)["error"]["code"] == CannotTakeOver.code
        run.rename(tmp_path / "older")
        (tmp_path / "newer").rename(run)
        with RunFolder.open(run, read_only=True) as folder:
            before = make_report(folder, Figures())
        assert 0 < before.tokens_accepted < before.token_budget
        third = await driver("runs/job", "--resume")
        async with asyncio.timeout(PATIENCE_S):
            said, _ = await third.communicate()
        assert third.returncode == 0
        after = report_from_json(said)
        assert after == report_from_json((run / "report.json").read_bytes())
        check_account(after, run)
        assert [term.number for term in after.terms] == [1, 2, 3]
        assert after.terms[2].head_round == before.rounds - 1
        assert after.tokens_accepted >= after.token_budget
        assert after.wall_s > before.wall_s
        assert {one.name for one in after.nodes} == set(NAMES)
        assert all(one.tokens > 0 for one in after.nodes)
        tickets = [HubTicket.parse(ticket) for ticket in world.shoal.hub_tickets]
        for rounds in range(before.rounds, before.rounds + 2):  # assigned anew, from the newest Commit
            found = await replay_round(
                run, rounds, "amber", key=owner_key(), hubs=tickets, clock=SystemClock(), dice=SystemDice()
            )
            assert found.verdict == "match", found.sentence
        # Also when the job has ended: the nodes remember its newest Commit.
        run.rename(tmp_path / "newer")
        (tmp_path / "older").rename(run)
        late = await driver("runs/job", "--resume")
        said, _ = await late.communicate()
        assert late.returncode == 1 and "which" in json.loads(said)["error"]["sentence"]
        assert json.loads(said)["error"]["code"] == CannotTakeOver.code
        return after

    world.run(story())


@pytest.mark.parametrize("full", [OSError(errno.ENOSPC, "No space left"), StorageFull("The disk is full.")])
def test_a_disk_that_is_full_before_a_job_began_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    def prepare(*_: object) -> None:
        raise full

    monkeypatch.setattr(train_module, "prepare", prepare)
    with pytest.raises(FolderWriteFailed, match=rf"no room left .* {tmp_path / 'run'}; make room, then begin again"):
        world.run(run_job(world.shoal, tmp_path))


def test_a_run_that_is_killed_as_it_begins_can_be_resumed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def begin_and_die(folder: RunFolder, job: Envelope, job_yaml: bytes = b"") -> None:
        begin(folder, job, job_yaml)
        raise Killed

    begin = RunFolder.begin
    monkeypatch.setattr(RunFolder, "begin", begin_and_die)
    with pytest.raises(Killed):
        world.run(run_job(world.shoal, tmp_path, tokens=10_000))
    report = world.run(resume_job(world.shoal, tmp_path, owner_key(), Watch(), job_text(tmp_path, tokens=10_000)))
    assert report.goal is not None and report.goal.reached
    check_account(report, tmp_path / "run")


def test_a_full_disk_stops_the_driver_and_loses_nothing(world: World, tmp_path: Path) -> None:
    at = tmp_path / "run"
    at.mkdir()
    disk = FullDisk(at)
    watch = Watch()
    text = job_text(tmp_path, tokens=30_000, codec="int8")
    watch.at[0.4] = lambda: setattr(disk, "full", True)

    async def story() -> Report:
        folder = RunFolder.create(at, disk=disk)
        options = options_for(world.shoal, at, owner_key(), watch)
        with pytest.raises(FolderWriteFailed, match="make room, then use --resume"):
            async with asyncio.timeout(PATIENCE_S):
                await train(parsed(text, tmp_path), text, options, folder)
        (at / "driver.key").unlink()  # then the owner itself drives
        again = Watch()
        report = await resume_job(world.shoal, tmp_path, owner_key(), again, text)
        assert again.shares[0] >= 0.4
        # Killed between its last Commit and its report, a driver still measures the model and writes the report.
        (at / "report.json").unlink()
        after = await resume_job(world.shoal, tmp_path, owner_key(), Watch(), text)
        assert (after.rounds, after.tokens_accepted) == (report.rounds, report.tokens_accepted)
        assert after.goal is not None and after.goal.reached
        # One that is finished stays as it is, and gets back what can be made again.
        kept = {name: (at / name).read_bytes() for name in ("records/chain", "report.html")}
        (at / "report.html").unlink()
        with pytest.raises(NothingToResume):
            await resume_job(world.shoal, tmp_path, owner_key(), Watch(), text)
        assert {name: (at / name).read_bytes() for name in kept} == kept
        return report

    report = world.run(story())
    assert report.goal is not None and report.goal.reached
    check_account(report, at)


def test_two_nodes_with_one_key_hear_of_it(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        folder = world.shoal.folder / "nodes" / "twin"
        folder.mkdir(parents=True)
        shutil.copy(world.shoal.folder / "nodes" / "amber" / "node.key", folder / "node.key")
        with pytest.raises(LocalProcessFailed, match="Another running node has the key in .*key file of its own"):
            await world.start("twin")

    world.run(story())
    assert world.shoal.nodes["amber"].running
