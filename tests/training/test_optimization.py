"""Truth: steps of every optimizer against torch's own, and several parameter sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.thread_workers import ThreadWorkers, results_on_threads
from tests.training.small import (
    ALONE,
    BETA,
    LR,
    NUM_IMAGES,
    SEED,
    batches,
    begin,
    experiment,
    parameters,
    record_gradients,
    run_epoch,
)
from vae_ray.config.sections.optim import OptimConfig
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.noise import latent_noise
from vae_ray.models.vae import Output
from vae_ray.objectives.base import MODEL, Losses, Objective, elbo_terms, mean_over_samples
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import broadcast_buffers
from vae_ray.training.optimization import OPTIMIZERS, apply_gradients, build_optimizer, gradients_of
from vae_ray.training.state import TrainState

TORCH_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def small_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (5,), (1, 2, 4))]


@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_an_update_does_not_depend_on_memory_layouts(
    weight_layout: torch.memory_format, gradient_layout: torch.memory_format, grad_clip: float | None
) -> None:
    """torch's fused kernels pair elements by their place in memory."""
    generator = torch.Generator().manual_seed(2)
    start, gradient = torch.randn(2, 6, 5, 4, 3, generator=generator)
    contiguous, other = nn.Parameter(start.clone()), nn.Parameter(start.clone(memory_format=weight_layout))
    for parameter, value in ((contiguous, gradient), (other, gradient.contiguous(memory_format=gradient_layout))):
        optimizer = build_optimizer(OptimConfig(), [parameter])
        for factor in (1.0, -0.3):
            assert apply_gradients({"m": optimizer}, {"m": [factor * value]}, lr=0.1, grad_clip=grad_clip)
    # the norm that clips is a sum in another order
    torch.testing.assert_close(other, contiguous, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grad_clip", [None, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_update_is_that_of_torchs_own_optimizer_to_the_bit(
    name: str, weight_decay: float, grad_clip: float | None
) -> None:
    ours, theirs = small_parameters(), small_parameters()
    config = OptimConfig(optimizer=name, weight_decay=weight_decay)
    optimizer = build_optimizer(config, ours)
    reference = TORCH_OPTIMIZERS[name](theirs, weight_decay=weight_decay, fused=True)
    generator = torch.Generator().manual_seed(7)
    for step in range(20):
        lr = 0.1 / (step + 1)
        gradients = [torch.randn(p.shape, generator=generator) for p in ours]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(theirs, grad_clip)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        assert apply_gradients({"model": optimizer}, {"model": gradients}, lr=lr, grad_clip=grad_clip)
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)), step
    assert not torch.equal(ours[0], small_parameters()[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_a_gradient_that_is_not_finite_updates_no_set(grad_clip: float | None, bad: float) -> None:
    sets = {"model": small_parameters(), "critic": small_parameters()}
    optimizers = {name: build_optimizer(OptimConfig(), members) for name, members in sets.items()}
    gradients = {name: [torch.ones_like(p) for p in members] for name, members in sets.items()}
    gradients["critic"][1][3] = bad
    assert not apply_gradients(optimizers, gradients, lr=0.1, grad_clip=grad_clip)
    for members in sets.values():
        assert all(torch.equal(mine, start) for mine, start in zip(members, small_parameters(), strict=True))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_makes_every_gradient_nan(loss: float) -> None:
    """Also where the loss has a finite derivative, so that all workers see it in the sum of gradients."""
    weight = nn.Parameter(torch.ones(3))
    gradients = gradients_of({"model": weight.sum() + loss}, {"model": [weight]}, divide_by=1, group=ALONE)
    assert bool(gradients["model"][0].isnan().all())


# --- the matrix of optimizer, likelihood, precision and clipping ----------------------------------------


def plain_epoch(state: TrainState, optimizer: torch.optim.Optimizer, precision: str, grad_clip: float | None) -> float:
    """Three steps by `backward` and torch's optimizer; the mean loss before them."""
    total = 0.0
    for step, (x, rows, *_) in enumerate(batches(1, global_batch_size=8, dtype=torch.float32)):
        noise = latent_noise(((2,),), rows, SEED, "training noise", 1, step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            output = state.model(x, noise)
        loss = (BETA * output.rate() - state.model.likelihood.log_prob(output.params, x)).mean()
        optimizer.zero_grad()
        loss.backward()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip)
        optimizer.step()
        total += float(loss.detach()) * len(x)
    return total / NUM_IMAGES


@pytest.mark.parametrize("grad_clip", [None, 2.0], ids=["free", "clipped"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_three_steps_are_those_of_a_plain_loop(
    optimizer: str, likelihood: str, precision: str, grad_clip: float | None
) -> None:
    config = experiment(likelihood={"name": likelihood}, optim={"optimizer": optimizer, "lr": LR, "weight_decay": 0.01})
    state, reference = begin(config, dtype=torch.float32), begin(config, dtype=torch.float32)
    start = parameters(state.model)
    data = list(batches(1, global_batch_size=8, dtype=torch.float32))
    assert len(data) == 3
    loss = run_epoch(state, data=data, grad_clip=grad_clip, precision=precision)["loss"]
    plain = TORCH_OPTIMIZERS[optimizer](reference.model.parameters(), lr=LR, weight_decay=0.01)
    expected = plain_epoch(reference, plain, precision, grad_clip)
    moved = (parameters(state.model) - start).abs().max()
    error = (parameters(state.model) - parameters(reference.model)).abs()
    assert float(moved) > LR  # three Adam steps move a weight by up to 3 lr
    # the loops add up in another order, which bfloat16 rounds to 8 bits
    assert loss == pytest.approx(expected, rel=1e-6 if precision == "float32" else 1e-3)
    # an Adam step amplifies the rounding of a gradient near 0
    assert float(error.max()) < (1e-3 if precision == "float32" else 0.3) * LR


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_loss_falls(likelihood: str, precision: str) -> None:
    state = begin(experiment(likelihood={"name": likelihood}), dtype=torch.float32)
    losses = [run_epoch(state, epoch, dtype=torch.float32, precision=precision)["loss"] for epoch in range(1, 7)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())


# --- parameter sets -------------------------------------------------------------------------------------


class WithCritic(Objective):
    """The ELBO, and a critic with a loss of its own: it learns to predict the number of lit pixels from z."""

    terms = ("critic",)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            self.critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
            self.unused = nn.Parameter(torch.full((3, 2), 0.5))
            self.frozen = nn.Parameter(torch.full((2,), 0.25), requires_grad=False)
        self.register_buffer("num_images", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mean_z", torch.zeros(2))

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        distortion, rate = map(mean_over_samples, elbo_terms(output, x, likelihood))
        z = output.groups[0].z
        error = (self.critic(z.detach()).squeeze(1) - x.flatten(1).mean(1)).square()
        adversary = distortion + rate - 0.5 * (self.critic(z) * self.frozen.sum()).squeeze(1)
        # rank 0's number alone is kept; were these not broadcast, every worker would have another one
        self.num_images += batch.num_rows * torch.tensor([1, 10])
        self.mean_z.copy_(batch.sum(z.sum(0)) / batch.size)
        loss = {MODEL: adversary.sum(), "critic": error.sum()}
        return Losses(loss, {"loss": adversary, "distortion": distortion, "rate": rate, "critic": error})

    def parameter_sets(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        return {
            MODEL: [p for p in model.parameters() if p.requires_grad],
            "critic": [p for p in self.parameters() if p.requires_grad],
        }


def test_every_parameter_set_has_the_gradient_of_its_own_loss_on_any_number_of_workers() -> None:
    states = [begin(experiment(), WithCritic()) for _ in range(4)]
    recorders = [record_gradients(state) for state in states]
    run_epoch(states[3])
    groups = results_on_threads(3, lambda group: (run_epoch(states[group.rank], 1, group), group)[1])
    sizes = {name: len(recorders[3][name].gradients[0]) for name in (MODEL, "critic")}
    assert sizes["critic"] == (2 * 4 + 4) + (4 + 1) + 6
    for group, recorder in zip(groups, recorders[:3], strict=True):
        # one sum a set and a step
        assert group.gradient_sums == [sizes[MODEL], sizes["critic"]] * 5
        for name, alone in recorders[3].items():
            for mine, expected in zip(recorder[name].gradients, alone.gradients, strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
                assert float(expected.abs().max()) > 1e-3


def test_critic_learns_and_frozen_and_unused_parameters_keep_their_values() -> None:
    state = begin(experiment(optim={"lr": 0.02, "weight_decay": 0.0}), WithCritic())
    assert set(state.optimizers) == {MODEL, "critic"}
    start = parameters(state.model)
    critic_losses = [run_epoch(state, epoch)["critic"] for epoch in range(1, 6)]
    assert critic_losses[-1] < 0.5 * critic_losses[0]
    assert not torch.equal(parameters(state.model), start)
    assert bool((state.objective.frozen == 0.25).all())
    # the pass does not reach it: its gradient is zeros
    assert bool((state.objective.unused == 0.5).all())


def test_a_frozen_parameter_of_the_model_is_in_no_set_and_does_not_move() -> None:
    states = [begin(experiment()) for _ in range(3)]
    for index, state in enumerate(states):
        first = next(state.model.network.parameters()).requires_grad_(False)
        states[index] = TrainState.begin(experiment(), state.model, state.objective)
    before = first.clone()
    results_on_threads(2, lambda group: run_epoch(states[group.rank], 1, group))
    run_epoch(states[2])
    assert torch.equal(first, before)
    for state in states[:2]:
        torch.testing.assert_close(parameters(state.model), parameters(states[2].model), rtol=1e-8, atol=1e-10)


def test_buffers_are_rank_0s_on_every_worker() -> None:
    states = [begin(experiment(), WithCritic()) for _ in range(4)]
    run_epoch(states[3])
    results_on_threads(3, lambda group: run_epoch(states[group.rank], 1, group))
    # 23 images as 5 + 5 + 5 + 5 + 3: rank 0 of three computes 2 + 2 + 2 + 2 + 1 of them
    assert [state.objective.num_images.tolist() for state in states] == [[9, 90]] * 3 + [[23, 230]]
    for state in states[:3]:
        torch.testing.assert_close(state.objective.mean_z, states[3].objective.mean_z, rtol=1e-6, atol=1e-7)
        assert state.objective.num_images.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32, torch.float64])
def test_buffers_of_every_dtype_are_broadcast(dtype: torch.dtype) -> None:
    def run(group: ThreadWorkers) -> Any:
        module = nn.Module()
        module.register_buffer("values", torch.tensor([[group.rank == 0, group.rank == 1, True]]).to(dtype))
        broadcast_buffers(group, module)
        return module.values

    expected = torch.tensor([[1, 0, 1]]).to(dtype)
    for values in results_on_threads(3, run):
        assert values.dtype == dtype
        assert torch.equal(values, expected)


def test_all_optimizers_are_in_the_training_state_and_restored_with_it() -> None:
    """A state that is saved after an epoch continues as the one that was not."""
    whole, first, second = (begin(experiment(), WithCritic()) for _ in range(3))
    run_epoch(whole)
    run_epoch(first)
    second.model.load_state_dict(first.model.state_dict())
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    assert any(name.startswith("optimizer.critic.objective.critic.0.weight.exp_avg") for name in saved)
    second.load(saved, first.scalars())
    for state in (whole, second):
        run_epoch(state, 2)
    assert torch.equal(parameters(second.model), parameters(whole.model))
    assert torch.equal(parameters(second.objective), parameters(whole.objective))
