"""The linear Gaussian model p(x|z) = N(W z + mean, variance I), z ~ N(0, I), in closed form: probabilistic PCA."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal


class LinearGaussian(NamedTuple):
    """The parameters of the model."""

    weight: Tensor
    """W, `(d, latent_dim)`."""
    mean: Tensor
    """`(d,)`."""
    variance: float

    @property
    def covariance(self) -> Tensor:
        """That of x, `(d, d)`."""
        return self.weight @ self.weight.T + self.variance * torch.eye(len(self.mean), dtype=self.mean.dtype)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), `(N,)` for `x` `(N, d)`."""
        return MultivariateNormal(self.mean, self.covariance).log_prob(x)

    def mean_log_evidence(self, moments: Moments) -> float:
        """The mean of log p(x) over rows with these moments: cheap for many rows."""
        shift = moments.mean - self.mean
        about_mean = moments.covariance + torch.outer(shift, shift)
        squares = float(torch.linalg.solve(self.covariance, about_mean).trace())
        # E log N(x; mean, C) = -1/2 (tr C^-1 E(x - mean)(x - mean)' + log det C + d log 2 pi)
        return -0.5 * (squares + float(torch.logdet(self.covariance)) + len(self.mean) * math.log(2 * math.pi))


class Moments(NamedTuple):
    """Of rows `(N, d)`."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        return cls(x.mean(0), torch.cov(x.T, correction=0))


def principal_components(moments: Moments, latent_dim: int) -> LinearGaussian:
    """The model of the highest likelihood (Tipping & Bishop 1999, eq. 7 and 8)."""
    values, vectors = torch.linalg.eigh(moments.covariance)
    variance = float(values[:-latent_dim].mean())
    weight = vectors[:, -latent_dim:] * (values[-latent_dim:] - variance).sqrt()
    return LinearGaussian(weight, moments.mean, variance)
