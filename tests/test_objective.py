"""Truth: the terms of the bound, and the bound itself on a linear-Gaussian model whose log p(x) is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.latents import DiagonalGaussian
from vae_ray.models.likelihoods import Gaussian
from vae_ray.models.vae import Forward
from vae_ray.objectives.elbo import ElboTerms, beta_weighted_loss, elbo_terms

TERMS = ElboTerms(distortion=torch.tensor([1.0, 2.0, 3.5]), rate=torch.tensor([10.0, 20.0, 40.0]))


@pytest.mark.parametrize(("beta", "loss"), [(0.0, 6.5), (0.5, 41.5), (1.0, 76.5), (4.0, 286.5)])
def test_loss_is_distortion_plus_beta_times_rate_summed_over_the_batch(beta: float, loss: float) -> None:
    assert float(beta_weighted_loss(TERMS, beta)) == loss


def test_nelbo_does_not_depend_on_beta_and_the_loss_does() -> None:
    means = {}
    for beta in (0.0, 1.0, 4.0):
        sums = TermSums(torch.device("cpu"))
        sums.add(TERMS, beta_weighted_loss(TERMS, beta))
        means[beta] = sums.means()
    assert {values["nelbo"] for values in means.values()} == {76.5 / 3}
    assert [values["loss"] for values in means.values()] == [6.5 / 3, 76.5 / 3, 286.5 / 3]


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
            z = posterior.rsample(eps.expand_as(posterior.mu))
            logits = torch.logit(z @ self.weight.T + self.offset).reshape(-1, *self.image_shape)
            forward = Forward(posterior.mu, posterior.logvar, logits)
            terms = elbo_terms(forward, self.x.reshape(-1, *self.image_shape), Gaussian(self.scale))
            totals.append(-(terms.distortion + terms.rate))
        return torch.stack(totals).mean(0)


def test_bound_of_the_exact_posterior_is_log_p_of_x() -> None:
    model = LinearGaussian()
    # the round trip logit -> sigmoid costs a few float64 roundings per pixel, times 1 / s^2 = 100
    torch.testing.assert_close(model.bound(model.exact_posterior()), model.log_evidence(), rtol=0, atol=1e-11)


def test_single_samples_of_the_exact_posterior_give_log_p_of_x_on_average() -> None:
    model, n = LinearGaussian(), 20_000
    exact = model.exact_posterior()
    x = model.x[:1].expand(n, -1)
    posterior = DiagonalGaussian(exact.mu[:1].expand(n, -1), exact.logvar[:1].expand(n, -1))
    eps = torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.logit(posterior.rsample(eps) @ model.weight.T + model.offset).reshape(-1, 1, 2, 3)
    forward = Forward(posterior.mu, posterior.logvar, logits)
    terms = elbo_terms(forward, x.reshape(-1, 1, 2, 3), Gaussian(model.scale))
    elbo = -(terms.distortion + terms.rate)
    assert abs(float(elbo.mean() - model.log_evidence()[0])) < 5 * float(elbo.std()) / n**0.5


shift = st.floats(-1.5, 1.5)


@given(shift, shift, shift, shift)
def test_bound_lies_below_log_p_of_x_by_the_kl_to_the_exact_posterior(a: float, b: float, c: float, d: float) -> None:
    model = LinearGaussian()
    exact = model.exact_posterior()
    other = DiagonalGaussian(exact.mu + torch.tensor([a, b]), exact.logvar + torch.tensor([c, d]))
    gap = model.log_evidence() - model.bound(other)
    expected = kl_divergence(*(Independent(Normal(q.mu, (0.5 * q.logvar).exp()), 1) for q in (other, exact)))
    assert bool((gap > -1e-10).all())
    torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-10)
