"""`shoal offers`: what there is at the hubs, what of it is wanted, and why there is no more."""

from __future__ import annotations

import asyncio
import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from shoal.cli import places
from shoal.cli.app import MACHINES, app
from shoal.cli.output import BadFlag, HubFlag, JsonFlag, err, out, print_json, run, shown
from shoal.errors import ShoalError
from shoal.identity import KeyPair
from shoal.quantities import (
    format_bytes,
    format_flops,
    format_rate_bps,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_duration_s,
)
from shoal.quantities.money import format_money, parse_price
from shoal.world import Clock, Directory, Endpoint, SystemClock, SystemDice

if TYPE_CHECKING:
    from shoal.market import Board, Listing, Match, Requirements
    from shoal.market.enough import Cheapest
    from shoal.market.why_not import Change
    from shoal.protocol.offers import Offer

LIMIT_MAX, NODES_MAX, FLOPS_MAX = 10_000, 1024, 1e18
NAMED_MAX = 16
"""Of the cheapest that are enough."""
ECHO_DEADLINE_S = 5.0
ECHOES_AT_ONCE = 32
MEASURED_MAX = 1024
"""Nodes whose round trip is measured."""


COUNTRY, REGION = "two capitals such as DE (ISO 3166-1)", "small letters, digits and dashes, such as europe-west"
FLAGS = {
    "device": ("--device", "any, cpu, cuda, rocm, mps or xpu"),
    "device_name": ("--device-name", "at most 96 characters"),
    "memory_min_bytes": ("--memory", "at most 1024 TiB"),
    "flops_min": ("--flops", "at most 1e18"),
    "memory_rate_min": ("--memory-rate", "at most 1e18 bytes per second"),
    "bandwidth_min": ("--bandwidth", "at most 1e18 bytes per second"),
    "latency_max_ms": ("--latency", "more than 0 and at most a minute"),
    "countries": ("--country", COUNTRY),
    "countries_without": ("--without-country", COUNTRY),
    "regions": ("--region", REGION),
    "regions_without": ("--without-region", REGION),
    "tier": ("--tier", "open, sandboxed or attested"),
    "reputation_min": ("--reputation", "from 0 to 1"),
    "notice_min_ms": ("--notice", "at most an hour"),
    "price_max": ("--max-price", "at most a million an hour"),
    "currency": ("--currency", "capitals and digits, such as USD"),
}
"""What each option takes, by the field that it becomes."""
CALLED = {"idle": "--idle", "flops_together": "--together"} | {
    field.removesuffix("_bytes").removesuffix("_ms"): flag for field, (flag, _) in FLAGS.items()
}
"""Each option, by the requirement that it is."""


class Order(StrEnum):
    PRICE = "price"
    VALUE = "value"
    FLOPS = "flops"
    MEMORY = "memory"
    BANDWIDTH = "bandwidth"
    LATENCY = "latency"
    NAME = "name"


@app.command("offers", rich_help_panel=MACHINES)
def offers(
    hub: HubFlag = None,
    device: Annotated[str, typer.Option(help="Only this kind of device: cpu, cuda, rocm, mps or xpu.")] = "any",
    device_name: Annotated[
        str, typer.Option(metavar="TEXT", help="Only devices with this in their name, such as 4090.")
    ] = "",
    memory: Annotated[
        str, typer.Option(metavar="BYTES", help="At least this much device memory, such as '16 GiB'.")
    ] = "0",
    flops: Annotated[
        str, typer.Option(metavar="COUNT", help="At least so many measured FLOP/s, such as 50T, in the fastest dtype.")
    ] = "0",
    memory_rate: Annotated[
        str, typer.Option(metavar="RATE", help="At least this measured from a device's memory, such as '500 GB/s'.")
    ] = "0",
    bandwidth: Annotated[
        str, typer.Option(metavar="RATE", help="At least this to its hub, such as '100 Mbit/s'.")
    ] = "0",
    latency: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="At most so far from here, there and back; measured now.", show_default=False
        ),
    ] = None,
    country: Annotated[
        list[str] | None, typer.Option(metavar="CC", help="Only this country, such as DE; several times for several.")
    ] = None,
    without_country: Annotated[list[str] | None, typer.Option(metavar="CC", help="Not this country.")] = None,
    region: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this region.")] = None,
    without_region: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Not this region.")] = None,
    tier: Annotated[
        str, typer.Option(help="What keeps work apart from the owner: open, sandboxed, attested.")
    ] = "open",
    reputation: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="How a node kept its word in your own jobs, at least: from 0 to 1, and 0.5 for one that had no part in "
            "any. Jobs take none below 0.1, which is who was found lying.",
        ),
    ] = 0.0,
    notice: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Their owners say so long beforehand that they take them back, such as '2 min'."
        ),
    ] = "0 s",
    max_price: Annotated[
        str | None, typer.Option(metavar="PRICE", help="At most this, such as 0.35/h.", show_default=False)
    ] = None,
    currency: Annotated[
        str | None,
        typer.Option(help="Only what is priced in this.", show_default="USD with --max-price, else any"),
    ] = None,
    idle: Annotated[bool, typer.Option("--idle", help="Only nodes that are free.")] = False,
    nodes: Annotated[
        int, typer.Option(metavar="COUNT", help="So many are needed; the cheapest of them are named.")
    ] = 1,
    together: Annotated[
        str,
        typer.Option(
            metavar="COUNT", help="Any mix that gives so many FLOP/s together, such as 200T; the cheapest is named."
        ),
    ] = "0",
    within: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="With --nodes: any two at most so far apart, there and back, by where they say to be; a job measures it.",
            show_default=False,
        ),
    ] = None,
    sort: Annotated[
        Order,
        typer.Option(
            help="What comes first: the cheapest, the most FLOP/s for their price, the fastest, the largest, "
            "the best connected, the nearest, or by name."
        ),
    ] = Order.PRICE,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 64,
    json: JsonFlag = False,
) -> None:
    """Show what is offered at the hubs: measured, signed, alive.

    One line a node: the device that fits with the memory and the matrix product rate that it measured, what an hour of
    it costs, where its owner says it is, whether a job has it, and the model that an engine beside it serves. The
    filters are those that a job file has under `requirements`. Where nothing fits, it says what excluded how many, and
    what would do. `--nodes 4 --together 200T` asks for so much, and names the cheapest mix that gives it. `--json`
    prints the offers whole.
    """  # fmt: skip
    from shoal.hub import HubClient
    from shoal.market import Board, Listing, Needed, Wish, match
    from shoal.market.enough import cheapest
    from shoal.market.reputation import NEW
    from shoal.protocol.offers import OfferFind
    from shoal.transport import TlsEndpoint
    from shoal.world.lookout import all_offers

    if not 1 <= limit <= LIMIT_MAX:
        raise BadFlag(f"--limit {limit} cannot be used: from 1 to {LIMIT_MAX}.")
    if not 1 <= nodes <= NODES_MAX:
        raise BadFlag(f"--nodes {nodes} cannot be used: from 1 to {NODES_MAX}.")
    needed = Needed(nodes, _flops_together(together))
    within_ms = None if within is None else 1000 * parse_duration_s(within)
    if within_ms is not None and (nodes < 2 or needed.flops or not 0 < within_ms <= 60_000):
        raise BadFlag(
            f"--within {within} cannot be used: it says how far any two of --nodes 2 or more may be from one another, "
            "more than 0 and at most a minute, and not beside --together."
        )
    if sort is Order.LATENCY and latency is None:
        latency = "60 s"
    wanted = _requirements(
        {
            "device": device, "device_name": device_name, "memory_min_bytes": parse_bytes(memory),
            "flops_min": float(parse_count(flops)), "memory_rate_min": parse_bytes_per_s(memory_rate), "bandwidth_min": parse_bytes_per_s(bandwidth),
            "latency_max_ms": None if latency is None else 1000 * parse_duration_s(latency),
            "countries": country or (), "countries_without": without_country or (), "regions": region or (),
            "regions_without": without_region or (), "tier": tier,
            "reputation_min": reputation, "notice_min_ms": round(1000 * parse_duration_s(notice)),
            "price_max": None if max_price is None else parse_price(max_price), "currency": currency,
        }
    )  # fmt: skip
    tickets = places.find_hubs(hub)
    scores = places.acquaintances().scores()

    async def work() -> None:
        clock, dice = SystemClock(), SystemDice()
        endpoint = TlsEndpoint(KeyPair.generate(), clock=clock, dice=dice)
        client = HubClient(endpoint, tickets, clock=clock, dice=dice)
        try:
            await client.start()
            offers = await all_offers(client, OfferFind())
            listings = [Listing(one.node, one.offer, None, scores.get(one.node, NEW)) for one in offers]
            if wanted.latency_max_ms is not None:
                listings = await _measured(listings, wanted, endpoint, client, clock)
        finally:
            await client.close()
            await endpoint.close()
        board = Board()
        for one in listings:
            board.put(one)
        found = match(board, Wish(wanted), idle_only=idle, needed=needed, called=CALLED)
        rows = _ordered(board, found, sort)[:limit]
        mix = cheapest(board, found.rows, needed, within_ms) if found.enough and needed != Needed() else None
        if json:
            _print_json(board, found, rows, mix)
        elif rows:
            linked = sort is Order.BANDWIDTH or wanted.bandwidth_min > 0
            out.print(_table(board, rows, far=wanted.latency_max_ms is not None, linked=linked))
            if found.nodes > len(rows):
                err.print(f"{found.nodes - len(rows)} more fit; --limit shows more.", style="dim")
            if not found.enough:
                out.print(shown(found.reason), markup=False, soft_wrap=True)
            elif mix is not None:
                of = ", ".join(board.listing(row).offer.name for row in mix.rows[:NAMED_MAX])
                more = f" and {len(mix.rows) - NAMED_MAX} more" if len(mix.rows) > NAMED_MAX else ""
                out.print(shown(f"{mix.reason} {of}{more}".strip()), markup=False, soft_wrap=True)
        elif not len(board):
            out.print("Nothing is offered. Start a node with: shoal node start")
        else:
            out.print(shown(found.reason), markup=False, soft_wrap=True)

    run(work)


def _flops_together(text: str) -> float:
    flops = float(parse_count(text))
    if not 0 <= flops <= FLOPS_MAX:
        raise BadFlag(f"--together {text} cannot be used: from 0 to 1e18 FLOP/s.")
    return flops


def _requirements(asked: dict[str, object]) -> Requirements:
    """Raises BadFlag for what cannot be asked."""
    from shoal.market import Requirements

    try:
        return msgspec.convert(asked, Requirements)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].partition("`")[0].partition("[")[0]
        flag, takes = FLAGS[name]
        raise BadFlag(f"{flag} cannot be used as it stands: it takes {takes}.") from error


async def _measured(
    listings: list[Listing], wanted: Requirements, endpoint: Endpoint, directory: Directory, clock: Clock
) -> list[Listing]:
    """The round trips of those that would fit, however far they are."""
    from shoal.market import Listing, Wish, fitting
    from shoal.world.reach import reach_and_time

    here = msgspec.structs.replace(wanted, latency_max_ms=None)
    fit = frozenset(sorted(fitting(listings, Wish(here)))[:MEASURED_MAX])
    at_once = asyncio.Semaphore(ECHOES_AT_ONCE)

    async def measured(one: Listing) -> Listing:
        if one.node not in fit:
            return one
        async with at_once:
            try:
                _, took_ms = await reach_and_time(
                    one.node, one.offer, endpoint=endpoint, directory=directory, clock=clock,
                    deadline_s=ECHO_DEADLINE_S,
                )  # fmt: skip
            except ShoalError:
                return one
        return Listing(one.node, one.offer, took_ms, one.reputation)

    return list(await asyncio.gather(*(measured(one) for one in listings)))


def _ordered(board: Board, found: Match, sort: Order) -> list[int]:
    """One row of each node: of several devices that fit the fastest."""
    price, flops = board.number("price_micro_per_h"), board.number("flops")

    def key(row: int) -> tuple[float | str, ...]:
        name = board.listing(row).offer.name
        value = {
            Order.PRICE: price[row],
            Order.VALUE: -flops[row] / price[row] if price[row] else -math.inf,
            Order.FLOPS: -flops[row],
            Order.MEMORY: -board.number("memory_bytes")[row],
            Order.BANDWIDTH: -board.number("bandwidth_bytes_per_s")[row],
            Order.LATENCY: board.number("latency_ms")[row],
            Order.NAME: 0.0,
        }[sort]
        first: tuple[float | str, ...] = () if sort is Order.NAME else (float(value), -float(flops[row]))
        return (*first, name, board.listing(row).node.hex())

    return sorted(board.fastest(found.rows).tolist(), key=key)


def _table(board: Board, rows: list[int], *, far: bool, linked: bool) -> Table:
    """Only columns in which something stands."""
    listed = [board.listing(row) for row in rows]
    # There is no room for all; what a node measured is with its limit.
    limited = any(one.offer.capability.speed_limit < 1 for one in listed) and not (far and linked)
    placed = any(one.offer.place for one in listed) and far + linked + limited < 2
    engines = any(one.offer.engine for one in listed)
    currencies = {one.offer.price.currency for one in listed if one.offer.price and one.offer.price.micro_per_h}
    columns = [
        "node", "name", "device", "memory", "fastest", f"{next(iter(currencies))}/h" if len(currencies) == 1 else "price/h", *(["where"] if placed else []),
        *(["away"] if far else []), *(["to hub"] if linked else []), *(["limit"] if limited else []), "state",
        *(["engine"] if engines else []),
    ]  # fmt: skip
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        whole = column in ("node", "memory", "away", "limit", "state") or column.endswith("/h")
        table.add_column(column, no_wrap=whole, overflow="fold", min_width=None if whole else 9)
    kinds, names = list(board.texts("kind")), list(board.texts("device"))
    for row, one in zip(rows, listed, strict=True):
        offer = one.offer
        kind, name = kinds[board.texts("kind").rows[row]], names[board.texts("device").rows[row]]
        flops, place = board.number("flops")[row], offer.place
        table.add_row(
            one.node.hex()[:8],
            offer.name,
            escape(shown(f"{kind} {name}")),
            format_bytes(board.number("memory_bytes")[row]),
            format_flops(flops) if flops else "?",
            _price(offer, several=len(currencies) > 1),
            *([" ".join(part for part in ((place.country, place.region) if place else ()) if part)] if placed else []),
            *([f"{one.latency_ms:.1f} ms" if one.latency_ms is not None else "?"] if far else []),
            *([format_rate_bps(offer.capability.hub_rate_bps) if offer.capability.hub_rate_bps else "?"] if linked else []),
            *([f"{offer.capability.speed_limit:g}"] if limited else []),
            "busy" if offer.busy else "idle",
            *([escape(shown(offer.engine.model)) if offer.engine else ""] if engines else []),
        )  # fmt: skip
    return table


def _price(offer: Offer, *, several: bool) -> str:
    """An hour's; with its currency where there are several."""
    if offer.price is None or offer.price.micro_per_h == 0:
        return "free"
    return format_money(offer.price.micro_per_h) + (f" {offer.price.currency}" if several else "")


def _change_fields(one: Change) -> dict[str, object]:
    return {"requirement": one.name, "value": one.limit, "nodes": one.nodes, "sentence": one.sentence}


def _print_json(board: Board, found: Match, rows: list[int], mix: Cheapest | None) -> None:
    listed = [board.listing(row) for row in rows]
    print_json(
        {
            "offers": [{"node": one.node, "offer": one.offer, "latency_ms": one.latency_ms, "reputation": one.reputation} for one in listed],
            "considered": found.considered,
            "fit": found.nodes,
            "excluded": found.excluded,
            "changes": [_change_fields(one) for one in found.changes],
            "together": [_change_fields(one) for one in found.together],
            "reason": found.reason,
            "cheapest": mix and {
                "nodes": [board.listing(row).node for row in mix.rows],
                "micro_per_h": mix.micro_per_h,
                "currency": mix.currency,
                "reason": mix.reason,
            },
        }
    )  # fmt: skip
