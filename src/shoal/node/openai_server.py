"""An OpenAI-compatible server beside a node: vLLM, SGLang, llama-server, `shoal serve` itself.

What it says is believed no more than what comes from the network: sizes are bounded, fields are typed, a server that
stalls or speaks nonsense is an error. Hanging up is how such a server hears that a continuation is not wanted any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

import httpx
import msgspec
from msgspec import Meta

from shoal.errors import BadInput, EngineError
from shoal.protocol.engines import PIECE_TEXT_MAX, PIECE_TOKENS_MAX, EngineAsk, EnginePiece
from shoal.protocol.offers import EngineOffer
from shoal.protocol.serving import Choosing, TokenId
from shoal.world import Clock

CONNECT_S = 5.0
LIST_S = 5.0
"""For the list of models."""
FIRST_S = 120.0
"""For the first token: a long prompt, behind others."""
NEXT_S = 30.0
"""For each further one."""
LINE_MAX = 256 * 1024
"""Bytes of an event."""
ANSWER_MAX = 1 << 20
"""Bytes of an answer that is no stream."""
CONNECTIONS_MAX = 128
EXTRAS: tuple[dict[str, Any], ...] = (
    {"return_token_ids": True, "top_k": 1 << 30, "min_p": 0, "repeat_penalty": 1, "repetition_penalty": 1},
    {"return_token_ids": True},
    {},
)
"""Fields that are not OpenAI's, the most that a server takes: that it says ids, and chooses as the request has it. Many
have defaults of their own, or take some from a checkpoint."""
TRIED_TOKENS = 8
TRIED_IDS = (1, 2, 3, 4)
TRIED_TEXT = "One, two, three,"
THE_REQUESTS_FAULT = frozenset({400, 413, 422, 429})
"""Statuses that say nothing about whether the server can serve others."""
STOPPED = frozenset({"stop", "eos", "eos_token"})
SAID_MAX = 200


class ServerUnusable(BadInput):
    """What should be a node's engine is not there, or is none."""

    code = "SH-149"


class ServerBroke(EngineError):
    """A node's engine is gone, stalled, or spoke what no such server speaks."""

    code = "SH-580"


class ServerRefused(EngineError):
    """A node's engine does not take this request; it may take others."""

    code = "SH-581"


@dataclass(frozen=True)
class ServerSettings:
    """What the owner of a node decided about its engine."""

    url: str
    """Its base, with `/v1`."""
    model: str = ""
    """Of those that it serves; empty where it is one."""
    key: str = field(default="", repr=False)
    alone: bool = False
    """The node takes no other work."""


class _Card(msgspec.Struct):
    id: str


class _Cards(msgspec.Struct):
    data: Annotated[list[_Card], Meta(max_length=4096)]


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None
    token_ids: Annotated[list[TokenId], Meta(max_length=PIECE_TOKENS_MAX)] | None = None


class _Chunk(msgspec.Struct):
    """An event of a stream; what else stands in it is not looked at."""

    choices: list[_Choice] = []
    error: Any = None


class OpenAiServer:
    """One server, and the model of it that is offered."""

    def __init__(self, settings: ServerSettings, clock: Clock) -> None:
        """Raises ServerUnusable for a URL that is none."""
        try:
            url = httpx.URL(settings.url.rstrip("/"))
        except httpx.InvalidURL as error:
            raise ServerUnusable(f"The engine's URL {settings.url!r} cannot be read: {error}.") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ServerUnusable(
                f"The engine's URL {settings.url!r} is none of HTTP; write its base, such as http://127.0.0.1:8080/v1."
            )
        self._url = str(url.copy_with(userinfo=b""))  # it stands in sentences that others read
        self._wanted, self._clock = settings.model, clock
        self._extras = EXTRAS[-1]
        self._web = httpx.AsyncClient(
            base_url=url,
            headers={"accept-encoding": "identity"}
            | ({"authorization": f"Bearer {settings.key}"} if settings.key else {}),
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX),
            trust_env=False,  # no proxy stands between a node and its own machine
        )

    async def close(self) -> None:
        await self._web.aclose()

    # --- what it is ------------------------------------------------------------------------------------------------

    async def models(self) -> tuple[str, ...]:
        """Raises ServerBroke."""
        try:
            async with asyncio.timeout(LIST_S), self._web.stream("GET", "models") as response:
                body = await _whole(response)
        except TimeoutError as error:
            raise ServerBroke(f"{self._url}/models did not answer within {LIST_S:.0f} s.") from error
        except httpx.HTTPError as error:
            raise ServerBroke(f"{self._url} cannot be reached: {_why(error)}.") from error
        if response.status_code != 200:
            raise ServerBroke(f"{self._url}/models answered {response.status_code}: {_said(body)}")
        try:
            return tuple(card.id for card in msgspec.json.decode(body, type=_Cards).data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ServerBroke(f"{self._url}/models did not answer with a list of models: {error}.") from error

    async def look(self) -> EngineOffer:
        """Try it: which model, how it takes a prompt, how quick it is. Raises ServerUnusable."""
        try:
            there = await self.models()
        except ServerBroke as error:
            raise ServerUnusable(f"{error.sentence} Start the server first, and name its base URL.") from error
        named = ", ".join(there[:8]) or "none"
        if self._wanted and self._wanted not in there:
            raise ServerUnusable(f"{self._url} does not serve {self._wanted}; it serves {named}.")
        if not self._wanted and len(there) != 1:
            raise ServerUnusable(f"{self._url} serves {named}; say which one with --engine-model.")
        model = self._wanted or there[0]
        try:
            offer = EngineOffer(model=model)
            msgspec.convert(msgspec.to_builtins(offer), EngineOffer)
        except msgspec.ValidationError as error:
            raise ServerUnusable(f"The model's name {model!r} cannot stand in an offer: {error}.") from error
        reason = ""
        for takes in (True, False):
            for self._extras in EXTRAS:
                try:
                    gives, token_ms = await self._try(model, takes)
                except (ServerBroke, ServerRefused) as error:
                    reason = error.sentence
                else:
                    return EngineOffer(model=model, takes_tokens=takes, gives_tokens=gives, token_ms=token_ms)
        raise ServerUnusable(f"{self._url} serves {model}, and does not complete a text: {reason}")

    async def _try(self, model: str, takes_tokens: bool) -> tuple[bool, float]:
        """Whether token ids come along, and milliseconds a token."""
        ask = EngineAsk(
            model=model,
            tokens=TRIED_IDS if takes_tokens else (),
            text="" if takes_tokens else TRIED_TEXT,
            tokens_max=TRIED_TOKENS,
            choosing=Choosing(temperature=0),
        )
        gives, tokens, at_first = False, 0, 0
        began = first = self._clock.monotonic()
        async with contextlib.aclosing(self._events(ask)) as events:
            async for choice in events:
                gives = gives or choice.token_ids is not None
                tokens += len(choice.token_ids or ()) or bool(choice.text)
                if tokens and not at_first:
                    first, at_first = self._clock.monotonic(), tokens
        now = self._clock.monotonic()
        token_s = (now - first) / (tokens - at_first) if tokens > at_first else (now - began) / TRIED_TOKENS
        return gives, token_s * 1000

    # --- what it says ----------------------------------------------------------------------------------------------

    async def generate(self, ask: EngineAsk) -> AsyncGenerator[EnginePiece]:
        """Pieces as they come, the last one with the reason why it ended. Closing it hangs up. Raises ServerBroke,
        ServerRefused."""
        async with contextlib.aclosing(self._events(ask)) as events:
            async for choice in events:
                tokens = tuple(choice.token_ids or ())
                text, rest = choice.text[:PIECE_TEXT_MAX], choice.text[PIECE_TEXT_MAX:]
                if tokens or text:
                    yield EnginePiece(text=text, tokens=tokens)
                for at in range(0, len(rest), PIECE_TEXT_MAX):
                    yield EnginePiece(text=rest[at : at + PIECE_TEXT_MAX])
                if choice.finish_reason == "length" or choice.finish_reason in STOPPED:
                    yield EnginePiece(finish="stop" if choice.finish_reason in STOPPED else "length")
                elif choice.finish_reason is not None:
                    raise ServerBroke(f"{self._url} ended a text for another reason: {choice.finish_reason[:40]!r}.")

    async def _events(self, ask: EngineAsk) -> AsyncGenerator[_Choice]:
        """What a stream says of its one choice, until it has said why it ended. Raises ServerBroke, ServerRefused."""
        wait_s = FIRST_S
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(wait_s):
                    response = await stack.enter_async_context(
                        self._web.stream("POST", "completions", json=_body(ask) | self._extras)
                    )
                    if response.status_code != 200:
                        self._refused(response.status_code, await _whole(response))
                kind = response.headers.get("content-type", "")
                if not kind.startswith("text/event-stream"):
                    raise ServerBroke(f"{self._url} answered with {kind[:80]!r} where a stream was asked for.")
                lines = await stack.enter_async_context(contextlib.aclosing(_lines(response)))
                while True:
                    async with asyncio.timeout(wait_s):
                        line = await anext(lines, b"")
                        while line and not line.startswith(b"data:"):  # comments keep a connection, and say nothing
                            line = await anext(lines, b"")
                    if not line:
                        raise ServerBroke(f"{self._url} hung up in the middle of a text.")
                    for choice in self._choices(line.removeprefix(b"data:").strip()):
                        yield choice
                        if choice.finish_reason is not None:
                            return
                        if choice.text or choice.token_ids:
                            wait_s = NEXT_S
        except TimeoutError as error:
            raise ServerBroke(f"{self._url} said nothing for {wait_s:g} s in the middle of a text.") from error
        except httpx.HTTPError as error:
            raise ServerBroke(f"{self._url} broke off: {_why(error)}.") from error

    def _choices(self, data: bytes) -> Sequence[_Choice]:
        if data == b"[DONE]":
            raise ServerBroke(f"{self._url} ended a text without saying why.")
        try:
            chunk = msgspec.json.decode(data, type=_Chunk)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ServerBroke(f"{self._url} said in a stream what cannot be read: {error}.") from error
        if chunk.error is not None:
            raise ServerBroke(f"{self._url} failed in the middle of a text: {_said(data)}")
        if len(chunk.choices) > 1:
            raise ServerBroke(f"{self._url} gave {len(chunk.choices)} choices where one was asked for.")
        return chunk.choices

    def _refused(self, status: int, body: bytes) -> NoReturn:
        sentence = f"{self._url} answered {status}: {_said(body)}"
        raise ServerRefused(sentence) if status in THE_REQUESTS_FAULT else ServerBroke(sentence)


def _body(ask: EngineAsk) -> dict[str, Any]:
    """The request as the server reads it. Penalties of nothing are left away, for servers that do not know them."""
    how = ask.choosing
    greedy = how.temperature == 0 or how.top_p == 0  # some servers refuse a share of 0
    body: dict[str, Any] = {
        "model": ask.model,
        "prompt": list(ask.tokens) or ask.text,
        "max_tokens": ask.tokens_max,
        "temperature": 0 if greedy else how.temperature,
        "top_p": 1 if greedy else how.top_p,  # also where it is 1: some take what is not said from the checkpoint
        "seed": seed_of(how),
        "stream": True,
    }
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(how, name):
            body[name] = getattr(how, name)
    return body


def seed_of(how: Choosing) -> int:
    """A server is asked for one choice at a time, so choices need seeds of their own; that of the first is the
    client's."""
    return (how.seed + how.choice * 0x9E3779B97F4A7C15) % (1 << 63)


async def _whole(response: httpx.Response) -> bytes:
    """The body, or as much of it as is read of any."""
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > ANSWER_MAX:
            break
    return body[:ANSWER_MAX]


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes]:
    """Lines that are not empty. Raises ServerBroke."""
    rest = b""
    async for part in response.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        if max(len(rest), *map(len, whole), 0) > LINE_MAX:
            raise ServerBroke(f"An event of {response.url} is larger than {LINE_MAX} bytes.")
        for line in whole:
            if line.strip():
                yield line.strip()


class _Told(msgspec.Struct):
    message: str = ""


class _Trouble(msgspec.Struct):
    error: _Told | str | None = None
    detail: Any = None
    message: str = ""


def _said(body: bytes) -> str:
    """What an answer says went wrong: in OpenAI's shape, in others that are seen, or as it is."""
    try:
        found = msgspec.json.decode(body, type=_Trouble)
        error = found.error.message if isinstance(found.error, _Told) else found.error
        text = error or found.message or str(found.detail or "")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body[: 4 * SAID_MAX].decode(errors="replace")
    return f"{' '.join(text.split())[:SAID_MAX].rstrip('.') or 'nothing more'}."


def _why(error: httpx.HTTPError) -> str:
    return (str(error) or type(error).__name__)[:SAID_MAX].rstrip(".")
