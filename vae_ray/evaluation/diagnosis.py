"""What is badly wrong with a trained model although its training ended well, in plain words."""

from __future__ import annotations

import torch
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.models.noise import latent_noise
from vae_ray.models.traversal import elementwise_rate
from vae_ray.models.vae import VAE
from vae_ray.objectives.base import elbo_terms

NUM_IMAGES = 256
"""Test images by which a model is judged: enough to see a failure."""
INFORMATIVE_NATS = 0.01
"""The rate from which on a latent dimension counts as carrying information."""
TOLERANCE = 0.1
"""How much of its own size the nelbo of the mean image may be exceeded by."""


@torch.inference_mode()
def find_failures(model: VAE, x: Tensor, mean_image: Tensor, experiment: Experiment) -> list[str]:
    """A line for each: nats that are worse than those of the mean image, and no informative latent dimension.

    Args:
        model: the trained model.
        x: images that it was not trained with, `(N, C, H, W)` in [0, 1].
        mean_image: of the training images, `(C, H, W)`.
        experiment: what was trained.
    """
    model.eval()
    output = model(x, latent_noise(model.latent_shapes, slice(0, len(x)), 0, "diagnosis", device=x.device))
    distortion, rate = elbo_terms(output, x, model.likelihood)
    nelbo, baseline = float((distortion + rate).mean()), mean_image_nats(model, x, mean_image)
    failures = []
    if baseline is not None and not nelbo <= baseline + TOLERANCE * abs(baseline):
        failures.append(
            f"the model is worse than predicting the mean training image for every image: nelbo {nelbo:.5g} against "
            f"{baseline:.5g} nats, over {len(x)} test images; try a smaller --optim.lr than {experiment.optim.lr:g}"
        )
    largest = max(float(elementwise_rate(group).mean(0).max()) for group in output.groups)
    if largest < INFORMATIVE_NATS:
        failures.append(
            f"no latent dimension carries information (posterior collapse): the largest rate of one is {largest:.2g} "
            f"nats per image, should be {INFORMATIVE_NATS} or more; try {_against_collapse(experiment)}"
        )
    return failures


def _against_collapse(experiment: Experiment) -> str:
    """What most likely helps a model whose code carries nothing."""
    flat, lr = experiment.flat(), experiment.optim.lr
    beta, scale = (flat.get(key) or 0.0 for key in ("objective.beta", "likelihood.scale"))
    if beta > 1:
        return f"a smaller --objective.beta than {beta:g}"
    if scale > 0.2:
        return f"a smaller --likelihood.scale than {scale:g}"
    if lr > 0.005:
        return f"a smaller --optim.lr than {lr:g}"
    return f"a smaller --objective.beta than {beta:g}" if beta else "more --training.epochs"


def mean_image_nats(model: VAE, x: Tensor, mean_image: Tensor) -> float | None:
    """The distortion of a decoder that gives `mean_image` whatever z is; None where its parameters are not known."""
    params = model.likelihood.initial_bias(mean_image.to(x))
    if len(params) != model.likelihood.num_params(x.shape[1]):  # a user's likelihood without an `initial_bias`
        return None
    return float(-model.likelihood.log_prob(params.expand(len(x), *params.shape), x).mean())
