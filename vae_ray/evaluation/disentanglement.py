"""How far the dimensions of a code depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_total_correlation(mean: Tensor, variance: Tensor | None = None) -> float:
    """KL(N(m, C) || prod_j N(m_j, C_jj)) in nats, with m and C those of the aggregate posterior of N images.

    In closed form -1/2 log det of the correlation matrix (Locatello et al. 2019, arXiv:1811.12359, section 5.2).

    Args:
        mean: the posteriors' means, `(N, d)`.
        variance: their variances, `(N, d)`, whose mean is added to the covariance of the means, so that C is that of z;
            None: C is that of the means.
    """
    covariance = torch.cov(mean.double().T, correction=0)
    if variance is not None:
        covariance = covariance + torch.diag(variance.double().mean(0))
    scale = covariance.diagonal().rsqrt()
    return -0.5 * float(torch.linalg.slogdet(covariance * scale * scale[:, None]).logabsdet)
