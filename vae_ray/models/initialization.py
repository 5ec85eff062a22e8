"""Where training starts: the weights of a new VAE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vae_ray.models.networks.base import weighted_layers
from vae_ray.models.vae import VAE

POSTERIOR_GAIN = 0.5
OUTPUT_GAIN = 0.1


@torch.no_grad()
def he_at_the_mean_image(model: VAE, mean_image: Tensor, generator: torch.Generator) -> None:
    """He et al. 2015 (arXiv:1502.01852, eq. 10) for layers before a ReLU; outputs start small around the mean image.

    torch's default shrinks a signal by sqrt(6) a layer, and with it what the decoder learns of z: the first
    epochs go into undoing that. A decoder that starts at the mean image need not learn it either.
    """
    output, posteriors = model.network.output_layer(), model.network.posterior_layers()
    for layer in weighted_layers(model.network):
        is_posterior = any(layer is each for each in posteriors)
        default = POSTERIOR_GAIN if is_posterior else math.sqrt(2.0)
        gain = OUTPUT_GAIN if layer is output else getattr(layer, "initial_gain", default)
        fan_in, _ = fans(layer)
        _draw(layer, gain / math.sqrt(fan_in), generator)
    start_at_mean_image(model, mean_image)


@torch.no_grad()
def glorot_at_the_mean_image(model: VAE, mean_image: Tensor, generator: torch.Generator) -> None:
    """Glorot & Bengio 2010 (eq. 16), uniform, for layers before a tanh; the output's bias is the mean image's."""
    for layer in weighted_layers(model.network):
        limit = math.sqrt(6.0 / sum(fans(layer)))
        layer.weight.uniform_(-limit, limit, generator=generator)  # type: ignore[operator]
        if isinstance(layer.bias, Tensor):
            layer.bias.zero_()
    start_at_mean_image(model, mean_image)


def fans(layer: nn.Module) -> tuple[int, int]:
    """Numbers of inputs that an output of the layer sums over, and of outputs that an input goes into."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    kernel = weight[0, 0].numel()
    # a kernel that moves by its stride meets a pixel of the larger image only so often
    met = max(1, kernel // math.prod(getattr(layer, "stride", (1,))))
    # torch's layout: (out, in, ...), of a transposed convolution (in, out, ...)
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.shape[0] * met, weight.shape[1] * kernel
    return weight.shape[1] * kernel, weight.shape[0] * met


def _draw(layer: nn.Module, std: float, generator: torch.Generator) -> None:
    layer.weight.normal_(0.0, std, generator=generator)  # type: ignore[operator]
    if isinstance(layer.bias, Tensor):
        layer.bias.zero_()


def start_at_mean_image(model: VAE, mean_image: Tensor) -> None:
    """Set the bias of the decoder's last layer to the parameters of the mean image."""
    bias, output = model.likelihood.initial_bias(mean_image), model.network.output_layer()
    target = getattr(output, "bias", None)
    if isinstance(target, Tensor):
        # a convolution has a bias for each channel, other layers one for each pixel
        target.copy_(bias.reshape(target.shape) if target.numel() == bias.numel() else bias.flatten(1).mean(1))


INITIALIZATIONS: dict[str, Callable[[VAE, Tensor, torch.Generator], None] | None] = {
    # each is given a new model, the mean training image (C, H, W) in [0, 1] and a generator; None keeps torch's own
    "torch": None,
    "he": he_at_the_mean_image,
    "glorot": glorot_at_the_mean_image,
}
