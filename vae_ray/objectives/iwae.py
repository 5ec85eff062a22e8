"""-L_k, L_k = E log 1/k sum_i p(x, z_i) / q(z_i | x): a bound that k samples tighten (Burda et al. 2016, eq. 8).

arXiv:1509.00519. With k = 1 it is the negative ELBO, by the sample's log ratio in place of the closed form of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Output
from vae_ray.objectives.base import MODEL, Losses, Objective, elbo_terms, mean_over_samples
from vae_ray.parallel.global_batch import GlobalBatch


class Iwae(Objective):
    """`num_samples` is k. Distortion and rate are means over the samples; their sum is not the loss, but above it."""

    def __init__(self, *, num_samples: int = 5) -> None:
        super().__init__()
        self.num_samples = num_samples

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        distortion, rate = elbo_terms(output, x, likelihood)
        loss = negative_bound(-distortion - output.log_ratio().view_as(distortion))
        terms = {"loss": loss, "distortion": mean_over_samples(distortion), "rate": mean_over_samples(rate)}
        return Losses({MODEL: loss.sum()}, terms)


def negative_bound(log_weights: Tensor) -> Tensor:
    """-log 1/k sum_i w_i in nats, `(N,)`, of log weights `(k, N)`."""
    return math.log(len(log_weights)) - log_weights.logsumexp(0)
