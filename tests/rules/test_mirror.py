"""Copies of run folders: what comes of them when pieces are lost, when either side is killed, and when ends differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_story import Story

from shoal.driver.folder import CHAIN, RunFolder, intact_end
from shoal.driver.lines import RoundMetrics
from shoal.driver.mirror import ANSWER_BYTES, BadCopy, Copy, missing, size_of
from shoal.protocol.driving import FILES_MAX, PIECE_BYTES, FileThere, Piece
from shoal.protocol.training import Commit
from shoal.world import DirectoryDisk

ROOM = 1 << 30


def written(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def follow(source: Path, copy: Copy) -> int:
    """Until nothing is missing; how many answers that took."""
    for answers in range(1, 1000):
        pieces, more = missing(source, copy.there)
        copy.take(pieces)
        if not pieces and not more:
            return answers
    raise AssertionError("it never came to an end")


def same(source: Path, target: Path) -> bool:
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    return all((source / one).read_bytes() == (target / one).read_bytes() for one in files)


def a_run(at: Path) -> Path:
    return written(
        at, job_dot_yaml=b"data: {}", job_dot_record=b"signed", owner_dot_json=b"{}", records__chain=b"",
        metrics_dot_jsonl=b"1\n2\n", events_dot_jsonl=b"a\n", payments_dot_json=b"[1]", figures_dot_json=b"",
        model__model_dot_safetensors=bytes(range(256)) * 20_000, report_dot_json=b"{}",
    )  # fmt: skip


def test_a_copy_is_the_same_and_follows(tmp_path: Path) -> None:
    source = a_run(tmp_path / "one")
    (source / "data").mkdir()
    (source / "data" / "heldout-00000.tokens").write_bytes(b"x" * (PIECE_BYTES + 5))
    copy = Copy(tmp_path / "two", ROOM, begun=False)
    assert follow(source, copy) > size_of(source) // ANSWER_BYTES
    assert same(source, tmp_path / "two")
    with (source / "metrics.jsonl").open("ab") as file:
        file.write(b"3\n")
    (source / "payments.json").write_bytes(b"[1, 2]")
    (source / "figures.json").write_bytes(b"{}")
    pieces, _ = missing(source, copy.there)
    assert [(one.name, one.offset, one.data) for one in pieces] == [
        ("metrics.jsonl", 4, b"3\n"), ("payments.json", 0, b"[1, 2]"), ("figures.json", 0, b"{}"),
    ]  # fmt: skip
    copy.take(pieces)
    again = Copy(tmp_path / "two", ROOM, begun=False)  # killed, and started again
    assert missing(source, again.there) == ([], False) and set(again.there) == set(copy.there)


def test_what_ends_otherwise_is_copied_anew_and_the_old_stays_until_then(tmp_path: Path) -> None:
    lines = b"".join(b"%06d\n" % one for one in range(600_000))
    source = written(tmp_path / "one", metrics_dot_jsonl=lines)
    target = written(tmp_path / "two", metrics_dot_jsonl=b"other\n" * 100)
    copy = Copy(target, ROOM, begun=False)
    pieces, more = missing(source, copy.there)
    assert more
    copy.take(pieces)
    assert (target / "metrics.jsonl").read_bytes() == b"other\n" * 100
    follow(source, copy)
    assert same(source, target)


def test_pieces_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    source = a_run(tmp_path / "one")
    copy = Copy(tmp_path / "two", ROOM, begun=False)
    follow(source, copy)
    for piece, why in (
        (Piece("../evil", 0, b"x", 1), "which is no file of one"),
        (Piece("data/../../evil", 0, b"x", 1), "which is no file of one"),
        (Piece("driver.key", 0, b"x", 1), "which is no file of one"),
        (Piece("report.html", 0, b"<script>", 8), "which is no file of one"),
        (Piece("model/modeling.py", 0, b"x", 1), "which is no file of one"),
        (Piece("model/pytorch_model.bin", 0, b"x", 1), "which is no file of one"),
        (Piece("metrics.jsonl", 9, b"x", 10), "has 4 bytes here"),
        (Piece("payments.json", 0, b"x", 1, bytes(32)), "did not come as it was announced"),
        (Piece("payments.json", 7, b"x", 8, bytes(32)), "has come up to byte 0"),
    ):
        with pytest.raises(BadCopy, match=why):
            copy.take([piece])
    assert same(source, tmp_path / "two")
    with pytest.raises(BadCopy, match="more than the 100 bytes"):
        follow(source, Copy(tmp_path / "three", 100, begun=False))
    endless = Copy(tmp_path / "four", 3 * PIECE_BYTES, begun=False)
    with pytest.raises(BadCopy, match="it may have"):  # also of one file that never comes to its end
        for at in range(4):
            endless.take([Piece("model/m.json", at * PIECE_BYTES, bytes(PIECE_BYTES), 1 << 40, bytes(32))])


def test_what_its_owner_made_is_replaced_by_nobody(tmp_path: Path) -> None:
    target = a_run(tmp_path / "two")
    copy = Copy(target, ROOM, begun=True)
    for name in ("job.yaml", "job.record", "owner.json", "data/heldout-00000.tokens", "data/tokenizer/tokenizer.json"):
        with pytest.raises(BadCopy, match=f"sent another {name} than the job's owner made"):
            copy.take([Piece(name, 0, b"x", 1, blake3(b"x").digest())])
    assert same(a_run(tmp_path / "one"), target)
    assert follow(written(a_run(tmp_path / "three"), payments_dot_json=b"[2]"), copy) == 2


def test_files_without_end_and_without_bytes_are_too_many(tmp_path: Path) -> None:
    copy, empty = Copy(tmp_path, ROOM, begun=False), blake3().digest()
    with pytest.raises(BadCopy, match=f"more than the {FILES_MAX} files"):
        copy.take([Piece(f"model/{at}.json", 0, b"", at % 2, empty) for at in range(10_000)])
    assert len(copy.there) == FILES_MAX == sum(path.is_file() for path in tmp_path.rglob("*"))


def test_a_file_that_becomes_shorter_while_it_is_copied_comes_whole(tmp_path: Path) -> None:
    source = written(tmp_path / "one", figures_dot_json=bytes(range(256)) * 40_000)
    copy = Copy(tmp_path / "two", ROOM, begun=False)
    pieces, more = missing(source, copy.there)
    copy.take(pieces)
    assert more and copy.there[0].size > 1
    (source / "figures.json").write_bytes(b"{}")
    follow(source, copy)
    assert same(source, tmp_path / "two")


def test_half_a_record_is_cut(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / CHAIN).write_bytes(b"half a rec")
    copy = Copy(tmp_path, ROOM, begun=False)
    assert (tmp_path / CHAIN).read_bytes() == b"" and copy.there[0].size == 0 == intact_end(tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["grow", "shrink", "replace", "answer", "lose", "restart"]),
            st.binary(min_size=0, max_size=200),
        ),
        max_size=25,
    )
)
def test_whatever_is_lost_a_copy_comes_to_be_the_same(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bytes]]
) -> None:
    at = tmp_path_factory.mktemp("copy")
    source = written(at / "one", events_dot_jsonl=b"", payments_dot_json=b"")
    copy = Copy(at / "two", ROOM, begun=False)
    for what, data in steps:
        events = source / "events.jsonl"
        match what:
            case "grow":
                events.write_bytes(events.read_bytes() + data)
            case "shrink":
                events.write_bytes(events.read_bytes()[: len(data)])
            case "replace":
                (source / "payments.json").write_bytes(data)
            case "answer":
                copy.take(missing(source, copy.there)[0])
            case "lose":
                missing(source, copy.there)
            case _:
                copy = Copy(at / "two", ROOM, begun=False)
    follow(source, copy)
    assert same(source, at / "two")


def test_more_files_than_a_folder_has_are_not_named(tmp_path: Path) -> None:
    source = written(tmp_path / "one", job_dot_yaml=b"x")
    assert missing(source, (FileThere("nothing", 4, b""),)) == (missing(source, ())[0], False)


def test_what_nobody_heard_of_is_taken_back(tmp_path: Path) -> None:
    story = Story(rounds=12)
    with RunFolder.create(tmp_path / "run") as folder:
        story.write(folder)
        commits = [envelope for envelope, _ in folder.opened(Commit)]
        before = [envelope.record_id for envelope in folder.records()]
        gone = {envelope.record_id for envelope in commits[-2:]}
        folder.take_back(gone, 10)
        folder.append(commits[-1])
    with RunFolder.open(tmp_path / "run") as again:
        assert [envelope.record_id for envelope in again.records()] == [
            *(one for one in before if one not in gone), commits[-1].record_id,
        ]  # fmt: skip
        assert max(line.round for line in again.notes(RoundMetrics)) == 9 and again.cut_bytes == 0


def test_lines_never_tell_of_records_that_did_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "one", records__chain=b"", metrics_dot_jsonl=b"0\n")
    read = DirectoryDisk.read

    def and_a_commit_follows(disk: DirectoryDisk, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = read(disk, name, offset, length)
        if name == CHAIN:
            (source / "metrics.jsonl").write_bytes(b"0\n1\n")
        return data

    monkeypatch.setattr(DirectoryDisk, "read", and_a_commit_follows)
    pieces, _ = missing(source, ())
    assert [(one.name, one.data) for one in pieces] == [(CHAIN, b""), ("metrics.jsonl", b"0\n")]
