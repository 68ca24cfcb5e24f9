"""Batches of orders: which count, who holds what, and whatever an auctioneer does otherwise is found and named."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.errors import BadRecord
from shoal.identity import BadSignature, Envelope, KeyPair, blake3_hash
from shoal.market.batches import (
    HELD_MAX,
    HORIZON_MS,
    BadBatch,
    Carried,
    Gathering,
    Held,
    Outcome,
    Signed,
    block_hash,
    clear,
)
from shoal.market.publishing import Published, Verified, close, left_out, verified
from shoal.protocol.messages import BadMessage, encode, open_record, sign
from shoal.protocol.money import HouseLedger
from shoal.protocol.orders import (
    BID_BLOCKS_MAX,
    HOUR_MS,
    ORDERS_MAX,
    RESALE_BLOCKS_MAX,
    SOLD_MAX,
    Ask,
    BadOrder,
    Batch,
    Bid,
    Block,
    Cleared,
    Clearing,
    LeftOut,
    NodeClass,
    OrderTerms,
    Purchase,
    Resale,
    Trade,
    closed_twice,
    open_order,
)
from shoal.protocol.prices import PRICE_MAX_MICRO_PER_H

AUCTIONEER, OTHER, ANN, BEN, CAT, DAN, *NODES = (KeyPair.from_seed(bytes([number] * 32)) for number in range(12))
LEDGER = HouseLedger(AUCTIONEER.node_id, "USD")
H100 = NodeClass(device="H100", memory_gib=80, country="DE")
BLOCK = Block(of=H100, start_ms=500_000 * HOUR_MS, ledger=LEDGER)
LATER = replace(BLOCK, start_ms=BLOCK.start_ms + HOUR_MS)
NOON = BLOCK.start_ms - 2 * HOUR_MS


class Auctioneer:
    """One that closes a batch a second; the first has no orders."""

    def __init__(self) -> None:
        self.carried = Carried()
        self.previous: Envelope | None = None
        self.published: list[Published] = []
        self.close()

    @property
    def number(self) -> int:
        return self.carried.number + 1

    def close(self, *orders: Envelope, **changed: Any) -> Published:
        usual = {
            "seed": bytes([self.number]) * 32, "next_seed": bytes([self.number + 1]) * 32,
            "closed_ms": NOON + 1000 * self.number,
        }  # fmt: skip
        published, self.carried = close(AUCTIONEER, self.carried, self.previous, orders, **{**usual, **changed})
        self.previous = Envelope.from_bytes(published.clearing, Clearing.MAX_BYTES)
        self.published.append(published)
        return published

    def terms(self, limit: int, **changed: Any) -> OrderTerms:
        usual: dict[str, Any] = {
            "auctioneer": AUCTIONEER.node_id, "batch": self.number, "sequence": 1, "block": BLOCK, "limit_micro": limit,
            "expires_ms": LATER.start_ms,
        }  # fmt: skip
        return OrderTerms(**{**usual, **changed})

    def bid(self, key: KeyPair, limit: int, blocks: int = 1, **changed: Any) -> Envelope:
        return sign(key, Bid(terms=self.terms(limit, **changed), blocks=blocks, escrow=bytes(32)))

    def ask(self, key: KeyPair, limit: int, **changed: Any) -> Envelope:
        return sign(key, Ask(terms=self.terms(limit, **changed), payee=key.node_id[:20]))

    def resale(self, key: KeyPair, limit: int, *purchases: tuple[int, KeyPair], **changed: Any) -> Envelope:
        named = tuple(Purchase(batch, node.node_id) for batch, node in purchases)
        return sign(key, Resale(terms=self.terms(limit, **changed), purchases=named))

    def usual(self) -> list[Envelope]:
        """Three nodes sell, three buy: 0.30, of the ask that comes next, is what two of them pay."""
        return [
            self.bid(ANN, 500_000), self.bid(BEN, 400_000), self.bid(CAT, 100_000),
            *(self.ask(node, limit) for node, limit in zip(NODES, (100_000, 200_000, 300_000), strict=False)),
        ]  # fmt: skip


def reasons(published: Published) -> dict[bytes, str]:
    return dict(verified(published).outcome.reasons)


def why(published: Published) -> dict[bytes, str]:
    return {one.order: one.why for one in verified(published).outcome.left_out}


# --- what a batch comes to -------------------------------------------------------------------------------------------


def test_a_batch_gives_each_buyer_a_node_at_one_price_and_everybody_a_reason() -> None:
    market = Auctioneer()
    orders = market.usual()
    checked = verified(market.close(*orders))
    [cleared] = checked.outcome.cleared
    assert (cleared.block, cleared.price_micro) == (BLOCK, 300_000)
    assert {trade.buyer for trade in cleared.trades} == {ANN.node_id, BEN.node_id}
    assert {trade.node for trade in cleared.trades} == {node.node_id for node in NODES[:2]}
    assert all(trade.seller == trade.node for trade in cleared.trades)
    assert checked.outcome.markets[block_hash(BLOCK)] == (
        "H100 80 GiB, DE, open, 2027-01-15T08:00 UTC: 3 bids for 3 blocks, 3 asks of 3; 2 would trade. The price is "
        "0.30 USD, taken from the ask that would come next, and this order is left out, so that nobody who trades sets "
        "the price: 2 are traded."
    )
    assert set(checked.outcome.reasons) == {one.record_id for one in orders}
    assert checked.outcome.reasons[orders[0].record_id] == "1 of 1 blocks. The price is 0.30 USD."
    assert {one.order: one.why for one in checked.outcome.left_out} == {
        orders[2].record_id: "limit", orders[5].record_id: "sets-price",
    }  # fmt: skip
    assert {(one.node, one.holder) for one in market.carried.held} == {
        (trade.node, trade.buyer) for trade in cleared.trades
    }


@settings(max_examples=30)
@given(st.data())
def test_in_which_order_they_come_changes_nothing(data: st.DataObject) -> None:
    one, other = Auctioneer(), Auctioneer()
    orders = [*one.usual(), one.ask(NODES[3], 300_000), one.bid(DAN, 400_000, 3), one.bid(ANN, 1, sequence=0)]
    assert one.close(*orders).clearing == other.close(*data.draw(st.permutations(orders))).clearing


def test_lots_are_the_same_whatever_an_order_says_and_nobody_knows_them_before() -> None:
    def who_gets_it(limit: int, seed: int) -> set[bytes]:
        """Of four who bid as much for one block."""
        market = Auctioneer()
        market.close(next_seed=bytes([seed]) * 32)
        bids = [market.bid(key, limit, sequence=limit) for key in (ANN, BEN, CAT, DAN)]
        asks = [market.ask(NODES[0], 5), market.ask(NODES[1], 7)]
        [cleared] = verified(market.close(*bids, *asks, seed=bytes([seed]) * 32)).outcome.cleared
        return {trade.buyer for trade in cleared.trades}

    for seed in range(8):
        assert len({frozenset(who_gets_it(limit, seed)) for limit in (10, 11, 12)}) == 1
    assert len({frozenset(who_gets_it(10, seed)) for seed in range(12)}) > 1


def test_classes_hours_and_ledgers_are_markets_of_their_own() -> None:
    market = Auctioneer()
    blocks = [
        BLOCK, LATER, replace(BLOCK, of=replace(H100, country=None)), replace(BLOCK, of=replace(H100, memory_gib=94)),
        replace(BLOCK, ledger=HouseLedger(AUCTIONEER.node_id, "EUR")),
    ]  # fmt: skip
    bids = [market.bid(key, 9, block=block, sequence=2) for block in blocks for key in (ANN, BEN)]
    asks = [market.ask(node, 5, block=BLOCK) for node in NODES[:2]]
    outcome = verified(market.close(*bids, *asks)).outcome
    assert [(cleared.block, len(cleared.trades)) for cleared in outcome.cleared] == [(BLOCK, 1)]
    assert len(outcome.markets) == len(blocks)


# --- orders that do not count ----------------------------------------------------------------------------------------


def test_an_order_is_good_for_one_batch_of_one_auctioneer() -> None:
    market = Auctioneer()
    old = market.usual()
    market.close(*old)
    replayed = market.close(*old)
    assert set(why(replayed).values()) == {"other-batch"}
    assert reasons(replayed)[old[0].record_id] == "It is for batch 2; this is 3. Sign another one for the next."
    elsewhere = market.bid(ANN, 5, auctioneer=OTHER.node_id)
    published = market.close(elsewhere)
    assert why(published) == {elsewhere.record_id: "elsewhere"}
    assert reasons(published)[elsewhere.record_id].startswith("It is for the auctioneer ")


def test_an_order_expires_also_while_its_batch_is_kept_open() -> None:
    market = Auctioneer()
    orders = [market.bid(ANN, 5, expires_ms=NOON + ahead) for ahead in (1999, 2000)]
    published = market.close(*orders[:1], market.ask(BEN, 5), closed_ms=NOON + 2000)
    assert why(published)[orders[0].record_id] == "expired"
    assert reasons(published)[orders[0].record_id] == "It had expired 1 ms before the batch was closed."
    market = Auctioneer()
    assert why(market.close(orders[1], closed_ms=NOON + 2000)) == {orders[1].record_id: "limit"}


def test_an_hour_that_has_begun_or_is_far_ahead_is_not_traded() -> None:
    market = Auctioneer()
    starts = [BLOCK.start_ms + ahead for ahead in (0, HORIZON_MS, HORIZON_MS + HOUR_MS)]
    orders = [market.bid(ANN, 5, block=replace(BLOCK, start_ms=start)) for start in starts]
    published = market.close(*orders, closed_ms=BLOCK.start_ms)
    assert [why(published)[one.record_id] for one in orders] == ["begun", "limit", "too-far"]


def test_of_several_orders_for_one_block_the_highest_sequence_counts() -> None:
    market = Auctioneer()
    orders = [
        market.bid(ANN, 5, sequence=1), market.bid(ANN, 6, sequence=3),
        market.resale(ANN, 6, (1, NODES[0]), sequence=2),
    ]  # fmt: skip
    published = market.close(*orders)
    assert [why(published)[one.record_id] for one in orders] == ["replaced", "limit", "not-held"]
    orders = [market.bid(ANN, limit, sequence=2, block=block) for limit, block in ((5, BLOCK), (6, BLOCK), (6, LATER))]
    published = market.close(*orders)
    assert [why(published)[one.record_id] for one in orders] == ["twice", "twice", "limit"]
    assert "Give each a higher sequence" in reasons(published)[orders[0].record_id]


def test_a_node_sells_its_hour_once_whatever_the_class() -> None:
    market = Auctioneer()
    anywhere = replace(BLOCK, of=replace(H100, country=None))
    asks = [market.ask(NODES[0], 5, sequence=1), market.ask(NODES[0], 5, sequence=2, block=anywhere)]
    bids = [market.bid(key, 9, block=block) for key in (ANN, BEN) for block in (BLOCK, anywhere)]
    published = market.close(*asks, *bids)
    assert why(published)[asks[0].record_id] == "replaced"
    assert [one.node for one in market.carried.held] == [NODES[0].node_id]
    again = market.ask(NODES[0], 5)
    published = market.close(again, market.ask(NODES[0], 5, block=LATER))
    assert why(published)[again.record_id] == "sold"
    holder = market.carried.held[0].holder.hex()[:8]
    assert reasons(published)[again.record_id] == (
        f"This hour of node {NODES[0].node_id.hex()[:8]} was sold in batch 2; {holder} has it."
    )


def bought(market: Auctioneer) -> tuple[KeyPair, KeyPair]:
    """Somebody who holds a block of a node, and the node."""
    market.close(*market.usual())
    held = market.carried.held[0]
    return next(key for key in (ANN, BEN) if key.node_id == held.holder), next(
        node for node in NODES if node.node_id == held.node
    )


def test_who_has_bought_a_block_sells_it_on_once() -> None:
    market = Auctioneer()
    holder, node = bought(market)
    low = market.resale(holder, 299_999, (2, node))
    published = market.close(low, market.bid(CAT, 900_000), market.bid(DAN, 900_000))
    assert why(published)[low.record_id] == "under-price"
    assert "was promised 0.30 for this hour, and would get as little as 0.299999" in reasons(published)[low.record_id]
    market.close(market.resale(holder, 300_000, (2, node)), market.bid(CAT, 900_000), market.bid(DAN, 900_000))
    [again] = [one for one in market.carried.held if one.node == node.node_id]
    assert again.batch == 4 and again.holder in (CAT.node_id, DAN.node_id)
    assert (again.price_micro, again.payee) == (900_000, node.node_id[:20])
    twice = market.resale(holder, 300_000, (2, node))
    published = market.close(twice, market.bid(OTHER, 900_000), market.bid(AUCTIONEER, 900_000))
    assert why(published)[twice.record_id] == "not-held"
    assert reasons(published)[twice.record_id] == (
        f"This hour of node {node.node_id.hex()[:8]} is held by {again.holder.hex()[:8]} since batch 4; "
        f"{holder.node_id.hex()[:8]} cannot sell it."
    )
    new = next(key for key in (CAT, DAN) if key.node_id == again.holder)
    market.close(market.resale(new, 900_000, (4, node)), market.bid(OTHER, 950_000), market.bid(AUCTIONEER, 950_000))
    assert market.carried.held[0].batch == 6 or market.carried.held[1].batch == 6


def test_what_somebody_does_not_hold_it_cannot_sell() -> None:
    market = Auctioneer()
    holder, node = bought(market)
    anywhere = replace(BLOCK, of=replace(H100, country=None))
    refused = {
        market.resale(DAN, 5, (2, node)): "is held by",
        market.resale(holder, 5, (2, NODES[3])): "was not sold in an earlier batch.",
        market.resale(holder, 5, (2, node), block=LATER): "was not sold in an earlier batch.",
        market.resale(holder, 5, (1, node)): "in batch 2, not in 1.",
        market.resale(holder, 5, (2, node), block=anywhere): "bought as of another class",
        market.resale(holder, 5, (2, node), (2, node)): "It names one block twice.",
    }
    published = market.close(*refused)
    for order, sentence in refused.items():
        assert why(published)[order.record_id] == "not-held"
        assert sentence in reasons(published)[order.record_id]


def test_only_so_many_blocks_are_sold_ahead() -> None:
    nodes = (number.to_bytes(32) for number in range(HELD_MAX - 1))
    held = tuple(Held(BLOCK.start_ms, node, ANN.node_id, 1, block_hash(BLOCK), 5, bytes(20)) for node in nodes)
    market = Auctioneer()
    carried = replace(market.carried, held=held)
    asks = [market.ask(node, 5) for node in NODES[:3]]
    signed = [Signed(one.record_id, one.signer, open_order(one)) for one in asks]
    batch = Batch(
        number=2, previous=bytes(32), closed_ms=NOON + 2000, orders=tuple(sorted(one.id for one in signed)),
        seed=bytes([2]) * 32, next_seed_hash=bytes(32),
    )  # fmt: skip
    outcome = clear(carried, batch, AUCTIONEER.node_id, signed)
    assert sorted(one.why for one in outcome.left_out) == ["limit", "no-room", "no-room"]


def altered(order: Envelope, key: KeyPair, **changed: Any) -> Envelope:
    """With other figures than its type allows."""
    record = open_order(order)
    terms = {name: changed.pop(name) for name in ("limit_micro", "sequence", "batch") if name in changed}
    return sign(key, replace(record, terms=replace(record.terms, **terms), **changed))


def test_figures_that_cannot_be_are_refused() -> None:
    market = Auctioneer()
    bid, ask, resale = market.bid(ANN, 5), market.ask(ANN, 5), market.resale(ANN, 5, (1, NODES[0]))
    purchase = Purchase(1, bytes(32))
    bad = [
        *(altered(one, ANN, limit_micro=limit)
          for one in (bid, ask, resale) for limit in (0, -1, PRICE_MAX_MICRO_PER_H + 1, 1 << 63)),
        *(altered(bid, ANN, blocks=blocks) for blocks in (0, -1, BID_BLOCKS_MAX + 1)),
        *(altered(resale, ANN, purchases=some) for some in ((), (purchase,) * (RESALE_BLOCKS_MAX + 1))),
        altered(bid, ANN, sequence=-1), altered(bid, ANN, batch=0),
        market.bid(ANN, 5, block=replace(BLOCK, start_ms=BLOCK.start_ms + 1)),
    ]  # fmt: skip
    for order in bad:
        with pytest.raises(BadMessage):
            open_order(order)
    with pytest.raises(BadOrder, match=r"'market\.batch' record came where an order was expected"):
        open_order(Envelope.from_bytes(market.published[0].batch, Batch.MAX_BYTES))


def test_what_does_not_open_stays_out_of_a_batch() -> None:
    market = Auctioneer()
    forged = msgspec.structs.replace(market.bid(ANN, 5), signer=BEN.node_id)
    with pytest.raises(BadSignature):
        market.close(forged)


def test_there_is_room_for_all_that_a_batch_may_come_to() -> None:
    of = NodeClass(device="x" * 96, devices=64, memory_gib=1 << 20, tier="sandboxed", country="DE")
    block = Block(of=of, start_ms=BLOCK.start_ms, ledger=HouseLedger(bytes(32), "A" * 12))
    trades = (Trade(bytes(32), bytes(32), bytes(32), bytes(20)),) * (SOLD_MAX // ORDERS_MAX)
    cleared = (Cleared(block=block, price_micro=PRICE_MAX_MICRO_PER_H, trades=trades),) * ORDERS_MAX
    left = tuple(LeftOut(number.to_bytes(32), "other-batch") for number in range(ORDERS_MAX))
    encode(Clearing(batch=bytes(32), cleared=cleared, left_out=left, after=bytes(32)))
    ids = tuple(number.to_bytes(32) for number in range(ORDERS_MAX))
    encode(Batch(number=1, previous=bytes(32), closed_ms=0, orders=ids, seed=bytes(32), next_seed_hash=bytes(32)))
    resale = Resale(
        terms=OrderTerms(
            auctioneer=bytes(32), batch=1 << 53, sequence=1 << 53, block=block, limit_micro=10**12, expires_ms=1 << 53
        ),
        purchases=(Purchase(1 << 53, bytes(32)),) * RESALE_BLOCKS_MAX,
    )
    encode(resale)


@settings(max_examples=60)
@given(st.data())
def test_no_block_has_two_holders_and_only_its_holder_sells_it(data: st.DataObject) -> None:
    market = Auctioneer()
    sold: set[tuple[int, bytes]] = set()
    holder: dict[tuple[int, bytes], bytes] = {}
    price: dict[tuple[int, bytes], int] = {}
    traders = [ANN, BEN, CAT, DAN]
    for _ in range(data.draw(st.integers(1, 4))):
        orders = []
        for _ in range(data.draw(st.integers(0, 14))):
            more = {"block": data.draw(st.sampled_from([BLOCK, LATER])), "sequence": data.draw(st.integers(0, 3))}
            limit, key, node = data.draw(st.tuples(st.integers(1, 9), st.sampled_from(traders), st.sampled_from(NODES)))
            kind = data.draw(st.sampled_from(["ask", "bid", "resale"]))
            if kind == "ask":
                orders.append(market.ask(node, limit, **more))
            elif kind == "bid":
                orders.append(market.bid(key, limit, data.draw(st.integers(1, 3)), **more))
            else:
                batches = st.integers(1, market.number)
                orders.append(
                    market.resale(key, limit, *((data.draw(batches), one) for one in {node, NODES[0]}), **more)
                )
        outcome = verified(market.close(*orders)).outcome
        for cleared in outcome.cleared:
            for trade in cleared.trades:
                at = (cleared.block.start_ms, trade.node)
                if trade.seller == trade.node:
                    assert at not in sold
                    sold.add(at)
                else:
                    assert holder[at] == trade.seller
                assert trade.buyer != trade.seller and trade.payee == trade.node[:20]
                assert cleared.price_micro >= price.get(at, 0), "what a node was promised it gets"
                price[at] = cleared.price_micro
        for cleared in outcome.cleared:
            holder |= {(cleared.block.start_ms, trade.node): trade.buyer for trade in cleared.trades}
        assert {(one.start_ms, one.node): one.holder for one in market.carried.held} == holder
        assert set(outcome.reasons) == {one.record_id for one in orders}


# --- what an auctioneer does otherwise -------------------------------------------------------------------------------


def claimed(published: Published, **changed: Any) -> Published:
    """With a clearing that says something else, signed by the auctioneer."""
    clearing = open_record(Envelope.from_bytes(published.clearing, Clearing.MAX_BYTES), Clearing)
    return replace(published, clearing=sign(AUCTIONEER, replace(clearing, **changed)).to_bytes())


def test_a_clearing_that_does_not_follow_is_named_with_the_first_thing_that_differs() -> None:
    market = Auctioneer()
    orders = market.usual()
    published = market.close(*orders)
    outcome: Outcome = verified(published).outcome
    [cleared] = outcome.cleared
    first, second = cleared.trades
    lies: list[tuple[dict[str, Any], str]] = [
        ({"cleared": (replace(cleared, price_micro=310_000),)},
         r"says that the price is 0\.31 USD, and 0\.30 USD follows\. H100"),
        ({"cleared": (replace(cleared, trades=(first, replace(second, node=NODES[2].node_id))),)},
         f"Its trade 2 is node {NODES[2].node_id.hex()[:8]} from .* follows. H100"),
        ({"cleared": (replace(cleared, trades=(first,)),)}, "Its trade 2 is none, and node .* follows"),
        ({"cleared": (replace(cleared, trades=(first, second, first)),)}, "Its trade 3 is node .*, and none follows"),
        ({"cleared": ()}, "leaves a market out. H100 .* 2 are traded"),
        ({"cleared": (cleared, replace(cleared, block=LATER))},
         "blocks were traded where none are. H100 .* no order counts"),
        ({"cleared": (cleared, cleared)}, "names a market or an order twice"),
        ({"left_out": outcome.left_out[1:]}, "It says 'all of it' of order .* follows"),
        ({"left_out": (*outcome.left_out, LeftOut(orders[0].record_id, "lot"))},
         "It says 'lot' of order .* 'all of it' follows"),
        ({"after": bytes(32)}, "What it leaves to the next batch is something else"),
        ({"batch": bytes(32)}, "the clearing of another batch"),
    ]  # fmt: skip
    for changed, sentence in lies:
        with pytest.raises(BadBatch, match=sentence):
            verified(claimed(published, **changed))


def batch_of(published: Published) -> Batch:
    return open_record(Envelope.from_bytes(published.batch, Batch.MAX_BYTES), Batch)


def test_a_batch_that_does_not_follow_the_one_before_is_named() -> None:
    market = Auctioneer()
    market.close(*market.usual())
    published = market.close(*market.usual())
    before = market.published[1]
    batch, orders = batch_of(published), published.orders

    def signed(**changed: Any) -> bytes:
        return sign(AUCTIONEER, replace(batch, **changed)).to_bytes()

    forgotten = replace(published.carried, held=())
    lies: list[tuple[dict[str, Any], str]] = [
        ({"carried": forgotten}, "something else than the batch before it has left"),
        ({"previous": before.previous}, "follows another clearing"),
        ({"previous": b"", "carried": Carried()}, "comes without the clearing of the batch before"),
        ({"batch": signed(seed=bytes(32))}, "another seed than the batch before it has promised"),
        ({"batch": signed(number=4)}, "Batch 4 does not follow batch 2"),
        ({"batch": signed(closed_ms=published.carried.closed_ms)}, "Batch 3 was closed at"),
        ({"batch": signed(orders=batch.orders[1:])}, "does not name an order that came with it"),
        ({"batch": signed(orders=batch.orders[::-1])}, "once each, in ascending order"),
        ({"orders": orders[1:]}, "names an order that is not there"),
        ({"orders": (orders[0][:-9] + bytes(9), *orders[1:])}, "holds what is no order, and should have been kept out"),
        ({"batch": sign(OTHER, batch).to_bytes()}, "follows another clearing"),
        ({"clearing": before.clearing}, "the clearing of another batch"),
    ]  # fmt: skip
    for changed, sentence in lies:
        with pytest.raises(BadBatch, match=sentence):
            verified(replace(published, **changed))
    with pytest.raises(BadBatch, match="Batch 1 has orders"):
        close(
            AUCTIONEER, Carried(), None, [market.bid(ANN, 1)],
            seed=bytes(32), next_seed=bytes(32), closed_ms=NOON,
        )  # fmt: skip


def test_every_batch_of_a_chain_is_right_and_names_the_one_before() -> None:
    market = Auctioneer()
    for _ in range(3):
        market.close(*market.usual())
    chain: list[Verified] = [verified(Published.from_bytes(one.to_bytes())) for one in market.published]
    assert [one.batch.number for one in chain] == [1, 2, 3, 4]
    assert [one.batch.previous for one in chain] == [bytes(32), *(one.clearing for one in chain[:-1])]
    assert [blake3_hash(one.batch.seed) for one in chain[1:]] == [one.batch.next_seed_hash for one in chain[:-1]]


def test_an_order_that_is_missing_is_told_with_what_it_would_have_come_to() -> None:
    market = Auctioneer()
    orders = market.usual()
    late = market.ask(NODES[3], 50_000)
    checked = verified(market.close(*orders))
    assert left_out(checked, orders[0]) == (
        False, f"Order {orders[0].record_id.hex()[:12]} is in batch 2: 1 of 1 blocks. The price is 0.30 USD.",
    )  # fmt: skip
    assert left_out(checked, late) == (
        True,
        f"Order {late.record_id.hex()[:12]} was signed for batch 2 and is not in it: it came too late, or was left "
        "out. With it, this would have become of it: 1 of 1 blocks. The price is 0.20 USD.",
    )
    missing, sentence = left_out(checked, market.bid(ANN, 5))
    assert not missing and " is for batch 3 of " in sentence
    with pytest.raises(BadSignature):
        left_out(checked, msgspec.structs.replace(late, signer=ANN.node_id))


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    with pytest.raises(BadBatch, match="should be a published batch"):
        Published.from_bytes(data)


@settings(max_examples=100)
@given(st.integers(0, 1 << 20), st.integers(1, 255))
def test_no_altered_byte_goes_unnoticed(at: int, mask: int) -> None:
    market = Auctioneer()
    data = bytearray(market.close(*market.usual()).to_bytes())
    right = Published.from_bytes(bytes(data))
    data[at % len(data)] ^= mask
    try:
        changed = Published.from_bytes(bytes(data))
        verified(changed)
    except BadRecord:
        return
    assert changed == right


# --- while a batch is open, and after it was closed -------------------------------------------------------------------


@settings(max_examples=200)
@given(st.data())
def test_what_is_taken_counts_when_its_batch_is_closed_and_what_is_refused_would_not(data: st.DataObject) -> None:
    """But for what its own trader replaced. Two nodes have sold an hour before."""
    market = Auctioneer()
    market.close(*market.usual())
    closes_ms = NOON + 1000 * market.number
    gathering = Gathering(market.carried, AUCTIONEER.node_id)
    orders = [
        data.draw(st.sampled_from([
            lambda limit, **changed: market.bid(data.draw(st.sampled_from([ANN, BEN])), limit, **changed),
            lambda limit, **changed: market.ask(data.draw(st.sampled_from(NODES[:4])), limit, **changed),
            lambda limit, **changed: market.resale(
                ANN, limit, (2, data.draw(st.sampled_from(NODES[:3]))), **changed
            ),
        ]))(
            data.draw(st.sampled_from([200_000, 300_000])),
            sequence=data.draw(st.integers(0, 2)),
            block=data.draw(st.sampled_from([BLOCK, LATER, replace(BLOCK, of=replace(H100, country="FR"))])),
            batch=data.draw(st.sampled_from([market.number] * 5 + [2])),
            expires_ms=data.draw(st.sampled_from([LATER.start_ms] * 5 + [closes_ms - 1])),
        )
        for _ in range(data.draw(st.integers(1, 12)))
    ]  # fmt: skip
    taken: dict[bytes, Envelope] = {}
    refused: dict[bytes, Envelope] = {}
    for envelope in orders:
        one = Signed(envelope.record_id, envelope.signer, open_order(envelope))
        if one.id in taken:
            continue
        if gathering.refusal(one, closes_ms) is None:
            gathering.add(one)
            taken[one.id] = envelope
        else:
            refused[one.id] = envelope
    before, previous = market.carried, market.previous
    assert set(why(market.close(*taken.values())).values()) <= {"replaced", "limit", "sets-price", "lot"}
    for name, envelope in refused.items():
        market.carried, market.previous = before, previous
        fate = why(market.close(*taken.values(), envelope))[name]
        assert fate not in {"limit", "sets-price", "lot", "no-room"}


def test_two_batches_of_one_number_convict_their_auctioneer() -> None:
    def closed(published: Published) -> Envelope:
        return Envelope.from_bytes(published.batch, Batch.MAX_BYTES)

    market, twin = Auctioneer(), Auctioneer()
    one, other = closed(market.close(*market.usual())), closed(twin.close(*twin.usual()[:4]))
    said = closed_twice(one, other)
    assert said is not None and "has closed batch 2 twice: with 6 orders" in said and "and with 4 orders" in said
    assert closed_twice(other, one) is not None
    assert closed_twice(one, one) is None
    assert closed_twice(one, closed(market.close(*market.usual()))) is None, "of two numbers"
    somebody = sign(OTHER, open_record(other, Batch))
    assert closed_twice(one, somebody) is None, "by two auctioneers"
    with pytest.raises(BadSignature):
        closed_twice(one, replace(somebody, signer=AUCTIONEER.node_id))
    with pytest.raises(BadRecord):
        closed_twice(one, Envelope.from_bytes(market.published[-1].clearing, Clearing.MAX_BYTES))
