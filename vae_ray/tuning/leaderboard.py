"""The leaderboard: trials in order of a metric that does not contain beta, as CSV, Parquet and `best/`.

Why not the loss: it is distortion + beta * rate, so two trials of different beta do not measure the same thing, and
the one with the smallest beta wins whatever it has learnt. `nelbo` is distortion + rate for all of them. The
trade-off itself is two numbers, rate and distortion; the trials that no other beats in both are the Pareto front
(Alemi et al. 2018, arXiv:1711.00464).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord

PARETO_METRICS = ("rate", "distortion")


def ranked(records: Sequence[TrialRecord], metrics: Sequence[str]) -> list[TrialRecord]:
    """Trials from best to worst by the metric of their best checkpoints; failed ones and those without one last.

    With two metrics the Pareto front comes first, then the front of the others, and so on; within one, by the sum.
    """
    valued = [record for record in records if _values(record, metrics) is not None]
    order: list[TrialRecord] = []
    while valued:
        front = valued if len(metrics) == 1 else pareto_front(valued, metrics)
        order += sorted(front, key=lambda record: (sum(_values(record, metrics) or ()), record.name))
        valued = [record for record in valued if record not in front]
    return order + [record for record in records if record not in order]


def pareto_front(records: Sequence[TrialRecord], metrics: Sequence[str]) -> list[TrialRecord]:
    """The trials than which no other is at least as good in all metrics and better in one."""
    values = {record.name: found for record in records if (found := _values(record, metrics)) is not None}

    def is_beaten(name: str) -> bool:
        mine = values[name]
        return any(other != mine and all(o <= m for o, m in zip(other, mine, strict=True)) for other in values.values())

    return [record for record in records if record.name in values and not is_beaten(record.name)]


def _values(record: TrialRecord, metrics: Sequence[str]) -> tuple[float, ...] | None:
    found = [record.value(metric) for metric in metrics]
    return None if record.failed else tuple(v for v in found if v is not None) if None not in found else None


def rate_and_distortion(metrics: Sequence[str]) -> tuple[str, str]:
    """The two metrics of the rate-distortion plane, on the split by which trials are compared."""
    split = metrics[0].partition("/")[0]
    return f"{split}/{PARETO_METRICS[0]}", f"{split}/{PARETO_METRICS[1]}"


def rows(records: Sequence[TrialRecord], metrics: Sequence[str], directory: SweepDirectory) -> list[dict[str, Any]]:
    """One row a trial, best first: plain values, None where there is none."""
    front = {record.name for record in pareto_front(records, rate_and_distortion(metrics))}
    measured = sorted(
        {key for record in records if record.best for key in record.best.metrics if "/" in key}, key=_metric_order
    )
    table = []
    for rank, record in enumerate(ranked(records, metrics), start=1):
        best = record.best
        is_ranked = _values(record, metrics) is not None
        table.append(
            {
                "rank": rank if is_ranked else None,
                "trial": record.name,
                "state": record.state,
                "epochs": record.epochs_done,
                "best_epoch": best.epoch if best else None,
                **{key: best.metrics.get(key) if best else None for key in measured},
                "pareto_front": record.name in front,
                **{key: _cell(value) for key, value in record.overrides.items()},
                "seconds": sum(line["seconds"] for line in record.history),
                "checkpoint": str(best.path.relative_to(directory.path)) if best else None,
                "reason": record.reason,
            }
        )
    return table


def _metric_order(metric: str) -> tuple[int, int]:
    split, _, term = metric.partition("/")
    splits, terms = ("val", "test", "train"), ("nelbo", "distortion", "rate", "loss")
    return splits.index(split), terms.index(term) if term in terms else len(terms)


def _cell(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) or value is None else json.dumps(value)


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
