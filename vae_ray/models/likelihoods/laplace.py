"""Laplace: each pixel by itself around its median, with one scale; errors count by their size, not its square."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vae_ray.models.likelihoods.base import uniform_like
from vae_ray.models.likelihoods.location_scale import LocationScale


class Laplace(LocationScale):
    """exp(-|x - m| / s) / (2 s); the optimal scale is the mean absolute error."""

    power = 1
    log_z = math.log(2)

    def deviation(self, residual: Tensor) -> Tensor:
        return residual.abs().sum(1)

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        # u in [-1, 1); sign(u) |log(1 - |u|)| where 1 - |u| is not 0
        u = 2 * uniform_like(like, generator) - 1
        return -u.sign() * torch.log1p(-u.abs().clamp_max(1 - torch.finfo(u.dtype).eps))
