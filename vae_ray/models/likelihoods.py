"""Likelihoods log p(x|z): the distribution of pixels in [0, 1] that the decoder's logits describe.

A likelihood turns `logits` of shape `(batch, channels, height, width)` into densities, means and samples of
the same shape. The decoder always ends in logits; each likelihood says what they mean. All values are in
nats, summed over channels and pixels: `(batch,)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_ray.config.experiment import ModelConfig


class Likelihood(Protocol):
    """What every entry of `LIKELIHOODS` provides; `logits` and `x` are `(batch, ...)` of equal shape."""

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over pixels: `(batch,)`; x in [0, 1]."""
        ...

    def mean(self, logits: Tensor) -> Tensor:
        """E[x|z] in [0, 1], shape of `logits`."""
        ...

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x ~ p(x|z), shape of `logits`."""
        ...


class _BernoulliLogProb(torch.autograd.Function):
    """sum(x * l - softplus(l)) over pixels, with the gradient x - sigmoid(l) in three passes over memory.

    The value is that of -binary_cross_entropy_with_logits. Autograd's own backward of the same expression
    would make five passes and as many temporaries.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        return torch.linalg.vecdot(x, logits).sub_(F.softplus(logits).sum(1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits, x = ctx.saved_tensors
        return torch.sigmoid(logits).sub_(x).mul_(-grad_outputs[0][:, None]), None


class Bernoulli:
    """Bernoulli with mean sigmoid(logits), each pixel by itself.

    On grey levels x in [0, 1] this is the cross-entropy of the notebook and of Kingma & Welling's MNIST
    experiments: not a normalised density there (Loaiza-Ganem & Cunningham 2019, arXiv:1907.06845), so
    its nats compare only with other Bernoulli nats on grey levels.
    """

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        result: Tensor = _BernoulliLogProb.apply(logits.flatten(1), x.flatten(1))
        return result

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(logits), generator=generator)


class Gaussian:
    """Normal with mean sigmoid(logits) and one fixed standard deviation `scale`, in units of [0, 1]."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        # log N(x; m, s) = -1/2 ((x - m) / s)^2 - log s - 1/2 log 2 pi
        residual = ((x - torch.sigmoid(logits)) / self.scale).flatten(1)
        normaliser = residual.shape[1] * (math.log(self.scale) + 0.5 * math.log(2 * math.pi))
        return -0.5 * torch.linalg.vecdot(residual, residual) - normaliser

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        return torch.sigmoid(logits) + self.scale * noise


LIKELIHOODS: dict[str, Callable[[ModelConfig], Likelihood]] = {
    "bernoulli": lambda config: Bernoulli(),
    "gaussian": lambda config: Gaussian(config.gaussian_scale),
}
