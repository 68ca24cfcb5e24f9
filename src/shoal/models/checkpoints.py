"""Checkpoint directories as `transformers` reads and writes them. safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from shoal.models.architectures import build_model, parameters_of
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
    files = _weight_files(directory)
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters_of(build_model(config)).items()}
    tensors: dict[str, NDArray[np.float32]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for stored in opened.keys():  # noqa: SIM118  (not a mapping)
                    name = _own_name(stored, wanted)
                    if name is not None and name not in tensors:
                        tensors[name] = opened.get_tensor(stored).to(torch.float32).numpy()
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{file} is not a whole safetensors file: {error}.") from error
    for name, shape in wanted.items():
        if name not in tensors:
            raise BadModel(f"{directory} has no tensor {name!r}, which its config asks for.")
        if tensors[name].shape != shape:
            raise BadModel(f"{directory}: tensor {name!r} has shape {tensors[name].shape}; its config says {shape}.")
        if not np.isfinite(tensors[name]).all():
            raise BadModel(f"{directory}: tensor {name!r} holds numbers that are not finite.")
    return Checkpoint(config, tensors)


def _weight_files(directory: Path) -> list[Path]:
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


def _own_name(stored: str, wanted: Mapping[str, object]) -> str | None:
    """Checkpoints of a bare model lack the prefix that its causal form has."""
    if stored in wanted:
        return stored
    return next((name for name in wanted if name.partition(".")[2] == stored), None)


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
