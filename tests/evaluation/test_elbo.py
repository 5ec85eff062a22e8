"""Truth: evaluation is the exact mean over all images, for any batch size and any number of workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from tests.thread_workers import results_on_threads
from tests.training.small import ALONE, CPU, NETWORKS, NUM_IMAGES, SEED, SHAPE, experiment, parameters, pixels
from vae_ray.data.batches import Loader
from vae_ray.data.dataset import Split
from vae_ray.evaluation.elbo import evaluate_split
from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.noise import latent_noise
from vae_ray.models.vae import VAE, build_vae
from vae_ray.parallel.group import WorkerGroup, shards_of

TERMS = ("loss", "distortion", "rate")


def build(network: str = "mlp") -> VAE:
    return build_vae(experiment(model={"network": NETWORKS[network], "latent_dim": 2}), SHAPE, seed=5)


def evaluated(
    model: VAE, group: WorkerGroup = ALONE, *, batch_size: int = 9, num_repeats: int = 4, seed: int = SEED
) -> dict[str, float]:
    """The metrics of 92 images, which are more than a block of noise."""
    loader = Loader(
        Split.in_memory(pixels()), torch.arange(NUM_IMAGES).repeat(num_repeats), seed=seed, shards=shards_of(group)
    )
    return evaluate_split(model, loader, "test", group, batch_size=batch_size)


def test_evaluation_is_the_mean_over_all_images_written_out() -> None:
    model = build()
    x = pixels().float() / 255
    with torch.no_grad():
        output = model(x, latent_noise(((2,),), slice(0, NUM_IMAGES), SEED, "evaluation noise"))
    distortion = float(F.binary_cross_entropy_with_logits(output.params, x, reduction="sum")) / NUM_IMAGES
    posterior = output.groups[0].posterior
    rate = float(kl_divergence(Normal(posterior.mean, posterior.sigma), Normal(0.0, 1.0)).sum()) / NUM_IMAGES
    expected = {"test/nelbo": distortion + rate, "test/distortion": distortion, "test/rate": rate}
    assert evaluated(model, num_repeats=1) == pytest.approx(expected, rel=1e-6)  # float32 sums


@pytest.mark.parametrize("network", ["ladder", "conv ladder"])
def test_rates_of_the_groups_add_up_to_the_rate(network: str) -> None:
    model, x = build(network), pixels().float() / 255
    with torch.no_grad():
        noise = latent_noise(model.latent_shapes, slice(0, NUM_IMAGES), SEED, "evaluation noise")
        groups = model(x, noise).groups
    found = evaluated(model, num_repeats=1)
    by_group = [found[f"test/rate_group_{number}"] for number in range(1, len(groups) + 1)]
    assert by_group == pytest.approx([float(group.rate().mean()) for group in groups], rel=1e-5)  # float32 sums
    assert sum(by_group) == pytest.approx(found["test/rate"], rel=1e-6)


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("batch_size", [1, 7, 92, 1000])
def test_evaluation_does_not_depend_on_the_batch_size(network: str, batch_size: int) -> None:
    model = build(network)
    assert evaluated(model, batch_size=batch_size) == pytest.approx(evaluated(model), rel=1e-6)  # float32 sums


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("size", [2, 3, 6])
def test_evaluation_is_the_same_for_any_number_of_workers(network: str, size: int) -> None:
    models = [build(network) for _ in range(size + 1)]
    expected = evaluated(models[size])
    results = results_on_threads(size, lambda group: evaluated(models[group.rank], group))
    assert results == [results[0]] * size
    assert results[0] == pytest.approx(expected, rel=1e-6)  # float32 sums in another order


def test_another_seed_evaluates_with_other_noise() -> None:
    model = build()
    assert evaluated(model, seed=2)["test/distortion"] != evaluated(model)["test/distortion"]
    assert evaluated(model, seed=2)["test/rate"] == evaluated(model)["test/rate"]


def test_evaluation_leaves_weights_and_gradients_alone() -> None:
    model = build()
    before = parameters(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    evaluated(model)
    assert torch.equal(parameters(model), before)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


# --- sums of terms --------------------------------------------------------------------------------------


def terms(distortion: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": 6 * distortion, "distortion": distortion, "rate": 10 * distortion}


def test_metrics_are_means_over_examples_and_not_over_shards() -> None:
    distortion = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    parts = [slice(0, 1), slice(1, 6), slice(6, 6)]  # unequal, and one empty

    def run(group: Any) -> dict[str, float]:
        sums = TermSums(TERMS, CPU)
        sums.add(terms(distortion[parts[group.rank]]))
        return sums.reduced(group).values

    expected = {"loss": 6 * 10.5, "nelbo": 11 * 10.5, "distortion": 10.5, "rate": 105.0}
    assert results_on_threads(3, run) == [expected] * 3


@pytest.mark.parametrize("size_after", [1, 2, 3])
def test_sums_continue_from_a_checkpoint_on_any_number_of_workers(size_after: int) -> None:
    def first(group: Any) -> torch.Tensor:
        sums = TermSums(TERMS, CPU)
        sums.add(terms(torch.full((group.rank + 1,), 2.0 + group.rank)))  # 2, 3, 3
        return sums.gathered(group)

    saved = results_on_threads(2, first)
    assert torch.equal(saved[0], saved[1])

    def second(group: Any) -> dict[str, float]:
        sums = TermSums(TERMS, CPU)
        sums.restore(saved[0], group)
        if group.rank == 0:
            sums.add(terms(torch.tensor([8.0])))
        return sums.reduced(group).values

    for means in results_on_threads(size_after, second):
        assert means == {"loss": 24.0, "nelbo": 44.0, "distortion": 4.0, "rate": 40.0}


def test_sums_of_many_batches_do_not_drift() -> None:
    sums = TermSums(TERMS, CPU)
    for _ in range(2000):
        sums.add(terms(torch.full((1000,), 100.1)))
    # a float32 sum over 1000 equal values is off by 1e-7 at most; adding up 2000 of them must not add to it
    assert sums.means()["distortion"] == pytest.approx(100.1, rel=5e-7)
    assert sums.means()["nelbo"] == pytest.approx(1101.1, rel=5e-7)
