"""Settings of the priors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vae_ray.config.fields import Choice, Int, Section, UserEntry, Widths


class StandardPrior(Section):
    """N(0, I)."""

    name: Literal["standard"] = "standard"


class MixturePrior(Section):
    """A mixture of diagonal Gaussians with trained means, variances and weights."""

    name: Literal["mixture"] = "mixture"
    components: Int = Field(32, ge=1, le=4096, description="Number of Gaussians.")


class VampPrior(Section):
    """The mean of the posteriors of trained pseudo-inputs (Tomczak & Welling 2018)."""

    name: Literal["vamp"] = "vamp"
    components: Int = Field(
        100, ge=1, le=4096, description="Number of pseudo-inputs; each step computes their posteriors too."
    )


class FlowPrior(Section):
    """A normalizing flow: couplings of rational-quadratic splines (Durkan et al. 2019)."""

    name: Literal["flow"] = "flow"
    transforms: Int = Field(4, ge=1, le=64, description="Number of couplings; each changes half of the dimensions.")
    hidden: Widths = Field((64, 64), description="Widths of the hidden layers of each coupling's network.")


Prior = Annotated[StandardPrior | MixturePrior | VampPrior | FlowPrior | UserEntry, Choice("prior")]
