"""Where training starts: the weights of a new VAE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vae_ray.models.vae import VAE

Initialization = Callable[[VAE, Tensor, torch.Generator], None]

ENCODER_OUTPUT_GAIN = 0.5
DECODER_OUTPUT_GAIN = 0.1


def _keep(model: VAE, mean_image: Tensor, generator: torch.Generator) -> None:
    """What the layers chose for themselves."""


@torch.no_grad()
def _he_at_the_mean_image(model: VAE, mean_image: Tensor, generator: torch.Generator) -> None:
    """He et al. 2015 (arXiv:1502.01852, eq. 10) for layers before a ReLU; outputs start small around the mean image.

    torch's default shrinks a signal by sqrt(6) a layer, and with it what the decoder learns of z: the first
    epochs go into undoing that. A decoder that starts at the mean image need not learn it either.
    """
    for network, output_gain in ((model.encoder, ENCODER_OUTPUT_GAIN), (model.decoder, DECODER_OUTPUT_GAIN)):
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        for layer in layers:
            gain = output_gain if layer is layers[-1] else math.sqrt(2.0)
            layer.weight.normal_(0.0, gain / math.sqrt(layer.in_features), generator=generator)
            layer.bias.zero_()
    # a pixel that is never lit would ask for a logit of -infinity
    layers[-1].bias.copy_(torch.logit(mean_image.flatten(), eps=1e-3))


INITIALIZATIONS: dict[str, Initialization] = {
    # each is given a new model, the mean training image (C, H, W) in [0, 1] and a generator
    "torch": _keep,
    "he": _he_at_the_mean_image,
}
