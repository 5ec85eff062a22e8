"""A fully connected encoder and its mirror image as decoder, for images of any shape."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from vae_ray.config.experiment import ModelConfig


def _mlp(widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.ReLU(inplace=True)]
    return layers[:-1]  # the last layer is linear


def mlp(config: ModelConfig, image_shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
    """An encoder `(batch, C, H, W) -> (batch, 2 * latent_dim)` and a decoder `(batch, latent_dim) -> (batch, C, H, W)`.

    The encoder's output is mu and logvar side by side: one product instead of two for the same affine maps.
    """
    num_pixels = math.prod(image_shape)
    encoder = nn.Sequential(nn.Flatten(), *_mlp([num_pixels, *config.hidden, 2 * config.latent_dim]))
    decoder = nn.Sequential(
        *_mlp([config.latent_dim, *reversed(config.hidden), num_pixels]), nn.Unflatten(1, image_shape)
    )
    return encoder, decoder
