"""Searchers: what the next trial tries. Each proposal is in the journal before its trial starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.search import BasicVariantGenerator, Searcher

from vae_ray.seeds import stream
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.settings import SweepSettings
from vae_ray.tuning.space import SearchSpace, Values, configuration_key
from vae_ray.tuning.trial import TRIAL

MAX_REPETITIONS = 20
"""How often Optuna may suggest what was proposed before until another configuration is drawn at random."""


def trial_name(number: int) -> str:
    """The name of a trial, by its number from 0."""
    return f"{number:04d}"


def propose_all(directory: SweepDirectory, settings: SweepSettings, *, seed: int) -> None:
    """Append all proposals of a random or a grid search to the journal that are not there yet.

    By number, so that a proposal whose line was lost is made again as it was. None is made twice, except for PBT.
    """
    proposed = {entry.get("trial") for entry in directory.journal() if entry.get("event") == "proposed"}
    space, numbers = settings.space, range(settings.num_trials)
    if settings.searcher == "grid":
        configurations = space.grid()
    elif settings.scheduler == "pbt":
        configurations = [space.draw(seed, number) for number in numbers]
    else:
        configurations = list(itertools.islice(space.draws(seed), settings.num_trials))
    names = [trial_name(number) for number in numbers]
    directory.append_to_journal(
        *(_proposal(name, each) for name, each in zip(names, configurations, strict=True) if name not in proposed)
    )


def _proposal(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    return {"trial": name, "event": "proposed", "overrides": overrides}


class FixedConfigurations(BasicVariantGenerator):  # type: ignore[misc]
    """Given configurations, whose search is not finished until all trials have ended.

    Tune keeps the process of a paused trial for the next one only while it expects more trials; PBT pauses all of
    them at every comparison, and would start as many processes again.
    """

    def __init__(self, configurations: list[dict[str, Any]]) -> None:
        super().__init__(points_to_evaluate=configurations)
        self._num_running = len(configurations)

    def is_finished(self) -> bool:
        return self._num_running == 0 and bool(super().is_finished())

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        super().on_trial_complete(trial_id, result, error)
        self._num_running -= 1


class OptunaProposals(Searcher):  # type: ignore[misc]
    """The pending trials of earlier drivers, then what Optuna (TPE) suggests from all results.

    A trial's result is that of its best epoch by `selection_metric`, as on the leaderboard. A configuration that was
    proposed before is not tried again: Optuna is told its result, where there is one, and asked for another.
    """

    def __init__(
        self,
        directory: SweepDirectory,
        settings: SweepSettings,
        *,
        seed: int,
        records: Sequence[TrialRecord],
        selection_metric: str,
    ) -> None:
        super().__init__(metric=list(settings.metrics), mode=["min"] * len(settings.metrics))
        self._directory, self._settings, self._selection_metric = directory, settings, selection_metric
        self._seed = seed
        self._distributions = distributions(settings.space)
        self._num_proposed = len(records)
        self._pending = [record for record in records if record.state == "pending"]
        self._asked: dict[str, optuna.trial.Trial] = {}
        self._best: dict[str, dict[str, Any]] = {}
        """The metrics of each running trial's best epoch."""
        self._results: dict[str, list[float] | None] = {configuration_key(record.proposed): None for record in records}
        """By configuration, of all that were proposed; None without a result."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            directions=["minimize"] * len(settings.metrics),
            # a stream of its own for each start, which must not suggest again what an earlier one did
            sampler=optuna.samplers.TPESampler(seed=stream(seed, "optuna", self._num_proposed) % 2**32),
        )
        for record in records:
            if record.state == "pending":
                self._study.enqueue_trial(record.proposed)
            elif record.best is not None and not record.failed:
                values = self._results[configuration_key(record.proposed)] = self._values(record.best.metrics)
                self._study.add_trial(
                    optuna.trial.create_trial(params=record.proposed, distributions=self._distributions, values=values)
                )

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's configuration, or that there is none left."""
        if not self._pending and self._num_proposed >= self._settings.num_trials:
            return str(Searcher.FINISHED)
        if self._pending:
            self._asked[trial_id] = self._study.ask(self._distributions)  # Optuna gives enqueued ones first
            record = self._pending.pop(0)
            if record.best is not None:
                self._best[trial_id] = record.best.metrics
            return {TRIAL: record.name, **record.proposed}
        self._asked[trial_id], overrides = self._ask_for_another()
        self._results[configuration_key(overrides)] = None
        name = trial_name(self._num_proposed)
        self._directory.append_to_journal(_proposal(name, overrides))
        self._num_proposed += 1
        return {TRIAL: name, **overrides}

    def _ask_for_another(self) -> tuple[optuna.trial.Trial, dict[str, Any]]:
        """A suggestion that was not proposed before; drawn at random where Optuna keeps to those that were."""
        for _ in range(MAX_REPETITIONS):
            asked = self._study.ask(self._distributions)
            overrides = self._settings.space.rounded(asked.params)
            if configuration_key(overrides) not in self._results:
                return asked, overrides
            values = self._results[configuration_key(overrides)]
            self._study.tell(asked, values, state=None if values else optuna.trial.TrialState.FAIL)
        self._study.enqueue_trial(next(self._settings.space.draws(self._seed, map(json.loads, self._results))))
        asked = self._study.ask(self._distributions)
        return asked, self._settings.space.rounded(asked.params)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tune reports the last epoch in `on_trial_complete` only."""
        epochs = [self._best.get(trial_id, result), result]
        self._best[trial_id] = min(epochs, key=lambda metrics: metrics[self._selection_metric])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the trial's result, or that it has none."""
        if result and not error:
            self.on_trial_result(trial_id, result)
        best = self._best.pop(trial_id, None)
        asked = self._asked.pop(trial_id)
        if error or best is None:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            values = self._values(best)
            self._results[configuration_key(self._settings.space.rounded(asked.params))] = values
            self._study.tell(asked, values)

    def _values(self, metrics: dict[str, Any]) -> list[float]:
        return [float(metrics[metric]) for metric in self._settings.metrics]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is resumed from its journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing is saved."""


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The space as Optuna has it."""
    by_key: dict[str, BaseDistribution] = {}
    for key, domain in space.domains.items():
        if isinstance(domain, Values):
            by_key[key] = CategoricalDistribution(domain.values)
        elif domain.integer:
            by_key[key] = IntDistribution(int(domain.low), int(domain.high), log=domain.log)
        else:
            by_key[key] = FloatDistribution(domain.low, domain.high, log=domain.log)
    return by_key
