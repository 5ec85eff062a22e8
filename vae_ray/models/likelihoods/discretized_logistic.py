"""Mixture of discretized logistics over 256 levels (PixelCNN++, Salimans et al. 2017, arXiv:1701.05517).

Pixels are rescaled to [-1, 1], where levels are 2 / 255 apart. A component is picked for a whole pixel; the mean of
each of its channels is shifted by the channels before it (section 2.2), which makes colours agree.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_ray.models.latents import bounded
from vae_ray.models.likelihoods.base import Likelihood, levels_of, solve_increasing, uniform_like
from vae_ray.models.likelihoods.categorical import categorical_sample

HALF_BIN = 1 / 255
INITIAL_SCALE = 0.2
INITIAL_SPREAD = 0.5
"""How far the components' means reach to both sides at the start."""


class Components(NamedTuple):
    """K logistic distributions of each pixel, in units of [-1, 1]."""

    logits: Tensor
    """Of the components' weights, `(N, K, H, W)`."""
    means: Tensor
    """`(N, K, C, H, W)`, before the shifts."""
    log_scales: Tensor
    """`(N, K, C, H, W)`."""
    slopes: Tensor
    """In [-1, 1], `(N, K, C (C - 1) / 2, H, W)`: of channel 1 by 0, of 2 by 0, of 2 by 1, ..."""

    def shifted(self, channel: int, before: list[Tensor]) -> Tensor:
        """The mean of a channel, `(N, K, H, W)`, given those before it, which broadcast to that shape."""
        first, mean = channel * (channel - 1) // 2, self.means[:, :, channel]
        for number, value in enumerate(before):
            mean = mean + self.slopes[:, :, first + number] * value
        return mean


class DiscretizedLogistic(Likelihood):
    """The probability of a level is the mass of its bin; the outermost bins reach to infinity."""

    support = "256 levels"

    def __init__(self, components: int) -> None:
        super().__init__()
        self.components = components

    def num_params(self, channels: int) -> int:
        return self.components * (1 + 2 * channels + channels * (channels - 1) // 2)

    def initial_bias(self, mean_image: Tensor) -> Tensor:
        """Components of equal weights at both sides of the mean image."""
        channels, num_slopes = len(mean_image), len(mean_image) * (len(mean_image) - 1) // 2
        spread = INITIAL_SPREAD * torch.linspace(-1, 1, self.components).to(mean_image)[:, None, None, None]
        spread = spread - spread.mean()  # linspace of one component is -1

        def bias(center: Tensor) -> Tensor:
            means = center + spread.to(center)
            sizes = [1, channels, channels, num_slopes]
            logits, _, log_scales, slopes = (means.new_zeros(self.components, n, *center.shape[1:]) for n in sizes)
            return torch.cat(
                [part.flatten(0, 1) for part in (logits, means, log_scales + math.log(INITIAL_SCALE), slopes)]
            )

        target = mean_image.clamp(1e-3, 1 - 1e-3)
        return bias(solve_increasing(lambda center: self.mean(bias(center)[None])[0], target, bound=4.0))

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        parts, levels = self._components(params), levels_of(x)[:, None]
        pixels = (2 * x - 1)[:, None]
        before = [pixels[:, :, channel] for channel in range(x.shape[1])]
        means = torch.stack([parts.shifted(channel, before[:channel]) for channel in range(x.shape[1])], dim=2)
        by_component = log_mass(pixels - means, parts.log_scales, levels).sum(2) + parts.logits.log_softmax(1)
        return by_component.logsumexp(1).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """E[x|z] of logistics that are cut off at black and white, with the means of earlier channels in the shifts.

        Within half a level where no shift meets black or white.
        """
        parts = self._components(params)
        means: list[Tensor] = []
        for channel in range(parts.means.shape[2]):
            means.append(cut_off_mean(parts.shifted(channel, means), parts.log_scales[:, :, channel]))
        weights = parts.logits.softmax(1)
        return torch.stack([(weights * mean).sum(1) for mean in means], dim=1).add(1).div(2).clamp(0, 1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        parts = self._components(params)
        chosen = categorical_sample(parts.logits, 1, generator)[:, None, None]
        one = Components(*(torch.take_along_dim(t, chosen if t.ndim == 5 else chosen[:, :, 0], dim=1) for t in parts))
        pixels: list[Tensor] = []
        for channel in range(parts.means.shape[2]):
            mean, scale = one.shifted(channel, pixels), one.log_scales[:, :, channel].exp()
            value = mean + scale * torch.logit(uniform_like(mean, generator))
            pixels.append(((value + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1)
        return torch.cat(pixels, dim=1).add(1).mul(127.5).round() / 255

    def _components(self, params: Tensor) -> Components:
        by_component = params.shape[1] // self.components
        channels = next(c for c in range(1, by_component) if self.num_params(c) == params.shape[1])
        num_slopes = channels * (channels - 1) // 2
        sizes = [self.components * n for n in (1, channels, channels, num_slopes)]
        logits, *others = params.split(sizes, dim=1)
        means, log_scales, slopes = (
            part.unflatten(1, (self.components, part.shape[1] // self.components)) for part in others
        )
        # soft bounds, as of a log variance: scales are as they are given between e^-7.5 (a ninth of a level) and e^5
        return Components(logits, means, bounded(2 * log_scales) / 2, torch.tanh(slopes))


def log_mass(distance: Tensor, log_scale: Tensor, levels: Tensor) -> Tensor:
    """log probability of levels at a `distance` from the mean of a logistic distribution.

    `levels` broadcasts to the shape of the two others.
    """
    result: Tensor = _LogMass.apply(distance, log_scale, levels)
    return result


class _LogMass(torch.autograd.Function):
    """F(b) - F(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): three logarithms without cancellation.

    However small the scale and however far out the bin; those of the outermost bins have the one factor that is
    inside. The derivatives are computed with the value: autograd's own would make three times as many passes over
    memory.
    """

    @staticmethod
    def forward(ctx: Any, distance: Tensor, log_scale: Tensor, levels: Tensor) -> Tensor:
        inverse = torch.exp(-log_scale)
        above, below = (distance + HALF_BIN).mul_(inverse), (HALF_BIN - distance).mul_(inverse)
        width = 2 * HALF_BIN * inverse
        not_white, not_black = (levels != 255).to(distance.dtype), (levels != 0).to(distance.dtype)
        inside = not_white * not_black
        value = log_sigmoid(above).mul_(not_white).add_(log_sigmoid(below).mul_(not_black))
        value.add_((-width).expm1_().neg_().log_().mul_(inside))
        if any(ctx.needs_input_grad):
            # d log sigmoid(a) / da = sigmoid(-a); d log(1 - exp(-w)) / dw = 1 / (exp(w) - 1)
            above_slope = (-above).sigmoid_().mul_(not_white)
            below_slope = (-below).sigmoid_().mul_(not_black)
            by_scale = width.div_(torch.expm1(width)).mul_(inside)
            by_scale.addcmul_(above, above_slope).addcmul_(below, below_slope).neg_()
            ctx.save_for_backward(above_slope.sub_(below_slope).mul_(inverse), by_scale)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        by_distance, by_scale = ctx.saved_tensors
        return by_distance * grad_outputs[0], by_scale * grad_outputs[0], None


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x) = min(x, 0) + log sigmoid(|x|), without log1p: see `sum_softplus`."""
    return x.clamp(max=0).add_(x.abs().sigmoid_().log_())


def cut_off_mean(mean: Tensor, log_scale: Tensor) -> Tensor:
    """E[clamp(X, -1, 1)] of a logistic X: -1 + the integral of P(X > t) over [-1, 1]."""
    inverse, scale = torch.exp(-log_scale), torch.exp(log_scale)
    return scale * (F.softplus((mean + 1) * inverse) - F.softplus((mean - 1) * inverse)) - 1
