"""Latent traversals: what each latent dimension does to an image, the most informative dimensions first.

As in Higgins et al. 2017 (beta-VAE), figure 4: one dimension moves, the others stay at the mean of a prior with one
centre, or at the code of an image. Codes of a model with several groups are their flattened z side by side, the top
group first.
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
from vae_ray.models.coordinates import coordinates, movable
from vae_ray.models.latents import Distribution, Group, Latents
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.noise import EVALUATION_NOISE, latent_noise, num_elements
from vae_ray.models.priors.flow import FlowDistribution
from vae_ray.models.priors.mixture import GaussianMixture
from vae_ray.models.vae import VAE

logger = logging.getLogger(__name__)


class Traversal(NamedTuple):
    """Images decoded while one latent dimension at a time, or one channel of a spatial z, moves through its prior."""

    images: Tensor
    """Means of p(x|z), `(dimensions, steps, C, H, W)` in [0, 1]."""
    groups: list[int]
    """Which group each row moves, from 0, the top one."""
    dimensions: list[int]
    """Which dimension of its group, or channel, each row moves, in order of falling rate."""
    rates: list[float]
    """The mean rate of each of them, in nats per image; of a channel, of all its elements together."""
    latent_shapes: tuple[tuple[int, ...], ...]
    """Of each group of the model."""
    is_at_image: bool
    """Whether rows go through the code of the first image, not through the mean of the prior."""

    def row_labels(self) -> list[str]:
        """`z[3]  2.1 nats` for every row; `group 2, z[3]  2.1 nats` of a model with several groups, from 1."""
        rows = zip(self.groups, self.dimensions, self.rates, strict=True)
        named = [f"group {group + 1}, z[{d}]  {rate:.1f} nats" for group, d, rate in rows]
        return named if len(self.latent_shapes) > 1 else [label.partition(", ")[2] for label in named]

    def title(self) -> str:
        """What the rows are."""
        is_spatial = any(len(shape) > 1 for shape in self.latent_shapes)
        start = "code of the first image, " if self.is_at_image else ""
        return f"{start}one latent {'channel' if is_spatial else 'dimension'} at a time"


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
    """Move each of the `num_dimensions` dimensions of largest rate from -`extent` to `extent`, the others at the start.

    The start is the mean of the prior; of a mixture, between whose components lies no image's code, the code of the
    first image. Of a spatial latent a channel moves, all its elements by the same. Lower groups follow: they stay at
    the mean of their priors, which depend on the groups above.

    Dimensions are ordered by their mean rate over the images `x` `(N, C, H, W)` in [0, 1]. `extent` is in standard
    deviations of the group's prior, around its mean; of a flow, of its noise. A conditional VAE is shown for the class
    of the first image.
    """
    by_group = mean_rates(model, x, condition)
    rates, places = torch.cat(by_group), [(g, i) for g, each in enumerate(by_group) for i in range(len(each))]
    order = rates.argsort(descending=True, stable=True)[:num_dimensions]
    moved = [places[number] for number in order.tolist()]
    first = None if condition is None else condition[:1]
    start, is_at_image = start_of_rows(model, x[:1], first)
    noise = [each.expand(len(order), steps, *each.shape[1:]).clone() for each in start]
    for row, (group, dimension) in enumerate(moved):
        path = noise[group][row, :, dimension]
        path[:] = torch.linspace(-extent, extent, steps).to(path).reshape(steps, *[1] * (path.ndim - 1))
    latents = tuple(each.flatten(0, 1) for each in noise)
    same = None if first is None else first.expand(len(latents[0]), -1)

    def along(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
        return movable(prior).rsample(latents[group])

    params, _ = model.top_down(None, along, len(latents[0]), same)
    images = model.likelihood.mean(params)
    check_means(images, model.likelihood, given=f"extent: got {extent:g}")
    groups, dimensions = ([place[i] for place in moved] for i in (0, 1))
    rows = images.unflatten(0, (len(order), steps))
    return Traversal(rows, groups, dimensions, rates[order].tolist(), model.latent_shapes, is_at_image)


def start_of_rows(model: VAE, x: Tensor, condition: Tensor | None) -> tuple[Latents, bool]:
    """Coordinates `(1, *shape)` a group of the start, and whether they are of the code of the image `x` `(1, C, H, W)`.

    Each group whose prior has one centre starts there, at 0.
    """
    groups = model.posteriors(x, condition)
    is_mixture = [isinstance(group.prior, GaussianMixture) for group in groups]
    at_image = zip(groups, is_mixture, strict=True)
    return tuple(coordinates(g) if mixed else torch.zeros_like(g.z) for g, mixed in at_image), any(is_mixture)


@torch.inference_mode()
def decode_first_groups(
    model: VAE, x: Tensor, condition: Tensor | None = None, *, num_shown: int | None = None, most: int = 8
) -> dict[str, Tensor]:
    """What each group holds: means of p(x|z), `(num_shown, C, H, W)`, by labels such as `groups 1-3  62.1 nats`.

    The z of the first g groups are at the means of their posteriors given the images `x` `(N, C, H, W)`, those below at
    the means of their priors; the rate is that of all g together, the mean over all of `x`. At most `most` values of g,
    evenly spread.
    """
    rates = torch.stack([each.sum() for each in mean_rates(model, x, condition)]).cumsum(0).tolist()
    shown = None if condition is None else condition[:num_shown]
    groups = model.posteriors(x[:num_shown], shown)
    images = {}
    for g in torch.linspace(1, len(groups), min(most, len(groups))).round().int().tolist():
        z = [group.z if number < g else None for number, group in enumerate(groups)]
        name = "group 1" if g == 1 else f"groups 1-{g}"
        images[f"{name}  {rates[g - 1]:.1f} nats"] = model.decode(z, shown)
    return images


def mean_rates(model: VAE, x: Tensor, condition: Tensor | None = None) -> list[Tensor]:
    """The mean rate over the images `x` in nats, `(c,)` by channel or `(d,)` by dimension, of each group.

    As in evaluation with seed 0: of one sampled z an image, because a rate without a closed form is the mean over
    samples, not the value at the posterior's mean.
    """
    noise = latent_noise(model.latent_shapes, slice(0, len(x)), 0, EVALUATION_NOISE)
    output = model(x, tuple(each.to(x) for each in noise), condition=condition)
    return [rate_by_channel(group).mean(0) for group in output.groups]


def rate_by_channel(group: Group) -> Tensor:
    """The rate in nats of each channel of a spatial group, `(N, c)`, or dimension of a flat one, `(N, d)`."""
    return by_channel(elementwise_rate(group))


def by_channel(values: Tensor) -> Tensor:
    """Sums `(N, c)` over the elements of each channel of `(N, c, h, w)`; `(N, d)` as it is."""
    return values.unsqueeze(-1).flatten(2).sum(2)


def elementwise_rate(group: Group) -> Tensor:
    """The rate by elements, `(N, *shape)` in nats; their mean over rows adds up to that of `Group.rate`."""
    shares = rate_shares(group)
    total = shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
    return shares * (group.rate().sum() / total)


def rate_shares(group: Group) -> Tensor:
    """Numbers `(N, *shape)` to whose means over images the elements' shares in the group's mean rate are proportional.

    They are the rate by elements itself where it has a closed form. Else log p(z) is no sum over elements, and the
    shares are: under a mixture or a flow the KL to the Gaussian of its mean and variances, under another prior equal.
    """
    assert group.posterior is not None
    shares, prior = group.posterior.kl(group.prior), group.prior
    if shares is None and isinstance(prior, GaussianMixture | FlowDistribution):
        shares = group.posterior.kl(prior.moment_matched())
    return torch.ones_like(group.z) if shares is None else shares


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
