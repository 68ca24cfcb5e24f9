"""Architectures, checkpoints and tokenizers: what comes in, what is refused, and that others can use what goes out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_pieces import small_config, some_text
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shoal.models.architectures import build_model, parameters_of, refuse_depth
from shoal.models.checkpoints import read_checkpoint, write_checkpoint
from shoal.models.configs import (
    PRESETS,
    BadModel,
    canonical_config,
    positions_of,
    preset_config,
    read_config,
    vocabulary_of,
)
from shoal.models.initial import initial_parameters
from shoal.models.shapes import Shape, one_line, parse_config, shape_of, stated
from shoal.models.tokenizers import BadTokenizer, ByteTokenizer, has_tokenizer, load_tokenizer

PREPARE = """
import sys
from pathlib import Path
from shoal.sdk.jobfile import parse_job
from shoal.sdk.preparation import prepare
from shoal.storage import BlobStore
from shoal.world import SystemClock

file = Path("job.yaml").resolve()
job = parse_job(file.read_bytes(), file)
store = BlobStore(Path("blobs"), 1 << 30, SystemClock())
made = prepare(job, job.rounds.settings, store, Path("data"), "run")
print(made.model.parameters, {"torch", "transformers"} & set(sys.modules))
"""
"""A job file becomes artifacts, and then: what was loaded for it."""
TEXT = "def f(x):\n\treturn 'é☃ 🐟'\n\n"


def tensors_of(config: str, seed: int = 1) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {
        name: value.detach().numpy().copy() for name, value in parameters_of(build_model(config, seed=seed)).items()
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_checkpoint(folder, small_config(), tensors_of(small_config()), ByteTokenizer())
    return folder


@pytest.mark.parametrize(("name", "millions"), [("tiny", 0.857), ("small", 10.08), ("gpt2-small", 124.4)])
def test_presets_have_the_size_they_say(name: str, millions: float) -> None:
    config = preset_config(name, 50_257 if name == "gpt2-small" else 257)
    with torch.device("meta"):
        size = sum(value.numel() for value in parameters_of(build_model(config)).values())
    assert size / 1e6 == pytest.approx(millions, rel=0.001)
    assert positions_of(config) is not None and name in PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_starts_as_transformers_initialises_it(name: str) -> None:
    vocabulary = 300
    theirs = tensors_of(preset_config(name, vocabulary))
    ours = initial_parameters(name, vocabulary, seed=1)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    for key, value in theirs.items():
        assert ours[key].dtype == np.float32
        if value.ndim == 1:
            assert (ours[key] == value).all(), key
        else:
            near = value.std() / value.size**0.5
            assert abs(ours[key].mean()) < 6 * near and abs(ours[key].std() - value.std()) < 6 * near, key


def test_a_job_with_a_preset_is_prepared_without_loading_torch(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(some_text(50_000))
    (tmp_path / "job.yaml").write_text("data:\n  paths: text.txt\nmodel:\n  preset: small\n")
    (tmp_path / "data").mkdir()
    done = subprocess.run([sys.executable, "-c", PREPARE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10082240", "set()"]


def test_the_same_seed_gives_the_same_model() -> None:
    one, same, other = (tensors_of(small_config(), seed) for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)
    one, same, other = (initial_parameters("tiny", 257, seed=seed) for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in one)
    assert all((one[name] != other[name]).any() for name in one if one[name].ndim == 2)


def test_a_config_is_canonical_and_runs_no_code(tmp_path: Path) -> None:
    config = small_config()
    shuffled = dict(reversed(list(msgspec.json.decode(config).items()))) | {"transformers_version": "9", "use_cache": 1}
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(shuffled))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == config
    assert vocabulary_of(config) == 257
    with pytest.raises(BadModel, match="asks to run code"):
        canonical_config({"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}, "it")
    with pytest.raises(BadModel, match="asks to run code"):
        parse_config('{"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(BadModel, match="too deep"):
        parse_config('{"model_type": "llama", "x": ' + "[" * 30_000 + "]" * 30_000 + "}")
    refuse_depth(config, 31_000)
    for layers in (10**8, 100):
        deep = msgspec.json.encode({**msgspec.json.decode(config), "num_hidden_layers": layers}).decode()
        with pytest.raises(BadModel, match=rf"(has|num_hidden_layers) {layers}\b"):
            refuse_depth(deep, 1_000)
    for text, sentence in (
        ("{}", "does not say its model_type"),
        ("[1]", "not a JSON object"),
        ("{", "is not JSON"),
        ('{"model_type": "llama", "x": ' + "[" * 30_000 + "]" * 30_000 + "}", "is not JSON, or too deep"),
        (" " * 70_000, "larger than"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadModel, match=sentence):
            read_config(tmp_path)
    with pytest.raises(BadModel, match="cannot be read"):
        read_config(tmp_path / "nowhere.json")
    with pytest.raises(BadModel, match="no model preset 'huge'; there are tiny"):
        preset_config("huge", 1)
    for bad in ('{"model_type":"no such"}', '{"model_type":"llama","hidden_size":"wide"}', '{"model_type":"vit"}'):
        with pytest.raises(BadModel):
            build_model(bad)


def test_a_model_that_cannot_be_trained_is_refused_in_whole_words() -> None:
    with pytest.raises(BadModel, match=r"A mamba model cannot be trained: .* such as llama, .* or gpt2\.$"):
        build_model('{"model_type":"mamba","hidden_size":8,"num_hidden_layers":1,"vocab_size":16}')
    assert one_line(ValueError("word " * 100)).endswith("word word [...]")


def test_others_load_what_is_written(checkpoint: Path) -> None:
    ours = build_model(small_config(), seed=1).eval()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == list(TEXT.encode()) == ByteTokenizer().encode(TEXT).tolist()
    assert tokenizer.decode(ids) == TEXT == ByteTokenizer().decode(ids)
    assert tokenizer.eos_token_id == 256 == theirs.config.eos_token_id
    with torch.no_grad():
        assert torch.equal(ours(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits)


def test_what_is_written_reads_back(checkpoint: Path) -> None:
    read = read_checkpoint(checkpoint)
    expected = tensors_of(small_config())
    assert read.tensors.keys() == expected.keys()
    assert all((read.tensors[name] == expected[name]).all() for name in expected)
    model = build_model(read.config)
    assert sum(value.numel() for value in parameters_of(model).values()) == sum(v.size for v in expected.values())


def test_a_tied_weight_is_one_tensor(tmp_path: Path) -> None:
    config = small_config().replace('"tie_word_embeddings":false', '"tie_word_embeddings":true')
    tensors = tensors_of(config)
    assert "lm_head.weight" not in tensors
    assert (
        sum(value.size for value in tensors.values())
        == sum(v.size for v in tensors_of(small_config()).values()) - 257 * 32
    )
    write_checkpoint(tmp_path / "tied", config, tensors)
    assert read_checkpoint(tmp_path / "tied").tensors.keys() == tensors.keys()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert np.array_equal(theirs.lm_head.weight.detach().numpy(), tensors["model.embed_tokens.weight"])


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 8}),
        ("gemma", {"head_dim": 8}),
        ("phi3", {}),
        ("olmo2", {}),
        ("mixtral", {"num_local_experts": 3}),
        (
            "qwen2_moe",
            {
                "num_experts": 3,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
            },
        ),
        ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    ],
)
def test_a_checkpoint_is_read_as_its_family_stores_it(tmp_path: Path, family: str, more: dict[str, object]) -> None:
    """Some are stored under other names than the module has, or in parts that it holds as one."""
    torch.manual_seed(5)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **more})).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_checkpoint(tmp_path / "theirs")
    expected = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    assert read.tensors.keys() == expected.keys()
    assert all(np.array_equal(read.tensors[name], expected[name]) for name in expected)
    write_checkpoint(tmp_path / "ours", read.config, read.tensors)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pth", "all.ckpt", "model.pkl"])
def test_a_pickle_is_refused_by_name_and_never_read(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    trap = checkpoint / "sprung"
    (checkpoint / name).write_bytes(f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode())
    with pytest.raises(BadModel, match=rf"{name} is a pickle, which can run code"):
        read_checkpoint(checkpoint)
    assert not trap.exists()


def test_a_pickle_beside_whole_weights_is_left_alone(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"cposix\nsystem\n")
    assert read_checkpoint(checkpoint).tensors


def test_a_pickle_in_place_of_a_part_is_refused_by_name(checkpoint: Path) -> None:
    weights = {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1.safetensors")
    (checkpoint / "model-2.bin").write_bytes(b"")
    (checkpoint / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"weight_map": weights}))
    with pytest.raises(BadModel, match=r"lacks model-2.safetensors.*model-2.bin is a pickle"):
        read_checkpoint(checkpoint)
    for evil in ("../model-1.safetensors", "model-2.bin"):
        weights["lm_head.weight"] = evil
        (checkpoint / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"weight_map": weights}))
        with pytest.raises(BadModel, match="only .safetensors files beside it are read"):
            read_checkpoint(checkpoint)
    for index in (b"[]", b"[" * 100_000):
        (checkpoint / "model.safetensors.index.json").write_bytes(index)
        with pytest.raises(BadModel, match="not an index"):
            read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    with pytest.raises(BadModel, match=f"{name} is not a plain file"):
        read_checkpoint(checkpoint)


def test_missing_misshapen_and_broken_tensors_are_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    gone = {name: value for name, value in whole.items() if name != "model.norm.weight"}
    save_file(gone, file)
    with pytest.raises(BadModel, match=r"has no tensor 'model.norm.weight'"):
        read_checkpoint(checkpoint)
    save_file(gone | {"model.norm.weight": torch.ones(31)}, file)
    with pytest.raises(BadModel, match=r"'model.norm.weight' has shape \(31,\); its config says \(32,\)"):
        read_checkpoint(checkpoint)
    save_file(gone | {"model.norm.weight": torch.full((32,), float("nan"))}, file)
    with pytest.raises(BadModel, match="not finite"):
        read_checkpoint(checkpoint)
    save_file({name.removeprefix("model."): value.half() for name, value in whole.items()}, file)
    assert (
        read_checkpoint(checkpoint).tensors["model.norm.weight"].dtype == np.float32
    )  # a bare model in half precision
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BadModel, match=r"model.safetensors is not a whole safetensors file"):
        read_checkpoint(checkpoint)
    file.unlink()
    with pytest.raises(BadModel, match=r"holds no .safetensors file"):
        read_checkpoint(checkpoint)


def a_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT * 20, "the same way " * 50], trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_file_is_used_and_written_beside_the_model(tmp_path: Path) -> None:
    folder = a_tokenizer(tmp_path / "words")
    for name in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer(str(name))
        assert tokenizer.end == 0 and 257 <= tokenizer.vocabulary <= 300
        assert len(tokenizer.encode("the same way")) < 12
    tokenizer.save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the same way")["input_ids"] == tokenizer.encode("the same way").tolist()
    assert theirs.eos_token_id == 0


def test_a_tokenizer_of_older_files_is_understood(tmp_path: Path) -> None:
    """A vocabulary and merges, as GPT-2's checkpoints have them."""
    folder = a_tokenizer(tmp_path / "new")
    new = load_tokenizer(str(folder))
    whole = msgspec.json.decode((folder / "tokenizer.json").read_bytes())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_bytes(msgspec.json.encode(whole["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in whole["merges"]) + "\n")
    (old / "config.json").write_bytes(b'{"model_type":"gpt2"}')
    assert has_tokenizer(old) and not has_tokenizer(tmp_path)
    read = load_tokenizer(str(old))
    assert read.encode(TEXT).tolist() == new.encode(TEXT).tolist() and read.end == new.end
    read.save(tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "out")).encode(TEXT).tolist() == new.encode(TEXT).tolist()
    (old / "vocab.json").write_bytes(b"[]")
    with pytest.raises(BadTokenizer, match=r"has no tokenizer.json, and transformers makes none of its vocab.json"):
        load_tokenizer(str(old))


def test_the_end_of_a_document_is_what_the_settings_say(tmp_path: Path) -> None:
    folder = a_tokenizer(tmp_path / "words")
    the = load_tokenizer(str(folder)).encode("the")[0]
    for said in (b'{"eos_token":"the"}', b'{"eos_token":{"content":"the"}}'):
        (folder / "tokenizer_config.json").write_bytes(said)
        assert load_tokenizer(str(folder)).end == the
    for said in (b"[]", b"nonsense", b'{"eos_token":5}', b'{"eos_token":"unknown"}'):
        (folder / "tokenizer_config.json").write_bytes(said)
        assert load_tokenizer(str(folder)).end == 0
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    load_tokenizer(str(folder)).save(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_tokenizer_that_is_not_there_or_is_not_one_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadTokenizer, match="There is no tokenizer at .*write `bytes`"):
        load_tokenizer(str(tmp_path / "none"))
    for content in (b"{}", b"not json", b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(BadTokenizer, match="is not a tokenizer"):
            load_tokenizer(str(tmp_path))


def test_a_text_that_a_tokenizer_has_no_token_for_is_a_sentence(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 1})).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(BadTokenizer, match=r"tokenizer\.json cannot encode 'c{40}': .*name another"):
        tokenizer.encode("c" * 1000)


SIZE = st.integers(1, 5)


@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]), SIZE, SIZE, SIZE, SIZE, st.booleans(),
    st.sets(st.sampled_from(["head_dim", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps", "vocab_size",
                             "max_position_embeddings", "hidden_act", "use_cache"]), max_size=2),
    st.sampled_from([{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_theta": 5e5},
                     {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"sliding_window": 8}]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_config_of_the_usual_kind_is_read_as_transformers_reads_it(
    family: str, layers: int, groups: int, each: int, head: int, tied: bool, left_out: set[str], more: dict[str, Any]
) -> None:
    fields = {
        "model_type": family, "num_hidden_layers": layers, "hidden_size": 8 * groups * each, "intermediate_size": 32,
        "vocab_size": 99, "num_attention_heads": groups * each, "num_key_value_heads": groups, "head_dim": 8 * head,
        "max_position_embeddings": 64 * head, "tie_word_embeddings": tied, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "use_cache": True, "eos_token_id": [1, 2], "architectures": ["X"], "torch_dtype": "bfloat16", **more,
    }  # fmt: skip
    config = msgspec.json.encode({name: value for name, value in fields.items() if name not in left_out}).decode()
    parsed = parse_config(config)
    shape = shape_of(config)
    heads = parsed.num_key_value_heads or parsed.num_attention_heads
    size = getattr(parsed, "head_dim", None) or parsed.hidden_size // parsed.num_attention_heads
    assert shape == Shape(
        family, parsed.num_hidden_layers, parsed.hidden_size, parsed.vocab_size, heads, size,
        shape.positions, parsed.tie_word_embeddings,
    )  # fmt: skip
    assert shape.positions == parsed.max_position_embeddings
    assert (stated(config) is not None) == (left_out <= {"use_cache"} and "rope_scaling" not in more)


def test_a_config_with_anything_unusual_is_left_to_transformers() -> None:
    usual = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "vocab_size": 99,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    assert stated(msgspec.json.encode(usual).decode()) is not None
    for change in (
        {"num_key_value_heads": 3}, {"hidden_size": 66}, {"hidden_size": 0}, {"head_dim": None}, {"vocab_size": "99"},
        {"auto_map": {}}, {"quantization_config": {}}, {"model_type": "gpt2"}, {"rms_norm_eps": "x"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, {"num_hidden_layers": True},
    ):  # fmt: skip
        assert stated(msgspec.json.encode({**usual, **change}).decode()) is None, change
    assert stated("[" * 30_000) is None and stated("nothing") is None
