"""Truth and golden: the loop against a hand-written one, with any number of workers, and a float64 loss curve."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.thread_workers import results_on_threads
from tests.training.small import (
    ALONE,
    BETA,
    CPU,
    LR,
    NETWORKS,
    NUM_IMAGES,
    REFUSED,
    SEED,
    batches,
    begin,
    check_gradients_on_workers,
    experiment,
    in_turn,
    objective_section,
    parameters,
    record_gradients,
    run_epoch,
)
from vae_ray import Experiment, TrainingFailed, train
from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.latents import Latents
from vae_ray.models.noise import Shapes, latent_noise
from vae_ray.objectives import OBJECTIVES
from vae_ray.seeds import generator
from vae_ray.training import loop
from vae_ray.training.loop import EpochSettings, StepSettings, train_epoch

# --- golden ---------------------------------------------------------------------------------------------

# Mean loss of an epoch, in nats. A commit that changes these numbers says why.
GOLDEN_LOSSES = [21.251571600207672, 20.90983991278949, 20.852340468897122, 20.701023552578366, 20.632176738347884]
GOLDEN_LOSSES_OF_0_1 = [21.28019677861545, 21.03241534758397, 20.801495973270274, 20.764633546847737, 20.68713330486854]


def losses_of_five_epochs() -> list[float]:
    state = begin(experiment())
    return [run_epoch(state, epoch)["loss"] for epoch in range(1, 6)]


def noise_of_0_1(
    shapes: Shapes, rows: slice, seed: int, *address: str | int, num_samples: int, device: torch.device
) -> Latents:
    """The global batch's noise from one generator, as before it was drawn in blocks of rows."""
    ((latent_dim,),) = shapes
    return (torch.randn(rows.stop, latent_dim, generator=generator(seed, *address))[rows.start :],)


def test_losses_of_the_first_epochs_are_the_golden_ones() -> None:
    # float64: sums over 30 pixels in another order differ by 1e-15, which 25 Adam steps amplify 1000-fold at most
    assert losses_of_five_epochs() == pytest.approx(GOLDEN_LOSSES, rel=1e-11)


def test_blocks_of_noise_are_all_that_moved_the_golden_losses_since_0_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "latent_noise", noise_of_0_1)
    assert losses_of_five_epochs() == pytest.approx(GOLDEN_LOSSES_OF_0_1, rel=1e-11)


# --- an independent reference ---------------------------------------------------------------------------


def noise_of_step(rows: slice, epoch: int, step: int) -> Tensor:
    (eps,) = latent_noise(((2,),), rows, SEED, "training noise", epoch, step)
    return eps


def reference_epochs(weights: dict[str, Tensor], num_epochs: int) -> tuple[dict[str, Tensor], list[float]]:
    """The same training written out with torch's functions, losses and optimizer only."""
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
    w1, b1, w2, b2, w3, b3, w4, b4 = weights.values()
    adam = torch.optim.Adam(weights.values(), lr=LR)
    losses = []
    for epoch in range(1, num_epochs + 1):
        total = 0.0
        for step, (x, rows, *_) in enumerate(batches(epoch)):
            target, eps = x.reshape(len(x), -1), noise_of_step(rows, epoch, step)
            mu, logvar = F.linear(F.relu(F.linear(2 * target - 1, w1, b1)), w2, b2).split(2, dim=1)
            q = Normal(mu, logvar.exp().sqrt())
            logits = F.linear(F.relu(F.linear(q.mean + q.stddev * eps, w3, b3)), w4, b4)
            distortion = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
            rate = kl_divergence(q, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum()
            loss = (distortion + BETA * rate) / len(x)
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += float(loss.detach()) * len(x)
        losses.append(total / NUM_IMAGES)
    return weights, losses


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_training_equals_a_hand_written_reference(num_epochs: int) -> None:
    state = begin(experiment())
    expected, expected_losses = reference_epochs(state.model.state_dict(), num_epochs)
    losses = [run_epoch(state, epoch)["loss"] for epoch in range(1, num_epochs + 1)]
    assert losses == pytest.approx(expected_losses, rel=1e-11)
    for name, tensor in state.model.state_dict().items():
        # Adam divides by the gradient's own size, so rounding of 1e-16 grows where a gradient is small
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-8, atol=1e-10)


def test_learning_rate_and_beta_of_every_step_are_those_of_its_settings() -> None:
    frozen, learning = begin(experiment()), begin(experiment())
    start = parameters(learning.model)
    settings = {0: StepSettings(0.0, {"beta": 5.0}), 1: StepSettings(0.1, {"beta": 0.0})}
    for state, num_steps in ((frozen, 1), (learning, 2)):
        state.optimizers = {"model": torch.optim.SGD(state.model.parameters(), lr=9.0)}
        train_epoch(
            state,
            list(batches())[:num_steps],
            ALONE,
            epoch=EpochSettings(seed=SEED, epoch=1, num_data=NUM_IMAGES),
            step_settings=settings.__getitem__,
            sums=TermSums(("loss", "distortion", "rate"), CPU),
        )
    assert torch.equal(parameters(frozen.model), start)
    x, rows, *_ = list(batches())[1]
    output = frozen.model(x, (noise_of_step(rows, 1, 1),))
    distortion = F.binary_cross_entropy_with_logits(output.params, x, reduction="sum") / len(x)
    gradient = torch.autograd.grad(distortion, list(frozen.model.parameters()))
    expected = start - 0.1 * torch.cat([g.flatten() for g in gradient])
    torch.testing.assert_close(parameters(learning.model), expected, rtol=1e-12, atol=1e-14)


def test_an_epoch_that_is_continued_is_the_epoch_that_was_not_interrupted() -> None:
    whole, parts = begin(experiment()), begin(experiment())
    run_epoch(whole, 2)
    data = list(batches(2))
    for first, last in ((0, 2), (2, 5)):
        train_epoch(
            parts,
            data[first:last],
            ALONE,
            epoch=EpochSettings(seed=SEED, epoch=2, num_data=NUM_IMAGES),
            step_settings=lambda index: StepSettings(LR, {"beta": BETA}),
            sums=TermSums(("loss", "distortion", "rate"), CPU),
            first_step=first,
        )
    assert torch.equal(parameters(parts.model), parameters(whole.model))


# --- workers --------------------------------------------------------------------------------------------

PAIRS = [pair for pair in itertools.product(sorted(OBJECTIVES), NETWORKS) if pair not in REFUSED]
ON_WORKERS = [*in_turn(PAIRS), *((objective, "mlp", 1) for objective in sorted(OBJECTIVES))]


def test_every_objective_and_every_network_meets_every_number_of_workers() -> None:
    for axis, names in ((0, OBJECTIVES), (1, NETWORKS)):
        met = {(case[axis], case[2]) for case in ON_WORKERS}
        assert met >= set(itertools.product(names, (2, 3, 5)))


@pytest.mark.parametrize(("objective", "network", "size"), ON_WORKERS)
def test_any_number_of_workers_has_the_gradients_and_metrics_of_one_process(
    objective: str, network: str, size: int
) -> None:
    check_gradients_on_workers(objective_section(objective), network, size)


def test_clipping_bounds_the_norm_of_the_whole_gradient_and_keeps_its_direction() -> None:
    free, clipped = begin(experiment()), begin(experiment())
    before, after = (record_gradients(state)["model"] for state in (free, clipped))
    run_epoch(free)
    run_epoch(clipped, grad_clip=1.0)
    assert min(float(gradient.norm()) for gradient in before.gradients) > 1.0
    for whole, bounded in zip(before.gradients, after.gradients, strict=True):
        # torch adds 1e-6 to the norm that it divides by
        torch.testing.assert_close(bounded, whole / whole.norm(), rtol=1e-5, atol=0)


def test_clipping_on_workers_bounds_the_norm_of_the_sum() -> None:
    states = [begin(experiment()) for _ in range(4)]
    recorders = [record_gradients(state)["model"] for state in states]
    run_epoch(states[3], grad_clip=1.0)
    results_on_threads(3, lambda group: run_epoch(states[group.rank], 1, group, grad_clip=1.0))
    *together, alone = (recorder.gradients for recorder in recorders)
    for gradients in together:
        for mine, expected in zip(gradients, alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


# --- a loss that is not finite --------------------------------------------------------------------------

ONE_STEP = {"optim.lr": 1e38, "training.epochs": 1}


@pytest.mark.parametrize(
    "overrides",
    [
        {"optim.lr": 1e30},
        {"optim.lr": 1e30, "data.num_validation": 0},
        # one step an epoch: the terms, taken before the update, are finite; the weights are not
        pytest.param({**ONE_STEP, "training.global_batch_size": 1338}),
        pytest.param({**ONE_STEP, "training.global_batch_size": 1438, "data.num_validation": 0}),
    ],
    ids=["val", "no val", "one step, val", "one step, no val"],
)
def test_a_loss_that_is_not_finite_fails_the_run_and_leaves_no_checkpoint(
    quick: Experiment, overrides: dict[str, Any]
) -> None:
    constant = {"optim.schedule": "constant", "optim.warmup_steps": 0}
    config = quick.with_overrides({**constant, **overrides})
    with pytest.raises(TrainingFailed, match=r"not finite.*--optim\.lr"):
        train(config)
    assert list(Path(config.run.storage).glob("*/checkpoints/*")) == []
