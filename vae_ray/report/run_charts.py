"""The charts of a run's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vae_ray.evaluation.diagnosis import INFORMATIVE_NATS
from vae_ray.report.charts import BASE_SPEC, RAMP, TOOLTIP, Spec, curves, quantity, trimmed
from vae_ray.report.examination import Examination
from vae_ray.report.latent_map import LatentMap
from vae_ray.report.text import as_text

SPLIT_COLORS = {"train": "var(--muted)", "val": "var(--accent)", "test": "var(--failed)"}
TERMS = ("nelbo", "distortion", "rate")
MOST_BARS = 200
MOST_CLASSES = 20
"""Labels of more values are drawn as numbers, from low to high."""
MAP = "map"
"""The data set that the maps share."""


def learning_curves(history: Sequence[Mapping[str, Any]], best_epoch: int | None) -> dict[str, Spec]:
    """A chart of each term of the ELBO, with a line for each split and a rule at the best epoch."""
    specs = {}
    for term in TERMS:
        points: list[Spec] = []
        for split in SPLIT_COLORS:
            points += _curve(history, f"{split}/{term}", split)
        if not points:
            continue
        values = trimmed(f"run/{term}", [point["value"] for point in points])
        points = [{**point, "value": value} for point, value in zip(points, values, strict=True)]
        splits = [split for split in SPLIT_COLORS if any(point["series"] == split for point in points)]
        scale = {"domain": splits, "range": [SPLIT_COLORS[split] for split in splits]}
        color = {"field": "series", "type": "nominal", "title": None, "scale": scale}
        description = f"{term} of each split by epoch"
        spec = curves(points, series="series", title=f"{term} (nats per image)", description=description, color=color)
        spec["height"] = 280
        if best_epoch is not None:
            rule = {
                "name": "best",
                "data": {"values": [{"epoch": best_epoch}]},
                "mark": {"type": "rule", "color": "gray", "strokeDash": [4, 4]},
                "encoding": {"x": spec["layer"][0]["encoding"]["x"]},
            }
            spec["layer"] = [rule, *spec["layer"]]
        specs[f"curves-{term}"] = spec
    return specs


def setting_curves(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Spec]:
    """A chart of each setting, the learning rate for example, that is not the same in all epochs."""
    specs = {}
    for name in names:
        points = _curve(history, name, name)
        if len({point["value"] for point in points}) < 2:
            continue
        color = {"value": SPLIT_COLORS["val"]}
        spec = curves(points, series="series", title=name, description=f"{name} by epoch", color=color)
        specs[f"settings-{name}"] = {**spec, "height": 160}
    return specs


def _curve(history: Sequence[Mapping[str, Any]], key: str, series: str) -> list[Spec]:
    numbers = [(record["epoch"], record.get(key)) for record in history]
    found = [(epoch, value) for epoch, value in numbers if isinstance(value, int | float) and math.isfinite(value)]
    return [
        {
            "series": series,
            "epoch": epoch,
            "value": value,
            "is_last": number == len(found),
            "tooltip": {"epoch": str(epoch), key: as_text(value)},
        }
        for number, (epoch, value) in enumerate(found, 1)
    ]


def rates_by_dimension(names: Sequence[str], rates: Sequence[float], variances: Sequence[float]) -> Spec:
    """A bar for the mean rate of each latent dimension or channel, largest first, at most `MOST_BARS`."""
    order = sorted(range(len(rates)), key=lambda d: -rates[d])[:MOST_BARS]
    are_same = len(variances) == len(rates)  # of a spatial latent variances are by element
    points = [
        {
            "dimension": names[d],
            "rate": rates[d],
            "kind": "informative" if rates[d] >= INFORMATIVE_NATS else f"below {INFORMATIVE_NATS} nats",
            "tooltip": {
                "dimension": names[d],
                "rate": f"{rates[d]:.4g} nats",
                **({"variance of the mean": f"{variances[d]:.4g}"} if are_same else {}),
            },
        }
        for d in order
    ]
    kinds = ["informative", f"below {INFORMATIVE_NATS} nats"]
    scale = {"domain": kinds, "range": ["var(--accent)", "var(--failed)"]}
    has_both = len({point["kind"] for point in points}) > 1
    color = {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": scale,
        **({} if has_both else {"legend": None}),
    }
    axis = {"labelAngle": -90 if len(points) > 12 else 0, "labelOverlap": True, "ticks": False}
    return {
        **BASE_SPEC,
        "height": 240,
        "description": "the mean rate of each latent dimension",
        "data": {"values": points},
        "mark": {"type": "bar", "tooltip": TOOLTIP},
        "encoding": {
            "x": {"field": "dimension", "type": "nominal", "sort": None, "title": None, "axis": axis},
            "y": {"field": "rate", "type": "quantitative", "title": "rate (nats per image)"},
            "color": color,
        },
    }


def map_points(examination: Examination, maps: Sequence[LatentMap]) -> list[Spec]:
    """A row for each image: its place on every map, its labels as `label0`, ..., and its tooltip, which shows it."""
    rows = []
    for n, thumbnail in enumerate(examination.thumbnails):
        row: Spec = {
            f"{axis}{m}": float(each.positions[n, i]) for m, each in enumerate(maps) for i, axis in enumerate("xy")
        }
        tooltip = {}
        for number, (name, values) in enumerate(examination.labels.items()):
            row[f"label{number}"] = text = _label(values[n].item(), examination.names.get(name, []))
            tooltip[name] = as_text(text)
        tooltip["squared error"] = f"{examination.squared_errors[n]:.4g}"
        rows.append({**row, "tooltip": {**tooltip, "image": thumbnail}})
    return rows


def _label(value: Any, names: Sequence[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def latent_map(number: int, title: str, axes: tuple[str, str], colors: Mapping[str, Spec]) -> Spec:
    """The `number`-th map of the shared points; `colors` are what they can be coloured by, at first by the first."""
    return {
        **BASE_SPEC,
        "height": 520,
        "description": f"{title} of the codes of test images",
        "data": {"name": MAP},
        "usermeta": {"colors": dict(colors)},
        "mark": {"type": "circle", "size": 28, "opacity": 0.8, "tooltip": {"expr": "datum.tooltip"}},
        "encoding": {
            "x": {**quantity(f"x{number}", axes[0]), "axis": {"tickCount": 4, "grid": False}},
            "y": {**quantity(f"y{number}", axes[1]), "axis": {"tickCount": 4, "grid": False}},
            "color": next(iter(colors.values()), {"value": RAMP["range"][0]}),
        },
    }


def label_colors(rows: Sequence[Spec], names: Sequence[str]) -> dict[str, Spec]:
    """The encoding of each label by its name: few values as classes, many as numbers, if they are."""
    colors = {}
    for number, name in enumerate(names):
        field = f"label{number}"
        values = {row[field] for row in rows}
        if len(values) < 2:
            continue
        if len(values) > MOST_CLASSES and not any(isinstance(value, str) for value in values):
            colors[name] = quantity(field, name, **RAMP)
            continue
        scheme = "tableau10" if len(values) <= 10 else "tableau20"
        colors[name] = {
            "field": field,
            "type": "nominal",
            "title": name,
            "scale": {"domain": sorted(values, key=lambda value: (isinstance(value, str), value)), "scheme": scheme},
            "legend": {"columns": 5} if len(values) <= MOST_CLASSES else None,
        }
    return colors
