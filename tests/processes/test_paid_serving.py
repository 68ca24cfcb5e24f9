"""A model on nodes that cost something: hub, ledger, nodes and gateway as they are, and not a millionth lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from test_gateway import PROMPT, expected
from test_serving import BODY, GENEROUS_S, a_gateway, a_long_stream, checkpoint, until

from shoal.house import RemoteLedger
from shoal.identity import KeyPair
from shoal.identity.accounts import AccountKey, address_text, create_account
from shoal.ledger.journal import verified
from shoal.protocol.ledgers import LedgerTicket
from shoal.purse.bills import FILE, Bill, Payments
from shoal.purse.escrow import NoMoney
from shoal.sdk.jobs import fund
from shoal.sdk.local import LocalShoal
from shoal.sdk.spending import Spending
from shoal.transport import TlsEndpoint
from shoal.world import SystemClock, SystemDice

__all__ = ["checkpoint"]
DEPOSIT = 10_000_000
CHEAP, DEAR = "36/h", "72/h"
"""Ten and twenty thousand millionths a second."""


@dataclass
class Town:
    folder: Path
    shoal: LocalShoal
    ticket: LedgerTicket
    ledger: RemoteLedger
    account: AccountKey
    accounts: dict[str, AccountKey]

    async def node(self, name: str, price: str, *more: str) -> None:
        account = self.accounts.setdefault(name, create_account(self.folder / "keys" / name))
        options = ["--threads", "1", "--price", price, "--ledger", str(self.ticket), "--account"]
        await self.shoal.start_node(name, options=[*options, address_text(account.address), *more])

    def spending(self, budget: int) -> Spending:
        return Spending(self.account, self.ticket, budget, notice_ms=30_000, audit_ms=0)

    async def redeemed(self) -> dict[str, int]:
        """What the ledger has paid out of all escrows, by node."""
        book = verified([line async for line in self.ledger.lines()], self.ticket.ledger)
        assert sum(book.balances.values()) == 0
        found = dict.fromkeys(self.accounts, 0)
        for escrow in book.escrows.values():
            for name, account in self.accounts.items():
                paid = escrow.paid.get(account.address)
                found[name] += paid.redeemed_micro if paid else 0
        return found


def in_town(tmp_path: Path, story: Callable[[Town], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with LocalShoal(tmp_path / "town") as shoal:
            await shoal.start_hub()
            started = await shoal.start_ledger(options=["--mint-max", "100"])
            ticket = LedgerTicket.parse(started.ready["ticket"])
            endpoint = TlsEndpoint(KeyPair.generate(), clock=SystemClock(), dice=SystemDice())
            account = create_account(tmp_path / "keys" / "account.key")
            try:
                ledger = RemoteLedger(endpoint, ticket, SystemClock())
                await ledger.mint(account.address, DEPOSIT)
                await story(Town(tmp_path, shoal, ticket, ledger, account, {}))
            finally:
                await endpoint.close()

    asyncio.run(asyncio.wait_for(whole(), 350))


def written(data: Path) -> Payments:
    return msgspec.json.decode((data / FILE).read_bytes(), type=Payments)


async def check_settled(town: Town, bill: Bill | None, before: dict[str, int] | None = None) -> dict[str, int]:
    """What the bill says is what the ledger has paid since; gives that by node."""
    assert bill is not None and bill.charged + bill.refunded == bill.quoted
    lines = {line.name: line.paid for line in bill.nodes}
    now = await town.redeemed()
    assert {name: micro - (before or {}).get(name, 0) for name, micro in now.items()} == dict.fromkeys(now, 0) | lines
    return lines


@pytest.mark.timeout(400)
def test_the_cheapest_plan_is_paid_for_what_it_serves_and_a_lost_node_is_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.sharding.planning.SLOW_RATIO", float("inf"))  # however busy the machine is meanwhile
    text, long = (expected(checkpoint, PROMPT * 3, tokens) for tokens in (40, 400))  # links do not wait for it

    async def story(town: Town) -> None:
        said: list[str] = []
        await asyncio.gather(town.node("amber", CHEAP), town.node("birch", DEAR), town.node("cedar", "3600/h"))
        async with a_gateway(town.shoal, checkpoint, said, data=tmp_path / "free") as (_, web):
            await until(lambda: any("3 more cost something; give it a --budget" in one for one in said))
            assert (await web.post("/v1/completions", json=BODY)).status_code == 503
        data = tmp_path / "gateway"
        with pytest.raises(NoMoney, match=r"sets 11.00 USD aside, and your account .* has 10.00"):
            async with a_gateway(town.shoal, checkpoint, said, data=data, spending=town.spending(11_000_000)):
                pass
        async with a_gateway(town.shoal, checkpoint, said, data=data, spending=town.spending(5_000_000)) as (
            server,
            web,
        ):
            service = server.service
            assert service is not None and service.paying is not None
            await until(lambda: service.rings)
            assert [ring.name for ring in service.rings] == ["amber"]
            assert any(one.startswith("Chosen for 36.00/h at most: amber.") for one in said)
            assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text
            await until(lambda: service.counts.receipts == 1 and written(data).spent_micro)
            (amber,) = written(data).terms[0].nodes.values()
            ring = service.rings[0]
            assert amber.voucher is not None
            metrics = (await web.get("/metrics")).text
            assert re.search(r"\nshoal_paid_micro [1-9]", metrics) and "shoal_budget_micro 5e+06" in metrics
            tokens = 40 + len(PROMPT * 3) / 16
            assert 0.3 < amber.paid_micro / (10 * tokens * ring.computing_ms) < 3, "about its price for the time"
            got, event = await a_long_stream(web, lambda: town.shoal.nodes["amber"].kill(), after=20)
            assert got == long
            assert event["choices"][0]["finish_reason"] and event["shoal"]["replicas"] == ["amber", "birch"]
        lines = await check_settled(town, service.paying.bill)
        assert lines["amber"] > amber.paid_micro and lines["birch"] > 0 and "cedar" not in lines
        reasons = {line.name: line.reason for line in service.paying.bill.nodes}  # type: ignore[union-attr]
        assert "link" in reasons["amber"] and reasons["birch"] == "worked", said
        await until_free(town, "birch")

    in_town(tmp_path, story)


async def until_free(town: Town, name: str) -> None:
    """A node that was given back is on offer again."""
    async with httpx.AsyncClient() as web:
        async with asyncio.timeout(20):
            while True:
                offers = (await web.get(f"{town.shoal.hubs[0].ready['http']}/v1/offers")).json()
                if any(one["name"] == name and not one["busy"] for one in offers["offers"]):
                    return
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def a_command(
    town: Town, checkpoint: Path, budget: str, *, stderr: int | None = None
) -> AsyncIterator[tuple[Any, str]]:
    """`shoal serve` as a process, and its URL."""
    (town.folder / "keys" / "account.ledger").write_text(str(town.ticket))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shoal", "serve", str(checkpoint), "--name", "small", "--http", "127.0.0.1:0", "--json",
        "--hub", town.shoal.hub_tickets[0], "--budget", budget,
        env={**os.environ, "SHOAL_HOME": str(town.folder / "keys")}, stdout=asyncio.subprocess.PIPE, stderr=stderr,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, json.loads(await process.stdout.readline())["url"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ask(url: str, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=GENEROUS_S) as web:
        while True:
            answer = await web.post(f"{url}/completions", json=BODY | body)
            if answer.status_code != 503:
                return answer
            await asyncio.sleep(0.1)


@pytest.mark.timeout(400)
def test_a_gateway_that_was_killed_closes_its_escrow_at_the_next_start(checkpoint: Path, tmp_path: Path) -> None:
    async def story(town: Town) -> None:
        await town.node("amber", CHEAP)
        data = tmp_path / "keys" / "serve" / "small"
        async with a_command(town, checkpoint, "5") as (process, url):
            assert (await ask(url)).status_code == 200
            await until(lambda: written(data).spent_micro)
            process.kill()
            await process.wait()
        (killed,) = written(data).terms
        assert not killed.closed and killed.charged_micro > 0
        async with a_command(town, checkpoint, "4") as (process, url):
            escrow = await town.ledger.escrow(killed.escrow)
            assert escrow is not None and escrow.closing and escrow.redeemed_micro == killed.charged_micro
            before = await town.redeemed()
            assert (await ask(url)).status_code == 200
            process.terminate()
            out, _ = await process.communicate()
            bill = msgspec.json.decode(out, type=dict[str, Bill])["bill"]
        assert bill.quoted == 4_000_000 and bill.charged > 0
        await check_settled(town, bill, before)

    in_town(tmp_path, story)


async def jobs(town: Town, *words: str) -> Any:
    """`shoal jobs` with --json, of whose account it is."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shoal", "jobs", *words, "--json",
        cwd=town.folder, env={**os.environ, "SHOAL_HOME": str(town.folder / "keys")}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    return json.loads(out)


@pytest.mark.timeout(400)
def test_what_an_endpoint_spends_is_shown_while_it_serves_and_comes_back_when_it_is_cancelled(
    checkpoint: Path, tmp_path: Path
) -> None:
    async def story(town: Town) -> None:
        await town.node("amber", CHEAP)
        data = tmp_path / "keys" / "serve" / "small"
        async with a_command(town, checkpoint, "0.50", stderr=asyncio.subprocess.PIPE) as (process, url):
            assert (await ask(url)).status_code == 200
            while written(data).spent_micro < 50_000:
                assert (await ask(url, max_tokens=200)).status_code == 200
            while b" of 0.50 USD spent  up to 36.00/h  " not in (line := await process.stderr.readline()):
                assert line, "it is said at the latest when a tenth is spent"
            assert float(line.split()[0]) >= 0.05
            (listed,) = (await jobs(town))["endpoints"]
            assert (listed["state"], listed["folder"], listed["budget_micro"]) == ("running", str(data), 500_000)
            assert 50_000 <= listed["spent_micro"] <= (shown := await jobs(town, "show", str(data)))["spent_micro"]
            assert [(one["name"], one["earned_micro"]) for one in shown["nodes"]] == [("amber", shown["spent_micro"])]
            assert await jobs(town, "cancel", str(data)) == {"stopped": process.pid, "closed": None}
            await check_settled(
                town, msgspec.json.decode((await process.communicate())[0], type=dict[str, Bill])["bill"]
            )
        assert (await jobs(town))["endpoints"][0]["state"] == "stopped"

        before = await town.redeemed()
        async with a_command(town, checkpoint, "4") as (process, url):
            assert (await ask(url)).status_code == 200
            await until(lambda: written(data).spent_micro)
            process.kill()
            await process.wait()
        listed = (await jobs(town))["endpoints"][0]
        assert listed["state"] == "died" and listed["open_micro"] == 4_000_000 - listed["spent_micro"]
        closed = (await jobs(town, "cancel", str(data)))["closed"]
        assert closed["micro"] == listed["open_micro"] and (await jobs(town, "show", str(data)))["open_micro"] == 0
        assert (await town.redeemed())["amber"] - before["amber"] == listed["spent_micro"]

    in_town(tmp_path, story)


@pytest.mark.timeout(400)
def test_money_that_is_used_up_ends_what_costs_something(checkpoint: Path, tmp_path: Path) -> None:
    async def story(town: Town) -> None:
        said: list[str] = []
        await town.node("amber", CHEAP)
        budget = 20_000  # two seconds
        async with a_gateway(town.shoal, checkpoint, said, data=tmp_path / "gw", spending=town.spending(budget)) as (
            server,
            web,
        ):
            service = server.service
            assert service is not None and service.paying is not None
            paying = service.paying
            await until(lambda: service.rings)
            many = [web.post("/v1/completions", json=BODY | {"max_tokens": 400}) for _ in range(12)]
            answers = [one.status_code for one in await asyncio.gather(*many)]
            assert 402 in answers and set(answers) <= {200, 402}
            last = await web.post("/v1/completions", json=BODY)
            assert last.status_code == 402 and last.json()["error"]["code"] == "insufficient_quota"
            assert "The budget of 0.02 USD is used up; add to it with `shoal jobs" in last.json()["error"]["message"]
            await until(lambda: not service.rings)
            made = await fund(tmp_path / "gw", 5_000_000, town.account, town.ledger, SystemClock())
            assert (made.budget_micro, made.left_micro) == (budget + 5_000_000, 5_000_000)
            await until(lambda: service.rings)
            assert (await web.post("/v1/completions", json=BODY)).status_code == 200
        lines = await check_settled(town, paying.bill)
        assert lines["amber"] > budget and paying.bill is not None and paying.bill.quoted == budget + 5_000_000

    in_town(tmp_path, story)


@pytest.mark.timeout(400)
def test_a_node_that_is_taken_back_is_replaced_while_it_serves_on(checkpoint: Path, tmp_path: Path) -> None:
    long = expected(checkpoint, PROMPT * 3, 400)

    async def story(town: Town) -> None:
        said: list[str] = []
        data = tmp_path / "gateway"
        await asyncio.gather(town.node("amber", CHEAP, "--notice", "60 s"), town.node("birch", DEAR))
        async with a_gateway(town.shoal, checkpoint, said, data=data, spending=town.spending(5_000_000)) as (
            server,
            web,
        ):
            service = server.service
            assert service is not None and service.paying is not None
            await until(lambda: [ring.name for ring in service.rings] == ["amber"])
            amber = town.shoal.nodes["amber"].process
            got, _ = await a_long_stream(web, amber.terminate)
            assert got == long
            while [ring.name for ring in service.rings] != ["birch"]:
                assert (await a_long_stream(web, lambda: None))[0] == long
            assert (service.counts.resumed, service.counts.failed, service.counts.refused) == (0, 0, 0)
            assert await amber.wait() == 0
            paid = next(one for one in written(data).terms[0].nodes.values() if one.name == "amber").paid_micro
            assert 0 < paid == (await town.redeemed())["amber"], "before it was gone"
        (notice,) = (one for one in said if "takes it back" in one)
        assert notice.startswith("amber: its owner takes it back in 60 s. It serves until then where it has to")
        assert not any("is lost" in one for one in said), said
        await check_settled(town, service.paying.bill)
        reasons = {line.name: line.reason for line in service.paying.bill.nodes}  # type: ignore[union-attr]
        assert reasons == {"amber": "its owner took it back", "birch": "worked"}

    in_town(tmp_path, story)


@pytest.mark.timeout(400)
def test_a_node_that_is_taken_back_serves_until_then_where_there_is_no_other(checkpoint: Path, tmp_path: Path) -> None:
    async def story(town: Town) -> None:
        said: list[str] = []
        data = tmp_path / "gateway"
        await town.node("amber", CHEAP, "--notice", "8 s")
        async with a_gateway(town.shoal, checkpoint, said, data=data, spending=town.spending(5_000_000)) as (
            server,
            web,
        ):
            service = server.service
            assert service is not None and service.paying is not None and server.placer is not None
            await until(lambda: service.rings)
            amber = town.shoal.nodes["amber"]
            amber.process.terminate()
            await until(lambda: any("takes it back" in one for one in said))
            began = SystemClock().monotonic()
            while service.rings:
                assert (await web.post("/v1/completions", json=BODY)).status_code in (200, 503)
            assert SystemClock().monotonic() - began > 5, "the notice less a quarter of it"
            assert service.counts.receipts > 1 and "amber is let go: the notice of its owner is over." in said
            assert await amber.process.wait() == 0
            paid = next(iter(written(data).terms[0].nodes.values())).paid_micro
            assert 0 < paid == (await town.redeemed())["amber"]
            assert server.placer.scout._presence_of(bytes.fromhex(amber.ready["node"])).losses == 0
            await town.node("birch", DEAR)
            await until(lambda: [ring.name for ring in service.rings] == ["birch"])
            assert (await web.post("/v1/completions", json=BODY)).status_code == 200
        await check_settled(town, service.paying.bill)
        reasons = {line.name: line.reason for line in service.paying.bill.nodes}  # type: ignore[union-attr]
        assert reasons == {"amber": "its owner took it back", "birch": "worked"}

    in_town(tmp_path, story)
