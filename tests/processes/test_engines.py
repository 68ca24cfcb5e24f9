"""Whole replicas in servers of another make: over real links, with a stand-in server in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs
from openai_standin import FAULT_AT, FAULTS
from safetensors.torch import load_file, save_file
from test_gateway import GENEROUS_S, PROMPT, events, expected
from test_serving import a_shoal, until
from test_stages import a_checkpoint

from shoal.gateway.admission import Admission
from shoal.gateway.engines import EngineFinder, EngineReplica
from shoal.gateway.prompts import read_template
from shoal.gateway.receipts import Books, Metering, read_accounts
from shoal.gateway.service import ModelService
from shoal.gateway.web import make_app
from shoal.identity import KeyPair
from shoal.inference.metering import Served
from shoal.models.tokenizers import ByteTokenizer
from shoal.node.engine import EngineHost, _Passed
from shoal.node.openai_server import OpenAiServer, ServerSettings, ServerUnusable
from shoal.protocol.engines import EngineAsk, EngineEnd, EnginePiece, EngineSession, PieceReader
from shoal.protocol.hubs import HubTicket
from shoal.protocol.messages import decode, encode, sign
from shoal.protocol.offers import Capability, Device, Offer, OfferFind
from shoal.protocol.serving import LinkEcho, StageForgotten
from shoal.sdk.local import LocalShoal
from shoal.sdk.serve import LocalServer, NodesServer, ServeOptions
from shoal.transport import TlsEndpoint
from shoal.transport.http import HttpFace
from shoal.world import FoundOffer, Refused, SystemClock, SystemDice
from shoal.world.reach import echo

BODY = {"model": "small", "prompt": PROMPT * 3, "max_tokens": 40, "temperature": 0}
CLOCK = SystemClock()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says printable ASCII, so that its text says its tokens."""
    folder = a_checkpoint(tmp_path_factory.mktemp("served") / "model", "llama", vocab_size=257, eos_token_id=256)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:32] = 0
    tensors["lm_head.weight"][127:] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ByteTokenizer().save(folder)
    return folder


class Standin:
    """A running stand-in server."""

    def __init__(self, checkpoint: Path, log: Path) -> None:
        self.log = log
        words = [sys.executable, str(Path(__file__).with_name("openai_standin.py")), str(checkpoint), str(log)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]

    def at(self, manner: str) -> str:
        return f"{self.url}/{manner}/v1"

    def noted(self, **what: Any) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [one for one in map(json.loads, lines) if what.items() <= one.items()]

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def standin(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    running = Standin(checkpoint, tmp_path_factory.mktemp("standin") / "log")
    yield running
    running.close()


class World:
    """A gateway, and nodes that have a server beside them, as the gateway's finder would hear of them from a hub."""

    def __init__(self, checkpoint: Path, books: Books | None = None) -> None:
        self.endpoint = TlsEndpoint(KeyPair.generate())
        self.hosts: dict[str, tuple[KeyPair, TlsEndpoint, EngineHost]] = {}
        self.said: list[str] = []
        self.sequence = 0
        tokenizer = ByteTokenizer()
        self.service = ModelService(
            name="small", created=0, context=512, tokenizer=tokenizer, template=read_template(checkpoint),
            ends=frozenset({256}), rings=[], admission=Admission(1 << 20), clock=CLOCK, dice=SystemDice(),
            patience_s=0.0,
        )  # fmt: skip
        self.finder = EngineFinder(
            "small",
            tokenizer,
            self.endpoint,
            self,
            CLOCK,
            self.service.rings,
            SystemDice(),
            Metering(bytes(32), books, CLOCK, self.service.counts),
            4,
            self.said.append,
        )

    async def node(self, name: str, url: str, **settings: Any) -> EngineHost:
        key = KeyPair.generate()
        endpoint = TlsEndpoint(key)
        endpoint.handle(LinkEcho.KIND, echo)  # as every agent does
        await endpoint.listen("tcp://127.0.0.1:0")

        async def changed() -> None:
            self.sequence += 1

        host = EngineHost(
            ServerSettings(url, **settings), key=key, name=name, endpoint=endpoint, clock=CLOCK, changed=changed
        )
        self.hosts[name] = key, endpoint, host
        await host.start()
        return host

    async def find(self, wanted: OfferFind) -> list[FoundOffer]:
        found = []
        device = Device(kind="cpu", name="x", memory_bytes=1, memory_bytes_per_s=1, throughput=())
        for name, (key, endpoint, host) in self.hosts.items():
            offer = Offer(
                name=name, sequence=self.sequence, issued_ms=0, lifetime_ms=60_000, accepts=("engine",),
                addresses=tuple(endpoint.addresses), capability=Capability(devices=(device,)), engine=host.offer,
            )  # fmt: skip
            if host.offer is not None and host.offer.model == wanted.model:
                found.append(FoundOffer(key.node_id, offer, sign(key, offer)))
        return found

    async def introduce(self, node: bytes, addresses: Sequence[str]) -> None:
        raise AssertionError("every node here can be dialled")

    def prefer(self, *names: str) -> None:
        for replica in self.service.rings:
            place = replica.name.split()[0]
            replica.token_ms = 1e-3 * (1 + names.index(place)) if place in names else 1e6
            replica.start_ms = 0.0  # how far it was measured to be is another thing each time

    async def close(self) -> None:
        for _, endpoint, host in self.hosts.values():
            await host.close()
            await endpoint.close()
        await self.endpoint.close()
        await self.service.template.stop()


@contextlib.asynccontextmanager
async def a_world(
    checkpoint: Path, *, model: str = "small", books: Books | None = None, **urls: str
) -> AsyncIterator[tuple[World, httpx.AsyncClient]]:
    world = World(checkpoint, books)
    world.finder.model = model
    face = HttpFace(make_app(world.service), CLOCK)
    try:
        for name, url in urls.items():
            await world.node(name, url)
        await world.finder.look()
        assert len(world.service.rings) == len(urls), world.said
        world.prefer(*urls)
        async with httpx.AsyncClient(base_url=await face.start("127.0.0.1:0"), timeout=GENEROUS_S) as web:
            yield world, web
    finally:
        await face.stop()
        await world.close()


def play(scene: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


# --- what a node finds out about its server ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manner", "takes_tokens", "gives_tokens"),
    [("ids", True, True), ("plain", True, False), ("strict", True, False), ("text", False, False)],
)
def test_a_server_is_tried_before_it_is_offered(
    standin: Standin, manner: str, takes_tokens: bool, gives_tokens: bool
) -> None:
    async def scene() -> None:
        server = OpenAiServer(ServerSettings(standin.at(manner)), CLOCK)
        offer = await server.look()
        await server.close()
        assert (offer.model, offer.takes_tokens, offer.gives_tokens) == ("small", takes_tokens, gives_tokens)
        assert 0 < offer.token_ms < 10_000
        assert ("repeat_penalty" in standin.noted(manner=manner)[-1]) == (manner in ("ids", "plain"))

    play(scene)


@pytest.mark.parametrize(
    ("url", "model", "part"),
    [
        ("http://127.0.0.1:1/v1", "", "cannot be reached"),
        ("ftp://127.0.0.1/v1", "", "is none of HTTP"),
        ("127.0.0.1:8080/v1", "", "is none of HTTP"),
        ("ids/v1/more", "small", "answered 404: Not Found."),
        ("ids/v1", "large", "does not serve large; it serves small."),
        ("http://me:secret@127.0.0.1:1/v1", "", "http://127.0.0.1:1/v1 cannot be reached"),
        ("odd/v1", "", "'my model' cannot stand in an offer"),
        ("two/v1", "", "serves small, other; say which one with --engine-model."),
        ("deaf/v1", "", "does not complete a text: "),
        ("html/v1", "", "'text/html' where a stream was asked for"),
        ("locked/v1", "", "answered 401: Who are you?"),
    ],
)
def test_what_is_no_engine_is_told(standin: Standin, url: str, model: str, part: str) -> None:
    async def scene() -> None:
        whole = url if "127" in url else f"{standin.url}/{url}"
        with pytest.raises(ServerUnusable) as refused:
            server = OpenAiServer(ServerSettings(whole, model), CLOCK)
            try:
                await server.look()
            finally:
                await server.close()
        assert part in refused.value.sentence and "secret" not in refused.value.sentence

    play(scene)


def test_a_key_is_sent(standin: Standin) -> None:
    async def scene() -> None:
        server = OpenAiServer(ServerSettings(standin.at("locked"), key="secret"), CLOCK)
        assert (await server.look()).gives_tokens
        await server.close()
        assert "secret" not in repr(ServerSettings("http://x/v1", key="secret"))

    play(scene)


# --- what clients get --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", ["ids", "plain", "text"])
def test_tokens_are_those_of_the_server(checkpoint: Path, standin: Standin, manner: str) -> None:
    async def scene() -> None:
        async with a_world(checkpoint, a=standin.at(manner)) as (world, web):
            text = expected(checkpoint, PROMPT * 3, 40)
            whole = (await web.post("/v1/completions", json=BODY)).json()
            assert whole["choices"][0]["text"] == text and whole["choices"][0]["finish_reason"] == "length"
            assert whole["usage"]["completion_tokens"] == 40 and whole["usage"]["prompt_tokens"] == 27
            assert whole["shoal"] == {"exact": False, "replicas": ["a (engine)"], "resumed": 0}
            assert whole["system_fingerprint"] == "shoal-inexact"
            pieces = await events(web, "/v1/completions", {**BODY, "stream": True})
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == text and len(pieces) > 20
            assert [piece["shoal"]["exact"] for piece in pieces if "shoal" in piece] == [False]
            assert "shoal" in pieces[-1] and pieces[-1]["choices"][0]["finish_reason"] == "length"
            stop = text[20:23]
            cut = (await web.post("/v1/completions", json={**BODY, "stop": stop})).json()["choices"][0]
            assert cut["text"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"
            held = world.service.rings[0].prefixes.held(ByteTokenizer().encode(PROMPT * 3 + text).tolist())
            assert held >= 64, "what was said is known to be there"

    play(scene)


def test_choices_have_seeds_of_their_own_that_follow_from_the_clients(checkpoint: Path, standin: Standin) -> None:
    async def scene() -> None:
        async with a_world(checkpoint, a=standin.at("ids")) as (_, web):
            chat = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "n": 3}
            asked = {**chat, "seed": 77, "temperature": 0.9, "frequency_penalty": 0.5}
            first, again = [(await web.post("/v1/chat/completions", json=asked)).json() for _ in range(2)]
            texts = [choice["message"]["content"] for choice in first["choices"]]
            assert texts == [choice["message"]["content"] for choice in again["choices"]] and len(set(texts)) == 3
            seen = standin.noted(event="request", max_tokens=9)
            assert {one["temperature"] for one in seen} == {0.9} and {one["frequency_penalty"] for one in seen} == {0.5}
            seeds = [one["seed"] for one in seen]
            assert 77 in seeds and len(set(seeds)) == 3 and sorted(seeds[:3]) == sorted(seeds[3:])

    play(scene)


def test_logprobs_are_refused_where_nobody_says_them(checkpoint: Path, standin: Standin) -> None:
    async def scene() -> None:
        async with a_world(checkpoint, a=standin.at("ids")) as (world, web):
            answer = await web.post("/v1/completions", json={**BODY, "logprobs": 1})
            assert answer.status_code == 400 and "no logprobs" in answer.json()["error"]["message"]
            own = LocalServer(ServeOptions(checkpoint, "small"), CLOCK, SystemDice())
            await own.start()
            assert own.service is not None
            world.service.rings += own.service.rings
            said = (await web.post("/v1/completions", json={**BODY, "logprobs": 1})).json()
            assert said["shoal"]["replicas"] == ["this machine"] and said["shoal"]["exact"] is True
            assert len(said["choices"][0]["logprobs"]["tokens"]) == 40
            await own.stop()

    play(scene)


def test_an_offer_with_nobody_behind_it_holds_up_no_other(checkpoint: Path, standin: Standin) -> None:
    """A machine that takes connections and says nothing, as one that hangs does."""

    async def scene() -> None:
        async with a_world(checkpoint, a=standin.at("ids")) as (world, _):
            silent = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
            real = world.find
            dead = KeyPair.generate()

            async def find(wanted: OfferFind) -> list[FoundOffer]:
                found = await real(wanted)
                port = silent.sockets[0].getsockname()[1]
                offer = structs.replace(found[0].offer, name="dead", addresses=(f"tcp://127.0.0.1:{port}",))
                return [FoundOffer(dead.node_id, offer, sign(dead, offer)), *found]

            world.find = find  # type: ignore[method-assign]
            await world.finder.look()
            assert dead.node_id in world.finder._meetings.under_way
            await world.node("b", standin.at("ids"))
            await world.finder.look()
            assert {one.name for one in world.service.rings} == {"a (engine)", "b (engine)"}
            assert dead.node_id in world.finder._meetings.under_way, "it is still waited for"
            await world.finder.close()
            silent.close()

    play(scene)


# --- receipts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", ["ids", "plain", "text"])
def test_a_node_signs_what_its_engine_did(checkpoint: Path, standin: Standin, manner: str, tmp_path: Path) -> None:
    async def scene() -> None:
        books = Books(tmp_path / "books", print)
        async with a_world(checkpoint, books=books, a=standin.at(manner)) as (world, web):
            await web.post("/v1/completions", json=BODY)
            stop = expected(checkpoint, PROMPT * 3, 40)[20:23]
            await web.post("/v1/completions", json={**BODY, "stop": stop})
            await until(lambda: world.service.counts.receipts == 2)
            (account,) = read_accounts(tmp_path / "books").nodes.values()
            assert (account.name, account.sessions, account.prompt_tokens) == ("a", 2, 2 * 27)
            assert 40 + 20 <= account.generated_tokens <= 40 + 39, "of what was left in the middle, what arrived"
            assert account.computed_positions == 2 * 27 + account.generated_tokens - 2
            assert account.layer_positions == 4 * account.computed_positions
            assert (account.disputed, account.missing) == (0, 0)
        books.close()

    play(scene)


def test_an_engines_node_that_claims_more_than_came_is_disputed(
    checkpoint: Path, standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Passed, "served", lambda passed, _: Served.continued(passed.positions, 1000, 27))

    async def scene() -> None:
        books = Books(tmp_path / "books", print)
        async with a_world(checkpoint, books=books, a=standin.at("ids")) as (world, web):
            await web.post("/v1/completions", json=BODY)
            await until(lambda: world.service.counts.receipts_disputed == 1)
            (disputed,) = read_accounts(tmp_path / "books").disputed
            assert disputed.reason == "It claims 1000 generated tokens, and 40 went through."
        books.close()

    play(scene)


def test_an_engines_node_that_dies_in_the_middle_has_no_receipt(
    checkpoint: Path, standin: Standin, tmp_path: Path
) -> None:
    async def scene() -> None:
        books = Books(tmp_path / "books", print)
        async with a_world(checkpoint, books=books, a=standin.at("ids"), b=standin.at("ids")) as (world, web):
            pieces = 0
            async with web.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    pieces += line.startswith("data:")
                    if pieces == 5:
                        await world.hosts["a"][1].close()
            await until(lambda: (world.service.counts.receipts, world.service.counts.receipts_missing) == (1, 1))
            by_name = {one.name: one for one in read_accounts(tmp_path / "books").nodes.values()}
            assert by_name["a"].missing == 1 and 0 < by_name["b"].generated_tokens < 40
        books.close()

    play(scene)


def test_a_receipt_is_given_once_and_to_its_gateway_alone(checkpoint: Path, standin: Standin) -> None:
    async def scene() -> None:
        async with a_world(checkpoint, a=standin.at("ids")) as (world, _):
            key, endpoint, host = world.hosts["a"]
            link = await world.endpoint.dial(key.node_id, endpoint.addresses)
            session = EngineSession(job=bytes(32), ring=bytes(16), session=7, layers=4, positions=2)
            ask = EngineAsk(model="small", tokens=(65, 66), tokens_max=3, session=session)
            async with link.stream(ask.KIND, encode(ask), max_bytes=1 << 20) as parts:
                async for _part in parts:
                    pass
            end = EngineEnd(ring=bytes(16), session=7, generated=3)
            stranger = TlsEndpoint(KeyPair.generate())
            theirs = await stranger.dial(key.node_id, endpoint.addresses)
            told = [
                decode(StageForgotten, await one.request(end.KIND, encode(end))).receipt for one in (theirs, link, link)
            ]
            assert not told[0] and told[1] and not told[2] and not host._passed
            await stranger.close()

    play(scene)


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stream_that_breaks_goes_on_elsewhere(
    checkpoint: Path, standin: Standin, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.openai_server.NEXT_S", 1.0)

    async def scene() -> None:
        async with a_world(checkpoint, bad=standin.at(fault), good=standin.at("ids")) as (world, web):
            said, chunks = "", await events(web, "/v1/completions", {**BODY, "stream": True})
            for chunk in chunks:
                said += chunk["choices"][0]["text"]
            assert said == expected(checkpoint, PROMPT * 3, 40)
            assert chunks[-1]["shoal"] == {
                "exact": False,
                "replicas": ["bad (engine)", "good (engine)"],
                "resumed": 1,
            }
            assert world.service.counts.resumed == 1
            resumed = standin.noted(manner="ids", event="request")[-1]
            assert resumed["prompt"] == 27 + FAULT_AT + (fault == "strange-ids")
            assert resumed["max_tokens"] == 40 - FAULT_AT - (fault == "strange-ids")
            assert [one.name for one in world.service.rings] == ["good (engine)"], "nobody is sent there again soon"
            await world.finder.look()
            assert len(world.service.rings) == 1
            world.sequence += 1  # its node says something new
            await world.finder.look()
            assert len(world.service.rings) == 2

    play(scene)


@pytest.mark.parametrize("fault", ["error", "early"])
def test_where_there_is_nobody_else_the_client_is_told(checkpoint: Path, standin: Standin, fault: str) -> None:
    async def scene() -> None:
        async with a_world(checkpoint, bad=standin.at(fault)) as (world, web):
            answer = await web.post("/v1/completions", json=BODY)
            error = answer.json()["error"]
            assert answer.status_code == 503 and error["type"] == "server_error" and error["code"] == "SH-576"
            assert "No replica is left to go on with: bad (engine): " in error["message"]
            assert ("CUDA error: out of memory" if fault == "error" else "hung up in the middle") in error["message"]
            assert (await web.post("/v1/completions", json=BODY)).status_code == 503
            world.sequence += 1
            await world.finder.look()
            streamed: list[str] = []
            async with web.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
                streamed += [line async for line in response.aiter_lines() if line]
            assert json.loads(streamed[-1].removeprefix("data: "))["error"]["code"] == "SH-576"
            assert len(streamed) > FAULT_AT / 2, "what was said before is not taken back"

    play(scene)


@pytest.mark.parametrize("position", [1, 4, 9])
def test_a_server_that_is_killed(checkpoint: Path, standin: Standin, tmp_path: Path, position: int) -> None:
    """Its stream goes on at a second engine, and when that is killed, too, at a ring of our own; text is never taken
    back, and is the same as from one that nobody killed: all three compute in float32."""

    async def scene() -> None:
        doomed = [Standin(checkpoint, tmp_path / name) for name in ("one", "two")]
        own = LocalServer(ServeOptions(checkpoint, "small"), CLOCK, SystemDice())
        await own.start()
        try:
            urls = {"one": doomed[0].at("stall"), "two": doomed[1].at("stall")}
            async with a_world(checkpoint, **urls) as (world, web):
                assert own.service is not None
                world.service.rings += own.service.rings
                world.prefer("one", "two")
                said, killed, last = "", 0, {}
                async with web.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        last = json.loads(line.removeprefix("data: "))
                        said += last["choices"][0]["text"]
                        if killed < 2 and len(said) >= killed * FAULT_AT + position:
                            doomed[killed].kill()
                            killed += 1
                assert said == expected(checkpoint, PROMPT * 3, 40) and killed == 2
                assert last["shoal"] == {
                    "exact": False,
                    "replicas": ["one (engine)", "two (engine)", "this machine"],
                    "resumed": 2,
                }
                hosts = [world.hosts[name][2] for name in urls]
                await until(lambda: all(host.offer is None for host in hosts))
                await world.finder.look()
                assert [one.name for one in world.service.rings] == ["this machine"]
        finally:
            await own.stop()
            for one in doomed:
                one.close()

    play(scene)


@pytest.mark.parametrize("how", ["hangs up", "has what it wants"])
def test_a_client_that_leaves_is_passed_on_to_the_server(checkpoint: Path, standin: Standin, how: str) -> None:
    async def scene() -> None:
        async with a_world(checkpoint, a=standin.at("stall")) as (world, web):
            before = len(standin.noted(manner="stall", event="hung up"))
            body = {**BODY, "stream": True, "max_tokens": 300}
            if how == "hangs up":
                async with web.stream("POST", "/v1/completions", json=body) as response:
                    async for _ in response.aiter_lines():
                        break
            else:
                stop = expected(checkpoint, PROMPT * 3, FAULT_AT)[-2:]
                await web.post("/v1/completions", json={**BODY, "stop": stop})
            await until(lambda: len(standin.noted(manner="stall", event="hung up")) > before)
            host = world.hosts["a"][2]
            await until(lambda: not host._under_way and world.service.admission.used == 0)

    play(scene)


def test_a_node_whose_server_is_silent_is_not_silent(checkpoint: Path, standin: Standin) -> None:
    """Longer than a gateway waits for a node: a dead link and a slow server are told apart."""

    async def scene() -> None:
        async with a_world(checkpoint, a=standin.at("stall")) as (world, web):
            replica = world.service.rings[0]
            assert isinstance(replica, EngineReplica)
            async with web.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
                await until(lambda: standin.noted(manner="stall", event="stalled"))
                began = CLOCK.monotonic()
                await until(lambda: CLOCK.monotonic() - began > 0.3 or replica.reason)
                assert not replica.reason
                del response

    original = ("shoal.node.engine.STILL_HERE_S", "shoal.gateway.engines.SILENCE_S")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original[0], 0.02)
        patch.setattr(original[1], 0.2)
        play(scene)


def test_a_node_that_falls_silent_is_given_up(checkpoint: Path, standin: Standin) -> None:
    async def scene() -> None:
        async with a_world(checkpoint, a=standin.at("stall"), b=standin.at("ids")) as (_, web):
            answer = (await web.post("/v1/completions", json=BODY)).json()
            assert answer["choices"][0]["text"] == expected(checkpoint, PROMPT * 3, 40)
            assert answer["shoal"]["replicas"] == ["a (engine)", "b (engine)"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.node.engine.STILL_HERE_S", 60.0)
        patch.setattr("shoal.gateway.engines.SILENCE_S", 0.5)
        play(scene)


def test_a_node_refuses_what_its_engine_does_not_do(
    checkpoint: Path, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        world = World(checkpoint)
        host = await world.node("a", standin.at("stall"))
        _, endpoint, _ = world.hosts["a"]
        link = await world.endpoint.dial(endpoint.node_id, endpoint.addresses)

        async def ask(**what: Any) -> list[EnginePiece]:
            body = encode(EngineAsk(tokens_max=30, **what))
            reader = PieceReader(link.version)
            async with link.stream(EngineAsk.KIND, body, max_bytes=1 << 20) as parts:
                async for part in parts:
                    return reader.feed(part)
            return []

        for what in (
            {"model": "other", "tokens": (1,)},
            {"model": "small"},
            {"model": "small", "tokens": (1,), "text": "x"},
        ):
            with pytest.raises(Refused) as refused:
                await ask(**what)
            assert refused.value.remote_code == "SH-273"
        monkeypatch.setattr("shoal.node.engine.STREAMS_OF_ONE", 1)
        body = encode(EngineAsk(model="small", tokens=(65, 66), tokens_max=30))
        async with link.stream(EngineAsk.KIND, body, max_bytes=1 << 20) as parts:
            await anext(parts)
            with pytest.raises(Refused, match="1 continuations under way") as refused:
                await ask(model="small", tokens=(65,))
            assert refused.value.remote_code == "SH-274"
        await until(lambda: not host._under_way)
        await world.close()

    play(scene)


# --- all of it ---------------------------------------------------------------------------------------------------


def a_serve(checkpoint: Path, place: str = "127.0.0.1:0") -> tuple[subprocess.Popen[str], str]:
    """`shoal serve --here` as a process: a real OpenAI-compatible server."""
    words = [sys.executable, "-m", "shoal", "serve", str(checkpoint), "--name", "org/small", "--http", place]
    process = subprocess.Popen([*words, "--threads", "1", "--here", "--json"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


@contextlib.asynccontextmanager
async def a_gateway(
    model: Path, shoal: LocalShoal, **options: Any
) -> AsyncIterator[tuple[ModelService, httpx.AsyncClient]]:
    tickets = [HubTicket.parse(text) for text in shoal.hub_tickets]
    server = NodesServer(ServeOptions(model, "small", hubs=tickets, **options), CLOCK, SystemDice())
    try:
        async with httpx.AsyncClient(base_url=await server.start(), timeout=GENEROUS_S) as web:
            assert server.service is not None
            yield server.service, web
    finally:
        await server.stop()


def test_a_shoal_with_engines(checkpoint: Path, tmp_path: Path) -> None:
    """Hub, nodes, servers and gateways as they are: one that holds no weights, whose server is killed and comes back;
    and one that has a ring besides, which takes over."""

    async def without_weights(shoal: LocalShoal, server: subprocess.Popen[str], url: str) -> None:
        folder = tmp_path / "no-weights"
        folder.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((checkpoint / name).read_bytes())
        async with a_gateway(folder, shoal, engine_model="org/small", engines_only=True) as (service, web):
            await until(lambda: service.rings)
            answer = (await web.post("/v1/completions", json=BODY)).json()
            assert answer["choices"][0]["text"] == expected(checkpoint, PROMPT * 3, 40)
            assert answer["shoal"]["replicas"] == ["a (engine)"]
            (replica,) = service.rings
            assert isinstance(replica, EngineReplica) and replica.engine.gives_tokens
            server.kill()
            server.wait()
            await until(lambda: not service.rings)
            assert (await web.post("/v1/completions", json=BODY)).status_code == 503
            assert (await web.get("/healthz")).status_code == 503
            again, _ = a_serve(checkpoint, url.removeprefix("http://").removesuffix("/v1"))
            try:
                await until(lambda: service.rings)
                answer = (await web.post("/v1/completions", json=BODY)).json()
                assert answer["choices"][0]["text"] == expected(checkpoint, PROMPT * 3, 40)
            finally:
                again.kill()
                again.wait()

    async def with_a_ring(shoal: LocalShoal, standin: Standin) -> None:
        async with a_gateway(checkpoint, shoal) as (service, web):
            await until(lambda: len(service.rings) == 2)
            assert sorted(one.name for one in service.rings) == ["b", "b (engine)"]
            for one in service.rings:
                one.token_ms = 1e-3 if isinstance(one, EngineReplica) else 1.0
            said, last = "", {}
            async with web.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        last = json.loads(line.removeprefix("data: "))
                        said += last["choices"][0]["text"]
                        if len(said) == FAULT_AT:
                            standin.kill()
            assert said == expected(checkpoint, PROMPT * 3, 40)
            assert last["shoal"] == {"exact": False, "replicas": ["b (engine)", "b"], "resumed": 1}
            answer = (await web.post("/v1/completions", json=BODY)).json()
            assert answer["shoal"] == {"exact": True, "replicas": ["b"], "resumed": 0}

    async def scene() -> None:
        (server, url), spare = a_serve(checkpoint), Standin(checkpoint, tmp_path / "log")
        try:
            async with a_shoal(tmp_path / "shoal") as shoal:
                options = ("--threads", "1", "--engine-only", "--engine-model")
                nodes = await asyncio.gather(
                    shoal.start_node("a", options=(*options, "org/small", "--engine", url)),
                    shoal.start_node("b", options=("--threads", "1", "--engine", spare.at("stall"))),
                )
                assert [node.ready["engine"].split(",")[0] for node in nodes] == ["org/small", "small"]
                words = [sys.executable, "-m", "shoal", "offers", "--hub", shoal.hub_tickets[0]]
                offers = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=True)
                assert "engine" in offers.stdout and "org/small" in offers.stdout
                await without_weights(shoal, server, url)
                await with_a_ring(shoal, spare)
        finally:
            server.kill()
            server.wait()
            spare.close()

    play(scene)
