"""How likely images are under a model: the ELBO and -log p(x), in nats per image or bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vae_ray.evaluation.metrics import bits_per_dim
from vae_ray.evaluation.observations import Arrays
from vae_ray.evaluation.result import Result, means

LEAST_EFFECTIVE_SAMPLES = 10
"""With fewer a sum of importance weights is mostly that of a few samples."""


def elbo(arrays: Arrays, *, image_shape: tuple[int, ...], has_levels: bool) -> Result:
    """`nelbo` = `distortion` + `rate`, the negative ELBO in nats per image (Kingma & Welling 2014, eq. 3; beta is 1).

    An upper bound of -log p(x), by one sampled z for each image. Lower is better. With several latent groups also
    `rate_group_1`, ... from the top; of a likelihood over 256 levels `bits_per_dim` too. The standard errors contain
    the noise of z.
    """
    by_group = arrays["rate_by_group"]
    groups = {f"rate_group_{number}": by_group[:, number - 1] for number in range(1, by_group.shape[1] + 1)}
    terms = {"distortion": arrays["distortion"], "rate": arrays["rate"], **(groups if len(groups) > 1 else {})}
    nelbo = arrays["distortion"].astype(np.float64) + arrays["rate"]
    values, errors = means({"nelbo": nelbo, **terms})
    if has_levels:
        values["bits_per_dim"] = bits_per_dim(values["nelbo"], image_shape)
        errors["bits_per_dim"] = bits_per_dim(errors["nelbo"], image_shape)
    return Result(values, errors)


def nll(arrays: Arrays, *, bounds: Sequence[int], image_shape: tuple[int, ...], has_levels: bool) -> Result:
    """`nll`: -log p(x) in nats per image by importance sampling (Burda et al. 2016, eq. 8), an upper bound.

    `nll_bound_5` and so on are the bounds by the first 5, ... samples. `effective_samples` is the mean over images of
    (sum w)^2 / sum w^2, from 1 to the number of samples: where it is small, the bound is still far from its limit.
    """
    log_p = -arrays["log_p"]
    names = [*(f"nll_bound_{k}" for k in bounds[:-1]), "nll"]
    values, errors = means(
        {**{name: log_p[:, i] for i, name in enumerate(names)}, "effective_samples": arrays["effective_samples"]}
    )
    if has_levels:
        values["nll_bits_per_dim"] = bits_per_dim(values["nll"], image_shape)
        errors["nll_bits_per_dim"] = bits_per_dim(errors["nll"], image_shape)
    typical, k = float(np.median(arrays["effective_samples"])), bounds[-1]
    if typical >= min(LEAST_EFFECTIVE_SAMPLES, math.sqrt(k)):
        return Result(values, errors)
    warning = (
        f"nll: of {k:,} samples of an image about {typical:.1f} count (the effective sample size, its median); more "
        "samples would lower the nll"
    )
    return Result(values, errors, warnings=(warning,))
