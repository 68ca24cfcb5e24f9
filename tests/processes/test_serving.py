"""A model on the nodes of a shoal: hub, nodes and gateway as they are, over loopback; some nodes are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hub_world import HubProcess
from test_gateway import PROMPT, expected
from test_ring import LARGE, allocated
from test_stages import a_checkpoint

from shoal.gateway.receipts import GatewayRunning
from shoal.identity import load_key
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
        data = tmp_path / "gateway"
        async with a_shoal(tmp_path, "a", "b") as shoal, a_gateway(shoal, checkpoint, said, data=data) as (server, web):
            service = server.service
            assert service is not None
            await until(lambda: len(service.rings) == 2)
            assert sorted(ring.name for ring in service.rings) == ["a", "b"], "a whole replica on each"
            text = expected(checkpoint, PROMPT * 3, 40)
            assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text
            await until(lambda: service.counts.receipts == 1)
            doomed = ""

            def kill() -> None:
                nonlocal doomed
                (doomed,) = [ring.name for ring in service.rings if ring.streams]
                shoal.nodes[doomed].kill()

            got, _ = await a_long_stream(web, kill, after=1)
            assert got == expected(checkpoint, PROMPT * 3, 400)
            assert service.counts.resumed == 1
            await until(lambda: len(service.rings) == 1)
            await shoal.start_node("c", options=("--threads", "1"))
            await until(lambda: len(service.rings) == 2)
            assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text
            counts = service.counts
            await until(lambda: counts.receipts + counts.receipts_missing == 4)
            assert (counts.receipts, counts.receipts_disputed, counts.receipts_missing) == (3, 0, 1)
            assert "shoal_receipts_missing_total 1.0" in (await web.get("/metrics")).text
            busy = NodesServer(ServeOptions(checkpoint, "small", hubs=server.options.hubs, data=data), SystemClock(),
                               SystemDice())  # fmt: skip
            with pytest.raises(GatewayRunning, match="--data"):
                await busy.start()
            assert server.placer is not None
            assert server.placer.model.holder.node == load_key(data / "gateway.key").node_id, "it is who it was"
        accounts(data, doomed)

    def accounts(data: Path, doomed: str | None) -> None:
        """As `shoal receipts` has them, each signature checked."""
        words = [sys.executable, "-m", "shoal", "receipts", str(data)]
        told = json.loads(subprocess.run([*words, "--json"], check=True, capture_output=True, text=True).stdout)
        by_name = {one["name"]: one for one in told["nodes"]}
        assert told["bad"] == [] and told["disputed"] == []
        assert {name for name, one in by_name.items() if one["missing"]} == {doomed}
        assert sum(one["sessions"] for one in by_name.values()) == 3
        assert sum(one["prompt_tokens"] for one in by_name.values()) == 3 * len(PROMPT * 3)
        assert all(one["layer_positions"] == 3 * one["computed_positions"] for one in by_name.values())
        shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        headings = ["node", "id", "sessions", "prompt", "generated", "positions", "work", "disputed", "missing"]
        assert shown.splitlines()[0].split() == headings and all(one["node"][:8] in shown for one in told["nodes"])
        lines = (data / "receipts.jsonl").read_text()
        (data / "receipts.jsonl").write_text(lines.replace('"prompt_tokens":', '"prompt_tokens":1', 1))
        forged = subprocess.run(words, capture_output=True, text=True)
        assert forged.returncode == 1 and "line 1: its figures are not those that were signed" in forged.stdout

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


async def a_long_stream(
    web: httpx.AsyncClient, disturb: Callable[[], None], after: int = 3, **body: Any
) -> tuple[str, dict[str, Any]]:
    """Reads a stream and disturbs it once some pieces have come; gives its text and its last event."""
    got, pieces, event = "", 0, {}
    asked = BODY | {"stream": True, "max_tokens": 400} | body
    async with web.stream("POST", "/v1/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                got += event["choices"][0]["text"] if event.get("choices") else ""
                pieces += 1
                if pieces == after:
                    disturb()
    return got, event


def test_a_hub_that_is_lost_and_one_that_is_back_are_said_once(checkpoint: Path, tmp_path: Path) -> None:
    async def scene() -> None:
        said: list[str] = []
        hub = await HubProcess.start(tmp_path)
        server = NodesServer(
            ServeOptions(checkpoint, "small", hubs=[hub.ticket], say=said.append), SystemClock(), SystemDice()
        )
        await server.start()
        try:
            assert not any("Hub" in sentence for sentence in said), "it is there from the beginning"
            for _ in range(2):
                said.clear()
                await hub.kill()
                await until(lambda: any("cannot be reached any more" in one for one in said))
                hub = await HubProcess.start(tmp_path, hub.ticket.addresses[0])
                await until(lambda: any("answers now" in one for one in said))
                assert sum(str(hub.ticket) in one for one in said) == 2, said
        finally:
            await server.stop()
            await hub.stop()

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_node_that_wants_to_go_is_left_without_a_loss(checkpoint: Path, tmp_path: Path) -> None:
    async def scene() -> None:
        said: list[str] = []
        async with a_shoal(tmp_path, "a", "b") as shoal, a_gateway(shoal, checkpoint, said) as (server, web):
            service = server.service
            assert service is not None
            await until(lambda: len(service.rings) == 2)
            going: list[str] = []

            def go() -> None:
                going.extend(ring.name for ring in service.rings if ring.streams)
                shoal.nodes[going[0]].process.terminate()

            got, _ = await a_long_stream(web, go)
            assert got == expected(checkpoint, PROMPT * 3, 400)
            assert (service.counts.moved, service.counts.resumed) == (1, 0)
            await shoal.nodes[going[0]].process.wait()
            assert [ring.name for ring in service.rings] == [{"a": "b", "b": "a"}[going[0]]]
            assert f"{going[0]} wants to go: The node is stopping." in said

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_a_node_that_is_silent_is_noticed_and_taken_back_when_it_speaks_again(checkpoint: Path, tmp_path: Path) -> None:
    """A stopped process keeps its connections, as a dead link does: nothing says that it is gone."""

    async def scene() -> None:
        said: list[str] = []
        async with a_shoal(tmp_path, "a", "b") as shoal, a_gateway(shoal, checkpoint, said) as (server, web):
            service = server.service
            assert service is not None
            await until(lambda: len(service.rings) == 2)
            silent: list[str] = []

            def stop() -> None:
                silent.extend(ring.name for ring in service.rings if ring.streams)
                os.kill(shoal.nodes[silent[0]].pid, signal.SIGSTOP)

            got, _ = await a_long_stream(web, stop)
            assert got == expected(checkpoint, PROMPT * 3, 400)
            assert service.counts.resumed == 1
            assert any("is silent" in sentence for sentence in said)
            os.kill(shoal.nodes[silent[0]].pid, signal.SIGCONT)
            await until(lambda: len(service.rings) == 2)

    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


@pytest.mark.parametrize("seed", [None, 5])
def test_a_ring_in_reserve_takes_over(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """Three nodes hold a layer each, and a fourth one is spare: whoever is lost, the stream goes on at once."""
    body = {"max_tokens": 60} | ({} if seed is None else {"temperature": 1.0, "seed": seed})

    async def scene() -> None:
        said: list[str] = []
        async with a_shoal(tmp_path, "a", "b", "c", "d") as shoal, a_gateway(shoal, checkpoint, said) as (server, web):
            service = server.service
            assert service is not None
            await until(lambda: len(service.rings) == 4)
            assert service.replicas == 1
            undisturbed = (await web.post("/v1/completions", json=BODY | body)).json()["choices"][0]["text"]
            for stage in (0, 1, 2):
                await until(lambda: len(service.rings) == 4)
                lost: list[str] = []

                def lose(stage: int = stage, lost: list[str] = lost) -> None:
                    """A stage of the ring that the stream goes through: which one works may have changed meanwhile."""
                    (working,) = [ring for ring in service.rings if ring.streams]
                    lost.append(working.name.split(" - ")[stage])
                    shoal.nodes[lost[0]].kill()

                got, event = await a_long_stream(web, lose, after=5 * stage + 1, **body)
                assert got == undisturbed and event["choices"][0]["finish_reason"] == "length"
                # One that was still being tried out when it became the working one says so itself.
                await until(lambda: any("has taken over" in one or "is ready" in one for one in said))
                said.clear()
                await shoal.start_node(lost[0], options=("--threads", "1"))
            assert service.counts.resumed == 3 and service.counts.failed == 0

    room_for_one = 3 << 20  # for a layer with its cache, and the weights of the others
    monkeypatch.setattr("shoal.gateway.scouting.CPU_SHARE", room_for_one / psutil.virtual_memory().total)
    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))


def test_nodes_fetch_no_more_of_one_large_file_than_their_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = a_checkpoint(tmp_path / "model", "llama", vocab_size=257, eos_token_id=256, **LARGE)
    ByteTokenizer().save(large)
    size = (large / "model.safetensors").stat().st_size

    async def scene() -> None:
        said: list[str] = []
        async with (
            a_shoal(tmp_path / "shoal", "a", "b", "c") as shoal,
            a_gateway(shoal, large, said, sessions=1) as (server, web),
        ):
            service = server.service
            assert service is not None
            await until(lambda: service.rings)
            assert any("A ring of 3 stages" in sentence for sentence in said)
            answer = (await web.post("/v1/completions", json=BODY)).json()
            assert answer["choices"][0]["text"] == expected(large, PROMPT * 3, 40)
            stores = [found.parent for found in (tmp_path / "shoal").rglob("partial")]
            assert len(stores) == 3
            for store in stores:
                assert allocated(store) < 0.5 * size, [*said, store]

    two_layers = 22 << 20  # of which a half may be used
    monkeypatch.setattr("shoal.gateway.scouting.CPU_SHARE", 0.5 * two_layers / psutil.virtual_memory().total)
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
            assert any("A ring of 3 stages" in sentence for sentence in said)
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
            lost = next(at for at, sentence in enumerate(said) if "No replica" in sentence and "2 nodes" in sentence)
            assert any("A ring of 3 stages" in sentence for sentence in said[lost:])

    one_layer = 3 << 20  # and the cache that goes with it
    monkeypatch.setattr("shoal.gateway.scouting.CPU_SHARE", one_layer / psutil.virtual_memory().total)
    asyncio.run(asyncio.wait_for(scene(), GENEROUS_S))
