"""Section `objective`: how distortion, rate and other terms become a loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from vae_ray.config.fields import MAX_SAMPLES, Choice, Float, Int, Section, UserEntry
from vae_ray.config.sections.schedules import ConstantSchedule, Schedule

MOST_NATS = 1e30
"""So that a sum over images and dimensions is a float32."""


class ElboObjective(Section):
    """distortion + beta * rate (Higgins et al. 2017); with capacity or free bits in the place of the rate."""

    name: Literal["elbo"] = "elbo"
    beta: Float = Field(1.0, ge=0, description="Weight of the rate (KL); 1 gives the negative ELBO.")
    beta_schedule: Schedule = Field(ConstantSchedule(), description="How beta changes over the run.")
    capacity: Float | None = Field(
        None,
        ge=0,
        le=MOST_NATS,
        description="Nats at which the rate is held: beta * |rate - capacity|, with beta the gamma of Burgess et al. "
        "2018, for example 100; null holds it nowhere.",
    )
    capacity_schedule: Schedule = Field(
        ConstantSchedule(), description="How the capacity changes over the run; no effect without one."
    )
    free_bits: Float = Field(
        0.0,
        ge=0,
        le=MOST_NATS,
        description="Nats up to which the mean rate of a group or dimension is free: it costs max(free_bits, mean "
        "rate) (Kingma et al. 2016).",
    )
    free_bits_per: Literal["group", "dimension"] = Field(
        "group", description="What has free bits: each latent group, or each dimension (of spatial latents, channel)."
    )

    @field_validator("free_bits")
    @classmethod
    def _instead_of_capacity(cls, free_bits: float, info: ValidationInfo) -> float:
        if free_bits and info.data.get("capacity") is not None:
            raise ValueError("should be 0 where objective.capacity is given")
        return free_bits


class IwaeObjective(Section):
    """The bound of k importance samples (Burda et al. 2016)."""

    name: Literal["iwae"] = "iwae"
    num_samples: Int = Field(
        5,
        ge=1,
        le=MAX_SAMPLES,
        description="Samples of z for each image, k, decoded together; 1 gives the negative ELBO.",
    )


class DregObjective(Section):
    """The bound of k importance samples with doubly reparametrized gradients of the encoder (Tucker et al. 2019)."""

    name: Literal["dreg"] = "dreg"
    num_samples: Int = Field(5, ge=1, le=MAX_SAMPLES, description="Samples of z for each image, k, decoded together.")


class BetaTcObjective(Section):
    """distortion + alpha * mutual information + beta * total correlation + gamma * dimension KL (Chen et al. 2018).

    The aggregate posterior that they need is estimated from the global batch.
    """

    name: Literal["beta_tc"] = "beta_tc"
    alpha: Float = Field(1.0, ge=0, description="Weight of the mutual information of image and code.")
    beta: Float = Field(6.0, ge=0, description="Weight of the total correlation; with all three 1 the loss is elbo's.")
    gamma: Float = Field(1.0, ge=0, description="Weight of the KL of each dimension's aggregate posterior.")
    beta_schedule: Schedule = Field(ConstantSchedule(), description="How beta changes over the run.")
    estimator: Literal["stratified", "weighted"] = Field(
        "stratified",
        description="Weights of the batch's posteriors: stratified (unbiased), or weighted, whose terms are off by "
        "multiples of the logarithm of the number of training images.",
    )


class DipObjective(Section):
    """distortion + beta * rate + penalties on the covariance of the aggregate posterior (Kumar et al. 2018)."""

    name: Literal["dip"] = "dip"
    variant: Literal["I", "II"] = Field("II", description="Covariance of the posterior means (I), or of z itself (II).")
    beta: Float = Field(1.0, ge=0, description="Weight of the rate (KL).")
    off_diagonal: Float = Field(10.0, ge=0, description="Weight of the squared covariances, lambda_od, in nats.")
    diagonal: Float = Field(
        10.0,
        ge=0,
        description="Weight of the squared differences of variances from 1, lambda_d, in nats; the paper takes "
        "lambda_od, of I ten times that.",
    )


class MmdObjective(Section):
    """distortion + beta * rate + weight * MMD²(q(z), p(z)) over the global batch (Zhao et al. 2019, InfoVAE).

    InfoVAE's alpha and lambda are 1 - beta and weight + beta; beta 0 is the Wasserstein autoencoder of Tolstikhin et
    al. 2018 with a Gaussian kernel.
    """

    name: Literal["mmd"] = "mmd"
    beta: Float = Field(0.0, ge=0, description="Weight of the rate (KL); 0 leaves the posterior to the MMD alone.")
    weight: Float = Field(1000.0, ge=0, description="Weight of MMD², in nats.")


class GecoObjective(Section):
    """The smallest rate at which the distortion is `target` (Rezende & Viola 2018, GECO)."""

    name: Literal["geco"] = "geco"
    target: Float | None = Field(None, description="Distortion in nats per image that is allowed; must be given.")
    decay: Float = Field(0.99, ge=0, lt=1, description="Decay per step of the moving average of the distortion.")
    step_size: Float = Field(
        1e-4, gt=0, description="Relative change of the multiplier in a step, per nat above the target; at most 1 %."
    )


Objective = Annotated[
    ElboObjective
    | IwaeObjective
    | DregObjective
    | BetaTcObjective
    | DipObjective
    | MmdObjective
    | GecoObjective
    | UserEntry,
    Choice("objective"),
]
