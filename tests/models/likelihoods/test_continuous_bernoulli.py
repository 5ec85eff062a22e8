"""Truth: the continuous Bernoulli's normaliser, mean and density, near lambda = 1/2 and far from it."""

import mpmath
import pytest
import torch

from tests.models.likelihoods.small import build
from vae_ray.models.likelihoods.continuous_bernoulli import SMALL, distance_to_nearer_end, log_normaliser

LOGITS = torch.cat([torch.logspace(-12, 3, 451, dtype=torch.float64), torch.tensor([0.0, SMALL, SMALL * (1 - 1e-9)])])


def exact(u: float) -> tuple[float, float]:
    """A(-u) and the mean for the logit -u, by 120 digits."""
    with mpmath.workdps(120):
        value = mpmath.mpf(u) if u else mpmath.mpf(10) ** -40
        return (
            float(mpmath.log((1 - mpmath.exp(-value)) / value)),
            float(1 / value - 1 / (mpmath.exp(value) - 1)),
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 6e-16), (torch.float32, 3e-7)])
def test_normaliser_and_mean_are_exact_to_rounding_on_both_sides_of_the_branch(
    dtype: torch.dtype, tolerance: float
) -> None:
    u = LOGITS.to(dtype)
    values, means = torch.tensor([exact(float(each)) for each in u], dtype=torch.float64).T
    # relative to the value, or for |l| < 1 to 1
    assert float(((log_normaliser(u) - values) / values.abs().clamp_min(1)).abs().max()) < tolerance
    torch.testing.assert_close(distance_to_nearer_end(u).double(), means, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_loses_nothing_near_one_half(dtype: torch.dtype) -> None:
    """d log p / dl = x - E[x], to one rounding of numbers of about 1."""
    logits = torch.cat([-LOGITS, LOGITS]).to(dtype).reshape(-1, 1, 1, 1).requires_grad_()
    x = torch.linspace(0, 1, len(logits), dtype=dtype).reshape(-1, 1, 1, 1)
    (gradient,) = torch.autograd.grad(build("continuous_bernoulli").log_prob(logits, x).sum(), logits)
    nearer = torch.tensor([exact(float(each))[1] for each in LOGITS.to(dtype)], dtype=torch.float64)
    expected = x.flatten().double() - torch.cat([nearer, 1 - nearer])
    assert float((gradient.flatten() - expected).abs().max()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("logit", [0.0, 1e-6, -0.3, 0.4999, 0.5001, -7.0, 60.0, -400.0])
def test_density_integrates_to_one_and_to_its_mean(logit: float) -> None:
    """By Gauss-Legendre quadrature of 60 nodes on each of 64 intervals, exact to rounding."""
    nodes, weights = quadrature(60)
    edges = torch.linspace(0, 1, 65, dtype=torch.float64)
    x = (edges[:-1, None] + nodes / 64).flatten()
    params = torch.full((1, 1, 1, 1), logit, dtype=torch.float64)
    likelihood = build("continuous_bernoulli")
    log_prob = likelihood.log_prob(params.expand(len(x), -1, -1, -1), x.reshape(-1, 1, 1, 1))
    density = log_prob.exp() * (weights / 64).repeat(64)
    assert float(density.sum()) == pytest.approx(1, abs=1e-12)
    assert float((density * x).sum()) == pytest.approx(float(likelihood.mean(params)), abs=1e-12)


def quadrature(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of Gauss and Legendre on [0, 1]."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(num)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@pytest.mark.parametrize("logit", [-30.0, -0.2, 0.0, 1e-7, 3.0])
def test_samples_follow_the_distribution_function(logit: float) -> None:
    """Kolmogorov and Smirnov's distance of 20,000 samples, below what one in 10^5 such samples exceeds."""
    n = 20_000
    params = torch.full((n, 1, 1, 1), logit)
    x = build("continuous_bernoulli").sample(params, torch.Generator().manual_seed(1)).flatten().double().sort().values
    expected = x if abs(logit) < 1e-3 else torch.expm1(logit * x) / torch.expm1(torch.tensor(logit).double())
    steps = torch.arange(1, n + 1) / n
    assert float((steps - expected).abs().max()) < 2.5 / n**0.5
