"""From files to samples: nothing lost, nothing twice, and a sentence for every file that cannot be used."""

from __future__ import annotations

import errno
import math
import os
import struct
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from engine_pieces import some_text

from shoal.training import data as data_module
from shoal.training.commands import ShardFile
from shoal.training.data import BadData, PreparedData, TokenShards, find_files, prepare_data, unigram_loss


def tokens_of(shards: tuple[ShardFile, ...], token_bytes: int = 2) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.fromfile(shard.path, dtype=f"<u{token_bytes}") for shard in shards]


def prepare(tmp_path: Path, *paths: Path, **settings: object) -> PreparedData:
    return prepare_data(paths, tmp_path / "shards", **{"sequence_tokens": 16, "held_out_fraction": 0.2, **settings})  # type: ignore[arg-type]


def test_every_token_lands_on_one_side_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "SHARD_MAX_BYTES", 1000)
    texts = [f"document {number} " + some_text(60, number) for number in range(30)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    ready = prepare(tmp_path, tmp_path)
    assert ready.documents == 30 and ready.vocabulary == 257 and ready.end == 256 and ready.token_bytes == 2
    assert ready.train_tokens + ready.held_out_tokens == sum(len(text.encode()) + 1 for text in texts)
    assert ready.held_out_tokens > 0 and len(ready.train) > 3

    seen = ""
    for side, total in ((ready.train, ready.train_tokens), (ready.held_out, ready.held_out_tokens)):
        files = tokens_of(side)
        for shard, tokens in zip(side, files, strict=True):
            assert len(tokens) == shard.sequences * 16 + 1 and Path(shard.path).stat().st_size <= 1000
        for before, after in pairwise(files):
            assert before[-1] == after[0]  # the target of one shard's last sample is the first input of the next's
        stream = np.concatenate([files[0][:1], *(tokens[1:] for tokens in files)])
        assert total - 17 < len(stream) <= total
        seen += "".join("\0" if token == 256 else chr(token) for token in stream)
    whole = sum(text in seen for text in texts)
    assert whole >= 28  # all but the ends of the two streams

    again = prepare_data([tmp_path / f"{number:02d}.txt" for number in range(30)], tmp_path / "again",
                         sequence_tokens=16, held_out_fraction=0.2)  # fmt: skip
    assert [a.tobytes() for a in tokens_of(again.train)] == [a.tobytes() for a in tokens_of(ready.train)]
    other = prepare(tmp_path / "x", tmp_path, seed=1)
    assert other.held_out_tokens != ready.held_out_tokens


def test_reading_says_how_far_it_is_and_ends_when_asked(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(some_text(40_000, number))
    told: list[tuple[int, int]] = []
    prepare(tmp_path, tmp_path, watch=lambda done, total: told.append((done, total)))
    size = sum(file.stat().st_size for file in tmp_path.glob("*.txt"))
    assert told[0] == (0, size) and told[-1] == (size, size) and {total for _, total in told} == {size}
    assert told == sorted(told) and len(told) > 8

    class Enough(Exception):
        pass

    def watch(done: int, total: int) -> None:
        if done > total / 2:
            raise Enough

    with pytest.raises(Enough):
        prepare(tmp_path, tmp_path, watch=watch)


def test_samples_are_read_by_number_across_shards(tmp_path: Path) -> None:
    shards = []
    for number, sequences in enumerate((3, 1, 2)):
        first = 4 * sum((3, 1, 2)[:number])
        np.arange(first, first + 4 * sequences + 1, dtype="<u2").tofile(tmp_path / str(number))
        shards.append(ShardFile(str(tmp_path / str(number)), sequences))
    samples = TokenShards(shards, 4, 2)
    assert samples.samples == 6
    batch = samples.batch(np.array([0, 2, 3, 5, 4]))
    assert batch.dtype == np.int64
    assert batch.tolist() == [list(range(4 * at, 4 * at + 5)) for at in (0, 2, 3, 5, 4)]
    with pytest.raises(BadData, match=r"has 26 bytes; 4 sequences take 34"):
        TokenShards([ShardFile(str(tmp_path / "0"), 4)], 4, 2)


def test_one_text_file_is_divided_too(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(some_text(20_000))
    ready = prepare(tmp_path, tmp_path / "one.txt", held_out_fraction=0.001)
    assert ready.documents == 1 and 16 <= ready.held_out_tokens < 0.5 * ready.train_tokens


def test_jsonl_and_parquet_and_globs_are_read(tmp_path: Path) -> None:
    texts = [some_text(40, number) for number in range(8)]
    lines = b"\n".join(msgspec.json.encode({"text": text, "id": at}) for at, text in enumerate(texts[:4]))
    (tmp_path / "a.jsonl").write_bytes(lines + b"\n\n")
    parquet.write_table(arrow.table({"body": texts[4:], "text": texts[4:]}), tmp_path / "b.parquet")
    ready = prepare(tmp_path, tmp_path / "*.jsonl", tmp_path / "b.parquet")
    assert ready.documents == 8
    assert ready.train_tokens + ready.held_out_tokens == sum(len(text) + 1 for text in texts)
    assert prepare(tmp_path, tmp_path / "b.parquet", text_field="body").documents == 4
    assert [file.name for file in find_files([tmp_path, tmp_path / "a.jsonl"])] == ["a.jsonl", "b.parquet"]


def test_empty_files_in_a_tree_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "__init__.py").touch()
    (tmp_path / "tree" / "text.py").write_text(some_text(3_000))
    (tmp_path / "tree" / "photo.jpg").write_bytes(b"\xff\xd8")
    assert [file.name for file in find_files([tmp_path / "tree"])] == ["text.py"]
    assert [file.name for file in find_files([tmp_path / "tree" / "*.py"])] == ["text.py"]
    with pytest.raises(BadData, match="or only empty files"):
        find_files([tmp_path / "tree" / "__*.py"])


def bad(tmp_path: Path, name: str, content: bytes, sentence: str, **settings: object) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(BadData, match=sentence) as caught:
        prepare(tmp_path, file, **settings)
    assert name in caught.value.sentence


def test_a_file_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    bad(tmp_path, "empty.txt", b"", r"is empty \(zero bytes\)")
    bad(tmp_path, "empty.parquet", b"", r"is empty \(zero bytes\)")
    bad(tmp_path, "latin.txt", b"abc\xe9def", "is not UTF-8: byte 3 is 0xe9")
    bad(tmp_path, "broken.jsonl", b'{"text": "a"}\n{"text": ', r"Line 2 of .*broken.jsonl is not JSON")
    bad(tmp_path, "latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"Line 2 of .*latin.jsonl is not UTF-8: byte 10")
    bad(tmp_path, "field.jsonl", b'{"text": "a"}\n\n{"txt": "b"}', r"Line 3 of .*field.jsonl has no text field 'text'")
    bad(tmp_path, "type.jsonl", b'{"text": 5}', r"Line 1 of .*has no text field")
    deep = b'{"text": "a"}\n{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bad(tmp_path, "deep.jsonl", deep, r"Line 2 of .*deep.jsonl is not JSON, or too deep")
    bad(tmp_path, "fake.parquet", b"PAR1 not really", "is not a parquet file that can be read")
    parquet.write_table(arrow.table({"body": ["a"], "n": [1]}), tmp_path / "good.parquet")
    content = (tmp_path / "good.parquet").read_bytes()
    bad(tmp_path, "good.parquet", content, "has no column 'text'; it has body, n")
    bad(tmp_path, "good.parquet", content, "Row 0 of .*column 'n' is not text", text_field="n")
    offsets, latin = struct.pack("<3i", 0, 2, 4), b"ab\xe9d"
    column = arrow.Array.from_buffers(arrow.string(), 2, [None, arrow.py_buffer(offsets), arrow.py_buffer(latin)])
    parquet.write_table(arrow.table({"text": column}), tmp_path / "latin.parquet")
    content = (tmp_path / "latin.parquet").read_bytes()
    bad(tmp_path, "latin.parquet", content, "rows 0 to 1 of .*latin.parquet: column 'text' is not UTF-8: byte 0xe9")


def test_a_pipe_is_no_data_file(tmp_path: Path) -> None:
    for name in ("pipe", "pipe.jsonl", "pipe.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadData, match=f"{name} is not a plain file"):
            prepare(tmp_path, tmp_path / name)


def test_a_full_disk_under_the_shards_is_told_from_other_failures(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(some_text(20_000))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-00000.tokens").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        prepare(tmp_path, tmp_path / "long.txt")
    assert caught.value.errno == errno.ENOSPC


def test_missing_data_and_too_little_of_it_are_sentences(tmp_path: Path) -> None:
    for missing in ("nothing.txt", "*.none", "no/such/folder"):
        with pytest.raises(BadData, match="There is no data at .*name a file, a directory or a pattern"):
            prepare(tmp_path, tmp_path / missing)
    with pytest.raises(BadData, match="No data was named"):
        prepare(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadData, match="holds no text"):
        prepare(tmp_path, tmp_path / "folder")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(BadData, match="gives 10 tokens to train on; one sequence takes 17"):
        prepare(tmp_path, tmp_path / "short.txt", held_out_fraction=0.0)
    (tmp_path / "long.txt").write_text(some_text(100))
    with pytest.raises(BadData, match="to hold out"):
        prepare(tmp_path, tmp_path / "long.txt", held_out_fraction=0.0)


def test_the_unigram_loss_is_the_cross_entropy_of_the_counts() -> None:
    train, held_out = np.array([7, 0, 1]), np.array([2, 1, 0])
    expected = -(2 * math.log(8 / 11) + math.log(1 / 11)) / 3
    assert unigram_loss(train, held_out) == pytest.approx(expected)
    uniform = np.full(256, 1000)
    assert unigram_loss(uniform, uniform) == pytest.approx(math.log(256))
