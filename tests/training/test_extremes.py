"""Large values: lr 1, images of one colour, a single image, 1 and 4,096 latent dimensions, images of 8x8 to 128x96.

Five steps of every network: nothing is NaN or infinite, and no rate is negative beyond rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.small import ALONE, CPU, SEED
from tests.training.test_any_vae import SMALL
from vae_ray import Experiment
from vae_ray.data.batches import Loader
from vae_ray.data.dataset import Split
from vae_ray.evaluation.elbo import evaluate_split
from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.networks import NETWORKS
from vae_ray.models.priors import PRIORS
from vae_ray.models.vae import build_vae
from vae_ray.objectives import build_objective
from vae_ray.parallel.group import shards_of
from vae_ray.training.loop import EpochSettings, StepSettings, train_epoch
from vae_ray.training.state import TrainState

LR, NUM_STEPS = 1.0, 5
ROUNDING = 1e-3
"""Of a sampled log ratio of 4,096 dimensions in float32, in nats."""


def images(num: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Black, white, grey, and then noise."""
    noise = torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, level in enumerate((0, 255, 128)[:num]):
        noise[number] = level
    return noise


def check_trains(shape: tuple[int, int, int], num_images: int, **sections: Any) -> None:
    config = Experiment.from_dict({"optim": {"lr": LR}, **sections})
    split = Split.in_memory(images(num_images, shape))
    loader = Loader(split, torch.arange(num_images), seed=SEED, shards=shards_of(ALONE))
    model = build_vae(config, shape, seed=5)
    state = TrainState.begin(config, model, build_objective(config.objective, seed=2))
    for epoch in range(1, NUM_STEPS + 1):
        sums = TermSums(state.terms, CPU)
        train_epoch(
            state,
            loader.training(epoch, global_batch_size=num_images),
            ALONE,
            epoch=EpochSettings(seed=SEED, epoch=epoch, num_data=num_images),
            step_settings=lambda index: StepSettings(LR, state.objective.settings(0.0, index)),
            sums=sums,
        )
        terms = sums.reduced(ALONE).values
        assert all(torch.isfinite(torch.tensor(value)) for value in terms.values()), (epoch, terms)
    assert all(bool(torch.isfinite(each).all()) for each in model.state_dict().values())
    with torch.inference_mode():
        found = evaluate_split(model, loader, "test", ALONE, batch_size=num_images)
    assert all(torch.isfinite(torch.tensor(value)) for value in found.values()), found
    if config.model.prior.name == "standard":  # closed forms
        assert min(value for name, value in found.items() if "rate" in name) >= -ROUNDING, found


@pytest.mark.parametrize("network", sorted({*NETWORKS, "conv ladder"}))
@pytest.mark.parametrize(
    ("shape", "num_images", "latent_dim"),
    [((1, 8, 8), 1, 1), ((3, 16, 12), 4, 4096), ((3, 128, 96), 3, 5)],
    ids=["one image, one dimension", "4096 dimensions", "128x96"],
)
def test_every_network_stays_finite(
    network: str, shape: tuple[int, int, int], num_images: int, latent_dim: int
) -> None:
    settings = {"name": network, **SMALL.get(network, {})}
    check_trains(shape, num_images, model={"network": settings, "latent_dim": latent_dim})


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
@pytest.mark.parametrize("num_images", [1, 3, 5])
def test_every_likelihood_stays_finite_on_images_of_one_colour(likelihood: str, num_images: int) -> None:
    section = {"name": likelihood}
    check_trains((3, 8, 9), num_images, likelihood=section, model={"network": {"name": "mlp", "hidden": [24]}})
    if likelihood in ("gaussian", "laplace"):
        section["sigma"] = "optimal"
        check_trains((3, 8, 9), num_images, likelihood=section, model={"network": {"name": "mlp", "hidden": [24]}})


@pytest.mark.parametrize("prior", sorted(PRIORS))
@pytest.mark.parametrize("latent_dim", [1, 4096])
def test_every_prior_stays_finite(prior: str, latent_dim: int) -> None:
    model = {"network": {"name": "mlp", "hidden": [24]}, "latent_dim": latent_dim, "prior": {"name": prior}}
    check_trains((1, 8, 8), 4, model=model)
