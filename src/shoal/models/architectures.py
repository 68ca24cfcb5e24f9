"""Config -> module."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shoal.models.configs import BadModel
from shoal.models.shapes import LAYERS_MAX, one_line, parse_config

disable_progress_bar()

LAYER_PARAMETERS_LEAST = 64

CausalModel = nn.Module
"""Called with token ids [batch, positions]; gives an object with `logits` [batch, positions, vocabulary]."""


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
