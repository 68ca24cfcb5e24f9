"""Servers of others as engines, where they are installed: `transformers serve` (it needs fastapi, uvicorn, accelerate),
and llama.cpp's (SHOAL_TEST_LLAMA names a Python that has llama-cpp-python with its server, and gguf)."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_engines import BODY, CLOCK, FAULT_AT, Standin, a_world, checkpoint, play, standin
from test_gateway import PROMPT, expected
from test_serving import until

from shoal.node.openai_server import OpenAiServer, ServerBroke, ServerSettings

__all__ = ["checkpoint", "standin"]

REVISION = "0" * 40
LLAMA = os.environ.get("SHOAL_TEST_LLAMA", "")
HAS_SERVE = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "accelerate"))


def a_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def transformers_serve(checkpoint: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """It lists what is in the cache of hub models, so the checkpoint is put there as one of them."""
    cached = folder / "hub" / "models--org--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(REVISION)
    shutil.copytree(checkpoint, cached / "snapshots" / REVISION)
    port = a_port()
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port), "--device", "cpu"]
    with a_process(words, {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}) as process:
        yield f"http://127.0.0.1:{port}/v1", process


@contextlib.contextmanager
def llama_server(checkpoint: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port, model = a_port(), folder / "small.gguf"
    script = Path(__file__).with_name("checkpoint_to_gguf.py")
    subprocess.run([LLAMA, str(script), str(checkpoint), str(model)], check=True, env={**os.environ, "PYTHONPATH": ""})
    words = [LLAMA, "-m", "llama_cpp.server", "--model", str(model), "--model_alias", "org/small", "--n_ctx", "512"]
    words += ["--type_k", "0", "--type_v", "0"]  # float32, as the model is
    with a_process([*words, "--host", "127.0.0.1", "--port", str(port)], {"PYTHONPATH": ""}) as process:
        yield f"http://127.0.0.1:{port}/v1", process


@contextlib.contextmanager
def a_process(words: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(words, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


SERVERS = [
    pytest.param(
        transformers_serve,
        id="transformers serve",
        marks=pytest.mark.skipif(not HAS_SERVE, reason="fastapi, uvicorn and accelerate are not installed"),
    ),
    pytest.param(
        llama_server,
        id="llama.cpp",
        marks=pytest.mark.skipif(not LLAMA, reason="SHOAL_TEST_LLAMA names no Python with llama-cpp-python"),
    ),
]


@pytest.mark.parametrize("start", SERVERS)
def test_a_real_server_is_an_engine_until_it_is_killed(
    start: Callable[..., contextlib.AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]],
    checkpoint: Path,
    standin: Standin,
    tmp_path: Path,
) -> None:
    """Its greedy tokens are those of plain transformers; killed in the middle, its stream goes on at another make."""

    async def scene(url: str, process: subprocess.Popen[bytes]) -> None:
        server = OpenAiServer(ServerSettings(url), CLOCK)

        async def up() -> bool:
            with contextlib.suppress(ServerBroke):
                return bool(await server.models())
            assert process.poll() is None, "the server ended by itself"
            return False

        while not await up():
            await asyncio.sleep(0.2)
        await server.close()
        async with a_world(checkpoint, model="org/small", real=url) as (world, web):
            text = expected(checkpoint, PROMPT * 3, 40)
            whole = (await web.post("/v1/completions", json=BODY)).json()
            assert whole["choices"][0]["text"] == text and whole["usage"]["completion_tokens"] == 40
            assert whole["shoal"] == {"exact": False, "replicas": ["real (engine)"], "resumed": 0}
            chat = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "seed": 5}
            said = (await web.post("/v1/chat/completions", json=chat)).json()
            assert said["usage"]["completion_tokens"] > 0 and said["choices"][0]["message"]["content"]
            await world.node("standin", standin.at("org"))
            await world.finder.look()
            world.prefer("real", "standin")
            got, last = "", {}
            long = {**BODY, "stream": True, "max_tokens": 400}
            async with web.stream("POST", "/v1/completions", json=long) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        last = json.loads(line.removeprefix("data: "))
                        assert "choices" in last, last
                        got += last["choices"][0]["text"]
                        if len(got) > FAULT_AT:
                            process.kill()
            assert got == expected(checkpoint, PROMPT * 3, 400)
            assert last["shoal"]["replicas"] == ["real (engine)", "standin (engine)"] and last["shoal"]["resumed"] == 1
            await until(lambda: world.hosts["real"][2].offer is None)

    with start(checkpoint, tmp_path) as (url, process):
        play(lambda: scene(url, process))
