"""A fully connected encoder and its mirror image as decoder, for images of any shape."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn


def fully_connected(widths: list[int]) -> list[nn.Module]:
    """Linear layers of these widths with ReLUs between them; the last layer is linear."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.ReLU(inplace=True)]
    return layers[:-1]


def mlp(
    *, image_shape: tuple[int, int, int], latent_dim: int, num_params: int, hidden: tuple[int, ...] = (400, 100)
) -> tuple[nn.Module, nn.Module]:
    """An encoder `(N, C, H, W) -> (N, 2 * latent_dim)` and a decoder `(N, latent_dim) -> (N, num_params, H, W)`.

    The encoder's output is mean and log variance side by side: one product instead of two for the same affine maps.
    """
    num_pixels = math.prod(image_shape)
    params_shape = (num_params, *image_shape[1:])
    encoder = nn.Sequential(nn.Flatten(), *fully_connected([num_pixels, *hidden, 2 * latent_dim]))
    decoder = nn.Sequential(
        *fully_connected([latent_dim, *reversed(hidden), math.prod(params_shape)]), nn.Unflatten(1, params_shape)
    )
    return encoder, decoder
