"""Latent variables: distributions of one group, and a group's place in a pass through the model.

A model has one or more groups of latent variables, the top one first. A flat VAE has one of shape `(latent_dim,)`.
All KL divergences and log densities are in nats. Kingma & Welling 2014 (arXiv:1312.6114), section 3 and appendix B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Latents = tuple[Tensor, ...]
"""One tensor `(N, *shape)` a group, the top group first."""


class Distribution(Protocol):
    """The posterior or the prior of one group, for N examples; it draws nothing itself."""

    @property
    def mean(self) -> Tensor:
        """`(N, *shape)`."""
        ...

    def rsample(self, eps: Tensor, temperature: float = 1.0) -> Tensor:
        """A sample made of the noise `eps ~ N(0, I)` of shape `(N, *shape)`; differentiable.

        `temperature` scales the standard deviation.
        """
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """log density in nats, summed over the group: `(N,)`."""
        ...

    def kl(self, prior: Distribution) -> Tensor | None:
        """KL(self || prior) by elements, `(N, *shape)` in nats; None if there is no closed form."""
        ...


class Residual(NamedTuple):
    """How far a Gaussian lies from another one; all `(N, *shape)`."""

    origin: DiagonalGaussian
    mean: Tensor
    """The difference of the means."""
    logvar: Tensor
    """The difference of the log variances."""


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag(exp(logvar))); both `(N, *shape)`."""

    mean: Tensor
    logvar: Tensor
    residual: Residual | None = None
    """Of a posterior that is computed relative to its prior."""

    @property
    def sigma(self) -> Tensor:
        """Standard deviation, `(N, *shape)`."""
        return torch.exp(0.5 * self.logvar)

    def rsample(self, eps: Tensor, temperature: float = 1.0) -> Tensor:
        """z = mean + temperature * sigma * eps, differentiable in mean and logvar (eq. 4 of the paper)."""
        return torch.addcmul(self.mean, self.sigma, eps, value=temperature)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; mean, sigma^2) in nats, `(N,)`."""
        # log N = -1/2 ((z - m)^2 / s^2 + log s^2 + log 2 pi)
        elementwise = (z - self.mean).square() * torch.exp(-self.logvar) + self.logvar + math.log(2 * math.pi)
        return -0.5 * elementwise.flatten(1).sum(1)

    def kl(self, prior: Distribution) -> Tensor | None:
        """Against N(0, I) or another diagonal Gaussian in closed form (appendix B)."""
        if isinstance(prior, StandardNormal):
            # KL = 1/2 (m^2 + s^2 - 1 - log s^2); expm1 does not cancel near s = 1
            return 0.5 * torch.addcmul(torch.expm1(self.logvar) - self.logvar, self.mean, self.mean)
        if isinstance(prior, DiagonalGaussian):
            # KL = 1/2 ((m - m')^2 / s'^2 + s^2 / s'^2 - 1 - log(s^2 / s'^2))
            if self.residual is not None and self.residual.origin is prior:  # NVAE, eq. 2: nothing cancels
                _, shift, difference = self.residual
            else:
                shift, difference = self.mean - prior.mean, self.logvar - prior.logvar
            squared = shift.square() * torch.exp(-prior.logvar)
            return 0.5 * (squared + (torch.expm1(difference) - difference))  # two numbers of at least 0
        return None


@dataclass(frozen=True)
class StandardNormal:
    """N(0, I) of a group; `mean` is zeros `(N, *shape)`, which gives number, shape and device."""

    mean: Tensor

    def rsample(self, eps: Tensor, temperature: float = 1.0) -> Tensor:
        return eps if temperature == 1 else temperature * eps

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)

    def kl(self, prior: Distribution) -> Tensor | None:
        return None


class Group(NamedTuple):
    """One group in a pass through the model."""

    z: Tensor
    """`(N, *shape)`."""
    posterior: Distribution | None
    """None if z was not inferred from an image."""
    prior: Distribution

    def rate(self) -> Tensor:
        """KL(q || p) of the group in nats, `(N,)`: in closed form, else log q(z|x) - log p(z) of this sample."""
        assert self.posterior is not None, "a group that was sampled from the prior has no rate"
        elementwise = self.posterior.kl(self.prior)
        if elementwise is not None:
            return elementwise.flatten(1).sum(1)
        return self.log_ratio()

    def log_ratio(self) -> Tensor:
        """log q(z|x) - log p(z) of this sample in nats, `(N,)`; its mean over samples is the rate."""
        assert self.posterior is not None, "a group that was sampled from the prior has no posterior"
        return self.posterior.log_prob(self.z) - self.prior.log_prob(self.z)


LOGVAR_RANGE = (-15.0, 10.0)
"""Log variances inside are as the network gives them."""
LOGVAR_MARGIN = 5.0
"""How far outside of it they can go."""


def gaussian_from(parameters: Tensor) -> DiagonalGaussian:
    """The distribution whose mean and log variance are the halves of `parameters` along dimension 1.

    The log variance is bounded softly (`bounded`), so that too large a learning rate does not end in an infinite one.
    """
    mean, logvar = parameters.chunk(2, dim=1)
    return DiagonalGaussian(mean, bounded(logvar))


def residual_from(parameters: Tensor, prior: DiagonalGaussian) -> DiagonalGaussian:
    """The distribution whose differences from `prior` in mean and log variance are the halves of `parameters`.

    Vahdat & Kautz 2020 (arXiv:2007.03898), section 3.2. The difference of the log variances is bounded softly.
    """
    mean, logvar = parameters.chunk(2, dim=1)
    residual = Residual(prior, mean, bounded(logvar))
    return DiagonalGaussian(prior.mean + residual.mean, prior.logvar + residual.logvar, residual)


def bounded(logvar: Tensor) -> Tensor:
    """`logvar` to the bit inside of `LOGVAR_RANGE`, and with a smooth bend at most `LOGVAR_MARGIN` outside of it.

    The derivative is continuous, 1 at the ends of the range, and not 0 anywhere near them.
    """
    inside = logvar.clamp(*LOGVAR_RANGE)
    return inside + LOGVAR_MARGIN * torch.tanh((logvar - inside) / LOGVAR_MARGIN)
