"""A whole hub: its files, its links over TLS, its HTTP face, and what is left of it after `kill -9`."""

import asyncio
import base64
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from hub_world import PATIENCE_S, HubProcess, Watcher, a_client, a_key, an_offer

from shoal.errors import ShoalError
from shoal.hub import NoHub
from shoal.hub.server import BadHubSetting, DataInUse, HubPlaces, HubServer, HubSettings
from shoal.hub.store import HubStoreFailed
from shoal.hub.web import READ_BURST
from shoal.identity import BadKeyFile, Envelope, KeyPair
from shoal.protocol.hubs import BadTicket, HubTicket
from shoal.protocol.messages import encode, open_record
from shoal.protocol.offers import Offer, OfferFind, OfferPublish
from shoal.transport import TlsEndpoint
from shoal.transport.http import BadHttpPlace, HttpFailed
from shoal.world import Clock, Endpoint, HeldClock, LinkLost, SystemClock, Unreachable

HERON, STORK = a_key(1), a_key(2)


def endpoint_of(key: KeyPair) -> Endpoint:
    return TlsEndpoint(key)


def with_hub(
    data: Path, scene: Callable[[HubPlaces, httpx.AsyncClient], Awaitable[None]], clock: Clock | None = None
) -> None:
    async def on_stage() -> None:
        hub = HubServer(HubSettings(data), endpoint_of, clock or SystemClock())
        places = await hub.start()
        assert places.http is not None
        try:
            async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(base_url=places.http) as web:
                await scene(places, web)
        finally:
            await hub.stop()
            await hub.stop()

    asyncio.run(on_stage())


async def publish(ticket: HubTicket, key: KeyPair, offer: Envelope) -> None:
    node = endpoint_of(key)
    try:
        async with a_client(node, [ticket]) as client:
            await client.publish(offer)
    finally:
        await node.close()


# ---- HTTP ----


def test_offers_are_read_over_http_with_their_proof(tmp_path: Path) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        offer = an_offer(HERON, 7)
        await publish(places.ticket, HERON, offer)
        page = (await web.get("/v1/offers")).json()
        assert (page["more"], page["next"]) == (False, None)
        (view,) = page["offers"]
        assert (view["node_id"], view["sequence"], view["name"]) == (HERON.node_id.hex(), 7, "heron")
        assert view["expires_ms"] - view["arrived_ms"] == 60_000
        assert view["capability"]["devices"][0]["throughput"] == [{"dtype": "float32", "flops": 1e11}]
        envelope = Envelope.from_bytes(base64.b64decode(view["envelope"]), Offer.MAX_BYTES)
        assert envelope == offer
        assert open_record(envelope, Offer).sequence == 7
        assert (await web.get(f"/v1/offers/{HERON.node_id.hex()}")).json() == view

    with_hub(tmp_path, scene)


@pytest.mark.parametrize(
    "said", [b"", b"GET /healthz HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"]
)
def test_a_connection_on_which_nobody_asks_gives_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("shoal.transport.http.HEADER_MS_MAX", 50)

    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        assert places.http is not None
        host, port = places.http.removeprefix("http://").rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        try:
            await reader.read()
        except ConnectionError:
            pass
        writer.close()
        assert (await web.get("/healthz")).status_code == 200

    with_hub(tmp_path, scene)


def test_http_knows_the_same_filters_as_a_link(tmp_path: Path) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        await publish(places.ticket, HERON, an_offer(HERON, 1))
        await publish(places.ticket, STORK, an_offer(STORK, 1, name="stork", busy=True))

        async def names(**filters: str | int | float) -> set[str]:
            answer = await web.get("/v1/offers", params=filters)
            assert answer.status_code == 200, answer.text
            return {offer["name"] for offer in answer.json()["offers"]}

        assert await names() == {"heron", "stork"}
        assert await names(idle_only="true") == {"heron"}
        assert await names(name="stork") == {"stork"}
        assert await names(node=HERON.node_id.hex()) == {"heron"}
        assert await names(accepts="serve") == set()
        assert await names(device="cpu", memory_bytes_min=8 << 30, flops_min=1e11) == {"heron", "stork"}
        assert await names(flops_min=1.1e11) == set()
        first = (await web.get("/v1/offers", params={"limit": 1})).json()
        assert first["more"]
        second = (await web.get("/v1/offers", params={"limit": 1, "after": first["next"]})).json()
        assert not second["more"]
        assert {first["offers"][0]["name"], second["offers"][0]["name"]} == {"heron", "stork"}

    with_hub(tmp_path, scene)


@pytest.mark.parametrize(
    ("path", "status", "code", "words"),
    [
        ("/v1/offers?limit=0", 400, "SH-113", "limit"),
        ("/v1/offers?limit=257", 400, "SH-113", "256"),
        ("/v1/offers?limit=many", 400, "SH-113", "limit"),
        ("/v1/offers?memory_min=5", 400, "SH-113", "'memory_min' is no filter"),
        ("/v1/offers?memory_bytes_min=-1", 400, "SH-113", "memory_bytes_min"),
        ("/v1/offers?flops_min=nan", 400, "SH-113", "flops_min"),
        ("/v1/offers?name=-rm", 400, "SH-113", "name"),
        ("/v1/offers?node=xyz", 400, "SH-100", "NodeId"),
        ("/v1/offers/xyz", 400, "SH-100", "NodeId"),
        (f"/v1/offers/{STORK.node_id.hex()}", 404, "SH-336", "no live offer"),
        ("/v1/nothing", 404, "SH-000", "Not Found"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(tmp_path: Path, path: str, status: int, code: str, words: str) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        answer = await web.get(path)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert words in answer.json()["sentence"]

    with_hub(tmp_path, scene)


def test_http_only_reads(tmp_path: Path) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert (await web.request(method, "/v1/offers", content=b"x")).status_code == 405

    with_hub(tmp_path, scene)


def test_one_reader_cannot_flood(tmp_path: Path) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        statuses = {(await web.get("/v1/hub")).status_code for _ in range(2 * READ_BURST)}
        assert statuses == {200, 429}

    with_hub(tmp_path, scene, HeldClock())  # however slow the machine is, no time passes


def test_the_api_describes_itself_without_the_internet(tmp_path: Path) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        document = (await web.get("/schema/openapi.json")).json()
        assert document["openapi"].startswith("3.")
        assert set(document["paths"]) == {"/v1/offers", "/v1/offers/{node_id}", "/v1/hub", "/healthz"}
        parameters = {one["name"] for one in document["paths"]["/v1/offers"]["get"]["parameters"]}
        assert parameters == {*OfferFind.__struct_fields__}
        page = (await web.get("/schema")).text
        assert "/v1/offers" in page
        assert "memory_bytes_min" in page
        assert "://" not in page
        about = (await web.get("/v1/hub")).json()
        assert about["node_id"] == places.ticket.node.hex()
        assert about["addresses"] == list(places.ticket.addresses)
        assert (await web.get("/healthz")).json() == {"status": "ok", "offers": 0}

    with_hub(tmp_path, scene)


# ---- starting and stopping ----


def test_a_hub_keeps_its_identity_and_its_offers_over_a_restart(tmp_path: Path) -> None:
    tickets = []

    async def first(places: HubPlaces, web: httpx.AsyncClient) -> None:
        tickets.append(places.ticket)
        await publish(places.ticket, HERON, an_offer(HERON, 7))

    async def second(places: HubPlaces, web: httpx.AsyncClient) -> None:
        assert places.ticket.node == tickets[0].node
        assert (await web.get("/healthz")).json()["offers"] == 1

    with_hub(tmp_path, first)
    with_hub(tmp_path, second)
    assert (tmp_path / "hub.key").stat().st_mode & 0o077 == 0


def test_a_second_hub_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        with pytest.raises(DataInUse, match="Another hub"):
            await HubServer(HubSettings(tmp_path), endpoint_of, SystemClock()).start()
        assert (await web.get("/healthz")).status_code == 200

    with_hub(tmp_path, scene)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"name": "my hub"}, BadHubSetting, "'my hub' cannot name a hub"),
        ({"http": "127.0.0.1"}, BadHttpPlace, "host:port"),
        ({"http": "127.0.0.1:99999"}, BadHttpPlace, "host:port"),
        ({"http": "no.such.host.invalid:0"}, HttpFailed, "no.such.host.invalid"),
        ({"listen": "http://127.0.0.1:0"}, ShoalError, "tcp://host:port"),
    ],
)
def test_a_place_that_cannot_be_is_refused_and_nothing_stays_open(
    tmp_path: Path, changes: dict[str, str], error: type[ShoalError], words: str
) -> None:
    async def scene() -> None:
        with pytest.raises(error, match=words):
            await HubServer(HubSettings(tmp_path, **changes), endpoint_of, SystemClock()).start()  # type: ignore[arg-type]
        hub = HubServer(HubSettings(tmp_path), endpoint_of, SystemClock())
        await hub.start()
        await hub.stop()

    asyncio.run(scene())


def test_a_port_that_others_serve_is_refused(tmp_path: Path) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        assert places.http is not None
        taken = places.http.removeprefix("http://")
        with pytest.raises(HttpFailed, match="in use"):
            await HubServer(HubSettings(tmp_path / "other", http=taken), endpoint_of, SystemClock()).start()
        with pytest.raises(ShoalError, match="in use"):
            listen = places.ticket.addresses[0]
            await HubServer(HubSettings(tmp_path / "other", listen=listen), endpoint_of, SystemClock()).start()

    with_hub(tmp_path, scene)


def test_files_that_are_damaged_stop_the_start_with_their_names(tmp_path: Path) -> None:
    async def start() -> None:
        await HubServer(HubSettings(tmp_path), endpoint_of, SystemClock()).start()

    (tmp_path / "hub.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(HubStoreFailed, match=r"hub\.sqlite"):
        asyncio.run(start())
    (tmp_path / "hub.key").chmod(0o644)
    with pytest.raises(BadKeyFile, match=r"hub\.key"):
        asyncio.run(start())


def test_a_public_address_stands_in_the_ticket(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = HubSettings(tmp_path, listen="tcp://0.0.0.0:0", http=None, public=("tcp://hub.example:7300",))
        hub = HubServer(settings, endpoint_of, SystemClock())
        places = await hub.start()
        assert str(places.ticket) == f"shoal://{places.ticket.node.hex()}@hub.example:7300"
        assert places.http is None
        await hub.stop()

    asyncio.run(scene())


def test_a_second_node_with_the_same_key_is_told_and_the_first_goes_on(tmp_path: Path) -> None:
    async def scene(places: HubPlaces, web: httpx.AsyncClient) -> None:
        first, second = endpoint_of(HERON), endpoint_of(HERON)
        async with a_client(first, [places.ticket]) as node, a_client(second, [places.ticket]) as twin:
            await node.publish(an_offer(HERON, 1))
            with pytest.raises(NoHub, match="key"):
                await twin.publish(an_offer(HERON, 2, name="twin"))
            await node.publish(an_offer(HERON, 3))
            (found,) = await node.find(OfferFind())
            assert (found.offer.name, found.offer.sequence) == ("heron", 3)
        await first.close()
        await second.close()

    with_hub(tmp_path, scene)


# ---- kill -9 ----


def test_whatever_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    """Publishes without pause, kills the hub in the midst of it, and looks for what was acknowledged, several times."""

    async def life(acknowledged: dict[bytes, int], acknowledgements: int) -> None:
        hub = await HubProcess.start(tmp_path)
        keys = [a_key(number) for number in range(1, 9)]
        enough = asyncio.Event()
        endpoints = [endpoint_of(key) for key in keys]
        begun = sum(acknowledged.values())

        async def publish_on(key: KeyPair, endpoint: Endpoint) -> None:
            try:
                link = await endpoint.dial(hub.ticket.node, hub.ticket.addresses)
                while True:
                    sequence = acknowledged.get(key.node_id, 0) + 1
                    body = encode(OfferPublish(offer=an_offer(key, sequence).to_bytes()))
                    await link.request(OfferPublish.KIND, body)
                    acknowledged[key.node_id] = sequence
                    if sum(acknowledged.values()) - begun >= acknowledgements:
                        enough.set()
            except (LinkLost, Unreachable):
                pass

        publishing = [asyncio.create_task(publish_on(*pair)) for pair in zip(keys, endpoints, strict=True)]
        await enough.wait()
        await hub.kill()
        await asyncio.gather(*publishing)
        for endpoint in endpoints:
            await endpoint.close()

    async def scene() -> None:
        acknowledged: dict[bytes, int] = {}
        async with asyncio.timeout(4 * PATIENCE_S):
            for acknowledgements in (5, 23, 61):
                await life(acknowledged, acknowledgements)
                hub = await HubProcess.start(tmp_path)
                seeker = endpoint_of(a_key(200))
                async with a_client(seeker, [hub.ticket]) as client:
                    held = {found.node: found.offer.sequence for found in await client.find(OfferFind())}
                await seeker.close()
                await hub.stop()
                lost = {node.hex(): n for node, n in acknowledged.items() if held.get(node, 0) < n}
                assert not lost
                acknowledged |= {node: max(n, acknowledged.get(node, 0)) for node, n in held.items()}

    asyncio.run(scene())


def test_a_node_finds_its_killed_hub_again_by_itself(tmp_path: Path) -> None:
    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            listen = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        hub = await HubProcess.start(tmp_path, listen)
        node, watcher = endpoint_of(HERON), Watcher()
        async with (
            asyncio.timeout(2 * PATIENCE_S),
            a_client(node, [hub.ticket], SystemClock(), watcher) as client,
        ):
            await client.publish(an_offer(HERON, 1))
            await hub.kill()
            await watcher.until(1, up=False)
            again = await HubProcess.start(tmp_path, listen)
            assert again.ticket == hub.ticket
            await watcher.until(2, up=True)
            assert [found.node for found in await client.find(OfferFind())] == [HERON.node_id]
            await again.stop()
        await node.close()

    asyncio.run(scene())


# ---- tickets ----


def test_a_ticket_reads_as_it_is_written() -> None:
    for text in (f"shoal://{'ab' * 32}@host:1", f"shoal://{'0c' * 32}@[::1]:7300,10.0.0.1:65535"):
        assert str(HubTicket.parse(text)) == text
    ticket = HubTicket.parse(f" shoal://{'ab' * 32}@hub.example.org:7300/\n")
    assert ticket == HubTicket(b"\xab" * 32, ("tcp://hub.example.org:7300",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not begin"),
        ("http://hub:1", "does not begin"),
        (f"shoal://{'ab' * 32}", "no '@'"),
        ("shoal://abc@host:1", "'abc' is not a NodeId"),
        (f"shoal://{'ab' * 32}@host", "host:port"),
        (f"shoal://{'ab' * 32}@host:0", "port between"),
        (f"shoal://{'ab' * 32}@host:65536", "port between"),
        (f"shoal://{'ab' * 32}@ho st:1", "host:port"),
        (f"shoal://{'ab' * 32}@", "host:port"),
        (f"shoal://{'ab' * 32}@" + ",".join("h:1" for _ in range(9)), "at most 8"),
        ("shoal://" + "a" * 5000, "too long"),
    ],
)
def test_what_is_not_a_ticket_is_refused_with_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(BadTicket, match=words) as refusal:
        HubTicket.parse(text)
    assert len(str(refusal.value)) < 500
