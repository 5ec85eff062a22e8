"""Ctrl-C, kill -9 and SIGTERM at the driver of real Ray workers and trials: what was computed is not lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray

from tests.distributed.conftest import digits
from tests.faults.signalled import Training
from tests.storage.servers import ObjectStore
from vae_ray import Experiment, TrainedVAE, TrainResult, train
from vae_ray.checkpoints.listing import all_checkpoints
from vae_ray.storage.filesystems import open_filesystem
from vae_ray.storage.locations import is_uri, join_location

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

LONG = {"training.epochs": 3, "training.global_batch_size": 8, "training.test_every_epochs": 0}


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run whose driver lives."""
    return train(digits(tmp_path_factory.mktemp("undisturbed"), 2, name="undisturbed", **LONG))


def content(checkpoint: Path | str, name: str) -> bytes:
    """A file of a checkpoint in a directory or at a URI."""
    if not is_uri(checkpoint):
        return Path(checkpoint, name).read_bytes()
    filesystem, path = open_filesystem(join_location(str(checkpoint), name), key="run.storage")
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def assert_resumes_to_the_same_bits(experiment: Experiment, undisturbed: TrainResult) -> TrainResult:
    resumed = train(experiment, resume=True)
    assert [line["epoch"] for line in resumed.history] == [1, 2, 3]
    for name in ("weights.safetensors", "training_state.safetensors"):
        assert content(resumed.last_checkpoint, name) == content(undisturbed.last_checkpoint, name)
    assert resumed.metrics == undisturbed.metrics
    assert [line["train/nelbo"] for line in resumed.history] == [line["train/nelbo"] for line in undisturbed.history]
    return resumed


def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_bits(undisturbed: TrainResult, tmp_path: Path) -> None:
    experiment = digits(tmp_path, 2, name="stopped", **LONG)
    training = Training(experiment, tmp_path)
    try:
        training.wait_for_epoch(1)
        # a terminal sends it to all of the foreground's processes: the driver's own Ray and its workers too
        code, seconds, log = training.ends_after(signal.SIGINT, whole_group=True)
    finally:
        training.process.kill()
    assert code == 130, log
    assert log.count("stopping after a checkpoint; once more to stop at once") == 1
    newest = all_checkpoints(training.run.checkpoints)[-1]
    assert newest.step is not None, log
    assert f"stopped after step {newest.step} of 161 of epoch {newest.epoch}; continue with: vae-ray resume " in log
    assert seconds < 10
    assert_resumes_to_the_same_bits(experiment, undisturbed)


def test_a_run_at_a_uri_whose_driver_is_killed_goes_on_to_the_same_bits(
    undisturbed: TrainResult, store: ObjectStore, tmp_path: Path
) -> None:
    experiment = digits(tmp_path, 2, name="killed", **LONG, **{"run.storage": store.uri})
    training = Training(experiment, tmp_path, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    try:
        training.wait_until(lambda: "images/samples/epoch=0002.png" in store.names("killed"))
    finally:
        os.kill(training.process.pid, signal.SIGKILL)
        training.process.wait()
    assert "summary.json" not in store.names("killed")
    resumed = assert_resumes_to_the_same_bits(experiment, undisturbed)
    assert str(resumed.run_dir) == f"{store.uri}/killed"
    assert TrainedVAE.load(resumed.best_checkpoint).evaluate("test")["test/nelbo"] > 0
    assert not any(name.startswith((".ray", ".driver-")) for name in store.names("killed"))


def test_a_sweep_ends_at_sigterm_with_130_and_leaves_no_process(tmp_path: Path) -> None:
    """With a Ray of its own, which would abort the process at SIGTERM."""
    experiment = digits(tmp_path, 1, name="swept", **{"training.epochs": 2000})
    sweep = Training(experiment, tmp_path, command=["sweep", "--num-trials=2", "--scheduler=none"])
    try:
        sweep.wait_until(lambda: len(list(tmp_path.glob("swept/trials/*/checkpoints/epoch=*"))) >= 2)
        code, seconds, log = sweep.ends_after(signal.SIGTERM)
    finally:
        sweep.process.kill()
    assert code == 130, log
    assert "interrupted; continue with: " in log
    assert seconds < 10
