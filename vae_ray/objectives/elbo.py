"""The objective: per-example terms of the ELBO, and how they combine into the loss.

Terms are always `distortion` and `rate` in nats; the loss weighs the rate by beta (Higgins et al. 2017,
eq. 4; names after Alemi et al. 2018, arXiv:1711.00464). Evaluation never sees beta.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Forward


class ElboTerms(NamedTuple):
    """Per-example terms in nats, each `(batch,)`; negative ELBO = distortion + rate."""

    distortion: Tensor
    """-log p(x|z) for one z ~ q(z|x), summed over pixels."""
    rate: Tensor
    """KL(q(z|x) || p(z)), summed over latent dimensions."""


def elbo_terms(forward: Forward, x: Tensor, likelihood: Likelihood) -> ElboTerms:
    """Terms of the images `x` `(batch, channels, height, width)` in [0, 1] from the model's outputs."""
    return ElboTerms(-likelihood.log_prob(forward.logits, x), forward.posterior.rate())


def beta_weighted_loss(terms: ElboTerms, beta: float) -> Tensor:
    """distortion + beta * rate summed over the batch: a scalar in nats.

    A sum, not a mean: the caller divides by the size of the *global* batch, so that shards of unequal
    size still give the exact global mean gradient.
    """
    return (terms.distortion + beta * terms.rate).sum()
