"""Truth: GECO's multiplier step by step, the distortion that it reaches, and what a checkpoint keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.linear import LinearVae, gauss_hermite
from tests.thread_workers import results_on_threads
from tests.training.small import ALONE, SHAPE, begin, experiment, run_epoch
from vae_ray import UserError
from vae_ray.objectives.base import Losses
from vae_ray.objectives.geco import Geco
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.runs.preflight import checked_model
from vae_ray.training.state import TrainState


def given(distortion: list[float]) -> tuple[Losses, GlobalBatch]:
    rows = torch.tensor(distortion, dtype=torch.float64)
    return Losses({}, {"distortion": rows}), GlobalBatch(len(rows), slice(0, len(rows)), 99, ALONE)


def multipliers(distortions: list[list[float]], **settings: Any) -> list[float]:
    objective = Geco(target=10.0, **settings).double()
    found = []
    for rows in distortions:
        objective.update(*given(rows))
        found.append(float(objective.log_multiplier.exp()))
    return found


def test_the_logarithm_of_the_multiplier_follows_the_moving_average_of_what_is_above_the_target() -> None:
    found = multipliers([[12.0, 16.0], [9.0], [2.0, 4.0, 6.0]], decay=0.75, step_size=1e-3)
    # the average is over the steps so far: its weights 1/4 * (3/4)^age are divided by their sum
    averages = [4.0, (0.75 * 4 - 1) / 1.75, (0.5625 * 4 - 0.75 * 1 - 6) / 2.3125]
    expected = [math.exp(1e-3 * sum(averages[: n + 1])) for n in range(3)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_multiplier_changes_by_one_per_cent_at_most_and_stays_positive_and_finite() -> None:
    up, down = multipliers([[1e30]] * 2000, step_size=1.0), multipliers([[-1e30]] * 2000, step_size=1.0)
    assert up[0] == pytest.approx(math.exp(0.01))
    assert down[0] == pytest.approx(math.exp(-0.01))
    assert up[-1] == pytest.approx(1e6)
    assert down[-1] == pytest.approx(1e-6)


@pytest.mark.parametrize("variance", [0.3, 0.8])
def test_it_ends_at_the_target_with_the_multiplier_of_the_constrained_optimum(variance: float) -> None:
    """The spread s² of a linear VAE's posterior, everything else held: D = (|x - w m - o|² + |w|² s²) / 2 + log 2 pi.

    The rate (m² + s² - 1 - log s²) / 2 has the slope -multiplier |w|² / 2 there.
    """
    model = LinearVae(is_prior_standard=True)
    a, b, w, o = (model.parameters[name] for name in ("a", "b", "w", "o"))
    residual = model.x - w * (model.x @ a + b) - o
    target = 0.5 * (residual.square().sum() + w @ w * variance) + math.log(2 * math.pi)
    objective = Geco(target=float(target), decay=0.5, step_size=0.5).double()
    noise, weights = gauss_hermite(1)
    for _ in range(1000):
        terms, gradients = model.passes(objective, noise)
        distortion = weights @ terms["distortion"]
        model.parameters["c"] = model.parameters["c"] - 0.2 * weights @ gradients["c"]
        objective.update(*given([float(distortion)]))
    assert float(distortion) == pytest.approx(float(target), rel=1e-6)
    assert float((2 * model.parameters["c"]).exp()) == pytest.approx(variance, rel=1e-5)
    assert float(objective.log_multiplier.exp()) == pytest.approx((1 / variance - 1) / float(w @ w), rel=1e-5)


def tensors(state: TrainState) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in state.tensors().items() if name.startswith("objective.")}


def test_the_multiplier_is_in_the_training_state_and_the_same_for_any_number_of_workers() -> None:
    config = experiment(objective={"name": "geco", "target": 15.0})
    alone = begin(config)
    run_epoch(alone)
    expected = tensors(alone)
    assert set(expected) == {"objective.log_multiplier", "objective.excess"}
    assert float(expected["objective.log_multiplier"]) > 1e-3
    for size in (2, 3, 5):
        states = [begin(config) for _ in range(size)]
        results_on_threads(size, lambda group, states=states: run_epoch(states[group.rank], 1, group))  # type: ignore[misc]
        for state in states:
            for name, value in tensors(state).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=0)
    restored = begin(config)
    restored.model.load_state_dict(alone.model.state_dict())
    restored.load({name: t.clone() for name, t in alone.tensors().items()}, alone.scalars())
    assert all(torch.equal(value, expected[name]) for name, value in tensors(restored).items())
    assert run_epoch(restored, 2) == run_epoch(alone, 2)
    assert all(torch.equal(value, tensors(alone)[name]) for name, value in tensors(restored).items())


def test_a_target_is_asked_for_in_one_line_before_training() -> None:
    config = experiment(objective={"name": "geco"})
    with pytest.raises(UserError, match=r"^objective\.target: got null, .*--objective\.target 100") as caught:
        checked_model(config, SHAPE, num_training=9)
    assert "\n" not in str(caught.value)
