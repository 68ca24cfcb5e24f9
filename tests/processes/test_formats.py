"""Answers held to JSON, and tokens with a bias, at an endpoint of two stages with a model that says nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from test_gateway import GENEROUS_S, a_doomed_replica, a_served, events, with_endpoint
from test_stages import a_checkpoint
from transformers import AutoModelForCausalLM

from shoal.models.tokenizers import ByteTokenizer
from shoal.sdk.serve import LocalServer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["glad", "größer 🐟", None]},
        "fish": {
            "type": "array",
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"kg": {"type": "number", "minimum": -1, "maximum": 2}},
                "required": ["kg"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["name", "age", "mood", "fish"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    said = json.loads(text)
    assert list(said) == ["name", "age", "mood", "fish"]
    assert isinstance(said["name"], str) and len(said["name"]) <= 8
    assert isinstance(said["age"], int) and 0 <= said["age"] <= 150
    assert said["mood"] in PERSON["properties"]["mood"]["enum"]
    return len(said["fish"]) <= 3 and all(set(one) == {"kg"} and -1 <= one["kg"] <= 2 for one in said["fish"])


ASK: list[Any] = [{"role": "user", "content": "Who are you? Answer in JSON."}]
OBJECT = {"type": "json_object"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
SHORT = {str(ord('"')): 4, str(ord("}")): 4, str(ord("{")): -100, str(ord("[")): -100}
"""Texts come to an end; one that is held to begin with a brace does so all the same."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_checkpoint(tmp_path_factory.mktemp("served") / "model", "llama", vocab_size=257, eos_token_id=256)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[openai.OpenAI]:
    with a_served(checkpoint, cuts=(1,)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=GENEROUS_S, max_retries=0)


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**({"model": "small", "messages": ASK, "max_tokens": 200} | more))


def test_every_answer_that_ends_is_a_json_object(client: openai.OpenAI) -> None:
    whole = 0
    for sampling in ({"temperature": 0}, {"seed": 1}, {"seed": 2, "temperature": 1.7, "top_p": 0.9}):
        said = chat(client, n=4, response_format=OBJECT, logit_bias=SHORT, **sampling)
        assert said.choices == chat(client, n=4, response_format=OBJECT, logit_bias=SHORT, **sampling, **(
            {} if "seed" in sampling else {"seed": 8}
        )).choices  # fmt: skip
        for choice in said.choices:
            assert choice.message.content.startswith("{")
            if choice.finish_reason == "stop":
                whole += 1
                assert isinstance(json.loads(choice.message.content), dict)
    assert whole >= 6


@pytest.mark.parametrize("penalties", [{}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}])
def test_every_answer_that_ends_fits_the_schema(client: openai.OpenAI, penalties: dict[str, float]) -> None:
    said = chat(client, n=6, seed=5, response_format=SCHEMA, **penalties)
    ended = [choice.message.content for choice in said.choices if choice.finish_reason == "stop"]
    assert len(ended) >= 4 and len(set(ended)) == len(ended)
    for text in ended:
        assert is_person(text), text
    stream = chat(client, n=6, seed=5, response_format=SCHEMA, stream=True, **penalties)
    texts = [""] * 6
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in said.choices]


def test_an_answer_may_end_at_its_last_token_or_at_a_stop(client: openai.OpenAI) -> None:
    fixed = {"type": "object", "properties": {"a": {"const": "no"}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "fixed", "schema": fixed}}
    text = '{"a":"no"}'
    for tokens, finish in ((len(text), "stop"), (len(text) - 1, "length"), (1, "length")):
        (choice,) = chat(client, response_format=wanted, max_tokens=tokens).choices
        assert (choice.message.content, choice.finish_reason) == (text[:tokens], finish)
    (choice,) = chat(client, response_format=wanted, stop='"no').choices
    assert (choice.message.content, choice.finish_reason) == ('{"a":', "stop")
    plain = {"type": "json_schema", "json_schema": {"name": "text", "schema": {"enum": ["größer 🐟"]}}}
    assert json.loads(chat(client, response_format=plain).choices[0].message.content) == "größer 🐟"


def test_log_probabilities_are_the_models_own_also_of_tokens_that_alone_could_follow(
    client: openai.OpenAI, checkpoint: Path
) -> None:
    said = chat(client, seed=5, response_format=SCHEMA, logprobs=True, max_tokens=40)
    (choice,) = said.choices
    assert (
        choice.message.content == chat(client, seed=5, response_format=SCHEMA, max_tokens=40).choices[0].message.content
    )
    prompt = ByteTokenizer().encode("user: Who are you? Answer in JSON.\nassistant:").tolist()
    tokens = ByteTokenizer().encode(choice.message.content).tolist()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(torch.tensor([prompt + tokens])).logits[0]
    expected = torch.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]
    told = [one.logprob for one in choice.logprobs.content]
    assert len(told) == said.usage.completion_tokens == 40
    assert told == pytest.approx([float(row[token]) for row, token in zip(expected, tokens, strict=True)], abs=1e-3)


def test_a_bias_bans_and_prefers_tokens(client: openai.OpenAI) -> None:
    banned = {str(byte): -100 for byte in range(128, 257)}  # nothing but ASCII, and no end
    said = chat(client, n=3, seed=1, temperature=1.5, logit_bias=banned)
    assert all(choice.message.content.isascii() and choice.finish_reason == "length" for choice in said.choices)
    assert chat(client, max_tokens=9, logit_bias={"65": 100}).choices[0].message.content == "A" * 9
    text = client.completions.create(model="small", prompt="x", max_tokens=9, logit_bias={"66": 100}).choices[0].text
    assert text == "B" * 9


MANY = {"type": "object", "properties": {f"k{n}": {} for n in range(600)}, "additionalProperties": False}
"""Too large, which shows after the brace."""


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"response_format": SCHEMA | {"json_schema": {"name": "x", "schema": MANY}}}, "response_format", "too large"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, None, "json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": SCHEMA | {"json_schema": {"name": "x", "schema": {"not": {}}}}}, None, 'keys: ["not"]'),
        ({"response_format": SCHEMA | {"json_schema": {"name": "x", "schema": {"type": 5}}}}, None, "type"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "no token 257"),
        ({"logit_bias": {"-1": 1}}, None, ">= 0"),
        ({"logit_bias": {"x": 1}}, None, "int"),
        ({"logit_bias": {"1": 101}}, None, "<= 100"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias", "300"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_kept_is_refused(
    client: openai.OpenAI, body: dict[str, Any], param: str | None, part: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, stream=stream, **body)
    assert part in refused.value.message
    assert param is None or refused.value.param == param


def test_a_format_holds_where_a_replica_is_killed(checkpoint: Path) -> None:
    """In the middle, at several places: the same text."""

    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        service = server.service
        assert service is not None
        body = {"model": "small", "messages": ASK, "max_tokens": 120, "seed": 5, "response_format": SCHEMA}
        undisturbed = (await web.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
        for position in (1, 3, 6):
            async with a_doomed_replica(checkpoint, service) as kill:
                said, pieces = "", 0
                async with web.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            said += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
                            pieces += 1
                            if pieces == position:
                                kill(position % 2)
                assert said == undisturbed, position
        assert service.counts.resumed > 0
        assert is_person(undisturbed)
        steps = service.counts.steps
        await events(web, "/v1/chat/completions", {**body, "stream": True})
        assert service.counts.steps - steps < 0.8 * len(undisturbed.encode()), "what alone can follow comes along"

    with_endpoint(checkpoint, scene)
