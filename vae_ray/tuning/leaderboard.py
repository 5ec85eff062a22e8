"""The leaderboard: trials in order of a metric that does not contain beta, as CSV, Parquet and `best/`.

Not the loss: it is distortion + beta * rate, so trials of different beta do not measure the same thing, and the
smallest beta wins. `nelbo` is distortion + rate for all of them. The trade-off itself is two numbers, rate and
distortion; the non-dominated trials are the Pareto front (Alemi et al. 2018, arXiv:1711.00464).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.settings import TERMS
from vae_ray.tuning.space import scalar


def ranked(records: Sequence[TrialRecord], metrics: Sequence[str]) -> list[TrialRecord]:
    """Trials from best to worst by their best checkpoints; failed ones and those without one last.

    With two metrics the Pareto front comes first, then the front of the others, and so on; within one, by the
    selection metric.
    """
    left = [record for record in records if is_comparable(record, metrics)]
    order: list[TrialRecord] = []
    while left:
        front = non_dominated(left, metrics) if len(metrics) > 1 else left
        order += sorted(front, key=lambda record: (record.best.score if record.best else 0.0, record.name))
        left = [record for record in left if record not in front]
    return order + [record for record in records if record not in order]


def is_comparable(record: TrialRecord, metrics: Sequence[str]) -> bool:
    """Whether a trial has not failed and has a checkpoint with these metrics."""
    return not record.failed and all(record.value(metric) is not None for metric in metrics)


def non_dominated(records: Sequence[TrialRecord], metrics: Sequence[str]) -> list[TrialRecord]:
    """The Pareto front: trials to which no other is equal or better in all metrics and better in one."""
    comparable = [record for record in records if is_comparable(record, metrics)]
    points = [tuple(record.value(metric) or 0.0 for metric in metrics) for record in comparable]

    def is_dominated(point: tuple[float, ...]) -> bool:
        return any(p != point and all(a <= b for a, b in zip(p, point, strict=True)) for p in points)

    return [record for record, point in zip(comparable, points, strict=True) if not is_dominated(point)]


def rate_and_distortion(metrics: Sequence[str]) -> tuple[str, str]:
    """The two metrics of the rate-distortion plane, on the split by which trials are compared."""
    split = metrics[0].partition("/")[0]
    return f"{split}/rate", f"{split}/distortion"


def rows(records: Sequence[TrialRecord], metrics: Sequence[str], directory: SweepDirectory) -> list[dict[str, Any]]:
    """One row a trial, best first: plain values, None where there is none."""
    front = {record.name for record in non_dominated(records, rate_and_distortion(metrics))}
    measured = {key for record in records if record.best for key in record.best.metrics if "/" in key}
    columns = sorted(measured, key=_metric_order)
    table = []
    for rank, record in enumerate(ranked(records, metrics), start=1):
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
                "reason": record.reason,
            }
        )
    return table


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
