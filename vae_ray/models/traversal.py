"""Latent traversals: what each latent dimension does to an image, the most informative dimensions first.

As in Higgins et al. 2017 (beta-VAE), figure 4, here around the prior's mean. Codes of a model with several groups are
their flattened z side by side, the top group first.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae_ray.data.images import ROUNDING, as_tensor
from vae_ray.errors import UserError
from vae_ray.models.latents import Distribution, Group, Latents
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.noise import num_elements
from vae_ray.models.priors.flow import FlowDistribution
from vae_ray.models.priors.mixture import GaussianMixture
from vae_ray.models.vae import VAE

logger = logging.getLogger(__name__)


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
def traverse(
    model: VAE,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    num_dimensions: int = 10,
    steps: int = 11,
    extent: float = 3.0,
) -> Traversal:
    """Move each of the `num_dimensions` dimensions of largest rate from -`extent` to `extent`, the others at 0.

    Dimensions are ordered by their mean KL over the images `x` `(N, C, H, W)` in [0, 1]. `extent` is in standard
    deviations of the group's prior, around its mean; of a flow, of its noise. A conditional VAE is shown for the class
    of the first image.
    """
    rates = torch.cat([elementwise_rate(group).flatten(1).mean(0) for group in model.posteriors(x, condition)])
    order = rates.argsort(descending=True, stable=True)[:num_dimensions]
    noise = torch.zeros(len(order), steps, len(rates), device=x.device, dtype=x.dtype)
    for row, dimension in enumerate(order.tolist()):
        noise[row, :, dimension] = torch.linspace(-extent, extent, steps)
    latents = split_groups(noise.flatten(0, 1), model.latent_shapes)
    same = None if condition is None else condition[:1].expand(len(latents[0]), -1)

    def along(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
        # the noise of a mixture also picks the component, among which z would jump
        moved = prior.moment_matched() if isinstance(prior, GaussianMixture) else prior
        return moved.rsample(latents[group])

    params, _ = model.top_down(None, along, len(latents[0]), same)
    images = model.likelihood.mean(params)
    check_means(images, model.likelihood, given=f"extent: got {extent:g}")
    return Traversal(images.unflatten(0, (len(order), steps)), order.tolist(), rates[order].tolist())


def elementwise_rate(group: Group) -> Tensor:
    """KL(q || p) by elements, `(N, *shape)` in nats.

    Of a mixture or a flow, whose log p(z) is no sum over elements, that to the Gaussian of their mean and variances. Of
    another prior without a closed form the group's rate shared out evenly.
    """
    assert group.posterior is not None
    prior = group.prior
    elementwise = group.posterior.kl(
        prior.moment_matched() if isinstance(prior, GaussianMixture | FlowDistribution) else prior
    )
    if elementwise is None:
        num = group.z[0].numel()
        elementwise = (group.rate() / num)[:, None].expand(-1, num).unflatten(1, group.z.shape[1:])
    return elementwise


@torch.inference_mode()
def decode_codes(model: VAE, codes: Any, condition: Tensor | None = None) -> Tensor:
    """Means of p(x|z) `(N, C, H, W)` for codes `(N, latent_dim)`: a tensor, an array or a nested list of numbers.

    Raises `UserError` for another shape, for what is not finite, and for codes whose images are not.
    """
    z, latent_dim = as_tensor(codes, key="z"), num_elements(model.latent_shapes)
    if z.ndim != 2 or z.shape[1] != latent_dim or not len(z):
        raise UserError(f"z: got shape {tuple(z.shape)}, should be (N, {latent_dim}) with at least one code")
    if z.is_complex() or not z.isfinite().all():
        raise UserError("z: got complex numbers, NaN or infinity, should be finite numbers")
    reference = next(model.parameters())
    images = model.decode(split_groups(z.to(reference), model.latent_shapes), condition)
    check_means(images, model.likelihood, given=f"z: got a code with {float(z.abs().max()):g}")
    return images


def check_means(images: Tensor, likelihood: Likelihood, *, given: str) -> None:
    """Raise `UserError`, which begins with `given`, for images that are not finite; warn of those not in [0, 1]."""
    low, high = (float(end) for end in images.aminmax())  # NaN if one value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{given}, which gives images with NaN or infinity; try a number nearer to 0")
    if low < -ROUNDING or high > 1 + ROUNDING:
        _warn_of_mean(type(likelihood).__qualname__)


@functools.cache  # once a process
def _warn_of_mean(likelihood: str) -> None:
    logger.warning(
        "likelihood: %s.mean gives values outside of [0, 1], which pictures show as black or white; "
        "it should give E[x|z] in [0, 1]",
        likelihood,
    )


def split_groups(codes: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Latents:
    """Codes `(N, latent_dim)` as one tensor `(N, *shape)` a group."""
    parts = codes.split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(part.reshape(len(codes), *shape) for part, shape in zip(parts, shapes, strict=True))


def join_groups(latents: Latents) -> Tensor:
    """One code `(N, latent_dim)` of all groups' z, the top group first."""
    return torch.cat([z.flatten(1) for z in latents], dim=1)
