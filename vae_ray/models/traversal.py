"""Latent traversals: what each latent dimension does to an image, the informative dimensions first.

As in Higgins et al. 2017 (beta-VAE), figure 4, here around the prior's mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import VAE


class Traversal(NamedTuple):
    """Images decoded while one latent dimension at a time moves through the prior."""

    images: Tensor
    """Means of p(x|z), `(dimensions, steps, C, H, W)` in [0, 1]."""
    dimensions: list[int]
    """Which latent dimension each row moves, in order of falling rate."""
    rates: list[float]
    """What each of them carries of the posterior's KL, in nats per image."""

    def row_labels(self) -> list[str]:
        """`z[3]  2.1 nats` for every row."""
        pairs = zip(self.dimensions, self.rates, strict=True)
        return [f"z[{dimension}]  {rate:.1f} nats" for dimension, rate in pairs]


@torch.inference_mode()
def traverse(
    model: VAE, likelihood: Likelihood, x: Tensor, *, num_dimensions: int = 10, steps: int = 11, extent: float = 3.0
) -> Traversal:
    """Move each of the `num_dimensions` most informative dimensions from -`extent` to `extent`, the others at 0.

    How informative a dimension is, its rate over the images `x` `(N, C, H, W)` in [0, 1] says; `extent` is in
    standard deviations of the prior.
    """
    rates = model.encode(x).rate_by_dimension().mean(0)
    order = rates.argsort(descending=True, stable=True)[:num_dimensions]
    z = torch.zeros(len(order), steps, model.latent_dim, device=x.device, dtype=x.dtype)
    for row, dimension in enumerate(order.tolist()):
        z[row, :, dimension] = torch.linspace(-extent, extent, steps)
    images = likelihood.mean(model.decode(z.flatten(0, 1))).unflatten(0, (len(order), steps))
    return Traversal(images, order.tolist(), rates[order].tolist())
