"""Latent traversals: what each latent dimension does to an image, the most informative dimensions first.

As in Higgins et al. 2017 (beta-VAE), figure 4, here around the prior's mean. Codes of a model with several groups are
their flattened z side by side, the top group first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae_ray.models.latents import Group, Latents
from vae_ray.models.vae import VAE


class Traversal(NamedTuple):
    """Images decoded while one latent dimension at a time moves through its prior."""

    images: Tensor
    """Means of p(x|z), `(dimensions, steps, C, H, W)` in [0, 1]."""
    dimensions: list[int]
    """Which dimension of the code each row moves, in order of falling rate."""
    rates: list[float]
    """The mean KL of each of them, in nats per image."""

    def row_labels(self) -> list[str]:
        """`z[3]  2.1 nats` for every row."""
        pairs = zip(self.dimensions, self.rates, strict=True)
        return [f"z[{dimension}]  {rate:.1f} nats" for dimension, rate in pairs]


@torch.inference_mode()
def traverse(model: VAE, x: Tensor, *, num_dimensions: int = 10, steps: int = 11, extent: float = 3.0) -> Traversal:
    """Move each of the `num_dimensions` dimensions of largest rate from -`extent` to `extent`, the others at 0.

    Dimensions are ordered by their mean KL over the images `x` `(N, C, H, W)` in [0, 1]. `extent` is in standard
    deviations of the group's prior, around its mean.
    """
    rates = torch.cat([elementwise_rate(group).flatten(1).mean(0) for group in model.posteriors(x)])
    order = rates.argsort(descending=True, stable=True)[:num_dimensions]
    noise = torch.zeros(len(order), steps, len(rates), device=x.device, dtype=x.dtype)
    for row, dimension in enumerate(order.tolist()):
        noise[row, :, dimension] = torch.linspace(-extent, extent, steps)
    images = model.generate(split_groups(noise.flatten(0, 1), model.latent_shapes)).unflatten(0, (len(order), steps))
    return Traversal(images, order.tolist(), rates[order].tolist())


def elementwise_rate(group: Group) -> Tensor:
    """KL(q || p) by elements, `(N, *shape)` in nats; without a closed form the group's rate shared out evenly."""
    assert group.posterior is not None
    elementwise = group.posterior.kl(group.prior)
    if elementwise is None:
        num = group.z[0].numel()
        elementwise = (group.rate() / num)[:, None].expand(-1, num).unflatten(1, group.z.shape[1:])
    return elementwise


def split_groups(codes: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Latents:
    """Codes `(N, latent_dim)` as one tensor `(N, *shape)` a group."""
    parts = codes.split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(part.reshape(len(codes), *shape) for part, shape in zip(parts, shapes, strict=True))


def join_groups(latents: Latents) -> Tensor:
    """One code `(N, latent_dim)` of all groups' z, the top group first."""
    return torch.cat([z.flatten(1) for z in latents], dim=1)
