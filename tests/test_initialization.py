"""Contract over every initialization, and what "he" promises."""

import math

import pytest
import torch

from vae_ray.config.experiment import ModelConfig
from vae_ray.models.initialization import DECODER_OUTPUT_GAIN, INITIALIZATIONS
from vae_ray.models.vae import VAE, build_vae

SHAPE = (2, 9, 11)
CONFIG = ModelConfig(hidden=(300, 170), latent_dim=13)


def mean_image() -> torch.Tensor:
    image = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image[0, 0, 0] = 0.0  # a pixel that is never lit
    return image


def initialised(name: str, *, seed: int = 5) -> VAE:
    model = build_vae(CONFIG, SHAPE, seed=seed)
    INITIALIZATIONS[name](model, mean_image(), torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_an_initialization_is_a_function_of_its_seed_and_finite(name: str) -> None:
    one, same, other = (initialised(name, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert all(torch.isfinite(value).all() for value in one.values())
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_he_keeps_the_size_of_a_signal_through_the_hidden_layers() -> None:
    layers = initialised("he").encoder[1:5]  # two hidden layers with their ReLUs
    x = torch.randn(4000, math.prod(SHAPE), generator=torch.Generator().manual_seed(2))
    # He et al. 2015, eq. 10: E[relu^2] / 2 times gain^2 = 2 is preserved; 10 % for 170 random units
    assert layers(x).square().mean().item() == pytest.approx(x.square().mean().item(), rel=0.1)


def test_he_starts_the_decoder_at_the_mean_image() -> None:
    model = initialised("he")
    mean = torch.sigmoid(model.decode(torch.zeros(1, CONFIG.latent_dim)))[0].double()
    # exact at z = 0, but for the never-lit pixel, which starts at the logit's floor of 1e-3
    assert torch.allclose(mean, mean_image().clamp(1e-3, 1 - 1e-3), atol=1e-6)
    z = torch.randn(5000, CONFIG.latent_dim, generator=torch.Generator().manual_seed(3))
    deviation = model.decode(z) - model.decode(torch.zeros_like(z))
    # 15 %: the spread of products of 300 and 170 random units
    assert deviation.square().mean().sqrt().item() == pytest.approx(DECODER_OUTPUT_GAIN, rel=0.15)


def test_torchs_own_initialization_is_left_alone() -> None:
    untouched = build_vae(CONFIG, SHAPE, seed=5).state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in initialised("torch").state_dict().items())
