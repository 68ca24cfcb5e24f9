"""Holds: a node's signed word that it keeps a place for somebody, at a price, until a moment.

A node alone sells its capacity. It has one or more slots, each good for one piece of work at a time, and signs a Hold
before it says yes to anybody; hubs only say who is there. First a slot is held for some seconds, so that a client can
hold all nodes of a gang before it sets money aside; once there is an escrow the node signs another Hold, which names
it, and further ones for as long as the client asks for them: a client that is gone keeps no node for long. Two Holds
that promise one slot to two clients at once are a contradiction that anybody can check (`sold_twice`). An owner who
wants the machine back says so beforehand, as long as the Hold names: the node signs a Reclaim for each client.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from shoal.errors import BadRecord
from shoal.identity import Envelope, Hash, NodeId, hash_of_parts, short_id
from shoal.identity.accounts import AccountSignature, Address
from shoal.protocol.messages import DEFAULT_NETWORK, Message, Record, open_record
from shoal.protocol.money import Amount, LedgerName, SignedVoucher
from shoal.protocol.offers import ReclaimNoticeMs, UnixMs
from shoal.protocol.prices import Price

SLOTS_MAX = 64
RELEASES_MAX = 32
"""Of clients that gave a slot back early, as a new Hold of it names them."""
HOLD_MAX_MS = 60_000
"""Without an escrow."""
LEASE_STEP_MS = 600_000
"""With one; then the client asks again."""
RELEASE_MAX_BYTES = DEPUTY_MAX_BYTES = RECLAIM_MAX_BYTES = 512
Work = Literal["train", "serve"]
Slot = Annotated[int, Meta(ge=0, lt=SLOTS_MAX)]
HoldNumber = Annotated[int, Meta(ge=1, le=1 << 53)]


class BadHold(BadRecord):
    """A hold is not what was asked for, or a node's answer is not a hold of its own."""

    code = "SH-285"


class Release(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The client that signs this gives its place back: its Holds of this slot up to this number count no more."""

    KIND: ClassVar[str] = "hold.released"
    MAX_BYTES: ClassVar[int] = 128

    node: NodeId
    slot: Slot
    number: HoldNumber


class Deputy(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The client that signs this lets `driver` ask for places, take them and give them back in its name: the drivers of
    one job follow one another, and its places stay."""

    KIND: ClassVar[str] = "hold.deputy"
    MAX_BYTES: ClassVar[int] = 128

    driver: NodeId


DeputyBytes = Annotated[bytes, Meta(max_length=DEPUTY_MAX_BYTES)]
"""An Envelope of a Deputy: whoever sends it acts for the client that signed it."""


class Hold(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The node that signs this keeps `slot` for `client`, from and until those moments of its own clock, for no more
    than this price."""

    KIND: ClassVar[str] = "hold"
    MAX_BYTES: ClassVar[int] = 20 * 1024

    slot: Slot
    number: HoldNumber
    """Each of the node's Holds has a higher one than those before."""
    client: NodeId
    work: Work
    from_ms: UnixMs
    until_ms: UnixMs
    price: Price
    ledger: LedgerName
    payer: Address
    payee: Address
    escrow: Hash | None = None
    """None: no money is set aside yet."""
    reclaim_notice_ms: ReclaimNoticeMs = 0
    """So long before the node's owner takes it back, this client hears of it."""
    released: Annotated[tuple[Annotated[bytes, Meta(max_length=RELEASE_MAX_BYTES)], ...],
                        Meta(max_length=RELEASES_MAX)] = ()  # fmt: skip
    """Envelopes of Releases: by those who held the slot before this, and would hold it still."""


class Reclaim(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The owner of the node that signs this takes it back: at `until_ms` of the node's own clock, what it keeps for
    `client` ends."""

    KIND: ClassVar[str] = "hold.reclaimed"
    MAX_BYTES: ClassVar[int] = 128

    client: NodeId
    from_ms: UnixMs
    """When this was said first: the notice runs from then."""
    until_ms: UnixMs


class HoldAsk(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `hold.ask`, client to node: keep a place. The reply is HoldGiven."""

    KIND: ClassVar[str] = "hold.ask"
    MAX_BYTES: ClassVar[int] = 1024

    work: Work
    payer: Address
    price: Price
    """As the node's offer says it: where it asks for more by now, it refuses."""
    ledger: LedgerName
    lifetime_ms: Annotated[int, Meta(ge=1000, le=HOLD_MAX_MS)]
    deputy: DeputyBytes | None = None


class HoldGiven(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 22 * 1024

    hold: Annotated[bytes, Meta(max_length=21 * 1024)]
    """An Envelope of a Hold."""


class HoldTake(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `hold.take`, client to node: there is money for the place that it holds. The node asks the ledger, and
    replies with HoldGiven: the place is the client's for LEASE_STEP_MS more, or until the escrow ends."""

    KIND: ClassVar[str] = "hold.take"
    MAX_BYTES: ClassVar[int] = 1024

    escrow: Hash
    signature: AccountSignature
    """Of PayingFor, that the escrow pays for this client."""
    deputy: DeputyBytes | None = None


class HoldRelease(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `hold.release`, client to node. The reply is Done."""

    KIND: ClassVar[str] = "hold.release"
    MAX_BYTES: ClassVar[int] = 2048

    release: Annotated[bytes, Meta(max_length=RELEASE_MAX_BYTES)]
    """An Envelope of a Release."""
    deputy: DeputyBytes | None = None


class HoldReclaim(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `hold.reclaim`, node to client: the place that it took ends soon. The reply is Done."""

    KIND: ClassVar[str] = "hold.reclaim"
    MAX_BYTES: ClassVar[int] = 1024

    reclaim: Annotated[bytes, Meta(max_length=RECLAIM_MAX_BYTES)]
    """An Envelope of a Reclaim."""


class Pay(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `pay`, client to node: a voucher for all that it has earned of an escrow. The reply is Paid, once the
    voucher is on the node's disk."""

    KIND: ClassVar[str] = "pay"
    MAX_BYTES: ClassVar[int] = 2048

    signed: SignedVoucher
    last: bool = False
    """No more will follow: the node redeems it at once."""
    deputy: DeputyBytes | None = None


class Paid(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 1024

    amount_micro: Amount
    """What the node's newest voucher of this escrow says."""
    newest: SignedVoucher | None = None
    """That voucher, where it says more than the one that came: a driver that follows another learns what that one has
    signed last."""


def quote_id(holds: tuple[Envelope, ...]) -> bytes:
    """Names all Holds of a gang together: what an escrow is for. Their order does not matter."""
    return hash_of_parts("shoal/quote/1", sorted(one.record_id for one in holds))


def open_hold(envelope: Envelope, node: bytes, network: str = DEFAULT_NETWORK) -> Hold:
    """Of `node`. Raises BadHold, and what `open_record` does."""
    hold = open_record(envelope, Hold, network)
    if envelope.signer != node:
        raise BadHold(f"A hold of node {short_id(node)} is signed by {short_id(envelope.signer)}; it promises nothing.")
    return hold


def sold_twice(one: Envelope, other: Envelope, network: str = DEFAULT_NETWORK) -> str | None:
    """What two Holds prove of the node that signed both: that it has promised one slot to two clients at once; None
    where they do not. Raises what `open_record` does."""
    first, second = sorted((open_record(each, Hold, network) for each in (one, other)), key=lambda hold: hold.number)
    if one.signer != other.signer or one.record_id == other.record_id or first.slot != second.slot:
        return None
    if first.number == second.number:
        return f"Node {short_id(one.signer)} has signed two holds with the number {first.number}."
    if first.client == second.client:
        return None
    if max(first.from_ms, second.from_ms) >= min(first.until_ms, second.until_ms):
        return None
    if any(_releases(packed, one.signer, first, network) for packed in second.released):
        return None
    return (
        f"Node {short_id(one.signer)} has promised slot {first.slot} to {short_id(first.client)} until "
        f"{first.until_ms} ms and to {short_id(second.client)} from {second.from_ms} ms on."
    )


def _releases(packed: bytes, node: bytes, hold: Hold, network: str) -> bool:
    try:
        envelope = Envelope.from_bytes(packed, Release.MAX_BYTES)
        release = open_record(envelope, Release, network)
    except BadRecord:
        return False
    return (
        envelope.signer == hold.client
        and (release.node, release.slot) == (node, hold.slot)
        and release.number >= hold.number
    )
