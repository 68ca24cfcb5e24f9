"""The records of a training job. Chained and signed, they are the whole truth about who did what.

    TrainJob ── Grant ── Term ── Assignment ── Contribution ── Commit ── Assignment ── ...
    (owner)    (owner)  (driver)  (driver)      (member)       (driver)

The id of a job is the record id of its TrainJob. Commit `r` names the hash of shared state `r`; state `-1` is the job's
start state, and the first Commit's `previous` is the job's id.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from shoal.identity import Hash, NodeId
from shoal.protocol.blobs import BlobHolder, BlobRef
from shoal.protocol.messages import Message, Record
from shoal.protocol.offers import Name, UnixMs

ROUNDS_MAX = 1 << 31
MEMBERS_MAX = 1024
RANGES_MAX = 4096
STEPS_MAX = 4096
SKETCH_WIDTH = 8
"""Numbers per step in a sketch, beside the loss."""

Round = Annotated[int, Meta(ge=-1, le=ROUNDS_MAX)]
TermNumber = Annotated[int, Meta(ge=1, le=ROUNDS_MAX)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Ppm = Annotated[int, Meta(ge=0, le=1_000_000)]
Sentence = Annotated[str, Meta(max_length=400)]
MemberId = Hash
"""The record id of a member's Member record."""
PARTS_PER_MILLION = 1_000_000


class Codec(StrEnum):
    NONE = "none"
    INT8 = "int8"
    SPARSE2 = "sparse2"


class Outer(StrEnum):
    PLAIN = "plain"
    NESTEROV = "nesterov"


class Schedule(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class OptimizerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The inner optimizer, AdamW (Loshchilov and Hutter, 2019). A step's learning rate follows from the tokens that
    the job had accepted when its round was assigned, never from a clock."""

    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 2e-3
    """The highest, reached after the warmup."""
    beta1: Fraction = 0.9
    """How much of the mean gradient each step keeps."""
    beta2: Fraction = 0.95
    """How much of the mean squared gradient each step keeps."""
    epsilon: Annotated[float, Meta(gt=0, le=1)] = 1e-8
    """Added to the root of the mean squared gradient before dividing by it."""
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.1
    """Decoupled from the gradient; times the learning rate, taken off the parameters each step."""
    gradient_clip: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: Annotated[int, Meta(ge=0, le=1 << 31)] = 50
    """Steps over which the learning rate grows to its highest."""
    schedule: Schedule = Schedule.COSINE
    """How the learning rate falls after that, over the token budget."""
    final_fraction: Fraction = 0.1
    """What is left of the learning rate at the end of the budget."""


class RoundSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a round is."""

    inner_steps: Annotated[int, Meta(ge=1, le=STEPS_MAX)] = 10
    """Steps that a member of speed 1 (the fastest) does in a round."""
    lag: Annotated[int, Meta(ge=0, le=1)] = 1
    """0: a round starts from the Commit before it. 1: from the one before that, so that the exchange of one round
    hides behind the computing of the next."""
    codec: Codec = Codec.SPARSE2
    """How a pseudo-gradient becomes bytes."""
    sparse_keep: Literal[8, 16, 32, 64, 128, 256, 512, 1024] = 64
    """How many values of each 4096 the codec `sparse2` keeps."""
    residual_decay: Fraction = 0.95
    """How much of what a codec left out is kept for the next round."""
    own_ahead: Annotated[float, Meta(ge=0, le=2)] = 1.0
    """With lag 1: how much of its own last update, which the base does not contain yet, a member's start state goes
    ahead of the base. 0: it starts from the base alone."""
    residual_ahead: Fraction = 0.2
    """How much of its residual, which it has not sent yet, a member's start state goes ahead of the base."""
    outer: Outer = Outer.PLAIN
    """How the weighted mean of a round's updates moves the shared state."""
    outer_learning_rate: Annotated[float, Meta(gt=0, le=10)] = 1.4
    """Times the mean update. Above 1 as members' steps are noisier, so smaller, than those of one large batch."""
    outer_momentum: Fraction = 0.0
    """How much of the mean of earlier rounds' updates goes on; for `nesterov`."""
    quorum: Annotated[float, Meta(gt=0, le=1)] = 0.5
    """Share of a round's assigned samples that must have arrived before its grace window opens."""
    grace_ms: Annotated[int, Meta(ge=0, le=3_600_000)] = 2_000
    """How long a round waits for the rest once its quorum is there."""
    deadline_ms: Annotated[int, Meta(ge=1, le=86_400_000)] = 60_000
    """A round closes this long after it was assigned, quorum or not, as long as anything arrived."""
    weight_cap: Annotated[float, Meta(gt=0, le=1)] = 0.34
    """The largest share of the weight that one member may have in a round."""
    norm_ratio_max: Annotated[float, Meta(gt=1, le=1e6)] = 3.0
    """An update whose norm, relative to the work behind it, is more than this many times the median is cut to it."""


class ReplaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What members keep so that anyone can repeat their work."""

    snapshot_every: Annotated[int, Meta(ge=1, le=10_000)] = 3
    """A member keeps its private state, 12 bytes a parameter, after every so many of its accepted contributions; a
    replay starts at the newest one before the round in question. With more than 3, a replay on another kind of machine
    cannot tell a lie in the rounds after the third from rounding; which kind a member has is its own word."""
    window_rounds: Annotated[int, Meta(ge=0, le=ROUNDS_MAX)] = 1_000
    """For so many rounds a member keeps what a replay of its work needs."""
    audit_rate: Fraction = 0.02
    """Share of accepted contributions that the driver chooses to replay while the job runs, one at a time. What comes
    faster than it can replay, beyond 16 that wait, is dropped; when training ends, those that wait are replayed for up
    to a minute. The report says how many were chosen and how many replayed."""


class ModelRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is trained: a `transformers` config as JSON, or nothing for a user's own loop; and the start state."""

    config: Annotated[str, Meta(max_length=64 * 1024)] = ""
    start: BlobRef
    """safetensors of the shared state before the first round."""
    parameters: Count


class DataShard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of tokens."""

    blob: BlobRef
    sequences: Annotated[int, Meta(ge=1, le=1 << 40)]


class DataRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Training samples, numbered from 0. A sample is a sequence of `sequence_tokens` tokens and the one after it; in a
    user's own loop it is one of the user's own samples, and there are no shards."""

    samples: Annotated[int, Meta(ge=1, le=1 << 50)]
    sequence_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] = 1
    token_bytes: Annotated[int, Meta(ge=1, le=4)] = 2
    shards: Annotated[tuple[DataShard, ...], Meta(max_length=4096)] = ()
    vocabulary: Annotated[int, Meta(ge=0, le=1 << 31)] = 0


class TrainJob(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A training job, resolved: no path, no default that a later version could change. Signed by its owner."""

    KIND: ClassVar[str] = "train.job"
    MAX_BYTES: ClassVar[int] = 1 << 20

    name: Name
    created_ms: UnixMs
    seed: Annotated[int, Meta(ge=0, le=1 << 53)]
    model: ModelRef
    data: DataRef
    token_budget: Annotated[int, Meta(ge=1, le=1 << 53)]
    batch_samples: Annotated[int, Meta(ge=1, le=1 << 20)]
    """Most samples in one inner step."""
    optimizer: OptimizerSettings
    rounds: RoundSettings
    replay: ReplaySettings
    dtype: Annotated[str, Meta(max_length=16)] = "float32"


class Grant(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The owner's permission to drive a job: who may, in which order they succeed, until when. Signed by the owner."""

    KIND: ClassVar[str] = "train.grant"

    job: Hash
    drivers: Annotated[tuple[NodeId, ...], Meta(min_length=1, max_length=64)]
    serial: Annotated[int, Meta(ge=1, le=ROUNDS_MAX)] = 1
    """A newer grant has a higher serial and replaces the older ones."""
    not_after_ms: UnixMs


class Term(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A driver takes over. Signed by the driver; it goes on from `head`, the newest Commit that it and its members
    know (the job's id before the first)."""

    KIND: ClassVar[str] = "train.term"

    job: Hash
    number: TermNumber
    grant: Hash
    head: Hash
    head_round: Round


class MemberNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node's part in a member."""

    node: NodeId
    part: Annotated[str, Meta(max_length=64)]
    """`whole`, or which part of the model or batch this node holds."""
    share_ppm: Ppm
    """Its part of the member's work; the parts of a member add up to a million."""


class Member(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One participant in a job: one or more nodes that answer as one. Signed by its first node. `session` is fresh for
    every joining, so that a node that comes back with nothing is another member."""

    KIND: ClassVar[str] = "train.member"

    job: Hash
    nodes: Annotated[tuple[MemberNode, ...], Meta(min_length=1, max_length=64)]
    session: Annotated[bytes, Meta(min_length=16, max_length=16)]
    name: Name


class SampleRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, order=True):
    """Positions [start, stop) in the shuffled order of one pass over the data."""

    pass_number: Annotated[int, Meta(ge=0, le=1 << 40)]
    start: Annotated[int, Meta(ge=0, le=1 << 50)]
    stop: Annotated[int, Meta(ge=1, le=1 << 50)]

    @property
    def samples(self) -> int:
        return self.stop - self.start


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One member's work in a round."""

    member: MemberId
    ranges: Annotated[tuple[SampleRange, ...], Meta(min_length=1, max_length=RANGES_MAX)]

    @property
    def samples(self) -> int:
        return sum(piece.samples for piece in self.ranges)


class Assignment(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Who trains on what in a round. Signed by the driver."""

    KIND: ClassVar[str] = "train.assignment"
    MAX_BYTES: ClassVar[int] = 1 << 20

    job: Hash
    round: Annotated[int, Meta(ge=0, le=ROUNDS_MAX)]
    term: TermNumber
    previous: Hash
    """The newest Commit when this was made (the job's id before the first): in steady state the one of
    round - 1 - lag, a later one after a start, a pause or a new term; never an older one."""
    base_state: Hash
    """The shared state that this round's work starts from: the one `previous` names."""
    step: Count
    """How many nominal inner steps the job had behind it: where the learning rate schedule stands."""
    deadline_ms: Annotated[int, Meta(ge=1, le=86_400_000)]
    shares: Annotated[tuple[Share, ...], Meta(min_length=1, max_length=MEMBERS_MAX)]


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What computed: a replay on the same is expected to match bit for bit."""

    software: Annotated[str, Meta(max_length=96)]
    device: Annotated[str, Meta(max_length=96)]
    threads: Annotated[int, Meta(ge=1, le=4096)]
    processes: Annotated[int, Meta(ge=1, le=4096)]


class NodeWork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one node of a member did in a round."""

    node: NodeId
    samples: Count
    tokens: Count
    compute_ms: Count


class Contribution(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a member returns for a round, and what it commits to so that anyone can repeat it. Signed by the member's
    first node."""

    KIND: ClassVar[str] = "train.contribution"
    MAX_BYTES: ClassVar[int] = 256 * 1024

    job: Hash
    round: Annotated[int, Meta(ge=0, le=ROUNDS_MAX)]
    term: TermNumber
    assignment: Hash
    member: MemberId
    base_state: Hash
    builds_on: Hash | None = None
    """The member's own Contribution that its start state already contains but the base state does not yet (lag 1)."""
    update: BlobRef
    work: Annotated[tuple[NodeWork, ...], Meta(min_length=1, max_length=64)]
    private_before: Hash
    """Hash of optimizer state and residual before the round."""
    private_after: Hash
    snapshot: bool = False
    """Whether the member keeps the private state after this round, for opening."""
    loss_first: float
    loss_last: float
    sketches: Annotated[bytes, Meta(max_length=STEPS_MAX * 4)]
    """Little-endian float32, 1 + SKETCH_WIDTH per sketched step: the loss, then sums of the parameters' movement over
    sign-flipped buckets."""
    sketch_every: Annotated[int, Meta(ge=1, le=STEPS_MAX)] = 1
    engine: Engine

    @property
    def samples(self) -> int:
        return sum(part.samples for part in self.work)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.work)


class Accepted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A Contribution that counts."""

    member: MemberId
    contribution: Hash
    update: BlobRef
    weight_ppm: Ppm
    scale_ppm: Ppm = PARTS_PER_MILLION
    """How far its update was shortened because its norm stood out."""
    samples: Count
    tokens: Count
    reason: Sentence = ""


class Excluded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A share that does not count; its samples go to others."""

    member: MemberId
    reason: Sentence
    contribution: Hash | None = None


class Commit(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What was accepted in a round, with which weight and why, and the hash of the state that follows. Signed by the
    driver."""

    KIND: ClassVar[str] = "train.commit"
    MAX_BYTES: ClassVar[int] = 1 << 20

    job: Hash
    round: Annotated[int, Meta(ge=0, le=ROUNDS_MAX)]
    term: TermNumber
    previous: Hash
    assignment: Hash
    accepted: Annotated[tuple[Accepted, ...], Meta(max_length=MEMBERS_MAX)]
    excluded: Annotated[tuple[Excluded, ...], Meta(max_length=MEMBERS_MAX)] = ()
    state: Hash
    tokens_total: Count
    """Accepted tokens of the job so far, this round's included."""


# --- requests between a driver and its members ---------------------------------------------------------------------

Packed = Annotated[bytes, Meta(max_length=(1 << 20) + 1024)]
"""An encoded Envelope."""


class MemberInvite(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.invite`, driver to node: join this job. The reply is MemberAnswer with the node's Member record;
    the node then fetches what it needs and reports with MemberReady."""

    KIND: ClassVar[str] = "train.invite"
    MAX_BYTES: ClassVar[int] = 3 << 20

    job: Packed
    grant: Packed
    term: Packed
    head: Packed | None = None
    """The newest Commit; none before the first."""
    state: BlobRef
    """The shared state it names, or the job's start state."""
    holders: Annotated[tuple[BlobHolder, ...], Meta(max_length=64)] = ()
    """Who else holds the blobs of this job."""


class MemberAnswer(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 80 * 1024

    member: Packed


class MemberReady(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.ready`, node to driver: this member holds the state of `round` and can compute."""

    KIND: ClassVar[str] = "train.ready"

    job: Hash
    member: MemberId
    round: Round
    state: Hash
    samples_per_s: Annotated[float, Meta(gt=0, le=1e12)]
    """Measured on the job's own model, with the speed limit in force."""


class Turn(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.turn`, driver to node: what was committed, and what to do next. The reply is Done."""

    KIND: ClassVar[str] = "train.turn"
    MAX_BYTES: ClassVar[int] = 5 << 20

    job: Hash
    grant: Packed | None = None
    """A newer grant than the one in the invitation."""
    term: Packed | None = None
    """Set when the driver has just taken over."""
    commit: Packed | None = None
    assignment: Packed | None = None
    holders: Annotated[tuple[BlobHolder, ...], Meta(max_length=64)] = ()
    attached: Annotated[tuple[bytes, ...], Meta(max_length=MEMBERS_MAX)] = ()
    """Small updates of the Commit, saved a round trip; each is checked against its name."""


class Deliver(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.deliver`, node to driver: a Contribution, with its update when that is small. Reply: Done."""

    KIND: ClassVar[str] = "train.deliver"
    MAX_BYTES: ClassVar[int] = 2 << 20

    contribution: Packed
    attached: Annotated[bytes, Meta(max_length=1 << 20)] | None = None
    waited_ms: Count = 0
    """How long the member had nothing to compute before this round. This and what follows is the member's own word,
    for the report only."""
    bytes_sent: Count = 0
    """Over all links of the node since it joined the job."""
    bytes_received: Count = 0


class CommitsAsk(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.commits`, node to driver: the Commits of these rounds, for a member that missed some. The reply
    is CommitsGiven, the oldest first; it may hold fewer than were asked for."""

    KIND: ClassVar[str] = "train.commits"

    job: Hash
    first_round: Round
    last_round: Round


class CommitsGiven(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 4 << 20

    commits: Annotated[tuple[Packed, ...], Meta(max_length=1024)]
    holders: Annotated[tuple[BlobHolder, ...], Meta(max_length=64)] = ()


class MemberGone(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.gone`, node to driver: this member stops, and why. Reply: Done."""

    KIND: ClassVar[str] = "train.gone"

    job: Hash
    member: MemberId
    reason: Sentence


class JobEnd(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.end`, driver to node: the job is over; keep what replays need. Reply: Done."""

    KIND: ClassVar[str] = "train.end"

    job: Hash
    reason: Sentence


class HeadAsk(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.head`: which Commit is your newest? A driver that takes over asks its members. Reply: Head.

    With `term`, the reply is a promise to take no Commit of an older term from now on."""

    KIND: ClassVar[str] = "train.head"

    job: Hash
    term: TermNumber | None = None


class Head(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 2 << 20

    commit: Packed | None = None


class OpenPrivate(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `train.open`: open the private state with this hash (or say why not). Reply: PrivateOpened."""

    KIND: ClassVar[str] = "train.open"

    job: Hash
    private: Hash


class PrivateOpened(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    blob: BlobRef
