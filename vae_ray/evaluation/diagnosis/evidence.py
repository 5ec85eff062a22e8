"""What a diagnosis is made of: what the model says about training and test images, and the history of its run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.data.batches import Loader
from vae_ray.evaluation import latent_space, observations
from vae_ray.evaluation.diagnosis.failures import Cost, last_settings, nats_of_mean_image
from vae_ray.evaluation.diagnosis.two_samples import separation
from vae_ray.evaluation.observations import Arrays, EvaluationBatch, Observer
from vae_ray.models.latents import LOGVAR_RANGE, DiagonalGaussian, Distribution, Group
from vae_ray.models.noise import latent_noise, num_elements
from vae_ray.models.traversal import join_groups
from vae_ray.models.vae import VAE
from vae_ray.objectives import build_objective
from vae_ray.run_files.run_directory import RunDirectory

MOST_IMAGES = 2000
"""Of each split; from all over it."""
MOST_NUMBERS = 8_000_000
"""Pixels of these images, whose reconstructions are in memory together; of large images fewer are observed."""
FEWEST_IMAGES = 200


class Curve(NamedTuple):
    """The cost of a split over epochs."""

    name: str
    """As in "val nelbo"."""
    epochs: list[int]
    nats: NDArray[np.floating]
    """One value an epoch."""
    scale: float
    """What a change is compared with: what the model gains over the mean image or, where that is unknown, the range."""


@dataclass(frozen=True)
class Evidence:
    """What was observed. Arrays have a row for each image."""

    experiment: Experiment
    model: VAE
    train: Arrays
    """Of training images, as evaluation sees them."""
    test: Arrays
    history: Sequence[Mapping[str, Any]]
    """The records of the run's epochs; may be empty."""
    num_equal: int
    """Test images that are among the training images, to the pixel."""
    num_test: int
    """All test images."""

    @cached_property
    def cost(self) -> Cost:
        return Cost.of(self.experiment, self.model.latent_shapes)

    def nats(self, arrays: Arrays) -> float:
        """The mean cost of the images, with the rate as it counted in the loss."""
        return self.cost(_mean(arrays["distortion"]), _mean(arrays["rate"]))

    def gain(self, arrays: Arrays) -> float | None:
        """Nats by which the model is better than the mean training image; None where those of the image are unknown."""
        return _mean(arrays["baseline"]) - self.nats(arrays) if "baseline" in arrays else None

    @cached_property
    def baseline(self) -> float | None:
        """Nats of the mean training image in place of every test image; None where they are not known."""
        return _mean(self.test["baseline"]) if "baseline" in self.test else None

    @cached_property
    def rates(self) -> NDArray[np.floating]:
        """The mean rate of each latent dimension, or channel, in nats over test images; all groups side by side."""
        sizes = [shape[0] for shape in self.model.latent_shapes]
        return np.array(latent_space.rates(self.test, group_sizes=sizes).details["rate_by_dimension"])

    @cached_property
    def explained(self) -> float:
        """The part of the variance of training images that reconstructions explain, 1 - MSE / variance; at most 1."""
        return 1 - _mean(self.train["squared_error"]) / max(_mean(self.train["variance"]), 1e-12)

    def curve(self, split: str) -> Curve:
        """The cost after each epoch; of epochs with the last settings of the objective alone.

        While beta or the capacity change, curves rise and fall by themselves.
        """
        settings = last_settings(self.experiment)
        changing = [
            number
            for number, record in enumerate(self.history)
            if any(not math.isclose(record.get(name, value), value) for name, value in settings.items())
        ]
        name, terms = f"{split} {self.cost.name}", ["distortion", "rate"]
        if build_objective(self.experiment.objective).num_samples > 1:  # nelbo is not what such an objective lowers
            name, terms = f"{split} loss", ["loss"]
        kept = self.history[max(changing, default=-1) + 1 :]
        rows = {r["epoch"]: [r[f"{split}/{term}"] for term in terms] for r in kept if f"{split}/{terms[0]}" in r}
        nats = np.array([self.cost(*row) if len(row) > 1 else row[0] for row in rows.values()], dtype=float)
        gain, spread = self.gain(self.train if split == "train" else self.test), float(np.ptp(nats)) if rows else 0.0
        return Curve(name, list(rows), nats, spread if gain is None else max(0.0, gain))

    @cached_property
    def watched(self) -> Curve:
        """The curve of validation images; without them of test images, else of training."""
        curves = [self.curve(split) for split in ("val", "test", "train")]
        return max(curves, key=lambda curve: len(curve.epochs))  # of equal ones the first

    @cached_property
    def separation(self) -> float:
        """How well z of training images can be told from z of the prior, from 0.5 (not at all) to 1."""
        return separation(self.train["prior_z"], self.train["z"])


def history_of(run: str) -> list[dict[str, Any]]:
    """The records of the epochs of the run at a path or URI; none of a sweep, whose trials have them."""
    directory = RunDirectory.at(run, role="reader")
    with directory.working_copy():
        return directory.records.history()


def gather(
    model: VAE,
    experiment: Experiment,
    *,
    train: Loader,
    test: Loader,
    mean_image: Tensor,
    history: Sequence[Mapping[str, Any]],
) -> Evidence:
    """The evidence of a model, by at most `MOST_IMAGES` images of each split."""
    training, precision = experiment.training, experiment.training.precision
    common: list[Observer] = [observations.elbo, observations.rates, AgainstMeanImage(mean_image)]
    num_equal = int(np.isin(_digests(test), _digests(train)).sum())

    def observed(loader: Loader, observers: Sequence[Observer]) -> Arrays:
        num = min(MOST_IMAGES, max(FEWEST_IMAGES, MOST_NUMBERS // num_elements((model.image_shape,))))
        few = copy.copy(loader)
        few.indices = loader.spread(num)
        rows = observations.pieces(len(few.indices), training.evaluation_batch_size)
        return observations.joined([observations.observe(model, few, r, observers, precision=precision) for r in rows])

    return Evidence(
        experiment,
        model,
        train=observed(train, [*common, logvar_ends, samples, pixels]),
        test=observed(test, common),
        history=history,
        num_equal=num_equal,
        num_test=len(test.indices),
    )


def _digests(loader: Loader) -> NDArray[np.int64]:
    return loader.split.digests[loader.indices].numpy()


@dataclass(frozen=True)
class AgainstMeanImage:
    """Observes how far images are from their reconstructions, and from the mean training image `(C, H, W)`."""

    mean_image: Tensor

    def __call__(self, batch: EvaluationBatch) -> dict[str, Tensor]:
        """`(n,)` each: `squared_error` and `variance`, summed over pixels, and `baseline`, the nats of the mean image.

        The last one only where its parameters are known.
        """
        model, x = batch.model, batch.x
        reconstructions = model.likelihood.mean(batch.at_means[0])
        found = {
            "squared_error": (x - reconstructions).square().flatten(1).sum(1),
            "variance": (x - self.mean_image.to(x)).square().flatten(1).sum(1),
        }
        nats = nats_of_mean_image(model, x, self.mean_image)
        return found if nats is None else {**found, "baseline": nats}


def logvar_ends(batch: EvaluationBatch) -> dict[str, Tensor]:
    """`logvar_low` and `logvar_high` `(n, d)`: the part of each dimension, or channel, that is out of `LOGVAR_RANGE`.

    The network's own log variance counts: of a posterior that is computed from its prior the difference.
    """
    low, high = LOGVAR_RANGE
    logvars = [_own_logvar(group) for group in batch.output.groups]
    ends = {"logvar_low": [each < low for each in logvars], "logvar_high": [each > high for each in logvars]}
    return {
        name: torch.cat([each.float().unsqueeze(-1).flatten(2).mean(2) for each in parts], dim=1)
        for name, parts in ends.items()
    }


def _own_logvar(group: Group) -> Tensor:
    """`(n, *shape)`; zeros of another posterior than a diagonal Gaussian."""
    posterior = group.posterior
    if not isinstance(posterior, DiagonalGaussian):
        return torch.zeros_like(group.z)
    return posterior.logvar if posterior.residual is None else posterior.residual.logvar


def samples(batch: EvaluationBatch) -> dict[str, Tensor]:
    """`z` ~ q(z|x) and `prior_z` ~ p(z), one beside each image, of all groups: `(n, dimensions)` each."""
    model = batch.model
    noise = latent_noise(model.latent_shapes, batch.rows, batch.seed, "diagnosis", device=batch.x.device)

    def sample(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
        return prior.rsample(noise[group])

    _, groups = model.top_down(None, sample, len(batch.x), batch.condition)
    return {
        name: join_groups(tuple(g.z for g in each)) for name, each in (("z", batch.output.groups), ("prior_z", groups))
    }


def pixels(batch: EvaluationBatch) -> dict[str, Tensor]:
    """`image` and `reconstruction`, `(n, pixels)` each."""
    reconstructions = batch.model.likelihood.mean(batch.at_means[0])
    return {"image": batch.x.flatten(1), "reconstruction": reconstructions.flatten(1)}


def _mean(values: NDArray[np.floating]) -> float:
    return float(values.astype(np.float64).mean())
