"""Configurations of a sweep with `--repeats`: the trials of each, by several seeds on the same images.

A configuration is measured by means over its seeds. What an interval over seeds says is how much such a mean depends on
weights, order of images and noise; the images are the same, so it says nothing of others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

from vae_ray.evaluation.result import half_interval
from vae_ray.evaluation.table import unit_of
from vae_ray.tuning.metrics import cost
from vae_ray.tuning.records import TrialRecord, configuration_of

FEW_SEEDS = 10
"""Of fewer, an interval is itself uncertain: with 5, its width varies by a third from one experiment to the next."""


class Interval(NamedTuple):
    """A confidence interval of a mean, both ends included."""

    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % confidence interval of the mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    half = half_interval(values)
    return Interval(fmean(values) - half, fmean(values) + half)


@dataclass(frozen=True, eq=False)
class Configuration:
    """The trials of one configuration, one for each seed; has what `leaderboard.ranked` needs."""

    records: list[TrialRecord]
    """In order of their seeds."""
    metrics: Sequence[str]
    """Those that rank."""
    repeats: int
    """How many seeds the sweep has."""

    @property
    def name(self) -> str:
        return configuration_of(self.records[0].name)

    @cached_property
    def measured(self) -> list[TrialRecord]:
        """The trials that have ended and have a value of every metric, which measure the configuration; best first."""
        ended = [each for each in self.records if each.has_ended]
        measured = [each for each in ended if all(each.value(metric) is not None for metric in self.metrics)]
        return sorted(measured, key=lambda record: cost(record, self.metrics))

    @property
    def failed(self) -> bool:
        """Whether no seed has a value."""
        return not self.measured

    @property
    def is_complete(self) -> bool:
        """Whether every seed has a value."""
        return len(self.measured) == self.repeats

    @property
    def state(self) -> str:
        return "complete" if self.is_complete else f"{len(self.measured)} of {self.repeats} seeds"

    @property
    def reason(self) -> str:
        """Which seeds have no value, and why; empty where all have."""
        missing = [each for each in self.records if each not in self.measured]
        states = ["not evaluated" if each.has_ended else each.state for each in missing]
        return "; ".join(
            f"seed {each.seed} {state}{': ' * bool(each.reason)}{each.reason}"
            for each, state in zip(missing, states, strict=True)
        )

    @property
    def score(self) -> float:
        """The mean of the selection metric."""
        return fmean(record.score for record in self.measured) if self.measured else math.inf

    def values(self, metric: str) -> dict[int, float]:
        """The metric of each measured seed's best checkpoint, by seed, in order; without those that have none."""
        values = {each.seed: each.value(metric) for each in self.records if each in self.measured}
        return {seed: value for seed, value in values.items() if value is not None}

    def value(self, metric: str) -> float | None:
        """The mean of the metric over the measured seeds.

        None if one has no value of it: means over different seeds do not compare.
        """
        values = self.values(metric)
        return fmean(values.values()) if values and len(values) == len(self.measured) else None

    def interval(self, metric: str) -> Interval | None:
        """The interval of that mean; None of fewer than two seeds."""
        return t_interval([*self.values(metric).values()])


def configurations(records: Sequence[TrialRecord], metrics: Sequence[str], repeats: int) -> list[Configuration]:
    """The trials by configuration, in their order."""
    groups = itertools.groupby(records, key=lambda record: configuration_of(record.name))
    return [Configuration(list(group), metrics, repeats) for _, group in groups]


class Difference(NamedTuple):
    """How much lower a metric of one configuration is than that of another, paired by seed."""

    mean: float
    interval: Interval | None
    """None of fewer than two seeds in common."""
    num_seeds: int
    """That both have."""


def difference(first: Configuration, second: Configuration, metric: str) -> Difference | None:
    """Of the seeds that both have, second - first. None without such a seed.

    Trials of one seed have the same order of images and the same noise, and often the same initial weights: their
    differences vary less than the values do.
    """
    ours, theirs = first.values(metric), second.values(metric)
    differences = [theirs[seed] - ours[seed] for seed in ours if seed in theirs]
    return Difference(fmean(differences), t_interval(differences), len(differences)) if differences else None


def verdict(ranked: Sequence[Configuration], metrics: Sequence[str]) -> list[str]:
    """How surely the first configuration is better than the second, in plain words; empty where there are not two."""
    measured = [each for each in ranked if not each.failed]
    if len(measured) < 2:
        return []
    first, second = measured[:2]
    lines = [_described(first, second, metric) for metric in metrics]
    num_seeds = len({each.seed for each in first.measured} & {each.seed for each in second.measured})
    if 1 < num_seeds < FEW_SEEDS:
        uncertain = "it is itself uncertain, and assumes that values are normally distributed"
        lines.append(f"An interval of {num_seeds} seeds says little: {uncertain}.")
    lines.append(
        f"The best of {len(measured)} configurations looks better than it is, because these values selected it; new "
        "seeds for both (another --run.seed with the same --data.split-seed) and the test images are a fair comparison."
    )
    return lines


def _described(first: Configuration, second: Configuration, metric: str) -> str:
    found = difference(first, second, metric)
    if found is None:
        return f"{metric}: {first.name} and {second.name} have no seed in common to be compared by."
    unit, how = f" {unit_of(metric)}".rstrip(), "lower" if found.mean >= 0 else "higher"
    text = f"{metric} of {first.name} is {abs(found.mean):.3g}{unit} {how} than that of {second.name}"
    if found.interval is None:
        return f"{text}, by one seed: that says nothing about chance."
    low, high = sorted(math.copysign(1, found.mean) * end for end in found.interval)
    zero = "contains 0: these seeds do not tell the two apart" if low <= 0 <= high else "does not contain 0"
    return f"{text} (mean of {found.num_seeds} seeds, paired; 95 % interval {low:.3g} to {high:.3g}, which {zero})."
