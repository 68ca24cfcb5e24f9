"""What every engine does, whatever computes the steps of its rounds: it holds shared states, applies Commits, keeps and
puts back private states, and says what a round came to."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.errors import EngineError
from shoal.identity import blake3_hash, hash_of_parts
from shoal.protocol.training import STEPS_MAX, TrainJob
from shoal.rounds.order import sample_indices
from shoal.training.commands import ApplyCommit, PrivateNow, RoundDone, RunRound, StateHeld
from shoal.training.member import FlatParameters, Member, RoundResult
from shoal.training.optimizer import InnerOptimizer
from shoal.training.outer import OuterStep, WeighedUpdate
from shoal.training.private import PrivateState
from shoal.training.schedule import batch_sizes
from shoal.training.state import SharedState
from shoal.training.updates import Update

STATES_MAX = 6
"""Shared states held at once: the newest and those that rounds in flight or a replay start from."""
WARM_UP_STEPS = 2
MEASURED_STEPS = 3
MEASURED_S = 0.5
"""A measurement takes at least this many steps and seconds."""


class WrongState(EngineError):
    """A Commit led to another shared state than the one it names, or a named state is not held."""

    code = "SH-534"


class WrongRange(EngineError):
    """An assignment asks for positions that a pass over the data does not have, or for too many of them."""

    code = "SH-538"


class MemberEngine:
    """A member and the shared states around it. Not thread-safe."""

    def __init__(self, job: TrainJob, parameters: FlatParameters, optimizer: InnerOptimizer, state: Path) -> None:
        """`state` is the file of the shared state to begin with. Raises BadState, WrongState."""
        self.job = job
        self.parameters = parameters
        seed = hash_of_parts("sketch seed", [job.seed.to_bytes(8, "big")])
        self.member = Member(parameters, optimizer, job.rounds, seed)
        self._outer = OuterStep(job.rounds)
        self._states: OrderedDict[bytes, SharedState] = OrderedDict()
        self.newest = self.hold(SharedState.read(state))
        parameters.load(self.newest.parameters)

    # --- rounds ----------------------------------------------------------------------------------------------------

    def samples_of(self, command: RunRound) -> tuple[NDArray[np.int64], list[int]]:
        """The samples of a round in their order, and the sizes of the batches they are cut into. Raises WrongRange."""
        for piece in command.ranges:
            if not piece.start < piece.stop <= self.job.data.samples:
                raise WrongRange(
                    f"Positions {piece.start} to {piece.stop} of round {command.round} do not lie in a pass of "
                    f"{self.job.data.samples} samples."
                )
        count = sum(piece.stop - piece.start for piece in command.ranges)
        steps = -(-count // self.job.batch_samples)
        if steps > STEPS_MAX:  # before anything of that size is made
            raise WrongRange(f"Round {command.round} asks for {steps} steps; a round has at most {STEPS_MAX}.")
        samples = sample_indices(self.job.seed, self.job.data.samples, command.ranges)
        return samples, batch_sizes(count, self.job.batch_samples)

    def start_of(self, command: RunRound) -> NDArray[np.float32]:
        """The flat parameters a round starts from. Raises WrongState, BadUpdate."""
        in_flight = None if command.in_flight is None else self.read_update(command.in_flight)
        return self.member.start_state(self.state(command.base_state), in_flight)

    def seed_of(self, command: RunRound) -> int:
        """Seeds whatever is random inside a round's steps."""
        parts = [self.job.seed.to_bytes(8, "big"), command.round.to_bytes(8, "big"), command.member]
        return int.from_bytes(hash_of_parts("round seed", parts)[:7], "big")

    def sent_of(self, command: RunRound) -> Update | None:
        """What the member published for a round, where that is known already. Raises BadUpdate."""
        return None if command.sent is None else self.read_update(command.sent)

    def done(self, command: RunRound, result: RoundResult, samples: int, elapsed_s: float) -> RoundDone:
        """Write what a finished round leaves behind, and say what it came to."""
        Path(command.update).write_bytes(result.update)
        if command.snapshot is not None:
            result.after.write(Path(command.snapshot))
        return RoundDone(
            round=command.round,
            update_hash=blake3_hash(result.update),
            update_bytes=len(result.update),
            private_before=result.before.hash,
            private_after=result.after.hash,
            loss_first=result.losses[0],
            loss_last=result.losses[-1],
            losses=result.losses,
            sketches=result.sketches,
            sketch_every=result.sketch_every,
            samples=samples,
            tokens=samples * self.job.data.sequence_tokens,
            compute_ms=max(1, round(elapsed_s * 1000)),
            snapshot_bytes=result.after.size if command.snapshot is not None else 0,
        )

    def read_update(self, path: str) -> Update:
        return self.member.updates.read(Path(path).read_bytes())

    # --- private states --------------------------------------------------------------------------------------------

    def roll_back(self, private: bytes) -> PrivateNow:
        self.member.roll_back(private)
        return PrivateNow(private=private)

    def load_private(self, path: str | None) -> PrivateNow:
        self.member.load_private(None if path is None else PrivateState.read(Path(path)))
        return PrivateNow(private=self.member.private.hash)

    def write_private(self, path: str) -> PrivateNow:
        private = self.member.private
        private.write(Path(path))
        return PrivateNow(private=private.hash, size=private.size)

    # --- shared states ---------------------------------------------------------------------------------------------

    def hold(self, state: SharedState) -> SharedState:
        """Raises WrongState when it is of another model."""
        if state.layout != self.parameters.layout:
            raise WrongState("The shared state does not have the tensors that this job's model has here.")
        self._states[state.hash] = state
        self._states.move_to_end(state.hash)
        while len(self._states) > STATES_MAX:
            self._states.popitem(last=False)
        return state

    def state(self, state_hash: bytes) -> SharedState:
        """A held shared state. Raises WrongState."""
        if state_hash not in self._states:
            raise WrongState(f"Shared state {state_hash.hex()[:12]} is not among the {len(self._states)} held here.")
        return self._states[state_hash]

    def apply_commit(self, command: ApplyCommit) -> StateHeld:
        """Raises WrongState when the result is not the state that the Commit names, BadUpdate, BadState."""
        accepted = [
            WeighedUpdate(self.read_update(update.path), update.weight_ppm, update.scale_ppm)
            for update in command.accepted
        ]
        state = self._outer.apply(self.state(command.previous), accepted)
        if command.state is not None and state.hash != command.state:
            raise WrongState(
                f"Commit {command.round} names shared state {command.state.hex()[:12]}, but applying it gave "
                f"{state.hash.hex()[:12]}: this node and the driver disagree, and this node stops."
            )
        self.newest = self.hold(state)
        if command.write is not None:
            state.write(Path(command.write))
        return _held(state)

    def load_state(self, path: str) -> StateHeld:
        return _held(self.hold(SharedState.read(Path(path))))

    def write_state(self, state_hash: bytes, path: str) -> StateHeld:
        state = self.state(state_hash)
        state.write(Path(path))
        return _held(state)


def _held(state: SharedState) -> StateHeld:
    return StateHeld(state=state.hash, size=state.size)
