"""How a model's hidden states become an embedding, as sentence-transformers writes it beside a checkpoint. No torch.

`modules.json` names the modules in their order, and a pooling module's folder has a `config.json` of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from shoal.models.configs import BadModel, refuse_endless

MODULES = "modules.json"
TRANSFORMER = "sentence_bert_config.json"
FILE_MAX_BYTES = 64 * 1024
MODULES_MAX = 16
Mode = Literal["lasttoken", "mean", "cls"]
MODES: dict[str, Mode] = {
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
T = TypeVar("T")


class _Module(msgspec.Struct):
    type: Annotated[str, Meta(max_length=256)]
    path: Annotated[str, Meta(max_length=128)] = ""

    @property
    def kind(self) -> str:
        return self.type.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Pooling:
    """From the hidden states of a text's positions to its embedding."""

    mode: Mode
    """Of the last position, the mean over all, or of the first."""
    hidden: int
    normalized: bool
    """Whether an embedding has the length 1."""
    positions: int | None = None
    """Tokens that a text may have, where it is said."""

    def seen(self, length: int) -> int:
        """How many of a text's tokens have to go through the model: what follows a position does not change it."""
        return 1 if self.mode == "cls" else length

    def wanted(self, start: int, stop: int, seen: int) -> int:
        """Of how many positions up to `stop` - 1, in a piece from `start` on, the states matter."""
        return stop - start if self.mode == "mean" else int(stop == seen)

    def embedding(self, vector: NDArray[np.float64], dimensions: int | None) -> NDArray[np.float32]:
        """From the mean [hidden] of the wanted states. With `dimensions`: the first so many numbers, of length 1."""
        if self.normalized or dimensions is not None:
            vector = _of_length_one(vector[:dimensions])
        return vector.astype(np.float32)


def _of_length_one(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def read_pooling(directory: Path, config: str, hidden: int) -> Pooling | None:
    """Of a model with hidden states of `hidden` numbers; None where no modules.json lies. Raises BadModel for modules
    that are not followed, each by name."""
    file = directory / MODULES
    if not file.exists():
        return None
    modules = _read(file, list[_Module])
    kinds = [module.kind for module in modules]
    if len(modules) > MODULES_MAX:
        raise BadModel(f"{file} lists {len(modules)} modules; the limit is {MODULES_MAX}.")
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise BadModel(
            f"{file} lists {', '.join(kinds) or 'nothing'}; embeddings are made by Transformer, Pooling and Normalize, "
            "in this order. Without modules.json the model is served without them."
        )
    transformer, pooling = modules[:2]
    if transformer.path or pooling.path in ("", "..") or Path(pooling.path).name != pooling.path:
        raise BadModel(f"{file}: the model must lie beside it, and its pooling in a folder beside it.")
    if _looks_ahead(config):
        raise BadModel(
            f"{directory}: its positions attend to what follows them, which serving does not do. Without modules.json "
            "the model is served without embeddings."
        )
    settings: dict[str, Any] = {}
    if (directory / TRANSFORMER).exists():
        settings = _read(directory / TRANSFORMER, dict[str, Any])
    if settings.get("do_lower_case"):
        raise BadModel(f"{directory / TRANSFORMER}: do_lower_case is not followed.")
    longest = settings.get("max_seq_length")
    return Pooling(
        _mode(directory / pooling.path / "config.json"),
        hidden,
        "Normalize" in kinds,
        longest if isinstance(longest, int) and longest > 0 else None,
    )


def _mode(file: Path) -> Mode:
    settings = _read(file, dict[str, Any])
    named = settings.get("pooling_mode")
    said = {name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True}
    if isinstance(named, str):
        said = {next((name for name, mode in MODES.items() if mode == named), named)}
    if len(said) == 1 and said <= set(MODES):
        return MODES[said.pop()]
    raise BadModel(
        f"{file}: the pooling {', '.join(sorted(said)) or 'that is none'} is not offered; one of "
        f"{', '.join(MODES.values())} is."
    )


def _looks_ahead(config: str) -> bool:
    fields = msgspec.json.decode(config)
    return fields.get("is_causal") is False or bool(fields.get("use_bidirectional_attention"))


def _read(file: Path, kind: type[T]) -> T:
    refuse_endless(file)
    try:
        if file.stat().st_size > FILE_MAX_BYTES:
            raise BadModel(f"{file} is larger than {FILE_MAX_BYTES} bytes.")
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        raise BadModel(f"{file} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadModel(f"{file} is not what sentence-transformers writes: {error}.") from error
