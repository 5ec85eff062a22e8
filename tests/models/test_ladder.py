"""Truth: residual posteriors, the passes and the bound of a ladder, against torch.distributions and written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from vae_ray import Experiment, UserError
from vae_ray.models.initialization import OUTPUT_GAIN, he_at_the_mean_image
from vae_ray.models.latents import DiagonalGaussian, StandardNormal, residual_from
from vae_ray.models.networks.blocks import Sequence, sizes_of
from vae_ray.models.networks.ladder import Ladder
from vae_ray.models.noise import latent_noise
from vae_ray.models.vae import VAE, build_vae, shape_vae
from vae_ray.objectives.base import elbo_terms

SHAPE, BATCH = (2, 9, 11), 5
DENSE = {"name": "ladder", "hidden": [13, 12, 10], "upper_dims": [3, 5]}
CONV = {"name": "ladder", "kind": "conv", "channels": [8, 10, 12], "latent_groups": [1, 0, 2]}
KINDS = pytest.mark.parametrize("network", [DENSE, CONV], ids=["dense", "conv"])
MEAN_IMAGE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(4)).clamp(0.02, 0.98)


def build(network: dict[str, Any], shape: tuple[int, int, int] = SHAPE, *, started: bool = False, **model: Any) -> VAE:
    """A ladder in float64; with `started` after `initialization: he` at `MEAN_IMAGE`."""
    config = Experiment.from_dict({"model": {"network": network, "latent_dim": 4, **model}})
    built = build_vae(config, shape, seed=3)
    if started:
        mean = MEAN_IMAGE if shape == SHAPE else torch.full(shape, 0.3)
        he_at_the_mean_image(built, mean, torch.Generator().manual_seed(2))
    return built.double()


def images(shape: tuple[int, int, int] = SHAPE, num: int = BATCH) -> Tensor:
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def noise(model: VAE, num_samples: int = 1, num: int = BATCH) -> tuple[Tensor, ...]:
    drawn = latent_noise(model.latent_shapes, slice(0, num), 1, "test", num_samples=num_samples)
    return tuple(eps.double() for eps in drawn)


def normal(gaussian: Any) -> Independent:
    sigma = torch.ones_like(gaussian.mean) if isinstance(gaussian, StandardNormal) else gaussian.sigma
    return Independent(Normal(gaussian.mean, sigma), gaussian.mean.ndim - 1)


# --- residual posteriors --------------------------------------------------------------------------------


def residual(scale: float, dtype: torch.dtype = torch.float64) -> tuple[DiagonalGaussian, DiagonalGaussian]:
    """A prior with log variances about -6 .. 6, and a posterior at differences of the size `scale`."""
    generator = torch.Generator().manual_seed(6)
    mean, logvar = 3 * torch.randn(2, 7, 3, 2, generator=generator, dtype=torch.float64)
    prior = DiagonalGaussian(mean.to(dtype), logvar.to(dtype))
    parameters = scale * torch.randn(7, 6, 2, generator=generator, dtype=torch.float64)
    return residual_from(parameters.to(dtype), prior), prior


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_rate_of_a_residual_posterior_is_the_kl_divergence_of_torch_distributions(scale: float) -> None:
    posterior, prior = residual(scale)
    rate = posterior.kl(prior)
    assert rate is not None
    expected = kl_divergence(normal(posterior), normal(prior))
    # torch's subtracts numbers of order one
    torch.testing.assert_close(rate.flatten(1).sum(1), expected, rtol=1e-12, atol=1e-13)
    # the general formula sees the same distributions
    without = DiagonalGaussian(posterior.mean, posterior.logvar)
    torch.testing.assert_close(without.kl(prior), rate, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-8])
def test_the_rate_near_the_prior_loses_nothing_in_float32(scale: float) -> None:
    posterior, prior = residual(scale, torch.float32)
    exact, exact_prior = residual(scale)
    assert exact.residual is not None
    rate, expected = posterior.kl(prior), exact.kl(exact_prior)
    assert rate is not None
    assert expected is not None
    # of expm1(l) - l float32 keeps l^2 / 2 to 6e-8 / l only; both parts are at least 0 on their own
    torch.testing.assert_close(rate.double(), expected, rtol=1e-4, atol=6e-8 * scale)
    assert float(rate.min()) >= 0
    # at means of order 3 the difference of the means themselves has no correct digit left
    shift = exact.residual.mean
    means_only = residual_from(torch.cat([shift, 0 * shift], 1).float(), prior).kl(prior)
    assert means_only is not None
    expected = 0.5 * shift.square() / exact_prior.logvar.exp()
    torch.testing.assert_close(means_only.double(), expected, rtol=2e-6, atol=0)


def test_a_posterior_without_a_difference_is_the_prior_and_has_the_rate_0() -> None:
    _, prior = residual(1.0, torch.float32)
    posterior = residual_from(torch.zeros(7, 6, 2), prior)
    assert torch.equal(posterior.mean, prior.mean)
    assert torch.equal(posterior.logvar, prior.logvar)
    rate = posterior.kl(prior)
    assert rate is not None
    assert bool((rate == 0).all())


@KINDS
def test_a_ladder_whose_posteriors_end_in_zeros_has_the_rate_0_in_all_lower_groups(network: dict[str, Any]) -> None:
    model = build(network).float().requires_grad_(False)
    for layer in model.network.posterior_layers():
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    output = model(images().float(), tuple(eps.float() for eps in noise(model)))
    assert [float(group.rate().abs().max()) for group in output.groups] == [0.0] * 3
    assert float(output.groups[1].prior.mean.abs().max()) > 0.01
    assert torch.equal(output.rate(), torch.zeros(BATCH))


def test_a_residual_posterior_counts_against_its_own_prior_only() -> None:
    posterior, _ = residual(0.5)
    zeros = torch.zeros_like(posterior.mean)
    for other in (StandardNormal(zeros), DiagonalGaussian(zeros + 0.5, zeros - 1)):
        rate = posterior.kl(other)
        assert rate is not None
        expected = kl_divergence(normal(posterior), normal(other))
        torch.testing.assert_close(rate.flatten(1).sum(1), expected, rtol=1e-12, atol=0)


# --- the bound ------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_rate_is_the_sum_of_the_kl_divergences_of_torch_distributions(
    network: dict[str, Any], num_samples: int
) -> None:
    model = build(network)
    output = model(images(), noise(model, num_samples), num_samples)
    expected = torch.stack([kl_divergence(normal(g.posterior), normal(g.prior)) for g in output.groups])
    torch.testing.assert_close(output.rate(), expected.sum(0), rtol=1e-9, atol=1e-13)
    for group, mine in zip(output.groups, expected, strict=True):
        torch.testing.assert_close(group.rate(), mine, rtol=1e-9, atol=1e-13)
        log_ratio = normal(group.posterior).log_prob(group.z) - normal(group.prior).log_prob(group.z)
        torch.testing.assert_close(group.log_ratio(), log_ratio, rtol=1e-9, atol=1e-12)


@KINDS
def test_log_ratios_of_many_samples_have_the_rate_as_their_mean(network: dict[str, Any]) -> None:
    model, num = build(network).requires_grad_(False), 20_000
    # of one image: the top group's z differ, and with them the priors and posteriors below
    output = model(images(num=1), noise(model, num, num=1), num)
    rates = torch.stack([group.rate() for group in output.groups]).sum(0)
    ratios = torch.stack([group.log_ratio() for group in output.groups]).sum(0)
    assert float(rates.mean()) > 0.01
    # five standard errors
    error = 5 * float((ratios - rates).std()) / num**0.5
    assert float(ratios.mean()) == pytest.approx(float(rates.mean()), abs=error)


class Linear(Ladder):
    """A ladder of two groups all of whose parts are linear: z_1 (2), z_2 (3), an image of 1 x 2 x 2."""

    def __init__(self) -> None:
        super().__init__(image_shape=(1, 2, 2), latent_dim=3, num_params=1, hidden=(6, 5), upper_dims=(2,))
        top, low = self.rungs
        linear = nn.Linear
        self.encoder = nn.ModuleList([Sequence(nn.Flatten(), linear(4, 6)), Sequence(linear(6, 5))])
        top.posterior, low.posterior = Sequence(linear(5, 4)), Sequence(linear(12, 6))
        low.enter, low.prior = Sequence(linear(5, 6)), Sequence(linear(6, 6))
        self.write = Sequence(linear(6, 4), nn.Unflatten(1, (1, 2, 2)))


def test_the_bound_of_a_linear_ladder_is_the_one_written_out() -> None:
    torch.manual_seed(1)
    x = torch.rand(BATCH, 1, 2, 2, dtype=torch.float64)
    flat, network = build(DENSE), Linear().double()
    model = VAE(network, type(flat.prior)((2,)), flat.likelihood, image_shape=(1, 2, 2))
    eps1, eps2 = torch.randn(BATCH, 2, dtype=torch.float64), torch.randn(BATCH, 3, dtype=torch.float64)
    output = model(x, (eps1, eps2))

    def affine(layer: Any, v: Tensor) -> Tensor:
        return v @ layer.weight.T + layer.bias

    top, low = network.rungs
    f1 = affine(network.encoder[0][1], x.flatten(1))
    f2 = affine(network.encoder[1][0], f1)
    m1, l1 = affine(top.posterior[0], f2).split(2, dim=1)
    z1 = m1 + torch.exp(l1 / 2) * eps1
    h = affine(low.enter[0], affine(top.spread, z1))
    pm, pl = affine(low.prior[0], h).split(3, dim=1)
    dm, dl = affine(low.posterior[0], torch.cat([h, f1], 1)).split(3, dim=1)
    z2 = pm + dm + torch.exp((pl + dl) / 2) * eps2
    logits = affine(network.write[0], h + affine(low.spread, z2))
    # KL of the top against N(0, I), of the lower against N(pm, e^pl)
    rate = 0.5 * (m1**2 + l1.exp() - 1 - l1).sum(1) + 0.5 * (dm**2 / pl.exp() + dl.exp() - 1 - dl).sum(1)
    distortion = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1)
    ours = elbo_terms(output, x, model.likelihood)
    torch.testing.assert_close(ours[0][0], distortion, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[1][0], rate, rtol=1e-12, atol=0)


# --- passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (28, 28), (31, 17), (8, 65), (128, 96), (1, 5), (4, 3)])
@pytest.mark.parametrize("latent_groups", [(1, 1, 1), (2, 0, 3)])
def test_groups_lie_at_their_resolutions_the_top_one_first(
    size: tuple[int, int], latent_groups: tuple[int, ...]
) -> None:
    shape = (3, *size)
    model = build({**CONV, "latent_groups": latent_groups}, shape).float().requires_grad_(False)
    levels = zip(sizes_of(size, 3)[1:], latent_groups, strict=True)
    bottom_first = [(4, *each) for each, num in levels for _ in range(num)]
    assert model.latent_shapes == tuple(reversed(bottom_first))
    x = images(shape, 1).float()
    output = model(x, tuple(eps.float() for eps in noise(model, num=1)))
    assert output.params.shape == (1, model.likelihood.num_params(3), *size)
    assert [tuple(group.z.shape[1:]) for group in output.groups] == [*model.latent_shapes]
    assert bool(output.params.isfinite().all())


def test_a_dense_ladder_has_a_group_at_each_width_with_the_dimensions_from_the_top_down() -> None:
    assert build(DENSE).latent_shapes == ((3,), (5,), (4,))
    assert build({"name": "ladder", "hidden": [7], "upper_dims": []}).latent_shapes == ((4,),)


@KINDS
def test_priors_depend_on_every_z_above_and_on_none_below(network: dict[str, Any]) -> None:
    model = build(network, started=True)
    num = len(model.latent_shapes)
    eps = noise(model)
    for changed in range(num):
        other = tuple(part + 1.0 if g == changed else part for g, part in enumerate(eps))
        first, second = model(images(), eps).groups, model(images(), other).groups
        for g in range(1, num):
            assert torch.equal(first[g].prior.mean, second[g].prior.mean) == (g <= changed), (changed, g)


@KINDS
@pytest.mark.parametrize("num_samples", [1, 4])
def test_features_are_computed_once_per_image(network: dict[str, Any], num_samples: int) -> None:
    model, rows = build(network), list[int]()
    for part in (*model.network.encoder, model.network.rungs[0].posterior):
        part.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    output = model(images(), noise(model, num_samples), num_samples)
    assert rows == [BATCH] * (len(model.network.encoder) + 1)
    assert len(output.params) == num_samples * BATCH


@KINDS
def test_the_first_of_several_samples_is_the_only_one(network: dict[str, Any]) -> None:
    model = build(network)
    one, several = (model(images(), noise(model, k), k) for k in (1, 3))
    for first, other in zip(one.groups, several.groups, strict=True):
        torch.testing.assert_close(other.z[:BATCH], first.z, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(several.params[:BATCH], one.params, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(several.params[BATCH : 2 * BATCH], one.params)


@KINDS
def test_a_group_that_is_left_out_of_a_code_is_at_the_mean_of_its_prior(network: dict[str, Any]) -> None:
    model = build(network)
    top, *lower = noise(model)
    means: list[Tensor] = []

    def choose(group: int, posterior: Any, prior: Any) -> Tensor:
        means.append(top if group == 0 else prior.mean)
        return means[-1]

    params, _ = model.top_down(None, choose, BATCH)
    expected = model.likelihood.mean(params)
    torch.testing.assert_close(model.decode([top, *(None for _ in lower)]), expected)
    torch.testing.assert_close(model.decode(means), expected)
    torch.testing.assert_close(model.decode([None, *lower]), model.decode([torch.zeros_like(top), *lower]))


@KINDS
def test_a_label_reaches_posteriors_priors_and_images(network: dict[str, Any]) -> None:
    model = build(network, condition="label", num_classes=3)
    eps = noise(model)
    first, second = (model(images(), eps, condition=model.one_hot(torch.full((BATCH,), c))) for c in (0, 2))
    assert not torch.allclose(first.params, second.params)
    for one, other in zip(first.groups, second.groups, strict=True):
        assert not torch.allclose(one.posterior.mean, other.posterior.mean)
    for one, other in zip(first.groups[1:], second.groups[1:], strict=True):
        assert not torch.allclose(one.prior.mean, other.prior.mean)
    assert not torch.allclose(*(model.generate(eps, condition=model.one_hot(torch.full((BATCH,), c))) for c in (0, 2)))
    output = model(images(), eps, condition=model.one_hot(torch.arange(BATCH) % 3))
    (output.params.square().sum() + output.rate().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("network", [DENSE, {**CONV, "latent_groups": [1, 1, 1]}], ids=["dense", "conv"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 128, 96)], ids=str)
def test_constant_images_in_a_batch_of_one_give_finite_values_and_gradients(
    network: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    model = build(network, shape, started=True).float()
    eps = latent_noise(model.latent_shapes, slice(0, 1), 1, "test")
    for value in (0.0, 0.5, 1.0):
        x = torch.full((1, *shape), value)
        output = model(x, eps)
        loss = output.rate().sum() - model.likelihood.log_prob(output.params, x).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert all(bool(torch.isfinite(gradient).all()) for gradient in (loss, *gradients))
        assert all(bool((group.rate() >= 0).all()) for group in output.groups)


@KINDS
def test_a_learning_rate_of_1_gives_no_nan(network: dict[str, Any]) -> None:
    model = build(network, started=True).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    for _ in range(8):
        output = model(images().float(), tuple(eps.float() for eps in noise(model)))
        loss = output.rate().sum() - model.likelihood.log_prob(output.params, images().float()).sum()
        optimizer.zero_grad()
        loss.backward()
        assert bool(loss.isfinite())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()


# --- the start of training ------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 4])
@KINDS
def test_he_starts_all_posteriors_near_their_priors_and_the_decoder_at_the_mean_image(
    network: dict[str, Any], blocks: int
) -> None:
    model = build({**network, "blocks": blocks}, started=True).requires_grad_(False)
    # all layers map 0 to 0, but for the bias of the last
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in model.latent_shapes]
    torch.testing.assert_close(model.decode(zeros)[0], MEAN_IMAGE.double(), rtol=0, atol=1e-6)
    output = model(images(), noise(model))
    for group in output.groups:
        # heads of gain 0.1: per dimension KL = 1/2 (0.1^2 + 0.1^2 / 2) = 0.0075 for features of size 1
        assert float(group.rate().mean()) < 0.03 * math.prod(group.z.shape[1:])
        assert float(group.prior.mean.abs().max()) < 0.5
    eps = noise(model, num=300)
    deviation = torch.logit(model.generate(eps)) - torch.logit(MEAN_IMAGE.double())
    assert 0.2 * OUTPUT_GAIN < float(deviation.square().mean().sqrt()) < 1.5 * OUTPUT_GAIN


@pytest.mark.parametrize(
    "network",
    [
        {"name": "ladder", "hidden": [300, 200, 100], "upper_dims": [40, 50]},
        {"name": "ladder", "kind": "conv", "channels": [32, 32, 48], "latent_groups": [3, 2, 2]},
        {"name": "ladder", "kind": "conv", "channels": [32, 32, 48], "latent_groups": [9, 8, 8]},
    ],
    ids=["dense", "conv", "conv of 25 groups"],
)
def test_he_keeps_the_scale_of_a_signal_through_both_passes(network: dict[str, Any]) -> None:
    shape = (3, 32, 32)
    model = build({**network, "blocks": 3}, shape, started=True, latent_dim=40).requires_grad_(False)
    sizes: list[float] = []
    parts = [*model.network.encoder, *(rung.enter for rung in model.network.rungs[1:])]
    for part in parts:
        part.register_forward_hook(lambda module, given, output: sizes.append(float(output.square().mean().sqrt())))
    written: list[float] = []
    model.network.write.register_forward_pre_hook(
        lambda module, given: written.append(float(given[0].square().mean().sqrt()))
    )
    model.network.bottom_up(torch.randn(8, *shape, generator=torch.Generator().manual_seed(5)).double())
    model.generate(noise(model, num=8))
    rising, falling = sizes[: len(model.network.encoder)], sizes[len(model.network.encoder) :]
    # borders lose up to half of their inputs; torch's own weights lose a factor of 2.4 in each layer
    assert 0.4 < min(rising) < max(rising) < 2.5, rising
    # the state grows from the top group's share of the variance to that of all groups
    assert 0.4 / len(model.latent_shapes) ** 0.5 < min(falling) < max(falling) < 2, falling
    assert 0.5 < written[0] < 1.5


# --- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"hidden": [7, 6, 5]},
            r"\.upper_dims: got \(8,\), should be one number less than hidden: 2, not 1; .*upper-dims 8,8$",
        ),
        ({"hidden": []}, r"model\.network\.hidden"),
        ({"hidden": [9, 1]}, r"^model\.network\.hidden: got \[9, 1\], should each be at least 2: .*hidden 9,2$"),
        ({"channels": [8]}, r"\.channels: got \[8\], which has no effect in a ladder of kind dense; .*kind conv$"),
        (
            {"kind": "conv", "upper_dims": [3]},
            r"\.upper_dims: got \[3\], which has no effect in a ladder of kind conv; .*kind dense$",
        ),
        (
            {"kind": "conv", "channels": [8]},
            r"\.latent_groups: got \(1, 2\), should be as many numbers as channels, 1, .*-groups 1$",
        ),
        ({"kind": "conv", "channels": [8, 1]}, r"^model\.network\.channels: got \[8, 1\], .*channels 8,2$"),
        ({"kind": "conv", "channels": [0, 8]}, r"--model\.network\.channels 32,64$"),
        ({"kind": "conv", "latent_groups": [2, 0]}, "the last at least 1"),
        ({"kind": "round"}, r"model\.network\.kind: got 'round', should be"),
        ({"top_dim": 3}, "a ladder with 'top_dim' was another network; train today's"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Experiment.from_dict({"model": {"network": {"name": "ladder", **settings}}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("network", "latent_dim", "shapes"),
    [
        ({"name": "ladder", "hidden": [256, 128, 64], "upper_dims": [4, 8]}, 16, ((4,), (8,), (16,))),
        (
            {"name": "ladder", "kind": "conv", "channels": [32, 64], "latent_groups": [1, 2]},
            5,
            ((5, 7, 7), (5, 7, 7), (5, 14, 14)),
        ),
    ],
    ids=["dense", "conv"],
)
def test_the_groups_of_the_examples_in_docs_models(
    network: dict[str, Any], latent_dim: int, shapes: tuple[tuple[int, ...], ...]
) -> None:
    experiment = Experiment.from_dict({"model": {"network": network, "latent_dim": latent_dim}})
    assert shape_vae(experiment, (1, 28, 28)).latent_shapes == shapes
