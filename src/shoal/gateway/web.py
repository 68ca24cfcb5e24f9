"""The endpoint over HTTP: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`, `/healthz`,
`/metrics`.

Errors have OpenAI's shape and status codes. A stream is a sequence of server-sent events that ends with `[DONE]`; what
goes wrong after it has begun is its last event. When a client hangs up, its sessions are freed at once.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from litestar import HttpMethod, Litestar, MediaType, Request, Response, post, route
from litestar.background_tasks import BackgroundTask
from litestar.datastructures import MutableScopeHeaders
from litestar.exceptions import HTTPException, InternalServerException, MethodNotAllowedException, NotFoundException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.response import Stream
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.errors import EngineError, ShoalError
from shoal.gateway import openai
from shoal.gateway.keys import Account, ApiKey, Keys
from shoal.gateway.openai import (
    ChatRequest,
    CompletionRequest,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
    Trouble,
    TroubleAnswer,
    Usage,
)
from shoal.gateway.refusals import (
    BudgetSpent,
    KeyRefused,
    LimitReached,
    Overloaded,
    RequestRefused,
    Stopping,
    TooLarge,
    TooSlow,
    UnknownModel,
    Unserved,
    read_chat,
    read_completion,
    read_embedding,
)
from shoal.gateway.service import Asked, ModelService, Piece
from shoal.gateway.streams import StreamLost
from shoal.gateway.text import Decoder, escaped, spelled
from shoal.protocol.serving import Chosen

T = TypeVar("T")
BODY_S_MAX = 60.0
"""A request's body must have come within so long."""
EVENTS = "text/event-stream"
BYTES_MARK = "bytes:"
"""In `/v1/completions`, before a token that is a part of a character."""
PATH_SHOWN_MAX = 100
"""Characters of a path that there is not."""
READ = (HttpMethod.GET, HttpMethod.HEAD)
"""Of HEAD the server leaves the body out."""
HUNG_UP = 499
"""The status of a request whose client is gone, as proxies write it; nobody reads it."""
EVERYBODY = ApiKey(b"", "")
"""Whoever asks where no keys are asked for."""
_log = logging.getLogger("shoal.gateway")
_encode = msgspec.json.encode


def make_app(service: ModelService, *, keys: Callable[[], Keys] | None = None) -> Litestar:
    """The ASGI application. `keys`: the API keys of which a request must carry one; none: everybody is served."""

    async def admit(request: Request[Any, Any, Any]) -> None:
        if keys is None or request.url.path == "/healthz":
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise KeyRefused("Send an API key: Authorization: Bearer KEY.", code="invalid_api_key")
        account = keys().find(key)
        if account is None:
            raise KeyRefused("This API key is not known here.", code="invalid_api_key")
        request.state.account = account

    async def say_limits(message: Any, scope: Any) -> None:
        account = scope.get("state", {}).get("account")
        if account is not None and message["type"] == "http.response.start":
            headers = MutableScopeHeaders.from_message(message)
            for name, value in account.headers(service.clock.monotonic()).items():
                headers[name] = value

    @route("/v1/models", http_method=READ)
    async def models() -> Response[bytes]:
        return _json(openai.ModelList([_card(service)]))

    @route("/v1/models/{name:path}", http_method=READ)
    async def model(request: Request[Any, Any, Any]) -> Response[bytes]:
        name = str(request.path_params["name"]).removeprefix("/")
        if name != service.name:
            raise UnknownModel(f"The model `{name}` does not exist here.", code="model_not_found")
        return _json(_card(service))

    @post("/v1/chat/completions", status_code=200)
    async def chat(request: Request[Any, Any, Any]) -> Response[bytes] | Stream:
        asked_for = read_chat(await _body(request))
        asked = await _while_there(request, service.chat(asked_for))
        return await _reply(service, asked, _Chat(service, asked, asked_for), request)

    @post("/v1/completions", status_code=200)
    async def completions(request: Request[Any, Any, Any]) -> Response[bytes] | Stream:
        asked_for = read_completion(await _body(request))
        asked = await service.completion(asked_for)
        return await _reply(service, asked, _Text(service, asked_for), request)

    @post("/v1/embeddings", status_code=200)
    async def embeddings(request: Request[Any, Any, Any]) -> Response[bytes]:
        asked_for = read_embedding(await _body(request))
        asked = await service.embedding(asked_for)
        count, account = sum(map(len, asked.inputs)), _account(request)
        account.enter(count, 0, service.clock.monotonic())
        service.counts.requests += 1
        try:
            vectors = await _while_there(request, service.embed(asked, account.key.digest))
        finally:
            account.leave(0, 0, service.clock.monotonic())
        data = [Embedding(at, _numbers(vector, asked_for)) for at, vector in enumerate(vectors)]
        return _json(EmbeddingList(data, service.name, EmbeddingUsage(count, count)))

    @route("/healthz", http_method=READ)
    async def health() -> Response[bytes]:
        service.refuse_unserved()
        return _json({"status": "ok", "model": service.name, "replicas": service.replicas})

    figures = CollectorRegistry(auto_describe=False)
    figures.register(_Figures(service, keys))

    @route("/metrics", http_method=READ)
    async def metrics() -> Response[bytes]:
        return Response(generate_latest(figures), headers={"content-type": CONTENT_TYPE_LATEST})

    handlers = [chat, completions, embeddings, models, model, health, metrics]
    offered = ", ".join(
        f"{min(handler.http_methods)} {path.replace('{name:path}', 'NAME')}"
        for handler in handlers
        for path in handler.paths
    )

    def trouble(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        service.counts.refused += 1
        if isinstance(error, NotFoundException | MethodNotAllowedException):
            asked = f"{request.method} {request.url.path[:PATH_SHOWN_MAX]}"
            error.detail = f"There is no {asked} here; there are {offered}."
        elif not isinstance(error, ShoalError | HTTPException):
            _log.exception("a request failed", exc_info=error)
        return _trouble(error)

    return Litestar(
        handlers,
        before_request=admit,
        before_send=[] if keys is None else [say_limits],
        exception_handlers={ShoalError: trouble, HTTPException: trouble, Exception: trouble},
        openapi_config=None,
        logging_config=None,
        request_max_body_size=openai.BODY_MAX_BYTES,
    )


class _Reply:
    """How one kind of request is answered, whole or piece by piece."""

    def __init__(self, service: ModelService, request: ChatRequest | CompletionRequest, prefix: str) -> None:
        self.stream = bool(request.stream)
        self.usage_wanted = bool(request.stream_options and request.stream_options.include_usage)
        self._no_usage = None if self.usage_wanted else msgspec.UNSET
        """What stands for it in a chunk before the last."""
        self._service = service
        self._id, self._created = prefix + secrets.token_hex(12), service.clock.now_ms() // 1000

    def first(self) -> list[Any]:
        return []

    def chunk(self, piece: Piece) -> Any: ...

    def whole(self, pieces: list[list[Piece]], usage: Usage) -> Any: ...

    def last(self, usage: Usage) -> Any: ...


class _Chat(_Reply):
    def __init__(self, service: ModelService, asked: Asked, request: ChatRequest) -> None:
        super().__init__(service, request, "chatcmpl-")
        self._asked, self._logprobs = asked, bool(request.logprobs)

    def _said(self, chosen: Sequence[Chosen]) -> openai.ChoiceLogprobs | None:
        return self._service.logprobs(chosen) if self._logprobs else None

    def _chunk(self, choices: list[openai.ChunkChoice], usage: Usage | msgspec.UnsetType | None) -> openai.ChatChunk:
        return openai.ChatChunk(self._id, self._created, self._service.name, choices, usage=usage)

    def first(self) -> list[Any]:
        begins = openai.Delta(role="assistant", content="")
        count = len(self._asked.prompts) * self._asked.choices
        return [self._chunk([openai.ChunkChoice(index, begins)], self._no_usage) for index in range(count)]

    def chunk(self, piece: Piece) -> Any:
        delta = openai.Delta(content=piece.text) if piece.text or piece.tokens else openai.Delta()
        choice = openai.ChunkChoice(piece.index, delta, piece.finish, self._said(piece.tokens))
        return _signed(self._chunk([choice], self._no_usage), [piece])

    def last(self, usage: Usage) -> Any:
        return self._chunk([], usage)

    def whole(self, pieces: list[list[Piece]], usage: Usage) -> Any:
        choices = []
        for index, parts in enumerate(pieces):
            chosen = [one for part in parts for one in part.tokens]
            message = openai.AnswerMessage("assistant", "".join(part.text for part in parts))
            choices.append(openai.ChatChoice(index, message, parts[-1].finish or "length", self._said(chosen)))
        whole = openai.ChatCompletion(self._id, self._created, self._service.name, choices, usage)
        return _signed(whole, [parts[-1] for parts in pieces])


class _Text(_Reply):
    def __init__(self, service: ModelService, request: CompletionRequest) -> None:
        super().__init__(service, request, "cmpl-")
        self._top, self._with_ids = request.logprobs, bool(request.return_token_ids)
        self._texts: dict[int, Decoder] = {}
        self._offsets: dict[int, int] = {}
        """Of each choice: what was said, and how many characters that is."""

    def _said(self, index: int, chosen: Sequence[Chosen]) -> openai.TextLogprobs | None:
        if self._top is None:
            return None
        said, offsets = self._service.logprobs(chosen).content, []
        text = self._texts.setdefault(index, Decoder(self._service.tokenizer.decode))
        for one in chosen:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text.add([one.token]))
        names = [spelled(bytes(one.bytes), BYTES_MARK) for one in said]
        tops: list[dict[str, float] | None] = [_by_name(one.top_logprobs) for one in said]
        return openai.TextLogprobs(names, [one.logprob for one in said], tops, offsets)

    def _choice(self, index: int, text: str, finish: str | None, chosen: Sequence[Chosen]) -> openai.TextChoice:
        ids = [one.token for one in chosen] if self._with_ids else msgspec.UNSET
        return openai.TextChoice(index, text, finish, self._said(index, chosen), ids)

    def _completion(self, choices: list[openai.TextChoice], usage: Usage | msgspec.UnsetType | None) -> Any:
        return openai.TextCompletion(self._id, self._created, self._service.name, choices, usage=usage)

    def chunk(self, piece: Piece) -> Any:
        choice = self._choice(piece.index, piece.text, piece.finish, piece.tokens)
        return _signed(self._completion([choice], self._no_usage), [piece])

    def last(self, usage: Usage) -> Any:
        return self._completion([], usage)

    def whole(self, pieces: list[list[Piece]], usage: Usage) -> Any:
        choices = []
        for index, parts in enumerate(pieces):
            chosen = [one for part in parts for one in part.tokens]
            text = "".join(part.text for part in parts)
            choices.append(self._choice(index, text, parts[-1].finish or "length", chosen))
        return _signed(self._completion(choices, usage), [parts[-1] for parts in pieces])


def _by_name(tops: Sequence[openai.TopLogprob]) -> dict[str, float]:
    """Two tokens may read alike, as a letter and the byte that it is: the less likely one is named by its bytes."""
    found: dict[str, float] = {}
    for top in tops:
        name = spelled(bytes(top.bytes), BYTES_MARK)
        found.setdefault(BYTES_MARK + escaped(bytes(top.bytes)) if name in found else name, top.logprob)
    return found


def _account(request: Request[Any, Any, Any]) -> Account:
    """Of the key that asks."""
    return request.state.get("account") or Account(EVERYBODY, 0.0)


async def _reply(
    service: ModelService, asked: Asked, reply: _Reply, request: Request[Any, Any, Any]
) -> Response[bytes] | Stream:
    pieces = _pieces(service, asked, _account(request))
    if reply.stream:
        first = await _while_there(request, _next(pieces))  # what is wrong from the beginning is no stream
        return Stream(
            _events(service, asked, reply, first, pieces), media_type=EVENTS, headers={"cache-control": "no-cache"},
            background=BackgroundTask(_close, pieces),  # a client that took nothing more left `_events` where it was
        )  # fmt: skip
    parts = await _while_there(request, _all(pieces, len(asked.prompts) * asked.choices))
    said = sum(len(piece.tokens) for part in parts for piece in part)
    return _json(reply.whole(parts, _usage(asked, said)))


async def _body(request: Request[Any, Any, Any]) -> bytes:
    """Raises TooSlow, TooLarge, RequestRefused."""
    try:
        async with asyncio.timeout(BODY_S_MAX):
            return await request.body()
    except TimeoutError as error:
        raise TooSlow(f"The body did not come within {BODY_S_MAX:.0f} s.") from error
    except RequestEntityTooLarge as error:
        size = request.headers.get("content-length", f"more than {openai.BODY_MAX_BYTES}")
        raise TooLarge(f"The body has {size} bytes; the limit is {openai.BODY_MAX_BYTES}.") from error
    except InternalServerException as error:  # a client that is gone looks alike, and reads nothing
        raise RequestRefused("The body did not come whole: it ended early, or its chunks are malformed.") from error


async def _next(pieces: AsyncGenerator[Piece]) -> Piece:
    return await anext(pieces)


async def _close(pieces: AsyncGenerator[Piece]) -> None:
    await pieces.aclose()


async def _all(pieces: AsyncGenerator[Piece], choices: int) -> list[list[Piece]]:
    parts: list[list[Piece]] = [[] for _ in range(choices)]
    async for piece in pieces:
        parts[piece.index].append(piece)
    return parts


async def _while_there(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled as soon as the client hangs up. The request's body must have been read."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise HTTPException("The client hung up.", status_code=HUNG_UP)
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _hung_up(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pieces(service: ModelService, asked: Asked, account: Account) -> AsyncGenerator[Piece]:
    """What is answered, on the account of the key that asks. Raises LimitReached, and what `answer` does."""
    most = len(asked.prompts) * asked.choices * asked.tokens_max
    account.enter(sum(map(len, asked.prompts)), most, service.clock.monotonic())
    service.counts.requests += 1
    said = 0
    pieces = service.answer(asked, account.key.digest)
    try:
        async for piece in pieces:
            said += len(piece.tokens)
            yield piece
    finally:
        account.leave(said, most, service.clock.monotonic())
        await pieces.aclose()


async def _events(
    service: ModelService, asked: Asked, reply: _Reply, first: Piece, pieces: AsyncGenerator[Piece]
) -> AsyncIterator[bytes]:
    said = 0
    try:
        for begins in reply.first():
            yield _event(begins)
        yield _event(reply.chunk(first))
        said += len(first.tokens)
        async for piece in pieces:
            said += len(piece.tokens)
            yield _event(reply.chunk(piece))
        if reply.usage_wanted:
            yield _event(reply.last(_usage(asked, said)))
        yield b"data: [DONE]\n\n"
    except ShoalError as error:
        service.counts.failed += 1
        yield _event(_said_trouble(error)[1])


def _signed(said: Any, last: Sequence[Piece]) -> Any:
    """An answer, or a chunk of one, with how the choices that end in it came about."""
    ways = [piece.came_by for piece in last if piece.came_by is not None]
    if not ways:
        return said
    names = tuple(dict.fromkeys(name for way in ways for name in way.replicas))
    all_of_them = openai.CameBy(all(way.exact for way in ways), names, sum(way.resumed for way in ways))
    return msgspec.structs.replace(said, shoal=all_of_them, system_fingerprint=all_of_them.fingerprint)


def _usage(asked: Asked, said: int) -> Usage:
    prompt = sum(len(one) for one in asked.prompts)
    return Usage(prompt, said, prompt + said)


def _numbers(vector: NDArray[np.float32], asked: EmbeddingRequest) -> list[float] | str:
    if asked.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def _event(said: Any) -> bytes:
    return b"data: " + _encode(said) + b"\n\n"


def _json(said: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    return Response(_encode(said), status_code=status, media_type=MediaType.JSON, headers=headers)


def _card(service: ModelService) -> openai.ModelCard:
    return openai.ModelCard(service.name, service.created, "shoal", service.context)


def _said_trouble(error: Exception) -> tuple[int, TroubleAnswer]:
    if isinstance(error, RequestRefused):
        return error.status, error.answer
    if isinstance(error, Overloaded):
        return 429, TroubleAnswer(Trouble(error.sentence, "rate_limit_exceeded", code="rate_limit_exceeded"))
    if isinstance(error, BudgetSpent):  # repeating it would not help, as clients do with 503
        return 402, TroubleAnswer(Trouble(error.sentence, "insufficient_quota", code="insufficient_quota"))
    if isinstance(error, Unserved | StreamLost):
        return 503, TroubleAnswer(Trouble(error.sentence, "server_error", code=error.code))
    if isinstance(error, HTTPException):
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return error.status_code, TroubleAnswer(Trouble(f"{str(error.detail).rstrip('.')}.", kind))
    if isinstance(error, EngineError):
        return 500, TroubleAnswer(Trouble(error.sentence, "server_error", code=error.code))
    return 500, TroubleAnswer(Trouble("The endpoint failed; its log says how.", "server_error"))


def _trouble(error: Exception) -> Response[bytes]:
    status, answer = _said_trouble(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, Overloaded | LimitReached | Stopping):
        if math.isfinite(error.retry_after_s):
            headers["retry-after"] = str(math.ceil(error.retry_after_s))
        else:  # clients of OpenAI repeat what is answered with 429, unless they are told
            headers["x-should-retry"] = "false"
    return _json(answer, status, headers)


class _Figures(Collector):
    """The counts, as Prometheus reads them."""

    def __init__(self, service: ModelService, keys: Callable[[], Keys] | None) -> None:
        self._service, self._keys = service, keys

    def collect(self) -> Iterator[Metric]:
        counts, admission = self._service.counts, self._service.admission
        for name, said, value in (
            ("requests", "Requests that were let in.", counts.requests),
            ("requests_refused", "Requests that were answered with an error.", counts.refused),
            ("streams_failed", "Streams that ended with an error.", counts.failed),
            ("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
            ("tokens", "Tokens that were generated.", counts.tokens),
            ("steps", "Crossings of a replica in which they were.", counts.steps),
            ("streams_resumed", "Times that a stream went on at another replica.", counts.resumed),
            ("streams_moved", "Times that a stream left a replica that wanted to go.", counts.moved),
            ("prompt_tokens_reused", "Tokens of prompts that an earlier session had left.", counts.reused),
            ("receipts", "Receipts of nodes that count.", counts.receipts),
            ("receipts_disputed", "Receipts that claim what did not go through.", counts.receipts_disputed),
            ("receipts_missing", "Receipts that did not come, of nodes that died.", counts.receipts_missing),
        ):
            yield CounterMetricFamily(f"shoal_{name}", said, value)
        for name, said, value in (
            ("requests_running", "Requests that are being answered.", counts.running),
            ("requests_waiting", "Requests that wait for memory.", admission.waiting),
            ("positions_used", "Positions that sessions have reserved.", admission.used),
            ("positions_free", "Positions for which there is memory.", admission.positions - admission.used),
            ("replicas", "Replicas that serve.", self._service.replicas),
            (
                "replicas_in_reserve",
                "Rings that are ready for when one is lost.",
                len(self._service.rings) - self._service.replicas,
            ),
        ):
            yield GaugeMetricFamily(f"shoal_{name}", said, value)
        if self._service.paying is not None:
            purse = self._service.paying.purse
            yield GaugeMetricFamily("shoal_paid_micro", "Promised to nodes, millionths.", purse.payments.spent_micro)
            yield GaugeMetricFamily("shoal_budget_micro", "What that may come to.", purse.budget_micro)
            yield GaugeMetricFamily("shoal_price_micro_per_h", "Of nodes at work.", purse.micro_per_h)
        token = GaugeMetricFamily("shoal_replica_token_ms", "What a token of one stream takes.", labels=["replica"])
        computing = GaugeMetricFamily("shoal_replica_computing_ms", "What of that is computing.", labels=["replica"])
        for ring in self._service.rings:
            token.add_metric([ring.name], ring.token_ms)
            computing.add_metric([ring.name], ring.computing_ms)
        yield from (token, computing)
        if self._keys is not None:
            yield from _used(self._keys().accounts)


def _used(accounts: Sequence[Account]) -> Iterator[Metric]:
    """What each key was used for, by its name: as many as there are keys."""
    counters: tuple[tuple[str, str, Callable[[Account], int]], ...] = (
        ("requests", "Requests of a key that were let in.", lambda one: one.requests),
        ("requests_limited", "Requests of a key that a limit held up.", lambda one: one.limited),
        ("prompt_tokens", "Tokens of its prompts.", lambda one: one.prompt_tokens),
        ("tokens", "Tokens that were generated for it.", lambda one: one.tokens),
    )
    for name, said, value in counters:
        family = CounterMetricFamily(f"shoal_key_{name}", said, labels=["key"])
        for account in accounts:
            family.add_metric([account.key.name], value(account))
        yield family
    running = GaugeMetricFamily("shoal_key_requests_running", "Requests of a key under way.", labels=["key"])
    for account in accounts:
        running.add_metric([account.key.name], account.running)
    yield running
