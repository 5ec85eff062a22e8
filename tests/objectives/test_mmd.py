"""Truth: MMD² against its definition, and what it is for samples of the prior."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vae_ray import UserError
from vae_ray.models.latents import DiagonalGaussian, Group, StandardNormal
from vae_ray.models.likelihoods import Bernoulli
from vae_ray.models.vae import Output
from vae_ray.objectives.mmd import Mmd, mmd_squared, squared_distances
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import SingleProcess


def normal(num: int, d: int, *, seed: int) -> Tensor:
    return torch.randn(num, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """k(a, b) of all pairs of rows, written out."""
    return torch.exp(-(a[:, None] - b[None]).square().sum(2) / (2 * a.shape[1]))


@pytest.mark.parametrize("d", [1, 2, 5])
def test_mmd_is_its_definition_with_samples_of_the_prior(d: int) -> None:
    """The closed forms of two expectations against means over 20,000 samples."""
    z, n = 0.5 * normal(7, d, seed=1) + 1, 20_000
    prior, other = normal(n, d, seed=2), normal(n, d, seed=3)
    against = kernel(z, prior).mean(0)
    between = torch.exp(-(prior - other).square().sum(1) / (2 * d))
    expected = kernel(z, z).mean() - 2 * against.mean() + between.mean()
    standard_error = (2 * against.std() + between.std()) / n**0.5
    assert abs(float(mmd_squared(z) - expected)) < 5 * float(standard_error)
    assert float(mmd_squared(z)) > 0.02  # z is not from the prior: far more than the tolerance


@pytest.mark.parametrize("d", [1, 2, 8])
def test_mmd_of_many_samples_of_the_prior_is_the_bias_alone(d: int) -> None:
    """Each row beside itself adds (1 - E k) / B on average, with a spread of about the same size."""
    z = normal(2000, d, seed=4)
    bias = (1 - (d / (d + 2)) ** (d / 2)) / len(z)
    assert 0 <= float(mmd_squared(z)) < 10 * bias
    assert float(mmd_squared(z + 0.5)) > 20 * bias
    assert float(mmd_squared(0.3 * z)) > 20 * bias


def test_distances_are_those_of_all_pairs() -> None:
    z = normal(5, 3, seed=5)
    torch.testing.assert_close(squared_distances(z), torch.cdist(z, z).square(), rtol=1e-12, atol=1e-12)
    assert float(squared_distances(1e4 + z).min()) >= 0  # also where rounding takes more than the distance


def losses_of(z: Tensor, prior: object, *, weight: float = 10.0) -> tuple[Tensor, dict[str, Tensor]]:
    group = Group(z, DiagonalGaussian(z, torch.zeros_like(z)), prior)
    params, x = torch.zeros(len(z), 1, 2, 3, dtype=z.dtype), torch.zeros(len(z), 1, 2, 3, dtype=z.dtype)
    objective = Mmd(beta=0.5, weight=weight)
    batch = GlobalBatch(len(z), slice(0, len(z)), 99, SingleProcess(torch.device("cpu")))
    losses = objective.losses(Output(params, (group,), 1), x, Bernoulli(), objective.settings(3.0, 0), batch)
    return losses.loss["model"], losses.terms


def test_loss_counts_the_mmd_of_the_global_batch_once_for_each_image() -> None:
    z = normal(4, 3, seed=6)
    loss, terms = losses_of(z, StandardNormal(torch.zeros_like(z)))
    assert torch.equal(terms["mmd"], mmd_squared(z).expand(4))
    expected = terms["distortion"] + 0.5 * terms["rate"] + 10.0 * mmd_squared(z)
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(loss, expected.sum())


def test_a_prior_without_the_closed_form_is_refused() -> None:
    z = normal(4, 3, seed=6)
    with pytest.raises(
        UserError, match=r"^objective: got mmd, which needs the prior N\(0, I\), not a Diag.*: its closed .*standard$"
    ):
        losses_of(z, DiagonalGaussian(z, z))
