"""Jobs that nodes drive while their owner is away: how a node is asked to, how it gets what it needs, and how those who
may look at it.

    owner    ── DriveAsk, DriveBegin ──> hosts         each makes a key to drive with; the owner's Grant names them
    host     ── FolderAsk ──> owner                    the run folder as the owner made it, and its blobs
    the next ── FolderAsk ──> the one that drives      what it has written since, for as long as the job lasts
    owner    ── FolderAsk ──> any of them              to look at it, and for the model at its end

A host is a node that drives a job, or stands by to. All of a job's hosts hold a copy of its run folder; the first of
those that are there drives, and the next takes over from its copy.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from shoal.identity import Hash, NodeId
from shoal.identity.accounts import Address
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.messages import Message
from shoal.protocol.offers import AddressText, Name
from shoal.protocol.training import Sentence

HOSTS_MAX = 4
HUBS_MAX = 16
FILES_MAX = 128
PIECES_MAX = 64
PIECE_BYTES = 1 << 20
WAIT_MAX_MS = 20_000
FileName = Annotated[str, Meta(min_length=1, max_length=128)]
Size = Annotated[int, Meta(ge=0, le=1 << 44)]
Secret = Annotated[bytes, Meta(min_length=32, max_length=32)]
Phase = Literal["fetching", "standing by", "driving", "over", "given up"]
"""`over`: for all hosts; `given up`: this one cannot go on, and others may."""


class DriveAsk(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `drive.ask`, owner to node: would you drive a job of this size, for this price? The reply is DriveGiven.
    It is good for some minutes, for DriveBegin."""

    KIND: ClassVar[str] = "drive.ask"
    MAX_BYTES: ClassVar[int] = 512

    name: Name
    size_bytes: Size
    """Of the run folder and its blobs as they are now."""
    micro_per_h: Annotated[int, Meta(ge=0)]
    """As the node's offer says; where it asks for more by now, it refuses."""


class DriveGiven(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 512

    driver: NodeId
    """The key with which it would drive this job alone; the Grant names it."""
    payee: Address | None = None
    """Where it is paid for that; None for nothing."""


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    node: NodeId
    driver: NodeId
    name: Name
    addresses: Annotated[tuple[AddressText, ...], Meta(max_length=8)] = ()
    payee: Address | None = None
    micro_per_h: Annotated[int, Meta(ge=0)] = 0


class Allowance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lets whoever drives pay: out of one escrow, up to its cap. All hosts of a job have it, so that one can
    follow another; the payer's own key stays with the payer."""

    ledger: Annotated[str, Meta(max_length=1024)]
    """A ticket."""
    escrow: Hash
    signer: Secret
    """The secp256k1 key that the escrow names as its signer."""
    client: Secret
    """The seed of the Ed25519 key that nodes keep their places for; drivers are its deputies."""


class DriveBegin(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `drive.begin`, owner to a node that answered DriveAsk: drive this job, or stand by. The reply is Done
    once that is on the node's disk; it then asks the owner for the folder (FolderAsk) and its blobs."""

    KIND: ClassVar[str] = "drive.begin"
    MAX_BYTES: ClassVar[int] = 64 * 1024

    driver: NodeId
    job: Hash
    hosts: Annotated[tuple[Host, ...], Meta(min_length=1, max_length=HOSTS_MAX)]
    """In the order in which they drive."""
    hubs: Annotated[tuple[Annotated[str, Meta(max_length=1024)], ...], Meta(min_length=1, max_length=HUBS_MAX)]
    """Tickets."""
    allowance: Allowance | None = None
    """None: only nodes that work for nothing take part."""
    prompt: Annotated[str, Meta(max_length=4096)] | None = None
    """What the trained model continues in the report."""


class DriveStop(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `drive.stop`, owner to host: stop the job in order, for good. The reply is Done."""

    KIND: ClassVar[str] = "drive.stop"
    MAX_BYTES: ClassVar[int] = 128

    job: Hash


class FileThere(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """How much of a file is there already, and a hash that says whether that is the same as elsewhere."""

    name: FileName
    size: Size
    hash: Annotated[bytes, Meta(max_length=32)]
    """BLAKE3: of a file that only grows, over its last TAIL_BYTES; of others over all of it."""


class FolderAsk(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `drive.folder`: how does this job stand, and what of its run folder is not there yet? The reply is
    FolderGiven; where there is nothing new, it comes after `wait_ms` at the latest."""

    KIND: ClassVar[str] = "drive.folder"
    MAX_BYTES: ClassVar[int] = 64 * 1024

    job: Hash
    standing_only: bool = False
    """Nothing of the folder is wanted."""
    files: Annotated[tuple[FileThere, ...], Meta(max_length=FILES_MAX)] = ()
    wait_ms: Annotated[int, Meta(ge=0, le=WAIT_MAX_MS)] = 0
    sound_bytes: Size = 0
    """So far the records go of which the asker has all updates, too: from there it could drive."""
    term: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    """In which the asker drives this job itself; 0 where it does not. The newest term counts."""


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Bytes of a file. Of one that only grows they go to its end; others are replaced once all of them are there."""

    name: FileName
    offset: Size
    """0 of a file that only grows: it begins anew."""
    data: Annotated[bytes, Meta(max_length=PIECE_BYTES)]
    size: Size
    """Of the whole file, as it is at the sender."""
    hash: Annotated[bytes, Meta(max_length=32)] = b""
    """Of the whole file, where it is replaced as a whole."""


class FolderGiven(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = (PIECES_MAX // 16) * PIECE_BYTES + 64 * 1024

    phase: Phase
    sentence: Sentence = ""
    """Why it is over, or what it waits for."""
    term: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    """In which it drives, or did last."""
    drives: NodeId | None = None
    """Who drives, as far as it knows."""
    pieces: Annotated[tuple[Piece, ...], Meta(max_length=PIECES_MAX)] = ()
    more: bool = False
    """There is more than fits into one answer."""
    holders: Annotated[tuple[BlobHolder, ...], Meta(max_length=64)] = ()
    """Who holds the job's blobs."""
