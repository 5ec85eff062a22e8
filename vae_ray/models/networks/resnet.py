"""Residual blocks with GroupNorm as encoder, and their mirror image as decoder; a flat or a spatial latent.

He et al. 2016 (arXiv:1603.05027), Wu & He 2018 (arXiv:1803.08494). A strided convolution leads to each stage, which is
a number of blocks at one size. A side of less than 4 is not halved: images of any size fit.
"""

from __future__ import annotations

import math

from torch import nn

from vae_ray.models.networks.base import EncoderDecoder, with_gain
from vae_ray.models.networks.blocks import (
    ResidualBlock,
    SelfAttention,
    Sequence,
    ToPixels,
    down,
    sizes_of,
    up,
)
from vae_ray.models.networks.layout import ImageLayout
from vae_ray.models.networks.mlp import ACTIVATIONS


def resnet(
    *,
    image_shape: tuple[int, int, int],
    latent_dim: int,
    num_params: int,
    num_classes: int = 0,
    channels: tuple[int, ...] = (32, 64, 128),
    blocks: int = 2,
    groups: int = 8,
    attention: bool = False,
    latent: str = "flat",
    activation: str = "silu",
    dropout: float = 0.0,
) -> EncoderDecoder:
    """A flat latent has shape `(latent_dim,)`, a spatial one `(latent_dim, h, w)` of the smallest feature map.

    `groups` divides every number of channels.
    """
    sizes = sizes_of(image_shape[1:], len(channels))
    widths = [image_shape[0], *channels]
    smallest = (widths[-1], *sizes[-1])

    def stage(width: int) -> list[nn.Module]:
        options = {"groups": groups, "activation": activation, "dropout": dropout, "num_classes": num_classes}
        return [ResidualBlock(width, **options) for _ in range(blocks)]  # type: ignore[arg-type]

    def normalized(width: int) -> list[nn.Module]:
        return [nn.GroupNorm(groups, width), ACTIVATIONS[activation]()]

    encoder: list[nn.Module] = [ImageLayout()]
    decoder: list[nn.Module] = []
    for i, width in enumerate(channels):
        encoder += [down(widths[i], width, sizes[i], sizes[i + 1]), *stage(width)]
    for i in reversed(range(len(channels))):
        decoder += stage(widths[i + 1])
        if i > 0:
            decoder.append(up(widths[i + 1], widths[i], sizes[i + 1], sizes[i]))
    if attention:
        encoder.append(SelfAttention(widths[-1], groups=groups))
        decoder.insert(0, SelfAttention(widths[-1], groups=groups))
    encoder += normalized(widths[-1])
    decoder += [*normalized(widths[1]), ToPixels(widths[1], num_params, sizes[1], sizes[0])]
    if latent == "spatial":
        shape: tuple[int, ...] = (latent_dim, *sizes[-1])
        encoder.append(nn.Conv2d(widths[-1], 2 * latent_dim, 1))
        decoder[:0] = [ImageLayout(), with_gain(nn.Conv2d(latent_dim, widths[-1], 1), 1.0)]
    else:
        shape = (latent_dim,)
        encoder += [nn.Flatten(), nn.Linear(math.prod(smallest), 2 * latent_dim)]
        expand = with_gain(nn.Linear(latent_dim, math.prod(smallest)), 1.0)
        decoder[:0] = [expand, nn.Unflatten(1, smallest), ImageLayout()]
    return EncoderDecoder(Sequence(*encoder), Sequence(*decoder), shape)
