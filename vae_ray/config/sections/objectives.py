"""Section `objective`: how distortion, rate and other terms become a loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vae_ray.config.fields import Choice, Float, Section, UserEntry
from vae_ray.config.sections.schedules import BetaSchedule, ConstantSchedule


class ElboObjective(Section):
    """distortion + beta * rate (Higgins et al. 2017)."""

    name: Literal["elbo"] = "elbo"
    beta: Float = Field(1.0, ge=0, description="Weight of the rate (KL); 1 gives the negative ELBO.")
    beta_schedule: BetaSchedule = Field(ConstantSchedule(), description="How beta changes over the run.")


class MmdObjective(Section):
    """distortion + beta * rate + weight * MMD²(q(z), p(z)) over the global batch (Zhao et al. 2019, InfoVAE)."""

    name: Literal["mmd"] = "mmd"
    beta: Float = Field(0.0, ge=0, description="Weight of the rate (KL); 0 leaves the posterior to the MMD alone.")
    weight: Float = Field(1000.0, ge=0, description="Weight of MMD², in nats.")


Objective = Annotated[ElboObjective | MmdObjective | UserEntry, Choice("objective")]
