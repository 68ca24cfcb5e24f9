"""Jobs that nodes drive while their owner is away: real processes, hosts that are killed, and money that adds up."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from job_world import PATIENCE_S, Watch, check_account, job_text, options_for, owner_key, parsed, resume_job
from test_paid_jobs import DEPOSIT, Terminal, Town, check_bill, in_town

from shoal.driver.folder import RunFolder
from shoal.driver.lines import Event, EventKind
from shoal.house import RemoteLedger
from shoal.identity import KeyPair
from shoal.market.reputation import Outcome
from shoal.node.hosting import CannotHost, NotHosted
from shoal.protocol.driving import (
    DriveAsk,
    DriveBegin,
    DriveGiven,
    DriveStop,
    FolderAsk,
    FolderGiven,
    Host,
)
from shoal.protocol.offers import Done
from shoal.protocol.training import Commit, Term
from shoal.purse.bills import FILE, Payments
from shoal.sdk.acquaintances import Acquaintances
from shoal.sdk.attached import AttachOptions, attach, stop_detached
from shoal.sdk.detached import Standing, ask, detach
from shoal.sdk.local import LocalProcess, LocalShoal
from shoal.transport import TlsEndpoint
from shoal.world import Refused, SystemClock, SystemDice
from shoal.world.processes import pid_in_lock

WAITS = "The money is used up: the job waits for more until "


async def three_nodes(shoal: LocalShoal, **options: list[str]) -> None:
    await shoal.start_hub()
    await asyncio.gather(
        *(
            shoal.start_node(name, options=["--threads", "1", "--storage", "1 GiB", *options.get(name, [])])
            for name in ("amber", "birch", "cedar")
        )
    )


def attach_options(at: Path, watch: Watch, known: Acquaintances | None = None) -> AttachOptions:
    return AttachOptions(
        at / "run", acquaintances=known, say=watch.said.append, progress=watch.progress, event=watch.event
    )


@pytest.mark.timeout(400)
def test_a_node_drives_and_the_owner_gets_it_all(tmp_path: Path) -> None:
    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await three_nodes(shoal)
            text, seen = job_text(tmp_path), list[list[Standing]]()
            nodes = {name: bytes.fromhex(one.ready["node"]) for name, one in shoal.nodes.items()}
            known = Acquaintances(tmp_path / "nodes.json")
            known.add({nodes["cedar"]: Outcome(lied=True)}, 1)
            options = options_for(shoal, tmp_path / "run", owner_key(), Watch())
            options.acquaintances = known
            made = await detach(parsed(text, tmp_path), text, options, lambda one: seen.append(list(one)))
            assert len(made.hosts) == 2 and {one.phase for one in seen[-1]} == {"driving", "standing by"}
            watch = Watch()
            async with asyncio.timeout(PATIENCE_S):
                report = await attach(attach_options(tmp_path, watch, known))
            assert report is not None and report.tokens_accepted >= 40_000
            assert {one.name for one in report.nodes} == {"amber", "birch"}, "whom its owner shuns no host takes"
            after = known.read()
            assert [after[nodes[name]].kept for name in ("amber", "birch", "cedar")] == [1, 1, 0]
            check_account(report, tmp_path / "run")
            assert (tmp_path / "run" / "model" / "model.safetensors").is_file() and watch.shares[-1] >= 1

    asyncio.run(whole())


@pytest.mark.timeout(500)
def test_a_driver_that_dies_is_followed_by_another_node(tmp_path: Path) -> None:
    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await three_nodes(shoal)
            text = job_text(tmp_path, tokens=150_000, nodes_min=1)
            made = await detach(
                parsed(text, tmp_path), text, options_for(shoal, tmp_path / "run", owner_key(), Watch())
            )
            first, second = made.hosts
            watch = Watch(at={0.2: lambda: kill(shoal.nodes[first.name])})
            async with asyncio.timeout(2 * PATIENCE_S):
                report = await attach(attach_options(tmp_path, watch))
            assert report is not None and report.tokens_accepted >= 150_000
            assert {term.driver for term in terms(tmp_path)} == {first.driver, second.driver}
            assert any(said.startswith(f"{second.name} drives the job, in term 2") for said in watch.said)
            check_account(report, tmp_path / "run")

    asyncio.run(whole())


@pytest.mark.timeout(600)
def test_a_host_that_comes_back_is_the_next_again(tmp_path: Path) -> None:
    """What it wrote last as a driver nobody else has: its copy becomes another one from there on."""

    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await three_nodes(shoal)
            text = job_text(tmp_path, tokens=10_000_000, nodes_min=1)
            made = await detach(
                parsed(text, tmp_path), text, options_for(shoal, tmp_path / "run", owner_key(), Watch())
            )
            first, second = made.hosts
            watch = Watch()
            looking = asyncio.create_task(attach(attach_options(tmp_path, watch)))
            await watch.until(lambda: bool(watch.shares))
            kill(shoal.nodes[first.name])
            await watch.until(lambda: f"{second.name} drives the job, in term 2." in watch.said)
            node = tmp_path / "town" / "nodes" / first.name
            (copy,) = (node / "hosted").glob("*/run")
            newest = commits_in(copy)[-1].round
            await shoal.start_node(first.name, options=["--threads", "1", "--storage", "1 GiB"])
            async with asyncio.timeout(PATIENCE_S):
                while not has_more_and_all(copy, node / "blobs", newest):
                    await asyncio.sleep(0.2)
            kill(shoal.nodes[second.name])
            await watch.until(lambda: f"{first.name} drives the job, in term 3." in watch.said)
            share = watch.shares[-1]
            await watch.until(lambda: watch.shares[-1] > share)
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            assert [term.driver for term in terms(tmp_path)] == [first.driver, second.driver, first.driver]

    asyncio.run(whole())


@pytest.mark.timeout(500)
def test_one_escrow_pays_whoever_drives_and_works(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        text = job_text(tmp_path, tokens=150_000, nodes_min=1)
        options = town.options(tmp_path, Watch(), 20_000_000)
        made = await detach(parsed(text, tmp_path), text, options)
        first, second = made.hosts
        assert all(host.micro_per_h and host.payee for host in made.hosts), (
            "driving costs a twentieth of a node's price"
        )
        assert await ledger.balance(town.account.address) == DEPOSIT - 20_000_000
        watch = Watch(at={0.3: lambda: kill(town.shoal.nodes[first.name])})
        async with asyncio.timeout(2 * PATIENCE_S):
            report = await attach(attach_options(tmp_path, watch))
        assert report is not None and report.tokens_accepted >= 150_000
        assert {term.driver for term in terms(tmp_path)} == {first.driver, second.driver}
        bill = check_bill(report, tmp_path / "run")
        assert bill.quoted == 20_000_000 and 0 < (watch.spent[-1] or 0) <= bill.charged
        assert all("at that speed a million tokens for" in told for told in watch.sentences("joined with"))
        paid = {line.name: line.paid for line in bill.nodes}
        assert "cedar" not in paid, "it is as dear for who follows, also where nobody is left who was paid before"
        assert paid[f"{second.name} (driving)"] > paid[f"{first.name} (driving)"] > 0
        payments = msgspec.json.decode((tmp_path / "run" / FILE).read_bytes(), type=Payments)
        (term,) = payments.terms
        escrow = await ledger.escrow(term.escrow)
        assert escrow is not None and escrow.closing and escrow.redeemed_micro == bill.charged
        assert escrow.terms.signer != town.account.address and escrow.ends_ms < term.terms.expires_ms

    in_town(tmp_path, story)


def kill(node: LocalProcess) -> None:
    """With all that it has started, as a power cut would."""
    for child in psutil.Process(node.pid).children(recursive=True):
        child.kill()
    node.kill()


def commits_in(run: Path) -> list[Commit]:
    with RunFolder.open(run, read_only=True) as folder:
        return [commit for _, commit in folder.opened(Commit)]


def has_more_and_all(run: Path, blobs: Path, newest: int) -> bool:
    """A copy goes beyond a round, and all updates that it names are here."""
    commits, names = commits_in(run), {path.name for path in blobs.rglob("*")}
    updates = {entry.update.hash.hex() for commit in commits for entry in commit.accepted}
    return bool(commits) and commits[-1].round > newest and updates <= names


class Seen(msgspec.Struct):
    driver: bytes
    number: int


def terms(at: Path) -> list[Seen]:
    with RunFolder.open(at / "run", read_only=True) as folder:
        return [Seen(envelope.signer, term.number) for envelope, term in folder.opened(Term)]


@pytest.mark.timeout(500)
def test_a_job_that_nodes_drive_is_shown_and_cancelled(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        terminal = Terminal(town, tmp_path)
        said = terminal.said
        (tmp_path / "job.yaml").write_bytes(job_text(tmp_path, tokens=10_000_000))
        hub = town.shoal.hub_tickets[0]
        made = await said("train", "job.yaml", "--hub", hub, "--budget", "5", "--detach")
        assert made["run"] == "runs/job" and len(made["hosts"]) == 2
        refused = await said("train", "runs/job", "--hub", hub, "--resume", code=2)
        assert "Nodes drive the job in runs/job" in refused["error"]["sentence"]
        async with asyncio.timeout(PATIENCE_S):
            while (shown := await said("jobs", "show", "runs/job"))["tokens"] == 0 or not shown["spent_micro"]:
                assert shown["state"] == "detached"
        assert (await said("jobs"))["runs"][0]["state"] == "detached"
        attached = await terminal.start("attach", "runs/job", "--hub", hub, stdout=None)
        async with asyncio.timeout(PATIENCE_S):
            while pid_in_lock(tmp_path / "runs" / "job") != attached.pid:
                await asyncio.sleep(0.05)
        beside = await said("jobs", "show", "runs/job")
        assert beside["state"] == "detached" and beside["spent_micro"] >= shown["spent_micro"]
        assert await said("jobs", "cancel", "runs/job") == {"stopped": None, "closed": None}
        assert attached.returncode == 130 or await attached.wait() == 130, "it does not look on"
        after = await said("jobs", "show", "runs/job")
        assert after["state"] == "stopped" and after["open_micro"] == 0 and after["spent_micro"] >= shown["spent_micro"]
        assert "working" not in {node["status"] for node in after["nodes"]}
        payments = msgspec.json.decode((tmp_path / "runs" / "job" / FILE).read_bytes(), type=Payments)
        assert after["escrows"] == [payments.terms[0].escrow.hex()]
        escrow = await ledger.escrow(payments.terms[0].escrow)
        assert escrow is not None and escrow.closing and escrow.redeemed_micro == after["spent_micro"]
        assert (await said("attach", "runs/job")) is None

    in_town(tmp_path, story)


@pytest.mark.timeout(600)
def test_a_job_whose_money_is_used_up_waits_for_more_and_goes_on(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        run = tmp_path / "runs" / "job"
        said = functools.partial(Terminal(town, tmp_path).said, patience_s=2 * PATIENCE_S)
        (tmp_path / "job.yaml").write_bytes(job_text(tmp_path, tokens=10_000_000))

        async def until_it_waits(times: int) -> Any:
            async with asyncio.timeout(2 * PATIENCE_S):
                while True:
                    shown = await said("jobs", "show", "runs/job")
                    with RunFolder.open(run, read_only=True) as folder:
                        events = list(folder.notes(Event))
                    waits = [one for one in events if one.kind is EventKind.WAITING]
                    assert shown["state"] in ("detached", "waiting")
                    if len(waits) == times and shown["state"] == "waiting":
                        assert shown["waits"].startswith(WAITS) and shown["forecast"] is None
                        warned = [at for at, one in enumerate(events) if "of the budget is left" in one.sentence]
                        assert warned and warned[-1] < events.index(waits[-1])
                        return shown

        hub = town.shoal.hub_tickets[0]
        await said("train", "job.yaml", "--hub", hub, "--budget", "0.04", "--detach")
        first = await until_it_waits(1)
        assert 0 < first["spent_micro"] <= 40_000
        (before,) = msgspec.json.decode((run / FILE).read_bytes(), type=Payments).terms
        escrow = await ledger.escrow(before.escrow)
        assert escrow is not None and not escrow.closing and not before.closed

        made = await said("jobs", "fund", "runs/job", "0.05")
        assert made["budget_micro"] == 90_000
        second = await until_it_waits(2)
        assert second["tokens"] > first["tokens"] and 40_000 < second["spent_micro"] <= 90_000
        assert second["budget_micro"] == 90_000 and second["round"] > first["round"]

        refused = await said("train", "runs/job", "--hub", hub, "--resume", "--budget", "1", code=2)
        assert "add to its budget with `shoal jobs fund`" in refused["error"]["sentence"]
        await said("jobs", "cancel", "runs/job")
        async with asyncio.timeout(PATIENCE_S):
            while not (escrow := await ledger.escrow(before.escrow)) or not escrow.closing:
                await asyncio.sleep(0.1)
        (term,) = msgspec.json.decode((run / FILE).read_bytes(), type=Payments).terms
        assert term.escrow == before.escrow and term.added_micro == 50_000 and term.closed
        after = await said("jobs", "show", "runs/job")
        assert escrow.amount_micro == 90_000 and escrow.redeemed_micro == after["spent_micro"] == second["spent_micro"]
        late = await said("jobs", "fund", "runs/job", "1", code=2)
        assert late["error"]["code"] == "SH-166"

    in_town(tmp_path, story)


@pytest.mark.timeout(200)
def test_what_strangers_ask_of_a_host_is_refused(tmp_path: Path) -> None:
    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await shoal.start_hub()
            node = (await shoal.start_node("amber", options=["--threads", "1", "--storage", "1 GiB"])).ready
            endpoint = TlsEndpoint(KeyPair.generate(), clock=SystemClock(), dice=SystemDice())
            try:
                link = await endpoint.dial(bytes.fromhex(node["node"]), node["addresses"])
                given = await ask(link, DriveAsk(name="job", size_bytes=1, micro_per_h=0), DriveGiven)
                host = Host(node=link.peer, driver=given.driver, name="amber")
                begin = DriveBegin(driver=given.driver, job=bytes(32), hosts=(host,), hubs=("shoal://none",))
                other = msgspec.structs.replace(host, driver=bytes(32))
                for message, answer, code in (
                    (DriveAsk(name="job", size_bytes=1 << 40, micro_per_h=0), DriveGiven, CannotHost.code),
                    (msgspec.structs.replace(begin, driver=bytes(32)), Done, CannotHost.code),
                    (msgspec.structs.replace(begin, hosts=(other,)), Done, CannotHost.code),
                    (msgspec.structs.replace(begin, hosts=(host, host)), Done, CannotHost.code),
                    (FolderAsk(job=bytes(32)), FolderGiven, NotHosted.code),
                    (DriveStop(job=bytes(32)), Done, NotHosted.code),
                ):
                    with pytest.raises(Refused) as caught:
                        await ask(link, message, answer)
                    assert caught.value.remote_code == code
                await ask(link, begin, Done)
                await ask(link, begin, Done)  # an answer may be lost
                standing = await ask(link, FolderAsk(job=bytes(32), standing_only=True), FolderGiven)
                assert standing.phase == "fetching"
                thief = TlsEndpoint(KeyPair.generate(), clock=SystemClock(), dice=SystemDice())
                stolen = await thief.dial(link.peer, node["addresses"])
                for message in (FolderAsk(job=bytes(32)), DriveStop(job=bytes(32))):
                    with pytest.raises(Refused) as caught:
                        await ask(stolen, message, FolderGiven)
                    assert caught.value.remote_code == NotHosted.code
                await thief.close()
                await ask(link, DriveStop(job=bytes(32)), Done)
                assert (await ask(link, FolderAsk(job=bytes(32)), FolderGiven)).phase == "over"
            finally:
                await endpoint.close()

    asyncio.run(whole())


@pytest.mark.timeout(400)
def test_what_nodes_began_is_gone_on_with_here(tmp_path: Path) -> None:
    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await three_nodes(shoal)
            text = job_text(tmp_path, tokens=2_000_000)
            await detach(parsed(text, tmp_path), text, options_for(shoal, tmp_path / "run", owner_key(), Watch()))
            seen = Watch()
            looking = asyncio.create_task(attach(attach_options(tmp_path, seen)))
            await seen.until(lambda: bool(seen.shares))
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            await stop_detached(attach_options(tmp_path, Watch()))
            with RunFolder.open(tmp_path / "run", read_only=True) as folder:
                commits = sum(1 for _ in folder.records(Commit))
            again = Watch()
            going_on = asyncio.create_task(resume_job(shoal, tmp_path, owner_key(), again, text))
            await again.until(lambda: bool(again.shares) or going_on.done())
            going_on.cancel()
            await asyncio.gather(going_on, return_exceptions=True)
            assert any(said.startswith(f"Going on after round {commits - 1}, in term 2") for said in again.said)
            assert again.shares[0] > seen.shares[0]

    asyncio.run(whole())
