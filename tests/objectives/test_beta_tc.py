"""Truth: the weights of the minibatch estimates by enumeration, and the parts of the rate in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, Normal
from torch.distributions.categorical import Categorical

from vae_ray.models.latents import DiagonalGaussian, Group, StandardNormal
from vae_ray.models.likelihoods.bernoulli import Bernoulli
from vae_ray.models.vae import Output
from vae_ray.objectives.base import Losses, Objective
from vae_ray.objectives.beta_tc import LOG_WEIGHTS, BetaTc, aggregate_log_probs, log_weights_stratified
from vae_ray.objectives.elbo import Elbo
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import SingleProcess


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posteriors(num: int, d: int, *, seed: int = 1) -> DiagonalGaussian:
    return DiagonalGaussian(normal(num, d, seed=seed), 0.5 * normal(num, d, seed=seed + 1) - 1)


def mixture(q: DiagonalGaussian, weights: Tensor) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(weights), Independent(Normal(q.mean, q.sigma), 1))


def losses_of(objective: Objective, q: DiagonalGaussian, z: Tensor, *, num_data: int) -> Losses:
    num = len(z)
    group = Group(z, q, StandardNormal(torch.zeros_like(z)))
    params = x = torch.zeros(num, 1, 2, 3, dtype=torch.float64)
    batch = GlobalBatch(num, slice(0, num), num_data, SingleProcess(torch.device("cpu")))
    likelihood = Bernoulli()
    return objective.losses(Output(params, (group,), 1), x, likelihood, objective.settings(0.0, 0), batch)


@pytest.mark.parametrize(("batch_size", "num_data"), [(1, 9), (2, 9), (5, 9), (9, 9), (64, 50_000)])
def test_rows_of_stratified_weights_sum_to_one_with_1_over_n_on_the_diagonal(batch_size: int, num_data: int) -> None:
    weights = log_weights_stratified(batch_size, num_data).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(batch_size, dtype=torch.float64), rtol=1e-14, atol=0)
    if batch_size > 1:
        torch.testing.assert_close(weights.diagonal() * num_data, torch.ones(batch_size, dtype=torch.float64))
    if batch_size == num_data:  # the whole data set: the mean of all posteriors
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / num_data), rtol=1e-14, atol=0)


def test_stratified_weights_are_the_paper_s_averaged_over_which_image_is_its_last() -> None:
    """f(z, n*) = q(z|n*) / N + 1/M sum_{m < M} q(z|n_m) + (N - M) / (N M) q(z|n_M), for M other images (C.2)."""
    batch_size, num_data, row = 5, 11, 3
    m = batch_size - 1
    rows = []
    for last in set(range(batch_size)) - {row}:
        paper = torch.full((batch_size,), 1 / m, dtype=torch.float64)
        paper[row], paper[last] = 1 / num_data, (num_data - m) / (num_data * m)
        rows.append(paper)
    expected = torch.stack(rows).mean(0)
    torch.testing.assert_close(log_weights_stratified(batch_size, num_data)[row].exp(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("batch_size", [2, 3, 6])
def test_the_stratified_estimate_of_the_aggregate_posterior_is_unbiased(batch_size: int) -> None:
    """Its mean over all batches that contain an image is q(z) of all seven; the weighted one's is not."""
    num_data, q = 7, posteriors(7, 2)
    z = normal(num_data, 2, seed=9)
    batches = [batch for batch in itertools.combinations(range(num_data), batch_size) if 0 in batch]
    found = {}
    for name, log_weights in LOG_WEIGHTS.items():
        estimates = []
        for batch in batches:
            of_batch = DiagonalGaussian(q.mean[list(batch)], q.logvar[list(batch)])
            log_joint, _ = aggregate_log_probs(z[list(batch)], of_batch, log_weights(batch_size, num_data))
            estimates.append(log_joint[0].exp())  # image 0 is the first of each
        found[name] = float(torch.stack(estimates).mean())
    exact = float(mixture(q, torch.ones(num_data).double()).log_prob(z[0]).exp())
    assert found["stratified"] == pytest.approx(exact, rel=1e-12)
    assert found["weighted"] < exact / num_data * 3


@pytest.mark.parametrize("num_data", [6, 41])
@pytest.mark.parametrize("estimator", sorted(LOG_WEIGHTS))
def test_log_probabilities_are_those_of_a_mixture_of_the_batch_for_each_row(estimator: str, num_data: int) -> None:
    """Of all six images where there are no others; `Categorical` divides weights by their sum."""
    q, z = posteriors(6, 3), normal(6, 3, seed=7)
    log_weights = LOG_WEIGHTS[estimator](6, num_data)
    log_joint, log_product = aggregate_log_probs(z, q, log_weights)
    total = 0.0 if estimator == "stratified" else -math.log(num_data)
    for row, weights in enumerate(log_weights.exp()):
        joint = mixture(q, weights).log_prob(z[row])
        marginals = [
            mixture(DiagonalGaussian(q.mean[:, [j]], q.logvar[:, [j]]), weights).log_prob(z[row, [j]]) for j in range(3)
        ]
        assert float(log_joint[row]) == pytest.approx(float(joint) + total, rel=1e-12)
        assert float(log_product[row]) == pytest.approx(float(sum(marginals)) + 3 * total, rel=1e-12)


@pytest.mark.parametrize("estimator", sorted(LOG_WEIGHTS))
def test_weights_of_one_are_the_elbo(estimator: str) -> None:
    q, noise = posteriors(5, 3), normal(5, 3, seed=7)
    ours = losses_of(BetaTc(beta=1.0, estimator=estimator), q, q.rsample(noise), num_data=40)
    elbo = losses_of(Elbo(), q, q.rsample(noise), num_data=40)
    torch.testing.assert_close(ours.terms["loss"], elbo.terms["loss"], rtol=1e-13, atol=0)


def test_parts_add_up_to_the_log_ratio_and_the_loss_weighs_them() -> None:
    q = posteriors(5, 3)
    z = q.rsample(normal(5, 3, seed=7))
    losses = losses_of(BetaTc(alpha=0.25, beta=3.0, gamma=1.75), q, z, num_data=40)
    parts = [losses.terms[name] for name in BetaTc.terms]
    log_ratio = q.log_prob(z) - StandardNormal(z).log_prob(z)
    torch.testing.assert_close(sum(parts), log_ratio, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]
    mutual_information, total_correlation, dimension_kl = (part.sum() for part in parts)
    expected = losses.terms["distortion"].sum() + losses.terms["rate"].sum()
    expected = expected - 0.75 * mutual_information + 2.0 * total_correlation + 0.75 * dimension_kl
    torch.testing.assert_close(losses.loss["model"], expected, rtol=1e-12, atol=0)


CORRELATION = torch.tensor([[1.0, 0.9, -0.6], [0.9, 1.2, -0.3], [-0.6, -0.3, 0.8]], dtype=torch.float64)
NOISE_VARIANCE = 0.2


def gaussian_codes(num: int, *, seed: int) -> tuple[DiagonalGaussian, Tensor]:
    """Posteriors N(m_n, 0.2) whose means are correlated: their aggregate is N(0, S) with S of `total_correlation`."""
    means = normal(num, 3, seed=seed) @ torch.linalg.cholesky(CORRELATION).T
    q = DiagonalGaussian(means, torch.full_like(means, math.log(NOISE_VARIANCE)))
    return q, q.rsample(normal(num, 3, seed=seed + 100))


def exact_parts() -> tuple[float, float]:
    """Total correlation 1/2 (sum log S_ii - log det S) and mutual information 1/2 (log det S - d log 0.2)."""
    covariance = CORRELATION + NOISE_VARIANCE * torch.eye(3, dtype=torch.float64)
    log_det = torch.logdet(covariance)
    information = 0.5 * (log_det - 3 * math.log(NOISE_VARIANCE))
    return float(0.5 * (covariance.diagonal().log().sum() - log_det)), float(information)


def estimates(estimator: str, batch_size: int, num_data: int, *, num_batches: int) -> tuple[Tensor, Tensor]:
    """Total correlation and mutual information of each of some batches."""
    rows = []
    for seed in range(num_batches):
        q, z = gaussian_codes(batch_size, seed=1000 + seed)
        terms = losses_of(BetaTc(estimator=estimator), q, z, num_data=num_data).terms
        rows.append([float(terms[name].mean()) for name in ("total_correlation", "mutual_information")])
    total_correlation, mutual_information = torch.tensor(rows, dtype=torch.float64).T
    return total_correlation, mutual_information


def test_estimates_of_a_gaussian_approach_its_closed_form_as_the_batch_grows() -> None:
    """By a batch log q(z) is too low (Jensen), more so of all dimensions than of one.

    So the total correlation is too small and the mutual information too large: here, of 0.53 and 2.14 nats, by 0.28
    and 0.68 with 16 images, by 0.04 and 0.06 with 128; standard errors are 0.03 and 0.05, and 0.015 and 0.025.
    """
    exact = exact_parts()
    assert exact == pytest.approx((0.530, 2.144), abs=1e-3)
    gaps = []
    for batch_size, num_batches in ((16, 200), (128, 40), (1000, 5)):
        found = estimates("stratified", batch_size, 60_000, num_batches=num_batches)
        gaps.append([float(each.mean()) - value for each, value in zip(found, exact, strict=True)])
    assert gaps[0] == pytest.approx([-0.28, 0.68], abs=0.15)
    assert gaps[1] == pytest.approx([-0.04, 0.06], abs=0.06)
    assert gaps[2] == pytest.approx([0.0, 0.0], abs=0.03)


def test_weighted_estimates_are_off_by_logarithms_of_the_number_of_images() -> None:
    """With a batch of all images: log q(z) is low by log N, the information high by that, and TC by (d - 1) log N."""
    num, d = 300, 3
    q, z = gaussian_codes(num, seed=3)
    right, low = (losses_of(BetaTc(estimator=name), q, z, num_data=num).terms for name in ("stratified", "weighted"))
    shifts = {name: float((low[name] - right[name]).mean()) / math.log(num) for name in BetaTc.terms}
    assert shifts == pytest.approx({"mutual_information": 1, "total_correlation": d - 1, "dimension_kl": -d})


@pytest.mark.parametrize("estimator", sorted(LOG_WEIGHTS))
def test_far_and_narrow_posteriors_and_a_batch_of_one_are_finite(estimator: str) -> None:
    for num in (1, 4):
        mean = (1e4 * normal(num, 2, seed=5)).float().requires_grad_()
        logvar = torch.full_like(mean, -19.0).requires_grad_()
        q = DiagonalGaussian(mean, logvar)
        loss = losses_of(BetaTc(estimator=estimator), q, q.rsample(normal(num, 2, seed=6).float()), num_data=50)
        gradients = torch.autograd.grad(loss.loss["model"], [mean, logvar])
        assert all(bool(torch.isfinite(each).all()) for each in (*loss.terms.values(), *gradients))
