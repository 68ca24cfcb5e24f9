"""Who a peer is: what the TLS link believes, and what it does not."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from transport_peers import (
    answering,
    connect,
    encrypted,
    key,
    node,
    own_certificate,
    play,
    read_to_end,
    self_of,
    server,
)

from shoal.identity import KeyPair
from shoal.transport import EndpointLimits, HandshakeFailed, TlsEndpoint, handshake, pipe
from shoal.transport.handshake import Greeting, HelloStream, NotAccepted, NotProved, Proof, Verdict, examine, introduce
from shoal.transport.secure import SecureStream, certificate, client_context, node_of_certificate, server_context
from shoal.transport.streams import ByteStream, SocketStream
from shoal.world import HeldClock, Request, SystemClock, SystemDice, Unreachable

VICTIM, MALICIOUS, CALLER = key(1), key(2), key(3)


# --- relaying and replaying a proof


async def _relay_a_proof() -> tuple[bool, TlsEndpoint]:
    """A malicious node is dialled, and uses its caller's proof at a victim. Whether the victim fell for it."""
    async with node(1) as (victim, victim_address):

        async def relay(stream: SocketStream) -> None:
            channel = HelloStream(await answering(stream, MALICIOUS))
            to_victim = HelloStream(await encrypted(victim_address))
            await channel.say(await to_victim.hear(Greeting))
            await to_victim.say(await channel.hear(Proof))
            verdict.set_result(await to_victim.hear(Verdict))
            await channel.say(Verdict(True))
            await asyncio.Event().wait()

        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        async with server(relay) as address:
            caller = TlsEndpoint(CALLER, clock=HeldClock())
            await caller.dial(MALICIOUS.node_id, [address])
            accepted = (await verdict).accepted
            assert accepted == (CALLER.node_id in victim.links())
            await caller.close()
        return accepted, victim


def test_a_proof_that_is_relayed_to_another_node_is_refused() -> None:
    async def scene() -> None:
        fell, _ = await _relay_a_proof()
        assert not fell

    play(scene)


def test_the_relayed_proof_is_refused_because_it_names_the_node_it_was_made_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same attack succeeds once the answering side is left out of what is signed: the test above can fail."""

    def without_answerer(answerer: bytes, shown: bytes, greeting: Greeting, proof: Proof) -> bytes:
        return whole(bytes(32), b"", greeting, proof)

    whole = handshake.proof_bytes
    monkeypatch.setattr(handshake, "proof_bytes", without_answerer)

    async def scene() -> None:
        fell, _ = await _relay_a_proof()
        assert fell

    play(scene)


def test_a_proof_is_good_once() -> None:
    async def scene() -> None:
        async with node(1) as (victim, address):
            channel = await encrypted(address)
            stream = HelloStream(channel)
            kept: list[Proof] = []

            class Keeping(HelloStream):
                async def say(self, message: Greeting | Proof | Verdict) -> None:
                    assert isinstance(message, Proof)
                    kept.append(message)
                    await super().say(message)

            stream = Keeping(channel)
            await introduce(stream, self_of(CALLER), VICTIM.node_id, channel.certificate(), 1, SystemDice())
            assert CALLER.node_id in victim.links()
            channel.close()
            await next(iter(victim.links().values())).wait_closed()
            again = HelloStream(await encrypted(address))
            await again.hear(Greeting)
            await again.say(kept[0])
            verdict = await again.hear(Verdict)
            assert not verdict.accepted and verdict.code == NotProved.code
            assert not victim.links()

    play(scene)


@pytest.mark.parametrize("field", ["node", "nonce", "instance", "attempt", "oldest", "newest", "signature"])
def test_every_field_of_a_proof_is_signed(field: str) -> None:
    async def scene() -> None:
        async with node(1) as (victim, address):

            class Altering(HelloStream):
                async def say(self, message: Greeting | Proof | Verdict) -> None:
                    old = getattr(message, field)
                    new = old + 1 if isinstance(old, int) else bytes([old[0] ^ 1]) + old[1:]
                    await super().say(msgspec.structs.replace(message, **{field: new}))

            channel = await encrypted(address)
            with pytest.raises(NotAccepted, match="did not prove that it is"):
                await introduce(
                    Altering(channel), self_of(CALLER), VICTIM.node_id, channel.certificate(), 1, SystemDice()
                )
            assert not victim.links()

    play(scene)


@pytest.mark.parametrize("field", ["nonce", "instance", "newest"])
def test_a_greeting_that_was_altered_on_the_way_ends_the_handshake(field: str) -> None:
    """Nobody can do this inside TLS; the proof would find it out all the same."""

    async def scene() -> None:
        class Altering(HelloStream):
            async def hear(self, kind: type) -> object:  # type: ignore[override]
                message = await super().hear(kind)
                if kind is not Greeting:
                    return message
                old = getattr(message, field)
                new = old + 1 if isinstance(old, int) else bytes([old[0] ^ 1]) + old[1:]
                return msgspec.structs.replace(message, **{field: new})

        near, far = pipe(HeldClock())
        shown = own_certificate(VICTIM)
        answer = asyncio.ensure_future(examine(HelloStream(far), self_of(VICTIM), shown, SystemDice()))
        ask = asyncio.ensure_future(
            introduce(Altering(near), self_of(CALLER), VICTIM.node_id, shown, 1, SystemDice())  # type: ignore[arg-type]
        )
        with pytest.raises(NotProved):
            await answer
        far.close()
        with pytest.raises(HandshakeFailed):
            await ask

    play(scene)


# --- who answers


def test_somebody_else_at_the_address_is_noticed_and_learns_nothing() -> None:
    async def scene() -> None:
        heard = asyncio.get_running_loop().create_future()

        async def somebody_else(stream: SocketStream) -> None:
            channel = await answering(stream, MALICIOUS)
            await HelloStream(channel).say(Greeting(bytes(32), bytes(16), 1, 1, "shoal"))
            heard.set_result(await read_to_end(channel))

        async with server(somebody_else) as address:
            caller = TlsEndpoint(CALLER, clock=HeldClock())
            with pytest.raises(Unreachable, match=f"{MALICIOUS.node_id.hex()[:8]} answered there"):
                await caller.dial(VICTIM.node_id, [address])
            assert await heard == b""
            await caller.close()

    play(scene)


def test_a_certificate_that_is_not_a_node_key_is_refused(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    shown = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(2100, 1, 1))
        .sign(private, hashes.SHA256())
    )
    path = tmp_path / "ec.pem"
    path.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + shown.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)

    async def scene() -> None:
        async def answer(stream: SocketStream) -> None:
            await SecureStream(stream, context, server=True).handshake()
            await asyncio.Event().wait()

        async with server(answer) as address:
            caller = TlsEndpoint(CALLER, clock=HeldClock())
            with pytest.raises(Unreachable, match="does not hold an Ed25519 node key"):
                await caller.dial(VICTIM.node_id, [address])
            await caller.close()

    play(scene)


# --- clocks


class _Off(SystemClock):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def now_ms(self) -> int:
        return super().now_ms() + round(self._seconds * 1000)

    def monotonic(self) -> float:
        return super().monotonic() + self._seconds


@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_an_hour_off_do_not_matter(hours: int) -> None:
    async def scene() -> None:
        async with node(1, clock=_Off(0)) as (hub, address), node(2, clock=_Off(hours * 3600)) as (other, _):
            link = await other.dial(hub.node_id, [address])
            assert await link.request("echo", b"on time") == b"on time"
            assert await hub.links()[other.node_id].request("echo", b"too") == b"too"

    play(scene)


@pytest.mark.parametrize(("first", "last"), [(1990, 1991), (2090, 2091)])
def test_no_clock_of_the_machine_is_asked_whether_a_certificate_is_valid(
    first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate of another century is what a node looks like whose machine's clock is far off."""

    def another_century(pair: KeyPair) -> x509.Certificate:
        name = x509.Name([])
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(pair.private_key.public_key())
            .serial_number(1)
            .not_valid_before(datetime.datetime(first, 1, 1))
            .not_valid_after(datetime.datetime(last, 1, 1))
            .sign(pair.private_key, None)
        )

    monkeypatch.setattr("shoal.transport.tls.certificate", another_century)

    async def scene() -> None:
        async with node(1) as (hub, address):
            caller = TlsEndpoint(CALLER, clock=HeldClock())
            link = await caller.dial(hub.node_id, [address])
            assert await link.request("echo", b"still me") == b"still me"
            await caller.close()

    play(scene)


# --- what is not a handshake


def test_garbage_instead_of_a_handshake_costs_that_connection_alone() -> None:
    async def scene() -> None:
        async with node(1) as (hub, address):
            for garbage in (
                b"GET / HTTP/1.1\r\n\r\n",
                bytes(5000),
                b"\x16\x03\x01\xff\xff" + bytes(70000),
                b"\xff" * 100,
            ):
                stream = await connect(address)
                try:
                    await stream.write(garbage)
                except OSError:
                    pass
                await read_to_end(stream)
            channel = await encrypted(address)
            await channel.write(b"\xff\xff" + bytes(70000))  # a hello longer than any
            await read_to_end(channel)
            channel = await encrypted(address)
            await channel.write((9).to_bytes(2, "big") + b"\xc1 garbage")
            await read_to_end(channel)
            caller = TlsEndpoint(CALLER, clock=HeldClock())
            assert await (await caller.dial(hub.node_id, [address])).request("echo", b"on") == b"on"
            await caller.close()

    play(scene)


def test_a_server_of_garbage_is_a_failed_dial() -> None:
    async def scene() -> None:
        async def http(stream: SocketStream) -> None:
            await stream.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        async def hang_up(stream: SocketStream) -> None:
            stream.close()

        async def hang_up_later(stream: SocketStream) -> None:
            channel = await answering(stream, VICTIM)
            await HelloStream(channel).say(Greeting(bytes(32), bytes(16), 1, 1, "shoal"))
            await channel.read()
            channel.close()

        caller = TlsEndpoint(CALLER, clock=HeldClock())
        for answer in (http, hang_up, hang_up_later):
            async with server(answer) as address:
                with pytest.raises(Unreachable, match=address):
                    await caller.dial(VICTIM.node_id, [address])
        assert not caller.links()
        await caller.close()

    play(scene)


def test_older_tls_is_refused_on_both_sides() -> None:
    def old(context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ALL:@SECLEVEL=0")
        return context

    async def scene() -> None:
        async with node(1) as (hub, address):
            channel = SecureStream(await connect(address), old(client_context()), server=False)
            with pytest.raises((HandshakeFailed, OSError)):
                await channel.handshake()
            assert not hub.links()

        async def answer(stream: SocketStream) -> None:
            context = old(server_context(VICTIM, certificate(VICTIM)))
            with pytest.raises(HandshakeFailed):
                await SecureStream(stream, context, server=True).handshake()
            refused.set()

        refused = asyncio.Event()
        async with server(answer) as address:
            caller = TlsEndpoint(CALLER, clock=HeldClock())
            with pytest.raises(Unreachable, match="TLS 1.3 handshake failed"):
                await caller.dial(VICTIM.node_id, [address])
            await refused.wait()
            await caller.close()
        # the same two sides agree when both may speak 1.3
        near, far = pipe(HeldClock())
        one = SecureStream(near, client_context(), server=False)
        other = SecureStream(far, server_context(VICTIM, certificate(VICTIM)), server=True)
        await asyncio.gather(one.handshake(), other.handshake())

    play(scene)


def test_a_caller_that_stalls_in_the_handshake_is_dropped_at_the_deadline() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with node(1, clock=clock) as (hub, address):
            silent = await connect(address)
            halfway = await encrypted(address)
            while len(hub._handshakes) < 2:
                await asyncio.sleep(0)
            for _ in range(30):
                await asyncio.sleep(0)
            await clock.advance(10.1)
            assert await read_to_end(silent) == b""
            await read_to_end(halfway)
            assert not hub._handshakes

    play(scene)


def test_a_handler_is_told_from_which_address_a_request_came() -> None:
    async def scene() -> None:
        async with node(1) as (hub, address), node(2) as (caller, _):

            async def whence(request: Request) -> bytes:
                return request.source.encode()

            hub.handle("whence", whence)
            assert await (await caller.dial(hub.node_id, [address])).request("whence", b"") == b"127.0.0.1"

    play(scene)


def test_a_process_takes_as_many_files_as_it_may_and_no_more_links_than_they_carry() -> None:
    code = """if True:
        import resource, shoal.transport as t
        from shoal.identity import KeyPair
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 400))
        async def main():
            limits = t.TlsEndpoint(KeyPair.generate())._limits
            print(resource.getrlimit(resource.RLIMIT_NOFILE), limits.links, limits.handshakes)
        t.run(main())
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("\n")[0] == "(400, 400) 200 50"


def test_callers_that_hold_every_place_do_not_keep_an_honest_one_out() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with node(1, clock=clock, limits=EndpointLimits(handshakes=4)) as (hub, address):
            stalling = [await connect(address) for _ in range(4)]
            while len(hub._handshakes) < 4:
                await asyncio.sleep(0)
            await clock.advance(1)
            stalling += [await connect(address) for _ in range(8)]
            await asyncio.gather(*(read_to_end(stream) for stream in (*stalling[:4], *stalling[8:])))
            await clock.advance(1)
            caller = TlsEndpoint(CALLER, clock=HeldClock())
            link = await caller.dial(hub.node_id, [address])
            assert await link.request("echo", b"in") == b"in"
            assert len(hub._handshakes) <= 4
            await caller.close()

    play(scene)


def test_a_flood_of_callers_ends_no_handshake_on_a_long_path() -> None:
    async def scene() -> None:
        clock = HeldClock()
        async with node(1, clock=clock, limits=EndpointLimits(handshakes=4)) as (hub, address):
            slow = await connect(address)
            while not hub._handshakes:
                await asyncio.sleep(0)
            flood = [await connect(address) for _ in range(23)]
            await asyncio.gather(*(read_to_end(stream) for stream in flood[3:19]))
            await clock.advance(0.9)
            secure = SecureStream(slow, client_context(), server=False)
            await secure.handshake()
            assert node_of_certificate(secure.certificate()) == hub.node_id

    play(scene)


# --- over any byte stream


class _Chopped:
    """A byte stream that hands everything over in small pieces."""

    def __init__(self, under: ByteStream, size: int) -> None:
        self._under = under
        self._size = size
        self._rest = b""

    async def read(self) -> bytes:
        if not self._rest:
            self._rest = await self._under.read()
        piece, self._rest = self._rest[: self._size], self._rest[self._size :]
        return piece

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        await self._under.write(*parts)

    def expect(self, backlog_bytes: int) -> None:
        self._under.expect(backlog_bytes)

    def close(self) -> None:
        self._under.close()


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
def test_links_run_over_any_byte_stream(piece: int) -> None:
    async def scene() -> None:
        clock = HeldClock()
        hub, caller = TlsEndpoint(VICTIM, clock=clock), TlsEndpoint(CALLER, clock=clock)

        async def echo(request: object) -> bytes:
            return request.body  # type: ignore[attr-defined, no-any-return]

        hub.handle("echo", echo)
        caller.handle("echo", echo)
        near, far = pipe(clock, capacity_bytes=10_000)
        link, back = await asyncio.gather(
            caller.dial_over(_Chopped(near, piece), VICTIM.node_id), hub.accept_over(_Chopped(far, piece))
        )
        body = bytes(range(256)) * 300
        assert await link.request("echo", body, reply_max_bytes=len(body)) == body
        assert await back.request("echo", b"back") == b"back"
        assert caller.links() == {VICTIM.node_id: link} and hub.links() == {CALLER.node_id: back}
        await caller.close()
        await back.wait_closed()
        await hub.close()

    play(scene)


def test_what_travels_under_a_link_is_encrypted() -> None:
    async def scene() -> None:
        clock = HeldClock()
        hub, caller = TlsEndpoint(VICTIM, clock=clock), TlsEndpoint(CALLER, clock=clock)
        seen = bytearray()

        class Tapped(_Chopped):
            async def write(self, *parts: bytes | bytearray | memoryview) -> None:
                for part in parts:
                    seen.extend(part)
                await super().write(*parts)

        async def answer(request: object) -> bytes:
            return b"the answer is 42" * 10

        hub.handle("question", answer)
        near, far = pipe(clock)
        link, _ = await asyncio.gather(
            caller.dial_over(Tapped(near, 1 << 20), VICTIM.node_id), hub.accept_over(Tapped(far, 1 << 20))
        )
        await link.request("question", b"what is the answer")
        assert len(seen) > 1000
        for secret in (b"the answer", b"question", CALLER.node_id):
            assert secret not in seen
        await caller.close()
        await hub.close()

    play(scene)


def test_bytes_altered_under_a_link_end_it() -> None:
    async def scene() -> None:
        clock = HeldClock()
        hub, caller = TlsEndpoint(VICTIM, clock=clock), TlsEndpoint(CALLER, clock=clock)

        class Flipping(_Chopped):
            flip = False

            async def read(self) -> bytes:
                data = await super().read()
                return data[:-1] + bytes([data[-1] ^ 1]) if self.flip and data else data

        near, far = pipe(clock)
        flipping = Flipping(near, 1 << 20)
        link, back = await asyncio.gather(caller.dial_over(flipping, VICTIM.node_id), hub.accept_over(far))
        flipping.flip = True
        with pytest.raises(Exception, match="went down"):
            await link.request("echo", b"")
        assert "encryption was broken" in await link.wait_closed()
        await back.wait_closed()
        await caller.close()
        await hub.close()

    play(scene)


# --- the key


def test_the_key_is_on_disk_for_a_moment_only_and_for_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modes: list[tuple[int, int]] = []

    load = ssl.SSLContext.load_cert_chain

    def watched(context: ssl.SSLContext, path: Path) -> None:
        modes.append((path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777))
        load(context, path)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watched)
    server_context(VICTIM, certificate(VICTIM))
    assert modes == [(0o600, 0o700)]
    assert list(tmp_path.iterdir()) == []


def test_a_proof_has_a_domain_of_its_own() -> None:
    greeting = Greeting(bytes(32), bytes(16), 1, 1, "shoal")
    proof = Proof(CALLER.node_id, bytes(32), bytes(16), 1, 1, 1, bytes(64))
    signed = handshake.proof_bytes(VICTIM.node_id, b"certificate", greeting, proof)
    assert signed.startswith(b"shoal/link-proof/1\x00") and not signed.startswith(b"shoal/envelope/1\x00")
