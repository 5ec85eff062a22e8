"""Schedules of the learning rate and of beta: how far through the run -> a factor of the peak value."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]

SCHEDULES: dict[str, Schedule] = {
    # Each maps progress in [0, 1] to a factor in [0, 1] that starts at 1.
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),  # Loshchilov & Hutter 2017, eq. 5
}


def scheduled(peak: float, schedule: str, *, step: int, num_steps: int, warmup_steps: int = 0) -> float:
    """The value at `step` (0-based) of a run of `num_steps`: a linear rise over `warmup_steps`, then the schedule.

    A function of the step alone, so that a resumed run needs no schedule state.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * SCHEDULES[schedule](min(1.0, progress))
