"""The OpenAI API as types: what a client may ask and what it is answered. Source: the API reference of OpenAI, for
`/v1/models`, `/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`.

What would change an answer and is not offered is refused with its name; what changes nothing (`user`, `metadata`, ...)
is taken and left. Unknown fields are refused, as OpenAI does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from shoal.protocol.serving import BIASES_MAX

BODY_MAX_BYTES = 2 << 20
MESSAGES_MAX = 2048
TEXT_MAX = 1 << 20
STOPS_MAX = 4
CHOICES_MAX = 16
TOP_LOGPROBS_MAX = 20

Text = Annotated[str, Meta(max_length=TEXT_MAX)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 24)]
Choices = Annotated[int, Meta(ge=1, le=CHOICES_MAX)]
Biases = Annotated[
    dict[Annotated[int, Meta(ge=0, lt=1 << 31)], Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=BIASES_MAX),
]
"""By token id."""
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Meta(max_length=STOPS_MAX)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TextPart(_Strict, frozen=True, kw_only=True):
    type: Literal["text"]
    text: Text


class ChatMessage(_Strict, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Meta(max_length=256)] | None = None
    name: Annotated[str, Meta(max_length=64)] | None = None
    refusal: Text | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(_Strict, frozen=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Strict, frozen=True, kw_only=True):
    name: Annotated[str, Meta(max_length=64)]
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: Text | None = None


class ResponseFormat(_Strict, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema(self) -> dict[str, Any] | None:
        """What the answer is held to."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.schema if self.type == "json_schema" and self.json_schema else None


class _Asked(_Strict, frozen=True, kw_only=True):
    """What both kinds of completion have."""

    model: Annotated[str, Meta(max_length=256)]
    temperature: Temperature | None = None
    top_p: Share | None = None
    n: Choices | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None
    logit_bias: Biases | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(_Asked, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    response_format: ResponseFormat | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    modalities: list[str] | None = None


class CompletionRequest(_Asked, frozen=True, kw_only=True):
    prompt: Text | Annotated[list[Any], Meta(min_length=1, max_length=TEXT_MAX)] = "<|endoftext|>"
    """A text, several, token ids, or several lists of token ids."""
    max_tokens: Tokens | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    """Not OpenAI's: the ids of the chosen tokens come along, as with vLLM."""
    best_of: Choices | None = None
    suffix: Text | None = None


class EmbeddingRequest(_Strict, frozen=True, kw_only=True):
    model: Annotated[str, Meta(max_length=256)]
    input: Text | Annotated[list[Any], Meta(min_length=1, max_length=TEXT_MAX)]
    """A text, several, token ids, or several lists of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None


# --- answers -------------------------------------------------------------------------------------------------------


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CameBy(msgspec.Struct, frozen=True):
    """Not OpenAI's: how an answer came about. Clients keep fields that they do not know."""

    exact: bool
    """Whether these are the very tokens of a run that no loss disturbed, whatever was lost."""
    replicas: tuple[str, ...]
    """Where they came from, in the order of their first use."""
    resumed: int
    """How many times it went on at another replica."""

    @property
    def fingerprint(self) -> str:
        return "shoal-exact" if self.exact else "shoal-inexact"


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct, frozen=True):
    role: str
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: str | None = None
    shoal: CameBy | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    shoal: CameBy | UnsetType = UNSET


class TextLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class TextCompletion(msgspec.Struct, frozen=True):
    """Also a chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None
    shoal: CameBy | UnsetType = UNSET


class Embedding(msgspec.Struct, frozen=True):
    index: int
    embedding: list[float] | str
    """Numbers, or little-endian float32 in base64."""
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of context; others that serve models call it so too."""
    object: str = "model"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"


class Trouble(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class TroubleAnswer(msgspec.Struct, frozen=True):
    error: Trouble
