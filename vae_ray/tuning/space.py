"""The search space of a sweep: dotted keys of the Experiment, each with the values it may take.

Plain data, as in `{"optim.lr": {"loguniform": [1e-4, 1e-2]}, "model.latent_dim": {"choice": [2, 10, 20]}}`. What a
trial draws depends on the seed, the space and the trial's number alone, never on the order in which trials run.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import qmc

from vae_ray.config.experiment import Experiment, canonical_key, is_place_key
from vae_ray.errors import UserError, one_line
from vae_ray.seeds import stream
from vae_ray.storage.reading import parse_yaml, read_bytes, short_repr

SEARCH_DIR = Path(__file__).parents[1] / "config" / "searches"
SIGNIFICANT_DIGITS = 4
"""Sampled numbers are rounded, so that they can be read, compared and typed."""


@dataclass(frozen=True)
class Values:
    """A finite set of values; `is_grid` ones are gone through in turn instead of drawn."""

    values: tuple[Any, ...]
    is_grid: bool

    def at(self, u: float) -> Any:
        """The value at `u` in [0, 1)."""
        return self.values[int(u * len(self.values))]

    def boundary_values(self) -> Sequence[Any]:
        """Values that are valid if, and only if, all are."""
        return self.values


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
        value = math.exp(_between(math.log(low), math.log(high), u)) if self.log else _between(low, high, u)
        return self.rounded(value)

    def rounded(self, value: float) -> float | int:
        """The number as people will read it, inside the range."""
        if self.integer:
            return min(max(round(value), int(self.low)), int(self.high))
        return min(max(float(f"{value:.{SIGNIFICANT_DIGITS}g}"), self.low), self.high)

    def boundary_values(self) -> Sequence[Any]:
        """Values that are valid if, and only if, all are: both ends and, where there is one, a fraction."""
        inside = self.at(0.382)
        if not self.integer and float(inside).is_integer():
            inside = next((x for x in (inside + 0.5, inside - 0.5) if self.low <= x <= self.high), inside)
        return [self.at(0.0), self.at(math.nextafter(1, 0)), inside]


Domain = Values | Range


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _values(arguments: Any, *, is_grid: bool) -> Values:
    if not isinstance(arguments, list) or not arguments:
        raise ValueError("should be a list of values, for example [2, 10, 20]")
    if any(arguments.index(value) != position for position, value in enumerate(arguments)):
        raise ValueError("names a value twice")
    return Values(tuple(arguments), is_grid)


def _range(arguments: Any, *, log: bool = False, integer: bool = False) -> Range:
    example = "[1, 64]" if integer else "[1.0e-4, 1.0e-2]"
    if not isinstance(arguments, list) or len(arguments) != 2:
        raise ValueError(f"should be [low, high], for example {example}")
    try:
        low, high = (float(end) for end in arguments)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"should be two numbers, for example {example}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"should be a smaller and a larger number, for example {example}")
    if log and low <= 0:
        raise ValueError(f"should start above 0 on a logarithmic scale, for example {example}")
    if integer and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"should be whole numbers, for example {example}")
    return Range(low, high, log=log, integer=integer)


DOMAIN_TYPES: dict[str, Callable[[Any], Domain]] = {
    "choice": lambda values: _values(values, is_grid=False),
    "grid": lambda values: _values(values, is_grid=True),
    "uniform": _range,
    "loguniform": lambda ends: _range(ends, log=True),
    "int": lambda ends: _range(ends, integer=True),
    "logint": lambda ends: _range(ends, log=True, integer=True),
}


@dataclass(frozen=True)
class SearchSpace:
    """What a sweep varies."""

    domains: dict[str, Domain]
    source: dict[str, Any]
    """The plain data it was made from."""

    @classmethod
    def load(cls, name: str) -> SearchSpace:
        """The space that ships under `name`, or that of a YAML file; raises `UserError`."""
        if name in search_names():
            return cls.load(str(SEARCH_DIR / f"{name}.yaml"))
        if not (name.endswith((".yaml", ".yml")) or "/" in name or os.path.isfile(name)):
            near = difflib.get_close_matches(name, search_names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(search_names())} or a YAML file"
            raise UserError(f"search: {name!r} does not exist; {hint}")
        try:
            content = parse_yaml(read_bytes(Path(name)))
        except (OSError, ValueError) as error:
            raise UserError(f"search: {name}: cannot be read as YAML: {one_line(error)}") from None
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: object) -> SearchSpace:
        """The space of plain data; raises `UserError` naming the key, what it has and what is allowed."""
        if not isinstance(content, Mapping) or not content:
            raise UserError("search: should be a mapping such as {optim.lr: {loguniform: [1.0e-4, 1.0e-2]}}")
        domains = {}
        for key, value in content.items():
            name = canonical_key(str(key))
            if name in domains:
                raise UserError(f"search: {name}: stands there twice; name it once")
            if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in DOMAIN_TYPES:
                raise UserError(
                    f"search: {name}: got {short_repr(value)}, should be one of {', '.join(DOMAIN_TYPES)} with its "
                    f"values; for example {{{name}: {{choice: [1, 2]}}}}"
                )
            ((kind, arguments),) = value.items()
            try:
                domains[name] = DOMAIN_TYPES[kind](arguments)
            except ValueError as error:
                raise UserError(f"search: {name}: {kind}: got {short_repr(arguments)}, {error}") from None
        return cls(domains, {canonical_key(str(key)): dict(value) for key, value in content.items()})

    def checked(self, experiment: Experiment) -> SearchSpace:
        """The space with its values as the Experiment reads them; raises `UserError` for one that is not valid."""
        domains: dict[str, Domain] = {}
        for key, domain in self.domains.items():
            if is_place_key(key):
                raise UserError(
                    f"search: {key}: cannot be searched, it says where a trial runs and not what it computes"
                )
            try:
                read = [
                    _scalar(experiment.with_overrides({key: value}).flat()[key]) for value in domain.boundary_values()
                ]
            except UserError as error:
                raise UserError(f"search: {error}") from None
            if any(isinstance(value, str) and ":" in value for value in read):
                raise UserError(f"search: {key}: code of your own is named on the command line and cannot be searched")
            if isinstance(domain, Values):
                if len(set(read)) < len(read):
                    raise UserError(f"search: {key}: got {list(domain.values)!r}, names a value twice")
                domain = Values(tuple(read), domain.is_grid)
            domains[key] = domain
        return SearchSpace(domains, self.source)

    def boundary_values(self) -> Iterator[dict[str, Any]]:
        """Overrides that between them hold every value, or end of a range, once."""
        for key, domain in self.domains.items():
            for value in domain.boundary_values():
                yield {key: value}

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """The overrides of the trial of that number (from 0): grids in turn, the rest quasi-random.

        A scrambled Sobol sequence: each draw is uniform, and few of them already cover the space evenly, where
        independent ones clump (Bousquet et al. 2017, arXiv:1706.03200).
        """
        is_grid = {key: domain for key, domain in self.domains.items() if isinstance(domain, Values) and domain.is_grid}
        points = list(itertools.product(*(domain.values for domain in is_grid.values())))
        drawn = dict(zip(is_grid, points[number % len(points)], strict=True))
        spread = sorted(self.domains.keys() - is_grid.keys())
        if spread:
            sequence = qmc.Sobol(len(spread), rng=stream(seed, "search"))
            if number:
                sequence.fast_forward(number)
            numbers = sequence.random(1)[0]
            drawn |= {key: self.domains[key].at(float(u)) for key, u in zip(spread, numbers, strict=True)}
        return {key: drawn[key] for key in self.domains}

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the values; raises `UserError` for a range, which has no end of them."""
        for key, domain in self.domains.items():
            if isinstance(domain, Range):
                raise UserError(
                    f"search: {key}: a range has no grid; name its values ({{grid: [...]}}) or use --searcher random"
                )
        values = [domain.values for domain in self.domains.values() if isinstance(domain, Values)]
        return [dict(zip(self.domains, point, strict=True)) for point in itertools.product(*values)]


def search_names() -> list[str]:
    """Names of the search spaces that ship with the package."""
    return sorted(path.stem for path in SEARCH_DIR.glob("*.yaml"))


def _scalar(value: Any) -> Any:
    """Lists as the text that the Experiment reads again: Tune and Optuna take scalars."""
    return json.dumps(value) if isinstance(value, list) else value
