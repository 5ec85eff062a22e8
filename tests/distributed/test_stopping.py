"""Ctrl-C and SIGTERM at the driver of real Ray workers: a checkpoint inside the epoch, exit 130, nothing left."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.distributed.conftest import digits
from tests.faults.signalled import Training
from vae_ray import TrainResult, train
from vae_ray.training.checkpoints import resumable_checkpoints

pytestmark = pytest.mark.ray

LONG = {"training.epochs": 4, "training.global_batch_size": 8, "training.test_every_epochs": 0}


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run that nobody stops."""
    return train(digits(tmp_path_factory.mktemp("undisturbed"), 2, name="undisturbed", **LONG))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("by_a_terminal", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_run_of_ray_workers_goes_on_to_the_same_bits(
    undisturbed: TrainResult, tmp_path: Path, by_a_terminal: bool
) -> None:
    experiment = digits(tmp_path, 2, name="stopped", **LONG)
    training = Training(experiment, tmp_path)
    try:
        training.wait_for_epoch(1)
        # a terminal sends Ctrl-C to all of the foreground's processes, Ray's and the workers included
        which = signal.SIGINT if by_a_terminal else signal.SIGTERM
        code, seconds, said = training.ends_after(which, whole_group=by_a_terminal)
    finally:
        training.process.kill()
    assert code == 130, said
    assert said.count("stopping after a checkpoint; once more to stop at once") == 1
    newest = resumable_checkpoints(training.run.checkpoints)[-1]
    assert newest.step is not None, said
    assert (
        f"stopped after step {newest.step} of 161 of epoch {newest.epoch}; go on with --resume --name stopped" in said
    )
    assert seconds < 10

    resumed = train(experiment, resume=True)
    for name in ("weights.safetensors", "training_state.pt"):
        assert (resumed.last_checkpoint / name).read_bytes() == (undisturbed.last_checkpoint / name).read_bytes()
    assert resumed.metrics == undisturbed.metrics
    assert [line["train/nelbo"] for line in resumed.history] == [line["train/nelbo"] for line in undisturbed.history]
