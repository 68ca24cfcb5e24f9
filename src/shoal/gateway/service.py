"""What the endpoint does with a request, whatever HTTP has to do with it: prompt, streams, text, usage."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal.gateway import openai
from shoal.gateway.admission import Admission
from shoal.gateway.constraints import Constraint, JsonFormats
from shoal.gateway.embeddings import INPUTS_AT_ONCE, INPUTS_MAX, AskedVectors, pooled
from shoal.gateway.guesses import Draft
from shoal.gateway.openai import ChatRequest, CompletionRequest, EmbeddingRequest
from shoal.gateway.paying import Paying
from shoal.gateway.prompts import ChatTemplate
from shoal.gateway.refusals import BudgetSpent, RequestRefused, Stopping, UnknownModel, Unserved
from shoal.gateway.rings import Continuing, Replica, RingLost, are_exact
from shoal.gateway.routing import Candidate, choose
from shoal.gateway.streams import LOOK_S, REPLICAS_MAX, Stream, StreamLost, another
from shoal.gateway.text import Decoder, StopAt, spelled
from shoal.models.pooling import Pooling
from shoal.models.tokenizers import BadTokenizer, TextTokenizer
from shoal.protocol.serving import Choosing, Chosen
from shoal.world import Clock, Dice

COMPLETION_TOKENS = 16
"""What `/v1/completions` gives when it is not told, as at OpenAI."""
LONG_TEXT = 16_384
"""Characters from which on a text is made tokens beside the loop, which has streams to attend to."""
PROMPTS_TOTAL_MAX = 64
"""Choices of one request, over all its prompts."""

PATIENCE_S = 30.0
"""How long a stream that has lost its replica waits for another where none is left."""
STOP_S = 8.0
"""How long requests under way may go on when the endpoint is stopped: containers are killed after 10 s."""

_log = logging.getLogger("shoal.gateway")


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    prompts: tuple[tuple[int, ...], ...]
    choices: int
    sampling: Choosing
    tokens_max: int
    stops: tuple[str, ...]
    schema: dict[str, Any] | None = None
    """What answers are held to, a JSON schema."""

    @property
    def own(self) -> bool:
        """Whether Shoal's own runtime alone can answer it."""
        return self.schema is not None or self.sampling.top_logprobs is not None or bool(self.sampling.logit_bias)


@dataclass(frozen=True)
class Piece:
    """What came of a choice: text, with the tokens that were chosen for it."""

    index: int
    text: str
    tokens: tuple[Chosen, ...] = ()
    finish: str | None = None
    came_by: openai.CameBy | None = None
    """With the last piece."""


@dataclass
class Counts:
    """For the metrics page, and how quick a reply may be expected."""

    requests: int = 0
    refused: int = 0
    failed: int = 0
    running: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    resumed: int = 0
    """Streams that went on at another replica."""
    moved: int = 0
    """Streams that left a replica that wanted to go."""
    reused: int = 0
    """Positions of prompts that an earlier session had left."""
    receipts: int = 0
    receipts_disputed: int = 0
    receipts_missing: int = 0


@dataclass
class ModelService:
    """One model behind the endpoint."""

    name: str
    created: int
    """Unix seconds."""
    context: int
    tokenizer: TextTokenizer
    template: ChatTemplate
    ends: frozenset[int]
    rings: list[Replica]
    admission: Admission
    clock: Clock
    dice: Dice
    guess: bool = True
    draft: Draft | None = None
    """A small model that guesses."""
    pooling: Pooling | None = None
    """Where the model offers embeddings."""
    patience_s: float = PATIENCE_S
    generates: bool = True
    """Whether it says anything; one without a head does not."""
    counts: Counts = field(default_factory=Counts)
    paying: Paying | None = None
    """Where nodes that cost something serve."""

    def __post_init__(self) -> None:
        self._formats = JsonFormats(self.tokenizer, self.ends)
        self.stopping = False
        """No more requests are taken."""
        self._over = asyncio.Event()
        """What is still under way is to end."""

    @property
    def replicas(self) -> int:
        """That serve, not counting those in reserve."""
        return sum(not ring.standby for ring in self.rings)

    async def stop(self) -> None:
        """Take no more requests, and end what is still under way after STOP_S with Stopping."""
        self.stopping = True
        until = self.clock.monotonic() + STOP_S
        while (self.counts.running or self.admission.waiting) and self.clock.monotonic() < until:
            await self.clock.sleep(LOOK_S)
        self._over.set()
        self.admission.close()

    def refuse_unserved(self) -> None:
        """Raises Stopping, BudgetSpent, and Unserved while no replica is there."""
        if self.stopping:
            raise Stopping
        if self.paying is not None and self.paying.closing and all(one.leaving for one in self.rings):
            raise BudgetSpent(self.paying.closing)
        if not self.rings:
            raise Unserved(f"No node serves {self.name} at the moment.")

    # --- what is asked ---------------------------------------------------------------------------------------------

    async def chat(self, request: ChatRequest) -> Asked:
        """Raises RequestRefused, and what `ChatTemplate.render` does."""
        self._known(request.model)
        prompt = await self._encoded(await self.template.render(request.messages, self.clock.now_ms()), "messages")
        limit = request.max_completion_tokens or request.max_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
        schema = request.response_format.schema if request.response_format is not None else None
        return self._asked(request, (prompt,), limit, top, schema)

    async def completion(self, request: CompletionRequest) -> Asked:
        """Raises RequestRefused."""
        self._known(request.model)
        given = request.prompt
        several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        if len(several) > PROMPTS_TOTAL_MAX:
            raise RequestRefused(f"At most {PROMPTS_TOTAL_MAX} prompts are taken at once.", param="prompt")
        prompts = [
            await self._encoded(one, "prompt") if isinstance(one, str) else self._checked(one, "prompt")
            for one in several
        ]
        return self._asked(request, tuple(prompts), request.max_tokens or COMPLETION_TOKENS, request.logprobs)

    async def embedding(self, request: EmbeddingRequest) -> AskedVectors:
        """Raises RequestRefused."""
        self._known(request.model)
        if self.pooling is None:
            raise RequestRefused(
                f"{self.name} offers no embeddings: beside it lies no modules.json of sentence-transformers.",
                param="model",
                code="unsupported_model",
            )
        given = request.input
        several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        if len(several) > INPUTS_MAX:
            raise RequestRefused(f"At most {INPUTS_MAX} inputs are taken at once.", param="input")
        inputs = [
            await self._encoded(one, "input", special=True) if isinstance(one, str) else self._checked(one, "input")
            for one in several
        ]
        longest = min(self.context, self.pooling.positions or self.context)
        for number, tokens in enumerate(inputs):
            if not 1 <= len(tokens) <= longest:
                what = f"has {len(tokens)} tokens; up to {longest} are taken" if tokens else "is empty"
                raise RequestRefused(f"Input {number} {what}.", param="input")
        if request.dimensions is not None and request.dimensions > self.pooling.hidden:
            raise RequestRefused(f"This model's embeddings have {self.pooling.hidden} numbers.", param="dimensions")
        return AskedVectors(tuple(inputs), self.pooling, request.dimensions)

    def _known(self, model: str) -> None:
        if model != self.name:
            raise UnknownModel(
                f"The model `{model}` does not exist here; {self.name} is served.",
                param="model",
                code="model_not_found",
            )

    async def _encoded(self, text: str, param: str, *, special: bool = False) -> tuple[int, ...]:
        def encoded() -> tuple[int, ...]:
            return tuple(self.tokenizer.encode(text, special=special).tolist())

        try:
            return await asyncio.to_thread(encoded) if len(text) > LONG_TEXT else encoded()
        except BadTokenizer as error:
            raise RequestRefused(error.sentence, param=param) from error

    def _checked(self, tokens: object, param: str) -> tuple[int, ...]:
        known = self.tokenizer.vocabulary
        if not isinstance(tokens, list) or any(type(one) is not int or not 0 <= one < known for one in tokens):
            raise RequestRefused(f"{param} is a text, or a list of token ids below {known}.", param=param)
        return tuple(tokens)

    def _asked(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: tuple[tuple[int, ...], ...],
        limit: int | None,
        top: int | None,
        schema: dict[str, Any] | None = None,
    ) -> Asked:
        if not self.generates:
            raise RequestRefused(f"{self.name} gives embeddings alone: its files hold no head.", param="model")
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        longest = max(len(prompt) for prompt in prompts)
        if min(len(prompt) for prompt in prompts) < 1:
            raise RequestRefused("The prompt is empty.", param=param)
        if longest >= self.context:
            raise RequestRefused(
                f"This model's context is {self.context} tokens, and the prompt has {longest}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        if limit is not None and longest + limit > self.context:
            raise RequestRefused(
                f"This model's context is {self.context} tokens; the prompt has {longest} and {limit} are asked for. "
                "Shorten one of them.",
                param=param,
                code="context_length_exceeded",
            )
        choices = request.n or 1
        if choices * len(prompts) > PROMPTS_TOTAL_MAX:
            raise RequestRefused(f"At most {PROMPTS_TOTAL_MAX} choices are made for one request.", param="n")
        biases = request.logit_bias or {}
        unknown = next((token for token in biases if token >= self.tokenizer.vocabulary), None)
        if unknown is not None:
            raise RequestRefused(
                f"There is no token {unknown}; this model has {self.tokenizer.vocabulary}.", param="logit_bias"
            )
        seed = self._number() if request.seed is None else request.seed % (1 << 63)
        sampling = Choosing(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=seed,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            top_logprobs=top,
            logit_bias=tuple(biases.items()),
        )
        return Asked(prompts, choices, sampling, limit or self.context - longest, request.stops, schema)

    # --- what is answered ------------------------------------------------------------------------------------------

    async def answer(self, asked: Asked, whose: bytes = b"") -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come. Where requests of several wait, `whose` is who takes turns.

        Raises RequestRefused, Overloaded, Unserved, BudgetSpent, Stopping, StreamLost, RingRefused."""
        self.refuse_unserved()
        if asked.own and all(isinstance(one, Continuing) for one in self.rings):
            raise RequestRefused(
                f"Only engines of another make serve {self.name} at the moment; they offer no logprobs, logit_bias or "
                "response_format.",
                code="unsupported_parameter",
            )
        constraint = None if asked.schema is None else await self._formats.constraint(asked.schema)
        streams = [(prompt, number) for prompt in asked.prompts for number in range(asked.choices)]
        positions = sum(len(prompt) + asked.tokens_max for prompt, _ in streams)
        await self.admission.enter(positions, whose)
        began = self.clock.monotonic()
        self.counts.running += 1
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue(256)
        tasks = [
            asyncio.create_task(self._choice(index, prompt, number, asked, constraint, whose.hex(), pieces))
            for index, (prompt, number) in enumerate(streams)
        ]
        tasks.append(asyncio.create_task(self._tell_when_over(pieces)))
        left = len(streams)
        try:
            while left:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.finish is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            self.counts.running -= 1
            self.admission.leave(positions, self.clock.monotonic() - began)

    async def _tell_when_over(self, out: asyncio.Queue[Piece | BaseException]) -> None:
        await self._over.wait()
        await out.put(Stopping())

    async def _choice(
        self,
        index: int,
        prompt: tuple[int, ...],
        number: int,
        asked: Asked,
        constraint: Constraint | None,
        scope: str,
        out: asyncio.Queue[Piece | BaseException],
    ) -> None:
        sampling = msgspec.structs.replace(asked.sampling, choice=number, prompt_tokens=len(prompt))
        stream = Stream(
            prompt, sampling, asked.tokens_max, self.ends,
            lambda lost, arithmetic: self._pick(lost, prompt, asked.tokens_max, own=asked.own, arithmetic=arithmetic),
            self._number,
            self.clock, self.patience_s, guess=self.guess, draft=self.draft.session if self.draft else None,
            constraint=constraint and constraint.copy(), scope=scope,
        )  # fmt: skip
        decoder, stop = Decoder(self.tokenizer.decode), StopAt(asked.stops)
        self.counts.prompt_tokens += len(prompt)
        tokens = stream.tokens()
        try:
            async for chosen in tokens:
                self.counts.tokens += len(chosen)
                text = stop.add(decoder.add([one.token for one in chosen]))
                if stop.stopped:
                    await out.put(Piece(index, text, chosen, "stop", _came_by(stream)))
                    return
                await out.put(Piece(index, text, chosen))
            rest = stop.add(decoder.rest())
            finish = "stop" if stop.stopped else stream.finish
            await out.put(Piece(index, rest + stop.rest(), (), finish, _came_by(stream)))
        except Exception as error:  # noqa: BLE001 - whoever answers the request is told
            await out.put(error)
        finally:
            await tokens.aclose()
            self.counts.steps += stream.steps
            self.counts.resumed += len(stream.lost)
            self.counts.moved += stream.moved
            self.counts.reused += stream.reused

    async def embed(self, asked: AskedVectors, whose: bytes = b"") -> list[NDArray[np.float32]]:
        """A vector for each input. Raises Overloaded, Unserved, Stopping, StreamLost, RingRefused."""
        self.refuse_unserved()
        places = asyncio.Semaphore(INPUTS_AT_ONCE)

        async def one(tokens: tuple[int, ...]) -> NDArray[np.float32]:
            async with places:
                return await self._vector(tokens, asked, whose)

        tasks = [asyncio.create_task(one(tokens)) for tokens in asked.inputs]
        vectors, over = asyncio.gather(*tasks), asyncio.create_task(self._over.wait())
        all_of_them: tuple[asyncio.Future[Any], ...] = (*tasks, vectors, over)
        self.counts.running += 1
        try:
            await asyncio.wait(all_of_them[-2:], return_when=asyncio.FIRST_COMPLETED)
            if not vectors.done():
                raise Stopping
            return vectors.result()
        finally:
            self.counts.running -= 1
            for future in all_of_them:
                future.cancel()
            await asyncio.gather(*all_of_them, return_exceptions=True)

    async def _vector(self, tokens: tuple[int, ...], asked: AskedVectors, whose: bytes) -> NDArray[np.float32]:
        await self.admission.enter(len(tokens), whose)
        self.counts.prompt_tokens += len(tokens)
        began = self.clock.monotonic()
        lost: list[Replica] = []
        why = "."
        try:
            while len(lost) < REPLICAS_MAX:
                patience_s = self.patience_s if lost else 0.0
                ring = await another(lambda: self._pick(lost, tokens, 0, own=True), self.clock, patience_s)
                if ring is None:
                    break
                assert not isinstance(ring, Continuing)
                ring.streams += 1
                try:
                    return await pooled(tokens, asked, ring, self._number())
                except RingLost as error:
                    lost.append(ring)
                    why = f": {error.sentence}"
                finally:
                    ring.streams -= 1
            raise StreamLost(f"No replica is left to go on with{why}")
        finally:
            self.admission.leave(len(tokens), self.clock.monotonic() - began)

    def _pick(
        self, lost: Sequence[Replica], prompt: tuple[int, ...], tokens: int, *, own: bool, arithmetic: str = ""
    ) -> Replica | None:
        """The replica from which the answer is expected soonest, of those that can give it (`own`: only Shoal's own
        runtime can) and were not lost: one that stays before one that wants to go, one that goes on with the bits that
        there are before one that has others, one that works before one in reserve."""
        able = [one for one in self.rings if one not in lost and not (own and isinstance(one, Continuing))]
        if not able:
            if self.paying is not None and self.paying.closing and self.paying.spent and not self.rings:
                raise BudgetSpent(self.paying.closing)  # no other will come
            return None

        def rank(one: Replica) -> tuple[bool, bool, bool]:
            return one.leaving, bool(arithmetic) and one.arithmetic != arithmetic, one.standby

        first = min(map(rank, able))
        able = [one for one in able if rank(one) == first]
        candidates = [
            Candidate(one.name, one.token_ms, one.streams, one.start_ms, one.prefixes.held(prompt)) for one in able
        ]
        best, reason = choose(candidates, len(prompt), tokens)
        _log.debug("%s", reason)
        return able[best]

    def _number(self) -> int:
        return int.from_bytes(self.dice.bytes(8)) >> 1

    # --- as OpenAI says it -----------------------------------------------------------------------------------------

    def logprobs(self, chosen: Sequence[Chosen]) -> openai.ChoiceLogprobs:
        content = []
        for one in chosen:
            raw = self.tokenizer.bytes_of(one.token)
            tops = [(self.tokenizer.bytes_of(token), _finite(logprob)) for token, logprob in one.top]
            top = [openai.TopLogprob(spelled(other), logprob, list(other)) for other, logprob in tops]
            content.append(openai.TokenLogprob(spelled(raw), _finite(one.logprob), list(raw), top))
        return openai.ChoiceLogprobs(content)


def _came_by(stream: Stream) -> openai.CameBy:
    names = tuple(dict.fromkeys(one.name for one in stream.went))
    return openai.CameBy(are_exact(stream.went), names, len(stream.lost))


def _finite(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI says -9999 where a token is all but impossible."""
    return logprob if logprob is not None and math.isfinite(logprob) else -9999.0
