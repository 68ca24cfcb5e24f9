"""What an auditing driver takes from a member."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from engine_pieces import make_setting

from shoal.driver.audit import (
    OPEN_DEADLINE_S,
    OPENED_BYTES_PER_S,
    OPENED_PIN,
    PRIVATE_BYTES_EXTRA,
    PRIVATE_BYTES_PER_PARAMETER,
    open_from_member,
)
from shoal.driver.lines import RoundMetrics
from shoal.driver.training import BYTES_CLAIMED_MAX
from shoal.errors import ShoalError
from shoal.identity import KeyPair
from shoal.protocol.blobs import BlobChunkList, BlobRead, BlobRef
from shoal.protocol.messages import encode
from shoal.protocol.training import MEMBERS_MAX, Contribution, Engine, NodeWork, OpenPrivate, PrivateOpened
from shoal.storage import BlobStore, Fetcher, serve
from shoal.transport.memory import MemoryNetwork
from shoal.world import HeldClock, Request, SeededDice, SystemClock


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
        store = BlobStore(tmp_path / "driver", 1 << 30, clock)
        ref = BlobRef(bytes(32), 4 << 20, chunks=bytes(32))
        given = 0

        async def opened(request: Request) -> bytes:
            return encode(PrivateOpened(blob=ref), request.version)

        async def drip(request: Request) -> AsyncIterator[bytes]:
            async def bytes_one_by_one() -> AsyncIterator[bytes]:
                nonlocal given
                while True:
                    given += 1
                    yield b"."
                    await clock.sleep(1.0)

            return bytes_one_by_one()

        member.handle(OpenPrivate.KIND, opened)
        member.handle(BlobChunkList.KIND, drip)
        member.handle(BlobRead.KIND, drip)
        await member.listen("tcp://member:0")
        await driver.dial(member.node_id, member.addresses)
        fetcher = Fetcher(driver, store, clock, dice)
        opening = asyncio.create_task(
            open_from_member(
                a_contribution(), ref.hash, member.node_id, job=job, job_id=bytes(32), endpoint=driver, fetcher=fetcher
            )
        )
        while not opening.done():
            await asyncio.sleep(0)
            await clock.advance(0.25)
        deadline_s = OPEN_DEADLINE_S + ref.size / OPENED_BYTES_PER_S
        with pytest.raises(ShoalError, match=rf"4.0 MiB, did not come within {deadline_s:.0f} s"):
            opening.result()
        assert given > 10  # it dripped all the while: no stall ended it
        await driver.close()
        await member.close()
        store.close()

    asyncio.run(story())


def test_whatever_members_claim_of_their_bytes_can_be_written_and_read() -> None:
    most = BYTES_CLAIMED_MAX * MEMBERS_MAX
    line = RoundMetrics(
        round=0, time_s=0, tokens_total=0, loss=None, tokens_per_s=0, members=1, bytes_sent=most, bytes_received=most
    )
    assert msgspec.json.decode(msgspec.json.encode(line), type=RoundMetrics) == line
