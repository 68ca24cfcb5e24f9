"""What an auditing driver takes from a member."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from engine_pieces import SEQUENCE, make_setting, with_shards

from shoal.driver import audit
from shoal.driver.audit import (
    FINISH_S,
    OPEN_DEADLINE_S,
    OPENED_PIN,
    PRIVATE_BYTES_EXTRA,
    PRIVATE_BYTES_PER_PARAMETER,
    WAITING_MAX,
    Auditor,
    open_from_member,
)
from shoal.driver.folder import RunFolder
from shoal.driver.lines import AuditLine, RoundMetrics
from shoal.driver.replay import Record, Replayed, Replayer
from shoal.driver.report import AuditCount
from shoal.driver.training import BYTES_CLAIMED_MAX
from shoal.errors import ShoalError
from shoal.identity import KeyPair, blake3_hash
from shoal.protocol.blobs import BlobRead, BlobRef
from shoal.protocol.messages import encode, sign
from shoal.protocol.training import (
    MEMBERS_MAX,
    Accepted,
    Assignment,
    Commit,
    Contribution,
    Engine,
    Member,
    MemberNode,
    NodeWork,
    OpenPrivate,
    PrivateOpened,
    Share,
)
from shoal.storage import BlobStore, Fetcher, patience_s, serve
from shoal.training.commands import ApplyCommit, CommittedUpdate
from shoal.training.engine import LanguageEngine
from shoal.transport.memory import MemoryNetwork
from shoal.verification.replay import Outcome, Verdict
from shoal.world import HeldClock, MemoryDisk, Request, SeededDice, SystemClock


def a_contribution() -> Contribution:
    return Contribution(
        job=bytes(32),
        round=0,
        term=1,
        assignment=bytes(32),
        member=bytes(32),
        base_state=bytes(32),
        update=BlobRef(bytes(32), 10),
        work=(NodeWork(bytes(32), 1, 1, 1),),
        private_before=bytes(32),
        private_after=bytes(32),
        loss_first=1.0,
        loss_last=1.0,
        sketches=b"",
        engine=Engine("a", "b", 1, 1),
    )


@dataclass
class Worked:
    """What one member did in the rounds between two kept states, as records and blobs."""

    record: Record
    blobs: dict[bytes, Path]
    last: Contribution


def work(folder: Path, alter: str, engine_named: Callable[[Engine], Engine] = lambda own: own) -> Worked:
    """Rounds with lag 1 from the very first, as many as members do between two kept states by default, by one member of
    one thread; in the last one a step is altered."""
    setting, blobs = with_shards(make_setting(folder))
    blobs[setting.start.hash] = folder / "start"
    job = setting.job
    engine = LanguageEngine(setting.prepare(), SystemClock())
    named = engine_named(asyncio.run(engine.prepared(False)).engine)
    job_id = bytes(32)
    record = Record(job, job_id)
    states, commits, last = [setting.start.hash], [job_id], None
    for number in range(job.replay.snapshot_every):
        command = setting.run_round(
            number,
            states[max(0, number - 1)],
            in_flight=str(folder / f"update-{number - 1}") if number else None,
            rounds_in_flight=min(number, 1),
            tokens_done=max(0, number - 1) * 24 * SEQUENCE,
        )
        if number == job.replay.snapshot_every - 1:
            alter_a_step(engine, alter)
        done = asyncio.run(engine.run_round(command))
        update = BlobRef(done.update_hash, done.update_bytes)
        blobs[update.hash] = Path(command.update)
        assignment_id = blake3_hash(b"assignment %d" % number)
        record.assignments[assignment_id] = Assignment(
            job=job_id,
            round=number,
            term=1,
            previous=commits[max(0, number - 1)],
            base_state=command.base_state,
            step=command.step,
            deadline_ms=1000,
            shares=(Share(command.member, command.ranges),),
        )
        last = Contribution(
            job=job_id,
            round=number,
            term=1,
            assignment=assignment_id,
            member=command.member,
            base_state=command.base_state,
            builds_on=blake3_hash(b"contribution %d" % (number - 1)) if number else None,
            update=update,
            work=(NodeWork(bytes(32), done.samples, done.tokens, 1),),
            private_before=done.private_before,
            private_after=done.private_after,
            loss_first=done.loss_first,
            loss_last=done.loss_last,
            sketches=done.sketches,
            engine=named,
        )
        record.contributions[blake3_hash(b"contribution %d" % number)] = last
        accepted = CommittedUpdate(command.update, 1_000_000, 1_000_000)
        state = engine.apply_commit(ApplyCommit(round=number, previous=states[-1], accepted=(accepted,))).state
        record.commits[number] = Commit(
            job=job_id,
            round=number,
            term=1,
            previous=commits[-1],
            assignment=assignment_id,
            accepted=(
                Accepted(
                    member=command.member,
                    contribution=blake3_hash(b"contribution %d" % number),
                    update=update,
                    weight_ppm=1_000_000,
                    samples=done.samples,
                    tokens=done.tokens,
                ),
            ),
            state=state,
            tokens_total=(number + 1) * done.tokens,
        )
        states.append(state)
        commits.append(blake3_hash(b"commit %d" % number))
    assert last is not None
    return Worked(record, blobs, last)


def alter_a_step(engine: LanguageEngine, alter: str) -> None:
    compute, count = engine._step, 0

    def step(batch: np.ndarray, batch_size: int, rate: float) -> None:  # type: ignore[type-arg]
        nonlocal count
        count += 1
        if count == 4 and alter == "rate":
            rate *= 0.9
        if count == 4 and alter == "sample":
            batch = np.concatenate([batch[:-1], (batch[-1:] + 100) % 300])
        compute(batch, batch_size, rate)

    engine._step = step  # type: ignore[method-assign]


def replay(worked: Worked, scratch: Path, threads: int | None = None) -> Replayed:
    """The last round, with nothing opened."""
    scratch.mkdir()

    async def find(name: bytes) -> Path:
        return worked.blobs[name]

    async def refuse(contribution: Contribution, private: bytes) -> Path:
        raise ShoalError("It is not opened.")

    async def story() -> Replayed:
        replayer = Replayer(worked.record, find_blob=find, open_private=refuse, scratch=scratch, threads=threads)
        try:
            return await replayer.replay(worked.last)
        finally:
            await replayer.close()

    return asyncio.run(story())


@pytest.mark.parametrize("elsewhere", ["other threads", "other device named"])
@pytest.mark.parametrize(("alter", "outcome"), [("", "match"), ("rate", "mismatch"), ("sample", "mismatch")])
def test_on_another_engine_the_last_round_before_the_next_kept_state_is_decided(
    tmp_path: Path, elsewhere: str, alter: str, outcome: str
) -> None:
    def named(own: Engine) -> Engine:
        return msgspec.structs.replace(own, device="cpu riscv64") if "device" in elsewhere else own

    worked = work(tmp_path, alter, named)
    replayed = replay(worked, tmp_path / "scratch", threads=2 if "threads" in elsewhere else None)
    assert replayed.rounds == worked.record.job.replay.snapshot_every
    assert replayed.verdict.outcome.value == outcome, replayed.verdict.sentence
    assert "replayed on another engine" in replayed.verdict.sentence


def test_a_refused_opening_is_said_where_an_older_state_does(tmp_path: Path) -> None:
    worked = work(tmp_path, "")
    before = worked.record.predecessor(worked.last)
    assert before is not None
    name = next(name for name, one in worked.record.contributions.items() if one is before)
    worked.record.contributions[name] = msgspec.structs.replace(before, snapshot=True)
    replayed = replay(worked, tmp_path / "scratch")
    assert replayed.verdict.outcome is Outcome.MATCH and replayed.rounds == worked.last.round + 1
    said = f"Not opened: the state before round {worked.last.round}: It is not opened."
    assert replayed.verdict.sentence.endswith(said)


class HeldReplayer:
    """Replays as soon as it is let to, and finds everything well."""

    gate: asyncio.Event

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def hold_state(self, *_: object) -> None:
        pass

    async def replay(self, contribution: Contribution) -> Replayed:
        await self.gate.wait()
        return Replayed(Verdict(Outcome.MATCH, "Match."), 1, 0)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("fast", [True, False])
def test_what_was_chosen_and_not_replayed_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """40 contributions come while nothing can be replayed; at the end there is a minute, for a driver that can and for
    one that cannot."""
    monkeypatch.setattr(audit, "Replayer", HeldReplayer)
    setting = make_setting(tmp_path / "setting")
    key = KeyPair.generate()

    async def story() -> tuple[AuditCount, int]:
        clock, dice = HeldClock(), SeededDice(1)
        HeldReplayer.gate = asyncio.Event()
        endpoint = MemoryNetwork(clock, dice=dice).endpoint(key)
        store = BlobStore(tmp_path / "blobs", 1 << 30, clock)
        with RunFolder.create(tmp_path / "run") as folder:
            folder.begin(sign(key, setting.job), b"")
            node = MemberNode(key.node_id, "whole", 1_000_000)
            member = sign(key, Member(job=folder.job.record_id, nodes=(node,), session=bytes(16), name="eel"))
            folder.append(member)
            auditor = Auditor(
                folder,
                endpoint=endpoint,
                store=store,
                fetcher=Fetcher(endpoint, store, clock, dice),
                dice=dice,
                rate=1.0,
                known=AuditCount(chosen=5, replayed=3),
                on_verdict=lambda *_: None,
            )
            contribution = msgspec.structs.replace(a_contribution(), member=member.record_id)
            commit = Commit(
                job=bytes(32), round=0, term=1, previous=bytes(32), assignment=bytes(32), accepted=(), state=bytes(32),
                tokens_total=0,
            )  # fmt: skip
            given = [(blake3_hash(b"%d" % number), contribution) for number in range(40)]
            auditor.committed(commit, given, setting.start)
            assert auditor.count == AuditCount(chosen=45, replayed=3, dropped=2 + 40 - WAITING_MAX)
            assert auditor.waiting == WAITING_MAX
            if fast:
                HeldReplayer.gate.set()
            finishing, waited_s = asyncio.create_task(auditor.finish()), 0.0
            while not finishing.done():
                await asyncio.sleep(0)
                if not fast:
                    await clock.advance(1.0)
                    waited_s += 1.0
            await finishing
            assert waited_s <= FINISH_S + 1
            await auditor.close()
            lines = len(list(folder.notes(AuditLine)))
        store.close()
        return auditor.count, lines

    count, lines = asyncio.run(story())
    assert (lines, count.replayed) == ((WAITING_MAX, 3 + WAITING_MAX) if fast else (0, 3))
    assert count.dropped == 45 - count.replayed
    assert count.sentence.endswith(f"{count.replayed} were; the driver was too slow for the rest.")


def test_a_private_state_is_opened_up_to_the_size_that_the_model_needs(tmp_path: Path) -> None:
    job = make_setting(tmp_path / "setting").job
    small = msgspec.structs.replace(job, model=msgspec.structs.replace(job.model, parameters=1))

    async def story() -> None:
        clock, dice = SystemClock(), SeededDice(1)
        network = MemoryNetwork(clock, dice=dice)
        driver, member = network.endpoint(KeyPair.generate()), network.endpoint(KeyPair.generate())
        stores = [BlobStore(tmp_path / name, 1 << 30, clock) for name in ("driver", "member")]
        ref = stores[1].put(bytes(PRIVATE_BYTES_EXTRA + 2 * PRIVATE_BYTES_PER_PARAMETER), "application/x-shoal-private")
        serve(member, stores[1])

        async def opened(request: Request) -> bytes:
            return encode(PrivateOpened(blob=ref), request.version)

        member.handle(OpenPrivate.KIND, opened)
        await member.listen("tcp://member:0")
        await driver.dial(member.node_id, member.addresses)
        fetcher = Fetcher(driver, stores[0], clock, dice)
        ask = (a_contribution(), ref.hash, member.node_id)
        with pytest.raises(ShoalError, match="opened another private state than was asked for"):
            wrong = (ask[0], bytes(32), ask[2])
            await open_from_member(*wrong, job=job, job_id=bytes(32), endpoint=driver, fetcher=fetcher)
        assert not stores[0].has(ref.hash)
        with pytest.raises(ShoalError, match="needs at most"):
            await open_from_member(*ask, job=small, job_id=bytes(32), endpoint=driver, fetcher=fetcher)
        assert not stores[0].has(ref.hash)
        path = await open_from_member(*ask, job=job, job_id=bytes(32), endpoint=driver, fetcher=fetcher)
        assert path.stat().st_size == ref.size and stores[0].pins(OPENED_PIN) == {ref.hash}
        await driver.close()
        await member.close()
        for store in stores:
            store.close()

    asyncio.run(story())


def test_a_private_state_that_drips_holds_no_audit_up(tmp_path: Path) -> None:
    job = make_setting(tmp_path / "setting").job

    async def story() -> None:
        clock, dice = HeldClock(), SeededDice(1)
        network = MemoryNetwork(clock, dice=dice)
        driver, member = network.endpoint(KeyPair.generate()), network.endpoint(KeyPair.generate())
        stores = [BlobStore(MemoryDisk(), 1 << 26, clock) for _ in range(2)]
        ref = stores[1].put(bytes(4 << 20), "application/x-shoal-private")
        serve(member, stores[1])
        given = 0

        async def opened(request: Request) -> bytes:
            return encode(PrivateOpened(blob=ref), request.version)

        async def drip(request: Request) -> AsyncIterator[bytes]:
            async def part_by_part() -> AsyncIterator[bytes]:
                nonlocal given
                while True:
                    given += 1
                    yield bytes(1024)
                    await clock.sleep(1.0)

            return part_by_part()

        member.handle(OpenPrivate.KIND, opened)
        member.handle(BlobRead.KIND, drip)
        await member.listen("tcp://member:0")
        await driver.dial(member.node_id, member.addresses)
        fetcher = Fetcher(driver, stores[0], clock, dice)
        opening = asyncio.create_task(
            open_from_member(
                a_contribution(), ref.hash, member.node_id, job=job, job_id=bytes(32), endpoint=driver, fetcher=fetcher
            )
        )
        while not given:
            await asyncio.sleep(0)
        while not opening.done():
            await asyncio.sleep(0)
            await clock.advance(0.25)
        deadline_s = patience_s(ref.size, OPEN_DEADLINE_S)
        with pytest.raises(ShoalError, match=rf"4.0 MiB, did not come within {deadline_s:.0f} s"):
            opening.result()
        assert given > 10  # it dripped all the while, too fast to have stalled
        await driver.close()
        await member.close()
        for store in stores:
            store.close()

    asyncio.run(story())


def test_whatever_members_claim_of_their_bytes_can_be_written_and_read() -> None:
    most = BYTES_CLAIMED_MAX * MEMBERS_MAX
    line = RoundMetrics(
        round=0, time_s=0, tokens_total=0, loss=None, tokens_per_s=0, members=1, bytes_sent=most, bytes_received=most
    )
    assert msgspec.json.decode(msgspec.json.encode(line), type=RoundMetrics) == line
