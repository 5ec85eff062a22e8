"""Ray workers and trials whose storage is an object store: train, resume, sweep, load the best from its URI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import digits
from tests.storage.servers import ObjectStore
from vae_ray import TrainedVAE, train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

EPOCHS = 8


def command(*arguments: str) -> subprocess.Popen[str]:
    """`vae-ray`, with a Ray of its own: workers have the environment in which their Ray was started."""
    process = [sys.executable, "-m", "vae_ray", *arguments, "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(process, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    return dict(json.loads(out))


def test_workers_at_a_uri_are_killed_with_their_driver_and_go_on(store: ObjectStore, tmp_path: Path) -> None:
    alone = train(digits(tmp_path, 0, name="alone", **{"training.epochs": EPOCHS}))
    file = tmp_path / "experiment.yaml"
    experiment = digits(tmp_path, 2, name="workers", **{"training.epochs": EPOCHS, "run.storage": store.uri})
    file.write_text(experiment.to_yaml())
    driver = command("train", str(file))
    deadline = time.monotonic() + 120
    while "images/samples/epoch=0002.png" not in store.names("workers"):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    result = answer(command("train", str(file), "--resume"))
    assert result["run_dir"] == f"{store.uri}/workers"
    assert result["epochs"] == EPOCHS
    assert result["metrics"]["test/nelbo"] == pytest.approx(alone.metrics["test/nelbo"], abs=0.01)
    model = TrainedVAE.load(result["best_checkpoint"])
    assert model.evaluate("test")["test/nelbo"] == pytest.approx(result["metrics"]["test/nelbo"], abs=1e-4)
    assert not any(name.startswith((".ray", ".driver-")) for name in store.names("workers"))


def test_a_sweep_at_a_uri_leaves_its_best_model_and_report_there(store: ObjectStore, tmp_path: Path) -> None:
    options = ["--num-trials", "2", "--training.epochs", "2", "--scheduler=none"]
    options += ["--storage", store.uri, "--name", "sweep"]
    result = answer(command("sweep", "digits", *options))
    assert result["states"] == {"finished": 2}
    assert result["report"] == f"{store.uri}/sweep/report.html"
    assert {"sweep.yaml", "trials.jsonl", "leaderboard.csv", "summary.json", "report.html"} <= store.names("sweep")
    best = TrainedVAE.load(f"{store.uri}/sweep")
    assert best.evaluate("test")["test/nelbo"] == pytest.approx(result["best"]["metrics"]["test/nelbo"], abs=1e-4)
    assert TrainedVAE.load(f"{store.uri}/sweep/trials/0001").checkpoint.epoch in (1, 2)
    grown = answer(command("sweep", "digits", *[*options, "--resume"][2:], "--num-trials", "3"))
    assert grown["states"] == {"finished": 3}
