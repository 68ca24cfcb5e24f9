"""A client of the endpoint, in a host of its own: `python stream_client.py URL`.

Each line on stdin is a JSON list of bodies for `/v1/completions`; their streams are read at once. Every piece that
comes is a line on stdout, `{"stream": number, "at": monotonic seconds, "tokens": how many, "text": ...}`, then one line
`{"done": [text or error of each]}`. A text on stdin instead of a list, such as `"/metrics"`, is a GET of that path.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import httpx


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


async def stream(web: httpx.AsyncClient, number: int, body: dict[str, Any]) -> str:
    text = ""
    try:
        async with web.stream("POST", "/v1/completions", json={**body, "stream": True, "logprobs": 0}) as response:
            if response.status_code != 200:
                return f"error {response.status_code}: {(await response.aread()).decode()}"
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return f"error: {event['error']['message']}"
                for choice in event["choices"]:
                    text += choice["text"]
                    tokens = len(choice["logprobs"]["tokens"]) if choice.get("logprobs") else 0
                    say({"stream": number, "at": time.monotonic(), "tokens": tokens, "text": choice["text"]})
    except httpx.HTTPError as error:
        return f"error: {error!r}"
    return text


async def main() -> None:
    async with httpx.AsyncClient(base_url=sys.argv[1], timeout=120) as web:
        say({"ready": True})
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            if isinstance(asked, str):
                try:
                    answer = await web.get(asked)
                    say({"status": answer.status_code, "text": answer.text})
                except httpx.HTTPError as error:
                    say({"status": 0, "text": repr(error)})
                continue
            say({"asked": time.monotonic()})
            say({"done": await asyncio.gather(*(stream(web, at, body) for at, body in enumerate(asked)))})


if __name__ == "__main__":
    asyncio.run(main())
