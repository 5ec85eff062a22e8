"""Runs side by side, from their files alone: no model is loaded, no image read.

Numbers are compared where their labels are equal: `Evaluation.labels` says what a number is of. Those whose labels
differ stand in separate groups, and are never ranked against each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ray.config.experiment import Experiment, is_place_key
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.evaluation.result import means
from vae_ray.report.text import as_text

FREE_LABELS = ("objective", "beta", "epoch", "seed")
"""Labels in which numbers may differ: what one compares."""
ONLY_OF = {"num_samples": ("nll", "effective_samples")}
"""Labels that concern only metrics whose names begin so."""
RECORDED = "all (recorded in training)"
"""The label `num_images` of what training recorded: a run does not say how many test images it has."""
LOWER_IS_BETTER = ("nelbo", "nll", "bits_per_dim", "nll_bits_per_dim")
"""By the first of these rows are ranked."""


@dataclass(frozen=True)
class ComparedRun:
    """A run, or the best trial of a sweep."""

    name: str
    """Unlike that of the others."""
    location: str
    experiment: Experiment
    best_epoch: int
    history: list[dict[str, Any]]
    """The metrics of each epoch."""
    evaluations: list[Evaluation]
    """The kept ones, and what was recorded of the best epoch."""
    samples: str | None = field(repr=False)
    """The picture of the best epoch as a data URI, if there is one."""

    @property
    def recorded(self) -> list[Evaluation]:
        """What was recorded of the best epoch, by split."""
        return [each for each in self.evaluations if each.labels.get("num_images") == RECORDED]


class Number(NamedTuple):
    """A metric of a run."""

    value: float
    standard_error: float | None


class Row(NamedTuple):
    """The numbers of a run, after an epoch, in a group."""

    run: str
    epoch: int | None
    numbers: dict[str, Number]
    by_image: dict[str, NDArray[np.float64] | None]
    """Of each metric the values of each image, in the order of the split, where they are kept."""
    worse_by: Number | None = None
    """Than the first row, in the metric by which rows are ranked: the mean over images of the difference of each.

    What makes an image hard for every model cancels in it: its standard error is far smaller than those of both.
    """


Rows = dict[tuple[str, Any], Row]
"""By run and epoch."""


class Group(NamedTuple):
    """Numbers that compare with each other."""

    labels: dict[str, Any]
    metrics: list[str]
    rows: list[Row]
    """Ranked by `ranked_by`, best first; else in the order of the runs."""
    ranked_by: str | None
    differences: list[str]
    """Why these numbers do not compare with those of the groups before."""


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, dict[str, Any]]:
    """The settings in which runs differ: value by the run's name, by key; None where a run has no such key."""
    flat = {run.name: run.experiment.flat() for run in runs}
    keys = dict.fromkeys(key for each in flat.values() for key in each if not is_place_key(key))
    found = {key: {name: each.get(key) for name, each in flat.items()} for key in keys}
    return {key: values for key, values in found.items() if len({_canonical(each) for each in values.values()}) > 1}


def groups_of(runs: Sequence[ComparedRun]) -> list[Group]:
    """The numbers of all runs in groups of equal labels: those with most runs first, then those with most numbers."""
    found: dict[str, tuple[dict[str, Any], Rows]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            for metric, value in evaluation.metrics.items():
                labels = labels_of(metric, evaluation.labels)
                _, rows = found.setdefault(_canonical(labels), (labels, {}))
                epoch = evaluation.labels.get("epoch")
                row = rows.setdefault((run.name, epoch), Row(run.name, epoch, {}, {}))
                row.numbers.setdefault(metric, Number(value, evaluation.standard_errors.get(metric)))
                row.by_image.setdefault(metric, evaluation.by_image(metric))
    parts = [(labels, rows) for labels, rows in found.values() if not _is_repeated(labels, rows, found.values())]
    parts.sort(
        key=lambda part: (
            -len({row.run for row in part[1].values()}),
            -sum(len(row.numbers) for row in part[1].values()),
        )
    )
    groups: list[Group] = []
    for labels, by_run in parts:
        in_group = [*by_run.values()]
        metrics = [*dict.fromkeys(metric for row in in_group for metric in row.numbers)]
        ranked_by = next((m for name in LOWER_IS_BETTER for m in metrics if m.rpartition("/")[2] == name), None)
        ranked = sorted(in_group, key=lambda row: _rank(row, ranked_by))
        ranked = [row._replace(worse_by=_worse_by(row, ranked[0], ranked_by)) for row in ranked]
        groups.append(Group(labels, metrics, ranked, ranked_by, differences(labels, metrics, groups)))
    return groups


def _worse_by(row: Row, first: Row, metric: str | None) -> Number | None:
    own, best = (each.by_image.get(metric or "") for each in (row, first))
    if row is first or own is None or best is None or len(own) != len(best):
        return None
    values, errors = means({"": own - best})
    return Number(values[""], errors[""])


def labels_of(metric: str, labels: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for this metric of two evaluations to compare."""
    name = metric.rpartition("/")[2]
    return {
        key: value
        for key, value in labels.items()
        if key not in FREE_LABELS and (key not in ONLY_OF or name.startswith(ONLY_OF[key]))
    }


def differences(labels: Mapping[str, Any], metrics: Sequence[str], others: Sequence[Group]) -> list[str]:
    """A line for each group of `others` that has one of the metrics: the labels that differ, with both values."""
    lines = []
    for number, other in enumerate(others, 1):
        if common := [metric for metric in metrics if metric in other.metrics]:
            keys = [key for key in {**other.labels, **labels} if labels.get(key) != other.labels.get(key)]
            if "num_images" in keys:
                keys = [key for key in keys if key != "images"]  # which are others then
            which = "; ".join(
                f"{key} {as_text(labels.get(key))} here, {as_text(other.labels.get(key))} there" for key in keys
            )
            is_recorded = RECORDED in (labels.get("num_images"), other.labels.get("num_images"))
            hint = "; vae-ray evaluate RUN gives numbers that compare" if is_recorded else ""
            lines.append(f"{', '.join(common)} must not be compared with group {number}: {which}{hint}")
    return lines


def _is_repeated(labels: Mapping[str, Any], rows: Rows, others: Iterable[tuple[Mapping[str, Any], Rows]]) -> bool:
    """Whether these are numbers that training recorded, and another group has all of them, from an evaluation."""

    def has_all(other: Rows) -> bool:
        return all(
            key in other
            and metric in other[key].numbers
            and math.isclose(number.value, other[key].numbers[metric].value, rel_tol=1e-5)
            for key, row in rows.items()
            for metric, number in row.numbers.items()
        )

    return labels.get("num_images") == RECORDED and any(has_all(other) for _, other in others if other is not rows)


def _rank(row: Row, metric: str | None) -> float:
    return row.numbers[metric].value if metric in row.numbers else float("inf") if metric else 0.0


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
