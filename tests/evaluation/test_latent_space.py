"""Truth: what is said of the latent space against closed forms of Gaussians, quadrature and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributions import Normal

from vae_ray.evaluation.latent_space import active_units, aggregated_posterior, log_mixture, rates

N = 4000


def normal(*shape: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def posteriors(mean: NDArray[np.float64], sigma: float, prior: Normal | None = None) -> dict[str, NDArray[np.float64]]:
    """One sample of N(mean, sigma²) a row, and as many of the prior N(0, I)."""
    z = mean + sigma * normal(*mean.shape, seed=7)
    prior = prior or Normal(0.0, 1.0)
    drawn = torch.from_numpy(normal(*mean.shape, seed=8))
    log_prior, prior_log_prior = (prior.log_prob(each).sum(1).numpy() for each in (torch.from_numpy(z), drawn))
    logvar = np.full_like(mean, 2 * math.log(sigma))
    parts = {"mean": mean, "logvar": logvar, "z": z, "prior_z": drawn.numpy()}
    return {**parts, "log_prior": log_prior, "prior_log_prior": prior_log_prior}


def test_units_whose_mean_varies_by_more_than_a_hundredth_are_active() -> None:
    codes = np.stack([normal(N, seed=d) for d in range(4)], axis=1)
    codes = (codes - codes.mean(0)) / codes.std(0) * np.sqrt([0.0099, 0.0101, 1.0, 0.0])
    found = active_units({"codes": codes})
    assert found.values == {"active_units": 2.0}
    assert found.details["variance_of_mean"] == pytest.approx([0.0099, 0.0101, 1.0, 0.0], rel=1e-9)


def test_a_group_s_rate_is_shared_out_by_its_shares() -> None:
    found = rates(
        {
            "rate_shares": np.array([[1.0, 3.0, 0.0], [1.0, 3.0, 0.02]]),
            "rate_by_group": np.array([[2.0, 1.0], [2.0, 3.0]]),
        },
        group_sizes=[2, 1],
    )
    assert found.details["rate_by_dimension"] == pytest.approx([0.5, 1.5, 2.0])
    assert found.values == {"informative_dimensions": 3.0}


def test_a_mixture_s_density_is_the_mean_of_those_of_its_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_ray.evaluation.latent_space.CHUNK_DENSITIES", 50)
    mean, logvar, z = (torch.from_numpy(normal(*shape, seed=i)) for i, shape in enumerate(((9, 3), (9, 3), (13, 3))))
    expected = [
        math.log(
            sum(
                math.exp(float(Normal(m, (v / 2).exp()).log_prob(each).sum()))
                for m, v in zip(mean, logvar, strict=True)
            )
            / 9
        )
        for each in z
    ]
    assert log_mixture(z, mean, logvar).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_collapsed_posterior_has_nothing_but_overlap() -> None:
    found = aggregated_posterior(posteriors(np.zeros((N, 3)), 1.0))
    assert found.values == pytest.approx(
        {"mutual_information": 0, "marginal_kl": 0, "total_correlation": 0, "prior_overlap": 1}, abs=1e-12
    )
    assert found.warnings == ()


def test_mutual_information_is_that_of_a_gaussian_channel() -> None:
    """z = x + sigma e with x ~ N(0, 1 - sigma²) in two dimensions: the aggregated posterior is N(0, I)."""
    sigma = 0.5
    found = aggregated_posterior(posteriors(math.sqrt(1 - sigma**2) * normal(N, 2, seed=1), sigma)).values
    # of 4,000 samples; q(z) of 4,000 components adds about (components that overlap)^-1 = 0.001
    assert found["mutual_information"] == pytest.approx(-2 * math.log(sigma), abs=0.05)
    assert found["marginal_kl"] == pytest.approx(0, abs=0.02)
    assert found["total_correlation"] == pytest.approx(0, abs=0.02)
    assert found["prior_overlap"] == pytest.approx(1, abs=0.05)


def test_total_correlation_is_that_of_a_correlated_gaussian() -> None:
    sigma, correlation = 0.4, 0.8
    mixing = np.linalg.cholesky(np.array([[1, correlation], [correlation, 1]])) * math.sqrt(1 - sigma**2)
    found = aggregated_posterior(posteriors(normal(N, 2, seed=2) @ mixing.T, sigma)).values
    off_diagonal = correlation * (1 - sigma**2)  # of a covariance whose diagonal is 1
    expected = -0.5 * math.log(1 - off_diagonal**2)
    assert found["total_correlation"] == pytest.approx(expected, abs=0.04)
    assert found["marginal_kl"] == pytest.approx(expected, abs=0.04)  # the factors are those of the prior


def test_overlap_with_a_shifted_prior() -> None:
    shift = 1.7
    found = aggregated_posterior(posteriors(np.full((N, 1), shift), 1.0)).values
    assert found["prior_overlap"] == pytest.approx(math.erfc(shift / 2 / math.sqrt(2)), abs=0.02)
    assert found["marginal_kl"] == pytest.approx(shift**2 / 2, abs=0.1)


def test_more_information_than_the_images_can_show_is_warned_of() -> None:
    found = aggregated_posterior(posteriors(10 * normal(50, 6, seed=3), 0.1))
    assert found.values["mutual_information"] == pytest.approx(math.log(50), abs=1e-6)
    (warning,) = found.warnings
    assert "of 50 images, 3.91 nats, is near its largest value log 50 = 3.91" in warning
