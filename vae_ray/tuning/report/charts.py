"""The charts of a sweep's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vae_ray.report.charts import BASE_SPEC, RAMP, TOOLTIP, Spec, curves, lines, quantity, trimmed
from vae_ray.report.text import as_text, short_names
from vae_ray.tuning.configurations import Configuration
from vae_ray.tuning.leaderboard import rate_and_distortion
from vae_ray.tuning.metrics import better, curve_metrics, higher_is_better, with_its_unit
from vae_ray.tuning.report.trials import ReportTrial, first_keys, in_order
from vae_ray.tuning.space import Domain, SearchSpace, Values

STATE_COLORS = {
    "best": "var(--accent)",
    "finished": "var(--muted)",
    "stopped": "var(--faint)",
    "pending": "var(--faint)",
    "failed": "var(--failed)",
}

SEED_COLORS = {"best": "var(--accent)", "complete": "var(--muted)", "incomplete": "var(--failed)"}
MOST_CONFIGURATIONS = 40
ROW_PIXELS = 26
"""Of a chart with a row for each configuration."""


def sweep_charts(
    trials: Sequence[ReportTrial],
    entries: Sequence[ReportTrial],
    space: SearchSpace,
    metrics: Sequence[str],
    rungs: Sequence[int],
) -> dict[str, Spec]:
    """Specifications by the id of their element, without empty charts.

    `trials` and the `entries` of the leaderboard, which are the same without repeats, are in its order.
    """
    ranked = [entry for entry in entries[::-1] if entry.row["rank"] is not None]  # the best is drawn over the others
    specs = {
        f"curves-{number}": learning_curves(trials[::-1], metric, rungs)
        for number, metric in enumerate(curve_metrics(metrics))
    }
    if ranked:
        specs["parallel"] = parallel_coordinates(ranked, space, metrics)
        specs["plane"] = rate_distortion(ranked, space, metrics)
    return {name: spec for name, spec in specs.items() if spec["data"]["values"]}


def seed_charts(configurations: Sequence[Configuration], metrics: Sequence[str]) -> dict[str, Spec]:
    """The values by seed of ranked configurations, a chart for each metric; none without repeats."""
    measured = [each for each in configurations if not each.failed][:MOST_CONFIGURATIONS]
    return {f"seeds-{number}": values_by_seed(measured, metric) for number, metric in enumerate(metrics) if measured}


def values_by_seed(configurations: Sequence[Configuration], metric: str) -> Spec:
    """A row for each configuration, the best at the top: its seeds as points, its mean, and the mean's interval.

    The axis is that of the values: of two seeds the interval may be ten times as long, and is cut.
    """
    points: list[Spec] = []
    for place, each in enumerate(configurations):
        state = "incomplete" if not each.is_complete else "complete" if place else "best"
        values, mean, interval = each.values(metric), each.value(metric), each.interval(metric)
        row = {"configuration": each.name, "state": state}
        summary = {"configuration": each.name, "seeds": str(len(values)), f"mean {metric}": as_text(mean)}
        if interval is not None:
            low, high = interval
            summary["95 % interval"] = f"{as_text(low)} to {as_text(high)}"
            points.append({**row, "kind": "interval", "value": low, "high": high, "tooltip": summary})
        for record in each.measured:
            value = values[record.seed]
            tooltip = {"trial": record.name, "seed": str(record.seed), metric: as_text(value)}
            points.append({**row, "kind": "seed", "value": value, "tooltip": tooltip})
        points.append({**row, "kind": "mean", "value": mean, "tooltip": summary})
    x = quantity(
        "value", f"{with_its_unit(metric, per_image=True)}, {better([metric])}", domain=_domain_of_seeds(metric, points)
    )
    states = [state for state in SEED_COLORS if any(point["state"] == state for point in points)]
    color = {"domain": states, "range": [SEED_COLORS[state] for state in states]}
    marks: dict[str, Spec] = {
        "interval": {"type": "rule", "strokeWidth": 2},
        "seed": {"type": "point", "size": 60, "opacity": 1},
        "mean": {"type": "tick", "thickness": 3, "size": 18, "opacity": 1},
    }
    return {
        **BASE_SPEC,
        "height": ROW_PIXELS * len(configurations),
        "description": f"{metric} of each configuration by seed, their means, and 95 % intervals of the means",
        "data": {"values": points},
        "encoding": {
            "x": x,
            "y": {"field": "configuration", "type": "nominal", "sort": None, "title": None},
            "color": {"field": "state", "type": "nominal", "title": None, "scale": color},
        },
        "layer": [
            {
                "name": f"{kind}s",
                "transform": [{"filter": f"datum.kind === '{kind}'"}],
                "mark": {**mark, "clip": True, "tooltip": TOOLTIP},
                **({"encoding": {"x2": {"field": "high"}}} if kind == "interval" else {}),
            }
            for kind, mark in marks.items()
        ],
    }


def _domain_of_seeds(metric: str, points: Sequence[Spec]) -> list[float]:
    """The ends of the axis: all values, and of the intervals at most half as much beside them."""
    values = _trimmed(metric, [point["value"] for point in points if point["kind"] == "seed"])
    intervals = [point for point in points if point["kind"] == "interval"]
    room = (max(values) - min(values)) / 2 or 0.5
    low = max(min(values) - room, min([*values, *(each["value"] for each in intervals)]))
    high = min(max(values) + room, max([*values, *(each["high"] for each in intervals)]))
    return [low - room / 10, high + room / 10]


def learning_curves(trials: Sequence[ReportTrial], metric: str, rungs: Sequence[int]) -> Spec:
    """`metric` by epoch: a line for each trial with a mark at its end, and a rule at each rung."""
    points: list[Spec] = []
    for trial in trials:
        state = "best" if trial.is_best else "failed" if trial.record.failed else trial.record.state
        curve = [
            _point(trial, end=state, epoch=epoch["epoch"], value=epoch[metric])
            for epoch in trial.record.history
            if math.isfinite(epoch.get(metric, math.nan))
        ]
        points += [{**point, "is_last": point is curve[-1]} for point in curve]
    values = trimmed(metric, [point["value"] for point in points])
    points = [{**point, "value": value} for point, value in zip(points, values, strict=True)]
    states = [state for state in STATE_COLORS if any(point["end"] == state for point in points)]
    end = {"field": "end", "type": "nominal", "title": None, "scale": {"domain": states}}
    color = {**end, "scale": {"domain": states, "range": [STATE_COLORS[state] for state in states]}}
    spec = curves(
        points,
        series="trial",
        title=with_its_unit(metric, per_image=True),
        description=f"{metric} of each trial by epoch",
        color=color,
        shape=end,
    )
    if rungs:
        rule = {
            "name": "rungs",
            "data": {"values": [{"epoch": rung} for rung in rungs]},
            "mark": {"type": "rule", "color": "gray", "strokeDash": [4, 4]},
            "encoding": {"x": spec["layer"][0]["encoding"]["x"]},
        }
        spec["layer"] = [rule, *spec["layer"]]
    return spec


def parallel_coordinates(trials: Sequence[ReportTrial], space: SearchSpace, metrics: Sequence[str]) -> Spec:
    """A line for each ranked trial through its searched values and its metrics."""
    points, labels = [], []
    colors = _trimmed(metrics[0], [trial.row[metrics[0]] for trial in trials])
    for column, domain in {**space.domains, **dict.fromkeys(metrics)}.items():
        positions, texts = _axis(column, [trial.row[column] for trial in trials], domain)
        points += [
            _point(trial, axis=column, position=position, value=value)
            for trial, position, value in zip(trials, positions, colors, strict=True)
        ]
        labels += [{"axis": column, "position": position, "label": text} for text, position in texts.items()]
    axis = {"orient": "top", "labelAngle": 0, "labelPadding": 14, "domain": False, "ticks": False, "grid": True}
    x = {"field": "axis", "type": "nominal", "sort": None, "title": None, "axis": axis}
    y = {"field": "position", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1]}}
    color = quantity("value", with_its_unit(metrics[0]), **RAMP, reverse=higher_is_better(metrics[0]))
    label = {
        "name": "labels",
        "data": {"values": labels},
        "mark": {"type": "text", "align": "right", "dx": -6},
        "encoding": {"x": x, "y": y, "text": {"field": "label"}},
    }
    return {
        **BASE_SPEC,
        "description": "The searched values and the metrics of each ranked trial, an axis for each",
        "data": {"values": points},
        "layer": [*lines(x, y, color, series="trial"), label],
    }


def _axis(column: str, values: Sequence[Any], domain: Domain | None) -> tuple[list[float], dict[str, float]]:
    """The positions of `values` from 0 to 1, and those of the labels; `domain` is None for a metric.

    The values of a choice are evenly spread. An axis of numbers goes from the lowest to the highest, with labels at its
    ends and in the middle.
    """
    if isinstance(domain, Values):
        distinct = list(dict.fromkeys([*domain.values, *values]))
        if all(isinstance(value, int | float) for value in distinct):
            distinct.sort()
        places = {value: (number + 0.5) / len(distinct) for number, value in enumerate(distinct)}
        return [places[value] for value in values], {as_text(value): place for value, place in places.items()}
    scale, inverse = (math.log, math.exp) if domain is not None and domain.log else (float, float)
    numbers = [scale(value) for value in (values if domain else _trimmed(column, values))]
    low, high = min(numbers), max(numbers)
    texts = {f"{inverse(low + place * (high - low)):.4g}": place for place in (1.0, 0.5, 0.0)}  # equal ones: at 0
    return [(number - low) / ((high - low) or 1) for number in numbers], texts


def rate_distortion(trials: Sequence[ReportTrial], space: SearchSpace, metrics: Sequence[str]) -> Spec:
    """The rate-distortion plane of the ranked trials, and its Pareto front.

    Size is latent_dim and color is beta, or the first other key whose values differ.
    """
    rate, distortion = rate_and_distortion(metrics)
    others = [key for key in first_keys(space.domains) if key != "model.latent_dim"]
    varying = [key for key in others if len({as_text(trial.values([key]).get(key)) for trial in trials}) > 1]
    colors = [trial.values(varying[:1]).get(varying[0]) if varying else None for trial in trials]
    numbers = [color for color in colors if isinstance(color, int | float) and not isinstance(color, bool)]
    are_numbers = len(numbers) == len(colors)
    points = [
        _point(
            trial,
            rate=trial.row[rate],
            distortion=trial.row[distortion],
            latent_dim=trial.experiment.model.latent_dim,
            color=color if are_numbers else as_text(color),
            pareto_front=trial.row["pareto_front"],
        )
        for trial, color in zip(trials, colors, strict=True)
    ]
    encoding: Spec = {}
    if len({point["latent_dim"] for point in points}) > 1:
        encoding["size"] = quantity("latent_dim", "latent_dim", range=[60, 480])
    if varying:
        title = short_names(space.domains)[varying[0]]
        if are_numbers:
            encoding["color"] = quantity("color", title, **RAMP, **({"type": "log"} if min(numbers) > 0 else {}))
        else:
            domain = list(dict.fromkeys(as_text(color) for color in sorted(colors, key=in_order)))
            encoding["color"] = {"field": "color", "type": "nominal", "title": title, "scale": {"domain": domain}}
    front = {
        "name": "front",
        "transform": [{"filter": "datum.pareto_front"}],
        "mark": {"type": "line", "color": "gray", "strokeWidth": 1.5},
        "encoding": {"order": {"field": "rate", "type": "quantitative"}},
    }
    marks = {
        "name": "points",
        "mark": {"type": "point", "filled": True, "size": 130, "color": RAMP["range"][0], "tooltip": TOOLTIP},
        "encoding": encoding,
    }
    return {
        **BASE_SPEC,
        "description": f"{distortion} by {rate}, a point for each ranked trial, and the Pareto front",
        "data": {"values": points},
        "encoding": {
            "x": quantity("rate", f"{rate} (nats per image)"),
            "y": quantity("distortion", f"{distortion} (nats per image)"),
        },
        "layer": [front, marks],
    }


def _trimmed(metric: str, values: Sequence[float]) -> list[float]:
    """The values, cut where one that diverges would flatten the others; where high ones are the best, none is."""
    return list(values) if higher_is_better(metric) else trimmed(metric, values)


def _point(trial: ReportTrial, **values: Any) -> Spec:
    return {"trial": trial.record.name, "is_best": trial.is_best, "tooltip": trial.tooltip, **values}
