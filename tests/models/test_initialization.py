"""Contract over every initialization, and what "he" promises."""

import math

import pytest
import torch
from torch import nn

from vae_ray import Experiment
from vae_ray.models.initialization import INITIALIZATIONS, OUTPUT_GAIN, POSTERIOR_GAIN, he_at_the_mean_image
from vae_ray.models.likelihoods import build_likelihood
from vae_ray.models.networks import EncoderDecoder
from vae_ray.models.networks.ladder import HEAD_GAIN
from vae_ray.models.priors import StandardPrior
from vae_ray.models.vae import VAE, build_vae

SHAPE = (2, 9, 11)
LATENT_DIM = 13
NETWORKS = {"mlp": {"name": "mlp", "hidden": [300, 170]}, "ladder": {"name": "ladder", "hidden": [300, 170]}}


def experiment(network: str = "mlp") -> Experiment:
    return Experiment.from_dict({"model": {"network": NETWORKS[network], "latent_dim": LATENT_DIM}})


def mean_image() -> torch.Tensor:
    image = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image[0, 0, 0] = 0.0  # a pixel that is never lit
    return image


def initialised(name: str, *, seed: int = 5, network: str = "mlp") -> VAE:
    model = build_vae(experiment(network), SHAPE, seed=seed)
    if (initialize := INITIALIZATIONS[name]) is not None:
        initialize(model, mean_image(), torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_an_initialization_is_a_function_of_its_seed_and_finite(name: str, network: str) -> None:
    one, same, other = (initialised(name, seed=seed, network=network).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert all(torch.isfinite(value).all() for value in one.values())
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_he_keeps_the_size_of_a_signal_through_the_hidden_layers() -> None:
    layers = initialised("he").network.encoder[1:5]  # two hidden layers with their ReLUs
    x = torch.randn(4000, math.prod(SHAPE), generator=torch.Generator().manual_seed(2))
    # He et al. 2015, eq. 10: E[relu^2] / 2 times gain^2 = 2 is preserved; 10 % for 170 random units
    assert layers(x).square().mean().item() == pytest.approx(x.square().mean().item(), rel=0.1)


@pytest.mark.parametrize("network", NETWORKS)
def test_he_starts_the_decoder_at_the_mean_image(network: str) -> None:
    model = initialised("he", network=network)
    zeros = [torch.zeros(1, *shape) for shape in model.latent_shapes]
    # exact at z = 0, but for the never-lit pixel, which starts at the logit's floor of 1e-3
    expected = mean_image().clamp(1e-3, 1 - 1e-3)
    assert torch.allclose(model.decode(zeros)[0].double(), expected, atol=1e-6)
    z = [torch.randn(5000, *shape, generator=torch.Generator().manual_seed(3)) for shape in model.latent_shapes]
    deviation = torch.logit(model.decode(z)) - torch.logit(model.decode(zeros))
    size = deviation[:, 1].square().mean().sqrt().item()  # the second channel, without the pixel at the floor
    if network == "mlp":
        # 15 %: the spread of products of 300 and 170 random units
        assert size == pytest.approx(OUTPUT_GAIN, rel=0.15)
    else:  # silu of a signal of size 1 has size 0.6
        assert 0.3 * OUTPUT_GAIN < size < 1.2 * OUTPUT_GAIN


@pytest.mark.parametrize("network", NETWORKS)
def test_he_starts_every_posterior_small(network: str) -> None:
    model = initialised("he", network=network)
    layers = model.network.posterior_layers()
    assert len(layers) == {"mlp": 1, "ladder": 2}[network]
    for layer in layers:
        # 15 %: the spread of the standard deviation of at least 340 weights
        expected = {"mlp": POSTERIOR_GAIN, "ladder": HEAD_GAIN}[network] / math.sqrt(layer.in_features)
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.15)
        assert bool((layer.bias == 0).all())


def test_initialization_he_of_a_convolution_starts_at_the_mean_of_each_channel() -> None:
    """A network of convolutions, of which the last has a bias for each channel."""
    encoder = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(3 * 99, 2 * LATENT_DIM))
    decoder = nn.Sequential(nn.Linear(LATENT_DIM, 5 * 99), nn.Unflatten(1, (5, 9, 11)), nn.ConvTranspose2d(5, 2, 1))
    likelihood = build_likelihood(Experiment().likelihood)
    network = EncoderDecoder(encoder, decoder, LATENT_DIM)
    model = VAE(network, StandardPrior((LATENT_DIM,)), likelihood, image_shape=SHAPE)
    he_at_the_mean_image(model, mean_image(), torch.Generator().manual_seed(5))
    expected = torch.logit(mean_image(), eps=1e-3).flatten(1).mean(1)
    torch.testing.assert_close(decoder[2].bias.double(), expected, rtol=1e-6, atol=1e-7)


def test_torchs_own_initialization_is_left_alone() -> None:
    assert INITIALIZATIONS["torch"] is None
