"""The leaderboard: trials in order of a metric that does not contain beta, as CSV and Parquet.

Not the loss: it is distortion + beta * rate, so trials of different beta do not measure the same thing, and the
smallest beta wins. `nelbo` is distortion + rate for all of them. The trade-off itself is two numbers, rate and
distortion; the non-dominated trials are the Pareto front (Alemi et al. 2018, arXiv:1711.00464).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from vae_ray.tuning.configurations import Configuration, configurations
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.metrics import TERMS, Ranked, cost
from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.space import scalar

R = TypeVar("R", bound=Ranked)


def ranked(items: Sequence[R], metrics: Sequence[str]) -> list[R]:
    """Trials or configurations from best to worst; failed ones and those without a value last.

    With two metrics the Pareto front comes first, then the front of the others, and so on; within one, by `cost`.
    """
    left = [item for item in items if is_comparable(item, metrics)]
    order: list[R] = []
    while left:
        front = non_dominated(left, metrics) if len(metrics) > 1 else left
        order += sorted(front, key=lambda item: (cost(item, metrics), item.name))
        left = [item for item in left if item not in front]
    return order + [item for item in items if item not in order]


def is_comparable(item: Ranked, metrics: Sequence[str]) -> bool:
    """Whether it has not failed and has a value of these metrics."""
    return not item.failed and all(item.value(metric) is not None for metric in metrics)


def non_dominated(items: Sequence[R], metrics: Sequence[str]) -> list[R]:
    """The Pareto front: those to which no other is equal or better in all metrics and better in one."""
    comparable = [item for item in items if is_comparable(item, metrics)]
    points = [tuple(item.value(metric) or 0.0 for metric in metrics) for item in comparable]

    def is_dominated(point: tuple[float, ...]) -> bool:
        return any(p != point and all(a <= b for a, b in zip(p, point, strict=True)) for p in points)

    return [item for item, point in zip(comparable, points, strict=True) if not is_dominated(point)]


def ranked_configurations(records: Sequence[TrialRecord], metrics: Sequence[str], repeats: int) -> list[Configuration]:
    """By their means, those of which every seed has a value first."""
    every = configurations(records, metrics, repeats)
    complete, others = ([each for each in every if each.is_complete is wanted] for wanted in (True, False))
    return [*ranked(complete, metrics), *ranked(others, metrics)]


def ranked_trials(records: Sequence[TrialRecord], metrics: Sequence[str], repeats: int) -> list[TrialRecord]:
    """Trials from best to worst; with repeats by configuration, and of each the best seed first."""
    if repeats == 1:
        return ranked(records, metrics)
    groups = [(each.measured, each.records) for each in ranked_configurations(records, metrics, repeats)]
    return [record for measured, every in groups for record in [*measured, *(r for r in every if r not in measured)]]


def best_trials(records: Sequence[TrialRecord], metrics: Sequence[str], repeats: int, num: int) -> list[TrialRecord]:
    """The trials with a value of the first `num` configurations, best first."""
    if repeats == 1:
        return [record for record in ranked(records, metrics)[:num] if is_comparable(record, metrics)]
    return [record for each in ranked_configurations(records, metrics, repeats)[:num] for record in each.measured]


def rate_and_distortion(metrics: Sequence[str]) -> tuple[str, str]:
    """The two metrics of the rate-distortion plane, on the split by which trials are compared."""
    split = metrics[0].partition("/")[0]
    return f"{split}/rate", f"{split}/distortion"


def rows(
    records: Sequence[TrialRecord],
    metrics: Sequence[str],
    directory: SweepDirectory,
    repeats: int = 1,
) -> list[dict[str, Any]]:
    """The leaderboard: one row a trial, with repeats a configuration, best first."""
    build = configuration_rows if repeats > 1 else trial_rows
    return build(records, metrics, directory, repeats)


def trial_rows(
    records: Sequence[TrialRecord],
    metrics: Sequence[str],
    directory: SweepDirectory,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a trial, best first: plain values, None where there is none."""
    front = {record.name for record in non_dominated(records, rate_and_distortion(metrics))}
    columns = [*measured_metrics(records), *new_columns(records)]
    table = []
    for rank, record in enumerate(ranked_trials(records, metrics, repeats), start=1):
        best = record.best
        table.append(
            {
                "rank": rank if is_comparable(record, metrics) else None,
                "trial": record.name,
                "state": record.state,
                "epochs": record.epochs_done,
                "best_epoch": best.epoch if best else None,
                **{key: record.value(key) for key in columns},
                "pareto_front": record.name in front,
                **{key: scalar(value) for key, value in record.overrides.items()},
                "seconds": sum(line["seconds"] for line in record.history),
                "checkpoint": str(best.path.relative_to(directory.path)) if best else None,
                "reason": record.reason or not_evaluated(record, metrics),
            }
        )
    return table


def configuration_rows(
    records: Sequence[TrialRecord],
    metrics: Sequence[str],
    directory: SweepDirectory,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a configuration, best first: of each metric the mean over seeds, of those that rank all values too.

    `trial`, `best_epoch` and `checkpoint` are those of its best seed.
    """
    order = ranked_configurations(records, metrics, repeats)
    front = {each.name for each in non_dominated(order, rate_and_distortion(metrics))}
    columns = [*measured_metrics(records), *new_columns(records)]
    seeds = sorted({record.seed for record in records})
    table = []
    for rank, each in enumerate(order, start=1):
        best = each.measured[0] if each.measured else each.records[0]
        row: dict[str, Any] = {
            "rank": rank if is_comparable(each, metrics) else None,
            "configuration": each.name,
            "state": each.state,
            "seeds": len(each.measured),
        }
        for metric in metrics:
            row |= {metric: each.value(metric), **_of_seeds(each, metric, seeds)}
        row |= {key: each.value(key) for key in columns if key not in metrics}
        row |= {
            "pareto_front": each.name in front,
            **{key: scalar(value) for key, value in best.overrides.items()},
            "seconds": sum(line["seconds"] for record in each.records for line in record.history),
            "trial": best.name,
            "best_epoch": best.best.epoch if best.best else None,
            "checkpoint": str(best.best.path.relative_to(directory.path)) if best.best else None,
            "reason": each.reason,
        }
        table.append(row)
    return table


def _of_seeds(configuration: Configuration, metric: str, seeds: Sequence[int]) -> dict[str, float | None]:
    """The interval of a metric's mean, and its values by seed."""
    low, high = configuration.interval(metric) or (None, None)
    values = configuration.values(metric)
    by_seed = {f"{metric}_seed_{seed}": values.get(seed) for seed in seeds}
    return {f"{metric}_low": low, f"{metric}_high": high, **by_seed}


def not_evaluated(record: TrialRecord, metrics: Sequence[str]) -> str:
    """A line if a trial that has ended has no rank; else nothing."""
    if not record.has_ended or is_comparable(record, metrics):
        return ""
    return f"not evaluated by {', '.join(metrics)}; --resume tries it again"


def new_columns(records: Sequence[TrialRecord]) -> list[str]:
    """The metrics of evaluations that training has not recorded."""
    recorded = measured_metrics(records)
    return [key for key in dict.fromkeys(key for each in records for key in each.evaluated) if key not in recorded]


def measured_metrics(records: Sequence[TrialRecord]) -> list[str]:
    """The metrics that training has recorded."""
    return sorted(
        {key for record in records if record.best for key in record.best.metrics if "/" in key}, key=_metric_order
    )


def _metric_order(metric: str) -> tuple[int, int, str]:
    split, _, term = metric.partition("/")
    terms = (*TERMS, "loss")
    return ("val", "test", "train").index(split), terms.index(term) if term in terms else len(terms), term


def write_leaderboard(table: Sequence[dict[str, Any]], directory: SweepDirectory) -> None:
    """`leaderboard.csv` and `leaderboard.parquet`, each replaced whole."""
    content = pa.Table.from_pylist(list(table))
    for file, write in (
        (directory.leaderboard_csv, pyarrow.csv.write_csv),
        (directory.leaderboard_parquet, pyarrow.parquet.write_table),
    ):
        partial = file.with_name(f".partial-{file.name}")
        write(content, partial)
        os.replace(partial, file)
