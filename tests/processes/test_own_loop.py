"""A user's own PyTorch loop: three processes of examples/digits.py train together, one is killed, one lies; their
rounds are replayed by running the script. Beside that, what a loop's engine must do whatever the network is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import shoal
from shoal.driver.report import NodeStatus, Report
from shoal.engines import Done, Failed
from shoal.errors import ShoalError
from shoal.identity import Envelope, KeyPair
from shoal.node.member import Invitation
from shoal.protocol.blobs import BlobRef
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import sign
from shoal.protocol.training import (
    Codec,
    DataRef,
    ModelRef,
    OptimizerSettings,
    ReplaySettings,
    RoundSettings,
    SampleRange,
    TrainJob,
)
from shoal.sdk.jobfile import parse_job
from shoal.sdk.local import LocalShoal
from shoal.sdk.loop_engine import BadLoop, LoopEngine, Order, Orders, Over
from shoal.sdk.loop_node import LoopNode, LoopPlace, NotOurs
from shoal.sdk.loop_script import NoScript, ScriptFailed, look_at
from shoal.sdk.own_loop import LoopMember
from shoal.sdk.places import user_key
from shoal.sdk.replay import ReplayResult, replay_round
from shoal.sdk.train import TrainOptions, train
from shoal.storage import BlobStore
from shoal.training.commands import (
    ApplyCommit,
    CancelRound,
    Command,
    CommittedUpdate,
    Prepare,
    Prepared,
    Reply,
    RollBack,
    RoundCancelled,
    RoundDone,
    RunRound,
)
from shoal.training.state import Layout, SharedState
from shoal.world import SystemClock, SystemDice

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "digits.py"
LIAR = Path(__file__).parent / "lying_loop.py"
JOB = f"""
name: digits
model: {{script: {SCRIPT}}}
tokens: 12k
batch_samples: 16
rounds: {{inner_steps: 10, codec: none, lag: 1, grace: 500 ms, weight_cap: 0.5}}
replay: {{audit_rate: 0, snapshot_every: 3}}
requirements: {{nodes_min: 3, wait: 3 min}}
"""
pytestmark = pytest.mark.timeout(280)


# --- a whole job ----------------------------------------------------------------------------------------------------


class Run:
    """What a job left behind."""

    def __init__(self, folder: Path, report: Report, hubs: list[HubTicket], ends: Mapping[str, int], said: str) -> None:
        self.folder, self.report, self.hubs, self.ends, self.said = folder, report, hubs, ends, said
        self.nodes = {node.name: node for node in report.nodes}

    def replay(self, round_number: int, node: str) -> ReplayResult:
        return asyncio.run(
            replay_round(
                self.folder,
                round_number,
                node,
                key=user_key(),
                hubs=[],
                clock=SystemClock(),
                dice=SystemDice(),
                script=SCRIPT,
            )
        )


async def _train(folder: Path) -> Run:
    said: list[str] = []
    victims: list[subprocess.Popen[bytes]] = []
    async with LocalShoal(folder / "shoal") as local:
        await local.start_hub()
        environment = {**os.environ, "SHOAL_HUB": local.hub_tickets[0], "OMP_NUM_THREADS": "1"}

        def start(name: str, *command: str) -> subprocess.Popen[bytes]:
            log = (folder / f"{name}.log").open("wb")
            return subprocess.Popen(
                [sys.executable, *command], env={**environment, "SHOAL_NAME": name}, stdout=log, stderr=log
            )

        processes = {
            "ann": start("ann", str(SCRIPT)),
            "ben": start("ben", str(SCRIPT)),
            "liar": start("liar", str(LIAR), str(SCRIPT)),
        }
        victims.append(processes["ben"])

        def kill_one(progress: Any) -> None:
            if progress.tokens_total > 3_000 and victims:
                victims.pop().send_signal(signal.SIGKILL)

        hubs = [HubTicket.parse(local.hub_tickets[0])]
        try:
            job_file = parse_job(JOB.encode(), folder / "digits.yaml")
            report = await train(
                job_file,
                JOB.encode(),
                TrainOptions(
                    folder=folder / "run",
                    hubs=hubs,
                    key=user_key(),
                    progress=kill_one,
                    closing_audit=True,
                    say=said.append,
                ),
            )
            ends = {name: await asyncio.to_thread(process.wait, 60) for name, process in processes.items()}
        finally:
            for process in processes.values():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
    return Run(folder / "run", report, hubs, ends, "\n".join(said))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("own-loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_HOME", str(folder / "home"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield asyncio.run(_train(folder))


def test_processes_of_ones_own_train_one_model(run: Run) -> None:
    report = run.report
    assert report.goal is not None and report.goal.reached
    assert report.tokens_accepted >= 12_000
    assert report.untrained_loss is not None and report.held_out_loss is not None
    assert report.held_out_loss < 0.4 * report.untrained_loss
    assert min(run.nodes[name].tokens for name in ("ann", "liar")) > 2_000
    assert "of the test images are told right" in run.said
    tensors = load_file(run.folder / "model" / "model.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == {
        "0.weight": (64, 64),
        "0.bias": (64,),
        "2.weight": (10, 64),
        "2.bias": (10,),
    }


def test_a_process_that_is_killed_is_named_and_the_others_go_on(run: Run) -> None:
    assert run.nodes["ben"].status is NodeStatus.DIED
    assert run.ends == {"ann": 0, "ben": -signal.SIGKILL, "liar": 0}


def test_a_process_that_changed_one_sample_is_found_by_replay_and_no_other(run: Run) -> None:
    verdicts = {audit.name: audit.verdict.value for audit in run.report.audits}
    assert verdicts["liar"] == "mismatch" and verdicts["ann"] == "match"
    assert run.nodes["liar"].status is NodeStatus.EXCLUDED
    assert run.nodes["ann"].status is NodeStatus.FINISHED


def test_a_round_is_replayed_bit_for_bit_by_running_the_script(run: Run) -> None:
    honest = run.replay(7, "ann")
    assert (honest.verdict, honest.difference) == ("match", 0.0), honest.sentence
    lying = run.replay(7, "liar")
    assert lying.verdict == "mismatch", lying.sentence


def test_a_replay_without_the_script_says_what_is_missing(run: Run) -> None:
    with pytest.raises(NoScript, match="--script"):
        asyncio.run(
            replay_round(
                run.folder, 7, "ann", key=user_key(), hubs=[], clock=SystemClock(), dice=SystemDice(), script=None
            )
        )


# --- the engine of a loop -------------------------------------------------------------------------------------------

SAMPLES = 48


def a_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


class Loop:
    """A small loop in a thread of its own, and its engine's commands."""

    def __init__(self, folder: Path, *, change: Callable[[np.ndarray], None] = lambda _: None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.orders: Orders = queue.Queue()
        self.model = a_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        parameters = dict(self.model.named_parameters())
        layout = Layout.of({name: parameter.shape for name, parameter in parameters.items()})
        flat = np.concatenate([parameters[tensor.name].detach().numpy().ravel() for tensor in layout.tensors])
        self.start = SharedState.start(layout, flat.astype(np.float32), momentum=False)
        self.start.write(folder / "start")
        self.engine = LoopEngine("tiny", self.model, self.optimizer, SAMPLES, self.orders, SystemClock().monotonic)
        self.before_step: Callable[[], None] = lambda: None
        self.steps = 0
        self._change = change
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.orders.put(Over("The test is done."))
        self._thread.join(30)
        assert not self._thread.is_alive() and self.engine.ended == "The test is done."

    def _loop(self) -> None:
        inputs = torch.linspace(-1, 1, SAMPLES * 6).view(SAMPLES, 6)
        for batch in self.engine.batches():
            self.before_step()
            self._change(batch)
            self.optimizer.zero_grad()
            loss = (self.model(inputs[batch]) - inputs[batch].sum(1, keepdim=True)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.engine.stepped(loss)
            self.steps += 1

    def ask(self, command: Command) -> Reply:
        return self.later(command).get(timeout=60)

    def later(self, command: Command) -> queue.Queue[Reply]:
        answers: queue.Queue[Reply] = queue.Queue()
        self.orders.put(Order(command, answers.put))
        return answers

    def job(self, **changes: Any) -> TrainJob:
        given: dict[str, Any] = {"name": "tiny", "samples": SAMPLES, **changes}
        return TrainJob(
            name=given["name"],
            created_ms=0,
            seed=3,
            model=ModelRef(start=BlobRef(self.start.hash, self.start.size), parameters=self.start.layout.size),
            data=DataRef(samples=given["samples"]),
            token_budget=1000,
            batch_samples=4,
            optimizer=OptimizerSettings(),
            rounds=RoundSettings(inner_steps=4, codec=Codec.INT8),
            replay=ReplaySettings(),
        )

    def prepare(self, *, measure: bool = False, **changes: Any) -> Reply:
        return self.ask(Prepare(job=self.job(**changes), state=str(self.folder / "start"), shards=(), measure=measure))

    def round(self, number: int, **changes: Any) -> RunRound:
        given: dict[str, Any] = {
            "round": number,
            "base_state": self.start.hash,
            "step": 4 * number,
            "tokens_done": 16 * number,
            "round_samples": 16,
            "member": bytes(32),
            "ranges": (SampleRange(0, 16 * number, 16 * number + 16),),
            "update": str(self.folder / f"update-{number}"),
            **changes,
        }
        return RunRound(**given)


def same(one: Reply, two: Reply) -> bool:
    assert isinstance(one, RoundDone) and isinstance(two, RoundDone)
    return (one.update_hash, one.private_before, one.private_after, one.losses, one.sketches) == (
        two.update_hash,
        two.private_before,
        two.private_after,
        two.losses,
        two.sketches,
    )


def test_the_same_round_gives_the_same_bytes_and_one_other_sample_gives_others(tmp_path: Path) -> None:
    def swap(batch: np.ndarray) -> None:
        batch[0] = (batch[0] + 1) % SAMPLES

    with Loop(tmp_path / "1") as one, Loop(tmp_path / "2") as two, Loop(tmp_path / "3", change=swap) as other:
        for loop in (one, two, other):
            assert isinstance(loop.prepare(), Prepared)
        for number in range(2):
            mine = one.ask(one.round(number))
            assert same(mine, two.ask(two.round(number)))
            assert not same(mine, other.ask(other.round(number)))


def test_measuring_the_loop_leaves_no_trace(tmp_path: Path) -> None:
    with Loop(tmp_path / "1") as measured, Loop(tmp_path / "2") as not_measured:
        speed = measured.prepare(measure=True)
        assert isinstance(speed, Prepared) and speed.samples_per_s > 0 and measured.steps > 0
        not_measured.prepare()
        assert same(measured.ask(measured.round(0)), not_measured.ask(not_measured.round(0)))


def test_a_cancelled_round_leaves_no_trace_and_the_next_batches_follow(tmp_path: Path) -> None:
    with Loop(tmp_path / "1") as disturbed, Loop(tmp_path / "2") as calm:
        disturbed.prepare()
        calm.prepare()
        cancelled: list[queue.Queue[Reply]] = []

        def cancel_in_the_second_step() -> None:
            if disturbed.steps == 1:
                cancelled.append(disturbed.later(CancelRound()))

        disturbed.before_step = cancel_in_the_second_step
        assert isinstance(disturbed.ask(disturbed.round(0)), RoundCancelled)
        assert isinstance(cancelled[0].get(timeout=60), Done) and disturbed.steps == 2
        assert same(disturbed.ask(disturbed.round(0)), calm.ask(calm.round(0)))


def test_a_round_that_is_rolled_back_was_never_done(tmp_path: Path) -> None:
    with Loop(tmp_path / "1") as disturbed, Loop(tmp_path / "2") as calm:
        prepared = disturbed.prepare()
        calm.prepare()
        assert isinstance(prepared, Prepared)
        disturbed.ask(disturbed.round(0))
        disturbed.ask(RollBack(private=prepared.private))
        assert same(disturbed.ask(disturbed.round(1)), calm.ask(calm.round(1)))


def test_a_commit_is_applied_between_steps_and_ends_in_the_model(tmp_path: Path) -> None:
    with Loop(tmp_path / "1") as loop:
        loop.prepare()
        first = loop.round(0)
        loop.ask(first)
        commit = ApplyCommit(
            round=0, previous=loop.start.hash, accepted=(CommittedUpdate(first.update, 1_000_000, 1_000_000),)
        )
        held: list[queue.Queue[Reply]] = []

        def apply_once() -> None:
            if not held:
                held.append(loop.later(commit))

        loop.before_step = apply_once
        assert isinstance(loop.ask(loop.round(1, in_flight=first.update)), RoundDone)
        state = held[0].get(timeout=60)
    assert not isinstance(state, Failed)
    newest = loop.engine._engine.newest  # type: ignore[union-attr]
    assert newest.hash != loop.start.hash
    shown = np.concatenate(
        [dict(loop.model.named_parameters())[tensor.name].detach().numpy().ravel() for tensor in newest.layout.tensors]
    )
    assert np.array_equal(shown, newest.parameters)


@pytest.mark.parametrize("other", [{"samples": SAMPLES + 1}, {"name": "another"}])
def test_a_loop_of_another_job_or_other_data_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    with Loop(tmp_path) as loop:
        refused = loop.prepare(**other)
        assert isinstance(refused, Failed) and refused.code == "SH-144"
        assert isinstance(loop.prepare(), Prepared)


def test_a_loop_that_does_not_report_its_steps_is_told_so(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    batches = iter(LoopMember(loop.engine, "here"))
    loop.later(Prepare(job=loop.job(), state=str(tmp_path / "start"), shards=(), measure=True))
    with pytest.raises(BadLoop, match="twice"):
        loop.engine.stepped(0.0)
    next(batches)
    with pytest.raises(BadLoop, match=r"member.stepped"):
        next(batches)


def test_a_member_is_iterated_over_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    closed: list[bool] = []
    member = LoopMember(loop.engine, "here", close=lambda: closed.append(True))
    loop.later(Prepare(job=loop.job(), state=str(tmp_path / "start"), shards=(), measure=True))
    for _ in member:
        break  # leaves the job
    assert closed
    with pytest.raises(BadLoop, match="once"):
        next(iter(member))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "running statistics"),
        (nn.Linear(2, 2, dtype=torch.float64), "float64"),
        (nn.Linear(2, 2).requires_grad_(False), "want a gradient"),
    ],
)
def test_a_model_that_cannot_be_shared_is_refused(model: nn.Module, sentence: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(BadLoop, match=sentence):
        LoopEngine("x", model, optimizer, 4, queue.Queue(), SystemClock().monotonic)


# --- whose loop it is -----------------------------------------------------------------------------------------------


def test_only_the_owner_s_job_is_worked_for(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "loop")
    owner, stranger = KeyPair.generate(), KeyPair.generate()
    place = LoopPlace(
        job="tiny",
        owner=owner.node_id,
        hubs=[],
        folder=tmp_path,
        name=None,
        listen=None,
        threads=1,
        device=torch.device("cpu"),
        storage_bytes=1 << 20,
    )
    node = LoopNode(place, loop.orders, SystemClock(), SystemDice())

    def invitation(key: KeyPair, name: str) -> Invitation:
        job = loop.job(name=name)
        envelope: Envelope = sign(key, job)
        return Invitation(envelope, job, envelope, envelope, None, -1, 0, job.model.start, key.node_id, ())

    for key, name in ((stranger, "tiny"), (owner, "another")):
        with pytest.raises(NotOurs):
            node._make_member(invitation(key, name))


def run_by_hand(home: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    hub = f"shoal://{KeyPair.generate().node_id.hex()}@127.0.0.1:9"
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "SHOAL_HOME": str(home), "SHOAL_HUB": hub, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_second_process_of_the_same_name_ends_with_a_sentence(tmp_path: Path) -> None:
    text = (
        "import shoal, torch\nmodel = torch.nn.Linear(2, 2)\n"
        "shoal.join('x', model, torch.optim.SGD(model.parameters(), lr=0.1), samples=4)"
    )
    first = BlobStore(tmp_path / "loops" / "x" / "ann" / "blobs", 1 << 20, SystemClock())
    second = run_by_hand(tmp_path, text, SHOAL_NAME="ann")
    first.close()
    assert second.returncode == 1
    assert second.stderr == (
        "SH-146: Another process of job 'x' is called 'ann' on this machine; give this one a name of its own "
        "(SHOAL_NAME, or name=), or none.\n"
    )


def test_other_errors_of_a_script_keep_their_traceback(tmp_path: Path) -> None:
    text = (
        "import shoal, torch\n"
        "try:\n    shoal.join('x', torch.nn.Linear(1, 1), None, samples=0)\n"
        "except shoal.sdk.own_loop.BadLoop:\n    raise KeyError('mine') from None"
    )
    ended = run_by_hand(tmp_path, text)
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "KeyError: 'mine'" in ended.stderr


def test_an_owner_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model()
    with pytest.raises(ShoalError, match="names no owner") as caught:
        shoal.join("x", model, torch.optim.SGD(model.parameters(), lr=0.1), samples=4, owner="ann")
    assert caught.value.code == "SH-147"


# --- the owner's look at a script -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise ValueError('no such file')", "ValueError: no such file"),
        ("print('hello')", "without iterating"),
        (
            "import shoal, torch\nmodel = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))\n"
            "for batch in shoal.join('x', model, torch.optim.SGD(model.parameters(), lr=0.1), samples=4): pass",
            "running statistics",
        ),
        (
            "import shoal, torch\nmodel = torch.nn.Linear(2, 2)\n"
            "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
            "schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)\n"
            "member = shoal.join('x', model, optimizer, samples=4)\n"
            "for batch in member:\n"
            "    optimizer.step(); schedule.step(); member.stepped(0.0)",
            "member.progress stood still: a scheduler counts steps",
        ),
    ],
)
def test_a_script_that_is_no_loop_is_refused_with_its_reason(tmp_path: Path, text: str, sentence: str) -> None:
    script = tmp_path / "loop.py"
    script.write_text(text)
    with pytest.raises(ScriptFailed, match=sentence):
        look_at(script, batch_samples=4)


def test_a_look_at_a_script_ends_when_asked(tmp_path: Path) -> None:
    script, started = tmp_path / "loop.py", tmp_path / "pid"
    script.write_text(
        f"import os, pathlib, threading\npathlib.Path({str(started)!r}).write_text(str(os.getpid()) + '.')\n"
        "threading.Event().wait()\n"
    )

    class Enough(Exception):
        pass

    def watch() -> None:
        if started.exists() and started.read_text().endswith("."):
            raise Enough

    with pytest.raises(Enough):
        look_at(script, batch_samples=4, watch=watch)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()[:-1]), 0)
