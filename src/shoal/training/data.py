"""Text -> tokens: files are read, split into train and held-out, tokenized, and cut into shards.

A shard is a raw file of little-endian unsigned integers, `sequences` * sequence_tokens + 1 of them: each sample is a
sequence and the token after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import BadInput
from shoal.training.commands import ShardFile

SHARD_MAX_BYTES = 32 << 20


class BadData(BadInput):
    """A data file is missing, empty, not text, lacks its text field, or there is too little of it."""

    code = "SH-540"


@dataclass(frozen=True)
class PreparedData:
    """Tokens on disk, ready to be named as blobs."""

    train: tuple[ShardFile, ...]
    held_out: tuple[ShardFile, ...]
    sequence_tokens: int
    token_bytes: int
    vocabulary: int
    """How many different ids the tokenizer has, the end-of-document token included."""
    documents: int
    train_tokens: int
    held_out_tokens: int
    unigram_loss: float
    """Nats per held-out token under the train tokens' frequencies, each count plus one."""

    @property
    def samples(self) -> int:
        return sum(shard.sequences for shard in self.train)


def prepare_data(
    paths: Sequence[str | Path],
    directory: Path,
    *,
    tokenizer: str = "bytes",
    sequence_tokens: int = 128,
    held_out_fraction: float = 0.02,
    seed: int = 0,
    text_field: str = "text",
) -> PreparedData:
    """Read text, `.jsonl` and `.parquet` files, directories and globs; write shards into `directory`.

    Each document is train or held-out by a seeded hash of its bytes. Raises BadData, naming the file and what is
    wrong with it.
    """
    raise NotImplementedError
