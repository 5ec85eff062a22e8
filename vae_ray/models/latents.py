"""The approximate posterior q(z|x): between the encoder's output and the decoder's input.

Kingma & Welling 2014 (arXiv:1312.6114), section 3 and appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mu, diag(sigma^2)) with `logvar` = log sigma^2; both `(batch, latent_dim)`."""

    mu: Tensor
    logvar: Tensor

    @property
    def sigma(self) -> Tensor:
        """Standard deviation, `(batch, latent_dim)`."""
        return torch.exp(0.5 * self.logvar)

    def rsample(self, eps: Tensor) -> Tensor:
        """z = mu + sigma * eps, `(batch, latent_dim)`, differentiable in mu and logvar (eq. 4 of the paper).

        `eps` is standard normal noise of the same shape; the caller draws it, so that it depends on the
        example's place in the global batch and not on who computes it.
        """
        return torch.addcmul(self.mu, self.sigma, eps)

    def rate(self) -> Tensor:
        """KL(q(z|x) || N(0, I)) in nats, summed over latent dimensions: `(batch,)` (appendix B)."""
        # KL = 1/2 sum(mu^2 + sigma^2 - log sigma^2 - 1)
        quadratic = torch.linalg.vecdot(self.mu, self.mu)
        return 0.5 * (quadratic + (torch.exp(self.logvar) - self.logvar).sum(1) - self.mu.shape[1])

    def rate_by_dimension(self) -> Tensor:
        """The addends of `rate`: `(batch, latent_dim)`, nats."""
        return 0.5 * (self.mu.square() + torch.exp(self.logvar) - self.logvar - 1)
