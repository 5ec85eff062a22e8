"""Truth: DIP's penalties against torch.cov."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vae_ray import UserError
from vae_ray.models.latents import DiagonalGaussian, Group, StandardNormal
from vae_ray.models.likelihoods.bernoulli import Bernoulli
from vae_ray.models.vae import Output
from vae_ray.objectives.dip import Dip, covariance_penalties
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import SingleProcess


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(covariance: Tensor) -> tuple[float, float]:
    """Sums over pairs and over dimensions, written out."""
    d = len(covariance)
    pairs = sum(float(covariance[i, j]) ** 2 for i in range(d) for j in range(d) if i != j)
    return pairs, sum((float(covariance[i, i]) - 1) ** 2 for i in range(d))


@pytest.mark.parametrize("variant", ["I", "II"])
def test_loss_weighs_the_penalties_of_the_covariance_over_the_batch(variant: str) -> None:
    q = DiagonalGaussian(normal(7, 3, seed=1) @ normal(3, 3, seed=2) + 5, normal(7, 3, seed=3))
    covariance = torch.cov(q.mean.T, correction=0)
    if variant == "II":  # Cov[z] = Cov[E[z|x]] + E[Cov[z|x]]
        covariance = covariance + torch.diag(q.logvar.exp().mean(0))
    off_diagonal, diagonal = expected(covariance)
    objective = Dip(variant=variant, beta=0.5, off_diagonal=3.0, diagonal=0.25)
    z = q.rsample(normal(7, 3, seed=4))
    params = x = torch.zeros(7, 1, 2, 3, dtype=torch.float64)
    batch = GlobalBatch(7, slice(0, 7), 50, SingleProcess(torch.device("cpu")))
    output = Output(params, (Group(z, q, StandardNormal(torch.zeros_like(z))),), 1)
    losses = objective.losses(output, x, Bernoulli(), objective.settings(0.0, 0), batch)
    assert float(losses.terms["off_diagonal"][0]) == pytest.approx(off_diagonal, rel=1e-12)
    assert float(losses.terms["diagonal"][0]) == pytest.approx(diagonal, rel=1e-12)
    mean_loss = losses.terms["distortion"] + 0.5 * losses.terms["rate"] + 3 * off_diagonal + 0.25 * diagonal
    torch.testing.assert_close(losses.terms["loss"], mean_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.loss["model"], mean_loss.sum(), rtol=1e-12, atol=0)


def test_penalties_of_codes_from_the_prior_vanish_with_the_number_of_images() -> None:
    """A covariance of n images differs from I by terms of variance 1 / n, and on the diagonal 2 / n."""
    n, d = 40_000, 4
    mean, variance = 0.8 * normal(n, d, seed=1), torch.full((n, d), 0.36, dtype=torch.float64)
    off_diagonal, diagonal = covariance_penalties(mean, variance)
    assert float(off_diagonal) < 5 * d * (d - 1) / n
    assert float(diagonal) < 5 * 2 * d / n


def test_a_prior_other_than_the_standard_normal_is_refused() -> None:
    q = DiagonalGaussian(normal(4, 3, seed=1), normal(4, 3, seed=2))
    batch = GlobalBatch(4, slice(0, 4), 50, SingleProcess(torch.device("cpu")))
    x = torch.zeros(4, 1, 2, 3, dtype=torch.float64)
    with pytest.raises(
        UserError,
        match=r"^objective: got dip, which needs the prior N\(0, I\), not a Diag\w+: its covariances .*standard$",
    ):
        Dip().losses(Output(x, (Group(q.mean, q, q),), 1), x, Bernoulli(), {"beta": 1.0}, batch)
