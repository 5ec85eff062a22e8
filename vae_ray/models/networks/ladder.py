"""A ladder: a top-down hierarchy of groups with learned conditional priors, and posteriors that are residual to them.

z_1 ~ p(z_1), which is `model.prior`; z_g ~ p(z_g | z_1 .. z_g-1), a Gaussian computed from the state of the top-down
pass. A posterior is computed from that state and the image's features, relative to the prior (NVAE, Vahdat & Kautz
2020, arXiv:2007.03898, section 3.2; the two passes as in VDVAE, Child 2021, arXiv:2011.10650, figure 3).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vae_ray.models.dropout import Dropout
from vae_ray.models.latents import DiagonalGaussian, Distribution, Group, gaussian_from, residual_from
from vae_ray.models.networks.base import Choose, Features, Network, at_least_float32, weighted_layers, with_gain
from vae_ray.models.networks.blocks import (
    GAINS,
    RESIDUAL_GAIN,
    LabelEmbedding,
    ResidualBlock,
    Sequence,
    ToPixels,
    down,
    sizes_of,
    up,
)
from vae_ray.models.networks.layout import ImageLayout
from vae_ray.models.networks.mlp import ACTIVATIONS

HEAD_GAIN = 0.1
"""Of the layers that end in priors and posteriors: every group starts near N(0, I), with a rate near 0."""
CHANNELS_PER_NORM = 8
"""Channels that a norm takes together, at least: on a map of one pixel, a norm of few would lose the signal."""


class Ladder(Network):
    """Dense: a group at each width of `hidden`. Convolutional: `latent_groups` at each resolution of `channels`.

    Settings by level begin at the bottom, `upper_dims` at the top. Level 0 is the largest.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        num_params: int,
        num_classes: int = 0,
        kind: str = "dense",
        hidden: tuple[int, ...] = (256, 256),
        upper_dims: tuple[int, ...] = (8,),
        channels: tuple[int, ...] = (32, 64),
        latent_groups: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        activation: str = "silu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        options = {"activation": activation, "dropout": dropout, "num_classes": num_classes}
        if kind == "dense":
            parts: Parts = DenseParts(hidden, image_shape, **options)
            dims, counts = (latent_dim, *reversed(upper_dims)), (1,) * len(hidden)
        else:
            parts = ConvParts(channels, image_shape, **options)
            dims, counts = (latent_dim,) * len(channels), latent_groups
        levels = range(len(parts.widths))

        def blocks_of(level: int) -> list[nn.Module]:
            return [parts.block(parts.widths[level], parts.widths[level]) for _ in range(blocks)]

        self.encoder = nn.ModuleList(Sequence(parts.rise(level), *blocks_of(level)) for level in levels)
        self.rungs = nn.ModuleList()
        self.latent_shapes = tuple(parts.latent_shape(i, dims[i]) for i in reversed(levels) for _ in range(counts[i]))
        way: list[nn.Module] = []
        for level in reversed(levels):
            if level < levels[-1]:
                way.append(parts.descend(level))
            for _ in range(counts[level]):
                self.rungs.append(Rung(parts, level, dims[level], way, num_groups=sum(counts)))
                way = blocks_of(level)
            if not counts[level]:
                way += blocks_of(level)
        self.write = Sequence(*way, *parts.write(num_params))

    def bottom_up(self, x: Tensor, condition: Tensor | None = None) -> Features:
        """Parameters of the top posterior, and the features of each level."""
        features = []
        for level in self.encoder:
            x = level(x, condition)
            features.append(x)
        return tuple(at_least_float32(each) for each in (self._rungs()[0].posterior(x, condition), *features))

    def top_down(
        self, features: Features | None, choose: Choose, prior: Distribution, condition: Tensor | None = None
    ) -> tuple[Tensor, tuple[Group, ...]]:
        top, *lower = self._rungs()
        posterior = None if features is None else gaussian_from(features[0])
        groups = [Group(choose(0, posterior, prior), posterior, prior)]
        state = top.spread(groups[0].z)
        for rung in lower:
            state = rung.enter(state, condition)
            p, q = rung.distributions(state, features, condition)
            groups.append(Group(choose(len(groups), q, p), q, p))
            state = state + rung.spread(groups[-1].z)
        return at_least_float32(self.write(state, condition)), tuple(groups)

    def posterior_layers(self) -> list[nn.Module]:
        return [weighted_layers(rung.posterior)[-1] for rung in self._rungs()]

    def output_layer(self) -> nn.Module | None:
        return weighted_layers(self.write)[-1]

    def _rungs(self) -> list[Rung]:
        return [rung for rung in self.rungs if isinstance(rung, Rung)]


class Rung(nn.Module):
    """A group in the top-down pass: the way to it, its prior and posterior, and what its z adds to the state.

    The top group's prior is not computed here, and its posterior from the features alone.
    """

    def __init__(self, parts: Parts, level: int, latent_dim: int, way: list[nn.Module], *, num_groups: int) -> None:
        super().__init__()
        width, self.level, is_top = parts.widths[level], level, not way
        self.enter = Sequence(*way)

        def head() -> list[nn.Module]:
            return [*parts.norm(width), parts.linear(width, 2 * latent_dim, gain=HEAD_GAIN)]

        self.prior = Sequence() if is_top else Sequence(*head())
        self.posterior = Sequence(parts.block(width if is_top else 2 * width, width), *head())
        # all groups together write a signal of variance 1 (VDVAE, section 3)
        self.spread = parts.linear(latent_dim, width, gain=1 / math.sqrt(num_groups))

    def distributions(
        self, state: Tensor, features: Features | None, condition: Tensor | None
    ) -> tuple[DiagonalGaussian, DiagonalGaussian | None]:
        """The prior of the group, and its posterior if there are features."""
        prior = gaussian_from(at_least_float32(self.prior(state)))
        if features is None:
            return prior, None
        beside = torch.cat([state, features[1 + self.level]], dim=1)
        return prior, residual_from(at_least_float32(self.posterior(beside, condition)), prior)


class Parts(Protocol):
    """Layers of a kind of ladder, which has `widths` from the bottom up."""

    widths: tuple[int, ...]

    def latent_shape(self, level: int, latent_dim: int) -> tuple[int, ...]:
        """Of a group at this level."""
        ...

    def block(self, num_in: int, num_out: int) -> nn.Module:
        """A residual block that keeps the resolution, and is given the label."""
        ...

    def norm(self, width: int) -> list[nn.Module]:
        """Norm and activation: what comes between the residual stream and a head."""
        ...

    def linear(self, num_in: int, num_out: int, *, gain: float) -> nn.Module:
        """A linear map of the channels."""
        ...

    def rise(self, level: int) -> nn.Module:
        """To this level from the one below, or from the images."""
        ...

    def descend(self, level: int) -> nn.Module:
        """To this level from the one above."""
        ...

    def write(self, num_params: int) -> list[nn.Module]:
        """From the lowest level to the likelihood's parameters."""
        ...


class DenseParts:
    """Of fully connected ladders: features are `(N, width)`."""

    def __init__(self, widths: tuple[int, ...], image_shape: tuple[int, int, int], **options: Any) -> None:
        self.widths, self.image_shape, self.options = widths, image_shape, options

    def latent_shape(self, level: int, latent_dim: int) -> tuple[int, ...]:
        return (latent_dim,)

    def block(self, num_in: int, num_out: int) -> nn.Module:
        return DenseBlock(num_in, num_out, **self.options)

    def norm(self, width: int) -> list[nn.Module]:
        return [nn.GroupNorm(1, width), ACTIVATIONS[self.options["activation"]]()]

    def linear(self, num_in: int, num_out: int, *, gain: float = 1.0) -> nn.Module:
        return with_gain(nn.Linear(num_in, num_out), gain)

    def rise(self, level: int) -> nn.Module:
        if level > 0:
            return self.linear(self.widths[level - 1], self.widths[level])
        return nn.Sequential(nn.Flatten(), self.linear(math.prod(self.image_shape), self.widths[0]))

    def descend(self, level: int) -> nn.Module:
        return self.linear(self.widths[level + 1], self.widths[level])

    def write(self, num_params: int) -> list[nn.Module]:
        shape = (num_params, *self.image_shape[1:])
        return [*self.norm(self.widths[0]), nn.Linear(self.widths[0], math.prod(shape)), nn.Unflatten(1, shape)]


class ConvParts:
    """Of convolutional ladders: features are `(N, width, h, w)`; the lowest level has half the image's sides."""

    def __init__(self, widths: tuple[int, ...], image_shape: tuple[int, int, int], **options: Any) -> None:
        self.widths, self.image_shape, self.options = widths, image_shape, options
        self.image_size, *self.sizes = sizes_of(image_shape[1:], len(widths))

    def latent_shape(self, level: int, latent_dim: int) -> tuple[int, ...]:
        return (latent_dim, *self.sizes[level])

    def block(self, num_in: int, num_out: int) -> nn.Module:
        return ResidualBlock(num_in, num_out, groups=norm_groups(math.gcd(num_in, num_out)), **self.options)

    def norm(self, width: int) -> list[nn.Module]:
        return [nn.GroupNorm(norm_groups(width), width), ACTIVATIONS[self.options["activation"]]()]

    def linear(self, num_in: int, num_out: int, *, gain: float) -> nn.Module:
        return nn.Sequential(ImageLayout(), with_gain(nn.Conv2d(num_in, num_out, 1), gain))

    def rise(self, level: int) -> nn.Module:
        if level > 0:
            return down(self.widths[level - 1], self.widths[level], self.sizes[level - 1], self.sizes[level])
        return nn.Sequential(ImageLayout(), down(self.image_shape[0], self.widths[0], self.image_size, self.sizes[0]))

    def descend(self, level: int) -> nn.Module:
        return up(self.widths[level + 1], self.widths[level], self.sizes[level + 1], self.sizes[level])

    def write(self, num_params: int) -> list[nn.Module]:
        return [*self.norm(self.widths[0]), ToPixels(self.widths[0], num_params, self.sizes[0], self.image_size)]


class DenseBlock(nn.Module):
    """x + linear(f(linear(f(norm(x))) + label)), `(N, num_in) -> (N, num_out)`.

    Around it goes a linear layer where these differ.
    """

    def __init__(self, num_in: int, num_out: int, *, activation: str, dropout: float, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, num_in)
        self.linear1 = with_gain(nn.Linear(num_in, num_out), GAINS[activation])
        self.label = LabelEmbedding(num_classes, num_out) if num_classes else None
        self.dropout = Dropout(dropout, num_out) if dropout else nn.Identity()
        self.linear2 = with_gain(nn.Linear(num_out, num_out), RESIDUAL_GAIN)
        self.around = nn.Identity() if num_in == num_out else with_gain(nn.Linear(num_in, num_out), 1.0)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.linear1(self.activation(self.norm(x)))
        if self.label is not None and condition is not None:
            h = h + self.label(condition, h.ndim)
        return self.around(x) + self.linear2(self.dropout(self.activation(h)))


def norm_groups(width: int) -> int:
    """Groups of channels that are normalised together; they divide `width`."""
    return math.gcd(width, max(1, width // CHANNELS_PER_NORM))
