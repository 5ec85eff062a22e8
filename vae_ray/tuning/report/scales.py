"""Where values stand on the axes of the report's charts, and in which colour and size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vae_ray.tuning.space import Domain, Values

Spec = dict[str, Any]

# From low to high; told apart on light and on dark paper and by most colour-blind eyes.
RAMP = ["#2f7ff0", "#b453c9", "#f2930d"]
MOST_TICKS = 6
OUTLIER = 5
"""A value is an outlier beyond this multiple of what nine tenths of them span."""


class Axis(NamedTuple):
    """One of the parallel coordinates."""

    title: str
    at: Callable[[Any], float]
    """Where a value stands, from 0 to 1."""
    ticks: list[tuple[float, str]]


def key_axis(key: str, domain: Domain, found: Sequence[Any]) -> Axis:
    """The axis of a searched key: its range, or its values evenly spread; `found` are those that trials had."""
    title = key.rpartition(".")[2]
    if not isinstance(domain, Values):
        return number_axis(f"{title} (log)" if domain.log else title, domain.low, domain.high, log=domain.log)
    values = list(dict.fromkeys([*domain.values, *found]))
    if all(isinstance(value, int | float) for value in values):
        values.sort()
    places = {value: (position + 0.5) / len(values) for position, value in enumerate(values)}
    return Axis(title, places.__getitem__, [(place, shown(value)) for value, place in places.items()])


def number_axis(title: str, low: float, high: float, *, log: bool) -> Axis:
    """The axis of numbers from `low` to `high`; what lies beyond stands at its end."""
    scale: Callable[[float], float] = math.log if log else float

    def at(value: float) -> float:
        return min(max((scale(value) - scale(low)) / (scale(high) - scale(low)), 0.0), 1.0)

    ticks = log_ticks(low, high) if log else even_ticks(low, high)
    return Axis(title, at, [(at(tick), shown(tick)) for tick in ticks])


def quantity(field: str, title: str, values: Sequence[float]) -> Spec:
    """An axis for `values`; what lies beyond it is drawn on its edge."""
    scale = {"domain": list(span(values)), "zero": False, "nice": False, "clamp": True}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": {"tickCount": 8}}


def color_scale(field: str, title: str, values: Sequence[float | None], *, log: bool) -> Spec:
    """From the lowest to the highest value; one colour if all are equal, or if there is none."""
    numbers = [value for value in values if value is not None]
    if len(set(numbers)) < 2:
        return {"value": RAMP[0]}
    low, high = min(numbers), max(numbers)
    # a beta of 0 has its place too: symlog is the logarithm above `constant` and even below
    constant = min((value for value in numbers if value > 0), default=1.0)
    if not log:
        scale: Spec = {"type": "linear", "domain": [low, (low + high) / 2, high]}
    elif low > 0:
        scale = {"type": "log", "domain": [low, math.sqrt(low * high), high]}
    else:
        middle = constant * math.expm1(math.log1p(high / constant) / 2)
        scale = {"type": "symlog", "constant": constant, "domain": [low, middle, high]}
    ticks = log_ticks(constant, high) if log else even_ticks(low, high)
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": {**scale, "range": RAMP, "interpolate": "lab", "clamp": True},
        "legend": {"values": [low, *ticks] if log and low <= 0 else ticks},
    }


def size_scale(field: str, title: str, values: Sequence[int]) -> Spec:
    """Areas of points, logarithmic in the value; one size if all are equal."""
    distinct = sorted(set(values))
    if len(distinct) == 1:
        return {"value": 130}
    legend = distinct if len(distinct) <= MOST_TICKS else log_ticks(distinct[0], distinct[-1])
    scale = {"type": "log", "domain": [distinct[0], distinct[-1]], "range": [80, 480], "nice": False}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "legend": {"values": legend}}


def span(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis for `values`, with a margin."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or max(0.05 * abs(low), 0.5)
    return low - margin, high + margin


def trimmed(metric: str, values: Sequence[float]) -> list[float]:
    """The values without outliers upwards, set to `OUTLIER`: a trial that diverges must not flatten all others.

    A high rate is none: most trials may have collapsed to a rate of 0, and then the others are what matters.
    """
    ordered = sorted(values)
    low, most = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
    limit = low + OUTLIER * (most - low) if most > low and not metric.endswith("/rate") else math.inf
    return [min(value, limit) for value in values]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, evenly spread on a logarithmic scale."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{mantissa}e{decade}") for decade in decades for mantissa in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= MOST_TICKS:
            break
    ticks = ticks[:: -(-len(ticks) // MOST_TICKS) or 1]
    return ticks if len(ticks) > 1 else [low, high]


def even_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, evenly spread."""
    least = (high - low) / MOST_TICKS
    decade = math.floor(math.log10(least))
    step = next(step for m in (1, 2, 5, 10) if (step := m * 10.0**decade) >= least)
    decimals = max(0, 1 - decade)
    return [round(n * step, decimals) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def is_finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def shown(value: object) -> str:
    """A value as people read it: numbers to six digits, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
