"""Whole jobs on nodes that cost something: real processes, a real ledger, and not a millionth lost."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from job_world import PATIENCE_S, Watch, check_account, job_text, options_for, owner_key, parsed

from shoal.driver.folder import RunFolder
from shoal.driver.gang import TooFewNodes
from shoal.driver.report import Report
from shoal.house import RemoteLedger
from shoal.identity import KeyPair
from shoal.identity.accounts import AccountKey, address_text, create_account
from shoal.ledger.commands import PostBond
from shoal.ledger.journal import verified
from shoal.market.reputation import NEW, Outcome
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.money import BondTerms
from shoal.protocol.training import Commit
from shoal.purse.bills import FILE, Bill, Payments, bill
from shoal.purse.escrow import NoMoney
from shoal.quantities.money import parse_money
from shoal.sdk.acquaintances import Acquaintances
from shoal.sdk.local import LocalShoal
from shoal.sdk.spending import Spending
from shoal.sdk.train import TrainOptions, plan, train
from shoal.transport import TlsEndpoint
from shoal.world import SystemClock, SystemDice
from shoal.world.quotes import NotSecured

NODES = ("amber", "birch", "cedar")
DEPOSIT = 50_000_000
PRICES = {"amber": "36/h", "birch": "18/h", "cedar": "3600/h"}
"""Dear ones, as these jobs take seconds; the last one is not worth its money."""
WORTH_IT = {"amber", "birch"}


KILLED_AT_A_COMMIT = """
import os, signal
from shoal.cli.main import main
from shoal.driver.folder import RunFolder
from shoal.protocol.training import Commit

append, commits = RunFolder.append, []

def last(self, envelope, **how):
    append(self, envelope, **how)
    if envelope.kind == Commit.KIND:
        commits.append(envelope)
    if len(commits) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.append = last
main()
"""
"""`shoal`, killed when its third Commit is on the disk, before anything comes of it."""


@dataclass
class Town:
    shoal: LocalShoal
    ticket: LedgerTicket
    account: AccountKey
    accounts: dict[str, AccountKey]

    async def ledger(self) -> tuple[RemoteLedger, TlsEndpoint]:
        endpoint = TlsEndpoint(KeyPair.generate(), clock=SystemClock(), dice=SystemDice())
        return RemoteLedger(endpoint, self.ticket, SystemClock()), endpoint

    def options(self, at: Path, watch: Watch, budget: int) -> TrainOptions:
        options = options_for(self.shoal, at / "run", owner_key(), watch)
        options.spending = Spending(self.account, self.ticket, budget, notice_ms=30_000, audit_ms=0)
        options.acquaintances = Acquaintances(at / "nodes.json")
        return options


class Terminal:
    """Where the payer types commands, in a folder of its own, with its keys and its ledger."""

    def __init__(self, town: Town, place: Path) -> None:
        self._place, self._home = place, place / "keys"
        (self._home / "account.ledger").write_text(str(town.ticket))

    async def start(
        self, *words: str, by: tuple[str, ...] = ("-m", "shoal"), stdout: int | None = asyncio.subprocess.PIPE,
        **environment: str,
    ) -> asyncio.subprocess.Process:  # fmt: skip
        return await asyncio.create_subprocess_exec(
            sys.executable, *by, *words, env={**os.environ, "SHOAL_HOME": str(self._home), **environment},
            cwd=self._place, stdout=stdout,
        )  # fmt: skip

    async def told(self, *words: str, code: int = 0, patience_s: float = PATIENCE_S, **environment: str) -> str:
        process = await self.start(*words, **environment)
        out = await heard(process, patience_s)
        assert process.returncode == code, out
        return out.decode()

    async def said(self, *words: str, code: int = 0, patience_s: float = PATIENCE_S) -> Any:
        return json.loads(await self.told(*words, "--json", code=code, patience_s=patience_s))


async def heard(process: asyncio.subprocess.Process, patience_s: float = PATIENCE_S) -> bytes:
    """All that it says until it ends."""
    async with asyncio.timeout(patience_s):
        out, _ = await process.communicate()
    return out


def in_town(tmp_path: Path, story: Any, prices: dict[str, str] = PRICES, notice: str = "60 s") -> None:
    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await shoal.start_hub()
            started = await shoal.start_ledger(options=["--mint-max", "100"])
            ticket = LedgerTicket.parse(started.ready["ticket"])
            accounts = {name: create_account(tmp_path / "keys" / name) for name in NODES}
            town = Town(shoal, ticket, create_account(tmp_path / "keys" / "account.key"), accounts)
            await asyncio.gather(
                *(
                    shoal.start_node(
                        name,
                        options=["--threads", "1", "--storage", "1 GiB", "--price", prices[name], "--ledger",
                                 str(ticket), "--account", address_text(accounts[name].address), "--notice", notice],
                    )
                    for name in NODES
                )
            )  # fmt: skip
            ledger, endpoint = await town.ledger()
            try:
                await ledger.mint(town.account.address, DEPOSIT)
                await story(town, ledger)
                book = verified([line async for line in ledger.lines()], ticket.ledger)
                assert sum(book.balances.values()) == 0
            finally:
                await endpoint.close()

    asyncio.run(whole())


def check_bill(report: Report, folder: Path) -> Bill:
    bill = report.bill
    assert bill is not None and bill == msgspec.json.decode((folder / "report.json").read_bytes(), type=Report).bill
    assert bill.charged + bill.refunded == bill.quoted
    assert bill.charged == sum(line.paid for line in bill.nodes) > 0
    return bill


async def check_settled(town: Town, ledger: RemoteLedger, bill: Bill, folder: Path) -> None:
    """All that was charged is redeemed at the ledger, node by node, and no more."""
    payments = msgspec.json.decode((folder / FILE).read_bytes(), type=Payments)
    redeemed = dict.fromkeys(NODES, 0)
    for term in payments.terms:
        escrow = await ledger.escrow(term.escrow)
        assert escrow is not None and escrow.ends_ms < term.terms.expires_ms, "the payer has asked for the rest"
        for name in NODES:
            paid = escrow.paid.get(town.accounts[name].address)
            redeemed[name] += paid.redeemed_micro if paid else 0
    assert redeemed == dict.fromkeys(NODES, 0) | {line.name: line.paid + line.withheld for line in bill.nodes}


@pytest.mark.timeout(300)
def test_a_job_pays_for_accepted_work_and_gets_the_rest_back(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        text = job_text(tmp_path)
        watch, hasty = Watch(), text.replace(b"wait: 60 s", b"wait: 3 s")
        free = options_for(town.shoal, tmp_path / "free", owner_key(), watch)
        with pytest.raises(TooFewNodes, match=r"budget \(free, as the job has no budget\) 3.*with a budget: 3 nodes"):
            await train(parsed(text, tmp_path), text, free)
        assert not any("waiting" in said for said in watch.said)
        near = text.replace(b"wait: 60 s", b"wait: 60 s\n  latency_within: 0.001 ms")
        planned = await plan(parsed(near, tmp_path), free, tmp_path / "near")
        assert planned.nodes == () and "within 0.001 ms of one another, and 2 are needed" in planned.why_not
        one = text.replace(b"nodes_min: 2", b"nodes_min: 1\n  nodes_max: 1")
        planned = await plan(parsed(one, tmp_path), free, tmp_path / "one")
        assert len(planned.nodes) == 3 and planned.costs is not None and planned.costs.best is not None
        assert planned.costs.best.what in WORTH_IT, "of all that fit, not of the fastest alone"
        with pytest.raises(NoMoney, match=r"sets 60.00 USD aside, and your account .* has 50.00"):
            await train(parsed(text, tmp_path), text, town.options(tmp_path, Watch(), 60_000_000))
        stake = BondTerms(
            account=town.account.address, node=bytes.fromhex(town.shoal.nodes["birch"].ready["node"]),
            network="shoal", amount_micro=2_000_000, notice_ms=24 * 3_600_000, nonce=bytes(32),
        )  # fmt: skip
        await ledger.apply(PostBond(stake, town.account.sign(stake.bond_id(town.ticket.ledger))))
        bonded = hasty.replace(b"wait: 3 s", b"wait: 3 s\n  bond_min: 1.50")
        watch = Watch()
        with pytest.raises(NotSecured, match=r"1 of 3 nodes have a bond of 1.50 .*, and 2 are needed; with 0.00 there"):
            await train(parsed(bonded, tmp_path), bonded, town.options(tmp_path, watch, 5_000_000))
        assert sum("have a bond of" in said for said in watch.said) == 1, "not at each look"
        watch = Watch()
        report = await train(parsed(text, tmp_path), text, town.options(tmp_path, watch, 5_000_000))
        assert any(said.startswith("Chosen 2 of 3 nodes: ") for said in watch.said)
        (times,) = (said for said in watch.said if "held in" in said)
        assert re.match(
            r"2 places were held in \d+ ms, the money for that was set aside in \d+ ms, and taken in", times
        )
        assert times in (tmp_path / "run" / "report.html").read_text()
        check_account(report, tmp_path / "run")
        bill = check_bill(report, tmp_path / "run")
        await check_settled(town, ledger, bill, tmp_path / "run")
        assert bill.quoted == 5_000_000 and {line.name for line in bill.nodes} == WORTH_IT
        hours = report.wall_s / 3600
        nodes = {one.name: bytes.fromhex(one.node_id) for one in report.nodes}
        seen = Acquaintances(tmp_path / "nodes.json")
        assert {node: one.kept for node, one in seen.read().items()} == dict.fromkeys(nodes.values(), 1)
        seen.add({nodes["amber"]: Outcome(lied=True)}, 0)
        again = town.options(tmp_path / "again", Watch(), 5_000_000)
        again.acquaintances = seen
        with pytest.raises(TooFewNodes, match=r"reputation_min \(at least 0.1\) 1"):
            wanted = hasty.replace(b"nodes_min: 2", b"nodes_min: 3")
            await train(parsed(wanted, tmp_path), wanted, again)
        assert all(line.paid <= int(PRICES[line.name].removesuffix("/h")) * 1e6 * hours + 1 for line in bill.nodes)

    in_town(tmp_path, story)


@pytest.mark.timeout(400)
def test_jobs_are_looked_at_and_cancelled_from_the_command_line(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        terminal, run = Terminal(town, tmp_path), tmp_path / "runs" / "job"
        said, told = terminal.said, functools.partial(terminal.told, COLUMNS="160")
        (tmp_path / "job.yaml").write_bytes(job_text(tmp_path, tokens=1_000_000))

        async def driver(*words: str) -> asyncio.subprocess.Process:
            """A driver that has committed three rounds more."""
            metrics = run / "metrics.jsonl"
            before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            hub = town.shoal.hub_tickets[0]
            process = await terminal.start("train", *words, "--hub", hub, "--budget", "20", "--json")
            async with asyncio.timeout(PATIENCE_S):
                while not metrics.exists() or metrics.read_bytes().count(b"\n") < before + 3:
                    assert process.returncode is None
                    await asyncio.sleep(0.02)
            return process

        async def earned() -> int:
            """What the ledger has paid to the nodes, with what it holds back."""
            book = verified([line async for line in ledger.lines()], town.ticket.ledger)
            return sum(one.redeemed_micro for one in book.escrows.values())

        killed = await driver("job.yaml")
        assert (await said("jobs"))["runs"][0]["state"] == "running"
        killed.kill()
        await killed.communicate()
        shown = await said("jobs", "show", "runs/job")
        assert shown["state"] == "died" and 0 < shown["spent_micro"] < 20_000_000
        assert shown["open_micro"] == 20_000_000 - shown["spent_micro"]
        assert shown["forecast"]["seconds"] > 0 and shown["forecast"]["micro"] > 0
        back = await said("jobs", "cancel", "runs/job")
        assert back["stopped"] is None and back["closed"]["micro"] == shown["open_micro"]
        assert await earned() == shown["spent_micro"]
        shown = await said("jobs", "show", "runs/job")
        assert (shown["state"], shown["open_micro"]) == ("stopped", 0)

        running = await driver("runs/job", "--resume")
        stopped = await said("jobs", "cancel", "runs/job")
        assert stopped == {"stopped": running.pid, "closed": None}
        async with asyncio.timeout(PATIENCE_S):
            out, _ = await running.communicate()
        assert running.returncode == 130 and json.loads(out)["error"]["code"] == "SH-601"
        (shown,) = (await said("jobs", "list", "--runs", "runs"))["runs"]
        assert (shown["state"], shown["open_micro"]) == ("stopped", 0)
        assert await earned() == shown["spent_micro"]
        assert sum(one["earned_micro"] for one in shown["nodes"]) == shown["spent_micro"]
        assert await said("jobs", "cancel", "runs/job") == {"stopped": None, "closed": None}

        of_nodes = dict[str, Any]()
        for name in [one["name"] for one in shown["nodes"]]:
            of_nodes[name] = await said("node", "earnings", "--data", str(tmp_path / "town" / "nodes" / name))
            assert of_nodes[name]["balances"][0]["account"] == address_text(town.accounts[name].address)
        earnings = [one for made in of_nodes.values() for one in made["escrows"]]
        assert sum(one["redeemed_micro"] for one in earnings) == shown["spent_micro"]
        assert sum(one["paid_micro"] + one["coming_micro"] for one in earnings) == shown["spent_micro"]
        assert {one["escrow"] for one in earnings} == set(shown["escrows"]) and len(shown["escrows"]) == 2
        one_line = re.compile(r"^\w{8} +(\w{10}) +([\d.]+) +([\d.]+) +([\d.]+) +\d{4}", re.MULTILINE)
        rows = one_line.findall(await told("node", "earnings", "--data", str(tmp_path / "town" / "nodes" / "amber")))
        assert rows and all(parse_money(whole) == sum(map(parse_money, parts)) for _, whole, *parts in rows)
        named = ", ".join(escrow[:10] for escrow in shown["escrows"])
        assert f"Escrows {named}." in await told("jobs", "show", "runs/job")
        assert {escrow for escrow, *_ in rows} <= set(named.split(", "))

    in_town(tmp_path, story)


@pytest.mark.timeout(400)
def test_money_that_runs_out_stops_the_job_and_a_killed_driver_loses_none(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        terminal, run = Terminal(town, tmp_path), tmp_path / "runs" / "job"
        (tmp_path / "job.yaml").write_bytes(job_text(tmp_path, tokens=600_000))
        driver = functools.partial(terminal.start, "train", "--json", "--hub", town.shoal.hub_tickets[0])

        async def report_of(process: asyncio.subprocess.Process) -> Report:
            return msgspec.json.decode(await heard(process), type=Report)

        report = await report_of(await driver("job.yaml", "--budget", "0.04"))
        assert report.goal is not None and not report.goal.reached
        assert re.search(r"The budget of 0.04 USD is used up: .* is left", report.goal.sentence)
        first = check_bill(report, run)
        assert 0 < first.charged <= 40_000

        killed = await driver("runs/job", "--resume", "--budget", "20", by=("-c", KILLED_AT_A_COMMIT))
        await heard(killed)
        assert killed.returncode == -signal.SIGKILL
        with RunFolder.open(run, read_only=True) as folder:
            *_, newest = (commit for _, commit in folder.opened(Commit))
            payments = folder.payments()
        assert payments is not None and newest.accepted
        spent, vouchers = payments.spent_micro, [one.voucher for one in payments.terms[-1].nodes.values()]
        assert spent > first.charged
        assert {one.contribution for one in newest.accepted} == {one.voucher.work for one in vouchers if one}

        report = await report_of(await driver("runs/job", "--resume"))
        assert report.goal is not None and report.goal.reached
        bill = check_bill(report, run)
        assert bill.quoted == 20_000_000 and bill.charged > spent
        await check_settled(town, ledger, bill, run)

    in_town(tmp_path, story)


@pytest.mark.timeout(400)
def test_money_is_added_to_a_job_while_it_goes_on(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        terminal, run = Terminal(town, tmp_path), tmp_path / "runs" / "job"
        (tmp_path / "job.yaml").write_bytes(job_text(tmp_path, tokens=10_000_000))
        hub = town.shoal.hub_tickets[0]
        driver = await terminal.start("train", "job.yaml", "--hub", hub, "--budget", "0.3", "--json")
        async with asyncio.timeout(PATIENCE_S):
            while not (run / FILE).exists():
                assert driver.returncode is None
                await asyncio.sleep(0.02)
        added = await terminal.said("jobs", "fund", "runs/job", "10")
        assert added["added_micro"] == 10_000_000 and added["budget_micro"] == 10_300_000
        async with asyncio.timeout(2 * PATIENCE_S):
            while (shown := await terminal.said("jobs", "show", "runs/job"))["spent_micro"] <= 300_000:
                assert shown["state"] == "running" and driver.returncode is None
        refused = await terminal.said("jobs", "fund", "runs/job", "60", code=2)
        assert refused["error"]["code"] == "SH-163", "more than there is"
        assert shown["budget_micro"] == 10_300_000
        await terminal.said("jobs", "cancel", "runs/job")
        assert json.loads(await heard(driver))["error"]["code"] == "SH-601"
        made = bill(msgspec.json.decode((run / FILE).read_bytes(), type=Payments))
        assert made is not None and made.quoted == 10_300_000 and made.charged > 300_000
        await check_settled(town, ledger, made, run)
        late = await terminal.said("jobs", "fund", "runs/job", "1", code=2)
        assert late["error"]["code"] == "SH-166" and "Nobody drives the run in runs/job" in late["error"]["sentence"]

    in_town(tmp_path, story)


@pytest.mark.timeout(400)
def test_a_node_that_is_taken_back_works_until_then_is_replaced_and_not_blamed(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        hasty = job_text(tmp_path, tokens=1_500_000, nodes_min=1).replace(b"wait: 60 s", b"wait: 3 s\n  nodes_max: 1")
        asks_more = hasty + b"  notice_min: 1 min\n"
        with pytest.raises(
            TooFewNodes, match=r"notice_min \(at least 60 s\) 3.*notice_min 5 s instead of 60 s: 3 nodes"
        ):
            await train(parsed(asks_more, tmp_path), asks_more, town.options(tmp_path, Watch(), 5_000_000))
        watch, text = Watch(), hasty + b"  notice_min: 4 s\n"
        running = asyncio.create_task(train(parsed(text, tmp_path), text, town.options(tmp_path, watch, 5_000_000)))
        await watch.until(lambda: bool(watch.shares))
        first = watch.sentences("joined with")[0].split()[0]
        folder = str(tmp_path / "town" / "nodes" / first)
        stopping = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "shoal", "node", "stop", "--data", folder, "--json", stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        at_notice = len(watch.shares)
        async with asyncio.timeout(PATIENCE_S):
            told, _ = await stopping.communicate()
        assert json.loads(told) == {"stopped": True, "pid": town.shoal.nodes[first].pid, "places": 1}
        assert len(watch.shares) > at_notice + 3, "it worked until then"
        assert await town.shoal.nodes[first].process.wait() == 0
        said = (tmp_path / "town" / "logs" / f"{first}.log").read_text()
        assert "Jobs that pay for this node have 5.0 s notice: it stops then, or before when they have left." in said
        done = len(watch.shares)
        await watch.until(lambda: len(watch.sentences("joined with")) > 1 and len(watch.shares) > done + 3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        (notice,) = watch.sentences("takes it back")
        assert notice.startswith(f"{first}: its owner takes it back in 5 s. It works until then")
        (second,) = (said.split()[0] for said in watch.sentences("joined with")[1:])
        made = bill(msgspec.json.decode((tmp_path / "run" / FILE).read_bytes(), type=Payments))
        assert made is not None and {line.name: line.reason for line in made.nodes} == {
            first: "Its owner took it back, and had said so in time", second: "worked",
        }  # fmt: skip
        await check_settled(town, ledger, made, tmp_path / "run")
        seen = Acquaintances(tmp_path / "nodes.json").read()
        assert seen[bytes.fromhex(town.shoal.nodes[first].ready["node"])].score == NEW

    in_town(tmp_path, story, dict.fromkeys(NODES, "18/h"), notice="5 s")
