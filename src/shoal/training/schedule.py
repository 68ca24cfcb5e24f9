"""Which batches a share is cut into, and at which learning rate: functions of public records alone."""

from __future__ import annotations

import math

from shoal.protocol.training import OptimizerSettings, Schedule, TrainJob


def batch_sizes(samples: int, batch_samples: int) -> list[int]:
    """A share of `samples` as the fewest steps of at most `batch_samples`, as equal as possible, larger ones first."""
    steps = max(1, math.ceil(samples / batch_samples))
    size, larger = divmod(samples, steps)
    return [size + 1] * larger + [size] * (steps - larger)


def learning_rate(settings: OptimizerSettings, step: float, progress: float) -> float:
    """The rate at a nominal inner step, with `progress` (0 to 1) of the job's tokens done: full rate times a linear
    warmup that counts steps, as the optimizer's moments do, times a schedule that follows the budget."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    done = min(1.0, max(0.0, progress))
    if settings.schedule is Schedule.CONSTANT:
        left = 1.0
    elif settings.schedule is Schedule.LINEAR:
        left = 1.0 - done
    else:
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.learning_rate * warmup * (settings.final_fraction + (1.0 - settings.final_fraction) * left)


def round_rates(
    job: TrainJob, *, step: int, tokens_done: int, rounds_in_flight: int, round_samples: int, steps: int
) -> list[float]:
    """The rates of a member's `steps` inner steps in a round.

    `step` and `round_samples` (of all members together) stand in the Assignment, `tokens_done` in the Commit that it
    names; rounds between the two, still in flight, count as if they were of this round's size. A member with fewer
    steps walks the same stretch of the schedule in fewer strides.
    """
    round_tokens = round_samples * job.data.sequence_tokens
    return [
        learning_rate(
            job.optimizer,
            step + job.rounds.inner_steps * at / steps,
            (tokens_done + (rounds_in_flight + at / steps) * round_tokens) / job.token_budget,
        )
        for at in range(steps)
    ]
