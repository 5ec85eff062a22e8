"""distortion + beta * rate + penalties on the covariance of the aggregate posterior (Kumar et al. 2018, DIP-VAE).

arXiv:1711.00848, eq. 6 and 7: lambda_od sum_{i != j} C_ij² + lambda_d sum_i (C_ii - 1)², with C the covariance over
images of the posterior means (I), or of z itself, which adds the mean of the posteriors' variances (II).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Output
from vae_ray.objectives.base import (
    MODEL,
    Losses,
    Objective,
    elbo_terms,
    gaussian_posterior,
    mean_over_samples,
    of_global_batch,
    require_standard_prior,
)
from vae_ray.parallel.global_batch import GlobalBatch


class Dip(Objective):
    """The covariance is that of the top group, flattened, over the whole global batch."""

    terms = ("off_diagonal", "diagonal")
    min_images = 2

    def __init__(
        self, *, variant: str = "II", beta: float = 1.0, off_diagonal: float = 10.0, diagonal: float = 10.0
    ) -> None:
        super().__init__()
        self.variant, self.beta = variant, beta
        self.off_diagonal, self.diagonal = off_diagonal, diagonal

    def settings(self, epochs: float, steps: int) -> dict[str, float]:
        return {"beta": self.beta}

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        top = output.groups[0]
        require_standard_prior(top, "dip", "its covariances are to be those of N(0, I)")
        posterior = gaussian_posterior(top, "dip")
        distortion, rate = map(mean_over_samples, elbo_terms(output, x, likelihood))
        parts = [posterior.mean.flatten(1), posterior.sigma.square().flatten(1)]
        mean, variance = batch.gather(torch.cat(parts, dim=1)).chunk(2, dim=1)
        off_diagonal, diagonal = covariance_penalties(mean, variance if self.variant == "II" else None)
        coupled, by_row = of_global_batch(self.off_diagonal * off_diagonal + self.diagonal * diagonal, batch)
        separate = distortion + settings["beta"] * rate
        return Losses(
            {MODEL: separate.sum() + coupled},
            {
                "loss": separate + by_row,
                "distortion": distortion,
                "rate": rate,
                "off_diagonal": of_global_batch(off_diagonal, batch)[1],
                "diagonal": of_global_batch(diagonal, batch)[1],
            },
        )


def covariance_penalties(mean: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of squared covariances, and of squared differences of variances from 1, of B means and variances `(B, d)`."""
    centred = mean - mean.mean(0)
    covariance = centred.T @ centred / len(mean)
    diagonal = covariance.diagonal()
    off_diagonal = (covariance - torch.diag(diagonal)).square().sum()
    if variance is not None:  # Cov[z] = Cov[mean] + E[variance]
        diagonal = diagonal + variance.mean(0)
    return off_diagonal, (diagonal - 1).square().sum()
