"""What was obtained for a stage of an entry, beside its references; kept as JSON, one file a stage."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from vae_ray.errors import CorruptFile, one_line
from vae_ray.evaluation.result import half_interval
from vae_ray.evaluation.table import with_unit
from vae_ray.reproduction.measurement import Measured
from vae_ray.reproduction.registry import Entry, Stage, Target
from vae_ray.storage.directory import open_directory
from vae_ray.storage.reading import parse_json
from vae_ray.storage.records import verify, with_checksum


class Obtained(NamedTuple):
    """One target, and what was obtained for it."""

    target: Target
    value: float
    """The mean over seeds."""
    half_width: float | None
    """Of the interval, or the standard error; None where there is neither."""
    over: Literal["seeds", "images", ""]
    """seeds: half a 95 % interval of the mean by Student's t; images: the standard error of the one seed's value."""
    by_seed: list[float]

    @property
    def deviation(self) -> float | None:
        """The value minus the reference."""
        return None if self.target.reference is None else self.value - self.target.reference

    @property
    def is_reproduced(self) -> bool | None:
        """Whether the value is within the tolerance, or its interval on the published side of the reference.

        None without a reference, and where the interval contains the reference of a side.
        """
        target, deviation = self.target, self.deviation
        if deviation is None:
            return None
        if target.tolerance is not None:
            return abs(deviation) <= target.tolerance
        quantile = 1.96 if self.over == "images" else 1.0  # of the standard error; that of seeds is in the interval
        if abs(deviation) <= quantile * (self.half_width or 0.0):
            return None
        return (deviation < 0) == (target.side == "below")

    @property
    def verdict(self) -> str:
        """The same in words."""
        target, deviation = self.target, self.deviation
        if deviation is None or target.reference is None:
            return "nothing published of it"
        if target.tolerance is None:
            reference = with_unit(target.metric, target.reference)
            if self.is_reproduced is None:
                return f"not decided: the 95 % interval contains {reference}; more seeds narrow it"
            return f"{'is' if self.is_reproduced else 'is not'} {target.side} {reference}, as published"
        side = "above" if deviation > 0 else "below"
        where = "within" if self.is_reproduced else "outside of"
        return f"{abs(deviation):.2f} {side} the reference, {where} the tolerance of {target.tolerance:g}"

    @property
    def text(self) -> str:
        """The value with its interval, and the interval's meaning."""
        value = with_unit(self.target.metric, self.value, self.half_width)
        meaning = {"seeds": f" (95 % over {len(self.by_seed)} seeds)", "images": " (over images)", "": ""}
        return value + meaning[self.over]


class Outcome(NamedTuple):
    """A stage of an entry as it was reproduced."""

    entry: str
    stage: int
    """From 1."""
    seeds: list[int]
    obtained: list[Obtained]
    labels: dict[str, dict[str, Any]]
    """Of the evaluations of the first seed, by run and split."""
    warnings: list[str]
    """Of these evaluations."""
    training_seconds: float
    """Of all runs and seeds, as their records say."""
    command: str
    machine: dict[str, Any]
    date: str

    @property
    def is_reproduced(self) -> bool:
        """Whether no target is outside of its tolerance, or on the other side; what is not decided may be."""
        return all(each.is_reproduced is not False for each in self.obtained)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, with the verdicts for those who read the file."""
        obtained = [
            {
                **each.target.model_dump(exclude_none=True, exclude={"why"}),
                **{name: value for name, value in each._asdict().items() if name != "target"},
                "is_reproduced": each.is_reproduced,
                "verdict": each.verdict,
            }
            for each in self.obtained
        ]
        return {**self._asdict(), "obtained": obtained}


def obtain(target: Target, by_seed: Sequence[Mapping[str, Measured]]) -> Obtained:
    """What the runs, of each seed by their names, say about a target."""
    values = [runs[target.run].value(target) for runs in by_seed]
    others = [None if target.minus is None else runs[target.minus].value(target) for runs in by_seed]
    numbers = [each.value - (0.0 if other is None else other.value) for each, other in zip(values, others, strict=True)]
    if len(numbers) > 1:
        return Obtained(target, statistics.mean(numbers), half_interval(numbers), "seeds", numbers)
    error = values[0].standard_error
    if others[0] is not None:
        error = _paired_error(values[0].by_image, others[0].by_image)
    return Obtained(target, numbers[0], error, "" if error is None else "images", numbers)


def _paired_error(one: Any, other: Any) -> float | None:
    """The standard error of a mean difference, by the differences of the same images."""
    if one is None or other is None or len(one) != len(other):
        return None
    return float(np.std(one - other, ddof=1)) / math.sqrt(len(one))


def file_name(entry: Entry, stage: int) -> str:
    """Of the JSON of a stage."""
    return f"{entry.name}.json" if len(entry.stages) == 1 else f"{entry.name}-stage-{stage}.json"


def keep_outcome(outcome: Outcome, entry: Entry, directory: str) -> None:
    """Write it into a directory or URI; an earlier one of the same stage is replaced. Raises `OSError`."""
    content = json.dumps(with_checksum(outcome.to_dict()), indent=2, ensure_ascii=False)
    open_directory(directory, key="--results").write(file_name(entry, outcome.stage), f"{content}\n".encode())


def kept_outcomes(entry: Entry, directory: str) -> list[Outcome]:
    """Those of an entry by stage; raises `UserError` for a damaged file."""
    found = (_read(entry, stage, number, directory) for number, stage in enumerate(entry.stages, start=1))
    return [outcome for outcome in found if outcome is not None]


def _read(entry: Entry, stage: Stage, number: int, directory: str) -> Outcome | None:
    name = file_name(entry, number)
    content = open_directory(directory, key="--results").read(name)
    if content is None:
        return None
    try:
        fields = verify(parse_json(content))
        obtained = [_obtained(stage, each) for each in fields["obtained"]]
        return Outcome(**{**fields, "obtained": obtained})
    except (ValueError, TypeError, KeyError, LookupError) as error:
        raise CorruptFile(
            f"{directory}/{name}: damaged, or of other targets than the entry's ({one_line(error)[:100]}); delete it "
            f"and run: vae-ray reproduce {entry.name}"
        ) from None


def _obtained(stage: Stage, content: Mapping[str, Any]) -> Obtained:
    """With the target of the registry: that of the file has no `why`, and its reference may have been corrected."""
    key = ("metric", "run", "minus", "epoch")
    (target,) = (each for each in stage.targets if all(getattr(each, name) == content.get(name) for name in key))
    return Obtained(target, *(content[name] for name in ("value", "half_width", "over", "by_seed")))
