"""The search space of a sweep: dotted keys of the Experiment, each with the values it may take.

Plain data, as in `{"optim.lr": {"loguniform": [1e-4, 1e-2]}, "model.latent_dim": {"choice": [2, 10, 20]}}`. What a
trial draws depends on the seed, the space and the trial's number alone, never on the order in which trials run.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import qmc

from vae_ray.config.experiment import Experiment, canonical_key, is_place_key
from vae_ray.config.keys import did_you_mean
from vae_ray.errors import UserError
from vae_ray.seeds import stream
from vae_ray.storage.locations import local_path
from vae_ray.storage.reading import read_yaml, short_repr

SEARCH_DIR = Path(__file__).parents[1] / "config" / "searches"
SIGNIFICANT_DIGITS = 4
"""Sampled numbers are rounded, so that they can be read, compared and typed."""
INCOMPARABLE = {
    "data.num_validation": "each trial would be measured on other images",
    "model.condition": "-log p(x) and -log p(x | label) are different quantities",
    "likelihood.name": "likelihoods measure images in different units (probabilities and densities)",
    "run.seed": "each trial would have other noise and another validation split (--repeats has several seeds for each)",
}
"""Keys that cannot be searched, and why nats of their values do not compare."""
SEARCHABLE_DATA = ("data.augment", "data.window_mib")
"""Of `data` the keys that change the training alone; any other would give each trial other images."""


@dataclass(frozen=True)
class Values:
    """A finite set of values; `is_grid` ones are gone through in turn instead of drawn."""

    values: tuple[Any, ...]
    is_grid: bool

    def at(self, u: float) -> Any:
        """The value at `u` in [0, 1)."""
        return self.values[int(u * len(self.values))]

    def rounded(self, value: Any) -> Any:
        return value

    def boundary_values(self) -> Sequence[Any]:
        """Values that are valid if, and only if, all are."""
        return self.values

    def size(self) -> float:
        """How many values there are."""
        return len(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, evenly spread on a plain or a logarithmic scale."""

    low: float
    high: float
    log: bool
    integer: bool

    def at(self, u: float) -> float | int:
        """The number at `u` in [0, 1)."""
        # an integer owns the unit interval around it
        half = 0.5 if self.integer else 0.0
        low, high = self.low - half, self.high + half
        if self.log:
            return self.rounded(math.exp(math.log(low) + (math.log(high) - math.log(low)) * u))
        return self.rounded(low + (high - low) * u)

    def rounded(self, value: float) -> float | int:
        """The number inside the range nearest to `value`, of few digits."""
        if self.integer:
            return min(max(round(value), int(self.low)), int(self.high))
        return min(max(float(f"{value:.{SIGNIFICANT_DIGITS}g}"), self.low), self.high)

    def boundary_values(self) -> Sequence[Any]:
        """Values that are valid if, and only if, all are: both ends and a fraction."""
        if self.integer:
            return [int(self.low), int(self.high)]
        return [self.low, self.high, math.nextafter(self.high, self.low)]

    def size(self) -> float:
        """How many numbers there are: infinitely many, or those of a range of integers."""
        return self.high - self.low + 1 if self.integer else math.inf


Domain = Values | Range


DOMAIN_TYPES = ("choice", "grid", "uniform", "loguniform", "int", "logint")


def _domain(kind: str, arguments: Any) -> Domain:
    """The domain of one of `DOMAIN_TYPES`; raises `ValueError` with what is allowed."""
    if kind in ("choice", "grid"):
        if not isinstance(arguments, list) or not arguments:
            raise ValueError("should be a list of values, for example [2, 10, 20]")
        return Values(tuple(arguments), is_grid=kind == "grid")
    is_log, is_integer = kind.startswith("log"), kind.endswith("int")
    try:
        low, high = map(float, arguments if isinstance(arguments, list) else ())
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    is_whole = low.is_integer() and high.is_integer()
    if not -math.inf < low < high < math.inf or (is_log and low <= 0) or (is_integer and not is_whole):
        numbers = f"two {'whole ' if is_integer else ''}numbers{' above 0' if is_log else ''}"
        example = "[1, 64]" if is_integer else "[1.0e-4, 1.0e-2]"
        raise ValueError(f"should be {numbers}, the smaller first, for example {example}")
    return Range(low, high, log=is_log, integer=is_integer)


@dataclass(frozen=True)
class SearchSpace:
    """What a sweep varies."""

    domains: dict[str, Domain]
    source: dict[str, Any]
    """The plain data it was made from."""

    @classmethod
    def load(cls, name: str) -> SearchSpace:
        """The space that ships under `name`, or that of a YAML file; raises `UserError`."""
        file = local_path(name, key="search")
        if name in search_names():
            file = SEARCH_DIR / f"{name}.yaml"
        elif not (name.endswith((".yaml", ".yml")) or "/" in name or os.path.isfile(file)):
            raise UserError(f"search: {name!r} does not exist; {did_you_mean(name, search_names())}")
        return cls.from_dict(read_yaml(file, label=f"search: {name}"))

    @classmethod
    def from_dict(cls, content: object) -> SearchSpace:
        """The space of plain data; raises `UserError` naming the key, what it has and what is allowed."""
        if not isinstance(content, Mapping) or not content:
            raise UserError("search: should be a mapping such as {optim.lr: {loguniform: [1.0e-4, 1.0e-2]}}")
        domains, source = dict[str, Domain](), dict[str, Any]()
        for key, value in content.items():
            name = canonical_key(str(key))
            if name in domains:
                raise UserError(f"search: {name}: is there twice; name it once")
            if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in DOMAIN_TYPES:
                raise UserError(
                    f"search: {name}: got {short_repr(value)}, should be one of {', '.join(DOMAIN_TYPES)} with its "
                    f"values; for example {{{name}: {{choice: [1, 2]}}}}"
                )
            ((kind, arguments),) = value.items()
            try:
                domains[name], source[name] = _domain(kind, arguments), dict(value)
            except ValueError as error:
                raise UserError(f"search: {name}: {kind}: got {short_repr(arguments)}, {error}") from None
        return cls(domains, source)

    def checked(self, experiment: Experiment) -> SearchSpace:
        """The space with its values as the Experiment reads them; raises `UserError` for one that is not valid."""
        domains = {key: _checked(key, domain, experiment) for key, domain in self.domains.items()}
        return SearchSpace(domains, self.source)

    def rounded(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with all numbers of the space inside their ranges and of few digits."""
        return {**configuration, **{key: domain.rounded(configuration[key]) for key, domain in self.domains.items()}}

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """The overrides of the trial of that number (from 0): grids in turn, the rest quasi-random.

        A scrambled Sobol sequence: each draw is uniform, and few of them already cover the space evenly, where
        independent ones clump (Bousquet et al. 2017, arXiv:1706.03200).
        """
        grids = {key: domain for key, domain in self.domains.items() if isinstance(domain, Values) and domain.is_grid}
        points = list(itertools.product(*(domain.values for domain in grids.values())))
        drawn = dict(zip(grids, points[number % len(points)], strict=True))
        spread = sorted(self.domains.keys() - grids.keys())
        if spread:
            sequence = qmc.Sobol(len(spread), rng=stream(seed, "search"))
            if number:
                sequence.fast_forward(number)
            drawn |= {key: self.domains[key].at(float(u)) for key, u in zip(spread, sequence.random(1)[0], strict=True)}
        return {key: drawn[key] for key in self.domains}

    def draws(self, seed: int, seen: Iterable[Mapping[str, Any]] = ()) -> Iterator[dict[str, Any]]:
        """What is drawn for the numbers 0, 1, ..., without repetition and without the configurations in `seen`.

        A repetition is only drawn where a hundred draws in a row have found nothing else.
        """
        keys, numbers = {configuration_key(each) for each in seen}, itertools.count()
        while True:
            for _ in range(100):
                drawn = self.draw(seed, next(numbers))
                if configuration_key(drawn) not in keys:
                    break
            keys.add(configuration_key(drawn))
            yield drawn

    def size(self) -> float:
        """How many configurations there are."""
        return math.prod(domain.size() for domain in self.domains.values())

    def combinations(self, most: int) -> Iterator[dict[str, Any]]:
        """Every combination of the choices, with all ranges at their lower ends and at their upper ends.

        Of more than `most` combinations only so many that each value is in one.
        """
        for end in (0, 1):
            values = [
                domain.values if isinstance(domain, Values) else domain.boundary_values()[end : end + 1]
                for domain in self.domains.values()
            ]
            points: Iterable[tuple[Any, ...]] = itertools.product(*values)
            if math.prod(map(len, values)) > most:
                points = itertools.islice(zip(*map(itertools.cycle, values), strict=True), max(map(len, values)))
            yield from (dict(zip(self.domains, point, strict=True)) for point in points)

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the values; raises `UserError` for a range, which has infinitely many."""
        for key, domain in self.domains.items():
            if isinstance(domain, Range):
                raise UserError(
                    f"search: {key}: a range has no grid; name its values ({{grid: [...]}}) or use --searcher random"
                )
        values = [domain.boundary_values() for domain in self.domains.values()]
        return [dict(zip(self.domains, point, strict=True)) for point in itertools.product(*values)]


def _checked(key: str, domain: Domain, experiment: Experiment) -> Domain:
    if is_place_key(key):
        raise UserError(f"search: {key}: cannot be searched, it says where a trial runs and not what it computes")
    why = INCOMPARABLE.get(key)
    if why is None and key.startswith("data.") and key not in SEARCHABLE_DATA:
        why = "each trial would have other images"
    if why is not None:
        raise UserError(
            f"search: {key}: cannot be searched, {why}, so their nats do not compare; run a sweep for each value"
        )
    try:
        values = [scalar(experiment.with_overrides({key: value}).flat()[key]) for value in domain.boundary_values()]
    except UserError as error:
        raise UserError(f"search: {error}") from None
    if any(isinstance(value, str) and ":" in value for value in values):
        raise UserError(f"search: {key}: code of your own is named on the command line and cannot be searched")
    if isinstance(domain, Range):
        return domain
    if len(set(values)) < len(values):
        raise UserError(f"search: {key}: got {list(domain.values)!r}, names a value twice")
    return Values(tuple(values), domain.is_grid)


def configuration_key(overrides: Mapping[str, Any]) -> str:
    """Equal for equal configurations."""
    return json.dumps(overrides, sort_keys=True)


def search_names() -> list[str]:
    """Names of the search spaces that ship with the package."""
    return sorted(path.stem for path in SEARCH_DIR.glob("*.yaml"))


def scalar(value: Any) -> Any:
    """Lists as the text that the Experiment reads again: Tune, Optuna and tables take scalars."""
    return json.dumps(value) if isinstance(value, list) else value
