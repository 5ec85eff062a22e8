"""Who may stop or change a trial before its last epoch.

Each scheduler is made from the sweep's own records, so that a restored sweep judges as the undisturbed one would:
Tune's restore forgets the rungs of ASHA (ray #30838).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.space import Range, SearchSpace, Values

ASHA_REDUCTION_FACTOR = 2
"""At each rung about half of the trials go on; rungs are a factor of 2 apart."""
PBT_EXPLOITS = 5
"""How often in a run the population is compared and the worst copy the best."""


class ReplayedScheduler(NamedTuple):
    """A scheduler that knows what earlier drivers saw."""

    scheduler: TrialScheduler
    stopped: frozenset[str] = frozenset()
    """Trials that it would have stopped at their last line: a driver can be killed between the two."""


class SchedulerSpec(NamedTuple):
    """What a scheduler needs to know of its sweep."""

    metric: str
    epochs: int
    space: SearchSpace


def asha(setting: SchedulerSpec, records: Sequence[TrialRecord]) -> ReplayedScheduler:
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934), with the rungs as the records fill them."""
    scheduler = ReplayableASHA(
        time_attr="epoch",
        metric=setting.metric,
        mode="min",
        max_t=setting.epochs,
        grace_period=rungs(setting.epochs)[0],
        reduction_factor=ASHA_REDUCTION_FACTOR,
    )
    return ReplayedScheduler(scheduler, scheduler.replay(records))


def rungs(epochs: int) -> list[int]:
    """The epochs at which ASHA compares trials: the first after a fifth of the run, each twice the one before.

    Earlier comparisons favour large learning rates: of 16 trials on MNIST the one that would have ended best was the
    eleventh after one epoch of ten.
    """
    rung, found = max(1, epochs // 5), []
    while rung < epochs:
        found.append(rung)
        rung *= ASHA_REDUCTION_FACTOR
    return found or [1]


class ReplayableASHA(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA that knows trials by our names, which outlive Tune's."""

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, _Named(str(trial)))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, _Named(str(trial)), result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _Named(str(trial)), result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_remove(tune_controller, _Named(str(trial)))

    def replay(self, records: Sequence[TrialRecord]) -> frozenset[str]:
        """Enter what earlier drivers saw, in the order in which it happened; trials whose last line was their end."""
        last_decision: dict[str, str] = {}
        for record in records:
            super().on_trial_add(None, _Named(record.name))
        lines = [
            (line["started_at"] + line["seconds"], record.name, line) for record in records for line in record.history
        ]
        for _, name, line in sorted(lines, key=lambda item: item[:2]):
            last_decision[name] = super().on_trial_result(None, _Named(name), line)
        return frozenset(name for name, decision in last_decision.items() if decision == TrialScheduler.STOP)


class _Named(NamedTuple):
    trial_id: str


def pbt(setting: SchedulerSpec, records: Sequence[TrialRecord]) -> ReplayedScheduler:
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846), synchronous: all compare at one epoch."""
    mutations: dict[str, Any] = {}
    for key, domain in setting.space.domains.items():
        if isinstance(domain, Values):
            mutations[key] = list(domain.values)
        else:
            mutations[key] = (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
    scheduler = FaultTolerantPBT(
        time_attr="epoch",
        metric=setting.metric,
        mode="min",
        perturbation_interval=max(1, setting.epochs // PBT_EXPLOITS),
        hyperparam_mutations=mutations,
        custom_explore_fn=lambda config: _within(config, setting.space),
        log_config=False,
        synch=True,
    )
    return ReplayedScheduler(scheduler)


class FaultTolerantPBT(PopulationBasedTraining):  # type: ignore[misc]
    """Synchronous PBT that goes on without a trial that failed; Ray's own waits for it for ever."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        # Tune counts a failed trial among the living: let it seem to be where the others wait for it.
        for other, state in self._trial_state.items():
            if other.status == Trial.ERROR:
                state.last_score, state.last_train_time = None, self._next_perturbation_sync
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_error(tune_controller, trial)
        self._trial_state[trial].last_score = None
        self._trial_state[trial].last_train_time = self._next_perturbation_sync
        waiting = [other for other in tune_controller.get_trials() if other is not trial and not other.is_finished()]
        if waiting and all(other.status == Trial.PAUSED for other in waiting):
            # It was the last that the others waited for: let them compare now.
            self.on_trial_result(tune_controller, waiting[0], self._trial_state[waiting[0]].last_result)


def _within(config: dict[str, Any], space: SearchSpace) -> dict[str, Any]:
    """The configuration with every number inside its range: PBT multiplies by 0.8 and 1.2 without regard to it."""
    bounded = {key: domain.rounded(config[key]) for key, domain in space.domains.items() if isinstance(domain, Range)}
    return {**config, **bounded}


def run_to_the_end(setting: SchedulerSpec, records: Sequence[TrialRecord]) -> ReplayedScheduler:
    """Every trial runs all its epochs."""
    return ReplayedScheduler(FIFOScheduler())


SCHEDULERS: dict[str, Callable[[SchedulerSpec, Sequence[TrialRecord]], ReplayedScheduler]] = {
    "asha": asha,
    "none": run_to_the_end,
    "pbt": pbt,
}
