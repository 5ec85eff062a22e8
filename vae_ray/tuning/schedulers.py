"""Who may stop or change a trial before its last epoch.

Tune's restore forgets the rungs of ASHA (ray #30838). Here every start makes a new scheduler and replays the sweep's
own records, so that a resumed sweep decides as the undisturbed one would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.space import SearchSpace, Values

ASHA_REDUCTION_FACTOR = 2
"""At each rung about half of the trials continue; rungs are a factor of 2 apart."""
PBT_EXPLOITS = 5
"""How often in a run the population is compared and the worst copy the best."""
MOST_MUTATIONS = 1000
"""Tries to change a copied configuration; a space of one value leaves nothing to change."""


def rungs(epochs: int) -> list[int]:
    """The epochs at which ASHA compares trials: the first after a fifth of the run, each twice the one before.

    Earlier comparisons favour large learning rates: of 16 trials on MNIST the one that would have ended best was the
    eleventh after one epoch of ten.
    """
    epoch, milestones = max(1, epochs // 5), []
    while epoch < epochs:
        milestones.append(epoch)
        epoch *= ASHA_REDUCTION_FACTOR
    return milestones or [1]


class ReplayableASHA(AsyncHyperBandScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) that knows trials by our names.

    Tune's ids are new at every start.
    """

    def __init__(self, metric: str, epochs: int) -> None:
        self.milestones = rungs(epochs)
        super().__init__(
            time_attr="epoch",
            metric=metric,
            mode="min",
            max_t=epochs,
            grace_period=self.milestones[0],
            reduction_factor=ASHA_REDUCTION_FACTOR,
        )

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, _Named(str(trial)))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return str(super().on_trial_result(tune_controller, _Named(str(trial)), result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _Named(str(trial)), result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_remove(tune_controller, _Named(str(trial)))


class _Named(NamedTuple):
    trial_id: str


class FaultTolerantPBT(PopulationBasedTraining):  # type: ignore[misc]
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846), synchronous: all compare at one epoch.

    Continues without a trial that failed; Ray's own waits for it indefinitely. A copy always explores: at the ends of
    ranges and lists Ray's mutations may change nothing, and the copy would repeat its donor's run.
    """

    def __init__(self, metric: str, epochs: int, space: SearchSpace) -> None:
        super().__init__(
            time_attr="epoch",
            metric=metric,
            mode="min",
            perturbation_interval=max(1, epochs // PBT_EXPLOITS),
            hyperparam_mutations={
                key: list(domain.values)
                if isinstance(domain, Values)
                else (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
                for key, domain in space.domains.items()
            },
            custom_explore_fn=space.rounded,  # PBT multiplies numbers by 0.8 or 1.2, also out of their range
            log_config=False,
            synch=True,
        )

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        for _ in range(MOST_MUTATIONS):
            configuration, operations = super()._get_new_config(trial, trial_to_clone)
            if configuration != trial_to_clone.config:
                break
        return configuration, operations

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        # Tune still waits for failed trials: mark them as having reached the point of comparison.
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


SCHEDULERS: dict[str, Callable[[str, int, SearchSpace], TrialScheduler]] = {
    "asha": lambda metric, epochs, space: ReplayableASHA(metric, epochs),
    "none": lambda metric, epochs, space: FIFOScheduler(),
    "pbt": FaultTolerantPBT,
}
"""Made from a metric, the epochs of the longest trial and the space."""


def replay(
    scheduler: TrialScheduler, records: Sequence[TrialRecord], comparisons: Sequence[tuple[str, int]] = ()
) -> set[str]:
    """Show ASHA what earlier drivers saw, in its order; the trials that it stops at their last record.

    A driver can be killed between the two. `comparisons` are the (trial, epoch) that the journal has, oldest first: the
    order of the decisions, whatever the clocks of the trials showed. Other schedulers compare running trials only.
    """
    if not isinstance(scheduler, ReplayableASHA):
        return set()
    for record in records:
        scheduler.on_trial_add(None, record.name)
    last_decision: dict[str, str] = {}
    for name, line in _in_order(records, comparisons, milestones=scheduler.milestones):
        last_decision[name] = scheduler.on_trial_result(None, name, line)
    return {name for name, decision in last_decision.items() if decision == TrialScheduler.STOP}


def _in_order(
    records: Sequence[TrialRecord], comparisons: Sequence[tuple[str, int]], *, milestones: Collection[int]
) -> list[tuple[str, dict[str, Any]]]:
    """The lines of all trials by the comparison that they follow; those of none that is known come last, by time."""
    place = {comparison: number for number, comparison in enumerate(comparisons)}  # of one repeated, the last
    events = []
    for record in records:
        after, time = -1, 0.0
        for line in record.history:
            if line["epoch"] in milestones:
                after = max(after, place.get((record.name, line["epoch"]), len(place)))
            time = max(time, line["started_at"] + line["seconds"])
            events.append((after, time, record.name, line["epoch"], line))
    return [(name, line) for _, _, name, _, line in sorted(events, key=lambda event: event[:4])]
