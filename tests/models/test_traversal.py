"""Truth: a traversal moves one dimension at a time, through the prior, the informative dimensions first."""

import math

import pytest
import torch

from tests.training.small import ALONE, NETWORKS
from vae_ray import Experiment
from vae_ray.data.batches import Loader
from vae_ray.data.dataset import Split
from vae_ray.evaluation.elbo import evaluate_split
from vae_ray.models.coordinates import coordinates, movable
from vae_ray.models.latents import DiagonalGaussian, Distribution, Group, StandardNormal
from vae_ray.models.noise import EVALUATION_NOISE, latent_noise
from vae_ray.models.priors import PRIORS
from vae_ray.models.priors.flow import FlowDistribution
from vae_ray.models.priors.mixture import GaussianMixture
from vae_ray.models.traversal import (
    decode_first_groups,
    elementwise_rate,
    join_groups,
    mean_rates,
    split_groups,
    traverse,
)
from vae_ray.models.vae import VAE, Output, build_vae
from vae_ray.parallel.group import shards_of

SHAPE = (1, 3, 5)


def build(network: dict[str, object], prior: str = "standard") -> VAE:
    model = {"network": network, "latent_dim": 4, "prior": {"name": prior}}
    return build_vae(Experiment.from_dict({"model": model}), SHAPE, seed=1).double().requires_grad_(False)


def sampled_groups(model: VAE, x: torch.Tensor) -> tuple[Group, ...]:
    """The groups with the z that evaluation draws with seed 0."""
    noise = latent_noise(model.latent_shapes, slice(0, len(x)), 0, EVALUATION_NOISE)
    return model(x, tuple(eps.double() for eps in noise)).groups


@pytest.fixture
def mlp() -> VAE:
    return build({"name": "mlp", "hidden": [7]})


@pytest.fixture
def ladder() -> VAE:
    return build({"name": "ladder", "hidden": [7, 6], "upper_dims": [3]})


@pytest.fixture
def conv_ladder() -> VAE:
    return build({"name": "ladder", "kind": "conv", "channels": [8, 10], "latent_groups": [1, 2]})


def images() -> torch.Tensor:
    return torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_each_row_moves_its_own_dimension_from_minus_to_plus_extent(mlp: VAE) -> None:
    moved = traverse(mlp, images(), steps=5, extent=2.0, num_dimensions=3)
    assert moved.images.shape == (3, 5, *SHAPE)
    assert moved.groups == [0, 0, 0]
    for row, dimension in enumerate(moved.dimensions):
        for step, value in enumerate([-2.0, -1.0, 0.0, 1.0, 2.0]):
            z = torch.zeros(1, 4, dtype=torch.float64)
            z[0, dimension] = value
            torch.testing.assert_close(moved.images[row, step], mlp.decode([z])[0], atol=1e-12, rtol=0)


def test_the_lower_group_of_a_ladder_moves_around_the_mean_of_its_prior(ladder: VAE) -> None:
    moved = traverse(ladder, images(), steps=3, extent=2.0)
    rows = [*zip(moved.groups, moved.dimensions, strict=True)]
    assert sorted(rows) == [*((0, i) for i in range(3)), *((1, i) for i in range(4))]
    prior = ladder.network.top_down(None, lambda group, q, p: p.mean, ladder.prior(1, images()))[1][1].prior
    for row, (group, dimension) in enumerate(rows):
        if group == 1:
            z = prior.mean.clone()
            z[0, dimension] += 2.0 * prior.sigma[0, dimension]
            expected = ladder.decode([torch.zeros(1, 3, dtype=torch.float64), z])[0]
            torch.testing.assert_close(moved.images[row, 2], expected, atol=1e-12, rtol=0)


def test_dimensions_come_in_order_of_their_rate(mlp: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 6, dtype=torch.float64)
    posterior = DiagonalGaussian(mean, torch.zeros_like(mean))
    group = Group(mean, posterior, StandardNormal(mean))
    monkeypatch.setattr(mlp, "forward", lambda x, noise, condition: Output(x, (group,), 1))
    moved = traverse(mlp, images())
    assert moved.dimensions == [1, 3, 2, 0]
    assert moved.rates == pytest.approx([4.5, 2.0, 0.5, 0.0])  # mean^2 / 2
    assert moved.row_labels()[0] == "z[1]  4.5 nats"


def test_a_row_of_a_spatial_latent_moves_a_whole_channel(conv_ladder: VAE) -> None:
    x = images()
    moved = traverse(conv_ladder, x, steps=3, extent=2.0, num_dimensions=99)
    rows = [*zip(moved.groups, moved.dimensions, strict=True)]
    assert sorted(rows) == [(group, channel) for group in range(3) for channel in range(4)]
    rates = [elementwise_rate(group) for group in sampled_groups(conv_ladder, x)]
    for row, (group, channel) in enumerate(rows):
        assert moved.rates[row] == pytest.approx(float(rates[group][:, channel].flatten(1).sum(1).mean()), rel=1e-9)
        eps = [torch.zeros(1, *shape, dtype=torch.float64) for shape in conv_ladder.latent_shapes]
        eps[group][:, channel] = 2.0
        torch.testing.assert_close(moved.images[row, 2], conv_ladder.generate(tuple(eps))[0], atol=1e-12, rtol=0)
    group, channel = rows[0]
    assert moved.row_labels()[0] == f"group {group + 1}, z[{channel}]  {moved.rates[0]:.1f} nats"
    assert moved.rates == sorted(moved.rates, reverse=True)


@pytest.mark.parametrize("name", ["ladder", "conv_ladder"])
def test_images_of_the_first_groups_end_with_the_reconstructions(name: str, request: pytest.FixtureRequest) -> None:
    model, x = request.getfixturevalue(name), images()
    rows, num = decode_first_groups(model, x), len(model.latent_shapes)
    torch.testing.assert_close([*rows.values()][-1], model.reconstruct(x), atol=1e-12, rtol=0)
    groups, sampled = model.posteriors(x), sampled_groups(model, x)
    for g, (label, made) in enumerate(rows.items(), 1):
        z = [group.z for group in groups[:g]]
        params, _ = model.top_down(None, lambda group, q, p, z=z: z[group] if group < len(z) else p.mean, len(x))
        torch.testing.assert_close(made, model.likelihood.mean(params), atol=1e-12, rtol=0)
        total = sum(float(group.rate().mean()) for group in sampled[:g])
        assert label == f"{'group 1' if g == 1 else f'groups 1-{g}'}  {total:.1f} nats"
    assert len(rows) == num
    assert list(decode_first_groups(model, x, most=2)) == [*list(rows)[:1], *list(rows)[-1:]]
    first = decode_first_groups(model, x, num_shown=2)
    assert {label: len(made) for label, made in first.items()} == dict.fromkeys(rows, 2)  # rates are of all images


@pytest.mark.parametrize("network", ["mlp", "ladder", "conv ladder"])
@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_rates_of_a_traversal_and_of_groups_are_those_of_evaluation(network: str, prior: str) -> None:
    model, num = build(NETWORKS[network], prior).float(), 90  # more than a block of noise
    pixels = torch.randint(0, 256, (num, *SHAPE), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    loader = Loader(Split.in_memory(pixels), torch.arange(num), seed=0, shards=shards_of(ALONE))
    metrics, x = evaluate_split(model, loader, "test", ALONE, batch_size=32), loader.images(torch.arange(num))
    rates = [float(each.sum()) for each in mean_rates(model, x)]
    names = [f"test/rate_group_{number}" for number in range(1, len(rates) + 1)] if len(rates) > 1 else ["test/rate"]
    assert rates == pytest.approx([metrics[name] for name in names], rel=1e-4, abs=1e-5)  # float32 sums
    assert sum(traverse(model, x, num_dimensions=999, steps=2).rates) == pytest.approx(sum(rates), rel=1e-5)
    if len(rates) > 1:
        assert list(decode_first_groups(model, x))[-1].endswith(f"  {metrics['test/rate']:.1f} nats")


@pytest.mark.parametrize("prior", sorted(PRIORS))
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_coordinates_are_the_noise_of_which_the_priors_make_z(network: str, prior: str) -> None:
    model, x = build(NETWORKS[network], prior), images()
    for number, parameter in enumerate(model.prior.parameters()):  # a flow starts as the identity
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=parameter.dtype)
        parameter.add_(0.1 * noise)
    eps = tuple(map(coordinates, model.posteriors(x)))
    # there and back, in float64
    torch.testing.assert_close(model.decode_coordinates(eps), model.reconstruct(x), atol=1e-9, rtol=0)
    eps = tuple(torch.randn(6, *shape, dtype=torch.float64) for shape in model.latent_shapes)
    _, groups = model.top_down(None, lambda group, q, p: movable(p).rsample(eps[group]), 6)
    for group, noise in zip(groups, eps, strict=True):
        torch.testing.assert_close(coordinates(group), noise, atol=1e-9, rtol=1e-9)
    if prior in ("standard", "flow"):
        torch.testing.assert_close(model.decode_coordinates(eps), model.generate(eps), atol=1e-9, rtol=0)


@pytest.mark.parametrize("network", ["mlp", "conv ladder"])
@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_a_traversal_under_a_mixture_starts_at_the_first_images_code(network: str, prior: str) -> None:
    """A dimension goes through the prior's deviations around its mean, the others of the top group stay at the code."""
    model, x = build(NETWORKS[network], prior), images()
    moved = traverse(model, x, steps=3, extent=2.0, num_dimensions=99)
    top, *_ = model.posteriors(x[:1])
    around = top.prior.moment_matched()
    assert isinstance(top.prior, GaussianMixture)
    assert len(moved.dimensions) == sum(shape[0] for shape in model.latent_shapes)
    for row, (group, channel) in enumerate(zip(moved.groups, moved.dimensions, strict=True)):
        for step, value in enumerate([-2.0, 0.0, 2.0]):
            z = top.posterior.mean.clone()
            if group == 0:
                z[:, channel] = around.mean[:, channel] + value * around.sigma[:, channel]

            def along(g: int, q: object, p: Distribution, z=z, at=(group, channel), value=value) -> torch.Tensor:
                eps = torch.zeros_like(p.mean)
                eps[:, at[1]] = value if g == at[0] else 0.0
                return z if g == 0 else p.rsample(eps)

            params, _ = model.top_down(None, along, 1)
            # there and back through the coordinates
            torch.testing.assert_close(moved.images[row, step], model.likelihood.mean(params)[0], atol=1e-9, rtol=0)
    assert moved.title().startswith("code of the first image, one latent ")


def test_rates_by_dimension_add_up_to_the_rate(ladder: VAE) -> None:
    for group in ladder.posteriors(images()):
        torch.testing.assert_close(elementwise_rate(group).flatten(1).sum(1), group.rate(), rtol=1e-12, atol=1e-14)


def test_a_rate_without_closed_form_is_shared_out_evenly() -> None:
    class Sampled(DiagonalGaussian):
        def kl(self, prior: object) -> None:
            return None

    z, mean, logvar = torch.randn(3, 6, 2, 5, generator=torch.Generator().manual_seed(2))
    group = Group(z, Sampled(mean, logvar), StandardNormal(torch.zeros_like(z)))
    rates = elementwise_rate(group)
    torch.testing.assert_close(rates, (group.rate().mean() / 10).expand(6, 2, 5))


def test_codes_of_several_groups_are_joined_and_split_again() -> None:
    latents = (torch.randn(2, 3), torch.randn(2, 4, 5, 1))
    codes = join_groups(latents)
    assert codes.shape == (2, 23)
    assert all(torch.equal(a, b) for a, b in zip(split_groups(codes, ((3,), (4, 5, 1))), latents, strict=True))


# --- priors without a closed form -----------------------------------------------------------------------


def test_a_traversal_of_a_flow_moves_its_noise() -> None:
    model = build({"name": "mlp", "hidden": [7]}, "flow")
    moved = traverse(model, images(), steps=3, extent=2.0)
    for row, dimension in enumerate(moved.dimensions):
        eps = torch.zeros(1, 4, dtype=torch.float64)
        eps[0, dimension] = 2.0
        torch.testing.assert_close(moved.images[row, 2], model.generate((eps,))[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_rates_by_dimension_tell_the_informative_ones_from_the_others(prior: str) -> None:
    """Dimension 2 of the posterior is the prior itself, and dimension 1 knows the image."""
    model, num = build({"name": "mlp", "hidden": [7]}, prior), 200
    distribution = model.prior(num, images())
    matched = distribution if isinstance(distribution, StandardNormal) else distribution.moment_matched()
    sigma = torch.ones(num, 4, dtype=torch.float64) if isinstance(matched, StandardNormal) else matched.sigma
    eps = torch.randn(num, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mean, logvar = matched.mean.clone(), 2 * sigma.log()
    mean[:, 1] += 0.99 * sigma[:, 1] * eps
    logvar[:, 1] += 2 * math.log(0.1)
    posterior = DiagonalGaussian(mean, logvar)
    noise = torch.randn(num, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    group = Group(posterior.rsample(noise), posterior, distribution)
    rates = elementwise_rate(group).mean(0).tolist()
    assert rates[2] == pytest.approx(0, abs=1e-12)
    assert rates[1] == pytest.approx(math.log(10), abs=0.3)  # of a Gaussian channel: log(1 / 0.1) on average
    assert sum(rates) == pytest.approx(float(group.rate().mean()), rel=1e-12)


def test_the_moments_of_a_flow_are_those_of_its_samples() -> None:
    model = build({"name": "mlp", "hidden": [7]}, "flow")
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter.add_(
                0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    distribution = model.prior(3, images())
    assert isinstance(distribution, FlowDistribution)
    matched, num = distribution.moment_matched(), 100_000
    eps = torch.randn(num, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.no_grad():
        z = model.prior(num, images()).rsample(eps)
    assert float((matched.logvar[0]).abs().max()) > 0.1  # not N(0, I)
    # five standard errors of 4,096 samples, of heavier tails than normal
    torch.testing.assert_close(matched.mean[0], z.mean(0), rtol=0, atol=5 * float(z.std(0).max()) / 4096**0.5)
    torch.testing.assert_close(matched.sigma[2], z.std(0), rtol=0.08, atol=0)
