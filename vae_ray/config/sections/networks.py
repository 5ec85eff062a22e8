"""Settings of the networks."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vae_ray.config.fields import Choice, Float, Int, Section, UserEntry, Widths

Activation = Literal["relu", "gelu", "silu", "tanh"]
Channels = Annotated[Widths, Field(min_length=1, max_length=8)]
Dropout = Annotated[Float, Field(ge=0, lt=1)]


class MlpNetwork(Section):
    """Fully connected encoder, and its mirror image as decoder."""

    name: Literal["mlp"] = "mlp"
    hidden: Widths = Field((400, 100), description="Widths of the encoder's hidden layers; the decoder mirrors them.")
    activation: Activation = Field("relu", description="Activation between layers.")
    dropout: Dropout = Field(0.0, description="Probability with which a hidden unit is dropped in training.")


class ConvNetwork(Section):
    """Strided convolutions and dense layers; the decoder mirrors the encoder."""

    name: Literal["conv"] = "conv"
    channels: Channels = Field(
        (32, 64, 128), description="Channels of the stages; each halves the sides of at least 4 pixels."
    )
    hidden: Widths = Field((256,), description="Widths of the dense layers between feature maps and latent.")
    activation: Activation = Field("relu", description="Activation between layers.")
    dropout: Dropout = Field(0.0, description="Probability with which a channel, or unit, is dropped in training.")


class ResnetNetwork(Section):
    """Pre-activation residual blocks with GroupNorm (He et al. 2016)."""

    name: Literal["resnet"] = "resnet"
    channels: Channels = Field(
        (32, 64, 128), description="Channels of the stages; each halves the sides of at least 4 pixels."
    )
    blocks: Int = Field(2, ge=1, le=64, description="Residual blocks of a stage.")
    groups: Int = Field(8, ge=1, description="Groups of GroupNorm; divides every number of channels.")
    attention: bool = Field(False, description="Self-attention at the lowest resolution.")
    latent: Literal["flat", "spatial"] = Field(
        "flat", description="flat: a vector; spatial: model.latent_dim channels at the lowest resolution."
    )
    activation: Activation = Field("silu", description="Activation in the blocks.")
    dropout: Dropout = Field(0.0, description="Probability with which a channel is dropped in training.")

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> ResnetNetwork:
        if any(width % self.groups or width == self.groups for width in self.channels):
            common = math.gcd(*self.channels)
            largest = next((n for n in range(common // 2, 1, -1) if common % n == 0), 1)
            # a group of one channel and one pixel would always be 0 after the norm
            raise ValueError(
                f"groups should divide each of channels {','.join(map(str, self.channels))} into at least 2 channels, "
                f"such as {largest}"
            )
        return self


class LadderNetwork(Section):
    """Two groups of latent variables; the lower group's prior is computed from the upper (Sønderby et al. 2016)."""

    name: Literal["ladder"] = "ladder"
    hidden: Annotated[Widths, Field(min_length=2, max_length=2)] = Field(
        (256, 256), description="Widths of the two deterministic layers, bottom first."
    )
    top_dim: Int = Field(
        8, ge=1, le=65536, description="Latent dimensions of the top group; model.latent_dim is the lower's."
    )


Network = Annotated[MlpNetwork | ConvNetwork | ResnetNetwork | LadderNetwork | UserEntry, Choice("network")]
