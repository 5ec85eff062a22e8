"""What is badly wrong with a trained model although its training ended well, in plain words."""

from __future__ import annotations

import torch
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.models.noise import latent_noise
from vae_ray.models.traversal import rate_by_channel
from vae_ray.models.vae import VAE
from vae_ray.objectives import build_objective
from vae_ray.objectives.base import elbo_terms

NUM_IMAGES = 256
"""Test images by which a model is judged: enough to see a failure."""
LAST_STEP = 2**62
"""By which all schedules have ended."""
INFORMATIVE_NATS = 0.01
"""The rate from which on a latent dimension, or channel of a spatial latent, counts as carrying information."""


@torch.inference_mode()
def find_failures(
    model: VAE, x: Tensor, mean_image: Tensor, experiment: Experiment, condition: Tensor | None = None
) -> list[str]:
    """A line if no latent dimension is informative, or if the nats are not better than those of the mean image.

    The rate counts as it did in the loss, with a beta below 1: an autoencoder's (beta 0) is not held against it.

    Args:
        model: the trained model.
        x: images that it was not trained with, `(N, C, H, W)` in [0, 1].
        mean_image: of the training images, `(C, H, W)`.
        experiment: what was trained.
        condition: of the images, in a conditional VAE, `(N, num_classes)`.
    """
    model.eval()
    noise = latent_noise(model.latent_shapes, slice(0, len(x)), 0, "diagnosis", device=x.device)
    output = model(x, noise, condition=condition)
    distortion, rate = (float(term.mean()) for term in elbo_terms(output, x, model.likelihood))
    settings = build_objective(experiment.objective).settings(float(experiment.training.epochs), LAST_STEP)
    beta = min(1.0, settings.get("beta", 1.0))
    largest = max(float(rate_by_channel(group).mean(0).max()) for group in output.groups)
    if largest < INFORMATIVE_NATS:  # and so about as good as the mean image
        return [
            f"no latent dimension carries information (posterior collapse): the largest rate of one is {largest:.2g} "
            f"nats per image, should be {INFORMATIVE_NATS} or more; try {_against_collapse(experiment)}"
        ]
    nats, baseline = distortion + beta * rate, mean_image_nats(model, x, mean_image)
    if baseline is not None and not nats < baseline:
        name = "nelbo" if beta == 1 else f"distortion + {beta:g} rate"
        return [
            f"the model is not better than the mean training image in place of every image: {name} {nats:.5g} against "
            f"{baseline:.5g} nats, over {len(x)} test images; try {_against_no_learning(experiment)}"
        ]
    return []


def _against_no_learning(experiment: Experiment) -> str:
    """What most likely helps a model that has learned nothing."""
    optim = experiment.optim
    if optim.lr > 0.005:
        return f"a smaller --optim.lr than {optim.lr:g}"
    if optim.lr < 1e-5:
        return f"a larger --optim.lr than {optim.lr:g}"
    if optim.grad_clip is not None and optim.grad_clip < 0.01:
        return f"a larger --optim.grad-clip than {optim.grad_clip:g}"
    if optim.warmup_steps > 1000:
        return f"fewer --optim.warmup-steps than {optim.warmup_steps}, or more --training.epochs"
    return f"more --training.epochs than {experiment.training.epochs}"


def _against_collapse(experiment: Experiment) -> str:
    """What most likely helps a model whose code carries nothing."""
    flat, optim = experiment.flat(), experiment.optim
    beta, scale = (flat.get(key) or 0.0 for key in ("objective.beta", "likelihood.scale"))
    has_fixed_scale = flat.get("likelihood.sigma", "fixed") == "fixed"
    if optim.weight_decay > 0.01 and optim.optimizer == "adam":
        return f"a smaller --optim.weight-decay than {optim.weight_decay:g}"
    if beta > 1:
        return f"a smaller --objective.beta than {beta:g}"
    if scale > 0.2 and has_fixed_scale:
        return f"a smaller --likelihood.scale than {scale:g}"
    if optim.lr > 0.005:
        return f"a smaller --optim.lr than {optim.lr:g}"
    return f"a smaller --objective.beta than {beta:g}" if beta else "more --training.epochs"


def mean_image_nats(model: VAE, x: Tensor, mean_image: Tensor) -> float | None:
    """The distortion of a decoder that gives `mean_image` whatever z is; None where its parameters are not known."""
    params = model.likelihood.initial_bias(mean_image.to(x))
    if len(params) != model.likelihood.num_params(x.shape[1]):  # a user's likelihood without an `initial_bias`
        return None
    return float(-model.likelihood.log_prob(params.expand(len(x), *params.shape), x).mean())
