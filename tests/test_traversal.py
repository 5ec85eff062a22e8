"""Truth: a traversal moves one dimension at a time, through the prior, the informative dimensions first."""

import pytest
import torch

from vae_ray.config.experiment import ModelConfig
from vae_ray.models.latents import DiagonalGaussian
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.traversal import traverse
from vae_ray.models.vae import VAE, build_vae

SHAPE = (1, 3, 5)
CONFIG = ModelConfig(hidden=(7,), latent_dim=4)
LIKELIHOOD = LIKELIHOODS["bernoulli"](CONFIG)


@pytest.fixture
def model() -> VAE:
    return build_vae(CONFIG, SHAPE, seed=1).double()


def test_each_row_moves_its_own_dimension_from_minus_to_plus_extent(model: VAE) -> None:
    moved = traverse(model, LIKELIHOOD, torch.rand(6, *SHAPE).double(), steps=5, extent=2.0, num_dimensions=3)
    assert moved.images.shape == (3, 5, *SHAPE)
    for row, dimension in enumerate(moved.dimensions):
        for step, value in enumerate([-2.0, -1.0, 0.0, 1.0, 2.0]):
            z = torch.zeros(1, 4, dtype=torch.float64)
            z[0, dimension] = value
            with torch.no_grad():
                expected = torch.sigmoid(model.decode(z))[0]
            torch.testing.assert_close(moved.images[row, step].double(), expected, atol=1e-6, rtol=0)


def test_dimensions_come_in_order_of_their_rate(model: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    mu = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 6, dtype=torch.float64)
    monkeypatch.setattr(model, "encode", lambda x: DiagonalGaussian(mu, torch.zeros_like(mu)))
    moved = traverse(model, LIKELIHOOD, torch.rand(6, *SHAPE).double())
    assert moved.dimensions == [1, 3, 2, 0]
    assert moved.rates == pytest.approx([4.5, 2.0, 0.5, 0.0])  # mu^2 / 2
    assert moved.row_labels()[0] == "z[1]  4.5 nats"


def test_rates_by_dimension_add_up_to_the_rate() -> None:
    posterior = DiagonalGaussian(torch.randn(6, 4), torch.randn(6, 4))
    torch.testing.assert_close(posterior.rate_by_dimension().sum(1), posterior.rate())
