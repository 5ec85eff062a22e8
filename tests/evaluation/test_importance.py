"""Truth: importance sampling against a quadrature of p(x) over the latent space, whatever is decoded together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from tests.objectives.linear import UnitGaussian
from tests.training.small import ALONE, NETWORKS
from vae_ray import Experiment
from vae_ray.data.batches import Loader
from vae_ray.data.dataset import Split
from vae_ray.evaluation import importance
from vae_ray.evaluation.elbo import evaluate_split
from vae_ray.evaluation.importance import ImportanceSamples
from vae_ray.evaluation.observations import Arrays, joined, observe, pieces
from vae_ray.models.networks import EncoderDecoder
from vae_ray.models.priors import StandardPrior
from vae_ray.models.vae import VAE, build_vae
from vae_ray.parallel.group import shards_of

SHAPE, NUM_IMAGES, SEED = (1, 3, 4), 70, 3


def model(network: str = "mlp", *, latent_dim: int = 2) -> VAE:
    config = Experiment.from_dict({"model": {"network": NETWORKS[network], "latent_dim": latent_dim}})
    built = build_vae(config, SHAPE, seed=5)
    with torch.no_grad():
        for parameter in built.parameters():  # so that z matters
            parameter.mul_(2.0)
    return built


def split() -> Split:
    pixels = torch.rand(NUM_IMAGES, *SHAPE, generator=torch.Generator().manual_seed(1)) < 0.4
    return Split.in_memory(pixels.to(torch.uint8) * 255)


def loader(num: int = NUM_IMAGES) -> Loader:
    return Loader(split(), torch.arange(num), seed=SEED, shards=shards_of(ALONE))


def observed(vae: VAE, num_samples: int, *, num: int = NUM_IMAGES, size: int = 64) -> Arrays:
    given, observers = loader(num), [ImportanceSamples(num_samples)]
    return joined([observe(vae, given, rows, observers) for rows in pieces(num, size)])


def nll(vae: VAE, num_samples: int, **options: int) -> float:
    return -float(observed(vae, num_samples, **options)["log_p"][:, -1].mean())


@torch.no_grad()
def log_marginals(vae: VAE, x: Tensor) -> Tensor:
    """log p(x) in float64 by the trapezoidal rule over [-8, 8]², which for a smooth integrand is exact to 1e-10."""
    side = torch.linspace(-8, 8, 201, dtype=torch.float64)
    z = torch.cartesian_prod(side, side)
    log_prior = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    logits = vae.double().network.decoder(z).flatten(1)
    log_likelihood = x.double().flatten(1) @ logits.T - torch.nn.functional.softplus(logits).sum(1)
    return (log_likelihood + log_prior).logsumexp(1) + 2 * math.log(float(side[1] - side[0]))


def test_many_samples_give_the_marginal_likelihood() -> None:
    given = nll(model(), 20_000)
    x = split().gather(torch.arange(NUM_IMAGES)).float() / 255
    # the standard error over 70 images of 20,000 samples each is about 0.001 nats here
    assert given == pytest.approx(-float(log_marginals(model(), x).mean()), abs=0.005)


def test_one_sample_is_the_elbo_in_expectation_and_more_samples_lower_the_bound() -> None:
    vae = model()
    bounds = [nll(vae, k) for k in (1, 5, 50, 1000)]
    assert bounds == sorted(bounds, reverse=True)
    nelbo = evaluate_split(vae, loader(), "test", ALONE, batch_size=9)["test/nelbo"]
    assert bounds[0] == pytest.approx(nelbo, abs=1.0)  # another noise
    assert bounds[-1] < nelbo


def test_the_bound_by_fewer_samples_is_that_of_a_call_with_so_many() -> None:
    vae = model()
    assert ImportanceSamples(1).bounds == (1,)
    assert ImportanceSamples(120).bounds == (1, 5, 50, 120)
    log_p = observed(vae, 120)["log_p"]
    for column, k in enumerate((1, 5, 50, 120)):
        np.testing.assert_allclose(log_p[:, column], observed(vae, k)["log_p"][:, -1], rtol=0, atol=2e-6)  # float32


def test_the_effective_sample_size_is_that_of_the_weights() -> None:
    vae, x = LinearGaussian(0.4), split().gather(torch.arange(NUM_IMAGES)).float() / 255
    found = observed(vae, 4_000)["effective_samples"]
    # weights w of log variance s have E[w]² / E[w²] = e^-s; s = 0.16 (1 + |W_1|²) + 0.16 (1 + |W_2|²), as below
    assert float(np.median(found)) == pytest.approx(4_000 * math.exp(-1.04), rel=0.1)
    exact = observed(LinearGaussian(0.0), 100, num=len(x))["effective_samples"]
    np.testing.assert_allclose(exact, 100, rtol=1e-5)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_size_of_the_pieces_and_of_what_is_decoded_together_does_not_matter(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = model(network)
    expected = observed(vae, 120)
    for size in (7, 50, 70):
        found = observed(vae, 120, size=size)
        # float32 products of other sizes, of single images
        np.testing.assert_allclose(found["log_p"], expected["log_p"], rtol=1e-5)
    monkeypatch.setattr(importance, "CACHED_NUMBERS", 50 * 12 * 9)
    np.testing.assert_allclose(observed(vae, 120)["log_p"], expected["log_p"], rtol=1e-5)
    assert nll(vae, 120, num=64) == pytest.approx(-float(expected["log_p"][:64, -1].mean()), rel=1e-6)


class LinearGaussian(VAE):
    """p(x|z) = N(W z + o, I), z of 2 dimensions, and an encoder that is p(z|x) but for a shift of its mean."""

    def __init__(self, shift: float) -> None:
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        decoder = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, SHAPE))
        network = EncoderDecoder(encoder, decoder, (2,))
        super().__init__(network, StandardPrior((2,)), UnitGaussian(), image_shape=SHAPE)
        generator = torch.Generator().manual_seed(4)
        # orthogonal columns: the posterior is a diagonal Gaussian
        self.weight = torch.linalg.qr(torch.randn(12, 2, generator=generator)).Q * torch.tensor([2.0, 0.7])
        self.offset = torch.rand(12, generator=generator)
        variance = 1 / (1 + self.weight.square().sum(0))
        gain = variance[:, None] * self.weight.T
        with torch.no_grad():
            decoder[0].weight.copy_(self.weight)
            decoder[0].bias.copy_(self.offset)
            encoder[1].weight.copy_(torch.cat([gain, torch.zeros(2, 12)]))
            encoder[1].bias.copy_(torch.cat([shift - gain @ self.offset, variance.log()]))

    def log_marginals(self, x: Tensor) -> Tensor:
        covariance = self.weight.double() @ self.weight.double().T + torch.eye(12, dtype=torch.float64)
        return MultivariateNormal(self.offset.double(), covariance).log_prob(x.double().flatten(1))


@pytest.mark.parametrize("num_samples", [1, 2, 60])
def test_samples_of_the_exact_posterior_give_log_p_of_x_whatever_their_number(num_samples: int) -> None:
    vae = LinearGaussian(0.0)
    x = split().gather(torch.arange(NUM_IMAGES)).float() / 255
    # float32: terms of about 20 nats
    assert nll(vae, num_samples) == pytest.approx(-float(vae.log_marginals(x).mean()), rel=3e-7)


def test_samples_of_another_posterior_approach_log_p_of_x_from_above() -> None:
    vae = LinearGaussian(0.4)
    x = split().gather(torch.arange(NUM_IMAGES)).float() / 255
    gaps = [nll(vae, k) + float(vae.log_marginals(x).mean()) for k in (1, 10, 10_000)]
    assert gaps[0] > 3 * gaps[1] > 0.1
    # log w has the variance s = 0.16 (1 + |W_1|²) + 0.16 (1 + |W_2|²) = 1.04, w / p(x) that of e^s - 1
    assert abs(gaps[2]) < 5 * ((math.exp(1.04) - 1) / (10_000 * NUM_IMAGES)) ** 0.5


def test_features_are_computed_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, calls = model(), list[int]()
    monkeypatch.setattr(
        vae.network, "bottom_up", lambda x, c, f=vae.network.bottom_up: (calls.append(len(x)), f(x, c))[1]
    )
    nll(vae, 230)
    assert calls == [64, 6]
