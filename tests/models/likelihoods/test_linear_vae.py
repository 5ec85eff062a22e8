"""Truth: a linear VAE is probabilistic PCA (Tipping & Bishop 1999; Lucas et al. 2019, arXiv:1911.02469)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.linear_gaussian import LinearGaussian, Moments, principal_components
from vae_ray import Experiment
from vae_ray.config.fields import MIN_PIXEL_SCALE
from vae_ray.models.vae import VAE, build_vae
from vae_ray.objectives.base import elbo_terms

SHAPE, LATENT_DIM, NUM_IMAGES = (2, 3, 5), 4, 70
CONFIG = Experiment.from_dict(
    {
        "model": {"network": {"name": "mlp", "hidden": []}, "latent_dim": LATENT_DIM},
        "likelihood": {"name": "gaussian", "sigma": "learned", "mean": "identity"},
    }
)


def images() -> Tensor:
    """Correlated pixels in [0, 1], `(NUM_IMAGES, *SHAPE)`, float64."""
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(NUM_IMAGES, 6, generator=generator, dtype=torch.float64)
    loadings = torch.randn(6, math.prod(SHAPE), generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM_IMAGES, math.prod(SHAPE), generator=generator, dtype=torch.float64)
    return torch.sigmoid(factors @ loadings / 3 + 0.2 * noise).reshape(NUM_IMAGES, *SHAPE)


def linear_vae(given: LinearGaussian) -> VAE:
    """p(x|z) = N(W z + mean, variance); q(z|x) has the mean of the exact posterior, and its variances."""
    model, (weight, mean, variance) = build_vae(CONFIG, SHAPE, seed=0).double(), given
    # p(z|x) = N(M^-1 W' (x - mean), variance M^-1) with M = W' W + variance I
    inverse = torch.linalg.inv(weight.T @ weight + variance * torch.eye(LATENT_DIM, dtype=torch.float64))
    (encoder,) = (layer for layer in model.network.encoder if hasattr(layer, "weight"))
    (decoder,) = (layer for layer in model.network.decoder if hasattr(layer, "weight"))
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.weight[:LATENT_DIM] = inverse @ weight.T
        encoder.bias[:LATENT_DIM] = -inverse @ weight.T @ mean
        encoder.bias[LATENT_DIM:] = torch.log(variance * inverse.diagonal())
        decoder.weight.copy_(weight)
        decoder.bias.copy_(mean)
        model.likelihood.log_scale.fill_(0.5 * math.log(variance - MIN_PIXEL_SCALE**2))
    return model


def optimum_of(x: Tensor) -> LinearGaussian:
    return principal_components(Moments.of(x.flatten(1)), LATENT_DIM)


def log_weights(model: VAE, x: Tensor, num_samples: int) -> Tensor:
    """log p(x|z) + log p(z) - log q(z|x) of samples of q, `(num_samples, N)`."""
    shape = (num_samples * len(x), LATENT_DIM)
    output = model(x, (torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype),), num_samples)
    distortion, _ = elbo_terms(output, x, model.likelihood)
    return -distortion - output.groups[0].log_ratio().view(num_samples, -1)


def test_the_mean_by_second_moments_is_that_of_the_log_densities() -> None:
    x, other = images().split(40)
    optimum = optimum_of(x)
    for rows in (x.flatten(1), other.flatten(1)):
        mean = optimum.log_evidence(rows).mean()
        assert optimum.mean_log_evidence(Moments.of(rows)) == pytest.approx(float(mean), rel=1e-10)


def test_at_the_closed_form_optimum_every_sample_gives_log_p_of_x() -> None:
    """There the posterior is a diagonal Gaussian: the ELBO has no gap, and no variance either."""
    x = images()
    optimum = optimum_of(x)
    weights = log_weights(linear_vae(optimum), x, num_samples=3)
    torch.testing.assert_close(weights, optimum.log_evidence(x.flatten(1)).expand(3, -1), rtol=0, atol=1e-10)


def test_the_closed_form_optimum_is_a_stationary_point_of_the_elbo() -> None:
    """With the closed form of the rate, and z at 2 k sigma points, which give the quadratic's expectation exactly."""
    x = images()
    optimum = optimum_of(x)
    model = linear_vae(optimum)
    nodes = LATENT_DIM**0.5 * torch.cat([torch.eye(LATENT_DIM), -torch.eye(LATENT_DIM)]).double()
    output = model(x, (nodes.repeat_interleave(len(x), 0),), 2 * LATENT_DIM)
    distortion, rate = elbo_terms(output, x, model.likelihood)
    nelbo = (distortion + rate).mean()
    torch.testing.assert_close(nelbo, -optimum.log_evidence(x.flatten(1)).mean(), rtol=1e-12, atol=0)
    for gradient in torch.autograd.grad(nelbo, list(model.parameters())):
        assert float(gradient.abs().max()) < 1e-10


def test_importance_samples_give_log_p_of_x_at_any_linear_decoder() -> None:
    """Columns that are not orthogonal: the posterior is not diagonal, so that the ELBO has a gap and weights vary."""
    x, num_samples = images()[:20], 20_000
    weight = 0.4 * torch.randn(30, LATENT_DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given = LinearGaussian(weight, torch.full((30,), 0.45, dtype=torch.float64), 0.5)
    model = linear_vae(given)
    expected = given.log_evidence(x.flatten(1))
    weights = log_weights(model, x, num_samples)
    assert bool((weights.mean(0) < expected - 0.05).all())
    ratios = torch.exp(weights - expected)  # of mean 1
    assert bool(((ratios.mean(0) - 1).abs() < 5 * ratios.std(0) / num_samples**0.5).all())
    torch.testing.assert_close(weights.logsumexp(0) - math.log(num_samples), expected, rtol=0, atol=0.1)
