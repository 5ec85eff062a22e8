"""Strided convolutions as encoder, and their mirror image as decoder; a flat latent.

Each stage halves the image, but not a side of less than 4: images of any size fit. Dense layers stand between the
smallest feature map and the latent.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from vae_ray.models.dropout import Dropout
from vae_ray.models.networks.base import with_gain
from vae_ray.models.networks.blocks import GAINS, LabelEmbedding, Sequence, ToPixels, down, sizes_of, up
from vae_ray.models.networks.layout import ImageLayout
from vae_ray.models.networks.mlp import ACTIVATIONS


class Stage(nn.Module):
    """A layer of `width` outputs, the embedding of a label, an activation and dropout."""

    def __init__(self, layer: nn.Module, width: int, *, activation: str, dropout: float, num_classes: int) -> None:
        super().__init__()
        self.layer, self.activation = layer, ACTIVATIONS[activation]()
        self.label = LabelEmbedding(num_classes, width) if num_classes else None
        self.dropout = Dropout(dropout, width) if dropout else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.layer(x)
        if self.label is not None and condition is not None:
            h = h + self.label(condition, h.ndim)
        return self.dropout(self.activation(h))


def conv(
    *,
    image_shape: tuple[int, int, int],
    latent_dim: int,
    num_params: int,
    num_classes: int = 0,
    channels: tuple[int, ...] = (32, 64, 128),
    hidden: tuple[int, ...] = (256,),
    activation: str = "relu",
    dropout: float = 0.0,
) -> tuple[nn.Module, nn.Module]:
    """An encoder `(N, C, H, W) -> (N, 2 * latent_dim)` and a decoder `(N, latent_dim) -> (N, num_params, H, W)`."""
    gain = GAINS[activation]

    def stage(layer: nn.Module, width: int) -> Stage:
        return Stage(layer, width, activation=activation, dropout=dropout, num_classes=num_classes)

    def dense(widths: list[int]) -> list[Stage]:
        return [stage(with_gain(nn.Linear(n, m), gain), m) for n, m in pairwise(widths)]

    sizes = sizes_of(image_shape[1:], len(channels))
    widths = [image_shape[0], *channels]
    smallest = (widths[-1], *sizes[-1])
    encoder = [
        stage(down(widths[i], widths[i + 1], sizes[i], sizes[i + 1], gain=gain), widths[i + 1])
        for i in range(len(channels))
    ]
    decoder = [
        stage(up(widths[i + 1], widths[i], sizes[i + 1], sizes[i], gain=gain), widths[i])
        for i in reversed(range(1, len(channels)))
    ]
    inwards, outwards = [math.prod(smallest), *hidden], [latent_dim, *reversed(hidden), math.prod(smallest)]
    return (
        Sequence(ImageLayout(), *encoder, nn.Flatten(), *dense(inwards), nn.Linear(inwards[-1], 2 * latent_dim)),
        Sequence(
            *dense(outwards),
            nn.Unflatten(1, smallest),
            ImageLayout(),
            *decoder,
            ToPixels(widths[1], num_params, sizes[1], sizes[0]),
        ),
    )
