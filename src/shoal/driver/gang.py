"""Finding nodes for a job, and linking to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec

from shoal.errors import JobError, LinkError
from shoal.identity import short_id
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.offers import Offer, OfferFind
from shoal.world import Clock, Endpoint, Link
from shoal.world.directory import Directory, FoundOffer

LOOK_EVERY_S = 1.0
DIAL_DEADLINE_S = 8.0
FORMER_MAX = 16
"""Former nodes that the hubs are asked about at a time."""
CALL_BACK_S = 8.0
"""How long a node that accepts no links is waited for after a hub was asked to have it dial."""


class TooFewNodes(JobError):
    """Not as many nodes as the job needs were there in time."""

    code = "SH-630"


@dataclass(frozen=True)
class LinkedNode:
    """A node that this driver has a link to, and what it offered."""

    node: bytes
    offer: Offer
    link: Link

    @property
    def name(self) -> str:
        return self.offer.name

    @property
    def holder(self) -> BlobHolder:
        return BlobHolder(self.node, self.offer.addresses)


async def link_to(node: bytes, offer: Offer, *, endpoint: Endpoint, directory: Directory, clock: Clock) -> LinkedNode:
    """A link to the node that made an offer: dialled, or, where it cannot be, opened by the node itself after a hub
    told it to. Raises LinkError."""
    open_link = endpoint.links().get(node)
    if open_link is not None and not open_link.closed:
        return LinkedNode(node, offer, open_link)
    if offer.addresses:
        try:
            link = await endpoint.dial(node, offer.addresses, deadline_s=DIAL_DEADLINE_S)
            return LinkedNode(node, offer, link)
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
            return LinkedNode(node, offer, open_link)
        await clock.sleep(0.05)
    raise LinkError(f"Node {offer.name} ({short_id(node)}) was asked to call back and did not.")


async def find_gang(
    wanted: OfferFind,
    *,
    nodes_min: int,
    nodes_max: int,
    wait_s: float,
    advice: str,
    endpoint: Endpoint,
    directory: Directory,
    clock: Clock,
    without: Collection[bytes] = (),
    former: Collection[bytes] = (),
    say: Callable[[str], None] = lambda _: None,
) -> list[LinkedNode]:
    """Nodes that fit and answer: at least `nodes_min`, at most `nodes_max`, the fastest first.

    `former` are nodes that worked for this job under a driver that is gone: they may seem busy with it, and are asked
    for all the same. Waits up to `wait_s` for enough of them. Raises TooFewNodes, saying what was there and why it
    does not do, or giving `advice`.
    """
    until = clock.monotonic() + wait_s
    linked: dict[bytes, LinkedNode] = {}
    troubles: dict[bytes, str] = {}
    told = False
    while True:
        found = [one for one in await find_fitting(directory, wanted, former) if one.node not in without]
        fresh = [
            one
            for one in sorted(found, key=lambda one: fastest_float32(one.offer), reverse=True)
            if one.node not in linked
        ]
        fresh = fresh[: max(0, nodes_max - len(linked))]
        answers = await asyncio.gather(
            *(link_to(one.node, one.offer, endpoint=endpoint, directory=directory, clock=clock) for one in fresh),
            return_exceptions=True,
        )
        for one, answer in zip(fresh, answers, strict=True):
            if isinstance(answer, LinkedNode):
                linked[one.node] = answer
                troubles.pop(one.node, None)
            elif isinstance(answer, LinkError):
                troubles[one.node] = f"{one.offer.name}: {answer}"
            elif isinstance(answer, BaseException):
                raise answer
        linked = {node: one for node, one in linked.items() if not one.link.closed}
        if len(linked) >= nodes_min:
            return sorted(linked.values(), key=lambda one: one.node)
        if clock.monotonic() >= until:
            break
        if not told:
            say(f"{len(linked)} of {nodes_min} nodes are there; waiting up to {wait_s:.0f} s for more.")
            told = True
        await clock.sleep(LOOK_EVERY_S)
    seen = f"{len(found)} fitting and idle offers at the hubs, {len(linked)} of them answered"
    hint = " ".join(troubles.values()) or advice
    needed = "1 node" if nodes_min == 1 else f"{nodes_min} nodes"
    raise TooFewNodes(f"The job needs {needed}; {seen} within {wait_s:.0f} s. {hint}")


async def find_fitting(directory: Directory, wanted: OfferFind, former: Collection[bytes] = ()) -> list[FoundOffer]:
    """Offers that fit, and those of `former` nodes that are busy and fit otherwise. Raises LinkError."""
    found = {one.node: one for one in await directory.find(wanted)}
    for node in [node for node in former if node not in found][:FORMER_MAX]:
        with contextlib.suppress(LinkError):  # the hub has heard enough questions for now
            found |= {one.node: one for one in await _offers_of(directory, wanted, node)}
    return list(found.values())


async def _offers_of(directory: Directory, wanted: OfferFind, node: bytes) -> list[FoundOffer]:
    """What one node offers, busy or not, if it fits otherwise. Raises LinkError."""
    return list(await directory.find(msgspec.structs.replace(wanted, node=node, idle_only=False)))


async def link_to_former(
    former: Sequence[bytes], wanted: OfferFind, *, endpoint: Endpoint, directory: Directory, clock: Clock
) -> None:
    """Links to the newest of the nodes that worked for this job before, as far as a hub knows them and they answer."""

    async def link(node: bytes) -> None:
        with contextlib.suppress(LinkError):
            for one in await _offers_of(directory, wanted, node):
                await link_to(one.node, one.offer, endpoint=endpoint, directory=directory, clock=clock)

    await asyncio.gather(*(link(node) for node in former[-FORMER_MAX:]))


def fastest_float32(offer: Offer) -> float:
    """FLOP/s of an offer's fastest device in float32, the arithmetic that every job can use."""
    return max(
        (rate.flops for device in offer.capability.devices for rate in device.throughput if rate.dtype == "float32"),
        default=0.0,
    )
