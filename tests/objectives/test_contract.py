"""Contract: what every objective promises, and one that a user brings along."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.training.small import (
    ALONE,
    NETWORKS,
    NUM_IMAGES,
    REFUSED,
    SEED,
    SHAPE,
    batches,
    begin,
    experiment,
    objective_section,
    parameters,
    run_epoch,
)
from vae_ray import Experiment, UserError
from vae_ray.models.noise import latent_noise
from vae_ray.models.vae import build_vae
from vae_ray.objectives import OBJECTIVES, Objective, build_objective
from vae_ray.objectives.base import MODEL, Losses
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.runs.preflight import checked_model


def losses(name: str, network: str, *, num_rows: int = 6) -> tuple[Objective, Losses]:
    config = experiment(model={"network": NETWORKS[network], "latent_dim": 2}, objective=objective_section(name))
    objective, model = build_objective(config.objective), build_vae(config, SHAPE, seed=1).double()
    x = torch.rand(num_rows, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = slice(0, num_rows)
    k = objective.num_samples
    output = model(x, latent_noise(model.latent_shapes, rows, SEED, "test", num_samples=k), k)
    batch = GlobalBatch(num_rows, rows, NUM_IMAGES, ALONE)
    return objective, objective.losses(output, x, model.likelihood, objective.settings(1.5, 3), batch)


PAIRS = [pair for pair in itertools.product(sorted(OBJECTIVES), sorted(NETWORKS)) if pair not in REFUSED]


@pytest.mark.parametrize(("name", "network"), PAIRS)
def test_terms_by_row_have_the_loss_as_their_sum(name: str, network: str) -> None:
    objective, given = losses(name, network)
    assert set(given.terms) == {"loss", "distortion", "rate", *objective.terms}
    assert all(term.shape == (6,) for term in given.terms.values())
    torch.testing.assert_close(given.terms["loss"].sum(), given.loss[MODEL], rtol=1e-12, atol=0)
    assert bool((given.terms["rate"] > 0).all())


LAST_BATCHES = [objective_section(name) for name in sorted(OBJECTIVES)]
LAST_BATCHES += [{"name": "beta_tc", "estimator": "weighted"}, {"name": "dip", "variant": "I"}]


@pytest.mark.parametrize("section", LAST_BATCHES, ids=str)
def test_a_last_batch_of_one_image_trains_as_any_other(section: dict[str, object]) -> None:
    state = begin(experiment(objective=section))
    before = parameters(state.model)
    (*_, last) = given = list(batches(global_batch_size=NUM_IMAGES - 1))
    assert len(last.x) == 1
    assert all(torch.isfinite(torch.tensor([*run_epoch(state, data=given).values()])))
    after = parameters(state.model)
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_objective_that_compares_images_refuses_batches_of_one(name: str) -> None:
    config = experiment(objective=objective_section(name), training={"global_batch_size": 1})
    if build_objective(config.objective).min_images == 1:
        checked_model(config, SHAPE, num_training=NUM_IMAGES)
        return
    assert name in ("beta_tc", "dip", "mmd")
    line = rf"^training\.global_batch_size: got 1, but {name} compares the images of a batch, should be at least 2; for"
    with pytest.raises(UserError, match=line):
        checked_model(config, SHAPE, num_training=NUM_IMAGES)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_settings_are_finite_numbers_from_the_first_step_on(name: str) -> None:
    objective = build_objective(Experiment.from_dict({"objective": objective_section(name)}).objective)
    first, last = objective.settings(0.0, 0), objective.settings(1e6, 10**9)
    assert set(first) == set(last)
    assert all(isinstance(value, float) and value >= 0 for value in (*first.values(), *last.values()))


class Critic(Objective):
    """An objective with weights of its own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.critic = nn.Linear(2, width)


@pytest.fixture
def users_module() -> Iterator[str]:
    module = types.ModuleType("users_objectives")
    module.Critic, module.not_one = Critic, lambda: nn.Linear(2, 3)  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module.__name__
    del sys.modules[module.__name__]


def users_weights(name: str, seed: int) -> Tensor:
    config = Experiment.from_dict({"objective": {"name": name, "width": 5}}).objective
    objective = build_objective(config, seed=seed)
    assert isinstance(objective, Critic)
    return objective.critic.weight.detach()


def test_weights_of_a_users_objective_are_a_function_of_the_seed_as_on_every_worker(users_module: str) -> None:
    weights = []
    for global_seed, seed in ((1, 7), (2, 7), (3, 8)):
        torch.manual_seed(global_seed)
        weights.append(users_weights(f"{users_module}:Critic", seed))
        drawn = torch.rand(3)
        torch.manual_seed(global_seed)
        assert torch.equal(torch.rand(3), drawn)
    assert weights[0].shape == (5, 2)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_function_that_returns_no_objective_is_refused(users_module: str) -> None:
    config = Experiment.from_dict({"objective": {"name": f"{users_module}:not_one"}}).objective
    with pytest.raises(UserError, match=r"objective: users_objectives:not_one returned a Linear, should return a"):
        build_objective(config)
