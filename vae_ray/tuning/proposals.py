"""Searchers: what the next trial tries. Each proposal is in the journal before its trial starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.search import BasicVariantGenerator, Searcher

from vae_ray.seeds import stream
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord, configuration_of, read_journal, repeat_of, trial_name
from vae_ray.tuning.settings import SweepSettings
from vae_ray.tuning.space import SearchSpace, Values, configuration_key
from vae_ray.tuning.trial import TRIAL

MAX_REPETITIONS = 20
"""How often Optuna may suggest what was proposed before until another configuration is drawn at random."""


def propose_all(directory: SweepDirectory, settings: SweepSettings, *, seed: int) -> None:
    """Append to the journal all proposals that are not there yet; of Optuna, only the other seeds of those that are.

    By number, so that a proposal whose line was lost is made again as it was. None is made twice, except for PBT.
    """
    proposed = {entry["trial"]: entry["overrides"] for entry in read_journal(directory) if entry["event"] == "proposed"}
    space, numbers = settings.space, range(settings.num_trials)
    if settings.searcher == "optuna":
        configurations = [proposed[name] for name in sorted(proposed) if not repeat_of(name)]
    elif settings.searcher == "grid":
        configurations = space.grid()
    elif settings.scheduler == "pbt":
        configurations = [space.draw(seed, number) for number in numbers]
    else:
        configurations = list(itertools.islice(space.draws(seed), settings.num_trials))
    wanted = [_proposals(number, each, settings.repeats) for number, each in enumerate(configurations)]
    directory.append_to_journal(*(each for each in itertools.chain(*wanted) if each["trial"] not in proposed))


def _proposals(number: int, overrides: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """A configuration's lines of the journal, one for each seed."""
    names = [trial_name(number, repeat) for repeat in range(repeats)]
    return [{"trial": name, "event": "proposed", "overrides": overrides} for name in names]


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

    A trial's result is that of its best epoch by `selection_metric`, as on the leaderboard; a configuration's is the
    mean over its seeds. A configuration that was proposed before is not tried again: Optuna is told its result, where
    there is one, and asked for another.
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
        self._queue = [
            (record.name, record.proposed, record.best.metrics if record.best is not None else None)
            for record in records
            if record.state == "pending"
        ]
        """Trials to come: name, configuration, and the metrics of the best epoch so far."""
        self._names: dict[str, str] = {}
        """The name of each running trial, by Tune's id."""
        self._best: dict[str, dict[str, Any]] = {}
        """The metrics of each running trial's best epoch."""
        self._asked: dict[str, optuna.trial.Trial] = {}
        """Optuna's trial of each configuration of which a seed runs, or is to come."""
        self._outcomes: dict[str, list[list[float] | None]] = {}
        """By configuration, of each of its seeds that has ended: its values, None if it failed."""
        self._results: dict[str, list[float] | None] = {configuration_key(record.proposed): None for record in records}
        """By configuration, of all that were proposed; None without a result."""
        num_proposed = len({configuration_of(record.name) for record in records})
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            directions=["minimize"] * len(settings.metrics),
            # a stream of its own for each start, which must not suggest again what an earlier one did
            sampler=optuna.samplers.TPESampler(seed=stream(seed, "optuna", num_proposed) % 2**32),
        )
        for name, group in itertools.groupby(records, key=lambda record: configuration_of(record.name)):
            self._learn(name, list(group))

    def _learn(self, name: str, records: Sequence[TrialRecord]) -> None:
        """Tell Optuna what earlier drivers left of a configuration."""
        params = records[0].proposed
        self._outcomes[name] = [
            None if record.failed or record.best is None else self._values(record.best.metrics)
            for record in records
            if record.state != "pending"
        ]
        if len(self._outcomes[name]) < len(records):
            self._study.enqueue_trial(params)
        elif values := _means(self._outcomes[name]):
            self._results[configuration_key(params)] = values
            known = optuna.trial.create_trial(params=params, distributions=self._distributions, values=values)
            self._study.add_trial(known)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's configuration, or that there is none left."""
        if not self._queue and len(self._outcomes) >= self._settings.num_trials:
            return str(Searcher.FINISHED)
        if not self._queue:
            self._propose()
        name, overrides, best = self._queue.pop(0)
        if configuration_of(name) not in self._asked:  # left by an earlier driver: Optuna gives enqueued ones first
            self._asked[configuration_of(name)] = self._study.ask(self._distributions)
        self._names[trial_id] = name
        if best is not None:
            self._best[trial_id] = best
        return {TRIAL: name, **overrides}

    def _propose(self) -> None:
        """Append the trials of another configuration to the journal and to the queue."""
        asked, overrides = self._ask_for_another()
        lines = _proposals(len(self._outcomes), overrides, self._settings.repeats)
        self._directory.append_to_journal(*lines)
        self._queue = [(line["trial"], overrides, None) for line in lines]
        configuration = configuration_of(lines[0]["trial"])
        self._asked[configuration], self._outcomes[configuration] = asked, []
        self._results[configuration_key(overrides)] = None

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
        """Tell Optuna the configuration's result, or that it has none, once all of its seeds have ended."""
        if result and not error:
            self.on_trial_result(trial_id, result)
        best = self._best.pop(trial_id, None)
        configuration = configuration_of(self._names.pop(trial_id))
        outcomes = self._outcomes[configuration]
        outcomes.append(None if error or best is None else self._values(best))
        if len(outcomes) < self._settings.repeats:
            return
        asked = self._asked.pop(configuration)
        if (values := _means(outcomes)) is None:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            self._results[configuration_key(self._settings.space.rounded(asked.params))] = values
            self._study.tell(asked, values)

    def _values(self, metrics: dict[str, Any]) -> list[float]:
        return [float(metrics[metric]) for metric in self._settings.metrics]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is resumed from its journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing is saved."""


def _means(outcomes: Sequence[list[float] | None]) -> list[float] | None:
    """The mean of each metric over seeds; None if one of them failed."""
    values = [each for each in outcomes if each is not None]
    return [fmean(column) for column in zip(*values, strict=True)] if len(values) == len(outcomes) else None


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
