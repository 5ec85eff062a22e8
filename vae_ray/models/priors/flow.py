"""A normalizing flow as prior: coupling layers of monotonic rational-quadratic splines (Durkan et al. 2019, NSF).

arXiv:1906.04032, "RQ-NSF (C)". A coupling has an exact inverse in one pass, so that densities and samples are equally
fast; an autoregressive flow would need a pass for each latent dimension in one of the two directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vae_ray.models.latents import DiagonalGaussian, Distribution
from vae_ray.models.networks.base import at_least_float32
from vae_ray.models.networks.mlp import fully_connected
from vae_ray.models.priors.base import Prior

if TYPE_CHECKING:
    from zuko.transforms import MonotonicRQSTransform

NUM_BINS = 8
BOUND = 5.0
"""Outside of (-BOUND, BOUND) a spline is the identity."""
MOMENT_SAMPLES = 4096


class Coupling(nn.Module):
    """One half of the dimensions through splines whose parameters are computed from the other half and the context.

    The halves are those of a bit of the dimension's number: the layers take the bits in turn, twice each.
    """

    def __init__(self, number: int, num_features: int, num_context: int, hidden: Sequence[int]) -> None:
        super().__init__()
        bit = number // 2 % max(1, (num_features - 1).bit_length())
        halves: tuple[list[int], list[int]] = ([], [])
        for feature in range(num_features):
            halves[feature >> bit & 1 ^ number & 1].append(feature)
        self.changed, self.given = halves if halves[0] else halves[::-1]
        order = [*self.changed, *self.given]
        self.places = sorted(range(num_features), key=order.__getitem__)
        # a single dimension has no other to depend on
        widths = [max(1, len(self.given) + num_context), *hidden, len(self.changed) * (3 * NUM_BINS - 1)]
        self.layers = nn.Sequential(*fully_connected(widths))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        # every spline starts as the identity, and the prior as N(0, I)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the noise: `(N, d)`, and log |det| of the Jacobian, `(N,)`."""
        given = z[:, self.given]
        changed, log_slopes = self._spline(given, context).call_and_ladj(z[:, self.changed])
        return self._joined(changed, given), log_slopes.sum(1)

    def inverse(self, noise: Tensor, context: Tensor) -> Tensor:
        """From the noise towards z, `(N, d)`."""
        given = noise[:, self.given]
        return self._joined(self._spline(given, context).inv(noise[:, self.changed]), given)

    def _joined(self, changed: Tensor, given: Tensor) -> Tensor:
        return torch.cat([changed, given], dim=1)[:, self.places]

    def _spline(self, given: Tensor, context: Tensor) -> MonotonicRQSTransform:
        from zuko.transforms import MonotonicRQSTransform  # only runs with a flow pay for the import

        inputs = torch.cat([given, context], dim=1)
        inputs = inputs if inputs.shape[1] else inputs.new_zeros(len(inputs), 1)
        parameters = at_least_float32(self.layers(inputs)).unflatten(1, (len(self.changed), -1))
        return MonotonicRQSTransform(*parameters.split([NUM_BINS, NUM_BINS, NUM_BINS - 1], dim=2), bound=BOUND)


@dataclass(frozen=True)
class FlowDistribution:
    """z = f^-1(eps), eps ~ N(0, I), with f the couplings in order."""

    couplings: Sequence[Coupling]
    latent_shape: tuple[int, ...]
    context: Tensor
    """`(N, num_classes)`, without columns where there is no condition."""

    @property
    def mean(self) -> Tensor:
        """The image of the noise's mean 0, `(N, *shape)`: the middle of the flow. E[z] has no closed form."""
        return self.rsample(self.context.new_zeros(len(self.context), *self.latent_shape))

    def noise_of(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that z is made of, `(N, *shape)`, and log |det| of the Jacobian of that map, `(N,)`."""
        eps, log_det = z.flatten(1), self.context.new_zeros(len(z))
        for coupling in self.couplings:
            eps, log_slopes = coupling(eps, self.context)
            log_det = log_det + log_slopes
        return eps.view_as(z), log_det

    def rsample(self, eps: Tensor, temperature: float = 1.0) -> Tensor:
        """z made of the noise, `(N, *shape)`, differentiable; `temperature` scales the noise."""
        z = temperature * eps.flatten(1)
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z, self.context)
        return z.view_as(eps)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(f(z); 0, I) + log |det df/dz| in nats, `(N,)`."""
        eps, log_det = self.noise_of(z)
        return log_det - 0.5 * (eps.square() + math.log(2 * math.pi)).flatten(1).sum(1)

    def kl(self, prior: Distribution) -> None:
        """There is no closed form."""

    @torch.no_grad()
    def moment_matched(self) -> DiagonalGaussian:
        """The Gaussian of about the same mean and variances, the same for all rows: of samples of fixed noise."""
        if not len(self.context):
            return DiagonalGaussian(self.mean, self.mean)
        rows = torch.arange(MOMENT_SAMPLES) % len(self.context)
        noise = torch.randn(MOMENT_SAMPLES, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        samples = FlowDistribution(self.couplings, self.latent_shape, self.context[rows])
        z = samples.rsample(noise.to(self.context))
        shape = (len(self.context), *self.latent_shape)
        return DiagonalGaussian(z.mean(0).expand(shape), z.var(0).log().expand(shape))


class FlowPrior(Prior):
    """`transforms` couplings, whose networks have the layers `hidden`; a one-hot condition is their context."""

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        *,
        transforms: int,
        hidden: Sequence[int],
        num_classes: int = 0,
        **_: Any,
    ) -> None:
        super().__init__(latent_shape)
        self.couplings = nn.ModuleList(
            Coupling(number, math.prod(latent_shape), num_classes, hidden) for number in range(transforms)
        )

    def forward(self, num: int, like: Tensor, condition: Tensor | None = None) -> Distribution:
        context = like.new_zeros(num, 0) if condition is None else condition.to(like)
        return FlowDistribution([*self.couplings], self.latent_shape, context)
