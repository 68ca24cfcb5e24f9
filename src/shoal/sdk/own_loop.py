"""A user's own PyTorch loop as a member of a training job.

    member = shoal.join("digits", model, optimizer, samples=len(images))
    for batch in member:                       # int64 indices of the samples of one step
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        member.stepped(loss)
    member.held_out(test_loss)                 # for the report; may be left out

The same script is run in three places, and joins differently in each:

- by its user, on any number of machines: it takes part in the job as a node of its own;
- by `shoal train`, on the owner's machine: it says what the job starts from, and measures the model at the end;
- by whoever replays, on the owner's machine: it does one member's rounds again.

Nobody else ever runs it. Each round starts from parameters, samples and random numbers that follow from records, so a
loop whose steps follow from `batch`, the model, the optimizer, `member.progress` and the global random numbers alone
does the same work again, bit for bit.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shoal.errors import BadInput, ShoalError
from shoal.identity import HASH_BYTES
from shoal.protocol.hubs import HubTicket
from shoal.sdk.loop_engine import ORDERS_MAX, BadLoop, LoopEngine, Orders, trained_parameters
from shoal.sdk.loop_node import LoopNode, LoopPlace
from shoal.sdk.loop_script import loops_folder
from shoal.sdk.places import find_hubs, user_key
from shoal.world import SystemClock, SystemDice

STORAGE_BYTES = 20 << 30


class BadOwner(BadInput):
    """What should name a job's owner does not."""

    code = "SH-147"


class Loop(Protocol):
    """What hands out batches: `LoopEngine`, or a look at the script."""

    round: int
    progress: float
    ended: str

    def batches(self) -> Iterator[NDArray[np.int64]]: ...

    def stepped(self, loss: torch.Tensor | float) -> None: ...


class LoopMember:
    """This process' part in a job. Iterate over it once, and call `stepped` after each step."""

    def __init__(
        self,
        loop: Loop,
        name: str,
        *,
        close: Callable[[], None] = lambda: None,
        held_out: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.name = name
        """What this process is called in the report."""
        self._loop, self._close, self._held_out = loop, close, held_out
        self._begun = False

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The samples of one step after another: int64 indices, shape (at most batch_samples,). Ends with the job; the
        model then holds the newest shared state. A round that is cancelled is simply followed by the batches of
        another. Leaving the loop early leaves the job. Raises BadLoop."""
        if self._begun:
            raise BadLoop("A member's batches can be iterated over once: the job decides how often samples come.")
        self._begun = True
        over = False
        try:
            yield from self._loop.batches()
            over = True
        finally:
            if not over:
                self.close()

    def stepped(self, loss: torch.Tensor | float) -> None:
        """To be called after each optimizer step, with the loss (a mean over the batch). Raises BadLoop."""
        self._loop.stepped(loss)

    @property
    def round(self) -> int:
        """The round that the last batch is of; -1 outside of rounds, as while the loop's speed is measured."""
        return self._loop.round

    @property
    def progress(self) -> float:
        """Share of the job's budget, 0 to 1, that is done at this step. Make a learning rate schedule of this, not of
        a counter: steps may be undone, and others may do more of them."""
        return self._loop.progress

    @property
    def ended(self) -> str:
        """Why the loop ended."""
        return self._loop.ended

    def held_out(self, loss: float) -> None:
        """After the loop: the loss on samples that are not trained on. It gets into the report of `shoal train`, which
        runs the script once before the job and once after it; in a process that takes part it is not needed."""
        self._held_out(float(loss))

    def close(self) -> None:
        """Leave the job in order; done by itself when the script ends."""
        self._close()


Setting = Callable[[str, nn.Module, torch.optim.Optimizer, int], LoopMember]
_setting: Setting | None = None


def run_in(setting: Setting) -> None:
    """Have every later `join` in this process be answered by `setting`: how `loop_worker` runs a script."""
    global _setting
    _setting = setting


def join(
    job: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    samples: int,
    hubs: Sequence[str] | None = None,
    owner: str | None = None,
    name: str | None = None,
    folder: Path | None = None,
    listen: str | None = "tcp://127.0.0.1:0",
    threads: int | None = None,
) -> LoopMember:
    """Take part in `job`, the name in its job file, with a loop over `samples` samples of one's own.

    Every process needs the same samples in the same order, and a model of the same parameters; what they start from
    comes from the job. All parameters that want a gradient are shared, in float32; buffers are not. The optimizer may
    be any of torch whose state is float32.

    `hubs` are tickets; without them those of SHOAL_HUB, else of the shoal that `shoal up` runs here. `owner` is the
    NodeId of the key that signs the job, in hexadecimal: only its jobs are worked for. Without it, SHOAL_OWNER, else
    this user's own key. `name` is what this process is called: SHOAL_NAME, else the machine's name and a number;
    `folder` keeps its key and blobs. `threads` is how many CPU threads compute; a replay takes as many.

    Raises BadLoop, BadOwner, NoHub, and other ShoalErrors for what cannot work. One that the script does not catch ends
    it with its sentence and exit code 1.
    """
    _say_what_ends_it()
    if samples < 1:
        raise BadLoop(f"A loop over {samples} samples has nothing to train on.")
    if _setting is not None:
        return _setting(job, model, optimizer, samples)
    logging.getLogger("shoal").addHandler(logging.NullHandler())  # what is said is the script's own matter
    clock = SystemClock()
    orders: Orders = queue.Queue(ORDERS_MAX)
    device = next(iter(trained_parameters(model).values())).device
    node = LoopNode(
        LoopPlace(
            job=job,
            owner=_owner(owner),
            hubs=_tickets(hubs),
            folder=folder or loops_folder(job),
            name=name or os.environ.get("SHOAL_NAME") or None,
            listen=listen,
            threads=threads or torch.get_num_threads(),
            device=device,
            storage_bytes=STORAGE_BYTES,
        ),
        orders,
        clock,
        SystemDice(),
    )
    engine = LoopEngine(job, model, optimizer, samples, orders, clock.monotonic)
    called = node.start()
    atexit.register(node.close)
    print(f"{called} waits for job {job!r}: it begins when its owner runs `shoal train`.", file=sys.stderr)
    return LoopMember(engine, called, close=node.close)


def _say_what_ends_it() -> None:
    """A ShoalError that a script does not catch is a sentence for whoever started it, without a traceback."""
    before = sys.excepthook

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ShoalError):
            print(f"{error.code}: {error}", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = say


def _tickets(hubs: Sequence[str] | None) -> list[HubTicket]:
    return find_hubs(list(hubs) if hubs else None)


def _owner(text: str | None) -> bytes:
    text = text or os.environ.get("SHOAL_OWNER", "")
    if not text:
        return user_key().node_id
    try:
        owner = bytes.fromhex(text)
    except ValueError:
        owner = b""
    if len(owner) != HASH_BYTES:
        raise BadOwner(f"{text!r} names no owner: write the {2 * HASH_BYTES} digits that `shoal train` prints.")
    return owner
