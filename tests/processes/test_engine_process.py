"""The engine as a child process: it answers, it dies, it is told apart, it never outlives its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from engine_pieces import Setting, make_setting

from shoal.engines import FRAME, FRAME_MAX_BYTES, EngineDied, EngineFailed, template
from shoal.training.commands import (
    ApplyCommit,
    CommittedUpdate,
    Evaluate,
    ExportCheckpoint,
    Generate,
    RoundDone,
)
from shoal.training.engine import LanguageEngine
from shoal.training.pacing import CREDIT_MAX_S, Pacer
from shoal.training.process import EngineProcess, RoundCancelledError
from shoal.training.updates import decode_update
from shoal.world import HeldClock, SystemClock

GENEROUS_S = 120.0


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("engine"), residual_ahead=0.2)


def commit(setting: Setting, state: bytes | None = None) -> ApplyCommit:
    update = CommittedUpdate(str(setting.folder / "update-0"), 1_000_000, 1_000_000)
    return ApplyCommit(round=0, previous=setting.start.hash, accepted=(update,), state=state)


def same(left: RoundDone, right: RoundDone) -> bool:
    return msgspec.structs.replace(left, compute_ms=0) == msgspec.structs.replace(right, compute_ms=0)


async def begun(work: Coroutine[Any, Any, RoundDone]) -> asyncio.Task[RoundDone]:
    """A task whose command has gone out, before anything that is asked later."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0)
    return task


def test_a_member_lives_in_a_child_process_from_measuring_to_a_usable_checkpoint(setting: Setting) -> None:
    async def life() -> None:
        lines: list[str] = []
        engine = await EngineProcess.start("node a", log=lines.append)
        try:
            with pytest.raises(EngineFailed, match="before it was prepared") as refused:
                await engine.write_state(setting.start.hash, setting.folder / "none")
            assert refused.value.cause_code == "SH-531"
            prepared = await engine.prepare(setting.prepare(measure=True))
            assert prepared.state == setting.start.hash and prepared.samples_per_s > 0
            assert prepared.engine.threads == 1 and "torch" in prepared.engine.software

            first = await engine.run_round(setting.run_round(0, setting.start.hash))
            held = await engine.apply_commit(commit(setting))
            with pytest.raises(EngineFailed, match="this node and the driver disagree"):
                await engine.apply_commit(commit(setting, state=bytes(32)))
            assert (await engine.apply_commit(commit(setting, state=held.state))) == held

            # A Commit is applied, and a second round refused, while a round runs; then the round is cancelled.
            with pytest.raises(EngineFailed, match="do not lie in a pass"):
                await engine.run_round(setting.run_round(1, held.state, samples=4_000))
            long = setting.run_round(0, held.state, samples=1_000, update=str(setting.folder / "long"))
            running = await begun(engine.run_round(long))
            assert (await engine.apply_commit(commit(setting, state=held.state))) == held
            with pytest.raises(EngineFailed, match="running already"):
                await engine.run_round(long)
            with pytest.raises(EngineFailed, match="busy with a round"):
                await engine.evaluate(Evaluate(state=held.state, shards=setting.data.held_out))
            assert not running.done()
            await engine.cancel_round()
            with pytest.raises(RoundCancelledError, match="Round 0 of node a was cancelled"):
                await running
            assert not (setting.folder / "long").exists()

            # Rolling back cancels too, and what follows is as if nothing had been.
            running = await begun(engine.run_round(long))
            rolled = await engine.roll_back(first.private_before)
            with pytest.raises(RoundCancelledError):
                await running
            assert rolled.private == first.private_before
            again = await engine.run_round(setting.run_round(0, setting.start.hash))
            assert same(again, first)

            evaluated = await engine.evaluate(Evaluate(state=held.state, shards=setting.data.held_out))
            assert 0 < evaluated.loss < 5.6
            generate = Generate(state=held.state, tokenizer="bytes", prompt="shoal", tokens=8, temperature=1.0, seed=4)
            text = await engine.generate(generate)
            assert text == await engine.generate(generate) and 0 < len(text.tokens) <= 8
            folder = setting.folder / "checkpoint"
            await engine.export_checkpoint(ExportCheckpoint(state=held.state, directory=str(folder), tokenizer="bytes"))
            assert (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
            await engine.write_state(held.state, setting.folder / "written")
            assert (await engine.load_state(setting.folder / "written")).state == held.state
            with pytest.raises(EngineFailed, match="could not be read or written"):
                await engine.load_state(setting.folder / "missing")
        finally:
            await engine.stop()
        assert not engine.died.done()
        with pytest.raises(EngineDied, match="was told to end"):
            await engine.cancel_round()

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))


def test_an_engine_keeps_its_limit_and_when_killed_says_so_to_everybody_who_waits(setting: Setting) -> None:
    async def life() -> None:
        engine = await EngineProcess.start("node b")
        await engine.prepare(setting.prepare(speed_limit=0.25))
        # The limit, against the processor time that the system itself has counted.
        process = psutil.Process(engine.pid)
        before = process.cpu_times()
        done = await engine.run_round(setting.run_round(0, setting.start.hash, samples=200))
        after = process.cpu_times()
        used = after.user + after.system - before.user - before.system
        assert used < 0.35 * done.compute_ms / 1000 + 0.05

        running = await begun(engine.run_round(setting.run_round(0, setting.start.hash, samples=1_000)))
        await engine.apply_commit(ApplyCommit(round=0, previous=setting.start.hash, accepted=()))
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match=r"engine of node b \(process \d+\) was killed \(SIGKILL\).*out of memory"):
            await running
        assert "SIGKILL" in (await engine.died).sentence
        with pytest.raises(EngineDied):
            await engine.cancel_round()
        await engine.stop()

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))


def test_an_engine_that_is_told_nonsense_ends_with_its_reason() -> None:
    async def life() -> None:
        engine = await EngineProcess.start("node c")
        assert engine._process.stdin is not None
        engine._process.stdin.write(FRAME.pack(FRAME_MAX_BYTES + 1))
        error = await engine.died
        assert "ended with code 1" in error.sentence and "exceeds the limit" in error.sentence
        await engine.kill()

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))


PARENT = """
import asyncio, sys
from shoal.training.process import EngineProcess
async def main():
    engine = await EngineProcess.start("a node")
    print(engine.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the closed pipe does it, a little later")
def test_an_engine_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
    finally:
        parent.kill()
        parent.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(GENEROUS_S)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


async def its_round(engine: EngineProcess, setting: Setting) -> RoundDone:
    prepared = await engine.prepare(setting.prepare())
    assert prepared.state == setting.start.hash
    return await engine.run_round(setting.run_round(0, setting.start.hash))


def sockets_of(engine: EngineProcess) -> set[str]:
    """What an engine can write to."""
    links = (str(one.readlink()) for one in Path(f"/proc/{engine.pid}/fd").iterdir())
    return {link for link in links if link.startswith("socket:")}


@pytest.mark.skipif(not template.CAN_FORK, reason="this system forks no engines")
def test_engines_share_a_template_and_nothing_else(setting: Setting) -> None:
    async def life() -> None:
        first, second = [await EngineProcess.start(f"node {name}") for name in "de"]
        parents = {psutil.Process(engine.pid).ppid() for engine in (first, second)}
        assert len(parents) == 1 and os.getpid() not in parents
        done = await its_round(first, setting)
        assert not sockets_of(first) & sockets_of(second)
        os.kill(first.pid, signal.SIGKILL)
        assert "SIGKILL" in (await first.died).sentence
        assert same(await its_round(second, setting), done)
        # Without their template engines end, and are told apart from those that come after. Another one loads at once.
        killed = parents.pop()
        os.kill(killed, signal.SIGKILL)
        assert "killed" in (await second.died).sentence
        (loading,) = [one.pid for one in psutil.Process().children() if "shoal.engines.template" in one.cmdline()]
        third = await EngineProcess.start("node f")
        assert psutil.Process(third.pid).ppid() == loading != killed
        assert same(await its_round(third, setting), done)
        for engine in (first, second, third):
            await engine.stop()

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))


def test_where_nothing_can_be_forked_an_engine_is_started_afresh(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def life() -> RoundDone:
        engine = await EngineProcess.start("node g")
        try:
            return await its_round(engine, setting)
        finally:
            await engine.stop()

    forked = asyncio.run(asyncio.wait_for(life(), GENEROUS_S))
    monkeypatch.setattr(template, "CAN_FORK", False)
    monkeypatch.setattr(template, "_template", None)
    assert same(asyncio.run(asyncio.wait_for(life(), GENEROUS_S)), forked)


def test_two_processes_do_the_work_of_one_and_repeat_it_bit_for_bit(setting: Setting) -> None:
    """Batches of 4, of which the last has 3: uneven parts must be weighted by their samples."""
    commands = [
        setting.run_round(number, setting.start.hash, samples=11, update=str(setting.folder / f"shared-{number}"))
        for number in range(2)
    ]

    async def together() -> list[tuple[RoundDone, bytes]]:
        done = []
        engine = await EngineProcess.start("a member of two")
        try:
            prepared = await engine.prepare(setting.prepare(processes=2))
            assert prepared.engine.processes == 2
            for attempt in range(2):
                await engine.load_private(None)
                if attempt == 1:  # a cancelled round must not confuse the other process
                    cancelled = await begun(engine.run_round(setting.run_round(5, setting.start.hash)))
                    await engine.cancel_round()
                    with contextlib.suppress(RoundCancelledError):
                        await cancelled
                    await engine.load_private(None)
                for command in commands:
                    done.append((await engine.run_round(command), Path(command.update).read_bytes()))
        finally:
            await engine.stop()
        return done

    done = asyncio.run(asyncio.wait_for(together(), GENEROUS_S))
    for (first, first_bytes), (again, again_bytes) in zip(done[:2], done[2:], strict=True):
        assert same(first, again) and first_bytes == again_bytes

    one_process = LanguageEngine(setting.prepare(), SystemClock())
    for command, (shared, shared_bytes) in zip(commands, done[:2], strict=True):
        alone = asyncio.run(one_process.run_round(command))
        assert alone.losses == pytest.approx(shared.losses, rel=1e-4)
        size, codec = setting.start.layout.size, setting.job.rounds.codec
        left = decode_update(Path(command.update).read_bytes(), codec, size).dense()
        right = decode_update(shared_bytes, codec, size).dense()
        assert ((left - right) ** 2).sum() < 0.01 * (left**2).sum()


# --- the speed limit -----------------------------------------------------------------------------------------------


def test_a_quarter_of_the_speed_waits_three_times_as_long_as_it_works() -> None:
    async def work() -> None:
        clock, busy = HeldClock(), 0.0
        pacer = Pacer(clock, 0.25, lambda: busy)
        for _ in range(10):
            busy += 0.1
            await clock.advance(0.1)  # the step itself
            waiting = asyncio.create_task(pacer.wait())
            await asyncio.sleep(0)
            await clock.advance(0.28)
            assert not waiting.done()
            await clock.advance(0.02)
            assert waiting.done()
        assert clock.monotonic() == pytest.approx(10 * 0.4)

    asyncio.run(work())


def test_a_machine_that_is_slowed_by_others_is_not_slowed_twice() -> None:
    async def work() -> None:
        clock, busy = HeldClock(), 0.0
        pacer = Pacer(clock, 0.5, lambda: busy)
        busy += 0.1
        await clock.advance(0.25)  # others had the processor meanwhile
        assert pacer.owed_s() <= 0
        busy += 0.1
        await clock.advance(0.1)
        assert pacer.owed_s() == pytest.approx(0.1 - CREDIT_MAX_S)  # what was lost counts, but no burst follows

    asyncio.run(work())


def test_idle_time_before_the_work_earns_nothing_and_full_speed_never_waits() -> None:
    async def work() -> None:
        clock, busy = HeldClock(), 0.0
        half, full = Pacer(clock, 0.5, lambda: busy), Pacer(clock, 1.0, lambda: busy)
        await clock.advance(1000)
        half.restart()
        busy += 1.0
        await clock.advance(1.0)
        assert half.owed_s() == pytest.approx(1.0)
        assert full.owed_s() == 0.0

    asyncio.run(work())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux bounds it so")
def test_a_job_that_wants_more_memory_than_there_is_ends_its_engine_with_an_error() -> None:
    script = """
import torch
from shoal.world.processes import stay_within_memory
stay_within_memory(1 << 30)
kept = torch.empty(1 << 29, dtype=torch.uint8)
print("some", flush=True)
torch.empty(1 << 30, dtype=torch.uint8)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GENEROUS_S, check=False)
    assert done.stdout == "some\n" and "can't allocate memory" in done.stderr and done.returncode == 1
