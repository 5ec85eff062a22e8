"""The charts of a sweep's report, as Vega-Lite specifications: plain data, drawn by the reader's browser.

Each is as wide as its place on the page. Colours that are not data are the page's own CSS variables, so that a chart
follows it into the dark. What a tooltip says is text made here: Vega would show an absent number as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vae_ray.config.experiment import Experiment
from vae_ray.tuning.leaderboard import rate_and_distortion
from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.report.scales import (
    Axis,
    Spec,
    color_scale,
    even_ticks,
    is_finite,
    key_axis,
    number_axis,
    quantity,
    shown,
    size_scale,
    span,
    trimmed,
)
from vae_ray.tuning.space import SearchSpace

Rows = Sequence[dict[str, Any]]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
STATE_STYLES = {
    "best": ("var(--best)", "circle"),
    "finished": ("var(--finished)", "circle"),
    "stopped": ("var(--stopped)", "square"),
    "pending": ("var(--stopped)", "triangle-right"),
    "failed": ("var(--failed)", "cross"),
}
HOVER_SELECTION = {
    "name": "hovered",
    "select": {"type": "point", "fields": ["trial"], "on": "pointerover", "clear": "pointerout"},
}
BASE_SPEC = {
    "width": "container",
    "height": 340,
    "autosize": {"type": "fit-x", "contains": "padding"},
    "background": "transparent",
    "config": {
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            **{f"{part}Color": "var(--muted)" for part in ("domain", "tick", "label")},
            "titleColor": "var(--ink)",
            "gridColor": "var(--line)",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 10,
        },
        "legend": {
            "orient": "bottom",
            "layout": {"bottom": {"direction": "vertical", "anchor": "start"}},
            "labelColor": "var(--ink)",
            "titleColor": "var(--ink)",
            "titleFontWeight": "normal",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "gradientLength": 200,
            "symbolFillColor": "var(--muted)",
            "symbolStrokeColor": "transparent",
        },
        "text": {"fontSize": 12, "color": "var(--ink)"},
    },
}


def learning_curves(
    records: Sequence[TrialRecord], table: Rows, metric: str, *, tooltip_columns: Sequence[str], rungs: Sequence[int]
) -> Spec | None:
    """`metric` by epoch: a line a trial, a mark where it ended, a rule at each rung; None if no epoch was done.

    `tooltip_columns` are the columns of the leaderboard `table` that a tooltip shows, here and below.
    """
    best = best_trial(table)
    points, ends = [], []
    for record in sorted(records, key=lambda record: record.name == best):  # the best is drawn over the others
        line = [
            {"trial": record.name, "epoch": entry["epoch"], "value": entry[metric], "end": _end(record, best)}
            for entry in record.history
            if is_finite(entry.get(metric))
        ]
        points += line
        ends += line[-1:]
    if not points:
        return None
    last = max(point["epoch"] for point in points)
    present = {end: look for end, look in STATE_STYLES.items() if any(point["end"] == end for point in ends)}
    x = _epochs(last)
    y = quantity("value", f"{metric} (nats per image)", trimmed(metric, [point["value"] for point in points]))
    color, shape = (
        {
            "field": "end",
            "type": "nominal",
            "title": None,
            "scale": {"domain": list(present), "range": [look[part] for look in present.values()]},
        }
        for part in (0, 1)
    )
    end_marks = {
        "name": "ends",
        "data": {"values": ends},
        "transform": [_lookup(table, tooltip_columns)],
        "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
        "encoding": {"x": x, "y": y, "color": color, "shape": shape, "tooltip": _tooltip(tooltip_columns)},
    }
    return {
        **BASE_SPEC,
        "description": f"{metric} of each trial by epoch",
        "data": {"values": points},
        "transform": [_lookup(table, tooltip_columns)],
        "layer": [
            _rungs([rung for rung in rungs if rung <= last], x),
            *_lines(x, y, color, best, tooltip_columns),
            end_marks,
        ],
    }


def _epochs(last: int) -> Spec:
    margin = 0.02 * (last - 1) or 0.5
    return {
        "field": "epoch",
        "type": "quantitative",
        "title": "epoch",
        "scale": {"domain": [1 - margin, last + margin], "nice": False},
        "axis": {
            "values": sorted({1, *(tick for tick in even_ticks(0, last) if tick >= 1 and tick == int(tick))}),
            "grid": False,
        },
    }


def _rungs(rungs: Sequence[int], x: Spec) -> Spec:
    label = {"type": "text", "color": "var(--muted)", "y": 2, "align": "left", "baseline": "top", "dx": 4}
    return {
        "data": {"values": [{"epoch": rung, "label": f"rung at {rung}"} for rung in rungs]},
        "encoding": {"x": x},
        "layer": [
            {"name": "rungs", "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [4, 4]}},
            {"mark": label, "encoding": {"text": {"field": "label"}}},
        ],
    }


def _lines(x: Spec, y: Spec, color: Spec, best: str | None, tooltip_columns: Sequence[str]) -> list[Spec]:
    """A line a trial, and an unseen broad one over it that is easily pointed at."""
    thick = [
        {"param": "hovered", "empty": False, "value": 4.5},
        {"test": {"field": "trial", "equal": best}, "value": 3},
    ]
    encoding = {"x": x, "y": y, "detail": {"field": "trial"}}
    seen = {**encoding, "color": color, "strokeWidth": {"condition": thick, "value": 1.5}}
    return [
        {"name": "trials", "mark": {"type": "line", "strokeJoin": "round"}, "encoding": seen},
        {
            "name": "pointed",
            "params": [HOVER_SELECTION],
            "mark": {"type": "line", "strokeWidth": 14, "opacity": 0},
            "encoding": {**encoding, "tooltip": _tooltip(tooltip_columns)},
        },
    ]


def parallel_coordinates(
    table: Rows, space: SearchSpace, metrics: Sequence[str], *, tooltip_columns: Sequence[str]
) -> Spec | None:
    """A line a ranked trial through what was searched and what came of it; None if no trial has a rank."""
    ranked = [row for row in table if row["rank"] is not None]
    if not ranked:
        return None
    axes = {key: key_axis(key, domain, [row[key] for row in ranked]) for key, domain in space.domains.items()}
    for metric in metrics:
        ends = span(trimmed(metric, [row[metric] for row in ranked]))
        axes[metric] = number_axis(f"{metric} (nats)", *ends, log=False)
    values = [
        {"trial": row["trial"], "axis": number, "at": axis.at(row[column]), "value": row[metrics[0]]}
        for row in reversed(ranked)  # the best is drawn over the others
        for number, (column, axis) in enumerate(axes.items())
    ]
    scale = {"domain": [-0.45, len(axes) - 0.75], "nice": False}
    x = {"field": "axis", "type": "quantitative", "axis": None, "scale": scale}
    y = {"field": "at", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1.12], "nice": False}}
    color = color_scale(
        "value", f"{metrics[0]} (nats)", trimmed(metrics[0], [row[metrics[0]] for row in ranked]), log=False
    )
    rules = [{"axis": number, "at": 0, "top": 1} for number in range(len(axes))]
    return {
        **BASE_SPEC,
        "description": "What each trial tried and what came of it, an axis a quantity",
        "data": {"values": values},
        "transform": [_lookup(ranked, tooltip_columns)],
        "layer": [
            {
                "data": {"values": rules},
                "mark": {"type": "rule", "color": "var(--muted)"},
                "encoding": {"x": x, "y": y, "y2": {"field": "top"}},
            },
            *_lines(x, y, color, ranked[0]["trial"], tooltip_columns),
            *_axis_texts(list(axes.values()), x, y),
        ],
    }


def _axis_texts(axes: Sequence[Axis], x: Spec, y: Spec) -> Sequence[Spec]:
    """Labels to the left of each axis and its title above, over the lines so that they can be read."""
    ticks = [{"axis": n, "at": at, "label": label} for n, axis in enumerate(axes) for at, label in axis.ticks]
    titles = [{"axis": n, "at": 1.08, "label": axis.title} for n, axis in enumerate(axes)]
    encoding = {"x": x, "y": y, "text": {"field": "label"}}
    return [
        {"name": name, "data": {"values": values}, "mark": {"type": "text", **look}, "encoding": encoding}
        for name, values, look in (
            ("ticks", ticks, {"align": "right", "dx": -6}),
            ("titles", titles, {"align": "center", "fontWeight": 600}),
        )
    ]


def rate_distortion(
    table: Rows, experiments: Mapping[str, Experiment], metrics: Sequence[str], *, tooltip_columns: Sequence[str]
) -> Spec | None:
    """The rate-distortion plane of the best checkpoints and its Pareto front; None without a checkpoint."""
    rate, distortion = rate_and_distortion(metrics)
    points = [
        {
            "trial": row["trial"],
            "rate": row[rate],
            "distortion": row[distortion],
            "beta": experiments[row["trial"]].flat().get("objective.beta"),
            "latent_dim": experiments[row["trial"]].model.latent_dim,
            "pareto_front": row["pareto_front"],
            "end": "ranked" if row["rank"] is not None else "failed",
        }
        for row in table
        if is_finite(row.get(rate)) and is_finite(row.get(distortion))
    ]
    if not points:
        return None
    # a trial that diverged must not flatten all others: it lies on the edge
    spanned = [point for point in points if point["end"] == "ranked"] or points
    x = quantity("rate", f"{rate} (nats per image)", [point["rate"] for point in spanned])
    y = quantity("distortion", f"{distortion} (nats per image)", [point["distortion"] for point in spanned])
    shapes = {"domain": ["ranked", "failed"], "range": ["circle", "cross"]}
    front = {
        "name": "front",
        "transform": [{"filter": {"field": "pareto_front", "equal": True}}],
        "mark": {"type": "line", "color": "var(--muted)", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": y, "order": {"field": "rate", "type": "quantitative"}},
    }
    marks = {
        "name": "points",
        "mark": {"type": "point", "filled": True, "opacity": 0.95, "stroke": "var(--paper)", "strokeWidth": 1},
        "encoding": {
            "x": x,
            "y": y,
            "shape": {"field": "end", "type": "nominal", "legend": None, "scale": shapes},
            "color": color_scale("beta", "beta", [point["beta"] for point in points], log=True),
            "size": size_scale("latent_dim", "latent_dim", [point["latent_dim"] for point in points]),
            "tooltip": _tooltip(tooltip_columns),
        },
    }
    return {
        **BASE_SPEC,
        "description": f"{distortion} by {rate}, a point a trial, and the Pareto front",
        "data": {"values": points},
        "transform": [_lookup(table, tooltip_columns)],
        "layer": [front, marks],
    }


def _end(record: TrialRecord, best: str | None) -> str:
    if record.name == best:
        return "best"
    return "failed" if record.failed else record.state


def best_trial(table: Rows) -> str | None:
    """The trial of the first rank; None if none was ranked."""
    return next((row["trial"] for row in table if row["rank"] is not None), None)


def _lookup(table: Rows, tooltip_columns: Sequence[str]) -> Spec:
    """Joins to a trial's data what its tooltip says."""
    columns = ["trial", "state", *tooltip_columns]
    values = [
        {"trial": row["trial"], **{f"told{n}": shown(row.get(column)) for n, column in enumerate(columns)}}
        for row in table
    ]
    fields = [f"told{n}" for n in range(len(columns))]
    return {"lookup": "trial", "from": {"data": {"values": values}, "key": "trial", "fields": fields}}


def _tooltip(tooltip_columns: Sequence[str]) -> list[Spec]:
    columns = ["trial", "state", *tooltip_columns]
    return [{"field": f"told{n}", "type": "nominal", "title": title} for n, title in enumerate(columns)]
