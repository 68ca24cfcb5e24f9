"""The official client of OpenAI, as its users call it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from test_gateway import GENEROUS_S, a_served, expected
from test_stages import a_checkpoint

from shoal.models.tokenizers import ByteTokenizer

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_checkpoint(tmp_path_factory.mktemp("served") / "model", "qwen2", vocab_size=257, eos_token_id=256)
    ByteTokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(
        "{%- for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}\n{%- endfor %}"
        "{%- if messages[0]['role'] == 'assistant' %}{{ raise_exception('the assistant does not begin') }}{% endif %}"
        "{%- if add_generation_prompt %}<assistant>{% endif %}"
    )
    return folder


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[openai.OpenAI]:
    with a_served(checkpoint, keys=("secret",)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="secret", timeout=GENEROUS_S, max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "shoal"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_a_chat(client: openai.OpenAI, checkpoint: Path) -> None:
    said = client.chat.completions.create(model="small", messages=HELLO, max_completion_tokens=16, temperature=0)  # type: ignore[arg-type]
    text = expected(checkpoint, "<system>Be brief.<user>hello<assistant>", 16)
    assert said.choices[0].message.content == text
    assert said.choices[0].finish_reason == "length" and said.usage is not None
    assert said.usage.completion_tokens == 16 and said.usage.total_tokens == said.usage.prompt_tokens + 16


def test_a_streamed_chat(client: openai.OpenAI, checkpoint: Path) -> None:
    stream = client.chat.completions.create(
        model="small", messages=HELLO, max_tokens=16, temperature=0, stream=True,  # type: ignore[arg-type]
        stream_options={"include_usage": True}, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == expected(checkpoint, "<system>Be brief.<user>hello<assistant>", 16)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 16
    told = [
        one for chunk in chunks for choice in chunk.choices if choice.logprobs for one in choice.logprobs.content or []
    ]
    assert len(told) == 16 and all(one.top_logprobs[0].logprob >= one.logprob - 1e-6 for one in told)


def test_how_an_answer_came_about(client: openai.OpenAI) -> None:
    """The client keeps what it does not know."""
    expected = {"exact": True, "replicas": ["this machine"], "resumed": 0}
    chat = {"model": "small", "messages": HELLO, "max_tokens": 5, "temperature": 0}
    said = client.chat.completions.create(**chat)  # type: ignore[call-overload]
    assert said.model_extra == {"shoal": expected} and said.system_fingerprint == "shoal-exact"
    chunks = list(client.chat.completions.create(**chat, stream=True))  # type: ignore[call-overload]
    assert chunks[-1].model_extra == {"shoal": expected} and chunks[-1].choices[0].finish_reason == "length"
    assert [chunk.system_fingerprint for chunk in chunks] == [None] * (len(chunks) - 1) + ["shoal-exact"]
    both = client.chat.completions.create(**chat, n=2, stream=True)  # type: ignore[call-overload]
    assert sum("shoal" in (chunk.model_extra or {}) for chunk in both) == 2, "each choice says it when it ends"
    text = client.completions.create(
        model="small", prompt="ab", max_tokens=5, temperature=0, extra_body={"return_token_ids": True}
    )
    assert text.model_extra == {"shoal": expected}
    ids = (text.choices[0].model_extra or {})["token_ids"]
    assert ByteTokenizer().decode(ids) == text.choices[0].text and len(ids) == 5


def test_choices_and_seeds(client: openai.OpenAI) -> None:
    def texts(**more: object) -> list[str | None]:
        said = client.chat.completions.create(model="small", messages=HELLO, max_tokens=12, n=3, **more)  # type: ignore[call-overload]
        return [choice.message.content for choice in said.choices]

    first = texts(seed=3)
    assert first == texts(seed=3) and len(set(first)) == 3
    assert first != texts(seed=4)
    assert len(set(texts(temperature=0))) == 1
    assert texts(seed=3, top_p=0.0) == texts(temperature=0)
    assert texts(temperature=0, presence_penalty=2.0) != texts(temperature=0)


def test_completions(client: openai.OpenAI, checkpoint: Path) -> None:
    said = client.completions.create(model="small", prompt=["ab", "cd"], max_tokens=8, temperature=0, logprobs=2)
    assert [choice.text for choice in said.choices] == [expected(checkpoint, text, 8) for text in ("ab", "cd")]
    assert said.choices[0].logprobs is not None and len(said.choices[0].logprobs.tokens or []) == 8
    streamed = client.completions.create(model="small", prompt="ab", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == said.choices[0].text


def test_tokens_that_are_a_part_of_a_character_are_known_by_their_bytes(client: openai.OpenAI) -> None:
    """Half of this model's tokens are."""
    said = client.chat.completions.create(
        model="small", messages=HELLO, max_tokens=16, seed=1, logprobs=True, top_logprobs=20,  # type: ignore[arg-type]
        logit_bias={"226": 100},
    )  # fmt: skip
    assert said.choices[0].logprobs is not None
    for one in said.choices[0].logprobs.content or []:
        assert (one.token, one.bytes) == ("\\xe2", [226])
        known = {tuple(top.bytes or ()) for top in one.top_logprobs}
        assert len(known) == 20 and (0xEF, 0xBF, 0xBD) not in known
    text = client.completions.create(model="small", prompt="ab", max_tokens=40, seed=1, logprobs=5)
    told = text.choices[0].logprobs
    assert told is not None and told.tokens and told.top_logprobs and told.text_offset
    assert all(len(top) == 5 for top in told.top_logprobs), "no two have one name"
    assert any(token.startswith("bytes:\\x") for token in told.tokens)
    for before, token, offset in zip(["", *told.tokens], told.tokens, told.text_offset, strict=False):
        if len(token) == 1 and not before.startswith("bytes:"):
            assert text.choices[0].text[offset] == token


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="not known"):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="context is 512") as refused:
        client.chat.completions.create(model="small", messages=HELLO, max_tokens=9999)  # type: ignore[arg-type]
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="the assistant does not begin"):
        client.chat.completions.create(model="small", messages=[{"role": "assistant", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="Tools are not offered"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model="small", messages=HELLO, tools=[tool])  # type: ignore[list-item,arg-type]
