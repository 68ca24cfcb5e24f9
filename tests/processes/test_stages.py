"""Stages against plain transformers: the same tokens at every split; and the same bits whatever the batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.inference import rows
from shoal.inference.stage import BadPiece, NoRoom, NoSource, Piece, StageEngine
from shoal.models.configs import BadModel, read_config
from shoal.models.headers import read_header
from shoal.models.shapes import shape_of, survey
from shoal.protocol.serving import RANGES_MAX

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    ),
    "phi3": ("phi3", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2 by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", {"partial_rotary_factor": 0.5}),
    "gpt_neox serial": ("gpt_neox", {"use_parallel_residual": False}),
}


def a_checkpoint(folder: Path, name: str, **more: Any) -> Path:
    family, settings = FAMILIES[name]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **settings, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that do something
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def stages(folder: Path, cuts: tuple[int, ...], memory: int = 1 << 30) -> list[StageEngine]:
    config, files = read_config(folder), sorted(folder.glob("*.safetensors"))
    ends = [0, *cuts, SMALL["num_hidden_layers"]]
    return [StageEngine.read(config, files, first, stop, memory) for first, stop in itertools.pairwise(ends)]


def through(ring: list[StageEngine], session: int, start: int, ids: list[int]) -> torch.Tensor:
    """Logits [n, vocabulary] of these positions of a session."""
    states = torch.tensor(ids)
    for stage in ring:
        (states,) = stage.step([Piece(session, start, states)])
    return ring[-1].logits(states)


def greedy(ring: list[StageEngine], prompt: list[int], count: int) -> list[int]:
    logits, done = through(ring, 1, 0, prompt), list(prompt)
    for _ in range(count):
        done.append(int(logits[-1].argmax()))
        logits = through(ring, 1, len(done) - 1, done[-1:])
    return done[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers_at_every_split(tmp_path: Path, name: str) -> None:
    folder = a_checkpoint(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.randint(1, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    assert len(set(expected)) > 3, "a model that says the same all the time shows nothing"
    for cuts in ((), (1,), (2,), (1, 2)):
        ring = stages(folder, cuts)
        assert greedy(ring, prompt, 20) == expected, cuts


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_need_no_byte_outside_of_their_parts(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.models.shapes.CHUNK_BYTES", 1)  # these files are small
    folder = a_checkpoint(tmp_path / "whole", name)
    config, (file,) = read_config(folder), sorted(folder.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.randint(1, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    found, whole = survey(config, [file]), file.read_bytes()
    assert found.parts_of(0, 3) == {0: ()}, "who has all layers has the file"
    for cuts in ((1,), (1, 2)):
        ring = []
        for first, stop in itertools.pairwise([0, *cuts, 3]):
            ((number, part),) = found.parts_of(first, stop).items()
            assert number == 0 and 0 < len(part) <= RANGES_MAX
            assert sum(b - a for a, b in part) < 0.9 * len(whole)
            hollow = tmp_path / f"{first}-{stop}.safetensors"
            with hollow.open("wb") as opened:
                opened.truncate(len(whole))
                for a, b in part:
                    opened.seek(a)
                    opened.write(whole[a:b])
            ring.append(StageEngine.read(config, [hollow], first, stop, 1 << 30, parts=[part]))
        assert greedy(ring, prompt, 12) == expected, cuts


def test_what_lies_outside_of_a_part_is_never_read(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, "llama")
    config, (file,) = read_config(folder), sorted(folder.glob("*.safetensors"))
    header = read_header(file)
    at, end = header.tensors["model.layers.1.mlp.down_proj.weight"]
    part = ((0, at), (end, header.file_bytes))
    with pytest.raises(BadModel, match=rf"layers.1.mlp.down_proj.weight' lies at bytes {at} to {end}, which are not"):
        StageEngine.read(config, [file], 1, 2, 1 << 20, parts=[part])
    StageEngine.read(config, [file], 0, 1, 1 << 20, parts=[part])
    for lacking in (((header.data_start - 1, header.file_bytes),), ((0, header.data_start - 1), (at, end)), ((0, 4),)):
        with pytest.raises(BadModel, match="its header was not fetched"):
            StageEngine.read(config, [file], 0, 1, 1 << 20, parts=[lacking])


@pytest.mark.parametrize(
    "wrong",
    [
        b"", b"\xff" * 7, b"\xff" * 20, b"\x05" + bytes(7) + b"{", b"\x02" + bytes(7) + b"[]",
        b"\x11" + bytes(7) + b'{"a":{"b":[1,2]}}',
    ],
)  # fmt: skip
def test_headers_that_say_nothing_are_named(tmp_path: Path, wrong: bytes) -> None:
    (file := tmp_path / "model.safetensors").write_bytes(wrong)
    with pytest.raises(BadModel, match="not a whole safetensors file"):
        read_header(file)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bits_do_not_depend_on_the_batch(tmp_path: Path, name: str) -> None:
    """One position at a time, in pieces, at once, and among other sessions."""
    folder = a_checkpoint(tmp_path, name)
    dice = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 96, (150,), generator=dice).tolist()
    ring = stages(folder, (1,))
    assert all(stage.exact for stage in ring)
    alone = torch.cat([through(ring, 1, at, [one]) for at, one in enumerate(ids)])
    at_once = through(ring, 2, 0, ids)
    assert torch.equal(alone, at_once)
    pieces, at = [], 0
    for count in (1, 2, 3, 5, 7, 16, 31, 64, 21):
        pieces.append(through(ring, 3, at, ids[at : at + count]))
        at += count
    assert torch.equal(alone, torch.cat(pieces))
    others = [torch.randint(1, 96, (n,), generator=dice) for n in (1, 4, 33)]
    mixed, at = [], 0
    for turn, count in enumerate((10, 1, 1, 40, 1, 97)):
        given = [Piece(10 * turn + 100 + n, 0, other) for n, other in enumerate(others)]
        given.insert(turn % 4, Piece(4, at, torch.tensor(ids[at : at + count])))
        for stage in ring:
            out = stage.step(given)
            given = [Piece(piece.session, piece.start, states) for piece, states in zip(given, out, strict=True)]
        mixed.append(ring[-1].logits(out[turn % 4]))
        at += count
    assert torch.equal(alone, torch.cat(mixed))


def test_an_engine_whose_bits_depend_on_the_batch_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forms of a product none agrees with itself: torch's own is left, with one row as it comes."""
    monkeypatch.setattr(rows, "gives_the_same", lambda product, weight: False)
    monkeypatch.setattr(rows.Linear, "forward", lambda linear, given: linear._product(given.view(-1, given.shape[-1])))
    assert not any(stage.exact for stage in stages(a_checkpoint(tmp_path, "llama"), (1,)))


@pytest.mark.parametrize("wide", [(344, 128), (512, 1376), (1376, 512), (768, 2048), (2048, 768), (100, 37), (64, 257)])
def test_products_of_any_size_give_a_row_the_same_bits(wide: tuple[int, int]) -> None:
    inner, outer = wide
    dice = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(outer, inner, generator=dice), torch.randn(outer, generator=dice)
    forms = rows.Forms()
    linear = rows.Linear(forms.product(weight), bias)
    assert type(forms.product(weight)) is type(linear._product)
    assert not isinstance(linear._product, rows.Whole)
    given = torch.randn(300, inner, generator=dice)
    alone = torch.cat([linear(given[at : at + 1]) for at in range(40)])
    for count in (2, 3, 4, 5, 7, 16, 40):
        assert torch.equal(linear(given[:count]), alone[:count]), count
    assert torch.equal(linear(given)[:40], alone)
    exact = given.double() @ weight.t().double()
    assert torch.allclose(linear(given).double(), exact + bias.double(), atol=1e-3)
    for form in (rows.Packed, rows.Tiled, rows.Whole):
        assert torch.allclose(form(weight)(given).double(), exact, atol=1e-3), form
    assert rows.tiles(2) == [2] and rows.tiles(7) == [3, 2, 2] and all(sum(rows.tiles(n)) == n for n in range(2, 50))


def test_maps_of_the_same_rows_are_one_product() -> None:
    dice = torch.Generator().manual_seed(4)
    weights = [torch.randn(width, 96, generator=dice) for width in (64, 32, 32)]
    biases = [torch.randn(len(weight), generator=dice) for weight in weights]
    maps = rows.Forms().linears(list(zip(weights, biases, strict=True)))
    for given in (torch.randn(5, 96, generator=dice), torch.randn(1, 1, 96, generator=dice)):
        for linear, weight, bias in zip(maps, weights, biases, strict=True):
            assert torch.allclose(linear(given), given @ weight.t() + bias, atol=1e-4)
    assert maps[0]._shared._rows is None, "nothing is held once the last has its part"
    first, second = torch.randn(2, 96, generator=dice), torch.randn(2, 96, generator=dice)
    assert not torch.equal(maps[0](first), maps[0](second)), "other rows are another product"


def test_frequencies_that_change_with_the_length_bound_it(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 128}
    config = read_config(a_checkpoint(tmp_path, "llama", rope_parameters=rope))
    assert shape_of(config).positions == 128


def test_a_session_can_be_taken_back(tmp_path: Path) -> None:
    ring = stages(a_checkpoint(tmp_path, "llama"), (2,))
    ids = list(range(1, 60))
    straight = through(ring, 1, 0, ids)
    through(ring, 2, 0, ids[:50])
    through(ring, 2, 50, [7] * 30)  # a guess that does not hold
    assert torch.equal(through(ring, 2, 50, ids[50:]), straight[50:])


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first, last = stages(a_checkpoint(tmp_path, "llama"), (1,))
    first.step([Piece(1, 0, torch.tensor([1, 2, 3]))])
    free = first.free_bytes
    for start, inputs, sentence in (
        (4, torch.tensor([1]), "has 3 positions here; it cannot go on with 1 from position 4"),
        (-1, torch.tensor([1]), "cannot go on"),
        (3, torch.tensor([], dtype=torch.int64), "cannot go on with 0"),
        (3, torch.tensor([96]), "not within the vocabulary of 96"),
        (3, torch.tensor([-1]), "not within the vocabulary"),
        (3, torch.tensor([1.0]), "takes token ids"),
        (3, torch.ones(510, dtype=torch.int64), "knows 512 positions; 513 are too many"),
    ):
        with pytest.raises(BadPiece, match=sentence):
            first.step([Piece(2, 0, torch.tensor([5])), Piece(1, start, inputs)])
    assert first.length(1) == 3 and first.length(2) == 0 and first.free_bytes == free
    with pytest.raises(BadPiece, match="twice"):
        first.step([Piece(1, 3, torch.tensor([5])), Piece(1, 3, torch.tensor([5]))])
    for states in (torch.ones(2, 63), torch.full((2, 64), float("nan")), torch.ones(2)):
        with pytest.raises(BadPiece, match="is what this stage takes"):
            last.step([Piece(1, 0, states)])


def test_memory_for_sessions_is_bounded_and_given_back(tmp_path: Path) -> None:
    (stage,) = stages(a_checkpoint(tmp_path, "llama"), (), memory=3 * 2 * 128 * 32 * 4)
    stage.step([Piece(1, 0, torch.ones(128, dtype=torch.int64))])
    with pytest.raises(NoRoom, match="are needed for sessions, and 0 are free"):
        stage.step([Piece(2, 0, torch.tensor([1]))])
    with pytest.raises(NoRoom):
        stage.step([Piece(1, 128, torch.tensor([1]))])
    stage.close(1)
    stage.step([Piece(2, 0, torch.tensor([1]))])
    stage.close(2)
    stage.close(2)
    assert stage.free_bytes == 3 * 2 * 128 * 32 * 4


def test_a_session_takes_over_what_another_has(tmp_path: Path) -> None:
    ids = torch.randint(1, 96, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    (engine,) = stages(a_checkpoint(tmp_path, "qwen3"), (), memory=1 << 20)
    alone = engine.step([Piece(1, 0, torch.tensor(ids))])[0]
    # Within a block of positions, at its end, and beside another one that does the same.
    for number, at in enumerate((1, 127, 128, 199), start=2):
        rest, beside = engine.step(
            [
                Piece(number, at, torch.tensor(ids[at:]), source=1),
                Piece(number + 10, 50, torch.tensor(ids[50:]), source=1),
            ]
        )
        assert torch.equal(rest, alone[at:]) and torch.equal(beside, alone[50:])
        engine.close(number)
        engine.close(number + 10)
    with pytest.raises(NoSource, match="take over 201 positions of session 1, of which 200"):
        engine.step([Piece(9, 201, torch.tensor(ids[:1]), source=1)])
    with pytest.raises(NoSource, match="of which 0"):
        engine.step([Piece(9, 5, torch.tensor(ids[:1]), source=77)])
    assert engine.length(9) == 0


def test_what_is_over_is_kept_while_there_is_room(tmp_path: Path) -> None:
    ids = torch.arange(1, 91)
    (engine,) = stages(a_checkpoint(tmp_path, "llama"), (), memory=1 << 30)
    engine.step([Piece(0, 0, ids)])
    each = (1 << 30) - engine.free_bytes
    engine.close(0)
    (engine,) = stages(tmp_path, (), memory=3 * each)
    for session in (1, 2, 3):
        engine.step([Piece(session, 0, ids, tuple(ids.tolist()))])
        engine.close(session, keep=True)
    assert engine.free_bytes == 0
    engine.step([Piece(4, 80, ids[80:], tuple(ids[80:].tolist()), source=2)])
    assert (engine.length(1), engine.length(2), engine.length(3)) == (0, 90, 90), "the oldest makes way"
    assert engine.tokens(4) == ids.tolist()
    engine.step([Piece(5, 0, ids)])
    assert engine.length(3) == 0 and engine.length(2) == 90, "the one that was of use stays longer"
    engine.step([Piece(6, 0, ids)])
    with pytest.raises(NoRoom):
        engine.step([Piece(7, 0, ids)])
    assert [engine.length(session) for session in (4, 5, 6)] == [90, 90, 90], "who is not over never makes way"


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, "llama")
    config, files = read_config(folder), sorted(folder.glob("*.safetensors"))
    with pytest.raises(BadModel, match="no stage from layer 2 to 3"):
        StageEngine.read(config, files, 2, 4, 1 << 20)
    with pytest.raises(BadModel, match="A bert model cannot be served; these families can: gemma"):
        StageEngine.read('{"model_type":"bert"}', files, 0, 1, 1 << 20)
    with pytest.raises(BadModel, match="No file has the tensor 'model.embed_tokens.weight'"):
        StageEngine.read(config, [], 0, 1, 1 << 20)
