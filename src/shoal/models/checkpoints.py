"""Checkpoint directories as `transformers` reads and writes them. safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from shoal.models.architectures import CausalModel, build_model, parameters_of
from shoal.models.configs import BadModel, read_config
from shoal.models.shapes import one_line
from shoal.models.tokenizers import TextTokenizer
from shoal.models.weights import weight_files


@dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk."""

    config: str
    tensors: dict[str, NDArray[np.float32]]
    """By parameter name, each tied tensor once."""


def read_checkpoint(directory: Path) -> Checkpoint:
    """Raises BadModel: no config, a pickle, missing, misshapen or not finite tensors, each by name."""
    config = read_config(directory)
    stored: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    if name not in stored:
                        stored[name] = opened.get_tensor(name).to(torch.float32)
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{file} is not a whole safetensors file: {error}.") from error
    model = _filled(directory, config, stored)
    tensors = {name: value.detach().numpy() for name, value in parameters_of(model).items()}
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise BadModel(f"{directory}: tensor {name!r} holds numbers that are not finite.")
    return Checkpoint(config, tensors)


def _filled(directory: Path, config: str, stored: dict[str, torch.Tensor]) -> CausalModel:
    """The config's model with stored tensors in it. Many families store them under other names than the module has, or
    in parts (experts, for one); transformers knows how they belong together."""
    with torch.device("meta"):
        model: Any = build_model(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what is missing is said below
    try:
        filled, found = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=stored,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise BadModel(
            f"{directory}: its tensors do not make a {model.config.model_type} model: {one_line(error)}."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    for name, has, wanted in sorted(found["mismatched_keys"]):
        raise BadModel(f"{directory}: tensor {name!r} has shape {tuple(has)}; its config says {tuple(wanted)}.")
    for name in sorted(found["missing_keys"]):
        raise BadModel(f"{directory} has no tensor {name!r}, which its config asks for.")
    return cast(CausalModel, filled)


def write_checkpoint(
    directory: Path, config: str, tensors: Mapping[str, NDArray[np.float32]], tokenizer: TextTokenizer | None = None
) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(directory)` loads, and the tokenizer beside it."""
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
    directory.mkdir(parents=True, exist_ok=True)
    save: Any = model.save_pretrained
    try:
        save(directory)
    except SafetensorError as error:  # it speaks of the disk
        raise OSError(f"{directory}: {error}") from error
    if tokenizer is not None:
        tokenizer.save(directory)
