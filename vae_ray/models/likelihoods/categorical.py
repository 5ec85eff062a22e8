"""Categorical: a probability of its own for each of the 256 levels of a pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from vae_ray.models.likelihoods.base import Likelihood, levels_of, solve_increasing, uniform_like

SMALLEST_MEAN = 0.01
"""Of a pixel at the start."""


class Categorical(Likelihood):
    """256 logits for each channel of a pixel, level by level within a channel: `C * 256` parameters."""

    support = "256 levels"

    def num_params(self, channels: int) -> int:
        return 256 * channels

    def initial_bias(self, mean_image: Tensor) -> Tensor:
        # logits a k / 255: of all distributions with that mean the one of the largest entropy
        def mean(slope: Tensor) -> Tensor:
            return self.mean((slope[:, None] * _values(slope)).flatten(0, 1)[None])[0]

        target = mean_image.clamp(SMALLEST_MEAN, 1 - SMALLEST_MEAN)
        slope = solve_increasing(mean, target, bound=2 / SMALLEST_MEAN)
        return (slope[:, None] * _values(slope)).flatten(0, 1)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        log_p = torch.log_softmax(params.unflatten(1, (-1, 256)), dim=2)
        return log_p.gather(2, levels_of(x)[:, :, None]).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        p = torch.softmax(params.unflatten(1, (-1, 256)), dim=2)
        return (p * _values(p)).sum(2).clamp(0, 1)  # which rounding can leave

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return categorical_sample(params.unflatten(1, (-1, 256)), 2, generator) / 255


def _values(like: Tensor) -> Tensor:
    """The pixel value of each level, `(256, 1, 1)`."""
    return (torch.arange(256, dtype=like.dtype, device=like.device) / 255)[:, None, None]


def categorical_sample(logits: Tensor, dim: int, generator: torch.Generator | None) -> Tensor:
    """Indices along `dim`, with probabilities softmax(logits): the largest of logits + Gumbel noise."""
    u = uniform_like(logits, generator).clamp_min(torch.finfo(logits.dtype).tiny)
    return (logits - torch.log(-torch.log(u))).argmax(dim)
