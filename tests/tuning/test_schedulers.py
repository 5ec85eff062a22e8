"""Truth and contract: which trials are stopped, and that a replayed scheduler decides as the undisturbed one."""

import functools
import itertools
import random
import secrets
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from tests.tuning.trials import record_of
from vae_ray import Experiment
from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.schedulers import ASHA_REDUCTION_FACTOR, SCHEDULERS, replay, rungs
from vae_ray.tuning.settings import PBT_KEYS
from vae_ray.tuning.space import Range, SearchSpace
from vae_ray.tuning.trial import TRIAL

METRIC = "val/nelbo"
EPOCHS = 12  # rungs at 2, 4 and 8: trials are stopped early, late and not at all
NUM_TRIALS = 9
NUM_CONCURRENT = 3
SPACE = SearchSpace.from_dict(
    {
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
        "objective.beta": {"uniform": [0.25, 4]},
        "optim.weight_decay": {"choice": [0.0, 0.1, 0.2]},
    }
)


class Trial:
    """What a scheduler sees of Tune's trials: our name, and an id that no other driver gives it again."""

    def __init__(self, name: str) -> None:
        self.config = {TRIAL: name}
        self.trial_id = secrets.token_hex(4)

    def __str__(self) -> str:
        return str(self.config[TRIAL])


class Event(NamedTuple):
    """A trial has reported an epoch, and the undisturbed scheduler has decided."""

    name: str
    line: dict[str, Any]
    decision: str


def scheduler_of(name: str, events: list[Event]) -> tuple[TrialScheduler, set[str]]:
    """A scheduler that has seen these events, and which trials it stops at their last."""
    scheduler = SCHEDULERS[name](METRIC, EPOCHS, SPACE)
    return scheduler, replay(scheduler, records_of(events)[::-1])  # in any order


def records_of(events: list[Event]) -> list[TrialRecord]:
    """What the trials' files tell after these events; trials that were only proposed are among them."""
    return [
        record_of(name, state="pending", history=[event.line for event in events if event.name == name])
        for name in (f"{number:04d}" for number in range(NUM_TRIALS))
    ]


@functools.cache
def undisturbed(seed: int) -> list[Event]:
    """A whole sweep, three trials at a time, each epoch of another length: in the order in which it happened."""
    numbers = random.Random(seed)
    scheduler = SCHEDULERS["asha"](METRIC, EPOCHS, SPACE)
    waiting = [f"{number:04d}" for number in range(NUM_TRIALS)]
    quality = {name: numbers.uniform(0, 20) for name in waiting}
    running: dict[str, tuple[Trial, dict[str, Any]]] = {}
    events: list[Event] = []

    def line_of(name: str, epoch: int, started_at: float) -> dict[str, Any]:
        value = 100 + quality[name] - 2 * epoch + numbers.uniform(-9, 9)
        return {"epoch": epoch, METRIC: value, "started_at": started_at, "seconds": numbers.uniform(0.1, 3)}

    now = 1000.0
    while waiting or running:
        while waiting and len(running) < NUM_CONCURRENT:
            name = waiting.pop(0)
            trial = Trial(name)
            scheduler.on_trial_add(None, trial)
            running[name] = (trial, line_of(name, 1, now))
        name = min(running, key=lambda name: running[name][1]["started_at"] + running[name][1]["seconds"])
        trial, line = running[name]
        now = line["started_at"] + line["seconds"]
        events.append(Event(name, line, decision_of(scheduler, trial, line)))
        if events[-1].decision == TrialScheduler.STOP:
            del running[name]
        else:
            running[name] = (trial, line_of(name, line["epoch"] + 1, now))
    return events


def decision_of(scheduler: TrialScheduler, trial: Trial, line: dict[str, Any]) -> str:
    """The decision on one epoch, with what Tune does after it."""
    decision: str = scheduler.on_trial_result(None, trial, line)
    if decision == TrialScheduler.STOP:
        scheduler.on_trial_complete(None, trial, line)
    return decision


def first_other_decision(scheduler: TrialScheduler, events: list[Event], cut: int) -> Event | None:
    """Where a resumed sweep's scheduler first decides otherwise from `cut` on; None if nowhere.

    Unfinished trials come back as new ones of Tune's.
    """
    ended = {event.name for event in events[:cut] if event.decision == TrialScheduler.STOP}
    trials = {f"{number:04d}": Trial(f"{number:04d}") for number in range(NUM_TRIALS)}
    for name in sorted(trials.keys() - ended):
        scheduler.on_trial_add(None, trials[name])
    return next(
        (e for e in events[cut:] if decision_of(scheduler, trials[e.name], e.line) != e.decision),
        None,
    )


# --- rungs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", range(2, 101))
def test_rungs_are_at_most_four_epochs_before_the_last_a_factor_apart(epochs: int) -> None:
    found = rungs(epochs)
    assert 1 <= len(found) <= 4
    assert found[0] >= 1
    assert found[-1] < epochs
    assert [b / a for a, b in itertools.pairwise(found)] == [ASHA_REDUCTION_FACTOR] * (len(found) - 1)


@pytest.mark.parametrize("epochs", range(1, 101))
def test_rungs_are_those_that_ray_s_scheduler_has(epochs: int) -> None:
    scheduler = SCHEDULERS["asha"](METRIC, epochs, SPACE)
    assert isinstance(scheduler, AsyncHyperBandScheduler)
    (bracket,) = scheduler._brackets  # Ray has them nowhere else
    assert sorted(milestone for milestone, _ in bracket._rungs if milestone < max(epochs, 2)) == rungs(epochs)


# --- restored -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_replayed_asha_decides_the_rest_and_the_last_records_as_the_undisturbed_one(seed: int) -> None:
    events = undisturbed(seed)
    for cut in range(len(events) + 1):
        scheduler, stopped = scheduler_of("asha", events[:cut])
        assert first_other_decision(scheduler, events, cut) is None, cut
        assert stopped == {event.name for event in events[:cut] if event.decision == TrialScheduler.STOP}, cut


@pytest.mark.parametrize("seed", range(4))
def test_a_clock_that_was_set_back_does_not_change_what_asha_decides(seed: int) -> None:
    """The journal has the order of comparisons; of the last one the driver may have been killed before it was there."""
    events = undisturbed(seed)
    half = len(events) // 2
    set_back = [
        event._replace(line={**event.line, "started_at": event.line["started_at"] - 1e6 * (number >= half)})
        for number, event in enumerate(events)
    ]
    for cut in range(half, len(events) + 1):
        compared = [(e.name, e.line["epoch"]) for e in set_back[: cut - 1] if e.line["epoch"] in rungs(EPOCHS)]
        scheduler = SCHEDULERS["asha"](METRIC, EPOCHS, SPACE)
        stopped = replay(scheduler, records_of(set_back[:cut]), compared)
        assert stopped == {event.name for event in events[:cut] if event.decision == TrialScheduler.STOP}, cut
        assert first_other_decision(scheduler, set_back, cut) is None, cut


def test_asha_that_forgets_what_it_saw_decides_otherwise() -> None:
    """So the tests above can fail."""
    events = undisturbed(0)
    early = [event for event in events if event.decision == TrialScheduler.STOP and event.line["epoch"] < EPOCHS]
    assert {event.line["epoch"] for event in early} == set(rungs(EPOCHS))
    assert len(early) < NUM_TRIALS
    cut = events.index(early[0])
    assert first_other_decision(SCHEDULERS["asha"](METRIC, EPOCHS, SPACE), events, cut) == early[0]


def test_trials_are_identified_by_our_names_and_not_by_ray_s_ids() -> None:
    """The same trial under another id does not enter a rung a second time."""
    scheduler = SCHEDULERS["asha"](METRIC, EPOCHS, SPACE)
    for value in (5.0, 1.0):  # the second is the better: it would shift the cut
        trial = Trial("0000")
        scheduler.on_trial_add(None, trial)
        scheduler.on_trial_result(None, trial, {"epoch": 2, METRIC: value})
    other = Trial("0001")
    scheduler.on_trial_add(None, other)
    assert scheduler.on_trial_result(None, other, {"epoch": 2, METRIC: 4.0}) == TrialScheduler.CONTINUE


# --- every scheduler ------------------------------------------------------------------------------------


def test_without_a_scheduler_the_worst_trial_runs_to_the_end() -> None:
    scheduler, stopped = scheduler_of("none", undisturbed(1)[:20])
    assert stopped == set()
    lines = ({"epoch": epoch, METRIC: 1e9} for epoch in range(1, EPOCHS + 1))
    trial = Trial("0000")
    assert {scheduler.on_trial_result(None, trial, line) for line in lines} == {TrialScheduler.CONTINUE}


# --- pbt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 4, 5, 17, 100])
def test_a_population_compares_itself_about_five_times(epochs: int) -> None:
    interval = SCHEDULERS["pbt"](METRIC, epochs, SPACE)._perturbation_interval
    assert interval >= 1
    assert min(epochs, 5) <= epochs / interval < 10


@given(
    st.sampled_from(["uniform", "loguniform"]),
    st.floats(1e-6, 1e6),
    st.floats(1.0001, 1e6),
    st.floats(0, 1),
    st.sampled_from([0.8, 1.0, 1.2]),
)
def test_a_perturbed_number_stays_in_its_range(kind: str, low: float, ratio: float, at: float, factor: float) -> None:
    space = SearchSpace.from_dict({"optim.lr": {kind: [low, low * ratio]}, "objective.beta": {"choice": [1.0, 2.0]}})
    config = {TRIAL: "0003", "optim.lr": (low + (low * ratio - low) * at) * factor, "objective.beta": 2.0}
    bounded = space.rounded(config)
    assert low <= bounded["optim.lr"] <= low * ratio
    assert {**bounded, "optim.lr": None} == {**config, "optim.lr": None}


def test_what_pbt_explores_is_in_the_space_and_valid_for_the_experiment() -> None:
    assert set(SPACE.domains) < set(PBT_KEYS)
    scheduler = SCHEDULERS["pbt"](METRIC, EPOCHS, SPACE)
    random.seed(7)  # PBT draws from the global generator
    trial = Trial("0003")
    trial.config |= SPACE.draw(0, 0)
    seen = []
    for _ in range(300):  # each from the one before, as over many exploits
        trial.config, _ = scheduler._get_new_config(trial, trial)
        seen.append(trial.config)
    for config in seen:
        assert config[TRIAL] == "0003"
        for key, domain in SPACE.domains.items():
            if isinstance(domain, Range):
                assert domain.low <= config[key] <= domain.high
            else:
                assert config[key] in domain.values
        overrides = {key: config[key] for key in SPACE.domains}
        assert Experiment().with_overrides(overrides).flat().items() >= overrides.items()
    assert len({config["optim.lr"] for config in seen}) > 100
    assert len({config["optim.weight_decay"] for config in seen}) == 3


def test_a_copy_explores_at_the_ends_of_ranges_and_lists_too() -> None:
    space = SearchSpace.from_dict({"optim.lr": {"choice": [1e-3, 2e-3]}, "objective.beta": {"uniform": [0.5, 2.0]}})
    scheduler = SCHEDULERS["pbt"](METRIC, EPOCHS, space)
    random.seed(7)
    donor = Trial("0003")
    donor.config |= {"optim.lr": 2e-3, "objective.beta": 2.0}  # to the right, and by 1.2, nothing changes
    for _ in range(300):
        explored, _ = scheduler._get_new_config(Trial("0001"), donor)
        assert explored != donor.config
