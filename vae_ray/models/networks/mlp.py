"""A fully connected encoder and its mirror image as decoder, for images of any shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from vae_ray.models.dropout import Dropout

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
    "tanh": nn.Tanh,
}


def fully_connected(widths: list[int], activation: str = "relu", dropout: float = 0.0) -> list[nn.Module]:
    """Linear layers of these widths with activations, and dropout, between them; the last layer is linear."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths[:-1]):
        layers += [nn.Linear(num_in, num_out), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(Dropout(dropout, num_out))
    return [*layers, nn.Linear(widths[-2], widths[-1])]


class WithLabel(nn.Sequential):
    """Layers whose input is flattened; a one-hot label `(N, num_classes)` stands beside it."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = x.flatten(1)
        result: Tensor = super().forward(x if condition is None else torch.cat([x, condition.to(x)], dim=1))
        return result


def mlp(
    *,
    image_shape: tuple[int, int, int],
    latent_dim: int,
    num_params: int,
    num_classes: int = 0,
    hidden: tuple[int, ...] = (400, 100),
    activation: str = "relu",
    dropout: float = 0.0,
) -> tuple[nn.Module, nn.Module]:
    """An encoder `(N, C, H, W) -> (N, 2 * latent_dim)` and a decoder `(N, latent_dim) -> (N, num_params, H, W)`.

    The encoder's output is mean and log variance side by side: one product instead of two for the same affine maps.
    """
    num_pixels = math.prod(image_shape)
    params_shape = (num_params, *image_shape[1:])
    inwards = [num_pixels + num_classes, *hidden, 2 * latent_dim]
    outwards = [latent_dim + num_classes, *reversed(hidden), math.prod(params_shape)]
    encoder = WithLabel(nn.Identity(), *fully_connected(inwards, activation, dropout))
    decoder = WithLabel(*fully_connected(outwards, activation, dropout), nn.Unflatten(1, params_shape))
    return encoder, decoder
