"""A small model, its data and an epoch of it in float64, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.thread_workers import results_on_threads
from vae_ray import Experiment
from vae_ray.data.batches import Batch, Loader
from vae_ray.data.dataset import Split
from vae_ray.evaluation.metrics import ELBO_TERMS, TermSums
from vae_ray.models.vae import build_vae
from vae_ray.objectives import Objective, build_objective
from vae_ray.parallel.group import SingleProcess, WorkerGroup, shards_of
from vae_ray.training.loop import EpochSettings, StepSettings, train_epoch
from vae_ray.training.state import TrainState

CPU = torch.device("cpu")
ALONE = SingleProcess(CPU)
SHAPE, NUM_IMAGES, BATCH, BETA, LR, SEED = (2, 3, 5), 23, 5, 0.7, 0.02, 1
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "hidden": [7]},
    "conv": {"name": "conv", "channels": [3, 4], "hidden": [7]},
    "resnet": {"name": "resnet", "channels": [4], "groups": 2, "blocks": 1, "attention": True, "latent": "spatial"},
    "ladder": {"name": "ladder", "hidden": [7, 6], "upper_dims": [3]},
    "conv ladder": {"name": "ladder", "kind": "conv", "channels": [5, 4], "latent_groups": [1, 2]},
}

OBJECTIVE_SETTINGS: dict[str, dict[str, Any]] = {"geco": {"target": 15.0}}
"""What entries cannot do without."""
REFUSED = [("dreg", "ladder"), ("dreg", "conv ladder")]
"""Objectives and networks that do not fit."""


def in_turn(pairs: Iterable[tuple[str, str]], sizes: Sequence[int] = (2, 3, 5)) -> list[tuple[str, str, int]]:
    """Each pair with one of the sizes, which go round along both axes: every entry meets every size somewhere."""
    given = list(pairs)
    places = [list(dict.fromkeys(pair[axis] for pair in given)).index for axis in (0, 1)]
    return [(one, other, sizes[(places[0](one) + places[1](other)) % len(sizes)]) for one, other in given]


def objective_section(name: str) -> dict[str, Any]:
    return {"name": name, **OBJECTIVE_SETTINGS.get(name, {})}


def experiment(**sections: Any) -> Experiment:
    """An experiment of the small mlp; `sections` replace or add to its sections."""
    model = {"network": NETWORKS["mlp"], "latent_dim": 2, "encoder_range": "signed"}
    base = {"model": model, "objective": {"name": "elbo", "beta": BETA}, "optim": {"lr": LR}}
    return Experiment.from_dict({**base, **sections})


def begin(config: Experiment, objective: Objective | None = None, *, dtype: torch.dtype = torch.float64) -> TrainState:
    """The state before the first step; the model and the objective in `dtype`."""
    model = build_vae(config, SHAPE, seed=5).to(dtype)
    objective = build_objective(config.objective) if objective is None else objective
    return TrainState.begin(config, model, objective.to(dtype))


def pixels() -> Tensor:
    return torch.randint(0, 256, (NUM_IMAGES, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches(
    epoch: int = 1, group: WorkerGroup = ALONE, *, global_batch_size: int = BATCH, dtype: torch.dtype = torch.float64
) -> Iterator[Batch]:
    """A worker's batches of an epoch: 5 + 5 + 5 + 5 + 3 images."""
    loader = Loader(Split.in_memory(pixels()), torch.arange(NUM_IMAGES), seed=SEED, shards=shards_of(group))
    for batch in loader.training(epoch, global_batch_size=global_batch_size):
        yield batch._replace(x=batch.x.to(dtype))


def run_epoch(
    state: TrainState,
    epoch: int = 1,
    group: WorkerGroup = ALONE,
    *,
    data: Any = None,
    lr: float = LR,
    settings: dict[str, float] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, float]:
    """Train an epoch; the means of the logged terms over all workers. `options` are of `EpochSettings`."""
    sums = TermSums(("loss", *ELBO_TERMS, *state.objective.terms), CPU)
    given = state.objective.settings(0.0, 0) if settings is None else settings
    train_epoch(
        state,
        batches(epoch, group, dtype=dtype) if data is None else data,
        group,
        epoch=EpochSettings(seed=SEED, epoch=epoch, num_data=NUM_IMAGES, **options),
        step_settings=lambda index: StepSettings(lr, given),
        sums=sums,
    )
    return sums.reduced(group).values


def parameters(module: torch.nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class GradientRecorder(torch.optim.Optimizer):
    """Keeps every step's gradient, and leaves the weights as they are."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(list(parameters), {"lr": 1.0})
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.param_groups[0]["params"]]))


def record_gradients(state: TrainState) -> dict[str, GradientRecorder]:
    """Put a recorder in place of every optimizer of the state."""
    sets = state.objective.parameter_sets(state.model)
    recorders = {name: GradientRecorder(members) for name, members in sets.items()}
    state.optimizers = dict(recorders)
    return recorders


def gradients_and_means(state: TrainState, group: WorkerGroup) -> tuple[list[Tensor], dict[str, float]]:
    """The gradient of every step of an epoch with the weights left as they are, and the means of the terms."""
    (recorder,) = record_gradients(state).values()
    means = run_epoch(state, 1, group)
    return recorder.gradients, means


def check_gradients_on_workers(objective: dict[str, Any], network: str, size: int) -> None:
    """Assert that `size` workers have the gradients and terms of one process.

    Also with workers that have no image: of the last batch's three, two of five workers get none.
    """
    config = experiment(model={"network": NETWORKS[network], "latent_dim": 2}, objective=objective)
    expected, expected_means = gradients_and_means(begin(config), ALONE)
    assert len(expected) == 5
    assert min(float(gradient.abs().max()) for gradient in expected) > 0.01
    states = [begin(config) for _ in range(size)]
    results = results_on_threads(size, lambda group: gradients_and_means(states[group.rank], group))
    for gradients, means in results:
        for mine, first, reference in zip(gradients, results[0][0], expected, strict=True):
            assert torch.equal(mine, first), "all workers hold the same bits"
            scale = float(reference.abs().max())
            torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12 * scale)
        assert means == pytest.approx(expected_means, rel=1e-12)
        assert means == results[0][1]
