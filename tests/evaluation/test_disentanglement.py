"""Truth: the total correlation of a Gaussian."""

import math

import pytest
import torch

from vae_ray.evaluation.disentanglement import gaussian_total_correlation


def with_covariance(covariance: torch.Tensor, *, num: int, seed: int) -> torch.Tensor:
    """Points `(num, d)` whose covariance (divided by num) is exactly the given one."""
    points = torch.randn(num, len(covariance), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points = points - points.mean(0)
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(points.T @ points / num), points.T, upper=False
    ).T  # fmt: skip
    return whitened @ torch.linalg.cholesky(covariance).T + 3.0


def test_total_correlation_of_two_dimensions_is_the_closed_form_of_their_correlation():
    covariance = torch.tensor([[4.0, -1.8], [-1.8, 9.0]], dtype=torch.float64)  # correlation -0.3
    assert gaussian_total_correlation(with_covariance(covariance, num=50, seed=0)) == pytest.approx(
        -0.5 * math.log(1 - 0.3**2), abs=1e-12
    )


def test_total_correlation_is_the_kl_from_the_product_of_the_marginals():
    factor = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance, variance = factor @ factor.T, torch.linspace(0.1, 2.0, 5, dtype=torch.float64).repeat(70, 1)
    joint = torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance + torch.diag(variance[0]))
    product = torch.distributions.MultivariateNormal(torch.zeros(5).double(), torch.diag(joint.variance))
    expected = torch.distributions.kl_divergence(joint, product).item()
    given = gaussian_total_correlation(with_covariance(covariance, num=70, seed=2), variance)
    assert given == pytest.approx(expected, abs=1e-12)
    assert given < gaussian_total_correlation(with_covariance(covariance, num=70, seed=2))  # noise in z hides some


def test_total_correlation_is_zero_without_correlations_and_depends_on_no_scale():
    points = with_covariance(torch.eye(3, dtype=torch.float64), num=40, seed=3)
    assert gaussian_total_correlation(points) == pytest.approx(0, abs=1e-12)
    covariance = torch.tensor([[1.0, 0.5, 0.2], [0.5, 2.0, 0.1], [0.2, 0.1, 3.0]], dtype=torch.float64)
    points = with_covariance(covariance, num=40, seed=4)
    scaled = points * torch.tensor([1e-3, 7.0, -1e3], dtype=torch.float64)
    assert gaussian_total_correlation(scaled) == pytest.approx(gaussian_total_correlation(points), abs=1e-12)
