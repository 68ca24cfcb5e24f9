"""A market under load: many clients that buy from nodes that sell, over TLS, through hubs and a ledger of their own
processes; and whether a place was sold twice, or money lost. For the tests, and for benchmarks/market.py.

python hammer_world.py sellers|clients PLAN NUMBER     one process of several, as `hammered` starts them

A client looks for offers at one of the hubs, holds a gang, sets money aside, has it taken, pays, gives the places back
and asks for the rest, and begins anew. One in seven times it does what it should not: it is gone before it sets money
aside, has a gang taken twice at once, brings old vouchers and forged ones, or gives places back late. Some are gone for
good with a place that they have paid for once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
from hub_world import an_offer

from shoal.errors import LinkError, ShoalError
from shoal.house import RemoteLedger
from shoal.hub import HubClient
from shoal.identity import Envelope, KeyPair, blake3_hash
from shoal.identity.accounts import AccountKey, address_text
from shoal.ledger.book import Book, UnknownEscrow
from shoal.ledger.commands import Close, Open, Redeem
from shoal.ledger.escrows import EscrowOver, OldVoucher, State
from shoal.ledger.journal import verified
from shoal.ledger.moves import DoneAlready, account
from shoal.node.agent import NodeAgent, NodeSettings, Sale
from shoal.protocol.holds import Hold, quote_id, sold_twice
from shoal.protocol.hubs import HubTicket
from shoal.protocol.ledgers import LedgerTicket
from shoal.protocol.messages import open_record
from shoal.protocol.money import Closing, EscrowTerms, Payee, SignedVoucher, Voucher, sign_voucher
from shoal.protocol.offers import Capability, Offer, OfferFind
from shoal.protocol.prices import Price
from shoal.sdk.local import LocalShoal
from shoal.storage import BlobStore
from shoal.transport import TlsEndpoint, run
from shoal.transport.endpoint import parse_address
from shoal.transport.streams import SocketStream
from shoal.world import Address, Link, Refused, SystemClock, SystemDice
from shoal.world.directory import FoundOffer
from shoal.world.quotes import Held, NotSecured, Quotes
from shoal.world.reach import reach

SLOTS = (1, 4, 16, 32)
"""Of the nodes, in turn."""
GANG_MAX = 4
PRICE = Price(360_000)
DEPOSIT_MICRO, ESCROW_MICRO = 100_000_000, 100_000
NOTICE_MS = 30_000
"""The least that nodes agree to."""
LASTS_MS = 90_000
"""An escrow at most: nodes want a minute at least."""
GOES_EVERY = 10
"""Of so many clients one is gone after its first gang."""
WAYS = {"honest": 60, "vanishes": 2, "takes twice": 3, "replays": 3, "late": 2}
PATIENCE_S = 120.0
"""For what must happen at all."""
ATTEMPTS = 40
LOOKED_AT = 64
"""Escrows of which a ledger is asked whether they are settled: those that end last."""
_DIGITS = re.compile(r"\b[0-9a-f]{8,}\b|\d[\d.,]*")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    folder: str
    hubs: tuple[str, ...]
    ledger: str
    nodes: int
    clients: int
    seller_processes: int
    client_processes: int
    seconds: float

    def nodes_of(self, process: int) -> range:
        return range(process, self.nodes, self.seller_processes)

    def clients_of(self, process: int) -> range:
        return range(process, self.clients, self.client_processes)


class Paper(msgspec.Struct, kw_only=True):
    """An escrow, as the client that opened it knows it; millionths by payee."""

    escrow: bytes
    payer: bytes
    acknowledged: dict[bytes, int] = {}
    """What nodes said they have."""
    signed: dict[bytes, int] = {}
    """The same, or what was on its way when the answer was lost."""
    closed_ms: int = 0
    """When its payer had asked for the rest; 0: it has not."""


class Seen(msgspec.Struct, kw_only=True):
    """What the clients of one process have seen."""

    holds: list[bytes] = []
    """Envelopes of all Holds that nodes gave."""
    asked: int = 0
    """Gangs."""
    quotes_ms: list[float] = []
    """Of whole gangs, from the first question to the last answer; links are open by then."""
    taken_ms: list[float] = []
    """From all held to all taken: an escrow is opened in that time."""
    refusals: dict[str, int] = {}
    papers: list[Paper] = []
    payers: list[bytes] = []
    hub_away: int = 0
    """Searches for which the other hub was asked."""
    wrong: list[str] = []
    """What should have been refused and was not."""

    def refused(self, what: str, error: ShoalError) -> None:
        why = f"{what}: {_DIGITS.sub('…', error.sentence)}"[:80]
        self.refusals[why] = self.refusals.get(why, 0) + 1


def node_key(number: int) -> KeyPair:
    return KeyPair.from_seed(blake3_hash(b"node %d" % number))


def node_account(number: int) -> AccountKey:
    return AccountKey(blake3_hash(b"account of node %d" % number))


# --- who sells -------------------------------------------------------------------------------------------------------


async def start_seller(plan: Plan, number: int) -> NodeAgent:
    """A node as its owner starts it, but for measuring the machine: nothing is computed here."""
    key, clock, dice = node_key(number), SystemClock(), SystemDice()
    folder = Path(plan.folder) / "nodes" / str(number)
    endpoint = PlacedEndpoint(key, f"127.8.0.{number + 1}", clock)
    sale = Sale(PRICE, RemoteLedger(endpoint, LedgerTicket.parse(plan.ledger), clock), node_account(number).address)

    async def measured(**_: object) -> Capability:
        return open_record(an_offer(key, 1), Offer).capability

    agent = NodeAgent(
        NodeSettings(f"node-{number}", folder, members_max=SLOTS[number % len(SLOTS)], accepts=("train",), sale=sale),
        key=key,
        endpoint=endpoint,
        hubs=HubClient(endpoint, [HubTicket.parse(one) for one in plan.hubs], clock=clock, dice=dice),
        store=BlobStore(folder / "blobs", 1 << 20, clock),
        clock=clock,
        dice=dice,
        measure=measured,
    )
    await agent.start()
    return agent


async def sell(plan: Plan, process: int) -> None:
    agents = [await start_seller(plan, number) for number in plan.nodes_of(process)]
    told = asyncio.to_thread(sys.stdin.readline)
    print("ready", flush=True)
    await told
    await asyncio.gather(*(agent.close() for agent in agents))


# --- who buys --------------------------------------------------------------------------------------------------------


class PlacedEndpoint(TlsEndpoint):
    """Dials from a loopback address of its own, as what hubs, nodes and ledgers allow one address is not what is
    measured here."""

    def __init__(self, key: KeyPair, place: str, clock: SystemClock) -> None:
        super().__init__(key, clock=clock, dice=SystemDice())
        self._place = place

    async def _connect(self, node: bytes, hint: Address) -> Any:
        host, port = parse_address(hint)
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(SocketStream, host, port, local_addr=(self._place, 0))
        return await self._dial_handshake(stream, node)


class NotedQuotes(Quotes):
    """Keeps every Hold that a node gives, and why others did not."""

    seen: Seen

    async def hold(self, node: bytes, offer: Offer) -> Held:
        return await self._noted("hold", super().hold(node, offer))

    async def take(self, held: Held, escrow: bytes) -> Held:
        return await self._noted("take", super().take(held, escrow))

    async def _noted(self, what: str, answer: Coroutine[Any, Any, Held]) -> Held:
        try:
            held = await answer
        except ShoalError as error:
            self.seen.refused(what, error)
            raise
        self.seen.holds.append(held.envelope.to_bytes())
        return held


class Client:
    def __init__(self, plan: Plan, number: int, seen: Seen) -> None:
        self.number, self.seen = number, seen
        self.clock, self.dice = SystemClock(), random.Random(number)
        self.key = KeyPair.from_seed(blake3_hash(b"client %d" % number))
        self.account = AccountKey(blake3_hash(b"account of client %d" % number))
        self.endpoint = PlacedEndpoint(self.key, f"127.7.{number // 250}.{number % 250 + 1}", self.clock)
        self.hubs = [
            HubClient(self.endpoint, [HubTicket.parse(one)], clock=self.clock, dice=SystemDice()) for one in plan.hubs
        ]
        self.ledger = RemoteLedger(self.endpoint, LedgerTicket.parse(plan.ledger), self.clock)
        self.quotes = NotedQuotes(self.key, self.account.address, self.account, self.ledger.name, self.link, self.clock)
        self.quotes.seen = seen
        self.papers: list[Paper] = []
        self._cycles = itertools.count(number)

    async def start(self) -> None:
        await asyncio.gather(*(hub.start() for hub in self.hubs))
        await self.ledger.mint(self.account.address, DEPOSIT_MICRO)
        self.seen.payers.append(self.account.address)

    async def close(self) -> None:
        self.seen.papers += self.papers
        await asyncio.gather(*(hub.close() for hub in self.hubs))
        await self.endpoint.close()

    async def link(self, node: bytes, offer: Offer) -> Link:
        return await reach(
            node, offer, endpoint=self.endpoint, directory=self.hubs[0], clock=self.clock, dial_deadline_s=8.0
        )

    async def buy(self, until_s: float) -> None:
        """Again and again."""
        while self.clock.monotonic() < until_s:
            try:
                if await self._cycle():
                    return
            except ShoalError as error:
                self.seen.refused("market", error)
            await self.clock.sleep(self.dice.uniform(0.05, 0.25))

    async def _look(self) -> list[FoundOffer]:
        at = next(self._cycles)
        wanted = OfferFind(accepts="train", idle_only=True)
        try:
            return await self.hubs[at % len(self.hubs)].find(wanted)
        except LinkError:
            self.seen.hub_away += 1
            return await self.hubs[(at + 1) % len(self.hubs)].find(wanted)

    async def _cycle(self) -> bool:
        """One gang, from the search to the end. Whether this client is gone for good."""
        leaves = self.number % GOES_EVERY == GOES_EVERY - 1
        size = 1 if leaves else self.dice.randint(1, GANG_MAX)
        found = await self._look()
        if len(found) < size:
            return False
        drawn = [(one.node, one.offer) for one in self.dice.sample(found, len(found))]
        gang, linked = drawn[:size], self.endpoint.links()
        spares = sorted((one for one in drawn[size:] if one[0] in linked), key=lambda one: -one[1].slots)
        await asyncio.gather(*(self.link(node, offer) for node, offer in gang))
        (way,) = self.dice.choices(list(WAYS), list(WAYS.values()))
        self.seen.asked += 1
        began = self.clock.monotonic()
        try:
            held, _ = await self.quotes.hold_all(gang, size, spares)
        except NotSecured:
            return False  # why, each node's answer says
        whole = self.clock.monotonic()
        self.seen.quotes_ms.append(1000 * (whole - began))
        if way == "vanishes" and not leaves:
            return False
        try:
            paper = await self._open(held)
            held = await self._take(held, paper, twice=way == "takes twice")
            self.seen.taken_ms.append(1000 * (self.clock.monotonic() - whole))
            await self._pay(held, paper, last=False)
            if leaves:
                return True
            await self.clock.sleep(self.dice.uniform(0.2, 1.0))
            await self._pay(held, paper, last=way == "honest")
            if way == "replays":
                await self._replay(held, paper)
            if way == "late":
                await self._close(paper)
                await self.clock.sleep(1.5)
        finally:
            if not leaves:
                await self.quotes.release_all(held)
        if way != "late":
            await self._close(paper)
        return False

    async def _open(self, held: Sequence[Held]) -> Paper:
        me = self.account.address
        terms = EscrowTerms(
            payer=me, signer=me, cap_micro=0, auditor=me, amount_micro=ESCROW_MICRO, fee_ppm=0, holdback_ppm=100_000,
            notice_ms=NOTICE_MS, audit_ms=0, expires_ms=self.clock.now_ms() + LASTS_MS,
            payees=tuple(Payee(payee, ESCROW_MICRO) for payee in sorted({one.hold.payee for one in held})),
            quote=quote_id(tuple(one.envelope for one in held)), nonce=self.dice.randbytes(32),
        )  # fmt: skip
        name = terms.escrow_id(self.ledger.name)
        paper = Paper(escrow=name, payer=me)
        self.papers.append(paper)
        await self.ledger.apply(Open(terms, self.account.sign(name)))
        return paper

    async def _take(self, held: Sequence[Held], paper: Paper, *, twice: bool) -> list[Held]:
        takes = [self.quotes.take(one, paper.escrow) for one in held for _ in range(2 if twice else 1)]
        answers = await asyncio.gather(*takes, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        newest = {one.node: one for one in sorted(answers, key=lambda one: one.hold.number)}  # type: ignore[union-attr]
        return list(newest.values())  # type: ignore[arg-type]

    def _voucher(self, payee: bytes, amount: int, paper: Paper, by: AccountKey | None = None) -> SignedVoucher:
        voucher = Voucher(escrow=paper.escrow, payee=payee, amount_micro=amount, work=bytes(32))
        return sign_voucher(by or self.account, self.ledger.name, voucher)

    async def _pay(self, held: Sequence[Held], paper: Paper, *, last: bool) -> None:
        async def pay(one: Held) -> None:
            payee = one.hold.payee
            amount = paper.signed.get(payee, 0) + self.dice.randint(1, ESCROW_MICRO // (2 * GANG_MAX))
            paper.signed[payee] = amount
            try:
                await self.quotes.pay(one.node, self._voucher(payee, amount, paper), last=last, deadline_s=5.0)
            except ShoalError as error:
                self.seen.refused("voucher", error)
            else:
                paper.acknowledged[payee] = amount

        await asyncio.gather(*map(pay, held))

    async def _replay(self, held: Sequence[Held], paper: Paper) -> None:
        """Old vouchers, one for less, one that somebody else signed, and a newest one twice at the ledger."""
        for one in held:
            payee, amount = one.hold.payee, paper.acknowledged.get(one.hold.payee)
            if amount is None:
                continue
            forged = AccountKey(blake3_hash(payee))
            newest = self._voucher(payee, amount, paper)
            older = await self.quotes.pay(one.node, self._voucher(payee, amount - 1, paper), last=False, deadline_s=5.0)
            if older is None or older.voucher.amount_micro < newest.voucher.amount_micro:
                self.seen.wrong.append(f"{one.name} took a voucher for less than before.")
            for said, bad in (
                ("by somebody else", self._voucher(payee, amount + 1, paper, by=forged)),
                ("for more than was agreed", self._voucher(payee, ESCROW_MICRO + 1, paper)),
            ):
                try:
                    await self.quotes.pay(one.node, bad, last=False, deadline_s=5.0)
                except Refused:
                    continue
                self.seen.wrong.append(f"{one.name} took a voucher {said}.")
            good = Redeem(self._voucher(payee, amount, paper))
            for _ in range(2):
                with contextlib.suppress(OldVoucher):
                    await self.ledger.apply(good)

    async def _close(self, paper: Paper) -> None:
        wish = Closing(paper.escrow)
        with contextlib.suppress(DoneAlready, EscrowOver, UnknownEscrow):  # asked before, or it never came to be
            await self.ledger.apply(Close(wish, self.account.sign(wish.digest(self.ledger.name))))
        paper.closed_ms = self.clock.now_ms()

    async def come_back(self) -> None:
        """Ask for the rest of what was left open."""
        for paper in (one for one in self.papers if not one.closed_ms):
            for attempt in range(ATTEMPTS):
                try:
                    await self._close(paper)
                    break
                except ShoalError as error:
                    if attempt == ATTEMPTS - 1:
                        raise
                    self.seen.refused("market", error)
                    await self.clock.sleep(0.5)


async def buy(plan: Plan, process: int) -> None:
    """Prints `ready` when all clients have money, begins when told, and leaves what it has seen in a file."""
    seen = Seen()
    clients = [Client(plan, number, seen) for number in plan.clients_of(process)]
    for client in clients:
        await client.start()
    told = asyncio.to_thread(sys.stdin.readline)
    print("ready", flush=True)
    await told
    until_s = time.monotonic() + plan.seconds
    await asyncio.gather(*(client.buy(until_s) for client in clients))
    await asyncio.gather(*(client.come_back() for client in clients))
    await asyncio.gather(*(client.close() for client in clients))
    (Path(plan.folder) / f"seen-{process}").write_bytes(msgspec.msgpack.encode(seen))


# --- all together ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    seen: Seen
    """By all."""
    contradictions: list[str]
    """Places that were sold twice."""
    astray: list[str]
    """Money that is not where vouchers say."""
    redeemed_micro: int
    escrows: int
    lines: int
    """Of the journal."""
    wall_s: float
    busy: float
    """Share of all cores' time that was used while clients bought, by anybody."""
    hub_away_s: float


class Process:
    """One that ends when its standard input does, and so with whoever started it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, role: str, plan: Path, number: int) -> Process:
        with (plan.parent / f"{role}-{number}.log").open("wb") as log:
            return cls(
                await asyncio.create_subprocess_exec(
                    sys.executable, __file__, role, str(plan), str(number),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                )
            )  # fmt: skip

    async def ready(self) -> None:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert await self._process.stdout.readline() == b"ready\n", "see its log"

    def tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"go on\n")

    async def ended(self, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            assert await self._process.wait() == 0, "see its log"

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


async def hammered(
    folder: Path, *, seconds: float, clients: int, nodes: int, client_processes: int = 4, seller_processes: int = 2
) -> Outcome:
    """Start it all, let clients buy for so long, kill one hub in the middle and start it again, let everything be paid
    and all escrows end, and look what has come of it."""
    clock = SystemClock()
    async with LocalShoal(folder) as shoal:
        hubs = [await shoal.start_hub(name) for name in ("hub-0", "hub-1")]
        ledger = await shoal.start_ledger(options=["--mint-max", str(DEPOSIT_MICRO // 1_000_000)])
        plan = Plan(
            folder=str(folder), hubs=tuple(shoal.hub_tickets), ledger=ledger.ready["ticket"], nodes=nodes,
            clients=clients, seller_processes=seller_processes, client_processes=client_processes, seconds=seconds,
        )  # fmt: skip
        (folder / "plan").write_bytes(msgspec.msgpack.encode(plan))
        started: list[Process] = []
        try:
            for role, count in (("sellers", seller_processes), ("clients", client_processes)):
                started += [await Process.start(role, folder / "plan", number) for number in range(count)]
            sellers, buyers = started[:seller_processes], started[seller_processes:]
            await asyncio.gather(*(one.ready() for one in started))
            psutil.cpu_percent()
            began = clock.monotonic()
            for one in buyers:
                one.tell()
            await clock.sleep(seconds / 2)
            hubs[0].kill()
            killed = clock.monotonic()
            (address,) = HubTicket.parse(hubs[0].ready["ticket"]).addresses
            await hubs[0].process.wait()
            await shoal.start_hub("hub-0", options=["--listen", address])
            hub_away_s = clock.monotonic() - killed
            await clock.sleep(began + seconds - clock.monotonic())
            busy = psutil.cpu_percent() / 100
            await asyncio.gather(*(one.ended(PATIENCE_S) for one in buyers))
            seen = together((folder / f"seen-{at}").read_bytes() for at in range(client_processes))
            book, lines = await _at_the_end(plan, seen.papers)  # nodes redeem until then
            for one in sellers:
                one.tell()
            await asyncio.gather(*(one.ended(PATIENCE_S) for one in sellers))
        finally:
            for one in started:
                await one.kill()
    return Outcome(
        seen=seen,
        contradictions=contradictions(Envelope.from_bytes(one, Hold.MAX_BYTES) for one in seen.holds),
        astray=astray(book, seen.papers, seen.payers, nodes),
        redeemed_micro=sum(one.redeemed_micro for one in book.escrows.values()),
        escrows=len(book.escrows),
        lines=lines,
        wall_s=seconds,
        busy=busy,
        hub_away_s=hub_away_s,
    )


def together(parts: Iterable[bytes]) -> Seen:
    whole = Seen()
    for one in (msgspec.msgpack.decode(part, type=Seen) for part in parts):
        for name in ("holds", "quotes_ms", "taken_ms", "papers", "payers", "wrong"):
            getattr(whole, name).extend(getattr(one, name))
        whole.asked += one.asked
        whole.hub_away += one.hub_away
        whole.refusals = dict(Counter(whole.refusals) + Counter(one.refusals))
    return whole


async def _at_the_end(plan: Plan, papers: Sequence[Paper]) -> tuple[Book, int]:
    """The ledger's book once all escrows are settled, made anew from its journal, and how many lines that has."""
    clock = SystemClock()
    endpoint = TlsEndpoint(KeyPair.generate(), clock=clock, dice=SystemDice())
    ledger = RemoteLedger(endpoint, LedgerTicket.parse(plan.ledger), clock)
    try:
        async with asyncio.timeout(PATIENCE_S + LASTS_MS / 1000):
            last = sorted(papers, key=lambda one: one.closed_ms)[-LOOKED_AT:]  # all have the same notice
            for paper in last:
                while (found := await ledger.escrow(paper.escrow)) is not None and found.state is not State.SETTLED:
                    await clock.sleep(0.5)
            checkpoint = await ledger.checkpoint()
            lines = [line async for line in ledger.lines()]
    finally:
        await endpoint.close()
    return verified(lines, ledger.name, checkpoint), len(lines)


# --- what has come of it ---------------------------------------------------------------------------------------------


def contradictions(envelopes: Iterable[Envelope]) -> list[str]:
    """What Holds prove of the nodes that signed them. Each is compared with those of its slot that were not over when
    it began."""
    slots: dict[tuple[bytes, int], list[tuple[Hold, Envelope]]] = {}
    for envelope in {one.record_id: one for one in envelopes}.values():
        hold = open_record(envelope, Hold)
        slots.setdefault((envelope.signer, hold.slot), []).append((hold, envelope))
    found = []
    for sold in slots.values():
        sold.sort(key=lambda one: one[0].number)
        lasting: list[tuple[Hold, Envelope]] = []
        for hold, envelope in sold:
            lasting = [one for one in lasting if one[0].until_ms > hold.from_ms or one[0].number == hold.number]
            found += [said for _, earlier in lasting if (said := sold_twice(earlier, envelope)) is not None]
            lasting.append((hold, envelope))
    return found


def astray(book: Book, papers: Sequence[Paper], payers: Sequence[bytes], nodes: int) -> list[str]:
    """Money that is not where vouchers say, when all escrows are settled. A voucher whose answer was lost may have
    been redeemed or not."""
    wrong = []
    if sum(book.balances.values()):
        wrong.append(f"All balances together are {sum(book.balances.values())} and not 0.")
    gets: Counter[bytes] = Counter(dict.fromkeys((node_account(number).address for number in range(nodes)), 0))
    has: Counter[bytes] = Counter(dict.fromkeys(payers, DEPOSIT_MICRO))
    for paper in papers:
        escrow = book.escrows.get(paper.escrow)
        if escrow is None:
            if paper.acknowledged:
                wrong.append(f"Escrow {paper.escrow.hex()[:12]} has paid and is not in the journal.")
            continue
        if escrow.state is not State.SETTLED:
            wrong.append(f"{escrow.name} is not settled.")
        for payee, signed in paper.signed.items():
            paid = escrow.paid.get(payee)
            redeemed, least = paid.redeemed_micro if paid else 0, paper.acknowledged.get(payee, 0)
            if not least <= redeemed <= signed:
                due = f"{least} to {signed}"
                wrong.append(f"{escrow.name} has paid {redeemed} to {address_text(payee)}, whose vouchers say {due}.")
            gets[payee] += redeemed
            has[paper.payer] -= redeemed
    for address, amount in (gets | has).items():
        balance = book.balances.get(account(address), 0)
        if balance != amount:
            wrong.append(f"{address_text(address)} has {balance}, and {amount} is what it should have.")
    return wrong


async def main() -> None:
    role, plan, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    play = {"sellers": sell, "clients": buy}[role]
    await play(msgspec.msgpack.decode(plan.read_bytes(), type=Plan), number)


if __name__ == "__main__":
    run(main())
