"""Settings of the networks."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from vae_ray.config.fields import Choice, Counts, Float, Int, Misfit, Section, UserEntry, Widths

Activation = Literal["relu", "gelu", "silu", "tanh"]


def _refuse_ones(widths: tuple[int, ...]) -> tuple[int, ...]:
    if 1 in widths:
        at_least_two = [max(2, width) for width in widths]
        raise Misfit("should each be at least 2: after a norm a single value would always be 0", instead=at_least_two)
    return widths


Channels = Annotated[Widths, Field(min_length=1, max_length=8)]
NormedChannels = Annotated[Channels, AfterValidator(_refuse_ones)]
NormedWidths = Annotated[Widths, Field(min_length=1), AfterValidator(_refuse_ones)]
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
    channels: NormedChannels = Field(
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

    @field_validator("groups")
    @classmethod
    def _divides_channels(cls, groups: int, info: ValidationInfo) -> int:
        channels: tuple[int, ...] = info.data.get("channels", ())
        if any(width % groups or width == groups for width in channels):
            common = math.gcd(*channels)
            largest = next((n for n in range(common // 2, 1, -1) if common % n == 0), 1)
            # a group of one channel and one pixel would always be 0 after the norm
            parts = f"should divide each of channels {','.join(map(str, channels))} into groups of at least 2 channels"
            raise Misfit(parts, instead=largest)
        return groups


class LadderNetwork(Section):
    """Groups of latent variables from the top down, posteriors residual to learned priors (Vahdat & Kautz 2020)."""

    name: Literal["ladder"] = "ladder"
    kind: Literal["dense", "conv"] = Field("dense", description="Fully connected, or convolutional with spatial z.")
    hidden: NormedWidths = Field(
        (256, 256), description="dense: widths from the image up, each with a group; the last one's is the top group."
    )
    upper_dims: Widths = Field(
        (8,),
        description="dense: latent dimensions of the groups above the lowest, from the top down; the lowest has "
        "model.latent_dim.",
    )
    channels: NormedChannels = Field(
        (32, 64), description="conv: channels from the image up; each halves the sides of at least 4 pixels."
    )
    latent_groups: Counts = Field(
        (1, 2),
        description="conv: groups at each of these sizes, the largest first, of model.latent_dim channels each; the "
        "last at least 1.",
    )
    blocks: Int = Field(1, ge=1, le=64, description="Residual blocks at each size, and after each group.")
    activation: Activation = Field("silu", description="Activation in the blocks.")
    dropout: Dropout = Field(0.0, description="Probability with which a channel, or unit, is dropped in training.")

    @field_validator("hidden", "upper_dims", "channels", "latent_groups")
    @classmethod
    def _fits_the_kind(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        given, name = info.data, str(info.field_name)
        kind = given.get("kind")
        its_kind = "dense" if name in ("hidden", "upper_dims") else "conv"
        if kind != its_kind and value != cls.model_fields[name].default:
            raise Misfit(f"which has no effect in a ladder of kind {kind}", instead=its_kind, field="kind")
        if kind == its_kind and name == "upper_dims" and len(value) != (num := len(given.get("hidden", ())) - 1):
            raise Misfit(f"should be one number less than hidden: {num}, not {len(value)}", instead=[8] * num)
        if kind == its_kind and name == "latent_groups":
            num = len(given.get("channels", ()))
            if len(value) != num or not any(value[-1:]):
                raise Misfit(f"should be as many numbers as channels, {num}, the last at least 1", instead=[1] * num)
        return value


Network = Annotated[MlpNetwork | ConvNetwork | ResnetNetwork | LadderNetwork | UserEntry, Choice("network")]
