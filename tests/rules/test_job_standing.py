"""How runs stand, by their folders alone: whose driver lives, what is spent, what the rest takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from report_story import Story
from rich.console import Console
from typer.testing import CliRunner

from shoal.cli import jobs
from shoal.cli.jobs import jobs_app
from shoal.driver.folder import RunFolder
from shoal.driver.lines import Event, EventKind
from shoal.driver.report import NodeStatus
from shoal.driver.write_report import write_report
from shoal.gateway.receipts import Books, GatewayRunning
from shoal.protocol.money import EscrowTerms, HouseLedger, Payee
from shoal.purse.bills import PaidNode, Payments, TermPayments
from shoal.quantities.money import MICRO
from shoal.sdk.handed import FILE as HANDED
from shoal.sdk.handed import Handed
from shoal.sdk.jobs import (
    DamagedRun,
    EndpointStanding,
    Forecast,
    JobStanding,
    JobState,
    ServedBy,
    forecast,
    look_at,
    look_at_all,
    look_at_endpoints,
    stop,
)
from shoal.world.processes import writer_of


def write(path: Path, story: Story) -> RunFolder:
    folder = RunFolder.create(path)
    story.write(folder)
    folder.write("figures.json", msgspec.json.encode(story.figures()))
    return folder


def leave_number(path: Path, pid: int) -> None:
    (path / "lock").write_bytes(f"{pid:<20}".encode())


def a_gone_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def state_of(path: Path) -> JobState:
    return look_at(path).state


def test_a_run_is_running_while_its_driver_holds_the_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with write(run, Story()):
        assert state_of(run) is JobState.RUNNING
        driver = writer_of(run)
        assert driver is not None and driver.pid == os.getpid()
        shutil.copytree(run, tmp_path / "copy")
        assert state_of(tmp_path / "copy") is JobState.DIED, "its number is that of the other run's driver"
        (tmp_path / "link").symlink_to(run)
        assert state_of(tmp_path / "link") is JobState.RUNNING
    assert state_of(run) is JobState.STOPPED
    leave_number(run, a_gone_process())
    assert state_of(run) is JobState.DIED
    leave_number(run, os.getpid())
    assert state_of(run) is JobState.DIED, "the number is used again, by who does not hold the lock"
    assert writer_of(run) is None and stop(run) is None, "so it is not stopped"


def test_a_run_is_finished_by_its_report_and_not_before_its_goal(tmp_path: Path) -> None:
    story = Story()
    with write(tmp_path / "run", story) as folder:
        report = write_report(folder, story.figures())
    for tokens, state in ((report.token_budget, JobState.FINISHED), (report.token_budget - 1, JobState.STOPPED)):
        made = msgspec.structs.replace(report, tokens_accepted=tokens)
        (tmp_path / "run" / "report.json").write_bytes(msgspec.json.encode(made))
        assert state_of(tmp_path / "run") is state
    leave_number(tmp_path / "run", a_gone_process())
    assert state_of(tmp_path / "run") is JobState.DIED


def test_a_run_that_nodes_drive_waits_for_money_as_long_as_nothing_comes_after_that(tmp_path: Path) -> None:
    story, waits = Story(rounds=60), "The money is used up: the job waits for more until 12:00 UTC."
    with write(tmp_path / "run", story) as folder:
        folder.write(HANDED, msgspec.json.encode(Handed(job=folder.job.record_id, hosts=(), hubs=())))
        assert state_of(tmp_path / "run") is JobState.DETACHED
        folder.note(Event(time_s=900.0, sentence=waits, kind=EventKind.WAITING))
        found = look_at(tmp_path / "run")
        assert (found.state, found.waits, found.forecast) == (JobState.WAITING, waits, None)
        folder.note(Event(time_s=901.0, sentence="2 places were held."))
        found = look_at(tmp_path / "run")
        assert (found.state, found.waits) == (JobState.DETACHED, "") and found.forecast is not None


def test_nobody_works_for_a_run_that_is_over(tmp_path: Path) -> None:
    story = Story()
    works = [msgspec.structs.replace(node, status=NodeStatus.WORKING) for node in story.figures().nodes]
    with write(tmp_path / "run", story) as folder:
        folder.write("figures.json", msgspec.json.encode(msgspec.structs.replace(story.figures(), nodes=tuple(works))))
        running = look_at(tmp_path / "run")
    stopped = look_at(tmp_path / "run")
    for found, state in ((running, JobState.RUNNING), (stopped, JobState.STOPPED)):
        assert found.state is state and found.working == len(works)
    assert {one.status for one in running.nodes} == {NodeStatus.WORKING}
    assert {one.status for one in stopped.nodes} == {NodeStatus.FINISHED}


def payments_of(story: Story) -> Payments:
    """One term that is over, and one that is not, in which the first node works on."""
    ledger = HouseLedger(bytes(32), "USD")

    def term(nonce: int, closed: bool, **nodes: PaidNode) -> TermPayments:
        terms = EscrowTerms(
            payer=bytes(20), signer=bytes(20), cap_micro=0, auditor=bytes(20), amount_micro=3 * MICRO, fee_ppm=0,
            holdback_ppm=100_000, notice_ms=60_000, audit_ms=0, expires_ms=1 << 50, payees=(Payee(bytes(20), MICRO),),
            quote=bytes(32), nonce=bytes([nonce] * 32),
        )  # fmt: skip
        return TermPayments(terms=terms, ledger=ledger, signature=bytes(65), nodes=nodes, closed=closed)

    def node(place: int, paid: int, per_h: int, withheld: int = 0) -> dict[str, PaidNode]:
        made = PaidNode(
            name=story.names[place], payee=bytes(20), micro_per_h=per_h, paid_micro=paid,
            withheld_micro=withheld, hold=b"as the node signed it",
        )  # fmt: skip
        return {story.keys[place].node_id.hex(): made}

    first = term(1, True, **node(0, 700_000, MICRO), **node(2, 400_000, MICRO, 40_000))
    return Payments(budget_micro=3 * MICRO, terms=(first, term(2, False, **node(0, 300_000, 2 * MICRO))))


def test_what_a_run_has_spent_and_what_the_rest_takes(tmp_path: Path) -> None:
    story = Story(rounds=60)
    figures = story.figures()
    works = msgspec.structs.replace(figures.nodes[0], status=NodeStatus.WORKING)
    figures = msgspec.structs.replace(figures, nodes=(works, *figures.nodes[1:]))
    with write(tmp_path / "run", story) as folder:
        folder.write("figures.json", msgspec.json.encode(figures))
        free = look_at(tmp_path / "run")
        folder.write("payments.json", msgspec.json.encode(payments_of(story)))
    found = look_at(tmp_path / "run")
    assert (found.spent_micro, found.budget_micro, found.currency) == (1_360_000, 3 * MICRO, "USD")
    assert found.open_micro == 2_700_000, "of the term that nobody has closed"
    earned = {one.name: (one.earned_micro, one.withheld_micro, one.micro_per_h) for one in found.nodes}
    assert earned["anchovy"] == (MICRO, 0, 2 * MICRO) and earned["cod"] == (360_000, 40_000, MICRO)
    assert earned["dab"] == (0, 0, 0) and set(earned) == set(story.names)
    assert (free.spent_micro, free.currency, free.tokens) == (0, None, found.tokens) and free.tokens > 0
    left = found.token_budget - found.tokens
    assert found.forecast == forecast(left, found.tokens_per_s, 1_640_000, 2 * MICRO)
    assert found.forecast is not None and found.forecast.micro > 0
    assert free.forecast == Forecast(left / found.tokens_per_s, 0, None)


def test_a_run_that_stopped_says_how_it_goes_on(tmp_path: Path) -> None:
    with write(tmp_path / "run", Story(rounds=60)):
        pass
    said = " ".join(CliRunner().invoke(jobs_app, ["show", str(tmp_path / "run")]).output.split())
    assert re.search(rf"At the last rate: .* left\. Go on with: \S+ train {tmp_path}/run --resume$", said)


def test_who_drives_is_paid_and_is_no_member(tmp_path: Path) -> None:
    story = Story()
    payments = payments_of(story)
    *former, term = payments.terms
    host = PaidNode(name="anchovy (driving)", payee=bytes(20), micro_per_h=MICRO, paid_micro=7, reason="drove the job")
    term = msgspec.structs.replace(term, nodes={**term.nodes, "ee" * 32: host})
    for closed, status in ((False, NodeStatus.WORKING), (True, NodeStatus.FINISHED)):
        path = tmp_path / str(closed)
        with write(path, story) as folder:
            alone = look_at(path).working
            terms = (*former, msgspec.structs.replace(term, closed=closed))
            folder.write("payments.json", msgspec.json.encode(msgspec.structs.replace(payments, terms=terms)))
        found = look_at(path)
        assert [(one.name, one.status, one.earned_micro) for one in found.nodes if one.drives] == [
            (host.name, status, 7)
        ]
        assert found.working == alone


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param((7200, 1.0, 3 * MICRO, MICRO), Forecast(7200.0, 2 * MICRO, None), id="enough"),
        pytest.param((7200, 1.0, MICRO, MICRO), Forecast(7200.0, 2 * MICRO, 3600.0), id="not enough"),
        pytest.param((7200, 1.0, 0, MICRO), Forecast(7200.0, 2 * MICRO, 0.0), id="nothing left"),
        pytest.param((7200, 1.0, 0, 0), Forecast(7200.0, 0, None), id="free nodes"),
        pytest.param((0, 1.0, MICRO, MICRO), None, id="done"),
        pytest.param((-5, 1.0, MICRO, MICRO), None, id="more than done"),
        pytest.param((7200, 0.0, MICRO, MICRO), None, id="nothing known"),
    ],
)
def test_a_forecast_is_for_the_present_rate(given: tuple[int, float, int, int], expected: Forecast | None) -> None:
    assert forecast(*given) == expected


def test_a_damaged_run_hides_no_other(tmp_path: Path) -> None:
    assert look_at_all(tmp_path / "none") == []
    for number, name in enumerate(("one", "two", "three", "four")):
        write(tmp_path / name, Story(seed=number)).close()
    (tmp_path / "notes").mkdir()
    (tmp_path / "text").write_text("no run")
    (tmp_path / "two" / "metrics.jsonl").write_text("{\n")
    (tmp_path / "three" / "payments.json").write_text("{")
    (tmp_path / "four" / "job.record").write_bytes(b"\xff")
    found = look_at_all(tmp_path)
    assert {Path(one.folder).name for one in found} == {"one", "two", "three", "four"}
    damaged = {Path(one.folder).name: one for one in found if isinstance(one, DamagedRun)}
    assert set(damaged) == {"two", "three", "four"}
    assert {one.code for one in damaged.values()} == {"SH-450"}
    assert "metrics.jsonl line 1 is damaged" in damaged["two"].sentence
    assert "it says what nodes were paid" in damaged["three"].sentence
    assert isinstance(found[-1], JobStanding), "the newest first, damaged ones by when they were written to"
    assert [one.begun_ms for one in found] == sorted((one.begun_ms for one in found), reverse=True)


def test_endpoints_stand_by_their_folders_as_runs_do(tmp_path: Path) -> None:
    payments = payments_of(Story())
    assert look_at_endpoints(tmp_path) == []
    for name in ("free", "paying", "torn"):
        Books(tmp_path / name, print).close()
    (tmp_path / "paying" / "payments.json").write_bytes(msgspec.json.encode(payments))
    (tmp_path / "torn" / "payments.json").write_text("{")
    write(tmp_path / "run", Story()).close()
    (tmp_path / "run" / "payments.json").write_bytes(msgspec.json.encode(payments))

    def found() -> EndpointStanding:
        by_name = {Path(one.folder).name: one for one in look_at_endpoints(tmp_path)}
        assert set(by_name) == {"paying", "torn"}, "who pays nobody, and a run, are none"
        torn, paying = by_name["torn"], by_name["paying"]
        assert isinstance(torn, DamagedRun) and torn.code == "SH-452"
        assert isinstance(paying, EndpointStanding)
        return paying

    books = Books(tmp_path / "paying", print)
    now = found()
    assert (now.state, now.spent_micro, now.budget_micro, now.open_micro) == (
        JobState.RUNNING,
        1_360_000,
        3 * MICRO,
        2_700_000,
    )
    keys = [key.node_id.hex() for key in Story().keys]
    assert now.nodes == (
        ServedBy("anchovy", keys[0], 2 * MICRO, MICRO, "worked"),
        ServedBy("cod", keys[2], MICRO, 360_000, "worked"),
    )
    with pytest.raises(GatewayRunning, match=rf"Another gateway \(process {os.getpid()}\) keeps its receipts"):
        Books(tmp_path / "paying", print)
    books.close()
    assert found().state is JobState.STOPPED and stop(tmp_path / "paying") is None
    leave_number(tmp_path / "paying", a_gone_process())
    assert found().state is JobState.DIED


@pytest.mark.parametrize("columns", [60, 80])
def test_the_list_names_every_run_and_its_money_also_on_a_narrow_terminal(
    tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    monkeypatch.setattr(jobs, "out", Console(width=columns, highlight=False))
    monkeypatch.chdir(tmp_path)
    payments = msgspec.json.encode(payments_of(Story()))
    with write(Path("runs") / "quickstart", Story()) as folder:
        folder.write("payments.json", payments)
    Books(tmp_path / "serve" / "small", print).close()
    (tmp_path / "serve" / "small" / "payments.json").write_bytes(payments)
    jobs.list_jobs()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert [line for line in lines if line.startswith("runs/quickstart stopped ") and line.endswith(" 1.36 3.00 USD")]
    assert [line for line in lines if " stopped  1.36 3.00 USD" in line and not line.startswith("runs/")]
