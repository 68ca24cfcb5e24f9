"""The index of offers, in memory and in SQLite: the newest of each node, byte for byte, for as long as it lives."""

import asyncio
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.hub.index import (
    FOUND_BYTES_MAX,
    REMEMBERED_MS,
    REMEMBERED_PER_OFFER,
    Arrival,
    HubFull,
    MemoryOfferIndex,
    OfferIndex,
)
from shoal.hub.rates import HubBusy
from shoal.hub.store import FINDS_MAX, HubStoreFailed, SqlOfferIndex
from shoal.identity import BadEnvelope, BadSignature, KeyPair
from shoal.market import StaleOffer, fits
from shoal.protocol.messages import UnknownKind, VersionMismatch, sign
from shoal.protocol.offers import Capability, Device, Offer, OfferFind, Throughput
from shoal.protocol.training import Grant
from shoal.world import HeldClock

HOUR_MS = 3600 * 1000
GIB = 1 << 30

KEYS = sorted((KeyPair.from_seed(bytes((number,)) * 32) for number in range(1, 9)), key=lambda key: key.node_id)
ANN, BEN, CAT = KEYS[:3]


def a_device(kind: str = "cpu", memory_bytes: int = 8 * GIB, flops: float = 1e11) -> Device:
    return Device(
        kind=kind, name=f"{kind} 1", memory_bytes=memory_bytes, memory_bytes_per_s=1e10,
        throughput=(Throughput(dtype="float32", flops=flops),), threads=1,
    )  # fmt: skip


def an_offer(sequence: int, name: str = "ann", lifetime_ms: int = 60_000, **changes: object) -> Offer:
    fields = {"issued_ms": 1_700_000_000_000, "capability": Capability(devices=(a_device(),))} | changes
    return Offer(name=name, sequence=sequence, lifetime_ms=lifetime_ms, **fields)  # type: ignore[arg-type]


def brought(key: KeyPair, offer: Offer, carrier: KeyPair | None = None, source: str | None = None) -> Arrival:
    """From an address of the key's own, unless another one is given."""
    return Arrival.open(sign(key, offer).to_bytes(), (carrier or key).node_id, source or key.node_id.hex())


Scene = Callable[[OfferIndex, HeldClock], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture(params=["memory", "sqlite"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Runs a scene on an empty index whose clock stands still."""

    def run(scene: Scene, offers_max: int = 100) -> None:
        async def on_stage() -> None:
            clock = HeldClock()
            index: OfferIndex
            if request.param == "memory":
                index = MemoryOfferIndex(clock, offers_max)
            else:
                index = await SqlOfferIndex.open(tmp_path / "hub.sqlite", clock, offers_max)
            try:
                await scene(index, clock)
            finally:
                await index.close()

        asyncio.run(on_stage())

    return run


def test_an_offer_is_given_out_byte_for_byte_as_it_came(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        data = sign(ANN, an_offer(7)).to_bytes()
        kept = await index.keep(Arrival.open(data, ANN.node_id, "10.0.0.1"))
        assert kept.envelope == data
        assert kept.expires_ms - kept.arrived_ms == 60_000
        assert await index.get(ANN.node_id) == kept
        assert await index.get(BEN.node_id) is None
        assert await index.find(OfferFind()) == ([kept], False)
        assert await index.count() == 1

    play(scene)


def test_a_higher_sequence_replaces_a_lower_one(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        await index.keep(brought(ANN, an_offer(7)))
        await index.keep(brought(ANN, an_offer(8, busy=True)))
        (kept,), _ = await index.find(OfferFind())
        assert (kept.offer.sequence, kept.offer.busy) == (8, True)
        assert await index.count() == 1

    play(scene)


def test_a_lower_sequence_is_refused_with_both_numbers_and_changes_nothing(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        kept = await index.keep(brought(ANN, an_offer(41)))
        await clock.advance(1)
        with pytest.raises(StaleOffer, match=r"Offer 17 .*offer 41") as refusal:
            await index.keep(brought(ANN, an_offer(17)))
        assert "key" in str(refusal.value)
        assert await index.get(ANN.node_id) == kept

    play(scene)


def test_another_offer_with_the_same_sequence_is_refused(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        kept = await index.keep(brought(ANN, an_offer(41, name="ann")))
        with pytest.raises(StaleOffer, match=r"Offer 41 .*another offer with sequence 41"):
            await index.keep(brought(ANN, an_offer(41, name="imposter")))
        assert await index.get(ANN.node_id) == kept

    play(scene)


def test_the_same_offer_again_lives_on_when_its_maker_brings_it(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        first = await index.keep(brought(ANN, an_offer(7)))
        await clock.advance(50)
        again = await index.keep(brought(ANN, an_offer(7)))
        assert again == replace(first, expires_ms=first.expires_ms + 50_000)
        await clock.advance(50)
        assert await index.count() == 1
        await clock.advance(11)
        assert await index.count() == 0

    play(scene)


def test_nobody_else_can_make_an_offer_live_on_or_come_back(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        first = await index.keep(brought(ANN, an_offer(7)))
        await clock.advance(50)
        assert await index.keep(brought(ANN, an_offer(7), carrier=BEN)) == first
        await clock.advance(11)
        await index.keep(brought(ANN, an_offer(7), carrier=BEN))
        with pytest.raises(StaleOffer):
            await index.keep(brought(ANN, an_offer(6), carrier=BEN))
        assert await index.count() == 0
        assert await index.get(ANN.node_id) is None
        await index.keep(brought(ANN, an_offer(7)))
        assert await index.count() == 1

    play(scene)


def test_a_new_offer_may_be_brought_by_anybody(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        await index.keep(brought(ANN, an_offer(7), carrier=BEN))
        await index.keep(brought(ANN, an_offer(8), carrier=CAT))
        (kept,), _ = await index.find(OfferFind())
        assert (kept.node, kept.offer.sequence) == (ANN.node_id, 8)

    play(scene)


@pytest.mark.parametrize("wrong_by_ms", [-HOUR_MS, 0, HOUR_MS])
def test_a_node_whose_clock_is_wrong_is_kept_as_long_as_any_other(play: Play, wrong_by_ms: int) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        await index.keep(brought(ANN, an_offer(1, issued_ms=clock.now_ms() + wrong_by_ms)))
        await clock.advance(59.9)
        assert await index.count() == 1
        await clock.advance(0.2)
        assert await index.count() == 0
        assert await index.find(OfferFind()) == ([], False)

    play(scene)


def test_a_full_index_refuses_newcomers_and_keeps_serving_those_it_knows(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        await index.keep(brought(ANN, an_offer(1, lifetime_ms=10_000)))
        await index.keep(brought(BEN, an_offer(1)))
        with pytest.raises(HubFull, match="2 offers"):
            await index.keep(brought(CAT, an_offer(1)))
        await index.keep(brought(BEN, an_offer(2)))
        await clock.advance(11)
        await index.keep(brought(CAT, an_offer(1)))
        with pytest.raises(HubFull):
            await index.keep(brought(ANN, an_offer(2)))
        assert [kept.node for kept in (await index.find(OfferFind()))[0]] == [BEN.node_id, CAT.node_id]

    play(scene, offers_max=2)


def test_keys_that_cost_nothing_fill_no_index_and_many_nodes_of_one_address_do_while_there_is_room(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        for key in KEYS[:4]:
            await index.keep(brought(key, an_offer(1), source="10.0.0.1"))
        with pytest.raises(HubFull, match="4 offers of 8 .* 4 of them from your address"):
            await index.keep(brought(KEYS[4], an_offer(1), source="10.0.0.1"))
        for key in KEYS[4:6]:
            await index.keep(brought(key, an_offer(1), source="10.0.0.2"))
        await index.keep(brought(KEYS[0], an_offer(2), source="10.0.0.2"))  # moved, and counts where it was new
        with pytest.raises(HubFull, match="2 of them from your address"):
            await index.keep(brought(KEYS[6], an_offer(1), source="10.0.0.2"))
        await index.keep(brought(KEYS[6], an_offer(1), source="10.0.0.3"))
        with pytest.raises(HubFull, match="4 of them from your address"):
            await index.keep(brought(KEYS[7], an_offer(1), source="10.0.0.1"))
        await clock.advance(61)  # they were all away together, and come back
        for key in KEYS[:4]:
            await index.keep(brought(key, an_offer(3), source="10.0.0.1"))

    play(scene, offers_max=8)


def test_what_expired_is_forgotten_only_after_its_sequence_was_remembered_long_enough(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        await index.keep(brought(ANN, an_offer(7)))
        await clock.advance(60 + REMEMBERED_MS / 1000 - 1)
        assert await index.purge() == 0
        with pytest.raises(StaleOffer):
            await index.keep(brought(ANN, an_offer(6), carrier=BEN))
        await clock.advance(2)
        assert await index.purge() == 1
        await index.keep(brought(ANN, an_offer(6)))

    play(scene)


def test_what_is_remembered_is_bounded_and_the_longest_gone_goes_first(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        for key in KEYS:
            await index.keep(brought(key, an_offer(7, lifetime_ms=1000)))
            await clock.advance(1.1)
        assert await index.purge() == len(KEYS) - REMEMBERED_PER_OFFER
        await index.keep(brought(KEYS[0], an_offer(1)))
        with pytest.raises(StaleOffer):
            await index.keep(brought(KEYS[-1], an_offer(1), carrier=ANN))

    play(scene, offers_max=1)


def test_pages_name_every_offer_once_in_order(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        for key in reversed(KEYS):
            await index.keep(brought(key, an_offer(1)))
        seen: list[bytes] = []
        after, more = None, True
        while more:
            found, more = await index.find(OfferFind(limit=3, after=after))
            seen += [kept.node for kept in found]
            after = seen[-1]
        assert seen == [key.node_id for key in KEYS]

    play(scene)


def test_a_page_ends_before_its_bytes_are_too_many(play: Play) -> None:
    async def scene(index: OfferIndex, clock: HeldClock) -> None:
        large = Capability(devices=(msgspec.structs.replace(a_device(), name="x" * 96),) * 64)
        for number in range(100):
            await index.keep(brought(KeyPair.from_seed(number.to_bytes(32, "big")), an_offer(1, capability=large)))
        found, more = await index.find(OfferFind(limit=256))
        size = len(found[0].envelope)
        assert more and len(found) == FOUND_BYTES_MAX // size < 100
        found, more = await index.find(OfferFind(limit=256, after=found[-1].node))
        assert found and sum(len(kept.envelope) for kept in found) <= FOUND_BYTES_MAX

    play(scene)


def test_what_is_not_a_signed_offer_of_this_network_is_refused() -> None:
    good = sign(ANN, an_offer(1))
    forged = replace_signer(good.to_bytes(), ANN.node_id, BEN.node_id)
    with pytest.raises(BadSignature):
        Arrival.open(forged, BEN.node_id, "?")
    with pytest.raises(BadEnvelope):
        Arrival.open(good.to_bytes()[:-1], ANN.node_id, "?")
    with pytest.raises(BadEnvelope, match="at most"):
        Arrival.open(b"\x00" * (1 << 20), ANN.node_id, "?")
    with pytest.raises(VersionMismatch):
        Arrival.open(sign(ANN, an_offer(1), network="elsewhere").to_bytes(), ANN.node_id, "?")
    with pytest.raises(UnknownKind):
        Arrival.open(
            sign(ANN, Grant(job=b"j" * 32, drivers=(ANN.node_id,), not_after_ms=5)).to_bytes(), ANN.node_id, "?"
        )


def replace_signer(data: bytes, signer: bytes, other: bytes) -> bytes:
    assert signer in data
    return data.replace(signer, other)


# ---- both find what the rule says ----

kinds = st.sampled_from(["cpu", "cuda", "mps"])
memories = st.sampled_from([0, 1, 8 * GIB, 80 * GIB, (1 << 64) - 1])
rates = st.sampled_from([0.0, 1.0, 1e11, 1e15])
devices = st.builds(a_device, kinds, memories, rates)
offers = st.builds(
    lambda name, busy, accepts, held: an_offer(
        1, name=name, busy=busy, accepts=accepts, capability=Capability(devices=tuple(held))
    ),
    st.sampled_from(["ann", "ben"]),
    st.booleans(),
    st.sampled_from([("train",), ("train", "serve"), ()]),
    st.lists(devices, min_size=1, max_size=3),
)
nodes = st.sampled_from([key.node_id for key in KEYS])
wishes = st.builds(
    OfferFind,
    accepts=st.sampled_from([None, "train", "serve", "run"]),
    device=st.none() | kinds,
    name=st.sampled_from([None, "ann", "ben", "cat"]),
    node=st.none() | nodes,
    memory_bytes_min=memories,
    flops_min=rates,
    idle_only=st.booleans(),
    limit=st.sampled_from([1, 2, 256]),
    after=st.none() | nodes,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(offers, max_size=len(KEYS)), st.lists(wishes, min_size=1, max_size=12))
def test_every_index_finds_what_the_rule_says(made: list[Offer], wanted: list[OfferFind]) -> None:
    async def scene(folder: str) -> None:
        clock = HeldClock()
        indexes = [MemoryOfferIndex(clock), await SqlOfferIndex.open(Path(folder) / "hub.sqlite", clock)]
        held = dict(zip((key.node_id for key in KEYS), made, strict=False))
        for index in indexes:
            await asyncio.gather(*(index.keep(brought(key, offer)) for key, offer in zip(KEYS, made, strict=False)))
        for wish in wanted:
            fitting = [n for n in sorted(held) if n > (wish.after or b"") and fits(n, held[n], wish)[0]]
            for index in indexes:
                found, more = await index.find(wish)
                assert [kept.node for kept in found] == fitting[: wish.limit]
                assert more == (len(fitting) > wish.limit)
        for index in indexes:
            await index.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scene(folder))


# ---- what only a file can do ----


def test_a_reopened_file_holds_what_it_held(tmp_path: Path) -> None:
    async def scene() -> None:
        clock = HeldClock()
        index = await SqlOfferIndex.open(tmp_path / "hub.sqlite", clock)
        kept = await index.keep(brought(ANN, an_offer(7)))
        await index.close()
        await index.close()
        with pytest.raises(HubStoreFailed, match="closed"):
            await index.count()
        index = await SqlOfferIndex.open(tmp_path / "hub.sqlite", clock)
        assert await index.get(ANN.node_id) == kept
        with pytest.raises(StaleOffer):
            await index.keep(brought(ANN, an_offer(6)))
        await index.close()

    asyncio.run(scene())


def test_every_commit_reaches_the_disk_before_it_is_acknowledged_and_many_share_one(tmp_path: Path) -> None:
    async def scene() -> None:
        index = await SqlOfferIndex.open(tmp_path / "hub.sqlite", HeldClock())
        assert await index._do(lambda db: db.exec_driver_sql("PRAGMA synchronous").scalar()) == 2  # FULL
        assert await index._do(lambda db: db.exec_driver_sql("PRAGMA journal_mode").scalar()) == "wal"
        commits: list[sa.Connection] = []
        sa.event.listen(index._engine, "commit", commits.append)
        outcomes = await asyncio.gather(
            *(index.keep(brought(key, an_offer(sequence))) for sequence in (2, 1) for key in KEYS),
            return_exceptions=True,
        )
        assert [isinstance(outcome, StaleOffer) for outcome in outcomes] == [False] * len(KEYS) + [True] * len(KEYS)
        assert len(commits) == 1
        await index.close()

    asyncio.run(scene())


def test_so_many_searches_share_a_transaction_and_the_next_is_told_to_come_again(tmp_path: Path) -> None:
    async def scene() -> None:
        index = await SqlOfferIndex.open(tmp_path / "hub.sqlite", HeldClock())
        await index.keep(brought(ANN, an_offer(1)))
        outcomes = await asyncio.gather(
            *(index.find(OfferFind()) for _ in range(FINDS_MAX + 3)),
            *(index.get(ANN.node_id) for _ in range(3)),
            return_exceptions=True,
        )
        assert [isinstance(one, HubBusy) for one in outcomes] == [False] * FINDS_MAX + [True] * 3 + [False] * 3
        assert len((await index.find(OfferFind()))[0]) == 1
        await index.close()

    asyncio.run(scene())


def test_a_failing_database_acknowledges_nothing_and_says_what_failed(tmp_path: Path) -> None:
    async def scene() -> None:
        path = tmp_path / "hub.sqlite"
        index = await SqlOfferIndex.open(path, HeldClock())
        await index.keep(brought(ANN, an_offer(1)))
        with sqlite3.connect(path) as other:
            other.execute(
                "CREATE TRIGGER full BEFORE UPDATE ON hub_offers BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
            )
        with pytest.raises(HubStoreFailed, match="disk is full"):
            await index.keep(brought(ANN, an_offer(2)))
        with sqlite3.connect(path) as other:
            other.execute("DROP TRIGGER full")
        kept = await index.get(ANN.node_id)
        assert kept is not None
        assert kept.offer.sequence == 1
        await index.keep(brought(ANN, an_offer(2)))
        await index.close()

    asyncio.run(scene())


def test_a_database_that_does_not_say_where_offers_came_from_is_gone_on_with(tmp_path: Path) -> None:
    async def scene() -> None:
        path, clock = tmp_path / "hub.sqlite", HeldClock()
        index = await SqlOfferIndex.open(path, clock)
        await index.keep(brought(ANN, an_offer(1)))
        await index.close()
        with sqlite3.connect(path) as before:
            before.execute("ALTER TABLE hub_offers DROP COLUMN source")
            before.execute("UPDATE hub_schema SET version = 1")
        for _ in range(2):
            index = await SqlOfferIndex.open(path, clock)
            kept = await index.get(ANN.node_id)
            assert kept is not None and kept.source == ""
            await index.close()

    asyncio.run(scene())


def test_what_is_not_a_database_of_this_form_is_refused_and_left_alone(tmp_path: Path) -> None:
    async def scene() -> None:
        text = tmp_path / "text"
        text.write_bytes(b"this is no database" * 100)
        with pytest.raises(HubStoreFailed, match="text"):
            await SqlOfferIndex.open(text, HeldClock())
        assert text.read_bytes() == b"this is no database" * 100
        with pytest.raises(HubStoreFailed):
            await SqlOfferIndex.open(tmp_path / "missing" / "hub.sqlite", HeldClock())
        index = await SqlOfferIndex.open(tmp_path / "newer", HeldClock())
        await index.close()
        with sqlite3.connect(tmp_path / "newer") as other:
            other.execute("UPDATE hub_schema SET version = 99")
        with pytest.raises(HubStoreFailed, match="99"):
            await SqlOfferIndex.open(tmp_path / "newer", HeldClock())

    asyncio.run(scene())
