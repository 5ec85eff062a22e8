"""Truth: densities and samples of the priors against torch.distributions, quadrature and autograd."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vae_ray import Experiment, UserError
from vae_ray.models.latents import DiagonalGaussian, Group, StandardNormal
from vae_ray.models.networks import NETWORKS, EncoderDecoder
from vae_ray.models.networks.base import Network
from vae_ray.models.priors import PRIORS, Prior, StandardPrior, build_prior
from vae_ray.models.priors.flow import FlowDistribution, FlowPrior
from vae_ray.models.priors.mixture import GaussianMixture, MixturePrior
from vae_ray.models.priors.vamp import VampPrior
from vae_ray.models.vae import VAE, build_vae
from vae_ray.objectives import build_objective
from vae_ray.runs import preflight

IMAGE, LATENT, SPATIAL = (2, 3, 5), 4, (3, 2, 5)
TRAINED = {"mixture": {"components": 6}, "vamp": {"components": 6}, "flow": {"transforms": 3, "hidden": [9]}}
"""Small settings of the priors that have parameters."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Initial weights of priors that are built by themselves."""
    torch.manual_seed(1)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(prior: str, *, latent_dim: int = LATENT, network: str = "mlp", by: float = 0.3, **model: Any) -> VAE:
    """A VAE in float64 whose prior is not as it was built: every parameter is moved at random."""
    settings = {"hidden": [7, 6]} if network in ("mlp", "ladder") else {}
    given = {"name": prior, **TRAINED.get(prior, {})}
    config = {"network": {"name": network, **settings}, "latent_dim": latent_dim, "prior": given, **model}
    vae = build_vae(Experiment.from_dict({"model": config}), IMAGE, seed=3).double()
    move(vae.prior, by)
    return vae


@torch.no_grad()
def move(prior: Prior, by: float = 0.3) -> None:
    for number, parameter in enumerate(prior.parameters()):
        parameter.add_(by * normal(*parameter.shape, seed=number))


def mixture(num: int = 7, components: int = 4, shape: tuple[int, ...] = SPATIAL) -> GaussianMixture:
    weights = torch.log_softmax(normal(num, components, seed=3), dim=1)
    return GaussianMixture(2 * normal(components, *shape, seed=1), normal(components, *shape, seed=2), weights)


def reference(of: GaussianMixture) -> MixtureSameFamily:
    """The same distribution, flattened, from torch; a component of each row."""
    scales = torch.exp(0.5 * of.logvars).flatten(1)
    rows = (len(of.log_weights), *scales.shape)
    components = Independent(Normal(of.means.flatten(1).expand(rows), scales.expand(rows)), 1)
    return MixtureSameFamily(Categorical(logits=of.log_weights), components)


# --- mixtures -------------------------------------------------------------------------------------------


def test_log_density_mean_and_variances_of_a_mixture_are_those_of_torch_distributions() -> None:
    ours, z = mixture(), normal(7, *SPATIAL, seed=4)
    expected = reference(ours)
    torch.testing.assert_close(ours.log_prob(z), expected.log_prob(z.flatten(1)), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.mean.flatten(1), expected.mean, rtol=1e-13, atol=1e-14)
    matched = ours.moment_matched()
    assert torch.equal(matched.mean, ours.mean)
    torch.testing.assert_close(matched.logvar.exp().flatten(1), expected.variance, rtol=1e-12, atol=0)


def test_a_sample_of_a_mixture_of_one_is_that_of_the_gaussian() -> None:
    one = mixture(components=1)
    eps = normal(7, *SPATIAL, seed=5)
    expected = DiagonalGaussian(one.means.expand(7, *SPATIAL), one.logvars.expand(7, *SPATIAL)).rsample(eps)
    # Phi^-1(Phi(eps)) in float64
    torch.testing.assert_close(one.rsample(eps), expected, rtol=1e-12, atol=1e-12)


NUM_SAMPLES = 40_000
KS_LIMIT = 1.95 / NUM_SAMPLES**0.5
"""The Kolmogorov-Smirnov distance that a true sample exceeds once in a thousand times (Smirnov 1948)."""
WEIGHTS = torch.tensor([0.0, 0.2, 0.001, 0.499, 0.3, 0.0], dtype=torch.float64)


def one_dimensional(num: int = NUM_SAMPLES) -> GaussianMixture:
    """Components of which two have no weight and one has little."""
    means = torch.tensor([9.0, -2.0, 0.5, 0.0, 3.0, -9.0], dtype=torch.float64)[:, None]
    logvars = torch.tensor([0.0, -1.0, -4.0, 0.5, 0.0, 0.0], dtype=torch.float64)[:, None]
    return GaussianMixture(means, logvars, WEIGHTS.log().expand(num, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_of_a_mixture_have_its_exact_distribution(dtype: torch.dtype) -> None:
    ours = one_dimensional()
    z = ours.rsample(normal(NUM_SAMPLES, 1).to(dtype))[:, 0]
    exact = reference(one_dimensional(1))
    components = exact.component_distribution.base_dist
    ends = components.cdf(z.double()[:, None, None])[..., 0] @ WEIGHTS
    assert scipy.stats.kstest(ends.numpy(), "uniform").statistic < KS_LIMIT


def test_the_component_and_the_noise_within_it_are_independent_and_exact() -> None:
    """In every dimension, of which the first has given its noise to the choice of the component."""
    components = GaussianMixture(100.0 * torch.arange(6.0)[:, None].expand(6, 2), torch.zeros(6, 2), WEIGHTS.log())
    weights = WEIGHTS.log().expand(NUM_SAMPLES, -1)
    z = GaussianMixture(components.means.double(), components.logvars.double(), weights).rsample(normal(NUM_SAMPLES, 2))
    chosen = (z[:, 1] / 100).round()
    noise = z - 100 * chosen[:, None]
    for component, weight in enumerate(WEIGHTS.tolist()):
        rows = noise[chosen == component]
        deviation = (weight * (1 - weight) / NUM_SAMPLES) ** 0.5
        assert abs(len(rows) / NUM_SAMPLES - weight) <= 4 * deviation
        if weight > 0.1:
            for dimension in rows.T:
                assert scipy.stats.kstest(dimension.numpy(), "norm").statistic < 1.95 / len(rows) ** 0.5
            assert abs(float(torch.corrcoef(rows.T)[0, 1])) < 4 / len(rows) ** 0.5


def test_samples_of_a_mixture_have_its_mean_and_variances() -> None:
    ours = mixture(num=1)
    many = GaussianMixture(ours.means, ours.logvars, ours.log_weights.expand(NUM_SAMPLES, -1))
    z, matched = many.rsample(normal(NUM_SAMPLES, *SPATIAL, seed=6)), ours.moment_matched()
    deviation = matched.sigma[0]
    assert bool(((z.mean(0) - matched.mean[0]).abs() < 5 * deviation / NUM_SAMPLES**0.5).all())
    # of a variance: (kurtosis - 1) / n; a mixture of four has a kurtosis of 5 at most here
    torch.testing.assert_close(z.var(0), deviation.square(), rtol=5 * (4 / NUM_SAMPLES) ** 0.5, atol=0)


def test_temperature_scales_the_deviation_within_the_component() -> None:
    ours, eps = mixture(), normal(7, *SPATIAL, seed=7)
    middle, whole, half = (ours.rsample(eps, temperature) for temperature in (0.0, 1.0, 0.5))
    assert all(any(torch.equal(row, mean) for mean in ours.means) for row in middle)
    torch.testing.assert_close(half, (middle + whole) / 2)


def test_samples_of_extreme_noise_are_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        eps = torch.tensor([[-40.0], [-8.5], [0.0], [8.5], [40.0]], dtype=dtype)
        z = one_dimensional(5).rsample(eps)
        assert bool(z.isfinite().all())
        assert float(z.abs().max()) < 3 + 9  # 0 and 3 are the outermost means with weight; a double has 8.3 deviations


def test_samples_of_a_mixture_are_differentiable_in_means_and_variances() -> None:
    ours, eps = mixture(num=3, components=2, shape=(2,)), normal(3, 2, seed=8)

    def sample(means: Tensor, logvars: Tensor) -> Tensor:
        return GaussianMixture(means, logvars, ours.log_weights).rsample(eps)

    assert torch.autograd.gradcheck(sample, (ours.means.requires_grad_(), ours.logvars.requires_grad_()))


def test_a_mixture_with_absurd_log_variances_has_finite_densities_and_gradients() -> None:
    prior = MixturePrior((2,), components=3)
    with torch.no_grad():
        prior.logvars.copy_(torch.tensor([[1e38, -1e38], [0.0, 50.0], [-50.0, 0.0]]))
    log_prob = prior(5, torch.zeros(1)).log_prob(normal(5, 2).float())
    assert bool(log_prob.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(log_prob.sum(), list(prior.parameters())))


# --- flows ----------------------------------------------------------------------------------------------


def flow(latent_shape: tuple[int, ...], num: int, *, num_classes: int = 0, transforms: int = 3) -> FlowDistribution:
    prior = FlowPrior(latent_shape, transforms=transforms, hidden=[9], num_classes=num_classes).double()
    move(prior)
    condition = torch.eye(num_classes, dtype=torch.float64)[torch.arange(num) % num_classes] if num_classes else None
    distribution = prior(num, torch.zeros(1, dtype=torch.float64), condition)
    assert isinstance(distribution, FlowDistribution)
    return distribution


FLOWS = [((1,), 0), ((2,), 0), ((5,), 3), ((1,), 2), ((2, 3, 2), 0)]


@pytest.mark.parametrize(("latent_shape", "num_classes"), FLOWS, ids=str)
def test_a_flow_is_inverted(latent_shape: tuple[int, ...], num_classes: int) -> None:
    ours, eps = flow(latent_shape, 50, num_classes=num_classes), 2 * normal(50, *latent_shape)
    z = ours.rsample(eps)
    assert float((z - eps).detach().abs().max()) > 0.1
    # float64 roundings, divided by slopes down to 1e-2 in each of three layers
    torch.testing.assert_close(ours.noise_of(z)[0], eps, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.rsample(ours.noise_of(eps)[0]), eps, rtol=0, atol=1e-9)
    assert torch.equal(ours.rsample(eps, temperature=0.25), ours.rsample(0.25 * eps))
    assert torch.equal(ours.mean, ours.rsample(torch.zeros_like(eps)))


@pytest.mark.parametrize(("latent_shape", "num_classes"), FLOWS, ids=str)
def test_the_log_determinant_of_a_flow_is_that_of_autograds_jacobian(
    latent_shape: tuple[int, ...], num_classes: int
) -> None:
    ours, z = flow(latent_shape, 4, num_classes=num_classes), normal(4, *latent_shape)
    log_det = ours.noise_of(z)[1]
    for row in range(4):
        alone = FlowDistribution(ours.couplings, latent_shape, ours.context[row : row + 1])
        jacobian = torch.autograd.functional.jacobian(lambda t, f=alone: f.noise_of(t[None])[0][0], z[row])
        expected = jacobian.reshape(z[row].numel(), -1).slogdet()[1]
        torch.testing.assert_close(log_det[row], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_a_prior_of_two_dimensions_integrates_to_one(prior: str) -> None:
    model = build(prior, latent_dim=2, by=0.15)
    axis = torch.arange(-9, 9, 0.04, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = model.prior(len(grid), grid).log_prob(grid).exp()
    # the rule's error falls with the square of the step where splines have a kink in their slope, elsewhere faster
    assert float(density.sum() * 0.04**2) == pytest.approx(1, abs=1e-4)


def test_a_flow_starts_as_the_standard_normal() -> None:
    ours = FlowPrior((5,), transforms=4, hidden=[9]).double()(6, normal(1))
    eps = 3 * normal(6, 5)  # some outside of the splines
    torch.testing.assert_close(ours.rsample(eps), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.log_prob(eps), StandardNormal(eps).log_prob(eps), rtol=1e-12, atol=1e-12)


def test_every_dimension_of_a_flow_depends_on_every_other() -> None:
    """Two layers for each bit of the dimension's number."""
    ours = flow((6,), 1, transforms=6)
    jacobian = torch.autograd.functional.jacobian(lambda t: ours.rsample(t), normal(1, 6)).view(6, 6)
    assert bool((jacobian != 0).all())


def test_a_flow_in_float32_is_near_the_exact_one() -> None:
    exact = FlowPrior((5,), transforms=4, hidden=[9])
    move(exact)
    eps = normal(1000, 5)
    rounded = exact(1000, torch.zeros(1)).rsample(eps.float())
    torch.testing.assert_close(rounded.double(), exact.double()(1000, eps).rsample(eps), rtol=0, atol=2e-4)


# --- VampPrior ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder_range", ["unit", "signed"])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_a_vamp_prior_is_the_mean_of_the_encoders_posteriors(encoder_range: str, num_classes: int) -> None:
    """Of six pseudo-inputs of four classes, classes 0 and 1 have two and the others one."""
    condition = {"condition": "label", "num_classes": num_classes} if num_classes else {}
    model = build("vamp", encoder_range=encoder_range, **condition)
    network, prior = model.network, model.prior
    assert isinstance(network, EncoderDecoder)
    assert isinstance(prior, VampPrior)
    u = torch.sigmoid(prior.logits)
    classes = torch.arange(6) % max(1, num_classes)
    given = [torch.eye(num_classes, dtype=torch.float64)[classes]] if num_classes else []
    mean, logvar = network.encoder(2 * u - 1 if encoder_range == "signed" else u, *given).chunk(2, dim=1)
    posteriors = Independent(Normal(mean, (0.5 * logvar).exp()), 1)
    z, labels = normal(9, LATENT), torch.arange(9) % max(1, num_classes)
    log_each = posteriors.log_prob(z[:, None])
    expected = [
        torch.logsumexp(row[classes == y], 0) - math.log((classes == y).sum())
        for row, y in zip(log_each, labels, strict=True)
    ]
    ours = model.prior(9, z, model.one_hot(labels) if num_classes else None)
    torch.testing.assert_close(ours.log_prob(z), torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_top_posterior_is_that_of_the_whole_pass(network: str) -> None:
    model, x = build("standard", network=network), torch.rand(4, *IMAGE, dtype=torch.float64)
    ours, expected = model.top_posterior(x), model.posteriors(x)[0].posterior
    assert isinstance(ours, DiagonalGaussian)
    assert isinstance(expected, DiagonalGaussian)
    assert torch.equal(ours.mean, expected.mean)
    assert torch.equal(ours.logvar, expected.logvar)


def test_the_network_of_a_vamp_prior_is_the_models_and_is_counted_once() -> None:
    model, standard = build("vamp"), build("standard")
    assert {name for name, _ in model.named_parameters()} - {name for name, _ in standard.named_parameters()} == {
        "prior.logits"
    }
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    (members,) = build_objective(Experiment().objective).parameter_sets(model).values()
    assert len(members) == len({id(member) for member in members}) == len([*standard.parameters()]) + 1


def test_the_prior_of_a_copied_model_reads_the_copys_encoder() -> None:
    """As the averaged weights are a copy."""
    model, z = build("vamp"), normal(3, LATENT)
    copied = copy.deepcopy(model)
    before = model.prior(3, z).log_prob(z)
    with torch.no_grad():
        next(copied.network.parameters()).add_(1.0)
    assert torch.equal(model.prior(3, z).log_prob(z), before)
    assert not torch.allclose(copied.prior(3, z).log_prob(z), before)


def test_pseudo_inputs_are_seen_in_evaluation_and_the_network_stays_in_training() -> None:
    model = build("vamp")
    assert isinstance(model.network, EncoderDecoder)
    model.network.encoder = nn.Sequential(model.network.encoder, nn.Dropout(0.5)).train()
    frozen = model.network.encoder[0].eval()
    z = normal(3, LATENT)
    first, second = (model.prior(3, z).log_prob(z) for _ in range(2))
    assert torch.equal(first, second)
    assert model.network.encoder[1].training
    assert not frozen.training


def test_the_encoder_has_the_gradient_of_the_prior_also_where_the_posterior_is_detached() -> None:
    """As in estimators that detach q(z|x): what is left is d log p(z) / d encoder, z given."""
    model, x = build("vamp"), torch.rand(5, *IMAGE, dtype=torch.float64)
    output = model(x, (normal(5, LATENT),))
    (group,) = output.groups
    parameters = [*model.network.encoder.parameters()]
    ours = torch.autograd.grad(group.prior.log_prob(group.z.detach()).sum(), parameters)
    z = group.z.detach()
    expected = torch.autograd.grad(model.prior(5, z).log_prob(z).sum(), parameters)
    for mine, other in zip(ours, expected, strict=True):
        assert float(mine.abs().max()) > 0
        assert torch.equal(mine, other)


def test_pseudo_inputs_start_at_training_images() -> None:
    prior = VampPrior((4,), components=7, image_shape=IMAGE, num_classes=3)
    drawn: list[Any] = []

    def draw(num: int, classes: Tensor | None) -> Tensor:
        drawn.append((num, None if classes is None else classes.tolist()))
        return torch.rand(num, *IMAGE, generator=torch.Generator().manual_seed(1)).round(decimals=1)

    prior.start_at(draw)
    assert drawn == [(7, [0, 1, 2, 0, 1, 2, 0])]
    torch.testing.assert_close(torch.sigmoid(prior.logits), draw(7, None).clamp(0.05, 0.95))


class Backwards(Network):
    """Picks its lower group first."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_shapes, self.layer = ((2,), (3,)), nn.Linear(30, 10)

    def bottom_up(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.layer(x.flatten(1)),)

    def top_down(self, features: Any, choose: Any, prior: Any, condition: Tensor | None = None) -> Any:
        choose(1, None, prior)


def test_a_vamp_prior_that_cannot_be_is_refused_in_one_line() -> None:
    prior = VampPrior((2,), components=3, image_shape=IMAGE)
    VAE(Backwards(), prior, nn.Identity(), image_shape=IMAGE)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^model\.prior: vamp needs .*; try --model\.prior mixture$"):
        prior(5, torch.zeros(1))
    with pytest.raises(UserError, match=r"^model\.prior\.components: got 3, should be at least the 4 classes; for ex"):
        build_prior(
            Experiment.from_dict({"model": {"prior": {"name": "vamp", "components": 3}}}).model.prior,
            (2,),
            image_shape=IMAGE,
            num_classes=4,
        )


def test_a_vamp_prior_of_spatial_latents_has_their_shape() -> None:
    encoder, decoder = nn.Conv2d(2, 6, 1), nn.Conv2d(3, 2, 1)
    prior = VampPrior((3, 3, 5), components=4, image_shape=IMAGE)
    model = VAE(EncoderDecoder(encoder, decoder, (3, 3, 5)), prior, nn.Identity(), image_shape=IMAGE)  # type: ignore[arg-type]
    z = model.prior(7, torch.zeros(1)).rsample(normal(7, 3, 3, 5).float())
    assert z.shape == (7, 3, 3, 5)


# --- all priors that are trained ------------------------------------------------------------------------


@pytest.mark.parametrize("prior", sorted(TRAINED))
def test_the_log_ratio_is_the_rate_without_bias(prior: str) -> None:
    """Against quadrature in one dimension."""
    model, num = build(prior, latent_dim=1), 100_000
    q = DiagonalGaussian(torch.full((num, 1), 0.7).double(), torch.full((num, 1), math.log(0.5)).double())
    z = q.rsample(normal(num, 1))
    p = model.prior(num, z)
    assert q.kl(p) is None
    ratios = Group(z, q, p).rate().detach()
    grid = torch.linspace(-7, 8, num, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_q = q.log_prob(grid)
        exact = torch.trapezoid(log_q.exp() * (log_q - p.log_prob(grid)), grid[:, 0])
    assert float(exact) > 0.05
    assert abs(float(ratios.mean() - exact)) < 4 * float(ratios.std()) / num**0.5


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("prior", sorted(TRAINED))
def test_the_rate_has_a_gradient_in_every_parameter_of_the_prior(prior: str, network: str) -> None:
    model = build(prior, network=network)
    x = torch.rand(6, *IMAGE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output = model(x, tuple(normal(6, *shape) for shape in model.latent_shapes))
    output.rate().sum().backward()
    for name, parameter in model.prior.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_a_prior_of_no_rows_has_gradients_of_zeros(prior: str) -> None:
    """As on a worker whose shard of the last batch is empty."""
    model, none = build(prior), torch.zeros(0, LATENT, dtype=torch.float64)
    distribution = model.prior(0, none)
    assert distribution.mean.shape == distribution.rsample(none).shape == (0, LATENT)
    log_prob = distribution.log_prob(none).sum() + 0 * next(model.network.parameters()).sum()
    gradients = torch.autograd.grad(log_prob, list(model.parameters()), materialize_grads=True)
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_the_prior_of_a_conditional_vae_is_that_of_each_rows_class(prior: str) -> None:
    model = build(prior, condition="label", num_classes=3)
    z, labels = normal(6, LATENT), torch.tensor([2, 0, 1, 1, 0, 2])
    log_prob = model.prior(6, z, model.one_hot(labels)).log_prob(z)
    for row in range(6):
        alone = model.prior(1, z, model.one_hot(labels[row : row + 1]))
        torch.testing.assert_close(alone.log_prob(z[row : row + 1]), log_prob[row : row + 1], rtol=1e-12, atol=0)
    first, second = (model.prior(6, z, model.one_hot(torch.full((6,), y))).log_prob(z) for y in (0, 2))
    assert torch.allclose(first, second) is isinstance(model.prior, StandardPrior)


@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_a_large_model_is_described_without_memory_and_draws_nothing(prior: str) -> None:
    torch.manual_seed(1)
    config = Experiment.from_dict({"model": {"prior": {"name": prior}}}).model.prior
    with torch.device("meta"):
        described = build_prior(config, (5,), image_shape=IMAGE)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    assert all(parameter.is_meta for parameter in described.parameters())


@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_the_shapes_of_a_large_model_are_checked_without_memory(
    prior: str, num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "LARGEST_CHECKED_ON_CPU", 0)
    condition = {"condition": "label", "num_classes": num_classes} if num_classes else {}
    config = Experiment.from_dict({"model": {"prior": {"name": prior}, **condition}})
    model = preflight.checked_model(config, IMAGE, num_training=9).model
    assert all(parameter.is_meta for parameter in model.parameters())
