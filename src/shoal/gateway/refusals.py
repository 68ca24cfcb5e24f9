"""Why a request is not served, in the shape and with the status codes of the OpenAI API."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from shoal.errors import BadInput, EngineError
from shoal.gateway.openai import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Trouble,
    TroubleAnswer,
)

R = TypeVar("R", ChatRequest, CompletionRequest, EmbeddingRequest)
C = TypeVar("C", ChatRequest, CompletionRequest)


class RequestRefused(BadInput):
    """A request to the endpoint cannot be served as it is."""

    code = "SH-170"
    status = 400
    kind: str = "invalid_request_error"

    def __init__(self, sentence: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.param, self.openai_code = param, code

    @property
    def answer(self) -> TroubleAnswer:
        return TroubleAnswer(Trouble(self.sentence, self.kind, self.param, self.openai_code))


class UnknownModel(RequestRefused):
    """A request names a model that is not served here."""

    code = "SH-171"
    status = 404


class KeyRefused(RequestRefused):
    """A request came without an API key, or with one that is not known."""

    code = "SH-172"
    status = 401


class TooLarge(RequestRefused):
    """A request's body is larger than the endpoint reads."""

    code = "SH-173"
    status = 413


class TooSlow(RequestRefused):
    """A request's body does not come."""

    code = "SH-180"
    status = 408


class LimitReached(RequestRefused):
    """A request is beyond what its API key may be used for, now or ever."""

    code = "SH-178"
    status = 429

    def __init__(self, sentence: str, kind: str, retry_after_s: float) -> None:
        """`kind`: `requests` or `tokens`. `retry_after_s` is infinite for what could never be let in."""
        super().__init__(sentence, code="rate_limit_exceeded")
        self.kind, self.retry_after_s = kind, retry_after_s


class Overloaded(EngineError):
    """Memory or queue are full; the request may be sent again, unless it is more than there is room for at all."""

    code = "SH-571"

    def __init__(self, sentence: str, retry_after_s: float) -> None:
        """`retry_after_s` is infinite for what could never be let in."""
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Unserved(EngineError):
    """Nothing is there at the moment that could serve the model."""

    code = "SH-572"


class BudgetSpent(Unserved):
    """The money for nodes that cost something is used up, and none that costs nothing serves the model."""

    code = "SH-579"


class Stopping(Unserved):
    """The endpoint is being stopped: nobody is let in, and what is under way ends soon."""

    code = "SH-578"
    retry_after_s = 10.0

    def __init__(self) -> None:
        super().__init__("The endpoint is stopping; send the request again when it is back, or to another one.")


NOT_OFFERED = {
    "tools": "Tools are not offered; leave them out.",
    "tool_choice": "Tools are not offered; leave tool_choice out.",
    "suffix": "suffix is not offered; leave it out.",
    "best_of": "best_of is not offered; ask for n choices and take the best of them.",
    "echo": "echo is not offered; the prompt is yours already.",
}


def read_chat(body: bytes) -> ChatRequest:
    """Raises RequestRefused."""
    request = _without_options(_read(body, ChatRequest))
    if request.modalities not in (None, ["text"]):
        raise RequestRefused("Only text is offered.", param="modalities")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestRefused("top_logprobs asks for logprobs to be true.", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestRefused("Set max_tokens or max_completion_tokens, not both.", param="max_tokens")
    wanted = request.response_format
    if wanted is not None and wanted.type == "json_schema" and wanted.schema is None:
        raise RequestRefused("json_schema asks for json_schema.schema.", param="response_format.json_schema.schema")
    return request


def read_completion(body: bytes) -> CompletionRequest:
    """Raises RequestRefused."""
    return _without_options(_read(body, CompletionRequest))


def read_embedding(body: bytes) -> EmbeddingRequest:
    """Raises RequestRefused."""
    return _read(body, EmbeddingRequest)


def _read(body: bytes, kind: type[R]) -> R:
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        said, _, path = str(error).partition(" - at ")
        param = _param(path, said)
        raise RequestRefused(_sentence(said, param), param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(f"The body is not JSON: {error}.") from error
    return request


def _without_options(request: C) -> C:
    for name, sentence in NOT_OFFERED.items():
        if getattr(request, name, None):
            raise RequestRefused(sentence, param=name, code="unsupported_parameter")
    if request.stream_options is not None and not request.stream:
        raise RequestRefused("stream_options is for streams only.", param="stream_options")
    return request


def _sentence(said: str, param: str | None) -> str:
    unknown = re.match(r"Object contains unknown field `(.*)`", said)
    if unknown:
        return f"Unrecognized request argument supplied: {unknown[1]}."
    return f"{param}: {said}." if param and param not in said else f"{said}."


def _param(path: str, said: str) -> str | None:
    """The field that a message of the decoder speaks of: `$.messages[0].role` -> `messages[0].role`."""
    named = re.search(r"field `(.*?)`", said)
    place = path.strip("`").removeprefix("$").removeprefix(".")
    if named:
        return f"{place}.{named[1]}" if place else named[1]
    return place or None
