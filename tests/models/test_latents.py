"""Truth: distributions of a group against torch.distributions, closed forms and their own samples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from vae_ray.models.latents import (
    LOGVAR_MARGIN,
    LOGVAR_RANGE,
    DiagonalGaussian,
    Group,
    StandardNormal,
    bounded,
    gaussian_from,
)


def random_posterior(*, batch: int = 5, latent_dim: int = 3, dtype: torch.dtype = torch.float64) -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(11)
    mu = 2 * torch.randn(batch, latent_dim, generator=generator, dtype=torch.float64)
    logvar = 1.5 * torch.randn(batch, latent_dim, generator=generator, dtype=torch.float64)
    return DiagonalGaussian(mu.to(dtype), logvar.to(dtype))


def rate(posterior: DiagonalGaussian) -> torch.Tensor:
    """The rate of a group against N(0, I)."""
    return Group(posterior.mean, posterior, StandardNormal(torch.zeros_like(posterior.mean))).rate()


def as_distribution(posterior: DiagonalGaussian) -> Independent:
    return Independent(Normal(posterior.mean, torch.exp(posterior.logvar).sqrt()), 1)


def prior_like(posterior: DiagonalGaussian) -> Independent:
    return Independent(Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean)), 1)


# float64: a sum of three rounded terms; float32: its 6e-8 times a few dozen operations
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_rate_is_the_kl_divergence_of_torch_distributions(dtype: torch.dtype, rtol: float) -> None:
    posterior = random_posterior(dtype=dtype)
    expected = kl_divergence(as_distribution(posterior), prior_like(posterior))
    torch.testing.assert_close(rate(posterior), expected, rtol=rtol, atol=0)


def test_kl_is_zero_for_the_prior() -> None:
    prior = DiagonalGaussian(torch.zeros(4, 7), torch.zeros(4, 7))
    assert torch.equal(rate(prior), torch.zeros(4))


def test_rate_is_summed_over_latent_dimensions_and_not_averaged() -> None:
    one, three = (DiagonalGaussian(torch.full((2, d), 0.5), torch.full((2, d), -0.3)) for d in (1, 3))
    torch.testing.assert_close(rate(three), 3 * rate(one))


def test_rate_is_the_mean_log_ratio_of_its_own_samples() -> None:
    posterior, n = random_posterior(batch=1), 100_000
    eps = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = posterior.rsample(eps)
    log_ratio = as_distribution(posterior).log_prob(z) - prior_like(posterior).log_prob(z)
    standard_error = float(log_ratio.std() / n**0.5)
    assert abs(float(log_ratio.mean() - rate(posterior))) < 5 * standard_error


def test_samples_have_the_mean_and_the_covariance_of_the_posterior() -> None:
    posterior, n = random_posterior(batch=1), 200_000
    eps = torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = posterior.rsample(eps)
    sigma = torch.exp(posterior.logvar[0]).sqrt()
    # five standard errors: sigma / sqrt(n) of a mean, about sqrt(2 / n) of a correlation
    assert bool(((z.mean(0) - posterior.mean[0]).abs() < 5 * sigma / n**0.5).all())
    standardised = torch.cov(z.T) / torch.outer(sigma, sigma)
    torch.testing.assert_close(standardised, torch.eye(3, dtype=torch.float64), rtol=0, atol=5 * (2 / n) ** 0.5)


def test_rate_has_the_gradient_of_the_closed_form() -> None:
    posterior = random_posterior()
    mu, logvar = posterior.mean.requires_grad_(), posterior.logvar.requires_grad_()
    rate(DiagonalGaussian(mu, logvar)).sum().backward()
    # d/dmu = mu; d/dlogvar = (sigma^2 - 1) / 2
    torch.testing.assert_close(mu.grad, mu.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(logvar.grad, 0.5 * (logvar.detach().exp() - 1), rtol=1e-13, atol=1e-15)


def test_samples_are_differentiable_in_mean_and_variance() -> None:
    posterior = random_posterior()
    eps = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mu, logvar = posterior.mean.requires_grad_(), posterior.logvar.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: DiagonalGaussian(m, v).rsample(eps), (mu, logvar))
    torch.autograd.backward(DiagonalGaussian(mu, logvar).rsample(eps).sum())
    # dz/dmu = 1; dz/dlogvar = eps sigma / 2
    torch.testing.assert_close(mu.grad, torch.ones_like(mu))
    torch.testing.assert_close(logvar.grad, 0.5 * eps * logvar.detach().exp().sqrt(), rtol=1e-13, atol=1e-15)


finite = st.floats(-12, 12)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=6))
def test_rate_is_never_negative(parameters: list[tuple[float, float]]) -> None:
    mu, logvar = torch.tensor(parameters, dtype=torch.float64).T.unsqueeze(1)
    # cancellation in exp(l) - l - 1 costs at most a few float64 roundings of the largest term
    assert float(rate(DiagonalGaussian(mu, logvar))) >= -1e-14 * len(parameters)


# --- log densities, and groups of any shape -------------------------------------------------------------

SHAPE = (2, 3, 4)


def random_gaussian(seed: int) -> DiagonalGaussian:
    """Five rows of a group of images."""
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, 5, *SHAPE, generator=generator, dtype=torch.float64)
    return DiagonalGaussian(mean, logvar)


def reference(gaussian: DiagonalGaussian) -> Independent:
    return Independent(Normal(gaussian.mean, torch.exp(gaussian.logvar).sqrt()), len(SHAPE))


def test_kl_of_two_gaussians_is_that_of_torch_distributions() -> None:
    q, p = random_gaussian(1), random_gaussian(2)
    elementwise = q.kl(p)
    assert elementwise is not None
    assert elementwise.shape == (5, *SHAPE)
    expected = kl_divergence(reference(q), reference(p))
    torch.testing.assert_close(elementwise.flatten(1).sum(1), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(Group(q.mean, q, p).rate(), expected, rtol=1e-13, atol=0)


def test_kl_against_the_standard_normal_is_that_against_a_gaussian_of_mean_0_and_variance_1() -> None:
    q = random_gaussian(1)
    zeros = torch.zeros_like(q.mean)
    torch.testing.assert_close(q.kl(StandardNormal(zeros)), q.kl(DiagonalGaussian(zeros, zeros)), rtol=1e-13, atol=0)


def test_log_densities_are_those_of_torch_distributions() -> None:
    q, z = random_gaussian(1), random_gaussian(3).mean
    torch.testing.assert_close(q.log_prob(z), reference(q).log_prob(z), rtol=1e-13, atol=0)
    zeros = torch.zeros_like(z)
    standard = reference(DiagonalGaussian(zeros, zeros))
    torch.testing.assert_close(StandardNormal(zeros).log_prob(z), standard.log_prob(z), rtol=1e-13, atol=0)


def test_without_a_closed_form_the_rate_is_the_log_ratio_of_the_sample() -> None:
    q, p = random_gaussian(1), random_gaussian(2)
    z = q.rsample(random_gaussian(3).mean)

    class Sampled(DiagonalGaussian):
        def kl(self, prior: object) -> None:
            return None

    ratio = reference(q).log_prob(z) - reference(p).log_prob(z)
    torch.testing.assert_close(Group(z, Sampled(q.mean, q.logvar), p).rate(), ratio, rtol=1e-12, atol=1e-12)


def test_a_sample_of_the_standard_normal_is_its_noise() -> None:
    eps = random_gaussian(4).mean
    assert torch.equal(StandardNormal(torch.zeros_like(eps)).rsample(eps), eps)


# --- the bound on log variances -------------------------------------------------------------------------

LOW, HIGH = LOGVAR_RANGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_variances_inside_of_the_range_are_those_of_the_network_to_the_bit(dtype: torch.dtype) -> None:
    raw = torch.linspace(LOW, HIGH, 10_001, dtype=torch.float64).to(dtype)
    assert torch.equal(bounded(raw), raw)
    mean = torch.ones_like(raw)
    gaussian = gaussian_from(torch.stack([mean, raw], dim=1))
    assert torch.equal(gaussian.mean[:, 0], mean)
    assert torch.equal(gaussian.logvar[:, 0], raw)


def test_the_bound_is_monotone_and_its_slope_continuous() -> None:
    step = 1e-3
    raw = torch.arange(LOW - 20, HIGH + 20, step, dtype=torch.float64, requires_grad=True)
    value = bounded(raw)
    (slope,) = torch.autograd.grad(value.sum(), raw)
    inside = (raw >= LOW) & (raw <= HIGH)
    assert bool((slope[inside] == 1).all())
    assert bool(((slope > 0) & (slope <= 1)).all())
    assert bool((value.detach().diff() > 0).all())
    # |d² / d raw²| of m tanh(r / m) is at most 0.77 / m
    assert float(slope.diff().abs().max()) < 0.78 / LOGVAR_MARGIN * step
    torch.testing.assert_close(value.detach().diff() / step, slope[:-1], rtol=0, atol=step)
    places = torch.tensor([LOW - 3, LOW + 1, 0.0, HIGH - 1, HIGH + 7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bounded, places)


HUGE = [0.0, 20.0, 88.0, 1e3, 1e10, 1e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rate_and_its_gradient_are_finite_for_log_variances_of_any_size(dtype: torch.dtype) -> None:
    """As a step with too large a learning rate makes them. (The square of a mean of 1e38 is not a float32.)"""
    raw = torch.tensor([sign * size for size in HUGE for sign in (-1, 1)], dtype=dtype)
    everywhere = torch.cartesian_prod(raw, raw)
    q_raw, p_raw = (column.clone().requires_grad_() for column in everywhere.T)
    q, p = (gaussian_from(torch.stack([mean * torch.ones_like(r), r], 1)) for mean, r in ((2.0, q_raw), (-1.0, p_raw)))
    eps = torch.full_like(q.mean, 5.0)
    for distribution in (q, p):
        assert bool(
            ((distribution.logvar >= LOW - LOGVAR_MARGIN) & (distribution.logvar <= HIGH + LOGVAR_MARGIN)).all()
        )
        assert bool(distribution.rsample(eps).isfinite().all())
    z = q.rsample(eps)
    for value in (q.kl(p), q.kl(StandardNormal(torch.zeros_like(z))), q.log_prob(z), p.log_prob(z)):
        assert value is not None
        assert bool(value.isfinite().all())
        gradients = torch.autograd.grad(value.sum(), [q_raw, p_raw], retain_graph=True, materialize_grads=True)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


# --- rounding near q = p --------------------------------------------------------------------------------


def kl_by_series(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """1/2 (m² + exp(l) - 1 - l) for |l| < 0.2, by a series of which no two terms cancel."""
    terms = [logvar**n / math.factorial(n) for n in range(2, 16)]
    return 0.5 * (mean.square() + sum(reversed(terms)))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
def test_the_rate_near_the_prior_is_exact_up_to_a_rounding_of_the_variance(size: float) -> None:
    """One rounding of sigma² near 1 moves it by 6e-8, and the rate by no more than 6e-8 |logvar|."""
    generator = torch.Generator().manual_seed(3)
    logvar, mean = size * torch.randn(2, 100_000, 1, generator=generator)
    logvar[:1000], mean[:2000] = 0.0, 0.0
    near = logvar.abs() < 0.2
    zeros = torch.zeros_like(mean)
    # not 0 and 1, but with exact differences: what is left is the formula's own rounding
    other = DiagonalGaussian(zeros, torch.full_like(mean, 2.0))
    shifted = DiagonalGaussian(zeros, 2.0 + logvar)
    cases = [
        (DiagonalGaussian(mean, logvar).kl(StandardNormal(zeros)), mean, logvar),
        (DiagonalGaussian(mean, logvar).kl(DiagonalGaussian(zeros, zeros)), mean, logvar),
        (shifted.kl(other), zeros, shifted.logvar - other.logvar),
    ]
    for ours, m, value in cases:
        assert ours is not None
        expected = kl_by_series(m.double(), value.double())
        error = (ours.double() - expected)[near].abs()
        assert bool((error <= 1.2e-7 * value.double().abs()[near] + 2.4e-7 * expected[near]).all())
        assert bool((ours >= -1.2e-7 * value.abs()).all())
        assert bool((ours[(m == 0) & (value == 0)] == 0).all())
