"""What computing one metric gives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Result(NamedTuple):
    """Numbers of one metric over the images of a split."""

    values: Mapping[str, float]
    """By name; a metric may give several."""
    standard_errors: Mapping[str, float] = {}
    """Of those of the values that are means over images: their standard errors over images."""
    details: Mapping[str, list[float]] = {}
    """What the values are summaries of, by latent dimension for example."""
    warnings: tuple[str, ...] = ()
    """Lines that say why a value may mislead."""


CONFIDENCE = 0.95


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean of at least two normally distributed values (Student 1908).

    t(0.975; n - 1) s / sqrt(n), with the sample standard deviation s.
    """
    from scipy.stats import t  # takes a second to import

    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def means(values: Mapping[str, NDArray[Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The means over images `(N,)` in float64, and their standard errors s / sqrt(N) (NaN of one image)."""
    in_float64 = {name: each.astype(np.float64) for name, each in values.items()}
    errors = {
        name: float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        for name, each in in_float64.items()
    }
    return {name: float(each.mean()) for name, each in in_float64.items()}, errors
