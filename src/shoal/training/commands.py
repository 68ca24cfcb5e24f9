"""What is said between an agent and its engine of training.

Tensors never travel here: they are files, whose paths do. The agent owns those files; the engine only reads what it is
given and writes where it is told.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.engines.messages import Done, EngineMessage, Failed, Stop
from shoal.identity import Hash
from shoal.protocol.training import (
    MEMBERS_MAX,
    RANGES_MAX,
    SKETCH_WIDTH,
    STEPS_MAX,
    Count,
    Engine,
    Ppm,
    SampleRange,
    TrainJob,
)

SKETCHED_STEPS_MAX = STEPS_MAX // (1 + SKETCH_WIDTH)
"""A contribution carries at most this many sketches, 455: what the protocol has room for. Longer rounds sketch every
second, third, ... step."""

FilePath = Annotated[str, Meta(min_length=1, max_length=4096)]
Threads = Annotated[int, Meta(ge=1, le=4096)]


class ShardFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of tokens: `sequences` * sequence_tokens + 1 little-endian unsigned integers."""

    path: FilePath
    sequences: Annotated[int, Meta(ge=1, le=1 << 40)]


# --- commands ------------------------------------------------------------------------------------------------------


class Prepare(EngineMessage, frozen=True, kw_only=True):
    """Load everything, warm up, and measure. First command, once."""

    job: TrainJob
    state: FilePath
    """The shared state to begin with: the start state, or the newest one for a joiner."""
    shards: Annotated[tuple[ShardFile, ...], Meta(max_length=4096)]
    """In the order of `job.data.shards`."""
    device: Annotated[str, Meta(max_length=32)] = "cpu"
    """A torch device: cpu, cuda, cuda:1, mps, xpu."""
    threads: Threads = 1
    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    """How many processes compute each step together (gloo on CPU, NCCL on CUDA)."""
    speed_limit: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of one process' full speed, held by duty cycle."""
    dtype: Annotated[str, Meta(max_length=16)] = "float32"
    """`bfloat16`: matrix products in autocast. State and optimizer are always float32."""
    measure: bool = True
    """False skips the measuring, as in a replay."""


class LoadPrivate(EngineMessage, frozen=True, kw_only=True):
    """Take this private state instead of the current one: a replay, or a member that goes on after its process died.
    None: the state before the first round."""

    path: FilePath | None = None


class RunRound(EngineMessage, frozen=True, kw_only=True):
    """One member's work of one round. Its fields follow from the Assignment and the member's own last Contribution."""

    round: Count
    base_state: Hash
    """A shared state that the engine holds: the newest ones, or one added by LoadState."""
    in_flight: FilePath | None = None
    """The member's own update that `base_state` does not contain yet (Contribution.builds_on)."""
    step: Count
    """Assignment.step."""
    tokens_done: Count
    """`tokens_total` of the Commit that the Assignment names as `previous`; 0 before the first."""
    rounds_in_flight: Annotated[int, Meta(ge=0, le=1)] = 0
    """Rounds between that Commit and this one."""
    round_samples: Annotated[int, Meta(ge=1)]
    """Samples of all shares of the Assignment together: how far the schedule moves in this round."""
    member: Hash
    """Seeds dropout, where the model has any."""
    ranges: Annotated[tuple[SampleRange, ...], Meta(min_length=1, max_length=RANGES_MAX)]
    update: FilePath
    """Where to write the encoded update."""
    sent: FilePath | None = None
    """In a replay: the update that the member published for this round. The residual then goes on from what was really
    sent, so that rounding on another engine, which can tip which values are sent, is not carried into later rounds."""
    snapshot: FilePath | None = None
    """Where to write the private state after the round, when it is to be kept."""


class CancelRound(EngineMessage, frozen=True, kw_only=True):
    """Stop the running round at its next step; the member is then as before it. Nothing happens when none runs."""


class RollBack(EngineMessage, frozen=True, kw_only=True):
    """Undo accepted-nowhere rounds: private state becomes the kept version with this hash. Cancels a running round."""

    private: Hash


class CommittedUpdate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: FilePath
    weight_ppm: Ppm
    scale_ppm: Ppm


class ApplyCommit(EngineMessage, frozen=True, kw_only=True):
    """Shared state `previous` + accepted updates -> the next; allowed while a round runs."""

    round: Count
    previous: Hash
    accepted: Annotated[tuple[CommittedUpdate, ...], Meta(max_length=MEMBERS_MAX)]
    """In the Commit's order."""
    state: Hash | None = None
    """What the Commit names; another result is refused and not kept. None: whatever comes out (a driver's own use)."""
    write: FilePath | None = None
    """Where to write the resulting state."""


class LoadState(EngineMessage, frozen=True, kw_only=True):
    """Hold one more shared state, from a file."""

    path: FilePath


class WriteState(EngineMessage, frozen=True, kw_only=True):
    """Write a held shared state to a file."""

    state: Hash
    path: FilePath


class WritePrivate(EngineMessage, frozen=True, kw_only=True):
    """Write the current private state to a file."""

    path: FilePath


class Evaluate(EngineMessage, frozen=True, kw_only=True):
    """Mean loss in nats per token of a held shared state over the given shards; not while a round runs."""

    state: Hash
    shards: Annotated[tuple[ShardFile, ...], Meta(min_length=1, max_length=4096)]
    samples_max: Annotated[int, Meta(ge=1)] = 1 << 20
    """At most so many, spread evenly."""


class Generate(EngineMessage, frozen=True, kw_only=True):
    """Continue a text with a held shared state."""

    state: Hash
    tokenizer: FilePath
    """`bytes`, or a tokenizer file or directory."""
    prompt: Annotated[str, Meta(max_length=64 * 1024)]
    tokens: Annotated[int, Meta(ge=1, le=16_384)] = 100
    temperature: Annotated[float, Meta(ge=0, le=10)] = 0.0
    """0: always the likeliest token."""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0


class ExportCheckpoint(EngineMessage, frozen=True, kw_only=True):
    """Write a held shared state as a directory that `AutoModelForCausalLM.from_pretrained` loads."""

    state: Hash
    directory: FilePath
    tokenizer: FilePath | None = None


Command = (
    Prepare | LoadPrivate | RunRound | CancelRound | RollBack | ApplyCommit | LoadState | WriteState | WritePrivate
    | Evaluate | Generate | ExportCheckpoint | Stop
)  # fmt: skip


# --- replies -------------------------------------------------------------------------------------------------------


class Prepared(EngineMessage, frozen=True, kw_only=True):
    state: Hash
    private: Hash
    parameters: Count
    samples_per_s: float
    """Measured on the job's own model with the speed limit in force; 0 when not measured."""
    engine: Engine
    """For Contributions: software, device class, threads, processes."""


class RoundDone(EngineMessage, frozen=True, kw_only=True):
    """What a Contribution says about the work."""

    round: Count
    update_hash: Hash
    update_bytes: Count
    private_before: Hash
    private_after: Hash
    loss_first: float
    loss_last: float
    losses: Annotated[tuple[float, ...], Meta(max_length=STEPS_MAX)]
    sketches: Annotated[bytes, Meta(max_length=SKETCHED_STEPS_MAX * 4 * (1 + SKETCH_WIDTH))]
    sketch_every: Annotated[int, Meta(ge=1, le=STEPS_MAX)]
    samples: Count
    tokens: Count
    compute_ms: Count
    """From the first step to the last, waits of the speed limit included."""
    snapshot_bytes: Count = 0


class RoundCancelled(EngineMessage, frozen=True, kw_only=True):
    round: Count


class PrivateNow(EngineMessage, frozen=True, kw_only=True):
    """The private state after LoadPrivate, RollBack or WritePrivate."""

    private: Hash
    size: Count = 0


class StateHeld(EngineMessage, frozen=True, kw_only=True):
    state: Hash
    size: Count
    """Bytes of its file form."""


class Evaluated(EngineMessage, frozen=True, kw_only=True):
    loss: float
    tokens: Count


class Generated(EngineMessage, frozen=True, kw_only=True):
    text: Annotated[str, Meta(max_length=1 << 20)]
    tokens: Annotated[tuple[int, ...], Meta(max_length=16_384)]


Reply = (
    Done | Prepared | RoundDone | RoundCancelled | PrivateNow | StateHeld | Evaluated | Generated | Failed
)  # fmt: skip


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: Count
    command: Command


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: Count
    reply: Reply
