"""Truth: ticks are round numbers inside their axis, few of them, for whatever numbers a sweep comes up with."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vae_ray.tuning.report.scales import MOST_TICKS, color_scale, even_ticks, log_ticks, size_scale

NUMBERS = st.floats(1e-12, 1e12)


@given(NUMBERS, NUMBERS)
def test_logarithmic_ticks_are_a_few_rising_numbers_inside_the_axis(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assume(low < high)
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= MOST_TICKS
    assert low <= ticks[0]
    assert ticks[-1] <= high
    assert all(x < y for x, y in itertools.pairwise(ticks))


def test_logarithmic_ticks_are_round_where_the_axis_has_round_numbers() -> None:
    assert log_ticks(0.25, 4.0) == [0.5, 1.0, 2.0]
    assert log_ticks(1e-4, 1e-2) == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert log_ticks(1.076, 1.936) == [1.076, 1.936], "no round number between them: the ends"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_even_ticks_are_rising_numbers_inside_the_axis(low: float, width: float) -> None:
    ticks = even_ticks(low, low + width)
    assert len(ticks) <= MOST_TICKS + 1
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    assert all(x < y for x, y in itertools.pairwise(ticks))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.booleans())
def test_every_set_of_betas_has_colours(values: list[float], log: bool) -> None:
    assume(min(values) == max(values) or max(values) - min(values) > 1e-9)
    assume(all(value == 0 or value > 1e-9 for value in values))
    scale = color_scale("beta", "beta", values, log=log)
    assert ("value" in scale) == (len(set(values)) == 1)


@pytest.mark.parametrize("values", [[1], [2, 2], [1, 2], [5, 10, 20, 40], list(range(1, 40)), [999, 1001]])
def test_every_set_of_latent_dims_has_sizes(values: list[int]) -> None:
    scale = size_scale("latent_dim", "latent_dim", values)
    assert ("value" in scale) == (len(set(values)) == 1)
