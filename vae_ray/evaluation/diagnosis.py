"""What is badly wrong with a trained model although its training ended well, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.config.sections.objectives import BetaTcObjective, ElboObjective
from vae_ray.models.latents import Group
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

    The rate counts as it did in the loss, where that is less than 1: an autoencoder's (beta 0) is not held against it.

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
    weight, free = rate_weight(experiment), free_nats(experiment, output.groups)
    largest = max(float(rate_by_channel(group).mean(0).max()) for group in output.groups)
    if largest < INFORMATIVE_NATS:  # and so about as good as the mean image
        return [
            f"no latent dimension carries information (posterior collapse): the largest rate of one is {largest:.2g} "
            f"nats per image, should be {INFORMATIVE_NATS} or more; try {_against_collapse(experiment)}"
        ]
    nats, baseline = distortion + weight * max(0.0, rate - free), mean_image_nats(model, x, mean_image)
    if baseline is not None and not nats < baseline:
        terms = ["distortion"]
        if weight:
            terms += [" ".join([f"{weight:g}"] * (weight < 1) + [f"(rate - {free:g})" if free else "rate"])]
        name = "nelbo" if weight == 1 and not free else " + ".join(terms)
        return [
            f"the model is not better than the mean training image in place of every image: {name} {nats:.5g} against "
            f"{baseline:.5g} nats, over {len(x)} test images; try {_against_no_learning(experiment)}"
        ]
    return []


def rate_weight(experiment: Experiment) -> float:
    """What a nat of the rate costs at the end of training, where one of the distortion costs 1; at most 1.

    0 with geco: its rate is whatever the target takes.
    """
    objective = experiment.objective
    if objective.name == "geco":
        return 0.0
    settings = build_objective(objective).settings(float(experiment.training.epochs), LAST_STEP)
    parts = (objective.alpha, objective.gamma) if isinstance(objective, BetaTcObjective) else ()
    return min(1.0, settings.get("beta", 1.0), *parts)


def free_nats(experiment: Experiment, groups: Sequence[Group]) -> float:
    """Nats of the rate that cost nothing in the loss: the capacity, or the free bits of all groups or dimensions."""
    objective = experiment.objective
    if not isinstance(objective, ElboObjective):
        return 0.0
    per_group = objective.free_bits_per == "group"
    num = sum(1 if per_group else group.z.shape[1] for group in groups)  # of a spatial group its channels
    settings = build_objective(objective).settings(float(experiment.training.epochs), LAST_STEP)
    return settings.get("capacity", objective.free_bits * num)


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
    scale = flat.get("likelihood.scale") or 0.0
    has_fixed_scale = flat.get("likelihood.sigma", "fixed") == "fixed"
    if optim.weight_decay > 0.01 and optim.optimizer == "adam":
        return f"a smaller --optim.weight-decay than {optim.weight_decay:g}"
    urgent, mild = _of_the_objective(flat)
    if urgent is not None:
        return urgent
    if scale > 0.2 and has_fixed_scale:
        return f"a smaller --likelihood.scale than {scale:g}"
    if optim.lr > 0.005:
        return f"a smaller --optim.lr than {optim.lr:g}"
    return mild


def _of_the_objective(flat: Mapping[str, Any]) -> tuple[str | None, str]:
    """What of the objective's settings helps against collapse: what comes first, if anything, and what comes last."""
    of = {key.removeprefix("objective."): value for key, value in flat.items() if key.startswith("objective.")}
    otherwise = "more --training.epochs"
    if of["name"] == "geco":
        return f"a smaller --objective.target than {of['target']:g}", otherwise
    if (capacity := of.get("capacity")) is not None:  # the rate is drawn up to it, by beta
        larger = f"a larger --objective.beta than {of['beta']:g}"
        return (f"a larger --objective.capacity than {capacity:g}" if capacity < 1 else None), larger
    if free_bits := of.get("free_bits"):  # below them beta does not count
        return (f"a larger --objective.free-bits than {free_bits:g}" if free_bits < 1 else None), otherwise
    weights = {key: of.get(key) or 0.0 for key in ("beta", "alpha", "gamma")}
    key = max(weights, key=weights.__getitem__)
    smaller = f"a smaller --objective.{key} than {weights[key]:g}"
    return (smaller if weights[key] > 1 else None), (smaller if weights[key] else otherwise)


def mean_image_nats(model: VAE, x: Tensor, mean_image: Tensor) -> float | None:
    """The distortion of a decoder that gives `mean_image` whatever z is; None where its parameters are not known."""
    params = model.likelihood.initial_bias(mean_image.to(x))
    if len(params) != model.likelihood.num_params(x.shape[1]):  # a user's likelihood without an `initial_bias`
        return None
    return float(-model.likelihood.log_prob(params.expand(len(x), *params.shape), x).mean())
