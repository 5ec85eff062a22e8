"""Densities of a location by pixel and one scale of all pixels: what Gaussian and Laplace have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vae_ray.config.fields import MIN_PIXEL_SCALE
from vae_ray.models.likelihoods.base import Likelihood
from vae_ray.parallel.global_batch import GlobalBatch

MOMENT_DECAY = 0.99
"""Of the running average of the batches' moments, per update."""


class LocationScale(Likelihood):
    """log p(x) = -(|x - m| / s)^p / p - log s - log Z by pixel; all in units of [0, 1].

    The location m is sigmoid(params), or params themselves (`mean="identity"`). The scale s is `scale` (`"fixed"`), one
    trained number that begins there (`"learned"`), or the best one for the current global batch (`"optimal"`;
    Rybkin et al. 2021, arXiv:2006.13202): s^p = mean of |x - m|^p, a constant in the gradient. That is the gradient of
    log s, because the derivative in s is 0 at the best s. Evaluation takes a running average of s^p over training.
    Neither can be below `MIN_PIXEL_SCALE`, the rounding to 256 levels.
    """

    support = "real"
    power: int
    log_z: float
    moment: Tensor
    num_batches: Tensor
    batch_moment: Tensor

    def __init__(self, scale: float, *, sigma: str = "fixed", mean: str = "sigmoid") -> None:
        super().__init__()
        self.initial_scale, self.sigma, self.is_identity = scale, sigma, mean == "identity"
        if sigma == "learned":
            # s² = exp(2 l) + minimum²; from the minimum itself no gradient would lead away
            excess = max(scale**2 - MIN_PIXEL_SCALE**2, MIN_PIXEL_SCALE**2)
            self.log_scale = nn.Parameter(torch.tensor(0.5 * math.log(excess)))
        if sigma == "optimal":
            self.register_buffer("moment", torch.tensor(scale**self.power))
            self.register_buffer("num_batches", torch.tensor(0.0))
            self.register_buffer("batch_moment", torch.tensor(scale**self.power), persistent=False)

    def deviation(self, residual: Tensor) -> Tensor:
        """|residual|^p summed over pixels: `(N,)` of `(N, pixels)`."""
        raise NotImplementedError

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Samples for m = 0, s = 1 of the shape of `like`."""
        raise NotImplementedError

    def initial_bias(self, mean_image: Tensor) -> Tensor:
        return mean_image if self.is_identity else super().initial_bias(mean_image)

    def location(self, params: Tensor) -> Tensor:
        """m, `(N, C, H, W)`."""
        return params if self.is_identity else torch.sigmoid(params)

    def scale(self, like: Tensor) -> Tensor:
        """s, a scalar in the dtype of `like`."""
        if self.sigma == "learned":
            return torch.sqrt(torch.exp(2 * self.log_scale) + MIN_PIXEL_SCALE**2)
        if self.sigma == "optimal":
            moment = self.batch_moment if self.training else self.moment
            return moment.clamp_min(MIN_PIXEL_SCALE**self.power) ** (1 / self.power)
        return like.new_full((), self.initial_scale)

    @torch.no_grad()
    def fit(self, params: Tensor, x: Tensor, batch: GlobalBatch) -> None:
        if self.sigma != "optimal":
            return
        residual = (x - self.location(params)).flatten(1)
        deviation = self.deviation(residual).sum(dtype=torch.float64)
        total, count = batch.sum(torch.stack([deviation, deviation.new_tensor(residual.numel())]))
        self.batch_moment.copy_(total / count)
        # the first average is the first moment, and early ones are soon forgotten; one that is not finite is left out
        is_finite = torch.isfinite(self.batch_moment)
        weight = torch.clamp(1 / (1 + self.num_batches), min=1 - MOMENT_DECAY)
        average = torch.lerp(self.moment, self.batch_moment, weight)
        self.moment.copy_(torch.where(is_finite, average, self.moment))
        self.num_batches += is_finite

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        scale = self.scale(params)
        residual = ((x - self.location(params)) / scale).flatten(1)
        return -self.deviation(residual) / self.power - residual.shape[1] * (scale.log() + self.log_z)

    def mean(self, params: Tensor) -> Tensor:
        """m; of `mean="identity"` what a pixel can show of it."""
        return self.location(params).clamp(0, 1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.location(params) + self.scale(params) * self.noise(params, generator)
