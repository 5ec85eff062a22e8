"""distortion + beta * rate + weight * MMD²: an aggregate posterior near the prior (Zhao et al. 2019, arXiv:1706.02262).

MMD² (Gretton et al. 2012) with the kernel k(z, z') = exp(-|z - z'|² / (2 d)), d the latent dimensions. Against N(0, I)
two of its three expectations have a closed form, so that no samples of the prior are drawn.
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
    mean_over_samples,
    of_global_batch,
    require_standard_prior,
)
from vae_ray.parallel.global_batch import GlobalBatch


class Mmd(Objective):
    """`weight` is in nats; the MMD is that of the top group, over the whole global batch."""

    terms = ("mmd",)
    min_images = 2

    def __init__(self, *, beta: float = 0.0, weight: float = 1000.0) -> None:
        super().__init__()
        self.beta, self.weight = beta, weight

    def settings(self, epochs: float, steps: int) -> dict[str, float]:
        return {"beta": self.beta}

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        top = output.groups[0]
        require_standard_prior(top, "mmd", "its closed form is that of N(0, I)")
        distortion, rate = map(mean_over_samples, elbo_terms(output, x, likelihood))
        coupled, by_row = of_global_batch(mmd_squared(batch.gather(top.z).flatten(1)), batch)
        separate = distortion + settings["beta"] * rate
        return Losses(
            {MODEL: separate.sum() + self.weight * coupled},
            {"loss": separate + self.weight * by_row, "distortion": distortion, "rate": rate, "mmd": by_row},
        )


def mmd_squared(z: Tensor) -> Tensor:
    """MMD² between the rows of z `(B, d)` and N(0, I), at least 0: the biased estimate, with each row beside itself."""
    d = z.shape[1]
    # E k(z, z') over z' ~ N(0, I) = (d / (d + 1))^(d/2) exp(-|z|² / (2 (d + 1))); E E k = (d / (d + 2))^(d/2)
    among = torch.exp(-squared_distances(z) / (2 * d)).mean()
    against = (d / (d + 1)) ** (d / 2) * torch.exp(-z.square().sum(1) / (2 * (d + 1))).mean()
    return among - 2 * against + (d / (d + 2)) ** (d / 2)


def squared_distances(z: Tensor) -> Tensor:
    """|z_i - z_j|² of all pairs of rows, `(B, B)`."""
    norms = z.square().sum(1)
    return (norms[:, None] + norms[None, :] - 2 * z @ z.T).clamp_min(0)
