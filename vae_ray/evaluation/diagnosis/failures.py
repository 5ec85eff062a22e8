"""What is badly wrong with a trained model although its training ended well, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.config.sections.objectives import BetaTcObjective, ElboObjective
from vae_ray.models.noise import Shapes, latent_noise
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
    largest = max(float(rate_by_channel(group).mean(0).max()) for group in output.groups)
    cost, baseline = Cost.of(experiment, model.latent_shapes), mean_image_nats(model, x, mean_image)
    finding = collapse(largest, experiment) or no_learning(
        cost(distortion, rate), baseline, cost=cost, num_images=len(x), experiment=experiment
    )
    return [] if finding is None else [str(finding)]


class Finding(NamedTuple):
    """Something that is wrong with a model, and what to do about it."""

    evidence: str
    """What is wrong, with the numbers that show it."""
    remedy: str
    """One thing to try, with its flag and value."""
    is_problem: bool = True
    """False: worth knowing, nothing to be changed."""

    def __str__(self) -> str:
        return f"{self.evidence}; try {self.remedy}"


class Cost(NamedTuple):
    """What a pass costs in the loss at the end of training: distortion + weight * max(0, rate - free), in nats."""

    weight: float
    """Of the rate, at most 1; 0 with geco, whose rate is whatever the target takes."""
    free: float
    """Nats of the rate that cost nothing: the capacity, or the free bits of all groups or dimensions."""

    @classmethod
    def of(cls, experiment: Experiment, latent_shapes: Shapes) -> Cost:
        """That of an experiment's objective after all schedules."""
        objective, settings = experiment.objective, last_settings(experiment)
        parts = (objective.alpha, objective.gamma) if isinstance(objective, BetaTcObjective) else ()
        weight = 0.0 if objective.name == "geco" else min(1.0, settings.get("beta", 1.0), *parts)
        if not isinstance(objective, ElboObjective):
            return cls(weight, 0.0)
        per_group = objective.free_bits_per == "group"
        num = sum(1 if per_group else shape[0] for shape in latent_shapes)  # of a spatial group its channels
        return cls(weight, settings.get("capacity", objective.free_bits * num))

    def __call__(self, distortion: float, rate: float) -> float:
        return distortion + self.weight * max(0.0, rate - self.free)

    @property
    def name(self) -> str:
        terms = ["distortion"]
        if self.weight:
            rate = f"(rate - {self.free:g})" if self.free else "rate"
            terms += [" ".join([f"{self.weight:g}"] * (self.weight < 1) + [rate])]
        return "nelbo" if self.weight == 1 and not self.free else " + ".join(terms)


def last_settings(experiment: Experiment) -> dict[str, float]:
    """The scheduled values of the objective at the end of training."""
    return build_objective(experiment.objective).settings(float(experiment.training.epochs), LAST_STEP)


def collapse(largest: float, experiment: Experiment) -> Finding | None:
    """The whole posterior is the prior: the `largest` mean rate of a dimension, or channel, is below 0.01 nats."""
    if largest >= INFORMATIVE_NATS:
        return None
    evidence = (
        f"no latent dimension carries information (posterior collapse): the largest rate of one is {largest:.2g} "
        f"nats per image, should be {INFORMATIVE_NATS} or more"
    )
    return Finding(evidence, _against_collapse(experiment))


def no_learning(
    nats: float, baseline: float | None, *, cost: Cost, num_images: int, experiment: Experiment
) -> Finding | None:
    """The model costs no less than the mean training image in place of every image (None: not known)."""
    if baseline is None or nats < baseline:
        return None
    evidence = (
        f"the model is not better than the mean training image in place of every image: {cost.name} {nats:.5g} against "
        f"{baseline:.5g} nats, over {num_images} test images"
    )
    return Finding(evidence, _against_no_learning(experiment))


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
    """The mean over images of `nats_of_mean_image`."""
    nats = nats_of_mean_image(model, x, mean_image)
    return None if nats is None else float(nats.mean())


def nats_of_mean_image(model: VAE, x: Tensor, mean_image: Tensor) -> Tensor | None:
    """The distortion `(N,)` of a decoder that gives `mean_image` whatever z is; None if those are not known."""
    params = model.likelihood.initial_bias(mean_image.to(x))
    if len(params) != model.likelihood.num_params(x.shape[1]):  # a user's likelihood without an `initial_bias`
        return None
    return -model.likelihood.log_prob(params.expand(len(x), *params.shape), x)
