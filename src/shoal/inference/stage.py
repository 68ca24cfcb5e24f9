"""The engine of a stage: one step takes positions of many sessions through its layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from shoal.devices.names import device_class
from shoal.errors import BadRecord, EngineError
from shoal.inference import attention
from shoal.inference.attention import Kept, Run
from shoal.inference.blocks import kept_bytes, padded
from shoal.inference.rows import Forms, RmsNorm, Silu
from shoal.models.shapes import Shape, shape_of
from shoal.models.stages import StageModule, activations, linear_maps, read_stage, rms_norms
from shoal.protocol.serving import ARITHMETIC_MAX
from shoal.quantities import Ranges

POSITIONS_MAX = 4096
"""Positions of all sessions in one step."""
TRIED_POSITIONS = 17
"""On which an engine tries, when it starts, whether bits depend on the batch."""


class BadPiece(BadRecord):
    """What a session is to go on with does not fit what the stage has of it."""

    code = "SH-270"


class BadStates(BadPiece):
    """What the stage before sends are no hidden states: of another shape, or not finite."""

    code = "SH-277"


class NoSource(BadRecord):
    """A session was to take over positions of one that is not kept any more, or never had them."""

    code = "SH-275"


class NoRoom(EngineError):
    """The memory for sessions is full."""

    code = "SH-570"


@dataclass(frozen=True)
class Piece:
    """Positions from `start` on of a session: token ids [n] in the first stage, hidden states [n, hidden] in others.
    Where a session has got further than `start`, it is taken back to it."""

    session: int
    start: int
    inputs: torch.Tensor
    tokens: tuple[int, ...] = ()
    """Their token ids, where somebody will want to know."""
    source: int | None = None
    """For a session that is not known: the one of which it takes over the positions before `start`."""


@dataclass
class _Session:
    kept: Kept
    length: int = 0
    """How many positions of it are valid."""
    tokens: list[int] = field(default_factory=list)


class StageEngine:
    """Some layers of a model, and the sessions that go through them."""

    def __init__(self, module: StageModule, shape: Shape, memory_bytes: int) -> None:
        self.shape = shape
        self.takes_tokens, self.is_last = module.takes_tokens, module.is_last
        self.has_head = module.head is not None
        self._module = module
        self._layers = module.stop - module.first
        self._memory = memory_bytes
        self._used = 0
        self._sessions: dict[int, _Session] = {}
        self._over: OrderedDict[int, None] = OrderedDict()
        """Those of them that are over, and kept while their memory is not needed: the oldest first."""
        self.weights_bytes = sum(weight.numel() * weight.element_size() for weight in module.parameters())
        forms = Forms()
        groups = linear_maps(module)
        while groups:  # one after another: weights in another order are a copy, and there may be no room for two of all
            maps = groups.pop()
            for one, linear in zip(maps, forms.linears([(one.weight, one.bias) for one in maps]), strict=True):
                setattr(one.parent, one.name, linear)
        for parent, name, weight, epsilon in rms_norms(module):
            setattr(parent, name, RmsNorm(weight, epsilon))
        for parent, name in activations(module, "silu"):
            setattr(parent, name, Silu())
        self.exact = self._tried()
        """Whether on this machine a session's bits are the same whatever it is computed with."""

    @classmethod
    def read(
        cls,
        config: str,
        files: list[Path],
        first: int,
        stop: int,
        memory_bytes: int,
        device: str = "cpu",
        parts: Sequence[Ranges] = (),
    ) -> StageEngine:
        """Raises BadModel."""
        module = read_stage(config, files, first, stop, attention=attention.NAME, device=device, parts=parts)
        return cls(module, shape_of(config), memory_bytes)

    def length(self, session: int) -> int:
        """How many positions of a session are kept; 0 for one that is not known."""
        return self._sessions[session].length if session in self._sessions else 0

    def tokens(self, session: int) -> list[int]:
        """The token ids of its positions, as far as they were said."""
        return self._sessions[session].tokens

    @property
    def free_bytes(self) -> int:
        return self._memory - self._used

    def close(self, session: int, *, keep: bool = False) -> None:
        """Forget a session; its memory is free at once, or with `keep` as soon as it is needed."""
        if session not in self._sessions:
            return
        if keep:
            self._over[session] = None
            return
        self._over.pop(session, None)
        self._used -= self._bytes(self._sessions.pop(session).kept.room)

    @property
    def arithmetic(self) -> str:
        """A name for the bits that come of it: where two engines have the same one, a session has the same bits in
        both. None where they depend on the batch."""
        if not self.exact:
            return ""
        device = next(self._module.parameters()).device
        name = f"{device_class(device)}, torch {torch.__version__}, transformers {version('transformers')}"
        return name[:ARITHMETIC_MAX]

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """Take all pieces through the layers: for each its hidden states [n, hidden]. Raises BadPiece or NoRoom, by
        which no session is changed."""
        if not pieces:
            return []
        self._check(pieces)
        runs = [self._run(piece) for piece in pieces]
        inputs = torch.cat([piece.inputs for piece in pieces])
        positions = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        states = self._module(inputs, positions, runs=runs)
        for piece, run in zip(pieces, runs, strict=True):
            session = self._sessions[piece.session]
            session.length = run.stop
            session.tokens[piece.start :] = piece.tokens
        return list(states.split([run.count for run in runs]))

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of the last stage's hidden states [n, hidden]: [n, vocabulary], in float32. Raises BadPiece where there is no
        head."""
        head = self._module.head
        if head is None:
            raise BadPiece("Tokens are wanted where the model has no head: of the last stage alone, if of any.")
        logits: torch.Tensor = head(states).float()
        cap = self.shape.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def measured(self, steps: int, monotonic: Callable[[], float]) -> tuple[float, float]:
        """Milliseconds of a decode step of one position through the layers, and through the head where there is one:
        the least of some."""
        layers, heads = [], []
        states = torch.zeros(1, dtype=torch.int64) if self.takes_tokens else torch.zeros(1, self.shape.hidden)
        for at in range(min(steps, self.shape.positions)):
            began = monotonic()
            (out,) = self.step([Piece(-1, at, states)])
            between = monotonic()
            if self.has_head:
                self.logits(out)
            layers.append((between - began) * 1000)
            heads.append((monotonic() - between) * 1000)
        self.close(-1)
        return min(layers), min(heads) if self.has_head else 0.0

    def _tried(self) -> bool:
        """The same positions one by one, at once, and beside another session."""
        count = min(TRIED_POSITIONS, self.shape.positions)
        dice = torch.Generator().manual_seed(1)
        if self.takes_tokens:
            inputs = torch.randint(self.shape.vocabulary, (count,), generator=dice)
        else:
            inputs = torch.randn(count, self.shape.hidden, generator=dice)
        memory, self._memory = self._memory, 4 * self._bytes(padded(count))
        try:
            alone = torch.cat([self.step([Piece(-1, at, inputs[at : at + 1])])[0] for at in range(count)])
            (at_once,) = self.step([Piece(-2, 0, inputs)])
            _, beside = self.step([Piece(-3, 0, inputs[: count // 2 + 1]), Piece(-4, 0, inputs)])
        finally:
            self._memory = memory
            for session in (-1, -2, -3, -4):
                self.close(session)
        heads = [self.logits(states) for states in (alone, at_once[:2], beside)] if self.has_head else []
        return (
            torch.equal(alone, at_once)
            and torch.equal(alone, beside)
            and all(torch.equal(one[:2], heads[0][:2]) for one in heads)
        )

    def _check(self, pieces: Sequence[Piece]) -> None:
        if len({piece.session for piece in pieces}) < len(pieces):
            raise BadPiece("A session stands twice in one step.")
        if sum(len(piece.inputs) for piece in pieces) > POSITIONS_MAX:
            raise BadPiece(f"A step takes at most {POSITIONS_MAX} positions.")
        wanted = 0
        for piece in pieces:
            length, count = self._reached(piece), len(piece.inputs)
            if not 0 <= piece.start <= length or count < 1:
                raise BadPiece(
                    f"Session {piece.session} has {length} positions here; it cannot go on with {count} from "
                    f"position {piece.start}."
                )
            if piece.start + count > self.shape.positions:
                raise BadPiece(f"The model knows {self.shape.positions} positions; {piece.start + count} are too many.")
            if self.takes_tokens:
                if piece.inputs.dtype != torch.int64 or piece.inputs.dim() != 1:
                    raise BadPiece("The first stage takes token ids.")
                if int(piece.inputs.min()) < 0 or int(piece.inputs.max()) >= self.shape.vocabulary:
                    raise BadPiece(f"A token id is not within the vocabulary of {self.shape.vocabulary}.")
            elif piece.inputs.shape[1:] != (self.shape.hidden,) or not torch.isfinite(piece.inputs).all():
                raise BadStates(
                    f"Hidden states of shape {tuple(piece.inputs.shape)} came, or such that are not finite; "
                    f"[{count}, {self.shape.hidden}] is what this stage takes."
                )
            room = self._sessions[piece.session].kept.room if piece.session in self._sessions else 0
            wanted += max(0, self._bytes(padded(piece.start + count)) - self._bytes(room))
        needed = {piece.session for piece in pieces} | {piece.source for piece in pieces}
        for old in [old for old in self._over if old not in needed]:
            if wanted <= self.free_bytes:
                break
            self.close(old)
        if wanted > self.free_bytes:
            raise NoRoom(f"{wanted} bytes are needed for sessions, and {self.free_bytes} are free.")

    def _reached(self, piece: Piece) -> int:
        """How many positions a session has, or takes over, before the piece."""
        if piece.source is None or piece.session in self._sessions:
            return self.length(piece.session)
        if self.length(piece.source) < piece.start:
            raise NoSource(
                f"Session {piece.session} was to take over {piece.start} positions of session {piece.source}, of which "
                f"{self.length(piece.source)} are kept here."
            )
        return piece.start

    def _run(self, piece: Piece) -> Run:
        self._over.pop(piece.session, None)
        if piece.source is not None and piece.source in self._over:
            self._over.move_to_end(piece.source)
        session = self._sessions.get(piece.session) or self._begun(piece)
        kept, before = session.kept, session.kept.room
        kept.reserve(piece.start + len(piece.inputs))
        self._used += self._bytes(kept.room) - self._bytes(before)
        return Run(kept, piece.start, len(piece.inputs))

    def _begun(self, piece: Piece) -> _Session:
        weight = next(self._module.parameters())
        session = _Session(
            Kept(
                self._module.first, self._layers, self.shape.key_heads, self.shape.head_size, weight.dtype,
                weight.device,
            )
        )  # fmt: skip
        if piece.source is not None:
            source = self._sessions[piece.source]
            session.kept.reserve(piece.start)
            session.kept.take_over(source.kept, piece.start)
            session.tokens = source.tokens[: piece.start]
            self._used += self._bytes(session.kept.room)
        self._sessions[piece.session] = session
        return session

    def _bytes(self, room: int) -> int:
        return kept_bytes(self._layers, self.shape.key_heads, self.shape.head_size, room)
