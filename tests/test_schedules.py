"""Contract: every schedule of the learning rate and of beta."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_ray import Experiment, UserError
from vae_ray.training.optimization import learning_rate
from vae_ray.training.schedules import SCHEDULES, rate_factor

NUM_STEPS, WARMUP_STEPS, PEAK = 50, 7, 0.25


@pytest.fixture(params=sorted(SCHEDULES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


SETTINGS = {"step": {"epochs": [2, 3], "factors": [0.5, 0.1]}}
"""Of those entries that do nothing without them; a run has five epochs."""


def rate(
    name: str, step: int, *, num_steps: int = NUM_STEPS, warmup_steps: int = WARMUP_STEPS, peak: float = PEAK
) -> float:
    schedule = {"name": name, **SETTINGS.get(name, {})}
    config = Experiment.from_dict({"optim": {"lr": peak, "warmup_steps": warmup_steps, "schedule": schedule}}).optim
    return learning_rate(config, step=step, num_steps=num_steps, epochs=5)


def curve(name: str, *, warmup_steps: int = WARMUP_STEPS) -> list[float]:
    return [rate(name, step, warmup_steps=warmup_steps) for step in range(NUM_STEPS)]


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"one_cycle"}))
def test_a_decay_starts_at_the_peak_and_never_rises(name: str) -> None:
    values = curve(name, warmup_steps=0)
    assert values[0] == PEAK
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert min(values) > 0


@pytest.mark.parametrize(("schedule", "quarter", "half", "end"), [
    ({"name": "constant"}, 1, 1, 1),
    ({"name": "linear"}, 0.75, 0.5, 0),
    ({"name": "cosine"}, (2 + 2**0.5) / 4, 0.5, 0),
    ({"name": "step", "epochs": [5]}, 1, 0.1, 0.1),
    ({"name": "step", "epochs": [2.5, 5], "factors": 0.1}, 0.1, 0.01, 0.01),
    ({"name": "step", "epochs": [2, 9], "factors": [0.7, 0.25]}, 0.7, 0.7, 0.25),
    ({"name": "one_cycle", "rise": 0.5, "start_factor": 0.2}, 0.6, 1, 4e-6),
    ({"name": "one_cycle", "rise": 0.25}, 1, 0.75, 4e-6),
])  # fmt: skip
def test_known_values(schedule: dict[str, object], quarter: float, half: float, end: float) -> None:
    config = Experiment.from_dict({"optim": {"schedule": schedule}}).optim.schedule
    found = [rate_factor(config, progress, epoch=10 * progress) for progress in (0.25, 0.5, 1.0)]
    assert found == pytest.approx([quarter, half, end], rel=2e-6, abs=1e-15)


def test_a_one_cycle_run_rises_from_a_twenty_fifth_to_the_peak_and_falls_to_nearly_zero() -> None:
    values = curve("one_cycle", warmup_steps=0)
    assert values[0] == pytest.approx(0.04 * PEAK, rel=1e-12)
    assert values[15] == max(values) == PEAK
    assert all(earlier < later for earlier, later in pairwise(values[:16]))
    assert all(earlier > later for earlier, later in pairwise(values[15:]))


@pytest.mark.parametrize(("schedule", "message"), [
    ({"epochs": [1, 2, 3], "factors": [0.1, 0.2]},
     r"schedule\.factors: got \[0.1, 0.2\], should be one number, or as many as the 3 epochs; .*factors 0.1$"),
    ({"epochs": [2, 1]}, r"^optim\.schedule\.epochs: got \[2, 1\], should be in rising order; .*epochs 1.0,2.0$"),
])  # fmt: skip
def test_steps_that_do_not_fit_each_other_are_refused(schedule: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Experiment.from_dict({"optim": {"schedule": {"name": "step", **schedule}}})


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"one_cycle"}))
def test_warmup_rises_in_equal_steps_from_above_zero_to_the_peak(name: str) -> None:
    values = curve(name)
    expected = [PEAK * (step + 1) / (WARMUP_STEPS + 1) for step in range(WARMUP_STEPS + 1)]
    assert values[: WARMUP_STEPS + 1] == pytest.approx(expected, rel=1e-15)
    assert values[WARMUP_STEPS] == PEAK == max(values)


def test_a_resumed_run_sees_the_same_values_because_they_are_a_function_of_the_step(name: str) -> None:
    whole = curve(name)
    steps = list(range(NUM_STEPS))
    random.Random(1).shuffle(steps)
    for step in steps:
        assert rate(name, step) == whole[step]


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 100_000),
    st.integers(0, 200_000),
    st.floats(0, 1, exclude_max=True),
    st.floats(1e-8, 1e3),
)
def test_every_step_of_a_run_has_a_value_above_zero_and_at_most_the_peak(
    name: str, num_steps: int, warmup_steps: int, position: float, peak: float
) -> None:
    step = int(position * num_steps)
    assert 0 < rate(name, step, num_steps=num_steps, warmup_steps=warmup_steps, peak=peak) <= peak
