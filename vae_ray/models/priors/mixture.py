"""A mixture of diagonal Gaussians as prior, and the mixture as a distribution whose samples are made of given noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae_ray.models.latents import DiagonalGaussian, Distribution, bounded
from vae_ray.models.networks.base import random_parameter
from vae_ray.models.priors.base import Prior

HALF_ULP = 2.0**-53
INITIAL_SPREAD = 0.5
"""Standard deviation of the initial means; with that of the components the whole has about unit variance."""


@dataclass(frozen=True)
class GaussianMixture:
    """sum_k w_k N(m_k, diag(s_k^2)), with weights of each row; a weight may be 0."""

    means: Tensor
    """`(K, *shape)`."""
    logvars: Tensor
    """`(K, *shape)`."""
    log_weights: Tensor
    """`(N, K)`; log of numbers that add up to 1."""

    @property
    def mean(self) -> Tensor:
        """sum_k w_k m_k, `(N, *shape)`."""
        return self._averaged(self.means.flatten(1)).unflatten(1, self.means.shape[1:])

    def moment_matched(self) -> DiagonalGaussian:
        """The Gaussian of the same mean and variances."""
        mean = self.mean
        # Var z = E s_k^2 + Var m_k
        centred = (self.means - mean[:, None]).square().flatten(2)
        variance = self._averaged(torch.exp(self.logvars).flatten(1) + centred)
        return DiagonalGaussian(mean, variance.log().view_as(mean))

    def rsample(self, eps: Tensor, temperature: float = 1.0) -> Tensor:
        """A sample made of `eps ~ N(0, I)` `(N, *shape)`; `temperature` scales the deviation within a component.

        u = Phi(eps_0) is uniform: where it lies among the cumulated weights is the component, and where it lies within
        the component's interval is again uniform and independent of the component, and becomes its first noise.
        Differentiable in means and log variances, without bias; not in the weights, in which a sample jumps.
        """
        flat = eps.flatten(1)
        component, first = self._component(flat[:, 0])
        noise = torch.cat([first[:, None], flat[:, 1:]], dim=1).view_as(eps)
        return DiagonalGaussian(self.means[component], self.logvars[component]).rsample(noise, temperature)

    def log_prob(self, z: Tensor) -> Tensor:
        """log density in nats, `(N,)`; takes memory for N * K * dimensions numbers."""
        logvars = self.logvars.flatten(1)
        residuals = (z.flatten(1)[:, None] - self.means.flatten(1)) * torch.exp(-0.5 * logvars)
        normaliser = logvars.sum(1) + logvars.shape[1] * math.log(2 * math.pi)
        # log sum_k w_k N(z; m_k, s_k^2)
        return torch.logsumexp(self.log_weights - 0.5 * (residuals.square().sum(2) + normaliser), dim=1)

    def kl(self, prior: Distribution) -> None:
        """There is no closed form."""

    def _averaged(self, values: Tensor) -> Tensor:
        """Means over components, `(N, d)`, of `(K, d)` or `(N, K, d)`."""
        return (self.log_weights.exp()[:, :, None] * values).sum(1)

    def _component(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The component of each row and a new normal number, `(N,)` each, both of one normal number `eps`."""
        # float64: of a weight of 1/1000 a float32 uniform would leave 14 bits
        ends = self.log_weights.detach().double().exp().cumsum(1)
        ends = ends / ends[:, -1:]
        u = torch.special.ndtr(eps.double()).clamp(max=1 - HALF_ULP)
        component = torch.searchsorted(ends, u[:, None], right=True)
        starts = torch.nn.functional.pad(ends, (1, 0))
        start, end = starts.gather(1, component), starts.gather(1, component + 1)
        within = ((u[:, None] - start) / (end - start)).clamp(HALF_ULP, 1 - HALF_ULP)
        return component[:, 0], torch.special.ndtri(within[:, 0]).to(eps)


class MixturePrior(Prior):
    """K diagonal Gaussians with trained means, log variances and weights; of a conditional VAE weights for each class.

    As in Dilokthanakul et al. 2016 (arXiv:1611.02648) and the MoG prior of Tomczak & Welling 2018 (arXiv:1705.07120).
    """

    def __init__(self, latent_shape: tuple[int, ...], *, components: int, num_classes: int = 0, **_: Any) -> None:
        super().__init__(latent_shape)
        self.means = random_parameter(components, *latent_shape, std=INITIAL_SPREAD)
        self.logvars = nn.Parameter(torch.full((components, *latent_shape), math.log(1 - INITIAL_SPREAD**2)))
        self.logits = nn.Parameter(torch.zeros(max(1, num_classes), components))

    def forward(self, num: int, like: Tensor, condition: Tensor | None = None) -> Distribution:
        log_weights = torch.log_softmax(self.logits, dim=1)
        rows = log_weights.expand(num, -1) if condition is None else log_weights[condition.argmax(1)]
        return GaussianMixture(self.means.to(like), bounded(self.logvars).to(like), rows.to(like))
