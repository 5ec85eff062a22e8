"""Schedules: how a setting of the objective rises from 0 to its full value over a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vae_ray.config.fields import Choice, Float, Int, Section

EPOCHS: Any = Field(5.0, gt=0, description="Epochs until the full value stays; no effect where steps are given.")
STEPS: Any = Field(None, ge=1, description="Steps until the full value stays; null counts epochs.")


class ConstantSchedule(Section):
    """The value does not change."""

    name: Literal["constant"] = "constant"


class LinearSchedule(Section):
    """The value rises linearly from 0 (KL annealing, Bowman et al. 2016)."""

    name: Literal["linear"] = "linear"
    epochs: Float = EPOCHS
    steps: Int | None = STEPS


class CosineSchedule(Section):
    """The value rises from 0 along half a cosine, without a kink at either end."""

    name: Literal["cosine"] = "cosine"
    epochs: Float = EPOCHS
    steps: Int | None = STEPS


class CyclicalSchedule(Section):
    """The value rises linearly from 0 and stays, several times over (Fu et al. 2019)."""

    name: Literal["cyclical"] = "cyclical"
    epochs: Float = EPOCHS
    steps: Int | None = STEPS
    cycles: Int = Field(4, ge=1, description="Cycles in those epochs or steps.")
    ratio: Float = Field(0.5, gt=0, le=1, description="Part of a cycle in which the value rises.")


Schedule = Annotated[ConstantSchedule | LinearSchedule | CosineSchedule | CyclicalSchedule, Choice("schedule")]
