"""Checkpoint directories as `transformers` reads and writes them. safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from shoal.models.architectures import CausalModel, build_model, one_line, parameters_of
from shoal.models.configs import BadModel, read_config, refuse_endless
from shoal.models.tokenizers import TextTokenizer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
FILES_MAX = 1024


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


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises BadModel."""
    refuse_endless(directory / INDEX)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if (directory / INDEX).exists():
        try:
            names = set(msgspec.json.decode((directory / INDEX).read_bytes())["weight_map"].values())
        except (msgspec.DecodeError, RecursionError, KeyError, AttributeError, TypeError) as error:
            raise BadModel(f"{directory / INDEX} is not an index of safetensors files.") from error
        bad = sorted(str(name) for name in names if Path(str(name)).name != name or not name.endswith(".safetensors"))
        if bad:
            raise BadModel(f"{directory / INDEX} names {bad[0]!r}; only .safetensors files beside it are read.")
        missing = sorted(name for name in names if not (directory / name).is_file())
        if missing:
            because = f"; {pickles[0]} is a pickle and is never read" if pickles else ""
            raise BadModel(f"{directory} lacks {missing[0]}, which its index names{because}.")
        files = sorted(directory / name for name in names)
    else:
        files = sorted(directory.glob("*.safetensors"))
        for file in files:
            refuse_endless(file)
    if not files and pickles:
        raise BadModel(
            f"{directory / pickles[0]} is a pickle, which can run code when it is read; Shoal never does. "
            "Save the model with save_pretrained(..., safe_serialization=True)."
        )
    if not files:
        raise BadModel(f"{directory} holds no .safetensors file.")
    if len(files) > FILES_MAX:
        raise BadModel(f"{directory} holds {len(files)} safetensors files; the limit is {FILES_MAX}.")
    return files


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
