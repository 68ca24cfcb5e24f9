"""What a run folder's .jsonl files hold: one struct a line, each kind in its own file."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from shoal.protocol.training import Count, Round

NodeHex = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
"""A NodeId in hexadecimal digits, as files and reports carry it."""
Seconds = Annotated[float, Meta(ge=0)]
"""Since the job's first start. A resumed driver goes on counting from `RunFolder.elapsed_s`."""


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of one of the folder's .jsonl files."""

    FILE: ClassVar[str]


class RoundMetrics(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A committed round."""

    FILE: ClassVar[str] = "metrics.jsonl"

    round: Round
    time_s: Seconds
    tokens_total: Count
    loss: float | None
    """Training loss in nats per token, weighted by accepted tokens; none when it is not a finite number."""
    tokens_per_s: Annotated[float, Meta(ge=0)]
    members: Count
    """How many contributions were accepted."""
    bytes_sent: Count = 0
    """By all members since the line before."""
    bytes_received: Count = 0
    inner_steps: Count = 0
    state: str = ""
    """Hash of the shared state that the Commit names, in hexadecimal digits."""
    weighing: Annotated[str, Meta(max_length=1000)] = ""
    """What the weighing of the updates remarked about the round as a whole."""


class Evaluation(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Held-out loss of the shared state after `round` (-1: the untrained model), in nats per token; none when it is
    not a finite number."""

    FILE: ClassVar[str] = "evaluations.jsonl"

    round: Round
    time_s: Seconds
    tokens_total: Count
    loss: float | None


class Lane(StrEnum):
    """What a node was doing."""

    COMPUTING = "computing"
    SENDING = "sending"
    WAITING = "waiting"
    SYNCING = "syncing"
    GONE = "gone"
    EXCLUDED = "excluded"


class LaneSegment(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A node was in `state` from `start_s` to `stop_s`. Segments of a node do not overlap: what happens while a node
    computes is computing."""

    FILE: ClassVar[str] = "lanes.jsonl"

    node: NodeHex
    state: Lane
    start_s: Seconds
    stop_s: Seconds


class EventKind(StrEnum):
    NOTE = "note"
    JOINED = "joined"
    LEFT = "left"
    DIED = "died"
    EXCLUDED = "excluded"
    AUDIT = "audit"
    DRIVER = "driver"
    WAITING = "waiting"
    """For money: nobody works until there is more, or the job is over. The newest event as long as that is so."""


class Event(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Something happened, said in a sentence. `node` is empty when it concerns no node in particular."""

    FILE: ClassVar[str] = "events.jsonl"

    time_s: Seconds
    sentence: Annotated[str, Meta(max_length=1000)]
    kind: EventKind = EventKind.NOTE
    node: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    round: Round | None = None


class AuditVerdict(StrEnum):
    MATCH = "match"
    MISMATCH = "mismatch"
    NOT_REPLAYABLE = "not replayable"


class AuditLine(Line, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A contribution was replayed."""

    FILE: ClassVar[str] = "audits.jsonl"

    time_s: Seconds
    round: Round
    node: NodeHex
    verdict: AuditVerdict
    sentence: Annotated[str, Meta(max_length=1000)]
    difference: float | None = None
    """The measured distance between claimed and replayed work, and the largest that an honest replay may show; none
    when nothing could be replayed."""
    threshold: float | None = None


LINES: tuple[type[Line], ...] = (RoundMetrics, Evaluation, LaneSegment, Event, AuditLine)
