"""Config -> module."""

from __future__ import annotations

import textwrap
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shoal.models.configs import BadModel, refuse_code

disable_progress_bar()

LAYERS_MAX = 4096
LAYERS_NAMES = ("num_hidden_layers", "n_layer", "num_layers")
LAYER_PARAMETERS_LEAST = 64

CausalModel = nn.Module
"""Called with token ids [batch, positions]; gives an object with `logits` [batch, positions, vocabulary]."""


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
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise BadModel(
            f"The installed transformers cannot read this {model_type} config: {one_line(error)}."
        ) from error


def build_model(config: str, *, seed: int | None = None) -> CausalModel:
    """A float32 module on the CPU; weights as `transformers` initialises them after `torch.manual_seed(seed)`.

    Attention is torch's `scaled_dot_product_attention`. Raises BadModel.
    """
    parsed = parse_config(config)
    if seed is not None:
        torch.manual_seed(seed)
    try:
        model: CausalModel = AutoModelForCausalLM.from_config(
            parsed, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:
        if "scaled_dot_product_attention" in str(error):
            raise BadModel(
                f"A {parsed.model_type} model cannot be trained: in transformers it has no attention through torch's "
                "scaled_dot_product_attention. Choose a causal language model that has, such as llama, qwen2, mistral, "
                "gemma or gpt2."
            ) from error
        raise BadModel(f"No causal language model can be built from this config: {one_line(error)}.") from error
    return model.train()


def refuse_depth(config: str, parameters: int) -> None:
    """Raises BadModel for a config with more layers than a model of so many parameters has: building one takes time
    and memory for each, before anything could be counted."""
    layers = getattr(parse_config(config), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > min(LAYERS_MAX, 1 + parameters // LAYER_PARAMETERS_LEAST):
        raise BadModel(
            f"The config has {str(layers)[:20]} layers, a model of {parameters} parameters cannot have so many."
        )


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, each tensor once (tied weights under their first name). Raises BadModel."""
    named = dict(model.named_parameters())
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if frozen:
        raise BadModel(f"Parameter {frozen[0]!r} is frozen; every parameter of a shoal's model takes part.")
    return named


def one_line(error: Exception) -> str:
    """What an error of a library says, short enough to stand within a sentence."""
    return textwrap.shorten(str(error), 300).rstrip(".")
