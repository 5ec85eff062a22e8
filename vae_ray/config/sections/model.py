"""Section `model`: network and prior."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from vae_ray.config.fields import MAX_CLASSES, Int, Misfit, Name, Section
from vae_ray.config.sections.networks import MlpNetwork, Network
from vae_ray.config.sections.priors import Prior, StandardPrior


class ModelConfig(Section):
    """Network and prior."""

    latent_dim: Int = Field(20, ge=1, le=65536, description="Number of latent dimensions.")
    network: Network = Field(MlpNetwork(), description="Encoder and decoder.")
    prior: Prior = Field(StandardPrior(), description="Distribution p(z) of the top group.")
    condition: Name | None = Field(
        None,
        description="Name of the labels that encoder, decoder and prior are given (a conditional VAE), for example "
        "label; null gives none.",
    )
    num_classes: Int | None = Field(
        None,
        ge=1,
        le=MAX_CLASSES,
        description="Number of values of those labels, 0, 1, ...; null takes it from the data.",
    )
    initialization: Literal["torch", "he", "glorot"] = Field(
        "torch",
        description="Initial weights: torch's own; he for ReLU, glorot for tanh, both with a decoder that starts at "
        "the mean image.",
    )
    encoder_range: Literal["unit", "signed"] = Field(
        "unit", description="Range of pixels fed to the encoder: unit [0, 1] or signed [-1, 1]."
    )

    @field_validator("num_classes")
    @classmethod
    def _only_of_a_condition(cls, num_classes: int | None, info: ValidationInfo) -> int | None:
        if num_classes is not None and info.data.get("condition") is None:
            raise Misfit("which has no effect without model.condition", instead="label", field="condition")
        return num_classes
