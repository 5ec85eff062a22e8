"""Real Ray workers, killed and stopped at any moment: the group starts again and ends with the same bits.

Kills of the driver are in tests/distributed/test_driver_ends.py, of whole nodes in tests/cluster.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Count
from vae_ray import Experiment
from vae_ray.run_files.run_directory import RunDirectory

pytestmark = [pytest.mark.faults, pytest.mark.ray]

KILLS = int(os.environ.get("VAE_RAY_KILLS", "12"))
EPOCHS = 4 * KILLS
RESTART_SECONDS = 90
HUNG_SECONDS = 30
"""Within which a worker that says nothing is found out; then the group starts again."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray for this module alone: its drivers are processes of their own, so it is found by its address."""
    import vae_ray.distributed  # sets Ray's environment before Ray starts  # noqa: F401, I001
    import ray

    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    yield
    ray.shutdown()
    if before is None:
        del os.environ["RAY_ADDRESS"]
    else:
        os.environ["RAY_ADDRESS"] = before


def experiment(storage: Path, name: str, *, epochs: int, num_workers: int = 2) -> Experiment:
    """Epochs of some half a second, with a checkpoint about ten times in each."""
    return Experiment.preset("digits").with_overrides(
        {
            "training.epochs": epochs,
            "training.global_batch_size": 16,
            "training.test_every_epochs": 0,
            "model.network.hidden": (48, 24),
            "model.prior": "standard",
            "run.checkpoint_every_steps": 9,
            "run.seed": 4,
            "run.storage": str(storage),
            "run.name": name,
            "workers.num": num_workers,
            "workers.max_failures": 2 * KILLS,
        }
    )


def start(chosen: Experiment, directory: Path) -> subprocess.Popen[str]:
    """The driver of a run, as people start it."""
    file = directory / f"{chosen.run.name}.yaml"
    file.write_text(chosen.to_yaml())
    command = [sys.executable, "-m", "vae_ray", "train", str(file), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[str], what: str, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, f"the driver ended: {driver.communicate()}"
        assert time.monotonic() < deadline, f"{what}: not after {seconds:g} s"
        time.sleep(0.01)


def wait_for_number(
    lines: Callable[[], list[object]], number: int, driver: subprocess.Popen[str], what: str, *, seconds: float
) -> None:
    wait_for(lambda: len(lines()) >= number, driver, what, seconds=seconds)


def weights(run: RunDirectory, epochs: int) -> list[bytes]:
    last = run.checkpoints / f"epoch={epochs:04d}"
    return [(last / name).read_bytes() for name in ("weights.safetensors", "training_state.safetensors")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that nobody kills."""
    storage = tmp_path_factory.mktemp("undisturbed")
    driver = start(experiment(storage, "undisturbed", epochs=EPOCHS), storage)
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    return RunDirectory(storage / "undisturbed")


@pytest.mark.timeout(RESTART_SECONDS * (KILLS + 2))
def test_workers_killed_again_and_again_end_with_the_same_bits(
    undisturbed: RunDirectory, tmp_path: Path, fault_counts: Count
) -> None:
    run, chance = RunDirectory(tmp_path / "killed"), random.Random(9)
    driver = start(experiment(tmp_path, "killed", epochs=EPOCHS), tmp_path)
    try:
        for kill in range(KILLS):
            wait_for_number(run.records.attempts, kill + 1, driver, f"start {kill + 1}", seconds=RESTART_SECONDS)
            wait_for_number(run.records.history, len(run.records.history()) + 1, driver, "an epoch", seconds=60)
            time.sleep(chance.uniform(0, 0.5))
            os.kill(chance.choice(run.records.attempts()[-1]["pids"]), signal.SIGKILL)
        answer, said = driver.communicate(timeout=240)
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    assert json.loads(answer)["epochs"] == EPOCHS
    assert said.count("started again from ") == KILLS, said
    assert [line["epoch"] for line in run.records.history()] == list(range(1, EPOCHS + 1)), (
        "nothing twice, nothing skipped"
    )
    assert weights(run, EPOCHS) == weights(undisturbed, EPOCHS)
    fault_counts("worker killed", tried=KILLS, survived=KILLS, note=f"{KILLS} of them with Ray workers")


@pytest.mark.timeout(300)
def test_a_hung_worker_is_found_out_and_the_run_ends_with_the_same_bits(
    undisturbed: RunDirectory, tmp_path: Path, fault_counts: Count
) -> None:
    run = RunDirectory(tmp_path / "hung")
    driver = start(experiment(tmp_path, "hung", epochs=EPOCHS), tmp_path)
    try:
        wait_for(lambda: len(run.records.history()) >= 2, driver, "two epochs", seconds=RESTART_SECONDS)
        hung = run.records.attempts()[0]["pids"][1]
        os.kill(hung, signal.SIGSTOP)
        stopped_at = time.monotonic()
        wait_for(lambda: not os.path.exists(f"/proc/{hung}"), driver, "the worker's end", seconds=HUNG_SECONDS)
        noticed_after = time.monotonic() - stopped_at
        said = driver.communicate(timeout=240)[1]
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    assert len(run.records.attempts()) == 2
    assert weights(run, EPOCHS) == weights(undisturbed, EPOCHS)
    fault_counts("worker hangs", tried=1, survived=1, note=f"found out after {noticed_after:.0f} s")
