"""Contract: every network, through the VAE, on images of several shapes."""

import pytest
import torch

from vae_ray.config.experiment import ModelConfig
from vae_ray.models.vae import NETWORKS, VAE, build_vae

SHAPES = [(1, 8, 8), (3, 5, 7), (2, 1, 9)]
CONFIG = ModelConfig(hidden=(11, 6), latent_dim=4)


@pytest.fixture(params=sorted(NETWORKS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIG.model_copy(update={"network": request.param})


@pytest.fixture(params=SHAPES, ids=str)
def image_shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    shape: tuple[int, int, int] = request.param
    return shape


def inputs(image_shape: tuple[int, int, int], *, batch: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, *image_shape, generator=generator), torch.randn(batch, 4, generator=generator)


def test_one_pass_is_encode_sample_decode(config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    model = build_vae(config, image_shape, seed=1)
    x, eps = inputs(image_shape)
    forward, posterior = model(x, eps), model.encode(x)
    assert torch.equal(forward.mu, posterior.mu)
    assert torch.equal(forward.logvar, posterior.logvar)
    z = posterior.mu + torch.exp(posterior.logvar).sqrt() * eps
    torch.testing.assert_close(forward.logits, model.decode(z))
    assert forward.logits.shape == x.shape
    assert forward.mu.shape == forward.logvar.shape == eps.shape


def test_examples_do_not_see_each_other(config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    model = build_vae(config, image_shape, seed=1).eval()
    x, eps = inputs(image_shape)
    alone = torch.cat([model(x[i : i + 1], eps[i : i + 1]).logits for i in range(len(x))])
    # matrix products of other sizes sum in another order: a few float32 roundings
    torch.testing.assert_close(model(x, eps).logits, alone, rtol=1e-5, atol=1e-6)


def test_pixels_and_latents_all_matter(config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    model = build_vae(config, image_shape, seed=1)
    x, eps = inputs(image_shape)
    x, eps = x.requires_grad_(), eps.requires_grad_()
    forward = model(x, eps)
    (forward.logits.square().sum() + forward.mu.sum()).backward()
    assert x.grad is not None
    assert eps.grad is not None
    assert bool((x.grad.abs().sum(0) > 0).all())
    assert bool((eps.grad.abs().sum(0) > 0).all())


def test_gradient_reaches_every_parameter(config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    model = build_vae(config, image_shape, seed=1)
    model(*inputs(image_shape)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_initial_weights_are_a_function_of_the_seed(config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
    first, again, other = (build_vae(config, image_shape, seed=seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_global_random_state_alone(config: ModelConfig) -> None:
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    build_vae(config, (1, 8, 8), seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_initial_weights_do_not_depend_on_the_global_random_state(config: ModelConfig) -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(build_vae(config, (1, 8, 8), seed=7).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_signed_range_maps_zero_to_one_onto_minus_one_to_one(config: ModelConfig) -> None:
    unit, signed = (
        build_vae(config.model_copy(update={"encoder_range": name}), (3, 5, 7), seed=3) for name in ("unit", "signed")
    )
    fed: list[torch.Tensor] = []
    for model in (unit, signed):
        model.encoder.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].clone()))
        x = torch.linspace(0, 1, 105).reshape(1, 3, 5, 7)
        model.encode(x)
    assert torch.equal(fed[0], x)
    # one float32 rounding
    torch.testing.assert_close(fed[1], torch.linspace(-1, 1, 105).reshape(1, 3, 5, 7), rtol=0, atol=2e-7)
    assert (float(fed[1].min()), float(fed[1].max())) == (-1.0, 1.0)


def test_images_given_to_the_encoder_are_not_changed(config: ModelConfig) -> None:
    for encoder_range in ("unit", "signed"):
        model = build_vae(config.model_copy(update={"encoder_range": encoder_range}), (3, 5, 7), seed=3)
        x, eps = inputs((3, 5, 7))
        before = x.clone()
        model(x, eps)
        assert torch.equal(x, before)


def test_outputs_are_float32_under_autocast_and_near_the_exact_ones(config: ModelConfig) -> None:
    model = build_vae(config, (3, 5, 7), seed=3)
    x, eps = inputs((3, 5, 7))
    exact = model(x, eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x, eps)
    assert {tensor.dtype for tensor in rounded} == {torch.float32}
    for ours, expected in zip(rounded, exact, strict=True):
        # bfloat16 has 8 bits: 0.4 % a product, a few layers, values of order one
        torch.testing.assert_close(ours, expected, rtol=0.03, atol=0.03)


def test_a_model_in_float64_computes_in_float64(config: ModelConfig) -> None:
    model = build_vae(config, (3, 5, 7), seed=3).double()
    x, eps = inputs((3, 5, 7))
    outputs = model(x.double(), eps.double())
    assert {tensor.dtype for tensor in outputs} == {torch.float64}


def test_number_of_parameters_of_the_notebook_is_the_closed_form() -> None:
    model = VAE(ModelConfig(hidden=(400, 100), latent_dim=20), (1, 28, 28))
    expected = (784 * 400 + 400) + (400 * 100 + 100) + 2 * (100 * 20 + 20)  # encoder
    expected += (20 * 100 + 100) + (100 * 400 + 400) + (400 * 784 + 784)  # decoder
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 715_024
