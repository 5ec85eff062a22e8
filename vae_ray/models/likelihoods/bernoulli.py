"""Bernoulli: each pixel 0 or 1 by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vae_ray.models.likelihoods.base import Likelihood


def sum_softplus(logits: Tensor) -> Tensor:
    """log(1 + exp(l)) summed over dimension 1, `(N,)`."""
    # softplus(l) = max(l, 0) - log sigmoid(|l|), with one logarithm of a product of up to 63 factors from 1/2 to 1:
    # log1p, which softplus and logsigmoid call, is not vectorised on some processors, and four times slower there.
    factors = logits.abs().sigmoid_()
    for _ in range(5):
        half = factors.shape[1] // 2
        if not half:
            break
        pairs = factors[:, :half] * factors[:, half : 2 * half]
        if factors.shape[1] % 2:
            pairs[:, 0] *= factors[:, -1]
        factors = pairs
    return torch.relu(logits).sum(1).sub_(factors.log_().sum(1))


class _BernoulliLogProb(torch.autograd.Function):
    """sum(x * l - softplus(l)) over pixels, with the gradient x - sigmoid(l) in three passes over memory.

    The value is that of -binary_cross_entropy_with_logits. Autograd's own backward of the same expression
    would make five passes and as many temporaries.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        return torch.linalg.vecdot(x, logits).sub_(sum_softplus(logits))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits, x = ctx.saved_tensors
        return torch.sigmoid(logits).sub_(x).mul_(-grad_outputs[0][:, None]), None


class Bernoulli(Likelihood):
    """Bernoulli with mean sigmoid(logits), each pixel by itself.

    On grey levels x in [0, 1] this is the cross-entropy of Kingma & Welling's MNIST
    experiments: not a normalised density there (Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845), so
    its nats compare only with other Bernoulli nats on grey levels.
    """

    support = "binary"

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        result: Tensor = _BernoulliLogProb.apply(params.flatten(1), x.flatten(1))
        return result

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(params), generator=generator)
