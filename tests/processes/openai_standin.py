"""A small OpenAI-compatible server around a tiny model in plain transformers, with the manners and faults of real ones.

    python openai_standin.py CHECKPOINT LOG

The first part of a URL's path says how it behaves: `/ids/v1`, `/text/v1`, `/stall/v1`, ... Faults come after FAULT_AT
tokens. Requests, and clients that hung up before the end, go to LOG, a JSON document a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shoal.gateway.text import Decoder
from shoal.models.tokenizers import ByteTokenizer

FAULT_AT = 10
FAULTS = ("stall", "early", "done", "error", "garbage", "unfinished-json", "endless", "strange-ids", "strange-finish")
KNOWN = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stream"}
MANNERS = {
    "ids": "takes and gives token ids, as vLLM",
    "plain": "takes token ids and gives text",
    "strict": "the same, and refuses fields that are not OpenAI's",
    "text": "takes and gives text",
    "org": "the same, and calls its model org/small",
    "html": "answers with a page",
    "deaf": "refuses every completion",
    "two": "serves two models",
    "odd": "has a model whose name is none",
    "locked": "asks for a key",
}


class Standin:
    def __init__(self, checkpoint: Path, log: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        self.log = log

    def note(self, **what: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def tokens(self, ids: list[int], body: dict[str, Any]) -> Iterator[int]:
        draw = torch.Generator().manual_seed(int(body["seed"]) % (1 << 63))
        past, given = None, ids
        while True:
            with torch.no_grad():
                done = self.model(torch.tensor([given]), past_key_values=past, use_cache=True)
            past, logits = done.past_key_values, done.logits[0, -1]
            if body["temperature"]:
                chances = torch.softmax(logits / body["temperature"], 0)
                token = int(torch.multinomial(chances, 1, generator=draw))
            else:
                token = int(logits.argmax())
            given = [token]
            yield token

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path = head.split()[:2]
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            _, manner, _, what = path.split("/", 3)
            if manner == "locked" and fields.get("authorization") != "bearer secret":
                self.answer(writer, 401, {"error": {"message": "Who are you?"}})
            elif what == "models":
                names = {"two": ["small", "other"], "org": ["org/small"], "odd": ["my model"]}.get(manner, ["small"])
                self.answer(writer, 200, {"object": "list", "data": [{"id": name, "owned_by": "x"} for name in names]})
            elif method == "POST" and what == "completions":
                gone = asyncio.create_task(reader.read())
                try:
                    await self.complete(manner, json.loads(body), writer, gone)
                except ConnectionError:
                    self.note(manner=manner, event="hung up")
                finally:
                    gone.cancel()
            else:
                self.answer(writer, 404, {"detail": "Not Found"})
            await writer.drain()
        writer.close()

    def answer(self, writer: asyncio.StreamWriter, status: int, said: Any, kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + (said if isinstance(said, bytes) else json.dumps(said).encode()))

    async def complete(
        self, manner: str, body: dict[str, Any], writer: asyncio.StreamWriter, gone: asyncio.Task[bytes]
    ) -> None:
        prompt, wants_ids = body["prompt"], body.get("return_token_ids")
        self.note(manner=manner, event="request", **{**body, "prompt": len(prompt)})
        if manner == "deaf" or (manner in ("text", "org") and not isinstance(prompt, str)):
            self.answer(writer, 400, {"error": {"message": "The prompt must be a string."}})
            return
        if manner in ("strict", "text", "org") and not body.keys() <= KNOWN:
            self.answer(writer, 400, {"detail": [{"msg": "Extra inputs are not permitted"}]})
            return
        if manner == "html":
            self.answer(writer, 200, b"<html>It works!</html>", "text/html")
            return
        assert body["model"] == ("org/small" if manner == "org" else "small") and body["stream"] is True
        self.answer(writer, 200, b": welcome\n\n", "text/event-stream; charset=utf-8")
        ids = ByteTokenizer().encode(prompt).tolist() if isinstance(prompt, str) else prompt
        decoder = Decoder(ByteTokenizer().decode)
        for number, token in enumerate(self.tokens(ids, body)):
            if number == FAULT_AT and manner in FAULTS and not await self.go_on(manner, writer, gone):
                return
            ends = "stop" if token == 256 else "length" if number + 1 == body["max_tokens"] else None
            text = "" if token == 256 else decoder.add([token])
            choice = {"index": 0, "text": text + (decoder.rest() if ends else ""), "finish_reason": ends}
            if wants_ids and manner != "plain":
                choice["token_ids"] = [99999 if manner == "strange-ids" and number > FAULT_AT else token]
            self.event(writer, {"id": "x", "object": "text_completion", "choices": [choice]})
            await writer.drain()
            await asyncio.sleep(0)
            if gone.done():
                self.note(manner=manner, event="hung up")
                return
            if ends:
                self.event(writer, {"id": "x", "choices": [], "usage": {"completion_tokens": number + 1}})
                writer.write(b"data: [DONE]\n\n")
                return

    async def go_on(self, manner: str, writer: asyncio.StreamWriter, gone: asyncio.Task[bytes]) -> bool:
        """What goes wrong; whether the stream goes on."""
        if manner == "strange-ids":
            return True
        if manner == "stall":
            await writer.drain()
            self.note(manner=manner, event="stalled")
            await gone
            self.note(manner=manner, event="hung up")
        said = {
            "done": b"data: [DONE]\n\n",
            "error": b'data: {"error": {"message": "CUDA error: out of memory"}}\n\n',
            "garbage": bytes(range(128, 256)) * 9 + b"\n\n",
            "unfinished-json": b'data: {"choices": [{"text": \n\n',
            "endless": b"data: " + b" " * (1 << 20),
            "strange-finish": b'data: {"choices": [{"text": "", "finish_reason": "abort"}]}\n\n',
        }
        writer.write(said.get(manner, b""))
        return False

    def event(self, writer: asyncio.StreamWriter, said: Any) -> None:
        writer.write(b"data: " + json.dumps(said).encode() + b"\r\n\r\n")


async def main(checkpoint: str, log: str) -> None:
    torch.set_num_threads(1)
    standin = Standin(Path(checkpoint), Path(log))
    server = await asyncio.start_server(standin.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    print(json.dumps({"ready": "standin", "url": f"http://127.0.0.1:{port}", "pid": os.getpid()}), flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
