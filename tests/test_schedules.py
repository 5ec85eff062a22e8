"""Contract: every schedule of the learning rate and of beta."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_ray.training.schedules import SCHEDULES, scheduled

NUM_STEPS, WARMUP_STEPS, PEAK = 50, 7, 0.25


@pytest.fixture(params=sorted(SCHEDULES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def curve(name: str, *, warmup_steps: int = WARMUP_STEPS) -> list[float]:
    return [
        scheduled(PEAK, name, step=step, num_steps=NUM_STEPS, warmup_steps=warmup_steps) for step in range(NUM_STEPS)
    ]


def test_a_schedule_starts_at_the_peak_and_never_rises(name: str) -> None:
    values = curve(name, warmup_steps=0)
    assert values[0] == PEAK
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert min(values) > 0


def test_a_schedule_is_a_factor_between_zero_and_one(name: str) -> None:
    factors = [SCHEDULES[name](i / 100) for i in range(101)]
    assert factors[0] == 1
    assert min(factors) >= 0
    assert max(factors) <= 1


@pytest.mark.parametrize(("name", "quarter", "half", "end"), [
    ("constant", 1, 1, 1),
    ("linear", 0.75, 0.5, 0),
    ("cosine", (2 + 2**0.5) / 4, 0.5, 0),
])  # fmt: skip
def test_known_values(name: str, quarter: float, half: float, end: float) -> None:
    found = [SCHEDULES[name](progress) for progress in (0.25, 0.5, 1.0)]
    assert found == pytest.approx([quarter, half, end], abs=1e-15)


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
        assert scheduled(PEAK, name, step=step, num_steps=NUM_STEPS, warmup_steps=WARMUP_STEPS) == whole[step]


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
    assert 0 < scheduled(peak, name, step=step, num_steps=num_steps, warmup_steps=warmup_steps) <= peak
