"""A conversation with a model behind an endpoint that speaks OpenAI's API: this project's, or any other."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx
import msgspec

from shoal.errors import BadInput, LinkError
from shoal.sdk.local import LocalProcessFailed, shoal_home

CONNECT_S = 10.0
SILENCE_S = 600.0
"""Between two pieces of an answer; a request may wait for room that long."""
LINE_MAX_BYTES = 1 << 20
ANSWER_MAX_BYTES = 16 << 20
TURNS_MAX = 1000
ROOM_SHARE = 0.25
"""Part of the context that is kept for the answer where nobody said how long that may be."""
NODES_PATIENCE_S = 600.0
LOOK_EVERY_S = 0.2
STOP_S = 15.0


class NobodyServes(LinkError):
    """Nothing that speaks OpenAI's API answers at an address."""

    code = "SH-345"


class AskLater(LinkError):
    """An endpoint is full, or a key has used what it may for now."""

    code = "SH-346"


class AnswerBroken(LinkError):
    """An endpoint failed, or broke an answer off."""

    code = "SH-347"


class EndpointRefused(BadInput):
    """An endpoint does not do what it was asked; the sentence is its own."""

    code = "SH-185"

    def __init__(self, sentence: str, openai_code: str | None = None) -> None:
        super().__init__(sentence)
        self.openai_code = openai_code


class _Card(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct, frozen=True):
    data: list[_Card]


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class _Trouble(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | int | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _Trouble | None = None


class Answer(msgspec.Struct, frozen=True):
    question: str
    text: str
    model: str
    finish: str
    """`stop`; `length`: it was as long as it might be; `interrupted`: with Ctrl-C."""
    usage: Usage | None
    seconds: float
    dropped: int
    """Turns that the conversation lost for want of room."""


class ChatEndpoint:
    """An endpoint at a URL, such as http://127.0.0.1:8000/v1."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._web = httpx.Client(headers=headers, timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S))

    def close(self) -> None:
        self._web.close()

    def models(self) -> dict[str, int | None]:
        """The models that are served, with their context where it is said. Raises NobodyServes, EndpointRefused,
        AskLater, AnswerBroken."""
        with self._asked("GET", "/models") as response:
            try:
                cards = msgspec.json.decode(_read(response), type=_Cards)
            except msgspec.DecodeError as error:
                raise NobodyServes(f"What answers at {self.url} lists no models: {error}.") from error
        return {card.id: card.max_model_len for card in cards.data}

    def well(self) -> bool:
        """Whether this project's endpoint says that the model can be asked."""
        with contextlib.suppress(httpx.HTTPError):
            return self._web.get(f"{self.url.removesuffix('/v1')}/healthz").status_code == 200
        return False

    def chunks(self, body: dict[str, Any]) -> Generator[_Chunk]:
        """The events of a streamed answer. Raises as `models` does."""
        with self._asked("POST", "/chat/completions", json=body) as response:
            for line in _lines(response):
                said = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or not said:
                    continue
                if said == b"[DONE]":
                    return
                try:
                    chunk = msgspec.json.decode(said, type=_Chunk)
                except msgspec.DecodeError as error:
                    raise AnswerBroken(f"{self.url} answered with what is no answer: {error}.") from error
                if chunk.error is not None:
                    raise AnswerBroken(f"The answer broke off: {chunk.error.message}")
                yield chunk
        raise AnswerBroken(f"The answer broke off: {self.url} ended it before its end.")

    @contextlib.contextmanager
    def _asked(self, method: str, path: str, **more: Any) -> Iterator[httpx.Response]:
        try:
            with self._web.stream(method, self.url + path, **more) as response:
                if response.status_code != 200:
                    self._refused(response)
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NobodyServes(
                f"Nobody serves at {self.url}. Start it with: shoal serve MODEL; or name a directory with a model, or "
                "another endpoint with --url."
            ) from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise EndpointRefused(
                f"{self.url!r} is no URL of an endpoint, such as http://127.0.0.1:8000/v1."
            ) from error
        except httpx.TimeoutException as error:
            raise AnswerBroken(f"{self.url} said nothing for {SILENCE_S:.0f} s.") from error
        except httpx.HTTPError as error:
            raise AnswerBroken(f"The link to {self.url} broke: {error}.") from error

    def _refused(self, response: httpx.Response) -> NoReturn:
        status, body = response.status_code, _read(response)
        try:
            trouble = msgspec.json.decode(body, type=_Chunk).error or _Trouble()
        except msgspec.DecodeError:
            trouble = _Trouble()
        said = trouble.message or f"it answered with status {status}."
        if status in (401, 403):
            raise EndpointRefused(
                f"{self.url} does not take the key: {said} Name one with --key-file FILE or in SHOAL_API_KEY."
            )
        if status == 429:
            wait = response.headers.get("retry-after", "")
            when = f" Come back in {wait} s." if wait.isdigit() and "try again" not in said else ""
            raise AskLater(f"{self.url} takes no more for now: {said}{when}")
        if status >= 500:
            raise AnswerBroken(f"{self.url} could not answer: {said}")
        if status == 404 and not trouble.message:
            raise NobodyServes(f"What answers at {self.url} is no endpoint for chats; its URL mostly ends in /v1.")
        raise EndpointRefused(f"{self.url} refused: {said}", str(trouble.code))


def _read(response: httpx.Response) -> bytes:
    found = b""
    for piece in response.iter_bytes():
        found += piece
        if len(found) > LINE_MAX_BYTES:
            raise AnswerBroken(f"{response.url} answered with more than {LINE_MAX_BYTES} bytes.")
    return found


def _lines(response: httpx.Response) -> Iterator[bytes]:
    rest, total = b"", 0
    for piece in response.iter_bytes():
        total += len(piece)
        *whole, rest = (rest + piece).split(b"\n")
        if len(rest) > LINE_MAX_BYTES or total > ANSWER_MAX_BYTES:
            raise AnswerBroken(f"{response.url} answered with more than may come: {total} bytes.")
        yield from whole


@dataclass
class Chat:
    """A conversation, from its first question to the last."""

    endpoint: ChatEndpoint
    model: str
    context: int | None = None
    """Tokens, where the endpoint says how many."""
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else a request has: temperature, max_tokens, seed."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Questions and their answers, oldest first."""

    def __post_init__(self) -> None:
        self._tokens_per_character = 0.0
        """As the last answer's usage had it."""

    def ask(self, question: str, piece: Callable[[str], None] = lambda _: None) -> Answer:
        """Ask, and give each `piece` of the answer as it comes. Ctrl-C ends the answer; what came of it stays in the
        conversation. Turns for which there is no room are dropped, oldest first.

        Raises as `ChatEndpoint` does; the conversation is then as it was before."""
        began, left = time.monotonic(), self._fitting(question)
        while True:
            try:
                return self._asked(question, left, piece, began)
            except EndpointRefused as error:
                if error.openai_code != "context_length_exceeded" or not left:
                    raise
                left = left[1:]

    def _asked(
        self, question: str, turns: Sequence[tuple[str, str]], piece: Callable[[str], None], began: float
    ) -> Answer:
        messages = self._messages(question, turns)
        text, finish, usage = "", "", None
        body = {"model": self.model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with contextlib.closing(self.endpoint.chunks(body | self.settings)) as chunks:
                for chunk in chunks:
                    usage = chunk.usage or usage
                    for choice in chunk.choices[:1]:
                        finish = choice.finish_reason or finish
                        if choice.delta.content:
                            text += choice.delta.content
                            piece(choice.delta.content)
        except KeyboardInterrupt:
            finish = "interrupted"
        if usage is not None:
            characters = sum(len(message["content"]) for message in messages)
            self._tokens_per_character = usage.prompt_tokens / max(1, characters)
        lost = len(self.turns) - len(turns)
        self.turns = [*turns, (question, text)] if text else list(turns)
        return Answer(question, text, self.model, finish, usage, round(time.monotonic() - began, 3), lost)

    def _messages(self, question: str, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        said = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in turns:
            said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*said, {"role": "user", "content": question}]

    def _fitting(self, question: str) -> list[tuple[str, str]]:
        """The newest turns, as many as leave room for an answer as far as is known; the endpoint knows exactly."""
        turns = self.turns[-TURNS_MAX:]
        if self.context is None:
            return turns
        room = self.settings.get("max_tokens") or ROOM_SHARE * self.context
        while turns:
            characters = sum(len(message["content"]) for message in self._messages(question, turns))
            if characters * self._tokens_per_character + room <= self.context:
                break
            turns = turns[1:]
        return turns


@contextlib.contextmanager
def serving(directory: Path, *, hubs: Sequence[str] = (), here: bool = False) -> Iterator[str]:
    """`shoal serve` of a directory for as long as this lasts: the endpoint's URL, once it can be asked. Ctrl-C is ours
    and not its. Raises LocalProcessFailed."""
    words = [sys.executable, "-m", "shoal", "serve", str(directory), "--http", "127.0.0.1:0", "--json"]
    words += [
        "--data",
        str(shoal_home() / "serve" / "chat"),
        "--with-parent",
        str(os.getpid()),
        *(["--here"] if here else []),
    ]
    words += [word for hub in hubs for word in ("--hub", hub)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        try:
            assert process.stdout is not None
            yield _ready(directory, process.stdout.readline(), process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(directory: Path, line: bytes, process: subprocess.Popen[bytes], log: Any) -> str:
    try:
        said = json.loads(line)
    except ValueError:
        said = {}
    if "error" in said:
        raise LocalProcessFailed(f"{directory} could not be served: {said['error']['sentence']}")
    if "url" not in said:
        raise LocalProcessFailed(f"{directory} could not be served: {_last_words(log)}")
    endpoint = ChatEndpoint(said["url"])
    try:
        until = time.monotonic() + NODES_PATIENCE_S
        while not endpoint.well():
            if process.poll() is not None or time.monotonic() > until:
                raise LocalProcessFailed(f"No node took {directory}: {_last_words(log)}")
            time.sleep(LOOK_EVERY_S)
    finally:
        endpoint.close()
    return str(said["url"])


def _last_words(log: Any) -> str:
    log.seek(0)
    lines: list[str] = log.read()[-4096:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing."
