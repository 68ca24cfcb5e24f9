"""What an auctioneer publishes of a batch, and whether it did as it had to.

`close` signs the set of orders of a batch and what follows from it, and puts both together with all orders
(`Published`); `verified` clears the batch again from that and names the first thing that differs. What a batch has to
know of those before is in there too (`Carried`), under a hash that the auctioneer signed with the Clearing before: so
one batch can be checked by itself, and all of them from the first. A service only has to collect orders and to sign.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord
from shoal.identity import ENVELOPE_OVERHEAD_BYTES, Envelope, KeyPair, blake3_hash, short_id
from shoal.market.batches import BEGINNING, BadBatch, Carried, Outcome, Signed, block_hash, clear, described, short
from shoal.protocol.messages import DEFAULT_NETWORK, open_record, sign
from shoal.protocol.orders import ORDER_MAX_BYTES, ORDERS_MAX, Batch, Cleared, Clearing, Trade, open_order
from shoal.quantities.money import format_money

FILE_MAX_BYTES = 48 * 1024 * 1024
_encoder = msgspec.msgpack.Encoder()


class Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shoal-batch/1"):
    """All that it takes to clear a batch again: what a `.batch` file holds, as msgpack."""

    carried: Carried
    previous: Annotated[bytes, Meta(max_length=Clearing.MAX_BYTES + ENVELOPE_OVERHEAD_BYTES)]
    """The Envelope of the Clearing before, which names the hash of `carried`; empty for the first batch."""
    batch: Annotated[bytes, Meta(max_length=Batch.MAX_BYTES + ENVELOPE_OVERHEAD_BYTES)]
    orders: Annotated[tuple[Annotated[bytes, Meta(max_length=ORDER_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES)], ...],
                      Meta(max_length=ORDERS_MAX)]  # fmt: skip
    clearing: Annotated[bytes, Meta(max_length=Clearing.MAX_BYTES + ENVELOPE_OVERHEAD_BYTES)]

    def to_bytes(self) -> bytes:
        return _encoder.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Published:
        """Parse without believing anything. Raises BadBatch."""
        if len(data) > FILE_MAX_BYTES:
            raise BadBatch(f"A batch of more than {FILE_MAX_BYTES} bytes was refused.")
        try:
            return _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadBatch(f"Bytes that should be a published batch are not one: {error}.") from error


_decoder = msgspec.msgpack.Decoder(Published)


def close(
    key: KeyPair,
    carried: Carried,
    previous: Envelope | None,
    orders: Iterable[Envelope],
    *,
    seed: bytes,
    next_seed: bytes,
    closed_ms: int,
    network: str = DEFAULT_NETWORK,
) -> tuple[Published, Carried]:
    """What an auctioneer publishes of a batch, and what the next one needs; `previous` is the Clearing of the one
    before. Raises BadBatch where it cannot be closed so, and what `open_order` does: what does not open must be kept
    out of a batch."""
    envelopes = {one.record_id: one for one in orders}
    if len(envelopes) > ORDERS_MAX:
        raise BadBatch(
            f"A batch takes {ORDERS_MAX} orders, not {len(envelopes)}; the others have to wait for the next."
        )
    signed = [_signed(one, network) for one in envelopes.values()]
    batch = Batch(
        number=carried.number + 1,
        previous=previous.record_id if previous else BEGINNING,
        closed_ms=closed_ms,
        orders=tuple(sorted(envelopes)),
        seed=seed,
        next_seed_hash=blake3_hash(next_seed),
    )
    envelope = sign(key, batch, network)
    outcome = clear(carried, batch, key.node_id, signed)
    clearing = Clearing(
        batch=envelope.record_id, cleared=outcome.cleared, left_out=outcome.left_out, after=outcome.after.hash()
    )
    published = Published(
        carried=carried,
        previous=previous.to_bytes() if previous else b"",
        batch=envelope.to_bytes(),
        orders=tuple(one.to_bytes() for one in envelopes.values()),
        clearing=sign(key, clearing, network).to_bytes(),
    )
    return published, outcome.after


@dataclass(frozen=True)
class Verified:
    """A batch whose clearing is right."""

    auctioneer: bytes
    batch: Batch
    clearing: bytes
    """Its id, which the next batch names."""
    carried: Carried
    orders: tuple[Signed, ...]
    outcome: Outcome


def verified(published: Published, network: str = DEFAULT_NETWORK) -> Verified:
    """Clear a batch again. Raises BadBatch, which names the first thing that differs, and what `open_record` does."""
    envelope = Envelope.from_bytes(published.batch, Batch.MAX_BYTES)
    batch = open_record(envelope, Batch, network)
    said = f"Batch {batch.number}"
    _check_previous(published, batch, envelope.signer, network)
    orders = []
    for data in published.orders:
        try:
            orders.append(_signed(Envelope.from_bytes(data, ORDER_MAX_BYTES), network))
        except BadRecord as error:
            raise BadBatch(f"{said} holds what is no order, and should have been kept out: {error.sentence}") from error
    outcome = clear(published.carried, batch, envelope.signer, orders)
    claimed = Envelope.from_bytes(published.clearing, Clearing.MAX_BYTES)
    clearing = open_record(claimed, Clearing, network)
    if claimed.signer != envelope.signer or clearing.batch != envelope.record_id:
        raise BadBatch(f"{said} comes with the clearing of another batch, or by another auctioneer.")
    difference = _difference(clearing, outcome)
    if difference:
        raise BadBatch(f"{said} was not cleared as follows from its orders. {difference}")
    return Verified(envelope.signer, batch, claimed.record_id, published.carried, tuple(orders), outcome)


def left_out(checked: Verified, order: Envelope, network: str = DEFAULT_NETWORK) -> tuple[bool, str]:
    """Whether an order that somebody has signed for a batch is missing in it; and what became, or would have become, of
    it. Raises what `open_order` does."""
    one, batch = _signed(order, network), checked.batch
    if one.id in checked.outcome.reasons:
        return False, f"Order {short(one.id)} is in batch {batch.number}: {checked.outcome.reasons[one.id]}"
    terms = one.order.terms
    if terms.auctioneer != checked.auctioneer or terms.batch != batch.number:
        return False, (
            f"Order {short(one.id)} is for batch {terms.batch} of {short_id(terms.auctioneer)}, not for this one, "
            f"{batch.number} of {short_id(checked.auctioneer)}."
        )
    with_it = msgspec.structs.replace(batch, orders=tuple(sorted((*batch.orders, one.id))))
    outcome = clear(checked.carried, with_it, checked.auctioneer, (*checked.orders, one))
    return True, (
        f"Order {short(one.id)} was signed for batch {batch.number} and is not in it: it came too late, or was left "
        f"out. With it, this would have become of it: {outcome.reasons[one.id]}"
    )


def _signed(envelope: Envelope, network: str) -> Signed:
    return Signed(envelope.record_id, envelope.signer, open_order(envelope, network))


def _check_previous(published: Published, batch: Batch, auctioneer: bytes, network: str) -> None:
    said = f"Batch {batch.number}"
    if not published.previous:
        if batch.previous != BEGINNING or published.carried != Carried():
            raise BadBatch(f"{said} comes without the clearing of the batch before it.")
        return
    envelope = Envelope.from_bytes(published.previous, Clearing.MAX_BYTES)
    previous = open_record(envelope, Clearing, network)
    if envelope.signer != auctioneer or envelope.record_id != batch.previous:
        raise BadBatch(f"{said} follows another clearing than the one that it comes with.")
    if previous.after != published.carried.hash():
        raise BadBatch(
            f"{said} comes with something else than the batch before it has left, by the hash that was signed."
        )


def _difference(claimed: Clearing, outcome: Outcome) -> str:
    """The first thing that a clearing says and does not follow, and why; nothing where all of it does."""
    says, follows = ({block_hash(one.block): one for one in cleared} for cleared in (claimed.cleared, outcome.cleared))
    for name in sorted(says.keys() | follows.keys()):
        said, right = says.get(name), follows.get(name)
        if said is None and right is not None:
            return f"It leaves a market out. {outcome.markets[name]}"
        if said is not None and right is None:
            why = outcome.markets.get(name, f"{described(said.block)}: no order counts.")
            return f"It says that blocks were traded where none are. {why}"
        if said is None or right is None or said == right:
            continue
        if said.price_micro != right.price_micro:
            return f"It says that the price is {_price(said)}, and {_price(right)} follows. {outcome.markets[name]}"
        pairs = enumerate(itertools.zip_longest(said.trades, right.trades), start=1)
        at, (trade, other) = next(one for one in pairs if one[1][0] != one[1][1])
        return f"Its trade {at} is {_trade(trade)}, and {_trade(other)} follows. {outcome.markets[name]}"
    fates, right_fates = ({one.order: one.why for one in some} for some in (claimed.left_out, outcome.left_out))
    for order in sorted(fates.keys() | right_fates.keys()):
        if fates.get(order) != right_fates.get(order):
            reason = outcome.reasons.get(order, "It is not in the batch.")
            said_of_it, right_of_it = fates.get(order, "all of it"), right_fates.get(order, "all of it")
            return f"It says {said_of_it!r} of order {short(order)}, and {right_of_it!r} follows. {reason}"
    if (claimed.cleared, claimed.left_out) != (outcome.cleared, outcome.left_out):
        return "It names a market or an order twice, or out of order."
    if claimed.after != outcome.after.hash():
        return "What it leaves to the next batch is something else: who holds which block, by its hash."
    return ""


def _price(cleared: Cleared) -> str:
    return f"{format_money(cleared.price_micro)} {cleared.block.ledger.currency}"


def _trade(trade: Trade | None) -> str:
    if trade is None:
        return "none"
    return f"node {short_id(trade.node)} from {short_id(trade.seller)} to {short_id(trade.buyer)}"
