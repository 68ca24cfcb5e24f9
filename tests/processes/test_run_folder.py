"""A run folder loses nothing that it said was safe: not to a kill, a full disk, a second driver, a stranger's bytes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from shoal.cli.places import find_run
from shoal.driver.folder import (
    FolderDamaged,
    FolderLocked,
    FolderTaken,
    FolderUnreadable,
    FolderWriteFailed,
    RunFolder,
    saying_room,
)
from shoal.driver.lines import Event, EventKind, RoundMetrics
from shoal.driver.report import Figures, RoundChoice
from shoal.errors import BadRecord
from shoal.identity import BadSignature, Envelope, KeyPair, blake3_hash
from shoal.protocol.blobs import BlobRef
from shoal.protocol.messages import sign
from shoal.protocol.training import (
    Commit,
    DataRef,
    Grant,
    Member,
    MemberNode,
    ModelRef,
    OptimizerSettings,
    ReplaySettings,
    RoundSettings,
    TrainJob,
)
from shoal.sdk.jobs import DriverGoesOn, JobState, look_at, stop
from shoal.storage import StorageFull
from shoal.world import DirectoryDisk, FaultyDisk

KEY = KeyPair.from_seed(bytes(32))
JOB = sign(
    KEY,
    TrainJob(
        name="tides",
        created_ms=1,
        seed=1,
        model=ModelRef(start=BlobRef(blake3_hash(b"start"), 5), parameters=1),
        data=DataRef(samples=10),
        token_budget=10,
        batch_samples=1,
        optimizer=OptimizerSettings(),
        rounds=RoundSettings(),
        replay=ReplaySettings(),
    ),
)


def commit(number: int) -> Envelope:
    state = blake3_hash(b"%d" % number)
    return sign(
        KEY,
        Commit(
            job=JOB.record_id,
            round=number,
            term=1,
            previous=state,
            assignment=state,
            accepted=(),
            state=state,
            tokens_total=number,
        ),
    )


def member(name: str = "eel", session: bytes = bytes(16)) -> Envelope:
    node = MemberNode(KEY.node_id, "whole", 1_000_000)
    return sign(KEY, Member(job=JOB.record_id, nodes=(node,), session=session, name=name))


def grant() -> Envelope:
    return sign(KEY, Grant(job=JOB.record_id, drivers=(KEY.node_id,), not_after_ms=9))


def begun(path: Path, disk: FaultyDisk | None = None) -> RunFolder:
    folder = RunFolder.create(path, disk=disk)
    folder.begin(JOB, b"data: {paths: [a]}\n")
    return folder


def chain(path: Path) -> Path:
    return path / "records" / "chain"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tides"


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_records_come_back_byte_for_byte_in_their_order(run: Path) -> None:
    told = [grant(), member(), *(commit(number) for number in range(50))]
    with begun(run) as folder:
        for envelope in told:
            folder.append(envelope, durable=envelope.kind == Commit.KIND)
        assert [one.to_bytes() for one in folder.records()] == [one.to_bytes() for one in told]
    with RunFolder.open(run) as folder:
        assert [one.to_bytes() for one in folder.records()] == [one.to_bytes() for one in told]
        assert [body.round for _, body in folder.opened(Commit)] == list(range(50))
        assert [one.kind for one in folder.records(Member, Grant)] == [Grant.KIND, Member.KIND]
        assert (folder.job.record_id, folder.train_job().name, folder.cut_bytes) == (JOB.record_id, "tides", 0)
        assert (run / "job.yaml").read_bytes() == b"data: {paths: [a]}\n"


def test_a_signature_is_verified_when_its_record_is_looked_into(run: Path) -> None:
    forged = msgspec.structs.replace(commit(3), signature=bytes(64))
    with begun(run) as folder:
        folder.append(commit(2))
        folder.append(forged)
        assert len(list(folder.records(Commit))) == 2, "kept as it was received"
        opened = folder.opened(Commit)
        assert next(opened)[1].round == 2
        with pytest.raises(BadSignature):
            next(opened)


def test_lines_come_back_by_kind(run: Path) -> None:
    metrics = [
        RoundMetrics(round=i, time_s=i, tokens_total=i, loss=None if i == 1 else 2.5, tokens_per_s=1, members=1)
        for i in range(3)
    ]
    event = Event(time_s=7.5, kind=EventKind.DIED, sentence="eel’s link was lost.\nNo answer.", round=2)
    with begun(run) as folder:
        for line in metrics:
            folder.note(line)
        folder.note(event)
        assert folder.elapsed_s() == 7.5
        folder.note(msgspec.structs.replace(event, time_s=9))
        assert folder.elapsed_s() == 9
    with RunFolder.open(run, read_only=True) as folder:
        assert list(folder.notes(RoundMetrics)) == metrics
        assert next(folder.notes(Event)) == event
        assert folder.elapsed_s() == 9


def test_figures_are_replaced_at_once(run: Path) -> None:
    figures = Figures(wall_s=3, round_choice=RoundChoice(inner_steps=4, reason="because"))
    with begun(run) as folder:
        assert folder.read("figures.json", Figures) is None
        folder.write("figures.json", msgspec.json.encode(figures))
        assert folder.read("figures.json", Figures) == figures
        (run / "figures.json").write_bytes(b"{")
        with pytest.raises(FolderDamaged, match="figures.json is damaged"):
            folder.read("figures.json", Figures)


# --- a torn tail ----------------------------------------------------------------------------------------------------


def test_a_chain_cut_anywhere_in_its_last_record_loses_only_that(run: Path) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
        sound = chain(run).stat().st_size
        folder.append(member())
    whole = chain(run).read_bytes()
    for length in sorted({*range(sound, sound + 20), *range(sound, len(whole), 23), len(whole) - 1}):
        chain(run).write_bytes(whole[:length])
        with RunFolder.open(run) as folder:
            assert folder.cut_bytes == length - sound
            assert [one.kind for one in folder.records()] == [Commit.KIND]
            folder.append(commit(1), durable=True)
            assert [body.round for _, body in folder.opened(Commit)] == [0, 1]
        assert RunFolder.open(run, read_only=True).cut_bytes == 0


def test_a_chain_of_many_large_records_is_read_and_searched_in_pieces(run: Path) -> None:
    told = [Envelope("shoal", "train.contribution", 1, KEY.node_id, bytes([i]) * 900_000, bytes(64)) for i in range(12)]
    with begun(run) as folder:
        for envelope in told:
            folder.append(envelope)
        folder.append(commit(0), durable=True)
    with RunFolder.open(run) as folder:
        assert [len(one.body) for one in folder.records()][:-1] == [900_000] * 12
        assert [one.body[0] for one in folder.records()][:-1] == list(range(12))
    with chain(run).open("r+b") as file:
        file.seek(500)
        file.write(b"x")
    with pytest.raises(FolderDamaged, match="damaged at byte 0"):
        RunFolder.open(run)


@pytest.mark.parametrize("change", [lambda byte: byte ^ 1, lambda byte: 0])
def test_damage_before_a_durable_record_is_refused_and_left_alone(run: Path, change: Callable[[int], int]) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
        first = chain(run).stat().st_size
        folder.append(member())
        folder.append(commit(1), durable=True)
    whole = chain(run).read_bytes()
    for place in (0, 4, 5, 9, 20, first, first + 6, first + 40):
        damaged = bytearray(whole)
        damaged[place] = change(damaged[place]) if change(damaged[place]) != damaged[place] else damaged[place] ^ 0xFF
        chain(run).write_bytes(damaged)
        with pytest.raises(FolderDamaged, match=f"damaged at byte {0 if place < first else first}"):
            RunFolder.open(run)
        assert chain(run).read_bytes() == bytes(damaged)


def test_damage_that_nothing_durable_follows_is_a_torn_tail(run: Path) -> None:
    """After a loss of power, pages that were never synced may be missing in any order."""
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
        sound = chain(run).stat().st_size
        for session in range(3):
            folder.append(member(session=bytes([session]) * 16))
    whole = bytearray(chain(run).read_bytes())
    whole[sound : sound + 40] = bytes(40)
    chain(run).write_bytes(whole)
    with RunFolder.open(run) as folder:
        assert [one.kind for one in folder.records()] == [Commit.KIND]
    assert chain(run).stat().st_size == sound


def test_a_frame_inside_a_strangers_record_never_passes_for_one(run: Path) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
    frame = chain(run).read_bytes()  # an intact durable frame, for another place
    hidden = Envelope("shoal", "train.contribution", 1, KEY.node_id, frame * 3, bytes(64))
    with RunFolder.open(run) as folder:
        folder.append(hidden)
    with chain(run).open("r+b") as file:
        file.truncate(len(frame) * 4)
    with RunFolder.open(run) as folder:
        assert [one.kind for one in folder.records()] == [Commit.KIND]


def test_an_unfinished_line_is_cut_and_a_damaged_one_is_named(run: Path) -> None:
    line = RoundMetrics(round=0, time_s=1, tokens_total=1, loss=1, tokens_per_s=1, members=1)
    with begun(run) as folder:
        folder.note(line)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round":1,"ti')
    assert list(RunFolder.open(run, read_only=True).notes(RoundMetrics)) == [line]
    with RunFolder.open(run) as folder:
        folder.note(msgspec.structs.replace(line, round=1))
        assert [one.round for one in folder.notes(RoundMetrics)] == [0, 1]
    text = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"nonsense\n" + text)
    with RunFolder.open(run) as folder, pytest.raises(FolderDamaged, match=r"metrics.jsonl line 1 is damaged"):
        list(folder.notes(RoundMetrics))


@pytest.mark.parametrize("kept", [None, 0, 50])
def test_a_chain_that_somebody_takes_away_is_not_written_on(run: Path, kept: int | None) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
        if kept is None:
            chain(run).unlink()
        else:
            os.truncate(chain(run), kept)
        with pytest.raises(FolderDamaged, match=f"chain was changed or taken away .* it has {kept or 0} bytes where"):
            folder.append(commit(1), durable=True)
        assert not chain(run).exists() if kept is None else chain(run).stat().st_size == kept
        with pytest.raises(FolderDamaged, match="its records end at byte 0"):
            list(folder.records())


def test_what_somebody_else_appends_is_not_written_over(run: Path) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
        with chain(run).open("ab") as file:
            file.write(b"x")
        with pytest.raises(FolderDamaged, match="changed or taken away"):
            folder.append(commit(1), durable=True)


def test_records_that_are_damaged_under_a_driver_are_not_left_out(run: Path) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
        first = chain(run).stat().st_size
        folder.append(commit(1), durable=True)
        with chain(run).open("r+b") as file:
            file.seek(first)
            file.write(b"x")
        with pytest.raises(FolderDamaged, match=f"its records end at byte {first}"):
            list(folder.records())


DRIVER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_run_folder import begun, commit, member
    folder = begun(Path(sys.argv[1]))
    for number in range(1_000_000):
        folder.append(member(session=number.to_bytes(16, "big")))
        folder.append(commit(number), durable=True)
        print(number, flush=True)
"""


def test_a_driver_killed_at_work_leaves_every_published_commit(run: Path) -> None:
    script = textwrap.dedent(DRIVER).format(tests=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        published = -1
        while published < 40:
            published = int(driver.stdout.readline())
        with pytest.raises(FolderLocked, match=rf"process {driver.pid}\)"):
            RunFolder.open(run)
        reading = RunFolder.open(run, read_only=True)
        assert len(list(reading.records(Commit))) > 40
        driver.send_signal(signal.SIGKILL)
        published = max([published, *(int(line) for line in driver.stdout.read().split("\n")[:-1])])
    with RunFolder.open(run) as folder:
        rounds = [body.round for _, body in folder.opened(Commit)]
        assert rounds == list(range(len(rounds))) and len(rounds) > published
        folder.append(commit(len(rounds)), durable=True)
        assert len(list(folder.records(Commit))) == len(rounds) + 1


WAITING = """
    import signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_run_folder import begun
    signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[2] == "stubborn" else signal.default_int_handler)
    with begun(Path(sys.argv[1])):
        try:
            print("ready", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            print("in order", flush=True)
"""


@pytest.mark.parametrize("manner", ["obedient", "stubborn"])
def test_a_driver_is_asked_to_stop_as_with_ctrl_c(run: Path, manner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = textwrap.dedent(WAITING).format(tests=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", script, str(run), manner], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
        try:
            if manner == "stubborn":
                monkeypatch.setattr("shoal.sdk.jobs.STOP_S", 0.2)
                with pytest.raises(DriverGoesOn, match=rf"Process {driver.pid} was .*: kill -9 {driver.pid}"):
                    stop(run)
                assert look_at(run).state is JobState.RUNNING
            else:
                assert stop(run) == driver.pid
                assert driver.stdout.read() == "in order\n"
        finally:
            driver.kill()
    assert look_at(run).state is (JobState.DIED if manner == "stubborn" else JobState.STOPPED)
    assert stop(run) is None


# --- a disk that fails ----------------------------------------------------------------------------------------------


class Fault:
    """Fails the named operation for as long as it is set."""

    def __init__(self) -> None:
        self.operation = ""
        self.number = errno.ENOSPC

    def __call__(self, operation: str, name: str) -> None:
        if operation == self.operation:
            raise OSError(self.number, os.strerror(self.number), name)


@pytest.fixture
def fault() -> Fault:
    return Fault()


@pytest.fixture
def failing(run: Path, fault: Fault) -> RunFolder:
    run.mkdir(parents=True)
    return begun(run, FaultyDisk(DirectoryDisk(run), fault))


@pytest.mark.parametrize("operation", ["write", "write/half"])
def test_a_full_disk_is_said_and_costs_nothing_that_was_kept(failing: RunFolder, fault: Fault, operation: str) -> None:
    line = RoundMetrics(round=0, time_s=1, tokens_total=1, loss=1, tokens_per_s=1, members=1)
    long_one = Envelope("shoal", "train.contribution", 1, KEY.node_id, bytes(9000), bytes(64))
    with failing as folder:
        folder.append(commit(0), durable=True)
        folder.note(line)
        fault.operation = operation
        with pytest.raises(FolderWriteFailed, match="no room left on the disk"):
            folder.append(long_one, durable=True)
        with pytest.raises(FolderWriteFailed, match="no room left on the disk"):
            folder.note(msgspec.structs.replace(line, state="a" * 2000))
        fault.operation = ""
        folder.append(commit(1), durable=True)
        folder.note(msgspec.structs.replace(line, round=1))
    with RunFolder.open(folder.path) as folder:
        assert [body.round for _, body in folder.opened(Commit)] == [0, 1]
        assert folder.cut_bytes == 0
        assert [one.round for one in folder.notes(RoundMetrics)] == [0, 1]


def test_a_full_disk_beneath_a_run_names_its_folder_and_what_to_do_then(run: Path) -> None:
    full, other = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EACCES, os.strerror(errno.EACCES))
    for begins, then in ((False, "begin again"), (True, "use --resume")):
        if begins:
            begun(run).close()
        for error in (full, StorageFull("4.0 KiB were asked for.")):
            said = f"no room left .* {run}; make room, then {then}"
            with pytest.raises(FolderWriteFailed, match=said), saying_room(run):
                raise error
    with pytest.raises(PermissionError), saying_room(run):
        raise other


def test_after_a_failed_sync_nothing_more_is_promised(failing: RunFolder, fault: Fault) -> None:
    fault.operation, fault.number = "sync", errno.EIO
    with failing as folder:
        with pytest.raises(FolderWriteFailed, match="cannot be written"):
            folder.append(commit(0), durable=True)
        fault.operation = ""
        with pytest.raises(FolderWriteFailed, match="failed before"):
            folder.append(commit(1), durable=True)


@pytest.mark.parametrize("operation", ["write/half", "sync", "rename"])
def test_a_file_that_cannot_be_replaced_stays_what_it_was(failing: RunFolder, fault: Fault, operation: str) -> None:
    with failing as folder:
        folder.write("report.html", b"the old page")
        fault.operation = operation
        with pytest.raises(FolderWriteFailed):
            folder.write("report.html", b"the new page, which is longer")
        assert (folder.path / "report.html").read_bytes() == b"the old page"
        fault.operation = ""
        folder.write("report.html", b"new")
        assert (folder.path / "report.html").read_bytes() == b"new"


@pytest.mark.parametrize("operation", ["write", "write/half", "sync", "rename"])
def test_a_folder_whose_making_failed_holds_no_job_and_is_taken_over(run: Path, fault: Fault, operation: str) -> None:
    run.mkdir(parents=True)
    folder = RunFolder.create(run, disk=FaultyDisk(DirectoryDisk(run), fault))
    fault.operation = operation
    with folder, pytest.raises(FolderWriteFailed):
        folder.begin(JOB, b"x")
    with pytest.raises(FolderUnreadable, match="There is no run folder"):
        RunFolder.open(run)
    with begun(run) as folder:
        assert folder.job == JOB


# --- whose folder it is ---------------------------------------------------------------------------------------------


def test_a_folder_with_a_job_is_not_begun_again(run: Path) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
        with pytest.raises(FolderTaken):
            folder.begin(JOB)
    with pytest.raises(FolderTaken, match=r"already holds job tides \([0-9a-f]{8}\); continue it with --resume"):
        RunFolder.create(run)
    assert len(list(RunFolder.open(run, read_only=True).records())) == 1


def test_replacing_removes_the_run_before_and_nothing_else(run: Path) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
        folder.write("report.html", b"old")
        (folder.blobs / "a").write_bytes(b"x")
    with RunFolder.create(run, replace=True) as folder:
        folder.begin(JOB)
        assert list(folder.records()) == [] and not (run / "report.html").exists()
        assert list(folder.blobs.iterdir()) == []
    (run / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(FolderTaken, match=r"holds holiday\.jpg, which is not of a run"):
        RunFolder.create(run, replace=True)
    assert (run / "job.record").exists()


def test_a_run_is_kept_until_the_one_that_replaces_it_has_begun(run: Path) -> None:
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
    with RunFolder.create(run, replace=True):
        pass  # no hub answered, say
    with RunFolder.open(run) as folder:
        assert list(folder.records()) == [commit(0)]


def test_a_replacement_killed_at_any_moment_leaves_one_whole_run(run: Path) -> None:
    def kill_at(number: int) -> bool:
        """Replace the run in a process that is killed before its so-manieth change to the disk; whether it was."""
        child = os.fork()
        if child == 0:
            left = [number]

            def count(event: str, _: object) -> None:
                if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            with RunFolder.create(run, replace=True) as folder:
                folder.begin(JOB)
            os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def whole_run(*, read_only: bool) -> list[Envelope]:
        with RunFolder.open(run, read_only=read_only) as folder:
            records = list(folder.records())
        assert (records, (run / "report.html").exists()) in (([commit(0)], True), ([], False)), number
        return records

    unsettled = 0
    for number in range(200):
        with RunFolder.create(run, replace=True) as folder:
            folder.begin(JOB)
            folder.append(commit(0), durable=True)
            folder.write("report.html", b"old")
        killed = kill_at(number)
        try:
            whole_run(read_only=True)
        except FolderUnreadable as error:
            assert "use --resume, which puts the run back" in error.sentence
            unsettled += 1
        assert find_run(run) == run
        found = whole_run(read_only=True)
        records = whole_run(read_only=False)
        assert found == records
        assert sorted(entry.name for entry in run.iterdir() if entry.name.startswith(".")) == []
        if not killed:
            assert number > 10 and records == [] and unsettled > 5
            return
    raise AssertionError("it never got through")


def test_a_key_that_was_being_made_is_no_strangers_file(run: Path) -> None:
    """A driver that was killed in the middle of it, over a run that it was to replace."""
    with begun(run) as folder:
        folder.append(commit(0), durable=True)
    with RunFolder.create(run, replace=True):
        (run / ".driver.key.4711").write_bytes(b"half a k")
        shutil.copytree(run, run.with_name("killed"))
    with RunFolder.create(run.with_name("killed"), replace=True):
        pass
    with RunFolder.open(run.with_name("killed")) as folder:
        assert list(folder.records()) == [commit(0)]
    assert [entry.name for entry in run.with_name("killed").iterdir() if entry.name.startswith(".")] == []


def test_a_running_driver_keeps_others_out(run: Path) -> None:
    with begun(run):
        for attempt in (lambda: RunFolder.open(run), lambda: RunFolder.create(run, replace=True)):
            with pytest.raises(FolderLocked, match=rf"A driver is running in .* \(process {os.getpid()}\)"):
                attempt()
    RunFolder.open(run).close()


def test_one_who_reads_does_not_write(run: Path) -> None:
    with begun(run) as folder:
        folder.append(commit(0))
    with RunFolder.open(run, read_only=True) as folder:
        with pytest.raises(FolderWriteFailed, match="not open for writing"):
            folder.append(commit(1))
        with pytest.raises(FolderWriteFailed, match="not open for writing"):
            folder.write("report.html", b"")


def test_what_is_no_run_folder_is_said_to_be_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderUnreadable, match="There is no run folder"):
        RunFolder.open(run)
    with pytest.raises(FolderUnreadable, match=r"has no job\.record"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderTaken, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with RunFolder.create(run) as folder, pytest.raises(BadRecord):
        folder.begin(commit(0))
    with RunFolder.create(run) as folder, pytest.raises(FolderUnreadable, match="has no job yet"):
        folder.train_job()


def test_a_damaged_job_record_is_named(run: Path) -> None:
    begun(run).close()
    for data in (b"", b"nonsense", msgspec.structs.replace(JOB, signature=bytes(64)).to_bytes()):
        (run / "job.record").write_bytes(data)
        with pytest.raises(FolderDamaged, match=r"job\.record is not a signed job"):
            RunFolder.open(run)
