"""How a space is searched: the arguments of a sweep, checked, with every combination that cannot work refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vae_ray.config.keys import did_you_mean
from vae_ray.errors import UserError
from vae_ray.tuning.metrics import checked_metrics, is_evaluated
from vae_ray.tuning.schedulers import SCHEDULERS
from vae_ray.tuning.space import Range, SearchSpace

SEARCHERS = ("random", "grid", "optuna")
DEFAULT_NUM_TRIALS = 16
# What may change during a trial: neither the shape of the network nor the data.
PBT_KEYS = ("optim.lr", "optim.weight_decay", "optim.grad_clip", "objective.beta")


@dataclass(frozen=True)
class SweepSettings:
    """A checked combination; make one with `settings`."""

    space: SearchSpace
    metrics: tuple[str, ...]
    """One metric, or two for a Pareto front."""
    num_trials: int
    """Configurations."""
    scheduler: str
    searcher: str
    repeats: int = 1
    """Trials of each configuration, by as many seeds."""

    @property
    def num_runs(self) -> int:
        """Trials of all configurations."""
        return self.num_trials * self.repeats

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `sweep.yaml` holds it."""
        return {
            "search": self.space.source,
            "metrics": list(self.metrics),
            "num_trials": self.num_trials,
            "scheduler": self.scheduler,
            "searcher": self.searcher,
            **({"repeats": self.repeats} if self.repeats > 1 else {}),
        }


def settings(
    *,
    search: str | Mapping[str, Any] | None,
    metric: str | Sequence[str],
    num_trials: int | None,
    scheduler: str | None,
    searcher: str,
    workers_per_trial: int,
    repeats: int = 1,
) -> SweepSettings:
    """The settings that the arguments of `sweep` mean; raises `UserError` for those that cannot work."""
    metrics = checked_metrics(metric)
    if type(repeats) is not int or repeats < 1:
        raise UserError(f"repeats: got {repeats!r}, should be a whole number, at least 1; for example --repeats 5")
    if scheduler is None:
        scheduler = "asha" if len(metrics) == repeats == 1 and not is_evaluated(metrics[0]) else "none"
    _check_name("scheduler", scheduler, list(SCHEDULERS))
    _check_name("searcher", searcher, SEARCHERS)
    if len(metrics) > 1 and scheduler != "none":
        raise UserError(
            f"scheduler: got {scheduler!r}, with two metrics no trial can be stopped early; use --scheduler none"
        )
    if is_evaluated(metrics[0]):
        late = f"{metrics[0]} is known only when all trials have ended"
        if scheduler != "none":
            raise UserError(f"scheduler: got {scheduler!r}, but {late}; use --scheduler none")
        if searcher == "optuna":
            raise UserError(f"searcher: got {searcher!r}, but {late}; use --searcher random or grid")
    if repeats > 1 and scheduler != "none":
        raise UserError(
            f"scheduler: got {scheduler!r}, with --repeats it would compare seeds after different numbers of epochs; "
            "use --scheduler none"
        )
    if search is None:
        search = "optimization" if scheduler == "pbt" else "default"
    space = SearchSpace.load(search) if isinstance(search, str) else SearchSpace.from_dict(search)
    if scheduler == "pbt":
        _check_pbt(space, searcher=searcher, workers_per_trial=workers_per_trial)
    # a population may begin with equal configurations; elsewhere they would repeat a known result
    size = math.inf if scheduler == "pbt" else space.size()
    min_trials = 2 if scheduler == "pbt" else 1
    num_trials = _num_trials(num_trials, space, searcher=searcher, min_trials=min_trials, max_trials=size)
    return SweepSettings(space, metrics, num_trials, scheduler, searcher, repeats)


def _check_name(key: str, value: str, names: Sequence[str]) -> None:
    if value not in names:
        raise UserError(f"{key}: got {value!r}; {did_you_mean(value, names)}")


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
                f"search: {key}: cannot change while a trial runs, as pbt requires; it can search "
                f"{', '.join(PBT_KEYS)}; or use --scheduler asha"
            )
        if isinstance(domain, Range) and domain.integer:
            raise UserError(f"search: {key}: pbt changes numbers by factors, should be uniform, loguniform or choice")


def _num_trials(
    num_trials: int | None, space: SearchSpace, *, searcher: str, min_trials: int, max_trials: float
) -> int:
    if searcher == "grid":
        size = len(space.grid())
        if num_trials not in (None, size):
            other = " or use --searcher random" if num_trials is not None and num_trials < size else ""
            raise UserError(f"num_trials: got {num_trials}, the grid has {size} points; leave it out{other}")
        return size
    if num_trials is not None and type(num_trials) is not int:
        raise UserError(f"num_trials: got {num_trials!r}, should be a whole number")
    if num_trials is None:
        return int(min(DEFAULT_NUM_TRIALS, max_trials))
    if num_trials < min_trials:
        raise UserError(
            f"num_trials: got {num_trials}, should be at least {min_trials}; for example "
            f"--num-trials {DEFAULT_NUM_TRIALS}"
        )
    if num_trials > max_trials:
        raise UserError(
            f"num_trials: got {num_trials}, but the space has {max_trials:.0f} configurations, each of which needs one "
            f"trial; use --num-trials {max_trials:.0f}"
        )
    return num_trials
