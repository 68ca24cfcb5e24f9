"""A driver with scripted members, and a node with a scripted driver: what the other side must not be able to do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from engine_pieces import Setting, make_setting, with_shards
from hub_world import a_key, an_offer
from money_world import PRICE, BookLedger, Shop, a_shop, an_account

from shoal.driver.folder import RunFolder
from shoal.driver.gang import LinkedNode
from shoal.driver.lines import RoundMetrics
from shoal.driver.report import NodeFigures, NodeStatus
from shoal.driver.training import JobRecords, Outcome, TrainingDriver, Watchers
from shoal.driver.treasurer import Treasurer
from shoal.errors import LinkError
from shoal.hub import HubClient
from shoal.identity import KeyPair, blake3_hash
from shoal.ledger.commands import Open
from shoal.node import member as node_member
from shoal.node.agent import ENDED_MAX, NodeAgent, NodeSettings, Sale
from shoal.node.member import EVIDENCE_PIN, pin_of
from shoal.protocol.blobs import BlobHolder, BlobRead, BlobRef
from shoal.protocol.holds import HoldReclaim, Reclaim
from shoal.protocol.messages import decode, encode, open_record, sign
from shoal.protocol.money import EscrowTerms, Payee
from shoal.protocol.offers import Capability, Done, Offer, OfferFind
from shoal.protocol.training import (
    PARTS_PER_MILLION,
    Assignment,
    Codec,
    Commit,
    CommitsAsk,
    CommitsGiven,
    Contribution,
    DataShard,
    Deliver,
    Engine,
    Excluded,
    Grant,
    HeadAsk,
    JobEnd,
    Member,
    MemberAnswer,
    MemberGone,
    MemberInvite,
    MemberNode,
    MemberReady,
    NodeWork,
    SampleRange,
    Share,
    Term,
    Turn,
)
from shoal.purse.purse import Funds
from shoal.rounds.standing import standing_at_start
from shoal.storage import BlobStore, Fetcher, serve
from shoal.storage.faults import LedgerFailed
from shoal.training.updates import encode_update
from shoal.transport.memory import MemoryEndpoint, MemoryNetwork
from shoal.world import MemoryDisk, Refused, Request, SeededDice, SystemClock
from shoal.world.directory import FoundOffer
from shoal.world.quotes import NotSecured, Quotes

PATIENCE_S = 60.0
CLOCK, DICE = SystemClock(), SeededDice(5)
OWNER = a_key(100)


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scene

    asyncio.run(within())


class NoDirectory:
    """No hub at all."""

    async def find(self, wanted: OfferFind) -> list[FoundOffer]:
        raise LinkError("there is no hub")

    async def introduce(self, node: bytes, addresses: Sequence[str]) -> None:
        raise LinkError("there is no hub")


@dataclass
class Peer:
    """A member whose every word the test writes."""

    network: MemoryNetwork
    key: KeyPair
    setting: Setting
    endpoint: MemoryEndpoint = field(init=False)
    store: BlobStore = field(init=False)
    turns: asyncio.Queue[Turn] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    commits: dict[int, Commit] = field(default_factory=dict)
    assignments: dict[int, tuple[Assignment, bytes]] = field(default_factory=dict)
    job_id: bytes = b""
    driver: bytes = b""

    async def start(self, endpoint: MemoryEndpoint | None = None) -> None:
        self.endpoint = endpoint or self.network.endpoint(self.key)
        self.store = BlobStore(MemoryDisk(), 1 << 26, CLOCK)
        serve(self.endpoint, self.store)
        self.endpoint.handle(MemberInvite.KIND, self._invited)
        self.endpoint.handle(Turn.KIND, self._turn)
        self.endpoint.handle(JobEnd.KIND, self._end)
        await self.endpoint.listen("tcp://peer:0")

    async def _invited(self, request: Request) -> bytes:
        message = decode(MemberInvite, request.body, request.version)
        self.driver = request.peer
        self.job_id = blake3_hash(b"") if not message.job else _record_id(message.job)
        nodes = (MemberNode(self.key.node_id, "whole", PARTS_PER_MILLION),)
        member = sign(self.key, Member(job=self.job_id, nodes=nodes, session=bytes(16), name="peer"))
        self.member_id = member.record_id
        self.private = bytes(32)
        return encode(MemberAnswer(member=member.to_bytes()), request.version)

    async def _turn(self, request: Request) -> bytes:
        turn = decode(Turn, request.body, request.version)
        for packed, kind in ((turn.commit, Commit), (turn.assignment, Assignment)):
            if packed is not None:
                envelope = _envelope(packed)
                record = open_record(envelope, kind)
                if isinstance(record, Commit):
                    self.commits[record.round] = record
                elif isinstance(record, Assignment):
                    self.assignments[record.round] = (record, envelope.record_id)
        self.turns.put_nowait(turn)
        return encode(Done(), request.version)

    async def _end(self, request: Request) -> bytes:
        self.ended.set()
        return encode(Done(), request.version)

    async def ask(self, kind: str, message: Any) -> bytes:
        return await self.endpoint.links()[self.driver].request(kind, encode(message))

    async def ready(self, speed: float = 50.0) -> None:
        while self.driver not in self.endpoint.links() or not self.job_id:
            await asyncio.sleep(0)
        state = self.setting.start.hash
        message = MemberReady(job=self.job_id, member=self.member_id, round=-1, state=state, samples_per_s=speed)
        await self.ask(MemberReady.KIND, message)

    async def assigned(self, number: int) -> Assignment:
        while number not in self.assignments:
            await self.turns.get()
        return self.assignments[number][0]

    async def committed(self, number: int) -> Commit:
        while number not in self.commits:
            await self.turns.get()
        return self.commits[number]

    def contribution(self, number: int, data: bytes, **changes: Any) -> Contribution:
        assignment, assignment_id = self.assignments[number]
        share = next(one for one in assignment.shares if one.member == self.member_id)
        tokens = share.samples * self.setting.job.data.sequence_tokens
        made = Contribution(
            job=self.job_id,
            round=number,
            term=1,
            assignment=assignment_id,
            member=self.member_id,
            base_state=assignment.base_state,
            update=BlobRef(blake3_hash(data), len(data)),
            work=(NodeWork(self.key.node_id, share.samples, tokens, 100),),
            private_before=self.private,
            private_after=blake3_hash(self.private),
            loss_first=3.0,
            loss_last=2.0,
            sketches=b"",
            engine=Engine("none", "none", 1, 1),
        )
        return msgspec.structs.replace(made, **changes)

    async def deliver(self, made: Contribution, data: bytes | None, key: KeyPair | None = None) -> None:
        envelope = sign(key or self.key, made)
        await self.ask(Deliver.KIND, Deliver(contribution=envelope.to_bytes(), attached=data))

    def update(self, seed: int, size: float = 1e-3) -> bytes:
        flat = np.random.default_rng(seed).standard_normal(self.setting.start.layout.size).astype(np.float32) * size
        return encode_update(flat.astype(np.float32), Codec.NONE)


def _envelope(packed: bytes) -> Any:
    from shoal.identity import Envelope

    return Envelope.from_bytes(packed, 1 << 20)


def _record_id(packed: bytes) -> bytes:
    return bytes(_envelope(packed).record_id)


@dataclass
class Scene:
    """A driver on its own folder, and peers linked to it."""

    folder: RunFolder
    driver: TrainingDriver
    running: asyncio.Task[Outcome]
    peers: list[Peer]
    shops: list[Shop]
    sentences: list[str]

    async def stop(self) -> None:
        self.driver.stop("enough")
        await asyncio.gather(self.running, return_exceptions=True)
        for shop in self.shops:
            await shop.sales.close()
        for peer in self.peers:
            await peer.endpoint.close()
        self.folder.close()


async def a_scene(
    tmp_path: Path,
    peers: int = 2,
    known: Sequence[NodeFigures] = (),
    funds: Funds | None = None,
    sells: BookLedger | None = None,
    notice_ms: int = 0,
    **rounds: Any,
) -> Scene:
    """Peers are paid at `sells`, or work for nothing."""
    rounds = {"codec": Codec.NONE, "lag": 0, "grace_ms": 3_600_000, "deadline_ms": 3_600_000} | rounds
    setting = make_setting(tmp_path / "setting", **rounds)
    network = MemoryNetwork(CLOCK, dice=DICE)
    envelope = sign(OWNER, setting.job)
    folder = RunFolder.create(tmp_path / "run")
    folder.begin(envelope)
    grant = sign(OWNER, Grant(job=envelope.record_id, drivers=(OWNER.node_id,), not_after_ms=CLOCK.now_ms() + 10**9))
    first = Term(job=envelope.record_id, number=1, grant=grant.record_id, head=envelope.record_id, head_round=-1)
    term = sign(OWNER, first)
    endpoint = network.endpoint(OWNER)
    await endpoint.listen("tcp://driver:0")
    store = BlobStore(folder.blobs, 1 << 28, CLOCK)
    serve(endpoint, store)
    store.put(setting.start.to_bytes(), setting.start.MEDIA_TYPE)
    sentences: list[str] = []

    async def linked(node: bytes, offer: Offer) -> Any:
        return await endpoint.dial(node, offer.addresses)

    def treasurer(funds: Funds) -> Treasurer:
        return Treasurer(funds, folder, key=OWNER, link=linked, clock=CLOCK, dice=DICE, say=sentences.append)

    driver = TrainingDriver(
        JobRecords(envelope, grant, term, 1),
        standing_at_start(setting.job, envelope.record_id),
        setting.start,
        key=OWNER,
        folder=folder,
        endpoint=endpoint,
        directory=NoDirectory(),
        store=store,
        fetcher=Fetcher(endpoint, store, CLOCK, DICE),
        clock=CLOCK,
        wanted=OfferFind(),
        members_min=peers,
        known=known,
        watchers=Watchers(event=lambda event: sentences.append(event.sentence)),
        treasurer=treasurer(funds) if funds else None,
    )
    made: list[Peer] = []
    gang: list[LinkedNode] = []
    shops: list[Shop] = []
    for number in range(peers):
        peer = Peer(network, a_key(110 + number), setting)
        if sells is not None:
            shop = await a_shop(network, peer.key, sells, CLOCK, MemoryDisk(), reclaim_notice_ms=notice_ms)
            shops.append(shop)
        await peer.start(shops[-1].endpoint if shops else None)
        made.append(peer)
        to_peer = await endpoint.dial(peer.key.node_id, peer.endpoint.addresses)
        offer = an_offer(peer.key, 1, name=f"peer-{number}", addresses=tuple(peer.endpoint.addresses))
        gang.append(LinkedNode(peer.key.node_id, shops[-1].offer if shops else open_record(offer, Offer), to_peer))
    running = asyncio.create_task(driver.run(gang))
    await asyncio.gather(*(peer.ready() for peer in made))
    return Scene(folder, driver, running, made, shops, sentences)


def test_each_contribution_that_cannot_count_is_refused_with_its_own_sentence(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_scene(tmp_path)
        one, two = scene.peers
        await one.assigned(0)
        await two.assigned(0)
        data = one.update(1)
        good = one.contribution(0, data)
        share = two.contribution(0, data)
        stranger = a_key(190)
        wrong = {
            "another job": msgspec.structs.replace(good, job=bytes(32)),
            "has not been assigned": msgspec.structs.replace(good, round=7),
            "in term 9": msgspec.structs.replace(good, term=9),
            "another Assignment": msgspec.structs.replace(good, assignment=bytes(32)),
            "is no member": msgspec.structs.replace(good, member=bytes(32)),
            "no member of job": share,  # the other member's, from this member's link
        }
        for sentence, made in wrong.items():
            with pytest.raises(Refused, match=sentence):
                await one.deliver(made, data)
        with pytest.raises(Refused, match="is signed by"):
            await one.deliver(good, data, stranger)
        envelope = sign(one.key, good).to_bytes()
        with pytest.raises(Refused):
            await one.ask(Deliver.KIND, Deliver(contribution=envelope[:-7]))
        with pytest.raises(Refused, match="bytes"):
            await one.ask(Deliver.KIND, Deliver(contribution=envelope, attached=bytes((1 << 20) + 1)))
        # None of it has changed anything: both still deliver, and both count.
        await one.deliver(good, data)
        await one.deliver(good, data)  # twice is no fault
        with pytest.raises(Refused, match="the first one stands"):
            await one.deliver(one.contribution(0, one.update(3)), one.update(3))
        await two.deliver(two.contribution(0, two.update(2)), two.update(2))
        commit = await one.committed(0)
        assert {entry.member for entry in commit.accepted} == {one.member_id, two.member_id}
        assert not commit.excluded
        with pytest.raises(Refused, match="was committed already"):
            await one.deliver(one.contribution(0, one.update(4)), one.update(4))
        kept = list(scene.folder.records(Contribution))
        assert len(kept) == 2  # nothing that was refused fills the disk
        await scene.stop()

    play(story())


def test_a_ledger_that_fails_a_node_that_comes_ends_no_job(tmp_path: Path) -> None:
    async def story() -> None:
        ledger = BookLedger(CLOCK)
        scene = await a_scene(tmp_path, peers=1, funds=Funds.own(ledger, an_account(50), 1000))
        shop = await a_shop(scene.peers[0].network, a_key(150), ledger, CLOCK, MemoryDisk())
        link = await scene.driver._endpoint.dial(shop.node, shop.endpoint.addresses)
        ledger.fails = LedgerFailed("Its disk is full.")
        for said in ("Its disk is full.", "deposit more"):
            await scene.driver._invite(LinkedNode(shop.node, shop.offer, link))
            assert "shop did not join" in scene.sentences[-1] and said in scene.sentences[-1]
            ledger.fails = None
        assert not scene.running.done()
        await shop.sales.close()
        await shop.endpoint.close()
        await scene.stop()

    play(story())


def test_who_comes_later_has_to_have_a_bond_as_well(tmp_path: Path) -> None:
    async def story() -> None:
        scene, looked = await a_scene(tmp_path, peers=1), list[bytes]()
        peer = Peer(scene.peers[0].network, a_key(150), scene.peers[0].setting)
        await peer.start()
        scene.peers.append(peer)
        offer = an_offer(peer.key, 1, name="late", addresses=tuple(peer.endpoint.addresses))
        found = FoundOffer(peer.key.node_id, open_record(offer, Offer), offer)

        async def bonded(node: LinkedNode) -> None:
            looked.append(node.node)
            raise NotSecured("Nothing is at stake.")

        scene.driver._bonded = bonded
        await scene.driver._link_and_invite(found)
        assert looked == [peer.key.node_id] and scene.driver._staying() == 1
        scene.driver._bonded = None
        await scene.driver._link_and_invite(found)
        assert scene.driver._staying() == 2
        await scene.stop()

    play(story())


def with_money(sells: BookLedger) -> Funds:
    payer = an_account(50)
    sells.give(payer.address, 1_000_000)
    return Funds.own(sells, payer, 1_000_000)


@pytest.mark.parametrize(("notice_ms", "status"), [(60_000, NodeStatus.LEFT), (1_000, NodeStatus.RECLAIMED)])
def test_who_leaves_before_its_notice_is_over_has_left(tmp_path: Path, notice_ms: int, status: NodeStatus) -> None:
    async def story() -> None:
        sells = BookLedger(CLOCK)
        scene = await a_scene(tmp_path, peers=1, funds=with_money(sells), sells=sells, notice_ms=notice_ms)
        (peer,), (shop,) = scene.peers, scene.shops
        await peer.assigned(0)
        with pytest.raises(Refused, match="says of somebody else's place"):
            reclaim = Reclaim(client=peer.key.node_id, from_ms=0, until_ms=notice_ms)
            await peer.ask(HoldReclaim.KIND, HoldReclaim(reclaim=sign(peer.key, reclaim).to_bytes()))
        assert await shop.sales.give_notice() == notice_ms / 1000
        while not any("its owner takes it back in" in said for said in scene.sentences):
            await asyncio.sleep(0.01)
        await peer.ask(
            MemberGone.KIND, MemberGone(job=peer.job_id, member=peer.member_id, reason="The node is stopping.")
        )
        assert scene.driver.nodes[peer.key.node_id].status is status
        await scene.stop()

    play(story())


def test_who_leaves_soon_is_let_go_when_what_it_did_counts_and_is_paid(tmp_path: Path) -> None:
    async def story() -> None:
        sells = BookLedger(CLOCK)
        scene = await a_scene(tmp_path, peers=1, funds=with_money(sells), sells=sells, notice_ms=300)
        (peer,), (shop,) = scene.peers, scene.shops
        await peer.assigned(0)
        assert await shop.sales.give_notice() == 0.3, "a round takes 0.48 s"
        while not any("its owner takes it back in" in said for said in scene.sentences):
            await asyncio.sleep(0.01)
        data = peer.update(1)
        await peer.deliver(peer.contribution(0, data), data)
        await peer.ended.wait()
        assert scene.driver.nodes[peer.key.node_id].status is NodeStatus.RECLAIMED
        while shop.sales.taken:
            await asyncio.sleep(0.01)
        (account,) = shop.sales.accounts
        assert account.voucher_micro > 0
        await scene.stop()

    play(story())


def test_an_update_that_does_not_come_in_its_round_is_fetched_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.storage.download.STALL_S", 3600.0)  # nothing else ends it

    async def story() -> None:
        scene = await a_scene(tmp_path, grace_ms=1)
        slow, two = scene.peers

        async def never(_: Request) -> bytes:
            return await asyncio.Future()

        slow.endpoint.handle(BlobRead.KIND, never)
        await slow.assigned(0)
        await two.assigned(0)
        data = slow.update(1)
        await slow.deliver(slow.contribution(0, data), None)
        while not scene.driver._fetcher._downloads:
            await asyncio.sleep(0)
        await two.deliver(two.contribution(0, two.update(2)), two.update(2))
        commit = await two.committed(0)
        assert [entry.member for entry in commit.accepted] == [two.member_id]
        while scene.driver._fetcher._downloads:
            await asyncio.sleep(0)
        await scene.stop()

    play(story())


def test_bytes_of_earlier_terms_are_not_counted_again(tmp_path: Path) -> None:
    async def story() -> None:
        earlier = NodeFigures(node_id=a_key(190).node_id.hex(), name="earlier", bytes_sent=10**6, bytes_received=10**6)
        scene = await a_scene(tmp_path, peers=1, known=[earlier])
        (one,) = scene.peers
        await one.assigned(0)
        await one.deliver(one.contribution(0, one.update(1)), one.update(1))
        await one.committed(0)
        (line,) = scene.folder.notes(RoundMetrics)
        assert (line.bytes_sent, line.bytes_received) == (0, 0)
        assert scene.driver.progress().bytes_sent == 10**6
        await scene.stop()

    play(story())


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda data: data[: len(data) // 2], "cannot be used"),
        (lambda data: data[:16] + np.full((len(data) - 16) // 4, np.nan, np.float32).tobytes(), "cannot be used"),
        (lambda data: data[:16] + np.full((len(data) - 16) // 4, np.inf, np.float32).tobytes(), "cannot be used"),
        (lambda data: data + bytes(4), "cannot be used"),
        (lambda data: bytes(len(data)), "cannot be used"),
    ],
    ids=["truncated", "NaN", "infinite", "longer", "zeros"],
)
def test_an_update_that_is_none_is_excluded_and_its_samples_are_done_by_others(
    tmp_path: Path, spoil: Any, sentence: str
) -> None:
    async def story() -> None:
        scene = await a_scene(tmp_path)
        one, two = scene.peers
        assignment = await one.assigned(0)
        await two.assigned(0)
        bad = spoil(one.update(1))
        await one.deliver(one.contribution(0, bad), bad)
        await two.deliver(two.contribution(0, two.update(2)), two.update(2))
        commit = await two.committed(0)
        assert [entry.member for entry in commit.accepted] == [two.member_id]
        assert [entry.member for entry in commit.excluded] == [one.member_id]
        assert sentence in commit.excluded[0].reason
        lost = next(share for share in assignment.shares if share.member == one.member_id)
        again = await two.assigned(1)
        pieces = [piece for share in again.shares for piece in share.ranges]
        first = lost.ranges[0]
        assert any(piece.start <= first.start < piece.stop for piece in pieces)
        await scene.stop()

    play(story())


def test_a_huge_update_moves_the_state_no_further_than_others(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_scene(tmp_path, peers=3)
        for number, peer in enumerate(scene.peers):
            await peer.assigned(0)
            data = peer.update(number, 1e30 if number == 0 else 1e-3)
            await peer.deliver(peer.contribution(0, data), data)
        commit = await scene.peers[1].committed(0)
        entry = next((one for one in commit.accepted if one.member == scene.peers[0].member_id), None)
        assert entry is None or entry.scale_ppm < PARTS_PER_MILLION // 1000
        await scene.stop()

    play(story())


def test_a_flood_of_contributions_fills_neither_memory_nor_disk(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_scene(tmp_path)
        one, two = scene.peers
        await one.assigned(0)
        await two.assigned(0)
        data = one.update(1)
        made = [one.contribution(0, data, loss_first=float(number)) for number in range(200)]
        answers = await asyncio.gather(*(one.deliver(each, data) for each in made), return_exceptions=True)
        taken = [answer for answer in answers if answer is None]
        refused = [str(answer) for answer in answers if isinstance(answer, Refused)]
        assert len(taken) == 1 and len(refused) == 199
        assert all("one after another" in each or "the first one stands" in each for each in refused)
        assert len(list(scene.folder.records(Contribution))) == 1
        await two.deliver(two.contribution(0, two.update(2)), two.update(2))
        assert len((await two.committed(0)).accepted) == 2
        await scene.stop()

    play(story())


def test_only_members_are_told_commits_or_may_leave(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_scene(tmp_path)
        one = scene.peers[0]
        stranger = Peer(one.network, a_key(180), one.setting)
        await stranger.start()
        link = await stranger.endpoint.dial(OWNER.node_id, ["tcp://driver:1"])
        for message in (
            CommitsAsk(job=one.job_id, first_round=0, last_round=5),
            MemberGone(job=one.job_id, member=one.member_id, reason="I am not this member"),
            MemberReady(job=one.job_id, member=one.member_id, round=-1, state=bytes(32), samples_per_s=1.0),
        ):
            with pytest.raises(Refused, match="is no member of job"):
                await link.request(message.KIND, encode(message))
        await one.ask(MemberGone.KIND, MemberGone(job=one.job_id, member=one.member_id, reason="tired"))
        with pytest.raises(Refused, match="not any more"):
            await one.ask(CommitsAsk.KIND, CommitsAsk(job=one.job_id, first_round=0, last_round=5))
        assert any("tired" in sentence for sentence in scene.sentences)
        await stranger.endpoint.close()
        await scene.stop()

    play(story())


def test_a_member_that_was_started_anew_is_noticed(tmp_path: Path) -> None:
    """Its node answers on a new link, but knows nothing of the job: it has left, and the others go on."""

    async def story() -> None:
        scene = await a_scene(tmp_path)
        one, two = scene.peers
        await one.assigned(0)
        await two.assigned(0)
        addresses = list(one.endpoint.addresses)
        await one.endpoint.close()
        again = one.network.endpoint(one.key)

        async def knows_nothing(request: Request) -> bytes:
            raise LinkError("This node is no member of that job.")

        again.handle(Turn.KIND, knows_nothing)
        await again.listen(addresses[0])
        await two.deliver(two.contribution(0, two.update(2)), two.update(2))
        commit = await two.committed(0)
        assert [entry.member for entry in commit.accepted] == [two.member_id]
        assert any("refused a turn" in sentence for sentence in scene.sentences)
        await again.close()
        await scene.stop()

    play(story())


def test_members_are_let_go_when_the_driver_is_stopped(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_scene(tmp_path)
        scene.running.cancel()
        await asyncio.gather(scene.running, return_exceptions=True)
        for peer in scene.peers:
            await peer.ended.wait()
        await scene.stop()

    play(story())


# --- a node with a scripted driver -----------------------------------------------------------------------------------


async def measured(**_: Any) -> Capability:
    offer = open_record(an_offer(a_key(1), 1), Offer)
    return offer.capability


@dataclass
class NodeScene:
    agent: NodeAgent
    node: MemoryEndpoint
    network: MemoryNetwork
    setting: Setting
    store: BlobStore

    async def link(self, key: KeyPair) -> Any:
        endpoint = self.network.endpoint(key)
        await endpoint.listen("tcp://someone:0")
        return await endpoint.dial(self.node.node_id, self.node.addresses)


async def a_node(tmp_path: Path, **changed: Any) -> NodeScene:
    setting = make_setting(tmp_path / "setting")
    network = MemoryNetwork(CLOCK, dice=DICE)
    key = a_key(150)
    endpoint = network.endpoint(key)
    store = BlobStore(tmp_path / "blobs", 1 << 26, CLOCK)
    settings = NodeSettings(name="heron", folder=tmp_path / "node", listen="tcp://heron:0", **changed)
    settings.folder.mkdir()
    agent = NodeAgent(
        settings,
        key=key,
        endpoint=endpoint,
        hubs=HubClient(endpoint, [], clock=CLOCK, dice=DICE),
        store=store,
        clock=CLOCK,
        dice=DICE,
        measure=measured,
    )
    await agent.start()
    return NodeScene(agent, endpoint, network, setting, store)


def an_invitation(setting: Setting, driver: KeyPair, **changes: Any) -> MemberInvite:
    """A right invitation by `driver`, in a job that OWNER owns; `changes` spoil it."""
    job = sign(OWNER, setting.job)
    drivers = changes.pop("drivers", (driver.node_id,))
    number = changes.pop("term", 1)
    not_after_ms = changes.pop("not_after_ms", CLOCK.now_ms() + 10**9)
    grantor = changes.pop("grantor", OWNER)
    grant = sign(grantor, Grant(job=job.record_id, drivers=drivers, not_after_ms=not_after_ms))
    term = sign(
        driver,
        Term(job=job.record_id, number=number, grant=grant.record_id, head=job.record_id, head_round=-1),
    )
    invite = MemberInvite(
        job=job.to_bytes(), grant=grant.to_bytes(), term=term.to_bytes(), state=setting.job.model.start
    )
    return msgspec.structs.replace(invite, **changes)


def test_a_node_without_a_hub_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        scene = await a_node(tmp_path)
        await scene.agent.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    assert ["No hub was named" in record.getMessage() for record in caplog.records] == [True]


def test_a_node_takes_no_invitation_that_is_not_right(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_node(tmp_path)
        driver, thief = a_key(160), a_key(161)
        link = await scene.link(driver)
        right = an_invitation(scene.setting, driver)
        broken = right.job[:-1] + bytes((right.job[-1] ^ 1,))
        wrong = {
            "signature": msgspec.structs.replace(right, job=broken),
            "another state": msgspec.structs.replace(right, state=BlobRef(bytes(32), 10)),
            "not among the drivers": an_invitation(scene.setting, driver, drivers=(thief.node_id,)),
            "grant ended": an_invitation(scene.setting, driver, not_after_ms=1),
            "owner": an_invitation(scene.setting, driver, grantor=thief),
        }
        for sentence, invite in wrong.items():
            with pytest.raises(Refused, match=sentence):
                await link.request(MemberInvite.KIND, encode(invite))
        stolen = await scene.link(thief)
        with pytest.raises(Refused, match="the driver of its term is"):
            await stolen.request(MemberInvite.KIND, encode(right))
        await scene.agent.close()

    play(story())


def test_strangers_and_old_terms_do_not_disturb_a_member(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_node(tmp_path)
        driver, thief = a_key(160), a_key(161)
        link, stolen = await scene.link(driver), await scene.link(thief)
        newer = an_invitation(scene.setting, driver, term=3)
        answer = await link.request(MemberInvite.KIND, encode(newer), reply_max_bytes=1 << 17)
        member = open_record(_envelope(decode(MemberAnswer, answer).member), Member)
        job = member.job
        with pytest.raises(Refused, match="in term 3"):
            await link.request(MemberInvite.KIND, encode(an_invitation(scene.setting, driver, term=2)))
        with pytest.raises(Refused, match="Only the driver"):
            await stolen.request(JobEnd.KIND, encode(JobEnd(job=job, reason="mine now")))
        with pytest.raises(Refused, match="did not grant"):
            await stolen.request(Turn.KIND, encode(Turn(job=job, term=newer.term, attached=(b"junk",))))
        own = Grant(job=job, drivers=(thief.node_id,), not_after_ms=CLOCK.now_ms() + 10**9, serial=9)
        for _ in range(node_member.INBOX_MAX):  # refused before it waits: it takes no place from the driver
            with pytest.raises(Refused, match="did not grant"):
                await stolen.request(Turn.KIND, encode(Turn(job=job, grant=sign(thief, own).to_bytes())))
        with pytest.raises(Refused, match="did not grant"):
            await stolen.request(HeadAsk.KIND, encode(HeadAsk(job=job)))
        await link.request(Turn.KIND, encode(Turn(job=job)))  # still its member
        # Invited anew by its own driver, in a newer term: the old membership makes way.
        again = an_invitation(scene.setting, driver, term=4)
        answer = await link.request(MemberInvite.KIND, encode(again), deadline_s=30.0, reply_max_bytes=1 << 17)
        assert open_record(_envelope(decode(MemberAnswer, answer).member), Member).session != member.session
        other = make_setting(tmp_path / "other", batch_samples=5)
        with pytest.raises(Refused, match="busy with 'test'"):
            await link.request(MemberInvite.KIND, encode(an_invitation(other, driver)))
        await link.request(JobEnd.KIND, encode(JobEnd(job=job, reason="done")))
        await scene.agent.close()

    play(story())


def test_an_heir_that_hangs_up_may_ask_for_the_head_again(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_node(tmp_path)
        driver, heir = a_key(160), a_key(161)
        link = await scene.link(driver)
        invite = an_invitation(scene.setting, driver, drivers=(driver.node_id, heir.node_id))
        answer = await link.request(MemberInvite.KIND, encode(invite), reply_max_bytes=1 << 17)
        job = open_record(_envelope(decode(MemberAnswer, answer).member), Member).job
        (member,) = scene.agent._members.values()
        asking = await scene.link(heir)
        for asked in (1, 2):
            question = asyncio.create_task(
                asking.request(HeadAsk.KIND, encode(HeadAsk(job=job, term=2)), deadline_s=60)
            )
            while member._inbox.qsize() < asked:  # the member fetches its data still, and answers nobody
                assert not question.done()
                await asyncio.sleep(0)
            question.cancel()
            await asyncio.gather(question, return_exceptions=True)
            while heir.node_id in member._heads:
                await asyncio.sleep(0)
        await scene.agent.close()

    play(story())


def test_a_silent_driver_is_asked_whatever_its_heirs_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_member, "ASK_AFTER_S", 0.1)

    async def story() -> None:
        scene = await a_node(tmp_path)
        driver, heir = a_key(160), a_key(161)
        endpoint, store = scene.network.endpoint(driver), BlobStore(MemoryDisk(), 1 << 26, CLOCK)
        await endpoint.listen("tcp://driver:0")
        link = await endpoint.dial(scene.node.node_id, scene.node.addresses)
        asked = asyncio.Semaphore(0)

        async def ready(request: Request) -> bytes:
            return encode(Done(), request.version)

        async def commits(request: Request) -> bytes:
            asked.release()
            return encode(CommitsGiven(commits=()), request.version)

        endpoint.handle(MemberReady.KIND, ready)
        endpoint.handle(CommitsAsk.KIND, commits)
        serve(endpoint, store)
        setting, files = with_shards(scene.setting)
        store.put(setting.start.to_bytes(), setting.start.MEDIA_TYPE)
        for path in files.values():
            store.put(path.read_bytes())
        holder = BlobHolder(driver.node_id, tuple(endpoint.addresses))
        invite = an_invitation(setting, driver, drivers=(driver.node_id, heir.node_id), holders=(holder,))
        answer = await link.request(MemberInvite.KIND, encode(invite), reply_max_bytes=1 << 17)
        job = open_record(_envelope(decode(MemberAnswer, answer).member), Member).job
        asking = await scene.link(heir)

        async def ask_always() -> None:
            while True:
                with contextlib.suppress(Refused, TimeoutError):
                    async with asyncio.timeout(0.05):
                        await asking.request(HeadAsk.KIND, encode(HeadAsk(job=job, term=2)))

        heirs = asyncio.create_task(ask_always())
        for _ in range(3):
            await asked.acquire()
        heirs.cancel()
        await asyncio.gather(heirs, return_exceptions=True)
        await scene.agent.close()

    play(story())


def test_a_slot_that_is_paid_for_once_is_worked_in_once(tmp_path: Path) -> None:
    async def story() -> None:
        payer, payee = an_account(50), an_account(51)
        ledger = BookLedger(CLOCK)
        ledger.give(payer.address, 1_000_000)
        scene = await a_node(tmp_path, members_max=2, sale=Sale(PRICE, ledger, payee.address))
        driver = a_key(160)
        link = await scene.link(driver)
        with pytest.raises(Refused, match="keeps no slot to train in for"):
            await link.request(MemberInvite.KIND, encode(an_invitation(scene.setting, driver)))

        async def linked(_node: bytes, _offer: Offer) -> Any:
            return link

        quotes = Quotes(driver, payer.address, payer, ledger.name, linked, CLOCK)
        offer = open_record(an_offer(a_key(150), 1, price=PRICE, ledger=ledger.name, slots=2), Offer)
        held = await quotes.hold(scene.node.node_id, offer)
        terms = EscrowTerms(
            payer=payer.address, signer=payer.address, cap_micro=0, auditor=payer.address, amount_micro=1000,
            fee_ppm=0, holdback_ppm=0, notice_ms=60_000, audit_ms=0, expires_ms=CLOCK.now_ms() + 3_600_000,
            payees=(Payee(payee.address, 1000),), quote=bytes(32), nonce=bytes(32),
        )  # fmt: skip
        escrow = terms.escrow_id(ledger.name)
        await ledger.apply(Open(terms, payer.sign(escrow)))
        await quotes.take(held, escrow)
        await link.request(
            MemberInvite.KIND, encode(an_invitation(scene.setting, driver)), reply_max_bytes=1 << 17, deadline_s=30.0
        )
        other = make_setting(tmp_path / "other", batch_samples=5)
        with pytest.raises(Refused, match="keeps a slot for this driver, and works for its job 'test' in it"):
            await link.request(MemberInvite.KIND, encode(an_invitation(other, driver)))
        await scene.agent.close()

    play(story())


def test_a_joiner_takes_the_newest_state_from_several_peers(tmp_path: Path) -> None:
    """The driver names the state and has nothing of it itself; two members do."""

    async def story() -> None:
        scene = await a_node(tmp_path)
        driver = a_key(160)
        link = await scene.link(driver)
        state = np.random.default_rng(1).bytes(12 << 20)
        holders, servers = [], []
        for number in range(2):
            endpoint = scene.network.endpoint(a_key(170 + number))
            at = await endpoint.listen("tcp://holder:0")
            store = BlobStore(MemoryDisk(), 1 << 26, CLOCK)
            start = store.put(state)
            servers.append(serve(endpoint, store))
            holders.append(BlobHolder(endpoint.node_id, (at,)))
        job = scene.setting.job
        model = msgspec.structs.replace(job.model, start=start)
        setting = dataclasses.replace(scene.setting, job=msgspec.structs.replace(job, model=model))
        invite = an_invitation(setting, driver, holders=tuple(holders))
        await link.request(MemberInvite.KIND, encode(invite), reply_max_bytes=1 << 17)
        while not scene.store.has(start.hash):
            await asyncio.sleep(0.01)
        assert all(server.bytes_served > 0 for server in servers)
        assert sum(server.bytes_served for server in servers) < 2 * len(state)
        await scene.agent.close()

    play(story())


async def _reason_of_leaving(scene: NodeScene, *, serving: bool) -> str:
    """Why the node leaves a job whose driver has, or has not, the start state."""
    driver = a_key(160)
    endpoint = scene.network.endpoint(driver)
    at = await endpoint.listen("tcp://driver:0")
    gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def told(request: Request) -> bytes:
        gone.set_result(decode(MemberGone, request.body, request.version).reason)
        return encode(Done(), request.version)

    async def never(_: Request) -> bytes:
        return await asyncio.Future()

    endpoint.handle(MemberGone.KIND, told)
    if serving:
        store = BlobStore(MemoryDisk(), 1 << 26, CLOCK)
        serve(endpoint, store)
        store.put(scene.setting.start.to_bytes())
    else:
        endpoint.handle(BlobRead.KIND, never)
    link = await endpoint.dial(scene.node.node_id, scene.node.addresses)
    invite = an_invitation(scene.setting, driver, holders=(BlobHolder(driver.node_id, (at,)),))
    await link.request(MemberInvite.KIND, encode(invite), reply_max_bytes=1 << 17)
    return await gone


def test_a_job_whose_data_does_not_come_holds_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_member, "FETCH_PATIENCE_S", 0.0)
    monkeypatch.setattr("shoal.storage.fetch.BYTES_PER_S_LEAST", 1 << 40)

    async def story() -> None:
        scene = await a_node(tmp_path)
        assert "could not get the model and the data" in await _reason_of_leaving(scene, serving=False)
        await scene.agent.close()

    play(story())


def test_a_model_that_takes_too_long_to_prepare_ends_the_membership(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_member, "PREPARE_DEADLINE_S", 0.0)

    async def story() -> None:
        scene = await a_node(tmp_path)
        assert "could not build and measure the model within 0 minutes" in await _reason_of_leaving(scene, serving=True)
        await scene.agent.close()

    play(story())


def test_jobs_that_never_began_take_no_place_from_those_that_did(tmp_path: Path) -> None:
    """What an ended job keeps for replays is evidence; a stranger's empty jobs do not push it out."""

    async def story() -> None:
        setting = make_setting(tmp_path / "setting")
        store = BlobStore(tmp_path / "blobs", 1 << 26, CLOCK)
        kept = store.put(b"a private state")
        store.pin(pin_of(bytes(32)), kept.hash)
        store.close()
        scene = await a_node(tmp_path)
        driver = a_key(160)
        link = await scene.link(driver)
        for number in range(ENDED_MAX + 1):
            job = msgspec.structs.replace(setting.job, seed=number)
            invite = an_invitation(dataclasses.replace(setting, job=job), driver)
            await link.request(MemberInvite.KIND, encode(invite), deadline_s=30.0, reply_max_bytes=1 << 17)
            ended = JobEnd(job=_record_id(invite.job), reason="enough")
            await link.request(JobEnd.KIND, encode(ended))
            while scene.agent._members:
                await asyncio.sleep(0)
        assert kept.hash in scene.store.pins(pin_of(bytes(32)))
        await scene.agent.close()

    play(story())


def test_two_commits_for_one_round_are_kept(tmp_path: Path) -> None:
    async def story() -> None:
        scene = await a_node(tmp_path)
        driver = a_key(160)
        endpoint = scene.network.endpoint(driver)
        at = await endpoint.listen("tcp://driver:0")
        store = BlobStore(MemoryDisk(), 1 << 26, CLOCK)
        serve(endpoint, store)
        store.put(scene.setting.start.to_bytes())
        shards = tuple(
            DataShard(store.put(Path(file.path).read_bytes()), file.sequences) for file in scene.setting.data.train
        )
        data = msgspec.structs.replace(scene.setting.job.data, shards=shards)
        setting = dataclasses.replace(scene.setting, job=msgspec.structs.replace(scene.setting.job, data=data))
        ready = asyncio.Event()

        async def is_ready(request: Request) -> bytes:
            ready.set()
            return encode(Done(), request.version)

        async def nothing_new(request: Request) -> bytes:
            return encode(CommitsGiven(commits=()), request.version)

        endpoint.handle(MemberReady.KIND, is_ready)
        endpoint.handle(CommitsAsk.KIND, nothing_new)
        link = await endpoint.dial(scene.node.node_id, scene.node.addresses)
        invite = an_invitation(setting, driver, holders=(BlobHolder(driver.node_id, (at,)),))
        await link.request(MemberInvite.KIND, encode(invite), reply_max_bytes=1 << 17)
        await ready.wait()
        job = _record_id(invite.job)
        rivals = [
            sign(
                driver,
                Commit(
                    job=job,
                    round=3,
                    term=1,
                    assignment=bytes(32),
                    previous=bytes((number,)) * 32,
                    accepted=(),
                    state=bytes(32),
                    tokens_total=0,
                ),
            )
            for number in range(2)
        ]
        for rival in rivals:
            await link.request(Turn.KIND, encode(Turn(job=job, commit=rival.to_bytes())))
        while len(scene.store.pins(EVIDENCE_PIN)) < 2:
            await asyncio.sleep(0.01)
        kept = {scene.store.read(name) for name in scene.store.pins(EVIDENCE_PIN)}
        assert kept == {rival.to_bytes() for rival in rivals}
        await scene.agent.close()

    play(story())


def test_a_member_keeps_its_state_anew_after_its_work_did_not_count(tmp_path: Path) -> None:
    """The state that it kept last may be the one that does not count, and no more than so many rounds may lie between
    two that do."""

    async def story() -> None:
        scene = await a_node(tmp_path)
        setting, files = with_shards(scene.setting)
        driver = a_key(160)
        endpoint = scene.network.endpoint(driver)
        at = await endpoint.listen("tcp://driver:0")
        store = BlobStore(MemoryDisk(), 1 << 26, CLOCK)
        serve(endpoint, store)
        for data in (setting.start.to_bytes(), *(path.read_bytes() for path in files.values())):
            store.put(data)
        ready, delivered = asyncio.Event(), asyncio.Queue[Contribution]()

        async def is_ready(request: Request) -> bytes:
            ready.set()
            return encode(Done(), request.version)

        async def delivers(request: Request) -> bytes:
            packed = decode(Deliver, request.body, request.version).contribution
            delivered.put_nowait(open_record(_envelope(packed), Contribution))
            return encode(Done(), request.version)

        async def no_commits(request: Request) -> bytes:
            return encode(CommitsGiven(commits=()), request.version)

        endpoint.handle(MemberReady.KIND, is_ready)
        endpoint.handle(CommitsAsk.KIND, no_commits)
        endpoint.handle(Deliver.KIND, delivers)
        link = await endpoint.dial(scene.node.node_id, scene.node.addresses)
        invite = an_invitation(setting, driver, holders=(BlobHolder(driver.node_id, (at,)),))
        answer = await link.request(MemberInvite.KIND, encode(invite), reply_max_bytes=1 << 17)
        member = _envelope(decode(MemberAnswer, answer).member)
        await ready.wait()
        job = _record_id(invite.job)
        previous, kept = job, []
        for number in range(2):
            share = Share(member.record_id, (SampleRange(0, 24 * number, 24 * number + 24),))
            assignment = sign(
                driver,
                Assignment(
                    job=job,
                    round=number,
                    term=1,
                    previous=previous,
                    base_state=setting.start.hash,
                    step=0,
                    deadline_ms=60_000,
                    shares=(share,),
                ),
            )
            await link.request(Turn.KIND, encode(Turn(job=job, assignment=assignment.to_bytes())))
            kept.append((await delivered.get()).snapshot)
            commit = sign(
                driver,
                Commit(
                    job=job,
                    round=number,
                    term=1,
                    previous=previous,
                    assignment=assignment.record_id,
                    accepted=(),
                    excluded=(Excluded(member=member.record_id, reason="It came too late."),),
                    state=setting.start.hash,
                    tokens_total=0,
                ),
            )
            await link.request(Turn.KIND, encode(Turn(job=job, commit=commit.to_bytes())))
            previous = commit.record_id
        assert setting.job.replay.snapshot_every > 2
        assert kept == [False, True]
        await scene.agent.close()

    play(story())
