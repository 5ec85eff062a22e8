"""Truth: distributions of a group against torch.distributions, closed forms and their own samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from vae_ray.models.latents import DiagonalGaussian, Group, StandardNormal


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
