"""Contract: every network with every likelihood, prior and objective, sampled so that each pair meets at least once.

Three steps, in float32 and bfloat16, by one worker and by two: all is finite, the loss falls, a checkpoint comes back
to the bit, and every example keeps the noise of its place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.checkpoints.written import save
from tests.thread_workers import results_on_threads
from tests.training.small import ALONE, CPU, SEED
from vae_ray import Experiment, UserError
from vae_ray.checkpoints.loading import read_checkpoint
from vae_ray.data.batches import Batch, Loader
from vae_ray.data.dataset import Split
from vae_ray.evaluation.elbo import autocast
from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.initialization import INITIALIZATIONS
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.networks import NETWORKS
from vae_ray.models.noise import latent_noise
from vae_ray.models.priors import PRIORS
from vae_ray.models.vae import build_vae
from vae_ray.objectives import OBJECTIVES, build_objective
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import WorkerGroup, shards_of
from vae_ray.runs.preflight import checked_model
from vae_ray.seeds import generator
from vae_ray.training.loop import EpochSettings, StepSettings, train_epoch
from vae_ray.training.state import TrainState

SHAPE, NUM_IMAGES, BATCH, NUM_STEPS, NUM_CLASSES = (3, 8, 9), 26, 10, 3, 4
LR = 1e-3
MORE_EPOCHS = 10
"""Three steps of Adam may raise a loss that is near its first minimum; thirty lower it."""
VARIANTS: dict[str, dict[str, Any]] = {
    "conv ladder": {"name": "ladder", "kind": "conv", "channels": [8, 8], "latent_groups": [1, 1]}
}
"""Networks of which one set of settings is not enough."""
AXES = {
    "model.network": sorted({*NETWORKS, *VARIANTS}),
    "likelihood": sorted(LIKELIHOODS),
    "model.prior": sorted(PRIORS),
    "objective": sorted(OBJECTIVES),
    "model.condition": [None, "label"],
    "training.precision": ["float32", "bfloat16"],
}
SMALL: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "mlp": {"hidden": [24]},
    "conv": {"channels": [8, 16], "hidden": [24]},
    "resnet": {"channels": [8, 16], "groups": 4, "blocks": 1, "attention": True},
    "ladder": {"hidden": [24, 16], "upper_dims": [3]},
    "mmd": {"weight": 10.0},  # ten rows estimate MMD² to 0.1: times 1000 that hides what three steps gain
    "flow": {"transforms": 2, "hidden": [16]},
    "geco": {"target": 50.0, "step_size": 1e-9},  # a multiplier that grows would hide that the loss falls
}
"""Settings of the entries that are not small by themselves, or not precise on a small batch."""
REFUSED = [("mmd", "mixture"), ("mmd", "vamp"), ("mmd", "flow"), ("dreg", "ladder"), ("dreg", "conv ladder")]
REFUSED += [("dip", prior) for prior in PRIORS if prior != "standard"]
"""Pairs that have no meaning; `preflight` says so in one line."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of operations this small wait for each other, for minutes in all where other processes compute too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    """One combination, by axis."""

    entries: dict[str, Any]

    def __str__(self) -> str:
        return "-".join(str(entry) for entry in self.entries.values())

    @property
    def is_refused(self) -> bool:
        return any(set(pair) <= set(self.entries.values()) for pair in REFUSED)

    @property
    def precision(self) -> str:
        return str(self.entries["training.precision"])

    def experiment(self, precision: str) -> Experiment:
        chosen = {key: entry for key, entry in self.entries.items() if entry and key != "training.precision"}
        overrides = {key: {"name": entry, **SMALL.get(entry, {})} for key, entry in chosen.items()}
        if overrides.pop("model.condition", None):
            overrides |= {"model.condition": "label", "model.num_classes": NUM_CLASSES}
        model = {key.removeprefix("model."): value for key, value in overrides.items() if key.startswith("model.")}
        others = {key: value for key, value in overrides.items() if not key.startswith("model.")}
        sections = {"model": {"latent_dim": 4, "initialization": "he", **model}, **others}
        return Experiment.from_dict({**sections, "optim": {"lr": LR}, "training": {"precision": precision}})


def pairwise() -> list[Case]:
    """Combinations in which each pair of entries of two axes occurs; greedy, the same at every call."""
    missing = {
        (one, other)
        for (key, entries), (key2, entries2) in itertools.combinations(AXES.items(), 2)
        for one in ((key, entry) for entry in entries)
        for other in ((key2, entry) for entry in entries2)
    }
    candidates = [tuple(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    cases = []
    while missing:
        best = max(candidates, key=lambda items: sum(pair in missing for pair in itertools.combinations(items, 2)))
        missing -= set(itertools.combinations(best, 2))
        cases.append(Case(dict(best)))
    return cases


def split() -> Split:
    """Binary images of four classes: what every likelihood describes."""
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    masks = torch.rand(NUM_CLASSES, *SHAPE, generator=torch.Generator().manual_seed(3)) < 0.3
    return Split.in_memory(masks[labels].to(torch.uint8) * 255, {"label": labels})


def begin(config: Experiment) -> TrainState:
    model = build_vae(config, SHAPE, seed=5)
    initialize = INITIALIZATIONS[config.model.initialization]
    assert initialize is not None
    initialize(model, split().gather(torch.arange(NUM_IMAGES)).double().mean(0) / 255, generator(SEED, "init"))
    return TrainState.begin(config, model, build_objective(config.objective, seed=2))


def loader(group: WorkerGroup) -> Loader:
    return Loader(split(), torch.arange(NUM_IMAGES), seed=SEED, shards=shards_of(group))


def train_steps(
    state: TrainState, group: WorkerGroup, precision: str, *, epoch: int = 1, first_step: int = 0, num: int = NUM_STEPS
) -> dict[str, float]:
    """Some steps of an epoch; the means of the logged terms over all workers."""
    sums = TermSums(state.terms, CPU)
    batches = loader(group).training(epoch, global_batch_size=BATCH, first_step=first_step)
    train_epoch(
        state,
        itertools.islice(batches, num),
        group,
        epoch=EpochSettings(seed=SEED, epoch=epoch, num_data=NUM_IMAGES, precision=precision),
        step_settings=lambda index: StepSettings(LR, state.objective.settings(0.0, index)),
        sums=sums,
        first_step=first_step,
    )
    return sums.reduced(group).values


def loss_of(state: TrainState, precision: str) -> float:
    """The mean loss over all images in batches as in training, of one noise each."""
    model, objective = state.model.eval(), state.objective
    k, total = objective.num_samples, 0.0
    for batch in loader(ALONE).evaluation(batch_size=BATCH):
        noise = latent_noise(model.latent_shapes, batch.rows, SEED, "test", num_samples=k)
        with autocast(precision, CPU):
            output = model(batch.x, noise, k, model.condition(batch.labels))
        given = GlobalBatch(len(batch.x), slice(0, len(batch.x)), NUM_IMAGES, ALONE)
        losses = objective.losses(output, batch.x, model.likelihood, objective.settings(0.0, 0), given)
        total += float(losses.terms["loss"].detach().sum())
    return total / NUM_IMAGES


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    return {**{f"weights.{name}": t for name, t in state.model.state_dict().items()}, **state.tensors()}


CASES = pairwise()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_combination_trains(case: Case, tmp_path: Path) -> None:
    precision = case.precision
    config = case.experiment(precision)
    if case.is_refused:
        with pytest.raises(UserError):
            checked_model(config, SHAPE, num_training=NUM_IMAGES)
        return
    checked_model(config, SHAPE, num_training=NUM_IMAGES)
    state = begin(config)
    before = loss_of(state, precision)
    terms = train_steps(state, ALONE, precision, num=2)
    # a checkpoint after two steps: what follows is the same to the bit
    written = save(tmp_path, state=state)
    restored = begin(config)
    checkpoint = read_checkpoint(written.path)
    restored.model.load_state_dict(checkpoint.weights(restored.model.state_dict()))
    restored.load(checkpoint.training_state(), checkpoint.scalars)
    assert_equal(tensors_of(restored), tensors_of(state))
    for each in (state, restored):
        terms |= train_steps(each, ALONE, precision, first_step=2, num=1)
    assert_equal(tensors_of(restored), tensors_of(state))
    assert all(torch.isfinite(torch.tensor(value)) for value in terms.values())
    # against N(0, I) in closed form; else by one sample an image, whose mean deviates by about sqrt(2 rate / 26)
    assert terms["rate"] > (-1e-4 if case.entries["model.prior"] == "standard" else -0.5)
    for epoch in range(2, 2 + MORE_EPOCHS):
        train_steps(state, ALONE, precision, epoch=epoch)
    assert loss_of(state, precision) < before


def assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    assert [name for name in given if not torch.equal(given[name], expected[name])] == []


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_refused], ids=str)
def test_two_workers_train_any_combination_like_one(case: Case) -> None:
    config = case.experiment("float32")

    # built one after the other: the threads share the generator from which torch draws weights
    states = [begin(config) for _ in range(3)]

    def work(group: WorkerGroup) -> tuple[TrainState, dict[str, float]]:
        state = states[group.rank + group.size - 1]
        state.model.double(), state.objective.double()
        return state, train_steps_in_float64(state, group)

    (alone, expected), *_ = results_on_threads(1, work)
    for state, terms in results_on_threads(2, work):
        assert terms == pytest.approx(expected, rel=1e-9, abs=1e-9)
        for parameter, other in zip(state.model.parameters(), alone.model.parameters(), strict=True):
            # Adam divides by the gradient's own size: rounding of 1e-16 grows where a gradient is nearly 0
            torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


def train_steps_in_float64(state: TrainState, group: WorkerGroup) -> dict[str, float]:
    sums = TermSums(state.terms, CPU)
    batches = loader(group).training(1, global_batch_size=BATCH)

    def doubled(batch: Batch) -> Batch:
        return batch._replace(x=batch.x.double())

    train_epoch(
        state,
        map(doubled, batches),
        group,
        epoch=EpochSettings(seed=SEED, epoch=1, num_data=NUM_IMAGES),
        step_settings=lambda index: StepSettings(LR, state.objective.settings(0.0, index)),
        sums=sums,
    )
    return sums.reduced(group).values
