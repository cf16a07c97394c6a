"""A learning rate in two phases: high while a new expert is seeded, low while it is fitted in among the others.

seed:         f rises linearly to 1 over the warmup, then falls by a cosine to the ratio
consolidate:  f falls by a cosine from the ratio to 0
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def two_phase_factor(step: int, *, seed_steps: int, consolidate_steps: int, warmup_steps: int, ratio: float) -> float:
    """The factor on the peak learning rate at a step, counted from 0; 0 behind the last step."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if step < seed_steps:
        done = (step - warmup_steps) / (seed_steps - warmup_steps)
        return ratio + (1 - ratio) * _cosine(done)
    if step < seed_steps + consolidate_steps:
        return ratio * _cosine((step - seed_steps) / consolidate_steps)
    return 0.0


def _cosine(done: float) -> float:
    """From 1 to 0 as `done` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


class TwoPhaseLRScheduler(LambdaLR):
    """Seed, then consolidate. Like any scheduler of torch: `step()` after each optimiser step, `state_dict()`.

    Args:
        optimizer: its groups' learning rates are the peaks of the seed phase.
        seed_steps: optimiser steps of the first phase.
        consolidate_steps: of the second.
        warmup_steps: of the first phase, in which the rate rises.
        ratio: the rate at the end of the first phase and the beginning of the second, over the peak.
        last_step: the step that was taken last, when a run goes on.

    Raises:
        ValueError: steps that do not fit together, or a ratio outside [0, 1].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        seed_steps: int,
        consolidate_steps: int,
        warmup_steps: int = 0,
        ratio: float = 0.1,
        last_step: int = -1,
    ) -> None:
        if seed_steps < 0 or consolidate_steps < 0 or seed_steps + consolidate_steps < 1:
            raise ValueError(
                f"seed_steps is {seed_steps} and consolidate_steps {consolidate_steps}, but neither may be negative "
                "and together they must make at least one step."
            )
        if not 0 <= warmup_steps <= seed_steps:
            raise ValueError(f"warmup_steps is {warmup_steps}, but must lie between 0 and seed_steps ({seed_steps}).")
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio is {ratio}, but must lie in [0, 1].")
        super().__init__(
            optimizer,
            lambda step: two_phase_factor(
                step,
                seed_steps=seed_steps,
                consolidate_steps=consolidate_steps,
                warmup_steps=warmup_steps,
                ratio=ratio,
            ),
            last_epoch=last_step,
        )
