"""The driver's lines to its members: Turns go out in order, and a link that breaks is taken up again or given up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.driver.gang import LinkedNode, link_to
from shoal.driver.lanes import NodeLane
from shoal.errors import BadRecord, LinkError
from shoal.identity import Envelope
from shoal.protocol.messages import Message, encode
from shoal.protocol.training import JobEnd, Member, Turn
from shoal.world import Clock, Endpoint, Link, Refused
from shoal.world.directory import Directory

_log = logging.getLogger(__name__)

TURNS_MAX = 64
"""Turns that may wait for a slow member; when there are more the oldest goes, and the member asks for what it
misses."""
TURN_DEADLINE_S = 30.0
LOST_AFTER_S = 3.0
"""A member whose link cannot be taken up again within this time has left."""
RETRY_S = 0.3
END_DEADLINE_S = 5.0


class NotOfThisJob(BadRecord):
    """Somebody who is no member of the job, or not any more, wants something of its driver."""

    code = "SH-262"


@dataclass
class MemberLine:
    """One member as its driver sees it."""

    node: LinkedNode
    member_id: bytes
    record: Member
    envelope: Envelope
    lane: NodeLane
    ready: bool = False
    bytes_sent: int = 0
    bytes_received: int = 0
    samples_per_s: float = 0.0
    unanswered: int = 0
    """Its Contributions that the driver has not looked at yet."""
    turns: asyncio.Queue[Turn] = field(default_factory=lambda: asyncio.Queue(TURNS_MAX))
    sender: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.record.name

    def send(self, turn: Turn) -> None:
        """Queue a Turn; they arrive in this order."""
        if self.turns.full():
            self.turns.get_nowait()
        self.turns.put_nowait(turn)


class MemberLines:
    """All lines, and the tasks that carry them."""

    def __init__(
        self, endpoint: Endpoint, directory: Directory, clock: Clock, on_lost: Callable[[MemberLine, str], None]
    ) -> None:
        self._endpoint = endpoint
        self._directory = directory
        self._clock = clock
        self._on_lost = on_lost
        self.by_member: dict[bytes, MemberLine] = {}

    def add(self, line: MemberLine) -> None:
        self.by_member[line.member_id] = line
        line.sender = asyncio.create_task(self._carry(line))

    def of_node(self, node: bytes) -> MemberLine | None:
        return next((line for line in self.by_member.values() if line.node.node == node), None)

    def remove(self, member_id: bytes) -> MemberLine | None:
        line = self.by_member.pop(member_id, None)
        if line is not None and line.sender is not None and line.sender is not asyncio.current_task():
            line.sender.cancel()
        return line

    async def tell_end(self, job: bytes, line: MemberLine, reason: str) -> None:
        """Tell a member that the job is over for it; when it cannot be told it will find out."""
        with contextlib.suppress(LinkError, BadRecord, TimeoutError):
            async with asyncio.timeout(END_DEADLINE_S):
                await self._request(line, JobEnd.KIND, JobEnd(job=job, reason=reason[:400]), END_DEADLINE_S)

    async def close(self) -> None:
        tasks = [line.sender for line in self.by_member.values() if line.sender is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.by_member.clear()

    async def link(self, line: MemberLine) -> Link:
        """The open link to a member's node, or a new one: dialled, or opened by the node when a hub tells it to.
        Raises LinkError."""
        node = line.node
        return (
            await link_to(node.node, node.offer, endpoint=self._endpoint, directory=self._directory, clock=self._clock)
        ).link

    async def _request(self, line: MemberLine, kind: str, message: Message, deadline_s: float) -> bytes:
        link = await self.link(line)
        return await link.request(kind, encode(message, link.version), deadline_s=deadline_s)

    async def _carry(self, line: MemberLine) -> None:
        """Send turns one after another; watch the link in between. A node that comes back over a new link may have
        been started anew: an empty Turn finds out whether it still is this member."""
        known: Link = line.node.link
        while True:
            link = await self._hold(line)
            if link is None:
                return
            if link is not known and not await self._send(line, Turn(job=line.record.job)):
                return
            known = link
            turn = asyncio.create_task(line.turns.get())
            lost = asyncio.create_task(link.wait_closed())
            try:
                await asyncio.wait({turn, lost}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                lost.cancel()
                if not turn.done():
                    turn.cancel()
            if turn.done() and not turn.cancelled() and not await self._send(line, turn.result()):
                return

    async def _send(self, line: MemberLine, turn: Turn) -> bool:
        while True:
            try:
                await self._request(line, Turn.KIND, turn, TURN_DEADLINE_S)
                return True
            except Refused as error:
                self._on_lost(line, f"it refused a turn: {error}")
                return False
            except LinkError:
                if await self._hold(line) is None:
                    return False

    async def _hold(self, line: MemberLine) -> Link | None:
        """The member's link; when it cannot be had for LOST_AFTER_S, the member is given up."""
        until = self._clock.monotonic() + LOST_AFTER_S
        while True:
            try:
                return await self.link(line)
            except LinkError as error:
                if self._clock.monotonic() >= until:
                    _log.info("%s is given up: %s", line.name, error)
                    self._on_lost(line, f"it stopped answering and could not be reached again for {LOST_AFTER_S:.0f} s")
                    return None
            await self._clock.sleep(RETRY_S)
