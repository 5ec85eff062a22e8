"""The linear Gaussian model p(x|z) = N(W z + mean, variance I), z ~ N(0, I), in closed form: probabilistic PCA."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal


def principal_components(x: Tensor, latent_dim: int) -> tuple[Tensor, Tensor, float]:
    """W `(d, latent_dim)`, mean `(d,)` and variance of the highest likelihood of `x` `(N, d)`.

    Tipping & Bishop 1999, eq. 7 and 8.
    """
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    variance = float(values[:-latent_dim].mean())
    return vectors[:, -latent_dim:] * (values[-latent_dim:] - variance).sqrt(), x.mean(0), variance


def log_evidence(x: Tensor, weight: Tensor, mean: Tensor, variance: float) -> Tensor:
    """log p(x) = log N(x; mean, W W' + variance I), `(N,)` for `x` `(N, d)`."""
    covariance = weight @ weight.T + variance * torch.eye(len(mean), dtype=x.dtype)
    return MultivariateNormal(mean, covariance).log_prob(x)


def mean_log_evidence(x: Tensor, weight: Tensor, mean: Tensor, variance: float) -> float:
    """The mean of `log_evidence`, by the second moments of `x` about the model's mean: cheap for many rows."""
    covariance = weight @ weight.T + variance * torch.eye(len(mean), dtype=x.dtype)
    shift = x.mean(0) - mean
    moments = torch.cov(x.T, correction=0) + torch.outer(shift, shift)
    squares = float(torch.linalg.solve(covariance, moments).trace())
    # E log N(x; mean, C) = -1/2 (tr C^-1 S + log det C + d log 2 pi)
    return -0.5 * (squares + float(torch.logdet(covariance)) + len(mean) * math.log(2 * math.pi))
