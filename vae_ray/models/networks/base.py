"""What a network is: from an image to the posterior of each latent group, and from z to the likelihood's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from vae_ray.models.latents import DiagonalGaussian, Distribution, Group, gaussian_from

Features = tuple[Tensor, ...]
"""What the encoder hands to the decoder's pass: tensors whose first dimension is the images'."""
Choose = Callable[[int, Distribution | None, Distribution], Tensor]
"""`choose(group, posterior, prior) -> z`: the one place where z is picked; `(N, *shape)`."""


class Network(nn.Module):
    """Base of all networks. N is the number of rows: images, or images times samples."""

    latent_shapes: tuple[tuple[int, ...], ...]
    """Shape of each group, the top group first."""

    def bottom_up(self, x: Tensor, condition: Tensor | None = None) -> Features:
        """Features of the images `(N, C, H, W)`; computed once per image, however many samples follow.

        `condition` `(N, num_classes)` is the one-hot label of each image in a conditional VAE.
        """
        raise NotImplementedError

    def top_down(
        self, features: Features | None, choose: Choose, prior: Distribution, condition: Tensor | None = None
    ) -> tuple[Tensor, tuple[Group, ...]]:
        """Parameters of the likelihood `(N, P, H, W)` and the groups, top first.

        Without `features` there are no posteriors. `prior` is that of the top group, for N rows; priors of lower groups
        are the network's own.
        """
        raise NotImplementedError

    def posterior_layers(self) -> list[nn.Module]:
        """The layers that end in the mean and log variance of a posterior; `initialization: he` starts them small."""
        return []

    def output_layer(self) -> nn.Module | None:
        """The layer that ends in the likelihood's parameters; `initialization: he` starts it at the mean image."""
        return None


class EncoderDecoder(Network):
    """A plain pair as a network with one group.

    `encoder`: `(N, C, H, W) -> (N, 2 * latent_dim)`, mean and log variance side by side.
    `decoder`: `(N, latent_dim) -> (N, P, H, W)`.
    In a conditional VAE both take the one-hot label `(N, num_classes)` as a second argument. Of a spatial latent
    `(c, h, w)` the encoder gives `(N, 2 * c, h, w)`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shapes = (latent_shape,)
        self.encoder, self.decoder = encoder, decoder

    def bottom_up(self, x: Tensor, condition: Tensor | None = None) -> Features:
        return (at_least_float32(self.encoder(*_given(x, condition))),)

    def top_down(
        self, features: Features | None, choose: Choose, prior: Distribution, condition: Tensor | None = None
    ) -> tuple[Tensor, tuple[Group, ...]]:
        posterior: DiagonalGaussian | None = None if features is None else gaussian_from(features[0])
        z = choose(0, posterior, prior)
        return at_least_float32(self.decoder(*_given(z, condition))), (Group(z, posterior, prior),)

    def posterior_layers(self) -> list[nn.Module]:
        return weighted_layers(self.encoder)[-1:]

    def output_layer(self) -> nn.Module | None:
        return next(reversed(weighted_layers(self.decoder)), None)


def _given(x: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if condition is None else (x, condition)


class NetworkFactory(Protocol):
    """What builds a network: an `(encoder, decoder)` pair, or a `Network`."""

    def __call__(
        self, *, image_shape: tuple[int, int, int], latent_dim: int, num_params: int
    ) -> tuple[nn.Module, nn.Module] | Network:
        """`num_params` is the number of the likelihood's parameters for each pixel.

        A factory that builds conditional networks has a keyword `num_classes` as well, 0 without a condition.
        """
        ...


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 as it is; also under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def weighted_layers(module: nn.Module) -> list[nn.Module]:
    """The linear and convolutional layers inside `module`, in order."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    return [layer for layer in module.modules() if isinstance(layer, kinds)]


def random_parameter(*shape: int, std: float = 1.0) -> nn.Parameter:
    """Of mean 0 and standard deviation `std`; uniform, because a normal on the meta device imports torch's compiler."""
    return nn.Parameter(torch.empty(shape).uniform_(-math.sqrt(3) * std, math.sqrt(3) * std))


def with_gain(layer: nn.Module, gain: float) -> nn.Module:
    """`layer` with the gain that `initialization: he` gives it, sqrt(2) otherwise: its output's rms for inputs of 1."""
    layer.initial_gain = gain  # type: ignore[assignment]
    return layer
