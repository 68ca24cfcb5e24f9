"""What a preset starts from. No torch here: with transformers' model code it takes seconds to load, and nothing else
that begins a job needs it. Other configs are left to transformers, which knows how each family begins."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shoal.models.configs import PRESETS

SPREAD = 0.02
"""Standard deviation of weights at the start (Radford et al., 2019), which is transformers' for both families."""


def initial_parameters(preset: str, vocabulary: int, *, seed: int) -> dict[str, NDArray[np.float32]]:
    """The parameters of one of PRESETS by name, each tied tensor once, as transformers initialises such a model:
    weights from normal distributions, norms one, biases zero. The same bytes for the same seed and numpy."""
    sizes = PRESETS[preset]
    shapes = (_gpt2 if sizes["model_type"] == "gpt2" else _llama)(vocabulary, **sizes)
    dice = np.random.Generator(np.random.PCG64(seed))
    residual = SPREAD / math.sqrt(2 * sizes["n_layer"]) if "n_layer" in sizes else SPREAD
    parameters = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            parameters[name] = np.full(shape, 0 if name.endswith(".bias") else 1, dtype=np.float32)
        else:
            drawn = dice.standard_normal(shape, dtype=np.float32)
            drawn *= np.float32(residual if name.endswith(".c_proj.weight") else SPREAD)
            parameters[name] = drawn
    return parameters


def _llama(
    vocabulary: int, *, hidden_size: int, intermediate_size: int, num_hidden_layers: int, **_: object
) -> dict[str, tuple[int, ...]]:
    """With as many heads for keys as for queries, and a head of its own."""
    square, wide = (hidden_size, hidden_size), (intermediate_size, hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden_size)}
    for layer in range(num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{one}_proj.weight": square for one in "qkvo"}
        shapes |= {f"{prefix}.mlp.{one}_proj.weight": wide for one in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden_size, intermediate_size)
        shapes |= {f"{prefix}.{one}_layernorm.weight": (hidden_size,) for one in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden_size,), "lm_head.weight": (vocabulary, hidden_size)}


def _gpt2(vocabulary: int, *, n_embd: int, n_layer: int, n_positions: int, **_: object) -> dict[str, tuple[int, ...]]:
    """Its head is the embedding; matrices are [in, out]."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, n_embd), "wpe.weight": (n_positions, n_embd)}
    ends = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    for layer in range(n_layer):
        for one, (given, out) in ends.items():
            shapes[f"h.{layer}.{one}.weight"] = (given * n_embd, out * n_embd)
            shapes[f"h.{layer}.{one}.bias"] = (out * n_embd,)
        shapes |= {f"h.{layer}.ln_{one}.{kind}": (n_embd,) for one in (1, 2) for kind in ("weight", "bias")}
    shapes |= {f"ln_f.{kind}": (n_embd,) for kind in ("weight", "bias")}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}
