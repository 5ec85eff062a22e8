"""Truth: the terms of the bound, and the bound itself on a linear-Gaussian model whose log p(x) is known."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from vae_ray import Experiment, UserError
from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.latents import DiagonalGaussian, Group, StandardNormal
from vae_ray.models.likelihoods import Gaussian, Likelihood
from vae_ray.models.vae import Output
from vae_ray.objectives import build_objective
from vae_ray.objectives.base import Losses, elbo_terms
from vae_ray.objectives.elbo import Elbo, distance_from, rates, with_free_bits
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import SingleProcess

CPU = torch.device("cpu")
DISTORTION = torch.tensor([1.0, 2.0, 3.5])
RATE = torch.tensor([10.0, 20.0, 40.0])


class KnownLikelihood(Likelihood):
    """log p(x|z) is minus the only parameter of the only pixel."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -params.flatten()


class KnownRate(DiagonalGaussian):
    """A posterior whose rate is its mean."""

    def kl(self, prior: object) -> Tensor:
        return self.mean


def known_losses(
    objective: Elbo, beta: float, *, num_samples: int = 1, settings: dict[str, float] | None = None
) -> Losses:
    """The losses of three images with the terms above; further samples have twice the distortion of the first."""
    factors = torch.arange(1.0, num_samples + 1)[:, None]
    params = (factors * DISTORTION).reshape(-1, 1, 1, 1)
    mean = RATE.repeat(num_samples)[:, None]
    group = Group(mean, KnownRate(mean, mean), StandardNormal(torch.zeros_like(mean)))
    batch = GlobalBatch(3, slice(0, 3), 3, SingleProcess(CPU))
    output = Output(params, (group,), num_samples)
    return objective.losses(output, torch.zeros(3, 1, 1, 1), KnownLikelihood(), settings or {"beta": beta}, batch)


@pytest.mark.parametrize(("beta", "loss"), [(0.0, 6.5), (0.5, 41.5), (1.0, 76.5), (4.0, 286.5)])
def test_loss_is_distortion_plus_beta_times_rate_summed_over_the_batch(beta: float, loss: float) -> None:
    losses = known_losses(Elbo(), beta)
    assert float(losses.loss["model"]) == loss
    assert torch.equal(losses.terms["loss"], DISTORTION + beta * RATE)


def test_nelbo_does_not_depend_on_beta_and_the_loss_does() -> None:
    means = {}
    for beta in (0.0, 1.0, 4.0):
        sums = TermSums(("loss", "distortion", "rate"), CPU)
        sums.add(known_losses(Elbo(), beta).terms)
        means[beta] = sums.means()
    assert {values["nelbo"] for values in means.values()} == {76.5 / 3}
    assert [values["loss"] for values in means.values()] == [6.5 / 3, 76.5 / 3, 286.5 / 3]


def test_terms_are_means_over_samples_of_each_image() -> None:
    losses = known_losses(Elbo(), 0.5, num_samples=3)
    torch.testing.assert_close(losses.terms["distortion"], 2 * DISTORTION)
    torch.testing.assert_close(losses.terms["rate"], RATE)


@pytest.mark.parametrize(("epochs", "beta"), [(0.0, 0.0), (1.0, 0.75), (3.9, 2.925), (4.0, 3.0), (100.0, 3.0)])
def test_beta_rises_linearly_over_the_epochs_of_its_schedule(epochs: float, beta: float) -> None:
    section = {"name": "elbo", "beta": 3.0, "beta_schedule": {"name": "linear", "epochs": 4}}
    objective = build_objective(Experiment.from_dict({"objective": section}).objective)
    assert objective.settings(epochs, 0) == {"beta": pytest.approx(beta, rel=1e-15)}
    assert Elbo(beta=3.0).settings(epochs, 0) == {"beta": 3.0}


class LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I): probabilistic PCA (Tipping & Bishop 1999).

    The columns of W are orthogonal, so that the posterior is a diagonal Gaussian. W is small, so that W z + b
    stays inside (0, 1) and our Gaussian, whose mean is sigmoid(logits), is exactly this p(x|z).
    """

    num_pixels, latent_dim, scale = 6, 2, 0.1
    image_shape = (1, 2, 3)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        columns = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64)).Q
        self.weight = columns * torch.tensor([0.08, 0.05], dtype=torch.float64)
        self.offset = 0.4 + 0.2 * torch.rand(6, generator=generator, dtype=torch.float64)
        z = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        noise = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        self.x = z @ self.weight.T + self.offset + self.scale * noise

    def log_evidence(self) -> Tensor:
        covariance = self.weight @ self.weight.T + self.scale**2 * torch.eye(6, dtype=torch.float64)
        return MultivariateNormal(self.offset, covariance).log_prob(self.x)

    def exact_posterior(self) -> DiagonalGaussian:
        # Sigma = (I + W'W / s^2)^-1, diagonal here; mu = Sigma W'(x - b) / s^2
        variance = 1 / (1 + (self.weight**2).sum(0) / self.scale**2)
        mu = variance * ((self.x - self.offset) @ self.weight) / self.scale**2
        return DiagonalGaussian(mu, variance.log().expand_as(mu))

    def bound(self, posterior: DiagonalGaussian) -> Tensor:
        """The ELBO of each x, exact: log p(x|z) is quadratic in z, so 2k sigma points give its expectation."""
        k = self.latent_dim
        nodes = k**0.5 * torch.cat([torch.eye(k, dtype=torch.float64), -torch.eye(k, dtype=torch.float64)])
        totals = []
        for eps in nodes:
            z = posterior.rsample(eps.expand_as(posterior.mean))
            totals.append(self.elbo(posterior, z, self.x))
        return torch.stack(totals).mean(0)

    def elbo(self, posterior: DiagonalGaussian, z: Tensor, x: Tensor) -> Tensor:
        """One sample's ELBO of each x."""
        logits = torch.logit(z @ self.weight.T + self.offset).reshape(-1, *self.image_shape)
        group = Group(z, posterior, StandardNormal(torch.zeros_like(z)))
        images = x.reshape(-1, *self.image_shape)
        distortion, rate = elbo_terms(Output(logits, (group,), 1), images, Gaussian(self.scale))
        return -(distortion[0] + rate[0])


def test_bound_of_the_exact_posterior_is_log_p_of_x() -> None:
    model = LinearGaussian()
    # the round trip logit -> sigmoid costs a few float64 roundings per pixel, times 1 / s^2 = 100
    torch.testing.assert_close(model.bound(model.exact_posterior()), model.log_evidence(), rtol=0, atol=1e-11)


def test_single_samples_of_the_exact_posterior_give_log_p_of_x_on_average() -> None:
    model, n = LinearGaussian(), 20_000
    exact = model.exact_posterior()
    x = model.x[:1].expand(n, -1)
    posterior = DiagonalGaussian(exact.mean[:1].expand(n, -1), exact.logvar[:1].expand(n, -1))
    eps = torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    elbo = model.elbo(posterior, posterior.rsample(eps), x)
    assert abs(float(elbo.mean() - model.log_evidence()[0])) < 5 * float(elbo.std()) / n**0.5


shift = st.floats(-1.5, 1.5)


@given(shift, shift, shift, shift)
def test_bound_lies_below_log_p_of_x_by_the_kl_to_the_exact_posterior(a: float, b: float, c: float, d: float) -> None:
    model = LinearGaussian()
    exact = model.exact_posterior()
    other = DiagonalGaussian(exact.mean + torch.tensor([a, b]), exact.logvar + torch.tensor([c, d]))
    gap = model.log_evidence() - model.bound(other)
    expected = kl_divergence(*(Independent(Normal(q.mean, (0.5 * q.logvar).exp()), 1) for q in (other, exact)))
    assert bool((gap > -1e-10).all())
    torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-10)


# --- capacity and free bits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "mean_loss"), [(20.0, 6.5 / 3 + 2 * (70 / 3 - 20)), (30.0, 6.5 / 3 + 2 * (30 - 70 / 3))]
)
def test_capacity_counts_the_distance_of_the_mean_rate_and_not_the_mean_distance(
    capacity: float, mean_loss: float
) -> None:
    """The rates 10, 20 and 40 have the mean 70/3, and mean distances of 10 and 46/3 or so from 20 and 30."""
    objective = Elbo(beta=2.0, capacity=capacity)
    losses = known_losses(objective, 2.0, settings=objective.settings(0.0, 0))
    assert float(losses.loss["model"]) / 3 == pytest.approx(mean_loss, rel=1e-6)
    assert torch.equal(losses.terms["rate"], RATE)


@pytest.mark.parametrize(("free", "counted"), [(23.0, 70 / 3), (24.0, 24.0)])
def test_free_bits_are_of_the_mean_over_the_batch_and_not_of_each_image(free: float, counted: float) -> None:
    losses = known_losses(Elbo(free_bits=free), 1.0)
    assert float(losses.loss["model"]) / 3 == pytest.approx(6.5 / 3 + counted, rel=1e-6)
    assert torch.equal(losses.terms["rate"], RATE)


def two_groups() -> tuple[Output, dict[str, Tensor]]:
    """A spatial top group of 2 channels and a flat one of 3, and their rates by name."""
    generator = torch.Generator().manual_seed(3)

    def group(*shape: int) -> Group:
        mean, logvar = (torch.randn(4, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return Group(mean, DiagonalGaussian(mean, logvar), StandardNormal(torch.zeros_like(mean)))

    top, low = group(2, 3, 5), group(3)
    by_group = torch.stack([top.rate(), low.rate()], dim=1)
    elementwise = [kl_divergence(Normal(g.z, g.posterior.sigma), Normal(0.0, 1.0)) for g in (top, low)]  # type: ignore[union-attr]
    by_dimension = torch.cat([elementwise[0].sum((2, 3)), elementwise[1]], dim=1)
    return Output(torch.zeros(4, 1, 1, 1), (top, low), 1), {"group": by_group, "dimension": by_dimension}


@pytest.mark.parametrize(("per", "num"), [("group", 2), ("dimension", 5)])
def test_free_bits_per_group_or_dimension_where_a_channel_is_a_dimension(
    per: Literal["group", "dimension"], num: int
) -> None:
    output, expected = two_groups()
    found = rates(output, per)
    assert found.shape == (4, num)
    torch.testing.assert_close(found, expected[per], rtol=1e-12, atol=0)
    batch = GlobalBatch(4, slice(0, 4), 9, SingleProcess(CPU))
    free = float(expected[per].mean(0).median())
    counted = with_free_bits(found, free, batch).mean()
    torch.testing.assert_close(counted, expected[per].mean(0).clamp_min(free).sum(), rtol=1e-12, atol=0)


def test_what_is_below_its_free_bits_has_no_gradient() -> None:
    """Also the 4 of a column whose mean is 3; and all of the second column has it, also its 2."""
    values = torch.tensor([[4.0, 2.0], [1.0, 7.0]], requires_grad=True)
    batch = GlobalBatch(2, slice(0, 2), 9, SingleProcess(CPU))
    (gradient,) = torch.autograd.grad(with_free_bits(values, 3.0, batch).sum(), values)
    assert torch.equal(gradient, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


@pytest.mark.parametrize(("capacity", "expected"), [(2.5, 1.0), (3.0, 0.0), (3.5, -1.0)])
def test_the_rate_is_pulled_to_the_capacity_from_both_sides(capacity: float, expected: float) -> None:
    rate = torch.tensor([1.0, 5.0], requires_grad=True)
    batch = GlobalBatch(2, slice(0, 2), 9, SingleProcess(CPU))
    (gradient,) = torch.autograd.grad(distance_from(capacity, rate, batch).sum(), rate)
    assert torch.equal(gradient, torch.full((2,), expected))


def test_free_bits_per_dimension_need_a_closed_form() -> None:
    class Other(StandardNormal):
        pass

    class Unknown(DiagonalGaussian):
        def kl(self, prior: object) -> None:
            return None

    z = torch.zeros(2, 3)
    output = Output(torch.zeros(2, 1, 1, 1), (Group(z, Unknown(z, z), Other(z)),), 1)
    assert rates(output, "group").shape == (2, 1)
    with pytest.raises(
        UserError, match=r"^objective\.free_bits_per: got 'dimension', .*--objective\.free-bits-per group"
    ):
        rates(output, "dimension")


def test_capacity_and_free_bits_together_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^objective\.free_bits: got 1\.0, should be 0 where objective\.capacity is given"
    ):
        Experiment.from_dict({"objective": {"name": "elbo", "capacity": 3.0, "free_bits": 1.0}})
