"""Section `likelihood`: what the decoder's outputs say about pixels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vae_ray.config.fields import Choice, PixelScale, Section, UserEntry


class BernoulliLikelihood(Section):
    """Bernoulli with mean sigmoid(logit), one logit a pixel."""

    name: Literal["bernoulli"] = "bernoulli"


class GaussianLikelihood(Section):
    """Normal with mean sigmoid(logit) and one fixed standard deviation."""

    name: Literal["gaussian"] = "gaussian"
    scale: PixelScale = Field(
        0.1, description="Standard deviation of a pixel, in units of the [0, 1] range; at least 0.001."
    )


Likelihood = Annotated[BernoulliLikelihood | GaussianLikelihood | UserEntry, Choice("likelihood")]
