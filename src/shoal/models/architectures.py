"""Config -> module."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shoal.models.configs import BadModel

disable_progress_bar()

CausalModel = nn.Module
"""Called with token ids [batch, positions]; gives an object with `logits` [batch, positions, vocabulary]."""


def parse_config(config: str) -> Any:
    """Config JSON -> `transformers` config. Raises BadModel."""
    fields: dict[str, Any] = msgspec.json.decode(config)
    model_type = fields.pop("model_type", None)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise BadModel(
            f"The installed transformers cannot read this {model_type} config: {_one_line(error)}."
        ) from error


def build_model(config: str, *, seed: int | None = None) -> CausalModel:
    """A float32 module on the CPU; weights as `transformers` initialises them after `torch.manual_seed(seed)`.

    Attention is torch's `scaled_dot_product_attention`. Raises BadModel.
    """
    parsed = parse_config(config)
    if seed is not None:
        torch.manual_seed(seed)
    try:
        model: CausalModel = AutoModelForCausalLM.from_config(parsed, attn_implementation="sdpa", dtype=torch.float32)
    except Exception as error:
        raise BadModel(f"No causal language model can be built from this config: {_one_line(error)}.") from error
    return model.train()


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, each tensor once (tied weights under their first name). Raises BadModel."""
    named = dict(model.named_parameters())
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if frozen:
        raise BadModel(f"Parameter {frozen[0]!r} is frozen; every parameter of a shoal's model takes part.")
    return named


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
