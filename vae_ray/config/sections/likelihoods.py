"""Section `likelihood`: what the decoder's outputs say about pixels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vae_ray.config.fields import Choice, Int, PixelScale, Section, UserEntry


class BernoulliLikelihood(Section):
    """Bernoulli with mean sigmoid(logit), one logit a pixel: binary images."""

    name: Literal["bernoulli"] = "bernoulli"


class ContinuousBernoulliLikelihood(Section):
    """A density on [0, 1] with one logit a pixel: grey levels between black and white (Loaiza-Ganem & Cunningham)."""

    name: Literal["continuous_bernoulli"] = "continuous_bernoulli"


class LocationScaleLikelihood(Section):
    """Fields of densities around a mean, with one scale of all pixels."""

    scale: PixelScale = Field(
        0.1,
        description="Standard deviation of a pixel, or the scale of laplace, in units of the [0, 1] range; at least "
        "0.001; of learned and optimal its initial value.",
    )
    sigma: Literal["fixed", "learned", "optimal"] = Field(
        "fixed",
        description="How the scale is found: fixed; learned, one trained number; optimal, in training the error of "
        "the current batch, afterwards its running average (Rybkin et al. 2021).",
    )
    mean: Literal["sigmoid", "identity"] = Field(
        "sigmoid",
        description="The mean as a function of the decoder's output: sigmoid keeps it in [0, 1], identity makes a "
        "linear decoder linear.",
    )


class GaussianLikelihood(LocationScaleLikelihood):
    """Normal around a mean by pixel, with one standard deviation."""

    name: Literal["gaussian"] = "gaussian"


class LaplaceLikelihood(LocationScaleLikelihood):
    """Laplace around a median by pixel, with one scale: absolute errors."""

    name: Literal["laplace"] = "laplace"


class DiscretizedLogisticLikelihood(Section):
    """A mixture of logistics over 256 levels, colours in a chain (PixelCNN++, Salimans et al. 2017): bits per dim."""

    name: Literal["discretized_logistic"] = "discretized_logistic"
    components: Int = Field(5, ge=1, le=256, description="Number of logistic distributions in the mixture of a pixel.")


class CategoricalLikelihood(Section):
    """A probability for each of the 256 levels of a pixel: bits per dim, and 256 decoder outputs for each channel."""

    name: Literal["categorical"] = "categorical"


Likelihood = Annotated[
    BernoulliLikelihood
    | ContinuousBernoulliLikelihood
    | GaussianLikelihood
    | LaplaceLikelihood
    | DiscretizedLogisticLikelihood
    | CategoricalLikelihood
    | UserEntry,
    Choice("likelihood"),
]
