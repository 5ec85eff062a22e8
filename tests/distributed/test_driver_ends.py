"""Ctrl-C, kill -9 and SIGTERM at the driver of real Ray workers and trials: what was computed is not lost."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import ray

from tests.distributed.conftest import digits
from tests.faults.signalled import Training
from tests.runs import fitted, run_of
from tests.storage.servers import ObjectStore
from vae_ray import TrainedVAE, TrainResult, train
from vae_ray.storage.filesystems import open_filesystem
from vae_ray.storage.locations import is_uri, join_location

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

LONG = {"training.epochs": 3, "training.global_batch_size": 8, "training.test_every_epochs": 0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run whose driver lives, on two threads: the sum of two workers' gradients has no order."""
    experiment = digits(tmp_path_factory.mktemp("undisturbed"), 2, name="undisturbed", **LONG)
    run = run_of(experiment)
    assert fitted(experiment, run, 2) == [None, None]
    return train(experiment.with_overrides({"workers.num": 0}), resume=True)  # its summary; nothing is left to train


def content(checkpoint: Path | str, name: str) -> bytes:
    """A file of a checkpoint in a directory or at a URI."""
    if not is_uri(checkpoint):
        return Path(checkpoint, name).read_bytes()
    filesystem, path = open_filesystem(join_location(str(checkpoint), name), key="run.storage")
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def test_a_run_at_a_uri_stopped_by_ctrl_c_and_then_killed_goes_on_to_the_same_bits(
    undisturbed: TrainResult, store: ObjectStore, tmp_path: Path
) -> None:
    """First with a Ray of the driver's own, then on a running one."""
    experiment = digits(tmp_path, 2, name="disturbed", **LONG, **{"run.storage": store.uri})

    stopped = Training(experiment, tmp_path)
    try:
        stopped.wait_until(lambda: "metrics.jsonl" in store.names("disturbed"), poll_seconds=0.2)  # an epoch is done
        # a terminal sends it to all of the foreground's processes: the driver's own Ray and its workers too
        code, seconds, log = stopped.ends_after(signal.SIGINT, whole_group=True)
    finally:
        stopped.process.kill()
    assert code == 130, log
    assert log.count("stopping after a checkpoint; once more to stop at once") == 1
    newest = max(name for name in store.names("disturbed") if name.endswith("manifest.json")).split("/")[1]
    done = re.fullmatch(r"epoch=0*(\d)-step=0*(\d+)", newest)
    assert done is not None, log
    assert f"stopped after step {done[2]} of 161 of epoch {done[1]}; continue with: vae-ray resume {store.uri}" in log
    assert seconds < 10

    killed = Training(experiment, tmp_path, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    try:
        killed.wait_until(lambda: "images/samples/epoch=0002.png" in store.names("disturbed"), poll_seconds=0.2)
    finally:
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.process.wait()
    assert "summary.json" not in store.names("disturbed")

    resumed = train(experiment, resume=True)
    assert [line["epoch"] for line in resumed.history] == [1, 2, 3]
    for name in ("weights.safetensors", "training_state.safetensors"):
        assert content(resumed.last_checkpoint, name) == content(undisturbed.last_checkpoint, name)
    assert resumed.metrics == undisturbed.metrics
    assert [line["train/nelbo"] for line in resumed.history] == [line["train/nelbo"] for line in undisturbed.history]
    assert str(resumed.run_dir) == f"{store.uri}/disturbed"
    assert TrainedVAE.load(resumed.best_checkpoint).evaluate("test")["test/nelbo"] > 0
    assert not any(name.startswith((".ray", ".driver-")) for name in store.names("disturbed"))


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
