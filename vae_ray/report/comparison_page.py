"""`vae-ray compare`: runs side by side on one page, as a table on the terminal, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_ray.errors import UserError
from vae_ray.evaluation.table import with_unit
from vae_ray.report.charts import BASE_SPEC, TOOLTIP, Spec, curves, quantity, trimmed
from vae_ray.report.comparison import (
    ComparedRun,
    Group,
    Number,
    differing_settings,
    groups_of,
)
from vae_ray.report.page import render
from vae_ray.report.text import as_text, short_names
from vae_ray.storage.atomic import atomic_write

SPLITS = ("test", "val", "train")
"""The first that all runs recorded is drawn: runs in one chart have the same test images."""


def comparison(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Plain JSON types: `runs`, `settings` in which they differ, and `groups` of numbers that compare."""
    return {
        "runs": [{"name": run.name, "location": run.location, "best_epoch": run.best_epoch} for run in runs],
        "settings": differing_settings(runs),
        "groups": [
            {
                "labels": group.labels,
                "ranked_by": group.ranked_by,
                "differences": group.differences,
                "rows": [
                    {
                        "run": row.run,
                        "epoch": row.epoch,
                        "metrics": {name: n._asdict() for name, n in row.numbers.items()},
                        "worse_by": row.worse_by and row.worse_by._asdict(),
                    }
                    for row in group.rows
                ],
            }
            for group in groups_of(runs)
        ],
    }


def comparison_text(runs: Sequence[ComparedRun]) -> str:
    """The same as tables for a terminal; nats per image where no other unit is named."""
    names = {run.name: run for run in runs}
    parts = []
    for number, group in enumerate(groups_of(runs), 1):
        heading = f"group {number}: {', '.join(f'{key} {as_text(value)}' for key, value in group.labels.items())}"
        parts.append("\n".join([heading, *group.differences, _aligned(table_of(group, names, {}))]))
    if settings := differing_settings(runs):
        rows = [[key, *(as_text(values[run.name]) for run in runs)] for key, values in settings.items()]
        parts.append(_aligned([["settings that differ", *names], *rows]))
    return "\n\n".join(parts)


def write_comparison(runs: Sequence[ComparedRun], out: Path) -> None:
    """Write the page; raises `UserError` if the file cannot be written."""
    settings = differing_settings(runs)
    families = families_of(runs)
    charts: dict[str, Spec] = {}
    for number, (_, family) in enumerate(families):
        found = {"curves": learning_curves(family), "plane": rate_distortion(family)}
        charts |= {f"{name}-{number}": spec for name, spec in found.items() if spec["data"]["values"]}
    values = {
        "runs": runs,
        "names": {run.name: run for run in runs},
        "settings": {short: settings[key] for key, short in short_names(settings).items()},
        "groups": groups_of(runs),
        "table_of": table_of,
        "families": families,
        "charts": charts,
    }
    page = render("report/comparison.html.j2", values)
    try:
        atomic_write(out, page)
    except OSError as error:
        raise UserError(f"--out: got {str(out)!r}, cannot be written ({error.strerror})") from None


def families_of(runs: Sequence[ComparedRun]) -> list[tuple[str, list[ComparedRun]]]:
    """Runs whose nats may stand in one chart, by what they have in common: data, binarization, likelihood, images."""
    families: dict[str, list[ComparedRun]] = {}
    for run in runs:
        labels = run.recorded[0].labels if run.recorded else {}
        keys = [key for key in ("data", "binarization", "likelihood", "images") if key in labels]
        families.setdefault(", ".join(f"{key} {as_text(labels[key])}" for key in keys), []).append(run)
    return [*families.items()]


def learning_curves(runs: Sequence[ComparedRun]) -> Spec:
    """nelbo by epoch, of the first split that all runs recorded."""
    recorded = [{key for record in run.history for key in record} for run in runs]
    split = next((each for each in SPLITS if all(f"{each}/nelbo" in keys for keys in recorded)), "train")
    metric, points = f"{split}/nelbo", []
    for run in runs:
        found = [(record["epoch"], record.get(metric, math.nan)) for record in run.history]
        found = [(epoch, value) for epoch, value in found if math.isfinite(value)]
        points += [
            {
                "run": run.name,
                "epoch": epoch,
                "value": value,
                "is_last": number == len(found),
                "tooltip": {"run": run.name, "epoch": str(epoch), metric: as_text(value)},
            }
            for number, (epoch, value) in enumerate(found, 1)
        ]
    values = trimmed(metric, [point["value"] for point in points])
    points = [{**point, "value": value} for point, value in zip(points, values, strict=True)]
    return curves(
        points,
        series="run",
        title=f"{metric} (nats per image)",
        description=f"{metric} of each run by epoch",
        color=_color(runs),
        shape={**_color(runs), "scale": {"domain": [run.name for run in runs]}},
    )


def rate_distortion(runs: Sequence[ComparedRun]) -> Spec:
    """The rate-distortion plane: a point for what each run recorded of its best epoch."""
    recorded = [{key: value for each in run.recorded for key, value in each.metrics.items()} for run in runs]
    split = next((each for each in SPLITS if all(f"{each}/rate" in metrics for metrics in recorded)), None)
    points = []
    for run, metrics in zip(runs, recorded, strict=True) if split else ():
        rate, distortion = metrics[f"{split}/rate"], metrics[f"{split}/distortion"]
        tooltip = {"run": run.name, "rate": as_text(rate), "distortion": as_text(distortion)}
        beta = run.experiment.flat().get("objective.beta")
        tooltip |= {} if beta is None else {"beta": as_text(beta)}
        points.append({"run": run.name, "rate": rate, "distortion": distortion, "tooltip": tooltip})
    return {
        **BASE_SPEC,
        "description": "distortion by rate, a point for each run",
        "data": {"values": points},
        "mark": {"type": "point", "filled": True, "opacity": 1, "size": 130, "tooltip": TOOLTIP},
        "encoding": {
            "x": quantity("rate", "rate (nats per image)"),
            "y": quantity("distortion", "distortion (nats per image)"),
            "color": _color(runs),
            "shape": {**_color(runs), "scale": {"domain": [run.name for run in runs]}},
        },
    }


def _color(runs: Sequence[ComparedRun]) -> Spec:
    scale = {"domain": [run.name for run in runs], "scheme": "tableau10" if len(runs) <= 10 else "tableau20"}
    return {"field": "run", "type": "nominal", "title": None, "scale": scale, "legend": {"columns": 3}}


def table_of(group: Group, runs: dict[str, ComparedRun], settings: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Header and rows, a row a run; a column a run where there are more numbers than runs.

    After the metric by which rows are ranked comes by how much a run is worse than the first; after all metrics, the
    settings by name in which these runs differ.
    """
    columns = [["run", *(row_name(row.run, row.epoch, runs) for row in group.rows)]]
    for metric in group.metrics:
        columns.append([metric, *(cell(metric, row.numbers.get(metric)) for row in group.rows)])
        if metric == group.ranked_by and any(row.worse_by for row in group.rows):
            columns.append(["worse by", *(cell(metric, row.worse_by) for row in group.rows)])
    of_rows = {name: [as_text(values[row.run]) for row in group.rows] for name, values in settings.items()}
    columns += [[name, *texts] for name, texts in of_rows.items() if len(set(texts)) > 1]
    columns.append(["best epoch", *(str(runs[row.run].best_epoch) for row in group.rows)])
    return columns if len(group.metrics) > len(group.rows) else [[*row] for row in zip(*columns, strict=True)]


def cell(metric: str, number: Number | None) -> str:
    """A number without its unit, which a table's heading says."""
    if number is None:
        return "–"
    return with_unit(metric, *number).removesuffix(" nats").removesuffix(" bits/dim")


def row_name(run: str, epoch: Any, runs: dict[str, ComparedRun]) -> str:
    """The run's name, with the epoch where that is not its best."""
    return run if epoch in (None, runs[run].best_epoch) else f"{run}, epoch {epoch}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(each.rjust(w) for each, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    ]
    return "\n".join("  ".join(line) for line in lines)
