"""A ladder of two groups: the lower group's prior is computed from the upper group's z.

Sønderby et al. 2016 (arXiv:1602.02282), two levels, without the precision-weighted merge: the lower posterior is
computed from the image's features and the upper z side by side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vae_ray.models.latents import DiagonalGaussian, Distribution, Group, gaussian_from
from vae_ray.models.networks.base import Choose, Features, Network, at_least_float32
from vae_ray.models.networks.mlp import WithLabel


class Ladder(Network):
    """z_1 ~ p(z_1) of `top_dim` dimensions, z_2 ~ p(z_2 | z_1) of `latent_dim`; the decoder sees both."""

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        num_params: int,
        num_classes: int = 0,
        hidden: tuple[int, ...] = (256, 256),
        top_dim: int = 8,
    ) -> None:
        super().__init__()
        low, high = (hidden[0], hidden[-1])
        params_shape = (num_params, *image_shape[1:])
        self.latent_shapes = ((top_dim,), (latent_dim,))
        self.lower = WithLabel(nn.Identity(), nn.Linear(math.prod(image_shape) + num_classes, low), nn.ReLU())
        self.upper = nn.Sequential(nn.Linear(low, high), nn.ReLU())
        self.top_posterior = nn.Linear(high, 2 * top_dim)
        self.expand = WithLabel(nn.Linear(top_dim + num_classes, high), nn.ReLU())
        self.prior = nn.Linear(high, 2 * latent_dim)
        self.posterior = nn.Linear(low + high, 2 * latent_dim)
        self.hidden = nn.Sequential(nn.Linear(high + latent_dim, low), nn.ReLU())
        self.output = nn.Linear(low, math.prod(params_shape))
        self.shape = nn.Unflatten(1, params_shape)

    def bottom_up(self, x: Tensor, condition: Tensor | None = None) -> Features:
        low = self.lower(x, condition)
        return at_least_float32(low), at_least_float32(self.top_posterior(self.upper(low)))

    def top_down(
        self, features: Features | None, choose: Choose, prior: Distribution, condition: Tensor | None = None
    ) -> tuple[Tensor, tuple[Group, ...]]:
        top: DiagonalGaussian | None = None if features is None else gaussian_from(features[1])
        z_top = choose(0, top, prior)
        expanded = self.expand(z_top, condition)
        low_prior = gaussian_from(at_least_float32(self.prior(expanded)))
        low: DiagonalGaussian | None = None
        if features is not None:
            low = gaussian_from(at_least_float32(self.posterior(torch.cat([features[0], expanded], dim=1))))
        z_low = choose(1, low, low_prior)
        params = self.output(self.hidden(torch.cat([expanded, z_low], dim=1)))
        return at_least_float32(self.shape(params)), (Group(z_top, top, prior), Group(z_low, low, low_prior))

    def posterior_layers(self) -> list[nn.Module]:
        return [self.top_posterior, self.posterior, self.prior]

    def output_layer(self) -> nn.Module | None:
        return self.output
