"""Contract: every registered network and likelihood, through the VAE, on images of several shapes."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
from torch import Tensor

from vae_ray import Experiment
from vae_ray.config.fields import literal_values
from vae_ray.config.sections import likelihoods, model, objectives, optim
from vae_ray.models.initialization import INITIALIZATIONS
from vae_ray.models.latents import StandardNormal
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.networks import NETWORKS
from vae_ray.models.noise import latent_noise
from vae_ray.models.priors import PRIORS
from vae_ray.models.vae import VAE, Output, build_vae
from vae_ray.objectives import OBJECTIVES
from vae_ray.training.optimization import OPTIMIZERS
from vae_ray.training.schedules import SCHEDULES

SHAPES = [(1, 8, 8), (2, 3, 5), (3, 5, 7), (2, 1, 9)]
BATCH, LATENT_DIM = 6, 4
# small widths of every network; a new network needs an entry here
SETTINGS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [11, 10]},
    "conv": {"channels": [9, 11], "hidden": [10]},
    "resnet": {"channels": [6, 9], "groups": 3, "blocks": 1},
    "ladder": {"hidden": [11, 10], "upper_dims": [3]},
    "conv ladder": {"name": "ladder", "kind": "conv", "channels": [9, 8], "latent_groups": [1, 2]},
}


@pytest.fixture(params=sorted({*NETWORKS, *SETTINGS}))
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SHAPES, ids=str)
def image_shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    shape: tuple[int, int, int] = request.param
    return shape


def build(network: str, image_shape: tuple[int, int, int], *, seed: int = 1, **sections: Any) -> VAE:
    model = {"network": {"name": network, **SETTINGS[network]}, "latent_dim": LATENT_DIM, **sections.pop("model", {})}
    return build_vae(Experiment.from_dict({"model": model, **sections}), image_shape, seed=seed)


def images(image_shape: tuple[int, int, int]) -> Tensor:
    return torch.rand(BATCH, *image_shape, generator=torch.Generator().manual_seed(1))


def noise(model: VAE, num_samples: int = 1) -> tuple[Tensor, ...]:
    return latent_noise(model.latent_shapes, slice(3, 3 + BATCH), 1, "test", num_samples=num_samples)


def tensors(output: Output) -> list[Tensor]:
    """Everything that a pass gives."""
    found = [output.params, output.rate()]
    for group in output.groups:
        found += [group.z, group.posterior.mean, group.posterior.logvar, group.prior.mean]
    return found


# --- names ----------------------------------------------------------------------------------------------


def names_in(annotation: Any) -> set[str]:
    """The names of the registered entries of a union of sections."""
    classes = typing.get_args(annotation) or (annotation,)
    return {name for cls in classes for name in literal_values(cls.model_fields["name"].annotation)}


@pytest.mark.parametrize(("names", "table"), [
    (names_in(model.ModelConfig.model_fields["network"].annotation), NETWORKS),
    (names_in(model.ModelConfig.model_fields["prior"].annotation), PRIORS),
    (names_in(typing.get_args(likelihoods.Likelihood)[0]), LIKELIHOODS),
    (names_in(typing.get_args(objectives.Objective)[0]), OBJECTIVES),
    (set(literal_values(model.ModelConfig.model_fields["initialization"].annotation)), INITIALIZATIONS),
    (set(literal_values(optim.OptimConfig.model_fields["optimizer"].annotation)), OPTIMIZERS),
    (names_in(optim.OptimConfig.model_fields["schedule"].annotation), SCHEDULES),
], ids=["network", "prior", "likelihood", "objective", "initialization", "optimizer", "schedule"])  # fmt: skip
def test_names_of_the_configuration_are_those_of_the_table(names: set[str], table: dict[str, Any]) -> None:
    assert names == set(table)


# --- passes through the model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "prior"),
    [
        *((each, "standard") for each in sorted(LIKELIHOODS)),
        *(("bernoulli", each) for each in sorted(PRIORS) if each != "standard"),
    ],
)
def test_shapes_of_a_pass(network: str, image_shape: tuple[int, int, int], likelihood: str, prior: str) -> None:
    model = build(network, image_shape, likelihood={"name": likelihood}, model={"prior": {"name": prior}})
    num_params = model.likelihood.num_params(image_shape[0])
    for num_samples in (1, 3):
        rows = num_samples * BATCH
        output = model(images(image_shape), noise(model, num_samples), num_samples)
        assert output.params.shape == (rows, num_params, *image_shape[1:])
        assert output.rate().shape == (rows,)
        for group, shape in zip(output.groups, model.latent_shapes, strict=True):
            assert group.z.shape == group.posterior.mean.shape == group.prior.mean.shape == (rows, *shape)
        x = images(image_shape).repeat(num_samples, 1, 1, 1)
        assert model.likelihood.log_prob(output.params, x).shape == (rows,)
        for made in (model.likelihood.mean(output.params), model.likelihood.sample(output.params)):
            assert made.shape == (rows, *image_shape)
    for made in (model.reconstruct(images(image_shape)), model.generate(noise(model))):
        assert made.shape == (BATCH, *image_shape)
        assert bool(((made >= 0) & (made <= 1)).all())


@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_a_prior_is_a_distribution_of_the_top_group(prior: str) -> None:
    model = build("mlp", (2, 3, 5), model={"prior": {"name": prior}}).double()
    distribution = model.prior(7, torch.zeros(1, dtype=torch.float64))
    z = torch.randn(7, LATENT_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert distribution.mean.shape == distribution.rsample(z).shape == (7, LATENT_DIM)
    assert distribution.mean.dtype == torch.float64
    assert distribution.log_prob(z).shape == (7,)


def test_z_is_the_posterior_mean_plus_sigma_times_the_noise(network: str, image_shape: tuple[int, int, int]) -> None:
    model = build(network, image_shape)
    eps = noise(model)
    output = model(images(image_shape), eps)
    for group, group_eps in zip(output.groups, eps, strict=True):
        z = group.posterior.mean + torch.exp(group.posterior.logvar).sqrt() * group_eps
        torch.testing.assert_close(group.z, z)
    torch.testing.assert_close(model.likelihood.mean(output.params), model.decode([g.z for g in output.groups]))


def test_the_first_of_several_samples_is_the_only_one_of_one(network: str, image_shape: tuple[int, int, int]) -> None:
    model = build(network, image_shape)
    one = model(images(image_shape), noise(model))
    several = model(images(image_shape), noise(model, 3), 3)
    for single, all_samples in zip(tensors(one), tensors(several), strict=True):
        torch.testing.assert_close(all_samples[:BATCH], single, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(several.groups[0].z[:BATCH], several.groups[0].z[BATCH : 2 * BATCH])


def test_reconstruction_is_the_pass_without_noise(network: str, image_shape: tuple[int, int, int]) -> None:
    model = build(network, image_shape)
    x, zeros = images(image_shape), tuple(torch.zeros_like(eps) for eps in noise(model))
    expected = model(x, zeros)
    torch.testing.assert_close(model.reconstruct(x), model.likelihood.mean(expected.params))
    for mine, group in zip(model.posteriors(x), expected.groups, strict=True):
        torch.testing.assert_close(mine.z, group.z)
        torch.testing.assert_close(mine.posterior.mean, group.posterior.mean)


def test_examples_do_not_see_each_other(network: str, image_shape: tuple[int, int, int]) -> None:
    model = build(network, image_shape).eval()
    x, eps = images(image_shape), noise(model)
    each = [tensors(model(x[i : i + 1], tuple(part[i : i + 1] for part in eps))) for i in range(BATCH)]
    for together, alone in zip(tensors(model(x, eps)), zip(*each, strict=True), strict=True):
        # matrix products of other sizes sum in another order: a few float32 roundings
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_pixels_and_latents_all_matter(network: str, image_shape: tuple[int, int, int]) -> None:
    model = build(network, image_shape)
    x = images(image_shape).requires_grad_()
    eps = tuple(part.clone().requires_grad_() for part in noise(model))
    output = model(x, eps)
    (output.params.square().sum() + output.rate().sum()).backward()
    for given in (x, *eps):
        assert given.grad is not None
        assert bool((given.grad.abs().sum(0) > 0).all())


def test_gradient_reaches_every_parameter(network: str, image_shape: tuple[int, int, int]) -> None:
    model = build(network, image_shape)
    output = model(images(image_shape), noise(model))
    (output.params.square().sum() + output.rate().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_a_pass_of_no_images_has_gradients_of_zeros(network: str, image_shape: tuple[int, int, int]) -> None:
    """As on a worker whose shard of the last batch is empty."""
    model = build(network, image_shape)
    x = images(image_shape)[:0]
    output = model(x, tuple(part[:0] for part in noise(model)))
    loss = output.rate().sum() - model.likelihood.log_prob(output.params, x).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_images_given_to_the_model_are_not_changed(network: str) -> None:
    for encoder_range in ("unit", "signed"):
        model = build(network, (3, 5, 7), model={"encoder_range": encoder_range})
        x, eps = images((3, 5, 7)), noise(model)
        before = [each.clone() for each in (x, *eps)]
        model(x, eps)
        model.reconstruct(x)
        model.generate(eps, temperature=0.5)
        assert all(torch.equal(now, then) for now, then in zip((x, *eps), before, strict=True))


def test_signed_range_maps_zero_to_one_onto_minus_one_to_one(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(0, 1, 105).reshape(1, 3, 5, 7)
    fed = {}
    for encoder_range in ("unit", "signed"):
        model = build(network, (3, 5, 7), model={"encoder_range": encoder_range})
        bottom_up = model.network.bottom_up
        monkeypatch.setattr(
            model.network,
            "bottom_up",
            lambda x, condition, r=encoder_range, f=bottom_up: (fed.update({r: x.clone()}), f(x))[1],
        )
        model.posteriors(x)
    assert torch.equal(fed["unit"], x)
    # one float32 rounding
    torch.testing.assert_close(fed["signed"], torch.linspace(-1, 1, 105).reshape(1, 3, 5, 7), rtol=0, atol=2e-7)
    assert (float(fed["signed"].min()), float(fed["signed"].max())) == (-1.0, 1.0)


# --- priors of the groups, and generation ---------------------------------------------------------------


def test_generation_samples_every_group_from_its_prior(network: str, image_shape: tuple[int, int, int]) -> None:
    model = build(network, image_shape)
    eps = noise(model)
    latents: list[Tensor] = []

    def from_prior(group: int, posterior: Any, prior: Any) -> Tensor:
        assert posterior is None
        sigma = 1.0 if isinstance(prior, StandardNormal) else prior.sigma
        latents.append(prior.mean + sigma * 0.5 * eps[group])
        return latents[-1]

    params, groups = model.top_down(None, from_prior, BATCH)
    assert len(latents) == len(groups) == len(model.latent_shapes)
    generated = model.generate(eps, temperature=0.5)
    torch.testing.assert_close(generated, model.likelihood.mean(params))
    torch.testing.assert_close(generated, model.decode(latents))
    assert not torch.allclose(generated, model.generate(eps))


# --- weights --------------------------------------------------------------------------------------------


def test_initial_weights_are_a_function_of_the_seed(network: str, image_shape: tuple[int, int, int]) -> None:
    first, again, other = (build(network, image_shape, seed=seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    # the weights of norms and the biases of some layers begin as 1 and 0
    drawn = [name for name in first if bool((first[name] != first[name].flatten()[0]).any())]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert len(drawn) >= len(first) / 2


def test_weights_and_the_global_random_state_do_not_depend_on_each_other(network: str) -> None:
    models, draws = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(build(network, (1, 8, 8), seed=7).state_dict())
        draws.append(torch.rand(3))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), draws[1])


def test_outputs_are_float32_under_autocast_and_near_the_exact_ones(network: str) -> None:
    model = build(network, (3, 5, 7), seed=3)
    x, eps = images((3, 5, 7)), noise(model)
    exact = model(x, eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x, eps)
    for ours, expected in zip(tensors(rounded), tensors(exact), strict=True):
        assert ours.dtype == torch.float32
        # bfloat16 has 8 bits: 0.4 % a product, a few layers, values of order one
        torch.testing.assert_close(ours, expected, rtol=0.03, atol=0.03)


def test_a_model_in_float64_computes_in_float64(network: str) -> None:
    model = build(network, (3, 5, 7), seed=3).double()
    output = model(images((3, 5, 7)).double(), noise(model))
    assert {tensor.dtype for tensor in tensors(output)} == {torch.float64}
    assert model.generate(tuple(part.double() for part in noise(model))).dtype == torch.float64


def test_number_of_parameters_of_the_notebook_is_the_closed_form() -> None:
    model = build_vae(Experiment(), (1, 28, 28), seed=1)
    expected = (784 * 400 + 400) + (400 * 100 + 100) + 2 * (100 * 20 + 20)  # encoder
    expected += (20 * 100 + 100) + (100 * 400 + 400) + (400 * 784 + 784)  # decoder
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 715_024
