"""Text -> tokens -> samples: files are read, split into train and held-out, tokenized, and cut into shards.

A shard is a raw file of little-endian unsigned integers, `sequences` * sequence_tokens + 1 of them: each sample is a
sequence and the token after it. Documents follow one another, each closed by the tokenizer's end token.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal.errors import BadInput
from shoal.identity import hash_of_parts
from shoal.models.tokenizers import load_tokenizer
from shoal.training.commands import ShardFile

SHARD_MAX_BYTES = 32 << 20
FILES_MAX = 100_000
DOCUMENT_MAX_BYTES = 256 << 20
ROWS_AT_ONCE = 1024
VOCABULARY_MAX = 1 << 22
PIECE_CHARACTERS = 16 << 10
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".js", ".ts", ".csv", ".html", ".xml")
"""Files of these kinds are taken from a directory, beside .jsonl and .parquet. A file named itself is taken anyway."""


class BadData(BadInput):
    """A data file is missing, empty, not text, lacks its text field, or there is too little of it."""

    code = "SH-160"


@dataclass(frozen=True)
class PreparedData:
    """Tokens on disk, ready to be named as blobs."""

    train: tuple[ShardFile, ...]
    held_out: tuple[ShardFile, ...]
    sequence_tokens: int
    token_bytes: int
    vocabulary: int
    """How many different ids the tokenizer has, the end-of-document token included."""
    end: int | None
    """The id that ends a document."""
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
    file_format: str = "auto",
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> PreparedData:
    """Read text, `.jsonl` and `.parquet` files, directories and globs; write shards into `directory`. `file_format` is
    `text`, `jsonl` or `parquet` where the files' endings do not say it (`auto`).

    A text file is one document, a line of .jsonl or a row of .parquet is one. Each document (of a long one, each piece
    of PIECE_CHARACTERS) is train or held-out by a seeded hash of its text, so that copies of one stay on one side; when
    none of a few falls to the held-out side, the one with the lowest hash does. `watch` is told piece by piece how many
    bytes of how many were read, about; what it raises ends the reading. Raises BadData, naming the file and what is
    wrong.
    """
    words = load_tokenizer(tokenizer)
    if words.vocabulary > VOCABULARY_MAX:
        raise BadData(f"A tokenizer of {words.vocabulary} ids is too large; the limit is {VOCABULARY_MAX}.")
    directory.mkdir(parents=True, exist_ok=True)
    token_bytes = 1 if words.vocabulary <= 1 << 8 else 2 if words.vocabulary <= 1 << 16 else 4
    files = find_files(paths)
    sizes = [_size(file) for file in files]
    total, done = sum(sizes), 0
    watch(0, total)
    forced = _forced_held_out(files, text_field, file_format, seed, held_out_fraction)
    train = _ShardWriter(directory, "train", sequence_tokens, token_bytes, words.vocabulary)
    held_out = _ShardWriter(directory, "heldout", sequence_tokens, token_bytes, words.vocabulary)
    documents = 0
    for file, size in zip(files, sizes, strict=True):
        within = 0
        for text in read_documents(file, text_field, file_format):
            documents += 1
            for piece, last in _pieces(text):
                within = min(size, within + len(piece))  # a compressed file holds more characters than it has bytes
                watch(done + within, total)
                draw = _draw(seed, piece)
                writer = held_out if draw < held_out_fraction or draw in forced else train
                writer.add(words.encode(piece))
                if last and words.end is not None:
                    writer.add(np.array([words.end], dtype=np.uint32))
        done += size
    train_shards, held_out_shards = train.close(), held_out.close()
    for name, shards, writer in (("train on", train_shards, train), ("hold out", held_out_shards, held_out)):
        if not shards:
            raise BadData(
                f"The data gives {writer.tokens} tokens to {name}; one sequence takes {sequence_tokens + 1}. "
                "Add data, choose shorter sequences, or hold out another fraction."
            )
    return PreparedData(
        train=train_shards,
        held_out=held_out_shards,
        sequence_tokens=sequence_tokens,
        token_bytes=token_bytes,
        vocabulary=words.vocabulary,
        end=words.end,
        documents=documents,
        train_tokens=train.tokens,
        held_out_tokens=held_out.tokens,
        unigram_loss=unigram_loss(train.counts, held_out.counts),
    )


def unigram_loss(train: NDArray[np.int64], held_out: NDArray[np.int64]) -> float:
    """Token counts -> nats per held-out token when each is guessed with its (count + 1) share of the train tokens."""
    probability = (train + 1) / (train.sum() + train.size)
    return float(-(held_out * np.log(probability)).sum() / max(1, int(held_out.sum())))


def _draw(seed: int, text: str) -> float:
    """A number in [0, 1) that follows from seed and document."""
    digest = hash_of_parts("held-out split", (seed.to_bytes(8, "big"), text.encode(errors="surrogatepass")))
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def _forced_held_out(
    files: Sequence[Path], text_field: str, file_format: str, seed: int, fraction: float
) -> frozenset[float]:
    """With few documents a fraction can miss them all: then the one with the lowest draw is held out (none of one)."""
    draws: Counter[float] = Counter()
    for file in files:
        for text in read_documents(file, text_field, file_format):
            for piece, _ in _pieces(text):
                draws[_draw(seed, piece)] += 1
                if len(draws) > ROWS_AT_ONCE:
                    return frozenset()
    if fraction > 0 and len(draws) > 1 and min(draws) >= fraction:
        return frozenset({min(draws)})
    return frozenset()


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """A text cut at line ends into pieces of about PIECE_CHARACTERS, and whether each is the last."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        cut = text.rfind("\n", start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS) + 1
        stop = cut or start + PIECE_CHARACTERS
        yield text[start:stop], False
        start = stop
    yield text[start:], True


class _ShardWriter:
    """Collects tokens and writes shards of at most SHARD_MAX_BYTES. The last token of a shard is also the first of the
    next, so that no sequence is lost between them; what does not fill a sequence at the end is left out."""

    def __init__(self, directory: Path, name: str, sequence_tokens: int, token_bytes: int, vocabulary: int) -> None:
        self._directory, self._name = directory, name
        self._sequence, self._dtype = sequence_tokens, np.dtype(f"<u{token_bytes}")
        self._per_shard = max(1, (SHARD_MAX_BYTES // token_bytes - 1) // sequence_tokens)
        self._parts: list[NDArray[np.uint32]] = []
        self._held = 0
        self._shards: list[ShardFile] = []
        self.tokens = 0
        self.counts = np.zeros(vocabulary, dtype=np.int64)

    def add(self, tokens: NDArray[np.uint32]) -> None:
        self._parts.append(tokens)
        self._held += tokens.size
        self.tokens += tokens.size
        self.counts += np.bincount(tokens, minlength=self.counts.size)
        while self._held > self._per_shard * self._sequence:
            self._write(self._per_shard)

    def close(self) -> tuple[ShardFile, ...]:
        if self._held > self._sequence:
            self._write((self._held - 1) // self._sequence)
        return tuple(self._shards)

    def _write(self, sequences: int) -> None:
        everything = np.concatenate(self._parts)
        path = self._directory / f"{self._name}-{len(self._shards):05d}.tokens"
        path.write_bytes(everything[: sequences * self._sequence + 1].astype(self._dtype).data)  # tofile has no errno
        self._shards.append(ShardFile(str(path), sequences))
        self._parts = [everything[sequences * self._sequence :]]
        self._held = self._parts[0].size


# --- reading -------------------------------------------------------------------------------------------------------


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """Files, directories and globs -> files, in order of their names, each once. Raises BadData."""
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_data(file)]
            if not files:
                raise BadData(f"The directory {path} holds no text, .jsonl or .parquet files.")
        elif path.exists():
            files = [path]
        else:
            pattern = path if path.is_absolute() else Path.cwd() / path
            matches = Path(pattern.anchor).glob(str(pattern)[len(pattern.anchor) :])
            files = sorted(file for file in matches if file.is_file() and (_is_table(file) or file.stat().st_size > 0))
            if not files:
                raise BadData(
                    f"There is no data at {path}, or only empty files; name a file, a directory or a pattern such as "
                    "data/*.txt."
                )
        found.update(dict.fromkeys(files))
        if len(found) > FILES_MAX:
            raise BadData(f"{path} leads to more than {FILES_MAX} files; join them into fewer.")
    if not found:
        raise BadData("No data was named; name a file, a directory or a pattern such as data/*.txt.")
    return list(found)


def _is_data(file: Path) -> bool:
    """Whether a file in a named directory is meant. Trees of text are full of empty files that mean nothing, and a
    pattern meets them too; an empty table is a broken one."""
    return _is_table(file) or (file.suffix.lower() in TEXT_SUFFIXES and file.stat().st_size > 0)


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in (".jsonl", ".parquet")


def read_documents(file: Path, text_field: str = "text", file_format: str = "auto") -> Iterator[str]:
    """The texts in one file. Raises BadData."""
    if file_format == "auto":
        file_format = {".parquet": "parquet", ".jsonl": "jsonl"}.get(file.suffix.lower(), "text")
    size = _size(file)
    if size == 0:
        raise BadData(f"The data file {file} is empty (zero bytes); leave it out or fill it.")
    try:
        if file_format == "parquet":
            yield from _read_parquet(file, text_field)
        elif file_format == "jsonl":
            yield from _read_jsonl(file, text_field)
        elif size > DOCUMENT_MAX_BYTES:
            raise BadData(f"The text file {file} is larger than {DOCUMENT_MAX_BYTES >> 20} MiB; cut it into several.")
        else:
            yield _utf8(file.read_bytes(), f"The text file {file}")
    except OSError as error:
        raise _unreadable(file, error) from error


def _size(file: Path) -> int:
    try:
        status = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device may have no end
        raise BadData(f"The data file {file} is not a plain file; save what it gives to one.")
    return status.st_size


def _unreadable(file: Path, error: OSError) -> BadData:
    return BadData(f"The data file {file} cannot be read: {error.strerror or error}.")


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"{what} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert it.") from error


def _read_jsonl(file: Path, text_field: str) -> Iterator[str]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(DOCUMENT_MAX_BYTES):
            number += 1
            if len(line) == DOCUMENT_MAX_BYTES:
                raise BadData(f"Line {number} of {file} is longer than {DOCUMENT_MAX_BYTES >> 20} MiB.")
            if not line.strip():
                continue
            where = f"Line {number} of {file}"
            try:
                entry: Any = msgspec.json.decode(_utf8(line, where))
            except (msgspec.DecodeError, RecursionError) as error:
                raise BadData(f"{where} is not JSON, or too deep: {error}.") from error
            if not isinstance(entry, dict) or not isinstance(entry.get(text_field), str):
                raise BadData(f"{where} has no text field {text_field!r}; name the field that holds the text.")
            yield entry[text_field]


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            if text_field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names[:20])
                raise BadData(f"{file} has no column {text_field!r}; it has {names}.")
            row = 0
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
                try:
                    values = batch.column(0).to_pylist()
                except UnicodeDecodeError as error:
                    raise BadData(
                        f"One of rows {row} to {row + len(batch) - 1} of {file}: column {text_field!r} is not UTF-8: "
                        f"byte 0x{error.object[error.start]:02x}; convert it."
                    ) from error
                for value in values:
                    if not isinstance(value, str):
                        raise BadData(f"Row {row} of {file}: column {text_field!r} is not text.")
                    row += 1
                    yield value
    except arrow.ArrowException as error:
        raise BadData(f"{file} is not a parquet file that can be read: {error}.") from error


# --- samples -------------------------------------------------------------------------------------------------------


class TokenShards:
    """Samples by number, read from shard files through memory maps. Raises BadData for a file of another length."""

    def __init__(self, shards: Sequence[ShardFile], sequence_tokens: int, token_bytes: int) -> None:
        self._sequence = sequence_tokens
        if token_bytes not in (1, 2, 4):
            raise BadData(f"Tokens of {token_bytes} bytes cannot be read; they take 1, 2 or 4.")
        dtype = np.dtype(f"<u{token_bytes}")
        self._maps: list[NDArray[Any]] = []
        for shard in shards:
            expected = (shard.sequences * sequence_tokens + 1) * token_bytes
            size = Path(shard.path).stat().st_size
            if size != expected:
                raise BadData(f"The shard {shard.path} has {size} bytes; {shard.sequences} sequences take {expected}.")
            self._maps.append(np.memmap(shard.path, dtype=dtype, mode="r"))
        self._stops = np.cumsum([shard.sequences for shard in shards])

    @property
    def samples(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def batch(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids, int64 [len(samples), sequence_tokens + 1]."""
        tokens = np.empty((len(samples), self._sequence + 1), dtype=np.int64)
        for row, sample in enumerate(samples):
            shard = int(np.searchsorted(self._stops, sample, side="right"))
            first = int(sample - (self._stops[shard - 1] if shard else 0)) * self._sequence
            tokens[row] = self._maps[shard][first : first + self._sequence + 1]
        return tokens
