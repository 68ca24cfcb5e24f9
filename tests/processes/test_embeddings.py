"""Embeddings, as the official client asks for them, against plain transformers: a checkpoint as Qwen3-Embedding is
one, whose files hold the bare model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_gateway import GENEROUS_S, a_served, with_endpoint
from test_stages import SMALL
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModel

from shoal.gateway import service
from shoal.models.configs import BadModel, read_config
from shoal.models.pooling import read_pooling
from shoal.models.tokenizers import ByteTokenizer, load_tokenizer
from shoal.sdk.serve import LocalServer

TEXTS = ["a fish", "many fish, of which one is größer 🐟 than all the others" * 3, ""]
HIDDEN = SMALL["hidden_size"]


def write_pooling(folder: Path, mode: str, normalized: bool) -> None:
    kinds = ["Transformer", "Pooling", "Normalize"][: 3 if normalized else 2]
    modules = [
        {
            "idx": at,
            "name": str(at),
            "path": f"{at}_{kind}" if at else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for at, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    settings = {f"pooling_mode_{one}": one == mode for one in modes}
    settings |= {"word_embedding_dimension": HIDDEN, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeds") / "model"
    torch.manual_seed(5)
    small = SMALL | {"vocab_size": 257, "eos_token_id": 256, "head_dim": 16, "tie_word_embeddings": True}
    AutoModel.from_config(AutoConfig.for_model("qwen3", **small)).save_pretrained(folder)
    names = set(load_file(folder / "model.safetensors"))
    assert "norm.weight" in names and "lm_head.weight" not in names
    ByteTokenizer().save(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", [(end, 256)])
    tokenizer.enable_truncation(16)  # as files may ask for; who calls decides
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_pooling(folder, "lasttoken", True)
    return folder


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[openai.OpenAI]:
    with a_served(checkpoint, cuts=(1,)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=GENEROUS_S, max_retries=0)


def ids_of(text: str) -> list[int]:
    return [*text.encode(), 256]


def expected(folder: Path, ids: list[int], mode: str = "lasttoken", normalized: bool = True) -> NDArray[np.float32]:
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0]
    vector = {"lasttoken": states[-1], "cls": states[0], "mean": states.mean(0)}[mode].numpy()
    return vector / np.linalg.norm(vector) if normalized else vector


def test_embeddings_are_those_of_transformers(client: openai.OpenAI, checkpoint: Path) -> None:
    vectors = [expected(checkpoint, ids_of(text)) for text in TEXTS]
    said = client.embeddings.create(model="small", input=TEXTS)  # in base64
    assert [one.index for one in said.data] == [0, 1, 2] and said.model == "small"
    for one, vector in zip(said.data, vectors, strict=True):
        assert np.allclose(one.embedding, vector, atol=1e-5) and np.linalg.norm(one.embedding) == pytest.approx(
            1, abs=1e-5
        )
    assert said.usage.prompt_tokens == said.usage.total_tokens == sum(len(ids_of(text)) for text in TEXTS)
    numbers = client.embeddings.create(model="small", input=TEXTS[1], encoding_format="float")
    assert numbers.data[0].embedding == pytest.approx(said.data[1].embedding, abs=1e-7)
    for given in (ids_of(TEXTS[0]), [ids_of(TEXTS[0])]):
        ids: Any = given
        assert np.array_equal(
            client.embeddings.create(model="small", input=ids).data[0].embedding, said.data[0].embedding
        )
    cut = client.embeddings.create(model="small", input=TEXTS[1], dimensions=10).data[0].embedding
    assert np.allclose(cut, vectors[1][:10] / np.linalg.norm(vectors[1][:10]), atol=1e-5)
    chat = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "x"}], max_tokens=3)
    assert chat.usage is not None and chat.usage.completion_tokens == 3, "it says something, too"


def test_many_inputs_at_once(client: openai.OpenAI, checkpoint: Path) -> None:
    texts = [f"text {number} " + "x" * (number % 90) for number in range(60)]
    said = client.embeddings.create(model="small", input=texts)
    assert [one.index for one in said.data] == list(range(60))
    for number in (0, 17, 59):
        assert np.allclose(said.data[number].embedding, expected(checkpoint, ids_of(texts[number])), atol=1e-5)


@pytest.mark.parametrize(("inputs", "stop_s", "status"), [(["fish"] * 60, 60.0, 200), (["x" * 500] * 1000, 0.1, 503)])
def test_inputs_under_way_when_the_endpoint_stops(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], stop_s: float, status: int
) -> None:
    """As many as are taken one after another: all of them are answered, or none."""
    monkeypatch.setattr(service, "STOP_S", stop_s)

    async def scene(web: httpx.AsyncClient, server: LocalServer) -> None:
        serving = server.service
        assert serving is not None
        asking = asyncio.create_task(web.post("/v1/embeddings", json={"model": "small", "input": inputs}))
        while not serving.counts.running:
            await asyncio.sleep(0.001)
        await server.stop()
        answer = await asking
        assert answer.status_code == status, answer.text
        assert serving.admission.used == serving.counts.running == 0

    with_endpoint(checkpoint, scene)


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"input": []}, "input", "length >= 1"),
        ({"input": [[]]}, "input", "Input 0 is empty"),
        ({"input": "x" * 600}, "input", "has 601 tokens; up to 512 are taken"),
        ({"input": ["a", 5]}, "input", "token ids below 257"),
        ({"input": [300]}, "input", "token ids below 257"),
        ({"input": ["x"] * 2049}, "input", "At most 2048"),
        ({"input": "x", "dimensions": 65}, "dimensions", "have 64 numbers"),
        ({"input": "x", "encoding_format": "xml"}, "encoding_format", "xml"),
        ({"input": "x", "wish": 1}, "wish", "Unrecognized"),
        ({}, "input", "required"),
    ],
)
def test_what_cannot_be_embedded_is_refused(client: openai.OpenAI, body: dict[str, Any], param: str, part: str) -> None:
    answer = httpx.post(f"{client.base_url}embeddings", json={"model": "small"} | body, timeout=GENEROUS_S)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert part in error["message"]


@pytest.mark.parametrize(("mode", "name", "normalized"), [("mean", "mean_tokens", False), ("cls", "cls_token", True)])
def test_other_poolings(checkpoint: Path, tmp_path: Path, mode: str, name: str, normalized: bool) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    (folder / "modules.json").unlink()
    write_pooling(folder, name, normalized)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 200, "do_lower_case": false}')
    text = "x" * 199
    with a_served(folder) as url:
        web = openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=GENEROUS_S, max_retries=0)
        (said,) = web.embeddings.create(model="small", input=text).data
        assert np.allclose(said.embedding, expected(checkpoint, ids_of(text), mode, normalized), atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="up to 200"):
            web.embeddings.create(model="small", input=text + "x")


def test_a_model_without_pooling_offers_none(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(checkpoint / name)
    with a_served(folder) as url:
        web = openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=GENEROUS_S, max_retries=0)
        with pytest.raises(openai.BadRequestError, match="small offers no embeddings"):
            web.embeddings.create(model="small", input="x")
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            web.embeddings.create(model="other", input="x")


def test_a_model_without_a_head_embeds_and_says_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(6)
    small = SMALL | {"vocab_size": 257, "tie_word_embeddings": False}
    AutoModel.from_config(AutoConfig.for_model("llama", **small)).save_pretrained(folder)
    ByteTokenizer().save(folder)
    with pytest.raises(BadModel, match="hold no head, so it says nothing"), a_served(folder):
        pass
    write_pooling(folder, "mean_tokens", True)
    with a_served(folder, cuts=(2,)) as url:
        web = openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=GENEROUS_S, max_retries=0)
        (said,) = web.embeddings.create(model="small", input="many fish" * 20).data
        assert np.allclose(said.embedding, expected(folder, list(b"many fish" * 20), "mean"), atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="gives embeddings alone"):
            web.completions.create(model="small", prompt="x")


@pytest.mark.parametrize(
    ("file", "said", "part"),
    [
        ("modules.json", "{", "not what sentence-transformers writes"),
        ("modules.json", "[]", "lists nothing"),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": ""}]', "a folder beside it"),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": ".."}]', "a folder beside it"),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "../x"}]', "a folder beside it"),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "/x"}]', "a folder beside it"),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Pooling"}, {"type": "a.Dense"}]', "Pooling, Dense"),
        ("modules.json", "[" + '{"type": "a"},' * 40 + '{"type": "a"}]', "41 modules"),
        ("modules.json", " " * 70_000, "larger than 65536 bytes"),
        (
            "1_Pooling/config.json",
            '{"pooling_mode_max_tokens": true}',
            "pooling pooling_mode_max_tokens is not offered",
        ),
        ("1_Pooling/config.json", '{"pooling_mode": "weird"}', "pooling weird is not offered"),
        ("1_Pooling/config.json", "{}", "pooling that is none is not offered"),
        ("1_Pooling/config.json", '{"pooling_mode_lasttoken": true, "pooling_mode_cls_token": true}', "is not offered"),
        ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case"),
        ("config.json", "is_causal", "attend to what follows"),
    ],
)
def test_a_pooling_that_is_not_followed_is_named(
    checkpoint: Path, tmp_path: Path, file: str, said: str, part: str
) -> None:
    config = read_config(checkpoint)
    write_pooling(tmp_path, "lasttoken", True)
    if said == "is_causal":
        config = json.dumps(json.loads(config) | {"is_causal": False})
    else:
        (tmp_path / file).write_text(said)
    with pytest.raises(BadModel) as bad:
        read_pooling(tmp_path, config, HIDDEN)
    assert part in bad.value.sentence


def test_the_newer_spelling_of_a_pooling(tmp_path: Path, checkpoint: Path) -> None:
    write_pooling(tmp_path, "lasttoken", False)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    pooling = read_pooling(tmp_path, read_config(checkpoint), HIDDEN)
    assert pooling is not None and (pooling.mode, pooling.normalized) == ("mean", False)


def test_a_text_is_not_cut_or_filled_up_as_a_tokenizers_file_asks(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(str(checkpoint))
    assert tokenizer.encode("x" * 40).tolist() == [ord("x")] * 40
    assert tokenizer.encode("ab", special=True).tolist() == ids_of("ab")
