"""Likelihoods log p(x|z): the distribution of pixels in [0, 1] that the decoder's parameters describe.

The decoder gives parameters `(N, num_params, H, W)`; a likelihood says how many it needs and what they mean. Values
are in nats, summed over channels and pixels: `(N,)`. A likelihood is a module: it may have parameters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_ray.config import user_code
from vae_ray.config.fields import UserEntry
from vae_ray.parallel.global_batch import GlobalBatch


class Likelihood(nn.Module):
    """Base of all likelihoods; `x` is `(N, C, H, W)`."""

    support: str = "unit interval"
    """What x may be: "binary", "unit interval", "256 levels" or "real"."""

    def num_params(self, channels: int) -> int:
        """Parameters of a pixel with that many channels."""
        return channels

    def initial_bias(self, mean_image: Tensor) -> Tensor:
        """Parameters `(num_params, H, W)` at which the mean is about `mean_image` `(C, H, W)` in [0, 1]."""
        # a pixel that is never lit would ask for a logit of -infinity
        return torch.logit(mean_image, eps=1e-3)

    def fit(self, params: Tensor, x: Tensor, batch: GlobalBatch) -> None:
        """Set what is not trained by gradients, from the rows of this worker; called in training, before `log_prob`.

        Collective: what is set must be the same on all workers.
        """

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over channels and pixels: `(N,)`."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """E[x|z], `(N, C, H, W)` in [0, 1]."""
        raise NotImplementedError

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x ~ p(x|z), `(N, C, H, W)`."""
        raise NotImplementedError


def sum_softplus(logits: Tensor) -> Tensor:
    """log(1 + exp(l)) summed over dimension 1, `(N,)`."""
    # softplus(l) = max(l, 0) - log sigmoid(|l|): log1p, which softplus and logsigmoid call, is not vectorised on some
    # processors, and four times slower there; sigmoid(|l|) is at least 1/2, so that its logarithm loses nothing.
    return torch.relu(logits).sub_(logits.abs().sigmoid_().log_()).sum(1)


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

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        result: Tensor = _BernoulliLogProb.apply(params.flatten(1), x.flatten(1))
        return result

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(params), generator=generator)


class Gaussian(Likelihood):
    """Normal with mean sigmoid(logits) and one fixed standard deviation `scale`, in units of [0, 1]."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        # log N(x; m, s) = -1/2 ((x - m) / s)^2 - log s - 1/2 log 2 pi
        residual = ((x - torch.sigmoid(params)) / self.scale).flatten(1)
        normaliser = residual.shape[1] * (math.log(self.scale) + 0.5 * math.log(2 * math.pi))
        return -0.5 * torch.linalg.vecdot(residual, residual) - normaliser

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(params.shape, generator=generator, dtype=params.dtype, device=params.device)
        return torch.sigmoid(params) + self.scale * noise


LIKELIHOODS: dict[str, Callable[[Any], Likelihood]] = {
    # each is given the entry's settings
    "bernoulli": lambda config: Bernoulli(),
    "gaussian": lambda config: Gaussian(config.scale),
}


def build_likelihood(config: Any) -> Likelihood:
    """The likelihood of an experiment's section `likelihood`."""
    if isinstance(config, UserEntry):
        likelihood = user_code.call(config.name, config.settings, key="likelihood")
        return user_code.expect(likelihood, Likelihood, key="likelihood", path=config.name)
    return LIKELIHOODS[config.name](config)
