"""Continuous Bernoulli: a density on [0, 1] (Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845).

p(x) = C(lambda) lambda^x (1 - lambda)^(1 - x) with lambda = sigmoid(l) is the exponential density exp(l x - A(l)) cut
off at 0 and 1, where A(l) = log((exp(l) - 1) / l), and -log C = A(l) - log(1 + exp(l)). Its mean is A'(l), not lambda.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vae_ray.models.likelihoods.base import Likelihood, solve_increasing, uniform_like

SMALL = 0.5
"""Logits below it are computed by the series: the closed forms subtract numbers of about 1 / |l| there."""
SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000, 1 / 74724249600)
"""B_2n / (2n)!: mean = 1/2 + sum of SERIES[n-1] l^(2n-1), of which the next term is below 2e-17 for |l| < 1/2."""
SMALLEST_MEAN = 0.01
"""Of a pixel at the start: a mean m near 0 has l = -1/m."""


class ContinuousBernoulli(Likelihood):
    """Each pixel by itself, with one logit."""

    support = "unit interval"

    def initial_bias(self, mean_image: Tensor) -> Tensor:
        target = mean_image.clamp(SMALLEST_MEAN, 1 - SMALLEST_MEAN)
        return solve_increasing(self.mean, target, bound=1 / SMALLEST_MEAN)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        result: Tensor = _ContinuousBernoulliLogProb.apply(params.flatten(1), x.flatten(1))
        return result

    def mean(self, params: Tensor) -> Tensor:
        nearer = distance_to_nearer_end(params.abs())
        return torch.where(params < 0, nearer, 1 - nearer)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        # the inverse of F(x) = expm1(-u x) / expm1(-u) for the logit -u; near u = 0 it is x itself to rounding
        u = params.abs().clamp_min(1e-6)
        x = -torch.log1p(uniform_like(params, generator) * torch.expm1(-u)) / u
        return torch.where(params < 0, x, 1 - x)


class _ContinuousBernoulliLogProb(torch.autograd.Function):
    """sum(l x - A(l)) over pixels with the gradient x - A'(l); autograd would not keep it exact near l = 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        # A(l) = max(l, 0) + A(-|l|); joined with l x there is no difference of large numbers
        exponent = torch.where(logits > 0, x - 1, x) * logits
        return (exponent - log_normaliser(logits.abs())).sum(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits, x = ctx.saved_tensors
        nearer = distance_to_nearer_end(logits.abs())
        return torch.where(logits < 0, x - nearer, nearer - (1 - x)) * grad_outputs[0][:, None], None


def log_normaliser(u: Tensor) -> Tensor:
    """A(-u) = log((1 - exp(-u)) / u) for u >= 0."""
    large = u.clamp_min(SMALL)
    exact = torch.log(-torch.expm1(-large)) - torch.log(large)
    square, series = u * u, torch.zeros_like(u)
    for n in range(len(SERIES), 0, -1):
        series = (series + SERIES[n - 1] / (2 * n)) * square  # the integral of the mean's series
    return torch.where(u < SMALL, series - u / 2, exact)


def distance_to_nearer_end(u: Tensor) -> Tensor:
    """The mean for the logit -u, u >= 0, in (0, 1/2]: 1 / u - 1 / (exp(u) - 1)."""
    large = u.clamp_min(SMALL)
    exact = 1 / large - 1 / torch.expm1(large)
    square, series = u * u, torch.zeros_like(u)
    for coefficient in reversed(SERIES):
        series = series * square + coefficient
    return torch.where(u < SMALL, 0.5 - series * u, exact)
