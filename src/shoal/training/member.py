"""The inner side of a round, whoever computes the steps: Shoal's own loop over a language model, or a user's.

member.begin(start)         parameters are the round's start state
... optimizer steps; member.stepped(loss) after each ...
member.finish()             the update, what is committed to, and the private state carried on
member.abandon()            or: as if the round had not begun
member.roll_back(hash)      or later: as if the last rounds had not been done
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3

from shoal.errors import EngineError
from shoal.protocol.training import SKETCH_WIDTH, RoundSettings
from shoal.training.commands import SKETCHED_STEPS_MAX
from shoal.training.optimizer import InnerOptimizer
from shoal.training.outer import ahead
from shoal.training.private import PrivateState
from shoal.training.state import Floats, Layout, SharedState
from shoal.training.updates import Update, UpdateReader, encode_update

SKETCH_ROW = 1024
"""Numbers that share a sign per row in a sketch."""
SUMMED_AT_ONCE, SUMMED_AT_ONCE_ON_DEVICE = 1 << 16, 1 << 24
"""Parameters that are converted and summed at once: what a core's cache holds; enough to keep an accelerator busy."""


class OutOfTurn(EngineError):
    """A round was begun, finished, loaded or rolled back when that was not possible."""

    code = "SH-531"


class FlatParameters:
    """A module's parameters as views into one flat float32 buffer, ordered by name, and so their gradients."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.layout = Layout.of({name: parameter.shape for name, parameter in parameters.items()})
        device = next(iter(parameters.values())).device
        self.flat = torch.zeros(self.layout.size, dtype=torch.float32, device=device)
        self.exchange = torch.zeros(self.layout.size + 2, dtype=torch.float32, device=device)
        """The gradients and two more numbers, to be summed over processes in one go."""
        self.gradient = self.exchange[:-2]
        with torch.no_grad():
            for tensor in self.layout.tensors:
                parameter = parameters[tensor.name]
                view = self.flat[tensor.start : tensor.stop].view(tensor.shape)
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = self.gradient[tensor.start : tensor.stop].view(tensor.shape)

    def load(self, flat: Floats) -> None:
        with torch.no_grad():
            self.flat.copy_(torch.from_numpy(flat))

    def numbers(self) -> Floats:
        """The parameters on the host; not a copy where they are there already."""
        return self.flat.detach().cpu().numpy()


@dataclass(frozen=True)
class RoundResult:
    """What a member has to show for a round."""

    update: bytes
    before: PrivateState
    after: PrivateState
    losses: tuple[float, ...]
    sketches: bytes
    sketch_every: int


class Member:
    """One participant's arithmetic. Not thread-safe.

    Keeps the private states before the rounds that are not committed yet (lag + 1) and the current one, so that any of
    them can be undone. The residual lives on the host: e <- decay * e + (start - end), each operation rounded once in
    binary32; what the codec sends of it is subtracted.
    """

    def __init__(
        self, parameters: FlatParameters, optimizer: InnerOptimizer, settings: RoundSettings, sketch_seed: bytes
    ) -> None:
        self._parameters, self._optimizer, self._settings = parameters, optimizer, settings
        size = parameters.layout.size
        self.updates = UpdateReader(settings.codec, size, settings.sparse_keep)
        self._sketcher = Sketcher(size, sketch_seed, parameters.flat.device)
        fresh = PrivateState.fresh(0, size)
        optimizer.restore(fresh.optimizer, 0)
        self._kept: deque[PrivateState] = deque(
            [PrivateState(optimizer.moments(), fresh.residual, 0)], maxlen=settings.lag + 2
        )
        self._start: Floats | None = None
        self._losses: list[torch.Tensor | float] = []
        self._sketches: list[torch.Tensor] = []
        self._every = 1

    @property
    def private(self) -> PrivateState:
        """The current private state: that after the last finished round."""
        return self._kept[-1]

    @property
    def computing(self) -> bool:
        return self._start is not None

    def start_state(self, base: SharedState, in_flight: Update | None) -> Floats:
        """The flat parameters that a round starts from: the shared base, ahead by the member's own update that is not
        in it yet and by a part of its residual. A function of published bytes and committed private state."""
        rate = self._settings.outer_learning_rate
        start = base.parameters
        if in_flight is not None:
            start = ahead(base, in_flight, self._settings.own_ahead * rate)
        if self._settings.residual_ahead:
            step = np.float32(self._settings.residual_ahead * rate) * self.private.residual
            start = np.subtract(start, step, out=step)
        return start

    def begin(self, start: Floats, steps: int) -> None:
        """A round of `steps` steps begins at `start`. Raises OutOfTurn when one is running."""
        if self._start is not None:
            raise OutOfTurn("A round was begun while another is running; finish or cancel that one first.")
        self._start = start
        self._parameters.load(start)
        self._sketcher.begin(self._parameters.flat)
        self._losses, self._sketches = [], []
        self._every = -(-steps // SKETCHED_STEPS_MAX)

    def stepped(self, loss: torch.Tensor | float) -> None:
        """After each optimizer step: note the loss, and where the parameters went."""
        if self._start is None:
            raise OutOfTurn("A step was reported, but no round is running.")
        self._losses.append(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        if (len(self._losses) - 1) % self._every == 0:
            self._sketches.append(self._sketcher.sketch(self._parameters.flat))

    def finish(self, sent: Update | None = None) -> RoundResult:
        """End of the round. `sent` is what was published for it, where that is known already (in a replay).

        Raises OutOfTurn, and NotFinite (the round is then abandoned) when training diverged.
        """
        if self._start is None:
            raise OutOfTurn("A round was finished, but none is running.")
        before, settings = self.private, self._settings
        accumulated = np.float32(settings.residual_decay) * before.residual
        accumulated += self._start - self._parameters.numbers()
        try:
            update = encode_update(accumulated, settings.codec, settings.sparse_keep)
        except EngineError:
            self.abandon()
            raise
        sent = sent or self.updates.read(update)
        if sent.indices is None:
            accumulated -= sent.values
        else:
            accumulated[sent.indices] -= sent.values
        losses = tuple(float(loss) for loss in self._losses)
        after = PrivateState(self._optimizer.moments(), accumulated, before.step + len(losses))
        result = RoundResult(update, before, after, losses, self._sketch_bytes(losses), self._every)
        self._kept.append(after)
        self._start = None
        return result

    def _sketch_bytes(self, losses: tuple[float, ...]) -> bytes:
        rows = np.empty((len(self._sketches), 1 + SKETCH_WIDTH), dtype="<f4")
        rows[:, 0] = losses[:: self._every]
        if self._sketches:
            rows[:, 1:] = torch.stack(self._sketches).cpu().numpy()
        return rows.tobytes()

    def abandon(self) -> None:
        """Forget the running round, if any."""
        if self._start is not None:
            self._start = None
            self._optimizer.restore(self.private.optimizer, self.private.step)

    def roll_back(self, private: bytes) -> None:
        """Forget every round after the private state with this hash, a running one included. Raises OutOfTurn when it
        is not kept."""
        known = [state.hash for state in self._kept]
        if private not in known:
            raise OutOfTurn(f"The private state {private.hex()[:12]} is not among the {len(known)} that are kept.")
        if self._start is None and known[-1] == private:
            return
        self._start = None
        while self._kept[-1].hash != private:
            self._kept.pop()
        self._optimizer.restore(self.private.optimizer, self.private.step)

    def load_private(self, private: PrivateState | None) -> None:
        """Take another private state (None: the fresh one); the kept ones are forgotten. Raises OutOfTurn while a round
        is running or when the state is of another model, and BadOptimizer."""
        if self._start is not None:
            raise OutOfTurn("A private state was loaded while a round is running; cancel the round first.")
        size = self._parameters.layout.size
        if private is None:
            self._optimizer.restore(np.zeros(0, dtype=np.float32), 0)
            private = PrivateState(self._optimizer.moments(), np.zeros(size, dtype=np.float32), 0)
        if private.residual.size != size:
            raise OutOfTurn(f"A private state over {private.residual.size} numbers is not of this model of {size}.")
        self._optimizer.restore(private.optimizer, private.step)
        self._kept.clear()
        self._kept.append(private)


class Sketcher:
    """Eight numbers that follow how the parameters move.

    The flat buffer is cut into rows, and each row is summed with the same list of signs. What the row sums changed by
    since the last sketch is multiplied by a sign per row and added up in SKETCH_WIDTH equal runs of rows: a count
    sketch of the movement (Charikar, Chen and Farach-Colton, 2002) whose signs are products of two, as in a tensor
    sketch (Pham and Pagh, 2013). All signs are drawn from the job. Any change of a step changes the sketch, and its
    size is that of the step. Not the movement since the round began: that would hide a small change of a late step
    behind all the steps before it.

    A sketch is one pass over the parameters. Its numbers are differences of sums that are much larger, so they are
    taken in float64, where only the rounding of the parameters themselves is left; a device without float64 (MPS) adds
    a few times that.
    """

    def __init__(self, size: int, seed: bytes, device: torch.device) -> None:
        self._size, self._row = size, min(SKETCH_ROW, -(-size // SKETCH_WIDTH))
        rows = -(-size // self._row)
        runs = -(-rows // SKETCH_WIDTH) * SKETCH_WIDTH
        bits = np.frombuffer(
            blake3(seed, derive_key_context="shoal sketch signs").digest(-(-(self._row + runs) // 8)), np.uint8
        )
        drawn = 1.0 - 2.0 * np.unpackbits(bits, bitorder="little")[: self._row + runs]
        number = torch.float32 if device.type == "mps" else torch.float64
        signs = torch.from_numpy(drawn).to(device, number)
        self._column_signs, self._row_signs = signs[: self._row], signs[self._row :].view(SKETCH_WIDTH, -1)
        self._last, self._sums = (torch.zeros(runs, dtype=number, device=device) for _ in range(2))
        at_once = SUMMED_AT_ONCE if device.type == "cpu" else SUMMED_AT_ONCE_ON_DEVICE
        self._rows_at_once = min(rows, max(1, at_once // self._row))
        self._exact = torch.zeros(self._rows_at_once, self._row, dtype=number, device=device)

    def begin(self, flat: torch.Tensor) -> None:
        self._sum_rows(flat.detach(), self._last)

    def sketch(self, flat: torch.Tensor) -> torch.Tensor:
        """float32 [SKETCH_WIDTH]."""
        self._sum_rows(flat.detach(), self._sums)
        moved = torch.sub(self._sums, self._last, out=self._last).view(SKETCH_WIDTH, -1)
        sketch = moved.mul_(self._row_signs).sum(dim=1, dtype=moved.dtype).float()
        self._last, self._sums = self._sums, self._last
        return sketch

    def _sum_rows(self, flat: torch.Tensor, sums: torch.Tensor) -> None:
        exact = self._exact.view(-1)
        for row in range(0, -(-self._size // self._row), self._rows_at_once):
            part = flat[row * self._row : (row + self._rows_at_once) * self._row]
            rows = -(-part.numel() // self._row)
            exact[: part.numel()].copy_(part)
            exact[part.numel() : rows * self._row].zero_()
            torch.mv(self._exact[:rows], self._column_signs, out=sums[row : row + rows])
