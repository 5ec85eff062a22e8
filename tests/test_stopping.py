"""System, in one process: a run that is asked to stop writes a checkpoint, ends, and goes on to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import Counting, assert_same, computed, counted_steps, fitted, run_of, tensors_of
from tests.thread_workers import ThreadWorkers, on_threads
from vae_ray import Experiment, Stopped, TrainResult, train
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.runs.train import resume
from vae_ray.training import stop_requests
from vae_ray.training.fit import fit
from vae_ray.training.stop_requests import Requests, StopRequests

__all__ = ["counted_steps"]
"""A fixture of every test here."""

EPOCHS, STEPS_PER_EPOCH = 2, 14
"""1,338 images in batches of 100, the last smaller."""


@pytest.fixture
def small(quick: Experiment) -> Experiment:
    return quick.with_overrides({"training.epochs": EPOCHS, "training.global_batch_size": 100})


@pytest.fixture(scope="module")
def whole(module_quick: Experiment) -> TrainResult:
    """The run that is not stopped."""
    return train(module_quick.with_overrides({"training.epochs": EPOCHS, "training.global_batch_size": 100}))


@pytest.fixture
def ask_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_requests, "AGREE_SECONDS", 0.0)
    monkeypatch.setattr(stop_requests, "PREEMPTION_SECONDS", 0.0)


@pytest.mark.usefixtures("ask_every_step")
@pytest.mark.parametrize("step", [1, 9, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bits(whole: TrainResult, small: Experiment, step: int) -> None:
    run = run_of(small)
    group = Counting(lambda n: run.stop_file.touch() if n == step else None)
    epoch, in_epoch = (step - 1) // STEPS_PER_EPOCH + 1, (step - 1) % STEPS_PER_EPOCH + 1
    with pytest.raises(
        Stopped, match=rf"step {in_epoch} of 14 of epoch {epoch}; .* vae-ray resume /.*/digits-in-process"
    ):
        fit(small, run.path, group)
    assert group.num_steps == step
    assert (run.checkpoints / f"epoch={epoch:04d}-step={in_epoch:06d}").is_dir()

    result = resume(run.path)

    assert_same(run.path, whole.run_dir)
    assert not run.stop_file.exists()
    assert [line["images_per_second"] * line["seconds"] for line in result.history] == pytest.approx([1338] * EPOCHS)
    assert 0 < result.seconds["training"] < result.seconds["total"]
    assert 0 < result.seconds["startup"] < result.seconds["total"]


@pytest.mark.usefixtures("ask_every_step")
def test_averaged_weights_too_go_on_to_the_same_bits(small: Experiment) -> None:
    averaging = small.with_overrides({"training.ema_decay": 0.95})
    undisturbed = train(averaging.with_overrides({"run.name": "undisturbed"}))
    run = run_of(averaging)
    with pytest.raises(Stopped):
        fit(averaging, run.path, Counting(lambda n: run.stop_file.touch() if n == 17 else None))
    resume(run.path)
    assert any(name.endswith("averaged.safetensors") for name in tensors_of(run.path))
    assert_same(run.path, undisturbed.run_dir)


def test_a_run_asked_to_stop_before_its_first_step_has_nothing_to_save(whole: TrainResult, small: Experiment) -> None:
    run = run_of(small)
    run.stop_file.touch()
    with pytest.raises(Stopped, match="stopped after epoch 0 of 2"):
        fit(small, run.path, SingleProcess(torch.device("cpu")))
    assert list(run.checkpoints.iterdir()) == []
    train(small, resume=True)
    assert_same(run.path, whole.run_dir)


@pytest.mark.usefixtures("ask_every_step")
def test_a_machine_that_goes_away_leads_to_one_checkpoint_and_training_goes_on(
    whole: TrainResult, small: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = run_of(small), set[str]()

    def look(num_steps: int) -> None:
        seen.update(path.name for path in run.checkpoints.glob("*-step=*"))

    group = Counting(look)
    monkeypatch.setattr(group, "preempted", lambda: group.num_steps >= 5)
    fit(small, run.path, group)
    assert seen == {"epoch=0001-step=000005"}
    assert_same(run.path, whole.run_dir)


@pytest.mark.usefixtures("ask_every_step")
@pytest.mark.parametrize("num_workers_after", [2, 1, 3])
def test_workers_stopped_inside_an_epoch_go_on(small: Experiment, num_workers_after: int) -> None:
    """As many of them with the same bits: each takes up its own sums, so that metrics too are equal. Others as near
    as the order of additions allows.
    """
    undisturbed, stopped = run_of(small.with_overrides({"run.name": "undisturbed"})), run_of(small)
    assert fitted(small, undisturbed, 2) == [None, None]

    def stop_in_a_while(group: ThreadWorkers) -> None:
        if group.rank == 0:  # a step has one sum of gradients and one that asks for requests
            group.after_sums(5, stopped.stop_file.touch)
        fit(small, stopped.path, group)

    errors = on_threads(2, stop_in_a_while)
    assert [type(error) for error in errors] == [Stopped, Stopped]
    (checkpoint,) = stopped.checkpoints.iterdir()
    assert checkpoint.name.startswith("epoch=0001-step=")
    stopped.stop_file.unlink()
    assert fitted(small, stopped, num_workers_after) == [None] * num_workers_after
    if num_workers_after == 2:
        assert_same(stopped.path, undisturbed.path)
    else:
        for ours, theirs in zip(computed(stopped.path), computed(undisturbed.path), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_workers_agree_on_what_rank_0_alone_sees(tmp_path: Path) -> None:
    run, elsewhere = RunDirectory(tmp_path), RunDirectory(tmp_path / "nothing here")

    def steps_until_told(group: ThreadWorkers) -> tuple[int, Requests]:
        asked = StopRequests(run if group.rank == 0 else elsewhere, group)
        for num_steps in range(10_000):
            if num_steps == 50 and group.rank == 0:
                run.stop_file.touch()
            if any(requests := asked.after_step()):
                return num_steps, requests
        raise AssertionError("never told")

    (steps, requests), *others = on_threads(3, steps_until_told)
    assert requests == Requests(stop=True)
    assert others == [(steps, requests)] * 2
    assert steps >= 50
