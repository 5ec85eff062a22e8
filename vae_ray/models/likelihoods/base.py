"""What a likelihood log p(x|z) is: the distribution of pixels in [0, 1] that the decoder's parameters describe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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


def levels_of(x: Tensor) -> Tensor:
    """The levels 0 to 255 of pixels k / 255, int64."""
    return (x * 255).round().long()


def uniform_like(params: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) of the shape, dtype and device of `params`."""
    return torch.rand(params.shape, generator=generator, dtype=params.dtype, device=params.device)


def solve_increasing(function: Callable[[Tensor], Tensor], target: Tensor, *, bound: float) -> Tensor:
    """t in [-bound, bound] with `function(t) = target`, by bisection in float64; `function` is increasing."""
    low = torch.full_like(target, -bound, dtype=torch.float64)
    high = -low
    for _ in range(64):
        middle = (low + high) / 2
        is_below = function(middle) < target
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return ((low + high) / 2).to(target)
