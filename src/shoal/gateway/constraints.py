"""Answers that are JSON: which tokens may follow, by a grammar that is made of a JSON schema (`llguidance`).

The gateway knows the tokenizer, the stages do not: for each token that it wants it says which ones are allowed, as a
mask. A mask follows from the schema and the tokens given out, and from nothing else, so a stream that goes on at
another replica is held to the same. Where one token alone can follow (`"` and the rest of a property's name, for one),
it is tried as guessed tokens are, and always holds: one crossing brings it and what comes after it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from shoal.errors import EngineError
from shoal.gateway.refusals import RequestRefused
from shoal.inference.masks import packed
from shoal.models.tokenizers import TextTokenizer
from shoal.protocol.serving import MASK_MAX_BYTES

SCHEMA_MAX_BYTES = 64 * 1024
TRIED_MAX = 31
"""Tokens before the last one of a crossing: a stage takes so few for a stream's, not for a prompt."""
FORCED_MAX = 4096
"""Tokens that alone can follow, over all those tried for a crossing: each time the whole row of them is found anew."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=250_000,
    verbose_errors=False,
)
"""What a grammar may take: some tens of milliseconds to make of most schemas, some milliseconds a token, and 100 MB."""
OPTIONS_KEY = "x-guidance"
"""Under this name a schema could set options of the library."""
NO_END = "<|no end|>"
PARAM = "response_format"
BEYOND_LIMITS = re.compile(r"too (many|big|large)|max is", re.IGNORECASE)
"""How the library says that a grammar needs more than LIMITS allow, which of some shows only within the answer."""


class FormatBroken(EngineError):
    """A stream that is held to a format cannot go on within it."""

    code = "SH-577"


class Constraint:
    """What an answer is held to, one for each choice."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._taken = 0
        """How many of the tokens given out the matcher has."""

    def copy(self) -> Constraint:
        """A fresh one of the same grammar."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Constraint(matcher)

    def ahead(self, said: Sequence[int], guess: Sequence[int], most: int) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """After the tokens `said`: which ones to try in the next crossing, at most `most` (those of `guess` that are
        allowed, and those that alone can follow); for each of them and the one after, a mask. Raises FormatBroken;
        RequestRefused where the schema turns out to be too large."""
        self._follow(said)
        tried: list[int] = []
        masks: list[bytes] = []
        walked = size = before = found = 0
        try:
            while True:
                forced = self._matcher.compute_ff_tokens()
                mask = 1 << forced[0] if forced else int.from_bytes(self._matcher.compute_bitmask(), "little")
                self._check()
                found += len(forced)
                masks.append(packed(mask, before))
                before = mask
                size += len(masks[-1])
                if tried and size > MASK_MAX_BYTES:
                    return tuple(tried[:-1]), tuple(masks[:-1])
                token, guess = _next(forced, guess)
                if token is None or len(tried) >= min(most, TRIED_MAX) or found > FORCED_MAX:
                    break
                if not self._matcher.try_consume_tokens([token]):
                    break
                walked += 1
                if self._matcher.is_stopped():  # the answer is whole with it, nothing can be chosen after it
                    break
                tried.append(token)
        finally:
            self._matcher.rollback(walked)
        return tuple(tried), tuple(masks)

    def complete(self, said: Sequence[int]) -> bool:
        """Whether nothing can follow the tokens `said` but the end."""
        self._follow(said)
        return bool(self._matcher.is_stopped())

    def _follow(self, said: Sequence[int]) -> None:
        fresh = list(said[self._taken :])
        if fresh:
            self._matcher.consume_tokens(fresh)
            self._check()
            self._taken = len(said)

    def _check(self) -> None:
        if self._matcher.is_error():
            why = self._matcher.get_error()
            if BEYOND_LIMITS.search(why):
                raise RequestRefused(f"The schema is too large: {_in_a_line(why)}.", param=PARAM)
            raise FormatBroken(f"The answer cannot go on in its format: {_in_a_line(why)}.")


def _next(forced: Sequence[int], guess: Sequence[int]) -> tuple[int | None, Sequence[int]]:
    """The token to try next, and what of the guess is left after it."""
    if not forced:
        return (guess[0], guess[1:]) if guess else (None, ())
    return forced[0], guess[1:] if guess and guess[0] == forced[0] else ()


class JsonFormats:
    """Makes constraints for one model."""

    def __init__(self, tokenizer: TextTokenizer, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = sorted(end for end in ends if end < tokenizer.vocabulary)
        self._library: LLTokenizer | None = None
        self._making = asyncio.Lock()
        """One grammar at a time: a large one takes a processor a while."""

    async def constraint(self, schema: dict[str, Any]) -> Constraint:
        """Of a JSON schema. Raises RequestRefused with what is wrong with it."""
        async with self._making:
            return await asyncio.to_thread(self._made, schema)

    def _made(self, schema: dict[str, Any]) -> Constraint:
        text = msgspec.json.encode({name: value for name, value in schema.items() if name != OPTIONS_KEY})
        if len(text) > SCHEMA_MAX_BYTES:
            raise RequestRefused(f"The schema has {len(text)} bytes; the limit is {SCHEMA_MAX_BYTES}.", param=PARAM)
        if self._library is None:
            self._library = self._read_tokenizer()
        try:
            # No spaces between: fewer tokens, more of them known beforehand, and no model that pads without end.
            grammar = LLMatcher.grammar_from_json_schema(text.decode(), overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise _unkept(str(error)) from error
        matcher = LLMatcher(self._library, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars fail at their first token
        if matcher.is_error():
            raise _unkept(matcher.get_error())
        return Constraint(matcher)

    def _read_tokenizer(self) -> LLTokenizer:
        tokenizer: Any = self._tokenizer.of_library()
        ends = self._ends
        try:
            if not ends:  # the library wants one; this one is beyond what the model can choose
                tokenizer = Tokenizer.from_str(tokenizer.to_str())
                tokenizer.add_special_tokens([AddedToken(NO_END, special=True)])
                ends = [tokenizer.token_to_id(NO_END)]
            return LLTokenizer(tokenizer.to_str(), eos_token=ends)
        except ValueError as error:
            raise RequestRefused(
                f"This model's tokenizer does not allow answers to be held to a format: {_in_a_line(str(error))}.",
                param=PARAM,
            ) from error


def _unkept(why: str) -> RequestRefused:
    return RequestRefused(f"No answer can be held to this schema: {_in_a_line(why)}.", param=PARAM)


def _in_a_line(text: str) -> str:
    """Of a library's message, to end a sentence with."""
    return " ".join(text.split())[:300].rstrip(".")
