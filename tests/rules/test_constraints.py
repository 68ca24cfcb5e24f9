"""Answers that are held to a JSON schema: whatever a model says, they fit it; and how they are cut into crossings
changes nothing."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shoal.gateway import constraints
from shoal.gateway.constraints import LIMITS, SCHEMA_MAX_BYTES, TRIED_MAX, Constraint, FormatBroken, JsonFormats
from shoal.gateway.refusals import RequestRefused
from shoal.inference.masks import unpacked
from shoal.inference.sampling import choose
from shoal.models.tokenizers import ByteTokenizer, FileTokenizer, TextTokenizer
from shoal.protocol.serving import Choosing

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["glad", "gloomy", "größer 🐟", None, 7]},
        "fish": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"kind": {"const": "cod"}, "kg": {"type": "number", "minimum": -1, "maximum": 2}},
                "required": ["kind", "kg"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["name", "age", "mood", "fish"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {"type": "object"},
    "person": PERSON,
    "list": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "string"}]}, "maxItems": 4},
    "number": {"type": "number"},
    "text": {"type": "string", "minLength": 2, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"},
    "tree": {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    },
}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """What of JSON Schema the schemas here use."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return any(fits(value, one, root) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = schema["type"]
    if kind == "object":
        properties = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", ())) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(properties))
            and all(fits(value[name], properties[name], root) for name in value if name in properties)
        )
    if kind == "array":
        few, many = schema.get("minItems", 0), schema.get("maxItems", 1 << 30)
        return (
            isinstance(value, list)
            and few <= len(value) <= many
            and all(fits(one, schema["items"], root) for one in value)
        )
    if kind == "string":
        short, long = schema.get("minLength", 0), schema.get("maxLength", 1 << 30)
        return isinstance(value, str) and short <= len(value) <= long
    if kind == "boolean":
        return isinstance(value, bool)
    right = isinstance(value, int) if kind == "integer" else isinstance(value, int | float)
    return right and schema.get("minimum", -float("inf")) <= value <= schema.get("maximum", float("inf"))


@functools.cache
def bpe() -> TextTokenizer:
    """A tokenizer with tokens of many bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    texts = [json.dumps({"name": "a b", "kind": "cod", "age": n, "fish": [n, {"kg": 1.5}]}) for n in range(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    return FileTokenizer(trained, Path("bpe"), Path("bpe"))


@functools.cache
def pieces() -> TextTokenizer:
    """As Llama 2 has it: pieces of words, spaces as their own sign, and bytes for what is in no piece."""
    words = [*'▁{}[]",:.-0123456789abcdefklmnoprsuy', '":"', '","', "co", "cod", "▁a", "na", "name"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("c", "o"), ("co", "d"), ("▁", "a"), ("n", "a")]
    made = Tokenizer(
        models.BPE({name: at for at, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(names[:3])
    return FileTokenizer(made, Path("pieces"), Path("pieces"))


TOKENIZERS: dict[str, Callable[[], TextTokenizer]] = {"bytes": ByteTokenizer, "bpe": bpe, "pieces": pieces}


@functools.cache
def constraint(schema: str, tokenizer: str = "bytes", ends: bool = True) -> Constraint:
    text = TOKENIZERS[tokenizer]()
    end = [] if text.end is None or not ends else [text.end]
    return asyncio.run(JsonFormats(text, end).constraint(SCHEMAS[schema]))


def written(
    held: Constraint, tokenizer: TextTokenizer, seed: int, guesses: Sequence[int] = (), most: int = 600
) -> tuple[str | None, list[int], int]:
    """What a model says that knows nothing (its text if it came to an end), and in how many crossings. `guesses` is
    guessed again and again."""
    said: list[int] = []
    sampling, vocabulary = Choosing(seed=seed), tokenizer.vocabulary + 5  # a model may have more rows than tokens
    for crossings in itertools.count(1):
        tried, masks = held.ahead(said, guesses, most - len(said) - 1)
        assert len(masks) == 1 + len(tried) and len(tried) <= min(TRIED_MAX, most - len(said) - 1)
        for at, allowed in enumerate(unpacked(masks, vocabulary)):
            logits = np.random.default_rng([seed, len(said)]).normal(0, 2, vocabulary).astype(np.float32)
            logits[: tokenizer.vocabulary] += 3.0 * np.isin(np.arange(tokenizer.vocabulary), tokenizer.encode('"}],0'))
            token = choose(logits, sampling, len(said), None, allowed).token
            if token == tokenizer.end:
                return tokenizer.decode(said), said, crossings
            said.append(token)
            if held.complete(said):
                return tokenizer.decode(said), said, crossings
            if at < len(tried) and token != tried[at]:
                break
        if len(said) >= most:
            return None, said, crossings
    raise AssertionError


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_whatever_is_said_fits_the_schema(schema: str, tokenizer: str) -> None:
    text = TOKENIZERS[tokenizer]()
    whole = 0
    for seed in range(12):
        said, _, _ = written(constraint(schema, tokenizer).copy(), text, seed)
        if said is not None:
            whole += 1
            assert fits(json.loads(said), SCHEMAS[schema], SCHEMAS[schema]), said
    assert whole >= 6


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(SCHEMAS)), st.sampled_from(list(TOKENIZERS)), st.integers(0, 1000), st.integers(0, 40))
def test_guesses_and_their_lengths_change_nothing(schema: str, tokenizer: str, seed: int, length: int) -> None:
    text = TOKENIZERS[tokenizer]()
    held = constraint(schema, tokenizer)
    _, plain, _ = written(held.copy(), text, seed, most=120)
    at = random.Random(seed).randrange(len(plain))
    _, guessed, _ = written(held.copy(), text, seed, plain[at : at + length], most=120)
    assert guessed == plain
    resumed = held.copy()  # as another gateway would: from the tokens alone
    assert resumed.ahead(plain[:at], (), 40) == held.copy().ahead(plain[:at], (), 40)
    tried, _ = resumed.ahead(plain[:at], plain[at:], 40)
    assert resumed.copy().ahead([], (), 40) == held.copy().ahead([], (), 40), "a copy begins anew"
    rest = plain[at:]  # what alone can follow may go on beyond it
    assert list(tried)[: len(rest)] == rest[: len(tried)], "what was said is allowed, and is what may be tried"


def test_guesses_whose_masks_are_large_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    held = constraint("person", "bpe")
    _, plain, _ = written(held.copy(), bpe(), 3)
    uncut, _ = held.copy().ahead([], plain, 31)
    monkeypatch.setattr("shoal.gateway.constraints.MASK_MAX_BYTES", 70)
    tried, masks = held.copy().ahead([], plain, 31)
    assert tried == uncut[: len(tried)] and 0 < len(tried) < len(uncut) and sum(map(len, masks)) <= 70
    assert written(held.copy(), bpe(), 3, plain)[1] == plain


def test_what_alone_can_follow_needs_no_crossing_of_its_own() -> None:
    held = constraint("person").copy()
    tried, masks = held.ahead([], (), 40)
    assert bytes(tried) == b'{"name":"' and len(masks) == len(tried) + 1
    assert np.flatnonzero(next(unpacked(masks, 257))).tolist() == [ord("{")]
    assert held.ahead([], b'{"wrong', 40)[0] == tried, "a guess that is not allowed is cut"
    assert bytes(held.ahead([], b'{"name":"ab","age":x', 40)[0]) == b'{"name":"ab","age":'
    assert bytes(held.ahead([], (), 3)[0]) == b'{"n'
    _, said, crossings = written(held, ByteTokenizer(), 1)
    assert crossings < 0.7 * len(said)


def test_a_long_row_of_what_alone_can_follow_holds_nobody_up() -> None:
    """Each look at it takes as long as it is: few are taken for one crossing."""
    held = asyncio.run(JsonFormats(ByteTokenizer(), [256]).constraint({"const": "x" * 50_000}))
    tried, masks = held.ahead([], [], 100)
    assert (len(tried), len(masks)) == (0, 1)
    assert len(constraint("person").ahead([], [], 100)[0]) > 5


def test_an_end_is_allowed_exactly_where_the_text_is_whole() -> None:
    held = constraint("number").copy()
    for text, whole in (("", False), ("1", True), ("-", False), ("-1.", False), ("-1.5", True), ("2e", False)):
        _, masks = held.copy().ahead(ByteTokenizer().encode(text).tolist(), (), 0)
        assert next(unpacked(masks, 257))[256] == whole, text
    held = constraint("object", ends=False).copy()  # a model without an end: it is over where nothing can follow
    assert not held.complete(list(b'{"a":1')) and held.complete(list(b'{"a":1}'))
    with pytest.raises(FormatBroken):
        constraint("object").copy().ahead(list(b"[1"), (), 1)


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"type": "wish"}, "Invalid type: wish"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "string", "format": "wish"}, "Unknown format: wish"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "held to this schema"),
        ({"description": "x" * SCHEMA_MAX_BYTES}, f"the limit is {SCHEMA_MAX_BYTES}"),
        ({"allOf": [{"anyOf": [{"required": [f"{n}{m}"]} for m in range(12)]} for n in range(6)]}, "too large"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(schema: dict[str, Any], part: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        asyncio.run(JsonFormats(ByteTokenizer(), [256]).constraint(schema))
    assert part in refused.value.sentence and refused.value.param == "response_format"


MANY = {"type": "object", "properties": {f"k{n}": {} for n in range(600)}, "additionalProperties": False}
"""Any of them may come first."""


@pytest.mark.parametrize(
    ("schema", "said", "limits"),
    [
        (MANY, b"{", {}),
        ({**MANY, "properties": {f"k{n}": {} for n in range(400)}}, b"{", {"step_max_items": 300}),
        ({"type": "string", "pattern": "^[a-z]{1,500}x{3,5}[a-z]*y$"}, b'"abcdefg', {"max_lexer_states": 30}),
        ({"type": "string", "pattern": "^(.*a.{1,20}){1,5}$"}, b'"', {"step_lexer_fuel": 30}),
    ],
)
def test_a_schema_that_turns_out_to_be_too_large_within_the_answer_is_refused(
    schema: dict[str, Any], said: bytes, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("initial_lexer_fuel", "step_lexer_fuel", "step_max_items", "max_lexer_states", "max_grammar_size")
    known = {name: getattr(LIMITS, name) for name in names}
    monkeypatch.setattr(constraints, "LIMITS", LLParserLimits(**known | limits, verbose_errors=False))
    held = asyncio.run(JsonFormats(ByteTokenizer(), [256]).constraint(schema))
    with pytest.raises(RequestRefused, match="The schema is too large: ") as refused:
        for at in range(len(said) + 1):
            held.ahead(list(said[:at]), (), 0)
    assert refused.value.param == "response_format"


def test_a_nest_of_schemas_is_refused_and_ends_nothing() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(900):
        schema = {"items": schema}
    with pytest.raises(RequestRefused, match="recursion limit"):
        asyncio.run(JsonFormats(ByteTokenizer(), [256]).constraint(schema))


def test_a_schemas_own_wishes_of_the_library_are_left_aside() -> None:
    schema = {"x-guidance": {"item_separator": ";", "lenient": True}, "enum": [[1, 2]]}
    held = asyncio.run(JsonFormats(ByteTokenizer(), [256]).constraint(schema))
    assert written(held, ByteTokenizer(), 1)[0] == "[1,2]"


def test_a_tokenizer_that_cannot_say_bytes_is_named() -> None:
    words = FileTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), Path("x"), Path("x"))
    with pytest.raises(RequestRefused, match="tokenizer does not allow"):
        asyncio.run(JsonFormats(words, []).constraint({"type": "object"}))
