"""Architectures as JSON. No torch here: whoever plans a job can read a config without building a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import BadInput

CONFIG_MAX_BYTES = 64 * 1024
POSITIONS_MAX = 1 << 24
"""Of one text; the longest that models know today are 10 million."""


class BadModel(BadInput):
    """A model config or checkpoint directory cannot be used."""

    code = "SH-161"


_LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        **_LLAMA,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    },
    "small": {
        **_LLAMA,
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": 2048,
    },
    "gpt2-small": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
"""`tiny`: 0.86 M parameters over bytes, for tests and first steps. `small`: 10 M over bytes. `gpt2-small`: the shape of
GPT-2 (Radford et al., 2019), 124 M with its 50,257 tokens."""


def preset_config(name: str, vocabulary: int, end: int | None = None) -> str:
    """A preset's config JSON for `vocabulary` token ids, of which `end` ends a document. Raises BadModel for an
    unknown name."""
    if name not in PRESETS:
        raise BadModel(f"There is no model preset {name!r}; there are {', '.join(PRESETS)}.")
    sizes = {"vocab_size": vocabulary, "bos_token_id": end, "eos_token_id": end}
    return canonical_config({**PRESETS[name], **sizes}, f"preset {name}")


def read_config(path: Path) -> str:
    """A config.json, or a directory with one -> config JSON. Raises BadModel."""
    file = path / "config.json" if path.is_dir() else path
    refuse_endless(file)
    try:
        if file.stat().st_size > CONFIG_MAX_BYTES:
            raise BadModel(f"{file} is larger than {CONFIG_MAX_BYTES} bytes; a model config is not.")
        config = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise BadModel(f"The model config {file} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadModel(f"The model config {file} is not JSON, or too deep: {error}.") from error
    if not isinstance(config, dict):
        raise BadModel(f"The model config {file} is not a JSON object.")
    return canonical_config(config, str(file))


def refuse_endless(file: Path) -> None:
    """Raises BadModel for what is there and no plain file: reading a pipe or a device may never end."""
    if file.exists() and not file.is_file():
        raise BadModel(f"{file} is not a plain file; put the model's own file there.")


def canonical_config(config: Mapping[str, Any], what: str) -> str:
    """A config as JSON with sorted keys, without what says nothing about the architecture. Raises BadModel."""
    refuse_code(config, what)
    if not isinstance(config.get("model_type"), str):
        raise BadModel(f"{what} does not say its model_type.")
    unsaid = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"}
    kept = {key: config[key] for key in sorted(config) if key not in unsaid}
    text = msgspec.json.encode(kept).decode()
    if len(text) > CONFIG_MAX_BYTES:
        raise BadModel(f"{what} is {len(text)} bytes long; the limit is {CONFIG_MAX_BYTES}.")
    return text


def refuse_code(config: Mapping[str, Any], what: str) -> None:
    """Raises BadModel for a config that names code to be run."""
    if "auto_map" in config:
        raise BadModel(f"{what} asks to run code from its directory (auto_map); Shoal runs no code from model files.")


def vocabulary_of(config: str) -> int:
    """How many token ids a config's model knows. Raises BadModel."""
    size = msgspec.json.decode(config).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise BadModel("The model config does not say its vocab_size.")
    return size


def positions_of(config: str) -> int | None:
    """The longest sequence a config's model takes, where it says so. Raises BadModel."""
    fields = msgspec.json.decode(config)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(fields.get(name), int):
            return bounded(int(fields[name]))
    return None


def bounded(positions: int) -> int:
    """Raises BadModel for more positions than a text can have: memory and limits are reckoned with them."""
    if positions > POSITIONS_MAX:
        raise BadModel(
            f"The model config says that a text may have {positions} positions; up to {POSITIONS_MAX} can be. Correct "
            "its max_position_embeddings."
        )
    return positions
