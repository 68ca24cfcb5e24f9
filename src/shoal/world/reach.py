"""Getting a link to a node that made an offer, and how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from shoal.errors import LinkError, ShoalError
from shoal.identity import short_id
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import Done, Offer, OfferFind
from shoal.protocol.serving import LinkEcho, LinkProbe, LinksProbed
from shoal.world.clock import Clock
from shoal.world.directory import Directory
from shoal.world.network import Endpoint, Link, Request

CALL_BACK_S = 8.0
"""How long a node that accepts no links is waited for after a hub was asked to have it dial."""
ECHOES = 3


async def reach(
    node: bytes, offer: Offer, *, endpoint: Endpoint, directory: Directory, clock: Clock, dial_deadline_s: float
) -> Link:
    """A link to the node that made an offer: the open one, a dialled one, or, where it cannot be dialled, one that the
    node opens itself after a hub told it to. Raises LinkError."""
    open_link = endpoint.links().get(node)
    if open_link is not None and not open_link.closed:
        return open_link
    if offer.addresses:
        try:
            return await endpoint.dial(node, offer.addresses, deadline_s=dial_deadline_s)
        except LinkError:
            if not endpoint.addresses:
                raise
    if not endpoint.addresses:
        raise LinkError(f"Node {offer.name} accepts no links and this driver does not either; use --listen.")
    await directory.introduce(node, endpoint.addresses)
    until = clock.monotonic() + CALL_BACK_S
    while clock.monotonic() < until:
        open_link = endpoint.links().get(node)
        if open_link is not None and not open_link.closed:
            return open_link
        await clock.sleep(0.05)
    raise LinkError(f"Node {offer.name} ({short_id(node)}) was asked to call back and did not.")


async def reach_again(
    node: bytes,
    addresses: Sequence[str],
    *,
    endpoint: Endpoint,
    directory: Directory,
    clock: Clock,
    dial_deadline_s: float,
) -> Link:
    """A link to a node that is known: the open one, one by its newest offer, or by where it was before. Raises
    LinkError."""
    open_link = endpoint.links().get(node)
    if open_link is not None and not open_link.closed:
        return open_link
    with contextlib.suppress(LinkError):
        for one in await directory.find(OfferFind(node=node, limit=1)):
            return await reach(
                node, one.offer, endpoint=endpoint, directory=directory, clock=clock, dial_deadline_s=dial_deadline_s
            )
    return await endpoint.dial(node, addresses, deadline_s=dial_deadline_s)


async def reach_and_time(
    node: bytes, offer: Offer, *, endpoint: Endpoint, directory: Directory, clock: Clock, deadline_s: float
) -> tuple[Link, float]:
    """A link to the node that made an offer, and its round trip in milliseconds. Raises ShoalError."""
    link = await reach(
        node, offer, endpoint=endpoint, directory=directory, clock=clock, dial_deadline_s=deadline_s
    )  # fmt: skip
    return link, await echo_ms(link, clock, deadline_s)


async def echo(request: Request) -> bytes:
    """The answer to a LinkEcho: whoever asks takes the time of it."""
    decode(LinkEcho, request.body, request.version)
    return encode(Done(), request.version)


async def echo_ms(link: Link, clock: Clock, deadline_s: float) -> float:
    """The shortest round trip of a few small requests. Raises LinkError."""
    times = []
    for _ in range(ECHOES):
        began = clock.monotonic()
        await link.request(LinkEcho.KIND, encode(LinkEcho(), link.version), deadline_s=deadline_s)
        times.append((clock.monotonic() - began) * 1000)
    return min(times)


async def probe(link: Link, peers: Sequence[BlobHolder], deadline_s: float) -> list[float | None]:
    """How far a node has measured these to be from itself, in milliseconds; None for whom it did not reach, and for all
    where it does not answer."""
    try:
        body = encode(LinkProbe(nodes=tuple(peers)), link.version)
        reply = await link.request(LinkProbe.KIND, body, deadline_s=deadline_s)
        times = list(decode(LinksProbed, reply, link.version).round_trip_ms)
    except ShoalError:
        times = []
    return [times[at] if at < len(times) else None for at in range(len(peers))]
