"""Coordinates of a code: the noise of which the prior of each group makes z.

In these coordinates codes of a hierarchy can be moved and mixed: each z follows the groups above it. The same z itself
would lie far from a prior that has changed.
"""

from __future__ import annotations

from torch import Tensor

from vae_ray.models.latents import DiagonalGaussian, Distribution, Group
from vae_ray.models.priors.flow import FlowDistribution
from vae_ray.models.priors.mixture import GaussianMixture


def movable(prior: Distribution) -> Distribution:
    """The prior; of a mixture, whose noise also picks the component, the Gaussian of its mean and variances.

    With the mixture's own noise z would jump from component to component.
    """
    return prior.moment_matched() if isinstance(prior, GaussianMixture) else prior


def coordinates(group: Group) -> Tensor:
    """The noise of which `movable(group.prior)` makes z, `(N, *shape)`; under a user's own prior z itself."""
    prior = movable(group.prior)
    if isinstance(prior, FlowDistribution):
        return prior.noise_of(group.z)[0]
    return (group.z - prior.mean) / prior.sigma if isinstance(prior, DiagonalGaussian) else group.z


def at_coordinates(eps: Tensor, prior: Distribution) -> Tensor:
    """z of a group's coordinates, both `(N, *shape)`: the inverse of `coordinates`."""
    prior = movable(prior)
    return prior.rsample(eps) if isinstance(prior, FlowDistribution | DiagonalGaussian) else eps
