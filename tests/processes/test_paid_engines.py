"""Engines beside nodes that cost something: counted by node and gateway alike, paid, and for nobody who does not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hub_world import a_key
from money_world import Street, run
from msgspec import structs
from test_engines import Standin, checkpoint, standin
from test_gateway import PROMPT, expected
from test_paid_serving import CHEAP, DEAR, Town, check_settled, in_town, written
from test_sales import Client, voucher
from test_serving import BODY, a_gateway, a_long_stream, until

from shoal.gateway.engines import EngineReplica
from shoal.identity import Envelope
from shoal.market.earnings import Serving, served_parts, token_us
from shoal.node.engine import EngineHost
from shoal.node.openai_server import ServerSettings
from shoal.protocol.engines import EngineAsk, EngineEnd, EngineSession, PieceReader
from shoal.protocol.messages import decode, encode, open_record
from shoal.protocol.serving import RequestReceipt, StageForgotten
from shoal.world import Refused

__all__ = ["checkpoint", "standin"]
RING, TOKENS = bytes(16), 30
SECOND = 100
"""What one costs at a shop, in millionths."""


class Asking:
    """A client of a shop that has an engine, whose tokens take a second each."""

    def __init__(self, street: Street, standin: Standin, folder: Path, manner: str) -> None:
        self.street, self.standin, self.folder, self.manner = street, standin, folder, manner
        self.client = Client(street, kind="serve")
        self.number = 0

    async def begin(self) -> None:
        async def changed() -> None:
            pass

        self.shop = shop = await self.street.shop(1, self.folder)
        self.host = EngineHost(
            ServerSettings(self.standin.at(self.manner)), key=a_key(1), name="shop-1", endpoint=shop.endpoint,
            clock=self.street.clock, changed=changed, service_for=shop.sales.service_for,
        )  # fmt: skip
        await self.host.start()
        assert self.host.offer is not None
        self.host.offer = structs.replace(self.host.offer, token_ms=1000.0)
        self.link = await self.street.linker(self.client.endpoint)(shop.node, shop.offer)

    async def take(self) -> bytes:
        held = await self.client.quotes.hold(self.shop.node, self.shop.offer)
        escrow = await self.client.escrow(self.shop)
        await self.client.quotes.take(held, escrow)
        return escrow

    async def ask(self, after_first: float = 0.0) -> int:
        """How many pieces came; the clock goes on by so much after the first."""
        self.number += 1
        session = EngineSession(job=bytes(32), ring=RING, session=self.number, layers=4, positions=2)
        prompt = {"text": "AB"} if self.manner == "text" else {"tokens": (65, 66)}
        body = encode(EngineAsk(model="small", tokens_max=TOKENS, session=session, **prompt))  # type: ignore[arg-type]
        reader, came = PieceReader(self.link.version), 0
        async with self.link.stream(EngineAsk.KIND, body, max_bytes=1 << 20) as parts:
            async for part in parts:
                for piece in reader.feed(part):
                    came += piece.counts(self.manner == "ids")
                if after_first:
                    await self.street.clock.advance(after_first)
                    after_first = 0.0
        return came

    async def end(self, generated: int) -> RequestReceipt:
        end = EngineEnd(ring=RING, session=self.number, generated=generated)
        told = decode(StageForgotten, await self.link.request(end.KIND, encode(end)))
        return open_record(Envelope.from_bytes(told.receipt, RequestReceipt.MAX_BYTES), RequestReceipt)

    def earned(self) -> int:
        return self.shop.sales.service_for(self.client.key.node_id).earned_micro()


@pytest.mark.parametrize("manner", ["ids", "text"])
def test_what_arrived_is_earned(standin: Standin, tmp_path: Path, manner: str) -> None:
    async def story(street: Street) -> None:
        asking = Asking(street, standin, tmp_path, manner)
        await asking.begin()
        with pytest.raises(Refused, match="keeps no slot to serve in for .* that there is money for") as refused:
            await asking.ask()
        assert refused.value.remote_code == "SH-607"
        await asking.take()
        assert await asking.ask() > 10
        assert (await asking.end(10)).generated_tokens == 10, "a client that leaves has not got what is on its way"
        await street.clock.advance(5.0)
        assert asking.earned() == 5 * SECOND, "never more than the time"
        await street.clock.advance(55.0)
        assert asking.earned() == 10 * SECOND + SECOND // 16, "ten tokens, and a position of the prompt besides"
        came = await asking.ask()
        assert (await asking.end(1000)).generated_tokens == came > 10
        assert asking.earned() == (10 + came) * SECOND + 2 * SECOND // 16
        await asking.host.close()

    run(story)


def test_who_does_not_pay_is_served_no_more(standin: Standin, tmp_path: Path) -> None:
    async def story(street: Street) -> None:
        asking = Asking(street, standin, tmp_path, "ids")
        await asking.begin()
        escrow, node = await asking.take(), asking.shop.node
        for _ in range(3):
            assert await asking.ask() == TOKENS
        await street.clock.advance(63.0)
        assert await asking.ask() == TOKENS, "a minute and a twentieth may be unpaid"
        await street.clock.advance(1.0)
        with pytest.raises(Refused, match=r"its vouchers are for 0.00, and it has earned 0.0064 by serving") as refused:
            await asking.ask()
        assert refused.value.remote_code == "SH-607"
        paid = voucher(escrow, asking.shop, 64 * SECOND)
        await asking.client.quotes.pay(node, paid, last=False, deadline_s=5.0)
        for _ in range(3):
            assert await asking.ask() == TOKENS
        with pytest.raises(Refused, match=r"serves for this gateway no longer: its vouchers are for 0.0064"):
            await asking.ask(after_first=70.0)
        await asking.host.close()

    run(story)


@pytest.mark.timeout(400)
def test_the_cheapest_engine_is_paid_by_what_came_and_replaced_when_it_is_taken_back(
    checkpoint: Path, standin: Standin, tmp_path: Path
) -> None:
    text = expected(checkpoint, PROMPT * 3, 40)

    async def story(town: Town) -> None:
        said: list[str] = []
        data, engine = tmp_path / "gateway", ("--engine", standin.at("ids"), "--engine-only")
        await asyncio.gather(town.node("amber", CHEAP, *engine), town.node("birch", DEAR, *engine))
        async with a_gateway(town.shoal, checkpoint, said, engines_only=True) as (_, web):
            dear = "Engines of this model that cost something: 2; give it a --budget to have them."
            await until(lambda: dear in said)
            assert (await web.post("/v1/completions", json=BODY)).status_code == 503
        spending = town.spending(5_000_000)
        async with a_gateway(town.shoal, checkpoint, said, engines_only=True, data=data, spending=spending) as (
            server,
            web,
        ):
            service = server.service
            assert service is not None and service.paying is not None
            await until(lambda: service.rings)
            assert "Chosen for 36.00/h at most: amber (engine)." in said
            (amber,) = service.rings
            assert isinstance(amber, EngineReplica) and amber.name == "amber (engine)"
            assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text
            parts = served_parts(40, len(PROMPT * 3) + 39)
            worth = Serving().served(parts, token_us(1, amber.engine.token_ms, 0.0))
            micro = worth.earned_micro(36_000_000, 3_600_000, 5_000_000)
            await until(lambda: service.counts.receipts and written(data).spent_micro >= micro)
            assert written(data).spent_micro == micro
            town.shoal.nodes["amber"].process.terminate()
            while [one.name for one in service.rings] != ["birch (engine)"]:
                assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text
            assert await town.shoal.nodes["amber"].process.wait() == 0
            paid = next(one for one in written(data).terms[0].nodes.values() if one.name == "amber").paid_micro
            assert micro <= paid == (await town.redeemed())["amber"], "before it was gone"
            assert (await web.post("/v1/completions", json=BODY)).json()["choices"][0]["text"] == text
            assert (service.counts.resumed, service.counts.failed, service.counts.receipts_missing) == (0, 0, 0)
        lines = await check_settled(town, service.paying.bill)
        reasons = {line.name: line.reason for line in service.paying.bill.nodes}  # type: ignore[union-attr]
        assert reasons == {"amber": "its owner took it back", "birch": "worked"} and lines["birch"] > 0

    in_town(tmp_path, story)


@pytest.mark.timeout(400)
def test_an_engine_is_taken_where_no_layers_are_to_be_had_and_the_other_way_round(
    checkpoint: Path, tmp_path: Path
) -> None:
    long = expected(checkpoint, PROMPT * 3, 400)
    server = Standin(checkpoint, tmp_path / "log")

    async def story(town: Town) -> None:
        said: list[str] = []
        engine = ("--engine", server.at("ids"), "--engine-only")
        await asyncio.gather(town.node("amber", CHEAP), town.node("birch", DEAR, *engine))
        data, spending = tmp_path / "gateway", town.spending(5_000_000)
        async with a_gateway(town.shoal, checkpoint, said, data=data, spending=spending) as (one, web):
            service = one.service
            assert service is not None and service.paying is not None
            await until(lambda: service.rings)
            assert [ring.name for ring in service.rings] == ["amber"], said
            got, event = await a_long_stream(web, town.shoal.nodes["amber"].kill, after=20)
            assert got == long and event["shoal"]["replicas"] == ["amber", "birch (engine)"]
            await town.node("cedar", CHEAP)
            assert one.placer is not None
            cedar = bytes.fromhex(town.shoal.nodes["cedar"].ready["node"])
            await until(lambda: one.placer and one.placer.scout.link(cedar))
            assert (await web.post("/v1/completions", json=BODY)).json()["shoal"]["replicas"] == ["birch (engine)"]
            assert {node.name for node in written(data).terms[0].nodes.values()} == {"amber", "birch"}
            server.kill()
            await until(lambda: [ring.name for ring in service.rings] == ["cedar"])
            assert (await web.post("/v1/completions", json=BODY)).json()["shoal"]["replicas"] == ["cedar"]
        lines = await check_settled(town, service.paying.bill)
        assert min(lines[name] for name in ("amber", "birch", "cedar")) > 0
        reasons = {line.name: line.reason for line in service.paying.bill.nodes}  # type: ignore[union-attr]
        assert "link" in reasons["amber"] and "does not offer it any more" in reasons["birch"]
        assert reasons["cedar"] == "worked"

    try:
        in_town(tmp_path, story)
    finally:
        server.close()


@pytest.mark.timeout(400)
def test_money_that_is_used_up_ends_what_an_engine_serves(checkpoint: Path, standin: Standin, tmp_path: Path) -> None:
    async def story(town: Town) -> None:
        said: list[str] = []
        await town.node("amber", CHEAP, "--engine", standin.at("ids"), "--engine-only")
        budget = 20_000  # two seconds
        spending, data = town.spending(budget), tmp_path / "gateway"
        async with a_gateway(town.shoal, checkpoint, said, engines_only=True, data=data, spending=spending) as (
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
            await until(lambda: paying.closing and not service.rings)
            assert (await web.post("/v1/completions", json=BODY)).status_code == 402
        assert await check_settled(town, paying.bill) == {"amber": budget}

    in_town(tmp_path, story)
