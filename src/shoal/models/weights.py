"""Which files of a checkpoint hold its weights. No torch here."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shoal.models.configs import BadModel, refuse_endless

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
FILES_MAX = 1024


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
