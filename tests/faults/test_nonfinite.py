"""System, in one process: a loss or gradient that is not finite, on any worker, is dealt with before the update."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.runs import Counting, assert_same, computed, counted_steps, fitted, run_of
from tests.thread_workers import ThreadWorkers, on_threads, results_on_threads
from vae_ray import Experiment, train
from vae_ray.checkpoints.listing import all_checkpoints
from vae_ray.config.sections.optim import OptimConfig
from vae_ray.data.batches import Loader, Shards
from vae_ray.data.splits import Splits
from vae_ray.errors import Diverged
from vae_ray.models.noise import latent_noise
from vae_ray.objectives.base import MODEL, Losses
from vae_ray.objectives.elbo import Elbo
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.progress import describe_epoch
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.training import loop, stop_requests
from vae_ray.training.fit import fit
from vae_ray.training.nonfinite import GRADIENT, MAX_FILES, nonfinite_term
from vae_ray.training.optimization import apply_gradients, build_optimizer

STEPS_PER_EPOCH = 14
CPU = torch.device("cpu")

__all__ = ["counted_steps"]
"""A fixture of every test here."""

pytestmark = [pytest.mark.faults, pytest.mark.event("not finite")]


@pytest.fixture
def small(quick: Experiment) -> Experiment:
    return quick.with_overrides({"training.epochs": 2, "training.global_batch_size": 100})


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Spoils the loss of chosen steps; returns the list of steps, which grows."""

    def spoil(*steps: int, value: float = float("nan")) -> list[int]:
        original, made = Elbo.losses, list[int]()

        def spoiling(self: Elbo, *args: Any) -> Losses:
            losses = original(self, *args)
            made.append(len(made) + 1)
            if made[-1] not in steps:
                return losses
            return losses._replace(loss={name: loss * value for name, loss in losses.loss.items()})

        monkeypatch.setattr(Elbo, "losses", spoiling)
        return made

    return spoil


def weights(run: RunDirectory) -> bytes:
    return (all_checkpoints(run.checkpoints)[-1].path / "weights.safetensors").read_bytes()


# --- the check ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_clip", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_one_element_of_the_gradient_is_enough_to_leave_everything_as_it_was(
    value: float, where: int, grad_clip: float | None
) -> None:
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (3, 1001, 2)]
    optimizer = build_optimizer(OptimConfig(lr=0.1), parameters)
    gradients = [torch.ones_like(parameter) for parameter in parameters]
    assert apply_gradients({"model": optimizer}, {"model": gradients}, lr=0.1, grad_clip=grad_clip)
    before = [parameter.detach().clone() for parameter in parameters]
    state = [{k: v.clone() for k, v in optimizer.state[parameter].items()} for parameter in parameters]
    gradients = [torch.ones_like(parameter) for parameter in parameters]
    gradients[where][-1] = value
    assert not apply_gradients({"model": optimizer}, {"model": gradients}, lr=0.1, grad_clip=grad_clip)
    for parameter, old, old_state in zip(parameters, before, state, strict=True):
        assert torch.equal(parameter, old)
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in old_state.items())


def test_one_set_of_parameters_that_is_not_finite_leaves_all_sets_as_they_were() -> None:
    sets = {name: [torch.nn.Parameter(torch.ones(3))] for name in ("model", "discriminator")}
    optimizers = {name: build_optimizer(OptimConfig(lr=0.1), parameters) for name, parameters in sets.items()}
    gradients = {"model": [torch.ones(3)], "discriminator": [torch.full((3,), float("nan"))]}
    assert not apply_gradients(optimizers, gradients, lr=0.1, grad_clip=None)
    assert all(torch.equal(parameter, torch.ones(3)) for (parameter,) in sets.values())


def test_clipping_is_that_of_torch_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(7, 5, generator=generator), torch.randn(5, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2))
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient.clone()
    apply_gradients({"model": torch.optim.SGD(ours, lr=1.0)}, {"model": gradients}, lr=1.0, grad_clip=0.5)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.optim.SGD(theirs, lr=1.0).step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_a_gradient_whose_square_overflows_is_not_finite(grad_clip: float | None) -> None:
    """Adam's second moment of it would stay infinite, and its weight where it is."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(OptimConfig(lr=0.1), [parameter])
    gradients = {"model": [torch.tensor([3e19, 0.0, -3e19])]}  # whose sum is 0
    assert not apply_gradients({"model": optimizer}, gradients, lr=0.1, grad_clip=grad_clip)
    assert not optimizer.state


def test_an_optimizer_state_that_is_not_finite_ends_the_epoch(
    small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.apply_gradients

    def poisoning(optimizers: dict[str, torch.optim.Optimizer], *args: Any, **kwargs: Any) -> bool:
        was_finite = original(optimizers, *args, **kwargs)
        (group,) = optimizers[MODEL].param_groups
        optimizers[MODEL].state[group["params"][0]]["exp_avg_sq"].view(-1)[0] = float("inf")  # stays so
        return was_finite

    monkeypatch.setattr(loop, "apply_gradients", poisoning)
    run = run_of(small)
    with pytest.raises(Diverged, match=r"epoch 1: the metrics, weights or optimizer's state are not finite"):
        fit(small, run.path, SingleProcess(CPU))
    assert not all_checkpoints(run.checkpoints)


# --- what is said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"objective.beta": 1e38},
            r"step 1 of 14: the loss is not finite; .*; try a smaller --objective\.beta than 1e\+38$",
        ),
        (
            {"optim.lr": 1e30},
            r"the distortion is not finite; .*; try a smaller --optim\.lr than 1e\+30 or --optim\.grad-clip 100$",
        ),
        (
            {"optim.lr": 1e30, "optim.grad_clip": 100.0},
            r"; try a smaller --optim\.lr than 1e\+30 or --optim\.warmup-steps 100$",
        ),
        (
            {"optim.lr": 1e30, "optim.grad_clip": 100.0, "training.precision": "bfloat16", "optim.warmup_steps": 1},
            r"; try a smaller --optim\.lr than 1e\+30 or --training\.precision float32$",
        ),
    ],
)
def test_a_message_names_the_term_its_cause_and_what_was_not_tried(
    small: Experiment, overrides: dict[str, Any], message: str
) -> None:
    plain = {"optim.schedule": "constant", "optim.warmup_steps": 0, "optim.grad_clip": None}
    with pytest.raises(Diverged, match=message):
        fit(small.with_overrides({**plain, **overrides}), run_of(small).path, SingleProcess(CPU))


@pytest.mark.parametrize("name", ["distortion", "rate", "loss", None])
@pytest.mark.parametrize("rank", [0, 2])
def test_all_workers_name_the_first_term_that_is_not_finite_on_one_of_them(name: str | None, rank: int) -> None:
    def named(group: ThreadWorkers) -> str:
        terms = {key: torch.ones(4) for key in ("loss", "distortion", "rate")}
        if group.rank == rank and name is not None:
            terms[name][1] = float("inf")
            terms["loss"][1] = float("nan")
        return nonfinite_term(Losses({MODEL: terms["loss"].sum()}, terms), group)

    assert results_on_threads(3, named) == [name or GRADIENT] * 3


def test_before_the_first_update_the_learning_rate_is_not_blamed(
    small: Experiment, spoiled: Callable[..., list[int]]
) -> None:
    spoiled(1)
    with pytest.raises(Diverged, match=r"no update was made before: look at --model.network and --likelihood$"):
        fit(small, run_of(small).path, SingleProcess(CPU))


# --- stop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stop_names_the_step_keeps_the_batch_and_makes_no_update(
    small: Experiment, spoiled: Callable[..., list[int]], value: float
) -> None:
    run, step = run_of(small), STEPS_PER_EPOCH + 14  # the last batch of epoch 2, the smaller one
    made = spoiled(step, value=value)
    with pytest.raises(Diverged, match=r"^epoch 2, step 14 of 14: the loss is not finite; .*optim\.lr"):
        fit(small, run.path, SingleProcess(CPU))
    assert made[-1] == step
    assert [checkpoint.position for checkpoint in all_checkpoints(run.checkpoints)] == [(1, 0)]
    (file,) = run.nonfinite.iterdir()
    assert file.name == "epoch=0002-step=000014.safetensors"
    splits = Splits.open(small)
    loader = Loader(*splits.select("train"), seed=small.run.seed, shards=Shards(0, 1, CPU))
    *_, (x, rows, size, _) = loader.training(2, global_batch_size=100)
    shapes = ((small.model.latent_dim,),)
    (eps,) = latent_noise(shapes, rows, small.run.seed, loop.NOISE, 2, 13)
    with safe_open(file, "pt") as batch:
        assert torch.equal(batch.get_tensor("pixels").float() * (1 / 255), x)
        assert torch.equal(batch.get_tensor("pixels"), splits.train.gather(batch.get_tensor("indices")))
        assert torch.equal(batch.get_tensor("eps.0"), eps)
        assert len(batch.get_tensor("indices")) == size == 38
        metadata = batch.metadata()
    assert (metadata["epoch"], metadata["step"], float(metadata["beta"])) == ("2", "14", 0.25)


def test_a_loss_that_is_not_finite_on_one_worker_stops_all_in_that_step(
    small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original, original_apply = run_of(small), Elbo.losses, loop.apply_gradients
    num_steps, updates = [0, 0, 0], [0, 0, 0]
    rank_of: dict[int, int] = {}

    def spoiling(self: Elbo, *args: Any) -> Losses:
        losses, rank = original(self, *args), rank_of[threading.get_ident()]
        num_steps[rank] += 1
        is_spoiled = (rank, num_steps[rank]) == (2, 5)
        return losses._replace(loss={MODEL: losses.loss[MODEL] * float("nan")}) if is_spoiled else losses

    def counted(*args: Any, **kwargs: Any) -> bool:
        was_finite = original_apply(*args, **kwargs)
        updates[rank_of[threading.get_ident()]] += was_finite
        return was_finite

    monkeypatch.setattr(Elbo, "losses", spoiling)
    monkeypatch.setattr(loop, "apply_gradients", counted)

    def one(group: ThreadWorkers) -> None:
        rank_of[threading.get_ident()] = group.rank
        fit(small, run.path, group)

    errors = on_threads(3, one)
    assert [type(error) for error in errors] == [Diverged] * 3
    assert all("epoch 1, step 5 of 14" in str(error) for error in errors)
    assert updates == [4, 4, 4]


# --- skip -----------------------------------------------------------------------------------------------


def test_skip_leaves_the_batch_out_and_goes_on(
    small: Experiment, spoiled: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(small)
    made = spoiled(3, 20)
    fit(small.with_overrides({"training.nonfinite": "skip"}), run.path, SingleProcess(CPU))
    assert len(made) == 2 * STEPS_PER_EPOCH
    for line in computed(run.path):
        assert 0 < line["train/loss"] < 100
    skipped = [record.getMessage() for record in caplog.records]
    assert ["epoch 1, step 3 of 14" in skipped[0], "epoch 2, step 6 of 14" in skipped[1]] == [True, True]
    assert "skipped (2 of at most 3 times)" in skipped[1]
    assert sorted(path.name[:22] for path in run.nonfinite.iterdir()) == [
        "epoch=0001-step=000003",
        "epoch=0002-step=000006",
    ]


def test_a_partly_skipped_epoch_says_over_how_many_images_its_means_are(
    small: Experiment, spoiled: Callable[..., list[int]]
) -> None:
    run = run_of(small)
    spoiled(3, 20)
    fit(small.with_overrides({"training.nonfinite": "skip"}), run.path, SingleProcess(CPU))
    first, second = run.records.history()
    assert [(r["num_images"], r["num_skipped"]) for r in (first, second)] == [(1238, 100), (1238, 100)]
    assert describe_epoch(first, 2).endswith("train over 1,238 of 1,338 images")


def test_an_epoch_without_one_update_is_a_failure_and_not_a_loss_of_zero(
    small: Experiment, spoiled: Callable[..., list[int]]
) -> None:
    run = run_of(small)
    spoiled(*range(STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH + 1))
    patient = small.with_overrides({"training.nonfinite": "skip", "training.nonfinite.limit": 1_000_000})
    with pytest.raises(
        Diverged, match=r"^epoch 2: every batch was skipped, so that nothing was learned; try a smaller"
    ):
        fit(patient, run.path, SingleProcess(CPU))
    assert [record["epoch"] for record in run.records.history()] == [1]
    assert len(list(run.nonfinite.iterdir())) == MAX_FILES < STEPS_PER_EPOCH


def test_skipping_is_allowed_as_often_as_the_limit_says(small: Experiment, spoiled: Callable[..., list[int]]) -> None:
    run = run_of(small)
    spoiled(3, 5, 7)
    limited = small.with_overrides({"training.nonfinite": "skip", "training.nonfinite.limit": 2})
    with pytest.raises(Diverged, match=r"epoch 1, step 7 of 14: .*2 times before \(training\.nonfinite\.limit\)"):
        fit(limited, run.path, SingleProcess(CPU))


def test_a_run_that_stopped_can_go_on_by_skipping(small: Experiment, spoiled: Callable[..., list[int]]) -> None:
    """The policy is no part of what a run computes: it may be changed on resume, and counts survive."""
    run = run_of(small)
    spoiled(20)
    with pytest.raises(Diverged):
        fit(small, run.path, SingleProcess(CPU))
    spoiled(6)
    result = train(small.with_overrides({"training.nonfinite": "skip"}), resume=True)
    assert result.epochs == 2
    scalars = all_checkpoints(run.checkpoints)[-1].scalars
    assert (scalars["lr_factor"], scalars["num_nonfinite"]) == (1.0, 1)


# --- rollback -------------------------------------------------------------------------------------------


def test_rollback_goes_on_from_the_last_checkpoint_with_a_smaller_learning_rate(
    small: Experiment, spoiled: Callable[..., list[int]]
) -> None:
    """From the fifth step's checkpoint on it is the run that had half the learning rate from there."""
    overrides = {"optim.schedule": "constant", "optim.warmup_steps": 0, "run.checkpoint_every_steps": 5}
    small = small.with_overrides({**overrides, "training.nonfinite": "rollback"})
    run = run_of(small)
    made = spoiled(8)
    fit(small, run.path, SingleProcess(CPU))
    assert len(made) == 2 * STEPS_PER_EPOCH + 3  # steps 6 to 8 were made twice
    lines = computed(run.path)
    assert [line["lr"] for line in lines] == [2.5e-3, 2.5e-3]

    halved = RunDirectory(run.path.parent / "halved")
    slower = small.with_overrides({"optim.lr": 2.5e-3})
    stop_after_the_fifth(small, halved)
    fit(slower, halved.path, SingleProcess(CPU))
    assert weights(run) == weights(halved)
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in computed(halved.path)]


def stop_after_the_fifth(experiment: Experiment, run: RunDirectory) -> None:
    """Leave the run's checkpoint of its fifth step."""
    run.path.mkdir(parents=True)

    def look(num_steps: int) -> None:
        if num_steps == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(experiment, run.path, Counting(look))
    (checkpoint,) = all_checkpoints(run.checkpoints)
    assert checkpoint.position == (0, 5)


def test_rollback_without_a_checkpoint_begins_again(small: Experiment, spoiled: Callable[..., list[int]]) -> None:
    small = small.with_overrides({"training.nonfinite": "rollback", "training.nonfinite.lr_factor": 1.0})
    undisturbed, run = run_of(small.with_overrides({"run.name": "undisturbed"})), run_of(small)
    fit(small, undisturbed.path, SingleProcess(CPU))
    made = spoiled(4)
    fit(small, run.path, SingleProcess(CPU))
    assert len(made) == 2 * STEPS_PER_EPOCH + 4
    assert weights(run) == weights(undisturbed)
    assert computed(run.path) == computed(undisturbed.path)


def test_what_rollbacks_left_of_the_learning_rate_survives_a_resume(
    small: Experiment, spoiled: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_requests, "AGREE_SECONDS", 0.0)
    small = small.with_overrides({"training.nonfinite": "rollback", "optim.schedule": "constant"})
    undisturbed, run = run_of(small.with_overrides({"run.name": "undisturbed"})), run_of(small)
    spoiled(17)
    fit(small, undisturbed.path, SingleProcess(CPU))

    spoiled(17)
    stops = Counting(lambda n: run.stop_file.touch() if n == 22 else None)
    with pytest.raises(Exception, match="stopped after step 5 of 14 of epoch 2"):
        fit(small, run.path, stops)
    run.stop_file.unlink()
    spoiled()
    fit(small, run.path, SingleProcess(CPU))
    assert_same(run.path, undisturbed.path)
    assert [line["lr"] for line in computed(run.path)] == [5e-3, 2.5e-3]


def test_two_workers_roll_back_together(small: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small.with_overrides({"training.nonfinite": "rollback", "run.checkpoint_every_steps": 4})
    run, original, calls = run_of(small), loop.apply_gradients, [0]

    def failing_once(*args: Any, **kwargs: Any) -> bool:
        calls[0] += 1
        if calls[0] in (13, 14):  # the seventh step of both
            return False
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "apply_gradients", failing_once)
    assert fitted(small, run, 2) == [None, None]
    assert calls[0] == 2 * (2 * STEPS_PER_EPOCH + 3)
    assert [line["epoch"] for line in map(json.loads, run.records.metrics_file.read_text().splitlines())] == [1, 2]


@pytest.mark.parametrize(("step", "place"), [(4, "the initial weights"), (18, "checkpoint epoch=0001")])
def test_a_rollback_says_where_it_leads(
    small: Experiment,
    spoiled: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
    step: int,
    place: str,
) -> None:
    spoiled(step)
    fit(small.with_overrides({"training.nonfinite": "rollback"}), run_of(small).path, SingleProcess(CPU))
    (warning,) = [record.getMessage() for record in caplog.records if "returning" in record.getMessage()]
    assert f"returning to {place} with a smaller learning rate (1 of at most 3 times)" in warning


def test_rollbacks_end_with_the_limit(small: Experiment, spoiled: Callable[..., list[int]]) -> None:
    run = run_of(small)
    spoiled(*range(1, 1000))
    with pytest.raises(Diverged, match=r"epoch 1, step 1 of 14: .*3 times before"):
        fit(small.with_overrides({"training.nonfinite": "rollback"}), run.path, SingleProcess(CPU))


def test_nothing_not_finite_leaves_no_directory(small: Experiment) -> None:
    run = run_of(small)
    fit(small, run.path, SingleProcess(CPU))
    assert not Path(run.nonfinite).exists()
