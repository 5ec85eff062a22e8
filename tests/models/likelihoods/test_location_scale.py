"""Truth: Gaussian and Laplace with a fixed, a learned and an optimal scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.likelihoods.small import BATCH, CHANNELS, HEIGHT, WIDTH, build, random_images, random_params
from tests.thread_workers import results_on_threads
from tests.training.small import ALONE, CPU, begin, experiment, record_gradients, run_epoch
from vae_ray.config.fields import MIN_PIXEL_SCALE
from vae_ray.models.likelihoods import Gaussian
from vae_ray.models.likelihoods.location_scale import MOMENT_DECAY, LocationScale
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import SingleProcess
from vae_ray.training.state import TrainState

NAMES = ["gaussian", "laplace"]
NUM_VALUES = BATCH * CHANNELS * HEIGHT * WIDTH
WHOLE = GlobalBatch(BATCH, slice(0, BATCH), BATCH, SingleProcess(CPU))


def built(name: str, **settings: Any) -> LocationScale:
    likelihood = build(name, **settings).double()
    assert isinstance(likelihood, LocationScale)
    return likelihood


def mean_deviation(name: str, params: Tensor, x: Tensor) -> Tensor:
    residual = x - torch.sigmoid(params)
    return residual.square().mean() if name == "gaussian" else residual.abs().mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.001, 0.25, 3.0])
def test_density_integrates_to_one_over_images_of_two_pixels(name: str, scale: float) -> None:
    """The trapezoid rule: exact for a Gaussian cut at 8 sigma; of the kink of a Laplace density h²/12 is left."""
    params = torch.tensor([0.4, -1.1], dtype=torch.float64).reshape(1, 1, 1, 2)
    step = scale / 20
    offsets = torch.arange(-800, 801, dtype=torch.float64) * step
    grid = torch.sigmoid(params) + offsets[:, None, None, None].expand(-1, 1, 1, 2)
    log_prob = built(name, scale=scale).log_prob(params.expand(len(grid), -1, -1, -1), grid)
    # both pixels by the same offset: sqrt of the density is that of one pixel, as both scales are equal
    assert float((0.5 * log_prob).exp().sum() * step) == pytest.approx(1, abs=1e-12 if name == "gaussian" else 3e-4)


@pytest.mark.parametrize("name", NAMES)
def test_identity_mean_is_the_decoders_output_and_pictures_show_what_they_can(name: str) -> None:
    likelihood = built(name, mean="identity")
    params, x = random_params(likelihood), random_images()
    expected = built(name).log_prob(torch.logit(x * 0.8 + 0.1), x)
    torch.testing.assert_close(likelihood.log_prob(x * 0.8 + 0.1, x), expected, rtol=1e-12, atol=0)
    assert torch.equal(likelihood.mean(params), params.clamp(0, 1))
    assert torch.equal(likelihood.initial_bias(x[0]), x[0])


# --- learned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.002, 0.1, 2.0])
def test_a_learned_scale_begins_at_its_setting_and_gives_the_fixed_ones_values(name: str, scale: float) -> None:
    learned, fixed = built(name, sigma="learned", scale=scale), built(name, scale=scale)
    params, x = random_params(fixed), random_images()
    # the parameter is built in float32
    assert learned.scale(params).item() == pytest.approx(scale, rel=1e-6)
    torch.testing.assert_close(learned.log_prob(params, x), fixed.log_prob(params, x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_learned_scale_is_zero_at_the_mean_deviation(name: str) -> None:
    """sigma² = mean squared error is where the likelihood is highest (of laplace: the mean absolute error)."""
    likelihood = built(name, sigma="learned")
    params, x = random_params(likelihood), random_images()
    best = mean_deviation(name, params, x) ** (1 / likelihood.power)
    gradients = []
    for factor in (0.5, 1.0, 2.0):
        with torch.no_grad():
            likelihood.log_scale.copy_(0.5 * torch.log((factor * best) ** 2 - MIN_PIXEL_SCALE**2))
        (gradient,) = torch.autograd.grad(likelihood.log_prob(params, x).sum(), likelihood.log_scale)
        gradients.append(float(gradient) / NUM_VALUES)
    assert gradients[0] > 0.9
    assert abs(gradients[1]) < 1e-12
    assert gradients[2] < -0.4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("log_scale", [-1e4, -50.0, -7.0])
def test_a_learned_scale_has_a_soft_lower_bound(name: str, log_scale: float) -> None:
    likelihood = built(name, sigma="learned")
    with torch.no_grad():
        likelihood.log_scale.fill_(log_scale)
    scale = likelihood.scale(torch.zeros(1, dtype=torch.float64)).item()
    assert MIN_PIXEL_SCALE <= scale < 1.4 * MIN_PIXEL_SCALE
    assert bool(likelihood.log_prob(random_params(likelihood), random_images()).isfinite().all())


def test_a_learned_scale_at_the_bound_can_grow() -> None:
    likelihood = built("gaussian", sigma="learned", scale=MIN_PIXEL_SCALE)
    loss = -likelihood.log_prob(random_params(likelihood), random_images()).sum()
    (gradient,) = torch.autograd.grad(loss, likelihood.log_scale)
    assert float(gradient) < -1e5


# --- optimal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_optimal_scale_of_a_batch_is_its_mean_deviation(name: str) -> None:
    likelihood = built(name, sigma="optimal")
    params, x = random_params(likelihood), random_images()
    likelihood.fit(params, x, WHOLE)
    deviation = mean_deviation(name, params, x)
    torch.testing.assert_close(likelihood.scale(params) ** likelihood.power, deviation, rtol=1e-14, atol=0)
    # the value of the profile: D (log s + log Z + 1 / p)
    per_value = deviation.log() / likelihood.power + likelihood.log_z + 1 / likelihood.power
    total = likelihood.log_prob(params, x).sum()
    torch.testing.assert_close(total, -NUM_VALUES * per_value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_with_the_optimal_scale_held_is_that_of_its_logarithm(name: str) -> None:
    """The envelope theorem; for a Gaussian that of D/2 log MSE."""
    likelihood = built(name, sigma="optimal")
    params, x = random_params(likelihood).requires_grad_(), random_images()
    likelihood.fit(params.detach(), x, WHOLE)
    (ours,) = torch.autograd.grad(-likelihood.log_prob(params, x).sum(), params)
    profile = NUM_VALUES / likelihood.power * mean_deviation(name, params, x).log()
    (expected,) = torch.autograd.grad(profile, params)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_the_optimal_scale_loses_nothing_in_float32() -> None:
    """Over 24 million values, more than float32 can count; the mean squared error to a few roundings."""
    likelihood = Gaussian(0.1, sigma="optimal", mean="identity")
    params = torch.full((24, 1, 1000, 1000), 0.3)
    x = params + 0.01 * torch.randn(1, 1, 1000, 1000, generator=torch.Generator().manual_seed(1))
    likelihood.fit(params, x, WHOLE)
    expected = (x[0] - params[0]).double().square().mean()
    assert float(likelihood.batch_moment) == pytest.approx(float(expected), rel=3e-7)


def test_evaluation_takes_the_running_average_and_training_the_batch() -> None:
    likelihood = built("gaussian", sigma="optimal", scale=0.5)
    params = torch.zeros(BATCH, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    assert float(likelihood.eval().scale(params)) == pytest.approx(0.5, rel=1e-7)
    errors = [0.3, 0.1, 0.4, 0.2]
    for error in errors:
        likelihood.train().fit(params, torch.full_like(params, 0.5 + error), WHOLE)
        assert float(likelihood.scale(params)) == pytest.approx(error, rel=1e-12)
    average = sum(error**2 for error in errors) / len(errors)
    assert float(likelihood.eval().scale(params)) == pytest.approx(math.sqrt(average), rel=1e-12)
    for _ in range(2000):  # early errors are forgotten
        likelihood.fit(params, torch.full_like(params, 0.55), WHOLE)
    assert float(likelihood.moment) == pytest.approx(0.05**2, rel=2000 * MOMENT_DECAY**1900)


def test_a_batch_that_is_not_finite_is_left_out_of_the_average_and_gives_a_loss_that_is_not_finite() -> None:
    likelihood = built("gaussian", sigma="optimal")
    params, x = random_params(likelihood), random_images()
    likelihood.fit(params, x, WHOLE)
    before = float(likelihood.moment)
    for bad in (math.nan, math.inf):
        broken = params.clone()
        broken[1, 0, 2, 3] = bad
        likelihood = likelihood.train()
        likelihood.is_identity = True  # a sigmoid of infinity is 1
        likelihood.fit(broken, x, WHOLE)
        assert not bool(likelihood.log_prob(broken, x).isfinite().all())
        assert (float(likelihood.moment), float(likelihood.num_batches)) == (before, 1.0)
    likelihood.is_identity = False
    assert bool(likelihood.eval().log_prob(params, x).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_the_optimal_scale_has_the_lower_bound(name: str) -> None:
    likelihood = built(name, sigma="optimal")
    params = random_params(likelihood)
    likelihood.fit(params, torch.sigmoid(params), WHOLE)
    assert float(likelihood.scale(params)) == pytest.approx(MIN_PIXEL_SCALE, rel=1e-12)
    assert bool(likelihood.log_prob(params, torch.sigmoid(params)).isfinite().all())


# --- in training ----------------------------------------------------------------------------------------


def trained(state: TrainState, group: Any) -> tuple[list[Tensor], dict[str, float]]:
    (recorder,) = record_gradients(state).values()
    return recorder.gradients, run_epoch(state, 1, group)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", ["learned", "optimal"])
def test_any_number_of_workers_has_the_scale_gradients_and_metrics_of_one(name: str, sigma: str, size: int) -> None:
    """Also with workers that have no image in the last batch."""
    config = experiment(likelihood={"name": name, "sigma": sigma})
    alone = begin(config)
    expected, expected_means = trained(alone, ALONE)
    states = [begin(config) for _ in range(size)]
    for rank, (gradients, means) in enumerate(
        results_on_threads(size, lambda group: trained(states[group.rank], group))
    ):
        for mine, reference in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12 * float(reference.abs().max()))
        assert means == pytest.approx(expected_means, rel=1e-12)
        for mine, reference in zip(states[rank].model.buffers(), alone.model.buffers(), strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-12, atol=0)


def test_the_average_is_in_checkpoints_and_the_batchs_own_scale_is_not() -> None:
    state = begin(experiment(likelihood={"name": "gaussian", "sigma": "optimal"}, training={"ema_decay": 0.9}))
    run_epoch(state)
    weights = state.model.state_dict()
    assert [name for name in weights if "likelihood" in name] == ["likelihood.moment", "likelihood.num_batches"]
    assert float(weights["likelihood.num_batches"]) == 5
    again = begin(experiment(likelihood={"name": "gaussian", "sigma": "optimal"})).model
    again.load_state_dict(weights)
    x = torch.rand(4, *again.image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    params = torch.zeros_like(x)
    for model in (again, state.evaluated_model):
        assert torch.equal(
            model.eval().likelihood.log_prob(params, x), state.model.eval().likelihood.log_prob(params, x)
        )
