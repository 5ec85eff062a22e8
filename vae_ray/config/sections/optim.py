"""Section `optim`: stochastic optimisation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from vae_ray.config.fields import Choice, Float, Fractions, Int, Misfit, Section


class ConstantRate(Section):
    """The learning rate does not change."""

    name: Literal["constant"] = "constant"


class LinearDecay(Section):
    """The learning rate falls linearly to zero over all steps of the run."""

    name: Literal["linear"] = "linear"


class CosineDecay(Section):
    """The learning rate falls to zero along half a cosine over all steps of the run (Loshchilov & Hutter 2017)."""

    name: Literal["cosine"] = "cosine"


class StepDecay(Section):
    """The learning rate changes after given epochs."""

    name: Literal["step"] = "step"
    epochs: Fractions = Field((), description="Epochs after which the learning rate changes, rising.")
    factors: Fractions = Field(
        (0.1,), description="Factor of optim.lr after each of them; a single one is applied again at each."
    )

    @field_validator("epochs")
    @classmethod
    def _rise(cls, epochs: tuple[float, ...]) -> tuple[float, ...]:
        if (rising := sorted(set(epochs))) != list(epochs):
            raise Misfit("should be in rising order", instead=rising)
        return epochs

    @field_validator("factors")
    @classmethod
    def _as_many(cls, factors: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        num = len(info.data.get("epochs", factors))
        if len(factors) not in (1, num):
            raise Misfit(f"should be one number, or as many as the {num} epochs", instead=0.1)
        return factors


class OneCycle(Section):
    """The learning rate rises to its peak and falls to nearly zero, both along half a cosine (Smith & Topin 2018)."""

    name: Literal["one_cycle"] = "one_cycle"
    rise: Float = Field(0.3, gt=0, lt=1, description="Part of the run in which the learning rate rises.")
    start_factor: Float = Field(0.04, gt=0, le=1, description="Learning rate at the first step, as a part of optim.lr.")


RateSchedule = Annotated[ConstantRate | LinearDecay | CosineDecay | StepDecay | OneCycle, Choice("schedule")]


class OptimConfig(Section):
    """Stochastic optimisation."""

    optimizer: Literal["adam", "adamw"] = Field("adam", description="Update rule.")
    lr: Float = Field(1e-3, gt=0, description="Peak learning rate, for the mean gradient of the global batch.")
    beta1: Float = Field(0.9, ge=0, lt=1, description="Decay per step of Adam's first moment.")
    beta2: Float = Field(0.999, ge=0, lt=1, description="Decay per step of Adam's second moment.")
    eps: Float = Field(1e-8, gt=0, description="Added to the root of Adam's second moment.")
    schedule: RateSchedule = Field(ConstantRate(), description="How the learning rate changes over the run.")
    warmup_steps: Int = Field(0, ge=0, description="Steps over which the learning rate first rises linearly from zero.")
    weight_decay: Float = Field(0.0, ge=0, description="Weight decay (L2 for adam, decoupled for adamw).")
    grad_clip: Float | None = Field(
        None, gt=0, description="Largest allowed global 2-norm of the gradient; null leaves it as it is."
    )
