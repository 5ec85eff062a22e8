"""Schedules of an objective's settings: functions of the step alone, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vae_ray.config.sections.schedules import CyclicalSchedule

ROUNDING = 1e-9
"""Of a cycle: one that has begun by rounding alone has begun."""


def _cyclical(config: CyclicalSchedule, t: float) -> float:
    # Fu et al. 2019 (arXiv:1903.10145), eq. 6 and 7
    if t == 1.0:
        return 1.0
    position = (t * config.cycles + ROUNDING) % 1.0 - ROUNDING
    return min(1.0, max(0.0, position) / config.ratio)


SCHEDULES: dict[str, Callable[[Any, float], float]] = {
    # each is given the entry's settings and the part in [0, 1] of its epochs or steps that is done
    "constant": lambda config, t: 1.0,
    "linear": lambda config, t: t,
    "cosine": lambda config, t: 0.5 * (1.0 - math.cos(math.pi * t)),
    "cyclical": _cyclical,
}


def schedule_factor(config: Any, *, epochs: float, steps: int) -> float:
    """The factor in [0, 1] of the full value after that many (fractional) epochs and steps; 1 without a schedule."""
    if config is None or config.name == "constant":
        return 1.0
    done = epochs / config.epochs if config.steps is None else steps / config.steps
    return SCHEDULES[config.name](config, min(1.0, done))
