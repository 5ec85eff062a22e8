"""The rate in three parts, each with a weight of its own (Chen et al. 2018, arXiv:1802.04942, eq. 4).

mutual information log q(z|x) - log q(z), total correlation log q(z) - sum_j log q(z_j) and dimension-wise KL
sum_j log q(z_j) - log p(z), where q(z) is the mean of q(z|n) over the N training images n. Of it the posteriors of the
global batch of B images are a sample, and log q(z_i) is estimated as log sum_n w_in q(z_i|n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vae_ray.models.latents import DiagonalGaussian
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
)
from vae_ray.objectives.schedules import schedule_factor
from vae_ray.parallel.global_batch import GlobalBatch


class BetaTc(Objective):
    """The parts are those of the top group, flattened; the rate of all other groups has weight 1."""

    terms = ("mutual_information", "total_correlation", "dimension_kl")
    min_images = 2

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 6.0,
        gamma: float = 1.0,
        beta_schedule: Any = None,
        estimator: str = "stratified",
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma, self.beta_schedule = alpha, beta, gamma, beta_schedule
        self.log_weights = LOG_WEIGHTS[estimator]

    def settings(self, epochs: float, steps: int) -> dict[str, float]:
        return {"beta": self.beta * schedule_factor(self.beta_schedule, epochs=epochs, steps=steps)}

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        top, alpha, beta, gamma = output.groups[0], self.alpha, settings["beta"], self.gamma
        posterior = gaussian_posterior(top, "beta_tc")
        distortion, rate = map(mean_over_samples, elbo_terms(output, x, likelihood))
        parts = [part.flatten(1) for part in (top.z, posterior.mean, posterior.logvar)]
        z, mean, logvar = batch.gather(torch.cat(parts, dim=1)).chunk(3, dim=1)
        log_weights = self.log_weights(batch.size, batch.num_data).to(z)
        log_joint, log_product = aggregate_log_probs(z, DiagonalGaussian(mean, logvar), log_weights)
        log_posterior, log_prior = posterior.log_prob(top.z), top.prior.log_prob(top.z)
        # alpha * mutual information + beta * total correlation + gamma * dimension-wise KL, less their sum with weights
        # of 1, which is the rate: that has a closed form. What is each row's alone stands apart from what all share.
        separate = distortion + rate + (alpha - 1) * log_posterior - (gamma - 1) * log_prior
        shared = ((beta - alpha) * log_joint + (gamma - beta) * log_product).mean()
        coupled, by_row = of_global_batch(shared, batch)
        own_joint, own_product = log_joint[batch.rows].detach(), log_product[batch.rows].detach()
        return Losses(
            {MODEL: separate.sum() + coupled},
            {
                "loss": separate + by_row,
                "distortion": distortion,
                "rate": rate,
                "mutual_information": log_posterior - own_joint,
                "total_correlation": own_joint - own_product,
                "dimension_kl": own_product - log_prior,
            },
        )


def aggregate_log_probs(z: Tensor, posteriors: DiagonalGaussian, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z) and sum_j log q(z_j), `(B,)` each, for z `(B, d)`, B posteriors and log weights `(B, B)`."""
    # log q(z_ij | n) of all rows i, posteriors n and dimensions j: (B, B, d)
    scaled = (z[:, None] - posteriors.mean).square() * torch.exp(-posteriors.logvar)
    elementwise = -0.5 * (scaled + posteriors.logvar + math.log(2 * math.pi))
    log_joint = (elementwise.sum(2) + log_weights).logsumexp(1)
    return log_joint, (elementwise + log_weights[:, :, None]).logsumexp(1).sum(1)


def log_weights_weighted(batch_size: int, num_data: int) -> Tensor:
    """Minibatch-weighted sampling (eq. 5): 1 / (N B) for all.

    A row sums to 1 / N, so that log q(z) is low by log N and the total correlation of d dimensions high by
    (d - 1) log N, apart from what the batch's own error is; gradients do not depend on constants.
    """
    return torch.full((batch_size, batch_size), -math.log(num_data * batch_size), dtype=torch.float64)


def log_weights_stratified(batch_size: int, num_data: int) -> Tensor:
    """Minibatch-stratified sampling (appendix C.2): 1 / N for the row's own image, on the diagonal; a row sums to 1.

    sum_n w_in q(z_i|n) is unbiased, because the other images are a sample of all others. The paper gives one of them
    another weight; here it is averaged over which one, with the same mean, less variance, and for any order of rows.
    """
    others = max(1, batch_size - 1)
    weights = torch.full((batch_size, batch_size), (num_data - 1) / (num_data * others), dtype=torch.float64)
    # a single image stands for all of them
    return weights.fill_diagonal_(1 / num_data if batch_size > 1 else 1.0).log()


LOG_WEIGHTS = {"weighted": log_weights_weighted, "stratified": log_weights_stratified}
