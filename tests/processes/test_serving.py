"""A model on the nodes of a shoal: hub, nodes and gateway as they are, over loopback; some nodes are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from test_gateway import PROMPT, expected
from test_stages import a_checkpoint

from shoal.models.tokenizers import ByteTokenizer
from shoal.protocol.hubs import HubTicket
from shoal.sdk.local import LocalShoal
from shoal.sdk.serve import NodesServer, ServeOptions
from shoal.world import SystemClock, SystemDice

GENEROUS_S = 200.0
BODY = {"model": "small", "prompt": PROMPT * 3, "max_tokens": 40, "temperature": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_checkpoint(tmp_path_factory.mktemp("served") / "model", "llama", vocab_size=257, eos_token_id=256)
    ByteTokenizer().save(folder)
    return folder


@contextlib.asynccontextmanager
async def a_shoal(folder: Path, *names: str) -> AsyncIterator[LocalShoal]:
    async with LocalShoal(folder) as shoal:
        await shoal.start_hub()
        await asyncio.gather(*(shoal.start_node(name, options=("--threads", "1")) for name in names))
        yield shoal


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def a_gateway(
    shoal: LocalShoal, checkpoint: Path, said: list[str], **options: Any
) -> AsyncIterator[tuple[NodesServer, httpx.AsyncClient]]:
    tickets = [HubTicket.parse(text) for text in shoal.hub_tickets]
    server = NodesServer(
        ServeOptions(checkpoint, "small", hubs=tickets, say=said.append, **options), SystemClock(), SystemDice()
    )
    url = await server.start()
    try:
        async with httpx.AsyncClient(base_url=url, timeout=GENEROUS_S) as web:
            yield server, web
    finally:
        await server.stop()


def test_replicas_on_nodes_and_a_stream_that_outlives_one(checkpoint: Path, tmp_path: Path) -> None:
    async def scene() -> None:
        said: list[str] = []
        async with a_shoal(tmp_path, "a", "b") as shoal, a_gateway(shoal, checkpoint, said) as (server, web):
            service = server.service
            assert service is not None
            await until(lambda: len(service.rings) == 2)
            assert sorted(ring.name for ring in service.rings) == ["a", "b"], "a whole replica on each"
            text = expected(checkpoint, PROMPT * 3, 40)
            assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text
            got, doomed = "", None
            long = BODY | {"stream": True, "max_tokens": 400}
            async with web.stream("POST", "/v1/completions", json=long) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        got += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                        if doomed is None:
                            (doomed,) = [ring.name for ring in service.rings if ring.streams]
                            shoal.nodes[doomed].kill()
            assert got == expected(checkpoint, PROMPT * 3, 400)
            assert service.counts.resumed == 1
            await until(lambda: len(service.rings) == 1)
            await shoal.start_node("c", options=("--threads", "1"))
            await until(lambda: len(service.rings) == 2)
            assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_ring_where_no_node_can_hold_the_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes' memory is made to seem small; the ring is theirs, and is mended by one that comes later."""

    async def scene() -> None:
        said: list[str] = []
        async with a_shoal(tmp_path, "a", "b", "c") as shoal, a_gateway(shoal, checkpoint, said) as (server, web):
            service = server.service
            assert service is not None
            await until(lambda: len(service.rings) == 1)
            assert any("a ring of 3 stages" in sentence for sentence in said)
            text = expected(checkpoint, PROMPT * 3, 40)
            bodies = [BODY | {"n": 1}] * 4
            answers = await asyncio.gather(*(web.post("/v1/completions", json=body) for body in bodies))
            assert [answer.json()["choices"][0]["text"] for answer in answers] == [text] * 4
            shoal.nodes["b"].kill()
            await until(lambda: not service.rings)
            answer = await web.post("/v1/completions", json=BODY)
            assert answer.status_code == 503 and "No node serves" in answer.json()["error"]["message"]
            await shoal.start_node("d", options=("--threads", "1"))
            await until(lambda: service.rings)
            assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text
            assert any("1 replica goes on" in sentence or "to load" in sentence for sentence in said)

    one_layer = 3 << 20  # and the cache that goes with it
    monkeypatch.setattr("shoal.gateway.scouting.CPU_SHARE", one_layer / psutil.virtual_memory().total)
    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))
