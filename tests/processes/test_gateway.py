"""The endpoint, over HTTP: what a client gets, what it is refused, and that it goes on when a replica dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stages import a_checkpoint
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from shoal.gateway import service as serving
from shoal.gateway import web as face
from shoal.gateway.rings import LocalRing
from shoal.gateway.service import LONG_TEXT, ModelService
from shoal.models.configs import BadModel
from shoal.models.pooling import Pooling
from shoal.models.tokenizers import ByteTokenizer
from shoal.sdk.serve import LocalServer, ServeOptions
from shoal.transport import http
from shoal.world import Clock, SystemClock, SystemDice

GENEROUS_S = 120.0
PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_checkpoint(tmp_path_factory.mktemp("served") / "model", "llama", vocab_size=257, eos_token_id=256)
    ByteTokenizer().save(folder)
    return folder


def expected(folder: Path, prompt: str, count: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = ByteTokenizer().encode(prompt).tolist()
    with torch.no_grad():
        said = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ByteTokenizer().decode(said[0, len(ids) :].tolist())


def with_endpoint(
    checkpoint: Path, scene: Callable[[httpx.AsyncClient, LocalServer], Awaitable[None]], **options: Any
) -> None:
    async def life() -> None:
        server = LocalServer(ServeOptions(checkpoint, "small", **options), SystemClock(), SystemDice())
        url = await server.start()
        try:
            async with httpx.AsyncClient(base_url=url, timeout=GENEROUS_S) as web:
                await scene(web, server)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(life(), GENEROUS_S))


async def events(web: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    async with web.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line:
                assert line.startswith("data: ")
                found.append(line.removeprefix("data: "))
    assert found[-1] == "[DONE]"
    return [json.loads(one) for one in found[:-1]]


def test_completions_are_those_of_transformers(checkpoint: Path) -> None:
    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        assert (await web.get("/v1/models")).json()["data"][0]["id"] == "small"
        assert (await web.get("/v1/models/small")).json()["object"] == "model"
        assert (await web.get("/healthz")).json()["status"] == "ok"
        said = expected(checkpoint, PROMPT, 24)
        body = {"model": "small", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        whole = (await web.post("/v1/completions", json=body)).json()
        assert whole["choices"][0]["text"] == said
        assert whole["usage"] == {
            "prompt_tokens": len(PROMPT),
            "completion_tokens": 24,
            "total_tokens": len(PROMPT) + 24,
        }
        pieces = await events(
            web, "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
        )
        assert "".join(choice["text"] for piece in pieces for choice in piece["choices"]) == said
        assert pieces[-1]["usage"]["completion_tokens"] == 24 and pieces[-1]["choices"] == []
        stop = said[10:12]
        cut = (await web.post("/v1/completions", json={**body, "stop": [stop]})).json()["choices"][0]
        assert cut["text"] == said[: said.index(stop)] and cut["finish_reason"] == "stop"
        chat = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "seed": 4, "n": 3}
        first, again = [(await web.post("/v1/chat/completions", json=chat)).json() for _ in range(2)]
        texts = [choice["message"]["content"] for choice in first["choices"]]
        assert texts == [choice["message"]["content"] for choice in again["choices"]] and len(set(texts)) == 3
        told = {**chat, "n": 1, "logprobs": True, "top_logprobs": 2}
        content = (await web.post("/v1/chat/completions", json=told)).json()["choices"][0]["logprobs"]["content"]
        assert len(content) == 9 and all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in content)
        figures = await web.get("/metrics")
        assert "shoal_tokens_total" in figures.text and figures.headers["content-type"].count("charset") == 1

    with_endpoint(checkpoint, scene)


ASKS = {"model": "small", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("body", "status", "param", "part"),
    [
        (b"{", 400, None, "not JSON"),
        (b"\xff\xfe", 400, None, "not JSON"),
        (b"[" * 100_000, 400, None, "Expected"),
        ({"messages": 0}, 400, "messages", "Expected"),
        ({"model": "other"}, 404, "model", "does not exist"),
        ({"messages": []}, 400, "messages", "length >= 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", "king"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "Shorten it"),
        ({"temperature": -1}, 400, "temperature", ">= 0"),
        ({"max_tokens": -5}, 400, "max_tokens", ">= 1"),
        ({"max_tokens": 5000}, 400, "messages", "context is 512"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_tokens", "not both"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not offered"),
        ({"wish": 1}, 400, "wish", "Unrecognized"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs"),
    ],
)
def test_what_cannot_be_served_is_refused_in_openais_shape(
    endpoint: httpx.Client, body: bytes | dict[str, Any], status: int, param: str | None, part: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(ASKS | body).encode()
    answer = endpoint.post("/v1/chat/completions", content=content)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert part in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/v1/models/small", "/metrics"])
def test_a_head_is_a_get_without_its_body(endpoint: httpx.Client, path: str) -> None:
    got, head = endpoint.get(path), endpoint.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert endpoint.head("/v1/models/other").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("POST", "/chat/completions", 404), ("GET", "/v1/" + "x" * 5000, 404),
     ("GET", "/v1/completions", 405), ("PUT", "/healthz", 405)],
)  # fmt: skip
def test_a_path_that_there_is_not_is_told_which_there_are(
    endpoint: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = endpoint.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", None)
    assert f"There is no {method} {path[:40]}" in error["message"] and len(error["message"]) < 500
    for one in ("POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models/NAME", "GET /healthz"):
        assert one in error["message"]
    assert ("POST" in answer.headers.get("allow", "")) == (path == "/v1/completions")


@contextlib.contextmanager
def a_served(checkpoint: Path, clock: Clock | None = None, **options: Any) -> Iterator[str]:
    """An endpoint in a thread of its own: its URL."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = LocalServer(ServeOptions(checkpoint, "small", **options), clock or SystemClock(), SystemDice())
    try:
        yield asyncio.run_coroutine_threadsafe(server.start(), loop).result(GENEROUS_S)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(GENEROUS_S)
        loop.call_soon_threadsafe(loop.stop)


@pytest.fixture(scope="module")
def endpoint(checkpoint: Path) -> Iterator[httpx.Client]:
    with a_served(checkpoint) as url, httpx.Client(base_url=url, timeout=GENEROUS_S) as web:
        yield web


def test_prompts_of_completions(endpoint: httpx.Client) -> None:
    ids = ByteTokenizer().encode(PROMPT).tolist()
    body = {"model": "small", "max_tokens": 4, "temperature": 0}
    (text,) = endpoint.post("/v1/completions", json=body | {"prompt": PROMPT}).json()["choices"]
    for prompt, count in (([PROMPT], 1), (ids, 1), ([ids, ids], 2), ([PROMPT, "x"], 2)):
        choices = endpoint.post("/v1/completions", json=body | {"prompt": prompt}).json()["choices"]
        assert len(choices) == count and choices[0]["text"] == text["text"]
    for prompt in ([], [300], [-1], [[]], [["x"]], [1, "x"], [PROMPT, 5], "", 7, ["x"] * 65, [[True]]):
        answer = endpoint.post("/v1/completions", json=body | {"prompt": prompt})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt", (prompt, answer.text)


@pytest.mark.parametrize(
    ("content", "size"), [(b" " * (10 << 20), "has 10485760"), ([b" " * (3 << 20)], "has more than 2097152")]
)
def test_a_body_that_is_too_large_is_not_read(endpoint: httpx.Client, content: bytes | list[bytes], size: str) -> None:
    """Its size is said beforehand, or it comes in chunks."""
    answer = endpoint.post("/v1/chat/completions", content=content)
    assert answer.status_code == 413
    assert f"{size} bytes; the limit is 2097152" in answer.json()["error"]["message"]


def test_keys_are_asked_for(checkpoint: Path) -> None:
    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        assert (await web.get("/healthz")).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            answer = await web.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert (await web.get("/v1/models", headers={"authorization": "Bearer secret"})).status_code == 200

    with_endpoint(checkpoint, scene, keys=("other", "secret"))


def test_a_hostile_chat_template_costs_the_request_that_it_is_rendered_for(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (folder / "chat_template.jinja").write_text("{% if messages[0].content == 'evil' %}" + endless + "{% endif %}x")

    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        assert server.service is not None

        async def chat(text: str) -> httpx.Response:
            asked = {"model": "small", "max_tokens": 2, "messages": [{"role": "user", "content": text}]}
            return await web.post("/v1/chat/completions", json=asked)

        async def is_rendered(text: str) -> asyncio.Task[httpx.Response]:
            asked = asyncio.create_task(chat(text))
            while not server.service.template._turn.locked():
                await asyncio.sleep(0)
            return asked

        assert (await chat("good")).status_code == 200
        evil = await is_rendered("evil")
        waits = asyncio.create_task(chat("good"))
        assert (await web.get("/healthz")).status_code == 200
        body = {"model": "small", "prompt": PROMPT, "max_tokens": 2}
        assert (await web.post("/v1/completions", json=body)).status_code == 200
        assert not evil.done() and not waits.done()
        error = (refused := await evil).json()["error"]
        assert (refused.status_code, error["param"], error["type"]) == (400, "messages", "invalid_request_error")
        assert error["message"] == "The model's chat template takes longer than 5 s for these messages and was stopped."
        assert (await waits).status_code == 200

        (await is_rendered("evil")).cancel()  # the client hangs up
        assert (await chat("good")).status_code == 200

    with_endpoint(folder, scene)


def test_a_client_that_hangs_up_frees_its_session_at_once(checkpoint: Path) -> None:
    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        service = server.service
        assert service is not None
        endless = {"max_tokens": 500, "temperature": 1, "logit_bias": {"256": -100}}  # it draws no end by chance
        body = {"model": "small", "prompt": PROMPT, "stream": True, **endless}
        async with web.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                break
            assert service.admission.used > 0
        while service.admission.used or service.counts.running:
            await asyncio.sleep(0.001)

    with_endpoint(checkpoint, scene)


@pytest.mark.parametrize(("path", "param"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_a_long_text_that_is_made_tokens_holds_up_nobody(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, path: str, param: str
) -> None:
    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        service = server.service
        assert service is not None
        begun, go_on = threading.Event(), threading.Event()
        encode = service.tokenizer.encode

        def slowly(text: str, **options: Any) -> Any:
            if len(text) > LONG_TEXT:
                begun.set()
                assert go_on.wait(GENEROUS_S)
            return encode(text, **options)

        monkeypatch.setattr(service.tokenizer, "encode", slowly)
        monkeypatch.setattr(service, "pooling", Pooling("mean", 32, False))
        asked = {"model": "small", param: "x" * (LONG_TEXT + 1)}
        asking = asyncio.create_task(web.post(path, json=asked))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        assert (await web.get("/healthz")).status_code == 200
        assert not asking.done()
        go_on.set()
        assert (await asking).status_code == 400  # it is longer than the context

    with_endpoint(checkpoint, scene)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_before_it_is_answered_frees_what_it_had(checkpoint: Path, stream: bool) -> None:
    """A whole answer under way, and a request behind it that waits for memory."""

    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        service = server.service
        assert service is not None
        service.admission.positions = 512
        body = {"model": "small", "prompt": PROMPT, "max_tokens": 500, "temperature": 1, "logit_bias": {"256": -100}}
        first = asyncio.create_task(web.post("/v1/completions", json=body))
        while not service.counts.tokens:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(web.post("/v1/completions", json=body | {"stream": stream}))
        while not service.admission.waiting:
            await asyncio.sleep(0.001)
        second.cancel()
        while service.admission.waiting:
            await asyncio.sleep(0.001)
        assert service.counts.running == 1
        first.cancel()
        while service.admission.used or service.counts.running:
            await asyncio.sleep(0.001)
        assert service.counts.tokens < 500

    with_endpoint(checkpoint, scene)


@pytest.mark.parametrize("stays", [False, True])
def test_a_client_that_reads_nothing_of_a_long_stream(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """All buffers are full, and then it hangs up, or never does."""
    if stays:
        if not hasattr(socket, "TCP_USER_TIMEOUT"):
            pytest.skip("this system closes no such connection")
        monkeypatch.setattr(http, "TAKEN_MS_MAX", 500)
    wanted = {"max_tokens": 480, "n": 16, "stream": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(ASKS | wanted | {"logit_bias": {"256": -100}}).encode()

    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        service = server.service
        assert service is not None
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(client.connect, (web.base_url.host, web.base_url.port))
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        client.sendall(f"content-length: {len(body)}\r\n\r\n".encode() + body)
        before = -1
        while not 0 < service.counts.tokens == before:
            before = service.counts.tokens
            await asyncio.sleep(0.3)
        assert 0 < service.counts.tokens < 16 * 480
        if not stays:
            client.close()
        while service.admission.used or service.counts.running:
            await asyncio.sleep(0.001)
        client.close()

    with_endpoint(checkpoint, scene)


def test_a_body_that_does_not_come_is_not_waited_for(endpoint: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "BODY_S_MAX", 0.05)
    with socket.create_connection((endpoint.base_url.host, endpoint.base_url.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        answer = client.makefile("rb").read()  # until the connection is closed
    assert answer.startswith(b"HTTP/1.1 408") and b"did not come within" in answer


@pytest.mark.parametrize("chunks", [b"zz\r\n{}\r\n0\r\n\r\n", b"2\r\n{}", b"-2\r\n{}\r\n"])
def test_a_body_whose_chunks_are_malformed_is_refused(endpoint: httpx.Client, chunks: bytes) -> None:
    with socket.create_connection((endpoint.base_url.host, endpoint.base_url.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)
        client.shutdown(socket.SHUT_WR)
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400") and b"did not come whole" in answer, answer


def test_what_is_under_way_when_the_endpoint_stops_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream, a whole answer, one that waits for memory, and one that comes while the others may still end."""
    monkeypatch.setattr(serving, "STOP_S", 1.0)
    long = a_checkpoint(tmp_path / "long", "llama", vocab_size=257, eos_token_id=256, max_position_embeddings=1 << 18)
    said: list[str] = []

    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        service = server.service
        assert service is not None
        service.admission.positions = 2 * (len(PROMPT) + (1 << 17))
        body = {"model": "small", "prompt": PROMPT, "max_tokens": 1 << 17, "logit_bias": {"256": -100}}
        whole = asyncio.create_task(web.post("/v1/completions", json=body))
        while not service.admission.used:
            await asyncio.sleep(0.001)
        async with web.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            lines = stream.aiter_lines()
            assert "error" not in await anext(lines)
            waits = asyncio.create_task(web.post("/v1/completions", json=body | {"stream": True}))
            while not service.admission.waiting:
                await asyncio.sleep(0.001)
            stopping = asyncio.create_task(server.stop())
            while not service.stopping:
                await asyncio.sleep(0.001)
            late, health = await web.post("/v1/completions", json=body), await web.get("/healthz")
            said.extend([line async for line in lines if line])
        await stopping
        for answer in (await whole, await waits, late, health):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "10", answer.text
            assert "The endpoint is stopping" in answer.json()["error"]["message"]
        assert not service.admission.used and not service.counts.running

    with_endpoint(long, scene)
    last = json.loads(said[-1].removeprefix("data: "))["error"]
    assert (last["type"], last["code"]) == ("server_error", "SH-578") and "is stopping" in last["message"]


def test_who_asks_for_more_than_there_is_room_for_need_not_ask_again(checkpoint: Path) -> None:
    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        assert server.service is not None
        server.service.admission.positions = 600
        body = {"model": "small", "prompt": PROMPT, "n": 2, "max_tokens": 400}
        answer = await web.post("/v1/completions", json=body)
        assert answer.status_code == 429 and "ask for fewer tokens" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers

    with_endpoint(checkpoint, scene)


@contextlib.asynccontextmanager
async def a_doomed_replica(checkpoint: Path, service: ModelService) -> AsyncIterator[Callable[[int], None]]:
    """A second replica of two stages, which is chosen first; gives what kills one of them (SIGKILL)."""
    spare = LocalServer(ServeOptions(checkpoint, "small", cuts=(1,)), SystemClock(), SystemDice())
    await spare.start()
    assert spare.service is not None
    (doomed,) = spare.service.rings
    assert isinstance(doomed, LocalRing)
    doomed.token_ms = 0.001
    service.rings.insert(0, doomed)
    stages = list(spare._stages)
    try:
        yield lambda stage: os.kill(stages[stage].pid, signal.SIGKILL)
    finally:
        service.rings.remove(doomed)
        await spare.stop()


def test_a_stream_goes_on_when_its_replica_is_killed(checkpoint: Path) -> None:
    """At every position of a short text, greedy and drawn: two replicas, of which the one in use dies."""

    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        service = server.service
        assert service is not None
        for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 9}):
            body = {"model": "small", "prompt": PROMPT * 3, "max_tokens": 12, **sampling}
            undisturbed = (await web.post("/v1/completions", json=body)).json()["choices"][0]["text"]
            for position in range(12):
                async with a_doomed_replica(checkpoint, service) as kill:
                    said, pieces = "", 0
                    async with web.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                        async for line in response.aiter_lines():
                            if line.startswith("data: {"):
                                said += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                                pieces += 1
                                if pieces == position:
                                    kill(position % 2)
                    assert said == undisturbed, position
        assert service.counts.resumed > 0

    with_endpoint(checkpoint, scene)


DRAWN: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_p": 0.8, "seed": 4, "frequency_penalty": 0.5},
)


def test_layers_on_this_machine_are_loaded_again_when_their_process_dies(checkpoint: Path) -> None:
    """A stream goes on, and those that come later are served."""
    told: list[str] = []

    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        service = server.service
        assert service is not None
        body = {"model": "small", "prompt": PROMPT, "max_tokens": 400, "temperature": 0}
        stream = asyncio.create_task(web.post("/v1/completions", json=body))
        while not service.counts.tokens:
            await asyncio.sleep(0.001)
        os.kill(server._stages[0].pid, signal.SIGKILL)
        answer = (await stream).json()
        assert answer["choices"][0]["text"] == expected(checkpoint, PROMPT, 400)
        assert answer["shoal"]["resumed"] == 1 and service.replicas == 1 and len(server._stages) == 1
        assert any("was killed" in one and "are loaded again" in one for one in told)

    with_endpoint(checkpoint, scene, say=told.append)


def test_a_draft_model_changes_nothing_that_is_said(checkpoint: Path, tmp_path: Path) -> None:
    """One that is the model itself is nearly always right, one of other weights hardly ever; and one may die."""
    other = a_checkpoint(tmp_path / "other", "gpt2", vocab_size=257, eos_token_id=256)
    ByteTokenizer().save(other)
    plain: list[str] = []
    steps: dict[str, int] = {}

    async def said(web: httpx.AsyncClient) -> list[str]:
        texts = []
        for sampling in DRAWN:
            body = {"model": "small", "prompt": PROMPT * 3, "max_tokens": 40, **sampling}
            texts.append((await web.post("/v1/completions", json=body)).json()["choices"][0]["text"])
        return texts

    def scene_of(name: str, kill: bool = False) -> Callable[[httpx.AsyncClient, LocalServer], Awaitable[None]]:
        async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
            assert server.service is not None
            for ring in server.service.rings:
                ring.token_ms = 1000.0  # as if it were far away, so that guessing is worth while
            texts = await said(web)
            if name == "none":
                plain.extend(texts)
            assert texts == plain
            steps[name] = server.service.counts.steps
            if kill:
                assert server.service.draft is not None
                os.kill(server.service.draft.stage.pid, signal.SIGKILL)
                assert await said(web) == plain

        return scene

    with_endpoint(checkpoint, scene_of("none"), guess=False)
    with_endpoint(checkpoint, scene_of("itself", kill=True), draft=checkpoint)
    with_endpoint(checkpoint, scene_of("other"), draft=other)
    assert steps["none"] >= steps["other"] > 3 * steps["itself"]


def test_a_draft_with_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = a_checkpoint(tmp_path, "llama", vocab_size=300)
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.save(str(other / "tokenizer.json"))
    with pytest.raises(BadModel, match="reads texts as other tokens"):
        with_endpoint(checkpoint, lambda web, server: asyncio.sleep(0), draft=other)


def test_the_command_serves_a_run_and_ends_when_it_is_told_to(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "model").symlink_to(checkpoint)
    (tmp_path / "keys").write_text("# mine\nsecret\n")
    words = [
        sys.executable,
        "-m",
        "shoal",
        "serve",
        str(run),
        "--http",
        "127.0.0.1:0",
        "--threads",
        "1",
        "--here",
        "--json",
    ]
    with subprocess.Popen([*words, "--api-keys", str(tmp_path / "keys")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["model"] == "my-run" and ready["nodes"] is False and ready["context"] == 512
        body = {"model": "my-run", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        answer = httpx.post(f"{ready['url']}/completions", json=body, headers={"authorization": "Bearer secret"})
        assert answer.json()["choices"][0]["text"] == expected(checkpoint, PROMPT, 6)
        process.send_signal(signal.SIGINT)
        assert process.wait(GENEROUS_S) == 0


def test_a_second_ctrl_c_does_not_wait_for_streams(tmp_path: Path) -> None:
    long = a_checkpoint(tmp_path / "long", "llama", vocab_size=257, eos_token_id=256, max_position_embeddings=1 << 18)
    words = [sys.executable, "-m", "shoal", "serve", str(long), "--http", "127.0.0.1:0", "--here", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        url = json.loads(process.stdout.readline())["url"]
        body = {"model": "long", "prompt": PROMPT, "max_tokens": 1 << 17, "stream": True, "logit_bias": {"256": -100}}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=GENEROUS_S) as response:
            next(response.iter_lines())
            process.send_signal(signal.SIGINT)
            assert any("Ctrl-C again" in line for line in process.stderr)
            process.send_signal(signal.SIGINT)
            assert process.wait(GENEROUS_S) == -signal.SIGINT
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("made", "part"),
    [
        ("nothing", "is neither a checkpoint directory"),
        ("a pickle", "pytorch_model.bin is a pickle"),
        ("bert", "A bert model cannot be served; these families can:"),
        ("a missing tensor", "No file has the tensor 'model.norm.weight'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; from 1 to 4096 can be"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0; from 1"),
        ({"max_position_embeddings": -5}, "positions would be -5"),
        ({"max_position_embeddings": 10**15}, "may have 1000000000000000 positions; up to 16777216 can be"),
        ({"num_key_value_heads": -2}, "key_heads would be -2"),
        (
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": "x",
                }
            },
            "sizes make no llama model: invalid literal",
        ),
        ("a pipe", "generation_config.json is not a plain file"),
        ({"vocab_size": 300}, "holds no tokenizer; put its tokenizer.json there"),
        ("a template", "chat template cannot be read"),
        ("a deep template", "chat template cannot be read: maximum recursion"),
        ("an endless template", "chat template cannot be read: The engine of the chat template"),
        ("keys", "has 0 keys"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    checkpoint: Path, tmp_path: Path, made: str | dict[str, Any], part: str
) -> None:
    folder = tmp_path / "model"
    more: list[str] = []
    if made != "nothing":
        shutil.copytree(checkpoint, folder)
    if made == "a pipe":
        (folder / "generation_config.json").unlink()
        os.mkfifo(folder / "generation_config.json")
    elif isinstance(made, dict):
        (folder / "tokenizer.json").unlink()
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | made))
    elif made == "a pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif made == "bert":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif made == "a missing tensor":
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors")
    elif made == "a template":
        (folder / "chat_template.jinja").write_text("{% for %}")
    elif made == "a deep template":
        (folder / "chat_template.jinja").write_text("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}")
    elif made == "an endless template":
        (folder / "chat_template.jinja").write_text("{{ 9 ** (9 ** 9) }}")
    elif made == "keys":
        (tmp_path / "keys").write_text("")
        more = ["--api-keys", str(tmp_path / "keys")]
    words = [sys.executable, "-m", "shoal", "serve", str(folder), "--http", "127.0.0.1:0", "--here", *more]
    done = subprocess.run(words, capture_output=True, text=True, timeout=GENEROUS_S)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert part in " ".join(done.stderr.split()), done.stderr
