"""What serving needs to know of a model before any of it is loaded: its shape, and where its tensors lie.

A config is read by `transformers`' class for it. That takes seconds to load, and torch: a config of the usual kind that
says all that matters here, as most do, is read without (`stated`).
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from shoal.models.configs import BadModel, bounded, refuse_code
from shoal.models.headers import ITEM_BYTES, Header, read_header
from shoal.protocol.blobs import CHUNK_BYTES
from shoal.protocol.serving import RANGES_MAX
from shoal.quantities import Ranges, joined

LAYERS_MAX = 4096
LAYERS_NAMES = ("num_hidden_layers", "n_layer", "num_layers")
_Size = Annotated[int, Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family's modules are, within its base model."""

    layers: str = "layers"
    norm: str = "norm"
    embedding: str = "embed_tokens"
    positions: str | None = None
    """A learned embedding of positions that is added to that of tokens."""
    stored_head: str = "lm_head"
    """The head's name in checkpoint files."""
    grouped: bool = True
    """Its config may give keys and values fewer heads than queries, or heads another size."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": Family(),
    "phi3": Family(),
    "gpt2": Family("h", "ln_f", "wte", "wpe", grouped=False),
    "gpt_neox": Family("layers", "final_layer_norm", "embed_in", stored_head="embed_out", grouped=False),
}
"""Families that can be served, by model_type."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a config serving needs to know."""

    family: str
    layers: int
    hidden: int
    vocabulary: int
    key_heads: int
    head_size: int
    positions: int
    tied: bool
    logit_cap: float | None = None
    """Logits are drawn into (-cap, cap) by a hyperbolic tangent."""


class _Rope(msgspec.Struct, forbid_unknown_fields=True):
    rope_theta: float
    rope_type: Literal["default"] = "default"


class _Usual(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A config of the usual kind, with nothing left out that matters here."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    num_hidden_layers: Annotated[int, Meta(ge=1, le=LAYERS_MAX)]
    hidden_size: _Size
    intermediate_size: _Size
    vocab_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size
    head_dim: _Size
    max_position_embeddings: _Size
    tie_word_embeddings: bool
    hidden_act: str
    rms_norm_eps: float
    rope_parameters: _Rope | UnsetType = UNSET
    rope_theta: float | UnsetType = UNSET
    rope_scaling: None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    pretraining_tp: _Size = 1
    sliding_window: _Size | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 0
    layer_types: list[str] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    architectures: list[str] | None = None
    transformers_version: str = ""


def stated(config: str) -> Shape | None:
    """The shape that a config of the usual kind states; None for any other. Raises BadModel for too many positions."""
    try:
        usual = msgspec.json.decode(config, type=_Usual)
    except (msgspec.DecodeError, RecursionError):
        return None
    if usual.num_attention_heads % usual.num_key_value_heads or usual.hidden_size % usual.num_attention_heads:
        return None
    return Shape(
        family=usual.model_type,
        layers=usual.num_hidden_layers,
        hidden=usual.hidden_size,
        vocabulary=usual.vocab_size,
        key_heads=usual.num_key_value_heads,
        head_size=usual.head_dim,
        positions=bounded(usual.max_position_embeddings),
        tied=usual.tie_word_embeddings,
    )


def shape_of(config: str) -> Shape:
    """Raises BadModel for a family that cannot be served, or sizes that cannot be."""
    if (shape := stated(config)) is not None:
        return shape
    parsed = parse_config(config)
    if parsed.model_type not in FAMILIES:
        raise BadModel(
            f"A {parsed.model_type} model cannot be served; these families can: {', '.join(sorted(FAMILIES))}."
        )
    heads, grouped = parsed.num_attention_heads, FAMILIES[parsed.model_type].grouped
    try:
        shape = Shape(
            family=parsed.model_type,
            layers=parsed.num_hidden_layers,
            hidden=parsed.hidden_size,
            vocabulary=parsed.vocab_size,
            key_heads=(grouped and getattr(parsed, "num_key_value_heads", None)) or heads,
            head_size=(grouped and getattr(parsed, "head_dim", None)) or parsed.hidden_size // heads,
            positions=bounded(_positions(parsed)),
            tied=bool(parsed.tie_word_embeddings),
            logit_cap=getattr(parsed, "final_logit_softcapping", None),
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BadModel(f"The config's sizes make no {parsed.model_type} model: {one_line(error)}.") from error
    for name in ("layers", "hidden", "vocabulary", "key_heads", "head_size", "positions"):
        if getattr(shape, name) < 1:
            raise BadModel(f"The config's sizes make no {shape.family} model: {name} would be {getattr(shape, name)}.")
    return shape


def _positions(parsed: Any) -> int:
    """Where rotary frequencies change with the length of what is computed at once, a session would depend on how it
    was cut into steps: such a model is served up to the length at which they begin to."""
    rope = getattr(parsed, "rope_parameters", None) or {}
    longest = int(parsed.max_position_embeddings)
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return min(longest, int(rope.get("original_max_position_embeddings") or longest))
    return longest


def parse_config(config: str) -> Any:
    """Config JSON -> `transformers` config. Raises BadModel."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(config)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadModel(f"The model config is not JSON, or too deep: {one_line(error)}.") from error
    refuse_code(fields, "The model config")
    model_type = fields.pop("model_type", None)
    for name in LAYERS_NAMES:  # first: with each of them transformers takes time and memory
        if isinstance(fields.get(name), int) and not 1 <= fields[name] <= LAYERS_MAX:
            raise BadModel(f"The config says {name} {str(fields[name])[:20]}; from 1 to {LAYERS_MAX} can be.")
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise BadModel(
            f"The installed transformers cannot read this {model_type} config: {one_line(error)}."
        ) from error


Stored: TypeAlias = tuple[int, str]
"""A tensor as it is stored: the number of its file, and its name there."""


@dataclass(frozen=True)
class Survey:
    """Where a model's tensors lie, and what they take when loaded."""

    layer_bytes: tuple[int, ...]
    first_bytes: int
    """What goes with the first layer: embeddings."""
    last_bytes: int
    """What goes with the last: final norm and head; the embedding too, where it is the head."""
    headers: tuple[Header, ...]
    """Of each file."""
    layer_tensors: tuple[tuple[Stored, ...], ...]
    first_tensors: tuple[Stored, ...]
    last_tensors: tuple[Stored, ...]
    has_head: bool
    """Else it gives hidden states, and no tokens."""

    def parts_of(self, first: int, stop: int) -> dict[int, Ranges]:
        """Which files the layers `first` to `stop` - 1, and what goes with them, lie in, and which bytes of each, the
        header included: few ranges, and none for a file that is wanted whole, as all are by who has all layers."""
        tensors = list(itertools.chain(*self.layer_tensors[first:stop]))
        tensors += self.first_tensors if first == 0 else ()
        tensors += self.last_tensors if stop == len(self.layer_tensors) else ()
        whole = (first, stop) == (0, len(self.layer_tensors))
        parts: dict[int, Ranges] = {}
        for number in sorted({number for number, _ in tensors}):
            header = self.headers[number]
            wanted = [(0, header.data_start), *(header.tensors[name] for at, name in tensors if at == number)]
            part = joined(wanted, gap=CHUNK_BYTES, most=RANGES_MAX)
            parts[number] = () if whole or part == ((0, header.file_bytes),) else part
        return parts


def survey(config: str, files: list[Path], itemsize: int = ITEM_BYTES) -> Survey:
    """Look at the headers of a model's files; no tensor is read. Raises BadModel."""
    shape = shape_of(config)
    family = FAMILIES[shape.family]
    sizes, where = [0] * shape.layers, [list[Stored]() for _ in range(shape.layers)]
    ends = {"first": (0, list[Stored]()), "last": (0, list[Stored]())}
    headers = [read_header(file) for file in files]
    headed = shape.tied

    def add(end: str, size: int, stored: Stored) -> None:
        ends[end] = (ends[end][0] + size, [*ends[end][1], stored])

    for number, header in enumerate(headers):
        for name, count in header.numbers.items():
            size = itemsize * count
            parts = name.split(".")
            layer = next((at for at in range(len(parts) - 1) if parts[at] == family.layers), None)
            if layer is not None and parts[layer + 1].isdecimal() and int(parts[layer + 1]) < shape.layers:
                sizes[int(parts[layer + 1])] += size
                where[int(parts[layer + 1])].append((number, name))
            elif family.embedding in parts or (family.positions and family.positions in parts):
                add("first", size, (number, name))
                if shape.tied and family.embedding in parts:
                    add("last", size, (number, name))
            elif "lm_head" in parts or family.stored_head in parts:
                headed = True
                add("last", size, (number, name))
            elif family.norm in parts:
                add("last", size, (number, name))
    for layer, place in enumerate(where):
        if not place:
            raise BadModel(f"No file has layer {layer} of the model, which its config asks for.")
    (first_bytes, first_tensors), (last_bytes, last_tensors) = ends["first"], ends["last"]
    return Survey(
        layer_bytes=tuple(sizes),
        first_bytes=first_bytes,
        last_bytes=last_bytes,
        headers=tuple(headers),
        layer_tensors=tuple(map(tuple, where)),
        first_tensors=tuple(first_tensors),
        last_tensors=tuple(last_tensors),
        has_head=headed,
    )


def one_line(error: Exception) -> str:
    """What an error of a library says, short enough to stand within a sentence."""
    return textwrap.shorten(str(error), 300).rstrip(".")
