"""Who says what the next trial tries, joined to the journal: every proposal is written down before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from ray.tune.search import BasicVariantGenerator, Searcher

from vae_ray.seeds import stream
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.settings import SweepSettings
from vae_ray.tuning.space import SearchSpace, Values
from vae_ray.tuning.trial import TRIAL


def trial_name(number: int) -> str:
    """The name of a trial, by its number from 0."""
    return f"{number:04d}"


def propose_all(directory: SweepDirectory, settings: SweepSettings, *, seed: int) -> None:
    """Write down what a random or a grid search tries, as far as it is not yet known.

    By number, so that a proposal whose line was lost is made again as it was.
    """
    known = {entry.get("trial") for entry in directory.journal() if entry.get("event") == "proposed"}
    grid = settings.space.grid() if settings.searcher == "grid" else None
    directory.append_to_journal(
        *(
            _proposed(trial_name(number), grid[number] if grid else settings.space.draw(seed, number))
            for number in range(settings.num_trials)
            if trial_name(number) not in known
        )
    )


def _proposed(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    return {"trial": name, "event": "proposed", "overrides": overrides}


class FixedConfigurations(BasicVariantGenerator):  # type: ignore[misc]
    """Given configurations, whose search counts as going on until all have ended.

    Tune keeps the process of a paused trial for the next one only while it expects more trials; PBT pauses all of
    them at every comparison, and would start as many processes anew.
    """

    def __init__(self, configurations: list[dict[str, Any]]) -> None:
        super().__init__(points_to_evaluate=configurations)
        self._num_alive = len(configurations)

    def is_finished(self) -> bool:
        return self._num_alive == 0 and bool(super().is_finished())

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        super().on_trial_complete(trial_id, result, error)
        self._num_alive -= 1


class OptunaProposals(Searcher):  # type: ignore[misc]
    """Trials that earlier drivers left unfinished, then what Optuna (TPE) suggests from all that is known."""

    def __init__(
        self, directory: SweepDirectory, settings: SweepSettings, *, seed: int, records: Sequence[TrialRecord]
    ) -> None:
        super().__init__(metric=list(settings.metrics), mode=["min"] * len(settings.metrics))
        self._directory, self._settings = directory, settings
        self._distributions = distributions(settings.space)
        self._num_known = len(records)
        self._pending = [record for record in records if record.state == "pending"]
        self._asked: dict[str, optuna.trial.Trial] = {}
        self._resumed: dict[str, dict[str, Any]] = {}
        self._best: dict[str, list[float]] = {}
        """Of each running trial, the metrics of its best epoch: it is what the leaderboard will compare."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            directions=["minimize"] * len(settings.metrics),
            # a stream of its own for each start: an earlier one's suggestions are not to be had again
            sampler=optuna.samplers.TPESampler(seed=stream(seed, "optuna", self._num_known) % 2**32),
        )
        for record in records:
            values = self._values(record)
            if record.state != "pending" and not record.failed and values:
                self._learn(record.proposed, values)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's configuration, or that there is none left."""
        if self._pending:
            record = self._pending.pop(0)
            self._resumed[trial_id] = record.proposed
            if values := self._values(record):
                self._best[trial_id] = values
            return {TRIAL: record.name, **record.proposed}
        if self._num_known >= self._settings.num_trials:
            return str(Searcher.FINISHED)
        self._asked[trial_id] = self._study.ask(self._distributions)
        overrides = decoded(self._settings.space, self._asked[trial_id].params)
        name = trial_name(self._num_known)
        self._directory.append_to_journal(_proposed(name, overrides))
        self._num_known += 1
        return {TRIAL: name, **overrides}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch has been reported; Tune tells of the last one only in `on_trial_complete`."""
        values = [float(result[metric]) for metric in self._settings.metrics]
        self._best[trial_id] = min(self._best.get(trial_id, values), values, key=sum)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how good it was."""
        if result and not error:
            self.on_trial_result(trial_id, result)
        best = self._best.pop(trial_id, None)
        values = None if error else best
        if trial_id in self._asked:
            state = optuna.trial.TrialState.FAIL if values is None else optuna.trial.TrialState.COMPLETE
            self._study.tell(self._asked.pop(trial_id), values, state=state)
        elif values is not None:
            self._learn(self._resumed[trial_id], values)

    def _learn(self, overrides: dict[str, Any], values: Sequence[float]) -> None:
        params = encoded(self._settings.space, overrides)
        self._study.add_trial(
            optuna.trial.create_trial(params=params, distributions=self._distributions, values=values)
        )

    def _values(self, record: TrialRecord) -> list[float]:
        """The metrics of a record's best checkpoint; empty without one."""
        found = [record.value(metric) for metric in self._settings.metrics]
        return [value for value in found if value is not None]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a sweep is restored from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing is saved."""


def distributions(space: SearchSpace) -> dict[str, optuna.distributions.BaseDistribution]:
    """The space as Optuna has it; of a set of values, which may be lists, their positions."""
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for key, domain in space.domains.items():
        if isinstance(domain, Values):
            found[key] = optuna.distributions.CategoricalDistribution(range(len(domain.values)))
        elif domain.integer:
            found[key] = optuna.distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
        else:
            found[key] = optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
    return found


def decoded(space: SearchSpace, suggestion: dict[str, Any]) -> dict[str, Any]:
    """Overrides of the Experiment from what Optuna suggests."""
    return {
        key: domain.values[suggestion[key]] if isinstance(domain, Values) else domain.rounded(suggestion[key])
        for key, domain in space.domains.items()
    }


def encoded(space: SearchSpace, overrides: dict[str, Any]) -> dict[str, Any]:
    """What Optuna would have suggested for these overrides."""
    return {
        key: domain.values.index(overrides[key]) if isinstance(domain, Values) else overrides[key]
        for key, domain in space.domains.items()
    }
