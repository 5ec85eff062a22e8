"""Settings of the networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vae_ray.config.fields import Choice, Int, Section, UserEntry, Widths

Activation = Literal["relu", "gelu", "silu", "tanh"]


class MlpNetwork(Section):
    """Fully connected encoder, and its mirror image as decoder."""

    name: Literal["mlp"] = "mlp"
    hidden: Widths = Field((400, 100), description="Widths of the encoder's hidden layers; the decoder mirrors them.")
    activation: Activation = Field("relu", description="Activation between layers.")


class LadderNetwork(Section):
    """Two groups of latent variables; the lower group's prior is computed from the upper (Sønderby et al. 2016)."""

    name: Literal["ladder"] = "ladder"
    hidden: Annotated[Widths, Field(min_length=2, max_length=2)] = Field(
        (256, 256), description="Widths of the two deterministic layers, bottom first."
    )
    top_dim: Int = Field(
        8, ge=1, le=65536, description="Latent dimensions of the top group; model.latent_dim is the lower's."
    )


Network = Annotated[MlpNetwork | LadderNetwork | UserEntry, Choice("network")]
