"""Truth: sizes, scales and parts of the convolutional networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vae_ray import Experiment, UserError
from vae_ray.models.initialization import OUTPUT_GAIN, fans, he_at_the_mean_image
from vae_ray.models.networks.blocks import (
    GAINS,
    RESIDUAL_GAIN,
    ResidualBlock,
    SelfAttention,
    ToPixels,
    down,
    halved,
    sizes_of,
    up,
)
from vae_ray.models.networks.conv import Stage
from vae_ray.models.networks.mlp import ACTIVATIONS
from vae_ray.models.noise import latent_noise
from vae_ray.models.vae import VAE, build_vae
from vae_ray.runs.preflight import checked_model

NETWORKS: dict[str, dict[str, Any]] = {
    "conv": {"name": "conv", "channels": [8, 12, 16], "hidden": [20]},
    "flat": {"name": "resnet", "channels": [8, 12, 16], "groups": 4, "blocks": 1, "attention": True},
    "spatial": {"name": "resnet", "channels": [8, 12, 16], "groups": 4, "blocks": 1, "latent": "spatial"},
}


@pytest.fixture(params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config(network: str, *, latent_dim: int = 4, **settings: Any) -> Experiment:
    return Experiment.from_dict({"model": {"network": {**NETWORKS[network], **settings}, "latent_dim": latent_dim}})


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def started(
    network: str, shape: tuple[int, int, int], mean: Tensor | None = None, *, latent_dim: int = 4, **settings: Any
) -> VAE:
    """A model after `initialization: he`."""
    model = build_vae(config(network, latent_dim=latent_dim, **settings), shape, seed=1)
    he_at_the_mean_image(model, torch.full(shape, 0.3) if mean is None else mean, torch.Generator().manual_seed(2))
    return model


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (28, 28), (31, 17), (8, 65), (128, 96), (1, 5), (4, 3)])
def test_up_is_the_transpose_of_down_at_every_size(size: tuple[int, int]) -> None:
    """<down(x), y> = <x, up(y)> with the same weights, and exactly the size that was halved."""
    for large, small in zip(sizes_of(size, 4), sizes_of(size, 4)[1:], strict=False):
        one, other = down(2, 3, large, small).double(), up(3, 2, small, large).double()
        with torch.no_grad():
            other.weight.copy_(one.weight)
            one.bias.zero_()
            other.bias.zero_()
        x, y = random(1, 2, *large).double(), random(1, 3, *small).double()
        assert one(x).shape == y.shape
        assert other(y).shape == x.shape
        torch.testing.assert_close((one(x) * y).sum(), (x * other(y)).sum(), rtol=1e-12, atol=1e-12)


def test_sides_halve_while_they_are_at_least_4() -> None:
    assert sizes_of((28, 9), 4) == [(28, 9), (14, 4), (7, 2), (3, 2), (3, 2)]
    assert halved((1, 5)) == (1, 2)


@pytest.mark.parametrize("latent_dim", [1, 4096])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 23), (3, 128, 96), (1, 96, 128)], ids=str)
def test_constant_images_in_a_batch_of_one_give_finite_values_and_gradients(
    network: str, shape: tuple[int, int, int], latent_dim: int
) -> None:
    model = started(network, shape, latent_dim=latent_dim)
    eps = latent_noise(model.latent_shapes, slice(0, 1), 1, "test")
    for value in (0.0, 0.5, 1.0):
        x = torch.full((1, *shape), value)
        output = model(x, eps)
        assert output.params.shape == (1, model.likelihood.num_params(shape[0]), *shape[1:])
        loss = output.rate().sum() - model.likelihood.log_prob(output.params, x).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in (loss, *gradients))


def test_a_spatial_latent_has_the_size_of_the_smallest_feature_map() -> None:
    model = checked_model(config("spatial", latent_dim=5), (3, 33, 20), num_training=100).model
    assert model.latent_shapes == ((5, 4, 2),)
    assert checked_model(config("flat", latent_dim=5), (3, 33, 20), num_training=100).model.latent_shapes == ((5,),)


def test_groups_that_do_not_divide_the_channels_are_refused_in_a_line() -> None:
    for channels, groups, better in (([12, 18], 4, "3"), ([8], 8, "4"), ([7, 8], 2, "1")):
        line = rf"^model\.network\.groups: got {groups}, should divide each of channels .*groups {better}$"
        with pytest.raises(UserError, match=line):
            config("flat", channels=channels, groups=groups)


# --- where training starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", GAINS)
def test_gains_make_the_mean_square_of_an_activation_1(activation: str) -> None:
    n = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * n.square()) / math.sqrt(2 * math.pi)
    mean_square = torch.trapezoid(ACTIVATIONS[activation]()(n.clone()).square() * density, n)
    assert GAINS[activation] ** 2 * float(mean_square) == pytest.approx(1, rel=1e-3)  # gains have four digits


def outputs_of(model: nn.Module, kind: type[nn.Module]) -> list[Tensor]:
    """Filled by the next passes with what each layer of that kind gives."""
    seen: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, kind):
            layer.register_forward_hook(lambda layer, given, output: seen.append(output.detach()))
    return seen


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("network", ["conv", "flat", "spatial"])
def test_he_keeps_the_scale_of_a_signal_through_the_network(network: str, activation: str) -> None:
    shape = (3, 64, 64)
    channels = {"channels": [32, 32, 32, 32], "activation": activation}
    model = started(network, shape, **channels, **({"hidden": []} if network == "conv" else {"blocks": 3}))
    kind: type[nn.Module] = Stage if network == "conv" else ResidualBlock
    encoded, decoded = outputs_of(model.network.encoder, kind), outputs_of(model.network.decoder, kind)
    model.network.encoder(random(16, *shape))
    model.network.decoder(random(16, *model.latent_shapes[0]))
    for outputs in (encoded, decoded):
        rms = [float(output.square().mean().sqrt()) for output in outputs]
        assert len(rms) == {"conv": len(rms), "flat": 12, "spatial": 12}[network]
        # borders lose up to half of their inputs; torch's own weights lose a factor of 2.4 in each layer
        assert max(rms) / min(rms) < 2.5, rms
        assert 0.3 < min(rms) < max(rms) < 3, rms


def test_a_decoder_starts_at_the_mean_image_and_posteriors_near_the_prior(network: str) -> None:
    shape = (2, 17, 12)
    mean = torch.rand(shape, generator=torch.Generator().manual_seed(1)).clamp(0.01, 0.99)
    model = started(network, shape, mean)
    (latent_shape,) = model.latent_shapes
    # all layers map 0 to 0, but for the bias of the last
    torch.testing.assert_close(model.decode([torch.zeros(1, *latent_shape)])[0], mean, rtol=0, atol=1e-6)
    decoded = model.decode([random(300, *latent_shape)]).detach()
    deviation = (torch.logit(decoded) - torch.logit(mean)).square().mean().sqrt()
    assert 0.2 * OUTPUT_GAIN < float(deviation) < 1.5 * OUTPUT_GAIN
    x = torch.rand(20, *shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        (group,) = model.posteriors(x)
    assert group.posterior is not None
    assert float(group.rate().mean()) / math.prod(latent_shape) < 0.25  # nats of a dimension


def test_a_residual_block_starts_near_the_identity() -> None:
    model, x = started("flat", (3, 16, 16)), random(5, 8, 6, 4)
    block = next(layer for layer in model.modules() if isinstance(layer, ResidualBlock))
    change = (block(x) - x).detach().square().mean().sqrt()
    assert 0.3 * RESIDUAL_GAIN < float(change) < 1.2 * RESIDUAL_GAIN


def test_fans_count_how_often_a_kernel_meets_a_pixel() -> None:
    assert fans(down(3, 5, (16, 16), (8, 8))) == (3 * 16, 5 * 4)
    assert fans(up(5, 3, (8, 8), (16, 16))) == (5 * 4, 3 * 16)
    assert fans(ToPixels(5, 3, (8, 8), (16, 16))) == (5 * 4, 3 * 16)
    assert fans(nn.Conv2d(3, 5, 3)) == (27, 45)
    x = random(200, 5, 10, 10)
    layer = up(5, 3, (10, 10), (20, 20))
    nn.init.normal_(layer.weight, std=(1 / fans(layer)[0]) ** 0.5)
    nn.init.zeros_(layer.bias)
    # 25 %: the spread of 240 random weights; all inner pixels meet four taps
    assert float(layer(x).detach()[:, :, 1:-1, 1:-1].square().mean()) == pytest.approx(1, rel=0.25)


# --- parts ----------------------------------------------------------------------------------------------


def test_attention_is_the_softmax_of_scaled_products_of_pixels() -> None:
    layer, x = SelfAttention(6, groups=2).double(), random(2, 6, 3, 5).double()
    pixels = layer.norm(x).flatten(2).transpose(1, 2)  # (N, pixels, channels)
    projected = pixels @ layer.project_in.weight[:, :, 0, 0].T + layer.project_in.bias
    q, k, v = projected.split(6, dim=2)
    attended = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(6), dim=2) @ v
    expected = attended @ layer.project_out.weight[:, :, 0, 0].T + layer.project_out.bias
    torch.testing.assert_close(layer(x), x + expected.transpose(1, 2).unflatten(2, (3, 5)), rtol=1e-12, atol=1e-12)


def test_attention_lets_every_pixel_see_every_other() -> None:
    layer, x = SelfAttention(4, groups=2).double(), random(1, 4, 3, 5).double().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 0, 0].sum(), x)
    assert bool((gradient.abs() > 0).all())


def test_a_label_moves_a_residual_block_also_with_a_group_for_each_two_channels() -> None:
    """Added in front of a norm, a constant of all channels of a group would be taken away again."""
    block, x = ResidualBlock(6, groups=3, num_classes=5).double(), random(1, 6, 4, 4).double()
    assert block.label is not None
    with torch.no_grad():
        block.label.weight.copy_(torch.arange(5.0)[:, None].expand(5, 6))
    one, other = (block(x, row[None]) for row in torch.eye(5, dtype=torch.float64)[:2])
    assert float((one - other).detach().abs().max()) > 0.01


def test_passes_are_equal_to_the_bit_and_the_layout_of_images_does_not_change_values(network: str) -> None:
    model = started(network, (3, 24, 20))
    x = torch.rand(6, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    first, again = model.reconstruct(x), model.reconstruct(x)
    assert torch.equal(first, again)
    assert torch.equal(first, model.reconstruct(x.contiguous(memory_format=torch.channels_last)))
    assert first.is_contiguous()
