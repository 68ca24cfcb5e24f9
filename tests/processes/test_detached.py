"""Jobs that nodes drive while their owner is away: real processes, hosts that are killed, and money that adds up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import psutil
import pytest
from job_world import PATIENCE_S, Watch, check_account, job_text, options_for, owner_key, parsed
from test_paid_jobs import DEPOSIT, Town, check_bill, in_town

from shoal.driver.folder import RunFolder
from shoal.house import RemoteLedger
from shoal.protocol.training import Term
from shoal.purse.bills import FILE, Payments
from shoal.sdk.attached import AttachOptions, attach
from shoal.sdk.detached import Standing, detach
from shoal.sdk.local import LocalProcess, LocalShoal


async def three_nodes(shoal: LocalShoal, **options: list[str]) -> None:
    await shoal.start_hub()
    await asyncio.gather(
        *(
            shoal.start_node(name, options=["--threads", "1", "--storage", "1 GiB", *options.get(name, [])])
            for name in ("amber", "birch", "cedar")
        )
    )


def attach_options(at: Path, watch: Watch) -> AttachOptions:
    return AttachOptions(at / "run", say=watch.said.append, progress=watch.progress, event=watch.event)


@pytest.mark.timeout(400)
def test_a_node_drives_and_the_owner_gets_it_all(tmp_path: Path) -> None:
    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await three_nodes(shoal)
            text, seen = job_text(tmp_path), list[list[Standing]]()
            options = options_for(shoal, tmp_path / "run", owner_key(), Watch())
            made = await detach(parsed(text, tmp_path), text, options, lambda one: seen.append(list(one)))
            assert len(made.hosts) == 2 and {one.phase for one in seen[-1]} == {"driving", "standing by"}
            watch = Watch()
            async with asyncio.timeout(PATIENCE_S):
                report = await attach(attach_options(tmp_path, watch))
            assert report is not None and report.tokens_accepted >= 40_000
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


@pytest.mark.timeout(500)
def test_one_escrow_pays_whoever_drives_and_works(tmp_path: Path) -> None:
    async def story(town: Town, ledger: RemoteLedger) -> None:
        text = job_text(tmp_path, tokens=150_000, nodes_min=1)
        options = town.options(tmp_path, Watch(), 5_000_000)
        made = await detach(parsed(text, tmp_path), text, options)
        first, second = made.hosts
        assert all(host.micro_per_h and host.payee for host in made.hosts), (
            "driving costs a twentieth of a node's price"
        )
        assert await ledger.balance(town.account.address) == DEPOSIT - 5_000_000
        watch = Watch(at={0.3: lambda: kill(town.shoal.nodes[first.name])})
        async with asyncio.timeout(2 * PATIENCE_S):
            report = await attach(attach_options(tmp_path, watch))
        assert report is not None and report.tokens_accepted >= 150_000
        assert {term.driver for term in terms(tmp_path)} == {first.driver, second.driver}
        bill = check_bill(report, tmp_path / "run")
        assert bill.quoted == 5_000_000
        paid = {line.name: line.paid for line in bill.nodes}
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


class Seen(msgspec.Struct):
    driver: bytes
    number: int


def terms(at: Path) -> list[Seen]:
    with RunFolder.open(at / "run", read_only=True) as folder:
        return [Seen(envelope.signer, term.number) for envelope, term in folder.opened(Term)]
