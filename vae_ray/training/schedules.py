"""Schedules of the learning rate: how far through the run -> a factor of the peak value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vae_ray.config.sections.optim import OneCycle, StepDecay

ONE_CYCLE_END = 4e-6
"""Factor with which a one-cycle schedule ends."""


def _half_cosine(start: float, end: float, t: float) -> float:
    """From `start` at t = 0 to `end` at t = 1."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * t))


def _one_cycle(config: OneCycle, progress: float, epoch: float) -> float:
    if progress < config.rise:
        return _half_cosine(config.start_factor, 1.0, progress / config.rise)
    return _half_cosine(1.0, ONE_CYCLE_END, (progress - config.rise) / (1 - config.rise))


def _step(config: StepDecay, progress: float, epoch: float) -> float:
    # an epoch that has begun by rounding alone has begun
    num_passed = sum(epoch >= limit - 1e-9 for limit in config.epochs)
    if num_passed == 0:
        return 1.0
    return config.factors[0] ** num_passed if len(config.factors) == 1 else config.factors[num_passed - 1]


SCHEDULES: dict[str, Callable[[Any, float, float], float]] = {
    # each is given the entry's settings, progress in [0, 1] after the warm-up, and the (fractional) epochs so far
    "constant": lambda config, progress, epoch: 1.0,
    "linear": lambda config, progress, epoch: 1.0 - progress,
    "cosine": lambda config, progress, epoch: _half_cosine(1.0, 0.0, progress),  # Loshchilov & Hutter 2017, eq. 5
    "step": _step,
    "one_cycle": _one_cycle,
}


def rate_factor(config: Any, progress: float, *, epoch: float) -> float:
    """The factor of the peak learning rate under a schedule's settings."""
    return SCHEDULES[config.name](config, progress, epoch)
