"""Some layers of a causal language model as a module of their own, their tensors straight from safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from shoal.models.configs import BadModel
from shoal.models.headers import read_header
from shoal.models.shapes import FAMILIES, Family, one_line, parse_config, shape_of
from shoal.quantities import Ranges, covered


class StageModule(nn.Module):
    """Layers `first` to `stop` - 1. The first stage takes token ids, the others hidden states; the last gives hidden
    states ready for `head`."""

    def __init__(self, base: Any, head: nn.Module | None, *, first: int, stop: int, layers: int) -> None:
        super().__init__()
        self.base = base
        self.head = head
        self.first, self.stop = first, stop
        self.takes_tokens = first == 0
        self.is_last = stop == layers

    def forward(self, inputs: torch.Tensor, positions: torch.Tensor, **attention: Any) -> torch.Tensor:
        """`inputs`: token ids [rows] or hidden states [rows, hidden], of any sessions one after another; `positions`
        [rows]. Gives hidden states [rows, hidden]. `attention` goes to the attention function as it is."""
        given = {"input_ids": inputs[None]} if self.takes_tokens else {"inputs_embeds": inputs[None]}
        done = self.base(**given, position_ids=positions[None], use_cache=False, **attention)
        states: torch.Tensor = done.last_hidden_state[0]
        return states


def read_stage(
    config: str,
    files: list[Path],
    first: int,
    stop: int,
    *,
    attention: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    parts: Sequence[Ranges] = (),
) -> StageModule:
    """Build a stage and read its tensors, and no others. `attention`: name of a function that `transformers` knows.
    `parts`: which bytes of each file are there, none for all; what lies outside is refused, whatever stands there.
    Where the files hold no head of its own (models for embeddings have none), the last stage has none.

    Raises BadModel: a family that cannot be served, layers that are not there, tensors that are missing, misshapen or
    not finite, each by name.
    """
    stage, wanted = _empty_stage(config, first, stop, attention)
    parameters = dict(stage.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for file, part in zip(files, parts or [()] * len(files), strict=True):
        header = read_header(file, part) if part else None
        try:
            with safe_open(file, framework="pt") as opened:
                there = set(opened.keys())
                for name, spellings in wanted.items():
                    stored = next((one for one in spellings if one in there), None)
                    if stored is None or name in found:
                        continue
                    if header is not None and not covered(*header.tensors[stored], part):
                        start, stop_at = header.tensors[stored]
                        raise BadModel(
                            f"{file.name}: tensor {stored!r} lies at bytes {start} to {stop_at}, which are not of the "
                            f"part that was fetched; the gateway has to name them."
                        )
                    tensor = opened.get_tensor(stored)
                    if tensor.shape != parameters[name].shape:
                        raise BadModel(
                            f"{file.name}: tensor {stored!r} has shape {tuple(tensor.shape)}; its config says "
                            f"{tuple(parameters[name].shape)}."
                        )
                    found[name] = tensor.to(device=device, dtype=dtype)
                    if not torch.isfinite(found[name]).all():
                        raise BadModel(f"{file.name}: tensor {stored!r} holds numbers that are not finite.")
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{file.name} is not a whole safetensors file: {error}.") from error
    if stage.head is not None and "head.weight" not in found and not shape_of(config).tied:
        stage.head, wanted = None, {name: at for name, at in wanted.items() if not name.startswith("head.")}
    for name, spellings in wanted.items():
        if name not in found:
            raise BadModel(f"No file has the tensor {spellings[0]!r}, which the model's config asks for.")
    stage.load_state_dict(found, strict=True, assign=True)
    return stage.to(device).eval().requires_grad_(False)


def _empty_stage(config: str, first: int, stop: int, attention: str) -> tuple[StageModule, dict[str, tuple[str, ...]]]:
    """A stage whose parameters are on the meta device, and for each the names under which files may have it."""
    shape = shape_of(config)
    if not 0 <= first < stop <= shape.layers:
        raise BadModel(f"The model has {shape.layers} layers; there is no stage from layer {first} to {stop - 1}.")
    family = FAMILIES[shape.family]
    parsed = parse_config(config)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(parsed, attn_implementation=attention)
    except Exception as error:
        raise BadModel(f"No causal language model can be built from this config: {one_line(error)}.") from error
    base = getattr(model, model.base_model_prefix)
    prefix = model.base_model_prefix
    setattr(base, family.layers, getattr(base, family.layers)[first:stop])
    if stop < shape.layers:
        setattr(base, family.norm, nn.Identity())
    if first > 0:
        setattr(base, family.embedding, None)
        if family.positions:
            setattr(base, family.positions, _NoPositions())
    _fill_buffers(base, family)
    head = model.lm_head if stop == shape.layers else None
    if head is not None and shape.tied:  # the module must not share its parameter with an embedding that is not read
        head.weight = nn.Parameter(torch.empty_like(head.weight, device="meta"), requires_grad=False)
    stage = StageModule(base, head, first=first, stop=stop, layers=shape.layers)
    wanted: dict[str, tuple[str, ...]] = {}
    for name, _ in stage.named_parameters():
        if name.startswith("head."):
            end = name.removeprefix("head.")
            embedded = f"{family.embedding}.{end}"
            own = (f"lm_head.{end}", f"{family.stored_head}.{end}")
            wanted[name] = (f"{prefix}.{embedded}", embedded) if shape.tied else own
        else:
            inner = _counted_from(name.removeprefix("base."), family.layers, first)
            wanted[name] = (f"{prefix}.{inner}", inner)
    return stage, wanted


def _counted_from(name: str, layers: str, first: int) -> str:
    """A stage counts its layers from 0, a checkpoint those of the model."""
    if not name.startswith(f"{layers}."):
        return name
    _, number, rest = name.split(".", 2)
    return f"{layers}.{int(number) + first}.{rest}"


def _fill_buffers(base: Any, family: Family) -> None:
    """What no file holds and follows from the config: rotary frequencies, an embedding's scale."""
    if hasattr(base, "rotary_emb"):
        base.rotary_emb = type(base.rotary_emb)(config=base.config)
    embedding = getattr(base, family.embedding)
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    for name, buffer in base.named_buffers():
        if buffer.is_meta:
            raise BadModel(f"A {base.config.model_type} model holds {name!r}, which serving cannot make.")


class _NoPositions(nn.Module):
    """In place of learned positions, which the first stage has added already."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=positions.device)


SIDE_BY_SIDE = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Linear maps that a family's layers give the same rows."""


@dataclass(frozen=True)
class LinearMap:
    parent: nn.Module
    name: str
    weight: torch.Tensor
    """[out, in]"""
    bias: torch.Tensor | None


def linear_maps(stage: nn.Module) -> list[list[LinearMap]]:
    """Every linear map of a stage, those of the same rows together."""
    found: list[list[LinearMap]] = []
    for parent in stage.modules():
        maps: dict[str, LinearMap] = {}
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                maps[name] = LinearMap(parent, name, module.weight, module.bias)
            elif isinstance(module, Conv1D):
                maps[name] = LinearMap(parent, name, module.weight.t(), module.bias)
        for names in SIDE_BY_SIDE:
            if names <= maps.keys() and len({maps[name].bias is None for name in names}) == 1:
                found.append([maps.pop(name) for name in list(maps) if name in names])
        found += [[one] for one in maps.values()]
    return found


def activations(stage: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """(parent, name) of every activation of a kind, as `transformers` names it."""
    kind = type(ACT2FN[name])
    return [
        (parent, at) for parent in stage.modules() for at, module in parent.named_children() if type(module) is kind
    ]


def rms_norms(stage: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor, float]]:
    """(parent, name, weight, epsilon) of every root mean square norm that multiplies by its weight as it is, in
    float32."""
    children: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child) for parent in stage.modules() for name, child in parent.named_children()
    ]
    return [
        (parent, name, child.weight, child.variance_epsilon)
        for parent, name, child in children
        if type(child).__name__.endswith("RMSNorm")
        and hasattr(child, "variance_epsilon")
        and child.weight.dtype == torch.float32
    ]
