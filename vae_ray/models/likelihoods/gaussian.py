"""Gaussian: each pixel by itself around its mean, with one standard deviation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vae_ray.models.likelihoods.location_scale import LocationScale


class Gaussian(LocationScale):
    """Normal; the optimal variance is the mean squared error."""

    power = 2
    log_z = 0.5 * math.log(2 * math.pi)

    def deviation(self, residual: Tensor) -> Tensor:
        return torch.linalg.vecdot(residual, residual)

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
