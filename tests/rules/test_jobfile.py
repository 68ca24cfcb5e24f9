"""A job file is read into the protocol's own settings, or refused with one sentence that names file, line and field."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shoal.driver.replay import CHAIN_ELSEWHERE_MAX
from shoal.errors import BadInput
from shoal.market import Requirements
from shoal.models.configs import PRESETS
from shoal.models.tokenizers import load_tokenizer
from shoal.protocol.training import Codec, OptimizerSettings, ReplaySettings, RoundSettings
from shoal.sdk import documents
from shoal.sdk.jobfile import (
    ContradictoryJob,
    JobFile,
    MissingPath,
    explain,
    explain_markdown,
    load_job,
    parse_job,
    schema,
)
from shoal.sdk.train import say_undecided

ROOT = Path(__file__).parents[2]
DATA = "data:\n  paths: words.txt\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("some words\n")
    return tmp_path


def load(folder: Path, text: str | bytes, name: str = "job.yaml") -> JobFile:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_job(folder / name)


def refusal(folder: Path, text: str | bytes) -> BadInput:
    with pytest.raises(BadInput) as caught:
        load(folder, text)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith((".", "?")), sentence
    assert "job.yaml" in sentence
    return caught.value


# --- what is read ---------------------------------------------------------------------------------------------------


def test_a_job_file_of_one_line_has_the_defaults_of_the_protocol(folder: Path) -> None:
    job = load(folder, DATA, "my notes.yaml")
    assert job.name == "my-notes"
    assert job.data.paths == (str(folder / "words.txt"),)
    assert (job.model.preset, job.model.tokenizer) == ("tiny", "bytes")
    assert (job.optimizer, job.replay) == (OptimizerSettings(), ReplaySettings())
    assert job.rounds.inner_steps == "auto"
    assert job.rounds.resolved(23) == RoundSettings(inner_steps=23)


def test_quantities_are_read_as_people_write_them(folder: Path) -> None:
    job = load(
        folder,
        DATA + "tokens: 2.5M\n"
        "rounds: {grace: 80 ms, deadline: 2 min, byte_budget: 100 kB/s, inner_steps: 7}\n"
        "requirements: {memory_min: 4 GiB, wait: 90}\n",
    )
    assert job.tokens == 2_500_000
    assert (job.rounds.settings.grace_ms, job.rounds.settings.deadline_ms) == (80, 120_000)
    assert job.rounds.byte_budget == 100_000
    assert job.rounds.resolved(99).inner_steps == 7
    assert (job.requirements.each.memory_min_bytes, job.requirements.wait_s) == (4 << 30, 90.0)


def test_requirements_and_their_alternatives(folder: Path) -> None:
    text = """requirements:
  nodes_min: 2
  device: cuda
  countries: [DE, NO]
  latency_max: 80 ms
  price_max: 0.35/h
  any_of:
    - {device_name: 4090, price_max: 8.40/d}
    - {memory_min: 40 GiB, bandwidth_min: 100 Mbit/s, flops_min: 50T}
"""
    wish = load(folder, DATA + text).requirements.wish
    assert wish.each == Requirements(
        device="cuda", countries=("DE", "NO"), latency_max_ms=80.0, price_max=350_000
    )  # fmt: skip
    assert wish.any_of == (
        Requirements(device_name="4090", price_max=350_000),
        Requirements(memory_min_bytes=40 << 30, bandwidth_min=12_500_000, flops_min=50e12),
    )
    assert load(folder, DATA + "requirements: {any_of: {device: cpu}}\n").requirements.any_of == (
        Requirements(device="cpu"),
    )
    properties = schema()["properties"]["requirements"]["properties"]
    alternatives = properties["any_of"]["anyOf"]
    assert alternatives[0]["items"]["properties"].keys() == alternatives[1]["properties"].keys()
    assert alternatives[1]["properties"].keys() < properties.keys()


def test_a_byte_budget_may_be_given_in_bits(folder: Path) -> None:
    assert load(folder, DATA + "rounds: {byte_budget: 2 Mbit/s}\n").rounds.byte_budget == 250_000
    assert load(folder, DATA + "rounds: {byte_budget: 50 kB}\n").rounds.byte_budget == 50_000


def test_a_scalar_is_what_its_field_says_and_not_what_yaml_makes_of_it(folder: Path) -> None:
    job = load(folder, DATA + "name: no\nseed: 010\noptimizer: {learning_rate: 1e-3, epsilon: 1e-9}\n")
    assert (job.name, job.seed) == ("no", 10)
    assert (job.optimizer.learning_rate, job.optimizer.epsilon) == (1e-3, 1e-9)


def test_an_empty_section_is_all_defaults_and_null_unsets(folder: Path) -> None:
    job = load(folder, DATA + "rounds:\noptimizer: ~\nmodel: {preset: ~}\n")
    assert job.optimizer == OptimizerSettings()
    assert job.model.preset == "tiny"


def test_paths_start_at_the_job_files_directory(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "job.yaml").write_text("data: {paths: [../words.txt, '../*.txt']}\n")
    job = load_job(folder / "sub" / "job.yaml")
    assert [Path(path).parent.resolve() for path in job.data.paths] == [folder.resolve()] * 2


def test_a_checkpoint_brings_its_own_tokenizer(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    text = DATA + "model: {checkpoint: model}\n"
    assert load(folder, text).model.tokenizer == "bytes"
    (folder / "model" / "tokenizer.json").write_text("{}")
    assert load(folder, text).model.tokenizer == str(folder / "model")
    assert load(folder, DATA + "model: {checkpoint: model, tokenizer: bytes}\n").model.tokenizer == "bytes"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (
            DATA + "rounds:\n  inner_stpes: 3\n",
            "SH-121",
            "line 4: rounds.inner_stpes is not a field; did you mean inner_steps?",
        ),
        (DATA + "inner_steps: 3\n", "SH-121", "line 3: inner_steps is not a field; did you mean rounds.inner_steps?"),
        (DATA + "zzz: 3\n", "SH-121", "line 3: zzz is not a field; there are name, seed,"),
        (DATA + "rounds: {deadline_ms: 3}\n", "SH-121", "did you mean deadline?"),
        (DATA + "seed: 1\nname: a\nseed: 2\n", "SH-121", "line 5: seed stands in line 3 already"),
        (DATA + "tokens: -5\n", "SH-122", "line 3: tokens must be a count (such as 2M) of at least 1, not '-5'."),
        (DATA + "budget: -5\n", "SH-122", "money (such as 2.50) of at least 0.00, not '-5'."),
        (DATA + "budget: _5\n", "SH-122", "line 3: budget: '_5' is no amount of money"),
        (DATA + "tokens: -5M\n", "SH-122", "line 3: tokens must be a count"),
        (DATA + "tokens: 0\n", "SH-122", "of at least 1, not 0."),
        (DATA + "tokens: lots\n", "SH-122", "line 3: tokens: 'lots' is not a count"),
        (DATA + "tokens: .inf\n", "SH-122", "line 3: tokens"),
        (DATA + "tokens:\n", "SH-122", "line 3: tokens has no value"),
        (DATA + "tokens: [1]\n", "SH-122", "line 3: tokens must be a count (such as 2M) of at least 1, not a list."),
        (DATA + "rounds: {lag: 3}\n", "SH-122", "rounds.lag must be an integer from 0 to 1, not 3."),
        (DATA + "rounds: {lag: 1.5}\n", "SH-122", "rounds.lag must be an integer from 0 to 1, not '1.5'."),
        (DATA + "rounds: {lag: '1'}\n", "SH-122", "rounds.lag must be an integer from 0 to 1, not '1'."),
        (DATA + "rounds: {codec: gzip}\n", "SH-122", "rounds.codec must be none, int8 or sparse2, not 'gzip'."),
        (DATA + "rounds: {inner_steps: many}\n", "SH-122", "rounds.inner_steps must be an integer from 1 to"),
        (DATA + "rounds: {byte_budget: 0.01 B/s}\n", "SH-122", "of at least 1 B/s, not 0.01 B/s."),
        (DATA + "rounds: {bytes_per_token: 1e-308}\n", "SH-122", "must be a number from 1e-06 to 1e+09, not 1e-308."),
        (DATA + "rounds: 5\n", "SH-122", "line 3: rounds is a section"),
        (DATA + "rounds: {deadline: 100 d}\n", "SH-122", "rounds.deadline must be a duration"),
        (DATA + "optimizer: {learning_rate: fast}\n", "SH-122", "optimizer.learning_rate must be a number above 0"),
        (DATA + "optimizer: {learning_rate: .nan}\n", "SH-122", "optimizer.learning_rate must be a number"),
        (DATA + "dtype: fp8\n", "SH-122", "line 3: dtype must be auto, float32 or bfloat16, not 'fp8'."),
        (DATA + "name: a/b\n", "SH-122", "line 3: name must be"),
        (DATA + "requirements: {memory_min: 4 GX}\n", "SH-122", "'4 GX' is not an amount of bytes"),
        (DATA + "model: {preset: huge}\n", "SH-122", "model.preset must be one of tiny"),
        (DATA + "model: {preset: tiny, config: x}\n", "SH-123", "model.config stands beside model.preset"),
        (DATA + "requirements: {price_max: -0.1/h}\n", "SH-122", "requirements.price_max must be a price"),
        (DATA + "requirements: {price_max: 0.35}\n", "SH-122", "'0.35' is no price; write for example '0.35/h'"),
        (DATA + "requirements: {price_max: 2000000/h}\n", "SH-122", "requirements.price_max must be a price"),
        (DATA + "requirements: {countries: Germany}\n", "SH-122", "requirements.countries must be"),
        (DATA + "requirements: {any_of: [{memory_min: 4 GX}]}\n", "SH-122", "requirements.any_of[1].memory_min"),
        (DATA + "requirements: {any_of: [{}, {nodes_min: 2}]}\n", "SH-121", "requirements.any_of[2].nodes_min is not"),
        (DATA + "requirements: {any_of: [4090]}\n", "SH-122", "requirements.any_of[1] is a section"),
        (DATA + f"requirements: {{any_of: [{'{},' * 17}]}}\n", "SH-122", "has 17 entries; at most 16"),
        (DATA + "requirements: {nodes_min: 5, nodes_max: 2}\n", "SH-123", "at least 5 nodes and at most 2"),
        (DATA + "model: {checkpoint: nowhere}\n", "SH-124", "line 3: model.checkpoint: there is no"),
        (DATA + "model: {tokenizer: nowhere.json}\n", "SH-124", "line 3: model.tokenizer: there is no"),
        ("data:\n  paths: missing.txt\n", "SH-124", "line 2: data.paths: there is no"),
        ("data:\n  paths: ['*.md']\n", "SH-124", "line 2: data.paths: no file fits"),
        ("data:\n  paths: 'a\\0b'\n", "SH-124", "there is no"),
        ("data:\n  paths: []\n", "SH-122", "line 2: data.paths must be"),
        ("data:\n  paths:\n  - words.txt\n  - ''\n", "SH-122", "a list of such, not an empty one."),
        (f"data: {{paths: [{'words.txt, ' * 1100}]}}\n", "SH-122", "line 1: data.paths has 1100 entries; at most 1024"),
        (f"data:\n  paths: {'x' * 5000}\n", "SH-122", "a list of such, not one of 5000 characters."),
        (f"data:\n  paths: {'x' * 300}\n", "SH-124", "line 2: data.paths leads nowhere: File name too long"),
        ("name: x\n", "SH-122", "data.paths is missing"),
        ("data:\n", "SH-122", "data.paths is missing"),
        ("", "SH-120", "is empty"),
        ("# nothing\n", "SH-120", "is empty"),
        ("- a\n- b\n", "SH-120", "line 1: a job file is a list of `field: value` lines"),
        ("data: [a\n", "SH-120", "this is not YAML"),
        ("model: {script: missing.py}\n", "SH-124", "line 1: model.script: there is no"),
        (f"{DATA}model: {{script: words.txt}}\n", "SH-123", "line 1: data stands beside model.script"),
        ("model: {script: words.txt, preset: tiny}\n", "SH-123", "line 1: model.script stands beside model.preset"),
        ("model: {preset: tiny}\n", "SH-122", "data.paths is missing"),
        (DATA + "? [a]\n: b\n", "SH-120", "line 3: a field's name is a plain word"),
        (DATA + "---\nname: a\n", "SH-120", "this is not YAML"),
        (DATA + "name: &a x\n", "SH-120", "line 3: anchors"),
        (DATA + "name: !!python/object/apply:os.system [x]\n", "SH-120", "line 3: tags"),
        ("[" * 2000, "SH-120", "nested more than"),
        (b"data:\n  paths: \xff\n", "SH-120", "line 2: this is not UTF-8"),
        (b"name: a\x07b\n", "SH-120", "line 1: a control character"),
        ("#" * (documents.DOCUMENT_MAX_BYTES + 1), "SH-120", "larger than a job file may be"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(folder: Path, text: str | bytes, code: str, said: str) -> None:
    error = refusal(folder, text)
    assert error.code == code
    assert said in str(error)


def test_a_data_file_of_zero_bytes_is_refused(folder: Path) -> None:
    (folder / "words.txt").write_text("")
    assert isinstance(refusal(folder, DATA), MissingPath)


def test_a_job_file_that_is_not_there_or_a_directory(folder: Path) -> None:
    for path, why in ((folder / "nothing.yaml", "cannot be read"), (folder, "is a directory")):
        with pytest.raises(documents.BadDocument, match=why):
            load_job(path)


def test_a_billion_laughs_are_not_laughed(folder: Path) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [*{a},*{a},*{a}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
    )
    assert "anchors" in str(refusal(folder, bomb))


@given(st.binary(max_size=300))
def test_no_bytes_make_it_fail_otherwise_than_in_a_sentence(text: bytes) -> None:
    try:
        parse_job(text, Path("job.yaml"))
    except BadInput as error:
        assert str(error)


_WORDS = ["name", "seed", "model", "data", "paths", "tokens", "rounds", "lag", "codec", "inner_steps", "grace", "zzz"]
_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["2M", "80 ms"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=5),
    max_leaves=12,
)


@given(_TREES)
def test_no_yaml_makes_it_fail_otherwise_than_in_a_sentence(tree: Any) -> None:
    try:
        parse_job(yaml.safe_dump(tree).encode(), Path("job.yaml"))
    except BadInput as error:
        assert str(error)


# --- declared once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "settings"), [("optimizer", OptimizerSettings), ("rounds", RoundSettings), ("replay", ReplaySettings)]
)
def test_every_setting_of_the_protocol_can_be_written(
    folder: Path, section: str, settings: type[msgspec.Struct]
) -> None:
    """With each field's default written out, the job is the one with nothing written."""
    lines = [
        f"  {field.name}: {documents.show_default(field)}\n"
        for field in explain()
        if field.path.startswith(f"{section}.") and field.default is not None
    ]
    assert {info.name for info in msgspec.structs.fields(settings)} <= {
        field.attribute for field in explain() if field.path.startswith(f"{section}.")
    }
    assert load(folder, f"{DATA}{section}:\n{''.join(lines)}") == load(folder, DATA)


def test_a_job_is_told_which_rounds_a_replay_elsewhere_cannot_decide(folder: Path) -> None:
    assert ReplaySettings().snapshot_every <= CHAIN_ELSEWHERE_MAX
    assert say_undecided(load(folder, DATA)) == ""
    said = say_undecided(load(folder, DATA + f"replay: {{snapshot_every: {CHAIN_ELSEWHERE_MAX + 2}}}\n"))
    assert "decides nothing about 2 of them" in said and f"at most {CHAIN_ELSEWHERE_MAX}" in said


def test_every_field_says_what_it_is_for() -> None:
    assert [field.path for field in explain() if not field.meaning] == []


def test_every_field_stands_in_the_docs_as_it_is_explained() -> None:
    page = (ROOT / "docs" / "jobs.md").read_text()
    missing = [line for line in explain_markdown().splitlines() if line not in page]
    assert missing == [], "docs/jobs.md has an old table; put explain_markdown() into it"


def test_the_presets_named_in_the_meaning_are_those_there_are() -> None:
    meaning = next(field.meaning for field in explain() if field.path == "model.preset")
    assert all(name in meaning for name in PRESETS)


def test_the_schema_knows_every_field_and_no_other() -> None:
    def paths(node: dict[str, Any], prefix: str = "") -> list[str]:
        found = []
        for name, inner in node.get("properties", {}).items():
            found += [prefix + name, *paths(inner, f"{prefix}{name}.")]
        assert not node.get("properties") or node["additionalProperties"] is False
        return found

    tree = schema()
    assert paths(tree) == [field.path for field in explain()]
    assert "required" not in tree  # data may be missing beside model.script
    assert msgspec.json.decode(msgspec.json.encode(tree)) == tree
    assert tree["properties"]["rounds"]["properties"]["codec"]["default"] == Codec.SPARSE2


# --- the examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.yaml")))
def test_an_example_loads(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "runs" / "own-text" / "model").mkdir(parents=True)  # what examples/own-text.yaml leaves behind
    job = load_job(tmp_path / "examples" / name)
    assert job.name != "job"
    if job.model.tokenizer != "bytes":
        assert load_tokenizer(job.model.tokenizer).vocabulary > 256


def test_the_examples_show_each_way_to_begin() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.yaml")}
    assert {"own-text.yaml", "jsonl-tokenizer.yaml", "from-checkpoint.yaml", "digits.yaml"} <= set(texts)
    assert any("checkpoint:" in text for text in texts.values())


def test_two_fields_that_exclude_each_other_have_their_own_error(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(ContradictoryJob):
        load(folder, DATA + "model: {preset: tiny, config: config.json}\n")


def test_a_run_that_was_begun_needs_its_data_no_more(folder: Path) -> None:
    text = DATA.encode() + b"model:\n  checkpoint: gone\n"
    elsewhere = folder / "runs" / "job" / "job.yaml"
    with pytest.raises(MissingPath):
        parse_job(text, elsewhere)
    assert parse_job(text, elsewhere, begun=True).data.paths == ("words.txt",)
