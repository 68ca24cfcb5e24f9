"""What every peer trains on: the Python standard library's own sources, as byte tokens.

A document is one source file; its tokens are its UTF-8 bytes and 256, which ends it. A document is held out when the
hash of its path says so, so that the split is the same wherever the same Python is. No peer is ever given a held-out
document: they serve only the evaluation, which is the same for all.
"""

from __future__ import annotations

import functools
import json
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

END = 256
VOCABULARY = 257
HELD_OUT_SHARE = 0.04
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "__pycache__")
"""Directories that are not read: tests are half of the library and hold malformed files on purpose."""
TRAIN_BYTES_MAX = 3 << 20
"""Enough for two passes of the longest run; a pool that a slow link carries to the nodes before the first round."""


@dataclass(frozen=True)
class Corpus:
    """Token files (little-endian unsigned 16-bit) and the same train documents as text, in one folder."""

    folder: str
    train_tokens: int
    held_out_tokens: int
    documents: int
    unigram_loss: float
    """Nats per held-out token under the train tokens' frequencies, each count plus one."""
    hash: str

    @property
    def train(self) -> Path:
        return Path(self.folder, "train.u16")

    @property
    def held_out(self) -> Path:
        return Path(self.folder, "held_out.u16")

    @property
    def train_text(self) -> Path:
        """JSON lines, `{"text": ...}`, a document each."""
        return Path(self.folder, "train.jsonl")

    def save(self) -> Path:
        path = Path(self.folder, "corpus.json")
        path.write_text(json.dumps(asdict(self)))
        return path

    @staticmethod
    def load(path: Path) -> Corpus:
        return Corpus(**json.loads(path.read_text()))


def build(folder: Path) -> Corpus:
    """Write the corpus into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_path("stdlib"))
    sides: dict[bool, list[NDArray[np.uint16]]] = {True: [], False: []}
    documents = size = 0
    with (folder / "train.jsonl").open("w", encoding="utf-8") as texts:
        for draw, path in sorted((_draw(path.relative_to(root)), path) for path in root.rglob("*.py")):
            if set(path.relative_to(root).parts) & set(LEFT_OUT):
                continue
            content = path.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            held_out = draw < HELD_OUT_SHARE
            if not content or (not held_out and size + len(content) > TRAIN_BYTES_MAX):
                continue
            documents += 1
            sides[held_out].append(np.append(np.frombuffer(content, np.uint8).astype("<u2"), np.uint16(END)))
            if not held_out:
                size += len(content)
                texts.write(json.dumps({"text": text}) + "\n")
    train, held = np.concatenate(sides[False]), np.concatenate(sides[True])
    train.tofile(folder / "train.u16")
    held.tofile(folder / "held_out.u16")
    counts = np.bincount(train, minlength=VOCABULARY) + 1
    seen = np.bincount(held, minlength=VOCABULARY)
    corpus = Corpus(
        folder=str(folder),
        train_tokens=train.size,
        held_out_tokens=held.size,
        documents=documents,
        unigram_loss=float(-(seen * np.log(counts / counts.sum())).sum() / seen.sum()),
        hash=blake3(train.tobytes() + held.tobytes()).hexdigest()[:16],
    )
    corpus.save()
    return corpus


def _draw(name: Path) -> float:
    """A number in [0, 1) that follows from a document's path in the library."""
    return int.from_bytes(blake3(name.as_posix().encode()).digest()[:6], "big") / (1 << 48)


class Sequences:
    """The train tokens cut into sequences of `length` tokens and the one after, in an order that `seed` shuffles anew
    for every pass."""

    def __init__(self, tokens: Path, length: int, seed: int) -> None:
        self._tokens = np.memmap(tokens, np.dtype("<u2"), mode="r")
        self._length, self._seed = length, seed
        self.count = (self._tokens.size - 1) // length
        self._order = functools.lru_cache(2)(
            lambda turn: np.random.default_rng((seed, turn)).permutation(self.count).astype(np.int64)
        )

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Sequences number `first` to `first + count` of the whole run: token ids [count, length + 1]."""
        rows = []
        for number in range(first, first + count):
            turn, place = divmod(number, self.count)
            begin = int(self._order(turn)[place]) * self._length
            rows.append(self._tokens[begin : begin + self._length + 1])
        return np.stack(rows).astype(np.int64)
