"""Inner optimizers: what a member's moments are, as one flat float32 vector that can be kept, hashed and put back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.errors import BadInput
from shoal.protocol.training import OptimizerSettings

Floats = NDArray[np.float32]


DIVIDES_GRADIENT = ("cpu", "cuda")
"""Where torch's fused AdamW divides the gradient by `grad_scale` in its own pass (MPS ignores it)."""


class BadOptimizer(BadInput):
    """An optimizer's state cannot be kept as float32 numbers, or does not fit what was kept."""

    code = "SH-150"


class InnerOptimizer(Protocol):
    """`moments` and `restore` are each other's inverse, bit for bit; no numbers at all stand for a fresh optimizer."""

    def moments(self) -> Floats:
        """A copy of the state, flat."""
        ...

    def restore(self, moments: Floats, step: int) -> None:
        """Go back to a state of `step` steps."""
        ...


class FlatAdamW:
    """AdamW (Loshchilov and Hutter, 2019) over one flat parameter buffer with its gradient: torch's fused kernel in a
    single pass over memory. Weight decay applies to every parameter. Gradients are clipped to a global norm."""

    def __init__(self, flat: torch.Tensor, gradient: torch.Tensor, settings: OptimizerSettings) -> None:
        self._gradient = gradient
        self._clip = settings.gradient_clip
        self.both = torch.zeros(2 * flat.numel(), dtype=torch.float32, device=flat.device)
        self._parameter = torch.nn.Parameter(flat, requires_grad=True)
        self._parameter.grad = gradient
        self._steps = torch.zeros((), dtype=torch.float32, device=flat.device)
        self._optimizer = torch.optim.AdamW(
            [self._parameter],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        mean, variance = self.both.chunk(2)
        self._optimizer.state[self._parameter] = {"step": self._steps, "exp_avg": mean, "exp_avg_sq": variance}

    def step(self, learning_rate: float) -> None:
        if self._clip > 0:
            excess = ((torch.linalg.vector_norm(self._gradient) + 1e-6) / self._clip).clamp_(min=1.0)
            if self._gradient.device.type in DIVIDES_GRADIENT:
                self._optimizer.grad_scale = excess  # type: ignore[attr-defined]
            else:
                self._gradient.div_(excess)
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()

    def set_step(self, step: int) -> None:
        self._steps.fill_(float(step))

    def moments(self) -> Floats:
        return np.array(self.both.cpu().numpy(), copy=True)

    def restore(self, moments: Floats, step: int) -> None:
        if moments.size not in (0, self.both.numel()):
            raise BadOptimizer(f"AdamW over this model keeps {self.both.numel()} numbers; {moments.size} were given.")
        if moments.size:
            self.both.copy_(torch.from_numpy(moments))
        else:
            self.both.zero_()
        self.set_step(step)


class TorchOptimizer:
    """Any `torch.optim` optimizer whose state is float32 tensors, for a user's own loop: its state tensors one after
    another, parameters in their groups' order, names in alphabetical order."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def _tensors(self) -> list[torch.Tensor]:
        found = []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                for name, value in sorted(self._optimizer.state.get(parameter, {}).items()):
                    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
                        kind = type(self._optimizer).__name__
                        raise BadOptimizer(f"{kind} keeps {name!r}, which is no float32 tensor; choose another one.")
                    found.append(value)
        return found

    def moments(self) -> Floats:
        parts = [tensor.detach().cpu().numpy().ravel() for tensor in self._tensors()]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)

    def restore(self, moments: Floats, step: int) -> None:
        if not moments.size:
            self._optimizer.state.clear()
            return
        if not self._tensors():
            self._create_state()
        tensors = self._tensors()
        if sum(tensor.numel() for tensor in tensors) != moments.size:
            raise BadOptimizer(f"The optimizer keeps another number of values than the {moments.size} that were kept.")
        start = 0
        with torch.no_grad():
            for tensor in tensors:
                stop = start + tensor.numel()
                tensor.copy_(torch.from_numpy(moments[start:stop]).view(tensor.shape))
                start = stop

    def _create_state(self) -> None:
        """torch optimizers make their state in their first step: one is done with zero gradients, and undone."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        before = [(parameter.detach().clone(), parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        with torch.no_grad():
            for parameter, (value, gradient) in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = gradient
