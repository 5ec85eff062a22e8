"""Truth and golden: the loop against a hand-written one, on shards, and a float64 loss curve."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vae_ray import Experiment, TrainingFailed, train
from vae_ray.config.experiment import ModelConfig, OptimConfig
from vae_ray.data.batches import Batch, Shards, evaluation_batches, training_batches
from vae_ray.evaluation.elbo import evaluate
from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.vae import VAE, build_vae
from vae_ray.objectives.elbo import ElboTerms, beta_weighted_loss
from vae_ray.training.loop import StepSettings, train_epoch
from vae_ray.training.optimization import build_optimizer

CPU = torch.device("cpu")
SHAPE, NUM_IMAGES, BATCH, BETA, LR = (2, 3, 5), 23, 5, 0.7, 0.02
CONFIG = ModelConfig(hidden=(7,), latent_dim=2, encoder_range="signed")
LIKELIHOOD = LIKELIHOODS["bernoulli"](CONFIG)


def pixels() -> Tensor:
    return torch.randint(0, 256, (NUM_IMAGES, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def model_in_float64() -> VAE:
    return build_vae(CONFIG, SHAPE, seed=5).double()


def batches(epoch: int = 1, *, rank: int = 0, size: int = 1, global_batch_size: int = BATCH) -> list[Batch]:
    shards = training_batches(
        pixels(),
        torch.arange(NUM_IMAGES),
        seed=1,
        epoch=epoch,
        global_batch_size=global_batch_size,
        latent_dim=2,
        shards=Shards(rank, size, CPU),
    )
    return [Batch(x.double(), eps.double(), global_size) for x, eps, global_size in shards]


def run_epoch(model: VAE, data: list[Batch], optimizer: torch.optim.Optimizer, **options: Any) -> dict[str, float]:
    sums = TermSums(CPU)
    train_epoch(
        model, data, optimizer, likelihood=LIKELIHOOD, settings=lambda i: StepSettings(LR, BETA), sums=sums, **options
    )
    return sums.means()


def parameters(model: VAE) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class GradientKeeper(torch.optim.Optimizer):
    """Keeps every step's gradients, and leaves the weights as they are."""

    def __init__(self, model: VAE) -> None:
        super().__init__(model.parameters(), {"lr": 1.0})
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.param_groups[0]["params"]]))


# --- golden ---------------------------------------------------------------------------------------------

# Mean loss of an epoch, in nats. A commit that changes these numbers says why.
GOLDEN_LOSSES = [21.28019677861545, 21.03241534758397, 20.801495973270274, 20.764633546847737, 20.68713330486854]


def test_losses_of_the_first_epochs_are_the_golden_ones() -> None:
    model = model_in_float64()
    optimizer = build_optimizer(OptimConfig(lr=LR), model.parameters())
    losses = [run_epoch(model, batches(epoch), optimizer)["loss"] for epoch in range(1, 6)]
    # float64: sums over 30 pixels in another order differ by 1e-15, which 25 Adam steps amplify 1000-fold at most
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-11)


# --- an independent reference ---------------------------------------------------------------------------


def reference_epochs(model: VAE, num_epochs: int) -> tuple[dict[str, Tensor], list[float]]:
    """The same training written out with torch's functions, losses and optimizer only."""
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}
    w1, b1, w2, b2, w3, b3, w4, b4 = weights.values()
    adam = torch.optim.Adam(weights.values(), lr=LR)
    losses = []
    for epoch in range(1, num_epochs + 1):
        total = 0.0
        for x, eps, _ in batches(epoch):
            target = x.reshape(len(x), -1)
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
    model = model_in_float64()
    expected, expected_losses = reference_epochs(model, num_epochs)
    optimizer = build_optimizer(OptimConfig(lr=LR), model.parameters())
    losses = [run_epoch(model, batches(epoch), optimizer)["loss"] for epoch in range(1, num_epochs + 1)]
    assert losses == pytest.approx(expected_losses, rel=1e-11)
    for name, tensor in model.state_dict().items():
        # Adam divides by the gradient's own size, so rounding of 1e-16 grows where a gradient is small
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-8, atol=1e-10)


def test_learning_rate_and_beta_of_every_step_are_those_of_its_settings() -> None:
    frozen, learning = model_in_float64(), model_in_float64()
    start = parameters(learning)
    settings = {0: StepSettings(0.0, 5.0), 1: StepSettings(0.1, 0.0)}
    for model, num_steps in ((frozen, 1), (learning, 2)):
        train_epoch(
            model,
            batches()[:num_steps],
            torch.optim.SGD(model.parameters(), lr=9.0),
            likelihood=LIKELIHOOD,
            settings=settings.__getitem__,
            sums=TermSums(CPU),
        )
    assert torch.equal(parameters(frozen), start)
    x, eps, _ = batches()[1]
    forward = frozen(x, eps)
    distortion = F.binary_cross_entropy_with_logits(forward.logits, x, reduction="sum") / len(x)
    gradient = torch.autograd.grad(distortion, list(frozen.parameters()), allow_unused=True)
    expected = start - 0.1 * torch.cat([g.flatten() for g in gradient if g is not None])
    torch.testing.assert_close(parameters(learning), expected, rtol=1e-12, atol=1e-14)


# --- shards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_gradients_of_shards_add_up_to_the_gradient_of_one_worker(size: int) -> None:
    """Also where the last batch of three leaves some of four or six workers an empty shard."""
    model = model_in_float64()
    alone, together = GradientKeeper(model), [GradientKeeper(model) for _ in range(size)]
    run_epoch(model, batches(), alone)
    for rank, keeper in enumerate(together):
        run_epoch(model, batches(rank=rank, size=size), keeper)
    assert len(alone.gradients) == 5
    for step, expected in enumerate(alone.gradients):
        total = torch.stack([keeper.gradients[step] for keeper in together]).sum(0)
        assert float(expected.abs().max()) > 0.01
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-14)


def test_clipping_bounds_the_norm_of_the_whole_gradient_and_keeps_its_direction() -> None:
    model = model_in_float64()
    free, clipped = GradientKeeper(model), GradientKeeper(model)
    run_epoch(model, batches(), free)
    run_epoch(model, batches(), clipped, grad_clip=1.0)
    assert min(float(gradient.norm()) for gradient in free.gradients) > 1.0
    for before, after in zip(free.gradients, clipped.gradients, strict=True):
        # torch adds 1e-6 to the norm that it divides by
        torch.testing.assert_close(after, before / before.norm(), rtol=1e-5, atol=0)


class Pooled:
    """A group whose last caller gets the sum of all callers' values."""

    rank, size, device = 0, 3, CPU

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def sum(self, values: Tensor) -> Tensor:
        self.values.append(values)
        return torch.stack(self.values).sum(0)


def test_metrics_are_means_over_examples_and_not_over_shards() -> None:
    group, means = Pooled(), {}
    distortion = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    for part in (slice(0, 1), slice(1, 6), slice(6, 6)):  # unequal, and one empty
        terms = ElboTerms(distortion[part], 10 * distortion[part])
        sums = TermSums(CPU)
        sums.add(terms, beta_weighted_loss(terms, 0.5))
        means = sums.reduced(group)
    assert means == {"loss": 6 * 10.5, "nelbo": 11 * 10.5, "distortion": 10.5, "rate": 105.0}


def test_sums_of_many_batches_do_not_drift() -> None:
    sums, terms = TermSums(CPU), ElboTerms(torch.full((1000,), 100.1), torch.full((1000,), 20.2))
    for _ in range(2000):
        sums.add(terms, beta_weighted_loss(terms, 1.0))
    # a float32 sum over 1000 equal values is off by 1e-7 at most; adding up 2000 of them must not add to it
    assert sums.means()["distortion"] == pytest.approx(100.1, rel=5e-7)
    assert sums.means()["nelbo"] == pytest.approx(120.3, rel=5e-7)


# --- evaluation -----------------------------------------------------------------------------------------


def evaluated(model: VAE, *, size: int = 1, batch_size: int = 9) -> dict[str, float]:
    group, means = Pooled(), {}
    for rank in range(size):
        sums = TermSums(CPU)
        given = evaluation_batches(
            pixels(),
            torch.arange(NUM_IMAGES),
            seed=1,
            batch_size=batch_size,
            latent_dim=2,
            shards=Shards(rank, size, CPU),
        )
        evaluate(model, given, likelihood=LIKELIHOOD, beta=BETA, sums=sums)
        means = sums.reduced(group)
    return means


def test_evaluation_is_the_mean_over_all_images_written_out() -> None:
    model = build_vae(CONFIG, SHAPE, seed=5)
    (batch,) = evaluation_batches(
        pixels(), torch.arange(NUM_IMAGES), seed=1, batch_size=99, latent_dim=2, shards=Shards(0, 1, CPU)
    )
    with torch.no_grad():
        forward = model(batch.x, batch.eps)
    distortion = float(F.binary_cross_entropy_with_logits(forward.logits, batch.x, reduction="sum")) / NUM_IMAGES
    q = Normal(forward.mu, (0.5 * forward.logvar).exp())
    rate = float(kl_divergence(q, Normal(0.0, 1.0)).sum()) / NUM_IMAGES
    expected = {
        "loss": distortion + BETA * rate,
        "nelbo": distortion + rate,
        "distortion": distortion,
        "rate": rate,
    }
    assert evaluated(model, batch_size=99) == pytest.approx(expected, rel=1e-6)  # float32 sums


@pytest.mark.parametrize("size", [2, 3, 6])
def test_evaluation_is_the_same_for_any_number_of_workers(size: int) -> None:
    model = build_vae(CONFIG, SHAPE, seed=5)
    assert evaluated(model, size=size) == pytest.approx(evaluated(model), rel=1e-6)  # float32 sums in another order


def test_evaluation_leaves_weights_and_gradients_alone() -> None:
    model = build_vae(CONFIG, SHAPE, seed=5)
    before = parameters(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    evaluated(model)
    assert torch.equal(parameters(model), before)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


# --- a loss that is not finite --------------------------------------------------------------------------


ONE_STEP = {"optim.lr": 1e38, "training.epochs": 1}


@pytest.mark.parametrize(
    "overrides",
    [
        {"optim.lr": 1e30},
        {"optim.lr": 1e30, "data.num_validation": 0},
        # one step an epoch: the terms, taken before the update, are finite; the weights are of no use
        pytest.param({**ONE_STEP, "training.global_batch_size": 1338}),
        pytest.param({**ONE_STEP, "training.global_batch_size": 1438, "data.num_validation": 0}),
    ],
    ids=["val", "no val", "one step, val", "one step, no val"],
)
def test_a_loss_that_is_not_finite_fails_the_run_and_leaves_no_checkpoint(
    quick: Experiment, overrides: dict[str, Any]
) -> None:
    constant = {"optim.schedule": "constant", "optim.warmup_steps": 0}
    experiment = quick.with_overrides({**constant, **overrides})
    with pytest.raises(TrainingFailed, match=r"not finite.*--optim\.lr"):
        train(experiment)
    assert list(Path(experiment.run.storage).glob("*/checkpoints/*")) == []
