"""`shoal market`: an auction of hours, by who runs one and by who trades there; whether its batches are right, and what
two of one number prove."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from shoal.cli import places
from shoal.cli.app import MACHINES, Commands, Group, app
from shoal.cli.output import (
    BadFlag,
    HubFlag,
    JsonFlag,
    LedgerFlag,
    PublicFlag,
    WithParent,
    out,
    print_json,
    run,
    shown,
    until_stopped,
)
from shoal.errors import BadInput, BadRecord, ShoalError
from shoal.identity import Envelope, KeyPair, load_key, short_id
from shoal.identity.accounts import parse_address
from shoal.protocol.orders import (
    BID_BLOCKS_MAX,
    HOUR_MS,
    RESALE_BLOCKS_MAX,
    Ask,
    Batch,
    Block,
    NodeClass,
    OrderTerms,
    Purchase,
    Resale,
    closed_twice,
)
from shoal.protocol.prices import PRICE_MAX_MICRO_PER_H
from shoal.quantities import format_duration_s, parse_duration_s
from shoal.quantities.money import format_money
from shoal.sdk.local import shoal_home
from shoal.world import DeadlineExceeded, Link, LinkLost, SystemClock, SystemDice
from shoal.world.processes import die_with_parent

if TYPE_CHECKING:
    from shoal.auctions import RemoteAuction
    from shoal.market.publishing import Published, Verified
    from shoal.protocol.offers import Offer
    from shoal.sdk.hours import BoughtHour, Buyer, KeptBid, KeptBids, Reach
    from shoal.world.directory import FoundOffer

WRONG, MISSING = 3, 4
"""Exit codes."""
EVERY_MIN_S, EVERY_MAX_S = 0.1, 24 * 3600.0
EXPIRES_AFTER_MS = 60_000
"""An order expires so long after its batch was to be closed: an auctioneer may be late, and not wait for its price."""
SIGNED_AGAIN_MAX = 5
"""How often an order is signed for the next batch because the one that it was signed for has just been closed."""
LAST_MAX = 1000
DIAL_DEADLINE_S = 8.0
SHORT = 12
"""Hexadecimal digits of an order's id, for people."""
T = TypeVar("T")

market_app = Commands(cls=Group, help="Buy and sell hours of nodes in an auction: `shoal market buy`.")
app.add_typer(market_app, name="market", rich_help_panel=MACHINES)

AuctionFlag = Annotated[
    str | None,
    typer.Option(
        "--auction",
        metavar="TICKET",
        help="An auction's ticket, shoal-auction://NODEID@HOST:PORT, as it prints it. It is remembered. Without it: "
        "SHOAL_AUCTION, else the one remembered.",
        show_default=False,
    ),
]
HourFlag = Annotated[
    str, typer.Option(metavar="HOUR", help="Which hour, in UTC: 2026-11-28T14 is the one that begins at 14:00.")
]
CLASS_HELP = (
    "What kind of node, such as 'H100 80 GiB' or '8 x H100 80 GiB, DE, sandboxed': its device and the whole GiB of its "
    "memory, as `shoal offers` shows them"
)
NodeData = Annotated[Path | None, typer.Option("--data", help="The node's folder.", show_default="~/.shoal/node")]


class NoBatch(BadInput):
    """A file that was named holds no published batch."""

    code = "SH-107"


@market_app.command("run")
def run_auction(
    listen: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where traders link to it: tcp://HOST:PORT with an address of this machine that they can reach. Port 0 "
            "takes a free one; a fixed one keeps the ticket the same after a restart.",
        ),
    ] = "tcp://127.0.0.1:0",
    every: Annotated[str, typer.Option(metavar="TIME", help="How often a batch that has orders is closed.")] = "10s",
    public: PublicFlag = None,
    ledger: LedgerFlag = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Its key and database.", show_default="~/.shoal/auction")
    ] = None,
    json: JsonFlag = False,
    with_parent: WithParent = 0,
) -> None:
    """Run an auction: it takes orders for hours of nodes, closes a batch of them every so often, and publishes it.

    It prints its ticket; give that to `--auction` elsewhere. Hours are paid at one ledger: it asks that whether the money
    of a bid is there. What it acknowledged or published survives a crash. Keep
    its folder, and never put an old copy in its place: two batches of one number, signed with its key, convict it.
    """  # fmt: skip
    from shoal.auctions.server import AuctionServer, AuctionSettings
    from shoal.house import RemoteLedger
    from shoal.transport import TlsEndpoint

    if with_parent:
        die_with_parent(with_parent)
    if not public:
        places.refuse_wildcard(listen)
    every_s = parse_duration_s(every)
    if not EVERY_MIN_S <= every_s <= EVERY_MAX_S:
        raise BadFlag(f"--every {every} cannot be used: from 100 ms to a day.")
    settings = AuctionSettings(
        data=data or shoal_home() / "auction", every_s=every_s, listen=listen, public=tuple(public or ())
    )

    paid_at, clock = places.ledger_ticket(ledger), SystemClock()

    async def work() -> None:
        server = AuctionServer(
            settings, TlsEndpoint, lambda endpoint: RemoteLedger(endpoint, paid_at, clock), clock, SystemDice()
        )
        ticket = await server.start()
        if json:
            print_json({"ready": "auction", "ticket": str(ticket), "pid": os.getpid()})
        else:
            out.print("An auction is up.  Ticket:", soft_wrap=True)
            out.print(str(ticket), soft_wrap=True, markup=False)
            out.print("[dim]Ctrl-C stops it.[/]")
        try:
            await until_stopped()
        finally:
            await server.stop()

    run(work)


@market_app.command("sell")
def sell(
    hour: HourFlag,
    price: Annotated[str, typer.Option(metavar="AMOUNT", help="What the hour brings at least, such as 0.40.")],
    of: Annotated[
        str | None,
        typer.Option("--class", metavar="CLASS", help=f"{CLASS_HELP}.", show_default="as its offer at a hub has it"),
    ] = None,
    account: Annotated[
        str | None,
        typer.Option(metavar="0x...", help="The account at which the node is paid.", show_default="your own"),
    ] = None,
    auction: AuctionFlag = None,
    ledger: LedgerFlag = None,
    hub: HubFlag = None,
    data: NodeData = None,
    json: JsonFlag = False,
) -> None:
    """Sell an hour of this machine's node in the batch that is open, for at least so much.

    The node has to be up, with a price: it keeps that hour free from now on, and for whoever buys it. The order is signed
    with the node's key. Its class is what the node measured and offers at a hub: its first kind of device, how many,
    their memory, the tier, wherever it is. It is good for one batch: where it does not trade, sell the hour again.
    """  # fmt: skip
    from shoal.protocol.messages import sign
    from shoal.sdk.hours import have_promised

    key = load_key((data or shoal_home() / "node") / "node.key")
    payee = parse_address(account) if account is not None else places.account_key().address
    paid_at, start_ms, limit = places.ledger_ticket(ledger).ledger, _hour_of(hour), _limit_of(price)
    ticket, reach = places.auction_ticket(auction), _reach(hub)
    kind = _class_of(of) if of is not None else _class_offered(run(lambda: _offer_of(key.node_id, hub)))

    async def make(_: RemoteAuction, terms: OrderTerms) -> Envelope:
        order = sign(key, Ask(terms=terms, payee=payee))
        await have_promised(key, order, str(ticket), reach)
        return order

    block = Block(of=kind, start_ms=start_ms, ledger=paid_at)
    _hand_in(auction, block, limit, make, "sells", json)


@market_app.command("buy")
def buy(
    of: Annotated[str, typer.Option("--class", metavar="CLASS", help=f"{CLASS_HELP}. Any node of it will do.")],
    hour: HourFlag,
    price: Annotated[str, typer.Option(metavar="AMOUNT", help="What a block costs at most, such as 0.40.")],
    blocks: Annotated[int, typer.Option(metavar="N", help="So many nodes for that hour; fewer will do.")] = 1,
    auction: AuctionFlag = None,
    ledger: LedgerFlag = None,
    json: JsonFlag = False,
) -> None:
    """Buy an hour of so many nodes of a class in the batch that is open, each for at most so much.

    All that this may cost is set aside. You pay what the last one costs who is left out, and never more than your price:
    it pays to say what an hour is worth to you. So one bid and one ask alone trade nothing. The order is good for one
    batch. Once that is closed, `shoal market mine` has the nodes keep what you bought, and what you did not buy comes
    back; do so within the hour.
    """  # fmt: skip
    from shoal.sdk.hours import KeptBids
    from shoal.sdk.orders import KeptOrders

    if not 1 <= blocks <= BID_BLOCKS_MAX:
        raise BadFlag(f"--blocks {blocks} cannot be used: from 1 to {BID_BLOCKS_MAX}.")
    block = Block(of=_class_of(of), start_ms=_hour_of(hour), ledger=places.ledger_ticket(ledger).ledger)
    limit = _limit_of(price)
    said = f"buys up to {blocks} x" if blocks > 1 else "buys"
    bids = KeptBids(KeptOrders(_orders_folder(), places.auction_ticket(auction).auctioneer))
    tried: list[KeptBid] = []

    async def make(one: RemoteAuction, terms: OrderTerms) -> Envelope:
        async with _buying(one, bids, ledger, None) as buyer:
            tried.append(await buyer.set_aside(terms, blocks))
        return tried[-1].envelope

    async def undo(one: RemoteAuction) -> None:
        async with _buying(one, bids, ledger, None) as buyer:
            await buyer.drop(tried[-1])

    _hand_in(auction, block, limit, make, said, json, undo)


@market_app.command("resell")
def resell(
    hour: HourFlag,
    price: Annotated[
        str, typer.Option(metavar="AMOUNT", help="What a block brings its node at least; not less than it cost you.")
    ],
    of: Annotated[
        str | None,
        typer.Option("--class", metavar="CLASS", help=f"{CLASS_HELP}.", show_default="what you have of that hour"),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(metavar="N", help="So many of them at most.", show_default="all")
    ] = None,
    auction: AuctionFlag = None,
    json: JsonFlag = False,
) -> None:
    """Pass hours on that you bought and will not use, in the batch that is open.

    What is sold is given back to its node by the next `shoal market mine`, and your money for it comes back. The new
    price is the node's: an hour that is not used costs you nothing, and passing it on earns you nothing.
    """  # fmt: skip
    from shoal.protocol.messages import sign
    from shoal.sdk.hours import KeptBids, hour_key
    from shoal.sdk.orders import KeptOrders

    if blocks is not None and blocks < 1:
        raise BadFlag(f"--blocks {blocks} cannot be used: from 1 on.")
    start_ms, limit, kind = _hour_of(hour), _limit_of(price), _class_of(of) if of is not None else None
    bids = KeptBids(KeptOrders(_orders_folder(), places.auction_ticket(auction).auctioneer))
    mine: dict[Block, list[Purchase]] = defaultdict(list)
    for one in bids.all():
        block = one.bid.terms.block
        if block.start_ms == start_ms and kind in (None, block.of):
            mine[block] += [Purchase(one.bid.terms.batch, each.node) for each in one.hours or () if not each.passed_on]
    found = {block: purchases for block, purchases in mine.items() if purchases}
    if len(found) != 1:
        have = ", ".join(_described(block) for block in found) or "nothing"
        raise BadFlag(f"--hour {hour}: you have bought {have} of it here; name one with --class.")
    [(block, purchases)] = found.items()
    named = tuple(purchases[: min(blocks or RESALE_BLOCKS_MAX, RESALE_BLOCKS_MAX)])
    key = hour_key(places.user_key(), block)

    async def make(_: RemoteAuction, terms: OrderTerms) -> Envelope:
        return sign(key, Resale(terms=terms, purchases=named))

    _hand_in(auction, block, limit, make, f"passes on {len(named)} x", json)


@market_app.command("show")
def show(
    number: Annotated[
        int | None, typer.Argument(metavar="NUMBER", help="Which batch.", show_default="the newest")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what was published of it to a new file, for `shoal market verify`."),
    ] = None,
    auction: AuctionFlag = None,
    json: JsonFlag = False,
) -> None:
    """Show what a batch came to: prices, trades, and why orders got less than they asked for.

    It is cleared again first, from the signed orders: where it is not right, the first thing that differs is said.
    """  # fmt: skip
    if number is not None and number < 1:
        raise BadFlag(f"{number} is no batch: they are counted from 1.")

    async def work(one: RemoteAuction) -> tuple[int, Verified]:
        running = (await one.about()).running
        which = running - 1 if number is None else number
        published = await one.published(which)
        if save is not None:
            _save(save, published.to_bytes())
        return running, await one.checked(published, which)

    running, checked = _ask(auction, work)
    if json:
        print_json({"running": running, **_document(checked)})
        return
    cleared = checked.outcome.cleared
    out.print(
        f"Batch {checked.batch.number}, closed {_time(checked.batch.closed_ms)}: {len(checked.orders)} orders. "
        f"Batch {running} is open.", markup=False, soft_wrap=True,
    )  # fmt: skip
    if cleared:
        table = Table("what", "price", "node", "seller", "buyer", box=None, pad_edge=False)
        for market in cleared:
            price = f"{format_money(market.price_micro)} {market.block.ledger.currency}"
            for trade in market.trades:
                who = (short_id(one) for one in (trade.node, trade.seller, trade.buyer))
                table.add_row(escape(_described(market.block)), price, *who)
        out.print(table)
    else:
        out.print("Nothing was traded.")
    for sentence in checked.outcome.markets.values():
        out.print(shown(sentence), markup=False, soft_wrap=True)
    for left in checked.outcome.left_out:
        sentence = f"{left.order.hex()[:SHORT]}  {left.why}: {checked.outcome.reasons[left.order]}"
        out.print(shown(sentence), markup=False, soft_wrap=True)


@market_app.command("mine")
def mine(
    last: Annotated[int, typer.Option(metavar="N", help="Look through the newest so many batches.")] = 10,
    auction: AuctionFlag = None,
    ledger: LedgerFlag = None,
    hub: HubFlag = None,
    data: NodeData = None,
    json: JsonFlag = False,
) -> None:
    """Show what you and this machine's node bought and sold in the last batches, and bring to its end what you bought.

    The money of bids that bought nothing comes back. Of what was bought the nodes sign that they keep the hour for you,
    and exactly what it costs stays set aside; what you have passed on is given back to them. Orders that were signed on
    this machine are looked for in their batches: one that is missing is told. Exit code 4 where one is.
    """  # fmt: skip
    from shoal.market.batches import short
    from shoal.market.publishing import left_out
    from shoal.sdk.hours import KeptBids, hour_key
    from shoal.sdk.orders import KeptOrders

    if not 1 <= last <= LAST_MAX:
        raise BadFlag(f"--last {last} cannot be used: from 1 to {LAST_MAX}.")
    ticket = places.auction_ticket(auction)
    node_key, user = (data or shoal_home() / "node") / "node.key", places.user_key()
    keys = {load_key(node_key).node_id} if node_key.exists() else set[bytes]()
    kept = KeptOrders(_orders_folder(), ticket.auctioneer)
    bids = KeptBids(kept)
    known = bids.all()
    keys |= {hour_key(user, one.bid.terms.block).node_id for one in known}
    trades: list[dict[str, Any]] = []
    orders: list[dict[str, Any]] = []
    passed_on: dict[bytes, set[bytes]] = defaultdict(set)
    """Nodes of a bid's hours that were sold again, by the bid's id."""

    def look(checked: Verified) -> None:
        number = checked.batch.number
        for market in checked.outcome.cleared:
            for trade in market.trades:
                for what, who, other in (
                    ("bought", trade.buyer, trade.seller),
                    ("sold", trade.seller, trade.buyer),
                ):  # fmt: skip
                    if who in keys:
                        trades.append(
                            {
                                "batch": number, "what": what, "block": market.block,
                                "price_micro": market.price_micro, "node": trade.node, "with": other,
                            }
                        )  # fmt: skip
            for bid in known:
                if bid.bid.terms.block == market.block and bid.bid.terms.batch < number:
                    me = hour_key(user, market.block).node_id
                    passed_on[bid.order_id] |= {trade.node for trade in market.trades if trade.seller == me}
        signed_here = {order.record_id: order for order in kept.of(number)}
        for one in checked.orders:
            if one.trader in keys or one.id in signed_here:
                said = f"Order {short(one.id)} is in batch {number}: {checked.outcome.reasons[one.id]}"
                orders.append({"order": one.id, "batch": number, "missing": False, "sentence": said})
        for order in signed_here.values():
            if order.record_id not in checked.outcome.reasons:
                missing, said = left_out(checked, order)
                orders.append({"order": order.record_id, "batch": number, "missing": missing, "sentence": said})

    async def work(one: RemoteAuction) -> tuple[int, int, list[KeptBid]]:
        info = await one.about()
        first = max(info.oldest, info.running - last)
        for number in range(first, info.running):
            look(await one.batch(number))
        unsettled = [each for each in known if not each.over]
        if not unsettled:
            return first, info.running, []
        settled = []
        async with _buying(one, bids, ledger, hub) as buyer:
            for each in unsettled:
                each = await buyer.give_back(each, passed_on[each.order_id])
                settled.append(await buyer.settle(each, info.running))
        return first, info.running, settled

    first, running, settled = _ask(auction, work)
    waiting = [one.record_id for one in kept.of(running)]
    hours = [_bought(bids, one, hour) for one in settled for hour in one.hours or ()]
    if json:
        print_json(
            {
                "from": first, "to": running - 1, "trades": trades, "orders": orders, "waiting": waiting,
                "hours": hours,
            }
        )  # fmt: skip
    else:
        if trades:
            table = Table("batch", "what", "block", "price", "node", "with", box=None, pad_edge=False)
            for row in trades:
                table.add_row(
                    str(row["batch"]), row["what"], escape(_described(row["block"])),
                    f"{format_money(row['price_micro'])} {row['block'].ledger.currency}",
                    short_id(row["node"]), short_id(row["with"]),
                )  # fmt: skip
            out.print(table)
        for row in [*orders, *hours]:
            out.print(shown(row["sentence"]), markup=False, soft_wrap=True)
        for name in waiting:
            out.print(f"Order {short(name)} was signed for batch {running}, which is open.", markup=False)
        if not (trades or orders or waiting or hours):
            out.print(f"Nothing of yours is in batches {first} to {running - 1}.")
    if any(row["missing"] for row in orders):
        raise typer.Exit(MISSING)


@market_app.command("compare")
def compare(
    one: Annotated[Path, typer.Argument(metavar="BATCH_A", help="A batch, as `shoal market show --save` wrote it.")],
    other: Annotated[Path, typer.Argument(metavar="BATCH_B", help="Another one of that number, from somebody else.")],
    json: JsonFlag = False,
) -> None:
    """Say whether two published batches prove that their auctioneer has closed one batch twice.

    The two signatures are the proof, and convince anybody who has both files. Exit code 3 where they do.
    """  # fmt: skip
    first, second = (Envelope.from_bytes(_published(path).batch, Batch.MAX_BYTES) for path in (one, other))
    proof = closed_twice(first, second)
    if json:
        print_json({"auctioneer": first.signer, "proof": proof})
    elif proof is None:
        out.print("They prove nothing: they are one and the same batch, or of two numbers or auctioneers.")
    else:
        out.print(shown(proof), markup=False, soft_wrap=True)
        out.print("Keep both files, and trade there no more.")
    if proof is not None:
        raise typer.Exit(WRONG)


@market_app.command("verify")
def verify(
    batch: Annotated[Path, typer.Argument(metavar="BATCH", help="A batch, as `shoal market show --save` wrote it.")],
    order: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A signed order: say what became of it, or that it is missing; several times for several.",
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Clear a batch again from its signed orders, and say whether the auctioneer did as it had to.

    Says *right*, with the price of each block and why it is that, or *wrong*, with the first trade that differs. An order
    that was signed for this batch and is not in it is told.

    Exit code 0 when it is right, 3 when it is wrong, 4 when it is right and an order is missing; 1 and 2 are errors, as
    everywhere.
    """  # fmt: skip
    from shoal.market.publishing import left_out, verified
    from shoal.protocol.orders import ORDER_MAX_BYTES

    published = _published(batch)
    try:
        checked = verified(published)
    except BadRecord as error:
        if json:
            print_json({"right": False, "code": error.code, "sentence": error.sentence})
        else:
            out.print("[bold red]wrong[/]  ", end="")
            out.print(shown(error.sentence), markup=False, soft_wrap=True)
        raise typer.Exit(WRONG) from error
    asked = []
    for path in order or ():
        try:
            missing, sentence = left_out(
                checked, Envelope.from_bytes(_read(path, ORDER_MAX_BYTES * 2), ORDER_MAX_BYTES)
            )
        except BadRecord as error:
            raise BadFlag(f"--order {path} cannot be used: {error.sentence}") from error
        asked.append({"file": str(path), "missing": missing, "sentence": sentence})
    outcome = checked.outcome
    if json:
        print_json({"right": True, **_document(checked), "asked": asked})
    else:
        out.print("[bold green]right[/]  ", end="")
        said = f"Batch {checked.batch.number} of {checked.auctioneer.hex()}: {len(checked.orders)} orders, of which "
        out.print(f"{said}{len(outcome.left_out)} got less than they asked for.", markup=False, soft_wrap=True)
        for line in (*outcome.markets.values(), *(one["sentence"] for one in asked)):
            out.print(shown(str(line)), markup=False, soft_wrap=True)
    if any(one["missing"] for one in asked):
        raise typer.Exit(MISSING)


def _ask(named: str | None, question: Callable[[RemoteAuction], Awaitable[T]]) -> T:
    """Link to an auction, ask it something, and leave; one that was named and answered is remembered. Who asks is nobody
    in particular: orders are signed."""
    from shoal.auctions import RemoteAuction
    from shoal.transport import TlsEndpoint

    ticket = places.auction_ticket(named)

    async def work() -> T:
        endpoint = TlsEndpoint(KeyPair.generate())
        try:
            return await question(RemoteAuction(endpoint, ticket, SystemClock()))
        finally:
            await endpoint.close()

    answer = run(work)
    if named is not None:
        places.remember_auction(ticket)
    return answer


def _hand_in(
    named: str | None,
    block: Block,
    limit_micro: int,
    make: Callable[[RemoteAuction, OrderTerms], Awaitable[Envelope]],
    says: str,
    json: bool,
    undo: Callable[[RemoteAuction], Awaitable[None]] | None = None,
) -> None:
    """Sign an order for the batch that is open, keep it, and hand it in; again for the next one where that one was closed
    meanwhile. `undo` is for one that was not taken."""
    from shoal.auctions.refusals import OrderRefused
    from shoal.sdk.orders import KeptOrders

    ticket, clock = places.auction_ticket(named), SystemClock()
    kept = KeptOrders(_orders_folder(), ticket.auctioneer)

    async def work(one: RemoteAuction) -> tuple[Any, Path]:
        info = await one.about()
        for again in range(SIGNED_AGAIN_MAX + 1):
            terms = OrderTerms(
                auctioneer=ticket.auctioneer, batch=info.running, sequence=clock.now_ms(), block=block,
                expires_ms=min(info.closes_ms, block.start_ms) + EXPIRES_AFTER_MS, limit_micro=limit_micro,
            )  # fmt: skip
            order = await make(one, terms)
            path = kept.keep(order)
            try:
                return await one.hand_in(order), path
            except (LinkLost, DeadlineExceeded) as error:
                raise type(error)(
                    f"{error} Whether the order was taken is not known: `shoal market mine` says so when batch "
                    f"{terms.batch} is closed."
                ) from error
            except ShoalError as error:
                path.unlink(missing_ok=True)
                if undo is not None:
                    await undo(one)
                if not isinstance(error, OrderRefused) or again == SIGNED_AGAIN_MAX:
                    raise
                info = await one.about()
                if info.running == terms.batch:
                    raise
        raise AssertionError("the last try returns or raises")

    taken, path = _ask(named, work)
    if json:
        print_json({"order": taken.order, "batch": taken.batch, "closes_ms": taken.closes_ms, "file": str(path)})
        return
    left = format_duration_s(max(0, taken.closes_ms - clock.now_ms()) / 1000)
    out.print(
        f"Order {taken.order.hex()[:SHORT]} {says} {_described(block)} for {format_money(limit_micro)} "
        f"{block.ledger.currency} or {'less' if says.startswith('buys') else 'more'}. It is in batch {taken.batch}, which "
        f"is closed in {left}; then: shoal market mine", markup=False, soft_wrap=True,
    )  # fmt: skip


@asynccontextmanager
async def _buying(
    auction: RemoteAuction, bids: KeptBids, ledger: str | None, hub: list[str] | None
) -> AsyncIterator[Buyer]:
    """This user, as somebody who buys hours."""
    from shoal.house import RemoteLedger
    from shoal.sdk.hours import Buyer
    from shoal.transport import TlsEndpoint

    account, ticket, clock = places.account_key(), places.ledger_ticket(ledger), SystemClock()
    endpoint = TlsEndpoint(KeyPair.generate())
    try:
        at = RemoteLedger(endpoint, ticket, clock)
        yield Buyer(places.user_key(), account, at, auction, bids, _reach(hub), clock, SystemDice())
    finally:
        await endpoint.close()


def _reach(hub: list[str] | None) -> Reach:
    """Links to nodes that the hubs know."""
    from shoal.hub import HubClient
    from shoal.protocol.offers import OfferFind
    from shoal.transport import TlsEndpoint
    from shoal.world.reach import reach

    @asynccontextmanager
    async def link(key: KeyPair, node: bytes) -> AsyncIterator[Link]:
        clock, dice = SystemClock(), SystemDice()
        endpoint = TlsEndpoint(key, clock=clock, dice=dice)
        client = HubClient(endpoint, places.find_hubs(hub), clock=clock, dice=dice)
        try:
            await client.start()
            found = await client.find(OfferFind(node=node))
            yield await reach(
                node, _first(found, node), endpoint=endpoint, directory=client, clock=clock,
                dial_deadline_s=DIAL_DEADLINE_S,
            )  # fmt: skip
        finally:
            await client.close()
            await endpoint.close()

    return link


async def _offer_of(node: bytes, hub: list[str] | None) -> Offer:
    """A node's offer at the hubs. Raises BadFlag where there is none."""
    from shoal.hub import HubClient
    from shoal.protocol.offers import OfferFind
    from shoal.transport import TlsEndpoint

    clock, dice = SystemClock(), SystemDice()
    endpoint = TlsEndpoint(KeyPair.generate(), clock=clock, dice=dice)
    client = HubClient(endpoint, places.find_hubs(hub), clock=clock, dice=dice)
    try:
        await client.start()
        return _first(await client.find(OfferFind(node=node)), node)
    finally:
        await client.close()
        await endpoint.close()


def _first(found: Sequence[FoundOffer], node: bytes) -> Offer:
    if not found:
        raise BadFlag(
            f"Node {short_id(node)} has no offer at the hubs: it has to be up, and known to one of them (--hub)."
        )
    return found[0].offer


def _class_offered(offer: Offer) -> NodeClass:
    first = offer.capability.devices[0]
    same = [one.memory_bytes for one in offer.capability.devices if one.name == first.name]
    return _class(first.name, len(same), min(same) >> 30, None, offer.tier)


def _bought(bids: KeptBids, one: KeptBid, hour: BoughtHour) -> dict[str, Any]:
    """An hour that was bought, for machines and for people."""
    block, price = one.bid.terms.block, f"{format_money(hour.price_micro)} {one.ledger.currency}"
    what = f"{_described(block)} of node {short_id(hour.node)}, bought in batch {one.bid.terms.batch} for {price}"
    escrow = one.escrow_id.hex()[:SHORT]
    if hour.passed_on:
        said = f"{what}, is passed on, and given back."
    elif hour.hold:
        said = (
            f"{what}, is kept for you; the money is in escrow {escrow}, the node's word in {bids.hold_file(one, hour)}."
        )
    else:
        said = f"{what}, is not kept for you yet: {hour.trouble or 'it has not been asked.'}"
    return {
        "batch": one.bid.terms.batch, "block": block, "node": hour.node, "price_micro": hour.price_micro,
        "escrow": one.escrow_id, "hold": str(bids.hold_file(one, hour)) if hour.hold else None,
        "passed_on": hour.passed_on, "sentence": said,
    }  # fmt: skip


def _published(path: Path) -> Published:
    """What a file holds that an auctioneer has published. Raises NoBatch."""
    from shoal.market.publishing import FILE_MAX_BYTES, Published

    try:
        return Published.from_bytes(_read(path, FILE_MAX_BYTES))
    except BadRecord as error:
        raise NoBatch(
            f"{path} cannot be checked: {error.sentence} Name a file as the auctioneer published it."
        ) from error


_CLASS = re.compile(
    r"(?:([0-9]{1,2}) x )?(.{1,96}?) ([0-9]{1,7}) GiB(?:, ([A-Z]{2}|anywhere))?(?:, (open|sandboxed|attested))?"
)


def _class_of(text: str) -> NodeClass:
    match = _CLASS.fullmatch(text.strip())
    if match is None or not text.isprintable():
        raise BadFlag(
            f"--class {text!r} cannot be used: write DEVICE N GiB, with 'M x ' before and ', COUNTRY' or ', TIER' behind "
            "it where wanted, such as '8 x H100 80 GiB, DE, sandboxed'."
        )
    country = None if match[4] in (None, "anywhere") else match[4]
    return _class(match[2], int(match[1] or 1), int(match[3]), country, match[5] or "open")


def _class(device: str, devices: int, memory_gib: int, country: str | None, tier: str) -> NodeClass:
    try:
        return msgspec.convert(
            {"device": device, "devices": devices, "memory_gib": memory_gib, "country": country, "tier": tier},
            NodeClass,
        )  # fmt: skip
    except msgspec.ValidationError as error:
        raise BadFlag(f"{devices} x {device} {memory_gib} GiB is no class of nodes: {error}.") from error


def _hour_of(text: str) -> int:
    start_ms = places.hour_of(text)
    if start_ms < SystemClock().now_ms():
        raise BadFlag(f"--hour {text} cannot be used: it has begun, and hours are traded before.")
    assert start_ms % HOUR_MS == 0
    return start_ms


def _limit_of(text: str) -> int:
    micro = places.amount_of(text)
    if micro > PRICE_MAX_MICRO_PER_H:
        raise BadFlag(f"--price {text} cannot be used: at most {format_money(PRICE_MAX_MICRO_PER_H)}.")
    return micro


def _orders_folder() -> Path:
    return shoal_home() / "orders"


def _described(block: Block) -> str:
    from shoal.market.batches import described

    return shown(described(block))


def _time(at_ms: int) -> str:
    """Whatever an auctioneer writes: `datetime` ends with the year 9999."""
    import numpy as np

    return f"{np.datetime_as_string(np.datetime64(at_ms, 'ms'), unit='s')} UTC"


def _document(checked: Verified) -> dict[str, Any]:
    """A batch that is right, for machines."""
    outcome = checked.outcome
    return {
        "auctioneer": checked.auctioneer,
        "batch": checked.batch.number,
        "closed_ms": checked.batch.closed_ms,
        "previous": checked.batch.previous,
        "clearing": checked.clearing,
        "orders": outcome.reasons,
        "markets": list(outcome.markets.values()),
        "cleared": outcome.cleared,
        "left_out": outcome.left_out,
    }


def _save(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise BadFlag(f"{path} is there already; name a new file.") from error


def _read(path: Path, most: int) -> bytes:
    """At most one byte more than may be in it."""
    with path.open("rb") as file:
        return file.read(most + 1)
