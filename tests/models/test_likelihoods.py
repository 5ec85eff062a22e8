"""Contract and truth: every likelihood against an independent float64 reference, and as a distribution."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from vae_ray import Experiment
from vae_ray.models.likelihoods import LIKELIHOODS, Likelihood, build_likelihood, sum_softplus

SHAPE = (3, 2, 5, 4)
SETTINGS = {"gaussian": {"scale": 0.3}}


def build(name: str, **settings: float) -> Likelihood:
    given = {"name": name, **SETTINGS.get(name, {}), **settings}
    return build_likelihood(Experiment.from_dict({"likelihood": given}).likelihood)


# log p(x|z) per pixel, written with torch's own functions; a new likelihood needs an entry here
REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bernoulli": lambda logits, x: -F.binary_cross_entropy_with_logits(logits, x, reduction="none"),
    "gaussian": lambda logits, x: Normal(torch.sigmoid(logits), 0.3).log_prob(x),
}


@pytest.fixture(params=sorted(LIKELIHOODS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def likelihood(name: str) -> Likelihood:
    return build(name)


def logits_and_images(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    x = torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    return logits.to(dtype), x.to(dtype)


# float64: 40 pixels of rounded terms; float32: sums of 40 terms of up to 10 nats, each to 6e-8
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_log_prob_is_the_sum_over_pixels_of_the_reference(
    name: str, likelihood: Likelihood, dtype: torch.dtype, rtol: float
) -> None:
    logits, x = logits_and_images()
    expected = REFERENCES[name](logits, x).flatten(1).sum(1)
    result = likelihood.log_prob(logits.to(dtype), x.to(dtype))
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=0)


def test_gradient_is_that_of_the_reference(name: str, likelihood: Likelihood) -> None:
    logits, x = logits_and_images()
    weights = torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)  # so that examples cannot be confused
    ours, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (likelihood.log_prob(ours, x) * weights).sum().backward()
    (REFERENCES[name](reference, x).flatten(1).sum(1) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-12, atol=1e-14)


def test_gradient_is_that_of_finite_differences(likelihood: Likelihood) -> None:
    logits, x = logits_and_images()
    logits = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: likelihood.log_prob(given, x), (logits,))


def test_gradient_does_not_change_what_backward_was_given(likelihood: Likelihood) -> None:
    logits, x = logits_and_images()
    logits = logits.requires_grad_()
    before = logits.detach().clone(), x.clone()
    upstream = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    likelihood.log_prob(logits, x).backward(upstream)
    assert torch.equal(logits.detach(), before[0])
    assert torch.equal(x, before[1])
    assert upstream.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_values_and_gradients(likelihood: Likelihood, dtype: torch.dtype) -> None:
    extremes = torch.tensor([-1e4, -200.0, -88.8, 0.0, 88.8, 200.0, 1e4], dtype=dtype)
    logits, x = torch.cartesian_prod(extremes, torch.tensor([0.0, 0.3, 1.0], dtype=dtype)).T
    logits = logits.reshape(-1, 1, 1, 1).requires_grad_()
    log_prob = likelihood.log_prob(logits, x.reshape(-1, 1, 1, 1))
    log_prob.sum().backward()
    assert bool(log_prob.isfinite().all())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_mean_is_a_pixel_value_that_rises_with_its_logit(likelihood: Likelihood) -> None:
    logits = torch.linspace(-120, 120, 481).reshape(1, 1, 13, 37)
    mean = likelihood.mean(logits)
    assert mean.min() >= 0
    assert mean.max() <= 1
    assert bool((mean.flatten().diff() >= 0).all())
    assert float(mean.max() - mean.min()) > 0.99


def test_mean_of_samples_converges_to_the_mean(likelihood: Likelihood) -> None:
    n = 40_000
    logits = 2 * torch.randn(1, 1, 2, 3, generator=torch.Generator().manual_seed(6))
    samples = likelihood.sample(logits.expand(n, -1, -1, -1), torch.Generator().manual_seed(7))
    standard_error = samples.std(0) / n**0.5
    assert bool(((samples.mean(0) - likelihood.mean(logits)[0]).abs() < 5 * standard_error).all())


def test_samples_have_the_log_prob_of_the_density_on_average(likelihood: Likelihood, name: str) -> None:
    """-E log p(x|z) over samples is the entropy, known in closed form for both families."""
    n = 40_000
    logits = torch.randn(1, 1, 2, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    p = torch.sigmoid(logits)
    entropy = {
        "bernoulli": -(p * p.log() + (1 - p) * (1 - p).log()).sum(),
        "gaussian": Normal(p, 0.3).entropy().sum(),
    }[name]
    many = logits.expand(n, -1, -1, -1)
    log_prob = likelihood.log_prob(many, likelihood.sample(many, torch.Generator().manual_seed(9)))
    assert abs(float(log_prob.mean() + entropy)) < 5 * float(log_prob.std()) / n**0.5


def test_samples_are_a_function_of_the_generator(likelihood: Likelihood) -> None:
    logits, _ = logits_and_images()
    first, again, other = (likelihood.sample(logits, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bernoulli_probabilities_of_all_binary_images_sum_to_one() -> None:
    logits = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64).reshape(16, 1, 2, 2)
    log_prob = build("bernoulli").log_prob(logits.expand(16, -1, -1, -1), images)
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-14)


def test_gaussian_density_integrates_to_one() -> None:
    """Over a grid of two-pixel images: the trapezoid rule is exact to rounding for a Gaussian cut at 8 sigma."""
    scale, logits = 0.25, torch.tensor([0.4, -1.1], dtype=torch.float64).reshape(1, 1, 1, 2)
    step = scale / 10
    offsets = torch.arange(-80, 81, dtype=torch.float64) * step
    grid = torch.cartesian_prod(offsets, offsets) + torch.sigmoid(logits).flatten()
    likelihood = build("gaussian", scale=scale)
    log_prob = likelihood.log_prob(logits.expand(len(grid), -1, -1, -1), grid.reshape(-1, 1, 1, 2))
    assert float(log_prob.exp().sum() * step**2) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_sum_softplus_is_exact_to_rounding(dtype: torch.dtype, rtol: float) -> None:
    """Each value by itself against log(1 + exp(l)) = logaddexp(l, 0) in float64."""
    logits = torch.linspace(-80, 80, 4001, dtype=torch.float64).to(dtype)[:, None]
    expected = torch.logaddexp(logits.double(), torch.zeros(1, dtype=torch.float64)).squeeze(1)
    result = sum_softplus(logits).double()
    # below log(eps) the logarithm of a sigmoid that rounds to 1 is 0: an absolute error of one rounding of 1
    torch.testing.assert_close(result, expected, rtol=rtol, atol=torch.finfo(dtype).eps)


def test_number_of_parameters_and_initial_bias_fit_each_other(likelihood: Likelihood) -> None:
    image = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(4))
    bias = likelihood.initial_bias(image)
    assert bias.shape == (likelihood.num_params(3), 5, 4)
    torch.testing.assert_close(likelihood.mean(bias[None])[0], image.clamp(1e-3, 1 - 1e-3), rtol=0, atol=1e-6)


def test_log_prob_of_an_image_does_not_depend_on_the_others(likelihood: Likelihood) -> None:
    logits, x = logits_and_images()
    together = likelihood.log_prob(logits, x)
    alone = torch.cat([likelihood.log_prob(logits[i : i + 1], x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=0)
