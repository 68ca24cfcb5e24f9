import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.world import DirectoryDisk, Disk, FaultyDisk, MemoryDisk

DISKS: dict[str, Callable[[Path], Disk]] = {
    "directory": DirectoryDisk,
    "memory": lambda _: MemoryDisk(),
    "faultless": lambda _: FaultyDisk(MemoryDisk(), lambda operation, name: None),
}


@pytest.fixture(params=DISKS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return DISKS[request.param](tmp_path / "root")


def test_bytes_are_read_back_where_they_were_written(disk: Disk) -> None:
    disk.write("a/b/file", b"0123456789")
    assert disk.read("a/b/file") == b"0123456789"
    assert disk.read("a/b/file", 2, 3) == b"234"
    assert disk.read("a/b/file", 8, 100) == b"89"
    assert disk.read("a/b/file", 50, 1) == disk.read("a/b/file", 50) == b""
    disk.write("a/b/file", b"xx", 4)
    disk.write("a/b/file", b"end", 12)
    assert disk.read("a/b/file") == b"0123xx6789\0\0end"


def test_a_missing_file_is_an_error_for_reading_and_renaming_only(disk: Disk) -> None:
    for attempt in (lambda: disk.read("no"), lambda: disk.rename("no", "other"), lambda: disk.sync("no")):
        with pytest.raises(FileNotFoundError) as caught:
            attempt()
        assert caught.value.errno == errno.ENOENT
    disk.delete("no")
    assert disk.info("no") is None
    assert disk.files("nowhere") == []


def test_a_rename_replaces(disk: Disk) -> None:
    disk.write("new/old", b"old")
    disk.write("scratch/1", b"new")
    disk.rename("scratch/1", "new/old")
    disk.sync("new/old")
    assert disk.read("new/old") == b"new"
    assert disk.info("scratch/1") is None
    disk.rename("new/old", "elsewhere/deep/name")
    assert [info.name for info in disk.files("elsewhere")] == ["elsewhere/deep/name"]


def test_a_change_shows_in_the_info(disk: Disk) -> None:
    disk.write("x", b"abc")
    before = disk.info("x")
    assert before is not None and before.size == 3
    disk.write("x", b"abcd")
    after = disk.info("x")
    assert after is not None and after.size == 4
    assert after != before
    disk.rename("x", "y")
    moved = disk.info("y")
    assert moved is not None and (moved.size, moved.modified_ns) == (after.size, after.modified_ns)


def test_names_cannot_leave_the_root(disk: Disk) -> None:
    for name in ("../x", "a/../../x", "/etc/passwd", "", "a\\b", "n" * 2000):
        with pytest.raises(ValueError, match="name of a file"):
            disk.write(name, b"")
        with pytest.raises(ValueError, match="name of a file"):
            disk.path(name)


def test_a_file_of_the_machine_is_brought_in(disk: Disk, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"brought")
    disk.bring(source, "scratch/s")
    assert disk.read("scratch/s") == b"brought"
    with pytest.raises(FileExistsError):
        disk.bring(source, "scratch/s")
    with pytest.raises(FileNotFoundError):
        disk.bring(tmp_path / "nothing", "scratch/t")
    source.unlink()
    assert disk.read("scratch/s") == b"brought"


def test_a_directory_brings_by_link(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"brought")
    disk = DirectoryDisk(tmp_path / "root")
    disk.bring(source, "s")
    assert disk.path("s").stat().st_ino == source.stat().st_ino


def test_a_lock_is_held_once(disk: Disk) -> None:
    lock = disk.lock("lock")
    with pytest.raises(BlockingIOError):
        disk.lock("lock")
    lock.release()
    lock.release()
    disk.lock("lock").release()


def test_a_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    disk = DirectoryDisk(tmp_path / "root")
    disk.write("blobs/secret", b"x")
    assert (tmp_path / "root").stat().st_mode & 0o077 == 0
    assert disk.path("blobs/secret").stat().st_mode & 0o077 == 0


def test_a_memory_disk_fills_up_as_a_real_one_does() -> None:
    disk = MemoryDisk(capacity_bytes=10)
    disk.write("a", b"123456")
    assert disk.free_bytes() == 4
    with pytest.raises(OSError) as caught:
        disk.write("b", b"123456")
    assert caught.value.errno == errno.ENOSPC
    assert disk.read("b") == b"1234"
    disk.write("a", b"654321")
    disk.delete("b")
    disk.write("a", b"7890", 6)
    assert disk.read("a") == b"6543217890"


def test_a_faulty_disk_fails_before_or_in_the_middle_of_an_operation() -> None:
    calls: list[tuple[str, str]] = []
    inner = MemoryDisk()

    def fault(operation: str, name: str) -> None:
        calls.append((operation, name))
        if operation == "write/half" or name == "bad":
            raise OSError(errno.EIO, "broken")

    disk = FaultyDisk(inner, fault)
    with pytest.raises(OSError, match="broken"):
        disk.write("torn", b"abcdef")
    assert inner.read("torn") == b"abc"
    with pytest.raises(OSError, match="broken"):
        disk.rename("torn", "bad")
    assert inner.info("bad") is None
    assert calls == [("write", "torn"), ("write/half", "torn"), ("rename", "bad")]


NAMES = st.sampled_from(["a", "b", "dir/a", "dir/b"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, st.binary(max_size=20), st.integers(0, 30)),
        st.tuples(st.just("rename"), NAMES, NAMES, st.just(0)),
        st.tuples(st.just("delete"), NAMES, st.just(b""), st.just(0)),
    ),
    max_size=20,
)


@pytest.mark.parametrize("make", DISKS.values(), ids=DISKS.keys())
@given(steps=STEPS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_sequence_of_steps_ends_as_the_model_says(
    make: Callable[[Path], Disk],
    steps: list[tuple[str, str, str | bytes, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    disk, model = make(tmp_path_factory.mktemp("disk")), dict[str, bytes]()
    for step, name, argument, offset in steps:
        if step == "write" and isinstance(argument, bytes):
            disk.write(name, argument, offset)
            old = model.get(name, b"")
            if argument:
                old = old.ljust(offset, b"\0")
                old = old[:offset] + argument + old[offset + len(argument) :]
            model[name] = old
        elif step == "rename" and name in model and isinstance(argument, str):
            disk.rename(name, argument)
            model[argument] = model.pop(name)
        elif step == "delete":
            disk.delete(name)
            model.pop(name, None)
    assert {name: disk.read(name) for name in model} == model
    assert {info.name: info.size for info in disk.files("dir")} == {
        name: len(data) for name, data in model.items() if name.startswith("dir/")
    }
    assert all((disk.info(name) is not None) == (name in model) for name in ("a", "b", "dir/a", "dir/b"))
