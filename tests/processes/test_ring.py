"""A ring of stages on nodes: over real links, with engines in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from test_stages import a_checkpoint
from transformers import AutoModel, AutoModelForCausalLM

from shoal.errors import LinkError
from shoal.gateway.constraints import Constraint, JsonFormats
from shoal.gateway.receipts import Accounts, Books, Figures, Kept, Metering, read_accounts
from shoal.gateway.remote import NodeRing, Rings
from shoal.gateway.rings import Ring, RingLost, RingRefused
from shoal.gateway.streams import Stream, StreamLost
from shoal.identity import KeyPair
from shoal.inference.commands import Advance, Advanced
from shoal.models.configs import read_config
from shoal.models.shapes import shape_of, survey
from shoal.models.tokenizers import ByteTokenizer
from shoal.node.member import EngineSettings
from shoal.node.stages import StageHost
from shoal.node.surveying import Prober
from shoal.protocol.blobs import CHUNK_BYTES, BlobHolder
from shoal.protocol.messages import DEFAULT_NETWORK, decode, encode, sign
from shoal.protocol.offers import Done
from shoal.protocol.serving import (
    Choosing,
    Chosen,
    LinkEcho,
    ModelFile,
    ServeJob,
    StageAnswer,
    StageForget,
    StageGone,
    StageInvite,
    StagePlace,
    StageWork,
)
from shoal.storage import BlobStore, Fetcher, serve
from shoal.transport import TlsEndpoint
from shoal.world import Refused, Request, SystemClock, SystemDice
from shoal.world.reach import echo

GENEROUS_S = 120.0
PROMPT = tuple(range(5, 85))
GREEDY = Choosing(temperature=0, prompt_tokens=len(PROMPT))
SESSIONS = itertools.count(1)


class Place:
    """An endpoint with a store, and with a host of stages if it is a node."""

    def __init__(self, folder: Path, name: str, *, memory_bytes: int = 1 << 34, storage_bytes: int = 1 << 30) -> None:
        self.memory_bytes = memory_bytes
        self.key = KeyPair.generate()
        self.name = name
        self.endpoint = TlsEndpoint(self.key)
        self.clock = SystemClock()
        self.store = BlobStore(folder / name, storage_bytes, self.clock)
        self.fetcher = Fetcher(self.endpoint, self.store, self.clock, SystemDice())
        self.host: StageHost | None = None

    async def start(self, *, node: bool) -> None:
        serve(self.endpoint, self.store)
        if node:
            self.endpoint.handle(LinkEcho.KIND, echo)
            Prober(self.endpoint, self.clock)

            async def changed() -> None:
                pass

            self.host = StageHost(
                key=self.key, name=self.name, endpoint=self.endpoint, store=self.store, fetcher=self.fetcher,
                clock=self.clock, settings=EngineSettings(), memory_bytes=self.memory_bytes,
                network=DEFAULT_NETWORK, admit=lambda known, held: None,
                changed=changed,
            )  # fmt: skip
        await self.endpoint.listen("tcp://127.0.0.1:0")

    @property
    def holder(self) -> BlobHolder:
        return BlobHolder(self.key.node_id, tuple(self.endpoint.addresses))

    async def close(self) -> None:
        if self.host is not None:
            await self.host.close()
        await self.fetcher.close()
        await self.endpoint.close()
        self.store.close()


class World:
    def __init__(self, folder: Path, nodes: int, lent: Mapping[str, int], **model: Any) -> None:
        self.checkpoint = a_checkpoint(folder / "model", "llama", **model)
        self.gateway = Place(folder, "gateway")
        self.nodes = [Place(folder, f"node{number}", **lent) for number in range(nodes)]
        self.books = Books(folder / "books", print)

    async def start(self) -> None:
        await self.gateway.start(node=False)
        for node in self.nodes:
            await node.start(node=True)
        self.rings = Rings(self.gateway.endpoint)
        config = read_config(self.checkpoint)
        files = tuple(
            ModelFile(name=file.name, blob=self.gateway.store.adopt(file))
            for file in sorted(self.checkpoint.glob("*.safetensors"))
        )
        self.job = ServeJob(name="small", created_ms=0, config=config, layers=shape_of(config).layers, files=files)
        self.layout = survey(config, sorted(self.checkpoint.glob("*.safetensors")))
        self.envelope = sign(self.gateway.key, self.job)
        self.metering = Metering(self.envelope.record_id, self.books, self.gateway.clock)

    def invite(self, ring: bytes, places: tuple[StagePlace, ...], mine: int) -> StageInvite:
        parts = self.layout.parts_of(places[mine].first, places[mine].stop)
        return StageInvite(
            job=self.envelope.to_bytes(), ring=ring, stages=places, mine=mine, files=tuple(parts),
            parts=tuple(parts.values()), memory_bytes=1 << 26, holders=(self.gateway.holder,),
        )  # fmt: skip

    async def ring(self, *who: int, cuts: tuple[int, ...] = (1, 2)) -> NodeRing:
        ends = (0, *cuts[: len(who) - 1], self.job.layers)
        places = tuple(
            StagePlace(
                node=self.nodes[n].key.node_id, addresses=tuple(self.nodes[n].endpoint.addresses), first=a, stop=b
            )
            for n, a, b in zip(who, ends, ends[1:], strict=False)
        )
        links = [await self.gateway.endpoint.dial(place.node, place.addresses) for place in places]
        name = "-".join(str(n) for n in who)
        number = os.urandom(16)
        ring = NodeRing(
            name, number, places, links, self.gateway.clock, token_ms=1.0,
            meter=self.metering.ring(number, places, [str(n) for n in who]),
        )  # fmt: skip
        self.rings.add(ring)
        for mine, link in enumerate(links):
            invite = self.invite(ring.ring, places, mine)
            await link.request(invite.KIND, encode(invite, link.version))
        await asyncio.wait({ring.ready, ring.lost}, return_when=asyncio.FIRST_COMPLETED)
        if ring.lost.done():
            raise LinkError(ring.lost.result().reason)
        return ring

    async def close(self) -> None:
        await self.gateway.close()  # first: nodes that stop wait for its streams to go on elsewhere
        for node in self.nodes:
            await node.close()
        self.books.close()

    def accounts(self) -> Accounts:
        return read_accounts(Path(self.books._disk.place))


@contextlib.asynccontextmanager
async def a_world(folder: Path, nodes: int, lent: Mapping[str, int] = {}, **model: Any) -> AsyncIterator[World]:
    world = World(folder, nodes, lent, **model)
    await world.start()
    try:
        yield world
    finally:
        await world.close()


def expected(checkpoint: Path, count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        return model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False)[0, len(PROMPT) :].tolist()


def a_stream(
    rings: list[Ring],
    count: int,
    sampling: Choosing = GREEDY,
    constraint: Constraint | None = None,
    patience_s: float = 0.0,
) -> Stream:
    return Stream(
        PROMPT, sampling, count, frozenset(), lambda lost, _: next((one for one in rings if one not in lost), None),
        lambda: next(SESSIONS), SystemClock(), patience_s, constraint=constraint,
    )  # fmt: skip


async def states(ring: Ring, session: int, start: int, tokens: tuple[int, ...], wanted: int) -> bytes:
    piece = Advance(
        session=session, start=start, tokens=tokens, choose=wanted, states_wanted=True, sampling=GREEDY
    )  # fmt: skip
    return (await ring.advance(piece)).states


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def said(stream: Stream) -> list[int]:
    return [one.token async for chosen in stream.tokens() for one in chosen]


def test_a_ring_of_three_says_what_transformers_says(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 3) as world:
            ring = await world.ring(0, 1, 2)
            assert ring.arithmetic
            tokens = expected(world.checkpoint, 20)
            assert await said(a_stream([ring], 20)) == tokens
            together = await asyncio.gather(*(said(a_stream([ring], 20)) for _ in range(8)))
            assert together == [tokens] * 8
            await until(lambda: world.metering.counts.receipts == 3 * 9)
            for account in world.accounts().nodes.values():
                assert (account.sessions, account.prompt_tokens) == (9, 9 * len(PROMPT))
                assert 9 <= account.generated_tokens <= 9 * 20 and account.layer_positions >= 99 + 8 * 19
            plain = a_stream([ring], 20)
            plain.guess = False
            assert await said(plain) == tokens
            await until(lambda: world.metering.counts.receipts == 3 * 10)
            file = Path(world.books._disk.place) / "receipts.jsonl"
            for text in file.read_text().splitlines()[-3:]:
                line = msgspec.json.decode(text, type=Kept)
                assert line.figures == Figures(len(PROMPT), 20, 20), "the prompt was there, but for its last position"
                assert line.stop == line.first + 1
            assert not world.accounts().bad and not world.metering.counts.receipts_disputed

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


@pytest.mark.parametrize(
    ("lent", "words"),
    [
        pytest.param({"memory_bytes": 1 << 20}, "lends 1.0 MiB of memory .* 64.0 MiB for sessions", id="sessions"),
        pytest.param({"memory_bytes": 1 << 26}, "0 B of it are taken, .* for weights and 64.0 MiB", id="weights"),
        pytest.param({"storage_bytes": 1 << 20}, "keeps 1.0 MiB of files, .* --storage", id="storage"),
    ],
)
def test_a_node_holds_no_more_than_it_lends(tmp_path: Path, lent: dict[str, int], words: str) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 1, lent=lent, **LARGE) as world:
            (node,) = world.nodes
            assert node.host is not None
            with pytest.raises(LinkError, match=words):
                await world.ring(0, cuts=())
            await until(lambda: not node.host.names() if node.host else True)
            assert not node.store.has(world.job.files[0].blob.hash), "nothing was fetched in vain"

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_rings_that_share_layers_share_memory(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 2, lent={"memory_bytes": 100 << 20}, **LARGE) as world:
            rings = [await world.ring(0, 1, cuts=(3,)) for _ in range(3)]
            layers = world.layout
            node = world.nodes[0]
            assert node.host is not None
            weights = layers.first_bytes + sum(layers.layer_bytes[:3])
            bridged = CHUNK_BYTES  # a gap between what is fetched; what lies in it counts
            assert weights <= node.host.lent_bytes - (1 << 26) < weights + bridged
            for ring in rings:
                await ring.close("over")
            await until(lambda: node.host is not None and node.host.lent_bytes == 0)

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


LARGE = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1024}
"""24 MB in one file, nearly all of it layers."""


def allocated(folder: Path) -> int:
    """Bytes that a folder's files take on the disk: a hole takes none."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def test_a_node_fetches_no_more_of_one_large_file_than_its_layers(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 3, **LARGE) as world:
            (file,) = world.job.files
            ring = await world.ring(0, 1, 2, cuts=(2, 4))
            tokens = expected(world.checkpoint, 12)
            assert len(set(tokens)) > 3 and await said(a_stream([ring], 12)) == tokens
            for node in world.nodes:
                assert not node.store.has(file.blob.hash)
                assert allocated(tmp_path / node.name) < 0.45 * file.blob.size, node.name
                assert node.store.used_bytes < 0.45 * file.blob.size

            # Other layers of the same file, while those are in use; a node with all of them has the file.
            other = await world.ring(1, 2, 0, cuts=(2, 4))
            assert await said(a_stream([other], 12)) == tokens == await said(a_stream([ring], 12))
            assert all(allocated(tmp_path / node.name) < 0.8 * file.blob.size for node in world.nodes)
            alone = await world.ring(2, cuts=())
            assert world.nodes[2].store.has(file.blob.hash)
            assert await said(a_stream([alone], 12)) == tokens == await said(a_stream([other], 12))

            for wrong in (((0, file.blob.size + 1),), ((5, 5),), ((0, 9), (8, 20))):
                invite = msgspec.structs.replace(world.invite(os.urandom(16), ring.places, 0), parts=(wrong,))
                link = await world.gateway.endpoint.dial(ring.places[0].node, ring.places[0].addresses)
                with pytest.raises(Refused, match="the stage's part lies outside, or overlaps"):
                    await link.request(invite.KIND, encode(invite, link.version))

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_what_a_killed_node_had_pinned_for_its_layers_may_go(tmp_path: Path) -> None:
    async def scene() -> None:
        node = Place(tmp_path, "node")
        blob = node.store.put(b"layers")
        node.store.pin("serve-0123-1", blob.hash)
        node.store.pin("job-0123", blob.hash)
        await node.start(node=True)
        assert node.store.owners() == {"job-0123"}
        await node.close()

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_stage_whose_part_lacks_a_tensor_says_which(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 1, **LARGE) as world:
            node, gone = world.nodes[0], asyncio.get_running_loop().create_future()

            async def heard(request: Request) -> bytes:
                gone.set_result(decode(StageGone, request.body, request.version))
                return encode(Done(), request.version)

            world.gateway.endpoint.handle(StageGone.KIND, heard)
            places = (StagePlace(node=node.key.node_id, addresses=tuple(node.endpoint.addresses), first=0, stop=6),)
            few = world.layout.parts_of(0, 5)
            invite = msgspec.structs.replace(world.invite(os.urandom(16), places, 0), parts=tuple(few.values()))
            link = await world.gateway.endpoint.dial(places[0].node, places[0].addresses)
            await link.request(invite.KIND, encode(invite, link.version))
            reason = (await gone).reason
            assert "tensor 'model.layers.5." in reason and "not of the part that was fetched" in reason

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stream_goes_on_elsewhere_when_a_stage_is_killed(tmp_path: Path, stage: int) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 3) as world:
            spare = await world.ring(2, cuts=())
            for sampling in (GREEDY, Choosing(temperature=1.0, seed=7)):
                undisturbed = await said(a_stream([spare], 16, sampling))
                for position in range(0, 16, 3):
                    ring = await world.ring(0, 1, cuts=(1,))
                    engine = world.nodes[stage].host._stages[ring.ring][0]._layers.engine  # type: ignore[union-attr]
                    assert engine is not None
                    stream, got = a_stream([ring, spare], 16, sampling), []
                    async for chosen in stream.tokens():
                        got += [one.token for one in chosen]
                        if len(got) > position and engine.pid:
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(engine.pid, signal.SIGKILL)
                    assert got == undisturbed
                    assert stream.lost == [ring] or len(got) - position <= 1
                    assert ring.lost.done() or len(got) - position <= 1
                    await ring.close("done")

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_stream_that_has_nowhere_to_go_waits_for_the_next_plan(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 2) as world:
            rings: list[Ring] = [only := await world.ring(0, cuts=())]
            undisturbed = await said(a_stream(list(rings), 16))
            stream, got = a_stream(rings, 16, patience_s=GENEROUS_S), list[int]()
            engine = world.nodes[0].host._stages[only.ring][0]._layers.engine  # type: ignore[union-attr]

            async def plan_again() -> None:
                await only.lost
                rings.append(await world.ring(1, cuts=()))

            planning = asyncio.create_task(plan_again())
            async for chosen in stream.tokens():
                got += [one.token for one in chosen]
                if len(got) > 3 and not only.lost.done():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(engine.pid, signal.SIGKILL)
            await planning
            assert got == undisturbed and stream.lost == [only]

            impatient = a_stream([], 16)
            with pytest.raises(StreamLost, match="No replica is left"):
                await said(impatient)

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_node_that_claims_more_is_disputed_and_one_that_died_is_missed(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 3) as world:
            spare, ring = await world.ring(2, cuts=()), await world.ring(0, 1, cuts=(1,))
            liar, dies = (world.nodes[n].host._stages[ring.ring][0] for n in (0, 1))  # type: ignore[union-attr]
            stream, got = a_stream([ring, spare], 16), []
            async for chosen in stream.tokens():
                if not got:
                    (session,) = liar._sessions.values()
                    session.served.computed += 1000
                    os.kill(dies._layers.engine.pid, signal.SIGKILL)  # type: ignore[union-attr]
                got += [one.token for one in chosen]
            assert stream.lost == [ring]
            await ring.close("It is lost.")
            counts = world.metering.counts
            await until(lambda: counts.receipts == 1)
            assert (counts.receipts_disputed, counts.receipts_missing) == (1, 1)
            accounts = {one.name: one for one in world.accounts().nodes.values()}
            assert (accounts["0"].disputed, accounts["0"].sessions, accounts["0"].layer_positions) == (1, 0, 0)
            assert (accounts["1"].missing, accounts["1"].sessions) == (1, 0)
            assert (accounts["2"].sessions, accounts["2"].prompt_tokens) == (1, len(PROMPT))
            (line,) = world.accounts().disputed
            assert line.claimed is not None and line.claimed.computed_positions > 1000 > line.seen.computed_positions
            assert "positions computed" in line.reason

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_prompt_whose_beginning_was_let_go_is_read_anew_and_known_from_then_on(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 2) as world:
            ring = await world.ring(0, 1, cuts=(1,))
            tokens = expected(world.checkpoint, 8)
            ring.prefixes.add(999, PROMPT)  # no stage has it any more
            first, second, stranger = (a_stream([ring], 8) for _ in range(3))
            stranger.scope = "somebody else"
            assert await said(first) == tokens
            found = ring.prefixes.find(PROMPT)
            assert found is not None and found.session != 999
            assert await said(second) == tokens and second.reused >= len(PROMPT) - 1
            assert await said(stranger) == tokens and stranger.reused == 0
            assert first.lost == second.lost == []

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


@pytest.mark.parametrize("wrong", ["not finite", "short"])
def test_a_stage_that_computes_nonsense_is_noticed_by_the_next_one(tmp_path: Path, wrong: str) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 3) as world:
            spare, ring = await world.ring(2, cuts=()), await world.ring(0, 1, cuts=(1,))
            engine = world.nodes[0].host._stages[ring.ring][0]._layers.engine  # type: ignore[union-attr]
            honest, steps = engine.advance, itertools.count()

            async def advance(piece: Advance) -> Advanced:
                done = await honest(piece)
                if next(steps) < 4:
                    return done
                nonsense = b"\xff" * len(done.states) if wrong == "not finite" else done.states[4:]
                return Advanced(states=nonsense)

            engine.advance = advance  # type: ignore[method-assign]
            stream = a_stream([ring, spare], 16)
            assert await said(stream) == expected(world.checkpoint, 16)
            assert stream.lost == [ring]
            loss = ring.lost.result()
            assert "hidden states" in loss.reason.lower() and loss.nodes == frozenset()
            assert loss.ways == {(ring.places[0].node, ring.places[1].node)}

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_positions_that_come_after_the_end_of_their_session_leave_nothing(tmp_path: Path) -> None:
    """The end goes to each stage, positions from one to the next: the end may be the first to arrive."""

    async def scene() -> None:
        async with a_world(tmp_path, 2) as world:
            ring = await world.ring(0, 1, cuts=(1,))
            end = StageForget(ring=ring.ring, session=7)
            await ring._links[1].request(end.KIND, encode(end, ring._links[1].version))
            with pytest.raises(RingRefused, match="Session 7 is over"):
                await ring.advance(Advance(session=7, start=0, tokens=(1, 2), choose=1))
            await ring.close_session(7)
            for node in world.nodes:
                assert node.host is not None
                ((run, _),) = node.host._stages.values()
                assert not run._sessions
            assert await said(a_stream([ring], 4)) == expected(world.checkpoint, 4), "the ring is as it was"

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_many_that_hang_up_at_once_leave_room_for_others(tmp_path: Path) -> None:
    """What a ring was given stays under way there until it is done, whoever waits for it."""

    async def scene() -> None:
        async with a_world(tmp_path, 1) as world:
            ring = await world.ring(0, cuts=())
            for _ in range(5):
                gone = [asyncio.create_task(said(a_stream([ring], 40))) for _ in range(40)]
                await until(lambda: ring._flying > 30)
                for task in gone:
                    task.cancel()
                stay = [said(a_stream([ring], 4)) for _ in range(40)]
                assert await asyncio.gather(*stay) == [expected(world.checkpoint, 4)] * 40

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_what_is_not_theirs_to_ask_is_refused(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 3) as world:
            ring = await world.ring(0, 1, cuts=(1,))
            stranger = world.nodes[2].endpoint
            link = await stranger.dial(world.nodes[1].key.node_id, world.nodes[1].endpoint.addresses)
            work = StageWork(ring=ring.ring, session=1, number=1, start=0, tokens=(1,))
            with pytest.raises(Refused, match="is not before node1 in this ring"):
                await link.request(work.KIND, encode(work, link.version))
            with pytest.raises(Refused, match="signed by .*another asks"):
                invite = world.invite(os.urandom(16), ring.places, 1)
                await link.request(invite.KIND, encode(invite, link.version))
            first = ring._links[0]
            for places, mine, part in (
                (ring.places[:1], 0, "do not hold the 3 layers"),
                (ring.places[::-1], 0, "do not hold"),
                (ring.places, 1, "another node's"),
            ):
                invite = world.invite(os.urandom(16), places, mine)
                with pytest.raises(Refused, match=part):
                    await first.request(invite.KIND, encode(invite, first.version))
            with pytest.raises(RingRefused, match="cannot go on with"):
                await ring.advance(Advance(session=5, start=7, tokens=(1,), choose=1))
            assert await said(a_stream([ring], 4)) == expected(world.checkpoint, 4), "the ring is as it was"
            with pytest.raises(RingLost):
                await ring.close("enough")
                await ring.advance(Advance(session=6, start=0, tokens=(1,), choose=1))

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_stream_that_is_held_to_a_format_goes_on_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stage is killed, and where the last one says a token that it was not allowed."""
    schema = {"type": "array", "items": {"enum": ["cod", "eel", 10, 11, None]}, "minItems": 9, "maxItems": 20}
    liar: list[bytes] = []
    answered = NodeRing.answered

    def lie(ring: NodeRing, message: StageAnswer, peer: bytes) -> None:
        if ring.ring in liar and message.chosen:
            message = msgspec.structs.replace(message, chosen=(*message.chosen[:-1], Chosen(ord("!"))))
        answered(ring, message, peer)

    monkeypatch.setattr(NodeRing, "answered", lie)

    async def scene() -> None:
        async with a_world(tmp_path, 3, vocab_size=257) as world:
            spare = await world.ring(2, cuts=())
            held = await JsonFormats(ByteTokenizer(), []).constraint(schema)
            for sampling in (GREEDY, Choosing(temperature=1.0, seed=7)):
                undisturbed = await said(a_stream([spare], 120, sampling, held.copy()))
                assert len(json.loads(bytes(undisturbed))) >= 9
                for trouble in ("killed", "lies"):
                    ring = await world.ring(0, 1, cuts=(1,))
                    engine = world.nodes[1].host._stages[ring.ring][0]._layers.engine  # type: ignore[union-attr]
                    assert engine is not None
                    stream, got = a_stream([ring, spare], 120, sampling, held.copy()), []
                    async for chosen in stream.tokens():
                        got += [one.token for one in chosen]
                        if trouble == "lies":
                            liar.append(ring.ring)
                        elif len(got) > 10:
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(engine.pid, signal.SIGKILL)
                    assert got == undisturbed and stream.lost == [ring] and stream.finish == "stop"
                    assert trouble == "killed" or "not allowed" in ring.lost.result().reason

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_final_states_come_from_a_ring_of_nodes(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_world(tmp_path, 2) as world:
            ring = await world.ring(0, 1, cuts=(1,))
            with torch.no_grad():
                model = AutoModel.from_pretrained(world.checkpoint).eval()
                expected = model(torch.tensor([PROMPT])).last_hidden_state[0].numpy()
            first = await states(ring, 1, 0, PROMPT[:50], 50)
            last = await states(ring, 1, 50, PROMPT[50:], 1)
            rows = np.frombuffer(first + last, dtype="<f4").reshape(51, -1)
            assert np.allclose(rows, np.concatenate([expected[:50], expected[-1:]]), atol=1e-4)
            assert await states(ring, 2, 0, PROMPT, 0) == b""
            with pytest.raises(RingRefused, match="3 tokens are wanted after 1 positions"):
                await states(ring, 3, 0, PROMPT[:1], 3)
            await ring.close_session(1)
            await until(lambda: world.metering.counts.receipts == 2)
            for account in world.accounts().nodes.values():
                assert (account.prompt_tokens, account.generated_tokens) == (len(PROMPT), 0)

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))
