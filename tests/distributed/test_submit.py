"""`vae-ray submit` to a real cluster: what is refused before, what runs there, and what is reported."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.heads import RAY, Head
from vae_ray import Experiment, TrainedVAE

pytestmark = pytest.mark.ray


def submit(head: Head, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    place = ["--address", head.dashboard, "--python", sys.executable]
    return head.vae_ray("submit", *arguments, *place, cwd=cwd, **environment)


def jobs(head: Head) -> int:
    """How many jobs the cluster has."""
    authorization = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=authorization)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return len(json.load(answer))


def answer_of(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def test_files_of_mine_are_swept_on_the_cluster_from_any_directory(head: Head, tmp_path: Path) -> None:
    """The user is outside of the repository; the experiment, the search and a directory of theirs are sent along."""
    mine, storage = tmp_path / "mine", tmp_path / "storage"
    mine.mkdir()
    experiment = Experiment.preset("digits").with_overrides({"training.epochs": 1, "model.network.hidden": (16,)})
    (mine / "mine.yaml").write_text(experiment.to_yaml())
    (mine / "search.yaml").write_text(yaml.safe_dump({"model.latent_dim": {"grid": [2, 3]}}))
    done = submit(
        head,
        *("sweep", "mine.yaml", "--search=search.yaml", "--searcher", "grid", "--scheduler", "none"),
        *("--storage", str(storage), "--name=sent", "--optim.lr", "2e-3"),
        *("--env", "VAE_RAY_CACHE=" + str(tmp_path / "cache"), "--working-dir", ".", "--json"),
        cwd=mine,
    )
    assert done.returncode == 0, done.stderr
    assert answer_of(done) | {"job_id": ""} == {
        "job_id": "",
        "address": head.dashboard,
        "status": "SUCCEEDED",
        "exit_code": 0,
    }
    assert "best trial" in done.stderr  # the job's log
    assert (tmp_path / "cache").is_dir()
    assert json.loads((storage / "sent" / "summary.json").read_text())["num_trials"] == 2
    trained = TrainedVAE.load(storage / "sent").experiment
    assert (trained.model.network.hidden, trained.optim.lr) == ((16,), 2e-3)
    assert trained.model.latent_dim in (2, 3)


def test_a_mistake_that_only_the_job_can_find_has_its_exit_code_and_its_line(head: Head, tmp_path: Path) -> None:
    data = ["--data.source=mnist", "--data.root", str(tmp_path / "none"), "--data.download=false"]
    done = submit(head, "train", "digits", "--storage", str(tmp_path / "s"), *data, "--json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert answer_of(done)["status"] == "FAILED"
    assert answer_of(done)["exit_code"] == 2
    assert re.search(r"^vae-ray: data\.source mnist: file .* is missing", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_more_workers_than_the_cluster_has_are_refused_and_no_job_is_made(head: Head, tmp_path: Path) -> None:
    before = jobs(head)
    done = submit(head, "train", "digits", "--storage", str(tmp_path), "--workers.num", "64", cwd=tmp_path)
    assert done.returncode == 2
    assert "workers.num: got 64 with 1 CPU each, but the cluster has room for 2 (2 CPUs); for example" in done.stderr
    assert jobs(head) == before


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(head: Head, tmp_path: Path) -> None:
    place = ["--address", head.dashboard, "--python", sys.executable, "--storage", str(tmp_path)]
    command = [sys.executable, "-m", "vae_ray", "submit", "train", "digits", "--training.epochs=100000", *place]
    following = subprocess.Popen(
        [*command, "--workers.num=0", "--name=long", "--json"],
        cwd=tmp_path,
        env=dict(head.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert following.stderr is not None
    log = ""
    while not re.search(r"^epoch +1/100000 ", log, re.MULTILINE):
        line = following.stderr.readline()
        assert line, log
        log += line
    following.send_signal(signal.SIGINT)
    out, err = following.communicate(timeout=30)
    assert following.returncode == 130, err
    job_id = json.loads(out)["job_id"]
    assert f"{job_id} keeps running; stop it with: ray job stop --address {head.dashboard} {job_id}" in err
    assert "Traceback" not in err
    epochs = tmp_path / "long" / "metrics.jsonl"
    before = len(epochs.read_text().splitlines())
    time.sleep(3)
    assert len(epochs.read_text().splitlines()) > before
    # what the message says stops it, and leaves it the time for its last checkpoint
    done = head.run(RAY, "job", "stop", "--address", head.dashboard, job_id)
    assert done.returncode == 0, done.stderr
    log = head.run(RAY, "job", "logs", "--address", head.dashboard, job_id).stdout
    assert "vae-ray: stopped after " in log
    assert TrainedVAE.load(tmp_path / "long").checkpoint.epoch >= 1


def test_a_job_that_is_not_followed_runs_to_its_end(head: Head, tmp_path: Path) -> None:
    options = ["--training.epochs=1", "--workers.num=0", "--name=alone", "--no-follow", "--json"]
    done = submit(head, "train", "digits", "--storage", str(tmp_path), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert answer_of(done)["exit_code"] is None
    deadline = time.monotonic() + 120
    while not (tmp_path / "alone" / "summary.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.5)
