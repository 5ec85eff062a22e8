"""kill -9 of the driver of a run on Ray workers, then --resume: not a bit is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import digits
from vae_ray import train
from vae_ray.artifacts.run_directory import RunDirectory

pytestmark = pytest.mark.ray

EPOCHS = 12


@pytest.mark.usefixtures("cluster")
def test_a_killed_driver_resumes_to_the_same_bits(tmp_path: Path) -> None:
    undisturbed = train(digits(tmp_path, 2, name="undisturbed", **{"training.epochs": EPOCHS}))
    experiment = digits(tmp_path, 2, name="killed", **{"training.epochs": EPOCHS})
    file = tmp_path / "experiment.yaml"
    file.write_text(experiment.to_yaml())

    kill_after_epoch = random.Random(5).randrange(2, EPOCHS - 2)
    driver = subprocess.Popen(
        [sys.executable, "-m", "vae_ray", "train", str(file), "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        run = RunDirectory(tmp_path / "killed")
        deadline = time.monotonic() + 120
        while len(run.history()) < kill_after_epoch:
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    assert not run.summary_file.exists()

    resumed = train(experiment, resume=True)

    assert resumed.epochs == EPOCHS
    assert [line["epoch"] for line in resumed.history] == list(range(1, EPOCHS + 1))
    for name in ("weights.safetensors", "training_state.pt"):
        assert (resumed.last_checkpoint / name).read_bytes() == (undisturbed.last_checkpoint / name).read_bytes()
    assert resumed.metrics == undisturbed.metrics
