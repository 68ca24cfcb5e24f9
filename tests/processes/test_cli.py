"""The commands as people meet them: real processes, in an empty home, away from the repository."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
from rich.console import Console

from shoal.cli.main import main
from shoal.cli.output import until_stopped
from shoal.cli.tables import print_bill, print_report
from shoal.driver.report import AuditCount, Goal, NodeReport, NodeStatus, Report
from shoal.identity import KeyPair
from shoal.purse.bills import Bill, BillLine
from shoal.sdk.jobfile import schema

NOBODY = f"shoal://{KeyPair.from_seed(bytes(32)).node_id.hex()}@127.0.0.1:9"
LIMIT_S = 240

Done: TypeAlias = tuple[int, str, str]
"""Exit code, standard output, standard error."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    return tmp_path


def environment(place: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SHOAL_", "_SHOAL", "_TYPER"))}
    return {**kept, "SHOAL_HOME": str(place / "home"), "COLUMNS": "100", "NO_COLOR": "1", **more}


def shoal(place: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", *words],
        cwd=place / "here",
        env=environment(place, **more),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


NO_SERVER = "http://127.0.0.1:1/v1"
MISTAKES = [
    pytest.param(["nonsense"], "SH-103", "No such command 'nonsense'", id="unknown command"),
    pytest.param(["node", "nonsense"], "SH-103", "No such command", id="unknown command below node"),
    pytest.param(
        ["node", "start", "--hub", NOBODY, "--notice", "2 h"], "SH-103", "it is from 0 s to 1 h", id="a notice of hours"
    ),
    pytest.param(["train", "--nonsense"], "SH-103", "No such option", id="unknown option"),
    pytest.param(["hub", "extra"], "SH-103", "extra", id="an argument too many"),
    pytest.param(["report"], "SH-103", "RUN", id="an argument missing"),
    pytest.param(["replay", "x", "--round", "1"], "SH-103", "--node", id="an option missing"),
    pytest.param(["offers", "--limit", "many"], "SH-103", "--limit", id="no number"),
    pytest.param(["offers", "--limit", "0", "--hub", NOBODY], "SH-103", "from 1 to", id="a number out of bounds"),
    pytest.param(["offers", "--memory", "much", "--hub", NOBODY], "SH-101", "16 GiB", id="no amount"),
    pytest.param(["offers", "--country", "Germany", "--hub", NOBODY], "SH-103", "--country", id="no country"),
    pytest.param(["offers", "--max-price", "-1/h", "--hub", NOBODY], "SH-101", "0.35", id="no price"),
    pytest.param(["node", "start", "--price", "1", "--hub", NOBODY], "SH-101", "0.35/h", id="a price of what"),
    pytest.param(["node", "start", "--region", "EU", "--hub", NOBODY], "SH-103", "--region EU", id="no region"),
    pytest.param(["offers"], "SH-102", "shoal up", id="no hub"),
    pytest.param(["offers", "--hub", "shoal://x"], "SH-112", "shoal://<64", id="no ticket"),
    pytest.param(["up", "--nodes", "0"], "SH-103", "from 1 to 64", id="no nodes"),
    pytest.param(["up", "--nodes", "2", "--speeds", "1,2"], "SH-103", "share of full speed", id="too fast"),
    pytest.param(["up", "--nodes", "1", "--speeds", "1,1"], "SH-103", "names 2 speeds", id="more speeds than nodes"),
    pytest.param(["up", "--threads", "0"], "SH-103", "at least one", id="no threads"),
    pytest.param(["node", "start", "--max-speed", "nan", "--hub", NOBODY], "SH-103", "above 0", id="no speed"),
    pytest.param(["node", "start", "--listen", "tcp://0.0.0.0:1", "--hub", NOBODY], "SH-103", "dial", id="wildcard"),
    pytest.param(["node", "start", "--engine-only", "--hub", NOBODY], "SH-103", "--engine URL", id="no engine"),
    pytest.param(
        ["node", "start", "--engine", NO_SERVER, "--engine-key", "gone", "--hub", NOBODY], "SH-103", "gone", id="no key"
    ),
    pytest.param(["serve", "x", "--engines-only", "--here"], "SH-103", "contradict", id="engines elsewhere and here"),
    pytest.param(["serve", "x", "--token-time", "0 ms"], "SH-103", "more than 0", id="a token in no time"),
    pytest.param(["serve", "x", "--token-time", "80ms", "--here"], "SH-103", "of nodes", id="no nodes to be quick"),
    pytest.param(["serve", "x", "--engines-only"], "SH-102", "shoal up", id="no hub to find engines at"),
    pytest.param(["hub", "--listen", "tcp://[::]:1"], "SH-103", "--public", id="a hub everywhere"),
    pytest.param(["hub", "--listen", "somewhere"], "SH-115", "tcp://host:port", id="no address"),
    pytest.param(["hub", "--http", "somewhere"], "SH-116", "host:port", id="no address for HTTP"),
    pytest.param(["hub", "--name", "a b"], "SH-114", "a b", id="no name"),
    pytest.param(["train"], "SH-103", "shoal train job.yaml", id="no job file"),
    pytest.param(["train", "gone.yaml"], "SH-120", "gone.yaml", id="a job file that is not there"),
    pytest.param(["train", "x" * 300], "SH-120", "too long", id="a job file with too long a name"),
    pytest.param(["train", "."], "SH-120", "directory", id="a job file that is a directory"),
    pytest.param(["train", ".", "--resume"], "SH-105", "no run", id="nothing to resume"),
    pytest.param(["report", "gone"], "SH-105", "gone is not there", id="a run that is not there"),
    pytest.param(["report", "."], "SH-105", "no job.record", id="a folder that is no run"),
    pytest.param(["replay", "gone", "--round", "1", "--node", "x"], "SH-105", "gone", id="a replay of nothing"),
    pytest.param(["receipts"], "SH-106", "shoal serve", id="no receipts"),
    pytest.param(["receipts", "gone"], "SH-106", "gone holds no receipts", id="receipts that are not there"),
    pytest.param(["quickstart", "--tokens", "many"], "SH-101", "2.5M", id="no count"),
]


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """A command in this process: the same `main`, without the second that starting Python and its modules takes."""
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHOAL_HOME", str(place / "home"))
    monkeypatch.chdir(place / "here")

    def call(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["shoal", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(("words", "code", "part"), MISTAKES)
def test_a_mistake_is_one_sentence(inside: Callable[..., Done], words: list[str], code: str, part: str) -> None:
    status, out, err = inside(*words)
    assert (status, out) == (2, "")
    assert err.startswith(f"error {code}  ") and part in err and err.count("\n") == 1
    status, out, nothing = inside(*words, "--json")
    error = json.loads(out)["error"]
    assert (status, error["code"], nothing) == (2, code, "")
    assert error["sentence"] == err.removeprefix(f"error {code}  ").rstrip("\n")


LONG = [
    (["node", "start", "--engine", NO_SERVER, "--hub", NOBODY], "Starting a node", "SH-149", "Start the server first"),
    (["serve", "gone", "--here", "--http", "127.0.0.1:0"], "Loading gone.", "SH-161", "neither a checkpoint"),
]


@pytest.mark.parametrize(("words", "first", "code", "part"), LONG)
def test_what_takes_long_says_at_once_what_it_does(
    inside: Callable[..., Done], words: list[str], first: str, code: str, part: str
) -> None:
    status, out, err = inside(*words)
    begun, ended = err.splitlines()
    assert (status, out) == (2, "") and begun.startswith(first)
    assert ended.startswith(f"error {code}  ") and part in ended
    status, out, nothing = inside(*words, "--json")
    assert (status, json.loads(out)["error"]["code"], nothing) == (2, code, "")


@pytest.mark.parametrize(
    "command", ["train", "jobs", "account", "ledger", "market", "serve", "node", "hub", "up", "chat", "offers"]
)
def test_a_command_loads_nothing_heavy_before_it_says_something(command: str) -> None:
    look = f"import sys; from shoal.cli.main import load_commands; load_commands({command!r}); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", look], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"torch", "transformers", "sqlalchemy", "litestar", "granian"}
    assert "shoal.cli.app" in found and not heavy & set(found)


@pytest.mark.parametrize("words", [["node"], ["nonsense", "--json"], ["replay", "gone", "--round", "1", "--node", "x"]])
def test_a_mistake_ends_a_process_with_2_and_no_traceback(place: Path, words: list[str]) -> None:
    done = shoal(place, *words)
    assert done.returncode == 2 and "SH-10" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_wrong_field_is_named_with_its_line(place: Path, inside: Callable[..., Done]) -> None:
    (place / "here" / "words.txt").write_text("some words " * 500)
    (place / "here" / "job.yaml").write_text("data:\n  paths: words.txt\ntokenz: 5\n")
    status, _, err = inside("train", "job.yaml", "--hub", NOBODY)
    assert (status, err[:12]) == (2, "error SH-121") and "line 3" in err


@pytest.mark.parametrize("words", [["offers"], ["train", "job.yaml"], ["train", "job.yaml", "--dry-run"]])
def test_a_hub_that_is_not_there_is_said(place: Path, words: list[str]) -> None:
    (place / "here" / "words.txt").write_text("some words " * 500)
    (place / "here" / "job.yaml").write_text("data:\n  paths: words.txt\n")
    done = shoal(place, *words, "--hub", NOBODY, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (1, "SH-330") and "127.0.0.1:9" in error["sentence"]
    assert "Traceback" not in done.stderr


def test_a_place_that_refuses_is_said(place: Path) -> None:
    (place / "here" / "runs").write_text("a file where a folder should be")
    (place / "here" / "words.txt").write_text("some words " * 500)
    (place / "here" / "job.yaml").write_text("data:\n  paths: words.txt\n")
    done = shoal(place, "train", "job.yaml", "--hub", NOBODY)
    assert done.returncode in (1, 2) and "runs" in done.stderr and "Traceback" not in done.stderr
    (place / "blocked").write_text("")
    done = shoal(place, "train", "job.yaml", "--hub", NOBODY, SHOAL_HOME=str(place / "blocked" / "home"))
    assert done.returncode == 1 and done.stderr.startswith("error SH-420") and "Traceback" not in done.stderr


def test_nothing_to_stop_is_no_failure(place: Path) -> None:
    assert json.loads(shoal(place, "down", "--json").stdout) == {"stopped": False}
    (place / "home" / "local").mkdir()
    (place / "home" / "local" / "up.json").write_text('{"pid": 1, "started": 5, "hubs": [], "http": null, "nodes": []}')
    done = shoal(place, "down")
    assert (done.returncode, done.stdout) == (0, "No shoal runs on this machine.\n")


@pytest.mark.parametrize(
    "path",
    ["", "quickstart", "up", "down", "train", "report", "replay", "serve", "chat", "receipts", "hub", "node start"],
)
def test_help_teaches(inside: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = inside(*path.split(), "--help")
    assert (status, err) == (0, "")
    assert f"Usage: shoal {path}".rstrip() in out
    assert max(map(len, out.splitlines())) <= 80


def test_without_a_command_help_is_printed(place: Path) -> None:
    done = shoal(place)
    assert (done.returncode, "shoal quickstart" in done.stdout) == (0, True)


def test_fields_are_listed_for_people_and_for_editors(inside: Callable[..., Done]) -> None:
    text = inside("train", "--fields")[1]
    assert "data.paths" in text and "optimizer.learning_rate" in text
    assert json.loads(inside("train", "--fields", "--json")[1]) == json.loads(json.dumps(schema()))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(place: Path, shell: str) -> None:
    asked = {"bash": "complete_bash", "zsh": "complete_zsh", "fish": "complete_fish"}[shell]
    line = {"COMP_WORDS": "shoal qui", "COMP_CWORD": "1"} if shell == "bash" else {"_TYPER_COMPLETE_ARGS": "shoal qui"}
    more = {"_SHOAL_COMPLETE": asked, "_TYPER_COMPLETE_FISH_ACTION": "get-args", **line}
    done = shoal(place, **more)
    assert "quickstart" in done.stdout and "offers" not in done.stdout
    line = (
        {"COMP_WORDS": "shoal jobs ", "COMP_CWORD": "2"} if shell == "bash" else {"_TYPER_COMPLETE_ARGS": "shoal jobs "}
    )
    done = shoal(place, **more | line)
    assert all(name in done.stdout for name in ("list", "show", "fund", "cancel"))


@contextlib.contextmanager
def running(place: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A command that runs until it is stopped, and the line it says when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", *words, "--json"],
        cwd=place / "here",
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()


def test_a_shoal_goes_up_once_is_found_and_goes_down(place: Path) -> None:
    with running(place, "up", "--nodes", "1") as (process, ready):
        assert ready["ready"] == "up" and len(ready["nodes"]) == 1
        again = shoal(place, "up", "--nodes", "1")
        assert again.returncode == 2 and "shoal down" in again.stderr
        offers = json.loads(shoal(place, "offers", "--json").stdout)["offers"]
        assert [one["node"] for one in offers] == [ready["nodes"][0]["node"]]
        assert "node-1" in shoal(place, "offers").stdout
        none = json.loads(shoal(place, "offers", "--device", "mps", "--json").stdout)
        assert (none["offers"], none["fit"], none["excluded"]["device"]) == ([], 0, none["considered"])
        assert "without --device (mps)" in shoal(place, "offers", "--device", "mps").stdout
        (place / "here" / "words.txt").write_text("some words " * 5000)
        (place / "here" / "job.yaml").write_text("data:\n  paths: words.txt\n")
        costs = json.loads(shoal(place, "plan", "job.yaml", "--json").stdout)["costs"]
        assert costs["all"]["micro"] == 0 and costs["best"]["what"] == costs["one"]["what"] == "node-1"
        with running(place, "ledger", "start", "--fee", "2%") as (_, ledger):
            told = shoal(place, "plan", "job.yaml", "--deadline", "2 h", SHOAL_LEDGER=ledger["ticket"]).stdout
        assert "public list prices" in told
        assert "The ledger takes 2 % of what escrows pay: a part of these costs, which nodes get less.\n" in told
        twice = shoal(place, "node", "start", "--data", str(place / "home" / "local" / "nodes" / "node-1"))
        assert twice.returncode == 1 and "\nerror SH-407" in twice.stderr
        down = shoal(place, "down")
        assert (down.returncode, down.stdout) == (0, "Stopped the hub and 1 node(s).\n")
        assert process.wait(LIMIT_S) == 0
    assert shoal(place, "offers").stderr.startswith("error SH-102")


def test_two_hubs_do_not_share_a_directory_and_a_signal_ends_one_in_order(place: Path) -> None:
    with running(place, "hub") as (process, ready):
        assert re.fullmatch(r"shoal://[0-9a-f]{64}@127\.0\.0\.1:\d+", ready["ticket"])
        second = shoal(place, "hub")
        assert second.returncode == 1 and second.stderr.startswith("error SH-441")
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0


def test_ctrl_c_before_a_job_began_says_that_nothing_is_kept(place: Path) -> None:
    (place / "here" / "words.txt").write_text("some words " * 5000)
    (place / "here" / "job.yaml").write_text("data:\n  paths: words.txt\nrequirements:\n  nodes_min: 9\n  wait: 1 h\n")
    with running(place, "hub") as (_, ready):
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "train", "job.yaml", "--hub", ready["ticket"]],
            cwd=place / "here",
            env=environment(place),
            stderr=subprocess.PIPE,
            text=True,
            # A background job of a shell inherits that Ctrl-C is ignored; here it is what is tested.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stderr is not None
        said = ""
        while "waiting" not in said:  # for nine nodes: the command is in the middle of its work
            line = process.stderr.readline()
            assert line, f"it ended early: {said}"
            said += line
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 130 and "SH-601" in rest and "nothing was kept" in rest and "Traceback" not in rest


def node(name: str, status: NodeStatus, reason: str = "") -> NodeReport:
    return NodeReport(
        node_id="ab" * 32,
        name=name,
        tokens=1_234_567_890,
        bytes_sent=987_654_321,
        bytes_received=12,
        accepted_share=0.5,
        status=status,
        reason=reason,
        speed=1.0,
        rounds_accepted=1,
        rounds_excluded=0,
        compute_s=1.0,
    )


def test_a_bill_has_its_points_beneath_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    def line(name: str, paid: int, withheld: int) -> BillLine:
        return BillLine(name=name, node_id="ab" * 32, paid=paid, withheld=withheld, reason="worked")

    def printed(withheld: int) -> list[str]:
        lines = (line("amber", 2_500_000, 0), line("dune", 1_234, withheld))
        bill = Bill(quoted=3_000_000, charged=2_501_234, refunded=498_766, currency="USD", nodes=lines)
        print_bill(bill, console=Console(width=80, force_terminal=False, highlight=False))
        return capsys.readouterr().out.splitlines()[1:4]

    head, amber, dune = printed(0)
    assert amber.index(".") == dune.index(".") and "withheld" not in head
    head, amber, dune = printed(100)
    assert "withheld" in head and "0.000100" in dune and amber.rindex(".") == dune.rindex(".")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_closing_table_keeps_reasons_readable(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "found by replay of round 4: " + "the update is not the one that the assignment gives, " * 4
    nodes = (node("amber", NodeStatus.FINISHED), node("dune", NodeStatus.EXCLUDED, reason + "\x1b[31m[bold]"))
    report = msgspec.structs.replace(a_report(nodes), audit_count=AuditCount(chosen=228, replayed=7, dropped=221))
    print_report(report, console=Console(width=columns, force_terminal=False, highlight=False))
    lines = capsys.readouterr().out.splitlines()
    said = "Of 228 contributions chosen to be replayed, 7 were; the driver was too slow for the rest."
    assert said in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= columns
    assert sum(line.startswith("amber") for line in lines) == 1
    first = next(index for index, line in enumerate(lines) if line.startswith("dune  Found by replay"))
    assert len(lines[first].rstrip()) > columns * 0.8, "a reason has the whole width"
    assert "\x1b" not in "".join(lines) and "[bold]" in "".join(lines), "what a stranger wrote stays text"


@pytest.mark.parametrize("reached", [True, False])
def test_a_job_that_stopped_before_its_goal_says_why(reached: bool, capsys: pytest.CaptureFixture[str]) -> None:
    why = "The budget of 0.30 USD is used up. Nothing is lost: --resume goes on from here with a larger --budget."
    report = msgspec.structs.replace(a_report(()), goal=Goal(reached=reached, sentence=why))
    print_report(report, console=Console(width=200, force_terminal=False, highlight=False))
    assert (why in capsys.readouterr().out) is not reached


def a_report(nodes: tuple[NodeReport, ...]) -> Report:
    """A report with these nodes; everything else as empty as it can be."""
    empty: dict[type, Any] = {str: "", int: 0, float: 0.0}
    given: dict[str, Any] = {"nodes": nodes}
    for field in msgspec.structs.fields(Report):
        if field.name not in given and field.required:
            given[field.name] = empty.get(field.type, None if "None" in str(field.type) else ())
    return Report(**given)


def test_a_second_signal_ends_what_the_first_one_waits_for() -> None:
    before = signal.getsignal(signal.SIGINT)

    async def story() -> None:
        waits = asyncio.Event()

        async def leave() -> None:
            waits.set()
            await asyncio.get_running_loop().create_future()

        stopping = asyncio.create_task(until_stopped(leave))
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(LIMIT_S):
            await waits.wait()
            assert not stopping.done()
            os.kill(os.getpid(), signal.SIGINT)
            await stopping

    try:
        asyncio.run(story())
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_node_is_stopped_where_none_runs(place: Path) -> None:
    folder = place / "node"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "lock").touch()
    (folder / "pid").write_text(str(os.getpid()))  # a number that is another's by now
    done = shoal(place, "node", "stop", "--data", str(folder))
    assert (done.returncode, done.stdout) == (0, f"No node runs in {folder}.\n")
    assert json.loads(shoal(place, "node", "stop", "--json").stdout) == {"stopped": False}
