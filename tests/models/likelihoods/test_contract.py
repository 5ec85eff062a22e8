"""Contract and truth: every likelihood against an independent float64 reference, and as a distribution."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, ContinuousBernoulli, Distribution, Laplace, Normal

from tests.models.likelihoods.small import (
    BATCH,
    CHANNELS,
    HEIGHT,
    WIDTH,
    all_levels,
    build,
    random_images,
    random_params,
)
from tests.models.likelihoods.test_discretized_logistic import reference_log_prob
from vae_ray.models.likelihoods import LIKELIHOODS, Likelihood, sum_softplus


@pytest.fixture(params=sorted(LIKELIHOODS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def likelihood(name: str) -> Likelihood:
    return build(name)


def by_pixel(distribution: Distribution, x: Tensor) -> Tensor:
    return distribution.log_prob(x).flatten(1).sum(1)


def reference_of_categorical(params: Tensor, x: Tensor) -> Tensor:
    by_level = params.reshape(len(params), x.shape[1], 256, *x.shape[2:]).permute(0, 1, 3, 4, 2)
    return by_pixel(Categorical(logits=by_level), (255 * x).round())


# log p(x|z) written with torch's own functions, or out in full; a new likelihood needs an entry here
REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bernoulli": lambda p, x: -F.binary_cross_entropy_with_logits(p, x, reduction="none").flatten(1).sum(1),
    "continuous_bernoulli": lambda p, x: by_pixel(ContinuousBernoulli(logits=p), x),
    "gaussian": lambda p, x: by_pixel(Normal(torch.sigmoid(p), 0.3), x),
    "laplace": lambda p, x: by_pixel(Laplace(torch.sigmoid(p), 0.3), x),
    "discretized_logistic": reference_log_prob,
    "categorical": reference_of_categorical,
}


# float64: 40 pixels of rounded terms; float32: sums of 40 terms of up to some 10 nats, each to 6e-8
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_log_prob_is_the_sum_over_pixels_of_the_reference(
    name: str, likelihood: Likelihood, dtype: torch.dtype, rtol: float
) -> None:
    params = random_params(likelihood)
    expected = REFERENCES[name](params, random_images())
    result = likelihood.log_prob(params.to(dtype), random_images(dtype=dtype))
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=0)


def test_gradient_is_that_of_the_reference(name: str, likelihood: Likelihood) -> None:
    params, x = random_params(likelihood, size=1.0), random_images()
    weights = torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)  # so that examples cannot be confused
    ours, reference = params.clone().requires_grad_(), params.clone().requires_grad_()
    (likelihood.log_prob(ours, x) * weights).sum().backward()
    (REFERENCES[name](reference, x) * weights).sum().backward()
    # the reference's differences of distribution functions cancel
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-11, atol=1e-11)


def test_gradient_is_that_of_finite_differences(likelihood: Likelihood) -> None:
    params, x = random_params(likelihood, size=1.0)[:2, :, :1, :1].requires_grad_(), random_images()[:2, :, :1, :1]
    assert torch.autograd.gradcheck(lambda given: likelihood.log_prob(given, x), (params,))


def test_gradient_does_not_change_what_backward_was_given(likelihood: Likelihood) -> None:
    params, x = random_params(likelihood).requires_grad_(), random_images()
    before = params.detach().clone(), x.clone()
    upstream = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    likelihood.log_prob(params, x).backward(upstream)
    assert torch.equal(params.detach(), before[0])
    assert torch.equal(x, before[1])
    assert upstream.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_extreme_parameters_give_finite_values_and_gradients(
    likelihood: Likelihood, dtype: torch.dtype, channels: int
) -> None:
    extremes = torch.tensor([-1e4, -200.0, -88.8, 0.0, 88.8, 200.0, 1e4], dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randint(0, 7, (300, likelihood.num_params(channels), 1, 1), generator=generator)
    levels = torch.tensor([0.0, 77.0, 255.0], dtype=dtype)
    x = levels[torch.randint(0, 3, (300, channels, 1, 1), generator=generator)] / 255
    params = torch.cat([extremes[chosen], extremes[:, None, None, None].expand(-1, *chosen.shape[1:])])
    params, x = params.requires_grad_(), torch.cat([x, x[:7]])
    log_prob = likelihood.log_prob(params, x)
    log_prob.sum().backward()
    assert bool(log_prob.isfinite().all())
    assert params.grad is not None
    assert bool(params.grad.isfinite().all())
    for made in (likelihood.mean(params.detach()), likelihood.sample(params.detach(), generator)):
        assert bool(made.isfinite().all())


@pytest.mark.parametrize("size", [0.1, 3.0, 1e3])
def test_mean_is_a_pixel_value(likelihood: Likelihood, size: float) -> None:
    mean = likelihood.mean(random_params(likelihood, size=size).float())
    assert mean.shape == (BATCH, CHANNELS, HEIGHT, WIDTH)
    assert mean.min() >= 0
    assert mean.max() <= 1


@pytest.mark.parametrize("name", ["bernoulli", "continuous_bernoulli", "gaussian", "laplace"])
def test_mean_rises_with_its_logit(likelihood: Likelihood) -> None:
    mean = likelihood.mean(torch.linspace(-120, 120, 481).reshape(1, 1, 13, 37))
    assert bool((mean.flatten().diff() >= 0).all())
    assert float(mean.max() - mean.min()) > 0.98


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_of_samples_converges_to_the_mean(likelihood: Likelihood, channels: int) -> None:
    n = 20_000
    # of a discretized logistic with scales of 0.14: away from black and white, where its mean is exact
    params = 0.3 * random_params(likelihood, channels=channels, size=1.0)[:1, :, :2, :3].float()
    if "components" in vars(likelihood):
        params[:, likelihood.num_params(channels) * 3 // 5 :] -= 2.0
        params *= 0.5
    samples = likelihood.sample(params.expand(n, -1, -1, -1), torch.Generator().manual_seed(7))
    standard_error = samples.std(0) / n**0.5
    assert bool(((samples.mean(0) - likelihood.mean(params)[0]).abs() < 5 * standard_error).all())


def entropy(name: str, params: Tensor) -> Tensor:
    """-E log p of one-channel pixels, in closed form or summed over all levels."""
    p = torch.sigmoid(params)
    if name == "bernoulli":
        return -(p * p.log() + (1 - p) * (1 - p).log()).sum()
    if name in ("gaussian", "laplace"):
        return (Normal if name == "gaussian" else Laplace)(p, 0.3).entropy().sum()
    if name == "continuous_bernoulli":
        return ContinuousBernoulli(logits=params).entropy().sum()
    pixels = params.flatten(2).permute(2, 0, 1)[..., None, None]
    log_p = torch.stack([build(name).log_prob(pixel.expand(256, -1, -1, -1), all_levels()) for pixel in pixels])
    return -(log_p.exp() * log_p).sum()


def test_samples_have_the_log_prob_of_the_density_on_average(likelihood: Likelihood, name: str) -> None:
    """-E log p(x|z) over samples is the entropy."""
    n = 20_000
    params = random_params(likelihood, channels=1, size=1.0)[:1, :, :2, :3]
    many = params.expand(n, -1, -1, -1)
    log_prob = likelihood.log_prob(many, likelihood.sample(many, torch.Generator().manual_seed(9)))
    assert abs(float(log_prob.mean() + entropy(name, params))) < 5 * float(log_prob.std()) / n**0.5


def test_samples_are_a_function_of_the_generator(likelihood: Likelihood) -> None:
    params = random_params(likelihood, size=1.0)
    first, again, other = (likelihood.sample(params, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_are_in_the_support(likelihood: Likelihood) -> None:
    samples = likelihood.sample(random_params(likelihood, size=1.0).float(), torch.Generator().manual_seed(3))
    allowed = {"binary": {0, 1}, "256 levels": {k / 255 for k in range(256)}}.get(likelihood.support)
    if allowed is not None:
        assert set(samples.double().mul(255).round().div(255).unique().tolist()) <= allowed
        torch.testing.assert_close(samples, (samples * 255).round() / 255, rtol=0, atol=0)
    elif likelihood.support == "unit interval":
        assert samples.min() >= 0
        assert samples.max() <= 1
    else:
        assert likelihood.support == "real"


def test_bernoulli_probabilities_of_all_binary_images_sum_to_one() -> None:
    logits = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64).reshape(16, 1, 2, 2)
    log_prob = build("bernoulli").log_prob(logits.expand(16, -1, -1, -1), images)
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("name", ["discretized_logistic", "categorical"])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_probabilities_of_the_256_levels_sum_to_one(
    likelihood: Likelihood, size: float, dtype: torch.dtype, tolerance: float
) -> None:
    params = (
        random_params(likelihood, channels=1, size=size).flatten(2).permute(0, 2, 1).reshape(60, -1, 1, 1).to(dtype)
    )
    levels = all_levels().to(dtype).repeat(60, 1, 1, 1)
    log_prob = likelihood.log_prob(params.repeat_interleave(256, 0), levels)
    totals = log_prob.double().exp().reshape(60, 256).sum(1)
    assert float((totals - 1).abs().max()) < tolerance


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_sum_softplus_is_exact_to_rounding(dtype: torch.dtype, rtol: float) -> None:
    """Each value by itself against log(1 + exp(l)) = logaddexp(l, 0) in float64."""
    logits = torch.linspace(-80, 80, 4001, dtype=torch.float64).to(dtype)[:, None]
    expected = torch.logaddexp(logits.double(), torch.zeros(1, dtype=torch.float64)).squeeze(1)
    result = sum_softplus(logits).double()
    # below log(eps) the logarithm of a sigmoid that rounds to 1 is 0: an absolute error of one rounding of 1
    torch.testing.assert_close(result, expected, rtol=rtol, atol=torch.finfo(dtype).eps)


# what a mean can be at the start: black and white themselves would need infinite parameters
SMALLEST_MEANS = dict.fromkeys(["categorical", "continuous_bernoulli"], 0.01)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_initial_bias_gives_the_mean_image(likelihood: Likelihood, name: str, channels: int) -> None:
    image = torch.rand(channels, 5, 7, generator=torch.Generator().manual_seed(4))
    image[:, 0, 0], image[:, 1, 1] = 0, 1
    bias = likelihood.initial_bias(image)
    assert bias.shape == (likelihood.num_params(channels), 5, 7)
    assert bias.dtype == image.dtype
    smallest = SMALLEST_MEANS.get(name, 1e-3)
    torch.testing.assert_close(likelihood.mean(bias[None])[0], image.clamp(smallest, 1 - smallest), rtol=0, atol=1e-6)


def test_log_prob_of_an_image_does_not_depend_on_the_others(likelihood: Likelihood) -> None:
    params, x = random_params(likelihood), random_images()
    together = likelihood.log_prob(params, x)
    alone = torch.cat([likelihood.log_prob(params[i : i + 1], x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=0)
