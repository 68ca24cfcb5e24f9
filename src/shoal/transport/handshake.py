"""Who the dialling side is, and which protocol version both speak: three messages at the start of a link.

Before these, the channel has proved the answering side's NodeId (see `secure`). Then, inside the channel:

    answerer -> dialler   Greeting   fresh nonce, instance, versions, network
    dialler  -> answerer  Proof      NodeId, fresh nonce, instance, attempt, versions, signature
    answerer -> dialler   Verdict    accepted, or a code and a sentence

**Why a proof cannot be relayed.** The signature covers the answerer's NodeId and certificate as the dialler's own TLS
saw them. A malicious answerer M that is dialled by D can pass on V's greeting and get D's signature over V's nonce, but
that signature names M, because M had to prove M's key for D to speak at all; V checks it against its own NodeId and
refuses. And to get a signature that names V, M would have to prove V's key to D. The nonce of the answerer makes every
proof good once; its own domain string keeps it apart from every other signature made with a node key. Nothing here
reads a clock.

An *instance* is a number drawn when an endpoint is made: it tells a node that came back from another machine that was
given the same key. The *attempt* is a number that grows with a dialler's attempts, and is above those of the
connections that are there, so that both sides agree which of two to keep.
The form of these messages never changes; a new one would get a new ALPN name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from shoal.errors import LinkError
from shoal.identity import KeyPair, NodeId, blake3_hash, short_id
from shoal.identity.keys import verify
from shoal.protocol.messages import VersionMismatch, common_version
from shoal.transport.frames import clip, printable
from shoal.transport.secure import HandshakeFailed
from shoal.transport.streams import ByteStream
from shoal.world import Dice

_DOMAIN = b"shoal/link-proof/1\x00"
ATTEMPT_MAX = (1 << 62) - 1
HELLO_MAX_BYTES = 1024
"""No message of the handshake is larger."""

Versions = tuple[int, int]
"""The oldest and the newest protocol version that a side speaks."""
_Version = Annotated[int, Meta(ge=1, le=65535)]
_Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Instance = Annotated[bytes, Meta(min_length=16, max_length=16)]


class WrongNode(LinkError):
    """Who answered at an address is not the node that was dialled."""

    code = "SH-312"


class NotProved(LinkError):
    """Who dialled did not prove the NodeId it claims."""

    code = "SH-313"


class NotAccepted(LinkError):
    """The answering node was reached and declined the link; the sentence is its own."""

    code = "SH-314"


class Greeting(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    nonce: _Nonce
    instance: _Instance
    oldest: _Version
    newest: _Version
    network: Annotated[str, Meta(min_length=1, max_length=32)]


class Proof(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    node: NodeId
    nonce: _Nonce
    instance: _Instance
    attempt: Annotated[int, Meta(ge=0, le=ATTEMPT_MAX)]
    oldest: _Version
    newest: _Version
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class Verdict(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    accepted: bool
    code: Annotated[str, Meta(max_length=16)] = ""
    sentence: Annotated[str, Meta(max_length=600)] = ""


@dataclass(frozen=True)
class Agreed:
    """What the handshake established about a peer."""

    peer: bytes
    version: int
    instance: bytes
    attempt: int
    dialled: bool
    """Whether this side dialled."""


@dataclass(frozen=True)
class Self:
    """What a side says about itself in every handshake."""

    key: KeyPair
    instance: bytes
    versions: Versions
    network: str


H = TypeVar("H", Greeting, Proof, Verdict)


class HelloStream:
    """A ByteStream on which handshake messages travel, each after its length (2 bytes); then it is the plain stream."""

    def __init__(self, under: ByteStream) -> None:
        self._under = under
        self._ahead = bytearray()

    async def say(self, message: Greeting | Proof | Verdict) -> None:
        body = msgspec.msgpack.encode(message)
        await self._under.write(len(body).to_bytes(2, "big") + body)

    async def hear(self, kind: type[H]) -> H:
        """Raises HandshakeFailed for anything that is not a `kind`, OSError when the stream broke."""
        size = int.from_bytes(await self._exactly(2), "big")
        if size > HELLO_MAX_BYTES:
            raise HandshakeFailed(f"the peer's {kind.__name__.lower()} is {size} bytes long")
        body = await self._exactly(size)
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HandshakeFailed(f"the peer's {kind.__name__.lower()} is malformed") from error

    async def _exactly(self, size: int) -> bytes:
        while len(self._ahead) < size:
            data = await self._under.read()
            if not data:
                raise HandshakeFailed("the connection was closed during the handshake")
            self._ahead += data
        taken = bytes(self._ahead[:size])
        del self._ahead[:size]
        return taken

    def over(self) -> ByteStream:
        """The stream for what follows the handshake."""
        return self if self._ahead else self._under

    async def read(self) -> bytes:
        if self._ahead:
            taken = bytes(self._ahead)
            self._ahead.clear()
            return taken
        return await self._under.read()

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        await self._under.write(*parts)

    def expect(self, backlog_bytes: int) -> None:
        self._under.expect(backlog_bytes)

    def close(self) -> None:
        self._under.close()


def proof_bytes(answerer: bytes, certificate: bytes, greeting: Greeting, proof: Proof) -> bytes:
    """What a proof's signature covers: everything both sides said, and to whom."""
    network = greeting.network.encode()
    return b"".join(
        (
            _DOMAIN,
            answerer,
            blake3_hash(certificate),
            greeting.nonce,
            greeting.instance,
            greeting.oldest.to_bytes(2, "big"),
            greeting.newest.to_bytes(2, "big"),
            bytes((len(network),)),
            network,
            proof.node,
            proof.nonce,
            proof.instance,
            proof.attempt.to_bytes(8, "big"),
            proof.oldest.to_bytes(2, "big"),
            proof.newest.to_bytes(2, "big"),
        )
    )


async def introduce(
    stream: HelloStream, me: Self, answerer: bytes, certificate: bytes, attempt: int, dice: Dice
) -> Agreed:
    """The dialling side. `answerer` and `certificate` are what the channel has proved.

    Raises HandshakeFailed, NotAccepted, VersionMismatch, OSError.
    """
    greeting = await stream.hear(Greeting)
    if greeting.network != me.network:
        raise NotAccepted(f"it belongs to the network {greeting.network!r}, this node to {me.network!r}")
    version = _common(me.versions, (greeting.oldest, greeting.newest))
    proof = Proof(me.key.node_id, dice.bytes(32), me.instance, attempt, *me.versions, signature=bytes(64))
    signature = me.key.sign(proof_bytes(answerer, certificate, greeting, proof))
    await stream.say(msgspec.structs.replace(proof, signature=signature))
    verdict = await stream.hear(Verdict)
    if not verdict.accepted:
        code, sentence = printable(verdict.code.encode()), printable(verdict.sentence.encode())
        raise NotAccepted(f"it declined: {sentence or 'no reason given'} [{code}]")
    return Agreed(answerer, version, greeting.instance, attempt, dialled=True)


async def examine(stream: HelloStream, me: Self, certificate: bytes, dice: Dice) -> Agreed:
    """The answering side, up to the verdict: `accept` or `decline` must follow.

    Raises HandshakeFailed, NotProved, VersionMismatch, OSError.
    """
    greeting = Greeting(dice.bytes(32), me.instance, *me.versions, me.network)
    await stream.say(greeting)
    proof = await stream.hear(Proof)
    if not verify(proof.node, proof.signature, proof_bytes(me.key.node_id, certificate, greeting, proof)):
        raise NotProved(f"the dialling side did not prove that it is {short_id(proof.node)}")
    version = _common(me.versions, (proof.oldest, proof.newest))
    return Agreed(proof.node, version, proof.instance, proof.attempt, dialled=False)


async def accept(stream: HelloStream) -> None:
    await stream.say(Verdict(True))


async def decline(stream: HelloStream, code: str, sentence: str) -> None:
    await stream.say(Verdict(False, code, clip(sentence).decode()))


def _common(ours: Versions, theirs: Versions) -> int:
    if theirs[0] > theirs[1]:
        raise VersionMismatch(f"The peer says that it speaks protocol {theirs[0]} to {theirs[1]}, which is no range.")
    return common_version(ours, theirs)
