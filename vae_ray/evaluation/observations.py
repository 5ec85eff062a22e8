"""What a model says about each image of a split: the arrays of which metrics are functions.

Workers observe pieces of the split. Joined in its order they are the same arrays for any number of workers; so every
metric, computed of them in one place, is exact over workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.data.batches import Loader, scaled
from vae_ray.errors import UserError
from vae_ray.evaluation.elbo import autocast
from vae_ray.evaluation.features import FeatureSpace
from vae_ray.evaluation.reconstruction import mean_squared_error, peak_signal_to_noise, structural_similarity
from vae_ray.models.latents import DiagonalGaussian, Group
from vae_ray.models.networks.base import Features
from vae_ray.models.noise import EVALUATION_NOISE, latent_noise
from vae_ray.models.priors import Prior
from vae_ray.models.traversal import by_channel, join_groups, rate_shares
from vae_ray.models.vae import VAE, Output, posterior_mean
from vae_ray.objectives.base import elbo_terms

LABEL = "label:"
"""Begins the names of arrays of labels."""
SMALL_SIDE = 32
"""Pixels."""

Arrays = dict[str, NDArray[Any]]
"""By name, one row an image."""


class EvaluationBatch:
    """Images of one batch, and what the model computes of them, once for all observers."""

    def __init__(self, model: VAE, loader: Loader, rows: slice) -> None:
        indices = loader.indices[rows]
        self.model, self.rows, self.seed = model, rows, loader.seed
        self.x = loader.images(indices)
        """As the model sees them, `(n, C, H, W)`."""
        self.labels = loader.labels(indices)
        """Labels and factors by name, `(n,)`, on the CPU."""
        self.condition = model.condition(self.labels)
        self._pixels = functools.partial(loader.split.gather, indices)

    @cached_property
    def features(self) -> Features:
        """What the encoder computes of the images."""
        return self.model.features(self.x, self.condition)

    @cached_property
    def unchanged(self) -> Tensor:
        """The images without binarization, `(n, C, H, W)` in [0, 1]."""
        return scaled(self._pixels().to(self.x.device))

    @cached_property
    def output(self) -> Output:
        """The pass of one sampled z for each image, by the noise of `evaluate_split`."""
        model = self.model
        noise = latent_noise(model.latent_shapes, self.rows, self.seed, EVALUATION_NOISE, device=self.x.device)
        return model.sampled(self.features, noise, 1, self.condition)

    @cached_property
    def at_means(self) -> tuple[Tensor, tuple[Group, ...]]:
        """Parameters of the likelihood and groups with every z at the posterior mean."""
        return self.model.top_down(self.features, posterior_mean, len(self.x), self.condition)


Progress = Callable[[int, int], None]
"""Called with the number of images so far, and of all."""
Observer = Callable[[EvaluationBatch], Mapping[str, Tensor]]
"""What it says about the n images of a batch: tensors `(n, ...)` by name."""


def no_progress(num_done: int, num_images: int) -> None:
    """Say nothing."""


def elbo(batch: EvaluationBatch) -> dict[str, Tensor]:
    """The terms of the ELBO by one sampled z, in nats: `(n,)` each, and the rate of each group `(n, groups)`."""
    distortion, rate = elbo_terms(batch.output, batch.x, batch.model.likelihood)
    by_group = torch.stack([group.rate() for group in batch.output.groups], dim=1)
    return {"distortion": distortion[0], "rate": rate[0], "rate_by_group": by_group}


def rates(batch: EvaluationBatch) -> dict[str, Tensor]:
    """The share of each latent dimension, or channel, in its group's rate, `(n, d)`, all groups side by side."""
    return {"rate_shares": torch.cat([by_channel(rate_shares(group)) for group in batch.output.groups], dim=1)}


def codes(batch: EvaluationBatch) -> dict[str, Tensor]:
    """Posterior means `(n, dimensions)`, all groups side by side, the top one first."""
    return {"codes": join_groups(tuple(group.z for group in batch.at_means[1]))}


def top_group(batch: EvaluationBatch) -> dict[str, Tensor]:
    """Of the top group, flattened: mean and log variance of q(z|x), a sample z, and log p(z) of it in nats.

    And as many samples of the prior with their log density, one beside each image.
    """
    if batch.condition is not None:
        raise UserError(
            "metrics: aggregated-posterior and disentanglement need one prior for all images, this model is "
            "conditional; leave them out"
        )
    group = batch.output.groups[0]
    posterior, prior, model = group.posterior, group.prior, batch.model
    if not isinstance(posterior, DiagonalGaussian):
        kind = type(posterior).__name__
        raise UserError(f"metrics: aggregated-posterior needs Gaussian posteriors, got {kind}; leave it out")
    noise = latent_noise(model.latent_shapes, batch.rows, batch.seed, "prior samples", device=batch.x.device)
    drawn = prior.rsample(noise[0])
    flat = {"mean": posterior.mean, "logvar": posterior.logvar, "z": group.z, "prior_z": drawn}
    density = {"log_prior": prior.log_prob(group.z), "prior_log_prior": prior.log_prob(drawn)}
    return {**{name: tensor.flatten(1) for name, tensor in flat.items()}, **density}


def labels(batch: EvaluationBatch) -> dict[str, Tensor]:
    """Labels and factors that are whole numbers, `label:NAME` `(n,)`; but that of which a conditional model's codes are
    made.
    """
    names = [name for name, values in batch.labels.items() if not values.is_floating_point()]
    own = batch.model.condition_on
    if not (found := [name for name in names if name != own]):
        reason = f"these have none besides {own!r}, which the encoder is given" if own in names else "these have none"
        raise UserError(f"metrics: representation needs images with labels, {reason}; leave it out")
    return {f"{LABEL}{name}": batch.labels[name] for name in found}


def small_pixels(batch: EvaluationBatch) -> dict[str, Tensor]:
    """The images as vectors `(n, P)` in [0, 1], those with sides above `SMALL_SIDE` averaged over areas to that."""
    height, width = (min(side, SMALL_SIDE) for side in batch.x.shape[2:])
    return {"small_pixels": F.adaptive_avg_pool2d(batch.unchanged, (height, width)).flatten(1)}


def reconstructions(batch: EvaluationBatch) -> dict[str, Tensor]:
    """Errors of reconstructions from the posterior means: `(n,)` each, float64."""
    x, means = batch.x, batch.model.likelihood.mean(batch.at_means[0])
    return {
        "mse": mean_squared_error(x, means),
        "psnr": peak_signal_to_noise(x, means),
        "ssim": structural_similarity(x, means),
    }


def factors(batch: EvaluationBatch) -> dict[str, Tensor]:
    """The factors that are whole numbers, `(n, K)` int64."""
    whole = [values for values in batch.labels.values() if not values.is_floating_point()]
    if len(whole) < 2:
        raise UserError(
            f"metrics: disentanglement needs images with two known factors or more, these have {len(whole)}; leave it "
            "out, or use images that have them, for example --data.source sprites"
        )
    return {"factors": torch.stack(whole, dim=1)}


@dataclass(frozen=True)
class FeaturesOf:
    """Observes the features of images, and of as many that the model generates: `(n, F)` each, float64."""

    space: FeatureSpace
    generates: bool = True

    def __call__(self, batch: EvaluationBatch) -> dict[str, Tensor]:
        """Of images without binarization, and of means of p(x|z): a binary image differs from any mean by its noise."""
        model, images = batch.model, {"features": batch.unchanged}
        if self.generates:
            address = (batch.rows, batch.seed, "generated for metrics")
            noise = latent_noise(model.latent_shapes, *address, device=batch.x.device)
            images["generated_features"] = model.generate(noise, condition=batch.condition)
        return {name: torch.from_numpy(self.space(each)) for name, each in images.items()}


@torch.inference_mode()
def observe(
    model: VAE, loader: Loader, rows: slice, observers: Sequence[Observer], *, precision: str = "float32"
) -> Arrays:
    """The arrays of the rows `rows` of the images in `loader`, on the CPU; the noise is of its seed and of the rows."""
    model.eval()
    batch = EvaluationBatch(model, loader, rows)
    with autocast(precision, batch.x.device):
        seen = [observer(batch) for observer in observers]
    loader.release(before=rows.start)
    return {name: each.cpu().numpy() for found in seen for name, each in found.items()}


class Piece(NamedTuple):
    """Images that are observed together."""

    split: str
    rows: slice

    @property
    def num_images(self) -> int:
        """How many they are."""
        return int(self.rows.stop - self.rows.start)


class Observation(NamedTuple):
    """The observation of one split or several, in pieces that anyone may do."""

    experiment: Experiment
    model: VAE
    loaders: Mapping[str, Loader]
    """By the experiment's splits."""
    pieces: Sequence[Piece]
    observers: Mapping[str, Sequence[Observer]]
    """By split."""
    fitted_prior: Prior | None = None
    """The model's, if it is not that of the experiment."""


Run = Callable[[Observation], Iterator[tuple[int, Arrays]]]
"""Who observes: yields number and arrays of each piece as they are done, in any order."""


def observe_here(whole: Observation) -> Iterator[tuple[int, Arrays]]:
    """Number and arrays of each piece, by this process."""
    for number, (split, rows) in enumerate(whole.pieces):
        precision = whole.experiment.training.precision
        yield number, observe(whole.model, whole.loaders[split], rows, whole.observers[split], precision=precision)


def observed(whole: Observation, run: Run, progress: Progress) -> Iterator[tuple[int, Arrays]]:
    """What `run` yields; `progress` is called after each piece."""
    num_done, num_images = 0, sum(piece.num_images for piece in whole.pieces)
    for number, arrays in run(whole):
        yield number, arrays
        num_done += whole.pieces[number].num_images
        progress(num_done, num_images)


def in_order(found: Iterable[tuple[int, Arrays]]) -> list[Arrays]:
    """The arrays of the pieces by their numbers."""
    return [arrays for _, arrays in sorted(found, key=lambda each: each[0])]


def pieces(num_images: int, size: int) -> list[slice]:
    """The rows of a split in pieces, which are the same for any number of workers: so their arrays are, to the bit."""
    return [slice(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def spread_pieces(num_images: int, most: int, size: int = 100) -> list[slice]:
    """Pieces from all over a split, which may be sorted by class: of at most `most` images together, or of all."""
    if num_images <= most:
        return pieces(num_images, size)
    whole, num = num_images // size, max(1, most // size)
    starts = [number * whole // num * size for number in range(num)]
    return [slice(start, min(start + size, num_images)) for start in starts]


def joined(parts: Sequence[Arrays]) -> Arrays:
    """The arrays of a whole split, from those of its pieces in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
