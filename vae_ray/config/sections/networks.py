"""Settings of the networks."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vae_ray.config.fields import Choice, Counts, Float, Int, Section, UserEntry, Widths

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
    """Groups of latent variables from the top down, posteriors residual to learned priors (Vahdat & Kautz 2020)."""

    name: Literal["ladder"] = "ladder"
    kind: Literal["dense", "conv"] = Field("dense", description="Fully connected, or convolutional with spatial z.")
    hidden: Annotated[Widths, Field(min_length=1)] = Field(
        (256, 256), description="dense: widths from the bottom up, each with a group."
    )
    upper_dims: Widths = Field(
        (8,),
        description="dense: latent dimensions of the groups above the lowest, from the top down; the lowest has "
        "model.latent_dim.",
    )
    channels: Channels = Field(
        (32, 64), description="conv: channels from the bottom up; each halves the sides of at least 4 pixels."
    )
    latent_groups: Counts = Field(
        (1, 2), description="conv: groups at each of these sizes, model.latent_dim channels each; the last at least 1."
    )
    blocks: Int = Field(1, ge=1, le=64, description="Residual blocks at each size, and after each group.")
    activation: Activation = Field("silu", description="Activation in the blocks.")
    dropout: Dropout = Field(0.0, description="Probability with which a channel, or unit, is dropped in training.")

    @model_validator(mode="after")
    def _fits_the_kind(self) -> LadderNetwork:
        for key in ("channels", "latent_groups") if self.kind == "dense" else ("hidden", "upper_dims"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect in a ladder of kind {self.kind}")
        if 1 in (self.hidden if self.kind == "dense" else self.channels):
            raise ValueError("a width of 1 carries nothing: after a norm it would always be 0; should be at least 2")
        if self.kind == "dense" and len(self.upper_dims) != (num := len(self.hidden) - 1):
            raise ValueError(f"upper_dims should have one number less than hidden: {num}, not {len(self.upper_dims)}")
        if self.kind == "conv" and (len(self.latent_groups) != len(self.channels) or not self.latent_groups[-1]):
            raise ValueError(f"latent_groups should be {len(self.channels)} numbers as channels, the last at least 1")
        return self


Network = Annotated[MlpNetwork | ConvNetwork | ResnetNetwork | LadderNetwork | UserEntry, Choice("network")]
