"""Training with a prior that has parameters: exact for any number of workers, started, averaged, saved and loaded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_priors import TRAINED, move
from tests.thread_workers import results_on_threads
from tests.training.small import ALONE, NETWORKS, begin, experiment, in_turn, record_gradients, run_epoch
from vae_ray import Experiment, TrainedVAE, train
from vae_ray.data.splits import Splits
from vae_ray.evaluation.diagnosis import INFORMATIVE_NATS
from vae_ray.models.traversal import elementwise_rate
from vae_ray.training.state import TrainState

EXACT = "donot_use_mm_for_euclid_dist"


@pytest.mark.parametrize(("prior", "network", "size"), in_turn(itertools.product(sorted(TRAINED), NETWORKS)))
def test_any_number_of_workers_has_the_gradients_of_one_process(prior: str, network: str, size: int) -> None:
    """Also with workers that have no image."""
    model = {"network": NETWORKS[network], "latent_dim": 2, "prior": {"name": prior, **TRAINED[prior]}}

    def state() -> TrainState:
        begun = begin(experiment(model=model))
        move(begun.model.prior)
        return begun

    def gradients(state: TrainState, group: Any) -> tuple[list[Tensor], dict[str, float]]:
        (recorder,) = record_gradients(state).values()
        means = run_epoch(state, 1, group)
        return recorder.gradients, means

    expected, expected_means = gradients(state(), ALONE)
    states = [state() for _ in range(size)]
    for mine, means in results_on_threads(size, lambda group: gradients(states[group.rank], group)):
        for gradient, reference in zip(mine, expected, strict=True):
            scale = float(reference.abs().max())
            torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12 * scale)
        assert means == pytest.approx(expected_means, rel=1e-11)


@pytest.mark.parametrize("prior", sorted(TRAINED))
def test_a_run_is_loaded_as_it_was_evaluated(prior: str, quick: Experiment) -> None:
    """With averaged weights: the prior of the averaged model is made of the averaged encoder."""
    overrides = {f"model.prior.{key}": value for key, value in TRAINED[prior].items()}
    result = train(quick.with_overrides({"model.prior": prior, **overrides, "training.ema_decay": 0.9}))
    assert result.warnings == []
    vae = TrainedVAE.load(result.run_dir)
    metrics = vae.evaluate("test")
    assert metrics["test/nelbo"] == pytest.approx(result.metrics["test/nelbo"], rel=1e-5)
    x = vae.test_images(64)
    (group,) = vae.groups(x)
    rates = elementwise_rate(group).mean(0)
    assert float(rates.max()) > INFORMATIVE_NATS
    images = vae.generate(50, seed=1)
    # products of other sizes sum in another order
    torch.testing.assert_close(images[:7], vae.generate(7, seed=1), rtol=0, atol=1e-5)
    assert float(vae.traverse(x, steps=5).images.std(dim=1).max()) > 0.02


@pytest.mark.parametrize("condition", [None, "label"])
def test_pseudo_inputs_start_at_training_images_of_their_class(condition: str | None, quick: Experiment) -> None:
    """After one epoch at a learning rate that moves no weight."""
    starts = []
    for seed in (1, 2):
        name = f"seed-{seed}"
        config = quick.with_overrides(
            {"model.prior": "vamp", "model.prior.components": 23, "model.condition": condition, "optim.lr": 1e-12}
            | {"training.epochs": 1, "run.seed": seed, "run.name": name}
        )
        vae = TrainedVAE.load(train(config).run_dir)
        splits = Splits.open(vae.experiment)
        images = (splits.train.gather(splits.train_indices).float() / 255).clamp(0.05, 0.95).flatten(1)
        starts.append(torch.sigmoid(vae.model.prior.logits).flatten(1))
        distance, nearest = torch.cdist(starts[-1], images, compute_mode=EXACT).min(1)
        assert float(distance.max()) < 1e-3
        assert len(set(nearest.tolist())) > 20
        if condition is not None:
            labels = splits.train.columns["label"][splits.train_indices[nearest]]
            assert labels.tolist() == [number % 10 for number in range(23)]
    assert not torch.allclose(*starts)
