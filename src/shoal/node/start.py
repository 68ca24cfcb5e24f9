"""A node from its settings: key, blobs, links, hubs and agent, put together and started."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.engines import warm
from shoal.errors import BadInput
from shoal.house import RemoteLedger
from shoal.hub import HubClient
from shoal.identity import load_or_create_key
from shoal.node.agent import NodeAgent, NodeSettings, Sale
from shoal.node.dishonest import dishonest_member
from shoal.node.hosted_job import HostSettings
from shoal.node.member import EngineSettings, MemberRun
from shoal.node.openai_server import ServerSettings
from shoal.node.stopping import PID_FILE
from shoal.protocol.hubs import HubTicket
from shoal.protocol.ledgers import PaidAt
from shoal.protocol.offers import Place
from shoal.protocol.prices import Price
from shoal.quantities import format_bytes, format_flops
from shoal.storage import BlobStore
from shoal.storage.faults import disk_faults
from shoal.transport import TlsEndpoint
from shoal.world import Clock, Dice, DirectoryDisk, Endpoint


class CannotSell(BadInput):
    """A node has a price and nowhere to be paid."""

    code = "SH-164"


@dataclass
class RunningNode:
    """A started agent."""

    agent: NodeAgent
    endpoint: TlsEndpoint

    async def close(self) -> None:
        await self.agent.close()

    def ready(self) -> dict[str, Any]:
        """What a node says when it is up."""
        capability = self.agent.capability
        assert capability is not None
        devices = []
        for device in capability.devices:
            rates = ", ".join(f"{rate.dtype} {format_flops(rate.flops)}" for rate in device.throughput)
            devices.append(f"{device.kind}: {device.name}, {format_bytes(device.memory_bytes)}, {rates}")
        return {
            "ready": "node",
            "name": self.agent.settings.name,
            "node": self.endpoint.node_id.hex(),
            "addresses": list(self.endpoint.addresses),
            "devices": devices,
            "speed_limit": capability.speed_limit,
            "engine": self.agent.engine,
            "hubs": self.agent.hubs_up,
        }


async def start_node(
    folder: Path,
    hubs: Sequence[HubTicket],
    *,
    name: str | None,
    max_speed: float,
    threads: int,
    device: str,
    processes: int,
    listen: str | None,
    storage_bytes: int,
    memory_bytes: int | None = None,
    dishonest: str,
    price: Price | None = None,
    paid: PaidAt | None = None,
    reclaim_notice_ms: int = 0,
    serve_free: bool = False,
    driving: HostSettings | None = None,
    place: Place | None = None,
    server: ServerSettings | None = None,
    clock: Clock,
    dice: Dice,
) -> RunningNode:
    """Start a node on `folder`. Raises ShoalError for what cannot work: a bad key file, a folder in use, an address
    that is taken. That no hub is up is no error: the node is offered as soon as one is."""
    folder.mkdir(parents=True, exist_ok=True)
    key = load_or_create_key(folder / "node.key")
    store = BlobStore(folder / "blobs", storage_bytes, clock)
    with disk_faults(DirectoryDisk(folder), "noting which process runs the node"):
        (folder / PID_FILE).write_text(str(os.getpid()))
    endpoint = TlsEndpoint(key, clock=clock, dice=dice)
    client = HubClient(endpoint, hubs, clock=clock, dice=dice)
    settings = NodeSettings(
        name=_name(name or socket.gethostname()),
        folder=folder,
        engine=EngineSettings(device=device, threads=threads, processes=processes, speed_limit=max_speed),
        listen=listen,
        memory_bytes=memory_bytes,
        sale=_sale(price, paid, reclaim_notice_ms, endpoint, clock, serve_free),
        place=place,
        server=server,
        driving=driving if server is None or not server.alone else None,
    )
    agent = NodeAgent(
        settings,
        key=key,
        endpoint=endpoint,
        hubs=client,
        store=store,
        clock=clock,
        dice=dice,
        make_member=dishonest_member(dishonest) if dishonest else MemberRun,
    )
    running = RunningNode(agent, endpoint)
    try:
        await agent.start()
    except BaseException:
        await agent.close()
        raise
    if server is None or not server.alone:
        warm()  # after measuring, which it would disturb
    return running


def _sale(
    price: Price | None,
    paid: PaidAt | None,
    reclaim_notice_ms: int,
    endpoint: Endpoint,
    clock: Clock,
    serves_free: bool,
) -> Sale | None:
    """Raises CannotSell."""
    if price is None or not price.micro_per_h:
        return None
    if paid is None:
        raise CannotSell(
            "A node with a price has to be paid somewhere: make an account with `shoal account create --ledger "
            "TICKET`, or name both with --account and --ledger."
        )
    if paid.ledger.currency != price.currency:
        raise CannotSell(
            f"The price is in {price.currency}, and the ledger at which this node is paid keeps {paid.ledger.currency}."
        )
    return Sale(price, RemoteLedger(endpoint, paid.ledger, clock), paid.account, reclaim_notice_ms, serves_free)


def _name(text: str) -> str:
    """A host's name as a node's name: other characters become dashes."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")[:48] or "node"
