"""Truth and contract: schedules of an objective's settings, by epochs and by steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.runs import Counting, assert_same, counted_steps, run_of
from vae_ray import Experiment, Stopped, UserError, train
from vae_ray.objectives import build_objective
from vae_ray.objectives.schedules import SCHEDULES
from vae_ray.runs.train import resume
from vae_ray.training import stop_requests
from vae_ray.training.fit import fit

__all__ = ["counted_steps"]
"""A fixture of every test here."""

RISING = sorted(set(SCHEDULES) - {"constant"})


def curve(schedule: dict[str, Any], *, num: int = 201, epochs: float = 10.0, steps_per_epoch: int = 20) -> list[float]:
    """beta, of which the full value is 2, at the steps of ten epochs."""
    config = Experiment.from_dict({"objective": {"beta": 2.0, "beta_schedule": schedule}}).objective
    objective = build_objective(config)
    return [objective.settings(step / steps_per_epoch, step)["beta"] for step in range(num)]


@pytest.mark.parametrize("name", RISING)
def test_a_rise_goes_from_zero_to_the_full_value_and_stays(name: str) -> None:
    values = curve({"name": name, "epochs": 5})
    assert values[0] == 0.0
    assert set(values[100:]) == {2.0}
    assert min(values) >= 0.0
    assert max(values) <= 2.0


@pytest.mark.parametrize("name", RISING)
def test_steps_and_epochs_of_the_same_length_are_the_same_schedule(name: str) -> None:
    assert curve({"name": name, "steps": 100}) == pytest.approx(curve({"name": name, "epochs": 5}), abs=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_single_rise_never_falls(name: str) -> None:
    assert all(later >= earlier for earlier, later in pairwise(curve({"name": name})))


@pytest.mark.parametrize(("schedule", "expected"), [
    ({"name": "constant"}, [2, 2, 2, 2, 2]),
    ({"name": "linear", "steps": 80}, [0, 0.5, 1, 1.5, 2]),
    ({"name": "cosine", "steps": 80}, [0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5, 2]),
    # two cycles of 40 steps, rising over 32 of them
    ({"name": "cyclical", "steps": 80, "cycles": 2, "ratio": 0.8}, [0, 1.25, 0, 1.25, 2]),
    # one of 80, rising over 20
    ({"name": "cyclical", "steps": 80, "cycles": 1, "ratio": 0.25}, [0, 2, 2, 2, 2]),
])  # fmt: skip
def test_known_values(schedule: dict[str, Any], expected: list[float]) -> None:
    assert curve(schedule)[0:81:20] == pytest.approx(expected, abs=1e-8)


def test_every_cycle_begins_at_zero_and_reaches_the_full_value() -> None:
    """Also where rounding puts the end of a cycle before its beginning: of 7 cycles in 161 steps, for instance."""
    values = curve({"name": "cyclical", "steps": 161, "cycles": 7, "ratio": 0.5}, num=161)
    cycles = [values[start : start + 23] for start in range(0, 161, 23)]
    assert max(cycle[0] for cycle in cycles) < 1e-12
    assert all(cycle == pytest.approx([min(2.0, 4 * i / 23) for i in range(23)], abs=1e-7) for cycle in cycles)


def test_capacity_has_a_schedule_of_its_own() -> None:
    section = {"beta": 1000.0, "capacity": 25.0, "capacity_schedule": {"name": "linear", "steps": 50}}
    objective = build_objective(Experiment.from_dict({"objective": section}).objective)
    assert objective.settings(0.0, 10) == {"beta": 1000.0, "capacity": 5.0}
    assert objective.settings(0.0, 90) == {"beta": 1000.0, "capacity": 25.0}


def test_steps_in_the_place_of_epochs_survive_a_file() -> None:
    overrides = {"objective.beta_schedule": "cyclical", "objective.beta_schedule.steps": "300"}
    experiment = Experiment().with_overrides(overrides)
    assert build_objective(experiment.objective).settings(0.0, 300) == {"beta": 1.0}
    assert Experiment.from_dict(experiment.to_dict()) == experiment


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 0), ("epochs", -1), ("steps", 0), ("steps", 2.5), ("cycles", 0), ("ratio", 0), ("ratio", 1.1)],
)
def test_a_duration_or_part_that_is_none_is_one_line(key: str, value: float) -> None:
    with pytest.raises(
        UserError, match=rf"^objective\.beta_schedule\.{key}: got {value}, should be .*for example"
    ) as e:
        Experiment.from_dict({"objective": {"beta_schedule": {"name": "cyclical", key: value}}})
    assert "\n" not in str(e.value)


BY_STEPS = {"name": "cyclical", "steps": 20, "cycles": 2}
SECTIONS: dict[str, dict[str, Any]] = {
    "by steps and by epochs": {
        "name": "elbo",
        "beta_schedule": BY_STEPS,
        "capacity": 9.0,
        "capacity_schedule": {"name": "cosine", "epochs": 1.5},
    },
    "by steps": {"name": "beta_tc", "beta": 3.0, "beta_schedule": BY_STEPS},
    "a multiplier of its own": {"name": "geco", "target": 150.0, "step_size": 1e-3},
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_run_that_is_resumed_inside_an_epoch_goes_on_to_the_same_bits(
    section: str, quick: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 17, the third of the second epoch of 14."""
    monkeypatch.setattr(stop_requests, "AGREE_SECONDS", 0.0)
    run = Experiment.from_dict({**quick.to_dict(), "objective": SECTIONS[section]})
    run = run.with_overrides({"training.epochs": 2, "training.global_batch_size": 100})
    whole = train(run.with_overrides({"run.name": "whole"}))
    directory = run_of(run)
    with pytest.raises(Stopped):
        fit(run, directory.path, Counting(lambda n: directory.stop_file.touch() if n == 17 else None))
    resume(directory.path)
    assert_same(directory.path, whole.run_dir)
