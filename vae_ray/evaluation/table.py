"""The metrics: what each needs to be observed, and how it is computed of that. A new one is a line of `METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vae_ray.errors import UserError
from vae_ray.evaluation import (
    disentanglement,
    importance,
    latent_space,
    likelihood,
    observations,
    representation,
    samples,
)
from vae_ray.evaluation.features import FeatureSpace
from vae_ray.evaluation.observations import Arrays, Observer
from vae_ray.evaluation.result import Result, means
from vae_ray.models.vae import VAE

NATS = ("nelbo", "distortion", "rate", "nll", "mutual_information", "marginal_kl", "total_correlation")
"""Values in nats, and those whose names begin with one of these and `_`."""
DEFAULT = ("elbo", "active-units", "rates")
"""What costs about one pass."""
ALL = "all"
DEFAULT_FEATURES = "classifier"
MOST_TRAINING_IMAGES = 10_000
TRAINING = "train "
"""Begins the names of arrays of training images, among those that a metric is computed of."""


@dataclass
class Setting:
    """What metrics may depend on besides the arrays."""

    model: VAE
    num_samples: int
    """Samples of z for each image, of -log p(x)."""
    seed: int
    features: Callable[[], FeatureSpace]
    """Makes the feature space of metrics that compare sets of images."""
    split: str = "test"

    @property
    def has_levels(self) -> bool:
        return self.model.likelihood.support == "256 levels"

    @property
    def importance_samples(self) -> importance.ImportanceSamples:
        return importance.ImportanceSamples(self.num_samples)

    @cached_property
    def feature_space(self) -> FeatureSpace:
        """Made when a metric first needs it; raises `UserError` where there can be none."""
        return self.features()


class Metric(NamedTuple):
    """One entry: a name gives one value, or several that belong together."""

    compute: Callable[[Arrays, Setting], Result]
    observers: Callable[[Setting], Sequence[Observer]]
    of_training: Callable[[Setting], Sequence[Observer]] = lambda _: ()
    """What is observed of training images too, at most as many as are evaluated or `MOST_TRAINING_IMAGES`."""


def _elbo(arrays: Arrays, setting: Setting) -> Result:
    return likelihood.elbo(arrays, image_shape=setting.model.image_shape, has_levels=setting.has_levels)


def _nll(arrays: Arrays, setting: Setting) -> Result:
    bounds = setting.importance_samples.bounds
    return likelihood.nll(arrays, bounds=bounds, image_shape=setting.model.image_shape, has_levels=setting.has_levels)


def _rates(arrays: Arrays, setting: Setting) -> Result:
    sizes = [shape[0] for shape in setting.model.latent_shapes]
    return latent_space.rates(arrays, group_sizes=sizes)


def _disentanglement(arrays: Arrays, setting: Setting) -> Result:
    values = disentanglement.disentanglement_metrics(
        arrays["mean"], arrays["factors"], seed=setting.seed, logvar=arrays["logvar"], z=arrays["z"]
    )
    return Result(values)


def _representation(arrays: Arrays, setting: Setting) -> Result:
    splits = ({name: arrays[prefix + name] for name in arrays if prefix + name in arrays} for prefix in (TRAINING, ""))
    return representation.accuracies(*splits)


def _fid(arrays: Arrays, setting: Setting) -> Result:
    real, space = arrays["features"], setting.feature_space.name
    values = {f"fid[{space}]": samples.frechet_distance(real, arrays["generated_features"])}
    training = arrays.get(f"{TRAINING}features", real[:0])
    if len(training) >= len(real):  # as many: it is biased by its number of images
        rows = np.arange(len(real)) * len(training) // len(real)
        values[f"fid_of_training_images[{space}]"] = samples.frechet_distance(real, training[rows])
    return Result(values)


def _kid(arrays: Arrays, setting: Setting) -> Result:
    found = samples.kernel_distance(arrays["features"], arrays["generated_features"], seed=setting.seed)
    name = f"kid[{setting.feature_space.name}]"
    return Result({name: found.value}, {name: found.standard_error})


def _precision_recall(arrays: Arrays, setting: Setting) -> Result:
    found = samples.precision_recall(arrays["features"], arrays["generated_features"])
    return Result({f"{name}[{setting.feature_space.name}]": value for name, value in found._asdict().items()})


def _features(setting: Setting) -> list[Observer]:
    return [observations.FeaturesOf(setting.feature_space)]


def _training_features(setting: Setting) -> list[Observer]:
    return [] if setting.split == "train" else [observations.FeaturesOf(setting.feature_space, generates=False)]


def _labelled(setting: Setting) -> list[Observer]:
    if setting.split == "train":
        raise UserError("metrics: representation is not measured on the images that it is fitted to; use --split test")
    return [observations.codes, observations.small_pixels, observations.labels]


METRICS: dict[str, Metric] = {
    "elbo": Metric(_elbo, lambda _: [observations.elbo]),
    "nll": Metric(_nll, lambda setting: [setting.importance_samples]),
    "active-units": Metric(lambda arrays, _: latent_space.active_units(arrays), lambda _: [observations.codes]),
    "rates": Metric(_rates, lambda _: [observations.elbo, observations.rates]),
    "aggregated-posterior": Metric(
        lambda arrays, _: latent_space.aggregated_posterior(arrays), lambda _: [observations.top_group]
    ),
    "reconstruction": Metric(
        lambda arrays, _: Result(*means({name: arrays[name] for name in ("mse", "psnr", "ssim")})),
        lambda _: [observations.reconstructions],
    ),
    "fid": Metric(_fid, _features, _training_features),
    "kid": Metric(_kid, _features),
    "precision-recall": Metric(_precision_recall, _features),
    "representation": Metric(_representation, _labelled, _labelled),
    "disentanglement": Metric(_disentanglement, lambda _: [observations.factors, observations.top_group]),
}


def chosen(names: str | Sequence[str]) -> list[str]:
    """The metrics of a comma-separated text or a list, in the table's order; raises `UserError` for an unknown one."""
    if not isinstance(names, str | Sequence):
        raise UserError(f"metrics: got {names!r}, should be names with commas or a list of {', '.join(METRICS)}")
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else [*names]
    if wanted == [ALL]:
        return [*METRICS]
    for name in wanted:
        if name not in METRICS:
            raise UserError(f"metrics: got {name!r}, should be among {', '.join(METRICS)}, or {ALL}")
    return [name for name in METRICS if name in wanted]


def check_features(features: str, names: Sequence[str]) -> None:
    """Raise `UserError` for a feature space that no metric uses."""
    users = [name for name in METRICS if METRICS[name].observers is _features]
    if features != DEFAULT_FEATURES and not {*users} & {*names}:
        raise UserError(f"features: got {features!r}, which no metric of these uses; add one of {', '.join(users)}")


def unit_of(key: str) -> str:
    """The unit of a metric: "nats", "bits/dim", "dB", or none."""
    name = key.rpartition("/")[2]
    if name.endswith("bits_per_dim"):
        return "bits/dim"
    if name.startswith(tuple(f"{each}_" for each in NATS)) or name in NATS:
        return "nats"
    return "dB" if name == "psnr" else ""


def with_unit(key: str, value: float, standard_error: float | None = None) -> str:
    """A value of a metric as one reads it: `104.21 ± 0.35 nats` of "test/nelbo"."""
    unit = unit_of(key)
    digits = {"nats": 2, "dB": 2}.get(unit, 3)
    if key.rpartition("/")[2] == "mse":
        digits = 5
    elif not unit and standard_error is None and float(value).is_integer():
        digits = 0
    error = "" if standard_error is None else f" ± {standard_error:.{digits}f}"
    return f"{value:z,.{digits}f}{error} {unit}".rstrip()
