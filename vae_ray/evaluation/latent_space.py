"""Is the latent space used, and does the prior cover what the encoder uses? All of q(z|x) of the images of a split."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_ray.evaluation.diagnosis import INFORMATIVE_NATS
from vae_ray.evaluation.mutual_information import marginal_log_densities
from vae_ray.evaluation.observations import Arrays
from vae_ray.evaluation.result import Result

ACTIVE_VARIANCE = 0.01
"""From which on a unit counts as active."""
MOST_DENSITIES = 4_000_000_000
"""One-dimensional densities that the aggregated posterior's factors take: about 20 seconds of a core."""
CHUNK_DENSITIES = 4_000_000
"""Of which so many are in memory together."""


def active_units(arrays: Arrays) -> Result:
    """`active_units`: dimensions whose posterior mean varies over images, Var_x(E_q[z_d]) > 0.01.

    Burda et al. 2016 (arXiv:1509.00519), section 5.2. From 0 to the number of latent dimensions; of a hierarchy the
    means of a group are those at the means of the groups above. `variance_of_mean` has the variance of each. It says
    how many dimensions carry something, not how much: see `rate_by_dimension`.
    """
    variances = arrays["codes"].astype(np.float64).var(axis=0)
    active = float((variances > ACTIVE_VARIANCE).sum())
    warnings = () if len(arrays["codes"]) > 1 else ("active-units: one image has no variance; try more --num-images",)
    return Result({"active_units": active}, details={"variance_of_mean": variances.tolist()}, warnings=warnings)


def rates(arrays: Arrays, *, group_sizes: list[int]) -> Result:
    """`informative_dimensions`: dimensions with a mean rate of at least 0.01 nats; of a spatial latent, channels.

    `rate_by_dimension` has the mean rate of each in nats per image; their sum is `rate`. Under priors without factors
    (mixture, vamp, flow) the shares are those of the KL to the prior's Gaussian approximation.
    """
    shares = arrays["rate_shares"].astype(np.float64).mean(axis=0)
    by_group = arrays["rate_by_group"].astype(np.float64).mean(axis=0)
    parts = np.split(shares, np.cumsum(group_sizes)[:-1])
    scaled = [part * (rate / max(part.sum(), np.finfo(float).tiny)) for part, rate in zip(parts, by_group, strict=True)]
    by_dimension = np.concatenate(scaled)
    num = float((by_dimension >= INFORMATIVE_NATS).sum())
    return Result({"informative_dimensions": num}, details={"rate_by_dimension": by_dimension.tolist()})


def aggregated_posterior(arrays: Arrays) -> Result:
    """The aggregated posterior q(z) = 1/N sum_i q(z|x_i) of the top group, against its parts and against the prior.

    By one z_i ~ q(z|x_i) for each of the N images, in nats (Hoffman & Johnson 2016, "ELBO surgery"; Chen et al. 2018,
    arXiv:1802.04942, eq. 2):

    - `mutual_information` I(x; z) = mean of log q(z_i|x_i) - log q(z_i): at most log N;
    - `marginal_kl` KL(q(z) || p(z)) = mean of log q(z_i) - log p(z_i): what samples of the prior lack. The two add up
      to the rate (of these samples);
    - `total_correlation` KL(q(z) || prod_d q(z_d)) = mean of log q(z_i) - sum_d log q(z_i,d): how far dimensions
      depend on each other;
    - `prior_overlap`, from 0 to 1: the integral of min(q, p), the mean of its estimates by samples of q and of p.

    q(z) is that of these N images: where the rate exceeds log N, each z is explained by its own image alone, so that
    the mutual information is log N, and the other three say nothing. Of more than 40 latent dimensions fewer than
    10,000 images are used, from all over the split; a warning says so.
    """
    dimensions = arrays["mean"].shape[1]
    total = len(arrays["mean"])
    num = min(total, math.isqrt(MOST_DENSITIES // dimensions))
    rows = np.arange(num) * total // num  # from all over the split, which may be sorted
    mean, logvar, z, prior_z = (_float64(arrays[name][rows]) for name in ("mean", "logvar", "z", "prior_z"))
    log_prior, prior_log_prior = (_float64(arrays[name][rows]) for name in ("log_prior", "prior_log_prior"))
    own = _log_normal(z, mean, logvar).sum(1)
    log_q = log_mixture(z, mean, logvar)
    overlap_of_q = (log_prior - log_q).clamp(max=0).exp().mean()
    overlap_of_p = (log_mixture(prior_z, mean, logvar) - prior_log_prior).clamp(max=0).exp().mean()
    values = {
        "mutual_information": own - log_q,
        "marginal_kl": log_q - log_prior,
        "total_correlation": log_q - marginal_log_densities(z, mean, logvar).sum(1),
        "prior_overlap": (overlap_of_q + overlap_of_p) / 2,
    }
    found = {name: float(value.mean()) for name, value in values.items()}
    warnings = []
    if num < total:
        warnings.append(
            f"aggregated-posterior: of {num:,} of the {total:,} images, as there are {dimensions} dimensions"
        )
    if num > 1 and found["mutual_information"] < 0.9 * math.log(num):
        return Result(found, warnings=tuple(warnings))
    warning = (
        f"aggregated-posterior: the mutual information of {num:,} images, {found['mutual_information']:.2f} nats, is "
        f"near its largest value log {num:,} = {math.log(num):.2f}; marginal_kl, total_correlation and prior_overlap "
        "say nothing then"
    )
    return Result(found, warnings=(*warnings, warning))


def log_mixture(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log 1/N sum_i N(z; mean_i, exp(logvar_i)), `(M,)` for z `(M, d)`; float64, in chunks of z.

    As one matrix product: -2 log N(z; m, v) = z^2 / v - 2 z m / v + m^2 / v + log v + log 2 pi, summed over dimensions.
    """
    center = mean.mean(0)  # of which large squares would cancel
    z, mean, precision = z - center, mean - center, torch.exp(-logvar)
    weights = torch.cat([precision, -2 * mean * precision], dim=1).T
    constant = (mean.square() * precision + logvar + math.log(2 * math.pi)).sum(1) + 2 * math.log(len(mean))
    chunks = z.split(max(1, CHUNK_DENSITIES // len(mean)))
    return torch.cat(
        [torch.logsumexp(-0.5 * (torch.cat([part.square(), part], 1) @ weights + constant), 1) for part in chunks]
    )


def _log_normal(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * ((z - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))


def _float64(array: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).double()
