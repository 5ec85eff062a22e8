"""An evaluation: metrics of one model over one split, with all that must be equal for two of them to be comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ray.errors import UserError
from vae_ray.evaluation.observations import Arrays, Observer
from vae_ray.evaluation.table import METRICS, TRAINING, Setting


@dataclass(frozen=True)
class Evaluation(Mapping[str, float]):
    """The metrics by name, `{"test/nelbo": 104.2, ...}`, and what they mean."""

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    """Over images, of the metrics that are means over them; by the same names."""
    details: dict[str, list[float]]
    """What metrics are summaries of, by latent dimension for example."""
    labels: dict[str, Any]
    """Of data, model and method: numbers whose labels differ do not compare."""
    warnings: list[str]
    """Why a number may mislead, or is missing."""
    arrays: Arrays = field(default_factory=dict, repr=False, compare=False)
    """What was observed of each image, in the order of the split."""

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def by_image(self, metric: str) -> NDArray[np.float64] | None:
        """The values `(N,)` whose mean is the metric, in the order of the split; None where they are not known."""
        arrays, name = self.arrays, metric.rpartition("/")[2]
        if name == "nelbo" and {"distortion", "rate"} <= arrays.keys():
            return arrays["distortion"].astype(np.float64) + arrays["rate"]
        if name == "nll" and "log_p" in arrays:
            values: NDArray[np.float64] = -arrays["log_p"][:, -1]
            return values
        found = arrays.get(name)
        return found.astype(np.float64) if found is not None and found.ndim == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without the arrays."""
        names = ("metrics", "standard_errors", "details", "labels", "warnings")
        return {name: getattr(self, name) for name in names}


def observers_of(names: Sequence[str], setting: Setting) -> list[Observer]:
    """What the metrics `names` of the table need to be observed, each once."""
    return list(dict.fromkeys(observer for name in names for observer in METRICS[name].observers(setting)))


def training_observers_of(names: Sequence[str], setting: Setting) -> list[Observer]:
    """What they need to be observed of training images too."""
    return list(dict.fromkeys(observer for name in names for observer in METRICS[name].of_training(setting)))


def possible(
    names: Sequence[str], setting: Setting, observe_one: Callable[[Sequence[Observer]], Arrays], *, required: bool
) -> tuple[list[str], list[str]]:
    """Those of the metrics that this model and its images have, tried with one image, and why the others are missing.

    Raises `UserError` for the first that is missing if they are `required`.
    """
    found, missing = [], []
    for name in names:
        try:
            observe_one(METRICS[name].observers(setting))
            found.append(name)
        except UserError as error:
            if required:
                raise
            missing.append(str(error))
    return found, missing


def evaluation_of(
    arrays: Arrays,
    names: Sequence[str],
    setting: Setting,
    *,
    split: str,
    labels: Mapping[str, Any],
    warnings: Sequence[str] = (),
    training: Arrays | None = None,
) -> Evaluation:
    """The metrics `names` of the arrays of all images of `split`, and of those of the training images."""
    given = {**arrays, **{f"{TRAINING}{name}": each for name, each in (training or {}).items()}}
    found = Evaluation({}, {}, {}, dict(labels), list(warnings), arrays)
    for name in names:
        try:
            result = METRICS[name].compute(given, setting)
        except UserError as error:  # of these images or features: what the others have found is not lost
            if len(names) == 1:
                raise
            found.warnings.append(str(error))
            continue
        known = {
            key: value for key, value in result.standard_errors.items() if math.isfinite(value)
        }  # not of one image
        result = result._replace(standard_errors=known)
        parts = zip((found.metrics, found.standard_errors, found.details), result[:3], strict=True)
        for collected, new in parts:
            collected.update({f"{split}/{key}": value for key, value in new.items()})  # type: ignore[attr-defined]
        found.warnings.extend(result.warnings)
    return found
