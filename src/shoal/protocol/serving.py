"""What is said about a model that is served: who holds which layers, and the positions that go through them.

A ring is one replica: stages on nodes in a row, from the gateway through all of them and back to the gateway. The
gateway is no hop in between: each stage hands on to the next one over a link between the two nodes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from shoal.identity import Hash, NodeId
from shoal.protocol.blobs import BlobHolder, BlobRef, Size
from shoal.protocol.messages import Message, Record
from shoal.protocol.offers import AddressText, Name, UnixMs

LAYERS_MAX = 4096
STAGES_MAX = 64
FILES_MAX = 1024
RANGES_MAX = 16
"""Of one file: those of all files have room in an invitation beside the job."""
HOLDERS_MAX = 64
PIECE_MAX = 256
"""Positions of a session that travel at once."""
STATES_MAX_BYTES = (4 << 20) - 64 * 1024
"""Of the hidden states in a message; the rest of it has room beside them."""
TOP_MAX = 20
BIASES_MAX = 300
MASK_MAX_BYTES = 48 * 1024
"""Of the masks of one message together; beside hidden states there is room for so much."""
CONFIG_MAX_BYTES = 64 * 1024
ARITHMETIC_MAX = 192

RingId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Session = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Tokens = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=PIECE_MAX)]
States = Annotated[bytes, Meta(max_length=STATES_MAX_BYTES)]
"""Hidden states [positions, hidden], little-endian float32."""
Milliseconds = Annotated[float, Meta(ge=0, le=1e9)]
Part = Annotated[tuple[tuple[Size, Size], ...], Meta(max_length=RANGES_MAX)]
"""Which bytes of a file: ranges [start, stop) in order and apart; none means the whole file."""
Sentence = Annotated[str, Meta(max_length=400)]
Code = Annotated[str, Meta(max_length=16)]
Arithmetic = Annotated[str, Meta(max_length=ARITHMETIC_MAX)]
"""Whose bits a session has, whatever it is computed with: the same in all stages of the same one. None where they
depend on the batch."""


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class ModelFile(Struct, frozen=True, kw_only=True):
    """A safetensors file of the model."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")]
    blob: BlobRef


class ServeJob(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A model that its owner wants served: signed by the gateway's key, which is the owner's."""

    KIND: ClassVar[str] = "serve.job"
    MAX_BYTES: ClassVar[int] = 512 * 1024

    name: Name
    created_ms: UnixMs
    config: Annotated[str, Meta(max_length=CONFIG_MAX_BYTES)]
    layers: Annotated[int, Meta(ge=1, le=LAYERS_MAX)]
    files: Annotated[tuple[ModelFile, ...], Meta(min_length=1, max_length=FILES_MAX)]


class StagePlace(Struct, frozen=True, kw_only=True):
    """Layers `first` to `stop` - 1, and who holds them."""

    node: NodeId
    addresses: Annotated[tuple[AddressText, ...], Meta(max_length=8)] = ()
    first: Annotated[int, Meta(ge=0, lt=LAYERS_MAX)]
    stop: Annotated[int, Meta(ge=1, le=LAYERS_MAX)]


class StageInvite(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.invite`, gateway to node: hold stage `mine` of a ring. The reply, Done, says that it will be
    tried; StageReady or StageGone follow."""

    KIND: ClassVar[str] = "stage.invite"
    MAX_BYTES: ClassVar[int] = 1 << 20

    job: Annotated[bytes, Meta(max_length=ServeJob.MAX_BYTES + 1024)]
    """An Envelope of a ServeJob, signed by the gateway that asks."""
    ring: RingId
    stages: Annotated[tuple[StagePlace, ...], Meta(min_length=1, max_length=STAGES_MAX)]
    mine: Annotated[int, Meta(ge=0, lt=STAGES_MAX)]
    files: Annotated[tuple[Annotated[int, Meta(ge=0, lt=FILES_MAX)], ...], Meta(min_length=1, max_length=FILES_MAX)]
    """Which of the job's files the stage's layers lie in."""
    parts: Annotated[tuple[Part, ...], Meta(max_length=FILES_MAX)] = ()
    """Which bytes of each of these files, their headers included; without any, all files whole."""
    memory_bytes: Count
    """For sessions."""
    holders: Annotated[tuple[BlobHolder, ...], Meta(max_length=HOLDERS_MAX)] = ()
    """Who has the files."""


class StageReady(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.ready`, node to gateway: the layers are loaded and were tried."""

    KIND: ClassVar[str] = "stage.ready"
    MAX_BYTES: ClassVar[int] = 1024

    ring: RingId
    mine: Annotated[int, Meta(ge=0, lt=STAGES_MAX)]
    arithmetic: Arithmetic = ""
    layer_ms: Milliseconds
    last_ms: Milliseconds = 0.0


class StageGone(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.gone`, node to gateway: it holds the stage no longer, or never will."""

    KIND: ClassVar[str] = "stage.gone"
    MAX_BYTES: ClassVar[int] = 4096

    ring: RingId
    mine: Annotated[int, Meta(ge=0, lt=STAGES_MAX)]
    reason: Sentence


class StageLeaving(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.leaving`, node to gateway: it wants to go, and goes on until the ring is ended or for so long."""

    KIND: ClassVar[str] = "stage.leaving"
    MAX_BYTES: ClassVar[int] = 4096

    ring: RingId
    mine: Annotated[int, Meta(ge=0, lt=STAGES_MAX)]
    reason: Sentence = ""
    patience_ms: Milliseconds = 0.0


class StagePulse(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.pulse`, gateway to a stage that may be silent: are you there, and does the next stage answer you?
    The reply is StagePulsed."""

    KIND: ClassVar[str] = "stage.pulse"
    MAX_BYTES: ClassVar[int] = 256

    ring: RingId
    patience_ms: Annotated[float, Meta(gt=0, le=60_000)]
    """For the next stage's answer."""


class StagePulsed(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 256

    next_answers: bool
    """True in the last stage."""
    waiting_ms: Milliseconds = 0.0
    """For how long the engine has been at the oldest piece that it has."""


class StageKnown(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.known`, node to gateway: is the ring still wanted? A gateway that does not know it refuses."""

    KIND: ClassVar[str] = "stage.known"
    MAX_BYTES: ClassVar[int] = 256

    ring: RingId


class StageEnd(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.end`, gateway to node: the ring is not needed any more."""

    KIND: ClassVar[str] = "stage.end"
    MAX_BYTES: ClassVar[int] = 4096

    ring: RingId
    reason: Sentence = ""


class Choosing(Struct, frozen=True, kw_only=True):
    """How tokens are chosen, as the OpenAI API names it, and where what was generated begins."""

    temperature: Annotated[float, Meta(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    choice: Annotated[int, Meta(ge=0, le=1024)] = 0
    presence_penalty: Annotated[float, Meta(ge=-10, le=10)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-10, le=10)] = 0.0
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_MAX)] | None = None
    logit_bias: Annotated[
        tuple[tuple[TokenId, Annotated[float, Meta(ge=-100, le=100)]], ...], Meta(max_length=BIASES_MAX)
    ] = ()
    prompt_tokens: Count = 0
    """Positions before this one are the prompt, whose tokens no penalty counts."""
    masks: Annotated[tuple[Annotated[bytes, Meta(max_length=MASK_MAX_BYTES)], ...], Meta(max_length=PIECE_MAX)] = ()
    """For each token that is wanted, which ones it may be (`shoal.inference.masks`); none: any."""


class StageWork(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.work`: positions of a session, from the gateway to the first stage, from each stage to the next.
    The reply, Done, says that they arrived."""

    KIND: ClassVar[str] = "stage.work"
    MAX_BYTES: ClassVar[int] = 4 << 20

    ring: RingId
    session: Session
    number: Count
    """Counts the gateway's calls; the answer bears it."""
    start: Count
    tokens: Tokens
    source: Session | None = None
    """Of a session that begins: the one of which it takes over the positions before `start`."""
    states: States = b""
    """None to the first stage."""
    choose: Annotated[int, Meta(ge=0, le=PIECE_MAX)] = 0
    """The tokens that follow the last so many positions are wanted."""
    computed_ms: Milliseconds = 0.0
    """By the stages before."""
    states_wanted: bool = False
    """Not the tokens: the final hidden states of these positions."""
    choosing: Choosing = Choosing()


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    token: TokenId
    logprob: float | None = None
    top: Annotated[tuple[tuple[TokenId, float], ...], Meta(max_length=TOP_MAX)] = ()


class StageAnswer(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.answer`, to the gateway: from the last stage what it chose, from any stage that it cannot."""

    KIND: ClassVar[str] = "stage.answer"
    MAX_BYTES: ClassVar[int] = 4 << 20

    ring: RingId
    session: Session
    number: Count
    chosen: Annotated[tuple[Chosen, ...], Meta(max_length=PIECE_MAX)] = ()
    states: States = b""
    """Where they were wanted."""
    computed_ms: Milliseconds = 0.0
    """By all stages."""
    code: Code = ""
    """Of the error, where there is one."""
    sentence: Sentence = ""


class StageForget(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `stage.forget`, gateway to every stage: a session is over."""

    KIND: ClassVar[str] = "stage.forget"
    MAX_BYTES: ClassVar[int] = 1024

    ring: RingId
    session: Session
    keep: bool = False
    """Its positions may be of use to a later session: keep them while there is memory for it."""


class StageForgotten(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The reply to StageForget."""

    MAX_BYTES: ClassVar[int] = 4096

    receipt: Annotated[bytes, Meta(max_length=2048)] = b""
    """An Envelope of a RequestReceipt, where the session was known."""


class LinkEcho(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `link.echo`: nothing but an answer, Done, so that its time can be taken."""

    KIND: ClassVar[str] = "link.echo"
    MAX_BYTES: ClassVar[int] = 64


class LinkProbe(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `link.probe`: how far is it from you to each of these? The reply is LinksProbed."""

    KIND: ClassVar[str] = "link.probe"
    MAX_BYTES: ClassVar[int] = 64 * 1024

    nodes: Annotated[tuple[BlobHolder, ...], Meta(min_length=1, max_length=STAGES_MAX)]


class LinksProbed(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 4096

    round_trip_ms: Annotated[tuple[Milliseconds | None, ...], Meta(max_length=STAGES_MAX)]
    """In the order asked; none for who could not be reached."""


class RequestReceipt(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a node did for one session of a ring: signed by the node, for whoever accounts."""

    KIND: ClassVar[str] = "serve.receipt"
    MAX_BYTES: ClassVar[int] = 1024

    job: Hash
    ring: RingId
    session: Session
    first: Annotated[int, Meta(ge=0, lt=LAYERS_MAX)]
    stop: Annotated[int, Meta(ge=1, le=LAYERS_MAX)]
    prompt_tokens: Count
    """Positions of the prompt, each once."""
    generated_tokens: Count
    """Tokens that were chosen after them; guesses count when they held, those of the last piece not at all."""
    computed_positions: Count
    """All positions that went through, guesses and repeats included."""
    reused_positions: Count = 0
    """Positions that it took over from an earlier session."""
