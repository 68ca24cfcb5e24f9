"""TLS 1.3 over any byte stream, with a certificate that is nothing but the node's key.

The server's certificate is self-signed with its Ed25519 node key. In TLS 1.3 the server signs the handshake with that
key (RFC 8446, section 4.4.3), so a client that finds the NodeId it dialled in the certificate talks to that node and
to nobody else. No authority, name or validity date is looked at: a clock an hour or a decade off changes nothing.
Who the *client* is, TLS does not say here; `handshake` adds that inside the channel.
"""

from __future__ import annotations

import datetime
import os
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from shoal.errors import LinkError
from shoal.identity import KeyPair
from shoal.transport.streams import ByteStream

_CERTIFICATE_MAX_BYTES = 16 * 1024
_RECORD_BYTES = 16 * 1024
"""RFC 8446, section 5.1: what one record holds."""


class HandshakeFailed(LinkError):
    """What answered, or called, does not speak this protocol, or broke off in the middle of the handshake."""

    code = "SH-311"


def server_context(key: KeyPair, shown: x509.Certificate) -> ssl.SSLContext:
    """A TLS 1.3 server context that shows a certificate and proves its `key`.

    The ssl module reads keys from files only, so the key stands for a moment in a file that only this user can open.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _only_tls_1_3(context)
    context.num_tickets = 0  # every link proves the key anew
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        path = Path(folder) / "node.pem"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.to_pem() + shown.public_bytes(serialization.Encoding.PEM))
        try:
            context.load_cert_chain(path)
        finally:
            path.unlink()
    return context


def client_context() -> ssl.SSLContext:
    """A TLS 1.3 client context. It trusts no certificate by itself: the caller compares the key that was proved."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _only_tls_1_3(context)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def certificate(key: KeyPair) -> x509.Certificate:
    """A self-signed certificate for a node key, valid at every time that X.509 can write."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shoal node")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.private_key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(1970, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))  # RFC 5280, section 4.1.2.5
        .sign(key.private_key, None)
    )


def _only_tls_1_3(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["shoal/1"])


class SecureStream:
    """A ByteStream inside a ByteStream: TLS 1.3 records pumped over `under`."""

    def __init__(self, under: ByteStream, context: ssl.SSLContext, *, server: bool) -> None:
        self._under = under
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)

    async def handshake(self) -> None:
        """Raises HandshakeFailed, or OSError when the stream below broke."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._under.read()
                if not data:
                    raise HandshakeFailed("the connection was closed during the TLS handshake") from None
                self._incoming.write(data)
            except ssl.SSLError as error:
                await self._flush()  # the alert tells the other side why
                raise HandshakeFailed(f"the TLS 1.3 handshake failed ({_reason(error)})") from error
            else:
                await self._flush()
                return

    def certificate(self) -> bytes:
        """The peer's certificate (DER) once the handshake is done. Raises HandshakeFailed when it showed none."""
        shown = self._tls.getpeercert(binary_form=True)
        if not shown or len(shown) > _CERTIFICATE_MAX_BYTES:
            raise HandshakeFailed("the peer showed no usable certificate")
        return shown

    async def read(self) -> bytes:
        while True:
            try:
                return self._tls.read(_RECORD_BYTES)  # empty when the peer ended the channel
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                raise ConnectionResetError(f"the encryption was broken ({_reason(error)})") from error
            data = await self._under.read()
            if not data:
                return b""
            self._incoming.write(data)

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        try:
            for part in parts:
                written = self._tls.write(part)
                if written < len(part):
                    rest = memoryview(part)
                    while written < len(rest):
                        written += self._tls.write(rest[written:])
        except ssl.SSLError as error:
            raise ConnectionResetError(f"the encryption was broken ({_reason(error)})") from error
        await self._flush()

    def expect(self, backlog_bytes: int) -> None:
        self._under.expect(backlog_bytes)

    def close(self) -> None:
        self._under.close()

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._under.write(self._outgoing.read())


def node_of_certificate(der: bytes) -> bytes:
    """The NodeId whose key a certificate shows. Raises HandshakeFailed when it is not an Ed25519 key."""
    try:
        public = x509.load_der_x509_certificate(der).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise HandshakeFailed("the peer's certificate cannot be read") from error
    if not isinstance(public, Ed25519PublicKey):
        raise HandshakeFailed("the peer's certificate does not hold an Ed25519 node key")
    return public.public_bytes_raw()


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
