"""How a space is searched: what the user chose, checked, with every combination that cannot work refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vae_ray.errors import UserError
from vae_ray.tuning.space import Range, SearchSpace

SCHEDULER_NAMES = ("asha", "none", "pbt")
SEARCHER_NAMES = ("random", "grid", "optuna")
METRICS = tuple(f"{split}/{term}" for split in ("val", "train") for term in ("nelbo", "distortion", "rate"))
DEFAULT_NUM_TRIALS = 16
# What may change in mid-run: neither the shape of the network nor the data.
PBT_KEYS = ("optim.lr", "optim.weight_decay", "optim.grad_clip", "objective.beta")


@dataclass(frozen=True)
class SweepSettings:
    """A checked combination; make one with `settings`."""

    space: SearchSpace
    metrics: tuple[str, ...]
    """One metric, or two for a Pareto front; lower is better."""
    num_trials: int
    scheduler: str
    searcher: str

    @property
    def display_metric(self) -> str:
        """The one number by which people follow the sweep."""
        return self.metrics[0] if len(self.metrics) == 1 else f"{self.metrics[0].partition('/')[0]}/nelbo"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `sweep.yaml` holds it."""
        return {
            "search": self.space.source,
            "metrics": list(self.metrics),
            "num_trials": self.num_trials,
            "scheduler": self.scheduler,
            "searcher": self.searcher,
        }


def settings(
    *,
    search: str | Mapping[str, Any] | None,
    metric: str | Sequence[str],
    num_trials: int | None,
    scheduler: str | None,
    searcher: str,
    workers_per_trial: int,
) -> SweepSettings:
    """The settings that the arguments of `sweep` mean; raises `UserError` for those that cannot work."""
    metrics = _metrics(metric)
    if scheduler is None:
        scheduler = "asha" if len(metrics) == 1 else "none"
    _one_of("scheduler", scheduler, SCHEDULER_NAMES)
    _one_of("searcher", searcher, SEARCHER_NAMES)
    if len(metrics) > 1 and scheduler != "none":
        raise UserError(
            f"scheduler: got {scheduler!r}, with two metrics no trial can be stopped early; use --scheduler none"
        )
    if search is None:
        search = "optimization" if scheduler == "pbt" else "default"
    space = SearchSpace.load(search) if isinstance(search, str) else SearchSpace.from_dict(search)
    if scheduler == "pbt":
        _check_pbt(space, searcher=searcher, workers_per_trial=workers_per_trial)
    num_trials = _num_trials(num_trials, space, searcher=searcher, least=2 if scheduler == "pbt" else 1)
    return SweepSettings(space, metrics, num_trials, scheduler, searcher)


def _metrics(metric: str | Sequence[str]) -> tuple[str, ...]:
    metrics = tuple(metric.replace(" ", "").split(",")) if isinstance(metric, str) else tuple(metric)
    if not metrics:
        raise UserError(f"metric: got {metric!r}, should be one of {', '.join(METRICS)}")
    for name in metrics:
        if name.endswith("/loss"):
            raise UserError(
                f"metric: got {name!r}, trials of different beta cannot be compared by what they optimised: "
                "the smallest beta would win; use --metric val/nelbo"
            )
        if name.startswith("test/"):
            raise UserError(
                f"metric: got {name!r}, a test metric by which trials were chosen is no test any more; "
                f"use --metric val/{name.removeprefix('test/')}"
            )
        _one_of("metric", name, METRICS)
    if len(metrics) > 2 or len(set(metrics)) < len(metrics):
        raise UserError(f"metric: got {','.join(metrics)!r}, should be one metric or two different ones")
    return metrics


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{key}: got {value!r}, should be one of {', '.join(known)}{hint}")


def _check_pbt(space: SearchSpace, *, searcher: str, workers_per_trial: int) -> None:
    if workers_per_trial > 1:
        raise UserError(
            "scheduler: pbt needs trials of one worker: Tune never sees the checkpoints of a nested TorchTrainer, so "
            "that nothing would be exchanged; use --workers-per-trial 1 or --scheduler asha"
        )
    if searcher != "random":
        raise UserError(f"searcher: got {searcher!r}, pbt changes configurations itself; use --searcher random")
    for key, domain in space.domains.items():
        if key not in PBT_KEYS:
            raise UserError(
                f"search: {key}: cannot change while a trial runs, as pbt would have it; it can search "
                f"{', '.join(PBT_KEYS)}; or use --scheduler asha"
            )
        if isinstance(domain, Range) and domain.integer:
            raise UserError(f"search: {key}: pbt changes numbers by factors, should be uniform, loguniform or choice")


def _num_trials(num_trials: int | None, space: SearchSpace, *, searcher: str, least: int) -> int:
    if searcher == "grid":
        size = len(space.grid())
        if num_trials not in (None, size):
            raise UserError(
                f"num_trials: got {num_trials}, the grid has {size} points; leave it out or use --searcher random"
            )
        return size
    chosen = DEFAULT_NUM_TRIALS if num_trials is None else num_trials
    if chosen < least:
        raise UserError(
            f"num_trials: got {chosen}, should be at least {least}; for example --num-trials {DEFAULT_NUM_TRIALS}"
        )
    return chosen
