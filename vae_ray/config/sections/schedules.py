"""Schedules: how a setting changes over a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vae_ray.config.fields import Choice, Float, Section


class ConstantSchedule(Section):
    """The value does not change."""

    name: Literal["constant"] = "constant"


class LinearSchedule(Section):
    """The value rises linearly from 0 (KL annealing, Bowman et al. 2016)."""

    name: Literal["linear"] = "linear"
    epochs: Float = Field(5.0, gt=0, description="Epochs until the full value is reached.")


BetaSchedule = Annotated[ConstantSchedule | LinearSchedule, Choice("schedule")]
