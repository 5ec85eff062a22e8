"""What the charts of all pages share. They are Vega-Lite specifications, which the reader's browser draws.

Vega-Lite chooses scales, ticks and legends. Colours that are not data are set by the page's CSS, for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Spec = dict[str, Any]

BASE_SPEC: Spec = {
    "width": "container",
    "height": 340,
    "autosize": {"type": "fit-x", "contains": "padding"},
    "background": "transparent",
    "config": {
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {"labelFontSize": 12, "tickCount": 8},
        "legend": {
            "orient": "bottom",
            "layout": {"bottom": {"direction": "vertical", "anchor": "start"}},
            "labelFontSize": 12,
            "columns": 5,
            "padding": 12,
            "symbolFillColor": "gray",
        },
    },
}
# the datum of a Voronoi cell, by which Vega-Lite selects the nearest point, is that point
TOOLTIP = {"expr": "(datum.datum || datum).tooltip"}
# from low to high; both ends have contrast on white and on black
RAMP = {"range": ["#2f7ff0", "#f2930d"], "interpolate": "hcl"}


def curves(
    points: Sequence[Spec], *, series: str, title: str, description: str, color: Spec, shape: Spec | None = None
) -> Spec:
    """`value` by `epoch`: a line for each value of the field `series`, with a mark at its end.

    Each point also has `is_last`, of its line, and `tooltip`; it may have `is_best`, which makes its line thick.
    """
    whole_epochs = {"grid": False, "format": "d", "labelExpr": "datum.value % 1 ? '' : datum.label"}
    x = {"field": "epoch", "type": "quantitative", "axis": whole_epochs}
    ends = {"color": color, **({"shape": shape} if shape else {})}
    return {
        **BASE_SPEC,
        "description": description,
        "data": {"values": list(points)},
        "layer": lines(x, quantity("value", title), color, series=series, **ends),
    }


def lines(x: Spec, y: Spec, line_color: Spec, *, series: str, **end_marks: Spec) -> list[Spec]:
    """A line for each value of the field `series`, and points of which the nearest to the pointer shows its tooltip."""
    hovered = {"type": "point", "fields": [series], "on": "pointerover", "clear": "pointerout", "nearest": True}
    widths = [{"param": "hovered", "empty": False, "value": 4.5}, {"test": "datum.is_best", "value": 3}]
    width = {"condition": widths, "value": 1.5}
    opacity = {"condition": {"test": "datum.is_last", "value": 1}, "value": 0}
    return [
        {
            "name": "lines",
            "mark": "line",
            "encoding": {"x": x, "y": y, "color": line_color, "detail": {"field": series}, "strokeWidth": width},
        },
        {
            "name": "ends",
            "params": [{"name": "hovered", "select": hovered}],
            "mark": {"type": "point", "filled": True, "size": 80, "tooltip": TOOLTIP},
            "encoding": {"x": x, "y": y, **end_marks, "opacity": opacity},
        },
    ]


def quantity(field: str, title: str, **scale: Any) -> Spec:
    """The encoding of a number; its axis need not begin at 0."""
    if scale.get("type") != "log":  # which has no zero: Vega-Lite warns
        scale["zero"] = False
    return {"field": field, "type": "quantitative", "title": title, "scale": scale}


def trimmed(metric: str, values: Sequence[float]) -> list[float]:
    """The values, cut far above nine tenths of them, so that one that diverges does not flatten the others.

    No rate is cut: in a sweep where most trials collapsed to a rate of 0, the others are what matters.
    """
    if metric.endswith("/rate") or not values:
        return list(values)
    low, high = min(values), float(np.quantile(values, 0.9))
    limit = low + 5 * (high - low) if high > low else math.inf
    return [min(value, limit) for value in values]
